"""Shows the tokens that each rank or node sends to each other one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import heat
from eplb_analyze.cli.console import limited, print_line, print_notes, print_report_heading, styled, table
from eplb_analyze.text import counter, percent

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.traffic import TrafficReport

#: A larger matrix is not printed.
SHOWN = 32


def render(console: Console, report: TrafficReport, top: int = 5) -> None:
    when = print_report_heading(console, report)
    console.print(f"{when}; {counter([report.tokens])(report.tokens)} tokens × experts")
    print_notes(console, report.notes)
    if not report.tokens:
        console.print("no tokens")
        return
    _shares(console, report)
    _layers(console, report)
    console.print()
    _matrix(console, report)
    _receivers(console, report, top)
    _pairs(console, report, top)


def _shares(console: Console, report: TrafficReport) -> None:
    shares, chance = report.shares, report.by_chance
    listing = table(console, "<", "of the tokens", "by chance")
    listing.add_row("stay on their rank", percent(shares.same_rank), percent(chance.same_rank))
    if report.ranks_per_node is not None:
        listing.add_row("go to a rank of the node", percent(shares.same_node), percent(chance.same_node))
        listing.add_row("cross nodes", percent(shares.other_node), percent(chance.other_node))
    console.print(listing)
    if report.ranks_per_node is None:
        console.print("the dump does not say how many ranks a node has (--ranks-per-node does)")


def _layers(console: Console, report: TrafficReport) -> None:
    """The layers from which the most and the fewest tokens leave."""
    by_node = report.ranks_per_node is not None and report.ranks_per_node < report.ep_size
    away = [
        (t.shares.other_node if by_node else 1 - t.shares.same_rank, t.layer)
        for t in report.layers
        if t.shares.same_rank is not None
    ]
    if len(away) > 1:
        (least, low), (most, high) = min(away), max(away)
        what = "tokens that cross nodes" if by_node else "tokens that leave their rank"
        ends = f"{percent(least)} in layer {low} to {percent(most)} in layer {high}"
        console.print(f"{what}: from {ends}")


def _matrix(console: Console, report: TrafficReport) -> None:
    """The percentage of each source's tokens that goes to each destination, in as much detail as fits."""

    size, letter = len(report.matrix), report.by[0]
    label = max(3, len(f"{letter}{size - 1}"))
    room = console.width - label - 1
    width = next((w for w in (6, 3) if w * size <= room), 2)
    if size > SHOWN or width * size > room:
        console.print(f"the matrix of {size} {report.by}s is in --json, or try --by node\n")
        return
    title = f"% of a {report.by}'s tokens (row) that go to each {report.by} (column)"
    print_line(console, (title + (", ++ is 10 or more" if width == 2 else ""), "bold"))
    every = -(-(label + 1) // width)
    names = "".join(f"{f'{letter}{i}':<{every * width}}" for i in range(0, size, every))
    if every == 1:
        names = "".join(f"{f'{letter}{i}':>{width - 1}} " for i in range(size))
    print_line(console, (f"{'':{label}} {names}".rstrip(), "dim"))
    rows = [(f"{letter}{i}", row) for i, row in enumerate(report.matrix)]
    for name, row in [*rows, ("all", report.matrix.sum(axis=0))]:
        line = styled((f"{name:>{label}} ", "dim"), "")
        total = row.sum()
        for tokens in row:
            share = tokens / total if total else 0.0
            line.append_text(heat(_cell(share, width), share * size) if total else styled(f"{'–':>{width}}"))
        console.print(line)
    console.print()


def _cell(share: float, width: int) -> str:
    if width == 2:
        return "++" if share >= 0.0995 else f"{100 * share:2.0f}"
    return f"{100 * share:{width - 1}.{1 if width == 6 else 0}f} "


def _receivers(console: Console, report: TrafficReport, top: int) -> None:
    receivers, letter = report.receivers(), report.by[0]
    count = counter(r.tokens for r in receivers)
    columns = (report.by, "tokens", "x mean", "from others", "most from")
    listing = table(console, *columns, title=f"busiest receivers{limited(top, len(receivers))}")
    for r in receivers[:top]:
        times = heat(f"{r.times_mean:.2f}", r.times_mean)
        most = "–" if r.busiest_source is None else f"{letter}{r.busiest_source}"
        listing.add_row(f"{letter}{r.destination}", count(r.tokens), times, percent(r.from_others), most)
    console.print(listing)
    console.print()


def _pairs(console: Console, report: TrafficReport, top: int) -> None:
    pairs, letter = report.pairs(top), report.by[0]
    if not pairs:
        console.print("no token leaves its rank" if report.by == "rank" else "no token crosses nodes")
        return
    count = counter(p.tokens for p in pairs)
    title = f"busiest pairs of two {report.by}s"
    listing = table(console, "<from", "<to", "tokens", "of all", "x mean pair", title=title)
    for p in pairs:
        times = heat(f"{p.times_mean:.2f}", p.times_mean)
        ends = (f"{letter}{p.source}", f"{letter}{p.destination}")
        listing.add_row(*ends, count(p.tokens), percent(p.share, 2), times)
    console.print(listing)
