"""Fit the coefficients of `eplb_analyze.metrics.kernel_times`, and print their errors as in docs/metrics.md.

    python -m benchmarks.kernel_times FOLDER

The folder holds the tables of ai-dynamo/aiconfigurator at 095f58a51 that :func:`rows_of` names. The rows of
uniform routing are fitted, and the errors are those of the rows of power-law routing. These were drawn at
random, and the draws are not published, so each is compared with the mean over draws of its distribution.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from eplb_analyze.metrics.kernel_times import DECODE, KERNELS, PREFILL, TILE, Kernel, KernelWork

EXPERTS, TOP_K, DRAWS = 256, 8, 30
TABLES = {DECODE: "generation", PREFILL: "context"}
#: With fewer tokens chance decides which experts they hit.
FEWEST = {DECODE: 64, PREFILL: 0}


class Row(NamedTuple):
    """A row of a table; ``work`` has a step for each draw."""

    ep_size: int
    tokens: int
    skew: str
    work: KernelWork
    ms: float


def draw(rng: np.random.Generator, tokens: int, exponent: float) -> Any:
    """Tokens of each expert [DRAWS, EXPERTS]; an expert can have every token once."""
    low, high = (x ** (1 - exponent) for x in ((1, 0.8 * tokens) if tokens * TOP_K > EXPERTS else (0.01, 2)))
    drawn = (low + (high - low) * rng.random((DRAWS, EXPERTS))) ** (1 / (1 - exponent))
    return np.minimum(np.round(drawn / drawn.sum(axis=1, keepdims=True) * tokens * TOP_K), tokens)


def rows_of(folder: Path, gpu: str, phase: str) -> list[Row]:
    rng, rows = np.random.default_rng(0), []
    for row in pq.read_table(
        folder / f"{gpu}_sxm_sglang_wideep_{TABLES[phase]}_moe_perf.parquet"
    ).to_pylist():
        tokens, ep_size, skew = row["num_tokens"], row["moe_ep_size"], row["distribution"]
        if skew == "uniform":
            each = tokens * TOP_K / EXPERTS
            # In prefill the uniform rows lack the tiles that an engine fills up.
            if phase == PREFILL and each < TILE and ep_size < EXPERTS:
                continue
            load = np.full((1, EXPERTS), max(1.0, each))
            # Fewer tokens than experts: some of each rank have one.
            load.reshape(ep_size, -1)[:, max(1, round(tokens * TOP_K / ep_size)) :] = 0
        else:
            load = draw(rng, tokens, float(skew.rpartition("_")[2]))
        rows.append(Row(ep_size, tokens, skew, KernelWork.of(load[:, np.newaxis], ep_size), row["latency"]))
    return rows


def times(kernel: Kernel, row: Row, passing: float) -> float:
    """``passing``: ms to pass over a token of any rank, in the benchmark of prefill only."""
    return float(row.work.times(kernel)[0].mean()) + passing * row.tokens


def fit(rows: list[Row], phase: str) -> tuple[Kernel, float]:
    """Least absolute logarithms, about: Gauss-Newton on the logarithms of the coefficients."""
    start = KERNELS["h100"][phase]
    theta = np.log([start.fixed, start.per_expert, start.per_token, start.floor or 1e-9, 8e-6])
    free = [0, 1, 2] if phase == DECODE else [0, 1, 2, 3, 4]

    def kernel(theta: Any) -> tuple[Kernel, float]:
        fixed, per_expert, per_token, floor, passing = np.exp(theta).tolist()
        if phase == DECODE:
            floor = passing = 0.0
        return Kernel(fixed, per_expert, per_token, floor, 0.0, start.max_tokens), passing

    def residuals(theta: Any) -> Any:
        own, passing = kernel(theta)
        return np.array([np.log(times(own, row, passing) / row.ms) for row in rows])

    def loss(r: Any) -> float:
        return float((np.sqrt(1 + (r / 0.05) ** 2) - 1).sum())

    damping = 1e-2
    for _ in range(100):
        r = residuals(theta)
        slope = np.array([(residuals(theta + 1e-4 * (np.arange(5) == i)) - r) / 1e-4 for i in free])
        weight = 1 / np.sqrt(1 + (r / 0.05) ** 2)
        gram = (slope * weight) @ slope.T
        step = -np.linalg.solve(gram + damping * np.diag(np.diag(gram) + 1e-9), slope @ (weight * r))
        trial = theta.copy()
        trial[free] += np.clip(step, -1, 1)
        better = loss(residuals(trial)) < loss(r)
        theta, damping = (trial, max(damping / 3, 1e-9)) if better else (theta, damping * 4)
        if damping > 1e6:
            break
    return kernel(theta)


def main(folder: Path) -> None:
    for gpu in KERNELS:
        for phase in (DECODE, PREFILL):
            rows = rows_of(folder, gpu, phase)
            uniform = {(row.ep_size, row.tokens): row for row in rows if row.skew == "uniform"}
            skewed = [row for row in rows if row.skew != "uniform" and row.tokens >= FEWEST[phase]]
            kernel, passing = fit(list(uniform.values()), phase)
            error = [abs(np.log(times(kernel, row, passing) / row.ms)) for row in skewed]
            ms = {(row.ep_size, row.tokens, row.skew): row.ms for row in skewed}
            twins = [
                abs(np.log(value / ms[ep_size, tokens, "power_law_1.02"]))
                for (ep_size, tokens, skew), value in ms.items()
                if skew == "power_law_1.01" and (ep_size, tokens, "power_law_1.02") in ms
            ]
            pairs = [(row, uniform[row[:2]]) for row in skewed if row[:2] in uniform]
            cost = [
                abs(times(kernel, row, 0) - times(kernel, even, 0) - (row.ms - even.ms)) / row.ms
                for row, even in pairs
            ]
            print(
                f"{gpu} {phase}: fixed {kernel.fixed:.4g}, per_expert {kernel.per_expert:.4g}, "
                f"per_token {kernel.per_token:.4g}, floor {kernel.floor:.4g}; passing {passing:.3g}"
            )
            print(
                "  error of the time, median and 90%: {:.1%}, {:.1%}".format(*np.quantile(error, [0.5, 0.9]))
            )
            print("  two rows of nearly equal skew: {:.1%}, {:.1%}".format(*np.quantile(twins, [0.5, 0.9])))
            within = np.quantile(cost, 0.95)
            print(f"  95% of costs are within {within:.1%} of the time; {len(skewed)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
