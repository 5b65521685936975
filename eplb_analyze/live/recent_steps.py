"""The newest complete steps: when they were, and what the ranks did in them.

From these come the pauses of rearrangements and the cost of imbalance, while the run is written. 64 ranks
write 2 GB in the steps that the cost covers; what is kept of them here takes less than 1 MB.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_analyze.analysis.cost import RunCost, cost_of_steps
from eplb_analyze.analysis.cost_sample import CostSample
from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.cost import Float64, Work
from eplb_analyze.reader.blocks import active_experts
from eplb_analyze.reader.lost import serving, serving_slots
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.session import SessionInfo

#: So many are kept, to measure the pause of a rearrangement among them.
KEPT_STEPS = 4096
#: The cost is fitted to so many of the newest.
COST_STEPS = 2000


class _Part(NamedTuple):
    step: Int64
    clock_ns: Int64
    step_ms: Float64
    device_ms: Float64
    #: Index of the phase, -1 if it has no name.
    phase: Int64
    #: None if only the tokens of ranks are known, which do not show the active experts.
    work: Work | None
    shape: Shape


class RecentSteps:
    """Takes steps as they become complete, in ascending order, of one run."""

    def __init__(self, info: SessionInfo) -> None:
        self._info = info
        self._parts: list[_Part] = []
        self._phases: dict[str, int] = {}

    @property
    def last(self) -> int:
        """The newest step; -1 if there is none."""
        return int(self._parts[-1].step[-1]) if self._parts else -1

    def add(self, news: CompleteSteps) -> None:
        """Add steps. Some that became complete too late are left out."""
        if news.step[0] <= self.last:
            return
        codes = [self._phases.setdefault(name, len(self._phases)) for name in news.phases]
        phase = np.array([*codes, -1], np.int64)[news.phase]
        own = news.step, news.clock_ns, news.step_ms, news.device_ms, phase
        self._parts.append(_Part(*own, self._work(news), news.shape))
        excess = sum(len(part.step) for part in self._parts) - KEPT_STEPS
        while excess >= len(self._parts[0].step):
            excess -= len(self._parts.pop(0).step)

    def _work(self, news: CompleteSteps) -> Work | None:
        if news.load is None:
            return None
        shape, ranks, load = news.shape, serving(news.shape), news.load
        if ranks < shape.ep_size:
            load = load[:, :, serving_slots(shape)]
        tokens = load.reshape(*load.shape[:2], ranks, -1).sum(axis=3) / self._info.token_replication
        return Work.of(active_experts(load, ranks), tokens)

    def durations(self) -> tuple[Int64, Float64, Int64]:
        """Step, time since the step before in ms (NaN if that is not known), and phase of the kept steps."""
        if not self._parts:
            none = np.empty(0, np.int64)
            return none, np.empty(0), none
        step = np.concatenate([part.step for part in self._parts])
        clock_ns = np.concatenate([part.clock_ns for part in self._parts])
        return step, _since_last(step, clock_ns), np.concatenate([part.phase for part in self._parts])

    def cost(self, changes: list[int]) -> RunCost:
        """The cost of imbalance in the newest steps with one shape; ``changes``: of the placement."""
        parts: list[tuple[_Part, Work]] = []
        for part in reversed(self._parts):
            if parts and part.shape != parts[0][0].shape:
                break
            if part.work is not None:
                parts.append((part, part.work))
            if sum(len(one.step) for one, _ in parts) >= COST_STEPS:
                break
        parts.reverse()
        sample = CostSample.empty() if not parts else self._sample(parts)
        # The first placement is no change. Whoever follows a run sees its engine's clock: it is timed.
        later = [change for change in changes if len(sample.step) and change > sample.step[0]]
        return cost_of_steps(sample, later, timed=True)

    def _sample(self, parts: list[tuple[_Part, Work]]) -> CostSample:
        step, clock_ns, step_ms, device_ms, phase = (
            np.concatenate(column) for column in list(zip(*(part for part, _ in parts), strict=True))[:5]
        )
        work, shape = Work.concat([work for _, work in parts]), parts[0][0].shape
        since_last, names = _since_last(step, clock_ns), [*self._phases, None]
        return CostSample(
            step,
            since_last,
            np.append(since_last[1:], np.nan),
            step_ms,
            device_ms,
            np.full(len(step), -1),
            work,
            work.tokens / (shape.num_moe_layers * shape.slots_per_rank),
            [names[code] for code in phase.tolist()],
        )


def _since_last(step: Int64, clock_ns: Int64) -> Float64:
    ms = np.full(len(step), np.nan)
    # Another rank's clock, after a restart, can be behind.
    follows = (np.diff(step) == 1) & (np.diff(clock_ns) > 0)
    ms[1:] = np.where(follows, np.diff(clock_ns) / 1e6, np.nan)
    return ms
