"""`experts`: figures against a reference computed here, step by step, from the arrays recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, open_writer, without_times, write

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.experts import ExpertReport, expert_report
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.summary import summarize
from eplb_dump import ExpertLoadWriter

LAYERS, LOGICAL, SLOTS, RANKS, STEPS = 3, 6, 8, 4, 130
#: Steps without a figure: one rank did not record, or no rank did.
INCOMPLETE, ALL_DUMMY = {33, 70}, {50, 51}
Array = np.ndarray[Any, np.dtype[np.int64]]


def placement(step: int) -> Array:
    """Layers change at different steps, in the middle of windows of 20; slot 7 is empty at first."""
    first = np.array([0, 1, 2, 3, 4, 5, 0, -1])
    second = np.array([5, 4, 3, 2, 1, 0, 2, 2])
    return np.array([second if step >= change else first for change in (47, 90, 1000)])


def part(rank: int, step: int) -> Array:
    rng = np.random.default_rng(1000 * rank + step)
    load = rng.poisson(30, (LAYERS, SLOTS))
    load[0, placement(step)[0] == 3] += 400 * (60 <= step < 100)
    load[1, placement(step)[1] == 4] = 0
    load[placement(step) < 0] = 0
    return load


def idle(rank: int, step: int) -> bool:
    return step in ALL_DUMMY or (rank == 2 and step % 7 == 0)


def record(root: Path, **options: Any) -> None:
    for rank in range(RANKS):
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=LOGICAL, ep_size=RANKS, ep_rank=rank, run_id="r",
            moe_layers=[3, 4, 7], segment_steps=48, **options,
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                if step in INCOMPLETE and rank == 1:
                    continue
                if idle(rank, step):
                    writer.skip("dummy", step=step)
                else:
                    writer.record(step, part(rank, step), placement(step))


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    record(root)
    return root


def complete_steps() -> list[int]:
    return [s for s in range(STEPS) if s not in INCOMPLETE | ALL_DUMMY]


def physical(step: int) -> Array:
    return np.sum([part(r, step) for r in range(RANKS) if not idle(r, step)], axis=0)


def logical(step: int) -> Array:
    out = np.zeros((LAYERS, LOGICAL), np.int64)
    for layer, slots in enumerate(placement(step)):
        for slot, expert in enumerate(slots):
            if expert >= 0:
                out[layer, expert] += physical(step)[layer, slot]
    return out


def reference(steps: list[int], window: int, factor: float) -> dict[str, Array]:
    """Every column as ``[layers, experts]``, by the words of docs/metrics.md."""
    loads = np.array([logical(s) for s in steps])
    windows = [loads[i : i + window].sum(axis=0) for i in range(0, len(steps), window)]
    ends = [(steps[i], steps[min(i + window, len(steps)) - 1]) for i in range(0, len(steps), window)]
    if len(steps) % window and 2 * (len(steps) % window) < window and len(windows) > 1:
        windows.pop()
    times = np.array([w / w.mean(axis=1, keepdims=True) for w in windows])
    hot = times >= factor
    share = loads.sum(axis=0) / loads.sum(axis=(0, 2))[:, None]
    last = steps[-1]
    copies = np.array([[np.sum(slots == e) for e in range(LOGICAL)] for slots in placement(last)])
    doubled, uneven = np.zeros_like(copies, bool), np.full(copies.shape, np.nan)
    due = np.full(copies.shape, np.nan)
    for layer, slots in enumerate(placement(last)):
        since = [s for s in steps if np.array_equal(placement(s)[layer], slots)]
        tokens = np.sum([physical(s)[layer] for s in since], axis=0)
        of_expert = np.array([tokens[slots == e].sum() for e in range(LOGICAL)])
        due[layer] = of_expert / of_expert.sum() * np.sum(slots >= 0)
        for expert in range(LOGICAL):
            own = np.flatnonzero(slots == expert)
            doubled[layer, expert] = len({slot // 2 for slot in own}) < len(own)
            if len(own) > 1:
                uneven[layer, expert] = tokens[own].max() / tokens[own].mean()
    burstiness = np.full(share.shape, np.nan)
    if len(windows) > 1:
        np.divide(times.std(axis=0), times.mean(axis=0), out=burstiness, where=share > 0)
    which = [np.flatnonzero(column) for column in hot.reshape(len(windows), -1).T]
    return {
        "tokens": loads.sum(axis=0),
        "share": share,
        "times_mean": share * LOGICAL,
        "peak_times_mean": times.max(axis=0),
        "persistence": hot.mean(axis=0),
        "first_hot_step": np.array([ends[w[0]][0] if len(w) else np.nan for w in which]),
        "last_hot_step": np.array([ends[w[-1]][1] if len(w) else np.nan for w in which]),
        "burstiness": burstiness,
        "cold": share * LOGICAL <= 1 / factor,
        "dead": loads.sum(axis=0) == 0,
        "replicas": copies,
        "due_replicas": due,
        "under_replicated": due - copies >= 1,
        "over_replicated": (copies - due >= 1) & (copies > 1),
        "worst_replica": uneven,
        "replicas_on_one_rank": doubled,
    }


def check(report: ExpertReport, expected: dict[str, Array], layers: slice = slice(None)) -> None:
    for name, values in expected.items():
        found = report.experts[name].cast(float).fill_null(np.nan).to_numpy()
        wanted = values.reshape(LAYERS, LOGICAL)[layers].reshape(-1).astype(float)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("window", "factor"), [(20, 2.0), (7, 1.5), (1, 3.0), (100, 2.0), (1000, 1.2)])
def test_figures_equal_the_reference(dump: Path, window: int, factor: float) -> None:
    report = expert_report(open_run(dump), window=window, hot_factor=factor)
    check(report, reference(complete_steps(), window, factor))
    assert report.recorded == len(complete_steps()) == 126
    assert report.unknown_tokens == 0
    assert report.steps.to_json()["incomplete"] == 2


def test_layer_and_range_limit_the_figures(dump: Path) -> None:
    report = expert_report(open_run(dump), 4, (30, 95), window=20)
    steps = [s for s in complete_steps() if 30 <= s < 95]
    check(report, reference(steps, 20, 2.0), slice(1, 2))
    assert (report.first_step, report.last_step) == (steps[0], steps[-1])
    assert report.experts["layer"].unique().to_list() == [4]


def test_drift_is_the_overlap_of_hot_sets(dump: Path) -> None:
    window = 5
    report = expert_report(open_run(dump), window=window)
    steps = complete_steps()
    windows = [sum(logical(s) for s in steps[i : i + window]) for i in range(0, 125, window)]
    hottest = [np.argmax(load, axis=1) for load in windows]  # an eighth of six experts is one
    found = {d.lag: (d.overlap, d.pairs) for d in report.drift}
    assert list(found) == [1, 2, 5, 10, 20]
    for lag, (overlap, pairs) in found.items():
        same = [a == b for a, b in zip(hottest[lag:], hottest[:-lag], strict=True)]
        assert pairs == 3 * (len(windows) - lag)
        assert overlap == pytest.approx(np.mean(same))
    assert (report.hot_set, report.chance_overlap) == (1, 1 / LOGICAL)


def test_token_replication_is_divided_out(dump: Path, tmp_path: Path) -> None:
    record(tmp_path, token_replication=4)
    frame = expert_report(open_run(tmp_path)).experts
    plain = expert_report(open_run(dump)).experts
    assert frame["tokens"].to_list() == (plain["tokens"] / 4).to_list()
    assert frame.drop("tokens").equals(plain.drop("tokens"))


def write_global(root: Path, loads: list[Array], **options: Any) -> None:
    shape = loads[0].shape
    defaults = {"model": "m", "num_logical_experts": shape[1], "ep_size": 2, "queue_steps": 1000}
    with ExpertLoadWriter(root, **{**defaults, **options}, scope="global") as writer:  # type: ignore[arg-type]
        for load in loads:
            writer.record(None, load, np.tile(np.arange(load.shape[1]), (len(load), 1)))


def test_planted_hot_and_cold_experts_are_found(tmp_path: Path) -> None:
    """Layer 7's expert 3 becomes hot at step 300, layer 2's expert 5 is always, expert 6 is dead."""
    loads = []
    for step in range(600):
        load = np.full((8, 16), 100)
        load[7, 3] = 400 if step >= 300 else 100
        load[2, 5], load[2, 6] = 700, 0
        loads.append(load)
    write_global(tmp_path, loads)
    report = expert_report(open_run(tmp_path))
    hot = report.hot.rows_by_key(["layer", "logical"], named=True, unique=True)
    assert list(hot) == [(2, 5), (7, 3)]
    story, always = hot[7, 3], hot[2, 5]
    assert (story["verdict"], always["verdict"]) == ("bursts", "always")
    assert (story["first_hot_step"], story["last_hot_step"], story["persistence"]) == (300, 599, 0.5)
    assert story["share"] == pytest.approx((300 * 400 + 300 * 100) / (300 * 1900 + 300 * 1600))
    assert story["peak_times_mean"] == pytest.approx(400 * 16 / 1900)
    assert always["due_replicas"] == pytest.approx(16 * 700 / 2100)
    assert always["under_replicated"]
    dead = report.experts.filter("dead").select("layer", "logical", "cold").rows()
    assert dead == [(2, 6, True)]
    assert report.cold["logical"].to_list() == [6]


def test_nothing_is_summed_across_a_change_of_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global"
    ) as writer:
        for step in range(30):
            slots = 6 if 10 <= step < 20 else 4
            writer.record(None, rng.poisson(50, (2, slots)), np.tile(np.arange(slots) % 4, (2, 1)))
    report = expert_report(open_run(tmp_path), window=5)
    assert (report.first_step, report.last_step, report.recorded, report.windows) == (20, 29, 10, 2)
    assert "steps 0 to 19 are left out" in report.notes[0]
    whole = open_run(tmp_path).loads(steps=(20, 30))
    assert report.experts["tokens"].sum() == whole["load"].list.sum().sum()


def test_loads_without_a_placement_are_left_out_and_counted(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global"
    ) as writer:
        for step in range(20):
            writer.record(None, np.full((2, 4), 100), None if step < 5 else np.tile(np.arange(4), (2, 1)))
    report = expert_report(open_run(tmp_path), window=10)
    assert report.unknown_tokens == 5 * 2 * 400
    assert report.experts["tokens"].to_list() == [15 * 100] * 8
    assert "4,000 tokens went to slots without a known expert" in report.notes[0]


def test_run_without_any_placement_is_an_error(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, run_id="r", scope="global"
    ) as writer:
        writer.record(None, np.full((2, 4), 100), None)
    one_error(cli("experts", tmp_path), 3, "no placement is known")


def test_sums_beyond_32_bits_are_exact(tmp_path: Path) -> None:
    write_global(tmp_path, [np.full((1, 4), 2**30)] * 6)
    report = expert_report(open_run(tmp_path), window=3)
    assert report.experts["tokens"].to_list() == [6 * 2**30] * 4
    assert report.experts["peak_times_mean"].to_list() == [1.0] * 4


def test_values_at_a_threshold_count(tmp_path: Path) -> None:
    write_global(tmp_path, [np.array([[1, 5, *[3] * 9]])], ep_size=1)
    cold = expert_report(open_run(tmp_path), hot_factor=3.0).cold
    assert cold["logical"].to_list() == [0]  # 1 of 33 is a third of the mean of 11 experts
    write_global(tmp_path, [np.array([[15, *[1] * 7, *[0] * 14]])], run_id="slots")
    report = expert_report(open_run(tmp_path, "slots"))
    assert report.experts["due_replicas"][0] == report.experts["times_mean"][0] == 15


GOLDEN = """\
org/moe · run r
40 complete steps, 0-39 (03:12:04-03:12:04), in 4 windows of 10
hottest at the end: expert 0 of layer 1, 2.0x the mean since the layer's last
rearrangement, hot since step 30 (03:12:04)
highest peak: expert 0 of layer 0, 2.4x the mean in steps 0-19
(03:12:04-03:12:04)
replicas: 2 experts with too few (judged by the loads of steps 20-39
(03:12:04-03:12:04), since the last rearrangement)
8 experts: 0 always hot, 3 hot in bursts, 1 cold

