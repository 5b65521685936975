"""The figures of `ranks`: which EP rank or node the others waited for, how often, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.json_report import as_json, remembers_run
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import Sums, SumsReport, last_configuration
from eplb_analyze.reader.lost import lost_in, serving
from eplb_analyze.reader.readings import Reading
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape


@frozen
class Straggler:
    """An EP rank, or a node with its ranks."""

    #: The number of the rank, or of the node.
    number: int
    #: Its EP ranks: the one, or those of the node.
    ranks: list[int]
    load: float
    #: The mean load of its ranks over that of all ranks; None without tokens, or if the ranks are lost.
    times_mean: float | None
    #: In how many active (step, layer) it, or a rank of the node, was the slowest; a tie of n ranks counts
    #: 1/n for each.
    slowest: float
    slowest_share: float | None
    #: Σ (max − mean) over these: the tokens for which all ranks waited.
    excess_tokens: float
    #: The share of the whole loss.
    excess_share: float | None


@frozen
class LayerHeat:
    """Load of each rank over the layer's mean, and of each node's ranks; None without any token."""

    layer: int
    ranks: list[float | None]
    nodes: list[float | None]


@frozen
class RankReport(SumsReport):
    """Which ranks and nodes the others had to wait for, and how much that took."""

    #: The number of (step, layer) with tokens.
    active: int
    #: Σ (max − mean) over (step, layer).
    loss_tokens: float
    idle_fraction: float | None
    ranks: list[Straggler]
    #: Empty if the dump does not say how many ranks a node has.
    nodes: list[Straggler]
    layers: list[LayerHeat]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "ranks": [_named(rank, "rank") for rank in self.ranks],
            "nodes": [{**_named(node, "node"), "ranks": node.ranks} for node in self.nodes],
        }
        figures = as_json(figures)
        return super().to_json() | figures


def _named(straggler: Straggler, name: str) -> dict[str, Any]:
    figures = asdict(straggler)
    del figures["ranks"]
    return {name: figures.pop("number"), **figures}


class RankSums(Sums):
    """Sums of one configuration: the loads, and how often each rank was the slowest and at what cost."""

    def __init__(self, run: Run, shape: Shape) -> None:
        super().__init__(shape)
        self._run = run
        self.active = 0
        self.max_tokens = 0.0
        #: [layers, ranks], as recorded: token replication not divided out.
        self.load: Int64 = np.zeros((shape.num_moe_layers, shape.ep_size), np.int64)
        self.slowest: Float64 = np.zeros(shape.ep_size)
        self.excess: Float64 = np.zeros(shape.ep_size)

    def _reading(self, block: Block) -> Reading:
        return Reading(None, lambda: self._part(block))

    def _part(self, block: Block) -> tuple[int, float, Int64, Float64, Float64]:
        load = np.zeros_like(self.load)

        def add(first: int, counts: npt.NDArray[Any]) -> None:
            load[first : first + counts.shape[1]] = counts.sum(axis=0)

        terms = self._run.terms(block, each=add)
        by_slowest = terms.by_slowest().sum(axis=0), terms.by_slowest(terms.excess).sum(axis=0)
        return int(terms.active.sum()), float(terms.maximum.sum()), load, *by_slowest

    def merge(self, block: Block, part: tuple[int, float, Int64, Float64, Float64]) -> None:
        active, max_tokens, load, slowest, excess = part
        self.active += active
        self.max_tokens += max_tokens
        self.load += load
        self.slowest += slowest
        self.excess += excess


@remembers_run
def rank_report(
    run: Run, steps: tuple[int, int] | None = None, *, ranks_per_node: int | None = None
) -> RankReport:
    """Which ranks and nodes were the slowest, over the last configuration of a run or of a range.

    Args:
        steps: a half-open range of steps; default all.
        ranks_per_node: default what the dump says.

    Raises:
        NotInDumpError: no step of the run is in the range.
        DumpError: no step in it was recorded.
    """
    return run.retry_without_damaged(
        lambda: rank_report_of(
            run,
            *last_configuration(run, steps, lambda shape: RankSums(run, shape), estimate=True),
            ranks_per_node=ranks_per_node,
        )
    )


def rank_report_of(
    run: Run, sums: RankSums, seen: Completeness, notes: list[str], *, ranks_per_node: int | None = None
) -> RankReport:
    """:func:`rank_report` of sums already made; see :func:`last_configuration`."""
    ranks_per_node = ranks_per_node or run.info.ranks_per_node
    per_rank = [[rank] for rank in range(sums.shape.ep_size)]
    per_node = _nodes(sums.shape.ep_size, ranks_per_node)
    notes += uneven_nodes(sums.shape.ep_size, ranks_per_node)
    loss = float(sums.excess.sum())
    by_rank, by_node = (_heat(sums, groups) for groups in (per_rank, per_node))
    heat = zip(run.info.layers, by_rank, by_node, strict=True)
    return RankReport(
        *sums.head(run, seen),
        active=sums.active,
        loss_tokens=loss,
        idle_fraction=loss / sums.max_tokens if sums.max_tokens else None,
        ranks=_stragglers(run, sums, per_rank),
        nodes=_stragglers(run, sums, per_node),
        layers=[LayerHeat(*row) for row in heat],
        notes=notes,
    )


def require_nodes(run: Run) -> None:
    """Raise NotInDumpError if the dump does not say how many ranks a node has."""
    if run.info.ranks_per_node is None:
        raise run.nodes_unknown()


def _nodes(ranks: int, size: int | None) -> list[list[int]]:
    return [list(range(r, min(r + size, ranks))) for r in range(0, ranks, size)] if size else []


def _heat(sums: RankSums, groups: list[list[int]]) -> list[list[float | None]]:
    """For each layer, the mean load of each group's ranks over the layer's mean."""
    return [[_times_mean(row, group, sums.shape) for group in groups] for row in sums.load]


def _times_mean(load: Int64, group: list[int], shape: Shape) -> float | None:
    """The mean load of a group's ranks over that of all, of those that serve; None if there is none."""
    here = [rank for rank in group if rank not in lost_in(shape)]
    return float(load[here].mean() / (load.sum() / serving(shape))) if here and load.any() else None


def _stragglers(run: Run, sums: RankSums, groups: list[list[int]]) -> list[Straggler]:
    load, loss = sums.load.sum(axis=0), float(sums.excess.sum())
    tokens = run.tokens(load)
    found = []
    for number, group in enumerate(groups):
        slowest, excess = float(sums.slowest[group].sum()), float(sums.excess[group].sum())
        total = float(tokens[group].sum())
        found.append(
            Straggler(
                number=number,
                ranks=group,
                load=int(total) if run.info.token_replication == 1 else total,
                times_mean=_times_mean(load, group, sums.shape),
                slowest=slowest,
                slowest_share=slowest / sums.active if sums.active else None,
                excess_tokens=excess,
                excess_share=excess / loss if loss else None,
            )
        )
    return found
