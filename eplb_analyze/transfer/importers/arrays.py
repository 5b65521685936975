"""Plain arrays: ``[layers, experts]`` as deepseek-ai/EPLB, ``[steps, layers, experts]``, vllm-ascend's heat.

The files are .npy, .npz, .pt, .csv or .json. They say nothing but the shape; only a .npz file can have more.
There is one file, or one per rank.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.transfer.importers import step_columns, table, torch_files
from eplb_analyze.transfer.importers.files import (
    MAX_TEXT,
    Array,
    by_rank,
    depth_of,
    integers,
    json_items,
    listing,
    npz_shapes,
    one_of,
    rank_of,
    read_json,
    read_npy,
    read_npz,
    regular,
    require_all_ranks,
)
from eplb_analyze.transfer.importers.source import Chunk, Options, Reading, count_experts, ordered_rows
from eplb_analyze.transfer.importers.step_columns import StepColumns
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS, Scope

PASSES = "how many forward passes the single step sums up"
#: The key of a JSON document with a record for each step, and the keys of its loads.
HISTORY = "load_history"
LOGICAL, PHYSICAL = "logical_expert_load", "physical_expert_load"
#: How many steps are in a chunk.
CHUNK = 256


@frozen
class _Rows:
    """The counts of one file, one row per step."""

    layers: int
    width: int
    chunks: Callable[[], Iterator[Chunk]]
    kind: str = "[steps, layers, experts]"
    by_slot: bool = False
    placement: Int32 | None = None


def read(path: Path, options: Options) -> Reading:
    """Counts by expert: ``[layers, experts]``, or with steps first. Raises DumpError, UsageError."""
    files = _files(path, options)
    first = next(iter(files.values()))
    if table.is_table(first):
        return table.read(path, files, options)
    found = {rank: _open(file, options) for rank, file in files.items()}
    rows = next(iter(found.values()))
    for rank, other in found.items():
        if (other.layers, other.width, other.kind) != (rows.layers, rows.width, rows.kind):
            raise DumpError(f"{files[rank]}: its shape is not that of {first.name}")
    local = None not in files
    reading = Reading(
        "array", rows.kind, list(files.values()), rows.by_slot, Scope.LOCAL if local else Scope.GLOBAL,
        {rank or 0: each.chunks for rank, each in found.items()}, rows.layers, rows.width,
    )  # fmt: skip
    if local:
        reading.files_of = {rank: [file] for rank, file in files.items() if rank is not None}
    if rows.placement is not None:
        reading.placed = True
        reading.num_logical_experts = count_experts(rows.placement)
    elif not rows.by_slot:
        reading.num_logical_experts = rows.width
    if rows.kind == HISTORY:
        reading.assumed["step_order"] = f"the records of {HISTORY} are in time order"
        reading.unknown["step_numbers"] = "the step numbers: records are counted from 0"
    elif rows.kind == "[layers, experts]":
        reading.unknown["passes"] = PASSES
    else:
        ordered_rows(reading, options, "an array does not state whether its rows are in time order")
        reading.unknown["step_numbers"] = "the step numbers: rows are counted from 0"
    return reading


def read_ascend(path: Path, options: Options) -> Reading:
    """vllm-ascend's heat: ``[layers, ranks, slots of a rank]``, one sum. Raises DumpError, UsageError."""
    path = one_of(listing(path, options.only), "files") if path.is_dir() else path
    array = load(path, options)
    if array.ndim != 3:
        raise DumpError(f"{path}: it has the shape {array.shape}, not [layers, ranks, slots of a rank]")
    layers, ranks, slots = array.shape
    rows = _of_array(path, array.reshape(1, layers, ranks * slots), "heat")
    reading = Reading(
        "vllm-ascend", rows.kind, [path], True, Scope.GLOBAL, {0: rows.chunks}, layers, rows.width,
        ep_size=ranks,
    )  # fmt: skip
    reading.unknown["passes"] = PASSES
    return reading


def _files(path: Path, options: Options) -> dict[int | None, Path]:
    """The one file under None, or a file per rank. Raises DumpError, UsageError."""
    if path.is_dir():
        paths = [p for p in listing(path, options.only) if p.suffix in SUFFIXES or options.only is not None]
        if not paths:
            raise DumpError(f"{path}: no file in it ends in {', '.join(SUFFIXES)}")
        # As in `detect`: a .json beside other files is usually a configuration.
        paths = [p for p in paths if p.suffix != ".json"] or paths
        if len(paths) > 1:
            return dict(by_rank(paths).items())
        path = paths[0]
    if rank_of(path) is not None and not table.has_slots(path):
        require_all_ranks(path, options.ep_size)
    return {None: path}


#: The names of files that can hold counts.
SUFFIXES = (".npy", ".npz", ".pt", ".csv", ".parquet", ".json")


def _open(path: Path, options: Options) -> _Rows:
    if _begins_with(path, b"{"):
        return _history(path)
    array = load(path, options)
    if array.ndim == 2:
        return _of_array(path, array[None], "[layers, experts]")
    return _of_array(path, array, "[steps, layers, experts]")


