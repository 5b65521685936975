"""Long tables: a row per layer and expert, or per step, layer and slot, as .csv or .parquet.

SGLang's older recorder writes ``layer_id,expert_id,count``, a file per rank, without the rows of zeros;
``eplb-analyze export loads`` writes ``step,layer,physical,rank,logical,load,time``. A table is read twice:
for its extent, then into a dense array in a temporary file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.transfer.importers.files import regular
from eplb_analyze.transfer.importers.source import (
    MAX_COUNT,
    UNKNOWN_ROW,
    Chunk,
    Options,
    Reading,
    count_experts,
    plain_int,
    sampling,
)
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_LAYERS, MAX_LOAD, Scope

#: The names of each column, in lower case.
NAMES = {
    "step": ("step", "forward_pass_id", "iteration"),
    "layer": ("layer", "layer_id", "layer_idx"),
    "slot": ("physical", "physical_id", "physical_expert", "physical_expert_id", "slot"),
    "expert": ("logical", "expert", "expert_id", "logical_id", "logical_expert", "logical_expert_id"),
    "rank": ("rank", "ep_rank"),
    "count": ("load", "count", "tokens", "token_count"),
    "time": ("time",),
}
#: The largest value of each column of numbers.
LIMITS = {"step": NO_END, "layer": MAX_LOAD, "slot": MAX_EXPERTS, "expert": MAX_EXPERTS, "rank": MAX_EXPERTS}
#: The key of the metadata in the Parquet files of ``export loads``.
METADATA_KEY = b"eplb_analyze"
#: The most cells of a dense array for each row of the table, if it has more than SMALL cells.
MAX_CELLS_PER_ROW, SMALL = 100, 1 << 24
BLOCK_BYTES = 8 << 20
BATCH_ROWS = 1 << 18
FORM = "a long table has the columns layer_id, expert_id and count, or those of `export loads`"


def is_table(path: Path) -> bool:
    """Whether a file is a long table: Parquet, or CSV whose first line names a layer and a count."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start[:4] == b"PAR1":
        return True
    return {"layer", "count"} <= {_role(name) for name in _header(start)}


def has_slots(path: Path) -> bool:
    """Whether a file is a long table with a row per slot, as of ``export loads``."""
    return is_table(path) and "slot" in _Table(path).columns


def _header(start: bytes) -> list[str]:
    """The names in the first line of a CSV file."""
    first = (start.splitlines() or [b""])[0]
    text = first.decode(errors="replace").removeprefix("\ufeff")
    return [name.strip().strip('"') for name in text.split(_delimiter(first))]


def _delimiter(line: bytes) -> str:
    return next((c for c in ",;\t" if c.encode() in line), ",")


def _role(name: str) -> str | None:
    return next((role for role, names in NAMES.items() if name.lower() in names), None)


