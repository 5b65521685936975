"""What imbalance cost in milliseconds per step, by the times between steps: the cost in `summary`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from typing import Any, NamedTuple

import numpy as np

from eplb_analyze.analysis.cost_sample import CostSample, sample_of
from eplb_analyze.analysis.kernel_cost import ASSUMED, Estimate, estimate
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.json_report import Report
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import (
    MIN_STEPS,
    Bool,
    Cost,
    CostStatus,
    Driver,
    Excess,
    Float64,
    StepTimes,
    Work,
    fit,
)
from eplb_analyze.metrics.pauses import beside
from eplb_analyze.metrics.prices import combined
from eplb_analyze.reader.run import Run
from eplb_analyze.text import milliseconds, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

#: If the engine names no phase, steps are told apart by their mean number of tokens per slot: an expert's
#: time is flat while reading its weights is the limit, and grows with its tokens later.
TOKENS_PER_SLOT = (32, 256)
#: A phase with a smaller share of the steps does not matter for the run as a whole.
RARE = 0.01
#: Step time is flat if imbalance costs at most this share of it.
FLAT = 0.02
#: Why a cost or a pause in milliseconds is not known, and what to do.
NO_LOADS = "it needs experts' loads, which are no longer kept"
NO_TIMES = "the recording has no step times; supply them with --timings"

#: What step times are, by basis.
TIMES = {
    "engine": "the engine's step times",
    "device": "times on the device",
    "host": "times between steps",
    "kernel_times": "published kernel times of DeepSeek-V3 in fp8, not times of this run",
}


@frozen
class PhaseCost:
    """The cost of imbalance in the steps of one phase.

    Attributes:
        steps: how many steps the phase has in the sample.
        steps_used: how many of them the fit explains.
        step_ms: the median step time.
        share_of_step: the cost divided by the mean time of the steps used.
        driver: what makes the slowest rank slow: balancing tokens saves nothing if only active experts do.
            None if the cost is not measured or the run cannot tell.
        regime: what the time of a step depends on, in words.
    """

    status: CostStatus
    message: str
    steps: int
    steps_used: int
    #: Milliseconds per step that perfect balance of the same tokens would save.
    ms_per_step: Milliseconds | None
    share_of_step: Milliseconds | None
    step_ms: float | None
    r2: float | None
    driver: Driver | None
    regime: str


class UsedSteps(NamedTuple):
    """The steps of a phase without idle gaps and pauses: float64 ``[n]``, ms; and their mean excess.

    The excess is None if experts' loads are not kept of all these steps.
    """

    ms: Float64
    excess: Excess | None


@frozen
class RunCost(Report):
    """The cost of imbalance over all phases whose step times show it.

    A phase without a measurable cost counts as 0, unless no phase has one: then `ms_per_step` bounds all.

    Attributes:
        basis: what the step times are: `engine`, its own; `device`, by CUDA events; `host`, the time between
            steps by the writer's clock; `kernel_times`, of another machine.
        idle_gaps, pauses: steps left out because the engine waited, or because a placement changed.
        prices: the fitted models by phase, which price other imbalances.
        used: by phase, if it has steps with a usable time.
    """

    status: CostStatus
    basis: str
    message: str
    #: Milliseconds per step that perfect balance of the same tokens would save.
    ms_per_step: Milliseconds | None
    #: The same as a share of the step.
    share_of_step: Milliseconds | None
    step_ms_p50: float | None
    step_ms_p95: float | None
    r2: float | None
    #: Steps that the cost was fitted to.
    steps_used: int
    idle_gaps: int
    pauses: int
    phases: dict[str, PhaseCost]
    prices: dict[str, Cost] = field(default_factory=dict, repr=False)
    used: dict[str, UsedSteps] = field(default_factory=dict, repr=False)

    @property
    def measured_phases(self) -> list[str]:
        """The names of the phases with a measured cost."""
        return [name for name, phase in self.phases.items() if phase.status is CostStatus.MEASURED]

    @property
    def phases_differ(self) -> bool:
        """Whether phases with at least :data:`RARE` of the steps differ in whether a cost is measured."""
        steps = sum(phase.steps for phase in self.phases.values())
        return any(p.status is not self.status and p.steps >= RARE * steps for p in self.phases.values())

    @property
    def measured_share(self) -> float:
        """The share of the steps that are of these phases."""
        steps = sum(phase.steps for phase in self.phases.values())
        return sum(self.phases[name].steps for name in self.measured_phases) / steps if steps else 0.0

    def rank_seconds(self, rank_steps: int) -> float | None:
        """The time that ranks lost: the measured cost of all steps; None if the cost is not known.

        Args:
            rank_steps: Σ over steps of the ranks that serve.
        """
        if self.status is CostStatus.NO_MEASURABLE_COST:
            return 0.0
        if self.status is not CostStatus.MEASURED:
            return None
        measured = [self.phases[name] for name in self.measured_phases]
        ms = sum(phase.ms_per_step.estimate * phase.steps for phase in measured if phase.ms_per_step)
        return ms / 1e3 / max(1, sum(phase.steps for phase in self.phases.values())) * rank_steps

    @property
    def evidence(self) -> str:
        """What the cost was fitted to, in words."""
        steps = sum(phase.steps for phase in self.phases.values())
        text = f"by {TIMES.get(self.basis, self.basis)}, {self.steps_used:,} of {plural(steps, 'step')}"
        # Mostly that of the number of tokens: without the words, a flat cost with a high R² seems proven.
        return text if self.r2 is None else f"{text}, R² {self.r2:.2f} with the number of tokens"

    def to_json(self) -> dict[str, Any]:
        return self.document(
            {
                "status": self.status,
                "basis": self.basis,
                "ms_per_step": self.ms_per_step,
                "share_of_step": self.share_of_step,
                #: The phases with a measured cost; the others count as 0.
                "measured_phases": self.measured_phases,
                #: The share of the steps that are of these phases.
                "measured_share": self.measured_share,
                #: Milliseconds of a step.
                "step_ms": {"p50": self.step_ms_p50, "p95": self.step_ms_p95},
                "r2": self.r2,
                "steps_used": self.steps_used,
                #: Steps left out because the engine waited, or a placement changed.
                "excluded": {"idle_gaps": self.idle_gaps, "pauses": self.pauses},
                "message": self.message,
                "phases": self.phases,
            }
        )


def cost_of(
    run: Run,
    steps: tuple[int, int] | None = None,
    *,
    timings: StepTimes | None = None,
    gpu: str | None = None,
) -> RunCost:
    """The cost of imbalance in a run, or in a half-open range of its steps.

    Args:
        timings: step times that another program measured; default `run.timings`, else the recording's own.
        gpu: a GPU whose kernel times estimate the cost if the run does not show it; default `run.gpu`.
    """
    if steps is not None:
        run.require(steps)
    sample = run.retry_without_damaged(lambda: sample_of(run, steps))
    return cost_of_sample(run, sample, timings, gpu)


def cost_of_sample(
    run: Run, sample: CostSample, timings: StepTimes | None = None, gpu: str | None = None
) -> RunCost:
    """The cost of imbalance in the steps of a sample; see :func:`cost_of`."""
    cost, gpu = measured_cost(run, sample, timings), gpu or run.gpu
    if gpu is None or cost.status is not CostStatus.NOT_IDENTIFIABLE or not sample.first or not sample.last:
        return cost
    return _estimated(cost, gpu, estimate(run, gpu, (sample.first[0], sample.last[0] + 1)))


def _estimated(cost: RunCost, gpu: str, found: dict[str, Estimate] | str) -> RunCost:
    """The estimate from kernel times, for a cost that is not measurable."""
    if isinstance(found, str):
        return replace(cost, message=f"{cost.message}; no estimate from kernel times: {found}")
    # The phases' errors are not independent.
    bounds = [(own.cost.value, own.cost.low, own.cost.high) for own in found.values()]
    total = Interval(*np.average(bounds, axis=0, weights=[own.steps for own in found.values()]).tolist())

    def text(interval: Interval) -> str:
        value = milliseconds(interval.value, interval.low, interval.high)
        return f"imbalance would cost {value} per step, by {gpu.upper()} kernel times"

    return replace(
        cost,
        status=CostStatus.ESTIMATED,
        basis="kernel_times",
        message=f"{text(total)}, {ASSUMED}; the run does not show it",
        ms_per_step=Milliseconds.of(total),
        steps_used=sum(own.steps for own in found.values()),
        phases={
            name: PhaseCost(
                status=CostStatus.ESTIMATED,
                message=text(own.cost),
                steps=own.steps,
                steps_used=own.steps,
                ms_per_step=Milliseconds.of(own.cost),
                share_of_step=None,
                step_ms=None,
                r2=None,
                driver=None,
                regime="",
            )
            for name, own in found.items()
        },
    )


def measured_cost(run: Run, sample: CostSample, timings: StepTimes | None = None) -> RunCost:
    """The cost that the times of a sample's steps show, without estimates; see :func:`cost_of`."""
    seen = (
        () if len(sample.step) or not sample.first or not sample.last else (sample.first[0], sample.last[0])
    )
    # The sample has no step of which only sums per rank are kept.
    if seen and run.tiers.by_rank.overlaps(seen[0], seen[1] + 1):
        return _unknown(NO_LOADS)
    first = run.step_range[0] or 0
    changes = [step for step in run.load_history().changes if step > first] if len(sample.step) else []
    timings = run.timings if timings is None else timings
    return cost_of_steps(sample, changes, timed=run.info.timed, timings=timings)


