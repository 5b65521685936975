"""The figures of `summary` from sums per minute, for a time of which not all steps are kept.

Means of formulas, extremes, layers and the idle fraction are those of the steps, and percentiles come from
histograms. With scope ``local`` only sums of loads over minutes exist. Nothing here reads a step, except
that incidents are looked for where steps are kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.analysis.experts_minutes import hottest
from eplb_analyze.analysis.incident_finder import Incidents
from eplb_analyze.analysis.incident_series import incidents_of
from eplb_analyze.analysis.minute_sums import (
    COLUMNS,
    LOCAL_COLUMNS,
    NO_SPREAD,
    ConfigurationMinutes,
    MinuteTotals,
)
from eplb_analyze.analysis.summary_report import (
    HOT_EXPERTS,
    Configuration,
    LayerFigure,
    Loss,
    PhaseFigure,
    Rollup,
    StepMilliseconds,
    Summary,
    SummedLayer,
    SummedLoads,
)
from eplb_analyze.analysis.summary_sums import bins_of, sums_of
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import FORMULAS, Spread, idle_fraction, most_often
from eplb_analyze.metrics.histograms import percentile
from eplb_analyze.metrics.losses import BINS, Bin
from eplb_analyze.reader.recorded_setting import not_due, overdue
from eplb_analyze.reader.rolled_up import (
    Kept,
    MinuteRange,
    add_up,
    kept,
    minutes_of_steps,
    nothing_kept,
    require_all_phases,
)
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.minutes import MINUTE_NS, SCALES
from eplb_dump.format.schema import Scope

#: Incidents are looked for in the newest steps that are kept, at most so many: some seconds of work.
SEARCHED_STEPS = 100_000
#: Balancedness over time is kept in at most so many sums, for comparisons of runs.
MAX_SERIES = 4096
#: Why the cost in milliseconds is not known.
NOT_MEASURED = "it needs single steps, and only per-minute sums are used"
#: Of incidents, if no step was read.
NOT_SEARCHED = Incidents([], searched=[])


def summary_of_minutes(run: Run, steps: tuple[int, int] | None, *, search: bool = True) -> Summary:
    """The summary of whole minutes: all of the run's, or those with steps in a half-open range.

    Call it inside ``run.retry_without_damaged``.

    Args:
        search: whether to look for incidents where steps are kept.

    Raises:
        NotInDumpError: nothing is kept of these steps.
        UsageError: steps of one phase are asked for, which sums of single ranks do not show.
    """
    local = run.scope is Scope.LOCAL
    require_all_phases(run)
    run.load_history()
    minutes = None if steps is None else minutes_of_steps(run, steps)
    sums = add_up(run, LOCAL_COLUMNS if local else COLUMNS, minutes, lambda: MinuteTotals(run))
    if sums.first < 0:
        raise nothing_kept(run, steps) if run.phase is None else run.nothing_complete(steps)
    what = kept(run)
    covered = StepRange(sums.first, sums.last + 1)
    found = _incidents(run, covered) if search else NOT_SEARCHED
    changes = run.history.rearrangements()
    if steps is not None:
        changes = [r for r in changes if covered.first <= r.first_step < covered.end]
    configurations = [c for c in sums.configurations if c.recorded]
    last = configurations[-1] if configurations else None
    # What is gone may have had a rearrangement.
    known = run.placements_recorded and (what.gone_until is None or bool(run.history.rearrangements()))
    acted = bool(run.history.rearrangements()) if known else None
    why = not_due(run) if acted is False else None
    return Summary(
        run=run.info,
        steps=sums.completeness(steps),
        expected_ranks=run.expected_ranks,
        present_ranks=run.present_ranks,
        lost_ranks=[],
        spreads={name: _spread(sums, name) for name in FORMULAS},
        idle_fraction=None if local else idle_fraction(*_tokens(configurations)),
        cost=_cost(sums),
        configurations=[_configuration(c, local=local) for c in configurations],
        estimates=[],
        layers=[] if local or last is None else _layers(run, configurations),
        hot_experts=[] if local or last is None else hottest(run, last)[:HOT_EXPERTS],
        hot_experts_tier="minutes",
        last_configuration_steps=None if last is None else (last.first, last.last),
        rearrangements=changes,
        pauses=[None] * len(changes),
        long_gaps=None,
        phases=[
            PhaseFigure(
                name,
                p.steps,
                p.total / p.active if p.active else None,
                idle_fraction(p.mean_tokens, p.max_tokens),
            )
            for name, p in sorted(sums.phases.items())
        ],
        timeline=[] if local else timeline_of(sums),
        layer_timeline=None,
        loss=None if local or last is None else _loss(run, last),
        duration_seconds=_duration(run, sums),
        incidents=found.found,
        unexamined_departures=len(found.unexamined),
        restless_layers=found.restless,
        searched=found.searched,
        cost_steps=[],
        acted=acted,
        contradictions=[],
        unlisted_files=run.unlisted_files,
        not_due=why,
        overdue=overdue(run, (sums.first, sums.last)) if acted is False and why is None else None,
        rollup=_rollup(run, sums, configurations, minutes, what),
    )


def _duration(run: Run, sums: MinuteTotals) -> float | None:
    """By the run's clock, which also tells when these steps were: the clocks of ranks differ."""
    first, last = run.clock.near(sums.first), run.clock.near(sums.last)
    # A clock can be set back between two sessions.
    return None if first is None or last is None or last < first else (last[0] - first[0]) / 1e9


