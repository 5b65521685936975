"""Loads in long form: a row a step, layer and slot, as CSV or Parquet, written block by block.

Memory is bounded by what lies in a row group of the dump, however long the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int64

#: The key of a Parquet file's metadata under which it says what run it is of, as JSON.
METADATA_KEY = b"eplb_analyze"
#: At most so many rows are made at once.
BATCH_ROWS = 1 << 20


def schema(run: Run) -> pa.Schema:
    """``load`` is int64, or double where token replication has to be divided out."""
    load = pa.int64() if run.info.token_replication == 1 else pa.float64()
    about = {"run_id": run.info.run_id, "model": run.info.model, "scope": run.info.scope}
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("physical", pa.int32(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("logical", pa.int32()),
            pa.field("load", load, nullable=False),
        ],
        metadata={METADATA_KEY: json.dumps(about)},
    )


def batches(run: Run, blocks: Iterable[Block], layers: list[int]) -> Iterator[pa.RecordBatch]:
    """The complete steps of some blocks; of each block ordered by layer, step and slot.

    Call it inside ``run.reading``.

    Args:
        layers: indices of layers, ascending.

    Yields:
        step, layer (the model's number), physical, rank, logical (-1: empty slot; null: the placement is
        not known), load.
    """
    for block in blocks:
        if block.shape is None or not len(block.recorded):
            continue
        for first, load in block.load_parts(first=layers[0], last=layers[-1] + 1):
            for layer in range(first, first + load.shape[1]):
                if layer in layers:
                    yield from _of_layer(run, block, layer, load[:, layer - first])


def _of_layer(run: Run, block: Block, layer: int, load: Int64) -> Iterator[pa.RecordBatch]:
    """``load``: int64 [steps, num_physical_experts]."""
    steps, shape = block.recorded, block.shape
    assert shape is not None
    slots = shape.num_physical_experts
    physical = np.arange(slots, dtype=np.int32)
    rank = physical // np.int32(shape.slots_per_rank)
    rows = max(1, BATCH_ROWS // slots)
    for stretch, placed in run.history.layer(layer).stretches(steps):
        placement = placed if placed is not None and len(placed) == slots else None
        for low in range(stretch.start, stretch.stop, rows):
            here = slice(low, min(low + rows, stretch.stop))
            n = here.stop - low
            values: Any = load[here].reshape(-1)
            columns = {
                "step": np.repeat(steps[here], slots),
                "layer": np.full(n * slots, run.info.layers[layer], np.int32),
                "physical": np.tile(physical, n),
                "rank": np.tile(rank, n),
                "logical": pa.nulls(n * slots, pa.int32()) if placement is None else np.tile(placement, n),
                "load": values if run.info.token_replication == 1 else run.tokens(values),
            }
            yield pa.RecordBatch.from_pydict(columns, schema=schema(run))


def write_csv(rows: Iterable[pa.RecordBatch], file: IO[bytes], columns: pa.Schema) -> int:
    """With a header; a null is an empty field. Returns the number of rows."""
    written = 0
    with pacsv.CSVWriter(file, columns) as writer:
        for batch in rows:
            writer.write_batch(batch)
            written += batch.num_rows
    return written


def write_parquet(rows: Iterable[pa.RecordBatch], file: IO[bytes], columns: pa.Schema) -> int:
    """A row group a batch. Returns the number of rows."""
    written = 0
    with pq.ParquetWriter(file, columns, compression="zstd", write_page_checksum=True) as writer:
        for batch in rows:
            writer.write_batch(batch)
            written += batch.num_rows
    return written
