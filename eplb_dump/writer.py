"""ExpertLoadWriter: an engine calls it once per forward pass, on its own thread.

:meth:`ExpertLoadWriter.record` copies and enqueues, nothing else; :mod:`eplb_dump.background` writes.
docs/reliability.md says which data survives which failure.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eplb_dump import process, rendezvous, start
from eplb_dump.arguments import (
    is_integer,
    new_session_id,
    require_integer,
    require_json_mapping,
    require_layers,
    require_name,
    require_path,
    require_run_id,
    require_scope,
    require_seconds,
    require_text,
)
from eplb_dump.background import Background, Limits
from eplb_dump.encoder import LAST_MAP_INVALID
from eplb_dump.format import __version__
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LOAD, MAX_NUMBER, MAX_PHASE, Status
from eplb_dump.format.session import SessionInfo, session_path, write_session_file
from eplb_dump.staging import NOTHING, Entry, Staged, Staging

logger = logging.getLogger("eplb_dump")

#: How many steps may wait for the journal, also those without a load; more are only counted.
_MAX_WAITING = 1 << 16
_SKIP_REASONS = {"dummy": Status.DUMMY, "not_sampled": Status.NOT_SAMPLED, "dropped": Status.DROPPED}


@dataclass(frozen=True)
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
    #: Why recording stopped before ``close``, or None.
    off: str | None = None


class ExpertLoadWriter:
    """Appends per-step expert loads and placements to a dump, from inside an engine.

    One writer per process and model. With scope ``"local"`` every EP rank has one and records its own
    contribution over all physical experts; with ``"global"`` one rank records sums over all ranks.

    >>> writer = ExpertLoadWriter("dumps", model="m", num_logical_experts=4, ep_size=2, ep_rank=0)
    >>> writer.record(None, expert_load, physical_to_logical_map)   # once per forward pass
    >>> writer.close()

    Args:
        expert_load_dump_dir: the dump's folder; created if it does not exist.
        model: the model's name; a drafter has a writer and a name of its own.
        num_logical_experts: experts of the model in each MoE layer.
        ep_size: the number of EP ranks that share the physical experts.
        ep_rank: this process's EP rank.
        scope: ``"local"`` or ``"global"``, see above.
        run_id: the same for all ranks of one engine start. Default: EXPERT_LOAD_DUMP_RUN_ID; if that
            is not set, ranks find each other in the dump's folder (docs/format.md, "Runs").
        start_id: an id that all ranks of this engine start share and no other start ever has, if the engine
            knows one; it tells starts apart for certain. It is written into ``session.json``.
        interval: one step out of this many is recorded; the others count as ``not_sampled``.
        moe_layers: the model's own number of each MoE layer, ascending. Default: 0, 1, 2, …
        ranks_per_node: EP ranks per node, to separate traffic within and between nodes.
        engine, engine_version, engine_config: a description of the engine; the config must be JSON.
        token_replication: how many times the engine counts each token; readers divide loads by it.
        flush_interval: at most this many seconds pass until a step is in the journal.
        segment_steps, segment_bytes, segment_seconds: a segment is sealed at the first of these limits.
        queue_steps, queue_bytes: limits of the queue to the background thread; when it is full, new
            steps are dropped and counted.

    Raises:
        TypeError, ValueError: an argument is wrong. A file system error raises nothing: it is logged
            once and recording is off, as a recorder must not keep an engine from starting.
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
        start_id: str | None = None,
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
        root = require_path("expert_load_dump_dir", expert_load_dump_dir)
        limits = Limits(
            require_seconds("flush_interval", flush_interval),
            require_integer("segment_bytes", segment_bytes, 1, MAX_NUMBER),
            require_seconds("segment_seconds", segment_seconds),
        )
        now, host = time.time_ns(), socket.gethostname()
        info = SessionInfo(
            run_id=require_run_id(rendezvous.environment_run_id() if run_id is None else run_id) or "",
            model=require_name("model", model),
            session_id=new_session_id(now, host),
            ep_rank=require_integer("ep_rank", ep_rank, 0),
            scope=require_scope(scope),
            num_logical_experts=require_integer("num_logical_experts", num_logical_experts, 1, MAX_EXPERTS),
            ep_size=require_integer("ep_size", ep_size, 1, MAX_EXPERTS),
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
            engine_config=require_json_mapping("engine_config", engine_config),
            launch=start.launch_of(os.environ),
            start=start.own_start(require_text("start_id", start_id)),
            token_replication=require_integer("token_replication", token_replication, 1),
            interval=require_integer("interval", interval, 1),
            segment_steps=require_integer("segment_steps", segment_steps, 1),
            writer_version=__version__,
        )
        if info.ep_rank >= info.ep_size:
            raise ValueError(f"ep_rank is {ep_rank}, but must be below ep_size = {ep_size}")
        self._staging = Staging(
            None if info.moe_layers is None else len(info.moe_layers),
            require_integer("queue_steps", queue_steps, 1),
            require_integer("queue_bytes", queue_bytes, 1, MAX_NUMBER),
        )
        self._ep_rank, self._ep_size, self._interval = info.ep_rank, info.ep_size, info.interval
        # One producer at a time: a drafter's thread may record at the same time as the main one. The
        # background thread never takes this lock, so the engine never waits for it.
        self._lock = threading.Lock()
        self._next_step = 0
        self._entries: deque[Entry] = deque()
        self._enqueued = 0
        self._seen = self._dummy = self._not_sampled = self._accepted = self._unlisted = 0
        self._dropped: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._closed = self._ended_well = False
        self._off: str | None = None
        self._background: Background | None = None
        self.info = info
        self._start(root, limits)
        process.register(self, self._abandon_in_child)

    def _start(self, root: Path, limits: Limits) -> None:
        """Claim a run, create the session's folder and start the threads; if that fails, recording is off."""
        try:
            if not self.info.run_id:
                claim = rendezvous.claim_run(root, self.info)
                self.info = dataclasses.replace(self.info, run_id=claim.run_id)
                if claim.doubt is not None:
                    logger.warning(
                        "%s; EP rank %d records into run %s of its own: give all ranks of a start one "
                        "run id, in %s",
                        claim.doubt,
                        self._ep_rank,
                        claim.run_id,
                        rendezvous.RUN_ID_VARIABLE,
                    )
            #: ``<expert_load_dump_dir>/run=…/model=…/rank=…/session=…``
            self.folder = session_path(root, self.info)
            self.folder.mkdir(parents=True)
            write_session_file(self.folder, self.info, durable=False)  # the sealer syncs it
        except OSError as error:
            self._off = f"{type(error).__name__}: {error.strerror or error}"
            logger.warning(
                "expert-load recording is off, the engine goes on: cannot write to %s: %s", root, self._off
            )
            self.folder = session_path(root, self.info)
            return
        background = Background(
            self.folder, self.info, self._entries, limits, lambda: dataclasses.asdict(self.stats())
        )
        try:
            background.start()
            self._background = background
        except RuntimeError as error:  # the interpreter is shutting down, or no thread is available
            self._off = f"no background thread: {error}"
            logger.warning("expert-load recording is off, the engine goes on: %s", self._off)

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
        """Record one forward pass. Copies and enqueues; never waits, never raises.

        Args:
            step: the number of the pass, ascending and the same on every rank; None: the writer counts.
            expert_load: integer ``[num_moe_layers, num_physical_experts]``, tokens routed to each
                physical expert in this pass; torch (CPU or CUDA) or numpy. On CUDA it is copied
                asynchronously on the current stream, so it may be overwritten on that stream
                as soon as this returns.
            physical_to_logical_map: integer, same shape, the logical expert in each slot (-1: none)
                that was in force in this pass. None: as before, or unknown. It is copied only if it may
                have changed: it is another tensor, or torch's version counter changed.
            num_tokens: tokens of this rank in the pass (of all ranks with scope ``"global"``), if known.
            phase: for example ``"prefill"`` or ``"decode"``.
            ep_size: the number of EP ranks from this step on, if it changed (elastic EP).

        A step that cannot be recorded (a wrong shape or type, negative counts, an expert that does not
        exist, a step number that goes back) is rejected: it is counted in :meth:`stats` and has a row
        in ``steps``.
        """
        try:
            with self._lock:
                self._record(step, expert_load, physical_to_logical_map, num_tokens, phase, ep_size)
        except Exception as error:  # whatever went wrong here, the engine's step must go on
            self._account_for(error)

    def skip(self, reason: str = "dummy", step: int | None = None) -> None:
        """Count a forward pass without a load: ``"dummy"``, ``"not_sampled"`` or ``"dropped"``.

        A dummy pass has no real tokens on this rank: its load counts as zero, not as missing.
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
        """Wait until everything recorded so far is in the journal, where it survives a crash.

        Returns False if that takes longer than ``timeout`` seconds, or recording is off.
        """
        if self._background is None or self._off is not None:
            return False
        return self._background.wait_consumed(self._enqueued, timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush, seal and write the final accounting; later records are dropped and counted.

        Returns False if that takes longer than ``timeout`` seconds. The rest is in the journal then, which
        readers use as well.
        """
        with self._lock:
            if self._closed:
                return self._ended_well
            self._closed = True
        process.unregister(self)
        if self._background is not None and self._off is None:
            self._ended_well = self._background.close(timeout)
        return self._ended_well

    def stats(self) -> WriterStats:
        """The accounting so far. Counts and their sum agree exactly while no call is running."""
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
        sampled = self._interval == 1 or number % self._interval == 0
        if sampled and placement is None and self._staging.placement_lost:
            self._reject(number, LAST_MAP_INVALID)
            return
        ep_size_before = self._ep_size
        if ep_size is not None and ep_size is not ep_size_before:
            if is_integer(ep_size) and self._ep_rank < ep_size <= MAX_LOAD:
                self._ep_size = int(ep_size)
            elif sampled:
                self._reject(number, f"ep_size is not an integer above EP rank {self._ep_rank}")
                return
        if not sampled:
            self._not_sampled += self._enqueue(number, Status.NOT_SAMPLED, self._stage_alone(placement))
            return
        staged = self._staging.stage(expert_load, placement, self._ep_size)
        if isinstance(staged, Staged):
            self._accepted += self._enqueue(number, Status.RECORDED, staged, num_tokens, phase)
        elif staged.cause == "queue":
            self._drop(number, staged.reason, placement)
        elif staged.cause == "expert_load":
            self._reject(number, staged.reason, placement)
        else:
            self._reject(number, staged.reason)
            if staged.cause == "ep_size":
                self._ep_size = ep_size_before

    def _begin(self, step: int | None) -> int | None:
        """Count a step as seen and return its number, or None if it was rejected."""
        self._seen += 1
        if step is None:
            number = self._next_step
        elif is_integer(step):
            # A tensor is not an integer here: reading it would wait for the device.
            number = int(step)
            if number >= MAX_NUMBER:
                self._rejected[f"a step above {MAX_NUMBER - 1}"] += 1
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
        staged: Staged = NOTHING,
        num_tokens: int | None = None,
        phase: str | None = None,
    ) -> bool:
        """Queue a row for ``steps`` and its buffers; False if the queue is full or recording stopped."""
        why = self._stopped() if staged is NOTHING else None  # else it was checked before staging
        if why is None and len(self._entries) >= _MAX_WAITING:
            why = "the queue is full"
        if why is not None:
            if status in (Status.RECORDED, Status.DUMMY, Status.NOT_SAMPLED):
                self._dropped[why] += 1
            self._unlisted += 1
            return False
        if num_tokens is None:
            num_tokens = -1
        elif not is_integer(num_tokens) or not 0 <= num_tokens < MAX_NUMBER:
            self._notice("num_tokens is not a count and is left out")
            num_tokens = -1
        if isinstance(phase, str):
            # Of a subclass, such as a member of an enumeration, only its text.
            phase = str.__str__(phase)
        if phase is not None and not (
            isinstance(phase, str) and len(phase) <= MAX_PHASE and phase.isprintable()
        ):
            self._notice("phase is not a short text and is left out")
            phase = None
        fills_up = staged is not NOTHING and self._staging.take(staged)
        now, monotonic = time.time_ns(), time.monotonic_ns()
        load, placement, _ = staged
        fields = (step, now, monotonic, status, num_tokens, phase, self._ep_size, load, placement)
        # Faster than Entry(...): this runs once per step.
        self._entries.append(tuple.__new__(Entry, fields))
        self._enqueued += 1
        if fills_up and self._background is not None:
            self._background.wake()
        return True

    def _stopped(self) -> str | None:
        if self._closed:
            return "the writer is closed"
        background = self._background
        if background is None or background.off is not None:
            return "recording is off"
        return None

    def _stage_alone(self, placement: Any) -> Staged:
        """Stage a placement whose load is not recorded."""
        try:
            return self._staging.stage_placement(placement)
        except Exception as error:
            self._notice(f"a physical_to_logical_map could not be kept: {type(error).__name__}")
            return NOTHING

    def _drop(self, step: int, reason: str, placement: Any = None) -> None:
        self._dropped[reason] += 1
        self._enqueue(step, Status.DROPPED, self._stage_alone(placement))
        if self._background is not None:
            self._background.wake()
        self._notice(f"steps are dropped and counted: {reason}")

    def _reject(self, step: int, reason: str, placement: Any = None) -> None:
        self._rejected[reason] += 1
        self._enqueue(step, Status.REJECTED, self._stage_alone(placement))
        self._notice(f"a step was rejected and is counted: {reason}")

    def _account_for(self, error: Exception) -> None:
        """Count a step that an unexpected error ended."""
        self._rejected[f"an unforeseen {type(error).__name__}"] += 1
        self._unlisted += 1
        self._notice(f"a step was rejected and is counted: an unforeseen {type(error).__name__}")

    def _notice(self, text: str) -> None:
        """Let the background thread log a warning once, as logging may do I/O."""
        if self._background is not None:
            self._background.notices.append(text)

    def _abandon_in_child(self) -> None:
        """In a forked child this writer is off; the session belongs to the parent."""
        self._lock = threading.Lock()
        self._off = "the process was forked; make a writer in the child"
        self._entries = deque()
        if self._background is not None:
            self._background.abandon_in_child()
