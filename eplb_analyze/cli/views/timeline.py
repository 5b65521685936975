"""Shows a figure over the steps of a run as a plot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import columns_of_steps, step_axis
from eplb_analyze.cli.console import (
    print_heading,
    print_line,
    print_notes,
    step_label,
    step_time,
    times_known,
)
from eplb_analyze.text import figure, listed, plural

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from eplb_analyze.analysis.timeline_report import Bin, Timeline

HEIGHT = 14

#: Columns of the axis labels.
MARGIN = 10


def render(console: Console, result: Timeline) -> None:
    from eplb_analyze.metrics.formulas import ACTIVE_EXPERTS, FORMULAS

    where = "" if result.layer is None else f" of layer {result.layer}"
    print_heading(console, f"{result.formula}{where}", f" · {result.model} · run {result.run_id}")
    known = sum(b.steps for b in result.bins)
    if not known:
        console.print("no step has a token in it")
        return
    formula = {**FORMULAS, ACTIVE_EXPERTS.name: ACTIVE_EXPERTS}.get(result.formula)
    spread = f"mean {figure(result.mean)}"
    if result.min is not None:
        spread += f", {figure(result.min)} to {figure(result.max)}"
    if result.formula == "summed_balancedness":
        console.print(f"{spread} over {plural(known, 'step')}; 1 is perfect")
        text = "of loads summed per minute, as each rank wrote its own sums: persistent imbalance only"
        print_line(console, (text, "yellow"))
    else:
        better = formula.direction if formula else "0 is perfect"
        console.print(f"{spread} over {plural(known, 'step')}; {better}")
    if result.formula == "idle_fraction":
        console.print("by tokens, not by time; `summary` shows what imbalance cost in time")
    if result.tier == "minutes":
        print_line(
            console, ("figures come from per-minute sums; `summary` shows what else is kept", "yellow")
        )
    for warning in [formula.warning] if formula and formula.warning else []:
        print_line(console, (warning, "yellow"))
    print_notes(console, result.notes)
    console.print()
    plotted = plot(result, console.width - MARGIN)
    for line in plotted:
        console.print(line, no_wrap=True, overflow="crop")
    if times_known(console):
        start, end = (step_time(console, s) for s in (result.bins[0].first_step, result.bins[-1].last_step))
        width = len(plotted[-1].plain) - MARGIN - len(start)
        if width > len(end):
            console.print(f"{'time':>{MARGIN - 2}}  {start}{end:>{width}}")
    console.print()
    sizes = sorted({b.last_step - b.first_step + 1 for b in result.bins})
    each = " or ".join(f"{size:,}" for size in sizes) + (" step" if sizes == [1] else " steps")
    if result.bin_minutes is not None:
        each = ("" if result.bin_minutes == 1 else "at most ") + plural(result.bin_minutes, "minute")
    legend = f"{plural(len(result.bins), 'bin')} of {each}"
    if sizes != [1]:
        legend += ": ▀ mean" + (", ░ from the lowest step to the highest" if result.min is not None else "")
    console.print(legend)
    empty = sum(not b.steps for b in result.bins)
    if empty:
        console.print(f"╌ {plural(empty, 'bin')} without a complete step that has tokens")
    if result.rearrangements:
        count = plural(len(result.rearrangements), "rearrangement")
        console.print(
            f"▲ {count}, at {listed([step_label(console, step) for step in result.rearrangements])}"
        )
    if len(result.configurations) > 1:
        console.print("◆ ep_size or the number of slots changed, or a rank was lost")


def plot(result: Timeline, width: int) -> list[Text]:
    """A chart of the bins as lines of text, ``width`` columns and the labels of the axis."""
    from rich.text import Text

    repeat = columns_of_steps(width, result.bins)
    low, high = _range(result)
    digits = 3 if high - low >= 0.01 else 5

    def level(value: float) -> int:
        return round((value - low) / (high - low) * (2 * HEIGHT - 1))

    lines = []
    for row in reversed(range(HEIGHT)):
        labelled = row in (0, HEIGHT // 2, HEIGHT - 1)
        at = low + (high - low) * (row * 2 + (row == HEIGHT - 1)) / (2 * HEIGHT - 1)
        line = Text(f"{figure(at, digits):>{MARGIN - 2}} ┤" if labelled else " " * (MARGIN - 1) + "│")
        for b in result.bins:
            mark, style = _mark(b, row, level)
            line.append(mark * repeat, style)
        lines.append(line)
    return [*lines, *_axis(result, repeat)]


def _range(result: Timeline) -> tuple[float, float]:
    """The range of values of the plot. A constant is drawn in the middle."""
    means = [b.mean for b in result.bins if b.mean is not None]
    low = min(means, default=0.0) if result.min is None else result.min
    high = max(means, default=0.0) if result.max is None else result.max
    margin = 0.0 if high - low > 1e-9 else 0.1 * abs(low) or 0.1
    return low - margin, high + margin


def _mark(b: Bin, row: int, level: Callable[[float], int]) -> tuple[str, str]:
    """The character of a bin in one row of the plot, and its style. A row has two levels."""
    if b.mean is None:
        return " ", ""
    mean = level(b.mean)
    if mean // 2 == row:
        return "▄▀"[mean % 2], "bold"
    if b.min is None or b.max is None:
        return " ", ""
    return ("░", "dim") if level(b.min) // 2 <= row <= level(b.max) // 2 else (" ", "")


def _axis(result: Timeline, repeat: int) -> list[Text]:
    from rich.text import Text

    starts = [b.first_step for b in result.bins]
    shapes = [stretch.first_step for stretch in result.configurations[1:]]
    symbols = ["─" if b.steps else "╌" for b in result.bins]
    line = step_axis(result.bins, symbols, {"▲": result.rearrangements, "◆": shapes}, repeat)
    labels, last = "", str(result.bins[-1].last_step)
    for i in range(0, len(starts), max(1, len(starts) // 5)):
        name = f"{starts[i]} "
        if len(labels) <= i * repeat <= len(line) - len(last) - len(name):
            labels = labels.ljust(i * repeat) + name
    labels = labels.ljust(len(line) - len(last)) + last
    return [Text(" " * (MARGIN - 1) + "└" + line), Text(f"{'step':>{MARGIN - 2}}  {labels}")]
