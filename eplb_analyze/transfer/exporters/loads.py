"""`export loads`: one row per step, layer and slot as CSV or Parquet, or sums per expert as a numpy array.

Rows are written block by block, so memory is bounded by the dump's row groups, however long the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from eplb_analyze import atomic
from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import Sums, last_configuration
from eplb_analyze.reader.lost import lost_in
from eplb_analyze.reader.placements import logical_sums
from eplb_analyze.reader.readings import Reading
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape

#: Codes of what the source of an imported run may leave unknown about placements.
PLACEMENTS = ("placement", "placement_steps", "earlier_placements")
#: The key of a Parquet file's metadata that holds the run's id, model and scope as JSON.
METADATA_KEY = b"eplb_analyze"
#: The most rows held in memory at once.
BATCH_ROWS = 1 << 20


@frozen
class LoadExport(RunReport):
    """What was written."""

    format: str
    file: Path
    bytes: int
    steps: Completeness
    #: The complete steps in the file: the first, the last, and how many.
    first_step: int
    last_step: int
    recorded: int
    #: The model's numbers.
    layers: list[int]
    #: For ``logical-npy``, the layers.
    rows: int
    notes: list[str]


def export_loads(
    run: Run,
    format: str,
    file: Path,
    steps: tuple[int, int] | None = None,
    layers: list[int] | None = None,
    *,
    force: bool = False,
) -> LoadExport:
    """Write the loads of the complete steps.

    Args:
        format: ``csv`` or ``parquet``: one row per step, layer and slot (see :func:`batches`);
            ``logical-npy``: [layers, num_logical_experts], summed over the steps of the last
            configuration, the input of deepseek-ai/EPLB (int64, or float64 with token replication).
        steps: half-open range of steps; default all.
        layers: the model's layer numbers; default all.
        force: replace an existing file.

    Raises:
        UsageError: the file cannot be written.
        NotInDumpError, DumpError: the dump has no such step or layer, or no complete step.
    """
    atomic.require_free(file, force=force, dump=run.path)
    numbers = list(run.info.layers) if layers is None else sorted(set(layers))
    chosen = [run.layer_index(number) for number in numbers]
    run = run.with_loads()
    if steps is not None:
        run.require(steps)
    write = _write_logical if format == "logical-npy" else _write_long

    def export() -> LoadExport:
        if missing := run.estimated(steps).missing_ranks:
            raise DumpError(
                f"{run.path}: every step lacks the loads of rank {listed(missing)}, and the exported file "
                f"could not show this; nothing is written (`summary`, `experts` and `replay` show estimates)"
            )
        with atomic.new_file(file, force=force) as out:
            written = write(run, format, out, steps, chosen)
            size = out.tell()
        return LoadExport(
            run.info.run_id, run.info.model, format, file, bytes=size, layers=numbers, **written
        )

    return run.retry_without_damaged(export)


def _write_long(
    run: Run, format: str, out: IO[bytes], steps: tuple[int, int] | None, layers: list[int]
) -> dict[str, Any]:
    """The members of the report that are known once the file is written."""
    whole = Completeness()
    recorded: list[Int64] = []
    lost: set[int] = set()

    def counted() -> Iterator[Block]:
        for block in run.blocks(steps):
            whole.add(block)
            if block.shape is not None and len(block.recorded):
                recorded.append(block.recorded)
                lost.update(lost_in(block.shape))
            yield block

    rows = write_rows(batches(run, counted(), layers), format, out, schema(run))
    if not recorded:
        raise run.nothing_complete(steps)
    notes = run.import_caveats("step_order", *PLACEMENTS)
    if lost:
        notes.append(
            f"rank {listed(sorted(lost))} was lost in some of these steps; the file cannot show this, so "
            "if you import it, means include the lost ranks"
        )
    return {
        "steps": whole,
        "first_step": int(recorded[0][0]),
        "last_step": int(recorded[-1][-1]),
        "recorded": sum(map(len, recorded)),
        "rows": rows,
        "notes": notes,
    }


def _write_logical(
    run: Run, format: str, out: IO[bytes], steps: tuple[int, int] | None, layers: list[int]
) -> dict[str, Any]:
    """Likewise."""
    sums, whole, notes = logical_loads(run, steps)
    logical = sums.logical[layers]
    np.save(out, logical if run.info.token_replication == 1 else run.tokens(logical), allow_pickle=False)
    return {
        "steps": whole,
        "first_step": sums.first_step,
        "last_step": sums.last_step,
        "recorded": sums.recorded,
        "rows": len(logical),
        "notes": notes + run.import_caveats(*(() if steps is None else ("step_order",)), *PLACEMENTS),
    }


class LogicalSums(Sums):
    """Loads of one configuration by logical expert: int64 ``[layers, num_logical_experts]``."""

    def __init__(self, run: Run, shape: Shape) -> None:
        super().__init__(shape)
        self._run = run
        self.logical = np.zeros((shape.num_moe_layers, run.info.num_logical_experts), np.int64)
        #: Tokens on all slots, those that hold no expert included.
        self.physical = 0

    def _reading(self, block: Block) -> Reading:
        return Reading(None, lambda: self._part(block))

    def _part(self, block: Block) -> tuple[Int64, int]:
        physical = sum(int(load.sum()) for _, load in block.rank_load_parts())
        return logical_sums(block, self._run.history, self.logical.shape[1]), physical

    def merge(self, block: Block, part: tuple[Int64, int]) -> None:
        self.logical += part[0]
        self.physical += part[1]


def logical_loads(
    run: Run, steps: tuple[int, int] | None, window: int | None = None, *, estimate: bool = False
) -> tuple[LogicalSums, Completeness, list[str]]:
    """The loads of the last configuration in the last ``window`` steps of a range.

    Call it in ``run.retry_without_damaged``. Also returns the completeness of the steps, and notes on
    what was left out.

    Args:
        estimate: as in :func:`eplb_analyze.reader.configurations.last_configuration`.

    Raises:
        NotInDumpError, DumpError: the dump has no such step, or a layer's placement is not known there.
    """
    if steps is not None:
        run.require(steps)
    first, last = run.step_range
    low, high = StepRange.of(steps)
    if window is not None and last is not None:
        high = min(high, last + 1)
        low = max(low, high - window)
    # Sum the same steps in all layers: those from which every placement is known.
    histories = [run.history.layer(i) for i in range(run.info.num_layers)]
    known = max((history.steps[0] if history.steps else high for history in histories), default=high)
    if known >= high:
        raise DumpError(f"{run.path}: a layer's placement is not known in these steps")
    sums, whole, notes = last_configuration(
        run, (max(low, known), high), lambda shape: LogicalSums(run, shape), estimate=estimate
    )
    if known > max(low, first or 0):
        notes.append(f"steps before {known} are left out, because the placement of a layer is not known")
    no_expert = 1 - sums.logical.sum() / max(1, sums.physical)
    if no_expert > 0:
        notes.append(f"{100 * no_expert:.2g}% of the tokens went to slots without an expert and are left out")
    return sums, whole, notes


# ---- the long form


def schema(run: Run) -> pa.Schema:
    """``load`` is int64, or double if it is divided by the token replication."""
    load = pa.int64() if run.info.token_replication == 1 else pa.float64()
    names = ("run_id", "model", "scope", "num_logical_experts", "token_replication")
    about = {name: getattr(run.info, name) for name in names}
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("physical", pa.int32(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("logical", pa.int32()),
            pa.field("load", load, nullable=False),
            pa.field("time", pa.timestamp("ns", tz="UTC")),
        ],
        metadata={METADATA_KEY: json.dumps(about)},
    )


def batches(run: Run, blocks: Iterable[Block], layers: list[int]) -> Iterator[pa.RecordBatch]:
    """The complete steps of some blocks, each block's ordered by layer, step and slot.

    Call it in ``run.retry_without_damaged``.

    Args:
        layers: indices of layers, ascending.

    Yields:
        step, layer (the model's number), physical, rank, logical (-1: empty slot; null: the placement is
        not known), load, time (null: not known).
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
    times = block.time_ns[np.searchsorted(block.step, steps)]
    assert shape is not None
    slots = shape.num_physical_experts
    physical = np.arange(slots, dtype=np.int32)
    rank = physical // np.int32(shape.slots_per_rank)
    rows = max(1, BATCH_ROWS // slots)
    for stretch, placed in run.history.layer(layer).periods(steps):
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
                "time": pa.array(np.repeat(times[here], slots), pa.timestamp("ns", tz="UTC"))
                if run.info.timed
                else pa.nulls(n * slots, pa.timestamp("ns", tz="UTC")),
            }
            yield pa.RecordBatch.from_pydict(columns, schema=schema(run))


def write_rows(rows: Iterable[pa.RecordBatch], format: str, file: IO[bytes], columns: pa.Schema) -> int:
    """Write CSV with a header, nulls as empty fields, or Parquet with one row group per batch.

    Returns the number of rows.
    """
    written = 0
    with (
        pacsv.CSVWriter(file, columns)
        if format == "csv"
        else pq.ParquetWriter(file, columns, compression="zstd", write_page_checksum=True)
    ) as writer:
        for batch in rows:
            writer.write_batch(batch)
            written += batch.num_rows
    return written
