"""What an expert computes, and all of them in one process. expert_parallel.py spreads them over ranks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(Protocol):
    """The experts of every MoE layer, wherever they are."""

    def __call__(self, moe_layer: int, tokens: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, [n, hidden].

        tokens [n, hidden]; expert_ids (logical) and expert_weights [n, top_k].
        """


class LocalExperts(nn.Module):
    """All experts here: for training, and as the reference that the served model is checked against.

    `weights` is [moe_layers, experts, 2, hidden, expert]: an expert's two matrices together, so that moving
    it moves one tensor.
    """

    def __init__(self, moe_layers: int, num_logical_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        up_down = torch.randn(moe_layers, num_logical_experts, 2, hidden_size, expert_size)
        up_down[:, :, 0] *= hidden_size**-0.5
        up_down[:, :, 1] *= expert_size**-0.5
        self.weights = nn.Parameter(up_down)

    def forward(self, moe_layer: int, tokens: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        chosen = expert_ids.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.weights.shape[1]).tolist()
        outputs = run_experts(self.weights[moe_layer], tokens[order // expert_ids.shape[1]], counts)
        return combine(unsort(outputs, order), expert_weights)


def run_experts(weights: Tensor, tokens: Tensor, counts: list[int]) -> Tensor:
    """Expert i on the i-th run of counts[i] tokens [n, hidden]; weights [experts, 2, hidden, expert]."""
    outputs = []
    # unbind, not indexing: the gradient of each index would be as large as all experts together
    for expert, chunk in zip(weights.unbind(0), torch.split(tokens, counts), strict=True):
        if len(chunk):
            outputs.append(F.silu(chunk @ expert[0]) @ expert[1].T)
    return torch.cat(outputs) if outputs else tokens.new_zeros(0, tokens.shape[1])


def unsort(rows: Tensor, order: Tensor) -> Tensor:
    """Undo `rows = original[order]`."""
    return rows[order.argsort()]


def combine(outputs: Tensor, expert_weights: Tensor) -> Tensor:
    """The weighted sum [n, hidden] of [n * top_k, hidden]: each token's outputs, one after the other."""
    per_choice = outputs.view(*expert_weights.shape, outputs.shape[1])
    return (per_choice * expert_weights.unsqueeze(-1)).sum(1)
