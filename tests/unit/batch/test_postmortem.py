"""`postmortem`: a batch of runs, some broken, some growing, one long, by every executor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from batches import EP_SIZE, EVEN, EXPERTS, SKEWED, record
from helpers import assert_golden, cli, one_error

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.batch.cache import ResultCache
from eplb_analyze.batch.comparison import Postmortem, judge
from eplb_analyze.batch.executors import Local, Processes, WorkerDied
from eplb_analyze.batch.postmortem import rows_of
from eplb_analyze.batch.rows import Row
from eplb_analyze.batch.targets import find
from eplb_analyze.metrics.bootstrap import Ratio, difference
from eplb_analyze.reader.run import PART_STEPS
from eplb_analyze.storage import path as places
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


@pytest.mark.long  # on a busy machine Ray's server for clients may not come up in time
def test_it_joins_a_cluster(batch: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("ray")
    root, _ = batch
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    ray = Path(sys.executable).with_name("ray")
    head = [
        "start", "--head", "--block", "--port", str(ports[0]), "--ray-client-server-port", str(ports[1]),
        "--num-cpus", "2", "--include-dashboard=false", "--min-worker-port", "0", "--max-worker-port", "0",
    ]  # fmt: skip
    cluster = subprocess.Popen(
        [ray, *head], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in _until(60):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[1]), 1):
                break
        address = f"ray://127.0.0.1:{ports[1]}"
        program = [Path(sys.executable).with_name("eplb-analyze"), "postmortem", "--output", "json"]
        more = [root / "a", "--executor", "ray", "--ray-address", address]
        out = subprocess.run(
            [*program, *more], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)  # an orderly end takes half a minute
        cluster.wait(30)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["runs"] == run(root / "a")["runs"]


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
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as our program has it
    executor = Processes(2)
    try:
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
        found = list(executor.map(_die_over, range(12)))
    finally:
        executor.close()
        assert signal.signal(signal.SIGPIPE, before) == signal.SIG_DFL
    assert [item for item, _ in found] == list(range(12))
    assert isinstance(found[2][1], WorkerDied)
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
    one_error(cli("postmortem", root, "--baseline", "nobody"), 2, "no run is called so", "bad, good")


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
        # To prove that it is not read: its loads are gone, and their sizes and times stay.
        for path in (tmp_path / "dumps/run=done").rglob("loads-*.parquet"):
            was = path.stat()
            path.write_bytes(bytes(was.st_size))
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
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


def test_what_is_mended_is_read_again(tmp_path: Path) -> None:
    """What was wrong once, with the run or with reading it, is not believed for ever."""
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
    (row,) = run(tmp_path / "dump", *more)["runs"]
    assert row["status"] == "complete"
    # And the other way round, of the same size.
    file.write_bytes(bytes(len(whole)))
    assert cli("postmortem", tmp_path / "dump", *more).returncode == 3


def test_a_lost_worker_says_nothing_of_the_run(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)

    class Dead(Local):
        def map(self, work: Any, items: Any) -> Any:
            return ((item, WorkerDied("its worker died")) for item in items)

    targets = list(find([str(tmp_path / "dump")]))
    ((row, anew),) = rows_of(targets, Dead(), ResultCache(tmp_path / "out"))
    assert (row.status, row.reason, anew) == ("broken", "its worker died", True)
    ((row, anew),) = rows_of(targets, None, ResultCache(tmp_path / "out"))
    assert (row.status, anew) == ("complete", True)
    ((row, anew),) = rows_of(targets, None, ResultCache(tmp_path / "out"))
    assert (row.status, anew) == ("complete", False)


def _edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"org/moe"', '"org/mad"'))


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [_edited, _nested, _fifo, lambda path: path.write_bytes(b"")])
def test_a_kept_row_that_is_not_as_it_was_written_is_not_believed(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    more = ("--save", tmp_path / "out")
    first = run(tmp_path / "dump", *more)["runs"]
    (kept,) = (tmp_path / "out/kept").iterdir()
    spoil(kept)
    assert run(tmp_path / "dump", *more)["runs"] == first


def test_a_report_that_was_taken_away_is_written_again(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    more = ("--save", tmp_path / "out")
    run(tmp_path / "dump", *more)
    (report,) = (tmp_path / "out/reports").iterdir()
    report.unlink()
    run(tmp_path / "dump", *more)
    assert report.exists()


def test_where_to_save(tmp_path: Path) -> None:
    record(tmp_path / "dump", "r", SKEWED)
    for inside in ("dump", "dump/saved", "dump/run=r", "dump/run=r/model=org_moe/deep"):
        one_error(cli("postmortem", tmp_path, "--save", tmp_path / inside), 2, "lies in the dump")
    assert [path.name for path in (tmp_path / "dump").iterdir()] == ["run=r"]
    (tmp_path / "file").write_text("")
    one_error(cli("postmortem", tmp_path, "--save", tmp_path / "file"), 2, "file", "another folder")
    out = cli("postmortem", tmp_path, "--save", tmp_path / "saved")
    assert out.stdout.endswith(f"saved: {tmp_path / 'saved'}: runs.parquet, reports/\n")


def test_strange_names_are_saved(tmp_path: Path) -> None:
    """A folder that is not UTF-8, half a character in a name, and an id as long as names can be."""
    record(tmp_path / "plain/dump", "r", SKEWED, engine="m\ud800")
    (tmp_path / "plain").rename(tmp_path / os.fsdecode(b"d\xff"))
    record(tmp_path / "long", "x" * 128, SKEWED, model="y" * 150)
    out = cli("postmortem", tmp_path, "--save", tmp_path / "out", "--output", "json")
    assert out.returncode == 0, out.stderr
    rows = {row["run_id"][0]: row for row in json.loads(out.stdout)["runs"]}
    assert rows["x"]["status"] == "complete"
    # Arrow cannot always name such a folder's files; then the row says so.
    assert rows["r"]["status"] == "complete" or "surrogates" in rows["r"]["reason"]
    assert len(pl.read_parquet(tmp_path / "out/runs.parquet")) == 2
    assert (tmp_path / "out/kept").is_dir()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--html"], "--save"),
        (["--workers", "2"], "processes or ray"),
        (["--ray-address", "ray://x:1"], "--executor ray"),
        (["--executor", "many"], "local, processes, ray"),
    ],
)
def test_options_that_say_nothing_alone(tmp_path: Path, options: list[str], words: str) -> None:
    record(tmp_path, "r", EVEN)
    one_error(cli("postmortem", tmp_path, *options), 2, words)


def test_a_run_counts_once(tmp_path: Path) -> None:
    record(tmp_path / "x/one", "r", EVEN)
    record(tmp_path / "x/two", "s", EVEN)
    out = cli(
        "postmortem",
        tmp_path,
        tmp_path / "x",
        f"{tmp_path}/x/one/",
        tmp_path / "x/*",
        tmp_path / "x/two/run=s",
    )
    assert out.stdout.startswith("2 runs · 2 complete\n")


def test_nothing_is_left_out_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "/".join("abcdefghijkl") / "dump", "deep", EVEN)
    record(tmp_path / "sub", "hidden", EVEN)
    record(tmp_path / "dump", "good", EVEN)
    (tmp_path / "dump/run=empty").mkdir()
    (tmp_path / "dump/run=no-rank/model=m").mkdir(parents=True)
    # Somebody else's folder, which only looks like a run of ours.
    record(tmp_path / "dump/run=exp7/inner", "inside", EVEN)
    entries = places.entries

    def refuse(folder: Any, only: str | None = None) -> Any:
        if str(folder).startswith(str(tmp_path / "sub")) or "run=no-rank" in str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return entries(folder, only)

    monkeypatch.setattr(places, "entries", refuse)
    found = list(find([str(tmp_path)]))
    runs = {item.run_id for item in found if not isinstance(item, Row)}
    assert runs == {"deep", "good", "inside"}
    reasons = {item.run_id: str(item.reason) for item in found if isinstance(item, Row)}
    assert set(reasons) == {"", "empty", "no-rank"}
    assert "Permission denied" in reasons[""]
    assert "Permission denied" in reasons["no-rank"]
    assert "no run in it" in reasons["empty"]


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    record(tmp_path / "a[1]", "this", EVEN)
    record(tmp_path / "a1", "other", EVEN)
    assert [row["run_id"] for row in run(tmp_path / "a[1]")["runs"]] == ["this"]


def test_what_cannot_be_compared_does_not_pass(tmp_path: Path) -> None:
    record(tmp_path / "a", "base", EVEN)
    record(tmp_path / "a", "short", EVEN, steps=5)
    record(tmp_path / "a", "else", EVEN, model="another")
    record(tmp_path / "b", "base", EVEN)
    out = cli("postmortem", tmp_path, "--baseline", tmp_path / "a/run=base")
    assert out.returncode == 1
    last = " ".join(out.stdout.split("no worse than")[1].split())
    assert "2 cannot be judged" in last
    assert "short (fewer than 8 steps with tokens" in last
    assert "else (another model)" in last
    assert "did not pass" not in last
    one_error(cli("postmortem", tmp_path, "--baseline", "base"), 2, "several", str(tmp_path / "b/run=base"))


def test_a_sampled_run_lost_what_the_whole_one_lost(tmp_path: Path) -> None:
    for interval in (1, 10):
        record(tmp_path, f"every-{interval}", SKEWED, steps=600, interval=interval)
    one, ten = (row["lost_rank_seconds"] / row["step_seconds"] for row in rows_by_id(tmp_path))
    assert ten == pytest.approx(one, rel=0.05)


def rows_by_id(root: Path) -> list[dict[str, Any]]:
    return sorted(run(root)["runs"], key=lambda row: str(row["run_id"]))


def test_segments_are_not_in_the_figures(tmp_path: Path) -> None:
    """Where segments end is chance; no figure says where."""
    for name, size in (("a", 4096), ("b", 1), ("c", 37)):
        record(tmp_path, name, SKEWED, steps=300, segment_steps=size)
    rows = rows_by_id(tmp_path)
    for name in ("persistent_share", "balancedness", "idle_fraction"):
        assert [row[name] for row in rows] == pytest.approx([rows[0][name]] * 3, rel=1e-12)
    assert all(row["step_seconds"] for row in rows)
    lengths = [json.loads(cli("summary", tmp_path, "--run", n, "-o", "json").stdout) for n in "abc"]
    assert [summary["loss"]["window_steps"] for summary in lengths] == [128] * 3


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
    for place, words in ((tmp_path / "none", "no such folder"), (tmp_path / "n*", "no folder matches")):
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
    assert any(line.startswith("broken run night-3 of ") for line in lines)


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


def test_of_an_import_without_times_no_time_is_lost(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).integers(1, 99, (2, 8)))
    done = cli(
        "import",
        tmp_path / "loads.npy",
        "--model",
        "m",
        "--into",
        tmp_path / "dump",
        "--ep-size",
        "2",
        "--placement",
        "linear",
    )
    assert done.returncode == 0, done.stderr
    document = run(tmp_path / "dump")["runs"][0]
    assert document["idle_fraction"] > 0
    assert document["lost_rank_seconds"] is document["step_seconds"] is None
    told = cli("postmortem", tmp_path / "dump").stdout
    assert "how much time was lost is not known" in told


def test_what_cannot_be_judged_is_not_counted_as_no_help(tmp_path: Path) -> None:
    """Of two rearrangements one is a change of the EP size."""
    slots = [np.array([[0, 1, 2, 3]]), np.array([[1, 2, 3, 0]]), np.array([[3, 2, 1, 0]])]
    with ExpertLoadWriter(
        tmp_path, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global"
    ) as writer:
        for step in range(60):
            load = np.random.default_rng(step).multinomial(400, [0.4, 0.3, 0.2, 0.1])[None]
            writer.record(step, load, slots[(step >= 20) + (step >= 40)], ep_size=2 if step < 40 else 4)
    document = run(tmp_path)["runs"][0]
    assert (document["rearrangements"], document["judged"]) == (2, 1)
    row = next(line for line in cli("postmortem", tmp_path).stdout.splitlines() if line.startswith("r "))
    assert f"{document['helped']} of 1" in row


def test_the_saved_report_is_what_summary_says_of_a_damaged_run(tmp_path: Path) -> None:
    """Also where the damage moves the run's bounds: the steps of its last segment cannot be read."""
    for steps in (900, PART_STEPS + 3000):
        dump, saved = tmp_path / f"dump-{steps}", tmp_path / f"saved-{steps}"
        record(dump, "r", SKEWED, steps=steps, segment_steps=300 if steps < 1000 else 2048)
        sorted(dump.rglob("steps-*.parquet"))[-1].unlink()
        assert cli("postmortem", dump, "--save", saved).returncode == 0
        [report] = (saved / "reports").glob("*.json")
        assert json.loads(report.read_text()) == json.loads(cli("summary", dump, "-o", "json").stdout)


