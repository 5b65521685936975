"""The open writers of this process: closed when it exits, abandoned in a forked child."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Protocol

_EXIT_DEADLINE_SECONDS = 5.0


class Writer(Protocol):
    def close(self, timeout: float = ...) -> bool: ...


#: What to call for each open writer in a forked child.
_open_writers: dict[Writer, Callable[[], None]] = {}
_hooked_pid: int | None = None


def register(writer: Writer, abandon: Callable[[], None]) -> None:
    """Close a writer when this process exits, and ``abandon`` it in a forked child."""
    global _hooked_pid  # noqa: PLW0603 - once per process
    _open_writers[writer] = abandon
    if _hooked_pid != os.getpid():
        _hooked_pid = os.getpid()
        # A multiprocessing child leaves by os._exit and runs only multiprocessing's own finalizers.
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            util.Finalize(None, _close_open_writers, exitpriority=0)


def unregister(writer: Writer) -> None:
    _open_writers.pop(writer, None)


def _close_open_writers() -> None:
    """At interpreter exit: close what is open, all within one deadline."""
    deadline = time.monotonic() + _EXIT_DEADLINE_SECONDS
    for writer in list(_open_writers):
        with contextlib.suppress(Exception):
            writer.close(max(0.1, deadline - time.monotonic()))


def _abandon_in_child() -> None:
    for abandon in list(_open_writers.values()):
        abandon()
    _open_writers.clear()


atexit.register(_close_open_writers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
