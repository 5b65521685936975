"""The figures of `summary`: how balanced a run was, and whether its data is complete."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.json_report import Report, as_json
from eplb_analyze.metrics import formulas
from eplb_analyze.metrics.formulas import FORMULAS, Spread, Terms
from eplb_analyze.metrics.losses import Bin, Bins, Losses, RankLoss, StretchLoss, timeline, windows
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.placements import Rearrangement, logical_sums, replicas
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.reader.step_range import StepRange
from eplb_analyze.text import listed, percent, plural
from eplb_dump.format.journal import Int64, Shape

HOT_EXPERTS = 10
WORST_STRETCHES = 10
#: Shown beside the two main figures, each under its own name.
OTHER_FORMULAS = tuple(name for name in FORMULAS if name not in ("balancedness", "imbalance"))


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
    """A stretch of steps of one shape: nothing is summed across its edges."""

    first_step: int
    last_step: int
    ep_size: int
    num_physical_experts: int
    recorded: int
    balancedness: float | None
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
    """Σ (max − mean) tokens over steps and layers: what the other ranks waited for, and why."""

    tokens: float
    #: How much of it remains where loads are summed over ``window_steps`` steps: what a better
    #: placement could remove at most. The rest is chance within a step.
    persistent_share: float | None
    window_steps: int
    ranks: list[RankLoss]
    stretches: list[StretchLoss]


@dataclass(frozen=True)
class Summary(Report):
    run: RunInfo
    steps: Completeness
    expected_ranks: list[int]
    present_ranks: list[int]
    spreads: dict[str, Spread]
    idle_fraction: float | None
    configurations: list[Configuration]
    layers: list[LayerFigure]
    hot_experts: list[HotExpert]
    #: The steps that hot_experts and worst_rank are over: the last configuration's.
    last_configuration_steps: tuple[int, int] | None
    rearrangements: list[Rearrangement]
    phases: list[PhaseFigure]
    timeline: list[Bin]
    #: Of the last configuration.
    loss: Loss | None
    duration_seconds: float | None

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
                "steps": self.steps,
                "ranks": {
                    "expected": len(self.expected_ranks),
                    "present": len(set(self.expected_ranks) & set(self.present_ranks)),
                    "missing": self.missing_ranks,
                },
                "duration_seconds": self.duration_seconds,
                "balancedness": self.spreads["balancedness"],
                "imbalance": self.spreads["imbalance"],
                "metrics": {
                    name: self.spreads[name].mean
                    for name in FORMULAS
                    if name not in ("balancedness", "imbalance")
                },
                "idle_fraction": self.idle_fraction,
                "configurations": self.configurations,
                "layers": self.layers,
                "layer_percentiles": self.layer_percentiles,
                "phases": self.phases,
                "timeline": self.timeline,
                "loss": self.loss,
                "hot_experts": self.hot_experts,
                "hot_experts_steps": self.last_configuration_steps,
                "rearrangements": [r.first_step for r in self.rearrangements],
                "rearrangement_details": [
                    {
                        "first_step": r.first_step,
                        "last_step": r.last_step,
                        "layers": len(r.layers),
                        "slots_changed": r.slots_changed,
                    }
                    for r in self.rearrangements
                ],
            }
        )


class _Stretch:
    """Sums over one configuration."""

    def __init__(self, shape: Shape, info: RunInfo, bins: Bins) -> None:
        self.shape = shape
        self.losses = Losses(shape, bins, info.token_replication)
        self.first = self.last = -1
        self.recorded = 0
        self.mean_tokens = self.max_tokens = 0.0
        self.steps: list[Int64] = []
        self.values: list[formulas.Float64] = []
        layers = shape.num_moe_layers
        self.slowest = np.zeros((layers, shape.ep_size), np.int64)
        self.logical = np.zeros((layers, info.num_logical_experts), np.int64)

    def add(self, run: Run, block: Block) -> Terms:
        """Add a block's complete steps, of which there is at least one."""
        steps, shape = block.recorded, self.shape
        layers, per_token = shape.num_moe_layers, run.info.token_replication
        terms = Terms(len(steps), layers, shape.ep_size, per_token)
        within = windows(steps, run.history.changes, run.info.interval)
        for first, load in block.rank_load_parts():
            terms.add(first, load)
            self.losses.add_lasting(within, first, load)
        self.losses.add(steps, terms)
        self.first, self.last, self.recorded = int(steps[0]), int(steps[-1]), len(steps)
        self.steps.append(steps)
        self.values.append(FORMULAS["balancedness"].of(terms))
        self.mean_tokens += float(terms.mean.sum())
        self.max_tokens += float(terms.maximum.sum())
        self.slowest += terms.by_slowest()
        self.logical += logical_sums(block, run.history, self.logical.shape[1])
        return terms

    def merge(self, later: _Stretch) -> None:
        if not later.recorded:
            return
        self.first = self.first if self.recorded else later.first
        self.last = later.last
        self.recorded += later.recorded
        self.mean_tokens += later.mean_tokens
        self.max_tokens += later.max_tokens
        self.steps += later.steps
        self.values += later.values
        # Not in place: what comes from another process may be read-only.
        self.slowest = self.slowest + later.slowest
        self.logical = self.logical + later.logical
        self.losses.merge(later.losses)

    def configuration(self) -> Configuration:
        value = np.concatenate(self.values)
        known = value[~np.isnan(value)]
        return Configuration(
            self.first,
            self.last,
            self.shape.ep_size,
            self.shape.num_physical_experts,
            self.recorded,
            float(known.mean()) if len(known) else None,
            _idle(self.mean_tokens, self.max_tokens),
        )


