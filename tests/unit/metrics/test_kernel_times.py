"""Kernel times next to rows of the published tables, copied from ai-dynamo/aiconfigurator at 095f58a51."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eplb_analyze.metrics.kernel_times import DECODE, KERNELS, PREFILL, TILE, KernelWork

EXPERTS, TOP_K = 256, 8
#: (GPU, phase, EP size, tokens of all ranks, exponent of the power law or None for uniform, ms): only the
#: uniform rows were fitted.
ROWS: list[tuple[str, str, int, int, float | None, float]] = [
    ("h100", DECODE, 4, 256, None, 1.048602),
    ("h100", DECODE, 32, 512, None, 0.152259),
    ("h100", DECODE, 32, 512, 1.2, 0.143038),
    ("h100", DECODE, 32, 4096, None, 0.161843),
    ("h100", DECODE, 32, 4096, 1.2, 0.315802),
    ("h100", DECODE, 256, 32768, None, 0.092486),
    ("h100", PREFILL, 8, 131072, None, 11.098514),
    ("h100", PREFILL, 8, 131072, 1.2, 20.835801),
    ("h100", PREFILL, 32, 131072, None, 3.646926),
    ("h100", PREFILL, 32, 131072, 0.6, 6.106986),
    ("h100", PREFILL, 32, 131072, 1.2, 14.830322),
    ("h200", DECODE, 32, 4096, None, 0.124192),
    ("h200", DECODE, 32, 4096, 1.01, 0.238367),
    ("h200", PREFILL, 32, 65536, None, 1.703223),
    ("h200", PREFILL, 32, 65536, 1.2, 5.918741),
    ("b200", DECODE, 32, 4096, None, 0.088192),
    ("b200", DECODE, 32, 4096, 1.01, 0.157206),
    ("b200", PREFILL, 32, 131072, None, 2.256553),
    ("b200", PREFILL, 32, 131072, 1.2, 7.238912),
]
#: In the prefill rows the rank also passes over every token of all ranks, ms each. Its cost does not depend
#: on skew, so it is no part of the product's coefficients.
PASS = {"h100": 8.08e-6, "h200": 6.69e-6, "b200": 5.34e-6}


def loads(tokens: int, exponent: float | None, draws: int = 40) -> Any:
    """Tokens of each expert ``[draws, 256]``: as the tables' authors draw them, up to rounding."""
    if exponent is None:
        return np.full((1, EXPERTS), tokens * TOP_K / EXPERTS)
    low, high = (x ** (1 - exponent) for x in (1, 0.8 * tokens))
    drawn = (low + (high - low) * np.random.default_rng(1).random((draws, EXPERTS))) ** (1 / (1 - exponent))
    return np.minimum(np.round(drawn / drawn.sum(axis=1, keepdims=True) * tokens * TOP_K), tokens)


@pytest.mark.parametrize(("gpu", "phase", "ep_size", "tokens", "exponent", "ms"), ROWS)
def test_time_of_the_slowest_rank_is_that_of_the_tables(
    gpu: str, phase: str, ep_size: int, tokens: int, exponent: float | None, ms: float
) -> None:
    work = KernelWork.of(loads(tokens, exponent)[:, np.newaxis], ep_size)
    slowest, balanced = work.times(KERNELS[gpu][phase])
    passed = PASS[gpu] * tokens if phase == PREFILL else 0.0
    assert slowest.mean() + passed == pytest.approx(ms, rel=0.16 if exponent else 0.1)
    if exponent is None:
        assert slowest == pytest.approx(balanced)


@pytest.mark.parametrize("gpu", KERNELS)
def test_what_skew_costs_is_that_of_the_tables(gpu: str) -> None:
    """A skewed row less the uniform row of as many tokens; the stated error holds for 95% of the rows."""
    uniform = {row[:4]: row[5] for row in ROWS if row[4] is None}
    for _, phase, ep_size, tokens, exponent, ms in (row for row in ROWS if row[0] == gpu and row[4]):
        skewed, even = (
            KernelWork.of(loads(tokens, own)[:, np.newaxis], ep_size).times(KERNELS[gpu][phase])[0].mean()
            for own in (exponent, None)
        )
        cost = ms - uniform[gpu, phase, ep_size, tokens]
        assert skewed - even == pytest.approx(cost, abs=1.25 * KERNELS[gpu][phase].error * ms)


def test_work_counts_active_experts_and_full_tiles() -> None:
    load = np.array([[[1, 0, 129, 256], [0, 0, 0, 0]]])
    work = KernelWork.of(load, 2)
    assert work.active.tolist() == [[[1, 2], [0, 0]]]
    assert work.tokens.tolist() == [[[TILE, 4 * TILE], [0, 0]]]
    halved = KernelWork.of(load * 2, 2, per_token=2)
    assert halved.tokens.tolist() == work.tokens.tolist()
    kernel = KERNELS["h100"][DECODE]

    def ms(active: float, tokens: float) -> float:
        return kernel.fixed + math.hypot(kernel.per_expert * active, kernel.per_token * tokens)

    slowest, balanced = work.times(kernel)
    assert slowest.tolist() == [pytest.approx(ms(2, 512))], "an idle layer takes no time"
    assert balanced.tolist() == [pytest.approx(ms(1.5, 320))]


def test_skew_never_saves_time_and_balance_costs_nothing() -> None:
    rng = np.random.default_rng(2)
    for kernels in KERNELS.values():
        for kernel in kernels.values():
            slowest, balanced = KernelWork.of(rng.integers(0, 3000, (50, 3, 64)), 8).times(kernel)
            assert (slowest >= balanced).all()
            even = KernelWork.of(np.full((1, 1, 64), 77), 8).times(kernel)
            assert even[0] == pytest.approx(even[1])
