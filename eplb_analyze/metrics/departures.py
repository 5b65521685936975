"""Departures of series from their usual level: ranges between two edges (:mod:`metrics.change_points`).

A long series is looked at twice: in means of a few values for where it may have edges, and there in full.
Most series have none.

Arrays in, arrays out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.change_points import (
    MIN_DEVIATIONS,
    MIN_EFFECT,
    MIN_STEPS,
    SHORT,
    THRESHOLD,
    WINDOWS,
    Edge,
    edges,
)
from eplb_analyze.metrics.contrasts import (
    NORMAL,
    SingleNoise,
    contrast_noise,
    contrasts,
    cumulated,
    single_noise,
)
from eplb_analyze.metrics.formulas import Float64

Int64 = npt.NDArray[np.int64]

#: A series of at least so many values is looked at in means of so many, with a lower threshold.
COARSE_FROM, COARSE, COARSE_THRESHOLD = 2000, 5, 4.5
_COARSE_WINDOWS = tuple((before // COARSE, after // COARSE) for before, after in WINDOWS)
_REACH = max(max(window) for window in _COARSE_WINDOWS)
#: So many series are looked at together, which takes little memory.
_AT_ONCE = 16
#: A series with more abrupt changes than this is restless: changes are usual.
RESTLESS = 24
#: A departure of a restless series must be so many of its usual deviations from its median.
OUTLYING = 5.0


class Departure(NamedTuple):
    """Values ``first`` to ``end - 1`` of a series are lower than usual by ``drop``."""

    first: int
    end: int
    drop: float


class Departures(NamedTuple):
    """Of each series, in order; and bool ``[series]``, which of them are restless."""

    found: list[list[Departure]]
    restless: npt.NDArray[np.bool_]


def departures(values: npt.NDArray[np.floating], restless: float = RESTLESS) -> Departures:
    """The departures of each series ``[series, n]``, without NaN.

    A restless series changes its level abruptly more than ``restless`` times, and by much. So changes are
    usual, and only what is far below nearly all of its values is a departure.
    """
    series, n = values.shape
    if n < COARSE_FROM:
        return Departures([_short(values[i : i + 1]) for i in range(series)], np.zeros(series, np.bool_))
    parts = [_long(values[low : low + _AT_ONCE], restless) for low in range(0, series, _AT_ONCE)]
    return Departures(
        [own for part in parts for own in part.found], np.concatenate([p.restless for p in parts])
    )


def clear_changes(values: Float64, since: int) -> npt.NDArray[np.bool_]:
    """Which series have a clear change of level in some windows that end behind index ``since``.

    If values are added to a series, only these windows can show departures that were not there before.

    Args:
        values: ``[series, n]``, without NaN.
    """
    n, side = values.shape[1], MIN_STEPS - 2
    single, total = single_noise(values), cumulated(values)
    least = np.maximum(MIN_EFFECT, MIN_DEVIATIONS * single.all)[:, np.newaxis]
    clear = np.zeros(len(values), np.bool_)
    for (before, after), deviation in zip(WINDOWS, contrast_noise(total, single, WINDOWS), strict=True):
        at = np.arange(max(side, since - after + 1), n - side + 1)
        left, right = np.minimum(before, at), np.minimum(after, n - at)
        later, earlier = total[:, at + right] - total[:, at], total[:, at] - total[:, at - left]
        size = np.abs(later / right - earlier / left)
        error = deviation[:, np.newaxis] * np.sqrt((1 / left + 1 / right) / (1 / before + 1 / after))
        clear |= ((size >= least) & (size > THRESHOLD * error)).any(axis=1)
    return clear


def _short(row: npt.NDArray[np.floating]) -> list[Departure]:
    """The departures of one series ``[1, n]``."""
    values = row.astype(np.float64)
    n = values.shape[1]
    if n < 3 * MIN_STEPS:
        return []
    single = single_noise(values)
    return _of(values, single, contrast_noise(cumulated(values), single, WINDOWS), np.arange(n))


def _long(values: npt.NDArray[np.floating], restless: float) -> Departures:
    """The departures of series that are first looked at in means."""
    coarse = _Coarse(values)
    result = Departures([[] for _ in values], np.zeros(len(values), np.bool_))
    usual: dict[int, _Usual] = {}
    for index in np.flatnonzero(coarse.changes() > restless).tolist():
        own = coarse.usual(index)
        if own.least_drop > 2 * MIN_EFFECT:  # otherwise it is at its usual level most of the time
            usual[index], result.restless[index] = own, True
    for index in coarse.chosen().tolist():
        where = coarse.where(index, usual[index].lowest if index in usual else None)
        if len(where):
            row = values[index : index + 1].astype(np.float64)
            found = _of(row, single_noise(row), coarse.errors[:, index : index + 1], where)
            least = usual[index].least_drop if index in usual else 0.0
            result.found[index].extend(one for one in found if one.drop >= least)
    return result


def _of(row: Float64, single: SingleNoise, errors: Float64, where: Int64) -> list[Departure]:
    """Of one series ``[1, n]``, with edges at some of its indices."""
    found = edges(row[0], float(single.all[0]), float(single.long_run[0]), errors[:, 0], where)
    return _between(found, row[0])


class _Usual(NamedTuple):
    """Median and robust standard deviation of a restless series, its changes of level included."""

    median: float
    deviation: float

    @property
    def least_drop(self) -> float:
        return OUTLYING * self.deviation

    @property
    def lowest(self) -> float:
        return self.median - self.least_drop


class _Coarse:
    """Means of :data:`COARSE` consecutive values of each series ``[series, n]``."""

    def __init__(self, values: npt.NDArray[np.floating]) -> None:
        series, self._n = values.shape
        self.means, weights = np.empty((series, self._n // COARSE)), np.full(COARSE, 1 / COARSE)
        for row, own in zip(self.means, values, strict=True):  # one by one, which copies no more than one
            np.matmul(own[: len(row) * COARSE].reshape(-1, COARSE), weights, out=row)
        self._total = cumulated(self.means)
        single = single_noise(self.means)
        self._near = single.near
        #: Standard errors of the contrasts of :data:`WINDOWS`: ``[windows, series]``.
        self.errors = contrast_noise(self._total, single, _COARSE_WINDOWS)

    def changes(self) -> Int64:
        """How many abrupt changes of level, that stay for some values, each series has: ``[series]``."""
        before, after = _COARSE_WINDOWS[2]
        error = self._near * np.sqrt(1 / before + 1 / after)  # the measured one is that of the changes
        least = np.maximum(MIN_EFFECT, THRESHOLD * error)[:, np.newaxis]
        contrast = contrasts(self._total, before, after)
        changes = np.zeros(len(contrast), np.int64)
        for clear in (contrast >= least, contrast <= -least):
            changes += (clear[:, 1:] > clear[:, :-1]).sum(axis=1)
        return changes

    def usual(self, index: int) -> _Usual:
        some = self.means[index, ::2]
        median = float(np.median(some))
        return _Usual(median, NORMAL * float(np.median(np.abs(some - median))))

    def chosen(self) -> Int64:
        """The series that may have an edge."""
        highest = np.zeros(len(self._total))
        for (before, after), error in zip(_COARSE_WINDOWS, self.errors, strict=True):
            contrast = np.abs(contrasts(self._total, before, after)).max(axis=1)
            np.maximum(highest, _clearness(contrast, error), out=highest)
        return np.flatnonzero(highest > COARSE_THRESHOLD)

    def where(self, index: int, lowest: float | None) -> Int64:
        """The indices of a series, in full, that may be edges.

        Args:
            lowest: only those of departures to below this.
        """
        total = self._total[index : index + 1]
        n = total.shape[1]
        near = np.ones(n, np.bool_)
        if lowest is not None:
            width = MIN_STEPS // COARSE
            below = np.flatnonzero(total[0, width:] - total[0, :-width] < lowest * width)
            if not len(below):
                return below
            near = _around(below, _REACH, n)
        clear = np.zeros(n)
        for (before, after), error in zip(_COARSE_WINDOWS, self.errors[:, index], strict=True):
            own = clear[before : n - after]
            np.maximum(own, _clearness(np.abs(contrasts(total, before, after)[0]), error), out=own)
        may_be = clear > COARSE_THRESHOLD
        may_be[:_REACH] = may_be[-_REACH:] = True  # what is too near to an end for a whole window
        return np.flatnonzero(_around(COARSE * np.flatnonzero(may_be & near), COARSE, self._n + 1))


def _clearness(contrast: Float64, error: Float64 | float) -> Float64:
    """In standard errors; 0 below the minimum effect."""
    # Means can lie across an edge, which takes up to a third of the effect.
    clear: Float64 = np.where(contrast > 0.6 * MIN_EFFECT, contrast, 0) / np.maximum(error, 1e-9)
    return clear


def _around(at: Int64, reach: int, n: int) -> npt.NDArray[np.bool_]:
    """Which of ``n`` indices are at most ``reach`` from one of some: bool ``[n]``."""
    change = np.zeros(n + 1, np.int32)
    np.add.at(change, np.maximum(at - reach, 0), 1)
    np.add.at(change, np.minimum(at + reach + 1, n), -1)
    return np.cumsum(change[:n]) > 0


def _between(found_edges: list[Edge], values: Float64) -> list[Departure]:
    """The departures of a series between its edges."""
    n = len(values)
    found: list[Departure] = []
    open_: list[Edge] = []
    for edge in found_edges:
        if edge.jump < 0:
            open_.append(edge)
            continue
        open_ = _without_returned(open_, values[: edge.at], found)
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
    open_ = _without_returned(open_, values, found)
    found += [
        Departure(drop.at, n, -drop.jump) for drop in open_[:1] if drop.at >= max(5 * MIN_STEPS, n // 10)
    ]
    usual = [d for d in found if d.end == n or d.end - d.first <= 0.6 * n]
    return sorted(_without_nested(usual))


def _without_returned(drops: list[Edge], values: Float64, found: list[Departure]) -> list[Edge]:
    """Those after which the level has not come back; the departures of the others are added to ``found``.

    It can come back gradually, or by rises that are no edges each.
    """
    left = []
    for drop in drops:
        total = np.concatenate([[0.0], np.cumsum(values[drop.at :])])
        back = np.flatnonzero(total[SHORT:] - total[:-SHORT] >= SHORT * _half_way(drop))
        if len(back):
            found.append(Departure(drop.at, drop.at + int(back[0]) + SHORT // 2, -drop.jump))
        else:
            left.append(drop)
    return left


def _half_way(drop: Edge) -> float:
    """The level from which on a drop counts as over."""
    return drop.before + drop.jump / 2


def _brings_back(edge: Edge, drop: Edge) -> bool:
    """Whether the level after an edge is near that before a drop."""
    return edge.after >= _half_way(drop)


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
