"""The figures of `layer`: the load of each rank, slot and expert of one layer in a step or range.

They come from the finest tier that is kept of any of these steps. Tokens per EP rank do not show slots and
experts, and sums per minute not even single steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eplb_analyze.analysis.layer_report import ExpertLoad, LayerReport, RankLoad, SlotLoad
from eplb_analyze.errors import NotInDumpError
from eplb_analyze.json_report import remembers_run
from eplb_analyze.metrics import formulas
from eplb_analyze.metrics.losses import Bins, timeline
from eplb_analyze.reader.blocks import Block, active_experts
from eplb_analyze.reader.configurations import Sums, last_configuration
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import lost_in, serving
from eplb_analyze.reader.placements import fold, replicas
from eplb_analyze.reader.rolled_up import finest
from eplb_analyze.reader.run import Run
from eplb_analyze.text import listed, plural
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import STATUS_LABELS, Tier


@remembers_run
def layer_report(
    run: Run, layer: int, step: int | None = None, steps: tuple[int, int] | None = None
) -> LayerReport:
    """Loads of one layer, by the model's layer number.

    Args:
        step: one step; an incomplete one is shown as far as it is there, and marked.
        steps: a half-open range; its complete steps are summed, if there are none, those that lack the same
            ranks. Neither: all steps.

    If experts' loads are kept of a part of the steps, figures are of this part; else, if tokens per EP rank
    are, of that one; else of the minutes that have these steps, as a whole.

    Raises:
        NotInDumpError: the dump has no such layer or step.
        DumpError: no step of the range was recorded.
        UsageError: steps of one phase are asked for, which sums per minute of single ranks do not show.
    """
    index = run.layer_index(layer)
    asked = steps if step is None else (step, step + 1)
    tier = finest(run, asked)
    if tier is Tier.MINUTES:
        from eplb_analyze.analysis.layer_minutes import layer_of_minutes

        return run.retry_without_damaged(lambda: layer_of_minutes(run, layer, index, asked))
    run = run if tier is Tier.RANKS else run.with_loads()
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
    found, _, notes = last_configuration(run, steps, _Blocks, estimate=True, reads=False)
    report = _report(run, layer, index, found.blocks, complete=not found.missing)
    report.notes.extend(notes)
    return report


class _Blocks(Sums):
    """The blocks of a configuration with their complete steps; loads are read from the last one's only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.blocks: list[tuple[Block, Int64]] = []

    def merge(self, block: Block, part: Any) -> None:
        self.blocks.append((block, block.recorded))


def _report(
    run: Run, layer: int, index: int, parts: list[tuple[Block, Int64]], *, complete: bool
) -> LayerReport:
    shape = parts[0][0].shape
    assert shape is not None
    kept = all(block.has_loads for block, _ in parts)
    experts = run.info.num_logical_experts
    rank_tokens = np.zeros(shape.ep_size, np.int64)
    slot_load = np.zeros(shape.num_physical_experts, np.int64)
    # By rank and logical expert, as the placements in force had it.
    logical_load = np.zeros((shape.ep_size, experts), np.int64)
    ratios: dict[str, list[formulas.Float64]] = {"balancedness": [], "imbalance": []}
    active: list[formulas.Float64] = []
    mean_tokens = max_tokens = 0.0
    history = run.history.layer(index)
    held: list[Int32 | None] = []  # the placements in force
    for block, steps in parts:
        if kept:
            load = block.loads(index, index + 1, steps)[:, 0]
            by_rank = load.reshape(len(steps), 1, shape.ep_size, -1).sum(axis=3)
            slot_load += load.sum(axis=0)
            experts_with_tokens = active_experts(load[:, np.newaxis], shape.ep_size)
            active.append(formulas.ACTIVE_EXPERTS.per_step(experts_with_tokens))
            for stretch, placed in history.periods(steps):
                slots = placed if placed is not None and len(placed) == load.shape[1] else None
                held.append(slots)
                if slots is not None:
                    part = load[stretch].sum(axis=0).reshape(shape.ep_size, -1)
                    for rank, own in enumerate(slots.reshape(shape.ep_size, -1)):
                        logical_load[rank] += fold(part[rank], own, experts)
        else:
            ((_, by_rank),) = block.rank_load_parts(steps, index, index + 1)
        rank_tokens += by_rank[:, 0].sum(axis=0)
        tokens = run.tokens(by_rank)
        for name, values in ratios.items():
            values.append(formulas.FORMULAS[name].per_step(tokens, serving(shape)))
        mean, maximum = formulas.idle_terms(tokens, serving(shape))
        mean_tokens, max_tokens = mean_tokens + mean, max_tokens + maximum
    first, last = int(parts[0][1][0]), int(parts[-1][1][-1])
    slots = held[-1] if held else None
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
            for rank, value in enumerate(rank_tokens)
            if rank not in lost_in(shape)
        ],
        slots=[]
        if not kept
        else [
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
        tier=(Tier.FULL if kept else Tier.RANKS).value,
    )
    if report.lost_ranks:
        report.notes.append(
            f"rank {listed(report.lost_ranks)} is lost: figures cover only the "
            f"{plural(serving(shape), 'rank')} that serve"
        )
    if not kept:
        report.notes.append(
            "only tokens per EP rank are kept of these steps, so slots and experts are not known any more"
        )
    elif slots is None:
        report.notes.append(
            "no placement is known for these steps, so there are no figures per logical expert"
        )
    elif logical_load.sum() < slot_load.sum():
        unknown = int(slot_load.sum() - logical_load.sum())
        report.notes.append(f"{unknown:,} of {slot_load.sum():,} tokens went to slots without a known expert")
    if changes and kept:
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


def since_last_placement(run: Run, report: LayerReport) -> LayerReport:
    """The report over the steps since the layer's last change: a slot with two experts mixes their tokens."""
    changes = report.placement_changes
    if not changes or report.tier != "full":
        return report
    return layer_report(run, report.layer, None, (changes[-1], report.last_step + 1))
