"""The newest complete steps of a live run: their times, and the work of the ranks that serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import session_info

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.live import recent_steps
from eplb_analyze.live.recent_steps import RecentSteps
from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import Terms
from eplb_analyze.reader.lost import reduced
from eplb_dump.format.journal import Shape

RANKS, LAYERS, SLOTS = 4, 2, 8
SHAPE = Shape(RANKS, LAYERS, SLOTS)


def news(first: int, count: int, *, seed: int = 0, replication: int = 1, **options: Any) -> CompleteSteps:
    """Steps that take 5 ms, and 0.02 ms for each token of each layer's slowest rank."""
    rng = np.random.default_rng(seed)
    load = rng.poisson(rng.integers(40, 80, size=(count, 1, 1)) * (1 + rng.random((count, LAYERS, SLOTS))))
    load[:, :, 6:] = 0  # rank 3 gets nothing
    by_rank = load.reshape(count, LAYERS, RANKS, -1).sum(axis=3)
    ms = 5 + 0.02 * by_rank.max(axis=2).sum(axis=1) * (1 + 0.01 * rng.normal(size=count))
    clock = 10**15 + first * 10**9 + np.cumsum(ms * 1e6).astype(np.int64)
    step, unknown = np.arange(first, first + count), np.full(count, np.nan)
    fields: dict[str, Any] = {
        "step": step,
        "time_ns": clock,
        "clock_ns": clock,
        "step_ms": unknown,
        "device_ms": unknown,
        "terms": Terms.of(by_rank),
        "load": load * replication,
        "rank_load": by_rank * replication,
        "phase": np.full(count, -1),
        "phases": [],
        "shape": SHAPE,
    }
    return CompleteSteps(**{**fields, **options})


def cost(*parts: CompleteSteps, changes: tuple[int, ...] = (), **info: Any) -> RunCost:
    recent = RecentSteps(session_info(ep_size=RANKS, **info))
    for part in parts:
        recent.add(part)
    return recent.cost([*changes])


def numbers(found: RunCost) -> tuple[Any, ...]:
    assert found.status is CostStatus.MEASURED
    return found.ms_per_step, found.share_of_step, found.steps_used


def halves(whole: CompleteSteps, at: int) -> tuple[CompleteSteps, CompleteSteps]:
    """The same steps as two batches."""
    names = ("step", "time_ns", "clock_ns", "step_ms", "device_ms", "load", "rank_load", "phase")
    first, second = (
        replace(
            whole,
            terms=whole.terms.select(np.arange(len(whole.step))[part]),
            **{name: getattr(whole, name)[part] for name in names},
        )
        for part in (slice(0, at), slice(at, None))
    )
    return first, second


def test_cost_does_not_depend_on_how_steps_arrive() -> None:
    whole = news(0, 400)
    expected = numbers(cost(whole))
    assert numbers(cost(*halves(whole, 150))) == expected
    twice = halves(whole, 150)
    assert numbers(cost(*twice, twice[0])) == expected  # too late: left out


def test_tokens_that_the_engine_counts_twice_cost_once() -> None:
    assert numbers(cost(news(0, 400, replication=2), token_replication=2)) == numbers(cost(news(0, 400)))


def test_ranks_that_are_lost_do_not_count() -> None:
    """Three ranks that serve are as an engine of three ranks."""
    three = news(0, 400)
    assert three.load is not None
    alone = replace(
        three, load=three.load[:, :, :6], rank_load=three.rank_load[:, :, :3], shape=Shape(3, LAYERS, 6)
    )
    lost = replace(three, shape=reduced(SHAPE, (3,)))
    assert numbers(cost(lost)) == numbers(cost(alone))
    assert numbers(cost(three)) != numbers(cost(alone))


def test_only_steps_with_known_experts_and_the_newest_shape_count() -> None:
    by_rank = replace(news(0, 400), load=None)
    assert cost(by_rank).status is CostStatus.NOT_IDENTIFIABLE
    other = replace(news(0, 400, seed=3), shape=Shape(2, LAYERS, SLOTS))
    newest = news(400, 400, seed=1)
    assert numbers(cost(other, newest)) == numbers(cost(newest))
    assert numbers(cost(by_rank, newest)) == numbers(cost(newest))


def test_time_of_the_engine_counts_before_the_clock() -> None:
    timed = news(0, 400)
    flat = replace(timed, step_ms=np.full(400, 7.0) + np.random.default_rng(1).normal(0, 0.01, 400))
    assert cost(flat).status is CostStatus.NO_MEASURABLE_COST


def test_step_beside_a_change_is_left_out() -> None:
    assert cost(news(0, 400), changes=(0, 200)).pauses == 3  # the first placement is no change


def test_few_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_steps, "KEPT_STEPS", 100)
    recent = RecentSteps(session_info(ep_size=RANKS))
    for first in range(0, 400, 20):
        recent.add(news(first, 20))
    step, ms, _ = recent.durations()
    assert step.tolist() == [*range(300, 400)]
    assert np.isfinite(ms[1:20]).all()
    assert np.isnan(ms[0])


def test_clock_that_goes_back_gives_no_duration() -> None:
    first, second = news(0, 10), news(10, 10)
    recent = RecentSteps(session_info(ep_size=RANKS))
    recent.add(first)
    recent.add(replace(second, clock_ns=second.clock_ns - 10**12))  # another host's clock
    _, ms, _ = recent.durations()
    assert np.flatnonzero(np.isnan(ms)).tolist() == [0, 10]
