"""`compact`: merge the rank files of a run into a new run whose one rank holds the sums over the ranks.

The source stays unchanged. The new run does not show which rank a token came from.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.summary import summarize
from eplb_analyze.atomic import new_run
from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import Report
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run, open_run
from eplb_analyze.reader.tiers import described
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.sessions.starts import START_SEPARATOR
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.storage import path
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import Int32, Int64, Loads, PlacementRows, Shape, StepRows
from eplb_dump.format.manifest import close_manifest
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

#: The most steps in a new segment, and the most bytes of its loads, which are held in memory.
SEGMENT_STEPS = 2048
SEGMENT_BYTES = 128 << 20


@dataclass(frozen=True)
class Side:
    """The size of a run on the disk, before or after."""

    run_id: str
    sessions: int
    files: int
    bytes: int
    #: Time that `summary` takes once the files are in the page cache.
    summary_seconds: float


@dataclass(frozen=True)
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
    _require_intact(opened)
    lost = _lost(opened)
    base = f"{opened.info.run_id[:110]}-compact".replace(START_SEPARATOR, ".")
    with new_run(to, run_id, base) as new:
        try:
            counts, info = _write(opened, new.root, new.run_id, lost)
        except DamagedSegmentError as fault:
            raise DumpError(f"{fault}; {_REFUSED}") from None
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


def _require_intact(run: Run) -> None:
    """Raises DumpError if a file is damaged."""
    run.load_history()  # which finds faults, too
    for finding in run.findings:
        if finding.severity == "error":
            raise DumpError(f"{finding.text}; {_REFUSED}")
    thinned = run.with_loads().left_out()
    if thinned:
        text = f"{run.path}: retired: {described(thinned, run.clock.times_text)}"
        remedy = "`prune --merge-ranks` sums over ranks and keeps what is left of these steps"
        raise DumpError(f"{text}; a compact run would hide this, so none is written; {remedy}")


def _lost(run: Run) -> dict[str, str]:
    """A sentence on the steps that lack a rank, which become `dropped`, by the code of a finding.

    Raises DumpError if there are too many of them: the new run would look complete.
    """
    summary = summarize(run)
    _require_intact(run)
    steps = summary.steps
    if not steps.count(StepState.RECORDED):
        raise DumpError(f"{run.path}: no step is complete, so there is nothing to sum")
    refused = "a compact run would hide this, so none is written"
    if summary.missing_ranks:
        ranks = plural(len(summary.expected_ranks), "rank")
        raise DumpError(
            f"{run.path}: rank {listed(summary.missing_ranks)} (of {ranks}) wrote nothing; {refused}"
        )
    for lost in summary.lost_ranks:
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


@dataclass(frozen=True)
class _Part:
    """Steps ``low`` to ``high - 1`` of a block, by index."""

    block: Block
    low: int
    high: int
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


def _parts(run: Run) -> Iterator[_Part]:
    """The run in parts, each within one window of ``SEGMENT_STEPS`` and no larger than a segment."""
    window = SEGMENT_STEPS * run.info.interval
    for block in run.blocks():
        edges = {0, len(block.step), *(np.flatnonzero(np.diff(block.step // window)) + 1).tolist()}
        cuts = sorted(edges | set(range(0, len(block.step), _most_steps(block.shape))))
        replication = run.info.num_tokens_replication
        yield from (_Part(block, low, high, replication) for low, high in itertools.pairwise(cuts))


def _segments(run: Run) -> Iterator[list[_Part]]:
    """The parts of each segment of the new run."""
    window = SEGMENT_STEPS * run.info.interval
    group: list[_Part] = []
    for part in _parts(run):
        if group:
            first, steps = group[0].block, sum(p.high - p.low for p in group)
            apart = part.block.step[part.low] // window != first.step[group[0].low] // window
            full = steps + part.high - part.low > _most_steps(first.shape)
            if apart or full or part.block.shape != first.shape:
                yield group
                group = []
        group.append(part)
    if group:
        yield group


def _most_steps(shape: Shape | None) -> int:
    if shape is None:
        return SEGMENT_STEPS
    return max(
        1, min(SEGMENT_STEPS, SEGMENT_BYTES // (4 * shape.num_moe_layers * shape.num_physical_experts))
    )


# ---- writing


class _Content:
    """A segment of the new run, in memory; see :class:`~eplb_dump.format.segment.Content`."""

    def __init__(self, info: SessionInfo, seq: int, parts: list[_Part], placements: PlacementRows) -> None:
        self.info = info
        self.seq = seq
        self.placements = placements
        self.steps = StepRows.concat([part.rows() for part in parts])
        self.load_steps: Int64 = np.concatenate([part.recorded for part in parts])
        self.shape = parts[0].block.shape if len(self.load_steps) else None
        self._load = self._read(parts, self.shape) if self.shape is not None else None

    def _read(self, parts: list[_Part], shape: Shape) -> Loads:
        sizes = (shape.num_moe_layers, len(self.load_steps), shape.num_physical_experts)
        out: Loads = np.empty(sizes, np.int32)
        end = 0
        for part in parts:
            steps = part.recorded
            at, end = end, end + len(steps)
            for layer, load in part.block.load_parts(steps) if len(steps) else ():
                if out.itemsize == 4 and load.max(initial=0) > MAX_LOAD:
                    out = out.astype(np.int64)
                out[layer : layer + load.shape[1], at:end] = load.transpose(1, 0, 2)
        return out

    @property
    def load_type(self) -> npt.DTypeLike:
        return np.int32 if self._load is None else self._load.dtype

    def read_layers(self, first: int, last: int) -> Loads:
        assert self._load is not None
        return self._load[first:last]


def _write(run: Run, root: Path, run_id: str, lost: dict[str, str]) -> tuple[Counter[int], SessionInfo]:
    """Write the new run's one session. Returns its number of steps by status, and of INCOMPLETE ones."""
    info = _info(run, run_id, lost)
    folder = session_path(root, info)
    folder.mkdir(parents=True)
    pending = deque(_placements(run))
    counts: Counter[int] = Counter()
    for seq, parts in enumerate(_segments(run)):
        last = int(parts[-1].block.step[parts[-1].high - 1])
        rows = []
        while pending and pending[0][0] <= last:
            rows.append(pending.popleft())
        content = _Content(info, seq, parts, _placement_rows(rows))
        write_segment(folder, content)
        counts.update(content.steps.status.tolist())
        counts[StepState.INCOMPLETE] += sum(int((p.state == StepState.INCOMPLETE).sum()) for p in parts)
    stats = {status.label: counts[status] for status in Status}
    stats["seen"] = sum(stats.values())
    write_session_file(folder, info)
    close_manifest(folder, info, stats)
    return counts, info


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


def _placements(run: Run) -> list[tuple[int, int, int, Int32]]:
    """``(step, layer index, ep_size, slots)`` of every placement change, ordered by step and layer."""
    rows = [
        (step, layer, ep_size, slots)
        for layer, history in run.history.layers.items()
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True)
    ]
    return sorted(rows, key=lambda row: row[:2])


def _placement_rows(rows: list[tuple[int, int, int, Int32]]) -> PlacementRows:
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
