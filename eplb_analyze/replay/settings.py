"""Settings of a load balancer: the one a run was recorded under, as its engine says, and grids of others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from eplb_analyze.errors import UsageError
from eplb_analyze.reader.run import Run
from eplb_analyze.text import plural
from eplb_dump.format.journal import Shape
from eplb_dump.format.schema import MAX_EXPERTS

#: The policy that keeps its placement, so that an interval, a window and a start have no meaning.
STATIC = "static"
#: The grid's intervals where nothing says the engine's: so many parts of the run.
PARTS = 16
#: No engine rearranges more often by default, and moving weights is not free.
LEAST_INTERVAL = 16


@dataclass(frozen=True, order=True)
class Setting:
    """When and how experts are rearranged. Steps are the engine's."""

    policy: str
    num_redundant_experts: int
    ep_size: int
    #: Steps from one rearrangement to the next; None: there is none.
    interval: int | None
    #: A rearrangement is made from the loads of so many steps before it.
    window: int | None
    #: The first rearrangement is in force from this step on, counted from the run's first.
    start: int | None


@dataclass(frozen=True)
class Recorded:
    """What is known of the setting that a run was recorded under; None: it is not known."""

    policy: str | None
    num_redundant_experts: int
    ep_size: int
    interval: int | None
    window: int | None
    start: int | None
    #: False: the engine says that it does not balance. None: it does not say.
    enabled: bool | None

    def setting(self) -> Setting | None:
        """The same as a setting to replay, where all of it is known."""
        if self.policy is None or self.interval is None or self.window is None or self.start is None:
            return None
        shape = self.num_redundant_experts, self.ep_size
        return Setting(self.policy, *shape, self.interval, self.window, self.start)


def recorded(run: Run, shape: Shape) -> Recorded:
    """The setting that the run's engine states, and of what it does not state the placements' own rhythm.

    Args:
        shape: that of the steps in question; elastic runs have several.
    """
    stated = run.sessions[0].info.engine_config
    config: dict[str, Any] = stated if isinstance(stated, dict) else {}
    redundant = shape.num_physical_experts - run.info.num_logical_experts
    policy = interval = window = start = enabled = None
    if run.info.engine == "vllm":
        eplb = config.get("eplb_config")
        eplb = eplb if isinstance(eplb, dict) else {}
        policy = "vllm" if eplb.get("policy", "default") == "default" else None
        interval, window = _count(eplb.get("step_interval")), _count(eplb.get("window_size"))
    elif run.info.engine == "sglang":
        enabled = config.get("enable_eplb") if isinstance(config.get("enable_eplb"), bool) else None
        known = ("auto", "deepseek", "deepseek_hierarchical")
        policy = "sglang" if config.get("eplb_algorithm") in known else None
        # Its buffer of loads is as long as the interval, unless set otherwise.
        interval = window = _count(config.get("eplb_rebalance_num_iterations"))
    if interval is None and enabled is not False:
        first, _ = run.step_range
        steps = [change.first_step for change in run.history.rearrangements()]
        if len(steps) > 1:
            interval = max(1, round(median(b - a for a, b in itertools.pairwise(steps))))
        start = steps[0] - (first or 0) if steps else None
    if interval is not None and start is None:
        start = first_rearrangement(run.info.engine, interval)
    return Recorded(policy, redundant, shape.ep_size, interval, window, start, enabled)


