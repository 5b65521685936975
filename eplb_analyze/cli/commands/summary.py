"""`summary`: how balanced was the run, and is the data complete?"""

from __future__ import annotations

from pathlib import Path

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
from eplb_analyze.cli.views.summary import render


def summary(
    dump: Dump = Path("."),
    steps: StepsOption = None,
    top: TopOption = 5,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """How balanced was the run, when was it worst, which layers and experts, is my data complete?"""
    wanted = parse_steps(steps)
    from eplb_analyze.analysis.summary import summarize
    from eplb_analyze.replay.settings import not_due

    out = Output(output)
    opened = open_for(out, dump, run, model)
    result = summarize(opened, wanted)
    placements = opened.history
    # None: nobody can tell.
    acted = bool(placements.rearrangements()) if opened.placements_recorded else None
    early = not_due(opened) if acted is False else None
    out.emit(result.to_json(), lambda console: render(console, result, top, acted=acted, early=early))
    finish(out, opened, result.steps)
