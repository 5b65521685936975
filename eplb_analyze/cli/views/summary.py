"""Shows how balanced a run was, which layers, ranks and experts were not, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import bar, heat, sparkline, step_axis
from eplb_analyze.cli.console import print_heading, print_line, styled, table
from eplb_analyze.cli.views import cost
from eplb_analyze.text import clean, clock_time, duration, figure, listed, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.summary import Summary

SHOWN_REARRANGEMENTS = 12


def render(
    console: Console,
    result: Summary,
    top: int = 5,
    *,
    acted: bool | None = True,
    early: str | None = None,
) -> None:
    """Print a summary; ``acted`` and ``early`` are as `banners` takes them."""

    info, steps = result.run, result.steps
    print_heading(console, info.model, f" · run {info.run_id}" + (f" · {info.engine}" if info.engine else ""))
    _banner(console, result, acted, early)
    began = clock_time(info.created_unix_ns)
    if info.origin is not None:
        from eplb_analyze.reader.run_info import imported

        when = "" if info.timed else f" (imported {began})"
        print_line(console, (imported(info.origin) + when, "yellow"))
    if info.timed:
        seconds = result.duration_seconds
        console.print(f"began {began}" + ("" if seconds is None else f", steps over {duration(seconds)}"))
    if info.num_layers:
        layers, experts = plural(info.num_layers, "MoE layer"), f"{info.num_logical_experts} experts"
        slots = f"{info.num_physical_experts} slots on {plural(info.ep_size, 'EP rank')}"
        console.print(f"{layers} × {experts} in {slots}, scope {info.scope}")
    else:
        console.print("no load was recorded, so its shape is not known")
    _data(console, result)
    console.print()
    if result.spreads["balancedness"].mean is None:
        what = "no token in any complete step" if result.configurations else "no complete step"
        console.print(f"{what}, so there are no figures")
        _estimates(console, result)
        return
    cost.render(console, result.cost)
    console.print()
    _figures(console, result)
    _estimates(console, result)
    _timeline(console, result)
    if len(result.configurations) > 1 and result.last_configuration_steps is not None:
        first, last = result.last_configuration_steps
        text = "EP size, slots or serving ranks changed: "
        text += f"ranks, losses, experts below are of steps {first} to {last}"
        print_line(console, (text, "yellow"))
        console.print()
    _layers(console, result, top)
    _losses(console, result, top)
    _hot_experts(console, result, top)
    _rearrangements(console, result, acted, early)
    if steps.first is not None and len(result.configurations) > 1:
        _configurations(console, result)


def _banner(console: Console, result: Summary, acted: bool | None, early: str | None) -> None:
    from eplb_analyze.analysis.summary import banners

    lines = banners(result, acted, early)
    for line in lines:
        print_line(console, (line, "bold red"))
    if lines:
        console.print()


def _data(console: Console, result: Summary) -> None:
    from eplb_analyze.analysis.summary import incomplete

    counts = result.steps.to_json()
    names = ("recorded", "dummy", "not_sampled", "dropped", "rejected", "incomplete")
    parts = [f"{counts[n]:,} {n.replace('_', ' ')}" for n in names if counts[n]]
    text = f"steps {counts['first']} to {counts['last']}: " if counts["seen"] else "no step was seen"
    console.print(text + ", ".join(parts))
    if counts["incomplete"] and not (result.missing_ranks or result.steps.lacks_much):
        print_line(console, (f"incomplete: {incomplete(result)}", "yellow"))
    if counts["missing"]:
        print_line(console, (f"{plural(counts['missing'], 'step')} seen by no rank", "yellow"))


def _figures(console: Console, result: Summary) -> None:
    listing = table(console, "<", "mean", "p50", "p5", "p95", "worst", "at step")
    balance, imbalance = result.spreads["balancedness"], result.spreads["imbalance"]
    for name, s, worst, at in (
        ("balancedness (1 is perfect)", balance, balance.min, balance.min_step),
        ("imbalance, max / mean", imbalance, imbalance.max, imbalance.max_step),
    ):
        cells = [figure(v) for v in (s.mean, s.p50, s.p5, s.p95, worst)]
        listing.add_row(styled((name, "bold")), *cells, str(at))
    console.print(listing)
    idle = percent(result.idle_fraction)
    print_line(console, "idle fraction ", (idle, "bold"), cost.idle(result.cost))
    from eplb_analyze.analysis.summary import OTHER_FORMULAS

    parts = [f"{name} {figure(result.spreads[name].mean)}" for name in OTHER_FORMULAS]
    print_line(console, (f"others: {', '.join(parts)}", "dim"))
    console.print()


def _estimates(console: Console, result: Summary) -> None:
    """Figures of steps that lack ranks, if these are more than the tail of a killed run."""
    shown = result.estimates if result.missing_ranks or result.steps.lacks_much else []
    for e in shown:
        steps = f"{plural(e.steps, 'step')}, {e.first_step} to {e.last_step}, without rank "
        print_line(console, ("ESTIMATE ", "bold yellow"), f"of {steps}{listed(e.missing_ranks)}:")
        figures = f"balancedness {figure(e.balancedness.mean)}, imbalance {figure(e.imbalance.mean)}"
        console.print(f"{figures}, idle {percent(e.idle_fraction)}, by the loads of the other ranks alone")
    if shown:
        console.print()


def _timeline(console: Console, result: Summary) -> None:
    """A sparkline of balancedness, with rearrangements marked below it."""
    values = [part.balancedness for part in result.timeline]
    known = [v for v in values if v is not None]
    if len(values) < 8 or not known:
        return
    over = "over time" if _ordered(result) else "by step, in no known order"
    of = f"balancedness {over}, {figure(min(known))} to {figure(max(known))}"
    each = result.timeline[0].last_step - result.timeline[0].first_step + 1
    print_line(console, (of, "bold"), ", a mark a step" if each == 1 else f", a mark each {each:,} steps")
    print_line(console, sparkline(values).rstrip())
    marks = step_axis(
        result.timeline, " " * len(values), {"▲": [change.first_step for change in result.rearrangements]}
    )
    if "▲" in marks:
        print_line(console, (f"{marks.rstrip()} rearranged", "dim"))
    console.print()


def _ordered(result: Summary) -> bool:
    """Whether steps are in time order. If not (in an imported run), stretches mean nothing."""
    origin = result.run.origin
    return origin is None or "step_order" not in origin.unknown


def _losses(console: Console, result: Summary, top: int) -> None:
    from eplb_analyze.reader.join import StepState

    loss = result.loss
    if loss is None or not loss.tokens or loss.persistent_share is None:
        return
    most = percent(loss.persistent_share, 0)
    print_line(
        console,
        "a better placement could remove at most ",
        (most, "bold"),
        f" of the excess tokens: what lasts in loads summed over {plural(loss.window_steps, 'step')}; "
        "the rest is chance within a step",
    )
    console.print()
    if loss.stretches and _ordered(result):
        listing = table(
            console, "layer", "rank", "<steps", "excess tokens", "of all loss", title="worst stretches"
        )
        for s in loss.stretches[:top]:
            steps = f"{s.first_step} to {s.last_step}"
            listing.add_row(str(s.layer), str(s.rank), steps, f"{s.excess_tokens:,.0f}", percent(s.share, 1))
        console.print(listing)
    ranks = ", ".join(f"{r.rank} ({percent(r.share, 0)})" for r in loss.ranks[:top] if r.excess_tokens)
    console.print(f"costliest ranks (share of all loss): {ranks}")
    console.print()
    if result.phases:
        listing = table(console, "<phase", "steps", "balancedness", "idle")
        for p in result.phases:
            listing.add_row(clean(p.phase), f"{p.steps:,}", figure(p.balancedness), percent(p.idle_fraction))
        console.print(listing)
        rest = result.steps.count(StepState.RECORDED) - sum(p.steps for p in result.phases)
        if rest:
            print_line(console, (f"and {plural(rest, 'step')} of no stated phase", "dim"))
        console.print()


def _layers(console: Console, result: Summary, top: int) -> None:
    active = [layer for layer in result.layers if layer.balancedness is not None]
    worst = sorted(active, key=lambda layer: (layer.balancedness or 0.0, layer.layer))[:top]
    title = f"worst layers ({top} of {len(active)})" if len(active) > top else "layers, the worst first"
    listing = table(
        console, "layer", "balancedness", "<", "imbalance", "slowest rank", "in steps", title=title
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
    if result.layer_percentiles and len(active) > top:
        parts = ", ".join(f"{name} {figure(v)}" for name, v in result.layer_percentiles.items())
        print_line(console, (f"balancedness over layers: {parts}", "dim"))
    console.print()


def _hot_experts(console: Console, result: Summary, top: int) -> None:
    if not result.hot_experts:
        return
    title = "hottest experts (share of the layer)"
    listing = table(console, "layer", "expert", "share", "× mean", "replicas", title=title)
    for e in result.hot_experts[:top]:
        times = heat(f"{e.times_mean:.2f}", e.times_mean)
        listing.add_row(str(e.layer), str(e.logical), percent(e.share, 2), times, str(e.replicas))
    console.print(listing)
    console.print()


def _rearrangements(console: Console, result: Summary, acted: bool | None, early: str | None) -> None:
    changes = result.rearrangements
    if not changes:
        if acted is None:
            source = result.run.origin is not None
            why = (
                "the source does not say when placements changed"
                if source
                else "no placement was recorded or readable"
            )
            console.print(f"{why}, so no rearrangement is known")
        elif acted:
            console.print("no rearrangement in these steps")
        elif early is not None:
            console.print(f"{early[0].lower()}{early[1:-1]}")
        return
    shown = listed([r.first_step for r in changes], SHOWN_REARRANGEMENTS)
    moved = sum(r.slots_changed for r in changes) / len(changes)
    average = " on average" if len(changes) > 1 else ""
    print_line(
        console,
        (plural(len(changes), "rearrangement"), "bold"),
        f" at step {shown}; {moved:,.0f} slots changed{average}",
    )


def _configurations(console: Console, result: Summary) -> None:
    console.print()
    title = "configurations: the shape changed, and nothing is summed across"
    listing = table(console, "<steps", "EP", "slots", "recorded", "balancedness", "idle", title=title)
    for c in result.configurations:
        listing.add_row(
            f"{c.first_step} to {c.last_step}",
            f"{c.ep_size - len(c.lost_ranks)} of {c.ep_size}" if c.lost_ranks else str(c.ep_size),
            str(c.num_physical_experts),
            f"{c.recorded:,}",
            figure(c.balancedness),
            percent(c.idle_fraction),
        )
    console.print(listing)
