"""The plugin inside SGLang: its real recorder in several processes, with and without the plugin.

sglang_ranks.py runs in the engines' environment and saves the truth; the dump is read here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import described, run_in
from helpers import cli, engines_python
from sglang_runs import (
    LOGICAL,
    MOE_LAYERS,
    SLOTS,
    Array,
    Recorded,
    SglangRun,
    assert_as_without,
    assert_recorded,
    stated,
)

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.reader.run import Run
from eplb_analyze.transfer.importers.import_dump import import_dump
from eplb_analyze.transfer.importers.source import Options
from eplb_dump.format.journal import StepRows
from eplb_dump.format.schema import STATUS_LABELS

ON_A_GPU = (
    "import importlib.util as i, torch; exit(not (torch.cuda.is_available() and i.find_spec('sgl_kernel')))"
)


@pytest.fixture(scope="session")
def gpu() -> str:
    """Skips where SGLang cannot count on a GPU."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("SGLang's recorder with CUDA tensors: this machine has no GPU")
    if subprocess.run([engines_python(), "-c", ON_A_GPU], check=False).returncode:
        pytest.skip("SGLang's recorder with CUDA tensors: no CUDA build of torch, GPU or sglang-kernel")
    return "cuda"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    return "cpu" if request.param == "cpu" else str(request.getfixturevalue("gpu"))


