"""`rearrangements`: did each help, as predicted, for how long, and what was moved for it?"""

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
from eplb_analyze.cli.views.rearrangements import render


def rearrangements(
    dump: Dump = Path("."),
    steps: StepsOption = None,
    window: Annotated[
        int, typer.Option("--window", help="At most so many steps before and after.", min=1)
    ] = 1000,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Did each rearrangement help: before, predicted, after, the gain, how long it lasted, what moved?"""
    wanted = parse_steps(steps)
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = rearrangement_report(opened, wanted, window)
    out.emit(report.to_json(), lambda console: render(console, report))
    finish(out, opened, report.steps)
