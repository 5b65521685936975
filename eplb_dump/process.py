"""The open sessions of this process: closed when it exits, abandoned in a forked child."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from typing import Protocol

_EXIT_DEADLINE_SECONDS = 5.0


class Session(Protocol):
    def close(self, timeout: float) -> bool: ...
    def abandon_in_child(self) -> None: ...


#: In the order in which they were opened.
_open_sessions: dict[Session, None] = {}
_hooked_pid: int | None = None


def register(session: Session) -> None:
    """Close a session when this process exits, and abandon it in a forked child."""
    global _hooked_pid  # noqa: PLW0603 - once per process
    _open_sessions[session] = None
    if _hooked_pid != os.getpid():
        _hooked_pid = os.getpid()
        # A multiprocessing child leaves by os._exit and runs only multiprocessing's own finalizers.
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            util.Finalize(None, _close_open_sessions, exitpriority=0)


def unregister(session: Session) -> None:
    _open_sessions.pop(session, None)


def _close_open_sessions() -> None:
    """At interpreter exit: close what is open, all within one deadline."""
    deadline = time.monotonic() + _EXIT_DEADLINE_SECONDS
    for session in list(_open_sessions):
        with contextlib.suppress(Exception):
            session.close(max(0.1, deadline - time.monotonic()))


def _abandon_in_child() -> None:
    for session in list(_open_sessions):
        session.abandon_in_child()
    _open_sessions.clear()


atexit.register(_close_open_sessions)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_in_child)
