"""The interface of a segment, the segment of an open journal, and reading faults.

Every byte that becomes a figure is verified: sealed files by page checksums and the footer checksum in
the manifest, journals and manifests by the checksums of their frames.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_analyze.errors import DumpError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.storage import bucket
from eplb_analyze.storage.path import StoragePath
from eplb_dump.format.journal import Int64, JournalSegment, PlacementRows, Shape, StepRows
from eplb_dump.format.manifest import ExpertSums, Manifest
from eplb_dump.format.schema import (
    MANIFEST_FILE,
    FormatError,
)
from eplb_dump.format.segment import ROW_GROUP_VALUES
from eplb_dump.format.session import SessionInfo

Scalar = TypeVar("Scalar", bound=np.generic)
#: ``(layer, values [layers, n, width])`` of layers that are stored together in a file.
Parts = Generator[tuple[int, npt.NDArray[Scalar]], None, None]


#: All steps of a segment.
EVERY = slice(None)


class DamagedSegmentError(DumpError):
    """A table of a segment cannot be read; the text names the file and what is wrong with it.

    :meth:`Run.retry_without_damaged <eplb_analyze.reader.run.Run.retry_without_damaged>` handles it; a
    library user sees it only when reading blocks outside of that.
    """

    def __init__(
        self, segment: Segment, table: str, path: StoragePath, reason: str, *, missing: bool = False
    ) -> None:
        """``missing``: the file does not exist: a writer that thins its segments may have removed it."""
        super().__init__(f"{path}: {reason}")
        self.segment, self.table, self.missing = segment, table, missing
        self._path, self._reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        create = functools.partial(DamagedSegmentError, missing=self.missing)
        return create, (self.segment, self.table, self._path, self._reason)


class Segment(Protocol):
    """One segment of one session. Layers are indices from 0, steps ascend within a segment."""

    seq: int
    #: Larger than ``seq`` if it was several segments, which were thinned together.
    last_seq: int
    first_step: int
    last_step: int
    shape: Shape | None
    #: How many rows of ``steps`` it has, and how many steps with loads.
    step_rows: int
    recorded: int
    path: StoragePath
    #: Whether damage follows its last readable step.
    cut: bool
    #: Whether it has loads of experts; False if it was thinned to sums per EP rank.
    has_loads: bool

    @property
    def sums(self) -> ExpertSums | None:
        """Over all steps of the segment; None if the writer left none."""
        ...

    def steps(self) -> StepRows: ...
    def step_times(self) -> tuple[Int64, Int64]:
        """Number and monotonic clock of each row of ``steps``, ns. Raises DamagedSegmentError."""
        ...

    def load_steps(self) -> Int64: ...
    def rank_loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        """Sums per rank of layers ``first`` to ``last - 1``, as they lie together in the file.

        Yields ``(layer, int32 or int64 [layers, n, ep_size])`` in order. Reads with a handle of its own, so
        that threads can share a segment.

        Args:
            steps: which of :meth:`load_steps`, without gaps; few of one layer are read faster than all.
        """
        ...

    def loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        """Likewise the physical experts' loads: ``(layer, int32 or int64 [layers, n, physical])``.

        Raises ValueError if ``has_loads`` is False.
        """
        ...

    def placements(self) -> PlacementRows: ...
    def sums_are_true(self) -> bool: ...
    def layer_sums_are_true(self, index: int, load: npt.NDArray[Any]) -> bool: ...


class OpenSegment:
    """The journal of a segment that is not sealed, by a live or a dead writer."""

    def __init__(self, journal: JournalSegment, path: StoragePath) -> None:
        self._journal = journal
        self._reading = threading.Lock()
        self.sums: ExpertSums | None = None
        self.cut = journal.tail.fault == "damaged"
        self.has_loads = True
        self.path = path
        self.seq = self.last_seq = journal.seq
        self.shape = journal.shape
        steps = journal.steps.step
        self.step_rows, self.recorded = len(steps), len(journal.load_steps)
        self.first_step, self.last_step = int(steps.min(initial=NO_END)), int(steps.max(initial=-1))

    def steps(self) -> StepRows:
        return self._journal.steps

    def step_times(self) -> tuple[Int64, Int64]:
        return self._journal.steps.step, self._journal.steps.monotonic_ns

    def load_steps(self) -> Int64:
        return self._journal.load_steps

    def loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        shape = self.shape
        assert shape is not None
        at_once = layers_at_once(len(self.load_steps()), shape)
        for layer in range(first, last, at_once):
            # The journal's file has one position, which threads would share.
            with reading_faults(self, "loads", self.path), self._reading:
                values = self._journal.read_layers(layer, min(layer + at_once, last))
            yield layer, values[:, steps]

    def rank_loads(self, first: int, last: int, steps: slice = EVERY) -> Parts[Any]:
        shape = self.shape
        assert shape is not None
        for layer, load in self.loads(first, last, steps):
            by_rank = load.reshape(*load.shape[:2], shape.ep_size, -1)
            yield layer, by_rank.sum(axis=3, dtype=np.int64)

    def placements(self) -> PlacementRows:
        return self._journal.placements

    def sums_are_true(self) -> bool:
        return True  # it has no sums

    def layer_sums_are_true(self, index: int, load: npt.NDArray[Any]) -> bool:
        return True


def layers_at_once(steps: int, shape: Shape) -> int:
    """How many layers of so many steps are in a row group, which is decoded as a whole."""
    return max(1, ROW_GROUP_VALUES // (max(1, steps) * shape.num_physical_experts))


def require_regular(path: StoragePath) -> None:
    """Raise FormatError unless it is a plain file: a pipe would block, a link can lead outside the dump."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise FormatError("it is a symbolic link, which is not followed")
    if not stat.S_ISREG(mode):
        raise FormatError("it is not a regular file")


def exhausted(error: BaseException) -> bool:
    """Whether the reader ran out of memory or open files, which is no fault of the file."""
    no_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return no_files or isinstance(error, MemoryError)


@contextmanager
def reading_faults(segment: Any, table: str, path: StoragePath) -> Iterator[None]:
    try:
        with bucket.translate_network_errors(path):
            yield
    except FileNotFoundError:
        reason = "it is missing, although the manifest lists it"
        raise DamagedSegmentError(segment, table, path, reason, missing=True) from None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
        if exhausted(error):
            raise
        said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        reason = said.splitlines()[0] if said else type(error).__name__
        raise DamagedSegmentError(segment, table, path, reason) from None


def read_manifest(folder: StoragePath, info: SessionInfo) -> Manifest:
    """Read ``manifest.frames``; a session that has sealed nothing yet has none.

    Raises OSError, and FormatError if it is not a regular file.
    """
    path = folder / MANIFEST_FILE
    try:
        require_regular(path)
        file = path.open("rb")
    except FileNotFoundError:
        return Manifest()
    with file:
        size = file.seek(0, 2)
        file.seek(0)
        # From a bucket, each segment's sums would be a request.
        return Manifest.read(file, size, info.session_id, path if isinstance(path, Path) else None)
