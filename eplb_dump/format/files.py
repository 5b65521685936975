"""Files that appear under their names only when they are whole, and survive a power cut.

A power cut can undo any rename or removal whose folder was not synced: a removed file can come back, also
empty or shortened. So whatever renames or removes a file of a dump does it here, and syncs the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

#: What file systems answer that cannot sync a folder, or do not let us open it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM})


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, if its file system can. Raises OSError."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and renames are durable enough
        return
    try:
        fsync_file(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def fsync_folders(folder: Path) -> None:
    """Flush a folder's entries and those of all folders above it in its file system. Raises OSError.

    A synced file is lost all the same if the name of a new folder on its path is.
    """
    device = os.stat(folder).st_dev
    for path in (folder, *folder.parents):
        if os.stat(path).st_dev != device:
            break
        fsync_folder(path)


def temporary(path: Path) -> Path:
    """Where a file is written before :func:`publish` renames it; readers ignore such names."""
    return path.with_name(f"{path.name}.tmp")


def publish(*paths: Path) -> None:
    """Rename the synced :func:`temporary` files of ``paths``, all in one folder. Raises OSError."""
    for path in paths:
        os.replace(temporary(path), path)
    fsync_folder(paths[0].parent)


def rename(source: Path, target: Path, *, replace: bool = True, durable: bool = True) -> None:
    """Give a file or folder, which is synced, another name in the same folder.

    Args:
        replace: replace a file of that name.
        durable: sync the folder. A sync can take seconds.

    Raises:
        OSError: FileExistsError if ``replace`` is not set and the name is taken.
    """
    if replace:
        os.replace(source, target)
    else:
        _rename_to_free_name(source, target)
    if durable:
        fsync_folder(target.parent)


def _rename_to_free_name(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # unlike a rename, it fails if the name is taken
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        os.replace(source, target)
    else:
        os.unlink(source)


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two files or folders at once. Raises OSError, also if their file system cannot."""
    import ctypes  # nothing that records needs it

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "this system cannot swap two names")
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(swap)):
        number = ctypes.get_errno()
        text = "its file system cannot swap two names" if number == errno.EINVAL else os.strerror(number)
        raise OSError(number, text, str(one), None, str(other))
    for parent in {one.parent, other.parent}:
        fsync_folder(parent)


def remove(*paths: Path) -> None:
    """Remove files of one folder for good. Raises OSError."""
    for path in paths:
        os.unlink(path)
    fsync_folder(paths[0].parent)


def discard(paths: Iterable[Path]) -> None:
    """Remove leftovers that nobody reads; those that cannot be removed stay."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file, or replace it: other processes see the old content or the new, never a part.

    Args:
        durable: also sync, so that the same holds after a power cut. A sync can take seconds.

    Raises:
        OSError: it cannot be written; a temporary file may be left.
    """
    temporary(path).write_bytes(data)
    if durable:
        fsync_file(temporary(path))
    rename(temporary(path), path, durable=durable)
