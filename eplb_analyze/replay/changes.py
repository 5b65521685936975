"""What each change of one part of a setting gains over today: redundancy, interval, window, policy and so on.

The rest stays as in a base setting: today's, or, if that is not known, the one tried that is closest to it.
Every gain, and the word for it, is over what was recorded: today's placements and pauses, in the judged part
of the run alone. If the base is not what was recorded, the change beside the base is another figure, with its
own word: replicas cannot take the credit for rearranging. No row is chosen by its gain, so none needs a
training part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.prices import combined
from eplb_analyze.policies.policy import ORACLE
from eplb_analyze.reader.recorded_setting import CONDITIONS, NO_CONDITIONS, Setting
from eplb_analyze.replay.pricing import Objective, effort, gain, net
from eplb_analyze.replay.replay import Outcome, Replay
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.settings import FIXED, STATIC, usual_interval
from eplb_analyze.text import reaches_0
from eplb_dump.format.frozen import frozen

#: A gain beyond doubt is larger than so many standard errors (by chance in 1 of 2,000 cases).
SURE = 3.3

#: ``none``: the base itself, if it is not what was recorded.
Part = Literal["none", "redundant experts", "interval", "window", "policy", "condition", "dispatch"]
#: ``likely``: not beyond doubt, as so many rows are tested; ``small``: below the least gain; ``no effect``:
#: the interval includes 0, and neither the least gain nor a loss of it; ``unclear``: 0 and one of them.
Result = Literal[
    "gain",
    "likely gain",
    "small gain",
    "no effect",
    "unclear",
    "small loss",
    "likely loss",
    "loss",
    "unknown",
]


@frozen
class Change:
    """A setting that differs from the base in at most one part.

    Attributes:
        gain: the share of today's time that it saves; None if not known.
        net_ms_per_step: the same in ms, less the pauses of rearrangements beyond today's; None unless the
            run's step times show it.
        work_ms_per_step: the same without pauses.
        result: the word for ``gain``; it never contradicts the sign of the interval.
        by_assumed_pause: pauses whose length is assumed, as none was measured, are most of the net gain or
            decide the result.
        alone: the share of the base's time that the change saves; of today's if the base is what was
            recorded, or if the row is the base or never rearranges.
        alone_result: the word for ``alone``.
        experts_per_gpu: expert weights that each GPU holds more than today, over all layers.
        gb_per_gpu: their size; None if the size of an expert is not known.
    """

    #: The part of the base that is changed.
    part: Part
    setting: Setting
    gain: Interval | None
    net_ms_per_step: Milliseconds | None
    work_ms_per_step: Milliseconds | None
    result: Result
    by_assumed_pause: bool
    alone: Interval | None
    alone_result: Result
    experts_per_gpu: int
    gb_per_gpu: float | None


@frozen
class Changes:
    """``basis``: what time is assumed to be; by ``tokens`` and ``active`` a step gains less than that."""

    #: The setting that each row changes in one part; gains are over what was recorded, whatever this is.
    base: Setting
    #: Whether the recorded placements are those of this setting.
    base_is_today: bool
    basis: Objective
    #: One changed part each.
    rows: list[Change]

    @property
    def from_another(self) -> bool:
        """Whether ``alone`` of the rows that rearrange is over the base and not over what was recorded."""
        return any(row.part == "none" for row in self.rows)


def one_at_a_time(
    played: Replay, judging: slice, step_ms: float | None, min_gain: float, expert_mb: float | None
) -> Changes | None:
    """The changes among the settings tried, or None if there is none.

    Args:
        judging: the columns of the scores to take gains in.
        step_ms: the mean time of a step.
    """
    own, today = played.recorded.setting(), played.today
    base = _base(played, own)
    if base is None:
        return None
    basis = played.objective
    if basis is Objective.MS and (
        step_ms is None or isinstance(gain(played.cost, played.scores, TODAY, judging), str)
    ):
        basis = Objective.TOKENS
    parts = [None if o.setting is None else _part(base, own, o, today) for o in played.outcomes]
    based_on = parts.index("none") if "none" in parts else None
    rows = []
    for index, (outcome, part) in enumerate(zip(played.outcomes, parts, strict=True)):
        if part is None or outcome.setting is None:
            continue
        saved, net_ms, work = _gain(played, index, None, judging, basis, step_ms)
        alone = saved
        if part != "none" and based_on is not None and outcome.setting.policy != STATIC:
            alone, _, _ = _gain(played, index, based_on, judging, basis, step_ms)
        result, assumed = result_of(saved, min_gain), False
        if (
            work is not None
            and net_ms is not None
            and step_ms is not None
            and played.pause.basis == "assumed"
        ):
            mostly = abs(net_ms.estimate - work.value) > abs(work.value)
            assumed = mostly or result != result_of(combined([(1 / step_ms, work)]), min_gain)
        experts = outcome.experts_per_gpu - today.experts_per_gpu
        size = None if expert_mb is None else experts * expert_mb / 1e3
        rows.append(
            Change(
                part, outcome.setting, saved, net_ms, None if work is None else Milliseconds.of(work),
                result, assumed, alone, result_of(alone, min_gain), experts, size,
            )
        )  # fmt: skip
    rows.sort(key=_order)
    return Changes(base, base == own, basis, rows)


def _base(played: Replay, own: Setting | None) -> Setting | None:
    """Today's setting; if it is not known or was not tried, the closest one that rearranges."""
    today = played.recorded
    tried = [outcome.setting for outcome in played.outcomes]
    if own is not None and own in tried:
        return own
    usual = usual_interval(today, played.last_step + 1 - played.first_step)
    found: list[tuple[tuple[float, ...], Setting]] = []
    for setting, outcome in zip(tried, played.outcomes, strict=True):
        if setting is None or setting.ep_size != today.ep_size:
            continue
        if setting.interval is None or not outcome.moves:
            continue
        far = (
            abs(setting.num_redundant_experts - today.num_redundant_experts),
            abs(setting.interval - usual),
            abs((setting.window or 0) - (today.window or setting.interval)),
        )
        other = setting.policy != (today.policy or "deepseek"), setting.conditions != NO_CONDITIONS
        found.append(((*map(float, other), *map(float, far)), setting))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _part(base: Setting, own: Setting | None, outcome: Outcome, today: Outcome) -> Part | None:
    """The only part in which a setting tried differs from the base, or from what was recorded."""
    setting = outcome.setting
    assert setting is not None
    if setting == base:
        # Worth a row if it does not do what was recorded: the engine never acted, or the recorded setting is
        # not known.
        return None if setting == own and bool(outcome.moves) == bool(today.moves) else "none"
    if setting.policy == STATIC and not today.moves and setting.ep_size == today.ep_size:
        same = outcome.num_physical_experts == today.num_physical_experts
        return None if same else "redundant experts"
    return part_changed(base, setting)


