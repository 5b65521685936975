"""The runs of a batch: what lies below the folders, buckets and globs that a user names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from eplb_analyze.atomic import is_temporary
from eplb_analyze.batch.rows import Row, broken_row
from eplb_analyze.errors import AnalyzeError
from eplb_analyze.sessions.discovery import discover
from eplb_analyze.storage import path as storage
from eplb_analyze.storage.bucket import UnreachableError
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import LEVEL_PREFIXES, RUN_PREFIX


@frozen
class Target:
    """One run of one model in a dump."""

    dump: str
    run_id: str
    model: str


#: A run of a model with the folders of its sessions; or the row of what cannot be read, with no folder.
_Found = tuple[Target | Row, frozenset[str]]


def find(names: Iterable[str]) -> Iterator[Target | Row]:
    """All runs and models below folders or globs of folders, each once; a row for what cannot be read.

    A name is that of a dump, a part of one, or a folder with dumps at any depth; on this machine or in a
    bucket. Raises UsageError if a name is malformed.
    """
    seen: set[frozenset[str]] = set()
    for pattern in names:
        try:
            folders = storage.expand_globs(pattern)
        except UnreachableError as error:
            yield broken_row(pattern, "", "", str(error))
            continue
        if not folders:
            yield broken_row(pattern, "", "", f"{pattern}: no folder matches")
        for name in folders:
            top = storage.storage_path(name)
            empty = True
            for run, sessions in _below(top, name):
                empty = False
                if not sessions or sessions not in seen:
                    yield run
                seen.add(sessions)
            if empty:
                yield broken_row(name, "", "", _fault(top) or f"{name}: no run in it")


def _below(top: StoragePath, name: str) -> Iterator[_Found]:
    """The runs in a folder, at any depth, without following symbolic links."""
    # Each folder with its name, and the name of its dump if it is a run.
    waiting = [(top, name, name)]
    while waiting:
        folder, text, dump = waiting.pop()
        own_name = storage.absolute(folder).name
        run_id = own_name.removeprefix(RUN_PREFIX) if own_name.startswith(RUN_PREFIX) else ""
        fault = None
        if own_name.startswith(LEVEL_PREFIXES):
            try:
                yield from _runs(folder, dump)
                continue
            except AnalyzeError as error:
                fault = str(error)  # unless an unrelated folder only has such a name
        try:
            inside = [
                entry.name
                for entry in storage.entries(folder)
                if entry.is_dir(follow_symlinks=False) and not is_temporary(entry.name)
            ]
        except (OSError, UnreachableError) as error:
            if folder is not top:
                reason = f"{folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
                yield broken_row(dump, run_id, "", reason), frozenset()
            continue
        if fault is not None and (not inside or any(name.startswith(LEVEL_PREFIXES) for name in inside)):
            if folder is not top:
                yield broken_row(dump, run_id, "", fault), frozenset()
            continue
        for inner in reversed(inside):
            if not isinstance(folder, Path) and "?" in inner:
                reason = f"{folder / inner}: its name contains a ?, which an address cannot contain"
                yield broken_row(text, "", "", reason), frozenset()
                continue
            below = storage.join(text, inner)
            waiting.append((folder / inner, below, text if inner.startswith(RUN_PREFIX) else below))


def _runs(folder: StoragePath, dump: str) -> Iterator[_Found]:
    for run_id, models in sorted(discover(folder).runs.items()):
        for model, sessions in sorted(models.items()):
            # Resolved, because a glob can reach one folder by several links.
            folders = frozenset(str(session.resolve()) for session, _ in sessions)
            yield Target(dump, run_id, model), folders


def _fault(folder: StoragePath) -> str | None:
    """Why no run can be read in a folder."""
    try:
        discover(folder)
    except AnalyzeError as error:
        return str(error)
    return None
