"""Loads, decoded from the pages of a list column: three times as fast as with Arrow's reader.

All lists of such a column have one length. So nothing has to be assembled of the levels that say where a list
begins: it is enough to check them, and they are the same in nearly every page. Values are stored byte by byte
(BYTE_STREAM_SPLIT): first the lowest byte of each, then the next. Most counts have one or two bytes that are
not zero.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_analyze.sessions.parquet_pages import Page, extent, pages
from eplb_dump.format.schema import FormatError

BYTE_STREAM_SPLIT = 9
#: Bytes of a page's levels for each value, at most, and for their lengths; and of a chunk's headers.
LEVEL_BYTES, LENGTH_BYTES, HEADERS_BYTES = 2, 64, 64 << 10
#: So many bytes of a count are joined at once.
_JOINED = 2

Bytes = npt.NDArray[np.uint8]
_TYPES: dict[str, np.dtype[Any]] = {"INT32": np.dtype(np.int32), "INT64": np.dtype(np.int64)}


def read_lists(
    read_at: Callable[[int, int], bytes],
    column: Any,
    width: int,
    rows: tuple[int, int] | None = None,
    *,
    at_once: bool = False,
) -> npt.NDArray[Any]:
    """The values of a column chunk whose every list must have ``width`` values: ``[lists, width]``.

    Nothing is believed before its checksum was verified, and no page takes more memory than its values need.

    Args:
        read_at: ``(count, offset)`` reads from the file.
        column: its :class:`pyarrow.parquet.ColumnChunkMetaData`, of the verified footer.
        rows: the half-open range of lists to return; pages without any of them are skipped. Default all.
        at_once: call ``read_at`` once, as each call is a request; by default for each page that is needed.

    Returns: int32, or int64 if a value needs it.

    Raises FormatError if it is not what the writer makes, or a value is negative.
    """
    dtype = _TYPES.get(column.physical_type)
    if dtype is None or column.compression != "ZSTD" or column.num_values % width:
        raise FormatError("its lists are not stored as the format says")
    start, end = extent(column)
    if end - start > column.num_values * (dtype.itemsize + LEVEL_BYTES) + HEADERS_BYTES:
        raise FormatError("its lists take more bytes than their values can need")
    if at_once:
        chunk = read_at(end - start, start)

        def read_at(count: int, at: int) -> bytes:
            return chunk[at - start : at - start + count]

    low, high = (0, column.num_values) if rows is None else (rows[0] * width, rows[1] * width)
    values: npt.NDArray[Any] = np.empty(high - low, np.int32)
    at = 0  # the first value of the page
    for page in pages(read_at, column):
        count = page.values(BYTE_STREAM_SPLIT)
        if at + count > column.num_values:
            raise FormatError("the lengths of its lists do not match the manifest")
        if at < high and at + count > low:
            stored = read_at(min(page.stored, end - page.at), page.at)
            planes = _used(_planes(page, stored, dtype.itemsize, count, width, at % width))
            if len(planes) > values.itemsize:
                values = values.astype(np.int64)
            first, last = max(low, at), min(high, at + count)
            _join(planes[:, first - at : last - at], values[first - low : last - low])
        at += count
    if at != column.num_values:
        raise FormatError("it has fewer values than its footer says")
    return values.reshape(-1, width)


def _planes(page: Page, stored: bytes, itemsize: int, count: int, width: int, first: int) -> Bytes:
    """The bytes of a page's values, the lowest of each first: ``[itemsize, count]``.

    ``first``: the place of the first value in its list.
    """
    if zlib.crc32(stored) != page.crc32:
        raise FormatError("CRC checksum verification failed")
    if page.size > count * (itemsize + LEVEL_BYTES) + LENGTH_BYTES:
        raise FormatError("a page takes more bytes than its values can need")
    content = np.frombuffer(pa.Codec("zstd").decompress(stored, page.size), np.uint8)
    repetition, content = _level_bytes(content)
    definition, content = _level_bytes(content)
    if (
        len(content) != count * itemsize
        or not _are_lists(repetition, count, width, first)
        or not _are_present(definition, count)
    ):
        raise FormatError("it holds a list of the wrong length")
    return content.reshape(itemsize, count)


def _level_bytes(content: Bytes) -> tuple[bytes, Bytes]:
    """The levels that a page's content begins with, and the rest."""
    end = 4 + int.from_bytes(content[:4].tobytes(), "little")
    return content[4:end].tobytes(), content[end:]


def _used(planes: Bytes) -> Bytes:
    """The planes that these values need, with a bit for the sign. Raises FormatError if one is negative."""
    used = len(planes)
    while used > 1 and not planes[used - 1].max(initial=0):
        used -= 1
    if not used % 4 and planes[used - 1].max(initial=0) > 127:
        if used == len(planes):
            raise FormatError("it holds an invalid value")
        used += 1  # too large for a signed integer of 4 bytes
    return planes[:used]


def _join(planes: Bytes, out: npt.NDArray[Any]) -> None:
    """Numbers of their bytes, the lowest first: ``planes [bytes, n]``, ``out [n]``."""
    used = len(planes)
    if used > 1:
        low: npt.NDArray[Any] = planes[1].astype(np.uint16)
        low <<= 8
        low |= planes[0]
        out[:] = low
    else:
        out[:] = planes[0]
    for place in range(_JOINED, used):
        out |= planes[place].astype(out.dtype) << (8 * place)


@functools.lru_cache(maxsize=64)
def _are_lists(levels: bytes, count: int, width: int, first: int) -> bool:
    """Whether repetition levels begin a list at every ``width``-th value.

    ``first``: the place of the first value in its list. A file has few distinct levels.
    """
    expected = (np.arange(first, first + count) % width > 0).view(np.uint8)
    lists = count // width
    one = levels[: len(levels) // max(1, lists)]
    if not first and lists * width == count and one * lists == levels:
        # Nearly always each list has the same bytes, and those of one are read a hundred times as fast.
        with contextlib.suppress(FormatError):
            if np.array_equal(_levels(one, width), expected[:width]):
                return True
    return np.array_equal(_levels(levels, count)[:count], expected)


@functools.lru_cache(maxsize=64)
def _are_present(levels: bytes, count: int) -> bool:
    """Whether definition levels say that every value exists."""
    return bool(_levels(levels, count)[:count].all())


def _levels(data: bytes, count: int) -> Bytes:
    """Levels of 0 and 1 in Parquet's encoding RLE, without the length: uint8 ``[count]``, or a few more.

    Raises FormatError if there are others, or not so many.
    """
    parts: list[Bytes] = []
    at = total = 0
    while at < len(data) and total < count:
        head = shift = 0
        while True:
            head |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128 or at >= len(data) or shift > 35:
                break
        size = head >> 1
        if head & 1:  # groups of eight, a bit each
            part = np.unpackbits(np.frombuffer(data, np.uint8)[at : at + size], bitorder="little")
            at += size
        else:
            if size > count - total or at >= len(data):
                break
            part = np.full(size, data[at], np.uint8)
            at += 1
        parts.append(part)
        total += len(part)
    levels = np.concatenate([np.empty(0, np.uint8), *parts])
    if at != len(data) or not count <= len(levels) < count + 8 or levels.max(initial=0) > 1:
        raise FormatError("the levels of its lists are malformed")
    return levels
