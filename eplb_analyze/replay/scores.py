"""What each step adds to the figures of all settings of a replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.journal import Int64

#: With twice as many columns, they are added up in pairs, so that memory does not grow with a run.
MAX_COLUMNS = 8192
#: The rows after those of the settings: the recorded placements split evenly, and the loads as recorded.
TODAY, MEASURED = -2, -1
#: The first axis of :attr:`Scores.sums`.
ACTIVE, BALANCEDNESS, MAXIMUM, MEAN = range(4)


@dataclass
class Scores:
    """Sums over steps, by setting; in a long run a column holds several steps.

    Rows are the settings, then ``TODAY`` and ``MEASURED``.
    """

    #: int ``[rows]``.
    ep_size: Int64
    #: int64 ``[columns]``, the first step of each.
    step: Int64
    #: float64 ``[4, rows, columns]``: see :attr:`active` and the properties after it.
    sums: Float64
    steps_per_column: int = 1

    @classmethod
    def empty(cls, ep_size: Sequence[int]) -> Scores:
        return cls(np.array(ep_size), np.empty(0, np.int64), np.empty((4, len(ep_size), 0)))

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
        found: Float64 = self.sums[index]
        return found

    def add(self, steps: Int64, sums: Float64) -> None:
        """Add steps ``[n]`` with their ``sums`` ``[4, rows, n]``."""
        step, sums = _downsample(steps, sums, self.steps_per_column)
        self.step = np.concatenate([self.step, step])
        self.sums = np.concatenate([self.sums, sums], axis=-1)
        if len(self.step) > 2 * MAX_COLUMNS:
            self.step, self.sums = _downsample(self.step, self.sums, 2)
            self.steps_per_column *= 2

    def part(self, columns: slice) -> Scores:
        return Scores(self.ep_size, self.step[columns], self.sums[..., columns], self.steps_per_column)

    def balancedness_of(self, row: int) -> float | None:
        """Mean over the steps with an active layer."""
        active = float(self.active[row].sum())
        return float(self.balancedness[row].sum()) / active if active else None

    def idle_fraction_of(self, row: int) -> float | None:
        maximum = float(self.maximum[row].sum())
        return max(0.0, 1 - float(self.mean[row].sum()) / maximum) if maximum else None


def _downsample(step: Int64, sums: Float64, count: int) -> tuple[Int64, Float64]:
    """Add up every ``count`` columns; the last sum may be of fewer."""
    return step[::count], np.add.reduceat(sums, np.arange(0, len(step), count), axis=-1)
