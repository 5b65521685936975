"""Shows whether run B of `compare` is better than run A: verdict, figures, layers, settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from eplb_analyze.cli.console import limited, print_heading, print_line, styled, table
from eplb_analyze.text import clean, counter, figure, interval, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.compare import Comparison, Difference, Side

STYLES = {"better": "bold green", "worse": "bold red", "not comparable": "bold red"}

SHOWN_SETTINGS = 20


def render(console: Console, result: Comparison, top: int = 5) -> None:
    print_heading(console, "compare", f" · {result.b.info.model} · is B better than A?")
    _side(console, "A", result.a)
    _side(console, "B", result.b)
    console.print()
    for reason in result.reasons:
        print_line(console, (reason, "bold red"))
    for warning in result.warnings:
        print_line(console, (f"not like for like: {warning}", "yellow"))
    print_line(console, "verdict by balancedness: ", (result.verdict, STYLES.get(result.verdict, "bold")))
    console.print()
    if result.balancedness is not None and result.idle_fraction is not None:
        _figures(console, result, result.balancedness, result.idle_fraction)
        _layers(console, result, top)
    _settings(console, result)


def _side(console: Console, name: str, side: Side) -> None:
    info, steps = side.info, side.steps.to_json()
    print_line(
        console, f"{name}: {info.run_id} · {steps['recorded']:,} steps of {steps['first']} to {steps['last']}"
    )
    console.print(
        f"   {info.num_physical_experts} slots on {plural(info.ep_size, 'EP rank')}, "
        f"{plural(side.rearrangements, 'rearrangement')}"
    )


def _figures(console: Console, result: Comparison, balance: Difference, idle: Difference) -> None:
    listing = table(console, "<", "A", "B", "B − A", "95 % interval", "<")
    for name, row in (("balancedness", balance), ("idle fraction", idle)):
        listing.add_row(name, figure(row.a), figure(row.b), *_difference(row))
    tokens = result.a.tokens_per_step, result.b.tokens_per_step
    count = counter(round(value) for value in tokens if value is not None)
    cells = ["–" if value is None else count(round(value)) for value in tokens]
    ratio = "" if result.token_ratio is None else f"× {result.token_ratio:.2f}"
    listing.add_row("tokens a step", *cells, ratio, "", "")
    for times in result.step_times:
        ms, part = times.step_ms, times.imbalance_ms
        name = "step ms" if len(result.step_times) == 1 else f"step ms, {clean(times.phase)}"
        listing.add_row(name, figure(ms.a), figure(ms.b), *_difference(ms))
        if part is not None:
            bounds = interval(part.low, part.high)
            listing.add_row("  by imbalance", "", "", signed(part.estimate), bounds, "")
    console.print(listing)
    if result.unexplained:
        text = f"how much of it imbalance explains is not known: {result.unexplained}"
        print_line(console, (text if result.step_times else f"step times: {result.unexplained}", "yellow"))
    routing = result.routing
    if routing.distance is not None:
        console.print(
            f"routing distance {percent(routing.distance)}, between the halves of A "
            f"{percent(routing.within_a)}, of B {percent(routing.within_b)}"
        )
    console.print()


def _difference(row: Difference) -> tuple[str, str, Any]:
    verdict = {"no difference beyond chance": "no difference"}.get(row.verdict or "–", row.verdict or "–")
    return signed(row.difference), interval(row.low, row.high), styled((verdict, STYLES.get(verdict, "dim")))


def _layers(console: Console, result: Comparison, top: int) -> None:
    rows = [row for row in result.layers if row.balancedness.difference is not None]
    counts = {v: sum(r.balancedness.verdict == v for r in rows) for v in ("better", "worse")}
    rest = len(rows) - sum(counts.values())
    console.print(
        f"layers: {counts['better']} better, {counts['worse']} worse, {rest} no difference beyond chance"
        f"{f'; about {chance:.0f} differ by chance alone' if (chance := 0.05 * len(rows)) >= 1 else ''}"
    )
    rows.sort(key=lambda r: -abs(r.balancedness.difference or 0.0))
    title = (
        f"layers that differ most ({top} of {len(rows)})"
        if len(rows) > top
        else "layers, most different first"
    )
    listing = table(console, "layer", "A", "B", "B − A", "95 % interval", "<", title=title)
    for row in rows[:top]:
        cells = figure(row.balancedness.a), figure(row.balancedness.b)
        listing.add_row(str(row.layer), *cells, *_difference(row.balancedness))
    console.print(listing)
    console.print()


def _settings(console: Console, result: Comparison) -> None:
    if not result.settings:
        console.print("settings: the same, as far as they were recorded")
        return
    more = limited(SHOWN_SETTINGS, len(result.settings))
    listing = table(console, "<setting", "<A", "<B", title=f"set differently{more}")
    for row in result.settings[:SHOWN_SETTINGS]:
        values = (value if isinstance(value, str) else json.dumps(value) for value in (row.a, row.b))
        listing.add_row(clean(row.name), *map(clean, values))
    console.print(listing)
