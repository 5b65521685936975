"""Snapshots of a run while it is written, over its newest steps: the library behind `watch`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from eplb_analyze.errors import AnalyzeError, DumpError, Finding
from eplb_analyze.live.alerts import AlertFinder
from eplb_analyze.live.experts import ExpertWindow
from eplb_analyze.live.figures import hot_experts, idle_share, layer_figures, rank_figures
from eplb_analyze.live.placements import RecentPlacements
from eplb_analyze.live.session import FollowedSession
from eplb_analyze.live.snapshot import LiveHotExpert, RecentSnapshot, Snapshot, WriterSnapshot
from eplb_analyze.live.totals import Totals
from eplb_analyze.live.window import BALANCEDNESS, RankState, Window
from eplb_analyze.metrics.formulas import Spread, Terms
from eplb_analyze.metrics.losses import Bins, timeline
from eplb_analyze.reader.choose import choose
from eplb_analyze.reader.lost import ranks_lost_at, serving_ranks
from eplb_analyze.sessions.metadata import read_info
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.storage.path import StoragePath, local
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import (
    RANK_PREFIX,
    RUN_PREFIX,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    Scope,
    Status,
)
from eplb_dump.format.session import SessionInfo

#: The default number of steps in the window.
WINDOW = 1000
#: A rank that is further behind than this counts as stopped; `check` uses the same limit.
STOPPED_SECONDS = 3.0
#: If reading took longer than this, the data written in the meantime is read, too.
LONG_SECONDS = 1.0
#: Fields that must be equal in all sessions of a run.
AGREED = ("scope", "num_logical_experts", "moe_layers", "token_replication")


class Follower:
    """Follows a run and, unless the caller names one, moves on when a newer run starts. Writes nothing.

    Attributes:
        notes: messages for the user about which run was chosen.
        totals: counts over all runs that were followed; None if nobody wants them.
    """

    def __init__(
        self,
        path: StoragePath | str,
        run: str | None = None,
        model: str | None = None,
        window: int = WINDOW,
        totals: Totals | None = None,
    ) -> None:
        """``window``: the maximum number of steps that the figures cover; ``totals``: what to add to.

        Raises DumpError and NotInDumpError like :func:`eplb_analyze.reader.run.open_run`, and UsageError if
        the dump is in a bucket.
        """
        self._path, self._run, self._model = local(path, "`watch`"), run, model
        self._root = _absolute(self._path)
        self._limit = window
        self.totals = totals
        #: The monotonic time at which data was last appended.
        self._appended_at: float | None = None
        self._looked = False
        self._follow(self._path, run)

    @property
    def model_folder(self) -> Path:
        """``<dump>/run=…/model=…`` of the run that is followed."""
        return self._model_folder

    def look(self) -> Snapshot:
        """Read the appended data and return a snapshot. Raises DumpError."""
        if self._newer_run():
            self._follow(self._path, None)
        elif self._looked and not self._window.ranks and self._root in self._run_folder.parents:
            self._follow(self._run_folder, None)  # the largest model is only known after the first step
        for session in self._new_sessions():
            session.begin(self._limit)
            self._sessions.append(session)
        started = time.monotonic()
        found_new = False if self._several_starts else self._read_all()
        if self._several_starts:
            # Two engines with one run id: choose between them, or say that they cannot be separated.
            self._follow(self._path, self._run)
            found_new = self._read_all()
        if time.monotonic() - started > LONG_SECONDS:
            found_new |= self._read_all()  # otherwise the ranks read first seem to be behind
        self._looked = True
        now = time.monotonic()
        times = [rank.time_ns for rank in self._window.ranks.values() if rank.time_ns]
        if self._appended_at is None and times:
            self._appended_at = now - max(0.0, time.time() - max(times) / 1e9)
        elif found_new:
            self._appended_at = now
        return self._look(None if self._appended_at is None else now - self._appended_at)

    def _follow(self, path: Path, run: str | None) -> None:
        chosen = choose(path, run, self._model)
        if chosen.mixed is not None:
            raise DumpError(chosen.mixed)
        sessions = [(_absolute(folder), info) for folder, info in chosen.sessions]
        self.notes = chosen.notes
        self._info = sessions[0][1]
        self._model_folder = sessions[0][0].parents[1]
        self._run_folder = self._model_folder.parent
        started = (f for f in _folders(self._run_folder.parent, RUN_PREFIX) if _has_session(f))
        self._runs = {folder.name for folder in started}
        self._window = Window(self._limit, self._info.scope, self._info.token_replication)
        self._forget()
        if self.totals is not None:
            self.totals.follow(self._info)
        self._known = {folder for folder, _ in sessions} | {_absolute(folder) for folder in chosen.others}
        #: The newest session of each rank, and whether a session of another engine start was seen.
        self._newest = {info.ep_rank: info for _, info in sessions}
        self._several_starts = False
        self._faults: dict[Path, str] = {}
        self._closed: set[str] = set()
        #: By rank: the last of its steps that were retired before they were read.
        self._retired: dict[int, int] = {}
        self._looked = False
        self._appended_at = None
        self._sessions: list[FollowedSession] = []
        need: dict[int, int] = {}
        for folder, info in reversed(sessions):
            want = need.setdefault(info.ep_rank, self._limit)
            if want > 0:  # otherwise newer sessions of the rank have all wanted steps
                self._sessions.append(FollowedSession(folder, info, self._limit))
                # All ranks write the same placements, so one rank's older ones are enough.
                first = want == self._limit and info.ep_rank == self._info.ep_rank
                need[info.ep_rank] -= self._sessions[-1].begin(want, placements=first)

    def _forget(self) -> None:
        """Start without a known placement, expert or alert."""
        self._placements = RecentPlacements(self._limit, self._info)
        self._experts = ExpertWindow(self._limit, self._info.num_logical_experts)
        self._alerts = AlertFinder(self._info)

    def _newer_run(self) -> bool:
        dump = self._run_folder.parent
        if self._run is not None or self._root != dump:
            return False
        for folder in _folders(dump, RUN_PREFIX):
            if folder.name not in self._runs:
                with suppress(AnalyzeError):  # the run is being created, or has no such model
                    created = choose(folder, None, self._model).sessions[0][1].created_unix_ns
                    self._runs.add(folder.name)
                    if created > self._info.created_unix_ns:
                        return True
        return False

    def _new_sessions(self) -> Iterator[FollowedSession]:
        for rank in _folders(self._model_folder, RANK_PREFIX):
            for folder in _folders(rank, SESSION_PREFIX):
                if folder in self._known or self._root not in (folder, *folder.parents):
                    continue
                try:
                    info = read_info(folder, [*folder.parts[-4:]])
                    odd = [name for name in AGREED if getattr(info, name) != getattr(self._info, name)]
                    if odd:
                        raise FormatError(
                            f"its {', '.join(odd)} differ from those of the run's other sessions"
                        )
                except FileNotFoundError:
                    continue  # the writer is about to write it
                except (FormatError, OSError) as error:
                    self._faults[folder] = f"{folder}: {error}; session skipped"
                else:
                    if self._of_another_start(info):
                        self._several_starts = True
                        return
                    self._newest[info.ep_rank] = info
                    yield FollowedSession(folder, info, self._limit)
                self._known.add(folder)

    def _of_another_start(self, info: SessionInfo) -> bool:
        """Whether a new session may be of another engine start under this run id."""
        before, identity = self._newest.get(info.ep_rank), info.start_identity
        if before is not None:
            return identity.same_as(before.start_identity) is not True
        return identity.id is not None and identity.same_as(self._info.start_identity) is False

    def _read_all(self) -> bool:
        """Read all sessions. Returns True if there are new steps."""
        found_new = False
        for session in sorted(self._sessions, key=lambda s: (s.info.created_unix_ns, s.info.session_id)):
            found_new |= self._read(session)
        self._window.settle()
        self._reach_back()
        self._window.give_up({w.rank for w in self._writers()[1] if w.stopped or w.last_step is None})
        self._take_news()
        return found_new

    def _take_news(self) -> None:
        """Add the steps that became complete to the sums of experts and to the search for incidents."""
        window, recent = self._window, self._first_recent()
        for news in window.take_news():
            self._experts.add(news, self._placements.layers, recent)
            self._alerts.add(news)
            if self.totals is not None:
                self.totals.add_steps(news)
        self._experts.trim(window.first_step, recent)

    def _first_recent(self) -> int:
        """The first step of the last 10 s before the newest step."""
        leader = _leader([state for state in self._states().values() if state is not None])
        return 0 if leader is None else leader.first_recent

    def _read(self, session: FollowedSession) -> bool:
        """Read one session. Returns True if it has new steps."""
        found_new = False
        for batch in session.look():
            found_new |= bool(len(batch.rows.step))
            restarts = self._window.restarts
            if self._window.add(session.info, batch):
                if self.totals is not None:
                    self.totals.add_rows(session.info, batch.rows)
                if self._window.restarts > restarts:
                    self._forget()
                    if self.totals is not None:
                        self.totals.restart(self._info)
                for rows in batch.placements:
                    self._placements.add(rows, remains=batch.remains)
            elif len(batch.rows.step):
                self._several_starts = True  # an older session of the rank goes on beside the newer one
        own = session.info.ep_rank
        if session.last_retired >= 0:
            self._retired[own] = max(self._retired.get(own, -1), session.last_retired)
        self._faults.pop(session.folder, None)
        if session.fault is not None:
            self._faults[session.folder] = session.fault
        if session.closed:
            self._closed.add(session.info.session_id)
        rank = self._window.ranks.get(session.info.ep_rank)
        superseded = rank is not None and rank.session_id != session.info.session_id and rank.last_step >= 0
        if not found_new and session.fault is None and (session.closed or superseded):
            self._sessions.remove(session)  # nothing more will be appended
        return found_new

    # ---- figures

    def _look(self, quiet_seconds: float | None) -> Snapshot:
        window, info = self._window, self._info
        steps, terms = window.complete()
        shape = window.shape
        value = np.empty(0) if terms is None else BALANCEDNESS.of(terms)
        leader, writers = self._writers()
        incomplete, in_flight = window.unfinished({w.rank for w in writers if w.stopped or w.closed})
        series = window.series()
        first, last = (int(steps[0]), int(steps[-1])) if len(steps) else (None, None)
        since = 0.0 if leader is None or last is None else leader.seconds_beyond(last)
        hottest, expert_steps = self._hot_experts()
        history = self._placements.history(window.lost)
        alerts = self._alerts.look(history, window.lost)
        closed = any(w.closed for w in writers) and all(w.closed or w.lost for w in writers)
        if self.totals is not None:
            self.totals.add_alerts(alerts)
            self.totals.add_rearrangements(history, closed)
        return Snapshot(
            run_id=info.run_id,
            model=info.model,
            scope=info.scope.value,
            ep_size=info.ep_size if shape is None else shape.ep_size,
            num_layers=None if shape is None else shape.num_moe_layers,
            num_physical_experts=None if shape is None else shape.num_physical_experts,
            newest_step=max((w.last_step for w in writers if w.last_step is not None), default=None),
            steps_per_second=None if leader is None else leader.steps_per_second,
            quiet_seconds=quiet_seconds,
            closed=closed,
            window=window.limit,
            first_step=first,
            last_step=last,
            current=last is not None and since <= STOPPED_SECONDS,
            complete=len(steps),
            incomplete=incomplete,
            in_flight=in_flight,
            balancedness=Spread.of(value, steps),
            latest_balancedness=float(value[-1]) if len(value) and value[-1] == value[-1] else None,
            idle_fraction=None if terms is None else idle_share(terms),
            layers=[] if terms is None else layer_figures(terms, info),
            ranks=[] if terms is None else rank_figures(terms, serving_ranks(shape) if shape else []),
            recent=self._recent(steps, terms),
            hot_experts=hottest,
            expert_steps=expert_steps,
            alerts=alerts,
            writers=writers,
            timeline=[] if first is None or last is None else timeline(Bins(first, last), steps, value),
            rearrangements=self._placements.rearrangements(),
            rearrangement=self._placements.newest(*series),
            shape_changed=window.shape_changed,
            restarts=window.restarts,
            findings=[Finding("error", "damaged_file", text) for text in self._faults.values()],
        )

    def _recent(self, steps: Int64, terms: Terms | None) -> RecentSnapshot | None:
        low = int(np.searchsorted(steps, self._first_recent()))
        if terms is None or low == len(steps):
            return None
        recent, shape = terms.select(np.arange(low, len(steps))), self._window.shape
        return RecentSnapshot(
            int(steps[low]),
            int(steps[-1]),
            len(steps) - low,
            Spread.of(BALANCEDNESS.of(recent), steps[low:]).mean,
            idle_share(recent),
            layer_figures(recent, self._info),
            rank_figures(recent, serving_ranks(shape) if shape else []),
        )

    def _hot_experts(self) -> tuple[list[LiveHotExpert], int]:
        """The experts with the highest load per replica, and over how many steps."""
        total, shape = self._experts.between(0, NO_END), self._window.shape
        if total is None or shape is None or total.tokens.shape[0] != shape.num_moe_layers:
            return [], 0
        recent = self._experts.between(self._first_recent(), NO_END)
        return hot_experts(total, recent, self._placements.replicas(shape), self._info), total.steps

    def _states(self) -> dict[int, RankState | None]:
        """The state of each expected rank; None if it has no accepted step."""
        ranks, info = self._window.ranks, self._info
        if info.scope is Scope.GLOBAL:
            expected = sorted(ranks)[:1] or [info.ep_rank]
        else:
            lost = ranks_lost_at(NO_END - 1, self._window.lost)
            expected = sorted({*(self._window.expected or range(info.ep_size)), *lost})
        return {r: ranks[r] if r in ranks and ranks[r].last_step >= 0 else None for r in expected}

    def _reach_back(self) -> None:
        """Extend the leading rank's step times back to the other ranks' steps, also before the window.

        Without it, whether a rank counts as stopped would depend on the size of the window.
        """
        known = [state for state in self._states().values() if state is not None]
        leader = _leader(known)
        if leader is None:
            return
        session = next((s for s in self._sessions if s.info.session_id == leader.session_id), None)
        if session is None:
            return
        # Once one rank is known to have stopped, ranks further behind have stopped, too.
        for step in sorted({state.last_step for state in known}, reverse=True):
            older = session.rows_before(step)
            while leader.steps[0] > step and leader.clock_seconds <= STOPPED_SECONDS:
                rows = next(older, None)
                if rows is None:
                    break
                leader.add_clock(rows)

    def _writers(self) -> tuple[RankState | None, list[WriterSnapshot]]:
        """The leading rank (None before the first step) and all expected writers."""
        states = self._states()
        known = [state for state in states.values() if state is not None]
        leader = _leader(known)
        # Ranks end together: if one was closed, a rank that did not get as far was killed.
        ended = max((s.last_step for s in known if s.session_id in self._closed), default=-1)
        writers = [self._writer(rank, state, leader, ended) for rank, state in states.items()]
        return leader, writers

    def _writer(
        self, rank: int, state: RankState | None, leader: RankState | None, ended: int
    ) -> WriterSnapshot:
        """``ended``: the last step of the closed ranks, -1 if there are none."""
        lost = rank in ranks_lost_at(NO_END - 1, self._window.lost)
        if state is None or leader is None:
            # If all its steps were rejected, their numbers cannot be trusted.
            stated = self._window.ranks.get(rank)
            rejected = 0 if stated is None else stated.counts[Status.REJECTED]
            retired = self._retired.get(rank)
            if retired is None:
                return WriterSnapshot(rank, None, None, False, lost, False, 0, 0, rejected)
            closed = rank in self._newest and self._newest[rank].session_id in self._closed
            behind = None if leader is None else leader.last_step - retired
            return WriterSnapshot(
                rank, retired, behind, bool(behind) and not closed, lost, closed, 0, 0, rejected
            )
        closed = state.session_id in self._closed
        # Uses one rank's clock, because clocks of two hosts can differ.
        late = leader.seconds_beyond(state.last_step) > STOPPED_SECONDS
        return WriterSnapshot(
            rank,
            state.last_step,
            behind=leader.last_step - state.last_step,
            stopped=late or (not closed and state.last_step < ended),
            lost=lost,
            closed=closed,
            sessions=state.sessions,
            dropped=state.counts[Status.DROPPED],
            rejected=state.counts[Status.REJECTED],
        )


def _leader(states: list[RankState]) -> RankState | None:
    return max(states, key=lambda state: state.last_step, default=None)


def _absolute(folder: StoragePath) -> Path:
    return Path(os.path.abspath(local(folder, "`watch`")))


def _has_session(run: Path) -> bool:
    return next(run.glob(f"*/*/{SESSION_PREFIX}*/{SESSION_FILE}"), None) is not None


def _folders(parent: Path, prefix: str) -> list[Path]:
    """Folders whose names start with ``prefix``, without links; empty if the parent does not exist."""
    with suppress(OSError), os.scandir(parent) as entries:
        names = [e.name for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False)]
        return [parent / name for name in sorted(names)]
    return []
