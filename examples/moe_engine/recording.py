"""What a rank keeps of each step: with eplb_dump's writer, and for tests as plain arrays. No engine here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .config import EngineConfig
from .errors import EngineError

if TYPE_CHECKING:
    from eplb_dump import ExpertLoadWriter


@dataclass(frozen=True)
class Step:
    """One forward pass of one rank."""

    number: int
    load: Tensor  # int32 [moe_layers, num_physical_experts]; the engine's own, which the next step overwrites
    physical_to_logical_map: Tensor  # [moe_layers, num_physical_experts]
    num_tokens: int
    phase: str | None  # None: a dummy step, without a request of this rank
    topic: str


class Recording:
    """One rank's recording; does nothing where neither kind was asked for."""

    def __init__(self, config: EngineConfig, ep_rank: int) -> None:
        self.writer = _open_writer(config.dump, config, ep_rank) if config.dump else None
        self.truth = Truth(config.truth / f"rank-{ep_rank:05d}.npz") if config.truth else None

    def add(self, step: Step) -> None:
        if self.writer:
            if step.phase is None:
                self.writer.skip(reason="dummy", step=step.number)
            else:
                self.writer.record(
                    step.number,
                    step.load,
                    step.physical_to_logical_map,
                    num_tokens=step.num_tokens,
                    phase=step.phase,
                )
        if self.truth:
            self.truth.add(step)

    def close(self) -> str | None:
        """Flush everything to disk. Returns the writer's summary, None if nothing was recorded."""
        if self.truth:
            self.truth.save()
        if not self.writer:
            return None
        self.writer.close()
        stats = self.writer.stats()
        if stats.off:
            return f"recording stopped: {stats.off}"
        return (
            f"recorded run {self.writer.info.run_id}, rank {self.writer.info.ep_rank}: "
            f"{stats.recorded} steps, {stats.dummy} dummy, {stats.dropped} dropped, {stats.rejected} rejected"
        )


class Truth:
    """Every step of a rank as it was, in memory until the end: what a recording must agree with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.steps.append(replace(step, load=step.load.cpu().clone()))

    def save(self) -> None:
        """Arrays of [steps], expert_load and physical_to_logical_map [steps, moe_layers, slots]."""
        if not self.steps:
            return
        placements = torch.stack([step.physical_to_logical_map for step in self.steps])
        np.savez_compressed(
            self.path,
            expert_load=torch.stack([step.load for step in self.steps]).numpy(),
            physical_to_logical_map=placements.cpu().numpy(),
            num_tokens=np.array([step.num_tokens for step in self.steps]),
            phase=np.array([step.phase or "" for step in self.steps]),
            dummy=np.array([step.phase is None for step in self.steps]),
            topic=np.array([step.topic for step in self.steps]),
        )


def _open_writer(folder: Path, config: EngineConfig, ep_rank: int) -> ExpertLoadWriter:
    try:
        from eplb_dump import ExpertLoadWriter
    except ImportError as error:
        raise EngineError(f"--dump needs the package eplb-dump: {error}") from None
    try:
        return ExpertLoadWriter(
            folder,
            model="tiny-moe",
            num_logical_experts=config.model.num_logical_experts,
            ep_size=config.ep_size,
            ep_rank=ep_rank,
            scope="local",  # each rank hands over what it routed itself: no collective for the recording
            run_id=config.run_id,
            engine="moe_engine",
            engine_config={
                "rearrange_every": config.rearrange_every,
                "window": config.window,
                "num_redundant_experts": config.num_redundant_experts,
                "device": config.device,
                "seed": config.seed,
            },
            ranks_per_node=2,
            moe_layers=config.model.moe_layers,
        )
    except (TypeError, ValueError) as error:  # a --run-id with a blank in it, say
        raise EngineError(str(error)) from None
