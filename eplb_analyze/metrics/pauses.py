"""How long a rearrangement paused the engine: what the steps around it took beyond the usual time.

Arrays in, arrays out.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from eplb_analyze.distinct import distinct
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, standard_error
from eplb_analyze.metrics.cost import WAITED
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.text import plural
from eplb_dump.format.journal import Int64

Bool = npt.NDArray[np.bool_]

#: The usual time is that of so many steps before and as many after.
NEIGHBORS = 100
#: The pause is between the steps before and after the change, but a writer may see a change a step late.
MARGIN = 1


def measure(step: Int64, ms: Float64, kind: Int64, changed: Int64, others: Int64) -> Interval | str:
    """The pause of one rearrangement, ms, with its 95% interval; or why it is not known.

    Around a step at which a layer changed, all time beyond the usual counts. Between such steps of a
    rearrangement that takes many, an idle gap must not count: a step's excess is bounded by what the steps
    around the rearrangement show. The interval is that of the sum of as many usual steps.

    Args:
        step: int64 ``[n]``, ascending.
        ms: float64 ``[n]``, the time since the step before; NaN if unknown.
        kind: int64 ``[n]``, the phase of each step; the usual time is that of the phase.
        changed: the steps at which a layer changed, ascending.
        others: those of all rearrangements.
    """
    if np.isfinite(ms[np.isin(step, changed)]).sum() < len(changed):
        return "the step before or after it is missing, so its time is not known"
    low, high = np.searchsorted(step, [changed[0] - MARGIN, changed[-1] + MARGIN + 1])
    near, known = beside(step, others), np.isfinite(ms)
    before = np.flatnonzero(known[:low] & ~near[:low])[-NEIGHBORS:]
    after = high + np.flatnonzero(known[high:] & ~near[high:])[:NEIGHBORS]
    usual = np.concatenate([before, after])
    if len(usual) < MIN_STEPS:
        return f"{plural(len(usual), 'step')} around it with a known time, but {MIN_STEPS} are needed"
    # An engine that waits for its device records a step when it ends, others when it begins.
    kinds = [kind] if (kind == kind[0]).all() else [kind, np.roll(kind, 1)]
    residuals = min(
        (_residuals(ms, each, usual) for each in kinds),
        key=lambda found: float(np.abs(found[usual]).mean()),
    )
    deviation = float(np.median(np.abs(residuals[usual]))) / 0.6745
    bound = WAITED * max(deviation, 1e-6 * float(np.median(ms[usual])))
    ordinary = np.clip(residuals, -bound, bound)
    span = np.zeros(len(step), np.bool_)
    span[low:high] = known[low:high]
    own = beside(step, changed)
    excess = np.where(own, residuals, ordinary)[span] - ordinary[usual].mean()
    count = len(excess)
    half = 1.96 * standard_error(ordinary[usual]) * math.sqrt(len(usual) * count + count**2)
    value = float(excess.sum())
    return Interval(max(0.0, value), max(0.0, value - half), max(0.0, value + half))


class Neighborhoods:
    """The steps of a run, of which each pause is measured by those around its rearrangement only."""

    def __init__(self, step: Int64, ms: Float64, kind: Int64, changes: Int64) -> None:
        """As in :func:`measure`; ``changes``: the steps at which layers changed, of all, ascending."""
        self._step, self._ms, self._kind, self._changes = step, ms, kind, changes
        self._usual = np.flatnonzero(np.isfinite(ms) & ~beside(step, changes))

    def measure(self, changed: Int64) -> Interval | str:
        """What :func:`measure` gives for all steps, without a look at all of them for each pause."""
        step, usual = self._step, self._usual
        low, high = np.searchsorted(step, [changed[0] - MARGIN, changed[-1] + MARGIN + 1]).tolist()
        before, after = np.searchsorted(usual, [low, high]).tolist()
        around = usual[max(0, before - NEIGHBORS) : after + NEIGHBORS]
        # One step more, because a usual step may have the phase of the one before it.
        first = max(0, min([low, *around[:1].tolist()]) - 1)
        last = max([high, *(around[-1:] + 1).tolist()])
        near = slice(first, last)
        span, others = step[near], changed
        if len(span):  # else its time is not known
            edges = np.searchsorted(self._changes, [span[0] - MARGIN, span[-1] + MARGIN + 1])
            others = self._changes[slice(*edges.tolist())]
        return measure(span, self._ms[near], self._kind[near], changed, others)


def beside(step: Int64, changed: Int64) -> Bool:
    """The steps at which a layer changed, and :data:`MARGIN` before and after: bool ``[n]``."""
    return np.isin(step, (changed[:, np.newaxis] + np.arange(-MARGIN, MARGIN + 1)).ravel())


def _residuals(ms: Float64, kind: Int64, usual: Int64) -> Float64:
    """The time beyond the median of usual steps of the same kind; of all if that has few."""
    out = ms - np.median(ms[usual])
    kinds = distinct(kind[usual]).tolist()
    for each in kinds if len(kinds) > 1 or (kind != kinds[0]).any() else ():
        same = usual[kind[usual] == each]
        if len(same) >= MIN_STEPS:
            out[kind == each] = ms[kind == each] - np.median(ms[same])
    return out


def mean_of(pauses: list[Interval]) -> Interval | None:
    """The mean pause of rearrangements, with how much they differ; None of none."""
    if not pauses:
        return None
    values = np.array([pause.value for pause in pauses])
    mean, count = float(values.mean()), len(values)
    spread = 1.96 * float(values.std(ddof=1)) / np.sqrt(count) if count > 1 else 0.0
    sides = [np.array([p.value - p.low for p in pauses]), np.array([p.high - p.value for p in pauses])]
    below, above = (float(np.hypot(np.sqrt((side**2).sum()) / count, spread)) for side in sides)
    return Interval(mean, max(0.0, mean - below), mean + above)
