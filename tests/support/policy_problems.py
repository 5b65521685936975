"""Loads, placements and shapes to try policies on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Experts, slots, ranks, nodes, groups. Where groups do not fit nodes or ranks, the policies are global.
SHAPES = [
    (12, 16, 8, 2, 4), (12, 12, 4, 2, 4), (64, 72, 8, 2, 8), (256, 288, 32, 4, 8), (6, 8, 2, 1, 1),
    (64, 64, 8, 1, 1), (60, 64, 4, 1, 4), (24, 24, 24, 2, 4), (8, 32, 8, 2, 4), (128, 160, 16, 4, 8),
    (40, 48, 4, 4, 4), (1, 4, 2, 1, 1), (128, 144, 16, 3, 8), (16, 32, 16, 2, 1),
]  # fmt: skip


def loads(rng: np.random.Generator, kind: int, layers: int, experts: int) -> Array:
    """Tokens ``[layers, experts]``: with ties, zeros, skew, or more than float32 holds exactly."""
    shape = (layers, experts)
    choices: list[Array] = [
        rng.integers(0, 3, shape),
        rng.integers(0, 40, shape),
        rng.lognormal(8, 1, shape).round().astype(np.int64),
        np.minimum(rng.zipf(1.5, shape), 10**9),
        rng.integers(0, 2**40, shape),
        2**24 * rng.integers(1, 3, shape) + rng.integers(0, 4, shape),
        rng.integers(1, 5, shape) * 997 * 12,
        rng.lognormal(3, 1, shape),
        # Groups with the same loads in another order: their sums differ only by rounding.
        rng.permuted(
            np.tile(rng.integers(2**20, 2**24, (layers, 1, 4)) * 1.1, (1, experts // 4 + 1, 1)), axis=2
        ).reshape(layers, -1)[:, :experts],
    ]
    return choices[kind]


#: The kinds of :func:`loads`.
KINDS = 9


def placements(rng: np.random.Generator, layers: int, experts: int, slots: int) -> Array:
    """Random placements ``[layers, slots]`` that hold every expert."""
    spare = slots - experts
    return np.stack(
        [rng.permutation(np.r_[np.arange(experts), rng.integers(0, experts, spare)]) for _ in range(layers)]
    ).astype(np.int32)