def engine(
    out: Path,
    scenario: str,
    *,
    ranks: int = 2,
    plugin: bool = True,
    device: str = "cpu",
    **variables: str,
) -> SglangRun:
    out.mkdir(exist_ok=True)
    if plugin:
        variables["EXPERT_LOAD_DUMP_DIR"] = str(out / "dump")
    done = run_in("sglang", "sglang_ranks.py", out, ranks, scenario, device, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return SglangRun(out, ranks, device)


def dump(ours: SglangRun) -> Run:
    return open_run(ours.out / "dump")


def loads(run: Run) -> Array:
    """[steps, layers, slots] of all steps, summed over the ranks that the run was opened with."""

    def read() -> Array:
        return np.concatenate([b.loads(0, run.info.num_layers, b.step) for b in run.blocks()])

    return run.retry_without_damaged(read)


def placements(run: Run, steps: list[int]) -> Array:
    """[steps, layers, slots]"""
    found = [run.placement(step)["logical"].to_numpy() for step in steps]
    return np.reshape(found, (len(steps), len(MOE_LAYERS), SLOTS))


def recorded(ours: SglangRun, rank: int) -> Recorded:
    run = open_run(ours.rank_folder(rank))
    parts = [segment.steps() for session in run.sessions for segment in session.segments]
    rows = StepRows.concat(parts)
    numbers = rows.step.tolist()
    return Recorded(
        steps=numbers,
        status=[STATUS_LABELS[code] for code in rows.status],
        loads=loads(run),
        placements=placements(run, numbers),
        described=described(run, rank),
        device_ms=rows.device_ms,
    )


def assert_exact(ours: SglangRun) -> None:
    """Every rank's part, step by step, and the placement that was in force in each."""
    assert_recorded(ours, [recorded(ours, rank) for rank in range(ours.ranks)])
    run = dump(ours)
    assert run.present_ranks == list(range(ours.ranks))
    true = ours.truth("maps")[0][:, MOE_LAYERS]
    assert run.steps()["step"].to_list() == list(range(len(true)))
    assert set(run.steps()["state"]) == {"recorded"}
    assert np.array_equal(placements(run, list(range(len(true)))), true)
    assert not run.findings
    assert [f for f in check_run(run).findings if f.severity == "error"] == []


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_loads_and_placements_are_exact_and_sglang_is_as_without(
    mode: str, device: str, tmp_path: Path
) -> None:
    ours = engine(tmp_path / "with", mode, device=device)
    theirs = engine(tmp_path / "without", mode, plugin=False, device=device)
    assert_exact(ours)
    assert_as_without(ours, theirs)


@pytest.mark.parametrize("mode", ["graphs", "graphs_per_pass"])
def test_what_cuda_graphs_count_is_exact_and_sglang_is_as_without(
    mode: str, gpu: str, tmp_path: Path
) -> None:
    ours = engine(tmp_path / "with", mode, device=gpu)
    theirs = engine(tmp_path / "without", mode, plugin=False, device=gpu)
    assert_exact(ours)
    assert_as_without(ours, theirs)


def test_no_pass_waits_for_the_gpu(gpu: str, tmp_path: Path) -> None:
    assert_exact(engine(tmp_path, "unsynchronized", device=gpu))


def test_four_ranks_are_recorded_exactly_and_described(device: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, "simple", ranks=4, device=device)
    assert_exact(ours)
    run = dump(ours)
    info = run.info
    assert (info.engine, info.model, info.scope) == ("sglang", "tiny/moe", "local")
    assert (info.ep_size, info.ranks_per_node, info.num_logical_experts) == (4, 4, LOGICAL)
    assert list(info.layers) == MOE_LAYERS
    # Without an all-to-all backend, every rank counts all tokens.
    assert info.token_replication == 4
    session = run.sessions[0].info
    assert session.engine_version
    config = session.engine_config
    assert (config["expert_distribution_recorder_mode"], config["ep_num_redundant_experts"]) == ("stat", 2)
    assert (config["tp_size"], config["ep_size"], config["nnodes"]) == (4, 4, 1)
    assert (config["enable_eplb"], config["moe_a2a_backend"]) == (False, "none")
    assert config["eplb_min_rebalancing_utilization_threshold"] == 1.0
    assert config["expert_distribution_recorder_buffer_size"] == -1
    assert config["num_expert_groups"] == 1
    assert sorted(s.info.ep_rank for s in run.sessions) == [0, 1, 2, 3]
    assert len({s.info.run_id for s in run.sessions}) == 1
    (start_id,) = {s.info.start_identity.id for s in run.sessions}
    assert start_id


@pytest.mark.parametrize(
    ("scenario", "replication"), [("scattered", 1), ("scattered_dp", 1), ("dp_attention", 2)]
)
def test_how_often_a_token_is_counted(scenario: str, replication: int, device: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, scenario, device=device, EXPERT_LOAD_DUMP_INTERVAL="2")
    run = dump(ours)
    assert (run.info.token_replication, run.info.interval) == (replication, 2)
    assert run.steps()["state"].to_list() == ["recorded", "not_sampled"] * 2
    true = ours.truth("loads").sum(0)[::2, MOE_LAYERS] / replication
    found = run.loads()["load"].to_list()
    assert (np.array(found).reshape(true.shape) == true).all()
    # In a group of attention's tensor parallelism, each rank gets a part of the padded tokens.
    for rank in range(ours.ranks):
        expected = stated(ours, rank, interval=2, tokens=scenario != "scattered")
        assert described(run, rank) == expected
    assert [f for f in check_run(run).findings if f.severity == "error"] == []


def test_a_draft_models_passes_are_no_steps(device: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, "drafts", ranks=1, device=device)
    assert len(ours.said(0, "switch")) == 15
    assert ours.said(0, "began") == [1, 1, 0, 0, 0] * 3
    assert ours.truth("loads").shape[1] == 6
    assert_exact(ours)


def test_per_token_is_recorded_until_it_fails_and_sglang_goes_on(device: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, "per_token", ranks=1, device=device)
    said = [text for text in ours.said(0, "messages") if "expert-load recording is off" in text]
    assert len(said) == 1
    assert "SGLang 0." in said[0]
    assert len(ours.said(0, "switch")) == 4
    for rank, true in enumerate(ours.truth("loads")):
        assert (loads(open_run(ours.rank_folder(rank))) == true[:2, MOE_LAYERS]).all()


def test_what_its_own_recorder_writes_per_token_is_imported(tmp_path: Path) -> None:
    theirs = engine(tmp_path, "own_per_token", plugin=False)
    (tmp_path / "own").mkdir()
    for path in sorted(tmp_path.glob("own-*/*.pt")):
        path.rename(tmp_path / "own" / path.name)
    options = Options(ep_size=2, placement="last")
    report = import_dump(tmp_path / "own", tmp_path / "dump", None, options)
    assert (report.format, report.kind, report.scope, report.ranks) == ("sglang", "per_token", "local", 2)
    assert (report.steps, report.complete, report.layer_numbers) == (6, 6, MOE_LAYERS)
    run = open_run(tmp_path / "dump")
    assert (loads(run) == theirs.truth("loads").sum(0)[:, MOE_LAYERS]).all()
    first = run.steps()["step"].min()
    slots = run.placement(first)["logical"].to_numpy().reshape(len(MOE_LAYERS), SLOTS)
    assert (slots == theirs.truth("maps")[0, 0, MOE_LAYERS]).all()
    for rank in range(2):
        found = [tokens for _, tokens in described(run, rank).values()]
        assert found == theirs.truth("tokens")[rank].tolist()
    # Its counts are those of the ids beside them, which --format topk would count.
    for path in (tmp_path / "own").iterdir():
        for record in torch.load(path, weights_only=True)["records"]:
            ids, counts = record["topk_ids_of_layer"], record["global_physical_count"]
            assert ids.shape[1] == len(record["input_ids"])
            for layer in MOE_LAYERS:
                named = ids[layer][ids[layer] >= 0]
                assert torch.equal(torch.bincount(named, minlength=SLOTS), counts[layer].long())


@pytest.mark.parametrize("scenario", ["no_predicate", "no_entry", "renamed", "off"])
def test_where_sglang_is_not_as_known_it_goes_on_and_is_told_once(scenario: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, scenario, ranks=1)
    said = [text for text in ours.said(0, "messages") if "expert-load recording is off" in text]
    assert len(said) == 1
    assert ("--expert-distribution-recorder-mode stat" if scenario == "off" else "SGLang 0.") in said[0]
    if scenario == "renamed":  # SGLang itself stored the passes, before and after
        assert ours.said(0, "stored") == [1, 2, 3, 4, 4, 4]
        assert ours.said(0, "switch") == [True] * 4 + [False] * 2
        assert loads(dump(ours)).shape[0] == 2
    else:
        assert ours.truth("loads").shape[1] == 4
        assert not (ours.out / "dump").exists()


def test_a_wrong_setting_is_told_once(tmp_path: Path) -> None:
    ours = engine(tmp_path, "simple", ranks=1, EXPERT_LOAD_DUMP_INTERVAL="often")
    said = [text for text in ours.said(0, "messages") if "EXPERT_LOAD_DUMP_INTERVAL" in text]
    assert len(said) == 1
    assert not (ours.out / "dump").exists()


def test_killed_in_the_middle_it_leaves_a_dump_that_reads(device: str, tmp_path: Path) -> None:
    engine(tmp_path, "killed", device=device)
    done = cli("summary", tmp_path / "dump", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["run"]["model"] == "tiny/moe"
    assert summary["steps"]["recorded"] == 20
    run = open_run(tmp_path / "dump")
    assert run.present_ranks == [0, 1]
    complete = run.loads()
    assert complete["step"].n_unique() == 20
    assert complete["load"].list.sum().min() > 0


def test_killed_while_it_shuts_down_it_is_sealed(device: str, tmp_path: Path) -> None:
    ours = engine(tmp_path, "stuck", device=device)
    assert_exact(ours)
    assert not list(ours.out.glob("dump/**/journal-*"))
    assert not {f.code for f in check_run(dump(ours)).findings} & {"not_closed", "incomplete_end"}


#: What SGLang 0.5.23 makes of it in the models named; None: all layers are MoE layers, or not known.
CONFIGS: list[tuple[dict[str, Any], list[int] | None]] = [
    ({"model_type": "deepseek_v3", "first_k_dense_replace": 3, "moe_layer_freq": 1}, [3, 4, 5]),
    ({"model_type": "deepseek_v2", "first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
    ({"model_type": "glm4_moe", "first_k_dense_replace": 1}, [1, 2, 3, 4, 5]),
    ({"model_type": "deepseek_v3", "first_k_dense_replace": 0, "moe_layer_freq": 1}, None),
    ({"model_type": "sarvam_moe", "first_k_dense_replace": 1, "moe_layer_freq": 2}, None),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [], "decoder_sparse_step": 1}, None),
    ({"model_type": "mimo_v2", "moe_layer_freq": [0, 1, 1, 1, 1, 1]}, [1, 2, 3, 4, 5]),
    ({"model_type": "mimo_v2", "moe_layer_freq": [0, 1, 0, 0, 1, 1]}, None),
]


def test_which_layers_are_moe_layers(tmp_path: Path) -> None:
    (tmp_path / "configs.json").write_text(json.dumps([config for config, _ in CONFIGS]))
    engine(tmp_path, "rows", ranks=1)
    assert json.loads((tmp_path / "rows.json").read_text()) == [layers for _, layers in CONFIGS]
