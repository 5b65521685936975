"""`copy`: a run, or a part of it, is brought to another place, byte for byte and verified.

Every file is fetched under a name that no reader takes, verified there by the format's own checksums, and
only then given its name; a session's ``session.json`` comes last, and without it a reader reports the
session and leaves it out. So an interrupted copy is never taken for a whole one, and the same copy once more
goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from eplb_analyze import places
from eplb_analyze.dump import discover
from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.places import Place, Remote
from eplb_analyze.run import Steps, choose_run
from eplb_analyze.segments import ParquetSegment, SegmentFault, require_regular
from eplb_dump import frames
from eplb_dump.format import (
    JOURNAL_PATTERN,
    MANIFEST_FILE,
    MODEL_PREFIX,
    RANK_PREFIX,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    SessionInfo,
    load_json,
    model_slug,
    session_path,
)
from eplb_dump.journal import JournalSegment, UnbegunJournal
from eplb_dump.sealing import SealedSegment, fsync_folder

#: Where a session's files are until they are verified: a folder, or in a bucket an object, of this name.
UNFINISHED = "copy.tmp"
CHUNK = 8 << 20
NO_END = 2**62
#: How often a session is looked at anew whose writer seals journals meanwhile.
LOOKS = 10


@dataclass
class CopyReport:
    """What was copied."""

    source: str
    to: str
    run_id: str
    models: list[str]
    #: Those asked for; None: all.
    ranks: list[int] | None
    first_step: int | None
    last_step: int | None
    sessions: int = 0
    files: int = 0
    bytes: int = 0
    #: Of ``files``, those that were there already, of an earlier copy.
    files_there: int = 0
    #: Whole segments that do not touch the steps asked for.
    segments_left_out: int = 0
    #: Files that are not in the copy, since they are damaged or missing in the source, and why.
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def add(self, session: _Counted) -> None:
        self.sessions += 1
        self.files += session.files
        self.bytes += session.bytes
        self.files_there += session.files_there
        self.segments_left_out += session.segments_left_out
        self.damaged += session.damaged


def copy_run(
    source: Place,
    to: Place,
    run: str | None = None,
    model: str | None = None,
    steps: Steps | None = None,
    ranks: list[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CopyReport:
    """Copy a run into the dump ``to``, under the same names; what is there stays as it is.

    Args:
        source: a dump, or one run, model, rank or session of it.
        to: the folder or prefix of a dump; a folder is made where there is none.
        run: default the newest.
        model: its name; default all of the run.
        steps: half-open; whole segments that touch it are copied, and of earlier ones the placements.
        ranks: default all.
        progress: called with how many sessions are done, and of how many.

    Raises:
        DumpError, NotInDumpError, UnreachableError: there is no such run, or it cannot be read or written.
        UsageError: what is there under a name of the run is another content.
    """
    if str(to.name).startswith((RUN_PREFIX, MODEL_PREFIX, RANK_PREFIX, SESSION_PREFIX)):
        raise UsageError(f"{to}: give the dump's folder, in which run=… is made")
    found = discover(source, run)
    run_id, notes = choose_run(found, source, run)
    sessions = [
        (folder, info)
        for slug, own in sorted(found.runs[run_id].items())
        for folder, info in own
        if model is None or model in (info.model, slug, model_slug(info.model))
    ]
    if model is not None and not sessions:
        raise NotInDumpError(f"{source}: run {run_id} has no model {model!r}")
    if ranks is not None:
        there = sorted({info.ep_rank for _, info in sessions})
        if not set(ranks) <= set(there):
            absent = ", ".join(str(rank) for rank in sorted(set(ranks) - set(there))[:8])
            raise NotInDumpError(f"{source}: run {run_id} has nothing of rank {absent}")
        sessions = [(folder, info) for folder, info in sessions if info.ep_rank in ranks]
    if not sessions:
        raise DumpError(f"{source}: no session of run {run_id} can be read")
    sources = [_Source(folder, info, steps) for folder, info in sessions]
    where = source if isinstance(source, Remote) else to
    if steps is not None and not any(places.each(where, _Source.touched, sources)):
        raise NotInDumpError(f"{source}: no segment of run {run_id} is in these steps")
    report = CopyReport(
        source=str(source),
        to=str(to),
        run_id=run_id,
        models=sorted({info.model for _, info in sessions}),
        ranks=ranks,
        first_step=None if steps is None else steps[0],
        last_step=None if steps is None or steps[1] >= NO_END else steps[1] - 1,
        damaged=[f.text for f in found.findings_of(run_id) if f.severity == "error"],
        notes=notes,
    )
    try:
        targets = [_target(session_path_in(to, info)) for _, info in sessions]
        # All at once, so that a copy of which some sessions are not begun does not look whole either.
        for _ in places.each(where, _Target.begin, targets):
            pass
        for done, counted in enumerate(places.each(where, _copy_session, zip(sources, targets, strict=True))):
            progress(done + 1, len(sessions))
            report.add(counted)
    except OSError as error:
        raise DumpError(f"{error.filename or to}: {error.strerror or error}") from None
    return report


def session_path_in(to: Place, info: SessionInfo) -> Place:
    """``session_path`` in a dump that may lie in a bucket."""
    place = to
    for name in session_path(Path(), info).parts:
        place = place / name
    return place


@dataclass
class _Counted:
    """What was copied of one session."""

    files: int = 0
    bytes: int = 0
    files_there: int = 0
    segments_left_out: int = 0
    damaged: list[str] = field(default_factory=list)


class _ChangedError(Exception):
    """A file went while it was copied: its writer sealed it."""


@dataclass(frozen=True)
class _File:
    """A file to copy: where it is from, or its content, and what raises where a fetched one is not right."""

    name: str
    source: Place | bytes
    verify: Callable[[Path], None]


def _copy_session(session: tuple[_Source, _Target]) -> _Counted:
    source, target = session
    for looks in reversed(range(LOOKS)):
        try:
            return _copy_as_it_is_now(source, target)
        except _ChangedError:
            if not looks:
                break
            places.look_again(source.folder)
    raise DumpError(f"{source.folder}: it changes faster than it is read")


def _copy_as_it_is_now(source: _Source, target: _Target) -> _Counted:
    files, left_out = source.plan()
    counted = _Counted(segments_left_out=left_out)
    names = set()

    def take(file: _File) -> None:
        where = source.folder / file.name
        try:
            size, there = target.take(file)
        except UnbegunJournal:
            return  # nothing that counts is in it
        except (FormatError, SegmentFault) as error:
            counted.damaged.append(f"{where}: {str(error).removeprefix(f'{target.spool / file.name}: ')}")
            return
        except FileNotFoundError as error:
            if error.filename is not None and str(error.filename) != str(where):
                raise
            if JOURNAL_PATTERN.fullmatch(file.name):
                raise _ChangedError from None
            counted.damaged.append(f"{where}: it is missing, although the manifest lists it")
            return
        names.add(file.name)
        counted.files += 1
        counted.bytes += size
        counted.files_there += there

    for file in files:
        take(file)
    target.clean(names)
    take(_File(SESSION_FILE, source.folder / SESSION_FILE, _verify_session))
    target.end()
    return counted


class _Source:
    """A session that is copied."""

    def __init__(self, folder: Place, info: SessionInfo, steps: Steps | None) -> None:
        self.folder = folder
        self._info = info
        self._steps = steps

    def touched(self) -> bool:
        """Whether something of the steps asked for can be in it."""
        files, _ = self.plan()
        return any(file.name.startswith(("steps-", "journal-")) for file in files)

    def plan(self) -> tuple[list[_File], int]:
        """The files to copy, but for ``session.json``; and how many segments are left out."""
        first, end = self._steps or (0, NO_END)
        # Before the manifest: a journal that is sealed in between is missed when it is fetched.
        inside = [entry.name for entry in places.entries(self.folder)]
        journals = {int(match[1]): match[0] for match in map(JOURNAL_PATTERN.fullmatch, inside) if match}
        data, entries = _manifest(self.folder)
        kept: list[SealedSegment] = []
        # Journals come first: when they are sealed, they are gone.
        files = [
            _File(name, self.folder / name, partial(_verify_journal, end))
            for name in sorted(journals.values())
        ]
        left_out = 0
        for seq, entry in entries.items():
            if entry.first_step >= end or entry.last_step < first:
                left_out += 1
            if entry.first_step >= end:
                continue
            chosen = entry
            if entry.last_step < first:
                # What is in force in the steps asked for is stated where it began.
                stated = {table: file for table, file in entry.files.items() if table == "placements"}
                chosen = SealedSegment(seq, entry.first_step, entry.last_step, None, stated)
            kept.append(chosen)
            for table, file in chosen.files.items() if seq not in journals else ():
                verify = partial(_verify_table, self._info, entry, table)
                files.append(_File(file.name, self.folder / file.name, verify))
        if self._steps is not None:
            data = _part(data, self._info, kept, self._steps)
        if data:
            files.append(_File(MANIFEST_FILE, data, lambda _: None))
        return files, left_out


def _manifest(folder: Place) -> tuple[bytes, dict[int, SealedSegment]]:
    """A manifest's valid prefix, and what it lists. Raises DumpError where there is damage in it."""
    path = folder / MANIFEST_FILE
    entries: dict[int, SealedSegment] = {}
    try:
        require_regular(path)
        data = path.read_bytes()
        for item in frames.scan(io.BytesIO(data), len(data)):
            if isinstance(item, frames.Tail):
                if item.fault == "damaged":
                    raise FormatError(f"damaged from byte {item.end} on")
                return data[: item.end], entries
            if item.kind == "sealed":
                entry = SealedSegment.from_frame(item)
                entries[entry.seq] = entry
    except FileNotFoundError:
        pass
    except FormatError as error:
        raise DumpError(f"{path}: {error}; what it listed after that cannot be verified, or copied") from None
    return b"", entries


