"""One setting while it is replayed: when it rearranges, from which loads, and what that moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.policies import policy as policies
from eplb_analyze.policies.policy import Policy, Problem
from eplb_analyze.reader.recorded_setting import UTILIZATION_STEPS, Setting
from eplb_analyze.replay.conditions import fetched, in_parts, limited, worst_balancedness
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64

#: Policies that use only the sum of a window; others, a user's too, also get it in parts.
SUM_ONLY = frozenset(policies.POLICIES | policies.WITH_SOURCES) - {"flash_lb", "active_experts"}
#: A window is divided into so many parts; with fewer steps, into single steps.
PARTS = 64

#: Placements by the step from which each holds.
Placed = list[tuple[int, Int32]]
#: SGLang's utilization of some steps of a block, given their part of it and a placement of all layers.
Utilization = Callable[[slice, Int32], Float64]


@frozen
class Move:
    """A rearrangement: the step from which it holds, and the expert weights that ranks fetch for it."""

    step: int
    #: Weights that ranks did not hold before, of all layers; and those of the rank that fetches most.
    weights: int
    #: How many of these the rank that fetches most gets.
    busiest_rank: int

    @classmethod
    def of(cls, step: int, old: Int32, new: Int32, ep_size: int, num_logical_experts: int) -> Move:
        """``old`` and ``new`` are placements ``[layers, num_physical_experts]``."""
        changed = (old != new).any(axis=1)
        if not changed.any():
            return cls(step, 0, 0)
        weights = fetched(old[changed], new[changed], ep_size, num_logical_experts).sum(axis=0)
        return cls(step, int(weights.sum()), int(weights.max()))


def uses_sources(policy: str) -> bool:
    """Whether a policy gets the tokens of each source rank, if they are known; a user's own does."""
    return policy not in policies.POLICIES


