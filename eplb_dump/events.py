"""Events: when a CUDA stream has filled the buffers of a step, and how long the step took on the device.

The engine's thread records events and waits for none; the background thread waits for them and reads them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from eplb_dump.device import Device

#: Reading an event holds the interpreter lock for 2 µs; after so many, the engine may have it.
READS_AT_ONCE = 32


class Events:
    """The events of a ring: one behind the copies of each step, and one where its forward pass began.

    A step is known here by the ``taken`` of its :class:`~eplb_dump.ring.Buffer`. There is one event more than
    buffers: while a step is in the queue, the event of the step before it is not recorded again.
    """

    __slots__ = (
        "_began",
        "_begin_streams",
        "_calls",
        "_device",
        "_ends",
        "_size",
        "_starts",
        "_streams",
    )

    def __init__(self, buffers: int, device: Device) -> None:
        self._size = buffers + 1
        self._device = device
        self._starts = [device.new_event() for _ in range(self._size)]
        self._ends = [device.new_event() for _ in range(self._size)]
        #: The stream that each of ``_ends`` was last recorded on.
        self._streams: list[Any] = [None] * self._size
        #: The number of the writer's call that recorded it.
        self._calls = [-1] * self._size
        #: The stream on which the same step began; None if the engine did not say that it began.
        self._begin_streams: list[Any] = [None] * self._size
        #: The number of the call that is to record the step that began last, and the stream.
        self._began: tuple[int, Any] = -1, None

    # ---- the engine's thread

    def begin(self, step: int, call: int) -> None:
        """A forward pass begins, whose load the writer's call number ``call`` is to record."""
        stream = self._device.stream()
        self._device.record(self._starts[step % self._size], stream)
        self._began = call, stream

    def mark(self, step: int, fill: Callable[..., Any], index: int, tensor: Any, call: int = -1) -> None:
        """Copy a step's last tensor with a ring's ``fill``, and record the step's event behind the copy."""
        at = step % self._size
        self._streams[at] = fill(index, tensor, self._ends[at])
        began, begin_stream = self._began
        self._begin_streams[at] = begin_stream if began == call else None
        self._calls[at] = call

    # ---- the background thread

    def wait(self, first: int, last: int) -> None:
        """Wait until the copies of steps ``first`` to ``last`` are done, without the interpreter lock."""
        # A stream works in order, so waiting for its last event is enough.
        done = set()
        for step in range(last, first - 1, -1):
            at = step % self._size
            if self._streams[at] not in done:
                done.add(self._streams[at])
                self._device.wait(self._ends[at])

    def elapsed_ms(self, step: int, *, follows: bool) -> float:
        """The time of a step on the device, after :meth:`wait`; NaN if it is not known.

        From where the engine said that it began. Else from the end of the step before: if the engine numbered
        it so (``follows``), and if it was the writer's call before this one.
        """
        at, before = step % self._size, (step - 1) % self._size
        stream = self._begin_streams[at]
        if stream is not None:
            start = self._starts[at]
        elif follows and self._calls[before] == self._calls[at] - 1:
            start, stream = self._ends[before], self._streams[before]
        # Between two streams, an event can be late for other reasons than this step's work.
        if stream is None or stream != self._streams[at]:
            return math.nan
        if step % READS_AT_ONCE == 0:
            time.sleep(0)
        try:
            elapsed = self._device.elapsed_ms(start, self._ends[at])
        except Exception:  # for example, one of them was recorded while a CUDA graph was captured
            return math.nan
        return elapsed if 0 <= elapsed < math.inf else math.nan
