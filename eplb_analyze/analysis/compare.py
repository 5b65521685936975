"""The figures of `compare`: whether B is better than A, by how much, and which layers and experts differ.

A and B are two runs, or two phases or ranges of steps of one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from typing import Any, Final, Literal

import numpy as np

from eplb_analyze.analysis.compare_experts import ExpertDifference, ExpertSums, expert_differences
from eplb_analyze.analysis.cost import TIMES, RunCost, cost_of, cost_of_sample, step_times
from eplb_analyze.analysis.cost_sample import CostSample, Sampling
from eplb_analyze.analysis.incident_series import BalanceValues, incidents_of, looked_at, steps_per_value
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.errors import UsageError
from eplb_analyze.json_report import Report
from eplb_analyze.metrics import bootstrap, formulas
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, Ratio
from eplb_analyze.metrics.series import BoundedSeries
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.lost import serving
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape

#: Runs whose mean tokens per step differ by more than this factor have different workloads.
TOKEN_FACTOR = 1.25
#: Routing that differs by less is the same workload, whatever the runs' own drift.
SMALL_DISTANCE = 0.05
#: The terms of one step and layer, of whose sums the figures are ratios: columns of ``_Reading.terms``.
RATIO, ACTIVE, MEAN, MAXIMUM = range(4)

#: Differences of the idle fraction up to which they are negligible, slight, moderate.
NEGLIGIBLE, SLIGHT, MODERATE = 0.002, 0.02, 0.1

NO_DIFFERENCE: Final = "no significant difference"
Verdict = Literal["better", "worse", "no significant difference", "not comparable"]
Size = Literal["negligible", "slight", "moderate", "large"]


@frozen
class Difference:
    """A figure of both runs, and B − A with its confidence interval; None if it is not known."""

    #: The figure of A.
    a: float | None
    #: The figure of B.
    b: float | None
    #: B less A.
    difference: float | None
    low: float | None
    high: float | None
    #: Whether B is better than A, by what the figure means.
    verdict: Verdict | None

    @classmethod
    def of(cls, a: float | None, b: float | None, interval: Interval | None, better: int) -> Difference:
        if interval is None:
            return cls(a, b, None, None, None, None)
        verdict: Verdict = NO_DIFFERENCE
        if interval.is_significant:
            verdict = "better" if interval.value * better > 0 else "worse"
        return cls(a, b, interval.value, interval.low, interval.high, verdict)


@frozen
class LayerDifference:
    layer: int
    #: The layer's share of the difference in idle fraction. The parts of all layers add up to 1; a layer in
    #: which the difference goes the other way has a part below 0. None if the idle fractions do not differ.
    part: float | None
    balancedness: Difference
    idle_fraction: Difference


@frozen
class StepTime:
    """The step time of a phase, and how much of its difference imbalance explains."""

    phase: str
    #: ms, the mean over steps without idle gaps and pauses.
    step_ms: Difference
    #: B's imbalance less A's at the price that was measured, in whichever run is more certain of it.
    imbalance_ms: Milliseconds | None


@frozen
class Side(Report):
    """A or B."""

    info: RunInfo
    #: The only phase whose steps count; null: all of them.
    phase: str | None
    steps: Completeness
    #: Mean tokens routed per layer and step: tokens × top-k.
    tokens_per_step: float | None
    #: The number of rearrangements between two of these steps.
    rearrangements: int
    #: In order of steps: those that have one of these steps. First and last step are the incident's own.
    incidents: list[Incident]
    #: The first and last step of each range that was searched for incidents, because steps are kept there;
    #: null: all steps, empty: none.
    searched: list[tuple[int, int]] | None

    def to_json(self) -> dict[str, Any]:
        names = ["run_id", "model", "engine", "engine_version", "ep_size", "num_layers"]
        names += ["num_logical_experts", "num_physical_experts"]
        info = {name: getattr(self.info, name) for name in names}
        known = {} if self.searched != [] else {"incidents": None}
        return info | {name: value for name, value in super().to_json().items() if name != "info"} | known


@frozen
class Routing:
    """Distance of the experts' shares, a mean over layers in 0 … 1; and of the halves of each run."""

    #: How far apart the shares of experts in A and in B are: 0 equal, 1 disjoint.
    distance: float | None
    #: The same between the two halves of A.
    within_a: float | None
    #: The same between the two halves of B.
    within_b: float | None


