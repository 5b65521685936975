"""Shows the runs of a dump, one line each, in as many columns as fit."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import full_command, print_heading, print_line
from eplb_analyze.text import clean, duration, listed, plural
from eplb_dump.format.frozen import frozen

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.batch.runs import RunLine, RunList

#: So many damaged runs are explained.
MAX_FAULTS = 10
GAP = "  "


@frozen
class _Column:
    name: str
    text: Callable[[RunLine], str]
    #: Numbers are aligned right.
    number: bool = False
    style: Callable[[RunLine], str] = lambda line: ""


def _state(line: RunLine) -> str:
    return "damaged" if line.fault else line.state


def _state_style(line: RunLine) -> str:
    return {"damaged": "bold red", "not closed": "yellow", "open": "green"}.get(_state(line), "")


def _incomplete(line: RunLine) -> str:
    missing = line.ranks_expected is None or line.ranks_present < line.ranks_expected
    return "yellow" if missing else ""


def _ranks(line: RunLine) -> str:
    """``31/32`` wrote; or ``sum of 32``, which one rank wrote."""
    if line.scope == "global":
        return f"sum of {line.ep_size}"
    return f"{line.ranks_present}/{'–' if line.ranks_expected is None else line.ranks_expected}"


def _engine(line: RunLine) -> str:
    if line.engine is None:
        return "–" if line.imported_from is None else f"from {line.imported_from}"
    return f"{line.engine} {line.engine_version or ''}".rstrip()


def _start(line: RunLine) -> str:
    return "–" if line.start is None else f"{datetime.fromisoformat(line.start):%Y-%m-%d %H:%M:%S}"


def _end(line: RunLine) -> str:
    if line.start is None or line.end is None:
        return "–"
    first, last = datetime.fromisoformat(line.start), datetime.fromisoformat(line.end)
    return f"{last:%H:%M:%S}" if first.date() == last.date() else f"{last:%m-%d %H:%M:%S}"


def _size(line: RunLine) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if line.size_bytes >= unit:
            return f"{line.size_bytes / unit:.1f} {name}"
    return f"{line.size_bytes} B"


def _columns() -> list[_Column]:
    return [
        _Column("run", lambda line: line.run_id),
        _Column("model", lambda line: line.model or "–"),
        _Column("engine", _engine),
        _Column("start", _start),
        _Column("end", _end),
        _Column("duration", lambda line: duration(line.duration_seconds), number=True),
        _Column(
            "ranks",
            _ranks,
            number=True,
            style=_incomplete,
        ),
        _Column("steps", lambda line: f"{line.steps:,}", number=True),
        _Column("kept", lambda line: "+".join(line.tiers) or "–"),
        _Column("state", _state, style=_state_style),
        _Column("size", _size, number=True),
    ]


#: Columns that are left out if the lines are too long, one by one.
_LEFT_OUT = ("end", "size", "engine", "model", "duration")


def render(console: Console, result: RunList) -> None:
    lines = result.runs
    columns = _columns()
    if all(line.tiers in ([], ["full"]) for line in lines):
        columns = [column for column in columns if column.name != "kept"]
    of = ""
    for name, word in (("model", "of"), ("engine", "on")):
        column = next(column for column in columns if column.name == name)
        values = {column.text(line) for line in lines if line.ranks_expected is not None}
        if len(values) == 1 and "–" not in values:  # say once what is the same for all
            columns.remove(column)
            value = values.pop()
            of += f" {value}" if value.startswith("from ") else f" {word} {value}"
    runs = len({line.run_id for line in lines})
    print_heading(console, plural(runs, "run"), f"{of}{', newest last' if runs > 1 else ''}; times in UTC")
    console.print()
    cells = {c.name: [clean(c.text(line)) for line in lines] for c in columns}
    widths = {name: max(map(len, [name, *texts])) for name, texts in cells.items()}
    hidden = []
    for name in _LEFT_OUT:
        if sum(widths.values()) + len(GAP) * (len(widths) - 1) <= console.width:
            break
        if name in widths:
            del widths[name]
            hidden.append(name)
    shown = [column for column in columns if column.name in widths]

    def padded(column: _Column, text: str) -> str:
        if column.number:
            return text.rjust(widths[column.name])
        return text if column is shown[-1] else text.ljust(widths[column.name])

    print_line(console, (GAP.join(padded(c, c.name) for c in shown), "bold"), soft_wrap=True)
    for number, line in enumerate(lines):
        parts = [(padded(c, cells[c.name][number]), c.style(line)) for c in shown]
        spaced = [part for pair in zip(parts, [GAP] * len(parts), strict=True) for part in pair][:-1]
        print_line(console, *spaced, soft_wrap=True)
    _notes(console, lines, hidden)


def _notes(console: Console, lines: list[RunLine], hidden: list[str]) -> None:
    damaged = [line for line in lines if line.fault]
    if damaged:
        console.print()
    for line in damaged[:MAX_FAULTS]:
        print_line(console, ("damaged ", "bold red"), f"run {line.run_id}: {line.fault}")
    if len(damaged) > MAX_FAULTS:
        print_line(console, f"and {len(damaged) - MAX_FAULTS:,} more damaged runs; --json explains all")
    notes = []
    if any(line.scope == "global" for line in lines):
        notes.append("sum of N: one rank recorded the sum over N EP ranks")
    if any(_state(line) == "not closed" for line in lines):
        notes.append(
            "not closed: its writers did not end it and wrote nothing in the last minute. The engine is idle "
            f"or crashed; after a crash, `{full_command(console, 'recover')}` finishes the files"
        )
    if any(line.tiers not in ([], ["full"]) for line in lines):
        notes.append(
            "kept: full: experts' loads of every step; ranks: tokens per EP rank of every step; minutes: "
            "sums per minute; gone: nothing"
        )
    if hidden:
        notes.append(f"hidden at this width: {listed(hidden)} (use --json, or a wider terminal)")
    if notes:
        console.print()
    for note in notes:
        print_line(console, (note, "dim"))
