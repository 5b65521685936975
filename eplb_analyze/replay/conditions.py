"""When a setting rearranges less, later or in parts, as engines do: arrays in, arrays out.

The conditions are those of SGLang 0.5.23 (``EPLBManager``: ``eplb_min_rebalancing_utilization_threshold``,
``eplb_rebalance_layers_per_chunk``), of ROCm ATOM (``rebalance_min_balancedness``, aggregated with ``min``)
and of vLLM 0.33's asynchronous EPLB, which changes at most one layer per step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.placements import crossings, even_shares, holdings
from eplb_dump.format.journal import Int32, Int64


def rank_tokens(weight: npt.NDArray[Any], placement: Int32, ep_size: int) -> Float64:
    """Tokens of each rank, copies sharing evenly: ``[layers, ep_size]``.

    Args:
        weight: ``[layers, num_logical_experts]``.
        placement: ``[layers, num_physical_experts]``.
    """
    experts = weight.shape[1]
    shares = (even_shares(slots, ep_size, experts) for slots in placement)
    return np.stack([own @ share for own, share in zip(weight, shares, strict=True)])


def worst_balancedness(weight: npt.NDArray[Any], placement: Int32, ep_size: int) -> float:
    """The least balancedness of a layer over the window; 1 for layers without tokens."""
    tokens = rank_tokens(weight, placement, ep_size)
    busiest = tokens.max(axis=1)
    ratio = np.divide(tokens.mean(axis=1), busiest, out=np.ones(len(busiest)), where=busiest > 0)
    return float(ratio.min())


def fetched(old: Int32, new: Int32, ep_size: int, num_logical_experts: int) -> Int64:
    """How many expert weights each rank fetches in each layer: ``[layers, ep_size]``."""
    moved = []
    for before, after in zip(old, new, strict=True):
        held = [holdings(slots, ep_size, num_logical_experts) for slots in (before, after)]
        moved.append(crossings(held[0], held[1]))
    return np.stack(moved)


def limited(current: Int32, new: Int32, weight: npt.NDArray[Any], ep_size: int, max_moves: int) -> Int32:
    """The new placement in the layers where a move relieves the busiest rank most, within a limit of moves.

    A layer changes as a whole. The others keep the current placement.
    """
    moves = fetched(current, new, ep_size, weight.shape[1]).sum(axis=1)
    busiest = [rank_tokens(weight, each, ep_size).max(axis=1) for each in (current, new)]
    relief = (busiest[0] - busiest[1]) / np.maximum(moves, 1)
    out, left = current.copy(), max_moves
    for layer in np.argsort(-relief, kind="stable").tolist():
        if moves[layer] <= left and (relief[layer] > 0 or not moves[layer]):
            out[layer] = new[layer]
            left -= int(moves[layer])
    return out


def in_parts(current: Int32, new: Int32, layers_per_step: int | None) -> list[Int32]:
    """The placements of consecutive steps until all layers have changed, the first layers first."""
    layers = len(new)
    size = layers_per_step or layers
    ends = range(min(size, layers), layers + size, size)
    return [np.concatenate([new[:end], current[end:]]) for end in ends]
