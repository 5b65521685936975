"""Whether the intervals of the cost model cover costs that were planted in simulated step times.

    python -m benchmarks.cost [--runs 600] [--longest 20000]

Each run has its own shape, skew, noise and length. Of ``flat`` no cost may be measured in more than 5 % of
the runs; of the other kinds the 95 % intervals cover the planted cost in 90 to 98 %. The simulation shares
no code with the model. Its constants were chosen on seeds below 1,000, so the default seeds are others.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np

Array = Any
#: What an active expert and a token cost beside each other: the share of active experts in the cost.
KINDS = {"flat": None, "tokens": 0.0, "active": 1.0, "both": 0.5, "prefill": 0.0}


class Simulated(NamedTuple):
    """Steps of one phase: loads ``[n, layers, ranks, slots]`` summed to ``active`` and ``tokens``."""

    active: Array
    tokens: Array
    ms: Array
    #: The steps with a pause that the recording shows, bool.
    pauses: Array
    #: The mean cost of imbalance, ms per step.
    cost: float
    what: str


def simulate(seed: int, kind: str, longest: int = 20_000) -> Simulated:
    rng = np.random.default_rng(seed)
    n = int(np.exp(rng.uniform(np.log(300), np.log(longest))))
    layers, ranks, slots = int(rng.integers(3, 9)), int(rng.choice([4, 8, 16])), int(rng.choice([4, 8]))
    top_k = int(rng.choice([2, 4, 8]))
    active, tokens = _route(rng, n, (layers, ranks, slots), top_k, prefill=kind == "prefill")
    total = tokens.sum(axis=(1, 2)) / layers / top_k
    base = rng.uniform(2, 10) + rng.choice([0.0, 0.3, 1.0]) * total / total.mean()
    if rng.random() < 0.3:  # flat up to a number of tokens
        base += rng.uniform(0.5, 2) * np.maximum(0, total / np.quantile(total, rng.uniform(0.1, 0.9)) - 1)
    slowest, cost = np.zeros(n), np.zeros(n)
    share = KINDS[kind]
    if share is not None:
        parts = [values / max(_excess(values).mean(), 1e-9) for values in (active, tokens)]
        effort = share * parts[0] + (1 - share) * parts[1]
        effort *= base.mean() * np.exp(rng.uniform(np.log(0.003), np.log(0.2))) / _excess(effort).mean()
        slowest, cost = effort.max(axis=2).sum(axis=1), _excess(effort)
    rho, deviation = rng.choice([0.0, 0.5, 0.9]), rng.choice([0.01, 0.03, 0.1])
    ms = base + slowest
    ms += deviation * ms.mean() * _autocorrelated(rng, n, rho)
    gaps = rng.choice([0.0, 0.02, 0.15])
    waits = rng.random(n) < gaps
    ms[waits] += rng.exponential(10 * ms.mean(), waits.sum())
    pauses = rng.random(n) < rng.choice([0.0, 0.005])
    ms[pauses] += rng.uniform(20, 200)
    what = f"n={n} {layers}x{ranks}x{slots} rho={rho} noise={deviation} gaps={gaps}"
    return Simulated(active, tokens, np.maximum(ms, 0.01), pauses, float(cost.mean()), what)


def _route(
    rng: Any, n: int, shape: tuple[int, int, int], top_k: int, *, prefill: bool
) -> tuple[Array, Array]:
    """Active experts and tokens ``[n, layers, ranks]`` of a router whose skew drifts."""
    layers, ranks, slots = shape
    low, high = (1000, 8000) if prefill else (ranks * slots // 4, ranks * slots * 2)
    per_step = rng.integers(low, high, n) if rng.random() < 0.7 else np.full(n, (low + high) // 2)
    drift, skew = rng.choice([0.9, 0.99, 0.999]), rng.uniform(0.3, 1.2)
    logits = rng.normal(size=(layers, ranks * slots))
    active, tokens = np.empty((2, n, layers, ranks), np.int64)
    for step in range(n):
        logits = drift * logits + np.sqrt(1 - drift**2) * rng.normal(size=logits.shape)
        share = np.exp(skew * logits)
        share *= per_step[step] * top_k / share.sum(axis=1, keepdims=True)
        load = rng.poisson(share).reshape(shape)
        active[step], tokens[step] = (load > 0).sum(axis=2), load.sum(axis=2)
    return active, tokens


def _excess(effort: Array) -> Array:
    """The time that the mean rank waits for the slowest: ``[n]``."""
    return (effort.max(axis=2) - effort.mean(axis=2)).sum(axis=1)


def _autocorrelated(rng: Any, n: int, rho: float) -> Array:
    """A stationary AR(1) series of deviation 1."""
    values, last = np.empty(n), rng.normal()
    for i, new in enumerate(rng.normal(size=n)):
        last = values[i] = rho * last + np.sqrt(1 - rho**2) * new
    return values


def main() -> None:
    from eplb_analyze.metrics.cost import CostStatus, Work, fit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=20_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        known = covered = measured = 0
        widths, seconds = [], 0.0
        runs = arguments.runs // len(arguments.kinds)
        for seed in range(arguments.first_seed, arguments.first_seed + runs):
            some = simulate(seed, kind, arguments.longest)
            work = Work.of(some.active, some.tokens)
            start = time.perf_counter()
            found = fit(some.ms, work, some.pauses)
            seconds += time.perf_counter() - start
            measured += found.status is CostStatus.MEASURED
            if found.status is CostStatus.NOT_IDENTIFIABLE or found.ms_per_step is None:
                continue
            interval = found.ms_per_step
            known += 1
            covers = interval.low <= some.cost <= interval.high
            covered += covers
            widths.append((interval.high - interval.low) / some.ms.mean())
            if arguments.verbose and not covers:
                print(f"    {seed} {some.what} cost {some.cost:.4f} {interval} {found.rates}")
        print(
            f"  {kind:8s} {runs} runs, {known} identifiable: covered in {covered / known:6.1%}, measured in "
            f"{measured / runs:6.1%}, median width {np.median(widths):.2%} of a step; "
            f"{seconds / runs:.3f} s a fit",
            flush=True,
        )


if __name__ == "__main__":
    main()