def _part(data: bytes, info: SessionInfo, kept: list[SealedSegment], steps: Steps) -> bytes:
    """The manifest of a part: what is kept, and that it is one."""
    out = [frames.encode("session", {"session": info.to_dict()})]
    out.append(frames.encode("part", {"first_step": steps[0], "last_step": steps[1] - 1}))
    out += [entry.to_frame() for entry in kept]
    for item in frames.scan(io.BytesIO(data), len(data)):
        if isinstance(item, frames.Frame) and item.kind == "closed":
            out.append(data[item.start : item.end])
    return b"".join(out)


def _verify_table(info: SessionInfo, entry: SealedSegment, table: str, path: Path) -> None:
    ParquetSegment(path.parent, info, entry).verify(table)


def _verify_journal(end: int, path: Path) -> None:
    with JournalSegment(path) as journal:
        if journal.tail.fault == "damaged":
            raise FormatError(f"damaged from byte {journal.tail.end} on")
        if not len(journal.steps.step) or int(journal.steps.step.min()) >= end:
            raise UnbegunJournal("it has no step to copy")


def _verify_session(path: Path) -> None:
    SessionInfo.from_dict(load_json(path.read_bytes()))


# ---- where it goes


class _Target:
    """A session on its way to where it goes. ``spool`` is a folder for what is not verified yet."""

    def __init__(self, folder: Place, spool: Path) -> None:
        self.folder = folder
        self.spool = spool
        self._finished = False

    def begin(self) -> None:
        """Leave a mark there that the session is not whole yet, unless it is."""
        there = self._names()
        self._finished = SESSION_FILE in there
        if there and not self._finished and UNFINISHED not in there:
            raise UsageError(f"{self.folder}: files are in it that no copy began; nothing was written")
        if not self._finished:
            self._mark()

    def take(self, file: _File) -> tuple[int, bool]:
        """Have a file there: its size, and whether it was there already.

        Raises FileNotFoundError where the source's is gone; FormatError, SegmentFault where it is damaged;
        UsageError where a finished session has another one of that name.
        """
        path, there = self.spool / file.name, self.folder / file.name
        self.spool.mkdir(parents=True, exist_ok=True)
        try:
            size, digest = _fetch(file.source, path)
            file.verify(path)
            if _is(there, size, digest):
                return size, True
            if self._finished:
                raise UsageError(f"{there}: it is there with another content, and stays as it is")
            self._publish(path, there)
            if not _is(there, size, digest):
                self._remove(file.name)
                raise DumpError(f"{there}: what was written is not what lies there; nothing was kept of it")
            return size, False
        finally:
            with suppress(OSError):
                path.unlink()

    def clean(self, names: set[str]) -> None:
        """Take away what an attempt before left: journals that were sealed since, say."""
        for name in self._names() - names:
            if not self._finished and (JOURNAL_PATTERN.fullmatch(name) or SEGMENT_PATTERN.fullmatch(name)):
                self._remove(name)

    def end(self) -> None:
        """The session is whole."""
        shutil.rmtree(self.spool, ignore_errors=True)

    def _names(self) -> set[str]:
        try:
            return {entry.name for entry in places.entries(self.folder)}
        except FileNotFoundError:
            return set()

    def _mark(self) -> None:
        raise NotImplementedError

    def _publish(self, path: Path, there: Place) -> None:
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        raise NotImplementedError


