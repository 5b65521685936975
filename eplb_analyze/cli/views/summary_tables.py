"""Shows the tables of `summary --full`: formulas, layers, losses, phases, hot experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import AT_LEAST, bar, heat, print_hot_experts
from eplb_analyze.cli.console import print_line, step_time, styled, table, times_known
from eplb_analyze.cli.views import cost
from eplb_analyze.report import answer
from eplb_analyze.text import clean, duration, figure, percent, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.summary_report import Summary, SummedLoads


def render(console: Console, result: Summary, top: int = 5) -> None:
    """Print the tables; a run without figures has none."""
    if result.rollup is not None and result.rollup.summed is not None:
        _summed_layers(console, result.rollup.summed, top)
    if result.spreads["balancedness"].mean is None:
        return
    console.print(f"scope {result.run.scope}, {_data(result)}")
    console.print()
    cost.render(console, result.cost)
    if result.lost_rank_seconds:
        print_line(console, f"GPU time lost to imbalance: {duration(result.lost_rank_seconds)}")
    console.print()
    _figures(console, result)
    if len(result.configurations) > 1 and result.last_configuration_steps is not None:
        first, last = result.last_configuration_steps
        text = "EP size, slots or serving ranks changed: "
        text += f"ranks, losses and experts below cover steps {first}-{last}"
        print_line(console, (text, "yellow"))
        console.print()
    _layers(console, result, top)
    _losses(console, result, top)
    if result.hot_experts:
        title = AT_LEAST if result.hot_experts_tier == "minutes" else "hottest experts"
        print_hot_experts(console, result.hot_experts, top, title, [e.layer for e in result.hot_experts])
    if len(result.configurations) > 1:
        _configurations(console, result)


def _data(result: Summary) -> str:
    counts = result.steps.to_json()
    names = ("recorded", "dummy", "not_sampled", "dropped", "rejected", "incomplete", "missing")
    parts = [f"{counts[n]:,} {n.replace('_', ' ')}" for n in names if counts[n]]
    return f"steps {counts['first']}-{counts['last']}: {', '.join(parts)}"


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
    from eplb_analyze.analysis.summary_report import OTHER_FORMULAS

    parts = [f"{name} {figure(result.spreads[name].mean)}" for name in OTHER_FORMULAS]
    print_line(console, (f"others: {', '.join(parts)}", "dim"))
    console.print()


def ordered(result: Summary) -> bool:
    """Whether steps are in time order. If not (in an imported run), stretches mean nothing."""
    origin = result.run.origin
    return origin is None or "step_order" not in origin.unknown


def _losses(console: Console, result: Summary, top: int) -> None:
    from eplb_analyze.reader.join import StepState

    loss = result.loss
    if loss is None or not loss.tokens:
        return
    if loss.persistent_share is not None:
        print_line(
            console,
            "better placement could remove at most ",
            (percent(loss.persistent_share, 0), "bold"),
            " of the excess tokens, the share that persists in loads summed over "
            f"{plural(loss.window_steps, 'step')}; the rest varies {answer.varies(result)}",
        )
    else:
        print_line(console, answer.too_few_steps(result, loss))
    console.print()
    if loss.stretches and ordered(result):
        width = result.timeline[0].last_step - result.timeline[0].first_step + 1
        title = "worst periods" + (f", in bins of {width:,} steps" if width > 1 else "")
        columns = ("<steps", *_time_column(console), "excess tokens", "of all excess")
        listing = table(console, "layer", "rank", *columns, title=title)
        for s in loss.stretches[:top]:
            steps = (f"{s.first_step}-{s.last_step}", *_time(console, s.first_step))
            listing.add_row(str(s.layer), str(s.rank), *steps, f"{s.excess_tokens:,.0f}", percent(s.share, 1))
        console.print(listing)
    if loss.ranks:
        ranks = ", ".join(f"{r.rank} ({percent(r.share, 0)})" for r in loss.ranks[:top] if r.excess_tokens)
        console.print(f"ranks with the most excess tokens (share of all): {ranks}")
        console.print()
    if result.phases:
        listing = table(console, "<phase", "steps", "balancedness", "idle")
        for p in result.phases:
            listing.add_row(clean(p.phase), f"{p.steps:,}", figure(p.balancedness), percent(p.idle_fraction))
        console.print(listing)
        rest = result.steps.count(StepState.RECORDED) - sum(p.steps for p in result.phases)
        if rest:
            print_line(console, (f"and {plural(rest, 'step')} without a recorded phase", "dim"))
        console.print()


def _layers(console: Console, result: Summary, top: int) -> None:
    active = [layer for layer in result.layers if layer.balancedness is not None]
    worst = sorted(active, key=lambda layer: (layer.balancedness or 0.0, layer.layer))[:top]
    title = f"worst layers ({top} of {len(active)})" if len(active) > top else "layers, worst first"
    listing = table(
        console, "layer", "balancedness", "<", "imbalance", "slowest rank", "in steps", title=title
    )
    for layer in worst:
        listing.add_row(
            str(layer.layer),
            figure(layer.balancedness),
            bar(layer.balancedness or 0.0),
            heat(figure(layer.imbalance), layer.imbalance),
            "–" if layer.worst_rank is None else str(layer.worst_rank),
            percent(layer.worst_rank_share, 0),
        )
    console.print(listing)
    if result.layer_percentiles and len(active) > top:
        parts = ", ".join(f"{name} {figure(v)}" for name, v in result.layer_percentiles.items())
        print_line(console, (f"balancedness over layers: {parts}", "dim"))
    console.print()


def _summed_layers(console: Console, summed: SummedLoads, top: int) -> None:
    shown = summed.layers[:top]
    title = "layers, loads summed per minute" + (
        f" (the least balanced {top} of {len(summed.layers)})" if len(summed.layers) > top else ""
    )
    listing = table(console, "layer", "balancedness", "<", "rank with most", "in minutes", title=title)
    for layer in shown:
        listing.add_row(
            str(layer.layer),
            figure(layer.balancedness),
            bar(layer.balancedness),
            "–" if layer.worst_rank is None else str(layer.worst_rank),
            percent(layer.worst_rank_share, 0),
        )
    console.print(listing)


def _configurations(console: Console, result: Summary) -> None:
    title = "configurations (sums never combine two of them)"
    columns = ("EP", "slots", "recorded", "balancedness", "idle")
    listing = table(console, "<steps", *_time_column(console), *columns, title=title)
    for c in result.configurations:
        listing.add_row(
            f"{c.first_step}-{c.last_step}",
            *_time(console, c.first_step),
            f"{c.ep_size - len(c.lost_ranks)} of {c.ep_size}" if c.lost_ranks else str(c.ep_size),
            str(c.num_physical_experts),
            f"{c.recorded:,}",
            figure(c.balancedness),
            percent(c.idle_fraction),
        )
    console.print(listing)


def _time_column(console: Console) -> tuple[str, ...]:
    """The column of the times at which steps began; none if the times are not known."""
    return ("<since",) if times_known(console) else ()


def _time(console: Console, step: int) -> tuple[str, ...]:
    return (step_time(console, step),) if times_known(console) else ()
