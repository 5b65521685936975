"""A moment of a run as a person writes it: ``03:12``, ISO 8601, or relative to the run's end, ``-10m``.

A time of day without a date is of the run's first day, or of a later one if the run was on then. A time
without an offset is in the clock's zone: UTC unless it was set. When clocks go back, a time occurs twice.
A printed time lacks fractions of a second, so a time written without them is a whole second, and one written
with them lasts as long as the last digit says: what was printed selects the step that it was printed for.
Of several times that a text can mean, the one within the run counts; if several are, the text is refused,
as is one that is skipped when clocks go forward. If none is, the one nearest to the run counts.
"""

from __future__ import annotations

import datetime
import re

from eplb_analyze.errors import UsageError
from eplb_analyze.reader.clock import RunClock
from eplb_analyze.text import SECOND_NS, local_time
from eplb_dump.format.frozen import frozen

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BACK = re.compile(r"-((?:[0-9]{1,9}(?:\.[0-9]{1,9})?[smhd])+)")
_TIME = re.compile(
    r"(?:(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})[T ])?(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})"
    r"(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,9}))?)?"
    r" ?(?P<offset>Z|UTC|[+-][0-9]{2}:?[0-9]{2})?"
)
#: A date far outside this cannot be converted to another zone.
_YEARS = range(1970, 2200)
FORMS = "03:12, 03:12:30, 2026-11-26T03:12:30+01:00 or, before the run's end, -10m"


@frozen
class Moment:
    """A moment as it was written.

    Attributes:
        back_ns: before the end of the run; None if it is a time.
        date: None for the day or days of the run.
        offset: None for the clock's zone.
        fraction_ns: added to ``time``.
        unit_ns: how long the moment lasts, by the last digit of a time; 1 if it is before the run's end.
    """

    text: str
    back_ns: int | None = None
    date: datetime.date | None = None
    time: datetime.time = datetime.time()
    offset: datetime.tzinfo | None = None
    fraction_ns: int = 0
    unit_ns: int = 1

    @classmethod
    def parse(cls, text: str) -> Moment:
        """Raises ValueError if it is none of the forms."""
        text = text.strip()
        back = _BACK.fullmatch(text)
        if back:
            parts = re.findall(r"([0-9.]+)([smhd])", back[1])
            return cls(text, back_ns=sum(round(float(n) * _UNITS[unit] * SECOND_NS) for n, unit in parts))
        found = _TIME.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a time; write {FORMS}")
        try:
            date = None if found["date"] is None else datetime.date.fromisoformat(found["date"])
            time = datetime.time(int(found["hour"]), int(found["minute"]), int(found["second"] or 0))
            offset = _offset(found["offset"])
        except ValueError as error:
            raise ValueError(f"{text!r} is not a time: {error}") from None
        if date is not None and date.year not in _YEARS:
            raise ValueError(f"{text!r} is not a time: no run was recorded in {date.year}")
        digits = found["fraction"] or ""
        return cls(text, None, date, time, offset, int(digits.ljust(9, "0")), 10 ** (9 - len(digits)))

    def span(self, clock: RunClock) -> tuple[int, int]:
        """The first and the last ns since 1970 that are meant.

        Raises UsageError if the text means several moments, or none.
        """
        first = self._first(clock)
        return first, first + self.unit_ns - 1

    def _first(self, clock: RunClock) -> int:
        if self.back_ns is not None:
            return clock.require()[1] - self.back_ns
        begin, end = clock.whole_span()
        zone = self.offset or clock.zone
        first, last = (local_time(edge, zone).date() for edge in (begin, end))
        days = (last - first).days
        dates = (
            [self.date] if self.date else [first + datetime.timedelta(days=day) for day in range(days + 1)]
        )
        moments = sorted({moment for date in dates for moment in self._on(date, zone)})
        if not moments:
            raise UsageError(
                f"{self.text} does not exist on {dates[0]} in {zone}, because clocks go forward then; add "
                f"an offset, for example Z for UTC"
            )
        inside = [moment for moment in moments if begin < moment + self.unit_ns and moment <= end]
        if len(inside) > 1:
            texts = [local_time(moment, zone).isoformat() for moment in inside[:2]]
            raise UsageError(
                f"{self.text} occurs {len(inside)} times in the run; write {texts[0]} or {texts[1]}"
            )
        # Of two that are as near, the first.
        return inside[0] if inside else min(moments, key=lambda moment: max(begin - moment, moment - end))

    def _on(self, date: datetime.date, zone: datetime.tzinfo) -> set[int]:
        """The moments with this date and time of day in a zone: one, two as clocks go back, or none."""
        found = set()
        for fold in (0, 1):
            local = datetime.datetime.combine(date, self.time, zone).replace(fold=fold)
            utc = local.astimezone(datetime.timezone.utc)
            if utc.astimezone(zone).replace(tzinfo=None) == local.replace(tzinfo=None):
                epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
                seconds = (utc - epoch) // datetime.timedelta(seconds=1)
                found.add(seconds * SECOND_NS + self.fraction_ns)
        return found


def _offset(text: str | None) -> datetime.tzinfo | None:
    if text is None or text in ("Z", "UTC"):
        return None if text is None else datetime.timezone.utc
    minutes = int(text[1:3]) * 60 + int(text[-2:])
    if minutes >= 24 * 60 or int(text[-2:]) >= 60:
        raise ValueError(f"{text} is not an offset")
    return datetime.timezone(datetime.timedelta(minutes=-minutes if text[0] == "-" else minutes))
