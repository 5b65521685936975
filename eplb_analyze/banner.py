"""What a reader must know before any figure of a run, as `summary` and `report` say it."""

from __future__ import annotations

from eplb_analyze.blocks import StepState
from eplb_analyze.errors import listed, plural
from eplb_analyze.output import percent
from eplb_analyze.run import Run
from eplb_analyze.settings import recorded
from eplb_analyze.summary import Summary
from eplb_dump.journal import Shape

#: Where an engine does not state its interval: vLLM's default; SGLang's is 1,000.
USUAL_INTERVAL = 3000


def banners(summary: Summary, acted: bool | None, not_due: str | None = None) -> list[str]:
    """Lines in capitals, which stand out in a pipe, too.

    Args:
        acted: whether a placement changed in the whole run; None: not known.
        not_due: what :func:`not_due` says of the run: then nothing is amiss.
    """
    lines = []
    if summary.missing_ranks:
        ranks = plural(len(summary.expected_ranks), "rank")
        lines.append(f"INCOMPLETE: of {ranks}, these wrote nothing: {listed(summary.missing_ranks)}")
    elif summary.steps.lacks_much:
        lines.append(f"INCOMPLETE: {incomplete(summary)}")
    if acted is False and not_due is None:
        redundant = summary.run.num_physical_experts - summary.run.num_logical_experts
        also = f" and its {plural(redundant, 'redundant expert')}" if redundant > 0 else ""
        lines.append(f"EPLB NEVER ACTED: the placement{also} never changed")
    return lines


def not_due(run: Run) -> str | None:
    """Why the engine had no reason to act yet; None also where it says that it does not balance."""
    info = run.info
    setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
    return None if setting.enabled is False else why_not_due(*run.step_range, setting.interval, setting.start)


def why_not_due(first: int | None, last: int | None, interval: int | None, start: int | None) -> str | None:
    """Why EPLB had no reason to act yet in a run's steps, in a sentence; None: it had.

    By the engine's own step numbers, as recording can begin long after the engine did.

    Args:
        first, last: the run's first and last step.
        interval: steps from one rearrangement to the next, as the engine states it. None: it does not,
            and nothing is asked of it before :data:`USUAL_INTERVAL` steps.
        start: the step from which the engine's first rearrangement holds.
    """
    if first is None or last is None:
        return None
    if interval is None or start is None:
        steps = last - first + 1
        if steps >= USUAL_INTERVAL:
            return None
        return f"No placement changed in {plural(steps, 'step')}; the engine does not state its interval."
    # What holds from the first step on already is no change. And before a whole interval nothing is
    # asked of an engine: some act early, but may need steps to move the weights.
    due = start + max(0, (first - start) // interval + 1) * interval
    if last >= max(due, interval):
        return None
    every = plural(interval, "step")
    if last < interval:
        return f"No placement changed: the engine's interval of {every} was not reached by step {last}."
    return f"No placement changed: none was due from step {first} to {last}, with an interval of {every}."


def incomplete(summary: Summary) -> str:
    """How many steps lack a rank, and which rank."""
    steps = summary.steps
    count = plural(steps.count(StepState.INCOMPLETE), "step")
    return f"{count} ({percent(steps.incomplete_share)}) in no figure: {steps.why_incomplete()}"
