"""`copy`: a run, or a part of it, is brought to another place, byte for byte and verified.

Every file is fetched under a name that no reader takes, verified there by the format's own checksums and by a
second reading of the source, and only then given its name; a session's ``session.json`` comes last, and
without it a reader reports the session and leaves it out. So an interrupted copy is never taken for a whole
one, and the same copy once more goes on where it was. A whole session that is there only ever grows.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.parallel import ordered_map
from eplb_analyze.reader.discovery import discover
from eplb_analyze.reader.run import choose_run
from eplb_analyze.reader.segments import DamagedSegmentError, ParquetSegment, require_regular
from eplb_analyze.reader.step_range import NO_END, StepRange
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import Remote
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format import frames
from eplb_dump.format.files import fsync_folder
from eplb_dump.format.journal import JournalSegment, UnbegunJournal, lock
from eplb_dump.format.manifest import SealedFile, SealedSegment
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    LEVEL_PREFIXES,
    MANIFEST_FILE,
    MODEL_PREFIX,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    FormatError,
    model_slug,
)
from eplb_dump.format.session import SessionInfo, load_json, session_path

#: Where a session's files are until they are verified: a folder, or in a bucket an object, of this name.
UNFINISHED = "copy.tmp"
#: In that folder; whoever copies into the session holds its lock.
LOCK = "lock"
CHUNK = 8 << 20
#: How often a session is looked at anew whose writer seals journals meanwhile.
LOOKS = 10
#: How often a file is fetched anew whose second reading is another.
READINGS = 3


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
    #: Files and sessions that are not in the copy, since they are damaged or missing in the source, and why.
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
    source: StoragePath,
    to: StoragePath,
    run: str | None = None,
    model: str | None = None,
    steps: tuple[int, int] | None = None,
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
        UsageError: what is there under a name of the run is another content, or a part that it does not
            hold; ``to`` lies inside a run; another copy writes there.
    """
    _require_dump_folder(to)
    found = discover(source, run)
    run_id, notes = choose_run(found, source, run)
    dump = found.root.resolve()
    if isinstance(dump, Path) and isinstance(to, Path) and dump in to.resolve().parents:
        raise UsageError(f"{to}: it lies inside the dump that is copied; name another --to")
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
    misplaced = [(folder, info) for folder, info in sessions if not _at_home(folder, info)]
    sessions = [session for session in sessions if session not in misplaced]
    if not sessions:
        raise DumpError(f"{source}: no session of run {run_id} can be read")
    report = CopyReport(
        source=str(source),
        to=str(to),
        run_id=run_id,
        models=sorted({info.model for _, info in sessions}),
        ranks=ranks,
        first_step=None if steps is None else steps[0],
        last_step=None if steps is None or steps[1] >= NO_END else steps[1] - 1,
        damaged=[
            *(f.text for f in found.findings_of(run_id) if f.severity == "error"),
            *(
                f"{folder / SESSION_FILE}: it is of model {info.model!r}, another folder's; session left out"
                for folder, info in misplaced
            ),
        ],
        notes=notes,
    )
    ways = [_SessionCopy(_Source(folder, info, steps), _target(to, info)) for folder, info in sessions]
    threads = max(places.requests_at_once(source), places.requests_at_once(to))
    try:
        looks = [look for _, look in ordered_map(_SessionCopy.look, ways, threads)]
        if steps is not None and not any(look.touched for look in looks):
            raise NotInDumpError(f"{source}: no segment of run {run_id} is in these steps")
        report.damaged += [look.fault for look in looks if look.fault is not None]
        ways = [way for way, look in zip(ways, looks, strict=True) if look.fault is None]
        # All at once, so that a copy of which some sessions are not begun does not look whole either.
        for _ in ordered_map(lambda way: way.target.begin(), ways, threads):
            pass
        copied = []
        for done, (_, counted) in enumerate(ordered_map(_SessionCopy.copy, ways, threads)):
            progress(done + 1, len(ways))
            report.add(counted)
            copied.append(counted.names)
        _require_all(to, run_id, ways, copied)
    except OSError as error:
        raise DumpError(f"{error.filename or to}: {error.strerror or error}") from None
    return report


def _at_home(folder: StoragePath, info: SessionInfo) -> bool:
    """Whether a session lies in its model's folder; else its copy could meet another one's."""
    return folder.parent.parent.name == f"{MODEL_PREFIX}{model_slug(info.model)}"


