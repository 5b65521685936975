"""The pauses of a run's rearrangements, and other long gaps, by the times of steps. Reads no loads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_analyze.analysis.cost import NO_TIMES
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.distinct import distinct
from eplb_analyze.metrics import pauses
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run import Run
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

#: If the time between steps is below this share of the engine's own, the clock is not the engine's: the steps
#: were recorded afterwards. Passes that overlap take longer than the time between them, but not by so much.
AFTERWARDS = 0.4
#: A gap is long from so many times the median step of its phase on, and from so many milliseconds on: fewer,
#: nobody notices.
LONG, LONG_MS = 20.0, 50.0
#: So many of the longest gaps are listed.
LISTED = 3


@frozen
class Gap:
    """A long time between a step and the one before it."""

    step: int
    ms: float


@frozen
class LongGaps:
    """Gaps between steps that are long and beside no rearrangement: the engine was idle, or it stalled."""

    #: How many there are.
    count: int
    #: Their sum in milliseconds.
    ms_total: float
    #: The longest of them, up to three, longest first.
    longest: list[Gap]
    #: The median time between steps.
    median_ms: float


@frozen
class PauseTotal:
    """How long rearrangements paused the engine in all."""

    #: The number of rearrangements whose pause is known.
    measured: int
    #: The sum of these, with its 95% interval.
    ms_total: Milliseconds
    #: The sum as a share of the time of all steps; null if that is not known.
    share_of_run: float | None

    @classmethod
    def of(cls, each: Sequence[Milliseconds | None], run_seconds: float | None) -> PauseTotal | None:
        """None if no pause is known."""
        known = [pause for pause in each if pause is not None]
        if not known:
            return None
        total = sum(pause.estimate for pause in known)
        below, above = (
            float(np.sqrt(sum(side**2 for side in sides)))
            for sides in ([p.estimate - p.low for p in known], [p.high - p.estimate for p in known])
        )
        share = total / 1e3 / run_seconds if run_seconds else None
        return cls(len(known), Milliseconds(total, max(0.0, total - below), total + above), share)


class StepClock:
    """Number, clock, the engine's own time and phase of all steps seen, to be added up block by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[Int64, Int64, Float64, Int64]] = []
        self._phases: dict[str, int] = {}

    def add(self, block: Block) -> None:
        # Copies: a block's arrays are views of larger ones.
        own = (block.step.copy(), block.clock_ns.copy(), block.step_ms.copy())
        self._parts.append((*own, self._kinds(block.phases, block.phase)))

    def merge(self, later: StepClock) -> None:
        """Add the steps after these; ``later`` is not changed."""
        names = [*later._phases]
        self._parts += [(*own, self._kinds(names, kind)) for *own, kind in later._parts]  # type: ignore[misc]

    def _kinds(self, names: Sequence[str], codes: Int64) -> Int64:
        """The codes of phases by these names, as codes of this clock; -1 if unknown."""
        own = np.array([self._phases.setdefault(name, len(self._phases)) for name in names], np.int64)
        kinds: Int64 = np.append(own, -1)[codes]
        return kinds

    def _times(self, run: Run) -> tuple[Int64, Float64, Int64] | None:
        """Step, time since the step before in ms, and phase of each step; None without any time."""
        if not self._parts:
            return None
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
        return (step, ms, kind) if np.isfinite(ms).any() else None

    def pauses(self, run: Run, rearrangements: list[Rearrangement]) -> list[Interval | str]:
        """Each one's pause, ms, or why it is not known."""
        times = self._times(run) if rearrangements else None
        if times is None:
            kept = self._parts or not run.left_out()
            return [NO_TIMES if kept else "its steps are no longer kept"] * len(rearrangements)
        every = np.array(run.history.changes, np.int64)
        around = pauses.Neighborhoods(*times, every)
        edges = np.array([(each.first_step, each.last_step + 1) for each in rearrangements], np.int64)
        return [around.measure(every[low:high]) for low, high in np.searchsorted(every, edges)]

    def long_gaps(self, run: Run) -> LongGaps | None:
        """The long gaps that no change of placement explains; None if there is none."""
        times = self._times(run)
        if times is None:
            return None
        step, ms, kind = times
        known = np.isfinite(ms)
        usual = np.full(len(step), np.median(ms[known]))
        for phase in distinct(kind[known]).tolist():
            usual[kind == phase] = np.median(ms[known & (kind == phase)])
        # Whether a step is recorded when it begins or when it ends, its phase is one of these two.
        usual[1:] = np.maximum(usual[1:], usual[:-1])
        changes = np.array(run.history.changes, np.int64)
        long = known & (ms >= np.maximum(LONG * usual, LONG_MS))
        found = np.flatnonzero(long & ~pauses.beside(step, changes))
        if not len(found):
            return None
        longest = found[np.argsort(-ms[found], kind="stable")[:LISTED]]
        gaps = [Gap(int(step[i]), float(ms[i])) for i in longest]
        return LongGaps(len(found), float(ms[found].sum()), gaps, float(np.median(ms[known])))


def pauses_of(run: Run, rearrangements: list[Rearrangement]) -> list[Interval | str]:
    """The pauses of some rearrangements; call it inside ``run.retry_without_damaged``."""
    clock = StepClock()
    if rearrangements:
        for block in run.all_phases.blocks():  # what happens beside a change is of any phase
            clock.add(block)
    return clock.pauses(run, rearrangements)
