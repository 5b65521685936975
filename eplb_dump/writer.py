"""ExpertLoadWriter: an engine calls it once per forward pass, on its own thread.

:meth:`ExpertLoadWriter.record` copies and enqueues, nothing else; :mod:`eplb_dump.background` writes.
docs/operate/reliability.md says which data survives which failure.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eplb_dump import process, rendezvous, start
from eplb_dump.accounting import IDLE, PLACED, RUNNING, Accounting, WriterStats
from eplb_dump.arguments import (
    is_duration,
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
from eplb_dump.budget import Retention
from eplb_dump.encoder import LAST_MAP_INVALID
from eplb_dump.format import __version__
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LOAD, MAX_NUMBER, MAX_PHASE, Status, holds
from eplb_dump.format.session import SessionInfo
from eplb_dump.staging import NOTHING, Entry, Staged, Staging

__all__ = ["ExpertLoadWriter", "WriterStats"]

#: The constructor waits so long for the file system; after that, the session is opened in the background.
OPEN_SECONDS = 2.0
#: How many steps may wait for the journal, also those without a load; more are only counted.
_MAX_WAITING = 1 << 16
#: What :meth:`ExpertLoadWriter.record` returns if it did not take a step's counts.
_NOT_TAKEN = -1
_NESTED = "a signal handler interrupted another call"
_SKIP_REASONS = {"dummy": Status.DUMMY, "not_sampled": Status.NOT_SAMPLED, "dropped": Status.DROPPED}


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
        engine: the engine's name.
        engine_version: its version.
        engine_config: its settings; they must be JSON.
        token_replication: how many times the engine counts each token; readers divide loads by it.
        flush_interval: at most this many seconds pass until a step is in the journal.
        segment_steps: a segment is sealed at this limit, or at the first of the next two.
        segment_bytes: likewise, in bytes.
        segment_seconds: likewise, in seconds.
        max_bytes: the most bytes that the session's folder takes, a number or a text such as ``"2G"``. Old
            segments are thinned to stay within it: docs/operate/retention.md. None: no limit. Default:
            EXPERT_LOAD_DUMP_MAX_BYTES.
        max_age: steps older than this are removed, in seconds or as a text such as ``"7d"``. None: never.
            Default: EXPERT_LOAD_DUMP_MAX_AGE.
        min_free_bytes: with less free space on the volume, segments are thinned, too. Default:
            EXPERT_LOAD_DUMP_MIN_FREE.
        queue_steps: limit of the queue to the background thread; when it is full, new steps are dropped and
            counted.
        queue_bytes: likewise, in bytes.
        metrics_file: a text file with this writer's counters for node_exporter's textfile collector, written
            every 15 s. Its name gets the model and the rank, unless it has ``{model}`` and ``{rank}``.
            Default: EXPERT_LOAD_DUMP_METRICS_FILE, if that is set.

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
        max_bytes: int | str | None = None,
        max_age: float | str | None = None,
        min_free_bytes: int | str | None = None,
        queue_steps: int = 512,
        queue_bytes: int = 64 << 20,
        metrics_file: str | os.PathLike[str] | None = None,
    ) -> None:
        root = require_path("expert_load_dump_dir", expert_load_dump_dir)
        limits = Limits(
            require_seconds("flush_interval", flush_interval),
            require_integer("segment_bytes", segment_bytes, 1, MAX_NUMBER),
            require_seconds("segment_seconds", segment_seconds),
        )
        keep, fault = Retention.of(max_bytes, max_age, min_free_bytes), None
        try:
            keep = keep.or_environment()
        except ValueError as error:  # not the engine's fault: it starts, and its volume stays safe
            fault = str(error)
        host = socket.gethostname()
        now, monotonic = (
            time.time_ns(),
            time.monotonic_ns(),
        )  # together: their difference aligns ranks' clocks
        info = SessionInfo(
            run_id=require_run_id(rendezvous.environment_run_id() if run_id is None else run_id) or "",
            model=require_name("model", model),
            session_id=new_session_id(now, host),
            ep_rank=require_integer("ep_rank", ep_rank, 0),
            scope=require_scope(scope),
            num_logical_experts=require_integer("num_logical_experts", num_logical_experts, 1, MAX_EXPERTS),
            ep_size=require_integer("ep_size", ep_size, 1, MAX_EXPERTS),
            created_unix_ns=now,
            created_monotonic_ns=monotonic,
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
        if info.moe_layers is not None and not holds(len(info.moe_layers), info.num_logical_experts):
            raise ValueError(
                f"moe_layers lists {len(info.moe_layers)} layers; with {num_logical_experts} logical "
                f"experts each, that is more than the format can store"
            )
        self._staging = Staging(
            None if info.moe_layers is None else len(info.moe_layers),
            info.num_logical_experts,
            require_integer("queue_steps", queue_steps, 1),
            require_integer("queue_bytes", queue_bytes, 1, MAX_NUMBER),
        )
        self._ep_rank, self._ep_size, self._interval = info.ep_rank, info.ep_size, info.interval
        self._next_step = 0
        #: What ``since`` must be in the next call, if it is not 0, and the number of that call.
        self._expected_since = 0, 0
        #: A phase that has been checked.
        self._last_phase: str | None = None
        self._accounting = Accounting()
        health = None if metrics_file is None else require_path("metrics_file", metrics_file)
        self._background = Background(root, info, self._accounting, limits, keep, health)
        # A writer that is dropped ends like one that is closed. At exit, eplb_dump.process does that.
        weakref.finalize(self, self._background.request_close).atexit = False
        if fault is None:
            self._background.start(OPEN_SECONDS)
        else:
            self._background.stay_off(fault)

    @property
    def info(self) -> SessionInfo:
        """The session's metadata. The run is known once the session is open."""
        return self._background.info

    @property
    def folder(self) -> Path:
        """``<expert_load_dump_dir>/run=…/model=…/rank=…/session=…``"""
        return self._background.folder

    # ---- the engine's thread

    def prepare(self, expert_load: Any, physical_to_logical_map: Any = None) -> None:
        """Allocate the buffers for tensors like these, which the first :meth:`record` does otherwise.

        Optional, for a time when the engine does not serve yet: page-locked memory takes tens of ms. What the
        tensors hold does not matter. Never raises; if it fails, :meth:`record` says why.
        """
        accounting = self._accounting
        with contextlib.suppress(Exception), accounting.calls:
            if accounting.state is IDLE:
                self._staging.prepare(expert_load, physical_to_logical_map)

    def begin_step(self) -> None:
        """Mark that a forward pass begins. Optional; queues one CUDA event, never waits, never raises.

        Call it right before the pass, with the stream of the pass as the current one. Then ``device_ms`` is
        the time on the device from here to the next :meth:`record`, without what the engine waited for before
        the pass; otherwise it is the time since the ``record`` of the step before. Does nothing until the
        first load on CUDA was recorded.
        """
        accounting = self._accounting
        try:
            with accounting.calls:
                if accounting.state is IDLE and accounting.refuses is None:
                    self._staging.begin_step(accounting.seen + 1)
        except Exception:  # whatever is wrong with the device, the engine will find out
            pass

    def record(
        self,
        step: int | None,
        expert_load: Any,
        physical_to_logical_map: Any,
        num_tokens: int | None = None,
        phase: str | None = None,
        *,
        ep_size: int | None = None,
        step_ms: float | None = None,
        since: int = 0,
    ) -> int:
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
            step_ms: the engine's own time of the pass in ms, if it knows it.
            since: what the previous call returned, if ``expert_load`` was not zeroed after it: it is a
                running total then, and the difference to that call's is recorded. 0: it counts this pass
                alone. If the previous call took no counts, or was a ``skip``, the step is rejected.

        Returns:
            A number for ``since`` in the next call: positive, or -1 if this step's counts were not taken.

        A step that cannot be recorded (a wrong shape or type, negative counts, an expert that does not
        exist, a step number that goes back) is rejected: it is counted in :meth:`stats` and has a row
        in ``steps``.
        """
        accounting = self._accounting
        try:
            with accounting.calls:
                accounting.seen += 1
                if accounting.state is not IDLE:
                    accounting.dropped[_NESTED] += 1
                    if physical_to_logical_map is not None:
                        self._staging.lose_placement()
                    return _NOT_TAKEN
                try:
                    accounting.state = RUNNING
                    return self._record(
                        step, expert_load, physical_to_logical_map, num_tokens, phase, ep_size, step_ms, since
                    )
                except Exception as error:  # whatever went wrong here, the engine's step must go on
                    self._account_for(error)
                except BaseException:  # raised by a signal handler
                    if physical_to_logical_map is not None:
                        self._staging.lose_placement()
                    raise
                finally:
                    accounting.state = IDLE
        except Exception:  # there is no memory at all, not even to count the step
            pass
        return _NOT_TAKEN

    def skip(self, reason: str = "dummy", step: int | None = None) -> None:
        """Count a forward pass without a load: ``"dummy"``, ``"not_sampled"`` or ``"dropped"``.

        A dummy pass has no real tokens on this rank: its load counts as zero, not as missing.
        """
        accounting = self._accounting
        try:
            with accounting.calls:
                accounting.seen += 1
                if accounting.state is not IDLE:
                    accounting.dropped[_NESTED] += 1
                    return
                try:
                    accounting.state = RUNNING
                    self._skip(reason, step)
                except Exception as error:
                    self._account_for(error)
                finally:
                    accounting.state = IDLE
        except Exception:
            pass

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything recorded so far is in the journal, where it survives a crash.

        Returns False if that takes longer than ``timeout`` seconds, or recording is off.
        """
        return self._background.wait_written(timeout)

    def close(self, timeout: float = 5.0) -> bool:
        """Flush, seal and write the final accounting; later records are dropped and counted.

        Can be called in a signal handler. Returns False if it takes longer than ``timeout`` seconds, if
        recording stopped before, or if a segment could not be sealed. What was written is in a journal then,
        which readers use as well.

        With ``timeout=0`` it begins to close, in the background, and returns at once; the exit of the process
        waits for the rest. An engine that is told to end calls it before it tears anything down, because the
        process may be killed before it exits.
        """
        if timeout > 0:
            process.unregister(self._background)
        return self._background.close(timeout)

    def stats(self) -> WriterStats:
        """The accounting so far. Counts and their sum agree exactly."""
        return self._background.stats()

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
        step_ms: float | None,
        since: int,
    ) -> int:
        if type(step) is int and self._next_step <= step < MAX_NUMBER:
            number = step
        else:
            checked = self._next_step if step is None else self._check_step(step)
            if checked is None:
                if placement is not None:
                    self._staging.lose_placement()
                return _NOT_TAKEN
            number = checked
        self._next_step = number + 1
        if self._accounting.refuses is not None:
            self._enqueue(number, Status.RECORDED)  # counts it as dropped
            return _NOT_TAKEN
        sampled = self._interval == 1 or number % self._interval == 0
        if sampled and placement is None and self._staging.placement_lost:
            self._reject(number, LAST_MAP_INVALID)
            return _NOT_TAKEN
        ep_size_before = self._ep_size
        if ep_size is not None and ep_size is not ep_size_before:
            if is_integer(ep_size) and self._ep_rank < ep_size <= MAX_LOAD:
                self._ep_size = int(ep_size)
            elif sampled:
                self._reject(number, f"ep_size is not an integer above EP rank {self._ep_rank}")
                return _NOT_TAKEN
        if not sampled:
            self._enqueue(number, Status.NOT_SAMPLED, self._stage_alone(placement))
            return _NOT_TAKEN
        call = self._accounting.seen
        if since and (since, call) != self._expected_since:
            since = _NOT_TAKEN
        staged = self._staging.stage(expert_load, placement, self._ep_size, call)
        if isinstance(staged, Staged):
            taken = self._enqueue(number, Status.RECORDED, staged, num_tokens, phase, step_ms, since)
            self._expected_since = taken, call + 1
            return taken
        if staged.cause == "queue":
            self._drop(number, self._accounting.full, placement)
        elif staged.cause == "expert_load":
            self._reject(number, staged.reason, placement)
        else:
            self._reject(number, staged.reason)
            if staged.cause == "ep_size":
                self._ep_size = ep_size_before
        return _NOT_TAKEN

    def _skip(self, reason: str, step: int | None) -> None:
        number = self._next_step if step is None else self._check_step(step)
        if number is None:
            return
        self._next_step = number + 1
        status = _SKIP_REASONS.get(reason) if isinstance(reason, str) else None
        if status is None:
            text = reason[:40] if isinstance(reason, str) else type(reason).__name__
            self._reject(number, f"skip was called with the unknown reason {text!r}")
        elif status is Status.DROPPED:
            self._drop(number, "by the engine")
        else:
            self._enqueue(number, status)

    def _check_step(self, step: int) -> int | None:
        """The number of a step that the engine numbered, or None if it was rejected."""
        if not is_integer(step):
            # A tensor is not an integer here: reading it would wait for the device.
            self._count_rejected(f"step is a {type(step).__name__}, not an int")
            return None
        number = int(step)
        if number >= MAX_NUMBER:
            self._count_rejected(f"a step above {MAX_NUMBER - 1}")
        elif number >= self._next_step:
            return number
        elif number < 0:
            self._count_rejected("a negative step")
        else:
            why = (
                f"step numbers must increase: {'repeated' if number == self._next_step - 1 else 'went back'}"
            )
            self._reject(number, f"{why} (pass None to let the writer count)")
        return None

    def _enqueue(
        self,
        step: int,
        status: Status,
        staged: Staged = NOTHING,
        num_tokens: int | None = None,
        phase: str | None = None,
        step_ms: float | None = None,
        since: int = 0,
    ) -> int:
        """Queue a row for ``steps`` and its buffers; drop it if the queue is full or recording stopped.

        Returns the number of the load's buffer, -1 if there is none.
        """
        accounting = self._accounting
        entries = accounting.entries
        why = accounting.refuses
        if why is None and len(entries) >= _MAX_WAITING:
            why = accounting.full
        if why is not None:
            if accounting.state is not PLACED:
                self._count_dropped(why)
            return _NOT_TAKEN
        # In the order of what an engine gives in every step.
        if type(num_tokens) is not int or not 0 <= num_tokens < MAX_NUMBER:
            num_tokens = self._checked_tokens(num_tokens)
        if phase is not self._last_phase:
            phase = self._last_phase = self._checked_phase(phase)
        if step_ms is not None and not is_duration(step_ms):
            self._notice("step_ms is not a time in ms; recording the step without it")
            step_ms = None
        load, placement, _ = staged
        now, monotonic = time.time_ns(), time.monotonic_ns()
        ep_size = self._ep_size
        fields = (step, now, monotonic, status, num_tokens, phase, step_ms, ep_size, load, placement, since)
        entry = tuple.__new__(Entry, fields)  # faster than Entry(...): this runs once per step
        # A signal handler may end this call at any point. Buffers that are taken for nothing are released
        # with the next ones, and a placement that is not remembered is copied again; any other order would
        # mix up steps or placements.
        fills_up = False
        taken = _NOT_TAKEN
        if load is not None:
            ring, _, taken = load
            ring.taken = taken  # as Ring.take, without the call
            fills_up = taken - ring.released >= ring.many
        if placement is not None:
            fills_up = placement.ring.take(placement) or fills_up
            self._staging.queues_placement()
        entries.append(entry)
        accounting.state = PLACED
        if placement is not None:
            self._staging.note_queued(staged)
        if fills_up:
            self._background.wake()
        return taken

    def _checked_tokens(self, num_tokens: Any) -> int:
        if num_tokens is None:
            return -1
        if is_integer(num_tokens) and 0 <= num_tokens < MAX_NUMBER:
            return int(num_tokens)
        self._notice("num_tokens is not a count; recording the step without it")
        return -1

    def _checked_phase(self, phase: Any) -> str | None:
        if isinstance(phase, str):
            # Of a subclass, such as a member of an enumeration, only its text.
            text = str.__str__(phase)
            if len(text) <= MAX_PHASE and text.isprintable():
                return text
        if phase is not None:
            self._notice("phase is not a short text; recording the step without it")
        return None

    def _stage_alone(self, placement: Any) -> Staged:
        """Stage a placement whose load is not recorded."""
        try:
            return self._staging.stage_placement(placement)
        except Exception as error:
            self._notice(f"a physical_to_logical_map could not be copied: {type(error).__name__}")
            return NOTHING

    def _drop(self, step: int, reason: str, placement: Any = None) -> None:
        self._count_dropped(reason)
        self._enqueue(step, Status.DROPPED, self._stage_alone(placement))
        self._background.wake()
        if self._background.paused is None:  # the pause has been logged
            self._notice(f"dropped a step; stats() counts dropped steps: {reason}")

    def _reject(self, step: int, reason: str, placement: Any = None) -> None:
        self._count_rejected(reason)
        self._enqueue(step, Status.REJECTED, self._stage_alone(placement))
        self._notice(f"rejected a step; stats() counts rejected steps: {reason}")

    def _count_dropped(self, reason: str) -> None:
        self._accounting.dropped[reason] += 1
        self._accounting.state = PLACED

    def _count_rejected(self, reason: str) -> None:
        self._accounting.rejected[reason] += 1
        self._accounting.state = PLACED

    def _account_for(self, error: Exception) -> None:
        """Count a step that an unexpected error ended, if it is not counted yet."""
        with contextlib.suppress(Exception):  # what fails here, Accounting.stats counts as interrupted
            reason = f"an unexpected {type(error).__name__}"
            if self._accounting.state is RUNNING:
                self._count_rejected(reason)
            self._notice(f"rejected a step; stats() counts rejected steps: {reason}")

    def _notice(self, text: str) -> None:
        """Let the background thread log a warning once, as logging may do I/O."""
        if self._accounting.refuses is None:
            self._background.notices.append(text)
