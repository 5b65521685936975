"""`rearrangements`: did each help, as predicted, for how long, and what was moved for it?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.rearrangements import render


@options.about_a_run
def rearrangements(
    out: RunOutput,
    steps: options.Steps = None,
    timings: options.Timings = None,
    window: Annotated[
        int,
        typer.Option(
            "--window-steps", metavar="N", help="Compare at most this many steps before and after.", min=1
        ),
    ] = 1000,
    expert_mb: options.ExpertMb = None,
) -> None:
    """Show whether each rearrangement helped: balancedness before and after, the gain, and what moved."""
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    run = out.open(timings=timings)
    report = rearrangement_report(run, steps, window, expert_mb=expert_mb)
    out.show(report.to_json, lambda console: render(console, report), report.steps, "predictions and costs")
