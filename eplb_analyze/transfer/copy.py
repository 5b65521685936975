"""`copy`: a run or a part of it, byte for byte and verified, into another dump.

A run can be copied while it is written; the copy is the run as of one moment. Each session's journals are
copied first, then the files that its manifest lists, the manifest, and last ``session.json``. Readers report
and skip a session without ``session.json``, so an interrupted copy is never mistaken for a complete one. The
same copy again continues where it stopped, or adds what was written since.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from eplb_analyze.atomic import require_dump_folder
from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.json_report import Report
from eplb_analyze.parallel import ordered_map
from eplb_analyze.reader.choose import choose_run
from eplb_analyze.sessions.discovery import Discovery, discover
from eplb_analyze.sessions.metadata import read_session_file
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.starts import run_and_start
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage import path as storage
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import plural
from eplb_analyze.transfer.copy_target import DamagedManifestError, Target, sound_manifest
from eplb_dump.format import frames
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import JournalSegment, UnbegunJournal
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    MANIFEST_FILE,
    MODEL_PREFIX,
    RUN_PREFIX,
    SESSION_FILE,
    FormatError,
    Tier,
    model_slug,
)
from eplb_dump.format.session import SessionInfo, dump_json

#: How often a session is copied again because its writer thinned segments meanwhile.
MAX_LOOKS = 5


@frozen
class CopyReport(Report):
    """What was copied."""

    source: str
    to: str
    run_id: str
    #: The models of the run.
    models: list[str]
    #: The ranks and steps asked for; None: all.
    ranks: list[int] | None
    first_step: int | None
    last_step: int | None
    sessions: int
    files: int
    #: Rows of the tables and journals among these files.
    rows: int
    bytes: int
    #: How many of ``files`` an earlier copy had brought already.
    files_there: int
    #: Segments without any of the steps asked for.
    segments_left_out: int
    #: Files and sessions that are not in the copy because they are damaged or missing at the source, and why.
    damaged: list[str]
    notes: list[str]


def copy_run(
    source: StoragePath,
    to: StoragePath,
    run: str | None = None,
    model: str | None = None,
    steps: tuple[int, int] | None = None,
    ranks: list[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CopyReport:
    """Copy a run into the dump ``to``, under the same names; existing data stays.

    Args:
        source: a dump, or one run, model, rank or session of it.
        to: the folder or prefix of a dump; a missing folder is made.
        run: default the newest.
        model: its name; default all models of the run.
        steps: half-open range; whole segments that touch it are copied, and of earlier ones the placements.
        ranks: default all.
        progress: called with the number of sessions done and the number of all.

    Raises:
        DumpError, NotInDumpError, UnreachableError: there is no such run, or it cannot be read or written.
        UsageError: ``to`` has other content under a name of the run, or more steps than are copied; ``to``
            is inside a run; another copy writes there.
    """
    require_dump_folder(to)
    found = discover(source, run)
    run_id, notes = choose_run(found, source, run)
    dump = found.root.resolve()
    if isinstance(dump, Path) and isinstance(to, Path) and dump in to.resolve().parents:
        raise UsageError(f"{to}: it is inside the dump to copy; choose another destination")
    chosen = _choose_sessions(found, source, run_id, model, ranks)
    damaged = [f.text for f in found.findings_of(run_id) if f.severity == "error"]
    copies = [
        _SessionCopy(*session, steps, Target(to, *session)) for session in chosen if _in_place(*session)
    ]
    damaged += [
        f"{folder / SESSION_FILE}: it states model {info.model!r}, which does not match its folder; "
        f"session left out"
        for folder, info in chosen
        if not _in_place(folder, info)
    ]
    if not copies:
        reason = f"; {damaged[0]}" if damaged else ""
        raise DumpError(f"{source}: no session of run {run_id} can be read{reason}")
    threads = max(storage.requests_at_once(source), storage.requests_at_once(to))
    try:
        touched = [touched for _, touched in ordered_map(_SessionCopy.inspect, copies, threads)]
        if steps is not None and not any(touched):
            raise NotInDumpError(f"{source}: run {run_id} has no segment with these steps")
        readable = [copy for copy in copies if not copy.unreadable]
        _copy_all(readable, to / f"{RUN_PREFIX}{run_and_start(run_id)[0]}", threads, progress)
    except OSError as error:
        raise DumpError(f"{error.filename or to}: {error.strerror or error}") from None
    for copy in sorted(copies, key=lambda copy: not copy.unreadable):
        damaged += copy.damaged
    unsealed = sum(any(map(JOURNAL_PATTERN.fullmatch, copy.files)) for copy in copies)
    if unsealed:
        text = f"{plural(unsealed, 'session')} had a segment that was not sealed yet"
        notes.append(f"{text}; if the run is still being written, run the same copy later to add the rest")
    files = [file for copy in copies for file in copy.files.values()]
    return CopyReport(
        source=str(source),
        to=str(to),
        run_id=run_id,
        models=sorted({copy.info.model for copy in copies}),
        ranks=ranks,
        first_step=None if steps is None else steps[0],
        last_step=None if steps is None or steps[1] >= NO_END else steps[1] - 1,
        sessions=len(readable),
        files=len(files),
        rows=sum(copy.rows.get(name, 0) for copy in copies for name in copy.files),
        bytes=sum(size for size, _ in files),
        files_there=sum(there for _, there in files),
        segments_left_out=sum(copy.left_out for copy in copies),
        damaged=damaged,
        notes=notes,
    )


def _choose_sessions(
    found: Discovery, source: StoragePath, run_id: str, model: str | None, ranks: list[int] | None
) -> list[tuple[StoragePath, SessionInfo]]:
    """The sessions of a run that are of a model and of some ranks. Raises NotInDumpError."""
    sessions = found.sessions(run_id, model)
    if model is not None and not sessions:
        raise NotInDumpError(f"{source}: run {run_id} has no model {model!r}")
    if ranks is None:
        return sessions
    absent = sorted(set(ranks) - {info.ep_rank for _, info in sessions})
    if absent:
        raise NotInDumpError(f"{source}: run {run_id} has no data of rank {', '.join(map(str, absent[:8]))}")
    return [(folder, info) for folder, info in sessions if info.ep_rank in ranks]


def _in_place(folder: StoragePath, info: SessionInfo) -> bool:
    """Whether a session is in its model's folder; else its copy could overwrite another session's."""
    return folder.parent.parent.name == f"{MODEL_PREFIX}{model_slug(info.model)}"


def _copy_all(
    copies: list[_SessionCopy], to: StoragePath, threads: int, progress: Callable[[int, int], None]
) -> None:
    """Copy sessions into the run's folder ``to``. Raises DumpError if a copied file does not stay there."""
    # Mark all sessions first: without some of them, an interrupted copy would look complete.
    for _ in ordered_map(lambda copy: copy.target.begin(), copies, threads):
        pass
    for done, _ in enumerate(ordered_map(_SessionCopy.copy, copies, threads), 1):
        progress(done, len(copies))
    storage.forget_listing(to)
    if copies:
        storage.entries(to)  # in a bucket, one listing of all that is below
    for copy in copies:
        gone = copy.files.keys() - copy.target.names()
        if gone:  # without locks, another copy can remove it
            where = copy.target.folder / min(gone)
            raise DumpError(f"{where}: it was removed during the copy; copy again")


