"""Percentiles of values of which only a histogram is known, each with the most that it can be wrong."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64


class Approximate(NamedTuple):
    """The true value is at most ``error`` away from ``value``."""

    value: float
    error: float


def percentile(
    counts: npt.NDArray[np.integer], edges: Float64, q: float, low: float, high: float
) -> Approximate | None:
    """The percentile ``q`` of values as ``numpy.percentile`` interpolates it; None if there is no value.

    Args:
        counts: of values from ``edges[i]`` to ``edges[i + 1]``; values outside are in the first or last bin.
        low, high: no value is outside of these; infinite if that is not known.
    """
    total = int(counts.sum())
    if not total:
        return None
    before = np.cumsum(counts)
    rank = q / 100 * (total - 1)
    first, last = (int(np.searchsorted(before, r, side="right")) for r in (math.floor(rank), math.ceil(rank)))
    bottom = low if first == 0 else max(low, float(edges[first]))
    top = high if last == len(counts) - 1 else min(high, float(edges[last + 1]))
    if not math.isfinite(bottom) or not math.isfinite(top):
        return None  # it is beyond the histogram
    return Approximate((bottom + top) / 2, (top - bottom) / 2)