def part_changed(base: Setting, other: Setting) -> Part | None:
    """The only part in which two settings of one EP size differ; None if there is none, or several.

    A window as long as the interval follows it, and so does the start.
    """
    if base.ep_size != other.ep_size or other.policy == ORACLE:
        return None
    redundant = base.num_redundant_experts != other.num_redundant_experts
    if base.conditions != other.conditions and other.policy not in FIXED:
        return "condition" if replace(base, **_conditions(other)) == other else None
    if base.dispatch != other.dispatch:
        return "dispatch" if replace(base, dispatch=other.dispatch) == other else None
    if base.policy != other.policy:
        same_rhythm = (base.interval, base.window) == (other.interval, other.window)
        return "policy" if not redundant and (other.policy in FIXED or same_rhythm) else None
    interval, window = base.interval != other.interval, base.window != other.window
    if interval and window and base.window == base.interval and other.window == other.interval:
        window = False
    changed: list[Part] = []
    changed += ["redundant experts"] if redundant else []
    changed += ["interval"] if interval else []
    changed += ["window"] if window else []
    return changed[0] if len(changed) == 1 else None


def _conditions(setting: Setting) -> dict[str, Any]:
    return {name: getattr(setting, name) for name in CONDITIONS}


def _order(change: Change) -> tuple[int, str, int]:
    setting = change.setting
    parts: tuple[Part, ...] = get_args(Part)
    number = {
        "redundant experts": setting.num_redundant_experts,
        "interval": setting.interval,
        "window": setting.window,
    }.get(change.part)
    return parts.index(change.part), setting.policy, number or 0


def _gain(
    played: Replay, index: int, base: int | None, part: slice, basis: Objective, step_ms: float | None
) -> tuple[Interval | None, Milliseconds | None, Interval | None]:
    """The share of the base's time that a setting saves; if in ms, also per step, with and without pauses.

    ``base``: the index of its outcome; None: what was recorded.
    """
    scores, row = played.scores, played.rows[index]
    reference, old = (TODAY, played.today) if base is None else (played.rows[base], played.outcomes[base])
    if basis is Objective.MS and step_ms is not None:
        saved = gain(played.cost, scores, row, part, reference)
        if isinstance(saved, str):
            return None, None, None
        steps = played.last_step + 1 - played.first_step
        left = net(saved, played.pause, played.outcomes[index].moves, old.moves, steps)
        return combined([(1 / step_ms, left)]), Milliseconds.of(left), saved
    own = effort(scores, basis, played.cross_node_weight)
    return bootstrap.share_saved(own[reference, part], own[row, part]), None, None


def result_of(saved: Interval | None, min_gain: float) -> Result:
    """The word for a share of time saved.

    Args:
        min_gain: the least share that is worth a change.
    """
    if saved is None:
        return "unknown"
    if not saved.is_significant or reaches_0(saved.low, saved.high):
        return "no effect" if max(-saved.low, saved.high) <= min_gain else "unclear"
    positive = saved.low > 0
    if abs(saved.value) < min_gain and max(abs(saved.low), abs(saved.high)) <= 2 * min_gain:
        return "small gain" if positive else "small loss"
    if abs(saved.value) < max(min_gain, SURE * saved.error):
        return "likely gain" if positive else "likely loss"
    return "gain" if positive else "loss"
