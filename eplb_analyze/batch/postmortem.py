"""The figures of `postmortem`: many runs, one row each, and where the work on them is shared out.

A run is read in parts (:meth:`~eplb_analyze.reader.run.Run.parts`) by an executor's workers, so that one long
run is shared out as well as many runs; here its parts' sums are merged and become the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from eplb_analyze.analysis.check import check_steps, summary_findings
from eplb_analyze.analysis.rearrangements import verdicts
from eplb_analyze.analysis.summary import Summary, SummarySums, bins_of, sums_of
from eplb_analyze.batch.executors import Executor, Local, WorkerDied
from eplb_analyze.errors import AnalyzeError, DumpError, Finding, NotInDumpError, UsageError
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Ratio
from eplb_analyze.metrics.losses import Bins
from eplb_analyze.parallel import limit_workers
from eplb_analyze.reader.discovery import Discovery, discover
from eplb_analyze.reader.run import Run, open_run
from eplb_analyze.reader.segments import require_regular
from eplb_analyze.reader.step_range import StepRange
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import UnreachableError
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import listed
from eplb_dump.format.schema import LEVEL_PREFIXES, MODEL_PREFIX, RUN_PREFIX, FormatError, model_slug
from eplb_dump.format.session import dump_json, load_json

if TYPE_CHECKING:
    import polars as pl

#: A run's balancedness over time is kept in so many sums at most, to compare it with another run's.
MAX_SERIES = 4096
#: Kept results are of this version of the rows; others are made anew.
VERSION = 2

Status = Literal["complete", "incomplete", "broken"]


@dataclass(frozen=True)
class Target:
    """One run of one model in a dump."""

    dump: str
    run_id: str
    model: str


@dataclass(frozen=True)
class Row:
    """What a batch says of one run. A figure that cannot be given is None."""

    dump: str
    run_id: str
    model: str
    #: incomplete: it has figures, but data is missing or damaged; broken: it has none.
    status: Status
    #: Why it is not complete.
    reason: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    #: ISO 8601, UTC.
    created: str | None = None
    scope: str | None = None
    ep_size: int | None = None
    num_layers: int | None = None
    num_logical_experts: int | None = None
    num_physical_experts: int | None = None
    #: Complete ones, of those that some rank recorded.
    steps: int = 0
    #: Of these, those with tokens, over which balancedness is a mean.
    active_steps: int = 0
    incomplete_steps: int = 0
    missing_ranks: int = 0
    #: The median from a step to the next; None also where an imported run's times are not known.
    step_seconds: float | None = None
    balancedness: float | None = None
    balancedness_p5: float | None = None
    idle_fraction: float | None = None
    #: Of the loss: what a better placement could remove at most.
    persistent_share: float | None = None
    #: idle fraction × steps × interval × step_seconds × ranks: time, if it were proportional to tokens.
    lost_rank_seconds: float | None = None
    worst_layer: int | None = None
    worst_rank: int | None = None
    #: Of the loss, at this rank's door.
    worst_rank_share: float | None = None
    rearrangements: int = 0
    #: Of these, those with complete steps before and after, and one shape.
    judged: int = 0
    helped: int = 0
    helped_at_first: int = 0
    hurt: int = 0
    no_op: int = 0
    #: Codes of the findings that `check` describes; errors and warnings.
    faults: list[str] = field(default_factory=list)
    #: What the engine said of its configuration, by dotted names.
    config: dict[str, Any] = field(default_factory=dict)
    #: Sums of balancedness and numbers of steps, in order; for comparisons, not for the table.
    series: list[tuple[float, int]] = field(default_factory=list)
    #: Against the baseline: the difference of balancedness and its confidence interval.
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    #: Why there is none, where there is a baseline.
    not_compared: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["series"]
        return document

    @property
    def worse_than_baseline(self) -> bool:
        return self.difference_high is not None and self.difference_high < 0

    @property
    def lost(self) -> tuple[bool, float, float]:
        """What rows are sorted by: those with figures first, by rank time lost, then by idle fraction."""
        return (self.status != "broken", self.lost_rank_seconds or 0.0, self.idle_fraction or 0.0)


@dataclass(frozen=True)
class Group:
    """Runs that have a value in common; means over their steps, of balancedness those with tokens."""

    value: str
    runs: int
    broken: int
    steps: int
    balancedness: float | None
    idle_fraction: float | None
    lost_rank_seconds: float | None


@dataclass(frozen=True)
class Postmortem:
    #: What lost most first; broken runs last.
    rows: list[Row]
    threshold: float | None = None
    baseline: str | None = None

    @property
    def failed(self) -> list[Row]:
        """Rows that do not pass: too unbalanced, worse than the baseline, or not to be judged."""
        if self.threshold is None and self.baseline is None:
            return []
        return [row for row in self.rows if self._fails(row)]

    def _fails(self, row: Row) -> bool:
        too_low = self.threshold is not None and (row.balancedness or 0.0) < self.threshold
        return self.not_judged(row) is not None or too_low or row.worse_than_baseline

    def not_judged(self, row: Row) -> str | None:
        """Why a row cannot be judged by what was asked."""
        return "no figures" if row.status == "broken" else row.not_compared

    def groups(self, by: str) -> list[Group]:
        """Rows grouped by a field of theirs, or by a dotted name of the configuration."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            value = getattr(row, by) if by in _FIELDS else row.config.get(by)
            rows.setdefault("–" if value is None else str(value), []).append(row)
        return sorted((_group(value, own) for value, own in rows.items()), key=lambda g: g.value)

    def groupable(self) -> list[str]:
        """The names that runs can be grouped by."""
        names = {name for row in self.rows for name in row.config}
        return [*sorted(_FIELDS), *sorted(names)]

    def can_group(self, by: str) -> bool:
        return by in self.groupable()

    def to_json(self, by: str | None = None) -> dict[str, Any]:
        return {
            "runs": [row.to_json() for row in self.rows],
            "groups": [] if by is None else [asdict(group) for group in self.groups(by)],
            "by": by,
            "threshold": self.threshold,
            "baseline": self.baseline,
            "failed": [{"dump": row.dump, "run_id": row.run_id, "model": row.model} for row in self.failed],
        }

    def frame(self) -> pl.DataFrame:
        """One row a run; faults as a list, config as JSON."""
        import polars as pl

        rows = [
            {
                name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
                for name, value in (row.to_json() | {"config": json.dumps(row.config)}).items()
            }
            for row in self.rows
        ]
        return pl.DataFrame(rows, schema=_schema(pl))


