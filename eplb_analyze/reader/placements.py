"""The placement history of a run: which logical expert was in which slot at any step."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import Finding
from eplb_analyze.metrics.formulas import sum_type
from eplb_analyze.parallel import ordered_map
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.lost import LostRank, ranks_lost_at
from eplb_analyze.reader.rhythm import Change, Rhythm
from eplb_analyze.sessions.discovery import Session
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import Segment
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.storage.path import requests_at_once
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.manifest import ExpertSums
from eplb_dump.format.schema import EMPTY_SLOT, Status, Tier

#: Consecutive steps of one placement: where they are among some steps, and the placement, if it is known.
Period = tuple[slice, Int32 | None]


@dataclass
class LayerHistory:
    """The placements of one layer, by the step from which each is in force."""

    steps: list[int] = field(default_factory=list)
    ep_sizes: list[int] = field(default_factory=list)
    slots: list[Int32] = field(default_factory=list)
    #: Steps from which the placement is unknown until it is stated again; the same in all layers.
    lost: list[int] = field(default_factory=list)
    #: Steps that are gone, of whose placements only the last are kept: the one before may not be known.
    remains: set[int] = field(default_factory=set)

    def insert(self, step: int, ep_size: int, slots: Int32, *, remains: bool = False) -> None:
        """Add the placement that a rank states at ``step``. The first one for a step counts.

        A rank that missed a change states it at a later step, so the earliest statement counts.

        Args:
            remains: whether it is what remains of steps that are gone.
        """
        i = bisect.bisect_right(self.steps, step)
        if self.index_at(step) >= 0 and (self.steps[i - 1] == step or self._is_at(i - 1, ep_size, slots)):
            if self.steps[i - 1] == step and not remains:
                self.remains.discard(step)
            return
        if remains:
            self.remains.add(step)
        if not self.lost and i < len(self.steps) and self._is_at(i, ep_size, slots):
            self.steps[i] = step
            return
        self.steps.insert(i, step)
        self.ep_sizes.insert(i, ep_size)
        self.slots.insert(i, slots)

    def _is_at(self, i: int, ep_size: int, slots: Int32) -> bool:
        return self.ep_sizes[i] == ep_size and np.array_equal(self.slots[i], slots)

    def index_at(self, step: int) -> int:
        """Index of the placement in force at a step; -1 before the first and while it is unknown."""
        i = bisect.bisect_right(self.steps, step) - 1
        j = bisect.bisect_right(self.lost, step) - 1
        return -1 if i >= 0 and j >= 0 and self.lost[j] > self.steps[i] else i

    def at(self, step: int) -> Int32 | None:
        """int32 ``[num_physical_experts]``, or None if the placement is unknown."""
        i = self.index_at(step)
        return self.slots[i] if i >= 0 else None

    def periods(self, steps: npt.NDArray[np.int64]) -> Iterator[Period]:
        """Ascending steps split by placement period: ``(slice of steps, placement or None)``."""
        if len(steps):
            changes = sorted(s for s in {*self.steps, *self.lost} if steps[0] < s <= steps[-1])
            edges = [0, *np.searchsorted(steps, changes).tolist(), len(steps)]
            for low, high in itertools.pairwise(edges):
                if high > low:
                    yield slice(low, high), self.at(int(steps[low]))


@frozen
class Rearrangement:
    """A change of placement: the first and last step at which a layer changed, and the layers.

    Attributes:
        slots_changed: how many slots hold another expert than before; None if it began in steps that are
            gone, so that not all placements before it are known.
    """

    first_step: int
    last_step: int
    #: Indices of the layers that changed, ascending.
    layers: tuple[int, ...]
    slots_changed: int | None


class PlacementSlice(NamedTuple):
    """The placements that take effect in a range of steps, one row each, in order of layers and steps."""

    #: int64 ``[n]``: from which step on, the index of the layer, the EP size, and the number of slots.
    step: Int64
    layer: Int64
    ep_size: Int64
    width: Int64
    #: int32, the slots of one row after the other.
    slots: Int32


class PlacementHistory:
    """The placements of a run, one :class:`LayerHistory` for each layer index.

    ``lost``: steps from which no rank's placements can be read, so that they are unknown until they are
    stated again.
    """

    def __init__(
        self,
        layers: dict[int, LayerHistory],
        lost: list[int],
        findings: list[Finding],
        rhythm: Rhythm | None = None,
        stated: dict[int, LayerHistory] | None = None,
        lost_ranks: Sequence[LostRank] = (),
    ) -> None:
        """A history of ``layers``.

        Args:
            rhythm: what the engine states, by which changes are grouped into rearrangements.
            stated: the placements as stated, if lost ranks have slots in ``layers`` no more.
            lost_ranks: those ranks.
        """
        self.stated = layers if stated is None else stated
        self.lost_ranks = lost_ranks
        self.layers = layers
        self.lost = lost
        self.findings = findings
        self.rhythm = rhythm or Rhythm()

    def layer(self, index: int) -> LayerHistory:
        return self.layers[index] if index in self.layers else LayerHistory()

    def num_experts(self, num_logical_experts: int, layers: int) -> Int64:
        """How many logical experts each of the first ``layers`` layers has: int64 ``[layers]``.

        Layers of one model can have different numbers of experts, numbered from 0: a layer has those up to
        the highest that one of its placements holds. The layers with the most have all of the model's, and so
        has a layer without a known placement.
        """
        highest = {i: int(np.concatenate(h.slots).max(initial=-1)) for i, h in self.layers.items() if h.slots}
        most = max(highest.values(), default=-1)
        counts = [
            highest[i] + 1 if -1 < highest.get(i, most) < most else num_logical_experts for i in range(layers)
        ]
        return np.array(counts, np.int64)

    @cached_property
    def changes(self) -> list[int]:
        """The steps from which the placement of some layer changes or is unknown, ascending."""
        return sorted({*self.lost, *(s for history in self.layers.values() for s in history.steps)})

    def within(self, steps: tuple[int, int]) -> PlacementSlice | None:
        """The placements that take effect in a half-open range, for :func:`join_placements`.

        None if that would not be all there is to know: placements or ranks were lost, or are in findings.
        """
        if self.lost or self.lost_ranks or self.findings:
            return None
        if any(history.remains for history in self.layers.values()):
            return None
        rows = [
            (history.steps[i], index, history.ep_sizes[i], len(history.slots[i]), history.slots[i])
            for index, history in sorted(self.layers.items())
            for i in range(*(bisect.bisect_left(history.steps, step) for step in steps))
        ]
        step, layer, ep_size, width = np.array([row[:4] for row in rows], np.int64).reshape(-1, 4).T
        slots = np.concatenate([np.empty(0, np.int32), *(row[4] for row in rows)])
        return PlacementSlice(step, layer, ep_size, width, slots)

    def truncated_at(self, step: int) -> PlacementHistory:
        """The history as it was when ``step`` was the last step; call it before :meth:`without`."""

        def cut(history: LayerHistory) -> LayerHistory:
            count = bisect.bisect_right(history.steps, step)
            parts = history.steps[:count], history.ep_sizes[:count], history.slots[:count]
            return LayerHistory(*parts, [s for s in history.lost if s <= step], history.remains)

        layers = {index: cut(history) for index, history in self.layers.items()}
        return PlacementHistory(layers, [s for s in self.lost if s <= step], self.findings, self.rhythm)

    def without(self, lost: Sequence[LostRank]) -> PlacementHistory:
        """The history with empty slots on ranks that are lost, from the step of the loss on.

        Engines leave the old experts there, or fill in any: nothing serves them.
        """
        if not lost:
            return self
        edges = {edge for one in lost for edge in one.steps}
        layers = {}
        for index, history in self.layers.items():
            served = layers[index] = LayerHistory(lost=history.lost)
            for step in sorted({*history.steps, *(e for e in edges if e < NO_END)}):
                i = history.index_at(step)
                if i >= 0:
                    size = history.ep_sizes[i]
                    slots = _emptied(history.slots[i], size, ranks_lost_at(step, lost))
                    served.insert(step, size, slots, remains=step in history.remains)
        return PlacementHistory(layers, self.lost, self.findings, self.rhythm, self.layers, lost)

    def serving_only(self) -> PlacementHistory:
        """The history of an engine that has only the ranks that serve, numbered from 0 again."""
        layers = {}
        for index, history in self.layers.items():
            own = layers[index] = LayerHistory(lost=history.lost)
            for step, size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True):
                gone = [rank for rank in ranks_lost_at(step, self.lost_ranks) if rank < size]
                left = np.delete(slots.reshape(size, -1), gone, axis=0)
                own.insert(step, len(left), left.reshape(-1), remains=step in history.remains)
        return PlacementHistory(layers, self.lost, self.findings, self.rhythm)

    def rearrangements(self) -> list[Rearrangement]:
        """Changes after the first placement, grouped into rearrangements.

        That a rank is lost or comes back changes what is served, but moves no expert.
        """
        return list(self._rearrangements)

    @cached_property
    def _rearrangements(self) -> list[Rearrangement]:
        changes: list[Change] = []
        start = min((history.steps[0] for history in self.layers.values() if history.steps), default=0)
        for index, history in self.layers.items():
            counts = self._moved(history)
            for i, step in enumerate(history.steps):
                if step in history.remains or i == 0:
                    # The first placement of all layers is no change.
                    moved = None if step > start else 0
                elif history.lost and history.index_at(step - 1) < 0:
                    continue  # the placement before is unknown
                else:
                    moved = counts[i]
                if moved != 0:
                    changes.append(Change(step, index, moved))
        found = []
        for group in self.rhythm.group(changes):
            slots = [change.slots for change in group]
            known = [count for count in slots if count is not None]
            if known:  # otherwise all of it is gone, and parts of it may be unknown
                layers = tuple(sorted({change.layer for change in group}))
                count = sum(known) if len(known) == len(slots) else None
                found.append(Rearrangement(group[0].step, group[-1].step, layers, count))
        return found

    def _moved(self, history: LayerHistory) -> list[int]:
        """In how many slots each of a layer's placements has other experts than the one before."""
        shapes = {(size, len(slots)) for size, slots in zip(history.ep_sizes, history.slots, strict=True)}
        if len(shapes) == 1 and not self.lost_ranks:  # as nearly always
            every = np.stack(history.slots)
            return [0, *np.count_nonzero(every[1:] != every[:-1], axis=1).tolist()]
        return [self._moved_at(history, i) if i else 0 for i in range(len(history.steps))]

    def _moved_at(self, history: LayerHistory, i: int) -> int:
        before, now, size = history.slots[i - 1], history.slots[i], history.ep_sizes[i]
        # Slots of two shapes are not the same slots.
        if before.shape != now.shape or history.ep_sizes[i - 1] != size:
            return len(now)
        if self.lost_ranks:
            step = history.steps[i]
            away = {*ranks_lost_at(step - 1, self.lost_ranks), *ranks_lost_at(step, self.lost_ranks)}
            before, now = _emptied(before, size, away), _emptied(now, size, away)
        return int((before != now).sum())


