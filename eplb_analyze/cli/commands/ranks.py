"""`ranks`: which rank or node do the others wait for?"""

from __future__ import annotations

from pathlib import Path

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
from eplb_analyze.cli.views.ranks import render


def ranks(
    dump: Dump = Path("."),
    by: ByOption = By.rank,
    ranks_per_node: RanksPerNodeOption = None,
    steps: StepsOption = None,
    top: TopOption = 8,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """Which rank or node do the others wait for, in which layers, how often, and what does it cost?"""
    wanted = parse_steps(steps)
    from eplb_analyze.analysis.ranks import rank_report, require_nodes

    out = Output(output)
    opened = open_for(out, dump, run, model)
    if by is By.node and ranks_per_node is None:
        require_nodes(opened)
    report = rank_report(opened, wanted, ranks_per_node=ranks_per_node)
    out.emit(report.to_json(), lambda console: render(console, report, by, top))
    finish(out, opened, report.steps)
