"""What placements are worth: intervals against planted prices and work."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.metrics.bootstrap import Interval, Ratio
from eplb_analyze.metrics.cost import Rate
from eplb_analyze.metrics.prices import combined, weighted, worth


@pytest.mark.parametrize("price", [0.0, 0.02])
@pytest.mark.parametrize("saved", [-3.0, 0.0, 5.0])
def test_interval_covers_the_planted_worth(price: float, saved: float) -> None:
    """The price is known to a standard error of 0.002, the work of a step varies by twice its mean."""
    rng, covered = np.random.default_rng(7), 0
    for _ in range(300):
        found = price + rng.normal(0, 0.002)
        rate = Rate(3, Interval(found, found - 1.96 * 0.002, found + 1.96 * 0.002))
        work = Ratio.mean(saved + rng.normal(0, 6, 400))
        result = worth([rate], {3: work})
        assert result is not None
        covered += result.low <= price * saved <= result.high
    assert covered >= 0.92 * 300


def test_worth_is_that_of_the_best_rate_and_the_interval_that_of_all() -> None:
    saved = {0: Ratio.mean(np.full(50, 2.0)), 5: Ratio.mean(np.full(50, -10.0))}
    rates = [Rate(0, Interval(0.1, 0.08, 0.13)), Rate(5, Interval(0.01, 0.0, 0.02))]
    found = worth(rates, saved)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.2, -0.2, 0.26))
    assert worth([], saved) is None


def test_sums_of_steps_give_the_worth_of_their_steps() -> None:
    """In a long run a sum holds several steps, and not as many each."""
    work, counts = np.arange(100.0), np.where(np.arange(100) % 3, 2.0, 4.0)
    rate = Rate(0, Interval(0.5, 0.5, 0.5))
    found = worth([rate], {0: Ratio(work * counts, counts)})
    assert found is not None
    assert found.value == pytest.approx(0.5 * np.average(work, weights=counts))


def test_independent_intervals_add_in_quadrature() -> None:
    one, other = Interval(1.0, 0.7, 1.3), Interval(2.0, 1.6, 2.4)
    both = combined([(1.0, one), (-1.0, other)])
    assert both is not None
    assert (both.value, both.low, both.high) == pytest.approx((-1.0, -1.5, -0.5))
    mean = weighted([(300, one), (100, other)])
    assert mean is not None
    assert mean.value == pytest.approx(1.25)
    assert mean.high - mean.value == pytest.approx(np.hypot(0.75 * 0.3, 0.25 * 0.4))
    assert combined([]) is weighted([]) is None
