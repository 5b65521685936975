"""Training: once, in one process, before anything is served. No ranks here."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import LocalExperts
from .model import VOCABULARY, Batch, ModelConfig, MoeTransformer
from .text import TOPICS, Bytes, random_text

ROWS, LENGTH = 16, 96
LEARNING_RATE = 4e-3
# Weak on purpose. Without any, training starves most experts for good; at the usual strength little is left
# of the skew that every trained router has, and that this engine is here to show.
BALANCING_STRENGTH = 0.003


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights, on the CPU."""

    config: ModelConfig
    model: dict[str, Tensor]
    expert_weights: Tensor  # [moe_layers, num_logical_experts, 2, hidden, expert]

    def build(self, device: torch.device) -> tuple[MoeTransformer, LocalExperts]:
        """The model for serving, with all its experts in one place."""
        model, experts = MoeTransformer(self.config), self.config.local_experts()
        model.load_state_dict(self.model)
        experts.load_state_dict({"weights": self.expert_weights})
        return model.to(device).eval(), experts.to(device).eval()

    def save(self, path: Path) -> None:
        torch.save(
            {"config": asdict(self.config), "model": self.model, "expert_weights": self.expert_weights}, path
        )

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return cls(ModelConfig(**saved["config"]), saved["model"], saved["expert_weights"])


@dataclass(frozen=True)
class Trained:
    checkpoint: Checkpoint
    steps: int
    seconds: float
    bits_per_byte: float  # over the last steps


def train(
    config: ModelConfig,
    corpora: dict[str, Bytes],
    *,
    steps: int,
    seed: int,
    device: torch.device,
    max_seconds: float | None = None,
) -> Trained:
    """Train on both topics in equal parts. Deterministic on a CPU, unless `max_seconds` ends it early."""
    torch.set_num_threads(1)  # hardly slower for a model this small, and the same sums on every machine
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, experts = MoeTransformer(config).to(device), config.local_experts().to(device)
    parameters = [*model.parameters(), *experts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
    )
    positions = torch.arange(LENGTH, device=device).expand(ROWS, LENGTH)
    token_index = torch.arange(ROWS * LENGTH, device=device)
    losses: list[Tensor] = []
    start = time.monotonic()
    while len(losses) < steps and (max_seconds is None or time.monotonic() - start < max_seconds):
        rows = [random_text(corpora[TOPICS[row % len(TOPICS)]], LENGTH + 1, rng) for row in range(ROWS)]
        text = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        hidden = model(Batch(text[:, :-1], positions, token_index), experts)
        loss = F.cross_entropy(model.logits(hidden).reshape(-1, VOCABULARY), text[:, 1:].reshape(-1))
        balancing = torch.stack([router.balancing_loss for router in model.routers()]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss + BALANCING_STRENGTH * balancing)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-20:]).mean().item() if losses else float("nan")
    checkpoint = Checkpoint(
        config,
        {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        experts.weights.detach().cpu(),
    )
    return Trained(checkpoint, len(losses), time.monotonic() - start, last / float(np.log(2)))
