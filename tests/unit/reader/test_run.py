"""Recorded through the writer, read back through the library: equal to the truth, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from helpers import ROOT, arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.metrics.formulas import FORMULAS
from eplb_analyze.sessions import discovery
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_dump import ExpertLoadWriter
from eplb_dump.format import segment
from eplb_dump.format.session import SessionInfo

LAYERS, LOGICAL = 5, 12
ROUTING = ROOT.parent / "shared/data/gpt_oss_20b_mmlu_decode_counts_bs48.npz"


def conserving_loads(rng: np.random.Generator, steps: int, layers: int, slots: int) -> Any:
    """int64 [steps, layers, slots]; within a step every layer has the same number of tokens."""
    weights = rng.dirichlet(np.full(slots, 0.5), size=layers)
    tokens = rng.integers(1, 400, size=steps)
    return np.stack([[rng.multinomial(n, w) for w in weights] for n in tokens])


def placement_of(rng: np.random.Generator, layers: int, slots: int) -> Any:
    extra = slots - LOGICAL
    rows = [
        rng.permutation(np.r_[np.arange(LOGICAL), rng.choice(LOGICAL, extra, replace=False)])
        for _ in range(layers)
    ]
    return np.stack(rows)


def record_ranks(root: Path, truth: dict[str, Any]) -> None:
    """The ranks take each step together, as ranks do, however busy the machine is."""
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                ExpertLoadWriter(
                    root,
                    model="org/m",
                    num_logical_experts=LOGICAL,
                    ep_size=4,
                    ep_rank=rank,
                    run_id="r1",
                    scope="local",
                    segment_steps=32,
                    engine="test",
                    engine_config={"a": 1},
                )
            )
            for rank in range(4)
        ]
        for step, loads in enumerate(truth["local"]):
            placement = truth["placement"][truth["placement_at"][step]]
            for writer, load, dummy in zip(writers, loads, truth["dummy"][step], strict=True):
                if dummy:
                    writer.skip(reason="dummy")
                else:
                    writer.record(step, load, placement, num_tokens=int(load[0].sum()))
        # Elastic: from here on two ranks and fewer slots.
        for loads in truth["later"]:
            for writer, load in zip(writers[:2], loads, strict=True):
                writer.record(None, load, truth["later_placement"], ep_size=2)
        for writer in writers:
            assert writer.close(60), writer.stats()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """100 steps of 4 ranks, scope local, then 20 steps of 2 of them after an elastic change."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("recorded")
    steps, slots = 100, 16
    local = np.stack([conserving_loads(rng, steps, LAYERS, slots) for _ in range(4)], axis=1)
    dummy = rng.random((steps, 4)) < 0.1
    dummy[3] = True  # a step in which nobody had work
    local[dummy] = 0
    truth = {
        "local": local.astype(np.int32),
        "dummy": dummy,
        "placement": np.stack([placement_of(rng, LAYERS, slots) for _ in range(3)]),
        "placement_at": np.repeat([0, 1, 2], [40, 20, 40]),
        "later": np.stack([conserving_loads(rng, 20, LAYERS, 14) for _ in range(2)], axis=1),
        "later_placement": placement_of(rng, LAYERS, 14),
    }
    record_ranks(folder / "dump", truth)
    return folder / "dump", truth


def per_rank(load: Any, ep_size: int) -> Any:
    return load.reshape(*load.shape[:-1], ep_size, -1).sum(axis=-1)


