"""Which layers of a run depart from their usual balance together: the first pass of the incident finder.

A departure here is no incident yet: :mod:`analysis.incident_explainer` looks for its cause in the loads.
"""

from __future__ import annotations

from dataclasses import field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.departures import RESTLESS, departures
from eplb_analyze.metrics.formulas import Terms
from eplb_analyze.reader.tiers import Ranges
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

#: Edges of two layers at most so many steps apart are of one departure.
TOGETHER = 6
#: The loads of so many layers are read for the largest departures; smaller ones are counted.
EXAMINED = 16
#: A run is kept as at most about so many values per layer; in a longer one a value is of several steps.
MOST_VALUES = 32768
#: A layer is not restless in a part of a run if it changes its level fewer times there.
LEAST_RESTLESS = 8
#: A departure of at least this share of the layers is of all.
ALL_LAYERS = 0.3
#: Of a departure of all layers, so many are looked at for the cause.
LOOKED_AT = 3


@frozen
class BalanceSeries:
    """Balancedness of each layer and tokens over a run; in a long run a value is of several steps.

    Attributes:
        steps: int64 ``[n]``, ascending: the (first) step of each value.
        ratio: float32 ``[n, layers]``, mean over ranks / max over ranks; NaN if no layer was active.
        tokens: float32 ``[n]``, per step and layer, in a unit that one configuration keeps.
        phase: int64 ``[n]``; -1 if not named.
        shape: int64 ``[n]``; consecutive equal numbers are of one configuration.
        last: the last step.
        steps_per_value: how many steps a value is of, at most.
        whole: the steps of the run, of which the series can be a part; None: these are all.
        holes: steps that are not kept. The values on both sides have different numbers in ``shape``.
    """

    steps: Int64
    ratio: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.float32]
    phase: Int64
    shape: Int64
    last: int
    steps_per_value: int = 1
    whole: StepRange | None = None
    holes: Ranges = field(default_factory=Ranges)

    @property
    def end(self) -> int:
        return self.last + 1

    @property
    def last_of_run(self) -> int:
        """The last step of the run; after :attr:`last`, nothing of it is known here."""
        return self.last if self.whole is None else self.whole.end - 1

    @property
    def first_of_run(self) -> int:
        return int(self.steps[0]) if self.whole is None else self.whole.first

    def step_at(self, index: int) -> int:
        """The step of a value; behind the last one, the first step after the series."""
        return int(self.steps[index]) if index < len(self.steps) else self.end

    def end_at(self, index: int) -> int:
        """The first step after those of the value before an index, also if it is not kept."""
        step = self.step_at(index)
        hole = next(self.holes.within(int(self.steps[index - 1]), step), None)
        return step if hole is None else hole.first

    def unbroken(self, step: int) -> StepRange:
        """The steps around one, after the hole before it and up to the next hole or the end of the series."""
        parts = self.holes.outside(0, self.end)
        return next((part for part in parts if part.first <= step < part.end), StepRange(step, step))


def tokens_of(terms: Terms) -> npt.NDArray[np.float32]:
    """Tokens of each step per layer and rank that serves, as a series has them: float32 ``[steps]``."""
    tokens: npt.NDArray[np.float32] = terms.mean.mean(axis=1).astype(np.float32)
    return tokens


@frozen
class Found:
    """A departure of some layers, in steps: ``end`` is the first step after it."""

    layers: tuple[int, ...]
    first: int
    end: int
    drop: float
    everywhere: bool


def largest(found: list[Found]) -> tuple[list[Found], list[Found]]:
    """The departures that cost most, in order of steps; and those that are left out."""
    kept: list[Found] = []
    looks = 0
    by_cost = sorted(found, key=lambda f: -f.drop * (f.end - f.first) * len(f.layers))
    for one in by_cost:
        looks += min(len(one.layers), LOOKED_AT) if one.everywhere else len(one.layers)
        if kept and looks > EXAMINED:
            break
        kept.append(one)
    return sorted(kept, key=lambda f: (f.first, f.end)), by_cost[len(kept) :]


