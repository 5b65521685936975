"""The placement history of a layer."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.reader.placements import LayerHistory
from eplb_dump.format.journal import Int32

FIRST, SECOND = np.array([0, 1], np.int32), np.array([1, 0], np.int32)
COMPLETE = [(0, FIRST), (10, SECOND), (20, FIRST)]
#: From a rank that missed step 10.
LATE = [(0, FIRST), (12, SECOND), (20, FIRST)]


@pytest.mark.parametrize("rows", [COMPLETE + LATE, LATE + COMPLETE])
def test_earliest_statement_of_a_change_counts(rows: list[tuple[int, Int32]]) -> None:
    history = LayerHistory()
    for step, slots in rows:
        history.insert(step, 2, slots)
    assert history.steps == [0, 10, 20]
    assert history.ep_sizes == [2, 2, 2]
    assert [slots.tolist() for slots in history.slots] == [[0, 1], [1, 0], [0, 1]]
