"""Writing an import as a new run: journals like a writer's, each sealed as soon as it is full.

Nothing is overwritten, and the run appears whole or not at all.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from eplb_analyze.atomic import new_run
from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.plan import Plan
from eplb_analyze.transfer.importers.source import UNKNOWN_ROW, Chunk
from eplb_dump.format import frames, journal
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, JournalAppender, Shape, StepRows
from eplb_dump.format.manifest import ManifestFile, close_manifest
from eplb_dump.format.schema import MAX_NUMBER, Status
from eplb_dump.format.segment import seal
from eplb_dump.format.session import Origin, SessionInfo, SourceFile, session_path, write_session_file
from eplb_dump.format.session_writer import PlacementEncoder, SessionWriter

SEGMENT_STEPS = 2048
SEGMENT_BYTES = 128 << 20
BATCH_BYTES = 8 << 20
#: Up to this interval, the steps between two recorded ones are listed as not sampled.
MAX_INTERVAL = 1000
#: A session's origin lists at most this many files.
MAX_FILES = 100


@frozen
class Written:
    """The id of a new run, and what it has."""

    run_id: str
    #: Steps that at least one rank has, and steps that every rank has.
    steps: int
    complete: int
    not_sampled: int
    #: Of all tables.
    rows: int
    #: Of all files.
    bytes: int


def write(plan: Plan, into: Path, run_id: str | None) -> Written:
    """Write a new run.

    Raises:
        UsageError: the run exists already, or ``run_id`` is not a valid name.
        DumpError: the source is wrong, or the folder cannot be written.
    """
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    # Not a plain number: an engine that starts meanwhile would join that run.
    with new_run(into, run_id, f"import-{moment}") as new:
        sessions = _write_sessions(plan, new.root, new.run_id)
        size = sum(path.stat().st_size for path in new.root.rglob("*") if path.is_file())
    own = [session.recorded for session in sessions]
    return Written(
        new.run_id,
        len(functools.reduce(np.union1d, own)),
        len(functools.reduce(np.intersect1d, own)),
        max(session.not_sampled for session in sessions),
        sum(session.rows for session in sessions),
        size,
    )


def _write_sessions(plan: Plan, root: Path, run_id: str) -> list[_Session]:
    from eplb_dump.format import __version__

    reading = plan.reading
    now = time.time_ns()
    # The times of a source become the monotonic clock's, too, which must not be below 0 before the import.
    clock = now if reading.timed else time.monotonic_ns()
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
    """Writes one session into its folder."""

    def __init__(self, root: Path, info: SessionInfo) -> None:
        self._folder = session_path(root, info)
        self._folder.mkdir(parents=True)
        self._writer = SessionWriter(self._folder, info, self._seal)
        self._manifest = ManifestFile(self._folder)
        self._placements = PlacementEncoder()
        self._last: int | None = None
        self._steps: list[Int64] = [np.empty(0, np.int64)]
        self._tokens = 0.0
        self.not_sampled = 0
        #: Of all tables.
        self.rows = 0

    @property
    def recorded(self) -> Int64:
        """The steps written so far."""
        return np.concatenate(self._steps)

    def write(self, chunks: Iterator[Chunk]) -> None:
        """Write all chunks, and close the session."""
        for chunk in chunks:
            for part in self._batches(chunk):
                self._append(part)
        self._writer.end_segment()
        recorded = len(self.recorded)
        stats = {"seen": recorded + self.not_sampled, "recorded": recorded, "not_sampled": self.not_sampled}
        stats |= {"dummy": 0, "dropped": 0, "rejected": 0}
        write_session_file(self._folder, self._writer.info)
        close_manifest(self._folder, self._writer.info, stats, self._manifest)

    def _seal(self, journal: JournalAppender) -> None:
        journal.close()
        entry = seal(journal.path, manifest=self._manifest)
        self.rows += 0 if entry is None else sum(file.rows for file in entry.files.values())

    def _batches(self, chunk: Chunk) -> Iterator[Chunk]:
        """The chunk in parts of one segment each, none larger than a frame may be."""
        n, layers, width = chunk.load.shape
        count = chunk.load.itemsize
        if layers * width * count > frames.MAX_PAYLOAD // 2:
            raise DumpError(f"{layers:,} layers with {width:,} slots each are more than the format can store")
        most = max(1, BATCH_BYTES // (layers * width * count))
        segment = chunk.step // self._writer.segment_span
        edges = {0, n, *(np.flatnonzero(np.diff(segment)) + 1).tolist()}
        cuts = sorted(edges | set(range(0, n, most)))
        for low, high in itertools.pairwise(cuts):
            yield replace(
                chunk,
                step=chunk.step[low:high],
                load=chunk.load[low:high],
                num_tokens=None if chunk.num_tokens is None else chunk.num_tokens[low:high],
                phase=None if chunk.phase is None else chunk.phase[low:high],
                step_ms=None if chunk.step_ms is None else chunk.step_ms[low:high],
                time_ns=None if chunk.time_ns is None else chunk.time_ns[low:high],
            )

    def _append(self, chunk: Chunk) -> None:
        assert chunk.ep_size is not None
        writer, shape = self._writer, Shape(chunk.ep_size, *chunk.load.shape[1:])
        if writer.info.num_moe_layers is None:
            writer.info = replace(
                writer.info,
                num_moe_layers=shape.num_moe_layers,
                num_physical_experts=shape.num_physical_experts,
                ep_size=shape.ep_size,
            )
        if writer.journal is not None and writer.journal.size >= SEGMENT_BYTES:
            writer.end_segment()
        writer.begin_batch(int(chunk.step[0]), shape)
        parts: list[frames.Piece] = []
        # Most chunks hand over the very array of the chunk before.
        if chunk.placement is not None and chunk.placement is not self._placements.current:
            known = chunk.placement[:, 0] != UNKNOWN_ROW
            parts += self._placements.encode(int(chunk.step[0]), chunk.placement, chunk.ep_size, known)
        self._tokens += float(chunk.load.sum(dtype=np.float64))
        if self._tokens > MAX_NUMBER:
            raise DumpError(f"its counts add up to more than {MAX_NUMBER:,}, which the format cannot store")
        load = journal.narrow(chunk.load, int(chunk.load.max(initial=0)))
        parts += journal.loads_frame(chunk.step, load, chunk.ep_size)
        writer.append(*parts, journal.steps_frame(self._rows(chunk)))

    def _rows(self, chunk: Chunk) -> StepRows:
        """A row for each step, also for those between two steps that the source samples."""
        step, at = _with_between(chunk.step, self._last, self._writer.info.interval)
        self._last = int(chunk.step[-1])
        status = np.full(len(step), Status.NOT_SAMPLED, np.uint8)
        status[at] = Status.RECORDED
        tokens = np.full(len(step), -1, np.int64)
        tokens[at] = -1 if chunk.num_tokens is None else chunk.num_tokens
        codes, phases = journal.phase_codes([None] if chunk.phase is None else chunk.phase)
        phase = np.full(len(step), -1, np.int16)
        phase[at] = codes
        step_ms = journal.unknown_ms(len(step))
        step_ms[at] = np.nan if chunk.step_ms is None else chunk.step_ms
        self._steps.append(chunk.step)
        self.not_sampled += len(step) - len(at)
        # If the times are not known, the columns may still not be empty.
        time_ns = np.full(len(step), self._writer.info.created_unix_ns, np.int64)
        clock = np.full(len(step), self._writer.info.created_monotonic_ns, np.int64)
        if chunk.time_ns is not None:
            # A step that was not sampled gets the time of the next one that was.
            time_ns = clock = chunk.time_ns[np.searchsorted(at, np.arange(len(step)))]
        unknown = journal.unknown_ms(len(step))
        return StepRows(step, time_ns, clock, status, tokens, phase, step_ms, unknown, phases)


def _with_between(step: Int64, last: int | None, interval: int) -> tuple[Int64, Int64]:
    """``step`` with the unsampled steps before each, ascending; and the indices of ``step`` in it."""
    before = np.concatenate([[step[0] if last is None else last], step[:-1]])
    skipped = np.where((step - before == interval) & (interval <= MAX_INTERVAL), interval - 1, 0)
    at = np.cumsum(skipped + 1) - 1
    behind = np.repeat(at, skipped + 1) - np.arange(at[-1] + 1)
    return np.repeat(step, skipped + 1) - behind, at
