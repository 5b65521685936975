"""`placement`: which expert is in which slot, and what changed between two steps?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.placement import render


@options.about_a_run
def placement(
    out: RunOutput,
    step: Annotated[
        int | None, typer.Option("--step", help="As of this step; default: the last.", min=0)
    ] = None,
    against: Annotated[
        int | None, typer.Option("--against", help="Say what changed since this step.", min=0)
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="One layer in full, by its number in the model.")
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Show the replicas of each expert, too.")
    ] = False,
) -> None:
    """Which expert is on which rank at a step, how many replicas has it, what changed since another?"""
    from eplb_analyze.analysis.placement import placement_report

    run = out.open()
    report = placement_report(run, step, against, layer)
    single = layer is not None
    out.show(report.to_json, lambda console: render(console, report, single=single, experts=experts))
