"""Sums per minute of a run, over all its ranks: the source of figures if steps of a range are no longer kept.

With scope ``global`` the rows of the writer's sessions are those of the run. With scope ``local`` a rank's
rows have its own contribution: they are matched by clock minute and added. The clocks of hosts differ a
little, so a minute's steps at its edges can differ between ranks. A minute in which a rank is missing, or has
less than :data:`SAME` of the others' steps, is incomplete, but for those of its parts that all ranks have:
sums of a rank can be split only where its rows end, or where a rank begins or ends, if its steps are kept.

Of several sessions of a rank with the same steps the newest counts, as in :mod:`eplb_analyze.reader.join`;
with scope ``global`` the lowest rank. If only a part of a minute's steps is in both, sums cannot tell which
count, and reading fails.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.parallel import MAX_WORKERS, num_workers, ordered_map
from eplb_analyze.reader.completeness import ABSENT
from eplb_analyze.reader.lost import serving_ranks
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.tiers import Ranges, Tiers
from eplb_analyze.sessions.minutes import ends_of_common_steps, minutes_of
from eplb_analyze.sessions.parquet_segment import NO_TURN, ROWS_BYTES, ParquetSegment
from eplb_analyze.sessions.segments import Segment
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.storage.path import requests_at_once
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.minutes import MINUTE_NS, NO_CUTS, Array, Minutes, top_slots
from eplb_dump.format.schema import STATUS_LABELS, Scope, Status, Tier
from eplb_dump.format.session import SessionInfo

#: The columns that every view needs.
SCALARS = (
    "minute", "phase", "ep_size", "first_step", "last_step", "first_time_ns", "last_time_ns", *STATUS_LABELS,
)  # fmt: skip
#: Ranks whose steps in a minute are fewer, as a share of the most that a rank has there, are missing from it.
SAME = 0.9
#: Why a rank is missing from a minute of which it has some steps: all of the minute's steps are left out.
PARTLY = f"{ABSENT} from part of the minute"
#: Why a rank is missing from a minute if it has as many steps there, but others.
SHIFTED = "shifted by its clock"
#: A file whose rows take no more is decoded as a whole. Of larger ones, of which a part is in memory while it
#: is read, those of all ranks together take about so much.
JOINED_BYTES = 8 << 20
#: So many joined minutes are passed on at once.
JOINED_ROWS = 64
#: No more is read of a rank that is further ahead of another one.
AHEAD_NS = 60 * MINUTE_NS


class MinuteRange(NamedTuple):
    """Whole clock minutes, ns since 1970; both are included."""

    first: int
    last: int


class RankSteps(NamedTuple):
    """Steps of one rank: the first, the last, and for how many the rank has a row."""

    first: int
    last: int
    rows: int

    def plus(self, other: RankSteps | None) -> RankSteps:
        if other is None:
            return self
        return RankSteps(min(self.first, other.first), max(self.last, other.last), self.rows + other.rows)


@frozen
class RunMinutes:
    """Rows of the run, of one shape. With scope ``local`` a row is of all phases.

    Attributes:
        missing: the ranks that each row lacks, and why; its other figures are of the ranks that are there.
        of_rank: what each rank has from the first row on to the last one of these, also in minutes between
            them that are retired because another rank has nothing of them.
    """

    shape: Shape | None
    rows: Minutes
    missing: list[dict[int, str]]
    of_rank: dict[int, RankSteps]


class MinuteSums(Protocol):
    """What rows add up to."""

    def add(self, part: RunMinutes) -> None: ...
    def merge(self, later: Any) -> None:
        """Add the sums of later rows."""
        ...


S = TypeVar("S", bound=MinuteSums)


@frozen
class Kept:
    """What is kept of a run, by the times of its steps, ns since 1970; None: no part of it.

    Attributes:
        finest: the most that is kept of any of its steps.
        steps_since: all steps from here on are kept as such, of every rank; at least tokens per EP rank.
        loads_since: experts' loads are kept of all steps from here on.
        minutes_since: sums per minute are kept from here on.
        gone_until: of some steps before this time nothing is kept.
    """

    finest: Tier
    steps_since: int | None
    loads_since: int | None
    minutes_since: int | None
    gone_until: int | None


class _Source(NamedTuple):
    """Something with rows, of a session; rows of steps in ``taken`` do not count."""

    segment: Segment
    info: SessionInfo
    taken: tuple[tuple[int, int], ...] = ()


def retired_segments(run: Run, steps: tuple[int, int] | None = None) -> list[ParquetSegment]:
    """The segments of the run, or of those with steps in a half-open range, whose steps are not kept."""
    chosen = StepRange.of(steps)
    return [
        segment
        for session in run.sessions
        for segment in session.retired
        if segment.first_step < chosen.end and segment.last_step >= chosen.first
    ]


def from_minutes(run: Run, steps: tuple[int, int] | None, tier: str | None = None) -> bool:
    """Whether figures of a run, or of a half-open range of its steps, are from sums per minute.

    They are if part of the steps is retired: all of a figure is from one source. ``tier`` is the user's
    choice. Raises NotInDumpError if the steps are asked for, but not kept.
    """
    if tier == "minutes":
        return True
    retired = retired_segments(run, steps)
    if tier == "steps" and retired:
        first, last = min(s.first_step for s in retired), max(s.last_step for s in retired)
        raise NotInDumpError(
            f"{run.path}: steps {first}-{last} are no longer kept as steps; use --tier minutes, or select "
            f"other steps"
        )
    return bool(retired)


def finest(run: Run, steps: tuple[int, int] | None) -> Tier:
    """The most that is kept of any step of a half-open range; `full` if the range has no step."""
    span = StepRange.of(steps)
    if run.with_loads().why_retired(span) is None:
        return Tier.FULL
    if run.why_retired(span) is None:
        return Tier.RANKS
    entries = [segment.entry for segment in retired_segments(run, steps)]
    return Tier.MINUTES if any(entry.tier is Tier.MINUTES for entry in entries) else Tier.GONE


def only_minutes(run: Run, steps: tuple[int, int] | None) -> bool:
    """Whether no experts' loads are kept of a half-open range, but sums per minute are."""
    return finest(run, steps) in (Tier.RANKS, Tier.MINUTES)


