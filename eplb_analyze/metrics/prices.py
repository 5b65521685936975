"""What a difference between two placements is worth in milliseconds, by the fitted cost of work.

Step time has the term ``Σ_layers max_r`` of the ranks' work (:mod:`eplb_analyze.metrics.cost`), so the worth
is the price of that sum under one placement less that under the other, for the same tokens.

Arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, Ratio, standard_error
from eplb_analyze.metrics.cost import Rate


def worth(rates: Sequence[Rate], saved: Mapping[int, Ratio]) -> Interval | None:
    """ms per step; None if nothing has a price.

    Args:
        rates: those that explain the times of a phase, the best first.
        saved: for each exchange rate, the work that steps save, by step or by sums of steps.

    The interval is the union over the rates, each with what is uncertain of it and of the mean over steps.
    """
    found = [_worth(rate.ms, saved[rate.exchange]) for rate in rates]
    if not found:
        return None
    return Interval(found[0].value, min(one.low for one in found), max(one.high for one in found))


def _worth(price: Interval, saved: Ratio) -> Interval:
    mean = saved.value or 0.0
    half = 0.0
    if len(saved.numerator) >= MIN_STEPS:
        # To first order a ratio varies as the mean of this does.
        deviations = (saved.numerator - mean * saved.denominator) / saved.denominator.mean()
        half = 1.96 * standard_error(deviations)
    value = price.value * mean
    low, high = sorted((price.low * mean, price.high * mean))
    return Interval(
        value,
        value - float(np.hypot(value - low, price.high * half)),
        value + float(np.hypot(high - value, price.high * half)),
    )


def combined(parts: Sequence[tuple[float, Interval]]) -> Interval | None:
    """The sum of independent intervals, each times a weight, which can be negative; None of none."""
    if not parts:
        return None
    scaled = [(w * i.value, *sorted((w * i.low, w * i.high))) for w, i in parts]
    value = sum(v for v, _, _ in scaled)
    below, above = (
        float(np.sqrt(sum(side**2 for side in sides)))
        for sides in ([v - low for v, low, _ in scaled], [high - v for v, _, high in scaled])
    )
    return Interval(value, value - below, value + above)


def weighted(parts: Sequence[tuple[float, Interval]]) -> Interval | None:
    """The mean of independent intervals, each of so many steps; None of none."""
    steps = sum(count for count, _ in parts)
    return combined([(count / steps, interval) for count, interval in parts]) if steps else None
