"""Whether the intervals of the cost model cover costs that were planted in simulated step times.

    python -m benchmarks.cost [--runs 600] [--recordings 60]

Each run has its own shape, skew, noise and length. Of ``flat`` no cost may be measured in more than 5% of
the runs; of the other kinds the 95% intervals cover the planted cost in 90 to 98%. The simulation shares
no code with the model. Its constants were chosen on seeds below 1,000, so the default seeds are others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eplb_analyze import open_run
from eplb_analyze.analysis.cost import cost_of
from eplb_analyze.metrics.cost import Work, fit
from eplb_dump import ExpertLoadWriter

Array = Any
#: The model's constants were chosen on smaller seeds.
FIRST_SEED = 1000
LONGEST = 20_000
#: The share of active experts in the cost of a decode step; None: imbalance costs nothing.
KINDS = {"flat": None, "tokens": 0.0, "active": 1.0, "both": 0.5, "prefill": 0.0, "mixed": 1.0}


class Simulated(NamedTuple):
    """The steps of a run, ``[n, ...]``."""

    loads: Array
    ms: Array
    #: The phase of each step, and by phase the mean cost of imbalance, ms per step.
    phase: Array
    cost: dict[str, float]
    #: The steps with a pause that the recording shows.
    pauses: Array
    what: str

    @property
    def active(self) -> Array:
        return (self.loads > 0).sum(axis=3)

    @property
    def tokens(self) -> Array:
        return self.loads.sum(axis=3, dtype=np.int64)


def simulate(seed: int, kind: str, longest: int = LONGEST) -> Simulated:
    rng = np.random.default_rng(seed)
    n = int(np.exp(rng.uniform(np.log(300), np.log(longest))))
    layers, ranks, slots = int(rng.integers(3, 9)), int(rng.choice([4, 8, 16])), int(rng.choice([4, 8]))
    prefill = rng.random(n) < {"prefill": 1.0, "mixed": 0.4}.get(kind, 0.0)
    phase = np.where(prefill, "prefill", "decode")
    loads = _route(rng, prefill, (layers, ranks, slots), top_k := int(rng.choice([2, 4, 8])))
    active, tokens = (loads > 0).sum(axis=3), loads.sum(axis=3, dtype=np.int64)
    ms, costs = np.empty(n), {}
    for name in sorted({*phase}):
        steps = phase == name
        share = 0.0 if name == "prefill" else KINDS[kind]
        ms[steps], costs[name] = _times(rng, active[steps], tokens[steps], top_k, share)
    rho, deviation = rng.choice([0.0, 0.5, 0.9]), rng.choice([0.01, 0.03, 0.1])
    ms *= 1 + deviation * _autocorrelated(rng, n, rho)
    gaps = rng.choice([0.0, 0.02, 0.15])
    waits = rng.random(n) < gaps
    ms[waits] += rng.exponential(10 * ms.mean(), waits.sum())
    pauses = rng.random(n) < rng.choice([0.0, 0.005])
    ms[pauses] += rng.uniform(20, 200)
    what = f"n={n} {layers}x{ranks}x{slots} rho={rho} noise={deviation} gaps={gaps}"
    return Simulated(loads, np.maximum(ms, 0.01), phase, costs, pauses, what)


def _times(rng: Any, active: Array, tokens: Array, top_k: int, share: float | None) -> tuple[Array, float]:
    """ms of each step without noise, and the mean cost of imbalance.

    Args:
        share: of active experts in that cost; None: it is 0.
    """
    total = tokens.sum(axis=(1, 2)) / tokens.shape[1] / top_k
    base = rng.uniform(2, 10) + rng.choice([0.0, 0.3, 1.0]) * total / total.mean()
    if rng.random() < 0.3:  # flat up to a number of tokens
        base += rng.uniform(0.5, 2) * np.maximum(0, total / np.quantile(total, rng.uniform(0.1, 0.9)) - 1)
    if share is None:
        return base, 0.0
    parts = [values / max(_excess(values).mean(), 1e-9) for values in (active, tokens)]
    effort = share * parts[0] + (1 - share) * parts[1]
    effort *= base.mean() * np.exp(rng.uniform(np.log(0.003), np.log(0.2))) / _excess(effort).mean()
    return base + effort.max(axis=2).sum(axis=1), float(_excess(effort).mean())


def _route(rng: Any, prefill: Array, shape: tuple[int, int, int], top_k: int) -> Array:
    """Loads ``[n, layers, ranks, slots]`` of a router whose skew drifts."""
    n, (layers, ranks, slots) = len(prefill), shape
    low, high = ranks * slots // 4, ranks * slots * 2
    per_step = np.where(prefill, rng.integers(1000, 8000, n), rng.integers(low, high, n))
    if rng.random() < 0.3:
        per_step = np.where(prefill, 4000, (low + high) // 2)
    drift, skew = rng.choice([0.9, 0.99, 0.999]), rng.uniform(0.3, 1.2)
    logits = rng.normal(size=(layers, ranks * slots))
    loads = np.empty((n, *shape), np.uint16)
    for step in range(n):
        logits = drift * logits + np.sqrt(1 - drift**2) * rng.normal(size=logits.shape)
        share = np.exp(skew * logits)
        share *= per_step[step] * top_k / share.sum(axis=1, keepdims=True)
        loads[step] = rng.poisson(share).reshape(shape)
    return loads


def _excess(effort: Array) -> Array:
    """The time that the mean rank waits for the slowest: ``[n]``."""
    return (effort.max(axis=2) - effort.mean(axis=2)).sum(axis=1)


def _autocorrelated(rng: Any, n: int, rho: float) -> Array:
    """A stationary AR(1) series of deviation 1."""
    values, last = np.empty(n), rng.normal()
    for i, new in enumerate(rng.normal(size=n)):
        last = values[i] = rho * last + np.sqrt(1 - rho**2) * new
    return values


class Tally:
    """What was found of one kind."""

    def __init__(self) -> None:
        self.phases = self.known = self.covered = self.measured = 0
        self.widths: list[float] = []
        self.seconds = 0.0

    def add(self, status: str, bounds: tuple[float, float] | None, some: Simulated, phase: str) -> bool:
        """Whether the interval covers the planted cost, or there is none."""
        self.phases += 1
        self.measured += status == "measured"
        if status == "not_identifiable" or bounds is None:
            return True
        covers = bounds[0] <= some.cost[phase] <= bounds[1]
        self.known += 1
        self.covered += covers
        self.widths.append((bounds[1] - bounds[0]) / some.ms[some.phase == phase].mean())
        return covers

    def __str__(self) -> str:
        return (
            f"{self.phases} phases, {self.known} identifiable: covered in {self.covered / self.known:6.1%}, "
            f"measured in {self.measured / self.phases:6.1%}, median width {np.median(self.widths):.2%} of a "
            f"step; {self.seconds / self.phases:.3f} s each"
        )


def fitted(some: Simulated) -> dict[str, tuple[str, tuple[float, float] | None]]:
    """Status and interval by phase, from the model itself."""
    found = {}
    for phase in some.cost:
        steps = some.phase == phase
        work = Work.of(some.active[steps], some.tokens[steps])
        cost = fit(some.ms[steps], work, some.pauses[steps])
        interval = cost.ms_per_step
        found[phase] = cost.status.value, None if interval is None else (interval.low, interval.high)
    return found


def recorded(some: Simulated) -> dict[str, tuple[str, tuple[float, float] | None]]:
    """The same from a recording; a step with a pause changes the placement."""
    layers, slots = some.loads.shape[1], some.loads.shape[2] * some.loads.shape[3]
    placement = np.tile(np.arange(slots), (layers, 1))
    with tempfile.TemporaryDirectory() as folder:
        with ExpertLoadWriter(
            folder, model="m", num_logical_experts=slots, ep_size=some.loads.shape[2], scope="global"
        ) as writer:
            for step, load in enumerate(some.loads):
                if some.pauses[step]:
                    placement = np.roll(placement, 1, axis=1)
                phase, ms = str(some.phase[step]), float(some.ms[step])
                writer.record(step, load.reshape(layers, slots), placement, phase=phase, step_ms=ms)
                if step % 100 == 99:
                    assert writer.flush(60)
        found = cost_of(open_run(folder)).phases
    return {
        name: (phase.status.value, phase.ms_per_step and (phase.ms_per_step.low, phase.ms_per_step.high))
        for name, phase in found.items()
    }


def evaluate(
    name: str,
    find: Callable[[Simulated], dict[str, tuple[str, tuple[float, float] | None]]],
    kinds: Sequence[str] = tuple(KINDS),
    runs: int = 600,
    first: int = FIRST_SEED,
    longest: int = LONGEST,
    verbose: bool = False,
) -> dict[str, Tally]:
    """What was found, by kind of cost."""
    tallies = {}
    for kind in kinds:
        tally = tallies[kind] = Tally()
        for seed in range(first, first + runs // len(kinds)):
            some = simulate(seed, kind, longest)
            start = time.perf_counter()
            found = find(some)
            tally.seconds += time.perf_counter() - start
            for phase, (status, bounds) in found.items():
                if not tally.add(status, bounds, some, phase) and verbose:
                    print(f"    {seed} {some.what} {phase}: {some.cost[phase]:.4f}, found {bounds}")
        print(f"  {name:8s} {kind:8s} {tally}", flush=True)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=600, help="how many are fitted")
    parser.add_argument("--recordings", type=int, default=0, help="how many are recorded and read")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--verbose", action="store_true", help="print the runs whose cost is not covered")
    arguments = parser.parse_args()
    how = arguments.first_seed, arguments.longest, arguments.verbose
    if arguments.runs:
        evaluate("fitted", fitted, arguments.kinds, arguments.runs, *how)
    if arguments.recordings:
        evaluate("recorded", recorded, arguments.kinds, arguments.recordings, *how)


if __name__ == "__main__":
    main()
