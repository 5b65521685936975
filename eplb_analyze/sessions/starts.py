"""Which sessions under one run id are of which engine start, if several starts were given the same id.

A start has each rank once, and its ranks run at the same time. So sessions of one rank are a restart of that
rank only if they do not overlap in time; sessions that overlap are of different starts.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.session import SessionInfo
from eplb_dump.format.start import StartIdentity

#: Between a run id and the number of one of its starts: it cannot be in a run id.
START_SEPARATOR = "@"

Found = tuple[StoragePath, SessionInfo]
T = TypeVar("T")


@frozen
class Span:
    """The beginning and end of a session, in ns: since 1970, and by its machine's monotonic clock."""

    #: Its first and last step.
    steps: tuple[int, int]
    #: From its creation until it was closed, or else its last step.
    life_unix_ns: tuple[int, int]
    #: From its first to its last step.
    steps_unix_ns: tuple[int, int]
    steps_monotonic_ns: tuple[int, int]


@frozen
class MixedStarts:
    """Why sessions under one run id cannot be separated."""

    reason: str


def run_and_start(run_id: str) -> tuple[str, str]:
    """``"r@2"`` as ``("r", "2")``: a run's id, as in its folder's name, and the number of a start or ""."""
    run, _, number = run_id.partition(START_SEPARATOR)
    return run, number


def separate(
    sessions: Sequence[Found], span_of: Callable[[StoragePath, SessionInfo], Span | None]
) -> list[list[Found]] | MixedStarts:
    """The sessions under one run id by engine start, oldest start first.

    Args:
        sessions: of all ranks and models.
        span_of: reads when a session began and ended; None if it has no step that can be read.
    """
    by_rank: dict[tuple[str, int], list[Found]] = defaultdict(list)
    for found in sessions:
        by_rank[found[1].model, found[1].ep_rank].append(found)
    ids = {info.start.id for _, info in sessions if info.start is not None} - {None}
    if len(ids) <= 1 and all(len(own) == 1 for own in by_rank.values()):
        return [list(sessions)]
    groups = _Group.all_of(sessions, span_of)
    parts = _connected(groups, lambda a, b: not a.excludes(b))
    for part in parts:
        if any(a.excludes(b) for a, b in itertools.combinations(part, 2)):
            return _mixed(by_rank)
    whole = [_Group([found for group in part for found in group.sessions], span_of) for part in parts]
    if any(start.has_two_engines() for start in whole):
        return _mixed(by_rank)
    starts = [_Group(life, span_of) for start in whole for life in start.lives()]
    return [start.sessions for start in sorted(starts, key=lambda start: start.created_ns)]


def _mixed(by_rank: dict[tuple[str, int], list[Found]]) -> MixedStarts:
    ranks = sorted({rank for (_, rank), own in by_rank.items() if len(own) > 1})
    several = f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"
    return MixedStarts(
        f"two engines recorded {several} at the same time, and their sessions do not show which belong "
        f"together. Figures would mix the engines; use a separate run id for each engine start"
    )


