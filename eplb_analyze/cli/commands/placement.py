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
        int | None,
        typer.Option(
            "--step", metavar="N", help="Show the placement at this step; default: the last step.", min=0
        ),
    ] = None,
    against: Annotated[
        int | None,
        typer.Option("--against", metavar="N", help="Show what changed from this step to --step.", min=0),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", metavar="N", help="Show one layer in full, by its number in the model."),
    ] = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Show the replicas of each expert, too.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Also show layers that look like most others.")
    ] = False,
) -> None:
    """Show which expert is on which rank at a step, its replicas, and what changed since another step."""
    from eplb_analyze.analysis.placement import placement_report

    run = out.open()
    report = placement_report(run, step, against, layer)
    single = layer is not None
    out.show(
        report.to_json,
        lambda console: render(console, report, single=single, experts=experts, every=every),
        of_steps=False,
    )
