"""Storage paths: a local folder, or a prefix of a bucket (``s3://``, ``gs://``).

A folder is a :class:`pathlib.Path`. A prefix is a :class:`Remote`, which has the methods of a path that
reading a dump needs, and reads only the ranges asked for. A bucket is listed once, so that a reader sees it
as of one moment. Nothing here knows what the files mean.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar
from urllib.parse import parse_qsl

from eplb_analyze.errors import UsageError
from eplb_analyze.storage.bucket import OPTIONS, Bucket, Entry, Remote
from eplb_dump.format.frozen import frozen

#: Concurrent requests, which mostly wait for the network.
MAX_REQUESTS = 8

P = TypeVar("P", bound="StoragePath")


class StoragePath(Protocol):
    """The methods of a path that readers use. :class:`pathlib.Path` has them all."""

    @property
    def name(self) -> str: ...
    @property
    def parent(self: P) -> P: ...
    def __truediv__(self: P, name: str, /) -> P: ...
    def exists(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def stat(self) -> os.stat_result: ...
    def lstat(self) -> os.stat_result: ...
    def open(self, mode: Literal["rb"], /) -> BinaryIO: ...
    def read_bytes(self) -> bytes: ...
    def resolve(self: P) -> P: ...


def storage_path(where: str | os.PathLike[str] | StoragePath) -> StoragePath:
    """The storage path of a local path or an address.

    An address may end in options: ``s3://bucket/dumps?region=eu-west-1``. Raises UsageError if it is
    invalid.
    """
    if not isinstance(where, str | os.PathLike):
        return where
    text = os.fspath(where)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if match is None:
        return Path(where)
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme not in OPTIONS:
        raise UsageError(f"{scheme}:// is not supported; a dump is a folder, s3://… or gs://…")
    if "@" in rest.split("/")[0]:
        # Credentials would show in messages and in the list of processes.
        raise UsageError(
            f"{scheme}://…@…: an address must not contain credentials; see docs/operate/storage.md"
        )
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS[scheme]:
            known = ", ".join(OPTIONS[scheme])
            raise UsageError(f"{scheme}://{path}: no option {name!r}; the options are: {known}")
    bucket, _, key = path.partition("/")
    if not bucket:
        raise UsageError(f"{text}: it names no bucket")
    return Remote(Bucket(scheme, bucket, options), "/".join(part for part in key.split("/") if part))


def local(where: StoragePath | str, what: str) -> Path:
    """Require a local path, the only kind that ``what`` works with. Raises UsageError."""
    where = storage_path(where)
    if isinstance(where, Path):
        return where
    raise UsageError(f"{where}: {what} needs a local folder; `copy` copies runs from and to buckets")


def absolute(where: StoragePath) -> StoragePath:
    return Path(os.path.abspath(where)) if isinstance(where, Path) else where


def full_text(where: StoragePath) -> str:
    """A path as a user has to write it: a folder, or an address with its options."""
    return where.address if isinstance(where, Remote) else str(where)


def join(text: str, name: str) -> str:
    """The text of the path ``name`` in the folder ``text``."""
    if "://" not in text:
        return os.path.join(text, name)
    path, mark, query = text.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def expand_globs(text: str) -> list[str]:
    """The folders that match a pattern; an existing folder with such a name matches itself only.

    Raises UsageError, UnreachableError.
    """
    if not glob.has_magic(text) or storage_path(text).exists():
        return [text]
    if "://" not in text:
        return sorted(glob.glob(text))
    path, mark, query = text.partition("?")
    parts = path.split("/")
    fixed = next((i for i, part in enumerate(parts) if i > 2 and glob.has_magic(part)), len(parts))
    found = [(storage_path("/".join(parts[:fixed]) + mark + query), "/".join(parts[:fixed]))]
    for pattern in parts[fixed:]:
        found = [
            (folder / entry.name, f"{name}/{entry.name}")
            for folder, name in found
            for entry in entries(folder)
            if entry.is_dir(follow_symlinks=False) and fnmatch.fnmatchcase(entry.name, pattern)
        ]
    return [name + mark + query for _, name in found]


def entries(folder: StoragePath, only: str | None = None) -> Sequence[Entry]:
    """The entries of a folder ordered by name, or ``only`` the one of this name, without listing the others.

    Raises OSError, UnreachableError.
    """
    if isinstance(folder, Remote):
        return folder.entries() if only is None else folder.folder(only)
    assert isinstance(folder, Path)
    if only is not None:
        return _LocalEntry.of(folder, only)
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


@frozen
class _LocalEntry:
    """One entry of a local folder, which was not listed: that takes as long as the folder has entries."""

    name: str
    path: str
    _stat: os.stat_result

    @classmethod
    def of(cls, folder: Path, name: str) -> list[_LocalEntry]:
        """The entry of this name, if there is one. Raises OSError."""
        path = os.path.join(folder, name)
        if name in ("", ".", "..") or os.path.basename(name) != name:
            return []
        try:
            return [cls(name, path, os.lstat(path))]
        except ValueError:  # no file can have such a name
            return []
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return []
            raise

    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self._stat.st_mode)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return stat.S_ISDIR(self.stat(follow_symlinks=follow_symlinks).st_mode)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(self.path) if follow_symlinks and self.is_symlink() else self._stat


def forget_listing(where: StoragePath) -> None:
    """Forget how a bucket was listed, because something changed."""
    if isinstance(where, Remote):
        where.bucket.forget()


def requests_at_once(where: StoragePath) -> int:
    """Threads to read or write with: one for a local folder, several for a bucket."""
    return 1 if isinstance(where, Path) else MAX_REQUESTS


@contextmanager
def open_for_arrow(where: StoragePath) -> Iterator[Any]:
    """A file for Arrow, with ``size()`` and ``read_at(bytes, offset)``, that threads can share.

    Raises OSError, UnreachableError.
    """
    if isinstance(where, Remote):
        yield where.source()
        return
    import pyarrow as pa

    with pa.OSFile(str(where), "rb") as file:
        yield file
