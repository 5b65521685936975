"""Findings that need no further reading: missing ranks, open sessions, incomplete steps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from eplb_analyze.errors import Finding, Severity
from eplb_analyze.reader.completeness import ABSENT, Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import LostRank, ranks_lost_at
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.text import listed, plural
from eplb_dump.format.schema import FORMAT_NAME


def standing_findings(run: Run) -> list[Finding]:
    """What every command reports about a run it has read: damage found so far, missing ranks, open sessions.

    Unlike :func:`~eplb_analyze.analysis.check.check_run` it reads nothing.
    """
    found = [*run.findings, *rank_findings(run), *session_findings(run)]
    return list(dict.fromkeys(found))


def summary_findings(run: Run, steps: Completeness) -> list[Finding]:
    """:func:`standing_findings` and those of the steps read, as errors if the figures leave out too much."""
    codes = {"incomplete_steps", "rank_stopped", "incomplete_end"}
    # A run in which all ranks idled is complete and has no figures.
    if steps.count(StepState.REJECTED) or steps.count(StepState.DROPPED):
        codes.add("no_complete_step")
    found = [f for f in step_findings(run, steps) if f.code in codes]
    standing = standing_findings(run)
    explained = any(f.severity == "error" for f in standing)
    too_much = not explained and steps.lacks_much
    nothing = any(f.code == "no_complete_step" for f in found)
    severity: Severity = "error" if too_much or nothing else "warning"
    return [*standing, *(Finding(severity, f.code, f.text) for f in found)]


def rank_findings(run: Run) -> Iterator[Finding]:
    missing = sorted(set(run.expected_ranks) - set(run.present_ranks))
    if missing:
        text = f"of {len(run.expected_ranks)} ranks, {_rank_names(missing)} wrote nothing"
        yield Finding("error", "missing_ranks", text)
    for one in run.lost_ranks:
        yield Finding("warning", "rank_lost", _lost_text(run, one))
    if run.scope.value == "global" and len(run.present_ranks) > 1:
        text = f"ranks {listed(run.present_ranks)} all wrote global sums; rank {run.present_ranks[0]}'s count"
        yield Finding("warning", "several_global_writers", text)


def _lost_text(run: Run, lost: LostRank) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(lost.time_ns / 1e9))
    at = f" ({when})" if run.info.timed else ""
    until = "" if lost.last_step is None else f", until step {lost.last_step}"
    return (
        f"rank {lost.rank} was lost: from step {lost.steps.first} on{at}{until} it recorded nothing and "
        f"got no tokens, while the other ranks continued; figures of these steps cover only the other ranks"
    )


def step_findings(run: Run, steps: Completeness) -> Iterator[Finding]:
    """Findings that follow from the completeness of the steps alone."""
    for text in run.retired_notes(without_loads="what needs experts' loads"):
        yield Finding("info", "retired_steps", text)
    if not steps.seen:
        if not run.left_out():
            yield Finding("error", "no_steps", "no step was recorded")
        return
    incomplete = steps.count(StepState.INCOMPLETE)
    gone = ranks_lost_at(steps.last or 0, run.lost_ranks)
    last = {rank: steps.last_of_rank.get(rank) for rank in run.expected_ranks if rank not in gone}
    short = {rank: step for rank, step in last.items() if step is None or step < (steps.last or 0)}
    # If no rank ended early, the last steps lack one for the same reasons as earlier steps.
    inside = steps.incomplete_inside if short else incomplete
    if inside:
        lack = "lacks a rank and is" if inside == 1 else "lack a rank and are"
        why = steps.why_incomplete()
        text = f"{plural(inside, 'step')} {lack} left out of all figures: {why}"
        minor = steps.accounted_for and not steps.lacks_much
        yield Finding("warning" if minor else "error", "incomplete_steps", text)
    if incomplete > inside:
        yield _incomplete_tail(run, steps, incomplete - inside, short)
    if steps.missing:
        gaps = ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in steps.gaps[:5])
        more = " …" if len(steps.gaps) > 5 else ""
        text = (
            f"no rank saw {plural(steps.missing, 'step')}, or the engine skipped step numbers: {gaps}{more}"
        )
        yield Finding("warning", "missing_steps", text)
    lost = _lost_in_source(run)
    yield from lost
    dropped = "the queue was full or recording was off; see the writer's stats"
    if lost:
        dropped = "they lacked a rank or were dropped in the original run"
    for state, remedy in (
        (StepState.DROPPED, dropped),
        (StepState.REJECTED, "the engine passed values that are not valid loads"),
    ):
        if steps.count(state):
            were = "was" if steps.count(state) == 1 else "were"
            text = f"{plural(steps.count(state), 'step')} {were} {state.label}: {remedy}"
            yield Finding("warning", f"{state.label}_steps", text)
    if not steps.count(StepState.RECORDED):
        states = (StepState.INCOMPLETE, StepState.REJECTED, StepState.DROPPED)
        why = ", ".join(f"{steps.count(s):,} {s.label}" for s in states if steps.count(s))
        text = "no step is complete" + (f" ({why})" if why else "") + ", so there are no figures"
        yield Finding("error", "no_complete_step", text)


def _lost_in_source(run: Run) -> list[Finding]:
    """Steps of a compacted run that are `dropped` because its source lacks the part of a rank."""
    origin = run.info.origin
    if origin is None or origin.system != FORMAT_NAME:
        return []
    severities: dict[str, Severity] = {"incomplete_steps": "error", "incomplete_end": "warning"}
    return [
        Finding(s, code, origin.unknown[code]) for code, s in severities.items() if code in origin.unknown
    ]


def _incomplete_tail(run: Run, steps: Completeness, tail: int, short: dict[int, int | None]) -> Finding:
    """The last steps lack ranks: either all were killed, or some ranks stopped while others went on.

    Args:
        short: the ranks that ended before the run's last step, with the last step that each accounted for.
    """
    stops = ", ".join(
        f"rank {rank} has none" + ("" if step is None else f" after {step}")
        for rank, step in [*short.items()][:4]
    )
    text = "the last step lacks" if tail == 1 else f"the last {tail:,} steps lack"
    text += f" ranks: {stops}"
    text += f" and {plural(len(short) - 4, 'more rank')}" if len(short) > 4 else ""
    if not steps.incomplete_inside and any(why != ABSENT for _, why in steps.reasons):
        text += f" ({steps.why_incomplete()})"
    closed = {s.info.ep_rank for s in run.sessions if s.closed is not None}
    survived = bool(closed) and not set(short) <= closed
    if not steps.ends_together or survived or not steps.count(StepState.RECORDED):
        return Finding("error", "rank_stopped", text)
    if closed < set(run.present_ranks):
        return Finding(
            "warning",
            "incomplete_end",
            text + "; when an engine is killed, its ranks do not stop at the same step",
        )
    # No rank was killed: ranks that close in order end within a few steps of each other.
    if steps.lacks_much:
        return Finding("error", "rank_stopped", text)
    return Finding(
        "warning",
        "incomplete_end",
        text + "; even if ranks close normally, they do not stop at the same step",
    )


def session_findings(run: Run) -> Iterator[Finding]:
    unclosed = [s for s in run.sessions if s.closed is None]
    if unclosed:
        ranks = sorted({s.info.ep_rank for s in unclosed})
        text = (
            f"{len(unclosed)} of {len(run.sessions)} sessions not closed (killed, or still being written): "
        )
        text += _rank_names(ranks)
        yield Finding("warning", "not_closed", text)
    part = next((s.part for s in run.sessions if s.part is not None), None)
    if part is not None:
        end = "the end" if part[1] >= NO_END - 1 else str(part[1])
        text = f"a copy of part of the run: the segments that contain steps {part[0]} to {end}"
        yield Finding("info", "partial_copy", text)
    for ended, whose in ((False, ""), (True, " of closed writers")):
        journals = sum(s.journals for s in run.sessions if (s.closed is not None) is ended)
        if journals:
            text = f"{plural(journals, 'journal')}{whose} not sealed: read here, but not by other programs "
            yield Finding("info", "unsealed_journal", text + "(see `recover`)")
    if any(finding.code == "mixed_starts" for finding in run.findings):
        return  # which says why sessions overlap
    for rank in run.present_ranks:
        own = [s for s in run.sessions if s.info.ep_rank == rank and s.segments]
        for older, newer in itertools.pairwise(own):
            start = max(min(s.first_step for s in session.segments) for session in (older, newer))
            last = min(older.last_step, newer.last_step)
            if start <= last:
                text = f"rank {rank} has two sessions with steps {start} to {last}; where both "
                text += f"recorded a step, the newer one counts ({newer.info.session_id})"
                yield Finding("warning", "overlapping_sessions", text)


def _rank_names(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