def _require_dump_folder(to: StoragePath) -> None:
    """Raise UsageError for a place inside a run: what were written there would be part of that run."""
    parts = to.resolve().parts if isinstance(to, Path) else cast(Remote, to).key.split("/")
    inside = next((part for part in parts if part.startswith(LEVEL_PREFIXES)), None)
    if inside is not None:
        raise UsageError(f"{to}: it lies inside {inside}; give the dump's folder, in which run=… is made")


def _require_all(to: StoragePath, run_id: str, ways: list[_SessionCopy], copied: list[set[str]]) -> None:
    """Raise DumpError where a file is gone again: where there are no locks, another copy can remove it."""
    places.forget_listing(to)
    if ways:
        places.entries(to / f"{RUN_PREFIX}{run_id}")  # of a bucket, all that is below in one listing
    for way, names in zip(ways, copied, strict=True):
        gone = names - way.target.names()
        if gone:
            raise DumpError(
                f"{way.target.folder / min(gone)}: it was taken away meanwhile; copy once more, alone"
            )


@dataclass
class _Counted:
    """What was copied of one session."""

    #: Of the files that are there now.
    names: set[str] = field(default_factory=set)
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
    source: StoragePath | bytes
    verify: Callable[[Path], None]


@dataclass(frozen=True)
class _Manifest:
    """A manifest's valid prefix, and what it says."""

    data: bytes = b""
    entries: dict[int, SealedSegment] = field(default_factory=dict)
    closed: dict[str, Any] | None = None
    #: Of a copy of some steps: the first and the last that were asked for.
    part: tuple[int, int] | None = None

    @classmethod
    def of(cls, data: bytes) -> _Manifest:
        """Raises FormatError where there is damage in it."""
        entries: dict[int, SealedSegment] = {}
        closed = part = None
        for item in frames.scan(io.BytesIO(data), len(data)):
            if isinstance(item, frames.Tail):
                if item.fault == "damaged":
                    raise FormatError(f"damaged from byte {item.end} on")
                data = data[: item.end]
            elif item.kind == "sealed":
                entry = SealedSegment.from_frame(item)
                entries[entry.seq] = entry
            elif item.kind == "closed":
                closed = item.header
            elif item.kind == "part":
                part = int(item.header["first_step"]), int(item.header["last_step"])
        return cls(data, entries, closed, part)

    @property
    def files(self) -> set[SealedFile]:
        return {file for entry in self.entries.values() for file in entry.files.values()}

    def covers(self, other: _Manifest) -> bool:
        """Whether it is of all the steps that another is of."""
        if self.part is None or other.part is None:
            return self.part is None
        return self.part[0] <= other.part[0] and other.part[1] <= self.part[1]

    def continues(self, other: _Manifest) -> bool:
        """Whether it says all that another does."""
        return other.files <= self.files and other.closed in (None, self.closed)


@dataclass(frozen=True)
class _Look:
    """What is known of a session before it is copied."""

    #: Why it cannot be.
    fault: str | None
    #: Whether something of the steps asked for can be in it.
    touched: bool


@dataclass(frozen=True)
class _SessionCopy:
    """A session, from where it is to where it goes."""

    source: _Source
    target: _Target

    def look(self) -> _Look:
        """Raises UsageError where it cannot go there; nothing is written yet."""
        try:
            plan = self.source.plan()
        except _ManifestFault as fault:
            return _Look(f"{fault}; session left out", True)
        self.target.look()
        self.target.require_room(plan.manifest)
        self.target.itself = _same(self.source.folder, self.target.folder)
        return _Look(None, any(file.name.startswith(("steps-", "journal-")) for file in plan.files))

    def copy(self) -> _Counted:
        with self.target.held():
            for looks in reversed(range(LOOKS)):
                try:
                    return self._copy_as_it_is_now()
                except _ChangedError:
                    if not looks:
                        break
                    places.forget_listing(self.source.folder)
        raise DumpError(f"{self.source.folder}: it changes faster than it is read")

    def _copy_as_it_is_now(self) -> _Counted:
        source, target = self.source, self.target
        plan = source.plan()
        target.require_room(plan.manifest)
        counted = _Counted(segments_left_out=plan.left_out)
        #: What is there of them stays, also where the source's is damaged now.
        planned = {file.name for file in plan.files}

        def take(file: _File) -> None:
            where = source.folder / file.name
            try:
                size, there = target.take(file)
            except UnbegunJournal:
                planned.discard(file.name)  # nothing that counts is in it
                return
            except (FormatError, DamagedSegmentError) as error:
                counted.damaged.append(f"{where}: {str(error).removeprefix(f'{target.spool / file.name}: ')}")
                return
            except FileNotFoundError as error:
                if error.filename is not None and str(error.filename) != str(where):
                    raise
                if JOURNAL_PATTERN.fullmatch(file.name):
                    raise _ChangedError from None
                counted.damaged.append(f"{where}: it is missing, although the manifest lists it")
                return
            counted.names.add(file.name)
            counted.files += 1
            counted.bytes += size
            counted.files_there += there

        for file in plan.files:
            take(file)
        target.clean(planned, plan.manifest)
        take(_File(SESSION_FILE, source.folder / SESSION_FILE, _verify_session))
        return counted


