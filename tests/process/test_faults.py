"""Real faults in real processes: kills, exits, forks, lost folders, full disks."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import (
    assert_accounted,
    assert_equal_loads,
    assert_rows_agree,
    folder_with_pandas,
    is_unborn,
    load_of,
    manifest,
    map_of,
    open_writer,
    run_child,
    sealed_loads,
    start_child,
    step_status,
    survived_loads,
)

from eplb_dump import ExpertLoadWriter


def only_session(root: Path) -> Path:
    (folder,) = root.glob("run=*/model=*/rank=*/session=*")
    return folder


def assert_prefix(folder: Path, at_least: int) -> None:
    """Steps 0 to n are readable, exact and without a gap, and n is at least ``at_least``."""
    found = survived_loads(folder)
    assert_equal_loads(found, {step: load_of(step) for step in range(len(found))})
    assert len(found) > at_least


def assert_closed(folder: Path, steps: int) -> None:
    """All is sealed, nothing is left open, and the final accounting is there."""
    assert_equal_loads(sealed_loads(folder), {step: load_of(step) for step in range(steps)})
    assert not list(folder.glob("journal-*"))
    last = manifest(folder)[-1]
    assert last.kind == "closed"
    assert (last.header["stats"]["seen"], last.header["stats"]["recorded"]) == (steps, steps)


# ---- kills

KILLED = """
import sys, time
from helpers import load_of, map_of, open_writer

