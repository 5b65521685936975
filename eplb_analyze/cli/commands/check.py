"""`check`: is the dump complete and intact?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from eplb_analyze.cli.options import Dump, ModelOption, OutputOption, RunOption, open_for
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.errors import EXIT_CHECK_FAILED
from eplb_analyze.text import clean, plural

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "info": ("·", "dim")}


def check(
    dump: Dump = Path("."),
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Is the dump complete and intact? Reads and verifies every byte of a run; exit 1 if not."""
    from eplb_analyze.analysis.check import check_run

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = check_run(opened)

    def render(console: Console) -> None:
        from rich.padding import Padding
        from rich.text import Text

        steps = report.steps.to_json()
        warnings = sum(f.severity == "warning" for f in report.findings)
        verdict = ("complete and intact", "bold green") if report.ok else ("NOT in order", "bold red")
        if report.ok and warnings:
            verdict = (f"intact, with {plural(warnings, 'warning')}", "bold yellow")
        name = f"{clean(opened.info.model)} · run {clean(opened.info.run_id)}: "
        console.print(Text.assemble((name, "bold"), verdict))
        parts = [f"{value:,} {key.replace('_', ' ')}" for key, value in steps.items() if value]
        parts = [p for p in parts if not p.endswith((" first", " last"))]
        console.print(f"steps {steps['first']} to {steps['last']}: {', '.join(parts)}")
        ranks, sessions = len(opened.present_ranks), len(opened.sessions)
        damaged = any(f.code == "damaged_file" for f in report.findings)
        verified = "" if damaged else ", all checksums right"
        console.print(f"{plural(ranks, 'rank')} in {plural(sessions, 'session')}{verified}\n")
        for finding in report.findings:
            mark, style = _MARKS[finding.severity]
            console.print(Text.assemble((f"{mark} {finding.severity}", style), f" [{finding.code}]"))
            console.print(Padding(Text(clean(finding.text)), (0, 0, 0, 4)))
        if not report.findings:
            console.print("nothing found")

    out.emit(report.to_json(), render)
    if not report.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)
