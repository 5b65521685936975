"""Shows the runs of `postmortem`, the costliest first, and those that are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import (
    limited,
    print_fields,
    print_heading,
    print_hidden,
    print_line,
    styled,
    table,
)
from eplb_analyze.text import clean, command_line, duration, figure, listed, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from eplb_analyze.batch.comparison import Postmortem
    from eplb_analyze.batch.rows import Row

#: From this many columns on, the table shows engine, EP size, steps and 5th percentile.
WIDE = 150
#: Columns between two cells of the table; and the least that a name is cut to.
GAP, LEAST_NAME = 3, 12


def render(console: Console, result: Postmortem, by: str | None, top: int, save: Path | None = None) -> None:
    rows = result.rows
    names = _names(rows)
    runs = [row for row in rows if row.run_id]
    known = [row for row in rows if row.status != "broken"]
    print_heading(console, plural(len(runs), "run"), _counts(rows))
    if known:
        print_line(console, _lost(known))
    rolled_up = sum(row.tier == "minutes" for row in rows)
    if rolled_up:
        text = f"figures of {plural(rolled_up, 'run')} come from per-minute sums, as not all steps are kept"
        print_line(console, (text, "yellow"))
    console.print()
    if by is not None:
        _groups(console, result, by)
    if known:
        _runs(console, known[:top], names, len(known), result)
        print_fields(console, [("next", _next_command(rows, known[0]))])
    for status, style in (("incomplete", "yellow"), ("broken", "bold red")):
        _reasons(console, result, names, status, style, top)
    _verdict(console, result, names)
    if save is not None:
        console.print()
        print_line(console, f"saved: {save}: runs.parquet, reports/", soft_wrap=True)


def _lost(rows: list[Row]) -> str:
    """The measured time that GPUs lost, and in how many runs it is known."""
    status = [row.cost_status for row in rows]
    measured, free = (status.count(name) for name in ("measured", "no_measurable_cost"))
    parts = [f"no measurable cost in {plural(free, 'run')}"] if free else []
    unknown = len(rows) - measured - free
    parts += [f"unknown in {plural(unknown, 'run')}"] if unknown else []
    if measured:
        seconds = sum(row.lost_rank_seconds or 0.0 for row in rows)
        covered = [(row.cost_covers or 0.0, row.steps) for row in rows if row.cost_status == "measured"]
        share = sum(own * steps for own, steps in covered) / max(1, sum(steps for _, steps in covered))
        where = f"{plural(measured, 'run')}" + (
            f" ({percent(share, 0)} of the steps)" if share < 0.995 else ""
        )
        parts = [f"{duration(seconds)} of GPU time lost, measured in {where}", *parts]
    return f"imbalance: {'; '.join(parts)}"


def _next_command(rows: list[Row], row: Row) -> str:
    """The command that shows more of a run."""
    several = sum((other.dump, other.run_id) == (row.dump, row.run_id) for other in rows) > 1
    return command_line("summary", row.dump, run=row.run_id, model=row.model if several else None)


def _names(rows: list[Row]) -> dict[int, str]:
    """A name for each run, by ``id(row)``: its run id, or its dump's folder if several dumps have that id."""
    dumps: dict[str, set[str]] = {}
    of_dump: dict[str, set[str]] = {}
    for row in rows:
        dumps.setdefault(row.run_id, set()).add(row.dump)
        of_dump.setdefault(row.dump, set()).add(row.run_id)
    # The query of a bucket's address is long, and the same for all.
    folders = {row.dump: row.dump.partition("?")[0] if "://" in row.dump else row.dump for row in rows}
    shared = _shared_folders(list(folders.values()))

    def name(row: Row) -> str:
        if not row.run_id or len(dumps[row.run_id]) == 1:
            return row.run_id
        folder = folders[row.dump][shared:].lstrip("/")
        return folder if len(of_dump[row.dump]) == 1 else f"{folder} {row.run_id}"

    return {id(row): name(row) for row in rows}


