"""`import`: each format against its true counts, ambiguous sources, and malicious files."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, arrays, assert_golden, cli, one_error
from hypothesis import given, settings
from safetensors.numpy import save_file

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.analysis.traffic import traffic_report
from eplb_analyze.cli.commands.import_ import FORMATS
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.reader.run import Run
from eplb_analyze.transfer.importers.detect import READERS
from eplb_analyze.transfer.importers.import_dump import ImportReport, import_dump
from eplb_analyze.transfer.importers.plan import split
from eplb_analyze.transfer.importers.source import Options, whole_counts
from eplb_analyze.transfer.importers.write import _with_between
from eplb_dump.format.session import Origin

SAMPLES = ROOT.parent / "shared/samples"
with_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="the sample dumps are not here")

EP, LAYERS, EXPERTS, SLOTS, TOP_K = 4, 3, 12, 16, 2
RNG = np.random.default_rng(11)
#: Every expert has a slot, four of them two.
MAP = np.array([[*RNG.permutation(EXPERTS), 0, 1, 2, 3] for _ in range(LAYERS)])
MAP = MAP.reshape(LAYERS, SLOTS)


def local_loads(steps: int, ranks: int = EP, layers: int = LAYERS, width: int = SLOTS) -> Any:
    """Conserving counts ``[steps, ranks, layers, width]``: a rank's tokens × top-k in every layer."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 60, (steps, ranks)) * TOP_K
    skew = rng.dirichlet(np.full(width, 0.7), layers)
    return np.array([[[rng.multinomial(n, p) for p in skew] for n in row] for row in tokens])


def do(source: Path, into: Path, format: str | None = None, **options: Any) -> tuple[ImportReport, Run]:
    report = import_dump(source, into / "dump", format, Options(**options))
    run = open_run(into / "dump", run=report.run_id)
    assert check_run(run).ok, check_run(run).findings
    assert summarize(run).run.origin is not None
    return report, run


def loads(run: Run) -> tuple[list[int], Any]:
    """Complete steps, and their loads ``[steps, layers, slots]``."""
    frame = run.loads()
    steps = frame["step"].unique().sort().to_list()
    return steps, np.array(frame["load"].to_list()).reshape(len(steps), run.info.num_layers, -1)


def logical(load: Any, placement: Any, experts: int) -> Any:
    """``[steps, layers, slots]`` under one placement ``[layers, slots]`` to ``[steps, layers, experts]``."""
    out = np.zeros((*load.shape[:2], experts), np.int64)
    for layer, slots in enumerate(placement):
        for slot, expert in enumerate(slots):
            out[:, layer, expert] += load[:, layer, slot]
    return out


def placement_at(run: Run, step: int) -> Any:
    return run.placement(step)["logical"].to_numpy().reshape(run.info.num_layers, -1)


def refused(error: type[Exception], source: Path, into: Path, *words: str, **options: Any) -> None:
    format = options.pop("format", None)
    with pytest.raises(error) as raised:
        import_dump(source, into / "refused", format, Options(**options))
    for word in words:
        assert word in str(raised.value), raised.value
    assert "\n" not in str(raised.value)
    assert not list((into / "refused").glob("run=*")), "a refused import leaves nothing behind"


def unknown(run: Run) -> set[str]:
    assert run.info.origin is not None
    return set(run.info.origin.unknown)


# ---- files as the systems write them


def sglang_stat(folder: Path, rows: Any, name: str = "expert_distribution_recorder_1.5.pt") -> Path:
    """``rows``: ``[rows, hidden layers, experts]``."""
    folder.mkdir(parents=True, exist_ok=True)
    output = {"rank": 0, "logical_count": torch.tensor(rows, dtype=torch.int32)}
    torch.save({**output, "average_utilization_rate_over_window": None}, folder / name)
    return folder


def sglang_records(load: Any, rank: int, first_id: int = 50, **more: Any) -> list[dict[str, Any]]:
    """``load``: ``[passes, ranks, hidden layers, slots]``."""
    return [
        {
            "forward_pass_id": first_id + i,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(one[rank], dtype=torch.int32),
            **more,
        }
        for i, one in enumerate(load)
    ]