hot in bursts, highest peak first (2 of 3)
layer   expert   load   peak   replicas     due   hot in steps   since
─────────────────────────────────────────────────────────────────────────
    0        0   1.98   2.42          1   3.0 !   0-19           03:12:04
    1        3   0.40   2.41          1     0.6   0-19           03:12:04

cold
layer   expert   load   peak   replicas     due   hot in steps   since
──────────────────────────────────────────────────────────────────────
    0        3   0.39   0.41          1     0.6   –              –

overlap of each layer's hottest expert with those of later windows: 83% after 1
window, 50% after 2 (by chance: 25%)
hot: at least 2x the layer's mean in a window; cold: at most 1/2 over all steps
load: times the layer's mean, since the layer's last rearrangement; due:
replicas that this load justifies (!: one or more are missing); *: two replicas
on one rank
hidden at this width: x mean, hot in, CV, uneven (use --json, or a terminal of
120 columns)
"""


@pytest.fixture(scope="module")
def cooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Expert 0 is hot in steps 100 to 199; from step 200 on it has three replicas, and an even load."""
    root = tmp_path_factory.mktemp("cooled")
    alone, thrice = np.array([[0, 1, 2, 3, 4, 5, 6, 7]]), np.array([[0, 1, 2, 3, 4, 5, 0, 0]])
    with open_writer(root, num_logical_experts=8, ep_size=2, scope="global") as writer:
        for step in range(400):
            share = np.full(8, 100.0)
            share[0] = 1000 if 100 <= step < 200 else 100
            slots = thrice if step >= 200 else alone
            copies = np.bincount(slots[0], minlength=8)
            writer.record(step, (share[slots] / copies[slots]).astype(int), slots)
    return root


