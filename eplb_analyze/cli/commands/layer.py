"""`layer`: what each rank, slot and expert of one layer got."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.layer import render
from eplb_analyze.errors import EXIT_UNUSABLE
from eplb_analyze.text import PROGRAM


def _layer_number(text: str) -> int:
    """A layer's number; if it is something else, the error shows the right order of arguments."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    words, right = sys.argv[1:], "layer LAYER DUMP"
    here = words.index(text) if text in words else len(words)
    if re.fullmatch("[0-9]{1,9}", "".join(words[here + 1 : here + 2])):
        words[here : here + 2] = [words[here + 1], text]
        right = shlex.join(words)
    raise typer.BadParameter(
        f"{text!r} is not a number; the layer comes first, then the dump: `{PROGRAM} {right}`"
    )


@options.about_a_run
def layer(
    out: RunOutput,
    layer: Annotated[
        int, typer.Argument(help="The layer's number in the model.", metavar="LAYER", parser=_layer_number)
    ],
    step: options.Step = None,
    steps: options.Steps = None,
    top: options.Top = 5,
) -> None:
    """Show the load of each rank, slot and expert of a layer, in one step, a range, or the whole run."""
    if step is not None and steps is not None:
        raise typer.BadParameter(
            "--step and --steps cannot be combined; use one of them", param_hint="--step"
        )
    from eplb_analyze.analysis.layer import layer_report, since_last_placement

    run = out.open()
    report = layer_report(run, layer, step, steps)
    if report.tier == "full":
        run = out.open(with_loads=True)
    placed = since_last_placement(run, report)
    ordered = run.info.origin is None or "step_order" not in run.info.origin.unknown
    out.show(
        report.to_json,
        lambda console: render(console, report, placed, top, ordered=ordered, asked=step),
        of_steps=report.minutes is None,
    )
    if step is None and not report.complete:  # an estimate, as in every command over a range
        raise typer.Exit(EXIT_UNUSABLE)
