"""Batches of small runs for `postmortem`, each with its true tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from helpers import cli

from eplb_analyze.reader.run import PART_STEPS
from eplb_dump import ExpertLoadWriter

LAYERS, EXPERTS, EP_SIZE = 2, 8, 4
EVEN, SKEWED = [1 / EXPERTS] * EXPERTS, [0.3, 0.3, *[0.4 / 6] * 6]


def record(
    root: Path,
    run_id: str,
    routing: list[float],
    *,
    steps: int = 60,
    first_step: int = 0,
    seed: int = 0,
    local: bool = False,
    closed: bool = True,
    **options: Any,
) -> Any:
    """Write a run from one rank, or ``local`` from four; return its tokens ``[steps, layers, ranks]``."""
    rng = np.random.default_rng(seed)
    loads = rng.multinomial(400, routing, size=(steps, LAYERS))
    defaults: dict[str, Any] = {"model": "org/moe", "num_logical_experts": EXPERTS, "ep_size": EP_SIZE}
    slots = np.array([range(EXPERTS)] * LAYERS)
    ranks = range(EP_SIZE) if local else range(1)
    for rank in ranks:
        opened = ExpertLoadWriter(
            root, run_id=run_id, ep_rank=rank, scope="local" if local else "global", **{**defaults, **options}
        )
        for step, load in enumerate(loads, first_step):
            part = load // len(ranks) + (rank < load % len(ranks))
            opened.record(step, part, slots)
            assert step % 100 or opened.flush(60)
        assert opened.flush(60)
        if closed:
            assert opened.close(60)
    return loads.reshape(steps, LAYERS, EP_SIZE, -1).sum(axis=3)


class Batch(NamedTuple):
    root: Path
    #: Tokens ``[steps, layers, ranks]`` of the runs that can be read, by id.
    truth: dict[str, Any]


def record_batch(root: Path) -> Batch:
    """Dumps at different depths: skewed, even, of four ranks, incomplete, long, broken and empty."""
    truth = {
        "bad": record(root / "a/dump", "bad", SKEWED, engine="vllm", engine_config={"eplb": {"window": 9}}),
        "good": record(root / "a/dump", "good", EVEN, seed=1, engine="vllm", segment_steps=16),
        "ranks": record(root / "b", "ranks", SKEWED, seed=2, local=True, engine="sglang"),
        "torn": record(root / "c/d/e", "torn", SKEWED, seed=3, model="other", segment_steps=16),
        "long": record(root / "long", "long", SKEWED, seed=4, steps=PART_STEPS + 3000),
    }
    damaged = sorted((root / "c/d/e").rglob("loads-*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    record(root / "f", "broken", EVEN)
    lose_metadata(root / "f", "{")
    (root / "empty").mkdir()
    return Batch(root, truth)


def lose_metadata(dump: Path, content: str | None) -> None:
    """Damage ``session.json``, which gets this content or goes, and all files that repeat it."""
    session = next(dump.rglob("session.json"))
    for path in session.parent.iterdir():
        path.write_bytes(b"damaged")
    session.unlink() if content is None else session.write_text(content)


def postmortem(root: Path, *more: str | Path) -> dict[str, Any]:
    """The JSON document of `postmortem`."""
    out = cli("postmortem", root, "--json", *more)
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    return found
