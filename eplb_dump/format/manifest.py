"""The manifest of a session: which segments are sealed, their files, checksums and sums."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from eplb_dump.format import frames
from eplb_dump.format.files import fsync_folder, replace_file
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape, closed_frame
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    MAX_NUMBER,
    SCHEMAS,
    FormatError,
    Tier,
    segment_name,
)
from eplb_dump.format.session import SessionInfo


@frozen
class SealedFile:
    """One table's file of a sealed segment. The Parquet footer has no checksum of its own."""

    name: str
    bytes: int
    rows: int
    footer_crc32: int


@frozen
class ExpertSums:
    """Each slot's tokens summed over steps, for readers that need no more than that of ``loads``.

    A row covers a layer's steps from ``step`` to the layer's next row. A new row begins when the layer's
    placement changes, so that each slot holds one expert in all steps of a row.
    """

    #: Index of the MoE layer, from 0: int32 [n].
    layer: Int32
    step: Int64
    #: int64 [n, num_physical_experts].
    load: Int64

    def read(self) -> ExpertSums:
        """Itself; what :class:`StoredSums` has to read."""
        return self

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Any]:
        return {"sum_layer": self.layer, "sum_step": self.step, "sum_load": self.load}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], shape: Shape | None) -> ExpertSums | None:
        """None if the writer wrote none. Raises FormatError."""
        if shape is None or "sum_load" not in arrays:
            return None
        sums = cls(arrays["sum_layer"], arrays["sum_step"], arrays["sum_load"])
        n = sums.layer.size
        rows = (n, shape.num_physical_experts)
        if sums.layer.shape == sums.step.shape == (n,) and sums.load.shape == rows:
            first = np.flatnonzero(np.diff(sums.layer, prepend=-1))
            in_order = np.array_equal(sums.layer[first], np.arange(shape.num_moe_layers))
            if in_order and sums.load.min(initial=0) >= 0:
                return sums
        raise FormatError("its sums for a sealed segment contradict the segment's shape")


@frozen
class StoredSums:
    """Where a manifest has the sums of a segment. Those of a long run would take hundreds of megabytes."""

    file: frames.NamedFile
    #: The segment.
    seq: int
    #: The frame's bytes in the file.
    start: int
    end: int
    shape: Shape
    nbytes: int

    def read(self) -> ExpertSums:
        """Read them, verified. Raises OSError, and FormatError if they are not there any more."""
        with self.file.open("rb") as file:
            frame = frames.frame_at(file, self.end, self.start)
        sums = ExpertSums.from_arrays(frame.arrays, self.shape)
        if sums is None or frame.header.get("seq") != self.seq:
            raise FormatError("the manifest was replaced")
        return sums


@frozen
class Thinned:
    """What became of a segment, or of several consecutive ones, of which not everything is kept.

    Attributes:
        tier: what is kept.
        last_seq: the last of the segments, which have one entry together.
        step_rows, recorded: how many rows of ``steps`` they had, and how many steps with loads.
        reason: why: ``budget``, ``age``, ``space`` or ``prune``.
    """

    tier: Tier
    last_seq: int
    step_rows: int
    recorded: int
    reason: str