def _rollup(
    run: Run,
    sums: MinuteTotals,
    configurations: list[ConfigurationMinutes],
    minutes: MinuteRange | None,
    what: Kept,
) -> Rollup:
    local = run.scope is Scope.LOCAL
    return Rollup(
        minutes=sums.minutes,
        first_minute=sums.first_minute,
        last_minute=sums.last_minute,
        selected=minutes is not None,
        finest=what.finest.value,
        steps_since=what.steps_since,
        loads_since=what.loads_since,
        minutes_since=what.minutes_since,
        gone_until=what.gone_until,
        step_ms=None if local else step_milliseconds(sums),
        summed=_summed(run, configurations) if local else None,
        series=[] if local else _series(sums),
    )


def step_milliseconds(sums: MinuteTotals) -> StepMilliseconds | None:
    """The times between steps; None if none is known."""
    if not sums.host_steps:
        return None
    edges = SCALES["host_ms"].edges
    found = [percentile(sums.host_histogram, edges, q, 0.0, np.inf) for q in (5, 50, 95)]
    p5, p50, p95 = (None if one is None else one.value for one in found)
    error = max((one.error for one in found if one is not None), default=None)
    return StepMilliseconds(sums.host_ms / sums.host_steps, p5, p50, p95, error)


def _spread(sums: MinuteTotals, name: str) -> Spread:
    if name in sums.spreads:
        return sums.spreads[name].spread(name)
    if name == "trtllm":
        return sums.spreads["imbalance"].spread("imbalance", -1.0)
    count = sums.spreads["balancedness"].count
    if not count:
        return NO_SPREAD
    return Spread(sums.totals[name.replace("-", "_")] / count, *[None] * 7)


def _tokens(configurations: list[ConfigurationMinutes]) -> tuple[float, float]:
    return sum(c.mean_tokens for c in configurations), sum(c.max_tokens for c in configurations)


def _cost(sums: MinuteTotals) -> RunCost:
    times = step_milliseconds(sums)
    p50, p95 = (None, None) if times is None else (times.p50, times.p95)
    return RunCost(
        CostStatus.NOT_IDENTIFIABLE, "host", NOT_MEASURED, None, None, p50, p95, None, 0, 0, 0, {}
    )  # fmt: skip


def _configuration(c: ConfigurationMinutes, *, local: bool) -> Configuration:
    return Configuration(
        c.first, c.last, c.shape.ep_size, c.shape.num_physical_experts, (), c.recorded,
        None if local or not c.active else c.total / c.active,
        None if local else idle_fraction(c.mean_tokens, c.max_tokens),
    )  # fmt: skip


