"""Sealing: a finished journal becomes Parquet segments, listed in the session's manifest.

A kill or a power cut at any moment loses nothing that was sealed: the segments are written as ``.tmp`` and
synced, the manifest lists them, they are renamed, and the journal is deleted last. Each of these steps is
synced before the next one. Readers use the files that the manifest lists if they match it, else the journal:
a power cut can bring back a deleted journal, also an older or shorter state of it.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eplb_dump.format.columns import list_column, number_column, ragged_column, text_column
from eplb_dump.format.files import discard, fsync_file, publish, remove, temporary
from eplb_dump.format.journal import (
    Int64,
    JournalSegment,
    Loads,
    PlacementRows,
    Shape,
    StepRows,
    rank_loads,
    sums_from,
)
from eplb_dump.format.manifest import (
    ExpertSums,
    ManifestFile,
    SealedFile,
    SealedSegment,
)
from eplb_dump.format.minutes import MinutesBuilder
from eplb_dump.format.notable import Notable
from eplb_dump.format.schema import (
    METADATA_KEY,
    SCHEMAS,
    STATUS_LABELS,
    WIDE_LOADS_SCHEMA,
    FormatError,
    Scope,
    segment_name,
)
from eplb_dump.format.session import SessionInfo, canonical_json

#: Yields the parts of a table with this metadata.
Parts = Callable[[dict[bytes, bytes]], Iterable[pa.Table]]
#: A row group holds about this many counts, of few layers: one group is enough for one step of one
#: layer, and one layer of a long run needs no other layer's groups.
ROW_GROUP_VALUES = 1 << 21
#: So many row groups are read and summed at a time: each call hands over the interpreter lock.
_GROUPS_AT_ONCE = 3
#: How many bytes at a file's end are read to find its footer.
FOOTER_BYTES = 64 << 10
#: The manifest has no sums of a segment if they are larger than this, or than a share of its loads: reading
#: those is as fast then, and the manifest stays much smaller than the segments.
MAX_SUM_BYTES = 8 << 20
_SUM_SHARE, _SMALL_SUM_BYTES = 1 / 8, 4 << 10


def footer(size: int, read_at: Callable[[int, int], bytes]) -> bytes:
    """A Parquet file's footer, its length and the closing magic, usually with one read.

    ``read_at(count, offset)`` reads from the file, which has ``size`` bytes. Raises FormatError.
    """
    start = max(0, size - FOOTER_BYTES)
    tail = read_at(size - start, start)
    length = struct.unpack("<I", tail[-8:-4])[0] + 8 if len(tail) >= 12 else size
    if tail[-4:] != b"PAR1" or length + 4 > size:
        raise FormatError("it is not a complete Parquet file")
    return tail[-length:] if length <= len(tail) else read_at(length, size - length)


def footer_crc32(path: Path) -> int:
    """CRC-32 of a Parquet file's footer, its length and the closing magic."""
    with path.open("rb") as file:

        def read_at(count: int, offset: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        return zlib.crc32(footer(file.seek(0, os.SEEK_END), read_at))


def loads_schema(dtype: npt.DTypeLike) -> pa.Schema:
    """The schema of the ``loads`` table for loads of a type, int32 or int64."""
    return WIDE_LOADS_SCHEMA if np.dtype(dtype).itemsize > 4 else SCHEMAS["loads"]


def loads_table(
    layers: list[int], step: Int64, load: Loads, ranks: Int64, metadata: dict[bytes, bytes] | None = None
) -> pa.Table:
    """Rows of the ``loads`` table.

    Args:
        load: ``[len(layers), len(step), num_physical]``.
        ranks: what :func:`~eplb_dump.format.journal.rank_loads` makes of it.
    """
    schema = loads_schema(load.dtype).with_metadata(metadata)
    count, n, ep_size = ranks.shape
    return pa.Table.from_arrays(
        [
            number_column(np.tile(step, count), pa.int64()),
            number_column(np.repeat(np.array(layers, np.int32), n), pa.int32()),
            number_column(np.full(count * n, ep_size, np.int32), pa.int32()),
            list_column(ranks.reshape(count * n, -1), schema.field("rank_load").type),
            list_column(load.reshape(count * n, -1), schema.field("load").type),
        ],
        schema=schema,
    )


def steps_table(rows: StepRows, metadata: dict[bytes, bytes] | None = None) -> pa.Table:
    schema = SCHEMAS["steps"].with_metadata(metadata)
    return pa.Table.from_arrays(
        [
            number_column(rows.step, pa.int64()),
            number_column(rows.time_ns, schema.field("time").type),
            number_column(rows.monotonic_ns, pa.int64()),
            text_column(rows.status, STATUS_LABELS),
            number_column(rows.num_tokens, pa.int64(), rows.num_tokens < 0),
            text_column(rows.phase, rows.phases),
            number_column(rows.step_ms, pa.float32(), np.isnan(rows.step_ms)),
            number_column(rows.device_ms, pa.float32(), np.isnan(rows.device_ms)),
        ],
        schema=schema,
    )


def placements_table(rows: PlacementRows, layers: list[int], metadata: dict[bytes, bytes]) -> pa.Table:
    schema = SCHEMAS["placements"].with_metadata(metadata)
    return pa.Table.from_arrays(
        [
            number_column(rows.step, pa.int64()),
            number_column(np.array(layers, np.int32)[rows.layer], pa.int32()),
            number_column(rows.ep_size, pa.int32()),
            ragged_column(rows.physical_to_logical, schema.field("physical_to_logical").type),
        ],
        schema=schema,
    )


def _open_parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    plain = {"step": "DELTA_BINARY_PACKED", "layer": "DELTA_BINARY_PACKED"}
    split = {f"{f.name}.list.element": "BYTE_STREAM_SPLIT" for f in schema if pa.types.is_list(f.type)}
    split |= {f.name: "BYTE_STREAM_SPLIT" for f in schema if pa.types.is_floating(f.type)}
    times = {n: "DELTA_BINARY_PACKED" for n in ("time", "monotonic_ns", "num_tokens") if n in schema.names}
    encoding = {n: e for n, e in {**plain, **split, **times}.items() if n.split(".")[0] in schema.names}
    return pq.ParquetWriter(
        str(path),
        schema,
        compression="zstd",
        compression_level=1,  # higher levels spend CPU and gain nothing on counts
        use_dictionary=[n for n in ("ep_size", "status", "phase") if n in schema.names],
        column_encoding=encoding,
        write_statistics=["step", "layer", "ep_size"],
        write_page_checksum=True,
        data_page_version="1.0",  # readers decode lists from their pages
        write_batch_size=1 << 12,
    )


class Content(Protocol):
    """The content of a segment, for example of a journal. ``seq`` and ``shape`` are the segment's."""

    @property
    def info(self) -> SessionInfo: ...
    @property
    def seq(self) -> int: ...
    @property
    def shape(self) -> Shape | None: ...
    @property
    def steps(self) -> StepRows: ...
    @property
    def placements(self) -> PlacementRows: ...
    @property
    def load_steps(self) -> Int64: ...
    @property
    def load_type(self) -> npt.DTypeLike:
        """int32, or int64 if a count is above MAX_LOAD."""
        ...

    def read_layers(self, first: int, last: int) -> Loads:
        """Loads of MoE layers ``first`` to ``last - 1``: ``load_type [last - first, n, num_physical]``."""
        ...


def seal(
    journal_path: Path, notable: Notable | None = None, manifest: ManifestFile | None = None
) -> SealedSegment | None:
    """Turn a journal into a sealed segment and delete it. Returns None if it held no step.

    Args:
        notable: what judges the segments of this session; default: one that knows none of the earlier ones.
        manifest: the session's, if this process appends to it more than once.

    Raises OSError (the journal stays and remains valid) and FormatError (it is damaged, or its segment is
    sealed already and has more steps).
    """
    folder = journal_path.parent
    with JournalSegment(journal_path) as journal:
        if journal.tail.fault == "damaged":
            raise FormatError(f"it is damaged from byte {journal.tail.end} on and was not sealed")
        entry = write_segment(folder, journal, notable, manifest) if len(journal.steps.step) else None
    remove(journal_path)
    return entry


def write_segment(
    folder: Path, content: Content, notable: Notable | None = None, manifest: ManifestFile | None = None
) -> SealedSegment:
    """Write a segment with at least one step, and list it in the manifest.

    ``notable``, ``manifest``: as for :func:`seal`.

    Raises OSError, and FormatError, also if the manifest lists this segment with more steps.
    """
    try:
        entry = _write_files(folder, content, notable or Notable())
        (manifest or ManifestFile(folder)).append(content.info, entry)
    except Exception:  # free the space, as the disk may be full
        discard(temporary(folder / segment_name(table, content.seq)) for table in SCHEMAS)
        raise
    publish(*(folder / file.name for file in entry.files.values()))
    return entry


class SegmentFiles:
    """Writes the tables of a segment, or of several in one, as temporary files that are synced.

    Attributes:
        files: what was written, by table.
    """

    def __init__(
        self, folder: Path, info: SessionInfo, shape: Shape | None, seq: int, last_seq: int | None = None
    ) -> None:
        self.files: dict[str, SealedFile] = {}
        self._folder, self._seq, self._last_seq = folder, seq, last_seq
        self._metadata = {
            "session": info.to_dict(),
            "seq": seq,
            "shape": None if shape is None else dict(vars(shape)),
        }

    def write(self, table: str, parts: Parts, rows: int, schema: pa.Schema | None = None) -> None:
        """Write a table, of which ``parts(metadata)`` yields a row group at a time. Raises OSError."""
        metadata = {METADATA_KEY: canonical_json({**self._metadata, "table": table}).encode()}
        name = segment_name(table, self._seq, self._last_seq)
        tmp = temporary(self._folder / name)
        writer = _open_parquet(tmp, (schema or SCHEMAS[table]).with_metadata(metadata))
        try:
            for part in parts(metadata):
                writer.write_table(part, row_group_size=max(1, part.num_rows))
        finally:
            writer.close()
        fsync_file(tmp)
        self.files[table] = SealedFile(name, tmp.stat().st_size, rows, footer_crc32(tmp))


def _write_files(folder: Path, content: Content, notable: Notable) -> SealedSegment:
    shape, steps, n = content.shape, content.steps, len(content.load_steps)
    layers = [] if shape is None else content.info.layer_numbers(shape.num_moe_layers)
    tables = SegmentFiles(folder, content.info, shape, content.seq)
    if len(content.placements.step):
        num_layers = max(len(layers), int(content.placements.layer.max()) + 1)
        numbers = layers or content.info.layer_numbers(num_layers)
        tables.write(
            "placements",
            lambda metadata: [placements_table(content.placements, numbers, metadata)],
            len(content.placements.step),
        )
    minutes = MinutesBuilder(
        steps,
        content.placements,
        content.load_steps,
        shape,
        summed=content.info.scope is Scope.GLOBAL,
        token_replication=content.info.token_replication,
    )
    sums = None
    if shape is not None and n:
        group = max(1, ROW_GROUP_VALUES // (n * shape.num_physical_experts))
        at_once = group * _GROUPS_AT_ONCE
        builder = _SumBuilder(content)

        def load_parts(metadata: dict[bytes, bytes]) -> Iterator[pa.Table]:
            for low in range(0, shape.num_moe_layers, at_once):
                block = content.read_layers(low, min(low + at_once, shape.num_moe_layers))
                ranks = rank_loads(block, shape.ep_size)
                minutes.add(low, block, ranks)
                builder.add(low, block)
                for first in range(0, len(block), group):
                    part = slice(first, first + group)
                    numbers = layers[low : low + len(block)][part]
                    yield loads_table(numbers, content.load_steps, block[part], ranks[part], metadata)

        tables.write("loads", load_parts, n * shape.num_moe_layers, loads_schema(content.load_type))
        sums = builder.sums(tables.files["loads"].bytes)
    rows = minutes.finish()
    tables.write("minutes", lambda metadata: [rows.to_table(metadata)], len(rows))
    tables.write("steps", lambda metadata: [steps_table(steps, metadata)], len(steps.step))
    return SealedSegment(
        content.seq,
        int(steps.step.min()),
        int(steps.step.max()),
        shape,
        tables.files,
        sums,
        times=(int(steps.time_ns.min()), int(steps.time_ns.max())),
        notable=notable.judge(content.seq, shape, content.placements, rows),
    )


class _SumBuilder:
    """Adds up each slot's tokens while ``loads`` is being written."""

    def __init__(self, content: Content) -> None:
        self._steps = content.load_steps
        self._placements = content.placements
        self._rows: list[tuple[int, int]] = []
        self._loads: list[Int64] = []

    def add(self, first: int, load: Loads) -> None:
        """``load``: of layers from ``first`` on, ``[layers, len(load_steps), num_physical_experts]``."""
        edges_of = [self._edges(layer) for layer in range(first, first + len(load))]
        for edges, same in groupby(range(len(load)), edges_of.__getitem__):
            layers = [*same]
            self._rows += [(first + layer, int(self._steps[edge])) for layer in layers for edge in edges]
            sums = sums_from(load[layers[0] : layers[-1] + 1], np.array(edges))
            self._loads.append(sums.swapaxes(0, 1).reshape(-1, load.shape[2]))

    def _edges(self, layer: int) -> list[int]:
        """Where the loads of another placement begin, of this layer; 0 is one."""
        changed = self._placements.step[self._placements.layer == layer]
        edges = {0, *np.searchsorted(self._steps, changed).tolist()}
        return sorted(edges - {len(self._steps)})

    def sums(self, load_bytes: int) -> ExpertSums | None:
        """None if they are large: after so many placement changes, reading the loads is as fast."""
        most = min(MAX_SUM_BYTES, max(_SMALL_SUM_BYTES, int(load_bytes * _SUM_SHARE)))
        if sum(load.nbytes for load in self._loads) > most:
            return None
        layer, step = (np.array(column) for column in zip(*self._rows, strict=True))
        return ExpertSums(layer.astype(np.int32), step.astype(np.int64), np.concatenate(self._loads))
