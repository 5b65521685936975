"""Shows the verdict of `check` and every finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line, steps_label
from eplb_analyze.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.check import CheckReport
    from eplb_analyze.reader.run import Run

MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "info": ("·", "dim")}


def render(console: Console, run: Run, report: CheckReport) -> None:
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    verdict = ("complete and intact", "bold green") if report.ok else ("problems found", "bold red")
    if report.ok and warnings:
        verdict = (f"intact, with {plural(warnings, 'warning')}", "bold yellow")
    print_line(console, (f"{run.info.model} · run {run.info.run_id}: ", "bold"), verdict)
    steps = report.steps.to_json()
    parts = [f"{count:,} {name.replace('_', ' ')}" for name, count in steps.items() if count]
    parts = [part for part in parts if not part.endswith((" first", " last"))]
    first, last = steps["first"], steps["last"]
    seen = "no step is kept" if run.left_out() else "no step"
    if first is not None and last is not None:
        seen = steps_label(console, first, last)
    print_line(console, f"{seen}: {', '.join(parts)}" if parts else seen)
    damaged = any(finding.code == "damaged_file" for finding in report.findings)
    verified = "" if damaged else ", all checksums correct"
    ranks, sessions = plural(len(run.present_ranks), "rank"), plural(len(run.sessions), "session")
    print_line(console, f"{ranks} in {sessions}{verified}")
    print_line(console)
    for finding in report.findings:
        mark, style = MARKS[finding.severity]
        print_line(console, (f"{mark} {finding.severity}", style), f" [{finding.code}]")
        print_line(console, finding.text, indent=4)
    if not report.findings:
        print_line(console, "no problems found")
