"""Pauses planted in simulated step times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.pauses import Neighborhoods, mean_of, measure

Array = np.ndarray[Any, Any]


def simulated(
    seed: int, pause: float, *, layers: int = 1, apart: int = 0, idle: float = 0.0, rho: float = 0.0
) -> tuple[Array, Array, Array, Array]:
    """Steps of 8 ms, of which every sixth is a prefill of 30 ms; a rearrangement around step 300.

    No idle gap is beside a change: it could not be told from the pause.
    """
    rng = np.random.default_rng(seed)
    step, kind = np.arange(800), (np.arange(800) % 6 == 0).astype(np.int64)
    noise = rng.normal(0, 0.4, 800)
    for i in range(1, 800):
        noise[i] += rho * noise[i - 1]
    changed = 300 + apart * np.arange(layers)
    beside = np.isin(step, [changed - 1, changed, changed + 1])
    ms = np.where(kind == 1, 30.0, 8.0) + noise + 40 * ((rng.random(800) < idle) & ~beside)
    ms[changed] += pause / layers
    return step, ms, kind, changed


@pytest.mark.parametrize(
    ("layers", "apart", "idle"), [(1, 0, 0), (1, 0, 0.02), (12, 1, 0), (12, 9, 0), (40, 5, 0.02)]
)
def test_planted_pause_is_measured(layers: int, apart: int, idle: float) -> None:
    for seed in range(20):
        step, ms, kind, changed = simulated(seed, 900, layers=layers, apart=apart, idle=idle)
        found = measure(step, ms, kind, changed, changed)
        assert isinstance(found, Interval)
        assert found.value == pytest.approx(900, rel=0.05)


@pytest.mark.parametrize("rho", [0.0, 0.6])
@pytest.mark.parametrize(("pause", "layers", "apart"), [(0, 1, 0), (30, 1, 0), (120, 20, 4)])
def test_interval_covers_the_truth(pause: float, layers: int, apart: int, rho: float) -> None:
    covered = 0
    for seed in range(200):
        step, ms, kind, changed = simulated(seed, pause, layers=layers, apart=apart, rho=rho)
        found = measure(step, ms, kind, changed, changed)
        assert isinstance(found, Interval)
        covered += found.low <= pause <= found.high
    assert covered / 200 >= 0.9


def test_engine_that_records_when_a_step_begins_has_the_same_pause() -> None:
    step, ms, kind, changed = simulated(1, 900)
    late = measure(step, ms, np.roll(kind, -1), changed, changed)
    assert isinstance(late, Interval)
    assert late.value == pytest.approx(900, rel=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_steps_around_a_rearrangement_give_the_pause_that_all_steps_give(seed: int) -> None:
    step, ms, kind, first = simulated(seed, 90, layers=1 + seed % 3, apart=2)
    rng = np.random.default_rng(seed)
    ms[rng.random(len(ms)) < 0.1] = np.nan
    every = [np.array([5]), first, np.array([301 + 10 * seed]), np.array([797])]
    every = [changed for changed in every if not np.isnan(ms[changed]).any()]
    changes = np.unique(np.concatenate([*every, [550, 620]]))
    around = Neighborhoods(step, ms, kind, changes)
    for changed in every:
        assert around.measure(changed) == measure(step, ms, kind, changed, changes)


def test_pause_that_cannot_be_measured_says_why() -> None:
    step, ms, kind, changed = simulated(1, 900)
    ms[300] = np.nan
    assert "before or after it is missing" in str(measure(step, ms, kind, changed, changed))
    found = measure(step[297:303], np.ones(6), kind[:6], changed, changed)
    assert "8 are needed" in str(found)
    every = np.arange(0, 800, 3)  # all steps are beside some change
    assert "8 are needed" in str(measure(step, simulated(1, 900)[1], kind, changed, every))


@pytest.mark.parametrize("steps", [[], [10], [10, 11, 12]])
def test_pause_without_a_step_near_it_says_why(steps: list[int]) -> None:
    step, changed = np.array(steps, np.int64), np.array([1])
    around = Neighborhoods(step, np.full(len(step), np.nan), np.zeros(len(step), np.int64), changed)
    assert "before or after it is missing" in str(around.measure(changed))


def test_mean_pause_has_the_spread_of_pauses() -> None:
    assert mean_of([]) is None
    one = Interval(100.0, 90.0, 110.0)
    assert mean_of([one]) == one
    alike = mean_of([one] * 4)
    assert alike is not None
    assert (alike.value, alike.low, alike.high) == pytest.approx((100, 95, 105))
    apart = mean_of([Interval(50.0, 50.0, 50.0), Interval(150.0, 150.0, 150.0)])
    assert apart is not None
    assert apart.value == pytest.approx(100)
    assert apart.high - apart.value == pytest.approx(1.96 * np.std([50, 150], ddof=1) / np.sqrt(2))
