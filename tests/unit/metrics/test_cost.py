"""The cost of imbalance in milliseconds, next to costs that were planted in simulated step times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import EXCHANGE_RATES, MIN_STEPS, CostStatus, Driver, Excess, Work, fit

LAYERS, RANKS, SLOTS, TOP_K = 6, 8, 8, 4
Array = Any


class Engine(NamedTuple):
    """A simulated engine: its work, and by a and b the times it takes."""

    active: Array
    tokens: Array
    noise: Array

    def times(self, a: float, b: float, noise: float = 0.05) -> tuple[Array, float]:
        """ms per step, and the mean cost of imbalance in them."""
        effort = a * self.active + b * self.tokens
        cost = effort.max(axis=2) - effort.mean(axis=2)
        ms = 5 + 0.002 * self.tokens.sum(axis=(1, 2)) / LAYERS / TOP_K + effort.max(axis=2).sum(axis=1)
        return ms + noise * ms.mean() * self.noise, float(cost.sum(axis=1).mean())

    @property
    def work(self) -> Work:
        return Work.of(self.active, self.tokens)


def engine(seed: int, steps: int = 600, correlated: float = 0.5, skew: float = 0.8) -> Engine:
    """Routing whose skew drifts, and noise of deviation 1 that correlates from step to step."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(LAYERS, RANKS * SLOTS))
    noise, active, tokens = np.zeros(steps), [], []
    for step in range(steps):
        logits = 0.95 * logits + np.sqrt(1 - 0.95**2) * rng.normal(size=logits.shape)
        share = np.exp(skew * logits)
        share /= share.sum(axis=1, keepdims=True)
        load = rng.poisson(share * rng.integers(32, 256) * TOP_K).reshape(LAYERS, RANKS, SLOTS)
        active.append((load > 0).sum(axis=2))
        tokens.append(load.sum(axis=2))
        noise[step] = correlated * noise[step - 1] + np.sqrt(1 - correlated**2) * rng.normal()
    return Engine(np.array(active), np.array(tokens), noise)


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    return [engine(seed) for seed in range(24)]


def test_work_is_that_of_each_layers_slowest_rank() -> None:
    some = engine(0, steps=5)
    work = some.work
    for k, rate in enumerate(EXCHANGE_RATES):
        for step in range(5):
            effort = 0.0
            for a, n in zip(some.active[step], some.tokens[step], strict=True):
                effort += max(n if rate == 0 else a if np.isinf(rate) else a + n / rate)
            assert work.slowest[step, k] == pytest.approx(effort)
    assert work.tokens == pytest.approx(some.tokens.sum(axis=(1, 2)) / RANKS)
    assert work.active == pytest.approx(some.active.sum(axis=(1, 2)) / RANKS)


def test_work_adds_up_over_layers() -> None:
    some = engine(1, steps=7)
    first, rest = (Work.of(some.active[:, part], some.tokens[:, part]) for part in (slice(2), slice(2, None)))
    for one, other in zip(first.plus(rest), some.work, strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.01), (0.06, 0.0), (0.05, 0.005)])
def test_interval_covers_the_planted_cost(engines: list[Engine], a: float, b: float) -> None:
    """24 intervals of 95%: fewer than 19 cover with a probability below 1 in 1,000."""
    covered = 0
    for some in engines:
        ms, truth = some.times(a, b)
        found = fit(ms, some.work).ms_per_step
        assert found is not None
        covered += found.low <= truth <= found.high
    assert covered >= 19


def test_no_cost_is_measured_where_there_is_none(engines: list[Engine]) -> None:
    """At most 5% are; 6 of 24 or more have a probability below 1 in 1,000."""
    found = [fit(some.times(0, 0)[0], some.work).status for some in engines]
    assert found.count(CostStatus.MEASURED) < 6


