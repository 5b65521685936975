"""Dumps of every released format version read back unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.summary import summarize
from eplb_dump import FORMAT_VERSION

VERSIONS = sorted((ROOT / "tests/golden").glob("v*"))


def test_current_version_has_golden_dump() -> None:
    assert f"v{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}" in [p.name for p in VERSIONS]


@pytest.mark.parametrize("root", VERSIONS, ids=lambda p: p.name)
def test_golden_dump_reads_back(root: Path) -> None:
    truth = json.loads((root / "truth.json").read_text())
    local, placements = np.array(truth["local"]), np.array(truth["placements"])
    run = open_run(root)
    assert (run.info.model, run.info.engine, run.info.layers) == ("golden/moe", "golden", (3, 5))
    frame = run.loads()
    found = np.array(frame["load"].to_list()).reshape(12, 2, 6)
    np.testing.assert_array_equal(found, local.sum(axis=1))
    for step in range(12):
        expected = placements[int(step >= 6)]
        np.testing.assert_array_equal(run.placement(step)["logical"].to_numpy().reshape(2, 6), expected)
    stated = [[ms for ms in both if ms is not None] for both in truth.get("step_ms", [[]] * 12)]
    assert run.steps()["step_ms"].to_list() == [max(both, default=None) for both in stated]
    assert run.steps()["device_ms"].to_list() == [None] * 12
    assert summarize(run).to_json()["rearrangements"] == [6]
    assert [run.info.ranks_per_node, run.info.interval] == [1, 1]
    assert [s.info.engine_config for s in run.sessions] == [{"window": 8}] * 2
    report = check_run(run)
    assert report.ok
    assert {f.code for f in report.findings} == {"not_closed", "unsealed_journal", "torn_journal"}
