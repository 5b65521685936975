"""`runs`: one line per run, compared with what the tests recorded."""

from __future__ import annotations

import json
import math
import shutil
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import EVEN, record
from helpers import cli, load_of, map_of, one_error, open_writer, read_table, write

from eplb_analyze.batch import runs
from eplb_analyze.batch.runs import list_runs
from eplb_analyze.reader.run import open_run
from eplb_dump.format import files, segment


def listed(root: Path) -> list[dict[str, Any]]:
    result = cli("runs", "--json", root)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert list(document) == ["schema_version", "runs"]
    return list(document["runs"])


def iso(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, timezone.utc).isoformat()


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_line_states_what_was_recorded(tmp_path: Path) -> None:
    write(tmp_path, run_id="b", engine="vllm", engine_version="0.33.0", steps=40)
    write(tmp_path, run_id="a", ranks=1, steps=7)
    first, second = listed(tmp_path)
    (folder,) = tmp_path.glob("run=b/model=*/rank=00000/session=*")
    times = read_table(folder, "steps")["time"].cast("int64").to_numpy()
    assert first == {
        "run_id": "b",
        "model": "org/moe",
        "engine": "vllm",
        "engine_version": "0.33.0",
        "imported_from": None,
        "start": iso(times[0]),
        "end": iso(times[-1]),
        "duration_seconds": pytest.approx((times[-1] - times[0]) / 1e9),
        "ranks_present": 2,
        "ranks_expected": 2,
        "scope": "local",
        "ep_size": 2,
        "first_step": 0,
        "last_step": 39,
        "steps": 40,
        "retired_steps": 0,
        "tiers": ["full"],
        "state": "closed",
        "size_bytes": size(tmp_path / "run=b"),
        "fault": None,
    }
    assert (second["run_id"], second["engine"], second["steps"]) == ("a", None, 7)
    assert (second["ranks_present"], second["ranks_expected"]) == (1, 2)


def test_one_writer_of_sums_is_all_that_is_expected(tmp_path: Path) -> None:
    record(tmp_path, "r", EVEN, steps=5)
    (line,) = listed(tmp_path)
    assert (line["ranks_present"], line["ranks_expected"]) == (1, 1)
    assert (line["scope"], line["ep_size"]) == ("global", 4)
    printed = cli("runs", tmp_path).stdout
    assert "  sum of 4  " in printed
    assert "sum of N: one rank recorded the sum over N EP ranks" in printed
    assert "1/1" not in printed


def test_newest_run_is_last_and_the_default(tmp_path: Path) -> None:
    for run_id in ("c", "a", "b"):
        record(tmp_path, run_id, EVEN, steps=3)
    assert [line["run_id"] for line in listed(tmp_path)] == ["c", "a", "b"]
    assert open_run(tmp_path).info.run_id == "b"


def test_open_journals_count_and_a_silent_writer_is_not_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sealed segments and one open one; each batch of the open one is a frame of its own."""
    monkeypatch.setattr(runs, "OPEN_SECONDS", math.inf)
    with open_writer(tmp_path, ep_rank=0, segment_steps=8) as writer:
        for step in range(3, 23):
            writer.record(step, load_of(step), map_of())
            assert writer.flush(60)
        (line,) = listed(tmp_path)
        assert (line["first_step"], line["last_step"], line["steps"]) == (3, 22, 20)
        assert line["state"] == "open"
        assert line["start"] < line["end"]
        monkeypatch.setattr(runs, "OPEN_SECONDS", -math.inf)
        assert list_runs(tmp_path).runs[0].state == "not closed"
        assert "not closed" in cli("runs", tmp_path).stdout
    assert list_runs(tmp_path).runs[0].state == "closed"


def test_segment_whose_files_have_no_names_yet_has_its_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer lists a segment before it renames its files and removes the journal."""
    listed_alone = threading.Event()
    go_on = threading.Event()

    def publish(*paths: Path) -> None:
        listed_alone.set()
        assert go_on.wait(60)
        files.publish(*paths)

    monkeypatch.setattr(segment, "publish", publish)
    with open_writer(tmp_path, ep_rank=0, segment_steps=8) as writer:
        for step in range(9):  # the ninth begins a segment
            writer.record(step, load_of(step), map_of())
        assert writer.flush(60)
        assert listed_alone.wait(60)
        (line,) = listed(tmp_path)
        go_on.set()
    assert (line["first_step"], line["last_step"], line["steps"]) == (0, 8, 9)
    assert line["start"] < line["end"]


