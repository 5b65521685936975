"""`traffic`: from which rank to which rank, and node, did the tokens go?"""

from __future__ import annotations

from pathlib import Path

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.traffic import render


def traffic(
    dump: options.Dump = Path("."),
    layer: options.Layer = None,
    by: options.By = options.Grouping.rank,
    ranks_per_node: options.RanksPerNode = None,
    steps: options.Steps = None,
    top: options.Top = 5,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """From which rank to which rank did the tokens go, and how many crossed nodes? (scope local only)"""
    from eplb_analyze.analysis.traffic import traffic_report

    out = Output(output)
    opened = out.open_run(dump, run, model)
    report = traffic_report(opened, layer, steps, by=by.value, ranks_per_node=ranks_per_node)
    out.show(opened, report.to_json(), lambda console: render(console, report, top), report.steps)
