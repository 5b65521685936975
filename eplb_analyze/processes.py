"""Processes on this machine that share work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

from eplb_analyze.parallel import limit_workers


def process_pool(processes: int, preload: str) -> ProcessPoolExecutor:
    """A pool of processes, each of which keeps to one thread, as there is one for each core.

    Args:
        preload: the module that the work needs.
    """
    return ProcessPoolExecutor(processes, process_context(preload), initializer=_start)


def process_context(preload: str) -> BaseContext:
    """Processes are forked from a server that has imported what they need, where the platform can.

    Otherwise each takes half a second of processor time to import it.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    forkserver.ensure_running()  # so it imports while this process does
    return context


def _start() -> None:
    limit_workers(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work forever, as it holds both ends of its queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def closed_pipes_ignored() -> Iterator[None]:
    """While processes work for this one: one that dies closes its pipe, which must not end this one."""
    if not hasattr(signal, "SIGPIPE") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)
