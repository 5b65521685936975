"""ExpertLoadWriter: what an engine calls once per forward pass, on its own thread.

:meth:`ExpertLoadWriter.record` copies and enqueues, nothing else; what happens with it afterwards is
in :mod:`eplb_dump.background`. docs/reliability.md says what survives which fault.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eplb_dump import rendezvous
from eplb_dump.arguments import (
    is_integer,
    new_session_id,
    package_version,
    require_integer,
    require_json_mapping,
    require_layers,
    require_seconds,
    require_text,
)
from eplb_dump.background import LAST_MAP_INVALID, Background, Limits
from eplb_dump.format.schema import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_LOAD,
    MAX_NUMBER,
    RUN_ID_PATTERN,
    Scope,
    Status,
)
from eplb_dump.format.session import SessionInfo, session_path, write_session_file
from eplb_dump.staging import ChangeDetector, Entry, Ring, StagingError, slot_bytes

logger = logging.getLogger("eplb_dump")

#: Steps without a load (dummies, drops) that may wait for the journal; more are only counted.
_MAX_WAITING = 1 << 16
#: Buffers for placements of tensors that count their versions: they change rarely, or a layer a step.
_PLACEMENT_SLOTS = 64
_EXIT_DEADLINE_SECONDS = 5.0
_SKIP_REASONS = {"dummy": Status.DUMMY, "not_sampled": Status.NOT_SAMPLED, "dropped": Status.DROPPED}


@dataclass(frozen=True)
class WriterStats:
    """The writer's accounting. ``recorded + dummy + not_sampled + dropped + rejected == seen``."""

    seen: int = 0
    #: Accepted; after ``flush()`` returned True, in the journal.
    recorded: int = 0
    dummy: int = 0
    not_sampled: int = 0
    dropped: int = 0
    rejected: int = 0
    #: Steps that have no row in ``steps``, as even that had to be dropped.
    unlisted: int = 0
    drop_reasons: dict[str, int] = field(default_factory=dict)
    reject_reasons: dict[str, int] = field(default_factory=dict)
    bytes_written: int = 0
    segments_sealed: int = 0
    #: Why recording stopped before ``close``, or None.
    off: str | None = None


