"""FlashLB of vllm-ascend: placements that fit a series of windows, not only their sum.

It searches how many copies the hotter and the colder experts get, and places the copies so that the mean of
each rank's tokens plus a share of their deviation over the windows is small. Then ranks are renamed so that
few weights move.

Source: ``FlashLB`` of vllm-ascend 0.23.0.post1, ``vllm_ascend/eplb/core/policy/policy_flashlb.py``, as it is
when it starts: later the engine leaves a layer alone while it is balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.slots import keep_slots
from eplb_dump.format.frozen import frozen

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

#: Windows are joined until there are at most so many.
SAMPLES = 64
#: The quantile of the normal distribution at 75%.
Z = 0.6744897501960817
#: Experts are divided into so many parts, by their tokens; the copies of each part but the last are searched.
DEPTH = 4
#: How many copies more or fewer than the first guess are tried.
WIDTH = 8
#: Rows that are placed at once, which bounds memory.
ROWS = 512


def flash_lb(series: Array, steps: int, current: Int32, ranks: int) -> Int32:
    """Place the experts of all layers.

    Args:
        series: tokens of consecutive windows ``[windows, layers, num_logical_experts]``.
        steps: of each window.
        current: the placement in force ``[layers, num_physical_experts]``.

    Returns:
        int32 ``[layers, num_physical_experts]``. A layer stays as it is if the search finds no slot for a
        copy.
    """
    windows = len(series)
    joined = max(1, windows // min(windows, SAMPLES))
    samples = series[len(series) - joined * (windows // joined if windows < SAMPLES else SAMPLES) :]
    # As in the engine, each expert has one token more in each step.
    tokens = samples.reshape(-1, joined, *series.shape[1:]).sum(axis=1) + joined * steps
    loads = _Loads.of(tokens.transpose(1, 0, 2))
    slots = current.shape[1]
    copies = loads.search(slots, ranks)
    found = loads.place(np.arange(len(current)), copies, ranks, slots // ranks)
    placed = current.copy()
    for layer, (old, new) in enumerate(zip(current.reshape(found.shape), found, strict=True)):
        if (new >= 0).all():
            matches = _shared(old, new, loads.mean.shape[1])
            placed[layer] = new[assignment(slots // ranks - matches)].reshape(-1)
    return keep_slots(placed, current, ranks)


def _shared(old: Array, new: Array, experts: int) -> Int64:
    """How many experts a rank of ``old`` and one of ``new`` have in common: ``[ranks, ranks]``."""
    held = np.zeros((2, len(old), experts), np.int64)
    for each, slots in enumerate((old, new)):
        np.add.at(held[each], (np.arange(len(slots))[:, None], slots), 1)
    return np.stack([np.minimum(row, held[1]).sum(axis=1) for row in held[0]])


@frozen
class _Loads:
    """Tokens of the windows and their statistics, by layer."""

    #: ``[layers, windows, experts]``.
    tokens: Array
    #: ``[layers, experts]``.
    mean: Float64
    variance: Float64
    #: ``[layers, experts, experts]``.
    covariance: Float64

    @classmethod
    def of(cls, tokens: Array) -> _Loads:
        layers, windows, experts = tokens.shape
        mean = np.stack([np.mean(own, axis=0) for own in tokens])
        if windows == 1:
            return cls(tokens, mean, np.zeros((layers, experts)), np.zeros((layers, experts, experts)))
        centered = [own - own_mean for own, own_mean in zip(tokens, mean, strict=True)]
        variance = np.stack([np.sum(own**2, axis=0) / (windows - 1) for own in centered])
        covariance = np.stack([(own.T @ own) / (windows - 1) for own in centered])
        return cls(tokens, mean, variance, covariance)

    def search(self, slots: int, ranks: int) -> Int64:
        """The copies of each expert ``[layers, experts]``."""
        layers, experts = self.mean.shape
        risk = self.mean + Z * np.sqrt(self.variance)
        order = np.stack([np.argsort(-row) for row in risk])
        size = -(-experts // DEPTH)
        copies = np.zeros((layers, experts), np.int64)
        spare = np.full(layers, slots - experts)
        searched = np.ones(layers, np.bool_)
        for part in range(DEPTH - 1):
            here, rest = order[:, part * size : (part + 1) * size], order[:, (part + 1) * size :]
            tried, rows = [], []
            for layer in np.flatnonzero(searched).tolist():
                own, others = here[layer], rest[layer]
                left = int(spare[layer])
                first = int(_replicas(risk[layer, order[layer, part * size :]], left)[-1][: len(own)].sum())
                of_own, of_others = _replicas(risk[layer, own], left), _replicas(risk[layer, others], left)
                # With few experts a part is empty, and the engine's result is not defined.
                for extra in _nearby(first - len(own), left) if len(others) else [left]:
                    row = copies[layer].copy()
                    row[own], row[others] = of_own[extra], of_others[left - extra]
                    tried.append((layer, extra))
                    rows.append(row)
            if not rows:
                break
            of_layer = np.array([layer for layer, _ in tried])
            every = np.stack(rows)
            score = self.score(of_layer, every, self.place(of_layer, every, ranks, slots // ranks))
            for layer in np.flatnonzero(searched).tolist():
                own_rows = np.flatnonzero(of_layer == layer)
                best = int(own_rows[score[own_rows].argmin()])
                spare[layer] -= tried[best][1]
                # What the last part gets is settled with the one before; without spare copies, all is.
                if not spare[layer] or part == DEPTH - 2:
                    copies[layer] = every[best]
                    searched[layer] = False
                else:
                    copies[layer, here[layer]] = every[best, here[layer]]
        return copies

    def place(self, layer: Int64, copies: Int64, ranks: int, size: int) -> Int64:
        """Place copies, the one with most tokens first, each on the rank where the risk stays least.

        Args:
            layer: of each row ``[rows]``.
            copies: of each expert ``[rows, experts]``, as many as there are slots.

        Returns:
            The experts of each rank ``[rows, ranks, size]``; -1: none.
        """
        parts = [
            self._place(layer[i : i + ROWS], copies[i : i + ROWS], ranks, size)
            for i in range(0, len(layer), ROWS)
        ]
        return np.concatenate(parts)

    def _place(self, layer: Int64, copies: Int64, ranks: int, size: int) -> Int64:
        rows = np.arange(len(layer))
        share = self.mean[layer] / copies
        order = _ascending(-share)
        sequence = np.stack([np.repeat(own, count[own]) for own, count in zip(order, copies, strict=True)])
        mean, variance = (np.zeros((len(layer), ranks), np.float32) for _ in range(2))
        last = np.full((len(layer), ranks), -1)
        filled = np.zeros((len(layer), ranks), np.int64)
        placed = np.full((len(layer), ranks, size), -1)
        for expert in sequence.T:
            copy = copies[rows, expert]
            with_mean = mean + share[rows, expert][:, None]
            with_variance = variance + (self.variance[layer, expert] / copy**2)[:, None]
            if self.tokens.shape[1] > 1:
                joint = 2 * self.covariance[layer, expert] / copy[:, None] / copies
                # Empty slots are after the filled ones.
                for slot in range(int(filled.max())):
                    held = placed[:, :, min(slot, size - 1)]
                    own = np.take_along_axis(joint, np.maximum(held, 0), 1)
                    with_variance = with_variance + np.where((held >= 0) & (slot < size), own, 0)
            with np.errstate(invalid="ignore"):
                risk = with_mean + Z * np.sqrt(with_variance)
            risk[(filled >= size) | (last == expert[:, None]) | np.isnan(risk)] = np.inf
            rank = risk.argmin(axis=1)
            # The engine puts a copy that fits nowhere on the last rank, if that has room.
            nowhere = np.isinf(risk[rows, rank])
            rank[nowhere] = ranks - 1
            mean[rows, rank] = np.where(nowhere, -1, with_mean[rows, rank])
            variance[rows, rank] = np.where(nowhere, -1, with_variance[rows, rank])
            room = filled[rows, rank] < size
            placed[rows[room], rank[room], filled[rows, rank][room]] = expert[room]
            last[rows, rank] = expert
            filled[rows, rank] += 1
        return placed

    def score(self, layer: Int64, copies: Int64, placed: Int64) -> Float32:
        """The mean over windows of the busiest rank's tokens over the mean rank's: ``[rows]``."""
        ranks = placed.shape[1]
        out = np.empty(len(layer), np.float32)
        for row, (own, count, slots) in enumerate(zip(layer, copies, placed, strict=True)):
            load = (self.tokens[own] / count)[:, slots]
            of_rank = np.cumsum(load, axis=2)[:, :, -1]
            total = np.cumsum(of_rank, axis=1)[:, -1]
            ratio = ((of_rank.max(axis=1) * ranks + 1e-2) / (total + 1e-2)).astype(np.float32)
            # Added up one after another, in float32.
            out[row] = np.cumsum(ratio)[-1] / len(ratio)
        return out


def _replicas(risk: Float64, spare: int) -> Int64:
    """The copies of experts if 0, 1, … ``spare`` redundant ones go to the highest risk per copy, of ties to
    the first: ``[spare + 1, experts]``."""
    out = np.ones((spare + 1, len(risk)), np.int64)
    per_copy = risk.copy()
    for extra in range(1, spare + 1 if len(risk) else 0):
        out[extra] = out[extra - 1]
        chosen = per_copy.argmax()
        out[extra, chosen] += 1
        per_copy[chosen] = risk[chosen] / out[extra, chosen]
    return out


def _nearby(first: int, most: int) -> list[int]:
    """0 to ``most``, those closest to ``first`` first, up to :data:`WIDTH` away."""
    apart = min(max(first, most - first), WIDTH)
    near = [first, *(first + sign * i for i in range(1, apart + 1) for sign in (-1, 1))]
    return [number for number in near if 0 <= number <= most]


def _ascending(keys: Float64) -> Int64:
    """The indices that sort each row ``[rows, n]``, ties in the order of numba's ``argsort``."""
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, 1)
    for row in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        order[row] = _quicksort(keys[row].tolist())
    return order


