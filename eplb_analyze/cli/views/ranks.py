"""Shows the ranks or nodes that the others wait for, and a heat map of layer × rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import NOTABLE, heat
from eplb_analyze.cli.console import limited, print_heading, print_line, print_notes, steps_of, styled, table
from eplb_analyze.text import counter, figure, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.ranks import LayerHeat, RankReport, Straggler


def render(console: Console, report: RankReport, by: str, top: int = 8, *, every: bool = False) -> None:
    """``every``: show the layers in which all ranks are within ``NOTABLE`` of the mean, too."""
    print_heading(console, report.model, f" · run {report.run_id} · {steps_of(console, report)}")
    if not report.active:
        console.print("no tokens")
        return
    members = report.nodes if by == "node" else report.ranks
    costliest = sorted(members, key=lambda m: (-m.excess_tokens, m.number))
    worst = costliest[0]
    idle = percent(report.idle_fraction)
    console.print(f"idle {idle}, counted in tokens; `summary` shows the cost in time")
    if report.loss_tokens:
        share, often = percent(worst.excess_share), percent(worst.slowest_share)
        text = (
            (f"{by} {worst.number}", "bold"),
            f" causes the most waiting: {share} of it; slowest in {often} of layers × steps",
        )
        print_line(console, *text)
    print_notes(console, report.notes)
    console.print()
    _grid(console, report, by, costliest, every)
    _table(console, by, costliest, top)


def _grid(console: Console, report: RankReport, by: str, costliest: list[Straggler], every: bool) -> None:
    """Layer × rank: the load over the layer's mean, in as much detail as fits."""
    layers = [layer for layer in report.layers if every or _unevenness(layer, by)[0] > NOTABLE]
    even = len(report.layers) - len(layers)
    if layers:
        uneven, number, value, layer_number = max((*_unevenness(layer, by), layer.layer) for layer in layers)
        if uneven > NOTABLE:
            text = f"layer {layer_number}, {by} {number}: {value:.2f}x the mean"
            print_line(console, "farthest from the mean: ", (text, "bold red" if value > 1 else "bold"))
        _cells(console, report, by, costliest, layers)
    if even:
        of = plural(len(report.layers), "layer")
        print_line(console, f"{even} of {of} within {percent(NOTABLE, 0)}; --all shows them")
        console.print()


def _unevenness(layer: LayerHeat, by: str) -> tuple[float, int, float]:
    """By how much one rank or node differs most from the layer's mean, which, and its load over the mean."""
    values = layer.nodes if by == "node" else layer.ranks
    known = [(abs(value - 1), number, value) for number, value in enumerate(values) if value is not None]
    return max(known, default=(0.0, 0, 1.0))


def _cells(
    console: Console, report: RankReport, by: str, costliest: list[Straggler], layers: list[LayerHeat]
) -> None:
    label = max(5, *(len(str(layer.layer)) for layer in report.layers))
    tag = f"{by[0]}{len(costliest) - 1}"
    room = console.width - label - 1
    wide = max(6, len(tag) + 2)
    compact = wide * len(costliest) > room
    width = max(3, len(tag)) if compact else wide
    if compact and width * len(costliest) > room:
        # If columns are left out, readers cannot count, so each column needs its number.
        width = 2 if 2 * len(costliest) <= room else len(tag) + 1
    shown = sorted(m.number for m in costliest[: max(1, room // width)])
    title = f"load of each {by}{', per rank,' if by == 'node' else ''} divided by the layer's mean"
    if compact:
        title += " (+3: 1.3x, ·: the mean)"
    print_line(console, (title, "bold"))
    left_out = len(costliest) - len(shown)
    if left_out:
        console.print(f"only the {len(shown)} of {len(costliest)} {by}s that cause the most waiting")
    print_line(console, (f"{'layer':>{label}} {_header(shown, by[0], width)}", "dim"))
    for layer in layers:
        values = layer.nodes if by == "node" else layer.ranks
        cells = styled(f"{layer.layer:>{label}} ")
        for number in shown:
            value = values[number]
            text = "–" if value is None else _tenths(value) if compact else f"{value:.2f}"
            cell = f"{text:>{width - 1}} " if width > 2 else f"{text:>2}"
            cells.append_text(heat(cell, value))
        console.print(cells)
    console.print()


def _header(numbers: list[int], letter: str, width: int) -> str:
    """The numbers of the columns: of each if they fit, else of every few."""
    names = [f"{letter}{number}" for number in numbers]
    every = -(-(len(names[-1]) + 1) // width)
    if every == 1:
        return "".join(f"{name:>{width - 1}} " for name in names)
    whole = len(names) - len(names) % every
    return "".join(f"{name:<{width * every}}" for name in names[:whole:every])


def _tenths(value: float) -> str:
    """A load over the mean in two characters: +3 is 1.3x the mean, ++ twice or more, −− nothing."""
    tenths = round((value - 1) * 10)
    if tenths == 0:
        return "·"
    if abs(tenths) > 9:
        return "++" if tenths > 0 else "−−"
    return f"{'+' if tenths > 0 else '−'}{abs(tenths)}"


def _table(console: Console, by: str, costliest: list[Straggler], top: int) -> None:
    shown = costliest[:top]
    count, excess = counter(m.load for m in costliest), counter(round(m.excess_tokens) for m in costliest)
    title = f"{by}s that the others wait for most{limited(top, len(costliest))}"
    columns = (by, "tokens", "x mean", "slowest in", "excess tokens", "of all excess")
    listing = table(console, *columns, title=title)
    for m in shown:
        listing.add_row(
            f"{by[0]}{m.number}",
            count(m.load),
            heat(figure(m.times_mean, 2), m.times_mean),
            percent(m.slowest_share),
            excess(round(m.excess_tokens)),
            percent(m.excess_share),
        )
    console.print(listing)