class ExpertLoadWriter:
    """Appends per-step expert loads and placements to a dump, from inside an engine.

    One writer a process and model. With scope ``"local"`` every EP rank has one and records its own
    contribution over all physical experts; with ``"global"`` one rank records sums over all ranks.

    >>> writer = ExpertLoadWriter("dumps", model="m", num_logical_experts=4, ep_size=2, ep_rank=0)
    >>> writer.record(None, expert_load, physical_to_logical_map)   # once per forward pass
    >>> writer.close()

    Args:
        expert_load_dump_dir: the dump's folder; made where it does not exist.
        model: the model's name; a drafter has a writer and a name of its own.
        num_logical_experts: experts of the model in each MoE layer.
        ep_size: EP ranks over which the physical experts are spread.
        ep_rank: this process's EP rank.
        scope: ``"local"`` or ``"global"``, see above.
        run_id: common to all ranks of one engine start. Without it EXPERT_LOAD_DUMP_RUN_ID is taken;
            without that, ranks find each other in the dump's folder (docs/format.md, "Runs").
        interval: every how many steps one is recorded; the others count as ``not_sampled``.
        moe_layers: the model's own number of each MoE layer, ascending. Default: 0, 1, 2, …
        ranks_per_node: EP ranks on one node, to tell traffic inside and between nodes.
        engine, engine_version, engine_config: what is being recorded; the config must be JSON.
        token_replication: by how much the engine over-counts; loads are divided by it on reading.
        flush_interval: seconds after which a step is in the journal at the latest.
        segment_steps, segment_bytes, segment_seconds: a segment is sealed at the first of them.
        queue_steps, queue_bytes: bounds of the queue to the background thread; when one is reached,
            the newest step is dropped and counted.

    Raises:
        TypeError, ValueError: an argument is wrong. A fault of the file system raises nothing: it is
            logged once and recording is off, as a recorder must not keep an engine from starting.
    """

    def __init__(
        self,
        expert_load_dump_dir: str | os.PathLike[str],
        *,
        model: str,
        num_logical_experts: int,
        ep_size: int,
        ep_rank: int = 0,
        scope: str = "local",
        run_id: str | None = None,
        interval: int = 1,
        moe_layers: Sequence[int] | None = None,
        ranks_per_node: int | None = None,
        engine: str | None = None,
        engine_version: str | None = None,
        engine_config: Mapping[str, Any] | None = None,
        token_replication: int = 1,
        flush_interval: float = 1.0,
        segment_steps: int = 2048,
        segment_bytes: int = 128 << 20,
        segment_seconds: float = 900.0,
        queue_steps: int = 512,
        queue_bytes: int = 64 << 20,
    ) -> None:
        if not isinstance(expert_load_dump_dir, str | os.PathLike):
            kind = type(expert_load_dump_dir).__name__
            raise TypeError(f"expert_load_dump_dir must be a path, not {kind}")
        root = Path(expert_load_dump_dir)
        if not isinstance(model, str) or not model:
            raise ValueError(f"model must be the model's name, not {model!r}")
        if not isinstance(scope, str) or scope not in {s.value for s in Scope}:
            raise ValueError(f'scope must be "local" or "global", not {scope!r}')
        run_id = rendezvous.environment_run_id() if run_id is None else run_id
        if run_id is not None and not (isinstance(run_id, str) and RUN_ID_PATTERN.fullmatch(run_id)):
            raise ValueError(
                f"run_id must be 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter "
                f"or digit, not {run_id!r}"
            )
        self._ep_rank = require_integer("ep_rank", ep_rank, 0)
        self._ep_size = require_integer("ep_size", ep_size, 1, MAX_EXPERTS)
        if self._ep_rank >= self._ep_size:
            raise ValueError(f"ep_rank is {ep_rank}, but must be below ep_size = {ep_size}")
        self._interval = require_integer("interval", interval, 1)
        self._queue_steps = require_integer("queue_steps", queue_steps, 1)
        self._queue_bytes = require_integer("queue_bytes", queue_bytes, 1, MAX_NUMBER)
        limits = Limits(
            require_seconds("flush_interval", flush_interval),
            require_integer("segment_bytes", segment_bytes, 1, MAX_NUMBER),
            require_seconds("segment_seconds", segment_seconds),
        )
        config = require_json_mapping("engine_config", engine_config)
        launch = rendezvous.launch_of(os.environ)
        now = time.time_ns()
        host = socket.gethostname()
        info = SessionInfo(
            run_id=run_id or "",
            model=model,
            session_id=new_session_id(now, host),
            ep_rank=self._ep_rank,
            scope=Scope(scope),
            num_logical_experts=require_integer("num_logical_experts", num_logical_experts, 1, MAX_EXPERTS),
            ep_size=self._ep_size,
            created_unix_ns=now,
            created_monotonic_ns=time.monotonic_ns(),
            host=host,
            pid=os.getpid(),
            moe_layers=require_layers(moe_layers),
            ranks_per_node=None
            if ranks_per_node is None
            else require_integer("ranks_per_node", ranks_per_node, 1),
            engine=require_text("engine", engine),
            engine_version=require_text("engine_version", engine_version),
            engine_config=config,
            launch=launch,
            token_replication=require_integer("token_replication", token_replication, 1),
            interval=self._interval,
            segment_steps=require_integer("segment_steps", segment_steps, 1),
            writer_version=package_version(),
        )
        # One producer at a time: a drafter's thread may record beside the main one. The background
        # thread never takes this lock, so nothing waits for it.
        self._lock = threading.Lock()
        self._next_step = 0
        self._entries: deque[Entry] = deque()
        self._enqueued = 0
        self._seen = self._dummy = self._not_sampled = self._accepted = self._unlisted = 0
        self._dropped: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._loads: Ring | None = None
        self._maps: Ring | None = None
        self._wake_at = 1
        self._map_detector = ChangeDetector()
        #: The loads' ring when the map was last copied: of another one, its shape may not fit.
        self._map_came_with: Ring | None = None
        #: A map was handed over and could not be kept: what holds from then on is not known.
        self._map_lost = False
        self._layers: int | None = None
        self._closed = self._ended_well = False
        self._off: str | None = None
        self._background: Background | None = None
        try:
            if not info.run_id:
                claimed = rendezvous.claim_run(
                    root,
                    model,
                    ep_rank=self._ep_rank,
                    ep_size=self._ep_size,
                    scope=info.scope,
                    num_logical_experts=info.num_logical_experts,
                    launch=launch,
                )
                info = dataclasses.replace(info, run_id=claimed)
            folder = session_path(root, info)
            folder.mkdir(parents=True)
            write_session_file(folder, info)
        except OSError as error:
            self._off = f"{type(error).__name__}: {error.strerror or error}"
            logger.warning(
                "expert-load recording is off, the engine goes on: cannot write to %s: %s", root, self._off
            )
            folder = session_path(root, info)
        self.info = info
        #: ``<expert_load_dump_dir>/run=…/model=…/rank=…/session=…``
        self.folder = folder
        if self._off is None:
            self._background = Background(
                folder, info, self._entries, limits, lambda: dataclasses.asdict(self.stats())
            )
            try:
                self._background.start()
            except RuntimeError as error:  # the interpreter is shutting down, or no thread is to be had
                self._off = f"no background thread: {error}"
                logger.warning("expert-load recording is off, the engine goes on: %s", self._off)
        _open_writers.add(self)
        _install_exit_hooks()

    # ---- the engine's thread

    def record(
        self,
        step: int | None,
        expert_load: Any,
        physical_to_logical_map: Any,
        num_tokens: int | None = None,
        phase: str | None = None,
        *,
        ep_size: int | None = None,
    ) -> None:
        """Note one forward pass. Copies and enqueues; never waits, never raises.

        Args:
            step: the pass's number, the same on every rank and growing; None: the writer counts.
            expert_load: integer ``[num_moe_layers, num_physical_experts]``, tokens routed to each
                physical expert in this pass; torch (CPU or CUDA) or numpy. On CUDA it is copied
                asynchronously on the current stream, so it may be overwritten on that stream
                as soon as this returns.
            physical_to_logical_map: integer, same shape, the logical expert in each slot (-1: none)
                that was in force in this pass. None: as before, or not known. It is copied only
                where it may have changed: another tensor, or torch's version counter moved.
            num_tokens: tokens of this rank in the pass, if known.
            phase: for instance ``"prefill"`` or ``"decode"``.
            ep_size: the number of EP ranks from this step on, where it changed (elastic EP).

        What cannot be recorded (a wrong shape or type, negative counts, an expert that does not
        exist, a step that goes back) is rejected: counted in :meth:`stats`, with a row in ``steps``.
        """
        try:
            with self._lock:
                self._record(step, expert_load, physical_to_logical_map, num_tokens, phase, ep_size)
        except Exception as error:  # the engine's step must go on, whatever went wrong in here
            self._account_for(error)

    def skip(self, reason: str = "dummy", step: int | None = None) -> None:
        """Note a forward pass without a load: ``"dummy"``, ``"not_sampled"`` or ``"dropped"``.

        A dummy pass had no real tokens on this rank: its load counts as zero, not as missing.
        """
        try:
            with self._lock:
                number = self._begin(step)
                if number is None:
                    return
                status = _SKIP_REASONS.get(reason) if isinstance(reason, str) else None
                if status is None:
                    text = reason[:40] if isinstance(reason, str) else type(reason).__name__
                    self._reject(number, f"skip for the unknown reason {text!r}")
                elif status is Status.DROPPED:
                    self._drop(number, "by the engine")
                elif self._enqueue(number, status):
                    self._dummy += status is Status.DUMMY
                    self._not_sampled += status is Status.NOT_SAMPLED
        except Exception as error:
            self._account_for(error)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until all that was recorded before is where a kill cannot reach it.

        Returns False where that took longer than ``timeout`` seconds, or recording is off.
        """
        if self._background is None or self._off is not None:
            return False
        return self._background.wait_consumed(self._enqueued, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush, seal and write the final accounting; later records are dropped and counted.

        Returns False where that took longer than ``timeout`` seconds: what is left then is in the
        journal, which is read as well.
        """
        with self._lock:
            if self._closed:
                return self._ended_well
            self._closed = True
        _open_writers.discard(self)
        if self._background is not None and self._off is None:
            self._ended_well = self._background.close(timeout)
        return self._ended_well

    def stats(self) -> WriterStats:
        """The accounting so far. Counts and their sum agree exactly when no call is under way."""
        background = self._background
        rejected, dropped = self._rejected.copy(), self._dropped.copy()
        accepted, lost, unlisted, bytes_written, sealed = self._accepted, 0, self._unlisted, 0, 0
        off = self._off
        if background is not None:
            late = background.rejected.copy()
            rejected.update(late)
            accepted -= late.total()
            lost = background.lost
            unlisted += background.unlisted
            bytes_written, sealed = background.bytes_written, background.segments_sealed
            off = off or background.off
        if lost:
            dropped["recording stopped"] += lost
        return WriterStats(
            seen=self._seen,
            recorded=accepted - lost,
            dummy=self._dummy,
            not_sampled=self._not_sampled,
            dropped=sum(dropped.values()),
            rejected=sum(rejected.values()),
            unlisted=unlisted,
            drop_reasons=dict(dropped),
            reject_reasons=dict(rejected),
            bytes_written=bytes_written,
            segments_sealed=sealed,
            off=off,
        )

    def __enter__(self) -> ExpertLoadWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _record(
        self,
        step: int | None,
        expert_load: Any,
        placement: Any,
        num_tokens: int | None,
        phase: str | None,
        ep_size: int | None,
    ) -> None:
        number = self._begin(step)
        if number is None:
            return
        if self._stopped() is not None:
            self._enqueue(number, Status.RECORDED)  # counts it as dropped
            return
        if self._interval > 1 and number % self._interval:
            if ep_size is not None and is_integer(ep_size) and self._ep_rank < ep_size <= MAX_LOAD:
                self._ep_size = int(ep_size)
            self._not_sampled += self._enqueue(
                number, Status.NOT_SAMPLED, placement=self._map_alone(placement)
            )
            return
        if placement is None and self._map_lost:
            self._reject(number, LAST_MAP_INVALID)
            return
        ep_size_before = self._ep_size
        if ep_size is not None:
            if not is_integer(ep_size) or not self._ep_rank < ep_size <= MAX_LOAD:
                self._reject(number, f"ep_size is not an integer above EP rank {self._ep_rank}")
                return
            self._ep_size = int(ep_size)
        loads = self._loads
        try:
            if loads is None or not loads.fits(expert_load):
                loads = self._loads = self._new_ring(expert_load, self._queue_steps)
        except StagingError as error:
            self._reject(number, f"expert_load is {error}", placement)
            return
        except Exception as error:
            self._reject(number, f"expert_load cannot be staged: {type(error).__name__}", placement)
            return
        if loads.shape[1] % self._ep_size:
            self._reject(
                number, f"{loads.shape[1]} physical experts do not divide among {self._ep_size} EP ranks"
            )
            self._ep_size = ep_size_before
            return
        index = loads.take()
        if index < 0:
            self._drop(number, "the queue is full", placement)
            return
        maps, map_index = None, -1
        try:
            # A map that came with loads of another shape is to be looked at again, and rejected.
            if placement is not None and not (
                self._map_detector.unchanged(placement) and self._map_came_with is loads
            ):
                maps = self._ring_for_maps(placement)
                map_index = maps.take()
                if map_index < 0:
                    loads.untake()
                    self._drop(number, "the queue is full", placement)
                    return
                maps.fill(map_index, placement)
            loads.fill(index, expert_load)
            loads.mark(index)  # of both copies
        except Exception as error:
            loads.untake()
            if maps is not None and map_index >= 0:
                maps.untake()
            why = f"physical_to_logical_map is {error}"
            if not isinstance(error, StagingError):
                why = f"the copy failed: {type(error).__name__}"
            self._reject(number, why)
            return
        buffer = (loads, index)
        map_buffer = None if maps is None else (maps, map_index)
        if not self._enqueue(number, Status.RECORDED, num_tokens, phase, buffer, map_buffer):
            loads.untake()
            if maps is not None:
                maps.untake()
            return
        self._accepted += 1
        self._layers = loads.shape[0]
        busy = loads.used >= self._wake_at
        if maps is not None:
            self._map_detector.remember(placement)
            self._map_came_with = loads
            self._map_lost = False
            busy = busy or maps.used * 4 > maps.count
        if busy and self._background is not None:
            self._background.wake()

    def _begin(self, step: int | None) -> int | None:
        """Count a step as seen and give it its number; None where it ends here."""
        self._seen += 1
        if step is None:
            number = self._next_step
        elif is_integer(step):
            # A tensor is not read: on CUDA that would wait for the device.
            number = int(step)
            if number > MAX_NUMBER:
                self._rejected[f"a step above {MAX_NUMBER}"] += 1
                self._unlisted += 1
                return None
            if number < self._next_step:
                why = f"steps must grow: {'repeated' if number == self._next_step - 1 else 'went back'}"
                if number >= 0:
                    self._reject(number, f"{why} (pass None to let the writer count)")
                else:
                    self._rejected["a negative step"] += 1
                    self._unlisted += 1
                return None
        else:
            self._rejected[f"step is a {type(step).__name__}, not an int"] += 1
            self._unlisted += 1
            return None
        self._next_step = number + 1
        return number

    def _enqueue(
        self,
        step: int,
        status: Status,
        num_tokens: int | None = None,
        phase: str | None = None,
        load: tuple[Ring, int] | None = None,
        placement: tuple[Ring, int] | None = None,
    ) -> bool:
        """Queue a row for ``steps``; False where there is no more room or no one to take it."""
        why = self._stopped()
        if why is None and len(self._entries) >= _MAX_WAITING:
            why = "the queue is full"
        if why is not None:
            if status in (Status.RECORDED, Status.DUMMY, Status.NOT_SAMPLED):
                self._dropped[why] += 1
            self._unlisted += 1
            if placement is not None and load is None:
                placement[0].untake()
                self._map_lost = True
            return False
        if num_tokens is None:
            num_tokens = -1
        elif not is_integer(num_tokens) or not 0 <= num_tokens < MAX_NUMBER:
            self._notice("num_tokens is not a count and is left out")
            num_tokens = -1
        if isinstance(phase, str):
            # A subclass, as an enumeration's member is, gives its text and nothing of its own.
            phase = str.__str__(phase)
        if phase is not None and not (isinstance(phase, str) and len(phase) <= 64 and phase.isprintable()):
            self._notice("phase is not a short text and is left out")
            phase = None
        now, monotonic = time.time_ns(), time.monotonic_ns()
        # What Entry(…) does, without its call: this runs once a step.
        fields = (step, now, monotonic, status, num_tokens, phase, self._ep_size, load, placement)
        self._entries.append(tuple.__new__(Entry, fields))
        self._enqueued += 1
        return True

    def _stopped(self) -> str | None:
        if self._closed:
            return "the writer is closed"
        background = self._background
        if background is None or background.off is not None or self._off is not None:
            return "recording is off"
        return None

    def _map_alone(self, placement: Any) -> tuple[Ring, int] | None:
        """Stage a map whose load is not recorded, as later steps may rely on it ("None: as before")."""
        try:
            if placement is None or self._map_detector.unchanged(placement):
                return None
            maps = self._ring_for_maps(placement)
            index = maps.take()
            if index >= 0:
                maps.fill(index, placement)
                maps.mark(index)
                self._map_detector.remember(placement)
                self._map_came_with, self._map_lost = None, False
                return maps, index
        except Exception as error:
            self._notice(f"a physical_to_logical_map could not be kept: {type(error).__name__}")
        self._map_lost = True
        return None

    def _drop(self, step: int, reason: str, placement: Any = None) -> None:
        self._dropped[reason] += 1
        self._enqueue(step, Status.DROPPED, placement=self._map_alone(placement))
        if self._background is not None:
            self._background.wake()
        self._notice(f"steps are dropped and counted: {reason}")

    def _reject(self, step: int, reason: str, placement: Any = None) -> None:
        self._rejected[reason] += 1
        self._enqueue(step, Status.REJECTED, placement=self._map_alone(placement))
        self._notice(f"a step was rejected and is counted: {reason}")

    def _account_for(self, error: Exception) -> None:
        """A step that an unforeseen error ended before it was counted."""
        self._rejected[f"an unforeseen {type(error).__name__}"] += 1
        self._unlisted += 1
        self._notice(f"a step was rejected and is counted: an unforeseen {type(error).__name__}")

    def _notice(self, text: str) -> None:
        """Have a warning logged once, by the background thread: logging may do I/O."""
        if self._background is not None:
            self._background.notices.append(text)

    def _new_ring(self, expert_load: Any, steps: int) -> Ring:
        count = min(steps, max(4, self._queue_bytes // max(1, slot_bytes(expert_load))))
        ring = Ring(expert_load, count)
        layers = self.info.moe_layers
        if layers is not None and len(layers) != ring.shape[0]:
            raise StagingError(f"of {ring.shape[0]} layers, but moe_layers names {len(layers)}")
        if ring.shape[0] > MAX_LAYERS or ring.shape[1] > MAX_EXPERTS:
            raise StagingError(
                f"of {ring.shape[0]} layers × {ring.shape[1]} slots, more than the format holds"
            )
        if self._layers not in (None, ring.shape[0]):
            raise StagingError(f"of {ring.shape[0]} layers, but was of {self._layers}")
        self._wake_at = max(1, count // 4)
        return ring

    def _ring_for_maps(self, placement: Any) -> Ring:
        """The buffers for placements: few where torch counts the map's changes, else one a step."""
        if self._maps is None or not self._maps.fits(placement):
            # An empty ring first: it checks the kind of object, and only then it can be asked more.
            if Ring(placement, 0).is_torch and ChangeDetector.version(placement) is not None:
                count = _PLACEMENT_SLOTS
            else:
                count = min(self._queue_steps, max(4, self._queue_bytes // max(1, slot_bytes(placement))))
            self._maps = Ring(placement, count)
        return self._maps

    def _after_fork_in_child(self) -> None:
        """The parent's session goes on in the parent; in the child this writer is off."""
        self._lock = threading.Lock()
        self._off = "the process was forked; make a writer in the child"
        self._entries = deque()
        if self._background is not None:
            self._background.abandon_in_child()


_open_writers: set[ExpertLoadWriter] = set()
_hooked_pid: int | None = None


def _close_open_writers() -> None:
    """At interpreter exit: close what is open, all together within one deadline."""
    deadline = time.monotonic() + _EXIT_DEADLINE_SECONDS
    for writer in list(_open_writers):
        with contextlib.suppress(Exception):
            writer.close(max(0.1, deadline - time.monotonic()))


def _install_exit_hooks() -> None:
    global _hooked_pid  # noqa: PLW0603 - once a process
    if _hooked_pid == os.getpid():
        return
    _hooked_pid = os.getpid()
    # A multiprocessing child leaves by os._exit and runs only multiprocessing's own finalizers.
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _close_open_writers, exitpriority=0)


def _forked_child() -> None:
    for writer in list(_open_writers):
        writer._after_fork_in_child()
    _open_writers.clear()


atexit.register(_close_open_writers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked_child)
