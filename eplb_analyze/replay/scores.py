"""What each step adds to the figures of all settings of a replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.metrics.series import BoundedSeries
from eplb_dump.format.journal import Int64

#: The rows after those of the settings: the recorded placements split evenly, and the loads as recorded.
TODAY, MEASURED = -2, -1
#: The figures of a step.
ACTIVE, BALANCEDNESS, MAXIMUM, MEAN = range(4)

ALL = slice(None)


class Scores:
    """Sums over steps, by setting; in a long run a column holds several steps.

    Rows are the settings, then ``TODAY`` and ``MEASURED``.

    Attributes:
        ep_size: int ``[rows]``.
        step: int64 ``[columns]``, the first step of each.
    """

    def __init__(self, ep_size: Sequence[int]) -> None:
        self.ep_size = np.array(ep_size)
        #: ``[4, rows, columns]``: see :attr:`active` and the properties after it.
        self._series = BoundedSeries.empty((4, len(ep_size), 0), axis=-1)

    @property
    def step(self) -> Int64:
        return self._series.steps

    @property
    def active(self) -> Float64:
        """How many steps have an active layer.

        Rows differ if all tokens of a step are on slots that hold no expert: only ``MEASURED`` counts them.
        """
        return self._sum(ACTIVE)

    @property
    def balancedness(self) -> Float64:
        return self._sum(BALANCEDNESS)

    @property
    def maximum(self) -> Float64:
        """Tokens of the busiest rank of each layer."""
        return self._sum(MAXIMUM)

    @property
    def mean(self) -> Float64:
        """Tokens of the mean rank of each layer."""
        return self._sum(MEAN)

    def _sum(self, index: int) -> Float64:
        found: Float64 = self._series.sums[index]
        return found

    def add(self, steps: Int64, sums: Float64) -> None:
        """Add steps ``[n]`` with their sums ``[4, rows, n]``."""
        self._series.add(steps, sums)

    def balancedness_of(self, row: int, columns: slice = ALL) -> float | None:
        """Mean over the steps with an active layer."""
        active = float(self.active[row, columns].sum())
        return float(self.balancedness[row, columns].sum()) / active if active else None

    def idle_fraction_of(self, row: int, columns: slice = ALL) -> float | None:
        maximum = float(self.maximum[row, columns].sum())
        return max(0.0, 1 - float(self.mean[row, columns].sum()) / maximum) if maximum else None
