"""`check`: is the dump complete and intact?"""

from __future__ import annotations

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.check import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


@options.about_a_run
def check(out: RunOutput) -> None:
    """Verify that a run is complete and intact. Reads every byte; exits with code 1 if it finds an error."""
    from eplb_analyze.analysis.check import check_run

    run = out.open(mixed=True)
    report = check_run(run)
    out.emit(report.to_json, lambda console: render(console, run, report))
    if not report.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)