def sglang_passes(folder: Path, records: dict[int, list[dict[str, Any]]], slots: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, of_rank in records.items():
        output = {"records": of_rank, "last_physical_to_logical_map": torch.tensor(slots)}
        torch.save(output, folder / f"expert_distribution_recorder_9.{rank}_{rank}.pt")
    return folder


def hidden(values: Any, axis: int) -> Any:
    """Insert a dense layer, all zero, before the MoE layers."""
    return np.insert(values, 0, 0, axis=axis)


def trtllm(folder: Path, load: Any, layers: list[int], first: int = 7) -> Path:
    """``load``: ``[iterations, ranks, layers, counts]``."""
    folder.mkdir(parents=True)
    meta = {"num_experts": int(load.shape[3]), "num_experts_per_token": TOP_K}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(load.shape[1]):
        tensors = {
            f"{first + i}_{number}": load[i, rank, j].astype(np.int64)
            for i in range(len(load))
            for j, number in enumerate(layers)
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


def trtllm_yaml(path: Path, slots: Any, layers: list[int], updates: int = 0) -> Path:
    config = {
        "num_slots": int(slots.shape[1]),
        "initial_global_assignments": {n: row.tolist() for n, row in zip(layers, slots, strict=True)},
        "layer_updates_per_iter": updates,
    }
    path.write_text(yaml.dump(config, default_flow_style=None, width=2**30))
    return path


def megatron(folder: Path, rank: int, load: Any, counts: list[int] | None = None, **more: Any) -> Path:
    """``load``: ``[layers, forwards, slots]`` of one rank; the last rows can be uninitialized memory."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, forwards, slots = load.shape
    fields: dict[str, Any] = {
        "dump_version": np.asarray("mcore_ep_load_dump_v1"),
        "capture_id": np.asarray("20261124_010203_pid7"),
        "loads": load.astype(np.int32),
        "layer_numbers": np.arange(2, 2 + layers, dtype=np.int32),
        "forward_counts": np.array(counts or [forwards] * layers, np.int32),
        "ep_group_ranks": np.arange(EP, dtype=np.int32),
        "ep_rank": np.int32(rank),
        "ep_size": np.int32(EP),
        "global_rank": np.int32(rank),
        "num_global_physical_experts": np.int32(slots),
        "num_local_physical_experts": np.int32(slots // EP),
    }
    name = more.pop("name", f"mcore_ep_loads_rank{rank}_20261124_010203_pid7.npz")
    np.savez(folder / name, **{**fields, **more})
    return folder


def snapshot(step: int, load: Any, slots: Any, **more: Any) -> dict[str, Any]:
    return {
        "model_name": "org/moe", "world_size": EP, "num_moe_layers": LAYERS, "num_physical_experts": SLOTS,
        "num_logical_experts": EXPERTS, "num_redundant_experts": SLOTS - EXPERTS, "window_size": 5,
        "step": step, "window_expert_load": (np.asarray(load) * 5).tolist(),
        "latest_expert_load": np.asarray(load).tolist(),
        "physical_to_logical_map": np.asarray(slots).tolist(), **more,
    }  # fmt: skip


def stats(step: int, load: Any, slots: Any, **more: Any) -> dict[str, Any]:
    record = {"record_type": "eplb_load_stats", "version": 1, "step": step}
    return {**record, "expert_load": load.tolist(), "p2l_map": slots.tolist(), **more}


META = {
    "record_type": "eplb_load_meta", "version": 1, "model": "org/moe", "num_ranks": EP, "num_groups": 1,
    "num_nodes": 1, "num_layers": LAYERS, "num_redundant_experts": SLOTS - EXPERTS,
}  # fmt: skip


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- the sample dumps, against their ground truth


def truth(name: str) -> Any:
    return arrays(SAMPLES / name / "ground_truth.npz")


@with_samples
def test_sample_of_sglang_stat_is_imported(tmp_path: Path) -> None:
    known = truth("sglang/stat_ep4_deepep_infinite")
    per_step = known["logical_count_per_step_rank"].sum(axis=1)
    source = SAMPLES / "sglang/stat_ep4_deepep_infinite"
    _, run = do(source, tmp_path, ep_size=4, placement="linear", ordered=True)
    steps, load = loads(run)
    assert (steps, run.info.layers) == (list(range(12)), (1, 2, 3, 4, 5))
    np.testing.assert_array_equal(load, per_step[:, 1:])
    np.testing.assert_array_equal(placement_at(run, 3), np.tile(np.arange(16), (5, 1)))


@with_samples
def test_sample_of_sglang_wrapped_ring_is_imported(tmp_path: Path) -> None:
    known = truth("sglang/stat_ep4_deepep_buf8_wrapped")
    per_step = known["logical_count_per_step_rank"].sum(axis=1)[:, 1:]
    source = SAMPLES / "sglang/stat_ep4_deepep_buf8_wrapped"
    placement = SAMPLES / "sglang/init_expert_location/physical_to_logical_map.json"
    report, run = do(source, tmp_path, ep_size=4, placement=str(placement))
    slots = known["physical_to_logical_map"][1:]
    found = logical(loads(run)[1], slots, 16)
    np.testing.assert_array_equal(found, per_step[[8, 9, 10, 11, 4, 5, 6, 7]])
    assert "step_order" in report.unknown
    assert "split" in report.assumed
    assert any("order of steps" in note for note in timeline(run).notes)


@with_samples
@pytest.mark.parametrize("placement", [None, "last"])
def test_sample_of_sglang_per_pass_is_imported(tmp_path: Path, placement: str | None) -> None:
    known = truth("sglang/per_pass_ep4_deepep")
    _, run = do(SAMPLES / "sglang/per_pass_ep4_deepep", tmp_path, ep_size=4, placement=placement)
    steps, load = loads(run)
    assert steps == known["forward_pass_ids"].tolist()
    np.testing.assert_array_equal(load, known["physical_count_per_step_rank"].sum(axis=1)[:, 1:])
    np.testing.assert_array_equal(placement_at(run, 108), known["physical_to_logical_map"][1:])
    assert len(run.placement(101)) == (5 * 20 if placement else 0)
    # The rank that counted the tokens is known, too.
    own = known["physical_count_per_step_rank"][:, :, 1:].reshape(8, 4, 5, 4, 5).sum(axis=(0, 2, 4))
    np.testing.assert_array_equal(traffic_report(run).matrix, own)


@with_samples
def test_sample_of_trtllm_is_imported(tmp_path: Path) -> None:
    known = truth("trtllm/no_eplb_attention_dp")
    _, run = do(SAMPLES / "trtllm/no_eplb_attention_dp", tmp_path, ep_size=4, placement="linear")
    assert (loads(run)[0], run.info.layers) == (list(range(100, 112)), (3, 4, 5, 6, 7))
    np.testing.assert_array_equal(loads(run)[1], known["logical_count"].sum(axis=1))
    known = truth("trtllm/with_eplb_slot_counts")
    source, placement = SAMPLES / "trtllm/with_eplb_slot_counts", SAMPLES / "trtllm/moe_load_balancer.yaml"
    _, run = do(source, tmp_path, ep_size=4, placement=str(placement))
    assert (run.info.num_logical_experts, run.info.num_physical_experts) == (16, 20)
    np.testing.assert_array_equal(loads(run)[1], known["slot_count"].sum(axis=1))
    np.testing.assert_array_equal(placement_at(run, 100), known["slots"])
    found = logical(loads(run)[1], known["slots"], 16)
    np.testing.assert_array_equal(found, known["logical_count"].sum(axis=1))
    online = str(SAMPLES / "trtllm/moe_load_balancer_online.yaml")
    refused(DumpError, source, tmp_path, "initial_global_assignments", ep_size=4, placement=online)


@with_samples
def test_sample_of_megatron_is_imported(tmp_path: Path) -> None:
    known = truth("megatron_ultra_ep")
    load = known["loads_rank_layer_forward_phys"]
    source = SAMPLES / "megatron_ultra_ep"
    refused(UsageError, source, tmp_path, "several files", "--only", num_logical_experts=16)
    _, run = do(source, tmp_path, only="*pid4242*", num_logical_experts=16)
    assert run.info.layers == tuple(known["layer_numbers"].tolist())
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=0).transpose(1, 0, 2))
    options = {"only": "*partial*", "num_logical_experts": 16}
    refused(DumpError, source, tmp_path, "0, 2, 3", "no step would be complete", **options)
    # With the partial file as rank 1's: its garbage is not imported, and one step is incomplete.
    for path in source.glob("*rank[0123]_*"):
        if ("rank1" in path.name) == ("partial" in path.name):
            (tmp_path / path.name).symlink_to(path)
            (tmp_path / "with_partial").mkdir(exist_ok=True)
            (tmp_path / "with_partial" / path.name).write_bytes(path.read_bytes())
    report = import_dump(tmp_path / "with_partial", tmp_path / "p", None, Options(num_logical_experts=16))
    run = open_run(tmp_path / "p")
    assert (report.steps, report.complete) == (6, 5)
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=0).transpose(1, 0, 2)[:5])
    assert "1 forward pass left out" in report.notes[0]


@with_samples
def test_sample_of_vllm_snapshots_is_imported(tmp_path: Path) -> None:
    known = truth("vllm_expert_load_jsonl")
    per_step = known["physical_per_step_rank"].sum(axis=1)
    source = SAMPLES / "vllm_expert_load_jsonl/decode"
    report, run = do(source, tmp_path)
    steps, load = loads(run)
    assert steps == known["snapshot_steps"].tolist()
    np.testing.assert_array_equal(load, per_step[[step - 1 for step in steps]])
    for step in steps:
        np.testing.assert_array_equal(placement_at(run, step), known["p2l_per_step"][step - 1])
    assert report.not_sampled == 27
    assert run.info.model == "nvidia/DeepSeek-R1-0528-NVFP4-v2"
    _, run = do(source, tmp_path, window=True)
    sums = np.array([per_step[step - 10 : step].sum(axis=0) for step in steps])
    np.testing.assert_array_equal(loads(run)[1], sums)


@with_samples
@pytest.mark.parametrize("revision", ["a", "b"])
def test_sample_of_vllm_pr41141_is_imported(tmp_path: Path, revision: str) -> None:
    known = truth("vllm_pr41141")
    _, run = do(SAMPLES / f"vllm_pr41141/stats_rev_{revision}.jsonl", tmp_path)
    steps, load = loads(run)
    chosen = known["recorded_steps0"]
    assert steps == (chosen + 1).tolist()
    np.testing.assert_array_equal(load, known["physical_per_step_rank"].sum(axis=1)[chosen])
    for step in steps:
        np.testing.assert_array_equal(placement_at(run, step), known["p2l_per_step"][step - 1])
    assert run.info.num_logical_experts == 16


@with_samples
def test_sample_of_vllm_ascend_is_imported(tmp_path: Path) -> None:
    known = truth("vllm_ascend")
    source = SAMPLES / "vllm_ascend/moe_load_0.npy"
    refused(UsageError, source, tmp_path, "--format array", "--format ascend")
    _, run = do(source, tmp_path, "ascend", num_logical_experts=16)
    np.testing.assert_array_equal(loads(run)[1][0], known["physical_total"])
    assert {"passes", "placement"} <= unknown(run)
    _, run = do(SAMPLES / "vllm_ascend/workload_logical.pt", tmp_path, ep_size=4, placement="linear")
    np.testing.assert_array_equal(loads(run)[1][0], known["logical_total"])


PLACEMENTS = (
    "sglang/init_expert_location/physical_to_logical_map.json",
    "sglang/init_expert_location/physical_to_logical_map.pt",
    "sglang/init_expert_location/BAD_extra_key.json",
    "sglang/init_expert_location/BAD_moe_layers_only.json",
    "trtllm/moe_load_balancer.yaml",
    "trtllm/moe_load_balancer_online.yaml",
    "vllm_pr41141/mapping.jsonl",
    "vllm_ascend/expert_map_record.json",
    "vllm_ascend/gsm8k_temp0.0_4_4.json",
    "hygon_vllm_offline_map/map_v1.json",
    "hygon_vllm_offline_map/map_v2.json",
)


@with_samples
@pytest.mark.parametrize("name", PLACEMENTS)
def test_sample_placements_are_refused_as_loads(tmp_path: Path, name: str) -> None:
    refused(DumpError, SAMPLES / name, tmp_path, "a placement", "--placement", ep_size=4)


@with_samples
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vllm_pr41141/mapping.jsonl", ("vllm_pr41141", "mapping")),
        ("hygon_vllm_offline_map/map_v1.json", ("hygon_vllm_offline_map", "mapping")),
        ("hygon_vllm_offline_map/map_v2.json", ("hygon_vllm_offline_map", "mapping")),
        ("vllm_ascend/expert_map_record.json", ("vllm_ascend", "placement")),
        ("vllm_ascend/gsm8k_temp0.0_4_4.json", ("vllm_ascend", "placement")),
    ],
)
def test_sample_placements_are_used_with_loads(tmp_path: Path, name: str, keys: tuple[str, str]) -> None:
    """The loads have the same shape, by slot and without a placement."""
    options = {"placement": str(SAMPLES / name), "model": "HYV4ForCausalLM"}
    _, run = do(SAMPLES / "vllm_ascend/moe_load_0.npy", tmp_path, "ascend", **options)
    np.testing.assert_array_equal(placement_at(run, 0), truth(keys[0])[keys[1]].reshape(5, 20))
    assert run.info.num_logical_experts == 16


@with_samples
def test_invalid_sample_placements_are_refused(tmp_path: Path) -> None:
    folder, source = SAMPLES / "sglang/init_expert_location", SAMPLES / "sglang/stat_ep4_deepep_infinite"
    for name, word in (("BAD_extra_key", "comment"), ("BAD_moe_layers_only", "6 hidden layers")):
        refused(DumpError, source, tmp_path, word, ep_size=4, placement=str(folder / f"{name}.json"))


@with_samples
@pytest.mark.parametrize("name", ["logical_count_2d.json", "logical_count_3d.pt"])
def test_sample_of_sglang_logical_count_is_imported(tmp_path: Path, name: str) -> None:
    source = SAMPLES / "sglang/init_expert_location" / name
    _, run = do(source, tmp_path, ep_size=4, placement="linear")
    expected = json.loads((source.parent / "logical_count_2d.json").read_text())["logical_count"]
    np.testing.assert_array_equal(loads(run)[1][0], np.array(expected)[1:])
    assert "passes" in unknown(run)


# ---- the same formats, made by these tests


def test_sglang_stat_rows_become_steps(tmp_path: Path) -> None:
    load = hidden(local_loads(6, width=EXPERTS).sum(axis=1), 1)
    load[4:] = 0  # a ring buffer that is not full
    report, run = do(sglang_stat(tmp_path / "s", load), tmp_path, ep_size=EP, placement="linear")
    assert (loads(run)[0], run.info.layers) == ([0, 1, 2, 3], (1, 2, 3))
    np.testing.assert_array_equal(loads(run)[1], load[:4, 1:])
    assert any("2 rows" in note for note in report.notes)
    assert any("1 layer" in note for note in report.notes)
    assert {"step_order", "step_numbers", "times", "token_replication", "model"} == unknown(run)
    text = cli("summary", "--full", str(run.path)).stdout
    assert "worst periods" not in text
    assert "ranks with the most excess tokens" in text
    assert "no rearrangement is known" in cli("rearrangements", str(run.path)).stdout
    # With --ordered it was not a ring buffer, so an empty row is an idle pass.
    report, run = do(tmp_path / "s", tmp_path, ep_size=EP, placement="linear", ordered=True)
    assert loads(run)[0] == [0, 1, 2, 3, 4, 5]
    assert "step_order" not in unknown(run)
    assert "assumed" in timeline(run).notes[0]


def test_sglang_stat_needs_a_placement(tmp_path: Path) -> None:
    source = sglang_stat(tmp_path / "s", hidden(local_loads(3, width=EXPERTS).sum(axis=1), 1))
    refused(UsageError, source, tmp_path, "--ep-size", "--placement")
    refused(UsageError, source, tmp_path, "--placement linear", ep_size=EP)
    refused(UsageError, source, tmp_path, "the load of ranks is unknown", ep_size=EP, placement="unknown")
    refused(UsageError, source, tmp_path, "12 slots cannot be divided evenly", ep_size=5, placement="linear")
    refused(UsageError, source, tmp_path, "per_pass", ep_size=EP, placement="last")
    sglang_stat(source, np.ones((1, 4, EXPERTS)), "second.pt")
    refused(UsageError, source, tmp_path, "2 files", "--only", ep_size=EP, placement="linear")
    do(source, tmp_path, ep_size=EP, placement="linear", only="second*")


def test_expert_counts_are_split_over_replicas(tmp_path: Path) -> None:
    load = hidden(local_loads(3, width=EXPERTS).sum(axis=1), 1)
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps({"physical_to_logical_map": hidden(MAP, 0).tolist()}))
    source = sglang_stat(tmp_path / "s", load)
    report, run = do(source, tmp_path, ep_size=EP, placement=str(placement))
    found = loads(run)[1]
    np.testing.assert_array_equal(logical(found, MAP, EXPERTS), load[:, 1:])
    for layer, slots in enumerate(MAP):
        for expert in range(4):
            shares = found[:, layer, slots == expert]
            assert (shares.max(axis=1) - shares.min(axis=1) <= 1).all()
    assert "split evenly" in report.assumed["split"]
    assert any("placement.json" in note for note in rearrangement_report(run).notes)


def test_sglang_per_pass_has_loads_by_slot(tmp_path: Path) -> None:
    load = hidden(local_loads(5), 2)
    records = {rank: sglang_records(load, rank) for rank in range(EP)}
    source = sglang_passes(tmp_path / "s", records, hidden(MAP, 0))
    refused(UsageError, source, tmp_path, "--ep-size")
    refused(UsageError, source, tmp_path, "more than 2 ranks", ep_size=2)
    refused(DumpError, source, tmp_path, "4, 5, 6, 7", ep_size=8)
    report, run = do(source, tmp_path, ep_size=EP)
    assert loads(run)[0] == [50, 51, 52, 53, 54]
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=1)[:, 1:])
    assert (report.kind, run.info.scope, run.info.ep_size) == ("per_pass", "local", EP)
    assert not len(run.placement(53))
    np.testing.assert_array_equal(placement_at(run, 54), MAP)
    assert "earlier_placements" in unknown(run)
    _, run = do(source, tmp_path, ep_size=EP, placement="last")
    np.testing.assert_array_equal(placement_at(run, 50), MAP)
    assert "earlier_placements" not in unknown(run)


def test_sglang_batches_are_added_and_missing_passes_incomplete(tmp_path: Path) -> None:
    load = hidden(local_loads(5), 2)
    records = {rank: sglang_records(load, rank) for rank in range(EP)}
    for rank, of_rank in records.items():
        records[rank] = of_rank + [{**record, "gatherer_key": "child_a"} for record in of_rank[:2]]
    del records[2][4]  # rank 2 did not record the last pass
    report = import_dump(
        sglang_passes(tmp_path / "s", records, hidden(MAP, 0)), tmp_path / "d", None, Options(ep_size=EP)
    )
    assert (report.steps, report.complete) == (5, 4)
    steps, found = loads(open_run(tmp_path / "d"))
    assert steps == [50, 51, 52, 53]
    np.testing.assert_array_equal(found, load.sum(axis=1)[:4, 1:] * np.array([2, 2, 1, 1])[:, None, None])
    repeated = {rank: sglang_records(load, rank) * 2 for rank in range(EP)}
    refused(
        DumpError, sglang_passes(tmp_path / "t", repeated, hidden(MAP, 0)), tmp_path, "repeats", ep_size=EP
    )


def test_sglang_invalid_counts_are_refused(tmp_path: Path) -> None:
    def source(name: str, gatherers: Any, count: Any, slots: Any) -> Path:
        records = [
            {"forward_pass_id": 0, "rank": 0, "gatherer_key": key, "global_physical_count": count.clone()}
            for key in gatherers
        ]
        torch.save({"records": records, "last_physical_to_logical_map": slots}, tmp_path / name)
        return tmp_path / name

    whole, slots = torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None]
    bomb: Any = [1]
    for _ in range(12):
        bomb = [bomb] * 10
    # Two halves add up to a whole number, and four times 2^62 overflows to 0.
    for number, (gatherers, count, placed, word) in enumerate([
        ("ab", whole + 0.5, slots, "not a whole number"),
        ("abcd", torch.tensor([[2**62, 2, 3, 4]]), slots, "above 2^53"),
        ("a", whole, slots + 0.5, "invalid expert numbers"),
        ("a", whole, slots + 2**32, "invalid expert numbers"),
        ([bomb], whole, slots, "gatherer_key is not a text"),
    ]):  # fmt: skip
        refused(DumpError, source(f"{number}.pt", gatherers, count, placed), tmp_path, word, ep_size=1)
    _, run = do(source("good.pt", "ab", whole, slots), tmp_path, ep_size=1)
    np.testing.assert_array_equal(loads(run)[1], 2 * whole.numpy()[None])


def test_sglang_per_token_has_tokens_and_phases(tmp_path: Path) -> None:
    load = hidden(local_loads(2), 2)
    tokens = load[:, :, 1].sum(axis=2) // TOP_K  # [steps, ranks]
    records = {
        rank: sglang_records(
            load, rank, positions=[0] * 30, extend_seq_lens=None, forward_mode=2,
            topk_ids_of_layer=torch.zeros((4, 30, 8), dtype=torch.int32), misc_objects=[],
        )
        for rank in range(EP)
    }  # fmt: skip
    for rank, own in records.items():
        for step, one in enumerate(own):
            one["input_ids"] = [5] * int(tokens[step, rank])
    report, run = do(sglang_passes(tmp_path / "s", records, hidden(MAP, 0)), tmp_path, ep_size=EP)
    assert report.kind == "per_token"
    frame = run.steps()
    assert frame["num_tokens"].to_list() == tokens.sum(axis=1).tolist()
    assert frame["phase"].to_list() == ["decode", "decode"]
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=1)[:, 1:])


def test_sglang_files_of_two_recordings_are_refused(tmp_path: Path) -> None:
    load = hidden(local_loads(2), 2)
    records = {rank: sglang_records(load, rank) for rank in range(EP)}
    source = sglang_passes(tmp_path / "s", records, hidden(MAP, 0))
    other = {"records": records[1], "last_physical_to_logical_map": torch.tensor(hidden(MAP, 0))}
    torch.save(other, source / "later_1.pt")
    refused(UsageError, source, tmp_path, "rank 1 has several files", "--only", ep_size=EP)
    (source / "later_1.pt").unlink()
    other["last_physical_to_logical_map"] = torch.tensor(hidden(MAP[:, ::-1].copy(), 0))
    torch.save(other, source / "expert_distribution_recorder_9.1_1.pt")
    refused(DumpError, source, tmp_path, "its last placement differs from that of", ep_size=EP)


def test_equal_counts_of_all_ranks_need_token_replication(tmp_path: Path) -> None:
    """Without attention data parallelism, every rank counts every token."""
    load = np.repeat(hidden(local_loads(3, ranks=1), 2), EP, axis=1)
    records = {rank: sglang_records(load, rank) for rank in range(EP)}
    source = sglang_passes(tmp_path / "s", records, hidden(MAP, 0))
    refused(UsageError, source, tmp_path, "--token-replication 4", ep_size=EP)
    _, run = do(source, tmp_path, ep_size=EP, token_replication=EP)
    np.testing.assert_array_equal(loads(run)[1], load[:, 0, 1:])
    assert "token_replication" not in unknown(run)


def test_counts_of_received_tokens_give_no_traffic(tmp_path: Path) -> None:
    load = hidden(local_loads(3), 2)
    received = np.zeros_like(load)
    for rank in range(EP):
        own = slice(rank * SLOTS // EP, (rank + 1) * SLOTS // EP)
        received[:, rank, :, own] = load.sum(axis=1)[:, :, own]
    records = {rank: sglang_records(received, rank) for rank in range(EP)}
    _, run = do(sglang_passes(tmp_path / "s", records, hidden(MAP, 0)), tmp_path, ep_size=EP)
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=1)[:, 1:])
    with pytest.raises(DumpError, match="each rank counted the tokens that it received"):
        traffic_report(run)


def test_trtllm_has_loads_of_all_ranks(tmp_path: Path) -> None:
    load, layers = local_loads(4), [3, 4, 8]
    source = trtllm(tmp_path / "t", load, layers)
    refused(UsageError, source, tmp_path, "--ep-size", "--placement", "expert or per slot")
    refused(UsageError, source, tmp_path, "--placement unknown", ep_size=EP)
    refused(UsageError, source, tmp_path, "--num-experts", ep_size=EP, placement="unknown")
    yaml_file = trtllm_yaml(tmp_path / "balancer.yaml", MAP, layers)
    _, run = do(source, tmp_path, ep_size=EP, placement=str(yaml_file))
    assert (loads(run)[0], run.info.layers) == ([7, 8, 9, 10], (3, 4, 8))
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=1))
    np.testing.assert_array_equal(placement_at(run, 9), MAP)
    assert run.info.num_logical_experts == EXPERTS
    _, run = do(source, tmp_path, ep_size=EP, placement="unknown", num_logical_experts=EXPERTS)
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=1))
    assert "placement" in unknown(run)
    _, run = do(source, tmp_path, ep_size=EP, placement="linear")
    assert run.info.num_logical_experts == SLOTS


def test_trtllm_without_safetensors_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trtllm(tmp_path / "t", local_loads(1), [3, 4, 8])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(DumpError, source, tmp_path, "pip install 'eplb-dump[analyze,import]'", ep_size=EP)


def test_trtllm_yaml_without_fixed_placement_is_refused(tmp_path: Path) -> None:
    source = trtllm(tmp_path / "t", local_loads(2), [3, 4, 8])
    moving = trtllm_yaml(tmp_path / "moving.yaml", MAP, [3, 4, 8], updates=2)
    other = trtllm_yaml(tmp_path / "other.yaml", MAP, [3, 4, 5])
    narrow = trtllm_yaml(tmp_path / "narrow.yaml", MAP[:, :12], [3, 4, 8])
    for path, word in ((moving, "layer_updates_per_iter"), (other, "no layer 8"), (narrow, "12 slots")):
        refused(DumpError, source, tmp_path, word, ep_size=EP, placement=str(path))


def test_trtllm_iteration_without_a_layer_is_left_out(tmp_path: Path) -> None:
    source = trtllm(tmp_path / "t", local_loads(3), [3, 4, 8])
    tensors = {f"{7 + i}_{n}": np.ones(SLOTS, np.int64) for i in range(3) for n in (3, 4, 8)}
    del tensors["8_4"]
    save_file(tensors, source / "rank1.safetensors")
    options = Options(ep_size=EP, placement="linear")
    report = import_dump(source, tmp_path / "d", None, options)
    assert (report.steps, report.complete) == (3, 2)
    assert loads(open_run(tmp_path / "d"))[0] == [7, 9]
    assert "rank 1: 1 iteration left out" in report.notes[0]


def test_megatron_has_loads_of_all_ranks(tmp_path: Path) -> None:
    load = local_loads(6).transpose(1, 2, 0, 3)  # [ranks, layers, forwards, slots]
    for rank in range(EP):
        megatron(tmp_path / "m", rank, load[rank])
    _, run = do(tmp_path / "m", tmp_path, num_logical_experts=EXPERTS)
    assert run.info.layers == (2, 3, 4)
    np.testing.assert_array_equal(loads(run)[1], load.sum(axis=0).transpose(1, 0, 2))
    assert "placement" in unknown(run)
    refused(UsageError, tmp_path / "m", tmp_path, "--num-experts")
    np.save(tmp_path / "map.npy", MAP)
    _, run = do(tmp_path / "m", tmp_path, placement=str(tmp_path / "map.npy"))
    np.testing.assert_array_equal(placement_at(run, 0), MAP)


def test_megatron_unwritten_rows_are_left_out(tmp_path: Path) -> None:
    load = local_loads(6).transpose(1, 2, 0, 3)
    for rank in range(EP):
        of_rank = load[rank].copy()
        if rank == 1:
            of_rank[1, 4:] = -559038737
        megatron(tmp_path / "m", rank, of_rank, [6, 4, 6] if rank == 1 else None)
    report = import_dump(tmp_path / "m", tmp_path / "d", None, Options(num_logical_experts=EXPERTS))
    assert (report.steps, report.complete) == (6, 4)
    np.testing.assert_array_equal(loads(open_run(tmp_path / "d"))[1], load.sum(axis=0).transpose(1, 0, 2)[:4])
    # Rows within forward_counts must be counts.
    megatron(tmp_path / "m", 1, np.where(load[1] < 3, -1, load[1]))
    refused(DumpError, tmp_path / "m", tmp_path, "negative", num_logical_experts=EXPERTS)


def test_megatron_files_of_two_groups_are_refused(tmp_path: Path) -> None:
    load = local_loads(2).transpose(1, 2, 0, 3)
    for rank in range(EP):
        group = np.arange(EP, dtype=np.int32) + EP * (rank > 1)
        megatron(tmp_path / "m", rank, load[rank], ep_group_ranks=group)
    refused(UsageError, tmp_path / "m", tmp_path, "two EP groups", num_logical_experts=EXPERTS)


def test_vllm_snapshots_have_loads_and_placements(tmp_path: Path) -> None:
    load = local_loads(4).sum(axis=1)
    maps = [MAP, MAP, MAP[:, ::-1], MAP[:, ::-1]]
    records = [snapshot(10 * (i + 1), load[i], maps[i]) for i in range(4)]
    # Every data-parallel rank appends the same sums.
    source = lines(tmp_path / "x.jsonl", *(r for r in records for _ in range(3)))
    report, run = do(source, tmp_path)
    assert loads(run)[0] == [10, 20, 30, 40]
    np.testing.assert_array_equal(loads(run)[1], load)
    assert any("8 records left out, because they repeat a step" in note for note in report.notes)
    assert [change.first_step for change in run.history.rearrangements()] == [30]
    np.testing.assert_array_equal(placement_at(run, 29), MAP)
    counts = summarize(run).steps.to_json()
    assert (counts["recorded"], counts["not_sampled"], counts["missing"]) == (4, 27, 0)
    assert (run.info.interval, run.info.model, run.info.ep_size) == (10, "org/moe", EP)
    _, run = do(source, tmp_path, window=True)
    np.testing.assert_array_equal(loads(run)[1], load * 5)
    # The same, with one rank's records after the other's.
    _, run = do(lines(tmp_path / "y.jsonl", *records, *records), tmp_path)
    np.testing.assert_array_equal(loads(run)[1], load)


@pytest.mark.parametrize(
    ("steps", "interval", "not_sampled"),
    [
        ([0, 20, 30, 40], 10, 18),  # a missing record is missing steps, not unsampled ones
        ([0, 5, 6, 7], 1, 0),
        ([0, 4, 10], 1, 0),
        ([0, 2**60], 1, 0),
    ],
)
def test_vllm_interval_is_the_common_gap(
    tmp_path: Path, steps: list[int], interval: int, not_sampled: int
) -> None:
    load = local_loads(1).sum(axis=1)[0]
    report, run = do(lines(tmp_path / "x.jsonl", *(snapshot(step, load, MAP) for step in steps)), tmp_path)
    assert (run.info.interval, report.not_sampled, loads(run)[0]) == (interval, not_sampled, steps)


def test_vllm_invalid_names_are_refused(tmp_path: Path) -> None:
    load = local_loads(1).sum(axis=1)[0]
    odd = lines(tmp_path / "x.jsonl", snapshot(0, load, MAP, model_name="\ud800"))
    refused(UsageError, odd, tmp_path, "is not a valid model name")
    long = lines(tmp_path / "y.jsonl", snapshot(0, load, MAP, num_moe_layers="y" * 9999))
    with pytest.raises(DumpError) as raised:
        do(long, tmp_path)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


def test_vllm_restarted_step_numbers_need_an_option(tmp_path: Path) -> None:
    load = local_loads(4).sum(axis=1)
    again = lines(tmp_path / "x.jsonl", *(snapshot(10 * (i % 2), load[i], MAP) for i in range(4)))
    refused(UsageError, again, tmp_path, "line 3", "step 0 again, with a different load", "--renumber")
    back = lines(tmp_path / "y.jsonl", *(snapshot(50 - i, load[i], MAP) for i in range(4)))
    refused(UsageError, back, tmp_path, "step 49 after 50")
    _, run = do(again, tmp_path, renumber=True)
    np.testing.assert_array_equal(loads(run)[1], load)
    assert "step_numbers" in unknown(run)


@pytest.mark.parametrize("meta", [False, True])
def test_vllm_pr41141_has_loads_and_placements(tmp_path: Path, meta: bool) -> None:
    load = local_loads(6).sum(axis=1)
    tokens = load.reshape(6, LAYERS, EP, -1).sum(axis=3)
    more = [{} if meta else {"num_ranks": EP, "num_layers": LAYERS, "tokens": t.tolist()} for t in tokens]
    records = [stats(3 * i, load[i], MAP if i < 4 else MAP[:, ::-1], **more[i]) for i in range(6)]
    bench = {"record_type": "bench_run_start", "label": "x"}
    report, run = do(lines(tmp_path / "x.jsonl", *([META] if meta else []), bench, *records), tmp_path) \
        if meta else do(lines(tmp_path / "x.jsonl", *records[:1], bench, *records[1:]), tmp_path)  # fmt: skip
    assert loads(run)[0] == [0, 3, 6, 9, 12, 15]
    np.testing.assert_array_equal(loads(run)[1], load)
    assert [change.first_step for change in run.history.rearrangements()] == [12]
    assert (run.info.num_logical_experts, run.info.ep_size) == (EXPERTS, EP)
    assert run.info.model == ("org/moe" if meta else "unknown")
    assert any("1 record of other kinds" in note for note in report.notes)


def test_vllm_pr41141_contradictions_are_refused(tmp_path: Path) -> None:
    load = local_loads(1).sum(axis=1)[0]
    wrong = stats(1, load, MAP, num_ranks=EP, tokens=(load.reshape(LAYERS, EP, -1).sum(axis=2) + 1).tolist())
    refused(DumpError, lines(tmp_path / "a.jsonl", wrong), tmp_path, "not the sums")
    no_size = lines(tmp_path / "b.jsonl", stats(1, load, MAP))
    refused(UsageError, no_size, tmp_path, "--ep-size")
    do(no_size, tmp_path, ep_size=EP)
    twice = lines(tmp_path / "c.jsonl", META, stats(1, load, MAP), {**META, "model": "other"})
    refused(DumpError, twice, tmp_path, "two engine starts")
    wide = lines(tmp_path / "d.jsonl", META, stats(1, load, MAP + 8))
    refused(DumpError, wide, tmp_path, "beyond the 12")


def test_vllm_elastic_run_has_two_shapes(tmp_path: Path) -> None:
    """The numbers of slots and ranks can change; nothing is summed across the change."""
    small = snapshot(2, np.ones((LAYERS, 12), int), MAP[:, :12], num_physical_experts=12, world_size=2)
    source = lines(tmp_path / "x.jsonl", snapshot(1, np.ones((LAYERS, SLOTS), int), MAP), small)
    _, run = do(source, tmp_path)
    assert [c.num_physical_experts for c in summarize(run).configurations] == [SLOTS, 12]
    assert [c.ep_size for c in summarize(run).configurations] == [EP, 2]


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv", "pt"])
def test_one_array_is_one_step(tmp_path: Path, suffix: str) -> None:
    load = local_loads(1, width=EXPERTS).sum(axis=(0, 1))
    path = tmp_path / f"load.{suffix}"
    {
        "npy": lambda: np.save(path, load.astype(np.float32)),
        "npz": lambda: np.savez_compressed(path, load=load, note=np.asarray("x")),
        "csv": lambda: np.savetxt(path, load, "%d", ","),
        "pt": lambda: torch.save(torch.tensor(load), path),
    }[suffix]()
    refused(UsageError, path, tmp_path, "--ep-size")
    _, run = do(path, tmp_path, ep_size=EP, placement="linear", layers=(4, 5, 9))
    np.testing.assert_array_equal(loads(run)[1][0], load)
    assert run.info.layers == (4, 5, 9)
    assert "passes" in unknown(run)


def test_three_dimensions_need_a_format(tmp_path: Path) -> None:
    load = local_loads(EP, width=EXPERTS).sum(axis=1)
    np.save(tmp_path / "load.npy", load)
    np.savez(tmp_path / "two.npz", a=load, b=load)
    refused(UsageError, tmp_path / "load.npy", tmp_path, "--format array", "--format ascend", ep_size=EP)
    _, run = do(tmp_path / "load.npy", tmp_path, "array", ep_size=EP, placement="linear")
    np.testing.assert_array_equal(loads(run)[1], load)
    refused(UsageError, tmp_path / "two.npz", tmp_path, "--array", ep_size=EP, placement="linear")
    _, run = do(tmp_path / "two.npz", tmp_path, ep_size=EP, placement="linear", array="b")
    assert "step_order" in unknown(run)
    heat = load.transpose(1, 0, 2)  # [layers, ranks, slots]
    np.save(tmp_path / "heat.npy", heat)
    _, run = do(tmp_path / "heat.npy", tmp_path, "ascend", num_logical_experts=40)
    np.testing.assert_array_equal(loads(run)[1][0], heat.reshape(LAYERS, -1))
    assert run.info.ep_size == EP


STEPS = 300  # more than a chunk


def step_columns() -> dict[str, Any]:
    """Counts of slots whose placement changes in steps 5 and 280, and a value of each column in each step."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 900, STEPS)
    return {
        "load": rng.multinomial(2 * tokens[:, None], [1 / SLOTS] * SLOTS, (STEPS, LAYERS)),
        "physical_to_logical_map": np.stack([(MAP + (s >= 5) + (s >= 280)) % EXPERTS for s in range(STEPS)]),
        "step_ms": np.where(np.arange(STEPS) % 7 == 3, np.nan, rng.uniform(5, 9, STEPS)),
        "num_tokens": np.where(np.arange(STEPS) == 2, -1, tokens),
        "phase": np.array([("prefill", "", "decode")[s % 3] for s in range(STEPS)]),
    }


def test_columns_beside_the_counts_are_imported(tmp_path: Path) -> None:
    columns = step_columns()
    np.savez(tmp_path / "all.npz", **columns)
    _, run = do(tmp_path / "all.npz", tmp_path, ep_size=EP, ordered=True)
    np.testing.assert_array_equal(loads(run)[1], columns["load"])
    for step in (0, 4, 5, 279, 280, STEPS - 1):
        found = run.placement(step)["logical"].to_numpy().reshape(LAYERS, SLOTS)
        np.testing.assert_array_equal(found, columns["physical_to_logical_map"][step])
    frame = run.steps()
    known = [None if np.isnan(ms) else float(np.float32(ms)) for ms in columns["step_ms"]]
    assert frame["step_ms"].to_list() == known
    assert frame["num_tokens"].to_list() == [None if n < 0 else n for n in columns["num_tokens"].tolist()]
    assert frame["phase"].to_list() == [text or None for text in columns["phase"].tolist()]
    assert "placement" not in unknown(run)


def test_one_column_or_one_placement_for_all_steps_is_enough(tmp_path: Path) -> None:
    columns = step_columns()
    np.savez(tmp_path / "ms.npz", counts=columns["load"], step_ms=np.arange(STEPS))
    _, run = do(tmp_path / "ms.npz", tmp_path, ep_size=EP, placement="linear")
    assert run.steps()["step_ms"].to_list() == list(range(STEPS))
    assert run.steps()["num_tokens"].null_count() == STEPS
    np.savez(tmp_path / "half.npz", load=columns["load"], step_ms=np.full(STEPS, 3, np.float16))
    _, run = do(tmp_path / "half.npz", tmp_path, ep_size=EP, placement="linear")
    assert set(run.steps()["step_ms"].to_list()) == {3.0}

    np.savez(tmp_path / "map.npz", load=columns["load"], physical_to_logical_map=MAP)
    _, run = do(tmp_path / "map.npz", tmp_path, ep_size=EP)
    np.testing.assert_array_equal(run.placement(9)["logical"].to_numpy().reshape(LAYERS, SLOTS), MAP)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "step_ms",
            np.ones(STEPS - 1),
            f"its step_ms has the shape ({STEPS - 1},), the counts need ({STEPS},)",
        ),
        ("step_ms", np.ones((STEPS, 1)), "its step_ms has the shape"),
        ("step_ms", np.full(STEPS, -1.0), "must be times in ms"),
        ("step_ms", np.full(STEPS, np.inf), "must be times in ms"),
        ("step_ms", np.full(STEPS, "1"), "must be times in ms"),
        ("num_tokens", np.ones(STEPS + 1, int), "its num_tokens has the shape"),
        ("num_tokens", np.ones(STEPS), "must be whole numbers"),
        ("num_tokens", np.full(STEPS, -2), "must be whole numbers"),
        ("phase", np.array(["decode"]), "its phase has the shape"),
        ("phase", np.full(STEPS, "x" * 65), "must be texts"),
        ("phase", np.zeros(STEPS, int), "must be texts"),
        ("phase", np.array([f"request-{i}" for i in range(STEPS)]), "its phase has 300 different texts"),
        (
            "physical_to_logical_map",
            np.zeros((LAYERS, SLOTS - 1), int),
            "its physical_to_logical_map has the",
        ),
        ("physical_to_logical_map", np.full((LAYERS, SLOTS), -2), "must name the expert in each slot"),
    ],
)
def test_columns_that_do_not_fit_the_counts_are_refused(
    tmp_path: Path, name: str, value: Any, text: str
) -> None:
    np.savez(tmp_path / "x.npz", **{**step_columns(), name: value})
    refused(DumpError, tmp_path / "x.npz", tmp_path, text, ep_size=EP)


