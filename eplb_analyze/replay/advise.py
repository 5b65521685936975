"""`advise`: whether to change the load balancer's setting, and to what, judged by the run's own loads.

A setting and its alternatives are chosen on the first part of the run and judged on the rest, which did not
influence the choice (:mod:`eplb_analyze.replay.judging`). What is tried: :mod:`eplb_analyze.replay.search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from eplb_analyze.analysis.cost import NO_TIMES
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.dispatch.named import LP, MEASURED
from eplb_analyze.errors import UsageError
from eplb_analyze.json_report import remembers_run
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.reader.recorded_setting import Recorded, Setting, not_due, recorded
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.advice import (
    CHANGES,
    MIN_GAIN,
    Advice,
    Judged,
    Price,
    ScoredSteps,
    Verdict,
)
from eplb_analyze.replay.changes import Changes, one_at_a_time
from eplb_analyze.replay.judging import Judging, Saved
from eplb_analyze.replay.pricing import ASSUMED_PAUSE_MS, Objective, gain
from eplb_analyze.replay.replay import Outcome, Replay, replay_run, traffic_of
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.search import TwoRounds
from eplb_analyze.replay.selftest import SelfTest
from eplb_analyze.replay.settings import FIXED, STATIC, Choices, engine_arguments
from eplb_analyze.replay.simulator import NotReplayableError
from eplb_analyze.text import listed, milliseconds, plural
from eplb_dump.format.journal import Shape

#: With fewer steps there is no verdict.
MIN_SCORED = 64
#: In a longer run, about so many of the steps are scored.
SCORED_STEPS = 4096

#: What a gain is, in the words of a reason.
BASES = {
    Objective.TOKENS: "by tokens",
    Objective.ACTIVE: "by active experts",
    Objective.TRAFFIC: "by tokens and traffic",
    Objective.MS: "net of pauses",
}


@remembers_run
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
    cross_node_weight: float | None = None,
    workers: int | None = None,
) -> Advice:
    """Advise whether another setting is better over a half-open range of steps (default: all).

    Args:
        choices: as :func:`~eplb_analyze.replay.replay.replay_run` takes it; so are arguments not listed here.
        min_gain: a smaller share of the time is not worth a change.
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

    def in_time(played: Replay) -> Replay:
        timed = played.part.step_seconds is not None or bool(played.cost.prices)
        return replace(played, objective=Objective.MS) if objective is None and timed else played

    search = TwoRounds(
        run,
        lambda played: Judging(in_time(played), min_gain).best_rearranging(),
        ["near_sources"] if objective is Objective.TRAFFIC else [],
    )
    try:
        played = replay_run(
            run, choices, steps, num_groups=num_groups, num_nodes=num_nodes, objective=objective,
            cost_per_expert_ms=cost_per_expert_ms, expert_mb=expert_mb,
            cross_node_weight=cross_node_weight, workers=workers, search=search, score_steps=SCORED_STEPS,
        )  # fmt: skip
    except NotReplayableError as missing:
        info = run.info
        setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
        fault = out_of_order(run, setting, None)
        reasons = [str(missing)] if fault is None else [fault, str(missing)]
        return Advice(
            *names, "not enough data" if fault is None else "fix", reasons, fault, min_gain=min_gain
        )
    fault = out_of_order(run, played.recorded, played.self_test)
    return Adviser(run, in_time(played), min_gain, fault, expert_mb).advice()


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


