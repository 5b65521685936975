"""The figures of `timeline`: a formula over the steps of a run, in bins of equally many steps."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.timeline_report import DEFAULT_BINS, IDLE_FRACTION, NAMES, Bin, Stretch, Timeline
from eplb_analyze.json_report import remembers_run
from eplb_analyze.metrics.formulas import ACTIVE_EXPERTS, FORMULAS, Float64
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.configurations import Configurations, estimate_notes
from eplb_analyze.reader.readings import Reading, read_blocks
from eplb_analyze.reader.rolled_up import from_minutes
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange


class _Bins:
    """Sums, minima and maxima of each bin."""

    def __init__(self, edges: npt.NDArray[np.int64]) -> None:
        self.edges = edges
        count = len(edges) - 1
        self.steps = np.zeros(count, np.int64)
        self.total, self.weight = np.zeros(count), np.zeros(count)
        self.low, self.high = np.full(count, np.inf), np.full(count, -np.inf)

    def add(self, steps: npt.NDArray[np.int64], value: Float64, weight: Float64) -> None:
        known = ~np.isnan(value)
        at = np.searchsorted(self.edges, steps[known], side="right") - 1
        value, weight = value[known], weight[known]
        count = len(self.steps)
        self.steps += np.bincount(at, minlength=count)
        self.total += np.bincount(at, value * weight, minlength=count)
        self.weight += np.bincount(at, weight, minlength=count)
        np.minimum.at(self.low, at, value)
        np.maximum.at(self.high, at, value)

    def bins(self) -> list[Bin]:
        found = []
        for i, steps in enumerate(self.steps.tolist()):
            first, last = int(self.edges[i]), int(self.edges[i + 1]) - 1
            figures = (self.total[i] / self.weight[i], self.low[i], self.high[i]) if steps else (None,) * 3
            found.append(Bin(first, last, steps, *(None if f is None else float(f) for f in figures)))
        return found


@remembers_run
def timeline(
    run: Run,
    formula: str = "balancedness",
    bins: int = DEFAULT_BINS,
    layer: int | None = None,
    steps: tuple[int, int] | None = None,
    tier: Literal["steps", "minutes"] | None = None,
) -> Timeline:
    """A formula over the complete steps of a run, in bins of equally many steps.

    If there is none, over those that lack the same ranks, as an estimate.

    Args:
        formula: one of :data:`NAMES`.
        bins: how many; with fewer steps, each step is a bin.
        layer: the model's number of a layer, to look at it alone.
        steps: a half-open range.
        tier: what figures are from; default the sums per minute if not all of the steps are kept.

    A bin's mean is over its steps that have an active layer; of the idle fraction it is weighted by
    the steps' tokens, so that one bin of a whole run is the run's figure.

    Raises:
        ValueError: there is no such formula.
        NotInDumpError: the dump has no such layer, or no step in the range.
        DumpError: no step in the range was recorded.
    """
    if formula not in NAMES:
        raise ValueError(f"no formula {formula!r}; choose one of: {', '.join(NAMES)}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    index = None if layer is None else run.layer_index(layer)
    if from_minutes(run, steps, tier):
        from eplb_analyze.analysis.timeline_minutes import timeline_of_minutes

        return run.retry_without_damaged(lambda: timeline_of_minutes(run, formula, bins, index, steps))
    return run.retry_without_damaged(lambda: _timeline(run, formula, bins, index, steps))


def _timeline(
    run: Run, formula: str, bins: int, index: int | None, steps: tuple[int, int] | None
) -> Timeline:
    if formula == ACTIVE_EXPERTS.name:
        run = run.with_loads()
    sums = TimelineSums(run, formula, bins, index, steps)
    read_blocks(run.estimated(steps), steps, sums)
    return sums.timeline()


class TimelineSums:
    """What a timeline is made of, added block by block in order of steps."""

    def __init__(
        self,
        run: Run,
        formula: str = "balancedness",
        bins: int = DEFAULT_BINS,
        index: int | None = None,
        steps: tuple[int, int] | None = None,
    ) -> None:
        """See :func:`timeline`; ``index``: of the layer."""
        asked = StepRange.of(steps)
        run.require(asked)
        first, last = run.step_range
        assert first is not None
        assert last is not None
        first, end = asked.clip(first, last + 1)
        count = min(bins, end - first)
        #: The first step of each bin, and the one after the last: int64 ``[bins + 1]``.
        self.edges = np.array([first + i * (end - first) // count for i in range(count + 1)], np.int64)
        self._run, self._formula, self._index, self._steps = run, formula, index, steps
        self._bins = _Bins(self.edges)
        self._configurations = Configurations(run)
        self._shapes: dict[int, Stretch] = {}
        self._missing: tuple[int, ...] = ()
        self._recorded = 0

    def start(self, block: Block) -> Reading | None:
        """Count the next block; None if nothing of it is to be read."""
        number = self._configurations.number(block)
        if number is None:
            return None
        assert block.shape is not None
        self._missing, self._recorded = block.missing, self._recorded + len(block.recorded)
        shapes, shape = self._shapes, block.shape
        begin = shapes[number].first_step if number in shapes else int(block.recorded[0])
        shapes[number] = Stretch(begin, int(block.recorded[-1]), shape.ep_size, shape.num_physical_experts)
        return Reading(None, lambda: self._values(block))

    def _values(self, block: Block) -> tuple[Float64, Float64]:
        """The formula for each complete step, and by how much each counts."""
        layers = (0, None) if self._index is None else (self._index, self._index + 1)
        if self._formula == ACTIVE_EXPERTS.name:
            terms = block.active_terms(*layers)
            value, weight = ACTIVE_EXPERTS.of(terms), np.ones(len(terms.mean))
        elif self._formula == IDLE_FRACTION:
            terms = self._run.terms(block, *layers)
            value, weight = 1 - FORMULAS["vllm"].of(terms), terms.maximum.sum(axis=1)
        else:
            terms = self._run.terms(block, *layers)
            value, weight = FORMULAS[self._formula].of(terms), np.ones(len(terms.mean))
        return value, weight

    def merge(self, block: Block, part: tuple[Float64, Float64] | None) -> None:
        """Add the next block's part."""
        if part is not None:
            self._bins.add(block.recorded, *part)

    def timeline(self) -> Timeline:
        """Raises DumpError if no step was complete."""
        run, index, parts, shapes = self._run, self._index, self._bins, [*self._shapes.values()]
        if not shapes:
            raise run.nothing_complete(self._steps)
        history = run.history
        changes = (
            [r.first_step for r in history.rearrangements()]
            if index is None
            else history.layer(index).steps[1:]
        )
        total = float(parts.weight.sum())
        ends = shapes[0].first_step, shapes[-1].last_step
        notes = estimate_notes(run, self._missing, self._recorded, *ends)
        notes += run.import_caveats("step_order")
        if len(shapes) > 1:
            at = ", ".join(str(s.first_step) for s in shapes[1:][:5])
            notes.append(
                f"ep_size or the number of slots changed, or a rank was lost, at step {at}: loads before and "
                f"after are not added, and figures are means over steps"
            )
        return Timeline(
            run_id=run.info.run_id,
            model=run.info.model,
            formula=self._formula,
            layer=None if index is None else run.info.layers[index],
            steps=self._configurations.seen,
            missing_ranks=[*self._missing],
            mean=float(parts.total.sum()) / total if total else None,
            min=float(parts.low.min()) if total else None,
            max=float(parts.high.max()) if total else None,
            bins=parts.bins(),
            rearrangements=[step for step in changes if self.edges[0] <= step < self.edges[-1]],
            configurations=shapes,
            notes=notes,
        )
