"""`postmortem`: a batch of runs, some broken, some growing, one long, by every executor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from batches import EP_SIZE, EVEN, EXPERTS, SKEWED, record
from helpers import assert_golden, cli, one_error

from eplb_analyze import open_run
from eplb_analyze.bootstrap import Ratio, difference
from eplb_analyze.executors import Lost, Processes
from eplb_analyze.postmortem import Postmortem, find, judge, rows_of
from eplb_analyze.run import PART_STEPS
from eplb_dump import ExpertLoadWriter, writer


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Dumps at different depths, and the truth of the runs that can be read."""
    root = tmp_path_factory.mktemp("batch")
    truth = {
        "bad": record(root / "a/dump", "bad", SKEWED, engine="vllm", engine_config={"eplb": {"window": 9}}),
        "good": record(root / "a/dump", "good", EVEN, seed=1, engine="vllm", segment_steps=16),
        "ranks": record(root / "b", "ranks", SKEWED, seed=2, local=True, engine="sglang"),
        "torn": record(root / "c/d/e", "torn", SKEWED, seed=3, model="other", segment_steps=16),
        "long": record(root / "long", "long", SKEWED, seed=4, steps=PART_STEPS + 5000),
    }
    damaged = sorted((root / "c/d/e").rglob("loads-*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    record(root / "f", "broken", EVEN)
    session = next((root / "f").rglob("session.json"))
    session.write_text("{")
    (root / "empty").mkdir()
    return root, truth


def documents(result: Postmortem) -> list[dict[str, Any]]:
    return [row.to_json() for row in result.rows]


def run(root: Path, *more: str | Path) -> dict[str, Any]:
    out = cli("postmortem", root, "--output", "json", *more)
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def test_rows_are_the_figures_of_each_run(batch: tuple[Path, dict[str, Any]]) -> None:
    root, truth = batch
    rows = {row["run_id"]: row for row in run(root)["runs"]}
    assert set(rows) == {*truth, "broken"}
    for name in ("bad", "good", "ranks", "long"):
        T, row = truth[name].astype(float), rows[name]
        assert row["status"] == "complete"
        assert row["steps"] == len(T)
        assert row["balancedness"] == pytest.approx((T.mean(axis=2) / T.max(axis=2)).mean())
        idle = 1 - T.mean(axis=2).sum() / T.max(axis=2).sum()
        assert row["idle_fraction"] == pytest.approx(idle)
        assert row["lost_rank_seconds"] == pytest.approx(idle * len(T) * EP_SIZE * row["step_seconds"])
        excess = T.max(axis=2) - T.mean(axis=2)
        door = np.bincount(T.argmax(axis=2).ravel(), excess.ravel(), EP_SIZE)
        assert row["worst_rank"] == door.argmax()
        assert row["worst_rank_share"] == pytest.approx(door.max() / door.sum())
    torn = rows["torn"]
    assert torn["status"] == "incomplete"
    assert torn["faults"] == ["damaged_file", "incomplete_steps"]
    assert torn["steps"] == 60 - 16
    assert "loads-" in torn["reason"]
    assert rows["broken"]["status"] == "broken"
    assert "session.json" in rows["broken"]["reason"]
    assert rows["bad"]["config"] == {"eplb.window": 9}


def test_rows_agree_with_summary(batch: tuple[Path, dict[str, Any]]) -> None:
    root, _ = batch
    for row in run(root / "a", root / "long")["runs"]:
        out = cli("summary", row["dump"], "--run", row["run_id"], "--output", "json")
        summary = json.loads(out.stdout)
        assert row["balancedness"] == summary["balancedness"]["mean"]
        assert row["idle_fraction"] == summary["idle_fraction"]
        assert row["persistent_share"] == summary["loss"]["persistent_share"]


def test_what_lost_most_comes_first_and_the_broken_last(batch: tuple[Path, dict[str, Any]]) -> None:
    rows = run(batch[0])["runs"]
    lost = [row["lost_rank_seconds"] for row in rows if row["status"] != "broken"]
    assert lost == sorted(lost, reverse=True)
    assert [row["run_id"] for row in rows if row["status"] == "broken"] == [rows[-1]["run_id"]]


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_every_executor_gives_the_same_rows(batch: tuple[Path, dict[str, Any]], executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    root, _ = batch
    out = subprocess.run(
        [
            Path(sys.executable).with_name("eplb-analyze"), "postmortem", root, "--output", "json",
            "--executor", executor, "--workers", "2",
        ],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    # To the last bit: the parts, and the order in which they are merged, are the same.
    assert json.loads(out.stdout)["runs"] == run(root)["runs"]


def test_a_long_run_is_shared_out(batch: tuple[Path, dict[str, Any]]) -> None:
    parts = open_run(batch[0] / "long").parts()
    assert len(parts) == 2
    assert parts[0][0] == 0
    assert parts[0][1] == parts[1][0]
    assert parts[1][1] == PART_STEPS + 5000


def _die_over(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_worker_that_dies_is_no_end() -> None:
    executor = Processes(2)
    try:
        found = list(executor.map(_die_over, range(12)))
    finally:
        executor.close()
    assert [item for item, _ in found] == list(range(12))
    assert isinstance(found[2][1], Lost)
    assert [r for i, r in found if i != 2] == [i * i for i in range(12) if i != 2]


def test_groups_are_means_over_steps(batch: tuple[Path, dict[str, Any]]) -> None:
    root, truth = batch
    groups = {group["value"]: group for group in run(root, "--by", "engine")["groups"]}
    assert set(groups) == {"vllm", "sglang", "–"}
    assert groups["vllm"]["runs"] == 2
    both = np.concatenate([truth["bad"], truth["good"]]).astype(float)
    assert groups["vllm"]["balancedness"] == pytest.approx((both.mean(axis=2) / both.max(axis=2)).mean())
    assert groups["–"]["broken"] == 1
    by_config = {group["value"]: group["runs"] for group in run(root, "--by", "eplb.window")["groups"]}
    assert by_config == {"9": 1, "–": 5}
    one_error(cli("postmortem", root, "--by", "nonsense"), 2, "--by nonsense", "eplb.window")


def test_threshold_and_baseline_set_the_exit_code(batch: tuple[Path, dict[str, Any]]) -> None:
    root = batch[0] / "a"
    assert cli("postmortem", root, "--threshold", "0.1").returncode == 0
    out = cli("postmortem", root, "--threshold", "0.7", "--output", "json")
    assert out.returncode == 1
    assert [row["run_id"] for row in json.loads(out.stdout)["failed"]] == ["bad"]
    out = cli("postmortem", root, "--baseline", "good", "--output", "json")
    assert out.returncode == 1
    assert [row["run_id"] for row in json.loads(out.stdout)["failed"]] == ["bad"]
    assert cli("postmortem", root, "--baseline", "bad").returncode == 0
    # What cannot be judged does not pass.
    assert cli("postmortem", batch[0] / "a", batch[0] / "f", "--threshold", "0.1").returncode == 1
    one_error(cli("postmortem", root, "--baseline", "nobody"), 2, "no run has this id")


def test_the_difference_from_a_baseline_is_the_bootstraps(batch: tuple[Path, dict[str, Any]]) -> None:
    root, truth = batch
    result = judge((row for row, _ in rows_of(find([str(root / "a")]))), baseline="good")
    bad = next(row for row in result.rows if row.run_id == "bad")
    means = [(T.mean(axis=2) / T.max(axis=2)).mean(axis=1) for T in (truth["good"], truth["bad"])]
    expected = difference(Ratio.mean(means[0]), Ratio.mean(means[1]))
    assert expected is not None
    assert bad.difference == pytest.approx(expected.value)
    assert bad.worse_than_baseline


def test_saved_are_a_table_and_a_report_each(batch: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = batch
    rows = run(root, "--save", tmp_path / "out")["runs"]
    table = pl.read_parquet(tmp_path / "out/runs.parquet")
    assert table["run_id"].to_list() == [row["run_id"] for row in rows]
    assert table["balancedness"].to_list() == [row["balancedness"] for row in rows]
    reports = list((tmp_path / "out/reports").glob("*.json"))
    assert len(reports) == 5
    for report in reports:
        summary = json.loads(report.read_text())
        row = next(row for row in rows if row["run_id"] == summary["run"]["run_id"])
        assert summary["balancedness"]["mean"] == row["balancedness"]


def test_html_reports_are_written_by_workers(batch: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    more = ("--save", tmp_path / "out", "--html", "--executor", "processes", "--workers", "2")
    run(batch[0] / "a", *more)
    pages = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/reports").glob("*.html")}
    assert sorted(path.name.split("-")[0] for path in pages) == ["bad", "good"]
    assert all(b"<html" in path.read_bytes()[:200] for path in pages)
    run(batch[0] / "a", *more)
    assert {path: path.stat().st_mtime_ns for path in pages} == pages


def test_what_did_not_change_is_not_read_again(tmp_path: Path) -> None:
    record(tmp_path / "dumps", "done", SKEWED)
    with ExpertLoadWriter(
        tmp_path / "dumps", model="m", num_logical_experts=EXPERTS, ep_size=EP_SIZE, scope="global",
        run_id="growing",
    ) as growing:  # fmt: skip
        load = np.full((1, EXPERTS), 7)
        for _ in range(5):
            growing.record(None, load, np.array([range(EXPERTS)]))
        assert growing.flush()
        save = tmp_path / "out"
        first = {row["run_id"]: row for row in run(tmp_path / "dumps", "--save", save)["runs"]}
        times = {path: path.stat().st_mtime_ns for path in (save / "kept").iterdir()}
        for _ in range(5):
            growing.record(None, load, np.array([range(EXPERTS)]))
        assert growing.flush()
        # To prove that it is not read: its loads are gone, and their sizes stay.
        for path in (tmp_path / "dumps/run=done").rglob("loads-*.parquet"):
            path.write_bytes(bytes(path.stat().st_size))
        second = {row["run_id"]: row for row in run(tmp_path / "dumps", "--save", save)["runs"]}
    assert (first["growing"]["steps"], second["growing"]["steps"]) == (5, 10)
    assert second["done"] == first["done"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_interrupted_batch_goes_on(tmp_path: Path) -> None:
    """Killed half-way, and again: what was finished stays, and the rows are those of one go."""
    first = tmp_path / "dumps/d0"
    record(first, "r0", SKEWED, steps=3000)
    for i in range(1, 12):
        shutil.copytree(first, tmp_path / f"dumps/d{i}")
    save = tmp_path / "out"
    program = [Path(sys.executable).with_name("eplb-analyze"), "postmortem", tmp_path / "dumps"]
    killed = subprocess.Popen([*program, "--save", save], stdout=subprocess.DEVNULL)
    for _ in _until(30):
        if len(list(save.glob("kept/*.json"))) >= 3:
            break
    killed.kill()
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in save.glob("kept/*.json")}
    assert 3 <= len(kept) < 12
    rows = run(tmp_path / "dumps", "--save", save)["runs"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(rows) == 12
    key = ("dump", "run_id")
    alone = run(tmp_path / "dumps")["runs"]
    assert sorted(rows, key=lambda r: [r[k] for k in key]) == sorted(alone, key=lambda r: [r[k] for k in key])


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    raise AssertionError("it took too long")


def test_places(tmp_path: Path) -> None:
    record(tmp_path / "x/one", "r", EVEN)
    record(tmp_path / "x/two", "r", EVEN)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert len(run(tmp_path / "x/*")["runs"]) == 2
    assert len(run(tmp_path / "x/one/run=r")["runs"]) == 1
    # A symbolic link found on the way is not followed; one that is named is.
    assert len(run(tmp_path)["runs"]) == 2
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path / "n*", "no folder has this name")):
        out = cli("postmortem", place)
        assert out.returncode == 3
        assert words in out.stdout.replace("\n", " ")


def test_runs_of_one_id_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name, routing in (("night-1", EVEN), ("night-2", SKEWED)):
        record(tmp_path / "all" / name, "monday", routing)
    record(tmp_path / "all" / "other", "tuesday", EVEN)
    shutil.copytree(tmp_path / "all/night-1", tmp_path / "all/night-3")
    (session,) = (tmp_path / "all/night-3").glob("run=*/model=*/rank=*/session=*/session.json")
    session.unlink()
    lines = cli("postmortem", tmp_path / "all").stdout.splitlines()
    names = [line.split()[0] for line in lines if line.endswith("complete")]
    assert names[0] == "night-2"
    assert sorted(names) == ["night-1", "night-2", "tuesday"]
    assert any(line.startswith("broken run night-3:") for line in lines)


def test_nothing_steers_the_terminal(tmp_path: Path) -> None:
    record(tmp_path, "r", EVEN, model="evil\x1b[2J[red]", engine="\x1b]0;x\x07")
    out = cli("postmortem", tmp_path, "--by", "model", env={"COLUMNS": "140"})
    assert out.returncode == 0
    assert "\x1b" not in out.stdout + out.stderr
    assert "\\x1b[2J[red]" in out.stdout


@pytest.mark.parametrize("output", ["text", "json"])
def test_golden(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(writer.time, "time_ns", lambda: 1_790_000_000_000_000_000)
    monkeypatch.setattr(writer.time, "monotonic_ns", lambda: 50_000_000 * next(ticks))
    for i, routing in enumerate((SKEWED, EVEN)):
        record(tmp_path, f"run-{i}", routing, seed=i, engine="vllm")
    monkeypatch.chdir(tmp_path)
    out = cli("postmortem", ".", "gone", "--by", "model", "--baseline", "run-1", "--output", output)
    assert out.returncode == 1
    assert_golden(f"postmortem.{'txt' if output == 'text' else 'json'}", out.stdout)
