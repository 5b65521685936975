"""Shows what imbalance cost in milliseconds, phase by phase, or why that is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line
from eplb_analyze.text import clean, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.cost import PhaseCost, RunCost

STYLES = {"measured": "bold red", "no_measurable_cost": "bold green", "not_identifiable": "bold yellow"}
#: Phases with a smaller share of the steps are only counted, unless their cost is known.
SMALL_PHASE = 0.05


def render(console: Console, cost: RunCost) -> None:
    """A line for each phase, or one if there is only one."""
    steps = sum(phase.steps for phase in cost.phases.values())
    shown = {
        name: phase
        for name, phase in cost.phases.items()
        if phase.ms_per_step is not None or phase.steps >= SMALL_PHASE * steps
    }
    if cost.ms_per_step is None:
        print_line(console, (f"cost of imbalance unknown, {cost.message}", STYLES["not_identifiable"]))
        return
    for name, phase in shown.items():
        _phase(console, phase, f"{clean(name)}: " if len(shown) > 1 else "")
    rest = steps - sum(phase.steps for phase in shown.values())
    print_line(console, (cost.evidence, "dim"))
    if rest:
        print_line(console, (f"not measured: {plural(rest, 'step')} of rare phases", "dim"))


def _phase(console: Console, phase: PhaseCost, prefix: str) -> None:
    text = phase.message if phase.ms_per_step is not None else f"cost unknown: {phase.message}"
    share = phase.share_of_step
    bound = None if share is None else share.estimate if phase.status == "measured" else share.high
    more = "" if bound is None else f", {percent(bound)} of step time"
    print_line(console, prefix, (text, STYLES.get(phase.status, "")), more)
    if phase.regime:
        print_line(console, phase.regime, indent=2)


def idle(cost: RunCost) -> str:
    """What an idle fraction, which counts tokens, says of time."""
    if cost.ms_per_step is not None:
        return " (counted in tokens, not time; for the cost in time see above)"
    return " (counted in tokens; this is lost time only if time is proportional to tokens)"
