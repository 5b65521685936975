"""`rearrangements`: did each help, as predicted, for how long, and what was moved for it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.rearrangements import render


def rearrangements(
    dump: options.Dump = Path("."),
    steps: options.Steps = None,
    window: Annotated[
        int, typer.Option("--window", help="At most so many steps before and after.", min=1)
    ] = 1000,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Did each rearrangement help: before, predicted, after, the gain, how long it lasted, what moved?"""
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    out = Output(output)
    opened = out.open_run(dump, run, model)
    report = rearrangement_report(opened, steps, window)
    out.show(opened, report.to_json(), lambda console: render(console, report), report.steps)
