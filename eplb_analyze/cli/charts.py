"""Bars, heat colors and plots over steps for a terminal."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from eplb_analyze.cli.console import print_line, step_time, styled, table
from eplb_analyze.text import percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from eplb_analyze.metrics.losses import Bin

    class HotExpert(Protocol):
        """A logical expert and its share of its layer's tokens."""

        @property
        def logical(self) -> int: ...

        @property
        def share(self) -> float: ...

        @property
        def times_mean(self) -> float: ...

        @property
        def replicas(self) -> int: ...

    class StepBin(Protocol):
        """Consecutive steps that are one column of a plot."""

        @property
        def first_step(self) -> int: ...

        @property
        def last_step(self) -> int: ...


#: The title of experts on the slots that minutes name.
AT_LEAST = "hot experts by the slots that minutes name, with at least these tokens"
#: A load is colored if it differs from the mean by more than this share.
NOTABLE = 0.1
_COLD, _NEUTRAL, _HOT = (58, 110, 190), (236, 236, 226), (214, 48, 39)
_EIGHTHS_UP, _EIGHTHS_RIGHT = " ▁▂▃▄▅▆▇█", " ▏▎▍▌▋▊▉█"


def heat_style(times_mean: float) -> str:
    """The style of a cell by its load over the mean: none near 1, else from blue at 0 to red at 2."""
    if abs(times_mean - 1) <= NOTABLE:
        return ""
    if times_mean <= 1:
        low, high, t = _COLD, _NEUTRAL, max(0.0, times_mean)
    else:
        low, high, t = _NEUTRAL, _HOT, min(1.0, times_mean - 1)
    r, g, b = (round(a + (c - a) * t) for a, c in zip(low, high, strict=True))
    ink = "black" if 0.3 * r + 0.59 * g + 0.11 * b > 120 else "white"
    return f"{ink} on #{r:02x}{g:02x}{b:02x}"


def heat(text: str, times_mean: float | None) -> Text:
    """A cell colored by its load over the mean; not colored if that is unknown."""
    return styled((text, "" if times_mean is None else heat_style(times_mean)))


def bar(share: float, width: int = 12) -> str:
    """A horizontal bar; ``share`` in 0 … 1 fills ``width`` columns."""
    whole, rest = divmod(round(max(0.0, min(1.0, share)) * width * 8), 8)
    return _EIGHTHS_RIGHT[8] * whole + (_EIGHTHS_RIGHT[rest] if rest else "")