def test_long_source_is_written_in_segments(tmp_path: Path) -> None:
    """More than one segment, in batches: no step is lost, dropped or misplaced."""
    one = np.random.default_rng(1).integers(0, 70_000, (5000, 1, 8))
    load = np.concatenate([one, one[:, :, ::-1]], axis=1)
    np.save(tmp_path / "load.npy", load)
    _, run = do(tmp_path / "load.npy", tmp_path, "array", ep_size=2, placement="linear", ordered=True)
    np.testing.assert_array_equal(loads(run)[1], load)
    assert len(run.sessions[0].segments) == 3
    assert run.sessions[0].closed is not None


# ---- origin


def test_origin_is_reported(tmp_path: Path) -> None:
    source = sglang_stat(tmp_path / "s", hidden(local_loads(2, width=EXPERTS).sum(axis=1), 1))
    result = cli(
        "import",
        source,
        "--ep-size",
        "4",
        "--placement",
        "linear",
        "--model",
        "org/moe",
        tmp_path / "d",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "order of steps" in result.stdout
    session = json.loads(next((tmp_path / "d").rglob("session.json")).read_text())
    origin = session["origin"]
    assert (origin["system"], origin["kind"]) == ("SGLang", "stat")
    (file,) = source.iterdir()
    assert origin["files"] == [{"name": file.name, "bytes": file.stat().st_size}]
    assert origin["importer_version"] == session["writer_version"]
    assert set(origin["unknown"]) == {"step_order", "step_numbers", "times", "token_replication"}
    summary = cli("summary", tmp_path / "d")
    assert "imported from SGLang, stat; not known: step order" in " ".join(summary.stdout.split())
    assert "NEVER ACTED" not in summary.stdout
    document = json.loads(cli("summary", "--json", tmp_path / "d").stdout)
    assert document["run"]["origin"] == origin
    assert document["duration_seconds"] is None
    codes = [f["code"] for f in json.loads(cli("check", "--json", tmp_path / "d").stdout)["findings"]]
    assert codes == ["imported"]
    for command in ("timeline", "rearrangements", "experts"):
        assert "order of steps" in " ".join(cli(command, tmp_path / "d").stdout.split())
    compared = cli("compare", "--steps-a", "-0", "--steps-b", "1-", tmp_path / "d")
    assert compared.returncode in (0, 1)


def test_origin_round_trips_and_its_damage_is_found() -> None:
    origin = Origin("a", "b", (), "1", {"x": "y"}, {})
    fields = {**vars(origin), "files": [{"name": "n", "bytes": 3}]}
    assert Origin.from_dict(fields).files[0].bytes == 3
    for odd in ({}, [], "x", {**fields, "files": 3}, {**fields, "unknown": []}, {**fields, "files": [{}]}):
        with pytest.raises(ValueError, match="origin"):
            Origin.from_dict(odd)


def test_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", np.ones((2, 4), np.int64))
    options = Options(ep_size=2, placement="linear")
    reports = [import_dump(tmp_path / "load.npy", tmp_path / "d", None, options) for _ in range(3)]
    assert len({report.run_id for report in reports}) == 3
    import_dump(tmp_path / "load.npy", tmp_path / "d", None, options, "mine")
    before = sorted((tmp_path / "d").rglob("*"))
    with pytest.raises(UsageError, match="already exists"):
        import_dump(tmp_path / "load.npy", tmp_path / "d", None, options, "mine")
    with pytest.raises(UsageError, match="--run-id"):
        import_dump(tmp_path / "load.npy", tmp_path / "d", None, options, "../x")
    assert sorted((tmp_path / "d").rglob("*")) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DumpError, match="it is a file"):
        import_dump(tmp_path / "load.npy", tmp_path / "file", None, options)


