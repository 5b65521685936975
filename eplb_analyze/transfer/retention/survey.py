"""A dump as `prune` sees it: all files of each run, by names, sizes and the headers of manifests.

Nothing here is changed. Headers are not verified: whatever is thinned is read again, verified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eplb_analyze.parallel import ordered_map
from eplb_analyze.sessions.metadata import UNFINISHED_COPY, find_info
from eplb_analyze.sessions.minutes import ends_of_common_steps
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError, exhausted, require_regular
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import Entry
from eplb_analyze.storage.path import StoragePath, requests_at_once
from eplb_dump.format.journal import Int64, lock
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.minutes import NO_CUTS, keys_of
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    LEVEL_PREFIXES,
    MANIFEST_FILE,
    MAX_NUMBER,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    FormatError,
    Scope,
    Tier,
)
from eplb_dump.format.session import SessionInfo

#: A journal that was written to in this time may be in use, whatever its lock says.
QUIET_NS = 600 * 10**9
#: Why a run stays as it is, if one of its ranks may be about to begin a session.
NEWBORN = "a rank began in it less than ten minutes ago"
#: A session that was not closed and has no open journal: its engine may be idle, or it was killed.
IDLE_NS = 86_400 * 10**9
#: A manifest's entry of a thinned segment, which has no sums, takes no more.
_THINNED_ENTRY_BYTES = 2048
CLAIM_FILE = "claim.json"


@dataclass(eq=False)
class Piece:
    """What the manifest of a session has one entry for: a segment, or several thinned together."""

    session: SurveyedSession
    entry: SealedSegment
    #: When its last step began, ns since 1970.
    last_ns: int
    #: When its first step began, likewise.
    first_ns: int
    notable: bool = False
    #: Why it stays as it is, although its session may be changed.
    fault: str | None = None
    #: Its bytes in the manifest that thinning frees, as those of its experts' sums: at least so many.
    sums_bytes: int = 0
    #: So many rows of ``minutes`` are made of it, if it has none, or if they reach across a cut.
    rows_of_minutes: int = 0
    #: Its bytes by tier, as far as they were computed.
    sizes: dict[Tier, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Its bytes: files, and what is its own in the manifest."""
        return self.entry.size + self.sums_bytes

    @property
    def tier(self) -> Tier:
        return self.entry.tier if self.entry.step_rows or self.entry.thinned else Tier.GONE


@dataclass(eq=False)
class SurveyedSession:
    """The files of a session's folder."""

    folder: StoragePath
    #: None if nothing says whose files they are.
    info: SessionInfo | None
    files: dict[str, os.stat_result]
    manifest: Manifest = field(default_factory=Manifest)
    pieces: list[Piece] = field(default_factory=list)
    #: Why its writer may be alive, or another program may be writing into it.
    live: str | None = None
    #: Why none of it can be thinned.
    fault: str | None = None
    #: Journals that nobody has locked; `recover` seals them.
    journals: list[str] = field(default_factory=list)
    #: Steps before which sums per minute end: what follows, or what comes before, some rank does not have.
    cuts: Int64 = field(default_factory=lambda: NO_CUTS)
    #: Bytes of its files if they are still to be written.
    to_write: int = 0

    def cuts_in(self, entry: SealedSegment) -> bool:
        """Whether a cut is between the steps of a segment whose loads are kept."""
        inside = (self.cuts > entry.first_step) & (self.cuts <= entry.last_step)
        return "loads" in entry.files and bool(inside.any())

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return self.to_write + sum(stat.st_size for stat in self.files.values())

    @property
    def last_ns(self) -> int:
        """When its newest step or journal was written, or else when it was created."""
        if self.info is None or self.fault is not None:
            return max((stat.st_mtime_ns for stat in self.files.values()), default=0)
        newest = [piece.last_ns for piece in self.pieces]
        newest += [self.files[name].st_mtime_ns for name in self.journals]
        return max([*newest, self.info.created_unix_ns])

    @property
    def unlisted_since(self) -> int | None:
        """Since when it may have recorded steps that are not in ``pieces``; None if all of them are."""
        if self.info is None or (self.info.origin is not None and "times" in self.info.origin.unknown):
            return 0
        listed = {file.name for piece in self.pieces for file in piece.entry.files.values()}
        others = (name.removesuffix(".tmp") for name in self.files.keys() - listed)
        if self.pieces and not any(
            SEGMENT_PATTERN.fullmatch(n) or JOURNAL_PATTERN.fullmatch(n) for n in others
        ):
            return None
        return self.info.created_unix_ns

    @property
    def stuck(self) -> str | None:
        """Why a part of it is neither thinned nor gone; None if nothing is."""
        if self.fault is not None:
            return self.fault
        if self.journals:
            return "its journal is not sealed; `recover` seals it"
        return next((piece.fault for piece in self.pieces if piece.fault is not None), None)


