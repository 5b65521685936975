"""`compare`: whether two runs are comparable, and which is better, against truths computed here."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, without_times
from reference import idle_fraction, per_step
from timed_run import write_timed

from eplb_analyze import open_run
from eplb_analyze.analysis.compare import Difference, StepTime, _size, compare_runs
from eplb_analyze.analysis.incidents import Cause, Incident, IncidentCost
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.cli.console import console
from eplb_analyze.cli.views.compare import _experts, _in_time, _incidents
from eplb_analyze.json_report import as_json
from eplb_analyze.metrics import series
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.report.answer import in_a_line
from eplb_dump import ExpertLoadWriter

EXPERTS, EP_SIZE, LAYERS = 8, 4, 3
SKEWED = [0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
#: The two hot experts on one rank, or on two.
TOGETHER, APART = [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 1, 3, 4, 5, 6, 7]


#: The options that name the runs of a dump.
AB = ("--run-a", "a", "--run-b", "b")


def write(
    root: Path, run_id: str, slots: list[int], *, seed: int = 0, steps: int = 120, **options: Any
) -> Any:
    """Loads ``[steps, layers, slots]``, written as global sums by one rank."""
    rng = np.random.default_rng(seed)
    tokens, routing = options.pop("tokens", 800), options.pop("routing", SKEWED)
    layers = options.pop("layers", LAYERS)
    loads = rng.multinomial(tokens, routing, size=(steps, layers))[:, :, slots]
    defaults: dict[str, Any] = {"model": "org/moe", "num_logical_experts": EXPERTS, "ep_size": EP_SIZE}
    with ExpertLoadWriter(root, scope="global", run_id=run_id, **{**defaults, **options}) as writer:
        for step, load in enumerate(loads):
            writer.record(step, load, np.array([slots] * layers))
            assert step % 100 or writer.flush()  # nothing may be dropped
    return loads


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    root = tmp_path_factory.mktemp("pair")
    config = {"eplb": {"window": 100, "interval": 10}, "same": 1}
    a = write(root, "a", TOGETHER, seed=1, engine="e", engine_version="1", engine_config=config)
    config = {"eplb": {"window": 200, "interval": 10}, "same": 1}
    return root, a, write(root, "b", APART, seed=2, engine="e", engine_version="2", engine_config=config)


def ranks_of(loads: Any) -> Any:
    return loads.reshape(*loads.shape[:2], EP_SIZE, -1).sum(axis=-1)


def test_figures_equal_the_formulas(pair: tuple[Path, Any, Any]) -> None:
    root, a, b = pair
    result = compare_runs(open_run(root, "a"), open_run(root, "b"))
    T = ranks_of(a), ranks_of(b)
    assert result.balancedness is not None
    assert result.idle_fraction is not None
    balance = [float(np.mean(per_step("balancedness", part))) for part in T]
    idle = [idle_fraction(part) for part in T]
    for found, (one, other) in ((result.balancedness, balance), (result.idle_fraction, idle)):
        assert (found.a, found.b, found.difference) == pytest.approx((one, other, other - one))
        assert found.low < found.difference < found.high
        assert found.verdict == "better"
    for i, layer in enumerate(result.layers):
        parts = [part[:, i : i + 1] for part in T]
        one, other = (float(np.mean(per_step("balancedness", part))) for part in parts)
        assert (layer.balancedness.a, layer.balancedness.difference) == pytest.approx((one, other - one))
        one, other = (idle_fraction(part) for part in parts)
        assert (layer.idle_fraction.a, layer.idle_fraction.difference) == pytest.approx((one, other - one))
    assert (result.a.tokens_per_step, result.token_ratio) == pytest.approx((800, 1))
    shares = [np.zeros((LAYERS, EXPERTS)), np.zeros((LAYERS, EXPERTS))]
    for share, loads, slots in zip(shares, (a, b), (TOGETHER, APART), strict=True):
        for slot, expert in enumerate(slots):
            share[:, expert] += loads[:, :, slot].sum(axis=0) / loads[:, 0].sum()
    distance = np.mean(
        [sum(abs(p - q) for p, q in zip(*rows, strict=True)) / 2 for rows in zip(*shares, strict=True)]
    )
    assert result.routing.distance == pytest.approx(distance)
    assert result.warnings == []


def test_swapped_runs_give_the_opposite_verdict(pair: tuple[Path, Any, Any]) -> None:
    root, _, _ = pair
    result = compare_runs(open_run(root, "b"), open_run(root, "a"))
    assert (result.verdict, {layer.balancedness.verdict for layer in result.layers}) == ("worse", {"worse"})
    assert result.idle_fraction is not None
    assert result.idle_fraction.verdict == "worse"


def test_runs_of_the_same_workload_do_not_differ_significantly(tmp_path: Path) -> None:
    found = []
    for seed in range(10):
        write(tmp_path, f"r{seed}", TOGETHER, seed=seed)
    for seed in range(0, 10, 2):
        result = compare_runs(open_run(tmp_path, f"r{seed}"), open_run(tmp_path, f"r{seed + 1}"))
        found.append(result.verdict)
    assert found.count("no significant difference") >= 4


def test_steps_of_a_long_run_are_summed_in_groups(
    pair: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, _ = pair
    plain = compare_runs(open_run(root, "a"), open_run(root, "b"))
    monkeypatch.setattr(series, "MAX_SUMS", 16)
    summed = compare_runs(open_run(root, "a"), open_run(root, "b"))
    assert plain.balancedness is not None
    assert summed.balancedness is not None
    assert summed.balancedness.difference == pytest.approx(plain.balancedness.difference)
    assert summed.balancedness.low == pytest.approx(plain.balancedness.low, abs=0.01)
    assert summed.verdict == "better"


# ---- the command


def test_json_has_the_stable_keys(pair: tuple[Path, Any, Any]) -> None:
    result = cli("compare", *AB, "--json", pair[0])
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert list(document) == [
        "schema_version", "comparable", "reasons", "warnings", "verdict", "size", "confidence", "a", "b",
        "balancedness", "idle_fraction", "step_times", "unexplained", "layers", "experts", "token_ratio",
        "routing", "settings",
    ]  # fmt: skip
    assert (document["comparable"], document["verdict"], document["confidence"]) == (True, "better", 0.95)
    assert list(document["a"]) == [
        "run_id", "model", "engine", "engine_version", "ep_size", "num_layers", "num_logical_experts",
        "num_physical_experts", "phase", "steps", "tokens_per_step", "rearrangements", "incidents",
        "searched",
    ]  # fmt: skip
    assert (document["a"]["run_id"], document["b"]["run_id"]) == ("a", "b")
    difference = ["a", "b", "difference", "low", "high", "verdict"]
    assert list(document["balancedness"]) == list(document["idle_fraction"]) == difference
    assert [list(layer) for layer in document["layers"]] == [
        ["layer", "part", "balancedness", "idle_fraction"]
    ] * LAYERS
    assert list(document["routing"]) == ["distance", "within_a", "within_b"]
    assert document["settings"] == [
        {"name": "engine_version", "a": "1", "b": "2"},
        {"name": "engine_config.eplb.window", "a": 100, "b": 200},
    ]


def test_text_output(pair: tuple[Path, Any, Any]) -> None:
    result = cli("compare", *AB, pair[0])
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "compare · org/moe · is B better than A?"
    assert "layers: 3 better, 0 worse, 0 not significant" in lines
    document = json.loads(cli("compare", *AB, "--json", pair[0]).stdout)["balancedness"]
    row = next(line.split() for line in lines if line.startswith("balancedness"))
    assert row[1:4] == [f"{document['a']:.3f}", f"{document['b']:.3f}", f"{document['difference']:+.3f}"]
    assert any(line.split() == ["engine_config.eplb.window", "100", "200"] for line in lines)


def test_runs_can_be_named_in_four_ways(pair: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _, _ = pair
    by_id = cli("compare", *AB, root).stdout
    assert by_id.startswith("compare")
    assert cli("compare", *AB, env={"EXPERT_LOAD_DUMP_DIR": str(root)}).stdout == by_id
    assert cli("compare", root / "run=a", root / "run=b").stdout == by_id
    assert cli("compare", *AB, root, root).stdout == by_id
    monkeypatch.chdir(root)
    assert cli("compare", *AB).stdout == by_id


def test_range_limits_both_runs(pair: tuple[Path, Any, Any]) -> None:
    root, a, _ = pair
    document = json.loads(cli("compare", "--steps", "20-49", "--json", *AB, root).stdout)
    assert document["a"]["steps"]["recorded"] == 30
    value = float(np.mean(per_step("balancedness", ranks_of(a[20:50]))))
    assert document["balancedness"]["a"] == pytest.approx(value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "org/other"}, "different models: org/moe and org/other"),
        ({"layers": 2}, "different layers: 3 (0 to 2) and 2 (0 to 1)"),
        ({"num_logical_experts": 9}, "different numbers of experts per layer: 8 and 9"),
        ({"steps": 5}, "B has 5 complete steps with tokens, 8 are needed"),
    ],
)
def test_incomparable_runs_have_reasons(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write(tmp_path, "a", TOGETHER)
    write(tmp_path, "b", APART, **options)
    result = cli("compare", *AB, "--json", tmp_path)
    document = json.loads(result.stdout)
    assert (result.returncode, document["verdict"], document["reasons"]) == (1, "not comparable", [reason])
    assert (document["comparable"], document["balancedness"], document["layers"]) == (False, None, [])
    text = cli("compare", *AB, tmp_path)
    assert text.returncode == 1
    assert reason in text.stdout.splitlines()
    assert "NOT COMPARABLE" in text.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"ep_size": 2}, "different EP sizes, 4 and 2"),
        ({"tokens": 1600}, "B has 2.00x the tokens per step"),
        ({"routing": SKEWED[::-1]}, "different workload: 20% of the tokens go to different experts"),
    ],
)
def test_unlike_conditions_are_warned_about(tmp_path: Path, options: dict[str, Any], warning: str) -> None:
    write(tmp_path, "a", TOGETHER)
    write(tmp_path, "b", APART, seed=1, **options)
    result = cli("compare", *AB, "--json", tmp_path)
    document = json.loads(result.stdout)
    assert (result.returncode, document["comparable"], len(document["warnings"])) == (0, True, 1)
    assert warning in document["warnings"][0]
    assert warning in result.stderr


def test_invalid_input_is_an_error(pair: tuple[Path, Any, Any], tmp_path: Path) -> None:
    root, _, _ = pair
    one_error(cli("compare", "--run-a", "a", "--run-b", "zz", root), 2, "no run 'zz'", "its runs are:")
    one_error(cli("compare", root, tmp_path / "nowhere"), 3, "nowhere", "no such folder")
    one_error(cli("compare", *AB, tmp_path), 3, "no run in it")
    one_error(cli("compare", "--steps", "900-", *AB, root), 2, "the run has no steps in 900-")
    for overlapping in ([], ["--steps-a", "0-59", "--steps-b", "59-119"]):
        one_error(cli("compare", "--run-a", "a", *overlapping, root), 2, "share steps", "--steps-b")


def test_imbalance_explains_the_planted_part_of_the_step_time(tmp_path: Path) -> None:
    """B is more even, and each of its prefill steps takes 8 ms more for another reason."""
    phases = ("decode", "prefill")
    a = write_timed(tmp_path / "a", 0.02, seed=1, skew=2.0, phases=phases)
    b = write_timed(tmp_path / "b", 0.02, seed=2, skew=0.5, phases=phases, slow={"prefill": 8.0})
    rows = compare_runs(open_run(a.root), open_run(b.root)).step_times
    assert [row.phase for row in rows] == [*phases]
    for start, row in enumerate(rows):
        ms, cost = ([values[start::2].mean() for values in pair] for pair in ((a.ms, b.ms), (a.cost, b.cost)))
        assert (row.step_ms.a, row.step_ms.b) == pytest.approx(ms, rel=0.02)
        assert row.step_ms.difference == pytest.approx(ms[1] - ms[0], abs=0.1)
        assert row.step_ms.verdict == ("worse" if start else "better")
        assert row.imbalance_ms is not None
        assert row.imbalance_ms.estimate == pytest.approx(cost[1] - cost[0], rel=0.1)
        assert row.imbalance_ms.low < row.imbalance_ms.estimate < row.imbalance_ms.high
    text = cli("compare", a.root, b.root).stdout
    assert text.count("from imbalance") == 2
    document = json.loads(cli("compare", a.root, b.root, "--json").stdout)
    assert document["step_times"][0]["imbalance_ms"]["estimate"] == rows[0].imbalance_ms.estimate
    assert document["unexplained"] is None


def test_step_times_without_a_known_price_are_not_explained(tmp_path: Path) -> None:
    for name, steps in (("a", 300), ("b", 60)):
        write_timed(tmp_path / name, 0.02, steps=steps)
    result = compare_runs(open_run(tmp_path / "a"), open_run(tmp_path / "b"))
    assert result.step_times == []
    assert result.unexplained is not None
    assert "B: cost not measurable in this run" in result.unexplained
    assert "step times: B: cost not measurable" in cli("compare", tmp_path / "a", tmp_path / "b").stdout


# ---- what differs

#: Expert 5 of layer 1 gets three times the usual tokens from step 120 on; from 240 on a rearrangement
#: gives it three slots.
HOT, HELPED, LAST = 120, 240, 360


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The dump, and tokens ``[steps, layers, experts]``. 9 experts in 12 slots on 4 ranks."""
    root = tmp_path_factory.mktemp("story")
    rng = np.random.default_rng(5)
    usual = np.r_[np.arange(9), 0, 1, 2]
    helped = np.r_[np.arange(9), 5, 1, 5]
    logical = np.zeros((LAST, 3, 9), np.int64)
    with ExpertLoadWriter(
        root, scope="global", run_id="r", model="org/moe", num_logical_experts=9, ep_size=4
    ) as writer:
        for step in range(LAST):
            weights = np.ones((3, 9))
            weights[1, 5] = 3 if step >= HOT else 1
            maps = np.array([usual, helped if step >= HELPED else usual, usual])
            loads = np.zeros((3, 12), np.int64)
            for layer in range(3):
                logical[step, layer] = rng.multinomial(1800, weights[layer] / weights[layer].sum())
                for expert in range(9):
                    slots = np.flatnonzero(maps[layer] == expert)
                    even = np.full(len(slots), 1 / len(slots))
                    loads[layer, slots] = rng.multinomial(logical[step, layer, expert], even)
            writer.record(step, loads, maps)
            assert step % 100 or writer.flush()
    return root, logical