def _emptied(slots: Int32, ep_size: int, ranks: Iterable[int]) -> Int32:
    """A placement with empty slots on some ranks."""
    gone = [rank for rank in ranks if rank < ep_size]
    if not gone:
        return slots
    by_rank = slots.reshape(ep_size, -1).copy()
    by_rank[gone] = EMPTY_SLOT
    return by_rank.reshape(-1)


def fold(load: npt.NDArray[Any], slots: Int32, num_logical_experts: int) -> npt.NDArray[Any]:
    """Sum the slots of each logical expert, leaving out empty ones.

    Args:
        load: tokens ``[..., slots]``; the sums must fit its type.
        slots: the logical expert in each slot.

    Returns:
        Tokens ``[..., num_logical_experts]``, of the type of ``load``.
    """
    out = np.zeros((*load.shape[:-1], num_logical_experts), load.dtype)
    filled = np.flatnonzero(slots != EMPTY_SLOT)
    if load.ndim == 1:
        np.add.at(out, slots[filled], load[filled])
        return out
    while len(filled):  # add one slot of each expert at a time: columns, not cells
        slot = np.full(num_logical_experts, -1)
        slot[slots[filled]] = filled
        present = np.flatnonzero(slot >= 0)
        columns = load.take(slot[present], axis=-1)
        if len(present) == num_logical_experts:
            out += columns
        else:
            out[..., present] += columns
        filled = filled[slot[slots[filled]] != filled]
    return out


