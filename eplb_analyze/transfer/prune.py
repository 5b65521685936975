"""`prune`: keep a dump within ages and bytes, tier by tier, and remove what is older than all of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from eplb_analyze.errors import AnalyzeError, DumpError, NotInDumpError, UsageError
from eplb_analyze.sessions.discovery import REMOVED_RUNS_FILE, no_run_in
from eplb_analyze.sessions.starts import run_and_start
from eplb_analyze.storage import path as places
from eplb_analyze.storage.bucket import UnreachableError
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import listed
from eplb_analyze.transfer.retention import carry_out
from eplb_analyze.transfer.retention.carry_out import ChangedError
from eplb_analyze.transfer.retention.foresee import foresee_merged
from eplb_analyze.transfer.retention.merge import has_own_loads, merge_ranks, waits, why_not
from eplb_analyze.transfer.retention.plan import Policy, RunPlan, plan_for_age, plan_for_bytes
from eplb_analyze.transfer.retention.report import PrunedRun, PruneReport, iso, report_of
from eplb_analyze.transfer.retention.survey import NEWBORN, Piece, SurveyedSession, survey, survey_run
from eplb_dump.format.schema import LEVEL_PREFIXES, RUN_PREFIX, FormatError, Tier


def prune_dump(
    dump: StoragePath,
    policy: Policy,
    run: str | None = None,
    *,
    merge: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> PruneReport:
    """Thin and remove what a policy does not keep, in all runs of a dump or in one.

    A session whose writer may be alive is left alone, and so is what other ranks recorded of the same
    steps. A dry run changes nothing, and reports what the run would do.

    Args:
        policy: ages count from the time of a step until now. Bytes are those of all runs, or of the one.
        run: its id, or a unique beginning of it.
        merge: merge the ranks of a run before anything of it is thinned, if `compact` can.

    Raises:
        DumpError, NotInDumpError: there is no such dump or run, or never was a run in it.
        UsageError: another process prunes this dump; DUMP is a folder in a run.
    """
    if merge:
        dump = places.local(dump, "`prune --merge-ranks`")
    run_ids = _run_ids(dump, run)
    if dry_run:
        return _prune(dump, policy, run_ids, None, progress, merge=merge)
    try:
        with carry_out.at_work(dump) as stay:
            return _prune(dump, policy, run_ids, stay, progress, merge=merge)
    except OSError as error:
        raise DumpError(f"{dump}: {error.strerror or error}") from None


def _run_ids(dump: StoragePath, run: str | None) -> list[str] | None:
    """The runs to prune; None for all. Raises DumpError, NotInDumpError, UsageError."""
    if places.absolute(dump).name.startswith(LEVEL_PREFIXES):
        raise UsageError(f"{dump}: pass the folder that contains run=…, and select one run with --run")
    if isinstance(dump, Path) and not dump.is_dir():
        raise DumpError(f"{dump}: {'it is a file' if dump.exists() else 'no such folder'}")
    try:
        names = {entry.name for entry in places.entries(dump)}
    except OSError as error:
        raise DumpError(f"{dump}: {error.strerror}") from None
    known = sorted(name[len(RUN_PREFIX) :] for name in names if name.startswith(RUN_PREFIX))
    if not known and REMOVED_RUNS_FILE not in names:
        # A job whose volume is not mounted, or is mounted elsewhere, must not succeed for ever.
        raise no_run_in(dump)
    if run is None:
        return None
    if run_and_start(run)[1]:
        raise UsageError(
            f"--run: {run} is one start of a run; `prune` takes whole runs, {run_and_start(run)[0]}"
        )
    if run in known:
        return [run]
    matches = [one for one in known if one.startswith(run)]
    if len(matches) != 1:
        what = f"it has {len(matches)} runs that begin with" if matches else "it has no run"
        hint = f": {listed(matches)}" if matches else f"; its runs are: {listed(known)}"
        raise NotInDumpError(f"{dump}: {what} {run!r}{hint if known else ''}")
    return matches


def _prune(
    dump: StoragePath,
    policy: Policy,
    run_ids: list[str] | None,
    stay: Callable[[], None] | None,
    progress: Callable[[int, int], None],
    *,
    merge: bool,
) -> PruneReport:
    now_ns = time.time_ns()
    runs = survey(dump, run_ids)
    # What is thinned unmerged can never be merged.
    stays = [f"{NEWBORN}; it is merged later" if merge and waits(run) else None for run in runs]
    plans = [plan_for_age(run, policy, now_ns, why) for run, why in zip(runs, stays, strict=True)]
    work = None if stay is None else _Work(dump, stay, progress)
    if work is not None:  # which needs no space, and frees some for the merges
        work.carry_out([plan for plan in plans if plan.removed is not None])
    local = sum(map(has_own_loads, runs)) if merge else 0
    merges = _Merges(dump, policy, now_ns, lambda done: progress(done, local), dry_run=work is None)
    plans = [merges.merge(plan) if merge and plan.moves else plan for plan in plans]
    if policy.max_bytes is not None:
        plans = plan_for_bytes(plans, policy.max_bytes, merges.merge if merge else lambda plan: plan)
    plans.sort(key=lambda plan: (plan.run.last_ns, plan.run.run_id))
    leftover_bytes = 0
    for plan in plans:
        for session in plan.run.sessions if plan.removed is None else ():
            names = carry_out.leftovers_of(session)
            leftover_bytes += sum(session.files[name].st_size for name in names)
            if names and work is not None:
                carry_out.remove_files(session.folder, names)
    if work is not None:
        work.carry_out([plan for plan in plans if plan.removed == "bytes"])
        work.carry_out([plan for plan in plans if plan.moves])
    before = {run.run_id: run.size for run in runs}
    reports = []
    for plan in plans:
        run_id = plan.run.run_id
        report = report_of(plan, policy, now_ns, {} if work is None else work.damaged.get(run_id, {}))
        merged_bytes = merges.bytes.get(run_id)
        report = replace(
            report,
            action="merged" if report.action == "kept" and merged_bytes is not None else report.action,
            bytes_before=before[run_id],
            merged_bytes=merged_bytes,
            not_merged=merges.refused.get(run_id) if plan.moves or plan.removed == "bytes" else None,
        )
        reports.append(report if work is None else work.outcome(report))
    shown = [report for report in reports if report.action != "kept" or report.kept]
    return PruneReport(
        dump=str(dump),
        dry_run=work is None,
        max_bytes=policy.max_bytes,
        bytes_before=sum(report.bytes_before for report in reports),
        bytes_after=sum(report.bytes_after for report in reports) - leftover_bytes,
        leftover_bytes=leftover_bytes,
        runs=shown,
        unchanged=len(reports) - len(shown),
        failed=0 if work is None else len(work.failed | work.damaged.keys()),
    )


class _Merges:
    """Merges the ranks of runs, or for a dry run foresees what that will leave."""

    def __init__(
        self,
        dump: StoragePath,
        policy: Policy,
        now_ns: int,
        progress: Callable[[int], None],
        *,
        dry_run: bool,
    ) -> None:
        self._dump, self._policy, self._now_ns, self._progress = dump, policy, now_ns, progress
        self._merge = foresee_merged if dry_run else merge_ranks
        #: Bytes of the merged runs, and why others are not merged, by their ids.
        self.bytes: dict[str, int] = {}
        self.refused: dict[str, str] = {}

    def merge(self, plan: RunPlan) -> RunPlan:
        """The plan of a run after a merge of its ranks, or as it is if they are not merged."""
        run = plan.run
        if not has_own_loads(run) or run.run_id in self.refused:
            return plan
        assert isinstance(self._dump, Path)
        reason = why_not(run)
        if reason is None:
            self._progress(len(self.bytes) + len(self.refused))
            try:
                merged = self._merge(self._dump, run)
            except _ERRORS as error:
                reason = _text(error)
        if reason is not None:
            self.refused[run.run_id] = reason
            return plan
        self.bytes[run.run_id] = merged.size
        return plan_for_age(merged, self._policy, self._now_ns)


#: What keeps a run from being merged, thinned or removed.
_ERRORS = (OSError, FormatError, ChangedError, AnalyzeError)


def _text(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


class _Work:
    """Carries out what was planned."""

    def __init__(
        self, dump: StoragePath, stay: Callable[[], None], progress: Callable[[int, int], None]
    ) -> None:
        self._dump, self._stay, self._progress = dump, stay, progress
        #: Why runs could not be changed, and which pieces of runs turned out to be damaged, by the run's id.
        self.failed: dict[str, str] = {}
        self.damaged: dict[str, dict[Piece, str]] = {}
        self._bytes_after: dict[str, int] = {}

    def carry_out(self, plans: list[RunPlan]) -> None:
        """Remove runs, or thin them."""
        removed = [_log_line(plan) for plan in plans if plan.removed is not None]
        if removed:
            carry_out.log_removed(self._dump, removed)
        for done, plan in enumerate(plans):
            self._progress(done, len(plans))
            self._stay()
            try:
                self._carry_out(plan)
            except UnreachableError:
                raise
            except _ERRORS as error:
                self.failed[plan.run.run_id] = _text(error)
            with suppress(OSError):
                places.forget_listing(self._dump)
                self._bytes_after[plan.run.run_id] = survey_run(plan.run.folder).size

    def _carry_out(self, plan: RunPlan) -> None:
        if plan.removed is not None:
            carry_out.remove_run(self._dump, plan.run)
            return
        damaged: dict[Piece, str] = {}
        for session, moves in _by_session(plan).items():
            damaged |= carry_out.thin_session(session, moves)
        if damaged:
            self.damaged[plan.run.run_id] = damaged

    def outcome(self, report: PrunedRun) -> PrunedRun:
        """The report of a run as it turned out."""
        run_id = report.run_id
        report = replace(report, bytes_after=self._bytes_after.get(run_id, report.bytes_after))
        if run_id not in self.failed:
            return report
        return replace(report, action="failed", reason=self.failed[run_id], moves=[])


def _by_session(plan: RunPlan) -> dict[SurveyedSession, dict[Piece, Tier]]:
    found: dict[SurveyedSession, dict[Piece, Tier]] = defaultdict(dict)
    for piece, tier in plan.moves.items():
        found[piece.session][piece] = tier
    return found


def _log_line(plan: RunPlan) -> dict[str, object]:
    """What remains of a run that was removed."""
    pieces = [piece for session in plan.run.sessions for piece in session.pieces]
    entries = [piece.entry for piece in pieces if piece.entry.last_step >= piece.entry.first_step >= 0]
    return {
        "run": plan.run.run_id,
        "models": sorted({s.info.model for s in plan.run.sessions if s.info is not None}),
        "first_time": iso(min((p.first_ns for p in pieces), default=plan.run.last_ns)),
        "last_time": iso(plan.run.last_ns),
        "first_step": min((entry.first_step for entry in entries), default=None),
        "last_step": max((entry.last_step for entry in entries), default=None),
        "bytes": plan.run.size,
        "reason": plan.removed,
        "removed": iso(time.time_ns()),
    }
