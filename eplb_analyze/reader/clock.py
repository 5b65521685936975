"""The clock of a run: the time of each step, and the steps at a time.

The time of a step is the time at which it was recorded, at the end of its forward pass. Each rank of at most
five, spread over the run's ranks, gives its own: the session's monotonic clock, which is never set, added to
the host's clock at the start of the session. The (lower) median of these counts, so that neither a rank
whose clock is wrong by minutes nor a clock that is set back during a session has an effect.

Between two sessions the clocks can be set back. Then times occur twice: a range of times holds the steps of
both, from the first step at or after its beginning to the last one at or before its end.

Of steps that are no longer kept, the times are those of the first and the last step of each minute. At such a
step of one rank, those of other ranks are interpolated.

Reads only two columns of the ``steps`` tables, of the segments that are needed; memory does not grow with
the run, except by some numbers per segment.
"""

from __future__ import annotations

import datetime
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from eplb_analyze.distinct import distinct
from eplb_analyze.errors import NotInDumpError, UsageError
from eplb_analyze.parallel import ordered_map
from eplb_analyze.reader.join import Source, overlapping_segments
from eplb_analyze.reader.tiers import TierRange, retired
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.storage.path import requests_at_once
from eplb_analyze.text import SECOND_NS, duration, iso, local_time
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eplb_analyze.sessions.discovery import Session

#: So many ranks' clocks are read; the median is right as long as three of them are.
CLOCKS = 5
#: A step that was recorded longer after the one before was not in progress all that time: the engine was
#: idle, or restarted.
LONGEST_STEP_NS = 60 * 10**9
#: The times of so many groups of segments stay in memory.
KEPT_GROUPS = 64
_MISSING = np.iinfo(np.int64).max


@frozen
class _Times:
    """Steps of a group of segments, ascending, and the time of each, ns since 1970: int64 [n]."""

    step: Int64
    unix_ns: Int64


