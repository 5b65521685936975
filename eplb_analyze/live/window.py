"""The newest steps of a run that is being written: all ranks joined, in bounded memory.

For each incomplete step it keeps the tokens of each slot, summed over the ranks that wrote it. Of a complete
step it keeps the terms of the formulas, and hands its slots on once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.live.session import Batch
from eplb_analyze.metrics.formulas import FORMULAS, Float64, Terms
from eplb_analyze.reader.join import JoinedRows, RankRows, StepState, join_rows
from eplb_analyze.reader.lost import MIN_TOKENS, LostRank, full, serving, serving_ranks
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape, StepRows
from eplb_dump.format.schema import Scope, Status
from eplb_dump.format.session import SessionInfo

#: Balancedness is kept for this many windows of steps, to compare steps before and after a rearrangement.
SERIES_WINDOWS = 4
#: Step times are kept this long before a rank's newest step.
CLOCK_SECONDS = 10.0
BALANCEDNESS = FORMULAS["balancedness"]
#: Up to so many slots per rank it is faster to add one slot of all ranks after another.
FEW_SLOTS = 16


@dataclass
class RankState:
    """The progress of a rank in its newest session; ``sessions`` and ``counts`` cover all its sessions."""

    session_id: str
    created_unix_ns: int
    sessions: int = 1
    last_step: int = -1
    #: The last step of its earlier sessions.
    step_before: int = -1
    #: The clock time of the newest row, ns since 1970.
    time_ns: int = 0
    #: The number of rows by status since the watch started.
    counts: Counter[Status] = field(default_factory=Counter)
    #: The steps of the last :data:`CLOCK_SECONDS` and the one before them, ascending, and their times.
    steps: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    clock_ns: Int64 = field(default_factory=lambda: np.empty(0, np.int64))

    def add_clock(self, rows: StepRows) -> None:
        """Add rows that are all newer or all older than the known ones."""
        rows = rows.select(rows.status != Status.REJECTED)
        if len(rows.step):
            steps, order = np.unique(np.concatenate([self.steps, rows.step]), return_index=True)
            clock_ns = np.concatenate([self.clock_ns, rows.monotonic_ns])[order]
            horizon = int(clock_ns[-1]) - round(CLOCK_SECONDS * 1e9)
            first = max(0, int(np.searchsorted(clock_ns, horizon, side="right")) - 1)
            self.steps, self.clock_ns = steps[first:], clock_ns[first:]

    @property
    def first_recent(self) -> int:
        """The first step of the last :data:`CLOCK_SECONDS`."""
        if not len(self.steps):
            return 0
        horizon = int(self.clock_ns[-1]) - round(CLOCK_SECONDS * 1e9)
        return int(self.steps[np.searchsorted(self.clock_ns, horizon)])

    @property
    def clock_seconds(self) -> float:
        """How many seconds before the newest step the step times reach back."""
        return float(np.ptp(self.clock_ns)) / 1e9 if len(self.clock_ns) else 0.0

    def seconds_beyond(self, step: int) -> float:
        """Seconds from the first step after ``step`` to the newest step; 0 if there is none.

        It does not count from ``step`` itself: after an idle minute no rank is a minute behind.
        """
        at = int(np.searchsorted(self.steps, step, side="right"))
        return float(self.clock_ns[-1] - self.clock_ns[at]) / 1e9 if at < len(self.steps) else 0.0

    @property
    def steps_per_second(self) -> float | None:
        """The average over the known step times; None if there are fewer than two."""
        seconds = self.clock_seconds
        return float(self.steps[-1] - self.steps[0]) / seconds if seconds else None


def _sum_slots(load: npt.NDArray[Any], ep_size: int) -> Int64:
    """Tokens of each rank, int64 ``[..., ep_size]``, from those of each slot or rank ``[..., slots]``."""
    by_rank = load.reshape(*load.shape[:-1], ep_size, -1)
    if by_rank.shape[-1] > FEW_SLOTS:
        summed: Int64 = by_rank.sum(axis=-1, dtype=np.int64)
        return summed
    total: Int64 = by_rank[..., 0].astype(np.int64)
    for slot in range(1, by_rank.shape[-1]):
        total += by_rank[..., slot]
    return total


@dataclass
class _StepSum:
    """The loads of one step, ``[layers, slots]``, summed over these ranks.

    ``[layers, ep_size]`` if a part of it was read from a sealed segment.
    """

    load: npt.NDArray[Any]
    ranks: set[int]
    ep_size: int

    @classmethod
    def of(cls, load: npt.NDArray[Any], rank: int, ep_size: int) -> _StepSum:
        # Half the memory, and faster, if the sum over any number of ranks cannot overflow.
        return cls(load.astype(np.int32 if load.dtype.itemsize <= 2 else np.int64), {rank}, ep_size)

    def add(self, load: npt.NDArray[Any], rank: int) -> None:
        if load.shape != self.load.shape:
            self.load, load = self.by_rank(), _sum_slots(load, self.ep_size)
        elif load.dtype.itemsize > 2:
            self.load = self.load.astype(np.int64, copy=False)
        self.load += load
        self.ranks.add(rank)

    def by_rank(self) -> Int64:
        """int64 ``[layers, ep_size]``."""
        return _sum_slots(self.load, self.ep_size)


@frozen
class CompleteSteps:
    """Steps that became complete.

    Attributes:
        step: int64 ``[n]``, ascending.
        time_ns: int64 ``[n]``, clock times, ns since 1970.
        clock_ns: int64 ``[n]``, of one rank's monotonic clock.
        step_ms, device_ms: float64 ``[n]``, what the engine and the device recorded; NaN if unknown.
        terms: the terms of the formulas.
        load: integers ``[n, layers, slots]``, the tokens of each slot; None if only those of ranks are known.
        rank_load: int64 ``[n, layers, ep_size]``, the tokens of each rank.
        phase: int64 ``[n]``, an index into ``phases``; -1 if not named.
    """

    step: Int64
    time_ns: Int64
    clock_ns: Int64
    step_ms: Float64
    device_ms: Float64
    terms: Terms
    load: npt.NDArray[Any] | None
    rank_load: Int64
    phase: Int64
    phases: Sequence[str]
    shape: Shape


class Window:
    """The newest ``limit`` steps that some rank recorded, and the terms of the complete ones.

    :mod:`eplb_analyze.reader.join` decides which steps are complete, as for a finished run. Loads are summed
    as they arrive: 1000 steps of 64 ranks and 58 layers that wait for one more rank would take 1.9 GB, their
    sums take 30 MB.

    Attributes:
        shape: the shape of the newest loads. When it changes, the window is cleared.
        shape_changed: the first step with that shape, if it changed during the watch.
        ranks: the progress of each writer.
        lost: ranks that the engine continues without; steps are complete without them.
        restarts: how many times a rank started again at an earlier step.
    """

    def __init__(self, limit: int, scope: Scope, token_replication: int) -> None:
        self.limit = limit
        self.shape: Shape | None = None
        self.shape_changed: int | None = None
        self.ranks: dict[int, RankState] = {}
        self.restarts = 0
        self.lost: list[LostRank] = []
        self._scope = scope
        self._token_replication = token_replication
        #: Rows of incomplete steps by session and shape, and rows added since the last merge.
        self._pending: dict[tuple[str, Shape | None], StepRows] = {}
        self._new: dict[tuple[str, Shape | None], list[StepRows]] = {}
        self._infos: dict[str, SessionInfo] = {}
        self._sums: dict[int, _StepSum] = {}
        #: Recorded steps that lack a rank, and which ranks have them: bool ``[len(ranks), steps]``.
        self._open: Int64 = np.empty(0, np.int64)
        self._present = np.empty((0, 0), np.bool_)
        self._complete: list[tuple[Int64, Terms]] = []
        self._series: list[tuple[Int64, Float64]] = []
        self._news: list[CompleteSteps] = []
        #: Steps before this one are ignored.
        self._floor = -1

    def add(self, info: SessionInfo, batch: Batch) -> bool:
        """Add a rank's batch. The sessions of a rank must come in order of creation.

        Returns:
            False if the batch was ignored because the rank has a newer session.
        """
        rank = self._rank(info)
        if rank is None:
            return False
        rows = batch.rows
        rank.counts.update(map(Status, rows.status.tolist()))
        known = np.flatnonzero(rows.status != Status.REJECTED)  # the number of a rejected step can be wrong
        if len(known):
            first, last = int(rows.step[known[0]]), int(rows.step[known[-1]])
            if rank.last_step < 0 and first <= rank.step_before:
                self._start_again(info.ep_rank)
            rank.last_step = max(rank.last_step, last)
            rank.time_ns = int(rows.time_ns[known[-1]])
            rank.add_clock(rows)
            self._returned(info.ep_rank, rows.step[known])
        self._infos[info.session_id] = info
        has_part = (rows.status == Status.RECORDED) | (rows.status == Status.DUMMY)
        rows = rows.select(has_part & (rows.step >= self._floor))
        if len(rows.step):
            self._new.setdefault((info.session_id, batch.shape), []).append(rows)
        if batch.shape is not None:
            for step, load in zip(batch.step.tolist(), batch.load, strict=True):
                if step >= self._floor:
                    self._add_load(step, info.ep_rank, load, batch.shape)
        return True

    def _add_load(self, step: int, rank: int, load: npt.NDArray[Any], shape: Shape) -> None:
        total = self._sums.get(step)
        # Every writer of scope global has the same sums; the join takes the lowest rank's.
        if total is None or total.ep_size != shape.ep_size or len(total.load) != len(load):
            self._sums[step] = _StepSum.of(load, rank, shape.ep_size)
        elif self._scope is Scope.GLOBAL:
            if rank < min(total.ranks):
                self._sums[step] = _StepSum.of(load, rank, shape.ep_size)
        elif rank not in total.ranks:
            total.add(load, rank)

    def _rank(self, info: SessionInfo) -> RankState | None:
        """The rank's state; None if the rank has a newer session."""
        rank = self.ranks.get(info.ep_rank)
        if rank is None:
            rank = self.ranks[info.ep_rank] = RankState(info.session_id, info.created_unix_ns)
        elif rank.session_id != info.session_id:
            if rank.created_unix_ns > info.created_unix_ns:
                return None
            rank = self.ranks[info.ep_rank] = RankState(
                info.session_id,
                info.created_unix_ns,
                sessions=rank.sessions + 1,
                step_before=max(rank.last_step, rank.step_before),
                counts=rank.counts,
            )
        return rank

    def _start_again(self, rank: int) -> None:
        """Forget all steps that the rank recorded before it restarted, which includes all complete ones.

        Steps that only other ranks have may come from their own restart, so they stay.
        """
        self.restarts += 1
        self.lost = []
        self._complete, self._series, self._news = [], [], []
        self._merge_new()
        own = [rows.step for (name, _), rows in self._pending.items() if self._infos[name].ep_rank == rank]
        forgotten = np.concatenate([np.empty(0, np.int64), *own])
        self._select_rows(lambda rows: ~np.isin(rows.step, forgotten))
        for step in forgotten.tolist():
            self._sums.pop(step, None)
        self._floor = -1

    def _select_rows(self, mask: Callable[[StepRows], npt.NDArray[np.bool_]]) -> None:
        self._merge_new()
        selected = {key: rows.select(mask(rows)) for key, rows in self._pending.items()}
        self._pending = {key: rows for key, rows in selected.items() if len(rows.step)}

    def _merge_new(self) -> None:
        for key, rows in self._new.items():
            before = [self._pending[key]] if key in self._pending else []
            self._pending[key] = StepRows.concat([*before, *rows])
        self._new = {}

    @property
    def expected(self) -> list[int]:
        """The ranks that must record a step; empty with scope global, where any one rank is enough."""
        return serving_ranks(self.shape) if self.shape and self._scope is Scope.LOCAL else []

    def give_up(self, ranks: set[int]) -> None:
        """Take ranks that stopped for lost, if the others' newest steps send them nothing."""
        lost = [one for rank in sorted(ranks & {*self.expected}) if (one := self._lost(rank)) is not None]
        if lost:
            self.lost += lost
            self.settle()

    def _returned(self, rank: int, steps: Int64) -> None:
        """End the loss of a rank that has steps again; those before the loss can come late."""
        for number, one in enumerate(self.lost):
            later = steps[steps >= one.steps.first]
            if one.rank == rank and len(later):
                self.lost[number] = replace(one, steps=one.steps.clip(0, int(later[0])))

    def _lost(self, rank: int) -> LostRank | None:
        last = self.ranks[rank].last_step if rank in self.ranks else -1
        steps = self._open[self._open > last]
        if not len(steps) or self._sums[int(steps[-1])].by_rank()[:, rank].any():
            return None
        by_rank = np.stack([self._sums[step].by_rank().sum(axis=0) for step in steps.tolist()])
        served = np.flatnonzero(by_rank[:, rank])
        without = steps[served[-1] + 1 :] if len(served) else steps
        if by_rank[-len(without) :].sum() < MIN_TOKENS * by_rank.shape[1]:
            return None
        return LostRank(rank, StepRange(int(without[0])), 0)

    def settle(self) -> None:
        """Compute the terms of steps that became complete, and drop old steps."""
        self._open = np.empty(0, np.int64)
        self._merge_new()
        if not self._pending:
            return
        rows = self._joined()
        present = (rows.status == Status.RECORDED) | (rows.status == Status.DUMMY)
        of_shape = self._of_newest_shape(rows)
        of_shape &= (rows.step >= self._floor) & ~np.isin(rows.step, self._complete_steps())
        recorded = (rows.status == Status.RECORDED).any(axis=0) & of_shape
        complete = (rows.state == StepState.RECORDED) & of_shape
        if complete.any():
            steps = rows.step[complete]
            assert self.shape is not None
            sums = [self._sums[step] for step in steps.tolist()]
            load, by_rank = _stacked(sums, self.shape.num_physical_experts)
            terms = Terms.of(by_rank, self._token_replication, serving(self.shape))
            self._complete.append((steps, terms))
            self._news.append(
                CompleteSteps(
                    steps,
                    rows.time_ns[complete],
                    rows.clock_ns[complete],
                    rows.step_ms[complete],
                    rows.device_ms[complete],
                    terms,
                    load,
                    by_rank,
                    rows.phase[complete],
                    rows.phases,
                    self.shape,
                )
            )
            self._series.append((steps, BALANCEDNESS.of(terms)))
        waiting = recorded & ~complete
        self._drop_old(rows.step[waiting])
        waiting &= rows.step >= self._floor
        idle = (rows.step >= self._floor) & of_shape & ~recorded & (rows.state != StepState.DUMMY)
        kept = np.sort(np.concatenate([rows.step[waiting], rows.step[idle][-self.limit :]]))
        self._open, self._present = rows.step[waiting], present[:, waiting]
        if len(kept):
            self._select_rows(lambda some: np.isin(some.step, kept))
        else:  # the usual case: all ranks are at the same step
            self._pending = {}
        self._sums = {step: self._sums[step] for step in self._open.tolist()}

    def _joined(self) -> JoinedRows:
        infos = sorted(self._infos.values(), key=lambda info: (info.created_unix_ns, info.session_id))
        numbers = {info.session_id: number for number, info in enumerate(infos)}
        parts = [
            RankRows(self._infos[name].ep_rank, numbers[name], rows, shape, 0)
            for (name, shape), rows in self._pending.items()
        ]
        ep_size = max(info.ep_size for info in infos)
        return join_rows(parts, sorted(self.ranks), self._scope, self.shape, ep_size, self.lost)

    def _of_newest_shape(self, rows: JoinedRows) -> npt.NDArray[np.bool_]:
        """A mask of the steps with the newest shape. Clears the window if the shape changed."""
        newest = rows.shape[-1]
        if newest < 0:
            return np.ones(len(rows.step), np.bool_)
        shape = rows.shapes[newest]
        other: npt.NDArray[np.bool_] = rows.shape != newest
        # Incomplete steps of another shape do not prove a change: ranks that left long ago may have recorded
        # them. A rank that recorded both shapes does.
        recorded = rows.status == Status.RECORDED
        both = recorded[:, other].any(axis=1) & recorded[:, ~other].any(axis=1)
        mixed = bool(both.any() or (other & (rows.state == StepState.RECORDED)).any())
        if shape != self.shape or mixed:
            start = int(np.flatnonzero(other)[-1]) + 1 if other.any() else 0
            if self.shape is not None or mixed:
                before = [rows.shapes[i] for i in np.unique(rows.shape[other]) if i >= 0]
                before += [] if self.shape is None else [self.shape]
                # A loss changes over which ranks figures are, not what the engine has.
                if any(full(one) != full(shape) for one in before):
                    self.shape_changed = int(rows.step[start])
                self._complete, self._series, self._news = [], [], []
            self._floor = (
                max(self._floor, int(rows.step[start])) if other.any() or self.shape else self._floor
            )
            self.shape = shape
        return ~other

    def _complete_steps(self) -> Int64:
        found: Int64 = np.concatenate([np.empty(0, np.int64), *(steps for steps, _ in self._complete)])
        return found

    def _drop_old(self, waiting: Int64) -> None:
        """Drop all but the newest ``limit`` of the complete steps and the ``waiting`` incomplete ones."""
        seen = np.sort(np.concatenate([self._complete_steps(), waiting]))
        if len(seen) > self.limit:
            self._floor = max(self._floor, int(seen[-self.limit]))
        kept = []
        for steps, terms in self._complete:
            new = steps >= self._floor
            if new.all():
                kept.append((steps, terms))
            elif new.any():
                kept.append((steps[new], terms.select(new)))
        self._complete = kept
        excess = sum(len(steps) for steps, _ in self._series) - SERIES_WINDOWS * self.limit
        while self._series and excess >= len(self._series[0][0]):
            excess -= len(self._series.pop(0)[0])

    def complete(self) -> tuple[Int64, Terms | None]:
        """The complete steps, ascending, and their terms; None if there are no complete steps."""
        if not self._complete:
            return np.empty(0, np.int64), None
        steps = self._complete_steps()
        terms = Terms.concat([terms for _, terms in self._complete])
        if (np.diff(steps) > 0).all():  # the usual case
            return steps, terms
        order = np.argsort(steps)
        return steps[order], terms.select(order)

    def take_news(self) -> list[CompleteSteps]:
        """The steps that became complete since the last call."""
        news, self._news = self._news, []
        return news

    @property
    def first_step(self) -> int:
        """Figures cover no step before this one."""
        return max(0, self._floor)

    def series(self) -> tuple[Int64, Float64]:
        """Steps, ascending, and their balancedness, over :data:`SERIES_WINDOWS` windows."""
        if not self._series:
            return np.empty(0, np.int64), np.empty(0)
        steps, values = (np.concatenate(column) for column in zip(*self._series, strict=True))
        order = np.argsort(steps)
        return steps[order], values[order]

    def unfinished(self, gone: set[int]) -> tuple[int, int]:
        """The number of recorded steps that lack a rank: ``(incomplete, in flight)``.

        A step is in flight if every missing rank can still reach it. The ranks in ``gone`` cannot.
        """
        if not len(self._open):
            return 0, 0
        ranks = sorted(self.ranks)
        last = np.array([NO_END if rank in gone else self.ranks[rank].last_step for rank in ranks])
        lost = ~self._present & (last[:, np.newaxis] >= self._open)
        expected = [row for row, rank in enumerate(ranks) if rank in self.expected]
        incomplete = len(self._open)
        if len(expected) == len(self.expected):
            incomplete = int(lost[expected].any(axis=0).sum())
        return incomplete, len(self._open) - incomplete


def _stacked(sums: list[_StepSum], slots: int) -> tuple[npt.NDArray[Any] | None, Int64]:
    """The tokens of each slot of some steps, or None if some are known by rank only, and of each rank."""
    if all(total.load.shape[1] == slots for total in sums):
        load = np.stack([total.load for total in sums])
        return load, _sum_slots(load, sums[0].ep_size)
    return None, np.stack([total.by_rank() for total in sums])
