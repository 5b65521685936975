"""Files and runs that appear whole or not at all, and never overwrite anything unasked.

What is not whole yet has a temporary name, and its process holds a lock on it: a file's own lock, or that of
the file ``lock`` in a folder. A temporary name that nobody has locked is what a killed process left. The next
process that writes into the same folder removes it. Without locks, as on some network file systems, leftovers
cannot be told from work in progress, and stay.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.files import discard, fsync_folder, fsync_folders, rename
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import lock
from eplb_dump.format.schema import LEVEL_PREFIXES, RUN_ID_PATTERN, RUN_PREFIX

#: Temporary names begin with a dot and end in this.
TEMPORARY = ".eplb.tmp"
#: The file in a temporary folder whose lock the folder's process holds.
LOCK = "lock"


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is not whole yet."""
    return name.startswith(".") and name.endswith(TEMPORARY)


def hold(folder: Path, held: ExitStack) -> bool | None:
    """Make a temporary folder, or take over what a killed process left, and lock it until ``held`` ends.

    Returns True; False if another process holds it; None if its file system has no locks. Raises OSError.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("ab")
        except (FileExistsError, FileNotFoundError):
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue  # another process has just removed the folder
        taken = lock(file.fileno())
        with suppress(FileNotFoundError):
            if taken and os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                held.enter_context(file)
                return True
        file.close()
        if not taken:
            return taken


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder."""
    with suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            if is_temporary(entry.name) and not entry.is_symlink():
                with suppress(OSError):
                    _remove_if_abandoned(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_if_abandoned(path: Path, is_folder: bool) -> None:
    locked = path / LOCK if is_folder else path
    try:
        fd = os.open(locked, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        os.rmdir(path)  # an empty folder: its process was killed before it could lock it
        return
    try:
        # Another process may have removed it since, and a third may have made it again.
        if lock(fd) and os.path.samestat(os.fstat(fd), os.lstat(locked)):
            if is_folder:
                remove_held(path)
            else:
                os.unlink(path)
    finally:
        os.close(fd)


def remove_held(folder: Path) -> None:
    """Remove a folder that this process holds. Raises OSError."""
    clear(folder)
    (folder / LOCK).unlink(
        missing_ok=True
    )  # last, so that whoever finds the rest can tell that it is abandoned
    folder.rmdir()


def clear(folder: Path) -> None:
    """Remove all but the lock from a folder that this process holds. Raises OSError."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder below the system's temporary folder, for files of this process. Raises OSError."""
    parent = Path(tempfile.gettempdir())
    remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=TEMPORARY, dir=parent))
    with ExitStack() as held:
        hold(folder, held)
        try:
            yield folder
        finally:
            with suppress(OSError):
                remove_held(folder)


