"""`timeline`: how did a figure move over the steps of a run?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.console import console
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.timeline import MARGIN, render


@options.about_a_run
def timeline(
    out: RunOutput,
    formula: Annotated[
        str,
        typer.Option(
            "--formula", metavar="NAME", help="Plot this formula from `formulas`, or idle_fraction."
        ),
    ] = "balancedness",
    layer: Annotated[
        int | None, typer.Option("--layer", metavar="N", help="Plot one layer, by its number in the model.")
    ] = None,
    bins: Annotated[
        int | None,
        typer.Option(
            "--bins",
            metavar="N",
            help="Use this many bins; default: 100 with --json, otherwise as many as fit the terminal.",
            min=1,
        ),
    ] = None,
    steps: options.Steps = None,
    tier: options.Tier = None,
) -> None:
    """Plot balancedness or another metric over the steps of a run."""
    from eplb_analyze.analysis.timeline import timeline as compute
    from eplb_analyze.analysis.timeline_report import DEFAULT_BINS, NAMES
    from eplb_analyze.metrics.formulas import ACTIVE_EXPERTS

    if formula not in NAMES:
        raise typer.BadParameter(
            f"no formula {formula!r}; choose one of: {', '.join(NAMES)}", param_hint="--formula"
        )
    run = out.open(with_loads=formula == ACTIVE_EXPERTS.name)
    if not out.json:
        fit = max(1, console(sys.stdout).width - MARGIN)
        if bins is not None and bins > fit:
            out.notes([f"{bins} bins do not fit, so {fit} are shown; --json has all"])
        bins = min(bins or fit, fit)
    result = compute(run, formula, bins or DEFAULT_BINS, layer, steps, options.tier_name(tier))
    of_steps = result.tier == "steps"
    out.show(result.to_json, lambda console: render(console, result), result.steps, of_steps=of_steps)