def window_parts(policy: str, window: int) -> list[int]:
    """How many steps before a rearrangement the parts of its window begin, the first one first; last a 0.

    Empty if the policy uses only the sum of the window.
    """
    count = 0 if policy in SUM_ONLY else min(PARTS, window)
    return [part * (window // count) for part in range(count, -1, -1)] if count else []


class PrefixSums:
    """Tokens of each logical expert since the first step, at the steps where a window begins or ends."""

    def __init__(self, layers: int, experts: int, first: int) -> None:
        self._first = first
        self._total = np.zeros((layers, experts), np.int64)
        self._at: dict[int, Int64] = {}
        #: Steps so far, and at the same edges.
        self._steps, self._steps_at = 0, dict[int, int]()

    def add(
        self,
        steps: Int64,
        load_of: Callable[[int], npt.NDArray[Any]],
        edges: Iterable[int],
        pool: Executor,
    ) -> None:
        """Add a block.

        Args:
            load_of: the loads of a layer ``[steps, experts]``, called once for each.
            edges: where windows begin or end in this block; :meth:`between` takes them from now on.
        """
        ordered = sorted(set(edges))
        rows = [0, *np.searchsorted(steps, ordered).tolist(), len(steps)]

        def sums(layer: int) -> Int64:
            load = load_of(layer)
            pieces = (load[low:high] for low, high in itertools.pairwise(rows))
            return np.stack([piece.sum(axis=0, dtype=np.int64) for piece in pieces])

        parts = np.stack(list(pool.map(sums, range(len(self._total)))), axis=1)
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
        #: How often a rearrangement was due and did not happen, by the conditions of the setting.
        self.skipped = 0
        #: The placements in the current block; the first was in force when it began. Those of a rearrangement
        #: that comes in parts can hold from later steps.
        self.placed: Placed = [(-1, placement)]
        #: The utilization of the steps since a rearrangement was due.
        self._utilization: list[Float64] = []
        #: All placements, if asked for.
        self.kept: Placed | None = None
        #: Called with each rearrangement: the step from which it holds, and the placement.
        self.on_move: Callable[[int, Int32], None] | None = None
        self._policy, self._nodes, self._groups = policy, num_nodes, num_groups
        self._first = origin + (setting.start or 0)
        self._parts = window_parts(setting.policy, self.window)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, where nobody watches it."""
        return vars(self) | {"on_move": None}

    def window_edges(self, after: int, steps: Int64) -> Iterator[int]:
        """The steps of a block where windows begin or end, also windows that end in a later block."""
        for before in sorted({0, self.window, *self._parts}):
            ends = self._due(after, steps, after + before, int(steps[-1]) + before)
            yield from (end - before for end in ends)

    def may_change(self, after: int, steps: Int64) -> Iterator[int]:
        """The steps of a block from which its placement may be another one, whatever its conditions.

        ``after`` is the last step before the block.
        """
        layers, at_once = len(self.placed[0][1]), self.setting.layers_per_step
        parts = range(-(-layers // at_once) if at_once else 1)
        longest = self.setting.delay + len(parts)
        due = [*self._multiples(after - longest, after), *self._due(after, steps, after, int(steps[-1]))]
        yield from (step + self.setting.delay + part for step in due for part in parts)

    def play(
        self,
        past: PrefixSums,
        after: int,
        steps: Int64,
        utilization: Utilization,
        by_source: PrefixSums | None = None,
    ) -> None:
        """Rearrange when due in a block; ``after`` is the last step before it. Raises UsageError.

        Args:
            by_source: the tokens of each source rank and expert, if they are known and the policy uses them.
        """
        in_force = max(i for i, (step, _) in enumerate(self.placed) if i == 0 or step <= steps[0])
        self.placed = self.placed[in_force:]
        known, measured = len(self.placed), 0
        for step in self._due(after, steps, after, int(steps[-1])):
            measured = self._measure(steps, measured, step, utilization)
            weight = past.between(step - self.window, step)
            if not weight.any():
                continue
            if self.placed[-1][0] > step or not self._needed(weight):
                self.skipped += 1
                continue
            self._rearrange(step, weight, past, by_source)
        self._measure(steps, measured, int(steps[-1]) + 1, utilization)
        if self.kept is not None:
            self.kept += self.placed[known:]

    def _rearrange(self, step: int, weight: Int64, past: PrefixSums, by_source: PrefixSums | None) -> None:
        setting, current = self.setting, self.placed[-1][1]
        series, each = past.series([step - before for before in self._parts]) if self._parts else (None, 1)
        size = self.slots, setting.ep_size, self._nodes, self._groups
        sent = None
        if by_source is not None:
            sent = by_source.between(step - self.window, step).reshape(len(weight), setting.ep_size, -1)
        problem = Problem(weight, *size, current, self._experts, series, each, sent)
        new = policies.place(self._policy, problem)
        if setting.max_moves is not None:
            new = limited(current, new, weight, setting.ep_size, setting.max_moves)
        first = step + setting.delay
        self.moves.append(Move.of(first, current, new, setting.ep_size, weight.shape[1]))
        self.placed += enumerate(in_parts(current, new, setting.layers_per_step), first)
        if self.on_move is not None:
            self.on_move(first, new)

    def _needed(self, weight: Int64) -> bool:
        """Whether the setting's conditions allow a rearrangement that is due; ``weight``: of its window."""
        setting, needed = self.setting, True
        if setting.max_utilization is not None and self._utilization:
            recent = np.concatenate(self._utilization)[-UTILIZATION_STEPS:]
            needed = not len(recent) or float(recent.mean()) <= setting.max_utilization
        self._utilization.clear()
        if setting.min_balancedness is not None:
            worst = worst_balancedness(weight, self.placed[-1][1], setting.ep_size)
            needed = needed and worst < setting.min_balancedness
        return needed

    def _measure(self, steps: Int64, row: int, end: int, utilization: Utilization) -> int:
        """Add the utilization of a block's steps from a row to those before ``end``; return the next row."""
        last = int(np.searchsorted(steps, end))
        if self.setting.max_utilization is None:
            return last
        edges = [*(int(np.searchsorted(steps, step)) for step, _ in self.placed[1:]), len(steps)]
        first = 0
        for (_, placement), edge in zip(self.placed, edges, strict=True):
            part = slice(max(first, row), min(edge, last))
            if part.stop > part.start:
                self._utilization.append(utilization(part, placement))
            first = edge
        return last

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
