"""The clock of a run: the time of each step and the steps at a time."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.errors import NotInDumpError, UsageError
from eplb_analyze.reader.clock import CLOCKS, KEPT_GROUPS, RunClock
from eplb_analyze.reader.moment import Moment
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.text import iso

SECOND = 10**9
#: 2026-11-26 03:12:04 UTC.
START = 1_795_662_724 * SECOND


class Segment:
    """Steps and their monotonic times, as a segment has them."""

    def __init__(self, steps: Any, monotonic_ns: Any) -> None:
        self.step, self.monotonic = np.asarray(steps, np.int64), np.asarray(monotonic_ns, np.int64)
        self.first_step, self.last_step = int(self.step[0]), int(self.step[-1])
        self.step_rows = len(self.step)
        self.path = Path("steps.parquet")
        self.reads = 0

    def step_times(self) -> tuple[Any, Any]:
        self.reads += 1
        return self.step, self.monotonic


class Damaged(Segment):
    def step_times(self) -> tuple[Any, Any]:
        raise DamagedSegmentError(self, "steps", self.path, "cut")  # type: ignore[arg-type]


def session(rank: int, *segments: Segment, offset: int = START) -> Any:
    """A session whose monotonic clock was 0 at ``offset`` by its host's clock."""
    info = SimpleNamespace(ep_rank=rank, created_unix_ns=offset, created_monotonic_ns=0)
    return SimpleNamespace(info=info, segments=[*segments], retired=[])


def clock_of(*sessions: Any, timed: bool = True, zone: str | None = None) -> RunClock:
    clock = RunClock("dump", sessions, timed=timed)
    if zone is not None:
        clock.zone = ZoneInfo(zone)
    return clock


def a_step_a_second(count: int, first: int = 0, **of_session: Any) -> RunClock:
    return clock_of(
        session(0, Segment(np.arange(first, first + count), np.arange(count) * SECOND), **of_session)
    )