@frozen
class Setting:
    """A setting that differs."""

    name: str
    #: The value in A.
    a: Any
    #: The value in B.
    b: Any


@frozen
class Comparison(Report):
    """How much better or worse run B is than run A, whether by chance, and what is behind it."""

    #: Why they are not comparable; and if they are, what limits the comparison.
    reasons: list[str]
    #: What limits the comparison.
    warnings: list[str]
    #: By the idle fraction.
    verdict: Verdict
    #: How large a significant difference is.
    size: Size | None
    confidence: float = field(default=bootstrap.CONFIDENCE, init=False)
    #: The baseline.
    a: Side
    #: What is judged.
    b: Side
    balancedness: Difference | None
    idle_fraction: Difference | None
    #: Step times of the phases that both have; empty if there are none, or their times are not known.
    step_times: list[StepTime]
    #: Why imbalance explains nothing of the step times.
    unexplained: str | None
    layers: list[LayerDifference]
    #: The experts that explain the layers' differences, those of the layer with the largest part first.
    experts: list[ExpertDifference]
    #: Tokens per step of B divided by those of A.
    token_ratio: float | None
    #: How different the routing is.
    routing: Routing
    #: Settings of the runs and their engines that differ.
    settings: list[Setting]

    @property
    def comparable(self) -> bool:
        """Whether nothing rules out a comparison; otherwise ``reasons`` says what."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        return {"comparable": self.comparable} | super().to_json()


def compare_runs(
    a: Run,
    b: Run,
    steps: tuple[int, int] | None = None,
    *,
    steps_a: tuple[int, int] | None = None,
    steps_b: tuple[int, int] | None = None,
) -> Comparison:
    """Compare two runs, or ranges of their steps: is B better than A?

    Args:
        a: the baseline: a run with all phases, or one phase of it (:meth:`Run.of_phase`).
        b: the run to compare with it, likewise.
        steps: a half-open range of steps of both.
        steps_a: another range for A.
        steps_b: another range for B.

    Raises:
        NotInDumpError: a run has no step in its range.
        UsageError: A and B have steps of the same run in common.
    """
    ranges = StepRange.of(steps_a or steps), StepRange.of(steps_b or steps)
    _require_apart(a, b, *ranges)
    sides = (a, ranges[0]), (b, ranges[1])
    # Tokens are those of all these steps, so their times have to be, too.
    by_rank = any(run.tiers.by_rank.overlaps(*own) for run, own in sides)
    one, other = (_read(run, own, with_loads=not by_rank) for run, own in sides)
    reasons = [*_reasons(one, other)]
    if reasons:
        nothing = Routing(None, None, None)
        return Comparison(
            reasons, [], "not comparable", None, one.side(), other.side(), None, None, [], None, [], [], None,
            nothing, _settings(a, b),
        )  # fmt: skip
    tokens = one.side().tokens_per_step, other.side().tokens_per_step
    token_ratio = tokens[1] / tokens[0] if tokens[0] and tokens[1] else None
    routing = _routing(one.experts.tokens, other.experts.tokens)
    *figures, (balancedness, idle) = [
        _differences(one.terms[:, i], other.terms[:, i]) for i in range(a.info.num_layers + 1)
    ]
    parts = _parts(one, other)
    order = sorted(range(len(figures)), key=lambda i: -parts[i])
    ratios = other.max_over_mean - one.max_over_mean
    explained = [
        (i, a.info.layers[i], float(ratios[i])) for i in order if figures[i][1].verdict in ("better", "worse")
    ]
    times = _step_times(one, other)
    differs = bool(idle.difference) and abs(idle.difference or 0.0) > bootstrap.ROUNDING
    return Comparison(
        reasons=[],
        warnings=[*_warnings(one, other, token_ratio, routing)],
        verdict=idle.verdict or NO_DIFFERENCE,
        size=_size(idle),
        a=one.side(),
        b=other.side(),
        balancedness=balancedness,
        idle_fraction=idle,
        step_times=times,
        unexplained=None if any(row.imbalance_ms for row in times) else _unexplained(one, other),
        layers=[
            LayerDifference(layer, float(part) if differs else None, *pair)
            for layer, part, pair in zip(a.info.layers, parts, figures, strict=True)
        ],
        experts=expert_differences(one.experts, other.experts, explained, (a.info.ep_size, b.info.ep_size)),
        token_ratio=token_ratio,
        routing=routing,
        settings=_settings(a, b),
    )


def _require_apart(a: Run, b: Run, steps_a: StepRange, steps_b: StepRange) -> None:
    """Steps that are in both say nothing of a difference. Raises UsageError."""
    if a.phase is not None and b.phase is not None and a.phase != b.phase:
        return
    same = (a.info.run_id, a.info.model) == (b.info.run_id, b.info.model) and str(a.path) == str(b.path)
    both = steps_a.clip(*steps_b)
    if same and both.first < both.end:
        raise UsageError(
            "A and B share steps of the same run; choose another run (--run-b), ranges that do not "
            "overlap (--steps-a, --steps-b), or two phases (--phase-a, --phase-b)"
        )


def _size(idle: Difference) -> Size | None:
    if idle.verdict not in ("better", "worse") or idle.difference is None:
        return None
    sizes: list[tuple[float, Size]] = [(NEGLIGIBLE, "negligible"), (SLIGHT, "slight"), (MODERATE, "moderate")]
    return next((name for most, name in sizes if abs(idle.difference) < most), "large")


def _parts(a: _Reading, b: _Reading) -> formulas.Float64:
    """Each layer's part of the difference of the idle fraction: float64 ``[layers]``, 1 in sum.

    The idle fraction is x / (1 + x) of a sum over layers, x = Σ (max − mean) / Σ mean. By these summands, a
    layer that did not change has no part, however much another one did.
    """
    difference = b.lost_by_layer - a.lost_by_layer
    total = difference.sum()
    return difference / total if total else np.zeros(len(difference))


def _read(run: Run, steps: StepRange, *, with_loads: bool) -> _Reading:
    if steps != StepRange():
        run.require(steps)
    return run.retry_without_damaged(lambda: _Reading(run.estimated(steps), steps, with_loads=with_loads))


class _Reading:
    """The sums of one pass over a run.

    Attributes:
        terms: float64 ``[rows, layers + 1, 4]``, the last of the layers being the whole model; a row is
            a step, or the sum of a few consecutive ones in a long run.
        experts: of the first and second half of the steps.
        shapes: of the loads.
        cost: of imbalance, by the times of these steps; prices are of the whole run if these steps show none.
        basis: what the step times are.
        times: the usual steps by phase.
        incidents: those of the run that have one of these steps.
    """

    def __init__(self, run: Run, steps: StepRange, *, with_loads: bool) -> None:
        """``with_loads``: whether experts' loads are kept of all steps of both sides."""
        self.run, self.whole, self._steps = run, Completeness(), steps
        layers = run.info.num_layers
        self._series = BoundedSeries.empty((0, layers + 1, 4), axis=0)
        self.experts = ExpertSums(layers, run.info.num_logical_experts)
        self.shapes: set[Shape] = set()
        #: Whether experts' loads are kept of any of the steps.
        self.has_loads = False
        self._tokens = 0.0
        low, high = steps
        first, last = (step or 0 for step in run.step_range)
        around = looked_at(run, steps)
        sample, balance = CostSample.empty(), BalanceValues(steps_per_value(around.end - around.first))
        edges = max(first, low), min(last + 1, high) - 1
        sampling, timing = Sampling(run, *edges), Sampling(run, *edges, with_loads=False)
        timed = CostSample.empty()
        middle = (max(first, low) + min(last + 1, high)) // 2
        for half, part in enumerate(((low, middle), (middle, high))):
            for block in run.blocks(part):
                self.whole.add(block)
                terms = None
                if block.shape is not None and len(block.recorded):
                    self.shapes.add(block.shape)
                    terms = run.terms(block)
                    self._add(block.recorded, terms, serving(block.shape))
                    if block.has_loads:
                        self.has_loads = True
                        self.experts.add(half, block, run.history)
                    balance.add(block, terms)
                sample.merge(CostSample.of(run, sampling, block, terms))
                if not with_loads:
                    timed.merge(CostSample.of(run, timing, block, terms))
        self.cost = self._cost(sample)
        self.basis, self.times = (self.cost.basis, self.cost.used) if with_loads else step_times(run, timed)
        self.incidents = incidents_of(run, balance, sample, self.cost, steps)

    def _add(self, steps: Int64, terms: formulas.Terms, ranks: int) -> None:
        self._tokens += float(terms.mean.sum()) * ranks
        self._series.add(steps, _rows(terms))

    @property
    def terms(self) -> formulas.Float64:
        return self._series.sums

    @property
    def max_over_mean(self) -> formulas.Float64:
        """Tokens of each layer's slowest rank over those of its mean rank: float64 ``[layers]``."""
        sums = self.terms[:, :-1].sum(axis=0)
        found: formulas.Float64 = sums[:, MAXIMUM] / np.maximum(1e-9, sums[:, MEAN])
        return found

    @property
    def lost_by_layer(self) -> formulas.Float64:
        """(max − mean) of each layer by the mean tokens of all: float64 ``[layers]``."""
        sums = self.terms[:, :-1].sum(axis=0)
        found: formulas.Float64 = (sums[:, MAXIMUM] - sums[:, MEAN]) / max(1e-9, sums[:, MEAN].sum())
        return found

    def _cost(self, sample: CostSample) -> RunCost:
        found = cost_of_sample(self.run, sample)
        if found.ms_per_step is not None or self._steps == StepRange():
            return found
        return replace(found, prices=cost_of(self.run).prices)

    @property
    def lost_loads(self) -> bool:
        """Whether experts' loads are not kept of all of these steps."""
        return self.run.tiers.by_rank.overlaps(*self._steps)

    @property
    def active_rows(self) -> int:
        return int((self.terms[:, -1, ACTIVE] > 0).sum())

    def side(self) -> Side:
        active = self.terms[:, :-1, ACTIVE].sum()
        tokens = self._tokens / float(active) if active else None
        found = self.incidents
        searched = None if found.searched is None else [(p.first, p.end - 1) for p in found.searched]
        changes = self._rearrangements()
        return Side(self.run.info, self.run.phase, self.whole, tokens, changes, found.found, searched)

    def _rearrangements(self) -> int:
        """How many there are between two of the steps that are compared."""
        first, last = self.whole.first, self.whole.last
        if first is None or last is None:
            return 0
        changed = np.array([c.first_step for c in self.run.history.rearrangements()], np.int64)
        changed = changed[(changed > first) & (changed <= last)]
        retired = self.run.tiers.retired
        return int((~retired.contains(changed) & ~retired.contains(changed - 1)).sum())


