"""Confidence intervals of figures over steps, which are not independent: the circular block bootstrap.

A figure is a ratio of two sums over steps (a mean: its values over ones). Whole blocks of consecutive
steps are drawn, so that what one step says about the next stays in the sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_dump.format.frozen import frozen

Float64 = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2000
#: Fixed, so that the same dump always gives the same interval.
SEED = 39178
#: With fewer steps an interval is meaningless.
MIN_STEPS = 8
#: A difference below this is rounding.
ROUNDING = 1e-9


@frozen
class Ratio:
    """A figure by the terms of its steps: ``numerator.sum() / denominator.sum()``."""

    numerator: Float64
    denominator: Float64

    @classmethod
    def mean(cls, values: Float64) -> Ratio:
        return cls(values, np.ones(len(values)))

    @property
    def value(self) -> float | None:
        total = self.denominator.sum()
        return float(self.numerator.sum() / total) if total > 0 else None


@frozen
class Interval:
    #: The estimate.
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Float64) -> Interval:
        """The percentile interval of a figure, from its resampled values."""
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(value, float(low), float(high))

    @property
    def error(self) -> float:
        """The standard error, on the side of 0."""
        return (self.value - self.low if self.value > 0 else self.high - self.value) / 1.96

    @property
    def is_significant(self) -> bool:
        return self.low > ROUNDING or self.high < -ROUNDING


def autocorrelation(values: Float64) -> float:
    """ρ of lag 1, in 0 … 0.97, less the bias that n steps give it (Kendall 1954)."""
    centred = values - values.mean()
    variance = float(centred @ centred)
    rho = float(centred[1:] @ centred[:-1]) / variance if variance > 0 else 0.0
    return min(max(rho + (1 + 3 * rho) / len(values), 0.0), 0.97)


def correlation(before: Float64, after: Float64) -> float:
    """:func:`autocorrelation` by pairs of neighbors, of which the series may have lost some."""
    scale = float(np.sqrt((before @ before) * (after @ after)))
    rho = float(before @ after) / scale if scale > 0 else 0.0
    return min(max(rho + (1 + 3 * rho) / max(len(after), 1), 0.0), 0.97)


def block_length(n: int, rho: float) -> int:
    """Steps in a block: what is best for the mean of ``n`` steps of an AR(1) series.

    (6 ρ² n / (1 − ρ²)²)^(1/3), which is Politis and White 2004 with the moments of AR(1); at least
    n^(1/3), at most n / 4.
    """
    best = max(n, 6 * rho**2 * n / (1 - rho**2) ** 2) ** (1 / 3)
    return max(1, min(round(float(best)), n // 4))


def widening(n: int, rho: float, length: int) -> float:
    """By how much the spread of resampled figures is too small, known from theory.

    Blocks vary around their own mean, they are few (Student's t instead of the normal), and what
    correlates across their edges is lost.
    """
    blocks = n / length
    own_mean = 1 / (1 - 1 / blocks)
    few = 1 + (1.96**2 + 1) / 4 / (1.5 * blocks)
    edges = 1 / (1 - min(0.5, 2 * rho / ((1 - rho**2) * length)))
    return float(few * np.sqrt(own_mean * edges))


def resample(ratio: Ratio, rng: np.random.Generator) -> Float64:
    """The figure in ``RESAMPLES`` series drawn in blocks from its own: float64 ``[RESAMPLES]``."""
    n = len(ratio.numerator)
    value = ratio.numerator.sum() / ratio.denominator.sum()
    # To first order a ratio varies as the mean of this does.
    rho = autocorrelation(ratio.numerator - value * ratio.denominator)
    length = block_length(n, rho)
    starts = rng.integers(n, size=(RESAMPLES, -(-n // length)))

    def draw(values: Float64) -> Float64:
        if (values == 1).all():  # those of a mean
            return np.full(RESAMPLES, float(starts.shape[1] * length))
        sums: Float64 = _block_sums(values, length)[starts].sum(axis=1)
        return sums

    numerator, denominator = draw(ratio.numerator), draw(ratio.denominator)
    drawn = np.divide(numerator, denominator, out=np.full(RESAMPLES, value), where=denominator > 0)
    spread: Float64 = value + (drawn - value) * widening(n, rho, length)
    return spread


def standard_error(values: Float64) -> float:
    """Of the mean: the deviation of :func:`resample` without drawing, which is known exactly."""
    n, rho = len(values), autocorrelation(values)
    length = block_length(n, rho)
    sums = _block_sums(values, length)
    return float(sums.std() / np.sqrt(n * length)) * widening(n, rho, length)


def _block_sums(values: Float64, length: int) -> Float64:
    """The sum of the block that starts at each step, the end joined to the beginning."""
    total = np.cumsum(np.concatenate([[0.0], values, values[: length - 1]]))
    sums: Float64 = total[length:] - total[:-length]
    return sums


def share_saved(before: Float64, after: Float64, cost: float = 0.0) -> Interval | None:
    """The share of ``before`` that ``after`` saves, less a known ``cost``, step by step ``[n]``.

    Steps in which ``before`` is 0 do not count; None if fewer than ``MIN_STEPS`` do.
    """
    some = before > 0
    ratio = Ratio((before - after)[some], before[some])
    if ratio.value is None or len(ratio.numerator) < MIN_STEPS:
        return None
    return Interval.of(ratio.value - cost, resample(ratio, np.random.default_rng(SEED)) - cost)


def difference(a: Ratio, b: Ratio) -> Interval | None:
    """``b`` − ``a``, each resampled on its own; None if one has too few steps, or no tokens in them."""
    if min(len(a.numerator), len(b.numerator)) < MIN_STEPS or a.value is None or b.value is None:
        return None
    rng = np.random.default_rng(SEED)
    drawn = resample(a, rng), resample(b, rng)
    return Interval.of(b.value - a.value, drawn[1] - drawn[0])
