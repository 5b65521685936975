"""Snapshots of a run while it is written, over its newest steps: the library behind `watch`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import AnalyzeError, DumpError, Finding
from eplb_analyze.json_report import RunReport
from eplb_analyze.live.alerts import (
    BLOCK_STEPS,
    BLOCKS,
    Alert,
    Departure,
    DepartureFinder,
    risen_expert,
    signals,
    slowest_ranks,
    utc,
)
from eplb_analyze.live.experts import ExpertWindow, placement, replica_counts
from eplb_analyze.live.session import FollowedSession
from eplb_analyze.live.window import BALANCEDNESS, RankState, Window
from eplb_analyze.metrics.formulas import Float64, Spread, Terms, idle_fraction, most_often
from eplb_analyze.metrics.losses import Bin, Bins, timeline
from eplb_analyze.reader.choose import choose
from eplb_analyze.reader.lost import ranks_lost_at, serving_ranks, serving_slots
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory, Rearrangement
from eplb_analyze.reader.rhythm import Rhythm
from eplb_analyze.sessions.metadata import read_info
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.storage.path import StoragePath, local
from eplb_dump.format.journal import Int64, PlacementRows
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
#: How many placements of each layer are kept.
PLACEMENTS = 8
#: How many hot experts and alerts a snapshot has.
HOT_EXPERTS, ALERTS = 8, 4
#: An expert is hot if its load per replica is at least this many times the mean load of an expert.
HOT = 1.5
#: A rearrangement this near to the end of an incident ended it.
TURN_STEPS = BLOCKS * BLOCK_STEPS
#: Fields that must be equal in all sessions of a run.
AGREED = ("scope", "num_logical_experts", "moe_layers", "token_replication")


@dataclass(frozen=True)
class LayerSnapshot:
    """The figures of one layer over the complete steps."""

    layer: int
    balancedness: float | None
    #: The rank that was the slowest most often, and its share of the steps with unequal ranks.
    worst_rank: int | None
    worst_rank_share: float | None


@dataclass(frozen=True)
class RankSnapshot:
    """The figures of one EP rank over the complete steps."""

    rank: int
    #: The rank's load divided by the mean over ranks.
    times_mean: float | None
    #: The share of (step, layer) pairs in which others waited for this rank, and its share of all waiting.
    slowest_share: float | None
    excess_share: float | None


@dataclass(frozen=True)
class RecentSnapshot:
    """The figures of the complete steps in the last 10 s before the newest step."""

    first_step: int
    last_step: int
    complete: int
    balancedness: float | None
    idle_fraction: float | None
    layers: list[LayerSnapshot]
    ranks: list[RankSnapshot]


@dataclass(frozen=True)
class HotExpert:
    """A logical expert with a high load per replica.

    ``times_mean``: its tokens divided by the mean over the layer's experts, over the window and over the last
    10 s, as far as the steps were read from journals.
    """

    layer: int
    expert: int
    times_mean: float
    #: Likewise in the last seconds.
    recent_times_mean: float | None
    replicas: int


@dataclass(frozen=True)
class WriterSnapshot:
    """The progress of one writer that the run expects."""

    rank: int
    #: None if no step was accepted yet.
    last_step: int | None
    #: How many steps it is behind the rank with the newest step.
    behind: int | None
    #: It is more than :data:`STOPPED_SECONDS` behind, or another rank got further and was closed.
    stopped: bool
    #: It stopped, and the engine goes on without it: the other ranks send it no token.
    lost: bool
    #: The writer was closed.
    closed: bool
    sessions: int
    #: Counts among the steps that were read.
    dropped: int
    rejected: int


@dataclass(frozen=True)
class RearrangementSnapshot:
    """The newest rearrangement, and balancedness before and after it among the steps that were read."""

    first_step: int
    last_step: int
    layers: int
    slots_changed: int
    #: Mean balancedness before it.
    before: float | None
    #: Over so many steps.
    before_steps: int
    #: Mean balancedness after it.
    after: float | None
    #: Over so many steps.
    after_steps: int
    #: Balancedness after less before.
    gain: float | None


@dataclass(frozen=True)
class Snapshot(RunReport):
    """A run at one moment. Figures cover the complete steps among the newest ``window`` recorded ones."""

    scope: str
    ep_size: int
    num_layers: int | None
    num_physical_experts: int | None
    #: The newest step that a rank wrote.
    newest_step: int | None
    #: Steps per second of the engine.
    steps_per_second: float | None
    #: Seconds since data was last appended.
    quiet_seconds: float | None
    #: True if all writers closed their sessions.
    closed: bool
    window: int
    first_step: int | None
    last_step: int | None
    #: True if the last complete step is recent, compared with the newest one.
    current: bool
    complete: int
    #: Steps that will never be complete, and steps that a rank can still reach.
    incomplete: int
    #: Steps that a rank can still reach.
    in_flight: int
    balancedness: Spread
    latest_balancedness: float | None
    idle_fraction: float | None
    layers: list[LayerSnapshot]
    ranks: list[RankSnapshot]
    #: None if no complete step is that new.
    recent: RecentSnapshot | None
    #: The highest load per replica first, and how many steps they are of.
    hot_experts: list[HotExpert]
    #: Over so many steps.
    expert_steps: int
    #: In order of their first steps.
    alerts: list[Alert]
    #: The writer of each rank.
    writers: list[WriterSnapshot]
    timeline: list[Bin]
    #: The first step of each rearrangement that was seen, and the figures of the newest one.
    rearrangements: list[int]
    #: The newest rearrangement.
    rearrangement: RearrangementSnapshot | None
    #: The first step with the current EP size and slots, if they changed during the watch.
    shape_changed: int | None
    #: How many times a rank started again at an earlier step during the watch.
    restarts: int
    findings: list[Finding]

    @property
    def missing_ranks(self) -> list[int]:
        """Expected ranks without an accepted step."""
        return [writer.rank for writer in self.writers if writer.last_step is None and not writer.lost]

    def to_json(self) -> dict[str, Any]:
        document = super().to_json()
        document["balancedness"]["latest"] = document.pop("latest_balancedness")
        return document


class Follower:
    """Follows a run and, unless the caller names one, moves on when a newer run starts. Writes nothing.

    Attributes:
        notes: messages for the user about which run was chosen.
    """

    def __init__(
        self, path: StoragePath | str, run: str | None = None, model: str | None = None, window: int = WINDOW
    ) -> None:
        """``window``: the maximum number of steps that the figures cover.

        Raises DumpError and NotInDumpError like :func:`eplb_analyze.reader.run.open_run`, and UsageError if
        the dump is in a bucket.
        """
        self._path, self._run, self._model = local(path, "`watch`"), run, model
        self._root = _absolute(self._path)
        self._limit = window
        #: The monotonic time at which data was last appended.
        self._appended_at: float | None = None
        self._looked = False
        self._follow(self._path, run)

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
        if self._appended_at is None and self._window.ranks:
            newest = max(rank.time_ns for rank in self._window.ranks.values())
            self._appended_at = now - max(0.0, time.time() - newest / 1e9)
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
        self._known = {folder for folder, _ in sessions} | {_absolute(folder) for folder in chosen.others}
        #: The newest session of each rank, and whether a session of another engine start was seen.
        self._newest = {info.ep_rank: info for _, info in sessions}
        self._several_starts = False
        self._faults: dict[Path, str] = {}
        self._closed: set[str] = set()
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
        self._placements = _Placements(self._limit, self._info)
        self._experts = ExpertWindow(self._limit, self._info.num_logical_experts)
        self._departures = DepartureFinder()
        self._alerts: dict[int, Alert] = {}
        self._shape_of_news = self._window.shape

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
                        raise FormatError(f"its {', '.join(odd)} differ from the run's other sessions")
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
        if window.shape != self._shape_of_news:
            self._shape_of_news, self._departures = window.shape, DepartureFinder()
        for news in window.take_news():
            self._experts.add(news, self._placements.layers, recent)
            if window.shape is not None:
                values = signals(news.terms, serving_ranks(window.shape))
                self._departures.add(news.step, news.time_ns, values)
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
                if self._window.restarts > restarts:
                    self._forget()
                for rows in batch.placements:
                    self._placements.add(rows)
            elif len(batch.rows.step):
                self._several_starts = True  # an older session of the rank goes on beside the newer one
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
        hot_experts, expert_steps = self._hot_experts()
        return Snapshot(
            run_id=info.run_id,
            model=info.model,
            scope=info.scope.value,
            ep_size=info.ep_size if shape is None else shape.ep_size,
            num_layers=None if shape is None else shape.num_moe_layers,
            num_physical_experts=None if shape is None else shape.num_physical_experts,
            newest_step=None if leader is None else leader.last_step,
            steps_per_second=None if leader is None else leader.steps_per_second,
            quiet_seconds=quiet_seconds,
            closed=any(w.closed for w in writers) and all(w.closed or w.lost for w in writers),
            window=window.limit,
            first_step=first,
            last_step=last,
            current=last is not None and since <= STOPPED_SECONDS,
            complete=len(steps),
            incomplete=incomplete,
            in_flight=in_flight,
            balancedness=Spread.of(value, steps),
            latest_balancedness=float(value[-1]) if len(value) and value[-1] == value[-1] else None,
            idle_fraction=None if terms is None else _idle_fraction(terms),
            layers=[] if terms is None else _layers(terms, info),
            ranks=[] if terms is None else _ranks(terms, serving_ranks(shape) if shape else []),
            recent=self._recent(steps, terms),
            hot_experts=hot_experts,
            expert_steps=expert_steps,
            alerts=[] if terms is None else self._look_for_alerts(steps, terms),
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
            _idle_fraction(recent),
            _layers(recent, self._info),
            _ranks(recent, serving_ranks(shape) if shape else []),
        )

    def _replicas(self) -> Int64:
        """How many slots of ranks that serve hold each expert: int64 ``[layers, num_logical_experts]``."""
        shape = self._window.shape
        assert shape is not None
        slots = placement(
            self._placements.layers, NO_END - 1, shape.num_moe_layers, shape.num_physical_experts
        )
        return replica_counts(slots[:, serving_slots(shape)], self._info.num_logical_experts)

    def _hot_experts(self) -> tuple[list[HotExpert], int]:
        """The experts with the highest load per replica, and over how many steps."""
        total = self._experts.between(0, NO_END)
        shape = self._window.shape
        if total is None or shape is None or total.tokens.shape[0] != shape.num_moe_layers:
            return [], 0
        recent, replicas = self._experts.between(self._first_recent(), NO_END), self._replicas()
        times = total.times_mean
        now = times if recent is None or recent.tokens.shape != total.tokens.shape else recent.times_mean
        per_replica = np.maximum(times, now) / np.maximum(1, replicas)
        per_replica[replicas == 0] = 0.0
        count = min(HOT_EXPERTS, per_replica.size)
        largest = np.argpartition(-per_replica, count - 1, axis=None)[:count]
        numbers = self._info.layer_numbers(shape.num_moe_layers)
        order = sorted(largest.tolist(), key=lambda cell: (-per_replica.flat[cell], cell))
        return [
            HotExpert(
                numbers[layer],
                expert,
                float(times[layer, expert]),
                None if now is times else float(now[layer, expert]),
                int(replicas[layer, expert]),
            )
            for layer, expert in (divmod(cell, times.shape[1]) for cell in order)
            if per_replica[layer, expert] >= HOT
        ], total.steps

    def _look_for_alerts(self, steps: Int64, terms: Terms) -> list[Alert]:
        found = self._departures.found
        del found[:-ALERTS]
        for one in found:
            known = self._alerts.get(one.first_step)
            if known is None or known.last_step is None:
                self._alerts[one.first_step] = self._alert(one, steps, terms)
        self._alerts = {one.first_step: self._alerts[one.first_step] for one in found}
        return [*self._alerts.values()]

    def _alert(self, one: Departure, steps: Int64, terms: Terms) -> Alert:
        """An alert as it is known now; what left the window is as it was known before."""
        known = self._alerts.get(one.first_step)
        layers = terms.mean.shape[1]
        ended = one.last_step is not None and not one.open
        end = one.last_step + 1 if one.last_step is not None and ended else NO_END
        fall = {signal: usual - one.lowest.get(signal, usual) for signal, usual in one.signals.items()}
        order = sorted(fall, key=lambda signal: (signal >= layers, -fall[signal]))
        worst, of_layers = order[0], [signal for signal in order if signal < layers]
        lowest, usual = one.lowest.get(worst, one.signals[worst]), one.signals[worst]
        serving = serving_ranks(self._window.shape) if self._window.shape else []
        ranks = tuple(serving[signal - layers] for signal in order if signal >= layers)
        expert = None
        low, high = np.searchsorted(steps, [one.first_step, end])
        if of_layers and low < high:
            ranks = slowest_ranks(terms.select(np.arange(low, high)), worst)
            before = self._experts.between(0, one.first_step)
            since = self._experts.between(one.first_step, end)
            expert = risen_expert(before, since, worst, self._replicas())
        if known is not None:  # what left the window is as it was
            ranks = ranks or known.ranks
        changes = self._placements.rearrangements() if ended else []
        numbers = self._info.layer_numbers(layers)
        cause = known if expert is None else expert
        return Alert(
            layers=tuple(numbers[signal] for signal in of_layers),
            ranks=ranks,
            first_step=one.first_step,
            since=utc(one.first_ns),
            last_step=one.last_step if ended else None,
            until=utc(one.last_ns) if ended and one.last_ns is not None else None,
            peak_imbalance=1 / lowest if worst < layers else -lowest,
            usual_imbalance=1 / usual if worst < layers else -usual,
            expert=None if cause is None else cause.expert,
            from_times_mean=None if cause is None else cause.from_times_mean,
            to_times_mean=None if cause is None else cause.to_times_mean,
            replicas=None if cause is None else cause.replicas,
            rearrangement=next((step for step in changes if abs(step - end) <= TURN_STEPS), None),
        )

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
            return WriterSnapshot(rank, None, None, False, lost, False, 0, 0, rejected)
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


def _idle_fraction(terms: Terms) -> float | None:
    return idle_fraction(float(terms.mean.sum()), float(terms.maximum.sum()))


def _layers(terms: Terms, info: SessionInfo) -> list[LayerSnapshot]:
    """In ascending order."""
    numbers = info.layer_numbers(terms.mean.shape[1])
    ratio, active = np.where(terms.active, terms.ratio, 0.0).sum(axis=0), terms.active.sum(axis=0)
    slowest = terms.by_slowest()
    return [
        LayerSnapshot(
            number,
            float(ratio[index] / active[index]) if active[index] else None,
            *most_often(slowest[index]),
        )
        for index, number in enumerate(numbers)
    ]


def _ranks(terms: Terms, serving: list[int]) -> list[RankSnapshot]:
    """In ascending order, those that serve."""
    load = terms.rank_mean.sum(axis=0)
    often = terms.by_slowest().sum(axis=0)
    excess = terms.by_slowest(terms.excess).sum(axis=0)
    active, mean, loss = int(terms.active.sum()), float(load[serving].mean()), float(excess.sum())
    return [
        RankSnapshot(
            rank,
            float(load[rank] / mean) if mean else None,
            float(often[rank] / active) if active else None,
            float(excess[rank] / loss) if loss else None,
        )
        for rank in serving
    ]


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


class _Placements:
    """The newest placements of each layer and the effect of the newest rearrangement."""

    def __init__(self, window: int, info: SessionInfo) -> None:
        """``window``: how many steps before and after a rearrangement are compared."""
        self._window, self._info = window, info
        self.layers: dict[int, LayerHistory] = {}
        self._newest: RearrangementSnapshot | None = None

    def add(self, rows: PlacementRows) -> None:
        """Add one rank's placements. All ranks write the same; one that missed a change writes it later."""
        numbers = zip(rows.step.tolist(), rows.layer.tolist(), rows.ep_size.tolist(), strict=True)
        for (step, layer, ep_size), slots in zip(numbers, rows.physical_to_logical, strict=True):
            history = self.layers.setdefault(layer, LayerHistory())
            history.insert(step, ep_size, slots)
            del history.steps[:-PLACEMENTS], history.ep_sizes[:-PLACEMENTS], history.slots[:-PLACEMENTS]

    def rearrangements(self) -> list[int]:
        return [change.first_step for change in self._grouped()]

    def _grouped(self) -> list[Rearrangement]:
        rhythm = Rhythm.stated(self._info, max(self.layers, default=0) + 1)
        return PlacementHistory(self.layers, [], [], rhythm).rearrangements()

    def newest(self, steps: Int64, balancedness: Float64) -> RearrangementSnapshot | None:
        """The newest rearrangement, given the known steps, ascending, and their balancedness."""
        changes = self._grouped()
        if not changes:
            return None
        this, old = changes[-1], self._newest
        if old is not None and old.after_steps >= self._window and this.first_step == old.first_step:
            return old  # the steps before it are no longer known
        earliest = changes[-2].last_step if len(changes) > 1 else 0
        known = ~np.isnan(balancedness)
        steps, balancedness = steps[known], balancedness[known]
        edges = [
            max(earliest, this.first_step - self._window),
            this.first_step,
            this.last_step,
            this.last_step + self._window,
        ]
        low, before_end, after_start, high = np.searchsorted(steps, edges)
        before, after = balancedness[low:before_end], balancedness[after_start:high]
        means = [float(side.mean()) if len(side) else None for side in (before, after)]
        self._newest = RearrangementSnapshot(
            this.first_step,
            this.last_step,
            len(this.layers),
            this.slots_changed,
            means[0],
            len(before),
            means[1],
            len(after),
            means[1] - means[0] if means[0] is not None and means[1] is not None else None,
        )
        return self._newest
