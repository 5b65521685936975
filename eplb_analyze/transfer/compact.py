"""`compact`: merge the rank files of a run into a new run whose one rank holds the sums over the ranks.

The source stays unchanged. The new run does not show which rank a token came from.
"""

from __future__ import annotations

import bisect
import itertools
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.summary import summarize
from eplb_analyze.atomic import new_run
from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import Report
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run, open_run
from eplb_analyze.reader.tiers import described
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.sessions.starts import START_SEPARATOR
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.storage import path
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Loads, PlacementRows, Shape, StepRows
from eplb_dump.format.manifest import ManifestFile, close_manifest
from eplb_dump.format.notable import Notable
from eplb_dump.format.schema import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_LOAD,
    MODEL_PREFIX,
    RUN_PREFIX,
    Scope,
    Status,
    model_slug,
)
from eplb_dump.format.segment import write_segment
from eplb_dump.format.session import Origin, SessionInfo, SourceFile, session_path, write_session_file

#: The most steps in a new segment, bytes of its loads, which are held in memory, and how long it lasts: as in
#: segments that a writer makes.
SEGMENT_STEPS = 2048
SEGMENT_BYTES = 128 << 20
SEGMENT_NS = 900 * 10**9


@frozen
class Side:
    """The size of a run on the disk, before or after."""

    run_id: str
    sessions: int
    files: int
    bytes: int
    #: Time that `summary` takes once the files are in the page cache.
    summary_seconds: float


@frozen
class CompactReport(Report):
    """The new run beside the old one."""

    source: str
    to: str
    model: str
    #: The files of the source.
    before: Side
    #: The files of the compact run.
    after: Side
    #: Number of steps of the new run by status.
    steps: dict[str, int]
    #: How many of ``dropped`` were recorded by some ranks and not by others.
    incomplete: int
    unknown: dict[str, str]
    notes: list[str] = field(default_factory=list)


