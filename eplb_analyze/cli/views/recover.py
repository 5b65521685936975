"""Shows which journals `recover` turned into Parquet, and which it left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.recover import RecoverReport


def render(console: Console, report: RecoverReport) -> None:
    for sealed in report.sealed:
        steps = "no step" if sealed.first_step is None else f"steps {sealed.first_step} to {sealed.last_step}"
        size = f"{sealed.journal_bytes / 1e6:.2f} MB → {sealed.sealed_bytes / 1e6:.2f} MB"
        print_line(console, f"sealed {sealed.journal}: {steps}, {size}")
    for removed in report.removed:
        print_line(console, f"removed {removed}: its segment is sealed, with all steps, or was retired")
    for restored in report.restored:
        print_line(console, f"restored {restored}, which was missing or could not be read")
    for skipped in report.skipped:
        print_line(console, f"left {skipped.journal}: {skipped.reason}")
    if not (report.sealed or report.removed or report.restored or report.skipped):
        print_line(console, "nothing to recover: no writer left a journal")
