"""Settings in ms per step, on engines whose cost of imbalance and pauses are planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import cli
from planted import EXPERTS, LAYERS, RANKS, SLOTS, Planted, record_engine, slowest_work
from timed_run import write_timed

from eplb_analyze import open_run
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.pricing import Objective, Pause
from eplb_analyze.replay.replay import rank, replay_run
from eplb_analyze.replay.setting_run import Move
from eplb_analyze.replay.settings import Choices

REDUNDANT = SLOTS - EXPERTS
PER_TOKEN = 0.02
#: The hot experts change every 150 steps, and the engine rearranges every 300: more often is better.
DRIFTING = {"steps": 900, "interval": 300, "drift": 150, "skew": 12.0}
OFTEN = Choices(policies=["deepseek", "static"], redundant=[REDUNDANT], intervals=[50], windows=[50])


def work_under(
    truth: Planted, placements: list[tuple[int, np.ndarray]], per_token: float, per_expert: float
) -> float:
    """The mean time of the slowest ranks, ms per step, under placements by the step from which each holds."""
    total = 0.0
    for step, logical in enumerate(truth.logical):
        slots = [placed for first, placed in placements if first <= step][-1]
        total += slowest_work(logical, slots, per_token, per_expert, draws=2)
    return total / len(truth.logical)


@pytest.mark.parametrize(
    ("per_token", "per_expert"), [(PER_TOKEN, 0.0), (0.0, 0.4)], ids=["tokens", "active"]
)
def test_gain_of_a_setting_is_the_planted_time_of_its_placements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_token: float, per_expert: float
) -> None:
    truth = record_engine(
        tmp_path, monkeypatch, per_token_ms=per_token, per_expert_ms=per_expert, pause_ms=900,
        tokens=30 if per_expert else 400, **(DRIFTING | {"steps": 500}),
    )  # fmt: skip
    result = replay_run(open_run(tmp_path), OFTEN, keep_placements=True)
    assert result.objective is Objective.MS
    assert result.placements is not None
    today = work_under(truth, list(enumerate(truth.placements)), per_token, per_expert)
    for outcome, placements in zip(result.outcomes, result.placements, strict=True):
        expected = today - work_under(truth, [(0, placements[0][1]), *placements[1:]], per_token, per_expert)
        gain, net = outcome.gain_ms_per_step, outcome.net_ms_per_step
        assert gain is not None
        assert net is not None
        assert gain.low - 0.02 <= expected <= gain.high + 0.02
        usual = result.today.weights_moved_busiest_rank / len(result.today.moves)
        count = max(len(outcome.moves), outcome.weights_moved_busiest_rank / usual)
        pauses = 900 * (count - len(result.today.moves)) / 500
        assert net.estimate == pytest.approx(gain.estimate - pauses, rel=0.02, abs=0.02)
        assert net.low < net.estimate < net.high or not outcome.moves
    nets = [outcome.net_ms_per_step.estimate for outcome in result.outcomes if outcome.net_ms_per_step]
    assert nets == sorted(nets, reverse=True)


def test_few_long_steps_count_in_full(tmp_path: Path) -> None:
    """The median is that of decode steps, but most of the time passes in prefill steps."""
    truth = write_timed(
        tmp_path, 0.02, phases=("decode", "decode", "prefill"), slow={"prefill": 50.0}, steps=900
    )
    moved = Setting("round_robin", 0, 4, None, None, None)
    advice = advise(open_run(tmp_path), [moved])
    played = advice.replay
    assert played is not None
    assert played.seconds == pytest.approx(truth.ms.sum() / 1e3, rel=0.02)
    assert played.step_seconds == pytest.approx(truth.ms.mean() / 1e3, rel=0.02)
    assert advice.step_ms == pytest.approx(truth.ms[540:].mean(), rel=0.02)
    assert np.median(truth.ms) < 0.6 * truth.ms.mean()
    assert advice.best is not None
    assert advice.best.gain is not None
    assert advice.best.net_ms_per_step is not None
    share = advice.best.net_ms_per_step.estimate / truth.ms[540:].mean()
    assert advice.best.gain.value == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize(("pause_ms", "verdict"), [(2.0, "retune"), (900.0, "leave")])
def test_retune_turns_into_leave_if_pauses_do_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_ms: float, verdict: str
) -> None:
    record_engine(tmp_path, monkeypatch, per_token_ms=PER_TOKEN, pause_ms=pause_ms, **DRIFTING)
    run = open_run(tmp_path)
    choices = replace(OFTEN, policies=["deepseek"])
    advice = advise(run, choices)
    net, gain = advice.net_ms_per_step, advice.gain_ms_per_step
    assert (advice.verdict, advice.replay and advice.replay.objective) == (verdict, Objective.MS)
    assert net is not None
    assert gain is not None
    assert gain.low > 0
    assert (net.low > 0, net.high < 0) == (verdict == "retune", verdict == "leave")
    assert advice.replay is not None
    assert advice.replay.pause.basis == "measured"
    if pause_ms > 100:  # else the steps vary by more
        assert advice.replay.pause.ms.value == pytest.approx(pause_ms, rel=0.05)
    # By tokens it looks alike.
    assert advise(run, choices, objective=Objective.TOKENS).verdict == "retune"
    document = json.loads(cli("advise", tmp_path, "--interval-steps", "50", "--window-steps", "50",
                              "--redundant-experts", "4", "--policy", "deepseek",
                              "--json").stdout)  # fmt: skip
    assert document["verdict"] == verdict
    assert document["net_ms_per_step"]["estimate"] == pytest.approx(net.estimate)
    text = " ".join(
        cli("advise", tmp_path, "--interval-steps", "50", "--redundant-experts", "4").stdout.split()
    )
    assert "the mean of 2 rearrangements" in text
    # With any window to choose from, a setting that never rearranges is advised if pauses are long.
    pauses = "more" if verdict == "retune" else "less"
    assert "without pauses, the advised setting saves " in text
    assert f"per step {pauses} than today, at the rate of the whole run" in text
    assert "gains follow from the cost fitted to this run's step times" in text


def test_rearrangements_that_cost_more_than_they_gain_are_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imbalance costs nothing here, so each pause is a loss."""
    record_engine(tmp_path, monkeypatch, steps=900, interval=100, pause_ms=900)
    advice = advise(open_run(tmp_path), OFTEN)
    assert (advice.verdict, advice.reasons) == ("retune", ["rearrangements cost more than they gain"])
    assert advice.best is not None
    assert advice.best.setting == Setting("static", REDUNDANT, RANKS, None, None, None)
    assert advice.net_ms_per_step is not None
    assert advice.net_ms_per_step.estimate == pytest.approx(8 * 900 / 900, rel=0.05)