def test_a_long_run_that_goes_on_has_a_row_of_one_moment(tmp_path: Path) -> None:
    """Between the reading of its parts and its row it is rearranged, and gets another EP size."""
    slots, dump = np.arange(8) % 4, tmp_path / "dump"
    with ExpertLoadWriter(
        dump, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global"
    ) as writer:

        def go_on(steps: int, ep_size: int, slots: Any) -> None:
            for step in range(steps):
                writer.record(None, np.arange(1, 9)[None], slots[None], ep_size=ep_size)
                assert step % 200 < 199 or writer.flush(60)
            assert writer.flush(60)

        class Slow(Local):
            def map(self, function: Any, items: Any) -> Iterator[Any]:
                for item in items:
                    if item.merged is not None:
                        go_on(3000, 2, slots[::-1])
                        go_on(10, 4, slots)
                    yield item, function(item)

        go_on(PART_STEPS + 500, 2, slots)
        before = summarize(open_run(dump)).to_json()
        kept = ResultCache(tmp_path / "saved")
        [(row, _)] = rows_of(find([str(dump)]), Slow(), kept)
    assert (row.ep_size, row.rearrangements, row.steps) == (2, 0, PART_STEPS + 500)
    told = json.loads(kept.report_path(row, "json").read_text())
    assert told == json.loads(json.dumps(before))


