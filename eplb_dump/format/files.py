"""Files that appear under their names only when they are whole, and survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, so that renames in it are durable. Raises OSError."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames are durable enough
        fsync_file(path)


def temporary(path: Path) -> Path:
    """Where a file is written before :func:`publish` renames it; readers ignore such names."""
    return path.with_name(f"{path.name}.tmp")


def publish(*paths: Path) -> None:
    """Rename the synced :func:`temporary` files of ``paths``, all in one folder. Raises OSError."""
    for path in paths:
        os.replace(temporary(path), path)
    fsync_folder(paths[0].parent)


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
        publish(path)
    else:
        os.replace(temporary(path), path)
