"""`layer`: what each rank, slot and expert of one layer got."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.layer import render


def layer(
    layer: Annotated[int, typer.Argument(help="The layer's number in the model.", metavar="LAYER")],
    dump: options.Dump = Path("."),
    step: Annotated[int | None, typer.Option("--step", help="One step.", min=0)] = None,
    steps: options.Steps = None,
    top: options.Top = 5,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """What did each rank, slot and expert of a layer get, in a step, a range or the whole run?"""
    if step is not None and steps is not None:
        raise typer.BadParameter("give one of --step and --steps", param_hint="--step")
    from eplb_analyze.analysis.layer import layer_report

    out = Output(output)
    opened = out.open_run(dump, run, model)
    report = layer_report(opened, layer, step, steps)
    # A slot that changed its expert mixes two experts' tokens: the slot table covers the last placement.
    changes = report.placement_changes
    placed = layer_report(opened, layer, None, (changes[-1], report.last_step + 1)) if changes else report
    out.show(opened, report.to_json(), lambda console: render(console, report, placed, top))
