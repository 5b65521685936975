"""Run: one run of one model, opened for reading. Its methods return polars frames.

:mod:`eplb_analyze.reader.dataframes` makes the frames from the arrays of
:mod:`eplb_analyze.reader.blocks`. Nothing here writes into a dump.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import AnalyzeError, DumpError, Finding, NotInDumpError
from eplb_analyze.forks import forked_map
from eplb_analyze.metrics import formulas
from eplb_analyze.reader.blocks import Block, EstimateBlock, KeptBlock, PhaseBlock, iter_blocks, parts
from eplb_analyze.reader.choose import choose
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.reader.join import MIXED
from eplb_analyze.reader.lost import LostRank, find_lost
from eplb_analyze.reader.placements import (
    PlacementHistory,
    PlacementSlice,
    join_placements,
    placement_gaps,
    read_history,
)
from eplb_analyze.reader.run_info import run_info
from eplb_analyze.reader.tiers import Ranges, TierRange, Tiers, described, retired
from eplb_analyze.sessions.discovery import Session, open_sessions, refresh_thinned
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError, Segment
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage.path import StoragePath, storage_path
from eplb_analyze.text import listed, plural
from eplb_dump.format.schema import FORMAT_NAME, Scope, Tier

if TYPE_CHECKING:  # a third of the start-up of a command that shows no frame
    import polars as pl

    from eplb_analyze.metrics.cost import StepTimes

T = TypeVar("T")
#: Steps in a part of a run, about, of all ranks together: so few that many cores get equal shares.
PART_STEPS = 4096


def open_run(
    path: str | os.PathLike[str] | StoragePath,
    run: str | None = None,
    model: str | None = None,
    *,
    mixed: bool = False,
) -> Run:
    """Open one run of one model in a dump; by default the newest run and its largest model.

    Args:
        path: the dump's folder, or the folder of one run, model, rank or session in it; or such a prefix
            of a bucket, ``s3://…`` or ``gs://…``.
        run: the run's id, or a beginning of it that no other run has. If several engine starts were given
            the same, ``r``, they are ``r@1``, ``r@2`` and so on, and ``r`` is the newest.
        model: the model's name, or its folder's name.
        mixed: also open a run of several engine starts that cannot be separated, to check it; its figures
            are of no engine.

    Raises:
        DumpError: there is no dump, or nothing readable in it; or engines that ran at the same time were
            given one run id and cannot be separated.
        NotInDumpError: the dump has no such run or model.
        UnreachableError: the bucket cannot be read.
    """
    where = storage_path(path)
    chosen = choose(where, run, model)
    if chosen.mixed is not None:
        if not mixed:
            raise DumpError(chosen.mixed)
        chosen.findings.append(Finding("error", "mixed_starts", chosen.mixed))
    sessions = open_sessions(chosen.sessions, chosen.findings)
    return Run(where, sessions, chosen.findings, chosen.notes, chosen.run_id)


class Run:
    """One run of one model. Figures use complete steps only: those that all ranks recorded.

    Attributes:
        info: what the run is.
        findings: faults found so far; reading can add to them.
        notes: for the user, about the choice of run and model.
        timings: step times that another program measured; the cost of imbalance uses them first.
        gpu: whose kernel times estimate the cost of imbalance if the run does not show it.
        phase: the only phase whose steps are in its figures; None for all.
        progress: called during long work with the number of steps done and the total.
    """

    def __init__(
        self,
        path: StoragePath,
        sessions: list[Session],
        findings: list[Finding],
        notes: list[str],
        run_id: str | None = None,
    ) -> None:
        self.path = path
        self.sessions = sessions
        self.findings = findings
        self.notes = notes
        self.progress: Callable[[int, int], None] = _not_shown
        self.timings: StepTimes | None = None
        self.gpu: str | None = None
        #: By table, the ``id`` of segments where it is unreadable; they stay in the sessions.
        self._unreadable: dict[str, set[int]] = {"loads": set(), "placements": set(), "minutes": set()}
        self._reading = False
        self._history: PlacementHistory | None = None
        #: The steps whose placements its history has; None for all.
        self._placed: StepRange | None = None
        self._lost_ranks: list[LostRank] | None = None
        self._clock: RunClock | None = None
        #: Guards the placements and the lost ranks, which threads may ask for.
        self._history_lock = threading.RLock()
        self._serving_only = False
        #: The run that it is one phase of, and the phase.
        self._all_phases: Run | None = None
        self.phase: str | None = None
        #: The ranks without which steps count as complete; empty: only complete ones do.
        self._without: tuple[int, ...] = ()
        #: Whether steps without experts' loads are left out.
        self._with_loads = False
        #: Whether blocks keep the loads read.
        self._keeping = False
        self._tiers: tuple[int, Tiers] | None = None
        #: The last step to include; None for all.
        self._last: int | None = None
        self.scope = sessions[0].info.scope
        self.info = run_info(path, sessions, findings, run_id)

    def __repr__(self) -> str:
        first, last = self.step_range
        steps = "no steps" if first is None else f"steps {first}-{last}"
        size = f"{plural(self.info.ep_size, 'rank')}, {steps}, {plural(self.info.num_layers, 'layer')}"
        return f"<Run {self.info.run_id} of {self.info.model}: {size}>"

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which shows no progress; segments are numbered, as their ``id`` changes."""
        number = {id(segment): i for i, segment in enumerate(self._segments())}
        unreadable = {table: {number.get(i) for i in ids} - {None} for table, ids in self._unreadable.items()}
        state = vars(self) | {"_unreadable": unreadable, "progress": _not_shown, "_clock": None}
        del state["_history_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _history_lock=threading.RLock())
        segments = self._segments()
        self._unreadable = {
            table: {id(segments[number]) for number in numbers} for table, numbers in self._unreadable.items()
        }

    def _segments(self) -> list[Segment]:
        return [segment for session in self.sessions for segment in session.segments]

    def truncated_at(self, step: int) -> Run:
        """The run as it was when ``step`` was its last step: later writes are left out."""
        sessions = []
        for session in self.sessions:
            segments, lost = (
                [s for s in some if s.first_step <= step] for some in (session.segments, session.lost)
            )
            retired = [s for s in session.retired if s.first_step <= step]
            if segments or retired or not session.segments:
                sessions.append(replace(session, segments=segments, lost=lost, retired=retired))
        run = Run(self.path, sessions, [*self.findings], self.notes, self.info.run_id)
        run._last, run.timings, run.gpu = step, self.timings, self.gpu
        run.clock.zone = self.clock.zone
        return run if self.phase is None else run.of_phase(self.phase)

    def serving_only(self) -> Run:
        """The run as of an engine that has only the ranks that serve at a time, numbered from 0 again.

        So what would have been, without a lost rank, can be replayed. Use it inside
        :meth:`retry_without_damaged` of this run.
        """
        if not self.lost_ranks:
            return self
        run = copy.copy(self)
        run._history, run._reading, run._serving_only = None, True, True
        return run

    def of_phase(self, phase: str) -> Run:
        """The run with the steps of one phase only, for instance ``"decode"``.

        Its blocks leave out all other steps, so every figure is over steps of the phase. What does not come
        from steps (placements, their changes, the clock) is that of the whole run.

        Raises NotInDumpError if no step of the run has the phase.
        """
        phases: dict[str, None] = {}
        for segment in (s for session in self.sessions for s in (*session.segments, *session.retired)):
            with contextlib.suppress(DamagedSegmentError):
                phases |= dict.fromkeys(_phases_of(segment))
            if phase in phases:
                break
        else:
            if phase != MIXED or len(phases) < 2:
                known = (
                    f"its phases are {listed(sorted(phases), 20)}" if phases else "its steps state no phase"
                )
                raise NotInDumpError(f"{self.path}: no step of the run has the phase {phase!r}; {known}")
        run = copy.copy(self)
        run._all_phases, run.phase = self.all_phases, phase
        return run

    @property
    def all_phases(self) -> Run:
        """The run with the steps of all phases; itself, unless it is one phase of a run."""
        return self if self._all_phases is None else self._all_phases

    def with_loads(self) -> Run:
        """The run without the steps of which experts' loads are no longer kept, only sums per EP rank.

        What does not come from steps is that of the whole run.
        """
        if self._with_loads or not self.tiers.by_rank:
            return self
        run = copy.copy(self)
        run._with_loads = True
        return run

    def placed_in(self, steps: StepRange) -> Run:
        """The run as one whose history has the placements in force in a range of steps, and maybe others.

        A part of a long run, which is read separately, needs no others.
        """
        run = copy.copy(self)
        run._history, run._placed = None, steps
        return run

    def join_placements(self, slices: Iterable[PlacementSlice]) -> None:
        """Take the history from its parts, in order, so that it is not read again."""
        self._history = join_placements(self.sessions, slices)

    def keeping_loads(self) -> Run:
        """The run as blocks that keep the loads read, so that several sums can share one pass."""
        run = copy.copy(self)
        run._keeping = True
        return run

    @property
    def tiers(self) -> Tiers:
        """Of which steps less than everything is kept."""
        refreshed = sum(session.refreshed for session in self.sessions)
        if self._tiers is None or self._tiers[0] != refreshed:
            self._tiers = refreshed, Tiers.of(self.sessions, self.scope)
        return self._tiers[1]

    def left_out(self, steps: tuple[int, int] | None = None) -> list[TierRange]:
        """The steps of a range that no figure of this run covers, because they were thinned."""
        chosen = StepRange.of(steps)
        last = StepRange(0, NO_END if self._last is None else self._last + 1)
        found = [tiers for tiers in self.tiers.ranges if tiers.tier is not Tier.RANKS or self._with_loads]
        parts = (tiers.within(chosen.clip(*last)) for tiers in found)
        return [part for part in parts if part is not None]

    def retired_notes(self, steps: tuple[int, int] | None = None, without_loads: str = "") -> list[str]:
        """What leaves out which steps of a range, because they were thinned, in a line each.

        Args:
            without_loads: what leaves out the steps without experts' loads, of figures that do not all do so.
        """
        out, text = self.left_out(steps), self.clock.when
        also = self.with_loads().left_out(steps) if without_loads else []
        by_rank = [one for one in also if one not in out]
        notes = [f"left out: {described(out, text)}"] if out else []
        return notes + ([f"left out of {without_loads}: {described(by_rank, text)}"] if by_rank else [])

    def estimated(self, steps: tuple[int, int] | None = None) -> Run:
        """A run whose figures are estimates by the ranks that are there, if a range has no complete step.

        In it, the largest group of the range's steps that lack the rows of the same ranks counts as complete,
        and no other step does, so that complete steps and others are never mixed. The loads are a sample of
        the same routing. If a step is complete, or none lacks ranks, it is this run. Use it inside
        :meth:`retry_without_damaged` of this run.
        """
        lacking: Counter[tuple[int, ...]] = Counter()
        for block in self._blocks(steps):
            if len(block.recorded):
                return self
            lacking.update({missing: len(own) for missing, own in block.without_ranks()})
        if not lacking:
            return self
        run = copy.copy(self)
        run._without = min(lacking, key=lambda ranks: (-lacking[ranks], ranks))
        return run

    @property
    def unlisted_files(self) -> int:
        """How many sealed files are left out, because no manifest lists them."""
        return sum(finding.code == "unlisted_file" for finding in self.findings)

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """The ranks that an estimate lacks; empty if figures are of complete steps."""
        return self._without

    def import_caveats(self, *codes: str) -> list[str]:
        """One note for each fact that an answer needs and an imported run lacks or assumes.

        Args:
            codes: what the answer needs, as in ``Origin.unknown`` and ``assumed``, for instance
                ``"step_order"``.
        """
        origin = self.info.origin
        if origin is None:
            return []
        lists = (("unknown", origin.unknown), ("assumed", origin.assumed))
        source = "made from another run" if origin.system == FORMAT_NAME else f"imported from {origin.system}"
        return [
            f"{how} for this run, {source}: {texts[code]}"
            for how, texts in lists
            for code in codes
            if code in texts
        ]

    @property
    def placements_recorded(self) -> bool:
        """Whether the dump states when placements changed.

        False if it is damaged or was imported without, or if what it states was retired.
        """
        origin = self.info.origin
        stated = {} if origin is None else {**origin.unknown, **origin.assumed}
        if self.history.lost:
            return False
        # Of what is gone, only the last placements are kept.
        if any(one.tier is Tier.GONE for one in self.tiers.ranges) and not self.history.rearrangements():
            return False
        return bool(self.history.layers) and not stated.keys() & {"placement", "earlier_placements"}

    @property
    def clock(self) -> RunClock:
        """The time of each step, and the steps at a time."""
        if self._clock is None:
            gone = [one for one in self.tiers.ranges if one.tier is not Tier.RANKS]
            self._clock = RunClock(str(self.path), self.sessions, timed=self.info.timed, retired=gone)
        return self._clock

    def _renew_clock(self) -> None:
        """Let the clock know which segments there are now."""
        if self._clock is not None:
            zone, self._clock = self._clock.zone, None
            self.clock.zone = zone

    # ---- what was seen

    @property
    def present_ranks(self) -> list[int]:
        """The EP ranks that have a session."""
        return sorted({session.info.ep_rank for session in self.sessions})

    @property
    def expected_ranks(self) -> list[int]:
        """The ranks that should have written: every EP rank, or the one that writes the sums.

        Without those that were lost before the first step.
        """
        if self.scope is Scope.GLOBAL:
            return self.present_ranks[:1]
        segments = (s for session in self.sessions for s in (*session.segments, *session.retired))
        sizes = [s.shape.ep_size for s in segments if s.shape]
        every = range(max(sizes, default=self.sessions[0].info.ep_size))
        lost = {one.rank for one in self.lost_ranks} - {*self.present_ranks}
        return [rank for rank in every if rank not in lost]

    @property
    def lost_ranks(self) -> list[LostRank]:
        """The ranks that died while the engine went on without them, in order of ranks and steps."""
        with self._history_lock:
            if self._lost_ranks is None:
                self._lost_ranks = self.retry_without_damaged(
                    lambda: find_lost(self.sessions, self.scope, frozenset(self._unreadable["loads"]))
                )
            return self._lost_ranks

    def blocks(self, steps: tuple[int, int] | None = None) -> Iterator[Block]:
        """The run's blocks in order of steps; see :class:`~eplb_analyze.reader.blocks.Block`."""
        for block in self._blocks(steps):
            yield block
            self._report(block, steps)

    def over_blocks(
        self, work: Callable[[Block], T], steps: tuple[int, int] | None = None
    ) -> Iterator[tuple[Block, T]]:
        """Each block with ``work(block)``, in order of steps; processes or threads share the work."""
        return self.over_readings(lambda block: partial(work, block), steps, threads=None)

    def over_readings(
        self,
        start: Callable[[Block], Callable[[], T]],
        steps: tuple[int, int] | None = None,
        threads: int | None = 1,
    ) -> Iterator[tuple[Block, T]]:
        """Each block with the result of what ``start(block)`` returns, in order of steps.

        Args:
            start: called in order of blocks, by each of the processes that share the work.
            threads: where processes cannot be forked, by default one block is worked on at a time.
        """
        started = ((block, start(block)) for block in self._blocks(steps))
        for (block, _), result in forked_map(lambda item: item[1](), started, threads):
            yield block, result
            self._report(block, steps)

    def _blocks(self, steps: tuple[int, int] | None) -> Iterator[Block]:
        lost, unreadable = self.lost_ranks, frozenset(self._unreadable["loads"])
        blocks: Iterator[Block] = iter_blocks(
            self.sessions,
            self.scope,
            StepRange.of(steps),
            unreadable,
            lost,
            self.tiers,
            with_loads=self._with_loads,
        )
        if self.phase is not None:
            of_phase = (PhaseBlock(block, self.phase) for block in blocks)
            blocks = (block for block in of_phase if len(block.step))
        if self._without:
            blocks = (EstimateBlock(block, self._without) for block in blocks)
        if self._keeping:
            blocks = map(KeptBlock, blocks)
        return map(Block.serving_only, blocks) if self._serving_only else blocks

    def _report(self, done: Block, steps: tuple[int, int] | None) -> None:
        first, last = (0 if step is None else step for step in self.step_range)
        low, high = StepRange.of(steps).clip(first, last + 1)
        self.progress(int(done.step[-1]) + 1 - low, high - low)

    def parts(self) -> list[StepRange]:
        """The run's steps as ranges that other processes or machines can read separately."""
        return parts(self.sessions, PART_STEPS // len(self.present_ranks))

    def retry_without_damaged(self, analysis: Callable[[], T]) -> T:
        """Run an analysis. If a segment turns out to be damaged, exclude it and start again.

        So a damaged file neither ends an analysis nor leaves half of itself in a figure. Its steps become
        incomplete, and ``findings`` names it. In a nested call the outer analysis starts again, because it
        may have read from the segment before.
        """
        if self._reading:
            return analysis()
        self._reading = True
        try:
            while True:
                try:
                    return analysis()
                except DamagedSegmentError as fault:
                    self._exclude(fault)
        finally:
            self._reading = False

    def _exclude(self, fault: DamagedSegmentError) -> None:
        # Another process may have found it in its copy of the run.
        named = fault.segment.path, fault.segment.seq
        segment = next((s for s in self._segments() if (s.path, s.seq) == named), fault.segment)
        # A live writer thins the segments of all ranks at about the same time.
        if fault.missing and sum(map(refresh_thinned, self.sessions)):
            self._history = self._lost_ranks = None
            self._renew_clock()
            return
        left_out = self._unreadable.get("loads" if fault.table == "ranks" else fault.table)
        if left_out is not None and id(segment) not in left_out:
            left_out.add(id(segment))
        else:  # its steps, or a table that was excluded before
            sessions = [s for s in self.sessions if any(own is segment for own in s.segments)]
            if not sessions:
                raise DumpError(str(fault))
            sessions[0].segments = [s for s in sessions[0].segments if s is not segment]
            sessions[0].lost.append(segment)
        self._history = self._lost_ranks = None
        finding = Finding("error", "damaged_file", f"{fault}; skipped")
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def history(self) -> PlacementHistory:
        """The placements of the run, by layer index. The slots of a lost rank are empty."""
        return self.load_history()

    def load_history(self) -> PlacementHistory:
        """Read the placements, unless they are read already. Call it before threads share the run."""
        with self._history_lock:
            if self._history is None:
                history = self.retry_without_damaged(self._read_history)
                self._history = history
                self.findings += [f for f in history.findings if f not in self.findings]
            return self._history

    def _read_history(self) -> PlacementHistory:
        placed = None if self.lost_ranks else self._placed
        history = read_history(self.sessions, frozenset(self._unreadable["placements"]), placed)
        history = history if self._last is None else history.truncated_at(self._last)
        history = history.without(self.lost_ranks)
        return history.serving_only() if self._serving_only else history

    def readable(self, segment: Segment, table: str = "loads") -> bool:
        """Whether the loads of a segment are in figures; False once they turned out to be damaged.

        Likewise its ``placements`` or ``minutes``.
        """
        return id(segment) not in self._unreadable[table]

    def placement_gaps(self, session: Session) -> list[tuple[int, int]]:
        """First and last step of each range in which a session's placements cannot be read."""
        return placement_gaps(session, frozenset(self._unreadable["placements"]))

    @property
    def engine_config(self) -> dict[str, Any]:
        """The engine's configuration, by dotted names."""
        return _flat(self.sessions[0].info.engine_config or {})

    def layer_index(self, layer: int) -> int:
        """The index of a layer by its number in the model. Raises NotInDumpError."""
        if layer not in self.info.layers:
            numbers = self.info.layers
            known = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
            if numbers and len(numbers) <= numbers[-1] - numbers[0]:  # others are dense, or no transformers
                known = listed(numbers, 100)
            raise NotInDumpError(f"{self.path}: no MoE layer {layer}; recorded layers: {known}")
        return self.info.layers.index(layer)

    def require(self, steps: tuple[int, int]) -> None:
        """Check that a half-open range has a step of the run. Raises NotInDumpError."""
        first, last = self.step_range
        if why := self.why_retired(steps):
            raise NotInDumpError(why)
        if first is None or last is None or steps[0] > last or steps[1] <= first:
            known = "it has no step yet" if first is None else f"it has steps {first} to {last}"
            raise NotInDumpError(f"{self.path}: the run has no steps in {StepRange(*steps)}; {known}")

    def why_retired(self, steps: tuple[int, int]) -> str | None:
        """What to say if all steps of a range that the run had are retired; None if some are kept."""
        asked = StepRange.of(steps)
        out = self.left_out(asked)
        first, last = self.step_range
        if not out:
            return None
        if first is not None and last is not None:
            inside = asked.clip(first, last + 1)
            if inside.first < inside.end and any(True for _ in self.absent.outside(*inside)):
                return None
        kept = None if first is None or last is None else StepRange(first, last + 1)
        return f"{self.path}: {retired(out, self.clock.when, kept)}"

    @property
    def absent(self) -> Ranges:
        """The steps that are in no block of this run, because they were thinned."""
        return self.tiers.without_loads if self._with_loads else self.tiers.retired

    def has(self, block: Block) -> bool:
        """Whether a block of a run of which this is a part is in it: see :meth:`with_loads`."""
        return block.has_loads or not self._with_loads

    @property
    def step_range(self) -> tuple[int | None, int | None]:
        """First and last step of the run, according to its segments; None if it has no step.

        Without those at both ends that were retired.
        """
        segments = [s for session in self.sessions for s in session.segments if s.last_step >= 0]
        if not segments:
            return None, None
        first, last = min(s.first_step for s in segments), max(s.last_step for s in segments)
        kept = [*self.absent.outside(first, last + 1)] if self.absent else [StepRange(first, last + 1)]
        return (kept[0].first, kept[-1].end - 1) if kept else (None, None)

    def tokens(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Recorded counts as tokens: float64, token replication divided out."""
        return values / float(self.info.token_replication)

    def count(self, value: Any) -> float:
        """A recorded count as tokens: an exact int, unless token replication has to be divided out."""
        times = self.info.token_replication
        return int(value) if times == 1 else float(value) / times

    def nothing_complete(self, steps: tuple[int, int] | None) -> AnalyzeError:
        """The error to raise if no step of the run, or of the range asked for, is complete."""
        why = self.why_retired(StepRange.of(steps))
        if why is not None:
            return NotInDumpError(why)
        where = "the run" if steps is None else "this range"
        if self.phase is not None:
            where = f"phase {self.phase} in {where}"
        return DumpError(f"{self.path}: no step of {where} is complete (see `check`)")

    def nodes_unknown(self) -> NotInDumpError:
        """The error to raise if the dump does not say how many ranks a node has."""
        return NotInDumpError(
            f"{self.path}: the dump does not state the number of ranks per node; pass --ranks-per-node"
        )

    # ---- frames

    def steps(self, steps: tuple[int, int] | None = None) -> pl.DataFrame:
        """One row per seen step: step, state, ranks_recorded, time, num_tokens, phase, step_ms, device_ms.

        ``state`` is that of the whole run: recorded, dummy, not_sampled, dropped, rejected or
        incomplete. ``num_tokens`` is the sum over the ranks that recorded it, each token once; null
        unless each states it. ``phase`` is "mixed" if they are in different ones. ``step_ms`` and
        ``device_ms`` are the largest of them.
        """
        from eplb_analyze.reader import dataframes

        return self.retry_without_damaged(
            lambda: dataframes.steps(self.blocks(steps), self.info.num_tokens_replication)
        )

    def loads(
        self,
        steps: tuple[int, int] | None = None,
        layers: list[int] | None = None,
        *,
        experts: bool = True,
    ) -> pl.DataFrame:
        """Loads of the complete steps, summed over all ranks.

        With ``experts``, without the steps of which experts' loads are no longer kept (see
        :meth:`with_loads`).

        Args:
            steps: half-open range of steps.
            layers: the model's layer numbers; default all.
            experts: False leaves out ``load``, which is much faster.

        Returns:
            One row per step and layer, in that order: step Int64, layer Int32, ep_size Int32, rank_load
            List [ep_size], load List [num_physical_experts]. Token replication is divided out;
            without replication the values are exact integers (Int64), else Float64.
        """
        chosen = (
            list(range(self.info.num_layers)) if layers is None else [self.layer_index(n) for n in layers]
        )
        from eplb_analyze.reader import dataframes

        info = self.info
        run = self.with_loads() if experts else self
        return run.retry_without_damaged(
            lambda: dataframes.loads(
                run.blocks(steps), chosen, info.layers, info.token_replication, experts=experts
            )
        )

    def placement(self, step: int | None = None) -> pl.DataFrame:
        """The placement at a step (default: the last): layer, physical, rank, logical.

        ``logical`` is -1 in an empty slot. Layers whose placement is not known yet are left out.
        """
        from eplb_analyze.reader import dataframes

        return dataframes.placement(self.history, self.info.layers, step)

    def placements(self) -> pl.DataFrame:
        """Every placement: the step it took effect, layer, ep_size, physical_to_logical (a list)."""
        from eplb_analyze.reader import dataframes

        return dataframes.placements(self.history, self.info.layers)

    def balancedness(
        self, formula: str = "balancedness", by: str = "step", steps: tuple[int, int] | None = None
    ) -> pl.DataFrame:
        """A formula of :data:`eplb_analyze.metrics.formulas.FORMULAS`, over the complete steps.

        Args:
            formula: its name.
            by: ``"step"``: step, value (null without an active layer); ``"layer"``: layer, value, the
                mean over steps of the formula for that layer alone; ``"run"``: value, p5, p50, p95,
                min, min_step, max, max_step over the steps, and their number.
        """
        from eplb_analyze.reader import dataframes

        if formula not in formulas.FORMULAS:
            raise ValueError(f"no formula {formula!r}; choose one of: {', '.join(formulas.FORMULAS)}")
        if by not in ("step", "layer", "run"):
            raise ValueError(f'by must be "step", "layer" or "run", not {by!r}')
        chosen = formulas.FORMULAS[formula]
        info = self.info
        return self.retry_without_damaged(
            lambda: dataframes.balancedness(
                self.blocks(steps), info.layers, info.token_replication, chosen, by
            )
        )

    def terms(
        self,
        block: Block,
        first: int = 0,
        last: int | None = None,
        *,
        each: Callable[[int, npt.NDArray[Any]], object] | None = None,
    ) -> formulas.Terms:
        """See :meth:`Block.terms`; token replication is divided out."""
        return block.terms(self.info.token_replication, first, last, each=each)


def _not_shown(done: int, of: int) -> None:
    pass


def _phases_of(segment: Segment) -> set[str]:
    """The phases of a segment's steps, or of its sums per minute. Raises DamagedSegmentError."""
    if isinstance(segment, ParquetSegment) and not segment.step_rows and segment.has_minutes:
        return {phase for rows in segment.minutes(["phase"]) for phase in rows.phases}
    return {*segment.steps().phases}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{part}" if part else name: item for part, item in inner.items()}
    return flat
