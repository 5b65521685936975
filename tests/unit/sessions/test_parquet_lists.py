"""Lists of loads are decoded from their pages: as Arrow decodes them, and nothing that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze.sessions import parquet_lists, parquet_pages
from eplb_analyze.sessions.parquet_lists import read_lists
from eplb_analyze.sessions.parquet_pages import HEADER_BYTES, Page
from eplb_dump.format.columns import list_column
from eplb_dump.format.schema import FormatError
from eplb_dump.format.segment import _open_parquet

Array = npt.NDArray[Any]
FIELD = pa.field("element", pa.int32(), nullable=False)


def write(path: Path, lists: pa.Array, **options: Any) -> Path:
    """A file with a column ``load``, as the writer writes it, or with other options."""
    schema = pa.schema([pa.field("load", lists.type, nullable=False)])
    table = pa.Table.from_arrays([lists], schema=schema)
    if not options:
        with _open_parquet(path, schema) as writer:
            writer.write_table(table, row_group_size=max(1, len(table)))
        return path
    settled = {"column_encoding": {"load.list.element": "BYTE_STREAM_SPLIT"}, "use_dictionary": False}
    as_written = {**settled, "compression": "zstd", "write_page_checksum": True}
    pq.write_table(table, path, **{**as_written, **options})
    return path


def read(path: Path, width: int, data: bytes | None = None, rows: tuple[int, int] | None = None) -> Array:
    content = path.read_bytes() if data is None else data
    column = pq.read_metadata(path).row_group(0).column(0)
    return read_lists(lambda count, at: content[at : at + count], column, width, rows)


def lists_of(values: Array) -> pa.Array:
    return list_column(
        values, pa.list_(pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lists")


@settings(max_examples=60)
@given(
    rows=st.integers(1, 700),
    width=st.integers(1, 70),
    dtype=st.sampled_from([np.int32, np.int64]),
    highest=st.sampled_from([0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**62]),
    page=st.sampled_from([64, 1000, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_are_those_that_were_written(
    folder: Path, rows: int, width: int, dtype: type, highest: int, page: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, min(highest, np.iinfo(dtype).max), (rows, width), dtype, endpoint=True)
    path = write(folder / "own", lists_of(values))
    assert np.array_equal(read(path, width), values)
    # Pages can also end within a list.
    small = write(folder / "small", lists_of(values), data_page_size=page, write_batch_size=7)
    found = read(small, width)
    assert np.array_equal(found, values)
    assert found.dtype == (np.int32 if values.max() < 2**31 else np.int64)
    low, high = sorted(rng.integers(0, rows, 2, endpoint=True).tolist())
    assert np.array_equal(read(small, width, rows=(low, high)), values[low:high])


def test_only_pages_with_wanted_rows_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(6000, dtype=np.int32).reshape(1000, 6)
    path = write(tmp_path / "file", lists_of(values), data_page_size=600, write_batch_size=100)
    decoded: list[int] = []
    decode = parquet_lists._planes

    def counting(page: Page, *rest: Any) -> Any:
        decoded.append(page.at)
        return decode(page, *rest)

    monkeypatch.setattr(parquet_lists, "_planes", counting)
    assert np.array_equal(read(path, 6), values)
    every = len(decoded)
    assert every > 10
    assert np.array_equal(read(path, 6, rows=(500, 501)), values[500:501])
    assert len(decoded) - every <= 2


@pytest.mark.parametrize("at_once", [False, True])
def test_only_headers_are_read_of_other_pages_unless_a_read_is_a_request(
    at_once: bool, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(0, 2**31 - 1, (4000, 6), np.int32)
    path = write(tmp_path / "file", lists_of(values), data_page_size=8000, write_batch_size=500)
    content = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(0)
    count = sum(1 for _ in parquet_lists.pages(lambda n, at: content[at : at + n], column))
    reads: list[int] = []

    def read_at(count: int, at: int) -> bytes:
        reads.append(count)
        return content[at : at + count]

    found = read_lists(read_at, column, 6, (2000, 2001), at_once=at_once)
    assert np.array_equal(found, values[2000:2001])
    if at_once:
        assert reads == [column.total_compressed_size]
    else:
        most = 2 * column.total_compressed_size // count  # as much as two pages, on average
        assert count > 10
        assert sum(reads) <= HEADER_BYTES * count + 2 * most


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_bytes_are_an_error_and_never_other_values(folder: Path, data: st.DataObject) -> None:
    # In pages of whole lists, a header with another number of values hides a shift by lists.
    width = data.draw(st.sampled_from([6, 8]))
    values = np.random.default_rng(0).poisson(300, (60, width)).astype(np.int32)
    path = write(folder / f"damaged-{width}", lists_of(values), data_page_size=400, write_batch_size=32)
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    start = column.data_page_offset
    position = data.draw(st.integers(start, start + column.total_compressed_size - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    rows = data.draw(st.sampled_from([(0, 60), (0, 3), (25, 30), (57, 60)]))
    try:
        found = read(path, width, bytes(content), rows)
    except (FormatError, OSError):
        return
    # What was changed says nothing about the values.
    assert np.array_equal(found, values[slice(*rows)])


@pytest.mark.parametrize("rows", [(0, 4), (60, 64)])
def test_no_flipped_bit_of_a_page_header_shifts_the_lists(folder: Path, rows: tuple[int, int]) -> None:
    """No checksum covers a header, so only the number of all values shows that one is wrong."""
    values = np.arange(64 * 128, dtype=np.int32).reshape(64, 128)
    path = write(folder / "headers", lists_of(values), data_page_size=4096, write_batch_size=128)
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    listed = [*parquet_pages.pages(lambda count, at: bytes(content[at : at + count]), column)]
    assert len(listed) >= 8
    ends = [column.data_page_offset, *(page.at + page.stored for page in listed)]
    wrong = 0
    for start, page in zip(ends, listed, strict=False):
        for bit in range(8 * start, 8 * page.at):
            content[bit // 8] ^= 1 << bit % 8
            try:
                found = read(path, 128, bytes(content), rows)
            except (FormatError, OSError):
                wrong += 1
            else:
                assert np.array_equal(found, values[slice(*rows)])
            content[bit // 8] ^= 1 << bit % 8
    assert wrong > 0


@pytest.mark.parametrize("lengths", [[3, 3, 2, 4], [4, 2, 3, 3], [0, 6, 3, 3], [6, 3, 3], [3, 3, 2]])
def test_lists_of_other_lengths_are_refused(tmp_path: Path, lengths: list[int]) -> None:
    lists = pa.array([[1] * length for length in lengths], pa.list_(FIELD))
    with pytest.raises(FormatError, match="list"):
        read(write(tmp_path / "file", lists), 3)


def test_absent_values_are_refused(tmp_path: Path) -> None:
    lists = pa.array([[1, None, 3], [4, 5, 6]], pa.list_(pa.int32()))
    with pytest.raises(FormatError):
        read(write(tmp_path / "file", lists), 3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_negative_values_are_refused(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(FormatError, match="an invalid value"):
        read(write(tmp_path / "file", lists_of(np.array([[5, -1], [0, 2]], dtype))), 2)


@pytest.mark.parametrize(
    "options",
    [
        {"column_encoding": {"load.list.element": "PLAIN"}},
        {"column_encoding": None, "use_dictionary": True},
        {"data_page_version": "2.0"},
        {"compression": "snappy"},
        {"write_page_checksum": False},
    ],
    ids=["plain", "dictionary", "version-2", "snappy", "no-checksum"],
)
def test_what_the_writer_never_makes_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    lists = lists_of(np.arange(60, dtype=np.int32).reshape(20, 3))
    with pytest.raises(FormatError):
        read(write(tmp_path / "file", lists, **options), 3)
