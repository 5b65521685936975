"""The figures of `rearrangements`: did each help, as predicted, for how long, and what was moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.cost import RunCost, cost_of
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.pauses import StepClock, pauses_of
from eplb_analyze.analysis.worth import DealtSteps, PlacementGain
from eplb_analyze.dispatch.deal import EXACT_IN_FLOAT32
from eplb_analyze.json_report import RunReport, remembers_run
from eplb_analyze.metrics import bootstrap, formulas
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, Ratio
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.lost import LostRank, ranks_lost_at, reduced, serving
from eplb_analyze.reader.placements import LayerHistory, Rearrangement, crossings, holdings, spread_evenly
from eplb_analyze.reader.readings import Reading, read_blocks
from eplb_analyze.reader.recorded_setting import not_due, overdue
from eplb_analyze.reader.rolled_up import finest
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import Tier

#: Steps before and after, unless a neighboring rearrangement is nearer.
WINDOW = 1000
#: The gain at first is a mean of this many steps, and it is gone when most of so many are below half of it.
SMOOTHING = 50
#: Steps whose loads are spread at once: so few that they stay in the processor's cache.
AT_ONCE = 256
BALANCEDNESS = formulas.FORMULAS["balancedness"]

#: Figures in ms need the loads and times of single steps.
NOT_ASKED = "judged by sums"

Verdict = Literal[
    "helped", "helped at first", "hurt", "no measurable gain", "no-op", "elastic", "not measured"
]


@frozen
class Window:
    """Complete steps on one side of a rearrangement, with an active layer."""

    first_step: int | None
    last_step: int | None
    steps: int
    balancedness: float | None


@frozen
class Lasted:
    """Steps for which at least half of the gain at first was there, and what ended them."""

    steps: int
    #: When the gain was half gone, or what ended the measurement before that.
    until: Literal["half gone", "next rearrangement", "end"]


@frozen
class RearrangementFigures:
    """One rearrangement. A figure that cannot be given is None, and ``reason`` says why."""

    first_step: int
    last_step: int
    #: How many layers changed, and their numbers in the model.
    layers: int
    layer_numbers: list[int]
    verdict: Verdict
    reason: str | None
    #: The steps before it.
    before: Window
    #: Balancedness of the loads before, split evenly over the replicas of the new placement.
    predicted: float | None
    #: The steps after it.
    after: Window
    #: Balancedness after less before.
    gain: float | None
    #: The lower end of its confidence interval.
    gain_low: float | None
    #: The upper end of its confidence interval.
    gain_high: float | None
    #: After − predicted is the sum of these two.
    drift: float | None
    uneven_split: float | None
    #: The gain of the first ``SMOOTHING`` steps after.
    gain_at_first: float | None
    #: How long the gain lasted.
    lasted: Lasted | None
    #: Slots that hold another expert than before; None if not all placements before it are kept.
    slots_moved: int | None
    #: Expert weights that a rank, or a rank's node, had to fetch from another; None: not known.
    experts_crossed_ranks: int | None
    #: Of these, weights that no rank of the node held before; None if ranks per node is not known.
    experts_crossed_nodes: int | None
    #: The weights that ranks had to fetch, in GB of 10^9 bytes; None unless the size of an expert is given.
    moved_gb: float | None = None
    #: What the steps at the change took beyond the usual time; else why it is not known.
    pause_ms: Milliseconds | None = None
    #: Why the pause is not known.
    pause_reason: str | None = NOT_ASKED
    #: What the same tokens, of steps after, cost less under the new placement; else why it is not known.
    gain_ms_per_step: Milliseconds | None = None
    #: Why the gain in milliseconds is not known.
    gain_ms_reason: str | None = NOT_ASKED
    #: Steps after which the gain has paid for the pause; None if it is not above 0, or one of them not known.
    break_even_steps: int | None = None


@frozen
class RearrangementReport(RunReport):
    """What each rearrangement moved, whether it helped, and what it cost."""

    steps: Completeness
    #: The most steps before and after.
    window: int
    confidence: float = field(default=bootstrap.CONFIDENCE, init=False)
    rearrangements: list[RearrangementFigures]
    #: The fit that gains are priced by; None if there is no rearrangement.
    cost: RunCost | None = None
    notes: list[str] = field(default_factory=list)
    #: If no placement changed in the whole run: why no rearrangement was due yet; null if one was.
    not_due: str | None = None
    #: If none changed, and one was due: how many steps ran, and the interval that the engine states.
    overdue: str | None = None


@remembers_run
def rearrangement_report(
    run: Run,
    steps: tuple[int, int] | None = None,
    window: int = WINDOW,
    *,
    cost: RunCost | None = None,
    expert_mb: float | None = None,
) -> RearrangementReport:
    """Judge every rearrangement that begins in a half-open range of steps (default: all).

    Args:
        cost: of imbalance in the run, which prices gains; default
            :func:`~eplb_analyze.analysis.cost.cost_of`.
        window: how many steps before and after to compare; fewer where a neighboring rearrangement, the
            range or the run ends sooner.
        expert_mb: the weights of one expert of one layer, in MB of 10^6 bytes; gives the GB moved.
    """
    # Placements are kept with sums per minute, too.
    if steps is not None and finest(run, steps) is not Tier.MINUTES:
        run.require(steps)
    report = run.retry_without_damaged(lambda: _report(run, steps, window, cost))
    if expert_mb is None:
        return report
    rows = [
        row
        if row.experts_crossed_ranks is None
        else replace(row, moved_gb=row.experts_crossed_ranks * expert_mb / 1000)
        for row in report.rearrangements
    ]
    return replace(report, rearrangements=rows)


def _report(
    run: Run, steps: tuple[int, int] | None, window: int, cost: RunCost | None
) -> RearrangementReport:
    sums = RearrangementSums(run, steps, window)
    read_blocks(run, steps, sums)
    return sums.report(cost)


class RearrangementSums:
    """What rearrangements are judged by, added block by block in order of steps."""

    def __init__(self, run: Run, steps: tuple[int, int] | None = None, window: int = WINDOW) -> None:
        """See :func:`rearrangement_report`."""
        self._run, self._steps, self._window = run, steps, window
        self._changes = _changes(run, steps, window)
        self._gains = [change.worth for change in self._changes if change.worth is not None]
        self._folds = [fold for change in self._changes for fold in change.folds]
        self._whole, self._series = Completeness(), _Series()
        #: Of the steps of all phases; None if those added are not all.
        self._clock = StepClock() if steps is None and run.phase is None else None

    def start(self, block: Block) -> Reading | None:
        """Begin to add the next block; None if it has no complete step."""
        self._whole.add(block)
        if self._clock is not None:
            self._clock.add(block)
        if block.shape is None or not len(block.recorded):
            return None
        spread = _Spread(self._run, block, self._folds, self._gains)

        def part() -> tuple[formulas.Float64, _SpreadPart]:
            return BALANCEDNESS.of(self._run.terms(block)), spread.part()

        return Reading(spread.add if block.has_loads and spread else None, part)

    def merge(self, block: Block, part: tuple[formulas.Float64, _SpreadPart] | None) -> None:
        """Add the next block's part."""
        if part is None:
            return
        balancedness, (folded, gains) = part
        assert block.shape is not None
        self._series.add(block.shape, block.recorded, balancedness)
        for number, values in folded.items():
            self._folds[number].values.append(values)
        for number, dealt in gains.items():
            self._gains[number].add(dealt)

    def report(self, cost: RunCost | None = None) -> RearrangementReport:
        """``cost``: as in :func:`rearrangement_report`."""
        run, changes = self._run, self._changes
        if changes and cost is None:
            cost = cost_of(run)
        notes = run.import_caveats("step_order", "placement", "placement_steps", "earlier_placements")
        notes += uneven_nodes(run.info.ep_size, run.info.ranks_per_node)
        if not run.history.layers:
            notes.append("no placement was recorded, so no rearrangement is known")
        if run.history.lost:
            at = ", ".join(map(str, run.history.lost[:5]))
            notes.append(
                f"placements are lost from step {at} on; changes are unknown until the next recorded "
                "placements"
            )
        gone = [one.steps for one in run.left_out(self._steps) if one.tier is Tier.GONE]
        if gone:
            notes.append(
                f"of steps {StepRange(gone[0].first, gone[-1].end)} only the last placements are kept; "
                "earlier rearrangements are not known"
            )
        these = [change.this for change in changes]
        pauses = pauses_of(run, these) if self._clock is None else self._clock.pauses(run, these)
        rows = [
            _in_ms(_figures(run, change, self._series), change, pause, cost)
            for change, pause in zip(changes, pauses, strict=True)
        ]
        why = due = None
        if run.placements_recorded and not run.history.rearrangements():
            why = not_due(run)
            due = overdue(run) if why is None else None
        return RearrangementReport(
            run.info.run_id, run.info.model, self._whole, self._window, rows, cost, notes, why, due
        )


