"""The last steps of a run while it is written: all ranks joined, sums only, of bounded size.

What is kept of a step are the tokens on each EP rank, and once all ranks have it, the terms of the
formulas. They come from :mod:`eplb_analyze.live.session`; :mod:`eplb_analyze.live.watch` explains them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from eplb_analyze.live.session import Batch
from eplb_analyze.metrics.formulas import FORMULAS, Float64, Terms
from eplb_dump.format.journal import Int64, Shape, StepRows
from eplb_dump.format.schema import Scope, Status
from eplb_dump.format.session import SessionInfo

#: Of so many windows of steps the balancedness is kept, to compare with before a rearrangement.
SERIES_WINDOWS = 4
#: So long before a rank's newest step its clock is remembered.
CLOCK_SECONDS = 10.0
BALANCEDNESS = FORMULAS["balancedness"]


@dataclass
class RankState:
    """What a rank has stated so far, of its newest session but for ``sessions`` and ``counts``."""

    session_id: str
    created_unix_ns: int
    sessions: int = 1
    last_step: int = -1
    #: The last step of its session before.
    step_before: int = -1
    #: The newest row's wall clock, ns since 1970.
    time_ns: int = 0
    #: Rows by status, since the watch began.
    counts: Counter[Status] = field(default_factory=Counter)
    #: Its steps of the last :data:`CLOCK_SECONDS` and the one before them, ascending, and when they were.
    steps: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    clock_ns: Int64 = field(default_factory=lambda: np.empty(0, np.int64))

    def add_clock(self, rows: StepRows) -> None:
        """Add rows that are newer than those it has, or older."""
        rows = rows.select(rows.status != Status.REJECTED)
        if len(rows.step):
            steps, order = np.unique(np.concatenate([self.steps, rows.step]), return_index=True)
            clock_ns = np.concatenate([self.clock_ns, rows.monotonic_ns])[order]
            horizon = int(clock_ns[-1]) - round(CLOCK_SECONDS * 1e9)
            first = max(0, int(np.searchsorted(clock_ns, horizon, side="right")) - 1)
            self.steps, self.clock_ns = steps[first:], clock_ns[first:]

    @property
    def clock_seconds(self) -> float:
        """How long before its newest step its clock is known."""
        return float(np.ptp(self.clock_ns)) / 1e9 if len(self.clock_ns) else 0.0

    def seconds_beyond(self, step: int) -> float:
        """How long before its newest step it took the first one after ``step``; 0 where it took none.

        Not how long ago it took ``step``: after an idle minute nobody is a minute behind.
        """
        at = int(np.searchsorted(self.steps, step, side="right"))
        return float(self.clock_ns[-1] - self.clock_ns[at]) / 1e9 if at < len(self.steps) else 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Over the time that its clock is known."""
        seconds = self.clock_seconds
        return float(self.steps[-1] - self.steps[0]) / seconds if seconds else None


class _Open:
    """A step that some ranks have stated and others not yet."""

    __slots__ = ("have", "load")

    def __init__(self) -> None:
        #: The ranks that recorded it or idled, and the sum of what they recorded: int64 [layers, ranks].
        self.have: set[int] = set()
        self.load: Int64 | None = None