#: numba leaves ranges up to this length to an insertion sort, which is stable.
SMALL_RANGE = 15


def _quicksort(keys: Sequence[float]) -> list[int]:
    """The indices of ``keys``, ascending, as numba's quicksort leaves them.

    It cuts a range in two around the median of the first, the middle and the last element, down to small
    ranges, which it sorts by insertion.
    """
    order = list(range(len(keys)))
    ranges = [(0, len(keys) - 1)]
    while ranges:
        low, high = ranges.pop()
        if high - low < SMALL_RANGE:
            order[low : high + 1] = sorted(order[low : high + 1], key=keys.__getitem__)
            continue
        middle = (low + high) // 2
        for one, other in ((low, middle), (middle, high), (low, middle)):
            if keys[order[other]] < keys[order[one]]:
                order[one], order[other] = order[other], order[one]
        pivot = keys[order[middle]]
        order[middle], order[high] = order[high], order[middle]
        left, right = low, high - 1
        while True:
            while left < high and keys[order[left]] < pivot:
                left += 1
            while right >= low and pivot < keys[order[right]]:
                right -= 1
            if left >= right:
                break
            order[left], order[right] = order[right], order[left]
            left += 1
            right -= 1
        order[left], order[high] = order[high], order[left]
        ranges += [(low, left - 1), (left + 1, high)]
    return order


