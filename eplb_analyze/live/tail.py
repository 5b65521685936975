"""Files of frames that another process appends to, read from where the reading stopped before.

Journals and manifests are such files. What their frames mean is for :mod:`eplb_analyze.live.session`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from eplb_analyze.reader.segments import require_regular
from eplb_dump.format import frames
from eplb_dump.format.schema import FormatError

#: No frame of ours has a longer header.
_MAX_HEADER = 1 << 20


class GrowingFile:
    """A file of frames and how far it was read.

    Attributes:
        at: what is before this byte was read, or left out.
        removed: whether the file is gone; what was opened before can still be read to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        self.removed = False
        self._file: BinaryIO | None = None
        #: Its size when nothing more could be read of it.
        self._size = -1
        #: Where it was found damaged, and how often in a row.
        self._damage = (-1, 0)

    def open(self) -> tuple[BinaryIO, int]:
        """The file and its size now. Raises OSError, FormatError where it is a pipe or a link.

        It is opened anew, since a network file system asks for a file's size when it is opened.
        """
        try:
            require_regular(self.path)
            file = self.path.open("rb")
        except FileNotFoundError:
            if self._file is None:
                raise
            self.removed = True
        else:
            self.close()
            self._file = file
        assert self._file is not None
        return self._file, os.fstat(self._file.fileno()).st_size

    def new(self) -> Iterator[frames.Frame]:
        """The frames that were appended. The reader moves ``at`` on when it has what belongs together.

        A frame's offsets count from ``at`` as it was. Raises OSError, and FormatError where the file is
        damaged.
        """
        file, size = self.open()
        if size == self._size:  # a killed writer's half frame is not read again and again
            return
        start, (damaged_at, times) = self.at, self._damage
        # On a network file system damage can be a write that is under way: it is looked at twice.
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

    def frame(self, start: int) -> frames.Frame:
        """The frame that begins at a byte. Raises OSError, FormatError."""
        file, size = self.open()
        file.seek(start)
        item = next(frames.scan(file, size - start))
        if isinstance(item, frames.Tail):
            raise FormatError(f"damaged from byte {start} on")
        return item

    def skim(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Where each frame from ``at`` on begins and ends, and its header: its arrays are not read.

        Nothing is verified, so this is for finding one's way only. It ends where no frame follows.
        """
        file, size = self.open()
        start = self.at
        while start + frames.HEAD.size + 4 <= size:
            file.seek(start)
            magic, length, _, _ = frames.HEAD.unpack(file.read(frames.HEAD.size))
            end = start + frames.HEAD.size + length
            header_length = int.from_bytes(file.read(4), "little")
            if magic != frames.MAGIC or end > size or header_length > min(length, _MAX_HEADER):
                return
            try:
                header = json.loads(file.read(header_length))
                header["kind"], header["arrays"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return
            yield start, end, header
            start = end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    __del__ = close
