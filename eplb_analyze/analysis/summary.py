"""The figures of `summary`: how balanced a run was, and whether its data is complete."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from eplb_analyze.analysis.cost import RunCost, cost_of_sample
from eplb_analyze.analysis.incident_series import incidents_of
from eplb_analyze.analysis.incidents import Incident, excess_tokens
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import LongGaps, PauseTotal
from eplb_analyze.analysis.summary_sums import (
    ESTIMATED,
    ConfigurationSums,
    LayerSums,
    SummarySums,
    bins_of,
    sums_of,
)
from eplb_analyze.errors import Finding
from eplb_analyze.json_report import Report, as_json
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import FORMULAS, Spread, idle_fraction, mean_known, most_often
from eplb_analyze.metrics.losses import Bin, RankLoss, StretchLoss, timeline
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import LostRank, lost_in
from eplb_analyze.reader.placements import Rearrangement, replicas
from eplb_analyze.reader.recorded_setting import not_due, overdue
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.text import listed, percent, plural

HOT_EXPERTS = 10
#: The mean over all layers does not show an incident of so many layers.
FEW_LAYERS = 3
WORST_STRETCHES = 10
#: So many groups of incomplete steps, by the ranks they lack, are estimated.
ESTIMATES = 5
#: Shown besides the two main figures, each under its own name.
OTHER_FORMULAS = tuple(name for name in FORMULAS if name not in ("balancedness", "imbalance"))

VerdictKind = Literal["balanced", "mostly_balanced", "imbalanced", "eplb_never_acted", "incomplete_data"]
#: A run is balanced from this mean balancedness on, and imbalanced below the other.
BALANCED, IMBALANCED = 0.95, 0.8
#: A run is imbalanced, too, if imbalance measurably costs at least this share of the step time.
COSTLY = 0.05


@dataclass(frozen=True)
class Verdict:
    """What to think of a run first; docs/cli.md lists the rules, and the first that applies decides."""

    verdict: VerdictKind
    #: The rule that gave the verdict, with the run's figures: a sentence.
    rule: str


@dataclass(frozen=True)
class LayerFigure:
    layer: int
    balancedness: float | None
    imbalance: float | None
    #: The EP rank that was the slowest of this layer most often, and in what share of the uneven steps.
    worst_rank: int | None
    worst_rank_share: float | None


@dataclass(frozen=True)
class HotExpert:
    """A logical expert and its share of its layer's tokens."""

    layer: int
    logical: int
    share: float
    times_mean: float
    replicas: int


@dataclass(frozen=True)
class Configuration:
    """Steps of one EP size, number of slots and set of serving ranks. Nothing is summed across a change."""

    first_step: int
    last_step: int
    ep_size: int
    num_physical_experts: int
    #: Ranks that died before; the figures are over the others.
    lost_ranks: tuple[int, ...]
    recorded: int
    balancedness: float | None
    idle_fraction: float | None


@dataclass(frozen=True)
class Estimate:
    """Figures of steps that lack some ranks, by the loads of the others alone.

    The ranks route similar tokens, so a part of a step's load shows its imbalance. Fewer tokens vary more, so
    it looks a little larger than it was.
    """

    missing_ranks: tuple[int, ...]
    first_step: int
    last_step: int
    steps: int
    balancedness: Spread
    imbalance: Spread
    idle_fraction: float | None


@dataclass(frozen=True)
class PhaseFigure:
    """The steps of one phase, as the engine named it."""

    phase: str
    steps: int
    balancedness: float | None
    idle_fraction: float | None


@dataclass(frozen=True)
class Loss:
    """Σ (max − mean) tokens over steps and layers, for which the other ranks waited, and its causes."""

    tokens: float
    #: The share that remains if loads are summed over ``window_steps`` steps: the most that a better
    #: placement could remove. The rest is random variation within a step. None if fewer than 96 steps were
    #: summed: chance would count as persistent.
    persistent_share: float | None
    window_steps: int
    ranks: list[RankLoss]
    #: The stretches of steps with most of the loss.
    stretches: list[StretchLoss]