def test_replicas_are_judged_under_the_placement_they_are_in(cooled: Path) -> None:
    """Not by the load that an earlier placement had to serve with one replica."""

    def row(**options: Any) -> dict[str, Any]:
        return expert_report(open_run(cooled), **options).experts.row(0, named=True)

    now, whole, hot = row(), row(all_placements=True), row(steps=(100, 200))
    assert (now["replicas"], now["over_replicated"], now["under_replicated"]) == (3, True, False)
    # Of 6 experts with slots, 99 of 599 tokens since step 200; 8 experts' mean.
    assert now["placement_times_mean"] == pytest.approx(99 * 8 / 599)
    assert (now["first_hot_step"], now["last_hot_step"]) == (100, 199)
    assert whole["replicas"] == 3
    assert whole["placement_times_mean"] == whole["times_mean"] > 2
    assert not whole["over_replicated"]
    assert (hot["replicas"], hot["under_replicated"]) == (1, True)


def test_hottest_expert_is_named_with_step_and_clock_time(cooled: Path) -> None:
    told = " ".join(cli("experts", cooled).stdout.split())
    assert re.search(
        r"highest peak: expert 0 of layer 0, 4\.7x the mean in steps 100-199 \(\d\d:\d\d:\d\d-", told
    )
    assert "judged by the loads of steps 200-399 (" in told
    assert "1 expert with too many" in told
    early = " ".join(cli("experts", "--steps", "-199", cooled).stdout.split())
    hottest = "hottest at the end: expert 0 of layer 0, 3.5x the mean over all steps"
    assert f"{hottest}, hot since step 100 (" in early
    assert "times the layer's mean, over all steps; due" in early
    assert "times the layer's mean, since the layer's last rearrangement; due" in told
    assert "(judged by the loads of all steps)" in early