@contextmanager
def whole_file(path: Path, *, replace: bool, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that gets its name only if the block ends without an error.

    Args:
        replace: replace an existing file.
        durable: sync it first, so that it is whole after a power cut, too.

    Raises:
        OSError: it cannot be written; FileExistsError if ``replace`` is not set and there is a file.
    """
    with ExitStack() as opened:
        temporary, file, locked = _temporary_file(path, opened)
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if not locked:
                file.close()  # some systems do not rename an open file; a locked one would seem abandoned
            rename(temporary, path, replace=replace, durable=durable)
        finally:
            discard([temporary])


def _temporary_file(path: Path, opened: ExitStack) -> tuple[Path, IO[bytes], bool]:
    """A new temporary file beside ``path``, and whether it is locked. Raises OSError."""
    while True:
        temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{TEMPORARY}")
        file = temporary.open("xb")
        locked = lock(file.fileno())
        # If another process took it for abandoned before it was locked, it is gone.
        if locked is None or (locked and os.fstat(file.fileno()).st_nlink):
            return temporary, opened.enter_context(file), bool(locked)
        file.close()


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A :func:`whole_file` that a user asked for. What killed processes left in its folder is removed.

    Raises:
        UsageError: it cannot be written, or appeared meanwhile and ``force`` is not set.
    """
    remove_leftovers(path.parent)
    try:
        with whole_file(path, replace=force) as file:
            yield file
    except FileExistsError as error:
        raise UsageError(f"{error.filename2 or error.filename}: already exists") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from None


def require_free(path: Path, *, force: bool, dump: StoragePath) -> None:
    """Check that a file may be written at ``path``, before any work is done for it.

    Raises:
        UsageError: it exists and ``force`` is not set, it is a link or not a regular file, its folder does
            not exist, or it is inside the dump, where only writers write.
    """
    if os.path.lexists(path) and (path.is_dir() or not force):
        what = "is a folder" if path.is_dir() else "already exists; pass --force to replace it"
        raise UsageError(f"{path} {what}")
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, which is not replaced; pass its target")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or pipe, which cannot be replaced; choose a file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    root = dump.resolve()
    while root.name.startswith(LEVEL_PREFIXES):
        root = root.parent
    if isinstance(root, Path) and path.parent.resolve().is_relative_to(root):
        raise UsageError(f"{path} is inside the dump, which is never changed; choose another folder")


def require_dump_folder(to: StoragePath) -> None:
    """Raise UsageError for a place inside a run: what is written there would be part of that run."""
    parts = to.resolve().parts if isinstance(to, Path) else str(to).split("/")
    inside = next((part for part in parts if part.startswith(LEVEL_PREFIXES)), None)
    if inside is not None:
        raise UsageError(
            f"{to}: it is inside {inside}; pass the folder of the dump, in which run=… will be created"
        )


@frozen
class NewRun:
    """Where a run is made. ``root`` is a dump of its own until the run is complete."""

    run_id: str
    root: Path


@contextmanager
def new_run(into: Path, run_id: str | None, base: str) -> Iterator[NewRun]:
    """A run, which appears in the dump ``into`` if the block ends without an error.

    Unfinished runs that killed processes left in the dump are removed.

    Args:
        run_id: None: ``base``, or ``base-2`` and so on if that exists.

    Raises:
        UsageError: the run exists or is being made, or its id is not valid; ``into`` is inside a run.
        DumpError: the folder cannot be written.
    """
    if run_id is not None and not RUN_ID_PATTERN.fullmatch(run_id):
        raise UsageError(f"--run-id: {run_id!r} must be at most 128 letters, digits, '.', '_' or '-'")
    require_dump_folder(into)
    where = into
    with ExitStack() as held:
        try:
            into.mkdir(parents=True, exist_ok=True)
            remove_leftovers(into)
            run_id, temporary, locked = _claim(into, run_id, base, held)
            where = into / f"{RUN_PREFIX}{run_id}"
            # Without locks, another process can have claimed the same name.
            root = temporary / secrets.token_hex(4)
            try:
                root.mkdir()
                yield NewRun(run_id, root)
                _publish(root / where.name, where)
            finally:
                _abandon(temporary, root, locked)
        except OSError as error:
            raise DumpError(f"{where}: {error.strerror or error}") from None


def _claim(into: Path, run_id: str | None, base: str, held: ExitStack) -> tuple[str, Path, bool]:
    """A free id; the temporary folder that claims it, empty; and whether the folder is locked."""
    numbered = (base + (f"-{number}" if number > 1 else "") for number in range(1, 1000))
    for name in numbered if run_id is None else [run_id]:
        folder = into / f"{RUN_PREFIX}{name}"
        reason = "it already exists"
        if not os.path.lexists(folder):
            temporary = into / f".{RUN_PREFIX}{name}{TEMPORARY}"
            locked = hold(temporary, held)
            if locked is None:
                return name, temporary, False
            if locked and not os.path.lexists(folder):
                clear(temporary)
                return name, temporary, True
            if locked:  # another process has just completed it
                remove_held(temporary)
            else:
                reason = "another process is creating it"
        if run_id is not None:
            raise UsageError(f"{folder}: {reason}; choose another --run-id")
    raise FileExistsError(errno.EEXIST, "no run id is free", str(into))


def _publish(made: Path, run: Path) -> None:
    """Give a run, whose files are synced, its name. Raises OSError, UsageError."""
    for inside, _, _ in os.walk(made):
        fsync_folder(Path(inside))
    if os.path.lexists(run):  # also an empty folder, which a rename would replace
        raise UsageError(f"{run}: another program has just created it; choose another --run-id")
    rename(made, run)
    fsync_folders(run.parent)


def _abandon(temporary: Path, root: Path, locked: bool) -> None:
    """Remove the temporary folder of a run; what is not removed stays for the next process."""
    with suppress(OSError):
        if locked:
            remove_held(temporary)
        else:
            shutil.rmtree(root, ignore_errors=True)
            (temporary / LOCK).unlink(missing_ok=True)
            temporary.rmdir()
