"""One pass over a run for several consumers: blocks are read by other processes, and merged in order here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from eplb_analyze.reader.blocks import Block, UseLayer
from eplb_analyze.reader.run import Run


class Reading(NamedTuple):
    """How a block is read for one consumer, perhaps in another process: only the part comes back."""

    #: What all layers of its loads are given to, in order; None if loads by slot are not needed.
    use: UseLayer | None
    #: Called after that: what is to be merged for this block.
    part: Callable[[], Any]
    #: The layers that are used; None: all.
    layers: range | None = None


class Consumer(Protocol):
    """Sums over the blocks of a run."""

    def start(self, block: Block) -> Reading | None:
        """Begin with the next block; None if nothing of it is to be read. Every process does it."""
        ...

    def merge(self, block: Block, part: Any) -> None:
        """Add the next block's part, or None. Later blocks may have been started, but not merged."""
        ...


def read_blocks(
    run: Run, steps: tuple[int, int] | None, *consumers: Consumer, threads: int | None = 1
) -> None:
    """Read the blocks of a run, or of a half-open range of its steps, for all consumers.

    Those that need loads by slot need them of the same layers.

    Args:
        threads: as for :meth:`Run.over_readings <eplb_analyze.reader.run.Run.over_readings>`.
    """

    def start(block: Block) -> Callable[[], list[Any]]:
        return functools.partial(_read, block, [consumer.start(block) for consumer in consumers])

    for block, parts in run.over_readings(start, steps, threads):
        for consumer, part in zip(consumers, parts, strict=True):
            consumer.merge(block, part)


def _read(block: Block, readings: list[Reading | None]) -> list[Any]:
    """The part of each reading, or None."""
    parts: list[Any] = [None] * len(readings)
    by_slot: list[tuple[int, Reading]] = []
    uses: list[UseLayer] = []
    for number, reading in enumerate(readings):
        if reading is not None and reading.use is not None:
            by_slot.append((number, reading))
            uses.append(reading.use)
        elif reading is not None:
            parts[number] = reading.part()
    if by_slot:
        # What was read of the loads until here may be kept; nothing reads them after this.
        block.stop_keeping()
        block.each_layer(uses, by_slot[0][1].layers)
        for number, reading in by_slot:
            parts[number] = reading.part()
    return parts
