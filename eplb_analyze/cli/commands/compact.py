"""`compact`: merge the rank files of a run into a new run of few files, summed over ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.compact import render
from eplb_analyze.storage.path import local


@options.about_a_run
def compact(
    out: RunOutput,
    destination: options.Destination,
    run_id: Annotated[
        str | None,
        typer.Option(
            "--run-id", metavar="ID", help="Set the new run's id; default: the old id with -compact appended."
        ),
    ] = None,
) -> None:
    """Merge the rank files of a run into one compact run that holds the sums over ranks.

    SRC does not change. The compact run no longer shows which rank each token came from, so `traffic`
    cannot use it.
    """
    folder = local(destination, "`compact`")
    from eplb_analyze.transfer.compact import compact_run

    report = compact_run(out.dump, folder, out.run_id, out.model, run_id, out.progress)
    out.notes(report.notes)
    out.emit(report.to_json, lambda console: render(console, report))