class _LayerSums:
    """Sums over steps of each layer's own ratio: a mean of ratios, in which no loads are added."""

    def __init__(self, layers: int) -> None:
        self.ratio, self.inverse, self.active = np.zeros(layers), np.zeros(layers), np.zeros(layers)

    def add(self, terms: Terms) -> None:
        active = terms.active
        self.ratio += np.where(active, terms.ratio, 0).sum(axis=0)
        self.inverse += np.where(active, 1 / np.where(active, terms.ratio, 1), 0).sum(axis=0)
        self.active += active.sum(axis=0)

    def merge(self, later: _LayerSums) -> None:
        self.ratio = self.ratio + later.ratio
        self.inverse = self.inverse + later.inverse
        self.active = self.active + later.active


class _PhaseSums:
    def __init__(self) -> None:
        self.steps = 0
        self.mean_tokens = self.max_tokens = 0.0
        self.values: list[formulas.Float64] = []

    def add(self, mask: npt.NDArray[np.bool_], terms: Terms, balancedness: formulas.Float64) -> None:
        self.steps += int(mask.sum())
        self.mean_tokens += float(terms.mean[mask].sum())
        self.max_tokens += float(terms.maximum[mask].sum())
        self.values.append(balancedness[mask])

    def merge(self, later: _PhaseSums) -> None:
        self.steps += later.steps
        self.mean_tokens += later.mean_tokens
        self.max_tokens += later.max_tokens
        self.values += later.values

    def figure(self, name: str) -> PhaseFigure:
        value = np.concatenate(self.values)
        known = value[~np.isnan(value)]
        mean = float(known.mean()) if len(known) else None
        return PhaseFigure(name, self.steps, mean, _idle(self.mean_tokens, self.max_tokens))


