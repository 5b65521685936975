"""The expert ids of each token as files hold them, read in blocks: .npy, .npz, .pt and Parquet.

No file is read whole: a .npy or .pt file is mapped, an array of a .npz file is unpacked as a stream, and
Parquet is read some rows at a time.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.transfer.importers import torch_files
from eplb_analyze.transfer.importers.files import (
    MAX_RATIO,
    MAX_SMALL,
    Array,
    npz_shapes,
    read_npy,
    regular,
    stream_npz,
)
from eplb_analyze.transfer.importers.table import NAMES as TABLE_NAMES
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import MAX_LAYERS, MAX_LOAD

#: The names of arrays and columns, in lower case.
IDS = (
    "topk_ids", "routed_experts", "expert_ids", "topk_indices", "topk_idx", "indices", "selected_experts",
    "experts",
)  # fmt: skip
STEP = TABLE_NAMES["step"]
REQUEST = "request", "request_id", "rid", "req_id", "prompt_id", "sample_id", "sequence_id"
LAYER = TABLE_NAMES["layer"]
#: A file with the ids of one layer, as in ``layer_02.parquet``.
LAYER_FILE = re.compile(r"layer[_-]?(\d{1,6})(?!\d)", re.IGNORECASE)
#: About how many ids are in a block.
BLOCK_IDS = 1 << 21
#: The most experts per token: no model has as many, but the last axis of other arrays is often longer.
MAX_TOP_K = 128
SUFFIXES = (".npy", ".npz", ".pt", ".parquet")
#: Parts of an array, in order.
_Parts = Callable[[], Iterator[Array]]


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a file, with their expert ids in some layers."""

    #: Integers ``[tokens, layers, top-k]``; -1: padding.
    ids: Array
    #: The number of each layer of ``ids``.
    layers: tuple[int, ...]
    #: int64 ``[tokens]``; None: not in the file.
    step: Int64 | None = None
    #: int64 ``[tokens]``, numbered from 0 in the order of the file; None: not in the file.
    request: Int64 | None = None


@dataclass(frozen=True)
class TokenFile:
    """One file of expert ids, or one for each layer, which can be read more than once."""

    path: Path
    #: For example ``[tokens, layers, top-k]``.
    kind: str
    blocks: Callable[[], Iterator[Block]]
    has_steps: bool = False
    has_requests: bool = False
    #: Whether layers have the numbers of the model, not their index.
    numbered: bool = False
    #: Arrays or columns that are not read.
    left_out: list[str] = field(default_factory=list)
    #: The files of the layers, if each has its own.
    of_layers: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        return list(self.of_layers) or [self.path]


def open_file(path: Path, wanted: str | None) -> TokenFile:
    """A file; ``wanted`` names the array or column with the ids. Raises DumpError, UsageError."""
    regular(path)
    with path.open("rb") as file:
        start = file.read(6)
    if start[:4] == b"PAR1":
        return _parquet(path, wanted)
    if start == b"\x93NUMPY":
        return _array(path, read_npy(path))
    if start[:4] != b"PK\x03\x04":
        raise DumpError(f"{path}: expert ids per token are read from {', '.join(SUFFIXES)} files")
    if path.suffix == ".pt":
        return _array(path, torch_files.Arrays(path).of(torch_files.load(path), (2, 3, 4), "the tensor"))
    return _npz(path, wanted)


def open_layers(paths: list[Path], wanted: str | None) -> TokenFile:
    """Files that each have the ids of one layer, for the same tokens. Raises DumpError, UsageError."""
    files = {int(match[1]): open_file(p, wanted) for p in paths if (match := LAYER_FILE.search(p.name))}
    folder, first = paths[0].parent, next(iter(files.values()))
    for file in files.values():
        if (file.kind, file.has_steps, file.has_requests) != (
            first.kind, first.has_steps, first.has_requests,
        ) or file.numbered:  # fmt: skip
            raise DumpError(f"{file.path}: its arrays or columns differ from those of {first.path.name}")
    if len(files) < len(paths):
        raise DumpError(f"{folder}: several files have the same layer in their names")

    def blocks() -> Iterator[Block]:
        for layer, file in sorted(files.items()):
            for block in file.blocks():
                if len(block.layers) != 1:
                    raise DumpError(f"{file.path}: its name states one layer, but it has {len(block.layers)}")
                yield Block(block.ids, (layer,), block.step, block.request)

    return TokenFile(
        folder,
        "a file per layer",
        blocks,
        first.has_steps,
        first.has_requests,
        True,
        first.left_out,
        tuple(paths),
    )


