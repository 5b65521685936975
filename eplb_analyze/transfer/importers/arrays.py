"""Plain arrays: ``[layers, experts]`` as deepseek-ai/EPLB, ``[steps, layers, experts]``, vllm-ascend's heat.

The files are .npy, .npz, .pt or .csv, and say nothing but the shape.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.transfer.importers import torch_files
from eplb_analyze.transfer.importers.files import (
    MAX_TEXT,
    Array,
    listing,
    npz_shapes,
    one_of,
    read_npy,
    read_npz,
    regular,
)
from eplb_analyze.transfer.importers.source import Chunk, Options, Reading, ordered_rows
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS, Scope

PASSES = "of how many forward passes the one step is the sum"


def read(path: Path, options: Options) -> Reading:
    """Counts by logical expert: ``[layers, experts]``, or with steps first. Raises DumpError, UsageError."""
    path = _file(path, options)
    array = load(path, options)
    rows = array[None] if array.ndim == 2 else array
    reading = _reading("array", path, rows, by_slot=False)
    reading.num_logical_experts = rows.shape[2]
    if array.ndim == 2:
        reading.unknown["passes"] = PASSES
    else:
        reading.kind = "[steps, layers, experts]"
        ordered_rows(reading, options, "an array does not say whether its rows are in the order of time")
        reading.unknown["step_numbers"] = "the numbers of steps: rows are counted from 0"
    return reading


def read_ascend(path: Path, options: Options) -> Reading:
    """vllm-ascend's heat: ``[layers, ranks, slots of a rank]``, one sum. Raises DumpError, UsageError."""
    path = _file(path, options)
    array = load(path, options)
    if array.ndim != 3:
        raise DumpError(f"{path}: it has the shape {array.shape}, not [layers, ranks, slots of a rank]")
    layers, ranks, slots = array.shape
    reading = _reading("vllm-ascend", path, array.reshape(1, layers, ranks * slots), by_slot=True)
    reading.kind, reading.ep_size = "heat", ranks
    reading.unknown["passes"] = PASSES
    return reading


def _file(path: Path, options: Options) -> Path:
    return one_of(listing(path, options.only), "files") if path.is_dir() else path


def _reading(system: str, path: Path, rows: Array, *, by_slot: bool) -> Reading:
    if rows.shape[1] > MAX_LAYERS or rows.shape[2] > MAX_EXPERTS:
        raise DumpError(
            f"{path}: it has {rows.shape[1]:,} layers of {rows.shape[2]:,} experts, which no model has"
        )

    def chunks() -> Iterator[Chunk]:
        for low in range(0, len(rows), 256):
            steps = np.arange(low, min(low + 256, len(rows)), dtype=np.int64)
            yield Chunk(steps, np.asarray(rows[low : low + 256]))

    return Reading(
        system, "[layers, experts]", [path], by_slot, Scope.GLOBAL, {0: chunks}, rows.shape[1], rows.shape[2]
    )


def load(path: Path, options: Options) -> Array:
    """The one array of a file, of 2 or 3 dimensions. Raises DumpError, UsageError."""
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        array = read_npy(path)
    elif start[:4] == b"PK\x03\x04" and path.suffix != ".pt":
        name = _choose(path, options.array)
        array = read_npz(path, name)[name]
    elif start[:4] == b"PK\x03\x04":
        array = torch_files.Arrays(path).of(torch_files.load(path), (2, 3), "the tensor")
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
            raise UsageError(f"{path}: no array {wanted!r} in it; there are: {', '.join(list(shapes)[:10])}")
        return wanted
    fitting = [
        name for name, (shape, dtype) in shapes.items() if len(shape) in (2, 3) and dtype.kind in "iuf"
    ]
    if not fitting:
        raise DumpError(
            f"{path}: no array of counts in it; there are: {', '.join(list(shapes)[:10]) or 'none'}"
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{path}: several arrays could be the counts; choose with --array: {', '.join(fitting[:10])}"
        )
    return fitting[0]


def read_csv(path: Path) -> Array:
    """Whole numbers, one row per layer. Raises DumpError."""
    if regular(path) > MAX_TEXT:
        raise DumpError(f"{path}: a text of more than {MAX_TEXT >> 20} MiB")
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
                        f"{path}: line {number}: {odd[:20]!r} is no count; a row is a layer's counts"
                    )
                rows.append([int(cell) for cell in cells])
                if len(rows[-1]) != len(rows[0]):
                    raise DumpError(
                        f"{path}: line {number} has {len(rows[-1])} counts, the first {len(rows[0])}"
                    )
        except csv.Error as error:
            raise DumpError(f"{path}: {error}") from None
    if not rows:
        raise DumpError(f"{path}: it is empty")
    return np.array(rows, np.int64)