def comparable(series: BalanceSeries) -> npt.NDArray[np.float32]:
    """The balance of each layer, and as the last row of all, without NaN and differences between phases.

    float32 ``[layers + 1, n]``; one row if there is one layer.
    """
    n, layers = series.ratio.shape
    every = np.empty((layers + (layers > 1), n), np.float32)
    values = every[:layers]
    values[:] = series.ratio.T
    missing = np.isnan(values)
    if missing.any():
        for row, gone in zip(values, missing, strict=True):
            row[gone] = np.median(row[~gone]) if not gone.all() else 1.0
    phases, counts = np.unique(series.phase, return_counts=True)
    if len(phases) > 1:
        usual = np.median(values[:, series.phase == phases[counts.argmax()]], axis=1, keepdims=True)
        for phase in phases:
            of_phase = series.phase == phase
            values[:, of_phase] += usual - np.median(values[:, of_phase], axis=1, keepdims=True)
    if layers > 1:
        values.mean(axis=0, out=every[layers])
    return every


class LayerDepartures(NamedTuple):
    """The departures of each layer, and how many layers are restless.

    Attributes:
        found: ``(layer, index, index after, drop)``; the layer after the last stands for all.
        restless: see :func:`~eplb_analyze.metrics.departures.departures`.
    """

    found: list[tuple[int, int, int, float]]
    restless: int


def layer_departures(series: BalanceSeries, values: npt.NDArray[np.float32]) -> LayerDepartures:
    """``values``: what :func:`comparable` makes of the series."""
    cuts = np.flatnonzero(np.diff(series.shape)) + 1
    found, restless = [], np.zeros(len(values), np.bool_)
    for low, high in zip([0, *cuts], [*cuts, len(series.steps)], strict=True):
        here = departures(values[:, low:high], _restless_from(series, low, high))
        restless |= here.restless
        for layer, own in enumerate(here.found):
            found += [(layer, low + one.first, low + one.end, one.drop) for one in own]
    return LayerDepartures(found, int(restless[: series.ratio.shape[1]].sum()))


def _restless_from(series: BalanceSeries, low: int, high: int) -> float:
    """Above how many changes of level a layer is restless: in a part of a run as often as in the whole."""
    whole = series.whole
    if whole is None:
        return RESTLESS
    steps = series.step_at(high) - series.step_at(low)
    return min(RESTLESS, max(LEAST_RESTLESS, RESTLESS * steps / min(MOST_VALUES, whole.end - whole.first)))


def grouped(series: BalanceSeries, found: list[tuple[int, int, int, float]]) -> list[Found]:
    """Departures of several layers with the same edges become one."""
    layers = series.ratio.shape[1]
    near = TOGETHER if series.steps_per_value == 1 else 2

    def together(a: tuple[int, int, int, float], b: tuple[int, int, int, float], most: int) -> bool:
        return abs(a[1] - b[1]) <= most and abs(a[2] - b[2]) <= most

    left = sorted(found, key=lambda one: (one[0] != layers, -one[3]))
    groups: list[list[tuple[int, int, int, float]]] = []
    while left:
        head = left.pop(0)
        everywhere = head[0] == layers
        own = [one for one in left if one[0] != head[0] and together(head, one, 20 if everywhere else near)]
        if everywhere and len(own) < max(2, ALL_LAYERS * layers):
            continue  # the mean over layers moved, but only some of them did
        left = [one for one in left if one not in own]
        groups.append([head, *own])
    result = []
    for group in groups:
        members = sorted({one[0] for one in group if one[0] < layers})
        everywhere = len(members) >= max(2, ALL_LAYERS * layers)
        head = group[0]
        first, end = (int(np.median([one[i] for one in group])) for i in (1, 2))
        if head[0] == layers:
            first, end = head[1], head[2]
        drop = max(one[3] for one in group)
        result.append(Found(tuple(members), series.step_at(first), series.end_at(end), drop, everywhere))
    wide = [one for one in result if one.everywhere]
    near_steps = 25 * series.steps_per_value

    def leftover(one: Found) -> bool:
        """Whether it is of a layer in which a departure of all layers was found with other edges."""
        return any(
            one.first >= other.first - near_steps
            and one.end <= other.end + near_steps
            and (abs(one.first - other.first) <= near_steps or abs(one.end - other.end) <= near_steps)
            and one.drop < 2 * other.drop
            for other in wide
        )

    return [one for one in result if one.everywhere or not leftover(one)]
