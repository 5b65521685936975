"""Alerts: a layer or a rank departs from its usual balance while the run is written.

Each signal (the balancedness of a layer, the load of a rank over all layers) is compared with itself: a few
steps with those before them. This is cheap and needs only the past; `summary` finds the exact steps later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt

from eplb_analyze.live.experts import ExpertTokens
from eplb_analyze.metrics.formulas import Float64, Terms
from eplb_dump.format.journal import Int64

#: Steps in a block, and how many blocks in a row begin or end an alert.
BLOCK_STEPS, BLOCKS = 10, 2
#: What is usual is the mean of up to so many blocks, at least so many.
USUAL_BLOCKS, MIN_USUAL_BLOCKS = 50, 5
#: A departure is at least this much of balancedness or of the mean load, and at least so many standard
#: deviations of single steps, and of blocks, which vary more if one step resembles the next.
DEPARTURE, DEVIATIONS, BLOCK_DEVIATIONS = 0.05, 2.0, 5.0
#: An expert explains a departure if its share rose to at least so many times what it was, and the mean.
RISEN = 1.5


@dataclass
class Departure:
    """Signals that depart together. The signals of layers come before those of ranks.

    Attributes:
        signals: the index of each signal that departed, and its usual value.
        limits: the value below which each of them departs.
        open: those that have not come back.
        lowest: the lowest mean of a block of each signal.
    """

    first_step: int
    first_ns: int
    signals: dict[int, float]
    limits: dict[int, float]
    open: set[int]
    last_step: int | None = None
    last_ns: int | None = None
    lowest: dict[int, float] = field(default_factory=dict)


@dataclass
class _Block:
    step: Int64
    time_ns: Int64
    values: Float64
    mean: Float64 = field(init=False)
    variance: Float64 = field(init=False)

    def __post_init__(self) -> None:
        known = ~np.isnan(self.values)
        count = known.sum(axis=0)
        filled = np.where(known, self.values, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):  # a signal without any value is NaN
            self.mean = filled.sum(axis=0) / count
            self.variance = (filled**2).sum(axis=0) / count - self.mean**2


class DepartureFinder:
    """Takes the values of all signals step by step; lower is worse."""

    def __init__(self) -> None:
        self.found: list[Departure] = []
        self._newest = -1
        self._waiting: list[tuple[Int64, Int64, Float64]] = []
        #: Means and variances of the blocks in which each signal was as usual, NaN in others.
        self._usual: deque[tuple[Float64, Float64]] = deque(maxlen=USUAL_BLOCKS)
        #: The blocks in which a departure can have begun or ended.
        self._blocks: deque[_Block] = deque(maxlen=BLOCKS + 1)
        #: How many blocks in a row each signal is not what it was: as usual, or departed.
        self._changed = np.empty(0, np.int64)

    def add(self, step: Int64, time_ns: Int64, values: Float64) -> None:
        """Add steps that became complete; those older than a known one are left out.

        Args:
            values: float64 ``[steps, signals]``; NaN if unknown.
        """
        if step[0] <= self._newest:
            return
        self._newest = int(step[-1])
        self._waiting.append((step, time_ns, values))
        if sum(len(part[0]) for part in self._waiting) < BLOCK_STEPS:
            return
        steps, times, all_values = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        whole = len(steps) // BLOCK_STEPS * BLOCK_STEPS
        for low in range(0, whole, BLOCK_STEPS):
            here = slice(low, low + BLOCK_STEPS)
            self._add(_Block(steps[here], times[here], all_values[here]))
        rest = slice(whole, None)
        self._waiting = [(steps[rest], times[rest], all_values[rest])] if whole < len(steps) else []

    def _add(self, block: _Block) -> None:
        self._blocks.append(block)
        if len(self._changed) != len(block.mean):
            self._changed = np.zeros(len(block.mean), np.int64)
        departed = np.zeros(len(block.mean), np.bool_)
        departed[[signal for one in self.found for signal in one.open]] = True
        usual, limit = self._limits(len(block.mean))
        return_at = limit.copy()
        for one in self.found:
            for signal in one.open:  # back to before it departed, and at least half of the way
                half = (one.signals[signal] + one.lowest[signal]) / 2
                return_at[signal] = max(one.limits[signal], half)
        with np.errstate(invalid="ignore"):
            low = block.mean < limit
            back = block.mean > return_at
        changed = np.where(departed, back, low)
        self._changed = np.where(changed, self._changed + 1, 0)
        turned = self._changed >= BLOCKS
        ordinary = ~departed & ~changed
        self._usual.append(
            (np.where(ordinary, block.mean, np.nan), np.where(ordinary, block.variance, np.nan))
        )
        for signal in np.flatnonzero(turned & departed).tolist():
            self._end(signal, float(return_at[signal]))
        begun = np.flatnonzero(turned & ~departed)
        if len(begun):
            self._begin(begun, usual, limit)
        self._changed[turned] = 0
        for one in self.found:
            for signal in one.open:
                one.lowest[signal] = min(one.lowest.get(signal, np.inf), float(block.mean[signal]))

    def _limits(self, signals: int) -> tuple[Float64, Float64]:
        """The usual value of each signal, and the value below which it departs; NaN while not known."""
        if len(self._usual) < MIN_USUAL_BLOCKS:
            return np.full(signals, np.nan), np.full(signals, np.nan)
        means, variances = (np.stack(column) for column in zip(*self._usual, strict=True))
        known = ~np.isnan(means)
        count = known.sum(axis=0)
        enough = np.maximum(count, 1)
        usual = np.where(known, means, 0.0).sum(axis=0) / enough
        within = np.where(known, variances, 0.0).sum(axis=0) / enough
        between = (np.where(known, means, usual) - usual) ** 2
        deviations = np.sqrt(np.maximum(0.0, [within, between.sum(axis=0) / enough]))
        least = np.maximum(DEVIATIONS * deviations[0], BLOCK_DEVIATIONS * deviations[1])
        usual[count < MIN_USUAL_BLOCKS] = np.nan
        return usual, usual - np.maximum(DEPARTURE, least)

    def _begin(self, signals: npt.NDArray[np.intp], usual: Float64, limit: Float64) -> None:
        """Signals that depart within the same blocks are one departure."""
        step = np.concatenate([block.step for block in self._blocks])
        times = np.concatenate([block.time_ns for block in self._blocks])
        values = np.concatenate([block.values for block in self._blocks])
        last = self._blocks[-1].mean
        worst = int(signals[np.argmin(last[signals] - usual[signals])])
        at = _turn((usual[worst] + last[worst]) / 2 - values[:, worst])
        own, limits = ({int(s): float(level[s]) for s in signals} for level in (usual, limit))
        for one in self.found:
            if one.open and one.first_step >= int(step[0]):
                one.signals |= own
                one.limits |= limits
                one.open |= own.keys()
                return
        self.found.append(Departure(int(step[at]), int(times[at]), own, limits, {*own}))

    def _end(self, signal: int, middle: float) -> None:
        one = next(one for one in self.found if signal in one.open)
        one.open.remove(signal)
        step = np.concatenate([block.step for block in self._blocks])
        times = np.concatenate([block.time_ns for block in self._blocks])
        values = np.concatenate([block.values[:, signal] for block in self._blocks])
        at = max(0, _turn(values - middle) - 1)
        if one.last_step is None or step[at] > one.last_step:
            one.last_step, one.last_ns = int(step[at]), int(times[at])


def _turn(values: Float64) -> int:
    """The index from which values are mostly above 0."""
    after = np.cumsum(np.nan_to_num(values)[::-1])[::-1]
    return int(after.argmax())


@dataclass(frozen=True)
class Alert:
    """An incident as far as it is known while the run is written.

    Attributes:
        layers: the numbers of the layers that departed, the worst first; empty if only ranks did.
        ranks: the EP ranks with the most tokens, the worst first.
        first_step, since: its first step, and the clock time of it, ISO 8601 in UTC.
        last_step, until: None while it lasts.
        peak_imbalance: max over ranks / mean over ranks of the worst layer, or the rank's load / the mean, at
            its highest over 10 steps.
        usual_imbalance: the same before.
        expert: the logical expert of the worst layer whose load per replica rose most; None if none did.
        from_times_mean, to_times_mean: its tokens / the mean over the layer's experts, before and since.
        replicas: of the expert, since.
        rearrangement: the rearrangement that ended it: its first step; None if none did.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    first_step: int
    since: str
    last_step: int | None
    until: str | None
    peak_imbalance: float
    usual_imbalance: float
    expert: int | None
    from_times_mean: float | None
    to_times_mean: float | None
    replicas: int | None
    rearrangement: int | None


