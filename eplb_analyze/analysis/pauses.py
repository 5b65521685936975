"""The pauses of a run's rearrangements, by the times between steps. Reads no loads."""

from __future__ import annotations

import numpy as np

from eplb_analyze.metrics import pauses
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int64


class StepClock:
    """Number, clock and phase of all steps seen, to be added up block by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[Int64, Int64, Int64]] = []
        self._phases: dict[str, int] = {}

    def add(self, block: Block) -> None:
        # A block's codes are its own.
        codes = np.array([self._phases.setdefault(p, len(self._phases)) for p in block.phases], np.int64)
        kind = np.append(codes, -1)[block.phase]
        self._parts.append((block.step, block.clock_ns, kind))

    def pauses(self, run: Run, rearrangements: list[Rearrangement]) -> list[Interval | str]:
        """Each one's pause, ms, or why it is not known."""
        if not run.info.timed or not self._parts:
            return ["the recording has no step times"] * len(rearrangements)
        step, clock, kind = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        ms = np.where(np.diff(step) == 1, np.diff(clock) / 1e6, np.nan)
        ms = np.insert(ms, 0, np.nan)
        every = np.array(run.history.changes, np.int64)
        return [
            pauses.measure(
                step, ms, kind, every[(every >= each.first_step) & (every <= each.last_step)], every
            )
            for each in rearrangements
        ]


def pauses_of(run: Run, rearrangements: list[Rearrangement]) -> list[Interval | str]:
    """The pauses of some rearrangements; call it inside ``run.retry_without_damaged``."""
    clock = StepClock()
    if rearrangements:
        for block in run.blocks():
            clock.add(block)
    return clock.pauses(run, rearrangements)
