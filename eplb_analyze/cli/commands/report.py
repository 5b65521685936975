"""`report`: one HTML file to send around, which works offline."""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.report import render


@options.about_a_run
def report(
    out: RunOutput,
    file: options.File,
    steps: options.Steps = None,
    timings: options.Timings = None,
    gpu: options.Gpu = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", help="Show this many rows of each ranking at first.", min=1)
    ] = 10,
    redact: Annotated[
        bool, typer.Option("--redact", help="Leave out names of models, runs, hosts and files.")
    ] = False,
    force: options.Force = False,
) -> None:
    """Write one HTML file that works offline, with the summary, charts over time, heat maps and tables."""
    from eplb_analyze.report.write import write_report

    run = out.open(timings=timings, gpu=gpu)
    written = write_report(run, file, steps, top=top, redact=redact, force=force)
    out.show(
        written.to_json,
        lambda console: render(console, written),
        written.steps,
        "experts, incidents and the cost of imbalance",
        of_steps=written.tier == "steps",
    )
