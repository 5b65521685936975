"""A session's metadata: ``session.json``, or if that cannot be read, what its other files repeat of it.

Likewise the manifest.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError, exhausted, require_regular
from eplb_analyze.storage import path as places
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format import frames
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Shape
from eplb_dump.format.manifest import Manifest, SealedFile, SealedSegment, Thinned
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    MANIFEST_FILE,
    METADATA_KEY,
    RUN_PREFIX,
    SEGMENT_PATTERN,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    NewerFormatError,
    Status,
    Tier,
    rank_folder,
)
from eplb_dump.format.segment import footer
from eplb_dump.format.session import SessionInfo, load_json

#: session.json is a few kB; a larger one is not read into memory.
_MAX_SESSION_FILE = 16 << 20
#: What reading a damaged file raises.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError, pa.ArrowException)
#: The tables that are kept of a segment in each tier; files of others are left from before it was thinned.
_TABLES = {
    Tier.FULL: ("steps", "loads", "placements", "minutes"),
    Tier.RANKS: ("steps", "ranks", "placements", "minutes"),
    Tier.MINUTES: ("minutes", "placements"),
    Tier.GONE: ("placements",),
}
#: Files do not say why a segment was thinned.
_UNKNOWN_REASON = "unknown"
#: The mark of an unfinished copy, whose files do not stand for a session yet.
UNFINISHED_COPY = "copy.tmp"


class _DamagedError(FormatError):
    """A ``session.json`` with other bytes than its writer wrote."""


@frozen
class FoundInfo:
    """What is known of a session: its metadata, why ``session.json`` cannot be read, or neither."""

    info: SessionInfo | None = None
    fault: str = ""
    #: The file from which the metadata was taken instead.
    source: str = ""


def find_info(session: tuple[list[str], StoragePath]) -> FoundInfo:
    """A session's metadata or why there is none; neither if its writer has just started."""
    names, folder = session
    try:
        try:
            return FoundInfo(read_info(folder, names))
        except FileNotFoundError:
            inside = {entry.name for entry in places.entries(folder)}
            # A writer that was killed here, or is about to continue, has recorded nothing.
            if inside <= {f"{SESSION_FILE}.tmp"}:
                return FoundInfo()
            if UNFINISHED_COPY in inside or SESSION_FILE in inside:
                return FoundInfo(read_info(folder, names))
            return _rebuilt(folder, names, "it is missing")
    except _DamagedError as error:
        return _rebuilt(folder, names, str(error))
    except FormatError as error:
        return FoundInfo(fault=str(error))
    except OSError as error:
        if exhausted(error):
            raise
        return FoundInfo(fault=str(error.strerror))


def _rebuilt(folder: StoragePath, names: list[str], fault: str) -> FoundInfo:
    """A session's metadata from its manifest, a journal or a sealed file: all of them repeat it.

    The manifest comes first, as it has checksums; metadata with the shapes of the loads before any without.
    """
    found = FoundInfo(fault=fault)
    own: list[str] = []
    with suppress(OSError):
        own = [entry.name for entry in places.entries(folder) if not entry.is_symlink()]
    for name in sorted(own, key=lambda name: (name != MANIFEST_FILE, name.endswith(".parquet"), name)):
        with suppress(*_UNREADABLE):
            if name == MANIFEST_FILE or JOURNAL_PATTERN.fullmatch(name):
                info = _info_in_frames(folder / name)
            elif SEGMENT_PATTERN.fullmatch(name):
                info = _sealed_info(folder / name)
            else:
                continue
            _require_place(info, names)
            if info.num_moe_layers is not None:
                return FoundInfo(info, fault, name)
            if found.info is None:
                found = FoundInfo(info, fault, name)
    return found