def cost_of_steps(
    sample: CostSample, changes: Sequence[int], *, timed: bool, timings: StepTimes | None = None
) -> RunCost:
    """The cost that the times of a sample's steps show, without estimates.

    Args:
        changes: the steps at which the placement changed.
        timed: whether the run's clock times are those of its engine.
        timings: step times that another program measured.
    """
    if not len(sample.step):
        return _unknown(f"fewer than {MIN_STEPS} steps are complete")
    pauses = beside(sample.step, np.array(changes, np.int64))
    basis, ms = _times(sample, timings)
    if basis == "host" and not timed:
        return _unknown(NO_TIMES)
    fits: list[tuple[str, Bool, Cost]] = []
    for name, mask in phases_of(sample.phase, sample.per_slot):
        if basis == "host":
            ms[mask] = _durations(sample, mask)
        fits.append((name, mask, fit(ms[mask], sample.work.select(mask), pauses[mask])))
    if not fits:
        return _unknown("no step has tokens")
    return _total(sample, ms, basis, pauses, fits)


def _times(sample: CostSample, timings: StepTimes | None) -> tuple[str, Float64]:
    """What the step times are, and float64 ``[n]``, ms: the best there are; of ``host`` none yet."""
    if timings is not None:
        return timings.basis, timings.of(sample.step)
    for basis, ms in (("engine", sample.step_ms), ("device", sample.device_ms)):
        if np.isfinite(ms).mean() > 0.5:
            return basis, ms
    return "host", np.full(len(sample.step), np.nan)


