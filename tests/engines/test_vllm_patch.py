"""contrib/vllm-0.33.0.patch, applied to the installed vLLM: its field ``expert_load_dump_dir`` records."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engines import run_in, serve, version_of
from helpers import ROOT, engines_python
from vllm_truth import assert_true

PATCH = ROOT / "contrib/vllm-0.33.0.patch"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed vLLM, patched: links to its files, and copies of those that change."""
    assert version_of("vllm") == "0.33.0", "a patch for this version is missing"
    folder = tmp_path_factory.mktemp("patched")
    code = "from importlib.util import find_spec; print(find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([engines_python(), "-c", code], capture_output=True, text=True, check=True).stdout
    shutil.copytree(found.strip(), folder / "vllm", copy_function=os.symlink)
    for name in re.findall(r"^\+\+\+ b/(.*)$", PATCH.read_text(), re.MULTILINE):
        real = (folder / name).resolve()
        (folder / name).unlink()
        shutil.copy2(real, folder / name)
    subprocess.run(["git", "apply", "--whitespace=error", PATCH], cwd=folder, check=True)
    return folder


def field(dump: Path) -> list[str]:
    """The option of `vllm serve`."""
    return ["--eplb-config", json.dumps({"expert_load_dump_dir": str(dump)})]


@pytest.mark.parametrize(
    "options",
    [
        ["--world", "4", "--async", "--dummies", "0.3", "--draft-layers", "2", "--speculate"],
        ["--world", "2", "--v2", "--profile-step", "--stuck"],
    ],
    ids=["model runner v1", "model runner v2, killed while it shuts down"],
)
def test_the_field_alone_records(tmp_path: Path, packages: Path, options: list[str]) -> None:
    """Without the variable, and although vLLM loads no plugin."""
    dump = tmp_path / "dump"
    ranks, _, _ = serve(
        tmp_path, *options, "--without-plugin", *field(dump), packages=packages, EXPERT_LOAD_DUMP_DIR=""
    )
    run = assert_true(ranks, dump, "model")
    config = run.sessions[0].info.engine_config
    assert config["eplb_config"]["expert_load_dump_dir"] == str(dump)  # type: ignore[index, call-overload]
    assert not list(dump.glob("**/journal-*"))


def test_the_field_wins_over_the_variable(tmp_path: Path, packages: Path) -> None:
    """The other variables still hold."""
    ranks, unused, _ = serve(
        tmp_path, *field(tmp_path / "field"), packages=packages, EXPERT_LOAD_DUMP_RUN_ID="night"
    )
    assert not unused.exists()
    assert [path.name for path in (tmp_path / "field").iterdir()] == ["run=night"]
    assert_true(ranks, tmp_path / "field", "model")


def test_the_variable_alone_records(tmp_path: Path, packages: Path) -> None:
    ranks, dump, _ = serve(tmp_path, packages=packages)
    assert_true(ranks, dump, "model")


def test_without_both_vllm_does_what_it_did(tmp_path: Path, packages: Path) -> None:
    patched, dump, _ = serve(tmp_path / "patched", packages=packages, EXPERT_LOAD_DUMP_DIR="")
    assert not dump.exists()
    recorded, _, _ = serve(
        tmp_path / "recorded", *field(tmp_path / "field"), packages=packages, EXPERT_LOAD_DUMP_DIR=""
    )
    for one, other in zip(patched, recorded, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"began"}:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_configuration(packages: Path) -> None:
    """The folder is not in the hash that data-parallel ranks compare and that names compiled graphs."""
    done = run_in("vllm", "vllm_config.py", packages=packages)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    without, with_folder, other_interval = found["hashes"]
    assert without == with_folder != other_interval
    assert found["folder after the hash"] == "/dumps"
    assert "EPLB is not enabled" in found["without EPLB"]
    assert "requires the package eplb-dump" in found["without the package"]
    assert found["without the package and the field"] == ""
