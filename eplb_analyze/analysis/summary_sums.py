"""The sums that a summary is made of: added block by block, and merged in order of steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.conservation import Conservation
from eplb_analyze.analysis.cost_sample import CostSample, Sampling
from eplb_analyze.analysis.incident_series import BalanceValues, looked_at, steps_per_value
from eplb_analyze.analysis.pauses import StepClock
from eplb_analyze.distinct import distinct
from eplb_analyze.metrics import formulas
from eplb_analyze.metrics.formulas import FORMULAS, Terms
from eplb_analyze.metrics.losses import Bins, Losses, windows
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import serving
from eplb_analyze.reader.placements import logical_sums
from eplb_analyze.reader.readings import Reading, read_blocks
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.journal import Int64, Shape

#: The formulas of which figures of incomplete steps are estimated.
ESTIMATED = ("balancedness", "imbalance")


class ConfigurationSums:
    """Sums over the complete steps of one configuration."""

    def __init__(self, shape: Shape, info: RunInfo, bins: Bins) -> None:
        self.shape = shape
        self.losses = Losses(shape, bins, info.token_replication, serving(shape))
        self.first = self.last = -1
        self.recorded = 0
        self.mean_tokens = self.max_tokens = 0.0
        self.steps: list[Int64] = []
        self.values: list[formulas.Float64] = []
        layers = shape.num_moe_layers
        self.slowest = np.zeros((layers, shape.ep_size))
        #: Of the steps with experts' loads: the first and the last of them, and sums over them.
        self.loads_first = self.loads_last = -1
        self.logical = np.zeros((layers, info.num_logical_experts), np.int64)

    def add(self, run: Run, block: Block) -> Terms:
        """Add a block's complete steps; there must be at least one."""
        steps = block.recorded
        within = windows(steps, run.history.changes, run.info.interval)
        terms = run.terms(block, each=lambda *load: self.losses.add_lasting(within, *load))
        self.losses.add(steps, terms)
        self.first, self.last, self.recorded = int(steps[0]), int(steps[-1]), len(steps)
        self.steps.append(steps)
        self.values.append(FORMULAS["balancedness"].of(terms))
        self.mean_tokens += float(terms.mean.sum())
        self.max_tokens += float(terms.maximum.sum())
        self.slowest += terms.by_slowest()
        if block.has_loads:
            self.loads_first, self.loads_last = self.first, self.last
            self.logical += logical_sums(block, run.history, self.logical.shape[1])
        return terms

    def merge(self, later: ConfigurationSums) -> None:
        if not later.recorded:
            return
        self.first = self.first if self.recorded else later.first
        self.last = later.last
        self.recorded += later.recorded
        self.mean_tokens += later.mean_tokens
        self.max_tokens += later.max_tokens
        self.steps += later.steps
        self.values += later.values
        # Not in place: arrays from another process may be read-only.
        self.slowest = self.slowest + later.slowest
        self.logical = self.logical + later.logical
        if later.loads_last >= 0:
            self.loads_first = later.loads_first if self.loads_last < 0 else self.loads_first
            self.loads_last = later.loads_last
        self.losses.merge(later.losses)


class _Additive:
    """Sums whose attributes all add up, each with that of later steps."""

    def merge(self, later: _Additive) -> None:
        for name, value in vars(later).items():
            # Not in place: arrays from another process may be read-only.
            setattr(self, name, getattr(self, name) + value)


class LayerSums(_Additive):
    """Sums over steps of each layer's own ratio: a mean of ratios, in which no loads are added."""

    def __init__(self, layers: int) -> None:
        self.ratio, self.inverse, self.active = np.zeros(layers), np.zeros(layers), np.zeros(layers)

    def add(self, terms: Terms) -> None:
        active = terms.active
        self.ratio += np.where(active, terms.ratio, 0).sum(axis=0)
        self.inverse += np.where(active, 1 / np.where(active, terms.ratio, 1), 0).sum(axis=0)
        self.active += active.sum(axis=0)