def _in_ms(
    row: RearrangementFigures, change: _Change, pause: Interval | str, cost: RunCost | None
) -> RearrangementFigures:
    gain: Interval | str = change.reason or "elastic"
    if change.worth is not None and cost is not None:
        gain = change.worth.priced(cost)
    lasting = None
    if isinstance(pause, Interval) and isinstance(gain, Interval) and gain.low > 0:
        lasting = math.ceil(pause.value / gain.value)
    known = [None if isinstance(each, str) else Milliseconds.of(each) for each in (pause, gain)]
    why = [each if isinstance(each, str) else None for each in (pause, gain)]
    return replace(
        row,
        pause_ms=known[0],
        pause_reason=why[0],
        gain_ms_per_step=known[1],
        gain_ms_reason=why[1],
        break_even_steps=lasting,
    )


def unjudged(run: Run, balancedness: Iterable[tuple[Shape, Int64, formulas.Float64]]) -> list[MeasuredChange]:
    """All rearrangements of a run with figures already made, by which they can be judged elsewhere.

    ``balancedness``: ``(shape, steps, values)`` in order of steps; NaN where no layer was active.
    """
    series = _Series()
    for shape, steps, values in balancedness:
        series.add(shape, steps, values)
    return [change.measured(series) for change in _changes(run, None, WINDOW)]