def test_the_layer_and_the_expert_behind_a_difference_are_named(story: tuple[Path, Any]) -> None:
    root, logical = story
    run = open_run(root)
    result = compare_runs(run, run, steps_a=(0, HOT), steps_b=(HOT, HELPED))
    assert (result.verdict, result.size) == ("worse", "moderate")
    parts = {layer.layer: layer.part for layer in result.layers}
    assert sum(part or 0.0 for part in parts.values()) == pytest.approx(1)
    assert parts[1] == pytest.approx(1, abs=0.1)
    assert [(row.layer, row.expert) for row in result.experts] == [(1, 5)]
    row = result.experts[0]
    shares = [
        logical[low:high, 1, 5].sum() / logical[low:high, 1].sum() for low, high in ((0, 120), (120, 240))
    ]
    assert (row.share_a, row.share_b) == pytest.approx(shares)
    assert (row.replicas_a, row.replicas_b) == pytest.approx((1, 1))
    text = " ".join(cli("compare", "--steps-a", "0-119", "--steps-b", "120-239", root).stdout.split())
    said = f"all from layer 1: expert 5 went from {shares[0]:.1%} to {shares[1]:.1%} of tokens"
    assert "WORSE: " in text
    assert said in text


def test_parts_add_up_to_the_difference_of_the_idle_fraction(story: tuple[Path, Any]) -> None:
    run = open_run(story[0])
    result = compare_runs(run, run, steps_a=(0, HOT), steps_b=(HELPED, LAST))
    lost = []
    for low, high in ((0, HOT), (HELPED, LAST)):
        T = np.concatenate([block.rank_load() for block in run.blocks((low, high))])
        slowest, mean = T.max(axis=2).sum(axis=0), T.mean(axis=2).sum(axis=0)
        lost.append((slowest - mean) / mean.sum())
    change = lost[1] - lost[0]
    assert [layer.part for layer in result.layers] == pytest.approx(change / change.sum())
    assert result.idle_fraction is not None
    idle = [part.sum() / (1 + part.sum()) for part in lost]
    assert result.idle_fraction.difference == pytest.approx(idle[1] - idle[0])


