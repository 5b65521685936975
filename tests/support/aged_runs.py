"""Runs of any age, written in a moment by the writer's own encoder: for tests of retention.

Times of steps are planted; everything else is as an engine's writer would leave it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers import session_info

from eplb_dump.format.journal import (
    Int64,
    JournalAppender,
    Loads,
    PlacementRows,
    Shape,
    StepRows,
    placements_frame,
    steps_frame,
    unknown_ms,
)
from eplb_dump.format.manifest import close_manifest
from eplb_dump.format.notable import Notable
from eplb_dump.format.schema import Scope, Status
from eplb_dump.format.segment import write_segment
from eplb_dump.format.session import SessionInfo, session_path, write_session_file

DAY = 86_400 * 10**9
SHAPE = Shape(8, 4, 32)


@dataclass
class Content:
    """A segment; see :class:`eplb_dump.format.segment.Content`."""

    info: SessionInfo
    seq: int
    steps: StepRows
    placements: PlacementRows
    load: Loads
    shape: Shape | None = SHAPE

    @property
    def load_steps(self) -> Int64:
        return self.steps.step

    @property
    def load_type(self) -> Any:
        return self.load.dtype

    def read_layers(self, first: int, last: int) -> Loads:
        return self.load[first:last]


def rows_of(first_step: int, count: int, last_ns: int, step_ns: int) -> StepRows:
    """Recorded steps, of which the last one began at a time."""
    step = np.arange(first_step, first_step + count, dtype=np.int64)
    time_ns = last_ns - (count - 1 - np.arange(count, dtype=np.int64)) * step_ns
    return StepRows(
        step, time_ns, time_ns, np.full(count, Status.RECORDED, np.uint8), np.full(count, 100, np.int64),
        np.zeros(count, np.int32), unknown_ms(count), unknown_ms(count), ("decode",),
    )  # fmt: skip


def placements_of(step: int, generation: int = 0) -> PlacementRows:
    layers = np.arange(SHAPE.num_moe_layers, dtype=np.int32)
    slots = (np.arange(SHAPE.num_physical_experts) + generation) % 16
    return PlacementRows(
        np.full(len(layers), step, np.int64), layers, np.full(len(layers), SHAPE.ep_size, np.int32),
        [slots.astype(np.int32)] * len(layers),
    )  # fmt: skip


def no_placements() -> PlacementRows:
    return PlacementRows(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32), [])


def aged_session(
    root: Path,
    run_id: str,
    last_ns: Sequence[int],
    *,
    rank: int = 0,
    scope: Scope = Scope.GLOBAL,
    closed: bool = True,
    steps: int = 16,
    rearranged: Sequence[int] = (),
    model: str = "m",
    session_id: str = "s",
    step_ns: int = 10**7,
    old: bool = True,
    levels: Sequence[float] = (),
) -> Path:
    """A session whose segments end at these times. Returns its folder.

    Args:
        rearranged: the numbers of segments that begin with another placement, from 1 on.
        old: set the times of its files back, as if nothing had been written since.
        levels: by how much more each segment has to do than others; default all the same.
    """
    info = session_info(
        run_id=run_id, session_id=session_id, model=model, ep_rank=rank, scope=scope,
        num_logical_experts=16, ep_size=SHAPE.ep_size, num_moe_layers=SHAPE.num_moe_layers,
        num_physical_experts=SHAPE.num_physical_experts, segment_steps=steps,
        created_unix_ns=min([*last_ns, time.time_ns()]) - steps * step_ns,
    )  # fmt: skip
    info = replace(info, created_monotonic_ns=info.created_unix_ns)  # both clocks are one
    folder = session_path(root, info)
    folder.mkdir(parents=True)
    write_session_file(folder, info)
    rng = np.random.default_rng([len(run_id), rank, *run_id.encode()])
    notable = Notable()
    rates = rng.gamma(2, 20, (4, 1, 32))
    generation = 0
    for seq, end in enumerate(last_ns):
        placements = no_placements()
        if seq == 0 or seq in rearranged:
            generation += seq in rearranged
            placements = placements_of(seq * steps, generation)
        level = levels[seq] if levels else 1.0
        load = rng.poisson(level * rates, (4, steps, 32)).astype(np.int32)
        rows = rows_of(seq * steps, steps, end, step_ns)
        write_segment(folder, Content(info, seq, rows, placements, load), notable)
    if closed:
        close_manifest(folder, info, {"seen": steps * len(last_ns)})
    if old:
        set_back(folder, max([*last_ns, info.created_unix_ns]))
    return folder


def begin_journal(
    folder: Path, info: SessionInfo, seq: int, last_ns: int, steps: int = 16
) -> JournalAppender:
    """An open, locked journal with steps of no load, as of a live writer."""
    journal = JournalAppender(folder, info, seq)
    placements = placements_of(seq * steps, seq)
    maps = np.stack(placements.physical_to_logical)
    rows = rows_of(seq * steps, steps, last_ns, 10**7)
    rows.status[:] = Status.DUMMY
    journal.append(
        placements_frame(placements.step, placements.layer, maps, SHAPE.ep_size), steps_frame(rows)
    )
    return journal


def set_back(folder: Path, unix_ns: int) -> None:
    """Set the times of a folder's files back."""
    for path in folder.iterdir():
        os.utime(path, ns=(unix_ns, unix_ns))
