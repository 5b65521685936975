"""What the benchmarks record: loads of DeepSeek-V3's shape, with known entropy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LAYERS, LOGICAL, SLOTS, EP_SIZE = 58, 256, 288, 32


def rates(seed: int = 0, tokens: float = 118.0, sigma: float = 0.5) -> Any:
    """Expected tokens of each slot: lognormal around ``tokens``, float64 [layers, slots]."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((LAYERS, SLOTS))
    return tokens * np.exp(sigma * normal - sigma**2 / 2)


def loads(steps: int, seed: int = 0, sigma: float = 0.5, tokens: float = 118.0) -> Any:
    """Poisson loads of the rates: int32 [steps, layers, slots]."""
    rng = np.random.default_rng(seed + 1)
    return rng.poisson(rates(seed, tokens, sigma), size=(steps, LAYERS, SLOTS)).astype(np.int32)


def entropy_bytes(seed: int = 0, sigma: float = 0.5, tokens: float = 118.0) -> float:
    """The entropy of one step's loads, their rates being known: no lossless code can be shorter."""
    table: dict[int, float] = {}

    def entropy(rate: float) -> float:
        key = round(rate * 4)
        if key not in table:
            rate = max(key / 4, 0.05)
            total, k = 0.0, 0
            while k < rate + 12 * math.sqrt(rate) + 30:
                log_p = -rate + k * math.log(rate) - math.lgamma(k + 1)
                total -= math.exp(log_p) * log_p
                k += 1
            table[key] = total / math.log(2)
        return table[key]

    return float(sum(entropy(r) for r in rates(seed, tokens, sigma).reshape(-1))) / 8


def placement() -> Any:
    """int64 [layers, slots]: every expert once, then the first ones again."""
    row = np.r_[np.arange(LOGICAL), np.arange(SLOTS - LOGICAL)]
    return np.tile(row, (LAYERS, 1))
