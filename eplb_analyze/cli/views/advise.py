"""Shows the verdict of `advise`, the evidence for it, and what it saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_heading, print_line, print_notes, table
from eplb_analyze.cli.views.replay import OBJECTIVES, pause_sentence
from eplb_analyze.text import clean, figure, milliseconds, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.reader.recorded_setting import Recorded, Setting
    from eplb_analyze.replay.advise import Advice, Judged

STYLES = {
    "enable": "bold yellow",
    "retune": "bold yellow",
    "leave": "bold green",
    "not enough data": "bold red",
}


def render(console: Console, advice: Advice) -> None:
    print_heading(console, advice.model, f" · run {advice.run_id}")
    if advice.fault is not None:
        print_line(console, (advice.fault, "bold red"))
    print_line(console, "verdict: ", (advice.verdict, STYLES[advice.verdict]))
    for reason in advice.reasons[advice.fault is not None :]:
        print_line(console, reason)
    print_notes(console, advice.notes)
    if advice.best is not None and advice.today is not None:
        console.print()
        _evidence(console, advice, advice.best, advice.today)
    if advice.replay is not None:
        known, idle = figure(advice.measured_balancedness), percent(advice.replay.measured_idle_fraction)
        steps = f"steps {advice.replay.first_step} to {advice.replay.last_step}"
        console.print(f"recorded in {steps}: balancedness {known}, idle {idle}")


def _evidence(console: Console, advice: Advice, best: Judged, today: Judged) -> None:
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
    listing.add_row("active experts", figure(today.active_experts, 1), figure(best.active_experts, 1))
    listing.add_row("rearrangements", f"{today.rearrangements:,}", f"{best.rearrangements:,}")
    listing.add_row("weights moved", f"{today.weights_moved:,}", f"{best.weights_moved:,}")
    console.print(listing)
    console.print()
    if advice.replay.objective == "ms":
        _in_ms(console, advice)
    elif advice.gain is not None:
        low, high = (signed(100 * value, 1) for value in (advice.gain.low, advice.gain.high))
        paid = "" if advice.replay.cost_per_expert_ms is None else ", less what moving costs more"
        active = advice.replay.objective == "active"
        what = "the active experts of the ranks with most" if active else "the time, by tokens"
        gain = f"{signed(100 * advice.gain.value, 1)} % of {what} (95 %: {low} … {high})"
        print_line(console, "saves ", (gain, "bold"), paid)
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
        print_line(console, f"  {advice.engine_arguments}", soft_wrap=True)
    basis = (
        f"by the cost fitted to this run's step times: {advice.replay.cost.message}; each token goes to any "
        "replica of its expert"
    )
    if advice.replay.objective != "ms":
        why = advice.replay.cost.message.removeprefix("not measurable in this run: ")
        known = "not measurable" if advice.replay.cost.ms_per_step is None else "by the run's step times"
        basis = (
            f"expected by {OBJECTIVES[advice.replay.objective.value]}, as if a step were nothing but its "
            f"experts, and each token went to any replica of its expert; milliseconds {known}: {why}"
        )
    print_line(console, (basis, "dim"))


def _in_ms(console: Console, advice: Advice) -> None:
    assert advice.replay is not None
    net, gain = advice.net_ms_per_step, advice.gain_ms_per_step
    if net is None or gain is None:
        return
    text = milliseconds(net.estimate, net.low, net.high, sign=True)
    share = "" if advice.gain is None else f", {signed(100 * advice.gain.value, 1)} % of the median step"
    print_line(console, "net gain per step ", (text, "bold"), share)
    work = milliseconds(gain.estimate, gain.low, gain.high, sign=True)
    print_line(
        console,
        f"of that, work of the slowest ranks: {work}; the rest is pauses, at the rate of the whole run",
    )
    print_line(console, pause_sentence(advice.replay.pause))
    if advice.break_even_pause_ms is not None:
        pause = milliseconds(advice.break_even_pause_ms)
        print_line(console, f"used up if a rearrangement pauses the engine for {pause}")


def _count(setting: Setting | Recorded, name: str) -> str:
    value = getattr(setting, name)
    return "–" if value is None else f"{value:,}"
