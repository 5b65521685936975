"""DeepSeek's algorithm for placing experts, for all layers at once and as each engine computes it.

It packs groups of experts into nodes, replicates experts within each node, and packs the copies into ranks.
Source: ``rebalance_experts`` of deepseek-ai/EPLB. SGLang and vLLM carry versions of it, which differ only in
rounding and in the order of ties: see :class:`Arithmetic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies import torch_cpu
from eplb_dump.format.frozen import frozen

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Intp = npt.NDArray[np.intp]
Array = npt.NDArray[Any]


@frozen
class Arithmetic:
    """How an implementation rounds, and how it breaks ties."""

    #: The type of an expert's tokens divided by its number of copies.
    share: type[np.floating[Any]]
    #: The type in which the tokens of a rank or node are summed.
    pack: type[np.floating[Any]]
    #: Sums over the last axis, of float32.
    total: Callable[[Float32], Float32]
    #: ``(keys, names)``, both ``[rows, n]``, to the indices that sort the keys, descending. The order of
    #: equal keys of one name is arbitrary.
    order: Callable[[Array, Array], Intp]


def _numpy_total(values: Float32) -> Float32:
    out: Float32 = values.sum(axis=-1)
    return out


def _numpy_order(keys: Array, names: Array) -> Intp:
    # Not stable: numpy's order of ties depends on its version and on the processor's vector width.
    return np.argsort(-keys, axis=-1)


EPLB = Arithmetic(np.float32, np.float32, torch_cpu.float32_sum, torch_cpu.descending_order)
#: SGLang's copy adds Python floats where EPLB adds tensors.
SGLANG = Arithmetic(np.float32, np.float64, torch_cpu.float32_sum, torch_cpu.descending_order)
#: vLLM uses numpy.
VLLM = Arithmetic(np.float64, np.float64, _numpy_total, _numpy_order)


def hierarchical(
    weight: Float32,
    num_physical_experts: int,
    num_groups: int,
    num_nodes: int,
    ep_size: int,
    arithmetic: Arithmetic,
) -> Int64:
    """Place the experts of all layers.

    Each group of ``num_logical_experts / num_groups`` experts stays on one node with all its copies. With one
    group and one node, it is the global algorithm. ``num_nodes`` divides ``num_groups`` and ``ep_size``,
    ``num_groups`` the experts, ``ep_size`` the slots.

    Args:
        weight: tokens ``[layers, num_logical_experts]``.

    Returns:
        The logical expert of each slot, ``[layers, num_physical_experts]``.
    """
    layers, experts = weight.shape
    size = experts // num_groups

    def group_totals() -> Float32:
        return arithmetic.total(weight.reshape(layers, num_groups, size))

    names = np.broadcast_to(np.arange(num_groups), (layers, num_groups))
    groups = (
        np.array(names) if num_groups == num_nodes else pack(group_totals(), names, num_nodes, arithmetic)
    )
    # The experts in the order of their nodes, one row for each node.
    expert = (groups[:, :, None] * size + np.arange(size)).reshape(layers * num_nodes, -1)
    tokens = np.take_along_axis(weight, expert.reshape(layers, -1), -1).reshape(expert.shape)
    copy, copies = replicate(tokens, num_physical_experts // num_nodes, arithmetic.share)
    share = np.take_along_axis(tokens.astype(arithmetic.share) / copies, copy, -1)
    copy = np.take_along_axis(copy, pack(share, copy, ep_size // num_nodes, arithmetic), -1)
    placed: Int64 = np.take_along_axis(expert, copy, -1).reshape(layers, -1)
    return placed


def replicate(tokens: Array, slots: int, share: type[np.floating[Any]]) -> tuple[Int64, Array]:
    """Give each redundant slot to the expert with most tokens per copy; of ties, to the first.

    Args:
        tokens: ``[rows, experts]``.
        share: the type of tokens per copy.

    Returns:
        The expert of each slot ``[rows, slots]``, and the number of copies of each expert, as ``share``
        ``[rows, experts]``.
    """
    rows, experts = tokens.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    copies = np.ones((rows, experts), share)
    per_copy = tokens.astype(share)
    every = np.arange(rows)
    for slot in range(experts, slots):
        hottest = per_copy.argmax(axis=-1)
        expert[:, slot] = hottest
        copies[every, hottest] += 1
        per_copy[every, hottest] = tokens[every, hottest].astype(share) / copies[every, hottest]
    return expert, copies


def pack(weight: Array, names: Array, packs: int, arithmetic: Arithmetic) -> Intp:
    """Fill packs with equally many items: the next heaviest item goes to the lightest pack that is not full.

    ``weight`` and ``names`` are ``[rows, items]``, and so is the result: the items in the order of the packs,
    and within a pack in the order of packing. With one item per pack, they keep their order.
    """
    rows, items = weight.shape
    if items == packs:
        return np.tile(np.arange(items), (rows, 1))
    capacity = items // packs
    order = arithmetic.order(weight, names)
    heaviest = np.take_along_axis(weight, order, -1).T.copy()
    first = np.arange(rows) * packs
    total = np.zeros((rows, packs), arithmetic.pack)
    pack_total = total.reshape(-1)
    filled = np.zeros(rows * packs, np.intp)
    slot = np.empty((items, rows), np.intp)
    for i, item in enumerate(heaviest):
        lightest = first + total.argmin(axis=-1)
        taken = filled[lightest]
        slot[i] = lightest * capacity + taken
        filled[lightest] = taken + 1
        pack_total[lightest] = np.where(taken + 1 == capacity, np.inf, pack_total[lightest] + item)
    placed = np.empty(rows * items, np.intp)
    placed[slot] = order.T
    return placed.reshape(rows, items)