class PhaseSums(_Additive):
    def __init__(self) -> None:
        self.steps = 0
        self.mean_tokens = self.max_tokens = 0.0
        self.values: list[formulas.Float64] = []

    def add(self, mask: npt.NDArray[np.bool_], terms: Terms, balancedness: formulas.Float64) -> None:
        self.steps += int(mask.sum())
        self.mean_tokens += float(terms.mean[mask].sum())
        self.max_tokens += float(terms.maximum[mask].sum())
        self.values.append(balancedness[mask])


class EstimateSums:
    """Sums over incomplete steps that lack the same ranks, of the loads of the other ranks."""

    def __init__(self) -> None:
        self.steps: list[Int64] = []
        self.mean_tokens = self.max_tokens = 0.0
        self.values: dict[str, list[formulas.Float64]] = {name: [] for name in ESTIMATED}

    def add(self, steps: Int64, terms: Terms) -> None:
        self.steps.append(steps)
        self.mean_tokens += float(terms.mean.sum())
        self.max_tokens += float(terms.maximum.sum())
        for name in ESTIMATED:
            self.values[name].append(FORMULAS[name].of(terms))

    def merge(self, later: EstimateSums) -> None:
        self.steps += later.steps
        self.mean_tokens += later.mean_tokens
        self.max_tokens += later.max_tokens
        for name, values in later.values.items():
            self.values[name] += values


class SummarySums:
    """Sums over consecutive steps; those of later steps can be merged into them.

    Besides sums it keeps six figures per step, for percentiles, and the balance of each layer, for incidents.
    """

    def __init__(self, num_layers: int, bins: Bins, per_value: int = 1) -> None:
        """``per_value``: so many steps have one value of each layer's balance."""
        self.bins = bins
        self.seen = Completeness()
        self.steps: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.values: dict[str, list[formulas.Float64]] = {name: [np.empty(0)] for name in FORMULAS}
        self.configurations: list[ConfigurationSums] = []
        self.layers = LayerSums(num_layers)
        self.phases: dict[str, PhaseSums] = {}
        #: By the ranks that the steps lack.
        self.estimates: dict[tuple[int, ...], EstimateSums] = {}
        self.conservation = Conservation()
        self.cost = CostSample.empty()
        self.balance = BalanceValues(per_value)
        self.first_time, self.last_time = np.iinfo(np.int64).max, -1
        #: Time from the step before to each step, ms; and the first and last step with their times.
        self.step_ms: list[formulas.Float64] = []
        self.clock = StepClock()
        self._first: tuple[int, int] | None = None
        self._last: tuple[int, int] | None = None

    @classmethod
    def of(cls, run: Run, bins: Bins, block: Block, sampling: Sampling, per_value: int = 1) -> SummarySums:
        sums = cls(run.info.num_layers, bins, per_value)
        sums.seen.add(block)
        sums.first_time, sums.last_time = int(block.clock_ns.min()), int(block.clock_ns.max())
        sums.clock.add(block)
        sums.step_ms.append(block.since_last_ms[np.isfinite(block.since_last_ms)])
        sums._first, sums._last = ((int(block.step[i]), int(block.clock_ns[i])) for i in (0, -1))
        if block.shape is None:
            sums.cost = CostSample.of(run, sampling, block)
            return sums
        for missing, steps in block.without_ranks():
            terms = Terms.of(block.rank_load(steps), run.info.token_replication, serving(block.shape))
            sums.estimates.setdefault(missing, EstimateSums()).add(steps, terms)
        # A configuration without any complete step still separates those around it.
        sums.configurations.append(ConfigurationSums(block.shape, run.info, bins))
        found = sums.configurations[0].add(run, block) if len(block.recorded) else None
        if found is not None:
            sums._add(block, found)
        sums.cost = CostSample.of(run, sampling, block, found)
        return sums

    def _add(self, block: Block, terms: Terms) -> None:
        # The arrays of the configuration, so that they travel once.
        own = self.configurations[0]
        self.steps.append(own.steps[-1])
        for name, formula in FORMULAS.items():
            self.values[name].append(own.values[-1] if name == "balancedness" else formula.of(terms))
        self.layers.add(terms)
        self.balance.add(block, terms)
        complete = block.state == StepState.RECORDED
        self.conservation.add(block.recorded, terms.recorded, block.num_tokens[complete])
        phase = block.phase[complete]
        for code in distinct(phase[phase >= 0]):
            of_phase = self.phases.setdefault(block.phases[code], PhaseSums())
            of_phase.add(phase == code, terms, self.values["balancedness"][-1])

    def merge(self, later: SummarySums) -> None:
        self.seen.merge(later.seen)
        self.first_time = min(self.first_time, later.first_time)
        self.last_time = max(self.last_time, later.last_time)
        if self._last and later._first and later._first[0] == self._last[0] + 1:
            self.step_ms.append(np.array([later._first[1] - self._last[1]]) / 1e6)
        self.step_ms += later.step_ms
        self.clock.merge(later.clock)
        self._first, self._last = self._first or later._first, later._last or self._last
        self.steps += later.steps
        for name, values in later.values.items():
            self.values[name] += values
        self.layers.merge(later.layers)
        self.conservation.merge(later.conservation)
        self.cost.merge(later.cost)
        self.balance.merge(later.balance)
        for name, phase in later.phases.items():
            self.phases.setdefault(name, PhaseSums()).merge(phase)
        for missing, estimate in later.estimates.items():
            self.estimates.setdefault(missing, EstimateSums()).merge(estimate)
        for stretch in later.configurations:
            if self.configurations and self.configurations[-1].shape == stretch.shape:
                self.configurations[-1].merge(stretch)
            else:
                self.configurations.append(stretch)


