"""Safe reading of untrusted files: numpy arrays, JSON and JSON lines.

Sizes and types are checked before memory is taken, and nothing is unpickled.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.segments import require_regular
from eplb_dump.format.schema import FormatError

#: The most bytes of a JSON document or a line; a DeepSeek-V3 record has a third of a MB.
MAX_TEXT = 16 << 20
#: The highest compression ratio of an array in a .npz file that unpacks to more than MAX_SMALL bytes.
MAX_RATIO, MAX_SMALL = 100, 64 << 20
#: The most files in a folder.
MAX_FILES = 1 << 16
#: Exceptions from a damaged archive.
BROKEN_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError,
)  # fmt: skip

Array = npt.NDArray[Any]


def regular(path: Path) -> int:
    """The size of a regular file. Raises DumpError for anything else, links included."""
    try:
        require_regular(path)
        return path.stat().st_size
    except FormatError as error:
        raise DumpError(f"{path}: {error}") from None
    except OSError as error:
        raise DumpError(f"{path}: {error.strerror}") from None


def listing(folder: Path, only: str | None) -> list[Path]:
    """The regular files of a folder whose names match ``only``, sorted. Raises DumpError."""
    found = []
    try:
        for number, path in enumerate(folder.iterdir()):
            if number >= MAX_FILES:
                raise DumpError(f"{folder}: more than {MAX_FILES:,} files")
            if path.is_file() and not path.is_symlink() and fnmatch.fnmatchcase(path.name, only or "*"):
                found.append(path)
    except OSError as error:
        raise DumpError(f"{folder}: {error.strerror}") from None
    if not found:
        raise DumpError(f"{folder}: no file in it" + (f" matches {only!r} (--only)" if only else ""))
    return sorted(found)


# ---- JSON


def parse_json(text: bytes, where: str) -> Any:
    """Raises DumpError naming ``where``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise DumpError(f"{where}: it is not JSON ({reason})") from None


def read_json(path: Path) -> Any:
    """One JSON document of at most MAX_TEXT bytes. Raises DumpError."""
    if regular(path) > MAX_TEXT:
        raise DumpError(f"{path}: a JSON document of more than {MAX_TEXT >> 20} MiB")
    return parse_json(path.read_bytes(), str(path))


def json_lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, object)`` of each line, read as a stream. Raises DumpError.

    A last line that is not JSON and has no newline is left out, with a note: its writer was killed.
    """
    regular(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_TEXT + 1):
            number += 1
            where = f"{path}: line {number}"
            if len(line) > MAX_TEXT:
                raise DumpError(f"{where}: longer than {MAX_TEXT >> 20} MiB")
            if not line.strip():
                continue
            try:
                record = parse_json(line, where)
            except DumpError:
                if not line.endswith(b"\n") and number > 1:
                    if notes is not None:
                        notes.append(f"line {number}, the last, left out: it is cut off")
                    return
                raise
            if not isinstance(record, dict):
                raise DumpError(f"{where}: it is not a JSON object")
            yield where, record


#: How many bytes of a long JSON document are read at once.
_JSON_BYTES = 4 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def json_items(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """``(where, item)`` of the list under ``key``, the first member of a JSON object of any size.

    Only an item, of at most MAX_TEXT bytes, is in memory at once. Raises DumpError.
    """
    regular(path)
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8", errors="strict") as file:
        text, at, number = file.read(_JSON_BYTES), 0, 0
        start = re.compile(rf'[ \t\r\n]*{{[ \t\r\n]*"{re.escape(key)}"[ \t\r\n]*:[ \t\r\n]*\[').match(text)
        if start is None:
            raise DumpError(f"{path}: it does not begin with the list {key}")
        at = start.end()
        try:
            while True:
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
                if number and text[at : at + 1] == ",":
                    at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
                elif text[at : at + 1] == "]":
                    return
                where = f"{path}: {key}[{number}]"
                try:
                    item, end = decoder.raw_decode(text, at)
                except ValueError as error:
                    more = file.read(_JSON_BYTES)
                    if not more or len(text) - at > MAX_TEXT:
                        raise DumpError(f"{where}: it is not JSON, or longer than {MAX_TEXT >> 20} MiB "
                                        f"({error})") from None  # fmt: skip
                    text, at = text[at:] + more, 0
                    continue
                yield where, item
                at, number = end, number + 1
        except (UnicodeDecodeError, RecursionError) as error:
            raise DumpError(f"{path}: it is not JSON ({error})") from None


def depth_of(value: Any) -> int:
    """How deeply a JSON list is nested, at most 4."""
    depth = 0
    while isinstance(value, list) and value and depth < 4:
        value, depth = value[0], depth + 1
    return depth


def integers(value: Any, shape_of: int, where: str) -> Array:
    """A nested JSON list as an integer array of ``shape_of`` dimensions. Raises DumpError."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise DumpError(
            f"{where}: its lists have different lengths, or contain something other than numbers"
        ) from None
    if array.dtype.kind not in "iu" or array.ndim != shape_of or not array.size:
        raise DumpError(f"{where}: it must be whole numbers in {shape_of} dimensions")
    return array


# ---- numpy


#: Exceptions from an invalid array header, which numpy reads with Python's own parser.
HEADER_FAULTS = (
    ValueError, KeyError, OSError, EOFError, RecursionError, SyntaxError, TypeError, MemoryError, TokenError,
)  # fmt: skip


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Shape, type, Fortran order and header length of the .npy at the file's start. Raises DumpError."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = reader(file)
    except HEADER_FAULTS as error:
        raise DumpError(f"{where}: its array header cannot be read ({error})") from None
    if dtype.hasobject:
        raise DumpError(f"{where}: it holds pickled objects, which are not opened")
    if any(type(n) is not int or n < 0 for n in shape):
        raise DumpError(f"{where}: it claims the shape {shape}")
    return shape, dtype, fortran, file.tell()


