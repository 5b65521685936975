"""`summary`: how balanced was the run, and is the data complete?"""

from __future__ import annotations

from pathlib import Path

from eplb_analyze.cli import options
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.summary import render


def summary(
    dump: options.Dump = Path("."),
    steps: options.Steps = None,
    top: options.Top = 5,
    run: options.Run = None,
    model: options.Model = None,
    output: options.Output = OutputFormat.text,
) -> None:
    """How balanced was the run, when was it worst, which layers and experts, is my data complete?"""
    from eplb_analyze.analysis.summary import summarize
    from eplb_analyze.replay.settings import not_due

    out = Output(output)
    opened = out.open_run(dump, run, model)
    result = summarize(opened, steps)
    # None: not known.
    acted = bool(opened.history.rearrangements()) if opened.placements_recorded else None
    early = not_due(opened) if acted is False else None
    out.show(
        opened,
        result.to_json(),
        lambda console: render(console, result, top, acted=acted, early=early),
        result.steps,
    )
