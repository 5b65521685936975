"""Durations of steps from the writers to the reader, whatever happens to the files on the way."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from helpers import load_of, map_of, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.reader.join import RankRows, join_rows
from eplb_analyze.transfer.compact import compact_run
from eplb_analyze.transfer.copy import copy_run
from eplb_analyze.transfer.recover import recover_dump
from eplb_dump.format.journal import Shape, StepRows
from eplb_dump.format.schema import Scope, Status

#: What an engine passes in a step, or "dummy" for a step without tokens.
ENGINE = st.one_of(
    st.none(),
    st.just("dummy"),
    st.floats(width=32, min_value=0, max_value=1e6),
    st.sampled_from([math.nan, math.inf, -1.0, 0.1]),
)


def expected(stated: Sequence[float | str | None]) -> float | None:
    """The largest time that a rank knows, in the precision of the format."""
    known = [np.float32(ms) for ms in stated if isinstance(ms, float) and 0 <= ms < math.inf]
    return max(map(float, known), default=None)


def found(where: Path, run: str | None = None) -> list[float | None]:
    opened = open_run(where, run)
    frame = opened.steps()
    blocks = np.concatenate([block.step_ms for block in opened.blocks()])
    assert blocks.dtype == np.float64
    assert frame["step_ms"].to_list() == [None if math.isnan(ms) else ms for ms in blocks.tolist()]
    assert frame["device_ms"].null_count() == len(frame)
    return frame["step_ms"].to_list()


@given(st.lists(st.tuples(ENGINE, ENGINE), min_size=1, max_size=12), st.integers(0, 11))
@settings(max_examples=8)
def test_durations_are_the_slowest_ranks_also_after_a_kill_and_in_copies(
    steps: list[tuple[float | str | None, float | str | None]], flushed: int
) -> None:
    truth = [expected(stated) for stated in steps]
    with tempfile.TemporaryDirectory() as folder:
        root, killed, copy, compact = (Path(folder, name) for name in ("root", "killed", "copy", "compact"))
        with ExitStack() as stack:
            writers = [stack.enter_context(open_writer(root, ep_rank=rank)) for rank in range(2)]
            for step, stated in enumerate(steps):
                for rank, (writer, ms) in enumerate(zip(writers, stated, strict=True)):
                    if isinstance(ms, str):
                        writer.skip(ms, step)
                    else:
                        writer.record(step, load_of(step, rank), map_of(), step_ms=ms)
                    assert step != flushed or writer.flush(60)  # so that there are several frames
            assert all(writer.flush(60) for writer in writers)
            shutil.copytree(root, killed)
            assert found(root) == truth
        assert found(root) == truth
        assert found(killed) == truth
        recover_dump(killed)
        assert list(killed.rglob("steps-*.parquet"))
        assert found(killed) == truth
        copy_run(root, copy)
        assert found(copy) == truth
        if any(not isinstance(ms, str) for stated in steps for ms in stated):
            compact_run(root, compact)
            assert found(compact) == truth


def test_only_ranks_that_recorded_a_step_count() -> None:
    """A rejected row keeps the time that it came with."""

    def rows(rank: int, status: list[Status], step_ms: list[float], device_ms: list[float]) -> RankRows:
        step = np.arange(3)
        ms = [np.array(values, np.float32) for values in (step_ms, device_ms)]
        none = np.full(3, -1)
        return RankRows(
            rank,
            0,
            StepRows(step, step, step, np.array(status, np.uint8), none, none, *ms),
            Shape(2, 1, 2),
            0,
        )

    nan, recorded = math.nan, Status.RECORDED
    parts = [
        rows(0, [recorded, recorded, Status.DUMMY], [5, nan, 9], [1, 2, 9]),
        rows(1, [Status.REJECTED, recorded, recorded], [7, nan, 4], [9, 3, nan]),
    ]
    joined = join_rows(parts, [0, 1, 2], Scope.LOCAL, None, 2)
    assert joined.step_ms.tolist()[::2] == [5, 4]
    assert math.isnan(joined.step_ms[1])
    assert joined.device_ms.tolist()[:2] == [1, 3]
    assert math.isnan(joined.device_ms[2])
