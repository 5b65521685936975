"""What the sums per minute of a run add up to, for the figures of a long time: small, however long it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from eplb_analyze.metrics.formulas import Float64, Spread
from eplb_analyze.metrics.histograms import percentile
from eplb_analyze.metrics.losses import LEAST_STEPS
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.placements import fold
from eplb_analyze.reader.rolled_up import RankSteps, RunMinutes, gone_steps
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import percent, plural
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.minutes import BINS, FORMULAS, SCALES, SPREAD_FORMULAS, Minutes
from eplb_dump.format.schema import STATUS_LABELS, Scope

#: The columns that the sums need, besides those that every view needs.
COLUMNS = (
    "host_ms_sum", "host_ms_steps", "host_ms_histogram", "rank_load",
    "active_steps", "slot", "slot_load", "max_load", "layer_balancedness", "layer_imbalance", "slowest",
    *FORMULAS,
    *(
        f"{name}_{what}"
        for name in SPREAD_FORMULAS
        for what in ("min", "min_step", "max", "max_step", "histogram")
    ),
)  # fmt: skip
#: Those with scope local, of which only sums over minutes exist.
LOCAL_COLUMNS = ("rank_load",)
#: Those that name the slots with the most tokens.
SLOT_COLUMNS = "rank_load", "slot", "slot_load"


class SpreadSums:
    """A formula over steps: its sum, extremes and histogram."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.low: tuple[float, int] = (np.inf, -1)
        self.high: tuple[float, int] = (-np.inf, -1)
        self.histogram: Int64 = np.zeros(BINS, np.int64)

    def add(self, name: str, rows: Minutes) -> None:
        self.total += float(np.nansum(rows[name]))
        self.count += int(rows["active"].sum())
        self.histogram += rows[f"{name}_histogram"].sum(axis=0, dtype=np.int64)
        low, high = rows[f"{name}_min"], rows[f"{name}_max"]
        if np.isfinite(low).any():
            i, j = int(np.nanargmin(low)), int(np.nanargmax(high))
            self.low = min(self.low, (float(low[i]), int(rows[f"{name}_min_step"][i])))
            if (high[j], -rows[f"{name}_max_step"][j]) > (self.high[0], -self.high[1]):
                self.high = float(high[j]), int(rows[f"{name}_max_step"][j])

    def merge(self, later: SpreadSums) -> None:
        self.total += later.total
        self.count += later.count
        self.histogram = self.histogram + later.histogram
        self.low = min(self.low, later.low)
        if (later.high[0], -later.high[1]) > (self.high[0], -self.high[1]):
            self.high = later.high

    def spread(self, name: str, shift: float = 0.0) -> Spread:
        """``shift`` is added to every value."""
        if not self.count:
            return NO_SPREAD
        edges = SCALES[name].edges
        found = [percentile(self.histogram, edges, q, self.low[0], self.high[0]) for q in (5, 50, 95)]
        p5, p50, p95 = (None if one is None else one.value + shift for one in found)
        return Spread(
            self.total / self.count + shift, p5, p50, p95,
            self.low[0] + shift, self.low[1], self.high[0] + shift, self.high[1],
            max((one.error for one in found if one is not None), default=None),
        )  # fmt: skip


NO_SPREAD = Spread(None, None, None, None, None, None, None, None)


class PhaseMinutes:
    """The sums of one phase."""

    def __init__(self) -> None:
        self.steps = self.active = 0
        self.total = self.mean_tokens = self.max_tokens = 0.0

    def merge(self, later: PhaseMinutes) -> None:
        for name, value in vars(later).items():
            setattr(self, name, getattr(self, name) + value)