def _durations(sample: CostSample, steps: Bool) -> Float64:
    """The durations of some steps, all of one phase, ms.

    An engine that waits for its device records a step when it has ended; one that only launches kernels
    records it when the last one has. Which of the two it is, the number of tokens shows, since a step with
    more of them takes longer. Imbalance is not looked at, or chance would decide in its favor.
    """
    times = sample.since_last[steps], sample.until_next[steps]
    last, next_ = (_rank_correlation(sample.work.tokens[steps], ms) for ms in times)
    return times[next_ > last]


def step_times(run: Run, sample: CostSample) -> tuple[str, dict[str, UsedSteps]]:
    """What the step times of a sample are, and by phase those without idle gaps and pauses.

    Also of steps without experts' loads, to which no cost can be fitted.
    """
    if not len(sample.step):
        return "host", {}
    basis, ms = _times(sample, run.timings)
    if basis == "host" and not run.info.timed:
        return basis, {}
    first = run.step_range[0] or 0
    changes = [step for step in run.load_history().changes if step > first]
    pauses = beside(sample.step, np.array(changes, np.int64))
    found = {}
    for name, mask in phases_of(sample.phase, sample.per_slot):
        own = _durations(sample, mask) if basis == "host" else ms[mask]
        used = _usual(own, pauses[mask])
        if used.any():
            found[name] = UsedSteps(own[used], None)
    return basis, found


