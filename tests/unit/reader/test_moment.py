"""Moments as a person writes them."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.errors import UsageError
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.reader.moment import Moment
from eplb_analyze.text import SECOND_NS, iso


class Clock(RunClock):
    """The clock of a run that was from one time to another."""

    def __init__(self, begin: str, end: str, zone: str = "UTC") -> None:
        super().__init__("dump", [])
        self.zone = ZoneInfo(zone)
        self._edges = tuple(
            int(datetime.datetime.fromisoformat(edge + "+00:00").timestamp()) * SECOND_NS
            for edge in (begin, end)
        )

    @property
    def span(self) -> tuple[int, int]:
        return self._edges[0], self._edges[1]


DAY = Clock("2026-11-26T03:02:11", "2026-11-26T04:11:40")
NIGHT = Clock("2026-11-26T23:50:00", "2026-11-27T00:20:00")
#: Clocks go back at 03:00 in Berlin, 01:00 UTC.
FOLD = Clock("2026-10-25T00:10:00", "2026-10-25T01:50:00", "Europe/Berlin")
#: Clocks go forward at 02:00 in Berlin, 01:00 UTC.
GAP = Clock("2026-03-29T00:10:00", "2026-03-29T01:50:00", "Europe/Berlin")


def at(text: str, clock: RunClock) -> str | None:
    return iso(Moment.parse(text).span(clock)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("03:12", "2026-11-26T03:12:00.000Z"),
        ("3:12:30", "2026-11-26T03:12:30.000Z"),
        ("03:12:30.25", "2026-11-26T03:12:30.250Z"),
        ("02:00", "2026-11-26T02:00:00.000Z"),
        ("04:12+01:00", "2026-11-26T03:12:00.000Z"),
        ("2026-11-26T03:12", "2026-11-26T03:12:00.000Z"),
        ("2026-11-26 03:12:30Z", "2026-11-26T03:12:30.000Z"),
        ("2026-11-26 03:12:30 UTC", "2026-11-26T03:12:30.000Z"),
        ("2026-11-25T22:12:30-05:00", "2026-11-26T03:12:30.000Z"),
        ("2026-11-26T08:42:30+0530", "2026-11-26T03:12:30.000Z"),
        ("-10m", "2026-11-26T04:01:40.000Z"),
        ("-90s", "2026-11-26T04:10:10.000Z"),
        ("-1h", "2026-11-26T03:11:40.000Z"),
        ("-0.5h", "2026-11-26T03:41:40.000Z"),
        ("-1h5m", "2026-11-26T03:06:40.000Z"),
        ("-1d", "2026-11-25T04:11:40.000Z"),
    ],
)
def test_forms(text: str, expected: str) -> None:
    assert at(text, DAY) == expected


@pytest.mark.parametrize(
    "text", ["", "3", "03:12:", "25:00", "03:61", "10m", "-10", "-m", "now", "2026-13-01T03:12",
             "03:12+25:00", "2026-11-26", "0001-01-01T00:00", "03:12 CET", "+10m"]
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        Moment.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("23:55", "2026-11-26T23:55:00.000Z"),
        ("00:05", "2026-11-27T00:05:00.000Z"),
        # Outside of the run: the nearest day.
        ("00:30", "2026-11-27T00:30:00.000Z"),
        ("23:40", "2026-11-26T23:40:00.000Z"),
    ],
)
def test_run_across_midnight(text: str, expected: str) -> None:
    assert at(text, NIGHT) == expected


def test_time_on_several_days_of_the_run_needs_its_date() -> None:
    days = Clock("2026-11-25T03:00:00", "2026-11-27T02:00:00")
    message = (
        r"03:12 occurs 2 times in the run; write 2026-11-25T03:12:00\+00:00 or 2026-11-26T03:12:00\+00:00"
    )
    with pytest.raises(UsageError, match=message):
        at("03:12", days)
    assert at("02:30", days) == "2026-11-26T02:30:00.000Z"
    assert at("2026-11-26T03:12", days) == "2026-11-26T03:12:00.000Z"


@pytest.mark.parametrize(
    ("text", "lasts_ns"),
    [("03:12", SECOND_NS), ("03:12:30", SECOND_NS), ("03:12:30.2", SECOND_NS // 10), ("03:12:30.250", 10**6),
     ("03:12:30.123456789", 1), ("-10m", 1)],
)  # fmt: skip
def test_time_lasts_as_long_as_its_last_digit_says(text: str, lasts_ns: int) -> None:
    first, last = Moment.parse(text).span(DAY)
    assert last - first + 1 == lasts_ns


def test_second_in_which_the_run_begins_is_in_the_run() -> None:
    class Later(Clock):
        @property
        def span(self) -> tuple[int, int]:
            begin, end = super().span
            return begin + SECOND_NS // 2, end

    days = "2026-11-25T03:00:00", "2026-11-26T03:00:00"
    assert at("03:00:00", Later("2026-11-26T03:00:00", "2026-11-26T04:00:00")) == "2026-11-26T03:00:00.000Z"
    with pytest.raises(UsageError, match="03:00:00 occurs 2 times in the run"):
        at("03:00:00", Later(*days))


def test_zone_of_the_option_decides_day_and_time() -> None:
    berlin = Clock("2026-11-26T22:50:00", "2026-11-26T23:20:00", "Europe/Berlin")
    assert at("23:55", berlin) == "2026-11-26T22:55:00.000Z"
    assert at("00:05", berlin) == "2026-11-26T23:05:00.000Z"
    assert at("23:05Z", berlin) == "2026-11-26T23:05:00.000Z"


def test_time_that_occurs_twice_needs_an_offset() -> None:
    message = r"write 2026-10-25T02:30:00\+02:00 or 2026-10-25T02:30:00\+01:00"
    with pytest.raises(UsageError, match=message):
        at("02:30", FOLD)
    assert at("2026-10-25T02:30:00+02:00", FOLD) == "2026-10-25T00:30:00.000Z"
    assert at("02:30+01:00", FOLD) == "2026-10-25T01:30:00.000Z"


def test_of_a_time_that_occurs_twice_the_one_in_the_run_counts() -> None:
    summer = Clock("2026-10-25T00:10:00", "2026-10-25T00:50:00", "Europe/Berlin")
    winter = Clock("2026-10-25T01:10:00", "2026-10-25T01:50:00", "Europe/Berlin")
    assert at("02:30", summer) == "2026-10-25T00:30:00.000Z"
    assert at("02:30", winter) == "2026-10-25T01:30:00.000Z"


def test_time_that_is_skipped_is_refused() -> None:
    with pytest.raises(UsageError, match="02:30 does not exist on 2026-03-29 in Europe/Berlin"):
        at("02:30", GAP)
    assert at("03:30", GAP) == "2026-03-29T01:30:00.000Z"


@given(
    moment=st.datetimes(datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1)),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kolkata"]),
)
def test_printed_time_with_its_offset_is_read_as_the_same(moment: datetime.datetime, zone: str) -> None:
    local = moment.replace(microsecond=0, tzinfo=datetime.timezone.utc).astimezone(ZoneInfo(zone))
    read, _ = Moment.parse(local.isoformat()).span(DAY)
    assert read == int(local.timestamp()) * SECOND_NS