def kept(run: Run) -> Kept:
    """What is kept of a run; times are those of the run's clock."""
    segments = [segment for session in run.sessions for segment in session.segments]
    in_full = any(segment.has_loads for segment in segments)

    def steps_of(*tiers: Tier) -> list[StepRange]:
        return [one.steps for one in run.tiers.ranges if one.tier in tiers]

    def last_time(ranges: Sequence[StepRange]) -> int | None:
        return _time(run, ranges[-1].end - 1) if ranges else None

    rolled_up = steps_of(Tier.MINUTES)
    return Kept(
        Tier.FULL if in_full else Tier.RANKS if segments else Tier.MINUTES,
        last_time(steps_of(Tier.MINUTES, Tier.GONE)) if segments else None,
        last_time(steps_of(Tier.RANKS, Tier.MINUTES, Tier.GONE)) if in_full else None,
        _time(run, rolled_up[0].first) if rolled_up else None,
        last_time(steps_of(Tier.GONE)),
    )


def _time(run: Run, step: int) -> int | None:
    found = run.clock.near(step)
    return None if found is None else found[0]


def gone_steps(run: Run, steps: StepRange, rank: int | None = None) -> int:
    """How many steps of a range nothing is kept of, by any rank or by one.

    Of a segment that is gone all numbers count, because nothing says which of them the run lacks.
    """
    gone = [one.steps for one in run.tiers.ranges if one.tier is Tier.GONE]
    if rank is not None:
        sessions = [session for session in run.sessions if session.info.ep_rank == rank]
        gone = [one.steps for one in Tiers.of(sessions, run.scope).ranges if one.tier is Tier.GONE]
    return sum(part.end - part.first for part in Ranges(gone).within(*steps))


def minutes_of_steps(run: Run, steps: tuple[int, int]) -> MinuteRange:
    """The minutes that have more than the very first of their steps in a half-open range of steps.

    Raises NotInDumpError if no minute is kept there.
    """
    first, end = steps
    found: list[int] = []
    for source in itertools.chain.from_iterable(_by_rank(run).values()):
        segment = source.segment
        if segment.first_step >= end or segment.last_step < first:
            continue
        for rows in _rows(run, source, SCALARS):
            inside = (rows["first_step"] < end) & (rows["last_step"] >= first)
            edge = (rows["first_step"] == end - 1) & (rows["first_step"] > first)
            chosen = rows["minute"][inside & ~edge]
            found += chosen[:1].tolist() + chosen[-1:].tolist()
    if not found:
        raise nothing_kept(run, steps)
    chosen_minutes = MinuteRange(min(found), max(found))
    return chosen_minutes if run.scope is Scope.GLOBAL else _by_clock(run, chosen_minutes, first, end)


