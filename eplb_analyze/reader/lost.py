"""Ranks that died while the engine went on without them (fault-tolerant expert parallelism).

A rank can be missing because it died or because its recording did. The other ranks' loads show which: an
engine sends no token to the slots of a rank that it gave up, but many to one that serves unrecorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from eplb_analyze.distinct import distinct
from eplb_analyze.sessions.discovery import Session
from eplb_analyze.sessions.segments import Segment
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape, rank_loads
from eplb_dump.format.schema import Scope, Status

#: An even share of the tokens must be at least this many for their absence to be no chance.
MIN_TOKENS = 100


@frozen
class LostRank:
    """A rank that serves no more, and the steps without it; they end if it comes back."""

    rank: int
    steps: StepRange
    #: The wall clock at the first step without it, ns since 1970.
    time_ns: int

    @property
    def last_step(self) -> int | None:
        """The last step without it; None if it did not come back."""
        return None if self.steps.end >= NO_END else self.steps.end - 1

    def to_json(self) -> dict[str, int | None]:
        steps = {"first_step": self.steps.first, "last_step": self.last_step}
        return {"rank": self.rank, **steps, "unix_ns": self.time_ns}


@frozen
class ReducedShape(Shape):
    """The shape of loads of an engine that lost ranks; their numbers and slots stay, without any token."""

    lost: tuple[int, ...] = ()


def ranks_lost_at(step: int, lost: Sequence[LostRank]) -> tuple[int, ...]:
    """The ranks that are lost at a step, ascending."""
    return tuple(sorted({one.rank for one in lost if one.steps.first <= step < one.steps.end}))


def lost_in(shape: Shape) -> tuple[int, ...]:
    """The ranks that are lost in steps of this shape."""
    return shape.lost if isinstance(shape, ReducedShape) else ()


def serving(shape: Shape) -> int:
    """How many ranks serve in steps of this shape: means over ranks are over these."""
    return shape.ep_size - len(lost_in(shape))


def serving_ranks(shape: Shape) -> list[int]:
    return [rank for rank in range(shape.ep_size) if rank not in lost_in(shape)]


def serving_slots(shape: Shape) -> list[int]:
    """The slots of the ranks that serve."""
    width = shape.slots_per_rank
    return [rank * width + slot for rank in serving_ranks(shape) for slot in range(width)]


def remaining(shape: Shape) -> Shape:
    """The shape of an engine that has only the ranks that serve, numbered from 0 again."""
    count = serving(shape)
    return Shape(count, shape.num_moe_layers, count * shape.slots_per_rank)


def full(shape: Shape) -> Shape:
    """The shape as recorded, with all ranks."""
    return Shape(shape.ep_size, shape.num_moe_layers, shape.num_physical_experts)


def reduced(shape: Shape, lost: tuple[int, ...]) -> Shape:
    """A recorded shape without the ranks that it has and that are lost."""
    there = tuple(rank for rank in lost if rank < shape.ep_size)
    if not there:
        return shape
    return ReducedShape(shape.ep_size, shape.num_moe_layers, shape.num_physical_experts, there)


def find_lost(sessions: Sequence[Session], scope: Scope, unreadable: frozenset[int]) -> list[LostRank]:
    """The lost ranks of a run, in order of ranks and steps.

    Loads are read only if a rank has no part in steps that others recorded. With scope ``global`` one rank
    writes for all, so nothing shows that another one is lost. Raises DamagedSegmentError.

    Args:
        unreadable: ``id`` of segments whose loads cannot be read.
    """
    if scope is Scope.GLOBAL:
        return []
    segments = [
        (session.info.ep_rank, segment)
        for session in sessions
        for segment in session.segments
        if segment.shape is not None and segment.last_step >= 0 and id(segment) not in unreadable
    ]
    found = []
    tokens = _Tokens()
    for rank in range(max((s.shape.ep_size for _, s in segments if s.shape), default=0)):
        # Those that were recorded under a shape without this rank say nothing about it.
        others = [s for own, s in segments if own != rank and s.shape and s.shape.ep_size > rank]
        own = [session for session in sessions if session.info.ep_rank == rank]
        for gap in _gaps(own, others):
            lost = _lost(rank, gap, others, tokens)
            if lost is not None:
                found.append(lost)
    return found


def _gaps(own: Sequence[Session], others: Sequence[Segment]) -> Iterator[StepRange]:
    """The ranges of steps in which other ranks may have recorded some and a rank has no part."""
    if not others:
        return
    begin, end = min(s.first_step for s in others), max(s.last_step for s in others) + 1
    parts = [
        part for session in own for segment in session.segments for part in _parts(session, segment, others)
    ]
    # Of what was retired, its rows do not say any more that it had them.
    parts += [StepRange(s.first_step, s.last_step + 1) for session in own for s in session.retired]
    for part in sorted(parts):
        if part.first > begin:
            yield StepRange(begin, part.first)
        begin = max(begin, part.end)
    if begin < end:
        yield StepRange(begin, NO_END)


def _parts(session: Session, segment: Segment, others: Sequence[Segment]) -> Iterator[StepRange]:
    """A segment's steps, cut where other ranks recorded steps in which this rank has no part.

    Its rows are read only if its counts leave room for such steps.
    """
    first, end = segment.first_step, segment.last_step + 1
    if end <= first:
        return
    if segment.step_rows == end - first and _all_recorded(session, segment):
        yield StepRange(first, end)
        return
    rows = segment.steps()
    own = distinct(rows.step[(rows.status == Status.RECORDED) | (rows.status == Status.DUMMY)])
    theirs = [s.load_steps() for s in others if s.first_step < end and s.last_step >= first]
    lacking = np.setdiff1d(np.concatenate([np.empty(0, np.int64), *theirs]), own)
    lacking = lacking[(lacking >= first) & (lacking < end)]
    if not len(lacking):
        yield StepRange(first, end)
        return
    for piece in np.split(own, np.unique(np.searchsorted(own, lacking))):
        if len(piece):
            yield StepRange(int(piece[0]), int(piece[-1]) + 1)


def _all_recorded(session: Session, segment: Segment) -> bool:
    """Whether each of a segment's rows is of a step that the rank recorded, idled in or left to sampling."""
    every = session.info.interval
    if segment.recorded == segment.last_step // every - (segment.first_step - 1) // every:
        return True
    stats = (session.closed or {}).get("stats")
    return isinstance(stats, dict) and stats.get("dropped") == stats.get("rejected") == 0


