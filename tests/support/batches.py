"""Runs by the dozen, for `postmortem`: written in a moment, each with the truth of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eplb_dump import ExpertLoadWriter

LAYERS, EXPERTS, EP_SIZE = 2, 8, 4
EVEN, SKEWED = [1 / EXPERTS] * EXPERTS, [0.3, 0.3, *[0.4 / 6] * 6]


def record(
    root: Path,
    run_id: str,
    routing: list[float],
    *,
    steps: int = 60,
    seed: int = 0,
    local: bool = False,
    closed: bool = True,
    **options: Any,
) -> Any:
    """Tokens ``[steps, layers, ranks]`` of a run, which is written by one rank, or by four."""
    rng = np.random.default_rng(seed)
    loads = rng.multinomial(400, routing, size=(steps, LAYERS))
    defaults: dict[str, Any] = {"model": "org/moe", "num_logical_experts": EXPERTS, "ep_size": EP_SIZE}
    slots = np.array([range(EXPERTS)] * LAYERS)
    ranks = range(EP_SIZE) if local else range(1)
    for rank in ranks:
        opened = ExpertLoadWriter(
            root, run_id=run_id, ep_rank=rank, scope="local" if local else "global", **{**defaults, **options}
        )
        for step, load in enumerate(loads):
            part = load // len(ranks) + (rank < load % len(ranks))
            assert opened.record(step, part, slots) is None
            assert step % 100 or opened.flush(60)
        assert opened.flush(60)
        if closed:
            assert opened.close(60)
    return loads.reshape(steps, LAYERS, EP_SIZE, -1).sum(axis=3)
