"""Tokens of each logical expert over the newest complete steps of a run that is being written.

Steps are summed in chunks: of about a second each while they are recent, of a sixteenth of the window later.
Only journals hold the counts of single experts in a form that is cheap to read, so steps that were read from
sealed segments are not in these sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.placements import LayerHistory, replicas
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT

#: Into so many chunks the steps of a window are divided.
CHUNKS = 16
SECOND_NS = 1_000_000_000


@dataclass
class _Chunk:
    first_step: int
    last_step: int
    steps: int
    #: ``[layers, logical experts]``
    tokens: Float64


@frozen
class ExpertTokens:
    """Tokens of each expert over some steps; ``tokens`` is float64 ``[layers, num_logical_experts]``."""

    steps: int
    tokens: Float64

    @property
    def times_mean(self) -> Float64:
        """Divided by the mean over the layer's experts; 0 if the layer has no token."""
        mean = self.tokens.mean(axis=1, keepdims=True)
        times: Float64 = np.divide(self.tokens, mean, out=np.zeros(self.tokens.shape), where=mean > 0)
        return times


class ExpertWindow:
    """The tokens of each expert over the steps of a window."""

    def __init__(self, window: int, num_logical_experts: int) -> None:
        self._width = max(1, window // CHUNKS)
        self._experts = num_logical_experts
        self._chunks: list[_Chunk] = []

    def add(self, news: CompleteSteps, layers: Mapping[int, LayerHistory], recent: int) -> None:
        """Add steps that became complete.

        Args:
            news: the steps; without the tokens of slots they are left out.
            layers: the placements of each layer index.
            recent: the first of the recent steps.
        """
        if news.load is None:
            return
        step = news.step
        changes = [s for history in layers.values() for s in history.steps]
        keys = [
            np.searchsorted(sorted(changes), step, side="right"),
            np.where(step < recent, step // self._width, -1),
            np.where(step < recent, -1, news.time_ns // SECOND_NS),
        ]
        starts = [0, *(1 + np.flatnonzero(np.any(np.diff(keys, axis=1), axis=0))).tolist()]
        for low, high in zip(starts, [*starts[1:], len(step)], strict=True):
            slots = placement(layers, int(step[low]), *news.load.shape[1:])
            tokens = news.load[low:high].sum(axis=0, dtype=np.int64)
            chunk = _Chunk(int(step[low]), int(step[high - 1]), high - low, self._fold(tokens, slots))
            self._chunks.append(chunk)

    def _fold(self, tokens: Int64, slots: Int32) -> Float64:
        cell = np.arange(len(slots))[:, np.newaxis] * self._experts + slots
        filled = (slots != EMPTY_SLOT) & (slots < self._experts)
        size = len(slots) * self._experts
        total = np.bincount(cell[filled], tokens[filled], size).astype(np.float64)
        return total.reshape(len(slots), self._experts)

    def trim(self, first: int, recent: int) -> None:
        """Drop the steps before ``first``, and merge chunks of those before ``recent``."""
        kept: list[_Chunk] = []
        for chunk in sorted(self._chunks, key=lambda c: c.first_step):
            if chunk.last_step < first:
                continue
            last = kept[-1] if kept else None
            if (
                last is not None
                and chunk.last_step < recent
                and last.first_step // self._width == chunk.first_step // self._width
                and last.tokens.shape == chunk.tokens.shape
            ):
                last.last_step = max(last.last_step, chunk.last_step)
                last.steps += chunk.steps
                last.tokens = last.tokens + chunk.tokens
            else:
                kept.append(chunk)
        self._chunks = kept

    def between(self, first: int, end: int) -> ExpertTokens | None:
        """Over the chunks that lie in ``first`` to ``end - 1``; None if none does."""
        inside = [c for c in self._chunks if first <= c.first_step and c.last_step < end]
        inside = [c for c in inside if c.tokens.shape == inside[-1].tokens.shape]
        if not inside:
            return None
        return ExpertTokens(sum(c.steps for c in inside), np.sum([c.tokens for c in inside], axis=0))


def placement(layers: Mapping[int, LayerHistory], step: int, num_layers: int, slots: int) -> Int32:
    """The experts in the slots of each layer at a step, int32 ``[num_layers, slots]``; -1 if unknown."""
    found = np.full((num_layers, slots), EMPTY_SLOT, np.int32)
    for layer, history in layers.items():
        here = history.at(step)
        if here is not None and layer < num_layers and len(here) == slots:
            found[layer] = here
    return found


def replica_counts(slots: Int32, num_logical_experts: int) -> Int64:
    """How many of the slots of each layer hold each expert: int64 ``[layers, num_logical_experts]``."""
    return np.stack([replicas(layer, num_logical_experts) for layer in slots])
