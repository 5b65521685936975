"""Shows which file `export` wrote, and how an engine loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import (
    print_heading,
    print_line,
    print_notes,
    range_text,
    step_label,
    steps_label,
)
from eplb_analyze.text import listed, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.transfer.exporters.loads import LoadExport
    from eplb_analyze.transfer.exporters.placements import Origin, PlacementExport
    from eplb_analyze.transfer.exporters.trace import TraceExport

#: What the length of a step's slice is, by where it is from.
DURATIONS = {
    "engine": "the engine's step time",
    "device": "time on the device",
    "host": "time since the step before, waiting included",
    "unknown": "not known, an instant",
}


def render_placement(console: Console, report: PlacementExport) -> None:
    origin, placement = report.origin, report.placement
    print_heading(
        console, "placement", f" · {_source(console, origin)} · {origin.model} · run {origin.run_id}"
    )
    redundant = f"{placement.num_redundant_experts or 'none'} redundant"
    slots = f"{plural(placement.num_physical_experts, 'slot')} ({redundant})"
    console.print(
        f"{plural(len(placement.layers), 'layer')} of {slots} on {plural(placement.ep_size, 'rank')}"
    )
    rows = plural(report.rows, "row")
    written = f"written for {report.target}: {report.file}, {rows}, {report.bytes:,} bytes"
    print_line(console, written, soft_wrap=True)
    if report.usage:
        print_line(console, "to load it:")
        print_line(console, f"  {report.usage}", soft_wrap=True)
    if report.repair:
        console.print(_repair(report))
    if report.filled_layers:
        names = _ranges(report.filled_layers)
        few = len(report.filled_layers) == 1
        text = f"layer{'' if few else 's'} {names} {'is' if few else 'are'} not in the dump (dense, or not "
        print_notes(console, [text + "recorded); there the file has the placement that engines start with"])
    print_notes(console, report.notes)


def _source(console: Console, origin: Origin) -> str:
    first, last = origin.first_step, origin.last_step
    if origin.step is not None:
        return f"recorded at {step_label(console, origin.step)}"
    if first is None or last is None:
        return f"{origin.policy}"
    return f"{origin.policy} on {steps_label(console, first, last)}"


def _repair(report: PlacementExport) -> str:
    fixed = report.repair
    if fixed is None or not fixed.layers:
        return "nothing to repair: no device holds an expert twice"
    text = f"repaired in {plural(fixed.layers, 'layer')}: {plural(fixed.swaps, 'swap')} of two slots"
    if fixed.replaced:
        text += f", and {plural(fixed.replaced, 'slot')} with another expert"
    return text


def render_loads(console: Console, report: LoadExport) -> None:
    print_heading(console, "loads", f" · {report.model} · run {report.run_id}")
    steps = range_text(console, report.first_step, report.last_step)
    when = f"{plural(report.recorded, 'complete step')}, {steps}"
    console.print(f"{when}, of {plural(len(report.layers), 'layer')}")
    size = f"{report.bytes:,} bytes"
    rows = plural(report.rows, "row")
    print_line(console, f"written as {report.format}: {report.file}, {rows}, {size}", soft_wrap=True)
    print_notes(console, report.notes)


def render_trace(console: Console, report: TraceExport, *, named: bool) -> None:
    """``named``: the ranks were chosen with --rank, which excludes --max-ranks."""
    print_heading(console, "trace", f" · {report.model} · run {report.run_id}")
    steps = range_text(console, report.first_step, report.last_step)
    known = "incidents not known" if report.incidents is None else plural(report.incidents, "incident")
    found = f"{known}, {plural(report.rearrangements, 'rearrangement')}"
    console.print(f"{plural(report.steps.seen, 'step')}, {steps}; {found}")
    timed = {name: count for name, count in report.durations.items() if count}
    lengths = [f"{DURATIONS[name]} ({count:,})" for name, count in timed.items()]
    print_line(console, f"step durations: {'; '.join(lengths)}")
    if report.ranks:
        left_out = 0 if named else report.ranks_left_out
        more = f"; --max-ranks {len(report.ranks) + left_out} shows {left_out} more" if left_out else ""
        print_line(console, f"ranks with steps of their own: {listed(report.ranks, 16)}{more}")
    size = f"{plural(report.events, 'event')}, {report.bytes:,} bytes"
    print_line(console, f"written: {report.file}, {size}", soft_wrap=True)
    print_line(
        console,
        "to see it: open it at https://ui.perfetto.dev, alone or in a zip file with an engine's trace",
    )
    print_notes(console, report.notes)


def _ranges(numbers: list[int]) -> str:
    """``0 to 2, 7``"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in parts)
