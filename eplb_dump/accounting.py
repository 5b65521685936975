"""The queue from the engine's thread to the background, and what became of every step seen.

A signal handler can interrupt the engine's thread anywhere, call the writer or raise; and any allocation can
fail. So no two counters are kept in step. A step is seen, and then it is in one place: among those that were
refused, in the queue, or in the journal. What is seen but in no place was interrupted on its way.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import field, replace
from typing import NamedTuple

import numpy as np

from eplb_dump.encoder import Encoded
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import Status
from eplb_dump.staging import Entry

INTERRUPTED = "the call was interrupted"
QUEUE_IS_FULL = "the queue is full"
#: States of the engine's thread: no call is running; one is, and its step is in no place yet; or is.
IDLE, RUNNING, PLACED = range(3)


@frozen
class WriterStats:
    """The writer's accounting. ``recorded + dummy + not_sampled + dropped + rejected == seen``."""

    seen: int = 0
    #: Accepted; they are in the journal once ``flush()`` has returned True.
    recorded: int = 0
    dummy: int = 0
    not_sampled: int = 0
    dropped: int = 0
    rejected: int = 0
    #: Steps without a row in ``steps``, as even that had to be dropped.
    unlisted: int = 0
    drop_reasons: dict[str, int] = field(default_factory=dict)
    reject_reasons: dict[str, int] = field(default_factory=dict)
    bytes_written: int = 0
    segments_sealed: int = 0
    #: Segments that could not be sealed; their journals stay and can be read.
    segments_left_open: int = 0
    #: Bytes of the session's folder.
    bytes_on_disk: int = 0
    #: Sealed segments that are no longer kept in full: ``max_bytes``, ``max_age``, ``min_free_bytes``.
    segments_thinned: int = 0
    #: The first step of the oldest sealed segment that is kept in full, or None.
    oldest_full_step: int | None = None
    #: Why recording stopped before ``close``, or None.
    off: str | None = None
    #: Why nothing can be written at the moment, or None. Recording continues by itself.
    paused: str | None = None


class Written(NamedTuple):
    """What is in the journal so far. Replaced as a whole, so that it is right at any moment."""

    #: Rows of ``steps``, by the value of :class:`Status`.
    rows: tuple[int, ...] = (0,) * len(Status)
    #: Loads that the background rejected, by reason.
    rejected: Mapping[str, int] = {}
    bytes: int = 0

    def plus(self, batch: Encoded) -> Written:
        rows = np.bincount(batch.status, minlength=len(Status)).tolist()
        return Written(
            tuple(a + b for a, b in zip(self.rows, rows, strict=True)),
            Counter(self.rejected) + batch.rejected,
            self.bytes + sum(map(len, batch.frames)),
        )


class Accounting:
    """The queue and the counts of one writer.

    Attributes:
        entries: the queue. The background takes a step off it once it is in the journal, not before.
        seen: the calls of ``record`` and ``skip``, also the one that is running.
        state: IDLE, RUNNING or PLACED.
        dropped, rejected: calls that were refused, by reason.
        refuses: why steps are not taken any more, if so.
        full: why a step is dropped that has no room in the queue.
        ended: nothing is taken off the queue any more; what is in it is lost.
    """

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.seen = 0
        self.state = IDLE
        self.dropped: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.refuses: str | None = None
        self.full = QUEUE_IS_FULL
        self.ended = False
        self._written = Written()
        #: Held by the one call of ``record`` or ``skip`` that is running. A drafter's thread may record at
        #: the same time as the main one. The background never takes it, so the engine never waits for that.
        #: It is re-entrant, as a signal handler that interrupts a call may call the writer.
        self.calls = threading.RLock()
        # Held while steps move from the queue to the written ones; never by `record` and `skip`. Re-entrant,
        # as a signal handler may ask for the counts while they are being counted.
        self._moving = threading.RLock()

    @property
    def written(self) -> Written:
        return self._written

    def refuse(self, why: str) -> None:
        if self.refuses is None:
            self.refuses = why

    def move(self, count: int, written: Written) -> None:
        """The oldest ``count`` steps of the queue are in the journal. Allocates nothing: it cannot fail."""
        entries = self.entries
        self._moving.acquire()
        try:
            self._written = written
            while count:
                entries.popleft()
                count -= 1
        finally:
            self._moving.release()

    def abandon_in_child(self) -> None:
        """In a forked child: other threads are gone, with the locks that they held."""
        self.calls, self._moving = threading.RLock(), threading.RLock()
        self.state = IDLE

    def stats(self, files: WriterStats) -> WriterStats:
        """The counts as of now, exact also while steps are being written.

        ``files``: what is not about steps.
        """
        # In this order, so that a call which ends meanwhile is not taken for an interrupted one.
        seen = self.seen
        seen -= self.state == RUNNING
        with self._moving:
            written, waiting = self._written, Counter(entry.status for entry in self.entries.copy())
        dropped, rejected = self.dropped.copy(), self.rejected.copy()
        rejected.update(written.rejected)
        recorded, dummy, not_sampled = (
            written.rows[status] + waiting[status]
            for status in (Status.RECORDED, Status.DUMMY, Status.NOT_SAMPLED)
        )
        listed = sum(written.rows)
        if self.ended:
            lost = waiting[Status.RECORDED]
            recorded -= lost
            if lost:
                dropped["the writer is closed" if files.off is None else "recording stopped"] += lost
        else:
            listed += waiting.total()
        total = recorded + dummy + not_sampled + dropped.total() + rejected.total()
        if seen > total:
            dropped[INTERRUPTED] += seen - total
            total = seen
        return replace(
            files,
            seen=total,
            recorded=recorded,
            dummy=dummy,
            not_sampled=not_sampled,
            dropped=dropped.total(),
            rejected=rejected.total(),
            unlisted=total - listed,
            drop_reasons=dict(dropped),
            reject_reasons=dict(rejected),
            bytes_written=written.bytes,
        )
