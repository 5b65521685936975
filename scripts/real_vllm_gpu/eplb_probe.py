"""What each of vLLM's workers measures of itself: a worker extension (``worker_extension_cls``).

Times ``EplbState.step`` and ``EplbState.prepare_forward`` from outside, with the plugin's wrappers if there
are any, and in ``step`` the recorder's own part. With EPLB_PROBE_PLACEMENTS=1 it also keeps each new
placement. That waits for the device in every step, so it is not for timings.
"""

from __future__ import annotations

import array
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import vllm.distributed.eplb.eplb_state as module

#: The columns of a row, one row per step, in ns by the monotonic clock.
COLUMNS = "begin", "step", "before", "after", "prepare"

_rows = array.array("q")
_took = dict.fromkeys(COLUMNS, 0)
_placements: list[tuple[int, Any]] = []
_steps = 0


class Probe:
    """Methods that vLLM adds to its worker."""

    def eplb_probe_write(self, path: str) -> None:
        """Write and forget the rows so far: ``path-RANK.npz``, by EP rank."""
        from vllm.distributed.parallel_state import get_ep_group

        np.savez(
            f"{path}-{get_ep_group().rank_in_group}.npz",
            rows=np.array(_rows, np.int64).reshape(-1, len(COLUMNS)),
            runner=type(self.model_runner).__module__,  # type: ignore[attr-defined]
            placement_steps=np.array([step for step, _ in _placements], np.int64),
            placements=np.array([placement for _, placement in _placements]),
        )
        del _rows[:], _placements[:-1]  # the last one is compared with the next


def _timed(part: str, original: Callable[..., Any]) -> Callable[..., Any]:
    clock = time.perf_counter_ns

    @functools.wraps(original)
    def timed(*arguments: Any, **named: Any) -> Any:
        begin = clock()
        result = original(*arguments, **named)
        _took[part] += clock() - begin
        return result

    return timed


def _keep_placement(state: Any) -> None:
    """The placement that the pass which ends here has used, if it is a new one."""
    placement = next(iter(state.model_states.values())).physical_to_logical_map.cpu().numpy()
    if not _placements or not np.array_equal(_placements[-1][1], placement):
        _placements.append((_steps, placement.copy()))


def _install() -> None:
    state = module.EplbState
    step, clock = state.step, time.perf_counter_ns
    placements = os.environ.get("EPLB_PROBE_PLACEMENTS") == "1"

    @functools.wraps(step)  # the plugin finds its recorder by an attribute of this function
    def probed(self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        global _steps  # noqa: PLW0603 (one engine per process)
        if is_profile:
            step(self, is_dummy, is_profile, log_stats)
            _took.update(dict.fromkeys(COLUMNS, 0))
            return
        if placements:
            _keep_placement(self)
        begin = clock()
        step(self, is_dummy, is_profile, log_stats)
        end = clock()
        _rows.extend((begin, end - begin, _took["before"], _took["after"], _took["prepare"]))
        _took["before"] = _took["after"] = _took["prepare"] = 0
        _steps += 1

    state.step = probed
    if hasattr(state, "prepare_forward"):
        state.prepare_forward = _timed("prepare", state.prepare_forward)
    if "EXPERT_LOAD_DUMP_DIR" in os.environ:
        from eplb_dump.engines.vllm import _Recorder

        for part in "before", "after":
            setattr(_Recorder, part, _timed(part, getattr(_Recorder, part)))


_install()
