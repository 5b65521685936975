"""One pass over a run that ends with sums of its last configuration: nothing is summed across a change
of EP size or of the number of slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Shape


class Sums(ABC):
    """What one configuration's complete steps add up to; small, however long the run."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first_step = self.last_step = -1
        self.recorded = 0

    def add(self, block: Block) -> None:
        """Add the next block's complete steps, of which there is at least one."""
        steps = block.recorded
        self.first_step = self.first_step if self.recorded else int(steps[0])
        self.last_step = int(steps[-1])
        self.recorded += len(steps)
        self._add(block)

    @abstractmethod
    def _add(self, block: Block) -> None: ...


S = TypeVar("S", bound=Sums)


def last_configuration(
    run: Run, steps: tuple[int, int] | None, start: Callable[[Shape], S]
) -> tuple[S, Completeness, list[str]]:
    """Sums of the last configuration of a half-open range of steps, and notes on what was left out.

    Call it inside ``run.reading``. Raises NotInDumpError, and DumpError where no step is complete.
    """
    if steps is not None:
        run.require(steps)
    whole = Completeness()
    sums: S | None = None
    left_out: tuple[int, int] | None = None
    current = -1
    for number, block in stretches(run, steps, whole):
        if sums is None or number != current:
            if sums is not None:
                left_out = (left_out[0] if left_out else sums.first_step, sums.last_step)
            assert block.shape is not None
            sums, current = start(block.shape), number
        sums.add(block)
    if sums is None:
        raise run.nothing_complete(steps)
    notes = []
    if left_out is not None:
        first, last = left_out
        notes.append(
            f"ep_size or the number of slots changed: steps {first} to {last} are left out, as loads of "
            f"two shapes are not added (see them with --steps {first}:{last + 1})"
        )
    return sums, whole, notes


def stretches(run: Run, steps: tuple[int, int] | None, seen: Completeness) -> Iterator[tuple[int, Block]]:
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