@dataclass(eq=False)
class SurveyedRun:
    """All files below a folder ``run=…``."""

    run_id: str
    folder: StoragePath
    sessions: list[SurveyedSession] = field(default_factory=list)
    #: Claims of ranks.
    claims: dict[StoragePath, os.stat_result] = field(default_factory=dict)
    #: What `prune` never removes: files that are not of the format, symbolic links.
    foreign: list[str] = field(default_factory=list)
    #: When folders without a session were made.
    empty_ns: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        claimed = sum(stat.st_size for stat in self.claims.values())
        return claimed + sum(session.size for session in self.sessions)

    @property
    def last_ns(self) -> int:
        """When its newest step was written."""
        newest = [session.last_ns for session in self.sessions] or self._begun_ns
        return max(newest, default=0)

    @property
    def _begun_ns(self) -> list[int]:
        return [*self.empty_ns, *(stat.st_mtime_ns for stat in self.claims.values())]

    @property
    def live(self) -> str | None:
        return next((session.live for session in self.sessions if session.live is not None), None)

    @property
    def has_newborn(self) -> bool:
        """Whether a rank may be about to begin a session."""
        now = time.time_ns()
        return any(now - begun < QUIET_NS for begun in self._begun_ns)


def survey(dump: StoragePath, run_ids: Sequence[str] | None = None) -> list[SurveyedRun]:
    """Look at the runs of a dump, or at those given. Raises OSError, UnreachableError."""
    if run_ids is None:
        names = [entry.name for entry in places.entries(dump) if _is_folder(entry, RUN_PREFIX)]
    else:
        names = [f"{RUN_PREFIX}{run_id}" for run_id in run_ids]
    found = ordered_map(lambda name: survey_run(dump / name), names, requests_at_once(dump))
    return [run for _, run in found]


def survey_run(folder: StoragePath) -> SurveyedRun:
    """Look at one run. Raises OSError, UnreachableError."""
    run = SurveyedRun(folder.name[len(RUN_PREFIX) :], folder)
    for names, session in _sessions(folder, [folder.name], run):
        run.sessions.append(_survey_session(names, session, run))
    _cut(run)
    return run


def _cut(run: SurveyedRun) -> None:
    """Find where ranks that write their own loads begin and end, so that their sums can be matched there."""
    of_model: dict[str, list[SurveyedSession]] = {}
    for session in run.sessions:
        if session.info is not None and session.info.scope is Scope.LOCAL:
            of_model.setdefault(session.info.model, []).append(session)
    for sessions in of_model.values():
        cuts = _ends_of_common_steps(sessions)
        for session in sessions:
            session.cuts = cuts
            for piece in session.pieces:
                if session.cuts_in(piece.entry) and piece.fault is None and session.info is not None:
                    _read_steps(piece, session.info)


