"""A run that is being written as metrics for Prometheus: names, units and values, without its client.

:data:`METRICS` says which there are. A rank has at most :data:`MOST_SERIES` series, however many layers and
experts the model has: the worst layer and the worst rank are values, not labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.json_report import RunReport
from eplb_analyze.live.alerts import Alert
from eplb_analyze.live.snapshot import LayerSnapshot, RankSnapshot, Snapshot
from eplb_analyze.live.totals import Totals
from eplb_analyze.metrics.cost import CostStatus
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import STATUS_LABELS

#: The promise of docs/operate/metrics.md.
MOST_SERIES = 20
#: Without new data for so long, figures about balance are not of now, and are left out.
CURRENT_SECONDS = 60.0

Kind = Literal["counter", "gauge", "summary"]


@frozen
class Sample:
    """One series and its value."""

    #: By name.
    labels: dict[str, str]
    #: The value; of a summary, the sum.
    value: float
    #: How many values are in the sum; null unless it is a summary.
    count: int | None = None


@frozen
class Family:
    """A metric and its series."""

    #: As Prometheus has it; of a summary without `_sum` and `_count`.
    name: str
    #: Prometheus' type of the metric.
    kind: Kind
    #: What it is, in a sentence.
    help: str
    #: Empty if it is not known now.
    samples: list[Sample] = field(default_factory=list)


@frozen
class MetricsReport(RunReport):
    """All metrics of a run at one moment: the report of `serve-metrics --once`."""

    #: All metrics, also those without a value now.
    families: list[Family]


#: Of each rank: type and help by name. All have the label `rank`; `eplb_recorder_steps_total` has `outcome`.
RANK_METRICS: dict[str, tuple[Kind, str]] = {
    "eplb_recorder_steps_total": ("counter", "Steps that the rank's writer saw, by what became of them."),
    "eplb_recorder_sessions_total": ("counter", "Writers of the rank that began: one more after a restart."),
    "eplb_recorder_last_step_timestamp_seconds": (
        "gauge",
        "Time of the rank's newest step by its host's clock; the journal's age is time() less this.",
    ),
    "eplb_recorder_behind_steps": ("gauge", "Steps that the rank is behind the rank with the newest step."),
    "eplb_recorder_stopped": (
        "gauge",
        "1 if the rank's recording stopped although other ranks' continues, else 0.",
    ),
    "eplb_recorder_closed": ("gauge", "1 if the rank's writer was closed, else 0."),
    "eplb_recorder_disk_bytes": ("gauge", "Bytes of the rank's files of this run."),
    "eplb_rank_load_ratio": ("gauge", "The rank's tokens divided by the mean over ranks, last 10 s."),
    "eplb_rank_slowest_ratio": (
        "gauge",
        "Share of steps and layers in which the others waited for this rank, last 10 s.",
    ),
    "eplb_rank_excess_ratio": (
        "gauge",
        "Share of all waiting that was for this rank, in tokens, last 10 s.",
    ),
}
#: Of the run: type and help by name.
RUN_METRICS: dict[str, tuple[Kind, str]] = {
    "eplb_run_info": ("gauge", "1; the labels are the run's id, its model and its scope."),
    "eplb_run_closed": ("gauge", "1 if all writers of the run were closed, else 0."),
    "eplb_runs_total": ("counter", "Runs that were followed, one after another."),
    "eplb_ep_ranks": ("gauge", "EP ranks of the engine, the expert-parallel size."),
    "eplb_lost_ranks": ("gauge", "Ranks that the engine continues without."),
    "eplb_newest_step": ("gauge", "Number of the newest step that a rank wrote."),
    "eplb_complete_steps_total": ("counter", "Steps that all ranks recorded."),
    "eplb_incomplete_steps": ("gauge", "Steps of the window that will never be complete."),
    "eplb_step_balancedness_ratio": (
        "summary",
        "Balancedness of complete steps (mean over layers of mean / max over ranks), 1 is perfect.",
    ),
    "eplb_step_imbalance_ratio": (
        "summary",
        "Imbalance of complete steps (mean over layers of max / mean over ranks), 1 is perfect.",
    ),
    "eplb_mean_rank_tokens_total": (
        "counter",
        "Tokens of the mean rank, over complete steps and layers.",
    ),
    "eplb_max_rank_tokens_total": (
        "counter",
        "Tokens of the slowest rank, over complete steps and layers.",
    ),
    "eplb_balancedness_ratio": ("gauge", "Balancedness, last 10 s."),
    "eplb_idle_ratio": (
        "gauge",
        "Share of rank time lost if time is proportional to tokens, last 10 s.",
    ),
    "eplb_worst_layer": ("gauge", "Number of the layer with the lowest balancedness, last 10 s."),
    "eplb_worst_layer_balancedness_ratio": ("gauge", "Balancedness of that layer, last 10 s."),
    "eplb_worst_rank": ("gauge", "Number of the rank that the others waited for most, last 10 s."),
    "eplb_worst_rank_excess_ratio": ("gauge", "Share of all waiting that was for that rank, last 10 s."),
    "eplb_imbalance_cost_measurable": (
        "gauge",
        "1 if the newest step times show what imbalance costs, or that it costs nothing; else 0.",
    ),
    "eplb_imbalance_cost_seconds": (
        "gauge",
        "What perfect balance of the same tokens would save of each step; absent if not measurable.",
    ),
    "eplb_imbalance_cost_low_seconds": ("gauge", "Lower end of its 95% interval."),
    "eplb_imbalance_cost_high_seconds": ("gauge", "Upper end of its 95% interval."),
    "eplb_imbalance_cost_ratio": ("gauge", "The cost as a share of the mean step time."),
    "eplb_incidents_total": ("counter", "Incidents that began."),
    "eplb_incidents_active": ("gauge", "Incidents in progress."),
    "eplb_incident_layer": (
        "gauge",
        "Layer of the worst incident in progress; -1 if several layers depart together.",
    ),
    "eplb_incident_rank": (
        "gauge",
        "Rank with the most tokens above usual in that incident; -1 if it changes from step to step.",
    ),
    "eplb_incident_imbalance_ratio": ("gauge", "Peak imbalance of that incident, max / mean over ranks."),
    "eplb_incident_usual_imbalance_ratio": ("gauge", "Usual imbalance of the same layer."),
    "eplb_rearrangements_total": ("counter", "Rearrangements of the placement."),
    "eplb_rearrangement_pause_seconds": (
        "summary",
        "How long rearrangements paused the engine, of those whose pause is known.",
    ),
    "eplb_damaged_files": ("gauge", "Files and sessions of the run that could not be read."),
}
#: Of the sidecar itself.
SIDECAR_METRICS: dict[str, tuple[Kind, str]] = {
    "eplb_sidecar_following": ("gauge", "1 if there is a run and it could be read, else 0."),
    "eplb_sidecar_last_look_timestamp_seconds": ("gauge", "Time at which the run was last read."),
    "eplb_sidecar_look_seconds": ("summary", "How long reading took."),
    "eplb_sidecar_errors_total": ("counter", "Attempts to read that failed."),
}
METRICS = {**RANK_METRICS, **RUN_METRICS, **SIDECAR_METRICS}


@frozen
class SidecarState:
    """What a sidecar knows beside the run.

    Attributes:
        look: None if there is no run, or it could not be read.
        cost: of the newest steps; None if not computed yet.
        disk_bytes: by rank.
        looks, look_seconds, errors: of reading, so far.
    """

    totals: Totals
    look: Snapshot | None = None
    cost: RunCost | None = None
    disk_bytes: dict[int, int] = field(default_factory=dict)
    looked_at: float | None = None
    looks: int = 0
    look_seconds: float = 0.0
    errors: int = 0


def families(state: SidecarState) -> list[Family]:
    """All metrics, in the order of :data:`METRICS`."""
    found: dict[str, list[Sample]] = {}
    for name, sample in _samples(state):
        found.setdefault(name, []).append(sample)
    return [Family(name, kind, text, found.pop(name, [])) for name, (kind, text) in METRICS.items()]


Named = tuple[str, Sample]


def _samples(state: SidecarState) -> Iterator[Named]:
    look, totals = state.look, state.totals
    yield from _ranks(state)
    yield _one("eplb_runs_total", totals.runs)
    yield _one("eplb_complete_steps_total", totals.complete_steps)
    yield _sum("eplb_step_balancedness_ratio", totals.balancedness.total, totals.balancedness.count)
    yield _sum("eplb_step_imbalance_ratio", totals.imbalance.total, totals.imbalance.count)
    yield _one("eplb_mean_rank_tokens_total", totals.mean_tokens)
    yield _one("eplb_max_rank_tokens_total", totals.max_tokens)
    yield _one("eplb_incidents_total", totals.incidents)
    yield _one("eplb_rearrangements_total", totals.rearrangements)
    yield _sum("eplb_rearrangement_pause_seconds", totals.pauses.total, totals.pauses.count)
    if look is not None:
        yield from _run(look)
        if is_current(look):
            yield from _balance(look)
            yield from _cost(state.cost)
        yield from _incident([alert for alert in look.alerts if alert.lasts and is_current(look)])
    yield _one("eplb_sidecar_following", look is not None)
    if state.looked_at is not None:
        yield _one("eplb_sidecar_last_look_timestamp_seconds", state.looked_at)
    yield _sum("eplb_sidecar_look_seconds", state.look_seconds, state.looks)
    yield _one("eplb_sidecar_errors_total", state.errors)


def is_current(look: Snapshot) -> bool:
    """Whether the run's newest steps are of now."""
    quiet = look.quiet_seconds
    return not look.closed and look.current and quiet is not None and quiet <= CURRENT_SECONDS


