"""`runs`: the runs of a dump, one line each, by the headers of their files.

One folder ``run=…`` is read at a time, so memory grows only with the list itself.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from eplb_analyze.errors import AnalyzeError
from eplb_analyze.json_report import Report
from eplb_analyze.parallel import ordered_map
from eplb_analyze.sessions.discovery import Discovery, discover, discover_folder
from eplb_analyze.sessions.overview import SessionOverview, overview
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.storage import path as storage
from eplb_analyze.storage.bucket import UnreachableError
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import LEVEL_PREFIXES, RUN_PREFIX, Scope, Tier

#: A run whose writers did not end it is open if they wrote within this time. They write once a flush
#: interval while the engine takes steps.
OPEN_SECONDS = 60.0

State = Literal["closed", "open", "not closed"]


@frozen
class RunLine(Report):
    """One model of one run. A fact that is not known is null."""

    #: What `--run` takes.
    run_id: str
    #: The model's name; null if nothing of the run can be read.
    model: str | None
    #: The engine that recorded it, for example `vllm`.
    engine: str | None
    #: The engine's version.
    engine_version: str | None
    #: The system whose recording was imported, for example `SGLang`; null if the run was recorded.
    imported_from: str | None
    #: The time of the first step, ISO 8601, UTC; null if the run has no steps or was imported without times.
    start: str | None
    #: The time of the last step, likewise.
    end: str | None
    #: From the first step to the last.
    duration_seconds: float | None
    #: EP ranks that wrote. In a run of scope `global`, one rank writes for all.
    ranks_present: int
    #: EP ranks that should have written; null if nothing of the run can be read.
    ranks_expected: int | None
    #: `local`: each rank recorded its own tokens. `global`: one rank recorded the sum over all EP ranks.
    scope: str | None
    #: EP ranks of the engine, the most if their number changed.
    ep_size: int | None
    #: The number of the first step that a rank recorded.
    first_step: int | None
    #: The number of the last step that a rank recorded.
    last_step: int | None
    #: Steps that were seen by the rank that saw most.
    steps: int
    #: Of these, how many have no rows any more, because they were retired.
    retired_steps: int
    #: What is kept of its segments, the most first: `full`, `ranks` (tokens per EP rank), `minutes` (sums per
    #: minute), `gone`.
    tiers: list[str]
    #: `closed`: all writers were closed. `open`: a writer has not ended, and wrote in the last minute.
    #: `not closed`: a writer has not ended and wrote nothing in the last minute: it was killed, or its engine
    #: idles.
    state: State
    #: The size of its files.
    size_bytes: int
    #: The first thing that is wrong with its files, as far as names, sizes and headers show it.
    fault: str | None


@frozen
class RunList(Report):
    """The runs of a dump."""

    #: The run that began last comes last; commands use it if `--run` is not given.
    runs: list[RunLine]


#: When the run began, in ns since 1970, and its line.
_Dated = tuple[int, RunLine]


def list_runs(dump: StoragePath) -> RunList:
    """List the runs of a dump, or of one run, model, rank or session folder of it.

    A run that cannot be read has a line that says why.

    Raises DumpError if there is no run, UnreachableError if the bucket cannot be read.
    """
    names = [] if storage.absolute(dump).name.startswith(LEVEL_PREFIXES) else _run_folders(dump)
    if not names:
        lines = _lines(discover(dump))
    else:
        threads = storage.requests_at_once(dump)
        found = ordered_map(lambda name: _lines_of_folder(dump, name), names, threads)
        lines = [line for _, some in found for line in some]
    if not lines:
        discover(dump)  # says why there is no run
    lines.sort(key=lambda item: (item[0], item[1].run_id, item[1].model or ""))
    return RunList([line for _, line in lines])


def _run_folders(dump: StoragePath) -> list[str]:
    """The names of the folders of runs; none if the dump cannot be listed."""
    if isinstance(dump, Path) and not dump.is_dir():
        return []
    try:
        inside = storage.entries(dump)
    except OSError:
        return []
    return [e.name for e in inside if e.name.startswith(RUN_PREFIX) and e.is_dir(follow_symlinks=False)]


def _lines_of_folder(dump: StoragePath, name: str) -> list[_Dated]:
    try:
        return _lines(discover_folder(dump, name))
    except UnreachableError:
        raise
    except AnalyzeError as error:
        return [(-1, _unreadable(name[len(RUN_PREFIX) :], None, str(error)))]


def _lines(found: Discovery) -> list[_Dated]:
    return [
        (found.created(run_id), _line(found, run_id, slug))
        for run_id, models in found.runs.items()
        for slug in models
    ]


#: A journal that is sealed between listing and reading it is gone; the next listing has its segment.
_TRIES = 3


def _line(found: Discovery, run_id: str, slug: str) -> RunLine:
    faults = [f.text for (run, of), some in found.findings.items() if run == run_id and of in ("", slug)
              for f in some if f.severity == "error"]  # fmt: skip
    if run_id in found.mixed:
        faults.append(found.mixed[run_id])
    infos = sorted(found.runs[run_id][slug], key=lambda item: (item[1].created_unix_ns, item[1].session_id))
    if not infos:
        return _unreadable(run_id, slug, faults[0] if faults else "it has no session")
    for _ in range(_TRIES):
        sessions = [overview(folder, info) for folder, info in infos]
        times, unreadable = _times(sessions)
        if not unreadable:
            break
    faults += [fault for session in sessions for fault in session.faults]
    info = sessions[0].info
    ranks = {session.info.ep_rank for session in sessions}
    faults += unreadable
    if info.origin is not None and "times" in info.origin.unknown:
        times = None
    segments = [segment for session in sessions for segment in session.segments]
    first = min((segment.first_step for segment in segments), default=None)
    last = max((segment.last_step for segment in segments), default=None)
    ep_size = max(session.ep_size for session in sessions)
    rows = max(sum(s.step_rows for s in sessions if s.info.ep_rank == rank) for rank in ranks)
    # A rank that was restarted can have steps twice.
    steps = 0 if first is None or last is None else min(rows, last - first + 1)
    return RunLine(
        run_id=run_id,
        model=info.model,
        engine=info.engine,
        engine_version=info.engine_version,
        imported_from=None if info.origin is None else info.origin.system,
        start=None if times is None else _iso(times[0]),
        end=None if times is None else _iso(times[1]),
        duration_seconds=None if times is None else (times[1] - times[0]) / 1e9,
        ranks_present=len(ranks),
        ranks_expected=1 if info.scope is Scope.GLOBAL else ep_size,
        scope=info.scope.value,
        ep_size=ep_size,
        first_step=first,
        last_step=last,
        steps=steps,
        retired_steps=min(steps, max(_retired_rows(sessions, rank) for rank in ranks)),
        tiers=[tier.value for tier in Tier if any(segment.tier is tier for segment in segments)],
        state=_state(sessions),
        size_bytes=sum(session.size_bytes for session in sessions),
        fault=faults[0] if faults else None,
    )


def _unreadable(run_id: str, model: str | None, fault: str) -> RunLine:
    unknown = dict.fromkeys(
        ("engine", "engine_version", "imported_from", "start", "end", "duration_seconds", "scope", "ep_size")
    )
    return RunLine(
        run_id=run_id, model=model, **unknown, ranks_present=0, ranks_expected=None, first_step=None,
        last_step=None, steps=0, retired_steps=0, tiers=[], state="not closed", size_bytes=0, fault=fault,
    )  # fmt: skip


def _retired_rows(sessions: list[SessionOverview], rank: int) -> int:
    own = (session for session in sessions if session.info.ep_rank == rank)
    return sum(segment.retired for session in own for segment in session.segments)


def _times(sessions: list[SessionOverview]) -> tuple[tuple[int, int] | None, list[str]]:
    """When the first and the last step began, ns since 1970; and why that cannot be read."""
    segments = [segment for session in sessions for segment in session.segments]
    if not segments:
        return None, []
    first = min(segments, key=lambda segment: segment.first_step)
    last = max(segments, key=lambda segment: segment.last_step)
    try:
        begin = first.times()
        end = begin if last is first else last.times()
        return (begin[0], end[1]), []
    except (DamagedSegmentError, IndexError) as error:
        return None, [str(error)]


def _state(sessions: list[SessionOverview]) -> State:
    """By the newest session of each rank: an earlier one may have been killed, and its rank restarted."""
    newest = {session.info.ep_rank: session for session in sessions}
    left = [session for session in newest.values() if not session.closed]
    if not left:
        return "closed"
    return "open" if time.time() - max(s.written for s in left) < OPEN_SECONDS else "not closed"


def _iso(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).isoformat()
