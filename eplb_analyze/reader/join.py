"""Joins the step rows of all ranks: one state for each step of a run."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.distinct import distinct
from eplb_analyze.reader.lost import LostRank, full, ranks_lost_at, reduced, serving_ranks
from eplb_analyze.sessions.discovery import Session
from eplb_analyze.sessions.segments import Segment
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape, StepRows
from eplb_dump.format.schema import DURATIONS, Scope, Status

#: At most this many steps are joined at once (segments of one run normally end at common steps).
MAX_BLOCK_STEPS = 4096


ABSENT = 255
#: The phase of a step that ranks are in with different ones.
MIXED = "mixed"


#: Which of several rows for one step counts: recorded before dummy before any other.
STATUS_WEIGHT = np.zeros(256, np.int8)


STATUS_WEIGHT[[Status.NOT_SAMPLED, Status.DROPPED]] = 1


STATUS_WEIGHT[Status.DUMMY] = 2


STATUS_WEIGHT[Status.RECORDED] = 3


STATUS_WEIGHT[ABSENT] = -1


Float64 = npt.NDArray[np.float64]
Status8 = npt.NDArray[np.uint8]


class StepState(enum.IntEnum):
    """The state of a step over all ranks."""

    RECORDED = Status.RECORDED
    DUMMY = Status.DUMMY
    NOT_SAMPLED = Status.NOT_SAMPLED
    DROPPED = Status.DROPPED
    REJECTED = Status.REJECTED
    #: A rank recorded it and another expected rank did not: never summed as if complete.
    INCOMPLETE = 5

    @property
    def label(self) -> str:
        return self.name.lower()


@frozen
class RankRows:
    """Step rows of one session of one rank.

    Attributes:
        session: sessions of a rank have ascending numbers; the newest counts.
        shape: the shape of the loads of the recorded steps.
        clock_offset_ns: added to a monotonic time it gives ns since 1970, by the clock at the session's
            start.
    """

    rank: int
    session: int
    rows: StepRows
    shape: Shape | None
    clock_offset_ns: int


@frozen
class Source:
    """A segment of a block, with its rank and session."""

    rank: int
    session: int
    segment: Segment
    #: See :class:`RankRows`.
    clock_offset_ns: int
    #: False if its loads turned out to be damaged: its recorded steps count as absent.
    readable: bool

    @classmethod
    def of(cls, session: Session, number: int, segment: Segment, *, readable: bool = True) -> Source:
        """A segment of the session with this number."""
        info = session.info
        return cls(info.ep_rank, number, segment, info.created_unix_ns - info.created_monotonic_ns, readable)

    def rows(self) -> RankRows:
        """Read the step rows. Raises DamagedSegmentError."""
        rows = self.segment.steps()
        if not self.readable:
            recorded = rows.status == Status.RECORDED
            rows = replace(rows, status=np.where(recorded, np.uint8(ABSENT), rows.status))
        return RankRows(self.rank, self.session, rows, self.segment.shape, self.clock_offset_ns)


@dataclass
class JoinedRows:
    """The step rows of all ranks: one column per seen step."""

    step: Int64
    ranks: list[int]
    status: Status8
    #: The session of the rank that a status is from; -1 if it is ABSENT.
    owner: npt.NDArray[np.int32]
    state: Status8
    shape: npt.NDArray[np.int32]
    shapes: list[Shape]
    time_ns: Int64
    clock_ns: Int64
    num_tokens: Int64
    step_ms: Float64
    device_ms: Float64
    phase: npt.NDArray[np.int64]
    phases: list[str]

    def select(self, columns: npt.NDArray[np.bool_]) -> JoinedRows:
        """The rows of some steps."""
        by_step: dict[str, Any] = {
            name: value[..., columns] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **by_step)


def overlapping_segments(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Groups of segments with overlapping steps. No step is in two groups."""
    group: list[Source] = []
    end = -1
    for source in sorted(sources, key=lambda s: (s.segment.first_step, s.session)):
        if group and source.segment.first_step > end:
            yield group
            group = []
        group.append(source)
        end = max(end, source.segment.last_step)
    if group:
        yield group