def _by_clock(run: Run, minutes: MinuteRange, first: int, end: int) -> MinuteRange:
    """Minutes of steps without those at both ends that only ranks have whose clocks differ from the run's."""
    begin, last = (_time(run, step) for step in (first, max(first, end - 2)))
    if begin is not None and begin // MINUTE_NS * MINUTE_NS == minutes.first + MINUTE_NS <= minutes.last:
        minutes = minutes._replace(first=minutes.first + MINUTE_NS)
    if last is not None and last // MINUTE_NS * MINUTE_NS == minutes.last - MINUTE_NS >= minutes.first:
        minutes = minutes._replace(last=minutes.last - MINUTE_NS)
    return minutes


def nothing_kept(run: Run, steps: tuple[int, int] | None) -> NotInDumpError:
    """The error to raise if neither steps nor minutes of a range are kept."""
    why = run.why_retired(StepRange.of(steps))
    if why is not None:
        return NotInDumpError(why)
    where = "the run" if steps is None else f"steps {StepRange.of(steps)}"
    return NotInDumpError(f"{run.path}: nothing is kept of {where}: retention removed it, or it has no step")


def require_all_phases(run: Run) -> None:
    """Raise UsageError if steps of one phase are asked for, which sums of single ranks do not show."""
    if run.scope is Scope.LOCAL and run.phase is not None:
        raise UsageError(
            f"{run.path}: sums per minute of single ranks do not show the steps of one phase; remove "
            "--phase, or select steps that are kept"
        )


def add_up(run: Run, columns: Sequence[str], minutes: MinuteRange | None, start: Callable[[], S]) -> S:
    """The sums of the run's rows, or of those in some minutes.

    Args:
        columns: those that the sums need, with :data:`SCALARS`.
        start: sums of no rows.

    Call it inside ``run.retry_without_damaged``. Raises DamagedSegmentError, and DumpError if two sessions
    share a part of a minute's steps.
    """
    total = start()
    if run.scope is Scope.LOCAL:
        for part in _joined(run, columns, minutes):
            total.add(part)
        return total
    sources = [source for own in _by_rank(run).values() for source in own]
    turn = threading.Semaphore(num_workers())

    def of_source(source: _Source) -> S:
        sums = start()
        rank, own = source.info.ep_rank, None
        for rows in _chosen(_rows(run, source, columns, turn=turn), minutes):
            count = int(sum(rows[name].sum() for name in STATUS_LABELS))
            first, last = int(rows["first_step"].min()), int(rows["last_step"].max())
            own = RankSteps(first, last, count).plus(own)
            sums.add(RunMinutes(source.segment.shape, rows, [{}] * len(rows), {rank: own}))
        return sums

    ordered = sorted(sources, key=lambda source: source.segment.first_step)
    within = [source for source in ordered if _may_have(source.segment, minutes)]
    threads = _threads(run)
    for _, sums in ordered_map(of_source, within, threads):
        total.merge(sums)
    return total


def _threads(run: Run) -> int:
    """Each holds a file, compressed, so fewer than a bucket could serve."""
    return max(num_workers(), min(MAX_WORKERS, requests_at_once(run.path)))


# ---- whose rows count


def _by_rank(run: Run) -> dict[int, list[_Source]]:
    """The sources whose rows count, in order of steps: by rank, or all of them by 0 with scope global."""
    sessions: dict[int, list[list[_Source]]] = {}
    # With scope global the sums of a lower rank count more; else those of a newer session.
    ordered = [*reversed(run.sessions)]
    if run.scope is Scope.GLOBAL:
        ordered.sort(key=lambda session: session.info.ep_rank)
    for session in ordered:
        every = (*session.retired, *session.segments)
        # What is gone takes nothing from another session that still has these steps.
        sources = [_Source(s, session.info) for s in every if s.last_step >= 0 and not _is_gone(s)]
        rank = 0 if run.scope is Scope.GLOBAL else session.info.ep_rank
        sessions.setdefault(rank, []).append(sources)
    return {rank: _without_repeated(own) for rank, own in sorted(sessions.items())}


