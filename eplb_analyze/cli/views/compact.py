"""Shows the size of a run before and after `compact`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line, table
from eplb_analyze.text import percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.compact import CompactReport, Side


def render(console: Console, report: CompactReport) -> None:
    before, after = report.before, report.after
    print_line(console, ("compacted ", "bold"), f"run {before.run_id}, {report.model}")
    print_line(console, f"into {report.to} as run {after.run_id}", soft_wrap=True)
    steps = [f"{count:,} {name.replace('_', ' ')}" for name, count in report.steps.items() if count]
    console.print(f"steps: {', '.join(steps)}")
    for text in report.unknown.values():
        print_line(console, (f"not known: {text}", "yellow"))
    console.print()
    listing = table(console, "<", "sessions", "files", "MB", "summary")
    for name, side in (("before", before), ("after", after)):
        size, seconds = f"{side.bytes / 1e6:,.2f}", f"{side.summary_seconds:.2f} s"
        listing.add_row(name, f"{side.sessions:,}", f"{side.files:,}", size, seconds)
    console.print(listing)
    console.print(f"{_gain(before, after)}the sums are verified, and the source run is unchanged")


def _gain(before: Side, after: Side) -> str:
    """What the new run saves or costs, or an empty text if nothing."""
    fewer, saved = before.files - after.files, 1 - after.bytes / before.bytes if before.bytes else 0.0
    share = percent(abs(saved), 0)
    said = [f"{plural(abs(fewer), 'file')} {'fewer' if fewer > 0 else 'more'}"] if fewer else []
    said += [f"{share} {'smaller' if saved > 0 else 'larger'}"] if share != percent(0.0, 0) else []
    return f"{', '.join(said)}; " if said else ""