class ConfigurationMinutes:
    """The sums of consecutive rows of one shape; tokens as recorded, token replication not divided out."""

    def __init__(self, shape: Shape, num_logical_experts: int) -> None:
        self.shape = shape
        layers = shape.num_moe_layers
        self.first = self.last = -1
        self.recorded = self.active = 0
        self.total = self.mean_tokens = self.max_tokens = 0.0
        #: Of loads summed over a row, Σ (max − mean); of rows with enough steps, and what they have in all.
        self.lasting = self.lasting_of = 0.0
        self.window_steps = 0
        self.slowest = np.zeros((layers, shape.ep_size))
        self.tokens: Int64 = np.zeros(layers, np.int64)
        self.logical: Int64 = np.zeros((layers, num_logical_experts), np.int64)
        #: The placement's number, a step of it, and tokens of its slots, not in ``logical`` yet.
        self._slots: tuple[int, int, Int64] | None = None
        self.layer_active: Int64 = np.zeros(layers, np.int64)
        self.layer_ratio, self.layer_inverse = np.zeros(layers), np.zeros(layers)
        #: Of loads summed over a row, mean / max and the rank with the most, weighted by steps.
        self.summed_ratio, self.summed_steps = np.zeros(layers), np.zeros(layers)
        self.summed_worst = np.zeros((layers, shape.ep_size))
        self.summed_max = 0.0

    def merge(self, later: ConfigurationMinutes) -> None:
        if self.first < 0 or (0 <= later.first < self.first):
            self.first = later.first
        self.last = max(self.last, later.last)
        self.window_steps = max(self.window_steps, later.window_steps)
        for name, value in vars(later).items():
            if name not in ("shape", "first", "last", "window_steps", "_slots"):
                setattr(self, name, getattr(self, name) + value)

    def add(self, run: Run, rows: Minutes, steps: Int64) -> Float64:
        """Add rows; ``steps``: the complete steps of each. Returns the mean rank's tokens: ``[rows]``."""
        shape, n = self.shape, len(rows)
        layers = shape.num_moe_layers
        self._cover(rows, steps)
        load = rows["rank_load"].reshape(n, layers, shape.ep_size)
        total = load.sum(axis=2)
        highest = load.max(axis=2)
        mean = total / float(shape.ep_size)
        self.tokens += total.sum(axis=0)
        self.mean_tokens += float(mean.sum())
        self.summed_max += float(highest.sum())
        enough = steps >= min(LEAST_STEPS * run.info.interval, LEAST_STEPS)
        self.lasting += float((highest - mean)[enough].sum())
        self.window_steps = max(self.window_steps, int(steps.max(initial=0)))
        if rows.summed:
            self._add_summed(run, rows, mean, enough)
        else:
            weight = np.where(highest > 0, steps[:, np.newaxis], 0)
            self.summed_ratio += np.divide(
                mean * weight, highest, out=np.zeros(mean.shape), where=highest > 0
            ).sum(axis=0)
            self.summed_steps += weight.sum(axis=0)
            at = (load == highest[:, :, np.newaxis]) & (highest * shape.ep_size > total)[:, :, np.newaxis]
            self.summed_worst += (
                at / np.maximum(at.sum(axis=2, keepdims=True), 1) * weight[:, :, np.newaxis]
            ).sum(axis=0)
        of_row: Float64 = mean.sum(axis=1)
        return of_row

    def _cover(self, rows: Minutes, steps: Int64) -> None:
        chosen = steps > 0
        if chosen.any():
            first = int(rows["first_step"][chosen].min())
            self.first = first if self.first < 0 else min(self.first, first)
            self.last = max(self.last, int(rows["last_step"][chosen].max()))
            self.recorded += int(steps.sum())

    def add_experts(self, run: Run, rows: Minutes) -> None:
        """Add only what shows hot experts: the tokens of layers, and of the slots that rows name."""
        self._cover(rows, rows["recorded"])
        self.tokens += rows["rank_load"].reshape(len(rows), self.shape.num_moe_layers, -1).sum(axis=(0, 2))
        self._add_slots(run, rows)

    def _add_summed(self, run: Run, rows: Minutes, mean: Float64, enough: Any) -> None:
        shape = self.shape
        layers = shape.num_moe_layers
        self.max_tokens += float(rows["max_load"].sum())
        self.lasting_of += float((rows["max_load"] - mean)[enough].sum())
        self.total += float(np.nansum(rows["balancedness"]))
        self.active += int(rows["active"].sum())
        self.layer_active += rows["active_steps"].sum(axis=0, dtype=np.int64)
        self.layer_ratio += rows["layer_balancedness"].sum(axis=0)
        self.layer_inverse += rows["layer_imbalance"].sum(axis=0)
        self.slowest += rows["slowest"].sum(axis=0).reshape(layers, shape.ep_size)
        self._add_slots(run, rows)

    def _add_slots(self, run: Run, rows: Minutes) -> None:
        shape = self.shape
        layers = shape.num_moe_layers
        # A row is of one placement; between two changes all rows are of the same.
        epochs = np.searchsorted(run.history.changes, rows["first_step"], side="right")
        slot = rows["slot"].reshape(len(rows), layers, -1)
        tokens = rows["slot_load"].reshape(slot.shape)
        of_layer = np.broadcast_to(np.arange(layers)[:, np.newaxis], slot.shape[1:])
        for epoch in np.unique(epochs):
            own = epochs == epoch
            step = int(rows["first_step"][own][-1])
            sums = self._slots_at(run, int(epoch), step)
            named = (slot[own] >= 0) & (slot[own] < shape.num_physical_experts)
            where = np.broadcast_to(of_layer, slot[own].shape)[named], slot[own][named]
            np.add.at(sums, where, tokens[own][named])

    def _slots_at(self, run: Run, epoch: int, step: int) -> Int64:
        """The sums of slots while one placement holds; those of the placement before become experts'."""
        if self._slots is None or self._slots[0] != epoch:
            self.fold_slots(run)
            shape = self.shape
            self._slots = epoch, step, np.zeros((shape.num_moe_layers, shape.num_physical_experts), np.int64)
        return self._slots[2]

    def fold_slots(self, run: Run) -> None:
        """Add the last placement's slots to ``logical``; call it after the last row."""
        if self._slots is None:
            return
        _, step, sums = self._slots
        self._slots = None
        for layer in np.flatnonzero(sums.any(axis=1)):
            placed = run.history.layer(int(layer)).at(step)
            if placed is not None and len(placed) == sums.shape[1]:
                self.logical[layer] += fold(sums[layer], placed, self.logical.shape[1])


