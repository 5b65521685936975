"""`export trace`: the steps of a run on a timeline, for Perfetto, beside an engine's own trace.

A step's slice ends when its pass was recorded and begins as long before as the pass took. Events are written
block by block, so memory does not grow with the run.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from eplb_analyze import atomic
from eplb_analyze.analysis.incident_finder import Incidents
from eplb_analyze.analysis.incident_series import incidents_in
from eplb_analyze.analysis.incident_words import cause_sentence, steps_text, where
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import pauses_of
from eplb_analyze.errors import NotInDumpError, UsageError
from eplb_analyze.json_report import RunReport, as_json
from eplb_analyze.metrics.bootstrap import Interval as Bounds
from eplb_analyze.metrics.formulas import FORMULAS, Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import estimate_notes
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import SECOND_NS, clean, duration, iso, listed, milliseconds, plural
from eplb_analyze.transfer.exporters.trace_events import TraceFile, base_of
from eplb_analyze.transfer.exporters.trace_tracks import (
    BASES,
    MOST_SET_BACKS,
    Counters,
    Interval,
    Lanes,
    Phases,
    RankTrack,
    StepTrack,
    durations,
    step_args,
)
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import Scope

#: So many ranks have tracks of their own, unless more are asked for.
MOST_RANKS = 8
#: From this difference between two clocks on, a note says so.
CLOCKS_DIFFER_NS = 10**7
#: A clock that was set is another one in so many steps in a row.
SET_STEPS = 4


@frozen
class TraceExport(RunReport):
    """What was written."""

    file: Path
    bytes: int
    #: How many events are in the file.
    events: int
    steps: Completeness
    #: The steps in the file: the first and the last.
    first_step: int
    last_step: int
    #: Times in the file count from here, ns since 1970.
    base_unix_ns: int
    #: The number of steps by what their slice's length is from: the `engine`'s own step time, the `device`
    #: (CUDA events), the `host` (time since the step before). `unknown`: they are instants.
    durations: dict[str, int]
    #: Steps that are drawn shorter than they took, because the step before had just been recorded.
    shortened: int
    #: How many incidents of `summary` are in the file; null: they are not known.
    incidents: int | None
    rearrangements: int
    #: The ranks with tracks of their own.
    ranks: list[int]
    #: How many ranks have none.
    ranks_left_out: int
    notes: list[str] = field(default_factory=list)


def export_trace(
    run: Run,
    file: Path,
    steps: tuple[int, int] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    most_ranks: int = MOST_RANKS,
    force: bool = False,
) -> TraceExport:
    """Write the steps, incidents and rearrangements of a run as a trace.

    Args:
        file: compressed if its name ends in ``.gz``.
        steps: half-open range of steps; default all.
        ranks: the ranks with tracks of their own; default at most ``most_ranks``, ranks of incidents first
            and the others spread over all. With scope ``global`` there is one recording rank, and no track.
        force: replace an existing file.

    Raises:
        UsageError: the file cannot be written, or the times of the steps are not known.
        NotInDumpError, DumpError: the dump has no such step or rank.
    """
    atomic.require_free(file, force=force, dump=run.path)
    if not run.info.timed:
        raise UsageError(
            f"{run.path}: the times of its steps are not known, because it was imported without them, and a "
            "trace needs them; `timeline` and `report` do not"
        )
    run.clock.require()
    if steps is not None:
        run.require(steps)
    for rank in ranks or ():
        if rank not in run.present_ranks:
            known = listed(run.present_ranks, 20)
            raise NotInDumpError(f"{run.path}: rank {rank} recorded nothing; recorded ranks: {known}")

    def export() -> TraceExport:
        incidents = incidents_in(run, steps)
        chosen = _ranks(run, incidents.found, most_ranks) if ranks is None else sorted(set(ranks))
        with atomic.new_file(file, force=force) as out:
            with _compressed(out, file) as text:
                trace = _Trace(run, text, steps, incidents, chosen)
                trace.write()
            size = out.tell()
        return trace.report(file, size)

    return run.retry_without_damaged(export)


@contextmanager
def _compressed(out: IO[bytes], file: Path) -> Iterator[IO[bytes]]:
    if file.suffix != ".gz":
        yield out
        return
    # Without a name and time: the same run gives the same file.
    with gzip.GzipFile("", "wb", 6, out, mtime=0) as packed:
        yield packed  # type: ignore[misc]


def _ranks(run: Run, incidents: list[Incident], most: int) -> list[int]:
    """Ranks of incidents for up to half of the tracks, then ranks spread over all others."""
    present = run.present_ranks if run.scope is Scope.LOCAL else []
    if len(present) <= most:
        return present
    worst = [rank for one in incidents for rank in one.ranks if rank in present]
    chosen = [*dict.fromkeys(worst)][: most // 2]
    others = [rank for rank in present if rank not in chosen]
    spread = np.linspace(0, len(others) - 1, most - len(chosen)).round().astype(int).tolist()
    return sorted({*chosen, *(others[i] for i in spread)})


class _Figures(NamedTuple):
    """Rounded figures of the steps of a block; NaN or -1 of a step that is not complete or has no tokens."""

    balancedness: Float64
    #: The layer with the largest max over ranks / mean over ranks, and that.
    worst_layer: Int64
    worst: Float64
    #: The rank for which the others wait most, over all layers.
    slowest: Int64
    #: Tokens per active layer, over all ranks.
    routed: Float64
    #: Tokens per layer of each rank: float64 ``[S, ep_size]``.
    of_ranks: Float64


def _figures(run: Run, block: Block) -> _Figures | None:
    """None if no step of the block is complete."""
    if block.shape is None or not len(block.recorded):
        return None
    terms = run.terms(block)
    complete = np.flatnonzero(block.state == StepState.RECORDED)
    count, ranks = len(complete), block.shape.ep_size

    def over_all(values: Any, missing: float, digits: int = 4) -> Any:
        out = np.full((len(block.step), *values.shape[1:]), missing, values.dtype)
        out[complete] = np.round(values, digits)
        return out

    ratio = np.where(terms.active, terms.ratio, np.inf)
    layer = ratio.argmin(axis=1)
    lowest = ratio[np.arange(count), layer]
    active = terms.active.sum(axis=1)
    slowest = terms.slowest
    waits = np.bincount(
        slowest.step * ranks + slowest.rank,
        slowest.share * terms.excess[slowest.step, slowest.layer],
        count * ranks,
    ).reshape(count, ranks)
    return _Figures(
        balancedness=over_all(FORMULAS["balancedness"].of(terms), np.nan),
        worst_layer=over_all(np.where(active > 0, layer, -1), -1),
        worst=over_all(np.where(active > 0, 1 / lowest, np.nan), np.nan),
        slowest=over_all(np.where(waits.any(axis=1), waits.argmax(axis=1), -1), -1),
        routed=over_all(
            terms.recorded.sum(axis=1) / (run.info.token_replication * np.maximum(1, active)), np.nan, 2
        ),
        of_ranks=over_all(terms.rank_mean, np.nan, 2),
    )


@dataclass
class _Retired:
    """Consecutive steps that are not kept one by one any more, when they were recorded, ns since 1970."""

    first: int
    last: int
    begin: int
    end: int
    #: What is kept of them: a tier each.
    kept: list[str]


def _retired(run: Run, steps: tuple[int, int] | None) -> list[_Retired]:
    """Those of a half-open range, of all ranks."""
    low, high = StepRange.of(steps)
    entries = [entry for session in run.sessions for entry in session.thinned]
    found: list[_Retired] = []
    for entry in sorted(entries, key=lambda entry: entry.first_step):
        if entry.times is None or entry.first_step >= high or entry.last_step < low:
            continue
        begin, end = entry.times
        if not found or entry.first_step > found[-1].last + 1:
            found.append(_Retired(entry.first_step, entry.last_step, begin, end, [entry.tier.value]))
            continue
        one = found[-1]
        one.last = max(one.last, entry.last_step)
        one.begin, one.end = min(one.begin, begin), max(one.end, end)
        one.kept = sorted({*one.kept, entry.tier.value})
    return found


class _Trace:
    """One pass over the steps of a run, which writes its trace."""

    def __init__(
        self,
        run: Run,
        out: IO[bytes],
        steps: tuple[int, int] | None,
        incidents: Incidents,
        ranks: list[int],
    ) -> None:
        self._run, self._steps = run, steps
        self._read = run.estimated(steps)
        self._retired = _retired(run, steps)
        self._base = base_of(min([run.clock.earliest_ns(steps), *(one.begin for one in self._retired)]))
        about = {
            "written_by": "eplb-analyze export trace",
            "run_id": run.info.run_id,
            "model": run.info.model,
            "base_time": iso(self._base),
        }
        self._file = TraceFile(out, self._base, about)
        missing = self._read.missing_ranks
        name = f"expert load: {clean(run.info.model)}, run {clean(run.info.run_id)}"
        self._track = StepTrack(
            self._file, f"{name} (estimate without rank {listed(missing)})" if missing else name
        )
        self._whole = self._track.process
        self._ranks = [RankTrack(self._file, rank) for rank in ranks]
        self._counters, self._phases = Counters(), Phases()
        self._searched = incidents.searched
        self._incidents = [(one, Interval(one.first_step, one.last_step)) for one in incidents.found]
        self._changes = [
            (one, Interval(one.first_step, one.last_step))
            for one in run.history.rearrangements()
            if StepRange.of(steps).first <= one.first_step < StepRange.of(steps).end
        ]
        self._seen = Completeness()
        self._durations: Counter[int] = Counter()
        self._shortened = self._complete = 0
        #: By how much the wall clock departs from the session's at most, ns, and at which step first.
        self._departs: tuple[int, int] | None = None

    def write(self) -> None:
        for block, figures in self._read.over_blocks(lambda block: _figures(self._run, block), self._steps):
            self._seen.add(block)
            self._complete += len(block.recorded)
            clock, since = self._run.clock.times(block.step)
            clock = np.where(clock < 0, block.clock_ns, clock)
            self._add_steps(block, clock, since, figures)
            for track in self._ranks:
                track.add(block, clock, None if figures is None else figures.of_ranks)
            self._compare_clocks(block)
            self._file.flush()
        if not self._seen.seen:
            raise self._run.nothing_complete(self._steps)
        self._phases.close()
        self._counters.close()
        self._add_retired()
        self._add_incidents()
        self._add_rearrangements()
        self._file.close()

    def _add_steps(self, block: Block, clock: Int64, since: Float64, figures: _Figures | None) -> None:
        basis_of, length = durations(block.step_ms, block.device_ms, since)
        basis, ms = basis_of.tolist(), np.round(length, 4).tolist()
        self._durations.update(basis)
        steps, states, phase_of = block.step.tolist(), block.state.tolist(), block.phase.tolist()
        phases = [*map(clean, block.phases), None]
        tokens = (block.num_tokens // self._run.info.num_tokens_replication).tolist()
        for stretch in self._track.place(clock, length * 1e6):
            self._shortened += int(stretch.shortened.sum())
            for _, interval in (*self._incidents, *self._changes):
                interval.extend(block.step, stretch)
            times = np.datetime_as_string(stretch.end.astype("M8[ns]"), unit="ms", timezone="UTC").tolist()
            for drawn, time in zip(stretch.steps(), times, strict=True):
                i = drawn.at
                name = f"step {steps[i]}"
                # Perfetto's axis counts from the first event, or from the base.
                args = {"time": time, **step_args(steps[i], basis[i], ms[i], shortened=drawn.shortened)}
                state, phase = StepState(states[i]), phases[phase_of[i]]
                if state is not StepState.RECORDED:
                    args["state"] = state.label
                    name += f" {state.label.replace('_', ' ')}"
                if phase is not None:
                    args["phase"] = phase
                    name += f" {phase}"
                counters: dict[str, float] = {}
                if tokens[i] >= 0:
                    args["tokens"] = counters["tokens"] = tokens[i]
                if figures is not None and np.isfinite(figures.balancedness[i]):
                    self._add_figures(figures, i, args, counters)
                stretch.process.slice(stretch.track, name, drawn.begin, drawn.end, args)
                self._phases.add(stretch.process, phase, steps[i], drawn)
                # The last sampled step stands for one that was not sampled.
                given = None if state is StepState.NOT_SAMPLED else counters
                self._counters.add(stretch.process, steps[i], drawn, given)

    def _add_figures(
        self, figures: _Figures, i: int, args: dict[str, Any], counters: dict[str, float]
    ) -> None:
        args["balancedness"] = counters["balancedness"] = float(figures.balancedness[i])
        args["worst_layer"] = self._run.info.layers[figures.worst_layer[i]]
        args["worst_layer_imbalance"] = counters["worst layer's max/mean"] = float(figures.worst[i])
        counters["slowest rank"] = rank = int(figures.slowest[i])
        args["slowest_rank"] = None if rank < 0 else rank
        counters["tokens routed per layer"] = float(figures.routed[i])

    def _compare_clocks(self, block: Block) -> None:
        """Whether a host's wall clock was set after its session began."""
        if len(block.step) < SET_STEPS:
            return
        apart = block.time_ns - block.clock_ns
        # In one step, the engine's thread may have been interrupted between its looks at the two clocks.
        lasting = sliding_window_view(np.abs(apart), SET_STEPS).min(axis=1)
        at = int(lasting.argmax())
        if lasting[at] > max(CLOCKS_DIFFER_NS, abs(self._departs[0]) if self._departs else 0):
            first = int(block.step[np.flatnonzero(lasting > CLOCKS_DIFFER_NS)[0]])
            self._departs = int(apart[at]), self._departs[1] if self._departs else first

    def _add_retired(self) -> None:
        Lanes(self._whole, "retired").add(
            [
                (
                    one.begin,
                    one.end,
                    f"{steps_text(one.first, one.last)} retired",
                    {"first_step": one.first, "last_step": one.last, "kept": ", ".join(one.kept)},
                )
                for one in self._retired
            ]
        )

    def _add_incidents(self) -> None:
        label = self._run.clock.label
        Lanes(self._whole, "incidents").add(
            [
                (
                    interval.begin,
                    interval.end,
                    _incident_name(one),
                    _incident_args(one, cause_sentence(one, label)),
                )
                for one, interval in self._incidents
                if interval.begin is not None
            ]
        )

    def _add_rearrangements(self) -> None:
        slices: list[tuple[int, int, str, Mapping[str, Any]]] = []
        pauses: list[tuple[int, int, str, Mapping[str, Any]]] = []
        measured = pauses_of(self._run, [one for one, _ in self._changes])
        for (one, interval), pause in zip(self._changes, measured, strict=True):
            if interval.begin is None:
                continue
            args = self._rearrangement_args(one, pause)
            slices.append((interval.begin, interval.end, "rearrangement", args))
            when = self._pause(one, pause)
            if when is not None:
                pauses.append((*when, "pause of a rearrangement", args))
        Lanes(self._whole, "rearrangements").add(slices)
        Lanes(self._whole, "pauses").add(pauses)

    def _rearrangement_args(self, one: Rearrangement, pause: Bounds | str) -> dict[str, Any]:
        numbers = [self._run.info.layers[layer] for layer in one.layers]
        known = isinstance(pause, Bounds)
        return {
            "first_step": one.first_step,
            "last_step": one.last_step,
            "layers": len(numbers),
            "layer_numbers": listed(numbers, 100),
            "slots_changed": one.slots_changed,
            "pause_ms": _rounded(Milliseconds.of(pause)) if isinstance(pause, Bounds) else None,
            **({} if known else {"pause_reason": pause}),
        }

    def _pause(self, one: Rearrangement, pause: Bounds | str) -> tuple[int, int] | None:
        """Where the pause of a rearrangement in one step is: in the longest gap beside that step.

        None if it is not measurable, or spread over several steps.
        """
        if isinstance(pause, str) or pause.low <= 0 or one.first_step != one.last_step:
            return None
        # A writer may see a change a step late.
        near = np.arange(max(0, one.first_step - 1), one.first_step + 2)
        clock, since = self._run.clock.times(near)
        if not np.isfinite(since).any():
            return None
        at = int(np.nanargmax(since))
        begin = int(clock[at]) - int(since[at])
        return begin, min(int(clock[at]), begin + int(pause.value * 1e6))

    # ---- afterwards

    def report(self, file: Path, size: int) -> TraceExport:
        run, seen = self._run, self._seen
        assert seen.first is not None
        assert seen.last is not None
        tracks = [track.rank for track in self._ranks]
        present = run.present_ranks if run.scope is Scope.LOCAL else []
        return TraceExport(
            run.info.run_id,
            run.info.model,
            file=file,
            bytes=size,
            events=self._file.events,
            steps=seen,
            first_step=seen.first,
            last_step=seen.last,
            base_unix_ns=self._base,
            durations={name: self._durations[number] for number, name in enumerate(BASES)},
            shortened=self._shortened,
            incidents=(
                None
                if self._searched == []
                else sum(interval.begin is not None for _, interval in self._incidents)
            ),
            rearrangements=sum(interval.begin is not None for _, interval in self._changes),
            ranks=tracks,
            ranks_left_out=len({*present} - {*tracks}),
            notes=self._notes(seen.first, seen.last),
        )

    def _notes(self, first: int, last: int) -> list[str]:
        run = self._run
        notes = run.import_caveats("step_order")
        if self._searched is not None:
            notes.append("incidents are looked for only where steps are kept")
        notes += estimate_notes(run, self._read.missing_ranks, self._complete, first, last)
        if self._shortened > self._seen.seen / 2:
            notes.append(
                f"{plural(self._shortened, 'step')} of {self._seen.seen:,} took longer than the time between "
                "the steps: they were recorded afterwards, so this trace does not line up with an engine's"
            )
        if self._track.set_backs:
            often = plural(self._track.set_backs, "time")
            more = " or more often" if self._track.set_backs == MOST_SET_BACKS else ""
            notes.append(
                f"the clock was set back {often}{more}: the steps after it are a process of their own"
            )
        if self._departs is not None and run.info.origin is None:
            ns, step = self._departs
            notes.append(
                f"a host's clock was set during the recording, seen at step {step}: from then on, an "
                f"engine's own trace can be {_apart(ns)}"
            )
        ahead = {track.rank: max(track.ahead.values(), key=abs, default=0) for track in self._ranks}
        differ = [f"rank {rank} is {_apart(ns)}" for rank, ns in ahead.items() if abs(ns) > CLOCKS_DIFFER_NS]
        if differ:
            notes.append(f"clocks of ranks differ from the run's: {listed(differ)}")
        return notes


