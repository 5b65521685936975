"""Where the tokens of each source rank go under a placement: to its own rank, its own node, or another node.

A replica of c gets 1 / c of an expert's tokens on average, whichever rule deals them, unless the source rank
has chosen one: then it gets all of that rank. So these are expected tokens, and exact without replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_analyze.dispatch.rule import Counts
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.placements import even_shares
from eplb_dump.format.journal import Int32

#: A row of scores in some of the steps: the row, its columns, its slots and what source ranks have chosen.
Piece = tuple[int, slice, Int32, Int32 | None]


class Locality:
    """The tokens of a layer by the rank that sent them."""

    def __init__(self, by_source: Sequence[Counts], num_nodes: int | None) -> None:
        """
        Args:
            by_source: tokens of each expert ``[num_logical_experts, steps]``, for each rank.
            num_nodes: None if not known.
        """
        self._loads, self._nodes = np.stack(by_source), num_nodes
        ranks, experts, steps = self._loads.shape
        self._ranks, self._experts = ranks, experts
        #: Of each node ``[num_nodes, num_logical_experts, steps]``.
        self._by_node = self._loads[:0]
        if num_nodes is not None:
            self._by_node = self._loads.reshape(num_nodes, -1, experts, steps).sum(axis=1)

    def stays(self, piece: Piece) -> tuple[Float64, Float64]:
        """The tokens of each step that stay on their rank, and those on their node: NaN if not known."""
        _, part, slots, chosen = piece
        on_rank = self._within(self._loads, slots, chosen, part, self._ranks)
        if self._nodes is None:
            return on_rank, np.full(on_rank.shape, np.nan)
        loads = self._by_node if chosen is None else self._loads
        return on_rank, self._within(loads, slots, chosen, part, self._nodes)

    def _within(self, loads: Counts, slots: Int32, chosen: Int32 | None, part: slice, groups: int) -> Float64:
        """The tokens of each step that stay in the group of their source, as ``loads`` has the sources."""
        even = even_shares(slots, groups, self._experts).T
        share = even.repeat(len(loads) // groups, axis=0)
        if chosen is not None:
            own = np.arange(self._ranks)[:, np.newaxis] * groups // self._ranks
            share = np.where(chosen >= 0, chosen * groups // len(slots) == own, share)
        source, expert = np.nonzero(share)
        stay: Float64 = share[source, expert] @ loads[source, expert, part]
        return stay

    def flows(self, pieces: Sequence[Piece], rows: int) -> Float64:
        """Tokens by source and destination rank: float64 ``[rows, ranks, ranks]``."""
        out = np.zeros((rows, self._ranks, self._ranks))
        edges = sorted({part.start for _, part, _, _ in pieces} | {self._loads.shape[2]})
        sums = np.add.reduceat(self._loads, edges[:-1], axis=2, dtype=np.float64)
        total = np.concatenate([np.zeros((*sums.shape[:2], 1)), sums.cumsum(axis=2)], axis=2)
        at = {edge: i for i, edge in enumerate(edges)}
        for row, part, slots, chosen in pieces:
            sent = total[:, :, at[part.stop]] - total[:, :, at[part.start]]
            even = even_shares(slots, self._ranks, self._experts)
            if chosen is None:
                out[row] += sent @ even
                continue
            source, expert = np.nonzero(chosen >= 0)
            to = chosen[source, expert] * self._ranks // len(slots)
            np.add.at(out[row], (source, to), sent[source, expert])
            out[row] += np.where(chosen < 0, sent, 0) @ even
        return out
