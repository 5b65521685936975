"""`compact`: merge the rank files of a run into a new run of few files, summed over ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.compact import render
from eplb_analyze.storage.path import StoragePath, local, storage_path


@options.about_a_run
def compact(
    out: RunOutput,
    to: Annotated[
        StoragePath,
        typer.Option("--to", help="The dump, a folder, to write the new run into.", parser=storage_path),
    ],
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="The new run's id; default: the old one's, and -compact.")
    ] = None,
) -> None:
    """Write a run anew, in few files: the sums over its ranks. The old run stays as it is.

    Which rank a token came from is not in the new run, so `traffic` cannot tell.
    """
    folder = local(to, "`compact --to`")
    from eplb_analyze.transfer.compact import compact_run

    report = compact_run(out.dump, folder, out.run_id, out.model, run_id, out.progress)
    out.notes(report.notes)
    out.emit(report.to_json, lambda console: render(console, report))
