"""What one change of a setting gains by itself, against times and tokens that are computed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import PlantedClock, SteadyClock
from helpers import cli, open_vllm_writer, open_writer
from hypothesis import given
from hypothesis import strategies as st
from planted import EXPERTS, LAYERS, RANKS, SLOTS, record_engine

from eplb_analyze import open_run
from eplb_analyze.cli.views.advise import redundancy
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.changes import Change, Changes, part_changed, result_of
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.replay.settings import Choices
from eplb_analyze.text import plural

BASE = Setting("vllm", 32, 8, 500, 1000, 125)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (BASE, None),
        (Setting("vllm", 64, 8, 500, 1000, 125), "redundant experts"),
        (Setting("vllm", 32, 8, 125, 1000, 31), "interval"),
        (Setting("vllm", 32, 8, 500, 500, 125), "window"),
        (Setting("deepseek", 32, 8, 500, 1000, 125), "policy"),
        (Setting("static", 32, 8, None, None, None), "policy"),
        (Setting("static", 64, 8, None, None, None), None),
        (Setting("vllm", 64, 8, 125, 1000, 31), None),
        (Setting("vllm", 64, 4, 500, 1000, 125), None),
        (Setting("vllm", 32, 8, 125, 125, 31), None),
    ],
)
def test_settings_that_differ_in_one_part_are_changes(other: Setting, part: str | None) -> None:
    assert part_changed(BASE, other) == part


def test_window_that_follows_the_interval_is_the_same_change() -> None:
    one, other = (Setting("sglang", 32, 8, interval, interval, interval + 1) for interval in (500, 125))
    assert part_changed(one, other) == "interval"


def busiest(logical: Any, placement: Any, draws: int = 3) -> float:
    """Tokens of the slowest ranks of a step ``[layers, experts]``, dealt by numpy, summed over layers."""
    rng = np.random.default_rng(2)
    total = 0.0
    for _ in range(draws):
        for tokens, slots in zip(logical, placement, strict=True):
            load = np.zeros(len(slots))
            for expert, count in enumerate(tokens.tolist()):
                at = np.flatnonzero(slots == expert)
                load[at] = rng.multinomial(count, [1 / len(at)] * len(at))
            total += load.reshape(RANKS, -1).sum(axis=1).max()
    return total / draws


def test_gain_of_a_change_is_the_planted_time_less_the_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    price, pause, steps = 0.02, 40.0, 500
    truth = record_engine(
        tmp_path, monkeypatch, per_token_ms=price, pause_ms=pause, steps=steps, interval=100, skew=12.0
    )
    choices = Choices(policies=["deepseek"], redundant=[0, 4, 8], intervals=[100], windows=[100])
    run = open_run(tmp_path)
    found = advise(run, choices, expert_mb=500.0).changes
    assert found is not None
    assert (found.basis, found.base.num_redundant_experts) == (Objective.MS, 4)
    played = replay_run(run, choices, keep_placements=True)
    assert played.placements is not None
    judged = range(int(0.6 * steps), steps)
    layers = [run.history.layer(i) for i in range(LAYERS)]
    now = [[layer.at(step) for layer in layers] for step in judged]
    today = price * np.mean([busiest(truth.logical[s], p) for s, p in zip(judged, now, strict=True)])
    times, moves = {}, {}
    for outcome, placed in zip(played.outcomes, played.placements, strict=True):
        assert outcome.setting is not None
        number = outcome.setting.num_redundant_experts
        under = [[slots for first, slots in placed if first <= step][-1] for step in judged]
        times[number] = price * np.mean(
            [busiest(truth.logical[s], p) for s, p in zip(judged, under, strict=True)]
        )
        moves[number] = len(outcome.moves)
    assert [(row.part, row.setting.num_redundant_experts) for row in found.rows] == [
        ("none", 4),  # the engine states no setting
        ("redundant experts", 0),
        ("redundant experts", 8),
    ]
    for row in found.rows:
        number = row.setting.num_redundant_experts
        expected = today - times[number] - pause * (moves[number] - len(played.today.moves)) / steps
        assert row.net_ms_per_step is not None
        assert row.net_ms_per_step.low - 0.05 <= expected <= row.net_ms_per_step.high + 0.05
        assert row.experts_per_gpu == (number - 4) // RANKS * LAYERS
        assert row.gb_per_gpu == pytest.approx(row.experts_per_gpu * 0.5)


def record(root: Path, share: Any, *, redundant: int = 0, steps: int = 300, seed: int = 1) -> Path:
    """An engine that never rearranges and states no setting; experts have these shares of 4,000 tokens."""
    rng = np.random.default_rng(seed)
    slots = np.r_[np.arange(EXPERTS), np.arange(redundant)].astype(np.int32)
    copies = np.bincount(slots, minlength=EXPERTS)
    per_slot = (np.asarray(share) / np.sum(share) / copies)[slots]
    with open_writer(root, num_logical_experts=EXPERTS, ep_size=RANKS, scope="global") as writer:
        for step in range(steps):
            writer.record(step, rng.multinomial(4000, per_slot, LAYERS), np.tile(slots, (LAYERS, 1)))
            assert step % 100 or writer.flush(60)
    return root


def text_of(*arguments: str | Path) -> str:
    return " ".join(cli("advise", *arguments).stdout.split())


def test_replicas_of_one_hot_expert_are_worth_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 3 has 10 of 25 parts of the tokens, and its rank holds three more experts: 13 parts."""
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    root = record(tmp_path, np.where(np.arange(EXPERTS) == 3, 10.0, 1.0))
    found = advise(open_run(root), objective=Objective.TOKENS).changes
    assert found is not None
    rows = {
        row.setting.num_redundant_experts: row
        for row in found.rows
        if row.part == "redundant experts" and row.setting.policy != "static"
    }
    assert sorted(rows) == [4, 8]
    assert {row.result for row in rows.values()} == {"gain"}
    # With replicas ranks are even, with a fourth of the tokens each.
    assert rows[8].gain is not None
    assert rows[8].gain.value == pytest.approx(1 - 0.25 / (13 / 25), abs=0.05)
    text = text_of("--objective", "tokens", "--expert-mb", "44", root)
    every = f"each number rearranged every {plural(found.base.interval or 0, 'step')}"
    assert f"Redundant experts, {every}: more of them help (4: gain; 8: gain; compared with 0)" in text
    assert f"+{LAYERS * 0.044:.1f} GB" in text
    document = json.loads(cli("advise", "--objective", "tokens", "--json", root).stdout)
    assert [row["part"] for row in document["changes"]["rows"]] == [row.part for row in found.rows]


