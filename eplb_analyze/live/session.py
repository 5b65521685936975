"""Follows one session while it is written: each call reads only what was appended since the last one.

A journal that was read to its end is not read again when it is sealed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.live.tail import GrowingFile
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_dump.format.frames import Frame, steps_in
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import (
    Int64,
    PlacementRows,
    Shape,
    StepRows,
    check_load_steps,
    check_placements,
    load_entry,
    load_shape,
    placement_rows,
    session_of,
    step_rows,
)
from eplb_dump.format.manifest import Manifest, SealedSegment
from eplb_dump.format.schema import (
    JOURNAL_PATTERN,
    MANIFEST_FILE,
    MAX_LAYERS,
    FormatError,
    Status,
    Tier,
    journal_name,
)
from eplb_dump.format.session import SessionInfo

#: If a journal grew by more than this since the last look, only the wanted steps at its end are read.
MAX_NEW_BYTES = 64 << 20
#: How many steps are searched, as a multiple of the wanted ones, if a rank recorded few of them.
IDLE_FACTOR = 16
#: What damaged files and file systems raise.
READ_ERRORS = (OSError, FormatError, LookupError, TypeError, ValueError, AttributeError)


@frozen
class Batch:
    """New steps of one rank: one committed batch of its journal, or a sealed segment.

    Attributes:
        rows: all new steps, recorded or not.
        placements: the new placements; layers are indices.
        shape: the shape of the loads; None if there are none.
        step: int64 ``[n]``, the recorded steps.
        load: integers ``[n, num_moe_layers, slots]``, this writer's tokens for each slot, or for each EP rank
            if the steps come from a sealed segment, which holds sums of ranks.
        remains: whether the placements are what remains of steps that are gone.
    """

    rows: StepRows
    placements: list[PlacementRows]
    shape: Shape | None
    step: Int64
    load: npt.NDArray[Any]
    remains: bool = False


class FollowedSession:
    """The files of a session and how far each was read.

    Attributes:
        closed: True if the writer closed the session.
        fault: the file that could not be read at the last look and why; None if there was no problem.
        last_retired: the last of the steps that were retired before it was followed; -1 if there are none.
    """

    def __init__(self, folder: Path, info: SessionInfo, want: int) -> None:
        """``want``: how many of the newest recorded steps the caller needs at most."""
        self.folder = folder
        self.info = info
        self.closed = False
        self.last_retired = -1
        self._want = want
        self.fault: str | None = None
        self._manifest = GrowingFile(folder / MANIFEST_FILE)
        self._journals: dict[int, _Journal] = {}
        #: Journals that a power cut brought back: their sealed segments are read.
        self._superseded: set[int] = set()
        #: Sealed segments still to read, and how many recorded steps to skip in each.
        self._sealed: dict[int, SealedSegment] = {}
        self._skip: dict[int, int] = {}
        #: The first segment with wanted steps.
        self._first = 0
        #: The segments that the manifest listed when it was read.
        self._listed: set[int] = set()
        #: Whether the next look reports the placements of older segments.
        self._old_placements = False
        #: The journals from :meth:`begin`.
        self._old_journals: dict[int, _Journal] = {}

    def begin(self, want: int, *, placements: bool = False) -> int:
        """Skip all but the last ``want`` recorded steps. Reads little more than headers.

        Args:
            placements: whether the first look also reports the placements in force at its first step, and
                those of retired steps.

        Returns:
            Roughly how many recorded steps the first look will find. That look reports unreadable files.
        """
        found = seen = 0
        with suppress(*READ_ERRORS):
            self._open_new_journals()
            # What was thinned after the writer was closed comes after its last frame.
            listed = self._headers()
            self._manifest.at = max((end for _, end, _ in listed.values()), default=0)
            self._listed = {*listed}
            self._open_new_journals()
            for seq in [*self._journals]:
                if any(
                    h["kind"] == "thinned" and s <= seq <= _last_seq(h) for s, (_, _, h) in listed.items()
                ):
                    self._drop_journal(seq)  # a power cut brought it back
                elif seq in listed:
                    entry = SealedSegment.from_frame(self._manifest.frame_at(listed[seq][0]))
                    if self._supersedes(entry, self._journals[seq].count_rows()):
                        self._drop_journal(seq)
            self._old_journals = dict(self._journals)
            for seq in sorted({*self._journals, *listed}, reverse=True):
                if found >= want or seen >= IDLE_FACTOR * want:
                    break
                self._first = seq
                if seq in self._journals:
                    found += self._journals[seq].skip_to_last(want - found)
                    continue
                entry = SealedSegment.from_frame(self._manifest.frame_at(listed[seq][0]))
                if not entry.step_rows and entry.thinned is not None:
                    seen += entry.thinned.step_rows // self.info.interval
                    self.last_retired = max(self.last_retired, entry.last_step)
                    if placements:
                        self._sealed[seq] = entry
                    continue
                self._sealed[seq] = entry
                self._skip[seq] = max(0, entry.recorded - (want - found))
                found += entry.recorded
                # An idle rank records nothing while others do.
                seen += entry.step_rows // self.info.interval
            for seq in [seq for seq in self._journals if seq < self._first]:
                self._journals.pop(seq).close()
            self._old_placements = placements
        return found

    def look(self) -> Iterator[Batch]:
        """What was appended since the last look, in order. Problems are stored in ``fault``."""
        self.fault = None
        try:
            self._open_new_journals()
            yield from self._placements_before_first()
            self._read_manifest()
            # If a new segment is already sealed but its journal still exists, the journal is read.
            self._open_new_journals()
        except (OSError, FormatError, DamagedSegmentError) as error:
            self.fault = _describe_error(self.folder, error)
        for seq in sorted({*self._journals, *self._sealed}):
            if seq in self._journals:
                yield from self._read_journal(seq)
            if seq in self._sealed and seq not in self._journals:
                yield from self._read_sealed(self._sealed.pop(seq))

    def rows_before(self, step: int) -> Iterator[StepRows]:
        """Rows that :meth:`begin` skipped, newest first, back to the first one after ``step``.

        Reads only step rows, and of the sealed segments only the one with that step. Stops at the first
        problem, because no figure depends on these rows.
        """
        with suppress(*READ_ERRORS, DamagedSegmentError):
            listed = self._headers()
            old = [seq for seq in {*self._old_journals, *listed} if seq <= self._first]
            for seq in sorted(old, reverse=True):
                if seq in self._old_journals:
                    if seq < self._first:
                        self._old_journals[seq].skip_to_last(0)
                    yield from self._old_journals[seq].skipped_rows()
                elif seq - 1 not in listed or listed[seq - 1][2]["last_step"] <= step:
                    entry = SealedSegment.from_frame(self._manifest.frame_at(listed[seq][0]))
                    yield ParquetSegment(self.folder, self.info, entry).steps()

    def _open_new_journals(self) -> None:
        """Open new journals, so that they can be read to their end even after they are deleted."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = JOURNAL_PATTERN.fullmatch(entry.name)
                seq = int(match[1]) if match else -1
                wanted = seq >= self._first and seq not in self._superseded and seq not in self._journals
                if wanted and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        journal = _Journal(self.folder, self.info, seq, self._want)
                        journal.open()
                        self._journals[seq] = journal

    def _headers(self) -> dict[int, tuple[int, int, dict[str, Any]]]:
        """The first byte, the end and the header of each segment's entry, without its sums."""
        listed: dict[int, tuple[int, int, dict[str, Any]]] = {}
        with suppress(FileNotFoundError):
            for start, end, header in self._manifest.scan_headers(0):
                self.closed = self.closed or header["kind"] == "closed"
                if header["kind"] in ("sealed", "thinned"):
                    seq, last = int(header["seq"]), _last_seq(header)
                    if last > seq:
                        listed = {other: item for other, item in listed.items() if not seq < other <= last}
                    listed[seq] = start, end, header
        return listed

    def _read_manifest(self) -> None:
        new = Manifest(session_id=self.info.session_id)
        with suppress(FileNotFoundError):
            self._manifest.open()
        if self._manifest.replaced:  # without entries that others had replaced
            self._manifest.read_from_start()
        try:
            start = self._manifest.at
            for frame in self._manifest.new_frames():
                new.add(frame)
                self._manifest.at = start + frame.end
        except FileNotFoundError:
            pass
        finally:  # also after damage: what was read before it is not read again
            for entry in new.entries.values():
                self._list(entry)
            self.closed = self.closed or new.closed is not None

    def _list(self, entry: SealedSegment) -> None:
        """Take in an entry of the manifest: of a segment that is new, or of which less is kept now."""
        waiting = [seq for seq in self._sealed if entry.seq <= seq <= entry.last_seq]
        if entry.thinned is None or not waiting:
            # A segment before the first wanted one can still be sealed late.
            if entry.seq not in self._listed and entry.seq >= self._first:
                self._sealed[entry.seq] = entry
        else:
            for seq in waiting:
                del self._sealed[seq]
            self._sealed[entry.seq] = entry
        self._listed.add(entry.seq)

    def _read_journal(self, seq: int) -> Iterator[Batch]:
        journal = self._journals[seq]
        try:
            yield from journal.batches()
        except READ_ERRORS as error:
            self.fault = _describe_error(journal.path, error)
        self.closed = self.closed or journal.closed
        entry = self._sealed.get(seq)
        # A journal sealed since the manifest was read stays: the next look finds it in the manifest.
        if entry is not None and (journal.removed or self._supersedes(entry, journal.rows)):
            self._drop_journal(seq)
            if journal.rows >= entry.step_rows:
                del self._sealed[seq]
            else:  # another machine deleted it before its end was read
                self._skip[seq] = journal.recorded
                self.fault = None

    def _supersedes(self, entry: SealedSegment, rows: int) -> bool:
        """Whether to read a sealed segment rather than the journal beside it, which has so many rows."""
        return rows < entry.step_rows and not ParquetSegment(self.folder, self.info, entry).damage()

    def _drop_journal(self, seq: int) -> None:
        journal = self._journals.pop(seq)
        self._old_journals.pop(seq, None)  # an open file keeps its disk space
        if not journal.removed:
            self._superseded.add(seq)

    def _read_sealed(self, entry: SealedSegment) -> Iterator[Batch]:
        """Read a sealed segment whose journal was not read to its end."""
        segment = ParquetSegment(self.folder, self.info, entry)
        skip = self._skip.pop(entry.seq, 0)
        try:
            if entry.thinned is not None and not entry.step_rows:
                yield _old_placements(segment)
                return
            recorded = segment.load_steps()
            rows, placements = segment.steps(), [segment.placements()]
            # A damaged segment can have recorded rows without loads.
            rows = rows.select((rows.status != Status.RECORDED) | np.isin(rows.step, recorded))
            if skip:
                rows = rows.select(rows.step > recorded[min(skip, len(recorded)) - 1])
            if entry.shape is None or skip >= len(recorded):
                yield _without_loads(rows, placements)
                return
            parts = [load[:, skip:] for _, load in segment.rank_loads(0, entry.shape.num_moe_layers)]
            load = np.concatenate(parts, dtype=np.int64).transpose(1, 0, 2)
            yield Batch(rows, placements, entry.shape, recorded[skip:], load)
        except DamagedSegmentError as fault:
            listed = self._headers().get(entry.seq) if fault.missing else None
            if listed is None or listed[2]["kind"] != "thinned":
                self.fault = str(fault)
                return
            # It was thinned since the manifest was read: the next look has what is left of it.
            self._sealed[entry.seq] = SealedSegment.from_frame(self._manifest.frame_at(listed[0]))
            self._skip[entry.seq] = skip

    def _placements_before_first(self) -> Iterator[Batch]:
        """The newest two placements of each layer in the skipped segments."""
        if not self._old_placements:
            return
        newer: list[Batch] = []
        stated: Counter[int] = Counter()
        listed = self._headers()
        older = [seq for seq in listed if seq < self._first and "placements" in listed[seq][2]["files"]]
        self._old_placements = False
        for seq in sorted(older, reverse=True):
            entry = SealedSegment.from_frame(self._manifest.frame_at(listed[seq][0]))
            named = all((self.folder / file.name).exists() for file in entry.files.values())
            if not named and (self.folder / journal_name(entry.seq)).exists():
                self._old_placements = True  # it is being sealed: the next look will have it
                return
            batch = _old_placements(ParquetSegment(self.folder, self.info, entry))
            newer.append(batch)
            stated.update(batch.placements[0].layer.tolist())
            layers = entry.shape.num_moe_layers if entry.shape is not None else MAX_LAYERS
            if len(stated) >= layers and min(stated.values()) > 1:
                break
        yield from newer[::-1]


