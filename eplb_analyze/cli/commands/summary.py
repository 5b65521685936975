"""`summary`: how balanced was the run, and is the data complete?"""

from __future__ import annotations

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.summary import render


@options.about_a_run
def summary(
    out: RunOutput,
    steps: options.Steps = None,
    timings: options.Timings = None,
    gpu: options.Gpu = None,
    top: options.Top = 5,
) -> None:
    """How balanced was the run, when was it worst, which layers and experts, is my data complete?"""
    from eplb_analyze.analysis.summary import summarize
    from eplb_analyze.reader.recorded_setting import not_due

    run = out.open(timings=timings, gpu=gpu)
    result = summarize(run, steps)
    # None: not known.
    acted = bool(run.history.rearrangements()) if run.placements_recorded else None
    early = not_due(run) if acted is False else None
    out.show(
        result.to_json,
        lambda console: render(console, result, top, acted=acted, early=early),
        result.steps,
    )