@pytest.mark.parametrize("seed", range(4))
def test_no_change_gains_anything_if_experts_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    root = record(tmp_path, np.ones(EXPERTS), seed=seed)
    found = advise(open_run(root), objective=Objective.TOKENS).changes
    assert found is not None
    assert [row.result for row in found.rows if row.result == "gain"] == []
    assert ": do not add any" in text_of("--objective", "tokens", root)


def test_engine_that_never_acted_is_to_be_fixed_first(tmp_path: Path) -> None:
    """It is configured to rearrange every 40 steps, and its one hot expert never gets a replica."""
    stated = {"eplb_config": {"step_interval": 40, "window_size": 40}, "num_expert_groups": 1}
    now = np.r_[np.arange(EXPERTS), np.arange(SLOTS - EXPERTS)].astype(np.int32)
    share = np.where(np.arange(EXPERTS) == 9, 8.0, 1.0) / np.bincount(now, minlength=EXPERTS)
    rng = np.random.default_rng(4)
    with open_vllm_writer(tmp_path, EXPERTS, RANKS, stated) as writer:
        for step in range(300):
            chance = share[now] / share[now].sum()
            writer.record(step, rng.multinomial(4000, chance, LAYERS), np.tile(now, (LAYERS, 1)))
            assert step % 100 or writer.flush(60)
    advice = advise(open_run(tmp_path), objective=Objective.TOKENS)
    assert (advice.verdict, advice.to_json()["advised"], advice.engine_arguments) == ("fix", None, None)
    assert advice.changes is not None
    assert advice.changes.base_is_today
    lines = cli("advise", "--objective", "tokens", tmp_path).stdout.splitlines()
    first = "FIX EPLB FIRST: EPLB never acted: a rearrangement was due every 40 steps"
    assert lines[1].startswith(first)
    assert sum("FIX" in line or "never acted" in line for line in lines) == 1
    # A replay is not needed to say so.
    few = advise(open_run(tmp_path), steps=(0, 40), objective=Objective.TOKENS)
    assert (few.verdict, few.fault and few.fault[:16]) == ("fix", "EPLB never acted")


