"""Percentiles of a histogram, next to those of the values that were counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.metrics.histograms import percentile
from eplb_dump.format.minutes import SCALES

VALUES = {"balancedness": (0.0, 1.0), "imbalance": (0.99, 500.0), "host_ms": (0.0, 3000.0)}


@pytest.mark.parametrize("name", SCALES)
@given(st.data(), st.sampled_from([0, 5, 50, 95, 100]))
def test_true_percentile_is_within_the_stated_error(name: str, data: st.DataObject, q: float) -> None:
    values = np.array(data.draw(st.lists(st.floats(*VALUES[name]), min_size=1, max_size=60)))
    scale = SCALES[name]
    counts, low, high = scale.histogram(values), float(values.min()), float(values.max())
    found = percentile(counts, scale.edges, q, low, high)
    assert found is not None
    assert abs(found.value - np.percentile(values, q)) <= found.error * (1 + 1e-9) + 1e-12


def test_percentile_beyond_the_histogram_is_not_known() -> None:
    scale = SCALES["host_ms"]
    counts = scale.histogram(np.array([1.0, 1.0, 5000.0, 6000.0]))
    assert percentile(counts, scale.edges, 95, 0.0, np.inf) is None
    low = percentile(counts, scale.edges, 5, 0.0, np.inf)
    assert low is not None
    assert low.error < 0.05
    assert percentile(np.zeros(200, np.int64), scale.edges, 50, 0.0, np.inf) is None
