"""Shows whether B of `compare` is better than A: the verdict, its size, the layers and experts behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from eplb_analyze.analysis.incident_words import steps_text
from eplb_analyze.cli.console import limited, print_heading, print_line, styled, table
from eplb_analyze.reader.join import StepState
from eplb_analyze.report.answer import in_a_line
from eplb_analyze.text import clean, counter, figure, interval, milliseconds, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.compare import Comparison, Difference, LayerDifference, Side
    from eplb_analyze.analysis.compare_experts import ExpertDifference
    from eplb_analyze.reader.clock import RunClock

STYLES = {"better": "bold green", "worse": "bold red", "not comparable": "bold red"}
#: How the size of a difference qualifies the verdict.
QUALIFIERS = {"slight": "slightly ", "moderate": "", "large": "much "}
#: A layer has all of the difference from this part on, and most of it from this one.
ALL, MOST = 0.9, 0.5
#: Layers with a smaller part of the difference are only counted.
MIN_PART = 0.01

SHOWN_SETTINGS = 20


def render(console: Console, result: Comparison, clocks: tuple[RunClock, RunClock], top: int = 5) -> None:
    """Print a comparison; ``clocks`` are those of A and B."""
    print_heading(console, "compare", f" · {result.b.info.model} · is B better than A?")
    sides = list(zip("AB", (result.a, result.b), clocks, strict=True))
    for name, side, clock in sides:
        _side(console, name, side, clock)
    console.print()
    style = "" if result.size == "negligible" else STYLES.get(result.verdict, "bold")
    print_line(console, (verdict(result), style or "bold"), why(result))
    for text in (*result.reasons, *_in_time(result)):
        print_line(console, text)
    for warning in result.warnings:
        print_line(console, (f"not like for like: {warning}", "yellow"))
    for name, side, clock in sides:
        _incidents(console, name, side, clock, top)
    console.print()
    if result.balancedness is not None and result.idle_fraction is not None:
        _figures(console, result, result.balancedness, result.idle_fraction)
        _layers(console, result, top)
        _experts(console, result, top)
    _settings(console, result)


def verdict(result: Comparison) -> str:
    """``SLIGHTLY WORSE``: significance and size in capitals."""
    if result.size is None:
        return result.verdict.upper()
    if result.size == "negligible":
        return "NO DIFFERENCE THAT MATTERS"
    return f"{QUALIFIERS[result.size]}{result.verdict}".upper()


def why(result: Comparison) -> str:
    """What the verdict means in idle time, and which layer and expert it comes from."""
    idle = result.idle_fraction
    if idle is None or idle.difference is None or idle.low is None or idle.high is None:
        return ""
    digits = 1 if abs(idle.difference) >= 0.001 else 2
    if result.size is None:
        low, high = (signed(100 * bound, digits) for bound in (idle.low, idle.high))
        return (
            f": idle time changed by {signed(100 * idle.difference, digits)} points (95% CI {low} to {high})"
        )
    bounds = sorted((abs(100 * idle.low), abs(100 * idle.high)))
    low, high = (f"{bound:.{digits}f}" for bound in bounds)
    more = "more" if idle.difference > 0 else "less"
    text = f": {abs(100 * idle.difference):.{digits}f} points {more} idle time"
    text += f" (95% CI {low} to {high})" if low != high else ""
    return text if result.size == "negligible" else text + _source(result)


def _source(result: Comparison) -> str:
    """``, all from layer 12: expert 77 went from 0.3% to 3.0% of tokens``."""
    largest = max(result.layers, key=lambda layer: layer.part or 0.0)
    part = largest.part or 0.0
    if len(result.layers) == 1:
        text = f" in layer {largest.layer}"
    elif part >= ALL:
        text = f", all from layer {largest.layer}"
    elif part >= MOST:
        text = f", most of it ({100 * part:.0f}%) from layer {largest.layer}"
    else:
        count = _half(result.layers)
        return f", from many layers: {count} of {len(result.layers)} have half of it"
    found = [expert for expert in result.experts if expert.layer == largest.layer]
    return f"{text}: {_change(found[0])}" if found else text


def _half(layers: list[LayerDifference]) -> int:
    """How many layers have half of the difference."""
    total, count = 0.0, 0
    for part in sorted((layer.part or 0.0 for layer in layers), reverse=True):
        total, count = total + part, count + 1
        if total >= MOST:
            break
    return count


def _change(row: ExpertDifference) -> str:
    """``expert 77 went from 0.3% to 3.0% of tokens``."""
    from eplb_analyze.analysis.compare_experts import MIN_FACTOR

    def differ(a: float, b: float) -> bool:
        return max(a, b) >= MIN_FACTOR * min(a, b)

    shares = f"from {_share(row.share_a)} to {_share(row.share_b)} of tokens"
    before, after = row.replicas_a, row.replicas_b
    more = before is not None and after is not None and differ(before, after)
    copies = f"from {_replicas(before)} to {_replicas(after)} replicas"
    if not more:
        return f"expert {row.expert} went {shares}"
    if differ(row.share_a, row.share_b):
        return f"expert {row.expert} went {shares} and {copies}"
    return f"expert {row.expert} ({_share(row.share_b)} of tokens) went {copies}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%" if value >= 0.001 else f"{100 * value:.2f}%"


def _replicas(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _in_time(result: Comparison) -> list[str]:
    """What the difference is in step time, a line for each phase."""
    lines = []
    for times in result.step_times:
        ms, part = times.step_ms, times.imbalance_ms
        if ms.difference is None or ms.a is None or ms.b is None:
            continue
        name = clean(times.phase)
        several = len(result.step_times) > 1
        phase = "steps" if not several else name if name.startswith("steps ") else f"{name} steps"
        if ms.verdict in ("better", "worse"):
            text = (
                f"{phase} take {milliseconds(abs(ms.difference))} {'longer' if ms.difference > 0 else 'less'}"
            )
        else:
            text = f"{phase} take no significantly different time"
        text = f"In time: {text} ({milliseconds(ms.a)} to {milliseconds(ms.b)})"
        if part is not None and (ms.verdict in ("better", "worse") or part.low > 0 or part.high < 0):
            text += f"; imbalance explains {milliseconds(part.estimate, part.low, part.high, sign=True)}"
        lines.append(text)
    return lines


def _side(console: Console, name: str, side: Side, clock: RunClock) -> None:
    info, steps = side.info, side.steps
    when = ""
    if steps.first is not None and steps.last is not None:
        # With the date: A and B may be of different days.
        span = clock.span_text((steps.first, steps.last))
        when = f", {steps_text(steps.first, steps.last)}" + (f", {span}" if span else "")
    phase = "" if side.phase is None else f"{clean(side.phase)} "
    print_line(
        console,
        f"{name}  {info.run_id}{when}: {plural(steps.count(StepState.RECORDED), f'complete {phase}step')}, "
        f"{info.num_physical_experts} slots on {plural(info.ep_size, 'EP rank')}, "
        f"{plural(side.rearrangements, 'rearrangement') if side.rearrangements else 'no rearrangement'}",
    )


def _incidents(console: Console, name: str, side: Side, clock: RunClock, top: int) -> None:
    """A line for each incident, the first ones of many."""
    if side.searched == []:
        print_line(console, f"incidents in {name} are not known: its steps are not kept")
    elif not side.incidents:
        kept = " where steps are kept" if side.searched is not None else ""
        print_line(console, f"no incident in {name}{kept}")
    for incident in side.incidents[:top]:
        print_line(console, (f"incident in {name}: ", "bold"), in_a_line(incident, clock, side.steps))
    rest = len(side.incidents) - top
    if rest > 0:
        print_line(console, f"and {plural(rest, 'more incident')} in {name}; `summary` shows all")


def _figures(console: Console, result: Comparison, balance: Difference, idle: Difference) -> None:
    listing = table(console, "<", "A", "B", "B − A", "95% interval", "<")
    for name, row in (("balancedness", balance), ("idle (by tokens)", idle)):
        listing.add_row(name, figure(row.a), figure(row.b), *_difference(row))
    tokens = result.a.tokens_per_step, result.b.tokens_per_step
    count = counter(round(value) for value in tokens if value is not None)
    cells = ["–" if value is None else count(round(value)) for value in tokens]
    ratio = "" if result.token_ratio is None else f"{result.token_ratio:.2f}x"
    listing.add_row("tokens per layer", *cells, ratio, "", "")
    for times in result.step_times:
        ms, part = times.step_ms, times.imbalance_ms
        name = "step ms" if len(result.step_times) == 1 else f"step ms, {clean(times.phase)}"
        listing.add_row(name, figure(ms.a), figure(ms.b), *_difference(ms))
        if part is not None:
            bounds = interval(part.low, part.high)
            listing.add_row("  from imbalance", "", "", signed(part.estimate), bounds, "")
    console.print(listing)
    if result.unexplained:
        text = f"how much of it imbalance explains is not known: {result.unexplained}"
        print_line(console, (text if result.step_times else f"step times: {result.unexplained}", "yellow"))
    routing = result.routing
    if routing.distance is not None:
        print_line(
            console,
            f"routing: {percent(routing.distance)} of tokens go to different experts (between the halves of "
            f"A: {percent(routing.within_a)}, of B: {percent(routing.within_b)})",
        )
    console.print()


def _difference(row: Difference) -> tuple[str, str, Any]:
    verdict = {"no significant difference": "not significant"}.get(row.verdict or "–", row.verdict or "–")
    return signed(row.difference), interval(row.low, row.high), styled((verdict, STYLES.get(verdict, "dim")))


def _telling(result: Comparison) -> list[LayerDifference]:
    """The layers that differ significantly and make up enough of the whole difference."""
    return [
        row
        for row in result.layers
        if row.idle_fraction.verdict in ("better", "worse") and abs(row.part or 0.0) >= MIN_PART
    ]


def _layers(console: Console, result: Comparison, top: int) -> None:
    """The layers with most of the difference of the idle fraction."""
    rows = [row for row in result.layers if row.idle_fraction.difference is not None]
    counts = {v: sum(r.idle_fraction.verdict == v for r in rows) for v in ("better", "worse")}
    rest = len(rows) - sum(counts.values())
    chance = 0.05 * len(rows)
    by_chance = f"; about {chance:.0f} of {len(rows)} differ by chance" if chance >= 1 else ""
    console.print(
        f"layers: {counts['better']} better, {counts['worse']} worse, {rest} not significant{by_chance}"
    )
    rows = _telling(result)
    if rows and result.size is not None:
        rows.sort(key=lambda row: -abs(row.part or 0.0))
        columns = "layer", "of difference", "idle A", "idle B", "B − A, points", "95% interval"
        title = f"layers with {MIN_PART:.0%} of the difference or more{limited(top, len(rows))}"
        listing = table(console, *columns, title=title)
        for row in rows[:top]:
            idle = row.idle_fraction
            part = f"{signed(100 * (row.part or 0.0), 0).removeprefix('+')}%"
            bounds = [signed(100 * bound, 1) for bound in (idle.low or 0.0, idle.high or 0.0)]
            change = signed(100 * (idle.difference or 0.0), 1), f"{bounds[0]} … {bounds[1]}"
            listing.add_row(str(row.layer), part, percent(idle.a), percent(idle.b), *change)
        console.print(listing)
    console.print()


def _experts(console: Console, result: Comparison, top: int) -> None:
    """The experts that explain the differences of the layers above; others explain what hardly matters."""
    layers = {row.layer for row in _telling(result)}
    rows = [row for row in result.experts if row.layer in layers]
    if not rows or result.size is None:
        return
    title = (
        f"experts that cause it, and the part of the layer's difference they explain{limited(top, len(rows))}"
    )
    columns = "layer", "expert", "tokens A", "tokens B", "replicas A", "replicas B", "explains"
    listing = table(console, *columns, title=title)
    for row in rows[:top]:
        shares = _share(row.share_a), _share(row.share_b)
        copies = _replicas(row.replicas_a), _replicas(row.replicas_b)
        listing.add_row(str(row.layer), str(row.expert), *shares, *copies, f"{100 * row.part:.0f}%")
    console.print(listing)
    console.print()


def _settings(console: Console, result: Comparison) -> None:
    if result.a.info.run_id == result.b.info.run_id and not result.settings:
        return
    if not result.settings:
        console.print("settings: the same, as far as they were recorded")
        return
    more = limited(SHOWN_SETTINGS, len(result.settings))
    listing = table(console, "<setting", "<A", "<B", title=f"settings that differ{more}")
    for row in result.settings[:SHOWN_SETTINGS]:
        values = (value if isinstance(value, str) else json.dumps(value) for value in (row.a, row.b))
        listing.add_row(clean(row.name), *map(clean, values))
    console.print(listing)
