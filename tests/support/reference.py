"""The formulas once more, written down plainly in loops: what the library is compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def per_step(name: str, T: Any) -> list[float]:
    """``T`` [steps, layers, ranks] to a value a step, NaN without an active layer."""
    return [_one_step(name, np.asarray(step, float)) for step in T]


def _one_step(name: str, T: Any) -> float:
    means = [sum(row) / len(row) for row in T.tolist()]
    maxima = [max(row) for row in T.tolist()]
    active = [i for i, m in enumerate(maxima) if m > 0]
    if not active:
        return math.nan
    if name == "balancedness":
        return sum(means[i] / maxima[i] for i in active) / len(active)
    if name == "imbalance":
        return sum(maxima[i] / means[i] for i in active) / len(active)
    if name == "trtllm":
        return sum(maxima[i] / means[i] - 1 for i in active) / len(active)
    if name == "vllm":
        return sum(means) / sum(maxima)
    if name == "sglang":
        return sum((m + 1e-5) / (x + 1e-5) for m, x in zip(means, maxima, strict=True)) / len(means)
    assert name == "vllm-legacy"
    columns = T.T.tolist()
    return sum(sum(c) / len(c) for c in columns) / sum(max(c) for c in columns)


def idle_fraction(T: Any) -> float:
    mean = sum(sum(row) / len(row) for step in T for row in np.asarray(step).tolist())
    maximum = sum(max(row) for step in T for row in np.asarray(step).tolist())
    return 1 - mean / maximum
