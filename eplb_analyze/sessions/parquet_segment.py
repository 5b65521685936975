"""A sealed segment: verified reading of its Parquet files.

Page checksums protect the data, the manifest's checksum the footer. Page headers have neither, so what
they could hide is checked after decoding.
"""

from __future__ import annotations

import functools
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from eplb_analyze.sessions.parquet_lists import read_lists
from eplb_analyze.sessions.parquet_pages import decoded_bytes
from eplb_analyze.sessions.segments import EVERY, DamagedSegmentError, Parts, reading_faults, require_regular
from eplb_analyze.storage import bucket
from eplb_analyze.storage import path as places
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.columns import values_of
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import (
    Float32,
    Int64,
    JournalSegment,
    PlacementRows,
    StepRows,
    impossible_ms,
    load_shape,
    unknown_ms,
)
from eplb_dump.format.manifest import ExpertSums, SealedSegment, StoredSums
from eplb_dump.format.minutes import Minutes, width_of
from eplb_dump.format.schema import (
    DURATIONS,
    EMPTY_SLOT,
    KNOWN_SCHEMAS,
    MAX_NUMBER,
    MAX_PHASE,
    METADATA_KEY,
    MINUTES_SCHEMA,
    SCHEMAS,
    STATUS_LABELS,
    FormatError,
    Tier,
)
from eplb_dump.format.segment import footer
from eplb_dump.format.session import SessionInfo

#: A segment that decodes to more than this at once is hostile: the writer makes none.
MAX_DECODED_BYTES, MAX_LOADS_BYTES = 512 << 20, 1 << 30
#: What a value takes in a page, at most, with its levels; a short column has some more for its dictionary.
NUMBER_BYTES, TEXT_BYTES, PAGE_BYTES = 10, 5 + 4 * MAX_PHASE, 64 << 10
#: A chunk of numbers that is no larger is harmless, and not checked: Zstandard makes at most 16 MiB of it.
HARMLESS_BYTES = 512
#: Sums per minute are decoded about so many bytes at a time, and read so many at a time from each column of a
#: local file. From a bucket a file is read at once, with few requests, unless it is larger.
ROWS_BYTES, STREAM_BYTES, MAX_BUFFERED_BYTES = 3 << 20, 64 << 10, 16 << 20
MINUTES_LISTS = frozenset(field.name for field in MINUTES_SCHEMA if pa.types.is_list(field.type))
NULLABLE_LISTS = frozenset(field.name for field in MINUTES_SCHEMA if field.nullable) & MINUTES_LISTS
NO_TURN = nullcontext()
_EDGES = "first_step", "last_step", "first_time_ns", "last_time_ns"
#: Columns of the table ``steps`` that are read as dictionary codes: most of their texts are equal.
TEXT_COLUMNS = ["status", "phase"]


@functools.lru_cache(maxsize=8)
def _read_sums(segment: ParquetSegment) -> ExpertSums:
    """Those of the segments that are being read: not of all, which would be hundreds of megabytes.

    They are kept by segment, not by their place in a file: a run that is opened again may have others there.
    """
    sums = segment.entry.sums
    assert isinstance(sums, StoredSums)
    if isinstance(sums.file, Path):
        require_regular(sums.file)
    return sums.read()


