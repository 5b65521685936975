"""`postmortem`: the work on many runs, shared out to an executor's workers.

A worker reads a short run by itself. A long run is read in parts (:meth:`~eplb_analyze.reader.run.Run.parts`)
by several workers; their sums are merged here, one makes the row of the merged sums, and several judge its
rearrangements.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eplb_analyze.analysis.rearrangements import MeasuredChange, Verdict
from eplb_analyze.analysis.summary import summarize, summary_of
from eplb_analyze.analysis.summary_report import Summary
from eplb_analyze.analysis.summary_sums import SummarySums, bins_of, sums_of
from eplb_analyze.atomic import whole_file
from eplb_analyze.batch.cache import ResultCache
from eplb_analyze.batch.executors import Executor, Local, WorkerDied
from eplb_analyze.batch.rows import Row, broken_row, changes_of, row_of, with_verdicts
from eplb_analyze.batch.targets import Target
from eplb_analyze.errors import AnalyzeError, Finding
from eplb_analyze.json_report import with_times
from eplb_analyze.metrics.losses import Bins
from eplb_analyze.reader.placements import PlacementSlice
from eplb_analyze.reader.rolled_up import from_minutes
from eplb_analyze.reader.run import Run, open_run
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.frozen import frozen

#: So many rearrangements take a worker some 20 ms.
JUDGED_AT_ONCE = 8


@frozen
class RunTask:
    """Work on one run: read it, read a part of it, make the row of its merged parts, or judge changes."""

    target: Target
    #: A part of a long run: its range of steps, and the bins of the whole run.
    part: tuple[StepRange, Bins] | None = None
    #: Of a long run: which opening of it found its parts. It may have changed since an earlier batch.
    opening: str = ""
    #: The parts of a long run, merged.
    merged: RunResult | None = None
    #: Some rearrangements of a long run.
    changes: list[MeasuredChange] | None = None


@dataclass
class RunResult:
    """The result of a task: the run's row, or what is needed before there is one."""

    row: Row | None = None
    #: Of a long run: the row lacks the verdicts on these.
    changes: list[MeasuredChange] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    #: As ``eplb-analyze summary --json`` prints it; None if the run is broken.
    summary: dict[str, Any] | None = None
    #: The run is long: read these parts first.
    parts: list[RunTask] = field(default_factory=list)
    #: Of a part: its sums, and the findings that are new since the run was opened.
    sums: SummarySums | None = None
    findings: list[Finding] = field(default_factory=list)
    #: Of a part: the placements that take effect in it; None if they have to be read again.
    placements: list[PlacementSlice | None] = field(default_factory=list)
    #: Of a part: the times, ns since 1970, of steps that the summary shows, as far as they are known by then.
    times: dict[int, int] = field(default_factory=dict)

    def merge(self, later: RunResult) -> None:
        """Add the next part of a run. If a part could not be read, its broken row is that of the run."""
        self.row = self.row or later.row
        self.verdicts += later.verdicts
        self.placements += later.placements
        self.times |= later.times
        self.findings += [f for f in later.findings if f not in self.findings]
        if self.sums is None:
            self.sums = later.sums
        elif later.sums is not None:
            self.sums.merge(later.sums)


def run_task(task: RunTask) -> RunResult:
    """Do a task, on a worker. An error becomes a broken row: one bad run does not end the batch."""
    target = task.target
    if task.merged is not None and task.merged.row is not None:
        return task.merged
    try:
        if task.part is not None:
            return _read_part(_opened(target, task.opening)[0], *task.part)
        if task.merged is not None:
            return _finish(target, task.opening, task.merged)
        if task.changes is not None:
            return RunResult(verdicts=[change.verdict for change in task.changes])
        run = open_run(target.dump, target.run_id, target.model)
        if from_minutes(run, None):
            # Sums per minute of a long time take as long as some thousand steps.
            return _judged(_with_row(target, run, None, summarize(run)))
        ranges = run.parts()
        if len(ranges) > 1:
            bins, opening = bins_of(run), uuid.uuid4().hex
            return RunResult(parts=[RunTask(target, (steps, bins), opening) for steps in ranges])
        sums = _sums_of_all(run)
        return _judged(_with_row(target, run, sums, summary_of(sums, run)))
    except Exception as error:
        reason = str(error) if isinstance(error, AnalyzeError) else f"{type(error).__name__}: {error}"
        return _broken(target, reason)


@functools.lru_cache(maxsize=1)
def _opened(target: Target, opening: str) -> tuple[Run, tuple[Finding, ...]]:
    """A long run, and the findings of opening it.

    A worker reads many parts of one run, but its metadata and placements once.
    """
    run = open_run(target.dump, target.run_id, target.model)
    return run, tuple(run.findings)


def _read_part(whole: Run, steps: StepRange, bins: Bins) -> RunResult:
    known, run = [*whole.findings], whole.placed_in(steps)
    sums = run.retry_without_damaged(lambda: sums_of(run, steps, bins))
    findings = [f for f in run.findings if f not in known]
    shown = {*run.history.changes, *(step for i in range(len(bins)) for step in bins.range(i))}
    times = whole.clock.look_up(sorted(step for step in shown if steps.first <= step < steps.end))
    # The first part also has what was stated before.
    stated = StepRange(0 if steps.first <= bins.edges[0] else steps.first, steps.end)
    return RunResult(sums=sums, findings=findings, placements=[run.history.within(stated)], times=times)


