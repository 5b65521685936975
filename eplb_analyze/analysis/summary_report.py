"""What `summary` reports: figures, what they are from, and the verdict by documented rules."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.layer_report import HotExpert
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import LongGaps, PauseTotal
from eplb_analyze.errors import Finding
from eplb_analyze.json_report import Report, as_json
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import FORMULAS, Spread
from eplb_analyze.metrics.losses import Bin, RankLoss, StretchLoss
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import LostRank
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import iso, listed, percent, plural
from eplb_dump.format.frozen import frozen

HOT_EXPERTS = 10
#: Shown besides the two main figures, each under its own name.
OTHER_FORMULAS = tuple(name for name in FORMULAS if name not in ("balancedness", "imbalance"))

VerdictKind = Literal[
    "balanced", "mostly_balanced", "imbalanced", "eplb_never_acted", "incomplete_data", "not_known"
]
#: A run is balanced from this mean balancedness on, and imbalanced below the other.
BALANCED, IMBALANCED = 0.95, 0.8
#: A run is imbalanced, too, if imbalance measurably costs at least this share of the step time.
COSTLY = 0.05


@frozen
class Verdict:
    """What to think of a run first; docs/cli.md lists the rules, and the first that applies decides."""

    verdict: VerdictKind
    #: The rule that gave the verdict, with the run's figures: a sentence.
    rule: str


@frozen
class LayerFigure:
    layer: int
    balancedness: float | None
    imbalance: float | None
    #: The EP rank that was the slowest of this layer most often, and in what share of the uneven steps.
    worst_rank: int | None
    worst_rank_share: float | None


@frozen
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


@frozen
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


@frozen
class PhaseFigure:
    """The steps of one phase, as the engine named it."""

    phase: str
    steps: int
    balancedness: float | None
    idle_fraction: float | None


@frozen
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


@frozen
class StepMilliseconds:
    """The time from one step to the next by the writer's clock, in ms; it includes waiting for requests."""

    mean: float
    #: null if it is outside of the histogram, 0.05 ms to 0.86 s.
    p5: float | None
    p50: float | None
    p95: float | None
    #: The most that a percentile can be wrong.
    percentile_error: float | None


@frozen
class SummedLayer:
    """A layer's loads summed per minute."""

    layer: int
    balancedness: float
    #: The EP rank with the most tokens in most minutes, and in what share of them, weighted by steps.
    worst_rank: int | None
    worst_rank_share: float | None


@frozen
class SummedLoads:
    """Imbalance of loads that are summed per minute: all that sums of single ranks show.

    Tokens that go to one rank in one step and to another in the next cancel out: only persistent imbalance
    is left.
    """

    #: Mean over active layers, minutes and placements, weighted by steps, of mean / max over ranks. In each,
    #: an upper bound of the balancedness of steps that are weighted by their max.
    balancedness: float | None
    #: The idle fraction of these loads, which that of the steps cannot be below.
    idle_at_least: float | None
    #: The least balanced first.
    layers: list[SummedLayer]


@frozen
class Rollup(Report):
    """That figures are from sums per minute, of which minutes, and what is kept of the run.

    Times are ns since 1970 here, and texts in JSON.
    """

    minutes: int
    first_minute: int
    last_minute: int
    selected: bool
    finest: str
    steps_since: int | None
    loads_since: int | None
    minutes_since: int | None
    gone_until: int | None
    step_ms: StepMilliseconds | None
    summed: SummedLoads | None
    #: (sum of balancedness, number of steps) of consecutive minutes, for comparisons of runs.
    series: list[tuple[float, int]]

    def to_json(self) -> dict[str, Any]:
        return self.document(
            {
                #: The number of clock minutes with a complete step.
                "minutes": self.minutes,
                #: When the first minute began that figures are over, ISO 8601, UTC.
                "first_minute": iso(self.first_minute),
                #: When the last one began, which is included.
                "last_minute": iso(self.last_minute),
                #: Whether only some minutes were asked for; they are whole ones.
                "selected": self.selected,
                #: The most that is kept of any step: `full`, `ranks` (tokens per EP rank) or `minutes`.
                "finest": self.finest,
                #: All steps of the run after this time are kept, at least as tokens per EP rank; null: no
                #: step is, or all are.
                "steps_since": iso(self.steps_since),
                #: Experts' loads of all steps after this time are kept; null: of no step, or of all.
                "loads_since": iso(self.loads_since),
                #: The time from which sums per minute are kept in place of steps; null: nowhere.
                "minutes_since": iso(self.minutes_since),
                #: Nothing is kept of some steps before this time; null: something is kept of each.
                "gone_until": iso(self.gone_until),
                #: null with scope local.
                "step_ms": self.step_ms,
                #: With scope local only, because sums of single ranks do not show the balancedness of steps.
                "summed": self.summed,
            }
        )


