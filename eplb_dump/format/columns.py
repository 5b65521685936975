"""Columns of Arrow tables from numpy arrays and back, by their buffers.

``pa.array`` and ``to_numpy`` import pandas if it is installed. That takes a third of a second when a command
starts or while an engine serves, and a child that is forked meanwhile has half a module for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_dump.format.schema import FormatError

_DTYPES = {
    pa.int32(): np.int32,
    pa.int64(): np.int64,
    pa.float32(): np.float32,
    pa.float64(): np.float64,
    pa.timestamp("ns", "UTC"): np.int64,
}


def number_column(
    values: npt.NDArray[Any], kind: pa.DataType, unknown: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """``values`` ``[rows]`` as a column of this type, null where they are ``unknown``.

    Raises FormatError if the type cannot hold a value.
    """
    stored = np.ascontiguousarray(values, _DTYPES[kind])
    if stored.itemsize < values.itemsize and stored.dtype.kind == "i" and (stored != values).any():
        raise FormatError(f"a value does not fit into {kind}")
    known = None if unknown is None else pa.py_buffer(np.packbits(~unknown, bitorder="little"))
    return pa.Array.from_buffers(kind, len(stored), [known, pa.py_buffer(stored)])


def text_column(codes: npt.NDArray[np.integer[Any]], texts: Sequence[str]) -> pa.Array:
    """The text of each code ``[rows]``, null if it is -1."""
    encoded = [*(text.encode() for text in texts), b""]
    offsets = np.zeros(len(codes) + 1, np.int32)
    np.cumsum(np.array([*map(len, encoded)], np.int32)[codes], out=offsets[1:])
    data = b"".join(encoded[code] for code in codes.tolist())
    known = np.packbits(codes >= 0, bitorder="little")
    buffers = [known, offsets, data]
    return pa.Array.from_buffers(pa.string(), len(codes), [*map(pa.py_buffer, buffers)])


def list_column(values: npt.NDArray[Any], kind: pa.ListType) -> pa.Array:
    """``values`` ``[rows, n]`` as a column of this type. Raises FormatError."""
    rows, n = values.shape
    if rows * n > 2**31 - 1:
        raise FormatError("a segment with more than 2^31 values cannot be sealed in one row group")
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(n)
    return _lists(offsets, values.reshape(-1), kind)


def ragged_column(values: Iterable[npt.NDArray[Any]], kind: pa.ListType) -> pa.Array:
    """Arrays of any length as a column of this type."""
    arrays = [*values]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return _lists(offsets, np.concatenate(arrays) if arrays else np.empty(0, np.int32), kind)


def _lists(offsets: npt.NDArray[np.int32], flat: npt.NDArray[Any], kind: pa.ListType) -> pa.Array:
    return pa.ListArray.from_arrays(
        number_column(offsets, pa.int32()), number_column(flat, kind.value_type), type=kind
    )


def values_of(array: pa.Array, unknown: float = -1) -> npt.NDArray[Any]:
    """The numbers of a column ``[rows]``, not copied unless some are null, which are ``unknown``."""
    dtype, rows, first = np.dtype(_DTYPES[array.type]), len(array), array.offset
    if array.null_count == rows:  # also of none
        return np.full(rows, unknown, dtype)
    known, data = array.buffers()
    values: npt.NDArray[Any] = np.frombuffer(data, dtype, rows, first * dtype.itemsize)
    if not array.null_count:
        return values
    bits = np.unpackbits(np.frombuffer(known, np.uint8), count=first + rows, bitorder="little")
    return np.where(bits[first:], values, dtype.type(unknown))


def list_values(lists: pa.ListArray, width: int, least: int = 0) -> npt.NDArray[Any]:
    """The values ``[rows, width]`` of a column whose every list must have so many.

    ``least``: what a value must not be below. Raises FormatError.
    """
    offsets = values_of(lists.offsets)
    if (
        lists.null_count
        or lists.values.null_count
        or (len(offsets) > 1 and not (np.diff(offsets) == width).all())
    ):
        raise FormatError("it holds a list of the wrong length")
    values = values_of(lists.values)[offsets[0] : offsets[-1]]
    finite = values.dtype.kind != "f" or np.isfinite(values).all()
    if not finite or values.min(initial=least) < least:
        raise FormatError("it holds an invalid value")
    return values.reshape(len(lists), width)
