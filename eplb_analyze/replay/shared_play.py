"""A simulation whose settings are shared by processes: each reads the steps, and plays and scores its own.

Threads are of little help with many settings: a placement is scored in arrays so small that threads spend
their time in handing over the interpreter lock.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from eplb_analyze.processes import closed_pipes_ignored, process_pool
from eplb_analyze.replay.simulator import Played, Simulation

#: A process gets at least so many settings, as reading a run costs as much as two or three of them.
MIN_SETTINGS = 4
#: And at least so many settings of layers of steps, which take about 5 seconds.
MIN_WORK = 2_500_000


def play(simulation: Simulation, recorded_steps: int, threads: int | None, processes: int) -> None:
    """Play all settings. The result does not depend on the number of threads or processes.

    Args:
        recorded_steps: about how many steps are complete.
        processes: at most so many.
    """
    work = len(simulation.settings) * recorded_steps * simulation.layers
    count = min(processes, len(simulation.settings) // MIN_SETTINGS, work // MIN_WORK)
    shares = _shares(simulation, count) if count > 1 else []
    states = _for_other_processes(simulation, shares[1:])
    pool = _pool(len(states)) if states else None
    if pool is None:
        simulation.play(threads)
    else:
        with closed_pipes_ignored(), pool:
            _play_together(simulation, shares, states, pool)


def _pool(processes: int) -> ProcessPoolExecutor | None:
    """None where there can be none, as in a container without shared memory for semaphores."""
    try:
        return process_pool(processes, preload=__name__)
    except (ImportError, NotImplementedError, OSError):
        return None


def _for_other_processes(simulation: Simulation, shares: Sequence[Sequence[int]]) -> list[bytes]:
    """Empty if a policy cannot be sent to another process."""
    try:
        return [pickle.dumps(simulation.share(rows, rest=False)) for rows in shares]
    except Exception:
        return []


def _play_together(
    simulation: Simulation,
    shares: Sequence[Sequence[int]],
    states: Sequence[bytes],
    pool: ProcessPoolExecutor,
) -> None:
    playing = [_submitted(pool, state) for state in states]
    try:
        mine = simulation.share(shares[0], rest=True)
        mine.play(1)
        others = []
        for rows, state, future in zip(shares[1:], states, playing, strict=True):
            others.append((rows, _played(state, future)))
    finally:
        pool.shutdown(cancel_futures=True)
    simulation.join(shares[0], mine, others)


def _submitted(pool: ProcessPoolExecutor, state: bytes) -> Future[Played] | None:
    try:
        return pool.submit(_play, state)
    except (BrokenProcessPool, OSError):  # it cannot be started
        return None


def _played(state: bytes, future: Future[Played] | None) -> Played:
    """What another process played; if it could not be started or was killed, played here."""
    if future is not None:
        with contextlib.suppress(BrokenProcessPool):
            return future.result()
    return _play(state)


def _shares(simulation: Simulation, count: int) -> list[list[int]]:
    """The rows of each process. Rows that may have the same placements stay together, so that they are
    scored once; the first share has the settings that are watched.
    """
    together: dict[Hashable, list[int]] = {}
    for row, setting in enumerate(simulation.settings):
        together.setdefault(replace(setting, policy="", dispatch=""), []).append(row)
    watched = [any(simulation.setting_runs[row].on_move for row in rows) for rows in together.values()]
    order = sorted(zip(watched, together.values(), strict=True), key=lambda each: not each[0])
    shares = [[rows for _, rows in order[first::count]] for first in range(count)]
    return [sorted(row for rows in share for row in rows) for share in shares if share]


def _play(state: bytes) -> Played:
    simulation: Simulation = pickle.loads(state)  # noqa: S301 - from the process that started this one
    simulation.play(1)
    return Played(simulation.scores, simulation.setting_runs)