def compact_run(
    source: StoragePath,
    to: Path,
    run: str | None = None,
    model: str | None = None,
    run_id: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> CompactReport:
    """Write the sums over the ranks of a run of one model as a new run in the dump ``to``.

    Args:
        source: see :func:`~eplb_analyze.reader.run.open_run`.
        to: a local folder; made if it does not exist.
        run_id: the new run's; default: the source's with ``-compact``.

    Raises:
        DumpError: the source is damaged, has no complete step or too many incomplete ones; ``to`` cannot be
            written.
        UsageError: the new run exists; ``to`` is inside a run.
    """
    opened = open_run(source, run, model)
    opened.progress = progress
    compaction = Compaction(opened)
    base = f"{opened.info.run_id[:110]}-compact".replace(START_SEPARATOR, ".")
    with new_run(to, run_id, base) as new:
        info = compaction.info(new.run_id)
        with refusing_damage():
            counts = _write(compaction, new.root, info)
        _verify(new.root, new.run_id, counts)
    assert info.origin is not None
    return CompactReport(
        source=str(source),
        to=str(to),
        model=opened.info.model,
        before=_side(opened),
        after=_side(open_run(to, new.run_id)),
        steps={status.label: counts[status] for status in Status},
        incomplete=counts[StepState.INCOMPLETE],
        unknown=info.origin.unknown,
        notes=opened.notes,
    )


_REFUSED = "a compact run would hide the damage, so none is written (see `check`)"


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Raise DumpError if the block reads something that turns out to be damaged."""
    try:
        yield
    except DamagedSegmentError as fault:
        raise DumpError(f"{fault}; {_REFUSED}") from None


def _require_intact(run: Run) -> None:
    """Raises DumpError if a file is damaged."""
    run.load_history()  # which finds faults, too
    for finding in run.findings:
        if finding.severity == "error":
            raise DumpError(f"{finding.text}; {_REFUSED}")
    thinned = run.with_loads().left_out()
    if thinned:
        text = f"{run.path}: retired: {described(thinned, run.clock.when)}"
        remedy = "`copy` copies the run as it is; `prune --merge-ranks` sums over ranks before it thins"
        raise DumpError(f"{text}; a compact run would hide this, so none is written; {remedy}")


def _lost(run: Run) -> dict[str, str]:
    """A sentence on the steps that lack a rank, which become `dropped`, by the code of a finding.

    Raises DumpError if there are too many of them: the new run would look complete.
    """
    steps = run.retry_without_damaged(lambda: _completeness(run))
    _require_intact(run)
    if not steps.count(StepState.RECORDED):
        raise DumpError(f"{run.path}: no step is complete, so there is nothing to sum")
    refused = "a compact run would hide this, so none is written"
    missing = [rank for rank in run.expected_ranks if rank not in run.present_ranks]
    if missing:
        ranks = plural(len(run.expected_ranks), "rank")
        raise DumpError(f"{run.path}: rank {listed(missing)} (of {ranks}) wrote nothing; {refused}")
    for lost in run.lost_ranks:
        first = lost.steps.first
        text = f"rank {lost.rank} was lost at step {first}, which sums over all ranks cannot show"
        remedy = "keep it"
        if first:
            remedy = (
                f"first copy the earlier steps (`copy --steps -{first - 1} SRC DST`, or fewer: a copy "
                f"consists of whole segments, and none of them may contain step {first})"
            )
        raise DumpError(f"{run.path}: {text}, so it is not compacted; {remedy}")
    count = steps.count(StepState.INCOMPLETE)
    if not count:
        return {}
    share = f"{100 * steps.incomplete_share:.1f}%"
    many, why = f"{plural(count, 'step')} ({share})", steps.why_incomplete()
    if steps.lacks_much:
        whole = "A-B" if steps.incomplete_inside else f"{steps.first}-{steps.last_whole or 0}"
        remedy = f"first copy the complete part (`copy --steps {whole} SRC DST`)"
        raise DumpError(f"{run.path}: {many} lack a rank: {why}; {refused}; {remedy}")
    incomplete_tail = not steps.incomplete_inside and steps.ends_together
    text = f"{many} lacked a rank in the original run: {why}"
    return {"incomplete_end" if incomplete_tail else "incomplete_steps": text}


def _completeness(run: Run) -> Completeness:
    """Which steps are complete, without reading their loads. Raises DamagedSegmentError."""
    found = Completeness()
    for block in run.blocks():
        found.add(block)
    return found


def _side(run: Run) -> Side:
    files = [entry for session in run.sessions for entry in path.entries(session.folder)]
    start = time.perf_counter()
    summarize(open_run(run.path, run.info.run_id, run.info.model))
    return Side(
        run_id=run.info.run_id,
        sessions=len(run.sessions),
        files=len(files),
        bytes=sum(entry.stat(follow_symlinks=False).st_size for entry in files),
        summary_seconds=time.perf_counter() - start,
    )


# ---- reading


@frozen
class _Part:
    """Steps ``low`` to ``high - 1`` of a block, by index."""

    block: Block
    low: int
    high: int
    #: The window of steps, and of time, in which they are; a segment has steps of one.
    window: tuple[int, int]
    #: How often the block's ``num_tokens`` count a token; the new rank counts it once.
    replication: int

    @property
    def state(self) -> npt.NDArray[np.uint8]:
        return self.block.state[self.low : self.high]

    @property
    def recorded(self) -> Int64:
        """The numbers of the complete steps."""
        step: Int64 = self.block.step[self.low : self.high][self.state == StepState.RECORDED]
        return step

    def rows(self) -> StepRows:
        """The rows of the new rank; its monotonic clock counts from 1970."""
        block, here = self.block, slice(self.low, self.high)
        # A step that one rank recorded and another did not has no sum.
        status = np.where(self.state == StepState.INCOMPLETE, np.uint8(Status.DROPPED), self.state)
        phase = block.phase[here].astype(np.int32)
        return StepRows(
            block.step[here], block.time_ns[here], block.clock_ns[here], status,
            block.num_tokens[here] // self.replication,  # -1 stays
            phase, block.step_ms[here].astype(np.float32), block.device_ms[here].astype(np.float32),
            tuple(block.phases),
        )  # fmt: skip


class Compaction:
    """A run that can be merged, and what becomes of it: one session with segments as a writer makes them."""

    def __init__(self, run: Run) -> None:
        """Raises DumpError if the run is damaged, or its sums would look complete and would not be."""
        _require_intact(run)
        self.run = run
        self._lost = _lost(run)
        self._placements = _placements(run)

    def info(self, run_id: str) -> SessionInfo:
        """The metadata of the new run's session."""
        return _info(self.run, run_id, self._lost)

    def contents(self, info: SessionInfo, steps: tuple[int, int] | None = None) -> Iterator[NewSegment]:
        """The new segments, or those of a half-open range of steps that begins and ends where segments do."""
        begun = 0 if steps is None else bisect.bisect_left(self._placements, steps[0], key=_step_of)
        for seq, parts in enumerate(self._segments(steps)):
            last = int(parts[-1].block.step[parts[-1].high - 1])
            end = bisect.bisect_right(self._placements, last, key=_step_of)
            yield NewSegment(info, seq, parts, _placement_rows(self._placements[begun:end]))
            begun = end

    def _segments(self, steps: tuple[int, int] | None) -> Iterator[list[_Part]]:
        """The parts of each segment."""
        group: list[_Part] = []
        for part in self._parts(steps):
            if group:
                first, count = group[0].block, sum(p.high - p.low for p in group)
                full = count + part.high - part.low > _most_steps(first.shape)
                if part.window != group[0].window or full or part.block.shape != first.shape:
                    yield group
                    group = []
            group.append(part)
        if group:
            yield group

    def _parts(self, steps: tuple[int, int] | None) -> Iterator[_Part]:
        """The run in parts, each within one window of steps and time, and no larger than a segment."""
        span = SEGMENT_STEPS * self.run.info.interval
        replication = self.run.info.num_tokens_replication
        for block in self.run.blocks(steps):
            # The clocks of ranks differ, and a step has the time of one of them.
            clock = np.maximum.accumulate(block.clock_ns) // SEGMENT_NS
            window = block.step // span
            changed = (np.diff(window) != 0) | (np.diff(clock) != 0)
            edges = {0, len(block.step), *(np.flatnonzero(changed) + 1).tolist()}
            cuts = sorted(edges | set(range(0, len(block.step), _most_steps(block.shape))))
            for low, high in itertools.pairwise(cuts):
                yield _Part(block, low, high, (int(window[low]), int(clock[low])), replication)


def _most_steps(shape: Shape | None) -> int:
    if shape is None:
        return SEGMENT_STEPS
    return max(
        1, min(SEGMENT_STEPS, SEGMENT_BYTES // (4 * shape.num_moe_layers * shape.num_physical_experts))
    )


# ---- writing


class NewSegment:
    """A segment of the new run, whose loads are read when they are needed.

    See :class:`~eplb_dump.format.segment.Content`.
    """

    def __init__(self, info: SessionInfo, seq: int, parts: list[_Part], placements: PlacementRows) -> None:
        self.info = info
        self.seq = seq
        self.placements = placements
        self.steps = StepRows.concat([part.rows() for part in parts])
        self.load_steps: Int64 = np.concatenate([part.recorded for part in parts])
        self.shape = parts[0].block.shape if len(self.load_steps) else None
        #: How many of its steps only some ranks recorded.
        self.incomplete = sum(int((part.state == StepState.INCOMPLETE).sum()) for part in parts)
        self._parts = parts

    @cached_property
    def _load(self) -> Loads:
        assert self.shape is not None
        sizes = (self.shape.num_moe_layers, len(self.load_steps), self.shape.num_physical_experts)
        out: Loads = np.empty(sizes, np.int32)
        end = 0
        for part in self._parts:
            steps = part.recorded
            at, end = end, end + len(steps)
            for layer, load in part.block.stored_parts(steps) if len(steps) else ():
                if out.itemsize == 4 and load.itemsize > 4 and load.max(initial=0) > MAX_LOAD:
                    out = out.astype(np.int64)
                out[layer : layer + len(load), at:end] = load
        return out

    @property
    def load_type(self) -> npt.DTypeLike:
        return np.int32 if self.shape is None else self._load.dtype

    def read_layers(self, first: int, last: int) -> Loads:
        return self._load[first:last]


def _write(compaction: Compaction, root: Path, info: SessionInfo) -> Counter[int]:
    """Write the new run's one session. Returns its number of steps by status, and of INCOMPLETE ones."""
    folder = session_path(root, info)
    folder.mkdir(parents=True)
    counts: Counter[int] = Counter()
    notable, manifest = Notable(), ManifestFile(folder)
    for content in compaction.contents(info):
        write_segment(folder, content, notable, manifest)
        counts.update(content.steps.status.tolist())
        counts[StepState.INCOMPLETE] += content.incomplete
    stats = {status.label: counts[status] for status in Status}
    stats["seen"] = sum(stats.values())
    write_session_file(folder, info)
    close_manifest(folder, info, stats, manifest)
    return counts


def _info(run: Run, run_id: str, lost: dict[str, str]) -> SessionInfo:
    from eplb_dump.format import __version__

    first = run.sessions[0].info
    shapes = [s for session in run.sessions for s in session.segments if s.shape is not None]
    shape = min(shapes, key=lambda segment: segment.first_step).shape if shapes else None
    unknown = {**({} if first.origin is None else first.origin.unknown), **lost}
    unclosed = sum(session.closed is None for session in run.sessions)
    if unclosed:
        unknown["end"] = (
            f"whether there were more steps: {plural(unclosed, 'session')} of the source were not closed"
        )
    part = next((session.part for session in run.sessions if session.part is not None), None)
    if part is not None:
        asked = f"{part[0]} to " + ("the end" if part[1] >= NO_END - 1 else str(part[1]))
        unknown["other_steps"] = f"the source was a copy of the segments that contain steps {asked}"
    files = [e for session in run.sessions for e in path.entries(session.folder)]
    source = f"{RUN_PREFIX}{first.run_id}/{MODEL_PREFIX}{model_slug(first.model)}"
    origin = Origin(
        system=FORMAT_NAME,
        kind="compact",
        files=(SourceFile(source, sum(e.stat(follow_symlinks=False).st_size for e in files)),),
        importer_version=__version__,
        unknown=unknown,
        assumed={} if first.origin is None else dict(first.origin.assumed),
    )
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return replace(
        first,
        run_id=run_id,
        session_id=f"{moment}-compact-{secrets.token_hex(4)}",
        ep_rank=0,
        scope=Scope.GLOBAL,
        ep_size=first.ep_size if shape is None else shape.ep_size,
        num_moe_layers=None if shape is None else shape.num_moe_layers,
        num_physical_experts=None if shape is None else shape.num_physical_experts,
        created_unix_ns=run.info.created_unix_ns,
        created_monotonic_ns=run.info.created_unix_ns,
        host=socket.gethostname(),
        pid=os.getpid(),
        launch={},
        segment_steps=SEGMENT_STEPS,
        writer_version=__version__,
        origin=origin,
        format_version=FORMAT_VERSION,
    )


#: ``(step, layer index, ep_size, slots)`` of a placement.
_Placement = tuple[int, int, int, Int32]


def _step_of(row: _Placement) -> int:
    return row[0]


def _placements(run: Run) -> list[_Placement]:
    """Every placement change, ordered by step and layer."""
    rows = [
        (step, layer, ep_size, slots)
        for layer, history in run.history.layers.items()
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True)
    ]
    return sorted(rows, key=lambda row: row[:2])


def _placement_rows(rows: Sequence[_Placement]) -> PlacementRows:
    return PlacementRows(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int32),
        np.array([row[2] for row in rows], np.int32),
        [row[3] for row in rows],
    )


def _verify(root: Path, run_id: str, counts: Counter[int]) -> None:
    """Read the whole new run with its checksums and sums, before it gets its name. Raises DumpError."""
    run = open_run(root, run_id)
    wrong = f"{root}: the written run differs from its source; it was removed"
    try:
        found: Counter[int] = Counter()
        for segment in run.sessions[0].segments:
            found.update(segment.steps().status.tolist())
            if not segment.sums_are_true():
                raise DumpError(wrong)
    except DamagedSegmentError as fault:
        raise DumpError(f"{fault}; {wrong}") from None
    if run.findings or any(found[status] != counts[status] for status in Status):
        raise DumpError(wrong)