def test_text_output(tmp_path: Path) -> None:
    write(tmp_path)
    result = cli("experts", "--window-steps", "10", "--top", "2", tmp_path)
    told = re.sub(r"\d\d:\d\d:\d\d", "03:12:04", result.stdout)
    assert (result.returncode, result.stderr, told) == (0, "", GOLDEN)
    wide = cli(
        "experts", "--window-steps", "10", "--layer", "1", "--hot", tmp_path, env={"COLUMNS": "120"}
    ).stdout
    assert max(map(len, wide.splitlines())) > 80
    assert "0-19" in wide
    assert "\ncold" not in wide
    assert "in bursts, highest" not in cli("experts", "--window-steps", "10", "--cold", tmp_path).stdout


def test_json_output(tmp_path: Path) -> None:
    write(tmp_path)
    arguments = ("experts", "--window-steps", "10", "--layer", "1", "--json")
    result = cli(*arguments, tmp_path)
    document = without_times(json.loads(result.stdout))
    assert (result.returncode, result.stderr) == (0, "")
    experts = document.pop("experts")
    assert document == {
        "schema_version": 1,
        "run": {"run_id": "r", "model": "org/moe"},
        "layer": 1,
        "tier": "full",
        "steps": {
            "first": 0, "last": 39, "seen": 40, "recorded": 40, "dummy": 0, "not_sampled": 0, "dropped": 0,
            "rejected": 0, "incomplete": 0, "missing": 0, "retired": 0,
        },
        "first_step": 0,
        "last_step": 39,
        "recorded": 40,
        "missing_ranks": [],
        "window": 10,
        "windows": 4,
        "hot_factor": 2.0,
        "all_placements": False,
        "placement_first_step": 20,
        "counts": {
            "experts": 4, "always": 0, "bursts": 2, "never": 2, "cold": 0, "dead": 0, "under_replicated": 1,
            "over_replicated": 0, "replicas_on_one_rank": 0,
        },
        "drift": {
            "hot_set": 1,
            "chance_overlap": 0.25,
            "lags": [
                {"lag": 1, "overlap": 2 / 3, "pairs": 3},
                {"lag": 2, "overlap": 0.0, "pairs": 2},
            ],
        },
        "unknown_tokens": 0,
        "layers_without_placement": [],
        "notes": [],
    }  # fmt: skip
    assert [e["logical"] for e in experts] == [0, 1, 2, 3]
    expert_3 = dict(experts[3])
    for name in (
        "share",
        "times_mean",
        "peak_times_mean",
        "burstiness",
        "due_replicas",
        "placement_times_mean",
    ):
        expert_3[name] = round(expert_3[name], 3)
    assert expert_3 == {
        "layer": 1, "logical": 3, "tokens": 16817, "share": 0.35, "times_mean": 1.401,
        "peak_times_mean": 2.41, "persistence": 0.5, "verdict": "bursts", "first_hot_step": 0,
        "last_hot_step": 19, "burstiness": 0.711, "cold": False, "dead": False,
        "placement_times_mean": 0.405, "replicas": 1, "due_replicas": 0.607,
        "under_replicated": False, "over_replicated": False, "worst_replica": None,
        "replicas_on_one_rank": False,
    }  # fmt: skip
    hot = json.loads(cli(*arguments, "--hot", tmp_path).stdout)["experts"]
    assert [e["logical"] for e in hot] == [3, 0]
    assert json.loads(cli(*arguments, "--cold", tmp_path).stdout)["experts"] == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--layer", "5"], "no MoE layer 5"),
        (["--steps", "900-"], "the run has no steps in 900-"),
    ],
)
def test_something_not_in_the_dump_is_a_usage_error(dump: Path, arguments: list[str], word: str) -> None:
    one_error(cli("experts", *arguments, dump), 2, word)


