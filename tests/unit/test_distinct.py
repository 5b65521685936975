"""Tests of an array's distinct values."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

from eplb_analyze.distinct import distinct


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@given(values=st.lists(st.integers(0, 200), max_size=40))
def test_values_are_those_of_numpy(values: list[int], dtype: type) -> None:
    array: npt.NDArray[Any] = np.array(values, dtype)
    found, expected = distinct(array), np.unique(array)
    assert found.dtype == dtype
    assert found.tolist() == expected.tolist()