def bins_of(run: Run, steps: tuple[int, int] | None = None) -> Bins:
    """The bins of a run, or of a half-open range of its steps, by which its sums are kept."""
    first, last = run.step_range
    low, high = StepRange.of(steps)
    return Bins(max(low, first or 0), min(high - 1, last or 0))


def sums_of(run: Run, steps: tuple[int, int] | None, bins: Bins) -> SummarySums:
    """The sums of a run, or of a range of its steps. Call it inside ``run.retry_without_damaged``.

    Blocks are merged part by part of :meth:`Run.parts`, so that rounding is the same wherever the parts
    are read. ``bins``: of the run, if the sums are of a part of it that is read separately.
    """
    total = RunSums(run, bins)
    read_blocks(run, steps, total, threads=None)
    return total.sums


class RunSums:
    """The sums of a run, made of its blocks in order of steps."""

    def __init__(self, run: Run, bins: Bins) -> None:
        """``bins``: as in :func:`sums_of`."""
        run.load_history()
        self._run, self._bins = run, bins
        around = looked_at(run, (int(bins.edges[0]), bins.last + 1) if len(bins) else None)
        self._per_value = steps_per_value(around.end - around.first)
        self._edges = {first for first, _ in run.parts()}
        self._sampling = Sampling(run, int(bins.edges[0]), bins.last)
        self._total, self._part = self._none(), self._none()

    def _none(self) -> SummarySums:
        return SummarySums(self._run.info.num_layers, self._bins, self._per_value)

    def start(self, block: Block) -> Reading:
        def part() -> SummarySums:
            return SummarySums.of(self._run, self._bins, block, self._sampling, self._per_value)

        return Reading(None, part)

    def merge(self, block: Block, part: SummarySums) -> None:
        if int(block.step[0]) in self._edges:
            self._total.merge(self._part)
            self._part = self._none()
        self._part.merge(part)

    @property
    def sums(self) -> SummarySums:
        """Those of all blocks; no more can be added."""
        self._total.merge(self._part)
        return self._total
