"""Which experts explain that a layer's slowest rank has more or fewer tokens in one run than in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import PlacementHistory, fold, placed_sums, replicas
from eplb_dump.format.frozen import frozen

#: An expert is named if it explains at least this part of its layer's difference,
MIN_PART = 0.25
#: and if a replica's tokens changed by at least this factor,
MIN_FACTOR = 1.25
#: and by so many times the difference between the halves of either run.
DRIFT = 2.0
#: At most so many experts are named.
MAX_EXPERTS = 100


@frozen
class ExpertDifference:
    """An expert whose replicas got more or fewer tokens.

    Attributes:
        part: of the layer's difference in max / mean tokens of the ranks, the part that one replica's tokens
            explain: 1 if the slowest rank has just this replica's tokens more or less. At most 1.
        share_a, share_b: of the layer's tokens.
        replicas_a, replicas_b: the mean over the expert's tokens; None if it has no token.
    """

    layer: int
    expert: int
    part: float
    share_a: float
    share_b: float
    replicas_a: float | None
    replicas_b: float | None


class ExpertSums:
    """Sums over the two halves of a run.

    Attributes:
        tokens: float64 ``[2, layers, experts]``.
        per_replica: likewise the tokens of one replica: under each placement, an expert's tokens divided by
            its replicas.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.tokens, self.per_replica = np.zeros((2, 2, layers, experts))

    def add(self, half: int, block: Block, history: PlacementHistory) -> None:
        experts = self.tokens.shape[-1]
        for layer, slots, load in placed_sums(block, history):
            tokens = fold(load, slots, experts)
            self.tokens[half, layer] += tokens
            self.per_replica[half, layer] += tokens / np.maximum(1, replicas(slots, experts))


class _Layer(NamedTuple):
    """One layer of one run, float64 ``[experts]`` each."""

    share: Float64
    per_replica: Float64
    #: The difference of ``per_replica`` between the halves of the run.
    drift: Float64

    @classmethod
    def of(cls, sums: ExpertSums, layer: int) -> _Layer:
        """``per_replica`` and ``drift`` are shares of the layer's tokens, too."""
        tokens, per_replica = sums.tokens[:, layer], sums.per_replica[:, layer]
        halves = per_replica / np.maximum(1.0, tokens.sum(axis=1, keepdims=True))
        total = max(1.0, float(tokens.sum()))
        return cls(
            tokens.sum(axis=0) / total, per_replica.sum(axis=0) / total, np.abs(np.diff(halves, axis=0)[0])
        )

    def replicas(self, expert: int) -> float | None:
        one = float(self.per_replica[expert])
        return float(self.share[expert]) / one if one else None


def expert_differences(
    a: ExpertSums, b: ExpertSums, layers: Sequence[tuple[int, int, float]], ep_sizes: tuple[int, int]
) -> list[ExpertDifference]:
    """The experts that explain the layers' differences; those of the first layers first.

    Args:
        layers: index, number and difference, B − A, of max / mean tokens of the ranks.
    """
    found: list[ExpertDifference] = []
    for index, number, slower in layers:
        one, other = _Layer.of(a, index), _Layer.of(b, index)
        # In units of the mean rank's tokens, like max / mean.
        change = other.per_replica * ep_sizes[1] - one.per_replica * ep_sizes[0]
        part = change / slower if slower else np.zeros(len(change))
        low, high = np.sort([one.per_replica, other.per_replica], axis=0)
        known = (part >= MIN_PART) & (high >= MIN_FACTOR * low)
        known &= high - low > DRIFT * np.maximum(one.drift, other.drift)
        found += [
            ExpertDifference(
                number, expert, min(1.0, float(part[expert])),
                float(one.share[expert]), float(other.share[expert]),
                one.replicas(expert), other.replicas(expert),
            )
            for expert in sorted(np.flatnonzero(known).tolist(), key=lambda e: -part[e])
        ]  # fmt: skip
        if len(found) >= MAX_EXPERTS:
            break
    return found[:MAX_EXPERTS]