def _finish(target: Target, opening: str, merged: RunResult) -> RunResult:
    assert merged.sums is not None
    sums = merged.sums
    if any(finding.code == "damaged_file" for finding in merged.findings):
        # A file that cannot be read is left out of all parts, and moves their bounds.
        run = open_run(target.dump, target.run_id, target.model)
        sums = _sums_of_all(run)
    else:
        run, known = _opened(target, opening)
        run.findings = [*known]  # whichever parts this worker read
        last = run.step_range[1]
        if sums.seen.last is not None and last is not None and last > sums.seen.last:
            # The run has continued since its parts were read.
            run = run.truncated_at(sums.seen.last)
        slices = [part for part in merged.placements if part is not None]
        if len(slices) == len(merged.placements):
            run.join_placements(slices)
        run.clock.remember(merged.times)
    run.findings += [f for f in merged.findings if f not in run.findings]
    return _with_row(target, run, sums, summary_of(sums, run))


def _sums_of_all(run: Run) -> SummarySums:
    return run.retry_without_damaged(lambda: sums_of(run, None, bins_of(run)))


def _with_row(target: Target, run: Run, sums: SummarySums | None, summary: Summary) -> RunResult:
    row = row_of(target.dump, run, sums, summary)
    return RunResult(row, changes_of(run, sums), summary=with_times(summary.to_json(), run.clock.iso))


def _judged(result: RunResult) -> RunResult:
    """The result with the verdicts of a short run, which are no work for others."""
    assert result.row is not None
    row = with_verdicts(result.row, [change.verdict for change in result.changes])
    return replace(result, row=row, changes=[])


def _broken(target: Target, reason: str) -> RunResult:
    return RunResult(broken_row(target.dump, target.run_id, target.model, reason))


def rows_of(
    targets: Iterable[Target | Row],
    executor: Executor | None = None,
    cache: ResultCache | None = None,
) -> Iterator[tuple[Row, bool]]:
    """Each run's row as soon as it is known, and whether the run was read for it; long runs come last.

    Args:
        targets: from :func:`~eplb_analyze.batch.targets.find`; rows among them are passed on.
        executor: default this process.
        cache: keeps finished work, and has the rows of runs that did not change.
    """
    executor = executor or Local()
    known: list[Row] = []

    def unread() -> Iterator[RunTask]:
        for target in targets:
            row = target if isinstance(target, Row) else cache.load(target) if cache is not None else None
            if row is not None:
                known.append(row)
            elif isinstance(target, Target):
                yield RunTask(target)

    def results(tasks: Iterable[RunTask], on: Executor = executor) -> Iterator[tuple[RunTask, RunResult]]:
        for task, result in on.map(run_task, tasks):
            yield task, _broken(task.target, result.reason) if isinstance(result, WorkerDied) else result

    def finish(target: Target, result: RunResult) -> tuple[Row, bool]:
        assert result.row is not None
        if cache is not None:
            cache.store(target, result.row, result.summary)
        return result.row, True

    parts: list[RunTask] = []
    for task, result in results(unread()):
        if result.parts:
            parts += result.parts
        else:
            yield finish(task.target, result)
    for row in known:
        yield row, False
    # The row of a single long run is made here: to send its sums to a worker would take half as long.
    single = len({task.target for task in parts}) == 1
    merged = results(_merge(results(parts), open_ahead=single), Local() if single else executor)
    rows: dict[Target, RunResult] = {}
    judging = results(_changes(merged, rows))
    for target, of_run in itertools.groupby(judging, key=lambda pair: pair[0].target):
        judged = RunResult()
        for _, some in of_run:
            judged.merge(some)
        result = rows.pop(target)
        assert result.row is not None
        row = judged.row or with_verdicts(result.row, judged.verdicts)  # the former is broken
        yield finish(target, replace(result, row=row))


def _merge(results: Iterator[tuple[RunTask, RunResult]], *, open_ahead: bool = False) -> Iterator[RunTask]:
    """The tasks that make the rows of long runs, each when all parts of its run are read.

    ``open_ahead``: this process makes them, and opens the run while workers read its parts.
    """
    for (target, opening), of_run in itertools.groupby(
        results, key=lambda pair: (pair[0].target, pair[0].opening)
    ):
        merged = RunResult()
        for _, part in of_run:
            if open_ahead:
                with contextlib.suppress(Exception):  # the row will state why
                    _opened(target, opening)
            merged.merge(part)
        yield RunTask(target, opening=opening, merged=merged)


def _changes(
    results: Iterator[tuple[RunTask, RunResult]], rows: dict[Target, RunResult]
) -> Iterator[RunTask]:
    """The tasks that judge the rearrangements of long runs, at least one of each; the rows go to ``rows``."""
    for task, result in results:
        rows[task.target] = replace(result, changes=[])
        for first in range(0, max(1, len(result.changes)), JUDGED_AT_ONCE):
            yield RunTask(task.target, changes=result.changes[first : first + JUDGED_AT_ONCE])


def write_page(task: tuple[Row, Path]) -> str | None:
    """Write the HTML report of a row's run to a path, on a worker; return why it failed, if it did."""
    from eplb_analyze.report.write import report_page

    row, path = task
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = report_page(open_run(row.dump, row.run_id, row.model))
        with whole_file(path, replace=True, durable=False) as file:
            file.write(data)
    except AnalyzeError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