class RunClock:
    """The time of each step of a run.

    Attributes:
        known: whether the times are known; an imported run may have none.
        zone: the time zone of the texts; UTC unless it is set.
        retired: steps that have no rows any more.
    """

    def __init__(
        self,
        name: str,
        sessions: Sequence[Session],
        *,
        timed: bool = True,
        retired: Sequence[TierRange] = (),
    ) -> None:
        """``name`` names the run in errors; ``timed`` is that of its info, ``retired`` what it has not."""
        self.zone: datetime.tzinfo = datetime.timezone.utc
        self._name = name
        self._timed = timed
        self.retired: Sequence[TierRange] = retired if timed else ()
        sources = [
            Source.of(session, number, segment)
            for number, session in enumerate(sessions)
            for segment in (*session.retired, *session.segments)
            if segment.last_step >= 0
        ]
        self._groups = [_some_ranks(group) for group in overlapping_segments(sources)]
        self._first = np.array([group[0].segment.first_step for group in self._groups], np.int64)
        self._kept: OrderedDict[int, _Times] = OrderedDict()
        #: Of some steps: what :meth:`unix_ns` gives, which need not be read again.
        self._looked_up: dict[int, int] = {}
        self._spans: tuple[Int64, Int64] | None = None
        self._lock = threading.Lock()

    @property
    def known(self) -> bool:
        return self._timed and bool(self._groups)

    # ---- from steps to times

    def unix_ns(self, step: int) -> int | None:
        """When a step was recorded, ns since 1970; that of the step before if the run lacks it.

        None if the times are not known, or the step was retired.
        """
        if not self.known:
            return None
        if step in self._looked_up:
            return self._looked_up[step]
        number = max(0, int(np.searchsorted(self._first, step, side="right")) - 1)
        times = self._times(number)
        if not len(times.step):
            return None
        at = max(0, int(np.searchsorted(times.step, step, side="right")) - 1)
        if times.step[at] != step and any(one.steps.first <= step < one.steps.end for one in self.retired):
            return None
        return int(times.unix_ns[at])

    def look_up(self, steps: Iterable[int]) -> dict[int, int]:
        """The times of some steps, as far as they are known, for :meth:`remember` of another process."""
        found = ((step, self.unix_ns(step)) for step in steps)
        return {step: unix_ns for step, unix_ns in found if unix_ns is not None}

    def remember(self, times: Mapping[int, int]) -> None:
        """Take the times of some steps, which :meth:`look_up` gave."""
        self._looked_up.update(times)

    def times(self, steps: Int64) -> tuple[Int64, npt.NDArray[np.float64]]:
        """When steps, ascending, were recorded, and how long after the step before.

        Call it only if the times are known.

        Returns:
            int64 ``[n]``, ns since 1970, as :meth:`unix_ns` gives it; -1 if no row can be read.
            float64 ``[n]``, ns; NaN if the run lacks the step before.
        """
        unix, since = np.full(len(steps), -1, np.int64), np.full(len(steps), np.nan)
        group_of = np.maximum(0, np.searchsorted(self._first, steps, side="right") - 1)
        for number in distinct(group_of).tolist():
            times, here = self._times(number), np.flatnonzero(group_of == number)
            if not len(times.step):
                continue
            at = np.maximum(0, np.searchsorted(times.step, steps[here], side="right") - 1)
            unix[here] = times.unix_ns[at]
            before, apart = self._before(number, times)
            follows = (times.step[at] == steps[here]) & (before[at] == steps[here] - 1)
            since[here] = np.where(follows, apart[at], np.nan)
        return unix, since

    def earliest_ns(self, steps: tuple[int, int] | None = None) -> int:
        """A time that no step of a half-open range was recorded before. Call it only if times are known."""
        first, end = StepRange.of(steps)
        low = max(0, int(np.searchsorted(self._first, first, side="right")) - 1)
        high = max(low + 1, int(np.searchsorted(self._first, end)))
        return min(int(self._times(number).unix_ns.min(initial=_MISSING)) for number in range(low, high))

    def _before(self, number: int, times: _Times) -> tuple[Int64, Int64]:
        """The step before each of a group, -2 for none, and the ns since it was recorded."""
        last = self._times(number - 1) if number else None
        step, unix_ns = -2, 0
        if last is not None and len(last.step):
            step, unix_ns = int(last.step[-1]), int(last.unix_ns[-1])
        before = np.concatenate([[step], times.step[:-1]])
        return before, np.diff(times.unix_ns, prepend=np.int64(unix_ns))

    @property
    def span(self) -> tuple[int, int] | None:
        """The times of the first and the last step, ns since 1970; None if they are not known."""
        if not self.known:
            return None
        first, last = self.unix_ns(int(self._first[0])), self.unix_ns(np.iinfo(np.int64).max)
        return None if first is None or last is None else (first, last)

    def iso(self, step: int | None) -> str | None:
        """The time of a step as ISO 8601 in UTC, ``2026-11-26T03:12:04.250Z``, as JSON documents have it."""
        return None if step is None else iso(self.unix_ns(step))

    def time(self, step: int) -> str:
        """The time of a step for a table: ``03:12:04``, with the date if the run spans days; else ``""``."""
        unix_ns = self.unix_ns(step)
        return "" if unix_ns is None else self.text(unix_ns)

    def label(self, step: int) -> str:
        """``step 1000 (03:12:04)``; without the time if it is not known."""
        time = self.time(step)
        return f"step {step} ({time})" if time else f"step {step}"

    def range_label(self, first: int, last: int) -> str:
        """``steps 1000-1999 (03:12:04-03:31:58)``; a range of one step is its label."""
        if first == last:
            return self.label(first)
        times = [self.time(step) for step in (first, last)]
        return f"steps {first}-{last}" + (f" ({self._range(*times)})" if all(times) else "")

    def text(self, unix_ns: int) -> str:
        """A time in the run's zone, with its date if the run spans days."""
        return f"{self._local(unix_ns):{'%Y-%m-%d ' if self._spans_days else ''}%H:%M:%S}"

    def span_text(self, steps: tuple[int, int] | None = None) -> str:
        """``2026-11-26 03:02:11-04:11:40 UTC (1.2 h)``: when the run, or its steps from a first to a last
        one, took place; ``""`` if that is not known."""
        begin, end = self.span or (None, None)
        if steps is not None:
            begin, end = (self.unix_ns(step) for step in steps)
        if begin is None or end is None:
            return ""
        first, last = self._local(begin), self._local(end)
        start, stop = f"{first:%Y-%m-%d %H:%M:%S}", f"{last:%H:%M:%S}"
        if first == last:
            return f"{start} {self.zone_name}"
        times = f"{start}-{stop}" if first.date() == last.date() else f"{start} to {last:%Y-%m-%d} {stop}"
        return f"{times} {self.zone_name} ({duration((end - begin) / SECOND_NS)})"

    @property
    def zone_name(self) -> str:
        """``UTC``, or the zone's own name at the beginning of the run, for instance ``CET``."""
        span = self.span
        return self._local(span[0] if span else 0).tzname() or str(self.zone)

    def _range(self, first: str, last: str) -> str:
        return f"{first} to {last}" if self._spans_days else f"{first}-{last}"

    @property
    def _spans_days(self) -> bool:
        span = self.span
        return span is not None and self._local(span[0]).date() != self._local(span[1]).date()

    def _local(self, unix_ns: int) -> datetime.datetime:
        return local_time(unix_ns, self.zone)

    # ---- from times to steps

    def at(self, unix_ns: int, last_ns: int | None = None) -> int:
        """The step in progress at a time, or the first one after it if the engine was idle.

        A step is in progress from the moment the step before was recorded until it is recorded itself.

        Args:
            last_ns: the last ns of the time, if it is not an instant; its first one within the run counts.

        Raises UsageError if the times are not known, NotInDumpError if the time is outside of the run.
        """
        begin, end = self.require()
        latest = unix_ns if last_ns is None else last_ns
        if unix_ns > end or begin > latest:
            raise self.outside(f"{self._zoned(unix_ns)} is", unix_ns, latest)
        step = self._first_from(max(begin, unix_ns))
        gone = self._gone_in(unix_ns, latest)
        if any(one.steps.end <= step for one in gone):
            raise self._were_retired(gone)
        return step

    def between(
        self, since: int | None, until: int | None, steps: tuple[int, int] | None = None
    ) -> StepRange:
        """The steps in progress from one time to another, both ns since 1970; None: from or to the end.

        Of ``steps``, a half-open range, if it is given.

        A step recorded more than a minute after the one before is in the range only if it was recorded in
        it: the engine was idle or restarted before.

        Raises UsageError if the times are not known, NotInDumpError if no step was in progress.
        """
        begin, end = self.require()
        if since is not None and until is not None and since > until:
            raise UsageError(f"--since {self._zoned(since)} is after --until {self._zoned(until)}")
        asked = 0 if since is None else since, _MISSING if until is None else until
        if since is not None and since > end:
            raise self.outside(f"{self._zoned(since)} is", *asked)
        if until is not None and until < begin:
            raise self.outside(f"{self._zoned(until)} is", *asked)
        since, until = begin if since is None else since, end if until is None else until
        first, last = self._first_from(since), self._last_until(until)
        if first > last and (gone := self._gone_in(*asked)):
            raise self._were_retired(gone)
        if first > last:
            raise NotInDumpError(
                f"{self._name}: no step was in progress from {self._zoned(since)} to {self._zoned(until)}"
            )
        found = StepRange(first, last + 1)
        both = StepRange.of(steps).clip(*found)
        if both.first >= both.end:
            raise NotInDumpError(
                f"{self._name}: steps {found} were in progress at that time, but --steps selects "
                f"{StepRange.of(steps)}"
            )
        return both

    def outside(self, what: str, since: int | None = None, until: int | None = None) -> NotInDumpError:
        """The error to raise if ``what``, from one time to another, is outside of the run."""
        if since is not None and until is not None and (gone := self._gone_in(since, until)):
            return self._were_retired(gone)
        return NotInDumpError(f"{self._name}: {what} outside the time of the run, {self.span_text()}")

    def require(self) -> tuple[int, int]:
        """The span. Raises UsageError if the times are not known."""
        if not self._timed:
            raise UsageError(
                f"{self._name}: the times of its steps are not known, because it was imported without them; "
                "select steps with --steps"
            )
        span = self.span
        if span is None and self.retired:
            raise self._were_retired(self.retired)
        if span is None:
            raise NotInDumpError(f"{self._name}: it has no step yet")
        return span

    def whole_span(self) -> tuple[int, int]:
        """The span with the steps that were retired. Raises UsageError if the times are not known."""
        times = [time for one in self.retired if one.times is not None for time in one.times]
        span = self.require() if not times else self.span or ()
        return min(*times, *span), max(*times, *span)

    def times_text(self, begin: int, end: int) -> str:
        """Two times in the run's zone: ``03:02:11-04:11:40``, with dates unless both are on the run's day."""
        first, last = self._local(begin), self._local(end)
        days = {local.date() for local in (first, last, *map(self._local, self.span or ()))}
        if first == last:
            return f"{first:%H:%M:%S}" if len(days) == 1 else f"{first:%Y-%m-%d %H:%M:%S}"
        if len(days) == 1:
            return f"{first:%H:%M:%S}-{last:%H:%M:%S}"
        return f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}"

    def when(self, first: int, last: int) -> str:
        """:meth:`times_text` of two steps, retired or not; ``about …`` if one of the times is interpolated.

        ``""`` if they are not known.
        """
        begin, end = self.near(first), self.near(last)
        if begin is None or end is None:
            return ""
        about = "" if begin[1] and end[1] else "about "
        return about + self.times_text(begin[0], end[0])

    def timed(self, one: TierRange) -> TierRange:
        """A range of steps with their times by this clock, which knows those of minutes."""
        begin, end = self.near(one.steps.first), self.near(one.steps.end - 1)
        if begin is None or end is None:
            return replace(one, times=None)
        return replace(one, times=(begin[0], end[0]), estimated=not (begin[1] and end[1]))

    def near(self, step: int) -> tuple[int, bool] | None:
        """When a step was recorded, and whether that is kept.

        Otherwise the time is interpolated between those of the steps around it that are.
        """
        if not self.known:
            return None
        number = max(0, int(np.searchsorted(self._first, step, side="right")) - 1)
        times = self._times(number)
        at = int(np.searchsorted(times.step, step))
        if at < len(times.step) and times.step[at] == step:
            return int(times.unix_ns[at]), True
        after = self._following(number, at - 1)
        before = self._preceding(number, at)
        if before is None or after is None:
            nearest = before or after
            return None if nearest is None else (nearest[1], False)
        share = (step - before[0]) / (after[0] - before[0])
        return before[1] + int(share * (after[1] - before[1])), False

    def _gone_in(self, since: int, until: int) -> list[TierRange]:
        """What was retired of the steps from one time to another."""
        timed = [(one, one.times) for one in self.retired if one.times is not None]
        return [one for one, times in timed if times[0] <= until and since <= times[1]]

    def _were_retired(self, gone: Sequence[TierRange]) -> NotInDumpError:
        return NotInDumpError(f"{self._name}: {retired(gone, self.when)}")

    def _zoned(self, unix_ns: int) -> str:
        local = self._local(unix_ns)
        return f"{local:%Y-%m-%d %H:%M:%S} {local.tzname()}"

    def _first_from(self, unix_ns: int) -> int:
        """The first step at or after a time that is not after the run's latest."""
        _, latest = self._group_spans()
        number = int(np.argmax(latest >= unix_ns)) if (latest >= unix_ns).any() else len(latest) - 1
        times = self._times(number)
        later = np.flatnonzero(times.unix_ns >= unix_ns)
        return int(times.step[later[0] if len(later) else -1])

    def _last_until(self, unix_ns: int) -> int:
        """The last step in progress at a time that is not before the run's earliest."""
        earliest, _ = self._group_spans()
        before = np.flatnonzero(earliest <= unix_ns)
        number = int(before[-1]) if len(before) else 0
        times = self._times(number)
        earlier = np.flatnonzero(times.unix_ns <= unix_ns)
        here = int(earlier[-1]) if len(earlier) else 0
        step, recorded = int(times.step[here]), int(times.unix_ns[here])
        following = self._following(number, here)
        # A step that was recorded at this very time is the one in progress.
        if following is not None and any(step < one.steps.end <= following[0] for one in self.retired):
            return step
        if following is not None and recorded < unix_ns and following[1] - recorded <= LONGEST_STEP_NS:
            return following[0]
        return step

    def _following(self, number: int, index: int) -> tuple[int, int] | None:
        """The step after one of a group, and its time."""
        times, index = self._times(number), index + 1
        while index >= len(times.step):
            number, index = number + 1, 0
            if number >= len(self._groups):
                return None
            times = self._times(number)
        return int(times.step[index]), int(times.unix_ns[index])

    def _preceding(self, number: int, index: int) -> tuple[int, int] | None:
        """The step before one of a group, and its time."""
        while index == 0:
            if number == 0:
                return None
            number -= 1
            index = len(self._times(number).step)
        times = self._times(number)
        return int(times.step[index - 1]), int(times.unix_ns[index - 1])

    # ---- reading

    def _group_spans(self) -> tuple[Int64, Int64]:
        """The earliest and latest time of each group of segments, int64 each; reads all of them once."""
        if self._spans is None:
            parts = [self._times(number).unix_ns for number in range(len(self._groups))]
            earliest = [int(part.min(initial=_MISSING)) for part in parts]
            latest = [int(part.max(initial=-1)) for part in parts]
            self._spans = np.array(earliest, np.int64), np.array(latest, np.int64)
        return self._spans

    def _times(self, number: int) -> _Times:
        with self._lock:
            found = self._kept.pop(number, None)
            if found is None:
                found = _median(self._groups[number])
                if len(self._kept) >= KEPT_GROUPS:
                    self._kept.popitem(last=False)
            self._kept[number] = found
            return found


