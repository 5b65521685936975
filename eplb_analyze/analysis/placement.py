"""The figures of `placement`: which expert is in which slot at a step, and what changed since another."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import numpy as np

from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import RunReport, remembers_run
from eplb_analyze.reader.lost import ranks_lost_at
from eplb_analyze.reader.placements import replicas
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import EMPTY_SLOT, Tier


@frozen
class LayerPlacement:
    """The placement of one layer, and its replicas."""

    layer: int
    #: The step from which it is in force.
    since: int
    ep_size: int
    num_physical_experts: int
    #: Replicas of the expert that has fewest.
    replicas_min: int
    #: Replicas of the expert that has most.
    replicas_max: int
    #: Logical experts with more than one replica.
    replicated: int
    #: How often a rank holds an expert more than once.
    twice_on_a_rank: int
    #: Empty slots of ranks that are not lost.
    empty_slots: int
    #: For each rank, the logical expert in each of its slots, -1 in an empty one.
    ranks: list[list[int]]
    #: For each logical expert of the layer, how many slots hold it.
    replicas: list[int]

    def ranks_of(self, expert: int) -> list[int]:
        return [rank for rank, slots in enumerate(self.ranks) if expert in slots]


@frozen
class RankChange:
    """The logical experts that a rank gained and lost."""

    rank: int
    #: Logical experts that the rank got.
    experts_in: list[int]
    #: Logical experts that the rank gave up.
    experts_out: list[int]


@frozen
class LayerChange:
    layer: int
    slots_changed: int
    #: Expert weights that a rank had to fetch because it did not hold them.
    experts_crossed_ranks: int
    #: Weights that no rank of the node held; None if nodes are not known.
    experts_crossed_nodes: int | None
    #: The ranks whose experts changed.
    ranks: list[RankChange]


@frozen
class PlacementReport(RunReport):
    """Which expert is in which slot at a step, and what changed since another step."""

    step: int
    #: The step that ``changes`` are since.
    against: int | None
    layers: list[LayerPlacement]
    #: The layers that changed; None without a step to compare with.
    changes: list[LayerChange] | None
    #: Ranks that are lost at the step; their slots are shown as empty, and are in no count.
    lost_ranks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@remembers_run
def placement_report(
    run: Run, step: int | None = None, against: int | None = None, layer: int | None = None
) -> PlacementReport:
    """The placement at a step (default: the last), and what changed since the step ``against``.

    Args:
        layer: the model's number of a layer; default all.

    Raises:
        NotInDumpError: the dump has no such layer or step, or no placement is known for it.
    """
    indices = range(run.info.num_layers) if layer is None else [run.layer_index(layer)]
    at = _step(run, step)
    lost = [*ranks_lost_at(at, run.lost_ranks)]
    now = _known(run, at, indices)
    notes = []
    absent = len(indices) - len(now)
    if absent:
        notes.append(f"no placement is known at step {at} for {absent} of {len(indices)} layers")
    changes = None
    if against is not None:
        before = _known(run, _step(run, against), indices)
        both = [index for index in now if index in before]
        if len(both) < len(now):
            notes.append(
                f"not compared: {len(now) - len(both)} layers, because their placement at step {against} "
                f"is not known"
            )
        sizes = {(before[i].ep_size, now[i].ep_size) for i in both} - {(p.ep_size,) * 2 for p in now.values()}
        for old, new in sorted(sizes):
            notes.append(f"ep_size changed from {old} to {new}: ranks are compared by their numbers")
        for size in sorted({now[i].ep_size for i in both}):
            notes += uneven_nodes(size, run.info.ranks_per_node)
        found = [_change(before[i], now[i], run.info.ranks_per_node, lost) for i in both]
        changes = [change for change in found if change.slots_changed]
    if lost:
        notes.append(f"rank {listed(lost)} is lost at step {at}, so its slots are not counted")
    return PlacementReport(
        run.info.run_id, run.info.model, at, against, list(now.values()), changes, lost, notes
    )


def _step(run: Run, step: int | None) -> int:
    first, last = run.step_range
    tier = None if step is None else run.tiers.at(step)
    if step is not None and tier is Tier.MINUTES:
        return step  # of which every placement is kept
    if step is None and first is None and run.tiers.ranges:
        return run.tiers.ranges[-1].steps.end - 1  # the newest placement is kept in every tier
    why = run.why_retired(StepRange() if step is None else StepRange(step, step + 1))
    if why is not None:
        raise NotInDumpError(why)
    if first is None or last is None:
        raise NotInDumpError(f"{run.path}: the run has no step yet")
    if step is not None and not first <= step <= last:
        raise NotInDumpError(f"{run.path}: no step {step}; the run has steps {first} to {last}")
    return last if step is None else step


def _known(run: Run, step: int, indices: Any) -> dict[int, LayerPlacement]:
    """The placements in force at a step, by layer index."""
    found = {}
    dead = ranks_lost_at(step, run.lost_ranks)
    experts = run.history.num_experts(run.info.num_logical_experts, run.info.num_layers)
    for index in indices:
        history = run.history.layer(index)
        i = history.index_at(step)
        if i < 0:
            continue
        slots = history.slots[i]
        copies = replicas(slots, run.info.num_logical_experts)[: experts[index]]
        ranks = slots.reshape(history.ep_sizes[i], -1)
        per_rank = [np.unique(own[own != EMPTY_SLOT], return_counts=True)[1] for own in ranks]
        found[index] = LayerPlacement(
            layer=run.info.layers[index],
            since=history.steps[i],
            ep_size=len(ranks),
            num_physical_experts=len(slots),
            replicas_min=int(copies.min()),
            replicas_max=int(copies.max()),
            replicated=int((copies > 1).sum()),
            twice_on_a_rank=sum(int((counts > 1).sum()) for counts in per_rank),
            empty_slots=sum(int((own == EMPTY_SLOT).sum()) for r, own in enumerate(ranks) if r not in dead),
            ranks=ranks.tolist(),
            replicas=copies.tolist(),
        )
    if not found:
        lost = "; it is lost (see `check`)" if run.history.lost else ""
        raise NotInDumpError(f"{run.path}: no placement is known at step {step}{lost}")
    return found


def _change(
    before: LayerPlacement, now: LayerPlacement, ranks_per_node: int | None, lost: list[int]
) -> LayerChange:
    """What changed; the slots of a rank that is ``lost`` now did not change, they are gone."""
    size = max(before.ep_size, now.ep_size)
    held, holds = ([_experts(p, rank) for rank in range(size)] for p in (before, now))
    came = [(rank, expert) for rank in range(size) for expert in holds[rank] - held[rank]]
    here = [rank for rank in range(now.ep_size) if rank not in lost]
    new = np.array(now.ranks)[here]
    same_shape = (before.ep_size, before.num_physical_experts) == (now.ep_size, now.num_physical_experts)
    to_nodes = None
    if ranks_per_node:
        on_node = {(rank // ranks_per_node, expert) for rank, own in enumerate(held) for expert in own}
        to_nodes = sum((rank // ranks_per_node, expert) not in on_node for rank, expert in came)
    return LayerChange(
        layer=now.layer,
        # Slots of two shapes are not the same slots.
        slots_changed=int((np.array(before.ranks)[here] != new).sum()) if same_shape else new.size,
        experts_crossed_ranks=len(came),
        experts_crossed_nodes=to_nodes,
        ranks=[
            RankChange(rank, sorted(holds[rank] - held[rank]), sorted(held[rank] - holds[rank]))
            for rank in range(size)
            if holds[rank] != held[rank] and rank not in lost
        ],
    )


def _experts(placement: LayerPlacement, rank: int) -> set[int]:
    return set(placement.ranks[rank]) - {EMPTY_SLOT} if rank < placement.ep_size else set()
