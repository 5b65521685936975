"""The cost of imbalance in a run's phases, next to what was planted in its step times."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import cli, open_writer
from timed_run import LAYERS, RANKS, SLOTS, TimedRun, write_timed

from eplb_analyze import open_run
from eplb_analyze.analysis import cost_sample
from eplb_analyze.analysis.cost import cost_of
from eplb_analyze.analysis.cost_sample import CostSample, Sampling, sample_of
from eplb_analyze.metrics.cost import CostStatus, Work
from eplb_analyze.reader.blocks import Block
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.replay.settings import Choices


@pytest.fixture(scope="module")
def costly(tmp_path_factory: pytest.TempPathFactory) -> TimedRun:
    return write_timed(tmp_path_factory.mktemp("costly"), 0.02)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> TimedRun:
    return write_timed(tmp_path_factory.mktemp("free"), 0.0)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> TimedRun:
    return write_timed(tmp_path_factory.mktemp("short"), 0.02, steps=60)


def test_planted_cost_is_measured(costly: TimedRun) -> None:
    found = cost_of(open_run(costly.root))
    assert found.status is CostStatus.MEASURED
    assert found.ms_per_step is not None
    assert found.ms_per_step.estimate == pytest.approx(costly.cost.mean(), rel=0.05)
    assert 0 < found.ms_per_step.high - found.ms_per_step.low < 0.1 * costly.cost.mean()
    assert found.step_ms_p50 == pytest.approx(np.median(costly.ms), rel=0.02)
    assert found.pauses == 0  # the first placement is no rearrangement


def test_run_without_a_token_has_no_cost(tmp_path: Path) -> None:
    with open_writer(tmp_path, num_logical_experts=2, ep_size=2, scope="global") as writer:
        for _ in range(150):
            writer.record(None, np.zeros((1, 2), int), np.array([[0, 1]]))
    found = cost_of(open_run(tmp_path))
    assert found.message.endswith("no step has tokens")
    assert found.phases == {}
    assert "No complete step has a token." in cli("summary", tmp_path).stdout


def test_parts_of_another_process_merge_to_the_whole(costly: TimedRun) -> None:
    run = open_run(costly.root)
    last = run.step_range[1]
    assert last is not None
    sampling = Sampling(run, 0, last)
    parts = [
        sample
        for low in range(0, last + 1, 70)
        for _, sample in run.over_blocks(partial(CostSample.of, run, sampling), (low, low + 70))
    ]
    for part in parts:
        for value in vars(part).values():
            if isinstance(value, np.ndarray):  # as pickled arrays are, if they come through shared memory
                value.flags.writeable = False
    for part in parts[1:]:
        parts[0].merge(part)
    whole = sample_of(run)
    for name, value in vars(whole).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(parts[0], name), value, name)
    assert (parts[0].first, parts[0].last, parts[0].phase) == (whole.first, whole.last, whole.phase)


def test_range_of_steps_has_its_own_cost(costly: TimedRun) -> None:
    found = cost_of(open_run(costly.root), (100, 300)).ms_per_step
    assert found is not None
    assert found.estimate == pytest.approx(costly.cost[100:300].mean(), rel=0.1)


def test_phases_are_apart(tmp_path: Path) -> None:
    run = write_timed(tmp_path, 0.02, phases=("decode", "prefill"), slow={"prefill": 20.0}, steps=600)
    found = cost_of(open_run(tmp_path))
    assert list(found.phases) == ["decode", "prefill"]
    for start, name in enumerate(found.phases):
        phase = found.phases[name]
        assert phase.steps == 300
        assert phase.step_ms == pytest.approx(np.median(run.ms[start::2]), rel=0.02)
        assert phase.ms_per_step is not None
        assert phase.ms_per_step.estimate == pytest.approx(run.cost[start::2].mean(), rel=0.1)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_steps_of_one_phase_keep_their_times_if_phases_alternate(tmp_path: Path, name: str) -> None:
    """No two steps of a phase follow each other. Each step's time is its own, whatever came before."""
    planted = write_timed(tmp_path, 0.02, phases=("decode", "prefill"), slow={"prefill": 20.0}, steps=600)
    run = open_run(tmp_path)
    whole, alone = cost_of(run).phases[name], cost_of(run.of_phase(name)).phases[name]
    assert alone.status is whole.status is CostStatus.MEASURED
    assert (alone.ms_per_step, alone.step_ms) == (whole.ms_per_step, whole.step_ms)
    start = ("decode", "prefill").index(name)
    played = replay_run(run.of_phase(name), Choices(policies=["static"]))
    assert played.part.step_seconds == pytest.approx(np.median(planted.ms[start::2]) / 1e3, rel=0.02)


