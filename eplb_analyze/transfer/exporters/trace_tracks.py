"""Tracks of a trace: steps, whose slices do not overlap, the steps of a rank, phases, counters, and others.

All times are ns since 1970.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.blocks import Block, RankSteps
from eplb_analyze.reader.clock import LONGEST_STEP_NS
from eplb_analyze.transfer.exporters.trace_events import Process, TraceFile
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import STATUS_LABELS, Status

#: A clock that goes back by more than this was set back: what follows gets tracks of its own. By less, ranks
#: with slightly different clocks took turns in recording.
SET_BACK_NS = 10**9
#: So often; a clock that goes back more often is no clock.
MOST_SET_BACKS = 16
#: A duration may be any number; years are long enough for a slice that has no room anyway.
LONGEST_NS = 1e17
#: A slice is drawn shorter than its step took if it would overlap the one before by more than this.
SHORTENED_NS = 1000
#: The tracks of a process, from above to below.
PLACES = ("retired", "incidents", "rearrangements", "pauses", "phases", "steps")
#: Where a step's duration is from, as the cost in `summary` names it: the engine, the device, or the time
#: since the step before, which includes waiting. The first that is known counts.
BASES = ("engine", "device", "host", "unknown")
ENGINE, DEVICE, HOST, UNKNOWN = range(4)


def durations(step_ms: Float64, device_ms: Float64, since_ns: Float64) -> tuple[Int64, Float64]:
    """Where each step's duration is from, an index into ``BASES``, and the duration in ms, or NaN.

    After a minute the engine was idle or restarted, so the time since the step before is no duration.
    """
    host = np.where((since_ns >= 0) & (since_ns <= LONGEST_STEP_NS), since_ns / 1e6, np.nan)
    basis, ms = np.full(len(host), UNKNOWN, np.int64), np.full(len(host), np.nan)
    for number, values in ((HOST, host), (DEVICE, device_ms), (ENGINE, step_ms)):
        known = np.isfinite(values)
        basis[known], ms[known] = number, values[known]
    return basis, ms


def step_args(step: int, basis: int, ms: float, *, shortened: bool) -> dict[str, Any]:
    """What the slice of any step says; ``ms`` is rounded."""
    args: dict[str, Any] = {"step": step, "duration": BASES[basis]}
    if basis != UNKNOWN:
        args["ms"] = ms
    if shortened:
        args["drawn_shorter"] = True
    return args


class Drawn(NamedTuple):
    """A step and its slice; ``begin`` is ``end`` if its duration is not known."""

    at: int
    begin: int
    end: int
    shortened: bool


class Stretch(NamedTuple):
    """Consecutive steps whose clock was not set back, and where they are drawn.

    Attributes:
        where: which of the steps.
        begin, end: int64 each.
        shortened: bool, whether the slice is shorter than the step took.
    """

    process: Process
    track: int
    where: slice
    begin: Int64
    end: Int64
    shortened: npt.NDArray[np.bool_]

    def steps(self) -> Iterator[Drawn]:
        columns = (self.begin.tolist(), self.end.tolist(), self.shortened.tolist())
        yield from map(Drawn, range(self.where.start, self.where.stop), *columns)


class StepTrack:
    """Slices of steps, in order of steps, each no longer than there is room since the one before.

    Perfetto drops slices that overlap. If the clock was set back, a process of its own goes on.
    """

    def __init__(self, file: TraceFile, name: str) -> None:
        self._file, self._name = file, name
        self.set_backs = 0
        self._begin()

    def _begin(self) -> None:
        again = f", after the clock was set back ({self.set_backs})" if self.set_backs else ""
        self.process = self._file.process(self._name + again)
        self._track = self.process.track("steps", PLACES.index("steps"))
        self._last: int | None = None

    def place(self, end: Int64, length: Float64) -> Iterator[Stretch]:
        """Place steps that ended at times, int64 ``[n]``, and took ``length`` ns, float64 ``[n]``, or NaN."""
        low = 0
        while low < len(end):
            start = int(end[low]) if self._last is None else self._last
            latest = np.maximum.accumulate(np.maximum(end[low:], start))
            back = np.flatnonzero(latest - end[low:] > SET_BACK_NS)
            stop = len(end)
            if len(back) and self.set_backs < MOST_SET_BACKS:
                stop = low + int(back[0])
            if stop == low:
                self.set_backs += 1
                self._begin()
                continue
            ends, own = latest[: stop - low], length[low:stop]
            wanted = ends - np.where(np.isfinite(own), own, 0).clip(max=LONGEST_NS).astype(np.int64)
            begin = np.maximum(wanted, np.insert(ends[:-1], 0, start))
            if self._last is None:
                begin[0] = wanted[0]
            self._last = int(ends[-1])
            yield Stretch(
                self.process, self._track, slice(low, stop), begin, ends, begin - wanted > SHORTENED_NS
            )
            low = stop


class RankTrack(StepTrack):
    """The steps of a rank, by its own clock.

    Attributes:
        ahead: by session, how far its clock is ahead of the run's. By more than a minute it is wrong; the
            track is then drawn by the run's clock.
    """

    def __init__(self, file: TraceFile, rank: int) -> None:
        super().__init__(file, f"expert load: rank {rank}")
        self.rank = rank
        self.ahead: dict[int, int] = {}
        self._before = -2, -1, 0

    def add(self, block: Block, run_ns: Int64, tokens: Float64 | None) -> None:
        """Add a block's steps.

        Args:
            run_ns: int64 ``[S]``, when they were recorded by the run's clock.
            tokens: float64 ``[S, ep_size]``, per layer; NaN if not known.
        """
        own = block.of_rank(self.rank)
        if not len(own.at):
            return
        step = block.step[own.at]
        basis_of, length = durations(own.step_ms, own.device_ms, self._since(step, own))
        basis, ms = basis_of.tolist(), np.round(length, 4).tolist()
        status = block.status[block.ranks.index(self.rank)][own.at].tolist()
        for stretch in self.place(self._clock(own, run_ns), length * 1e6):
            for i, begin, end, shortened in stretch.steps():
                name, args = f"step {step[i]}", step_args(int(step[i]), basis[i], ms[i], shortened=shortened)
                if own.num_tokens[i] >= 0:
                    args["tokens"] = int(own.num_tokens[i])
                if status[i] != Status.RECORDED:
                    args["status"] = STATUS_LABELS[status[i]]
                    name += f" {args['status'].replace('_', ' ')}"
                elif tokens is not None and self.rank < tokens.shape[1]:
                    routed = tokens[own.at[i], self.rank]
                    if np.isfinite(routed):
                        args["tokens_per_layer"] = float(routed)
                stretch.process.slice(stretch.track, name, begin, end, args)

    def _clock(self, own: RankSteps, run_ns: Int64) -> Int64:
        clock = own.clock_ns.copy()
        for session in np.unique(own.session).tolist():
            mine = own.session == session
            if session not in self.ahead:
                self.ahead[session] = int(np.median(own.clock_ns[mine] - run_ns[own.at[mine]]))
            if abs(self.ahead[session]) > LONGEST_STEP_NS:
                clock[mine] -= self.ahead[session]
        return clock

    def _since(self, step: Int64, own: RankSteps) -> Float64:
        """Since the rank's step before, ns: also across segments, but not across sessions."""
        before, session, clock = (
            np.insert(column[:-1], 0, first)
            for column, first in zip((step, own.session, own.clock_ns), self._before, strict=True)
        )
        self._before = int(step[-1]), int(own.session[-1]), int(own.clock_ns[-1])
        follows = np.isnan(own.since_last_ns) & (before == step - 1) & (session == own.session)
        since: Float64 = np.where(follows, own.clock_ns - clock, own.since_last_ns)
        return since


