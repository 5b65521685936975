"""A prefix of a bucket (``s3://``, ``gs://``), read by ranges and listed once."""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from urllib.parse import urlencode

from eplb_analyze.errors import DumpError
from eplb_dump.format.frozen import frozen

#: Options of an address after its ``?``, by scheme.
OPTIONS = {
    "s3": ("region", "endpoint_override", "scheme", "anonymous"),
    "gs": ("endpoint_override", "scheme", "anonymous"),
}


#: Timeouts, after which a request is sent again, three times in all.
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 20.0


RETRY_SECONDS = 30


#: Objects up to this size are fetched with one request.
SMALL_BYTES = 64 << 10


#: Frames are read in order; this much is fetched at once.
FRAMES_BYTES = 1 << 20


class UnreachableError(DumpError):
    """A bucket cannot be read or written now, whatever the state of the dump in it."""


class Entry(Protocol):
    """An entry of a folder. :class:`os.DirEntry` has all of it."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    def is_symlink(self) -> bool: ...
    def is_dir(self, *, follow_symlinks: bool = True) -> bool: ...
    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result: ...


@contextmanager
def translate_network_errors(where: object) -> Iterator[None]:
    """Turn network errors into UnreachableError, one line that says what to do.

    Errors of the file stay OSError, as for a local file: FileNotFoundError if it is gone.
    """
    try:
        yield
    except OSError as error:
        text = "" if isinstance(where, Path) else str(error)
        if "NO_SUCH_KEY" in text or "RESOURCE_NOT_FOUND" in text or "NOT_FOUND" in text:
            raise FileNotFoundError(2, os.strerror(2), str(where)) from None
        reason = _unreachable(text)
        if reason is not None:
            raise UnreachableError(f"{where}: {reason}") from None
        raise


class Remote:
    """A prefix or an object of a bucket, with the methods of :class:`StoragePath`."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket = bucket
        #: Without slashes at its ends; empty for the bucket itself.
        self.key = key

    def __str__(self) -> str:
        """The address without its options, for messages."""
        return f"{self.bucket.scheme}://{self.bucket.name}/{self.key}".rstrip("/")

    @property
    def address(self) -> str:
        """The full address, with options."""
        query = urlencode(self.bucket.options)
        return f"{self}?{query}" if query else str(self)

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.bucket, self.key.rpartition("/")[0])

    def __truediv__(self, name: str, /) -> Remote:
        return Remote(self.bucket, f"{self.key}/{name}" if self.key else name)

    def entries(self) -> Sequence[Entry]:
        return self.bucket.children(self.key)

    def folder(self, name: str) -> Sequence[Entry]:
        """The folder of this name in it, if it exists, without listing what is beside it."""
        below = self / name
        return [_Listed(name, str(below), None)] if below.entries() else []

    def exists(self) -> bool:
        return bool(self.entries()) or self.bucket.entry(self.key) is not None

    def is_dir(self) -> bool:
        return bool(self.entries())

    def stat(self) -> os.stat_result:
        """Raises FileNotFoundError, UnreachableError."""
        entry = self.bucket.entry(self.key)
        if entry is None:
            raise FileNotFoundError(2, os.strerror(2), str(self))
        return entry.stat()

    def lstat(self) -> os.stat_result:
        return self.stat()

    def resolve(self) -> Remote:
        return self

    def source(self) -> Any:
        """The object as an Arrow file; a small one is fetched at once."""
        file = self.bucket.file(self.key)
        if file.size() > SMALL_BYTES:
            return file
        import pyarrow as pa

        return pa.BufferReader(self.read_bytes())

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        file = self.bucket.file(self.key)
        return io.BufferedReader(_Ranges(self, file), min(FRAMES_BYTES, max(1, file.size())))

    def read_bytes(self) -> bytes:
        file = self.bucket.file(self.key)
        with translate_network_errors(self):
            data: bytes = file.read_at(file.size(), 0)
        return data

    # ---- writing, which only copies do

    def write(self, file: BinaryIO) -> None:
        """Write an object, which appears when it is complete. Raises UnreachableError."""
        with translate_network_errors(self), self.bucket.filesystem.open_output_stream(self._path) as stream:
            while data := file.read(8 << 20):
                stream.write(data)
        self.bucket.forget()

    def unlink(self) -> None:
        with translate_network_errors(self), suppress(FileNotFoundError):
            self.bucket.filesystem.delete_file(self._path)
        self.bucket.forget()

    def remove_empty_folder(self) -> None:
        """Remove the marks of a folder without objects, which some services keep. Raises UnreachableError."""
        from pyarrow import fs

        with translate_network_errors(self):
            selector = fs.FileSelector(self._path, allow_not_found=True, recursive=True)
            inside = self.bucket.filesystem.get_file_info(selector)
            if all(info.type == fs.FileType.Directory for info in inside):
                with suppress(FileNotFoundError):
                    self.bucket.filesystem.delete_dir(self._path)
        self.bucket.forget()

    @property
    def _path(self) -> str:
        return f"{self.bucket.name}/{self.key}"


