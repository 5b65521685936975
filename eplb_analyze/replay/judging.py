"""A replay split in two: a setting is chosen on the first part of the run and judged on the rest.

The settings that differ in more than a number come as alternatives, the best of the first part first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval
from eplb_analyze.metrics.prices import combined
from eplb_analyze.policies.policy import ORACLE
from eplb_analyze.reader.recorded_setting import NO_CONDITIONS, Setting
from eplb_analyze.replay.changes import SURE
from eplb_analyze.replay.pricing import Objective, gain, mean_step_ms, net
from eplb_analyze.replay.replay import Outcome, Replay
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.setting_run import Move
from eplb_analyze.replay.settings import FIXED, STATIC, usual_interval
from eplb_dump.format.frozen import frozen

#: The share of the steps on which a setting is chosen.
TRAINING = 0.6
#: If the cost of moving is not known, settings with this share of the best gain count as equally good.
GOOD_ENOUGH = 0.8
#: The conditions under which a setting rearranges or moves less, and is another kind of setting.
LIMITS = ("max_utilization", "min_balancedness", "max_moves")
#: So many alternatives are shown.
ALTERNATIVES = 2


@frozen
class Saved:
    """What a setting saves beside another one, or today's placements, in a part of the run."""

    #: The share of the time, less pauses or the cost of moving if these are known.
    share: Interval
    #: ms per step, without and with pauses; None if not by the run's step times.
    work: Interval | None = None
    net: Interval | None = None

    @property
    def least(self) -> float:
        """What to rank it by: by time the low end, as the prices of work and pauses are uncertain.

        By tokens the steps alone are, which all settings share.
        """
        return self.share.value if self.net is None else self.share.low


