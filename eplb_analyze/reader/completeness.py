"""Counts of complete and incomplete steps of a run, and why steps are incomplete."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.tiers import Ranges
from eplb_analyze.text import plural
from eplb_dump.format.schema import Status

MAX_GAPS = 100
#: The reason if a rank has no row for a step.
ABSENT = "absent"
#: The ranks of a killed engine stop within about a flush interval of each other. A longer range of
#: incomplete steps at the end means that one rank stopped and the others continued.
KILL_SECONDS = 3.0
#: A larger share of incomplete steps makes `summary` exit with 3: its figures omit too much.
TOLERATED_INCOMPLETE = 0.1


@dataclass
class Completeness:
    """Counts over the blocks of a run (or of a range of its steps), merged in order of steps.

    Every step from the first to the last is seen, retired or missing, and every seen step is in exactly one
    of the other counts. If only steps of one phase count, none is missing: such a step has no phase.
    """

    first: int | None = None
    last: int | None = None
    seen: int = 0
    missing: int = 0
    #: Steps of which a rank's part is no longer kept: between the first and the last, or in all if
    #: figures are from sums per minute.
    retired: int = 0
    #: Those of the whole run.
    left_out: Ranges = field(default_factory=Ranges)
    #: Ranges of steps that no rank saw, at most the first 100: ``(first, last)``.
    gaps: list[tuple[int, int]] = field(default_factory=list)
    states: Counter[int] = field(default_factory=Counter)
    last_whole: int | None = None
    #: Incomplete steps by the missing rank and its reason: ``{(rank, status or None): steps}``.
    reasons: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: Incomplete steps before ``last_whole``, which a kill of all ranks does not explain.
    incomplete_inside: int = 0
    #: The last step that each rank accounted for, recorded or not.
    last_of_rank: dict[int, int] = field(default_factory=dict)
    #: The engine's clock at the first and last step and at ``last_whole``, ns.
    first_clock_ns: int = 0
    last_clock_ns: int = 0
    whole_clock_ns: int | None = None
    incomplete_since_whole: int = 0
    #: Whether steps of other phases are left out.
    one_phase: bool = False

    @classmethod
    def of(cls, block: Block) -> Completeness:
        result = cls(one_phase=block.one_phase, left_out=block.left_out)
        if not len(block.step):
            return result
        steps = block.step
        result.first, result.last, result.seen = int(steps[0]), int(steps[-1]), len(steps)
        for i in np.flatnonzero(np.diff(steps) > 1):
            result._gap(int(steps[i]) + 1, int(steps[i + 1]) - 1)
        for row, rank in enumerate(block.ranks):
            there = np.flatnonzero(block.status[row] < len(Status))
            if len(there):
                result.last_of_rank[rank] = int(steps[there[-1]])
        result.states.update(Counter(block.state_as_joined.tolist()))
        result.first_clock_ns, result.last_clock_ns = int(block.clock_ns[0]), int(block.clock_ns[-1])
        result._add_incomplete(block)
        return result

    def _add_incomplete(self, block: Block) -> None:
        bad = block.state_as_joined == StepState.INCOMPLETE
        whole = np.flatnonzero(~bad)
        if len(whole):
            self.incomplete_inside = int(bad[: whole[-1]].sum())
            self.last_whole = int(block.step[whole[-1]])
            self.whole_clock_ns = int(block.clock_ns[whole[-1]])
        self.incomplete_since_whole = int(bad.sum()) - self.incomplete_inside
        if not bad.any():
            return
        rows = {rank: i for i, rank in enumerate(block.ranks)}
        for rank in block.ranks if block.shape is None else block.expected_ranks:
            if rank not in rows:
                self.reasons[rank, ABSENT] += int(bad.sum())
                continue
            for status, count in Counter(block.status[rows[rank]][bad].tolist()).items():
                if status not in (Status.RECORDED, Status.DUMMY):
                    name = Status(status).label if status < len(Status) else ABSENT
                    self.reasons[rank, name] += count

    def _gap(self, first: int, last: int) -> None:
        if last < first or self.one_phase:
            return
        gaps = [(first, last)]
        if self.left_out:
            gaps = [(gap.first, gap.end - 1) for gap in self.left_out.outside(first, last + 1)]
        missing = sum(last - first + 1 for first, last in gaps)
        self.missing += missing
        self.retired += last - first + 1 - missing
        self.gaps = [*self.gaps, *gaps][:MAX_GAPS]

    def add(self, block: Block) -> None:
        """Add the next block; blocks come in order of steps."""
        self.merge(Completeness.of(block))

    def merge(self, later: Completeness) -> None:
        """Add the counts of steps that all come after these."""
        if later.first is None:
            return
        self.one_phase |= later.one_phase
        self.left_out = later.left_out or self.left_out
        if self.last is None:
            self.first, self.first_clock_ns = later.first, later.first_clock_ns
        else:
            self._gap(self.last + 1, later.first - 1)
        self.last, self.last_clock_ns = later.last, later.last_clock_ns
        self.seen += later.seen
        self.missing += later.missing
        self.retired += later.retired
        self.gaps = [*self.gaps, *later.gaps][:MAX_GAPS]
        self.states.update(later.states)
        self.reasons.update(later.reasons)
        self.last_of_rank |= later.last_of_rank
        if later.last_whole is None:
            self.incomplete_since_whole += later.incomplete_since_whole
            return
        self.incomplete_inside += self.incomplete_since_whole + later.incomplete_inside
        self.incomplete_since_whole = later.incomplete_since_whole
        self.last_whole, self.whole_clock_ns = later.last_whole, later.whole_clock_ns

    @property
    def tail_seconds(self) -> float:
        """From the last whole step (or the first step) to the last step, by the engine's clock."""
        since = self.first_clock_ns if self.whole_clock_ns is None else self.whole_clock_ns
        return (self.last_clock_ns - since) / 1e9

    def count(self, state: StepState) -> int:
        return self.states[int(state)]

    def to_json(self) -> dict[str, int | None]:
        return {
            "first": self.first,
            "last": self.last,
            "seen": self.seen,
            **{state.label: self.count(state) for state in StepState},
            "missing": self.missing,
            "retired": self.retired,
        }

    @property
    def should_be_recorded(self) -> int:
        """Steps that some rank recorded: the complete and the incomplete ones."""
        return self.count(StepState.RECORDED) + self.count(StepState.INCOMPLETE)

    @property
    def incomplete_share(self) -> float:
        whole = self.should_be_recorded
        return self.count(StepState.INCOMPLETE) / whole if whole else 0.0

    @property
    def lacks_much(self) -> bool:
        """Whether so many steps lack a rank that the figures omit too much."""
        return self.incomplete_share > TOLERATED_INCOMPLETE

    @property
    def ends_together(self) -> bool:
        """Whether a kill of all ranks explains the incomplete steps at the end."""
        return self.tail_seconds <= KILL_SECONDS

    def why_incomplete(self) -> str:
        """The ranks missing from most steps: ``rank 5 absent in 40``."""
        parts = [f"rank {rank} {why} in {count:,}" for (rank, why), count in self.reasons.most_common(3)]
        if not parts:
            return "ranks recorded loads with different shapes"
        more = len(
            {rank for rank, _ in self.reasons} - {rank for (rank, _), _ in self.reasons.most_common(3)}
        )
        return ", ".join(parts) + (f" and {plural(more, 'more rank')}" if more else "")

    @property
    def accounted_for(self) -> bool:
        """Whether every missing rank recorded why at the time: it dropped or rejected its load."""
        return bool(self.reasons) and all(not why.startswith(ABSENT) for _, why in self.reasons)