def first_rearrangement(engine: str | None, interval: int) -> int:
    """The step, from the run's first, from which an engine's first rearrangement holds.

    vLLM (0.33, ``EplbState.add_model``) begins with three quarters of the interval behind it. SGLang
    (0.5.23, ``EPLBManager``) lets a whole interval pass and rebalances in the pass after.
    """
    if engine == "vllm":
        return max(1, interval // 4)
    return interval + 1 if engine == "sglang" else interval


def engine_arguments(engine: str | None, setting: Setting) -> str | None:
    """How to start the engine so; None where it cannot, or is not known.

    As vLLM 0.33 (``EPLBConfig``) and SGLang 0.5.23 (``ServerArgs``) name them.
    """
    if engine == "vllm" and setting.policy == "vllm":
        config = {
            "num_redundant_experts": setting.num_redundant_experts,
            "step_interval": setting.interval,
            "window_size": setting.window,
        }
        return f"--enable-eplb --eplb-config '{json.dumps(config)}'"
    if engine == "sglang" and setting.policy == "sglang":
        return (
            f"--enable-eplb --ep-num-redundant-experts {setting.num_redundant_experts} "
            f"--eplb-rebalance-num-iterations {setting.interval} "
            f"--expert-distribution-recorder-buffer-size {setting.window}"
        )
    return None


def _count(value: Any) -> int | None:
    """A dump may say anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True)
class Choices:
    """What of a setting to try; None: what suits the run. All that belong together are combined."""

    policies: Sequence[str] | None = None
    redundant: Sequence[int] | None = None
    intervals: Sequence[int] | None = None
    windows: Sequence[int] | None = None
    ep_sizes: Sequence[int] | None = None
    starts: Sequence[int] | None = None


def grid(run: Run, today: Recorded, choices: Choices, steps: int) -> tuple[list[Setting], list[str]]:
    """The settings to try, and notes on what was left out.

    By default the policy of the engine (``deepseek`` where it is not known) and ``static``; no redundant
    experts, today's and one more on each rank; an interval of a quarter, once and four times today's (where
    it is not known a 64th, 16th and 4th of the steps, but at least 16); a window of the interval and of
    today's (where it is not known of four intervals; SGLang: of the interval only); the first rearrangement
    where the engine has it.

    Args:
        steps: how many the replay is over; a default interval leaves room for two rearrangements in them.

    Raises:
        UsageError: no combination is possible.
    """
    engine, experts = run.info.engine, run.info.num_logical_experts
    policies = choices.policies or [today.policy or "deepseek", STATIC]
    found: set[Setting] = set()
    notes: list[str] = []
    for ep_size in choices.ep_sizes or [today.ep_size]:
        least = -experts % ep_size
        if experts + max([least, *(choices.redundant or ())]) > MAX_EXPERTS:
            raise UsageError(f"more than {MAX_EXPERTS:,} slots are more than a placement holds")
        usual = {least, today.num_redundant_experts, max(least, today.num_redundant_experts) + ep_size}
        for redundant in sorted(usual) if choices.redundant is None else choices.redundant:
            if (experts + redundant) % ep_size or redundant < 0:
                if choices.redundant is not None or choices.ep_sizes is not None:
                    notes.append(
                        f"left out: {experts} experts and {redundant} redundant ones do not lie evenly on "
                        f"{ep_size} ranks"
                    )
                continue
            for policy in policies:
                if policy == STATIC:
                    found.add(Setting(policy, redundant, ep_size, None, None, None))
                    continue
                for interval in choices.intervals or _intervals(today.interval, steps):
                    windows = choices.windows or _windows(engine, interval, today.window)
                    starts = choices.starts or [first_rearrangement(engine, interval)]
                    for window, start in itertools.product(windows, starts):
                        found.add(Setting(policy, redundant, ep_size, interval, window, start))
    if not found:
        raise UsageError(notes[0] if notes else "there is no setting to try")
    return sorted(found, key=_order), notes


def _intervals(today: int | None, steps: int) -> list[int]:
    """A quarter, once and four times today's, as far as they leave room for two rearrangements."""
    usual = today or max(1, steps // PARTS)
    least = 1 if today else LEAST_INTERVAL
    fitting = {max(least, i) for i in (usual // 4, usual, usual * 4) if i}
    return sorted(i for i in fitting if i <= steps // 2) or [max(1, steps // PARTS)]


def _windows(engine: str | None, interval: int, today: int | None) -> set[int]:
    # SGLang refuses a window longer than the interval.
    return {interval} if engine == "sglang" else {interval, today or 4 * interval}


def _order(setting: Setting) -> tuple[Any, ...]:
    numbers = (setting.interval, setting.window, setting.start)
    return (setting.ep_size, setting.num_redundant_experts, setting.policy, *(n or 0 for n in numbers))


#: Where an engine does not state its interval: vLLM's default; SGLang's is 1,000.
USUAL_INTERVAL = 3000


def not_due(run: Run) -> str | None:
    """Why the engine had no reason to act yet; None also where it says that it does not balance."""
    info = run.info
    setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
    return None if setting.enabled is False else why_not_due(*run.step_range, setting.interval, setting.start)


def why_not_due(first: int | None, last: int | None, interval: int | None, start: int | None) -> str | None:
    """Why EPLB had no reason to act yet in a run's steps, in a sentence; None: it had.

    By the engine's own step numbers, as recording can begin long after the engine did.

    Args:
        first, last: the run's first and last step.
        interval: steps from one rearrangement to the next, as the engine states it. None: it does not,
            and nothing is asked of it before :data:`USUAL_INTERVAL` steps.
        start: the step from which the engine's first rearrangement holds.
    """
    if first is None or last is None:
        return None
    if interval is None or start is None:
        steps = last - first + 1
        if steps >= USUAL_INTERVAL:
            return None
        return f"No placement changed in {plural(steps, 'step')}; the engine does not state its interval."
    # What holds from the first step on already is no change. And before a whole interval nothing is
    # asked of an engine: some act early, but may need steps to move the weights.
    due = start + max(0, (first - start) // interval + 1) * interval
    if last >= max(due, interval):
        return None
    every = plural(interval, "step")
    if last < interval:
        return f"No placement changed: the engine's interval of {every} was not reached by step {last}."
    return f"No placement changed: none was due from step {first} to {last}, with an interval of {every}."