def test_reason_is_that_of_the_largest_phase_if_phases_differ(tmp_path: Path) -> None:
    write_timed(tmp_path, 0.02, phases=("decode", "decode", "prefill"), steps=120)
    found = cost_of(open_run(tmp_path))
    reasons = {name: phase.message for name, phase in found.phases.items()}
    assert len(set(reasons.values())) == 2
    assert found.message == f"not measurable in this run: {reasons['decode']} (decode)"
    told = " ".join(cli("summary", "--full", tmp_path).stdout.split())
    assert f"cost of imbalance unknown, {found.message}" in told


@pytest.mark.parametrize("columns", [80, 160])
def test_summary_says_which_run_is_costly_free_or_not_measurable(
    costly: TimedRun, free: TimedRun, short: TimedRun, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    texts = [" ".join(cli("summary", "--full", run.root).stdout.split()) for run in (costly, free, short)]
    words = [
        "imbalance costs ",
        "imbalance has no measurable cost: at most ",
        "cost of imbalance unknown, not measurable in this run: ",
    ]
    assert [[word in text for word in words] for text in texts] == np.eye(3, dtype=bool).tolist()
    assert ["for the cost in time see above" in text for text in texts] == [True, True, False]


def test_summary_json_is_the_cost_of_the_run(costly: TimedRun, short: TimedRun) -> None:
    document = json.loads(cli("summary", costly.root, "--json").stdout)["cost"]
    assert document == cost_of(open_run(costly.root)).to_json()
    assert list(document) == [
        *("status", "basis", "ms_per_step", "share_of_step", "measured_phases", "measured_share", "step_ms"),
        *("r2", "steps_used", "excluded", "message", "phases"),
    ]
    document = json.loads(cli("summary", short.root, "--json").stdout)["cost"]
    assert document["status"] == "not_identifiable"
    assert document["ms_per_step"] is None
    assert "100 " in document["message"]


def test_sample_of_small_segments_is_that_of_the_whole(costly: TimedRun, tmp_path: Path) -> None:
    write_timed(tmp_path, 0.02, segment_steps=16)
    one, other = (sample_of(open_run(folder)) for folder in (costly.root, tmp_path))
    assert len(one.step) == 400
    for name in ("step", "since_last", "until_next", "per_slot"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.since_last[1:], costly.ms[1:], atol=1e-5)
    np.testing.assert_array_equal(one.until_next[:-1], one.since_last[1:])
    assert one.work.tokens == pytest.approx(costly.tokens.mean(axis=2).sum(axis=1))


@pytest.mark.parametrize("tokens", [1.0, 30.0, 200.0])
def test_work_without_reading_loads_is_that_of_the_loads(
    tmp_path: Path, tokens: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 200 tokens of each slot all experts are active, with 1 they are not, nor in every tenth step."""
    rng = np.random.default_rng(0)
    mean = np.full((200, 1, 1), tokens)
    mean[::10] = min(tokens, 2.0) if tokens == 30 else tokens
    loads = rng.poisson(mean, size=(200, LAYERS, SLOTS))
    read = []
    original = Block.load_parts
    monkeypatch.setattr(Block, "load_parts", lambda *args: read.append(1) or original(*args))
    changed = np.array([np.arange(SLOTS), np.arange(SLOTS)[::-1]])
    with open_writer(tmp_path, scope="global", ep_size=RANKS, num_logical_experts=SLOTS) as writer:
        for step, load in enumerate(loads):
            writer.record(step, load, changed if step >= 90 else changed[::-1])
            assert step % 100 or writer.flush(60)
    work = sample_of(open_run(tmp_path)).work
    assert bool(read) == (tokens < 200)
    by_rank = loads.reshape(200, LAYERS, RANKS, -1)
    expected = Work.of((by_rank > 0).sum(axis=3), by_rank.sum(axis=3))
    for found, truth in zip(work, expected, strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-6)


@pytest.mark.parametrize("first", [0, 2**61 + 1])
@pytest.mark.parametrize("steps", [(0, 400), (37, 333)])
def test_long_run_is_sampled_evenly(
    tmp_path: Path, steps: tuple[int, int], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_timed(tmp_path, 0.02, segment_steps=16, first=first)
    steps = first + steps[0], first + steps[1]
    monkeypatch.setattr(cost_sample, "SAMPLE_STEPS", 100)
    run = open_run(tmp_path)
    sampling = Sampling(run, steps[0], steps[1] - 1)
    wanted = [block.recorded[0] for block in run.blocks(steps) if sampling.wants(block)]
    assert 3 <= len(wanted) <= 9
    assert np.diff(wanted).max() <= 2 * np.diff(wanted).min()


def test_loads_of_a_huge_run_are_read_at_least_once(
    costly: TimedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_sample, "SAMPLE_VALUES", 10)
    assert len(sample_of(open_run(costly.root)).step) > 0
