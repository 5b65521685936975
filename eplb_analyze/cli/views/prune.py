"""Shows what `prune` thins and removes, run by run, and what stays and why."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_heading, print_line
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.retention.report import PrunedRun, PruneReport, TierChange

#: So many parts of a run that stay are explained.
MAX_KEPT = 4
#: What a dry run calls an action: in a count of runs, and of one run.
_PLAN = {
    "removed": ("to remove", "would remove"),
    "thinned": ("to thin", "would thin"),
    "merged": ("to merge", "would merge"),
    "failed": ("to fail", "could not thin"),
    "kept": ("to keep", "would keep"),
}
_WHY = {"age": "by age", "bytes": "for --max-bytes"}


def size(count: int) -> str:
    """Bytes in the largest unit that gives at least 1."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def render(console: Console, report: PruneReport) -> None:
    dry = report.dry_run
    if dry:
        estimated = any(run.merged for run in report.runs)
        what = "estimates, and prune decides by the real ones" if estimated else "upper bounds"
        print_line(console, (f"dry run: nothing is changed; sizes after it are {what}", "dim"))
    limit = "" if report.max_bytes is None else f"; the limit is {size(report.max_bytes)}"
    bound = _bound(dry=dry, merged=any(run.merged for run in report.runs))
    after = _after(report.bytes_before, report.bytes_after, bound)
    verb = "would keep" if dry else "kept"
    print_heading(console, verb, f" {after} of {size(report.bytes_before)}{limit}")
    counts = {
        action: sum(run.action == action for run in report.runs)
        for action in ("removed", "thinned", "merged", "failed")
    }
    unchanged = report.unchanged + sum(run.action == "kept" for run in report.runs)
    parts = [f"{count:,} {_PLAN[action][0] if dry else action}" for action, count in counts.items() if count]
    runs = plural(sum(counts.values()) + unchanged, "run")
    print_line(console, f"{runs}: {', '.join([*parts, f'{unchanged:,} unchanged'])}; times in UTC")
    for run in report.runs:
        _run(console, run, dry=dry)
    if report.leftover_bytes:
        text = "would remove" if dry else "removed"
        print_line(console, f"{text} leftovers of an interrupted prune: {size(report.leftover_bytes)}")
    if report.over:
        over = f"{bound}{size(report.over)} over the limit"
        print_line(console, (f"{over}: the rest is kept for the reasons above", "bold red"))


def _bound(*, dry: bool, merged: bool) -> str:
    """What a dry run knows of the bytes afterwards."""
    return "" if not dry else "about " if merged else "at most "


def _after(before: int, after: int, bound: str) -> str:
    """Bytes afterwards; an upper bound above what is there says nothing."""
    if after == before:
        return size(after)
    return f"{bound}{size(after)}" if after < before or not bound else f"about {size(before)}"


def _run(console: Console, run: PrunedRun, *, dry: bool) -> None:
    style = {"removed": "bold", "thinned": "bold", "merged": "bold", "failed": "bold red"}.get(
        run.action, "dim"
    )
    after = _after(run.bytes_before, run.bytes_after, _bound(dry=dry, merged=run.merged))
    sizes = f"{size(run.bytes_before)} → {after}"
    rest = {
        "removed": f"{size(run.bytes_before)}, {_WHY.get(run.reason or '', '')}, to {_time(run.newest)}",
        "failed": f"{sizes}: {run.reason or 'its segments are damaged'}",
        "thinned": sizes,
        "merged": sizes,
        "kept": size(run.bytes_before),
    }[run.action]
    verb = _PLAN[run.action][1] if dry else run.action
    print_line(console, (verb, style), f" run {run.run_id}: {rest}")
    if run.merged_bytes is not None and run.action != "merged":
        merged = "would be merged: about" if dry else "are merged:"
        print_line(console, f"its ranks {merged} {size(run.merged_bytes)}", indent=2)
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