def test_a_large_cost_is_measured(engines: list[Engine]) -> None:
    for some in engines:
        ms, truth = some.times(0, 0.05, noise=0.02)
        found = fit(ms, some.work)
        assert found.status is CostStatus.MEASURED
        assert found.ms_per_step is not None
        assert found.ms_per_step.value == pytest.approx(truth, rel=0.25)
        assert found.r2 is not None
        assert found.r2 > 0.5


def test_idle_gaps_are_left_out(engines: list[Engine]) -> None:
    for some in engines[:6]:
        ms, truth = some.times(0, 0.05, noise=0.02)
        waits = np.arange(len(ms)) % 9 == 4
        found = fit(ms + 500 * waits, some.work)
        assert not found.used[waits].any()
        assert found.used.mean() > 0.8
        assert found.ms_per_step is not None
        assert found.ms_per_step.value == pytest.approx(truth, rel=0.25)


def test_excluded_steps_do_not_matter(engines: list[Engine]) -> None:
    some = engines[0]
    ms, _ = some.times(0, 0.05)
    excluded = np.arange(len(ms)) % 50 == 0
    other = np.where(excluded, ms * 3, ms)
    one, two = fit(ms, some.work, excluded), fit(other, some.work, excluded)
    assert one.ms_per_step == two.ms_per_step
    assert np.isnan(one.expected[excluded]).all()


def test_bent_time_of_tokens_is_not_a_cost_of_imbalance() -> None:
    """Time is flat up to a number of tokens and grows then, the same for every skew."""
    for seed in range(4):
        some = engine(seed)
        total = some.tokens.sum(axis=(1, 2)) / LAYERS / TOP_K
        ms = 5 + 0.05 * np.maximum(0, total - np.quantile(total, 2 / 3)) + 0.05 * some.noise
        found = fit(ms, some.work)
        assert found.ms_per_step is not None
        assert found.ms_per_step.low < 0.01 * ms.mean()


def test_without_times_nothing_is_identifiable() -> None:
    some = engine(0, steps=MIN_STEPS)
    found = fit(np.full(MIN_STEPS, np.nan), some.work)
    assert (found.status, found.ms_per_step) == (CostStatus.NOT_IDENTIFIABLE, None)
    assert found.reason == "the recording has no step times"


def test_few_steps_are_not_enough() -> None:
    some = engine(0, steps=MIN_STEPS)
    ms, _ = some.times(0, 0.05)
    ms[0] = np.nan
    assert fit(ms, some.work).status is CostStatus.NOT_IDENTIFIABLE
    assert "99 steps" in fit(ms, some.work).reason


def test_an_interval_stays_true_if_half_of_the_steps_waited() -> None:
    """They waited for requests, each as long as chance would have it."""
    some = engine(3)
    ms, truth = some.times(0, 0.05, noise=0.01)
    rng = np.random.default_rng(0)
    ms += np.where(rng.random(len(ms)) < 0.55, rng.exponential(200, len(ms)), 0)
    found = fit(ms, some.work).ms_per_step
    assert found is None or found.low <= truth <= found.high


def test_a_price_is_that_of_the_fitted_model(engines: list[Engine]) -> None:
    """All excess costs what imbalance costs; none costs nothing; half of it half."""
    for (a, b), some in zip([(0.0, 0.05), (0.2, 0.0), (0.2, 0.02)], engines, strict=False):
        cost, excess = fit(some.times(a, b, noise=0.01)[0], some.work), some.work.excess()
        assert cost.price(excess) == cost.ms_per_step
        assert cost.price(excess - excess) == Interval(0.0, 0.0, 0.0)
        half = cost.price(Excess(excess.effort / 2))
        assert half is not None
        assert cost.ms_per_step is not None
        assert half.value == pytest.approx(cost.ms_per_step.value / 2)
        gain = cost.price(Excess(excess.effort / 2) - excess)
        assert gain is not None
        assert gain.high < 0
    assert fit(np.full(600, np.nan), some.work).price(excess) is None


