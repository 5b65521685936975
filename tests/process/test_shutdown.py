"""Engines that are asked to end, and killed some seconds later although they have not finished."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from helpers import (
    assert_equal_loads,
    load_of,
    manifest,
    open_journals,
    run_child,
    sealed_loads,
    start_child,
    survived_loads,
)

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import MANIFEST_FILE

#: As a vLLM worker: it leaves its loop, and then its main thread is stuck in C, as an abort of NCCL can be.
ENGINE = """
import ctypes, signal, sys, threading
from eplb_dump.format import segment
from helpers import load_of, map_of, open_writer

def never(*arguments):
    threading.Event().wait()

if sys.argv[2] == "slow disk":
    segment.seal = never
asked = False

def handler(*_):
    global asked
    asked = True

signal.signal(signal.SIGTERM, handler)
writer = open_writer(sys.argv[1], segment_steps=64, flush_interval=0.02)
step = 0
while not asked:
    writer.record(step, load_of(step), map_of(step // 50))
    step += 1
    if step == 100:
        print("ready", flush=True)
assert writer.close(timeout=0) is False
print(step, flush=True)
ctypes.CDLL(None).pause()
"""


def end_engine(root: Path, disk: str, done: Callable[[Path], bool]) -> tuple[Path, int]:
    """Ask an engine to end, kill it when its session is ``done``; the session and the steps that it saw."""
    with start_child(ENGINE, root, disk) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.terminate()
            steps = int(child.stdout.readline())
            (folder,) = root.glob("run=*/model=*/rank=*/session=*")
            deadline = time.monotonic() + 60  # only ends a hang
            while not done(folder) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert child.poll() is None
        finally:
            child.kill()
        _, err = child.communicate()
    assert (child.returncode, err) == (-signal.SIGKILL, "")
    return folder, steps


def is_sealed(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), (folder / MANIFEST_FILE).open("rb") as file:
        return Manifest.read(file, os.fstat(file.fileno()).st_size).closed is not None
    return False


def is_ended(folder: Path) -> bool:
    return any(journal.closed is not None for journal in open_journals(folder))


def findings(root: Path) -> set[str]:
    return {finding.code for finding in check_run(open_run(root)).findings}


def test_killed_while_it_shuts_down_but_sealed(tmp_path: Path) -> None:
    folder, steps = end_engine(tmp_path, "disk", is_sealed)
    assert not list(folder.glob("journal-*"))
    stats = manifest(folder)[-1].header["stats"]
    assert (stats["seen"], stats["off"]) == (steps, None)
    found = sealed_loads(folder)
    assert len(found) == stats["recorded"] >= 100
    assert_equal_loads(found, {step: load_of(step) for step in found})
    assert not findings(tmp_path) & {"not_closed", "unsealed_journal", "incomplete_end"}


def test_killed_before_it_was_sealed_is_not_like_killed_at_work(tmp_path: Path) -> None:
    folder, steps = end_engine(tmp_path, "slow disk", is_ended)
    (session,) = open_run(tmp_path).sessions
    assert session.closed is not None
    assert session.closed["stats"]["seen"] == steps  # type: ignore[index]
    assert not sealed_loads(folder)
    found = survived_loads(folder)
    assert len(found) == session.closed["stats"]["recorded"] >= 100  # type: ignore[index]
    assert_equal_loads(found, {step: load_of(step) for step in found})
    assert findings(tmp_path) & {"not_closed", "unsealed_journal", "incomplete_end"} == {"unsealed_journal"}


def test_exit_waits_for_what_close_began(tmp_path: Path) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer

        writer = open_writer(sys.argv[1], segment_steps=20, flush_interval=60.0, queue_steps=4096)
        for step in range(300):
            writer.record(None, load_of(step), map_of(step // 50))
        writer.close(timeout=0)
    """
    assert run_child(script, tmp_path) == ""
    (folder,) = tmp_path.glob("run=*/model=*/rank=*/session=*")
    assert is_sealed(folder)
    assert_equal_loads(sealed_loads(folder), {step: load_of(step) for step in range(300)})
