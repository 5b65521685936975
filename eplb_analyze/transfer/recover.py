"""`seal`: seal the journals of crashed writers. Only this changes an existing dump, on request."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import Report
from eplb_analyze.reader.choose import choose_run
from eplb_analyze.reader.discovery import discover
from eplb_analyze.storage.path import StoragePath, local
from eplb_dump.format.journal import UnbegunJournal, lock
from eplb_dump.format.schema import JOURNAL_PATTERN, FormatError
from eplb_dump.format.segment import seal

#: Without file locks, a journal that was written to in this time may be in use.
QUIET_SECONDS = 600.0


@dataclass(frozen=True)
class SealedJournal:
    journal: str
    seq: int
    first_step: int | None
    last_step: int | None
    journal_bytes: int
    sealed_bytes: int


@dataclass(frozen=True)
class SkippedJournal:
    journal: str
    #: ``in_use``, ``damaged`` or ``failed``.
    code: str
    reason: str


@dataclass(frozen=True)
class SealReport(Report):
    sealed: list[SealedJournal]
    skipped: list[SkippedJournal]


def seal_dump(path: StoragePath, run: str | None = None, model: str | None = None) -> SealReport:
    """Seal the journals of crashed writers, in all runs and models or in the ones given.

    A writer holds its journal's lock as long as it lives, on any host. If the file system has no locks, a
    journal that was written to in the last ten minutes counts as in use.

    Raises:
        DumpError, NotInDumpError: there is no such dump, run or model.
        UsageError: it is in a bucket.
    """
    path = local(path, "`seal`")
    found = discover(path)
    named = None if run is None else found.starts_of(run) or [choose_run(found, path, run)[0]]
    runs = found.newest_first() if named is None else named
    sessions = [session for run_id in runs for session in found.sessions(run_id, model)]
    if model is not None and not sessions:
        raise NotInDumpError(f"{path}: no model {model!r} in it")
    report = SealReport([], [])
    for folder, _ in sessions:
        for journal in sorted(local(folder, "`seal`").iterdir()):
            if JOURNAL_PATTERN.fullmatch(journal.name) and not journal.is_symlink():
                _seal_one(journal, report)
    return report


def _seal_one(journal: Path, report: SealReport) -> None:
    try:
        with journal.open("r+b") as file:
            locked = lock(file.fileno())
            size = os.fstat(file.fileno()).st_size
            quiet = time.time() - os.fstat(file.fileno()).st_mtime > QUIET_SECONDS
            if locked is False or (locked is None and not quiet):
                report.skipped.append(SkippedJournal(str(journal), "in_use", "its writer is alive"))
                return
            entry = seal(journal)
    except FileNotFoundError:  # sealed meanwhile
        return
    except UnbegunJournal:  # killed at its first write: it has no step
        return
    except FormatError as error:
        report.skipped.append(SkippedJournal(str(journal), "damaged", str(error)))
    except OSError as error:
        report.skipped.append(SkippedJournal(str(journal), "failed", error.strerror or str(error)))
    else:
        seq = int(journal.stem.split("-")[1])
        first, last = (None, None) if entry is None else (entry.first_step, entry.last_step)
        sealed = 0 if entry is None else sum(f.bytes for f in entry.files.values())
        report.sealed.append(SealedJournal(str(journal), seq, first, last, size, sealed))
