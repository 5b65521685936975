"""docs/operate/cluster.md: sizes follow from the measured ones, and the examples do what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "operate/cluster.md").read_text()


def documents() -> list[Any]:
    yaml = pytest.importorskip("yaml")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [yaml.safe_load(block) for block in blocks]


def test_example_deployments_are_consistent() -> None:
    deployment, group, retention = documents()
    assert [d["kind"] for d in (deployment, group, retention)] == ["Deployment", "LeaderWorkerSet", "CronJob"]
    pods = [
        deployment["spec"]["template"],
        *(group["spec"]["leaderWorkerTemplate"][f"{r}Template"] for r in ("leader", "worker")),
    ]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        (mount,) = container["volumeMounts"]
        folder = {variable["name"]: variable["value"] for variable in container["env"]}[
            "EXPERT_LOAD_DUMP_DIR"
        ]
        assert folder == mount["mountPath"]
        assert mount["name"] in [volume["name"] for volume in pod["spec"]["volumes"]]
    script = deployment["spec"]["template"]["spec"]["containers"][0]["args"][0]
    assert "export EXPERT_LOAD_DUMP_RUN_ID=" in script
    subprocess.run(["sh", "-n", "-c", script], check=True)


def test_retention_deletes_by_the_newest_file(tmp_path: Path) -> None:
    """A run that is still written is kept, however old its folder is; so is one that has just started."""
    *_, retention = documents()
    (container,) = retention["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    shell, option = container["command"]
    script = container["args"][0].replace("/dumps", str(tmp_path))
    old = time.time() - 9 * 86400
    for name, fresh in (("run=over", False), ("run=live", True)):
        session = tmp_path / name / "model=m" / "rank=00000" / "session=s"
        session.mkdir(parents=True)
        (session / "journal-000000.frames").touch()
        paths = [session / "journal-000000.frames", session, *list(session.parents)[:3]]
        for path in paths[1 if fresh else 0 :]:
            os.utime(path, (old, old))
    (tmp_path / "run=begun").mkdir()
    (tmp_path / "other").mkdir()
    os.utime(tmp_path / "other", (old, old))
    subprocess.run([shell, option, script], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run=begun", "run=live"]
    empty = tmp_path / "none"
    empty.mkdir()
    subprocess.run([shell, option, script.replace(str(tmp_path), str(empty))], check=True)


def test_sizes_follow_from_the_measured_ones() -> None:
    measured = (DOCS / "performance.md").read_text()
    (local,) = re.findall(r"one of 32 ranks.*?\| ([\d,]+) B =", measured)
    (summed,) = re.findall(r"Poisson, lognormal rates σ = 0.5.*?\| ([\d,]+) B =", measured)
    rows = {
        cells[0].strip(): [float(re.sub("[^0-9.]", "", cell)) for cell in cells[1:3]]
        for cells in (line.strip("|").split("|") for line in PAGE.splitlines() if " GB |" in line)
    }
    a_rank, one = (int(text.replace(",", "")) * 72_000 / 1e9 for text in (local, summed))
    truth = {
        "scope local, a rank": a_rank,
        "scope local, 32 ranks": 32 * a_rank,
        "… `EXPERT_LOAD_DUMP_INTERVAL=10`": 3.2 * a_rank,
        "scope global, one writer": one,
    }
    assert list(rows) == list(truth)
    for name, gigabytes in truth.items():
        assert rows[name] == pytest.approx([gigabytes, 24 * gigabytes], rel=0.03), name
