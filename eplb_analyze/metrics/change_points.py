"""Edges: abrupt changes of the level of a series.

Gradual changes (drift, the time of day) are no edges. The method is binary segmentation (Scott and Knott,
1974) on contrasts of neighboring windows (:mod:`metrics.contrasts`).

Arrays in, arrays out.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.contrasts import cumulated
from eplb_analyze.metrics.formulas import Float64

Int64 = npt.NDArray[np.int64]

#: Edges are at least about so far apart.
MIN_STEPS = 10
#: At an edge the level must change by so much, and by so many standard deviations of single values.
MIN_EFFECT, MIN_DEVIATIONS = 0.04, 1.25
#: A contrast must exceed so many of its standard errors. A run has millions of contrasts; 5.6 keeps the
#: chance that normal noise exceeds it below 1% in 20,000 steps of 58 layers.
THRESHOLD = 5.6
#: At an edge the level must change by so many standard errors in excess of a common slope of both sides.
CLEAR = 4.0
#: Of a series, the clearest: more of them would take long.
MAX_EDGES = 100
#: A step must lower the sum of squares by so many variances more than a smooth curve does.
ABRUPT = 5.0
#: With fewer values on one side it is a short departure, which no drift is.
SHORT = 40
#: Values before and after an edge that are compared.
WINDOWS = ((10, 80), (80, 10), (40, 40), (160, 160))
_REACH = max(max(window) for window in WINDOWS)
_SIDE = MIN_STEPS - 2


class Edge(NamedTuple):
    """The level changes from ``before`` to ``after`` at an index."""

    at: int
    before: float
    after: float

    @property
    def jump(self) -> float:
        return self.after - self.before


def edges(values: Float64, single: float, long_run: float, errors: Float64, where: Int64) -> list[Edge]:
    """The abrupt changes of level of one series ``[n]``, in order.

    Args:
        single, long_run: of :class:`~eplb_analyze.metrics.contrasts.SingleNoise`.
        errors: the standard errors of the contrasts of :data:`WINDOWS`.
        where: the indices to look at, ascending.
    """
    n = len(values)
    total = cumulated(values[np.newaxis])[0]
    least = max(MIN_EFFECT, MIN_DEVIATIONS * single)
    where = where[slice(*np.searchsorted(where, [_SIDE, n - _SIDE + 1]))]
    whole = _clearness(total, errors, where, 0, n, least)
    cuts: list[int] = []
    todo: list[tuple[float, int, int, int]] = []  # the clearest first

    def look(low: int, high: int) -> None:
        best = _best_cut(total, errors, where, whole, low, high, least)
        if best is not None:
            clearness, at, earlier, later = best
            at = _refined(total, at, max(low, at - earlier), min(high, at + later))
            heapq.heappush(todo, (-clearness, at, low, high))

    look(0, n)
    while todo and len(cuts) < MAX_EDGES:
        _, at, low, high = heapq.heappop(todo)
        cuts.append(at)
        look(low, at)
        look(at, high)
    cuts.sort()
    for _ in range(2):  # now that the edges on both sides are known
        bounds = [0, *cuts, n]
        cuts = [
            _refined(total, at, max(low, at - 160), min(high, at + 160))
            for low, at, high in zip(bounds, cuts, bounds[2:], strict=False)
        ]
    bounds = [0, *cuts, n]
    found = []
    for number, at in enumerate(cuts, 1):
        left, right = values[bounds[number - 1] : at], values[at : bounds[number + 1]]
        wide = _level(right[:160]) - _level(left[-160:])
        # As near to the edge as the noise permits, so that drift, which bends, does not count.
        near = int(np.clip(8 * (7 * long_run / max(abs(wide), least)) ** 2, 20, 160))
        jump, error = _jump(left[-near:], right[:near])
        clear = abs(jump) > CLEAR * error * long_run and _abrupt(left[-near:], right[:near], long_run)
        if clear and abs(jump) >= 0.6 * max(abs(wide), least) and jump * wide > 0:
            found.append(Edge(at, _level(left[-40:]), _level(right[:40])))
    return found


def _refined(total: Float64, at: int, low: int, high: int) -> int:
    """The most likely edge near ``at`` between two others."""
    if high - low < 2 * _SIDE:
        return at
    found = low + _most_likely(total[low : high + 1] - total[low], at - low, 20)
    return min(max(found, low + _SIDE), high - _SIDE)


def _level(values: Float64) -> float:
    return float(np.median(values)) if len(values) > 40 else float(values.mean())


class _Clearness(NamedTuple):
    """How clear a change of level is at some indices, and how many values on each side show it."""

    ratio: Float64
    left: Int64
    right: Int64

    def best(self) -> int:
        return int(self.ratio.argmax())

    def between(self, start: int, stop: int) -> _Clearness:
        return _Clearness(self.ratio[start:stop], self.left[start:stop], self.right[start:stop])


def _clearness(total: Float64, errors: Float64, at: Int64, low: int, high: int, least: float) -> _Clearness:
    """At the indices ``at``, by values from ``low`` to ``high``; 0 where the change is below ``least``."""
    best = _Clearness(np.zeros(len(at)), np.zeros(len(at), np.int64), np.zeros(len(at), np.int64))
    for (before, after), deviation in zip(WINDOWS, errors, strict=True):
        left, right = np.minimum(before, at - low), np.minimum(after, high - at)
        contrast = (total[at + right] - total[at]) / right - (total[at] - total[at - left]) / left
        error = deviation * np.sqrt((1 / left + 1 / right) / (1 / before + 1 / after))
        size = np.abs(contrast)
        ratio = np.where(size >= least, size, 0) / np.maximum(error, 1e-9)
        clearer = ratio > best.ratio
        for values, own in zip(best, (ratio, left, right), strict=True):
            values[clearer] = own[clearer]
    return best


def _best_cut(
    total: Float64,
    errors: Float64,
    where: Int64,
    whole: _Clearness,
    low: int,
    high: int,
    least: float,
) -> tuple[float, int, int, int] | None:
    """The clearest change of level: how clear, its index, how many values on each side show it; or None.

    ``whole``: of the indices ``where``. Only near the ends of the range does it differ.
    """
    first, stop = (int(i) for i in np.searchsorted(where, [low + _SIDE, high - _SIDE + 1]))
    inner, outer = (int(i) for i in np.searchsorted(where, [low + _REACH, high - _REACH + 1]))
    inner = min(max(inner, first), stop)
    outer = min(max(outer, inner), stop)
    at = np.concatenate([where[first:inner], where[outer:stop]])
    found = []
    for indices, clear in (
        (at, _clearness(total, errors, at, low, high, least)),
        (where[inner:outer], whole.between(inner, outer)),
    ):
        if len(indices):
            top = clear.best()
            ratio, left, right = (values[top] for values in clear)
            found.append((float(ratio), int(indices[top]), int(left), int(right)))
    best = max(found, default=None)
    return best if best is not None and best[0] > THRESHOLD else None


def _jump(before: Float64, after: Float64) -> tuple[float, float]:
    """The change of level between two parts that share one slope, by least squares, and its standard error.

    The error is for values with a standard deviation of 1.
    """
    n, m = len(before), len(after)
    x = np.arange(n + m, dtype=np.float64)
    left, right = x[:n] - x[:n].mean(), x[n:] - x[n:].mean()
    spread = max(1.0, float((left**2).sum() + (right**2).sum()))
    slope = float((left @ before + right @ after) / spread)
    apart = float(x[n:].mean() - x[:n].mean())
    jump = float(after.mean() - before.mean()) - slope * apart
    return jump, float(np.sqrt(1 / n + 1 / m + apart**2 / spread))


def _abrupt(before: Float64, after: Float64, noise: float) -> bool:
    """Whether a step explains the values better than a smooth curve, a cubic."""
    if min(len(before), len(after)) < SHORT:
        return True
    values = np.concatenate([before, after])
    x = np.linspace(-1, 1, len(values))
    step = (np.arange(len(values)) >= len(before)).astype(np.float64)
    line = np.column_stack([np.ones(len(x)), x])

    def unexplained(columns: Float64) -> float:
        rest = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
        return float(rest @ rest)

    smooth = unexplained(np.column_stack([line, x**2, x**3]))
    return smooth - unexplained(np.column_stack([line, step])) > ABRUPT * noise**2


def split(values: Float64, near: int, reach: int) -> int:
    """The index, at most ``reach`` from ``near``, that best splits values into two levels.

    It is the maximum likelihood estimate of a change of mean in normal noise.
    """
    return _most_likely(np.concatenate([[0.0], np.cumsum(values)]), near, reach)


def _most_likely(total: Float64, near: int, reach: int) -> int:
    """:func:`split` of values whose sums before each index are ``total``."""
    n = len(total) - 1
    at = np.arange(max(1, near - reach), min(n - 1, near + reach) + 1)
    if not len(at):
        return near
    gain = total[at] ** 2 / at + (total[n] - total[at]) ** 2 / (n - at)
    return int(at[gain.argmax()])