def replicas(slots: Int32, num_logical_experts: int) -> npt.NDArray[np.int64]:
    """How many slots hold each logical expert: ``[num_logical_experts]``."""
    return np.bincount(slots[slots != EMPTY_SLOT], minlength=num_logical_experts)


def holdings(slots: Int32, ep_size: int, num_logical_experts: int) -> Int64:
    """How many slots of each EP rank hold each expert: ``[ep_size, num_logical_experts]``."""
    rank = np.arange(len(slots)) // (len(slots) // ep_size)
    cells = (rank * num_logical_experts + slots)[slots != EMPTY_SLOT]
    counts = np.bincount(cells, minlength=ep_size * num_logical_experts)
    return counts.reshape(ep_size, num_logical_experts)


def crossings(old: Int64, new: Int64, ranks_per_node: int = 1) -> Int64:
    """How many expert weights each rank had to fetch from another node: ``[ep_size]``.

    A rank fetches an expert that it did not hold; from another node if no rank of its own held it. With
    nodes of one rank that is from another rank. ``old`` and ``new`` are :func:`holdings`.
    """
    on_node = old > 0
    if ranks_per_node > 1:
        ranks = np.arange(len(old))
        on_node = np.logical_or.reduceat(on_node, ranks[::ranks_per_node], axis=0)[ranks // ranks_per_node]
    fetched: Int64 = np.count_nonzero((new > 0) & ~on_node, axis=1)
    return fetched


def even_shares(slots: Int32, ep_size: int, num_logical_experts: int) -> npt.NDArray[np.float64]:
    """The share of an expert's tokens that each EP rank gets if its replicas split them evenly.

    ``load [steps, num_logical_experts] @ result`` are tokens per rank: float64
    ``[num_logical_experts, ep_size]``; zeros if no slot holds the expert.
    """
    held = holdings(slots, ep_size, num_logical_experts)
    share: npt.NDArray[np.float64] = held.T / np.maximum(1, held.sum(axis=0))[:, np.newaxis]
    return share


def spread_evenly(old: Int32, new: Int32, ep_size: int, num_logical_experts: int) -> npt.NDArray[np.float64]:
    """How replicas split their expert's tokens evenly, in whole numbers, so that sums are exact.

    ``load [steps, slots of old] @ result`` are tokens per rank under ``new``, times the least common multiple
    of the numbers of replicas. If a float cannot hold that, times another number, and sums are rounded.

    Args:
        old: the placement under which the slots got their tokens.
        new: the placement whose replicas split them.

    Returns:
        float64 ``[slots of old, ep_size]``; zeros if the slot is empty.
    """
    held = holdings(new, ep_size, num_logical_experts)
    copies = np.maximum(1, held.sum(axis=0))
    times = float(min(math.lcm(*set(copies.tolist())), 1 << 53))
    weights = held.T * (times / copies)[:, np.newaxis]
    return np.where((old == EMPTY_SLOT)[:, np.newaxis], 0.0, weights[old])


def logical_sums(block: Block, history: PlacementHistory, num_logical_experts: int) -> Int64:
    """Tokens of each logical expert over a block's complete steps: int64 ``[layers, experts]``.

    Slots whose placement is unknown are left out. Raises DamagedSegmentError.
    """
    assert block.shape is not None
    out = np.zeros((block.shape.num_moe_layers, num_logical_experts), np.int64)
    for layer, slots, load in placed_sums(block, history):
        out[layer] += fold(load, slots, num_logical_experts)
    return out


def placed_sums(block: Block, history: PlacementHistory) -> Iterator[tuple[int, Int32, Int64]]:
    """``(layer, slots, load)``: sums over a block's complete steps, each under one placement.

    Sums whose placement is unknown are left out. Loads are read only if the writer left no sums, or if its
    sums include steps that do not count. Raises DamagedSegmentError.
    """
    assert block.shape is not None
    sources = [
        (segment, there, _stated_sums(segment, there, history))
        for segment, _, there in block.matches(block.recorded)
    ]
    if block.keeps_loads and any(stated is None for *_, stated in sources):
        parts = iter(_read_sums(block, history))  # so that nothing is read apart from what is kept
    else:
        parts = itertools.chain.from_iterable(
            _segment_sums(block, segment, there, history) if stated is None else stated
            for segment, there, stated in sources
        )
    for layer, slots, load in parts:
        if slots is not None and len(slots) == len(load):
            yield layer, slots, load


#: Of a layer and placement, which may be unknown: the tokens of each slot.
PlacedSums = tuple[int, Int32 | None, Int64]


def _stated_sums(segment: Segment, there: Int64, history: PlacementHistory) -> list[PlacedSums] | None:
    """The writer's sums; None if there are none, or if they are not of just the steps that count."""
    steps = segment.load_steps()
    sums = segment.sums if len(there) == len(steps) else None
    return None if sums is None else _cut(sums, steps, history)


def _segment_sums(
    block: Block, segment: Segment, there: Int64, history: PlacementHistory
) -> Iterator[PlacedSums]:
    assert block.shape is not None
    steps = segment.load_steps()[there]
    for first, loads in segment.loads(0, block.shape.num_moe_layers):
        for layer, load in enumerate(loads, first):
            for stretch, slots in history.layer(layer).periods(steps):
                yield layer, slots, load[there][stretch].sum(axis=0, dtype=np.int64)


def _read_sums(block: Block, history: PlacementHistory) -> list[PlacedSums]:
    found: list[PlacedSums] = []
    steps = block.recorded

    def add(layer: int, load: npt.NDArray[Any]) -> None:
        placed = sums_between(load, steps, history.layer(layer), ())
        found.extend((layer, slots, sums[0]) for slots, _, sums in placed)

    block.each_layer([add])
    return found


def sums_between(
    load: npt.NDArray[Any], steps: Int64, history: LayerHistory, bounds: Sequence[int]
) -> Iterator[tuple[Int32 | None, list[int], Int64]]:
    """Sum a layer's loads between bounds and changes of its placement, in order of steps.

    Args:
        load: integers ``[len(steps), slots]``.
        history: of the layer.
        bounds: ascending indices into the steps.

    Yields ``(placement or None, starts, sums)`` of each placement period: where each sum starts in the steps,
    and tokens, int64 ``[len(starts), slots]``.
    """
    kind = sum_type(load, len(load))
    for period, slots in history.periods(steps):
        edges = [period.start, *(at for at in bounds if period.start < at < period.stop), period.stop]
        parts = [load[low:high].sum(axis=0, dtype=kind) for low, high in itertools.pairwise(edges)]
        yield slots, edges[:-1], np.array(parts, np.int64)


def _cut(sums: ExpertSums, steps: Int64, history: PlacementHistory) -> list[PlacedSums] | None:
    """``(layer, placement, load)`` of each sum; None if a sum spans a change that its rank missed."""
    first = np.searchsorted(steps, sums.step)
    last = np.append(first[1:], 0) - 1
    last[np.append(np.diff(sums.layer) != 0, True)] = len(steps) - 1
    parts = []
    for layer, low, high, load in zip(sums.layer.tolist(), first, last, sums.load, strict=True):
        of_layer = history.layer(layer)
        index = of_layer.index_at(int(steps[low])) if low <= high else -2
        if index != (of_layer.index_at(int(steps[high])) if low <= high else -2):
            return None
        parts.append((layer, of_layer.slots[index] if index >= 0 else None, load))
    return parts


def read_history(
    sessions: Sequence[Session],
    unreadable: frozenset[int] = frozenset(),
    steps: StepRange | None = None,
) -> PlacementHistory:
    """Join the placements of all ranks, each of which states all of them.

    A rank that missed the step of a change states it later, so the earliest statement counts. Two
    ranks that state different placements for one step and layer are a fault to report; the lower
    rank's is kept. If no rank's placements can be read, a change may be missed, so the placement
    is unknown from there on. Raises DamagedSegmentError.

    Args:
        unreadable: ``id`` of segments whose placements cannot be read.
        steps: only the placements in force in these are of interest; others may be missing.
    """
    lost = _lost(sessions, unreadable)
    if steps is not None and not lost and not unreadable:
        near = _statements_near(sessions, steps)
        history = None if near is None else _joined(sessions, near, lost)
        if history is not None and not history.findings:
            return history
    return _joined(sessions, _statements(sessions, unreadable), lost)


def _joined(
    sessions: Sequence[Session], statements: Iterable[tuple[int, _Statement]], lost: list[int]
) -> PlacementHistory:
    findings: list[Finding] = []
    if lost:
        text = f"placements are lost from step {_first_of(lost)} on: the expert in each slot is"
        findings.append(Finding("error", "placements_lost", text + " unknown until the next placement"))
    stated: dict[tuple[int, int], tuple[int, int, Int32]] = {}
    kept: set[tuple[int, int]] = set()
    for rank, (step, layer, ep_size, slots, remains) in statements:
        known = stated.get((step, layer))
        if not remains:
            kept.add((step, layer))
        if ep_size < 1 or not len(slots) or len(slots) % ep_size:
            text = (
                f"at step {step} (layer index {layer}), {len(slots)} slots cannot be divided evenly among "
                f"{ep_size} ranks"
            )
            findings.append(Finding("error", "uneven_slots", f"{text}; that placement is left out"))
        elif known is None:
            stated[step, layer] = (rank, ep_size, slots)
        elif known[1] != ep_size or not np.array_equal(known[2], slots):
            text = (
                f"ranks {known[0]} and {rank} state different placements at step {step} (layer index {layer})"
            )
            findings.append(Finding("error", "placement_conflict", text))
    layers: dict[int, LayerHistory] = {}
    for (step, layer), (_, ep_size, slots) in sorted(stated.items(), key=lambda item: item[0]):
        own = layers.setdefault(layer, LayerHistory(lost=lost))
        own.insert(step, ep_size, slots, remains=(step, layer) not in kept)
    return PlacementHistory(layers, lost, findings, _rhythm(sessions, layers))


def join_placements(sessions: Sequence[Session], slices: Iterable[PlacementSlice]) -> PlacementHistory:
    """The history of a run of whose ranges of steps, one after the other, these are the slices."""
    layers: dict[int, LayerHistory] = {}
    for one in slices:
        each = np.split(one.slots, np.cumsum(one.width)[:-1])
        numbers = zip(one.step.tolist(), one.layer.tolist(), one.ep_size.tolist(), strict=True)
        for (step, layer, ep_size), slots in zip(numbers, each, strict=True) if len(one.step) else ():
            own = layers.setdefault(layer, LayerHistory())
            own.steps.append(step)
            own.ep_sizes.append(ep_size)
            own.slots.append(slots)
    return PlacementHistory(layers, [], [], _rhythm(sessions, layers))


def _rhythm(sessions: Sequence[Session], layers: Iterable[int]) -> Rhythm | None:
    return Rhythm.stated(sessions[0].info, max(layers, default=0) + 1) if sessions else None


def _first_of(steps: list[int]) -> str:
    return f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} and {len(steps) - 1} more"


