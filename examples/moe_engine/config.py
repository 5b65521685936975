"""How the trained model is served. Its shape is model.py's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .model import ModelConfig
from .text import TOPICS


@dataclass(frozen=True)
class EngineConfig:
    """How the trained model is served; the same on every rank."""

    model: ModelConfig
    steps: int
    ep_size: int
    num_redundant_experts: int
    rearrange_every: int  # steps; 0 = never
    window: int  # the steps whose loads a rearrangement looks at
    seed: int
    device: str
    run_id: str
    dump: Path | None = None
    truth: Path | None = None
    kill_at: int | None = None  # the step at which rank 0 kills itself

    @property
    def num_physical_experts(self) -> int:
        return self.model.num_logical_experts + self.num_redundant_experts

    def topic(self, step: int) -> str:
        """What users ask about: the first half of the run code, then prose."""
        return TOPICS[0] if step < self.steps / 2 else TOPICS[1]
