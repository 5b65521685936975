"""The figures of `summary`: how balanced a run was, and whether its data is complete."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from eplb_analyze.analysis.cost import cost_of_sample
from eplb_analyze.analysis.incident_series import incidents_of
from eplb_analyze.analysis.incidents import Incident, excess_tokens
from eplb_analyze.analysis.layer_report import HotExpert
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.summary_report import (
    HOT_EXPERTS,
    Configuration,
    Estimate,
    LayerFigure,
    Loss,
    PhaseFigure,
    Summary,
)
from eplb_analyze.analysis.summary_sums import (
    ESTIMATED,
    ConfigurationSums,
    LayerSums,
    SummarySums,
    bins_of,
    sums_of,
)
from eplb_analyze.json_report import remembers_run
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.formulas import Spread, idle_fraction, mean_known, most_often
from eplb_analyze.metrics.losses import Bin, timeline
from eplb_analyze.reader.lost import lost_in
from eplb_analyze.reader.placements import replicas
from eplb_analyze.reader.recorded_setting import not_due, overdue
from eplb_analyze.reader.rolled_up import from_minutes
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange

#: The mean over all layers does not show an incident of so many layers.
FEW_LAYERS = 3
WORST_STRETCHES = 10
#: So many groups of incomplete steps, by the ranks they lack, are estimated.
ESTIMATES = 5


@remembers_run
def summarize(
    run: Run, steps: tuple[int, int] | None = None, tier: Literal["steps", "minutes"] | None = None
) -> Summary:
    """Compute the summary of a run, or of a half-open range of its steps.

    Args:
        tier: what figures are from; default the sums per minute if not all of the steps are kept.

    Raises:
        NotInDumpError: no step of the run is in the range, or nothing is kept of it.
    """
    if from_minutes(run, steps, tier):
        from eplb_analyze.analysis.summary_minutes import summary_of_minutes

        return run.retry_without_damaged(lambda: summary_of_minutes(run, steps, search=tier is None))
    if steps is not None:
        run.require(steps)
    return run.retry_without_damaged(lambda: _summarize(run, steps))


def _summarize(run: Run, steps: tuple[int, int] | None) -> Summary:
    return summary_of(sums_of(run, steps, bins_of(run, steps)), run, steps)


def summary_of(sums: SummarySums, run: Run, steps: tuple[int, int] | None = None) -> Summary:
    """The figures of a run; ``steps`` is the range that was asked for."""
    if run.phase is not None and not sums.seen.seen:
        raise run.nothing_complete(steps)
    step = np.concatenate(sums.steps)
    values = {name: np.concatenate(parts) for name, parts in sums.values.items()}
    stretches = [stretch for stretch in sums.configurations if stretch.recorded]
    mean_tokens = sum(s.mean_tokens for s in stretches)
    max_tokens = sum(s.max_tokens for s in stretches)
    changes = run.history.rearrangements()
    if steps is not None:
        changes = [r for r in changes if steps[0] <= r.first_step < steps[1]]
    timed = run.info.timed and sums.last_time >= sums.first_time
    acted = bool(run.history.rearrangements()) if run.placements_recorded else None
    why = not_due(run) if acted is False else None
    whole = (sums.seen.first, sums.seen.last) if steps is None and run.phase is None else None
    cost = cost_of_sample(run, sums.cost)
    pauses = sums.clock.pauses(run, changes) if run.phase is None else [None] * len(changes)
    incidents = run.retry_without_damaged(lambda: incidents_of(run, sums.balance, sums.cost, cost, steps))
    hot = _hot_experts(run, stretches[-1]) if stretches else []
    hot_steps = (stretches[-1].loads_first, stretches[-1].loads_last) if stretches else None
    # Without any experts' loads, minutes still name the slots with the most tokens.
    rolled_up = hot_steps is not None and hot_steps[1] < 0
    if rolled_up:
        from eplb_analyze.analysis.experts_minutes import hot_experts_of_minutes

        hot, hot_steps = run.retry_without_damaged(lambda: hot_experts_of_minutes(run, steps))
    return Summary(
        run=run.info,
        steps=sums.seen,
        expected_ranks=run.expected_ranks,
        present_ranks=run.present_ranks,
        lost_ranks=run.lost_ranks,
        spreads={name: Spread.of(value, step) for name, value in values.items()},
        idle_fraction=idle_fraction(mean_tokens, max_tokens),
        cost=cost,
        configurations=[_configuration(s) for s in stretches],
        estimates=_estimates(sums),
        layers=_layer_figures(run, sums.layers, stretches[-1]) if stretches else [],
        hot_experts=hot,
        hot_experts_tier="minutes" if rolled_up else "full",
        last_configuration_steps=hot_steps,
        rearrangements=changes,
        pauses=[Milliseconds.of(p) if isinstance(p, Interval) else None for p in pauses],
        # The steps of one phase do not show what was between them.
        long_gaps=sums.clock.long_gaps(run) if run.phase is None else None,
        phases=[
            PhaseFigure(name, p.steps, mean_known(p.values), idle_fraction(p.mean_tokens, p.max_tokens))
            for name, p in sorted(sums.phases.items())
        ],
        timeline=timeline(sums.bins, step, values["balancedness"]),
        layer_timeline=_layer_timeline(run, sums, incidents.found),
        loss=_loss(run, stretches[-1]) if stretches else None,
        duration_seconds=(sums.last_time - sums.first_time) / 1e9 if timed else None,
        incidents=incidents.found,
        unexamined_departures=len(incidents.unexamined),
        restless_layers=incidents.restless,
        searched=incidents.searched,
        cost_steps=_with_loads(run, steps),
        acted=acted,
        contradictions=[*sums.conservation.findings_of_sums(run)],
        unlisted_files=run.unlisted_files,
        not_due=why,
        overdue=overdue(run, whole) if acted is False and why is None else None,
    )


def _with_loads(run: Run, steps: tuple[int, int] | None) -> list[StepRange] | None:
    """The stretches of a range of which experts' loads are kept; None: all of it."""
    first, last = (0 if step is None else step for step in run.step_range)
    chosen = StepRange.of(steps).clip(first, last + 1)
    if not run.tiers.by_rank.overlaps(*chosen):
        return None
    return [*run.tiers.without_loads.outside(*chosen)]