def test_each_model_and_each_engine_start_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("org/moe", "org/drafter"):
        record(tmp_path, "r", EVEN, steps=3, model=model)
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        record(tmp_path, "again", EVEN, steps=4, local=True)
    lines = listed(tmp_path)
    assert [(line["run_id"], line["model"]) for line in lines] == [
        ("r", "org/drafter"),
        ("r", "org/moe"),
        ("again@1", "org/moe"),
        ("again@2", "org/moe"),
    ]
    assert cli("runs", tmp_path).stdout.startswith("3 runs, newest last")
    assert [line["steps"] for line in lines] == [3, 3, 4, 4]


def test_restarted_rank_has_its_steps_once(tmp_path: Path) -> None:
    """Rank 0 takes steps 0-9, is killed, and comes back with 5-14."""
    for first in (0, 5):
        with open_writer(tmp_path, ep_rank=0) as writer:
            for step in range(first, first + 10):
                writer.record(step, load_of(step), map_of())
    (line,) = [line for line in listed(tmp_path) if line["run_id"].startswith("r")][-1:]
    assert line["steps"] <= line["last_step"] - line["first_step"] + 1


def test_imported_run_without_times_has_none(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.arange(80, dtype=np.int64).reshape(10, 2, 4))
    arguments = ["--format", "array", "--model", "m", "--ep-size", "2", "--placement", "linear"]
    result = cli("import", *arguments, tmp_path / "loads.npy", tmp_path / "dump")
    assert result.returncode == 0
    (line,) = listed(tmp_path / "dump")
    assert (line["start"], line["end"], line["duration_seconds"]) == (None, None, None)
    assert (line["steps"], line["imported_from"] is None) == (10, False)
    assert " – " in cli("runs", tmp_path / "dump").stdout


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("manifest.frames", "zero"),
        ("steps-000000.parquet", "remove"),
        ("loads-000001.parquet", "cut"),
        ("steps-000000.parquet", "zero"),
    ],
)
def test_damaged_run_has_a_line_that_says_so(tmp_path: Path, file: str, damage: str) -> None:
    for run_id in ("good", "bad"):
        write(tmp_path, run_id=run_id)
    path = next((tmp_path / "run=bad").glob(f"model=*/rank=00000/session=*/{file}"))
    if damage == "remove":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if damage == "cut" else b"\0" * len(data))
    good, bad = listed(tmp_path)
    assert (good["fault"], bad["run_id"]) == (None, "bad")
    assert bad["fault"].startswith(str(path if path.suffix == ".parquet" else path.parent))
    text = cli("runs", tmp_path).stdout
    assert "damaged run bad: " in " ".join(text.split())
    closed, damaged = text.splitlines()[3:5]
    assert (" closed " in closed, " damaged " in damaged) == (True, True)


def test_lost_session_metadata_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, run_id="good")
    (tmp_path / "run=odd/model=m/rank=00000/session=s").mkdir(parents=True)
    (tmp_path / "run=odd/model=m/rank=00000/session=s/session.json").write_text("no JSON")
    odd, good = listed(tmp_path)
    assert (odd["run_id"], odd["model"], odd["ranks_expected"]) == ("odd", "m", None)
    assert "session.json" in odd["fault"]
    assert good["fault"] is None
    shutil.rmtree(tmp_path / "run=good")
    assert cli("runs", tmp_path).returncode == 3


def test_loads_are_not_read(tmp_path: Path) -> None:
    """Wrong bytes in the loads are for `check` to find: `runs` reads headers and times."""
    write(tmp_path)
    for path in tmp_path.rglob("loads-*.parquet"):
        path.write_bytes(b"\0" * path.stat().st_size)
    (line,) = listed(tmp_path)
    assert (line["steps"], line["fault"]) == (40, None)


def test_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    one_error(cli("runs", tmp_path), 3, "no run in it")
    one_error(cli("runs", tmp_path / "none"), 3, "no such folder")
    (tmp_path / "run=new/model=m/rank=00000/session=s").mkdir(parents=True)
    one_error(cli("runs", tmp_path), 3, "no run in it")
    record(tmp_path, "r", EVEN, steps=3)
    assert [line["run_id"] for line in listed(tmp_path)] == ["r"]
    assert [line["run_id"] for line in listed(tmp_path / "run=r")] == ["r"]


@pytest.mark.parametrize("columns", [80, 160])
def test_lines_fit_and_name_what_is_left_out(tmp_path: Path, columns: int) -> None:
    write(tmp_path, run_id="deploy-monday", engine="vllm", engine_version="0.33.0")
    write(tmp_path, run_id="deploy-tuesday", engine="sglang", model="org/a-long-name-of-a-model")
    lines = cli("runs", tmp_path, env={"COLUMNS": str(columns)}).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert ("deploy-monday" in lines[3], "deploy-tuesday" in lines[4]) == (True, True)
    hidden = [line for line in lines if "hidden at this width" in line]
    assert bool(hidden) == (columns == 80)
    assert ("0.33.0" in lines[3]) == (columns == 160)
