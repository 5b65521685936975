"""The target of a copy: one session's folder or bucket prefix. It only ever gains data.

Each file is fetched into a spool folder that no reader looks at, verified there, and then published under its
name. Until ``session.json`` is published, a mark shows that the session is incomplete.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from eplb_analyze.atomic import LOCK, hold, remove_held, scratch_folder
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.metadata import UNFINISHED_COPY, read_session_file
from eplb_analyze.sessions.segments import DamagedSegmentError, read_manifest, require_regular
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage import path as storage
from eplb_analyze.storage.bucket import Remote
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format import frames
from eplb_dump.format.files import discard, fsync_file, remove, rename
from eplb_dump.format.manifest import Manifest, SealedFile
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    LEVEL_PREFIXES,
    MANIFEST_FILE,
    SEGMENT_PATTERN,
    SESSION_FILE,
    FormatError,
)
from eplb_dump.format.session import SessionInfo, session_path

CHUNK_BYTES = 8 << 20
#: How often a Parquet file is fetched before two readings that differ count as damage.
MAX_READINGS = 3


class DamagedManifestError(DumpError):
    """A manifest is damaged, so what it lists after that can be neither verified nor copied."""


def sound_manifest(folder: StoragePath, info: SessionInfo) -> Manifest:
    """A session's manifest; empty if nothing is sealed yet. Raises DamagedManifestError."""
    try:
        manifest = read_manifest(folder, info)
        fault = manifest.fault
    except FormatError as error:
        fault = str(error)
    if fault is not None:
        raise DamagedManifestError(f"{folder / MANIFEST_FILE}: {fault}")
    return manifest


def _covers(new: Manifest, old: Manifest) -> bool:
    """Whether a manifest is about all the steps that another is about."""
    if new.part is None or old.part is None:
        return new.part is None
    return new.part[0] <= old.part[0] and old.part[1] <= new.part[1]


def _files(manifest: Manifest) -> set[SealedFile]:
    return {file for entry in manifest.entries.values() for file in entry.files.values()}


