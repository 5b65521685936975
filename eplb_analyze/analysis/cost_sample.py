"""The steps that the cost of imbalance is fitted to: how long they took, and what the ranks did in them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from eplb_analyze.metrics.cost import MIN_STEPS, Float64, Work
from eplb_analyze.metrics.formulas import Terms
from eplb_analyze.reader.blocks import Block, active_experts
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int64

#: Loads are large, so those of a long run are not all read: about this many steps, with this many values.
SAMPLE_STEPS, SAMPLE_VALUES = 8192, 1 << 25

_ARRAYS = ("step", "since_last", "until_next", "step_ms", "device_ms", "num_tokens", "per_slot")

#: If all but this share of slots and steps have tokens, all are taken to, and loads, which are large, are not
#: read. Tokens come in bursts: this share of a slot's tokens is taken to arrive independently.
QUIET, BURSTS = 1e-3, 0.25


class Sampling:
    """Which blocks of a run are in its sample: evenly spaced, so that parts of a run can be read apart."""

    def __init__(self, run: Run, first: int, last: int, *, with_loads: bool = True) -> None:
        """``first``, ``last``: the range of steps to sample.

        ``with_loads``: only steps of which experts' loads are kept; else their work is of tokens alone.
        """
        self.with_loads = with_loads
        segments = [
            (session.info.ep_rank, segment, segment.shape)
            for session in run.sessions
            for segment in session.segments
            if segment.shape is not None and segment.first_step <= last and segment.last_step >= first
            if segment.has_loads or not with_loads
        ]
        # Differences are of integers: steps can be above 2^53.
        self._first = np.array([segment.first_step for _, segment, _ in segments], np.int64)
        self._length = np.array([s.last_step + 1 - s.first_step for _, s, _ in segments], np.float64)
        self._values = np.array(
            [s.recorded * shape.num_moe_layers * shape.num_physical_experts for _, s, shape in segments],
            np.float64,
        )
        steps: dict[int, int] = {}
        for rank, segment, _ in segments:
            steps[rank] = steps.get(rank, 0) + segment.recorded
        #: At most so many steps are complete.
        self.steps = min(max(steps.values(), default=0), last + 1 - first)
        self._before_first = self._before(first)
        self._total = self._before(last + 1) - self._before_first
        self._share = min(1.0, SAMPLE_STEPS / max(1, self.steps), SAMPLE_VALUES / max(1.0, self._total))

    def _before(self, step: int) -> float:
        """How many values the segments have before a step."""
        return float(self._values @ np.clip((step - self._first) / self._length, 0, 1))

    def wants(self, block: Block) -> bool:
        if self.steps < MIN_STEPS or not len(block.recorded):
            return False
        if self.with_loads and not block.has_loads:
            return False
        if self._share == 1:
            return True
        edges = int(block.step[0]), int(block.step[-1]) + 1
        low, high = (self._before(step) - self._before_first for step in edges)
        if high <= low:
            return False
        apart = self._total / max(1, int(self._share * self._total / (high - low)))
        return bool((np.ceil(low / apart - 0.5) + 0.5) * apart < high)


@dataclass
class CostSample:
    """The sampled steps of one block or of consecutive ones, to which those of later blocks can be added.

    Attributes:
        step: int64 ``[n]``, complete steps, ascending.
        since_last, until_next: float64 ``[n]``, ms between the step and its neighbors; NaN if unknown.
        step_ms, device_ms: float64 ``[n]``, what the engine and the device recorded; NaN if unknown.
        num_tokens: int64 ``[n]``, each token once; -1 if unknown.
        work: of these steps.
        per_slot: float64 ``[n]``, the mean tokens of a slot.
        phase: of each step, as the engine named it, or None.
        first, last: number and clock, ns, of the first and last step seen, sampled or not.
    """

    step: Int64
    since_last: Float64
    until_next: Float64
    step_ms: Float64
    device_ms: Float64
    num_tokens: Int64
    work: Work
    per_slot: Float64
    phase: list[str | None]
    first: tuple[int, int] | None = None
    last: tuple[int, int] | None = None

    @classmethod
    def empty(cls) -> CostSample:
        steps, none = np.empty(0, np.int64), np.empty(0)
        return cls(steps, none, none, none, none, steps, Work.empty(), none, [])

    @classmethod
    def of(cls, run: Run, sampling: Sampling, block: Block, terms: Terms | None = None) -> CostSample:
        """A block's complete steps, if the sample wants them; ``terms``: of these, if they are known."""
        first, last = ((int(block.step[i]), int(block.clock_ns[i])) for i in (0, -1))
        sample = cls.empty()
        if block.shape is not None and sampling.wants(block):
            chosen = block.state == StepState.RECORDED
            terms = run.terms(block) if terms is None else terms
            work = Work.of_all_active(0.0, terms.mean, terms.maximum)
            if sampling.with_loads:
                work = _work(block, terms, run.info.token_replication)
            sample = cls(
                block.step[chosen],
                block.since_last_ms[chosen],
                block.until_next_ms[chosen],
                block.step_ms[chosen],
                block.device_ms[chosen],
                block.num_tokens[chosen] // run.info.num_tokens_replication,
                work,
                work.tokens / (block.shape.num_moe_layers * block.shape.slots_per_rank),
                block.phase_names(block.recorded),
            )
        sample.first, sample.last = first, last
        return sample

    def merge(self, later: CostSample) -> None:
        """Add the steps after these; ``later`` is not changed."""
        joint = len(self.step)
        if len(later.step):
            for name in _ARRAYS:
                setattr(self, name, np.concatenate([getattr(self, name), getattr(later, name)]))
            self.work = Work.concat([self.work, later.work])
            self.phase = self.phase + later.phase
        if self.last and later.first and later.first[0] == self.last[0] + 1:
            apart = (later.first[1] - self.last[1]) / 1e6
            if joint and self.step[joint - 1] == self.last[0]:
                self.until_next = _with(self.until_next, joint - 1, apart)
            if joint < len(self.step) and self.step[joint] == later.first[0]:
                self.since_last = _with(self.since_last, joint, apart)
        self.first, self.last = self.first or later.first, later.last or self.last