class _Table:
    """One file: its batches of columns, by role."""

    def __init__(self, path: Path) -> None:
        self.path = path
        regular(path)
        with path.open("rb") as file:
            first = file.readline(4096)
        self.is_parquet = first[:4] == b"PAR1"
        self._delimiter = _delimiter(first)
        self.metadata: dict[str, Any] = {}
        with self._errors():
            if self.is_parquet:
                schema = pq.read_schema(path)
                names = schema.names
                found = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
                self.metadata = found if isinstance(found, dict) else {}
            else:
                names = _header(first)
        roles = [_role(name) for name in names]
        self.columns = {role: name for role, name in zip(roles, names, strict=True) if role is not None}
        if len(self.columns) < sum(role is not None for role in roles) or not self._usable():
            raise DumpError(f"{path}: its columns are {', '.join(map(str, names))[:200]}; {FORM}")
        self.left_out = [name for name, role in zip(names, roles, strict=True) if role is None]
        self._names = names

    def _usable(self) -> bool:
        return {"layer", "count"} <= self.columns.keys() and bool({"slot", "expert"} & self.columns.keys())

    def _errors(self) -> Any:
        return _Errors(self.path)

    def batches(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Columns of some rows by role: int64, ``count`` float64 or int64; ``expert`` -2 if it is null.

        Raises DumpError.
        """
        with self._errors():
            for batch in self._read():
                yield self._checked(batch)

    def _read(self) -> Iterator[pa.RecordBatch]:
        wanted = list(self.columns.values())
        if self.is_parquet:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False)
            return
        types: dict[str, pa.DataType] = dict.fromkeys(wanted, pa.int64())
        types[self.columns["count"]] = pa.float64()
        if "time" in self.columns:
            types[self.columns["time"]] = pa.timestamp("ns", tz="UTC")
        reader = pacsv.open_csv(
            self.path,
            read_options=pacsv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=self._names, skip_rows=1
            ),
            parse_options=pacsv.ParseOptions(delimiter=self._delimiter),
            convert_options=pacsv.ConvertOptions(column_types=types, include_columns=wanted),
        )
        yield from reader

    def _checked(self, batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
        found: dict[str, npt.NDArray[Any]] = {}
        for role, name in self.columns.items():
            column = batch.column(batch.schema.get_field_index(name))
            if role == "time":
                nanoseconds = column.cast(pa.timestamp("ns", tz="UTC")).cast(pa.int64())
                found[role] = nanoseconds.fill_null(-1).to_numpy(zero_copy_only=False)
                continue
            whole = pa.types.is_integer(column.type)
            if not (whole or (role == "count" and pa.types.is_floating(column.type))):
                raise DumpError(
                    f"{self.path}: its column {name} has the type {column.type}; it must be numeric"
                )
            may_be_null = role == "expert" and "slot" in self.columns
            if column.null_count and not may_be_null:
                raise DumpError(f"{self.path}: a row without a value of {name}")
            values = column.cast(pa.int64()) if whole else column
            if may_be_null:
                values = values.fill_null(UNKNOWN_ROW)
            array = values.to_numpy(zero_copy_only=False)
            if role != "count" and len(array):
                least = 0 if not may_be_null else UNKNOWN_ROW if column.null_count else EMPTY_SLOT
                if array.min() < least or array.max() >= LIMITS[role]:
                    odd = array.max() if array.max() >= LIMITS[role] else array.min()
                    raise DumpError(f"{self.path}: its column {name} has the value {odd}")
            found[role] = array
        return found


class _Errors:
    """Turns Arrow's errors into a DumpError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(
            error, pa.ArrowException | OSError | UnicodeDecodeError | ValueError
        ) and not isinstance(error, DumpError):
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DumpError(f"{self._path}: it is not a long table of numbers ({text})") from None


@dataclass
class _Extent:
    """What the rows of all files span."""

    rows: int = 0
    layers: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    steps: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    #: By step: its rows, slots or experts, and ranks that slots lie on.
    rows_of: dict[int, int] = field(default_factory=dict)
    width: dict[int, int] = field(default_factory=dict)
    ep_size: dict[int, int] = field(default_factory=dict)
    time: dict[int, int] = field(default_factory=dict)
    #: Steps of each counting rank.
    by_rank: dict[int, set[int]] = field(default_factory=dict)
    #: Whether there are rows of zero, so that none are left out.
    zeros: bool = False

    def level(self) -> None:
        """Give all steps one width and EP size, unless every step has all its rows: then both can change."""
        if any(self.rows_of[step] != len(self.layers) * width for step, width in self.width.items()):
            for sizes in (self.width, self.ep_size):
                sizes.update(dict.fromkeys(sizes, max(sizes.values(), default=0)))


