"""Clocks in place of the writer's, so that no recording depends on when and how fast it was made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

#: Tuesday, 2023-11-14 22:13:20 UTC.
START_NS = 1_700_000_000 * 10**9


class PlantedClock:
    """In place of the writer's ``time``: both its clocks show ``ns``, until the test moves them."""

    def __init__(self, ns: int = START_NS) -> None:
        self.ns = ns

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns


class SteadyClock(PlantedClock):
    """All steps take equally long, so that step times show nothing of imbalance, on any machine."""

    def __init__(self, step_ms: int = 1, ns: int = START_NS) -> None:
        super().__init__(ns)
        self._step_ns = step_ms * 10**6

    def time_ns(self) -> int:
        self.ns += self._step_ns
        return self.ns


@contextlib.contextmanager
def steady_clock(step_ms: int = 1, ns: int = START_NS) -> Iterator[None]:
    """What is recorded inside has the times of a :class:`SteadyClock`; with several writers, it is theirs."""
    with mock.patch("eplb_dump.writer.time", SteadyClock(step_ms, ns)):
        yield


class HostClock(PlantedClock):
    """The wall clock, ``ns``, and the monotonic clock of a host, which a test moves by hand."""

    def __init__(self, ns: int = START_NS, monotonic: int = 5 * 10**9) -> None:
        super().__init__(ns)
        self.monotonic = monotonic

    def monotonic_ns(self) -> int:
        return self.monotonic

    def advance(self, ns: int) -> None:
        self.ns += ns
        self.monotonic += ns


@contextlib.contextmanager
def host_clock(ns: int = START_NS, monotonic: int = 5 * 10**9) -> Iterator[HostClock]:
    """What is recorded inside has the times of a :class:`HostClock`."""
    clock = HostClock(ns, monotonic)
    with mock.patch("eplb_dump.writer.time", clock):
        yield clock
