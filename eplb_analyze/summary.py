"""The figures of `summary`: how balanced a run was, and whether its data is complete."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze import metrics
from eplb_analyze.blocks import Block
from eplb_analyze.completeness import Completeness
from eplb_analyze.metrics import FORMULAS, Spread
from eplb_analyze.placements import Rearrangement, fold, replicas
from eplb_analyze.run import Run, RunInfo, Steps
from eplb_dump.journal import Shape

HOT_EXPERTS = 10
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
class Summary:
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
    duration_seconds: float | None

    @property
    def missing_ranks(self) -> list[int]:
        return sorted(set(self.expected_ranks) - set(self.present_ranks))

    def to_json(self) -> dict[str, Any]:
        run = asdict(self.run)
        run["layer_numbers"] = list(run.pop("layers"))
        return {
            "run": run,
            "steps": self.steps.to_json(),
            "ranks": {
                "expected": len(self.expected_ranks),
                "present": len(set(self.expected_ranks) & set(self.present_ranks)),
                "missing": self.missing_ranks,
            },
            "duration_seconds": self.duration_seconds,
            "balancedness": asdict(self.spreads["balancedness"]),
            "imbalance": asdict(self.spreads["imbalance"]),
            "metrics": {
                name: self.spreads[name].mean
                for name in FORMULAS
                if name not in ("balancedness", "imbalance")
            },
            "idle_fraction": self.idle_fraction,
            "configurations": [asdict(c) for c in self.configurations],
            "layers": [asdict(layer) for layer in self.layers],
            "hot_experts": [asdict(expert) for expert in self.hot_experts],
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


class _Stretch:
    """Sums over one configuration."""

    def __init__(self, shape: Shape, num_logical_experts: int) -> None:
        self.shape = shape
        self.first = self.last = -1
        self.recorded = 0
        self.mean_tokens = self.max_tokens = 0.0
        self.values: list[metrics.Float64] = []
        layers = shape.num_moe_layers
        self.slowest = np.zeros((layers, shape.ep_size), np.int64)
        self.logical = np.zeros((layers, num_logical_experts), np.int64)

    def add(self, run: Run, block: Block, tokens: metrics.Float64, value: metrics.Float64) -> None:
        steps = block.recorded
        self.first = int(steps[0]) if self.first < 0 else self.first
        self.last = int(steps[-1])
        self.recorded += len(steps)
        self.values.append(value)
        mean, maximum = metrics.idle_terms(tokens)
        self.mean_tokens += mean
        self.max_tokens += maximum
        for layer in range(self.shape.num_moe_layers):
            uneven = tokens[:, layer].max(axis=1) > tokens[:, layer].min(axis=1)
            slowest = tokens[:, layer].argmax(axis=1)[uneven]
            self.slowest[layer] += np.bincount(slowest, minlength=self.shape.ep_size)
            history = run.history.layer(layer)
            load = block.loads(layer, layer + 1)[:, 0]
            for stretch, slots in history.stretches(steps):
                if slots is not None and len(slots) == load.shape[1]:
                    self.logical[layer] += fold(load[stretch].sum(axis=0), slots, self.logical.shape[1])

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

    def add(self, tokens: metrics.Float64) -> None:
        ratio = metrics.per_layer(FORMULAS["balancedness"], tokens)
        active = ~np.isnan(ratio)
        self.ratio += np.where(active, ratio, 0).sum(axis=0)
        self.inverse += np.where(active, 1 / np.where(active, ratio, 1), 0).sum(axis=0)
        self.active += active.sum(axis=0)


def summarize(run: Run, steps: Steps | None = None) -> Summary:
    """Compute the summary of a run, or of a half-open range of its steps."""
    if steps is not None:
        run.require(steps)
    return run.reading(lambda: _summarize(run, steps))


def _summarize(run: Run, steps: Steps | None) -> Summary:
    whole = Completeness()
    numbers: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    values: dict[str, list[metrics.Float64]] = {name: [np.empty(0)] for name in FORMULAS}
    stretches: list[_Stretch] = []
    interrupted = False
    layer_sums = _LayerSums(run.info.num_layers)
    first_time, last_time = 2**62, -1
    for block in run.blocks(steps):
        whole.add(block)
        first_time = min(first_time, int(block.clock_ns.min()))
        last_time = max(last_time, int(block.clock_ns.max()))
        if block.shape is None:
            continue
        # Also where no step of a configuration is complete, it separates those around it.
        interrupted = interrupted or (bool(stretches) and stretches[-1].shape != block.shape)
        if not len(block.recorded):
            continue
        tokens = run.tokens(block.rank_load())
        numbers.append(block.recorded)
        for name, formula in FORMULAS.items():
            values[name].append(formula.per_step(tokens))
        layer_sums.add(tokens)
        if not stretches or interrupted:
            stretches.append(_Stretch(block.shape, run.info.num_logical_experts))
            interrupted = False
        stretches[-1].add(run, block, tokens, values["balancedness"][-1])
    step = np.concatenate(numbers)
    spreads = {name: Spread.of(np.concatenate(parts), step) for name, parts in values.items()}
    mean_tokens = sum(s.mean_tokens for s in stretches)
    max_tokens = sum(s.max_tokens for s in stretches)
    changes = run.history.rearrangements()
    if steps is not None:
        changes = [r for r in changes if steps[0] <= r.first_step < steps[1]]
    return Summary(
        run=run.info,
        steps=whole,
        expected_ranks=run.expected_ranks,
        present_ranks=run.present_ranks,
        spreads=spreads,
        idle_fraction=_idle(mean_tokens, max_tokens),
        configurations=[s.configuration() for s in stretches],
        layers=_layer_figures(run, layer_sums, stretches[-1]) if stretches else [],
        hot_experts=_hot_experts(run, stretches[-1]) if stretches else [],
        last_configuration_steps=(stretches[-1].first, stretches[-1].last) if stretches else None,
        rearrangements=changes,
        duration_seconds=(last_time - first_time) / 1e9 if last_time >= first_time else None,
    )


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
