"""Make a recording in which one expert becomes hot for a while: `python -m examples.incident DUMP_DIR`.

No model runs. Loads, step times and the clock are simulated; `ExpertLoadWriter` records them, in
DeepSeek-V3's shape. In layer 12, expert 77 has 11 times its usual load from step 1,000 on; at step 2,000 EPLB
gives it more replicas. docs/investigate/incident.md investigates the recording.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timezone
from typing import Any

import numpy as np

import eplb_dump.writer
from eplb_analyze.policies import Problem, named, place
from eplb_dump import ExpertLoadWriter

LAYERS = range(3, 61)  # the first three layers are dense
EXPERTS, SLOTS, RANKS, TOP_K = 256, 288, 32, 8
STEPS, WINDOW = 3000, 1000
HOT_LAYER, HOT_EXPERT, HOT_SINCE, REARRANGED = 12, 77, 1000, 2000
#: A decode step: a fixed time, and the time that the busiest rank of each layer needs for a token.
FIXED_MS, TOKEN_MS = 12.0, 2e-4
PAUSE_MS = 300  # of the rearrangement, to move weights


class SimulatedClock:
    """Replaces the writer's `time`: a simulated step takes no real time."""

    def __init__(self, start: datetime) -> None:
        self.ns = int(start.timestamp()) * 10**9

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns


def main(dump: str) -> None:
    rng = np.random.default_rng(1)
    clock = SimulatedClock(datetime(2026, 11, 18, 3, 2, 11, tzinfo=timezone.utc))
    eplb_dump.writer.time = clock  # type: ignore[attr-defined]
    weight = rng.lognormal(0, 0.05, (len(LAYERS), EXPERTS))
    placement = rebalanced(1e6 * weight, current=None)
    recent = np.zeros((len(LAYERS), EXPERTS), np.int64)
    with ExpertLoadWriter(
        dump,
        model="deepseek-ai/DeepSeek-V3",
        num_logical_experts=EXPERTS,
        ep_size=RANKS,
        scope="global",
        run_id="wed-deploy-42",
        moe_layers=LAYERS,
        ranks_per_node=8,
        engine="vllm",
        engine_version="0.33.0",
        engine_config={
            # vLLM rearranges for the first time after a quarter of the interval.
            "eplb_config": {"step_interval": 4 * REARRANGED, "window_size": WINDOW, "use_async": False},
            "num_expert_groups": 8,
            "num_nodes": 4,
        },
    ) as writer:
        for step in range(STEPS):
            if step == HOT_SINCE:
                weight[LAYERS.index(HOT_LAYER), HOT_EXPERT] *= 11
            if step == REARRANGED:
                placement = rebalanced(recent, current=placement)
                clock.ns += PAUSE_MS * 10**6
            tokens = int(rng.uniform(3500, 4700))
            load = route(rng, weight, placement, tokens * TOP_K)
            if REARRANGED - WINDOW <= step < REARRANGED:
                np.add.at(recent, (np.arange(len(LAYERS))[:, None], placement), load)
            busiest = load.reshape(len(LAYERS), RANKS, -1).sum(axis=2).max(axis=1)
            ms = (FIXED_MS + TOKEN_MS * busiest.sum()) * rng.normal(1, 0.01)
            clock.ns += int(1e6 * ms)
            writer.record(step, load, placement, num_tokens=tokens, phase="decode", step_ms=ms)
            if step % 100 == 99:
                writer.flush(60)
    print(f"recorded {writer.stats().recorded:,} steps into {dump}")


def rebalanced(loads: Any, current: Any) -> Any:
    """The placement that vLLM's EPLB makes of these loads."""
    problem = Problem(np.asarray(loads, np.int64), SLOTS, RANKS, num_nodes=4, num_groups=8, current=current)
    return place(named("vllm"), problem)


def route(rng: np.random.Generator, weight: Any, placement: Any, tokens: int) -> Any:
    """`[layers, slots]`: tokens choose experts in proportion to their weight, and any of its replicas."""
    layer = np.arange(len(placement))[:, None]
    replicas = np.zeros(weight.shape)
    np.add.at(replicas, (layer, placement), 1)
    share = (weight / replicas)[layer, placement]
    return rng.multinomial(tokens, share / share.sum(axis=1, keepdims=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dump", help="the folder to record into")
    main(parser.parse_args().dump)
