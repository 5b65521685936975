"""Statistics of experts over windows of steps: how often each is hot, its bursts, how hot sets drift."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from eplb_dump.format.journal import Int64

#: A layer's hot set in a window is the eighth of its experts with the most tokens.
HOT_SET = 8
LAGS = (1, 2, 5, 10, 20, 50)


class ExpertWindows:
    """Statistics of each expert over windows, and the last hot sets. The windows are not kept."""

    def __init__(self, size: int, hot_factor: float, experts: Int64) -> None:
        """``experts``: how many experts each layer has, int64 ``[layers]``."""
        self.size, self.hot_factor = size, hot_factor
        self._experts = experts
        self.count = 0
        #: Complete steps in the open window.
        self.filled = 0
        self.drift = dict.fromkeys(LAGS, (0.0, 0))
        self._hot_sets: deque[npt.NDArray[np.bool_]] = deque(maxlen=max(LAGS))
        self._open: Int64 | None = None

    @staticmethod
    def hot_set(experts: int) -> int:
        return max(1, experts // HOT_SET)

    def add(self, load: Int64, first: int, last: int, steps: int) -> None:
        """Add logical loads ``[layers, experts]`` summed over ``steps`` steps, all in the open window."""
        if self._open is None:
            self._open, self._first = np.zeros_like(load), first
            if not self.count:
                self.with_tokens = np.zeros((len(load), 1), np.int64)
                self.hot = np.zeros_like(load)
                self.first_hot, self.last_hot = np.full_like(load, -1), np.full_like(load, -1)
                self._sum, self._squares, self.peak = (np.zeros(load.shape) for _ in range(3))
        self._open += load
        self._last = last
        self.filled += steps
        if self.filled == self.size:
            self._close(self._open)

    def finish(self) -> None:
        """Close the last window. Less than half a window is dropped, unless it is the only one."""
        if self._open is not None and (2 * self.filled >= self.size or not self.count):
            self._close(self._open)

    def _close(self, load: Int64) -> None:
        total = load.sum(axis=1, keepdims=True)
        times = np.divide(
            load * self._experts[:, np.newaxis], total, out=np.zeros(load.shape), where=total > 0
        )
        hot = times >= self.hot_factor
        self.hot += hot
        self.first_hot[hot & (self.first_hot < 0)] = self._first
        self.last_hot[hot] = self._last
        self.with_tokens += total > 0
        self._sum += times
        self._squares += times**2
        np.maximum(self.peak, times, out=self.peak)
        self._compare(load)
        self.count += 1
        self._open, self.filled = None, 0

    def _compare(self, load: Int64) -> None:
        """Compare this window's hot sets with those of earlier windows."""
        experts = load.shape[1]
        # Experts with equal loads are ordered by number, so the set is deterministic.
        order = load * experts + np.arange(experts)[::-1]
        cut = np.array([experts - self.hot_set(n) for n in self._experts.tolist()])
        lowest = np.take_along_axis(np.partition(order, np.unique(cut), axis=1), cut[:, np.newaxis], axis=1)
        hottest = (order >= lowest) & (load > 0)
        for lag, (total, pairs) in self.drift.items():
            if lag <= len(self._hot_sets):
                before = self._hot_sets[-lag]
                sizes = np.maximum(hottest.sum(axis=1), before.sum(axis=1))
                both = hottest.any(axis=1) & before.any(axis=1)
                overlap = (hottest & before).sum(axis=1)[both] / sizes[both]
                self.drift[lag] = (total + float(overlap.sum()), pairs + int(both.sum()))
        self._hot_sets.append(hottest)

    @property
    def persistence(self) -> npt.NDArray[np.float64]:
        share: npt.NDArray[np.float64] = self.hot / np.maximum(self.with_tokens, 1)
        return share

    @property
    def burstiness(self) -> npt.NDArray[np.float64]:
        """Standard deviation over mean of the shares; NaN with fewer than two windows with tokens."""
        n = np.maximum(self.with_tokens, 1)
        mean = self._sum / n
        variance = np.maximum(self._squares / n - mean**2, 0)
        known = (mean > 0) & (self.with_tokens > 1)
        out: npt.NDArray[np.float64] = np.full(mean.shape, np.nan)
        return np.divide(np.sqrt(variance), mean, out=out, where=known)