def read(path: Path, files: dict[int | None, Path], options: Options) -> Reading:
    """One table, under None, or a table for each rank. Raises DumpError, UsageError."""
    tables = {rank: _Table(file) for rank, file in files.items()}
    first = next(iter(tables.values()))
    for table in tables.values():
        if table.columns.keys() != first.columns.keys():
            raise DumpError(f"{table.path}: its columns differ from those of {first.path.name}")
    by_slot = "slot" in first.columns
    # Beside a slot, the rank is the one that it lies on; beside an expert alone, the one that counted.
    counting = None not in tables or ("rank" in first.columns and not by_slot)
    extent = _extent(tables, by_slot, counting)
    if not extent.rows:
        raise DumpError(f"{path}: it has no row")
    if len(extent.layers) > MAX_LAYERS:
        raise DumpError(f"{path}: it has {len(extent.layers):,} layers, more than any model")
    replication = _replication(first, options) if by_slot else None
    width = max(extent.width.values())
    if not by_slot and options.num_logical_experts is not None:
        if options.num_logical_experts < width:
            raise UsageError(
                f"{path}: it has expert {width - 1}, so the model has more than "
                f"{options.num_logical_experts} experts (--num-experts)"
            )
        width = options.num_logical_experts
    dense = _Dense(path, tables, extent, width, by_slot, counting, replication or 1)
    reading = Reading(
        "table", "a row per slot" if by_slot else "a row per expert",
        [table.path for table in tables.values()], by_slot, Scope.LOCAL if counting else Scope.GLOBAL,
        {rank: dense.part(i) for i, rank in enumerate(dense.ranks)}, len(extent.layers), width,
        layers=tuple(extent.layers.tolist()), token_replication=replication,
        timed="time" in first.columns and min(extent.time.values()) >= 0,
    )  # fmt: skip
    if None not in tables:
        reading.files_of = {rank: [table.path] for rank, table in tables.items() if rank is not None}
    if first.left_out:
        reading.notes.append(f"columns left out: {', '.join(first.left_out)[:200]}")
    if "step" in first.columns:
        reading.interval = sampling(extent.steps, reading.notes)
    else:
        reading.unknown["passes"] = "how many forward passes the single step sums up"
    if by_slot:
        _placed(reading, first, dense, extent, options)
    else:
        reading.num_logical_experts = width
        if options.num_logical_experts is None and not dense.full:
            reading.assumed["experts"] = (
                f"the model has {width} experts: the highest expert with tokens sets the number, because "
                f"rows without tokens may be missing (--num-experts)"
            )
    model = first.metadata.get("model")
    reading.model = model if isinstance(model, str) and model else None
    return reading


def _replication(table: _Table, options: Options) -> int | None:
    """By how much ``export loads`` divided the counts, as far as it is known."""
    stated = plain_int(table.metadata.get("token_replication"), 1, MAX_LOAD)
    return stated or options.token_replication


def _extent(tables: dict[int | None, _Table], by_slot: bool, counting: bool) -> _Extent:
    found = _Extent()
    for of_file, table in tables.items():
        if of_file is not None:
            found.by_rank[of_file] = set()
        for batch in table.batches():
            n = len(batch["layer"])
            if not n:
                continue
            found.rows += n
            found.layers = np.union1d(found.layers, batch["layer"])
            found.zeros |= bool((batch["count"] == 0).any())
            step = batch.get("step")
            steps, of_row = (np.zeros(1, np.int64), np.zeros(n, np.intp)) if step is None else np.unique(
                step, return_inverse=True
            )  # fmt: skip
            found.steps = np.union1d(found.steps, steps)
            for one, count in zip(steps.tolist(), np.bincount(of_row).tolist(), strict=True):
                found.rows_of[one] = found.rows_of.get(one, 0) + count
            columns = batch["slot"] if by_slot else batch["expert"]
            _raise_to(found.width, steps, of_row, columns + 1)
            if by_slot and "rank" in batch:
                _raise_to(found.ep_size, steps, of_row, batch["rank"] + 1)
            if "time" in batch:
                _raise_to(found.time, steps, of_row, batch["time"])
            if of_file is not None:
                found.by_rank[of_file].update(steps.tolist())
            elif counting:
                for rank in np.unique(batch["rank"]).tolist():
                    own = steps[np.unique(of_row[batch["rank"] == rank])]
                    found.by_rank.setdefault(rank, set()).update(own.tolist())
    if None not in tables and "step" not in next(iter(tables.values())).columns:
        for own in found.by_rank.values():  # the one step of a rank without a row had no tokens there
            own.add(0)
    if by_slot:
        found.level()
    return found


