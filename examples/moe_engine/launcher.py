"""The parent's side: starts a process for each rank, and when one fails ends them all. No model here."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from .config import EngineConfig
from .errors import EngineError
from .rank import EXIT_LOST_PEER, run_rank
from .text import Bytes

GRACE_SECONDS = 20.0  # for the other ranks to notice that one is gone and to close their recordings


def launch(config: EngineConfig, checkpoint: Path, corpora: dict[str, Bytes], store: Path) -> None:
    """Run all ranks to their end. Raises EngineError, with no rank left running, if one fails."""
    context = multiprocessing.get_context("spawn")  # CUDA survives no fork
    ranks = [
        context.Process(
            target=run_rank, args=(ep_rank, config, checkpoint, corpora, store), name=f"rank {ep_rank}"
        )
        for ep_rank in range(config.ep_size)
    ]
    try:
        for process in ranks:
            process.start()
        _wait_for(ranks)
    finally:
        _end(ranks)


def _wait_for(ranks: Sequence[BaseProcess]) -> None:
    running = list(ranks)
    while running and not any(process.exitcode for process in ranks):
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    if not running and not any(process.exitcode for process in ranks):
        return
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
    # whoever only lost a peer is not the one to name
    failed = [process for process in ranks if process.exitcode]
    culprit = next((process for process in failed if process.exitcode != EXIT_LOST_PEER), failed[0])
    raise EngineError(f"{culprit.name} {_how_it_ended(culprit.exitcode)}; the other ranks were stopped")


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return "lost a peer" if exitcode == EXIT_LOST_PEER else f"failed (exit code {exitcode})"


def _end(ranks: Sequence[BaseProcess]) -> None:
    alive = [process for process in ranks if process.pid is not None and process.is_alive()]
    for process in alive:
        process.terminate()
    for process in alive:
        process.join(GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