def test_a_session_that_has_just_begun_is_no_damage(tmp_path: Path) -> None:
    """The writer makes its folder, then session.json beside, then gives that its name."""
    record(tmp_path, "r", EVEN)
    for begun in ("run=r/model=m/rank=00007/session=new", "run=s/model=m/rank=00000/session=new"):
        (tmp_path / begun).mkdir(parents=True)
        (tmp_path / begun / "session.json.tmp").write_text('{"form')
    for command in (["summary"], ["check"], ["postmortem"]):
        result = cli(*command, tmp_path)
        assert (result.returncode, result.stderr) == (0, ""), command
    # What holds a recording is one.
    (tmp_path / "run=r/model=m/rank=00007/session=new/journal-000000.frames").write_bytes(b"x")
    assert "session.json" in cli("check", tmp_path).stdout


def test_what_links_lead_to_counts_once_and_nothing_is_saved_through_one(tmp_path: Path) -> None:
    record(tmp_path / "all/a", "r", EVEN)
    (tmp_path / "all/b").symlink_to(tmp_path / "all/a")
    assert len(run(tmp_path / "all/a", tmp_path / "all/b")["runs"]) == 1
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "reports").symlink_to(tmp_path / "all/a")
    one_error(cli("postmortem", tmp_path / "all/a", "--save", saved), 2, "lies in the dump")
