"""`layer`: what each rank, slot and expert of one layer got."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eplb_analyze.commands.options import (
    Dump,
    ModelOption,
    OutputOption,
    RunOption,
    StepsOption,
    finish,
    open_for,
    parse_steps,
)
from eplb_analyze.output import Output, OutputFormat, clean, count, figure, heading, heat, percent, table

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.layer import ExpertLoad, LayerReport
    from eplb_analyze.run import RunInfo

SHOWN_EXPERTS = 5


def layer(
    layer: Annotated[int, typer.Argument(help="The layer's number in the model.", metavar="LAYER")],
    dump: Dump = Path("."),
    step: Annotated[int | None, typer.Option("--step", help="One step.", min=0)] = None,
    steps: StepsOption = None,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """What did each rank, slot and expert of a layer get, in a step, a range or the whole run?"""
    if step is not None and steps is not None:
        raise typer.BadParameter("give one of --step and --steps", param_hint="--step")
    wanted = parse_steps(steps)
    from eplb_analyze.layer import layer_report

    out = Output(output)
    opened = open_for(out, dump, run, model)
    report = layer_report(opened, layer, step, wanted)
    out.emit(report.to_json(), lambda console: render(console, report, opened.info))
    finish(out, opened)


def render(console: Console, report: LayerReport, info: RunInfo) -> None:
    from rich.text import Text

    when = f"step {report.first_step}"
    if report.steps > 1:
        when = f"{report.steps:,} steps, {report.first_step} to {report.last_step}"
    phase = f" ({report.phase})" if report.phase else ""
    heading(console, f"layer {report.layer}", f" · {when}{phase} · {info.model} · run {info.run_id}")
    if not report.complete:
        ranks = ", ".join(map(str, report.missing_ranks))
        text = f"INCOMPLETE: rank {ranks} not recorded in this step; the loads below are only a part"
        console.print(Text(text, style="bold red"))
    total = sum(r.load for r in report.ranks)
    mean = total / len(report.ranks)
    hottest = max(report.ranks, key=lambda r: r.load)
    console.print(
        f"balancedness {figure(report.balancedness)}  imbalance {figure(report.imbalance)}  "
        f"idle {percent(report.idle_fraction)}  tokens {count(total)}"
    )
    if mean:
        console.print(
            f"hottest: rank {hottest.rank} with {hottest.load / mean:.2f} × the mean of {count(mean)}"
        )
    for note in report.notes:
        console.print(Text(f"note: {clean(note)}", style="yellow"))
    console.print()
    _ranks(console, report, mean)
    if report.experts:
        _experts(console, report)
    _slots(console, report)


def _ranks(console: Console, report: LayerReport, mean: float) -> None:
    """A grid of cells, coloured by load over the mean."""
    from rich.table import Table
    from rich.text import Text

    cells = [(f"{r.rank}", count(r.load), r.load / mean if mean else 0.0) for r in report.ranks]
    width = max(len(load) for _, load, _ in cells)
    tag = max(len(rank) for rank, _, _ in cells)
    cell = tag + width + 3
    per_row = max(1, min(16, (console.width - 2) // (cell + 1)))
    # Rows of a power of two are easier to count in than what just fits.
    while per_row & (per_row - 1):
        per_row -= 1
    console.print(Text("tokens by EP rank", style="bold"))
    grid = Table.grid(padding=(0, 1, 0, 0))
    for start in range(0, len(cells), per_row):
        row = []
        for rank, load, times in cells[start : start + per_row]:
            row.append(Text.assemble((f"{rank:>{tag}} ", "dim"), heat(f" {load:>{width}} ", times)))
        grid.add_row(*row)
    console.print(grid)
    console.print()


def _experts(console: Console, report: LayerReport) -> None:
    mean = sum(e.load for e in report.experts) / len(report.experts)
    slots: dict[int, list[tuple[int, float]]] = {}
    for slot in report.slots:
        if slot.logical is not None and slot.logical >= 0:
            slots.setdefault(slot.logical, []).append((slot.rank, slot.load))
    ordered = sorted(report.experts, key=lambda e: (-e.load, e.logical))
    shown = min(SHOWN_EXPERTS, len(ordered) // 2 or 1)
    for title, experts in (("hottest experts", ordered[:shown]), ("coldest experts", ordered[-shown:][::-1])):
        listing = table(
            console, "expert", "tokens", "share", "× mean", "replicas", "<on ranks (tokens)", title=title
        )
        for e in experts:
            times = e.load / mean if mean else 0.0
            listing.add_row(
                str(e.logical),
                count(e.load),
                percent(e.share, 2),
                heat(f"{times:.2f}", times),
                str(e.replicas),
                _where(e, slots.get(e.logical, [])),
            )
        console.print(listing)
        console.print()


def _where(expert: ExpertLoad, places: list[tuple[int, float]]) -> str:
    text = ", ".join(f"{rank} ({count(load)})" for rank, load in places[:4])
    return text + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _slots(console: Console, report: LayerReport) -> None:
    """The placement: a row a rank, each slot's logical expert coloured by the slot's load."""
    from rich.text import Text

    if all(slot.logical is None for slot in report.slots):
        return
    mean = sum(s.load for s in report.slots) / len(report.slots)
    digits = max(len(str(s.logical)) for s in report.slots)
    listing = table(console, "rank", "tokens", "<experts in its slots", title="placement")
    for rank in report.ranks:
        cells = Text()
        for slot in (s for s in report.slots if s.rank == rank.rank):
            name = "·" if slot.logical is None or slot.logical < 0 else str(slot.logical)
            times = slot.load / mean if mean else 0.0
            cells.append_text(heat(f" {name:>{digits}} ", times))
        listing.add_row(str(rank.rank), count(rank.load), cells)
    console.print(listing)