def is_npz_of_ids(path: Path) -> bool:
    """Whether a .npz file has an array with a name of expert ids."""
    return bool(set(IDS) & {name.lower() for name in npz_shapes(path)})


def is_parquet_of_ids(path: Path) -> bool:
    """Whether a Parquet file has a column of lists of integers with a name of expert ids."""
    return any(_depth(column.type) and column.name.lower() in IDS for column in _schema(path))


# ---- arrays


def _checked(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
    """Layers and experts per token of an array of ids. Raises DumpError."""
    if dtype.kind not in "iu":
        raise DumpError(f"{path}: its expert ids have the type {dtype}; save them as integers (np.int16)")
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DumpError(
            f"{path}: expert ids of the shape {shape}; they must be [tokens, layers, top-k], [tokens, top-k] "
            f"for one layer, or [steps, tokens, layers, top-k]"
        )
    layers, top_k = (1 if len(shape) == 2 else shape[-2]), shape[-1]
    if layers > MAX_LAYERS or top_k > MAX_TOP_K:
        raise DumpError(
            f"{path}: the shape {shape} means {layers:,} layers with {top_k:,} experts per token, more than "
            f"any model; the last axes must be layers and top-k (counts of experts: --format array)"
        )
    return layers, top_k


def _array(path: Path, array: Array) -> TokenFile:
    """A single array, which is mapped."""
    layers, top_k = _checked(path, array.shape, array.dtype)
    if array.ndim == 4 and not array.flags.c_contiguous:
        raise DumpError(f"{path}: it is in Fortran order; save np.ascontiguousarray(array)")
    tokens = array.reshape(-1, layers, top_k) if array.ndim == 4 else array
    rows = _rows(layers, top_k)

    def parts() -> Iterator[Array]:
        return (np.asarray(tokens[low : low + rows]) for low in range(0, len(tokens), rows))

    return _of_parts(path, array.shape, parts)


def _rows(layers: int, top_k: int) -> int:
    return max(1, BLOCK_IDS // (layers * top_k))


def _of_parts(
    path: Path,
    shape: tuple[int, ...],
    parts: _Parts,
    step: _Parts | None = None,
    request: _Parts | None = None,
    left_out: list[str] | None = None,
) -> TokenFile:
    """An array of ids in parts of whole tokens, with the columns beside it in equal parts.

    Of four axes, the first are steps if there is a column of steps, else requests.
    """
    layers = tuple(range(1 if len(shape) == 2 else shape[-2]))
    kind = {2: "[tokens, top-k]", 3: "[tokens, layers, top-k]"}.get(len(shape))
    if kind is None:
        kind = f"[{'requests' if step is None else 'steps'}, tokens, layers, top-k]"
        if step is None and request is None:
            request = lambda: iter([np.arange(shape[0])])  # noqa: E731
        step, request = (None if c is None else _per_token(c, shape) for c in (step, request))

    def blocks() -> Iterator[Block]:
        numbers = _Numbers()
        nothing = itertools.repeat(None)
        for ids, steps, requests in zip(
            parts(), nothing if step is None else step(), nothing if request is None else request(),
            strict=False,
        ):  # fmt: skip
            yield Block(
                ids.reshape(len(ids), len(layers), shape[-1]),
                layers,
                None if steps is None else _steps(path, steps),
                None if requests is None else numbers.of(requests),
            )

    return TokenFile(path, kind, blocks, step is not None, request is not None, left_out=left_out or [])


def _per_token(column: _Parts, shape: tuple[int, ...]) -> _Parts:
    """A column of the first of four axes, repeated for each token in parts like those of the ids."""
    rows, count = _rows(*shape[2:]), shape[0] * shape[1]

    def parts() -> Iterator[Array]:
        whole = np.concatenate(list(column()))
        for low in range(0, count, rows):
            yield whole[np.arange(low, min(low + rows, count)) // shape[1]]

    return parts


class _Numbers:
    """Numbers requests from 0 in the order in which they first appear."""

    def __init__(self) -> None:
        self._of: dict[Any, int] = {}

    def of(self, values: Array) -> Int64:
        unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        named = unique.tolist()
        for i in np.argsort(first).tolist():
            self._of.setdefault(named[i], len(self._of))
        return np.array([self._of[name] for name in named], np.int64)[inverse]


def _steps(path: Path, values: Array) -> Int64:
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= NO_END:
        raise DumpError(f"{path}: its steps must be whole numbers, 0 or more")
    return values.astype(np.int64)


def _npz(path: Path, wanted: str | None) -> TokenFile:
    shapes = npz_shapes(path)
    columns = {
        role: name
        for role, known in (("step", STEP), ("request", REQUEST))
        for name in shapes
        if name.lower() in known
    }
    beside = columns.values()
    possible = [n for n, (s, t) in shapes.items() if n not in beside and t.kind in "iu" and len(s) > 1]
    names = _choose(path, possible, wanted, list(shapes), [shape[1:] for shape, _ in shapes.values()])
    if len(names) > 1:
        return _requests(path, names, shapes)
    (ids,) = names
    shape, dtype = shapes[ids]
    rows = _rows(*_checked(path, shape, dtype))
    for name in beside:
        if shapes[name][0] != shape[:1]:
            raise DumpError(f"{path}: its {name} has the shape {shapes[name][0]}, the ids need {shape[:1]}")
    step, request = (
        functools.partial(stream_npz, path, columns[role], rows) if role in columns else None
        for role in ("step", "request")
    )
    return _of_parts(
        path, shape, lambda: stream_npz(path, ids, rows, 1 if len(shape) == 2 else 2), step, request,
        [name for name in shapes if name not in beside and name != ids],
    )  # fmt: skip


def _choose(
    path: Path, fitting: list[str], wanted: str | None, every: list[str], trailing: list[tuple[int, ...]]
) -> list[str]:
    """The name of the array or column with the ids, or the names of one array per request."""
    if wanted is not None:
        if wanted not in every:
            raise UsageError(f"{path}: it has no {wanted!r} (--array); it has: {', '.join(every[:10])}")
        return [wanted]
    known = [name for name in fitting if name.lower() in IDS] or fitting
    if len(known) == 1:
        return known
    if not known:
        raise DumpError(f"{path}: it has no expert ids (integers); it has: {', '.join(every[:10]) or 'none'}")
    # np.savez(file, *arrays) names the arrays arr_0, arr_1, ...
    if len(set(trailing)) == 1 and known == every and all(re.fullmatch(r"arr_\d+", name) for name in known):
        return known
    raise UsageError(f"{path}: several could be the expert ids; choose with --array: {', '.join(known[:10])}")


def _requests(
    path: Path, names: list[str], shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> TokenFile:
    """An array ``[tokens, layers, top-k]`` for each request."""
    for name in names:
        layers, top_k = _checked(path, *shapes[name])
    rows = _rows(layers, top_k)

    def blocks() -> Iterator[Block]:
        for number, name in enumerate(names):
            for part in stream_npz(path, name, rows, len(shapes[name][0]) - 1):
                ids = part.reshape(len(part), layers, top_k)
                yield Block(ids, tuple(range(layers)), request=np.full(len(ids), number, np.int64))

    return TokenFile(path, "an array per request", blocks, has_requests=True)


# ---- Parquet


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DumpError:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DumpError(f"{path}: it is not a Parquet file, or it is damaged ({text})")


def _is_list(of: pa.DataType) -> bool:
    return bool(pa.types.is_list(of) or pa.types.is_large_list(of) or pa.types.is_fixed_size_list(of))


def _depth(of: pa.DataType) -> int:
    """How deeply lists of integers are nested in a column; 0: it has something else."""
    depth = 0
    while _is_list(of):
        of, depth = of.value_type, depth + 1
    return depth if pa.types.is_integer(of) else 0


def _nested(path: Path, column: pa.Array) -> tuple[Array, list[Array]]:
    """The integers of a column of lists, and the lengths of the lists at each level."""
    lengths = []
    while _is_list(column.type):
        if column.null_count:
            raise DumpError(f"{path}: a token has null instead of expert ids; write -1 for padding")
        lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        column = column.flatten()
    if column.null_count:
        raise DumpError(f"{path}: an expert id is null; write -1 for padding")
    return column.to_numpy(zero_copy_only=False), lengths


def _parquet(path: Path, wanted: str | None) -> TokenFile:
    file = _Parquet(path, wanted)
    has = file.columns.keys()
    return TokenFile(
        path, file.kind, file.blocks, "step" in has, "request" in has or file.depth == 3, "layer" in has,
        file.left_out,
    )  # fmt: skip


class _Parquet:
    """A file with a row per token, per token and layer, or per request."""

    def __init__(self, path: Path, wanted: str | None) -> None:
        self._path = path
        schema = _schema(path)
        names = list(schema.names)
        depth = {name: _depth(schema.field(name).type) for name in names}
        if len(depth) < len(names):
            raise DumpError(f"{path}: two of its columns have the same name")
        (self._ids,) = _choose(path, [name for name in names if depth[name]], wanted, names, [])
        self.depth = depth[self._ids]
        #: The names of the columns beside the ids, by role.
        self.columns = {
            role: name
            for role, known in (("step", STEP), ("request", REQUEST), ("layer", LAYER))
            for name in names
            if name.lower() in known and not depth[name]
        }
        if self.depth not in (1, 2, 3) or ("layer" in self.columns and self.depth > 1):
            raise DumpError(
                f"{path}: its column {self._ids} has the type {schema.field(self._ids).type}; expert ids "
                f"must be lists of integers: [top-k] per token (and layer, if there is a column layer), "
                f"[layers, top-k] per token, or [tokens, layers, top-k] per request"
            )
        self.kind = "a row per request" if self.depth == 3 else "a row per token"
        if "layer" in self.columns:
            self.kind += " and layer"
        self._read = [self._ids, *self.columns.values()]
        self.left_out = [name for name in names if name not in self._read]
        #: Layers and experts per token; empty: not yet known.
        self._shape: tuple[int, ...] = ()

    def blocks(self) -> Iterator[Block]:
        numbers, row = _Numbers(), 0
        try:
            with pq.ParquetFile(self._path, page_checksum_verification=True) as file:
                rows = self._rows_of_batch(file.metadata)
                for batch in file.iter_batches(rows, columns=self._read, use_threads=False):
                    yield from self._of_batch(batch, numbers, row)
                    row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self._path, error) from None

    def _rows_of_batch(self, metadata: pq.FileMetaData) -> int:
        """How many rows have about BLOCK_IDS ids. Raises DumpError if it claims far more than it holds."""
        count = 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.startswith(f"{self._ids}."):
                    count += column.num_values
        if not count:
            raise DumpError(f"{self._path}: it has no row")
        size = self._path.stat().st_size
        if 8 * count > max(MAX_SMALL, 8 * MAX_RATIO * size):
            raise DumpError(
                f"{self._path}: {size:,} bytes that unpack to {count:,} expert ids, which is suspicious"
            )
        return int(max(1, BLOCK_IDS * metadata.num_rows // count))

    def _of_batch(self, batch: pa.RecordBatch, numbers: _Numbers, row: int) -> Iterator[Block]:
        path = self._path
        values, lengths = _nested(path, _column(batch, self._ids))
        per_row: Array = np.ones(len(batch), np.int64)
        if self.depth == 3:
            per_row = lengths.pop(0)
        if not len(values):
            return  # no row, or only requests without tokens
        if not self._shape:
            layers = int(lengths[0][0]) if len(lengths) == 2 else 1
            self._shape = layers, int(lengths[-1][0])
            _checked(path, (1, *self._shape), values.dtype)
        for found, wanted, what in zip(
            reversed(lengths), reversed(self._shape), ("expert ids", "layers"), strict=False
        ):
            if (found != wanted).any():
                raise DumpError(
                    f"{path}: a token has {found[found != wanted][0]} {what}, but the first has {wanted}; "
                    f"fill up with -1, so that all tokens have the same number"
                )
        beside = {role: self._beside(batch, name) for role, name in self.columns.items()}
        step, request, layer = (beside.get(role) for role in ("step", "request", "layer"))
        if step is not None:
            step = np.repeat(_steps(path, step), per_row)
        if self.depth == 3:
            request = np.repeat(np.arange(row, row + len(batch)), per_row)
        elif request is not None:
            request = numbers.of(request)
        block = Block(values.reshape(-1, *self._shape), tuple(range(self._shape[0])), step, request)
        yield from (block,) if layer is None else self._by_layer(block, layer)

    def _beside(self, batch: pa.RecordBatch, name: str) -> Array:
        column = _column(batch, name)
        if column.null_count:
            raise DumpError(f"{self._path}: a row without a value of {name}")
        values: Array = column.to_numpy(zero_copy_only=False)
        return values

    def _by_layer(self, block: Block, layer: Array) -> Iterator[Block]:
        if layer.dtype.kind not in "iu" or layer.min() < 0 or layer.max() > MAX_LOAD:
            raise DumpError(f"{self._path}: its layers must be whole numbers, 0 or more")
        for number in np.unique(layer).tolist():
            own = np.flatnonzero(layer == number)
            step, request = (None if c is None else c[own] for c in (block.step, block.request))
            yield Block(block.ids[own], (number,), step, request)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))
