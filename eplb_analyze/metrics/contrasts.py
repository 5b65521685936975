"""Contrasts of neighboring windows of series, and what noise alone makes of them.

A contrast is the mean of the values from an index on, less the mean of those before it (MOSUM: Eichinger and
Kirch, arXiv 1509.06195). Noise is estimated robustly, and that of a contrast at its own length, so that
autocorrelation widens it.

Arrays in, arrays out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_analyze.metrics.formulas import Float64

#: Noise is estimated from about so many values of a series.
_SAMPLE = 2000
#: 1 / the median of the absolute value of a standard normal variable.
NORMAL = 1.4826

#: From so many values on, slow variation counts as noise; with fewer, much of it looks like changes of level.
SLOW_FROM = 600

#: How many values before and after an index are compared.
Windows = tuple[tuple[int, int], ...]


class SingleNoise(NamedTuple):
    """Standard deviations of single values of each series, float64 ``[series]`` each.

    Attributes:
        near: by the differences of neighbors, in which slow noise does not show.
        all: with slow noise.
        rho: the autocorrelation of neighbors, with white noise as the least.
    """

    near: Float64
    all: Float64
    rho: Float64

    @property
    def long_run(self) -> Float64:
        """As large as if values were independent and their long means as uncertain."""
        value: Float64 = self.all * np.sqrt((1 + self.rho) / (1 - self.rho))
        return value


def single_noise(values: Float64) -> SingleNoise:
    """The noise of each series ``[series, n]``, whatever changes of level it has in a small part."""
    n = values.shape[1]
    every = max(1, n // _SAMPLE)
    far = 30 if n >= SLOW_FROM else min(10, n // 4)
    near, distant = (
        NORMAL / np.sqrt(2) * np.median(np.abs(values[:, lag::every] - values[:, :-lag:every]), axis=1)
        for lag in (1, far)
    )
    single = np.maximum(near, distant)
    # The variance of a difference at lag k is 2 σ² (1 − ρ^k).
    ratio = np.divide(near, single, out=np.ones(len(single)), where=single > 0)
    return SingleNoise(near, single, np.clip(1 - ratio**2 - 0.1, 0, 0.97))


def contrast_noise(total: Float64, single: SingleNoise, windows: Windows) -> Float64:
    """The standard error of the contrasts of each series: float64 ``[windows, series]``.

    It is the larger of what is measured at its length and what autocorrelation of the first order makes of
    the noise of single values.

    Args:
        total: of :func:`cumulated`.
    """
    n = total.shape[1] - 1
    errors = np.empty((len(windows), len(total)))
    for i, (before, after) in enumerate(windows):
        own = single.all * np.sqrt(_mean_variance(before, single.rho) + _mean_variance(after, single.rho))
        if n >= 16 * (before + after):
            apart = max(1, min(before, after) // 2, n // _SAMPLE)
            measured = NORMAL * np.median(np.abs(contrasts(total, before, after, apart)), axis=1)
            own = np.maximum(own, measured)
        errors[i] = own
    return errors


def _mean_variance(n: int, rho: Float64) -> Float64:
    """The variance of the mean of n values of variance 1 and autocorrelation ρ^k at lag k."""
    variance: Float64 = ((1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2)) / n
    return variance


def cumulated(values: Float64) -> Float64:
    """The sums of the values before each index: float64 ``[series, n + 1]``."""
    total = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=total[:, 1:])
    return total


def contrasts(total: Float64, before: int, after: int, every: int = 1) -> Float64:
    """Mean of the ``after`` values from an index on - mean of the ``before`` values before it.

    Of each series, at every so many indices from ``before`` on.
    """
    n = total.shape[1]
    middle = total[:, before : n - after : every]
    later: Float64 = (total[:, before + after :: every] - middle) / after
    later -= (middle - total[:, : n - before - after : every]) / before
    return later
