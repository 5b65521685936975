"""What a reader must know before any figure of a run, as `summary` and `report` say it."""

from __future__ import annotations

from eplb_analyze.blocks import StepState
from eplb_analyze.check import TOLERATED_INCOMPLETE
from eplb_analyze.errors import listed, plural
from eplb_analyze.output import percent
from eplb_analyze.summary import Summary


def banners(summary: Summary, acted: bool | None) -> list[str]:
    """Lines in capitals, which stand out in a pipe, too.

    ``acted``: whether a placement changed in the whole run; None: not known.
    """
    lines = []
    if summary.missing_ranks:
        ranks = plural(len(summary.expected_ranks), "rank")
        lines.append(f"INCOMPLETE: of {ranks}, these wrote nothing: {listed(summary.missing_ranks)}")
    elif lacks_much(summary):
        lines.append(f"INCOMPLETE: {incomplete(summary)}")
    if acted is False:
        redundant = summary.run.num_physical_experts - summary.run.num_logical_experts
        also = f" and its {plural(redundant, 'redundant expert')}" if redundant > 0 else ""
        lines.append(f"EPLB NEVER ACTED: the placement{also} never changed")
    return lines


def lacks_much(summary: Summary) -> bool:
    """Whether so many steps lack a rank that the figures leave out too much."""
    return summary.steps.incomplete_share > TOLERATED_INCOMPLETE


def incomplete(summary: Summary) -> str:
    """How many steps lack a rank, and which rank."""
    steps = summary.steps
    count = plural(steps.count(StepState.INCOMPLETE), "step")
    return f"{count} ({percent(steps.incomplete_share)}) in no figure: {steps.why_incomplete()}"
