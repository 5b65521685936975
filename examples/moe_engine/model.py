"""The model: a byte-level mixture-of-experts transformer. It knows no ranks and owns no experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import Experts, LocalExperts

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape. The first layer is dense, as in DeepSeek's models."""

    num_layers: int = 5
    num_dense_layers: int = 1
    hidden_size: int = 64
    num_heads: int = 4
    num_logical_experts: int = 16
    top_k: int = 2
    expert_size: int = 96
    max_length: int = 160

    @property
    def moe_layers(self) -> list[int]:
        """The MoE layers' numbers in the model; row i of a load tensor is layer `moe_layers[i]`."""
        return list(range(self.num_dense_layers, self.num_layers))

    def local_experts(self) -> LocalExperts:
        """Fresh experts for this model."""
        return LocalExperts(
            len(self.moe_layers), self.num_logical_experts, self.hidden_size, self.expert_size
        )


class KVCache:
    """Keys and values of the requests being answered, a row each."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device) -> None:
        head_size = config.hidden_size // config.num_heads
        shape = (config.num_layers, rows, config.max_length, config.num_heads, head_size)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)


@dataclass(frozen=True)
class Batch:
    """What one forward pass works on; without a cache, every request starts at its first token."""

    tokens: Tensor  # [requests, length], padded at the end
    positions: Tensor  # [requests, length]: each token's place in its request
    token_index: (
        Tensor  # [n]: the flat indices of the tokens that are no padding; only they reach the experts
    )
    cache: KVCache | None = None
    cache_rows: Tensor | None = None  # [requests]
    longest: int = 0  # the cached length that attention looks at: the longest request's


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key = rotate(query, batch.positions), rotate(key, batch.positions)
        mask = None  # without a cache: causal, which padding at the end cannot break
        if batch.cache is not None:
            keys, values = batch.cache.keys[self.layer], batch.cache.values[self.layer]
            rows = batch.cache_rows
            assert rows is not None
            keys[rows.unsqueeze(1), batch.positions] = key
            values[rows.unsqueeze(1), batch.positions] = value
            key, value = keys[rows, : batch.longest], values[rows, : batch.longest]
            # what padding leaves lies behind the request's last token, and is overwritten before it is seen
            seen = torch.arange(batch.longest, device=hidden.device) <= batch.positions.unsqueeze(-1)
            mask = seen.unsqueeze(1)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, is_causal=mask is None
        )
        output: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return output


def rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding: heads [requests, length, heads, size], positions [requests, length]."""
    half = heads.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=heads.device) / half)
    angles = positions[..., None, None] * frequencies
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Router(nn.Module):
    """Chooses top_k logical experts a token, and while training keeps the balancing loss of what it chose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Linear(config.hidden_size, config.num_logical_experts, bias=False)
        self.balancing_loss = torch.zeros(())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.gate(tokens)
        best, expert_ids = logits.topk(self.top_k, dim=-1)
        if self.training:  # as in Switch Transformers: experts * sum of (share of tokens * mean probability)
            share = expert_ids.flatten().bincount(minlength=logits.shape[1]) / expert_ids.numel()
            self.balancing_loss = logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum()
        return expert_ids, best.softmax(-1)


class Layer(nn.Module):
    """Attention, then either a dense feed-forward network or routed experts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm, self.experts_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(config, layer)
        self.moe_layer = layer - config.num_dense_layers
        self.router = Router(config) if self.moe_layer >= 0 else None
        if self.router is None:
            self.dense = nn.Sequential(nn.Linear(size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size))

    def forward(self, hidden: Tensor, batch: Batch, experts: Experts) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), batch)
        normed: Tensor = self.experts_norm(hidden)
        if self.router is None:
            dense: Tensor = self.dense(normed)
            return hidden + dense
        tokens = normed.flatten(0, 1)[batch.token_index]
        expert_ids, expert_weights = self.router(tokens)
        outputs = experts(self.moe_layer, tokens, expert_ids, expert_weights)
        scattered = torch.zeros_like(normed).flatten(0, 1).index_copy(0, batch.token_index, outputs)
        return hidden + scattered.view_as(hidden)


class MoeTransformer(nn.Module):
    """Everything but the experts: in the served model, the part that each rank has a full copy of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, batch: Batch, experts: Experts) -> Tensor:
        """The last hidden state of every token, [requests, length, hidden]."""
        hidden: Tensor = self.embedding(batch.tokens)
        for layer in self.layers:
            hidden = layer(hidden, batch, experts)
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next byte, [..., 256]."""
        return hidden @ self.embedding.weight.T

    def routers(self) -> list[Router]:
        """The router of each MoE layer."""
        return [module for module in self.modules() if isinstance(module, Router)]
