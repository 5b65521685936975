"""The sums per minute of a segment, whatever is kept of it.

A segment that has its steps has such sums, too, so that one figure over a long time can come from one source.
Journals, and segments from before version 1.2, have none: theirs are made from the loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from eplb_analyze.sessions.parquet_segment import NO_TURN, ROWS_BYTES, ParquetSegment
from eplb_analyze.sessions.segments import Segment, layers_at_once, reading_faults
from eplb_dump.format.journal import Int64
from eplb_dump.format.minutes import NO_CUTS, Minutes, MinutesBuilder
from eplb_dump.format.schema import Scope
from eplb_dump.format.session import SessionInfo


def minutes_of(
    segment: Segment,
    info: SessionInfo,
    columns: Sequence[str],
    rows_bytes: int = ROWS_BYTES,
    turn: AbstractContextManager[object] = NO_TURN,
) -> Iterator[Minutes]:
    """The rows of a segment's sums per minute, about ``rows_bytes`` at a time, with some columns or more.

    None if nothing is kept of it. ``turn``: as for :meth:`ParquetSegment.minutes`.

    Raises DamagedSegmentError.
    """
    if isinstance(segment, ParquetSegment) and segment.has_minutes:
        yield from segment.minutes(columns, rows_bytes, turn)
    elif segment.step_rows and (segment.has_loads or not segment.recorded):
        yield added_up(segment, info)


def added_up(segment: Segment, info: SessionInfo, cuts: Int64 = NO_CUTS) -> Minutes:
    """The rows that the writer would have made of a segment with loads, or of one that recorded none.

    ``cuts``: steps across which no row reaches. Raises DamagedSegmentError.
    """
    shape = segment.shape
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
            for layer, values in segment.loads(first, min(first + at_once, shape.num_moe_layers)):
                for index, load in enumerate(values, layer):
                    if index == done:
                        builder.add(index, load)
                        done += 1
    return builder.finish()
