"""The sums per minute of a segment, whatever is kept of it.

A segment that has its steps has such sums, too, so that one figure over a long time can come from one source.
Journals, and segments from before version 1.2, have none: theirs are made from the loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from eplb_analyze.sessions.parquet_segment import NO_TURN, ROWS_BYTES, ParquetSegment
from eplb_analyze.sessions.segments import Segment, layers_at_once, reading_faults
from eplb_dump.format.journal import Int64, Shape, rank_loads
from eplb_dump.format.minutes import NO_CUTS, Minutes, MinutesBuilder
from eplb_dump.format.schema import Scope
from eplb_dump.format.session import SessionInfo


def minutes_of(
    segment: Segment,
    info: SessionInfo,
    columns: Sequence[str],
    rows_bytes: int = ROWS_BYTES,
    turn: AbstractContextManager[object] = NO_TURN,
    cuts: Int64 = NO_CUTS,
) -> Iterator[Minutes]:
    """The rows of a segment's sums per minute, about ``rows_bytes`` at a time, with some columns or more.

    None if nothing is kept of it.

    Args:
        turn: as for :meth:`ParquetSegment.minutes`.
        cuts: steps across which no row reaches, if the segment has its steps.

    Raises DamagedSegmentError.
    """
    by_slot = any(name.startswith("slot") for name in columns)
    known = segment.has_loads or not segment.recorded
    cut = bool(((cuts > segment.first_step) & (cuts <= segment.last_step)).any())
    if cut and segment.step_rows and (known or not by_slot):
        with turn:
            yield added_up(segment, info, cuts, by_slot=by_slot)
    elif isinstance(segment, ParquetSegment) and segment.has_minutes:
        yield from segment.minutes(columns, rows_bytes, turn)
    elif segment.step_rows and known:
        yield added_up(segment, info)


def added_up(segment: Segment, info: SessionInfo, cuts: Int64 = NO_CUTS, *, by_slot: bool = True) -> Minutes:
    """The rows that the writer would have made of a segment with loads, or of one that recorded none.

    Args:
        cuts: steps across which no row reaches.
        by_slot: whether rows name slots; else tokens per EP rank, which are less to read, are enough.

    Raises DamagedSegmentError.
    """
    shape = segment.shape
    if shape is not None and not by_slot:  # as if a rank had one slot
        shape = Shape(shape.ep_size, shape.num_moe_layers, shape.ep_size)
    read = segment.loads if by_slot else segment.rank_loads
    steps, placements, load_steps = segment.steps(), segment.placements(), segment.load_steps()
    with reading_faults(segment, "loads", segment.path):
        builder = MinutesBuilder(
            steps,
            placements,
            load_steps,
            shape,
            summed=info.scope is Scope.GLOBAL,
            token_replication=info.token_replication,
            cuts=cuts,
        )
    if shape is not None and len(load_steps):
        at_once = layers_at_once(len(load_steps), shape)
        done = 0
        for first in range(0, shape.num_moe_layers, at_once):
            for layer, values in read(first, min(first + at_once, shape.num_moe_layers)):
                if layer <= done < layer + len(values):
                    load = values[done - layer :]
                    builder.add(done, load, rank_loads(load, shape.ep_size))
                    done = layer + len(values)
    rows = builder.finish()
    if by_slot:
        return rows
    columns = {name: values for name, values in rows.columns.items() if not name.startswith("slot")}
    return Minutes(columns, rows.phases, rows.summed)


def ends_of_common_steps(spans: Mapping[int, Iterable[tuple[int, int]]]) -> Int64:
    """The steps at which the stretches begin, or have just ended, that every rank has.

    A figure needs every rank. So sums per minute of single ranks are cut there, or a minute in which a rank
    begins or ends would be lost as a whole.

    Args:
        spans: by rank, the first step and the end of each of its sessions.
    """
    edges = np.unique([edge for own in spans.values() for span in own for edge in span])
    common = np.ones(max(0, len(edges) - 1), np.bool_)
    for own in spans.values():
        has = np.zeros_like(common)
        for first, end in own:
            has |= (edges[:-1] >= first) & (edges[1:] <= end)
        common &= has
    found: Int64 = edges[np.flatnonzero(np.diff(common, prepend=False, append=False))].astype(np.int64)
    return found