def whole(truth: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Steps with real tokens, their sums over ranks, and whether some rank recorded."""
    total = truth["local"].sum(axis=1)
    return np.flatnonzero(~truth["dummy"].all(axis=1)), total, truth["dummy"].all(axis=1)


def test_loads_equal_what_was_recorded(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    run = open_run(path)
    steps, total, _ = whole(truth)
    frame = run.loads(steps=(0, 100))
    assert frame["step"].unique(maintain_order=True).to_list() == steps.tolist()
    found = np.array(frame["load"].to_list()).reshape(len(steps), LAYERS, 16)
    np.testing.assert_array_equal(found, total[steps])
    ranks = np.array(frame["rank_load"].to_list()).reshape(len(steps), LAYERS, 4)
    np.testing.assert_array_equal(ranks, per_rank(total[steps], 4))
    later = run.loads(steps=(100, 120))
    assert later["ep_size"].unique().to_list() == [2]
    found = np.array(later["load"].to_list()).reshape(20, LAYERS, 14)
    np.testing.assert_array_equal(found, truth["later"].sum(axis=1))
    assert run.findings == []


def test_layers_and_columns_can_be_chosen(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    steps, total, _ = whole(truth)
    frame = open_run(path).loads(steps=(0, 100), layers=[3], experts=False)
    assert frame.columns == ["step", "layer", "ep_size", "rank_load"]
    np.testing.assert_array_equal(np.array(frame["rank_load"].to_list()), per_rank(total[steps, 3], 4))


def test_every_step_has_the_state_of_all_ranks(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    frame = open_run(path).steps()
    _, _, nobody = whole(truth)
    expected = ["dummy" if n else "recorded" for n in nobody] + ["recorded"] * 20
    assert frame["state"].to_list() == expected
    tokens = truth["local"][:, :, 0].sum(axis=(1, 2))
    assert frame["num_tokens"][:100].to_list() == [
        None if n else t for n, t in zip(nobody, tokens, strict=True)
    ]


def test_placement_at_a_step(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    run = open_run(path)
    # Step 40 is the first under the second placement, unless all ranks idled then.
    for step in (0, 39, 40, 59, 60, 99):
        frame = run.placement(step)
        found = frame["logical"].to_numpy().reshape(LAYERS, 16)
        np.testing.assert_array_equal(found, truth["placement"][truth["placement_at"][step]])
        assert frame["rank"].to_list() == (np.arange(16) // 4).tolist() * LAYERS
    np.testing.assert_array_equal(
        run.placement()["logical"].to_numpy().reshape(LAYERS, 14), truth["later_placement"]
    )
    assert [r.first_step for r in run.history.rearrangements()] == [40, 60, 100]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_by_step_layer_and_run_equal_the_reference(
    recorded: tuple[Path, dict[str, Any]], name: str
) -> None:
    path, truth = recorded
    run = open_run(path)
    steps, total, _ = whole(truth)
    first = per_rank(total[steps], 4)
    later = per_rank(truth["later"].sum(axis=1), 2)
    expected = reference.per_step(name, first) + reference.per_step(name, later)
    frame = run.balancedness(name)
    assert frame["step"].to_list() == steps.tolist() + list(range(100, 120))
    np.testing.assert_allclose(frame["value"].to_numpy(), expected, rtol=1e-12)
    by_run = run.balancedness(name, by="run").row(0, named=True)
    assert by_run["value"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert by_run["min"] == pytest.approx(min(expected), rel=1e-12)
    by_layer = run.balancedness(name, by="layer")
    for layer in range(LAYERS):
        alone = reference.per_step(name, first[:, [layer]]) + reference.per_step(name, later[:, [layer]])
        assert by_layer["value"][layer] == pytest.approx(np.nanmean(alone), rel=1e-12)


def test_summary_equals_the_reference(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    document = summarize(open_run(path)).to_json()
    steps, total, nobody = whole(truth)
    first, later = per_rank(total[steps], 4), per_rank(truth["later"].sum(axis=1), 2)
    assert document["steps"] == {
        "first": 0,
        "last": 119,
        "seen": 120,
        "recorded": len(steps) + 20,
        "dummy": int(nobody.sum()),
        "not_sampled": 0,
        "dropped": 0,
        "rejected": 0,
        "incomplete": 0,
        "missing": 0,
        "retired": 0,
    }
    assert document["ranks"] == {"expected": 4, "present": 4, "missing": []}
    assert document["run"]["engine"] == "test"
    assert document["run"]["ep_size"] == 2
    assert document["rearrangements"] == [40, 60, 100]
    expected = reference.per_step("balancedness", first) + reference.per_step("balancedness", later)
    assert document["balancedness"]["mean"] == pytest.approx(np.mean(expected))
    assert document["balancedness"]["p5"] == pytest.approx(np.percentile(expected, 5))
    everything = [*first, *later]
    assert document["idle_fraction"] == pytest.approx(reference.idle_fraction(everything))
    assert [c["recorded"] for c in document["configurations"]] == [len(steps), 20]
    # Hot experts are of the last configuration: loads of two shapes are not added.
    logical = np.zeros((LAYERS, LOGICAL))
    for layer in range(LAYERS):
        np.add.at(logical[layer], truth["later_placement"][layer], truth["later"].sum(axis=(0, 1))[layer])
    share = logical / logical.sum(axis=1, keepdims=True)
    top = document["hot_experts"][0]
    assert top["share"] == pytest.approx(share.max())
    assert share[top["layer"], top["logical"]] == share.max()
    assert top["times_mean"] == pytest.approx(share.max() * LOGICAL)
    assert top["replicas"] == (truth["later_placement"][top["layer"]] == top["logical"]).sum()


def test_layer_counts_experts_by_the_placement_at_each_step(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    report = layer_report(open_run(path), 2, steps=(30, 50))
    _, total, _ = whole(truth)
    part = total[30:50, 2]
    assert [s.load for s in report.slots] == part.sum(axis=0).tolist()
    assert [r.load for r in report.ranks] == per_rank(part.sum(axis=0), 4).tolist()
    logical = np.zeros(LOGICAL, int)
    for step in range(30, 50):
        np.add.at(logical, truth["placement"][truth["placement_at"][step], 2], total[step, 2])
    assert [e.load for e in report.experts] == logical.tolist()
    assert report.placement_changes == [40]
    before, after = truth["placement"][:2, 2]
    assert (before != after).any()
    assert [s.logical for s in report.slots] == [
        int(b) if a == b else None for b, a in zip(before, after, strict=True)
    ]
    since = layer_report(open_run(path), 2, steps=(40, 50))
    assert [s.logical for s in since.slots] == after.tolist()
    assert [s.load for s in since.slots] == total[40:50, 2].sum(axis=0).tolist()


def test_layer_without_range_takes_the_last_configuration(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, truth = recorded
    report = layer_report(open_run(path), 0)
    assert (report.first_step, report.last_step, report.steps) == (100, 119, 20)
    assert [s.load for s in report.slots] == truth["later"].sum(axis=(0, 1))[0].tolist()
    assert "steps 0 to 99 are left out" in report.notes[0]


def test_check_finds_no_error_in_an_intact_run(recorded: tuple[Path, dict[str, Any]]) -> None:
    report = check_run(open_run(recorded[0]))
    assert report.ok
    # Random placements put two replicas on one rank now and then; nothing else is odd.
    assert {f.code for f in report.findings} == {"replica_on_same_rank"}


def test_analysis_writes_nothing_into_the_dump(recorded: tuple[Path, dict[str, Any]]) -> None:
    def state() -> list[tuple[str, int, int]]:
        files = sorted(p for p in recorded[0].rglob("*"))
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

    before = state()
    run = open_run(recorded[0])
    summarize(run)
    check_run(run)
    assert state() == before


# ---- scope global, replication, layer numbers, completeness


def write(root: Path, loads: Any, placement: Any, **options: Any) -> None:
    defaults = {"model": "m", "num_logical_experts": LOGICAL, "ep_size": 4, "scope": "global", "run_id": "r"}
    with ExpertLoadWriter(root, **{**defaults, **options}) as writer:
        for load in loads:
            if load is None:
                writer.skip()
            else:
                writer.record(None, load, placement)


def test_global_scope_needs_one_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    loads = conserving_loads(rng, 30, LAYERS, 16)
    write(tmp_path, loads, placement_of(rng, LAYERS, 16), ep_rank=2)
    run = open_run(tmp_path)
    assert run.expected_ranks == [2]
    found = np.array(run.loads()["load"].to_list()).reshape(30, LAYERS, 16)
    np.testing.assert_array_equal(found, loads)
    assert check_run(run).ok


def test_token_replication_is_divided_out(tmp_path: Path) -> None:
    loads = np.full((3, 1, 4), 8) * np.arange(1, 5)
    write(tmp_path, loads, np.array([[0, 1, 2, 3]]), num_logical_experts=4, ep_size=2, token_replication=4)
    run = open_run(tmp_path)
    assert run.loads()["load"].to_list() == [[2.0, 4.0, 6.0, 8.0]] * 3
    report = layer_report(run, 0)
    assert [r.load for r in report.ranks] == [18.0, 42.0]
    assert run.balancedness(by="run")["value"][0] == pytest.approx((6 + 14) / 2 / 14)


def test_layers_have_the_numbers_of_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    loads = conserving_loads(rng, 5, 3, 16)
    write(tmp_path, loads, placement_of(rng, 3, 16), moe_layers=[3, 5, 9])
    run = open_run(tmp_path)
    assert run.info.layers == (3, 5, 9)
    assert run.loads(layers=[5])["layer"].unique().to_list() == [5]
    assert run.placement(0)["layer"].unique(maintain_order=True).to_list() == [3, 5, 9]
    assert [s.load for s in layer_report(run, 9, step=4).slots] == loads[4, 2].tolist()


def test_step_that_lacks_a_rank_is_in_no_figure(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    placement = placement_of(rng, LAYERS, 16)
    local = np.stack([conserving_loads(rng, 20, LAYERS, 16) for _ in range(2)], axis=1)
    for rank in range(2):
        options = {"scope": "local", "ep_size": 2, "ep_rank": rank}
        write(tmp_path, local[: 20 if rank == 0 else 15, rank], placement, **options)
    run = open_run(tmp_path)
    document = summarize(run).to_json()
    assert (document["steps"]["recorded"], document["steps"]["incomplete"]) == (15, 5)
    expected = reference.per_step("balancedness", per_rank(local[:15].sum(axis=1), 2))
    assert document["balancedness"]["mean"] == pytest.approx(np.mean(expected))
    report = layer_report(run, 1, step=17)
    assert not report.complete
    assert report.missing_ranks == [1]
    assert [s.load for s in report.slots] == local[17, 0, 1].tolist()
    assert layer_report(run, 1).last_step == 14


def test_run_that_lacks_a_rank_has_no_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    loads = conserving_loads(rng, 5, LAYERS, 16)
    write(tmp_path, loads, placement_of(rng, LAYERS, 16), scope="local", ep_size=2, ep_rank=1)
    document = summarize(open_run(tmp_path)).to_json()
    assert document["ranks"] == {"expected": 2, "present": 1, "missing": [0]}
    assert document["steps"]["incomplete"] == 5
    assert document["balancedness"]["mean"] is None
    codes = {f.code for f in check_run(open_run(tmp_path)).findings}
    assert {"missing_ranks", "no_complete_step"} <= codes


def test_steps_repeated_by_a_restarted_rank_count_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    placement = placement_of(rng, LAYERS, 16)
    old, new = conserving_loads(rng, 20, LAYERS, 16), conserving_loads(rng, 20, LAYERS, 16)
    write(tmp_path, old, placement, scope="global")
    write(tmp_path, [None] * 5, placement, scope="global")  # 5 idle steps do not undo what was recorded
    options: dict[str, Any] = {"model": "m", "num_logical_experts": LOGICAL, "ep_size": 4, "run_id": "r"}
    with ExpertLoadWriter(tmp_path, scope="global", **options) as writer:
        for step in range(12, 30):
            writer.record(step, new[step % 20], placement)
    run = open_run(tmp_path)
    found = np.array(run.loads()["load"].to_list()).reshape(30, LAYERS, 16)
    np.testing.assert_array_equal(found[:12], old[:12])
    np.testing.assert_array_equal(found[12:], new[np.arange(12, 30) % 20])
    assert "overlapping_sessions" in {f.code for f in check_run(run).findings}


def test_session_that_idled_at_a_change_does_not_undo_it(tmp_path: Path) -> None:
    other = ONE[:, ::-1]
    with two(tmp_path, scope="local") as writer:
        for step in range(20):
            writer.record(step, np.array([[1, 2]]), ONE if step < 10 else other)
    with two(tmp_path, scope="local", ep_rank=1) as writer:
        for step in range(20):
            if 9 <= step < 13:
                writer.skip(step=step)
            else:
                writer.record(step, np.array([[1, 2]]), ONE if step < 9 else other)
    with two(tmp_path, scope="local", ep_rank=1) as writer:  # restarted
        for step in range(8, 30):
            if step in (10, 12):
                writer.skip("dropped", step=step)
            else:
                writer.record(step, np.array([[1, 2]]), ONE if step < 10 else other)
    run = open_run(tmp_path)
    assert run.placements()["step"].to_list() == [0, 10]
    assert "placement_conflict" not in {f.code for f in check_run(run).findings}


def test_gaps_and_sampling_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    placement = placement_of(rng, 1, 16)
    options: dict[str, Any] = {"model": "m", "num_logical_experts": LOGICAL, "ep_size": 4, "run_id": "r"}
    with ExpertLoadWriter(tmp_path, scope="global", interval=4, **options) as writer:
        for step in [*range(10), *range(50, 60)]:
            writer.record(step, np.ones((1, 16), int), placement)
    steps = summarize(open_run(tmp_path)).to_json()["steps"]
    assert steps["recorded"] == 5
    assert steps["not_sampled"] == 15
    assert steps["missing"] == 40
    assert (steps["seen"], steps["first"], steps["last"]) == (20, 0, 59)


ONE = np.array([[0, 1]])
OTHER = np.array([[1, 0]])


def two(root: Path, **options: Any) -> ExpertLoadWriter:
    """A writer of one layer, two experts on two ranks, scope global."""
    defaults: dict[str, Any] = {"model": "m", "num_logical_experts": 2, "ep_size": 2, "scope": "global"}
    return ExpertLoadWriter(root, run_id="r", **{**defaults, **options})


def experts_of(root: Path, steps: tuple[int, int]) -> list[float]:
    return [e.load for e in layer_report(open_run(root), 0, steps=steps).experts]


def test_placement_of_a_step_not_recorded_holds_for_later_steps(tmp_path: Path) -> None:
    with two(tmp_path, interval=2) as writer:
        writer.record(0, np.array([[10, 90]]), ONE)
        writer.record(1, np.array([[10, 90]]), OTHER)  # not sampled
        for step in range(2, 10):
            writer.record(step, np.array([[90, 10]]), None)
    assert experts_of(tmp_path, (4, 5)) == [10, 90]
    with two(tmp_path / "rejected") as writer:
        writer.record(0, np.array([[10, 90]]), ONE)
        writer.record(1, np.array([[-10, 90]]), OTHER)
        writer.record(2, np.array([10, 90]), ONE)
        writer.record(3, np.array([[90, 10]]), None)
    assert experts_of(tmp_path / "rejected", (3, 4)) == [90, 10]


def test_ep_size_of_a_step_not_recorded_holds_for_later_steps(tmp_path: Path) -> None:
    load = np.array([[0, 0, 10, 10]])
    with two(tmp_path, interval=2, ep_size=4, num_logical_experts=4) as writer:
        writer.record(0, load, np.arange(4).reshape(1, 4))
        writer.record(1, load, None, ep_size=1)
        writer.record(2, load, None)
    assert open_run(tmp_path).loads(steps=(2, 3))["ep_size"].to_list() == [1]


def test_placements_come_from_the_session_whose_loads_count(tmp_path: Path) -> None:
    with two(tmp_path) as writer:
        for step in range(100):
            writer.record(step, np.array([[10, 90]]), ONE if step < 80 else OTHER)
    with two(tmp_path) as writer:
        for step in range(50, 60):
            writer.record(step, np.array([[10, 90]]), ONE)
        writer.record(3, np.array([[10, 90]]), ONE)  # went back: rejected, and owns nothing
    assert experts_of(tmp_path, (80, 100)) == [20 * 90, 20 * 10]
    assert experts_of(tmp_path, (0, 80)) == [80 * 10, 80 * 90]
    assert [r.first_step for r in open_run(tmp_path).history.rearrangements()] == [80]


def test_rejected_repeat_of_a_step_changes_nothing(tmp_path: Path) -> None:
    with two(tmp_path) as writer:
        writer.record(0, np.array([[10, 90]]), ONE)
        writer.skip(step=1)
        writer.record(1, np.array([[10, 90]]), ONE)
    assert open_run(tmp_path).steps()["state"].to_list() == ["recorded", "dummy"]


def test_global_sums_come_from_the_lowest_rank_that_has_the_step(tmp_path: Path) -> None:
    for rank, steps in ((0, range(5)), (1, range(3, 8))):
        with two(tmp_path, ep_rank=rank) as writer:
            for step in steps:
                writer.record(step, np.array([[10 + rank, 90]]), ONE)
    frame = open_run(tmp_path).loads()
    assert [load[0] for load in frame["load"].to_list()] == [10] * 5 + [11] * 3


def test_rank_idle_since_an_elastic_change_does_not_hide_the_change(tmp_path: Path) -> None:
    wide = np.array([[0, 1, 0, 1]])
    for rank in range(2):
        with two(tmp_path, scope="local", ep_rank=rank) as writer:
            for step in range(10):
                if step < 5:
                    writer.record(step, ONE, ONE)
                elif rank == 0:
                    writer.skip()
                else:
                    writer.record(step, wide, wide)
    assert open_run(tmp_path).info.num_physical_experts == 4


def test_configuration_without_a_complete_step_separates_those_around_it(tmp_path: Path) -> None:
    for rank in range(2):
        with two(tmp_path, scope="local", ep_rank=rank) as writer:
            for step in range(30):
                slots = 4 if 10 <= step < 20 else 2
                load = np.ones((1, slots), int)
                writer.record(step, load, np.arange(slots).reshape(1, -1) % 2, ep_size=slots)
    document = summarize(open_run(tmp_path)).to_json()
    assert [(c["first_step"], c["last_step"]) for c in document["configurations"]] == [(0, 9), (20, 29)]
    assert layer_report(open_run(tmp_path), 0).steps == 10


def test_state_of_a_step_does_not_depend_on_the_range(tmp_path: Path) -> None:
    for rank in range(2):
        with two(tmp_path, scope="local", ep_size=3, num_logical_experts=3, ep_rank=rank) as writer:
            for step in range(10):
                if step == 5:
                    writer.skip()
                else:
                    writer.record(step, np.ones((1, 3), int), np.arange(3).reshape(1, 3))
    run = open_run(tmp_path)
    assert run.steps()["state"][5] == run.steps(steps=(5, 6))["state"][0] == "incomplete"


def test_many_phases_in_one_batch_are_kept(tmp_path: Path) -> None:
    with two(tmp_path, flush_interval=30) as writer:
        for step in range(200):
            writer.record(step, np.array([[1, 2]]), ONE, phase=f"decode-bs{step}")
    assert open_run(tmp_path).steps()["phase"].to_list() == [f"decode-bs{step}" for step in range(200)]


def test_ranks_in_different_phases_make_a_mixed_step_and_tokens_count_once(tmp_path: Path) -> None:
    phases = [["prefill", "decode", "decode"], ["decode", "decode", None]]
    for rank in (0, 1):
        with two(tmp_path, scope="local", ep_rank=rank, token_replication=2) as writer:
            for step, phase in enumerate(phases[rank]):
                writer.record(step, np.array([[1, 2]]), ONE, num_tokens=6 + step, phase=phase)
    steps = open_run(tmp_path).steps()
    assert steps["phase"].to_list() == ["mixed", "decode", "decode"]
    assert steps["num_tokens"].to_list() == [6, 7, 8]


@given(st.data())
@settings(max_examples=15)
def test_random_runs_are_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random shapes, gaps, dummies and segment sizes."""
    root = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ranks, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    slots = ranks * data.draw(st.integers(1, 4))
    steps = data.draw(st.integers(1, 30))
    high = data.draw(st.sampled_from([3, 300, 70000, 2**31 - 1]))
    local = rng.integers(0, high, size=(steps, ranks, layers, slots), dtype=np.int64)
    dummy = rng.random((steps, ranks)) < 0.2
    local[dummy] = 0
    numbers = np.cumsum(rng.integers(1, 4, size=steps))
    placement = rng.integers(-1, 5, size=(layers, slots))
    for rank in range(ranks):
        with ExpertLoadWriter(
            root,
            model="m",
            num_logical_experts=5,
            ep_size=ranks,
            ep_rank=rank,
            run_id="r",
            segment_steps=data.draw(st.integers(1, 40)),
        ) as writer:
            for i, step in enumerate(numbers.tolist()):
                if dummy[i, rank]:
                    writer.skip(step=step)
                else:
                    writer.record(step, local[i, rank], placement)
    run = open_run(root)
    kept = np.flatnonzero(~dummy.all(axis=1))
    frame = run.loads()
    assert run.findings == []
    assert frame["step"].unique(maintain_order=True).to_list() == numbers[kept].tolist()
    if len(kept):
        found = np.array(frame["load"].to_list()).reshape(len(kept), layers, slots)
        np.testing.assert_array_equal(found, local[kept].sum(axis=1))


def test_kept_block_reads_loads_once_until_it_stops_keeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = np.random.default_rng(0).poisson(90, (30, 3, 8))
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=8, ep_size=2, scope="global") as writer:
        for step, load in enumerate(truth):
            writer.record(step, load, np.tile(np.arange(8), (3, 1)))
    reads: list[int] = []
    original = ParquetSegment.loads

    def counted(segment: ParquetSegment, *which: Any) -> Any:
        for layer, values in original(segment, *which):
            reads.append(layer)
            yield layer, values

    def put(found: Any, layer: int, load: Any) -> None:
        found[:, layer] = load

    monkeypatch.setattr(ParquetSegment, "loads", counted)
    for kept, expected in ((True, 1), (False, 2)):
        (block,) = open_run(tmp_path).keeping_loads().blocks()
        if not kept:
            block.stop_keeping()
        reads.clear()
        for _ in range(2):
            found = np.zeros_like(truth)
            block.each_layer([functools.partial(put, found)])
            np.testing.assert_array_equal(found, truth)
        assert {reads.count(layer) for layer in reads} == {expected}