def test_replicas_that_a_rearrangement_added_are_named(story: tuple[Path, Any]) -> None:
    root, logical = story
    run = open_run(root)
    result = compare_runs(run, run, steps_a=(HOT, HELPED), steps_b=(HELPED, LAST))
    assert (result.verdict, result.size) == ("better", "large")
    assert (result.experts[0].layer, result.experts[0].expert) == (1, 5)
    assert (result.experts[0].replicas_a, result.experts[0].replicas_b) == pytest.approx((1, 3))
    text = " ".join(cli("compare", "--steps-a", "120-239", "--steps-b", "240-359", root).stdout.split())
    share = logical[HELPED:, 1, 5].sum() / logical[HELPED:, 1].sum()
    assert f"expert 5 ({share:.1%} of tokens) went from 1 to 3 replicas" in text


def test_incidents_of_either_side_are_told_in_a_line(story: tuple[Path, Any]) -> None:
    root, _ = story
    run = open_run(root)
    result = compare_runs(run, run, steps_a=(0, 60), steps_b=(60, LAST))
    assert result.a.incidents == []
    assert result.b.incidents == summarize(run, (60, LAST)).incidents
    (incident,) = result.b.incidents
    assert (incident.layer, incident.cause.expert) == (1, 5)
    assert (incident.first_step, incident.last_step) == (HOT, HELPED - 1)
    options = "--steps-a", "0-59", "--steps-b", "60-359"
    text = " ".join(cli("compare", *options, root).stdout.split())
    assert "no incident in A" in text
    assert f"incident in B: {in_a_line(incident, run.clock)}" in text
    assert f"B r, steps 60-359, {run.clock.span_text((60, 359))}: 300 complete steps" in text
    document = json.loads(cli("compare", *options, "--json", root).stdout)
    assert document["a"]["incidents"] == []
    assert without_times(document["b"]["incidents"]) == as_json(result.b.incidents)


