"""The load balancer: which slot should hold which expert. It moves nothing; expert_parallel.py does.

Greedy: the expert with the most tokens per copy gets the next redundant slot, then the copies are packed onto
ranks by longest processing time. Every rank computes it from the same summed loads, and so finds the same
placement.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def initial_placement(moe_layers: int, num_logical_experts: int, num_physical_experts: int) -> Tensor:
    """Before any load is known: the experts in order, and the first ones again in the redundant slots."""
    return torch.arange(num_physical_experts).remainder(num_logical_experts).repeat(moe_layers, 1)


def rebalance(load: Tensor, physical_to_logical_map: Tensor, ep_size: int) -> Tensor:
    """A new physical_to_logical_map, [moe_layers, num_physical_experts] like the old one.

    load [moe_layers, num_logical_experts], summed over ranks. Of the old map is kept what costs no balance.
    """
    num_slots = physical_to_logical_map.shape[1]
    old_ranks = physical_to_logical_map.view(len(load), ep_size, -1).tolist()
    placement = [
        _stay_in_place(pack(layer_load, replicate(layer_load, num_slots), ep_size), old)
        for layer_load, old in zip(load.tolist(), old_ranks, strict=True)
    ]
    return torch.tensor(placement)


def replicate(load: list[int], num_slots: int) -> list[int]:
    """How many copies each logical expert gets; they add up to `num_slots`."""
    copies = [1] * len(load)
    for _ in range(num_slots - len(load)):
        hottest = max(range(len(load)), key=lambda expert: load[expert] / copies[expert])
        copies[hottest] += 1
    return copies


def pack(load: list[int], copies: list[int], ep_size: int) -> list[list[int]]:
    """The experts of each rank: the heaviest copy first, each to the least loaded rank with room."""
    room = sum(copies) // ep_size
    ranks: list[list[int]] = [[] for _ in range(ep_size)]
    rank_load = [0.0] * ep_size
    per_copy = [tokens / number for tokens, number in zip(load, copies, strict=True)]
    for expert in sorted(range(len(load)), key=lambda expert: -per_copy[expert]):
        for _ in range(copies[expert]):
            # two copies on one rank are as good as one: only where there is no other room
            rank = min(
                (rank for rank in range(ep_size) if len(ranks[rank]) < room),
                key=lambda rank: (expert in ranks[rank], rank_load[rank]),
            )
            ranks[rank].append(expert)
            rank_load[rank] += per_copy[expert]
    return ranks


def balancedness(load: Tensor, physical_to_logical_map: Tensor, ep_size: int) -> float:
    """Mean over layers of (mean / max tokens of a rank), in (0, 1]; layers without a token do not count.

    load [moe_layers, num_logical_experts]; that of each expert is split evenly over its copies.
    """
    copies = torch.zeros(load.shape, dtype=torch.float64)
    copies.scatter_add_(
        1, physical_to_logical_map, torch.ones(physical_to_logical_map.shape, dtype=torch.float64)
    )
    per_slot = (load / copies).gather(1, physical_to_logical_map)
    per_rank = per_slot.view(len(load), ep_size, -1).sum(2)
    active = per_rank[per_rank.amax(1) > 0]
    return float((active.mean(1) / active.amax(1)).mean())


def _stay_in_place(new: list[list[int]], old: list[list[int]]) -> list[int]:
    """One layer's slots: the new ranks, they and their experts ordered so that few weights have to move."""
    remaining = list(new)
    slots: list[int] = []
    for old_experts in old:
        # ranks are interchangeable: this one takes the set that shares the most experts with what it holds
        experts = max(remaining, key=lambda candidate: len(set(candidate) & set(old_experts)))
        remaining.remove(experts)
        staying = Counter(experts) & Counter(old_experts)
        arriving = list((Counter(experts) - staying).elements())
        for expert in old_experts:
            if staying[expert]:
                staying[expert] -= 1
                slots.append(expert)
            else:
                slots.append(arriving.pop())
    return slots