flush_every, segment_steps, pause = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
writer = open_writer(sys.argv[1], segment_steps=segment_steps, flush_interval=0.5, queue_steps=4096)
for step in range(1_000_000):
    writer.record(None, load_of(step), map_of(step // 50))
    if step % flush_every == 0:
        assert writer.flush()
        print(step, flush=True)
    time.sleep(pause)
"""


def kill_after(child: subprocess.Popen[str], seconds: float) -> tuple[float, list[str]]:
    """Kill the child some time after its first line; returns the moment and all its whole lines."""
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    time.sleep(seconds)
    moment = time.monotonic()
    child.send_signal(signal.SIGKILL)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (-signal.SIGKILL, "")
    lines += out.splitlines(keepends=True)
    return moment, [line for line in lines if line.endswith("\n")]


@pytest.mark.parametrize("seed", range(10))
def test_flushed_steps_survive_kill(tmp_path: Path, seed: int) -> None:
    """At any moment: within a batch, between batches, while segments are being sealed."""
    chance = random.Random(seed)
    child = start_child(KILLED, tmp_path, chance.choice([1, 3, 20]), chance.choice([4, 30, 100_000]), 0)
    _, lines = kill_after(child, chance.uniform(0, 0.2))
    folder = only_session(tmp_path)
    assert_prefix(folder, at_least=int(lines[-1]))
    recorded = [step for step, status in step_status(folder) if status == "recorded"]
    assert set(range(int(lines[-1]) + 1)) <= set(recorded)


UNFLUSHED = """
import sys, time
from helpers import load_of, open_writer

writer = open_writer(sys.argv[1], flush_interval=0.5)
for step in range(1_000_000):
    writer.record(None, load_of(step), None)
    print(time.monotonic(), flush=True)
    time.sleep(0.002)
"""


def test_kill_without_flush_loses_at_most_one_interval(tmp_path: Path) -> None:
    moment, lines = kill_after(start_child(UNFLUSHED, tmp_path), 1.2)
    due = [float(line) for line in lines if float(line) < moment - 0.5]
    assert len(due) > 50
    assert_prefix(only_session(tmp_path), at_least=len(due) - 1)


def test_os_exit_keeps_flushed_steps(tmp_path: Path) -> None:
    script = """
        import os, sys
        from helpers import load_of, open_writer

        writer = open_writer(sys.argv[1], segment_steps=8)
        for step in range(20):
            writer.record(None, load_of(step), None)
        assert writer.flush()
        os._exit(3)
    """
    assert run_child(script, tmp_path, code=3) == ""
    assert_prefix(only_session(tmp_path), at_least=19)


# ---- exits


@pytest.mark.parametrize("end", ["pass", "sys.exit(5)", "raise SystemExit(5)"])
def test_interpreter_exit_writes_everything(tmp_path: Path, end: str) -> None:
    script = f"""
        import sys
        from helpers import load_of, map_of, open_writer

        writer = open_writer(sys.argv[1], segment_steps=8, flush_interval=60)
        for step in range(20):
            writer.record(None, load_of(step), map_of())
        {end}
    """
    run_child(script, tmp_path, code=0 if end == "pass" else 5)
    assert_closed(only_session(tmp_path), 20)


def test_interpreter_exit_waits_for_sealing(tmp_path: Path) -> None:
    script = """
        import sys, threading, time
        from eplb_dump.format.journal import JournalSegment
        from helpers import load_of, map_of, open_writer

        begun, read_layers = threading.Event(), JournalSegment.read_layers

        def slow(*arguments):
            begun.set()
            time.sleep(0.5)
            return read_layers(*arguments)

        JournalSegment.read_layers = slow
        writer = open_writer(sys.argv[1], segment_steps=8, flush_interval=60)
        for step in range(12):
            writer.record(None, load_of(step), map_of())
        writer.flush()
        begun.wait()
    """
    run_child(script, tmp_path)
    assert_closed(only_session(tmp_path), 12)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_exit_of_multiprocessing_child_writes_everything(tmp_path: Path, method: str) -> None:
    """Such a child exits through os._exit, without the interpreter's exit handlers."""
    (tmp_path / "engine.py").write_text(
        f"""
import multiprocessing, sys
from helpers import load_of, open_writer

def engine(root):
    writer = open_writer(root, flush_interval=60)
    for step in range(20):
        writer.record(None, load_of(step), None)

if __name__ == "__main__":
    child = multiprocessing.get_context("{method}").Process(target=engine, args=(sys.argv[1],))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
    )
    run_child(
        "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')",
        tmp_path / "engine.py",
        tmp_path / "dumps",
    )
    assert_closed(only_session(tmp_path / "dumps"), 20)


# ---- forks


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)"])
def test_forked_child_is_off_and_parent_continues(tmp_path: Path, leave: str) -> None:
    script = f"""
        import json, os, sys
        from dataclasses import asdict
        from helpers import load_of, map_of, open_writer

        writer = open_writer(sys.argv[1], flush_interval=60)
        for step in range(5):
            writer.record(None, load_of(step), map_of())
        if sys.argv[2] == "flushed":
            assert writer.flush()
        pid = os.fork()
        if pid == 0:
            for step in range(7):
                writer.record(None, load_of(step + 100), map_of(step))
                writer.skip()
            flushed, done = writer.flush(1), writer.close(1)
            print(json.dumps([flushed, done, asdict(writer.stats())]), flush=True)
            {leave}
        assert os.waitpid(pid, 0)[1] == 0
        for step in range(5, 10):
            writer.record(None, load_of(step), map_of())
        assert writer.close()
        print(json.dumps(asdict(writer.stats())))
    """
    for when in ("flushed", "queued"):
        root = tmp_path / when
        child, parent = run_child(script, root, when).splitlines()
        flushed, done, stats = json.loads(child)
        assert (flushed, done) == (False, False)
        assert (stats["seen"], stats["dropped"]) == (19, 14)
        assert "forked" in stats["off"]
        assert (json.loads(parent)["seen"], json.loads(parent)["recorded"]) == (10, 10)
        assert_closed(only_session(root), 10)


def test_forked_child_can_open_its_own_writer(tmp_path: Path) -> None:
    script = """
        import os, sys
        from helpers import load_of, open_writer

        writer = open_writer(sys.argv[1])
        writer.record(None, load_of(0), None)
        pid = os.fork()
        if pid == 0:
            with open_writer(sys.argv[1], ep_rank=1) as own:
                for step in range(3):
                    own.record(None, load_of(step), None)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """
    run_child(script, tmp_path)
    for rank, steps in ((0, 1), (1, 3)):
        (folder,) = tmp_path.glob(f"run=r/model=m/rank=0000{rank}/session=*")
        assert_closed(folder, steps)


def test_recording_imports_nothing(tmp_path: Path) -> None:
    """A child forked in the middle of an import in a background thread has half of a module, for ever.

    Nor pandas, which Arrow imports for some conversions where it is installed.
    """
    script = """
        import sys
        from helpers import load_of, map_of, open_writer

        sys.path.insert(0, sys.argv[2])
        writer = open_writer(sys.argv[1], segment_steps=4)
        before = set(sys.modules)
        for step in range(10):
            writer.record(step, load_of(step), map_of(step))
        assert writer.close(60)
        print(*sorted(set(sys.modules) - before))
    """
    assert run_child(script, tmp_path / "dump", folder_with_pandas(tmp_path)).split() == []


# ---- folders and disks


def assert_off(writer: ExpertLoadWriter, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The reason is logged once; the engine's calls are still counted."""
    stats = writer.stats()
    assert_accounted(stats)
    assert reason in str(stats.off)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert reason in warning.getMessage()
    began = time.monotonic()
    for step in range(1000):
        writer.record(None, load_of(step), map_of())
    assert not writer.flush()
    writer.close()
    assert time.monotonic() - began < 30  # each step would wait, were recording on
    after = writer.stats()
    assert_accounted(after)
    assert (after.seen, after.recorded) == (stats.seen + 1000, stats.recorded)
    assert len(caplog.records) == 1


def test_folder_deleted_while_segments_end_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same fault strikes session.json, a journal to seal, and the next journal."""
    writer = open_writer(tmp_path / "dumps", segment_steps=2)
    writer.record(0, load_of(0), map_of())
    assert writer.flush(60)
    shutil.rmtree(tmp_path / "dumps")
    for step in range(2, 5):
        writer.record(step, load_of(step), map_of())
    assert not writer.flush(60)
    assert not writer.close(60)
    assert_off(writer, caplog, "FileNotFoundError")
    assert writer.stats().segments_left_open == 1


@pytest.mark.parametrize("idle", [False, True])
def test_deleted_folder_turns_recording_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, idle: bool
) -> None:
    """``idle``: before the first step opened a journal."""
    writer = open_writer(tmp_path / "dumps")
    if not idle:
        writer.record(None, load_of(0), map_of())
        assert writer.flush()
    shutil.rmtree(tmp_path / "dumps")
    for step in range(5):
        writer.record(None, load_of(step), map_of())
    assert not writer.flush()
    assert_off(writer, caplog, "FileNotFoundError")
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_turns_recording_off(tmp_path: Path) -> None:
    """As on a full disk, a write ends half-way: the journal is truncated to complete batches."""
    script = """
        import json, logging, resource, sys
        from dataclasses import asdict
        from helpers import load_of, map_of, open_writer

        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_001, 50_001))
        writer = open_writer(sys.argv[1], queue_steps=4096)
        for step in range(2000):
            writer.record(None, load_of(step), map_of())
            if step % 7 == 0:
                writer.flush()
        writer.close()
        print(json.dumps(asdict(writer.stats())))
    """
    *warnings, last = run_child(script, tmp_path).splitlines()
    stats = json.loads(last)
    assert len(warnings) == 1
    assert "File too large" in warnings[0]
    assert "File too large" in stats["off"]
    found = survived_loads(only_session(tmp_path))
    assert len(found) == stats["recorded"] > 50
    assert (stats["seen"], stats["dropped"]) == (2000, 2000 - len(found))
    assert_equal_loads(found, {step: load_of(step) for step in range(len(found))})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("segment_steps", [64, 100_000])
def test_full_disk_keeps_what_was_written(
    small_disk: Path, caplog: pytest.LogCaptureFixture, segment_steps: int
) -> None:
    """In the journal or in sealing: flushed steps stay readable, and a reason is logged.

    Sealing can free space: then recording continues after a gap.
    """
    acknowledged = []
    with open_writer(small_disk, segment_steps=segment_steps) as writer:
        for step in range(5000):
            taken = writer.record(None, load_of(step) * 1_000_003, map_of()) > 0
            if step % 16 == 0 and writer.flush() and taken:
                acknowledged.append(step)
    stats = writer.stats()
    assert_accounted(stats)
    assert stats.seen == 5000
    assert stats.drop_reasons["No space left on device"] > 0
    assert caplog.text.count("recording is paused") == 1
    assert not [path for path in writer.folder.glob("journal-*") if is_unborn(path)]
    found = survived_loads(writer.folder)
    assert len(found) == stats.recorded > len(acknowledged) > 5
    assert set(acknowledged) <= found.keys()
    assert_equal_loads(found, {step: load_of(step) * 1_000_003 for step in found})
    assert_rows_agree(writer.folder, stats)
