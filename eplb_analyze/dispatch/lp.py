"""The optimum of each step: the least maximum over ranks if tokens may be split freely over replicas.

It is the linear program that DeepSeek's LPLB and SGLang's ``--ep-dispatch-algorithm lp`` solve for each
batch. By linear programming duality, the optimum is the largest mean over all sets of ranks, counting only
the experts whose replicas are all in the set: these tokens cannot leave it, whatever the dispatch.

So every set of ranks gives a lower bound, and every split an upper one. Splits are improved, two replicas at
a time, for many steps at once, until the ranks with most tokens are a set whose mean proves the split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from eplb_analyze.dispatch.rule import Bits, Busiest, Counts, Dispatch, Replicas, Tokens
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT

#: In :class:`LeastMaximum`, a bound is at most this share below the optimum, and never above.
TOLERANCE = 1e-3
#: So many steps are balanced at once: their arrays stay in the cache.
STEPS_AT_ONCE = 2048
#: Sweeps over all pairs of replicas between two looks at the bounds.
SWEEPS = 6
#: After so many sweeps, what is left is solved one step at a time.
MOST_SWEEPS = 120


@frozen
class LeastMaximum(Dispatch):
    """No dispatch of the same placement and tokens has a busiest rank with fewer tokens.

    It bounds tokens, not the number of active experts: efforts are NaN.
    """

    def busiest_rank(
        self, tokens: Tokens, replicas: Replicas, deals: Bits, rates: Sequence[float] = ()
    ) -> Busiest:
        busiest = least_maximum(tokens.load, replicas.slots, replicas.ranks, TOLERANCE)
        inverse = np.divide(1, busiest, out=np.zeros(busiest.shape), where=busiest > 0)
        return busiest, inverse, np.full((len(rates), len(busiest)), np.nan)


def least_maximum(load: Counts, slots: Int32, ranks: int, tolerance: float = 0.0) -> Float64:
    """The least tokens of the busiest rank in each step: float64 ``[steps]``.

    Args:
        load: tokens of each logical expert ``[num_logical_experts, steps]``.
        slots: the logical expert of each slot ``[slots]``; -1: none.
        tolerance: a result may be this share below the optimum; it is never above. 0: but for rounding.
    """
    graph = _Graph(slots, ranks, max(tolerance, 1e-12))
    every = range(0, load.shape[1], STEPS_AT_ONCE)
    parts = [graph.solve(load[:, low : low + STEPS_AT_ONCE]) for low in every]
    return np.concatenate(parts) if parts else np.empty(0)


class _Graph:
    """Which ranks can take the tokens of which expert."""

    def __init__(self, slots: Int32, ranks: int, tolerance: float) -> None:
        self.ranks, self.tolerance = ranks, tolerance
        rank = np.arange(len(slots)) * ranks // len(slots)
        placed = slots != EMPTY_SLOT
        pairs = np.unique(np.stack([slots[placed], rank[placed]]), axis=1)
        expert, first, count = np.unique(pairs[0], return_index=True, return_counts=True)
        #: The experts that are on one rank, and which.
        self.fixed, self.fixed_rank = expert[count == 1], pairs[1, first[count == 1]]
        #: The experts that are on several, and which.
        self.free = expert[count > 1]
        self.on = [pairs[1, f : f + c].tolist() for f, c in zip(first, count, strict=True) if c > 1]

    def solve(self, load: Counts) -> Float64:
        there = (self.fixed_rank == np.arange(self.ranks)[:, np.newaxis]).astype(np.float64)
        base = there @ load[self.fixed]
        free = load[self.free].astype(np.float64)
        out = np.zeros(load.shape[1])
        if not self.on:
            most: Float64 = base.max(axis=0)
            return most
        split = [np.tile(tokens / len(on), (len(on), 1)) for tokens, on in zip(free, self.on, strict=True)]
        state = _Split(base, free, split, self.on)
        at = np.arange(load.shape[1])
        for _ in range(MOST_SWEEPS // SWEEPS):
            low, high = state.bounds()
            out[at] = low
            left = low < high * (1 - self.tolerance)
            if not left.any():
                return out
            if left.sum() < 0.8 * len(left):
                state, at = state.select(left), at[left]
            state.sweep()
        low, high = state.bounds()
        for column, step in enumerate(at.tolist()):
            out[step] = low[column]
            if low[column] < high[column] * (1 - self.tolerance):
                out[step] = _exact(base[:, step], free[:, step], self.on, float(low[column]))
        return out


class _Split:
    """A split of the free experts' tokens in several steps."""

    def __init__(self, base: Float64, free: Float64, split: list[Float64], on: list[list[int]]) -> None:
        """
        Args:
            base: tokens that a rank has anyway ``[ranks, steps]``.
            free: tokens of the free experts ``[experts, steps]``.
            split: of each free expert, the tokens on each of its ranks ``[copies, steps]``.
        """
        self.base, self.free, self.split, self.on = base, free, split, on
        self.total = base.copy()
        for own, ranks in zip(split, on, strict=True):
            self.total[ranks] += own

    def select(self, steps: npt.NDArray[np.bool_]) -> _Split:
        return _Split(
            self.base[:, steps], self.free[:, steps], [own[:, steps] for own in self.split], self.on
        )

    def sweep(self) -> None:
        """Move tokens between two replicas at a time, toward the rank with fewer, forth and back."""
        total = self.total
        pairs = [
            (own[i], own[j], total[ranks[i]], total[ranks[j]])
            for own, ranks in zip(self.split, self.on, strict=True)
            for i, j in _pairs(len(ranks))
        ]
        moved = np.empty(total.shape[1])
        for _ in range(SWEEPS // 2):
            for one, other, on_one, on_other in (*pairs, *reversed(pairs)):
                np.subtract(on_one, on_other, out=moved)
                moved *= 0.5
                np.minimum(moved, one, out=moved)
                np.maximum(moved, -other, out=moved)
                for more in (other, on_other):
                    np.add(more, moved, out=more)
                for less in (one, on_one):
                    np.subtract(less, moved, out=less)

    def bounds(self) -> tuple[Float64, Float64]:
        """A lower and an upper bound of the optimum of each step.

        The lower one is the best of all sets that hold the ranks with most tokens.
        """
        ranks, steps = self.total.shape
        order = np.argsort(-self.total, axis=0, kind="stable")
        place = np.empty_like(order)
        column = np.arange(steps)
        np.put_along_axis(place, order, np.arange(ranks)[:, np.newaxis], axis=0)
        inside = np.take_along_axis(self.base, order, axis=0)
        for tokens, on in zip(self.free, self.on, strict=True):
            inside[place[on].max(axis=0), column] += tokens
        size = np.arange(1, ranks + 1)[:, np.newaxis]
        low: Float64 = (np.cumsum(inside, axis=0) / size).max(axis=0)
        return low, self.total.max(axis=0)


def _pairs(copies: int) -> list[tuple[int, int]]:
    """Pairs of replicas that connect all: a ring."""
    return [(0, 1)] if copies == 2 else [(i, (i + 1) % copies) for i in range(copies)]


def _exact(base: Float64, free: Float64, on: list[list[int]], low: float) -> float:
    """The optimum of one step, by flows: if the tokens do not fit below a bound, a cut shows a better one.

    Args:
        base: tokens that a rank has anyway ``[ranks]``.
        free: tokens of the free experts; ``on`` lists their ranks.
        low: a lower bound.
    """
    low = max(low, float(base.max()))
    for _ in range(len(base) + len(on)):
        full = _full_ranks(base, free, on, low)
        if not full:
            return low
        inside = base[full].sum() + sum(
            tokens for tokens, ranks in zip(free.tolist(), on, strict=True) if set(ranks) <= set(full)
        )
        better = float(inside) / len(full)
        if better <= low * (1 + 1e-12):
            return low
        low = better
    return low


def _full_ranks(base: Float64, free: Float64, on: list[list[int]], limit: float) -> list[int]:
    """The ranks that cannot take all of their tokens if none may have more than ``limit``; none: all fit."""
    room = (limit - base).tolist()
    sent: list[dict[int, float]] = [dict.fromkeys(ranks, 0.0) for ranks in on]
    here: dict[int, list[int]] = {rank: [] for rank in range(len(base))}
    for expert, ranks in enumerate(on):
        for rank in ranks:
            here[rank].append(expert)
    least = 1e-9 * max(1.0, limit)
    for expert in np.argsort([len(ranks) for ranks in on]).tolist():
        left = float(free[expert])
        while left > least:
            found = _path(expert, on, here, room, sent, least)
            if isinstance(found, set):
                return sorted(found)
            path, capacity = found
            amount = min(left, capacity)
            for index, (to, rank) in enumerate(path):
                sent[to][rank] += amount
                if index + 1 < len(path):
                    sent[path[index + 1][0]][rank] -= amount
            room[path[-1][1]] -= amount
            left -= amount
    return [rank for rank, own in enumerate(room) if own < -least]


def _path(
    expert: int,
    on: list[list[int]],
    here: dict[int, list[int]],
    room: list[float],
    sent: list[dict[int, float]],
    least: float,
) -> tuple[list[tuple[int, int]], float] | set[int]:
    """A way to send more of an expert's tokens, moving others along; or the ranks that are full together.

    A path is ``(expert, rank that takes more of it)``; the next expert has as many fewer on that rank.
    """
    before: dict[int, tuple[int, int | None]] = {}  # rank: the expert sent to it, and the rank it comes from
    queue: list[tuple[int, int | None]] = [(expert, None)]
    while queue:
        mover, source = queue.pop(0)
        for rank in on[mover]:
            if rank in before:
                continue
            before[rank] = (mover, source)
            if room[rank] > least:
                return _walk(rank, before, room, sent)
            queue += [(other, rank) for other in here[rank] if sent[other][rank] > least]
    return set(before)


def _walk(
    rank: int, before: dict[int, tuple[int, int | None]], room: list[float], sent: list[dict[int, float]]
) -> tuple[list[tuple[int, int]], float]:
    path: list[tuple[int, int]] = []
    capacity, at = room[rank], rank
    while True:
        mover, source = before[at]
        path.append((mover, at))
        if source is None:
            return path[::-1], capacity
        capacity = min(capacity, sent[mover][source])
        at = source
