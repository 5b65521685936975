"""Configurations: consecutive steps of one EP size, number of slots and set of serving ranks.

Loads are never summed across two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.step_range import StepRange
from eplb_dump.format.journal import Shape


@dataclass(frozen=True)
class SumsReport(RunReport):
    """A report on the sums of one configuration."""

    #: All requested steps; the figures are over the complete ones from first_step to last_step.
    steps: Completeness
    first_step: int
    last_step: int
    #: The number of complete steps.
    recorded: int


class Sums(ABC):
    """What one configuration's complete steps add up to; small, however long the run."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first_step = self.last_step = -1
        self.recorded = 0

    @property
    def steps(self) -> StepRange:
        """From the first to the last complete step."""
        return StepRange(self.first_step, self.last_step + 1)

    def head(self, run: Run, whole: Completeness) -> tuple[str, str, Completeness, int, int, int]:
        """The fields of a :class:`SumsReport`."""
        info = run.info
        return info.run_id, info.model, whole, self.first_step, self.last_step, self.recorded

    def add(self, block: Block) -> None:
        """Add the next block, which has at least one complete step."""
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
    """Sum the last configuration in a half-open range of steps (default: all) in one pass.

    Call it inside ``run.retry_without_damaged``.

    Returns:
        The sums, the completeness of all steps of the range, and a note if an earlier configuration was
        left out.

    Raises:
        NotInDumpError: no step of the run is in the range.
        DumpError: no step in it is complete.
    """
    sums, seen, earlier = last_of_configurations(run, steps, start)
    if not earlier:
        return sums, seen, []
    first, end = earlier[0].first, earlier[-1].end
    note = (
        f"ep_size or the number of slots changed, or a rank was lost: steps {first} to {end - 1} are left "
        f"out, as loads of two shapes are not added (see them with --steps {first}:{end})"
    )
    return sums, seen, [note]


def last_of_configurations(
    run: Run, steps: tuple[int, int] | None, start: Callable[[Shape], S]
) -> tuple[S, Completeness, list[StepRange]]:
    """:func:`last_configuration` with the steps of each earlier configuration in place of the note."""
    if steps is not None:
        run.require(steps)
    seen = Completeness()
    sums: S | None = None
    earlier: list[StepRange] = []
    current = -1
    for number, block in blocks_by_configuration(run, steps, seen):
        if sums is None or number != current:
            if sums is not None:
                earlier.append(sums.steps)
            assert block.shape is not None
            sums, current = start(block.shape), number
        sums.add(block)
    if sums is None:
        raise run.nothing_complete(steps)
    return sums, seen, earlier


def blocks_by_configuration(
    run: Run, steps: tuple[int, int] | None, seen: Completeness
) -> Iterator[tuple[int, Block]]:
    """The blocks that have complete steps, each with the number of its configuration from 0.

    Every block is counted in ``seen``. A shape without a complete step still separates the configurations
    around it.
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