def _schema(pl: Any) -> dict[str, Any]:
    types = {"str": pl.String, "int": pl.Int64, "float": pl.Float64, "Status": pl.String}
    schema = {f.name: types.get(str(f.type).split(" |")[0]) for f in fields(Row) if f.name != "series"}
    return schema | {"faults": pl.List(pl.String), "config": pl.String}


_FIELDS = {f.name for f in fields(Row)} - {"series", "faults", "config"}


def _group(value: str, rows: list[Row]) -> Group:
    def mean(name: str, count: str) -> float | None:
        known = [(getattr(row, name), getattr(row, count)) for row in rows if getattr(row, name) is not None]
        steps = sum(count for _, count in known)
        return sum(figure * count for figure, count in known) / steps if steps else None

    lost = [row.lost_rank_seconds for row in rows if row.lost_rank_seconds is not None]
    return Group(
        value=value,
        runs=len(rows),
        broken=sum(row.status == "broken" for row in rows),
        steps=sum(row.steps for row in rows),
        balancedness=mean("balancedness", "active_steps"),
        idle_fraction=mean("idle_fraction", "steps"),
        lost_rank_seconds=sum(lost) if lost else None,
    )


# ---- finding


def find(texts: Iterable[str]) -> Iterator[Target | Row]:
    """All runs and models below folders or globs of folders, each once; a row for what cannot be read.

    One of ``texts`` names a dump, a part of one, or a folder that holds dumps somewhere below; on this
    machine or in a bucket. Raises UsageError where one is no name of a place.
    """
    seen: set[frozenset[str]] = set()
    for text in texts:
        try:
            names = places.expand_globs(text)
        except UnreachableError as error:
            yield _broken(text, "", "", str(error))
            continue
        if not names:
            yield _broken(text, "", "", f"{text}: no folder matches")
        for name in names:
            top = places.storage_path(name)
            empty = True
            for run, sessions in _below(top, name):
                empty = False
                if not sessions or sessions not in seen:
                    yield run
                seen.add(sessions)
            if empty:
                yield _broken(name, "", "", _fault(top) or f"{name}: no run in it")


