"""Writing a session: placements as changes, and batches of frames into one journal per segment.

The engine's writer and the importers of ``eplb_analyze`` write sessions in the same way. This is the
part that they share; it is in ``format`` because ``eplb_analyze`` imports nothing else of ``eplb_dump``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_dump.format.frames import Piece
from eplb_dump.format.journal import Int32, JournalAppender, Shape, closed_frame, placements_frame
from eplb_dump.format.session import SessionInfo


class PlacementEncoder:
    """Encodes placements as frames of only the layers that changed.

    Attributes:
        current: int32 ``[num_moe_layers, num_physical_experts]``, the last placement; None before it.
        ep_size: the number of EP ranks that it was encoded for.
    """

    def __init__(self) -> None:
        self.current: Int32 | None = None
        self.ep_size = 0

    def encode(
        self, step: int, placement: Int32, ep_size: int, known: npt.NDArray[np.bool_] | None = None
    ) -> list[bytes]:
        """The frame of a placement in force from ``step`` on; empty if no layer changed.

        ``known`` [num_moe_layers]: the layers whose placement is known; default all.

        Another number of slots or EP ranks changes every layer: its slots are on other ranks.
        """
        before, self.current = self.current, placement
        if before is None or before.shape != placement.shape or self.ep_size != ep_size:
            changed = np.arange(len(placement))
        else:
            changed = np.flatnonzero((before != placement).any(axis=1))
        if known is not None:
            changed = changed[known[changed]]
        self.ep_size = ep_size
        if not len(changed):
            return []
        steps = np.full(len(changed), step, np.int64)
        return [placements_frame(steps, changed.astype(np.int32), placement[changed], ep_size)]


class SessionWriter:
    """Appends batches to a session's open journal, and opens one journal after another.

    A journal holds loads of one shape and the steps of one window: ``segment_steps`` sampled steps from a
    common multiple on, so that all ranks end their segments at the same steps.

    Attributes:
        info: the metadata that the next journal begins with.
        shape: of the loads in the open segment; None if there are none yet.
        window: the steps that the open segment may hold; empty before the first.
        journal: the open journal, if any.
        segment_span: how many steps a window has.
    """

    def __init__(self, folder: Path, info: SessionInfo, finish: Callable[[JournalAppender], None]) -> None:
        """``finish`` gets each journal that is full, to seal and close it."""
        self.info = info
        self.shape: Shape | None = None
        self.window = range(0)
        self.segment_span = info.segment_steps * info.interval
        self.journal: JournalAppender | None = None
        self._folder = folder
        self._finish = finish
        self._seq = 0

    def begin_batch(self, step: int, shape: Shape | None) -> None:
        """End the open segment if a step, or loads of this shape, do not belong in it."""
        other_shape = shape is not None and self.shape not in (None, shape)
        if step not in self.window or other_shape:
            self.end_segment()
            start = step - step % self.segment_span
            self.window = range(start, start + self.segment_span)
        if shape is not None:
            self.shape = shape

    def append(self, *frames: Piece) -> None:
        """Append a batch, which ends with its steps frame, or nothing of it. Raises OSError."""
        if self.journal is None:
            self.journal = JournalAppender(self._folder, self.info, self._seq)
            self._seq += 1
        self.journal.append(*frames)

    def close(self, stats: dict[str, Any], *, sealed: int) -> None:
        """Append that the writer was closed, and end the segment. Raises OSError.

        Args:
            sealed: how many segments are sealed. If not all are, readers find the end in the last journal.
        """
        if self.journal is not None or sealed < self._seq:
            self.append(closed_frame(stats))
        self.end_segment()

    def end_segment(self) -> None:
        """Hand over the open journal, if any; the next batch opens another, for loads of any shape."""
        self.shape = None
        self.end_journal()

    def end_journal(self) -> None:
        """Hand over the open journal, if any; the next batch, of the same segment, opens another."""
        journal, self.journal = self.journal, None
        if journal is not None:
            self._finish(journal)
