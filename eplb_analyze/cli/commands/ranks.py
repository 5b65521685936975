"""`ranks`: which rank or node do the others wait for?"""

from __future__ import annotations

from pathlib import Path

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.ranks import render


def ranks(
    dump: options.Dump = Path("."),
    by: options.By = options.Grouping.rank,
    ranks_per_node: options.RanksPerNode = None,
    steps: options.Steps = None,
    top: options.Top = 8,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """Which rank or node do the others wait for, in which layers, how often, and what does it cost?"""
    from eplb_analyze.analysis.ranks import rank_report, require_nodes

    out = Output(output)
    opened = out.open_run(dump, run, model)
    if by is options.Grouping.node and ranks_per_node is None:
        require_nodes(opened)
    report = rank_report(opened, steps, ranks_per_node=ranks_per_node)
    out.show(opened, report.to_json(), lambda console: render(console, report, by.value, top), report.steps)
