"""Totals over all that a follower has read. They only grow, also when it moves on to another run.

A monitoring system takes differences of them, so a row, a step or an incident counts once, also if the same
run is read again, because another engine start turned up under its run id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.live.alerts import Alert, replaces
from eplb_analyze.live.recent_steps import RecentSteps
from eplb_analyze.live.window import BALANCEDNESS, CompleteSteps
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.formulas import FORMULAS, Float64
from eplb_analyze.metrics.pauses import MARGIN, NEIGHBORS, Neighborhoods
from eplb_analyze.reader.placements import PlacementHistory
from eplb_dump.format.journal import StepRows
from eplb_dump.format.schema import Status
from eplb_dump.format.session import SessionInfo

IMBALANCE = FORMULAS["imbalance"]
#: So many of the newest incidents are remembered.
KNOWN_INCIDENTS = 64


@dataclass
class Sum:
    """A sum and how many values are in it."""

    count: int = 0
    total: float = 0.0

    def add(self, values: Float64) -> None:
        known = values[np.isfinite(values)]
        self.count += len(known)
        self.total += float(known.sum())


@dataclass
class RankTotals:
    """Of one rank: the rows of ``steps`` by status, the sessions that they were in, and the newest's time."""

    rows: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    sessions: int = 0
    #: ns since 1970.
    newest_ns: int = 0


class Totals:
    """What a follower has read so far.

    Attributes:
        ranks: by EP rank.
        runs: how many runs were followed, one after another.
        complete_steps: steps that all ranks recorded.
        balancedness, imbalance: of the complete steps with an active layer.
        mean_tokens, max_tokens: Σ over complete steps and layers of the mean and the maximum over ranks.
        incidents: incidents that began.
        rearrangements: rearrangements of the placement.
        pauses: of the rearrangements whose pause is known, in seconds.
    """

    def __init__(self) -> None:
        self.ranks: dict[int, RankTotals] = {}
        self.runs = 0
        self.complete_steps = 0
        self.balancedness, self.imbalance = Sum(), Sum()
        self.mean_tokens = self.max_tokens = 0.0
        self.incidents = self.rearrangements = 0
        self.pauses = Sum()
        self._run: tuple[str, str] | None = None
        #: The newest clock time of a row of each session, and of a complete step; what is counted by now, if
        #: the run was read before.
        self._rows_until: dict[str, int] = {}
        self._steps_until = -1
        self._rows_floor: dict[str, int] = {}
        self._steps_floor = -1
        self._recent: RecentSteps | None = None
        self._changes: list[int] = []
        self._forget()

    def follow(self, info: SessionInfo) -> None:
        """Reading starts, or starts over, with this run."""
        run = info.run_id, info.model
        self._recent = RecentSteps(info)
        if run == self._run:
            self._rows_floor, self._steps_floor = dict(self._rows_until), self._steps_until
            return
        # At the start of a run it is not known yet which of its models is the largest.
        self.runs += self._run is None or self._run[0] != run[0]
        self._run = run
        self._rows_until, self._rows_floor = {}, {}
        self._steps_until = self._steps_floor = -1
        self._forget()

    def restart(self, info: SessionInfo) -> None:
        """A rank counts its steps from the beginning again."""
        self._recent = RecentSteps(info)
        self._forget()

    def _forget(self) -> None:
        self._incidents: list[Alert] = []
        #: The last rearrangement that was counted, and the last one whose pause was looked at.
        self._rearranged = self._measured = -1

    def add_rows(self, info: SessionInfo, rows: StepRows) -> None:
        """Count the rows of a rank's batch."""
        rank = self.ranks.setdefault(info.ep_rank, RankTotals())
        if info.session_id not in self._rows_until:
            rank.sessions += 1
            self._rows_until[info.session_id] = -1
        if not len(rows.step):
            return
        floor = self._rows_floor.get(info.session_id, -1)
        status = rows.status if floor < 0 else rows.status[rows.time_ns > floor]
        for value, count in enumerate(np.bincount(status, minlength=len(Status)).tolist()):
            if count:
                rank.rows[Status(value)] += count
        rank.newest_ns = int(rows.time_ns[-1])
        self._rows_until[info.session_id] = max(self._rows_until[info.session_id], int(rows.time_ns.max()))

    def add_steps(self, news: CompleteSteps) -> None:
        """Count steps that became complete."""
        assert self._recent is not None
        self._recent.add(news)
        new = np.flatnonzero(news.time_ns > self._steps_floor)
        if not len(new):
            return
        terms = news.terms if len(new) == len(news.step) else news.terms.select(new)
        self._steps_until = max(self._steps_until, int(news.time_ns.max()))
        self.complete_steps += len(new)
        self.balancedness.add(BALANCEDNESS.of(terms))
        self.imbalance.add(IMBALANCE.of(terms))
        self.mean_tokens += float(terms.mean.sum())
        self.max_tokens += float(terms.maximum.sum())

    def add_alerts(self, alerts: Sequence[Alert]) -> None:
        """Count the incidents that are not known yet. One whose edges or layers became clearer is known."""
        for alert in alerts:
            known = next((n for n, one in enumerate(self._incidents) if replaces(alert, one)), None)
            if known is None:
                self.incidents += 1
                self._incidents = [*self._incidents[1 - KNOWN_INCIDENTS :], alert]
            else:
                self._incidents[known] = alert

    def add_rearrangements(self, history: PlacementHistory, ended: bool) -> None:
        """Count the new rearrangements, and measure the pauses of those that enough steps came after.

        Args:
            ended: no more steps will come.
        """
        changes = history.rearrangements()
        self.rearrangements += sum(change.first_step > self._rearranged for change in changes)
        self._rearranged = max([self._rearranged, *(change.first_step for change in changes)])
        self._changes = history.changes
        assert self._recent is not None
        newest = self._recent.last
        due = [
            change
            for change in changes
            if change.first_step > self._measured
            and (ended or newest > change.last_step + MARGIN + NEIGHBORS)
        ]
        if due:
            step, ms, kind = self._recent.durations()
            every = np.array(history.changes, np.int64)
            around = Neighborhoods(step, ms, kind, every)
            for change in due:
                own = every[(every >= change.first_step) & (every <= change.last_step)]
                pause = around.measure(own) if len(step) else None
                if isinstance(pause, Interval):
                    self.pauses.add(np.array([pause.value / 1e3]))
                self._measured = change.first_step

    def cost(self) -> RunCost | None:
        """What imbalance costs in the newest steps; None if no run was read."""
        return None if self._recent is None else self._recent.cost(self._changes)