def _ends_of_common_steps(sessions: Sequence[SurveyedSession]) -> Int64:
    """The steps at which sums per minute of these sessions are cut."""
    of_rank: dict[int, list[tuple[int, int]]] = {}
    for session in sessions:
        assert session.info is not None
        entries = [piece.entry for piece in session.pieces]
        first = min((entry.first_step for entry in entries), default=0)
        end = max((entry.last_step for entry in entries), default=0) + 1
        # What else it has is not known.
        if session.journals or session.live is not None or session.fault is not None:
            end = MAX_NUMBER
        of_rank.setdefault(session.info.ep_rank, []).append((first, end))
    return ends_of_common_steps(of_rank)


def _is_folder(entry: Entry, prefix: str) -> bool:
    return entry.name.startswith(prefix) and not entry.is_symlink() and entry.is_dir(follow_symlinks=False)


def _sessions(
    folder: StoragePath, names: list[str], run: SurveyedRun
) -> Iterator[tuple[list[str], StoragePath]]:
    if len(names) == len(LEVEL_PREFIXES):
        yield names, folder
        return
    inside = places.entries(folder)
    if isinstance(folder, Path) and not any(e.is_dir(follow_symlinks=False) for e in inside):
        run.empty_ns.append(folder.stat().st_mtime_ns)
    for entry in inside:
        if _is_folder(entry, LEVEL_PREFIXES[len(names)]):
            yield from _sessions(folder / entry.name, [*names, entry.name], run)
        elif entry.name == CLAIM_FILE and len(names) == 3 and not entry.is_symlink():
            run.claims[folder / entry.name] = entry.stat(follow_symlinks=False)
        else:
            run.foreign.append(str(folder / entry.name))


def _survey_session(names: list[str], folder: StoragePath, run: SurveyedRun) -> SurveyedSession:
    session = SurveyedSession(folder, None, {})
    for entry in places.entries(folder):
        name = entry.name
        if name == UNFINISHED_COPY:
            session.live = "a copy into it is not finished"
        elif _is_ours(name) and not entry.is_symlink() and not entry.is_dir(follow_symlinks=False):
            session.files[name] = entry.stat(follow_symlinks=False)
        else:
            run.foreign.append(str(folder / name))
    found = find_info((names, folder))
    session.info = found.info
    if session.info is None and session.live is None:
        empty = session.files.keys() <= {SESSION_FILE, f"{SESSION_FILE}.tmp"}
        session.fault = found.fault or ("it has no step" if empty else "it has no metadata")
        if time.time_ns() - max((s.st_mtime_ns for s in session.files.values()), default=0) < IDLE_NS:
            session.live = "its writer may have just started"
        return session
    if session.info is not None:
        session.manifest, session.fault = _manifest(folder, session)
        session.pieces = [
            piece
            for seq in sorted(session.manifest.entries)
            for piece in [_piece(session, session.manifest.entries[seq])]
        ]
        session.live = session.live or _live(session)
        note(session)
    return session


def _is_ours(name: str) -> bool:
    name = name.removesuffix(".tmp")
    patterns = SEGMENT_PATTERN.fullmatch(name) or JOURNAL_PATTERN.fullmatch(name)
    return name in (SESSION_FILE, MANIFEST_FILE) or bool(patterns)


def _manifest(folder: StoragePath, session: SurveyedSession) -> tuple[Manifest, str | None]:
    """The manifest by its headers, and why it cannot be read."""
    assert session.info is not None
    if MANIFEST_FILE not in session.files:
        sealed = any(SEGMENT_PATTERN.fullmatch(name) for name in session.files)
        return Manifest(), "its manifest is missing; `recover` rewrites it" if sealed else None
    path = folder / MANIFEST_FILE
    try:
        require_regular(path)
        with path.open("rb") as file:
            manifest = Manifest.read_headers(file, file.seek(0, 2), session.info.session_id)
    except (OSError, FormatError) as error:
        if exhausted(error):
            raise
        return Manifest(), f"its manifest cannot be read: {getattr(error, 'strerror', None) or error}"
    if manifest.fault is not None:
        return manifest, f"its manifest: {manifest.fault}"
    return manifest, None


