"""A replay whose settings are shared by real processes gives what one process gives."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from clocks import steady_clock
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.processes import process_pool
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.reader.run import Run
from eplb_analyze.replay import shared_play
from eplb_analyze.replay.replay import Replay, replay_run
from eplb_analyze.replay.settings import Choices
from eplb_dump import ExpertLoadWriter

T = TypeVar("T")
LAYERS, EXPERTS, RANKS, SLOTS, STEPS = 3, 8, 4, 12, 300


def placement(step: int) -> Any:
    return np.tile(np.roll(np.arange(SLOTS) % EXPERTS, step // 100), (LAYERS, 1)).astype(np.int32)


def record(root: Path, scope: str) -> Path:
    with steady_clock():
        for rank in range(RANKS if scope == "local" else 1):
            rng = np.random.default_rng(rank)
            with ExpertLoadWriter(
                root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, run_id="r",
                scope=scope, ranks_per_node=2, segment_steps=50,
                engine_config={"eplb_config": {"step_interval": 50, "window_size": 20}},
            ) as writer:  # fmt: skip
                for step in range(STEPS):
                    popular = np.roll(np.arange(1, SLOTS + 1), step // 70) * 9
                    writer.record(step, rng.poisson(popular, (LAYERS, SLOTS)), placement(step), num_tokens=64)
    return root


@pytest.fixture(scope="module", params=["local", "global"])
def dump(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("shared"), request.param)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_play, "MIN_WORK", 1)
    monkeypatch.setattr(shared_play, "MIN_SETTINGS", 1)


def choices(*policies: str, **options: Any) -> Choices:
    return Choices(
        policies=policies, redundant=[0, 4], intervals=[20, 50], windows=[10],
        dispatches=["measured", "even"], **options,
    )  # fmt: skip


def document(result: Replay) -> dict[str, Any]:
    return {**result.to_json(), "moves": [outcome.moves for outcome in result.outcomes]}


def test_result_does_not_depend_on_processes(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def pool(processes: int, preload: str) -> Any:
        started.append(processes)
        return process_pool(processes, preload)

    monkeypatch.setattr(shared_play, "process_pool", pool)
    results = [
        replay_run(
            open_run(dump), choices("vllm", "deepseek", "static"), processes=processes, keep_placements=True
        )
        for processes in (1, 2, 3)
    ]
    assert started == [1, 2]  # beside this one
    for other in results[1:]:
        assert document(other) == document(results[0])
        np.testing.assert_array_equal(other.scores.maximum, results[0].scores.maximum)
        assert results[0].placements is not None
        assert other.placements is not None
        for mine, theirs in zip(results[0].placements, other.placements, strict=True):
            assert [step for step, _ in mine] == [step for step, _ in theirs]
            for (_, one), (_, two) in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one, two)


def test_conditions_and_parts_are_as_in_one_process(dump: Path) -> None:
    options = choices("vllm", layers_per_step=[None, 1], delays=[3], max_moves=[None, 4])
    one, two = (document(replay_run(open_run(dump), options, processes=n)) for n in (1, 2))
    assert one == two


DYING = """
import multiprocessing, os, pathlib, signal

def policy(problem):
    if multiprocessing.parent_process() is not None:
        pathlib.Path(__file__).with_suffix(".died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return problem.current
"""


def test_settings_of_a_killed_process_are_played_here(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying_policy.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    one, two = (replay_run(open_run(dump), choices("dying_policy:policy"), processes=n) for n in (1, 2))
    assert document(one) == document(two)
    assert (tmp_path / "dying_policy.died").exists()


def test_where_no_process_can_be_started_one_plays_all(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(processes: int, preload: str) -> Any:
        raise PermissionError(13, "Permission denied")  # of /dev/shm

    expected = document(replay_run(open_run(dump), choices("static")))
    monkeypatch.setattr(shared_play, "process_pool", none)
    assert document(replay_run(open_run(dump), choices("static"), processes=2)) == expected


PARENT = """
import os, time
from eplb_analyze.processes import process_pool

def work(seconds):
    time.sleep(seconds)
    return os.getpid()

if __name__ == "__main__":
    pool = process_pool(2, "eplb_analyze.processes")
    first, second = pool.submit(work, 0), pool.submit(work, 600)
    print(first.result(), *pool._processes, flush=True)  # one is idle now
    second.result()
"""


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = {int(pid) for pid in parent.stdout.readline().split()}
        parent.kill()
    assert pids
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def test_damage_that_a_process_finds_excludes_the_segment_here(tmp_path: Path) -> None:
    root = record(tmp_path, "global")
    *_, last = sorted(root.rglob("*loads*.parquet"))
    data = bytearray(last.read_bytes())
    data[len(data) // 3] ^= 1
    last.write_bytes(data)
    run = open_run(root).with_loads()
    there = copied(run)
    asked = 0

    def analysis() -> int:
        nonlocal asked
        asked += 1
        if asked == 1:
            with pytest.raises(Exception, match=last.name) as fault:
                list_loads(there)
            raise copied(fault.value)
        return sum(len(block.recorded) for block in run.blocks())

    assert run.retry_without_damaged(analysis) == STEPS - 50
    assert [finding.code for finding in run.findings] == ["damaged_file"]
    again = copied(run)  # it knows what is left out
    assert sum(len(block.recorded) for block in again.blocks()) == STEPS - 50
    one, two = (document(replay_run(open_run(root), choices("vllm"), processes=n)) for n in (1, 2))
    assert one == two


def copied(value: T) -> T:
    copy: T = pickle.loads(pickle.dumps(value))  # noqa: S301 - our own
    return copy


def list_loads(run: Run) -> list[Any]:
    return [loads for block in run.blocks() for _, loads in block.load_parts(block.recorded)]


@pytest.mark.parametrize("fault", [TypeError, RuntimeError])
def test_policy_that_cannot_travel_is_played_here(dump: Path, fault: type[Exception]) -> None:
    class Own:
        def __getstate__(self) -> dict[str, Any]:
            raise fault("it stays here")

    run = open_run(dump)
    run.gpu = Own()  # type: ignore[assignment]
    assert len(replay_run(run, choices("static"), processes=2).outcomes) > 1


@given(st.integers(1, 12), st.integers(1, 40))
@settings(max_examples=50)
def test_every_setting_has_one_process(count: int, intervals: int) -> None:
    found = [
        Setting(policy=policy, num_redundant_experts=4, ep_size=4, interval=interval, window=10, start=0)
        for policy in ("vllm", "deepseek")
        for interval in range(1, intervals + 1)
    ]
    watched = len(found) // 2
    runs = [SimpleNamespace(on_move=print if row == watched else None) for row in range(len(found))]
    shares: Sequence[Sequence[int]] = shared_play._shares(
        SimpleNamespace(settings=found, setting_runs=runs),  # type: ignore[arg-type]
        count,
    )
    assert sorted(row for share in shares for row in share) == list(range(len(found)))
    assert watched in shares[0]
    assert all((row + intervals) % len(found) in share for share in shares for row in share)
