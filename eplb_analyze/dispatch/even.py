"""Even splitting: each of an expert's c replicas gets n / c of its n tokens. The ideal; no token is half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_analyze.dispatch.rule import Bits, Busiest, Dispatch, Replicas, Tokens, busiest_of
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import EMPTY_SLOT


@frozen
class Even(Dispatch):
    """Every replica of an expert gets the same share of each step's tokens."""

    token_replication: int = 1

    def slot_loads(self, tokens: Tokens, replicas: Replicas) -> Float64:
        """Tokens of each slot: float64 ``[slots, steps]``."""
        slots = replicas.slots
        placed = slots != EMPTY_SLOT
        copies = np.bincount(slots[placed], minlength=len(tokens.load))
        out = np.zeros((len(slots), tokens.load.shape[1]))
        out[placed] = tokens.load[slots[placed]] / copies[slots[placed], np.newaxis]
        return out

    def busiest_rank(
        self, tokens: Tokens, replicas: Replicas, deals: Bits, rates: Sequence[float] = ()
    ) -> Busiest:
        loads = self.slot_loads(tokens, replicas)
        return busiest_of(loads, replicas.ranks, rates, self.token_replication)