class _LocalTarget(_Target):
    """In a folder; the mark is the spool."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / UNFINISHED)
        self._path = folder

    def _mark(self) -> None:
        self.spool.mkdir(parents=True, exist_ok=True)

    def _publish(self, path: Path, there: Place) -> None:
        os.replace(path, self._path / there.name)
        fsync_folder(self._path)

    def _remove(self, name: str) -> None:
        (self._path / name).unlink()


class _RemoteTarget(_Target):
    """In a bucket; the mark is an object."""

    def __init__(self, folder: Remote) -> None:
        super().__init__(folder, Path(tempfile.gettempdir()) / f"eplb-copy-{secrets.token_hex(8)}")
        self._prefix = folder

    def _mark(self) -> None:
        (self._prefix / UNFINISHED).write(io.BytesIO(b""))

    def end(self) -> None:
        super().end()
        if UNFINISHED in self._names():
            self._remove(UNFINISHED)

    def _publish(self, path: Path, there: Place) -> None:
        with path.open("rb") as file:
            (self._prefix / there.name).write(file)

    def _remove(self, name: str) -> None:
        (self._prefix / name).unlink()


def _target(folder: Place) -> _Target:
    return _LocalTarget(folder) if isinstance(folder, Path) else _RemoteTarget(cast(Remote, folder))


def _fetch(source: Place | bytes, path: Path) -> tuple[int, str]:
    """Bring a file to a path; its size and its digest. Raises OSError, FormatError."""
    if not isinstance(source, bytes):
        require_regular(source)
    digest, size = hashlib.sha256(), 0
    with (
        io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as read,
        path.open("wb") as write,
    ):
        while data := read.read(CHUNK):
            digest.update(data)
            size += len(data)
            write.write(data)
        write.flush()
        os.fsync(write.fileno())
    return size, digest.hexdigest()


def _is(there: Place, size: int, digest: str) -> bool:
    """Whether what lies there has this content."""
    found = hashlib.sha256()
    try:
        if there.stat().st_size != size:
            return False
        with there.open("rb") as file:
            while data := file.read(CHUNK):
                found.update(data)
    except FileNotFoundError:
        return False
    return found.hexdigest() == digest
