"""What the incident finder reads: the balance of each layer, kept in one pass over a run, and some loads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_analyze.analysis.cost import RunCost, measured_cost
from eplb_analyze.analysis.cost_sample import CostSample, Sampling
from eplb_analyze.analysis.incident_finder import Incidents, find_incidents
from eplb_analyze.analysis.layer_departures import MOST_VALUES, BalanceSeries, tokens_of
from eplb_analyze.analysis.layer_loads import LayerWindow
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.metrics.cost import Work
from eplb_analyze.metrics.formulas import Terms
from eplb_analyze.metrics.incident_causes import LayerSample
from eplb_analyze.metrics.prices import weighted
from eplb_analyze.reader.blocks import Block, active_experts
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import LostRank, serving
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.tiers import Ranges
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.schema import Tier

#: The incidents of a range of steps are looked for in so many steps more on either side, or in as many as it
#: has, up to the most: these show what is usual, and where an incident begins and ends.
MARGIN, MOST_MARGIN = 4096, 32768


class _Part(NamedTuple):
    """Values of consecutive steps of one block."""

    steps: Int64
    #: The last step that a value is of.
    last: int
    ratio: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.float32]
    #: An index into ``phases`` each, or -1.
    phase: Int64
    phases: tuple[str, ...]
    shape: Shape


def steps_per_value(steps: int) -> int:
    """How many steps a value is of, if incidents are looked for in so many steps."""
    return max(1, -(-steps // MOST_VALUES))


def looked_at(run: Run, steps: tuple[int, int] | None = None) -> StepRange:
    """The steps in which the incidents of a half-open range of steps (default: all) are looked for."""
    first, last = run.step_range
    if first is None or last is None:
        return StepRange(0, 0)
    low, high = StepRange.of(steps).clip(first, last + 1)
    margin = min(max(MARGIN * run.info.interval, high - low), MOST_MARGIN * run.info.interval)
    return StepRange(first, last + 1).clip(low - margin, high + margin)


class BalanceValues:
    """The balancedness of each layer, in order of steps; values of later steps can be merged into it."""

    def __init__(self, steps_per_value: int = 1) -> None:
        """``steps_per_value``: see :func:`steps_per_value`; that of all steps looked at, also for a part."""
        self.steps_per_value = steps_per_value
        self._parts: list[_Part] = []

    def add(self, block: Block, terms: Terms) -> None:
        """Add the complete steps of a block; ``terms``: of these."""
        assert block.shape is not None
        steps, ratio = block.recorded, terms.ratio.astype(np.float32)
        last = int(steps[-1])
        tokens = tokens_of(terms)
        phase = block.phase[block.state == StepState.RECORDED]
        if self.steps_per_value > 1:
            starts = np.flatnonzero(np.diff(steps // self.steps_per_value, prepend=-1))
            active = np.add.reduceat(terms.active, starts, axis=0, dtype=np.float32)
            total = np.add.reduceat(np.where(terms.active, ratio, np.float32(0)), starts, axis=0)
            ratio = np.divide(total, active, out=np.full_like(total, np.nan), where=active > 0)
            tokens = np.add.reduceat(tokens, starts)
            tokens /= np.diff(starts, append=len(steps))
            steps, phase = steps[starts], np.full(len(starts), -1)
        self._parts.append(_Part(steps, last, ratio, tokens, phase, tuple(block.phases), block.shape))

    def merge(self, later: BalanceValues) -> None:
        self._parts += later._parts

    def of_layer(self, index: int) -> tuple[Int64, npt.NDArray[np.float32]]:
        """The (first) step of each value of one layer, and the values; NaN if the layer was not active."""
        steps = np.concatenate([part.steps for part in self._parts])
        return steps, np.concatenate([part.ratio[:, index] for part in self._parts])

    def series(self) -> BalanceSeries | None:
        """All values; None if there are none, or if the number of layers changes."""
        layers = {part.ratio.shape[1] for part in self._parts}
        if len(layers) != 1:
            return None
        steps = np.concatenate([part.steps for part in self._parts])
        by_layer = np.empty((layers.pop(), len(steps)), np.float32)
        at = 0
        for i, part in enumerate(self._parts):
            own = by_layer[:, at : at + len(part.steps)].T
            own[:] = part.ratio
            self._parts[i] = part._replace(ratio=own)  # which keeps nothing twice
            at += len(part.steps)
        codes: dict[str, int] = {}
        phases, shapes, number = [], [], 0
        for before, part in zip([self._parts[0], *self._parts], self._parts, strict=False):
            number += before.shape != part.shape
            shapes.append(np.full(len(part.steps), number))
            own = np.array([codes.setdefault(name, len(codes)) for name in part.phases] + [-1], np.int64)
            phases.append(own[part.phase])
        return BalanceSeries(
            steps,
            by_layer.T,
            np.concatenate([part.tokens for part in self._parts]),
            np.concatenate(phases),
            np.concatenate(shapes),
            self._parts[-1].last,
            self.steps_per_value,
        )


class RunLoads:
    """The loads of a run, read around the edges of departures. See :class:`LayerLoads`."""

    def __init__(self, run: Run, cost: Callable[[], RunCost]) -> None:
        """``cost``: by whose prices incidents are priced; asked for only if there is one."""
        self._run, self._cost = run, functools.cache(cost)
        self.history = run.history
        self.lost_ranks: Sequence[LostRank] = run.lost_ranks
        self.num_logical = run.info.num_logical_experts
        self.layers: Sequence[int] = run.info.layers
        self.experts = run.history.num_experts(self.num_logical, len(self.layers))
        self.token_replication = run.info.token_replication
        #: Of the range that was read last: the layers of one departure are read one after another.
        self._blocks: tuple[tuple[int, int], list[Block]] = ((0, 0), [])

    def read(self, layer: int, first: int, end: int) -> LayerWindow:
        middle = (first + end) // 2
        blocks = self._joined((max(0, first), end))
        if not blocks:
            return LayerWindow.empty()
        chosen = min(blocks, key=lambda block: int(np.abs(block.recorded - middle).min())).shape
        assert chosen is not None
        same = [block for block in blocks if block.shape == chosen]
        full = [block for block in same if block.has_loads]
        loads = {id(block): block.loads(layer, layer + 1)[:, 0] for block in full}
        by_rank = [
            loads[id(block)].reshape(len(block.recorded), chosen.ep_size, -1).sum(axis=2)
            if block.has_loads
            else next(iter(block.rank_load_parts(first=layer, last=layer + 1)))[1][:, 0]
            for block in same
        ]
        none = [np.empty((0, chosen.num_physical_experts), np.int64)]
        return LayerWindow(
            np.concatenate([block.recorded for block in same]),
            np.concatenate(by_rank),
            np.concatenate([np.empty(0, np.int64), *(block.recorded for block in full)]),
            np.concatenate(none + [loads[id(block)] for block in full]),
            serving(chosen),
        )

    def _joined(self, steps: tuple[int, int]) -> list[Block]:
        """The blocks of a range with complete steps."""
        if self._blocks[0] != steps:
            blocks = self._run.blocks(steps)
            self._blocks = steps, [b for b in blocks if len(b.recorded) and b.shape is not None]
        return self._blocks[1]

    def time_of(self, step: int) -> str | None:
        return self._run.clock.iso(step)

    def price(self, before: LayerSample, during: LayerSample, layers: int) -> Milliseconds | None:
        if before.load is None or during.load is None:
            return None
        excess = [
            Work.of(
                active_experts(load[:, np.newaxis], ranks),
                load.reshape(len(load), 1, ranks, -1).sum(axis=3) / self.token_replication,
            ).excess()
            for load, ranks in ((before.load, before.ranks), (during.load, during.ranks))
        ]
        cost = self._cost()
        found = [
            (phase.steps, cost.prices[name].price(excess[1] - excess[0]))
            for name, phase in cost.phases.items()
            if name in cost.prices
        ]
        total = weighted([(steps, price) for steps, price in found if price is not None])
        return None if total is None else Milliseconds.of(total, layers)


def incidents_of(
    run: Run,
    values: BalanceValues,
    sample: CostSample,
    cost: RunCost,
    steps: tuple[int, int] | None = None,
) -> Incidents:
    """The incidents of a run, or those that have a step in a half-open range.

    Those of a range are found in :func:`looked_at`, whose other steps are read here: a range that begins or
    ends near an edge of an incident, or lies inside it, does not show what is usual. So an incident has the
    same edges and cause in every range, and nearly the same cost, which is measured in a sample; unless it
    began before the steps looked at, which do not show that, or ends after them, which is then not known.
    Call it inside ``run.retry_without_damaged``.

    Args:
        values, sample, cost: of these steps.
    """
    # Arrow keeps what the pass over the run needed: some 40 MiB, which the loads would come on top of.
    pa.default_memory_pool().release_unused()
    chosen, around = StepRange.of(steps), looked_at(run, steps)
    every, total = _with_others(run, chosen, around, values, sample)
    loads = RunLoads(run, lambda: cost if every is values else measured_cost(run, total))
    return _found(run, every, loads, chosen, around)


def incidents_in(run: Run, steps: tuple[int, int] | None = None) -> Incidents:
    """:func:`incidents_of` if nothing else of the steps is wanted: the same, where steps are kept."""
    first, last = run.step_range
    if first is None or last is None:
        return Incidents([])
    around = looked_at(run, steps)
    values, sample = BalanceValues(steps_per_value(around.end - around.first)), CostSample.empty()
    _read(run, around, Sampling(run, around.first, around.end - 1), values, sample)
    pa.default_memory_pool().release_unused()
    loads = RunLoads(run, lambda: measured_cost(run, sample))
    return _found(run, values, loads, StepRange.of(steps), around)


def _found(
    run: Run, values: BalanceValues, loads: RunLoads, steps: StepRange, around: StepRange
) -> Incidents:
    """The incidents with a step in a range; ``around``: the steps that the values are of."""
    first, last = (0 if step is None else step for step in run.step_range)
    series = values.series()
    found = Incidents([])
    if series is not None:
        found = find_incidents(_placed(run, series, around), loads).within(steps)
    return found.where_kept(run, steps.clip(first, last + 1))


def _placed(run: Run, series: BalanceSeries, around: StepRange) -> BalanceSeries:
    """The series with its holes, and with the steps of the run that it is a part of."""
    first, last = (0 if step is None else step for step in run.step_range)
    holes = [*run.tiers.retired.within(int(series.steps[0]), series.end)]
    at = np.searchsorted(np.array([hole.first for hole in holes], np.int64), series.steps, side="right")
    whole = None
    if around != (first, last + 1):
        # Of rearrangements in steps that are gone, not all are known.
        gone = [one.steps.end for one in run.tiers.ranges if one.tier is Tier.GONE]
        known = max([first, *(end for end in gone if end <= series.steps[0])])
        whole = StepRange(known, series.end if around.end > last else last + 1)
    return replace(series, shape=series.shape + at, whole=whole, holes=Ranges(holes))


def _with_others(
    run: Run, steps: StepRange, around: StepRange, values: BalanceValues, sample: CostSample
) -> tuple[BalanceValues, CostSample]:
    """What is known of a range of steps, with the other steps around it."""
    before, after = around.clip(0, steps.first), around.clip(steps.end, NO_END)
    if before.first >= before.end and after.first >= after.end:
        return values, sample
    sampling = Sampling(run, around.first, around.end - 1)
    every, total = BalanceValues(values.steps_per_value), CostSample.empty()
    _read(run, before, sampling, every, total)
    every.merge(values)
    total.merge(sample)
    _read(run, after, sampling, every, total)
    return every, total


def _read(run: Run, steps: StepRange, sampling: Sampling, values: BalanceValues, sample: CostSample) -> None:
    """Add the steps of a range to the values and to the sample; they come after those in it."""
    if steps.first >= steps.end:
        return

    def of_block(block: Block) -> tuple[BalanceValues, CostSample]:
        own = BalanceValues(values.steps_per_value)
        if block.shape is None or not len(block.recorded):
            return own, CostSample.of(run, sampling, block)
        terms = run.terms(block)
        own.add(block, terms)
        return own, CostSample.of(run, sampling, block, terms)

    for _, (own, own_sample) in run.over_blocks(of_block, steps):
        values.merge(own)
        sample.merge(own_sample)