#: A run of a model, and the folders of its sessions; or a row, and nothing.
_Found = tuple[Target | Row, frozenset[str]]


def _below(top: StoragePath, name: str) -> Iterator[_Found]:
    """What is in a folder, at any depth, without following symbolic links."""
    # A folder, its name, and the name of the dump that it would be in as a run.
    waiting = [(top, name, name)]
    while waiting:
        folder, text, dump = waiting.pop()
        own_name = places.absolute(folder).name
        run_id = own_name.removeprefix(RUN_PREFIX) if own_name.startswith(RUN_PREFIX) else ""
        fault = None
        if own_name.startswith(LEVEL_PREFIXES):
            try:
                yield from _runs(discover(folder), dump)
                continue
            except AnalyzeError as error:
                fault = str(error)  # unless it is another folder, which only has such a name
        try:
            inside = [e.name for e in places.entries(folder) if e.is_dir(follow_symlinks=False)]
        except (OSError, UnreachableError) as error:
            if folder is not top:
                reason = f"{folder}: {error.strerror}" if isinstance(error, OSError) else str(error)
                yield _broken(dump, run_id, "", reason), frozenset()
            continue
        if fault is not None and (not inside or any(name.startswith(LEVEL_PREFIXES) for name in inside)):
            if folder is not top:
                yield _broken(dump, run_id, "", fault), frozenset()
            continue
        for inner in reversed(inside):
            if not isinstance(folder, Path) and "?" in inner:
                yield (
                    _broken(text, "", "", f"{folder / inner}: no address can name a folder with a ?"),
                    frozenset(),
                )
                continue
            below = places.join(text, inner)
            waiting.append((folder / inner, below, text if inner.startswith(RUN_PREFIX) else below))


def _fault(folder: StoragePath) -> str | None:
    """Why no run can be read in a folder."""
    try:
        discover(folder)
    except AnalyzeError as error:
        return str(error)
    return None


def _runs(found: Discovery, dump: str) -> Iterator[_Found]:
    for run_id, models in sorted(found.runs.items()):
        for model, sessions in sorted(models.items()):
            # However it was reached: a pattern can match links.
            folders = frozenset(str(folder.resolve()) for folder, _ in sessions)
            yield Target(dump, run_id, model), folders


def _broken(dump: str, run_id: str, model: str, reason: str) -> Row:
    return Row(dump, run_id, model, "broken", reason)


# ---- reading


@dataclass(frozen=True)
class RunTask:
    """What a worker is given: a run that it reads by itself, unless it is long."""

    target: Target
    #: The worker has one core to itself, and no more.
    crowded: bool