def _piece(session: SurveyedSession, entry: SealedSegment) -> Piece:
    assert session.info is not None
    piece = Piece(session, entry, 0, 0)
    if entry.tier is Tier.FULL:
        piece.sums_bytes = max(0, session.manifest.frame_bytes.get(entry.seq, 0) - _THINNED_ENTRY_BYTES)
    wrong = [
        file.name
        for file in entry.files.values()
        if file.name not in session.files or session.files[file.name].st_size != file.bytes
    ]
    journals = [int(m[1]) for m in map(JOURNAL_PATTERN.fullmatch, session.files) if m]
    if wrong:
        piece.fault = f"{wrong[0]} is missing, or has another size than the manifest says"
    elif any(entry.seq <= seq <= entry.last_seq for seq in journals):
        piece.fault = "its segment also has a journal; `recover` removes what is not needed"
    piece.first_ns, piece.last_ns = times_of(session.info, entry)
    has_steps = "steps" in entry.files and entry.step_rows and piece.fault is None
    if has_steps and not (piece.last_ns and "minutes" in entry.files):
        _read_steps(piece, session.info)
    if not piece.last_ns:
        piece.first_ns = piece.last_ns = session.info.created_unix_ns
    return piece


def times_of(info: SessionInfo, entry: SealedSegment) -> tuple[int, int]:
    """When a segment's first and last step began, ns since 1970; 0 if the manifest does not say it."""
    if info.origin is not None and "times" in info.origin.unknown:  # its times are not times
        return info.created_unix_ns, info.created_unix_ns
    return entry.times or (0, 0)


def _read_steps(piece: Piece, info: SessionInfo) -> None:
    """Learn what the manifest does not say of a segment from before version 1.2."""
    try:
        segment = ParquetSegment(piece.session.folder, info, piece.entry)
        rows = segment.steps()
        if not piece.last_ns:
            piece.first_ns, piece.last_ns = int(rows.time_ns.min()), int(rows.time_ns.max())
        cuts = piece.session.cuts
        if "minutes" not in piece.entry.files or len(cuts):
            keys = keys_of(rows, segment.placement_steps(), cuts)
            piece.rows_of_minutes = np.unique(keys, axis=1).shape[1]
    except DamagedSegmentError as error:
        piece.fault = str(error)


def _live(session: SurveyedSession) -> str | None:
    """Why a session's writer may be alive, or another program may be writing into it."""
    now = time.time_ns()
    journals = {name: int(m[1]) for name in session.files if (m := JOURNAL_PATTERN.fullmatch(name))}
    for name in sorted(journals):
        if now - session.files[name].st_mtime_ns < QUIET_NS:
            return "its journal was written to in the last ten minutes"
        if in_use(session.folder / name):
            return "its writer is alive"
    session.journals = sorted(journals)
    if session.manifest.closed is not None or session.fault is not None:
        return None
    newest = max((entry.last_seq for entry in session.manifest.entries.values()), default=-1)
    if any(seq > newest for seq in journals.values()):
        return None  # a killed writer leaves its open journal
    if now - session.last_ns < IDLE_NS:
        return "it was not closed, and its last step is less than a day old: its engine may be idle"
    return None


def in_use(journal: StoragePath) -> bool:
    """Whether another process has locked a journal. In buckets, and without locks, nobody has."""
    if not isinstance(journal, Path):
        return False
    try:
        with journal.open("rb") as file:
            return lock(file.fileno()) is False
    except FileNotFoundError:  # it has just been sealed
        return True


def note(session: SurveyedSession) -> None:
    """Mark the pieces that are notable, and their neighbors: also the newest ones before a crash."""
    noted = {piece.entry.seq for piece in session.pieces if piece.entry.notable}
    origin = None if session.info is None else session.info.origin
    crashed = session.manifest.closed is None or (origin is not None and "end" in origin.unknown)
    if crashed and session.pieces:
        noted.add(session.pieces[-1].entry.seq)
    for piece in session.pieces:
        entry = piece.entry
        piece.notable = bool({entry.seq - 1, *range(entry.seq, entry.last_seq + 2)} & noted)
