"""A small run for the tests of `ranks`, `timeline` and `placement`, and the truth about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from clocks import steady_clock

from eplb_dump import ExpertLoadWriter

EXPERTS, MOE_LAYERS = 6, (3, 5)
#: Options of :func:`write` by the name of the run that they make.
KINDS: dict[str, dict[str, Any]] = {"local": {}, "global": {"scope": "global"}, "elastic": {"elastic": True}}


@dataclass
class Truth:
    """What was written: tokens [layers, ranks] of each complete step, and the placements."""

    root: Path
    T: dict[int, Any] = field(default_factory=dict)
    #: Slots with a token [layers, ranks] of the same steps.
    active: dict[int, Any] = field(default_factory=dict)
    #: physical_to_logical [layers, slots] of every step that some rank recorded.
    maps: dict[int, Any] = field(default_factory=dict)

    def last(self) -> list[int]:
        """The complete steps of the last shape."""
        steps = sorted(self.T)
        ranks = self.T[steps[-1]].shape[1]
        return [s for s in steps if self.T[s].shape[1] == ranks]


def placements(slots: int, generation: int) -> Any:
    """Each expert once, one empty slot, replicas in the rest; the generation decides their order."""
    row = np.r_[np.arange(EXPERTS), -1, np.arange(slots - EXPERTS - 1) % 4]
    at = np.arange(slots)
    return np.stack([row[(at * 5 + generation * 5) % slots], row[(at * 7 + generation * 3 + 1) % slots]])


def loads(step: int, writers: int, slots: int) -> Any:
    """Scattered counts [writers, layers, slots], the same on every machine."""
    rank, layer, slot = np.indices((writers, 2, slots))
    return (slot * slot * 7 + slot * step * 5 + rank * 11 + layer * 17 + step * step * 3) % 23


@steady_clock(20)
def write(
    root: Path, *, scope: str = "local", elastic: bool = False, steps: int = 30, **options: Any
) -> Truth:
    """Four ranks on two nodes.

    In single steps rank 1 idles, all idle, one drops its load, layer 5 idles, or all loads are equal.
    """
    truth = Truth(root)
    defaults: dict[str, Any] = {
        "model": "org/moe", "num_logical_experts": EXPERTS, "ep_size": 4, "run_id": "r", "segment_steps": 8,
        "moe_layers": MOE_LAYERS, "ranks_per_node": 2, "scope": scope,
    }  # fmt: skip
    writers = [
        ExpertLoadWriter(root, ep_rank=rank, **{**defaults, **options})
        for rank in range(4 if scope == "local" else 1)
    ]
    for step in range(steps):
        shape = (3, 9) if elastic and step >= 20 else (4, 12)
        ep_size, slots = shape
        placement = placements(slots, (step >= 10) + 2 * (step >= 14))
        placement[1] = placements(slots, 0)[1] if step < 12 else placement[1]
        own = loads(step, len(writers), slots)
        own[:, :, placement[0] < 0] = 0
        if step == 9:
            own[:] = 3
        if step == 11:
            own[:, 1] = 0
        idle = {4: [1], 6: range(4)}.get(step, [])
        for rank, writer in enumerate(writers):
            if rank in idle:
                writer.skip("dummy")
                own[rank] = 0
            elif step == 7 and rank == len(writers) // 2:
                writer.skip("dropped")
            elif rank < ep_size:
                writer.record(step, own[rank], placement, ep_size=ep_size)
            else:
                own[rank] = 0
        if step not in (6, 7):
            by_rank = own.sum(axis=0).reshape(2, ep_size, -1)
            truth.T[step], truth.active[step] = by_rank.sum(axis=2), (by_rank > 0).sum(axis=2)
        if step != 6:
            truth.maps[step] = placement
    for writer in writers:
        writer.close()
    return truth
