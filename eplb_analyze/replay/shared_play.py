"""A simulation whose settings are shared by processes: each reads the steps, and plays and scores its own.

Threads are of little help with many settings: a placement is scored in arrays so small that threads spend
their time in handing over the interpreter lock.
"""

from __future__ import annotations

import pickle
from collections.abc import Hashable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import NamedTuple

from eplb_analyze.processes import closed_pipes_ignored, process_pool
from eplb_analyze.replay.scores import Scores
from eplb_analyze.replay.setting_run import SettingRun
from eplb_analyze.replay.simulator import Simulation

#: A process gets at least so many settings, as reading a run costs as much as two or three of them.
MIN_SETTINGS = 4
#: And at least so many settings of layers of steps, which take about 5 seconds.
MIN_WORK = 2_500_000


class _Played(NamedTuple):
    """What another process returns: the scores of its settings, and their runs."""

    scores: Scores
    setting_runs: list[SettingRun]


def play(simulation: Simulation, recorded_steps: int, threads: int | None, processes: int) -> None:
    """Play all settings. The result does not depend on the number of threads or processes.

    Args:
        recorded_steps: about how many steps are complete.
        processes: at most so many.
    """
    work = len(simulation.settings) * recorded_steps * simulation.layers
    count = min(processes, len(simulation.settings) // MIN_SETTINGS, work // MIN_WORK)
    shares = _shares(simulation, count) if count > 1 else []
    try:
        state = pickle.dumps(simulation) if len(shares) > 1 else b""
    except (pickle.PicklingError, AttributeError, TypeError):  # a policy that another process cannot import
        state = b""
    if not state:
        simulation.play(threads)
        return
    mine, *others = shares
    with closed_pipes_ignored(), process_pool(len(others), preload=__name__) as pool:
        playing = [pool.submit(_play, state, rows) for rows in others]
        try:
            simulation.play(1, mine)
            for rows, future in zip(others, playing, strict=True):
                try:
                    played = future.result()
                except (
                    BrokenProcessPool
                ):  # killed, perhaps for its memory: one after another is enough for all
                    played = _play(state, rows)
                simulation.take(rows, *played)
        finally:
            pool.shutdown(cancel_futures=True)


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


def _play(state: bytes, rows: Sequence[int]) -> _Played:
    simulation: Simulation = pickle.loads(state)  # noqa: S301 - from the process that started this one
    simulation.play(1, rows, rest=False)
    return _Played(simulation.scores, [simulation.setting_runs[row] for row in rows])
