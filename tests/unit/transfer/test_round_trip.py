"""Export, then import: the same loads, placements, steps and times, in every form."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from polars.testing import assert_frame_equal

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.reader.run import Run
from eplb_analyze.transfer.exporters.loads import export_loads
from eplb_analyze.transfer.exporters.placements import export_placement, recorded_placement
from eplb_analyze.transfer.importers.import_dump import import_dump
from eplb_analyze.transfer.importers.placement_files import read_placement
from eplb_analyze.transfer.importers.source import Options
from eplb_dump import ExpertLoadWriter

FORMS = ("csv", "parquet")
TARGETS = ("sglang", "trtllm", "vllm-ascend", "vllm-mapping", "json")


@st.composite
def recordings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments for :func:`record`: what a run of a random shape has."""
    ranks, per_rank, layers = draw(st.tuples(*[st.integers(1, 3)] * 3))
    slots = ranks * per_rank
    experts = draw(st.integers(1, slots))
    gaps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    numbers = draw(st.none() | st.just([3 + 2 * layer for layer in range(layers)]))
    return {
        "ranks": ranks,
        "slots": slots,
        "experts": experts,
        "layers": layers,
        "steps": np.cumsum([draw(st.integers(0, 5)), *gaps]).tolist(),
        "moe_layers": numbers,
        "scope": draw(st.sampled_from(["local", "global"])),
        "token_replication": draw(st.integers(1, 3)),
        "placed_from": draw(st.integers(0, 3)),
        "empty": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32)),
        "high": draw(st.sampled_from([2, 300, 70_000, 2**31 - 1])),
    }