def _lost(sessions: Sequence[Session], unreadable: frozenset[int]) -> list[int]:
    """The first steps of gaps that no other session's placements fill, ascending."""
    gaps = [(session, gap) for session in sessions for gap in placement_gaps(session, unreadable)]
    found = set()
    for session, (begin, last) in gaps:
        first = begin
        others = [s for other in sessions if other is not session for s in _readable(other, unreadable)]
        for segment in sorted(others, key=lambda s: s.first_step):
            if segment.first_step <= first <= segment.last_step:
                first = segment.last_step + 1
        if first <= last:
            found.add(first)
    return sorted(found)


def _readable(session: Session, unreadable: frozenset[int]) -> list[Segment]:
    """The segments with readable placements, including those with unreadable steps."""
    every = (*session.retired, *session.segments, *session.lost)
    return [s for s in every if id(s) not in unreadable]


def placement_gaps(session: Session, unreadable: frozenset[int]) -> list[tuple[int, int]]:
    """First and last step of the gaps between the segments whose placements can be read.

    Segments are numbered, so a gap in the numbers is a lost segment. A segment without a placement has no
    file of placements and is no gap.
    """
    gaps: list[tuple[int, int]] = []
    number, step = 0, None
    for segment in sorted((*session.retired, *session.segments, *session.lost), key=lambda s: s.seq):
        if segment.last_step < 0:
            continue  # a journal that has no step yet
        if segment.seq != number:
            last = segment.first_step - 1
            gaps.append((last if step is None else step, last))
        if id(segment) in unreadable:
            gaps.append((segment.first_step, segment.last_step))
        # After damage in a journal there may have been more steps.
        number, step = -1 if segment.cut else segment.last_seq + 1, segment.last_step + 1
    return [(first, last) for first, last in gaps if first <= last]


