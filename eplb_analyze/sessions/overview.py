"""A session by the names, sizes and headers of its files, without its loads.

Headers are not verified. This is for a list of runs; figures come from :mod:`eplb_analyze.reader`, and
`check` verifies every byte.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from eplb_analyze.sessions.metadata import rebuilt_manifest
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import exhausted, require_regular
from eplb_analyze.storage import path as places
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format import frames
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import StepRows, session_of, step_rows
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import JOURNAL_PATTERN, MANIFEST_FILE, SEGMENT_PATTERN, FormatError, Tier
from eplb_dump.format.session import SessionInfo


@frozen
class SegmentOverview:
    """A segment's steps; sealed or open."""

    first_step: int
    last_step: int
    step_rows: int
    #: How many of them were retired.
    retired: int
    ep_size: int
    tier: Tier
    #: Reads the times of its first and of its last step, ns since 1970. Raises DamagedSegmentError.
    times: Callable[[], tuple[int, int]]


@dataclass
class SessionOverview:
    """What a list of runs needs to know about a session."""

    info: SessionInfo
    segments: list[SegmentOverview] = field(default_factory=list)
    #: Whether its writer was closed.
    closed: bool = False
    #: The size of its files on disk, and when one of them was written last, in seconds since 1970.
    size_bytes: int = 0
    written: float = 0.0
    #: What is wrong with its files, as far as names, sizes and headers show it.
    faults: list[str] = field(default_factory=list)

    @property
    def ep_size(self) -> int:
        return max([self.info.ep_size, *(segment.ep_size for segment in self.segments)])

    @property
    def step_rows(self) -> int:
        return sum(segment.step_rows for segment in self.segments)


def overview(folder: StoragePath, info: SessionInfo) -> SessionOverview:
    """Look at a session's files. Damage goes to its ``faults``; UnreachableError is raised."""
    result = SessionOverview(info)
    try:
        inside = {entry.name: entry.stat(follow_symlinks=False) for entry in places.entries(folder)}
    except OSError as error:
        if exhausted(error):
            raise
        result.faults.append(f"{folder}: {error.strerror}")
        return result
    result.size_bytes = sum(stat.st_size for stat in inside.values())
    result.written = max((stat.st_mtime for stat in inside.values()), default=0.0)
    # Journals first: what is sealed meanwhile is in the manifest, which is read later.
    journals = {int(match[1]): name for name in sorted(inside) if (match := JOURNAL_PATTERN.fullmatch(name))}
    open_segments = {seq: _journal(folder / name, info, seq, result) for seq, name in journals.items()}
    manifest = _manifest(folder, info, inside, result)
    result.closed = result.closed or manifest.closed is not None
    listed = {file.name for entry in manifest.entries.values() for file in entry.files.values()}
    for name in inside:
        match = SEGMENT_PATTERN.fullmatch(name)
        if match and name not in listed and manifest.entry_of(int(match[2])) is None:
            if int(match[2]) in journals:
                continue
            result.faults.append(f"{folder / name}: the session's manifest does not list it")
    for seq, entry in manifest.entries.items():
        open_segments.pop(seq, None)
        if entry.thinned is not None:
            for covered in [other for other in open_segments if seq < other <= entry.last_seq]:
                del open_segments[covered]
        for file in entry.files.values():
            if file.name not in inside and seq not in journals and not (folder / file.name).exists():
                result.faults.append(f"{folder / file.name}: it is missing, although the manifest lists it")
            elif file.name in inside and inside[file.name].st_size != file.bytes:
                result.faults.append(
                    f"{folder / file.name}: it has {inside[file.name].st_size} bytes; the manifest says "
                    f"{file.bytes}"
                )
        retired = entry.thinned.step_rows if entry.thinned is not None and not entry.step_rows else 0
        if entry.step_rows or retired:
            ep_size = 0 if entry.shape is None else entry.shape.ep_size
            rows = entry.step_rows or retired
            # Files of a segment that was a journal a moment ago may not have their names yet.
            times = _sealed_times(ParquetSegment(folder, info, entry), being_sealed=seq in journals)
            result.segments.append(
                SegmentOverview(entry.first_step, entry.last_step, rows, retired, ep_size, entry.tier, times)
            )
    result.segments += [segment for segment in open_segments.values() if segment is not None]
    return result


def _sealed_times(segment: ParquetSegment, *, being_sealed: bool) -> Callable[[], tuple[int, int]]:
    def read() -> tuple[int, int]:
        if (being_sealed or not segment.step_rows) and segment.entry.times is not None:
            return segment.entry.times
        rows = segment.steps()
        return _ends(rows, rows)

    return read


def _ends(first: StepRows, last: StepRows) -> tuple[int, int]:
    return int(first.time_ns[0]), int(last.time_ns[-1])


def _manifest(
    folder: StoragePath, info: SessionInfo, inside: Mapping[str, os.stat_result], result: SessionOverview
) -> Manifest:
    path = folder / MANIFEST_FILE
    if MANIFEST_FILE not in inside:
        sealed = any(SEGMENT_PATTERN.fullmatch(name) for name in inside)
        return rebuilt_manifest(folder, info) if sealed else Manifest()
    try:
        require_regular(path)
        with path.open("rb") as file:
            manifest = Manifest.read_headers(file, file.seek(0, 2), info.session_id)
    except (OSError, FormatError) as error:
        if exhausted(error):
            raise
        manifest = Manifest(fault=(isinstance(error, OSError) and error.strerror) or str(error))
    if manifest.fault is not None:
        result.faults.append(f"{path}: {manifest.fault}")
    return manifest


def _journal(
    path: StoragePath, info: SessionInfo, seq: int, result: SessionOverview
) -> SegmentOverview | None:
    """An open segment; None if it has no step yet."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            found = [(start, header) for start, _, header in frames.scan_headers(file, size)]
            if not found:
                if frames.damaged_at(file, size, 0):
                    result.faults.append(f"{path}: damaged from byte 0 on")
                return None
            session_of(frames.frame_at(file, size, 0), seq)
            result.closed |= any(header["kind"] == "closed" for _, header in found)
            steps = [(start, header) for start, header in found if header["kind"] == "steps"]
            if not steps:
                return None
            first, last = (step_rows(frames.frame_at(file, size, steps[i][0])) for i in (0, -1))
            sizes = [header["ep_size"] for _, header in found if header["kind"] == "loads"]
            return SegmentOverview(
                int(first.step[0]),
                int(last.step[-1]),
                sum(frames.steps_in(header) for _, header in steps),
                0,
                max(sizes, default=0),
                Tier.FULL,
                lambda: _ends(first, last),
            )
    except FileNotFoundError:  # it was sealed meanwhile, and is in the manifest
        return None
    except (OSError, FormatError, KeyError, TypeError, IndexError, ValueError) as error:
        if exhausted(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        result.faults.append(f"{path}: {reason}")
        return None
