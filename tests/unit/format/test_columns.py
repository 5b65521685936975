"""Columns of Arrow tables made of numpy arrays: what Arrow itself makes of them, there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_dump.format.columns import (
    list_column,
    list_values,
    number_column,
    ragged_column,
    text_column,
    values_of,
)
from eplb_dump.format.schema import FormatError

KINDS: dict[pa.DataType, Any] = {
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.float64(): st.floats(allow_nan=False),
}
LISTS = pa.list_(pa.field("element", pa.int32(), nullable=False))


@given(st.data(), st.sampled_from(list(KINDS)))
def test_numbers_are_what_arrow_makes_of_them(data: st.DataObject, kind: pa.DataType) -> None:
    rows = data.draw(st.lists(st.one_of(st.none(), KINDS[kind]), max_size=40))
    unknown = np.array([row is None for row in rows], np.bool_)
    values = np.array([row or 0 for row in rows], kind.to_pandas_dtype())
    made = number_column(values, kind, unknown)
    made.validate(full=True)
    assert made.equals(pa.array(rows, kind))
    assert number_column(values, kind).equals(pa.array(values, kind))
    first = data.draw(st.integers(0, len(rows)))
    found = values_of(made.slice(first), -1)
    assert found.dtype == values.dtype
    assert found.tolist() == np.where(unknown, values.dtype.type(-1), values)[first:].tolist()


@given(st.lists(st.sampled_from(["", "decode", "prefill", "süß", None])))
def test_texts_are_what_arrow_makes_of_them(texts: list[str | None]) -> None:
    distinct = [*dict.fromkeys(text for text in texts if text is not None)]
    codes = np.array([-1 if text is None else distinct.index(text) for text in texts], np.int16)
    made = text_column(codes, distinct)
    made.validate(full=True)
    assert made.equals(pa.array(texts, pa.string()))


@given(st.lists(st.lists(st.integers(-1, 300), max_size=5)))
def test_lists_are_what_arrow_makes_of_them(lists: list[list[int]]) -> None:
    made = ragged_column([np.array(one, np.int32) for one in lists], LISTS)
    made.validate(full=True)
    assert made.equals(pa.array(lists, LISTS))


def test_number_that_the_type_cannot_hold_is_refused() -> None:
    assert number_column(np.array([2**31 - 1], np.int64), pa.int32()).to_pylist() == [2**31 - 1]
    with pytest.raises(FormatError, match="does not fit into int32"):
        number_column(np.array([2**31], np.int64), pa.int32())


def test_list_with_a_null_is_refused() -> None:
    assert list_values(list_column(np.array([[1, 2]], np.int32), LISTS), 2).tolist() == [[1, 2]]
    for damaged in ([[1, None]], [[1, 2], None], [[1]]):
        with pytest.raises(FormatError, match="wrong length"):
            list_values(pa.array(damaged, pa.list_(pa.int32())), 2, least=-1)
