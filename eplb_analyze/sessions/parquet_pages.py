"""The pages of a Parquet column: their sizes, read from their headers before anything is decoded.

A page decodes to as many bytes as its own header says, whatever the footer says: some kB can stand for GB.
The header is a struct of Thrift's compact protocol: see PageHeader in Parquet's parquet.thrift, and Thrift's
thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import FormatError

#: Bytes read at first to find a header, and more than any header has, which may hold two values of its page.
HEADER_BYTES, MAX_HEADER_BYTES = 512, 64 << 10
#: Encodings in which values take about as many bytes as in their page: all but DELTA_BYTE_ARRAY (7), in which
#: a text can repeat all of the one before.
ENCODINGS = frozenset({0, 2, 3, 4, 5, 6, 8, 9})

#: Fields of a PageHeader, and of the header of each kind of page in it.
_UNCOMPRESSED, _COMPRESSED, _CRC = 2, 3, 4
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8
_NUM_VALUES = 1
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
#: Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = (
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    12,
)


@frozen
class Page:
    """A page, as its header describes it."""

    #: Where its content is in the file, and how many bytes it has there and decompressed.
    at: int
    stored: int
    size: int
    #: Fields of the header by number.
    header: dict[int, Any]

    @property
    def crc32(self) -> int | None:
        """Of the content as it is stored; None if the header has no checksum."""
        value = self.header.get(_CRC)
        return value & 0xFFFFFFFF if isinstance(value, int) else None

    def values(self, encoding: int) -> int:
        """How many values it has, if it is a data page (version 1) in an encoding. Raises FormatError."""
        page = self.header.get(_DATA)
        if not isinstance(page, dict) or page.get(_ENCODING[_DATA]) != encoding:
            raise FormatError(f"a page is not in encoding {encoding}, in which the writer stores lists")
        count = page.get(_NUM_VALUES)
        if not isinstance(count, int) or count < 0:
            raise FormatError("a page header has no number of values")
        return count


def pages(read_at: Callable[[int, int], bytes], column: Any) -> Iterator[Page]:
    """The pages of a column chunk; ``column`` is its :class:`pyarrow.parquet.ColumnChunkMetaData`.

    Args:
        read_at: ``(count, offset)`` reads from the file.

    Raises FormatError if a page header is malformed.
    """
    at, end = extent(column)
    while at < end:
        header, length = _read_header(read_at, at, end)
        size, stored = header.get(_UNCOMPRESSED), header.get(_COMPRESSED)
        if not isinstance(size, int) or not isinstance(stored, int) or size < 0 or stored < 0:
            raise FormatError("a page header has no size")
        yield Page(at + length, stored, size, header)
        at += length + stored


def extent(column: Any) -> tuple[int, int]:
    """Where a column chunk begins and ends in the file."""
    starts = [column.data_page_offset]
    if column.dictionary_page_offset is not None:
        starts.append(column.dictionary_page_offset)
    at = min(start for start in starts if start > 0 or len(starts) == 1)
    return at, at + column.total_compressed_size


def decoded_bytes(read_at: Callable[[int, int], bytes], column: Any) -> int:
    """The bytes of all pages of a column chunk once they are decompressed; arguments as for :func:`pages`.

    Raises FormatError if a page header is malformed, or its values could take more memory than the page.
    """
    total = 0
    for page in pages(read_at, column):
        for kind, encoding in _ENCODING.items():
            own = page.header.get(kind)
            if isinstance(own, dict) and own.get(encoding) not in ENCODINGS:
                raise FormatError(f"a page has encoding {own.get(encoding)}, which the writer never uses")
        dictionary = page.header.get(_DICTIONARY)
        if isinstance(dictionary, dict) and not 0 <= dictionary.get(_NUM_VALUES, -1) <= column.num_values:
            raise FormatError("a dictionary has more entries than there are values")
        total += page.size
    return total


def _read_header(read_at: Callable[[int, int], bytes], at: int, end: int) -> tuple[dict[int, Any], int]:
    """The page header at a byte of the file, as fields by number, and its length. Raises FormatError."""
    count = HEADER_BYTES
    while True:
        data = read_at(min(count, end - at), at)
        try:
            return _struct(data, 0, 0)
        except IndexError:  # it is longer
            if count >= MAX_HEADER_BYTES or count >= end - at:
                raise FormatError("a page header is malformed") from None
            count *= 8


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The fields of the struct at ``data[at]``, and where it ends. Raises IndexError, FormatError."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        head = data[at]
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        fields[number], at = _value(data, at, head & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value of a type, None if only its end is of interest, and where it ends."""
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _zigzag(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (_BYTE, _DOUBLE):
        return None, at + (1 if kind == _BYTE else 8)
    if depth > 4 or kind not in (_STRUCT, _LIST, _SET):  # no field of a page header is nested deeper
        raise FormatError("a page header is malformed")
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    for _ in range(count):
        # In a list, a boolean takes a byte.
        at = at + 1 if kind in (_TRUE, _FALSE) else _value(data, at, kind, depth + 1)[1]
    return None, at


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while data[at] & 128:
        number |= (data[at] & 127) << shift
        at += 1
        shift += 7
        if shift > 63:
            raise FormatError("a page header is malformed")
    return number | data[at] << shift, at + 1