class SummarySums:
    """What a summary keeps of consecutive steps; sums of later steps can be merged into it.

    Beside sums it keeps six figures a step, for percentiles.
    """

    def __init__(self, num_layers: int, bins: Bins) -> None:
        self._bins = bins
        self.seen = Completeness()
        self.steps: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.values: dict[str, list[formulas.Float64]] = {name: [np.empty(0)] for name in FORMULAS}
        self.stretches: list[_Stretch] = []
        self.layers = _LayerSums(num_layers)
        self.phases: dict[str, _PhaseSums] = {}
        self.first_time, self.last_time = np.iinfo(np.int64).max, -1
        #: From a step to the next, in ns; and the first and the last step, with their time.
        self.gaps: list[Int64] = []
        self._first: tuple[int, int] | None = None
        self._last: tuple[int, int] | None = None

    @classmethod
    def of(cls, run: Run, bins: Bins, block: Block) -> SummarySums:
        sums = cls(run.info.num_layers, bins)
        sums.seen.add(block)
        sums.first_time, sums.last_time = int(block.clock_ns.min()), int(block.clock_ns.max())
        sums.gaps.append(np.diff(block.clock_ns)[np.diff(block.step) == 1])
        sums._first, sums._last = ((int(block.step[i]), int(block.clock_ns[i])) for i in (0, -1))
        if block.shape is None:
            return sums
        # Also where no step of a configuration is complete, it separates those around it.
        sums.stretches.append(_Stretch(block.shape, run.info, bins))
        if len(block.recorded):
            sums._add(block, sums.stretches[0].add(run, block))
        return sums

    def _add(self, block: Block, terms: Terms) -> None:
        self.steps.append(block.recorded)
        for name, formula in FORMULAS.items():
            self.values[name].append(formula.of(terms))
        self.layers.add(terms)
        phase = block.phase[block.state == StepState.RECORDED]
        for code in np.unique(phase[phase >= 0]):
            of_phase = self.phases.setdefault(block.phases[code], _PhaseSums())
            of_phase.add(phase == code, terms, self.values["balancedness"][-1])

    def merge(self, later: SummarySums) -> None:
        self.seen.merge(later.seen)
        self.first_time = min(self.first_time, later.first_time)
        self.last_time = max(self.last_time, later.last_time)
        if self._last and later._first and later._first[0] == self._last[0] + 1:
            self.gaps.append(np.array([later._first[1] - self._last[1]]))
        self.gaps += later.gaps
        self._first, self._last = self._first or later._first, later._last or self._last
        self.steps += later.steps
        for name, values in later.values.items():
            self.values[name] += values
        self.layers.merge(later.layers)
        for name, phase in later.phases.items():
            self.phases.setdefault(name, _PhaseSums()).merge(phase)
        for stretch in later.stretches:
            if self.stretches and self.stretches[-1].shape == stretch.shape:
                self.stretches[-1].merge(stretch)
            else:
                self.stretches.append(stretch)

    def summary(self, run: Run, steps: tuple[int, int] | None = None) -> Summary:
        """The figures of a run; ``steps`` is the range that was asked for."""
        step = np.concatenate(self.steps)
        values = {name: np.concatenate(parts) for name, parts in self.values.items()}
        stretches = [stretch for stretch in self.stretches if stretch.recorded]
        mean_tokens = sum(s.mean_tokens for s in stretches)
        max_tokens = sum(s.max_tokens for s in stretches)
        changes = run.history.rearrangements()
        if steps is not None:
            changes = [r for r in changes if steps[0] <= r.first_step < steps[1]]
        seconds = (self.last_time - self.first_time) / 1e9
        timed = run.info.timed
        return Summary(
            run=run.info,
            steps=self.seen,
            expected_ranks=run.expected_ranks,
            present_ranks=run.present_ranks,
            spreads={name: Spread.of(value, step) for name, value in values.items()},
            idle_fraction=_idle(mean_tokens, max_tokens),
            configurations=[s.configuration() for s in stretches],
            layers=_layer_figures(run, self.layers, stretches[-1]) if stretches else [],
            hot_experts=_hot_experts(run, stretches[-1]) if stretches else [],
            last_configuration_steps=(stretches[-1].first, stretches[-1].last) if stretches else None,
            rearrangements=changes,
            phases=[phase.figure(name) for name, phase in sorted(self.phases.items())],
            timeline=timeline(self._bins, step, values["balancedness"]),
            loss=_loss(run, stretches[-1]) if stretches else None,
            duration_seconds=seconds if timed and self.last_time >= self.first_time else None,
        )


