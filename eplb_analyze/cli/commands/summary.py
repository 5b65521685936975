"""`summary`: how balanced was the run, and is the data complete?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput


@options.about_a_run
def summary(
    out: RunOutput,
    steps: options.Steps = None,
    timings: options.Timings = None,
    gpu: options.Gpu = None,
    top: options.Top = 5,
    tier: options.Tier = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also show tables of layers, ranks, experts, phases and formulas.")
    ] = False,
) -> None:
    """Show a verdict on a run, the cost of imbalance, the incidents, and whether the data is complete."""
    from eplb_analyze.analysis.summary import summarize
    from eplb_analyze.cli.views.summary import render

    run = out.open(timings=timings, gpu=gpu)
    result = summarize(run, steps, options.tier_name(tier))
    part = (result.steps.first, result.steps.last) != run.step_range
    by_steps, of_loads = result.tier == "steps", "the cost of imbalance and causes of incidents"
    if result.hot_experts_tier == "full" or not result.hot_experts:
        of_loads = f"hot experts, {of_loads}"
    left_out = out.retired_lines(of_loads) if by_steps else []
    out.show(
        result.to_json,
        lambda console: render(console, result, run.clock, top, full=full, part=part, left_out=left_out),
        result.steps,
        of_loads,
        of_steps=by_steps,
        before=False,
    )
