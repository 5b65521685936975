"""`advise` searches by itself: what it tries, what its alternatives are and cost, and what is chance."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import cli, open_vllm_writer, open_writer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted import EXPERTS, LAYERS, RANKS, SLOTS, record_engine

from eplb_analyze import open_run
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay import advise as advise_module
from eplb_analyze.replay.advice import Advice
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.judging import Judging
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.replay.setting_run import Move

REDUNDANT = SLOTS - EXPERTS
STATIC = Setting("static", REDUNDANT, RANKS, None, None, None)


def tried(advice: Advice) -> set[Setting]:
    assert advice.replay is not None
    return {outcome.setting for outcome in advice.replay.outcomes if outcome.setting is not None}


# ---- rearranging less often


def test_rearranging_less_often_is_advised_with_what_the_pauses_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imbalance is free here, so a rearrangement is only its pause of 400 ms; a step takes 5 ms."""
    record_engine(tmp_path, monkeypatch, steps=900, interval=100, pause_ms=400)
    advice = advise(open_run(tmp_path))
    assert (advice.verdict, advice.less_often) == ("retune", True)
    assert advice.best is not None
    assert advice.today is not None
    assert advice.net_ms_per_step is not None
    # Eight rearrangements in 900 steps.
    assert advice.net_ms_per_step.low < 8 * 400 / 900 < advice.net_ms_per_step.high
    assert advice.today.price.pause_ms_per_1000_steps == pytest.approx(8 * 400 / 0.9, rel=0.05)
    assert advice.best.price.pause_ms_per_1000_steps == 0
    # 400 ms are less than 2% of the time of 4,000 steps of 5 ms.
    assert advice.least_interval == pytest.approx(4000, rel=0.1)
    pauses = [judged.price.pause_ms_per_1000_steps or 0 for judged in (*advice.options, advice.today)]
    assert pauses == sorted(pauses)
    assert pauses[2] < pauses[3]
    text = " ".join(cli("advise", tmp_path).stdout.split())
    assert text.startswith("m · run r REARRANGE LESS OFTEN: never rearrange instead of every 100 steps")
    assert "Rearrangements cost more than they gain" in text
    assert f"With an interval of {advice.least_interval:,} steps or more, pauses take less than 2%" in text
    assert "price per 1,000 steps: no pauses, nothing moved" in text


