"""Shows what `prune` thins and removes, run by run, and what stays and why."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_heading, print_line
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.prune import PrunedRun, PruneReport, TierChange

#: So many parts of a run that stay are explained.
MAX_KEPT = 4
_WHY = {"age": "by age", "bytes": "for --max-bytes"}


def size(count: int) -> str:
    """Bytes in the largest unit that gives at least 1."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def render(console: Console, report: PruneReport) -> None:
    after = f"{'at most ' if report.dry_run else ''}{size(report.bytes_after)}"
    verb = "would keep" if report.dry_run else "kept"
    limit = "" if report.max_bytes is None else f"; the limit is {size(report.max_bytes)}"
    print_heading(console, verb, f" {after} of {size(report.bytes_before)}{limit}")
    counts = {
        action: sum(run.action == action for run in report.runs)
        for action in ("removed", "thinned", "failed")
    }
    unchanged = report.unchanged + sum(run.action == "kept" for run in report.runs)
    parts = [f"{count:,} {action}" for action, count in counts.items() if count]
    runs = plural(sum(counts.values()) + unchanged, "run")
    print_line(console, f"{runs}: {', '.join([*parts, f'{unchanged:,} unchanged'])}; times in UTC")
    for run in report.runs:
        _run(console, run)
    if report.leftover_bytes:
        print_line(console, f"leftovers of an interrupted prune: {size(report.leftover_bytes)}")
    if report.over:
        text = f"{size(report.over)} over the limit: the rest is kept for the reasons above"
        print_line(console, (text, "bold red"))
    if report.dry_run:
        print_line(console, ("dry run: nothing was changed", "dim"))


def _run(console: Console, run: PrunedRun) -> None:
    style = {"removed": "bold", "thinned": "bold", "failed": "bold red"}.get(run.action, "dim")
    sizes = f"{size(run.bytes_before)} → {size(run.bytes_after)}"
    rest = {
        "removed": f"{size(run.bytes_before)}, {_WHY.get(run.reason or '', '')}, to {_time(run.newest)}",
        "failed": f"{sizes}: {run.reason or 'its segments are damaged'}",
        "thinned": sizes,
        "kept": sizes if run.merged else size(run.bytes_before),
    }[run.action]
    print_line(console, (run.action, style), f" run {run.run_id}: {rest}")
    if run.merged:
        print_line(console, "its ranks are merged into sums", indent=2)
    elif run.not_merged is not None:
        print_line(console, f"its ranks are not merged: {run.not_merged}", indent=2)
    for move in run.moves:
        print_line(console, _move(move), indent=2)
    for part in run.kept[:MAX_KEPT]:
        _, _, inside = part.path.partition(f"run={run.run_id}/")
        print_line(console, f"left {inside or part.path} ({size(part.bytes)}): {part.reason}", indent=2)
    if len(run.kept) > MAX_KEPT:
        print_line(console, f"left {len(run.kept) - MAX_KEPT:,} more; --json explains all", indent=2)


def _move(move: TierChange) -> str:
    since, until = _time(move.since), _time(move.until)
    span = since if since == until else f"{since} to {until}"
    return f"{move.tier} → {move.to}: {plural(move.segments, 'segment')}, {span}, {_WHY[move.reason]}"


def _time(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M}"