def _is_npz(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and path.suffix != ".pt"


def _begins_with(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(256).lstrip()[:1] in starts


def _of_array(path: Path, rows: Array, kind: str) -> _Rows:
    _require_possible(path, rows.shape[1:])
    columns = step_columns.read(path, rows.shape) if _is_npz(path) else StepColumns()
    cuts = sorted({*range(0, len(rows), CHUNK), *columns.changes(), len(rows)})

    def chunks() -> Iterator[Chunk]:
        for low, high in itertools.pairwise(cuts):
            yield columns.chunk(low, high, np.asarray(rows[low:high]))

    placement = columns.placement
    return _Rows(rows.shape[1], rows.shape[2], chunks, kind, placement is not None, placement)


def _require_possible(path: Path, shape: tuple[int, ...]) -> None:
    if shape[0] > MAX_LAYERS or shape[1] > MAX_EXPERTS:
        raise DumpError(
            f"{path}: it has {shape[0]:,} layers with {shape[1]:,} experts each, more than any model"
        )


def is_history(path: Path) -> bool:
    """Whether a JSON document begins with ``load_history``."""
    with path.open("rb") as file:
        return re.match(rb'\s*{\s*"' + HISTORY.encode() + rb'"\s*:', file.read(4096)) is not None


def _history(path: Path) -> _Rows:
    """The public data set of the EPLB search task: a record with ``logical_expert_load`` for each step."""
    first = next(json_items(path, HISTORY), None)
    if first is None:
        raise DumpError(f"{path}: its {HISTORY} is empty")
    key, start = _load_of(*first)
    _require_possible(path, start.shape)

    def chunks() -> Iterator[Chunk]:
        held: list[Array] = []
        count = 0
        for where, item in json_items(path, HISTORY):
            own, array = _load_of(where, item)
            if own != key or array.shape != start.shape:
                raise DumpError(
                    f"{where}: it has {own} {array.shape}, but the first record has {key} {start.shape}"
                )
            held.append(array)
            if len(held) == CHUNK:
                yield Chunk(np.arange(count, count + CHUNK, dtype=np.int64), np.stack(held))
                count, held = count + CHUNK, []
        if held:
            yield Chunk(np.arange(count, count + len(held), dtype=np.int64), np.stack(held))

    return _Rows(start.shape[0], start.shape[1], chunks, HISTORY, key == PHYSICAL)


def _load_of(where: str, item: Any) -> tuple[str, Array]:
    """The key and the counts ``[layers, experts]`` of a record."""
    if isinstance(item, list):
        return LOGICAL, integers(item, 2, where)
    keys = [key for key in (LOGICAL, PHYSICAL) if isinstance(item, dict) and key in item]
    if not keys:
        raise DumpError(f"{where}: it has no {LOGICAL} or {PHYSICAL}, [layers, experts]")
    return keys[0], integers(item[keys[0]], 2, f"{where}: {keys[0]}")


def load(path: Path, options: Options) -> Array:
    """The one array of a file, of 2 or 3 dimensions. Raises DumpError, UsageError."""
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        array = read_npy(path)
    elif _is_npz(path):
        name = _choose(path, options.array)
        array = read_npz(path, name)[name]
    elif start[:4] == b"PK\x03\x04":
        array = torch_files.Arrays(path).of(torch_files.load(path), (2, 3), "the tensor")
    elif _begins_with(path, b"["):
        document = read_json(path)
        array = integers(document, 3 if depth_of(document) == 3 else 2, str(path))
    else:
        array = read_csv(path)
    if array.ndim not in (2, 3) or not array.size:
        raise DumpError(f"{path}: an array of {array.ndim} dimensions; counts are [layers, experts], or "
                        "[steps, layers, experts]")  # fmt: skip
    return array


def _choose(path: Path, wanted: str | None) -> str:
    shapes = npz_shapes(path)
    if wanted is not None:
        if wanted not in shapes:
            raise UsageError(
                f"{path}: it has no array {wanted!r}; its arrays are: {', '.join(list(shapes)[:10])}"
            )
        return wanted
    fitting = [
        name
        for name, (shape, dtype) in shapes.items()
        if len(shape) in (2, 3) and dtype.kind in "iuf" and name not in step_columns.NAMES
    ]
    if not fitting:
        raise DumpError(
            f"{path}: it has no array of counts; its arrays are: {', '.join(list(shapes)[:10]) or 'none'}"
        )
    if len(fitting) > 1 and "load" not in fitting:
        raise UsageError(
            f"{path}: several arrays could be the counts; choose with --array: {', '.join(fitting[:10])}"
        )
    return "load" if "load" in fitting else fitting[0]


def read_csv(path: Path) -> Array:
    """Whole numbers, one row per layer. Raises DumpError."""
    if regular(path) > MAX_TEXT:
        raise DumpError(f"{path}: it is larger than {MAX_TEXT >> 20} MiB")
    rows: list[list[int]] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            for number, row in enumerate(csv.reader(file), 1):
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                # Not int(): it also takes "1_000" and digits of other scripts.
                odd = next((c for c in cells if not (c.isascii() and c.isdigit() and len(c) < 19)), None)
                if odd is not None:
                    raise DumpError(
                        f"{path}: line {number}: {odd[:20]!r} is not a count; a row is a layer's counts "
                        f"([layers, experts]), or {table.FORM}"
                    )
                rows.append([int(cell) for cell in cells])
                if len(rows[-1]) != len(rows[0]):
                    raise DumpError(
                        f"{path}: line {number} has {len(rows[-1])} counts, but the first line has "
                        f"{len(rows[0])}"
                    )
        except csv.Error as error:
            raise DumpError(f"{path}: {error}") from None
    if not rows:
        raise DumpError(f"{path}: it is empty")
    return np.array(rows, np.int64)
