"""Merging the ranks of a run before it is thinned: the sums over ranks take the place of its own files."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from eplb_analyze.atomic import clear
from eplb_analyze.sessions.discovery import discover
from eplb_analyze.transfer.compact import compact_run
from eplb_analyze.transfer.retention.carry_out import AT_WORK, ChangedError, exclude_others, require_unchanged
from eplb_analyze.transfer.retention.survey import NEWBORN, SurveyedRun, survey_run
from eplb_dump.format.files import exchange
from eplb_dump.format.schema import Scope, Tier


def has_own_loads(run: SurveyedRun) -> bool:
    """Whether ranks of a run recorded their own loads, which can be merged."""
    return any(session.info is not None and session.info.scope is Scope.LOCAL for session in run.sessions)


def why_not(run: SurveyedRun) -> str | None:
    """Why the ranks of a run are not merged, as far as names and headers show it; None if they can be."""
    infos = [session.info for session in run.sessions if session.info is not None]
    if run.live is not None:
        return "a writer of it may be alive"
    if run.foreign:
        return f"{run.foreign[0]} is not a file of a dump"
    if len(infos) < len(run.sessions) or any(session.fault is not None for session in run.sessions):
        return "a part of it cannot be read"
    if len({info.model for info in infos}) > 1:
        return "it has several models"
    if any(piece.entry.tier is not Tier.FULL for session in run.sessions for piece in session.pieces):
        return "a part of it is thinned already"
    return NEWBORN if run.has_newborn else None


def waits(run: SurveyedRun) -> bool:
    """Whether the ranks of a run can be merged in some minutes, so that nothing of it is thinned before."""
    return has_own_loads(run) and why_not(run) == NEWBORN


def require_one_start(dump: Path, run: SurveyedRun) -> None:
    """Raise ChangedError if several engine starts share a run's id: only one of them would be merged."""
    if discover(dump, run.run_id).starts_of(run.run_id):
        raise ChangedError("several engine starts share its id")


def merge_ranks(dump: Path, run: SurveyedRun) -> SurveyedRun:
    """Let the verified sums over the ranks of a run take its place, at once, under its id. Returns it.

    `prune` is at work in the dump. Raises ChangedError, OSError, and DumpError if `compact` refuses the run;
    the run is unchanged then.
    """
    require_one_start(dump, run)
    work = dump / AT_WORK
    clear(work)
    try:
        compact_run(dump, work, run.run_id, run_id=run.run_id)
        made = work / run.folder.name
        with ExitStack() as held:
            require_unchanged(run, survey_run(run.folder))
            for session in run.sessions:
                exclude_others(session, held)
            exchange(dump / run.folder.name, made)
            try:
                require_unchanged(run, survey_run(made))
            except ChangedError:
                exchange(dump / run.folder.name, made)
                raise
    finally:
        clear(work)
    return survey_run(run.folder)