class _Journal(GrowingFile):
    """A journal that is read one committed batch at a time.

    Attributes:
        rows, recorded: how many steps, and recorded steps, are before ``at``.
        closed: True if its last frame was read and marks the writer as closed.
    """

    def __init__(self, folder: Path, info: SessionInfo, seq: int, want: int) -> None:
        super().__init__(folder / journal_name(seq))
        self.rows = self.recorded = 0
        self.closed = False
        self._info = info
        self._seq = seq
        self._want = want
        #: Bytes at which skipped session and placements frames start, and skipped steps frames.
        self._skipped: list[int] = []
        self._skipped_steps: list[int] = []

    def skip_to_last(self, want: int) -> int:
        """Skip all but the last ``want`` recorded steps. Returns roughly how many are left to read."""
        found = [*self.scan_headers()]
        left, cut = 0, found[-1][1] if found else self.at
        for start, _, header in reversed(found):
            if left >= want:
                break
            if header["kind"] == "loads":
                left += steps_in(header)
                cut = start
        before = [item for item in found if item[0] < cut]
        if left < want or not before:
            return max(left, sum(steps_in(h) for _, _, h in found if h["kind"] == "steps"))
        for start, _, header in before:
            self.rows += steps_in(header) if header["kind"] == "steps" else 0
            self.recorded += steps_in(header) if header["kind"] == "loads" else 0
            if header["kind"] in ("session", "placements"):
                self._skipped.append(start)
        self._skipped_steps = [start for start, _, header in before if header["kind"] == "steps"]
        self.at = cut
        return left

    def count_rows(self) -> int:
        """How many steps are in it, by the headers of its frames."""
        return sum(steps_in(header) for _, _, header in self.scan_headers() if header["kind"] == "steps")

    def skipped_rows(self) -> Iterator[StepRows]:
        """The skipped step rows, newest first. Raises OSError, FormatError, KeyError."""
        for start in reversed(self._skipped_steps):
            yield step_rows(self.frame_at(start))

    def batches(self) -> Iterator[Batch]:
        """The appended batches. Raises OSError, FormatError, KeyError, TypeError, IndexError."""
        _, size = self.open()
        if size - self.at > MAX_NEW_BYTES:
            self.skip_to_last(self._want)
        skipped, self._skipped = [self.frame_at(start) for start in self._skipped], []
        for frame in skipped:
            if frame.kind == "session":
                self._check_owner(frame)
        before = [self._placements(frame) for frame in skipped if frame.kind == "placements"]
        if before:
            yield _without_loads(StepRows.concat([]), before)
        start = self.at
        placements: list[PlacementRows] = []
        loads: list[tuple[Int64, Shape, npt.NDArray[Any]]] = []
        for frame in self.new_frames():
            if frame.kind == "session":
                self._check_owner(frame)
                self.at = start + frame.end
            elif frame.kind == "placements":
                placements.append(self._placements(frame))
            elif frame.kind == "loads":
                loads.append(self._loads(frame, loads[-1][1] if loads else None))
            elif frame.kind == "steps":  # it commits the frames before it
                batch = _batch(step_rows(frame), placements, loads)
                self.at = start + frame.end
                self.rows += len(batch.rows.step)
                self.recorded += len(batch.step)
                placements, loads = [], []
                yield batch
            elif frame.kind == "closed":
                self.closed = True
                self.at = start + frame.end
            # Other kinds come from a newer minor version, which only adds.

    def _check_owner(self, frame: Frame) -> None:
        if session_of(frame, self._seq).session_id != self._info.session_id:
            raise FormatError("its first frame does not introduce this journal")

    def _placements(self, frame: Frame) -> PlacementRows:
        rows = placement_rows(frame)
        check_placements(rows, self._info, None)
        return rows

    def _loads(self, frame: Frame, earlier: Shape | None) -> tuple[Int64, Shape, npt.NDArray[Any]]:
        step, _, _, sizes = load_entry(frame)
        shape = load_shape(sizes, self._info, earlier)
        return step, shape, frame.arrays["load"].transpose(1, 0, 2)


