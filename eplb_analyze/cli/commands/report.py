"""`report`: one HTML file to send around, which works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli.options import (
    Dump,
    ModelOption,
    OutputOption,
    RunOption,
    StepsOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.report import render


def report(
    to: Annotated[
        Path, typer.Option("--to", help="The file to write.", metavar="FILE.html", show_default=False)
    ],
    dump: Dump = Path("."),
    steps: StepsOption = None,
    top: Annotated[
        int, typer.Option("--top", help="How many rows of a ranking to show at first.", min=1)
    ] = 10,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out names of models, runs, hosts and files.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Write one HTML file that works offline: the summary in words, charts over time, heat maps, tables."""
    wanted = parse_steps(steps)
    from eplb_analyze.report.write import write_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    written = write_report(opened, to, wanted, top=top, redact=redact, force=force)
    out.emit(written.to_json(), lambda console: render(console, written))
    finish(out, opened, written.steps)
