"""Where a dump lies: a folder of this machine, or a prefix of a bucket (``s3://``, ``gs://``).

A folder is a :class:`pathlib.Path`. A prefix is a :class:`Remote`, which has of a path what reading a dump
takes, and reads only the ranges asked for. What is listed is listed once, so that a reader sees a bucket as
of one moment. Nothing here knows what the files mean.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar
from urllib.parse import parse_qsl

from eplb_analyze.errors import UsageError
from eplb_analyze.storage.bucket import OPTIONS, Bucket, Entry, Remote

#: Requests under way at once: waiting is most of what they take.
MAX_REQUESTS = 8

P = TypeVar("P", bound="StoragePath")


class StoragePath(Protocol):
    """What this program needs of a path. :class:`pathlib.Path` has it all."""

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
    """The place of a path or an address.

    An address may end in ``?``, and what else must be said: ``s3://bucket/dumps?region=eu-west-1``.
    Raises UsageError where it is none that can be read.
    """
    if not isinstance(where, str | os.PathLike):
        return where
    text = os.fspath(where)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if match is None:
        return Path(where)
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme not in OPTIONS:
        raise UsageError(f"{scheme}:// cannot be read; a dump is a folder, or lies under s3:// or gs://")
    if "@" in rest.split("/")[0]:
        # It would be shown in messages, and in the list of this machine's processes.
        raise UsageError(f"{scheme}://…@…: credentials do not belong into an address; see docs/storage.md")
    path, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in OPTIONS[scheme]:
            known = ", ".join(OPTIONS[scheme])
            raise UsageError(f"{scheme}://{path}: no option {name!r}; there are: {known}")
    bucket, _, key = path.partition("/")
    if not bucket:
        raise UsageError(f"{text}: it names no bucket")
    return Remote(Bucket(scheme, bucket, options), "/".join(part for part in key.split("/") if part))


def local(where: StoragePath | str, what: str) -> Path:
    """A place that must be a folder of this machine, since ``what`` works only there. Raises UsageError."""
    where = storage_path(where)
    if isinstance(where, Path):
        return where
    raise UsageError(
        f"{where}: {what} needs a folder of this machine; `copy` brings runs from buckets and to them"
    )


def absolute(where: StoragePath) -> StoragePath:
    return Path(os.path.abspath(where)) if isinstance(where, Path) else where


def join(text: str, name: str) -> str:
    """The text of what is called ``name`` in the folder that ``text`` names."""
    if "://" not in text:
        return os.path.join(text, name)
    path, mark, query = text.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def expand_globs(text: str) -> list[str]:
    """The folders that a pattern stands for; the name of one that is there stands for itself.

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
    """What is in a folder, in order of names, or ``only`` what has this one.

    Raises OSError, UnreachableError.
    """
    if isinstance(folder, Remote):
        return folder.entries() if only is None else folder.folder(only)
    assert isinstance(folder, Path)
    with os.scandir(folder) as found:
        return sorted((e for e in found if only in (None, e.name)), key=lambda entry: entry.name)


def forget_listing(where: StoragePath) -> None:
    """Forget how it was listed: something has changed."""
    if isinstance(where, Remote):
        where.bucket.forget()


def requests_at_once(where: StoragePath) -> int:
    """How many threads to read or write with: one in a local folder, several if each waits for a network."""
    return 1 if isinstance(where, Path) else MAX_REQUESTS


@contextmanager
def open_for_arrow(where: StoragePath) -> Iterator[Any]:
    """A file for Arrow, whose ``size()`` and ``read_at(bytes, offset)`` threads can share.

    Raises OSError, UnreachableError.
    """
    if isinstance(where, Remote):
        yield where.source()
        return
    import pyarrow as pa

    with pa.OSFile(str(where), "rb") as file:
        yield file
