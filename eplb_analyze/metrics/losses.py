"""Which layers, ranks and steps have excess tokens, and how many of them a better placement could save.

In each step and layer all ranks wait for the slowest: (max − mean) tokens are in excess and attributed to
that rank; ranks that tie share them. The sums are of loads of one shape and stay small in any run.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64, Terms, sum_type
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape

#: A run is divided into about this many bins of equally many steps.
BINS = 64
#: Imbalance that remains in loads summed over this many steps is persistent; the rest is random.
WINDOW_STEPS = 128
#: What remains in fewer steps is chance as well. Less than a window, as some of its steps can be incomplete.
LEAST_STEPS = 96


@frozen
class RankLoss:
    """What an EP rank cost the others as the slowest."""

    rank: int
    excess_tokens: float
    #: The share of the whole loss.
    share: float


@frozen
class StretchLoss:
    """Consecutive bins in which one rank cost one layer more than a layer costs on average."""

    layer: int
    rank: int
    first_step: int
    last_step: int
    excess_tokens: float
    #: The share of the whole loss.
    share: float


@frozen
class Bin:
    """One bin of steps; balancedness is None if none of its steps is complete."""

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


class Windows(NamedTuple):
    """Windows of ascending steps that loads are summed over."""

    #: Where each begins in the steps.
    starts: npt.NDArray[np.intp]
    #: Identifies each window within the run.
    keys: list[tuple[int, int]]
    #: The number of steps in each.
    counts: list[int]


@frozen
class _Window:
    """A window that may continue in the steps before or after."""

    key: tuple[int, int]
    steps: int
    #: int64 ``[layers, ep_ranks]``, summed.
    load: Int64


class Losses:
    """Sums over blocks of one shape; those of later steps can be merged into them."""

    def __init__(self, shape: Shape, bins: Bins, per_token: int, serving: int | None = None) -> None:
        """Losses of no steps yet.

        Args:
            per_token: token replication; recorded loads are this many times too large.
            serving: how many ranks serve; the others have no token. Default all.
        """
        self._bins = bins
        self._per_token = per_token
        self._serving = shape.ep_size if serving is None else serving
        self._shape = shape.num_moe_layers, shape.ep_size
        #: By bin, ``[layers, ep_ranks]``; a part of a run has steps in few bins.
        self._by_bin: dict[int, Float64] = {}
        #: Loss that remains in complete windows, in tokens × token replication.
        self._lasting = 0.0
        self._longest = 0
        #: The first and the last window, which other steps may continue.
        self._open: list[_Window] = []

    def add(self, steps: Int64, terms: Terms) -> None:
        layers, ranks = self._shape
        slowest, at = terms.slowest, self._bins.of(steps)
        first, count = int(at[0]), int(at[-1] - at[0]) + 1
        cell = ((at - first)[slowest.step] * layers + slowest.layer) * ranks + slowest.rank
        excess = slowest.share * terms.excess[slowest.step, slowest.layer]
        flat = np.bincount(cell, excess, count * layers * ranks)
        self._add(dict(enumerate(flat.reshape(count, layers, ranks), first)))

    def _add(self, by_bin: dict[int, Float64]) -> None:
        for name in ("_excess", "total"):
            vars(self).pop(name, None)
        for number, excess in by_bin.items():
            own = self._by_bin.get(number)
            # Not in place: arrays from another process may be read-only.
            self._by_bin[number] = excess if own is None else own + excess

    @cached_property
    def _excess(self) -> Float64:
        """float64 ``[bins, layers, ep_ranks]``."""
        every = np.zeros((len(self._bins), *self._shape))
        for number, excess in self._by_bin.items():
            every[number] = excess
        return every

    def add_lasting(self, windows: Windows, first: int, load: npt.NDArray[Any]) -> None:
        """Add loads of some layers, of all steps of these sums.

        Args:
            windows: the result of :func:`windows` for these steps.
            first: index of the first layer.
            load: integers ``[steps, layers, ep_ranks]``.
        """
        kind = sum_type(load, max(windows.counts))
        summed = np.add.reduceat(load, windows.starts, axis=0, dtype=kind).astype(np.int64)
        self._lasting += self._excess_of(summed[1:-1])
        self._longest = max(windows.counts[1:-1], default=0)
        if not self._open:
            ends = {0, len(windows.keys) - 1}
            self._open = [
                _Window(windows.keys[i], windows.counts[i], np.zeros(self._shape, np.int64))
                for i in sorted(ends)
            ]
        for window, own in zip(self._open, (summed[0], summed[-1]), strict=False):
            window.load[first : first + load.shape[1]] = own

    def merge(self, later: Losses) -> None:
        self._add(later._by_bin)
        self._lasting += later._lasting
        self._longest = max(self._longest, later._longest)
        ends, others = self._open, later._open
        if ends and others and ends[-1].key == others[0].key:
            one, other = ends[-1], others[0]
            ends, others = (
                [*ends[:-1], _Window(one.key, one.steps + other.steps, one.load + other.load)],
                others[1:],
            )
        both = [*ends, *others]
        for window in both[1:-1]:
            self._lasting += self._excess_of(window.load)
            self._longest = max(self._longest, window.steps)
        self._open = both if len(both) < 2 else [both[0], both[-1]]

    @cached_property
    def total(self) -> float:
        return float(self._excess.sum())

    @property
    def lasting_share(self) -> float | None:
        """The share of the loss that remains in loads summed over a window: persistent imbalance.

        None if all windows have fewer than ``LEAST_STEPS`` steps.
        """
        if self.longest_window < LEAST_STEPS:
            return None
        lasting = (
            self._lasting + sum(self._excess_of(window.load) for window in self._open)
        ) / self._per_token
        return min(1.0, lasting / self.total) if self.total > 0 else None

    @property
    def longest_window(self) -> int:
        """Steps in the longest window that loads were summed over."""
        return max([self._longest, *(window.steps for window in self._open)])

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

    def _excess_of(self, load: Int64) -> float:
        """Σ (max − mean) of loads ``[..., ep_ranks]``."""
        return float((load.max(axis=-1) - load.sum(axis=-1) / self._serving).sum())

    def _share(self, excess: float) -> float:
        return float(excess / self.total) if self.total > 0 else 0.0


def windows(steps: Int64, changes: list[int], interval: int) -> Windows:
    """The windows that ascending steps lie in, of ``WINDOW_STEPS`` sampled steps each.

    ``changes``: steps at which a placement changed. Nothing is summed across one, since it can end an
    imbalance that would have persisted.
    """
    # The step of the last change, which is the same for parts of a run that do not know of all changes.
    since = np.array([-1, *changes])[np.searchsorted(changes, steps, side="right")]
    number = steps // (WINDOW_STEPS * interval)
    starts = np.flatnonzero((np.diff(since, prepend=-2) != 0) | (np.diff(number, prepend=-1) != 0))
    keys = list(zip(since[starts].tolist(), number[starts].tolist(), strict=True))
    return Windows(starts, keys, np.diff(starts, append=len(steps)).tolist())


def timeline(bins: Bins, steps: Int64, balancedness: Float64) -> list[Bin]:
    """The mean balancedness of each bin."""
    known = ~np.isnan(balancedness)
    at = bins.of(steps[known])
    count = np.bincount(at, minlength=len(bins))
    total = np.bincount(at, balancedness[known], len(bins))
    return [Bin(*bins.range(i), float(total[i] / count[i]) if count[i] else None) for i in range(len(bins))]
