"""Conditions of a setting: thresholds, parts, delays and limits of moves, against plain loops."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import cli, one_error
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.policies.policy import POLICIES, Problem
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.conditions import fetched, in_parts, limited, rank_tokens, worst_balancedness
from eplb_analyze.replay.replay import Outcome, replay_run
from eplb_analyze.replay.settings import engine_arguments
from eplb_dump import ExpertLoadWriter

Array = np.ndarray[Any, np.dtype[np.int64]]
LAYERS, EXPERTS, RANKS, STEPS = 3, 8, 4, 120


def load(step: int) -> Array:
    """The two hot experts, which begin on one rank, change every 30 steps; layer 2 is balanced."""
    out = np.full((LAYERS, EXPERTS), 10)
    out[:2, [step // 30 * 2, step // 30 * 2 + 1]] = 45
    return out


@pytest.fixture
def dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=0, scope="global",
        segment_steps=16,
    ) as writer:  # fmt: skip
        for step in range(STEPS):
            writer.record(step, load(step), np.tile(np.arange(EXPERTS), (LAYERS, 1)))
    return tmp_path


def played(
    dump: Path, policy: str = "deepseek", redundant: int = 0, **conditions: Any
) -> tuple[Outcome, Any]:
    setting = Setting(policy, redundant, RANKS, 10, 10, 10, **conditions)
    result = replay_run(open_run(dump), [setting], workers=1, keep_placements=True)
    assert result.placements is not None
    return result.outcomes[0], result.placements[0]


def balancedness(load: Array, placement: Array) -> list[float]:
    """Of each layer, without copies."""
    found = []
    for tokens, slots in zip(load, placement, strict=True):
        ranks = [sum(tokens[expert] for expert in held) for held in slots.reshape(RANKS, -1).tolist()]
        found.append(sum(ranks) / RANKS / max(ranks))
    return found


DUE = range(10, STEPS, 10)


def test_rearranges_only_at_the_utilization_or_below(dump: Path) -> None:
    """The utilization is a mean over layers and over the steps since it was due last."""
    counts: list[int] = []
    for limit in (0.2, 0.5, 0.62, 0.7, 0.75, 0.8, 1.0):
        outcome, placements = played(dump, max_utilization=limit)
        current, fired = placements[0][1], []
        for due in DUE:
            recent = [np.mean(balancedness(load(step), current)) for step in range(due - 10, due)]
            if np.mean(recent) <= limit:
                fired.append(due)
                current = POLICIES["deepseek"](Problem(load(due - 1) * 10, EXPERTS, RANKS, current=current))
        assert [move.step for move in outcome.moves] == fired
        assert outcome.skipped == len(DUE) - len(fired)
        counts.append(len(fired))
    assert counts[0] == 0
    assert counts[-1] == len(DUE)
    assert len(set(counts)) > 2


def test_rearranges_only_if_a_layer_is_below_the_balancedness(dump: Path) -> None:
    counts = []
    for limit in (0.1, 0.4, 0.5, 0.69, 1.0):
        outcome, placements = played(dump, min_balancedness=limit)
        current, fired = placements[0][1], []
        for due in DUE:
            window = sum(load(step) for step in range(due - 10, due))
            if min(balancedness(window, current)) < limit:
                fired.append(due)
                current = POLICIES["deepseek"](Problem(window, EXPERTS, RANKS, current=current))
        assert [move.step for move in outcome.moves] == fired
        counts.append(len(fired))
    assert counts[0] == 0
    assert counts[-1] == len(DUE)
    assert len(set(counts)) > 2


@pytest.mark.parametrize(("layers", "delay"), [(1, 0), (2, 0), (None, 4), (1, 3), (3, 7)])
def test_layers_change_late_and_in_parts(dump: Path, layers: int | None, delay: int) -> None:
    outcome, found = played(dump, layers_per_step=layers, delay=delay)
    _, at_once = played(dump)
    targets = dict(at_once[1:])
    parts = -(-LAYERS // (layers or LAYERS))
    # The block ends after 16 steps, so parts of a rearrangement can be in the next one.
    expected = {}
    for due in DUE:
        for part in range(parts):
            expected[due + delay + part] = min(LAYERS, (part + 1) * (layers or LAYERS))
    assert [step for step, _ in found[1:]] == list(expected)
    for step, slots in found[1:]:
        due = (step - delay) // 10 * 10
        changed = expected[step]
        before = targets.get(due - 10, at_once[0][1])
        np.testing.assert_array_equal(slots, np.concatenate([targets[due][:changed], before[changed:]]))
    # What changes after the last step is no price of these steps.
    changes = [due + delay for due in DUE if due + delay < STEPS]
    assert [move.step for move in outcome.moves] == changes
    assert outcome.weights_moved == sum(move.weights for move in played(dump)[0].moves[: len(changes)])


def test_steps_are_scored_under_the_placement_of_each_part(dump: Path) -> None:
    """Without copies the scores are those of plain loops, step by step."""
    for conditions in ({"layers_per_step": 1, "delay": 5}, {"delay": 9}, {}):
        outcome, placements = played(dump, **conditions)
        figures = []
        for step in range(STEPS):
            current = [slots for start, slots in placements if start <= step][-1]
            figures.append(np.mean(balancedness(load(step), current)))
        assert outcome.balancedness == pytest.approx(np.mean(figures), abs=1e-9)


def test_rearrangement_under_way_is_not_interrupted(dump: Path) -> None:
    outcome, found = played(dump, layers_per_step=1, delay=12)
    # Due at 10, 20, …; the layers change in steps 22, 23 and 24, so those due at 20 do not happen.
    assert [move.step for move in outcome.moves] == [
        due + 12 for due in DUE if due % 20 == 10 and due + 12 < STEPS
    ]
    assert outcome.skipped == len([due for due in DUE if due % 20 == 0])
    assert [step for step, _ in found[1:4]] == [22, 23, 24]


@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(0, 40))
@hypothesis_settings(max_examples=100)
def test_limit_on_moves_is_respected(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 50, (4, 8))
    current, new = (
        np.stack([rng.permutation(np.r_[0:8, rng.integers(0, 8, 4)]) for _ in range(4)]).astype(np.int32)
        for _ in range(2)
    )
    out = limited(current, new, weight, RANKS, limit)
    assert fetched(current, out, RANKS, 8).sum() <= limit
    for layer in range(4):
        assert out[layer].tolist() in (current[layer].tolist(), new[layer].tolist())
        before, after = (rank_tokens(weight, each, RANKS)[layer].max() for each in (current, out))
        assert after <= before * (1 + 1e-12)


def test_moves_go_where_they_relieve_most(dump: Path) -> None:
    weight = np.array([[9, 9, 1, 1], [50, 50, 1, 1], [5, 5, 5, 5]])
    current = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    new = np.tile(np.array([0, 2, 1, 3], np.int32), (3, 1))
    assert fetched(current, new, 2, 4).sum(axis=1).tolist() == [2, 2, 2]
    out = limited(current, new, weight, 2, 3)
    assert out.tolist() == [current[0].tolist(), new[1].tolist(), current[2].tolist()]
    assert limited(current, new, weight, 2, 100)[2].tolist() == current[2].tolist()  # it relieves nothing
    free = played(dump)[0]
    assert max(move.weights for move in free.moves) > 3
    assert all(move.weights <= 3 for move in played(dump, max_moves=3)[0].moves)


def test_uniform_loads_never_pass_a_threshold_below_1() -> None:
    weight = np.full((2, 8), 7)
    placement = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    assert worst_balancedness(weight, placement, 4) == 1.0
    assert worst_balancedness(weight * [[1], [0]], placement, 4) == 1.0  # a layer without tokens
    assert in_parts(placement, placement[:, ::-1], None)[0].tolist() == placement[:, ::-1].tolist()


def test_memory_of_a_gpu_counts_filled_slots(dump: Path) -> None:
    assert played(dump)[0].experts_per_gpu == LAYERS * 2
    assert played(dump, redundant=8)[0].experts_per_gpu == LAYERS * 4
    half = played(dump, "layer_budgets", 8)[0]
    assert LAYERS * 2 <= half.experts_per_gpu <= LAYERS * 3


def test_engine_arguments_of_conditions() -> None:
    setting = Setting("sglang", 4, 8, 100, 100, 101, max_utilization=0.8, layers_per_step=2)
    text = engine_arguments("sglang", setting)
    assert text is not None
    assert "--eplb-min-rebalancing-utilization-threshold 0.8" in text
    assert "--eplb-rebalance-layers-per-chunk 2" in text
    assert engine_arguments("sglang", Setting("sglang", 4, 8, 100, 100, 101, max_moves=5)) is None
    assert engine_arguments("vllm", Setting("vllm", 4, 8, 100, 100, 25, min_balancedness=0.5)) is None


@pytest.mark.parametrize(
    ("recorded", "stated"),
    [({}, None), ({"eplb_config.use_async": True}, None), ({"eplb_config.use_async": False}, False)],
)
@pytest.mark.parametrize(
    "setting", [Setting("vllm", 4, 8, 100, 100, 25), Setting("static", 0, 8, None, None, None)]
)
def test_a_synchronous_vllm_stays_synchronous(
    recorded: dict[str, Any], stated: bool | None, setting: Setting
) -> None:
    text = engine_arguments("vllm", setting, recorded)
    assert text is not None
    config = json.loads(shlex.split(text)[-1])
    assert config.get("use_async") is stated
    assert config["num_redundant_experts"] == setting.num_redundant_experts


def test_options_combine_conditions(dump: Path) -> None:
    done = cli(
        "replay", "--policy", "deepseek", "--redundant-experts", "0", "--interval-steps", "10",
        "--window-steps", "10", "--max-utilization", "none,.7,0.75", "--max-moves", "none,3", str(dump),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "util ≤: rearranges only at this utilization or less" in " ".join(done.stdout.split())
    assert "…" not in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("deepseek")]
    assert {(row[-5], row[-4]) for row in rows} == {(u, m) for u in ("–", "0.7", "0.75") for m in ("–", "3")}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-utilization", "1.5", "not a list of numbers above 0 and up to 1"),
        ("--min-balancedness", "0", "not a list of numbers above 0 and up to 1"),
        ("--min-balancedness", "none,x", "not a list of numbers above 0 and up to 1"),
        ("--layers-per-step", "0", "not a list of whole numbers from 1"),
        ("--delay-steps", "none", "not a list of whole numbers from 0"),
        ("--max-moves", "-3", "not a list of whole numbers from 1"),
    ],
)
def test_malformed_condition_is_rejected(dump: Path, option: str, value: str, says: str) -> None:
    one_error(cli("replay", option, value, str(dump)), 2, option, says)
