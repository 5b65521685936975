"""`postmortem --save`: finished work is kept, and used as long as the run does not change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from batches import EP_SIZE, EVEN, EXPERTS, SKEWED, Batch, postmortem, record
from helpers import cli, one_error

from eplb_analyze.batch.cache import ResultCache
from eplb_analyze.batch.executors import Local, WorkerDied
from eplb_analyze.batch.postmortem import rows_of
from eplb_analyze.batch.targets import find
from eplb_analyze.reader.run import PART_STEPS
from eplb_dump import ExpertLoadWriter


def test_save_writes_a_table_and_a_report_for_each_run(batch: Batch, tmp_path: Path) -> None:
    root, _ = batch
    rows = postmortem(root, "--save", tmp_path / "out")["runs"]
    table = pl.read_parquet(tmp_path / "out/runs.parquet")
    assert table["run_id"].to_list() == [row["run_id"] for row in rows]
    assert table["balancedness"].to_list() == [row["balancedness"] for row in rows]
    reports = list((tmp_path / "out/reports").glob("*.json"))
    assert len(reports) == 5
    for report in reports:
        summary = json.loads(report.read_text())
        row = next(row for row in rows if row["run_id"] == summary["run"]["run_id"])
        assert summary["balancedness"]["mean"] == row["balancedness"]


def test_unchanged_run_is_not_read_again(tmp_path: Path) -> None:
    record(tmp_path / "dumps", "done", SKEWED)
    with ExpertLoadWriter(
        tmp_path / "dumps", model="m", num_logical_experts=EXPERTS, ep_size=EP_SIZE, scope="global",
        run_id="growing",
    ) as growing:  # fmt: skip
        load = np.full((1, EXPERTS), 7)
        for _ in range(5):
            growing.record(None, load, np.array([range(EXPERTS)]))
        assert growing.flush(60)
        save = tmp_path / "out"
        first = {row["run_id"]: row for row in postmortem(tmp_path / "dumps", "--save", save)["runs"]}
        times = {path: path.stat().st_mtime_ns for path in (save / "kept").iterdir()}
        for _ in range(5):
            growing.record(None, load, np.array([range(EXPERTS)]))
        assert growing.flush(60)
        # Zeroed loads of the same size and time would be noticed if they were read.
        for path in (tmp_path / "dumps/run=done").rglob("loads-*.parquet"):
            was = path.stat()
            path.write_bytes(bytes(was.st_size))
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        second = {row["run_id"]: row for row in postmortem(tmp_path / "dumps", "--save", save)["runs"]}
    assert (first["growing"]["steps"], second["growing"]["steps"]) == (5, 10)
    assert second["done"] == first["done"]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_repaired_run_is_read_again(tmp_path: Path) -> None:
    """A fault, whether of the run or of reading it, is not kept."""
    record(tmp_path / "dump", "r", SKEWED)
    more = ("--save", tmp_path / "out")
    (file,) = (tmp_path / "dump").rglob("loads-*.parquet")
    whole = file.read_bytes()
    was = file.stat()
    file.write_bytes(bytes(len(whole)))
    assert cli("postmortem", tmp_path / "dump", *more).returncode == 3
    assert not list((tmp_path / "out/kept").iterdir())
    file.write_bytes(whole)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    (row,) = postmortem(tmp_path / "dump", *more)["runs"]
    assert row["status"] == "complete"
    # The other way round, with the size unchanged.
    file.write_bytes(bytes(len(whole)))
    assert cli("postmortem", tmp_path / "dump", *more).returncode == 3


def test_row_of_a_dead_worker_is_not_kept(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)

    class Dead(Local):
        def map(self, work: Any, items: Any) -> Any:
            return ((item, WorkerDied("its worker process died")) for item in items)

    targets = list(find([str(tmp_path / "dump")]))
    ((row, is_new),) = rows_of(targets, Dead(), ResultCache(tmp_path / "out"))
    assert (row.status, row.reason, is_new) == ("broken", "its worker process died", True)
    ((row, is_new),) = rows_of(targets, None, ResultCache(tmp_path / "out"))
    assert (row.status, is_new) == ("complete", True)
    ((row, is_new),) = rows_of(targets, None, ResultCache(tmp_path / "out"))
    assert (row.status, is_new) == ("complete", False)


def _edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"org/moe"', '"org/mad"'))


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [_edited, _nested, _fifo, lambda path: path.write_bytes(b"")])
def test_damaged_kept_row_is_not_used(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    more = ("--save", tmp_path / "out")
    first = postmortem(tmp_path / "dump", *more)["runs"]
    (kept,) = (tmp_path / "out/kept").iterdir()
    spoil(kept)
    assert postmortem(tmp_path / "dump", *more)["runs"] == first


def test_missing_report_is_written_again(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    more = ("--save", tmp_path / "out")
    postmortem(tmp_path / "dump", *more)
    (report,) = (tmp_path / "out/reports").iterdir()
    report.unlink()
    postmortem(tmp_path / "dump", *more)
    assert report.exists()


def test_save_folder_must_be_outside_dumps(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    for inside in ("dump", "dump/saved", "dump/run=r", "dump/run=r/model=org_moe/deep"):
        one_error(cli("postmortem", tmp_path, "--save", tmp_path / inside), 2, "it is inside the dump")
    assert [path.name for path in (tmp_path / "dump").iterdir()] == ["run=r"]
    (tmp_path / "file").write_text("")
    one_error(cli("postmortem", tmp_path, "--save", tmp_path / "file"), 2, "file", "another folder")
    out = cli("postmortem", tmp_path, "--save", tmp_path / "saved")
    assert out.stdout.endswith(f"saved: {tmp_path / 'saved'}: runs.parquet, reports/\n")


def test_unusual_names_can_be_saved(tmp_path: Path) -> None:
    """A folder that is not UTF-8, a lone surrogate in a name, and the longest possible id."""
    record(tmp_path / "plain/dump", "r", SKEWED, engine="m\ud800")
    (tmp_path / "plain").rename(tmp_path / os.fsdecode(b"d\xff"))
    record(tmp_path / "long", "x" * 128, SKEWED, model="y" * 150)
    out = cli("postmortem", tmp_path, "--save", tmp_path / "out", "--json")
    assert out.returncode == 0, out.stderr
    rows = {row["run_id"][0]: row for row in json.loads(out.stdout)["runs"]}
    assert rows["x"]["status"] == "complete"
    # Arrow cannot always open files in such a folder; then the row says so.
    assert rows["r"]["status"] == "complete" or "surrogates" in rows["r"]["reason"]
    assert len(pl.read_parquet(tmp_path / "out/runs.parquet")) == 2
    assert (tmp_path / "out/kept").is_dir()


def test_saved_report_of_a_damaged_run_agrees_with_summary(tmp_path: Path) -> None:
    """Also if the damage moves the run's bounds: the steps of its last segment cannot be read."""
    for steps in (900, PART_STEPS + 3000):
        dump, saved = tmp_path / f"dump-{steps}", tmp_path / f"saved-{steps}"
        record(dump, "r", SKEWED, steps=steps, segment_steps=300 if steps < 1000 else 2048)
        sorted(dump.rglob("steps-*.parquet"))[-1].unlink()
        assert cli("postmortem", dump, "--save", saved).returncode == 0
        [report] = (saved / "reports").glob("*.json")
        assert json.loads(report.read_text()) == json.loads(cli("summary", dump, "--json").stdout)


def test_nothing_is_saved_through_a_link_into_a_dump(tmp_path: Path) -> None:
    record(tmp_path / "all/a", "r", EVEN)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "reports").symlink_to(tmp_path / "all/a")
    one_error(cli("postmortem", tmp_path / "all/a", "--save", saved), 2, "it is inside the dump")