@pytest.mark.parametrize(
    "arguments", [["--window-steps", "0"], ["--hot-factor", "1"], ["--hot-factor", "inf"]]
)
def test_invalid_option_is_a_usage_error(dump: Path, arguments: list[str]) -> None:
    result = cli("experts", *arguments, dump)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert arguments[0] in result.stderr


def test_damaged_segment_is_left_out_and_reported(tmp_path: Path) -> None:
    record(tmp_path)
    path = next(tmp_path.glob("**/rank=00002/**/loads-000001.parquet"))
    path.write_bytes(path.read_bytes()[:-50])
    result = cli("experts", "--json", tmp_path)
    one_error(result, 3, "loads-000001.parquet")
    document = json.loads(result.stdout)
    good = [s for s in complete_steps() if not 48 <= s < 96 or idle(2, s)]
    assert document["recorded"] == len(good)
    assert sum(e["tokens"] for e in document["experts"]) == sum(logical(s).sum() for s in good)


def test_range_without_complete_step_is_unusable(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=1, run_id="r") as writer:
        for _ in range(9):
            writer.skip("dropped")
    one_error(cli("experts", tmp_path), 3, "no step of the run is complete")


def flags(report: ExpertReport, layer: int, logical: int) -> dict[str, Any]:
    [row] = report.experts.filter(layer=layer, logical=logical).to_dicts()
    return row