@frozen
class SealedSegment:
    """The manifest's entry of one sealed segment, or of several that were thinned together."""

    seq: int
    first_step: int
    last_step: int
    shape: Shape | None
    files: dict[str, SealedFile]
    sums: ExpertSums | StoredSums | None = None
    #: The least and the greatest ``time`` of its steps, ns since 1970; None in recordings from before 1.2.
    times: tuple[int, int] | None = None
    #: Why it is worth keeping longer than others: ``start``, ``rearrangement``, ``imbalance``.
    notable: tuple[str, ...] = ()
    #: None: everything is kept.
    thinned: Thinned | None = None

    @property
    def step_rows(self) -> int:
        """How many rows of ``steps`` it has; none in a partial copy that has only its placements."""
        return self.files["steps"].rows if "steps" in self.files else 0

    @property
    def recorded(self) -> int:
        """How many steps with loads it had in full."""
        if self.thinned is not None:
            return self.thinned.recorded
        loads = self.files.get("loads")
        return loads.rows // self.shape.num_moe_layers if loads and self.shape else 0

    @property
    def tier(self) -> Tier:
        return Tier.FULL if self.thinned is None else self.thinned.tier

    @property
    def last_seq(self) -> int:
        return self.seq if self.thinned is None else self.thinned.last_seq

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.bytes for file in self.files.values())

    def to_header(self) -> dict[str, Any]:
        shape = None if self.shape is None else dict(vars(self.shape))
        files = {table: dict(vars(f)) for table, f in self.files.items()}
        header = {
            "seq": self.seq,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "shape": shape,
            "files": files,
            "notable": list(self.notable),
        }
        if self.times is not None:
            header["first_time_ns"], header["last_time_ns"] = self.times
        return header if self.thinned is None else {**header, **vars(self.thinned)}

    def to_frame(self) -> bytes:
        """Raises as :meth:`StoredSums.read`."""
        kind = "sealed" if self.thinned is None else "thinned"
        arrays = None if self.sums is None else self.sums.read().arrays()
        return frames.encode(kind, self.to_header(), arrays)

    @classmethod
    def from_frame(cls, frame: frames.Frame, file: frames.NamedFile | None = None) -> SealedSegment:
        """Raises FormatError. ``file``: where the frame is, and its sums can be read again."""
        header = frame.header
        try:
            shape = None if header["shape"] is None else Shape(**header["shape"])
            files = {table: SealedFile(**f) for table, f in header["files"].items()}
            notable = tuple(str(reason) for reason in header.get("notable", ()))
            known = "first_time_ns" in header
            times = (header["first_time_ns"], header["last_time_ns"]) if known else None
            thinned = None
            if frame.kind == "thinned":
                of = {f.name: header[f.name] for f in fields(Thinned)}
                thinned = Thinned(**{**of, "tier": Tier(of["tier"]), "reason": str(of["reason"])})
            segment = cls(
                header["seq"],
                header["first_step"],
                header["last_step"],
                shape,
                files,
                times=times,
                notable=notable,
                thinned=thinned,
            )
            segment._validate()
            sums = ExpertSums.from_arrays(frame.arrays, shape)
            if file is None or sums is None or shape is None:
                segment = replace(segment, sums=sums)
            else:
                stored = StoredSums(file, segment.seq, frame.start, frame.end, shape, sums.nbytes)
                segment = replace(segment, sums=stored)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"its entry for a sealed segment is malformed ({error})") from None
        return segment

    def _validate(self) -> None:
        numbers = [self.seq, self.first_step, self.last_step]
        numbers += [n for f in self.files.values() for n in (f.bytes, f.rows, f.footer_crc32)]
        numbers += self.times or ()
        if self.thinned is not None:
            numbers += [n for n in vars(self.thinned).values() if not isinstance(n, str)]
        if self.shape is not None:
            numbers += vars(self.shape).values()
        if not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
            raise FormatError("its entry for a sealed segment has an invalid number")
        if self.shape is not None and self.shape.impossible:
            raise FormatError("its entry for a sealed segment has an impossible shape")
        wanted = {table: segment_name(table, self.seq, self.last_seq) for table in SCHEMAS}
        if any(file.name != wanted.get(table, file.name) for table, file in self.files.items()):
            raise FormatError("its entry for a sealed segment names a foreign file")
        if self.last_seq < self.seq:
            raise FormatError("its entry for thinned segments ends before it begins")


@dataclass
class Manifest:
    """The valid prefix of a session's ``manifest.frames``.

    Attributes:
        entries: the sealed segments by their number.
        closed: the header with the writer's final accounting; None if it was not closed.
        part: the first and last step that were asked for, if the session is a copy of a part.
        session_id: the session it belongs to; None until its first frame was read.
        end: the bytes of the valid prefix.
        fault: why the file cannot be read beyond ``end``; None if it can. An unfinished write at the
            end of the file is no fault: the journal of its segment still exists.
        frame_bytes: bytes of the frame of each entry, which only :meth:`read_headers` counts.
    """

    entries: dict[int, SealedSegment] = field(default_factory=dict)
    closed: dict[str, Any] | None = None
    part: tuple[int, int] | None = None
    session_id: str | None = None
    end: int = 0
    fault: str | None = None
    frame_bytes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(
        cls, file: BinaryIO, size: int, session_id: str | None = None, path: frames.NamedFile | None = None
    ) -> Manifest:
        """Read the first ``size`` bytes of a manifest, which must be of ``session_id`` if given.

        ``path``: the sums of segments stay in this file, which it is, until they are read; default: they are
        kept in memory. Raises OSError. Damage raises nothing; see ``fault``.
        """
        manifest = cls(session_id=session_id)
        manifest.read_on(file, size, path)
        return manifest

    def read_on(self, file: BinaryIO, size: int, path: frames.NamedFile | None = None) -> None:
        """Read what follows :attr:`end`, up to ``size`` bytes of the file. See :meth:`read`."""
        file.seek(self.end)
        for item in frames.scan(file, size, self.end):
            if isinstance(item, frames.Tail):
                if item.fault == "damaged":
                    self.fault = f"damaged from byte {item.end} on"
                break
            try:
                self.add(item, path)
            except FormatError as error:
                self.fault = str(error)
                break
            self.end = item.end

    @classmethod
    def read_headers(cls, file: BinaryIO, size: int, session_id: str | None = None) -> Manifest:
        """Like :meth:`read`, but without the sums, which are most of its bytes.

        Checksums are not verified, as they are over the sums, too: this is for an overview, not for figures.
        """
        manifest = cls(session_id=session_id)
        for start, end, header in frames.scan_headers(file, size):
            header.pop("arrays")
            try:
                manifest.add(frames.Frame(header.pop("kind"), header, {}, {}, start, end))
            except FormatError as error:
                manifest.fault = str(error)
                return manifest
            manifest.end = end
            if isinstance(header.get("seq"), int):
                manifest.frame_bytes[header["seq"]] = end - start
        if frames.damaged_at(file, size, manifest.end):
            manifest.fault = f"damaged from byte {manifest.end} on"
        return manifest

    def entry_of(self, seq: int) -> SealedSegment | None:
        """The entry that covers a segment."""
        if seq in self.entries:
            return self.entries[seq]
        return next((entry for entry in self.entries.values() if entry.seq < seq <= entry.last_seq), None)

    def add(self, frame: frames.Frame, path: frames.NamedFile | None = None) -> None:
        """Take in one more frame, of the file ``path``.

        Raises FormatError if it is malformed or of another session.
        """
        header = frame.header
        try:
            if frame.kind == "session":
                session_id = SessionInfo.from_dict(header["session"]).session_id
                if self.session_id not in (None, session_id):
                    raise FormatError("of another session")
                self.session_id = session_id
            elif frame.kind in ("sealed", "thinned"):
                entry = SealedSegment.from_frame(frame, path)
                if entry.last_seq > entry.seq:
                    for seq in [seq for seq in self.entries if entry.seq < seq <= entry.last_seq]:
                        del self.entries[seq]
                self.entries[entry.seq] = entry
            elif frame.kind == "closed":
                self.closed = header
            elif frame.kind == "part":
                self.part = int(header["first_step"]), int(header["last_step"])
            # Other kinds come from a newer minor version, which only adds.
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(str(error)) from None