def record(
    root: Path, *, ranks: int, slots: int, experts: int, layers: int, steps: list[int], moe_layers: Any,
    scope: str, token_replication: int, placed_from: int, empty: bool, seed: int, high: int,
) -> Run:  # fmt: skip
    rng = np.random.default_rng(seed)
    writers = range(ranks) if scope == "local" else range(1)
    loads = rng.integers(0, high // len(writers), (len(steps), len(writers), layers, slots), endpoint=True)
    # Every layer gets a token: files name their layers, a writer need not, and `check` judges a layer without
    # any token by whether it was named.
    loads[0, 0, :, 0] = np.maximum(loads[0, 0, :, 0], 1)
    full = np.arange(slots) % experts
    placements = np.array([[rng.permutation(full) for _ in range(layers)] for _ in steps])
    if empty and slots > experts:  # a copy less
        placements = np.where(np.arange(slots) == rng.integers(experts, slots), -1, full)[None, None].repeat(
            layers, axis=1
        ).repeat(len(steps), axis=0)  # fmt: skip
    moved = np.maximum.accumulate(np.where(rng.random(len(steps)) < 0.4, np.arange(len(steps)), 0))
    for rank in writers:
        with ExpertLoadWriter(
            root, model="org/moe", num_logical_experts=experts, ep_size=ranks, ep_rank=rank, run_id="r",
            scope=scope, moe_layers=moe_layers, token_replication=token_replication,
        ) as writer:  # fmt: skip
            for i, step in enumerate(steps):
                known = placements[moved[i]] if i >= placed_from else None
                writer.record(step, loads[i, rank], known)
    return open_run(root)


def assert_same(found: Run, source: Run) -> None:
    """Loads, placements, steps, times and figures."""
    assert_frame_equal(found.loads(), source.loads())
    assert_frame_equal(found.placements(), source.placements())
    assert found.info.layers == source.info.layers
    assert found.info.num_logical_experts == source.info.num_logical_experts
    recorded = [
        run.steps()
        .filter(pl.col("step").is_in(source.loads()["step"].unique().to_list()))
        .select("step", "time")
        for run in (found, source)
    ]
    assert_frame_equal(*recorded)
    problems = [{f.code for f in check_run(run).findings if f.severity == "error"} for run in (found, source)]
    assert problems[0] == problems[1]
    a, b = (summarize(run).to_json()["balancedness"] for run in (found, source))
    assert a == b


@given(recording=recordings())
@settings(max_examples=25)
def test_recorded_run_comes_back_from_every_form(recording: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = record(root / "dump", **recording)
        known = len(source.placements()) > 0
        for form in FORMS:
            file = root / f"loads.{form}"
            export_loads(source, form, file)
            options = Options(
                token_replication=recording["token_replication"] if form == "csv" else None,
                num_logical_experts=None if known and form == "parquet" else recording["experts"],
            )
            report = import_dump(file, root / form, options=options)
            assert "times" not in report.unknown
            found = open_run(root / form)
            assert found.info.token_replication == recording["token_replication"]
            assert_same(found, source)


@given(
    counts=st.lists(st.integers(0, 2**40), min_size=1, max_size=24),
    layers=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 4]),
    placement=st.sampled_from(["linear", "round_robin"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_counts_up_to_two_to_the_forty_come_back(
    counts: list[int], layers: int, ranks: int, placement: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    experts = 4 * rng.integers(1, 4)
    load = rng.choice(np.array([*counts, 2**40]), (rng.integers(1, 5), layers, experts))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        np.save(root / "load.npy", load)
        options = Options(ep_size=ranks, placement=placement, ordered=True)
        import_dump(root / "load.npy", root / "first", "array", options)
        first = open_run(root / "first")
        order = np.concatenate([np.arange(r, experts, ranks) for r in range(ranks)])
        slots = load if placement == "linear" else load[:, :, order]
        assert first.loads()["load"].to_list() == slots.reshape(-1, experts).tolist()
        tokens = slots.reshape(*slots.shape[:2], ranks, -1).sum(axis=3).astype(float)
        if tokens.max() > 0:
            active = tokens.max(axis=2) > 0
            each = np.divide(tokens.mean(2), tokens.max(2), out=np.zeros(active.shape), where=active)
            steps = active.any(axis=1)
            mean = (each.sum(axis=1)[steps] / active.sum(axis=1)[steps]).mean()
            assert summarize(first).to_json()["balancedness"]["mean"] == pytest.approx(mean, rel=1e-12)
        for form in FORMS:
            export_loads(first, form, root / f"again.{form}")
            import_dump(root / f"again.{form}", root / form)
            again = open_run(root / form)
            assert_frame_equal(again.loads(), first.loads())
            assert_frame_equal(again.placements(), first.placements())
        export_loads(first, "logical-npy", root / "sums.npy")
        import_dump(root / "sums.npy", root / "sums", options=options)
        sums = open_run(root / "sums").loads()["load"].to_list()
        assert sums == slots.sum(axis=0).tolist()


@given(recording=recordings(), target=st.sampled_from(TARGETS))
@settings(max_examples=25)
def test_placement_comes_back_from_every_form(recording: dict[str, Any], target: str) -> None:
    recording |= {"placed_from": 0, "empty": False, "moe_layers": None}
    # vllm-ascend cannot load a rank that holds an expert twice.
    ascend = target == "vllm-ascend"
    assume(not ascend or recording["slots"] // recording["ranks"] <= recording["experts"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = record(root / "dump", **recording)
        placed = recorded_placement(source)
        file = root / {"trtllm": "p.yaml"}.get(target, "p.json")
        hidden = recording["layers"] if target == "sglang" else None
        report = export_placement(source, target, file, placed, num_hidden_layers=hidden, repair=ascend)
        assert (report.rows, report.bytes) == (recording["layers"], file.stat().st_size)
        written = report.placement.physical_to_logical_map.tolist()
        if not ascend:
            assert written == placed.placement.physical_to_logical_map.tolist()
        assert read_placement(file, None).slots.tolist() == written
        np.save(root / "load.npy", np.ones((recording["layers"], recording["experts"]), np.int64))
        import_dump(
            root / "load.npy", root / "new", options=Options(ep_size=recording["ranks"], placement=str(file))
        )
        assert open_run(root / "new").placements()["physical_to_logical"].to_list() == written


@pytest.mark.parametrize("form", FORMS)
def test_run_whose_ranks_changed_comes_back(tmp_path: Path, form: str) -> None:
    """Elastic expert parallelism: four ranks of three slots, then two of four."""
    rng = np.random.default_rng(3)
    writer = ExpertLoadWriter(
        tmp_path / "dump", model="m", num_logical_experts=8, ep_size=4, scope="global", run_id="r"
    )
    with writer:
        for step, (ranks, slots) in enumerate(itertools.chain([(4, 12)] * 3, [(2, 8)] * 3)):
            placement = np.array([rng.permutation(np.arange(slots) % 8) for _ in range(2)])
            writer.record(step, rng.integers(0, 50, (2, slots)), placement, ep_size=ranks)
    source = open_run(tmp_path / "dump")
    export_loads(source, form, tmp_path / "file")
    import_dump(tmp_path / "file", tmp_path / "new")
    assert_same(open_run(tmp_path / "new"), source)
    assert open_run(tmp_path / "new").loads()["ep_size"].to_list() == [4] * 6 + [2] * 6
