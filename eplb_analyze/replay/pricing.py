"""What settings are worth in ms per step: work saved, at the fitted price, less the pauses they add."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from eplb_analyze.analysis.cost import RunCost
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import pauses_of
from eplb_analyze.analysis.worth import PRICED, price_of
from eplb_analyze.metrics.bootstrap import Interval, Ratio
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.metrics.pauses import mean_of
from eplb_analyze.metrics.prices import combined
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.scores import ALL, TODAY, Line, Scores
from eplb_analyze.replay.setting_run import Move
from eplb_dump.format.frozen import frozen

#: If no pause was measured, and none is given, a rearrangement is assumed to take so long, ms: synchronous
#: engines take from a tenth of a second to several seconds.
ASSUMED_PAUSE_MS = 1000.0


class Objective(str, enum.Enum):
    """What settings are sorted by."""

    TOKENS = "tokens"
    ACTIVE = "active"
    TRAFFIC = "tokens+traffic"
    MS = "ms"


def effort(scores: Scores, objective: Objective, cross_node_weight: float | None) -> Float64:
    """What stands for the time of each row and column, if that is not measured: ``[rows, columns]``.

    Args:
        cross_node_weight: how many tokens of work a token counts that a rank gets from another node.
    """
    if objective is Objective.ACTIVE:
        return scores.active_experts
    if objective is not Objective.TRAFFIC:
        return scores.maximum
    crossing: Float64 = scores.crossing / scores.ep_size[:, np.newaxis]
    return scores.maximum + (cross_node_weight or 0.0) * crossing


@frozen
class Pause:
    """What a rearrangement costs: ``ms`` each, or for each expert weight that its busiest rank fetches.

    A measured pause is that of rearrangements that moved ``weights``. Those that move more take longer in
    proportion; those that move less are assumed to take as long.
    """

    ms: Interval
    basis: Literal["measured", "given", "assumed"]
    #: How many were measured.
    count: int = 0
    #: The expert weights that the busiest rank fetched in each of them, the mean; None if not measured.
    weights: float | None = None

    def units(self, moves: Sequence[Move]) -> float:
        """How many times ``ms`` some rearrangements take."""
        weights = sum(move.busiest_rank for move in moves)
        if self.basis == "given":
            return weights
        return max(len(moves), weights / self.weights) if self.weights else len(moves)

    def seconds(self, moves: Sequence[Move]) -> float | None:
        """The time of some rearrangements; None if it is only assumed."""
        return None if self.basis == "assumed" else self.units(moves) * self.ms.value / 1e3

    def to_json(self) -> dict[str, Any]:
        measured = {"rearrangements": self.count, "weights_moved_busiest_rank": self.weights}
        return {"ms": Milliseconds.of(self.ms), "basis": self.basis, **measured}


def pause_of(run: Run, cost_per_expert_ms: float | None) -> Pause:
    """As given, else as measured in the run, else assumed; call it inside ``run.retry_without_damaged``."""
    if cost_per_expert_ms is not None:
        return Pause(Interval(*[cost_per_expert_ms] * 3), "given")
    changes = [change for change in run.history.rearrangements() if not _elastic(run, change)]
    found = [pause for pause in pauses_of(run, changes) if isinstance(pause, Interval)]
    mean = mean_of(found)
    if mean is None:
        return Pause(Interval(*[ASSUMED_PAUSE_MS] * 3), "assumed")
    return Pause(mean, "measured", len(found))


def _elastic(run: Run, change: Rearrangement) -> bool:
    """Whether the number of ranks or slots changed, too, which takes longer."""
    layer = run.history.layer(change.layers[0])
    i = layer.index_at(change.first_step)
    # If it began in steps that are gone, the placement before is not known.
    return i > 0 and (
        layer.ep_sizes[i] != layer.ep_sizes[i - 1] or len(layer.slots[i]) != len(layer.slots[i - 1])
    )


def lines_of(cost: RunCost) -> list[Line]:
    """The efforts that have a price, by phase and exchange rate."""
    return [
        (phase, rate.exchange)
        for phase, own in cost.prices.items()
        if own.status is not CostStatus.NOT_IDENTIFIABLE
        for rate in own.rates
    ]


def mean_step_ms(cost: RunCost, scores: Scores, columns: slice = ALL) -> float | None:
    """The mean time of a step without pauses and idle gaps, as the prices of its phases know it.

    Not the median: of steps of a few ms and a few long ones, it is far less than their time for each step.

    Returns:
        None if most of the steps are of phases without a price.
    """
    means = [
        (scores.steps_of((phase, exchange), columns).sum(), cost.prices[phase].mean_ms)
        for phase, exchange in {phase: (phase, exchange) for phase, exchange in scores.lines}.values()
    ]
    known = sum(count for count, mean in means if mean is not None)
    if not known or known < PRICED * scores.active[TODAY, columns].sum():
        return None
    return float(sum(count * mean for count, mean in means if mean is not None) / known)


def gain(
    cost: RunCost, scores: Scores, row: int, columns: slice = ALL, reference: int = TODAY
) -> Interval | str:
    """ms per step that a setting saves beside today's placements, or another row; or why it is not known."""
    if scores.ep_size[row] != scores.ep_size[reference]:
        return "the number of ranks differs"
    parts: dict[str, tuple[float, dict[int, Ratio]]] = {}
    for line in scores.lines:
        steps = scores.steps_of(line, columns)
        if steps.any():
            saved = (scores.effort(line, reference, columns) - scores.effort(line, row, columns))[steps > 0]
            ratios = parts.setdefault(line[0], (float(steps.sum()), {}))[1]
            ratios[line[1]] = Ratio(saved, steps[steps > 0])
    return price_of(cost, parts, float(scores.active[TODAY, columns].sum()))


def net(saved: Interval, pause: Pause, new: Sequence[Move], old: Sequence[Move], steps: float) -> Interval:
    """The gain less the pauses of rearrangements beyond today's, ms per step; ``steps``: of the engine."""
    total = combined([(1.0, saved), ((pause.units(old) - pause.units(new)) / steps, pause.ms)])
    assert total is not None
    return total
