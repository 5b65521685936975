"""Checksummed frames: the unit in which journals and manifests are appended and read.

A frame is a 16-byte head and a payload; the payload is a small JSON header and raw arrays. The
head carries a checksum of itself, which distinguishes a torn end (the writer was killed in the
middle of a write) from damage. Nothing here knows what the frames mean.

::

    0   4  magic b"EPLF"
    4   4  payload length n, little-endian uint32
    8   4  CRC-32 of the payload
    12  4  CRC-32 of bytes 0 to 11
    16  4  JSON header length h
    20  h  JSON header, padded with spaces to a multiple of 4
    ... arrays of the header's "arrays", in its order, back to back, little-endian, C order
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import FormatError

MAGIC = b"EPLF"
HEAD = struct.Struct("<4sIII")
#: The largest JSON header in bytes.
MAX_HEADER = 1 << 20
#: The largest payload in bytes. A head that claims more is damage; no memory is allocated for it.
MAX_PAYLOAD = 64 << 20
_LENGTH = struct.Struct("<I")
_DTYPES = frozenset({"|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<i8"})

Array = npt.NDArray[Any]
#: Bytes of a frame, or of a part of one.
Piece = bytes | memoryview


class NamedFile(Protocol):
    """A file that can be read: a :class:`pathlib.Path`, or a file in remote storage."""

    @property
    def name(self) -> str: ...
    def open(self, mode: Literal["rb"], /) -> BinaryIO: ...


@frozen
class Frame:
    """One complete, verified frame and its position in the file."""

    kind: str
    header: dict[str, Any]
    arrays: dict[str, Array]
    #: Byte offset in the file of each array.
    offsets: dict[str, int]
    start: int
    end: int


@frozen
class Tail:
    """Where the valid prefix of a file of frames ends, and why."""

    end: int
    size: int
    #: None: at the end of the file. "torn": inside an unfinished frame. "damaged": wrong bytes.
    fault: str | None = None


def encode(kind: str, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> bytes:
    """A frame as bytes. ``arrays`` must be little-endian integers."""
    return b"".join(encode_pieces(kind, header, arrays or {}))


def encode_pieces(kind: str, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[Piece]:
    """As :func:`encode`, in pieces: contiguous arrays are not copied.

    To join megabytes takes milliseconds, all the time with the interpreter lock.
    """
    layout = {name: [a.dtype.str, list(a.shape)] for name, a in arrays.items()}
    text = json.dumps({"kind": kind, **header, "arrays": layout}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    pieces: list[Piece] = [_LENGTH.pack(len(text)), text]
    pieces += [np.ascontiguousarray(a).data.cast("B") for a in arrays.values() if a.size]
    length, crc = 0, 0
    for piece in pieces:
        length += len(piece)
        crc = zlib.crc32(piece, crc)
    if length > MAX_PAYLOAD:
        raise ValueError(f"a frame of {length} bytes is larger than {MAX_PAYLOAD}")
    head = struct.pack("<4sII", MAGIC, length, crc)
    return [head, _LENGTH.pack(zlib.crc32(head)), *pieces]


def decode_payload(payload: bytes, start: int) -> Frame:
    """Decode a verified payload whose head is at byte ``start`` of its file.

    Raises FormatError if the content contradicts itself, which a checksum cannot exclude.
    """
    try:
        (text_length,) = _LENGTH.unpack_from(payload)
        header = json.loads(payload[4 : 4 + text_length])
        layout = header.pop("arrays")
        kind = header.pop("kind")
        position = 4 + text_length
        arrays: dict[str, Array] = {}
        offsets: dict[str, int] = {}
        for name, (dtype, shape) in layout.items():
            if dtype not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
                raise ValueError(f"array {name!r} of type {dtype!r}")
            count = 1
            for n in shape:
                count *= n
            if position + count * int(dtype[2:]) > len(payload):
                raise ValueError(f"array {name!r} ends after its frame")
            arrays[name] = np.frombuffer(payload, dtype, count, position).reshape(shape)
            offsets[name] = start + HEAD.size + position
            position += arrays[name].nbytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise FormatError(f"the frame at byte {start} is malformed ({error})") from None
    return Frame(kind, header, arrays, offsets, start, start + HEAD.size + len(payload))


def _only_zeros(file: BinaryIO, rest: int) -> bool:
    if rest > MAX_PAYLOAD:  # more than one unfinished write
        return False
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            return False
    return True


def scan(file: BinaryIO, size: int, start: int = 0) -> Iterator[Frame | Tail]:
    """Yield the frames of the valid prefix of the first ``size`` bytes, then a Tail.

    ``size`` bounds the read, so that a growing file is read as of one moment. ``start``: where the file is
    at, which is where a frame begins.
    """
    position = start
    while position < size:
        head = file.read(min(HEAD.size, size - position))
        if len(head) < HEAD.size:
            # A torn head is a prefix of a real one; anything else is damage.
            torn = head[:4] == MAGIC[: len(head[:4])] or not any(head)
            yield Tail(position, size, "torn" if torn else "damaged")
            return
        magic, length, crc, head_crc = HEAD.unpack(head)
        if magic != MAGIC or zlib.crc32(head[:12]) != head_crc or length > MAX_PAYLOAD:
            # After a power cut, unwritten data can read as zeros: that is a torn end, too.
            zeros = not any(head) and _only_zeros(file, size - position)
            yield Tail(position, size, "torn" if zeros else "damaged")
            return
        if position + HEAD.size + length > size:
            yield Tail(position, size, "torn")
            return
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload) != crc:
            yield Tail(position, size, "damaged")
            return
        try:
            frame = decode_payload(payload, position)
        except FormatError:
            yield Tail(position, size, "damaged")
            return
        yield frame
        position = frame.end
    yield Tail(position, size)


def scan_headers(file: BinaryIO, size: int, start: int = 0) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield the first byte, end and JSON header of each frame from ``start`` on, without reading the arrays.

    The checksum of the payload, which covers the header, is not verified: use it to find frames, or for an
    overview. It ends at the first incomplete or damaged frame.
    """
    while start + HEAD.size + _LENGTH.size <= size:
        file.seek(start)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return
        magic, length, _, head_crc = HEAD.unpack(head)
        end = start + HEAD.size + length
        header_length = int.from_bytes(file.read(_LENGTH.size), "little")
        intact = magic == MAGIC and zlib.crc32(head[:12]) == head_crc
        if not intact or end > size or header_length > min(length, MAX_HEADER):
            return
        try:
            header = json.loads(file.read(header_length))
            header["kind"], header["arrays"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        yield start, end, header
        start = end


def frame_at(file: BinaryIO, size: int, start: int) -> Frame:
    """The verified frame that starts at a byte. Raises OSError, FormatError."""
    file.seek(start)
    item = next(scan(file, size, start))
    if isinstance(item, Tail):
        raise FormatError(f"damaged from byte {start} on")
    return item


def damaged_at(file: BinaryIO, size: int, start: int) -> bool:
    """Whether there are wrong bytes at ``start``: neither a frame, nor the unfinished write of one."""
    file.seek(start)
    item = next(scan(file, size - start))
    return isinstance(item, Tail) and item.fault == "damaged"


def steps_in(header: dict[str, Any]) -> int:
    """The number of steps in a frame of a journal, from its JSON header."""
    return int(header["arrays"]["step"][1][0])