# ---- malicious files

LINEAR = {"ep_size": 2, "placement": "linear"}


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"rank": 0, "logical_count": Evil(tmp_path / "ran")}, tmp_path / "a.pt")
    refused(DumpError, tmp_path / "a.pt", tmp_path, "could run code", **LINEAR)
    torch.save(Evil(tmp_path / "ran"), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    refused(DumpError, tmp_path / "b.pt", tmp_path, "b.pt", format="sglang", **LINEAR)
    objects = np.array([[Evil(tmp_path / "ran")]], object)
    np.savez(tmp_path / "c.npz", loads=objects)
    refused(DumpError, tmp_path / "c.npz", tmp_path, "pickled objects", **LINEAR)
    np.save(tmp_path / "d.npy", objects)
    refused(DumpError, tmp_path / "d.npy", tmp_path, "pickled objects", **LINEAR)
    (tmp_path / "e.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    source = trtllm(tmp_path / "t", local_loads(1), [3, 4, 8])
    refused(DumpError, source, tmp_path, "not YAML", ep_size=EP, placement=str(tmp_path / "e.yaml"))
    assert not (tmp_path / "ran").exists()


def npy_header(shape: tuple[int, ...], dtype: str = "<i8") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def test_giant_shapes_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    giant = npy_header((1 << 20, 1 << 20))
    (tmp_path / "a.npy").write_bytes(giant + b"\0" * 64)
    refused(DumpError, tmp_path / "a.npy", tmp_path, "it claims", **LINEAR)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("loads.npy", giant + b"\0" * 64)
    refused(DumpError, tmp_path / "b.npz", tmp_path, "it claims", **LINEAR)
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("loads.npy", npy_header((1 << 10, 1 << 14)) + bytes(1 << 27))
    refused(DumpError, tmp_path / "c.npz", tmp_path, "unpack to", **LINEAR)
    # Here not even the header may be unpacked.
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("loads.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 27) + b" " * (1 << 27))
    refused(DumpError, tmp_path / "f.npz", tmp_path, "unpack to", **LINEAR)
    # A large view of one number, and many views of the same numbers.
    view = torch.ones(1, dtype=torch.int32).expand(1 << 14, 1 << 8, 1 << 8)
    torch.save({"rank": 0, "logical_count": view}, tmp_path / "d.pt")
    refused(DumpError, tmp_path / "d.pt", tmp_path, "claim more than the file holds", **LINEAR)
    one = torch.ones((64, 64), dtype=torch.int32)
    records = [
        {"forward_pass_id": i, "rank": 0, "gatherer_key": "", "global_physical_count": one} for i in range(99)
    ]
    torch.save({"records": records, "last_physical_to_logical_map": one}, tmp_path / "e.pt")
    refused(DumpError, tmp_path / "e.pt", tmp_path, "claim more than the file holds", **LINEAR)
    header = json.dumps({"7_3": {"dtype": "I64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}}).encode()
    source = trtllm(tmp_path / "t", local_loads(1), [3, 4, 8])
    (source / "rank2.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    refused(DumpError, source, tmp_path, "cut off", ep_size=EP, placement="linear")
    (source / "rank2.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(DumpError, source, tmp_path, "cut off", ep_size=EP, placement="linear")


def test_compressed_torch_archive_is_refused(tmp_path: Path) -> None:
    source = sglang_stat(tmp_path / "s", np.zeros((64, 64, 64)))
    (path,) = source.iterdir()
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(DumpError, tmp_path / "bomb.pt", tmp_path, "never does", **LINEAR)


def sources(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A valid source of each kind of file, and the options to import it."""
    np.save(folder / "a.npy", np.ones((2, 4), np.int64))
    np.savez_compressed(folder / "b.npz", loads=np.ones((2, 4), np.int64))
    megatron(folder / "m", 0, local_loads(2, ranks=1).transpose(1, 2, 0, 3)[0], ep_size=np.int32(1))
    linear = {"ep_size": 1, "placement": "linear"}
    load = local_loads(2).sum(axis=1)
    return {
        "npy": (folder / "a.npy", linear),
        "npz": (folder / "b.npz", linear),
        "pt": (next(sglang_stat(folder / "s", np.ones((2, 3, 4))).iterdir()), linear),
        "megatron": (next((folder / "m").iterdir()), {"num_logical_experts": EXPERTS}),
        "jsonl": (lines(folder / "v.jsonl", *(snapshot(i, load[i], MAP) for i in range(2))), {}),
        "safetensors": (
            trtllm(folder / "t", local_loads(2, ranks=1), [0, 1, 2]) / "rank0.safetensors",
            linear,
        ),
    }


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "megatron", "jsonl", "safetensors"])
def test_truncated_or_flipped_file_is_one_error(tmp_path: Path, kind: str) -> None:
    """Cut off anywhere or with flipped bits, a source gives one error, or is still valid."""
    path, options = sources(tmp_path)[kind]
    source = path.parent if kind == "safetensors" else path
    whole = path.read_bytes()
    import_dump(source, tmp_path / "good", None, Options(**options))
    rng = np.random.default_rng(3)
    cuts = sorted({0, 1, 7, 8, *rng.integers(0, len(whole) - 1, 12).tolist(), len(whole) - 2})
    variants = [whole[:cut] for cut in cuts]
    for position in rng.integers(0, len(whole), 25).tolist():
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(0, 8))
        variants.append(bytes(changed))
    refusals = 0
    for number, data in enumerate(variants):
        path.write_bytes(data)
        into = tmp_path / f"v{number}"
        try:
            import_dump(source, into, None, Options(**options))
        except (DumpError, UsageError) as error:
            refusals += 1
            assert "\n" not in str(error)
            assert not list(into.glob("run=*"))
    assert refusals >= len(cuts) - 3


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.nan, "NaN"),
        (np.inf, "NaN or infinite"),
        (0.5, "whole number"),
        (-1.0, "negative"),
        (2.0**53 + 2, "above 2^53"),
    ],
)
def test_invalid_counts_are_refused(tmp_path: Path, value: float, word: str) -> None:
    array = np.ones((3, 2, 4))
    array[2, 1, 3] = value
    np.save(tmp_path / "a.npy", array)
    place = "(step 2, layer 1, column 3)"
    refused(DumpError, tmp_path / "a.npy", tmp_path, word, place, format="array", **LINEAR)


def test_invalid_json_is_refused(tmp_path: Path) -> None:
    load = local_loads(1).sum(axis=1)[0]
    good = json.dumps(snapshot(1, load, MAP))

    def filled(value: object) -> str:
        return json.dumps(snapshot(1, load, MAP, latest_expert_load=[[value] * SLOTS] * LAYERS))

    for name, text, word in (
        ("deep", '{"step": 1, "latest_expert_load": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deeply"),
        ("nan", filled(float("nan")), "whole numbers"),
        ("text", filled("x"), "whole numbers"),
        ("huge", filled(10**30), "whole numbers"),
        ("negative", json.dumps(snapshot(1, load - 10**6, MAP)), "negative"),
        ("map", json.dumps(snapshot(1, load, MAP + 1)), "beyond the 12"),
        ("shape", json.dumps(snapshot(1, load, MAP[:2])), "does not have the shape of the load"),
        ("layers", json.dumps(snapshot(1, load, MAP, num_moe_layers=9)), "num_moe_layers"),
        ("step", json.dumps({**snapshot(1, load, MAP), "step": "1"}), "no step"),
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
        refused(DumpError, tmp_path / f"{name}.jsonl", tmp_path, word, format="vllm")
    (tmp_path / "long.jsonl").write_text(good + "\n" + "[" * (17 << 20))
    refused(DumpError, tmp_path / "long.jsonl", tmp_path, "longer than 16 MiB")
    # The engine was killed while it wrote a line.
    (tmp_path / "torn.jsonl").write_text(good + "\n" + good[:100])
    report, run = do(tmp_path / "torn.jsonl", tmp_path)
    assert loads(run)[0] == [1]
    assert "line 2, the last, left out: it is cut off" in report.notes


def test_yaml_aliases_take_no_memory(tmp_path: Path) -> None:
    def bomb(first: str, more: str) -> str:
        """Each level has the one before ten times."""
        levels = (f"a{i}: &a{i} {more % ', '.join([f'*a{i - 1}'] * 10)}\n" for i in range(1, 12))
        return f"a0: &a0 {first}\n" + "".join(levels)

    lists, plain = bomb("[1]", "[%s]"), "initial_global_assignments: {3: [1]}\n"
    for number, (text, word) in enumerate([
        (lists + "num_slots: 16\nlayer_updates_per_iter: 0\ninitial_global_assignments: {3: *a11}\n",
         "not lists of experts"),
        # The alias is shown in a message, or merged.
        (lists + plain + "layer_updates_per_iter: *a11\n", "layer_updates_per_iter is no number"),
        (lists + plain + "layer_updates_per_iter: 0\nnum_slots: *a11\n", "num_slots is no number"),
        (bomb("{k: 1}", "{<<: [%s]}") + plain, "it is not YAML"),
        # Building it would overflow the stack.
        ("a: " + "[" * 200_000, "nested too deeply"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        source = trtllm(tmp_path / f"t{number}", local_loads(1), [3, 4, 8])
        refused(DumpError, source, tmp_path, word, ep_size=EP, placement=str(path))


def test_links_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.int64))
    (tmp_path / "link.npy").symlink_to(tmp_path / "a.npy")
    refused(DumpError, tmp_path / "link.npy", tmp_path, "symbolic link", **LINEAR)
    os.mkfifo(tmp_path / "pipe.npy")
    refused(DumpError, tmp_path / "pipe.npy", tmp_path, "not a regular file", **LINEAR)
    refused(DumpError, tmp_path / "none", tmp_path, "no such file", **LINEAR)
    refused(DumpError, tmp_path / "none", tmp_path, "no such file", format="array", **LINEAR)
    (tmp_path / "empty").mkdir()
    refused(DumpError, tmp_path / "empty", tmp_path, "no file in it", **LINEAR)
    (tmp_path / "what").write_text("hello")
    refused(DumpError, tmp_path / "what", tmp_path, "format is not supported", **LINEAR)
    names = ("there is no such file", "linear, round_robin, last, unknown")
    for wrong in (str(tmp_path / "no.json"), "roundrobin"):
        refused(UsageError, tmp_path / "a.npy", tmp_path, *names, ep_size=2, placement=wrong)
    source = trtllm(tmp_path / "t", local_loads(1), [3, 4, 8])
    (source / "rank1.safetensors").unlink()
    (source / "rank1.safetensors").symlink_to(source / "rank0.safetensors")
    refused(DumpError, source, tmp_path, "rank 1 (of 4 ranks) has no file", ep_size=EP, placement="linear")


def test_invalid_csv_is_refused(tmp_path: Path) -> None:
    for text, word in (
        ("1,2\n3\n", "line 2 has 1"),
        ("1,2\n-3,4\n", "'-3' is not a count"),
        ("1,1_0\n2,2\n", "'1_0'"),
        ("", "empty"),
        ("a,b\n1,2\n", "'a'"),
    ):
        (tmp_path / "a.csv").write_text(text)
        refused(DumpError, tmp_path / "a.csv", tmp_path, word, format="array", **LINEAR)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    load = local_loads(2).sum(axis=1)
    source = lines(tmp_path / "x.jsonl", *(snapshot(i, load[i], MAP) for i in range(2)))
    refused(UsageError, source, tmp_path, "4 EP ranks, not 8", ep_size=8)
    refused(UsageError, source, tmp_path, "12 experts, not 13", num_logical_experts=13)
    refused(UsageError, source, tmp_path, "its own placements", placement="linear")
    refused(UsageError, source, tmp_path, "--layers lists 2", layers=(1, 2))
    trt = trtllm(tmp_path / "t", local_loads(1), [3, 4, 8])
    refused(UsageError, trt, tmp_path, "remove --layers", layers=(1, 2, 3), ep_size=EP, placement="linear")


# ---- properties


@given(
    load=hnp.arrays(np.int32, (3, 2, 5), elements=st.integers(0, 2**31 - 1)),
    more=st.lists(st.integers(0, 4), max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_split_keeps_every_token(load: Any, more: list[int], seed: int) -> None:
    slots = np.array([*range(5), *more, -1], np.int32)
    rng = np.random.default_rng(seed)
    placement = np.array([rng.permutation(slots) for _ in range(2)], np.int32)
    found = split(load, placement, Path("x"))
    for layer in range(2):
        assert not found[:, layer, placement[layer] == -1].any()
        for expert in range(5):
            shares = found[:, layer, placement[layer] == expert].astype(np.int64)
            np.testing.assert_array_equal(shares.sum(axis=1), load[:, layer, expert])
            assert (np.ptp(shares, axis=1) <= 1).all()


@given(
    gaps=st.lists(st.integers(1, 6), min_size=1, max_size=30), interval=st.integers(1, 6), first=st.booleans()
)
@settings(max_examples=100)
def test_steps_between_samples_are_not_sampled(gaps: list[int], interval: int, first: bool) -> None:
    step = np.cumsum([10, *gaps])
    last = None if first else 10 - interval
    rows, at = _with_between(step, last, interval)
    expected, before = [], last
    for number in step.tolist():
        if before is not None and number - before == interval:
            expected += range(before + 1, number)
        expected.append(number)
        before = number
    assert rows.tolist() == expected
    assert rows[at].tolist() == step.tolist()


@given(values=hnp.arrays(hnp.scalar_dtypes(), (4,)))
@settings(max_examples=200)
def test_whole_counts_keep_their_values(values: Any) -> None:
    try:
        found = whole_counts(values, "x")
    except ValueError:
        assert values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 2**53
    else:
        assert found.dtype == (np.int32 if max(map(int, values)) < 2**31 else np.int64)
        assert all(int(a) == b for a, b in zip(found, values, strict=True))


# ---- the command


def test_command_prints_what_is_unknown(tmp_path: Path) -> None:
    load = local_loads(3).sum(axis=1)
    source = lines(tmp_path / "x.jsonl", *(snapshot(10 * (i + 1), load[i], MAP) for i in range(3)))
    arguments = ["import", "x.jsonl", "dump", "--run-id"]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        text = cli(*arguments, "r1")
        document = cli(*arguments, "r2", "--json")
        again = cli(*arguments, "r1")
        by_variable = cli("import", source, env={"EXPERT_LOAD_DUMP_DIR": str(tmp_path / "other")})
    finally:
        os.chdir(here)
    assert (text.returncode, text.stderr) == (document.returncode, document.stderr) == (0, "")
    # Sizes depend on the machine: the metadata has its host's name.
    sized = re.compile(r'(?<=rows, )[\d,]+(?= bytes)|(?<="bytes": )\d+')
    assert_golden("import.txt", sized.sub("1", text.stdout))
    assert_golden("import.json", sized.sub("1", document.stdout))
    written = sum(path.stat().st_size for path in (tmp_path / "dump/run=r2").rglob("*") if path.is_file())
    assert json.loads(document.stdout)["bytes"] == written
    one_error(again, 2, "run=r1", "--run-id")
    assert by_variable.returncode == 0
    assert len(list((tmp_path / "other").glob("run=import-*"))) == 1


def test_command_has_all_formats_of_the_library() -> None:
    assert tuple(READERS) == FORMATS


def test_codes_are_documented() -> None:
    source = "".join(p.read_text() for p in (ROOT / "eplb_analyze/transfer/importers").glob("*.py"))
    codes = set(re.findall(r'(?:unknown|assumed)\[\s*"(\w+)"\s*\]', source)) | {"steps"}
    assert {"step_order", "passes", "token_source"} < codes
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/record/import.md").read_text(), re.MULTILINE)
    assert codes <= set(documented)


def test_wrong_usage_is_one_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.int64))
    base = ["import", tmp_path / "a.npy", tmp_path / "d"]
    for more, word in (
        (["--format", "x"], "no format"),
        (["--layers", "5-3"], "--layers"),
        (["--layers", "3:5"], "--layers"),
        (["--layers", "1,1"], "--layers"),
        (["--ep-size", "0"], "--ep-size"),
        (["--ep-size", "99999999"], "--ep-size"),
    ):
        result = cli(*base, *more)
        assert (result.returncode, result.stdout) == (2, "")
        assert word in result.stderr
    one_error(cli(*base), 2, "a.npy", "--ep-size")
    one_error(cli("import", tmp_path / "b\x1b[31m.npy", tmp_path / "d"), 3, "no such file")
    result = cli("import", tmp_path / "a.npy")
    assert result.returncode == 2
    assert "'DST'" in result.stderr