def _one(name: str, value: float, **labels: str) -> Named:
    return name, Sample(labels, float(value))


def _sum(name: str, value: float, count: int) -> Named:
    return name, Sample({}, value, count)


def _ranks(state: SidecarState) -> Iterator[Named]:
    for number, totals in sorted(state.totals.ranks.items()):
        for status, rows in totals.rows.items():
            outcome = STATUS_LABELS[status]
            yield _one("eplb_recorder_steps_total", rows, rank=str(number), outcome=outcome)
        yield _one("eplb_recorder_sessions_total", totals.sessions, rank=str(number))
    look = state.look
    for writer in [] if look is None else look.writers:
        rank = str(writer.rank)
        if writer.last_step is not None and writer.rank in state.totals.ranks:
            newest_ns = state.totals.ranks[writer.rank].newest_ns
            yield _one("eplb_recorder_last_step_timestamp_seconds", newest_ns / 1e9, rank=rank)
        if writer.behind is not None:
            yield _one("eplb_recorder_behind_steps", writer.behind, rank=rank)
        yield _one("eplb_recorder_stopped", writer.stopped, rank=rank)
        yield _one("eplb_recorder_closed", writer.closed, rank=rank)
    for number, size in sorted(state.disk_bytes.items()):
        yield _one("eplb_recorder_disk_bytes", size, rank=str(number))
    if look is not None and is_current(look) and look.recent is not None:
        for one in look.recent.ranks:
            for name, value in (
                ("eplb_rank_load_ratio", one.times_mean),
                ("eplb_rank_slowest_ratio", one.slowest_share),
                ("eplb_rank_excess_ratio", one.excess_share),
            ):
                if value is not None:
                    yield _one(name, value, rank=str(one.rank))