def test_rearranging_more_often_is_not_called_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hot experts change every 150 steps, the engine rearranges every 300, and pauses take 2 ms."""
    record_engine(
        tmp_path, monkeypatch, per_token_ms=0.02, pause_ms=2.0, steps=900, interval=300, drift=150, skew=12.0
    )
    advice = advise(open_run(tmp_path))
    assert (advice.verdict, advice.less_often, advice.least_interval) == ("retune", False, None)
    assert advice.best is not None
    assert advice.best.setting is not None
    assert advice.best.setting.interval is not None
    assert advice.best.setting.interval < 300


# ---- alternatives


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("drifting")
    with pytest.MonkeyPatch.context() as patch:
        record_engine(
            root, patch, per_token_ms=0.02, pause_ms=30.0, steps=900, interval=300, drift=150, skew=12.0
        )
    return root, advise(open_run(root), expert_mb=2.5)


def test_alternatives_are_of_other_kinds(drifting: Any) -> None:
    advice: Advice = drifting[1]
    options = [judged.setting for judged in advice.options]
    assert len(options) == 3
    assert advice.replay is not None
    today = advice.replay.recorded

    def kind(setting: Setting | None) -> Any:
        assert setting is not None
        more = np.sign(setting.num_redundant_experts - today.num_redundant_experts)
        rhythm = None if setting.interval is None else np.sign(setting.interval - (today.interval or 0))
        limits = setting.max_utilization is None and setting.min_balancedness is None
        return setting.policy, rhythm, min(0, more) if rhythm is None else more, limits

    for one, other in itertools.combinations(options, 2):
        assert kind(one) != kind(other)


def test_price_is_what_the_replay_moves(drifting: Any) -> None:
    root, advice = drifting
    own = [judged.setting for judged in advice.options]
    played = replay_run(open_run(root), own, keep_placements=True)
    assert played.placements is not None
    for outcome, placements in zip(played.outcomes, played.placements, strict=True):
        judged = next(each for each in advice.options if each.setting == outcome.setting)
        fetched = moves = 0
        for (_, old), (_, new) in itertools.pairwise(placements):
            held = [slots.reshape(LAYERS, RANKS, -1) for slots in (old, new)]
            fetched += sum(
                len({*held[1][layer, rank].tolist()} - {*held[0][layer, rank].tolist()})
                for layer in range(LAYERS)
                for rank in range(RANKS)
            )
            moves += 1
        price, slots = judged.price, placements[0][1].shape[1]
        if judged.setting.layers_per_step is None:
            assert price.rearrangements_per_1000_steps == pytest.approx(moves / 0.9)
        assert price.weights_moved_per_1000_steps == pytest.approx(fetched / 0.9)
        assert price.gb_moved_per_1000_steps == pytest.approx(fetched / 0.9 * 2.5e-3)
        assert price.redundant_experts_per_gpu == LAYERS * (slots - EXPERTS) / RANKS
        assert price.redundant_gb_per_gpu == pytest.approx(price.redundant_experts_per_gpu * 2.5e-3)


def test_gain_beside_an_alternative_is_the_difference_of_the_gains(drifting: Any) -> None:
    advice: Advice = drifting[1]
    assert advice.gain is not None
    for judged in advice.alternatives:
        assert judged.gain is not None
        assert judged.best_saves is not None
        assert judged.best_saves.value == pytest.approx(advice.gain.value - judged.gain.value, abs=1e-6)


def compared(monkeypatch: pytest.MonkeyPatch, advice: Advice, root: Path, beside: Interval) -> str | None:
    """The comparison if the advised setting saved so much beside each alternative."""
    real = Judging.saved

    def saved(self: Judging, index: int, *, judged: bool, beside: int | None = None) -> Any:
        found = real(self, index, judged=judged, beside=beside)
        return found if beside is None or found is None else replace(found, share=interval)

    interval = beside
    monkeypatch.setattr(Judging, "saved", saved)
    return advise(open_run(root)).comparison


def test_alternatives_within_chance_are_called_indistinguishable(
    drifting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, advice = drifting
    assert advice.verdict == "retune"
    unsure = compared(monkeypatch, advice, root, Interval(0.01, -0.01, 0.03))
    assert unsure is not None
    assert "statistically indistinguishable from the advised setting" in unsure
    assert "cheapest" in unsure


def test_significant_lead_is_called_so(drifting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, advice = drifting
    found = compared(monkeypatch, advice, root, Interval(0.03, 0.02, 0.04))
    assert found == "Its lead over the alternatives is statistically significant"


def test_of_settings_that_move_as_much_the_one_that_rearranges_less_is_cheaper(drifting: Any) -> None:
    played = drifting[1].replay
    base = replace(played.outcomes[0], moves=[Move(40, 6, 2)])
    often = replace(base, moves=[*base.moves, Move(80, 0, 0), Move(120, 0, 0)])
    more = replace(base, moves=[Move(40, 7, 2)])
    judging = Judging(replace(played, outcomes=[more, often, base]), 0.02)
    assert judging.cheapest([0, 1, 2]) == 2


# ---- what is tried


def uneven(root: Path, engine: str, config: dict[str, Any], **options: Any) -> Path:
    """400 steps of two hot experts on one rank."""
    rng = np.random.default_rng(0)
    chances = np.where(np.arange(16) < 2, 6.0, 1.0)
    with open_writer(
        root, num_logical_experts=16, ep_size=4, engine=engine, engine_config=config, **options
    ) as writer:
        for step in range(400):
            load = rng.multinomial(800, chances / chances.sum(), 2)
            writer.record(step, load, np.tile(np.arange(16), (2, 1)))
            if step % 100 == 99:
                writer.flush()
    return root


def test_only_what_the_engine_offers_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    other = tried(advise(open_run(uneven(tmp_path / "other", "mine", {}, scope="global"))))
    assert {"deepseek", "swift_balance", "static"} == {setting.policy for setting in other}
    assert any(setting.max_utilization for setting in other)
    assert any(setting.min_balancedness for setting in other)
    assert any(setting.layers_per_step for setting in other)
    assert {setting.num_redundant_experts for setting in other} == {0, 4, 8}
    config = {"enable_eplb": False, "eplb_algorithm": "auto", "eplb_rebalance_num_iterations": 50}
    sglang = tried(advise(open_run(uneven(tmp_path / "sglang", "sglang", config, scope="global"))))
    assert {setting.policy for setting in sglang} == {"sglang", "static"}
    assert any(setting.max_utilization for setting in sglang)
    assert not any(setting.min_balancedness for setting in sglang)
    assert {"sglang-static", "sglang-dynamic"} < {setting.dispatch for setting in sglang}
    assert all(setting.window == setting.interval for setting in sglang if setting.interval)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_vllm_is_not_told_to_become_what_it_is(tmp_path: Path, asynchronous: bool) -> None:
    stated = {"eplb_config": {"step_interval": 50, "window_size": 50, "use_async": asynchronous}}
    rng = np.random.default_rng(1)
    with open_vllm_writer(tmp_path, 16, 4, stated) as writer:
        for step in range(200):
            writer.record(step, rng.poisson(100, (2, 20)), np.tile(np.arange(20) % 16, (2, 1)))
            if step % 50 == 49:
                writer.flush()
    found = tried(advise(open_run(tmp_path), objective=Objective.TOKENS))
    assert {setting.policy for setting in found} == {"vllm", "static"}
    assert any(setting.layers_per_step == 1 for setting in found) is not asynchronous
    assert not any(setting.max_utilization or setting.min_balancedness for setting in found)


# ---- few of many steps


def test_figures_of_chosen_steps_are_close_to_those_of_all(
    drifting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = drifting
    own = [Setting("deepseek", REDUNDANT, RANKS, 100, 100, 100), STATIC]
    every = replay_run(open_run(root), own)
    some = replay_run(open_run(root), own, score_steps=300)
    assert some.scores.step.shape[0] < 0.5 * every.scores.step.shape[0]
    assert {*some.scores.step.tolist()} < {*every.scores.step.tolist()}
    assert (some.scored, some.measured_balancedness) == (every.scored, every.measured_balancedness)
    for one, other in zip(every.outcomes, some.outcomes, strict=True):
        assert one.setting == other.setting
        assert one.moves == other.moves
        assert one.balancedness == pytest.approx(other.balancedness, abs=0.02)
        assert other.idle_fraction_bound is None
    monkeypatch.setattr(advise_module, "SCORED_STEPS", 300)
    assert advise(open_run(root)).verdict == "retune"


# ---- chance


@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 2, 5, 20, 100, 1000, 20_000]),
    ranks=st.sampled_from([2, 4, 8]),
)
@settings(max_examples=12)
# Chance alone, 3.3 to 3.7 standard errors in the judged part, but nothing in the part before.
@example(seed=567, tokens=1, ranks=2)
@example(seed=1319, tokens=5, ranks=4)
@example(seed=1334, tokens=1, ranks=8)
def test_nothing_is_advised_for_uniform_routing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tokens: int, ranks: int
) -> None:
    """A layer's tokens choose two of 16 experts, all pairs alike; whatever the objective."""
    rng, layers, steps = np.random.default_rng(seed), 6, 300
    root = tmp_path_factory.mktemp("uniform")
    with open_writer(root, num_logical_experts=16, ep_size=ranks, scope="global") as writer:
        for step in range(steps):
            if tokens > 100:
                load = rng.multinomial(2 * tokens, [1 / 16] * 16, layers)
            else:
                first = rng.integers(16, size=(layers, tokens))
                second = (first + rng.integers(1, 16, size=(layers, tokens))) % 16
                both = np.concatenate([first, second], axis=1)
                load = np.stack([np.bincount(row, minlength=16) for row in both])
            writer.record(step, load, np.tile(np.arange(16), (layers, 1)))
            if step % 100 == 99:
                writer.flush()
    run = open_run(root)
    for objective in (Objective.TOKENS, None):
        advice = advise(run, objective=objective)
        assert advice.verdict == "leave", (objective, advice.reasons)
        assert advice.to_json()["advised"] is None
