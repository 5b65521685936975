"""List columns of Parquet tables whose lists all have one length, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_dump.format.schema import FormatError


def list_column(values: npt.NDArray[Any], kind: pa.ListType) -> pa.Array:
    """``values`` ``[rows, n]`` as a column of this type. Raises FormatError."""
    rows, n = values.shape
    if rows * n > 2**31 - 1:
        raise FormatError("a segment with more than 2^31 values cannot be sealed in one row group")
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(n)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def list_values(lists: pa.ListArray, width: int, least: int = 0) -> npt.NDArray[Any]:
    """The values ``[rows, width]`` of a column whose every list must have so many.

    ``least``: what a value must not be below. Raises FormatError.
    """
    offsets = np.asarray(lists.offsets.to_numpy(zero_copy_only=False))
    if lists.null_count or (len(offsets) > 1 and not (np.diff(offsets) == width).all()):
        raise FormatError("it holds a list of the wrong length")
    values: npt.NDArray[Any] = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    finite = values.dtype.kind != "f" or np.isfinite(values).all()
    if not finite or values.min(initial=least) < least:
        raise FormatError("it holds an invalid value")
    return values.reshape(len(lists), width)