@dataclass
class _SessionCopy:
    """One session on its way from its folder to its target."""

    source: StoragePath
    info: SessionInfo
    steps: tuple[int, int] | None
    target: Target
    #: By name: the bytes of a file that is in the copy now, and whether it was there before.
    files: dict[str, tuple[int, bool]] = field(default_factory=dict)
    #: By name: the rows of a table or a journal.
    rows: dict[str, int] = field(default_factory=dict)
    #: Segments without any of the steps asked for.
    left_out: int = 0
    damaged: list[str] = field(default_factory=list)
    #: Whether nothing of it can be copied.
    unreadable: bool = False
    #: Segments that were thinned since an earlier copy, as the target has them.
    _kept: dict[int, SealedSegment] = field(default_factory=dict)

    def inspect(self) -> bool:
        """Check that it can be copied, before anything is written.

        Returns whether it may have some of the steps asked for. Raises UsageError.
        """
        journals = self._journals()
        try:
            manifest = sound_manifest(self.source, self.info)
        except DamagedManifestError as fault:
            self.damaged.append(f"{fault}; session left out")
            self.unreadable = True
            return True
        self.target.inspect()
        selected = self._select(self._with_finer(manifest))
        self.target.require_extendable(selected)
        return bool(journals) or any(
            "steps" in entry.files or "minutes" in entry.files for entry in selected.entries.values()
        )

    def copy(self) -> None:
        with self.target.held():
            for looks in reversed(range(MAX_LOOKS)):
                known = len(self.damaged)
                if self._copy_listed(retry=looks > 0):
                    break
                # A living writer thinned segments meanwhile: what is left of them is copied.
                del self.damaged[known:]
                self.files, self.rows = {}, {}
            self._copy_session_file()

    def _listed(self) -> set[str]:
        """The names of the files that the source's manifest lists now."""
        storage.forget_listing(self.source)
        manifest = sound_manifest(self.source, self.info)
        return {file.name for entry in manifest.entries.values() for file in entry.files.values()}

    def _with_finer(self, manifest: Manifest) -> Manifest:
        """A manifest in which segments that were thinned stay as an earlier copy has them."""
        there = self.target.listed()
        self._kept = {}
        if there is None:
            return manifest
        entries: dict[int, SealedSegment] = {}
        known = sorted(there.entries)
        for seq, entry in sorted(manifest.entries.items()):
            inside = known[bisect.bisect_left(known, seq) : bisect.bisect_right(known, entry.last_seq)]
            own = {other: there.entries[other] for other in inside}
            count = sum(e.last_seq - e.seq + 1 for e in own.values() if e.last_seq <= entry.last_seq)
            if entry.thinned is not None and count == entry.last_seq - seq + 1 and own != {seq: entry}:
                self._kept |= own
                entries |= own
            else:
                entries[seq] = entry
        return replace(manifest, entries=entries)

    def _copy_listed(self, *, retry: bool) -> bool:
        """Copy what the manifest lists, and the manifest.

        ``retry``: return False, before the manifest, if a file is missing that is no longer listed.
        """
        missing: set[str] = set()
        journals = self._journals()  # before the manifest: one that is sealed in between is missed below
        manifest = self._with_finer(sound_manifest(self.source, self.info))
        self.target.require_extendable(self._select(manifest))
        superseded = {seq for seq, name in journals.items() if self._superseded(name, manifest.entry_of(seq))}
        journals = {seq: name for seq, name in journals.items() if seq not in superseded}
        kept = {seq: name for seq, name in journals.items() if self._take(name, self._verify_journal)}
        if len(kept) < len(journals):
            later = self._manifest_through(journals.keys() - kept.keys(), manifest.end)
            manifest = self._with_finer(later)
        selected = self._select(manifest)
        wanted = set(kept.values())
        for seq, entry in selected.entries.items():
            for table, file in entry.files.items() if seq not in kept else ():
                wanted.add(file.name)
                self.rows[file.name] = file.rows
                if self._kept.get(seq) is entry:
                    self.files[file.name] = file.bytes, True
                elif not self._require(
                    file.name, partial(_verify_table, self.info, entry, table), file.bytes
                ):
                    missing.add(file.name)
        if missing and retry and missing - self._listed():
            return False
        if manifest.end:
            self._take(MANIFEST_FILE, lambda _: None, self._encode(selected))
        self.target.remove_superseded(wanted, selected)
        return True

    def _superseded(self, name: str, entry: SealedSegment | None) -> bool:
        """Whether a journal is only there because a power cut undid its removal."""
        if entry is None:
            return False
        sealed = ParquetSegment(self.source, self.info, entry)
        try:
            with JournalSegment(self.source / name) as journal:
                return sealed.supersedes(journal)
        except (FormatError, FileNotFoundError):
            return sealed.supersedes(None)

    def _copy_session_file(self) -> None:
        try:
            read_session_file(self.source / SESSION_FILE)
        except (FormatError, FileNotFoundError):  # the metadata was taken from other files
            self._take(SESSION_FILE, lambda _: None, dump_json(self.info.to_dict()))
        else:
            self._require(SESSION_FILE, read_session_file)

    def _journals(self) -> dict[int, str]:
        """The names of the journals by the number of their segment, in order."""
        names = (entry.name for entry in storage.entries(self.source))
        return {int(match[1]): match[0] for match in map(JOURNAL_PATTERN.fullmatch, names) if match}

    def _manifest_through(self, segments: Set[int], end: int) -> Manifest:
        """The manifest up to byte ``end``, and beyond through the entries of segments sealed meanwhile.

        Later entries can be of steps that come after the end of a copied journal, and would leave a gap.
        """
        storage.forget_listing(self.source)
        try:
            data = (self.source / MANIFEST_FILE).read_bytes()
        except FileNotFoundError:  # nothing is sealed yet: a journal has no step to copy
            return Manifest()
        for item in frames.scan(io.BytesIO(data), len(data)):
            if isinstance(item, frames.Frame) and item.kind in ("sealed", "thinned"):
                first = item.header["seq"]
                if any(first <= seq <= item.header.get("last_seq", first) for seq in segments):
                    end = max(end, item.end)
        return Manifest.read(io.BytesIO(data), end, self.info.session_id)

    def _select(self, manifest: Manifest) -> Manifest:
        """What the copy's manifest lists: segments that touch the steps, and placements of earlier ones."""
        if self.steps is None:
            return manifest
        first, end = self.steps
        inside = [e for e in manifest.entries.values() if e.first_step < end and e.last_step >= first]
        self.left_out = len(manifest.entries) - len(inside)
        entries = {
            seq: entry if entry.last_step >= first else _placements_only(entry)
            for seq, entry in manifest.entries.items()
            if entry.first_step < end
        }
        return replace(manifest, entries=entries, part=(first, end - 1))

    def _encode(self, part: Manifest) -> bytes:
        """The file for the copy's manifest."""
        if self.steps is None and not self._kept:
            with (self.source / MANIFEST_FILE).open("rb") as file:
                return file.read(part.end)
        out = [frames.encode("session", {"session": self.info.to_dict()})]
        if part.part is not None:
            first, last = part.part
            out.append(frames.encode("part", {"first_step": first, "last_step": last}))
        out += [entry.to_frame() for entry in part.entries.values()]
        if part.closed is not None:
            out.append(frames.encode("closed", part.closed))
        return b"".join(out)

    def _take(
        self,
        name: str,
        verify: Callable[[Path], object],
        content: bytes | None = None,
        size: int | None = None,
    ) -> bool:
        """Copy a file; a damaged one is reported and left out. False if it is gone or has nothing to copy."""
        source = self.source / name
        try:
            self.files[name] = self.target.put(name, source if content is None else content, verify, size)
        except UnbegunJournal:
            return False
        except FormatError as error:
            self.damaged.append(f"{source}: {error}")
        except FileNotFoundError as error:
            if error.filename is not None and str(error.filename) != str(source):
                raise
            return False
        return True

    def _require(self, name: str, verify: Callable[[Path], object], size: int | None = None) -> bool:
        """Copy a file; False if it is missing, which is reported."""
        if self._take(name, verify, size=size):
            return True
        self.damaged.append(f"{self.source / name}: it is missing, although the manifest lists it")
        return False

    def _verify_journal(self, path: Path) -> None:
        with JournalSegment(path) as journal:
            if journal.tail.fault == "damaged":
                raise FormatError(f"damaged from byte {journal.tail.end} on")
            if journal.steps.step.min(initial=NO_END) >= StepRange.of(self.steps).end:
                raise UnbegunJournal("it has no steps to copy")
            layers = 0 if journal.shape is None else journal.shape.num_moe_layers
            rows = len(journal.steps.step), len(journal.load_steps) * layers, len(journal.placements.step)
            self.rows[path.name] = sum(rows)


def _placements_only(entry: SealedSegment) -> SealedSegment:
    """An entry without its steps; placements stay in force after the steps in which they were stated."""
    files = {table: file for table, file in entry.files.items() if table == "placements"}
    thinned = None if entry.thinned is None else replace(entry.thinned, tier=Tier.GONE)
    return replace(entry, shape=None, files=files, sums=None, thinned=thinned)


def _verify_table(info: SessionInfo, entry: SealedSegment, table: str, path: Path) -> None:
    ParquetSegment(path.parent, info, entry).verify(table)