def _is_gone(segment: Segment) -> bool:
    return isinstance(segment, ParquetSegment) and segment.entry.tier is Tier.GONE


def _without_repeated(sessions: Sequence[list[_Source]]) -> list[_Source]:
    """Sources without those whose steps are in an earlier one of the sessions."""
    taken: list[tuple[int, int]] = []
    found: list[_Source] = []
    for sources in sessions:
        own: list[tuple[int, int]] = []
        for source in sources:
            first, last = source.segment.first_step, source.segment.last_step
            overlapping = [span for span in taken if span[0] <= last and span[1] >= first]
            if any(span[0] <= first and last <= span[1] for span in overlapping):
                continue
            own.append((first, last))
            found.append(source._replace(taken=tuple(overlapping)))
        taken = _merged([*taken, *own])
    return sorted(found, key=lambda source: source.segment.first_step)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of steps, both ends included, without overlaps and those next to each other as one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return found


# ---- reading


def _rows(
    run: Run,
    source: _Source,
    columns: Sequence[str],
    rows_bytes: int = ROWS_BYTES,
    turn: AbstractContextManager[object] = NO_TURN,
    cuts: Int64 = NO_CUTS,
) -> Iterator[Minutes]:
    """The rows of a source that count, some at a time; ``cuts``: as for :func:`minutes_of`.

    Raises DamagedSegmentError, DumpError.
    """
    names = [*dict.fromkeys((*SCALARS, *columns))]
    segment = source.segment
    if not run.readable(segment, "minutes") or not run.readable(segment):
        return iter(())

    def counting(rows: Minutes) -> Minutes:
        return rows.select(_not_taken(run, source, rows)) if source.taken else rows

    return filter(len, map(counting, minutes_of(segment, source.info, names, rows_bytes, turn, cuts)))


def _not_taken(run: Run, source: _Source, rows: Minutes) -> npt.NDArray[np.bool_]:
    """The rows whose steps are in no session that counts more: bool ``[rows]``. Raises DumpError."""
    first, last = rows["first_step"], rows["last_step"]
    shared = np.zeros(len(rows), np.int64)
    for low, high in source.taken:
        shared += np.maximum(0, np.minimum(last, high) + 1 - np.maximum(first, low))
    share = shared / (last + 1 - first)
    unclear = np.flatnonzero((share > 1 - SAME) & (share < SAME))
    if len(unclear):
        i = unclear[0]
        raise DumpError(
            f"{run.path}: two sessions of rank {source.info.ep_rank} have a part of steps "
            f"{first[i]}-{last[i]}: "
            f"sums per minute do not show which of them count; select other steps"
        )
    counting: npt.NDArray[np.bool_] = share <= 1 - SAME
    return counting


def _chosen(parts: Iterator[Minutes], minutes: MinuteRange | None) -> Iterator[Minutes]:
    """The rows in some minutes; parts without such a row are left out."""
    if minutes is None:
        return parts

    def inside(rows: Minutes) -> Minutes:
        chosen = (rows["minute"] >= minutes.first) & (rows["minute"] <= minutes.last)
        return rows if chosen.all() else rows.select(chosen)

    return filter(len, map(inside, parts))


def _may_have(segment: Segment, minutes: MinuteRange | None) -> bool:
    """Whether a segment may have rows in some minutes."""
    times = segment.entry.times if isinstance(segment, ParquetSegment) else None
    if minutes is None or times is None:
        return True
    return times[0] < minutes.last + MINUTE_NS and times[1] >= minutes.first


# ---- scope local


@dataclass
class _OfRank:
    """A rank's steps in a minute."""

    counts: Int64
    first: int
    last: int

    def add(self, other: _OfRank) -> None:
        self.counts = self.counts + other.counts
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)


@dataclass(eq=False)
class _Part:
    """Rows of some ranks added up, of one minute and placement."""

    #: Of each rank; empty if these ranks had no shape, as they had no tokens.
    load: Int64
    ranks: dict[int, _OfRank]
    first: int
    last: int
    first_time: int
    last_time: int
    #: Of each row, the slots that it names, and their tokens, if these are asked for.
    named: list[tuple[Array, Array]]

    def plus(self, other: _Part) -> _Part:
        """Both added up; either of them may be changed."""
        for rank, steps in other.ranks.items():
            own = self.ranks.setdefault(rank, steps)
            if own is not steps:
                own.add(steps)
        return _Part(
            self.load + other.load
            if self.load.size == other.load.size
            else max(self.load, other.load, key=len),
            self.ranks,
            min(self.first, other.first),
            max(self.last, other.last),
            min(self.first_time, other.first_time),
            max(self.last_time, other.last_time),
            self.named + other.named,
        )


