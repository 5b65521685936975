"""The row of one run in a batch: its figures, or why it has none."""

from __future__ import annotations

from dataclasses import field, replace
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np

from eplb_analyze.analysis.findings import step_findings, summary_findings
from eplb_analyze.analysis.incidents import excess_tokens
from eplb_analyze.analysis.rearrangements import MeasuredChange, Verdict, unjudged
from eplb_analyze.analysis.summary_report import Summary
from eplb_analyze.analysis.summary_sums import SummarySums
from eplb_analyze.json_report import Report
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.metrics.series import sum_groups
from eplb_analyze.reader.run import Run
from eplb_analyze.text import iso
from eplb_dump.format.frozen import frozen

#: A row keeps a run's balancedness over time in at most this many sums, for comparisons.
MAX_SERIES = 4096

Status = Literal["complete", "incomplete", "broken"]


@frozen
class Row(Report):
    """One run of one model. A figure that is not known is None."""

    dump: str
    run_id: str
    model: str
    #: incomplete: it has figures, but data is missing or damaged; broken: it has no figures.
    status: Status
    #: Why it is not complete.
    reason: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    #: ISO 8601, UTC.
    created: str | None = None
    #: The clock times of the first and the last step, ISO 8601, UTC; None if an imported run has none.
    first_time: str | None = None
    #: The time of the last step, ISO 8601, UTC.
    last_time: str | None = None
    scope: str | None = None
    ep_size: int | None = None
    num_layers: int | None = None
    num_logical_experts: int | None = None
    num_physical_experts: int | None = None
    #: Complete steps.
    steps: int = 0
    #: Complete steps with tokens: balancedness is the mean over these.
    active_steps: int = 0
    #: Steps that some rank recorded, but that are not complete.
    incomplete_steps: int = 0
    missing_ranks: int = 0
    #: Median time from one step to the next; None also if an imported run has no times.
    step_seconds: float | None = None
    balancedness: float | None = None
    #: The 5th percentile of balancedness over steps.
    balancedness_p5: float | None = None
    idle_fraction: float | None = None
    #: Share of the loss that a better placement could remove at most.
    persistent_share: float | None = None
    #: What imbalance costs, as in `summary`: its status, ms per step and their 95% interval.
    cost_status: str | None = None
    #: Milliseconds per step that imbalance costs.
    cost_ms_per_step: float | None = None
    #: The lower end of its 95% confidence interval.
    cost_ms_low: float | None = None
    #: The upper end of its 95% confidence interval.
    cost_ms_high: float | None = None
    #: The time that ranks lost, as in `summary`.
    lost_rank_seconds: float | None = None
    #: The share of the steps that are of phases with a measured cost.
    cost_covers: float | None = None
    #: The least balanced layer.
    worst_layer: int | None = None
    #: The rank to which most of the loss is attributed, and its share of the loss.
    worst_rank: int | None = None
    worst_rank_share: float | None = None
    #: How many incidents, and the worst of them: the one with the most tokens for which ranks waited longer.
    #: None if no step is kept to look for them.
    incidents: int | None = 0
    #: The cause of the worst incident, as in `summary`.
    incident_cause: str | None = None
    #: The layer of that incident; null for a rank across layers.
    incident_layer: int | None = None
    #: The hot expert.
    incident_expert: int | None = None
    #: The first of its ranks.
    incident_rank: int | None = None
    #: Its first step.
    incident_first_step: int | None = None
    #: Its last step, included.
    incident_last_step: int | None = None
    #: ISO 8601, UTC.
    incident_since: str | None = None
    #: When it ended, ISO 8601, UTC.
    incident_until: str | None = None
    #: The highest imbalance in it.
    incident_peak_imbalance: float | None = None
    rearrangements: int = 0
    #: Rearrangements with complete steps before and after, and no change of shape.
    judged: int = 0
    #: Rearrangements that improved balancedness.
    helped: int = 0
    #: Rearrangements whose gain did not last.
    helped_at_first: int = 0
    #: Rearrangements that made balancedness worse.
    hurt: int = 0
    #: Rearrangements after which every rank holds the same experts as before.
    no_op: int = 0
    #: Codes of the errors and warnings that `check` reports.
    faults: list[str] = field(default_factory=list)
    #: The engine's configuration, by dotted names.
    config: dict[str, Any] = field(default_factory=dict)
    #: What the figures are from, as in `summary`: `steps`, or sums over `minutes` if not all steps are kept.
    tier: str | None = None
    #: (sum of balancedness, number of steps) of consecutive steps; for comparisons, not for the table.
    series: list[tuple[float, int]] = field(default_factory=list)
    #: Balancedness minus the baseline's, with its confidence interval.
    difference: float | None = None
    #: The lower end of its confidence interval.
    difference_low: float | None = None
    #: The upper end of its confidence interval.
    difference_high: float | None = None
    #: Why there is no difference although there is a baseline.
    not_compared: str | None = None

    def to_json(self) -> dict[str, Any]:
        document = super().to_json()
        del document["series"]
        return document

    @property
    def worse_than_baseline(self) -> bool:
        return self.difference_high is not None and self.difference_high < 0

    @property
    def lost(self) -> tuple[bool, float, bool, float]:
        """The sort key: rows with figures, by GPU time lost; then those not measured, by idle fraction."""
        unknown = self.lost_rank_seconds is None
        return (self.status != "broken", self.lost_rank_seconds or 0.0, unknown, self.idle_fraction or 0.0)


def broken_row(dump: str, run_id: str, model: str, reason: str) -> Row:
    return Row(dump, run_id, model, "broken", reason)


