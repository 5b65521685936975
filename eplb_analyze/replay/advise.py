"""`advise`: whether to change the load balancer's setting, and to what, judged by the run's own loads.

A setting is chosen on the first part of the run and judged on the rest, which did not influence the choice;
its gain there has a confidence interval. Loads and placements come from :mod:`eplb_analyze.replay.replay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from eplb_analyze.analysis.cost import NO_TIMES
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.dispatch.named import LP, MEASURED
from eplb_analyze.errors import UsageError
from eplb_analyze.json_report import RunReport
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, Ratio
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.prices import combined
from eplb_analyze.policies.policy import ORACLE
from eplb_analyze.reader.recorded_setting import Recorded, Setting, not_due, recorded
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.changes import SURE, Changes, one_at_a_time
from eplb_analyze.replay.pricing import ASSUMED_PAUSE_MS, Objective, gain, net
from eplb_analyze.replay.replay import Outcome, Replay, replay_run
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.selftest import SelfTest
from eplb_analyze.replay.setting_run import Move
from eplb_analyze.replay.settings import FIXED, STATIC, Choices, engine_arguments
from eplb_analyze.replay.simulator import NotReplayableError
from eplb_analyze.text import milliseconds, plural
from eplb_dump.format.journal import Shape

#: The share of the steps on which a setting is chosen.
TRAINING = 0.6
#: If the cost of moving is not known, settings with this share of the best gain count as equally good.
GOOD_ENOUGH = 0.8
#: A gain below this share of the time is not worth a change.
MIN_GAIN = 0.02
#: With fewer steps there is no verdict.
MIN_SCORED = 64

#: What a gain is, in the words of a reason.
BASES = {
    Objective.TOKENS: "by tokens",
    Objective.ACTIVE: "by active experts",
    Objective.MS: "net of pauses",
}

Verdict = Literal["leave", "enable", "retune", "fix", "not enough data"]
#: The verdicts that advise a setting.
CHANGES = ("enable", "retune")


@dataclass(frozen=True)
class ScoredSteps:
    """The steps scored in one part of the run."""

    first_step: int
    last_step: int
    steps: int


@dataclass(frozen=True)
class Judged:
    """A setting in the judged part of the run; ``setting`` is None for the recorded placements."""

    setting: Setting | None
    balancedness: float | None
    idle_fraction: float | None
    rearrangements: int
    weights_moved: int
    active_experts: float | None = None


@dataclass(frozen=True)
class Advice(RunReport):
    """``gain`` is the share of today's time that ``best`` saves in the judged part.

    By objective ``ms`` that is ``net_ms_per_step`` beside the median step; by ``tokens`` the tokens of the
    ranks with most of them are time, and by ``active`` the active experts.
    """

    verdict: Verdict
    #: Why, in sentences; for ``not enough data``, what is missing. If the load balancer does not work, that
    #: comes first.
    reasons: list[str]
    #: What is wrong with the load balancer, also the first of the reasons; None: nothing that is known. The
    #: verdict is then ``fix``: a setting of a load balancer that does not act has no effect.
    fault: str | None = None
    #: The best setting of the training part, whatever the verdict; None if none could be tried.
    best: Judged | None = None
    #: The recorded placements in the judged steps.
    today: Judged | None = None
    #: The share of time saved in the judged steps.
    gain: Interval | None = None
    #: What imbalance costs less, minus the pauses of rearrangements beyond today's; None: not measurable.
    net_ms_per_step: Milliseconds | None = None
    #: The gain without pauses.
    gain_ms_per_step: Milliseconds | None = None
    #: The pause of a rearrangement at which there is no gain left; None if there are no more than today.
    break_even_pause_ms: float | None = None
    #: The gain in the steps that the setting was chosen on.
    training_gain: float | None = None
    #: The time to fetch one expert of one layer at which there is no gain left; None if the setting moves no
    #: more than today, or if times are not known.
    break_even_ms: float | None = None
    #: How to start the engine with the advised setting, if known.
    engine_arguments: str | None = None
    #: The steps that the setting was chosen on.
    trained: ScoredSteps | None = None
    #: The steps that it is judged on.
    judged: ScoredSteps | None = None
    #: The option `--min-gain`.
    min_gain: float = MIN_GAIN
    #: The median time of a step, ms; None if not known.
    step_ms_p50: float | None = None
    #: What each change of one part of the setting gains by itself; None if none was tried.
    changes: Changes | None = None
    #: The replay behind it; None if the run cannot be replayed.
    replay: Replay | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def measured_balancedness(self) -> float | None:
        """The recorded balancedness, over all steps scored."""
        return None if self.replay is None else self.replay.measured_balancedness

    def passes(self, least: float) -> bool:
        """Whether the recorded balancedness is known and at least ``least``."""
        return self.measured_balancedness is not None and self.measured_balancedness >= least

    def to_json(self) -> dict[str, Any]:
        replay = self.replay
        return self.document(
            {
                "verdict": self.verdict,
                "reasons": self.reasons,
                "fault": self.fault,
                "advised": self.best if self.verdict in CHANGES else None,
                "best": self.best,
                "today": self.today,
                "recorded": replay and replay.recorded,
                "gain": self.gain,
                "objective": replay and replay.objective,
                "objective_reason": replay and replay.objective_reason,
                "net_ms_per_step": self.net_ms_per_step,
                "gain_ms_per_step": self.gain_ms_per_step,
                "pause": replay and replay.pause,
                "break_even_pause_ms": self.break_even_pause_ms,
                "cost": replay and replay.cost,
                "confidence": bootstrap.CONFIDENCE,
                "training_gain": self.training_gain,
                "changes": self.changes,
                "break_even_ms": self.break_even_ms,
                "engine_arguments": self.engine_arguments,
                "min_gain": self.min_gain,
                "step_ms_p50": self.step_ms_p50,
                "trained": self.trained,
                "judged": self.judged,
                #: How many settings were tried.
                "settings_tried": 0 if replay is None else len(replay.outcomes),
                "cost_per_expert_ms": replay and replay.cost_per_expert_ms,
                #: What was recorded, over all selected steps.
                "measured": {
                    "balancedness": self.measured_balancedness,
                    "idle_fraction": replay and replay.measured_idle_fraction,
                },
                "steps": replay and replay.part.whole,
                "notes": self.notes,
            }
        )


def advise(
    run: Run,
    choices: Choices | Sequence[Setting] | None = None,
    steps: tuple[int, int] | None = None,
    *,
    min_gain: float = MIN_GAIN,
    objective: Objective | None = None,
    num_groups: int | None = None,
    num_nodes: int | None = None,
    cost_per_expert_ms: float | None = None,
    expert_mb: float | None = None,
    workers: int | None = None,
) -> Advice:
    """Advise whether another setting is better over a half-open range of steps (default: all).

    Args:
        choices, num_groups, num_nodes, cost_per_expert_ms, workers: see
            :func:`~eplb_analyze.replay.replay.replay_run`.
        min_gain: a smaller share of the time is not worth a change.
        expert_mb: the size of the weights of one expert of one layer, in MB.
        objective: what a setting is judged by; default ``ms``, or ``tokens`` if the recording has no step
            times. In ms nothing is advised that is not measurable.

    Raises:
        NotInDumpError: the dump has no such step.
        DumpError: no step is complete.
        UsageError: a setting or policy is impossible, or there are several dispatches.
    """
    names = run.info.run_id, run.info.model
    if isinstance(choices, Choices) and choices.dispatches is not None:
        if len(set(choices.dispatches)) > 1:
            raise UsageError("advise takes one dispatch; replay compares several")
        if LP in choices.dispatches:
            raise UsageError(f"{LP} is a bound that no engine reaches; replay shows it")
    try:
        played = replay_run(
            run, choices, steps, num_groups=num_groups, num_nodes=num_nodes,
            objective=objective, cost_per_expert_ms=cost_per_expert_ms, expert_mb=expert_mb, workers=workers,
        )  # fmt: skip
    except NotReplayableError as missing:
        info = run.info
        setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
        fault = out_of_order(run, setting, None)
        reasons = [str(missing)] if fault is None else [fault, str(missing)]
        return Advice(
            *names, "not enough data" if fault is None else "fix", reasons, fault, min_gain=min_gain
        )
    timed = played.part.step_seconds is not None or bool(played.cost.prices)
    if objective is None and timed:
        played = replace(played, objective=Objective.MS)
    fault = out_of_order(run, played.recorded, played.self_test)
    return TrainTestSplit(played, min_gain, run.info.engine, fault, expert_mb).advice()


#: With so many rearrangements due and none made, the load balancer has stopped.
STOPPED = 2


def out_of_order(run: Run, today: Recorded, test: SelfTest | None) -> str | None:
    """What is wrong with a load balancer that is on and does not rearrange; None: nothing, or not known.

    Args:
        today: the setting of the run.
        test: that setting replayed, if it could be.
    """
    if today.enabled is False or today.interval is None or not run.placements_recorded:
        return None
    every = f"a rearrangement was due every {plural(today.interval, 'step')}"
    changes = run.history.rearrangements()
    if not changes:
        if not_due(run) is not None:
            return None
        steps = run.clock.range_label(*(step or 0 for step in run.step_range))
        text = f"EPLB never acted: {every}, but no placement changed in {steps}"
    elif test is not None and test.missed >= STOPPED:
        last = run.clock.label(changes[-1].last_step)
        text = f"EPLB stopped acting: {every}, but no placement changed after {last}"
    else:
        return None
    if test is not None and test.time_saved.is_significant and test.time_saved.value > 0:
        text += f"; as configured, it would have saved {test.time_saved.value:.1%} of the time, by tokens"
    return f"{text}. Find out why before you change its setting"


class TrainTestSplit:
    """A replay split into steps for choosing a setting and steps for judging it."""

    def __init__(
        self,
        played: Replay,
        min_gain: float,
        engine: str | None,
        fault: str | None = None,
        expert_mb: float | None = None,
    ) -> None:
        """``fault``: what is wrong with the load balancer, which is said before anything else."""
        self.played, self.min_gain, self.engine, self.fault = played, min_gain, engine, fault
        self.expert_mb = expert_mb
        scores = played.scores
        columns = len(scores.step)
        cut = int(TRAINING * columns)
        self.training, self.judging = slice(0, cut), slice(cut, columns)
        self.split = int(scores.step[cut]) if cut < columns else played.last_step + 1

    def advice(self) -> Advice:
        played = self.played
        missing = self._missing()
        if missing:
            return self._verdict("not enough data", [missing])
        test = played.self_test
        if test is not None and test.doubt is not None and not self.fault:
            return self._verdict("not enough data", [test.doubt])
        candidates = [i for i in range(len(played.outcomes)) if self._is_candidate(i)]
        untried = self._never_rearranges(candidates)
        if not candidates:
            return self._verdict("not enough data", [untried or "no setting was tried but today's"])
        if self.in_ms and (unknown := self._unknown_cost()) is not None:
            return self._verdict("leave", [unknown])
        gains = {i: self._gain(i, self.training) for i in candidates}
        best = self._choose(gains)
        judged = self._interval(best)
        if judged is None:
            text = f"fewer than {MIN_STEPS} steps with tokens remain to judge a setting"
            return self._verdict("not enough data", [text])
        gain, error = judged
        sure = gain.value > SURE * error and gains[best] > 0
        priced = self._priced(best, self.judging) if self.in_ms else None
        work = 0.0 if priced is None else priced[0].value
        verdict, reason = self._judge(gain, sure, played.outcomes[best].setting, work)
        if untried is not None and verdict not in CHANGES:
            return self._verdict("not enough data", [untried], best, gain, gains[best])
        return self._verdict(verdict, [reason], best, gain, gains[best])

    def _missing(self) -> str | None:
        played = self.played
        if played.scored < MIN_SCORED:
            count = plural(played.scored, "complete step")
            return f"{count} under a known placement, at least {MIN_SCORED} are needed"
        parts = (self.training, self.judging)
        if any((played.scores.maximum[TODAY, part] > 0).sum() < MIN_STEPS for part in parts):
            return f"fewer than {MIN_STEPS} steps with tokens in a part of the run"
        return None

    def _never_rearranges(self, candidates: Sequence[int]) -> str | None:
        """What to try if no setting that rearranges can be judged, although one was tried; else None."""
        rearranging = [
            i
            for i, outcome in enumerate(self.played.outcomes)
            if outcome.setting is not None and outcome.setting.policy not in FIXED
        ]
        if not rearranging or not set(rearranging).isdisjoint(candidates):
            return None
        steps = self.split - self.played.first_step
        return (
            f"no setting tried rearranges in the first {plural(steps, 'step')}, on which one is chosen: a "
            "longer recording, or a shorter --interval-steps"
        )

    def _is_candidate(self, index: int) -> bool:
        """Whether the setting differs from today's, and acts in the training part."""
        outcome, today = self.played.outcomes[index], self.played.today
        setting = outcome.setting
        same = (outcome.num_physical_experts, outcome.ep_size) == (today.num_physical_experts, today.ep_size)
        if setting is None or outcome.ep_size != today.ep_size or setting == self.played.recorded.setting():
            return False
        if setting.policy == ORACLE:  # no engine has it
            return False
        if setting.policy == STATIC:  # another redundancy, or rearranging is switched off
            return not same or bool(today.moves)
        return setting.policy in FIXED or any(move.step < self.split for move in outcome.moves)

    @property
    def in_ms(self) -> bool:
        return self.played.objective is Objective.MS

    def _unknown_cost(self) -> str | None:
        """Why no setting can be judged in ms."""
        cost = self.played.cost
        why = price if isinstance(price := gain(cost, self.played.scores, TODAY), str) else None
        if why is None and self.step_ms is None:
            why = NO_TIMES
        if why is None:
            return None
        return (
            f"the gain of a setting is not measurable in this run: {why}. --objective tokens shows the "
            f"gain if time were proportional to tokens"
        )

    @property
    def step_ms(self) -> float | None:
        """The median time of a step: by what the cost was fitted to, so that both are of the same times."""
        seconds, fitted = self.played.part.step_seconds, self.played.cost.step_ms_p50
        return fitted if fitted is not None or seconds is None else 1e3 * seconds

    def _priced(self, index: int, part: slice) -> tuple[Interval, Interval] | None:
        """What a setting gains in a part, and that less the pauses beyond today's: ms per step."""
        played = self.played
        saved = gain(played.cost, played.scores, played.rows[index], part)
        if isinstance(saved, str):
            return None
        # Rearrangements come at a rate: how many fall into a part depends on where it was cut.
        left = net(saved, played.pause, played.outcomes[index].moves, played.today.moves, self._engine_steps)
        return saved, left

    @property
    def _engine_steps(self) -> int:
        return self.played.last_step + 1 - self.played.first_step

    def _gain(self, index: int, part: slice) -> float:
        """Share of today's time saved in a part, minus the cost of moving weights beyond today's."""
        if self.in_ms:
            priced = self._priced(index, part)
            return -np.inf if priced is None or self.step_ms is None else priced[1].value / self.step_ms
        ratio = self._ratio(index, part)
        return (ratio.value or 0.0) - self._cost(index, part)

    def _ratio(self, index: int, part: slice) -> Ratio:
        scores = self.played.scores
        active = self.played.objective is Objective.ACTIVE
        maximum = scores.active_experts if active else scores.maximum
        today = maximum[TODAY, part]
        return Ratio(today - maximum[self.played.rows[index], part], today)

    def _cost(self, index: int, part: slice) -> float:
        """The cost of moving weights beyond today's, as a share of the part's time; 0 if no cost is given."""
        cost, seconds = self.played.cost_per_expert_ms, self._seconds(part)
        if cost is None or seconds is None:
            return 0.0
        return self._extra_weights(index, part) * cost / 1e3 / seconds

    def _seconds(self, part: slice) -> float | None:
        whole, columns = self.played.seconds, self.played.scores.step
        return None if whole is None else whole * len(columns[part]) / len(columns)

    def _extra_weights(self, index: int, part: slice) -> int:
        """How many more expert weights than today's the busiest ranks fetch."""
        outcomes = self.played.outcomes[index], self.played.today
        new, old = (sum(move.busiest_rank for move in self._moves(each, part)) for each in outcomes)
        return new - old

    def _moves(self, outcome: Outcome, part: slice) -> list[Move]:
        first = part == self.training
        return [move for move in outcome.moves if (move.step < self.split) == first]

    def _choose(self, gains: dict[int, float]) -> int:
        """The best of the training part; of equally good ones, the one with fewest slots, then moves."""
        best = max(gains.values())
        near = best - self.min_gain / 2
        if self.played.cost_per_expert_ms is None and not self.in_ms:
            near = min(near, GOOD_ENOUGH * best)
        outcomes = self.played.outcomes
        good = [i for i, gain in gains.items() if gain >= near]
        return min(good, key=lambda i: (outcomes[i].num_physical_experts, outcomes[i].weights_moved, i))

    def _break_even(self, index: int) -> float | None:
        saved, seconds = self._ratio(index, self.judging).value, self._seconds(self.judging)
        more = self._extra_weights(index, self.judging)
        if saved is None or saved <= 0 or seconds is None or more <= 0:
            return None
        return 1e3 * saved * seconds / more

    def _longest_pause(self, index: int, saved: Interval) -> float | None:
        """The pause of a rearrangement that uses up the gain."""
        pause, outcomes = self.played.pause, (self.played.outcomes[index], self.played.today)
        count = len if pause.basis == "given" else pause.units
        more = count(outcomes[0].moves) - count(outcomes[1].moves)
        if more <= 0 or saved.value <= bootstrap.ROUNDING:
            return None
        return saved.value * self._engine_steps / more

    def _interval(self, index: int) -> tuple[Interval, float] | None:
        """The gain in the judged part, and its standard error.

        Resampled as one series, because both settings saw the same steps.
        """
        if self.in_ms:
            priced = self._priced(index, self.judging)
            if priced is None or self.step_ms is None:
                return None
            share = combined([(1 / self.step_ms, priced[1])])
            assert share is not None
            return share, max(share.value - share.low, share.high - share.value) / 1.96
        ratio, cost = self._ratio(index, self.judging), self._cost(index, self.judging)
        some = ratio.denominator > 0
        ratio = Ratio(ratio.numerator[some], ratio.denominator[some])
        if ratio.value is None or len(ratio.numerator) < MIN_STEPS:
            return None
        drawn = bootstrap.resample(ratio, np.random.default_rng(bootstrap.SEED))
        return Interval.of(ratio.value - cost, drawn - cost), float(drawn.std())

    def _judge(
        self, gain: Interval, sure: bool, best: Setting | None, gain_of_work: float
    ) -> tuple[Verdict, str]:
        """``sure``: the gain is above 0 beyond doubt; ``gain_of_work``: without pauses, if in ms."""
        cost = self.played.cost
        what = BASES[self.played.objective]
        if not sure and not (gain.is_significant and gain.value < 0):
            if self.in_ms and cost.status is not CostStatus.MEASURED:
                return "leave", cost.message
            if best is not None and best.policy == STATIC and gain.low > -self.min_gain:
                static = self._static(best)
                if gain.is_significant:
                    return "leave", f"{static} may save {gain.value:.1%} of the time, but that is not certain"
                as_good = f"{static} would be as good in the judged steps"
                return "leave", f"no other setting has a measurable gain; {as_good}"
            if gain.is_significant:
                return "leave", f"the gain of the best other setting is not certain {what}"
            return "leave", f"the best other setting has no measurable gain {what}"
        if gain.value < 0:
            if self.in_ms:
                if gain_of_work <= 0:
                    return "leave", "no other setting saves the slowest ranks any time"
                assumed = self.played.pause.basis == "assumed"
                pauses = f", at {ASSUMED_PAUSE_MS / 1e3:g} s each (none was measured)" if assumed else ""
                return "leave", f"no other setting gains more than its rearrangements cost in pauses{pauses}"
            return "leave", "what was best in the first part is worse than today's in the rest"
        if gain.value < self.min_gain:
            return "leave", f"the best other setting gains less than {self.min_gain:.1%} (--min-gain)"
        recorded = self.played.recorded
        acts = recorded.interval is not None and recorded.enabled is not False
        if best is not None and best.policy == STATIC:
            if best.num_redundant_experts == recorded.num_redundant_experts:
                return "retune", "rearrangements cost more than they gain"
            return "retune", f"{self._static(best)} would have a significant gain {what}"
        if self.played.today.moves or acts or (best is not None and best.policy in FIXED):
            return "retune", f"another setting has a significant gain {what}"
        return (
            "enable",
            f"the experts were never rearranged, and rearranging them has a significant gain {what}",
        )

    def _static(self, setting: Setting) -> str:
        """A setting that never rearranges, beside today's, in words."""
        recorded, number = self.played.recorded, setting.num_redundant_experts
        parts = []
        if number != recorded.num_redundant_experts:
            parts.append(f"{plural(number, 'redundant expert')} instead of {recorded.num_redundant_experts}")
        if self.played.today.moves:
            parts.append("no rearrangements at all")
        return " and ".join(parts)

    def _verdict(
        self,
        verdict: Verdict,
        reasons: list[str],
        best: int | None = None,
        gain: Interval | None = None,
        training_gain: float | None = None,
    ) -> Advice:
        played, scores = self.played, self.played.scores
        scored: list[ScoredSteps | None] = [None, None]
        if self.split <= played.last_step:
            # Estimated from columns, which hold several steps in a long run.
            first = round(played.scored * self.training.stop / len(scores.step))
            scored = [
                ScoredSteps(played.first_step, self.split - 1, first),
                ScoredSteps(self.split, played.last_step, played.scored - first),
            ]
        if self.fault is not None:
            verdict = "fix"
        changes = self._changes()
        if self.fault is not None:
            working = None if changes is None else self._working(changes)
            reasons = [self.fault, *(reasons if working is None else [working])]
        setting = None if best is None or verdict not in CHANGES else played.outcomes[best].setting
        priced = None if best is None else self._priced(best, self.judging)
        return Advice(
            played.run_id,
            played.model,
            verdict,
            reasons,
            fault=self.fault,
            best=None if best is None else self._judged(played.outcomes[best], played.rows[best]),
            today=self._judged(played.today, TODAY),
            gain=gain,
            gain_ms_per_step=None if priced is None else Milliseconds.of(priced[0]),
            net_ms_per_step=None if priced is None else Milliseconds.of(priced[1]),
            break_even_pause_ms=None
            if best is None or priced is None
            else self._longest_pause(best, priced[0]),
            training_gain=training_gain,
            changes=changes,
            break_even_ms=None if best is None else self._break_even(best),
            engine_arguments=None if setting is None else self._arguments(setting),
            trained=scored[0],
            judged=scored[1],
            min_gain=self.min_gain,
            step_ms_p50=self.step_ms,
            replay=played,
            notes=[*played.notes, *(self._warnings(gain) if verdict in CHANGES else [])],
        )

    def _working(self, changes: Changes) -> str | None:
        """What an EPLB that never acted would have saved, apart from its pauses; None if not known."""
        row = next((row for row in changes.rows if row.part == "none"), None)
        if row is None or not changes.base_is_today or self.played.today.moves:
            return None
        work, left, pause = row.work_ms_per_step, row.net_ms_per_step, self.played.pause
        if work is None or left is None:
            return None
        amount = milliseconds(work.estimate, work.low, work.high)
        if work.low <= 0 <= work.high:
            _, _, bounds = milliseconds(work.estimate, work.low, work.high, sign=True).partition(" ")
            saved = f"about 0 {bounds} of work per step here"
        elif work.high < 0:
            saved = f"no work here ({milliseconds(work.estimate, work.low, work.high, sign=True)} per step)"
        else:
            saved = f"{amount} of work per step here"
        text = f"a working EPLB would have saved {saved}"
        pauses = milliseconds(left.estimate - work.estimate, sign=True)
        if pause.basis != "assumed":
            return f"{text}; its pauses would have cost {pauses.removeprefix('−')} per step"
        return (
            f"{text}; its pauses are not known (assumed {pause.ms.value:.0f} ms each: {pauses} per step). "
            "Measure a pause (let EPLB act in a test run; `eplb-analyze rearrangements` prints its pauses) "
            "before you turn it on"
        )

    def _arguments(self, setting: Setting) -> str | None:
        """How to start the engine; None for a recorded placement that no engine starts with."""
        same = setting.num_redundant_experts == self.played.recorded.num_redundant_experts
        return None if setting.policy == STATIC and same else engine_arguments(self.engine, setting)

    def _changes(self) -> Changes | None:
        """None if a replay of the recorded setting contradicts the recording, or too few steps are left."""
        test = self.played.self_test
        if self._missing() or (test is not None and test.doubt is not None and not self.fault):
            return None
        return one_at_a_time(self.played, self.judging, self.step_ms, self.min_gain, self.expert_mb)

    def _judged(self, outcome: Outcome, row: int) -> Judged:
        scores = self.played.scores
        moves = self._moves(outcome, self.judging)
        return Judged(
            outcome.setting,
            scores.balancedness_of(row, self.judging),
            scores.idle_fraction_of(row, self.judging),
            len(moves),
            sum(move.weights for move in moves),
            scores.active_experts_of(row, self.judging),
        )

    def _warnings(self, gain: Interval | None) -> list[str]:
        """Why an engine may not show the gain."""
        measured, even = self.played.measured_idle_fraction, self.played.today.idle_fraction
        name = self.played.recorded.dispatch
        if gain is None or measured is None or even is None or measured - even <= max(0.0, gain.value):
            return []
        return [
            f"replicas did not share their tokens evenly: {100 * (measured - even):.1f} points of the idle "
            "fraction come from that, more than the gain, which assumes that "
            + ("each token goes to any replica" if name in (MEASURED, "random") else f"they do as in {name}")
        ]
