"""One session followed while it is written: every look reads only what was appended since the last.

What was read of a journal is not read again when it is sealed. What the ranks' parts add up to is for
:mod:`eplb_analyze.live.window`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.live.tail import GrowingFile
from eplb_analyze.reader.parquet_segment import ParquetSegment
from eplb_analyze.reader.segments import DamagedSegmentError
from eplb_dump.format.frames import Frame
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
    journal_name,
)
from eplb_dump.format.session import SessionInfo

#: Where more than this is new (nobody looked for long), only its end is read.
SKIM_BYTES = 64 << 20
#: Of a rank that idles so many times the steps that are asked for are looked through.
IDLE = 16
#: What files that are not as they should be, and file systems, raise.
_WRONG = (OSError, FormatError, LookupError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Batch:
    """What a writer appended at once, or had sealed: the part of one rank.

    Attributes:
        rows: the steps it saw.
        placements: those that it stated; layers are indices.
        shape: of the loads; None where there are none.
        step: int64 [n], the recorded steps whose loads are here.
        rank_load: int64 ``[n, num_moe_layers, ep_size]``, this writer's tokens for each EP rank.
    """

    rows: StepRows
    placements: list[PlacementRows]
    shape: Shape | None
    step: Int64
    rank_load: Int64


class FollowedSession:
    """A session's files, and how far each was read.

    Attributes:
        closed: whether the writer ended in order.
        fault: what could not be read at the last look, naming the file; None: nothing.
    """

    def __init__(self, folder: Path, info: SessionInfo, want: int) -> None:
        """``want``: no more recorded steps than these last ones are ever needed at once."""
        self.folder = folder
        self.info = info
        self.closed = False
        self._want = want
        self.fault: str | None = None
        self._manifest = GrowingFile(folder / MANIFEST_FILE)
        self._journals: dict[int, _Journal] = {}
        #: Listed in the manifest and not read; of some the first so many recorded steps are left out.
        self._sealed: dict[int, SealedSegment] = {}
        self._skip: dict[int, int] = {}
        #: Segments before this one are older than what was asked for.
        self._first = 0
        #: Where entries of older segments that state placements begin in the manifest.
        self._earlier: list[int] = []
        #: Journals that `begin` found, and headers of the manifest's entries with where they begin.
        self._found: dict[int, _Journal] = {}
        self._listed: dict[int, tuple[int, dict[str, Any]]] = {}

    def begin(self, want: int, *, placements: bool = False) -> int:
        """Leave out what is older than the last ``want`` recorded steps; little but headers is read.

        Args:
            placements: have the first look also state the placements in force there.

        Returns:
            About how many steps the first look will find. What cannot be read is for it to tell.
        """
        found = seen = 0
        with suppress(*_WRONG):
            self._take_up_journals()
            listed = self._skim_manifest()
            self._take_up_journals()
            self._found, self._listed = dict(self._journals), listed
            for seq in sorted({*self._journals, *listed}, reverse=True):
                if found >= want or seen >= IDLE * want:
                    break
                self._first = seq
                if seq in self._journals:
                    found += self._journals[seq].leave_out(want - found)
                    continue
                entry = SealedSegment.from_frame(self._manifest.frame(listed[seq][0]))
                self._sealed[seq] = entry
                self._skip[seq] = max(0, _recorded(entry) - (want - found))
                found += _recorded(entry)
                # A rank that idles records nothing while others do.
                seen += entry.files["steps"].rows // self.info.interval
            for seq in [seq for seq in self._journals if seq < self._first]:
                self._journals.pop(seq).close()
            if placements:
                older = sorted(seq for seq in listed if seq < self._first)
                self._earlier = [listed[s][0] for s in older if "placements" in listed[s][1]["files"]]
        return found

    def look(self) -> Iterator[Batch]:
        """What was appended since the last look, in order. What cannot be read goes to ``fault``."""
        self.fault = None
        try:
            self._take_up_journals()
            yield from self._placements_before()
            self._read_manifest()
            # Of what began meanwhile and is listed already, the journal is the truth if it is still there.
            self._take_up_journals()
        except (OSError, FormatError, DamagedSegmentError) as error:
            self.fault = _reason(self.folder, error)
        for seq in sorted({*self._journals, *self._sealed}):
            if seq in self._journals:
                yield from self._read_journal(seq)
            if seq in self._sealed and seq not in self._journals:
                yield from self._read_sealed(self._sealed.pop(seq))

    def rows_before(self, step: int) -> Iterator[StepRows]:
        """Rows that :meth:`begin` left out, back to the first one after ``step``, the newest first.

        Nothing but rows of steps is read, and of sealed segments only the one that holds that step. What
        cannot be read ends them: no figure is asked for there.
        """
        newest_first = sorted((s for s in {*self._found, *self._listed} if s <= self._first), reverse=True)
        with suppress(*_WRONG, DamagedSegmentError):
            for seq in newest_first:
                if seq in self._found:
                    if seq < self._first:
                        self._found[seq].leave_out(0)
                    yield from self._found[seq].rows_left_out()
                elif seq - 1 not in self._listed or self._listed[seq - 1][1]["last_step"] <= step:
                    entry = SealedSegment.from_frame(self._manifest.frame(self._listed[seq][0]))
                    yield ParquetSegment(self.folder, self.info, entry).steps()

    def _take_up_journals(self) -> None:
        """Open those that are new: so they can be read to their end, also when they are gone."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = JOURNAL_PATTERN.fullmatch(entry.name)
                seq = int(match[1]) if match else -1
                if seq >= self._first and seq not in self._journals and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        journal = _Journal(self.folder, self.info, seq, self._want)
                        journal.open()
                        self._journals[seq] = journal

    def _skim_manifest(self) -> dict[int, tuple[int, dict[str, Any]]]:
        """Where each sealed segment's entry begins, and its header; its sums stay where they are."""
        listed: dict[int, tuple[int, dict[str, Any]]] = {}
        with suppress(FileNotFoundError):
            for start, end, header in self._manifest.skim():
                if header["kind"] == "sealed":
                    listed[int(header["seq"])] = start, header
                elif header["kind"] == "closed":
                    break  # it is for the first look
                self._manifest.at = end
        return listed

    def _read_manifest(self) -> None:
        new = Manifest(session_id=self.info.session_id)
        try:
            start = self._manifest.at
            for frame in self._manifest.new():
                new.add(frame)
                self._manifest.at = start + frame.end
        except FileNotFoundError:
            pass
        finally:  # also after damage: what was read before it is not read again
            # A segment before the first wanted one can still be sealed late.
            self._sealed |= {seq: entry for seq, entry in new.entries.items() if seq >= self._first}
            self.closed = self.closed or new.closed is not None

    def _read_journal(self, seq: int) -> Iterator[Batch]:
        journal = self._journals[seq]
        try:
            yield from journal.batches()
        except _WRONG as error:
            self.fault = _reason(journal.path, error)
        entry = self._sealed.get(seq)
        # One that was sealed since the manifest was read is kept in mind: the next look will find it listed.
        if journal.removed and entry is not None:
            del self._journals[seq]
            self._found.pop(seq, None)  # as long as it is open, it takes up space
            if journal.rows >= entry.files["steps"].rows:
                del self._sealed[seq]
            else:  # another machine removed it before its end was read
                self._skip[seq] = journal.recorded
                self.fault = None

    def _read_sealed(self, entry: SealedSegment) -> Iterator[Batch]:
        """A sealed segment whose journal was not read, or not to its end."""
        segment = ParquetSegment(self.folder, self.info, entry)
        skip = self._skip.pop(entry.seq, 0)
        try:
            recorded = segment.load_steps()
            rows, placements = segment.steps(), [segment.placements()]
            # In a damaged segment, rows can be recorded whose loads are not there.
            rows = rows.select((rows.status != Status.RECORDED) | np.isin(rows.step, recorded))
            if skip:
                rows = rows.select(rows.step > recorded[min(skip, len(recorded)) - 1])
            if entry.shape is None or skip >= len(recorded):
                yield _without_loads(rows, placements)
                return
            parts = [load[:, skip:] for _, load in segment.rank_loads(0, entry.shape.num_moe_layers)]
            load = np.concatenate(parts).transpose(1, 0, 2)
            yield Batch(rows, placements, entry.shape, recorded[skip:], load)
        except DamagedSegmentError as fault:
            self.fault = str(fault)

    def _placements_before(self) -> Iterator[Batch]:
        """Of each layer the newest two statements in the segments older than what was asked for."""
        newer: list[PlacementRows] = []
        stated: Counter[int] = Counter()
        earlier, self._earlier = self._earlier, []
        for start in reversed(earlier):
            entry = SealedSegment.from_frame(self._manifest.frame(start))
            if (self.folder / journal_name(entry.seq)).exists():
                self._earlier = earlier  # it is being sealed: the next look will have it
                return
            rows = ParquetSegment(self.folder, self.info, entry).placements()
            newer.append(rows)
            stated.update(rows.layer.tolist())
            layers = entry.shape.num_moe_layers if entry.shape is not None else MAX_LAYERS
            if len(stated) >= layers and min(stated.values()) > 1:
                break
        if newer:
            yield _without_loads(StepRows.concat([]), newer[::-1])


