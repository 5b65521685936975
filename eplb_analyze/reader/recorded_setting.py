"""The setting of the load balancer that a run was recorded under, and whether a rearrangement was due."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eplb_analyze.metrics.formulas import Float64, sglang
from eplb_analyze.reader.run import Run
from eplb_analyze.text import plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape


@dataclass(frozen=True, order=True)
class Setting:
    """When and how experts are rearranged. Steps are the engine's."""

    policy: str
    num_redundant_experts: int
    ep_size: int
    #: Steps from one rearrangement to the next; None: it never rearranges.
    interval: int | None
    #: Steps before a rearrangement whose loads the policy sees.
    window: int | None
    #: The step from which the first rearrangement holds, counted from the run's first step.
    start: int | None
    #: How replicas share tokens: ``measured``, ``even``, ``random``, ``vllm``, ``sglang-static``,
    #: ``sglang-dynamic``, ``vllm-ascend`` or ``lp``.
    dispatch: str = "measured"
    #: It rearranges only if the mean utilization since it was due last is at most this; None: always.
    max_utilization: float | None = None
    #: It rearranges only if a layer's balancedness over the window is below this; None: always.
    min_balancedness: float | None = None
    #: So many layers change in a step, in the next steps the others; None: all in one step.
    layers_per_step: int | None = None
    #: The first layers change so many steps after the window ends.
    delay: int = 0
    #: A rearrangement moves at most so many expert weights; None: no limit.
    max_moves: int | None = None

    @property
    def conditions(self) -> tuple[float | int | None, ...]:
        """When it rearranges less, later or in parts; of a setting without any, ``NO_CONDITIONS``."""
        return tuple(getattr(self, name) for name in CONDITIONS)


CONDITIONS = ("max_utilization", "min_balancedness", "layers_per_step", "delay", "max_moves")
NO_CONDITIONS = (None, None, None, 0, None)


@frozen
class Recorded:
    """The setting that a run was recorded under, as far as it is known; None: not known."""

    policy: str | None
    num_redundant_experts: int
    ep_size: int
    interval: int | None
    window: int | None
    start: int | None
    #: Whether the engine balances; None: it does not say.
    enabled: bool | None
    #: The groups of experts and the nodes that the engine gives its policy.
    num_groups: int | None = None
    num_nodes: int | None = None
    #: The engine rearranges only if the utilization is at most this; None: always.
    max_utilization: float | None = None
    #: How replicas share tokens in a replay of today's placements: as measured, or as asked for.
    dispatch: str = "measured"

    def setting(self) -> Setting | None:
        """The setting to replay, if all of it is known; None also if the engine skips rearrangements."""
        if self.policy is None or self.interval is None or self.window is None or self.start is None:
            return None
        if self.max_utilization is not None or self.enabled is False:
            return None
        shape = self.num_redundant_experts, self.ep_size
        return Setting(self.policy, *shape, self.interval, self.window, self.start, self.dispatch)


def recorded(run: Run, shape: Shape) -> Recorded:
    """The setting that the run's engine states; an interval or start it does not state, from its placements.

    Args:
        shape: the shape of the steps in question; elastic runs have several.
    """
    stated = run.sessions[0].info.engine_config
    config: dict[str, Any] = stated if isinstance(stated, dict) else {}
    redundant = shape.num_physical_experts - run.info.num_logical_experts
    policy = interval = window = start = enabled = max_utilization = None
    groups, nodes = _count(config.get("num_expert_groups")), _count(config.get("num_nodes"))
    if run.info.engine == "vllm":
        eplb = config.get("eplb_config")
        eplb = eplb if isinstance(eplb, dict) else {}
        policy = "vllm" if eplb.get("policy", "default") == "default" else None
        interval, window = _count(eplb.get("step_interval")), _count(eplb.get("window_size"))
    elif run.info.engine == "sglang":
        enabled = config.get("enable_eplb") if isinstance(config.get("enable_eplb"), bool) else None
        algorithm = config.get("eplb_algorithm")
        policy = "sglang" if algorithm in ("auto", "deepseek", "deepseek_hierarchical") else None
        if algorithm == "deepseek":  # never hierarchical
            groups = 1
        nodes = _count(config.get("nnodes"))
        interval = _count(config.get("eplb_rebalance_num_iterations"))
        # Its buffer of loads is as long as the interval unless set otherwise.
        window = _count(config.get("expert_distribution_recorder_buffer_size")) or interval
        threshold = config.get("eplb_min_rebalancing_utilization_threshold")
        if isinstance(threshold, int | float) and not math.isclose(threshold, 1):  # as EPLBManager
            max_utilization = float(threshold)
    if interval is None and enabled is not False:
        first, _ = run.step_range
        steps = [change.first_step for change in run.history.rearrangements()]
        if len(steps) > 1:
            interval = max(1, round(float(np.median(np.diff(steps)))))
        start = steps[0] - (first or 0) if steps else None
    if interval is not None and start is None:
        start = first_rearrangement(run.info.engine, interval)
    return Recorded(
        policy, redundant, shape.ep_size, interval, window, start, enabled, groups, nodes, max_utilization
    )


