"""Settings of a load balancer to try, and how an engine is told to use one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from eplb_analyze.errors import UsageError
from eplb_analyze.policies.policy import ORACLE
from eplb_analyze.reader.recorded_setting import (
    CONDITIONS,
    NO_CONDITIONS,
    Recorded,
    Setting,
    first_rearrangement,
)
from eplb_analyze.reader.run import Run
from eplb_analyze.text import plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import MAX_EXPERTS

#: The policy that keeps the placement in force.
STATIC = "static"
#: The policies that never rearrange: they have no interval, window or start.
FIXED = (STATIC, "round_robin", ORACLE)
#: If the engine's interval is not known, the usual interval is the run divided by this.
PARTS = 16
#: The least interval of the grid: moving weights is not free, and no engine rearranges more often by default.
LEAST_INTERVAL = 16


#: An interval that no engine reaches.
_NEVER = 10**12


def engine_arguments(
    engine: str | None, setting: Setting, recorded: Mapping[str, Any] | None = None
) -> str | None:
    """The arguments that start the engine with a setting; None if it has no such setting or is not known.

    Of the settings that never rearrange, only the placement without EPLB, one slot for each expert, has any.

    The names are those of vLLM 0.33 (``EPLBConfig``) and SGLang 0.5.23 (``ServerArgs``).

    Args:
        recorded: the engine's configuration by dotted names. A synchronous vLLM stays synchronous, which is
            not its default.
    """
    asynchronous = (recorded or {}).get("eplb_config.use_async")
    also_vllm = {"use_async": False} if asynchronous is False else {}
    if engine == "vllm" and setting.policy == "vllm" and setting.conditions == NO_CONDITIONS:
        config = {
            "num_redundant_experts": setting.num_redundant_experts,
            "step_interval": setting.interval,
            "window_size": setting.window,
            **also_vllm,
        }
        return f"--enable-eplb --eplb-config '{json.dumps(config)}'"
    if engine == "vllm" and setting.policy == STATIC and not setting.num_redundant_experts:
        # Not --no-enable-eplb: without EPLB, vLLM counts no tokens, and refuses redundant experts.
        never = {"num_redundant_experts": 0, "step_interval": _NEVER, **also_vllm}
        return f"--enable-eplb --eplb-config '{json.dumps(never)}'"
    without = replace(setting, max_utilization=None, layers_per_step=None).conditions
    if engine == "sglang" and setting.policy == "sglang" and without == NO_CONDITIONS:
        also = ""
        if setting.max_utilization is not None:
            also += f" --eplb-min-rebalancing-utilization-threshold {setting.max_utilization:g}"
        if setting.layers_per_step is not None:
            also += f" --eplb-rebalance-layers-per-chunk {setting.layers_per_step}"
        if setting.dispatch.startswith("sglang-"):
            also += f" --ep-dispatch-algorithm {setting.dispatch.removeprefix('sglang-')}"
        return (
            f"--enable-eplb --ep-num-redundant-experts {setting.num_redundant_experts} "
            f"--eplb-rebalance-num-iterations {setting.interval} "
            f"--expert-distribution-recorder-buffer-size {setting.window}{also}"
        )
    return None


@frozen
class Choices:
    """The values to try for each part of a setting, in all combinations; None: those that suit the run."""

    policies: Sequence[str] | None = None
    redundant: Sequence[int] | None = None
    intervals: Sequence[int] | None = None
    windows: Sequence[int] | None = None
    ep_sizes: Sequence[int] | None = None
    starts: Sequence[int] | None = None
    #: Names of :data:`eplb_analyze.dispatch.named.NAMES`.
    dispatches: Sequence[str] | None = None
    #: Conditions under which settings rearrange: see :class:`Setting`.
    max_utilizations: Sequence[float | None] = (None,)
    min_balancedness: Sequence[float | None] = (None,)
    layers_per_step: Sequence[int | None] = (None,)
    delays: Sequence[int] = (0,)
    max_moves: Sequence[int | None] = (None,)

    @property
    def are_default(self) -> bool:
        """Whether only the dispatch is chosen."""
        usual = vars(Choices())
        own = {name: value and tuple(value) for name, value in vars(self).items() if name != "dispatches"}
        return own.items() <= usual.items()

    def conditions(self) -> list[dict[str, Any]]:
        """All combinations of the conditions, as arguments of :class:`Setting`."""
        each = (
            self.max_utilizations, self.min_balancedness, self.layers_per_step, self.delays, self.max_moves
        )  # fmt: skip
        return [dict(zip(CONDITIONS, values, strict=True)) for values in itertools.product(*each)]


def grid(run: Run, today: Recorded, choices: Choices, steps: int) -> tuple[list[Setting], list[str]]:
    """The settings to try, and notes on combinations left out.

    Defaults: the engine's policy (``deepseek`` if not known) and ``static``; no redundant experts, as many as
    today, and one more per rank (two more only with today's interval and window); intervals of a quarter of,
    once and four times today's (if not known, a 64th, 16th and 4th of the steps, but at least 16); windows of
    the interval and of today's window (if not known, of four intervals; for SGLang, of the interval only);
    the engine's first rearrangement; today's dispatch.

    Args:
        steps: the number of steps to replay; default intervals leave room for two rearrangements, today's for
            one.

    Raises:
        UsageError: no combination is possible.
    """
    engine, experts = run.info.engine, run.info.num_logical_experts
    policies = choices.policies or [today.policy or "deepseek", STATIC]
    found: set[Setting] = set()
    impossible: list[str] = []
    for ep_size in choices.ep_sizes or [today.ep_size]:
        least = -experts % ep_size
        if experts + max([least, *(choices.redundant or ())]) > MAX_EXPERTS:
            option = "--ep-size" if experts + least > MAX_EXPERTS else "--redundant-experts"
            raise UsageError(f"{option} is too large: a placement holds at most {MAX_EXPERTS:,} slots")
        # Today's number, rounded up to one that the ranks divide.
        some = least + -(-max(0, today.num_redundant_experts - least) // ep_size) * ep_size
        if choices.redundant is None and experts + some + 2 * ep_size <= MAX_EXPERTS:
            found |= _two_more(engine, policies, some + 2 * ep_size, ep_size, today, choices, steps)
        for redundant in {least, some, some + ep_size} if choices.redundant is None else choices.redundant:
            if beyond := (experts + redundant) % ep_size:
                fewer, more = redundant - beyond, redundant - beyond + ep_size
                impossible.append(
                    f"--redundant-experts {redundant}: {experts + redundant} slots cannot be divided evenly "
                    f"among {plural(ep_size, 'EP rank')}; use {more if fewer < 0 else f'{fewer} or {more}'}"
                )
                continue
            for policy in policies:
                if policy in FIXED:
                    found.add(Setting(policy, redundant, ep_size, None, None, None))
                    continue
                for interval in choices.intervals or usual_intervals(engine, today.interval, steps):
                    windows = choices.windows or usual_windows(engine, interval, today.window, steps)
                    starts = choices.starts or [first_rearrangement(engine, interval)]
                    for window, start, conditions in itertools.product(windows, starts, choices.conditions()):
                        found.add(Setting(policy, redundant, ep_size, interval, window, start, **conditions))
    if not found:
        raise UsageError(impossible[0] if impossible else "there are no settings to try")
    layers = run.info.num_layers
    uneven = run.history.num_experts(experts, layers).min() < experts  # then any slots hold replicas
    names = choices.dispatches or [today.dispatch]
    every = [
        replace(setting, dispatch=name)
        for setting in found
        # Without replicas, all dispatches are the same.
        for name in (
            names
            if (uneven or setting.num_redundant_experts) and setting.policy != ORACLE
            else [today.dispatch]
        )
    ]
    return sorted(every, key=setting_order), [f"left out: {text}" for text in impossible]


def usual_intervals(engine: str | None, today: int | None, steps: int) -> list[int]:
    """A quarter of, once and four times today's interval, if they leave room for two rearrangements.

    Today's has to leave room for one: without it, no change of another part could be seen by itself.
    """
    usual = today or max(1, steps // PARTS)
    least = 1 if today else LEAST_INTERVAL
    intervals = {max(least, i) for i in (usual // 4, usual, usual * 4) if i}
    fitting = {i for i in intervals if i <= steps // 2} or {max(1, steps // PARTS)}
    if today is not None and first_rearrangement(engine, today) < steps:
        fitting.add(today)
    return sorted(fitting)


def _two_more(
    engine: str | None,
    policies: Sequence[str],
    redundant: int,
    ep_size: int,
    today: Recorded,
    choices: Choices,
    steps: int,
) -> set[Setting]:
    """So many redundant experts, the rest as close to today's as the choices have it."""
    policy = next((name for name in policies if name not in FIXED), None)
    if policy is None:
        return set()
    interval = nearest(
        choices.intervals or usual_intervals(engine, today.interval, steps), usual_interval(today, steps)
    )
    usual = sorted(choices.windows or usual_windows(engine, interval, today.window, steps))
    window = nearest(usual, today.window or interval)
    start = (choices.starts or [first_rearrangement(engine, interval)])[0]
    return {Setting(policy, redundant, ep_size, interval, window, start, **choices.conditions()[0])}


def usual_interval(today: Recorded, steps: int) -> int:
    """Today's interval; if it is not known, what is usual for so many steps."""
    return today.interval or max(1, steps // PARTS)


def nearest(values: Sequence[int], today: int) -> int:
    return min(values, key=lambda value: abs(value - today))


def usual_windows(engine: str | None, interval: int, today: int | None, steps: int) -> set[int]:
    # SGLang refuses a window longer than the interval.
    windows = {interval} if engine == "sglang" else {interval, today or 4 * interval}
    return {window for window in windows if window <= steps} or {min(windows)}


def setting_order(setting: Setting) -> tuple[Any, ...]:
    numbers = (setting.interval, setting.window, setting.start, *setting.conditions)
    first = setting.ep_size, setting.num_redundant_experts, setting.policy
    return (*first, *(n or 0 for n in numbers), setting.dispatch)


def conditions_text(setting: Setting) -> list[str]:
    """When it rearranges less, later or in parts, in words; nothing if there is no such condition."""
    parts = []
    if setting.max_utilization is not None:
        parts.append(f"only at utilization {setting.max_utilization:g} or less")
    if setting.min_balancedness is not None:
        parts.append(f"only if a layer's balancedness is below {setting.min_balancedness:g}")
    if setting.layers_per_step is not None:
        parts.append(f"{plural(setting.layers_per_step, 'layer')} per step")
    if setting.delay:
        parts.append(f"{plural(setting.delay, 'step')} late")
    if setting.max_moves is not None:
        parts.append(f"at most {plural(setting.max_moves, 'move')}")
    return parts
