"""Runs with planted step times, and what imbalance cost in them, by plain sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from eplb_dump import ExpertLoadWriter, writer

LAYERS, RANKS, SLOTS = 2, 4, 8


class TimedRun(NamedTuple):
    root: Path
    #: The duration of each step, and what imbalance costs in it, ms.
    ms: Any
    cost: Any
    #: Tokens ``[steps, layers, ranks]``.
    tokens: Any


def write_timed(
    root: Path,
    price: float,
    *,
    steps: int = 400,
    seed: int = 0,
    skew: float = 1.0,
    phases: tuple[str, ...] = (),
    slow: dict[str, float] | None = None,
    first: int = 0,
    **options: Any,
) -> TimedRun:
    """A step takes 5 ms, ``price`` ms for each token of each layer's slowest rank, and 1% noise.

    Args:
        skew: how much hotter than others the rank is that is hot in a step, at most.
        phases: of steps, in turn; a phase in ``slow`` takes so many ms more.
        first: the number of the first step.
    """
    rng = np.random.default_rng(seed)
    weights = np.ones((steps, LAYERS, RANKS))
    hot = rng.integers(RANKS, size=(steps, LAYERS, 1))
    np.put_along_axis(weights, hot, 1 + skew * rng.random((steps, LAYERS, 1)), axis=2)
    mean = rng.integers(40, 80, size=(steps, 1, 1)) * np.repeat(weights, SLOTS // RANKS, axis=2)
    loads = rng.poisson(mean)
    tokens = loads.reshape(steps, LAYERS, RANKS, -1).sum(axis=3)
    names = [phases[step % len(phases)] if phases else None for step in range(steps)]
    ms = 5 + price * tokens.max(axis=2).sum(axis=1) + [(slow or {}).get(name or "", 0.0) for name in names]
    ms *= 1 + 0.01 * rng.normal(size=steps)
    cost = price * (tokens.max(axis=2) - tokens.mean(axis=2)).sum(axis=1)
    ends = (10**12 + np.cumsum(ms) * 1e6).astype(np.int64)
    defaults: dict[str, Any] = {"model": "m", "num_logical_experts": SLOTS, "ep_size": RANKS, "run_id": "r"}
    placement = np.tile(np.arange(SLOTS), (LAYERS, 1))
    with (
        mock.patch.object(writer.time, "monotonic_ns", return_value=10**12) as clock,
        ExpertLoadWriter(root, scope="global", **{**defaults, **options}) as opened,
    ):
        for step, load in enumerate(loads):
            clock.return_value = int(ends[step])
            opened.record(first + step, load, placement, phase=names[step])
            assert step % 100 or opened.flush(60)
    return TimedRun(root, ms, cost, tokens)