@dataclass(frozen=True)
class _Plan:
    """The files of a session to copy, but for ``session.json``."""

    files: list[_File]
    manifest: _Manifest
    #: How many segments are not in it.
    left_out: int


class _Source:
    """A session that is copied."""

    def __init__(self, folder: StoragePath, info: SessionInfo, steps: tuple[int, int] | None) -> None:
        self.folder = folder
        self._info = info
        self._steps = steps

    def plan(self) -> _Plan:
        """What is to be copied of it. Raises _ManifestFault."""
        first, end = StepRange.of(self._steps)
        # Before the manifest: a journal that is sealed in between is missed when it is fetched.
        inside = [entry.name for entry in places.entries(self.folder)]
        journals = {int(match[1]): match[0] for match in map(JOURNAL_PATTERN.fullmatch, inside) if match}
        manifest = _manifest(self.folder)
        kept: list[SealedSegment] = []
        # Journals come first: when they are sealed, they are gone.
        files = [
            _File(name, self.folder / name, partial(_verify_journal, end))
            for name in sorted(journals.values())
        ]
        left_out = 0
        for seq, entry in manifest.entries.items():
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
            manifest = _Manifest.of(_part(manifest.data, self._info, kept, self._steps))
        if manifest.data:
            files.append(_File(MANIFEST_FILE, manifest.data, lambda _: None))
        return _Plan(files, manifest, left_out)


class _ManifestFault(Exception):
    """A manifest is damaged; what it listed behind that cannot be verified, or copied."""


def _manifest(folder: StoragePath) -> _Manifest:
    """A session's manifest; empty where it has sealed nothing yet. Raises _ManifestFault."""
    path = folder / MANIFEST_FILE
    try:
        require_regular(path)
        return _Manifest.of(path.read_bytes())
    except FileNotFoundError:
        return _Manifest()
    except (FormatError, KeyError, TypeError, ValueError) as error:
        raise _ManifestFault(f"{path}: {error}") from None