@dataclass(frozen=True)
class Summary(Report):
    run: RunInfo
    steps: Completeness
    expected_ranks: list[int]
    present_ranks: list[int]
    #: The ranks that died while the engine went on: figures of the steps without them are over the others.
    lost_ranks: list[LostRank]
    spreads: dict[str, Spread]
    idle_fraction: float | None
    cost: RunCost
    configurations: list[Configuration]
    #: Of incomplete steps, the largest group first; their loads are in no other figure.
    estimates: list[Estimate]
    layers: list[LayerFigure]
    hot_experts: list[HotExpert]
    #: The steps that hot_experts and worst_rank are over: the last configuration's.
    last_configuration_steps: tuple[int, int] | None
    rearrangements: list[Rearrangement]
    #: How long each of them paused the engine; None if not known.
    pauses: list[Milliseconds | None]
    #: Long gaps between steps that no rearrangement explains; None if there is none or it is not known.
    long_gaps: LongGaps | None
    phases: list[PhaseFigure]
    timeline: list[Bin]
    #: Of the layer of the worst incident of few layers, which the mean over many layers hides: its number
    #: in the model, and its bins. None without such an incident.
    layer_timeline: tuple[int, list[Bin]] | None
    #: Of the last configuration.
    loss: Loss | None
    duration_seconds: float | None
    #: In order of steps: those that have one of these steps. First and last step are the incident's own.
    incidents: list[Incident]
    #: Departures of a layer that are smaller than these incidents, whose cause was not looked for.
    unexamined_departures: int
    #: Layers whose balance changes abruptly all the time: only much larger drops are incidents there.
    restless_layers: int
    #: Whether a placement changed in the whole run; None: not known.
    acted: bool | None
    #: How loads contradict each other or `num_tokens`, as far as their sums over ranks show it; `check` reads
    #: more.
    contradictions: list[Finding]
    #: If none changed: why no rearrangement was due yet; None: one was.
    not_due: str | None
    #: If none changed, and one was due: how many steps ran, and the interval that the engine states.
    overdue: str | None

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self)

    @property
    def lost_rank_seconds(self) -> float | None:
        """The time that ranks lost, by the measured cost; see :meth:`RunCost.rank_seconds`."""
        # A sampled step stands for those that were not sampled.
        return self.cost.rank_seconds(
            self.run.interval * sum(c.recorded * (c.ep_size - len(c.lost_ranks)) for c in self.configurations)
        )

    @property
    def pause_total(self) -> PauseTotal | None:
        """How long the rearrangements paused the engine in all; None if no pause is known."""
        return PauseTotal.of(self.pauses, self.duration_seconds)

    @property
    def missing_ranks(self) -> list[int]:
        return sorted(set(self.expected_ranks) - set(self.present_ranks))

    @property
    def layer_percentiles(self) -> dict[str, float] | None:
        """Percentiles over layers of their balancedness."""
        values = [layer.balancedness for layer in self.layers if layer.balancedness is not None]
        if not values:
            return None
        return {f"p{q}": float(np.percentile(values, q)) for q in (5, 25, 50, 75, 95)}

    def to_json(self) -> dict[str, Any]:
        run = as_json(self.run)
        run["layer_numbers"] = run.pop("layers")
        return self.document(
            {
                "run": run,
                "verdict": self.verdict,
                "steps": self.steps,
                "ranks": {
                    #: Ranks that should have written.
                    "expected": len(self.expected_ranks),
                    #: Ranks of those that wrote.
                    "present": len(set(self.expected_ranks) & set(self.present_ranks)),
                    "missing": self.missing_ranks,
                },
                "contradictions": self.contradictions,
                "lost_ranks": [lost.to_json() for lost in self.lost_ranks],
                "duration_seconds": self.duration_seconds,
                "balancedness": self.spreads["balancedness"],
                "imbalance": self.spreads["imbalance"],
                #: The means of the other formulas, by name; [Metrics](metrics.md) has them.
                "metrics": {
                    name: self.spreads[name].mean
                    for name in FORMULAS
                    if name not in ("balancedness", "imbalance")
                },
                "idle_fraction": self.idle_fraction,
                "cost": self.cost,
                #: The time that ranks lost: the cost in the measured phases × steps × interval × ranks that
                #: serve; 0 if no cost is measurable, null if it is not known.
                "lost_rank_seconds": self.lost_rank_seconds,
                "incidents": self.incidents,
                "unexamined_departures": self.unexamined_departures,
                "restless_layers": self.restless_layers,
                "configurations": self.configurations,
                "estimates": self.estimates,
                "layers": self.layers,
                "layer_percentiles": self.layer_percentiles,
                "phases": self.phases,
                "timeline": self.timeline,
                "loss": self.loss,
                "hot_experts": self.hot_experts,
                "hot_experts_steps": self.last_configuration_steps,
                "rearrangements": [r.first_step for r in self.rearrangements],
                #: How long they paused the engine in all; null if no pause is known.
                "rearrangement_pauses": self.pause_total,
                #: Gaps between steps of at least 20 times the median and 50 ms, if no rearrangement explains
                #: them; null if there is none.
                "long_gaps": self.long_gaps,
                #: The same rearrangements with the last step, the number of layers and of slots that changed,
                #: and how long each paused the engine, null if not known.
                "rearrangement_details": [
                    {
                        "first_step": r.first_step,
                        "last_step": r.last_step,
                        "layers": len(r.layers),
                        "slots_changed": r.slots_changed,
                        "pause_ms": pause,
                    }
                    for r, pause in zip(self.rearrangements, self.pauses, strict=True)
                ],
            }
        )