class TestTimeOfAStep:
    def test_label_has_the_time_of_day(self) -> None:
        clock = a_step_a_second(100)
        assert clock.label(0) == "step 0 (03:12:04)"
        assert clock.range_label(0, 60) == "steps 0-60 (03:12:04-03:13:04)"
        assert clock.iso(1) == "2026-11-26T03:12:05.000Z"
        assert clock.span_text() == "2026-11-26 03:12:04-03:13:43 UTC (99.0 s)"

    def test_time_zone_is_that_of_the_option(self) -> None:
        clock = a_step_a_second(2)
        clock.zone = ZoneInfo("America/New_York")
        assert clock.label(0) == "step 0 (22:12:04)"
        assert clock.zone_name == "EST"

    def test_run_across_midnight_prints_dates(self) -> None:
        clock = a_step_a_second(100, offset=START + 20 * 3600 * SECOND + 47 * 60 * SECOND)
        assert clock.label(0) == "step 0 (2026-11-26 23:59:04)"
        assert clock.label(99) == "step 99 (2026-11-27 00:00:43)"
        assert clock.range_label(0, 99) == "steps 0-99 (2026-11-26 23:59:04 to 2026-11-27 00:00:43)"

    def test_the_zone_decides_whether_the_run_spans_days(self) -> None:
        clock = a_step_a_second(100, offset=START + 20 * 3600 * SECOND + 47 * 60 * SECOND)
        clock.zone = ZoneInfo("Europe/Berlin")
        assert clock.label(0) == "step 0 (00:59:04)"

    def test_missing_step_has_the_time_of_the_step_before(self) -> None:
        clock = clock_of(session(0, Segment([0, 1, 5], [0, SECOND, 5 * SECOND])))
        assert clock.unix_ns(3) == START + SECOND

    def test_times_of_many_steps_are_those_of_each(self) -> None:
        """With a missing step, a gap between two segments, a damaged one, and a clock that was set back."""
        steps = [0, 1, 3, 4, 5, 6, 9, 10, 20, 21]
        sizes = [(0, 3), (3, 6), (6, 8), (8, 10)]
        at = np.array([0, 10, 30, 47, 50, 60, 90, 95, 40, 44]) * SECOND
        parts = [Segment(steps[a:b], at[a:b]) for a, b in sizes]
        parts.insert(3, Damaged([15, 16], [0, 0]))
        clock = clock_of(session(0, *parts))
        asked = np.array([0, 1, 2, 3, 4, 6, 9, 10, 16, 20, 21])
        unix, since = clock.times(asked)
        assert unix.tolist() == [-1 if step == 16 else clock.unix_ns(step) for step in asked.tolist()]
        nan = np.nan
        expected = np.array([nan, 10, nan, nan, 17, 10, nan, 5, nan, nan, 4]) * SECOND
        np.testing.assert_array_equal(since, expected)
        assert clock.earliest_ns() == START
        assert clock.earliest_ns((5, 30)) == START + 40 * SECOND
        assert clock.earliest_ns((4, 7)) == START + 47 * SECOND

    def test_without_times_labels_are_steps_alone(self) -> None:
        clock = clock_of(session(0, Segment([0, 1], [0, 1])), timed=False)
        assert (clock.label(1), clock.range_label(0, 1), clock.time(1)) == ("step 1", "steps 0-1", "")
        assert (clock.iso(1), clock.span, clock.span_text()) == (None, None, "")

    def test_run_without_a_step_has_no_time(self) -> None:
        clock = clock_of(session(0))
        assert (clock.known, clock.label(3)) == (False, "step 3")
        with pytest.raises(NotInDumpError, match="no step yet"):
            clock.at(START)

    @pytest.mark.parametrize("odd", [0, 1, 2])
    @pytest.mark.parametrize("minutes", [-10_000, -7, 7])
    def test_clock_of_one_rank_that_is_off_has_no_effect(self, odd: int, minutes: int) -> None:
        steps = np.arange(10)
        clock = clock_of(
            *(
                session(r, Segment(steps, steps * SECOND), offset=START + (r == odd) * minutes * 60 * SECOND)
                for r in range(3)
            )
        )
        assert [clock.unix_ns(step) for step in range(10)] == (START + steps * SECOND).tolist()

    def test_only_some_ranks_are_read(self) -> None:
        segments = [Segment(np.arange(10), np.arange(10)) for _ in range(32)]
        clock_of(*(session(rank, segment) for rank, segment in enumerate(segments))).label(3)
        assert sum(segment.reads for segment in segments) == CLOCKS
        assert segments[0].reads == segments[31].reads == 1

    def test_damaged_segment_leaves_the_other_ranks(self) -> None:
        steps = np.arange(10)
        clock = clock_of(session(0, Damaged(steps, steps)), session(1, Segment(steps, steps * SECOND)))
        assert clock.label(2) == "step 2 (03:12:06)"

    def test_label_of_one_step_reads_its_segment_only(self) -> None:
        segments = [
            Segment(np.arange(i * 10, i * 10 + 10), np.arange(i * 10, i * 10 + 10)) for i in range(50)
        ]
        clock_of(session(0, *segments)).unix_ns(205)
        assert [i for i, segment in enumerate(segments) if segment.reads] == [20]

    def test_memory_holds_the_times_of_some_segments(self) -> None:
        count = 3 * KEPT_GROUPS
        segments = [Segment([i], [i * SECOND]) for i in range(count)]
        clock = clock_of(session(0, *segments))
        assert clock.at(START + 100 * SECOND) == 100
        assert len(clock._kept) == KEPT_GROUPS
        assert [clock.unix_ns(step) for step in (0, count - 1)] == [START, START + (count - 1) * SECOND]