def _rows(terms: formulas.Terms) -> formulas.Float64:
    """The row of each step: float64 ``[steps, layers + 1, 4]``."""
    # Of one layer alone, balancedness is its ratio.
    ratio = np.column_stack([terms.ratio, formulas.balancedness(terms)])
    out = np.zeros((*ratio.shape, 4))
    out[:, :, RATIO], out[:, :, ACTIVE] = np.nan_to_num(ratio), ~np.isnan(ratio)
    out[:, :-1, MEAN], out[:, :-1, MAXIMUM] = terms.mean, terms.maximum
    out[:, -1, MEAN:] = out[:, :-1, MEAN:].sum(axis=1)
    return out


def _differences(a: formulas.Float64, b: formulas.Float64) -> tuple[Difference, Difference]:
    """Balancedness and idle fraction of one layer, or of the model: rows ``[rows, 4]`` of both runs."""
    a, b = a[a[:, ACTIVE] > 0], b[b[:, ACTIVE] > 0]
    balance = Ratio(a[:, RATIO], a[:, ACTIVE]), Ratio(b[:, RATIO], b[:, ACTIVE])
    busy = Ratio(a[:, MEAN], a[:, MAXIMUM]), Ratio(b[:, MEAN], b[:, MAXIMUM])
    idle = [None if ratio.value is None else 1 - ratio.value for ratio in busy]
    more, busier = bootstrap.difference(*balance), bootstrap.difference(*busy)
    less = None if busier is None else Interval(-busier.value, -busier.high, -busier.low)
    return (
        Difference.of(balance[0].value, balance[1].value, more, better=1),
        Difference.of(idle[0], idle[1], less, better=-1),
    )


