"""Dispatches by source rank: the replica that each EP rank sends the tokens of an expert to.

SGLang's ``static`` prefers a replica on the same GPU, then one on the same node, and shares the rest out
fairly; vllm-ascend numbers the replicas and takes the rank modulo their number. Each is a function of a
placement alone, so the tokens of a rank and expert all go to one slot until experts are rearranged.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT

#: SGLang seeds the choice among distant replicas with this.
SGLANG_SEED = 42
#: Not chosen: any replica, or the expert has none.
ANY = -1


def sglang_nearest(placement: Int32, num_logical_experts: int, ranks: int, num_nodes: int = 1) -> Int32:
    """The slot that SGLang (0.5.23, ``_find_nearest_expert``) takes as near; :data:`ANY` if none is.

    The only replica; else the first on the same GPU; else the first on the same node, unless all replicas are
    on it.

    Args:
        placement: int ``[layers, slots]``; -1: no expert.

    Returns:
        int32 ``[layers, ranks, num_logical_experts]``.
    """
    copies = _copies(placement, num_logical_experts)
    by_rank, _ = _first(placement, num_logical_experts, ranks)
    out = by_rank
    if num_nodes > 1:
        by_node, on_node = _first(placement, num_logical_experts, num_nodes)
        near = np.where(on_node < copies[:, np.newaxis], by_node, ANY)
        out = np.where(out >= 0, out, near.repeat(ranks // num_nodes, axis=1))
    every, _ = _first(placement, num_logical_experts, 1)
    return np.where((copies == 1)[:, np.newaxis], every, out).astype(np.int32)


def sglang_static(placement: Int32, num_logical_experts: int, ranks: int, num_nodes: int = 1) -> Int32:
    """SGLang's table for ``static`` (0.5.23, ``compute_logical_to_rank_dispatch_physical_map``).

    It holds once experts are rearranged; before, :func:`sglang_static_at_start` does. The nearest replica;
    ranks without one share the replicas out as fairly as possible, in the order of Python's generator, over
    all layers.

    SGLang goes through an expert's replicas in the order of its own table. It is ascending if the placement
    came from a file or a start. After a rearrangement, the policy numbered them, which no recording states;
    ascending is assumed.

    Args, returns: as for :func:`sglang_nearest`; only experts without a slot have :data:`ANY`.
    """
    out = sglang_nearest(placement, num_logical_experts, ranks, num_nodes)
    copies = _copies(placement, num_logical_experts)
    generator = random.Random(SGLANG_SEED)
    unsettled = (out == ANY).any(axis=1) & (copies > 1)
    for layer, expert in np.argwhere(unsettled).tolist():
        left = np.flatnonzero(out[layer, :, expert] == ANY)
        candidates = np.flatnonzero(placement[layer] == expert).tolist()
        out[layer, left, expert] = _fair_choices(candidates, len(left), generator)
    return out


def sglang_static_at_start(
    placement: Int32, num_logical_experts: int, ranks: int, num_nodes: int = 1
) -> Int32:
    """SGLang's table for ``static`` until the first rearrangement (0.5.23, ``init_by_mapping``).

    A rank then knows of each expert that it has a near replica of only that one, and draws nothing for it. So
    ranks draw different numbers for the others, and do not share the replicas out as fairly.

    Args, returns: as for :func:`sglang_static`.
    """
    near = sglang_nearest(placement, num_logical_experts, ranks, num_nodes)
    out, copies = near.copy(), _copies(placement, num_logical_experts)
    for rank in range(ranks):
        generator = random.Random(SGLANG_SEED)
        for layer, expert in np.argwhere((near[:, rank] == ANY) & (copies > 1)).tolist():
            left = np.flatnonzero(near[layer, :, expert] == ANY).tolist()
            candidates = np.flatnonzero(placement[layer] == expert).tolist()
            choices = _fair_choices(candidates, len(left), generator)
            out[layer, rank, expert] = choices[left.index(rank)]
    return out


def _fair_choices(candidates: list[int], count: int, generator: random.Random) -> list[int]:
    """So many choices, in which no candidate is more than once ahead of another; as SGLang draws them."""
    rounds, rest = divmod(count, len(candidates))
    out = candidates * rounds + generator.sample(candidates, k=rest)
    generator.shuffle(out)
    return out


def ascend(placement: Int32, num_logical_experts: int, ranks: int, *, tp_size: int = 1) -> Int32:
    """vllm-ascend's table (``generate_log2phy_map`` in ``vllm_ascend/eplb/core/eplb_utils.py``).

    The ranks that hold an expert are numbered from 0; of several slots on one rank, the last counts. Source
    rank r takes number r modulo their count; with tensor parallelism,
    (r % tp_size + r // tp_size + expert) modulo it.

    Args, returns: as for :func:`sglang_nearest`.
    """
    last, _ = _first(placement[:, ::-1], num_logical_experts, ranks)
    last = np.where(last >= 0, placement.shape[1] - 1 - last, ANY)[:, ::-1]
    holding = np.argsort(last < 0, axis=1, kind="stable")  # the ranks that hold the expert come first
    count = (last >= 0).sum(axis=1)
    rank = np.arange(ranks)[:, np.newaxis]
    turn = rank
    if tp_size > 1:
        turn = rank % tp_size + rank // tp_size + np.arange(num_logical_experts)
    number = turn % np.maximum(count, 1)[:, np.newaxis]
    on = np.take_along_axis(holding, number, axis=1)
    return np.take_along_axis(last, on, axis=1).astype(np.int32)


def _copies(placement: Int32, experts: int) -> npt.NDArray[np.int64]:
    """The number of slots of each expert: ``[layers, experts]``."""
    layers = len(placement)
    at = np.where(placement == EMPTY_SLOT, experts, placement) + np.arange(layers)[:, np.newaxis] * (
        experts + 1
    )
    counts = np.bincount(at.ravel(), minlength=layers * (experts + 1))
    return counts.reshape(layers, experts + 1)[:, :experts].astype(np.int64)


def _first(placement: Int32, experts: int, groups: int) -> tuple[Int32, npt.NDArray[np.int64]]:
    """The first slot of each expert among each of equally many consecutive slots, and how many it has there.

    Returns:
        int32 and int64 ``[layers, groups, experts]``; the slot is :data:`ANY` if there is none.
    """
    layers, slots = placement.shape
    first = np.full((layers, groups, experts + 1), ANY, np.int32)
    count = np.zeros((layers, groups, experts + 1), np.int64)
    row = np.arange(layers)
    held = np.where(placement == EMPTY_SLOT, experts, placement)
    for slot in reversed(range(slots)):
        at = row, slot * groups // slots, held[:, slot]
        first[at] = slot
        count[at] += 1
    return first[:, :, :experts], count[:, :, :experts]
