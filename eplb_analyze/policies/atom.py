"""ROCm ATOM's policies: the hottest experts on every rank (``biased``), or copies spread thinly (``naive``).

Source: ``_placement_biased``, ``_placement_naive`` and ``rebalance_experts`` of ROCm/ATOM at commit
ffdf3bb5ddf8a15a64d521a2eeb3bc7438f9ac21, ``atom/model_ops/eplb.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.deepseek import replicate

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def place(
    weight: Array, slots: int, ranks: int, nodes: int, groups: int, current: Int32 | None, *, biased: bool
) -> Int64:
    """Place the experts of all layers.

    With several nodes and groups, each group of experts stays on one node, and ``biased`` puts the hottest
    experts of a node on each of the node's ranks. ``nodes`` divides ``groups`` and ``ranks``, ``groups`` the
    experts, ``ranks`` the slots.

    Args:
        weight: tokens ``[layers, num_logical_experts]``.
        current: the placement in force ``[layers, slots]``; None: none.

    Returns:
        The logical expert of each slot, ``[layers, slots]``.
    """
    layers, experts = weight.shape
    if nodes == 1 or groups == 1:
        return _on_one_node(weight, slots, ranks, current, biased)
    size = experts // groups
    node = pack(weight.reshape(layers, groups, size).sum(axis=2).astype(np.float64), nodes)[0]
    of_node = np.argsort(node, axis=1, kind="stable")
    expert = (of_node[:, :, None] * size + np.arange(size)).reshape(layers * nodes, -1)
    tokens = np.take_along_axis(weight, expert.reshape(layers, -1), 1).reshape(expert.shape)
    placed = _on_one_node(tokens, slots // nodes, ranks // nodes, None, biased)
    out: Int64 = np.take_along_axis(expert, placed, 1).reshape(layers, slots)
    return out


def _on_one_node(weight: Array, slots: int, ranks: int, current: Int32 | None, biased: bool) -> Int64:
    tokens = weight.astype(np.float32).astype(np.float64)
    hottest = (slots - weight.shape[1]) // ranks
    # ATOM's code fails if no expert is left for the other slots.
    if biased and 0 < hottest < weight.shape[1]:
        return _biased(tokens, slots, ranks, hottest, current)
    return _naive(tokens, slots, ranks)


def _naive(tokens: Float64, slots: int, ranks: int) -> Int64:
    """Copies of the experts with most tokens per copy, packed by their tokens, which are float32."""
    # Sorted, so that the copies of an expert are beside each other.
    expert = np.sort(replicate(tokens, slots, np.float64)[0], axis=1)
    count = _counts(expert, tokens.shape[1])
    share = np.take_along_axis(tokens.astype(np.float32) / count.astype(np.float32), expert, 1)
    return _packed(expert, share.astype(np.float64), ranks)


def _biased(tokens: Float64, slots: int, ranks: int, hottest: int, current: Int32 | None) -> Int64:
    """The ``hottest`` experts in the first slots of each rank, the others packed into the rest.

    A layer whose hottest experts are these already, on each rank, stays as it is.
    """
    layers, experts = tokens.shape
    hot = np.sort(np.argsort(-tokens, axis=1, kind="stable")[:, :hottest], axis=1)
    cold = np.ones((layers, experts), np.bool_)
    np.put_along_axis(cold, hot, False, axis=1)
    others = np.flatnonzero(cold.reshape(-1)).reshape(layers, -1) % experts
    left = np.take_along_axis(tokens, others, 1)
    copy = np.sort(replicate(left, slots - hottest * ranks, np.float64)[0], axis=1)
    share = np.take_along_axis(left / _counts(copy, left.shape[1]), copy, 1)
    packed = np.take_along_axis(others, _packed(copy, share, ranks), 1).reshape(layers, ranks, -1)
    on_each = np.broadcast_to(hot[:, None], (layers, ranks, hottest))
    placed = np.concatenate([on_each, packed], axis=2).reshape(layers, slots)
    if current is not None:
        first = np.sort(current[:, :hottest], axis=1)
        # An empty slot counts for one expert more, which is never hot.
        held = np.take_along_axis(_counts(current % (experts + 1), experts + 1), hot, 1) == ranks
        stays = (first == hot).all(axis=1) & held.all(axis=1)
        placed[stays] = current[stays]
    return placed


def _counts(expert: Array, experts: int) -> Int64:
    """How many slots hold each expert: ``[layers, slots]`` to ``[layers, experts]``."""
    cells = expert + np.arange(len(expert))[:, None] * experts
    return np.bincount(cells.reshape(-1), minlength=len(expert) * experts).reshape(-1, experts)


def _packed(expert: Int64, share: Float64, ranks: int) -> Int64:
    """The expert of each slot, given those of the copies and their tokens."""
    rank, position = pack(share, ranks)
    out = np.empty_like(expert)
    np.put_along_axis(out, rank * (expert.shape[1] // ranks) + position, expert, axis=1)
    return out


def pack(weight: Float64, packs: int) -> tuple[Int64, Int64]:
    """Put the heaviest item into the lightest pack that is not full, one after another.

    Of equally light packs, the one with the fewest items is taken, then the first one; of equal items, the
    first one.

    Args:
        weight: ``[rows, items]``; ``packs`` divides ``items``.

    Returns:
        The pack of each item, and its position there, ``[rows, items]`` each.
    """
    rows, items = weight.shape
    every, capacity = np.arange(rows), items // packs
    total, count = np.zeros((rows, packs)), np.zeros((rows, packs), np.int64)
    pack_of, position = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        lightest = total == total.min(axis=1, keepdims=True)
        chosen = np.where(lightest, count, capacity + 1).argmin(axis=1)
        pack_of[every, item], position[every, item] = chosen, count[every, chosen]
        count[every, chosen] += 1
        full = count[every, chosen] == capacity
        total[every, chosen] = np.where(full, np.inf, total[every, chosen] + weight[every, item])
    return pack_of, position