class Target:
    """A session where it is copied to, in a folder or a bucket.

    The mark of an incomplete session is a folder, which also holds the lock and the spools, or in a bucket an
    object. Buckets have no locks.
    """

    def __init__(self, to: StoragePath, source: StoragePath, info: SessionInfo) -> None:
        """``to``: the dump to copy into; ``source``: the session's folder."""
        self._info = info
        self.folder = to
        for name in session_path(Path(), info).parts:
            self.folder = self.folder / name
        self._mark_path = self.folder / UNFINISHED_COPY
        self._is_source = str(source.resolve()) == str(self.folder.resolve())
        #: A local folder of this process for unverified files, while the target is held.
        self._spool = Path()
        #: The names that are there, and whether an earlier copy completed the session.
        self._names: set[str] = set()
        self._complete = False

    def inspect(self) -> None:
        """See what is there. Raises UsageError if no copy can have made it."""
        path = self._mark_path
        for _ in ("mark", *LEVEL_PREFIXES):
            if isinstance(path, Path) and path.is_symlink():
                raise UsageError(f"{path}: it is a symbolic link, which readers do not follow; remove it")
            path = path.parent
        self._names = self.names()
        self._complete = SESSION_FILE in self._names
        if self._names and not self._complete and UNFINISHED_COPY not in self._names:
            raise UsageError(
                f"{self.folder}: it contains files that `copy` did not write; nothing was written"
            )

    def require_extendable(self, manifest: Manifest) -> None:
        """Raise UsageError if a complete session there has anything that this manifest does not list."""
        there = self.listed()
        if there is None:
            return
        if not _covers(manifest, there):
            held = "more than the selected steps"
            if there.part is not None:
                held = f"a copy of steps {StepRange(there.part[0], there.part[1] + 1)} only"
            raise UsageError(
                f"{self.folder}: it contains {held} and was not changed; choose another destination"
            )
        if not (_files(there) <= _files(manifest) and there.closed in (None, manifest.closed)):
            path = self.folder / MANIFEST_FILE
            raise UsageError(f"{path}: it exists with different content, and was not changed")

    def listed(self) -> Manifest | None:
        """The manifest of a complete session there. Raises UsageError if it is damaged."""
        if not self._complete:
            return None
        try:
            return sound_manifest(self.folder, self._info)
        except DamagedManifestError as fault:
            raise UsageError(f"{fault}; it was not changed") from None

    def begin(self) -> None:
        """Mark the session as incomplete, unless it is complete."""
        if not self._complete:
            self._mark()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have a spool and, if there are locks, exclude other copies.

        Raises UsageError if another copy holds the target.
        """
        with ExitStack() as held:
            locked = self._lock(held)
            held.callback(self._remove_mark, locked)
            self.inspect()
            if isinstance(self._mark_path, Path):
                self._spool = Path(held.enter_context(tempfile.TemporaryDirectory(dir=self._mark_path)))
            else:
                self._spool = held.enter_context(scratch_folder())
            yield
        if isinstance(self._mark_path, Path) and SESSION_FILE in self.names():
            with suppress(OSError):  # some file systems keep the lock's file until it is closed
                self._mark_path.rmdir()

    def put(
        self,
        name: str,
        source: StoragePath | bytes,
        verify: Callable[[Path], object],
        size: int | None = None,
    ) -> tuple[int, bool]:
        """Have a file there. Returns its bytes, and whether it was there already.

        Args:
            size: the bytes that the source must have, if the manifest lists them.
            verify: reads the fetched file; raises FormatError or DamagedSegmentError if it is damaged.

        Raises:
            FileNotFoundError: the source's file is gone.
            FormatError: it is damaged.
            UsageError: a complete session has another file of that name.
            DumpError: the file there is not what was written.
        """
        fetched, there = self._spool / name, self.folder / name
        try:
            content = _fetch(source, fetched, size)
            verify(fetched)
            if _has_content(there, content):
                return content[0], True
            if self._complete and (self._is_source or not _loses_nothing(there, fetched)):
                raise UsageError(f"{there}: it exists with different content, and was not changed")
            self._publish(fetched)
            if not _has_content(there, content):
                self._remove(name)
                raise DumpError(f"{there}: the written file differs from its source; it was removed")
            self._names.add(name)
            return content[0], False
        except DamagedSegmentError as fault:
            raise FormatError(str(fault).removeprefix(f"{fetched}: ")) from None
        finally:
            discard([fetched])

    def remove_superseded(self, wanted: set[str], manifest: Manifest) -> None:
        """Remove journals that are sealed now and, if the session is incomplete, unwanted files of it."""
        unwanted = []
        for name in self._names - wanted:
            journal = JOURNAL_PATTERN.fullmatch(name)
            sealed = journal is not None and manifest.entry_of(int(journal[1])) is not None
            if sealed if self._complete else journal or SEGMENT_PATTERN.fullmatch(name):
                unwanted.append(name)
        if not unwanted:
            return
        storage.forget_listing(self.folder)
        if not self._complete and SESSION_FILE in self.names():
            return  # without locks, another copy may have completed the session: the files are its own
        for name in unwanted:
            self._remove(name)

    def names(self) -> set[str]:
        try:
            return {entry.name for entry in storage.entries(self.folder)}
        except FileNotFoundError:
            return set()

    def _lock(self, held: ExitStack) -> bool:
        """Take the lock; False if there are none. Raises UsageError if another copy has it."""
        taken = hold(self._mark_path, held) if isinstance(self._mark_path, Path) else None
        if taken is False:
            raise UsageError(f"{self.folder}: another copy is writing into it; when it has ended, copy again")
        return taken is True

    def _mark(self) -> None:
        if isinstance(self._mark_path, Path):
            self._mark_path.mkdir(parents=True, exist_ok=True)
        else:
            cast(Remote, self._mark_path).write(io.BytesIO(b""))

    def _remove_mark(self, locked: bool) -> None:
        """If the session is complete, remove the mark, and under a lock what killed copies left in it."""
        names = self.names()
        if not {SESSION_FILE, UNFINISHED_COPY} <= names:
            return
        if not isinstance(self._mark_path, Path):
            self._remove(UNFINISHED_COPY)
            return
        with suppress(OSError):
            if locked:
                remove_held(self._mark_path)
            else:
                discard([self._mark_path / LOCK])
                self._mark_path.rmdir()

    def _publish(self, fetched: Path) -> None:
        there = self.folder / fetched.name
        if isinstance(there, Path):
            fsync_file(fetched)
            rename(fetched, there)
        else:
            with fetched.open("rb") as file:
                cast(Remote, there).write(file)

    def _remove(self, name: str) -> None:
        path = self.folder / name
        with suppress(FileNotFoundError):
            if isinstance(path, Path):
                remove(path)
            else:
                cast(Remote, path).unlink()


# ---- content


def _fetch(source: StoragePath | bytes, to: Path, size: int | None) -> tuple[int, str]:
    """Write a file's content to ``to``; its size and SHA-256. Raises OSError, FormatError.

    A file of the wrong size is refused before it is fetched: a sparse one could fill the disk.
    """
    if isinstance(source, bytes):
        with to.open("wb") as write:
            return _digest(io.BytesIO(source), write)
    require_regular(source)
    if JOURNAL_PATTERN.fullmatch(source.name):
        size = _journal_size(source)
        with source.open("rb") as read, to.open("wb") as write:
            return _digest(read, write, most=size)
    found = source.stat().st_size
    if size not in (None, found):
        raise FormatError(f"it has {found} bytes, but the manifest says {size}")
    for _ in range(MAX_READINGS):
        with source.open("rb") as read, to.open("wb") as write:
            content = _digest(read, write, most=found)
        # No checksum of a Parquet file covers its first bytes and its page headers, so read it twice.
        with source.open("rb") as read:
            if _digest(read, most=found) == content:
                return content
    raise FormatError(f"two reads of it differed {MAX_READINGS} times in a row")


def _journal_size(source: StoragePath) -> int:
    """The bytes of a journal, which may be growing, as of now. Raises FormatError if it is damaged."""
    with source.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for item in frames.scan(file, size):
            if isinstance(item, frames.Tail) and item.fault == "damaged":
                raise FormatError(f"damaged from byte {item.end} on")
    return size


def _digest(read: BinaryIO, write: BinaryIO | None = None, most: int = NO_END) -> tuple[int, str]:
    """The size and SHA-256 of the next ``most`` bytes, which are also written if ``write`` is given."""
    digest, size = hashlib.sha256(), 0
    while data := read.read(min(CHUNK_BYTES, most - size)):
        digest.update(data)
        size += len(data)
        if write is not None:
            write.write(data)
    return size, digest.hexdigest()


def _has_content(path: StoragePath, content: tuple[int, str]) -> bool:
    try:
        found = path.lstat()
        if found.st_size != content[0] or not stat.S_ISREG(found.st_mode):
            return False
        with path.open("rb") as file:
            return _digest(file) == content
    except FileNotFoundError:
        return False


def _loses_nothing(there: StoragePath, new: Path) -> bool:
    """Whether a complete session's file can be replaced without losing anything: it is missing or grows."""
    try:
        require_regular(there)
    except FileNotFoundError:
        return True
    except FormatError:
        return False
    if JOURNAL_PATTERN.fullmatch(there.name):
        size = there.stat().st_size
        if size > new.stat().st_size:
            return False
        with there.open("rb") as earlier, new.open("rb") as later:
            return _digest(later, most=size) == _digest(earlier, most=size)
    if there.name == SESSION_FILE:  # written twice: again when the first step shows the shape
        try:
            old, now = read_session_file(there), read_session_file(new)
        except FormatError:
            return False
        return old.num_moe_layers is None and old.session_id == now.session_id
    return there.name == MANIFEST_FILE  # see Target.require_extendable
