"""The figures of `layer` from sums per minute, for steps of which nothing finer is kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from eplb_analyze.analysis.experts_minutes import hot_experts_of_minutes
from eplb_analyze.analysis.layer_report import LayerMinutes, LayerReport, RankLoad
from eplb_analyze.analysis.minute_sums import StepCounts, minutes_left_out
from eplb_analyze.metrics.formulas import idle_fraction
from eplb_analyze.reader.lost import lost_in
from eplb_analyze.reader.rolled_up import add_up, minutes_of_steps, nothing_kept, require_all_phases
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.minutes import Minutes
from eplb_dump.format.schema import Scope, Tier

COLUMNS = (
    "rank_load",
    "active_steps",
    "max_load",
    "layer_balancedness",
    "layer_imbalance",
)
LOCAL_COLUMNS = ("rank_load",)


class _Sums:
    """One layer's sums over the rows of one shape; tokens as recorded."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first, self.last, self.steps = -1, -1, 0
        self.minutes: set[int] = set()
        self.tokens: Int64 = np.zeros(shape.ep_size, np.int64)
        self.active = self.max_tokens = 0
        self.ratio = self.inverse = 0.0
        #: Of loads summed over a row: mean / max times its steps, and these steps.
        self.summed_ratio = self.summed_steps = 0.0

    def add(self, index: int, rows: Minutes) -> None:
        shape, n, steps = self.shape, len(rows), rows["recorded"]
        self._cover(int(rows["first_step"].min()), int(rows["last_step"].max()))
        self.steps += int(steps.sum())
        self.minutes |= {*rows["minute"][steps > 0].tolist()}
        load = rows["rank_load"].reshape(n, shape.num_moe_layers, shape.ep_size)[:, index]
        self.tokens += load.sum(axis=0)
        highest = load.max(axis=1)
        weight = np.where(highest > 0, steps, 0)
        self.summed_ratio += float((load.mean(axis=1) * weight / np.maximum(highest, 1)).sum())
        self.summed_steps += float(weight.sum())
        if not rows.summed:
            return
        self.active += int(rows["active_steps"][:, index].sum())
        self.max_tokens += int(rows["max_load"][:, index].sum())
        self.ratio += float(rows["layer_balancedness"][:, index].sum())
        self.inverse += float(rows["layer_imbalance"][:, index].sum())

    def _cover(self, first: int, last: int) -> None:
        self.first = first if self.first < 0 else min(self.first, first)
        self.last = max(self.last, last)

    def merge(self, later: _Sums) -> None:
        self._cover(later.first, later.last)
        self.steps += later.steps
        self.minutes |= later.minutes
        self.tokens = self.tokens + later.tokens
        for name in ("active", "max_tokens", "ratio", "inverse", "summed_ratio", "summed_steps"):
            setattr(self, name, getattr(self, name) + getattr(later, name))


class _Layer(StepCounts):
    """A layer's sums, by consecutive shapes."""

    def __init__(self, run: Run, index: int) -> None:
        super().__init__(run)
        self._index = index
        self.sums: list[_Sums] = []

    def _add(self, shape: Shape, rows: Minutes) -> None:
        if not len(rows):
            return
        if not self.sums or self.sums[-1].shape != shape:
            self.sums.append(_Sums(shape))
        self.sums[-1].add(self._index, rows)

    def merge(self, later: Any) -> None:
        super().merge(later)
        for own in later.sums:
            if self.sums and self.sums[-1].shape == own.shape:
                self.sums[-1].merge(own)
            else:
                self.sums.append(own)


def layer_of_minutes(run: Run, layer: int, index: int, steps: tuple[int, int] | None) -> LayerReport:
    """A layer over whole minutes: all of the run's, or those with steps in a half-open range.

    Call it inside ``run.retry_without_damaged``. Raises NotInDumpError, UsageError.
    """
    local = run.scope is Scope.LOCAL
    require_all_phases(run)
    run.load_history()
    minutes = None if steps is None else minutes_of_steps(run, steps)
    found = add_up(run, LOCAL_COLUMNS if local else COLUMNS, minutes, lambda: _Layer(run, index))
    if not found.sums:
        raise nothing_kept(run, steps) if found.first < 0 else run.nothing_complete(steps)
    last = found.sums[-1]
    mean = float(last.tokens.sum()) / last.shape.ep_size
    counts = found.completeness(steps)
    notes = minutes_left_out(counts, last.first if len(found.sums) > 1 else None)
    return LayerReport(
        run_id=run.info.run_id,
        model=run.info.model,
        layer=layer,
        first_step=last.first,
        last_step=last.last,
        steps=last.steps,
        complete=True,
        missing_ranks=[],
        lost_ranks=[*lost_in(last.shape)],
        balancedness=last.ratio / last.active if last.active else None,
        imbalance=last.inverse / last.active if last.active else None,
        idle_fraction=None if local else idle_fraction(mean, float(last.max_tokens)),
        active_experts=None,
        ranks=[RankLoad(rank, run.count(value)) for rank, value in enumerate(last.tokens)],
        slots=[],
        experts=[],
        placement_changes=[s for s in run.history.layer(index).steps if last.first < s <= last.last],
        phase=run.phase,
        notes=notes,
        tier=Tier.MINUTES.value,
        minutes=LayerMinutes(
            minutes=len(last.minutes),
            first_minute=min(last.minutes, default=found.first_minute),
            last_minute=max(last.minutes, default=found.last_minute),
            summed_balancedness=(
                last.summed_ratio / last.summed_steps if local and last.summed_steps else None
            ),
            hot_experts=hot_experts_of_minutes(run, steps, [index])[0],
        ),
    )
