"""Figures of steps in order, kept as sums of consecutive ones, so that memory does not grow with a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.journal import Int64

#: With more than twice as many sums, they are added up in pairs.
MAX_SUMS = 8192


@dataclass
class BoundedSeries:
    """Sums of steps along one axis; in a long run a sum holds several consecutive steps."""

    #: float64, with one sum for each of ``steps`` along ``axis``.
    sums: Float64
    axis: int
    #: int64, the first step of each sum.
    steps: Int64
    steps_per_sum: int = 1

    @classmethod
    def empty(cls, shape: tuple[int, ...], axis: int) -> BoundedSeries:
        """A series without a step; ``shape`` is 0 along the axis."""
        return cls(np.zeros(shape), axis, np.zeros(0, np.int64))

    def add(self, steps: Int64, values: Float64) -> None:
        """Add the next steps with their values."""
        values = sum_groups(values, self.steps_per_sum, self.axis)
        self.sums = np.concatenate([self.sums, values], axis=self.axis)
        self.steps = np.concatenate([self.steps, steps[:: self.steps_per_sum]])
        if len(self.steps) > 2 * MAX_SUMS:
            self.sums, self.steps = sum_groups(self.sums, 2, self.axis), self.steps[::2]
            self.steps_per_sum *= 2


def sum_groups(values: npt.NDArray[Any], size: int, axis: int = 0) -> npt.NDArray[Any]:
    """Sum every ``size`` consecutive values along an axis; the last group may be smaller."""
    sums: npt.NDArray[Any] = np.add.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)
    return sums