class _Minute:
    """A minute of one placement, while ranks are added: its parts between steps at which all rows end."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def add(self, row: _Part) -> None:
        """Add a row, whose steps may connect several parts."""
        apart = []
        for part in self._parts:
            if part.first <= row.last and part.last >= row.first:
                row = part.plus(row)
            else:
                apart.append(part)
        self._parts = [*apart, row]

    def take(self, idle: _Minute) -> bool:
        """Add ranks that had nothing but dummy steps, if they had them beside these."""
        beside = [p for p in idle._parts if any(p.first <= o.last and p.last >= o.first for o in self._parts)]
        for part in beside:
            self.add(part)
        idle._parts = [part for part in idle._parts if part not in beside]
        return not idle._parts

    def parts(self, expected: Sequence[int], common: Ranges) -> list[tuple[_Part, dict[int, str]]]:
        """What is added up in figures, as one part, and what is not, each with the ranks that it lacks.

        That is the whole minute without what is not in ``common`` and lacks a rank altogether, unless a rank
        lacks much of the rest: then those of its parts that every rank has.
        """
        alone = [
            (part, lacking)
            for part in self._parts
            if not common.overlaps(part.first, part.last + 1)
            and ABSENT in (lacking := _missing([part], expected)).values()
        ]
        if alone and len(alone) < len(self._parts):
            self._parts = [part for part in self._parts if not any(part is other for other, _ in alone)]
            return [*self.parts(expected, common), *alone]
        missing = _missing(self._parts, expected)
        if not missing or len(self._parts) == 1:
            return [(functools.reduce(_Part.plus, self._parts), missing)]
        shifted = {rank: why for rank, why in missing.items() if why == SHIFTED}
        judged = [(part, _missing([part], expected)) for part in sorted(self._parts, key=lambda p: p.first)]
        complete = [part for part, lack in judged if not lack]
        whole = [functools.reduce(_Part.plus, complete)] if complete else []
        return [
            *((part, {}) for part in whole),
            *((part, {r: shifted.get(r, why) for r, why in lack.items()}) for part, lack in judged if lack),
        ]


_Key = tuple[int, int, "Shape | None"]


def _joined(run: Run, columns: Sequence[str], minutes: MinuteRange | None) -> Iterator[RunMinutes]:
    """The rows of all ranks added up, in order of minutes."""
    by_rank = _by_rank(run)
    changes = np.array(run.history.changes, np.int64)
    cuts = _cuts(run)
    common = Ranges(StepRange(*pair) for pair in cuts.reshape(-1, 2).tolist())
    at_once = JOINED_BYTES // max(1, len(by_rank))
    turn = threading.Semaphore(num_workers())

    def reading(source: _Source) -> tuple[Shape | None, Iterator[Minutes], bool]:
        """Its shape, its rows, and whether they are decoded as a whole."""
        small = _is_small(source, columns)
        rows_bytes, own_turn = (JOINED_BYTES, turn) if small else (at_once, NO_TURN)
        rows = _rows(run, source, columns, rows_bytes, own_turn, cuts)
        return source.segment.shape, _chosen(rows, minutes), small

    queues = {
        rank: deque(reading(source) for source in sources if _may_have(source.segment, minutes))
        for rank, sources in by_rank.items()
    }
    waiting: dict[_Key, _Minute] = {}
    adding = threading.Lock()

    def advance(rank: int) -> int | None:
        """Add a rank's next rows: all of a small file. Returns their last minute, None if there are none."""
        queue, last = queues[rank], None
        while queue and last is None:
            shape, parts, small = queue[0]
            for rows in parts:
                with adding:  # here, so that no rows wait for the thread that takes results
                    _add_rank(waiting, rank, shape, rows, changes)
                last = int(rows["minute"][-1])
                if not small:
                    return last
            queue.popleft()
        return last

    #: The last minute that was read of each rank that may have more.
    reached = dict.fromkeys(queues, 0)
    of_rank: dict[int, RankSteps] = {}
    while reached:
        behind = min(reached.values()) + AHEAD_NS
        ranks = [rank for rank, minute in reached.items() if minute <= behind]
        for rank, last in ordered_map(advance, ranks, _threads(run)):
            if last is None:
                del reached[rank]
            else:
                reached[rank] = last
        edge = min(reached.values(), default=2**62)
        done = sorted((key for key in waiting if key[0] < edge), key=lambda key: key[:2])
        done = _without_idle(waiting, done)
        for at in range(0, len(done), JOINED_ROWS):
            some = done[at : at + JOINED_ROWS]
            yield from _passed_on(run, [(key, waiting.pop(key)) for key in some], common, of_rank)


