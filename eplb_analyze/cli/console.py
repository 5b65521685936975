"""Text on a console: lines, headings, notes and tables.

Names in a dump may come from a stranger. Everything here passes :func:`clean`, and rich's markup is never
interpreted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from eplb_analyze.text import clean, command_line, iso, listed, plural

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from eplb_analyze.analysis.experts import ExpertReport
    from eplb_analyze.analysis.experts_minutes import MinuteExperts
    from eplb_analyze.analysis.traffic import TrafficReport
    from eplb_analyze.reader.clock import RunClock
    from eplb_analyze.reader.configurations import SumsReport

#: Nothing is drawn wider: the memory of a plot grows with its columns.
MAX_COLUMNS = 1000


def console(
    file: IO[str],
    clock: RunClock | None = None,
    paste: Callable[[str], str] = command_line,
    **options: Any,
) -> Console:
    """A console; if it is not a terminal, it has 80 columns or what COLUMNS says.

    Args:
        clock: of the run whose steps are printed on it, for :func:`step_label` and the like.
        paste: adds to a command what it is about, for :func:`full_command`.
        options: further ones of rich's console.
    """
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    width = None
    if not file.isatty():
        width = min(int(columns), MAX_COLUMNS) if re.fullmatch("0*[1-9][0-9]{0,8}", columns) else 80
    settings = {"width": width, "highlight": False, "markup": False, "emoji": False, "soft_wrap": False}
    made = Console(file=file, **{**settings, **options})
    made.run_clock = clock  # type: ignore[attr-defined]
    made.paste = paste  # type: ignore[attr-defined]
    return made


def full_command(console: Console, command: str) -> str:
    """A command to paste into a shell, about the run that the console's text is about."""
    paste: Callable[[str], str] = getattr(console, "paste", command_line)
    return paste(command)


def step_label(console: Console, step: int) -> str:
    """``step 1000 (03:12:04)``; without the time if it is not known."""
    clock = _clock(console)
    return f"step {step}" if clock is None else clock.label(step)


def steps_label(console: Console, first: int, last: int) -> str:
    """``steps 1000-1999 (03:12:04-03:31:58)``; a range of one step is that step's label."""
    clock = _clock(console)
    if clock is not None:
        return clock.range_label(first, last)
    return f"steps {first}-{last}" if first != last else f"step {first}"


def range_text(console: Console, first: int, last: int) -> str:
    """:func:`steps_label` without the word: ``1000-1999 (03:12:04-03:31:58)``."""
    return steps_label(console, first, last).split(" ", 1)[1]


def step_time(console: Console, step: int) -> str:
    """The time of a step for a cell of a table, ``03:12:04``; empty if it is not known."""
    clock = _clock(console)
    return "" if clock is None else clock.time(step)


def minute_text(console: Console, unix_ns: int) -> str:
    """A clock minute, ``03:12``, with its date if the run spans days."""
    clock = _clock(console)
    return (iso(unix_ns) or "") if clock is None else clock.text(unix_ns)[: -len(":00")]


def times_known(console: Console) -> bool:
    """Whether a table of steps has a column of times."""
    clock = _clock(console)
    return clock is not None and clock.known


def _clock(console: Console) -> RunClock | None:
    found: RunClock | None = getattr(console, "run_clock", None)
    return found


def styled(*parts: str | tuple[str, str]) -> Text:
    """A text of plain parts and ``(part, style)`` parts."""
    from rich.text import Text

    texts = [(part, "") if isinstance(part, str) else part for part in parts]
    if len(texts) == 1:
        text, style = texts[0]
        return Text(clean(text), style=style)
    return Text.assemble(*((clean(text), style) for text, style in texts))


def print_line(
    console: Console, *parts: str | tuple[str, str], indent: int = 0, soft_wrap: bool = False
) -> None:
    """Print plain parts and ``(part, style)`` parts as one line, wrapped to the console's width."""
    from rich.padding import Padding

    text = styled(*parts)
    console.print(Padding(text, (0, 0, 0, indent)) if indent else text, soft_wrap=soft_wrap)


def print_fields(console: Console, fields: Iterable[tuple[str, str]], indent: int = 0) -> None:
    """Print ``name  text`` lines, the texts below each other and wrapped there.

    The text of ``next`` is a command to be copied, so it is not wrapped.
    """
    from rich.padding import Padding
    from rich.table import Table

    fields = list(fields)
    wide = max((len(name) for name, _ in fields), default=0)
    for name, text in fields:
        if name == "next":
            print_line(console, " " * indent, (f"{name:<{wide}}", "dim"), f"  {text}", soft_wrap=True)
            continue
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=wide)
        grid.add_column(overflow="fold")
        grid.add_row(styled((name, "dim")), styled(text))
        console.print(Padding(grid, (0, 0, 0, indent)))


def print_heading(console: Console, name: str, rest: str = "") -> None:
    print_line(console, (name, "bold"), rest)


def print_report_heading(console: Console, report: TrafficReport | ExpertReport) -> str:
    """Print which model, layer and run a report is about. Returns over which steps it is."""
    print_report_name(console, report)
    return steps_of(console, report)


def print_report_name(console: Console, report: TrafficReport | ExpertReport | MinuteExperts) -> None:
    """Print which model, layer and run a report is about."""
    name = report.model if report.layer is None else f"layer {report.layer}"
    of = "" if report.layer is None else f" · {report.model}"
    print_heading(console, name, f"{of} · run {report.run_id}")


def steps_of(console: Console, report: SumsReport) -> str:
    """Over which steps the figures of a report are."""
    kind = "incomplete" if report.missing_ranks else "complete"
    count = plural(report.recorded, f"{kind} step")
    return f"{count}, {range_text(console, report.first_step, report.last_step)}"


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print what limits the figures that follow."""
    for note in notes:
        print_line(console, (f"note: {note}", "yellow"))


def table(console: Console, *columns: str, title: str | None = None) -> Table:
    """Print the title and return an empty table. A column named ``<…`` holds text, any other numbers."""
    from rich import box
    from rich.table import Table

    if title is not None:
        print_line(console, (title, "bold"))
    result = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else box.SIMPLE,
        header_style="bold",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
    )
    for name in columns:
        justify: Any = "left" if name.startswith("<") else "right"
        result.add_column(styled(name.lstrip("<")), justify=justify)
    return result


def print_hidden(console: Console, columns: Iterable[str], wide: int) -> None:
    """Name the columns of a table that there was no room for; a console of ``wide`` columns shows them."""
    names = [name.lstrip("<").partition(",")[0] for name in columns]
    if names:
        text = f"hidden at this width: {listed(names, 10)} (use --json, or a terminal of {wide} columns)"
        print_line(console, (text, "dim"))


def limited(shown: int, total: int) -> str:
    """`` (5 of 20)`` for a table that shows only part of its rows."""
    return f" ({shown} of {total:,})" if total > shown else ""