class _Ranges(io.RawIOBase):
    """An object as a file with a position, read by ranges."""

    def __init__(self, where: Remote, file: Any) -> None:
        self._where, self._file, self._at = where, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size())[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._file.size() - self._at))
        with translate_network_errors(self._where):
            data = self._file.read_at(wanted, self._at) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@frozen
class _Listed:
    """A folder or an object of a bucket, as it was listed."""

    name: str
    path: str
    #: None: a folder.
    size: int | None
    mtime_ns: int = 0

    def is_symlink(self) -> bool:
        return False

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self.size is None

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        mode = stat.S_IFDIR | 0o555 if self.size is None else stat.S_IFREG | 0o444
        seconds = self.mtime_ns // 10**9
        fields = (mode, 0, 0, 1, 0, 0, self.size or 0, 0, seconds, 0)
        return os.stat_result(fields, {"st_mtime_ns": self.mtime_ns})


class Bucket:
    """A bucket, with its listing and open files cached."""

    def __init__(self, scheme: str, name: str, options: dict[str, str]) -> None:
        self.scheme = scheme
        self.name = name
        self.options = options
        self._lock = threading.RLock()
        self._filesystem: Any = None
        #: Prefixes that were listed with everything below them.
        self._roots: set[str] = set()
        self._children: dict[str, dict[str, _Listed]] = {}
        #: Opened objects, which hold no connection.
        self._files: dict[str, Any] = {}

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem, which keeps connections."""
        with self._lock:
            if self._filesystem is None:
                with translate_network_errors(Remote(self, "")):
                    self._filesystem = _filesystem(self.scheme, self.name, self.options)
            return self._filesystem

    def children(self, key: str) -> list[Entry]:
        """The entries of a prefix. The first call lists it with everything below, in few requests."""
        with self._lock:
            if not self._known(key):
                self._list(key)
            return sorted(self._children.get(key, {}).values(), key=lambda entry: entry.name)

    def entry(self, key: str) -> Entry | None:
        """The entry of a key as it was listed, or as it is now if it was not; None if there is none."""
        parent, _, name = key.rpartition("/")
        with self._lock:
            if self._known(parent):
                return self._children.get(parent, {}).get(name)
            if key in self._children:
                return _Listed(name, str(Remote(self, key)), None)
        from pyarrow import fs

        where = Remote(self, key)
        with translate_network_errors(where):
            info = self.filesystem.get_file_info(f"{self.name}/{key}".rstrip("/"))
        if info.type == fs.FileType.NotFound:
            return None
        is_file = info.type == fs.FileType.File
        return _Listed(name, str(where), info.size if is_file else None, info.mtime_ns or 0)

    def file(self, key: str) -> Any:
        """An object as a file to read ranges from. Raises FileNotFoundError, UnreachableError."""
        file = self._files.get(key)
        if file is None:
            where = Remote(self, key)
            try:
                with translate_network_errors(where):
                    file = self._files[key] = self.filesystem.open_input_file(f"{self.name}/{key}")
            except FileNotFoundError:
                raise FileNotFoundError(2, os.strerror(2), str(where)) from None
        return file

    def forget(self) -> None:
        """Forget the listing, because something was written or deleted."""
        with self._lock:
            self._files, self._roots, self._children = {}, set(), {}

    def _known(self, key: str) -> bool:
        while key and key not in self._roots:
            key = key.rpartition("/")[0]
        return key in self._roots

    def _list(self, key: str) -> None:
        from pyarrow import fs

        where = Remote(self, key)
        base = f"{self.name}/{key}".rstrip("/")
        with translate_network_errors(where):
            found = self.filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
            if not found and self.filesystem.get_file_info(self.name).type == fs.FileType.NotFound:
                raise UnreachableError(f"{self.scheme}://{self.name}: no such bucket")
        for info in found:
            path = info.path[len(self.name) + 1 :].rstrip("/")
            size = info.size if info.type == fs.FileType.File else None
            # Not every service lists intermediate folders.
            while path and path != key:
                parent, _, name = path.rpartition("/")
                listed = _Listed(name, f"{self.scheme}://{self.name}/{path}", size, info.mtime_ns or 0)
                self._children.setdefault(parent, {}).setdefault(name, listed)
                path, size = parent, None
        self._roots.add(key)


def _filesystem(scheme: str, bucket: str, options: dict[str, str]) -> Any:
    from datetime import timedelta

    from pyarrow import fs

    endpoint, transport = options.get("endpoint_override"), options.get("scheme")
    anonymous = options.get("anonymous", "").lower() in ("true", "1")
    if scheme == "s3" and endpoint is None:
        # Whether Arrow reads these variables depends on its version.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "://" in endpoint:
        transport, _, endpoint = endpoint.partition("://")
        endpoint = endpoint.rstrip("/")
    where: dict[str, Any] = {"endpoint_override": endpoint} if endpoint else {}
    where |= {"scheme": transport} if transport else {}
    if scheme == "gs":
        return fs.GcsFileSystem(
            anonymous=anonymous, retry_time_limit=timedelta(seconds=RETRY_SECONDS), **where
        )
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        anonymous=anonymous,
        region=region or "us-east-1",
        connect_timeout=CONNECT_SECONDS,
        request_timeout=ANSWER_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
        **where,
    )


#: Patterns of error texts, and what to tell the user.
_REASONS = (
    (r"NO_SUCH_BUCKET|bucket does not exist", "no such bucket"),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|InvalidAccessKeyId|SIGNATURE|SignatureDoesNotMatch|TOKEN"
        r"|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|default credentials",
        "access denied: the credentials are missing, wrong or lack a permission (docs/operate/storage.md "
        "shows where they are read from)",
    ),
    (r"HTTP status 301|redirect", "the bucket is in another region; append ?region=… to the address"),
    (r"curlCode: 28|DEADLINE_EXCEEDED", "the server did not respond in time"),
    (r"curlCode: 18\b", "the connection broke during the read"),
    (
        r"HTTP status 5\d\d|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|UNAVAILABLE",
        "the server reported an internal error",
    ),
    (r"NETWORK_CONNECTION|curlCode", "it cannot be reached"),
)


def _unreachable(text: str) -> str | None:
    """What to tell the user about a network error; None if it is another error."""
    if "AWS Error" not in text and "google::cloud::Status" not in text and "GCS" not in text:
        return None
    reason = next((said for pattern, said in _REASONS if re.search(pattern, text)), "it cannot be used")
    detail = re.search(r"Details: ([^\n]*)", text) or re.search(r"(HTTP status \d+)", text)
    if reason.startswith(("access", "no such", "it lies")):
        return reason
    return f"{reason} ({detail[1].strip() if detail else text.splitlines()[0]})"
