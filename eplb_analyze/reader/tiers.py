"""Of which steps of a run less than everything is kept: writers and `prune` thin old segments, tier by tier.

Each session thins by its own budget, so ranks can have thinned different steps. A step counts by the least
that a rank has of it: without the rows of one rank, a step is as good as retired.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.sessions.discovery import RETIRED, Session
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.step_range import NO_END, StepRange
from eplb_analyze.text import iso, listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import Scope, Tier

_TIERS = Tier.FULL, Tier.RANKS, Tier.MINUTES, Tier.GONE
_LATEST = np.iinfo(np.int64).max


@frozen
class TierRange:
    """Consecutive steps of which the same is kept, and less than everything.

    Attributes:
        times: the least and the greatest ``time`` of these steps, about, ns since 1970; None if not known.
            Texts and documents have those of :meth:`RunClock.timed` instead.
        reasons: why: ``budget``, ``age``, ``space`` or ``prune``.
        estimated: whether a time is interpolated, because that of its step is no longer kept.
    """

    steps: StepRange
    tier: Tier
    times: tuple[int, int] | None
    reasons: tuple[str, ...]
    estimated: bool = True

    def within(self, steps: StepRange) -> TierRange | None:
        """The part of it that is in a range of steps, with times as if all its steps took as long."""
        part = self.steps.clip(*steps)
        if part.first >= part.end:
            return None
        times = self.times
        if times is not None:
            took = (times[1] - times[0]) / max(1, self.steps.end - 1 - self.steps.first)
            since, until = (int((step - self.steps.first) * took) for step in (part.first, part.end - 1))
            times = times[0] + since, times[0] + until
        return TierRange(part, self.tier, times, self.reasons)

    def to_json(self) -> dict[str, object]:
        first, last = self.times or (None, None)
        return {
            "first_step": self.steps.first,
            "first_time": iso(first),
            "last_step": self.steps.end - 1,
            "last_time": iso(last),
            #: Whether a time is interpolated, because that of its step is no longer kept.
            "estimated_times": self.times is not None and self.estimated,
            #: ``ranks``: tokens per EP rank; ``minutes``: sums per minute; ``gone``: nothing.
            "tier": self.tier.value,
            #: ``budget``, ``age``, ``space``, ``prune``.
            "reasons": [*self.reasons],
        }


class Ranges:
    """Steps as ascending ranges that do not overlap."""

    def __init__(self, ranges: Iterable[StepRange] = ()) -> None:
        self._ranges = [*ranges]
        self._first = [r.first for r in self._ranges]
        self._end = [r.end for r in self._ranges]

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def contains(self, steps: Int64) -> npt.NDArray[np.bool_]:
        """Which of some steps are in it: bool ``[len(steps)]``."""
        if not self:
            return np.zeros(len(steps), np.bool_)
        at = np.searchsorted(np.array(self._first, np.int64), steps, side="right") - 1
        inside: npt.NDArray[np.bool_] = (at >= 0) & (steps < np.array(self._end, np.int64)[at])
        return inside

    def within(self, first: int, end: int) -> Iterator[StepRange]:
        """Its parts in a half-open range."""
        for i in range(bisect.bisect_right(self._end, first), len(self._ranges)):
            if self._first[i] >= end:
                return
            yield self._ranges[i].clip(first, end)

    def overlaps(self, first: int, end: int) -> bool:
        """Whether a step of a half-open range is in it."""
        return next(self.within(first, end), None) is not None

    def outside(self, first: int, end: int) -> Iterator[StepRange]:
        """The parts of a half-open range that are not in it."""
        for inside in self.within(first, end):
            if first < inside.first:
                yield StepRange(first, inside.first)
            first = inside.end
        if first < end:
            yield StepRange(first, end)

    def edges(self, first: int, end: int) -> list[int]:
        """The steps inside a half-open range at which one of its ranges begins or ends."""
        return [edge for part in self.within(first, end) for edge in part if first < edge < end]


#: What is kept, and the commands that show it.
_KEPT = {
    Tier.RANKS: ("only tokens per EP rank are kept", "`ranks`, `layer`, `timeline` and `summary` show them"),
    Tier.MINUTES: ("only sums per minute are kept", "`summary`, `layer`, `experts` and `timeline` show them"),
    Tier.GONE: ("nothing is kept", ""),
}


def described(ranges: Sequence[TierRange], when: Callable[[int, int], str]) -> str:
    """What was retired, when and why: ``steps 0-9 (03:02:11-03:12:04), of which nothing is kept (budget)``.

    ``when`` writes the times of a first and a last step; ``""`` if they are not known.
    """
    texts = []
    for tier in reversed(_TIERS[1:]):
        own = [one for one in ranges if one.tier is tier]
        if not own:
            continue
        first, last = own[0].steps.first, own[-1].steps.end - 1
        steps = f"step {first}" if first == last else f"steps {first}-{last}"
        if len(own) > 1:
            count = sum(one.steps.end - one.steps.first for one in own)
            steps = f"{count:,} of {steps}"
        times = when(first, last)
        why = listed([*dict.fromkeys(reason for one in own for reason in one.reasons)])
        steps += f" ({times})" if times else ""
        texts.append(f"{steps}, of which {_KEPT[tier][0]} ({why})")
    return "; ".join(texts)


def retired(
    ranges: Sequence[TierRange], when: Callable[[int, int], str], kept: StepRange | None = None
) -> str:
    """The end of an error about steps that were retired: what is kept of them, and what to do.

    ``kept``: steps of the run that the command can show.
    """
    shown = next(_KEPT[tier][1] for tier in _TIERS[1:] if any(one.tier is tier for one in ranges))
    if kept is not None:
        shown += f", or select steps {kept}" if shown else f"select steps {kept}"
    shown = shown or "select other steps; `runs` shows of which runs steps are kept"
    return f"retired: {described(ranges, when)}; {shown}"


class Tiers:
    """What is kept of the steps of a run.

    Attributes:
        ranges: the steps of which less than everything is kept, ascending.
        retired: those that have no rows any more; figures of steps do without them.
        by_rank: those with tokens per EP rank, and not per expert.
    """

    def __init__(self, ranges: Sequence[TierRange] = ()) -> None:
        self.ranges = ranges
        self.retired = Ranges(_joined(r.steps for r in ranges if r.tier in RETIRED))
        self.by_rank = Ranges(r.steps for r in ranges if r.tier is Tier.RANKS)
        #: Steps that commands about experts do without.
        self.without_loads = Ranges(_joined(r.steps for r in ranges))

    def at(self, step: int) -> Tier:
        """What is kept of a step."""
        return next((one.tier for one in self.ranges if one.steps.first <= step < one.steps.end), Tier.FULL)

    @classmethod
    def of(cls, sessions: Sequence[Session], scope: Scope) -> Tiers:
        """What the manifests say. Reads nothing."""
        writers: dict[int, list[list[_Part]]] = {}
        for session in sessions:
            # With sums over ranks, any writer's rows will do.
            rank = 0 if scope is Scope.GLOBAL else session.info.ep_rank
            writers.setdefault(rank, []).append([*_parts_of(session)])
        parts = [part for own in writers.values() for of_session in own for part in of_session if part.tier]
        return cls(_ranges([*writers.values()], parts) if parts else ())


class _Part(NamedTuple):
    """The steps of a segment; ``tier`` is an index into ``_TIERS``."""

    first: int
    end: int
    tier: int
    times: tuple[int, int] | None
    reason: str


def _parts_of(session: Session) -> Iterator[_Part]:
    first, last = session.part or (0, NO_END)
    for segment in (*session.segments, *session.retired):
        # A journal without any step yet, or one that a partial copy is not about.
        if segment.last_step < 0 or segment.last_step < first or segment.first_step > last:
            continue
        entry = segment.entry if isinstance(segment, ParquetSegment) else None
        end = segment.last_step + 1
        if entry is None or entry.thinned is None:
            yield _Part(segment.first_step, end, 0, None, "")
        else:
            tier = _TIERS.index(entry.tier)
            yield _Part(segment.first_step, end, tier, entry.times, entry.thinned.reason)


def _ranges(writers: Sequence[list[list[_Part]]], thinned: Sequence[_Part]) -> list[TierRange]:
    """Of the parts of each session of each writer."""
    # A session is alone most of the time: then its other segments have no effect.
    counted = [
        [part for of_session in own for part in of_session if part.tier or len(own) > 1] for own in writers
    ]
    edges = np.unique([edge for own in counted for part in own for edge in (part.first, part.end)])
    least = np.zeros(len(edges) - 1, np.int8)
    for own in counted:
        best = np.full(len(least), len(_TIERS), np.int8)
        for part, low, high in _places(edges, own):
            best[low:high] = np.minimum(best[low:high], part.tier)
        least = np.maximum(least, np.where(best == len(_TIERS), 0, best))
    names = sorted({part.reason for part in thinned})
    begin, end = np.full(len(least), _LATEST), np.full(len(least), -1, np.int64)
    reasons = np.zeros(len(least), np.int64)
    for part, low, high in _places(edges, thinned):
        here = low + np.flatnonzero(least[low:high] == part.tier)
        reasons[here] |= 1 << names.index(part.reason)
        if part.times is not None:  # as if all steps took as long
            time, took = part.times[0], (part.times[1] - part.times[0]) / max(1, part.end - 1 - part.first)
            since, until = ((edges[i] - part.first) * took for i in (here, here + 1))
            begin[here] = np.minimum(begin[here], time + since.astype(np.int64))
            end[here] = np.maximum(end[here], time + (until - took).astype(np.int64))
    starts = np.flatnonzero(np.diff(least, prepend=-1))
    found = []
    for low, high in itertools.pairwise([*starts.tolist(), len(least)]):
        if least[low]:
            steps = StepRange(int(edges[low]), int(edges[high]))
            times = int(begin[low:high].min()), int(end[low:high].max())
            mask = int(np.bitwise_or.reduce(reasons[low:high]))
            why = tuple(name for i, name in enumerate(names) if mask >> i & 1)
            found.append(TierRange(steps, _TIERS[least[low]], None if times[1] < 0 else times, why))
    return found


def _places(edges: Int64, parts: Sequence[_Part]) -> Iterator[tuple[_Part, int, int]]:
    """Each part with the edges at its first step and its end."""
    low = np.searchsorted(edges, [part.first for part in parts])
    high = np.searchsorted(edges, [part.end for part in parts])
    return zip(parts, low.tolist(), high.tolist(), strict=True)


def _joined(ranges: Iterable[StepRange]) -> list[StepRange]:
    """Ranges of which none begins where the one before ends."""
    found: list[StepRange] = []
    for one in ranges:
        if found and found[-1].end == one.first:
            found[-1] = StepRange(found[-1].first, one.end)
        else:
            found.append(one)
    return found