def read_npy(path: Path) -> Array:
    """A .npy file as a read-only map of the file. Raises DumpError."""
    size = regular(path)
    with path.open("rb") as file:
        shape, dtype, _, start = _header(file, str(path))
    if math.prod(shape) * dtype.itemsize > size - start:
        raise DumpError(f"{path}: it claims {shape} of {dtype}, but has only {size:,} bytes")
    if math.prod(shape) == 0:
        raise DumpError(f"{path}: its array is empty")
    mapped: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def zip_names(path: Path) -> list[str]:
    """The names in a zip archive, such as a .npz or .pt file. Raises DumpError."""
    regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except BROKEN_ARCHIVE as error:
        raise DumpError(f"{path}: its archive cannot be read ({error})") from None


def npz_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of each array in a .npz file, checked against its size. Raises DumpError."""
    names = zip_names(path)
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                where = f"{path}: array {name!r}"
                entry = archive.getinfo(name)
                # Before anything is unpacked: a header alone can claim 4 GiB.
                if entry.file_size > max(MAX_SMALL, MAX_RATIO * entry.compress_size):
                    raise DumpError(f"{where}: {entry.compress_size:,} bytes that unpack to "
                    f"{entry.file_size:,}, which is suspicious")  # fmt: skip
                with archive.open(entry) as file:
                    shape, dtype, _, start = _header(file, where)
                if math.prod(shape) * dtype.itemsize != entry.file_size - start:
                    raise DumpError(
                        f"{where}: it claims {shape} of {dtype}, which does not match its content"
                    )
                found[name.removesuffix(".npy")] = (shape, dtype)
    except BROKEN_ARCHIVE as error:
        raise DumpError(f"{path}: its archive cannot be read ({error})") from None
    return found


def read_npz(path: Path, *wanted: str) -> dict[str, Array]:
    """Arrays of a .npz file by name. Raises DumpError."""
    shapes = npz_shapes(path)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise DumpError(f"{path}: it lacks {', '.join(missing)}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in wanted}
    except BROKEN_ARCHIVE as error:
        raise DumpError(f"{path}: it cannot be read ({error})") from None


def stream_npz(path: Path, name: str, rows: int, dimensions: int = 0) -> Iterator[Array]:
    """An array that :func:`npz_shapes` lists, in parts of at most ``rows`` rows.

    A row is what the last ``dimensions`` axes span. Only one part is in memory at once. Raises DumpError.
    """
    where = f"{path}: array {name!r}"
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if e.filename.removesuffix(".npy") == name)
            with archive.open(entry) as file:
                shape, dtype, fortran, _ = _header(file, where)
                if fortran and len(shape) > 1:
                    raise DumpError(f"{where}: it is in Fortran order; save np.ascontiguousarray(array)")
                row = shape[len(shape) - dimensions :]
                count, each = math.prod(shape[: len(shape) - dimensions]), math.prod(row)
                for low in range(0, count, rows):
                    n = min(rows, count - low)
                    yield np.frombuffer(file.read(n * each * dtype.itemsize), dtype).reshape(n, *row)
                file.read(1)  # at the end, zipfile compares the checksum
    except BROKEN_ARCHIVE as error:
        raise DumpError(f"{path}: it cannot be read ({error})") from None


# ---- which of several

_RANK = re.compile(r"rank[_-]?(\d{1,6})(?!\d)", re.IGNORECASE)


def rank_of(path: Path) -> int | None:
    """The rank that a file's name says, as in ``expert_distribution_rank3_1744347750.csv``."""
    match = _RANK.search(path.name)
    return None if match is None else int(match[1])


def by_rank(paths: list[Path]) -> dict[int, Path]:
    """The files of a recording with one file per rank.

    Raises UsageError if a name says no rank, or several say the same.
    """
    found: dict[int, Path] = {}
    for path in paths:
        rank = rank_of(path)
        if rank is None:
            one_of(paths, "files, but not every name contains a rank (as in rank0)")
            raise UsageError(f"{path}: its name does not contain a rank (as in rank0)")
        if rank in found:
            raise UsageError(
                f"{path.parent}: rank {rank} has several files ({found[rank].name}, {path.name}), from "
                f"different recordings; choose with --only 'PATTERN'"
            )
        found[rank] = path
    return found


def require_all_ranks(path: Path, ep_size: int | None) -> None:
    """Raise UsageError if a file's name says that it has the counts of one rank of several."""
    rank = rank_of(path)
    if rank is not None and ep_size != 1:
        # The load is the sum over all ranks: one rank's part would give wrong figures.
        raise UsageError(
            f"{path}: its name suggests that it has only the counts of rank {rank}; pass the folder with "
            f"one file per rank. If the file has the sums over all ranks, rename it"
        )


def one_of(paths: list[Path], what: str) -> Path:
    """The only path. Raises UsageError if there are several."""
    if len(paths) > 1:
        names = ", ".join(p.name for p in paths[:4]) + (" …" if len(paths) > 4 else "")
        raise UsageError(f"{paths[0].parent}: {len(paths)} {what} ({names}), each a separate recording; "
        f"pass one of them, or choose with --only 'PATTERN'")  # fmt: skip
    return paths[0]