def first_rearrangement(engine: str | None, interval: int) -> int:
    """The step, from the run's first, from which an engine's first rearrangement holds.

    vLLM (0.33, ``EplbState.add_model``) starts with three quarters of the interval behind it. SGLang (0.5.23,
    ``EPLBManager``) rebalances in the pass after a whole interval.
    """
    if engine == "vllm":
        return max(1, interval // 4)
    return interval + 1 if engine == "sglang" else interval


def _count(value: Any) -> int | None:
    """A positive integer of the recorded configuration, which can hold anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


#: The interval of an engine that does not state it: vLLM's default; SGLang's is 1,000.
USUAL_INTERVAL = 3000


def not_due(run: Run) -> str | None:
    """Why the engine had no reason to rearrange yet; None also if it says that it does not balance."""
    info = run.info
    if info.ep_size == 1:
        return "The run has one EP rank, so there is nothing to balance."
    setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
    if setting.enabled is False:
        return None
    return why_not_due(*run.step_range, setting.interval, setting.start) or _too_balanced(run, setting)


def overdue(run: Run, steps: tuple[int | None, int | None] | None = None) -> str | None:
    """How many steps ran without the rearrangement that was due, and the interval that the engine states.

    None if there is no step.

    Args:
        steps: the first and the last one; default those of the run, which may grow while it is read.
    """
    info = run.info
    setting = recorded(run, Shape(info.ep_size, info.num_layers, info.num_physical_experts))
    first, last = run.step_range if steps is None else steps
    if first is None or last is None:
        return None
    ran = f"{plural(last - first + 1, 'step')} ran"
    if setting.enabled is False:
        return f"{ran} with EPLB switched off (enable_eplb)"
    if setting.interval is None:
        return f"{ran}, and the engine states no interval (the default of vLLM is {USUAL_INTERVAL:,} steps)"
    return f"{ran} with an interval of {plural(setting.interval, 'step')}"


#: SGLang judges the mean over at most so many steps (``EPLB_BALANCEDNESS_WINDOW_SIZES``).
UTILIZATION_STEPS = 1000


def _too_balanced(run: Run, setting: Recorded) -> str | None:
    """Why an engine with a threshold of utilization never rearranged; None: it should have.

    SGLang compares the mean of its balancedness over the steps since a rearrangement was due last.
    """
    limit, interval, start = setting.max_utilization, setting.interval, setting.start
    if limit is None or interval is None or start is None:
        return None

    def utilization() -> tuple[Int64, Float64]:
        parts = [(block.recorded, sglang(run.terms(block))) for block in run.all_phases.blocks()]
        return np.concatenate([s for s, _ in parts]), np.concatenate([v for _, v in parts])

    steps, values = run.retry_without_damaged(utilization)
    if not len(steps):
        return None
    # The rearrangement, counted from 0, that the engine judges each step for.
    origin = int(steps[0]) + start
    judged = (steps - origin) // interval + 1
    due = origin + judged * interval
    counts = (judged >= 0) & (due <= steps[-1]) & (steps >= due - UTILIZATION_STEPS) & ~np.isnan(values)
    if not counts.any():
        return None
    _, group = np.unique(judged[counts], return_inverse=True)
    least = float((np.bincount(group, values[counts]) / np.bincount(group)).min())
    if least <= limit:
        return None
    return (
        f"No placement changed: the engine rearranges only if the utilization is at most {limit:g} "
        f"(eplb_min_rebalancing_utilization_threshold), and it was at least {least:.3f} whenever a "
        "rearrangement was due."
    )


def why_not_due(first: int | None, last: int | None, interval: int | None, start: int | None) -> str | None:
    """Why no rearrangement was due in a run's steps, in a sentence; None: one was due.

    Counts by the engine's own step numbers, because recording can start long after the engine did.

    Args:
        first, last: the run's first and last step.
        interval: steps from one rearrangement to the next, if the engine states it; if not, none is due
            before :data:`USUAL_INTERVAL` steps.
        start: the step from which the engine's first rearrangement holds.
    """
    if first is None or last is None:
        return None
    if interval is None or start is None:
        steps = last - first + 1
        if steps >= USUAL_INTERVAL:
            return None
        unknown = "The recording does not show how often EPLB should rearrange."
        return f"No placement changed in {plural(steps, 'step')}. {unknown}"
    # A placement that holds from the first step on is not a change. And none is due before a whole interval:
    # some engines act early, but may need steps to move the weights.
    due = start + max(0, (first - start) // interval + 1) * interval
    if last >= max(due, interval):
        return None
    every = plural(interval, "step")
    if last < interval:
        return f"No placement changed: the engine's interval of {every} was not reached by step {last}."
    return f"No placement changed: none was due from step {first} to {last}, with an interval of {every}."
