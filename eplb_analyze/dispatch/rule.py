"""What a dispatch is: from tokens of experts to the tokens of the busiest rank, for one layer.

Arrays have the steps last: what is done to an expert, a slot or a rank is done to consecutive numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.cost import effort_of
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.journal import Int32, Int64

Bits = npt.NDArray[np.uint32]
Counts = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a layer in some steps."""

    #: Whole tokens of each logical expert, integers ``[num_logical_experts, steps]``.
    load: Counts
    #: How many tokens were routed in each step, each as many times as in ``load``; 0 or less: not known.
    routed: Int64 | None = None
    #: How many of them a rank had in its batch, the mean over ranks; 0 or less: not known.
    batch: Int64 | None = None
    #: ``load`` of each source rank, if it is known and the dispatch depends on it.
    by_source: Sequence[Counts] | None = None

    def within(self, part: slice) -> Tokens:
        """The tokens of some of the steps."""
        return Tokens(
            self.load[:, part],
            None if self.routed is None else self.routed[part],
            None if self.batch is None else self.batch[part],
            None if self.by_source is None else [load[:, part] for load in self.by_source],
        )


@dataclass(frozen=True, eq=False)
class Replicas:
    """Where the replicas of a layer's experts are."""

    #: The logical expert of each slot ``[slots]``; -1: none.
    slots: Int32
    ranks: int
    #: The slot that a source rank sends an expert's tokens to, ``[ranks, num_logical_experts]``; -1: any of
    #: the expert's. None: any, from every rank.
    chosen: Int32 | None = None


#: Of the busiest rank, each the mean over deals: its tokens and their inverse (0 if there are none), float64
#: ``[steps]``; and the effort of the slowest rank at each rate ``[len(rates), steps]``.
Busiest = tuple[Float64, Float64, Float64]


class Dispatch(ABC):
    """How the tokens of an expert are shared by its replicas."""

    @abstractmethod
    def busiest_rank(
        self, tokens: Tokens, replicas: Replicas, deals: Bits, rates: Sequence[float] = ()
    ) -> Busiest:
        """The busiest rank in each step.

        Args:
            deals: random bits for each deal ``[deals, n, steps]``; n at least
                :func:`~eplb_analyze.dispatch.deal.replica_draws`.
            rates: of :data:`~eplb_analyze.metrics.cost.EXCHANGE_RATES`.
        """


def busiest_of(slot_loads: Counts, ranks: int, rates: Sequence[float], token_replication: int = 1) -> Busiest:
    """The busiest rank, given the tokens of each slot ``[slots, steps]``.

    A slot with less than a token, which even splitting makes, is active in that share of steps.
    """
    tokens = rank_loads(slot_loads, ranks)
    busiest = tokens.max(axis=0).astype(np.float64)
    inverse = np.divide(1, busiest, out=np.zeros(busiest.shape), where=busiest > 0)
    slowest = np.zeros((len(rates), len(busiest)))
    if len(rates):
        if np.issubdtype(slot_loads.dtype, np.integer):
            active = rank_loads(slot_loads > 0, ranks).astype(np.float32)
        else:
            active = rank_loads(np.minimum(slot_loads / token_replication, 1), ranks).astype(np.float32)
        counts = (tokens / token_replication).astype(np.float32)
        if (active == active[0]).all():  # the rank with the most tokens is the slowest at every rate
            most = counts.max(axis=0)
            slowest[:] = [effort_of(active[0], most, rate) for rate in rates]
        else:
            for row, rate in zip(slowest, rates, strict=True):
                row[:] = effort_of(active, counts, rate).max(axis=0)
    return busiest, inverse, slowest


def rank_loads(load: Counts, ranks: int) -> Counts:
    """Sum loads ``[slots, steps]`` by rank, or count those that are True: ``[ranks, steps]``."""
    slots = load.reshape(ranks, -1, load.shape[1])
    counted = load.dtype
    if counted == np.bool_:
        counted = np.dtype(np.uint8 if slots.shape[1] < 1 << 8 else np.uint16)
        slots = slots.view(np.uint8)  # a sum of the same type is much faster
    total: Counts = slots.sum(axis=1, dtype=counted)
    return total
