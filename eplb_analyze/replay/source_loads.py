"""The loads of a block by the EP rank that sent the tokens, a few layers at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import LayerHistory, fold
from eplb_analyze.sessions.segments import layers_at_once
from eplb_dump.format.journal import Int64

#: So many numbers are held at once, for each thread; at least a layer.
NUMBERS_AT_ONCE = 1 << 26

Loads = list[npt.NDArray[Any]]


class SourceLoads:
    """Tokens of each logical expert that each rank sent, of a run of scope local.

    Each layer is taken once, in about ascending order, by any thread. Layers of one row group are decoded
    together.
    """

    def __init__(
        self,
        block: Block,
        steps: Int64,
        histories: Sequence[LayerHistory],
        experts: int,
        rank_of: Mapping[int, int],
    ) -> None:
        """``rank_of``: the rank that wrote a segment, by its ``id``."""
        shape = block.shape
        assert shape is not None
        self._steps, self._histories, self._experts = steps, histories, experts
        self._ranks, self._rank_of = shape.ep_size, rank_of
        self._segments = list(block.matches(steps))
        longest = max((len(segment.load_steps()) for segment, _, _ in self._segments), default=1)
        most = NUMBERS_AT_ONCE // (len(steps) * experts * shape.ep_size)
        self._at_once = max(1, min(layers_at_once(longest, shape), most))
        self._lock = threading.Lock()
        self._reading: dict[int, threading.Lock] = {}
        self._read: dict[int, Loads] = {}

    def take(self, layer: int, dtype: npt.DTypeLike) -> Loads:
        """A layer's loads ``[num_logical_experts, steps]``, by rank. Raises DamagedSegmentError."""
        first = layer - layer % self._at_once
        with self._lock:
            reading = self._reading.setdefault(first, threading.Lock())
        with reading:
            if layer not in self._read:
                last = min(first + self._at_once, len(self._histories))
                self._read.update(enumerate(self._layers(first, last, dtype), first))
            return self._read.pop(layer)

    def _layers(self, low: int, high: int, dtype: npt.DTypeLike) -> list[Loads]:
        shape = self._experts, len(self._steps)
        out = [[np.zeros(shape, dtype) for _ in range(self._ranks)] for _ in range(low, high)]
        for segment, here, there in self._segments:
            rank, steps = self._rank_of[id(segment)], self._steps[here]
            for first, loads in segment.loads(low, high):
                for layer in range(max(low, first), min(high, first + len(loads))):
                    own = loads[layer - first][there]
                    for period, slots in self._histories[layer].periods(steps):
                        assert slots is not None
                        sent = fold(own[period], slots, self._experts)
                        out[layer - low][rank][:, here[period]] = sent.T
        return out


def by_rank(loads: SourceLoads, layer: int) -> npt.NDArray[Any]:
    """A layer's loads ``[steps, ranks * num_logical_experts]``, one rank after another."""
    return np.concatenate(loads.take(layer, np.int64)).T
