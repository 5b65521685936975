"""Configurations: consecutive steps of one EP size, number of slots and set of serving ranks.

Loads are never summed across two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.readings import Reading, read_blocks
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Shape


@frozen
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

    def start(self, block: Block) -> Reading | None:
        """Count the next block, which has at least one complete step, and say how it is read."""
        steps = block.recorded
        self.first_step = self.first_step if self.recorded else int(steps[0])
        self.last_step = int(steps[-1])
        self.recorded += len(steps)
        self.missing = block.missing
        return self._reading(block)

    def _reading(self, block: Block) -> Reading | None:
        """None if none of its loads is needed."""
        return None

    @abstractmethod
    def merge(self, block: Block, part: Any) -> None:
        """Add the next block's part. Later blocks may have been started, but not merged."""


S = TypeVar("S", bound=Sums)


def last_configuration(
    run: Run,
    steps: tuple[int, int] | None,
    start: Callable[[Shape], S],
    *,
    estimate: bool = False,
    reads: bool = True,
) -> tuple[S, Completeness, list[str]]:
    """Sum the last configuration in a half-open range of steps (default: all) in one pass.

    Call it inside ``run.retry_without_damaged``.

    Args:
        estimate: if no step is complete, of the ranks that are there: :meth:`Run.estimated
            <eplb_analyze.reader.run.Run.estimated>`.
        reads: as for :meth:`LastConfiguration.add_all`.

    Returns:
        The sums, the completeness of all steps of the range, and notes: that they are for an estimate, and
        that an earlier configuration was left out.

    Raises:
        NotInDumpError: no step of the run is in the range.
        DumpError: no step in it is complete.
    """
    last = LastConfiguration(run, start)
    last.add_all(steps, estimate=estimate, reads=reads)
    return last.result(steps)


def last_of_configurations(
    run: Run, steps: tuple[int, int] | None, start: Callable[[Shape], S]
) -> tuple[S, Completeness, list[StepRange]]:
    """:func:`last_configuration` of sums for which nothing is read.

    With the steps of each earlier configuration in place of the notes.
    """
    last = LastConfiguration(run, start)
    last.add_all(steps, reads=False)
    if last.sums is None:
        raise run.nothing_complete(steps)
    return last.sums, last.seen, last.earlier


class Configurations:
    """Numbers the configurations of blocks, which come in order of steps, and counts the blocks' steps."""

    def __init__(self, run: Run) -> None:
        """``run``: whose blocks they are; or part of that run, without steps of which less is kept."""
        self._run = run
        self.seen = Completeness()
        self._number = -1
        self._shape: Shape | None = None

    def number(self, block: Block) -> int | None:
        """The number of the next block's configuration, from 0; None if it has no complete step of the run.

        A shape without a complete step still separates the configurations around it.
        """
        if not self._run.has(block):
            return None
        counts = Completeness.of(block)
        counts.left_out = self._run.absent
        self.seen.merge(counts)
        if block.shape is not None and block.shape != self._shape:
            self._number, self._shape = self._number + 1, block.shape
        return self._number if block.shape is not None and len(block.recorded) else None


class LastConfiguration(Generic[S]):
    """The sums of the last configuration of the blocks added, in order of steps.

    Attributes:
        run: whose blocks they are; or part of that run, without steps of which less is kept.
        sums: None until a block has a complete step.
        seen: the completeness of all steps.
        earlier: the steps of each earlier configuration.
    """

    def __init__(self, run: Run, start: Callable[[Shape], S]) -> None:
        self.run, self._start = run, start
        self._configurations = Configurations(run)
        self._current = -1
        self.sums: S | None = None
        #: What blocks belong to that are not merged yet.
        self._started: deque[S | None] = deque()
        self.earlier: list[StepRange] = []

    @property
    def seen(self) -> Completeness:
        return self._configurations.seen

    def start(self, block: Block) -> Reading | None:
        """Begin to add the next block; None if nothing of it is to be read."""
        number = self._configurations.number(block)
        if number is not None and (self.sums is None or number != self._current):
            if self.sums is not None:
                self.earlier.append(self.sums.steps)
            assert block.shape is not None
            self.sums, self._current = self._start(block.shape), number
        sums = None if number is None else self.sums
        self._started.append(sums)
        return None if sums is None else sums.start(block)

    def merge(self, block: Block, part: Any) -> None:
        """Add the first block that is started and not merged; ``part``: of its reading."""
        sums = self._started.popleft()
        if sums is not None:
            sums.merge(block, part)

    def add_all(self, steps: tuple[int, int] | None, *, estimate: bool = False, reads: bool = True) -> None:
        """Add the blocks of the run, or of a half-open range of its steps.

        Args:
            reads: whether blocks are read for the sums, which other processes can do.
        """
        if steps is not None:
            self.run.require(steps)
        run = self.run.estimated(steps) if estimate else self.run
        if not reads:
            for block in run.blocks(steps):
                self.start(block)
                self.merge(block, None)
            return
        read_blocks(run, steps, self)

    def result(self, steps: tuple[int, int] | None) -> tuple[S, Completeness, list[str]]:
        """What :func:`last_configuration` returns; ``steps``: the range that was asked for."""
        sums, earlier = self.sums, self.earlier
        if sums is None:
            raise self.run.nothing_complete(steps)
        notes = estimate_notes(self.run, sums.missing, sums.recorded, sums.first_step, sums.last_step)
        if earlier:
            first, end = earlier[0].first, earlier[-1].end
            notes.append(
                f"ep_size or the number of slots changed, or a rank was lost: steps {first} to {end - 1} are "
                f"left out, because loads before and after cannot be added (to see them, use --steps "
                f"{first}-{end - 1})"
            )
        return sums, self.seen, notes


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
