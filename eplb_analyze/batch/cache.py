"""Finished work in the folder of ``--save``, from which an interrupted batch resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from eplb_analyze.atomic import remove_leftovers, whole_file
from eplb_analyze.batch.comparison import Postmortem
from eplb_analyze.batch.rows import Row
from eplb_analyze.batch.targets import Target
from eplb_analyze.errors import AnalyzeError, DumpError, UsageError
from eplb_analyze.json_report import versioned
from eplb_analyze.sessions.discovery import discover
from eplb_analyze.sessions.segments import require_regular
from eplb_analyze.storage import path as storage
from eplb_dump.format.schema import MODEL_PREFIX, RUN_PREFIX, FormatError, model_slug
from eplb_dump.format.session import dump_json, load_json

#: Rows of other versions are not used.
VERSION = 12


class ResultCache:
    """A summary of each run that could be read, the rows of complete runs, and the table of all.

    A row's file is named by the content of the run when it was read. It is written last, so a run with a
    kept row is finished. Rows of other runs are not kept: a fault, or the failure to read a file, may be
    gone the next time.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UsageError if the folder cannot be created, or lies in a dump: only writers write there."""
        self.folder = folder
        self._rows, self._reports = folder / "kept", folder / "reports"
        self._keys: dict[Target, str] = {}
        own = [path.resolve() for path in (folder, self._rows, self._reports)]
        for above in (above for path in own for above in (path, *path.parents)):
            if above.name.startswith(RUN_PREFIX) or any(above.glob(f"{RUN_PREFIX}*/{MODEL_PREFIX}*")):
                raise UsageError(f"--save {folder}: it is inside the dump {above}; choose another folder")
        try:
            self._rows.mkdir(parents=True, exist_ok=True)
            self._reports.mkdir(exist_ok=True)
            for path in own:
                remove_leftovers(path)
        except OSError as error:
            raise UsageError(f"--save {folder}: {error.strerror}; choose another folder") from None

    def load(self, target: Target) -> Row | None:
        """The kept row of a run that has not changed since. Call it before the run is read."""
        try:
            self._keys[target] = content_key(target)
            path = self._row_path(target)
            require_regular(path)
            document = load_json(path.read_bytes())
            if document.pop("version") != VERSION:
                return None
            row = Row(**{**document, "series": [(s, n) for s, n in document["series"]]})
        except (OSError, ValueError, TypeError, KeyError, AnalyzeError, FormatError):
            return None
        return row if self.report_path(row, "json").exists() else None

    def store(self, target: Target, row: Row, summary: dict[str, Any] | None) -> None:
        """Keep the summary, if there is one, and the row, if it is complete. Raises DumpError."""
        if summary is not None:
            text = json.dumps(versioned(summary), indent=2)
            _replace(self.report_path(row, "json"), lambda file: file.write(text.encode()))
        if row.status == "complete" and target in self._keys:
            data = dump_json({"version": VERSION, **asdict(row)})
            _replace(self._row_path(target), lambda file: file.write(data))

    def save_table(self, result: Postmortem) -> None:
        """Write ``runs.parquet``, one row for each run. Raises DumpError if it cannot be written."""
        _replace(self.folder / "runs.parquet", result.frame().write_parquet)

    def report_path(self, row: Row, suffix: str) -> Path:
        """The path of a run's report; its name holds a hash, as two dumps can hold runs of one id."""
        identity = [str(storage.absolute(storage.storage_path(row.dump))), row.run_id, row.model]
        name = f"{row.run_id[:80]}-{model_slug(row.model)[:80]}-{_digest(*identity)[:8]}"
        return self._reports / f"{name}.{suffix}"

    def _row_path(self, target: Target) -> Path:
        return self._rows / f"{self._keys[target]}.json"


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file, whole; several batches may do so at once. Raises DumpError."""
    try:
        with whole_file(path, replace=True, durable=False) as file:
            write(file)
    except OSError as error:
        raise DumpError(f"{path}: cannot be written: {error.strerror or error}") from None


def content_key(target: Target) -> str:
    """A hash of the names, sizes and modification times of a run's files.

    Raises OSError, AnalyzeError or KeyError if the run is no longer as it was found.
    """
    dump = storage.storage_path(target.dump)
    found = discover(dump, target.run_id)
    parts: list[Any] = [VERSION, str(storage.absolute(dump))]
    for folder, info in found.runs[target.run_id][target.model]:
        files = [(entry.name, entry.stat(follow_symlinks=False)) for entry in storage.entries(folder)]
        parts += [info.session_id, str(folder), [(n, s.st_size, s.st_mtime_ns) for n, s in files]]
    return _digest(*parts)[:32]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
