"""`postmortem --group-by`, `--fail-below` and `--baseline`: rows grouped, judged and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from batches import EVEN, Batch, postmortem, record
from helpers import cli, one_error

from eplb_analyze.batch.comparison import judge
from eplb_analyze.batch.postmortem import rows_of
from eplb_analyze.batch.targets import find
from eplb_analyze.metrics.bootstrap import Ratio, difference


def test_group_figures_are_means_over_steps(batch: Batch) -> None:
    root, truth = batch
    groups = {group["value"]: group for group in postmortem(root, "--group-by", "engine")["groups"]}
    assert set(groups) == {"vllm", "sglang", "–"}
    assert groups["vllm"]["runs"] == 2
    both = np.concatenate([truth["bad"], truth["good"]]).astype(float)
    assert groups["vllm"]["balancedness"] == pytest.approx((both.mean(axis=2) / both.max(axis=2)).mean())
    assert groups["–"]["broken"] == 1
    by_config = {
        group["value"]: group["runs"] for group in postmortem(root, "--group-by", "eplb.window")["groups"]
    }
    assert by_config == {"9": 1, "–": 5}
    one_error(cli("postmortem", root, "--group-by", "nonsense"), 2, "--group-by nonsense", "eplb.window")


def test_threshold_and_baseline_set_the_exit_code(batch: Batch) -> None:
    root = batch.root / "a"
    assert cli("postmortem", root, "--fail-below", "0.1").returncode == 0
    out = cli("postmortem", root, "--fail-below", "0.7", "--json")
    assert out.returncode == 1
    assert [row["run_id"] for row in json.loads(out.stdout)["failed"]] == ["bad"]
    out = cli("postmortem", root, "--baseline", "good", "--json")
    assert out.returncode == 1
    assert [row["run_id"] for row in json.loads(out.stdout)["failed"]] == ["bad"]
    assert cli("postmortem", root, "--baseline", "bad").returncode == 0
    # A run that cannot be judged does not pass.
    assert cli("postmortem", batch.root / "a", batch.root / "f", "--fail-below", "0.1").returncode == 1
    one_error(cli("postmortem", root, "--baseline", "nobody"), 2, "no run has this id", "bad, good")


def test_difference_from_the_baseline_is_a_bootstrap(batch: Batch) -> None:
    root, truth = batch
    result = judge((row for row, _ in rows_of(find([str(root / "a")]))), baseline="good")
    bad = next(row for row in result.rows if row.run_id == "bad")
    means = [(T.mean(axis=2) / T.max(axis=2)).mean(axis=1) for T in (truth["good"], truth["bad"])]
    expected = difference(Ratio.mean(means[0]), Ratio.mean(means[1]))
    assert expected is not None
    assert bad.difference == pytest.approx(expected.value)
    assert bad.worse_than_baseline


def test_run_that_cannot_be_compared_does_not_pass(tmp_path: Path) -> None:
    record(tmp_path / "a", "base", EVEN)
    record(tmp_path / "a", "short", EVEN, steps=5)
    record(tmp_path / "a", "else", EVEN, model="another")
    record(tmp_path / "b", "base", EVEN)
    out = cli("postmortem", tmp_path, "--baseline", tmp_path / "a/run=base")
    assert out.returncode == 1
    last = " ".join(out.stdout.split("no worse than")[1].split())
    assert "2 cannot be judged" in last
    assert "short (fewer than 8 steps with tokens" in last
    assert "else (different model)" in last
    assert "did not pass" not in last
    one_error(cli("postmortem", tmp_path, "--baseline", "base"), 2, "several", str(tmp_path / "b/run=base"))
