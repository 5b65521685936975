"""`postmortem` of 300 runs, some broken, some growing, and three long ones, by every executor."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import EP_SIZE, EVEN, EXPERTS, LAYERS, SKEWED, lose_metadata, record

from eplb_analyze import open_run
from eplb_analyze.reader.run import PART_STEPS
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.session import dump_json, load_json

RUNS, BROKEN, TORN, GROWING = 300, 20, 20, 20
LONG, LONG_STEPS = 3, 3 * PART_STEPS
SLOTS = np.array([range(EXPERTS)] * LAYERS)


@dataclass
class Hundreds:
    root: Path
    #: Tokens ``[steps, layers, ranks]`` of the undamaged runs, open ones included, by run id.
    truth: dict[str, Any] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def rows(self, *more: str | Path) -> list[dict[str, Any]]:
        """The row of each run, in the order of ids."""
        out = subprocess.run([*program(self.root), *more], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        return sorted(json.loads(out.stdout)["runs"], key=lambda row: str(row["run_id"] + row["dump"]))


def program(root: Path) -> list[str | Path]:
    return [sys.executable, "-m", "eplb_analyze", "postmortem", root, "--json"]


def _cut(dump: Path) -> None:
    (file,) = dump.rglob("loads-*.parquet")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _invalid_session(dump: Path) -> None:
    lose_metadata(dump, '{"format": ')


def _no_session(dump: Path) -> None:
    lose_metadata(dump, None)


def _another_format(dump: Path) -> None:
    path = next(dump.rglob("session.json"))
    path.write_bytes(dump_json({**load_json(path.read_bytes()), "format_version": "99.0"}))


BREAKS: list[Callable[[Path], None]] = [_cut, _invalid_session, _no_session, _another_format]


def _tear(dump: Path) -> None:
    """Damage one of several segments."""
    damaged = sorted(dump.rglob("loads-*.parquet"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-40])


@pytest.fixture(scope="module")
def hundreds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hundreds]:
    root = tmp_path_factory.mktemp("hundreds")
    made = Hundreds(root)
    for i in range(RUNS - GROWING):
        run_id, dump = f"run-{i:03d}", root / f"cluster-{i % 3}/day-{i % 7}/job-{i:03d}"
        options: dict[str, Any] = {"engine": ("vllm", "sglang")[i % 2], "local": i % 5 == 0}
        if i < BROKEN:
            record(dump, run_id, EVEN, steps=20, seed=i)
            BREAKS[i % len(BREAKS)](dump)
            made.broken.add(str(dump))
        elif i < BROKEN + TORN:
            record(dump, run_id, SKEWED, steps=60, seed=i, segment_steps=16)
            _tear(dump)
            made.torn.add(run_id)
        else:
            routing = list(np.random.default_rng(i).dirichlet([3.0] * EXPERTS))
            made.truth[run_id] = record(dump, run_id, routing, steps=20 + i % 50, seed=i, **options)
    with contextlib.ExitStack() as stack:
        for i in range(GROWING):
            # Still open, but flushed, so that every executor sees the same steps.
            run_id, rng = f"open-{i:02d}", np.random.default_rng(i)
            writer = stack.enter_context(
                ExpertLoadWriter(
                    root / f"live/{i}", run_id=run_id, scope="global", model="org/moe", ep_size=EP_SIZE,
                    num_logical_experts=EXPERTS, segment_steps=16,
                )
            )  # fmt: skip
            loads = rng.multinomial(400, SKEWED, size=(10 + 3 * i, LAYERS))
            for step, load in enumerate(loads):
                assert writer.record(step, load, SLOTS) > 0
            assert writer.flush(60)
            made.truth[run_id] = loads.reshape(len(loads), LAYERS, EP_SIZE, -1).sum(axis=3)
        first = root / "long/0"
        made.truth["long"] = record(first, "long", SKEWED, steps=LONG_STEPS)
        for i in range(1, LONG):
            shutil.copytree(first, root / f"long/{i}")
        yield made


@pytest.fixture(scope="module")
def rows(hundreds: Hundreds) -> list[dict[str, Any]]:
    return hundreds.rows()


def test_every_run_has_its_row(hundreds: Hundreds, rows: list[dict[str, Any]]) -> None:
    assert len(rows) == RUNS + LONG
    status = Counter(row["status"] for row in rows)
    assert status == {"complete": RUNS + LONG - BROKEN - TORN, "incomplete": TORN, "broken": BROKEN}
    assert {row["dump"] for row in rows if row["status"] == "broken"} == hundreds.broken
    assert {row["run_id"] for row in rows if row["status"] == "incomplete"} == hundreds.torn
    assert all(row["reason"] for row in rows if row["status"] != "complete")
    for row in rows:
        if row["status"] != "complete":
            continue
        T = hundreds.truth[row["run_id"]].astype(float)
        assert row["steps"] == len(T)
        assert row["balancedness"] == pytest.approx((T.mean(axis=2) / T.max(axis=2)).mean(), abs=1e-12)
        idle = 1 - T.mean(axis=2).sum() / T.max(axis=2).sum()
        assert row["idle_fraction"] == pytest.approx(idle, abs=1e-12)
        assert ("not_closed" in row["faults"]) == row["run_id"].startswith("open-")


def test_long_run_has_several_parts(hundreds: Hundreds) -> None:
    assert len(open_run(hundreds.root / "long/0").parts()) >= 2


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_every_executor_gives_the_same_rows(
    hundreds: Hundreds, rows: list[dict[str, Any]], executor: str
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    assert hundreds.rows("--executor", executor, "--workers", "2") == rows


@pytest.mark.parametrize("executor", ["local", "processes"])
def test_killed_batch_resumes(
    hundreds: Hundreds, rows: list[dict[str, Any]], tmp_path: Path, executor: str
) -> None:
    more = ["--save", tmp_path / "out", "--executor", executor]
    kept = tmp_path / "out/kept"

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in kept.glob("*.json")}

    killed = subprocess.Popen([*program(hundreds.root), *more], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(finished()) < RUNS // 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    before = finished()
    assert RUNS // 3 <= len(before) < RUNS
    assert hundreds.rows(*more) == rows
    assert before.items() <= finished().items()


def test_run_that_grows_while_it_is_read_is_complete(hundreds: Hundreds, rows: list[dict[str, Any]]) -> None:
    """The row of a run that is written while the batch reads it has the steps that it had."""
    live, stop = hundreds.root / "live/growing", threading.Event()

    def grow() -> None:
        load = np.full((LAYERS, EXPERTS), 7)
        with ExpertLoadWriter(
            live, run_id="zzz", scope="global", model="org/moe", ep_size=EP_SIZE, segment_steps=16,
            num_logical_experts=EXPERTS, flush_interval=0.02,
        ) as writer:  # fmt: skip
            for step in range(10**6):
                writer.record(step, load, SLOTS)
                if stop.wait(0.005):
                    break
            assert writer.close(300)  # each of its many segments is synced

    writing = threading.Thread(target=grow)
    writing.start()
    try:
        deadline = time.monotonic() + 60
        while not list(live.rglob("loads-*.parquet")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        *others, growing = hundreds.rows()
    finally:
        stop.set()
        writing.join()
        shutil.rmtree(live)
    assert others == rows
    assert growing["run_id"] == "zzz"
    assert growing["status"] == "complete"
    assert growing["steps"] >= 16
    assert growing["balancedness"] == 1.0
