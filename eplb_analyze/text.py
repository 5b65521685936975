"""Numbers, times, lists and names as text, for messages, tables and pages."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Callable, Iterable, Sequence

#: The name of the command.
PROGRAM = "eplb-analyze"
#: An estimate this near to a bound, as a share of its distance from the other one, lies at the edge.
ONE_SIDED = 0.2
#: An interval narrower than this share of its largest bound gets no digits to show its width.
NARROW = 1e-3
SECOND_NS = 10**9


def command_line(
    command: str, dump: str | None = None, *, run: str | None = None, model: str | None = None
) -> str:
    """A command to paste into a shell: ``eplb-analyze layer 12 --run wed-42 /data/dumps``.

    Args:
        command: the name of the command and its options.
        dump: a folder or an address; None if the command finds the dump by itself.
    """
    options = [
        f" {name} {shlex.quote(value)}" for name, value in (("--run", run), ("--model", model)) if value
    ]
    # A folder whose name begins with a dash is not an option.
    place = "" if dump is None else " " + shlex.quote(f"./{dump}" if dump.startswith("-") else dump)
    return f"{PROGRAM} {command}{''.join(options)}{place}"


def plural(count: int, word: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def listed(items: Sequence[object], most: int = 8) -> str:
    """``1, 2, 3 and 4 more``."""
    shown = ", ".join(map(str, items[:most]))
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def clean(text: object) -> str:
    """Text that cannot control a terminal: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign; a rounded zero has no minus."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text


def interval(low: float | None, high: float | None) -> str:
    """A confidence interval of a difference."""
    return "–" if low is None or high is None else f"{signed(low)} … {signed(high)}"


def milliseconds(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    sign: bool = False,
    more_digits: int = 0,
) -> str:
    """``0.35 ms (0.31 to 0.39)``, or ``8.24 ms`` without an interval; in as many digits as matter.

    Args:
        sign: of a difference: write + too.
        more_digits: than matter.
    """
    if value is None:
        return "–"
    bounds = [] if low is None or high is None else [low, high]
    largest = max(abs(number) for number in (value, *bounds))
    digits = (1 if bounds or largest < 1 else 2) - _exponent(largest)
    if bounds and bounds[1] - bounds[0] > NARROW * largest:
        digits = max(digits, -_exponent(bounds[1] - bounds[0]))
    digits = min(max(0, digits) + more_digits, 4)

    def text(number: float) -> str:
        signed_text = signed(number, digits)
        return signed_text if sign else signed_text.removeprefix("+")

    return f"{text(value)} ms" + (f" ({text(bounds[0])} to {text(bounds[1])})" if bounds else "")


def milliseconds_bounded(value: float, low: float, high: float) -> str:
    """A difference as :func:`milliseconds` prints it; ``−0.71 ms, at most +0.49`` if a bound is its estimate.

    Several models can explain step times about equally well. The interval is then the union of theirs, and
    the estimate of the best one can lie at its edge. An interval gets more digits if another bound would
    print like the estimate, or if it excludes 0 and a bound would print as 0.
    """
    below, above = value - low, high - value
    for digits in range(3):
        text = milliseconds(value, low, high, sign=True, more_digits=digits)
        estimate, _, bounds = text.removesuffix(")").partition(" ms (")
        lower, _, upper = bounds.partition(" to ")
        if lower == estimate != upper and below < ONE_SIDED * above:
            return f"{estimate} ms, at most {upper}"
        if upper == estimate != lower and above < ONE_SIDED * below:
            return f"{estimate} ms, at least {lower}"
        hidden = not reaches_0(low, high) and not all(bound[0] in "+−" for bound in (lower, upper))
        if not hidden and (lower == estimate) == (upper == estimate):
            break
    return text


def saves_or_costs(
    value: float,
    low: float,
    high: float,
    amount: Callable[[float, float, float], str],
    *,
    saved: str,
    more: str,
) -> str:
    """A gain or loss in words, because a minus sign is easily overlooked.

    ``costs 0.06 ms (0.02 to 0.11) more per step``; if the interval includes 0, ``saves 3.1 ms per step, but
    may cost up to 0.9 ms more``.

    Args:
        amount: a positive value and its interval as text, ``0.06 ms (0.02 to 0.11)``.
        saved, more: what follows an amount that is saved, and one that is lost: ``" per step"``.
    """
    gain = value >= 0
    text = amount(value, low, high) if gain else amount(-value, -high, -low)
    estimate, _, bounds = text.partition(" (")
    lowest = bounds.partition(" to ")[0]
    verb, after = ("saves", saved) if gain else ("costs", more)
    if not lowest.startswith("−"):
        return f"{verb} {text}{after}"
    most = lowest.removeprefix("−") + estimate.lstrip("0123456789.,")
    return f"{verb} {estimate}{after}, but may {f'cost up to {most} more' if gain else f'save up to {most}'}"


def reaches_0(low: float, high: float) -> bool:
    """Whether an interval includes 0, or comes nearer to it than intervals are exact, and are printed."""
    return low <= 0 <= high or min(abs(low), abs(high)) < 0.01 * (high - low)


def _exponent(value: float) -> int:
    """Of the power of ten of the first digit; 0 of nothing."""
    return math.floor(math.log10(value)) if value > 0 else 0


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def duration(seconds: float | None) -> str:
    """In the largest unit that gives at least 2."""
    if seconds is None:
        return "–"
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def counter(values: Iterable[float]) -> Callable[[float], str]:
    """A formatter for counts shown together, all in one unit, so that the longest is the largest."""
    values = list(values)
    largest = max(values, default=0.0)
    for limit, unit in ((1e13, "T"), (1e10, "G"), (1e7, "M")):
        if largest >= limit:
            scale = float(f"1e{len(f'{limit:.0f}') - 2}")
            return lambda value: f"{value / scale:,.2f}{unit}"
    digits = 0 if all(float(v).is_integer() for v in values) else 1
    return lambda value: f"{value:,.{digits}f}"


def local_time(unix_ns: int, zone: datetime.tzinfo) -> datetime.datetime:
    """A time as a date and time of day, without fractions of a second."""
    # Not from a float, which would round up to the next second, nor by the platform's limits.
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    return (epoch + datetime.timedelta(seconds=unix_ns // SECOND_NS)).astimezone(zone)


def iso(unix_ns: int | None) -> str | None:
    """ISO 8601 in UTC with milliseconds, ``2026-11-26T03:12:04.250Z``; None for None."""
    if unix_ns is None:
        return None
    whole = local_time(unix_ns, datetime.timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{unix_ns % SECOND_NS // 10**6:03d}Z"
