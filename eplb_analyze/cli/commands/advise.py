"""`advise`: leave the load balancer as it is, switch it on, or change it to what?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli.options import (
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
from eplb_analyze.cli.output import Output, OutputFormat, say
from eplb_analyze.cli.views.advise import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


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
    from eplb_analyze.replay.advise import advise as judge

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
