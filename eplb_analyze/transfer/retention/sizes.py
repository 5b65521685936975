"""How many bytes a segment takes in a tier, before its files are written: at most."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eplb_analyze.storage import bucket
from eplb_analyze.storage import path as places
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.transfer.retention.survey import Piece
from eplb_dump.format.journal import Shape
from eplb_dump.format.minutes import width_of
from eplb_dump.format.retention import TABLES
from eplb_dump.format.schema import MINUTES_SCHEMA, SCHEMAS, FormatError, Scope, Tier
from eplb_dump.format.segment import footer

#: What a Parquet file of ``minutes`` has beside its values, for each column of values.
_COLUMN_BYTES = 512


def size_at(piece: Piece, tier: Tier) -> int:
    """At most so many bytes do its files and sums take in a tier, which is not finer than its own.

    Reads the footer of the file of ``loads`` if that is not to stay. If it cannot be read, the piece cannot
    be thinned, and keeps its size. Raises UnreachableError.
    """
    if tier is piece.tier or piece.fault is not None:
        return piece.size
    if tier not in piece.sizes:
        piece.sizes[tier] = _size_at(piece, tier)
    return piece.sizes[tier]


def _size_at(piece: Piece, tier: Tier) -> int:
    entry = piece.entry
    size = sum(file.bytes for table, file in entry.files.items() if table in TABLES[tier])
    if tier is Tier.RANKS and "ranks" not in entry.files and "loads" in entry.files:
        try:
            size += _ranks_bytes(piece.session.folder / entry.files["loads"].name)
        except (OSError, FormatError, pa.ArrowException) as error:
            piece.fault = f"{entry.files['loads'].name}: {str(error).splitlines()[0]}"
            return piece.size
    made = entry.files.get("minutes")
    if tier in (Tier.RANKS, Tier.MINUTES) and (made is None or piece.rows_of_minutes):
        size += _minutes_bytes(piece) - (0 if made is None else made.bytes)
    return size


def _ranks_bytes(loads: StoragePath) -> int:
    """The bytes of ``loads`` without the column ``load``, whose pages are copied value by value."""
    with bucket.translate_network_errors(loads), places.open_for_arrow(loads) as source:
        end = footer(source.size(), source.read_at)
    metadata: Any = pq.read_metadata(pa.BufferReader(end))
    kept = 0
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for index in range(columns.num_columns):
            column = columns.column(index)
            if column.path_in_schema.partition(".")[0] in SCHEMAS["ranks"].names:
                kept += column.total_compressed_size
    return kept + len(end) + 4


def _minutes_bytes(piece: Piece) -> int:
    """The bytes of ``minutes`` that are made of a segment from before version 1.2."""
    info = piece.session.info
    assert info is not None
    shape: Shape | None = piece.entry.shape
    row, columns = 0, 0
    for field in MINUTES_SCHEMA:
        if info.scope is Scope.LOCAL and field.nullable and field.name != "phase":
            columns += 1
            continue
        is_list = pa.types.is_list(field.type)
        width = width_of(field.name, shape) if is_list else 1
        kind = field.type.value_type if is_list else field.type
        row += width * (64 if pa.types.is_string(kind) else kind.bit_width // 8)
        columns += 1
    return piece.rows_of_minutes * row + columns * _COLUMN_BYTES