@frozen
class MeasuredChange:
    """What a rearrangement is judged by: the balancedness before it, and after it until the next one."""

    last_step: int
    elastic: bool
    no_op: bool
    before_steps: Int64
    before: formulas.Float64
    #: Until the next rearrangement, which ended these steps if it ``followed``.
    later_steps: Int64
    later: formulas.Float64
    followed: bool
    #: How many of the later steps are in the window.
    num_after: int

    @property
    def after_steps(self) -> Int64:
        return self.later_steps[: self.num_after]

    @property
    def after(self) -> formulas.Float64:
        return self.later[: self.num_after]

    @cached_property
    def gain(self) -> Interval | None:
        """None if it cannot be measured."""
        if self.elastic:
            return None
        return bootstrap.difference(Ratio.mean(self.before), Ratio.mean(self.after))

    @cached_property
    def lasting(self) -> tuple[float | None, Lasted | None]:
        """The gain at first, and for how long half of it was there; no length if it is not significant.

        It is gone in the middle of the first ``SMOOTHING`` steps most of which are below half of it.
        """
        steps, values, last = self.later_steps, self.later, self.last_step
        width = min(SMOOTHING, len(steps) // 4)
        at_first = bootstrap.difference(Ratio.mean(self.before), Ratio.mean(values[:width]))
        if at_first is None:
            return None, None
        if not at_first.is_significant or at_first.value < 0:
            return at_first.value, None
        below = np.cumsum(np.append(0, values < self.before.mean() + at_first.value / 2))
        gone = np.flatnonzero(2 * (below[width:] - below[:-width]) > width)
        if len(gone):
            return at_first.value, Lasted(int(steps[gone[0] + (width - 1) // 2]) - last, "half gone")
        until: Literal["next rearrangement", "end"] = "next rearrangement" if self.followed else "end"
        return at_first.value, Lasted(int(steps[-1]) + 1 - last, until)

    @property
    def verdict(self) -> Verdict:
        if self.no_op:
            return "no-op"
        if self.elastic:
            return "elastic"
        if self.gain is None:
            return "not measured"
        if self.gain.is_significant and self.gain.value > 0:
            return "helped"
        _, lasted = self.lasting
        if lasted is not None and lasted.until == "half gone":
            return "helped at first"
        return "hurt" if self.gain.is_significant else "no measurable gain"


def _changes(run: Run, steps: tuple[int, int] | None, window: int) -> list[_Change]:
    low, high = StepRange.of(steps)
    found = run.history.rearrangements()
    changes = []
    # Before a layer's first placement nobody knows whose its tokens were.
    known = max((history.steps[0] for history in run.history.layers.values()), default=0)
    lost = run.history.lost
    # The same for all of them, and not cheap.
    layers = [run.history.layer(index) for index in range(run.info.num_layers)]
    lost_ranks = run.lost_ranks
    for i, this in enumerate(found):
        if low <= this.first_step < high:
            start = max(low, found[i - 1].last_step if i else 0, known if known < this.first_step else 0)
            start = max(start, *(s for s in lost if s < this.first_step), 0)
            following = found[i + 1].first_step if i + 1 < len(found) else high
            end = min(high, following, *(s for s in lost if s > this.last_step))
            around = StepRange(start, end)
            changes.append(_Change(run, layers, lost_ranks, this, around, following == end < high, window))
    return changes


@dataclass
class _Fold:
    """The loads of a range of steps, spread evenly over the replicas of a placement."""

    steps: StepRange
    shape: Shape
    #: By layer: the placement the steps ran under, and the one to spread their loads over.
    old: list[Int32]
    new: list[Int32]
    values: list[formulas.Float64] = field(default_factory=list)

    def balancedness(self, layer: int, load: npt.NDArray[Any], experts: int) -> formulas.Float64:
        """That of a layer's loads ``[n, slots]`` once they are spread: ``[n]``."""
        weights = spread_evenly(self.old[layer], self.new[layer], self.shape.ep_size, experts)
        narrow = weights.astype(np.float32) if weights.max() < EXACT_IN_FLOAT32 else weights
        out = np.empty(len(load))
        for low in range(0, len(load), AT_ONCE):
            here = slice(low, low + AT_ONCE)
            T = load[here].astype(np.float32) @ narrow
            if T.max() >= EXACT_IN_FLOAT32:  # it may be rounded
                T = load[here] @ weights
            # Ranks first: the maximum is over whole rows.
            out[here] = formulas.balancedness_of_layer(T.T.astype(np.float64, order="C"), serving(self.shape))
        return out

    def mean(self) -> float | None:
        return formulas.mean_known(self.values)


class _Change:
    """A rearrangement, the placements around it and its windows."""

    def __init__(
        self,
        run: Run,
        histories: Sequence[LayerHistory],
        lost_ranks: Sequence[LostRank],
        this: Rearrangement,
        around: StepRange,
        followed: bool,
        window: int,
    ) -> None:
        """``around``: the steps of the placement before, of this change, and of the placement after."""
        self.this, self.end, self.followed = this, around.end, followed
        self.before = StepRange(max(around.first, this.first_step - window), this.first_step)
        self.after = StepRange(this.last_step, min(around.end, this.last_step + window))
        self._run = run
        # By layer; None if it is not known.
        old = self._old = [history.at(this.first_step - 1) for history in histories]
        new = self._new = [history.at(this.last_step) for history in histories]
        #: Of the layers that changed.
        self.changed = [
            (a, b) for i in this.layers if (a := old[i]) is not None and (b := new[i]) is not None
        ]
        first = next(histories[i] for i in this.layers if old[i] is not None and new[i] is not None)
        sizes = [first.ep_sizes[first.index_at(s)] for s in (this.first_step - 1, this.last_step)]
        self._lost = [ranks_lost_at(s, lost_ranks) for s in (this.first_step - 1, this.last_step)]
        self.shapes = [
            reduced(Shape(size, len(histories), len(slots)), gone)
            for size, slots, gone in zip(sizes, self.changed[0], self._lost, strict=True)
        ]
        self.elastic = self.shapes[0] != self.shapes[1]

    @property
    def no_op(self) -> bool:
        """Whether every rank holds the same experts as before."""
        return self._comparable and all(np.array_equal(*held) for held in self._held())

    @property
    def crossed_ranks(self) -> int | None:
        return self._crossed(1)

    @property
    def crossed_nodes(self) -> int | None:
        nodes = self._run.info.ranks_per_node
        return self._crossed(nodes) if nodes else None

    def _crossed(self, ranks_per_node: int) -> int | None:
        if not self._comparable:
            return None
        return sum(int(crossings(*held, ranks_per_node).sum()) for held in self._held())

    @property
    def _comparable(self) -> bool:
        return not self.elastic and self.this.slots_changed is not None

    def _held(self) -> Iterator[tuple[Int64, Int64]]:
        """What the EP ranks held before and after, of each layer that changed."""
        size, experts = self.shapes[0].ep_size, self._run.info.num_logical_experts
        for old, new in self.changed:
            yield holdings(old, size, experts), holdings(new, size, experts)

    @cached_property
    def reason(self) -> str | None:
        """Why nothing can be predicted, and no loads have to be read for it."""
        lost, run, shape = self._lost, self._run, self.shapes[0]
        every = [slots for slots in (*self._old, *self._new) if slots is not None]
        if self.this.slots_changed is None:
            return "it began in steps that are no longer kept"
        if lost[0] != lost[1]:
            return f"different ranks serve: lost ranks before {_listed(lost[0])}, after {_listed(lost[1])}"
        if self.elastic:
            sizes, slots = zip(*((s.ep_size, s.num_physical_experts) for s in self.shapes), strict=True)
            return "EP size {} → {}, {} → {} slots".format(*sizes, *slots)
        for number, old, new in zip(run.info.layers, self._old, self._new, strict=True):
            if old is None or new is None:
                return f"no prediction: the placement of layer {number} is not known"
        if any(len(slots) != shape.num_physical_experts for slots in every):
            return "no prediction: the layers have different numbers of slots"
        if any((old.any(axis=0) & ~new.any(axis=0)).any() for old, new in self._held()):
            return "no prediction: an expert has no slot in the new placement"
        if run.tiers.without_loads.overlaps(self.before.first, self.after.end):
            return "no prediction: the experts' loads are not kept any more"
        return None

    @cached_property
    def folds(self) -> list[_Fold]:
        """The loads of both sides, to be spread; empty if nothing can be predicted."""
        if self.reason is not None:
            return []
        old, new = self._known
        return [_Fold(self.before, self.shapes[0], old, new), _Fold(self.after, self.shapes[0], new, new)]

    @cached_property
    def worth(self) -> PlacementGain | None:
        return None if self.reason is not None else PlacementGain(self.after, self.shapes[0], *self._known)

    @property
    def _known(self) -> tuple[list[Int32], list[Int32]]:
        old, new = ([slots for slots in side if slots is not None] for side in (self._old, self._new))
        return old, new

    def measured(self, series: _Series) -> MeasuredChange:
        before, later = (
            series.between(steps, shape)
            for steps, shape in zip((self.before, (self.this.last_step, self.end)), self.shapes, strict=True)
        )
        after = int(np.searchsorted(later[0], self.after.end))
        return MeasuredChange(
            self.this.last_step, self.elastic, self.no_op, *before, *later, self.followed, after
        )


class _Series:
    """Measured balancedness, step by step, and the shape of each step."""

    def __init__(self) -> None:
        self._parts: list[tuple[Int64, formulas.Float64, npt.NDArray[np.int32]]] = []
        self._shapes: list[Shape] = []

    def add(self, shape: Shape, steps: Int64, values: formulas.Float64) -> None:
        if shape not in self._shapes:
            self._shapes.append(shape)
        known = ~np.isnan(values)
        number = np.full(int(known.sum()), self._shapes.index(shape), np.int32)
        self._parts.append((steps[known], values[known], number))

    @cached_property
    def _joined(self) -> tuple[Int64, formulas.Float64, npt.NDArray[np.int32]]:
        steps, values, shapes = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return steps, values, shapes

    def between(self, steps: tuple[int, int], shape: Shape) -> tuple[Int64, formulas.Float64]:
        """``(steps, values)`` of a half-open range, as far as they have this shape."""
        if not self._parts or shape not in self._shapes:
            return np.empty(0, np.int64), np.empty(0)
        step, value, shapes = self._joined
        low, high = np.searchsorted(step, steps)
        own = shapes[low:high] == self._shapes.index(shape)
        return step[low:high][own], value[low:high][own]


#: What a block adds to folds, and to gains, by their index.
_SpreadPart = tuple[dict[int, formulas.Float64], dict[int, DealtSteps]]


class _Spread:
    """Spreads a block's steps for the folds and gains that they belong to, layer by layer."""

    def __init__(self, run: Run, block: Block, folds: list[_Fold], gains: list[PlacementGain]) -> None:
        assert block.shape is not None
        steps, self._experts = block.recorded, run.info.num_logical_experts
        #: Each with its steps in the block, and room for ``[steps, layers]``.
        self._folds: dict[int, tuple[_Fold, slice, formulas.Float64]] = {}
        for number, fold in enumerate(folds):
            low, high = np.searchsorted(steps, fold.steps)
            if high > low and fold.shape == block.shape:
                ratio = np.full((high - low, block.shape.num_moe_layers), np.nan)
                self._folds[number] = fold, slice(low, high), ratio
        self._gains = {
            number: (gain, dealt, np.searchsorted(steps, dealt.steps))
            for number, gain in enumerate(gains)
            if self._folds and (dealt := gain.start(block, run.info.token_replication)) is not None
        }

    def __bool__(self) -> bool:
        return bool(self._folds)

    def add(self, layer: int, load: npt.NDArray[Any]) -> None:
        """The loads of a layer in all complete steps of the block: integers ``[steps, slots]``."""
        for gain, dealt, at in self._gains.values():
            gain.deal(dealt, layer, load[at], self._experts)
        for fold, within, ratio in self._folds.values():
            ratio[:, layer] = fold.balancedness(layer, load[within], self._experts)

    def part(self) -> _SpreadPart:
        """What all layers of a block are added to."""
        folded = {}
        for number, (_, _, ratio) in self._folds.items():
            active = (~np.isnan(ratio)).sum(axis=1)
            total = np.nansum(ratio, axis=1)
            folded[number] = np.divide(total, active, out=np.full(len(ratio), np.nan), where=active > 0)
        return folded, {number: dealt for number, (_, dealt, _) in self._gains.items()}


def _listed(ranks: tuple[int, ...]) -> str:
    return f"rank {listed(ranks)}" if ranks else "none"


def _figures(run: Run, change: _Change, series: _Series) -> RearrangementFigures:
    this, reason, measured = change.this, change.reason, change.measured(series)
    before, after, gain = measured.before, measured.after, measured.gain
    at_first = predicted = even = lasted = None
    if gain is not None:
        predicted, even = (fold.mean() for fold in change.folds) if change.folds else (None, None)
        at_first, lasted = measured.lasting
    elif not change.elastic:
        count, where = min((len(before), "before"), (len(after), "after"))
        reason = f"{plural(count, 'complete step')} {where} it, {MIN_STEPS} are needed"
        near = change.before if where == "before" else change.after
        if run.tiers.retired.overlaps(*near):
            reason = f"the steps {where} it are no longer kept"
    mean = None if gain is None else float(after.mean())
    return RearrangementFigures(
        first_step=this.first_step,
        last_step=this.last_step,
        layers=len(this.layers),
        layer_numbers=[run.info.layers[index] for index in this.layers],
        verdict=measured.verdict,
        reason=reason,
        before=_window(measured.before_steps, before),
        predicted=predicted,
        after=_window(measured.after_steps, after),
        gain=None if gain is None else gain.value,
        gain_low=None if gain is None else gain.low,
        gain_high=None if gain is None else gain.high,
        drift=None if even is None or predicted is None else even - predicted,
        uneven_split=None if even is None or mean is None else mean - even,
        gain_at_first=at_first,
        lasted=lasted,
        slots_moved=this.slots_changed,
        experts_crossed_ranks=change.crossed_ranks,
        experts_crossed_nodes=change.crossed_nodes,
    )


def _window(steps: Int64, values: formulas.Float64) -> Window:
    if not len(steps):
        return Window(None, None, 0, None)
    return Window(int(steps[0]), int(steps[-1]), len(steps), float(values.mean()))