def _shared_folders(paths: list[str]) -> int:
    """The length of the folders that all paths start with; at least one folder of each path remains."""
    parts = [path.split("/")[:-1] for path in paths]
    shared = 0
    for folders in zip(*parts, strict=False):
        if len(set(folders)) > 1:
            break
        shared += len(folders[0]) + 1
    return shared


def _reasons(
    console: Console, result: Postmortem, names: dict[int, str], status: str, style: str, top: int
) -> None:
    rows = [row for row in result.rows if row.status == status]
    several = len({row.model for row in result.rows if row.model}) > 1
    if rows:
        console.print()
    for row in rows[:top]:
        of = f" of {row.model}" if several and row.model else ""
        where = f"run {names[id(row)]}{of}: " if names[id(row)] else ""
        print_line(console, (f"{status} ", style), f"{where}{row.reason}")
    if len(rows) > top:
        console.print(f"and {len(rows) - top} more {status}; --json lists all")


def _counts(rows: list[Row]) -> str:
    counts = dict.fromkeys(("complete", "incomplete", "broken"), 0)
    for row in rows:
        counts[row.status] += bool(row.run_id)
    empty = sum(not row.run_id for row in rows)
    found = [f"{count:,} {name}" for name, count in counts.items() if count]
    found += [f"{plural(empty, 'place')} without a run"] if empty else []
    return "".join(f" · {text}" for text in found)


def _runs(console: Console, rows: list[Row], names: dict[int, str], of: int, result: Postmortem) -> None:
    wide = console.width >= WIDE
    several = len({row.model for row in rows}) > 1
    failed = {id(row) for row in result.failed}

    def balance(row: Row) -> Text:
        return styled((figure(row.balancedness), "bold red" if id(row) in failed else ""))

    def helped(row: Row) -> str:
        return f"{row.helped} of {row.judged}" if row.judged else "–" if row.rearrangements else "none"

    # A narrow table has no room for all: incomplete runs are listed below it, too.
    columns: list[tuple[str, bool, Callable[[Row], str | Text]]] = [
        ("<engine", wide, lambda row: _short(row.engine or "–", 12)),
        ("EP", wide, lambda row: str(row.ep_size)),
        ("steps", wide, lambda row: f"{row.steps:,}"),
        ("<began, UTC", wide, lambda row: (row.first_time or "–")[:16].replace("T", " ")),
        ("lost", True, _lost_of),
        ("idle", True, lambda row: percent(row.idle_fraction)),
        ("balance", True, balance),
        ("p5", wide, lambda row: figure(row.balancedness_p5)),
        ("<incidents", True, lambda row: _incidents(row, wide and not several)),
        (
            "worst",
            wide,
            lambda row: f"l{row.worst_layer} r{row.worst_rank}" if row.worst_rank is not None else "–",
        ),
        ("helped", wide or not (result.baseline or several), helped),
        *([("vs base", True, lambda row: signed(row.difference))] if result.baseline else []),
        ("<data", wide, lambda row: styled((row.status, _state_style(row)))),
    ]
    shown = [(name, cell) for name, fits, cell in columns if fits]
    hidden = [name for name, fits, _ in columns if not fits]
    cells = [[cell(row) for _, cell in shown] for row in rows]
    widths = [
        max(map(len, [name.lstrip("<"), *own]))
        for (name, _), own in zip(shown, zip(*cells, strict=True), strict=True)
    ]
    models = [clean(row.model.rpartition("/")[2]) for row in rows] if several else []
    for_name, for_model = _widths(
        console.width - sum(widths) - GAP * (len(widths) + several), [names[id(row)] for row in rows], models
    )
    heads = ["<run", *(["<model"] if several else []), *(name for name, _ in shown)]
    listing = table(console, *heads, title=f"most GPU time lost first{limited(len(rows), of)}")
    for number, row in enumerate(rows):
        name = styled((_short_path(names[id(row)], for_name), "" if wide else _state_style(row)))
        listing.add_row(name, *([_short_path(models[number], for_model)] if several else []), *cells[number])
    console.print(listing)
    legend = (
        "lost: GPU time lost to imbalance, in phases with a measurable cost (– if there are none); idle: "
        "counted in tokens, not time; incidents: their number, and for the worst its layer (L), expert (E) "
        "or rank (R), and start (UTC)"
    )
    legend += "; worst: the least balanced layer and the rank with the most excess tokens" if wide else ""
    legend += (
        "; helped: rearrangements that helped, of those that can be judged" if "helped" not in hidden else ""
    )
    print_line(console, (legend, "dim"))
    print_hidden(console, hidden, WIDE)