def same_shape_ranges(
    rows: JoinedRows, first: int, end: int, cuts: Sequence[int] = ()
) -> Iterator[tuple[int, int]]:
    """Ranges of columns between ``first`` and ``end`` of one shape, at most ``MAX_BLOCK_STEPS`` long.

    ``cuts``: steps at which others begin, too.
    """
    found = [*(np.flatnonzero(np.diff(rows.shape)) + 1), *np.searchsorted(rows.step, cuts)]
    edges = sorted({int(edge) for edge in found if first < edge < end})
    for start, stop in zip([first, *edges], [*edges, end], strict=True):
        for low in range(start, stop, MAX_BLOCK_STEPS):
            yield low, min(low + MAX_BLOCK_STEPS, stop)


def join_rows(
    parts: Sequence[RankRows],
    ranks: list[int],
    scope: Scope,
    last_shape: Shape | None,
    initial: int,
    lost: Sequence[LostRank] = (),
) -> JoinedRows:
    """Join the rows of a group.

    Args:
        last_shape: the shape before this group, if known.
        initial: the ep_size to expect if no shape is known.
        lost: ranks that a step without them does not lack.
    """
    step: Int64 = distinct(np.concatenate([part.rows.step for part in parts]))
    n = len(step)
    status = np.full((len(ranks), n), ABSENT, np.uint8)
    owner = np.full((len(ranks), n), -1, np.int32)
    time_ns, clock_ns = np.zeros(n, np.int64), np.zeros(n, np.int64)
    num_tokens = np.full((len(ranks), n), -1, np.int64)
    # Of the ranks that recorded a step; most runs have no durations, or one kind of them.
    durations = {
        name: np.full((len(ranks), n), np.nan, np.float32)
        for name in DURATIONS
        if not all(np.isnan(getattr(part.rows, name)).all() for part in parts)
    }
    phase = np.full((len(ranks), n), -1, np.int32)
    phases: list[str] = []
    shape_of = np.full((len(ranks), n), -1, np.int32)
    shapes: list[Shape] = []
    row_of = {rank: i for i, rank in enumerate(ranks)}
    if last_shape is not None:
        shapes.append(full(last_shape))
    for part in sorted(parts, key=lambda part: part.session):
        row, rows = row_of[part.rank], part.rows
        phases += [name for name in rows.phases if name not in phases]
        phase_code = np.array([*map(phases.index, rows.phases), -1], np.int64)
        # Of several rows of one rank for a step the weightiest counts; of equals, the newest session's.
        weight = STATUS_WEIGHT[rows.status]
        for level in distinct(weight):
            chosen = np.flatnonzero(weight == level)
            at = np.searchsorted(step, rows.step[chosen])
            free = STATUS_WEIGHT[status[row, at]] <= level
            chosen, at = chosen[free], at[free]
            status[row, at] = rows.status[chosen]
            owner[row, at] = part.session
            num_tokens[row, at] = rows.num_tokens[chosen]
            if level == STATUS_WEIGHT[Status.RECORDED]:
                for name, of_rank in durations.items():
                    of_rank[row, at] = getattr(rows, name)[chosen]
            time_ns[at] = rows.time_ns[chosen]
            clock_ns[at] = rows.monotonic_ns[chosen] + part.clock_offset_ns
            named = rows.phase[chosen] >= 0
            phase[row, at[named]] = phase_code[rows.phase[chosen][named]]
        if part.shape is not None:
            if part.shape not in shapes:
                shapes.append(part.shape)
            at = np.searchsorted(step, rows.step[rows.status == Status.RECORDED])
            shape_of[row, at] = shapes.index(part.shape)
    shape_row, at_odds = _shapes(shape_of, shapes, last_shape is not None)
    shape_row = _without_lost(step, shape_row, shapes, lost)
    state = _states(ranks, status, shape_row, shapes, scope, initial)
    state[at_odds] = StepState.INCOMPLETE
    total = _total_tokens(status, num_tokens, scope)
    # A step takes as long as its slowest rank.
    step_ms, device_ms = (
        np.fmax.reduce(durations[name]).astype(np.float64) if name in durations else np.full(n, np.nan)
        for name in DURATIONS
    )
    return JoinedRows(
        step, ranks, status, owner, state, shape_row, shapes, time_ns, clock_ns, total,
        step_ms, device_ms, _phase(phase, phases), phases,
    )  # fmt: skip


