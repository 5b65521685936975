"""What the scripts of several ranks share: a process for each rank, all of which may be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from eplb_dump.format.journal import JournalSegment
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import MANIFEST_FILE, FormatError

SECONDS = 240
#: In the process of a rank: what tells the process that started it.
_ready_to_be_killed: Any = None


def run_ranks(
    ranks: int, target: Callable[..., None], *arguments: Any, kill: bool = False, fork: bool = True
) -> None:
    """Run ``target(rank, *arguments)`` in a process for each rank; exits with a message if one fails.

    Args:
        kill: kill all as soon as each has called :func:`await_kill`.
        fork: what this process has imported stays imported. A fork cannot use CUDA if this process did, and
            importing an engine does.
    """
    context = multiprocessing.get_context("fork" if fork else "spawn")
    ready = context.Semaphore(0)
    processes = [
        context.Process(target=_run_rank, args=(ready, target, rank, *arguments))  # type: ignore[attr-defined]
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    if kill and all(ready.acquire(timeout=SECONDS) for _ in range(ranks)):
        for process in processes:
            process.kill()
    running = processes
    while running and not any(process.exitcode for process in processes) and time.monotonic() < deadline:
        wait([process.sentinel for process in running], deadline - time.monotonic())
        running = [process for process in running if process.is_alive()]
    for process in running:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    if codes != [-signal.SIGKILL if kill else 0] * ranks:
        sys.exit(f"ranks ended with {codes}")


def _run_rank(ready: Any, target: Callable[..., None], *arguments: Any) -> None:
    global _ready_to_be_killed  # noqa: PLW0603 - one per process
    _ready_to_be_killed = ready
    target(*arguments)


def await_closed(rank: int, sessions: int, dump: str | None = None) -> None:
    """Wait until so many sessions of this rank are sealed and closed; exits if that never ends."""
    root, deadline = Path(dump or os.environ["EXPERT_LOAD_DUMP_DIR"]), time.monotonic() + SECONDS / 2
    closed = 0
    while closed < sessions:
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank}: {closed} of {sessions} sessions are closed")
        time.sleep(0.05)
        closed = 0
        for path in root.glob(f"run=*/model=*/rank={rank:05d}/session=*/{MANIFEST_FILE}"):
            with path.open("rb") as file:
                closed += Manifest.read(file, path.stat().st_size).closed is not None


def await_kill(rank: int, steps: int) -> None:
    """Wait until so many steps of this rank are on disk, then to be killed."""
    journals = f"run=*/model=*/rank={rank:05d}/session=*/journal-*.frames"
    found = 0
    while found < steps:  # the writer flushes once a second
        time.sleep(0.05)
        found = 0
        for path in Path(os.environ["EXPERT_LOAD_DUMP_DIR"]).glob(journals):
            with contextlib.suppress(FormatError), JournalSegment(path) as journal:
                found += len(journal.load_steps)
    _ready_to_be_killed.release()
    signal.pause()