def columns_of_steps(width: int, bins: Sequence[StepBin]) -> int:
    """How many columns of ``width`` each bin gets."""
    return max(1, width // len(bins))


def vertical_bars(levels: Sequence[int], height: int = 1, repeat: int = 1) -> list[str]:
    """Bars as ``height`` lines, the top line first. A level is in eighths of a line, 0 is blank."""
    return [
        "".join(_EIGHTHS_UP[max(0, min(8, level - 8 * row))] * repeat for level in levels)
        for row in reversed(range(height))
    ]


#: A sparkline spans at least this much, or else the noise of a flat run would fill it.
SPAN = 0.1


def sparkline(values: Sequence[float | None], repeat: int = 1) -> tuple[str, float, float]:
    """One line of bars of figures in 0 … 1; blank where there is no value.

    Returns:
        The line, and the figures of an empty and of a full bar. They are multiples of 0.05, at least
        :data:`SPAN` apart.
    """
    known = [value for value in values if value is not None]
    high = min(1.0, math.ceil(20 * max(known)) / 20)
    low = max(0.0, min(math.floor(20 * min(known)) / 20, high - SPAN))
    high = max(high, low + SPAN)
    scale = 7 / (high - low)
    levels = [0 if value is None else 1 + round((value - low) * scale) for value in values]
    (line,) = vertical_bars(levels, repeat=repeat)
    return line, low, high


#: With fewer bins a sparkline shows nothing.
LEAST_BINS = 8


def print_sparkline(
    console: Console,
    title: str,
    bins: Sequence[Bin],
    *,
    red: Iterable[tuple[int, int]] = (),
    marks: Iterable[tuple[int, str]] = (),
    times: bool = True,
) -> None:
    """Print balancedness by bins of steps: a blank line, the title with the scale, the bars, marks, times.

    Args:
        red: first and last steps whose bars are red.
        marks: steps, and what begins there.
        times: whether the steps are in time order.
    """
    values = [part.balancedness for part in bins]
    if len(values) < LEAST_BINS or all(value is None for value in values):
        return
    repeat = columns_of_steps(console.width, bins)
    line, low, high = sparkline(values, repeat)
    width = len(values) * repeat
    scale = f"{low:.2f} to {high:.2f}"
    console.print()
    print_line(console, (title, "bold"), f"{scale:>{max(len(scale) + 2, width - len(title))}}")
    bars, starts = styled(line), [part.first_step for part in bins]
    for first, last in red:
        begin, end = (bisect_right(starts, step) for step in (first, last))
        bars.stylize("red", max(0, begin - 1) * repeat, end * repeat)
    console.print(bars)
    below = labeled_marks(bins, marks, repeat)
    if below:
        print_line(console, (below, "dim"))
    since, until = step_time(console, bins[0].first_step), step_time(console, bins[-1].last_step)
    if times and since and until:
        print_line(console, (f"{since}{until:>{max(len(until) + 1, width - len(since))}}", "dim"))


def labeled_marks(bins: Sequence[StepBin], marks: Iterable[tuple[int, str]], repeat: int = 1) -> str:
    """The line below a plot with ``^label`` at the bin of each ``(step, label)``; labels if they fit."""
    starts, width = [part.first_step for part in bins], len(bins) * repeat
    columns: dict[int, str] = {}
    for step, label in marks:
        if starts[0] <= step <= bins[-1].last_step:
            columns.setdefault((bisect_right(starts, step) - 1) * repeat, label)
    line, end = [" "] * width, 0
    places = sorted(columns)
    for column, following in zip(places, [*places, width + 1][1:], strict=True):
        label = columns[column]
        text, at = f"^{label}", column
        if column + len(text) >= following:
            text, at = (f"{label}^", column - len(label)) if column - len(label) >= end else ("^", column)
        line[at : at + len(text)] = text
        end = at + len(text) + 1
    return "".join(line).rstrip()


def step_axis(
    bins: Sequence[StepBin], symbols: Sequence[str], marks: dict[str, Iterable[int]], repeat: int = 1
) -> str:
    """The line below a plot: a symbol for each bin, and a mark at the bin of each of some steps.

    Args:
        bins: consecutive bins, each ``repeat`` columns wide.
        symbols: one character for each bin.
        marks: the steps that each mark stands at; a later mark replaces an earlier one.
    """
    line = [symbol for symbol in symbols for _ in range(repeat)]
    starts = [part.first_step for part in bins]
    for mark, steps in marks.items():
        for step in steps:
            if starts[0] <= step <= bins[-1].last_step:
                line[(bisect_right(starts, step) - 1) * repeat] = mark
    return "".join(line)


def print_hot_experts(
    console: Console, experts: Sequence[HotExpert], top: int, title: str, layers: Sequence[int] = ()
) -> None:
    """A table of the first of some experts; ``layers``: that of each, unless all are of one."""
    columns = ("expert", "share", "x mean", "replicas")
    listing = table(console, *(["layer"] if layers else []), *columns, title=title)
    for at, e in enumerate(experts[:top]):
        times = heat(f"{e.times_mean:.2f}", e.times_mean)
        cells = (str(e.logical), percent(e.share, 2), times, str(e.replicas))
        listing.add_row(*map(str, layers[at : at + 1]), *cells)
    console.print(listing)
    console.print()
