"""The background side of the writer: queue to journal, journal to sealed segments.

Two daemon threads: one opens the session and drains the queue into the journal at least every flush
interval, the other seals finished journals and syncs ``session.json``, so that a slow disk's fsync never
delays the journal. No other thread touches a file, so no file system can hold the engine up.

A full disk is like a slow one: the thread that meets it tries again until there is space, and meanwhile the
queue fills and drops the newest steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy.ma  # noqa: F401 - np.unique imports it when it is first called; a fork must not meet an import

from eplb_dump import process, rendezvous
from eplb_dump.accounting import QUEUE_IS_FULL, Accounting, WriterStats
from eplb_dump.budget import Retention, Space
from eplb_dump.encoder import Encoder
from eplb_dump.format import manifest, retention, segment
from eplb_dump.format.frames import Piece
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import JournalAppender, Shape
from eplb_dump.format.manifest import SealedSegment
from eplb_dump.format.notable import Notable
from eplb_dump.format.schema import FormatError, Status, Tier
from eplb_dump.format.session import (
    SessionInfo,
    dump_json,
    session_path,
    sync_session_file,
    write_session_file,
)
from eplb_dump.format.session_writer import SessionWriter
from eplb_dump.latch import Latch
from eplb_dump.metrics_file import MetricsFile
from eplb_dump.ring import Buffer
from eplb_dump.staging import Entry

T = TypeVar("T")

logger = logging.getLogger("eplb_dump")

#: A batch, and so a frame, holds at most this many steps and about this many bytes. Large batches need
#: fewer numpy calls; after each call the thread has to wait for the interpreter lock.
BATCH_STEPS = 256
BATCH_BYTES = 16 << 20
#: How often a thread that found no space tries again. Sealing, which writes more, at most waits longer.
RETRY_SECONDS = 1.0
_MOST_RETRY_SECONDS = 32.0
#: A disk that fills up again and again is logged at most this often.
_PAUSE_LOG_SECONDS = 60.0
#: How often the sealer looks for what is too old, and at the free space.
_RETENTION_SECONDS = 1.0
#: How often the drainer looks whether the sealer has made room.
_POLL_SECONDS = 0.02
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@frozen
class Limits:
    """When a segment ends, and how long a step may wait before it is in the journal (seconds)."""

    flush_interval: float
    segment_bytes: int
    segment_seconds: float


class _Flush(Latch):
    """What a flush waits for; ``failed``: recording is paused."""

    __slots__ = ("failed",)

    def __init__(self) -> None:
        super().__init__()
        self.failed = False


def warn(text: str) -> None:
    """Log a warning. A log handler that raises must harm neither the engine nor the recording."""
    with contextlib.suppress(Exception):
        logger.warning("%s", text)


class Background:
    """Owns the files of one session.

    What the engine's thread calls (:meth:`wake`, :meth:`wait_written`, :meth:`request_close`, :meth:`close`)
    can be called in a signal handler, also in one that interrupted the same call.

    Attributes:
        info: the session; its run is known once the session is open.
        folder: ``<expert_load_dump_dir>/run=…/model=…/rank=…/session=…``
        notices: warnings to log, also from the engine's thread, on which logging may do I/O.
        off: why recording stopped, or None.
        paused: why nothing can be written at the moment, or None.
        closed_well: everything is sealed, and so is the final accounting.
    """

    def __init__(
        self,
        root: Path,
        info: SessionInfo,
        accounting: Accounting,
        limits: Limits,
        keep: Retention,
        metrics_file: Path | None = None,
    ) -> None:
        self.info = info
        self.folder = session_path(root, info)
        self.notices: deque[str] = deque(maxlen=64)
        self.off: str | None = None
        self.paused: str | None = None
        self.closed_well = False
        self._root = root
        self._accounting = accounting
        self._limits = limits
        self._metrics_file = MetricsFile(metrics_file, info)
        self._retention = keep
        self._space = Space(keep, len(dump_json(info.to_dict())))
        #: How large a journal may become, and about how large a batch; as of when the last one was opened.
        self._segment_bytes, self._batch_bytes = limits.segment_bytes, BATCH_BYTES
        #: What the drainer waits for: None, or a latch to set once the queue is written. Unlike
        #: ``threading.Event``, it may be filled in a signal handler.
        self._wakes: queue.SimpleQueue[_Flush | None] = queue.SimpleQueue()
        self._awake = self._closing = False
        #: Flushes of what was queued before this round, and of what came during it.
        self._flushes: list[_Flush] = []
        self._late_flushes: list[_Flush] = []
        self._opened, self._ended = Latch(), Latch()
        self._logged: set[str] = set()
        #: The reasons that the sealer has told of.
        self._faults: set[str] = set()
        self._segments_sealed = self._segments_left_open = self._segments_thinned = 0
        self._oldest_full_step: int | None = None
        #: When the last pause that was logged began, by the monotonic clock.
        self._pause_logged_at = -_PAUSE_LOG_SECONDS
        #: Of the last pause: whether it was logged, and how many steps its reason had dropped before it.
        self._pause_is_logged = False
        self._dropped_before_pause = 0
        #: For the sealer: journals to seal, metadata to write, and None at the end.
        self._to_seal: queue.SimpleQueue[JournalAppender | SessionInfo | None] = queue.SimpleQueue()
        #: What the sealer has taken and not finished, for lack of space; and how long it waits for that.
        self._waiting: deque[JournalAppender | SessionInfo] = deque()
        self._retry_seconds = RETRY_SECONDS
        self._lacks_space = False
        #: How many journals the sealer got; how many it has finished, and had when all was within the budget.
        self._journals_ended = self._journals_finished = self._journals_settled = 0
        #: The manifest's entries, without their sums, if not all is kept; and those that cannot be thinned.
        self._entries: dict[int, SealedSegment] = {}
        self._unthinnable: set[int] = set()
        self._notable = Notable()
        #: None until the session's folder is known.
        self._manifest: manifest.ManifestFile | None = None
        #: Whether a power cut leaves a session.json. From then on, only the sealer replaces it, durably.
        self._session_synced = False
        self._session_lock = threading.Lock()
        self._encoder = Encoder(info, self.notices.append)
        self._session: SessionWriter | None = None
        name = f"eplb-dump-rank{info.ep_rank}"
        self._sealer = threading.Thread(target=self._seal_loop, name=f"{name}-seal", daemon=True)
        self._drainer = threading.Thread(target=self._drain_loop, name=name, daemon=True)

    def start(self, timeout: float) -> None:
        """Start the threads, and wait up to ``timeout`` seconds until the session is open."""
        process.register(self)
        try:
            self._sealer.start()
            self._drainer.start()
        except (RuntimeError, MemoryError) as error:  # the interpreter is shutting down, or no thread is left
            self._turn_off(f"no background thread: {error}")
            self._to_seal.put(None)
            self._end()
        else:
            if not self._opened.wait(timeout):
                text = "its file system does not respond; recording begins when it does"
                warn(f"expert-load recording is waiting for {self._root}; the engine continues: {text}")

    def stay_off(self, reason: str) -> None:
        """Instead of :meth:`start`: record nothing."""
        self.off = reason
        self._accounting.refuse("recording is off")
        self._accounting.ended = True
        self._end()
        warn(f"expert-load recording is off; the engine continues: {reason}")

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._wakes.put(None)

    def wait_written(self, timeout: float) -> bool:
        """Wait until all that is queued is in the journal.

        False on a timeout, or if recording stopped or is paused.
        """
        if self.off is not None:
            return False
        written = _Flush()
        self._wakes.put(written)
        done = self._accounting.ended or written.wait(timeout)
        return done and self.off is None and not written.failed

    def request_close(self) -> None:
        """Drain, seal and write the final accounting; does not wait for it."""
        self._closing = True
        self._accounting.refuse("the writer is closed")
        self._wakes.put(None)

    def close(self, timeout: float) -> bool:
        """Close, and wait for it; False if it takes longer than ``timeout`` seconds or something failed."""
        deadline = time.monotonic() + timeout
        self.request_close()
        if self._ended.wait(timeout):
            for thread in (self._drainer, self._sealer):
                _wait_until_gone(thread, deadline)
        return self.closed_well

    def stats(self) -> WriterStats:
        files = WriterStats(
            bytes_on_disk=self._space.used,
            segments_sealed=self._segments_sealed,
            segments_left_open=self._segments_left_open,
            segments_thinned=self._segments_thinned,
            oldest_full_step=self._oldest_full_step,
            off=self.off,
            paused=self.paused,
        )
        return self._accounting.stats(files)

    def abandon_in_child(self) -> None:
        """In a forked child: the threads are gone, and the files belong to the parent."""
        self.off = "the process was forked; create a new writer in the child"
        self._accounting.refuse("recording is off")
        self._accounting.abandon_in_child()
        self._wakes = queue.SimpleQueue()
        self._ended = Latch()
        self._ended.set()
        self._close_journal()

    # ---- the drainer's thread

    def _drain_loop(self) -> None:
        try:
            self._open()
            self._opened.set()
            closing = False
            while not closing:
                self._wait_for_work()
                closing = self._closing  # what was queued before is drained now
                self._drain()
                self._confirm_flushes()
                self._end_segment_if_due()
                self._log_notices()
            self._accounting.ended = True
            stats = dataclasses.asdict(self.stats())
            self._opened_session().close(stats, sealed=self._segments_sealed)
        except BaseException as error:  # no error here may reach the engine, and none may go unnoticed
            self.off = "out of memory"  # in case that there is no memory for the reason
            with contextlib.suppress(BaseException):
                self._turn_off(_reason(error))
            self._close_journal()
        finally:
            self._accounting.refuse("recording is off")
            self._accounting.ended = True
            self._opened.set()
            self._collect_flushes()
            self._flushes += self._late_flushes
            self._confirm_flushes()
            self._to_seal.put(None)

    def _open(self) -> None:
        """Claim a run and create the session's folder."""
        if not self.info.run_id:
            claim = self._with_space(partial(rendezvous.claim_run, self._root, self.info))
            self.info = dataclasses.replace(self.info, run_id=claim.run_id)
            if claim.doubt is not None:
                own = f"EP rank {self.info.ep_rank} records into a separate run, {claim.run_id}"
                remedy = f"set {rendezvous.RUN_ID_VARIABLE} to the same run id on all ranks"
                warn(f"{claim.doubt}; {own}: {remedy}")
        self.folder = session_path(self._root, self.info)
        self._with_space(partial(self.folder.mkdir, parents=True))
        # The sealer syncs it.
        self._with_space(partial(write_session_file, self.folder, self.info, durable=False))
        self._space.measure(self.folder)
        self._limit_segment()
        self._manifest = manifest.ManifestFile(self.folder)
        self._session = SessionWriter(self.folder, self.info, self._journal_ended)

    def _opened_session(self) -> SessionWriter:
        assert self._session is not None
        return self._session

    def _wait_for_work(self) -> None:
        # Half of the interval, so that a step waits at most one interval, including the write.
        with contextlib.suppress(queue.Empty):
            latch = self._wakes.get(timeout=self._limits.flush_interval / 2)
            self._flushes += [] if latch is None else [latch]
        self._collect_flushes()
        self._flushes += self._late_flushes
        self._late_flushes.clear()
        self._awake = False

    def _collect_flushes(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                latch = self._wakes.get_nowait()
                self._flushes += [] if latch is None else [latch]

    def _confirm_flushes(self) -> None:
        while self._flushes:
            self._flushes.pop().set()

    def _log_notices(self) -> None:
        while self.notices:
            self._log_once(self.notices.popleft())

    def _log_once(self, text: str) -> None:
        """Log a warning, once."""
        if text not in self._logged:
            self._logged.add(text)
            warn(text)

    def _with_space(self, write: Callable[[], T]) -> T:
        """Write all or nothing; while there is no space for it, wait and try again.

        Raises what ``write`` raises: that there is no space, only if the writer is being closed.
        """
        while True:
            try:
                result = write()
            except OSError as error:
                if error.errno not in _NO_SPACE or self._closing:
                    raise
                self._pause(error.strerror or "No space left on device")
            else:
                self._resume()
                return result
            self._wait_for_retry(RETRY_SECONDS)

    def _pause(self, why: str) -> None:
        """Let the queue fill: it keeps what it holds, and drops and counts the newest steps."""
        self._opened.set()  # the constructor does not wait for space
        if self.paused is None:
            self._accounting.full = self.paused = why
            self._dropped_before_pause = self._accounting.dropped[why]
            now = time.monotonic()
            self._pause_is_logged = now - self._pause_logged_at >= _PAUSE_LOG_SECONDS
            if self._pause_is_logged:
                self._pause_logged_at = now
                text = "steps are dropped and counted until there is space"
                warn(f"expert-load recording is paused; the engine continues: {self._place}: {why}; {text}")
        self._flushes += self._late_flushes
        self._late_flushes.clear()
        for flush in self._flushes:
            flush.failed = True
        self._confirm_flushes()

    def _resume(self) -> None:
        if self.paused is None:
            return
        why, self.paused, self._accounting.full = self.paused, None, QUEUE_IS_FULL
        if self._pause_is_logged:
            dropped = self._accounting.dropped[why] - self._dropped_before_pause
            warn(f"expert-load recording continues: {self._place}: {dropped:,} steps were dropped")

    @property
    def _place(self) -> Path:
        return self._root if self._session is None else self.folder

    def _wait_for_retry(self, seconds: float) -> None:
        """Wait, but not if a flush or the end asks for a retry now."""
        deadline = time.monotonic() + seconds
        while not self._closing and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                flush = self._wakes.get(timeout=left)
                if flush is not None:
                    self._late_flushes.append(flush)
                    return

    def _turn_off(self, reason: str) -> None:
        self.off, self.paused = reason, None
        self._accounting.refuse("recording is off")
        place = self.folder if self._session is not None else f"cannot write to {self._root}"
        warn(f"expert-load recording is off; the engine continues: {place}: {reason}")

    def _close_journal(self) -> None:
        """Close the open journal, which stays as it is."""
        journal = None if self._session is None else self._session.journal
        if journal is not None:
            with contextlib.suppress(Exception):
                journal.close()

    def _drain(self) -> None:
        # Steps that arrive meanwhile wait for the next round: with many small batches, the engine's
        # thread would have to wait for the interpreter lock more often.
        due = len(self._accounting.entries)
        while due > 0:
            batch = self._next_batch()
            due -= len(batch)
            self._write(batch)

    def _next_batch(self) -> list[Entry]:
        """The next batch of the queue: steps of one segment, loads in consecutive buffers of one ring.

        So are the placements, if there are several.

        It stays in the queue until it is in the journal, so that it is counted whatever goes wrong.
        """
        entries, session = self._accounting.entries, self._opened_session()
        batch = [entries[0]]
        load, placement, ep_size = batch[0].load, batch[0].placement, batch[0].ep_size
        if batch[0].status is not Status.REJECTED:  # its step number may be wrong
            session.begin_batch(batch[0].step, _shape_of(batch[0]))
        room, due = BATCH_STEPS, len(entries)
        # Kept short: the engine's thread waits for the interpreter lock meanwhile.
        while len(batch) < min(room, due):
            entry = entries[len(batch)]
            if entry.step not in session.window and entry.status is not Status.REJECTED:
                break
            if entry.load is not None:
                if load is None:  # the first load decides the shape
                    if session.shape not in (None, _shape_of(entry)):
                        break
                elif entry.ep_size != ep_size or not _follows(entry.load, load):
                    break
                room = min(BATCH_STEPS, 1 + self._batch_bytes // entry.load[0].slot_bytes)
                load, ep_size = entry.load, entry.ep_size
            if entry.placement is not None:
                if placement is not None and not _follows(entry.placement, placement):
                    break
                placement = entry.placement
            batch.append(entry)
        if load is not None and session.shape is None:
            session.shape = Shape(ep_size, *load.ring.shape)
        return batch

    def _note_shape(self, session: SessionWriter) -> None:
        """Complete session.json with the shape of the first recorded load."""
        if session.info.num_moe_layers is None and session.shape is not None:
            session.info = dataclasses.replace(
                session.info,
                num_moe_layers=session.shape.num_moe_layers,
                num_physical_experts=session.shape.num_physical_experts,
            )
            with self._session_lock:
                if not self._session_synced:
                    try:
                        write_session_file(self.folder, session.info, durable=False)
                        return
                    except OSError as error:  # the sealer can wait for space without holding up the steps
                        if error.errno not in _NO_SPACE:
                            raise
            self._to_seal.put(session.info)

    def _write(self, batch: Sequence[Entry]) -> None:
        """Append one batch, whose loads are in consecutive buffers of one ring."""
        session = self._opened_session()
        encoded = self._encoder.encode(batch, session.window.start)
        if (encoded.status == Status.RECORDED).any():
            self._note_shape(session)
        written = self._accounting.written.plus(encoded)
        self._with_space(partial(self._append, session, encoded.frames))
        self._accounting.move(len(batch), written)

    def _append(self, session: SessionWriter, frames: Sequence[Piece]) -> None:
        """Append a batch to the open journal, or to a new one. Raises OSError."""
        size = sum(map(len, frames))
        self._wait_for_room(session, size)
        if session.journal is not None and session.journal.size + size > self._segment_bytes:
            session.end_journal()
        begins = session.journal is None
        if begins:
            self._limit_segment()
        try:
            session.append(*frames)
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._space.refuse()
            raise
        if begins and session.journal is not None:
            self._space.journals[session.journal.path.name] = session.journal

    def _limit_segment(self) -> None:
        """Have the next segment end early enough for the budget. Raises OSError."""
        self._space.refresh(self.folder)
        self._segment_bytes = self._space.segment_bytes(self._limits.segment_bytes)
        if self._segment_bytes < self._limits.segment_bytes:
            self._batch_bytes = min(BATCH_BYTES, self._segment_bytes // 4)

    def _wait_for_room(self, session: SessionWriter, size: int) -> None:
        """Wait until the sealer has made room in the budget. Raises OSError if it cannot."""
        while True:
            settled = self._journals_settled == self._journals_ended
            if self._space.has_room(size):
                return
            if self._lacks_space or (settled and session.journal is None):
                raise OSError(errno.ENOSPC, self._why_no_room())
            if settled:  # let it seal and thin these steps, too
                session.end_journal()
            # No flush and no end hurries the sealer, which needs the interpreter lock.
            time.sleep(_POLL_SECONDS)

    def _why_no_room(self) -> str:
        if self._space.is_volume_short:
            return os.strerror(errno.ENOSPC)
        return "max_bytes leaves no room for another step"

    def _journal_ended(self, journal: JournalAppender) -> None:
        self._journals_ended += 1
        self._to_seal.put(journal)

    def _end_segment_if_due(self) -> None:
        session = self._opened_session()
        journal = session.journal
        if journal is not None and (
            journal.size >= self._segment_bytes
            or time.monotonic() - journal.opened_at >= self._limits.segment_seconds
        ):
            session.end_segment()

    # ---- the sealer's thread

    def _seal_loop(self) -> None:
        more = True
        while more:
            with contextlib.suppress(BaseException):  # whatever it is, the next journal can be sealed
                more = self._take()
                self._finish_waiting(last=not more)
                self._retain()
                if not self._waiting:
                    self._journals_settled = self._journals_finished
            self._write_metrics(last=False)
        with contextlib.suppress(BaseException):
            self._close_session()
        self._write_metrics(last=True)
        with contextlib.suppress(BaseException):
            if self.off is None:
                self._log_notices()  # those that were added after the drainer ended
        self._end()

    def _take(self) -> bool:
        """Take what there is to do, or wait for it; False at the end."""
        timeout = self._metrics_file.seconds_left()
        if not self._retention.keeps_all:
            timeout = _RETENTION_SECONDS if timeout is None else min(timeout, _RETENTION_SECONDS)
        if self._waiting:
            timeout = self._retry_seconds
        with contextlib.suppress(queue.Empty):
            item = self._to_seal.get(timeout=timeout)
            if item is None:
                return False
            self._waiting.append(item)
        return True

    def _finish_waiting(self, *, last: bool) -> None:
        """Seal journals and write metadata, in order; what finds no space is tried again later.

        ``last``: there is no later.
        """
        while self._waiting:
            try:
                self._handle(self._waiting[0])
            except BaseException as error:
                if isinstance(error, OSError) and error.errno in _NO_SPACE and not last:
                    self._lacks_space = True
                    self._space.refuse()
                    self._retry_seconds = min(
                        max(RETRY_SECONDS, 2 * self._retry_seconds), _MOST_RETRY_SECONDS
                    )
                    return
                self._give_up(self._waiting[0], error)
            self._lacks_space, self._retry_seconds = False, RETRY_SECONDS
            if isinstance(self._waiting.popleft(), JournalAppender):
                self._journals_finished += 1

    def _handle(self, item: JournalAppender | SessionInfo) -> None:
        """Seal a journal, or write metadata."""
        if isinstance(item, SessionInfo):
            write_session_file(self.folder, item)
            return
        with self._session_lock:
            first, self._session_synced = not self._session_synced, True
        if first:
            try:
                sync_session_file(self.folder)
            except Exception as error:  # readers use the session's other files
                self._note_fault("session.json could not be synced", error)
        self._retain(item.size)
        entry = segment.seal(item.path, self._notable, self._manifest)
        self._segments_sealed += 1
        self._note_sealed(item, entry)
        self._close(item)

    def _note_sealed(self, journal: JournalAppender, entry: SealedSegment | None) -> None:
        try:
            if not self._retention.keeps_all:
                self._note_segments(entry)
            elif entry is not None:
                self._space.add(self.folder, entry.size)
                if self._oldest_full_step is None:
                    self._oldest_full_step = entry.first_step
        except Exception as error:
            self._note_fault("the session's files could not be counted", error)
        self._space.journals.pop(journal.path.name, None)

    def _note_segments(self, entry: SealedSegment | None, replaces: Sequence[int] = ()) -> None:
        """Know which segments there are, and what they take. Raises OSError."""
        self._space.measure(self.folder)
        for seq in replaces:
            del self._entries[seq]
        if entry is not None:
            self._entries[entry.seq] = dataclasses.replace(entry, sums=None)
        entries = self._entries.values()
        self._segments_thinned = sum(e.last_seq - e.seq + 1 for e in entries if e.thinned)
        self._oldest_full_step = min((e.first_step for e in entries if e.thinned is None), default=None)

    def _retain(self, room: int = 0) -> None:
        """Thin the session's segments until they leave so much room in the budget, and none is too old.

        Once all steps are in journals, only if those could not be sealed within the budget otherwise.
        """
        if self._retention.keeps_all or not self._entries:
            return
        try:
            self._space.refresh(self.folder)
            while not self._accounting.ended or not self._space.fits_work:
                todo = self._next_thinning(room)
                if todo is None:
                    return
                self._thin(todo)
        except Exception as error:
            self._note_fault("the session could not be kept within its budget", error)

    def _next_thinning(self, room: int) -> retention.Thinning | None:
        entries = [entry for seq, entry in self._entries.items() if seq not in self._unthinnable]
        budget = self._space.for_segments(sum(entry.size for entry in entries))
        age = self._retention.max_age
        return retention.next_thinning(
            entries,
            budget=None if budget is None else max(0, budget - room),
            before_ns=None if age is None else time.time_ns() - int(age * 1e9),
            reason="space" if self._space.is_volume_short else "budget",
        )

    def _thin(self, todo: retention.Thinning) -> None:
        """Thin segments; without space for new files, in a way that needs none. Raises OSError."""
        info = self._opened_session().info
        try:
            try:
                entry = retention.thin(self.folder, info, todo, file=self._manifest)
            except OSError as error:
                coarser = self._thinning_without_new_files()
                if error.errno not in _NO_SPACE or coarser is None:
                    raise
                todo = coarser
                entry = retention.thin(self.folder, info, todo, file=self._manifest)
            self._note_segments(entry, replaces=todo.seqs)
            self._retry_seconds = 0.0  # there is space now
        except (FormatError, FileNotFoundError) as error:  # damaged, or removed: it stays as it is
            self._unthinnable.update(todo.seqs)
            self._note_fault("a segment could not be thinned", error)
            retention.remove_leftovers(self.folder, info)

    def _thinning_without_new_files(self) -> retention.Thinning | None:
        ordered = sorted(self._entries.values(), key=lambda entry: entry.seq)
        for tier, next_tier in (
            (Tier.FULL, Tier.MINUTES),
            (Tier.RANKS, Tier.MINUTES),
            (Tier.MINUTES, Tier.GONE),
        ):
            found = [entry.seq for entry in ordered if entry.tier is tier]
            if tier is Tier.FULL:
                found = found[:-1]
            if found:
                return retention.Thinning((found[0],), next_tier, "space")
        return None

    def _give_up(self, item: JournalAppender | SessionInfo, error: BaseException) -> None:
        if isinstance(item, SessionInfo):
            self._note_fault("session.json could not be synced", error)
            return
        # The journal stays readable and can be sealed later.
        self._segments_left_open += 1
        self._space.leave(item)
        self._note_fault("a journal could not be sealed; readers read it unsealed", error)
        self._close(item)

    def _close(self, journal: JournalAppender) -> None:
        try:
            journal.close()
        except OSError as error:  # it was read for sealing; what could not be read back was not sealed
            self._note_fault("a journal could not be closed", error)

    def _note_fault(self, text: str, error: BaseException) -> None:
        """Have a fault of the session's files logged, once.

        By the drainer, later: if the same fault turns recording off, that is said and nothing else. Nor is
        the same reason repeated for each file that it strikes; what it did is in the accounting.
        """
        reason = _reason(error)
        if reason not in self._faults:
            self._faults.add(reason)
            self.notices.append(f"{text}: {self.folder}: {reason}")

    def _close_session(self) -> None:
        if self._session is None or self.off is not None or self._segments_left_open:
            return
        try:
            stats = dataclasses.asdict(self.stats())
            manifest.close_manifest(self.folder, self._session.info, stats, self._manifest)
            self.closed_well = True
        except Exception as error:
            self._note_fault("the final counts could not be written", error)

    def _write_metrics(self, *, last: bool) -> None:
        """Write the metrics file if it is due, and at the end."""
        try:
            if last:
                self._metrics_file.write(self.info, self.stats(), ended=True)
            else:
                waiting = len(self._accounting.entries)
                self._metrics_file.refresh(self.info, self.stats, waiting=waiting)
        except BaseException as error:
            text = f"the metrics file could not be written: {self._metrics_file.path}: {_reason(error)}"
            self.notices.append(text)

    def _end(self) -> None:
        process.unregister(self)
        self._ended.set()


def _wait_until_gone(thread: threading.Thread, deadline: float) -> None:
    """Wait for the last moments of a thread that is about to end, up to a time of ``time.monotonic``.

    ``Thread.join`` takes locks that are not re-entrant, so a signal handler must not call it. The kernel
    can be asked without a lock; on systems without /proc this does not wait.
    """
    number = thread.native_id
    while number is not None and os.path.exists(f"/proc/self/task/{number}") and time.monotonic() < deadline:
        time.sleep(0.0005)


def _reason(error: BaseException) -> str:
    """A short text for an error, without a path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _follows(buffer: Buffer, last: Buffer) -> bool:
    """Whether a buffer is right behind another one in memory."""
    return buffer[0] is last[0] and buffer[1] == last[1] + 1


def _shape_of(entry: Entry) -> Shape | None:
    """The shape of an entry's load, if it has one."""
    return None if entry.load is None else Shape(entry.ep_size, *entry.load.ring.shape)
