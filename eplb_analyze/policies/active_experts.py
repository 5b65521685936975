"""Balance the experts that have a token in a step, not the tokens: at small batches these decide the time.

The objective of METRO (arXiv 2512.09277), which chooses among the copies of an expert for each token. This is
a placement for it: it cannot change which copy an engine chooses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.atom import pack
from eplb_analyze.policies.slots import keep_slots

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

#: An expert with the mean tokens counts so much beside its chance to be active, so that tokens decide only
#: between placements that are alike.
TOKENS = 1e-3


def active_experts(series: Array, steps: int, slots: int, ranks: int, current: Int32 | None) -> Int32:
    """Place the experts of all layers so that the ranks expect equally many active experts.

    A redundant slot goes to the expert whose further copy adds fewest active slots, a cold one. Tokens go to
    any copy with the same probability.

    Args:
        series: tokens of windows ``[windows, layers, num_logical_experts]``.
        steps: of each window. With more than one, tokens are assumed to arrive independently.
        current: the placement in force ``[layers, slots]``; experts that stay on their rank keep their slot.

    Returns:
        int32 ``[layers, slots]``.
    """
    layers, experts = series.shape[1:]
    every = np.arange(layers)
    copies = np.ones((layers, experts), np.int64)
    chance = activity(series, steps, copies)
    for _ in range(slots - experts):
        added = (copies + 1) * activity(series, steps, copies + 1) - copies * chance
        chosen = added.argmin(axis=1)
        copies[every, chosen] += 1
        chance = activity(series, steps, copies)
    tokens = series.sum(axis=0) / copies
    mean = np.maximum(tokens.mean(axis=1, keepdims=True), 1e-9)
    weight = chance + TOKENS * tokens / mean
    expert = np.stack([np.repeat(np.arange(experts), own) for own in copies])
    rank, position = pack(np.take_along_axis(weight, expert, 1), ranks)
    placed = np.empty((layers, slots), np.int32)
    np.put_along_axis(placed, rank * (slots // ranks) + position, expert.astype(np.int32), axis=1)
    return placed if current is None else keep_slots(placed, current, ranks)


def activity(series: Array, steps: int, copies: Int64) -> Float64:
    """The share of steps in which a copy of an expert has a token: ``[layers, num_logical_experts]``."""
    idle = np.exp(-series / (steps * copies)) if steps > 1 else (1 - 1 / copies) ** series
    share: Float64 = 1 - idle.mean(axis=0)
    return share
