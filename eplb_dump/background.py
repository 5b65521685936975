"""The background side of the writer: queue to journal, journal to sealed segments.

Two daemon threads: one drains the queue into the journal at least every flush interval, the other
seals finished journals, so that a slow disk's fsync never delays the journal. Work is done in few
large numpy calls, which release the interpreter lock, so that the engine's own Python is not slowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_dump.format import journal, manifest, segment
from eplb_dump.format.journal import Int32, Int64, JournalAppender, Shape, StepRows
from eplb_dump.format.schema import EMPTY_SLOT, MAX_LOAD, FormatError, Status
from eplb_dump.format.session import SessionInfo, write_session_file
from eplb_dump.staging import Entry, Ring

logger = logging.getLogger("eplb_dump")

#: A batch, and so a frame, holds at most this many steps and about this many bytes. The larger it
#: is, the fewer calls: after each the thread must win the interpreter lock back from the engine's.
BATCH_STEPS = 256
BATCH_BYTES = 16 << 20


LAST_MAP_INVALID = "the last physical_to_logical_map was not valid"


@dataclass(frozen=True)
class Limits:
    """When a segment is sealed, and how long data may wait for the journal."""

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
        self._info = info
        self._entries = entries
        self._limits = limits
        self._final_stats = final_stats
        self._segment_window = info.segment_steps * info.interval
        self._appender: JournalAppender | None = None
        self._opened_at = 0.0
        self._seq = 0
        #: The steps that the open segment may hold; an empty range before the first.
        self._window_start = self._window_end = 0
        self._shape: Shape | None = None
        self._placement: Int32 | None = None
        self._placement_ep_size = 0
        #: A map that came before any load told how many layers there are, its step and EP size.
        self._early: tuple[Int32, int, int] | None = None
        #: Why the last placement that came cannot be used; loads under it are rejected.
        self._placement_fault: str | None = None
        self._largest = 0
        self._wake = threading.Event()
        self._closing = False
        self.notices: deque[str] = deque(maxlen=64)
        self._noticed: set[str] = set()
        self._written = threading.Condition()
        # Counters: written by the background thread only, read by anyone.
        self.consumed = 0
        self.rejected: Counter[str] = Counter()
        self.lost = 0
        #: Steps that have no row in ``steps``, as recording stopped.
        self.unlisted = 0
        self.bytes_written = 0
        self.segments_sealed = 0
        self.segments_left_open = 0
        #: Why recording stopped, once it did.
        self.off: str | None = None
        self._gave_up = False
        self._to_seal: queue.SimpleQueue[JournalAppender | None] = queue.SimpleQueue()
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
        """Wait until ``count`` entries are in the journal (True), or time or luck runs out."""
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
        """After a fork, in the child: the files are the parent's; let go of them."""
        self.off = "the process was forked; make a writer in the child"
        if self._appender is not None:
            with contextlib.suppress(OSError):
                self._appender.close()

    # ---- the drainer's thread

    def _drain_loop(self) -> None:
        # Half of the interval, so that a step waits no longer than one interval, writing included.
        period = self._limits.flush_interval / 2
        while True:
            self._wake.wait(period)
            self._wake.clear()
            closing = self._closing
            self._say_notices()
            try:
                self._drain()
                self._rotate_if_due()
                if closing:
                    self._rotate()
                    self._to_seal.put(None)
            except Exception as error:  # whatever happens here must not reach the engine
                self._give_up(error)
                closing = closing or self._closing
            if closing:
                if self.off is not None:
                    self._to_seal.put(None)
                return

    def _say_notices(self) -> None:
        while self.notices:
            self._notice(self.notices.popleft())

    def _notice(self, text: str) -> None:
        """Log a warning, once."""
        if text not in self._noticed:
            self._noticed.add(text)
            logger.warning("%s", text)

    def _give_up(self, error: Exception) -> None:
        if self.off is None:
            self.off = _reason(error)
            logger.warning("expert-load recording is off, the engine goes on: %s: %s", self._folder, self.off)
        if self._appender is not None:
            with contextlib.suppress(OSError):
                self._appender.close()
            self._appender = None
        self._discard()
        with self._written:
            self._gave_up = True
            self._written.notify_all()

    def _discard(self) -> None:
        """Give back the buffers of what can no longer be written."""
        while self._entries:
            entry = self._entries.popleft()
            _release([entry.load, entry.placement])
            self._lose([entry.status])

    def _lose(self, status: Sequence[int]) -> None:
        self.consumed += len(status)
        self.unlisted += len(status)
        self.lost += sum(s == Status.RECORDED for s in status)

    def _drain(self) -> None:
        if self.off is not None:
            self._discard()
            return
        entries = self._entries
        # What comes meanwhile waits for the next round: many small batches would cost the engine's
        # Python more meetings over the interpreter lock.
        due = len(entries)
        while due > 0:
            batch = [entries.popleft()]
            self._begin_segment_if_due(batch[0])
            load, ep_size = batch[0].load, batch[0].ep_size
            room = BATCH_STEPS
            # The usual case, in few words, as the engine's Python waits meanwhile: what follows in the
            # same ring and window goes into the same batch.
            while entries and len(batch) < room:
                entry = entries[0]
                inside = self._window_start <= entry.step < self._window_end
                if not inside and entry.status is not Status.REJECTED:  # whose step may be a wrong one
                    break
                if entry.load is not None:
                    if load is None:  # the first load tells the shape
                        if self._shape is not None and self._shape != _shape_of(entry):
                            break
                    elif (
                        entry.load[0] is not load[0]
                        or entry.load[1] != load[1] + 1
                        or entry.ep_size != ep_size
                    ):
                        break
                    room = min(BATCH_STEPS, 1 + BATCH_BYTES // entry.load[0].slot_bytes)
                    load, ep_size = entry.load, entry.ep_size
                batch.append(entries.popleft())
            if load is not None and self._shape is None:
                self._shape = Shape(ep_size, *load[0].shape)
            due -= len(batch)
            self._write(batch)

    def _begin_segment_if_due(self, entry: Entry) -> None:
        """Rotate where an entry is of another window of steps or another shape than the journal."""
        if entry.status is Status.REJECTED:
            return
        other_window = not self._window_start <= entry.step < self._window_end
        other_shape = entry.load is not None and self._shape not in (None, _shape_of(entry))
        if other_window or other_shape:
            if self._window_end:
                self._rotate()
            self._window_start = entry.step - entry.step % self._segment_window
            self._window_end = self._window_start + self._segment_window

    def _note_shape(self, shape: Shape) -> None:
        """Complete session.json by the shapes, which are first known now."""
        if self._info.num_moe_layers is not None:
            return
        self._info = dataclasses.replace(
            self._info,
            num_moe_layers=shape.num_moe_layers,
            num_physical_experts=shape.num_physical_experts,
        )
        write_session_file(self._folder, self._info)

    def _write(self, batch: Sequence[Entry]) -> None:
        """Append one batch: placements, then loads, then the steps frame that commits them.

        The loads of a batch lie in consecutive buffers of one ring.
        """
        status = np.array([entry.status for entry in batch], np.uint8)
        try:
            parts = self._encode(batch, status)
            self._open_journal().append(*parts)
        except Exception:
            self._lose(status.tolist())
            raise
        self.bytes_written += sum(map(len, parts))
        with self._written:
            self.consumed += len(batch)
            self._written.notify_all()

    def _encode(self, batch: Sequence[Entry], status: npt.NDArray[np.uint8]) -> list[bytes]:
        """The frames of a batch; sets ``status`` to rejected where a load cannot be recorded."""
        staged = [i for i, entry in enumerate(batch) if entry.load is not None]
        parts: list[bytes] = []
        if staged:
            first, last = batch[staged[0]].load, batch[staged[-1]].load
            assert first is not None
            assert last is not None
            ring, low, high = first[0], first[1], last[1]
            ring.wait(low, high)  # for the placements beside the loads, too
        if staged:
            parts += self._early_placement()
        if staged and batch[staged[0]].placement is None:
            parts += self._restate_placement(batch[staged[0]])
        changes, faults = self._take_placements(batch)
        parts += changes
        if staged:
            load = ring.host[low : high + 1]
            faults = self._judge(load, [faults[i] for i in staged])
            good = [i for i, fault in enumerate(faults) if fault is None]
            for i, fault in enumerate(faults):
                if fault is not None:
                    status[staged[i]] = Status.REJECTED
                    self.rejected[fault] += 1
                    self.notices.append(f"a step was rejected and is counted: {fault}")
            if good:
                assert self._shape is not None
                self._note_shape(self._shape)
                chosen = load if len(good) == len(load) else load[good]
                steps = np.array([batch[staged[i]].step for i in good], np.int64)
                parts.append(self._loads_frame(steps, chosen))
            ring.release(len(staged))
        step, time_ns, monotonic_ns, _, num_tokens, phase, *_ = zip(*batch, strict=True)
        phases = tuple(name for name in dict.fromkeys(phase) if name is not None)
        code: dict[str | None, int] = {name: i for i, name in enumerate(phases)}
        rows = StepRows(
            step=np.array(step, np.int64),
            time_ns=np.array(time_ns, np.int64),
            monotonic_ns=np.array(monotonic_ns, np.int64),
            status=status,
            num_tokens=np.array(num_tokens, np.int64),
            phase=np.array([code.get(name, -1) for name in phase], np.int16),
            phases=phases,
        )
        parts.append(journal.steps_frame(rows))
        return parts

    def _judge(self, load: npt.NDArray[Any], faults: list[str | None]) -> list[str | None]:
        """Why each load ``[n, layers, physical]`` cannot be recorded; None: it can."""
        # Seen as unsigned, a negative count is a huge one: one pass finds both faults.
        limit = min(MAX_LOAD, int(np.iinfo(load.dtype).max))
        self._largest = int(load.view(f"u{load.dtype.itemsize}").max())
        if self._largest <= limit:
            return faults
        self._largest = MAX_LOAD
        for i, one in enumerate(load):
            if faults[i] is None and int(one.view(f"u{one.dtype.itemsize}").max()) > limit:
                negative = one.dtype.kind == "i" and int(one.min()) < 0
                faults[i] = "negative counts" if negative else f"counts above {MAX_LOAD}"
        return faults

    def _take_placements(self, batch: Sequence[Entry]) -> tuple[list[bytes], list[str | None]]:
        """Frames for placements that changed, and each entry's fault where its placement is none."""
        given = [entry.placement for entry in batch if entry.placement is not None]
        for entry in batch:
            if entry.load is None and entry.placement is not None:  # else the load's event stands for both
                entry.placement[0].wait(entry.placement[1], entry.placement[1])
        differs = iter(self._differing(batch, given))
        parts: list[bytes] = []
        faults: list[str | None] = []
        taken = True
        for entry in batch:
            if entry.placement is None:
                faults.append(LAST_MAP_INVALID if self._placement_fault is not None else None)
                continue
            # Told is whether it differs from the one before, which may not have been taken.
            if next(differs) or not taken:
                ring, index = entry.placement
                taken = entry.load is not None or self._fits(entry, ring.host[index])
                if taken:
                    parts += self._take_placement(entry, ring.host[index])
            faults.append(self._placement_fault)
        _release(given)
        return parts, faults

    def _differing(self, batch: Sequence[Entry], given: Sequence[tuple[Ring, int]]) -> list[bool]:
        """Which of the given placements may differ from the one before, told in one pass for all."""
        if not given:
            return []
        ring, low = given[0]
        high = given[-1][1]
        if given[-1][0] is not ring or high - low + 1 != len(given):
            return [True] * len(given)
        maps = ring.host[low : high + 1]
        first = (
            self._placement_fault is not None
            or self._placement is None
            or self._placement.shape != tuple(ring.shape)
            or self._placement_ep_size != batch[-1].ep_size
            or bool((maps[0] != self._placement).any())
        )
        later: list[bool] = (maps[1:] != maps[:-1]).any(axis=(1, 2)).tolist()
        return [first, *later]

    def _fits(self, entry: Entry, raw: npt.NDArray[Any]) -> bool:
        """Whether a map without a load can be one of the model, as far as is known; else it is left out.

        The load can have been rejected since it was of something else, and then the map is, too.
        """
        layers = self._num_moe_layers()
        if layers is None:
            self._early = raw.astype(np.int32), entry.step, entry.ep_size
        elif raw.shape[0] != layers or raw.shape[1] % entry.ep_size:
            self.notices.append("a physical_to_logical_map of another shape came without a load; left out")
        else:
            return True
        return False

    def _num_moe_layers(self) -> int | None:
        if self._shape is not None:
            return self._shape.num_moe_layers
        named = self._info.moe_layers
        return self._info.num_moe_layers if named is None else len(named)

    def _early_placement(self) -> list[bytes]:
        """The frame of a map that came before the first load, which has come and tells how many layers."""
        if self._early is None:
            return []
        (raw, step, ep_size), self._early = self._early, None
        entry = Entry(max(step, self._window_start), 0, 0, Status.NOT_SAMPLED, -1, None, ep_size, None, None)
        return self._take_placement(entry, raw) if self._fits(entry, raw) else []

    def _take_placement(self, entry: Entry, raw: npt.NDArray[Any]) -> list[bytes]:
        """Frames for the layers whose placement changed; a copy is kept to compare the next with."""
        if entry.load is not None and raw.shape != tuple(entry.load[0].shape):
            self._placement_fault = "physical_to_logical_map is not of expert_load's shape"
            return []
        if int(raw.min()) < EMPTY_SLOT or int(raw.max()) >= self._info.num_logical_experts:
            self._placement_fault = "physical_to_logical_map names an expert that does not exist"
            return []
        self._placement_fault = None
        before, now = self._placement, raw.astype(np.int32)
        self._placement = now
        if before is None or before.shape != now.shape or self._placement_ep_size != entry.ep_size:
            return self._placement_frame(entry, np.arange(len(now)))
        changed = np.flatnonzero((before != now).any(axis=1))
        return self._placement_frame(entry, changed) if len(changed) else []

    def _restate_placement(self, entry: Entry) -> list[bytes]:
        """Where only ep_size changed, the same map means other ranks: state it anew."""
        assert entry.load is not None
        if self._placement is None or self._placement_ep_size == entry.ep_size:
            return []
        if self._placement.shape != tuple(entry.load[0].shape):  # of before; the new one is not known
            return []
        return self._placement_frame(entry, np.arange(len(self._placement)))

    def _placement_frame(self, entry: Entry, layers: npt.NDArray[np.intp]) -> list[bytes]:
        assert self._placement is not None
        self._placement_ep_size = entry.ep_size
        step = np.full(len(layers), entry.step, np.int64)
        rows = self._placement[layers]
        return [journal.placements_frame(step, layers.astype(np.int32), rows, entry.ep_size)]

    def _loads_frame(self, step: Int64, load: npt.NDArray[Any]) -> bytes:
        """``load`` [n, layers, physical], in the narrowest type that holds the batch's largest count."""
        dtype = np.uint8 if self._largest < 1 << 8 else np.uint16 if self._largest < 1 << 16 else np.int32
        assert self._shape is not None
        n, layers, physical = load.shape
        narrow = np.empty((layers, n, physical), dtype)
        np.copyto(narrow, load.transpose(1, 0, 2), casting="unsafe")
        return journal.loads_frame(step, narrow, self._shape.ep_size)

    def _open_journal(self) -> JournalAppender:
        if self._appender is None:
            self._appender = JournalAppender(self._folder, self._info, self._seq)
            self._opened_at = time.monotonic()
            self._seq += 1
        return self._appender

    def _rotate_if_due(self) -> None:
        if self._appender is not None and (
            self._appender.size >= self._limits.segment_bytes
            or time.monotonic() - self._opened_at >= self._limits.segment_seconds
        ):
            self._rotate()

    def _rotate(self) -> None:
        """Hand the open journal to the sealer; the next batch opens a new one."""
        self._shape = None
        if self._appender is not None:
            self._to_seal.put(self._appender)
            self._appender = None

    # ---- the sealer's thread

    def _seal_loop(self) -> None:
        while (journal := self._to_seal.get()) is not None:
            try:
                segment.seal(journal.path)
                self.segments_sealed += 1
            except Exception as error:  # the journal stays, is read as well, and can be sealed later
                self.segments_left_open += 1
                text = "a journal could not be sealed; it stays, and is read as it is"
                self._notice(f"{text}: {self._folder}: {_reason(error)}")
            finally:
                journal.close()
        self._say_notices()  # those that came up after the drainer's last look
        if self.off is None and not self.segments_left_open:
            with contextlib.suppress(OSError, FormatError):
                manifest.close_manifest(self._folder, self._info, self._final_stats())


def _reason(error: Exception) -> str:
    """An error in a few words; the path, if any, is said elsewhere."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}" if str(error) else repr(error)


def _shape_of(entry: Entry) -> Shape:
    """The shape of an entry that has a load."""
    assert entry.load is not None
    return Shape(entry.ep_size, *entry.load[0].shape)


def _release(buffers: Iterable[tuple[Ring, int] | None]) -> None:
    for buffer in buffers:
        if buffer is not None:
            buffer[0].release(1)