def _usual(ms: Float64, pauses: Bool) -> Bool:
    """The steps that take no more than thrice the median, but for those beside rearrangements."""
    known = np.isfinite(ms) & ~pauses
    return known & (ms < 3 * (np.median(ms[known]) if known.any() else 0.0))


def _rank_correlation(a: Float64, b: Float64) -> float:
    """Spearman's, over the steps with a duration; 0 if one of them never varies."""
    known = np.isfinite(b)
    if known.sum() < 3:
        return 0.0
    first, second = (np.unique(values[known], return_inverse=True)[1].astype(float) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1]) if first.std() > 0 and second.std() > 0 else 0.0


def phases_of(phases: Sequence[str | None], per_slot: Float64) -> Iterator[tuple[str, Bool]]:
    """Name and steps of each phase: the engine's, else by the mean tokens of a slot."""
    named = np.array([name is not None for name in phases], np.bool_)
    for name in sorted({name for name in phases if name is not None}):
        yield name, np.array([phase == name for phase in phases])
    edges = (0, *TOKENS_PER_SLOT, np.inf)
    for low, high in itertools.pairwise(edges):
        mask = ~named & (per_slot > low) & (per_slot <= high)
        if mask.any():
            least = "up to" if low == 0 else f"{low} to"
            tokens = f"{least} {high}" if np.isfinite(high) else f"over {low}"
            yield f"steps with {tokens} tokens per slot", mask


def _total(
    sample: CostSample, ms: Float64, basis: str, pauses: Bool, fits: list[tuple[str, Bool, Cost]]
) -> RunCost:
    """All phases together: each counts by its number of steps."""
    phases = {name: _phase_cost(ms[mask], sample.num_tokens[mask], cost) for name, mask, cost in fits}
    each = {name: _used(ms[mask], sample.work.select(mask), cost, pauses[mask]) for name, mask, cost in fits}
    timed = {name: steps for name, steps in each.items() if steps is not None}
    used = np.zeros(len(ms), np.bool_)
    expected = np.full(len(ms), np.nan)
    for _, mask, cost in fits:
        used[mask], expected[mask] = cost.used, cost.expected
    idle = np.isfinite(expected) & ~used & (ms > expected)
    known = [
        (int(mask.sum()), cost) for _, mask, cost in fits if cost.status is not CostStatus.NOT_IDENTIFIABLE
    ]
    counting = [(n, cost) for n, cost in known if cost.status is CostStatus.MEASURED]
    measured, steps = bool(counting), sum(count for count, _ in known)
    # A phase without a measurable cost would only add its noise to what others measurably cost.
    parts = [(n / steps, c.ms_per_step) for n, c in counting or known if c.ms_per_step is not None]
    interval = combined(parts)
    if interval is None:
        reasons = {phase.message for phase in phases.values()}
        name, largest = max(phases.items(), key=lambda item: item[1].steps)
        unknown = _unknown(largest.message if len(reasons) == 1 else f"{largest.message} ({name})", phases)
        if timed:
            all_ms = np.concatenate([steps.ms for steps in timed.values()])
            p50, p95 = (float(v) for v in np.percentile(all_ms, [50, 95]))
            unknown = replace(unknown, step_ms_p50=p50, step_ms_p95=p95)
        return replace(unknown, basis=basis, used=timed)
    interval = Interval(interval.value, max(0.0, interval.low), interval.high)
    status = CostStatus.MEASURED if measured else CostStatus.NO_MEASURABLE_COST
    mean = sum(count / steps * (cost.mean_ms or 0.0) for count, cost in known)
    times, residuals = ms[used], (ms - expected)[used]
    p50, p95 = (float(v) for v in np.percentile(times, [50, 95]))
    return RunCost(
        status=status,
        basis=basis,
        message=_sentence(status, interval, mean),
        ms_per_step=Milliseconds.of(interval),
        share_of_step=Milliseconds.of(interval, 1 / mean),
        step_ms_p50=p50,
        step_ms_p95=p95,
        r2=max(0.0, 1 - float(residuals.var() / times.var())) if times.var() > 0 else None,
        steps_used=int(used.sum()),
        idle_gaps=int(idle.sum()),
        pauses=int(pauses.sum()),
        phases=phases,
        prices={name: cost for name, _, cost in fits},
        used=timed,
    )


