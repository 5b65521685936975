"""The live window joins hand-made batches: repeated steps, several global writers, shape changes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import session_info

from eplb_analyze.live.session import Batch
from eplb_analyze.live.window import Window
from eplb_dump.format.journal import Shape, StepRows, unknown_ms
from eplb_dump.format.schema import Scope, Status


def batch(first: int, last: int, load: list[int]) -> Batch:
    """Steps ``first`` to ``last - 1`` of one layer; ``load`` has the tokens of each EP rank."""
    step = np.arange(first, last)
    n = len(step)
    status, phase = np.full(n, Status.RECORDED, np.uint8), np.full(n, -1)
    unknown = unknown_ms(n)
    rows = StepRows(step, step * 1_000, step * 1_000, status, np.full(n, -1), phase, unknown, unknown)
    rank_load = np.tile(np.array(load, np.int64), (n, 1, 1))
    return Batch(rows, [], Shape(len(load), 1, len(load)), step, rank_load)


def mean_loads(window: Window) -> dict[int, float]:
    """The mean tokens per EP rank of each complete step."""
    steps, terms = window.complete()
    return {} if terms is None else dict(zip(steps.tolist(), terms.mean[:, 0].tolist(), strict=True))


@pytest.mark.parametrize("settle_between", [False, True])
def test_repeated_step_is_summed_once(settle_between: bool) -> None:
    window = Window(10, Scope.LOCAL, 1)
    ranks = [session_info(session_id=f"s{rank}", ep_rank=rank) for rank in range(2)]
    window.add(ranks[0], batch(0, 4, [1, 3]))
    if settle_between:
        window.settle()
    window.add(ranks[0], batch(2, 6, [10, 30]))
    window.add(ranks[1], batch(0, 6, [2, 4]))
    window.settle()
    assert mean_loads(window) == {0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0, 4: 23.0, 5: 23.0}
    assert window.unfinished(set()) == (0, 0)


def test_lowest_rank_counts_if_several_ranks_write_global_sums() -> None:
    window = Window(10, Scope.GLOBAL, 1)
    for rank in (2, 1, 3):
        info = session_info(session_id=f"s{rank}", ep_rank=rank, ep_size=4, scope=Scope.GLOBAL)
        window.add(info, batch(0, 3, [rank] * 4))
    window.settle()
    assert mean_loads(window) == dict.fromkeys(range(3), 1.0)


def test_shape_change_after_a_rank_died_is_reported_on_the_first_look() -> None:
    """The steps before the change are all incomplete, because rank 1 died before the window."""
    window = Window(100, Scope.LOCAL, 1)
    for rank in (0, 2):
        info = session_info(session_id=f"s{rank}", ep_rank=rank, ep_size=3)
        window.add(info, batch(10, 20, [1, 2, 3]))
    window.add(session_info(session_id="s0", ep_size=3), batch(20, 30, [1]))
    window.settle()
    assert window.shape_changed == 20
    assert [*mean_loads(window)] == [*range(20, 30)]


def test_ranks_that_left_before_the_window_are_no_shape_change() -> None:
    window = Window(100, Scope.LOCAL, 1)
    window.add(session_info(session_id="s2", ep_rank=2, ep_size=3), batch(10, 20, [1, 2, 3]))
    window.add(session_info(session_id="s0", ep_size=3), batch(20, 30, [1]))
    window.settle()
    assert window.shape_changed is None
    assert [*mean_loads(window)] == [*range(20, 30)]