def summarize(run: Run, steps: tuple[int, int] | None = None) -> Summary:
    """Compute the summary of a run, or of a half-open range of its steps."""
    if steps is not None:
        run.require(steps)
    return run.retry_without_damaged(lambda: _summarize(run, steps))


def _summarize(run: Run, steps: tuple[int, int] | None) -> Summary:
    return sums_of(run, steps, bins_of(run, steps)).summary(run, steps)


def bins_of(run: Run, steps: tuple[int, int] | None = None) -> Bins:
    """The parts of a run's time, or of a range of its steps, that its sums are kept by."""
    first, last = run.step_range
    low, high = StepRange.of(steps)
    return Bins(max(low, first or 0), min(high - 1, last or 0))


def sums_of(run: Run, steps: tuple[int, int] | None, bins: Bins) -> SummarySums:
    """The sums of a run, or of a range of its steps. Call it inside ``run.retry_without_damaged``.

    Blocks are merged part by part of :meth:`Run.parts`, so that rounding is the same wherever the parts
    are read.
    """
    run.load_history()
    edges = [first for first, _ in run.parts()]
    total, part = SummarySums(run.info.num_layers, bins), SummarySums(run.info.num_layers, bins)
    for block, sums in run.over_blocks(lambda block: SummarySums.of(run, bins, block), steps):
        if block.step[0] in edges:
            total.merge(part)
            part = SummarySums(run.info.num_layers, bins)
        part.merge(sums)
    total.merge(part)
    return total


def _loss(run: Run, stretch: _Stretch) -> Loss:
    losses = stretch.losses
    named = [replace(s, layer=run.info.layers[s.layer]) for s in losses.stretches(WORST_STRETCHES)]
    return Loss(losses.total, losses.lasting_share, losses.longest_window, losses.by_rank(), named)


def _idle(mean_tokens: float, max_tokens: float) -> float | None:
    return 1 - mean_tokens / max_tokens if max_tokens > 0 else None


def _layer_figures(run: Run, sums: _LayerSums, last: _Stretch) -> list[LayerFigure]:
    figures = []
    for index, number in enumerate(run.info.layers):
        active, slowest = sums.active[index], last.slowest[index]
        known = slowest.sum() > 0
        figures.append(
            LayerFigure(
                number,
                float(sums.ratio[index] / active) if active else None,
                float(sums.inverse[index] / active) if active else None,
                int(slowest.argmax()) if known else None,
                float(slowest.max() / slowest.sum()) if known else None,
            )
        )
    return figures


def _hot_experts(run: Run, stretch: _Stretch) -> list[HotExpert]:
    total = stretch.logical.sum(axis=1, keepdims=True)
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
                float(share[layer, logical] * share.shape[1]),
                int(replicas(slots, share.shape[1])[logical]),
            )
        )
    return experts


def banners(summary: Summary, acted: bool | None, not_due: str | None = None) -> list[str]:
    """Lines in capitals, which stand out in a pipe, too.

    Args:
        acted: whether a placement changed in the whole run; None: not known.
        not_due: what :func:`not_due` says of the run: then nothing is amiss.
    """
    lines = []
    if summary.missing_ranks:
        ranks = plural(len(summary.expected_ranks), "rank")
        lines.append(f"INCOMPLETE: of {ranks}, these wrote nothing: {listed(summary.missing_ranks)}")
    elif summary.steps.lacks_much:
        lines.append(f"INCOMPLETE: {incomplete(summary)}")
    if acted is False and not_due is None:
        redundant = summary.run.num_physical_experts - summary.run.num_logical_experts
        also = f" and its {plural(redundant, 'redundant expert')}" if redundant > 0 else ""
        lines.append(f"EPLB NEVER ACTED: the placement{also} never changed")
    return lines


def incomplete(summary: Summary) -> str:
    """How many steps lack a rank, and which rank."""
    steps = summary.steps
    count = plural(steps.count(StepState.INCOMPLETE), "step")
    return f"{count} ({percent(steps.incomplete_share)}) in no figure: {steps.why_incomplete()}"