def assignment(cost: Int64) -> Int64:
    """The column of each row that minimizes the sum of ``cost`` ``[n, n]``, a permutation ``[n]``.

    Shortest augmenting paths (Crouse, On implementing 2D rectangular assignment algorithms, 2016). Of equally
    good solutions, the one of ``scipy.optimize.linear_sum_assignment``: the order of the columns that are
    left, and free columns before others.
    """
    size = len(cost)
    of_row, of_column = np.zeros(size), np.zeros(size)
    column_of, row_of = np.full(size, -1), np.full(size, -1)
    for start in range(size):
        shortest, came_from = np.full(size, np.inf), np.full(size, -1)
        rows_seen, columns_seen = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        left = list(range(size - 1, -1, -1))
        row, lowest, sink = start, 0.0, -1
        while sink < 0:
            rows_seen[row] = True
            columns = np.array(left)
            path = lowest + cost[row, columns] - of_row[row] - of_column[columns]
            better = path < shortest[columns]
            came_from[columns[better]] = row
            shortest[columns[better]] = path[better]
            lowest = float(shortest[columns].min())
            equal = np.flatnonzero(shortest[columns] == lowest)
            free = equal[row_of[columns[equal]] < 0]
            # The last free column of those equally near, else the first of them.
            at = int(free[-1] if len(free) else equal[0])
            column = left[at]
            if row_of[column] < 0:
                sink = column
            else:
                row = int(row_of[column])
            columns_seen[column] = True
            left[at] = left[-1]
            left.pop()
        of_row[start] += lowest
        others = rows_seen.copy()
        others[start] = False
        of_row[others] += lowest - shortest[column_of[others]]
        of_column[columns_seen] -= lowest - shortest[columns_seen]
        column = sink
        while True:
            row = int(came_from[column])
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of