def _layers(run: Run, configurations: list[ConfigurationMinutes]) -> list[LayerFigure]:
    active = np.sum([c.layer_active for c in configurations], axis=0)
    ratio = np.sum([c.layer_ratio for c in configurations], axis=0)
    inverse = np.sum([c.layer_inverse for c in configurations], axis=0)
    slowest = configurations[-1].slowest
    return [
        LayerFigure(
            number,
            float(ratio[i] / active[i]) if active[i] else None,
            float(inverse[i] / active[i]) if active[i] else None,
            *most_often(slowest[i]),
        )
        for i, number in enumerate(run.info.layers)
    ]


def _loss(run: Run, last: ConfigurationMinutes) -> Loss:
    """Which ranks and steps have it is not in the sums."""
    tokens = (last.max_tokens - last.mean_tokens) / run.info.token_replication
    share = last.lasting / last.lasting_of if last.lasting_of > 0 else None
    return Loss(tokens, share, last.window_steps, [], [])


def _summed(run: Run, configurations: list[ConfigurationMinutes]) -> SummedLoads:
    ratio = sum((c.summed_ratio for c in configurations), np.zeros(run.info.num_layers))
    steps = sum((c.summed_steps for c in configurations), np.zeros(run.info.num_layers))
    worst = configurations[-1].summed_worst if configurations else np.zeros((run.info.num_layers, 1))
    layers = [
        SummedLayer(number, float(ratio[i] / steps[i]), *most_often(worst[i]))
        for i, number in enumerate(run.info.layers)
        if steps[i] > 0
    ]
    total = float(steps.sum())
    mean, most = sum(c.mean_tokens for c in configurations), sum(c.summed_max for c in configurations)
    return SummedLoads(
        float(ratio.sum() / total) if total else None,
        idle_fraction(mean, most),
        sorted(layers, key=lambda layer: (layer.balancedness, layer.layer)),
    )


def _series(sums: MinuteTotals) -> list[tuple[float, int]]:
    minute, _, _, total, count = (np.concatenate(parts) for parts in zip(*sums.points, strict=True))
    order = np.argsort(minute, kind="stable")
    size = max(1, -(-len(order) // MAX_SERIES))
    starts = np.arange(0, len(order), size)
    sums_of_parts = (np.add.reduceat(values[order], starts) for values in (total, count))
    return [(float(t), int(n)) for t, n in zip(*sums_of_parts, strict=True) if n]


def timeline_of(sums: MinuteTotals) -> list[Bin]:
    """Balancedness in bins of equally many minutes."""
    if not sums.points:
        return []
    minute, first, last, total, count = (np.concatenate(parts) for parts in zip(*sums.points, strict=True))
    width = max(1, -(-(sums.last_minute - sums.first_minute + MINUTE_NS) // MINUTE_NS // BINS)) * MINUTE_NS
    at = (minute - sums.first_minute) // width
    bins = []
    for number in np.unique(at):
        own = at == number
        steps = int(count[own].sum())
        value = float(total[own].sum() / steps) if steps else None
        bins.append(Bin(int(first[own].min()), int(last[own].max()), value))
    return bins


def _incidents(run: Run, covered: StepRange) -> Incidents:
    """Those where steps are kept.

    In at most the newest ``SEARCHED_STEPS``, so that a long time costs no more.
    """
    first, last = run.step_range
    if first is None or last is None:
        return NOT_SEARCHED
    low, high = covered.clip(first, last + 1)
    parts = [*run.tiers.retired.outside(max(low, high - SEARCHED_STEPS), high)] if low < high else []
    if not parts:
        return NOT_SEARCHED
    found = StepRange(parts[0].first, parts[-1].end)
    sums = sums_of(run, found, bins_of(run, found))
    if not sums.seen.seen:
        return NOT_SEARCHED
    incidents = incidents_of(run, sums.balance, sums.cost, _cost(MinuteTotals(run)), found)
    everywhere = parts == [covered] and not run.tiers.retired
    if incidents.searched is None and not everywhere:
        return replace(incidents, searched=parts)
    return incidents
