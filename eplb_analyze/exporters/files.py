"""A new file, whole or not at all, in place of nothing that was there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from eplb_analyze.exporters import ExportError
from eplb_analyze.places import Place


def require_free(path: Path, *, force: bool, dump: Place) -> None:
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
