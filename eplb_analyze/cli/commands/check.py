"""`check`: is the dump complete and intact?"""

from __future__ import annotations

from pathlib import Path

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.check import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


def check(
    dump: options.Dump = Path("."),
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Is the dump complete and intact? Reads and verifies every byte of a run; exit 1 if not."""
    from eplb_analyze.analysis.check import check_run

    out = Output(output)
    opened = out.open_run(dump, run, model)
    report = check_run(opened)
    out.emit(report.to_json(), lambda console: render(console, opened, report))
    if not report.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)
