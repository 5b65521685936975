"""Reads the new frames of a file that another process appends to: a journal or a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from eplb_analyze.sessions.segments import require_regular
from eplb_dump.format import frames
from eplb_dump.format.schema import FormatError


class GrowingFile:
    """A file of frames and how far it was read.

    Attributes:
        at: the byte at which reading continues.
        removed: True if the file was deleted. While it is open, it can still be read to its end.
        replaced: True if another file has its name now: ``at`` is of the file before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        self.removed = self.replaced = False
        self._file: BinaryIO | None = None
        #: The file's size when its last frame was unfinished.
        self._size = -1
        #: The byte at which it was damaged, and how many times in a row.
        self._damage = (-1, 0)

    def open(self) -> tuple[BinaryIO, int]:
        """The file and its current size. Raises OSError, and FormatError if it is a pipe or a link.

        Each call opens the file again, because a network file system updates the size only then.
        """
        try:
            require_regular(self.path)
            file = self.path.open("rb")
        except FileNotFoundError:
            if self._file is None:
                raise
            self.removed = True
        else:
            if self._file is not None:
                before, now = (os.fstat(one.fileno()) for one in (self._file, file))
                self.replaced |= (before.st_dev, before.st_ino) != (now.st_dev, now.st_ino)
            self.close()
            self._file = file
        assert self._file is not None
        return self._file, os.fstat(self._file.fileno()).st_size

    def new_frames(self) -> Iterator[frames.Frame]:
        """The appended frames. The caller advances ``at`` when it has a complete batch.

        A frame's offsets count from ``at`` at the time of the call. Raises OSError, and FormatError if the
        file is damaged.
        """
        file, size = self.open()
        if size == self._size:  # do not read a killed writer's unfinished frame again
            return
        start, (damaged_at, times) = self.at, self._damage
        # On a network file system, an unfinished write can look like damage: try twice.
        if damaged_at == start and times > 1:
            raise FormatError(f"damaged from byte {start} on")
        file.seek(start)
        for item in frames.scan(file, size - start):
            if isinstance(item, frames.Frame):
                yield item
            elif item.fault == "damaged":
                start += item.end
                self._damage = start, times + 1 if damaged_at == start else 1
                raise FormatError(f"damaged from byte {start} on")
            else:
                self._size = size

    def frame_at(self, start: int) -> frames.Frame:
        """The frame that starts at a byte. Raises OSError, FormatError."""
        return frames.frame_at(*self.open(), start)

    def scan_headers(self, start: int | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The first byte, end and header of each frame from ``at``, or ``start``, on.

        See :func:`frames.scan_headers`.
        """
        yield from frames.scan_headers(*self.open(), self.at if start is None else start)

    def read_from_start(self) -> None:
        """Read the file that has the name now from its first byte on."""
        self.at, self.replaced, self._size, self._damage = 0, False, -1, (-1, 0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    __del__ = close