@frozen
class Summary(Report):
    """The verdict on a run, the cost of imbalance, the incidents, and the figures behind them."""

    run: RunInfo
    steps: Completeness
    expected_ranks: list[int]
    present_ranks: list[int]
    #: The ranks that died while the engine continued: figures of the steps without them are over the others.
    lost_ranks: list[LostRank]
    spreads: dict[str, Spread]
    idle_fraction: float | None
    cost: RunCost
    configurations: list[Configuration]
    #: Estimates from incomplete steps, the largest group first. No other figure includes their loads.
    estimates: list[Estimate]
    layers: list[LayerFigure]
    hot_experts: list[HotExpert]
    #: What hot_experts are from: experts' loads, or the slots that sums per minute name.
    hot_experts_tier: Literal["full", "minutes"]
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
    #: The loss in the last configuration.
    loss: Loss | None
    duration_seconds: float | None
    #: In order of steps: those that have one of these steps. First and last step are the incident's own.
    incidents: list[Incident]
    #: Departures of a layer that are smaller than these incidents, whose cause was not searched for.
    unexamined_departures: int
    #: Layers whose balance changes abruptly all the time: only much larger drops are incidents there.
    restless_layers: int
    #: The stretches of steps in which incidents were looked for, as steps are kept there. None: all steps;
    #: empty: nowhere, and incidents are not known.
    searched: list[StepRange] | None
    #: The ranges in which the cost was measured, because experts' loads are kept there. None: all steps.
    cost_steps: list[StepRange] | None
    #: Whether a placement changed in the whole run; None: not known.
    acted: bool | None
    #: How loads contradict each other or `num_tokens`, as far as their sums over ranks show it; `check` reads
    #: more.
    contradictions: list[Finding]
    #: Sealed files that are left out, because the manifest of their session is damaged and does not list
    #: them. How many steps they have is not known.
    unlisted_files: int
    #: If none changed: why no rearrangement was due yet; None: one was.
    not_due: str | None
    #: If none changed, and one was due: how many steps ran, and the interval that the engine states.
    overdue: str | None
    #: If its figures are from sums per minute; None if they are from steps.
    rollup: Rollup | None = None

    @property
    def tier(self) -> Literal["steps", "minutes"]:
        """Whether the figures come from steps, or from sums per minute where steps are no longer kept."""
        return "steps" if self.rollup is None else "minutes"

    @property
    def verdict(self) -> Verdict:
        """The verdict on the run, and the rule that it follows from."""
        return verdict_of(self)

    @property
    def incidents_known(self) -> bool:
        """Whether incidents were looked for anywhere."""
        return bool(self.incidents) or self.searched is None or bool(self.searched)

    @property
    def lost_rank_seconds(self) -> float | None:
        """The time that ranks lost, by the measured cost; see :meth:`RunCost.rank_seconds`."""
        # Experts' loads are kept longer of what is notable, so those steps do not stand for the others.
        if self.cost_steps is not None:
            return None
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
        """The ranks that should have recorded, and did not."""
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
                #: The source of the figures: `steps`, or sums over `minutes`.
                "tier": self.tier,
                "rollup": self.rollup,
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
                "unlisted_files": self.unlisted_files,
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
                #: The incidents; null if they are not known.
                "incidents": self.incidents if self.incidents_known else None,
                #: The first and last step of each range that was searched for incidents, because steps are
                #: kept there; null: all steps.
                "searched": _both_included(self.searched),
                #: The same ranges for the cost, where experts' loads are kept; null: all steps.
                "cost_steps": _both_included(self.cost_steps),
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
                #: `full`: experts' loads. `minutes`: the four slots of each layer that each minute names.
                #: Then these experts had at least such a share, and more than the mean, and others can have
                #: had as much.
                "hot_experts_tier": self.hot_experts_tier,
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


def _both_included(stretches: list[StepRange] | None) -> list[tuple[int, int]] | None:
    """Their first and last steps."""
    return None if stretches is None else [(part.first, part.end - 1) for part in stretches]


def verdict_of(summary: Summary) -> Verdict:
    for kind, text in warnings(summary):
        if kind in ("incomplete_data", "eplb_never_acted"):
            return Verdict(kind, text)
    if summary.rollup is not None and summary.rollup.summed is not None:
        return _of_summed(summary.rollup.summed)
    mean = summary.spreads["balancedness"].mean
    if mean is None:
        what = "No complete step has a token." if summary.configurations else "No step is complete."
        return Verdict("incomplete_data", what)
    share = summary.cost.share_of_step
    whole = summary.cost_steps is None
    if (
        whole
        and summary.cost.status is CostStatus.MEASURED
        and share is not None
        and share.estimate >= COSTLY
    ):
        cost = f"Imbalance costs {percent(share.estimate)} of step time"
        return Verdict("imbalanced", f"{cost}; {percent(COSTLY, 0)} or more is imbalanced.")
    if mean < IMBALANCED:
        return Verdict("imbalanced", f"Mean balancedness is {mean:.3f}, below {IMBALANCED}.")
    if mean < BALANCED:
        return Verdict(
            "mostly_balanced", f"Mean balancedness is {mean:.3f}, between {IMBALANCED} and {BALANCED}."
        )
    above = f"Mean balancedness is {mean:.3f}, at least {BALANCED}"
    if summary.rollup is not None:
        return Verdict("mostly_balanced", f"{above}; sums per minute show no incidents and no cost.")
    if summary.incidents:
        count = len(summary.incidents)
        are = "is" if count == 1 else "are"
        return Verdict("mostly_balanced", f"{above}, but there {are} {plural(count, 'incident')}.")
    if not whole:
        return Verdict("mostly_balanced", f"{above}; incidents were not looked for in all steps.")
    return Verdict("balanced", f"{above}, and there is no incident.")


def _of_summed(summed: SummedLoads) -> Verdict:
    """The verdict if only loads summed per minute are known, which do not show what varies between steps."""
    if summed.balancedness is None:
        return Verdict("incomplete_data", "No minute is complete, or none has a token.")
    figure = f"Balancedness of loads summed per minute is {summed.balancedness:.3f}"
    if summed.balancedness < IMBALANCED:
        return Verdict("imbalanced", f"{figure}, below {IMBALANCED}.")
    return Verdict("not_known", f"{figure}; how much steps vary around that is not known.")


def left_out_files(summary: Summary) -> str:
    """Say that files are left out because no manifest lists them; there must be some."""
    count = summary.unlisted_files
    return f"{plural(count, 'file')} that no manifest lists {'is' if count == 1 else 'are'} left out"


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
    elif summary.unlisted_files:
        found.append(("incomplete_data", f"{left_out_files(summary)}."))
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
