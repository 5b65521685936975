"""What an engine's configuration says of its load balancer: what the policy is given, and when it acts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, open_vllm_writer, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.reader.recorded_setting import Recorded, not_due, recorded
from eplb_analyze.replay.grouping import Groupings
from eplb_dump.format.journal import Shape

EXPERTS, RANKS, LAYERS = 16, 4, 2
Array = np.ndarray[Any, Any]


def sglang(
    root: Path, loads: Array, *, interval: int = 40, threshold: Any = 0.8, first: int = 0, **config: Any
) -> Path:
    """A run of SGLang in which no placement changes."""
    stated = {
        "enable_eplb": True,
        "eplb_algorithm": "auto",
        "eplb_rebalance_num_iterations": interval,
        "eplb_min_rebalancing_utilization_threshold": threshold,
    }
    with open_writer(
        root, num_logical_experts=EXPERTS, ep_size=RANKS, scope="global",
        engine="sglang", engine_config=stated | config,
    ) as writer:  # fmt: skip
        for step, load in enumerate(loads, first):
            writer.record(step, load, np.tile(np.arange(EXPERTS), (LAYERS, 1)))
            if step % 100 == 0:
                writer.flush()
    return root


def with_utilization(values: list[float]) -> Array:
    """Loads whose mean over ranks is so much of their maximum, in each step."""
    loads = np.zeros((len(values), LAYERS, EXPERTS), np.int64)
    for step, value in enumerate(values):
        loads[step, :, 0] = 10_000  # the busiest rank, with which the others add up to 4 × value
        loads[step, :, EXPERTS // RANKS] = round((RANKS * value - 1) * 10_000)
    return loads


def should_act(values: list[float], interval: int, threshold: float) -> bool:
    """As SGLang: after each interval, the mean over its passes (1,000 at most) is at most the threshold."""
    loads, judged = with_utilization(values), []
    for step, load in enumerate(loads):
        per_rank = load.reshape(LAYERS, RANKS, -1).sum(axis=2)
        judged.append(float(((per_rank.mean(axis=1) + 1e-5) / (per_rank.max(axis=1) + 1e-5)).mean()))
        if step and step % interval == 0 and np.mean(judged[-min(interval, 1000) :]) <= threshold:
            return step < len(loads) - 1  # it holds from the next step on
    return False


@pytest.mark.parametrize(
    ("values", "threshold", "alarm"),
    [
        ([0.49] * 100, 0.4, False),
        ([0.49] * 100, 0.5, True),
        ([0.49] * 60 + [0.3] * 60, 0.4, True),  # unbalanced from the second interval on
        ([0.49] * 41 + [0.3] * 30, 0.4, False),  # when it was due, it was balanced
        ([0.49] * 100, 1.0, True),  # no threshold: SGLang's default
    ],
)
def test_engine_told_to_act_only_below_a_threshold_is_no_alarm(
    tmp_path: Path, values: list[float], threshold: float, alarm: bool
) -> None:
    sglang(tmp_path, with_utilization(values), threshold=threshold)
    said = not_due(open_run(tmp_path))
    assert (said is None) is alarm
    text = " ".join(cli("summary", tmp_path).stdout.split())
    assert ("EPLB NEVER ACTED" in text) is alarm
    if said is not None:
        assert f"only if the utilization is at most {threshold}" in said
        assert f"at least {min(values[:41]):.3f}" in said
        assert said[1:-1] in text


@given(
    levels=st.lists(st.sampled_from([0.27, 0.33, 0.4, 0.45, 0.49]), min_size=3, max_size=12),
    interval=st.integers(5, 30),
    threshold=st.floats(0.28, 0.5),
)
@settings(max_examples=30)
def test_threshold_is_judged_as_sglang_judges_it(
    tmp_path_factory: pytest.TempPathFactory, levels: list[float], interval: int, threshold: float
) -> None:
    values = [level for level in levels for _ in range(10)]
    root = sglang(
        tmp_path_factory.mktemp("run"), with_utilization(values), interval=interval, threshold=threshold
    )
    assert (not_due(open_run(root)) is None) is should_act(values, interval, threshold)


def test_advice_says_nothing_of_a_fault_if_the_engine_was_not_to_act(tmp_path: Path) -> None:
    from eplb_analyze.replay.advise import advise

    rng = np.random.default_rng(0)
    even = rng.poisson(400, (200, LAYERS, EXPERTS))
    quiet = advise(open_run(sglang(tmp_path / "quiet", even)))
    assert quiet.fault is None
    assert (quiet.verdict, quiet.replay and quiet.replay.self_test) == ("leave", None)
    broken = advise(open_run(sglang(tmp_path / "broken", even, threshold=1.0)))
    assert broken.fault is not None
    assert broken.reasons[0].startswith("EPLB never acted: a rearrangement was due every 40 steps")
    off = advise(open_run(sglang(tmp_path / "off", even, threshold=1.0, enable_eplb=False)))
    assert off.fault is None


# ---- what the policy is given

SHAPE = Shape(ep_size=RANKS, num_moe_layers=LAYERS, num_physical_experts=EXPERTS)
ONE = np.full((1, LAYERS, EXPERTS), 9)


@pytest.mark.parametrize(
    ("config", "groups", "nodes", "window", "limit"),
    [
        ({}, None, None, 40, 0.8),
        ({"num_expert_groups": 8, "nnodes": 2}, 8, 2, 40, 0.8),
        # SGLang's deepseek is never hierarchical, whatever the model's groups.
        ({"num_expert_groups": 8, "nnodes": 2, "eplb_algorithm": "deepseek"}, 1, 2, 40, 0.8),
        ({"expert_distribution_recorder_buffer_size": 25}, None, None, 25, 0.8),
        ({"expert_distribution_recorder_buffer_size": -1}, None, None, 40, 0.8),
        ({"eplb_min_rebalancing_utilization_threshold": 1.0}, None, None, 40, None),
        ({"eplb_min_rebalancing_utilization_threshold": "0.8"}, None, None, 40, None),
        ({"num_expert_groups": "8"}, None, None, 40, 0.8),
    ],
)
def test_configuration_of_sglang(
    tmp_path: Path,
    config: dict[str, Any],
    groups: int | None,
    nodes: int | None,
    window: int,
    limit: float | None,
) -> None:
    found = recorded(open_run(sglang(tmp_path, ONE, **config)), SHAPE)
    assert (found.num_groups, found.num_nodes, found.window) == (groups, nodes, window)
    assert found.max_utilization == (None if limit is None else pytest.approx(limit))
    # What the engine would skip cannot be replayed.
    assert (found.setting() is None) is (limit is not None)


def test_configuration_of_vllm(tmp_path: Path) -> None:
    stated = {"eplb_config": {"step_interval": 9, "window_size": 5}, "num_expert_groups": 4, "num_nodes": 2}
    with open_vllm_writer(tmp_path, EXPERTS, RANKS, stated) as writer:
        writer.record(None, ONE[0], np.tile(np.arange(EXPERTS), (LAYERS, 1)))
    found = recorded(open_run(tmp_path), SHAPE)
    assert (found.num_groups, found.num_nodes, found.interval, found.window) == (4, 2, 9, 5)


def test_nodes_are_those_of_the_engine_else_of_the_recording(tmp_path: Path) -> None:
    run = open_run(sglang(tmp_path, ONE, nnodes=2))
    today = recorded(run, SHAPE)
    found = Groupings(run, today, SHAPE, None, None).likely[0]
    assert (found.num_nodes, found.nodes(8), found.nodes(7)) == (2, 4, 1)
    other = Recorded(None, 0, 4, None, None, None, None, num_nodes=3)
    uneven = Groupings(run, other, SHAPE, None, None)
    assert uneven.likely[0].num_nodes == 1
    assert "4 EP ranks cannot be divided evenly among 3 nodes" in uneven.notes[0]
    assert math.isclose(today.max_utilization or 0, 0.8)