def test_replicas_are_judged_by_the_loads_under_the_placement_they_have(tmp_path: Path) -> None:
    """Expert 77 is hot from step 100 on and gets 10 replicas at step 200, of the 12 that it is worth."""
    experts, slots, steps = 96, 120, 300
    even = np.arange(slots) % experts
    rest = [e for e in range(experts) if e != 77]
    after = np.r_[[77] * 10, rest, rest[: slots - 10 - len(rest)]]
    rng = np.random.default_rng(77)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=experts, ep_size=4, scope="global", run_id="r"
    ) as writer:
        for step in range(steps):
            placement = after if step >= 200 else even
            share = np.ones(experts)
            share[77] = 12 * (experts - 1) / (slots - 12) if step >= 100 else 0.01
            logical = rng.multinomial(100_000, share / share.sum())
            load = np.zeros(slots, np.int64)
            for expert in range(experts):
                own = np.flatnonzero(placement == expert)
                load[own] = logical[expert] // len(own)
                load[own[0]] += logical[expert] % len(own)
            writer.record(step, load[None], placement[None])
    row = flags(expert_report(open_run(tmp_path)), 0, 77)
    assert row["replicas"] == 10
    assert row["due_replicas"] == pytest.approx(12, abs=0.1)
    assert (row["under_replicated"], row["over_replicated"]) == (True, False)
    before = flags(expert_report(open_run(tmp_path), steps=(0, 100)), 0, 77)
    assert (before["replicas"], before["under_replicated"]) == (1 + (slots - experts > 77), False)


def test_too_new_placement_is_noted_and_one_without_tokens_is_not_judged(tmp_path: Path) -> None:
    placements = [np.array([[0, 1, 2, 3]] * 2), np.array([[3, 2, 1, 0], [0, 1, 2, 3]])]
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global", run_id="r"
    ) as writer:
        for step in range(50):
            load = np.full((2, 4), 40)
            load[0] = 0 if step == 49 else load[0]
            writer.record(step, load, placements[step == 49])
    report = expert_report(open_run(tmp_path))
    assert any("last rearrangement" in note for note in report.notes)
    new, old = flags(report, 0, 2), flags(report, 1, 2)
    assert (new["due_replicas"], new["under_replicated"], new["over_replicated"]) == (None, False, False)
    assert old["due_replicas"] == 1
    assert cli("experts", tmp_path).returncode == 0


