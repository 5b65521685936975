"""Redundant experts where they help: layers share a budget, and some get more of it than others.

The idea of CRAFT (arXiv 2603.28768): estimate what copies gain in each layer, and spend the memory there. The
paper's estimate is not used here: a layer's gain is what the busiest rank loses under DeepSeek's algorithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.deepseek import EPLB, hierarchical
from eplb_dump.format.schema import EMPTY_SLOT

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def layer_budgets(weight: Array, slots: int, ranks: int, nodes: int, groups: int) -> Int32:
    """Place the experts of all layers, with half of the redundant slots in total.

    A layer gets none to all of its redundant slots, the same number on each rank; the others stay empty, the
    last ones of each rank.

    Args:
        weight: tokens ``[layers, num_logical_experts]``.

    Returns:
        The expert of each slot, int32 ``[layers, slots]``; -1: none.
    """
    layers, experts = weight.shape
    least = -(-experts // ranks) * ranks
    sizes = range(least, slots + 1, ranks)
    tokens = weight.astype(np.float32)
    placed = [hierarchical(tokens, size, groups, nodes, ranks, EPLB) for size in sizes]
    cost = np.stack([_busiest(weight, each, ranks) for each in placed], axis=1)
    chosen = allocate(cost, layers * (len(sizes) - 1) // 2)
    out = np.full((layers, ranks, slots // ranks), EMPTY_SLOT, np.int32)
    for layer, extra in enumerate(chosen.tolist()):
        own = placed[extra][layer].reshape(ranks, -1)
        out[layer, :, : own.shape[1]] = own
    return out.reshape(layers, slots)


def _busiest(weight: Array, placed: Int64, ranks: int) -> Float64:
    """Tokens of each layer's busiest rank, ``[layers]``, copies sharing evenly."""
    copies = np.stack([np.bincount(row, minlength=weight.shape[1]) for row in placed])
    share = np.take_along_axis(weight / copies, placed, 1)
    busiest: Float64 = share.reshape(len(weight), ranks, -1).sum(axis=2).max(axis=1)
    return busiest


def allocate(cost: Float64, budget: int) -> Int64:
    """The units of each layer that minimize the summed cost, of those that cost the same the fewest.

    Args:
        cost: of each layer with 0, 1, … units, ``[layers, units + 1]``.
        budget: the units that all layers may have together.

    Returns:
        ``[layers]``, at most ``budget`` in total.
    """
    layers, choices = cost.shape
    # The least cost of the layers so far with exactly b units, and what the last of them has then.
    total = np.full(budget + 1, np.inf)
    total[0] = 0
    units = np.zeros((layers, budget + 1), np.int64)
    for layer in range(layers):
        options = np.full((choices, budget + 1), np.inf)
        for extra in range(min(choices, budget + 1)):
            options[extra, extra:] = total[: budget + 1 - extra] + cost[layer, extra]
        units[layer] = options.argmin(axis=0)
        total = options.min(axis=0)
    left = int(total.argmin())
    out = np.zeros(layers, np.int64)
    for layer in reversed(range(layers)):
        out[layer] = units[layer, left]
        left -= int(out[layer])
    return out
