"""`advise` on runs whose right verdict is known; its gain is computed in another way here."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import assert_golden, cli, one_error, open_writer, write
from planted import without_ms

from eplb_analyze import open_run
from eplb_analyze.metrics import bootstrap
from eplb_analyze.policies import policy
from eplb_analyze.policies.policy import POLICIES
from eplb_analyze.reader.recorded_setting import Recorded, Setting
from eplb_analyze.replay.advice import Advice
from eplb_analyze.replay.advise import advise as advise_run
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.settings import FIXED, Choices, engine_arguments
from eplb_dump import ExpertLoadWriter

EXPERTS, RANKS, STEPS = 16, 4, 400

#: By tokens, as these recordings' times show nothing of imbalance.
advise = functools.partial(advise_run, objective=Objective.TOKENS)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())


def record(
    root: Path, kind: str, *, steps: int = STEPS, rearrange: int | None = None, seed: int = 1, **options: Any
) -> Path:
    """Record a run of two layers.

    Args:
        kind: ``noise``: all experts alike; ``steady``: those of rank 0 are hot; ``moving``: another four
            are hot every 50 steps; ``turned``: steady for 60% of the steps, then noise.
        rearrange: the engine's interval; its rearrangements gain nothing.
    """
    rng = np.random.default_rng(seed)
    slots = np.tile(np.arange(EXPERTS), (2, 1))
    with ExpertLoadWriter(
        root,
        model="org/moe",
        num_logical_experts=EXPERTS,
        ep_size=RANKS,
        scope="global",
        run_id="r",
        **options,
    ) as writer:
        for step in range(steps):
            hot = 4 * (step // 50 % 4 if kind == "moving" else 0)
            popular = np.ones(EXPERTS, np.int64)
            if kind != "noise" and not (kind == "turned" and step >= 0.6 * steps):
                popular[hot : hot + 4] = 5
            if rearrange and step and step % rearrange == 0:
                slots = slots[:, ::-1]
            # Integers only: what draws of floats give depends on the processor's mathematical library.
            chances = np.repeat(np.arange(EXPERTS), popular[slots[0]])
            tokens = chances[rng.integers(len(chances), size=(2, 2000))]
            writer.record(step, np.stack([np.bincount(own, minlength=EXPERTS) for own in tokens]), slots)
    return root


GRID = Choices(policies=["deepseek", "static"], redundant=[0], intervals=[10, 50], windows=[10])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rearrange", [None, 40])
def test_noise_is_no_reason_to_change(tmp_path: Path, seed: int, rearrange: int | None) -> None:
    advice = advise(open_run(record(tmp_path, "noise", seed=seed, rearrange=rearrange)))
    assert advice.verdict == "leave"
    assert advice.gain is not None
    assert abs(advice.gain.value) < 0.01
    assert advice.to_json()["advised"] is None


def test_lasting_imbalance_is_worth_enabling(tmp_path: Path) -> None:
    advice = advise(open_run(record(tmp_path, "steady")), GRID)
    assert advice.verdict == "enable"
    assert advice.best is not None
    assert advice.gain is not None
    # Rank 0 has 20 of 32 parts; balanced, each rank has 8, apart from noise.
    assert advice.gain.value == pytest.approx(1 - 8 / 20, abs=0.03)
    assert advice.gain.low < advice.gain.value < advice.gain.high
    # Both intervals are as good; the longer moves less.
    assert advice.best.setting == Setting("deepseek", 0, RANKS, 50, 10, 50)


def test_interval_longer_than_the_drift_is_retuned(tmp_path: Path) -> None:
    """The engine reverses the slots every 100 steps, which never helps; the hot experts move every 50."""
    advice = advise(open_run(record(tmp_path, "moving", rearrange=100)), GRID)
    assert advice.verdict == "retune"
    assert advice.best is not None
    assert advice.best.setting is not None
    assert advice.best.setting.interval == 10
    assert advice.replay is not None
    assert advice.replay.recorded.interval == 100


def test_gain_only_in_the_training_part_is_no_reason_to_change(tmp_path: Path) -> None:
    """Loads are skewed while a setting is chosen, and even while it is judged."""
    advice = advise(open_run(record(tmp_path, "turned")), GRID)
    assert advice.verdict == "leave"
    assert advice.training_gain is not None
    assert advice.training_gain > 0.4
    assert advice.gain is not None
    assert abs(advice.gain.value) < 0.02


def test_harmful_rearranging_is_switched_off(tmp_path: Path) -> None:
    """The first placement is good; then the engine puts all hot experts on one rank."""
    good, bad = np.arange(EXPERTS).reshape(4, 4).T.ravel(), np.arange(EXPERTS)
    popular = np.where(np.arange(EXPERTS) < 4, 5.0, 1.0) / 32
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, scope="global", run_id="r"
    ) as writer:
        for step in range(STEPS):
            slots = np.tile(good if step < 20 else bad, (2, 1))
            load = np.random.default_rng(step).multinomial(2000, popular[slots[0]], size=2)
            writer.record(step, load, slots)
    advice = advise(open_run(tmp_path), Choices(policies=["static"]))
    assert advice.verdict == "retune"
    assert advice.best is not None
    assert advice.best.setting == Setting("static", 0, RANKS, None, None, None)


def test_gain_and_interval_come_from_the_judged_steps(tmp_path: Path) -> None:
    advice = advise(open_run(record(tmp_path, "moving")), GRID)
    played = advice.replay
    assert played is not None
    assert advice.best is not None
    assert advice.gain is not None
    assert advice.trained is not None
    assert advice.judged is not None
    assert (advice.trained.first_step, advice.trained.last_step, advice.trained.steps) == (0, 239, 240)
    assert (advice.judged.first_step, advice.judged.last_step, advice.judged.steps) == (240, 399, 160)
    index = next(i for i, o in enumerate(played.outcomes) if o.setting == advice.best.setting)
    row = played.rows[index]
    today, other = played.scores.maximum[TODAY], played.scores.maximum[row]
    assert advice.gain.value == pytest.approx(1 - other[240:].sum() / today[240:].sum())
    assert advice.training_gain == pytest.approx(1 - other[:240].sum() / today[:240].sum())
    # Resample blocks of steps of both settings together, as their noise is common.
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        start = rng.integers(160, size=8)
        at = (240 + (start[:, None] + np.arange(20)) % 160).ravel()
        drawn.append(1 - other[at].sum() / today[at].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert advice.gain.low == pytest.approx(low, abs=0.5 * (high - low))
    assert advice.gain.high == pytest.approx(high, abs=0.5 * (high - low))
    moves = [move for move in played.outcomes[index].moves if move.step >= 240]
    assert advice.best.rearrangements == len(moves)
    assert advice.best.weights_moved == sum(move.weights for move in moves)


def test_cost_is_subtracted_from_the_gain(tmp_path: Path) -> None:
    run = open_run(record(tmp_path, "steady"))
    one = [Setting("deepseek", 0, RANKS, 50, 10, 50)]
    free = advise(run, one, cost_per_expert_ms=0.0)
    assert free.gain is not None
    assert free.break_even_ms is not None
    assert free.replay is not None
    assert free.replay.seconds is not None
    half = advise(run, one, cost_per_expert_ms=free.break_even_ms / 2)
    assert half.gain is not None
    assert half.best is not None
    assert free.best is not None
    assert half.best.setting == free.best.setting
    assert half.gain.value == pytest.approx(free.gain.value / 2)
    assert half.gain.high - half.gain.low == pytest.approx(free.gain.high - free.gain.low)
    dear = advise(run, one, cost_per_expert_ms=50 * free.break_even_ms)
    assert dear.verdict == "leave"


def test_gain_below_min_gain_is_not_worth_a_change(tmp_path: Path) -> None:
    run = open_run(record(tmp_path, "steady"))
    assert advise(run, GRID, min_gain=0.5).verdict == "enable"
    kept = advise(run, GRID, min_gain=0.7)
    assert kept.verdict == "leave"
    assert "less than 70.0%" in kept.reasons[0]


def test_too_little_data_gives_no_verdict(tmp_path: Path) -> None:
    few = advise(open_run(record(tmp_path / "few", "steady", steps=40)))
    assert (few.verdict, few.best) == ("not enough data", None)
    assert "40 complete steps under a known placement, at least 64 are needed" in few.reasons[0]
    seldom = advise(open_run(record(tmp_path / "seldom", "steady")), Choices(intervals=[300], redundant=[0]))
    assert seldom.verdict == "not enough data"
    assert "no setting tried rearranges in the first 240 steps" in seldom.reasons[0]
    with ExpertLoadWriter(
        tmp_path / "nowhere", model="m", num_logical_experts=2, ep_size=2, scope="global"
    ) as writer:
        for _ in range(100):
            writer.record(None, np.ones((1, 2), int), None)
    unknown = advise(open_run(tmp_path / "nowhere"))
    assert unknown.verdict == "not enough data"
    assert "placement of a layer is not known" in unknown.reasons[0]
    with ExpertLoadWriter(
        tmp_path / "idle", model="m", num_logical_experts=2, ep_size=2, scope="global"
    ) as writer:
        for _ in range(100):
            writer.record(None, np.zeros((1, 2), int), np.array([[0, 1]]))
    assert "steps with tokens" in advise(open_run(tmp_path / "idle")).reasons[0]


def test_uneven_replicas_are_noted_if_they_outweigh_the_gain(tmp_path: Path) -> None:
    """One replica of the hot expert gets all its tokens, which no placement would change."""
    slots = np.array([[0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 0, 9, 10, 11, 12, 0, 13, 14, 15, 15]])
    tokens = np.array([[1600, 300, 300, 100, 100, 0, *[100] * 4, 0, *[100] * 4, 0, *[100] * 4]])
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, scope="global", run_id="r"
    ) as writer:
        for step in range(STEPS):
            writer.record(step, np.random.default_rng(step).poisson(tokens), slots)
    advice = advise(open_run(tmp_path), Choices(redundant=[4], intervals=[50], windows=[50]))
    assert advice.verdict == "enable"
    assert advice.gain is not None
    # Split evenly, rank 0 has 1200 of 3600 tokens; as recorded it has 2400.
    assert advice.gain.value < 0.3
    assert "did not share their tokens evenly" in advice.notes[-1]


@pytest.mark.parametrize(
    ("recorded", "verdict"),
    [
        (Recorded(None, 0, 4, None, None, None, None), "enable"),
        (Recorded("sglang", 0, 4, 1000, 1000, 1001, False), "enable"),
        (Recorded("sglang", 0, 4, 1000, 1000, 1001, True), "retune"),
        (Recorded("vllm", 0, 4, 3000, 1000, 750, None), "retune"),
    ],
)
def test_engine_that_will_rearrange_is_retuned_else_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Recorded, verdict: str
) -> None:
    monkeypatch.setattr("eplb_analyze.replay.replay.recorded", lambda run, shape: recorded)
    assert advise(open_run(record(tmp_path, "steady")), GRID).verdict == verdict


def test_engine_arguments() -> None:
    vllm = engine_arguments("vllm", Setting("vllm", 32, 32, 500, 1000, 125))
    assert vllm is not None
    name, config = vllm.split(" --eplb-config ")
    assert name == "--enable-eplb"
    assert json.loads(config.strip("'")) == {
        "num_redundant_experts": 32, "step_interval": 500, "window_size": 1000
    }  # fmt: skip
    assert engine_arguments("sglang", Setting("sglang", 16, 8, 200, 100, 201)) == (
        "--enable-eplb --ep-num-redundant-experts 16 --eplb-rebalance-num-iterations 200 "
        "--expert-distribution-recorder-buffer-size 100"
    )
    named = engine_arguments("sglang", Setting("sglang", 16, 8, 200, 100, 201, "sglang-dynamic"))
    assert named is not None
    assert named.endswith("--expert-distribution-recorder-buffer-size 100 --ep-dispatch-algorithm dynamic")
    assert engine_arguments("vllm", Setting("deepseek", 32, 32, 500, 1000, 125)) is None
    assert engine_arguments(None, Setting("vllm", 32, 32, 500, 1000, 125)) is None


@pytest.mark.parametrize(("least", "code"), [("0.3", 0), ("0.9", 1)])
def test_fail_below_sets_the_exit_code(tmp_path: Path, least: str, code: int) -> None:
    root = record(tmp_path, "steady")
    done = cli(
        "advise", "--objective", "tokens", "--interval-steps", "50", "--fail-below", least, "--json", root
    )
    document = json.loads(done.stdout)
    assert (done.returncode, document["passed"], document["fail_below"]) == (code, not code, float(least))
    assert 0.3 < document["measured"]["balancedness"] < 0.9
    if code:
        one_error(done, 1, "balancedness 0.4", "--fail-below 0.9")


def test_fail_below_fails_if_the_balancedness_is_unknown(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.ones((1, 2), int), None)
    one_error(cli("advise", "--fail-below", "0.1", tmp_path), 1, "the balancedness is not known")
    assert cli("advise", tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--min-gain", "2"], ["--min-gain"]),
        (["--fail-below", "x"], ["--fail-below"]),
        (["--window-steps", "0"], ["from 1 to"]),
    ],
)
def test_malformed_option_is_rejected(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    result = cli("advise", *arguments, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert all(word in result.stderr for word in words), result.stderr


def test_damaged_segment_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, steps=200)
    victim = sorted(tmp_path.glob("run=*/model=*/rank=00001/session=*/loads-*.parquet"))[2]
    victim.write_bytes(victim.read_bytes()[:-100])
    result = cli("advise", "--json", tmp_path)
    one_error(result, 3, victim.name)
    assert json.loads(result.stdout)["steps"]["incomplete"] == 16


def stable_order(keys: Any, names: Any) -> Any:
    return np.argsort(-keys, axis=-1, kind="stable")


@pytest.mark.parametrize("form", ["txt", "json"])
@pytest.mark.parametrize("kind", ["moving", "noise"])
def test_golden(tmp_path: Path, form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # numpy's order of equal loads, which vLLM's policy follows, depends on the processor.
    monkeypatch.setattr(policy, "VLLM", replace(policy.VLLM, order=stable_order))
    root = record(tmp_path, kind, rearrange=100)
    with_json = ["--json"] if form == "json" else []
    result = cli(
        "advise",
        "--objective",
        "tokens",
        "--redundant-experts",
        "0",
        "--interval-steps",
        "10,50",
        *with_json,
        root,
    )
    assert (result.returncode, result.stderr) == (0, "")
    output = result.stdout
    if form == "json":
        # The last digits of a matrix product depend on the processor.
        document = json.loads(output, parse_float=lambda text: round(float(text), 9))
        output = json.dumps(without_ms(document), indent=2) + "\n"
    assert_golden(f"advise-{kind}.{form}", output, tolerance=1e-8 if form == "json" else 0.0)


def test_confidence_is_that_of_the_bootstrap(tmp_path: Path) -> None:
    advice: Advice = advise(open_run(record(tmp_path, "steady")), GRID)
    assert advice.to_json()["confidence"] == bootstrap.CONFIDENCE


# ---- uniform routing


def uniform(root: Path, tokens_per_expert: float, seed: int, *, steps: int = 250, top_k: int = 4) -> Path:
    """Every token goes to ``top_k`` experts, all sets of them alike; two layers, no redundant experts."""
    rng, experts = np.random.default_rng(seed), 32
    with open_writer(root, num_logical_experts=experts, ep_size=8, scope="global") as writer:
        for step in range(steps):
            tokens = max(1, round(tokens_per_expert * experts / top_k))
            if tokens <= 64:
                chosen = np.argsort(rng.random((2, tokens, experts)), axis=2)[:, :, :top_k].reshape(2, -1)
                load = np.stack([np.bincount(layer, minlength=experts) for layer in chosen])
            else:
                load = rng.multinomial(tokens * top_k, [1 / experts] * experts, 2)
            writer.record(step, load, np.tile(np.arange(experts), (2, 1)))
            if step % 100 == 0:
                writer.flush()
    return root


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens_per_expert", [0.5, 1, 2, 4, 10, 50, 1000])
def test_uniform_routing_is_left_as_it_is(tmp_path: Path, tokens_per_expert: float, seed: int) -> None:
    """Redundant experts would seem to help if their tokens could be halved: by 5% at 4 tokens per expert."""
    advice = advise(open_run(uniform(tmp_path, tokens_per_expert, seed)))
    assert advice.verdict == "leave"
    assert advice.replay is not None
    today = advice.replay.today.idle_fraction
    for outcome in advice.replay.outcomes:
        assert outcome.idle_fraction is not None
        assert today is not None
        # Random placements of equal experts have equal idle fractions, but for the noise of these steps.
        assert today - outcome.idle_fraction < 0.04 / max(1, tokens_per_expert) ** 0.5


#: Not the oracle, which no engine has.
EVERY_POLICY = [name for name in POLICIES if name not in FIXED]


@pytest.mark.parametrize("tokens_per_expert", [0.5, 4, 50, 1000])
def test_uniform_routing_is_left_as_it_is_by_every_policy(tmp_path: Path, tokens_per_expert: float) -> None:
    run = open_run(uniform(tmp_path, tokens_per_expert, 3))
    choices = Choices([*EVERY_POLICY, "oracle"], [0, 8, 16], [25, 60], max_moves=(None, 20))
    advice = advise(run, choices)
    assert advice.verdict == "leave"
    assert advice.replay is not None
    assert len(advice.replay.outcomes) == len(EVERY_POLICY) * 3 * 2 * 2 * 2 + 3


def test_oracle_is_never_advised(tmp_path: Path) -> None:
    """It gains from the noise of each step, which no setting can know before."""
    run = open_run(uniform(tmp_path, 2, 5))
    advice = advise(run, Choices(["static", "oracle", "deepseek"], [0, 8], [50], [50]))
    assert advice.replay is not None
    assert advice.replay.outcomes[0].setting is not None
    assert advice.replay.outcomes[0].setting.policy == "oracle"
    assert advice.replay.outcomes[0].time_saved is not None
    assert advice.replay.outcomes[0].time_saved > 0.2
    assert advice.verdict == "leave"
    assert advice.best is not None
    assert advice.best.setting is not None
    assert advice.best.setting.policy != "oracle"
    assert advice.changes is not None
    assert "oracle" not in {change.setting.policy for change in advice.changes.rows}
    alone = advise(run, Choices(["oracle"], [0]))
    assert (alone.verdict, alone.reasons) == ("not enough data", ["no setting was tried but today's"])


def test_redundant_experts_do_not_help_at_few_tokens(tmp_path: Path) -> None:
    """The time that they save by replay is that of routing simulated token by token."""
    rng = np.random.default_rng(0)
    run = open_run(uniform(tmp_path, 4, 7, steps=1200))
    setting = Setting("deepseek", 32, 8, 400, 400, 400)
    played = replay_run(run, [setting], keep_placements=True)
    assert played.placements is not None
    today = dealt = 0.0
    for block in run.blocks():
        loads = np.concatenate([part for _, part in block.load_parts(block.recorded, 0, 2)], axis=1)
        for step, load in zip(block.recorded.tolist(), loads, strict=True):
            placed = next(slots for first, slots in reversed(played.placements[0]) if first <= step)
            today += load.reshape(2, 8, -1).sum(axis=2).max(axis=1).sum()
            for layer in range(2):
                per_slot = np.zeros(64, int)
                for expert in range(32):
                    at = np.flatnonzero(placed[layer] == expert)
                    chosen = at[rng.integers(len(at), size=load[layer, expert])]
                    np.add.at(per_slot, chosen, 1)
                dealt += per_slot.reshape(8, -1).sum(axis=1).max()
    assert played.outcomes[0].time_saved == pytest.approx(1 - dealt / today, abs=0.005)
    assert -0.03 < 1 - dealt / today < 0
