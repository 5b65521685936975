"""The figures of `layer`: the load of each rank, slot and expert of one layer in a step or range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import RunReport
from eplb_analyze.metrics import formulas
from eplb_analyze.metrics.losses import Bin, Bins, timeline
from eplb_analyze.reader.blocks import Block, active_experts
from eplb_analyze.reader.configurations import Sums, last_configuration
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import lost_in, serving
from eplb_analyze.reader.placements import fold, replicas
from eplb_analyze.reader.run import Run
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import STATUS_LABELS


@dataclass(frozen=True)
class RankLoad:
    rank: int
    load: float


@dataclass(frozen=True)
class SlotLoad:
    """A physical expert. ``logical`` is -1 in an empty slot, None if unknown or not the same in all steps."""

    physical: int
    rank: int
    logical: int | None
    load: float


@dataclass(frozen=True)
class ExpertLoad:
    """A logical expert, and what each rank got of it under the placements in force."""

    logical: int
    load: float
    share: float
    #: In the last placement.
    replicas: int
    ranks: list[RankLoad]


@dataclass(frozen=True)
class LayerReport(RunReport):
    layer: int
    first_step: int
    last_step: int
    #: How many steps the loads are summed over.
    steps: int
    #: False for steps that lack ranks: their loads are partial.
    complete: bool
    missing_ranks: list[int]
    #: Ranks that died before; ``ranks`` and ``slots`` are those of the others.
    lost_ranks: list[int]
    balancedness: float | None
    imbalance: float | None
    idle_fraction: float | None
    #: Of the rank with the most slots that have a token; the mean over steps.
    active_experts: float | None
    ranks: list[RankLoad]
    slots: list[SlotLoad]
    experts: list[ExpertLoad]
    #: Steps in the range at which the layer's placement changed.
    placement_changes: list[int]
    phase: str | None = None
    #: The mean balancedness of equal parts of these steps.
    timeline: list[Bin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def layer_report(
    run: Run, layer: int, step: int | None = None, steps: tuple[int, int] | None = None
) -> LayerReport:
    """Loads of one layer, by the model's layer number.

    Args:
        step: one step; an incomplete one is shown as far as it is there, and marked.
        steps: a half-open range; its complete steps are summed, if there are none, those that lack the same
            ranks. Neither: all steps.

    Raises:
        NotInDumpError: the dump has no such layer or step.
        DumpError: no step of the range was recorded.
    """
    index, run = run.layer_index(layer), run.with_loads()
    if step is not None:
        return run.retry_without_damaged(lambda: _one_step(run, layer, index, step))
    return run.retry_without_damaged(lambda: _range(run, layer, index, steps))


def _one_step(run: Run, layer: int, index: int, step: int) -> LayerReport:
    for block in run.blocks((step, step + 1)):
        state = int(block.state[0])
        there = (block.status == StepState.RECORDED).any()
        if block.shape is not None and there:
            return _report(run, layer, index, [(block, block.step)], complete=state == StepState.RECORDED)
        raise NotInDumpError(_no_loads(run, step, state))
    if why := run.why_retired((step, step + 1)):
        raise NotInDumpError(why)
    first, last = run.step_range
    known = "the run has no step yet" if first is None else f"the run has steps {first} to {last}"
    raise NotInDumpError(f"{run.path}: no step {step}; {known}")


def _no_loads(run: Run, step: int, state: int) -> str:
    label = STATUS_LABELS[state] if state < len(STATUS_LABELS) else "incomplete"
    text = f"{run.path}: step {step} has no loads: it is {label.replace('_', ' ')}"
    if state == StepState.NOT_SAMPLED:
        every = run.info.interval
        text += f"; every {every}th step was recorded, the last before it is step {step - step % every}"
    return text


def _range(run: Run, layer: int, index: int, steps: tuple[int, int] | None) -> LayerReport:
    found, _, notes = last_configuration(run, steps, _Blocks, estimate=True)
    report = _report(run, layer, index, found.blocks, complete=not found.missing)
    report.notes.extend(notes)
    return report


class _Blocks(Sums):
    """The blocks of a configuration with their complete steps; loads are read from the last one's only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.blocks: list[tuple[Block, Int64]] = []

    def _add(self, block: Block) -> None:
        self.blocks.append((block, block.recorded))