def _step_times(a: _Reading, b: _Reading) -> list[StepTime]:
    rows = []
    for phase in (name for name in a.times if name in b.times and a.basis == b.basis):
        one, other = a.times[phase], b.times[phase]
        longer = bootstrap.difference(Ratio.mean(one.ms), Ratio.mean(other.ms))
        if longer is None:
            continue
        step_ms = Difference.of(float(one.ms.mean()), float(other.ms.mean()), longer, better=-1)
        price = None
        if one.excess is not None and other.excess is not None:
            models = [side.cost.prices[phase] for side in (a, b) if phase in side.cost.prices]
            more = other.excess - one.excess
            prices = [price for model in models if (price := model.price(more)) is not None]
            price = min(prices, key=lambda price: price.high - price.low, default=None)
        rows.append(StepTime(phase, step_ms, None if price is None else Milliseconds.of(price)))
    return rows


def _unexplained(a: _Reading, b: _Reading) -> str:
    if a.times and b.times:
        if a.basis != b.basis:
            one, other = (TIMES.get(side.basis, side.basis) for side in (a, b))
            return f"they are not alike: {one} in A, {other} in B"
        if not a.times.keys() & b.times.keys():
            return "A and B have no phase in common"
    lost = [name for name, side in (("A", a), ("B", b)) if side.lost_loads]
    if lost:
        return f"experts' loads are no longer kept of all steps of {listed(lost)}"
    reasons = [
        f"{name}: cost {side.cost.message}" for name, side in (("A", a), ("B", b)) if not side.cost.prices
    ]
    return "; ".join(reasons) or "the cost of imbalance is not known in these phases"