@dataclass(frozen=True)
class RunResult:
    """What becomes of a run."""

    row: Row
    #: As ``eplb-analyze summary --output json`` prints it; None where the run is broken.
    summary: dict[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """What a worker is given of a long run: a range of steps, and how its sums are kept."""

    target: Target
    steps: StepRange
    bins: Bins
    crowded: bool


@dataclass(frozen=True)
class Read:
    """What a worker gives back of a part."""

    sums: SummarySums
    #: What reading found, beside what showed when the run was opened.
    findings: list[Finding]


def read_run(item: RunTask) -> RunResult | None:
    """What becomes of a run; None where it is long enough to be shared out. Runs on a worker."""
    if item.crowded:
        limit_workers(1)
    target = item.target
    try:
        run = open_run(target.dump, target.run_id, target.model)
        if len(run.parts()) > 1:
            return None
        return _done(target, run, _sums_of_all(run))
    except Exception as error:
        return _failed(target, _reason(error))


def read_part(part: Part) -> Read | str:
    """The sums of a part, or why there are none. Runs on a worker."""
    if part.crowded:
        limit_workers(1)
    try:
        run = open_run(part.target.dump, part.target.run_id, part.target.model)
        known = [*run.findings]
        sums = run.reading(lambda: sums_of(run, part.steps, part.bins))
        return Read(sums, [f for f in run.findings if f not in known])
    except Exception as error:
        return _reason(error)


def _sums_of_all(run: Run) -> SummarySums:
    return run.reading(lambda: sums_of(run, None, bins_of(run)))


def _reason(error: Exception) -> str:
    """Nothing that is wrong with one run ends the batch."""
    return str(error) if isinstance(error, AnalyzeError) else f"{type(error).__name__}: {error}"


def _failed(target: Target, reason: str) -> RunResult:
    return RunResult(_broken(target.dump, target.run_id, target.model, reason))


def _done(target: Target, run: Run, sums: SummarySums) -> RunResult:
    summary = sums.summary(run)
    return RunResult(_row(target, run, sums, summary), summary.to_json())


def rows_of(
    targets: Iterable[Target | Row],
    executor: Executor | None = None,
    kept: ResultCache | None = None,
) -> Iterator[tuple[Row, bool]]:
    """The row of each run as soon as it is read, and whether it was read anew.

    A worker makes the whole row of a run; of long runs, which come last, workers sum parts, and one makes
    the row of what the sums add up to.

    Args:
        targets: what :func:`find` gives.
        executor: default this process.
        kept: where what is finished is kept, and taken from where the run has not changed.
    """
    chosen = executor or Local()
    ready: list[Row] = []
    long: list[Target] = []

    def unread() -> Iterator[RunTask]:
        for target in targets:
            row = target if isinstance(target, Row) else kept.row(target) if kept is not None else None
            if row is not None:
                ready.append(row)
            elif isinstance(target, Target):
                yield RunTask(target, chosen.crowded)

    def finish(target: Target, done: RunResult) -> tuple[Row, bool]:
        if kept is not None:
            kept.keep(target, done)
        return done.row, True

    for item, result in chosen.map(read_run, unread()):
        while ready:
            yield ready.pop(0), False
        if result is None:
            long.append(item.target)
        else:
            done = _failed(item.target, result.reason) if isinstance(result, WorkerDied) else result
            yield finish(item.target, done)
    for row in ready:
        yield row, False
    for target, done in _long(long, chosen):
        yield finish(target, done)


@dataclass
class Merged:
    """What a worker is given of a long run at last: the sums of all its parts."""

    target: Target
    crowded: bool
    #: Parts that are not read yet.
    missing: int
    sums: SummarySums | None = None
    findings: list[Finding] = field(default_factory=list)
    reason: str | None = None

    def take(self, result: Read | str | WorkerDied) -> None:
        self.missing -= 1
        if isinstance(result, WorkerDied):
            result = result.reason
        if isinstance(result, str):
            self.reason = self.reason or result
            return
        self.findings += [f for f in result.findings if f not in self.findings]
        if self.sums is None:
            self.sums = result.sums
        else:
            self.sums.merge(result.sums)


def finish_run(item: Merged) -> RunResult:
    """What becomes of a long run. Runs on a worker: to judge its rearrangements takes a while."""
    if item.crowded:
        limit_workers(1)
    target = item.target
    if item.reason is not None or item.sums is None:
        return _failed(target, item.reason or "no step")
    try:
        run, sums = open_run(target.dump, target.run_id, target.model), item.sums
        if any(finding.code == "damaged_file" for finding in item.findings):
            # What cannot be read is left out of all parts alike, and moves their bounds.
            sums = _sums_of_all(run)
        elif sums.seen.last is not None:
            # It may have gone on since its parts were read.
            run = run.until(sums.seen.last)
        run.findings += [f for f in item.findings if f not in run.findings]
        return _done(target, run, sums)
    except Exception as error:
        return _failed(target, _reason(error))


def _read_or_finish(item: Part | Merged) -> Read | str | RunResult:
    return read_part(item) if isinstance(item, Part) else finish_run(item)


def _long(targets: Iterable[Target], executor: Executor) -> Iterator[tuple[Target, RunResult]]:
    """What becomes of runs of several parts, whose parts are shared out."""
    reading: dict[Target, Merged] = {}
    read: list[Merged] = []
    failed: list[tuple[Target, RunResult]] = []

    def items() -> Iterator[Part | Merged]:
        for target in targets:
            try:
                run = open_run(target.dump, target.run_id, target.model)
                bins, ranges = bins_of(run), run.parts()
            except Exception as error:
                failed.append((target, _failed(target, _reason(error))))
                continue
            reading[target] = Merged(target, executor.crowded, len(ranges))
            for steps in ranges:
                while read:
                    yield read.pop(0)
                yield Part(target, steps, bins, executor.crowded)

    waiting: Iterable[Part | Merged] = items()
    while waiting:
        for item, result in executor.map(_read_or_finish, waiting):
            if isinstance(item, Merged):
                done = (
                    _failed(item.target, result.reason)
                    if isinstance(result, WorkerDied)
                    else cast(RunResult, result)
                )
                yield item.target, done
                continue
            this = reading[item.target]
            this.take(cast(Read | str | WorkerDied, result))
            if not this.missing:
                read.append(reading.pop(item.target))
        waiting, read = list(read), []
    yield from failed


def _row(target: Target, run: Run, sums: SummarySums, summary: Summary) -> Row:
    info, steps, loss = run.info, summary.steps, summary.loss
    findings = [f for f in summary_findings(run, steps) if f.severity != "info"]
    errors = [f for f in findings if f.severity == "error"]
    recorded = sum(c.recorded for c in summary.configurations)
    balance = summary.spreads["balancedness"]
    gaps = np.concatenate([np.empty(0, np.int64), *sums.gaps])
    step_seconds = float(np.median(gaps)) / 1e9 if len(gaps) and info.timed else None
    known = [layer for layer in summary.layers if layer.balancedness is not None]
    worst = min(known, key=lambda layer: layer.balancedness or 0.0) if known else None
    costliest = loss.ranks[0] if loss is not None and loss.ranks and loss.tokens else None
    lost = None
    if step_seconds is not None and summary.idle_fraction is not None:
        rank_steps = sum(c.recorded * c.ep_size * (c.idle_fraction or 0.0) for c in summary.configurations)
        # A step that is sampled stands for those that are not.
        lost = rank_steps * info.interval * step_seconds
    told = {f.code for f in (*findings, *check_steps(run, steps)) if f.severity != "info"}
    balances = np.concatenate(sums.values["balancedness"])
    judged = [
        figures.verdict
        for figures in verdicts(
            run,
            (
                (stretch.shape, np.concatenate(stretch.steps), np.concatenate(stretch.values))
                for stretch in sums.stretches
                if stretch.recorded
            ),
        )
    ]
    return Row(
        dump=target.dump,
        run_id=info.run_id,
        model=info.model,
        status="broken" if not recorded else "incomplete" if errors else "complete",
        reason=errors[0].text if errors else None if recorded else "no step is complete",
        engine=info.engine,
        engine_version=info.engine_version,
        created=datetime.fromtimestamp(info.created_unix_ns / 1e9, timezone.utc).isoformat(),
        scope=info.scope,
        ep_size=info.ep_size,
        num_layers=info.num_layers,
        num_logical_experts=info.num_logical_experts,
        num_physical_experts=info.num_physical_experts,
        steps=recorded,
        active_steps=int(np.count_nonzero(~np.isnan(balances))),
        incomplete_steps=steps.should_be_recorded - recorded,
        missing_ranks=len(summary.missing_ranks),
        step_seconds=step_seconds,
        balancedness=balance.mean,
        balancedness_p5=balance.p5,
        idle_fraction=summary.idle_fraction,
        persistent_share=None if loss is None else loss.persistent_share,
        lost_rank_seconds=lost,
        worst_layer=None if worst is None else worst.layer,
        worst_rank=None if costliest is None else costliest.rank,
        worst_rank_share=None if costliest is None else costliest.share,
        rearrangements=len(judged),
        judged=sum(verdict not in ("not measured", "elastic") for verdict in judged),
        helped=judged.count("helped"),
        helped_at_first=judged.count("helped at first"),
        hurt=judged.count("hurt"),
        no_op=judged.count("no-op"),
        faults=sorted(told),
        config=run.engine_config,
        series=_series(balances),
    )


def _series(values: Any) -> list[tuple[float, int]]:
    values = values[~np.isnan(values)]
    if not len(values):
        return []
    width = -(-len(values) // MAX_SERIES)
    starts = np.arange(0, len(values), width)
    counts = np.diff(starts, append=len(values))
    return list(zip(np.add.reduceat(values, starts).tolist(), counts.tolist(), strict=True))


def judge(rows: Iterable[Row], threshold: float | None = None, baseline: str | None = None) -> Postmortem:
    """The rows in order, with what they are measured by.

    Args:
        baseline: as :func:`require_baseline` takes it.

    Raises NotInDumpError where no run, or several, are called so, or the one has no figures.
    """
    rows = list(rows)
    if baseline is not None:
        named = require_baseline(baseline, rows)
        if named.status == "broken":
            raise NotInDumpError(f"--baseline {baseline}: it has no figures: {named.reason}")
        rows = against(named, rows)
    return Postmortem(sorted(rows, key=lambda row: row.lost, reverse=True), threshold, baseline)


AnyRun = TypeVar("AnyRun", Target, Row, Target | Row)


def require_baseline(baseline: str, runs: Sequence[AnyRun]) -> AnyRun:
    """The one run that is called so: by its id, its dump, or its folder in the dump.

    Raises NotInDumpError where there are none or several.
    """
    named = [run for run in runs if baseline.rstrip("/") in (run.run_id, run.dump.rstrip("/"), address(run))]
    if len(named) == 1:
        return named[0]
    several = named or [run for run in runs if run.run_id]
    texts = [address(run) if named else run.run_id for run in several]
    what = "several runs are called so, name one as" if named else "no run is called so; there are"
    raise NotInDumpError(f"--baseline {baseline}: {what} {listed(sorted(set(texts)))}")


def address(run: Target | Row) -> str:
    """A run's folder."""
    inside = any(part.startswith(RUN_PREFIX) for part in PurePath(run.dump).parts)
    return run.dump.rstrip("/") if inside else places.join(run.dump, f"{RUN_PREFIX}{run.run_id}")


def against(baseline: Row, rows: Iterable[Row]) -> list[Row]:
    """The rows with their differences from a baseline run, by a block bootstrap."""
    base = _ratio(baseline)

    def compared(row: Row) -> Row:
        if row is baseline or row.status == "broken":
            return row
        for name in ("model", "num_layers", "num_logical_experts"):
            if getattr(row, name) != getattr(baseline, name):
                return replace(row, not_compared=f"another {name.removeprefix('num_').replace('_', ' ')}")
        found = bootstrap.difference(base, _ratio(row))
        if found is None:
            return replace(
                row, not_compared=f"fewer than {MIN_STEPS} steps with tokens, in it or the baseline"
            )
        return replace(row, difference=found.value, difference_low=found.low, difference_high=found.high)

    return [compared(row) for row in rows]


def _ratio(row: Row) -> Ratio:
    sums = np.array(row.series, np.float64).reshape(-1, 2)
    return Ratio(sums[:, 0], sums[:, 1])


# ---- keeping


class ResultCache:
    """What is finished, in the folder of ``--save``: a summary of each run, and the rows of complete ones.

    A row's file is named by what the run consisted of when it was read. It is written last, so that a run
    whose row is kept is wholly finished. What is wrong with a run, or with reading it, may be gone the next
    time, so of other runs nothing is kept.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where it cannot be made, or lies in a dump, in which only its writers write."""
        self.folder = folder
        self._rows = folder / "kept"
        self._keys: dict[Target, str] = {}
        own = [place.resolve() for place in (folder, self._rows, folder / "reports")]
        for above in (above for place in own for above in (place, *place.parents)):
            if above.name.startswith(RUN_PREFIX) or any(above.glob(f"{RUN_PREFIX}*/{MODEL_PREFIX}*")):
                raise UsageError(f"--save {folder}: it lies in the dump {above}; name another folder")
        try:
            self._rows.mkdir(parents=True, exist_ok=True)
            (folder / "reports").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--save {folder}: {error.strerror}; name another folder") from None

    def row(self, target: Target) -> Row | None:
        """The kept row of a run that has not changed since."""
        try:
            self._keys[target] = content(target)
            path = self._path(target)
            require_regular(path)
            document = load_json(path.read_bytes())
            if document.pop("version") != VERSION:
                return None
            row = Row(**{**document, "series": [(s, n) for s, n in document["series"]]})
        except (OSError, ValueError, TypeError, KeyError, AnalyzeError, FormatError):
            return None
        return row if self.report(row, "json").exists() else None

    def keep(self, target: Target, done: RunResult) -> None:
        """Raises DumpError where it cannot be written."""
        if done.summary is not None:
            text = json.dumps(done.summary, indent=2)
            _replace(self.report(done.row, "json"), lambda path: path.write_text(text))
        if done.row.status == "complete" and target in self._keys:
            data = dump_json({"version": VERSION, **asdict(done.row)})
            _replace(self._path(target), lambda path: path.write_bytes(data))

    def _path(self, target: Target) -> Path:
        return self._rows / f"{self._keys[target]}.json"

    def report(self, row: Row, suffix: str) -> Path:
        """Where a run's report lies: two dumps can hold runs of one name."""
        whole = [str(places.absolute(places.storage_path(row.dump))), row.run_id, row.model]
        names = f"{row.run_id[:80]}-{model_slug(row.model)[:80]}-{_digest(*whole)[:8]}"
        return self.folder / "reports" / f"{names}.{suffix}"

    def save(self, result: Postmortem) -> None:
        """Write ``runs.parquet``, a row a run. Raises DumpError where it cannot be written."""
        _replace(self.folder / "runs.parquet", result.frame().write_parquet)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in the place of one, whole; several batches may do so at once."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise DumpError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def content(target: Target) -> str:
    """A name for what a run consists of: its files' names, sizes and times of change.

    Raises OSError, AnalyzeError, KeyError where it is not there as it was found.
    """
    dump = places.storage_path(target.dump)
    found = discover(dump, target.run_id)
    parts: list[Any] = [VERSION, str(places.absolute(dump))]
    for folder, info in found.runs[target.run_id][target.model]:
        files = [(entry.name, entry.stat(follow_symlinks=False)) for entry in places.entries(folder)]
        parts += [info.session_id, str(folder), [(n, s.st_size, s.st_mtime_ns) for n, s in files]]
    return _digest(*parts)[:32]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Page:
    """An HTML report that a worker is to write."""

    row: Row
    file: Path
    crowded: bool


def write_page(page: Page) -> str | None:
    """Write a run's HTML report, or say why not. Runs on a worker."""
    from eplb_analyze.report.write import write_report

    if page.crowded:
        limit_workers(1)
    try:
        page.file.parent.mkdir(parents=True, exist_ok=True)
        run = open_run(page.row.dump, page.row.run_id, page.row.model)
        write_report(run, page.file, force=True)
        return None
    except AnalyzeError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
