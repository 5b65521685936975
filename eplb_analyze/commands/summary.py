"""`summary`: how balanced was the run, and is the data complete?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

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
from eplb_analyze.output import (
    Output,
    OutputFormat,
    bar,
    figure,
    heading,
    heat,
    percent,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.summary import Summary

SHOWN_LAYERS = 5
SHOWN_EXPERTS = 5
SHOWN_REARRANGEMENTS = 12


def summary(
    dump: Dump = Path("."),
    steps: StepsOption = None,
    run: RunOption = None,
    model: ModelOption = None,
    output: OutputOption = OutputFormat.text,
) -> None:
    """How balanced was the run, when was it worst, which layers and experts, is my data complete?"""
    wanted = parse_steps(steps)
    from eplb_analyze.summary import summarize

    out = Output(output)
    opened = open_for(out, dump, run, model)
    result = summarize(opened, wanted)
    out.emit(result.to_json(), lambda console: render(console, result))
    finish(out, opened)


def render(console: Console, result: Summary) -> None:
    info, steps = result.run, result.steps
    redundant = info.num_physical_experts - info.num_logical_experts
    heading(console, info.model, f" · run {info.run_id}" + (f" · {info.engine}" if info.engine else ""))
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(info.created_unix_ns / 1e9))
    lasted = "" if result.duration_seconds is None else f", steps over {_duration(result.duration_seconds)}"
    console.print(f"began {began}{lasted}")
    console.print(
        f"{info.num_layers} MoE layers × {info.num_logical_experts} experts + {redundant} redundant "
        f"on {info.ep_size} EP ranks, scope {info.scope}"
    )
    _data(console, result)
    console.print()
    if result.spreads["balancedness"].mean is None:
        console.print("no complete step, so there are no figures")
        return
    _figures(console, result)
    _layers(console, result)
    _hot_experts(console, result)
    _rearrangements(console, result)
    if steps.first is not None and len(result.configurations) > 1:
        _configurations(console, result)


def _data(console: Console, result: Summary) -> None:
    from rich.text import Text

    counts = result.steps.to_json()
    names = ("recorded", "dummy", "not_sampled", "dropped", "rejected", "incomplete")
    parts = [f"{counts[n]:,} {n.replace('_', ' ')}" for n in names if counts[n]]
    text = f"steps {counts['first']} to {counts['last']}: " if counts["seen"] else "no step was seen"
    console.print(text + ", ".join(parts))
    if result.missing_ranks:
        missing = ", ".join(map(str, result.missing_ranks[:8]))
        more = f" and {len(result.missing_ranks) - 8} more" if len(result.missing_ranks) > 8 else ""
        text = (
            f"INCOMPLETE: {len(result.missing_ranks)} of {len(result.expected_ranks)} ranks wrote nothing: "
        )
        console.print(Text(f"{text}{missing}{more}", style="bold red"))
    if counts["incomplete"] and not result.missing_ranks:
        why = result.steps.why_incomplete()
        text = f"{counts['incomplete']:,} incomplete steps are in no figure: {why}"
        console.print(Text(text, style="yellow"))
    if counts["missing"]:
        console.print(Text(f"{counts['missing']:,} steps were seen by no rank", style="yellow"))


def _figures(console: Console, result: Summary) -> None:
    from rich.text import Text

    listing = table(console, "<", "mean", "p50", "p5", "p95", "worst", "at step")
    balance, imbalance = result.spreads["balancedness"], result.spreads["imbalance"]
    for name, s, worst, at in (
        ("balancedness (1 is perfect)", balance, balance.min, balance.min_step),
        ("imbalance, max / mean", imbalance, imbalance.max, imbalance.max_step),
    ):
        cells = [figure(v) for v in (s.mean, s.p50, s.p5, s.p95, worst)]
        listing.add_row(Text(name, style="bold"), *cells, str(at))
    console.print(listing)
    idle = percent(result.idle_fraction)
    text = ": rank time lost to waiting, if time is as tokens"
    console.print(Text.assemble("idle fraction ", (idle, "bold"), text))
    from eplb_analyze.summary import OTHER_FORMULAS

    parts = [f"{name} {figure(result.spreads[name].mean)}" for name in OTHER_FORMULAS]
    console.print(Text(f"other formulas: {', '.join(parts)}", style="dim"))
    console.print()


def _layers(console: Console, result: Summary) -> None:
    active = [layer for layer in result.layers if layer.balancedness is not None]
    worst = sorted(active, key=lambda layer: (layer.balancedness or 0.0, layer.layer))[:SHOWN_LAYERS]
    title = "worst layers" if len(active) > SHOWN_LAYERS else "layers, the worst first"
    listing = table(
        console, "layer", "balancedness", "<", "imbalance", "slowest rank", "of steps", title=title
    )
    for layer in worst:
        listing.add_row(
            str(layer.layer),
            figure(layer.balancedness),
            bar(layer.balancedness or 0.0),
            heat(figure(layer.imbalance), layer.imbalance or 0.0),
            "–" if layer.worst_rank is None else str(layer.worst_rank),
            percent(layer.worst_rank_share, 0),
        )
    console.print(listing)
    console.print()


def _hot_experts(console: Console, result: Summary) -> None:
    if not result.hot_experts:
        return
    title = "hottest experts (share of the layer)"
    listing = table(console, "layer", "expert", "share", "× mean", "replicas", title=title)
    for e in result.hot_experts[:SHOWN_EXPERTS]:
        times = heat(f"{e.times_mean:.2f}", e.times_mean)
        listing.add_row(str(e.layer), str(e.logical), percent(e.share, 2), times, str(e.replicas))
    console.print(listing)
    console.print()


def _rearrangements(console: Console, result: Summary) -> None:
    from rich.text import Text

    changes = result.rearrangements
    if not changes:
        console.print("no rearrangement: the placement never changed")
        return
    shown = ", ".join(str(r.first_step) for r in changes[:SHOWN_REARRANGEMENTS])
    more = f" and {len(changes) - SHOWN_REARRANGEMENTS} more" if len(changes) > SHOWN_REARRANGEMENTS else ""
    moved = sum(r.slots_changed for r in changes) / len(changes)
    console.print(
        Text.assemble((f"{len(changes)} rearrangements", "bold"), f" at step {shown}{more}; "),
        Text(f"{moved:,.0f} slots changed on average"),
        sep="",
    )


def _configurations(console: Console, result: Summary) -> None:
    console.print()
    title = "configurations: the shape changed, and nothing is summed across"
    listing = table(console, "<steps", "EP", "slots", "recorded", "balancedness", "idle", title=title)
    for c in result.configurations:
        listing.add_row(
            f"{c.first_step} to {c.last_step}",
            str(c.ep_size),
            str(c.num_physical_experts),
            f"{c.recorded:,}",
            figure(c.balancedness),
            percent(c.idle_fraction),
        )
    console.print(listing)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
