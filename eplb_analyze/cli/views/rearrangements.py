"""Shows whether each rearrangement helped, and why not as predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import (
    full_command,
    print_fields,
    print_heading,
    print_line,
    print_notes,
    step_time,
    steps_label,
    styled,
    table,
    times_known,
)
from eplb_analyze.text import figure, interval, listed, milliseconds, plural, signed

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.milliseconds import Milliseconds
    from eplb_analyze.analysis.rearrangements import RearrangementFigures, RearrangementReport

#: From this many columns on, the table has room for whole verdicts.
WIDE = 100

#: So many rearrangements are told in words, and so many layers are listed one by one.
TOLD, FEW_LAYERS = 5, 6

#: Verdicts that are shortened to fit 80 columns; the interval beside them has the details.
SHORT = {"no measurable gain": "no gain seen"}

STYLES = {
    "helped": "green",
    "helped at first": "green",
    "hurt": "bold red",
    "no measurable gain": "yellow",
}


def render(console: Console, report: RearrangementReport) -> None:
    print_heading(console, "rearrangements", f" · {report.model} · run {report.run_id}")
    print_notes(console, report.notes)
    rows = report.rearrangements
    if not rows:
        _none(console, report)
        return
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    console.print(f"{plural(len(rows), 'rearrangement')}, by balancedness: {told}")
    _none_pays(console, rows)
    for row in rows[:TOLD]:
        _sentences(console, row)
    if len(rows) > TOLD:
        print_line(console, f"and {len(rows) - TOLD:,} more: the tables have all of them", indent=2)
    console.print()
    _help(console, report)
    _why(console, rows)
    _milliseconds(console, rows)


def _none(console: Console, report: RearrangementReport) -> None:
    """Why there is no rearrangement, and what to run next."""
    from eplb_analyze.report import answer

    if report.overdue is not None:
        print_line(
            console,
            (answer.TITLES["eplb_never_acted"], "bold red"),
            f": {report.overdue}, and no placement changed.",
        )
    elif report.not_due is not None:
        print_line(console, report.not_due)
    elif report.notes:
        print_line(console, "no rearrangement is known")
    else:
        print_line(console, "no rearrangement: the placement never changed in these steps")
    if report.overdue is not None or report.not_due is not None:
        print_fields(console, [("next", full_command(console, "advise"))], indent=2)


def _none_pays(console: Console, rows: Sequence[RearrangementFigures]) -> None:
    """That none pays for its pause, whatever it does to balancedness."""
    known = [
        row.pause_ms.estimate for row in rows if row.pause_ms is not None and row.gain_ms_per_step is not None
    ]
    if known and all(row.break_even_steps is None for row in rows):
        who = "it does not pay" if len(rows) == 1 else f"none of the {len(known):,} measured pays"
        print_line(console, f"In time, {who} for its pause ({milliseconds(sum(known))} in all).")
        print_fields(console, [("next", full_command(console, "advise"))], indent=2)


def _sentences(console: Console, row: RearrangementFigures) -> None:
    """One rearrangement in words: what it changed, its gain and pause in ms, when it pays, what it moved."""
    style = STYLES.get(row.verdict, "dim")
    when = steps_label(console, row.first_step, row.last_step)
    print_line(console, (when, "bold"), ": ", (row.verdict, style), indent=2)
    numbers = row.layer_numbers
    few = len(numbers) <= FEW_LAYERS
    layers = ("layer " if len(numbers) == 1 else "layers ") + (
        listed(numbers) if few else f"{_ranges(numbers)} ({len(numbers)})"
    )
    slots = "" if row.slots_moved is None else f"{plural(row.slots_moved, 'slot')} in "
    fetched = row.experts_crossed_ranks
    moved = "" if fetched is None else f"; ranks fetched the weights of {plural(fetched, 'expert')}"
    if row.moved_gb is not None:
        moved += f", {row.moved_gb:,.1f} GB"
    parts = [("changed", f"{slots}{layers}{moved}")]
    if row.gain is not None:
        before, after = row.before.balancedness, row.after.balancedness
        parts.append(("balance", f"{figure(before)} before, {figure(after)} after ({signed(row.gain)})"))
    time = _time(row)
    if time:
        parts.append(("time", time))
    print_fields(console, parts, indent=4)


def _time(row: RearrangementFigures) -> str:
    """Gain, pause and break-even in one sentence; empty if neither is known."""
    gain, pause = row.gain_ms_per_step, row.pause_ms
    if gain is None and pause is None:
        return ""
    paused = "pause not measurable" if pause is None else f"paused {milliseconds(pause.estimate)}"
    if gain is None:
        return f"{paused}; gain in ms not measurable"
    if gain.low <= 0 <= gain.high:
        gained = "no measurable gain in ms per step"
    else:
        verb = "saves" if gain.estimate > 0 else "costs"
        gained = f"{verb} {milliseconds(abs(gain.estimate))} per step"
    if row.break_even_steps is not None:
        return f"{paused}, {gained}: pays for itself after {plural(row.break_even_steps, 'step')}"
    pays = "" if pause is None or gain.low > 0 else ": does not pay for its pause"
    return f"{paused}, {gained}{pays}"


def _ranges(numbers: list[int]) -> str:
    """``3-10, 12-60``: consecutive numbers as ranges."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return listed([f"{a}-{b}" if a < b else str(a) for a, b in ranges])