def utc(unix_ns: int) -> str:
    """``2026-11-26T03:12:04Z``."""
    return datetime.fromtimestamp(unix_ns // 10**9, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def signals(terms: Terms, serving: Sequence[int]) -> Float64:
    """The signals of some steps: balancedness of each layer, minus the load of each rank / the mean.

    A rank below the mean makes nobody wait, so it counts as one at the mean.
    """
    load = terms.rank_mean[:, serving]
    mean = load.mean(axis=1, keepdims=True)
    of_ranks = np.divide(load, mean, out=np.full(load.shape, np.nan), where=mean > 0)
    return np.concatenate([terms.ratio, -np.maximum(1.0, of_ranks)], axis=1)


def slowest_ranks(terms: Terms, layer: int) -> tuple[int, ...]:
    """The ranks that were the slowest of a layer in at least half of the steps, the worst first."""
    often = terms.by_slowest()[layer]
    total = often.sum()
    return tuple(int(rank) for rank in np.argsort(-often) if total > 0 and often[rank] >= total / 2)


@dataclass(frozen=True)
class RisenExpert:
    """The expert whose load per replica rose most."""

    expert: int
    from_times_mean: float
    to_times_mean: float
    replicas: int


def risen_expert(
    before: ExpertTokens | None, since: ExpertTokens | None, layer: int, replicas: Int64
) -> RisenExpert | None:
    """The expert of a layer that explains a departure; None if no expert's share rose by half.

    ``replicas``: int64 ``[layers, experts]``, now.
    """
    if before is None or since is None or before.tokens.shape != since.tokens.shape:
        return None
    then, now = before.times_mean[layer], since.times_mean[layer]
    expert = int(np.argmax((now - then) / np.maximum(1, replicas[layer])))
    if now[expert] < RISEN * max(1.0, then[expert]):
        return None
    return RisenExpert(expert, float(then[expert]), float(now[expert]), int(replicas[layer, expert]))