def _lost(rank: int, gap: StepRange, others: Sequence[Segment], tokens: _Tokens) -> LostRank | None:
    """The end of a gap, in which no token went to the rank; None if there is none, or hardly any token."""
    inside = [s for s in others if _recorded_in(s, gap)]
    inside.sort(key=lambda s: -s.last_step)
    if inside and tokens.serves_at_the_end(rank, inside[0], gap):
        return None  # it serves, and is not recorded
    first = gap.first
    parts: list[tuple[Int64, Int64]] = []  # steps, and their tokens on all ranks
    for segment in inside:
        if segment.last_step < first:
            continue
        whole = gap.first <= segment.first_step and segment.last_step < gap.end
        stated = tokens.stated(segment) if whole else None
        if stated is not None and not stated[rank]:
            parts.append((np.array([segment.first_step]), np.array([stated.sum()])))
            continue
        steps, by_rank = tokens.by_rank(segment)
        there = (steps >= first) & (steps < gap.end)
        parts.append((steps[there], by_rank[there].sum(axis=1)))
        # Until here it served.
        first = max(first, int(steps[there & (by_rank[:, rank] > 0)].max(initial=-1)) + 1)
    total = sum(int(values[steps >= first].sum()) for steps, values in parts)
    after = [s for s in inside if s.last_step >= first]
    if not after or total < MIN_TOKENS * max(s.shape.ep_size for s in after if s.shape):
        return None
    return LostRank(rank, StepRange(first, gap.end), _time_at(first, after))


def _recorded_in(segment: Segment, steps: StepRange) -> bool:
    if segment.first_step >= steps.end or segment.last_step < steps.first:
        return False
    if steps.first <= segment.first_step and segment.last_step < steps.end:
        return True
    low, high = np.searchsorted(segment.load_steps(), steps)
    return bool(low < high)


class _Tokens:
    """Tokens on each rank, by segment; each is read once for all missing ranks."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Int64] = {}
        self._stated: dict[int, Int64 | None] = {}

    def stated(self, segment: Segment) -> Int64 | None:
        """All tokens of a segment by the manifest's sums, int64 ``[ep_size]``; None if it has none."""
        if id(segment) not in self._stated:
            sums, shape = segment.sums, segment.shape
            known = (
                None if sums is None or shape is None else rank_loads(sums.load, shape.ep_size).sum(axis=0)
            )
            self._stated[id(segment)] = known
        return self._stated[id(segment)]

    def by_rank(self, segment: Segment) -> tuple[Int64, Int64]:
        """The recorded steps and their tokens over all layers: int64 ``[steps]``, ``[steps, ep_size]``."""
        assert segment.shape is not None
        return segment.load_steps(), self._read(segment, segment.shape.num_moe_layers)

    def serves_at_the_end(self, rank: int, segment: Segment, gap: StepRange) -> bool:
        """Whether the last recorded step in a gap has tokens for a rank, by the first layer.

        The ranks of a killed engine end at different steps: then this is all that is read.
        """
        there = np.flatnonzero(segment.load_steps() < gap.end)
        return bool(len(there) and self._read(segment, 1)[there[-1], rank])

    def _read(self, segment: Segment, layers: int) -> Int64:
        key = id(segment), layers
        if key not in self._known:
            assert segment.shape is not None
            total = np.zeros((len(segment.load_steps()), segment.shape.ep_size), np.int64)
            for first, load in segment.rank_loads(0, layers):
                total += load[: max(0, layers - first)].sum(axis=0)
            self._known[key] = total
        return self._known[key]


def _time_at(step: int, segments: Sequence[Segment]) -> int:
    """The wall clock at the first step of some segments from ``step`` on, ns since 1970."""
    first = min(segments, key=lambda s: (max(step, s.first_step), s.first_step)).steps()
    return int(first.time_ns[np.searchsorted(first.step, step)])