@pytest.mark.skipif(not ROUTING.exists(), reason="the recorded routing is not beside this checkout")
def test_figures_of_real_routing_equal_numpy(tmp_path: Path) -> None:
    """256 decode steps as GPT-OSS-20B routed them."""
    counts = arrays(ROUTING)["counts"]
    placement = np.tile(np.arange(32), (24, 1))
    write(tmp_path, counts, placement, num_logical_experts=32, ep_size=8)
    run = open_run(tmp_path)
    T = counts.reshape(256, 24, 8, 4).sum(axis=3).astype(float)
    document = summarize(run).to_json()
    assert document["balancedness"]["mean"] == pytest.approx((T.mean(2) / T.max(2)).mean())
    assert document["imbalance"]["mean"] == pytest.approx((T.max(2) / T.mean(2)).mean())
    assert document["metrics"]["vllm"] == pytest.approx((T.mean(2).sum(1) / T.max(2).sum(1)).mean())
    assert document["idle_fraction"] == pytest.approx(1 - T.mean(2).sum() / T.max(2).sum())
    share = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None]
    assert document["hot_experts"][0]["share"] == pytest.approx(share.max())
    assert check_run(run).ok


def test_any_folder_level_of_a_dump_can_be_opened(recorded: tuple[Path, dict[str, Any]]) -> None:
    path, _ = recorded
    assert open_run(path / "run=r1").info.run_id == "r1"
    one_rank = open_run(path / "run=r1" / "model=org--m" / "rank=00001")
    assert one_rank.present_ranks == [1]
    here = Path.cwd()
    try:
        os.chdir(path)
        assert isinstance(open_run(".").steps(), pl.DataFrame)
    finally:
        os.chdir(here)


