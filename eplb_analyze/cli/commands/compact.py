"""`compact`: merge the rank files of a run into a new run of few files, summed over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.compact import render
from eplb_analyze.storage.path import StoragePath, local, storage_path


def compact(
    to: Annotated[
        StoragePath,
        typer.Option("--to", help="The dump, a folder, to write the new run into.", parser=storage_path),
    ],
    dump: options.Dump = Path("."),
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="The new run's id; default: the old one's, and -compact.")
    ] = None,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Write a run anew, in few files: the sums over its ranks. The old run stays as it is.

    Which rank a token came from is not in the new run, so `traffic` cannot tell.
    """
    folder = local(to, "`compact --to`")
    from eplb_analyze.transfer.compact import compact_run

    out = Output(output)
    report = compact_run(dump, folder, run, model, run_id, out.progress)
    out.notes(report.notes)
    out.emit(report.to_json(), lambda console: render(console, report))
