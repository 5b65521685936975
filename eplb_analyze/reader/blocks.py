"""Blocks: consecutive steps of one shape, joined over all ranks, with loads summed over ranks.

A run is read block by block, so that memory does not grow with its length. :mod:`eplb_analyze.reader.join`
decides which session of a rank counts and whether a step is complete.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.formulas import Float64, Terms
from eplb_analyze.parallel import ordered_map, prefetch, split_range
from eplb_analyze.reader.join import (
    ABSENT,
    JoinedRows,
    Source,
    StepState,
    join_rows,
    overlapping_segments,
    same_shape_ranges,
)
from eplb_analyze.reader.lost import LostRank, full, lost_in, remaining, serving, serving_ranks, serving_slots
from eplb_analyze.reader.tiers import Ranges, Tiers
from eplb_analyze.sessions.discovery import Session
from eplb_analyze.sessions.segments import DamagedSegmentError, Segment, layers_at_once
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.storage.path import requests_at_once
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.schema import Scope, Status

#: No step's phase; that of a step without one is -1.
NO_PHASE = -2
#: The attributes of a block with a value for each step.
_BY_STEP = (
    "step", "state", "state_as_joined", "time_ns", "clock_ns", "since_last_ms", "until_next_ms", "num_tokens",
    "step_ms", "device_ms", "phase",
)  # fmt: skip


class RankSteps(NamedTuple):
    """Steps of one rank, in order of steps: arrays of one length.

    Attributes:
        at: int64, index into the block's ``step``.
        session: int64, the session that recorded the step; its clock does not go back.
        clock_ns: int64, ns since 1970 by the session's monotonic clock.
        since_last_ns: float64, since the rank's step before; NaN if that is not in the same segment.
        step_ms, device_ms: float64, as in :class:`Block`; of this rank.
        num_tokens: int64, of this rank; -1 if unknown.
    """

    at: Int64
    session: Int64
    clock_ns: Int64
    since_last_ns: Float64
    step_ms: Float64
    device_ms: Float64
    num_tokens: Int64


class Block:
    """Consecutive seen steps of one shape.

    Attributes:
        step: int64 [S], ascending.
        state: uint8 [S], a :class:`StepState` each.
        state_as_joined: likewise, also in an :class:`EstimateBlock` as it is: incomplete.
        shape: the shape of the loads, without ranks that are lost; None if no rank recorded any.
        ranks: the writer ranks [R] that ``status`` has a row for.
        status: uint8 [R, S], a :class:`~eplb_dump.format.schema.Status` each, or ABSENT.
        time_ns: int64 [S], the wall clock, which can jump.
        clock_ns: int64 [S], ns since 1970 by the session's monotonic clock, which cannot.
        since_last_ms, until_next_ms: float64 [S], ms by ``clock_ns`` from the step before, and to the next
            one. It may be of a phase that is left out; NaN if it is not in the block or was not seen.
        num_tokens, phase: int64 [S]; -1 if unknown; phase is an index into ``phases``.
        step_ms: float64 [S], the engine's own time of the pass in ms; NaN if unknown. The largest over the
            ranks that recorded the step.
        device_ms: likewise the time on the device, from CUDA events.
        missing: the ranks that its complete steps lack, as it is an :class:`EstimateBlock`.
        one_phase: whether steps of other phases are left out, as it is a :class:`PhaseBlock`.
        has_loads: whether experts' loads are kept; else only their sums per EP rank.
        left_out: steps of the run that are in no block, because less is kept of them.
        keeps_loads: whether loads that were read are kept, as it is a :class:`KeptBlock`.
    """

    missing: tuple[int, ...] = ()
    one_phase: bool = False
    has_loads: bool = True
    left_out: Ranges = Ranges()
    keeps_loads: bool = False

    def __init__(
        self,
        sources: Sequence[Source],
        rows: JoinedRows,
        low: int,
        high: int,
        shape: Shape | None,
        scope: Scope,
    ) -> None:
        self._sources = sources
        self._owner = rows.owner[:, low:high]
        self._scope = scope
        self.step = rows.step[low:high]
        self.state = self.state_as_joined = rows.state[low:high]
        self.status = rows.status[:, low:high]
        self.ranks = rows.ranks
        self.shape = shape
        self.time_ns = rows.time_ns[low:high]
        self.clock_ns = rows.clock_ns[low:high]
        apart = np.where(np.diff(self.step) == 1, np.diff(self.clock_ns) / 1e6, np.nan)
        self.since_last_ms = np.insert(apart, 0, np.nan)
        self.until_next_ms = np.append(apart, np.nan)
        self.num_tokens = rows.num_tokens[low:high]
        self.step_ms = rows.step_ms[low:high]
        self.device_ms = rows.device_ms[low:high]
        self.phase = rows.phase[low:high]
        self.phases = rows.phases

    def serving_only(self) -> Block:
        """The block without its lost ranks; itself if there are none."""
        return self if self.shape is None or not lost_in(self.shape) else ServingBlock(self)

    @property
    def recorded(self) -> Int64:
        """The complete, recorded steps, which figures use: int64."""
        recorded: Int64 = self.step[self.state == StepState.RECORDED]
        return recorded

    def phase_names(self, steps: Int64) -> list[str | None]:
        """What the engine calls the phase of each of some steps of this block."""
        codes = self.phase[np.searchsorted(self.step, steps)].tolist()
        return [self.phases[code] if code >= 0 else None for code in codes]

    def missing_ranks(self, step: int) -> list[int]:
        """The ranks whose part of a step is missing."""
        column = int(np.searchsorted(self.step, step))
        have = {
            rank
            for rank, status in zip(self.ranks, self.status[:, column], strict=True)
            if status in (Status.RECORDED, Status.DUMMY)
        }
        return [rank for rank in self.expected_ranks if rank not in have]

    def of_rank(self, rank: int) -> RankSteps:
        """What a writer rank recorded of these steps by its own clock. Raises DamagedSegmentError."""
        parts = []
        row = self.ranks.index(rank) if rank in self.ranks else -1
        for source in self._sources if row >= 0 else ():
            if source.rank != rank:
                continue
            rows = source.rows().rows
            here = np.minimum(np.searchsorted(self.step, rows.step), len(self.step) - 1)
            there = np.flatnonzero(
                (self.step[here] == rows.step)
                & (self._owner[row, here] == source.session)
                & (self.status[row, here] == rows.status)
                & (rows.status != ABSENT)
            )
            since = np.diff(rows.monotonic_ns, prepend=0).astype(np.float64)
            since[np.diff(rows.step, prepend=-2) != 1] = np.nan
            parts.append(
                RankSteps(
                    here[there],
                    np.full(len(there), source.session, np.int64),
                    rows.monotonic_ns[there] + source.clock_offset_ns,
                    since[there],
                    rows.step_ms[there].astype(np.float64),
                    rows.device_ms[there].astype(np.float64),
                    rows.num_tokens[there],
                )
            )
        if not parts:
            none, unknown = np.empty(0, np.int64), np.empty(0)
            return RankSteps(none, none, none, unknown, unknown, unknown, none)
        columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
        # A rejected step can repeat a number; of equal rows the first is enough.
        _, first = np.unique(columns[0], return_index=True)
        return RankSteps(*(column[first] for column in columns))

    def without_ranks(self) -> Iterator[tuple[tuple[int, ...], Int64]]:
        """The incomplete steps that lack the rows of some ranks, by these ranks: ``(ranks, steps)``."""
        bad = np.flatnonzero(
            (self.state == StepState.INCOMPLETE) & (self.status == Status.RECORDED).any(axis=0)
        )
        if self._scope is Scope.GLOBAL or self.shape is None or not len(bad):
            return
        expected = np.array(self.expected_ranks)
        known = np.isin(expected, self.ranks)
        rows = np.full((len(expected), len(bad)), ABSENT, np.uint8)
        rows[known] = self.status[np.searchsorted(self.ranks, expected[known])][:, bad]
        judged = ((rows == Status.RECORDED) | (rows == Status.DUMMY) | (rows == ABSENT)).all(axis=0)
        rows, bad = rows[:, judged], bad[judged]
        patterns, which = np.unique(rows == ABSENT, axis=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T):
            if pattern.any():
                yield tuple(expected[pattern].tolist()), self.step[bad[which.reshape(-1) == number]]

    @property
    def expected_ranks(self) -> Sequence[int]:
        """The writers that a complete step needs: all ranks that serve, or the one that writes the sums."""
        return serving_ranks(self._shape()) if self._scope is Scope.LOCAL else self.ranks

    def rank_load(self, steps: Int64 | None = None) -> Int64:
        """Tokens per EP rank, summed over the writers: int64 ``[len(steps), layers, ep_size]``.

        ``steps``: ascending steps of this block; default the complete ones.
        """
        parts = self.rank_load_parts(steps)
        return np.concatenate([load for _, load in parts], axis=1)

    def loads(self, first: int, last: int, steps: Int64 | None = None) -> Int64:
        """Tokens per physical expert of layers ``first`` to ``last - 1``, summed over the writers.

        int64 ``[len(steps), last - first, num_physical_experts]``.
        """
        parts = self.load_parts(steps, first, last)
        return np.concatenate([load for _, load in parts], axis=1)

    def rank_load_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Int64]]:
        """:meth:`rank_load` a few layers at a time: ``(layer, int64 [len(steps), layers, ep_size])``."""
        for layer, load in self.stored_rank_load_parts(steps, first, last):
            yield layer, load.astype(np.int64, copy=False)

    def stored_rank_load_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """:meth:`rank_load_parts` without a copy: int32 if the counts fit, else int64."""
        width = self._shape().ep_size
        for low, high, pieces in self._pieces(lambda s, *which: s.rank_loads(*which), steps, first, last):
            yield low, self._sum(pieces, steps, high - low, width).transpose(1, 0, 2)

    def load_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Int64]]:
        """:meth:`loads` a few layers at a time: ``(layer, int64 [len(steps), layers, physical])``."""
        for layer, load in self.stored_parts(steps, first, last):
            yield layer, load.astype(np.int64, copy=False).transpose(1, 0, 2)

    def stored_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """:meth:`load_parts` by layer: ``(layer, [layers, len(steps), physical])``, int32 or int64.

        The loads of one writer are as stored, not a copy.
        """
        width = self._shape().num_physical_experts
        for low, high, pieces in self.pieces(steps, first, last):
            yield low, self._sum(pieces, steps, high - low, width)

    def terms(
        self,
        token_replication: int = 1,
        first: int = 0,
        last: int | None = None,
        *,
        each: Callable[[int, npt.NDArray[Any]], object] | None = None,
    ) -> Terms:
        """The terms of the formulas over the complete steps, for all layers or a range of indices.

        Args:
            each: called with the parts that they are of, as :meth:`stored_rank_load_parts` yields them.
        """
        shape = self._shape()
        last = shape.num_moe_layers if last is None else last
        terms = Terms(len(self.recorded), last - first, shape.ep_size, token_replication, serving(shape))
        for layer, load in self.stored_rank_load_parts(first=first, last=last):
            terms.add(layer - first, load)
            if each is not None:
                each(layer, load)
        return terms

    def active_terms(self, first: int = 0, last: int | None = None) -> Terms:
        """:meth:`terms` of the number of slots with at least one token, in place of tokens."""
        shape = self._shape()
        last = shape.num_moe_layers if last is None else last
        terms = Terms(len(self.recorded), last - first, shape.ep_size, serving=serving(shape))
        for layer, load in self.load_parts(first=first, last=last):
            terms.add(layer - first, active_experts(load, shape.ep_size))
        return terms

    def pieces(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, int, Iterator[Piece]]]:
        """The segments' loads for a few layers at a time: ``(layer, layer after the last, pieces)``.

        Pieces are read when they are taken, one after another, so that many ranks' files need the memory
        of one. Take them before the next layers.
        """
        return self._pieces(lambda s, *which: s.loads(*which), steps, first, last)

    def _pieces(
        self, read: Read, steps: Int64 | None, first: int, last: int | None
    ) -> Iterator[tuple[int, int, Iterator[Piece]]]:
        """:meth:`pieces` of what ``read`` reads: a segment's ``loads`` or ``rank_loads``."""
        shape = self._shape()
        last = shape.num_moe_layers if last is None else last
        cursors = [
            (_Cursor(segment, read, slice(int(there[0]), int(there[-1]) + 1)), here, there - there[0])
            for segment, here, there in self.matches(self.recorded if steps is None else steps)
        ]
        longest = max((len(cursor.segment.load_steps()) for cursor, _, _ in cursors), default=1)
        at_once = layers_at_once(longest, shape)
        edges = [first, *range(first - first % at_once + at_once, last, at_once), last]
        for low, high in itertools.pairwise(edges):

            def take(cursor: tuple[_Cursor, Int64, Int64], low: int = low, high: int = high) -> Piece:
                return cursor[0].take(low, high), *cursor[1:]

            found = ordered_map(take, cursors, requests_at_once(cursors[0][0].segment.path) if cursors else 1)
            yield low, high, (piece for _, piece in found)

    def each_layer(self, uses: Sequence[UseLayer], layers: range | None = None) -> None:
        """Read the loads of the complete steps, and give those of each layer to all of ``uses``.

        Args:
            uses: called by one thread, in order of layers. An array is only valid in the call.
            layers: by default all.
        """
        if not uses:
            return
        layers = range(self._shape().num_moe_layers) if layers is None else layers
        # A thread reads the next layers meanwhile. Threads that shared the layers were no faster on two
        # cores: numpy computes in short calls, after each of which the interpreter lock changes hands.
        for first, loads in prefetch(self.stored_parts(None, layers.start, layers.stop)):
            for layer, load in enumerate(loads, first):
                for use in uses:
                    use(layer, load)

    def stop_keeping(self) -> None:
        """Keep no more loads, if it is a :class:`KeptBlock`: what is read from here on is not read again."""

    def layer_shares(self, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
        """The layers as a range for each worker, cut between row groups, which are decoded whole."""
        shape = self._shape()
        last = shape.num_moe_layers if last is None else last
        longest = max((source.segment.recorded for source in self._sources), default=1)
        at_once = layers_at_once(longest, shape)
        shares = split_range(first // at_once, -(-last // at_once))
        return [(max(first, low * at_once), min(last, high * at_once)) for low, high in shares]

    def _sum(self, pieces: Iterable[Piece], steps: Int64 | None, layers: int, width: int) -> npt.NDArray[Any]:
        """Pieces added up: ``[layers, len(steps), width]``; as stored, not a copy, if of one writer."""
        count = len(self.recorded if steps is None else steps)
        out: npt.NDArray[Any] | None = None
        largest = 0
        for values, here, there in pieces:
            part = values[:, sliced(there)]
            if out is None and len(here) == count:
                out = part  # all steps, of one writer or the first
                continue
            if out is None:
                out = np.zeros((layers, count, width), np.int32)
            elif not largest:
                largest, out = int(out.max(initial=0)), out.copy()
            largest += int(part.max(initial=0))
            if largest > np.iinfo(np.int32).max:
                out = out.astype(np.int64, copy=False)
            out[:, sliced(here)] += part
        return np.zeros((layers, count, width), np.int32) if out is None else out

    def _shape(self) -> Shape:
        if self.shape is None:
            raise ValueError("no rank recorded any load in these steps")
        return self.shape

    def matches(self, steps: Int64) -> Iterator[tuple[Segment, Int64, Int64]]:
        """``(segment, index into steps, index into the segment's steps)`` of the loads that count."""
        if not len(steps):
            return
        columns = np.searchsorted(self.step, steps)
        writers, recorded_shape = set(self.expected_ranks), full(self._shape())
        sources = [
            source
            for source in self._sources
            if source.rank in writers
            and source.readable
            and source.segment.shape == recorded_shape
            and source.segment.first_step <= steps[-1]
            and source.segment.last_step >= steps[0]
        ]
        if not sources:
            return
        threads = requests_at_once(sources[0].segment.path)
        for source, load_steps in ordered_map(lambda source: source.segment.load_steps(), sources, threads):
            row = self.ranks.index(source.rank)
            counts = (self._owner[row, columns] == source.session) & (
                self.status[row, columns] == Status.RECORDED
            )
            if self._scope is Scope.GLOBAL:
                # If several ranks wrote sums for a step, the lowest rank's count.
                counts &= ~(self.status[:row, columns] == Status.RECORDED).any(axis=0)
            _, here, there = np.intersect1d(np.where(counts, steps, -1), load_steps, return_indices=True)
            if len(here):
                yield source.segment, here, there


def active_experts(load: npt.NDArray[Any], ep_size: int) -> npt.NDArray[np.intp]:
    """How many slots of each rank have a token; ``load [n, layers, physical]``: ``[n, layers, ep_size]``."""
    active: npt.NDArray[np.intp] = np.count_nonzero(load.reshape(*load.shape[:2], ep_size, -1), axis=3)
    return active


class ServingBlock(Block):
    """A block as of an engine that has only the ranks that serve, numbered from 0 again.

    Its :meth:`pieces` are as recorded, with all slots.
    """

    def __init__(self, block: Block) -> None:
        self.__dict__.update(block.__dict__)
        self._block, recorded = block, block._shape()
        self._slots, self._ranks = serving_slots(recorded), serving_ranks(recorded)
        self.shape = remaining(recorded)

    def matches(self, steps: Int64) -> Iterator[tuple[Segment, Int64, Int64]]:
        return self._block.matches(steps)

    def stored_rank_load_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        for layer, load in self._block.stored_rank_load_parts(steps, first, last):
            yield layer, load[:, :, self._ranks]

    def stored_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        for layer, load in self._block.stored_parts(steps, first, last):
            yield layer, load[:, :, self._slots]


class PhaseBlock(Block):
    """A block without the steps of other phases, which may leave it without any."""

    def __init__(self, block: Block, phase: str) -> None:
        self.__dict__.update(block.__dict__)
        self.one_phase = True
        code = block.phases.index(phase) if phase in block.phases else NO_PHASE
        chosen = np.flatnonzero(block.phase == code)
        self._owner, self.status = block._owner[:, chosen], block.status[:, chosen]
        for name in _BY_STEP:
            setattr(self, name, getattr(block, name)[chosen])


class EstimateBlock(Block):
    """A block in which steps that lack the rows of just these ranks count as complete, and no others.

    Their loads are those that the other ranks recorded, a sample of the same routing.
    """

    def __init__(self, block: Block, missing: tuple[int, ...]) -> None:
        self.__dict__.update(block.__dict__)
        self.missing = missing
        steps = dict(block.without_ranks()).get(missing, np.empty(0, np.int64))
        others = np.where(block.state == StepState.RECORDED, np.uint8(StepState.INCOMPLETE), block.state)
        self.state = np.where(np.isin(block.step, steps), np.uint8(StepState.RECORDED), others)


class KeptBlock(Block):
    """A block that keeps the loads read of its complete steps, so that several consumers read them once.

    They take memory as long as the block: 4 bytes for each step, layer and slot, whatever the number of
    writers. So the last consumer first calls :meth:`stop_keeping`.
    """

    def __init__(self, block: Block) -> None:
        self.__dict__.update(block.__dict__)
        self._block, self.keeps_loads = block, True
        #: By layer ``[n, physical]``; and by ranks as :meth:`stored_rank_load_parts` yields them.
        self._kept: dict[int, npt.NDArray[Any]] = {}
        self._kept_by_rank: list[tuple[int, npt.NDArray[Any]]] | None = None
        self._terms: dict[int, Terms] = {}

    def stop_keeping(self) -> None:
        self.keeps_loads = False

    def matches(self, steps: Int64) -> Iterator[tuple[Segment, Int64, Int64]]:
        return self._block.matches(steps)

    def pieces(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, int, Iterator[Piece]]]:
        chosen = self.recorded if steps is None else steps
        if not np.isin(chosen, self.recorded).all():
            yield from self._block.pieces(steps, first, last)
            return
        here, there = np.arange(len(chosen)), np.searchsorted(self.recorded, chosen)
        for low, loads in self._read(first, self._shape().num_moe_layers if last is None else last):
            yield low, low + len(loads), iter([(loads, here, there)])

    def _read(self, first: int, last: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The loads of the complete steps, ``(layer, [layers, n, physical])``, kept or read."""
        for known, layers in itertools.groupby(range(first, last), self._kept.__contains__):
            if known:
                yield from ((layer, self._kept[layer][np.newaxis]) for layer in layers)
                continue
            unread = [*layers]
            for low, stored in self._block.stored_parts(None, unread[0], unread[-1] + 1):
                loads = _narrow(stored)
                if self.keeps_loads:
                    self._kept |= dict(enumerate(loads, low))
                yield low, loads

    def stored_rank_load_parts(
        self, steps: Int64 | None = None, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        if steps is not None or first or last not in (None, self._shape().num_moe_layers):
            yield from self._block.stored_rank_load_parts(steps, first, last)
            return
        if self._kept_by_rank is None:
            parts = self._block.stored_rank_load_parts()
            self._kept_by_rank = [(layer, _narrow(load)) for layer, load in parts]
        yield from self._kept_by_rank

    def terms(
        self,
        token_replication: int = 1,
        first: int = 0,
        last: int | None = None,
        *,
        each: Callable[[int, npt.NDArray[Any]], object] | None = None,
    ) -> Terms:
        if first or last not in (None, self._shape().num_moe_layers):
            return super().terms(token_replication, first, last, each=each)
        if token_replication not in self._terms:
            self._terms[token_replication] = super().terms(token_replication, each=each)
        elif each is not None:
            for layer, load in self.stored_rank_load_parts():
                each(layer, load)
        return self._terms[token_replication]


def _narrow(load: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Counts as int32, if they fit."""
    fits = load.dtype == np.int32 or load.max(initial=0) <= np.iinfo(np.int32).max
    return load.astype(np.int32, copy=False) if fits else load


#: Called with a layer's index and its loads in the complete steps: int32 or int64 ``[steps, physical]``.
UseLayer = Callable[[int, npt.NDArray[Any]], object]
#: A segment's ``loads`` or ``rank_loads``, from one layer to another.
Read = Callable[[Segment, int, int, slice], Generator[tuple[int, npt.NDArray[Any]], None, None]]
#: Values of a segment ``[layers, n, width]``, index into the steps asked for, index into the ``n``.
Piece = tuple[npt.NDArray[Any], Int64, Int64]


class _Cursor:
    """Reads layers of a segment in ascending order, in some steps; each row group is decoded once."""

    def __init__(self, segment: Segment, read: Read, steps: slice) -> None:
        self.segment = segment
        self._read, self._steps = read, steps
        self._first = self._last = 0
        self._values: npt.NDArray[Any] = np.empty(0)

    def take(self, first: int, last: int) -> npt.NDArray[Any]:
        """The values of layers ``first`` to ``last - 1``. Raises DamagedSegmentError."""
        taken = []
        while first < last:
            if not self._first <= first < self._last:
                self._next(first, last)
            taken.append(self._values[first - self._first : last - self._first])
            first = min(last, self._last)
        if last == self._last:
            self._values, self._last = np.empty(0), 0
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def _next(self, first: int, last: int) -> None:
        with contextlib.closing(self._read(self.segment, first, last, self._steps)) as parts:
            part = next(parts, None)
        if part is None or not part[0] <= first < part[0] + len(part[1]):
            reason = "it has fewer layers than it states"
            raise DamagedSegmentError(self.segment, "loads", self.segment.path, reason)
        self._first, self._values = part
        self._last = self._first + len(self._values)


def sliced(index: Int64) -> Int64 | slice:
    """An ascending index, as a slice if it has no gap, which copies nothing."""
    first, end = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
    return slice(first, end) if end - first == len(index) else index


def iter_blocks(
    sessions: Sequence[Session],
    scope: Scope,
    steps: StepRange,
    unreadable: frozenset[int] = frozenset(),
    lost: Sequence[LostRank] = (),
    tiers: Tiers | None = None,
    *,
    with_loads: bool = False,
) -> Iterator[Block]:
    """The blocks of a run, in order of steps.

    Args:
        sessions: all sessions of the run, oldest first.
        steps: the range to stay in.
        unreadable: ``id`` of segments whose loads cannot be read.
        lost: the ranks that died while the engine went on.
        tiers: what is kept of steps. Those of which a rank's rows were retired are in no block.
        with_loads: leave out steps without experts' loads, too.
    """
    tiers = tiers or Tiers()
    left_out = tiers.without_loads if with_loads else tiers.retired
    last_shape = _shape_before(sessions, steps.first)
    sources = [
        Source.of(session, number, segment, readable=id(segment) not in unreadable)
        for number, session in enumerate(sessions)
        for segment in session.segments
        if segment.first_step < steps.end and segment.last_step >= steps.first
    ]
    ranks = sorted({session.info.ep_rank for session in sessions})
    for group in overlapping_segments(sources):
        threads = requests_at_once(group[0].segment.path)
        parts = [rows for _, rows in ordered_map(Source.rows, group, threads)]
        initial = max(sessions[s.session].info.ep_size for s in group)
        rows = join_rows(parts, ranks, scope, last_shape, initial, lost)
        last_shape = rows.shapes[rows.shape[-1]] if rows.shape[-1] >= 0 else last_shape
        if left_out:
            rows = rows.select(~left_out.contains(rows.step))
            if not len(rows.step):
                continue
        inside = np.searchsorted(rows.step, steps)
        cuts = tiers.by_rank.edges(int(rows.step[0]), int(rows.step[-1]) + 1)
        for start, stop in same_shape_ranges(rows, int(inside[0]), int(inside[1]), cuts):
            shape = rows.shapes[rows.shape[start]] if rows.shape[start] >= 0 else None
            block = Block(group, rows, start, stop, shape, scope)
            block.left_out = left_out
            block.has_loads = not tiers.by_rank.contains(rows.step[start : start + 1])[0]
            yield block


def _shape_before(sessions: Sequence[Session], step: int) -> Shape | None:
    """The shape of the last loads recorded before a step."""
    every = (s for session in sessions for s in (*session.segments, *session.retired))
    before = [s for s in every if s.shape is not None and 0 <= s.last_step < step]
    return max(before, key=lambda segment: segment.last_step).shape if before else None


def parts(sessions: Sequence[Session], about: int) -> list[StepRange]:
    """Ranges of ``about`` steps or a block more, cut only between blocks."""
    edges: list[int] = []
    last = -1
    for first, end in sorted((s.first_step, s.last_step) for x in sessions for s in x.segments):
        if not edges or (first > last and first - edges[-1] >= about):
            edges.append(first)
        last = max(last, end)
    return [StepRange(*pair) for pair in itertools.pairwise([*edges, last + 1])] if edges else []
