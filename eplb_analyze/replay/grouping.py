"""The groups of experts and the nodes that policies are given: as stated, or as the recorded placements show.

Engines keep each group of a DeepSeek-like model on one node. A replay without the groups promises what the
engine's policy cannot reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eplb_analyze.errors import UsageError
from eplb_analyze.policies.policy import ungrouped
from eplb_analyze.reader.placements import PlacementHistory, crossings, holdings
from eplb_analyze.reader.recorded_setting import Recorded
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.text import plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape

#: Groups are seen in placements only if at least so many binary choices of a node agree with them: an expert
#: that moves to another rank is log2(nodes) choices.
MIN_CHOICES = 40
#: The latest placements of layers that are looked at.
MAX_PLACEMENTS = 4096

UNKNOWN_GROUPS = (
    "the number of expert groups was not recorded and is assumed to be 1; if the model has groups, pass "
    "--num-groups, because engines keep each group on one node"
)


@frozen
class Grouping:
    """What policies are given."""

    num_groups: int
    #: The nodes of the recorded EP size.
    num_nodes: int
    #: Whether the recorded placements show it, and neither the user nor the engine states all of it.
    seen: bool = False

    #: If known, also of the ranks of another EP size.
    ranks_per_node: int | None = None

    def nodes(self, ep_size: int, recorded_ranks: int | None = None) -> int:
        """The nodes of a number of ranks; one if it is not known or does not divide them."""
        if ep_size == recorded_ranks:
            return self.num_nodes
        on_node = self.ranks_per_node
        return ep_size // on_node if on_node and ep_size % on_node == 0 else 1

    def to_json(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "num_nodes": self.num_nodes, "from_placements": self.seen}


class Groupings:
    """The groupings that suit a recording, the likeliest first.

    Attributes:
        likely: at least one; several if the placements show groups, of which finer ones suit them, too.
        known_nodes: as the user gives them, or the engine or the writer states them; None if unknown.
        seen_groups: the least number of groups that the placements show on the nodes of the first.
        notes: what they assume.
    """

    def __init__(
        self, run: Run, today: Recorded, shape: Shape, num_groups: int | None, num_nodes: int | None
    ) -> None:
        """``num_groups``, ``num_nodes``: as the user gives them.

        Raises UsageError if the nodes do not divide the ranks.
        """
        ranks, on_node = shape.ep_size, run.info.ranks_per_node
        if num_nodes is not None and ranks % num_nodes:
            raise UsageError(
                f"--num-nodes: {plural(ranks, 'EP rank')} cannot be divided evenly among {num_nodes} nodes"
            )
        self.notes: list[str] = []
        groups, nodes = num_groups or today.num_groups, num_nodes or today.num_nodes
        on_nodes = (
            max(1, ranks // on_node) if on_node and (on_node >= ranks or ranks % on_node == 0) else None
        )
        self.known_nodes = nodes if nodes is not None and ranks % nodes == 0 else on_nodes
        if nodes is not None and ranks % nodes:
            self.notes.append(
                f"{ranks} EP ranks cannot be divided evenly among {nodes} nodes; policies assume one node"
            )
            nodes = 1
        if nodes is None and on_node is not None:
            uneven = uneven_nodes(ranks, on_node)
            self.notes += [f"{note}; policies assume one node (--num-nodes)" for note in uneven]
            nodes = 1 if uneven else max(1, ranks // on_node)
        shown = ShownGroups(run.history, shape, run.info.num_logical_experts)
        found = [
            Grouping(count, of_nodes, seen=groups is None or nodes is None)
            for of_nodes in ([nodes] if nodes is not None else _divisors(ranks))
            for count in shown.on_nodes(of_nodes)
        ]
        self.seen_groups = found[0].num_groups if found else None
        if groups is not None and nodes is None:
            found = [one for one in found if one.num_groups == groups]
        elif groups is not None:
            found = []
        # More nodes say more; groups of one node are groups of half as many nodes, too.
        found = [one for one in found if one.num_nodes == found[0].num_nodes]
        self.likely = found or [Grouping(groups or 1, nodes or 1)]
        self.likely = [
            replace(one, ranks_per_node=ranks // one.num_nodes if one.num_nodes > 1 else on_node)
            for one in self.likely
        ]
        if groups is None and not found and (nodes or 1) > 1 and not shown.enough(nodes or 1):
            self.notes.append(UNKNOWN_GROUPS)
        if groups is not None and (note := ungrouped(self.likely[0].num_nodes, groups)):
            self.notes.append(note)

    def note(self, chosen: Grouping) -> list[str]:
        """What to say of a grouping that only the placements show."""
        if not chosen.seen:
            return []
        return [
            f"the recorded placements keep each of {chosen.num_groups} groups of experts on one of "
            f"{plural(chosen.num_nodes, 'node')}, and so do the policies; if the engine uses other "
            f"numbers, pass --num-groups and --num-nodes"
        ]


def _divisors(ranks: int) -> Iterator[int]:
    return (nodes for nodes in range(ranks, 1, -1) if ranks % nodes == 0)


class ShownGroups:
    """Groups of consecutive experts that the engine's rearrangements kept on one node each.

    Only layers that a rearrangement changed count: engines start with experts in order, which looks like
    groups.
    """

    def __init__(self, history: PlacementHistory, shape: Shape, num_logical_experts: int) -> None:
        ranks, slots = shape.ep_size, shape.num_physical_experts
        in_layer = history.num_experts(num_logical_experts, shape.num_moe_layers)
        placed: list[Int32] = []
        counts: list[int] = []
        #: Experts that moved to another rank, but for ranks that only swapped all that they hold.
        self._moved = 0
        changes = ((c, i) for c in reversed(history.rearrangements()) for i in c.layers)
        for change, index in changes:
            layer = history.layer(index)
            old, new = layer.at(change.first_step - 1), layer.at(change.last_step)
            if old is None or new is None or not len(old) == len(new) == slots:
                continue
            before, after = (holdings(each, ranks, num_logical_experts) for each in (old, new))
            kept = {experts.tobytes() for experts in before > 0}
            regrouped = np.array([experts.tobytes() not in kept for experts in after > 0])
            self._moved += int(crossings(before, after)[regrouped].sum())
            placed.append(new)
            counts.append(int(in_layer[index]))
            if len(placed) == MAX_PLACEMENTS:
                break
        self._placed = np.array(placed, np.int32).reshape(len(placed), slots)
        self._counts = np.array(counts, np.int64)

    def enough(self, num_nodes: int) -> bool:
        """Whether groups would be seen if there were any."""
        choices = self._moved * math.log2(num_nodes)
        return choices >= MIN_CHOICES and len(np.unique(self._placed, axis=0)) > 1

    def on_nodes(self, num_nodes: int) -> list[int]:
        """The numbers of groups of at least two experts of which each has all replicas on one node."""
        return groups_on_nodes(self._placed, self._counts, num_nodes) if self.enough(num_nodes) else []


def groups_on_nodes(placements: Int32, num_experts: Int64 | Sequence[int], num_nodes: int) -> list[int]:
    """The numbers of groups of consecutive experts of which each has all its replicas on one node.

    Args:
        placements: int32 ``[rows, slots]``; the slots of a node are consecutive, -1 is an empty one.
        num_experts: of each row's layer ``[rows]``; an expert by itself is no group.

    Returns:
        Multiples of ``num_nodes``, ascending; none if there is one node.
    """
    counts = np.asarray(num_experts, np.int64)
    if num_nodes < 2 or not len(placements):
        return []
    row, at = np.nonzero(placements >= 0)
    expert, node = placements[row, at].astype(np.int64), at * num_nodes // placements.shape[1]
    found = []
    for groups in range(num_nodes, int(counts.min()) // 2 + 1, num_nodes):
        if (counts % groups).any():
            continue
        on = np.zeros((len(placements), groups, num_nodes), np.bool_)
        on[row, expert * groups // counts[row], node] = True
        if (on.sum(axis=2) <= 1).all():
            found.append(groups)
    return found