def _info_in_frames(path: StoragePath) -> SessionInfo:
    """The metadata in the first frame of a journal or manifest. Raises OSError, FormatError, LookupError."""
    require_regular(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = next(frames.scan(file, size), None)
    if not isinstance(first, frames.Frame):
        raise FormatError("it has no first frame")
    return SessionInfo.from_dict(first.header["session"])


def read_session_file(path: StoragePath) -> SessionInfo:
    """Read a ``session.json``. Raises FormatError, OSError."""
    require_regular(path)
    if path.stat().st_size > _MAX_SESSION_FILE:
        raise FormatError(f"it is larger than {_MAX_SESSION_FILE >> 20} MiB")
    try:
        document = load_json(path.read_bytes())
    except NewerFormatError:
        raise
    except FormatError as error:
        raise _DamagedError(str(error)) from None
    return SessionInfo.from_dict(document)


def read_info(folder: StoragePath, names: list[str]) -> SessionInfo:
    """Read a session's metadata; ``names`` are the four folder levels. Raises FormatError, OSError."""
    info = read_session_file(folder / SESSION_FILE)
    _require_place(info, names)
    return info


def _require_place(info: SessionInfo, names: list[str]) -> None:
    """Raise FormatError if metadata belongs to another folder; ``names`` are the four folder levels."""
    expected = [f"{RUN_PREFIX}{info.run_id}", rank_folder(info.ep_rank), f"{SESSION_PREFIX}{info.session_id}"]
    if [names[0], names[2], names[3]] != expected:
        raise FormatError("it belongs to another folder (was a session moved or renamed?)")


def _sealed_info(path: StoragePath) -> SessionInfo:
    """The metadata in a Parquet file. Raises ``_UNREADABLE``."""
    return SessionInfo.from_dict(_own_metadata(path)[0]["session"])


def _own_metadata(path: StoragePath) -> tuple[dict[str, Any], bytes, int, int]:
    """What we wrote into a Parquet file's footer, the footer, and the file's bytes and rows.

    No checksum of its own protects the footer. Raises ``_UNREADABLE``.
    """
    require_regular(path)
    with places.open_for_arrow(path) as source:
        size = source.size()
        data = footer(size, source.read_at)
    metadata = pq.read_metadata(pa.BufferReader(data))
    return json.loads(metadata.metadata[METADATA_KEY]), data, size, metadata.num_rows


def rebuilt_manifest(folder: StoragePath, info: SessionInfo) -> Manifest:
    """The manifest of a session that has none any more, by its sealed files.

    A segment is listed if its files are of this session, and each step that they call recorded has loads, or
    as thinned if it has no table of loads. It has no sums, and there is no final accounting. That a file of
    placements is missing cannot be seen.
    """
    manifest = Manifest(session_id=info.session_id)
    files: dict[tuple[int, int], dict[str, StoragePath]] = defaultdict(dict)
    for entry in places.entries(folder):
        match = SEGMENT_PATTERN.fullmatch(entry.name)
        if match and not entry.is_symlink():
            files[int(match[2]), int(match[3] or match[2])][match[1]] = folder / entry.name
    found: dict[tuple[int, int], SealedSegment] = {}
    for (seq, last_seq), tables in sorted(files.items()):
        with suppress(*_UNREADABLE, DamagedSegmentError):
            found[seq, last_seq] = _sealed_entry(folder, info, seq, last_seq, tables)
    for seq, last_seq in [key for key in found if key[0] < key[1]]:
        inside = [key for key in found if seq <= key[0] and key[1] <= last_seq and key != (seq, last_seq)]
        # A kill while segments are thinned together leaves either all of them or the result.
        whole = sum(last - first + 1 for first, last in inside) == last_seq - seq + 1
        for key in [(seq, last_seq)] if whole else inside:
            del found[key]
    manifest.entries = {seq: entry for (seq, _), entry in sorted(found.items())}
    return manifest


def _sealed_entry(
    folder: StoragePath, info: SessionInfo, seq: int, last_seq: int, tables: dict[str, StoragePath]
) -> SealedSegment:
    """The manifest's entry of a segment. Raises ``_UNREADABLE`` and DamagedSegmentError."""
    listed: dict[str, SealedFile] = {}
    shape = None
    for table, path in tables.items():
        own, data, size, rows = _own_metadata(path)
        if own["session"]["session_id"] != info.session_id:
            raise FormatError("it belongs to another session")
        shape = None if own["shape"] is None else Shape(**own["shape"])
        listed[table] = SealedFile(path.name, size, rows, zlib.crc32(data))
    tier = Tier.FULL if "steps" in listed else Tier.MINUTES if "minutes" in listed else Tier.GONE
    if tier is Tier.FULL and "ranks" in listed and "loads" not in listed:
        tier = Tier.RANKS
    listed = {table: file for table, file in listed.items() if table in _TABLES[tier]}
    thinned = None if tier is Tier.FULL else Thinned(tier, last_seq, 0, 0, _UNKNOWN_REASON)
    entry = SealedSegment(seq, 0, 0, shape, listed, thinned=thinned)
    segment = ParquetSegment(folder, info, entry)
    if tier in (Tier.MINUTES, Tier.GONE):
        return _without_steps(segment, entry)
    steps = segment.steps()
    if not np.array_equal(steps.step[steps.status == Status.RECORDED], segment.load_steps()):
        raise FormatError("not all of its recorded steps have loads")
    if thinned is not None:
        thinned = replace(thinned, step_rows=len(steps.step), recorded=len(segment.load_steps()))
    return replace(
        entry,
        first_step=int(steps.step.min()),
        last_step=int(steps.step.max()),
        times=(int(steps.time_ns.min()), int(steps.time_ns.max())),
        thinned=thinned,
    )


def _without_steps(segment: ParquetSegment, entry: SealedSegment) -> SealedSegment:
    """The entry of a segment of which sums per minute are left, or only placements."""
    assert entry.thinned is not None
    if not segment.has_minutes:
        steps = segment.placements().step
        return replace(entry, first_step=int(steps.min()), last_step=int(steps.max()))
    edges = ("first_step", "last_step", "first_time_ns", "last_time_ns")
    labels = [status.label for status in Status]
    rows = [*segment.minutes([*edges, *labels])]
    first, last, begin, end = (np.concatenate([part[name] for part in rows]) for name in edges)
    count = {label: sum(int(part[label].sum()) for part in rows) for label in labels}
    return replace(
        entry,
        first_step=int(first.min()),
        last_step=int(last.max()),
        times=(int(begin.min()), int(end.max())),
        thinned=replace(entry.thinned, step_rows=sum(count.values()), recorded=count["recorded"]),
    )
