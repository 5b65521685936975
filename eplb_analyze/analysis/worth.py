"""What a rearrangement gains in ms per step: the same tokens under the placement before and the new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.cost import RunCost, phases_of
from eplb_analyze.dispatch.deal import Dealt, random_bits, replica_draws
from eplb_analyze.dispatch.rule import Replicas, Tokens
from eplb_analyze.metrics.bootstrap import Interval, Ratio
from eplb_analyze.metrics.cost import EXCHANGE_RATES, CostStatus, Float64
from eplb_analyze.metrics.formulas import sum_type
from eplb_analyze.metrics.prices import weighted, worth
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import fold
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.journal import Int32, Int64, Shape

#: About so many steps after a rearrangement are dealt again; with few layers several times, up to MAX_DEALS.
STEPS, LAYERS_DEALT, MAX_DEALS = 128, 1 << 12, 4
#: A gain is known if this share of the steps has a price.
PRICED = 0.5


class DealtSteps(NamedTuple):
    """Some steps of one block, and what they say of a gain."""

    steps: Int64
    token_replication: int
    #: Work saved, float64 ``[layers, len(EXCHANGE_RATES), n]``.
    saved: Float64
    #: float64 ``[layers, n]``.
    tokens: Float64
    phases: list[str | None]


class PlacementGain:
    """Steps after a rearrangement, to be added block by block.

    Their tokens are dealt to the replicas of both placements in the same way, so neither a change of traffic
    nor how evenly the engine really dealt them is in the difference.
    """

    def __init__(self, after: StepRange, shape: Shape, old: Sequence[Int32], new: Sequence[Int32]) -> None:
        """``after``: steps under the placement ``new``, by layer; ``old`` is the one before."""
        self._after, self._shape, self._old, self._new = after, shape, old, new
        self._stride = max(1, (after.end - after.first) // STEPS)
        self._dealt: list[DealtSteps] = []

    def start(self, block: Block, token_replication: int) -> DealtSteps | None:
        """The steps of a block whose loads :meth:`deal` wants, none yet dealt; None if it wants none."""
        steps = block.recorded
        within = (steps >= self._after.first) & (steps < self._after.end)
        steps = steps[within & ((steps - self._after.first) % self._stride == 0)]
        if block.shape != self._shape or not len(steps):
            return None
        layers, n = len(self._new), len(steps)
        saved, tokens = np.zeros((layers, len(EXCHANGE_RATES), n)), np.zeros((layers, n))
        return DealtSteps(steps, token_replication, saved, tokens, block.phase_names(steps))

    def deal(self, dealt: DealtSteps, layer: int, load: npt.NDArray[Any], experts: int) -> None:
        """Deal the loads of a layer in these steps: integers ``[n, slots]``."""
        old, new = self._old[layer], self._new[layer]
        dealt.tokens[layer] = load.sum(axis=1) / dealt.token_replication
        if np.array_equal(old, new):
            return
        draws = max(replica_draws(old), replica_draws(new))
        layers = len(self._new)
        repeats = min(MAX_DEALS, max(1, LAYERS_DEALT // (STEPS * layers)))
        streams = range(layer, layer + repeats * layers, layers)
        deals = np.stack([random_bits(dealt.steps, stream, draws) for stream in streams])
        load = load.astype(sum_type(load, load.shape[1]), copy=False)
        logical, ranks = np.ascontiguousarray(fold(load, new, experts).T), self._shape.ep_size
        dispatch = Dealt(token_replication=dealt.token_replication)
        before, after = (
            dispatch.busiest_rank(Tokens(logical), Replicas(slots, ranks), deals, EXCHANGE_RATES)[2]
            for slots in (old, new)
        )
        dealt.saved[layer] = before - after

    def add(self, dealt: DealtSteps) -> None:
        """Add the steps of the next block, of which all layers are dealt."""
        self._dealt.append(dealt)

    def priced(self, cost: RunCost) -> Interval | str:
        """ms per step, or why it is not known."""
        if not self._dealt:
            return "no complete step after it"
        saved = np.concatenate([dealt.saved.sum(axis=0) for dealt in self._dealt], axis=1)
        tokens = np.concatenate([dealt.tokens.sum(axis=0) for dealt in self._dealt])
        phases = [name for dealt in self._dealt for name in dealt.phases]
        per_slot = tokens / (self._shape.num_moe_layers * self._shape.num_physical_experts)
        parts = {
            name: (int(mask.sum()), dict(enumerate(map(Ratio.mean, saved[:, mask]))))
            for name, mask in phases_of(phases, per_slot)
        }
        return price_of(cost, parts, len(per_slot))


def price_of(
    cost: RunCost, parts: Mapping[str, tuple[float, Mapping[int, Ratio]]], steps: float
) -> Interval | str:
    """ms per step of work saved, over the phases that have a price; or why it is not known.

    Args:
        parts: by phase, its number of steps and the work that they save at each exchange rate.
        steps: all of them.
    """
    found = [
        (count, price)
        for name, (count, saved) in parts.items()
        if name in cost.prices
        and cost.prices[name].status is not CostStatus.NOT_IDENTIFIABLE
        and (price := worth(cost.prices[name].rates, saved)) is not None
    ]
    known = sum(count for count, _ in found)
    if known < PRICED * steps or not known:
        if cost.status is CostStatus.ESTIMATED:
            return "kernel times can estimate the cost of imbalance, but not the gain of a placement"
        reason = "most of the steps are in phases without a price" if found else cost.message
        return reason.removeprefix("not measurable in this run: ")
    total = weighted(found)
    assert total is not None
    return total