def test_range_with_one_complete_step_has_its_phase(tmp_path: Path) -> None:
    for rank, steps in ((0, [4, 5]), (1, [5])):
        with two(tmp_path, scope="local", ep_rank=rank) as writer:
            for step in steps:
                writer.record(step, np.array([[1, 2]]), ONE, phase="prefill" if step == 5 else "decode")
    report = layer_report(open_run(tmp_path), 0, steps=(4, 6))
    assert (report.first_step, report.steps, report.phase) == (5, 1, "prefill")


def test_all_ranks_of_a_live_run_are_read_as_of_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading many takes a while: ranks that are read first would seem to have stopped."""
    writers = [two(tmp_path, scope="local", ep_rank=rank) for rank in (0, 1)]

    def go_on(steps: range) -> None:
        for step in steps:
            for writer in writers:
                writer.record(step, np.array([[1, 2]]), ONE)
        assert all(writer.flush() for writer in writers)

    go_on(range(5))
    opening = discovery.open_session
    later = iter([range(5, 11)])

    def slowly(folder: Path, info: SessionInfo, *others: Any) -> discovery.Session:
        if info.ep_rank == 1:
            go_on(next(later, range(0)))
        return opening(folder, info, *others)

    monkeypatch.setattr(discovery, "open_session", slowly)
    run = open_run(tmp_path)
    assert run.steps().select("step", "state").rows() == [(step, "recorded") for step in range(5)]
    assert [f for f in run.findings if f.severity != "info"] == []
    monkeypatch.undo()
    assert run.step_range == (0, 4)
    assert open_run(tmp_path).step_range == (0, 10)
    for writer in writers:
        writer.close()


def test_columns_of_a_newer_minor_version_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = pa.field("novelty", pa.float64())
    open_parquet = segment._open_parquet

    class Longer:
        def __init__(self, path: Path, schema: pa.Schema) -> None:
            self.file = open_parquet(path, schema.append(extra))

        def write_table(self, table: pa.Table, **options: Any) -> None:
            self.file.write_table(table.append_column(extra, pa.array(np.ones(len(table)))), **options)

        def close(self) -> None:
            self.file.close()

    monkeypatch.setattr(segment, "_open_parquet", Longer)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global", run_id="r"
    ) as writer:
        for step in range(3):
            writer.record(step, np.full((2, 4), step), np.tile(np.arange(4), (2, 1)))
        assert writer.close(60)
    run = open_run(tmp_path)
    assert len(list(tmp_path.rglob("*.parquet"))) == 4
    assert all("novelty" in pq.read_schema(path).names for path in tmp_path.rglob("*.parquet"))
    assert run.steps()["step"].to_list() == [0, 1, 2]
    assert run.loads()["load"].to_list() == [[step] * 4 for step in range(3) for _ in range(2)]
    assert run.placement(2)["logical"].to_list() == [0, 1, 2, 3] * 2
    assert not [f for f in check_run(run).findings if f.severity == "error"]
