"""The figures of the newest complete steps: layers, ranks and hot experts."""

from __future__ import annotations

import numpy as np

from eplb_analyze.live.experts import ExpertTokens
from eplb_analyze.live.snapshot import LayerSnapshot, LiveHotExpert, RankSnapshot
from eplb_analyze.metrics.formulas import Terms, idle_fraction, most_often
from eplb_dump.format.journal import Int64
from eplb_dump.format.session import SessionInfo

#: How many hot experts a snapshot has.
HOT_EXPERTS = 8
#: An expert is hot if its load per replica is at least this many times the mean load of an expert.
HOT = 1.5


def idle_share(terms: Terms) -> float | None:
    return idle_fraction(float(terms.mean.sum()), float(terms.maximum.sum()))


def layer_figures(terms: Terms, info: SessionInfo) -> list[LayerSnapshot]:
    """In ascending order."""
    numbers = info.layer_numbers(terms.mean.shape[1])
    ratio, active = np.where(terms.active, terms.ratio, 0.0).sum(axis=0), terms.active.sum(axis=0)
    slowest = terms.by_slowest()
    return [
        LayerSnapshot(
            number,
            float(ratio[index] / active[index]) if active[index] else None,
            *most_often(slowest[index]),
        )
        for index, number in enumerate(numbers)
    ]


def rank_figures(terms: Terms, serving: list[int]) -> list[RankSnapshot]:
    """In ascending order, those that serve."""
    load = terms.rank_mean.sum(axis=0)
    often = terms.by_slowest().sum(axis=0)
    excess = terms.by_slowest(terms.excess).sum(axis=0)
    active, mean, loss = int(terms.active.sum()), float(load[serving].mean()), float(excess.sum())
    return [
        RankSnapshot(
            rank,
            float(load[rank] / mean) if mean else None,
            float(often[rank] / active) if active else None,
            float(excess[rank] / loss) if loss else None,
        )
        for rank in serving
    ]


def hot_experts(
    total: ExpertTokens, recent: ExpertTokens | None, replicas: Int64, info: SessionInfo
) -> list[LiveHotExpert]:
    """The experts with the highest load per replica.

    Args:
        total, recent: tokens over the window, and over the last seconds.
        replicas: int64 ``[layers, num_logical_experts]``.
    """
    times = total.times_mean
    now = times if recent is None or recent.tokens.shape != total.tokens.shape else recent.times_mean
    per_replica = np.maximum(times, now) / np.maximum(1, replicas)
    per_replica[replicas == 0] = 0.0
    count = min(HOT_EXPERTS, per_replica.size)
    largest = np.argpartition(-per_replica, count - 1, axis=None)[:count]
    numbers = info.layer_numbers(len(replicas))
    order = sorted(largest.tolist(), key=lambda cell: (-per_replica.flat[cell], cell))
    return [
        LiveHotExpert(
            numbers[layer],
            expert,
            float(times[layer, expert]),
            None if now is times else float(now[layer, expert]),
            int(replicas[layer, expert]),
        )
        for layer, expert in (divmod(cell, times.shape[1]) for cell in order)
        if per_replica[layer, expert] >= HOT
    ]