def _configuration(sums: ConfigurationSums) -> Configuration:
    return Configuration(
        sums.first,
        sums.last,
        sums.shape.ep_size,
        sums.shape.num_physical_experts,
        lost_in(sums.shape),
        sums.recorded,
        mean_known(sums.values),
        idle_fraction(sums.mean_tokens, sums.max_tokens),
    )


def _layer_timeline(run: Run, sums: SummarySums, incidents: list[Incident]) -> tuple[int, list[Bin]] | None:
    layers = {id(one): one.layer if one.layer is not None else one.cause.layer for one in incidents}
    few = [one for one in incidents if layers[id(one)] is not None and len(one.layers) <= FEW_LAYERS]
    number = layers[id(max(few, key=excess_tokens))] if few else None
    if number is None or run.info.num_layers == 1:
        return None
    steps, values = sums.balance.of_layer(run.layer_index(number))
    return number, timeline(sums.bins, steps, values.astype(np.float64))


def _estimates(sums: SummarySums) -> list[Estimate]:
    found = []
    for missing, own in sums.estimates.items():
        steps = np.concatenate(own.steps)
        balance, imbalance = (Spread.of(np.concatenate(own.values[name]), steps) for name in ESTIMATED)
        idle = idle_fraction(own.mean_tokens, own.max_tokens)
        found.append(Estimate(missing, int(steps[0]), int(steps[-1]), len(steps), balance, imbalance, idle))
    return sorted(found, key=lambda estimate: (-estimate.steps, estimate.missing_ranks))[:ESTIMATES]


def _loss(run: Run, stretch: ConfigurationSums) -> Loss:
    losses = stretch.losses
    named = [replace(s, layer=run.info.layers[s.layer]) for s in losses.stretches(WORST_STRETCHES)]
    return Loss(losses.total, losses.lasting_share, losses.longest_window, losses.by_rank(), named)


def _layer_figures(run: Run, sums: LayerSums, last: ConfigurationSums) -> list[LayerFigure]:
    return [
        LayerFigure(
            number,
            float(sums.ratio[index] / active) if active else None,
            float(sums.inverse[index] / active) if active else None,
            *most_often(last.slowest[index]),
        )
        for index, (number, active) in enumerate(zip(run.info.layers, sums.active, strict=True))
    ]


def _hot_experts(run: Run, stretch: ConfigurationSums) -> list[HotExpert]:
    total = stretch.logical.sum(axis=1, keepdims=True)
    in_layer = run.history.num_experts(run.info.num_logical_experts, len(total))
    share = np.divide(stretch.logical, total, out=np.zeros(stretch.logical.shape), where=total > 0)
    hottest = np.argsort(-share, axis=None, kind="stable")[:HOT_EXPERTS]
    experts = []
    for layer, logical in zip(*np.unravel_index(hottest, share.shape), strict=True):
        slots = run.history.layer(int(layer)).at(stretch.last)
        if slots is None or share[layer, logical] == 0:
            continue
        experts.append(
            HotExpert(
                run.info.layers[layer],
                int(logical),
                float(share[layer, logical]),
                float(share[layer, logical] * in_layer[layer]),
                int(replicas(slots, share.shape[1])[logical]),
            )
        )
    return experts
