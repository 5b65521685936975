"""An engine whose step times, cost of imbalance and pauses are planted, recorded by the writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import PlantedClock
from helpers import open_writer

from eplb_analyze.policies import Problem, named, place

Array = np.ndarray[Any, Any]
LAYERS, EXPERTS, SLOTS, RANKS = 3, 16, 20, 4


@dataclass
class Planted:
    """What was recorded, for recomputation: loads by logical expert, placements and times of all steps."""

    logical: list[Array] = field(default_factory=list)
    placements: list[Array] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)


def record_engine(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int = 600,
    interval: int = 100,
    pause_ms: float = 0.0,
    lag: int = 0,
    per_token_ms: float = 0.0,
    per_expert_ms: float = 0.0,
    base_ms: float = 5.0,
    noise_ms: float = 0.05,
    drift: int = 10_000,
    tokens: int = 400,
    skew: float = 4.0,
    idle: float = 0.0,
    seed: int = 3,
    **options: Any,
) -> Planted:
    """Record an engine that rearranges every ``interval`` steps by the loads since the last time.

    A step takes ``base_ms`` and, for each layer, ``per_token_ms`` and ``per_expert_ms`` times the tokens and
    the active experts of the rank with most of them.

    Args:
        pause_ms: of each rearrangement, shared by its layers.
        lag: steps from one layer's change to the next one's; 0 is a synchronous engine.
        drift: the hot experts change every so many steps.
        idle: the share of steps before which the engine waits 50 ms for requests.
    """
    rng = np.random.default_rng(seed)
    clock, planted = PlantedClock(), Planted()
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    now = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1)).astype(np.int32)
    target, due, past = now, 0, []
    with open_writer(root, num_logical_experts=EXPERTS, ep_size=RANKS, scope="global", **options) as writer:
        for step in range(steps):
            if step % drift == 0:
                hot = rng.permuted(np.tile(np.where(np.arange(EXPERTS) < 4, skew, 1.0), (LAYERS, 1)), axis=1)
            if step and step % interval == 0:
                weight = np.sum(past[-interval:], axis=0)
                target, due = place(named("deepseek"), Problem(weight, SLOTS, RANKS, current=now)), step
            moved = [layer for layer in range(LAYERS) if due and step == due + lag * layer]
            before, now = now, np.stack([(target if i in moved else now)[i] for i in range(LAYERS)])
            if not np.array_equal(before, now):
                clock.ns += int(1e6 * pause_ms * len(moved) / LAYERS)
            # Skew varies from step to step, so that its cost can be told from the tokens'.
            share = hot ** rng.uniform(0.2, 1.2)
            share /= share.sum(axis=1, keepdims=True)
            count = int(tokens * rng.uniform(0.5, 1.5))
            logical = np.stack([rng.multinomial(count, row) for row in share])
            load = np.zeros((LAYERS, SLOTS), np.int64)
            for layer, expert in np.ndindex(LAYERS, EXPERTS):
                at = np.flatnonzero(now[layer] == expert)
                load[layer, at] = rng.multinomial(logical[layer, expert], [1 / len(at)] * len(at))
            by_rank = load.reshape(LAYERS, RANKS, -1)
            work = (per_token_ms * by_rank.sum(axis=2) + per_expert_ms * (by_rank > 0).sum(axis=2)).max(
                axis=1
            )
            ms = base_ms + float(work.sum()) + abs(float(rng.normal(0, noise_ms)))
            clock.ns += int(1e6 * (ms + 50 * (rng.random() < idle)))
            writer.record(step, load, now)
            past.append(logical)
            planted.logical.append(logical)
            planted.placements.append(now)
            planted.ms.append(ms)
            if step % 100 == 99:
                assert writer.flush(60)
    return planted


def slowest_work(
    logical: Array, placement: Array, per_token_ms: float, per_expert_ms: float, draws: int = 4
) -> float:
    """The mean time of the slowest ranks, ms, of one step's tokens dealt by numpy in ``draws`` ways."""
    rng = np.random.default_rng(11)
    total = 0.0
    for _ in range(draws):
        for tokens, slots in zip(logical, placement, strict=True):
            load = np.zeros(SLOTS)
            for expert, count in enumerate(tokens.tolist()):
                at = np.flatnonzero(slots == expert)
                load[at] = rng.multinomial(count, [1 / len(at)] * len(at))
            rank = load.reshape(RANKS, -1)
            work = per_token_ms * rank.sum(axis=1) + per_expert_ms * (rank > 0).sum(axis=1)
            total += float(work.max())
    return total / draws


def without_ms(document: Any) -> Any:
    """A document without the fit and what it prices: with steady times these are rounding errors."""
    if isinstance(document, list):
        return [without_ms(item) for item in document]
    if not isinstance(document, dict):
        return document
    fitted = {"cost", "gain_ms_per_step", "net_ms_per_step", "break_even_pause_ms"}
    return {key: without_ms(value) for key, value in document.items() if key not in fitted}
