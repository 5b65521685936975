"""`advise`: leave the load balancer as it is, switch it on, or change it to what?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.commands.options import (
    CostOption,
    Dump,
    GroupsOption,
    IntervalOption,
    ModelOption,
    OutputOption,
    PolicyOption,
    RedundantOption,
    RunOption,
    StartOption,
    StepsOption,
    WindowOption,
    WorkersOption,
    finish,
    open_for,
    parse_choices,
    parse_steps,
)
from eplb_analyze.errors import EXIT_CHECK_FAILED, plural
from eplb_analyze.output import (
    Output,
    OutputFormat,
    clean,
    figure,
    heading,
    percent,
    say,
    show_notes,
    signed,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.advise import Advice, Judged
    from eplb_analyze.settings import Recorded, Setting

STYLES = {
    "enable": "bold yellow",
    "retune": "bold yellow",
    "leave": "bold green",
    "not enough data": "bold red",
}


def advise(
    dump: Dump = Path("."),
    policy: PolicyOption = None,
    redundant: RedundantOption = None,
    interval: IntervalOption = None,
    window: WindowOption = None,
    start: StartOption = None,
    min_gain: Annotated[
        float,
        typer.Option("--min-gain", help="A smaller share of the time is not worth a change.", min=0, max=1),
    ] = 0.02,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            help="Exit with 1 where the recorded balancedness is below, or not known.",
            min=0,
            max=1,
        ),
    ] = None,
    num_groups: GroupsOption = 1,
    cost_per_expert_ms: CostOption = None,
    steps: StepsOption = None,
    run: RunOption = None,
    model: ModelOption = None,
    workers: WorkersOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Leave the load balancer as it is, switch it on, or change it to what, with which gain?

    The settings of `replay` are tried; the best on the first 60 % of the steps is judged on the rest.
    """
    wanted = parse_steps(steps)
    choices = parse_choices(policy, redundant, interval, window, start)
    from eplb_analyze.advise import advise as judge

    out = Output(output)
    opened = open_for(out, dump, run, model)
    advice = judge(
        opened, choices, wanted, min_gain=min_gain,
        num_groups=num_groups, cost_per_expert_ms=cost_per_expert_ms, workers=workers,
    )  # fmt: skip
    passed = None if fail_below is None else advice.passes(fail_below)
    document = {**advice.to_json(), "fail_below": fail_below, "passed": passed}
    out.emit(document, lambda console: render(console, advice))
    finish(out, opened, None if advice.replay is None else advice.replay.part.whole)
    if passed is False:
        known = advice.measured_balancedness
        found = "the balancedness is not known" if known is None else f"balancedness {known:.3f}"
        if known is not None and advice.replay is not None:
            found += f" in steps {advice.replay.first_step} to {advice.replay.last_step}"
        say("error", f"{found}, --fail-below {fail_below:g}")
        raise typer.Exit(EXIT_CHECK_FAILED)


def render(console: Console, advice: Advice) -> None:
    from rich.text import Text

    heading(console, advice.model, f" · run {advice.run_id}")
    console.print(Text.assemble("verdict: ", (advice.verdict, STYLES[advice.verdict])))
    for reason in advice.reasons:
        console.print(Text(clean(reason)))
    show_notes(console, advice.notes)
    if advice.best is not None and advice.today is not None:
        console.print()
        _evidence(console, advice, advice.best, advice.today)
    if advice.replay is not None:
        known, idle = figure(advice.measured_balancedness), percent(advice.replay.measured_idle_fraction)
        steps = f"steps {advice.replay.first_step} to {advice.replay.last_step}"
        console.print(f"recorded in {steps}: balancedness {known}, idle {idle}")


def _evidence(console: Console, advice: Advice, best: Judged, today: Judged) -> None:
    from rich.text import Text

    assert advice.replay is not None
    changes = advice.verdict in ("enable", "retune")
    listing = table(console, "<", "today", "advised" if changes else "best other")
    assert best.setting is not None
    listing.add_row("policy", *(clean(s.policy or "–") for s in (advice.replay.recorded, best.setting)))
    for name, text in (
        ("num_redundant_experts", "redundant experts"),
        ("interval", "interval, steps"),
        ("window", "window, steps"),
    ):
        listing.add_row(text, *(_count(s, name) for s in (advice.replay.recorded, best.setting)))
    listing.add_section()
    listing.add_row("balancedness", figure(today.balancedness), figure(best.balancedness))
    listing.add_row("idle", percent(today.idle_fraction), percent(best.idle_fraction))
    listing.add_row("rearrangements", f"{today.rearrangements:,}", f"{best.rearrangements:,}")
    listing.add_row("weights moved", f"{today.weights_moved:,}", f"{best.weights_moved:,}")
    console.print(listing)
    console.print()
    if advice.gain is not None:
        low, high = (signed(100 * value, 1) for value in (advice.gain.low, advice.gain.high))
        paid = "" if advice.replay.cost_per_expert_ms is None else ", less what moving costs more"
        gain = f"{signed(100 * advice.gain.value, 1)} % of the time (95 %: {low} … {high})"
        console.print(Text.assemble("saves ", (gain, "bold"), paid))
    if advice.break_even_ms is not None:
        console.print(
            f"used up if a rank needs {advice.break_even_ms:.3g} ms to fetch one expert of one layer"
        )
    if advice.trained is not None and advice.judged is not None:
        chosen, judged = (f"{s.first_step} to {s.last_step}" for s in (advice.trained, advice.judged))
        console.print(
            f"chosen from {plural(len(advice.replay.outcomes), 'setting')} on steps {chosen}, judged on "
            f"{judged}, whose figures these are"
        )
    if advice.engine_arguments is not None:
        console.print("to start the engine so:")
        console.print(Text(f"  {advice.engine_arguments}"), soft_wrap=True)
    tokens = (
        "tokens are not milliseconds: this is the time of the ranks with most tokens, as if a step were "
        "nothing but its experts, and replicas shared evenly"
    )
    console.print(Text(tokens, style="dim"))


def _count(setting: Setting | Recorded, name: str) -> str:
    value = getattr(setting, name)
    return "–" if value is None else f"{value:,}"