class TestStepsAtATime:
    def test_step_in_progress_was_recorded_next(self) -> None:
        clock = a_step_a_second(100)
        assert clock.at(START + 3 * SECOND) == 3
        assert clock.at(START + 3 * SECOND + 1) == 4

    def test_range_holds_the_steps_in_progress_at_both_ends(self) -> None:
        clock = a_step_a_second(100)
        half = SECOND // 2
        assert clock.between(START + 10 * SECOND + half, START + 20 * SECOND + half) == (11, 22)
        assert clock.between(START + 10 * SECOND, START + 20 * SECOND) == (10, 21)
        assert clock.between(None, START + SECOND) == (0, 2)
        assert clock.between(START + 98 * SECOND, None) == (98, 100)

    def test_range_may_begin_before_the_run_and_end_after_it(self) -> None:
        assert a_step_a_second(100).between(START - SECOND, START + 3600 * SECOND) == (0, 100)

    def test_outside_the_run_is_an_error_that_prints_its_range(self) -> None:
        clock = a_step_a_second(100)
        for ask in (
            lambda: clock.at(START - 1),
            lambda: clock.at(START + 100 * SECOND),
            lambda: clock.between(START + 3600 * SECOND, None),
            lambda: clock.between(None, START - SECOND),
        ):
            with pytest.raises(NotInDumpError, match=r"2026-11-26 03:12:04-03:13:43 UTC \(99.0 s\)"):
                ask()

    def test_end_before_the_start_is_an_error(self) -> None:
        with pytest.raises(UsageError, match=r"--since .* is after --until"):
            a_step_a_second(100).between(START + 20 * SECOND, START + 10 * SECOND)

    def test_without_times_it_is_refused(self) -> None:
        clock = clock_of(session(0, Segment([0, 1], [0, 1])), timed=False)
        for ask in (lambda: clock.at(START), lambda: clock.between(START, None)):
            with pytest.raises(UsageError, match="imported without them; select steps with --steps"):
                ask()

    def test_elastic_restart_has_a_gap_without_steps(self) -> None:
        hour = 3600 * SECOND
        before, after = Segment(np.arange(10), np.arange(10) * SECOND), Segment([10, 11], [0, SECOND])
        clock = clock_of(session(0, before), session(0, after, offset=START + hour))
        assert clock.label(10) == "step 10 (04:12:04)"
        assert clock.at(START + hour // 2) == 10
        assert clock.between(START + 5 * SECOND, START + hour // 2) == (5, 10)
        assert clock.between(START + hour // 2, None) == (10, 12)
        with pytest.raises(NotInDumpError, match="no step was in progress"):
            clock.between(START + hour // 2, START + hour // 2 + SECOND)

    def test_a_rank_that_joins_later_counts_from_then_on(self) -> None:
        first, both = np.arange(10), np.arange(10, 20)
        clock = clock_of(
            session(0, Segment(first, first * SECOND), Segment(both, both * SECOND)),
            session(1, Segment(both, (both - 10) * SECOND), offset=START + 10 * SECOND),
        )
        assert [clock.at(START + step * SECOND) for step in range(20)] == [*range(20)]

    def test_clock_set_back_between_sessions_gives_both_times(self) -> None:
        before, after = Segment(np.arange(10), np.arange(10) * SECOND), Segment([10, 11], [0, SECOND])
        clock = clock_of(session(0, before), session(0, after, offset=START + 5 * SECOND))
        assert clock.between(START + 5 * SECOND, START + 6 * SECOND) == (5, 12)
        assert clock.label(10) == "step 10 (03:12:09)"

    @given(
        gaps=st.lists(st.integers(1, 90 * SECOND), min_size=1, max_size=60),
        cut=st.integers(1, 20),
        skews=st.lists(st.integers(-(10**15), 10**15), max_size=2),
        data=st.data(),
    )
    def test_a_step_is_in_progress_at_its_own_time(
        self, gaps: list[int], cut: int, skews: list[int], data: st.DataObject
    ) -> None:
        monotonic = np.cumsum([0, *gaps])
        steps = np.arange(len(monotonic)) * data.draw(st.integers(1, 3))
        parts = [slice(low, low + cut) for low in range(0, len(steps), cut)]
        clock = clock_of(
            *(
                session(rank, *(Segment(steps[part], monotonic[part]) for part in parts), offset=START + skew)
                for rank, skew in enumerate([0] * (len(skews) + 1) + skews)
            )
        )
        index = data.draw(st.integers(0, len(steps) - 1))
        step = int(steps[index])
        unix_ns = clock.unix_ns(step)
        assert unix_ns is not None
        assert clock.at(unix_ns) == step
        assert clock.between(unix_ns, unix_ns) == (step, step + 1)
        end = data.draw(st.integers(index, len(steps) - 1))
        last = int(steps[end])
        assert clock.between(unix_ns, clock.unix_ns(last)) == (step, last + 1)
        # As they are printed, in texts and in JSON documents.
        for texts in ((clock.time(step), clock.time(last)), (clock.iso(step), clock.iso(last))):
            since, until = (Moment.parse(text or "").span(clock) for text in texts)
            found = clock.between(since[0], until[1])
            assert found.first <= step <= last < found.end
            assert clock.at(*since) <= step


def test_iso_is_not_rounded_up() -> None:
    assert iso(START + SECOND - 1) == "2026-11-26T03:12:04.999Z"
    assert datetime.datetime.fromisoformat("2026-11-26T03:12:04+00:00").timestamp() * SECOND == START