def test_only_pauses_make_a_loss_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tokens, never rearranging loses, too; but imbalance costs nothing here, so it only saves pauses."""
    record_engine(tmp_path, monkeypatch, pause_ms=60)
    options = "--redundant-experts", str(REDUNDANT), "--interval-steps", "20", "--window-steps", "20"
    command = "replay", "--policy", "deepseek,static", *options, "--objective", "tokens", tmp_path
    often, never = (
        next(
            each for each in json.loads(cli(*command, "--json").stdout)["settings"] if each["policy"] == name
        )
        for name in ("deepseek", "static")
    )
    assert often["net_seconds"] < 0 < often["time_saved"]
    assert never["net_seconds"] < 0
    assert never["cost_seconds"] == 0
    text = cli(*command).stdout
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith(("deepseek", "static"))}
    assert (rows["deepseek"][-1], rows["static"].rstrip()[-1].isdigit()) == ("!", True)


def test_free_imbalance_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain by tokens is worth nothing if steps take as long with balanced loads."""
    record_engine(tmp_path, monkeypatch, **(DRIFTING | {"interval": 10_000}))
    run = open_run(tmp_path)
    advice = advise(run, OFTEN)
    assert advice.verdict == "leave"
    assert advice.net_ms_per_step is not None
    assert advice.replay is not None
    assert advice.replay.pause.basis == "assumed"
    assert advise(run, OFTEN, objective=Objective.TOKENS).verdict == "enable"


def test_costly_imbalance_is_worth_enabling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_engine(tmp_path, monkeypatch, per_token_ms=0.2, steps=900, interval=10_000, skew=12.0)
    choices = Choices(
        policies=["deepseek"], redundant=[REDUNDANT], intervals=[400], windows=[100], starts=[100]
    )
    advice = advise(open_run(tmp_path), choices)
    assert advice.verdict == "enable"
    assert advice.net_ms_per_step is not None
    assert advice.net_ms_per_step.low > 0
    given = advise(open_run(tmp_path), choices, cost_per_expert_ms=1e6)
    assert (given.verdict, given.replay and given.replay.pause.basis) == ("leave", "given")


def test_what_is_not_measurable_is_not_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_engine(tmp_path, monkeypatch, steps=95, interval=10_000, per_token_ms=PER_TOKEN)
    advice = advise(open_run(tmp_path), Choices(intervals=[20], windows=[20]))
    assert (advice.verdict, advice.net_ms_per_step) == ("leave", None)
    assert "not measurable in this run: fewer than 100 steps are complete" in advice.reasons[0]
    assert json.loads(cli("advise", tmp_path, "--json").stdout)["net_ms_per_step"] is None


@pytest.mark.parametrize("objective", ["tokens", "active", "ms"])
def test_settings_are_sorted_by_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    record_engine(
        tmp_path, monkeypatch, steps=300, interval=100, per_token_ms=PER_TOKEN, pause_ms=20, tokens=40
    )
    run = open_run(tmp_path)
    result = replay_run(run, objective=Objective(objective))
    key = {
        "tokens": lambda o: -o.net_seconds,
        "active": lambda o: o.active_experts,
        "ms": lambda o: -o.net_ms_per_step.estimate,
    }[objective]
    values = [round(key(outcome), 9) for outcome in result.outcomes]
    assert values == sorted(values)
    assert rank(result.outcomes[0], result.objective) <= rank(result.outcomes[-1], result.objective)
    text = cli("replay", "--objective", objective, tmp_path).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert ("active" in text, "net ms" in text) == (objective != "tokens", objective == "ms")