class ManifestFile:
    """A session's manifest, for a process that appends to it again and again.

    It reads and verifies again only what was appended, unless another process changed the file: after a day,
    a manifest has hundreds of megabytes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST_FILE
        self._manifest = Manifest()
        #: What the file looked like when this process left it.
        self._left: tuple[int, int, int] | None = None

    def read(self, session_id: str) -> Manifest:
        """The manifest. Raises OSError, and FormatError if it is damaged."""
        with self.path.open("rb") as file:
            return self._read(file, session_id)

    def append(self, info: SessionInfo, item: SealedSegment | bytes) -> None:
        """Append an entry or a frame, and sync it. A new manifest begins with a session frame.

        Raises OSError, and FormatError if the manifest is damaged, or lists the entry's segment with more
        steps: then the entry is of a journal that a power cut shortened.
        """
        with self.path.open("a+b") as file:
            manifest = self._read(file, info.session_id)
            if isinstance(item, SealedSegment) and item.thinned is None:
                _check_listed(manifest.entry_of(item.seq), item)
            frame = item.to_frame() if isinstance(item, SealedSegment) else item
            # An unfinished write was about a segment whose journal still exists: it is sealed again.
            file.truncate(manifest.end)
            begins = manifest.end == 0
            if begins:
                frame = frames.encode("session", {"session": info.to_dict()}) + frame
            file.write(frame)
            file.flush()
            os.fsync(file.fileno())
            self._left = _identity(file)
        if begins:
            fsync_folder(self.path.parent)

    def _read(self, file: BinaryIO, session_id: str) -> Manifest:
        if self._left is None or self._left != _identity(file):
            self._manifest = Manifest(session_id=session_id)
        self._left = None
        self._manifest.read_on(file, file.seek(0, os.SEEK_END), self.path)
        if self._manifest.fault is not None:
            raise FormatError(f"{MANIFEST_FILE} is damaged from byte {self._manifest.end} on")
        self._left = _identity(file)
        return self._manifest


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    """It differs if a file was replaced, or if another process wrote to it."""
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_listed(listed: SealedSegment | None, item: SealedSegment) -> None:
    """Raise FormatError if what a manifest lists of a segment is better than a new entry of it."""
    if listed is None:
        return
    if listed.thinned is not None:
        raise FormatError(f"{MANIFEST_FILE} lists it as thinned")
    if item.step_rows < listed.step_rows:
        text = f"it has {item.step_rows} of the {listed.step_rows} steps that {MANIFEST_FILE} lists"
        raise FormatError(text)


def close_manifest(
    folder: Path, info: SessionInfo, stats: dict[str, Any], file: ManifestFile | None = None
) -> None:
    """Append the final accounting, which ends a session. Raises as :meth:`ManifestFile.append`."""
    (file or ManifestFile(folder)).append(info, closed_frame(stats))


def rewrite_manifest(folder: Path, info: SessionInfo, manifest: Manifest) -> None:
    """Replace a session's manifest by one without entries that others replaced.

    Where the file has the sums of ``manifest`` changes. Raises OSError, FormatError.
    """
    parts = [frames.encode("session", {"session": info.to_dict()})]
    if manifest.part is not None:
        first, last = manifest.part
        parts.append(frames.encode("part", {"first_step": first, "last_step": last}))
    parts += [manifest.entries[seq].to_frame() for seq in sorted(manifest.entries)]
    if manifest.closed is not None:
        parts.append(frames.encode("closed", manifest.closed))
    replace_file(folder / MANIFEST_FILE, b"".join(parts))
