"""The figures of `timeline` from sums per minute, in bins of equally many minutes."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from eplb_analyze.analysis.minute_sums import StepCounts
from eplb_analyze.analysis.timeline_report import IDLE_FRACTION, Bin, Stretch, Timeline
from eplb_analyze.errors import UsageError
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.rolled_up import add_up, minutes_of_steps, nothing_kept, require_all_phases
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.minutes import FORMULAS, MINUTE_NS, SPREAD_FORMULAS, Minutes
from eplb_dump.format.schema import Scope

#: The name of the figure if each rank wrote its own sums: it is not the balancedness of steps.
SUMMED = "summed_balancedness"
#: Columns of a formula's sums for one layer; trtllm is imbalance - 1.
OF_LAYER = {
    "balancedness": "layer_balancedness",
    "vllm": "layer_balancedness",
    "imbalance": "layer_imbalance",
}


class _Rows(NamedTuple):
    """Of each row: its minute and steps, the figure's weighted sum, and its lowest and highest step."""

    minute: Int64
    first: Int64
    last: Int64
    steps: Int64
    total: Float64
    weight: Float64
    low: Float64
    high: Float64


class _Figure(StepCounts):
    """A formula over the rows of a run."""

    def __init__(self, run: Run, formula: str, layer: int | None) -> None:
        super().__init__(run)
        self.formula, self.layer = formula, layer
        self.rows: list[_Rows] = []
        self.shapes: list[tuple[Shape, int, int]] = []

    @property
    def columns(self) -> list[str]:
        name, of_one = self._column, self.layer is not None
        if self._run.scope is Scope.LOCAL:
            return ["rank_load"]
        if self.formula == IDLE_FRACTION:
            return ["max_load", "rank_load", "active"]
        extremes = [f"{name}_min", f"{name}_max"] if name in SPREAD_FORMULAS and not of_one else []
        return [OF_LAYER[name], "active_steps"] if of_one else [name, "active", *extremes]

    @property
    def _column(self) -> str:
        return "imbalance" if self.formula == "trtllm" else self.formula.replace("-", "_")

    def _add(self, shape: Shape, rows: Minutes) -> None:
        if not len(rows):
            return
        ends = int(rows["first_step"].min()), int(rows["last_step"].max())
        self.shapes.append((shape, *ends))
        unknown = np.full(len(rows), np.nan)
        low = high = unknown
        if self._run.scope is Scope.LOCAL:
            count, total = self._summed(shape, rows)
            weight = count
        elif self.formula == IDLE_FRACTION:
            count, total, weight = self._idle(shape, rows)
        elif self.layer is not None:
            count = rows["active_steps"][:, self.layer].astype(np.float64)
            total, weight = rows[OF_LAYER[self._column]][:, self.layer], count
        else:
            count = rows["active"].astype(np.float64)
            total, weight = np.nan_to_num(rows[self._column]), count
            if self._column in SPREAD_FORMULAS:
                low, high = rows[f"{self._column}_min"], rows[f"{self._column}_max"]
        if self.formula == "trtllm":
            total, low, high = total - count, low - 1, high - 1
        key = rows["minute"], rows["first_step"], rows["last_step"]
        self.rows.append(_Rows(*key, count.astype(np.int64), total, weight, low, high))

    def _loads(self, shape: Shape, rows: Minutes) -> Int64:
        load = rows["rank_load"].reshape(len(rows), shape.num_moe_layers, shape.ep_size)
        return load if self.layer is None else load[:, [self.layer]]

    def _idle(self, shape: Shape, rows: Minutes) -> tuple[Float64, Float64, Float64]:
        """Steps with tokens, Σ (max − mean) and Σ max of each row."""
        highest = rows["max_load"] if self.layer is None else rows["max_load"][:, [self.layer]]
        most = highest.sum(axis=1).astype(np.float64)
        mean = self._loads(shape, rows).sum(axis=(1, 2)) / shape.ep_size
        return rows["active"].astype(np.float64), most - mean, most

    def _summed(self, shape: Shape, rows: Minutes) -> tuple[Float64, Float64]:
        """Steps, and the balancedness of the loads summed over a row times these."""
        load = self._loads(shape, rows)
        highest, mean = load.max(axis=2), load.mean(axis=2)
        active = highest > 0
        ratio = np.divide(mean, highest, out=np.zeros(mean.shape), where=active).sum(axis=1)
        layers = active.sum(axis=1)
        steps = np.where(layers > 0, rows["recorded"], 0).astype(np.float64)
        return steps, steps * ratio / np.maximum(1, layers)

    def merge(self, later: Any) -> None:
        super().merge(later)
        self.rows += later.rows
        self.shapes += later.shapes


