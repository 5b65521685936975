"""A file or a run appears whole or not at all, and nothing is written over."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from eplb_analyze.errors import DumpError, ExportError, UsageError
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.journal import lock
from eplb_dump.format.schema import LEVEL_PREFIXES, MODEL_PREFIX, RUN_ID_PATTERN, RUN_PREFIX, model_slug


def require_free(path: Path, *, force: bool, dump: StoragePath) -> None:
    """Check that a file may be written there, before any work is done for it.

    Raises:
        ExportError: there is one already and ``force`` is not said, it is a link, its folder is not there,
            or it lies in the dump, in which nothing but its writers writes.
    """
    if os.path.lexists(path) and (path.is_dir() or not force):
        what = "is a folder" if path.is_dir() else "is there already; --force replaces it"
        raise ExportError(f"{path} {what}")
    if path.is_symlink():
        raise ExportError(f"{path} is a symbolic link, in whose place no file is put; name what it points to")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path} is a device or pipe, which no file can take the place of")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: there is no folder {path.parent}")
    root = dump.resolve()
    while root.name.startswith(("run=", "model=", "rank=", "session=")):
        root = root.parent
    if isinstance(root, Path) and path.parent.resolve().is_relative_to(root):
        raise ExportError(f"{path} lies in the dump, which stays as it is; name another folder")


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A binary file that has its name only when the block has ended without an error.

    Raises:
        ExportError: it cannot be written, or somebody else made one of that name meanwhile.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, force)
    except FileExistsError as error:
        raise ExportError(f"{error.filename2 or error.filename} is there already") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if not force:
        try:
            os.link(temporary, path)  # fails where a file of that name has come meanwhile
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if os.path.lexists(path):
                raise FileExistsError(17, "exists", str(path)) from None
    os.replace(temporary, path)


#: What is being written; readers look for other names.
UNFINISHED = "new.tmp"
#: In it: its process holds the lock of this file, so that what a dead one left is told from a living one's.
LOCK = "lock"


@dataclass(frozen=True)
class NewRun:
    """Where a run is made: ``root`` is a dump of its own until it is whole."""

    run_id: str
    root: Path


@contextmanager
def new_run(into: Path, run_id: str | None, base: str, model: str) -> Iterator[NewRun]:
    """A run of one model, which is in the dump ``into`` when the block has ended without an error.

    What killed processes left in the dump of their new runs is removed.

    Args:
        run_id: its name; None: ``base``, or where that is there already ``base-2`` and so on.

    Raises:
        UsageError: the run is there already, or its name is none; ``into`` lies inside a run.
        DumpError: the folder cannot be written.
    """
    if run_id is not None and not RUN_ID_PATTERN.fullmatch(run_id):
        raise UsageError(f"--run-id: {run_id!r} must be letters, digits, '.', '_' or '-', at most 128")
    inside = next((part for part in into.resolve().parts if part.startswith(LEVEL_PREFIXES)), None)
    if inside is not None:
        raise UsageError(f"{into}: it lies inside {inside}; give the dump's folder, in which run=… is made")
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
            os.rename(new.root / f"{RUN_PREFIX}{run_id}" / name, folder / name)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DumpError(f"{folder}: {error.strerror or error}") from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(new.root, ignore_errors=True)


def _begin(root: Path, held: ExitStack) -> None:
    """Make the folder of what is being written, whose lock is ``held`` as soon as it has its name."""
    hidden = root.with_name(f"{secrets.token_hex(4)}.{UNFINISHED}")
    hidden.mkdir()
    file = held.enter_context((hidden / LOCK).open("wb"))
    if not lock(file.fileno()):  # there are none on this file system, or this system
        file.close()
    os.rename(hidden, root)


def _remove_abandoned(into: Path) -> None:
    """Remove what dead processes left; where there are no locks, nobody can tell, and it stays."""
    for root in into.glob(f"{RUN_PREFIX}*/{UNFINISHED}"):
        if root.parent.is_symlink() or root.is_symlink():
            continue
        with suppress(OSError), (root / LOCK).open("r+b") as file:
            # Another may have removed it since, and a living one may have made it anew.
            if lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), (root / LOCK).stat()):
                shutil.rmtree(root)
                root.parent.rmdir()  # unless a model is in it: it was killed when that was whole


def _claim(into: Path, run_id: str | None, base: str) -> tuple[str, Path]:
    if run_id is not None:
        folder = into / f"{RUN_PREFIX}{run_id}"
        try:
            folder.mkdir()
        except FileExistsError:
            raise UsageError(f"{folder}: it is there already; choose another --run-id") from None
        return run_id, folder
    for number in range(1, 1000):
        run_id = base + (f"-{number}" if number > 1 else "")
        folder = into / f"{RUN_PREFIX}{run_id}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return run_id, folder
    raise FileExistsError(17, "no name for a run is free")
