"""Shows the hot and cold experts of `experts`, and how well they are replicated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eplb_analyze.cli.charts import heat
from eplb_analyze.cli.console import limited, print_line, print_notes, print_report_heading, styled, table
from eplb_analyze.text import figure, percent, plural

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

    from eplb_analyze.analysis.experts import ExpertReport

#: From this many columns on, the table shows the steps in which an expert was hot.
WIDE = 100


def render(console: Console, report: ExpertReport, top: int = 5, *, hot: bool, cold: bool) -> None:
    when = print_report_heading(console, report)
    console.print(f"{when}, in {plural(report.windows, 'window')} of {report.window:,}")
    counts, factor = report.counts, report.hot_factor
    console.print(
        f"hot in a window: {factor:g} × the layer's mean or more; cold: over all steps 1/{factor:g} or less"
    )
    verdicts = f"{counts['always']:,} always hot, {counts['bursts']:,} in bursts, {counts['never']:,} never"
    text = f"of {plural(counts['experts'], 'expert')} {verdicts}; {counts['cold']:,} cold"
    console.print(f"{text}, {counts['dead']:,} of them dead" if counts["dead"] else text)
    _replication(console, report)
    _drift(console, report)
    print_notes(console, report.notes)
    console.print()
    if hot or not cold:
        _table(console, report, "always hot", report.hot.filter(verdict="always"), top)
        bursts = report.hot.filter(verdict="bursts").sort(
            "peak_times_mean", descending=True, maintain_order=True
        )
        _table(console, report, "hot in bursts, the highest peak first", bursts, top)
    if cold or not hot:
        _table(console, report, "cold", report.cold, top)
    legend = (
        "due: slots that its share is worth (! a slot or more short); uneven: the fullest replica over "
        "their mean; both since the layer's last rearrangement; *: twice on one rank"
    )
    print_line(console, (legend, "dim"))


def _replication(console: Console, report: ExpertReport) -> None:
    counts = report.counts
    names = {
        "under_replicated": "under-replicated",
        "over_replicated": "over-replicated",
        "replicas_on_one_rank": "twice on one rank",
    }
    parts = [f"{counts[key]:,} {name}" for key, name in names.items() if counts[key]]
    none = "no expert has too few or too many replicas"
    console.print(f"in the last placement, by the loads since: {', '.join(parts) or none}")


def _drift(console: Console, report: ExpertReport) -> None:
    if not report.drift:
        return
    lags = [f"{d.lag}: {percent(d.overlap, 0)}" for d in report.drift]
    hottest = "hottest" if report.hot_set == 1 else f"{report.hot_set} hottest"
    chance = percent(report.chance_overlap, 0)
    console.print(f"how much of a layer's {hottest} is the same some windows later")
    console.print(f"(by chance {chance}): after {', '.join(lags)}")


def _table(console: Console, report: ExpertReport, title: str, frame: pl.DataFrame, top: int) -> None:
    if not len(frame):
        return
    layer = ["layer"] if report.layer is None else []
    when = ["hot in steps"] if console.width >= WIDE else []
    columns = ("expert", "× mean", "peak", "hot in", "CV", "replicas", "due", "uneven")
    listing = table(console, *layer, *columns, *when, title=title + limited(top, len(frame)))
    for row in frame.head(top).to_dicts():
        cells = _cells(row)
        if layer:
            cells.insert(0, str(row["layer"]))
        if when:
            first, last = row["first_hot_step"], row["last_hot_step"]
            cells.append("–" if first is None else f"{first} … {last}")
        listing.add_row(*cells)
    console.print(listing)
    console.print()


def _cells(row: dict[str, Any]) -> list[Any]:
    due = figure(row["due_replicas"], 1)
    return [
        str(row["logical"]),
        heat(f"{row['times_mean']:.2f}", row["times_mean"]),
        f"{row['peak_times_mean']:.2f}",
        percent(row["persistence"]),
        figure(row["burstiness"], 2),
        f"{row['replicas']}{'*' if row['replicas_on_one_rank'] else ''}",
        styled((f"{due} !", "bold red")) if row["under_replicated"] else f"{due}  ",
        figure(row["worst_replica"], 2),
    ]