def _cuts(run: Run) -> Int64:
    """The steps at which sums per minute of single ranks are cut."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for session in run.sessions:
        seen = [s for s in (*session.retired, *session.segments, *session.lost) if s.last_step >= 0]
        if seen:
            span = min(s.first_step for s in seen), max(s.last_step for s in seen) + 1
            spans.setdefault(session.info.ep_rank, []).append(span)
    return ends_of_common_steps(spans)


def _without_idle(waiting: dict[_Key, _Minute], keys: list[_Key]) -> list[_Key]:
    """Of minutes in order, those that are left when ranks without any token are added to the others.

    A segment of nothing but dummy steps has no shape.
    """
    left = []
    for (minute, epoch), alike in itertools.groupby(keys, key=lambda key: key[:2]):
        group = list(alike)
        idle: _Key = (minute, epoch, None)
        if idle in group and any(waiting[key].take(waiting[idle]) for key in group if key != idle):
            del waiting[idle]
            group.remove(idle)
        left += group
    return left


def _is_small(source: _Source, columns: Sequence[str]) -> bool:
    """Whether a source is a file that is decoded as a whole."""
    segment = source.segment
    if not isinstance(segment, ParquetSegment) or not segment.has_minutes:
        return False
    return segment.minutes_bytes((*SCALARS, *columns)) <= JOINED_BYTES


def _add_rank(
    waiting: dict[_Key, _Minute], rank: int, shape: Shape | None, rows: Minutes, changes: Int64
) -> None:
    counts = np.stack([rows[name] for name in STATUS_LABELS], axis=1)
    edges = np.stack([rows[n] for n in ("first_step", "last_step", "first_time_ns", "last_time_ns")], axis=1)
    epochs = np.searchsorted(changes, edges[:, :2], side="right")
    # A segment without loads, as of a rank that was idle, has no shape, and rows without slots.
    names_slots = shape is not None and "slot" in rows.columns
    for i, (minute, edge, (epoch, until)) in enumerate(
        zip(rows["minute"].tolist(), edges.tolist(), epochs.tolist(), strict=True)
    ):
        # Copies: a view would keep all that was decoded with it.
        named = [(rows["slot"][i].copy(), rows["slot_load"][i].copy())] if names_slots else []
        first, last, begin, end = edge
        row = _Part(
            rows["rank_load"][i], {rank: _OfRank(counts[i], first, last)}, first, last, begin, end, named
        )
        parts = [row] if epoch == until else _by_placement(row, rank, changes[epoch:until].tolist())
        for number, part in enumerate(parts, epoch):
            waiting.setdefault((minute, number, shape), _Minute()).add(part)


def _by_placement(row: _Part, rank: int, changes: Sequence[int]) -> list[_Part]:
    """A row in whose steps other ranks changed their placement, as one for each placement.

    A rank without tokens is not told of the placement, so its row may go on with dummy steps while the other
    ranks change theirs; all of its tokens are under the first of these placements.
    """
    counts = row.ranks[rank].counts
    idle = row.last + 1 - changes[0]
    if counts[Status.DUMMY] < idle:
        return [row]
    parts: list[_Part] = []
    for low, high in itertools.pairwise([row.first, *changes, row.last + 1]):
        own, load, named = np.zeros_like(counts), np.zeros_like(row.load), row.named
        if not parts:
            own, load = counts.copy(), row.load
            own[Status.DUMMY] -= idle
        else:
            own[Status.DUMMY], named = high - low, []
        took = (row.last_time - row.first_time) / max(1, row.last - row.first)
        begin, end = (row.first_time + int((step - row.first) * took) for step in (low, high - 1))
        parts.append(_Part(load, {rank: _OfRank(own, low, high - 1)}, low, high - 1, begin, end, named))
    return parts


def _passed_on(
    run: Run, found: list[tuple[_Key, _Minute]], common: Ranges, of_rank: dict[int, RankSteps]
) -> Iterator[RunMinutes]:
    """Joined minutes as rows, those of one shape together.

    Args:
        common: the steps that every rank may have.
        of_rank: what each rank has in those before; these are added.
    """
    gone = Ranges(one.steps for one in run.tiers.ranges if one.tier is Tier.GONE)
    for shape, group in itertools.groupby(found, key=lambda item: item[0][2]):
        expected = serving_ranks(shape) if shape is not None else run.expected_ranks
        kept: list[tuple[int, _Part]] = []
        missing = []
        for (minute, _, _), joined in group:
            for part, lacking in joined.parts(expected, common):
                # Of a minute that a rank has retired in part, the others have more steps: it is retired.
                keep = not (lacking and gone.overlaps(part.first, part.last + 1))
                if keep or of_rank:
                    for rank, had in part.ranks.items():
                        steps = RankSteps(had.first, had.last, int(had.counts.sum()))
                        of_rank[rank] = steps.plus(of_rank.get(rank))
                if keep:
                    kept.append((minute, part))
                    missing.append(lacking)
        if not kept:
            continue
        parts = [part for _, part in kept]
        table = np.array([_counts(part) for part in parts], np.int64).reshape(len(kept), len(STATUS_LABELS))
        columns: dict[str, Array] = {
            "minute": np.array([minute for minute, _ in kept], np.int64),
            "phase": np.full(len(kept), -1, np.int64),
            "first_step": np.array([part.first for part in parts], np.int64),
            "last_step": np.array([part.last for part in parts], np.int64),
            "first_time_ns": np.array([part.first_time for part in parts], np.int64),
            "last_time_ns": np.array([part.last_time for part in parts], np.int64),
            "rank_load": np.stack([part.load for part in parts]),
            **{name: table[:, i] for i, name in enumerate(STATUS_LABELS)},
        }
        if shape is not None and any(part.named for part in parts):
            columns |= _beside_each_other(parts, shape)
        yield RunMinutes(shape, Minutes(columns, (), summed=False), missing, {**of_rank})


def _beside_each_other(parts: Sequence[_Part], shape: Shape) -> dict[str, Array]:
    """The slots that the rows of all ranks name, of each layer beside each other."""
    width, most = top_slots(shape), max(len(part.named) for part in parts)
    slot = np.full((len(parts), shape.num_moe_layers, most, width), -1, np.int32)
    load = np.zeros(slot.shape, np.int64)
    for i, part in enumerate(parts):
        for j, (slots, tokens) in enumerate(part.named):
            slot[i, :, j], load[i, :, j] = (v.reshape(-1, width) for v in (slots, tokens))
    return {"slot": slot.reshape(len(parts), -1), "slot_load": load.reshape(len(parts), -1)}


def _counts(part: _Part) -> Int64:
    """The steps of a part by status: those of the rank that has most, of which any may have recorded more."""
    counts = max((of_rank.counts for _, of_rank in sorted(part.ranks.items())), key=np.sum).copy()
    most_recorded = max(int(rank.counts[Status.RECORDED]) for rank in part.ranks.values())
    idle = min(int(counts[Status.DUMMY]), most_recorded - counts[Status.RECORDED])
    if idle > 0:
        counts[Status.RECORDED] += idle
        counts[Status.DUMMY] -= idle
    return counts


def _missing(parts: Sequence[_Part], expected: Sequence[int]) -> dict[int, str]:
    """The ranks without about the same steps in some parts as the others, and why."""
    had = Status.RECORDED, Status.DUMMY
    taken: dict[int, int] = {}
    first: dict[int, int] = {}
    for part in parts:
        for rank, steps in part.ranks.items():
            taken[rank] = taken.get(rank, 0) + int(sum(steps.counts[i] for i in had))
            first[rank] = min(first.get(rank, steps.first), steps.first)
    most = max(taken.values())
    middle = sorted(first.values())[len(first) // 2]
    found = {}
    for rank in expected:
        if rank not in first:
            found[rank] = ABSENT
        elif taken[rank] < SAME * most:
            found[rank] = PARTLY
        elif abs(first[rank] - middle) > (1 - SAME) * max(most, 1):
            found[rank] = SHIFTED
    return found