def _reasons(a: _Reading, b: _Reading) -> Iterator[str]:
    """Why two runs are not comparable."""
    one, other = a.run.info, b.run.info
    if one.model != other.model:
        yield f"different models: {one.model} and {other.model}"
    if one.layers != other.layers:
        yield f"different layers: {_layers(one)} and {_layers(other)}"
    if one.num_logical_experts != other.num_logical_experts:
        yield (
            f"different numbers of experts per layer: {one.num_logical_experts} and "
            f"{other.num_logical_experts}"
        )
    if a.run.missing_ranks != b.run.missing_ranks:
        lacks = [f"{name} lacks {_ranks(side.run.missing_ranks)}" for name, side in (("A", a), ("B", b))]
        yield (
            f"{' and '.join(lacks)} in all steps; estimates can be compared only if they come from the "
            f"same ranks"
        )
    for name, reading in (("A", a), ("B", b)):
        if reading.active_rows < MIN_STEPS:
            count = plural(reading.active_rows, "step" if reading.run.missing_ranks else "complete step")
            yield f"{name} has {count} with tokens, {MIN_STEPS} are needed"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {listed(ranks)}" if ranks else "no rank"


def _layers(info: RunInfo) -> str:
    return f"{len(info.layers)} ({info.layers[0]} to {info.layers[-1]})" if info.layers else "none"


