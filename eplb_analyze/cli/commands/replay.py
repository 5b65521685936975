"""`replay`: what would another policy, number of redundant experts, interval or window have given?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eplb_analyze.cli.options import (
    CostOption,
    Dump,
    GroupsOption,
    IntervalOption,
    ModelOption,
    OutputOption,
    PolicyOption,
    RedundantOption,
    RunOption,
    StartOption,
    StepsOption,
    TopOption,
    WindowOption,
    WorkersOption,
    finish,
    open_for,
    parse_choices,
    parse_steps,
)
from eplb_analyze.cli.output import Output, OutputFormat
from eplb_analyze.cli.views.replay import render


def replay(
    dump: Dump = Path("."),
    policy: PolicyOption = None,
    redundant: RedundantOption = None,
    interval: IntervalOption = None,
    window: WindowOption = None,
    ep_size: Annotated[
        str | None, typer.Option("--ep-size", help="Numbers of EP ranks.", metavar="N,N…")
    ] = None,
    start: StartOption = None,
    num_groups: GroupsOption = 1,
    cost_per_expert_ms: CostOption = None,
    steps: StepsOption = None,
    top: TopOption = 20,
    run: RunOption = None,
    model: ModelOption = None,
    workers: WorkersOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """What would another policy, number of redundant experts, interval or window have given?

    Each combination is replayed on the recorded loads: placed from past steps only, scored on the steps
    after, beside today's placements. Options take lists, as in --interval 100,500.
    """
    wanted = parse_steps(steps)
    choices = parse_choices(policy, redundant, interval, window, start, ep_size)
    from eplb_analyze.replay.replay import replay_run

    out = Output(output)
    opened = open_for(out, dump, run, model)
    result = replay_run(
        opened, choices, wanted,
        num_groups=num_groups, cost_per_expert_ms=cost_per_expert_ms, workers=workers,
    )  # fmt: skip
    out.emit(result.to_json(), lambda console: render(console, result, top))
    finish(out, opened, result.part.whole)
