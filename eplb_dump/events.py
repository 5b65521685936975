"""Events: when a CUDA stream has filled the buffers of a step, and how long the step took on the device.

The engine's thread records events and waits for none; the background thread waits for them and reads them.
"""

from __future__ import annotations

import math
import time
from typing import Any

from eplb_dump.device import Device

#: Reading an event holds the interpreter lock for 2 µs; after so many, the engine may have it.
READS_AT_ONCE = 32


class Events:
    """The events of a ring: one behind the copies of each step, and one where its forward pass began.

    A step is known here by the ``taken`` of its :class:`~eplb_dump.ring.Buffer`. There is one event more than
    buffers: while a step is in the queue, the event of the step before it is not recorded again.

    :meth:`Ring.copy <eplb_dump.ring.Ring.copy>` records the event behind a copy itself, and notes it here.

    Attributes:
        size: the number of events of each kind; a step has the one numbered by its remainder.
        ends: the events behind the copies.
        streams: the stream that each of them was last recorded on.
        calls: the number of the writer's call that recorded it.
        begin_streams: the stream on which the same step began; None if the engine did not say that it began.
        began: the number of the call that is to record the step that began last, and the stream.
    """

    __slots__ = (
        "_device",
        "_starts",
        "began",
        "begin_streams",
        "calls",
        "ends",
        "size",
        "streams",
    )

    def __init__(self, buffers: int, device: Device) -> None:
        self.size = buffers + 1
        self._device = device
        self._starts = [device.new_event() for _ in range(self.size)]
        self.ends = [device.new_event() for _ in range(self.size)]
        self.streams: list[Any] = [None] * self.size
        self.calls = [-1] * self.size
        self.begin_streams: list[Any] = [None] * self.size
        self.began: tuple[int, Any] = -1, None

    # ---- the engine's thread

    def begin(self, step: int, call: int) -> None:
        """A forward pass begins, whose load the writer's call number ``call`` is to record."""
        self.began = call, self._device.mark(self._starts[step % self.size])

    # ---- the background thread

    def wait(self, first: int, last: int) -> None:
        """Wait until the copies of steps ``first`` to ``last`` are done, without the interpreter lock."""
        # A stream works in order, so waiting for its last event is enough.
        done = set()
        for step in range(last, first - 1, -1):
            at = step % self.size
            if self.streams[at] not in done:
                done.add(self.streams[at])
                self._device.wait(self.ends[at])

    def elapsed_ms(self, step: int, *, follows: bool) -> float:
        """The time of a step on the device, after :meth:`wait`; NaN if it is not known.

        From where the engine said that it began. Else from the end of the step before: if the engine numbered
        it so (``follows``), and if it was the writer's call before this one.
        """
        at, before = step % self.size, (step - 1) % self.size
        stream = self.begin_streams[at]
        if stream is not None:
            start = self._starts[at]
        elif follows and self.calls[before] == self.calls[at] - 1:
            start, stream = self.ends[before], self.streams[before]
        # Between two streams, an event can be late for other reasons than this step's work.
        if stream is None or stream != self.streams[at]:
            return math.nan
        if step % READS_AT_ONCE == 0:
            time.sleep(0)
        try:
            elapsed = self._device.elapsed_ms(start, self.ends[at])
        except Exception:  # for example, one of them was recorded while a CUDA graph was captured
            return math.nan
        return elapsed if 0 <= elapsed < math.inf else math.nan
