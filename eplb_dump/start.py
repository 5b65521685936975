"""The engine start of this process: its launcher's variables, its machine, its parent, its age."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from eplb_dump.format.start import Start

#: Launchers set these to the same value for all ranks of one start; a later start may have the same values.
LAUNCH_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "PMIX_NAMESPACE",
    "RAY_JOB_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)
#: If a process's own start time is unknown, it counts as started when this was imported.
_IMPORTED_NS = time.monotonic_ns()


def launch_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables."""
    return {name: environment[name] for name in LAUNCH_VARIABLES if name in environment}


def own_start(start_id: str | None) -> Start:
    """The start of this process; ``start_id`` is what the engine calls it."""
    return Start(
        id=start_id,
        machine=_machine(),
        process=_process(_own_numbers()[0]),
        parent=_parent(),
        spawned_unix_ns=max(0, time.time_ns() - own_age_ns()),
    )


def own_age_ns() -> int:
    """How long ago this process was started, or forked, at least: the kernel counts in ticks of 10 ms.

    An engine that ended in the tick in which this process was started did not run at the same time.
    """
    stat = _stat(_own_numbers()[0])
    if stat is None:
        return time.monotonic_ns() - _IMPORTED_NS
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    end_of_tick = (stat[1] + 1) * 10**9 // ticks_per_second
    return max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - end_of_tick)


def is_alive(process: str) -> bool:
    """Whether a process of this machine still runs, by its name as in :class:`Start`."""
    number, _, ticks = process.partition("@")
    if not number.isdigit():
        return False
    stat = _stat(int(number))
    if stat is not None:
        return stat[0] not in "ZX" and ticks in ("", str(stat[1]))
    try:
        os.kill(int(number), 0)
    except PermissionError:  # another user's, which /proc may hide
        return True
    except (OSError, OverflowError):
        return False
    return True


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _parent() -> str:
    """The parent, with the process group if a launcher made it.

    Ranks whose launcher has ended have a parent that all such processes share, often process 1, but the
    group of their launcher.
    """
    parent, group = _own_numbers()[1], os.getpgrp()
    if not parent:  # it was put into a container from outside, as others may have been
        return ""
    return _process(parent) if group == os.getpid() else f"{_process(parent)}/{group}"


def _own_numbers() -> tuple[int, int]:
    """The numbers of this process and its parent, as /proc has them: it may be of an outer namespace."""
    try:
        with open("/proc/self/stat", "rb") as file:
            number, _, rest = file.read().partition(b" ")
        return int(number), int(rest.rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return os.getpid(), os.getppid()


def _process(pid: int) -> str:
    stat = _stat(pid)
    return str(pid) if stat is None else f"{pid}@{stat[1]}"


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time in ticks since boot of a process; None if it does not exist, or without /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The program's name, in parentheses, may contain anything.
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
