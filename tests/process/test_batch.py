"""`postmortem` in several processes: executors, dead workers, killed batches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batches import SKEWED, Batch, postmortem, record, record_batch

from eplb_analyze.batch.executors import Processes, WorkerDied


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return record_batch(tmp_path_factory.mktemp("batch"))


def rows_by(executor: str, root: Path) -> Any:
    """The rows that the program prints: it keeps linear algebra to one thread, and this process does not."""
    workers = () if executor == "local" else ("--workers", "2")
    command = [sys.executable, "-m", "eplb_analyze", "postmortem", root, "--json", "--executor", executor]
    out = subprocess.run([*command, *workers], capture_output=True, text=True, check=True, timeout=300)
    return json.loads(out.stdout)["runs"]


@pytest.fixture(scope="module")
def local_rows(batch: Batch) -> Any:
    return rows_by("local", batch.root)


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_every_executor_gives_the_same_rows(batch: Batch, local_rows: Any, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    # To the last bit, because the parts and the order of merging are the same.
    assert rows_by(executor, batch.root) == local_rows


@pytest.mark.long  # on a busy machine Ray's server for clients may not come up in time
def test_ray_joins_a_running_cluster(batch: Batch) -> None:
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
        program = [sys.executable, "-m", "eplb_analyze", "postmortem", "--json"]
        more = [root / "a", "--executor", "ray", "--ray-address", address]
        out = subprocess.run(
            [*program, *more], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        os.killpg(cluster.pid, signal.SIGKILL)  # a clean shutdown takes half a minute
        cluster.wait(30)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["runs"] == postmortem(root / "a")["runs"]


def _die_over(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_dead_worker_costs_only_its_item() -> None:
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as our program sets it
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


def test_workers_write_html_reports(batch: Batch, tmp_path: Path) -> None:
    more = ("--save", tmp_path / "out", "--html", "--executor", "processes", "--workers", "2")
    postmortem(batch.root / "a", *more)
    pages = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/reports").glob("*.html")}
    assert sorted(path.name.split("-")[0] for path in pages) == ["bad", "good"]
    assert all(b"<html" in path.read_bytes()[:200] for path in pages)
    postmortem(batch.root / "a", *more)
    assert {path: path.stat().st_mtime_ns for path in pages} == pages


#: The command line, in a process that kills itself after it has stored three results.
KILLED = """
import itertools, os, signal
from eplb_analyze.__main__ import main
from eplb_analyze.batch.cache import ResultCache

store, count = ResultCache.store, itertools.count(1)

def store_or_die(self, *result):
    store(self, *result)
    if next(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

ResultCache.store = store_or_die
main()
"""


def test_killed_batch_resumes(tmp_path: Path) -> None:
    """What was finished is kept, and the rows are those of an uninterrupted batch."""
    for number in range(6):
        record(tmp_path / f"dumps/d{number}", "r", SKEWED, seed=number)
    save = tmp_path / "out"
    arguments: list[str | Path] = ["postmortem", tmp_path / "dumps", "--save", save]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in save.glob("kept/*.json")}
    assert len(kept) == 3
    rows = postmortem(tmp_path / "dumps", "--save", save)["runs"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(rows) == 6
    assert rows == postmortem(tmp_path / "dumps")["runs"]


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    raise AssertionError("it took too long")