def _part(data: bytes, info: SessionInfo, kept: list[SealedSegment], steps: tuple[int, int]) -> bytes:
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
    """A session where it goes."""

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder
        #: A folder of this process for what is not verified yet, while it is held.
        self.spool = Path()
        #: Whether it is the source.
        self.itself = False
        #: Whether an earlier copy came to its end; and what it left, or one that did not.
        self._finished = False
        self._there: set[str] = set()

    def look(self) -> None:
        """See what is there. Raises UsageError where no copy can have made it."""
        self._there = self.names()
        self._finished = SESSION_FILE in self._there
        if self._there and not self._finished and UNFINISHED not in self._there:
            raise UsageError(f"{self.folder}: files are in it that no copy began; nothing was written")

    def require_room(self, manifest: _Manifest) -> None:
        """Raise UsageError where a session of this manifest does not go on with a finished one there."""
        if not self._finished:
            return
        path = self.folder / MANIFEST_FILE
        try:
            there = _manifest(self.folder)
        except _ManifestFault as fault:
            raise UsageError(f"{fault}; it stays as it is") from None
        if there.data == manifest.data:
            return
        if not manifest.covers(there):
            held = "more than the steps asked for"
            if there.part is not None:
                end = "" if there.part[1] >= NO_END - 1 else there.part[1] + 1
                held = f"a copy of steps {there.part[0]}:{end} only"
            raise UsageError(f"{self.folder}: it holds {held}, and stays as it is; name another --to")
        if not manifest.continues(there):
            raise UsageError(f"{path}: it is there with another content, and stays as it is")

    def begin(self) -> None:
        """Leave a mark there that the session is not whole yet, unless it is."""
        if not self._finished:
            self._mark()

    @contextmanager
    def held(self) -> Iterator[None]:
        """For a block of :meth:`take`: with a spool and, where there are locks, against other copies.

        Raises UsageError where another one has it.
        """
        raise NotImplementedError
        yield

    def take(self, file: _File) -> tuple[int, bool]:
        """Have a file there: its size, and whether it was there already.

        Raises FileNotFoundError where the source's is gone; FormatError, DamagedSegmentError where it is
        damaged; UsageError where a finished session has another one of that name.
        """
        path, there = self.spool / file.name, self.folder / file.name
        try:
            size, digest = _fetch(file, path)
            file.verify(path)
            if _is(there, size, digest):
                return size, True
            if self._finished and (self.itself or not _grows(there, path)):
                raise UsageError(f"{there}: it is there with another content, and stays as it is")
            self._publish(path, there)
            if not _is(there, size, digest):
                self._remove(file.name)
                raise DumpError(f"{there}: what was written is not what lies there; nothing was kept of it")
            self._there.add(file.name)
            return size, False
        finally:
            with suppress(OSError):
                path.unlink()

    def clean(self, planned: set[str], manifest: _Manifest) -> None:
        """Take away what an attempt before left: journals that were sealed since, say."""
        unplanned = self._there - planned
        journals = list(filter(None, map(JOURNAL_PATTERN.fullmatch, unplanned)))
        if self._finished:
            left = [journal[0] for journal in journals if int(journal[1]) in manifest.entries]
        else:
            left = [name[0] for name in (*journals, *map(SEGMENT_PATTERN.fullmatch, unplanned)) if name]
            if left:
                places.forget_listing(self.folder)
            if SESSION_FILE in self.names():
                return  # another copy came to its end meanwhile: they are of that one
        for name in left:
            self._remove(name)

    def names(self) -> set[str]:
        try:
            return {entry.name for entry in places.entries(self.folder)}
        except FileNotFoundError:
            return set()

    def _mark(self) -> None:
        raise NotImplementedError

    def _publish(self, path: Path, there: StoragePath) -> None:
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        raise NotImplementedError


class _LocalTarget(_Target):
    """In a folder; the mark is a folder, too, with the lock and the spool in it."""

    def __init__(self, to: Path, info: SessionInfo) -> None:
        self._path = session_path(to, info)
        super().__init__(self._path)
        self._unfinished = self._path / UNFINISHED

    def look(self) -> None:
        for path in (*reversed(self._path.parents[:3]), self._path, self._unfinished):
            if path.is_symlink():
                raise UsageError(f"{path}: it is a symbolic link, which readers do not follow; remove it")
        super().look()

    @contextmanager
    def held(self) -> Iterator[None]:
        with ExitStack() as held:
            alone = self._lock(held)
            held.callback(self._tidy, alone)
            self.look()
            spool = tempfile.TemporaryDirectory(dir=self._unfinished)
            self.spool = Path(held.enter_context(spool))
            yield
        if self._is_whole():
            with suppress(OSError):  # some file systems keep the lock's file until it is closed
                self._unfinished.rmdir()

    def _is_whole(self) -> bool:
        return SESSION_FILE in self.names()

    def _tidy(self, alone: bool) -> None:
        """Take the mark away where the session is whole, with what killed copies left in it."""
        if not self._is_whole():
            return
        with suppress(OSError):
            if alone:
                shutil.rmtree(self._unfinished)
            (self._unfinished / LOCK).unlink()
            self._unfinished.rmdir()

    def _lock(self, held: ExitStack) -> bool:
        """Take the lock; False where there are none. Raises UsageError where another copy has it."""
        while True:
            self._mark()
            try:
                file = (self._unfinished / LOCK).open("ab")
            except FileNotFoundError:  # a copy has come to its end
                continue
            got = lock(file.fileno())
            if got:
                held.enter_context(file)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), (self._unfinished / LOCK).stat()):
                        return True
            file.close()
            if got is None:
                return False
            if got is False:
                raise UsageError(f"{self.folder}: another copy writes into it; let that end, then copy again")

    def _mark(self) -> None:
        self._unfinished.mkdir(parents=True, exist_ok=True)

    def _publish(self, path: Path, there: StoragePath) -> None:
        os.replace(path, self._path / there.name)
        fsync_folder(self._path)

    def _remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class _RemoteTarget(_Target):
    """In a bucket; the mark is an object. There are no locks."""

    def __init__(self, to: Remote, info: SessionInfo) -> None:
        self._prefix = to
        for name in session_path(Path(), info).parts:
            self._prefix = self._prefix / name
        super().__init__(self._prefix)

    @contextmanager
    def held(self) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="eplb-copy-") as spool:
            self.spool = Path(spool)
            yield
        if {SESSION_FILE, UNFINISHED} <= self.names():
            self._remove(UNFINISHED)

    def _mark(self) -> None:
        (self._prefix / UNFINISHED).write(io.BytesIO(b""))

    def _publish(self, path: Path, there: StoragePath) -> None:
        with path.open("rb") as file:
            (self._prefix / there.name).write(file)

    def _remove(self, name: str) -> None:
        (self._prefix / name).unlink()