class Judging:
    """Attributes:
    training, judging: the columns of the scores for choosing and for judging.
    split: the first step that is judged.
    step_ms: the mean time of a judged step, by what the cost was fitted to: both are of the same times.
    """

    def __init__(self, played: Replay, min_gain: float) -> None:
        self.played, self.min_gain = played, min_gain
        columns = len(played.scores.step)
        cut = int(TRAINING * columns)
        self.training, self.judging = slice(0, cut), slice(cut, columns)
        self.split = int(played.scores.step[cut]) if cut < columns else played.last_step + 1
        self.step_ms = self._step_ms(self.judging)
        self._saved: dict[tuple[int, bool, int | None], Saved | None] = {}

    @property
    def in_ms(self) -> bool:
        return self.played.objective is Objective.MS

    @property
    def engine_steps(self) -> int:
        return self.played.last_step + 1 - self.played.first_step

    def _step_ms(self, part: slice) -> float | None:
        """The mean time of a step of a part; if it is not known, the median of the run."""
        cost, seconds = self.played.cost, self.played.part.step_seconds
        mean = mean_step_ms(cost, self.played.scores, part)
        fitted = cost.step_ms_p50 if mean is None else mean
        return fitted if fitted is not None or seconds is None else 1e3 * seconds

    def has_tokens(self) -> bool:
        """Whether both parts have enough steps with tokens."""
        active = self.played.scores.maximum[TODAY] > 0
        return all(active[part].sum() >= MIN_STEPS for part in (self.training, self.judging))

    def candidates(self) -> list[int]:
        """The outcomes whose setting differs from today's, and acts in the training part."""
        return [i for i in range(len(self.played.outcomes)) if self._is_candidate(i)]

    def _is_candidate(self, index: int) -> bool:
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

    def saved(self, index: int, *, judged: bool, beside: int | None = None) -> Saved | None:
        """What an outcome saves in a part, beside another outcome (default: today's placements).

        Resampled as one series, because both settings saw the same steps. Rearrangements come at a rate: how
        many fall into a part depends on where it was cut, so pauses count at the rate of the whole run.

        Returns:
            None if it is not measurable, or if there are too few steps with tokens.
        """
        key = index, judged, beside
        if key not in self._saved:
            self._saved[key] = self._compare(index, self.judging if judged else self.training, beside)
        return self._saved[key]

    def _compare(self, index: int, part: slice, beside: int | None) -> Saved | None:
        played, row = self.played, self.played.rows[index]
        other, reference = (
            (played.today, TODAY) if beside is None else (played.outcomes[beside], played.rows[beside])
        )
        if self.in_ms:
            work = gain(played.cost, played.scores, row, part, reference)
            step_ms = self._step_ms(part)
            if isinstance(work, str) or step_ms is None:
                return None
            left = net(work, played.pause, played.outcomes[index].moves, other.moves, self.engine_steps)
            share = combined([(1 / step_ms, left)])
            assert share is not None
            return Saved(share, work, left)
        before, after = played.effort[reference, part], played.effort[row, part]
        cost = self._cost(played.outcomes[index], other, part)
        saved = bootstrap.share_saved(before, after, cost)
        return None if saved is None else Saved(saved)

    def _cost(self, outcome: Outcome, other: Outcome, part: slice) -> float:
        """The cost of moving more weights than another, as a share of the part's time; 0 if none is given."""
        cost, seconds = self.played.cost_per_expert_ms, self._seconds(part)
        if cost is None or seconds is None:
            return 0.0
        return self._extra_weights(outcome, other, part) * cost / 1e3 / seconds

    def _seconds(self, part: slice) -> float | None:
        whole, columns = self.played.seconds, self.played.scores.step
        return None if whole is None else whole * len(columns[part]) / len(columns)

    def _extra_weights(self, outcome: Outcome, other: Outcome, part: slice) -> int:
        """How many more expert weights than another the busiest ranks fetch."""
        new, old = (
            sum(move.busiest_rank for move in self.moves(each, judged=part == self.judging))
            for each in (outcome, other)
        )
        return new - old

    def moves(self, outcome: Outcome, *, judged: bool) -> list[Move]:
        """The rearrangements of a part."""
        return [move for move in outcome.moves if (move.step >= self.split) == judged]

    # ---- choosing

    def ranked(self, candidates: Iterable[int]) -> list[int]:
        """By the least that they save in the training part, the most first."""
        found = {i: saved for i in candidates if (saved := self.saved(i, judged=False)) is not None}
        return sorted(found, key=lambda i: (-found[i].least, i))

    def choose(self, ranked: Sequence[int]) -> int:
        """The cheapest of those that are about as good as the first."""
        lows = {i: saved.least for i in ranked if (saved := self.saved(i, judged=False)) is not None}
        best = lows[ranked[0]]
        near = best - self.min_gain / 2
        if self.played.cost_per_expert_ms is None and not self.in_ms:
            near = min(near, GOOD_ENOUGH * best)
        good = [i for i in ranked if lows[i] >= near]
        sure = [i for i in good if self.in_ms and _is_sure(self.saved(i, judged=False))]
        return self.cheapest(sure or good)

    def is_certain(self, index: int) -> bool:
        """Whether the judged part excludes by far that chance explains the gain, and the other shows it, too.

        Of 7,562 runs of uniform routing, the judged part alone was sure in 8; both together, as they are
        independent, are in 1 of 10,000.
        """
        chosen, judged = (self.saved(index, judged=part) for part in (False, True))
        return chosen is not None and chosen.share.low > bootstrap.ROUNDING and _is_sure(judged)

    def cheapest(self, indices: Iterable[int]) -> int:
        """The one with the fewest slots, then moves, then rearrangements, then conditions."""

        def price(index: int) -> tuple[int, int, int, int, int]:
            outcome = self.played.outcomes[index]
            setting = outcome.setting
            options = 0 if setting is None else _differing(setting.conditions, NO_CONDITIONS)
            return outcome.num_physical_experts, outcome.weights_moved, len(outcome.moves), options, index

        return min(indices, key=price)

    def alternatives(self, ranked: Sequence[int], chosen: int) -> list[int]:
        """The best settings of other kinds than the chosen one; of a kind the cheapest of the best."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for index in ranked:
            kinds.setdefault(self._kind(index), []).append(index)
        del kinds[self._kind(chosen)]
        return [self.choose(kind) for kind in [*kinds.values()][:ALTERNATIVES]]

    def _kind(self, index: int) -> tuple[object, ...]:
        """In what a setting differs from today's, but for how much and the window.

        If experts are never rearranged, more of them are no other kind.
        """
        setting, today = self.played.outcomes[index].setting, self.played.recorded
        assert setting is not None
        more = int(np.sign(setting.num_redundant_experts - today.num_redundant_experts))
        if setting.policy in FIXED:
            return min(0, more), setting.policy
        limited = any(getattr(setting, name) is not None for name in LIMITS)
        return more, self.rhythm(setting), setting.policy, setting.dispatch, limited

    def rhythm(self, setting: Setting) -> int:
        """Whether a setting rearranges less often than today's (-1), as often or more often."""
        today = self.played.recorded
        if setting.interval is None:
            return -1 if self.played.today.moves else 0
        usual = today.interval if self.played.today.moves else None
        return int(np.sign((usual or usual_interval(today, self.engine_steps)) - setting.interval))

    def best_rearranging(self) -> Outcome | None:
        """The best setting of the training part that rearranges; None if none does, or gains are unknown."""
        some = [i for i in self.candidates() if self.played.outcomes[i].moves]
        ranked = self.ranked(some)
        return self.played.outcomes[ranked[0]] if ranked else None

    # ---- what uses the gain up

    def break_even_ms(self, index: int) -> float | None:
        """The time to fetch one expert of one layer that uses up the gain in the judged part."""
        effort, row = self.played.effort, self.played.rows[index]
        today, other = (float(effort[each, self.judging].sum()) for each in (TODAY, row))
        seconds = self._seconds(self.judging)
        more = self._extra_weights(self.played.outcomes[index], self.played.today, self.judging)
        if other >= today or seconds is None or more <= 0:
            return None
        return 1e3 * (1 - other / today) * seconds / more

    def longest_pause_ms(self, index: int, work: Interval) -> float | None:
        """The pause of a rearrangement that uses up the gain."""
        pause, outcomes = self.played.pause, (self.played.outcomes[index], self.played.today)
        count = len if pause.basis == "given" else pause.units
        more = count(outcomes[0].moves) - count(outcomes[1].moves)
        if more <= 0 or work.value <= bootstrap.ROUNDING:
            return None
        return work.value * self.engine_steps / more


def _is_sure(saved: Saved | None) -> bool:
    return saved is not None and saved.share.value > SURE * saved.share.error


def _differing(one: Sequence[object], other: Sequence[object]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