def test_active_experts_are_those_of_the_recorded_placements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = record_engine(tmp_path, monkeypatch, steps=120, interval=50, tokens=30)
    result = replay_run(open_run(tmp_path))
    pairs = zip(truth.logical, truth.placements, strict=True)
    expected = np.mean([slowest_work(logical, slots, 0, 1) / LAYERS for logical, slots in pairs])
    assert result.today.active_experts == pytest.approx(expected, rel=0.02)


def test_run_without_times_is_judged_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = record_engine(tmp_path / "recorded", monkeypatch, steps=200, interval=10_000, skew=12.0)
    np.savez(tmp_path / "loads.npz", load=np.stack(truth.logical))
    done = cli("import", tmp_path / "loads.npz", "--model", "m",
               "--num-experts", str(EXPERTS), "--ep-size", str(RANKS), "--placement", "linear",
               "--ordered", tmp_path / "imported")  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(cli("advise", tmp_path / "imported", "--json").stdout)
    assert (document["objective"], document["net_ms_per_step"]) == ("tokens", None)
    assert document["verdict"] == "enable"
    text = " ".join(cli("advise", tmp_path / "imported").stdout.split())
    assert "expected by tokens" in text
    assert "milliseconds not measurable: the recording has no step times; supply them with --timings" in text


def test_advice_by_active_experts_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_engine(tmp_path, monkeypatch, steps=200, interval=50, tokens=400)
    advice = advise(open_run(tmp_path), Choices(redundant=[0], intervals=[50]), objective=Objective.ACTIVE)
    assert advice.gain is not None
    # Each of 4 ranks has 4 slots in place of 5, all with a token.
    assert advice.gain.value == pytest.approx(1 / 5, abs=0.02)
    best = "0 redundant experts instead of 4 and no rearrangements at all"
    assert advice.reasons == [f"{best} would have a significant gain by active experts"]
    options = ("--objective", "active", "--redundant-experts", "0", "--interval-steps", "50")
    text = " ".join(cli("advise", tmp_path, *options).stdout.split())
    assert "(20.0 to 20.0) of the time, by active experts" in text
    assert "expected by active experts" in text


def test_pauses_grow_with_the_weights_moved_and_never_shrink() -> None:
    """Pauses of 200 ms were measured; the busiest rank fetched 10 weights in each."""
    pause = Pause(Interval(200.0, 190.0, 210.0), "measured", 4, weights=10.0)
    found = [pause.seconds([Move(step, 99, busiest) for step, busiest in enumerate(each)])
             for each in ([10, 10], [2, 2], [30, 10], [])]  # fmt: skip
    assert found == pytest.approx([0.4, 0.4, 0.8, 0.0])
    given = Pause(Interval(5.0, 5.0, 5.0), "given")
    assert given.seconds([Move(1, 99, 10), Move(2, 99, 3)]) == pytest.approx(0.065)
    assert Pause(Interval(1000.0, 1000.0, 1000.0), "assumed").seconds([Move(1, 99, 10)]) is None


def test_measured_pauses_decide_the_order_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rearranging often is better by tokens, and costs more than it gains."""
    record_engine(tmp_path, monkeypatch, per_token_ms=PER_TOKEN, pause_ms=900, **DRIFTING)
    run = open_run(tmp_path)
    choices = Choices(policies=["deepseek"], redundant=[REDUNDANT], intervals=[50, 300], windows=[50])
    result = replay_run(run, choices, objective=Objective.TOKENS, expert_mb=44.0)
    often, seldom = sorted(result.outcomes, key=lambda o: (o.setting and o.setting.interval) or 0)
    assert (often.idle_fraction or 1) < (seldom.idle_fraction or 0)
    assert result.outcomes == [seldom, often]
    mean = sum(move.busiest_rank for move in result.today.moves) / len(result.today.moves)
    for outcome in result.outcomes:
        moved = sum(move.busiest_rank for move in outcome.moves)
        pauses = max(len(outcome.moves), moved / mean)
        assert outcome.cost_seconds == pytest.approx(pauses * 0.9, rel=0.05)
        assert outcome.moved_gb == pytest.approx(sum(move.weights for move in outcome.moves) * 0.044)
        assert result.seconds is not None
        gain = (outcome.time_saved or 0) * result.seconds
        paid = (outcome.cost_seconds or 0) - (result.today.cost_seconds or 0)
        assert outcome.net_seconds == pytest.approx(gain - paid)
    lines = cli("replay", "--objective", "tokens", "--expert-mb", "44", tmp_path).stdout.splitlines()
    assert any("GB moved" in line for line in lines)
    assert max(map(len, lines)) <= 80