def test_static_setting_with_other_redundancy_is_advised_if_it_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas of the first four experts make the last rank the busiest; without them all ranks are even."""
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    root = record(tmp_path, np.where(np.arange(EXPERTS) % 4 == 0, 4.0, 1.0), redundant=4)
    advice = advise(open_run(root), objective=Objective.TOKENS)
    assert (advice.verdict, advice.best and advice.best.setting) == (
        "retune", Setting("static", 0, RANKS, None, None, None),
    )  # fmt: skip
    assert advice.gain is not None
    assert advice.gain.low > 0
    assert advice.changes is not None
    found = [row for row in advice.changes.rows if row.setting == advice.best.setting]
    assert [(row.part, row.result) for row in found] == [("redundant experts", "gain")]
    assert found[0].gain == advice.gain  # both are over what was recorded
    text = text_of("--objective", "tokens", root)
    assert "CHANGE THE SETTING: no rearrangements, 0 redundant experts instead of 4: saves" in text
    assert "With 0 redundant experts instead of today's 4 and no rearrangements, you gain" in text


def test_both_commands_print_the_steps_that_they_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    root = record(tmp_path, np.ones(EXPERTS))
    clock = open_run(root).clock
    advice, played = (
        json.loads(cli(name, "--objective", "tokens", "--json", root).stdout) for name in ("advise", "replay")
    )
    for part, first, last in (
        (advice["trained"], 0, 179),
        (advice["judged"], 180, 299),
        (played, 0, 299),
    ):
        assert (part["first_step"], part["last_step"]) == (first, last)
        assert (part["first_time"], part["last_time"]) == (clock.iso(first), clock.iso(last))
    judged, chosen = (clock.range_label(*steps) for steps in ((180, 299), (0, 179)))
    assert f"The setting was chosen in {chosen}; the gains are those of {judged}" in text_of(root)
    text = " ".join(cli("replay", root).stdout.split())
    whole = clock.range_label(0, 299)
    assert f"The gains are those of all {whole}; `advise` judges a setting by the last 40% of them" in text


def test_replicas_do_not_take_the_credit_for_rearranging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hot experts are on the last rank. Rearranging alone makes all ranks even; replicas add nothing."""
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())
    root = record(tmp_path, np.where(np.arange(EXPERTS) >= EXPERTS - RANKS, 5.0, 1.0))
    found = advise(open_run(root), objective=Objective.TOKENS).changes
    assert found is not None
    base = next(row for row in found.rows if row.part == "none")
    # That rank has 20 of 32 parts; rearranged, each rank has 8.
    assert base.gain is not None
    assert base.gain.value == pytest.approx(1 - 8 / 20, abs=0.05)
    assert (base.alone, base.result) == (base.gain, "gain")
    rows = [row for row in found.rows if row.part == "redundant experts" and row.setting.interval]
    assert len(rows) == 2
    for row in rows:
        assert row.gain is not None
        assert row.alone is not None
        assert 1 - row.gain.value == pytest.approx((1 - base.gain.value) * (1 - row.alone.value))
        # The table is over what was recorded; the sentence compares the numbers with each other.
        assert (row.result, row.alone_result == "gain") == ("gain", False)
    assert ": do not add any" in text_of("--objective", "tokens", root)


SHARES = st.floats(-0.5, 0.5)


@given(st.tuples(SHARES, SHARES, SHARES).map(sorted), st.sampled_from([0.0, 0.02, 0.1]))
def test_word_never_contradicts_the_sign_of_the_interval(bounds: list[float], min_gain: float) -> None:
    low, value, high = bounds
    word = result_of(Interval(value, low, high), min_gain)
    if word.endswith("gain"):
        assert low > 0
    elif word.endswith("loss"):
        assert high < 0
    else:
        # It includes 0, or comes within a hundredth of its width.
        assert low - 0.01 * (high - low) <= 1e-9
        assert high + 0.01 * (high - low) >= -1e-9
    if word == "no effect":
        assert max(-low, high) <= min_gain
    if word in ("gain", "loss"):
        assert abs(value) >= min_gain


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (0.035, 0.026, 0.045, "gain"),
        (0.033, 0.010, 0.056, "likely gain"),  # an interval above 0 is not called no gain
        (0.005, 0.002, 0.008, "small gain"),
        (-0.0024, -0.0044, -0.0008, "small loss"),
        (-0.003, -0.2, -0.003, "likely loss"),  # a loss that may be large is not called small
        (-0.7, -0.71, -0.69, "loss"),  # although another tried setting loses more
        (-0.028, -0.029, 0.02, "unclear"),
        (0.001, -0.005, 0.019, "no effect"),
        (0.0, 0.0, 0.0, "no effect"),
    ],
)
def test_word_of_planted_figures(value: float, low: float, high: float, word: str) -> None:
    assert result_of(Interval(value, low, high), 0.02) == word


