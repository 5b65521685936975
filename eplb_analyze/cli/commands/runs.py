"""`runs`: the runs of a dump, one line each."""

from __future__ import annotations

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output
from eplb_analyze.cli.views.runs import render
from eplb_analyze.errors import EXIT_UNUSABLE


def runs(dump: options.Dump = None, json: options.Json = False) -> None:
    """List the runs of a dump, the newest last: model, engine, time, ranks, steps, state and size.

    Reads only headers, so it is quick. If a run cannot be read, its row shows the reason.
    """
    from eplb_analyze.batch.runs import list_runs

    found = list_runs(options.find_dump() if dump is None else dump)
    out = Output(json=json)
    out.named = options.named(dump)
    out.emit(found.to_json, lambda console: render(console, found))
    if all(line.ranks_expected is None for line in found.runs):
        raise typer.Exit(EXIT_UNUSABLE)