@pytest.mark.parametrize("local_tokens", [4, 400])
def test_shared_expert_on_every_rank_has_the_replicas_it_needs(tmp_path: Path, local_tokens: int) -> None:
    """Routed experts are judged without it: expert 3 has four times the mean and one slot."""
    routed, ranks = 12, 4
    placement = np.array([[*range(r * 3, r * 3 + 3), routed] for r in range(ranks)]).ravel()
    load = np.where(placement == routed, local_tokens, 100)
    load[placement == 3] = 400
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=routed + 1, ep_size=ranks, scope="global", run_id="r"
    ) as writer:
        for step in range(40):
            writer.record(step, np.stack([load, load]), np.stack([placement, placement]))
    report = expert_report(open_run(tmp_path))
    for layer in range(2):
        shared, hot = flags(report, layer, routed), flags(report, layer, 3)
        assert shared["replicas"] == ranks
        assert (shared["under_replicated"], shared["over_replicated"]) == (False, False)
        assert hot["due_replicas"] == pytest.approx(400 / 1500 * routed)
        assert hot["under_replicated"] is True
    assert report.counts["under_replicated"] == 2
    assert report.counts["over_replicated"] == 0


def test_expert_on_every_rank_in_one_layer_only_can_be_over_replicated(tmp_path: Path) -> None:
    placement = np.array([[0, 1, 0, 2], [0, 1, 2, 3]])
    load = np.array([[1, 100, 1, 100], [50, 50, 50, 52]])
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global", run_id="r"
    ) as writer:
        for step in range(40):
            writer.record(step, load, placement)
    assert flags(expert_report(open_run(tmp_path)), 0, 0)["over_replicated"] is True


@pytest.mark.parametrize("spare", ["empty", "replicas"])
def test_experts_that_a_layer_does_not_have_are_in_no_figure(tmp_path: Path, spare: str) -> None:
    """Layers of 8, 5 and 3 experts in 8 slots; spare slots are empty or hold replicas."""
    sizes, numbers = [8, 5, 3], [2, 7, 9]
    rng = np.random.default_rng(9)
    placement = np.stack(
        [np.r_[np.arange(n), [-1] * (8 - n) if spare == "empty" else np.arange(8 - n) % n] for n in sizes]
    ).astype(np.int64)
    loads = rng.integers(50, 150, (60, 3, 8)) * (placement >= 0)
    loads[:, 1, 2] *= 4
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=8, ep_size=2, scope="global", run_id="r", moe_layers=numbers
    ) as writer:
        for step, load in enumerate(loads):
            writer.record(step, load, placement)
    run = open_run(tmp_path)
    report = expert_report(run)
    assert report.experts.group_by("layer", maintain_order=True).len().rows() == [(2, 8), (7, 5), (9, 3)]
    for layer, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
        tokens = np.array([loads[:, layer, placement[layer] == e].sum() for e in range(size)])
        rows = report.experts.filter(layer=number)
        assert rows["tokens"].to_list() == tokens.tolist()
        np.testing.assert_allclose(rows["times_mean"].to_numpy(), tokens / tokens.mean())
        np.testing.assert_allclose(
            rows["due_replicas"].to_numpy(), tokens / tokens.sum() * (placement[layer] >= 0).sum()
        )
        np.testing.assert_array_equal(rows["dead"].to_numpy(), tokens == 0)
        np.testing.assert_array_equal(rows["cold"].to_numpy(), tokens <= tokens.mean() / 2)
        assert [e.logical for e in layer_report(run, number).experts] == list(range(size))
        [placed] = placement_report(run, layer=number).layers
        assert placed.replicas == [(placement[layer] == e).sum() for e in range(size)]
        assert placed.replicas_min >= 1
    hot = {(h.layer, h.logical): h.times_mean for h in summarize(run).hot_experts}
    layer_7 = np.array([loads[:, 1, placement[1] == e].sum() for e in range(5)])
    assert hot[7, 2] == pytest.approx(layer_7[2] / layer_7.mean())
    found = {f.code: f.severity for f in check_run(run).findings}
    assert "expert_without_slot" not in found
    assert found["experts_differ"] == "info"
