"""Which steps of a run are whole, which are not, and why: counts that every command can state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from eplb_analyze.blocks import Block, StepState
from eplb_dump.format import Status


@dataclass
class Completeness:
    """Counts over the blocks of a run (or of a range of its steps), added block by block.

    Every step from the first to the last is seen or missing, and every seen step is in exactly one
    of the other counts.
    """

    first: int | None = None
    last: int | None = None
    seen: int = 0
    missing: int = 0
    #: Ranges of steps that no rank saw, at most the first 100: ``(first, last)``.
    gaps: list[tuple[int, int]] = field(default_factory=list)
    states: Counter[int] = field(default_factory=Counter)
    last_whole: int | None = None
    #: Incomplete steps by the reason of the rank that lacks them: ``{(rank, status or None): steps}``.
    reasons: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: Incomplete steps before ``last_whole``: not the frayed end of a killed run.
    incomplete_inside: int = 0
    #: The last step that each rank recorded or idled in.
    last_of_rank: dict[int, int] = field(default_factory=dict)
    #: From the last whole step to the last step, by the engine's clock.
    tail_seconds: float = 0.0
    _incomplete_since_whole: int = 0
    _whole_time_ns: int | None = None

    def add(self, block: Block) -> None:
        """Add the next block; blocks come in order of steps."""
        if not len(block.step):
            return
        steps = block.step if self.last is None else np.concatenate([[self.last], block.step])
        jumps = np.flatnonzero(np.diff(steps) > 1)
        for i in jumps:
            low, high = int(steps[i]) + 1, int(steps[i + 1]) - 1
            self.missing += high - low + 1
            if len(self.gaps) < 100:
                self.gaps.append((low, high))
        self.first = int(block.step[0]) if self.first is None else self.first
        self.last = int(block.step[-1])
        self.seen += len(block.step)
        for row, rank in enumerate(block.ranks):
            there = np.flatnonzero(
                (block.status[row] == Status.RECORDED) | (block.status[row] == Status.DUMMY)
            )
            if len(there):
                self.last_of_rank[rank] = int(block.step[there[-1]])
        self.states.update(Counter(block.state.tolist()))
        self._add_incomplete(block)

    def _add_incomplete(self, block: Block) -> None:
        bad = block.state == StepState.INCOMPLETE
        whole = np.flatnonzero(~bad)
        if len(whole):
            inside = int(bad[: whole[-1]].sum())
            self.incomplete_inside += self._incomplete_since_whole + inside
            self._incomplete_since_whole = int(bad[whole[-1] :].sum())
            self.last_whole = int(block.step[whole[-1]])
            self._whole_time_ns = int(block.clock_ns[whole[-1]])
        else:
            self._incomplete_since_whole += int(bad.sum())
        if self._whole_time_ns is None:
            self._whole_time_ns = int(block.clock_ns[0])
        self.tail_seconds = (int(block.clock_ns[-1]) - self._whole_time_ns) / 1e9
        if not bad.any() or block.shape is None:
            return
        rows = {rank: i for i, rank in enumerate(block.ranks)}
        for rank in block.expected_ranks:
            if rank not in rows:
                self.reasons[rank, "absent"] += int(bad.sum())
                continue
            for status, count in Counter(block.status[rows[rank]][bad].tolist()).items():
                if status not in (Status.RECORDED, Status.DUMMY):
                    name = Status(status).label if status < len(Status) else "absent"
                    self.reasons[rank, name] += count

    def count(self, state: StepState) -> int:
        return self.states[int(state)]

    def to_json(self) -> dict[str, int | None]:
        return {
            "first": self.first,
            "last": self.last,
            "seen": self.seen,
            **{state.label: self.count(state) for state in StepState},
            "missing": self.missing,
        }

    @property
    def should_be_recorded(self) -> int:
        """Steps that some rank recorded: the complete and the incomplete ones."""
        return self.count(StepState.RECORDED) + self.count(StepState.INCOMPLETE)

    @property
    def incomplete_share(self) -> float:
        whole = self.should_be_recorded
        return self.count(StepState.INCOMPLETE) / whole if whole else 0.0

    def why_incomplete(self) -> str:
        """The ranks that lack most, in words: ``rank 5 absent in 40``."""
        parts = [f"rank {rank} {why} in {count:,}" for (rank, why), count in self.reasons.most_common(3)]
        more = len(self.reasons) - len(parts)
        return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def completeness(blocks: Iterable[Block]) -> Completeness:
    result = Completeness()
    for block in blocks:
        result.add(block)
    return result