class _Journal(GrowingFile):
    """A journal as batches.

    Attributes:
        rows, recorded: how many steps, and recorded ones, are before ``at``.
    """

    def __init__(self, folder: Path, info: SessionInfo, seq: int, want: int) -> None:
        super().__init__(folder / journal_name(seq))
        self.rows = self.recorded = 0
        self._info = info
        self._seq = seq
        self._want = want
        #: Where what was left out states placements, and where it lists steps.
        self._left_out: list[int] = []
        self._steps_left_out: list[int] = []

    def leave_out(self, want: int) -> int:
        """Move on to the last ``want`` recorded steps; about how many steps are left to read."""
        found = [*self.skim()]
        left, cut = 0, found[-1][1] if found else self.at
        for start, _, header in reversed(found):
            if left >= want:
                break
            if header["kind"] == "loads":
                left += _steps_in(header)
                cut = start
        before = [item for item in found if item[0] < cut]
        if left < want or not before:
            return max(left, sum(_steps_in(h) for _, _, h in found if h["kind"] == "steps"))
        for start, _, header in before:
            self.rows += _steps_in(header) if header["kind"] == "steps" else 0
            self.recorded += _steps_in(header) if header["kind"] == "loads" else 0
            if header["kind"] in ("session", "placements"):
                self._left_out.append(start)
        self._steps_left_out = [start for start, _, header in before if header["kind"] == "steps"]
        self.at = cut
        return left

    def rows_left_out(self) -> Iterator[StepRows]:
        """The newest first. Raises OSError, FormatError, KeyError."""
        for start in reversed(self._steps_left_out):
            yield step_rows(self.frame(start))

    def batches(self) -> Iterator[Batch]:
        """What was appended. Raises OSError, FormatError, KeyError, TypeError, IndexError."""
        _, size = self.open()
        if size - self.at > SKIM_BYTES:
            self.leave_out(self._want)
        left_out, self._left_out = [self.frame(start) for start in self._left_out], []
        for frame in left_out:
            if frame.kind == "session":
                self._check_owner(frame)
        before = [self._placements(frame) for frame in left_out if frame.kind == "placements"]
        if before:
            yield _without_loads(StepRows.concat([]), before)
        start = self.at
        placements: list[PlacementRows] = []
        loads: list[tuple[Int64, Shape, Int64]] = []
        for frame in self.new():
            if frame.kind == "session":
                self._check_owner(frame)
                self.at = start + frame.end
            elif frame.kind == "placements":
                placements.append(self._placements(frame))
            elif frame.kind == "loads":
                loads.append(self._loads(frame, loads[-1][1] if loads else None))
            elif frame.kind == "steps":  # it commits what came before it
                batch = _batch(step_rows(frame), placements, loads)
                self.at = start + frame.end
                self.rows += len(batch.rows.step)
                self.recorded += len(batch.step)
                placements, loads = [], []
                yield batch
            # Other kinds come from a newer minor version, which only adds.

    def _check_owner(self, frame: Frame) -> None:
        if session_of(frame, self._seq).session_id != self._info.session_id:
            raise FormatError("its first frame does not introduce this journal")

    def _placements(self, frame: Frame) -> PlacementRows:
        rows = placement_rows(frame)
        check_placements(rows, self._info, None)
        return rows

    def _loads(self, frame: Frame, earlier: Shape | None) -> tuple[Int64, Shape, Int64]:
        step, _, _, sizes = load_entry(frame)
        shape = load_shape(sizes, self._info, earlier)
        slots = frame.arrays["load"].reshape(shape.num_moe_layers, len(step), shape.ep_size, -1)
        return step, shape, np.einsum("lnrs->nlr", slots, dtype=np.int64)


def _batch(rows: StepRows, placements: list[PlacementRows], loads: list[tuple[Int64, Shape, Int64]]) -> Batch:
    if not loads:
        batch = _without_loads(rows, placements)
    else:
        steps, shapes, sums = zip(*loads, strict=True)
        load = sums[0] if len(sums) == 1 else np.concatenate(sums)
        batch = Batch(rows, placements, shapes[0], np.concatenate(steps), load)
    check_load_steps(batch.step, rows)
    return batch


def _without_loads(rows: StepRows, placements: list[PlacementRows]) -> Batch:
    return Batch(rows, placements, None, np.empty(0, np.int64), np.empty((0, 0, 0), np.int64))


def _steps_in(header: dict[str, Any]) -> int:
    """How many steps a frame holds, by its header."""
    return int(header["arrays"]["step"][1][0])


def _recorded(entry: SealedSegment) -> int:
    loads = entry.files.get("loads")
    return 0 if loads is None or entry.shape is None else loads.rows // entry.shape.num_moe_layers


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, DamagedSegmentError):
        return str(error)
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return f"{path}: {reason}"