def _with(values: Float64, at: int, value: float) -> Float64:
    """A copy with one value set: arrays of another process are read-only."""
    values = values.copy()
    values[at] = value
    return values


def sample_of(run: Run, steps: tuple[int, int] | None = None) -> CostSample:
    """The sample of a run, or of a half-open range of its steps."""
    first, last = run.step_range
    low, high = (0, -1) if first is None or last is None else (first, last)
    if steps is not None:
        low, high = max(low, steps[0]), min(high, steps[1] - 1)
    sampling, total = Sampling(run, low, high), CostSample.empty()
    for _, sample in run.over_blocks(lambda block: CostSample.of(run, sampling, block), steps):
        total.merge(sample)
    return total


def _work(block: Block, terms: Terms, per_token: int) -> Work:
    """The work of a block's complete steps, whose terms are known."""
    assert block.shape is not None
    constant = _active_by_sums(block)
    if constant is not None:
        active, rate = constant
        work = Work.of_all_active(active, terms.mean, terms.maximum)
        few = np.quantile(work.tokens, 0.01) / max(1.0, work.tokens.mean())
        if np.exp(-BURSTS * few * rate / per_token).mean() < QUIET:
            return work
    serving = block.serving_only()
    assert serving.shape is not None
    ranks = serving.shape.ep_size
    return functools.reduce(
        Work.plus,
        (
            Work.of(
                active_experts(load, ranks), load.reshape(*load.shape[:2], ranks, -1).sum(axis=3) / per_token
            )
            for _, load in serving.load_parts()  # a few layers at a time
        ),
    )


def _active_by_sums(block: Block) -> tuple[int, Float64] | None:
    """The slots in use of a rank, summed over layers, and the tokens per step of every slot in use.

    By the sums in the manifest, under all placements of a block. None if they do not tell, or if ranks or
    placements differ in the number.
    """
    assert block.shape is not None
    found = [(segment.sums, segment.load_steps()) for segment, _, _ in block.matches(block.recorded)]
    sums, steps = found[0]
    if sums is None or sums.load.shape[1] != block.shape.num_physical_experts:
        return None
    load = np.zeros_like(sums.load)
    for own, own_steps in found:
        pairs = () if own is None else ((own_steps, steps), (own.layer, sums.layer), (own.step, sums.step))
        if own is None or not all(np.array_equal(*pair) for pair in pairs):
            return None
        load += own.load
    starts = np.searchsorted(steps, sums.step)
    ends = np.where(np.diff(sums.layer, append=-1) == 0, np.roll(starts, -1), len(steps))
    some = ends > starts
    load, rate = load[some], load[some] / (ends - starts)[some, np.newaxis]
    used = (load > 0).reshape(len(load), block.shape.ep_size, -1).sum(axis=2)
    of_layer = np.zeros(block.shape.num_moe_layers, np.int64)
    of_layer[sums.layer[some]] = used[:, 0]
    if not load.any() or (used != of_layer[sums.layer[some], np.newaxis]).any():
        return None
    return int(of_layer.sum()), rate[load > 0]
