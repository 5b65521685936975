"""A planted run as `watch` sees it: some steps at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from helpers import session_info
from planted_incidents import PlantedRun

from eplb_analyze.live.alerts import Alert, AlertFinder
from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.formulas import Terms
from eplb_dump.format.journal import Shape


def replay(
    run: PlantedRun, steps_per_look: int, *, by_rank: bool = False, phases: Any = None
) -> Iterator[tuple[int, list[Alert]]]:
    """How many steps there are at each look, and its alerts.

    Args:
        by_rank: only the tokens of ranks are known, as of steps in sealed segments.
        phases: the name of each step's phase.
    """
    finder = AlertFinder(session_info(num_logical_experts=run.num_logical, ep_size=run.ranks))
    shape = Shape(run.ranks, run.load.shape[1], run.load.shape[2])
    names = [] if phases is None else sorted({*phases})
    for low in range(0, len(run.load), steps_per_look):
        load = run.load[low : low + steps_per_look]
        rank_load = load.reshape(*load.shape[:2], run.ranks, -1).sum(axis=3, dtype=np.int64)
        end = low + len(load)
        step = np.arange(low, end)
        phase = np.array([-1 if phases is None else names.index(phases[i]) for i in range(low, end)])
        slots = None if by_rank else load
        time_ns, unknown = step * 10**9, np.full(len(step), np.nan)
        times = time_ns, time_ns, unknown, unknown
        finder.add(CompleteSteps(step, *times, Terms.of(rank_load), slots, rank_load, phase, names, shape))
        yield end, finder.look(run.history.truncated_at(end - 1), [])