class _Statement(NamedTuple):
    """A row of placements; ``remains``: of the steps around it nothing else is kept."""

    step: int
    layer: int
    ep_size: int
    slots: Int32
    remains: bool


def _statements(sessions: Sequence[Session], unreadable: frozenset[int]) -> Iterator[tuple[int, _Statement]]:
    """Every row that counts, with its rank, the lower ranks first."""
    by_rank: dict[int, list[Session]] = {}
    for session in sessions:
        if session.segments or session.retired:
            by_rank.setdefault(session.info.ep_rank, []).append(session)
    threads = requests_at_once(sessions[0].folder) if sessions else 1

    def read(item: tuple[int, list[Session]]) -> list[list[_Statement]]:
        return [_rows_of(session, unreadable) for session in item[1]]

    for (rank, own), rows in ordered_map(read, sorted(by_rank.items()), threads):
        if len(own) == 1:
            yield from ((rank, row) for row in rows[0])
            continue
        # If a rank has several sessions, a statement holds for the steps that its session counts for.
        for first, end, number in _owned(own):
            gaps = [gap for gap, _ in placement_gaps(own[number], unreadable)]
            in_force = {row.layer: row for row in rows[number] if row.step <= first}
            for row in in_force.values():
                if not any(row.step < gap <= first for gap in gaps):
                    yield rank, row._replace(step=first)
            yield from ((rank, row) for row in rows[number] if first < row.step < end)


