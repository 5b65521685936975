"""`traffic`: from which rank to which rank, and node, did the tokens go?"""

from __future__ import annotations

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.traffic import render


@options.about_a_run
def traffic(
    out: RunOutput,
    layer: options.Layer = None,
    by: options.By = options.Grouping.rank,
    ranks_per_node: options.RanksPerNode = None,
    steps: options.Steps = None,
    top: options.Top = 5,
) -> None:
    """Show how many tokens each rank sent to each other rank, and how many crossed nodes (scope `local`)."""
    from eplb_analyze.analysis.traffic import traffic_report

    run = out.open(with_loads=True)
    report = traffic_report(run, layer, steps, by=by.value, ranks_per_node=ranks_per_node)
    out.show(report.to_json, lambda console: render(console, report, top), report.steps)
