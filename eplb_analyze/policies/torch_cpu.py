"""What torch computes on a CPU, bit for bit, in numpy: the order of ties in a sort, the rounding of sums.

The engines' balancers use torch, so this is what it takes to reproduce their placements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Intp = npt.NDArray[np.intp]

#: ``std::sort`` leaves ranges up to this length to its final insertion sort, which is stable.
SMALL_RANGE = 16
#: float32 values in one vector of torch's sum, and the number of vectors that it sums side by side.
LANES, SIDE_BY_SIDE = 8, 4


def descending_order(keys: npt.NDArray[Any], names: npt.NDArray[Any]) -> Intp:
    """``keys.sort(-1, descending=True).indices`` of torch: ``[rows, n]``, no NaN.

    torch calls libstdc++'s ``std::sort``, which is not stable. The order of equal keys of one name is
    arbitrary, so rows whose ties are all of this kind are sorted by numpy. ``names`` is ``[rows, n]``.
    """
    order = np.argsort(-keys, axis=-1, kind="stable")
    if keys.shape[1] > SMALL_RANGE:
        key, name = np.take_along_axis(keys, order, -1), np.take_along_axis(names, order, -1)
        tied = (key[:, 1:] == key[:, :-1]) & (name[:, 1:] != name[:, :-1])
        for row in np.flatnonzero(tied.any(axis=1)):
            order[row] = _introsort(keys[row].tolist())
    return order


def _introsort(keys: list[float]) -> list[int]:
    """The indices of ``keys`` as libstdc++'s ``std::sort`` leaves them, descending.

    Quicksort around the median of the second, the middle and the last element, down to small ranges;
    heapsort of a range that is not small after 2 log2(n) cuts; at last an insertion sort of everything.
    """
    order = list(range(len(keys)))
    ranges = [(0, len(keys), 2 * (len(keys).bit_length() - 1))]
    while ranges:
        first, last, cuts = ranges.pop()
        while last - first > SMALL_RANGE:
            if not cuts:
                order[first:last] = _heapsort(order[first:last], keys)
                break
            cuts -= 1
            middle = first + (last - first) // 2
            a, b, c = keys[order[first + 1]], keys[order[middle]], keys[order[last - 1]]
            if a > b:
                median = middle if b > c else last - 1 if a > c else first + 1
            else:
                median = first + 1 if a > c else last - 1 if b > c else middle
            order[first], order[median] = order[median], order[first]
            pivot = keys[order[first]]
            low, high = first + 1, last - 1
            while True:
                while keys[order[low]] > pivot:
                    low += 1
                while pivot > keys[order[high]]:
                    high -= 1
                if low >= high:
                    break
                order[low], order[high] = order[high], order[low]
                low += 1
                high -= 1
            ranges.append((low, last, cuts))
            last = low
    # Any stable sort gives the result of the insertion sort.
    order.sort(key=keys.__getitem__, reverse=True)
    return order


def _heapsort(heap: list[int], keys: list[float]) -> list[int]:
    """Sort ``heap``, indices of ``keys``, in place and descending, as libstdc++'s heapsort does."""

    def sift(top: int, size: int, item: int) -> None:
        # The hole moves down to a leaf, always to the smaller child; then the item moves up from there.
        hole = top
        while (child := 2 * hole + 2) < size:
            if keys[heap[child]] > keys[heap[child - 1]]:
                child -= 1
            heap[hole] = heap[child]
            hole = child
        if child == size:
            heap[hole] = heap[child - 1]
            hole = child - 1
        while hole > top and keys[heap[parent := (hole - 1) // 2]] > keys[item]:
            heap[hole] = heap[parent]
            hole = parent
        heap[hole] = item

    for top in range(len(heap) // 2 - 1, -1, -1):
        sift(top, len(heap), heap[top])
    for end in range(len(heap) - 1, 0, -1):
        item, heap[end] = heap[end], heap[0]
        sift(0, end, item)
    return heap


def float32_sum(values: Float32) -> Float32:
    """``values.sum(-1)`` of torch for contiguous float32: ``[..., n]`` to ``[...]``, n at most 512.

    Vectors of :data:`LANES` values are added to :data:`SIDE_BY_SIDE` sums; then these one after another, the
    rest of the n values, and at last the lanes. numpy adds in another order, which matters from 2^24 on.
    """
    n = values.shape[-1]
    lanes = LANES if n >= LANES else 1
    count = n // lanes
    vectors = values[..., : count * lanes].reshape(*values.shape[:-1], count, lanes)
    side = np.zeros((*values.shape[:-1], SIDE_BY_SIDE, lanes), np.float32)
    whole = count - count % SIDE_BY_SIDE
    for start in range(0, whole, SIDE_BY_SIDE):
        side += vectors[..., start : start + SIDE_BY_SIDE, :]
    for index in range(whole, count):
        side[..., 0, :] += vectors[..., index, :]
    for index in range(1, SIDE_BY_SIDE):
        side[..., 0, :] += side[..., index, :]
    out = np.zeros(values.shape[:-1], np.float32)
    for index in range(count * lanes, n):
        out += values[..., index]
    for lane in range(lanes):
        out += side[..., 0, lane]
    return out
