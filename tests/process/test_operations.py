"""docs/operate: sizes follow from the measured ones, and the examples do what the pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aged_runs import DAY, aged_session, begin_journal, set_back
from helpers import ROOT

from eplb_dump import budget as budget_module
from eplb_dump.budget import SEGMENT_SHARE
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.retention import SHARES
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE
from eplb_dump.format.session import SessionInfo, load_json

DOCS = ROOT / "docs"
PAGE = (DOCS / "operate/cluster.md").read_text()


def test_retention_job_seals_thins_and_removes(tmp_path: Path) -> None:
    """The job's own script, with the installed program: of a crashed run, an old one and a new one."""
    yaml = pytest.importorskip("yaml")
    manifest = (ROOT / "deploy/kubernetes/shared-volume.yaml").read_text()
    (job,) = (one for one in yaml.safe_load_all(manifest) if one["kind"] == "CronJob")
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    shell, option = container["command"]
    assert f" {mount['mountPath']}" in container["args"][0]
    script = container["args"][0].replace(mount["mountPath"], str(tmp_path))
    now = time.time_ns()
    aged_session(tmp_path, "old", [now - 400 * DAY])
    new = aged_session(tmp_path, "new", [now - 40 * DAY, now - 8 * DAY, now - DAY])
    crashed = aged_session(tmp_path, "crashed", [now - 41 * DAY], closed=False)
    info = SessionInfo.from_dict(load_json((crashed / SESSION_FILE).read_bytes()))
    begin_journal(crashed, info, 1, now - 39 * DAY).close()
    set_back(crashed, now - 39 * DAY)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run([shell, option, script], check=True, env={**os.environ, "PATH": path})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned.jsonl", "run=crashed", "run=new"]
    assert [e.tier.value for e in manifest_of(new).entries.values()] == ["minutes", "ranks", "full"]
    assert {e.tier.value for e in manifest_of(crashed).entries.values()} == {"minutes"}
    assert list(crashed.glob("journal-*")) == []


def manifest_of(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    with path.open("rb") as file:
        return Manifest.read(file, path.stat().st_size)


def test_sizes_follow_from_the_measured_ones() -> None:
    measured = (DOCS / "performance.md").read_text()
    (local,) = re.findall(r"one of 32 ranks.*?\| ([\d,]+) B =", measured)
    (summed,) = re.findall(r"Poisson, lognormal rates σ = 0.5.*?\| ([\d,]+) B =", measured)
    full = {"local": int(local.replace(",", "")), "global": int(summed.replace(",", ""))}
    sizes = {
        scope: [float(number) * 1000 for number in re.findall(r"([\d.]+) kB per (?:step|minute)", line)]
        for scope in ("local", "global")
        for line in PAGE.splitlines()
        if line.startswith(f"| scope {scope}") and "kB per step" in line
    }
    for scope, (a_step, _, _) in sizes.items():
        assert a_step == pytest.approx(full[scope], rel=0.03)
    seconds = {"h": 3600, "day": 86400, "days": 86400, "month": 30 * 86400, "months": 30 * 86400}
    rows = re.findall(r"^\| (\d+) (MB|GB), scope (\w+) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 4
    for number, unit, scope, *reaches in rows:
        budget = int(number) * {"MB": 1e6, "GB": 1e9}[unit]
        kept = budget * (1 - (budget_module._JOURNALS + budget_module._WORK_SEGMENTS) / SEGMENT_SHARE)
        each = zip(reaches, SHARES.values(), sizes[scope], (1 / 20, 1 / 20, 60), strict=True)
        back = 0.0
        for reach, share, size, duration in each:
            back += kept * share / size * duration
            count, name = reach.split()
            assert float(count) * seconds[name] == pytest.approx(back, rel=0.1)
