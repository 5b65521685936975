"""Expert ids per token as Parquet: a row per token, per token and layer, or per request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers import topk_blocks
from eplb_analyze.transfer.importers.files import MAX_RATIO, MAX_SMALL, Array
from eplb_analyze.transfer.importers.topk_blocks import (
    IDS,
    Block,
    Numbers,
    TokenFile,
    checked,
    choose,
    columns_beside,
    steps_of,
)
from eplb_dump.format.schema import MAX_LOAD


def is_parquet_of_ids(path: Path) -> bool:
    """Whether a Parquet file has a column of lists of integers with a name of expert ids."""
    return any(_depth(column.type) and column.name.lower() in IDS for column in _schema(path))


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


def open_parquet(path: Path, wanted: str | None) -> TokenFile:
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
        (self._ids,) = choose(path, [name for name in names if depth[name]], wanted, names, [])
        self.depth = depth[self._ids]
        #: The names of the columns beside the ids, by role.
        self.columns = columns_beside([n for n in names if not depth[n]], "step", "request", "layer")
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
        numbers, row = Numbers(), 0
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
        return int(max(1, topk_blocks.BLOCK_IDS * metadata.num_rows // count))

    def _of_batch(self, batch: pa.RecordBatch, numbers: Numbers, row: int) -> Iterator[Block]:
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
            checked(path, (1, *self._shape), values.dtype)
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
            step = np.repeat(steps_of(path, step), per_row)
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