def _help(console: Console, report: RearrangementReport) -> None:
    title = f"balancedness, means of up to {report.window:,} steps before and after (1 is perfect)"
    columns = ("<steps", "before", "predicted", "after", "gain", "95% interval", "<")
    listing = table(console, *columns, title=title)
    short = SHORT if console.width < WIDE else {}
    for row in report.rearrangements:
        listing.add_row(
            _when(row),
            figure(row.before.balancedness),
            figure(row.predicted),
            figure(row.after.balancedness),
            signed(row.gain),
            interval(row.gain_low, row.gain_high),
            styled((short.get(row.verdict, row.verdict), STYLES.get(row.verdict, "dim"))),
        )
    console.print(listing)
    for row in report.rearrangements:
        if row.reason is not None:
            print_line(
                console, (f"{steps_label(console, row.first_step, row.last_step)}: {row.reason}", "yellow")
            )
    console.print()


def _why(console: Console, rows: list[RearrangementFigures]) -> None:
    """What explains the difference between predicted and measured, how long the gain lasted, what moved."""
    title = "why after differs from predicted; steps until half the gain was gone; what moved"
    timed = times_known(console)
    columns = (
        "<steps",
        *(("<time",) if timed else ()),
        "drift",
        "uneven",
        "lasted",
        "slots",
        "to ranks",
        "to nodes",
    )
    listing = table(console, *columns, title=title)
    for row in rows:
        lasted = "–"
        if row.lasted is not None:
            still = "" if row.lasted.until == "half gone" else "≥ "
            lasted = f"{still}{row.lasted.steps:,}"
        moved = (row.slots_moved, row.experts_crossed_ranks, row.experts_crossed_nodes)
        cells = ["–" if count is None else f"{count:,}" for count in moved]
        time = (step_time(console, row.first_step),) if timed else ()
        listing.add_row(_when(row), *time, signed(row.drift), signed(row.uneven_split), lasted, *cells)
    console.print(listing)


def _milliseconds(console: Console, rows: list[RearrangementFigures]) -> None:
    """What each cost and gains, and after how many steps it has paid."""
    console.print()
    known = [row for row in rows if row.pause_ms is not None or row.gain_ms_per_step is not None]
    if known:
        title = "what it cost and gains in time, with 95% intervals"
        listing = table(console, "<steps", "pause", "gain per step", "paid after", title=title)
        for row in known:
            steps = "–" if row.break_even_steps is None else plural(row.break_even_steps, "step")
            cells = (_ms(row.pause_ms), _ms(row.gain_ms_per_step, sign=True), steps)
            listing.add_row(_when(row), *cells)
        console.print(listing)
        legend = (
            "pause: how much longer than usual the steps at the change took; gain: how much less the tokens "
            "of later steps cost under the new placement than they would under the old one"
        )
        print_line(console, (legend, "dim"))
    reasons = Counter(f"pause not measurable: {row.pause_reason}" for row in rows if row.pause_reason)
    reasons.update(f"gain in ms not measurable: {row.gain_ms_reason}" for row in rows if row.gain_ms_reason)
    for reason, count in reasons.items():
        of = "" if count == len(rows) else f" ({plural(count, 'rearrangement')})"
        print_line(console, (f"{reason}{of}", "yellow"))


def _ms(value: Milliseconds | None, sign: bool = False) -> str:
    return "–" if value is None else milliseconds(value.estimate, value.low, value.high, sign=sign)


def _when(row: RearrangementFigures) -> str:
    return str(row.first_step) if row.first_step == row.last_step else f"{row.first_step}-{row.last_step}"
