"""Sizes of pages are known before they are decoded, so that a small file cannot take GB of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import cli, load_of, manifest, map_of, one_error, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze.sessions.parquet_pages import decoded_bytes
from eplb_dump.format import frames
from eplb_dump.format.manifest import SealedFile
from eplb_dump.format.schema import MANIFEST_FILE, FormatError
from eplb_dump.format.segment import footer_crc32

ROWS = 50


def sizes(path: Path, data: bytes | None = None) -> list[tuple[int, Any]]:
    """Of each column chunk of a file, what its pages decode to, and its metadata."""
    metadata = pq.read_metadata(path)
    content = path.read_bytes() if data is None else data
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return [(decoded_bytes(lambda n, at: content[at : at + n], column), column) for column in columns]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_add_up_to_the_size_that_an_honest_footer_says(
    version: str, compression: str, dictionary: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "number": rng.integers(0, 1 << 40, 5000),
            "text": pa.array(["a" * 3000, "b", None] * 1666 + ["c", "d"]),
            "list": pa.array([[1, 2, 3]] * 5000, pa.list_(pa.int32())),
        }
    )
    path = tmp_path / "file.parquet"
    pq.write_table(
        table, path, compression=compression, use_dictionary=dictionary, data_page_version=version,
        data_page_size=4096, row_group_size=2000, write_page_checksum=True,
    )  # fmt: skip
    for size, column in sizes(path):
        pages = column.total_uncompressed_size
        assert 0.5 * pages < size < pages  # the footer counts the headers, too
        if compression == "none":
            assert pages == column.total_compressed_size


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "file.parquet"
    pq.write_table(pa.table({"a": np.arange(100), "b": ["x", "y"] * 50}), path, write_page_checksum=True)
    return path


@settings(max_examples=300)
@given(position=st.integers(4, 400), value=st.binary(min_size=1, max_size=8))
def test_damaged_header_is_an_error_or_a_size(small_file: Path, position: int, value: bytes) -> None:
    data = bytearray(small_file.read_bytes())
    data[position : position + len(value)] = value
    try:
        found = sizes(small_file, bytes(data))
    except FormatError:
        return
    assert all(size >= 0 for size, _ in found)


def dump_with(root: Path, *, chunks: list[pa.Array], column: str, **options: Any) -> Path:
    """A dump, one of whose ``steps`` files has other texts; the manifest has its checksum."""
    with open_writer(root, scope="global", segment_steps=ROWS) as writer:
        for step in range(ROWS):
            writer.record(step, load_of(step), map_of(), phase="decode")
    folder = Path(writer.folder)
    path = folder / "steps-000000.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index(column)
    table = table.set_column(index, table.schema.field(column), pa.chunked_array(chunks))
    pq.write_table(table, path, compression="zstd", write_page_checksum=True, **options)
    out = b""
    for frame in manifest(folder):
        header = dict(frame.header)
        if frame.kind == "sealed":
            listed = SealedFile(path.name, path.stat().st_size, ROWS, footer_crc32(path))
            header["files"] = {**header["files"], "steps": vars(listed)}
        out += frames.encode(frame.kind, header, frame.arrays)
    (folder / MANIFEST_FILE).write_bytes(out)
    return path


@pytest.mark.parametrize("column", ["phase", "status"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dictionary": True},
        {"use_dictionary": False, "data_page_size": 1 << 20, "write_batch_size": 1},
        {"use_dictionary": False, "data_page_version": "2.0"},
    ],
    ids=["dictionary", "plain", "version-2"],
)
def test_long_texts_are_refused_before_they_are_decoded(
    column: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [pa.array(["recorded" + chr(97 + i % 26) * 1_000_000]) for i in range(ROWS)]
    path = dump_with(tmp_path, chunks=texts, column=column, **options)
    assert path.stat().st_size < 100_000
    decoded = []
    read = pq.ParquetFile.read_row_groups

    def reading(self: pq.ParquetFile, groups: list[int], columns: list[str], **rest: Any) -> pa.Table:
        decoded.extend(columns)
        return read(self, groups, columns=columns, **rest)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", reading)
    one_error(cli("summary", tmp_path), 3, str(path), f"'{column}' takes 50,0", "bytes for 50 values")
    assert column not in decoded


def test_texts_that_repeat_each_other_are_refused(tmp_path: Path) -> None:
    """In this encoding, 50 texts of 12,000 characters take as many bytes as one."""
    texts = [pa.array(["decode" * 2000] * ROWS)]
    encoding = {"phase": "DELTA_BYTE_ARRAY"}
    path = dump_with(tmp_path, chunks=texts, column="phase", use_dictionary=False, column_encoding=encoding)
    one_error(cli("summary", tmp_path), 3, str(path), "a page has encoding 7")


def test_longest_phases_are_read(tmp_path: Path) -> None:
    longest = ["\N{GRINNING FACE}" * 60 + f"{step:04d}" for step in range(ROWS)]
    with open_writer(tmp_path, scope="global", segment_steps=ROWS) as writer:
        for step in range(ROWS):
            writer.record(step, load_of(step), map_of(), phase=longest[step])
    result = cli("summary", tmp_path)
    assert result.returncode == 0, result.stderr