def _phase(of_rank: npt.NDArray[np.int32], phases: list[str]) -> Int64:
    """Each step's index into ``phases``, from its ranks' ``[R, S]``; that of ``MIXED`` if they differ."""
    phase: Int64 = of_rank.max(axis=0, initial=-1).astype(np.int64)
    mixed = (of_rank != phase) & (of_rank >= 0)
    if mixed.any():
        if MIXED not in phases:
            phases.append(MIXED)
        phase[mixed.any(axis=0)] = phases.index(MIXED)
    return phase


def _total_tokens(status: Status8, num_tokens: Int64, scope: Scope) -> Int64:
    """The tokens of all ranks that recorded a step; -1 unless each of them stated its own: int64 [S]."""
    recorded = status == Status.RECORDED
    if scope is Scope.GLOBAL:  # of several ranks that wrote sums for a step the lowest counts
        recorded &= recorded.cumsum(axis=0) == 1
    known = recorded.any(axis=0) & ~(recorded & (num_tokens < 0)).any(axis=0)
    return np.where(known, np.where(recorded, num_tokens, 0).sum(axis=0), -1)


def _shapes(
    shape_of: npt.NDArray[np.int32], shapes: list[Shape], continued: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Each step's index into ``shapes``, -1 if unknown, and whether its ranks recorded different ones.

    Args:
        shape_of: the same of each rank's load, ``[R, S]``.
        continued: whether the first of ``shapes`` is that of the steps before.
    """
    n = shape_of.shape[1]
    shape = shape_of.max(axis=0, initial=-1)
    at_odds = ((shape_of >= 0) & (shape_of != shape)).any(axis=0)
    # A step that no rank recorded has the shape before it or, at the start, after it.
    known = np.flatnonzero(shape >= 0)
    if len(known) or continued:
        before = np.searchsorted(known, np.arange(n), side="right") - 1
        earlier = 0 if continued else shape[known[0]]
        inherited = shape[known[np.maximum(before, 0)]] if len(known) else np.zeros(n, shape.dtype)
        shape = np.where(before >= 0, inherited, earlier)
    return shape, at_odds


def _without_lost(
    step: Int64, shape: npt.NDArray[np.int32], shapes: list[Shape], lost: Sequence[LostRank]
) -> npt.NDArray[np.int32]:
    """The steps' shapes without the ranks that are lost then; new ones are appended to ``shapes``."""
    edges = sorted({edge for one in lost for edge in one.steps})
    cuts = [0, *np.searchsorted(step, edges).tolist(), len(step)]
    for low, high in itertools.pairwise(cuts):
        if low == high:
            continue
        gone = ranks_lost_at(int(step[low]), lost)
        for index in distinct(shape[low:high]) if gone else ():
            fewer = reduced(shapes[index], gone) if index >= 0 else None
            if fewer is not None and fewer not in shapes:
                shapes.append(fewer)
            if fewer is not None:
                shape[low:high][shape[low:high] == index] = shapes.index(fewer)
    return shape


def _states(
    ranks: list[int],
    status: Status8,
    shape: npt.NDArray[np.int32],
    shapes: list[Shape],
    scope: Scope,
    initial_ep_size: int,
) -> Status8:
    """Each step's :class:`StepState`, from the ranks' statuses and the step's shape."""
    state = np.full(status.shape[1], StepState.INCOMPLETE, np.uint8)
    for index in distinct(shape):
        columns = np.flatnonzero(shape == index)
        needed = {*(serving_ranks(shapes[index]) if index >= 0 else range(initial_ep_size))}
        expected = [i for i, rank in enumerate(ranks) if rank in needed]
        here = status[expected][:, columns]
        whole = len(expected) == len(needed)
        if scope is Scope.GLOBAL:  # the lowest rank that has the step holds the sums
            best = STATUS_WEIGHT[status[:, columns]].argmax(axis=0)
            here, whole = status[best, columns][None], True
        recorded = (here == Status.RECORDED).any(axis=0)
        present = whole & (here != ABSENT).all(axis=0)
        had = whole & ((here == Status.RECORDED) | (here == Status.DUMMY)).all(axis=0)
        # If no rank recorded the step, the most serious reason of any rank is its state.
        gravest = np.where(here == ABSENT, 0, here).max(axis=0, initial=0)
        state[columns] = np.where(
            recorded,
            np.where(had, StepState.RECORDED, StepState.INCOMPLETE),
            np.where(present, gravest, StepState.INCOMPLETE),
        )
    return state
