"""The figures of `traffic`: tokens by source and destination, rank or node.

With scope local a rank's file holds what that rank contributed to the load of every rank: a row of
the matrix. Only the sums per rank are read, not single experts.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import remembers_run
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.configurations import Sums, SumsReport, last_configuration
from eplb_analyze.reader.lost import lost_in
from eplb_analyze.reader.readings import Reading
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.schema import Scope

#: The number of busiest pairs in the JSON document.
PAIRS = 10
By = Literal["rank", "node"]


@frozen
class Shares:
    """Shares of the tokens by how far they go; None if not known, or if there are no tokens."""

    same_rank: float | None
    #: To another rank of the same node.
    same_node: float | None
    other_node: float | None


@frozen
class Pair:
    source: int
    destination: int
    tokens: int
    share: float
    #: Over the mean of all pairs of two different ranks (or nodes).
    times_mean: float


@frozen
class Receiver:
    """The tokens that a rank (or node) receives, and how many come from others."""

    destination: int
    tokens: int
    times_mean: float
    #: The share of its tokens that came from other ranks or nodes.
    from_others: float | None
    #: The rank or node that sent it most.
    busiest_source: int | None


@frozen
class LayerTraffic:
    layer: int
    tokens: int
    shares: Shares


@frozen
class TrafficReport(SumsReport):
    """How many tokens each rank or node sent to each other one."""

    layer: int | None
    #: Whether sources and destinations are ranks or nodes.
    by: By
    ep_size: int
    ranks_per_node: int | None
    #: The shares of all tokens that stayed on the rank, on the node, or left it.
    shares: Shares
    #: The shares if tokens went to the same ranks whichever rank they came from.
    by_chance: Shares
    #: Tokens from the source (row) to the destination (column), by rank or by node.
    matrix: Int64
    #: The ranks, or the nodes, that were lost: no mean is over them.
    lost: list[int]
    #: The ranks, or the nodes, of which nothing was recorded: what they sent is not known.
    missing_sources: list[int]
    layers: list[LayerTraffic]
    notes: list[str]

    @property
    def tokens(self) -> int:
        """All tokens of the matrix, also those that stayed on their rank."""
        return int(self.matrix.sum())

    def pairs(self, most: int) -> list[Pair]:
        """The busiest pairs of two different ranks (or nodes)."""
        return busiest_pairs(self.matrix, most, len(self.lost), len(self.missing_sources))

    def receivers(self) -> list[Receiver]:
        """The ranks (or nodes) that serve, the busiest first."""
        got = self.matrix.sum(axis=0)
        mean = self.tokens / (len(got) - len(self.lost))
        return [
            Receiver(
                int(i),
                int(got[i]),
                float(got[i] / mean) if mean else 0.0,
                float(1 - self.matrix[i, i] / got[i]) if got[i] else None,
                int(self.matrix[:, i].argmax()) if got[i] else None,
            )
            for i in np.argsort(-got, kind="stable")
            if i not in self.lost
        ]

    def to_json(self) -> dict[str, Any]:
        return self.document(
            {
                "layer": self.layer,
                "by": self.by,
                "ep_size": self.ep_size,
                "ranks_per_node": self.ranks_per_node,
                "steps": self.steps,
                "first_step": self.first_step,
                "last_step": self.last_step,
                "recorded": self.recorded,
                "missing_ranks": self.missing_ranks,
                "tokens": self.tokens,
                "shares": self.shares,
                "shares_by_chance": self.by_chance,
                "matrix": self.matrix,
                "pairs": self.pairs(PAIRS),
                "receivers": self.receivers(),
                "layers": [{"layer": t.layer, "tokens": t.tokens, **vars(t.shares)} for t in self.layers],
                "notes": self.notes,
            }
        )


def busiest_pairs(matrix: npt.NDArray[Any], most: int, lost: int = 0, missing: int = 0) -> list[Pair]:
    """The busiest pairs of two different ranks (or nodes).

    Args:
        matrix: tokens from the source (row) to the destination (column).
        lost, missing: so many were lost, and of so many nothing was recorded: no mean is over them.
    """
    flows = matrix.copy()
    np.fill_diagonal(flows, 0)
    serving, total = len(flows) - lost, matrix.sum()
    mean = flows.sum() / max(1, (serving - missing) * (serving - 1))
    order = np.argsort(-flows, axis=None, kind="stable")[:most]
    rows, columns = np.unravel_index(order, flows.shape)
    return [
        Pair(int(r), int(c), round(float(flows[r, c])), float(flows[r, c] / total), float(flows[r, c] / mean))
        for r, c in zip(rows, columns, strict=True)
        if flows[r, c]
    ]


@remembers_run
def traffic_report(
    run: Run,
    layer: int | None = None,
    steps: tuple[int, int] | None = None,
    *,
    by: By = "rank",
    ranks_per_node: int | None = None,
) -> TrafficReport:
    """Tokens from source to destination, in all layers or one, by the model's layer number.

    Args:
        steps: a half-open range of steps; default all.
        ranks_per_node: default what the dump says.

    Raises:
        NotInDumpError: the dump has no such layer or step.
        DumpError: the dump does not show which rank sent what, or no complete step is in the range.
    """
    run = run.with_loads()
    cannot = f"{run.path}: the dump does not show which rank sent which tokens"
    if run.scope is not Scope.LOCAL:
        raise DumpError(f"{cannot}: with scope {run.scope.value}, loads are already summed over ranks")
    if run.info.token_replication > 1:
        times = run.info.token_replication
        raise DumpError(f"{cannot}: every token is counted by {times} ranks (token replication)")
    for note in run.import_caveats("token_source"):
        raise DumpError(f"{cannot}: {note}")
    ranks_per_node = ranks_per_node or run.info.ranks_per_node
    if by == "node" and ranks_per_node is None:
        raise run.nodes_unknown()
    first, last = (0, run.info.num_layers)
    if layer is not None:
        first = run.layer_index(layer)
        last = first + 1

    def read() -> TrafficReport:
        rank_of = {id(s): session.info.ep_rank for session in run.sessions for s in session.segments}
        sums, whole, notes = last_configuration(
            run, steps, lambda shape: _Flows(shape, rank_of), estimate=True
        )
        notes += uneven_nodes(sums.shape.ep_size, ranks_per_node)
        flows = sums.flows[first:last]
        rank = np.arange(sums.shape.ep_size)
        node = None if ranks_per_node is None else rank // ranks_per_node
        matrix = flows.sum(axis=0)
        lost = sorted(lost_in(sums.shape))
        if lost:
            notes.append(f"rank {listed(lost)} was lost in these steps and is left out of means")
        missing = [*sums.missing]
        if missing:
            notes.append(f"rank {listed(missing)} did not record what it sent; its tokens are left out")
        return TrafficReport(
            *sums.head(run, whole),
            layer=layer,
            by=by,
            ep_size=sums.shape.ep_size,
            ranks_per_node=ranks_per_node,
            shares=_shares(matrix, node),
            by_chance=_shares(np.outer(matrix.sum(axis=1, dtype=float), matrix.sum(axis=0)), node),
            matrix=by_node(matrix, node) if by == "node" and node is not None else matrix,
            lost=lost if by == "rank" or node is None else _whole_nodes(lost, node),
            missing_sources=missing if by == "rank" or node is None else _whole_nodes(missing, node),
            layers=[
                LayerTraffic(number, int(own.sum()), _shares(own, node))
                for number, own in zip(run.info.layers[first:last], flows, strict=True)
            ],
            notes=notes,
        )

    return run.retry_without_damaged(read)


def _whole_nodes(lost: list[int], node: npt.NDArray[np.int64]) -> list[int]:
    """The nodes of which all ranks are lost."""
    serving = np.delete(node, lost)
    return [int(number) for number in np.unique(node) if number not in serving]


class _Flows(Sums):
    """Tokens by layer, source rank and destination rank."""

    def __init__(self, shape: Shape, rank_of: dict[int, int]) -> None:
        super().__init__(shape)
        self.flows = np.zeros((shape.num_moe_layers, shape.ep_size, shape.ep_size), np.int64)
        self._rank_of = rank_of

    def _reading(self, block: Block) -> Reading:
        return Reading(None, lambda: self._flows(block))

    def _flows(self, block: Block) -> Int64:
        flows = np.zeros_like(self.flows)
        for segment, _, there in block.matches(block.recorded):
            source = self._rank_of[id(segment)]
            for first, load in segment.rank_loads(0, self.shape.num_moe_layers):
                flows[first : first + len(load), source] += load[:, there].sum(axis=1)
        return flows

    def merge(self, block: Block, part: Int64) -> None:
        self.flows += part


def _shares(matrix: npt.NDArray[Any], node: npt.NDArray[np.int64] | None) -> Shares:
    total = matrix.sum()
    if not total:
        return Shares(None, None, None)
    own = float(np.trace(matrix) / total)
    if node is None:
        return Shares(own, None, None)
    inside = float(matrix[node[:, None] == node].sum() / total)
    return Shares(own, inside - own, 1 - inside)


def by_node(matrix: npt.NDArray[Any], node: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Sum tokens ``[ranks, ranks]`` by the node of each rank."""
    starts = np.flatnonzero(np.diff(node, prepend=-1))
    sums: npt.NDArray[Any] = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    return sums
