"""`replay`: what would another policy, number of redundant experts, interval or window have given?"""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput
from eplb_analyze.cli.views.replay import render


@options.about_a_run
def replay(
    out: RunOutput,
    policy: options.Policy = None,
    redundant: options.Redundant = None,
    interval: options.Interval = None,
    window: options.Window = None,
    ep_size: Annotated[
        str | None, typer.Option("--ep-size", help="Try these numbers of EP ranks.", metavar="N,N…")
    ] = None,
    start: options.Start = None,
    dispatch: options.Dispatch = None,
    max_utilization: options.MaxUtilization = None,
    min_balancedness: options.MinBalancedness = None,
    layers_per_step: options.LayersPerStep = None,
    delay_steps: options.DelaySteps = None,
    max_moves: options.MaxMoves = None,
    num_groups: options.NumGroups = None,
    num_nodes: options.NumNodes = None,
    objective: options.Objective = None,
    cross_node_weight: options.CrossNodeWeight = None,
    cost_per_expert_ms: options.CostPerExpertMs = None,
    expert_mb: options.ExpertMb = None,
    steps: options.Steps = None,
    timings: options.Timings = None,
    top: options.Top = 20,
    workers: options.Workers = None,
) -> None:
    """Replay the recorded loads under another policy, redundancy, interval, window or dispatch.

    For each combination of settings, the policy places experts based on past steps only, and the placement
    is scored on later steps. The table also includes the recorded setting. Options take comma-separated
    lists, for example 100,500.
    """
    choices = options.parse_choices(
        policy, redundant, interval, window, start, ep_size, dispatch,
        max_utilization=max_utilization, min_balancedness=min_balancedness,
        layers_per_step=layers_per_step, delay_steps=delay_steps, max_moves=max_moves,
    )  # fmt: skip
    from eplb_analyze.parallel import num_cores
    from eplb_analyze.replay.pricing import Objective
    from eplb_analyze.replay.replay import replay_run

    run = out.open(timings=timings, with_loads=True)
    result = replay_run(
        run, choices, steps, num_groups=num_groups, num_nodes=num_nodes,
        objective=None if objective is None else Objective(objective),
        cost_per_expert_ms=cost_per_expert_ms, expert_mb=expert_mb,
        cross_node_weight=cross_node_weight, workers=workers, processes=workers or num_cores(),
    )  # fmt: skip
    out.show(result.to_json, lambda console: render(console, result, top), result.part.whole)
