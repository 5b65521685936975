"""`experts`: which experts are hot, always or in bursts, cold or dead, and are the hot ones replicated?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.experts import render


@options.about_a_run
def experts(
    out: RunOutput,
    layer: options.Layer = None,
    hot: Annotated[
        bool, typer.Option("--hot", help="Show only experts that are hot in some window.")
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Show only experts that are cold over all steps.")
    ] = False,
    window: Annotated[
        int,
        typer.Option(
            "--window-steps", metavar="N", help="Count bursts in windows of this many complete steps.", min=1
        ),
    ] = 100,
    hot_factor: Annotated[
        float,
        typer.Option(
            "--hot-factor",
            metavar="X",
            help="Call an expert hot if its load is at least this many times the layer's mean.",
        ),
    ] = 2.0,
    all_placements: Annotated[
        bool,
        typer.Option(
            "--all-placements",
            help="Judge replicas by the loads of all steps, not only those since the last rearrangement.",
        ),
    ] = False,
    steps: options.Steps = None,
    top: options.Top = 5,
) -> None:
    """Show which experts are hot (always or in bursts), cold or dead, and if each has enough replicas."""
    from eplb_dump.format.schema import MAX_EXPERTS

    if not 1 < hot_factor <= MAX_EXPERTS:
        what = f"{hot_factor:g} is not above 1 and at most {MAX_EXPERTS}"
        raise typer.BadParameter(what, param_hint="--hot-factor")
    from eplb_analyze.analysis.experts import expert_report

    run = out.open(with_loads=True)
    report = expert_report(
        run, layer, steps, window=window, hot_factor=hot_factor, all_placements=all_placements
    )
    out.show(
        lambda: report.to_json(hot=hot, cold=cold),
        lambda console: render(console, report, top, hot=hot, cold=cold),
        report.steps,
    )
