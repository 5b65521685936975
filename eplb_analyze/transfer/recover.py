"""`recover`: complete what crashed writers left. Only this changes an existing dump, on request.

It seals journals, and undoes what a power cut undid: files that were not renamed yet, journals that came back
although their segment is sealed, a ``session.json`` that is empty. It writes a manifest that is gone again.
Nothing gets fewer steps by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import BinaryIO

from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import Report
from eplb_analyze.reader.choose import choose_run
from eplb_analyze.sessions.discovery import discover
from eplb_analyze.sessions.metadata import rebuilt_manifest
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import read_manifest
from eplb_analyze.storage.path import StoragePath, local
from eplb_dump.format.files import publish, remove, temporary
from eplb_dump.format.frames import encode
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import JournalSegment, UnbegunJournal, lock
from eplb_dump.format.manifest import Manifest, ManifestFile, SealedSegment
from eplb_dump.format.retention import remove_leftovers
from eplb_dump.format.schema import JOURNAL_PATTERN, MANIFEST_FILE, SESSION_FILE, FormatError
from eplb_dump.format.segment import seal
from eplb_dump.format.session import SessionInfo, write_session_file

#: Without file locks, a journal that was written to in this time may be in use.
QUIET_SECONDS = 600.0


@frozen
class SealedJournal:
    journal: str
    #: The number of the segment.
    seq: int
    first_step: int | None
    last_step: int | None
    #: Bytes of the journal.
    journal_bytes: int
    #: Bytes of the Parquet files made of it.
    sealed_bytes: int


@frozen
class SkippedJournal:
    journal: str
    #: ``in_use``, ``damaged`` or ``failed``.
    code: str
    reason: str


@frozen
class RecoverReport(Report):
    #: Journals that became Parquet files.
    sealed: list[SealedJournal] = field(default_factory=list)
    #: Journals that were left as they are.
    skipped: list[SkippedJournal] = field(default_factory=list)
    #: Journals whose segment was sealed already, with all steps, and what came back of thinned segments.
    removed: list[str] = field(default_factory=list)
    #: Sealed files that got their names, and ``session.json`` files and manifests written from other files.
    restored: list[str] = field(default_factory=list)


def recover_dump(path: StoragePath, run: str | None = None, model: str | None = None) -> RecoverReport:
    """Seal the journals of crashed writers, in all runs and models or in the ones given.

    A writer holds its journal's lock as long as it lives, on any host. If the file system has no locks, a
    journal that was written to in the last ten minutes counts as in use.

    Raises:
        DumpError, NotInDumpError: there is no such dump, run or model.
        UsageError: it is in a bucket.
    """
    path = local(path, "`recover`")
    found = discover(path)
    named = None if run is None else found.starts_of(run) or [choose_run(found, path, run)[0]]
    runs = found.newest_first() if named is None else named
    sessions = [session for run_id in runs for session in found.sessions(run_id, model)]
    if model is not None and not sessions:
        raise NotInDumpError(f"{path}: it has no model {model!r}")
    report = RecoverReport()
    for folder, info in sessions:
        _seal_session(local(folder, "`recover`"), info, report, rebuilt=folder in found.rebuilt)
    return report


def _seal_session(folder: Path, info: SessionInfo, report: RecoverReport, *, rebuilt: bool) -> None:
    names = sorted(path.name for path in folder.iterdir() if not path.is_symlink())
    journals = {int(match[1]): folder / match[0] for match in map(JOURNAL_PATTERN.fullmatch, names) if match}
    if rebuilt:
        try:
            write_session_file(folder, info)
            report.restored.append(str(folder / SESSION_FILE))
        except OSError as error:
            _failed(report, folder / SESSION_FILE, error)
    try:
        manifest = read_manifest(folder, info)
    except FormatError:  # sealing a journal reports it
        manifest = Manifest()
    try:
        if not (folder / MANIFEST_FILE).exists() and not any(map(_in_use, journals.values())):
            manifest = rebuilt_manifest(folder, info)
            file = ManifestFile(folder)
            for entry in manifest.entries.values():
                file.append(info, entry)
            report.restored.extend([str(folder / MANIFEST_FILE)] * bool(manifest.entries))
    except OSError as error:
        _failed(report, folder / MANIFEST_FILE, error)
    listed = manifest.entries
    for seq in sorted({*journals, *listed}):
        if seq in journals:
            _seal_one(journals[seq], info, manifest, report)
            continue
        try:
            _publish(folder, info, listed[seq], report)
        except OSError as error:
            _failed(report, folder / next(file.name for file in listed[seq].files.values()), error)
    # A living writer may be thinning.
    if any(entry.thinned for entry in listed.values()) and not any(map(_in_use, _there(journals.values()))):
        try:
            remove_leftovers(folder, info)
        except (OSError, FormatError) as error:
            _failed(report, folder / MANIFEST_FILE, error)
        report.removed.extend(str(folder / name) for name in names if not (folder / name).exists())
        report.removed[:] = dict.fromkeys(report.removed)


def _there(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.exists()]


def _publish(folder: Path, info: SessionInfo, entry: SealedSegment, report: RecoverReport) -> None:
    """Give the files of a listed segment their names if a power cut came before that. Raises OSError."""
    waiting = {
        table: file
        for table, file in entry.files.items()
        if not (folder / file.name).exists() and temporary(folder / file.name).is_file()
    }
    unnamed = {table: replace(file, name=temporary(Path(file.name)).name) for table, file in waiting.items()}
    if (
        waiting
        and not ParquetSegment(folder, info, replace(entry, files={**entry.files, **unnamed})).damage()
    ):
        publish(*(folder / file.name for file in waiting.values()))
        report.restored.extend(str(folder / file.name) for file in waiting.values())


def _keep_closed(path: Path) -> None:
    """Mark a session in its manifest as closed if its journal is. Raises as `recover`."""
    with suppress(UnbegunJournal), JournalSegment(path) as journal:
        if journal.closed is not None:
            ManifestFile(path.parent).append(journal.info, encode("closed", journal.closed))


def _failed(report: RecoverReport, path: Path, error: OSError | FormatError) -> None:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    report.skipped.append(SkippedJournal(str(path), "failed", text))


def _written_to(file: BinaryIO) -> bool:
    """Whether a writer uses an open journal. If not, it is locked for as long as the file is open."""
    locked = lock(file.fileno())
    quiet = time.time() - os.fstat(file.fileno()).st_mtime > QUIET_SECONDS
    return locked is False or (locked is None and not quiet)


def _in_use(journal: Path) -> bool:
    with journal.open("r+b") as file:
        return _written_to(file)


def _seal_one(journal: Path, info: SessionInfo, manifest: Manifest, report: RecoverReport) -> None:
    seq = int(journal.stem.split("-")[1])
    listed = manifest.entry_of(seq)
    try:
        with journal.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if _written_to(file):
                report.skipped.append(SkippedJournal(str(journal), "in_use", "its writer is alive"))
                return
            if listed is not None and listed.thinned is not None:
                remove(journal)
                report.removed.append(str(journal))
                return
            if manifest.closed is None:
                _keep_closed(journal)
            if listed is not None:
                _publish(journal.parent, info, listed, report)
                if listed.step_rows and not ParquetSegment(journal.parent, info, listed).damage():
                    remove(journal)
                    report.removed.append(str(journal))
                    return
            entry = seal(journal)
    except FileNotFoundError:  # sealed meanwhile
        return
    except UnbegunJournal:  # killed at its first write: it has no step
        return
    except FormatError as error:
        report.skipped.append(SkippedJournal(str(journal), "damaged", str(error)))
    except OSError as error:
        _failed(report, journal, error)
    else:
        first, last = (None, None) if entry is None else (entry.first_step, entry.last_step)
        sealed = 0 if entry is None else sum(f.bytes for f in entry.files.values())
        report.sealed.append(SealedJournal(str(journal), seq, first, last, size, sealed))
