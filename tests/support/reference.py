"""The formulas once more, written down plainly in loops: what the library is compared with."""

from __future__ import annotations

import math
from fractions import Fraction
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
    if name == "active-experts":  # of slots with a token in place of T
        return sum(maxima[i] for i in active) / len(active)
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


def waiting(T: Any) -> tuple[list[list[Fraction]], list[list[Fraction]]]:
    """How often each rank was the slowest of each layer, and the tokens that it cost, exactly.

    ``T`` of whole tokens, [steps, layers, ranks]; both results are [layers][ranks]. Ties are shared.
    """
    _, layers, ranks = np.asarray(T).shape
    often = [[Fraction(0)] * ranks for _ in range(layers)]
    cost = [[Fraction(0)] * ranks for _ in range(layers)]
    for step in np.asarray(T).astype(int).tolist():
        for layer, row in enumerate(step):
            top = [rank for rank, tokens in enumerate(row) if tokens == max(row)]
            if len(top) == ranks:  # nobody waits
                continue
            for rank in top:
                often[layer][rank] += Fraction(1, len(top))
                cost[layer][rank] += (max(row) - Fraction(sum(row), ranks)) / len(top)
    return often, cost