def _statements_near(sessions: Sequence[Session], steps: StepRange) -> list[tuple[int, _Statement]] | None:
    """The rows of a range of steps, and of so many before it that all placements in force there are known.

    A rank can repeat a placement late, so the step from which one is in force is known only with the one
    before it. None if all rows have to be read: sessions of a rank overlap, or some steps are not kept.
    """
    if any(session.retired or session.lost for session in sessions) or _overlap(sessions):
        return None
    waiting = sorted(
        (
            (session.info.ep_rank, segment)
            for session in sessions
            for segment in session.segments
            if 0 <= segment.first_step < steps.end and segment.last_step >= 0
        ),
        key=lambda item: item[1].last_step,
    )
    layers = max((segment.shape.num_moe_layers for _, segment in waiting if segment.shape), default=0)
    threads = requests_at_once(sessions[0].folder) if sessions else 1
    found: list[tuple[int, _Statement]] = []
    #: The placements of each layer up to the range, after all steps of segments that were not read.
    earlier: list[set[tuple[int, bytes]]] = [set() for _ in range(layers)]
    first = steps.first
    while waiting and not all(len(placements) > 1 for placements in earlier):
        group = []
        first = min(first, waiting[-1][1].last_step)
        while waiting and waiting[-1][1].last_step >= first:
            group.append(waiting.pop())
            first = min(first, group[-1][1].first_step)
        for (rank, segment), rows in ordered_map(lambda item: _rows_in(item[1]), group, threads):
            for row in rows:
                if not segment.first_step <= row.step <= segment.last_step or row.layer >= layers:
                    return None
                found.append((rank, row))
                if row.step <= steps.first:
                    earlier[row.layer].add((row.ep_size, row.slots.tobytes()))
    return sorted(found, key=lambda item: (item[0], item[1].step))


