"""Frames: written frames read back; cut, flipped or forged ones are detected."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eplb_dump.format import frames
from eplb_dump.format.frames import MAGIC, MAX_PAYLOAD, Frame, Tail

DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<i8")
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8)
HEADERS = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in {"kind", "arrays"}), SCALARS)
ARRAYS = st.dictionaries(
    st.text(max_size=4),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_side=0, max_side=4))
    ),
    max_size=3,
)


def scan(data: bytes, size: int | None = None) -> tuple[list[Frame], Tail]:
    *whole, tail = frames.scan(io.BytesIO(data), len(data) if size is None else size)
    assert isinstance(tail, Tail)
    assert all(isinstance(frame, Frame) for frame in whole)
    return whole, tail  # type: ignore[return-value]


def head(length: int, payload: bytes = b"") -> bytes:
    first = struct.pack("<4sII", MAGIC, length, zlib.crc32(payload))
    return first + struct.pack("<I", zlib.crc32(first))


def forged(text: bytes, text_length: int | None = None) -> bytes:
    """A frame with valid checksums around any header text."""
    payload = struct.pack("<I", len(text) if text_length is None else text_length) + text
    return head(len(payload), payload) + payload


SMALL = [
    frames.encode("session", {"seq": 0}),
    frames.encode("loads", {"ep_size": 2}, {"load": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)}),
    frames.encode("steps", {}, {"step": np.array([1, -2], np.int64), "status": np.array([0, 4], np.uint8)}),
    frames.encode("end", {"text": "é"}),
]
FILE = b"".join(SMALL)
STARTS = np.cumsum([0, *map(len, SMALL)]).tolist()


@given(st.lists(st.tuples(st.text(max_size=8), HEADERS, ARRAYS), max_size=4))
def test_encoded_frames_read_back(
    written: list[tuple[str, dict[str, Any], dict[str, np.ndarray[Any, Any]]]],
) -> None:
    parts = [frames.encode(*frame) for frame in written]
    data = b"".join(parts)
    whole, tail = scan(data)
    assert tail == Tail(len(data), len(data), None)
    assert [frame.end - frame.start for frame in whole] == [len(part) for part in parts]
    for frame, (kind, header, arrays) in zip(whole, written, strict=True):
        assert (frame.kind, frame.header, list(frame.arrays)) == (kind, header, list(arrays))
        for name, array in arrays.items():
            assert frame.arrays[name].dtype == array.dtype
            assert np.array_equal(frame.arrays[name], array)
            at = frame.offsets[name]
            assert data[at : at + array.nbytes] == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=np.int64)[::-3],
        np.asfortranarray(np.arange(12, dtype=np.uint16).reshape(3, 4)),
        np.array(7, np.int32),
    ],
)
def test_arrays_of_any_layout_are_written_in_c_order(array: np.ndarray[Any, Any]) -> None:
    (frame,), _ = scan(frames.encode("x", {}, {"a": array}))
    assert np.array_equal(frame.arrays["a"], array)
    assert frame.arrays["a"].shape == array.shape


@pytest.mark.parametrize("growing", [False, True])
def test_file_cut_at_any_byte_has_torn_tail(growing: bool) -> None:
    """A cut file reads like a file that grew after its size was taken."""
    whole, _ = scan(FILE)
    for cut in range(len(FILE) + 1):
        found, tail = scan(FILE, cut) if growing else scan(FILE[:cut])
        complete = sum(start <= cut for start in STARTS[1:])
        assert len(found) == complete
        assert [(f.kind, f.header) for f in found] == [(f.kind, f.header) for f in whole[:complete]]
        assert tail == Tail(STARTS[complete], cut, None if cut in STARTS else "torn")


def test_any_flipped_bit_is_detected() -> None:
    whole, _ = scan(FILE)
    for position in range(len(FILE) * 8):
        data = bytearray(FILE)
        data[position // 8] ^= 1 << position % 8
        found, tail = scan(bytes(data))
        intact = sum(start <= position // 8 for start in STARTS[1:])
        assert len(found) == intact, f"bit {position}"
        assert tail == Tail(STARTS[intact], len(FILE), "damaged"), f"bit {position}"
        for frame, truth in zip(found, whole, strict=False):
            assert (frame.kind, frame.header) == (truth.kind, truth.header)
            assert all(np.array_equal(frame.arrays[name], truth.arrays[name]) for name in truth.arrays)


@pytest.mark.parametrize("zeros", [1, 3, 4, 5, 15, 16, 17, 4096, 3 << 20])
def test_tail_of_zeros_is_torn(zeros: int) -> None:
    found, tail = scan(FILE + bytes(zeros))
    assert len(found) == len(SMALL)
    assert tail == Tail(len(FILE), len(FILE) + zeros, "torn")


@pytest.mark.parametrize(
    "junk", [b"X", b"EPLX", b"\0\0\0X", bytes(5000) + b"\1", b"EPLF" + bytes(40), b"x" * 99]
)
def test_tail_of_other_bytes_is_damaged(junk: bytes) -> None:
    found, tail = scan(FILE + junk)
    assert len(found) == len(SMALL)
    assert tail == Tail(len(FILE), len(FILE) + len(junk), "damaged")


@pytest.mark.parametrize(
    ("length", "fault"), [(MAX_PAYLOAD + 1, "damaged"), (2**32 - 1, "damaged"), (MAX_PAYLOAD, "torn")]
)
def test_absurd_length_allocates_no_memory(length: int, fault: str) -> None:
    data = FILE + head(length) + bytes(100)
    tracemalloc.start()
    try:
        found, tail = scan(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(found) == len(SMALL)
    assert tail == Tail(len(FILE), len(data), fault)


def test_frame_too_large_for_readers_is_not_written() -> None:
    with pytest.raises(ValueError, match="larger than"):
        frames.encode("x", {}, {"a": np.zeros(MAX_PAYLOAD, np.uint8)})


def _with_array(dtype: Any, shape: Any) -> bytes:
    return json.dumps({"kind": "x", "arrays": {"a": [dtype, shape]}}).encode()


NONSENSE = {
    "no payload": head(0),
    "a payload of two bytes": head(2, b"ab") + b"ab",
    "no header": forged(b""),
    "a cut header": forged(b"{", 1),
    "not UTF-8": forged(b"\xff\xfe"),
    "a list": forged(b"[1]"),
    "a number": forged(b"7"),
    "no arrays": forged(b'{"kind": "x"}'),
    "no kind": forged(b'{"arrays": {}}'),
    "arrays in a list": forged(b'{"kind": "x", "arrays": []}'),
    "an array without layout": forged(b'{"kind": "x", "arrays": {"a": 1}}'),
    "floats": forged(_with_array("<f8", [])),
    "objects": forged(_with_array("|O", [0])),
    "a type that is a list": forged(_with_array([1], [1])),
    "an array that ends after its frame": forged(_with_array("|u1", [1])),
    "a negative side": forged(_with_array("|u1", [-1])),
    "a side that is no integer": forged(_with_array("|u1", [1.5])),
    "a shape that is no list": forged(_with_array("|u1", 3)),
    "an array of 8 TiB": forged(_with_array("<i8", [1 << 40])),
    "an array of 2^67 bytes": forged(_with_array("<i8", [1 << 32, 1 << 32])),
    "an empty array with a huge side": forged(_with_array("<i8", [0, 1 << 70])),
    "too many dimensions": forged(_with_array("|u1", [0] * 100)),
    "a nesting too deep": forged(b'{"kind": "x", "arrays": ' + b"[" * 200_000),
    "an integer too long": forged(b'{"kind": "x", "arrays": {}, "n": ' + b"9" * 5000 + b"}"),
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
def test_malformed_content_with_valid_checksum_is_rejected(frame: bytes) -> None:
    found, tail = scan(FILE + frame + FILE)
    assert len(found) == len(SMALL)
    assert tail == Tail(len(FILE), 2 * len(FILE) + len(frame), "damaged")
