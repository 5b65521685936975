"""What `prune` says: what becomes of each run, what stays as it is, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import field
from datetime import datetime, timezone
from typing import Literal

from eplb_analyze.json_report import Report
from eplb_analyze.transfer.retention.plan import Policy, RunPlan, is_coarser
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import Piece, SurveyedSession
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import Tier

Action = Literal["removed", "thinned", "merged", "failed", "kept"]


@frozen
class TierChange:
    """Segments of a run that go from one tier to another."""

    #: The tier that they were in: `full`, `ranks` or `minutes`.
    tier: str
    #: The tier that they are in afterwards: `ranks`, `minutes` or `gone`.
    to: str
    #: Why: `age`, or `bytes` for `--max-bytes`.
    reason: str
    #: How many segments, over all ranks.
    segments: int
    #: The time of the first of their steps, ISO 8601, UTC.
    since: str
    #: The time of the last of their steps, likewise.
    until: str
    #: Bytes that this frees, at least.
    freed_bytes: int


@frozen
class KeptPart:
    """A part of a run that stays as it is, whatever the limits are."""

    #: Where it is.
    path: str
    #: Its bytes.
    bytes: int
    #: Why it stays.
    reason: str


@frozen
class PrunedRun(Report):
    """What becomes of one run."""

    #: Its id, as in the name of its folder.
    run_id: str
    #: `removed`: with all its files; `thinned`, maybe after its ranks were merged; `merged`: only that;
    #: `failed`: it could not be changed; `kept`: nothing changes.
    action: Action
    #: Why it is removed: `age` or `bytes`; or why it could not be changed; null otherwise.
    reason: str | None
    #: The time of its newest step, ISO 8601, UTC.
    newest: str
    #: Bytes of its files before.
    bytes_before: int
    #: Bytes of its files afterwards; with `dry_run` at most so many, or about so many if its ranks would be
    #: merged.
    bytes_after: int
    #: Bytes of its files once its ranks are merged (`--merge-ranks`), with `dry_run` as a few of its segments
    #: show them; null if they are not merged.
    merged_bytes: int | None = None
    #: Why its ranks are not merged although something of it is thinned; null without `--merge-ranks`.
    not_merged: str | None = None
    #: What is thinned.
    moves: list[TierChange] = field(default_factory=list)
    #: What stays as it is.
    kept: list[KeptPart] = field(default_factory=list)

    @property
    def merged(self) -> bool:
        """Whether its ranks are merged first."""
        return self.merged_bytes is not None


@frozen
class PruneReport(Report):
    """What `prune` does, or with `--dry-run` would do."""

    #: The dump's folder or address.
    dump: str
    #: Whether nothing was changed.
    dry_run: bool
    #: The limit of `--max-bytes`; null without it.
    max_bytes: int | None
    #: Bytes of all runs before.
    bytes_before: int
    #: Bytes of all runs afterwards; with `dry_run` at most so many, or about so many if ranks would be
    #: merged.
    bytes_after: int
    #: Bytes of files that a killed `prune` left, and that are removed.
    leftover_bytes: int
    #: Runs of which something changes, or should but cannot, the oldest first.
    runs: list[PrunedRun]
    #: How many other runs there are, in which nothing is to be changed.
    unchanged: int

    #: How many runs could not be thinned or removed as far as the limits say, because of damage or an error.
    failed: int

    @property
    def over(self) -> int:
        """Bytes above the limit, after all that can be done."""
        return 0 if self.max_bytes is None else max(0, self.bytes_after - self.max_bytes)


def report_of(plan: RunPlan, policy: Policy, now_ns: int, damaged: Mapping[Piece, str]) -> PrunedRun:
    """What becomes of a run; ``damaged``: what stays as it is, because it turned out to be damaged."""
    run, size = plan.run, plan.run.size
    if plan.removed is not None:
        return PrunedRun(run.run_id, "removed", plan.removed, iso(run.last_ns), size, 0)
    groups: dict[tuple[Tier, Tier, str], list[tuple[Piece, int]]] = defaultdict(list)
    for piece, tier in plan.moves.items():
        if piece not in damaged:
            freed = piece.size - size_at(piece, tier)
            groups[piece.tier, tier, plan.reasons[piece]].append((piece, freed))
    moves = [
        TierChange(
            tier.value,
            to.value,
            reason,
            sum(piece.entry.last_seq - piece.entry.seq + 1 for piece, _ in some),
            iso(min(piece.first_ns for piece, _ in some)),
            iso(max(piece.last_ns for piece, _ in some)),
            sum(freed for _, freed in some),
        )
        for (tier, to, reason), some in sorted(groups.items(), key=lambda item: item[0][:2])
    ]
    freed = sum(move.freed_bytes for move in moves)
    kept = _kept(plan, policy, now_ns)
    kept += [KeptPart(str(p.session.folder), p.entry.size, why) for p, why in damaged.items()]
    action: Action = "thinned" if moves else "failed" if damaged else "kept"
    newest = iso(run.last_ns)
    return PrunedRun(run.run_id, action, None, newest, size, size - freed, moves=moves, kept=kept)


def _kept(plan: RunPlan, policy: Policy, now_ns: int) -> list[KeptPart]:
    """What stays although its age, or the bytes of the dump, are beyond the limits."""
    parts: list[KeptPart] = []
    together = plan.stays or "a rank that is left alone has the same steps"
    for session in plan.run.sessions:
        ages = [now_ns - session.last_ns, *(now_ns - piece.last_ns for piece in session.pieces)]
        due = policy.max_bytes is not None or policy.tier_at(max(ages)) is not Tier.FULL
        reason = session.live or session.stuck
        if due and reason is not None:
            parts.append(KeptPart(str(session.folder), _stuck_bytes(session), reason))
        for stay, why in (
            ({*_of_live_ranks(plan, policy, now_ns)}, together),
            ({*plan.newest}, "the newest steps of the dump are never thinned for --max-bytes"),
        ):
            bytes_ = sum(piece.entry.size for piece in session.pieces if piece in stay)
            if bytes_ and session.live is None:
                parts.append(KeptPart(str(session.folder), bytes_, why))
    if plan.run.foreign and (policy.max_bytes is not None or policy.outlives(now_ns - plan.run.last_ns)):
        why = "not a file of a dump: it is never removed, nor is the folder of its run"
        parts.append(KeptPart(plan.run.foreign[0], 0, why))
    return parts


def _of_live_ranks(plan: RunPlan, policy: Policy, now_ns: int) -> Iterator[Piece]:
    """What is beyond the limits, but recorded together with a session that is left alone."""
    for unit in plan.units:
        tier = policy.tier_at(now_ns - unit.last_ns)
        for piece in unit.pieces if unit.live is not None else ():
            if piece.fault is None and (policy.max_bytes is not None or is_coarser(tier, piece.tier)):
                yield piece


def _stuck_bytes(session: SurveyedSession) -> int:
    if session.live is not None or session.fault is not None:
        return session.size
    journals = sum(session.files[name].st_size for name in session.journals)
    return journals + sum(piece.entry.size for piece in session.pieces if piece.fault is not None)


def iso(unix_ns: int) -> str:
    """A time, ISO 8601, UTC."""
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).isoformat()
