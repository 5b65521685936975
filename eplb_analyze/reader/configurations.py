"""Configurations: consecutive steps of one EP size, number of slots and set of serving ranks.

Loads are never summed across two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed, plural
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
    #: Ranks that all steps lack: the figures are estimates, by the loads of the others.
    missing_ranks: list[int]


class Sums(ABC):
    """What one configuration's complete steps add up to; small, however long the run."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.first_step = self.last_step = -1
        self.recorded = 0
        #: Ranks that all of the steps lack, if the sums are for an estimate.
        self.missing: tuple[int, ...] = ()

    @property
    def steps(self) -> StepRange:
        """From the first to the last complete step."""
        return StepRange(self.first_step, self.last_step + 1)

    def head(self, run: Run, whole: Completeness) -> tuple[str, str, Completeness, int, int, int, list[int]]:
        """The fields of a :class:`SumsReport`."""
        ids, steps = (run.info.run_id, run.info.model), (self.first_step, self.last_step, self.recorded)
        return *ids, whole, *steps, [*self.missing]

    def add(self, block: Block) -> None:
        """Add the next block, which has at least one complete step."""
        steps = block.recorded
        self.first_step = self.first_step if self.recorded else int(steps[0])
        self.last_step = int(steps[-1])
        self.recorded += len(steps)
        self.missing = block.missing
        self._add(block)

    @abstractmethod
    def _add(self, block: Block) -> None: ...


S = TypeVar("S", bound=Sums)


def last_configuration(
    run: Run, steps: tuple[int, int] | None, start: Callable[[Shape], S], *, estimate: bool = False
) -> tuple[S, Completeness, list[str]]:
    """Sum the last configuration in a half-open range of steps (default: all) in one pass.

    Call it inside ``run.retry_without_damaged``.

    Args:
        estimate: as in :func:`blocks_by_configuration`.

    Returns:
        The sums, the completeness of all steps of the range, and notes: that they are for an estimate, and
        that an earlier configuration was left out.

    Raises:
        NotInDumpError: no step of the run is in the range.
        DumpError: no step in it is complete.
    """
    sums, seen, earlier = last_of_configurations(run, steps, start, estimate=estimate)
    notes = estimate_notes(run, sums.missing, sums.recorded, sums.first_step, sums.last_step)
    if earlier:
        first, end = earlier[0].first, earlier[-1].end
        notes.append(
            f"ep_size or the number of slots changed, or a rank was lost: steps {first} to {end - 1} are "
            f"left out, because loads before and after cannot be added (to see them, use --steps "
            f"{first}-{end - 1})"
        )
    return sums, seen, notes


def last_of_configurations(
    run: Run, steps: tuple[int, int] | None, start: Callable[[Shape], S], *, estimate: bool = False
) -> tuple[S, Completeness, list[StepRange]]:
    """:func:`last_configuration` with the steps of each earlier configuration in place of the notes."""
    if steps is not None:
        run.require(steps)
    seen = Completeness()
    sums: S | None = None
    earlier: list[StepRange] = []
    current = -1
    for number, block in blocks_by_configuration(run, steps, seen, estimate=estimate):
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
    run: Run, steps: tuple[int, int] | None, seen: Completeness, *, estimate: bool = False
) -> Iterator[tuple[int, Block]]:
    """The blocks that have complete steps, each with the number of its configuration from 0.

    Every block is counted in ``seen``. A shape without a complete step still separates the configurations
    around it.

    Args:
        estimate: if no step is complete, of the ranks that are there: :meth:`Run.estimated
            <eplb_analyze.reader.run.Run.estimated>`.
    """

    def count(block: Block) -> Block:
        seen.add(block)
        return block

    yield from _numbered(map(count, (run.estimated(steps) if estimate else run).blocks(steps)))


def _numbered(blocks: Iterable[Block]) -> Iterator[tuple[int, Block]]:
    number, shape = -1, None
    for block in blocks:
        if block.shape is None:
            continue
        if block.shape != shape:
            number, shape = number + 1, block.shape
        if len(block.recorded):
            yield number, block


def estimate_notes(run: Run, missing: Sequence[int], steps: int, first: int, last: int) -> list[str]:
    """The label of figures of steps that lack ranks; none if they are complete."""
    if not missing:
        return []
    ranks = len(run.expected_ranks)
    return [
        f"estimate from {ranks - len(missing)} of {ranks} ranks, without rank {listed(missing)}: no step "
        f"is complete, so figures cover only the ranks that recorded, in {plural(steps, 'step')}, "
        f"{first}-{last}"
    ]