class Window:
    """The newest ``limit`` steps that some rank recorded, and what is whole of them.

    Attributes:
        shape: of the newest loads. Where it changes, the window begins anew: nothing is summed across.
        shape_changed: the first step seen of that shape and the shape before, where it changed.
        ranks: what each writer has stated.
        restarts: how often a rank began its steps anew.
    """

    def __init__(self, limit: int, scope: Scope, per_token: int) -> None:
        """``per_token``: how often each token is counted."""
        self.limit = limit
        self.shape: Shape | None = None
        self.shape_changed: tuple[int, Shape] | None = None
        self.ranks: dict[int, RankState] = {}
        self.restarts = 0
        self._scope = scope
        self._per_token = per_token
        self._open: dict[int, _Open] = {}
        self._done: list[tuple[Int64, Terms]] = []
        self._series: list[tuple[Int64, Float64]] = []
        #: Steps before these are no longer, or not yet, of the window.
        self._floor = self._since = -1
        #: The newest step of the shape.
        self._newest = -1

    def add(self, info: SessionInfo, batch: Batch) -> bool:
        """Add a rank's batch; its sessions come in the order of their beginning.

        Returns:
            Whether it counts: not where a newer session of the rank has begun.
        """
        rank = self._rank(info)
        if rank is None:
            return False
        rows = batch.rows
        rank.counts.update(map(Status, rows.status.tolist()))
        known = np.flatnonzero(rows.status != Status.REJECTED)  # whose number can be a wrong one
        if len(known):
            first, last = int(rows.step[known[0]]), int(rows.step[known[-1]])
            if rank.last_step < 0 and first <= rank.step_before:
                self._begin_anew(info.ep_rank)
            rank.last_step = max(rank.last_step, last)
            rank.time_ns = int(rows.time_ns[known[-1]])
            rank.add_clock(rows)
        for step in rows.step[rows.status == Status.DUMMY].tolist():
            if step >= self._floor:
                self._open.setdefault(step, _Open()).have.add(info.ep_rank)
        if batch.shape is not None and self._fits(batch.shape, batch.step):
            self._add_loads(info.ep_rank, batch)
        return True

    def _rank(self, info: SessionInfo) -> RankState | None:
        """The rank's state; None where a newer session of it has begun."""
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

    def _begin_anew(self, rank: int) -> None:
        """Forget every step that a rank has a part in: it now states them once more.

        All whole steps are among them. Steps that only others have stated may be of their new life.
        """
        self.restarts += 1
        self._done, self._series = [], []
        self._open = {step: part for step, part in self._open.items() if rank not in part.have}
        self._floor = self._since = self._newest = -1

    def _fits(self, shape: Shape, steps: Int64) -> bool:
        last = int(steps[-1])
        if shape == self.shape:
            self._newest = max(self._newest, last)
            return True
        if last < max(self._since, self._newest):
            return False  # a part of the shape before that comes late, of a rank that left with it, say
        self._newest = last
        if self.shape is not None:
            self.shape_changed = int(steps[0]), self.shape
            self._since = int(steps[0])
            self._done, self._series = [], []
            self._open = {s: p for s, p in self._open.items() if s >= self._since and p.load is None}
        self.shape = shape
        return True

    def _add_loads(self, rank: int, batch: Batch) -> None:
        # Whoever has the sums already has all of them; of several writers the first counts.
        alone = self._scope is Scope.GLOBAL
        for step, load in zip(batch.step.tolist(), batch.rank_load, strict=True):
            if step < max(self._floor, self._since):
                continue
            part = self._open.setdefault(step, _Open())
            if part.load is None:
                part.load = load
            elif not alone and rank not in part.have:
                part.load = part.load + load
            part.have.add(rank)

    @property
    def expected(self) -> range:
        """The ranks that a step needs parts of; of sums that one rank writes, none in particular."""
        return range(self.shape.ep_size if self.shape and self._scope is Scope.LOCAL else 0)

    def settle(self) -> None:
        """Turn steps that all ranks have into terms, and let go of what is too old."""
        expected = set(self.expected)
        whole = sorted(step for step, part in self._open.items() if self.shape and expected <= part.have)
        parts = [(step, self._open.pop(step).load) for step in whole]
        recorded = [(step, load) for step, load in parts if load is not None]  # else all ranks idled
        if recorded:
            steps = np.array([step for step, _ in recorded], np.int64)
            terms = Terms.of(np.stack([load for _, load in recorded]), self._per_token)
            self._done.append((steps, terms))
            self._series.append((steps, BALANCEDNESS.of(terms)))
        self._let_go()

    def _let_go(self) -> None:
        begun = [step for step, part in self._open.items() if part.load is not None]
        seen = np.sort(np.concatenate([*(steps for steps, _ in self._done), np.array(begun, np.int64)]))
        if len(seen) > self.limit:
            self._floor = max(self._floor, int(seen[-self.limit]))
        self._open = {step: part for step, part in self._open.items() if step >= self._floor}
        idle = sorted(step for step, part in self._open.items() if part.load is None)
        for step in idle[: -self.limit]:
            del self._open[step]
        kept = []
        for steps, terms in self._done:
            new = steps >= self._floor
            if new.all():
                kept.append((steps, terms))
            elif new.any():
                kept.append((steps[new], terms.select(new)))
        self._done = kept
        excess = sum(len(steps) for steps, _ in self._series) - SERIES_WINDOWS * self.limit
        while self._series and excess >= len(self._series[0][0]):
            excess -= len(self._series.pop(0)[0])

    def whole(self) -> tuple[Int64, Terms | None]:
        """The complete steps, ascending, and their terms; None where there is none."""
        if not self._done:
            return np.empty(0, np.int64), None
        steps = np.concatenate([steps for steps, _ in self._done])
        terms = Terms.concat([terms for _, terms in self._done])
        order = np.argsort(steps)
        return steps[order], terms.select(order)

    def series(self) -> tuple[Int64, Float64]:
        """Steps, ascending, and their balancedness; of more steps than the window has."""
        if not self._series:
            return np.empty(0, np.int64), np.empty(0)
        steps, values = (np.concatenate(column) for column in zip(*self._series, strict=True))
        order = np.argsort(steps)
        return steps[order], values[order]

    def unfinished(self, gone: set[int]) -> tuple[int, int]:
        """Recorded steps that lack a rank: ``(incomplete, in flight)``.

        In flight are those that every missing rank has yet to come to; those that are ``gone`` will not.
        """
        incomplete = in_flight = 0
        for step, part in self._open.items():
            if part.load is not None:
                missing = [rank for rank in self.expected if rank not in part.have]
                coming = all(
                    rank in self.ranks and rank not in gone and self.ranks[rank].last_step < step
                    for rank in missing
                )
                in_flight += coming
                incomplete += not coming
        return incomplete, in_flight