def merged(
    earlier: list[ConfigurationMinutes], later: list[ConfigurationMinutes]
) -> list[ConfigurationMinutes]:
    """Consecutive sums, those of one shape added up; the earlier ones are changed."""
    for own in later:
        if earlier and earlier[-1].shape == own.shape:
            earlier[-1].merge(own)
        else:
            earlier.append(own)
    return earlier


class StepCounts:
    """Which steps and minutes rows are of, and how many are complete. Rows of other phases are left out."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.counts: Int64 = np.zeros(len(STATUS_LABELS), np.int64)
        self.incomplete = 0
        #: The last complete step and its time; of incomplete rows after it, the first step, and how many.
        self.last_whole, self.whole_time = -1, -1
        self.since_whole: list[tuple[int, int]] = []
        self.reasons: Counter[tuple[int, str]] = Counter()
        self.first = self.last = -1
        self.first_time, self.last_time = 2**62, -1
        self.first_minute, self.last_minute = 2**62, -1
        self.of_rank: dict[int, RankSteps] = {}

    def add(self, part: RunMinutes) -> None:
        rows = part.rows
        if self._run.phase is not None:
            code = rows.phases.index(self._run.phase) if self._run.phase in rows.phases else -2
            rows = rows.select(rows["phase"] == code)
        if not len(rows):
            return
        lacking = np.zeros(len(rows), np.bool_)
        if any(part.missing):
            lacking = np.array([bool(ranks) for ranks in part.missing])
        table = np.stack([rows[name] for name in STATUS_LABELS], axis=1)
        self.counts += table[~lacking].sum(axis=0)
        self.incomplete += int(table[lacking].sum())
        self.since_whole += zip(
            rows["first_step"][lacking].tolist(), table[lacking].sum(axis=1).tolist(), strict=True
        )
        if not lacking.all():
            self._whole(*(int(rows[name][~lacking].max()) for name in ("last_step", "last_time_ns")))
        for i in np.flatnonzero(lacking).tolist():
            for reason in part.missing[i].items():
                self.reasons[reason] += int(table[i].sum())
        first, last = int(rows["first_step"].min()), int(rows["last_step"].max())
        self.first = first if self.first < 0 else min(self.first, first)
        self.last = max(self.last, last)
        self.first_time = min(self.first_time, int(rows["first_time_ns"].min()))
        self.last_time = max(self.last_time, int(rows["last_time_ns"].max()))
        self.first_minute = min(self.first_minute, int(rows["minute"].min()))
        self.last_minute = max(self.last_minute, int(rows["minute"].max()))
        self.of_rank |= part.of_rank
        if part.shape is not None:
            self._add(part.shape, rows if not lacking.any() else rows.select(~lacking))

    def _whole(self, last: int, time: int) -> None:
        if last > self.last_whole:
            self.last_whole, self.whole_time = last, time
        self.since_whole = [own for own in self.since_whole if own[0] > self.last_whole]

    def _add(self, shape: Shape, rows: Minutes) -> None:
        """Add rows of complete steps; there can be none."""

    def merge(self, later: Any) -> None:
        if later.first < 0:
            return
        self.since_whole += later.since_whole
        self._whole(later.last_whole, later.whole_time)
        self.counts = self.counts + later.counts
        self.incomplete += later.incomplete
        self.reasons.update(later.reasons)
        self.first = later.first if self.first < 0 else min(self.first, later.first)
        self.last = max(self.last, later.last)
        self.first_time = min(self.first_time, later.first_time)
        self.last_time = max(self.last_time, later.last_time)
        self.first_minute = min(self.first_minute, later.first_minute)
        self.last_minute = max(self.last_minute, later.last_minute)
        for rank, steps in later.of_rank.items():
            self.of_rank[rank] = steps.plus(self.of_rank.get(rank))

    def _missing(self) -> int:
        """How many numbers of steps between the first and the last no row has, and nothing retired.

        A rejected step may repeat a number, and sums do not show whether it does. It counts as a step of its
        own, which it is if only its load was refused.

        Minutes of ranks cannot be compared step by step, because their clocks differ a little. So with scope
        ``local`` this is what the rank with the most steps lacks: a rank that saw another step makes it less.
        """
        rank: int | None = None
        had = RankSteps(self.first, self.last, int(self.counts.sum()) + self.incomplete)
        if self._run.scope is Scope.LOCAL:
            rank, had = max(self.of_rank.items(), key=lambda item: (item[1].rows, -item[0]))
        gone = gone_steps(self._run, StepRange(had.first, had.last + 1), rank)
        return max(0, had.last + 1 - had.first - had.rows - gone)

    def completeness(self, steps: tuple[int, int] | None = None) -> Completeness:
        """The counts of steps, with those of which nothing is kept; ``steps``: those that were asked for."""
        counts = dict(zip(STATUS_LABELS, self.counts.tolist(), strict=True))
        found = Completeness(one_phase=self._run.phase is not None)
        if self.first < 0:
            return found
        found.first, found.last = self.first, self.last
        found.seen = sum(counts.values()) + self.incomplete
        for state in StepState:
            number = self.incomplete if state is StepState.INCOMPLETE else counts[state.label]
            if number:
                found.states[int(state)] = number
        found.retired = gone_steps(self._run, StepRange.of(steps))
        if not found.one_phase:
            found.missing = self._missing()
        found.reasons = self.reasons
        found.incomplete_since_whole = sum(count for _, count in self.since_whole)
        found.incomplete_inside = self.incomplete - found.incomplete_since_whole
        if self.last_whole >= 0:
            found.last_whole, found.whole_clock_ns = self.last_whole, self.whole_time
        found.last_of_rank = {rank: steps.last for rank, steps in self.of_rank.items()}
        found.first_clock_ns, found.last_clock_ns = self.first_time, self.last_time
        return found


def minutes_left_out(counts: Completeness, since: int | None) -> list[str]:
    """Notes on what figures of some minutes leave out.

    Args:
        counts: the steps of these minutes.
        since: the first step of the last configuration, if there are several.
    """
    notes = []
    if since is not None:
        notes.append(
            f"ep_size or the number of slots changed: steps before {since} are left out, because loads "
            "before and after cannot be added"
        )
    if lacking := counts.count(StepState.INCOMPLETE):
        notes.append(
            f"{plural(lacking, 'step')} ({percent(counts.incomplete_share)}) of these minutes are left out: "
            f"{counts.why_incomplete()}"
        )
    return notes


class ExpertTotals(StepCounts):
    """The tokens of experts on the slots that a run's rows name."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.configurations: list[ConfigurationMinutes] = []

    def _add(self, shape: Shape, rows: Minutes) -> None:
        if not len(rows):
            return
        if not self.configurations or self.configurations[-1].shape != shape:
            self.configurations.append(ConfigurationMinutes(shape, self._run.info.num_logical_experts))
        self.configurations[-1].add_experts(self._run, rows)

    def finish(self) -> None:
        """Complete the sums after the last row."""
        for own in self.configurations:
            own.fold_slots(self._run)

    def merge(self, later: Any) -> None:
        super().merge(later)
        later.finish()
        self.configurations = merged(self.configurations, later.configurations)