def _target(to: StoragePath, info: SessionInfo) -> _Target:
    return _LocalTarget(to, info) if isinstance(to, Path) else _RemoteTarget(cast(Remote, to), info)


def _fetch(file: _File, path: Path) -> tuple[int, str]:
    """Bring a file to a path; its size and its digest. Raises OSError, FormatError."""
    if isinstance(file.source, bytes):
        path.write_bytes(file.source)
        return len(file.source), hashlib.sha256(file.source).hexdigest()
    require_regular(file.source)
    for _ in range(READINGS):
        with file.source.open("rb") as read, path.open("wb") as write:
            size, digest = _digest(read, write)
            write.flush()
            os.fsync(write.fileno())
        if JOURNAL_PATTERN.fullmatch(file.name):
            return size, digest  # it may grow meanwhile; all of it is in checksums of its own
        # No checksum of a Parquet file covers its first bytes, or the heads of its pages.
        with file.source.open("rb") as read:
            if _digest(read) == (size, digest):
                return size, digest
    raise FormatError(f"{READINGS} times two readings of it were not the same")


def _same(one: StoragePath, other: StoragePath) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one) == str(other)


def _digest(read: BinaryIO, write: BinaryIO | None = None, most: int = NO_END) -> tuple[int, str]:
    """How much there is to read, at most so much, and its digest; it is written, too, if need be."""
    digest, size = hashlib.sha256(), 0
    while data := read.read(min(CHUNK, most - size)):
        digest.update(data)
        size += len(data)
        if write is not None:
            write.write(data)
    return size, digest.hexdigest()


def _is(there: StoragePath, size: int, digest: str) -> bool:
    """Whether what lies there has this content."""
    try:
        found = there.lstat()
        if found.st_size != size or not stat.S_ISREG(found.st_mode):
            return False
        with there.open("rb") as file:
            return _digest(file) == (size, digest)
    except FileNotFoundError:
        return False


def _grows(there: StoragePath, path: Path) -> bool:
    """Whether a file of a finished session may become this one: nothing is lost that is there."""
    try:
        require_regular(there)
    except FileNotFoundError:
        return True
    except FormatError:
        return False
    if there.name == MANIFEST_FILE:
        old, new = _Manifest.of(there.read_bytes()), _Manifest.of(path.read_bytes())
        return new.covers(old) and new.continues(old)
    if JOURNAL_PATTERN.fullmatch(there.name):
        with there.open("rb") as earlier, path.open("rb") as later:
            before = _digest(earlier)
            return _digest(later, most=before[0]) == before
    if there.name == SESSION_FILE:
        return _knows_more(path.read_bytes(), there.read_bytes())
    return False


def _knows_more(new: bytes, old: bytes) -> bool:
    """Whether a ``session.json`` is another one after the shape of the first step became known."""
    try:
        later, earlier = (SessionInfo.from_dict(load_json(data)) for data in (new, old))
    except FormatError:
        return False
    return earlier.num_moe_layers is None and earlier == replace(
        later,
        ep_size=earlier.ep_size,
        num_moe_layers=None,
        num_physical_experts=earlier.num_physical_experts,
    )
