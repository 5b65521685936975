"""Series whose memory does not grow with a run."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.metrics import series
from eplb_analyze.metrics.series import BoundedSeries, sum_groups


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_are_added_in_pairs_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    monkeypatch.setattr(series, "MAX_SUMS", 4)
    values = np.arange(60.0).reshape(20, 3)
    kept = BoundedSeries.empty((0, 3) if axis == 0 else (3, 0), axis)
    for start in range(0, 20, 4):
        part = values[start : start + 4]
        kept.add(np.arange(100 + start, 104 + start), part if axis == 0 else part.T)
    sums = kept.sums if axis == 0 else kept.sums.T
    assert kept.steps.tolist() == [100, 104, 108, 112, 116]
    np.testing.assert_array_equal(sums, values.reshape(5, 4, 3).sum(axis=1))


def test_last_group_may_be_smaller() -> None:
    assert sum_groups(np.arange(7), 3).tolist() == [3, 12, 6]