def row_of(dump: str, run: Run, sums: SummarySums | None, summary: Summary) -> Row:
    """The row of a run whose rearrangements are not judged yet.

    ``summary`` is what ``sums`` add up to, None if it is from sums per minute.
    """
    info, steps, loss = run.info, summary.steps, summary.loss
    findings = [f for f in summary_findings(run, steps) if f.severity != "info"]
    errors = [f for f in findings if f.severity == "error"]
    recorded = sum(c.recorded for c in summary.configurations)
    balance = summary.spreads["balancedness"]
    step_seconds = _step_seconds(sums, summary) if info.timed else None
    known = [layer for layer in summary.layers if layer.balancedness is not None]
    worst = min(known, key=lambda layer: layer.balancedness or 0.0) if known else None
    costliest = loss.ranks[0] if loss is not None and loss.ranks and loss.tokens else None
    cost = summary.cost.ms_per_step
    faults = {f.code for f in (*findings, *step_findings(run, steps)) if f.severity != "info"}
    span = run.clock.span
    active, series = _balancedness_over_time(sums, summary)
    return Row(
        dump=dump,
        run_id=info.run_id,
        model=info.model,
        status="broken" if not recorded else "incomplete" if errors else "complete",
        reason=errors[0].text if errors else None if recorded else "no step is complete",
        engine=info.engine,
        engine_version=info.engine_version,
        created=datetime.fromtimestamp(info.created_unix_ns / 1e9, timezone.utc).isoformat(),
        first_time=iso(span[0]) if span else None,
        last_time=iso(span[1]) if span else None,
        scope=info.scope,
        ep_size=info.ep_size,
        num_layers=info.num_layers,
        num_logical_experts=info.num_logical_experts,
        num_physical_experts=info.num_physical_experts,
        steps=recorded,
        active_steps=active,
        incomplete_steps=steps.should_be_recorded - recorded,
        missing_ranks=len(summary.missing_ranks),
        step_seconds=step_seconds,
        balancedness=balance.mean,
        balancedness_p5=balance.p5,
        idle_fraction=summary.idle_fraction,
        persistent_share=None if loss is None else loss.persistent_share,
        cost_status=summary.cost.status.value,
        cost_ms_per_step=None if cost is None else cost.estimate,
        cost_ms_low=None if cost is None else cost.low,
        cost_ms_high=None if cost is None else cost.high,
        lost_rank_seconds=summary.lost_rank_seconds,
        cost_covers=summary.cost.measured_share if cost is not None else None,
        worst_layer=None if worst is None else worst.layer,
        worst_rank=None if costliest is None else costliest.rank,
        worst_rank_share=None if costliest is None else costliest.share,
        **_worst_incident(summary),
        faults=sorted(faults),
        config=run.engine_config,
        series=series,
        tier=summary.tier,
    )


def changes_of(run: Run, sums: SummarySums | None) -> list[MeasuredChange]:
    """What the rearrangements of a run are judged by; ``sums`` as for :func:`row_of`."""
    stretches = sums.configurations if sums is not None else ()
    return unjudged(
        run,
        (
            (stretch.shape, np.concatenate(stretch.steps), np.concatenate(stretch.values))
            for stretch in stretches
            if stretch.recorded
        ),
    )


def with_verdicts(row: Row, verdicts: list[Verdict]) -> Row:
    """The row of a run whose rearrangements were judged."""
    return replace(
        row,
        rearrangements=len(verdicts),
        judged=sum(verdict not in ("not measured", "elastic") for verdict in verdicts),
        helped=verdicts.count("helped"),
        helped_at_first=verdicts.count("helped at first"),
        hurt=verdicts.count("hurt"),
        no_op=verdicts.count("no-op"),
    )


def _step_seconds(sums: SummarySums | None, summary: Summary) -> float | None:
    """The median time from one step to the next."""
    if sums is None:
        ms = None if summary.rollup is None else summary.rollup.step_ms
        return None if ms is None or ms.p50 is None else ms.p50 / 1e3
    known = np.concatenate([np.empty(0), *sums.step_ms])
    return float(np.median(known)) / 1e3 if len(known) else None


def _balancedness_over_time(
    sums: SummarySums | None, summary: Summary
) -> tuple[int, list[tuple[float, int]]]:
    """The number of steps with tokens, and a row's series."""
    if sums is None:
        series = [] if summary.rollup is None else summary.rollup.series
        return sum(count for _, count in series), series
    balances = np.concatenate(sums.values["balancedness"])
    return int(np.count_nonzero(~np.isnan(balances))), _series(balances)


def _worst_incident(summary: Summary) -> dict[str, Any]:
    """The fields of a row about incidents."""
    incidents = summary.incidents
    if not incidents:
        return {"incidents": 0 if summary.incidents_known else None}
    worst = max(incidents, key=excess_tokens)
    return {
        "incidents": len(incidents),
        "incident_cause": worst.cause.kind,
        "incident_layer": worst.layer if worst.cause.layer is None else worst.cause.layer,
        "incident_expert": worst.cause.expert,
        "incident_rank": worst.ranks[0] if worst.ranks else None,
        "incident_first_step": worst.first_step,
        "incident_last_step": worst.last_step,
        "incident_since": worst.since,
        "incident_until": worst.until,
        "incident_peak_imbalance": worst.peak_imbalance,
    }


def _series(balancedness: Float64) -> list[tuple[float, int]]:
    """Sums over consecutive steps, without those that have no balancedness (NaN)."""
    known = balancedness[~np.isnan(balancedness)]
    if not len(known):
        return []
    size = -(-len(known) // MAX_SERIES)
    counts = sum_groups(np.ones(len(known), np.int64), size)
    return list(zip(sum_groups(known, size).tolist(), counts.tolist(), strict=True))