def _raise_to(largest: dict[int, int], steps: Int64, of_row: npt.NDArray[np.intp], values: Int64) -> None:
    """The largest value of each step so far."""
    top = np.full(len(steps), -1, np.int64)
    np.maximum.at(top, of_row, values)
    for step, value in zip(steps.tolist(), top.tolist(), strict=True):
        largest[step] = max(value, largest.get(step, -1))


def zeros_on_disk(
    path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, purpose: str = "sort it"
) -> npt.NDArray[Any]:
    """An array of zeros in a temporary file that has no name. Raises DumpError if the disk is full."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            # A page that cannot be written later would kill the process.
            reserve = getattr(os, "posix_fallocate", None)
            reserve(file.fileno(), 0, size) if reserve else file.truncate(size)
            array: npt.NDArray[Any] = np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            where = tempfile.gettempdir()
            raise DumpError(
                f"{path}: {size:,} bytes in {where} are needed to {purpose}: {error.strerror}; set TMPDIR"
            ) from None
    return array


class _Dense:
    """Counts and experts of a table as arrays ``[ranks, steps, layers, width]``."""

    def __init__(
        self,
        path: Path,
        tables: dict[int | None, _Table],
        extent: _Extent,
        width: int,
        by_slot: bool,
        counting: bool,
        replication: int,
    ) -> None:
        self.ranks = sorted(extent.by_rank) if counting else [0]
        self._extent, self._by_slot, self._replication = extent, by_slot, replication
        shape = len(self.ranks), len(extent.steps), len(extent.layers), width
        cells = math.prod(shape)
        if cells > max(SMALL, MAX_CELLS_PER_ROW * extent.rows):
            raise DumpError(
                f"{path}: its {extent.rows:,} rows span {cells:,} counts, so too many are missing"
            )
        # One more than the count; 0: no row.
        self._counts = zeros_on_disk(path, shape, np.int64)
        # Two more than the expert; 0: not known.
        named = by_slot and "expert" in next(iter(tables.values())).columns
        self._experts = zeros_on_disk(path, shape[1:], np.int32) if named else None
        for of_file, table in tables.items():
            for batch in table.batches():
                self._fill(table.path, batch, of_file, counting)
        filled = sum(int(np.count_nonzero(self._counts[:, low : low + 64])) for low in range(0, shape[1], 64))
        if filled < extent.rows:
            raise DumpError(
                f"{path}: {extent.rows - filled:,} rows repeat the step, layer and "
                f"{'slot' if by_slot else 'expert'} of another; recordings cannot be added up"
            )
        self.full = extent.zeros or filled == cells

    def _fill(
        self, path: Path, batch: dict[str, npt.NDArray[Any]], of_file: int | None, counting: bool
    ) -> None:
        if not len(batch["layer"]):
            return
        extent = self._extent
        step = np.searchsorted(extent.steps, batch["step"]) if "step" in batch else 0
        layer = np.searchsorted(extent.layers, batch["layer"])
        column = batch["slot"] if self._by_slot else batch["expert"]
        rank: Any = 0
        if of_file is not None:
            rank = self.ranks.index(of_file)
        elif counting:
            rank = np.searchsorted(self.ranks, batch["rank"])
        if self._by_slot and "rank" in batch:
            self._check_ranks(path, batch)
        self._counts[rank, step, layer, column] = self._whole(path, batch["count"]) + 1
        if self._experts is not None:
            self._experts[step, layer, column] = batch["expert"] - UNKNOWN_ROW

    def _whole(self, path: Path, values: npt.NDArray[Any]) -> Int64:
        """Counts as the engine made them, before they were divided by the token replication."""
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DumpError(f"{path}: a count that is NaN or infinite")
        if values.max() > MAX_COUNT // self._replication or values.min() < 0:
            raise DumpError(f"{path}: a count that is negative or above 2^53")
        raw = values * self._replication
        whole = raw if raw.dtype.kind == "i" else np.rint(raw)
        odd = np.abs(raw - whole) > 1e-6
        if odd.any():
            raise DumpError(
                f"{path}: {values[odd][0]:g} is not a whole number of tokens; if `export loads` divided "
                f"it by the token replication, pass --token-replication"
            )
        counts: Int64 = whole.astype(np.int64)
        return counts

    def _check_ranks(self, path: Path, batch: dict[str, npt.NDArray[Any]]) -> None:
        extent = self._extent
        step = batch.get("step", np.zeros(len(batch["slot"]), np.int64))
        for one in np.unique(step).tolist():
            slots, ranks = extent.width[one], extent.ep_size[one]
            here = step == one
            if slots % ranks or (batch["slot"][here] // (slots // ranks) != batch["rank"][here]).any():
                raise DumpError(
                    f"{path}: step {one}: its {slots} slots are not on {ranks} ranks in ascending order"
                )

    def part(self, index: int) -> Callable[[], Iterator[Chunk]]:
        return lambda: self._chunks(index)

    def _chunks(self, index: int) -> Iterator[Chunk]:
        extent = self._extent
        own = extent.by_rank.get(self.ranks[index])
        placement: Int32 | None = None
        wide = self._counts.shape[3]
        for low, high in self._ranges():
            steps = extent.steps[low:high]
            width = extent.width[int(steps[0])] if self._by_slot else wide
            if self._experts is not None:
                rows = self._experts[low, :, :width] + UNKNOWN_ROW
                # A slot without a row is as good as an unknown one, and so is its layer.
                known = np.where((rows == UNKNOWN_ROW).any(axis=1)[:, None], UNKNOWN_ROW, rows).astype(
                    np.int32
                )
                # The same array as long as nothing changes, as the writer compares by identity.
                if placement is None or not np.array_equal(known, placement):
                    placement = known
            keep = np.flatnonzero([own is None or int(step) in own for step in steps])
            if not len(keep):
                continue
            load = np.maximum(self._counts[index, low:high, :, :width][keep] - 1, 0)
            yield Chunk(
                steps[keep],
                load,
                placement,
                extent.ep_size.get(int(steps[0])),
                time_ns=self._time(steps[keep]),
            )

    def _time(self, steps: Int64) -> Int64 | None:
        if not self._extent.time or min(self._extent.time.values()) < 0:
            return None
        return np.array([self._extent.time[int(step)] for step in steps], np.int64)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of steps with one shape and placement, of at most 64 steps."""
        extent = self._extent
        n = len(extent.steps)
        edges = {*range(0, n, 64), n}
        for i in range(1, n):
            before, now = int(extent.steps[i - 1]), int(extent.steps[i])
            same_shape = not self._by_slot or (
                extent.width[before] == extent.width[now]
                and extent.ep_size.get(before) == extent.ep_size.get(now)
            )
            moved = self._experts is not None and not np.array_equal(self._experts[i - 1], self._experts[i])
            if moved or not same_shape:
                edges.add(i)
        yield from itertools.pairwise(sorted(edges))

    def experts_named(self) -> Int32:
        """All experts in any slot, ascending; -1 and -2 for empty and unknown ones."""
        if self._experts is None:
            return np.empty(0, np.int32)
        parts = [np.unique(self._experts[low : low + 64]) for low in range(0, len(self._experts), 64)]
        named: Int32 = (np.unique(np.concatenate(parts)) + UNKNOWN_ROW).astype(np.int32)
        return named


def _placed(reading: Reading, table: _Table, dense: _Dense, extent: _Extent, options: Options) -> None:
    """What a table of slots says about ranks and placements."""
    named = dense.experts_named()
    experts = named[named >= 0]
    reading.placed = bool(len(experts))
    stated = plain_int(table.metadata.get("num_logical_experts"), 1, MAX_EXPERTS)
    reading.num_logical_experts = stated or (count_experts(experts) if reading.placed else None)
    sizes = [extent.ep_size.get(int(step)) for step in extent.steps]
    reading.ep_size = sizes[0]
    reading.width = extent.width[int(extent.steps[0])]
