"""How a recording's replicas share their expert's tokens, and the dispatch that explains it."""

from __future__ import annotations

import numpy as np

from eplb_analyze.dispatch.deal import Dealt
from eplb_analyze.dispatch.rule import Counts
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT


class Spread:
    """How unevenly recorded replicas share their expert's tokens, to be added up over steps and layers."""

    def __init__(self, token_replication: int = 1) -> None:
        self._token_replication = token_replication
        #: Squared deviations from an even split; those expected if each token goes to any replica.
        self.observed = self.expected = 0.0
        #: Independent deviations.
        self.degrees = 0

    def add(self, load: Counts, slots: Int32) -> None:
        """Add tokens of each slot ``[steps, slots]`` under the placement ``slots``, -1 where no expert is."""
        experts, copies = np.unique(slots[slots != EMPTY_SLOT], return_counts=True)
        for expert in experts[copies > 1]:
            own = load[:, slots == expert] / self._token_replication
            mean = own.mean(axis=1, keepdims=True)
            self.observed += float(np.square(own - mean).sum())
            # Of n tokens each of c replicas gets a number with the variance n (1 / c) (1 - 1 / c).
            self.expected += float(mean.sum()) * (own.shape[1] - 1)
            self.degrees += int(np.count_nonzero(mean)) * (own.shape[1] - 1)

    @property
    def ratio(self) -> float | None:
        """1 for independent tokens, near 0 for tokens dealt in rounds, above 1 if they stick together."""
        return self.observed / self.expected if self.expected else None

    def dispatch(self) -> Dealt:
        """The dispatch that explains it, less three standard errors of the ratio of independent tokens."""
        share = 0.0 if self.ratio is None else max(0.0, 1 - self.ratio - 3 * (2 / self.degrees) ** 0.5)
        return Dealt(share, self._token_replication)
