"""What each step adds to the figures of all settings of a replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.metrics.series import BoundedSeries
from eplb_dump.format.journal import Int64

#: The last row: the recorded placements with tokens shared as in the settings.
TODAY = -1
#: The figures of a step; then the efforts of :attr:`Scores.lines`, and the steps that they are of.
ACTIVE, BALANCEDNESS, MAXIMUM, MEAN, ACTIVE_EXPERTS, ON_RANK, ON_NODE = range(7)
FIGURES = 7

#: An effort that has a price: a phase, and an index into :data:`eplb_analyze.metrics.cost.EXCHANGE_RATES`.
Line = tuple[str, int]

ALL = slice(None)


class Scores:
    """Sums over steps, by setting; in a long run a column holds several steps.

    Rows are the settings, then ``TODAY``. If the dispatch of ``TODAY`` is not the one measured, the recorded
    placements with the dispatch measured come before it.

    Attributes:
        ep_size: int ``[rows]``.
        step: int64 ``[columns]``, the first step of each.
        lines: the efforts that have a price.
    """

    def __init__(self, ep_size: Sequence[int], lines: Sequence[Line] = ()) -> None:
        self.ep_size, self.lines = np.array(ep_size), list(lines)
        #: ``[figures, rows, columns]``: see :attr:`active` and the properties after it.
        self._series = BoundedSeries.empty((self.figures, len(ep_size), 0), axis=-1)
        #: Tokens by source and destination rank ``[rows, ranks, ranks]``; None if sources are not known.
        self.flows: Float64 | None = None

    @property
    def figures(self) -> int:
        return FIGURES + 2 * len(self.lines)

    @property
    def step(self) -> Int64:
        return self._series.steps

    @property
    def active(self) -> Float64:
        """How many steps have an active layer."""
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

    @property
    def active_experts(self) -> Float64:
        """Slots with a token of the rank with most of them, the mean over active layers."""
        return self._sum(ACTIVE_EXPERTS)

    @property
    def sent(self) -> Float64:
        """All tokens."""
        total: Float64 = self.mean * self.ep_size[:, np.newaxis]
        return total

    @property
    def crossing(self) -> Float64:
        """Expected tokens that go to another node; NaN if not known."""
        return self.sent - self._sum(ON_NODE)

    def stays(self, row: int, columns: slice = ALL) -> tuple[float, float] | None:
        """The shares of tokens that stay on their rank, and on their node (NaN if not known)."""
        total = float(self.sent[row, columns].sum())
        on_rank, on_node = (float(self._sum(i)[row, columns].sum()) for i in (ON_RANK, ON_NODE))
        return None if math.isnan(on_rank) or not total else (on_rank / total, on_node / total)

    def effort(self, line: Line, row: int, columns: slice) -> Float64:
        """Of the slowest rank, summed over layers, in the steps of the line's phase; 0 if as recorded."""
        return self._sum(FIGURES + self.lines.index(line))[row, columns]

    def steps_of(self, line: Line, columns: slice) -> Float64:
        """How many steps are of the line's phase."""
        return self._sum(FIGURES + len(self.lines) + self.lines.index(line))[TODAY, columns]

    def with_settings(self, other: Scores, count: int) -> Scores:
        """These scores and the first ``count`` rows of others of the same steps, which come first."""
        joined = Scores([*other.ep_size[:count], *self.ep_size], self.lines)
        sums = np.concatenate([other._series.sums[:, :count], self._series.sums], axis=1)
        joined._series = replace(self._series, sums=sums)
        if self.flows is not None and other.flows is not None:
            joined.flows = np.concatenate([other.flows[:count], self.flows])
        return joined

    def take(self, shares: Sequence[tuple[Sequence[int], Scores]]) -> None:
        """Take the rows of others of the same steps: which rows their first ones are, and they."""
        first = shares[0][1]
        sums = np.zeros((self.figures, len(self.ep_size), len(first.step)))
        if first.flows is not None:
            self.flows = np.zeros((len(self.ep_size), *first.flows.shape[1:]))
        for rows, other in shares:
            assert np.array_equal(other.step, first.step)
            sums[:, rows] = other._series.sums[:, : len(rows)]
            if self.flows is not None and other.flows is not None:
                self.flows[rows] = other.flows[: len(rows)]
        self._series = replace(first._series, sums=sums)

    def _sum(self, index: int) -> Float64:
        found: Float64 = self._series.sums[index]
        return found

    def add(self, steps: Int64, sums: Float64) -> None:
        """Add steps ``[n]`` with their sums ``[figures, rows, n]``."""
        self._series.add(steps, sums)

    def balancedness_of(self, row: int, columns: slice = ALL) -> float | None:
        """Mean over the steps with an active layer."""
        active = float(self.active[row, columns].sum())
        return float(self.balancedness[row, columns].sum()) / active if active else None

    def active_experts_of(self, row: int, columns: slice = ALL) -> float | None:
        """Mean over the steps with an active layer; None if it is not known."""
        active = float(self.active[row, columns].sum())
        total = float(self.active_experts[row, columns].sum())
        return total / active if active and not math.isnan(total) else None

    def idle_fraction_of(self, row: int, columns: slice = ALL) -> float | None:
        maximum = float(self.maximum[row, columns].sum())
        return max(0.0, 1 - float(self.mean[row, columns].sum()) / maximum) if maximum else None
