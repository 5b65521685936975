"""`seal`: turn the journals of killed writers into sealed segments."""

from __future__ import annotations

from pathlib import Path

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.seal import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


def seal(
    dump: options.Dump = Path("."),
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Turn the journals of killed writers into Parquet, for other programs to read.

    All runs, unless --run or --model says otherwise. The only command that changes a run; a
    journal whose writer is alive is left alone. Exit 1 if one was skipped.
    """
    from eplb_analyze.transfer.recover import seal_dump

    report = seal_dump(dump, run, model)
    Output(output).emit(report.to_json(), lambda console: render(console, report))
    if report.skipped:
        raise typer.Exit(EXIT_CHECK_FAILED)
