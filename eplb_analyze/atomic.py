"""Files and runs that appear whole or not at all, and never overwrite anything unasked."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.files import discard, fsync_folder, fsync_folders, rename
from eplb_dump.format.journal import lock
from eplb_dump.format.schema import LEVEL_PREFIXES, MODEL_PREFIX, RUN_ID_PATTERN, RUN_PREFIX, model_slug


@contextmanager
def whole_file(path: Path, *, replace: bool, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that gets its name only if the block ends without an error.

    Args:
        replace: replace an existing file.
        durable: sync it first, so that it is whole after a power cut, too.

    Raises:
        OSError: it cannot be written; FileExistsError if ``replace`` is not set and there is a file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        rename(temporary, path, replace=replace, durable=durable)
    finally:
        discard([temporary])


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A :func:`whole_file` that a user asked for.

    Raises:
        UsageError: it cannot be written, or appeared meanwhile and ``force`` is not set.
    """
    try:
        with whole_file(path, replace=force) as file:
            yield file
    except FileExistsError as error:
        raise UsageError(f"{error.filename2 or error.filename} is there already") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def require_free(path: Path, *, force: bool, dump: StoragePath) -> None:
    """Check that a file may be written at ``path``, before any work is done for it.

    Raises:
        UsageError: it exists and ``force`` is not set, it is a link or not a regular file, its folder does
            not exist, or it is inside the dump, where only writers write.
    """
    if os.path.lexists(path) and (path.is_dir() or not force):
        what = "is a folder" if path.is_dir() else "is there already; --force replaces it"
        raise UsageError(f"{path} {what}")
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, in whose place no file is put; name what it points to")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or pipe, which no file can take the place of")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    root = dump.resolve()
    while root.name.startswith(LEVEL_PREFIXES):
        root = root.parent
    if isinstance(root, Path) and path.parent.resolve().is_relative_to(root):
        raise UsageError(f"{path} lies in the dump, which stays as it is; name another folder")


def require_dump_folder(to: StoragePath) -> None:
    """Raise UsageError for a place inside a run: what is written there would be part of that run."""
    parts = to.resolve().parts if isinstance(to, Path) else str(to).split("/")
    inside = next((part for part in parts if part.startswith(LEVEL_PREFIXES)), None)
    if inside is not None:
        raise UsageError(f"{to}: it lies inside {inside}; give the dump's folder, in which run=… is made")


#: The folder in which a run is made; readers ignore its name.
UNFINISHED = "new.tmp"
#: In that folder; the process that makes the run holds its lock. Without a holder, it can be removed.
LOCK = "lock"


@dataclass(frozen=True)
class NewRun:
    """Where a run is made. ``root`` is a dump of its own until the run is complete."""

    run_id: str
    root: Path


@contextmanager
def new_run(into: Path, run_id: str | None, base: str, model: str) -> Iterator[NewRun]:
    """A run of one model, which appears in the dump ``into`` if the block ends without an error.

    Unfinished runs that killed processes left in the dump are removed.

    Args:
        run_id: None: ``base``, or ``base-2`` and so on if that exists.

    Raises:
        UsageError: the run exists, or its id is not valid; ``into`` is inside a run.
        DumpError: the folder cannot be written.
    """
    if run_id is not None and not RUN_ID_PATTERN.fullmatch(run_id):
        raise UsageError(f"--run-id: {run_id!r} must be letters, digits, '.', '_' or '-', at most 128")
    require_dump_folder(into)
    try:
        into.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(into)
        run_id, folder = _claim(into, run_id, base)
    except OSError as error:
        raise DumpError(f"{into}: {error.strerror or error}") from None
    new = NewRun(run_id, folder / UNFINISHED)
    with ExitStack() as held:
        try:
            _begin(new.root, held)
            yield new
            name = f"{MODEL_PREFIX}{model_slug(model)}"
            made = new.root / f"{RUN_PREFIX}{run_id}" / name
            for inside, _, _ in os.walk(made):  # the files are synced
                fsync_folder(Path(inside))
            rename(made, folder / name)
            fsync_folders(folder)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise DumpError(f"{folder}: {error.strerror or error}") from None
            raise
    shutil.rmtree(new.root, ignore_errors=True)


def _begin(root: Path, held: ExitStack) -> None:
    """Make the folder in which the run is made; it is locked before it has its name."""
    hidden = root.with_name(f"{secrets.token_hex(4)}.{UNFINISHED}")
    hidden.mkdir()
    file = held.enter_context((hidden / LOCK).open("wb"))
    if not lock(file.fileno()):  # no locks on this file system
        file.close()
    rename(hidden, root, durable=False)


def _remove_abandoned(into: Path) -> None:
    """Remove what killed processes left. Without locks they cannot be recognized, and it stays."""
    for root in into.glob(f"{RUN_PREFIX}*/{UNFINISHED}"):
        if root.parent.is_symlink() or root.is_symlink():
            continue
        with suppress(OSError), (root / LOCK).open("r+b") as file:
            # Another process may have removed it since, and a third may have made it again.
            if lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), (root / LOCK).stat()):
                shutil.rmtree(root)
                root.parent.rmdir()  # fails if a model is in it: the process was killed after it had finished


def _claim(into: Path, run_id: str | None, base: str) -> tuple[str, Path]:
    """Make the run's folder; its id and path."""
    numbered = (base + (f"-{number}" if number > 1 else "") for number in range(1, 1000))
    for name in numbered if run_id is None else [run_id]:
        folder = into / f"{RUN_PREFIX}{name}"
        with suppress(FileExistsError):
            folder.mkdir()
            return name, folder
    if run_id is not None:
        raise UsageError(f"{folder}: it is there already; choose another --run-id")
    raise FileExistsError(17, "no name for a run is free")