def record_idle_eplb(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, interval: int, hot: float, steps: int = 400
) -> Path:
    """An engine that states an interval and never rearranges; a token of the slowest rank takes 0.02 ms."""
    clock, rng = PlantedClock(), np.random.default_rng(6)
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    stated = {"eplb_config": {"step_interval": interval, "window_size": 40}, "num_expert_groups": 1}
    now = np.r_[np.arange(EXPERTS), np.arange(SLOTS - EXPERTS)].astype(np.int32)
    share = np.where(np.arange(EXPERTS) >= EXPERTS - 2, hot, 1.0) / np.bincount(now, minlength=EXPERTS)
    with open_vllm_writer(root, EXPERTS, RANKS, stated) as writer:
        for step in range(steps):
            chance = share[now] ** rng.uniform(0.5, 1.2)
            load = rng.multinomial(int(400 * rng.uniform(0.5, 1.5)), chance / chance.sum(), LAYERS)
            slowest = load.reshape(LAYERS, RANKS, -1).sum(axis=2).max(axis=1).sum()
            clock.ns += int(1e6 * (5 + 0.02 * slowest + abs(rng.normal(0, 0.05))))
            writer.record(step, load, np.tile(now, (LAYERS, 1)))
            assert step % 100 != 99 or writer.flush(60)
    return root


def words_follow(rows: list[Change]) -> None:
    for row in rows:
        net = row.net_ms_per_step
        assert net is not None
        if row.result.endswith("gain"):
            assert net.low > 0
        if row.result.endswith("loss"):
            assert net.high < 0


def test_what_a_working_eplb_would_save_is_apart_from_its_assumed_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would balance two hot experts, which saves work; pauses that nobody measured outweigh that."""
    root = record_idle_eplb(tmp_path, monkeypatch, interval=40, hot=6.0)
    advice = advise(open_run(root), Choices(redundant=[0, 4, 8], intervals=[40, 80], windows=[40]))
    assert advice.verdict == "fix"
    assert advice.changes is not None
    words_follow(advice.changes.rows)
    base = next(row for row in advice.changes.rows if row.part == "none")
    assert base.work_ms_per_step is not None
    assert base.net_ms_per_step is not None
    assert base.work_ms_per_step.low > 0 > base.net_ms_per_step.high
    assert (base.result, base.by_assumed_pause) == ("loss", True)
    for row in advice.changes.rows:  # every row whose loss is mostly pauses, not only those that save work
        assert row.by_assumed_pause == (row.setting.policy != "static")
    working = advice.reasons[1]
    assert working.startswith(f"a working EPLB would have saved {base.work_ms_per_step.estimate:.1f}")
    assert "its pauses are not known (assumed 1000 ms each: −" in working
    text = text_of(root)
    assert "today's had it run" in text
    assert "assumed loss same" in text
    assert "assumed: decided by the pauses, which are assumed to take 1000 ms each" in text
    assert not any(words in text for words in ("you gain", "you lose nothing", "as above", "no gain"))


def test_nothing_is_gained_if_the_setting_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval is longer than the recording, so rows change one part of another base."""
    root = record_idle_eplb(tmp_path, monkeypatch, interval=1_000_000, hot=1.0)
    advice = advise(open_run(root), min_gain=0.2)
    assert advice.verdict == "leave"
    assert advice.changes is not None
    words_follow(advice.changes.rows)
    text = text_of("--min-gain", "0.2", root)
    assert "today's interval, 1,000,000 steps, is longer than these steps" in text
    assert "you gain" not in text
    assert "compared with 4)" in text
    assert "best other setting: no rearrangements, 0 redundant experts instead of 4: saves" in text


def test_numbers_that_are_never_rearranged_are_not_called_rearranged() -> None:
    """Both numbers were tried without rearrangements, but only one of them with."""
    loss, none = Interval(-0.1, -0.12, -0.08), Interval(0.0, -0.01, 0.01)

    def row(part: Any, setting: Setting, gain: Interval) -> Change:
        return Change(part, setting, gain, None, None, "loss", False, gain, "loss", 0, None)

    more, static = (Setting("vllm", 40, 8, 500, 1000, 125), Setting("static", 48, 8, None, None, None))
    rows = [
        row("none", BASE, none),
        row("redundant experts", more, loss),
        row("redundant experts", static, loss),
    ]
    (text,) = redundancy(Changes(BASE, False, Objective.TOKENS, rows), advised=False, min_gain=0.02, layers=4)
    every = "each number rearranged every 500 steps"
    assert text == f"Redundant experts, {every}: do not add any (40: loss; compared with 32)"
    (text,) = redundancy(
        Changes(BASE, False, Objective.TOKENS, [rows[0], rows[2]]), advised=False, min_gain=0.02, layers=4
    )
    assert text == "Redundant experts: do not add any (48, static: loss; now 32)"