@dataclass
class Interval:
    """Steps from a first to a last one, and when those that are drawn begin and end."""

    first: int
    last: int
    begin: int | None = None
    end: int = 0

    def extend(self, steps: Int64, stretch: Stretch) -> None:
        """Add what there is of it in a stretch; ``steps``: those of the stretch's block."""
        low, high = np.searchsorted(steps[stretch.where], [self.first, self.last + 1]).tolist()
        if high > low:
            if self.begin is None:
                self.begin = self.end = int(stretch.begin[low])
            # If the clock was set back meanwhile, this is not before the end so far.
            self.end = max(self.end, int(stretch.end[high - 1]))


class Lanes:
    """As many tracks of one name as slices that overlap need."""

    def __init__(self, process: Process, name: str) -> None:
        self._process, self._name = process, name
        self._ends: dict[int, int] = {}

    def add(self, slices: list[tuple[int, int, str, Mapping[str, Any]]]) -> None:
        """Add all slices: begin, end, name and arguments."""
        for begin, end, name, args in sorted(slices, key=lambda one: one[:2]):
            track = next((track for track, last in self._ends.items() if last <= begin), None)
            if track is None:
                track = self._process.track(self._name, PLACES.index(self._name))
            self._ends[track] = end
            self._process.slice(track, name, begin, end, args)


class Phases:
    """Slices of consecutive steps of one phase."""

    def __init__(self) -> None:
        self._tracks: dict[int, int] = {}
        self._phase: tuple[Process, str | None] | None = None
        self._first = self._last = self._begin = self._end = 0

    def add(self, process: Process, phase: str | None, step: int, drawn: Drawn) -> None:
        goes_on = step == self._last + 1 and drawn.begin - self._end <= LONGEST_STEP_NS
        if not goes_on or self._phase != (process, phase):
            self.close()
            self._phase, self._first, self._begin = (process, phase), step, drawn.begin
        self._last, self._end = step, drawn.end

    def close(self) -> None:
        if self._phase is None or self._phase[1] is None:
            return
        process, phase = self._phase
        if process.pid not in self._tracks:
            self._tracks[process.pid] = process.track("phases", PLACES.index("phases"))
        args = {"first_step": self._first, "last_step": self._last}
        process.slice(self._tracks[process.pid], phase or "", self._begin, self._end, args)
        self._phase = None


class Counters:
    """Figures of steps, as counters.

    A counter keeps its value until the next one. So a step without a figure sets it to :data:`NONE`, and so
    does the end of a step if the next one is not here, or began more than a minute later.
    """

    #: What stands for no figure, by the names of the counters that had one.
    NONE: Mapping[str, float] = {"slowest rank": -1}

    def __init__(self) -> None:
        self._process: Process | None = None
        self._values: dict[str, float] = {}
        self._step, self._end = -1, 0

    def add(self, process: Process, step: int, drawn: Drawn, values: Mapping[str, float] | None) -> None:
        """Add a step's figures; None: those of the step before stand for it."""
        goes_on = step == self._step + 1 and drawn.begin - self._end <= LONGEST_STEP_NS
        if process is not self._process or (not goes_on and drawn.begin > self._end):
            self.close()
            self._process = process
        self._step, self._end = step, drawn.end
        if values is not None:
            self._set(drawn.begin, values)

    def close(self) -> None:
        """The figures end with the last step."""
        self._set(self._end, {})

    def _set(self, time: int, values: Mapping[str, float]) -> None:
        now = {name: self.NONE.get(name, 0) for name in self._values} | dict(values)
        if now != self._values and self._process is not None:
            self._process.counters(time, now)
            self._values = now
