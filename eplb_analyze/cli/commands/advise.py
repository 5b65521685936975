"""`advise`: recommend load-balancer settings."""

from __future__ import annotations

from typing import Annotated

import typer

from eplb_analyze.cli import options
from eplb_analyze.cli.output import RunOutput, print_message
from eplb_analyze.cli.views.advise import render
from eplb_analyze.errors import EXIT_CHECK_FAILED


@options.about_a_run
def advise(
    out: RunOutput,
    policy: options.Policy = None,
    redundant: options.Redundant = None,
    interval: options.Interval = None,
    window: options.Window = None,
    start: options.Start = None,
    dispatch: options.OneDispatch = None,
    max_utilization: options.MaxUtilization = None,
    min_balancedness: options.MinBalancedness = None,
    layers_per_step: options.LayersPerStep = None,
    delay_steps: options.DelaySteps = None,
    max_moves: options.MaxMoves = None,
    min_gain: Annotated[
        float,
        typer.Option(
            "--min-gain",
            metavar="X",
            help="Recommend a change only if it saves at least this fraction of the step time.",
            min=0,
            max=1,
        ),
    ] = 0.02,
    fail_below: Annotated[
        float | None,
        typer.Option(
            "--fail-below",
            metavar="X",
            help="Exit with code 1 if the recorded balancedness is below X or unknown.",
            min=0,
            max=1,
        ),
    ] = None,
    num_groups: options.NumGroups = None,
    num_nodes: options.NumNodes = None,
    objective: options.Objective = None,
    cross_node_weight: options.CrossNodeWeight = None,
    cost_per_expert_ms: options.CostPerExpertMs = None,
    expert_mb: options.ExpertMb = None,
    steps: options.Steps = None,
    timings: options.Timings = None,
    workers: options.Workers = None,
) -> None:
    """Recommend a load-balancer setting, with its gain and its price, and the two best alternatives.

    It chooses them on the first 60% of the steps, and tests them on the rest. Without options about settings,
    it searches among those that the engine offers; with them, it tries what `replay` would try.
    """
    choices = options.parse_choices(
        policy, redundant, interval, window, start, dispatch=dispatch,
        max_utilization=max_utilization, min_balancedness=min_balancedness,
        layers_per_step=layers_per_step, delay_steps=delay_steps, max_moves=max_moves,
    )  # fmt: skip
    from eplb_analyze.replay.advise import advise as judge
    from eplb_analyze.replay.pricing import Objective

    run = out.open(timings=timings, with_loads=True)
    advice = judge(
        run, choices, steps, min_gain=min_gain,
        num_groups=num_groups, num_nodes=num_nodes,
        objective=None if objective is None else Objective(objective),
        cost_per_expert_ms=cost_per_expert_ms, expert_mb=expert_mb,
        cross_node_weight=cross_node_weight, workers=workers,
    )  # fmt: skip
    passed = None if fail_below is None else advice.passes(fail_below)
    out.show(
        lambda: {**advice.to_json(), "fail_below": fail_below, "passed": passed},
        lambda console: render(console, advice),
        None if advice.replay is None else advice.replay.part.whole,
    )
    if passed is False:
        known = advice.measured_balancedness
        found = "the balancedness is not known" if known is None else f"balancedness {known:.3f}"
        if known is not None and advice.replay is not None:
            found += f" in {run.clock.range_label(advice.replay.first_step, advice.replay.last_step)}"
        print_message("error", f"{found}, --fail-below {fail_below:g}")
        raise typer.Exit(EXIT_CHECK_FAILED)