def _run(look: Snapshot) -> Iterator[Named]:
    yield _one("eplb_run_info", 1, run=look.run_id, model=look.model, scope=look.scope)
    yield _one("eplb_run_closed", look.closed)
    yield _one("eplb_ep_ranks", look.ep_size)
    yield _one("eplb_lost_ranks", sum(writer.lost for writer in look.writers))
    if look.newest_step is not None:
        yield _one("eplb_newest_step", look.newest_step)
    yield _one("eplb_incomplete_steps", look.incomplete)
    yield _one("eplb_damaged_files", len(look.findings))


def _balance(look: Snapshot) -> Iterator[Named]:
    recent = look.recent
    if recent is None:
        return
    if recent.balancedness is not None:
        yield _one("eplb_balancedness_ratio", recent.balancedness)
    if recent.idle_fraction is not None:
        yield _one("eplb_idle_ratio", recent.idle_fraction)
    layer = min(recent.layers, key=_layer_order, default=None)
    if layer is not None and layer.balancedness is not None:
        yield _one("eplb_worst_layer", layer.layer)
        yield _one("eplb_worst_layer_balancedness_ratio", layer.balancedness)
    rank = max(recent.ranks, key=_rank_order, default=None)
    if rank is not None and rank.excess_share is not None:
        yield _one("eplb_worst_rank", rank.rank)
        yield _one("eplb_worst_rank_excess_ratio", rank.excess_share)


def _layer_order(layer: LayerSnapshot) -> float:
    return 2.0 if layer.balancedness is None else layer.balancedness


def _rank_order(rank: RankSnapshot) -> float:
    return -1.0 if rank.excess_share is None else rank.excess_share


def _cost(cost: RunCost | None) -> Iterator[Named]:
    if cost is None:
        return
    known = cost.status in (CostStatus.MEASURED, CostStatus.NO_MEASURABLE_COST)
    yield _one("eplb_imbalance_cost_measurable", known)
    if not known or cost.ms_per_step is None or cost.share_of_step is None:
        return
    # Without a measurable cost the answer is 0 and how large it can be at most.
    measured = cost.status is CostStatus.MEASURED
    ms = cost.ms_per_step
    yield _one("eplb_imbalance_cost_seconds", ms.estimate / 1e3 if measured else 0.0)
    yield _one("eplb_imbalance_cost_low_seconds", ms.low / 1e3 if measured else 0.0)
    yield _one("eplb_imbalance_cost_high_seconds", ms.high / 1e3)
    yield _one("eplb_imbalance_cost_ratio", cost.share_of_step.estimate if measured else 0.0)


def _incident(alerts: list[Alert]) -> Iterator[Named]:
    yield _one("eplb_incidents_active", len(alerts))
    if alerts:
        worst = max(alerts, key=lambda alert: alert.peak_imbalance)
        yield _one("eplb_incident_layer", -1 if worst.layer is None else worst.layer)
        yield _one("eplb_incident_rank", worst.ranks[0] if worst.ranks else -1)
        yield _one("eplb_incident_imbalance_ratio", worst.peak_imbalance)
        yield _one("eplb_incident_usual_imbalance_ratio", worst.usual_imbalance)
