"""Shows the hot and cold experts of `experts`, and how well they are replicated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eplb_analyze.cli.charts import AT_LEAST, heat, print_hot_experts
from eplb_analyze.cli.console import (
    limited,
    minute_text,
    print_hidden,
    print_line,
    print_notes,
    print_report_heading,
    print_report_name,
    step_label,
    step_time,
    steps_label,
    styled,
    table,
    times_known,
)
from eplb_analyze.text import figure, percent, plural

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

    from eplb_analyze.analysis.experts import ExpertReport
    from eplb_analyze.analysis.experts_minutes import MinuteExperts

#: From this many columns on, the table has all columns.
WIDE = 120


def render(console: Console, report: ExpertReport, top: int = 5, *, hot: bool, cold: bool) -> None:
    when = print_report_heading(console, report)
    print_line(console, f"{when}, in {plural(report.windows, 'window')} of {report.window:,}")
    _hottest(console, report)
    _replicas(console, report)
    counts, factor = report.counts, report.hot_factor
    verdicts = f"{counts['always']:,} always hot, {counts['bursts']:,} hot in bursts, {counts['cold']:,} cold"
    dead = f" ({counts['dead']:,} dead)" if counts["dead"] else ""
    print_line(console, f"{plural(counts['experts'], 'expert')}: {verdicts}{dead}")
    print_notes(console, report.notes)
    console.print()
    if hot or not cold:
        _table(console, report, "always hot", report.hot.filter(verdict="always"), top)
        bursts = report.hot.filter(verdict="bursts").sort(
            "peak_times_mean", descending=True, maintain_order=True
        )
        _table(console, report, "hot in bursts, highest peak first", bursts, top)
    if cold or not hot:
        _table(console, report, "cold", report.cold, top)
    _drift(console, report)
    judged = _judged(report, "over all steps")
    legend = [
        f"hot: at least {factor:g}x the layer's mean in a window; cold: at most 1/{factor:g} over all steps",
        f"load: times the layer's mean, {judged}; due: replicas that this load justifies (!: one or more "
        "are missing); *: two replicas on one rank",
    ]
    if console.width >= WIDE:
        legend.append("x mean: load over all steps; uneven: the busiest replica divided by the mean of all")
    for text in legend:
        print_line(console, (text, "dim"))
    if console.width < WIDE and (len(report.hot) or len(report.cold)):
        print_hidden(console, ("x mean", "hot in", "CV", "uneven"), WIDE)


def render_minutes(console: Console, report: MinuteExperts, top: int = 5) -> None:
    """Print the hot experts that sums per minute name."""
    print_report_name(console, report)
    print_line(console, steps_label(console, report.first_step, report.last_step))
    first, last = (minute_text(console, minute) for minute in (report.first_minute, report.last_minute))
    which = first if first == last else f"{first} to {last}"
    text = f"figures come from per-minute sums ({which}); experts' loads of single steps are not kept"
    print_line(console, (text, "yellow"))
    print_line(console, "bursts, cold experts and due replicas are not known")
    print_notes(console, report.notes)
    console.print()
    if not report.experts:
        print_line(console, "no expert is known to have more than the mean; only the fullest slots are known")
        return
    layers = [e.layer for e in report.experts] if report.layer is None else []
    title = AT_LEAST + limited(top, len(report.experts))
    print_hot_experts(console, report.experts, top, title, layers)


def _since_change(report: ExpertReport) -> bool:
    """Whether replicas are judged by fewer steps than all: those since a rearrangement."""
    since = report.placement_first_step
    return since is not None and since > report.first_step and not report.all_placements


def _judged(report: ExpertReport, whole: str) -> str:
    """The steps whose loads judge replicas; ``whole``: all, in words."""
    return "since the layer's last rearrangement" if _since_change(report) else whole


def _replicas(console: Console, report: ExpertReport) -> None:
    """Whether the replicas of the last placement fit the loads, and which loads these are."""
    counts, since = report.counts, report.placement_first_step
    names = {
        "under_replicated": "too few",
        "over_replicated": "too many",
        "replicas_on_one_rank": "two on one rank",
    }
    wrong = [f"{plural(counts[key], 'expert')} with {name}" for key, name in names.items() if counts[key]]
    loads = "all steps"
    if since is not None and _since_change(report):
        loads = f"{steps_label(console, since, report.last_step)}, since the last rearrangement"
    found = (", ".join(wrong), "bold") if wrong else "no expert has too few or too many"
    print_line(console, "replicas: ", found, f" (judged by the loads of {loads})")


def _hottest(console: Console, report: ExpertReport) -> None:
    """The expert with most load of those still hot, and the one with the highest peak, and when they were."""
    hot = report.hot
    if not len(hot):
        return
    # The last window is complete if it has at least half of its steps.
    now = hot.filter(hot["last_hot_step"] > report.last_step - report.window)
    peaks = hot.sort("peak_times_mean", descending=True, maintain_order=True).head(1).to_dicts()
    shown = []
    for row in now.sort("placement_times_mean", descending=True, nulls_last=True).head(1).to_dicts():
        shown.append((row["layer"], row["logical"]))
        times, since = row["placement_times_mean"], step_label(console, row["first_hot_step"])
        at = "" if times is None else f", {times:.1f}x the mean {_judged(report, 'over all steps')}"
        print_line(console, "hottest at the end: ", (_name(row), "bold"), f"{at}, hot since {since}")
    for row in peaks:
        if (row["layer"], row["logical"]) not in shown:
            steps = steps_label(console, row["first_hot_step"], row["last_hot_step"])
            times = f", {row['peak_times_mean']:.1f}x the mean in {steps}"
            print_line(console, "highest peak: ", (_name(row), "bold"), times)


def _name(row: dict[str, Any]) -> str:
    return f"expert {row['logical']} of layer {row['layer']}"


def _drift(console: Console, report: ExpertReport) -> None:
    if not report.drift:
        return
    first, *later = report.drift
    lags = [f"{percent(first.overlap, 0)} after {plural(first.lag, 'window')}"]
    lags += [f"{percent(d.overlap, 0)} after {d.lag}" for d in later]
    hottest = "hottest expert" if report.hot_set == 1 else f"{report.hot_set} hottest experts"
    chance = percent(report.chance_overlap, 0)
    text = f"overlap of each layer's {hottest} with those of later windows: {', '.join(lags)} "
    text += f"(by chance: {chance})"
    print_line(console, (text, "dim"))


def _table(console: Console, report: ExpertReport, title: str, frame: pl.DataFrame, top: int) -> None:
    if not len(frame):
        return
    wide, timed = console.width >= WIDE, times_known(console)
    layer = ["layer"] if report.layer is None else []
    mean = ["x mean"] if wide else []  # over all steps
    more = ["hot in", "CV"] if wide else []
    uneven = ["uneven"] if wide else []
    columns = ("expert", "load", *mean, "peak", *more, "replicas", "due", *uneven, "<hot in steps")
    listing = table(
        console, *layer, *columns, *(["<since"] if timed else []), title=title + limited(top, len(frame))
    )
    for row in frame.head(top).to_dicts():
        first, last = row["first_hot_step"], row["last_hot_step"]
        cells = [*([str(row["layer"])] if layer else []), *_cells(row, wide)]
        cells.append("–" if first is None else f"{first}-{last}")
        if timed:
            cells.append("–" if first is None else step_time(console, first))
        listing.add_row(*cells)
    console.print(listing)
    console.print()


def _cells(row: dict[str, Any], wide: bool) -> list[Any]:
    due, now = figure(row["due_replicas"], 1), row["placement_times_mean"]
    return [
        str(row["logical"]),
        heat(figure(now, 2), now),
        *([f"{row['times_mean']:.2f}"] if wide else []),
        f"{row['peak_times_mean']:.2f}",
        *([percent(row["persistence"]), figure(row["burstiness"], 2)] if wide else []),
        f"{row['replicas']}{'*' if row['replicas_on_one_rank'] else ''}",
        styled((f"{due} !", "bold red")) if row["under_replicated"] else f"{due}  ",
        *([figure(row["worst_replica"], 2)] if wide else []),
    ]