def timeline_of_minutes(
    run: Run, formula: str, bins: int, index: int | None, steps: tuple[int, int] | None
) -> Timeline:
    """A formula of :data:`~eplb_analyze.analysis.timeline_report.NAMES` over whole minutes, in bins of these.

    Minima and maxima are those of steps; None for figures of which only sums are kept.

    Raises:
        UsageError: the formula is not in the sums.
        NotInDumpError: nothing is kept of these steps.
    """
    _require(run, formula, index)
    run.load_history()
    minutes = None if steps is None else minutes_of_steps(run, steps)
    start = _Figure(run, formula, index)
    found = add_up(run, start.columns, minutes, lambda: _Figure(run, formula, index))
    if not found.rows:
        raise nothing_kept(run, steps) if found.first < 0 else run.nothing_complete(steps)
    rows = _Rows(*(np.concatenate(parts) for parts in zip(*found.rows, strict=True)))
    covered = StepRange(found.first, found.last + 1)
    history = run.history
    changes = (
        [r.first_step for r in history.rearrangements()] if index is None else history.layer(index).steps[1:]
    )
    total = float(rows.weight.sum())
    local = run.scope is Scope.LOCAL
    return Timeline(
        run_id=run.info.run_id,
        model=run.info.model,
        formula=SUMMED if local else formula,
        layer=None if index is None else run.info.layers[index],
        steps=found.completeness(steps),
        missing_ranks=[],
        mean=float(rows.total.sum()) / total if total else None,
        min=_extreme(np.fmin, rows.low),
        max=_extreme(np.fmax, rows.high),
        bins=_bins(rows, found.first_minute, found.last_minute, bins),
        rearrangements=[step for step in changes if covered.first <= step < covered.end],
        configurations=_stretches(found.shapes),
        tier="minutes",
        notes=_widened(covered, steps),
        bin_minutes=_edges(found.first_minute, found.last_minute, bins)[1],
    )


def _widened(covered: StepRange, steps: tuple[int, int] | None) -> list[str]:
    """That more steps are covered than were asked for, as minutes are whole."""
    asked = StepRange.of(steps)
    if steps is None or (covered.first >= asked.first and covered.end <= asked.end):
        return []
    return [f"figures cover whole minutes: steps {covered}, where {asked} were asked for"]


def _stretches(shapes: list[tuple[Shape, int, int]]) -> list[Stretch]:
    """Consecutive shapes with their first and last steps, those that are equal as one."""
    found: list[Stretch] = []
    for _, group in itertools.groupby(shapes, key=lambda item: item[0]):
        own = list(group)
        shape = own[0][0]
        first, last = min(low for _, low, _ in own), max(high for _, _, high in own)
        found.append(Stretch(first, last, shape.ep_size, shape.num_physical_experts))
    return found


def _require(run: Run, formula: str, index: int | None) -> None:
    """Raise UsageError if the sums do not have a formula."""
    require_all_phases(run)
    if run.scope is Scope.LOCAL:
        known = ["balancedness"]
    elif index is not None:
        known = [*OF_LAYER, "trtllm", IDLE_FRACTION]
    else:
        known = [*(name.replace("_", "-") for name in FORMULAS), "trtllm", IDLE_FRACTION]
    if formula not in known:
        of = "" if index is None else " of one layer"
        whose = "of single ranks " if run.scope is Scope.LOCAL else ""
        raise UsageError(
            f"{run.path}: sums per minute {whose}do not have {formula}{of}, only {', '.join(known)}; "
            "select steps that are kept"
        )


def _extreme(ufunc: np.ufunc, values: Float64) -> float | None:
    """The least or greatest of some values that are known."""
    found = float(ufunc.reduce(values)) if len(values) else np.nan
    return None if np.isnan(found) else found


def _edges(first: int, last: int, bins: int) -> tuple[Int64, int]:
    """The first minutes of bins and the end, and the most minutes that one has."""
    count = (last - first) // MINUTE_NS + 1
    bins = min(bins, count)
    edges = np.array([first + i * count // bins * MINUTE_NS for i in range(bins + 1)], np.int64)
    return edges, -(-count // bins)


def _bins(rows: _Rows, first: int, last: int, bins: int) -> list[Bin]:
    edges, _ = _edges(first, last, bins)
    at = np.searchsorted(edges, rows.minute, side="right") - 1
    found: list[Bin] = []
    for number in range(len(edges) - 1):
        own = np.flatnonzero(at == number)
        if not len(own):
            continue
        steps, weight = int(rows.steps[own].sum()), float(rows.weight[own].sum())
        found.append(
            Bin(
                int(rows.first[own].min()),
                int(rows.last[own].max()),
                steps,
                float(rows.total[own].sum()) / weight if weight else None,
                _extreme(np.fmin, rows.low[own]),
                _extreme(np.fmax, rows.high[own]),
            )
        )
    return found