class MinuteTotals(StepCounts):
    """The sums of a run's rows for `summary`. They can be merged with those of later rows."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.configurations: list[ConfigurationMinutes] = []
        self.spreads = {name: SpreadSums() for name in SPREAD_FORMULAS}
        self.totals = dict.fromkeys(FORMULAS, 0.0)
        self.phases: dict[str, PhaseMinutes] = {}
        self.host_ms, self.host_steps = 0.0, 0
        self.host_histogram: Int64 = np.zeros(BINS, np.int64)
        #: Of each row: minute, first and last step, and the sum of balancedness over so many steps.
        self.points: list[tuple[Int64, Int64, Int64, Float64, Int64]] = []

    def finish(self) -> None:
        """Complete the sums after the last row."""
        for own in self.configurations:
            own.fold_slots(self._run)

    def _add(self, shape: Shape, rows: Minutes) -> None:
        if not self.configurations or self.configurations[-1].shape != shape:
            self.configurations.append(ConfigurationMinutes(shape, self._run.info.num_logical_experts))
        if not len(rows):
            return
        steps = rows["recorded"]
        mean = self.configurations[-1].add(self._run, rows, steps)
        key = rows["minute"], rows["first_step"], rows["last_step"]
        if not rows.summed:
            self.points.append((*key, np.zeros(len(rows)), steps))
            return
        self.points.append((*key, np.nan_to_num(rows["balancedness"]), rows["active"]))
        for name in FORMULAS:
            self.totals[name] += float(np.nansum(rows[name]))
        for name, sums in self.spreads.items():
            sums.add(name, rows)
        self.host_ms += float(rows["host_ms_sum"].sum())
        self.host_steps += int(rows["host_ms_steps"].sum())
        self.host_histogram += rows["host_ms_histogram"].sum(axis=0, dtype=np.int64)
        highest = rows["max_load"].sum(axis=1)
        for code, phase in enumerate(rows.phases):
            own = rows["phase"] == code
            if own.any():
                sums_of_phase = self.phases.setdefault(phase, PhaseMinutes())
                sums_of_phase.steps += int(steps[own].sum())
                sums_of_phase.active += int(rows["active"][own].sum())
                sums_of_phase.total += float(np.nansum(rows["balancedness"][own]))
                sums_of_phase.mean_tokens += float(mean[own].sum())
                sums_of_phase.max_tokens += float(highest[own].sum())

    def merge(self, later: Any) -> None:
        super().merge(later)
        later.finish()
        self.configurations = merged(self.configurations, later.configurations)
        for name, sums in self.spreads.items():
            sums.merge(later.spreads[name])
        for name, total in later.totals.items():
            self.totals[name] += total
        for name, phase in later.phases.items():
            self.phases.setdefault(name, PhaseMinutes()).merge(phase)
        self.host_ms += later.host_ms
        self.host_steps += later.host_steps
        self.host_histogram = self.host_histogram + later.host_histogram
        self.points += later.points

    @property
    def minutes(self) -> int:
        """How many clock minutes have a complete step."""
        return len(np.unique(np.concatenate([np.empty(0, np.int64), *(point[0] for point in self.points)])))