class ParquetSegment:
    """A sealed segment, as the session's manifest lists it.

    A file is open only while it is read: a long run has more files than a process may open.
    """

    def __init__(self, folder: StoragePath, info: SessionInfo, entry: SealedSegment) -> None:
        self.path = folder
        self._info = info
        self._entry = entry
        self.seq, self.last_seq = entry.seq, entry.last_seq
        self.first_step, self.last_step = entry.first_step, entry.last_step
        self.shape = entry.shape
        #: As the manifest lists them.
        self.step_rows, self.recorded = entry.step_rows, entry.recorded
        self.has_loads = entry.tier is Tier.FULL
        #: The table with tokens per EP rank.
        self._by_step = "loads" if self.has_loads else "ranks"
        self.cut = False
        #: Footers that were verified, by table.
        self._metadata: dict[str, pq.FileMetaData] = {}
        #: The session's metadata in the last of these footers; None at first.
        self._session: dict[str, Any] | None = None
        self._load_steps: Int64 | None = None

    @property
    def entry(self) -> SealedSegment:
        """The manifest's entry."""
        return self._entry

    @property
    def sums(self) -> ExpertSums | None:
        """The manifest's sums; None if it has none, or is not there any more. The loads have them, too."""
        sums = self._entry.sums
        if not isinstance(sums, StoredSums):
            return sums
        try:
            return _read_sums(self)
        except (OSError, FormatError):
            return None

    def file_path(self, table: str) -> StoragePath:
        entry = self._entry.files.get(table)
        return self.path if entry is None else self.path / entry.name

    @contextmanager
    def _open(self, table: str, *, streamed: bool = False) -> Iterator[_TableFile]:
        """The file of a table, verified the first time it is opened.

        ``streamed``: it is read page by page, so that no column is in memory as a whole.
        """
        path, known = self.file_path(table), self._metadata.get(table)
        with ExitStack() as opened:
            with reading_faults(self, table, path):
                if known is None:
                    self._check_size(path, table)
                source = opened.enter_context(places.open_for_arrow(path))
                file = pq.ParquetFile(
                    source,
                    metadata=known or self._footer(source, table),
                    page_checksum_verification=True,
                    read_dictionary=TEXT_COLUMNS if table == "steps" else None,
                    # Each read from a bucket is a request: merge those of neighboring columns.
                    pre_buffer=isinstance(path, bucket.Remote) and not streamed,
                    buffer_size=STREAM_BYTES if streamed else 0,
                )
                opened.enter_context(file)
                if known is None:
                    self._check_footer(file, table)
                    self._metadata[table] = file.metadata
            # In a bucket, each page of a large file would be a request.
            checked = (
                table not in ("loads", "ranks", "minutes")
                or isinstance(path, Path)
                or isinstance(source, pa.BufferReader)
            )
            yield _TableFile(file, source.read_at if checked else None)

    def _check_size(self, path: StoragePath, table: str) -> None:
        require_regular(path)
        size, listed = path.stat().st_size, self._entry.files[table].bytes
        if size != listed:
            raise FormatError(f"it has {size} bytes, but the manifest says {listed}")

    def _footer(self, source: Any, table: str) -> pq.FileMetaData:
        """The verified footer of a file."""
        data = footer(source.size(), source.read_at)
        if zlib.crc32(data) != self._entry.files[table].footer_crc32:
            raise FormatError("its footer does not match the manifest's checksum")
        return pq.read_metadata(pa.BufferReader(data))

    def _check_footer(self, file: pq.ParquetFile, table: str) -> None:
        metadata = file.metadata
        own = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"null"))
        if not isinstance(own, dict) or own.get("seq") != self.seq or own.get("table") != table:
            raise FormatError("it is not the file that the manifest lists")
        if self._session is None or own["session"] != self._session:  # nearly always the same in each file
            SessionInfo.from_dict(own["session"])
            self._session = own["session"]
        rows = self._entry.files[table].rows
        # A newer minor version may add columns.
        columns = [field for field in _plain(file.schema_arrow) if field.name in SCHEMAS[table].names]
        if pa.schema(columns) not in KNOWN_SCHEMAS[table] or metadata.num_rows != rows:
            raise FormatError("its columns or rows do not match the format")
        if table in ("loads", "ranks"):
            self._check_widths(metadata)
        if table == "minutes":
            self._check_minutes(metadata)
            return  # which is read some rows at a time
        # Not the size that the file claims: a value stored once can stand for any number of values.
        sizes = [8 * sum(column.num_values for column in _columns(group)) for group in _groups(metadata)]
        at_once, most = sum(sizes), MAX_DECODED_BYTES
        if table in ("loads", "ranks"):  # which are read by row groups
            at_once, most = max(sizes, default=0), MAX_LOADS_BYTES
        if at_once > most:
            raise FormatError(f"more than {most >> 20} MiB would have to be read at once")

    def _check_widths(self, metadata: pq.FileMetaData) -> None:
        """Check that the lists have the lengths of the shape before memory is allocated for them."""
        shape = self.shape
        if shape is None or metadata.num_rows % shape.num_moe_layers:
            raise FormatError("its rows do not match the layers in the manifest")
        load_shape((shape.ep_size, shape.num_moe_layers, shape.num_physical_experts), self._info, None)
        wanted = {"rank_load": shape.ep_size, "load": shape.num_physical_experts}
        for group in _groups(metadata):
            for column in _columns(group):
                width = wanted.get(column.path_in_schema.split(".")[0])
                if width is not None and column.num_values != group.num_rows * width:
                    raise FormatError("the lengths of its lists do not match the manifest")

    def _check_minutes(self, metadata: pq.FileMetaData) -> None:
        """Likewise the lists of ``minutes``, of which a row may have many."""
        if self.shape is not None:
            shape = self.shape
            load_shape((shape.ep_size, shape.num_moe_layers, shape.num_physical_experts), self._info, None)
        for group in _groups(metadata):
            for column in _columns(group):
                name = column.path_in_schema.split(".")[0]
                # A list that is null, or has no item, counts as one value.
                width = max(1, width_of(name, self.shape)) if name in MINUTES_LISTS else 1
                allowed = {group.num_rows * width, *([group.num_rows] if name in NULLABLE_LISTS else [])}
                if column.num_values not in allowed:
                    raise FormatError("the lengths of its lists do not match the manifest")

    @property
    def has_minutes(self) -> bool:
        """Whether it has sums per minute; one from before version 1.2 has none."""
        return "minutes" in self._entry.files

    def minutes(
        self,
        columns: Sequence[str],
        rows_bytes: int = ROWS_BYTES,
        turn: AbstractContextManager[object] = NO_TURN,
    ) -> Iterator[Minutes]:
        """The rows of its sums per minute, about ``rows_bytes`` at a time, with some columns.

        It must have some. ``turn`` is held from the first row on: many threads can wait for a bucket, but
        each that decodes takes memory. Raises DamagedSegmentError.
        """
        names = [*dict.fromkeys((*columns, "active"))]  # by which rows of scope local are known
        at_once = max(1, rows_bytes // self._minutes_row(names))
        compressed = sum(
            column.total_compressed_size
            for group in _groups(self._footer_of("minutes"))
            for column in _columns(group)
            if column.path_in_schema.split(".")[0] in names
        )
        remote = isinstance(self.path, bucket.Remote)
        with self._open("minutes", streamed=not remote or compressed > MAX_BUFFERED_BYTES) as opened:
            path, metadata = self.file_path("minutes"), opened.file.metadata
            with reading_faults(self, "minutes", path):
                if opened.read_at is not None:
                    _check_pages(opened.read_at, metadata, [*range(metadata.num_row_groups)], names)
                # Requests begin here.
                batches = opened.file.iter_batches(at_once, columns=names, use_threads=False)
            with turn:
                while True:
                    with reading_faults(self, "minutes", path):
                        batch = next(batches, None)
                        if batch is None:
                            return
                        rows = Minutes.from_table(pa.Table.from_batches([batch]), self.shape)
                    yield rows

    def minutes_bytes(self, columns: Sequence[str]) -> int:
        """What the rows of its sums per minute take when they are decoded, with some columns, about."""
        return self._entry.files["minutes"].rows * self._minutes_row(columns)

    def _minutes_row(self, columns: Sequence[str]) -> int:
        return sum(8 * (width_of(name, self.shape) if name in MINUTES_LISTS else 1) for name in columns)

    def _footer_of(self, table: str) -> pq.FileMetaData:
        if table not in self._metadata:
            with self._open(table):
                pass
        return self._metadata[table]

    def _read(self, opened: _TableFile, table: str, columns: list[str], group: int | None = None) -> pa.Table:
        """Some columns of a row group, or of all."""
        file = opened.file
        with reading_faults(self, table, self.file_path(table)):
            wanted = list(range(file.metadata.num_row_groups)) if group is None else [group]
            if opened.read_at is not None:
                _check_pages(opened.read_at, file.metadata, wanted, columns)
            return file.read_row_groups(wanted, columns=columns, use_threads=False).combine_chunks()

    def _read_all(self, table: str, columns: list[str]) -> pa.Table | None:
        if table not in self._entry.files:
            return None
        with self._open(table) as file:
            return self._read(file, table, columns)

    def steps(self) -> StepRows:
        table = self._read_all("steps", SCHEMAS["steps"].names)
        if table is None:
            return StepRows.concat([])
        with reading_faults(self, "steps", self.file_path("steps")):
            column = {name: table.column(name).combine_chunks() for name in table.column_names}
            status, statuses = _codes(column["status"])
            if not set(statuses) <= set(STATUS_LABELS) or status.min(initial=0) < 0:
                raise FormatError("it holds an unknown status")
            number = np.array([*map(STATUS_LABELS.index, statuses)], np.uint8)
            phase, phases = _codes(column["phase"])
            step_ms, device_ms = (_milliseconds(column.get(name), len(table)) for name in DURATIONS)
            return StepRows(
                step=_steps(column["step"]),
                time_ns=values_of(column["time"]),
                monotonic_ns=values_of(column["monotonic_ns"]),
                status=number[status],
                num_tokens=values_of(column["num_tokens"]),
                phase=phase.astype(np.int32),
                step_ms=step_ms,
                device_ms=device_ms,
                phases=tuple(phases),
            )

    def step_times(self) -> tuple[Int64, Int64]:
        table = self._read_all("steps", ["step", "monotonic_ns"])
        if table is None:
            return self._times_of_minutes()
        with reading_faults(self, "steps", self.file_path("steps")):
            step, clock = (table.column(name).combine_chunks() for name in table.column_names)
            return _steps(step), values_of(clock)

    def _times_of_minutes(self) -> tuple[Int64, Int64]:
        """Without steps: the first and last step of each minute that is kept, and of the segment."""
        entry = self._entry
        if entry.times is None:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        steps, times = [np.array([entry.first_step, entry.last_step])], [np.array(entry.times)]
        for rows in self.minutes(_EDGES) if self.has_minutes else ():
            steps += [rows["first_step"], rows["last_step"]]
            times += [rows["first_time_ns"], rows["last_time_ns"]]
        step, first = np.unique(np.concatenate(steps), return_index=True)
        offset = self._info.created_unix_ns - self._info.created_monotonic_ns
        return step, np.concatenate(times)[first] - offset

    def load_steps(self) -> Int64:
        if self._load_steps is None:
            if self._by_step not in self._entry.files or self.shape is None:
                self._load_steps = np.empty(0, np.int64)
            else:
                with self._open(self._by_step) as file:
                    # Every layer has the same steps, so the first row group has them all.
                    table = self._read(file, self._by_step, ["step", "layer"], 0)
                    with reading_faults(self, self._by_step, self.file_path(self._by_step)):
                        n = file.file.metadata.num_rows // self.shape.num_moe_layers
                        steps = _steps(table.column("step").combine_chunks())[:n]
                        self._check_order(table, 0, steps)
                        self._check_groups(file.file.metadata, steps)
                        self._load_steps = steps
        return self._load_steps

    def _check_order(self, table: pa.Table, layer: int, steps: Int64) -> int:
        """Check that a row group is ordered by layer and step. Returns the number of its layers."""
        n = len(steps)
        count, rest = divmod(table.num_rows, n) if n else (0, table.num_rows)
        numbers = self._layer_numbers()[layer : layer + count]
        if (
            rest
            or not np.array_equal(values_of(table.column("step").combine_chunks()), np.tile(steps, count))
            or not np.array_equal(values_of(table.column("layer").combine_chunks()), np.repeat(numbers, n))
        ):
            raise FormatError("its rows are not ordered by layer and step")
        return count

    def _check_groups(self, metadata: pq.FileMetaData, steps: Int64) -> None:
        """Check by the footer that each row group has the next layers, and all steps of each."""
        layer, numbers = 0, self._layer_numbers()
        for group in _groups(metadata) if len(steps) else ():
            count, rest = divmod(group.num_rows, len(steps))
            edges = {
                "step": (int(steps[0]), int(steps[-1])),
                "layer": (numbers[layer], numbers[layer + count - 1]) if count else (),
            }
            for column in _columns(group):
                wanted = edges.get(column.path_in_schema)
                found = None if wanted is None else column.statistics
                if rest or (wanted is not None and (found is None or (found.min, found.max) != wanted)):
                    raise FormatError("its rows are not ordered by layer and step")
            layer += count

    def _layer_numbers(self) -> list[int]:
        assert self.shape is not None
        return self._info.layer_numbers(self.shape.num_moe_layers)

    def _by_layers(self, column: str, width: int, first: int, last: int, steps: slice) -> Parts[Any]:
        """``(layer, values [layers, n, width])`` of the layers and steps asked for, by row groups."""
        name = self._by_step
        n, path = len(self.load_steps()), self.file_path(name)
        begin, end, _ = steps.indices(n)
        layer = 0
        for group in _groups(self._metadata[name]) if n else ():
            count = group.num_rows // n
            if layer < last and layer + count > first:
                chunk = next(c for c in _columns(group) if c.path_in_schema.split(".")[0] == column)
                low, high = max(first, layer), min(last, layer + count)
                rows = (low - layer) * n + begin, (high - 1 - layer) * n + end
                # Many ranks are read together, so no file stays open between row groups.
                with reading_faults(self, name, path), places.open_for_arrow(path) as source:
                    # Of a bucket, each read is a request; and what is needed as a whole is read as a whole.
                    at_once = isinstance(path, bucket.Remote) or rows == (0, group.num_rows)
                    values = read_lists(source.read_at, chunk, width, rows, at_once=at_once)
                yield low, _layers_of(values, high - low, n, end - begin)
            layer += count

    def rank_loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        assert self.shape is not None
        return self._by_layers("rank_load", self.shape.ep_size, first, last, steps)

    def loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        assert self.shape is not None
        if not self.has_loads:
            # It was thinned after the reader had chosen what to read.
            raise DamagedSegmentError(self, "loads", self.path, "experts' loads are no longer kept")
        return self._by_layers("load", self.shape.num_physical_experts, first, last, steps)

    def verify(self, table: str) -> None:
        """Read the whole file of a table, which checks every checksum in it. Raises DamagedSegmentError."""
        layer, steps = 0, self.load_steps() if table == self._by_step else None
        with self._open(table) as file:
            for group in range(file.file.metadata.num_row_groups):
                rows = self._read(file, table, SCHEMAS[table].names, group)
                if steps is not None:
                    with reading_faults(self, table, self.file_path(table)):
                        layer += self._check_order(rows, layer, steps)

    def damage(self) -> dict[str, DamagedSegmentError]:
        """The tables that are missing, damaged or not what the manifest lists. Reads all of them."""
        found = {}
        for table in self._entry.files.keys() & SCHEMAS.keys():
            try:
                self.verify(table)
            except DamagedSegmentError as fault:
                found[table] = fault
        return found

    def supersedes(self, journal: JournalSegment | None) -> bool:
        """Whether to read it rather than the journal of its segment, which is beside it.

        A power cut can undo the journal's removal, and bring back an older or shorter state of it. So the
        journal counts only if the files do not match the manifest, and it has more to offer.

        Args:
            journal: None if nothing of it can be read.
        """
        steps = 0 if journal is None else len(journal.steps.step)
        if not steps or journal is None or self._entry.thinned is not None:
            return True  # what was retired does not come back
        if journal.limited or not self.step_rows:  # its writer lives, or a copy has only the placements
            return False
        damaged = self.damage().keys()
        return not damaged or (damaged == {"placements"} and steps < self.step_rows)

    def sums_are_true(self) -> bool:
        """Whether the manifest's sums equal those of the loads, all of which are read."""
        if self._entry.sums is None or self.shape is None:
            return True
        return all(
            self.layer_sums_are_true(index, load)
            for layer, values in self.loads(0, self.shape.num_moe_layers)
            for index, load in enumerate(values, layer)
        )

    def layer_sums_are_true(self, index: int, load: npt.NDArray[Any]) -> bool:
        """Likewise those of one layer, whose loads in all steps are ``[n, physical]``."""
        sums = self.sums
        if sums is None:
            return True
        rows = sums.layer == index
        first = np.searchsorted(self.load_steps(), sums.step[rows])
        if first[0] != 0 or (np.diff(first, append=len(load)) <= 0).any():
            return False
        parts = zip(np.split(load, first[1:]), sums.load[rows], strict=True)
        return all(np.array_equal(part.sum(axis=0, dtype=np.int64), stated) for part, stated in parts)

    def placement_steps(self) -> Int64:
        """The steps of the rows of ``placements``. Raises DamagedSegmentError."""
        table = self._read_all("placements", ["step"])
        if table is None:
            return np.empty(0, np.int64)
        with reading_faults(self, "placements", self.file_path("placements")):
            return _steps(table.column("step").combine_chunks())

    def placements(self) -> PlacementRows:
        table = self._read_all("placements", ["step", "layer", "ep_size", "physical_to_logical"])
        if table is None:
            empty = np.empty(0, np.int32)
            return PlacementRows(np.empty(0, np.int64), empty, empty, [])
        with reading_faults(self, "placements", self.file_path("placements")):
            lists = table.column("physical_to_logical").combine_chunks()
            flat, offsets = values_of(lists.values), values_of(lists.offsets)
            if flat.min(initial=0) < EMPTY_SLOT or flat.max(initial=0) >= self._info.num_logical_experts:
                raise FormatError("it holds a placement that is out of range")
            slots = [flat[a:b] for a, b in itertools.pairwise(offsets)]
            numbers = values_of(table.column("layer").combine_chunks())
            index = {number: i for i, number in enumerate(self._info.moe_layers or ())}
            layers = np.array([index.get(n, -1) for n in numbers], np.int32) if index else numbers
            if layers.min(initial=0) < 0:
                raise FormatError("it names a layer that the session does not have")
            ep_size = values_of(table.column("ep_size").combine_chunks())
            return PlacementRows(_steps(table.column("step").combine_chunks()), layers, ep_size, slots)


@frozen
class _TableFile:
    """The open file of a table; ``read_at`` is None if its pages are not checked."""

    file: pq.ParquetFile
    read_at: Callable[[int, int], bytes] | None


def _check_pages(
    read_at: Callable[[int, int], bytes], metadata: pq.FileMetaData, groups: list[int], columns: list[str]
) -> None:
    """Raise FormatError if pages would take more memory than their values can need."""
    for group in groups:
        for column in _columns(metadata.row_group(group)):
            name = column.path_in_schema.split(".")[0]
            text = name in TEXT_COLUMNS
            if name not in columns or (not text and column.total_compressed_size <= HARMLESS_BYTES):
                continue
            size, values = decoded_bytes(read_at, column), column.num_values
            if size > values * (TEXT_BYTES if text else NUMBER_BYTES) + PAGE_BYTES:
                raise FormatError(f"its column {name!r} takes {size:,} bytes for {values:,} values")


def _groups(metadata: pq.FileMetaData) -> Iterator[Any]:
    return map(metadata.row_group, range(metadata.num_row_groups))


def _columns(group: Any) -> Iterator[Any]:
    return map(group.column, range(group.num_columns))


def _steps(array: pa.Array) -> Int64:
    """Step numbers. Raises FormatError if one is impossible."""
    steps: Int64 = values_of(array)
    if not 0 <= steps.min(initial=0) <= steps.max(initial=0) < MAX_NUMBER:
        raise FormatError("it holds an invalid step number")
    return steps


def _milliseconds(array: pa.Array | None, n: int) -> Float32:
    """Durations of n steps, NaN for null or if the file has no such column. Raises FormatError."""
    if array is None:
        return unknown_ms(n)
    values: Float32 = values_of(array, np.nan)
    if impossible_ms(values):
        raise FormatError("it holds a duration that is negative or infinite")
    return values


def _layers_of(values: npt.NDArray[Any], layers: int, n: int, count: int) -> npt.NDArray[Any]:
    """The first ``count`` of every ``n`` rows, by layer: ``[layers, count, width]``, not a copy.

    ``values``: ``[(layers - 1) * n + count, width]``.
    """
    row, cell = values.strides
    return np.lib.stride_tricks.as_strided(
        values, (layers, count, values.shape[1]), (n * row, row, cell), writeable=False
    )


def _codes(array: pa.DictionaryArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """A text column as codes into its distinct texts; -1 for null. Raises FormatError."""
    codes = values_of(array.indices).astype(np.int64)
    texts = [str(text) for text in array.dictionary.to_pylist()]
    # A damaged page header, which no checksum covers, can hide the dictionary.
    if codes.min(initial=0) < -1 or codes.max(initial=-1) >= len(texts):
        raise FormatError("it refers to a text that it does not contain")
    return codes, texts


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema without the effect of ``read_dictionary``."""
    types = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema]
    return pa.schema([f.with_type(t) for f, t in zip(schema, types, strict=True)])
