"""A planted run for the tests of `report`, and the truth about it, computed from the arrays recorded.

Four ranks, three MoE layers, six experts in eight slots, 400 steps: more than a report has bins of time, so
that a bin has three or four, and layers change their placement within some of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eplb_dump import ExpertLoadWriter

NUMBERS = (3, 4, 7)
LAYERS, LOGICAL, SLOTS, RANKS, PER_RANK, STEPS = 3, 6, 8, 4, 2, 400
#: The step from which each layer has its second placement: only layer 4's is the first of a bin.
CHANGES = (47, 90, 251)
#: Steps without a figure: one rank did not record, or no rank did.
INCOMPLETE, ALL_DUMMY = {33, 70}, {50, 51}
Array = np.ndarray[Any, np.dtype[np.int64]]


def placement(step: int) -> Array:
    """int64 [layers, slots]; slot 7 is empty at first."""
    first = np.array([0, 1, 2, 3, 4, 5, 0, -1])
    second = np.array([5, 4, 3, 2, 1, 0, 2, 2])
    return np.array([second if step >= change else first for change in CHANGES])


def part(rank: int, step: int) -> Array:
    """What a rank records: int64 [layers, slots]."""
    rng = np.random.default_rng(1000 * rank + step)
    load = rng.poisson(30, (LAYERS, SLOTS))
    load[0, placement(step)[0] == 3] += 300 * (60 <= step < 100)
    load[1, placement(step)[1] == 4] += 90
    load[placement(step) < 0] = 0
    return load


def idle(rank: int, step: int) -> bool:
    return step in ALL_DUMMY or (rank == 2 and step % 7 == 0)


def record(root: Path, *, absent: tuple[int, ...] = (), **options: Any) -> None:
    """Record the run; ``absent`` ranks write nothing."""
    defaults = {"model": "org/planted", "run_id": "monday", "engine": "example", "ranks_per_node": 2}
    for rank in set(range(RANKS)) - set(absent):
        with ExpertLoadWriter(
            root, num_logical_experts=LOGICAL, ep_size=RANKS, ep_rank=rank, moe_layers=list(NUMBERS),
            segment_steps=64, queue_steps=1000, **{**defaults, **options},
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                if step in INCOMPLETE and rank == 1:
                    continue
                if idle(rank, step):
                    writer.skip("dummy", step=step)
                else:
                    writer.record(step, part(rank, step), placement(step), phase="decode")


def complete_steps(first: int = 0, last: int = STEPS - 1) -> list[int]:
    return [s for s in range(first, last + 1) if s not in INCOMPLETE | ALL_DUMMY]


def physical(step: int) -> Array:
    """int64 [layers, slots], all ranks together."""
    return np.sum([part(r, step) for r in range(RANKS) if not idle(r, step)], axis=0)


def logical(step: int) -> Array:
    """int64 [layers, experts]."""
    out = np.zeros((LAYERS, LOGICAL), np.int64)
    for layer, slots in enumerate(placement(step)):
        for slot, expert in enumerate(slots):
            if expert >= 0:
                out[layer, expert] += physical(step)[layer, slot]
    return out


def sums(first: int, last: int) -> tuple[Array, Array, Array]:
    """Over the complete steps from first to last: by slot, by rank, by expert, ``[layers, …]`` each."""
    steps = complete_steps(first, last)
    by_slot = np.sum([physical(s) for s in steps], axis=0)
    by_rank = by_slot.reshape(LAYERS, RANKS, PER_RANK).sum(axis=2)
    return by_slot, by_rank, np.sum([logical(s) for s in steps], axis=0)


def balancedness(first: int, last: int) -> float:
    """Mean over the complete steps of mean over layers of mean / max over ranks."""
    rank = np.array(
        [physical(s).reshape(LAYERS, RANKS, PER_RANK).sum(axis=2) for s in complete_steps(first, last)]
    )
    return float((rank.mean(axis=2) / rank.max(axis=2)).mean())
