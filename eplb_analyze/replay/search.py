"""The settings that `advise` tries: each change of one part of today's, then of the best of these.

Only what the engine offers is tried: vLLM and SGLang have one policy each, and few conditions. Without an
engine's name, more is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from eplb_analyze.dispatch.named import MEASURED
from eplb_analyze.reader.recorded_setting import Recorded, Setting, first_rearrangement
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.replay import Outcome, Replay
from eplb_analyze.replay.settings import (
    FIXED,
    STATIC,
    nearest,
    setting_order,
    usual_interval,
    usual_intervals,
    usual_windows,
)
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import MAX_EXPERTS

#: Asynchronous engines change this many layers in a step; SGLang's chunks are a quarter of the layers.
LAYERS_PER_STEP, CHUNKS = 1, 4
#: Redundant experts beyond today's that are tried first, on each rank.
MORE = (1, 2)


@frozen
class Offer:
    """What an engine lets its operator choose, beside redundancy, interval and window."""

    #: Beside the one that it is recorded under.
    policies: tuple[str, ...] = ()
    #: If each token is sent to the ranks of its experts only; else there is no choice.
    dispatches: tuple[str, ...] = ()
    max_utilization: bool = False
    min_balancedness: bool = False
    #: It can change the layers of a rearrangement one after another, and does not do so yet.
    in_parts: bool = False


#: vLLM 0.33 (``EPLBConfig``) and SGLang 0.5.23 (``ServerArgs``).
OFFERS = {
    "vllm": Offer(in_parts=True),
    "sglang": Offer(dispatches=("sglang-static", "sglang-dynamic"), max_utilization=True, in_parts=True),
}
#: Of an engine that is not named.
ANY = Offer(policies=("swift_balance",), max_utilization=True, min_balancedness=True, in_parts=True)


def offer(run: Run) -> Offer:
    """What the run's engine lets its operator choose."""
    found, config = OFFERS.get(run.info.engine or "", ANY), run.sessions[0].info.engine_config
    if run.info.token_replication > 1:
        found = replace(found, dispatches=())
    eplb = config.get("eplb_config") if isinstance(config, dict) else None
    asynchronous = isinstance(eplb, dict) and eplb.get("use_async") is True
    return replace(found, in_parts=False) if asynchronous else found


class TwoRounds:
    """The search of `advise`, see :class:`eplb_analyze.replay.replay.Search`."""

    def __init__(
        self, run: Run, best: Callable[[Replay], Outcome | None], policies: Sequence[str] = ()
    ) -> None:
        """
        Args:
            best: of the settings that rearrange, in the steps to choose one on; None if none does.
            policies: to try in addition to those that the engine offers.
        """
        self._run, self._best, self._policies = run, best, policies

    def first(self, run: Run, today: Recorded, steps: int) -> list[Setting]:
        """Today's setting, or the one nearest to it that fits into the steps, and each change of one part."""
        base = _base(run, today, steps)
        interval = base.interval or 1
        intervals = usual_intervals(run.info.engine, today.interval, steps)
        if max(intervals) == interval and (longest := steps // 2 // interval) > 1:
            intervals = [*intervals, longest * interval]
        found = {base, *_around(run, today, base, intervals, steps, MORE), *self._others(base)}
        return sorted(found, key=setting_order)

    def refined(self, played: Replay, steps: int) -> list[Setting]:
        """More settings around the best one that rearranges, and conditions for it and for today's."""
        run, today, best = self._run, played.recorded, self._best(played)
        by_setting = {outcome.setting: outcome for outcome in played.outcomes}
        base = by_setting.get(_base(run, today, steps))
        found: set[Setting] = set()
        if best is not None and best.setting is not None and best.setting.interval is not None:
            interval = best.setting.interval
            intervals = [each for each in (interval // 2, interval * 2) if 1 < each <= steps // 2]
            found |= {*_around(run, today, best.setting, intervals, steps), *self._others(best.setting)}
            if today.dispatch == MEASURED:
                found |= {replace(best.setting, dispatch=name) for name in offer(run).dispatches}
        for outcome in {id(each): each for each in (best, base) if each is not None}.values():
            found |= {*_conditions(run, outcome, played.part.shape.num_moe_layers)}
        return sorted(found - by_setting.keys(), key=setting_order)

    def _others(self, base: Setting) -> Iterator[Setting]:
        return (replace(base, policy=policy) for policy in self._policies)


def _base(run: Run, today: Recorded, steps: int) -> Setting:
    """Today's setting; what is not known of it, or does not fit into the steps, is as usual."""
    engine = run.info.engine
    interval = nearest(usual_intervals(engine, today.interval, steps), usual_interval(today, steps))
    window = nearest(sorted(usual_windows(engine, interval, today.window, steps)), today.window or interval)
    redundant = max(-run.info.num_logical_experts % today.ep_size, today.num_redundant_experts)
    start = today.start if interval == today.interval else None
    return Setting(
        today.policy or "deepseek", redundant, today.ep_size, interval, window,
        first_rearrangement(engine, interval) if start is None else start, today.dispatch,
    )  # fmt: skip


def _around(
    run: Run, today: Recorded, base: Setting, intervals: Sequence[int], steps: int, more: Sequence[int] = (1,)
) -> Iterator[Setting]:
    """The settings that differ from a base in one part, and those that never rearrange.

    Args:
        more: redundant experts beyond today's, on each rank.
    """
    engine, experts, ranks = run.info.engine, run.info.num_logical_experts, base.ep_size
    assumed, least = base.interval or 1, -experts % ranks
    some = max(least, today.num_redundant_experts)
    for number in {least, some, *(some + each * ranks for each in more)}:
        if experts + number <= MAX_EXPERTS:
            yield replace(base, num_redundant_experts=number)
            yield Setting(STATIC, number, ranks, None, None, None, base.dispatch)
    for interval in intervals:
        # A window as long as the interval follows it; SGLang refuses a longer one.
        follows = base.window == assumed or (engine == "sglang" and (base.window or 0) > interval)
        window, start = interval if follows else base.window, first_rearrangement(engine, interval)
        yield replace(base, interval=interval, window=window, start=start)
    for window in usual_windows(engine, assumed, today.window, steps):
        yield replace(base, window=window)
    for policy in offer(run).policies:
        yield replace(base, policy=policy)


def _conditions(run: Run, outcome: Outcome, layers: int) -> Iterator[Setting]:
    """A setting that rearranges only when it is less balanced than it usually is, or in parts."""
    setting, offered = outcome.setting, offer(run)
    if setting is None or setting.policy in FIXED:
        return
    usual = None if outcome.balancedness is None else math.floor(100 * outcome.balancedness) / 100
    if usual and offered.max_utilization:
        yield replace(setting, max_utilization=usual)
    if usual and offered.min_balancedness:
        yield replace(setting, min_balancedness=usual)
    if offered.in_parts and layers > 1:
        size = -(-layers // CHUNKS) if run.info.engine == "sglang" else LAYERS_PER_STEP
        yield replace(setting, layers_per_step=size, delay=1)
