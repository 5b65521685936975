"""One setting while it is replayed: when it rearranges, from which loads, and what that moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies import policy as policies
from eplb_analyze.policies.policy import Policy, Problem
from eplb_analyze.reader.placements import crossings, holdings
from eplb_analyze.reader.recorded_setting import Setting
from eplb_dump.format.journal import Int32, Int64

#: Policies that use only the sum of a window; others, a user's too, also get it in parts.
SUM_ONLY = frozenset(policies.POLICIES) - {"flash_lb", "active_experts"}
#: A window is divided into so many parts; with fewer steps, into single steps.
PARTS = 64

#: Placements by the step from which each holds.
Placed = list[tuple[int, Int32]]


@dataclass(frozen=True)
class Move:
    """A rearrangement: the step from which it holds, and the expert weights that ranks fetch for it."""

    step: int
    #: Weights that ranks did not hold before, of all layers; and those of the rank that fetches most.
    weights: int
    #: Of these, the weights of the rank that fetches most.
    busiest_rank: int

    @classmethod
    def of(cls, step: int, old: Int32, new: Int32, ep_size: int, num_logical_experts: int) -> Move:
        """``old`` and ``new`` are placements ``[layers, num_physical_experts]``."""
        fetched = np.zeros(ep_size, np.int64)
        for before, after in zip(old, new, strict=True):
            if not np.array_equal(before, after):
                held = [holdings(slots, ep_size, num_logical_experts) for slots in (before, after)]
                fetched += crossings(held[0], held[1])
        return cls(step, int(fetched.sum()), int(fetched.max()))


class PrefixSums:
    """Tokens of each logical expert since the first step, at the steps where a window begins or ends."""

    def __init__(self, layers: int, experts: int, first: int) -> None:
        self._first = first
        self._total = np.zeros((layers, experts), np.int64)
        self._at: dict[int, Int64] = {}
        #: Steps so far, and at the same edges.
        self._steps, self._steps_at = 0, dict[int, int]()

    def add(
        self, steps: Int64, loads: Iterable[npt.NDArray[Any]], edges: Iterable[int], pool: Executor
    ) -> None:
        """Add a block.

        Args:
            loads: for each layer ``[steps, experts]``.
            edges: where windows begin or end in this block; :meth:`between` takes them from now on.
        """
        ordered = sorted(set(edges))
        rows = [0, *np.searchsorted(steps, ordered).tolist(), len(steps)]

        def sums(load: npt.NDArray[Any]) -> Int64:
            pieces = (load[low:high] for low, high in itertools.pairwise(rows))
            return np.stack([piece.sum(axis=0, dtype=np.int64) for piece in pieces])

        parts = np.stack(list(pool.map(sums, loads)), axis=1)
        for edge, row, part in zip(ordered, rows[1:-1], parts[:-1], strict=True):
            self._total = self._total + part
            self._at[edge], self._steps_at[edge] = self._total, self._steps + row
        self._total = self._total + parts[-1]
        self._steps += len(steps)

    def between(self, first: int, end: int) -> Int64:
        """Tokens of steps ``first`` to ``end - 1``: int64 ``[layers, experts]``."""
        return self._at[end] - (self._at[first] if first >= self._first else 0)

    def series(self, edges: Iterable[int]) -> tuple[Int64, int]:
        """Tokens between consecutive edges ``[windows, layers, experts]``, and the steps of each window.

        Windows without steps are left out; the number of steps is the mean of the others, rounded.
        """
        pairs = itertools.pairwise(edges)
        counted = [(a, b, self._steps_at[b] - self._steps_at.get(a, 0)) for a, b in pairs if b > self._first]
        found = [(self.between(a, b), steps) for a, b, steps in counted if steps]
        count = sum(steps for _, steps in found)
        return np.stack([tokens for tokens, _ in found]), max(1, round(count / len(found)))

    def forget(self, before: int) -> None:
        for edge in [edge for edge in self._at if edge < before]:
            del self._at[edge], self._steps_at[edge]


class SettingRun:
    """One setting, played block by block."""

    def __init__(
        self,
        setting: Setting,
        policy: Policy,
        placement: Int32,
        origin: int,
        num_nodes: int,
        num_groups: int,
        experts: Int64 | None = None,
    ) -> None:
        """``experts``: how many experts each layer has; default all."""
        self.setting, self._experts = setting, experts
        self.slots = placement.shape[1]
        self.window = setting.window or 0
        self.moves: list[Move] = []
        #: The placements in the current block; the first was in force when it began.
        self.placed: Placed = [(-1, placement)]
        #: All placements, if asked for.
        self.kept: Placed | None = None
        #: Called with each rearrangement: the step from which it holds, and the placement.
        self.on_move: Callable[[int, Int32], None] | None = None
        self._policy, self._nodes, self._groups = policy, num_nodes, num_groups
        self._first = origin + (setting.start or 0)
        count = 0 if setting.policy in SUM_ONLY else min(PARTS, self.window)
        #: How long before a rearrangement the parts of its window begin, the first one first.
        self._parts = [part * (self.window // count) for part in range(count, -1, -1)] if count else []

    def window_edges(self, after: int, steps: Int64) -> Iterator[int]:
        """The steps of a block where windows begin or end, also windows that end in a later block."""
        for before in sorted({0, self.window, *self._parts}):
            ends = self._due(after, steps, after + before, int(steps[-1]) + before)
            yield from (end - before for end in ends)

    def play(self, past: PrefixSums, after: int, steps: Int64) -> None:
        """Rearrange when due in a block; ``after`` is the last step before it. Raises UsageError."""
        self.placed = self.placed[-1:]
        for step in self._due(after, steps, after, int(steps[-1])):
            weight = past.between(step - self.window, step)
            if not weight.any():
                continue
            current = self.placed[-1][1]
            size = self.slots, self.setting.ep_size, self._nodes, self._groups
            series, each = (
                past.series([step - before for before in self._parts]) if self._parts else (None, 1)
            )
            problem = Problem(weight, *size, current, self._experts, series, each)
            new = policies.place(self._policy, problem)
            self.moves.append(Move.of(step, current, new, self.setting.ep_size, weight.shape[1]))
            self.placed.append((step, new))
            if self.on_move is not None:
                self.on_move(step, new)
        if self.kept is not None:
            self.kept += self.placed[1:]

    def _due(self, after: int, steps: Int64, low: int, high: int) -> Iterator[int]:
        """The steps in ``(low, high]`` from which new placements hold, if their window has a step.

        An engine's step numbers may jump so far that those of the gap cannot be iterated over.
        """
        known = np.concatenate([[after], steps])
        for gap in np.flatnonzero(np.diff(known) > self.window):
            yield from self._multiples(low, min(high, int(known[gap]) + self.window))
            low = max(low, int(known[gap + 1]))
        yield from self._multiples(low, high)

    def _multiples(self, low: int, high: int) -> range:
        interval = self.setting.interval
        if interval is None:
            return range(0)
        return range(self._first + max(0, (low - self._first) // interval + 1) * interval, high + 1, interval)