def test_side_that_an_incident_covers_shows_it_with_its_own_edges(story: tuple[Path, Any]) -> None:
    root, _ = story
    run = open_run(root)
    for steps in ((HOT, HELPED), (HOT + 40, HELPED - 40)):
        result = compare_runs(run, run, steps_a=(0, HOT), steps_b=steps)
        assert result.a.incidents == []
        (found,), (whole,) = result.b.incidents, summarize(run).incidents
        # A cost is measured in a sample, which differs a little.
        assert replace(found, cost=whole.cost) == whole
    options = "--steps-a", "0-119", "--steps-b", f"{HOT + 40}-{HELPED - 41}"
    text = " ".join(cli("compare", *options, root).stdout.split())
    selected = f"the selected steps {HOT + 40}-{HELPED - 41}"
    assert "incident in B: " in text
    assert f"; began before {selected}, and ended after them" in text


def test_incidents_beyond_the_top_are_counted() -> None:
    def incident(first: int) -> Incident:
        cost = IncidentCost(None, 9.0)
        return Incident(2, (2,), (), first, first + 9, None, None, 2.0, 1.1, Cause("unknown"), None, cost)

    side: Any = SimpleNamespace(
        incidents=[incident(20 * i) for i in range(5)], steps=Completeness(), searched=None
    )
    clock = RunClock("r", [])
    text = io.StringIO()
    _incidents(console(text), "B", side, clock, 3)
    lines = text.getvalue().splitlines()
    assert lines[2] == "incident in B: steps 40-49: layer 2 at 2.0x the mean; no cause found"
    assert lines[3:] == ["and 2 more incidents in B; `summary` shows all"]


