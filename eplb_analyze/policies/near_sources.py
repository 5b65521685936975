"""`near_sources`: a balanced placement whose ranks are renumbered so that the fewest tokens cross nodes.

Which rank holds a set of experts does not change the balance, but it changes how far tokens go. Given the
tokens that each rank sent in the window, the best numbering is an assignment problem: each set goes to one
rank, and the tokens that then stay on its node do not depend on where the other sets go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def near_sources(
    placed: Int32, by_source: npt.NDArray[Any], num_nodes: int, *, grouped: bool = False
) -> Int32:
    """Renumber the ranks of a placement.

    First the tokens that cross nodes are as few as possible, then as many as possible stay on their rank.

    Args:
        placed: int ``[layers, slots]``; no slot is empty.
        by_source: tokens of each rank ``[layers, ranks, num_logical_experts]``.
        num_nodes: divides the ranks, which are numbered node by node.
        grouped: ranks that share a node stay together, so that groups of experts stay on one node.
    """
    layers, ranks, experts = by_source.shape
    node = np.arange(ranks) * num_nodes // ranks
    apart = node[:, np.newaxis] != node
    if grouped and num_nodes < ranks:
        of_nodes = by_source.reshape(layers, num_nodes, -1, experts).sum(axis=2)
        placed = near_sources(placed, of_nodes, num_nodes)
    out = np.empty_like(placed)
    for layer in range(layers):
        sets = placed[layer].reshape(ranks, -1)
        held = np.zeros((ranks, experts))
        np.add.at(held, (np.arange(ranks)[:, np.newaxis], sets), 1)
        share = held / np.maximum(1, held.sum(axis=0))  # replicas get equal shares
        sent = by_source[layer].astype(np.float64)
        of_node = sent.reshape(num_nodes, -1, experts).sum(axis=1).repeat(ranks // num_nodes, axis=0)
        on_rank, on_node = share @ sent.T, share @ of_node.T
        # A token on its node counts more than all tokens on their ranks.
        stay = on_node * (1 + sent.sum()) + on_rank
        if grouped and num_nodes < ranks:
            stay[apart] = -1 - stay.sum()
        out[layer] = sets[np.argsort(assign(-stay))].reshape(-1)
    return out


def assign(cost: Float64) -> Int64:
    """The column of each row, no two alike, with the least total cost: int64 ``[n]`` of ``[n, n]``.

    The Hungarian method: rows are added one at a time, along shortest augmenting paths (Kuhn 1955).
    """
    n = len(cost)
    of_row, of_column = np.zeros(n), np.zeros(n + 1)
    #: The row of each column; column n is where a path starts.
    row_of = np.full(n + 1, -1)
    for row in range(n):
        row_of[n], column = row, n
        least, before = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, np.bool_)
        while row_of[column] >= 0:
            done[column] = True
            here = row_of[column]
            reduced = cost[here] - of_row[here] - of_column[:n]
            shorter = ~done[:n] & (reduced < least)
            least[shorter], before[shorter] = reduced[shorter], column
            nearest = int(np.where(done[:n], np.inf, least).argmin())
            step = least[nearest]
            of_row[row_of[done]] += step
            of_column[done] -= step
            least[~done[:n]] -= step
            column = nearest
        while column != n:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = np.empty(n, np.int64)
    columns[row_of[:n]] = np.arange(n)
    return columns
