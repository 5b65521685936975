"""Stretches of steps of one shape: nothing is summed across a change of EP size or number of slots."""

from __future__ import annotations

from collections.abc import Iterator

from eplb_analyze.blocks import Block
from eplb_analyze.completeness import Completeness
from eplb_analyze.run import Run, Steps


def stretches(run: Run, steps: Steps | None, seen: Completeness) -> Iterator[tuple[int, Block]]:
    """The blocks that have complete steps, each with the number of its stretch; all are counted in ``seen``.

    Also where no step of a shape is complete, it separates the stretches around it.
    """
    number, shape = -1, None
    for block in run.blocks(steps):
        seen.add(block)
        if block.shape is None:
            continue
        if block.shape != shape:
            number, shape = number + 1, block.shape
        if len(block.recorded):
            yield number, block