def _warnings(a: _Reading, b: _Reading, token_ratio: float | None, routing: Routing) -> Iterator[str]:
    """Other possible causes of a difference, or of none."""
    one, other = a.run.info, b.run.info
    if missing := a.run.missing_ranks:
        ranks = len(a.run.expected_ranks)
        yield (
            f"estimate from {ranks - len(missing)} of {ranks} ranks: no step is complete, and the loads of "
            f"{_ranks(missing)} are missing from A and B"
        )
    if one.ep_size != other.ep_size:
        yield f"different EP sizes, {one.ep_size} and {other.ep_size}: fewer ranks are easier to balance"
    if one.num_physical_experts != other.num_physical_experts:
        yield (
            f"different numbers of slots, {one.num_physical_experts} and {other.num_physical_experts}: "
            f"more redundant experts make balancing easier, and cost memory"
        )
    for name, reading in (("A", a), ("B", b)):
        if len(reading.shapes) > 1:
            what = "its EP size, slots or serving ranks"
            yield f"{name} changed {what}: its figures are means over all configurations"
        yield from (f"{name}: {note}" for note in reading.run.import_caveats("step_order", "passes"))
    if token_ratio is not None and not 1 / TOKEN_FACTOR <= token_ratio <= TOKEN_FACTOR:
        yield f"B has {token_ratio:.2f}x the tokens per step; with more tokens, loads are naturally more even"
    within = max(routing.within_a or 0.0, routing.within_b or 0.0)
    if routing.distance is None:
        lost = [name for name, reading in (("A", a), ("B", b)) if not reading.has_loads]
        if lost:
            yield f"routing not compared: experts' loads are no longer kept in {listed(lost)}"
        else:
            yield "routing not compared: no placement is known, so tokens cannot be assigned to experts"
    elif routing.distance > max(SMALL_DISTANCE, 2 * within):
        yield (
            f"different workload: {routing.distance:.0%} of the tokens go to different experts; between "
            f"the halves of one run, {within:.0%} do"
        )


def _routing(a: formulas.Float64, b: formulas.Float64) -> Routing:
    return Routing(_distance(a.sum(axis=0), b.sum(axis=0)), _distance(*a), _distance(*b))


def _distance(a: formulas.Float64, b: formulas.Float64) -> float | None:
    """Mean over layers of the total variation distance of shares; of ``[layers, experts]`` each."""
    known = (a.sum(axis=1) > 0) & (b.sum(axis=1) > 0)
    if not known.any():
        return None
    shares = [part[known] / part[known].sum(axis=1, keepdims=True) for part in (a, b)]
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)


def _settings(a: Run, b: Run) -> list[Setting]:
    """Settings in which the sessions or their engines differ."""
    one, other = _stated(a), _stated(b)
    names = [*one, *(name for name in other if name not in one)]
    pairs = ((name, one.get(name), other.get(name)) for name in names)
    return [Setting(*pair) for pair in pairs if pair[1] != pair[2]]


def _stated(run: Run) -> dict[str, Any]:
    names = ("engine", "engine_version", "scope", "ep_size", "num_physical_experts", "ranks_per_node")
    stated = {name: getattr(run.info, name) for name in (*names, "token_replication", "interval")}
    first = run.sessions[0].info
    config = {f"engine_config.{name}": value for name, value in run.engine_config.items()}
    return stated | {"writer_version": first.writer_version} | config
