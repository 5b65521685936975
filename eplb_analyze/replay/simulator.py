"""Recorded loads played back under other settings, block by block: each placement made from the past alone.

The loads of a block are folded to logical experts once for all settings. Where a setting rearranges, its
policy sees sums over the steps of a window before, and nothing else; every step is scored with the tokens of
an expert split evenly over its replicas. What the scores mean is for :mod:`eplb_analyze.replay.replay`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import DumpError
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.parallel import split_range
from eplb_analyze.policies import policy as policies
from eplb_analyze.policies.policy import Policy, Problem
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import LayerHistory, crossings, even_shares, holdings
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.step_range import StepRange
from eplb_analyze.replay.settings import Setting
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import EMPTY_SLOT

#: Twice as many steps are put together in pairs, so that memory does not grow with a run.
MAX_ROWS = 8192
#: The bound is taken of sums over so many steps that there are about this many sums, a layer each.
BOUND_SUMS = 1 << 17
#: Multiplications; OpenBLAS begins threads at twice as many.
SMALL_PRODUCT = 1 << 17
#: Rows of :class:`Scores` after those of the settings: the recorded placements split evenly; as measured.
TODAY, MEASURED = -2, -1

#: Of :class:`Scores`, what is a sum over the steps of a column.
SUMS = ("active", "balancedness", "maximum", "mean")
#: Placements by the step from which each holds.
Placed = list[tuple[int, Int32]]
#: Number of slots and of EP ranks.
Size = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """A rearrangement: the step from which it holds, and what was fetched for it."""

    step: int
    #: Expert weights that ranks did not hold before, of all layers; and those of the rank with most.
    weights: int
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


class Scores:
    """What each step adds to the figures of all settings; in a long run a column is a few steps.

    A row is a setting, the last two are ``TODAY`` and ``MEASURED``.

    Attributes:
        ep_size: int ``[rows]``.
        step: int64 ``[columns]``, the first step of each.
        active: float64 ``[rows, columns]``, how many steps have an active layer. Rows differ where all tokens
            of a step fell on slots that hold no expert: they are in ``MEASURED`` alone.
        balancedness: float64 ``[rows, columns]``; a sum over those steps.
        maximum: float64 ``[rows, columns]``, tokens of the busiest ranks, a sum over layers.
        mean: float64 ``[rows, columns]``, likewise of the mean rank.
    """

    def __init__(self, ep_size: Sequence[int]) -> None:
        self.ep_size = np.array(ep_size)
        self.step = np.empty(0, np.int64)
        self.active, self.balancedness, self.maximum, self.mean = (np.empty((len(ep_size), 0)) for _ in SUMS)
        self._together = 1

    def add(
        self, steps: Int64, active: Float64, balancedness: Float64, maximum: Float64, mean: Float64
    ) -> None:
        new = Scores([])
        new.step, new.active = steps, active
        new.balancedness, new.maximum, new.mean = balancedness, maximum, mean
        new._put_together(self._together)
        for name in ("step", *SUMS):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(new, name)], axis=-1))
        if len(self.step) > 2 * MAX_ROWS:
            self._put_together(2)
            self._together *= 2

    def part(self, columns: slice) -> Scores:
        """Some of the columns."""
        part = Scores(self.ep_size.tolist())
        for name in ("step", *SUMS):
            setattr(part, name, getattr(self, name)[..., columns])
        return part

    def balancedness_of(self, row: int) -> float | None:
        """Mean over the steps with an active layer."""
        active = float(self.active[row].sum())
        return float(self.balancedness[row].sum()) / active if active else None

    def idle_fraction_of(self, row: int) -> float | None:
        maximum = float(self.maximum[row].sum())
        return max(0.0, 1 - float(self.mean[row].sum()) / maximum) if maximum else None

    def _put_together(self, count: int) -> None:
        """Add up every ``count`` columns; the last sum may be of fewer."""
        starts = np.arange(0, len(self.step), count)
        self.step = self.step[starts]
        for name in SUMS:
            setattr(self, name, np.add.reduceat(getattr(self, name), starts, axis=-1))


class NotReplayableError(DumpError):
    """The dump does not say what a replay needs to know."""


class Playback:
    """All settings played over a range of steps of one shape.

    Attributes, after :meth:`play`:
        scores: of all settings.
        players: one a setting, in the order given.
        bounds: what the busiest ranks got at least, whatever the placement, added up; by size.
        scored, left_out: complete steps scored, and those of which a placement is not known.
        first_step, last_step: of the steps scored.
        unknown: tokens on slots that hold no expert, which only ``MEASURED`` has.
    """

    def __init__(
        self,
        run: Run,
        steps: StepRange,
        shape: Shape,
        origin: int,
        settings: Sequence[tuple[Setting, Policy]],
        *,
        recorded_steps: int,
        num_groups: int = 1,
    ) -> None:
        """``origin``: the step that starts are counted from; ``recorded_steps``: complete ones, about.

        Raises NotReplayableError where the placement of a layer is not known in any step.
        """
        self.run, self.steps, self.shape = run, steps, shape
        self.layers, self.experts = run.info.num_layers, run.info.num_logical_experts
        self.histories = [run.history.layer(i) for i in range(self.layers)]
        self._known_from = self._first_known()
        self.players = [
            SettingRun(s, policy, self._beginning(s), origin, _nodes(run, s.ep_size), num_groups)
            for s, policy in settings
        ]
        self.scores = Scores([*(s.ep_size for s, _ in settings), shape.ep_size, shape.ep_size])
        sizes = {(player.slots, player.setting.ep_size) for player in self.players}
        if shape.num_physical_experts >= self.experts:  # else experts had no slot, and nothing is bounded
            sizes.add((shape.num_physical_experts, shape.ep_size))
        self.bounds: dict[Size, float] = dict.fromkeys(sorted(sizes), 0.0)
        self.bound_steps = max(1, recorded_steps * self.layers // BOUND_SUMS)
        self.first_step = self.last_step = -1
        self.scored = self.left_out = self.unknown = 0

    def _first_known(self) -> int:
        """The first step from which the placements of all layers are known."""
        first, end = self.steps
        known = max([first, *(h.steps[0] if h.steps else end for h in self.histories)])
        if known >= end:
            raise NotReplayableError(
                f"{self.run.path}: the placement of a layer is not known in these steps, so its loads have "
                "no expert's name; record with physical_to_logical_map"
            )
        return known

    def _beginning(self, setting: Setting) -> Int32:
        """The placement at first: the recorded one; with other slots or ranks what engines begin with."""
        slots = self.experts + setting.num_redundant_experts
        if (slots, setting.ep_size) == (self.shape.num_physical_experts, self.shape.ep_size):
            found = [history.at(self._known_from) for history in self.histories]
            # An expert that no slot holds had no tokens, and may get some.
            whole = [f for f in found if f is not None and len(np.unique(f[f >= 0])) == self.experts]
            if len(whole) == self.layers and all(len(f) == slots for f in whole):
                return np.stack(whole)
        return np.tile(policies.initial(self.experts, slots), (self.layers, 1))

    def play(self, workers: int | None = None) -> None:
        """Call it once, inside ``run.retry_without_damaged``.

        The result does not depend on the number of threads.
        """
        first, _ = self.steps
        past = PrefixSums(self.layers, self.experts, first)
        longest = max((player.window for player in self.players), default=0)
        last = first - 1
        with ThreadPoolExecutor(workers or _cores()) as pool:
            for block in self.run.blocks(self.steps):
                steps = self._with_placement(block)
                self.left_out += len(block.recorded) - len(steps)
                if not len(steps):
                    continue
                after, last = last, int(steps[-1])
                folded = _Folded(block, steps, self.histories, self.experts)
                for share in pool.map(folded.read, split_range(0, self.layers)):
                    self.unknown += share
                past.add(folded, {e for p in self.players for e in p.edges(after, steps)}, pool)
                for played in [pool.submit(player.play, past, after, steps) for player in self.players]:
                    played.result()
                past.forget(last - longest)
                self._score(folded, pool)
                self.first_step = self.first_step if self.scored else int(steps[0])
                self.last_step = last
                self.scored += len(steps)

    def _with_placement(self, block: Block) -> Int64:
        """The block's complete steps in which the placement of every layer is known."""
        steps = block.recorded
        known = np.ones(len(steps), np.bool_)
        for history in self.histories:
            for stretch, slots in history.periods(steps):
                if slots is None or len(slots) != self.shape.num_physical_experts:
                    known[stretch] = False
        return steps[known]

    def _score(self, folded: _Folded, pool: Executor) -> None:
        rows, columns = len(self.players) + 2, len(folded.steps)
        total = _LayerScore(
            np.zeros((rows, columns)), np.zeros((rows, columns)), np.zeros((rows, columns)), []
        )
        active = np.zeros((rows, columns))
        # One after another in order of layers, so that rounding does not depend on who came first.
        for layer in pool.map(lambda i: self._score_layer(folded, i), range(self.layers)):
            total.maximum[:] += layer.maximum
            total.balancedness[:] += layer.balancedness
            total.mean[:] += layer.mean
            active += layer.maximum > 0
            for size, bound in zip(self.bounds, layer.bounds, strict=True):
                self.bounds[size] += bound
        some = (active > 0).astype(np.float64)
        balancedness = total.balancedness / np.maximum(active, 1)
        self.scores.add(folded.steps, some, balancedness, total.maximum, total.mean)

    def _score_layer(self, folded: _Folded, layer: int) -> _LayerScore:
        steps, load = folded.steps, folded.logical[layer].astype(np.float64)
        changes = self.histories[layer].periods(steps)
        today = [(int(steps[stretch.start]), slots) for stretch, slots in changes if slots is not None]
        placed = [[(step, slots[layer]) for step, slots in player.placed] for player in self.players]
        maximum = np.empty((len(placed) + 2, len(steps)))
        edges = {*range(0, len(steps), self.bound_steps), len(steps)}
        for row, placements in enumerate([*placed, today]):
            cuts = [0, *np.searchsorted(steps, [step for step, _ in placements[1:]]).tolist(), len(steps)]
            for (_, slots), low, high in zip(placements, cuts[:-1], cuts[1:], strict=True):
                if high > low:
                    share = even_shares(slots, int(self.scores.ep_size[row]), self.experts)
                    maximum[row, low:high] = _product(load[low:high], share).max(axis=1)
            edges.update(cuts)
        maximum[MEASURED] = folded.measured[layer]
        mean = load.sum(axis=1) / self.scores.ep_size[:, None]
        mean[MEASURED] = folded.tokens[layer] / self.shape.ep_size
        balancedness = np.divide(mean, maximum, out=np.zeros(mean.shape), where=maximum > 0)
        # No placement changes within a sum, so that what bounds its busiest rank bounds its steps' together.
        sums = np.add.reduceat(load, sorted(edges - {len(steps)}), axis=0)
        bounds = [float(policies.lower_bound(sums, *size).sum()) for size in self.bounds]
        return _LayerScore(balancedness, maximum, mean, bounds)