def _overlap(sessions: Sequence[Session]) -> bool:
    """Whether two sessions of one rank have steps in one range."""
    spans = sorted(
        (session.info.ep_rank, min(s.first_step for s in session.segments), session.last_step)
        for session in sessions
        if session.segments
    )
    return any(
        rank == next_rank and first <= last
        for (rank, _, last), (next_rank, first, _) in itertools.pairwise(spans)
    )


def _rows_of(session: Session, unreadable: frozenset[int]) -> list[_Statement]:
    """The rows of a session, in order of steps."""
    found = [row for segment in _readable(session, unreadable) for row in _rows_in(segment)]
    return sorted(found, key=lambda row: row.step)


def _rows_in(segment: Segment) -> list[_Statement]:
    rows = segment.placements()
    remains = isinstance(segment, ParquetSegment) and segment.entry.tier is Tier.GONE
    numbers = zip(rows.step.tolist(), rows.layer.tolist(), rows.ep_size.tolist(), strict=True)
    return [
        _Statement(*row, slots, remains) for row, slots in zip(numbers, rows.physical_to_logical, strict=True)
    ]


def _owned(sessions: Sequence[Session]) -> list[tuple[int, int, int]]:
    """``(first step, first step of the next stretch, index of the session)`` whose loads count there."""
    step = [np.empty(0, np.int64)]
    owner = [np.empty(0, np.int64)]
    for number, session in enumerate(sessions):
        for segment in session.segments:
            rows = segment.steps()
            # A session that idled or dropped steps may not know of a change in them.
            recorded = rows.step[rows.status == Status.RECORDED]
            step.append(recorded)
            owner.append(np.full(len(recorded), number))
        ends = [(e.first_step, e.last_step) for e in session.thinned if e.thinned and e.thinned.recorded]
        step.append(np.array(ends, np.int64).reshape(-1))
        owner.append(np.full(2 * len(ends), number))
    steps, owners = np.concatenate(step), np.concatenate(owner)
    # Of the sessions that recorded a step, the newest one's load counts, as in the blocks.
    order = np.lexsort((owners, steps))
    last = np.flatnonzero(np.diff(steps[order], append=NO_END))
    steps, owners = steps[order][last], owners[order][last]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    firsts = steps[starts]
    firsts[:1] = -1  # include what the first one stated before its first load
    until = np.append(firsts, NO_END)[1:]
    return list(zip(firsts.tolist(), until.tolist(), owners[starts].tolist(), strict=True))
