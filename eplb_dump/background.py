"""The background side of the writer: queue to journal, journal to sealed segments.

Two daemon threads: one drains the queue into the journal at least every flush interval, the other
seals finished journals and syncs ``session.json``, so that a slow disk's fsync never delays the journal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eplb_dump.encoder import Encoder
from eplb_dump.format import manifest, segment
from eplb_dump.format.journal import JournalAppender, Shape
from eplb_dump.format.schema import FormatError, Status
from eplb_dump.format.session import SessionInfo, sync_session_file, write_session_file
from eplb_dump.format.session_writer import SessionWriter
from eplb_dump.staging import Entry, release

logger = logging.getLogger("eplb_dump")

#: A batch, and so a frame, holds at most this many steps and about this many bytes. Large batches need
#: fewer numpy calls; after each call the thread has to wait for the interpreter lock.
BATCH_STEPS = 256
BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Limits:
    """When a segment ends, and how long a step may wait before it is in the journal (seconds)."""

    flush_interval: float
    segment_bytes: int
    segment_seconds: float


class Background:
    """Owns the files of one session. Everything but :meth:`wake` runs on its own threads."""

    def __init__(
        self,
        folder: Path,
        info: SessionInfo,
        entries: deque[Entry],
        limits: Limits,
        final_stats: Callable[[], dict[str, Any]],
    ) -> None:
        self._folder = folder
        self._entries = entries
        self._limits = limits
        self._final_stats = final_stats
        self._wake = threading.Event()
        self._closing = False
        #: Warnings to log, also from the engine's thread, on which logging may do I/O.
        self.notices: deque[str] = deque(maxlen=64)
        self._logged: set[str] = set()
        self._written = threading.Condition()
        self._encoder = Encoder(info, self.notices.append)
        # Counters: written by the background threads only, read by anyone.
        self.consumed = 0
        self.rejected = self._encoder.rejected
        self.lost = 0
        #: Steps without a row in ``steps``, because recording stopped.
        self.unlisted = 0
        self.bytes_written = 0
        self.segments_sealed = 0
        self.segments_left_open = 0
        #: Why recording stopped, or None.
        self.off: str | None = None
        self._gave_up = False
        #: For the sealer: journals to seal, metadata to write, and None at the end.
        self._to_seal: queue.SimpleQueue[JournalAppender | SessionInfo | None] = queue.SimpleQueue()
        #: Whether a power cut leaves a session.json. From then on, only the sealer replaces it, durably.
        self._session_synced = False
        self._session_lock = threading.Lock()
        self._session = SessionWriter(folder, info, self._to_seal.put)
        name = f"eplb-dump-rank{info.ep_rank}"
        self._sealer = threading.Thread(target=self._seal_loop, name=f"{name}-seal", daemon=True)
        self._drainer = threading.Thread(target=self._drain_loop, name=name, daemon=True)

    def start(self) -> None:
        self._sealer.start()
        self._drainer.start()

    def wake(self) -> None:
        if not self._wake.is_set():
            self._wake.set()

    def wait_consumed(self, count: int, timeout: float) -> bool:
        """Wait until ``count`` entries are in the journal; False on a timeout or if recording stopped."""
        self._wake.set()
        with self._written:
            self._written.wait_for(lambda: self.consumed >= count or self._gave_up, timeout)
        return self.consumed >= count and self.off is None

    def close(self, timeout: float) -> bool:
        """Drain, seal and write the final accounting, within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self._closing = True
        self._wake.set()
        self._drainer.join(timeout)
        self._sealer.join(max(0.0, deadline - time.monotonic()))
        return not self._drainer.is_alive() and not self._sealer.is_alive()

    def abandon_in_child(self) -> None:
        """Close the files in a forked child, as they belong to the parent."""
        self.off = "the process was forked; make a writer in the child"
        if self._session.journal is not None:
            with contextlib.suppress(OSError):
                self._session.journal.close()

    # ---- the drainer's thread

    def _drain_loop(self) -> None:
        # Half of the interval, so that a step waits at most one interval, including the write.
        period = self._limits.flush_interval / 2
        while True:
            self._wake.wait(period)
            self._wake.clear()
            closing = self._closing
            self._log_notices()
            try:
                self._drain()
                self._end_segment_if_due()
                if closing:
                    if self.off is None:
                        self._session.close(self._final_stats(), sealed=self.segments_sealed)
                    self._to_seal.put(None)
            except Exception as error:  # no error here may reach the engine
                self._give_up(error)
                closing = closing or self._closing
            if closing:
                if self.off is not None:
                    self._to_seal.put(None)
                return

    def _log_notices(self) -> None:
        while self.notices:
            self._log_once(self.notices.popleft())

    def _log_once(self, text: str) -> None:
        """Log a warning, once."""
        if text not in self._logged:
            self._logged.add(text)
            logger.warning("%s", text)

    def _give_up(self, error: Exception) -> None:
        if self.off is None:
            self.off = _reason(error)
            logger.warning("expert-load recording is off, the engine goes on: %s: %s", self._folder, self.off)
        if self._session.journal is not None:
            with contextlib.suppress(OSError):
                self._session.journal.close()
            self._session.journal = None
        self._discard()
        with self._written:
            self._gave_up = True
            self._written.notify_all()

    def _discard(self) -> None:
        """Drop the queue and release its buffers, as nothing can be written any more."""
        while self._entries:
            entry = self._entries.popleft()
            release([entry.load, entry.placement])
            self._lose([entry.status])

    def _lose(self, status: Sequence[int]) -> None:
        self.consumed += len(status)
        self.unlisted += len(status)
        self.lost += sum(s == Status.RECORDED for s in status)

    def _drain(self) -> None:
        if self.off is not None:
            self._discard()
            return
        # Steps that arrive meanwhile wait for the next round: with many small batches, the engine's
        # thread would have to wait for the interpreter lock more often.
        due = len(self._entries)
        while due > 0:
            batch = self._next_batch()
            due -= len(batch)
            self._write(batch)

    def _next_batch(self) -> list[Entry]:
        """Take one batch off the queue: steps of one segment, loads in consecutive buffers of one ring."""
        entries, session = self._entries, self._session
        batch = [entries.popleft()]
        load, ep_size = batch[0].load, batch[0].ep_size
        if batch[0].status is not Status.REJECTED:  # its step number may be wrong
            session.begin_batch(batch[0].step, _shape_of(batch[0]))
        room = BATCH_STEPS
        # Kept short: the engine's thread waits for the interpreter lock meanwhile.
        while entries and len(batch) < room:
            entry = entries[0]
            if entry.step not in session.window and entry.status is not Status.REJECTED:
                break
            if entry.load is not None:
                if load is None:  # the first load decides the shape
                    if session.shape not in (None, _shape_of(entry)):
                        break
                elif entry.load[0] is not load[0] or entry.load[1] != load[1] + 1 or entry.ep_size != ep_size:
                    break
                room = min(BATCH_STEPS, 1 + BATCH_BYTES // entry.load[0].slot_bytes)
                load, ep_size = entry.load, entry.ep_size
            batch.append(entries.popleft())
        if load is not None and session.shape is None:
            session.shape = Shape(ep_size, *load[0].shape)
        return batch

    def _note_shape(self) -> None:
        """Complete session.json with the shape of the first recorded load."""
        info, shape = self._session.info, self._session.shape
        if info.num_moe_layers is None and shape is not None:
            self._session.info = dataclasses.replace(
                info,
                num_moe_layers=shape.num_moe_layers,
                num_physical_experts=shape.num_physical_experts,
            )
            with self._session_lock:
                if not self._session_synced:
                    write_session_file(self._folder, self._session.info, durable=False)
                    return
            self._to_seal.put(self._session.info)

    def _write(self, batch: Sequence[Entry]) -> None:
        """Append one batch, whose loads are in consecutive buffers of one ring."""
        status = np.array([entry.status for entry in batch], np.uint8)
        try:
            frames = self._encoder.encode(batch, status, self._session.window.start)
            if (status == Status.RECORDED).any():
                self._note_shape()
            self._session.append(*frames)
        except Exception:
            self._lose(status.tolist())
            raise
        self.bytes_written += sum(map(len, frames))
        with self._written:
            self.consumed += len(batch)
            self._written.notify_all()

    def _end_segment_if_due(self) -> None:
        journal = self._session.journal
        if journal is not None and (
            journal.size >= self._limits.segment_bytes
            or time.monotonic() - journal.opened_at >= self._limits.segment_seconds
        ):
            self._session.end_segment()

    # ---- the sealer's thread

    def _seal_loop(self) -> None:
        while (item := self._to_seal.get()) is not None:
            if isinstance(item, SessionInfo):
                self._keep_session(partial(write_session_file, self._folder, item))
                continue
            with self._session_lock:
                first, self._session_synced = not self._session_synced, True
            if first:
                self._keep_session(partial(sync_session_file, self._folder))
            self._seal(item)
        self._log_notices()  # those that were added after the drainer ended
        if self.off is None and not self.segments_left_open:
            with contextlib.suppress(OSError, FormatError):
                manifest.close_manifest(self._folder, self._session.info, self._final_stats())

    def _keep_session(self, write: Callable[[], None]) -> None:
        """Have session.json survive a power cut. If it does not, readers use the session's other files."""
        try:
            write()
        except Exception as error:
            self._log_once(f"session.json could not be synced: {self._folder}: {_reason(error)}")

    def _seal(self, journal: JournalAppender) -> None:
        try:
            segment.seal(journal.path)
            self.segments_sealed += 1
        except Exception as error:  # the journal stays readable and can be sealed later
            self.segments_left_open += 1
            text = "a journal could not be sealed; it stays, and is read as it is"
            self._log_once(f"{text}: {self._folder}: {_reason(error)}")
        finally:
            journal.close()


def _reason(error: Exception) -> str:
    """A short text for an error, without a path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _shape_of(entry: Entry) -> Shape | None:
    """The shape of an entry's load, if it has one."""
    return None if entry.load is None else Shape(entry.ep_size, *entry.load[0].shape)
