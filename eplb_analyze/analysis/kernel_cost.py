"""What imbalance would cost by published kernel times, for a run whose step times do not show it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.cost_sample import Sampling
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import MIN_STEPS
from eplb_analyze.metrics.kernel_times import DECODE, KERNELS, LOGICAL_EXPERTS, PREFILL, KernelWork
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run
from eplb_analyze.text import percent

Float64 = npt.NDArray[np.float64]

#: What every estimate assumes.
ASSUMED = "assuming DeepSeek-V3's experts in fp8"
#: A step whose phase the engine did not name is a decode step if its slots have at most so many tokens in
#: the mean.
DECODE_TOKENS = 32
#: If a larger share of the steps is outside the tables, nothing is estimated.
MAX_OUTSIDE = 0.05


class Estimate(NamedTuple):
    """The cost of imbalance in the steps of one phase.

    Attributes:
        steps: how many there are in the sample.
        cost: ms per step, with the tables' error.
        ms: the mean time of the experts in a step, on the slowest rank of each layer.
    """

    steps: int
    cost: Interval
    ms: float


def estimate(run: Run, gpu: str, steps: tuple[int, int]) -> dict[str, Estimate] | str:
    """The cost by phase, ``decode`` or ``prefill``; or the reason why there is none.

    A mixed step runs the kernel for prefill.

    Args:
        gpu: a key of :data:`~eplb_analyze.metrics.kernel_times.KERNELS`.
        steps: a half-open range.
    """
    experts = run.info.num_logical_experts
    if experts != LOGICAL_EXPERTS:
        return f"the kernel times are for {LOGICAL_EXPERTS} experts per layer, but this run has {experts}"
    return run.retry_without_damaged(lambda: _estimate(run, gpu, steps))


def _estimate(run: Run, gpu: str, steps: tuple[int, int]) -> dict[str, Estimate] | str:
    sampling = Sampling(run, steps[0], steps[1] - 1)
    found: dict[str, list[_Times]] = {name: [] for name in KERNELS[gpu]}
    for _, by_kernel in run.over_blocks(lambda block: _times_of(run, gpu, sampling, block), steps):
        for name, some in by_kernel.items():
            found[name].append(some)
    whole = {name: _Times.concat(parts) for name, parts in found.items() if parts}
    inside = sum(int(times.inside.sum()) for times in whole.values())
    seen = sum(len(times.inside) for times in whole.values())
    if not seen:
        return f"fewer than {MIN_STEPS} steps are complete"
    if inside < (1 - MAX_OUTSIDE) * seen:
        return (
            f"in {percent(1 - inside / seen)} of the steps, a rank has more tokens than the kernel "
            f"times cover"
        )
    estimates = {}
    for name, times in whole.items():
        if times.inside.any():
            slowest, balanced = (float(ms[times.inside].mean()) for ms in (times.slowest, times.balanced))
            cost, error = slowest - balanced, KERNELS[gpu][name].error * slowest
            interval = Interval(cost, max(0.0, cost - error), cost + error)
            estimates[name] = Estimate(int(times.inside.sum()), interval, slowest)
    return estimates


class _Times(NamedTuple):
    """ms of steps by a kernel's times, float64 ``[n]``, and whether the tables reach so far, bool ``[n]``."""

    slowest: Float64
    balanced: Float64
    inside: npt.NDArray[np.bool_]

    @classmethod
    def concat(cls, parts: list[_Times]) -> _Times:
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def select(self, steps: npt.NDArray[np.bool_]) -> _Times:
        return _Times(self.slowest[steps], self.balanced[steps], self.inside[steps])


def _times_of(run: Run, gpu: str, sampling: Sampling, block: Block) -> dict[str, _Times]:
    """The times of a block's complete steps, by kernel."""
    block = block.serving_only()
    if block.shape is None or not sampling.wants(block):
        return {}
    steps = len(block.recorded)
    total = {
        name: _Times(np.zeros(steps), np.zeros(steps), np.ones(steps, np.bool_)) for name in KERNELS[gpu]
    }
    tokens = np.zeros(steps)
    for _, load in block.load_parts():
        work = KernelWork.of(load, block.shape.ep_size, run.info.token_replication)
        tokens += load.sum(axis=(1, 2))
        for name, kernel in KERNELS[gpu].items():
            slowest, balanced = work.times(kernel)
            before = total[name]
            inside = before.inside & ~work.outside(kernel)
            total[name] = _Times(before.slowest + slowest, before.balanced + balanced, inside)
    slots = block.shape.num_moe_layers * block.shape.num_physical_experts
    decodes = tokens / (run.info.token_replication * slots) <= DECODE_TOKENS
    for i, code in enumerate(block.phase[block.state == StepState.RECORDED].tolist()):
        if code >= 0:
            decodes[i] = block.phases[code] == DECODE
    return {
        name: total[name].select(chosen)
        for name, chosen in ((DECODE, decodes), (PREFILL, ~decodes))
        if chosen.any()
    }