def _used(ms: Float64, work: Work, cost: Cost, pauses: Bool) -> UsedSteps | None:
    """The steps that were fitted, or if none were, those that take no more than thrice the median."""
    used = cost.used if cost.used.any() else _usual(ms, pauses)
    return UsedSteps(ms[used], work.select(used).excess()) if used.any() else None


def _phase_cost(ms: Float64, tokens: Int64, cost: Cost) -> PhaseCost:
    measured, known = cost.ms_per_step, cost.status is not CostStatus.NOT_IDENTIFIABLE
    message, regime = cost.reason, ""
    if known and measured is not None and cost.mean_ms is not None:
        message = _sentence(cost.status, measured, cost.mean_ms)
        regime = _regime(cost, tokens[cost.used])
    return PhaseCost(
        cost.status,
        message,
        len(ms),
        int(cost.used.sum()),
        Milliseconds.of(measured) if known and measured else None,
        Milliseconds.of(measured, 1 / cost.mean_ms) if known and measured and cost.mean_ms else None,
        float(np.median(ms[cost.used])) if cost.used.any() else None,
        cost.r2,
        cost.driver,
        regime,
    )


def _sentence(status: CostStatus, interval: Interval, mean_ms: float) -> str:
    step = milliseconds(mean_ms)
    if status is CostStatus.MEASURED:
        estimate, bounds = milliseconds(interval.value, interval.low, interval.high).split(" ms (")
        return f"imbalance costs {estimate} ms of each {step} step (95% CI {bounds}"
    return f"imbalance has no measurable cost: at most {milliseconds(interval.high)} of each {step} step"


def _regime(cost: Cost, tokens: Int64) -> str:
    """What the time of a step depends on."""
    of = f"of {np.median(tokens):,.0f} tokens " if len(tokens) and tokens.min() > 0 else ""
    if cost.status is CostStatus.NO_MEASURABLE_COST:
        if cost.ms_per_step and cost.mean_ms and cost.ms_per_step.high > FLAT * cost.mean_ms:
            return "these step times cannot show a smaller cost"
        return f"steps {of}take no longer with imbalanced loads"
    if cost.driver is Driver.ACTIVE_EXPERTS:
        return (
            f"steps {of}wait for the rank with the most active experts; balancing tokens alone saves nothing"
        )
    if cost.driver is Driver.TOKENS:
        return f"steps {of}wait for the rank with the most tokens"
    if cost.driver is Driver.BOTH:
        return f"steps {of}wait for the rank with the most active experts and tokens"
    return "the run does not show whether tokens or active experts make a rank slow"


def _unknown(reason: str, phases: dict[str, PhaseCost] | None = None) -> RunCost:
    message = f"not measurable in this run: {reason}"
    status = CostStatus.NOT_IDENTIFIABLE
    return RunCost(status, "host", message, None, None, None, None, None, 0, 0, 0, phases or {})