def _batch(
    rows: StepRows,
    placements: list[PlacementRows],
    loads: list[tuple[Int64, Shape, npt.NDArray[Any]]],
) -> Batch:
    if not loads:
        batch = _without_loads(rows, placements)
    else:
        steps, shapes, parts = zip(*loads, strict=True)
        load = parts[0] if len(parts) == 1 else np.concatenate(parts)
        batch = Batch(rows, placements, shapes[0], np.concatenate(steps), load)
    check_load_steps(batch.step, rows)
    return batch


def _without_loads(rows: StepRows, placements: list[PlacementRows]) -> Batch:
    return Batch(rows, placements, None, np.empty(0, np.int64), np.empty((0, 0, 0), np.int64))


def _old_placements(segment: ParquetSegment) -> Batch:
    """The placements of a segment whose steps are not read. Raises DamagedSegmentError."""
    placements = [segment.placements()]
    batch = _without_loads(StepRows.concat([]), placements)
    return replace(batch, remains=segment.entry.tier is Tier.GONE)


def _last_seq(header: dict[str, Any]) -> int:
    """The last of the segments of a manifest entry."""
    return int(header.get("last_seq", header["seq"]))


def _describe_error(path: Path, error: Exception) -> str:
    if isinstance(error, DamagedSegmentError):
        return str(error)
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return f"{path}: {reason}"
