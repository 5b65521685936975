"""Writing an import as a run of a dump: journals that are sealed at once, as a writer's are.

Nothing that was there is written over; a run appears whole or not at all.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eplb_analyze.atomic import new_run
from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.plan import Plan
from eplb_analyze.transfer.importers.source import Chunk
from eplb_dump.format import frames, journal
from eplb_dump.format.journal import Int32, Int64, JournalAppender, Shape, StepRows
from eplb_dump.format.manifest import close_manifest
from eplb_dump.format.schema import Status
from eplb_dump.format.segment import seal
from eplb_dump.format.session import Origin, SessionInfo, SourceFile, session_path, write_session_file

SEGMENT_STEPS = 2048
SEGMENT_BYTES = 128 << 20
BATCH_BYTES = 8 << 20
#: Steps between two that the source has are listed as not sampled up to this interval.
MAX_INTERVAL = 1000
#: A session says where it came from in at most so many files.
MAX_FILES = 100


@dataclass(frozen=True)
class Written:
    """What a new run has: its id, and its steps."""

    run_id: str
    #: Steps that some rank has, and those that every rank has.
    steps: int
    complete: int
    not_sampled: int


def write(plan: Plan, into: Path, run_id: str | None) -> Written:
    """Write a new run.

    Raises:
        UsageError: the run is there already, or its name is none.
        DumpError: the source turned out to be wrong, or the folder cannot be written.
    """
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    # Not a bare number: engines that start meanwhile would join it.
    with new_run(into, run_id, f"import-{moment}", plan.model) as new:
        sessions = _write_sessions(plan, new.root, new.run_id)
    own = [session.recorded for session in sessions]
    return Written(
        new.run_id,
        len(functools.reduce(np.union1d, own)),
        len(functools.reduce(np.intersect1d, own)),
        max(session.not_sampled for session in sessions),
    )


def _write_sessions(plan: Plan, root: Path, run_id: str) -> list[_Session]:
    from eplb_dump.format import __version__

    reading = plan.reading
    now, clock = time.time_ns(), time.monotonic_ns()
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now / 1e9))
    sessions = []
    for rank, chunks in plan.parts.items():
        files = reading.files_of.get(rank, reading.files)
        origin = Origin(
            system=reading.system,
            kind=reading.kind,
            files=tuple(SourceFile(f.name, f.stat().st_size) for f in files[:MAX_FILES]),
            importer_version=__version__,
            unknown=dict(reading.unknown),
            assumed=dict(reading.assumed),
        )
        info = SessionInfo(
            run_id=run_id,
            model=plan.model,
            session_id=f"{moment}-import-{secrets.token_hex(4)}",
            ep_rank=rank,
            scope=reading.scope,
            num_logical_experts=plan.num_logical_experts,
            ep_size=plan.ep_size,
            created_unix_ns=now,
            created_monotonic_ns=clock,
            host=socket.gethostname(),
            pid=os.getpid(),
            moe_layers=plan.layers,
            engine=reading.system,
            token_replication=plan.token_replication,
            interval=reading.interval,
            segment_steps=SEGMENT_STEPS,
            writer_version=__version__,
            origin=origin,
        )
        sessions.append(_Session(root, info))
        sessions[-1].write(chunks())
    return sessions


class _Session:
    """One session on its way into its folder."""

    def __init__(self, root: Path, info: SessionInfo) -> None:
        self._info = info
        self._folder = session_path(root, info)
        self._folder.mkdir(parents=True)
        self._seq = 0
        self._journal: JournalAppender | None = None
        self._shape: Shape | None = None
        self._window = -1
        self._placement: Int32 | None = None
        self._placement_ep_size = -1
        self._last: int | None = None
        self._steps: list[Int64] = [np.empty(0, np.int64)]
        self.not_sampled = 0

    @property
    def recorded(self) -> Int64:
        """The steps written so far."""
        return np.concatenate(self._steps)

    def write(self, chunks: Iterator[Chunk]) -> None:
        """Write all chunks, and close the session."""
        for chunk in chunks:
            for part in self._batches(chunk):
                self._append(part)
        self._seal()
        recorded = len(self.recorded)
        stats = {"seen": recorded + self.not_sampled, "recorded": recorded, "not_sampled": self.not_sampled}
        stats |= {"dummy": 0, "dropped": 0, "rejected": 0}
        write_session_file(self._folder, self._info)
        close_manifest(self._folder, self._info, stats)

    def _batches(self, chunk: Chunk) -> Iterator[Chunk]:
        """The chunk in parts of one segment's window each, none larger than a frame may be."""
        n, layers, width = chunk.load.shape
        if layers * width * 4 > frames.MAX_PAYLOAD // 2:
            raise DumpError(f"{layers:,} layers of {width:,} slots are more than a step of the format holds")
        most = max(1, BATCH_BYTES // (layers * width * 4))
        window = chunk.step // self._info.interval // SEGMENT_STEPS
        edges = {0, n, *(np.flatnonzero(np.diff(window)) + 1).tolist()}
        cuts = sorted(edges | set(range(0, n, most)))
        for low, high in itertools.pairwise(cuts):
            tokens = None if chunk.num_tokens is None else chunk.num_tokens[low:high]
            phase = None if chunk.phase is None else chunk.phase[low:high]
            yield replace(
                chunk, step=chunk.step[low:high], load=chunk.load[low:high], num_tokens=tokens, phase=phase
            )

    def _append(self, chunk: Chunk) -> None:
        assert chunk.ep_size is not None
        shape = Shape(chunk.ep_size, *chunk.load.shape[1:])
        window = int(chunk.step[0]) // self._info.interval // SEGMENT_STEPS
        if self._shape is None:
            self._info = replace(
                self._info,
                num_moe_layers=shape.num_moe_layers,
                num_physical_experts=shape.num_physical_experts,
                ep_size=shape.ep_size,
            )
        full = self._journal is not None and self._journal.size >= SEGMENT_BYTES
        if shape != self._shape or window != self._window or full:
            self._seal()
        self._shape, self._window = shape, window
        if self._journal is None:
            self._journal = JournalAppender(self._folder, self._info, self._seq)
            self._seq += 1
        rows = self._rows(chunk)
        self._journal.append(
            *self._placement_frames(chunk),
            journal.loads_frame(chunk.step, _narrow(chunk.load), chunk.ep_size),
            journal.steps_frame(rows),
        )

    def _placement_frames(self, chunk: Chunk) -> list[bytes]:
        now = chunk.placement
        if now is None or now is self._placement:
            return []
        assert chunk.ep_size is not None
        before, size = self._placement, self._placement_ep_size
        self._placement, self._placement_ep_size = now, chunk.ep_size
        changed = np.arange(len(now))
        if before is not None and before.shape == now.shape and size == chunk.ep_size:
            changed = np.flatnonzero((before != now).any(axis=1))
            if not len(changed):
                return []
        step = np.full(len(changed), chunk.step[0], np.int64)
        return [journal.placements_frame(step, changed.astype(np.int32), now[changed], chunk.ep_size)]

    def _rows(self, chunk: Chunk) -> StepRows:
        """A row a step, and one for each step between two that the source samples."""
        names = () if chunk.phase is None else tuple(dict.fromkeys(p for p in chunk.phase if p is not None))
        codes = {name: i for i, name in enumerate(names)}
        step, at = _with_between(chunk.step, self._last, self._info.interval)
        self._last = int(chunk.step[-1])
        status = np.full(len(step), Status.NOT_SAMPLED, np.uint8)
        status[at] = Status.RECORDED
        tokens = np.full(len(step), -1, np.int64)
        tokens[at] = -1 if chunk.num_tokens is None else chunk.num_tokens
        phase = np.full(len(step), -1, np.int16)
        phase[at] = -1 if chunk.phase is None else [codes.get(p, -1) if p else -1 for p in chunk.phase]
        self._steps.append(chunk.step)
        self.not_sampled += len(step) - len(at)
        # When the steps were is not known; the column must have something.
        time_ns = np.full(len(step), self._info.created_unix_ns, np.int64)
        clock = np.full(len(step), self._info.created_monotonic_ns, np.int64)
        return StepRows(step, time_ns, clock, status, tokens, phase, names)

    def _seal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            seal(self._journal.path)
            self._journal = None


def _with_between(step: Int64, last: int | None, interval: int) -> tuple[Int64, Int64]:
    """``step`` and those that were not sampled before each, ascending; and where ``step`` is in it."""
    before = np.concatenate([[step[0] if last is None else last], step[:-1]])
    skipped = np.where((step - before == interval) & (interval <= MAX_INTERVAL), interval - 1, 0)
    at = np.cumsum(skipped + 1) - 1
    behind = np.repeat(at, skipped + 1) - np.arange(at[-1] + 1)
    return np.repeat(step, skipped + 1) - behind, at


def _narrow(load: Int32) -> np.ndarray:
    """``[n, layers, slots]`` as a journal's ``[layers, n, slots]``, in the narrowest type that holds it."""
    largest = int(load.max(initial=0))
    dtype = np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.int32
    return np.ascontiguousarray(load.transpose(1, 0, 2), dtype)
