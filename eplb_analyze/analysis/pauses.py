"""The pauses of a run's rearrangements, by the times of steps. Reads no loads."""

from __future__ import annotations

import numpy as np

from eplb_analyze.analysis.cost import NO_TIMES
from eplb_analyze.metrics import pauses
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int64

#: If the time between steps is below this share of the engine's own, the clock is not the engine's: the steps
#: were recorded afterwards. Passes that overlap take longer than the time between them, but not by so much.
AFTERWARDS = 0.4


class StepClock:
    """Number, clock, the engine's own time and phase of all steps seen, to be added up block by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[Int64, Int64, Float64, Int64]] = []
        self._phases: dict[str, int] = {}

    def add(self, block: Block) -> None:
        # A block's codes are its own.
        codes = np.array([self._phases.setdefault(p, len(self._phases)) for p in block.phases], np.int64)
        kind = np.append(codes, -1)[block.phase]
        self._parts.append((block.step, block.clock_ns, block.step_ms, kind))

    def pauses(self, run: Run, rearrangements: list[Rearrangement]) -> list[Interval | str]:
        """Each one's pause, ms, or why it is not known."""
        if not self._parts:
            return [NO_TIMES] * len(rearrangements)
        step, clock, own, kind = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        ms = np.full(len(step), np.nan)
        if run.info.timed:
            ms[1:] = np.where(np.diff(step) == 1, np.diff(clock) / 1e6, np.nan)
        engine = own if run.timings is None else run.timings.of(step)
        both = np.isfinite(ms) & np.isfinite(engine)
        afterwards = both.any() and np.median(ms[both]) < AFTERWARDS * np.median(engine[both])
        # Where both are good, the clock is better: the engine may not count a pause as part of a step.
        if afterwards or not np.isfinite(ms).any():
            ms = engine
        if not np.isfinite(ms).any():
            return [NO_TIMES] * len(rearrangements)
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
        for block in run.all_phases.blocks():  # what happens beside a change is of any phase
            clock.add(block)
    return clock.pauses(run, rearrangements)
