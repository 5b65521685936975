"""The figures of `watch`: a run while it is written, over its newest steps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.dump import discover, read_info
from eplb_analyze.errors import AnalyzeError, Finding
from eplb_analyze.following import Batch, FollowedSession
from eplb_analyze.losses import Bin, Bins, timeline
from eplb_analyze.metrics import Spread, Terms
from eplb_analyze.placements import LayerHistory, PlacementHistory, Rearrangement
from eplb_analyze.run import choose
from eplb_analyze.window import BALANCEDNESS, RankState, Window
from eplb_dump.format import RANK_PREFIX, RUN_PREFIX, SESSION_PREFIX, FormatError, Scope, SessionInfo, Status
from eplb_dump.journal import Int64

#: The figures are over so many steps.
WINDOW = 1000
#: A rank that is so far behind the others has stopped, as `check` sees it, too.
BEHIND_SECONDS = 3.0
#: So many placements of a layer are remembered.
_PLACEMENTS = 8


@dataclass(frozen=True)
class LayerLook:
    """A layer over the window's complete steps."""

    layer: int
    balancedness: float | None
    #: The rank that was most often the slowest, and in which share of the uneven steps.
    worst_rank: int | None
    worst_rank_share: float | None


@dataclass(frozen=True)
class RankLook:
    """A rank that should write. The shares are None without a complete step."""

    rank: int
    #: None: it has written nothing.
    last_step: int | None
    #: Its load over that of the mean rank.
    times_mean: float | None
    #: In which share of active (step, layer) the others waited for it, and its share of all waiting.
    slowest_share: float | None
    excess_share: float | None
    #: How far it is behind the foremost rank.
    behind_steps: int | None
    stopped: bool
    closed: bool
    sessions: int
    #: Steps that it dropped or rejected, of those that were looked at.
    dropped: int
    rejected: int


@dataclass(frozen=True)
class RearrangementLook:
    """The newest rearrangement, and balancedness around it as far as it was seen."""

    first_step: int
    last_step: int
    layers: int
    slots_changed: int
    before: float | None
    before_steps: int
    after: float | None
    after_steps: int
    gain: float | None


@dataclass(frozen=True)
class Look:
    """A run at one moment. Figures are over the complete steps among the newest ``window``."""

    run_id: str
    model: str
    scope: str
    ep_size: int
    num_layers: int | None
    num_physical_experts: int | None
    #: Steps that were asked for, and the first and last complete one of those that are here.
    window: int
    first_step: int | None
    last_step: int | None
    complete: int
    #: Lacks a rank that went on or stopped; or waits for a rank that has yet to come to it.
    incomplete: int
    in_flight: int
    newest_step: int | None
    steps_per_second: float | None
    #: Since the newest step came.
    quiet_seconds: float | None
    closed: bool
    balancedness: Spread
    latest_balancedness: float | None
    idle_fraction: float | None
    layers: list[LayerLook]
    #: The writers that a step needs, by their number.
    ranks: list[RankLook]
    timeline: list[Bin]
    #: Those that were seen in full; of the newest the figures.
    rearrangements: list[int]
    rearrangement: RearrangementLook | None
    #: The first step with the present EP size and slots, where they changed under our eyes.
    shape_changed: int | None
    restarts: int
    notes: list[str]
    findings: list[Finding]

    @property
    def missing_ranks(self) -> list[int]:
        return [rank.rank for rank in self.ranks if rank.last_step is None]

    def to_json(self) -> dict[str, Any]:
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("layers", "ranks", "timeline"):
            document[name] = [asdict(item) for item in document[name]]
        document["balancedness"] = {**asdict(self.balancedness), "latest": document.pop("latest_balancedness")}
        document["rearrangement"] = None if self.rearrangement is None else asdict(self.rearrangement)
        document["findings"] = [asdict(finding) for finding in self.findings]
        run = {"run_id": document.pop("run_id"), "model": document.pop("model")}
        return {"run": run, **document}


class Follower:
    """Follows a run, and moves on to a newer one where none was asked for. Nothing is written."""

    def __init__(self, path: Path, run: str | None = None, model: str | None = None, window: int = WINDOW) -> None:
        """Raises DumpError and NotInDumpError, as :func:`eplb_analyze.run.open_run` does."""
        self._path = path
        self._asked = run, model
        self._limit = window
        self._root = Path(os.path.abspath(path))
        self._follow()

    def look(self) -> Look:
        """Read what is new, and say how things stand. Raises DumpError."""
        if self._newer_run() or not self._window.ranks:
            self._follow()
        for session in self._new_sessions():
            session.begin(self._limit)
            self._sessions.append(session)
        news = False
        for session in sorted(self._sessions, key=lambda s: (s.info.created_unix_ns, s.info.session_id)):
            before = news
            ...
        return self._look()
