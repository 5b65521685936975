"""`traffic`: from which rank to which rank, and node, did the tokens go?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli.options import (
    By,
    ByOption,
    Dump,
    ModelOption,
    OutputOption,
    RanksPerNodeOption,
    RunOption,
    StepsOption,
    TopOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.traffic import render


def traffic(
    dump: Dump = Path("."),
    layer: Annotated[int | None, typer.Option("--layer", help="One layer; default: all.")] = None,
    by: ByOption = By.rank,
    ranks_per_node: RanksPerNodeOption = None,
    steps: StepsOption = None,
    top: TopOption = 5,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """From which rank to which rank did the tokens go, and how many crossed nodes? (scope local only)"""
    wanted = parse_steps(steps)
    from eplb_analyze.analysis.traffic import traffic_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = traffic_report(opened, layer, wanted, by=by.value, ranks_per_node=ranks_per_node)
    out.emit(report.to_json(), lambda console: render(console, report, top))
    finish(out, opened, report.steps)