def _widths(room: int, names: list[str], models: list[str]) -> tuple[int, int]:
    """How wide the names of runs and of models may be, if all other columns leave this much room."""
    name, model = (max(map(len, texts), default=0) for texts in (names, models))
    for_model = min(model, max(LEAST_NAME, room - name, room // 2))
    return max(LEAST_NAME, room - for_model), for_model


def _state_style(row: Row) -> str:
    return "" if row.status == "complete" else "yellow"


def _incidents(row: Row, wide: bool) -> str:
    """How many, and the worst: ``2: layer 12 expert 77, 03:12``, or ``2: L12 E77 03:12``."""
    if not row.incidents:
        return "none" if row.status != "broken" and row.incidents is not None else "–"
    names = (("layer ", row.incident_layer), ("expert ", row.incident_expert))
    if row.incident_expert is None:
        names = (names[0], ("rank ", row.incident_rank))
    parts = [f"{name if wide else name[0].upper()}{number}" for name, number in names if number is not None]
    since = row.incident_since[11:16] if row.incident_since else f"step {row.incident_first_step}"
    place = f"{' '.join(parts)}{',' if wide else ''} " if parts else ""
    return f"{row.incidents}: {place}{since}"


def _lost_of(row: Row) -> str:
    return "none" if row.cost_status == "no_measurable_cost" else duration(row.lost_rank_seconds)


def _groups(console: Console, result: Postmortem, by: str) -> None:
    listing = table(console, f"<{by}", "runs", "broken", "steps", "balance", "idle", "lost")
    for group in result.groups(by):
        listing.add_row(
            clean(group.value),
            f"{group.runs:,}",
            f"{group.broken:,}",
            f"{group.steps:,}",
            figure(group.balancedness),
            percent(group.idle_fraction),
            duration(group.lost_rank_seconds),
        )
    console.print(listing)
    console.print()


def _verdict(console: Console, result: Postmortem, names: dict[int, str]) -> None:
    asked = []
    if result.fail_below is not None:
        asked.append(f"balancedness of at least {result.fail_below:g}")
    if result.baseline is not None:
        asked.append(f"no worse than {result.baseline}")
    if not asked:
        return
    console.print()
    failed = [names[id(row)] for row in result.failed if result.not_judged(row) is None]
    reasons = [(row, result.not_judged(row)) for row in result.failed]
    unjudged = [f"{names[id(row)] or row.dump} ({reason})" for row, reason in reasons if reason is not None]
    told = [f"{plural(len(failed), 'run')} did not pass: {listed(failed)}"] if failed else []
    told += [f"{len(unjudged):,} cannot be judged: {listed(unjudged)}"] if unjudged else []
    print_line(console, (f"{', '.join(asked)}:", "bold"), " ", ("" if told else "all passed", "green"))
    for text in told:
        print_line(console, (text, "bold red"))


def _short(text: str, width: int) -> str:
    text = clean(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _short_path(text: str, width: int) -> str:
    """Shorten an id in the middle, as ids often differ only at the end, and a path at its beginning."""
    text = clean(text)
    if len(text) <= width:
        return text
    head = 0 if "/" in text else width // 2
    return f"{text[:head]}…{text[head + 1 - width :]}"
