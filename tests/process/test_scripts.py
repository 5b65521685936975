"""scripts/real_vllm_gpu.sh as a user starts it; tests/unit/scripts tests its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def script(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it from another folder, in an environment without GPUs."""
    return subprocess.run(
        ["sh", ROOT / "scripts/real_vllm_gpu.sh", *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_table_of_stored_results_needs_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "out/check").mkdir(parents=True)
    part = {
        "event": "part", "tp": 2, "dp": 1, "layers": 3, "experts": 8, "redundant": 4, "set": [],
        "use_async": False,
    }  # fmt: skip
    (tmp_path / "out/check/results.jsonl").write_text(json.dumps(part) + "\n")
    done = script("--table", "out", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| steps recorded | not measured" in done.stdout


def test_machine_without_gpus_is_refused_in_one_line(tmp_path: Path) -> None:
    done = script("--out", "out", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("real_vllm_gpu.sh: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
