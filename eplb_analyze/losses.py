"""Where and when rank time was lost, and how much of it a better placement could have saved.

In a step and layer all ranks wait for the slowest: (max − mean) tokens are lost, and laid at that
rank's door. Sums of one shape of loads, small however long the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics import Float64, Terms
from eplb_dump.journal import Int64, Shape

#: A run's time is looked at in about this many equal parts.
BINS = 64
#: Loads summed over this many steps show what lasts; what is gone in the sum was chance.
WINDOW_STEPS = 128


@dataclass(frozen=True)
class RankLoss:
    """What an EP rank cost the others as the slowest."""

    rank: int
    excess_tokens: float
    #: Of all loss.
    share: float


@dataclass(frozen=True)
class StretchLoss:
    """Steps in which one rank cost one layer more than a layer costs on average."""

    layer: int
    rank: int
    first_step: int
    last_step: int
    excess_tokens: float
    #: Of all loss.
    share: float


@dataclass(frozen=True)
class Bin:
    """One part of the run's time; None where none of its steps is complete."""

    first_step: int
    last_step: int
    balancedness: float | None


class Bins:
    """Equal parts of a range of steps."""

    def __init__(self, first: int, last: int) -> None:
        self.width = max(1, -(-(last - first + 1) // BINS))
        self.edges = np.arange(first, last + 1, self.width)
        self.last = last

    def __len__(self) -> int:
        return len(self.edges)

    def of(self, steps: Int64) -> npt.NDArray[np.intp]:
        return np.searchsorted(self.edges, steps, side="right") - 1

    def range(self, index: int) -> tuple[int, int]:
        first = int(self.edges[index])
        return first, min(first + self.width - 1, self.last)


class Losses:
    """Sums over blocks of one shape; those of later steps can be merged into them."""

    def __init__(self, shape: Shape, bins: Bins) -> None:
        self._bins = bins
        self._excess = np.zeros((len(bins), shape.num_moe_layers, shape.ep_size))
        self._lasting = 0.0
        #: Steps in the longest window that loads were summed over.
        self.longest_window = 0

    def add(self, steps: Int64, terms: Terms) -> None:
        excess = terms.maximum - terms.mean
        _, layers, ranks = self._excess.shape
        cell = (self._bins.of(steps)[:, None] * layers + np.arange(layers)) * ranks + terms.slowest
        flat = np.bincount(cell.ravel(), excess.ravel(), self._excess.size)
        self._excess += flat.reshape(self._excess.shape)

    def add_lasting(self, windows: npt.NDArray[np.intp], load: Int64, per_token: int) -> None:
        """Add what remains of the loss in loads summed over windows.

        Args:
            windows: where each of them begins (see :func:`windows`).
            load: int64 ``[steps, layers, ep_ranks]``, of some layers.
        """
        longest = int(np.diff(windows, append=len(load)).max())
        self.longest_window = max(self.longest_window, longest)
        summed = np.add.reduceat(load, windows, axis=0)
        excess = summed.max(axis=2) - summed.sum(axis=2) / summed.shape[2]
        self._lasting += float(excess.sum()) / per_token

    def merge(self, later: Losses) -> None:
        self._excess = self._excess + later._excess
        self._lasting += later._lasting
        self.longest_window = max(self.longest_window, later.longest_window)

    @property
    def total(self) -> float:
        return float(self._excess.sum())

    @property
    def lasting_share(self) -> float | None:
        """The share of the loss that remains in loads summed over a window: persistent imbalance."""
        return min(1.0, self._lasting / self.total) if self.total > 0 else None

    def by_rank(self) -> list[RankLoss]:
        """Every rank, the costliest first."""
        excess = self._excess.sum(axis=(0, 1))
        order = np.argsort(-excess, kind="stable")
        return [RankLoss(int(r), float(excess[r]), self._share(excess[r])) for r in order]

    def stretches(self, count: int) -> list[StretchLoss]:
        """The costliest (layer, rank, steps)."""
        lossy = int(np.count_nonzero(self._excess.sum(axis=2)))
        usual = self.total / max(1, lossy)
        high = self._excess > usual
        found: list[StretchLoss] = []
        for layer, rank in np.argwhere(high.any(axis=0)):
            edges = np.diff(high[:, layer, rank].astype(np.int8), prepend=0, append=0)
            for low, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
                excess = float(self._excess[low:end, layer, rank].sum())
                first, last = self._bins.range(int(low))[0], self._bins.range(int(end) - 1)[1]
                found.append(StretchLoss(int(layer), int(rank), first, last, excess, self._share(excess)))
        return sorted(found, key=lambda s: (-s.excess_tokens, s.layer, s.rank, s.first_step))[:count]

    def _share(self, excess: float) -> float:
        return float(excess / self.total) if self.total > 0 else 0.0


def windows(steps: Int64, changes: list[int]) -> npt.NDArray[np.intp]:
    """Where each window of ``WINDOW_STEPS`` begins in ascending steps.

    ``changes``: steps at which a placement changed. Nothing is summed across one, as it can end what
    would have lasted.
    """
    window = np.searchsorted(changes, steps, side="right") * (int(steps[-1]) + WINDOW_STEPS)
    return np.flatnonzero(np.diff(window + steps // WINDOW_STEPS, prepend=-1))


def timeline(bins: Bins, steps: Int64, balancedness: Float64) -> list[Bin]:
    """The mean of each part of the run's time."""
    known = ~np.isnan(balancedness)
    at = bins.of(steps[known])
    count = np.bincount(at, minlength=len(bins))
    total = np.bincount(at, balancedness[known], len(bins))
    return [Bin(*bins.range(i), float(total[i] / count[i]) if count[i] else None) for i in range(len(bins))]
