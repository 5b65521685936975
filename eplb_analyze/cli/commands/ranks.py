"""`ranks`: which rank or node do the others wait for?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.ranks import render


@options.about_a_run
def ranks(
    out: RunOutput,
    by: options.By = options.Grouping.rank,
    ranks_per_node: options.RanksPerNode = None,
    steps: options.Steps = None,
    top: options.Top = 8,
    every: Annotated[
        bool,
        typer.Option("--all", help="Also show layers in which all ranks are within 10% of the mean."),
    ] = False,
) -> None:
    """Show which rank or node the others had to wait for, in which layers, how often, and at what cost."""
    from eplb_analyze.analysis.ranks import rank_report, require_nodes

    run = out.open()
    if by is options.Grouping.node and ranks_per_node is None:
        require_nodes(run)
    report = rank_report(run, steps, ranks_per_node=ranks_per_node)
    out.show(
        report.to_json, lambda console: render(console, report, by.value, top, every=every), report.steps
    )
