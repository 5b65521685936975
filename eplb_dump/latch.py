"""Latch: an event for threads that signal handlers interrupt."""

from __future__ import annotations

import contextlib
import threading


class Latch:
    """Something that happens once, and can be waited for.

    Unlike ``threading.Event``, whose lock is not re-entrant, it can be set and waited for in a signal handler
    that interrupted a thread while it was setting it or waiting for it.
    """

    __slots__ = ("_lock", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        self.is_set = True
        self._let_one_through()

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds; whether it has happened."""
        if not self.is_set and self._lock.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX)):
            self._let_one_through()  # the next one that waits
        return self.is_set

    def _let_one_through(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is open already
            self._lock.release()