class Adviser:
    """Turns a replay into advice."""

    def __init__(
        self, run: Run, played: Replay, min_gain: float, fault: str | None, expert_mb: float | None
    ) -> None:
        """``fault``: what is wrong with the load balancer, which is said before anything else."""
        self.run, self.played, self.min_gain, self.fault = run, played, min_gain, fault
        self.expert_mb = expert_mb
        self.judging = Judging(played, min_gain)

    def advice(self) -> Advice:
        played, judging = self.played, self.judging
        missing = self._missing()
        if missing:
            return self._advice("not enough data", [missing])
        test = played.self_test
        if test is not None and test.doubt is not None and not self.fault:
            return self._advice("not enough data", [test.doubt])
        candidates = judging.candidates()
        untried = self._never_rearranges(candidates)
        if not candidates:
            return self._advice("not enough data", [untried or "no setting was tried but today's"])
        if judging.in_ms and (unknown := self._unknown_cost()) is not None:
            return self._advice("leave", [unknown])
        ranked = judging.ranked(candidates)
        best = judging.choose(ranked) if ranked else candidates[0]
        saved = judging.saved(best, judged=True)
        if saved is None:
            text = f"fewer than {MIN_STEPS} steps with tokens remain to judge a setting"
            return self._advice("not enough data", [text])
        others = judging.alternatives(ranked, best)
        verdict, reason = self._judge(best, saved)
        if untried is not None and verdict not in CHANGES:
            return self._advice("not enough data", [untried], best, others)
        return self._advice(verdict, [reason], best, others)

    def _missing(self) -> str | None:
        if self.played.scored < MIN_SCORED:
            count = plural(self.played.scored, "complete step")
            return f"{count} under a known placement, at least {MIN_SCORED} are needed"
        if not self.judging.has_tokens():
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
        steps = self.judging.split - self.played.first_step
        return (
            f"no setting tried rearranges in the first {plural(steps, 'step')}, on which one is chosen: a "
            "longer recording, or a shorter --interval-steps"
        )

    def _unknown_cost(self) -> str | None:
        """Why no setting can be judged in ms."""
        cost = self.played.cost
        why = price if isinstance(price := gain(cost, self.played.scores, TODAY), str) else None
        if why is None and self.judging.step_ms is None:
            why = NO_TIMES
        if why is None:
            return None
        return (
            f"the gain of a setting is not measurable in this run: {why}. --objective tokens shows the "
            f"gain if time were proportional to tokens"
        )

    def _judge(self, index: int, saved: Saved) -> tuple[Verdict, str]:
        """The verdict on the chosen setting, by what it saves in the judged part."""
        gain, best = saved.share, self.played.outcomes[index].setting
        assert best is not None
        sure = self.judging.is_certain(index)
        cost, in_ms = self.played.cost, self.judging.in_ms
        what = BASES[self.played.objective]
        if not sure and not (gain.is_significant and gain.value < 0):
            if in_ms and cost.status is not CostStatus.MEASURED:
                maybe = f"; {self._best_other(best)} may save time, but that is not certain"
                return "leave", cost.message + (maybe if gain.is_significant else "")
            if best.policy == STATIC and gain.low > -self.min_gain:
                static = self._static(best)
                if gain.is_significant:
                    return "leave", f"{static} may save {gain.value:.1%} of the time, but that is not certain"
                as_good = f"{static} would be as good in the judged steps"
                return "leave", f"no other setting has a measurable gain; {as_good}"
            if gain.is_significant:
                return "leave", f"the gain of the best other setting is not certain {what}"
            return "leave", f"the best other setting has no measurable gain {what}"
        if gain.value < 0:
            if in_ms:
                if saved.work is None or saved.work.value <= 0:
                    return "leave", "the best other setting does not make the slowest ranks faster"
                assumed = self.played.pause.basis == "assumed"
                pauses = f", at {ASSUMED_PAUSE_MS / 1e3:g} s each (none was measured)" if assumed else ""
                return "leave", f"no other setting gains more than its rearrangements cost in pauses{pauses}"
            return "leave", "what was best in the first part is worse than today's in the rest"
        if gain.value < self.min_gain:
            return "leave", f"the best other setting gains less than {self.min_gain:.1%} (--min-gain)"
        return self._change(best, saved)

    def _change(self, best: Setting, saved: Saved) -> tuple[Verdict, str]:
        recorded, what = self.played.recorded, BASES[self.played.objective]
        if self.judging.rhythm(best) < 0 and self.played.today.moves:
            if best.policy == STATIC and recorded.num_redundant_experts == best.num_redundant_experts:
                return "retune", "rearrangements cost more than they gain"
            if saved.work is not None and saved.net is not None and saved.net.value > 2 * saved.work.value:
                return "retune", "rearrangements cost more than they gain"
        if best.policy == STATIC:
            return "retune", f"{self._static(best)} would have a significant gain {what}"
        acts = recorded.interval is not None and recorded.enabled is not False
        if self.played.today.moves or acts or best.policy in FIXED:
            return "retune", f"another setting has a significant gain {what}"
        return (
            "enable",
            f"the experts were never rearranged, and rearranging them has a significant gain {what}",
        )

    def _best_other(self, best: Setting) -> str:
        fewer = self.judging.rhythm(best) < 0 and bool(self.played.today.moves)
        return "rearranging less often" if fewer else "the best other setting"

    def _static(self, setting: Setting) -> str:
        """A setting that never rearranges, beside today's, in words."""
        recorded, number = self.played.recorded, setting.num_redundant_experts
        parts = []
        if number != recorded.num_redundant_experts:
            parts.append(f"{plural(number, 'redundant expert')} instead of {recorded.num_redundant_experts}")
        if self.played.today.moves:
            parts.append("no rearrangements at all")
        return " and ".join(parts)

    def _advice(
        self,
        verdict: Verdict,
        reasons: list[str],
        best: int | None = None,
        others: Sequence[int] = (),
    ) -> Advice:
        played, judging = self.played, self.judging
        scored: list[ScoredSteps | None] = [None, None]
        if judging.split <= played.last_step:
            # Estimated from columns, which hold several steps in a long run.
            first = round(played.scored * judging.training.stop / len(played.scores.step))
            scored = [
                ScoredSteps(played.first_step, judging.split - 1, first),
                ScoredSteps(judging.split, played.last_step, played.scored - first),
            ]
        changes = self._changes()
        if self.fault is not None:
            verdict = "fix"
            working = None if changes is None else self._working(changes)
            reasons = [self.fault, *(reasons if working is None else [working])]
        saved = None if best is None else judging.saved(best, judged=True)
        trained = None if best is None else judging.saved(best, judged=False)
        work = None if saved is None else saved.work
        return Advice(
            played.run_id,
            played.model,
            verdict,
            reasons,
            fault=self.fault,
            best=None if best is None else self._judged(best),
            today=self._judged(None),
            alternatives=[self._judged(other, best) for other in others],
            comparison=None if best is None else self._comparison(verdict, best, others),
            least_interval=None if best is None or verdict not in CHANGES else self._least_interval(best),
            break_even_pause_ms=None
            if best is None or work is None
            else judging.longest_pause_ms(best, work),
            training_gain=None if trained is None else trained.share.value,
            changes=changes,
            break_even_ms=None if best is None else judging.break_even_ms(best),
            trained=scored[0],
            judged=scored[1],
            min_gain=self.min_gain,
            step_ms=judging.step_ms,
            replay=played,
            notes=[*played.notes, *(self._warnings(saved) if verdict in CHANGES else [])],
        )

    def _comparison(self, verdict: Verdict, best: int, others: Sequence[int]) -> str | None:
        """Which of the settings differ by more than chance explains, and which of those alike is cheapest."""
        judging = self.judging
        if verdict not in CHANGES:
            found = [judging.saved(index, judged=True) for index in (best, *others)]
            if any(each is None or each.share.low > bootstrap.ROUNDING for each in found):
                return None
            worse = sum(each is not None and each.share.high < -bootstrap.ROUNDING for each in found)
            if worse == len(found):
                return "The settings shown are worse than today's"
            some = "Some of the settings" if worse else "The settings"
            return f"{some} shown are statistically indistinguishable from today's, which needs no change"
        groups: dict[str, list[int]] = {"more": [], "alike": [], "less": []}
        for other in others:
            beside = judging.saved(best, judged=True, beside=other)
            if beside is None or not beside.share.is_significant:
                groups["alike"].append(other)
            else:
                groups["less" if beside.share.value > 0 else "more"].append(other)
        if not others:
            return None
        if len(groups["less"]) == len(others):
            return "Its lead over the alternatives is statistically significant"

        def named(found: Sequence[int]) -> str:
            numbers = [f"({others.index(other) + 1})" for other in found]
            return f"alternative{'s' if len(found) > 1 else ''} {listed(numbers)}"

        parts = []
        if more := groups["more"]:
            dearer = judging.cheapest([best, *more]) == best
            save = f"save{'' if len(more) > 1 else 's'} significantly more"
            parts.append(f"{named(more)} {save}{', at a higher price' if dearer else ''}")
        if alike := groups["alike"]:
            cheapest = judging.cheapest([best, *alike])
            cheaper = (
                "which is the cheapest" if cheapest == best else f"and {named([cheapest])} is the cheapest"
            )
            are = "are" if len(alike) > 1 else "is"
            parts.append(
                f"{named(alike)} {are} statistically indistinguishable from the advised setting, {cheaper}"
            )
        text = "; ".join(parts)
        return text[:1].upper() + text[1:]

    def _least_interval(self, index: int) -> int | None:
        """From which interval on measured pauses take less than the least gain; None if not less often."""
        setting, pause, step_ms = self.played.outcomes[index].setting, self.played.pause, self.judging.step_ms
        if setting is None or not self.judging.in_ms or pause.basis != "measured" or not step_ms:
            return None
        if self.judging.rhythm(setting) >= 0 or not self.min_gain:
            return None
        steps = pause.ms.value / (self.min_gain * step_ms)
        unit = 10.0 ** max(0, math.floor(math.log10(max(steps, 1))) - 1)
        return int(unit * math.ceil(steps / unit))

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

    def _changes(self) -> Changes | None:
        """None if a replay of the recorded setting contradicts the recording, or too few steps are left."""
        test, judging = self.played.self_test, self.judging
        if self._missing() or (test is not None and test.doubt is not None and not self.fault):
            return None
        return one_at_a_time(self.played, judging.judging, judging.step_ms, self.min_gain, self.expert_mb)

    def _judged(self, index: int | None, best: int | None = None) -> Judged:
        """An outcome, or today's placements, in the judged part.

        Args:
            best: the chosen setting, if this is an alternative to it.
        """
        played, judging, scores = self.played, self.judging, self.played.scores
        outcome = played.today if index is None else played.outcomes[index]
        row = TODAY if index is None else played.rows[index]
        moves = judging.moves(outcome, judged=True)
        saved = None if index is None else judging.saved(index, judged=True)
        beside = None if best is None else judging.saved(best, judged=True, beside=index)
        return Judged(
            outcome.setting,
            scores.balancedness_of(row, judging.judging),
            scores.idle_fraction_of(row, judging.judging),
            len(moves),
            sum(move.weights for move in moves),
            scores.active_experts_of(row, judging.judging),
            self._price(outcome),
            gain=None if saved is None else saved.share,
            net_ms_per_step=None if saved is None or saved.net is None else Milliseconds.of(saved.net),
            gain_ms_per_step=None if saved is None or saved.work is None else Milliseconds.of(saved.work),
            best_saves=None if beside is None else beside.share,
            traffic=traffic_of(scores, row, judging.judging),
            links=played.links(row),
            engine_arguments=None if outcome.setting is None else self._arguments(outcome.setting),
        )

    def _arguments(self, setting: Setting) -> str | None:
        """How to start the engine; None for a recorded placement that no engine starts with."""
        same = setting.num_redundant_experts == self.played.recorded.num_redundant_experts
        if setting.policy == STATIC and same:
            return None
        return engine_arguments(self.run.info.engine, setting, self.run.engine_config)

    def _price(self, outcome: Outcome) -> Price:
        played, shape = self.played, self.played.part.shape
        rate = 1000 / self.judging.engine_steps
        seconds = played.pause.seconds(outcome.moves)
        usual = shape.num_moe_layers * self.run.info.num_logical_experts / outcome.ep_size
        redundant = max(0.0, outcome.experts_per_gpu - usual)
        size = None if self.expert_mb is None else self.expert_mb / 1e3
        return Price(
            len(outcome.moves) * rate,
            None if seconds is None else 1e3 * seconds * rate,
            outcome.weights_moved * rate,
            None if size is None else outcome.weights_moved * rate * size,
            redundant,
            None if size is None else redundant * size,
        )

    def _warnings(self, saved: Saved | None) -> list[str]:
        """Why an engine may not show the gain."""
        measured, even = self.played.measured_idle_fraction, self.played.today.idle_fraction
        name = self.played.recorded.dispatch
        gain = None if saved is None else saved.share.value
        if gain is None or measured is None or even is None or measured - even <= max(0.0, gain):
            return []
        return [
            f"replicas did not share their tokens evenly: {100 * (measured - even):.1f} points of the idle "
            "fraction come from that, more than the gain, which assumes that "
            + ("each token goes to any replica" if name in (MEASURED, "random") else f"they do as in {name}")
        ]
