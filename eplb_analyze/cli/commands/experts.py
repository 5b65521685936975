"""`experts`: which experts are hot, always or in bursts, cold or dead, and are the hot ones replicated?"""

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
    TopOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.experts import render


def experts(
    dump: Dump = Path("."),
    layer: Annotated[int | None, typer.Option("--layer", help="One layer; default: all.")] = None,
    hot: Annotated[bool, typer.Option("--hot", help="Only experts that are hot in some window.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Only experts that are cold over all steps.")] = False,
    window: Annotated[
        int, typer.Option("--window", help="So many complete steps are one window.", min=1)
    ] = 100,
    hot_factor: Annotated[
        float, typer.Option("--hot-factor", help="Hot: at least so many times the layer's mean.")
    ] = 2.0,
    steps: StepsOption = None,
    top: TopOption = 5,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Which experts are hot (always or in bursts), cold or dead, and were the hot ones replicated enough?"""
    from eplb_dump.format.schema import MAX_EXPERTS

    if not 1 < hot_factor <= MAX_EXPERTS:
        what = f"{hot_factor:g} is not above 1 and at most {MAX_EXPERTS}"
        raise typer.BadParameter(what, param_hint="--hot-factor")
    wanted = parse_steps(steps)
    from eplb_analyze.analysis.experts import expert_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = expert_report(opened, layer, wanted, window=window, hot_factor=hot_factor)
    # Neither is as good as both.
    document = report.to_json(hot=hot, cold=cold)
    out.emit(document, lambda console: render(console, report, top, hot=hot, cold=cold))
    finish(out, opened, report.steps)