def _apart(ns: int) -> str:
    """``20 ms behind``"""
    size = milliseconds(abs(ns) / 1e6) if abs(ns) < 2 * SECOND_NS else duration(abs(ns) / SECOND_NS)
    return f"{size} {'ahead' if ns > 0 else 'behind'}"


def _rounded(ms: Milliseconds | None) -> dict[str, float] | None:
    return None if ms is None else {name: round(value, 4) for name, value in vars(ms).items()}


def _incident_name(one: Incident) -> str:
    """``layer 12, rank 30: expert hot (expert 77)``"""
    expert = "" if one.cause.expert is None else f" (expert {one.cause.expert})"
    kind = "cause not known" if one.cause.kind == "loads_retired" else one.cause.kind.replace("_", " ")
    return f"{where(one)}: {kind}{expert}"


def _incident_args(one: Incident, cause: str) -> dict[str, Any]:
    args: dict[str, Any] = as_json(one)
    cost = one.cost.ms_per_step
    # Perfetto shows each item of a list in a row of its own.
    args |= {name: listed(args[name], 100) for name in ("layers", "ranks")}
    args["because"] = cause
    args["cost"] = {
        "ms_per_step": _rounded(cost),
        "ms_total": None if cost is None else round(cost.estimate * (one.last_step + 1 - one.first_step), 3),
        "tokens_per_step": round(one.cost.tokens_per_step, 1),
    }
    return args
