"""`recover`: turn the journals of killed writers into sealed segments."""

from __future__ import annotations

import functools

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.recover import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


@functools.partial(options.about_a_run, all_runs=True)
def recover(out: RunOutput) -> None:
    """Recover recordings from crashed writers: turn their journals into Parquet for other programs.

    Recovers all runs of the dump, unless you select one with --run or --model. If it skips a journal
    because its writer is still alive, it exits with code 1.
    """
    from eplb_analyze.transfer.recover import recover_dump

    report = recover_dump(out.dump, out.run_id, out.model)
    out.emit(report.to_json, lambda console: render(console, report))
    if report.skipped:
        raise typer.Exit(EXIT_CHECK_FAILED)
