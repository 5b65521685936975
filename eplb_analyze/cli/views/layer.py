"""Shows the load of each rank, expert and slot of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import AT_LEAST, heat, print_hot_experts, print_sparkline
from eplb_analyze.cli.console import (
    minute_text,
    print_heading,
    print_line,
    print_notes,
    range_text,
    step_label,
    table,
)
from eplb_analyze.text import counter, figure, listed, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.layer_report import ExpertLoad, LayerMinutes, LayerReport

#: Up to this many experts, all are shown.
FEW_EXPERTS = 12


def render(
    console: Console,
    report: LayerReport,
    placed: LayerReport,
    top: int = 5,
    *,
    ordered: bool = True,
    asked: int | None = None,
) -> None:
    """Print a report.

    Args:
        placed: covers only its steps since the last change of placement.
        ordered: whether steps are in time order.
        asked: the only step that was asked for.
    """
    print_heading(console, f"layer {report.layer}", f" · {report.model} · run {report.run_id}")
    when = step_label(console, report.first_step)
    if report.steps > 1:
        when = f"{report.steps:,} steps, {range_text(console, report.first_step, report.last_step)}"
    print_line(console, f"{when}, {report.phase}" if report.phase else when)
    if report.minutes is not None:
        print_line(console, (_source(console, report.minutes, asked), "yellow"))
    if not report.complete and report.steps == 1:
        ranks = ", ".join(map(str, report.missing_ranks))
        text = f"INCOMPLETE: rank {ranks} not recorded in this step; the loads below are only a part"
        print_line(console, (text, "bold red"))
    loads = [r.load for r in report.ranks]
    count, total = counter(loads), sum(loads)
    mean, hottest = total / len(loads), max(report.ranks, key=lambda r: r.load)
    of_steps = ", means of the steps" if report.steps > 1 else ""
    if report.minutes is not None and report.minutes.summed_balancedness is not None:
        balance = figure(report.minutes.summed_balancedness)
        print_line(console, f"balancedness of loads summed per minute {balance}; that of steps is not known")
    else:
        console.print(
            f"balancedness {figure(report.balancedness)}, imbalance {figure(report.imbalance)}{of_steps}; "
            f"idle {percent(report.idle_fraction)}"
        )
    if report.active_experts is not None:
        of_steps = ", mean of the steps" if report.steps > 1 else ""
        most = figure(report.active_experts, 1)
        console.print(f"most active experts (at least one token) on one rank: {most}{of_steps}")
    tokens = f"{counter([total])(total)} tokens"
    if not mean:
        console.print("no tokens")
    elif hottest.load == min(loads):
        console.print(f"{tokens}, the same on all ranks")
    else:
        times = f"{hottest.load / mean:.2f}"
        summed = ", summed over the steps" if report.steps > 1 else ""
        console.print(f"{tokens}{summed}; hottest: rank {hottest.rank} with {times}x the mean")
    print_notes(console, report.notes)
    print_sparkline(
        console,
        f"balancedness {'over time' if ordered else 'by step, in no known order'}",
        report.timeline,
        marks=[(step, "rearrangement") for step in report.placement_changes],
        times=ordered,
    )
    console.print()
    _ranks(console, report, count, mean)
    if report.experts:
        _experts(console, report, top)
    if report.minutes is not None and report.minutes.hot_experts:
        print_hot_experts(console, report.minutes.hot_experts, top, AT_LEAST)
    _slots(console, placed, since_change=bool(report.placement_changes))


def _source(console: Console, minutes: LayerMinutes, asked: int | None) -> str:
    """That figures are of whole minutes, and of which."""
    first, last = (minute_text(console, minute) for minute in (minutes.first_minute, minutes.last_minute))
    which = first if first == last else f"{first} to {last}"
    if asked is None:
        return f"figures come from per-minute sums ({which}); single steps are not kept"
    return f"step {asked} is kept only in per-minute sums: figures cover its minute, {which}"


def _ranks(console: Console, report: LayerReport, count: Callable[[float], str], mean: float) -> None:
    """A grid of cells, colored by load over the mean."""
    from rich.table import Table
    from rich.text import Text

    cells = [(f"r{r.rank}", count(r.load), r.load / mean if mean else 0.0) for r in report.ranks]
    width = max(len(load) for _, load, _ in cells)
    tag = max(len(rank) for rank, _, _ in cells)
    per_row = max(1, min(16, (console.width - 2) // (tag + width + 4)))
    # Rows of 2, 4, 8 or 16 ranks are easy to count in.
    while per_row & (per_row - 1):
        per_row -= 1
    print_line(console, ("tokens by EP rank", "bold"))
    grid = Table.grid(padding=(0, 1, 0, 0))
    for start in range(0, len(cells), per_row):
        row = []
        for rank, load, times in cells[start : start + per_row]:
            row.append(Text.assemble((f"{rank:>{tag}} ", "dim"), heat(f" {load:>{width}} ", times)))
        grid.add_row(*row)
    console.print(grid)
    console.print()


def _experts(console: Console, report: LayerReport, top: int) -> None:
    ordered = sorted(report.experts, key=lambda e: (-e.load, e.logical))
    if len(ordered) <= max(FEW_EXPERTS, 2 * top):
        _expert_table(console, report, "experts, the hottest first", ordered)
        return
    of = f" ({top} of {len(ordered)})"
    _expert_table(console, report, f"hottest experts{of}", ordered[:top])
    _expert_table(console, report, f"coldest experts{of}", ordered[-top:][::-1])


def _expert_table(console: Console, report: LayerReport, title: str, experts: list[ExpertLoad]) -> None:
    mean = sum(e.load for e in report.experts) / len(report.experts)
    count = counter(e.load for e in experts)
    columns = ("expert", "tokens", "share", "x mean", "replicas", "<on ranks (tokens)")
    listing = table(console, *columns, title=title)
    for e in experts:
        times = e.load / mean if mean else 0.0
        places = listed([f"r{r.rank} ({count(r.load)})" for r in e.ranks], 4)
        share, hot = percent(e.share, 2), heat(f"{times:.2f}", times)
        listing.add_row(str(e.logical), count(e.load), share, hot, str(e.replicas), places)
    console.print(listing)
    console.print()


def _slots(console: Console, report: LayerReport, *, since_change: bool) -> None:
    """The placement: a row a rank, each slot's logical expert colored by the slot's load."""
    from rich.text import Text

    if all(slot.logical is None for slot in report.slots):
        return
    mean = sum(s.load for s in report.slots) / len(report.slots)
    count = counter(r.load for r in report.ranks)
    digits = max(len(str(s.logical)) for s in report.slots)
    title = (
        f"placement since {step_label(console, report.first_step)}, with the tokens since"
        if since_change
        else "placement"
    )
    listing = table(console, "rank", "tokens", "<experts in its slots", title=title)
    per_line = max(1, (console.width - 20) // (digits + 2))
    for rank in report.ranks:
        cells = Text()
        for i, slot in enumerate(s for s in report.slots if s.rank == rank.rank):
            if i and i % per_line == 0:
                cells.append("\n")
            name = "·" if slot.logical is None or slot.logical < 0 else str(slot.logical)
            times = slot.load / mean if mean else 0.0
            cells.append_text(heat(f" {name:>{digits}} ", times))
        listing.add_row(f"r{rank.rank}", count(rank.load), cells)
    console.print(listing)
    empty = sum(slot.logical == -1 for slot in report.slots)
    if empty:
        console.print(f"{plural(empty, 'slot')} without an expert (·)")