def _some_ranks(group: list[Source]) -> list[Source]:
    """The sources of at most ``CLOCKS`` ranks, spread over all, in order of steps."""
    ranks = sorted({source.rank for source in group})
    if len(ranks) > CLOCKS:
        ranks = [ranks[i] for i in np.linspace(0, len(ranks) - 1, CLOCKS).round().astype(int)]
    return [source for source in group if source.rank in ranks]


def _median(group: Iterable[Source]) -> _Times:
    """The times of a group's steps. A damaged table is left out; other commands report it."""
    rows: list[tuple[Source, tuple[Int64, Int64]]] = []
    group = list(group)

    def read(source: Source) -> tuple[Int64, Int64]:
        try:
            return source.segment.step_times()
        except DamagedSegmentError:
            return np.empty(0, np.int64), np.empty(0, np.int64)

    rows = list(ordered_map(read, group, requests_at_once(group[0].segment.path)))
    step = distinct(np.concatenate([own for _, (own, _) in rows]))
    ranks = sorted({source.rank for source in group})
    recorded, between = (np.full((len(ranks), len(step)), _MISSING, np.int64) for _ in range(2))
    # A rank's newest session counts.
    for source, (own, monotonic) in sorted(rows, key=lambda row: row[0].session):
        row, unix_ns = ranks.index(source.rank), monotonic + source.clock_offset_ns
        if source.segment.step_rows or not len(own):
            recorded[row, np.searchsorted(step, own)] = unix_ns
            continue
        # Minutes of ranks begin at other steps if their clocks differ, and the median is over all ranks.
        inside = slice(*np.searchsorted(step, [own[0], own[-1] + 1]))
        apart = np.interp(step[inside], own, unix_ns - unix_ns[0])
        between[row, inside] = unix_ns[0] + apart.astype(np.int64)
    clocks = np.where((recorded != _MISSING).any(axis=0), recorded, between)
    clocks.sort(axis=0)
    middle = ((clocks != _MISSING).sum(axis=0) - 1) // 2
    return _Times(step, clocks[middle, np.arange(len(step))])