class _Group:
    """Sessions that are known to be of one start."""

    def __init__(
        self, sessions: list[Found], span_of: Callable[[StoragePath, SessionInfo], Span | None]
    ) -> None:
        self.sessions = sessions
        self.identity = sessions[0][1].start_identity
        self.created_ns = min(info.created_unix_ns for _, info in sessions)
        self.by_rank: dict[tuple[str, int], list[Found]] = defaultdict(list)
        for found in sessions:
            self.by_rank[found[1].model, found[1].ep_rank].append(found)
        self._span_of = span_of

    @classmethod
    def all_of(
        cls, sessions: Sequence[Found], span_of: Callable[[StoragePath, SessionInfo], Span | None]
    ) -> list[_Group]:
        by_identity: dict[StartIdentity, list[Found]] = defaultdict(list)
        for found in sessions:
            by_identity[found[1].start_identity].append(found)
        same = _connected([*by_identity], lambda a, b: a.same_as(b) is True)
        return [cls([f for identity in part for f in by_identity[identity]], span_of) for part in same]

    def excludes(self, other: _Group) -> bool:
        """Whether two groups are of different starts: by their identities, their ranks or their times."""
        same = self.identity.same_as(other.identity)
        ranks, other_ranks = self.by_rank.keys(), other.by_rank.keys()
        shared = ranks & other_ranks
        # A run id can be given to ranks that nothing else connects, as long as each rank is there once.
        if same is False and (shared or self.identity.id is not None):
            return True
        if ranks == other_ranks or not _overlap(self._whole_life(), other._whole_life()):
            return True  # each is whole, or all of one ended before the other began
        # Else a rank was restarted while the others went on, unless it was there twice at once.
        pairs = (pair for key in shared for pair in itertools.product(self.by_rank[key], other.by_rank[key]))
        return any(_overlap(self._life(a), self._life(b)) for a, b in pairs)

    def lives(self) -> list[list[Found]]:
        """The sessions by the lives of an engine that one launcher started again, oldest first.

        Between two lives no rank ran, and a rank of the first came again as another process that repeats its
        steps. Who came again while others ran was restarted, as was who continues the numbers: ranks that
        wait for a restarted one take no step either. Who came for the first time was late.
        """
        if self.identity.id is not None or all(len(own) == 1 for own in self.by_rank.values()):
            return [self.sessions]
        lives: list[list[Found]] = []
        end = 0
        for found in sorted(self.sessions, key=lambda found: self._life(found)[0]):
            begin, own_end = self._life(found)
            if not lives or begin > end:
                lives.append([])
            lives[-1].append(found)
            end = max(end, own_end)
        starts = lives[:1]
        for life in lives[1:]:
            if not _processes(life) & _processes(starts[-1]) and self._repeats(life, starts[-1]):
                starts.append(life)
            else:
                starts[-1] += life
        return starts

    def _repeats(self, life: list[Found], before: list[Found]) -> bool:
        """Whether a rank has steps again that it had before."""
        known: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for folder, info in before:
            if (span := self._span_of(folder, info)) is not None:
                known[info.model, info.ep_rank].append(span.steps)
        return any(
            _overlap(span.steps, steps)
            for folder, info in life
            if (span := self._span_of(folder, info)) is not None
            for steps in known[info.model, info.ep_rank]
        )

    def has_two_engines(self) -> bool:
        """Whether sessions of a rank have steps at the same time."""
        return any(
            self._steps_overlap(a, b)
            for own in self.by_rank.values()
            for a, b in itertools.combinations(own, 2)
        )

    def _life(self, found: Found) -> tuple[int, int]:
        span = self._span_of(*found)
        return (found[1].created_unix_ns,) * 2 if span is None else span.life_unix_ns

    def _whole_life(self) -> tuple[int, int]:
        lives = [self._life(found) for found in self.sessions]
        return min(life[0] for life in lives), max(life[1] for life in lives)

    def _steps_overlap(self, one: Found, other: Found) -> bool:
        """Whether a rank's sessions, of one machine or several, have steps at the same time.

        Their lives may overlap: an old writer can be closed in the background.
        """
        first, second = self._span_of(*one), self._span_of(*other)
        if first is None or second is None:
            return False
        start, other_start = one[1].start, other[1].start
        if start is not None and other_start is not None and start.machine == other_start.machine:
            return _overlap(first.steps_monotonic_ns, second.steps_monotonic_ns)
        return _overlap(first.steps_unix_ns, second.steps_unix_ns)


def _processes(sessions: Sequence[Found]) -> set[tuple[str, str]]:
    """The machine and name of each process; in recordings of before, its host and number."""
    return {
        (info.host, str(info.pid)) if info.start is None else (info.start.machine, info.start.process)
        for _, info in sessions
    }


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _connected(items: Sequence[T], linked: Callable[[T, T], bool]) -> list[list[T]]:
    """The items in parts: those of one part are connected by chains of links."""
    left, parts = list(items), []
    while left:
        part = [left.pop(0)]
        for item in part:  # which grows
            near = [other for other in left if linked(item, other)]
            part += near
            left = [other for other in left if not any(other is one for one in near)]
        parts.append(part)
    return parts
