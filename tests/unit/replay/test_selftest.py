"""The recorded setting replayed: engines that place experts as the replay does, and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import cli, open_vllm_writer, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.policies import Problem, named, place
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.grouping import ShownGroups, groups_on_nodes
from eplb_analyze.replay.replay import Replay, replay_run
from eplb_dump.format.journal import Shape

Array = np.ndarray[Any, Any]
LAYERS, EXPERTS, REDUNDANT, RANKS = 2, 32, 8, 8
SLOTS = EXPERTS + REDUNDANT


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict depends on how long this machine takes to record."""
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())


def record(
    root: Path,
    *,
    engine: str = "vllm",
    nodes: int = 2,
    groups: int = 8,
    interval: int = 40,
    used: int | None = None,
    window: int | None = None,
    lag: int = 0,
    dealt: str = "random",
    steps: int = 320,
    named_engine: bool = True,
    node_size: bool = True,
    share: Array | None = None,
    **config: Any,
) -> Path:
    """Record an engine that places experts by its own policy.

    Args:
        used: the window of loads that the policy is given, if not what the engine states.
        lag: steps until each next layer moves, as in an asynchronous engine.
        dealt: how replicas share tokens: ``random`` or ``rounds``.
        named_engine: whether the recording states the engine and its setting.
        node_size: whether it states the ranks per node.
        share: of each layer's experts.
        config: what the engine states beside its interval and window.
    """
    rng = np.random.default_rng(22)
    if share is None:
        share = rng.gamma(1, 1, (LAYERS, EXPERTS))
        share[:, : EXPERTS // 4] *= 4  # hot experts in neighboring groups
    share /= share.sum(axis=1, keepdims=True)
    window = window or interval
    now = np.tile(np.r_[np.arange(EXPERTS), np.arange(REDUNDANT)], (LAYERS, 1)).astype(np.int32)
    planned, due, past = now, 0, []
    if engine == "vllm":
        start = interval // 4
        stated = {"eplb_config": {"step_interval": interval, "window_size": window, "policy": "default"}}
    else:
        start = interval + 1
        stated = {"enable_eplb": True, "eplb_algorithm": "auto", "eplb_rebalance_num_iterations": interval}
    known = {"engine": engine, "engine_config": stated | config} if named_engine else {}
    with open_writer(
        root, num_logical_experts=EXPERTS, ep_size=RANKS, scope="global",
        ranks_per_node=RANKS // nodes if node_size else None, **known,
    ) as writer:  # fmt: skip
        for step in range(steps):
            if step >= start and (step - start) % interval == 0:
                weight = np.sum(past[-(used or window) :], axis=0)
                planned, due = (
                    place(named(engine), Problem(weight, SLOTS, RANKS, nodes, groups, now)),
                    step,
                )
            now = np.stack([(planned if step >= due + lag * i else now)[i] for i in range(LAYERS)])
            logical = np.stack([rng.multinomial(6000, row) for row in share])
            past.append(logical)
            load = np.zeros((LAYERS, SLOTS), np.int64)
            for layer, expert in np.ndindex(LAYERS, EXPERTS):
                at = np.flatnonzero(now[layer] == expert)
                tokens = int(logical[layer, expert])
                if dealt == "random":
                    load[layer, at] = rng.multinomial(tokens, [1 / len(at)] * len(at))
                else:
                    load[layer, at] = tokens // len(at) + (np.arange(len(at)) < tokens % len(at))
            writer.record(step, load, now)
            if step % 100 == 0:
                writer.flush()
    return root


def replayed(root: Path, **options: Any) -> tuple[Replay, Any]:
    result = replay_run(open_run(root), **options)
    assert result.self_test is not None
    return result, result.self_test


@pytest.mark.parametrize("dealt", ["random", "rounds"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_recorded_setting_gives_the_recorded_placements_and_balancedness(
    tmp_path: Path, engine: str, dealt: str
) -> None:
    record(tmp_path, engine=engine, dealt=dealt, num_expert_groups=8)
    result, test = replayed(tmp_path)
    assert result.recorded.num_groups == 8
    assert (test.doubt, test.missed) == (None, 0)
    assert test.compared > 5
    # SGLang's first window lacks a step, because this loop's has no step -1.
    assert test.same_placements >= test.compared - (engine == "sglang")
    assert result.measured_balancedness == pytest.approx(test.balancedness, abs=0.004)
    assert result.measured_balancedness == pytest.approx(test.recorded_balancedness, abs=0.004)
    assert (result.dispatch.in_rounds > 0.9) == (dealt == "rounds")
    assert not any("group" in note for note in result.notes)


SEEN = "the recorded placements keep each of 8 groups of experts on one of 2 nodes"


def test_groups_that_are_not_recorded_are_those_of_the_placements(tmp_path: Path) -> None:
    """vLLM keeps groups on nodes; a recording that does not say so is replayed as its placements show."""
    record(tmp_path)
    result, test = replayed(tmp_path)
    assert (test.doubt, test.same_placements) == (None, test.compared)
    assert result.notes[0].startswith(SEEN)
    given, right = replayed(tmp_path, num_groups=8)
    assert (right.doubt, right.same_placements) == (None, right.compared)
    assert (given.notes, given.outcomes) == ([], result.outcomes)
    wrong, doubted = replayed(tmp_path, num_groups=1)
    assert wrong.notes[0] == doubted.doubt
    assert "pass --num-groups 8" in doubted.doubt
    assert doubted.time_saved.low > 0.01


@pytest.mark.parametrize("node_size", [False, True])
@pytest.mark.parametrize(("engine", "nodes", "groups"), [("vllm", 2, 4), ("sglang", 4, 8), ("vllm", 2, 16)])
def test_gain_of_an_unknown_engine_is_that_of_its_groups(
    tmp_path: Path, engine: str, nodes: int, groups: int, node_size: bool
) -> None:
    """Without groups, other settings seem to gain what groups cost."""
    record(tmp_path, engine=engine, nodes=nodes, groups=groups, named_engine=False, node_size=node_size)
    run = open_run(tmp_path)
    found = replay_run(run)
    assert (found.grouping.num_groups, found.grouping.num_nodes) == (groups, nodes)
    assert sum("the recorded placements keep each of" in note for note in found.notes) == 1
    assert found.outcomes == replay_run(run, num_groups=groups, num_nodes=nodes).outcomes
    ungrouped = replay_run(run, num_groups=1, num_nodes=1)
    assert not any("groups of experts" in note for note in ungrouped.notes)
    best, promised = (max(o.time_saved or 0 for o in result.outcomes) for result in (found, ungrouped))
    assert promised > best + 0.005
    document = json.loads(cli("replay", tmp_path, "--json").stdout)
    assert document["grouping"] == {"num_groups": groups, "num_nodes": nodes, "from_placements": True}


def test_finer_groups_that_give_the_recorded_placements_are_found(tmp_path: Path) -> None:
    """Two of four groups always lie on the first node, so the placements alone could be of two groups."""
    rng = np.random.default_rng(7)
    tokens = np.repeat([7.0, 3.0, 2.0, 8.0], EXPERTS // 4) * rng.uniform(0.5, 1.5, (LAYERS, EXPERTS))
    record(tmp_path, groups=4, share=tokens / tokens.sum(axis=1, keepdims=True))
    result, test = replayed(tmp_path)
    assert (result.grouping.num_groups, test.doubt) == (4, None)
    assert test.same_placements == test.compared


@pytest.mark.parametrize("node_size", [False, True])
def test_engine_without_groups_is_replayed_without(tmp_path: Path, node_size: bool) -> None:
    record(tmp_path, groups=1, named_engine=False, node_size=node_size)
    result = replay_run(open_run(tmp_path))
    assert result.grouping.num_groups == 1
    assert not any("group" in note for note in result.notes)


def test_unknown_groups_are_noted_if_no_placement_changed(tmp_path: Path) -> None:
    record(tmp_path, named_engine=False, interval=4000)
    assert any("--num-groups" in note for note in replay_run(open_run(tmp_path)).notes)


def test_nodes_that_the_recording_lacks_are_supplied(tmp_path: Path) -> None:
    record(tmp_path, num_nodes=1)
    for groups in (None, 8):
        assert "pass --num-nodes" in replayed(tmp_path, num_groups=groups)[1].doubt
    result, test = replayed(tmp_path, num_nodes=2)
    assert test.doubt is None
    assert result.grouping.num_groups == 8
    options = ("--num-nodes", "2", "--num-groups", "8", "--json")
    for command in ("replay", "advise"):
        done = cli(command, tmp_path, *options)
        assert done.returncode == 0
    rejected = cli("replay", tmp_path, "--num-nodes", "3")
    assert rejected.returncode == 2
    assert "--num-nodes: 8 EP ranks cannot be divided evenly among 3 nodes" in rejected.stderr
    undivided = replay_run(open_run(tmp_path), num_nodes=2, num_groups=1)
    assert any(
        "1 groups of experts cannot be divided evenly among 2 nodes" in note for note in undivided.notes
    )


@pytest.mark.parametrize(("engine", "nodes", "groups"), [("sglang", 4, 4), ("vllm", 2, 2), ("sglang", 2, 16)])
def test_other_engines_and_groups_are_recognized(
    tmp_path: Path, engine: str, nodes: int, groups: int
) -> None:
    record(tmp_path, engine=engine, nodes=nodes, groups=groups, nnodes=nodes)
    result, test = replayed(tmp_path)
    assert test.doubt is None
    assert (result.grouping.num_groups, result.grouping.num_nodes) == (groups, nodes)
    doubt = replayed(tmp_path, num_groups=1)[1].doubt
    assert doubt is None or f"--num-groups {groups}" in doubt


def test_output_says_that_the_replay_differs_above_its_table(tmp_path: Path) -> None:
    record(tmp_path)
    done = cli("replay", tmp_path, "--num-groups", "1")
    text = " ".join(done.stdout.split())
    assert text.index("the replay does not reproduce the recording") < text.index(
        "the same loads under other"
    )
    document = json.loads(cli("replay", tmp_path, "--num-groups", "1", "--json").stdout)
    assert document["self_test"]["holds"] is False
    advised = json.loads(cli("advise", tmp_path, "--num-groups", "1", "--json").stdout)
    assert (advised["verdict"], advised["advised"], advised["engine_arguments"]) == (
        "not enough data",
        None,
        None,
    )
    assert "--num-groups 8" in advised["reasons"][0]
    assert json.loads(cli("advise", tmp_path, "--json").stdout)["verdict"] == "leave"


def test_window_that_is_not_the_engines_is_doubted_if_it_matters(tmp_path: Path) -> None:
    """The engine says that it balances by 40 steps, and balances by the first ones."""
    root = tmp_path / "far"
    record(root, num_expert_groups=1, groups=1, nodes=1, used=10_000)
    assert replayed(root)[1].doubt is None  # routing is steady: an older window gives as good placements
    wrong = tmp_path / "wrong"
    record(wrong, num_expert_groups=8, nodes=2, groups=1)  # says 8 groups, places as if there were one
    _, test = replayed(wrong)
    assert test.doubt is not None
    assert "--window-steps" in test.doubt


def test_layers_that_move_late_are_no_reason_to_doubt(tmp_path: Path) -> None:
    record(tmp_path, lag=9, num_expert_groups=8)
    _, test = replayed(tmp_path)
    assert test.doubt is None
    assert test.same_placements == test.compared > 5


def test_recorded_setting_is_tested_if_other_settings_are_asked_for(tmp_path: Path) -> None:
    record(tmp_path)
    done = json.loads(cli("replay", "--policy", "static", "--num-groups", "1", tmp_path, "--json").stdout)
    assert {setting["policy"] for setting in done["settings"]} == {"static"}
    assert done["self_test"]["holds"] is False


@pytest.mark.parametrize("stops", [0, 160])
def test_load_balancer_that_does_not_act_comes_before_other_advice(tmp_path: Path, stops: int) -> None:
    """The engine says that it rearranges every 40 steps, and does not, or not any more."""
    rng = np.random.default_rng(1)
    share = np.where(np.arange(EXPERTS) < 4, 8.0, 1.0)
    now = np.tile(np.r_[np.arange(EXPERTS), np.arange(REDUNDANT)], (LAYERS, 1)).astype(np.int32)
    stated = {"eplb_config": {"step_interval": 40, "window_size": 40}, "num_expert_groups": 1}
    with open_vllm_writer(tmp_path, EXPERTS, RANKS, stated) as writer:
        for step in range(400):
            if step < stops and step >= 10 and (step - 10) % 40 == 0:
                now = np.roll(now, 1, axis=1)
            copies = np.bincount(now[0], minlength=EXPERTS)
            per_slot = (share / copies)[now[0]]
            writer.record(step, rng.multinomial(8000, per_slot / per_slot.sum(), LAYERS), now)
            if step % 100 == 0:
                writer.flush()
    advice = advise(open_run(tmp_path))
    assert advice.fault is not None
    assert advice.reasons[0] == advice.fault
    assert advice.fault.startswith("EPLB stopped acting" if stops else "EPLB never acted")
    assert len(advice.reasons) == 2
    lines = cli("advise", tmp_path).stdout.splitlines()
    assert lines[1].startswith(f"FIX EPLB FIRST: {advice.fault[:18]}")
    assert advice.verdict == "fix"
    assert not any("FIX" in line for line in lines[2:])


# ---- groups seen in placements


def groups_in_loops(placements: Array, experts: int, nodes: int) -> list[int]:
    found = []
    for groups in range(nodes, experts // 2 + 1, nodes):
        seen: dict[tuple[int, int], set[int]] = {}
        for row, slots in enumerate(placements.tolist()):
            for slot, expert in enumerate(slots):
                if expert >= 0:
                    seen.setdefault((row, expert * groups // experts), set()).add(slot * nodes // len(slots))
        if experts % groups == 0 and all(len(each) == 1 for each in seen.values()):
            found.append(groups)
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["deepseek", "vllm", "sglang"]),
    nodes=st.sampled_from([2, 4]),
    groups=st.sampled_from([4, 8, 12]),
    shuffled=st.booleans(),
)
@settings(max_examples=60)
def test_groups_seen_in_placements_are_those_of_plain_loops(
    seed: int, policy: str, nodes: int, groups: int, shuffled: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.gamma(0.5, 100, (3, 24)).astype(np.int64)
    placed = place(named(policy), Problem(weight, 32, 8, nodes, groups))
    if shuffled:
        placed = rng.permuted(placed, axis=1)
    found = groups_on_nodes(placed, [24] * 3, nodes)
    assert found == groups_in_loops(placed, 24, nodes)
    assert shuffled or groups in found


@given(
    seed=st.integers(0, 2**32 - 1),
    policy=st.sampled_from(["deepseek", "vllm", "sglang"]),
    nodes=st.sampled_from([1, 2, 4]),
    of_node=st.sampled_from([1, 2, 4]),
    stated=st.booleans(),
)
@settings(max_examples=60)
def test_groups_of_any_policy_are_seen_and_no_others(
    seed: int, policy: str, nodes: int, of_node: int, stated: bool
) -> None:
    """One node is a global policy: nothing is seen, on whatever nodes it is looked for."""
    rng = np.random.default_rng(seed)
    groups = nodes * of_node if nodes > 1 else 1
    now = np.tile(np.r_[np.arange(32), np.arange(8)], (3, 1)).astype(np.int32)
    layers = {i: LayerHistory([0], [8], [slots]) for i, slots in enumerate(now)}
    for step in range(100, 900, 100):
        weight = rng.gamma(0.5, 1000, (3, 32)).astype(np.int64)
        now = place(named(policy), Problem(weight, 40, 8, nodes, groups, now))
        for i, slots in enumerate(now):
            layers[i].insert(step, 8, slots)
    shown = ShownGroups(PlacementHistory(layers, [], []), Shape(8, 3, 40), 32)
    assert shown.enough(2)
    for other in (2, 4, 8):
        found = shown.on_nodes(other)
        if nodes % other:
            assert found == []
        elif other == nodes:
            assert groups in found


def test_groups_cannot_be_seen_on_one_node() -> None:
    assert groups_on_nodes(np.array([[0, 1, 2, 3]], np.int32), [4], 1) == []
    assert groups_on_nodes(np.empty((0, 4), np.int32), [], 2) == []


def test_experts_in_order_are_not_groups() -> None:
    """What an engine starts with, ranks that swap all they hold, and layers not moved yet say nothing."""
    order = np.arange(32, dtype=np.int32)
    layers = {i: LayerHistory([0], [8], [order]) for i in range(40)}
    assert ShownGroups(PlacementHistory(layers, [], []), Shape(8, 40, 32), 32).on_nodes(2) == []
    layers[0].insert(100, 8, order[::-1].copy())
    assert ShownGroups(PlacementHistory(layers, [], []), Shape(8, 40, 32), 32).on_nodes(2) == []
    for i in range(40):
        layers[i].insert(200, 8, np.roll(order, 4 * (i + 1)))
    shown = ShownGroups(PlacementHistory(layers, [], []), Shape(8, 40, 32), 32)
    assert [shown.on_nodes(nodes) for nodes in (2, 4, 8)] == [[], [], []]
