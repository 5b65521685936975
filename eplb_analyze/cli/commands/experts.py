"""`experts`: which experts are hot, always or in bursts, cold or dead, and are the hot ones replicated?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.experts import render, render_minutes
from eplb_analyze.errors import UsageError


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
    """Show hot (always or in bursts), cold and dead experts, and whether each has enough replicas."""
    from eplb_dump.format.schema import MAX_EXPERTS

    if not 1 < hot_factor <= MAX_EXPERTS:
        what = f"{hot_factor:g} is not above 1 and at most {MAX_EXPERTS}"
        raise typer.BadParameter(what, param_hint="--hot-factor")
    from eplb_analyze.analysis.experts import expert_report
    from eplb_analyze.reader.rolled_up import only_minutes

    run = out.open()
    if only_minutes(run, steps):
        from eplb_analyze.analysis.experts_minutes import experts_of_minutes

        if cold and not hot:
            raise UsageError(
                f"{run.path}: sums per minute, which are all that is kept of experts here, do not show cold "
                "ones; remove --cold"
            )
        found = experts_of_minutes(run, layer, steps)
        out.show(
            found.to_json, lambda console: render_minutes(console, found, top), found.steps, of_steps=False
        )
        return
    run = out.open(with_loads=True)
    report = expert_report(
        run, layer, steps, window=window, hot_factor=hot_factor, all_placements=all_placements
    )
    out.show(
        lambda: report.to_json(hot=hot, cold=cold),
        lambda console: render(console, report, top, hot=hot, cold=cold),
        report.steps,
    )