def _report(
    run: Run, layer: int, index: int, parts: list[tuple[Block, Int64]], *, complete: bool
) -> LayerReport:
    shape = parts[0][0].shape
    assert shape is not None
    experts = run.info.num_logical_experts
    slot_load = np.zeros(shape.num_physical_experts, np.int64)
    # By rank and logical expert, as the placements in force had it.
    logical_load = np.zeros((shape.ep_size, experts), np.int64)
    ratios: dict[str, list[formulas.Float64]] = {"balancedness": [], "imbalance": []}
    active: list[formulas.Float64] = []
    mean_tokens = max_tokens = 0.0
    history = run.history.layer(index)
    held: list[Int32 | None] = []  # the placements in force
    for block, steps in parts:
        load = block.loads(index, index + 1, steps)[:, 0]
        slot_load += load.sum(axis=0)
        for stretch, placed in history.periods(steps):
            slots = placed if placed is not None and len(placed) == load.shape[1] else None
            held.append(slots)
            if slots is not None:
                part = load[stretch].sum(axis=0).reshape(shape.ep_size, -1)
                for rank, own in enumerate(slots.reshape(shape.ep_size, -1)):
                    logical_load[rank] += fold(part[rank], own, experts)
        tokens = run.tokens(load.reshape(len(steps), 1, shape.ep_size, -1).sum(axis=3))
        for name, values in ratios.items():
            values.append(formulas.FORMULAS[name].per_step(tokens, serving(shape)))
        experts_with_tokens = active_experts(load[:, np.newaxis], shape.ep_size)
        active.append(formulas.ACTIVE_EXPERTS.per_step(experts_with_tokens))
        mean, maximum = formulas.idle_terms(tokens, serving(shape))
        mean_tokens, max_tokens = mean_tokens + mean, max_tokens + maximum
    first, last = int(parts[0][1][0]), int(parts[-1][1][-1])
    slots = held[-1]
    changes = [s for s in history.steps if first < s <= last]
    report = LayerReport(
        run_id=run.info.run_id,
        model=run.info.model,
        layer=layer,
        first_step=first,
        last_step=last,
        steps=sum(len(steps) for _, steps in parts),
        complete=complete,
        lost_ranks=[*lost_in(shape)],
        missing_ranks=[] if complete else parts[0][0].missing_ranks(first),
        balancedness=formulas.mean_known(ratios["balancedness"]),
        imbalance=formulas.mean_known(ratios["imbalance"]),
        idle_fraction=formulas.idle_fraction(mean_tokens, max_tokens),
        active_experts=formulas.mean_known(active),
        ranks=[
            RankLoad(rank, run.count(value))
            for rank, value in enumerate(slot_load.reshape(shape.ep_size, -1).sum(axis=1))
            if rank not in lost_in(shape)
        ],
        slots=[
            SlotLoad(physical, physical // shape.slots_per_rank, expert, run.count(value))
            for physical, (value, expert) in enumerate(
                zip(slot_load, _same_in_all(held, len(slot_load)), strict=True)
            )
            if physical // shape.slots_per_rank not in lost_in(shape)
        ],
        experts=[] if slots is None else _experts(run, index, slots, logical_load),
        placement_changes=changes,
        phase=parts[0][0].phase_names(np.array([first]))[0]
        if len(parts) == 1 and len(parts[0][1]) == 1
        else None,
        timeline=timeline(
            Bins(first, last),
            np.concatenate([steps for _, steps in parts]),
            np.concatenate(ratios["balancedness"]),
        ),
    )
    if report.lost_ranks:
        report.notes.append(
            f"rank {listed(report.lost_ranks)} is lost: figures cover only the "
            f"{plural(serving(shape), 'rank')} that serve"
        )
    if slots is None:
        report.notes.append(
            "no placement is known for these steps, so there are no figures per logical expert"
        )
    elif logical_load.sum() < slot_load.sum():
        unknown = int(slot_load.sum() - logical_load.sum())
        report.notes.append(f"{unknown:,} of {slot_load.sum():,} tokens went to slots without a known expert")
    if changes:
        report.notes.append(
            f"the placement changed {plural(len(changes), 'time')} in the range, last at step "
            f"{changes[-1]}; experts are counted by the placement in force at each step, and their "
            f"replicas are those of the last placement"
        )
    return report


def _same_in_all(placements: list[Int32 | None], slots: int) -> list[int | None]:
    """Each slot's expert; None if it is not known in all placements, or not the same."""
    known = [placed for placed in placements if placed is not None]
    if len(known) < len(placements):
        return [None] * slots
    same = (np.array(known) == known[-1]).all(axis=0)
    return [int(expert) if stays else None for expert, stays in zip(known[-1], same, strict=True)]


def _experts(run: Run, index: int, slots: Int32, load: Any) -> list[ExpertLoad]:
    total = int(load.sum())
    copies = replicas(slots, load.shape[1])
    own = int(run.history.num_experts(load.shape[1], index + 1)[index])
    return [
        ExpertLoad(
            logical,
            run.count(by_rank.sum()),
            float(by_rank.sum() / total) if total else 0.0,
            int(copies[logical]),
            [RankLoad(int(rank), run.count(by_rank[rank])) for rank in np.flatnonzero(by_rank)],
        )
        for logical, by_rank in enumerate(load.T[:own])
    ]