def _product(load: Float64, share: Float64) -> Float64:
    """``load @ share``, a few rows at a time.

    Of such small products the linear algebra library begins no threads, which would only be in the way of
    ours, and they stay in the processor's caches.
    """
    out = np.empty((len(load), share.shape[1]))
    rows = max(1, SMALL_PRODUCT // share.size)
    whole = len(load) - len(load) % rows
    np.matmul(
        load[:whole].reshape(-1, rows, len(share)), share, out=out[:whole].reshape(-1, rows, out.shape[1])
    )
    np.matmul(load[whole:], share, out=out[whole:])
    return out


@dataclass(frozen=True)
class _LayerScore:
    """Of one layer, as in :class:`Scores`; and a bound a size."""

    balancedness: Float64
    maximum: Float64
    mean: Float64
    bounds: list[float]


class _Folded:
    """The loads of a block's steps by logical expert, all layers of them.

    Attributes:
        logical: for each layer ``[steps, num_logical_experts]``.
        measured, tokens: int64 ``[layers, steps]``: of the busiest rank as recorded, and of all ranks.
    """

    def __init__(self, block: Block, steps: Int64, histories: Sequence[LayerHistory], experts: int) -> None:
        self.steps = steps
        self.logical: list[npt.NDArray[Any]] = [np.empty(0)] * len(histories)
        self.measured, self.tokens = (np.zeros((len(histories), len(steps)), np.int64) for _ in range(2))
        self._block, self._histories, self._experts = block, histories, experts

    def read(self, layers: tuple[int, int]) -> int:
        """Read and fold a range of layers; return the tokens on slots that hold no expert.

        Raises DamagedSegmentError.
        """
        assert self._block.shape is not None
        ranks, unknown = self._block.shape.ep_size, 0
        for first, loads in self._block.load_parts(self.steps, *layers):
            for layer, load in enumerate(loads.transpose(1, 0, 2), first):
                self.tokens[layer] = load.sum(axis=1)
                # No sum of these is larger. A block of a large model takes 120 MB so, else twice as much.
                narrow = load.astype(np.int32) if self.tokens[layer].max() < 2**31 else load
                self.measured[layer] = _by_rank(narrow, ranks).max(axis=1)
                out = np.empty((len(load), self._experts), narrow.dtype)
                for stretch, slots in self._histories[layer].periods(self.steps):
                    assert slots is not None
                    out[stretch] = _fold(narrow[stretch], slots, self._experts)
                unknown += int(self.tokens[layer].sum() - out.sum(dtype=np.int64))
                self.logical[layer] = out
        return unknown


def _by_rank(load: npt.NDArray[Any], ranks: int) -> npt.NDArray[Any]:
    """Loads ``[steps, slots]`` summed by rank: four times as fast as a sum along the last axis."""
    slots = load.reshape(len(load), ranks, -1)
    total = slots[:, :, 0].copy()
    for slot in range(1, slots.shape[2]):
        total += slots[:, :, slot]
    return total


def _fold(load: npt.NDArray[Any], slots: Int32, experts: int) -> npt.NDArray[Any]:
    """Loads ``[steps, slots]`` of one placement by logical expert: ``[steps, experts]``."""
    out = np.zeros((len(load), experts), load.dtype)
    filled = np.flatnonzero(slots != EMPTY_SLOT)
    while len(filled):  # one slot of each expert at a time
        present, at = np.unique(slots[filled], return_index=True)
        columns = load.take(filled[at], axis=1)
        if len(present) == experts:
            out += columns
        else:
            out[:, present] += columns
        filled = np.delete(filled, at)
    return out


class PrefixSums:
    """Tokens of each logical expert since the beginning, at the steps where a window begins or ends."""

    def __init__(self, layers: int, experts: int, first: int) -> None:
        self._first = first
        self._total = np.zeros((layers, experts), np.int64)
        self._at: dict[int, Int64] = {}

    def add(self, folded: _Folded, edges: set[int], pool: Executor) -> None:
        """Add a block; of the edges in it can be asked from now on."""
        rows = [0, *np.searchsorted(folded.steps, sorted(edges)).tolist(), len(folded.steps)]

        def sums(load: npt.NDArray[Any]) -> Int64:
            pieces = (load[low:high] for low, high in itertools.pairwise(rows))
            return np.stack([piece.sum(axis=0, dtype=np.int64) for piece in pieces])

        parts = np.stack(list(pool.map(sums, folded.logical)), axis=1)
        for edge, part in zip(sorted(edges), parts[:-1], strict=True):
            self._total = self._total + part
            self._at[edge] = self._total
        self._total = self._total + parts[-1]

    def between(self, low: int, high: int) -> Int64:
        """Of steps ``low`` to ``high - 1``: int64 ``[layers, experts]``."""
        return self._at[high] - (self._at[low] if low >= self._first else 0)

    def forget(self, before: int) -> None:
        for edge in [edge for edge in self._at if edge < before]:
            del self._at[edge]


class SettingRun:
    """One setting under way: its placements, when it rearranges, and what that moves."""

    def __init__(
        self, setting: Setting, policy: Policy, placement: Int32, origin: int, num_nodes: int, num_groups: int
    ) -> None:
        self.setting = setting
        self.slots = placement.shape[1]
        self.window = setting.window or 0
        self.moves: list[Move] = []
        #: In the block under way; the first was in force when it began.
        self.placed: Placed = [(-1, placement)]
        #: All of them, where somebody wants to know.
        self.kept: Placed | None = None
        self._policy, self._nodes, self._groups = policy, num_nodes, num_groups
        self._first = origin + (setting.start or 0)

    def times(self, after: int, steps: Int64) -> Iterator[int]:
        """The steps from which new placements hold, those between ``after`` (not) and the last (also)."""
        return self._beats(after, steps, after, int(steps[-1]))

    def edges(self, after: int, steps: Int64) -> Iterator[int]:
        """Where its windows begin and end, also those that end later."""
        yield from self.times(after, steps)
        ends = self._beats(after, steps, after + self.window, int(steps[-1]) + self.window)
        yield from (end - self.window for end in ends)

    def _beats(self, after: int, steps: Int64, low: int, high: int) -> Iterator[int]:
        """Those between ``low`` (not) and ``high`` (also) that have a step in their window.

        Where an engine's numbers jump, those of the gap would be more than anybody can count.
        """
        known = np.concatenate([[after], steps])
        for gap in np.flatnonzero(np.diff(known) > self.window):
            yield from self._beat(low, min(high, int(known[gap]) + self.window))
            low = max(low, int(known[gap + 1]))
        yield from self._beat(low, high)

    def _beat(self, low: int, high: int) -> range:
        interval = self.setting.interval
        if interval is None:
            return range(0)
        return range(self._first + max(0, (low - self._first) // interval + 1) * interval, high + 1, interval)

    def play(self, past: PrefixSums, after: int, steps: Int64) -> None:
        """Rearrange where it is time. Raises PolicyError."""
        self.placed = self.placed[-1:]
        for step in self.times(after, steps):
            weight = past.between(step - self.window, step)
            if not weight.any():
                continue  # nothing to go by
            current = self.placed[-1][1]
            size = self.slots, self.setting.ep_size, self._nodes, self._groups
            new = policies.place(self._policy, Problem(weight, *size, current))
            self.moves.append(Move.of(step, current, new, self.setting.ep_size, weight.shape[1]))
            self.placed.append((step, new))
        if self.kept is not None:
            self.kept += self.placed[1:]


def _nodes(run: Run, ep_size: int) -> int:
    on_node = run.info.ranks_per_node
    return ep_size // on_node if on_node and ep_size % on_node == 0 else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
