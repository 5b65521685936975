"""Ranges in which a series departs from its usual level, found by abrupt changes at their edges.

Gradual changes (drift, the time of day) are no departure. The method is binary segmentation (Scott and Knott,
1974) on contrasts of neighboring windows (MOSUM: Eichinger and Kirch, arXiv 1509.06195), with the noise of
each contrast estimated robustly at its own length, so that autocorrelation widens it.

Arrays in, arrays out.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64

Int64 = npt.NDArray[np.int64]

#: Shorter departures are not looked for.
MIN_STEPS = 10
#: A departure must lower the series by so much, and by so many standard deviations of single values.
MIN_EFFECT, MIN_DEVIATIONS = 0.04, 1.25
#: A contrast must exceed so many of its standard errors. A run has millions of contrasts; 5.6 keeps the
#: chance that normal noise exceeds it below 1% in 20,000 steps of 58 layers.
THRESHOLD = 5.6
#: At an edge the level must change by so many standard errors in excess of a common slope of both sides.
CLEAR = 4.0
#: Of a series, the clearest; one that changes more often has no usual level to depart from.
MAX_EDGES = 24
#: A step must lower the sum of squares by so many variances more than a smooth curve does.
ABRUPT = 5.0
#: With fewer values on one side it is a short departure, which no drift is.
SHORT = 40
#: Values before and after an edge that are compared.
WINDOWS = ((10, 80), (80, 10), (40, 40), (160, 160))
_REACH = max(max(window) for window in WINDOWS)
#: A first pass over means of so many values, with a lower threshold, chooses the series to look at, if
#: they are long.
COARSE, COARSE_THRESHOLD, COARSE_FROM = 5, 4.5, 2000
_COARSE_WINDOWS = ((2, 16), (16, 2), (8, 8), (32, 32))
#: Noise is estimated from about so many values of a series.
_SAMPLE = 2000
#: 1 / the median of the absolute value of a standard normal variable.
_NORMAL = 1.4826


class Departure(NamedTuple):
    """Values ``first`` to ``end - 1`` of a series are lower than usual by ``drop``."""

    first: int
    end: int
    drop: float


class _Edge(NamedTuple):
    """The level changes from ``before`` to ``after`` at an index."""

    at: int
    before: float
    after: float

    @property
    def jump(self) -> float:
        return self.after - self.before


class Noise(NamedTuple):
    """Standard deviations of each series: of single values, and of the contrasts of some windows."""

    single: Float64
    #: ``[windows, series]``.
    contrasts: Float64
    #: Of single values, as large as it would be if they were independent and their long means as uncertain.
    long_run: Float64


def departures(values: npt.NDArray[np.floating]) -> list[list[Departure]]:
    """The departures of each series, in order; ``values``: ``[series, n]``, without NaN."""
    series, n = values.shape
    found: list[list[Departure]] = [[] for _ in range(series)]
    if n < 3 * MIN_STEPS:
        return found
    chosen = np.arange(series)
    if n >= COARSE_FROM:
        whole = n // COARSE
        means = np.empty((series, whole))
        for row, own in zip(means, values, strict=True):  # one by one, which copies no more than one
            own[: whole * COARSE].reshape(whole, COARSE).mean(axis=1, dtype=np.float64, out=row)
        chosen = np.flatnonzero(_highest(means, _COARSE_WINDOWS) > COARSE_THRESHOLD)
    for index in chosen:
        found[index] = _departures(values[index].astype(np.float64))
    return found


def _highest(values: Float64, windows: tuple[tuple[int, int], ...]) -> Float64:
    """The highest |contrast| / standard error of each series; 0 if none reaches the minimum effect."""
    noise = noise_of(values, windows)
    total = _cumulated(values)
    best = np.zeros(len(values))
    for (before, after), deviation in zip(windows, noise.contrasts, strict=True):
        if values.shape[1] < before + after:
            continue
        contrast = np.abs(_contrasts(total, before, after)).max(axis=1)
        # Coarse means can lie across an edge, which takes up to a third of the effect.
        ratio = np.divide(contrast, deviation, out=np.full(len(values), np.inf), where=deviation > 0)
        best = np.maximum(best, np.where(contrast > 0.6 * MIN_EFFECT, ratio, 0))
    return best


def noise_of(values: Float64, windows: tuple[tuple[int, int], ...] = WINDOWS) -> Noise:
    """The noise of each series ``[series, n]``, whatever changes of level it has in a small part.

    The standard error of a contrast is the larger of what is measured at its length and what autocorrelation
    of the first order, with white noise as the least, makes of the noise of single values.
    """
    n = values.shape[1]
    every = max(1, n // _SAMPLE)
    far = 30 if n >= 600 else min(10, n // 4)
    near, distant = (
        _NORMAL / np.sqrt(2) * np.median(np.abs(values[:, lag::every] - values[:, :-lag:every]), axis=1)
        for lag in (1, far)
    )
    single = np.maximum(near, distant)
    # The variance of a difference at lag k is 2 σ² (1 − ρ^k).
    ratio = np.divide(near, single, out=np.ones(len(single)), where=single > 0)
    rho = np.clip(1 - ratio**2 - 0.1, 0, 0.97)
    contrasts = np.empty((len(windows), len(values)))
    total = _cumulated(values)
    for i, (before, after) in enumerate(windows):
        own = single * np.sqrt(_mean_variance(before, rho) + _mean_variance(after, rho))
        if n >= 16 * (before + after):
            apart = max(1, min(before, after) // 2, n // _SAMPLE)
            measured = _NORMAL * np.median(np.abs(_contrasts(total[:, :], before, after, apart)), axis=1)
            own = np.maximum(own, measured)
        contrasts[i] = own
    return Noise(single, contrasts, single * np.sqrt((1 + rho) / (1 - rho)))


def _mean_variance(n: int, rho: Float64) -> Float64:
    """The variance of the mean of n values of variance 1 and autocorrelation ρ^k at lag k."""
    variance: Float64 = ((1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2)) / n
    return variance


def _cumulated(values: Float64) -> Float64:
    total = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=total[:, 1:])
    return total


def _contrasts(total: Float64, before: int, after: int, every: int = 1) -> Float64:
    """Mean of the ``after`` values from an index on - mean of the ``before`` values before it."""
    n = total.shape[1]
    middle = total[:, before : n - after : every]
    later: Float64 = (total[:, before + after :: every] - middle) / after
    later -= (middle - total[:, : n - before - after : every]) / before
    return later


def _departures(values: Float64) -> list[Departure]:
    found = []
    open_: list[_Edge] = []
    for edge in _edges(values):
        if edge.jump < 0:
            open_.append(edge)
            continue
        ended = [drop for drop in open_ if _brings_back(edge, drop) or edge.jump >= -0.8 * drop.jump]
        if not ended:
            continue
        # That which the edge is most like; those that began later end with it, and those before if it brings
        # back their level, too.
        own = min(ended, key=lambda drop: abs(np.log(-edge.jump / drop.jump)))
        before = [drop for drop in open_ if drop.at < own.at]
        found += [
            Departure(drop.at, edge.at, -drop.jump)
            for drop in [own, *(drop for drop in before if _brings_back(edge, drop))]
        ]
        open_ = [drop for drop in before if not _brings_back(edge, drop)]
    n = len(values)
    found += [
        Departure(drop.at, n, -drop.jump) for drop in open_[:1] if drop.at >= max(5 * MIN_STEPS, n // 10)
    ]
    usual = [d for d in found if d.end == n or d.end - d.first <= 0.6 * n]
    return sorted(_without_nested(usual))


def _brings_back(edge: _Edge, drop: _Edge) -> bool:
    """Whether the level after an edge is near that before a drop."""
    return edge.after >= drop.before + drop.jump / 2


def _without_nested(found: list[Departure]) -> list[Departure]:
    """Departures inside of others are listed only if they go further down."""
    return [
        one
        for one in found
        if not any(
            other is not one
            and other.first <= one.first
            and one.end <= other.end
            and one.drop < 1.5 * other.drop
            for other in found
        )
    ]


def _edges(values: Float64) -> list[_Edge]:
    """The abrupt changes of level of one series, in order."""
    noise = noise_of(values[np.newaxis])
    total = _cumulated(values[np.newaxis])[0]
    single, long_run = float(noise.single[0]), float(noise.long_run[0])
    least = max(MIN_EFFECT, MIN_DEVIATIONS * single)
    side = MIN_STEPS - 2
    indices = np.arange(side, len(values) - side + 1)
    whole = _clearness(total, noise.contrasts[:, 0], indices, 0, len(values), least)
    cuts: list[int] = []
    todo: list[tuple[float, int, int, int]] = []  # the clearest first

    def look(low: int, high: int) -> None:
        best = _best_cut(total, noise.contrasts[:, 0], whole, low, high, least)
        if best is not None:
            clearness, at, earlier, later = best
            at = _refined(values, at, max(low, at - earlier), min(high, at + later))
            heapq.heappush(todo, (-clearness, at, low, high))

    look(0, len(values))
    while todo and len(cuts) < MAX_EDGES:
        _, at, low, high = heapq.heappop(todo)
        cuts.append(at)
        look(low, at)
        look(at, high)
    cuts.sort()
    for _ in range(2):  # now that the edges on both sides are known
        bounds = [0, *cuts, len(values)]
        cuts = [
            _refined(values, at, max(low, at - 160), min(high, at + 160))
            for low, at, high in zip(bounds, cuts, bounds[2:], strict=False)
        ]
    bounds = [0, *cuts, len(values)]
    found = []
    for number, at in enumerate(cuts, 1):
        left, right = values[bounds[number - 1] : at], values[at : bounds[number + 1]]
        wide = _level(right[:160]) - _level(left[-160:])
        # As near to the edge as the noise permits, so that drift, which bends, does not count.
        near = int(np.clip(8 * (7 * long_run / max(abs(wide), least)) ** 2, 20, 160))
        jump, error = _jump(left[-near:], right[:near])
        clear = abs(jump) > CLEAR * error * long_run and _abrupt(left[-near:], right[:near], long_run)
        if clear and abs(jump) >= 0.6 * max(abs(wide), least) and jump * wide > 0:
            found.append(_Edge(at, _level(left[-40:]), _level(right[:40])))
    return found


def _refined(values: Float64, at: int, low: int, high: int) -> int:
    """The most likely edge near ``at`` between two others."""
    side = MIN_STEPS - 2
    if high - low < 2 * side:
        return at
    return min(max(low + split(values[low:high], at - low, 20), low + side), high - side)


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


def _clearness(total: Float64, noise: Float64, at: Int64, low: int, high: int, least: float) -> _Clearness:
    """At the indices ``at``, by values from ``low`` to ``high``; 0 where the change is below ``least``."""
    best = _Clearness(np.zeros(len(at)), np.zeros(len(at), np.int64), np.zeros(len(at), np.int64))
    for (before, after), deviation in zip(WINDOWS, noise, strict=True):
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
    total: Float64, noise: Float64, whole: _Clearness, low: int, high: int, least: float
) -> tuple[float, int, int, int] | None:
    """The clearest change of level: how clear, its index, how many values on each side show it; or None.

    ``whole``: of the indices ``MIN_STEPS - 2`` and up. Only near the ends of the range does it differ.
    """
    side = MIN_STEPS - 2
    if high - low < 2 * side:
        return None
    inner = range(low + _REACH, high - _REACH + 1)
    if inner:
        at = np.concatenate([np.arange(low + side, inner.start), np.arange(inner.stop, high - side + 1)])
    else:
        at = np.arange(low + side, high - side + 1)
    found = []
    for indices, clear in (
        (at, _clearness(total, noise, at, low, high, least)),
        (inner, whole.between(inner.start - side, inner.stop - side)),
    ):
        if len(indices):
            top = clear.best()
            ratio, left, right = (values[top] for values in clear)
            found.append((float(ratio), int(indices[top]), int(left), int(right)))
    best = max(found)
    return best if best[0] > THRESHOLD else None


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
    n = len(values)
    at = np.arange(max(1, near - reach), min(n - 1, near + reach) + 1)
    if not len(at):
        return near
    total = np.concatenate([[0.0], np.cumsum(values)])
    gain = total[at] ** 2 / at + (total[n] - total[at]) ** 2 / (n - at)
    return int(at[gain.argmax()])