def test_driver_is_what_makes_steps_slow(engines: list[Engine]) -> None:
    for some in engines[:6]:
        for (a, b), driver in (((0.0, 0.05), Driver.TOKENS), ((0.5, 0.0), Driver.ACTIVE_EXPERTS)):
            assert fit(some.times(a, b, noise=0.002)[0], some.work).driver is driver
        assert fit(some.times(0, 0)[0], some.work).driver is None


def test_work_of_the_slowest_ranks_takes_no_longer_than_the_step(engines: list[Engine]) -> None:
    """If all experts are active in all steps, nothing but the step itself bounds the price of one."""
    for some in engines[:3]:
        full = Engine(np.full_like(some.active, SLOTS), some.tokens, some.noise)
        ms, truth = full.times(0.2, 0.05)
        cost = fit(ms, full.work)
        assert cost.mean_ms is not None
        for rate in cost.rates:
            assert rate.ms.high * full.work.slowest[cost.used, rate.exchange].mean() <= 1.001 * cost.mean_ms
        assert cost.ms_per_step is not None
        assert cost.ms_per_step.low <= truth <= cost.ms_per_step.high


@pytest.mark.parametrize("rate", EXCHANGE_RATES)
def test_cost_is_exact_without_noise(engines: list[Engine], rate: float) -> None:
    for some in engines[:3]:
        a, b = (0.0, 0.05) if rate == 0 else (0.2, 0.2 / rate)
        ms, truth = some.times(a, b, noise=0.0)
        found = fit(ms, some.work).ms_per_step
        assert found is not None
        assert found.value == pytest.approx(truth, rel=1e-3)


def test_work_that_saves_time_costs_nothing(engines: list[Engine]) -> None:
    """Times fall with the work of the slowest rank, which no engine does."""
    for some in engines[:3]:
        ms = 500 - some.times(0.5, 0.05, noise=0.0)[0] + 0.01 * some.noise
        found = fit(ms, some.work)
        assert found.status is CostStatus.NO_MEASURABLE_COST
        assert found.ms_per_step is not None
        assert found.ms_per_step.value == 0


def test_slow_drift_of_step_times_is_not_a_cost(engines: list[Engine]) -> None:
    """Step times grow by half over the run, as contexts do, while the skew drifts by chance."""
    for some in engines[:6]:
        ms = some.times(0, 0, noise=0.005)[0] * np.linspace(1, 1.5, len(some.noise))
        found = fit(ms, some.work).ms_per_step
        assert found is not None
        assert found.low < 0.01 * ms.mean()


@pytest.mark.parametrize("curve", [lambda u: u, lambda u: 1 - np.exp(-4 * u), np.square])
def test_drift_of_times_and_of_skew_together_is_not_a_cost(curve: Callable[[Array], Array]) -> None:
    """A device grows warm, or contexts grow, while the skew grows, too: both are curves over the run."""
    measured = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n = 800
        logits = rng.normal(size=(n, 3, 32)) * np.linspace(0.3, 1.2, n)[:, np.newaxis, np.newaxis]
        share = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
        load = rng.poisson(share * 4 * rng.integers(16, 64, n)[:, np.newaxis, np.newaxis]).reshape(n, 3, 4, 8)
        ms = 8 * (1 + 0.05 * curve(np.linspace(0, 1, n))) + 0.08 * rng.normal(size=n)
        measured += fit(ms, Work.of((load > 0).sum(axis=3), load.sum(axis=3))).status is CostStatus.MEASURED
    assert measured <= 2


def test_equal_steps_cannot_tell_what_imbalance_costs() -> None:
    """If imbalance never varies, no step time can be attributed to it."""
    some = engine(0)
    same = Engine(some.active[:1].repeat(400, axis=0), some.tokens[:1].repeat(400, axis=0), some.noise[:400])
    ms, _ = same.times(0, 0.05)
    assert fit(ms, same.work).status is not CostStatus.MEASURED