def test_only_experts_of_the_layers_shown_are_named(story: tuple[Path, Any]) -> None:
    root, _ = story
    run = open_run(root)
    result = compare_runs(run, run, steps_a=(HOT, HELPED), steps_b=(HELPED, LAST))
    other = replace(result.experts[0], layer=2, expert=8)
    assert next(row for row in result.layers if row.layer == 2).idle_fraction.verdict != "better"
    text = io.StringIO()
    _experts(console(text), replace(result, experts=[*result.experts, other]), 100)
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert [row[:2] for row in rows if row and row[0].isdigit()] == [["1", str(result.experts[0].expert)]]


def test_imbalance_is_named_also_where_the_whole_step_time_does_not_differ() -> None:
    def lines(low: float) -> list[str]:
        whole = Difference(23.8, 23.9, 0.1, -0.1, 0.3, "no significant difference")
        given: Any = SimpleNamespace(step_times=[StepTime("decode", whole, Milliseconds(0.15, low, 0.2))])
        return _in_time(given)

    told = "In time: steps take no significantly different time (23.8 ms to 23.9 ms)"
    assert lines(0.1) == [f"{told}; imbalance explains +0.15 ms (+0.10 to +0.20)"]
    assert lines(-0.1) == [told]


def test_nothing_is_named_if_nothing_differs(story: tuple[Path, Any]) -> None:
    root, _ = story
    run = open_run(root)
    result = compare_runs(run, run, steps_a=(0, 60), steps_b=(60, HOT))
    assert (result.verdict, result.size, result.experts) == ("no significant difference", None, [])
    text = cli("compare", "--steps-a", "0-59", "--steps-b", "60-119", root).stdout
    assert "NO SIGNIFICANT DIFFERENCE: idle time changed by" in " ".join(text.split())
    assert "expert" not in text.split("settings")[0].replace("different experts", "")


def test_significance_and_size_are_two_things() -> None:
    def size(difference: float, half: float) -> str | None:
        interval = Interval(difference, difference - half, difference + half)
        return _size(Difference.of(0.1, 0.1 + difference, interval, better=-1))

    assert size(0.05, 0.06) is None
    found = [size(difference, 0.0001) for difference in (0.001, -0.006, 0.05, -0.3)]
    assert found == ["negligible", "slight", "moderate", "large"]