def summarize(run: Run, steps: tuple[int, int] | None = None) -> Summary:
    """Compute the summary of a run, or of a half-open range of its steps."""
    if steps is not None:
        run.require(steps)
    return run.retry_without_damaged(lambda: _summarize(run, steps))


def _summarize(run: Run, steps: tuple[int, int] | None) -> Summary:
    sums = sums_of(run, steps, bins_of(run, steps), bins_of(run))
    if run.phase is not None and not sums.seen.seen:
        raise run.nothing_complete(steps)
    return summary_of(sums, run, steps)


def summary_of(sums: SummarySums, run: Run, steps: tuple[int, int] | None = None) -> Summary:
    """The figures of a run; ``steps`` is the range that was asked for."""
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
        hot_experts=_hot_experts(run, stretches[-1]) if stretches else [],
        last_configuration_steps=(stretches[-1].first, stretches[-1].last) if stretches else None,
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
        acted=acted,
        contradictions=[*sums.conservation.findings_of_sums(run)],
        not_due=why,
        overdue=overdue(run, whole) if acted is False and why is None else None,
    )


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


def verdict_of(summary: Summary) -> Verdict:
    for kind, text in warnings(summary):
        if kind in ("incomplete_data", "eplb_never_acted"):
            return Verdict(kind, text)
    mean = summary.spreads["balancedness"].mean
    if mean is None:
        what = "No complete step has a token." if summary.configurations else "No step is complete."
        return Verdict("incomplete_data", what)
    share = summary.cost.share_of_step
    if summary.cost.status is CostStatus.MEASURED and share is not None and share.estimate >= COSTLY:
        cost = f"Imbalance costs {percent(share.estimate)} of step time"
        return Verdict("imbalanced", f"{cost}; {percent(COSTLY, 0)} or more is imbalanced.")
    if mean < IMBALANCED:
        return Verdict("imbalanced", f"Mean balancedness is {mean:.3f}, below {IMBALANCED}.")
    if mean < BALANCED:
        return Verdict(
            "mostly_balanced", f"Mean balancedness is {mean:.3f}, between {IMBALANCED} and {BALANCED}."
        )
    above = f"Mean balancedness is {mean:.3f}, at least {BALANCED}"
    if summary.incidents:
        count = len(summary.incidents)
        are = "is" if count == 1 else "are"
        return Verdict("mostly_balanced", f"{above}, but there {are} {plural(count, 'incident')}.")
    return Verdict("balanced", f"{above}, and there is no incident.")


def warnings(summary: Summary) -> list[tuple[VerdictKind | Literal["rank_lost"], str]]:
    """What limits or explains all figures, each with its kind: sentences, the gravest first."""
    found: list[tuple[VerdictKind | Literal["rank_lost"], str]] = []
    ranks = plural(len(summary.expected_ranks), "rank")
    if summary.missing_ranks:
        found.append(
            ("incomplete_data", f"Of {ranks}, these wrote nothing: {listed(summary.missing_ranks)}.")
        )
    elif summary.steps.lacks_much:
        found.append(("incomplete_data", f"{incomplete(summary)}."))
    for lost in summary.lost_ranks:
        first, last = lost.steps.first, lost.last_step
        steps = f"from step {first} on" if last is None else f"in steps {first}-{last}"
        found.append(
            ("rank_lost", f"rank {lost.rank} {steps}; figures of these steps cover the other ranks.")
        )
    if summary.acted is False and summary.not_due is None:
        redundant = summary.run.num_physical_experts - summary.run.num_logical_experts
        also = f" and its {plural(redundant, 'redundant expert')}" if redundant > 0 else ""
        due = f": {summary.overdue}" if summary.overdue else ""
        found.append(("eplb_never_acted", f"The placement{also} never changed{due}."))
    return found


def incomplete(summary: Summary) -> str:
    """How many steps lack a rank, and which rank."""
    steps = summary.steps
    count = plural(steps.count(StepState.INCOMPLETE), "step")
    return (
        f"{count} ({percent(steps.incomplete_share)}) are left out of all figures: {steps.why_incomplete()}"
    )
