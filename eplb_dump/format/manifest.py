"""The manifest of a session: which segments are sealed, their files, checksums and sums."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eplb_dump.format import frames
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    SCHEMAS,
    FormatError,
    segment_name,
)
from eplb_dump.format.session import SessionInfo


@dataclass(frozen=True)
class SealedFile:
    """One table's file of a sealed segment. The Parquet footer has no checksum of its own."""

    name: str
    bytes: int
    rows: int
    footer_crc32: int


@dataclass(frozen=True)
class ExpertSums:
    """Each slot's tokens summed over steps, so that a reader who wants no more need not read ``loads``.

    A row is a layer's steps from ``step`` on to its next row's, cut where the layer's placement
    changed: the slot held one expert all the while.
    """

    #: Index of the MoE layer, from 0: int32 [n].
    layer: Int32
    step: Int64
    #: int64 [n, num_physical_experts].
    load: Int64

    def arrays(self) -> dict[str, Any]:
        return {"sum_layer": self.layer, "sum_step": self.step, "sum_load": self.load}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], shape: Shape | None) -> ExpertSums | None:
        """None where the writer left none. Raises FormatError."""
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
        raise FormatError("its sums of a sealed segment contradict its shape")


@dataclass(frozen=True)
class SealedSegment:
    """What the manifest says of one sealed segment."""

    seq: int
    first_step: int
    last_step: int
    shape: Shape | None
    files: dict[str, SealedFile]
    sums: ExpertSums | None = None

    def to_header(self) -> dict[str, Any]:
        shape = None if self.shape is None else dict(vars(self.shape))
        files = {table: dict(vars(f)) for table, f in self.files.items()}
        return {
            "seq": self.seq,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "shape": shape,
            "files": files,
        }

    def to_frame(self) -> bytes:
        return frames.encode("sealed", self.to_header(), None if self.sums is None else self.sums.arrays())

    @classmethod
    def from_frame(cls, frame: frames.Frame) -> SealedSegment:
        """Raises FormatError."""
        header = frame.header
        try:
            shape = None if header["shape"] is None else Shape(**header["shape"])
            files = {table: SealedFile(**f) for table, f in header["files"].items()}
            segment = cls(header["seq"], header["first_step"], header["last_step"], shape, files)
            segment._validate()
            segment = replace(segment, sums=ExpertSums.from_arrays(frame.arrays, shape))
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"its entry of a sealed segment is malformed ({error})") from None
        return segment

    def _validate(self) -> None:
        numbers = [self.seq, self.first_step, self.last_step]
        numbers += [n for f in self.files.values() for n in (f.bytes, f.rows, f.footer_crc32)]
        if self.shape is not None:
            numbers += vars(self.shape).values()
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise FormatError("its entry of a sealed segment has a number that is none")
        if self.shape is not None and self.shape.impossible:
            raise FormatError("its entry of a sealed segment has an impossible shape")
        if any(f.name != segment_name(t, self.seq) for t, f in self.files.items() if t in SCHEMAS):
            raise FormatError("its entry of a sealed segment names a foreign file")


def append_manifest(folder: Path, info: SessionInfo, frame: bytes) -> None:
    """Append a frame to the session's manifest, which begins with a session frame; synced.

    Raises OSError, and FormatError where the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        end = 0
        for item in frames.scan(file, size):
            if isinstance(item, frames.Tail):
                if item.fault == "damaged":
                    raise FormatError(f"{MANIFEST_FILE} is damaged from byte {item.end} on")
                end = item.end
        # What a kill tore off was of a segment whose journal is still there: it is written anew.
        file.truncate(end)
        if end == 0:
            frame = frames.encode("session", {"session": info.to_dict()}) + frame
        file.write(frame)
        file.flush()
        os.fsync(file.fileno())
