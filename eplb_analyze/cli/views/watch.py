"""Shows the live state of a run: balance over time, worst layers, ranks, recent events."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import bar, columns_of_steps, heat, step_axis, vertical_bars
from eplb_analyze.text import clean, duration, figure, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from eplb_analyze.live.alerts import Alert
    from eplb_analyze.live.snapshot import LayerSnapshot, LiveHotExpert, RankSnapshot, Snapshot

#: Rows of the rankings if the height of the screen is not known.
ROWS = 8

#: Lines of the plot, and columns of its axis labels.
HEIGHT, MARGIN = 3, 6

#: The least span of the plot, so that a steady run looks steady.
SPAN = 0.1

#: Columns of the rankings, and of one rank in the list beside them.
LAYERS, RANKS, EXPERTS, CELL = 37, 43, 38, 10

#: The view reports silence that lasts longer.
QUIET_SECONDS = 3.0


def show(console: Console, look: Snapshot) -> None:
    for line in lines(look, console.width):
        console.print(line, no_wrap=True, overflow="crop")


def lines(look: Snapshot, width: int, height: int | None = None) -> list[Text]:
    """The live view, at most ``width`` columns and ``height`` lines."""
    from rich.text import Text

    top = [*_head(look, width), *_alerts(look, width), Text()]
    top += [*_balance(look), *_plot(look, width), Text()]
    bottom = [Text(), *_hot_experts(look, width), *_events(look), *_problems(look)]
    rows = ROWS if height is None else max(1, height - len(top) - len(bottom) - 2)
    found = [*top, *_panels(look, width, rows), *bottom]
    for line in found:
        line.truncate(width)
    return found if height is None else found[:height]


def _head(look: Snapshot, width: int) -> list[Text]:
    from rich.text import Text

    state, style = _state(look)
    title = Text.assemble((clean(look.model), "bold"), clean(f" · run {look.run_id}"))
    title.truncate(max(1, width - len(state) - 1), pad=True)
    title.append(f" {state}", style)
    parts = [] if look.newest_step is None else [f"step {look.newest_step}"]
    parts += [] if look.steps_per_second is None else [f"{look.steps_per_second:,.1f} steps/s"]
    parts += [f"EP {look.ep_size}, scope {look.scope}"]
    if look.num_layers is not None:
        parts += [f"{look.num_layers} × {look.num_physical_experts} slots"]
    return [title, Text(" · ".join(parts))]


def _state(look: Snapshot) -> tuple[str, str]:
    """Which ranks are writing, in a few words, and the style of the text."""
    closed = sum(writer.closed for writer in look.writers)
    writing = sum(w.last_step is not None and not (w.stopped or w.closed or w.lost) for w in look.writers)
    ranks = plural(len(look.writers), "rank")
    quiet = look.quiet_seconds or 0.0
    if look.newest_step is None:
        return "○ no step yet" if not any(w.rejected for w in look.writers) else "○ rejected", "yellow"
    if look.closed:
        return "■ ended", "dim"
    if closed and (not writing or quiet > QUIET_SECONDS):
        return f"■ {closed} of {ranks} ended", "yellow"
    if quiet > QUIET_SECONDS:
        return f"○ nothing new for {duration(quiet)}", "yellow"
    if look.scope == "global":
        return "● live", "green"
    return f"● live, {writing} of {ranks}", "green" if writing == len(look.writers) else "yellow"


def _alerts(look: Snapshot, width: int) -> list[Text]:
    """Each incident in a line or two: the lasting ones in color, those that ended dim."""
    from rich.text import Text

    found = []
    for alert in look.alerts:
        style = "bold red" if alert.lasts else "dim"
        parts = textwrap.wrap(_alert(alert), width, subsequent_indent="  ")
        found += [Text(clean(part), style=style) for part in parts]
    return found


def _alert(alert: Alert) -> str:
    from eplb_analyze.analysis.incident_words import cause_sentence, steps_text, where

    size = f"{alert.peak_imbalance:.1f}x the mean, usually {alert.usual_imbalance:.1f}x"
    what = f"{where(alert)} at {size}"
    if alert.cause.kind != "unknown":  # `summary` knows more
        what += f"; {cause_sentence(alert, 'step {}'.format)}"
    since, until = ((time or "")[11:19] for time in (alert.since, alert.until))
    if alert.lasts:
        return f"! INCIDENT since {since}, step {alert.first_step}: {what}"
    ended = ""
    if alert.ended_by is not None and alert.ended_by.kind == "rearrangement":
        ended = f"; ended by the rearrangement at step {alert.ended_by.step}"
    return f"incident {since}-{until}, {steps_text(alert.first_step, alert.last_step)}: {what}{ended}"


def _all_retired(look: Snapshot) -> bool:
    """Whether no step of any rank is kept, only that there were steps."""
    return all(writer.last_step is not None and not writer.sessions for writer in look.writers)


def _balance(look: Snapshot) -> list[Text]:
    from rich.text import Text

    if _all_retired(look):
        return [Text("its newest steps were thinned; `summary` shows what is kept", style="yellow")]
    if not look.complete:
        return [Text("no complete step yet" if not look.incomplete else "no complete step", style="yellow")]
    spread, recent = look.balancedness, look.recent
    line = Text.assemble("balancedness ", (figure(spread.mean), "bold"))
    if recent is not None:
        line.append(", last 10 s ").append(figure(recent.balancedness), "bold")
    line.append(f", now {figure(look.latest_balancedness)}" if look.current else "")
    line.append(f" · idle {percent(look.idle_fraction)}")
    line.append("" if recent is None else f", last 10 s {percent(recent.idle_fraction)}")
    over = f"over {plural(look.complete, 'complete step')}, {look.first_step}-{look.last_step}"
    over += f"; p5 {figure(spread.p5)}"
    if spread.min_step is not None:
        over += f", worst {figure(spread.min)} at step {spread.min_step}"
    found = [line, Text(over, style="dim")]
    if not look.current:
        since = plural((look.newest_step or 0) - (look.last_step or 0), "step") + " ago"
        last = f"last complete step {look.last_step}, {since}: {figure(look.latest_balancedness)}"
        found.append(Text(last, style="yellow"))
    return found


def _plot(look: Snapshot, width: int) -> list[Text]:
    """Balancedness over the steps. The scale rarely changes: it ends at multiples of 0.05."""
    from rich.text import Text

    known = [b.balancedness for b in look.timeline if b.balancedness is not None]
    if not known:
        return []
    low, high = math.floor(min(known) * 20) / 20, math.ceil(max(known) * 20) / 20
    high = max(high, low + SPAN)
    if high > 1:
        low, high = 1 - max(SPAN, 1 - low), 1.0
    repeat = columns_of_steps(width - MARGIN, look.timeline)
    levels = [
        0 if b.balancedness is None else max(1, round((b.balancedness - low) / (high - low) * HEIGHT * 8))
        for b in look.timeline
    ]
    found = []
    for row, bars in enumerate(vertical_bars(levels, HEIGHT, repeat)):
        label = {0: f"{high:.2f}", HEIGHT - 1: f"{low:.2f}"}.get(row, "")
        line = Text(f"{label:>{MARGIN - 2}} ", style="dim")
        line.append(bars, "cyan")
        found.append(line)
    symbols = ["╌" if b.balancedness is None else "─" for b in look.timeline]
    axis = step_axis(look.timeline, symbols, {"▲": look.rearrangements}, repeat)
    return [*found, Text(" " * (MARGIN - 1) + axis, style="dim")]


def _panels(look: Snapshot, width: int, rows: int) -> list[Text]:
    """Side by side: the worst layers, the costliest ranks, hot experts and all ranks if there is room."""
    from rich.text import Text

    if not look.complete:
        return []
    panels, widths = [_layers(look, rows), _ranks(look, rows)], [LAYERS, RANKS]
    if _has_expert_panel(look, width):
        panels, widths = [*panels, _experts(look.hot_experts[:rows])], [*widths, EXPERTS]
    columns = (width - sum(widths)) // CELL
    if columns * rows >= len(look.ranks):
        now = look.ranks if look.recent is None else look.recent.ranks
        down = -(-len(now) // columns)
        title = "load of all ranks, x mean" + ("" if look.recent is None else ", last 10 s")
        loads = [Text(title, style="bold"), Text()]
        for row in range(down):
            line = Text()
            for rank in now[row::down]:
                line.append(f"{f'r{rank.rank}':>5}", "dim")
                line.append_text(_load(rank.times_mean, 5))
            loads.append(line)
        panels, widths = [*panels, loads], [*widths, columns * CELL]
    return list(_beside(panels, widths))


def _layers(look: Snapshot, rows: int) -> list[Text]:
    from rich.text import Text

    recent = {} if look.recent is None else {layer.layer: layer for layer in look.recent.layers}

    def worse(layer: LayerSnapshot) -> float:
        both = [layer.balancedness, recent[layer.layer].balancedness if recent else None]
        return min((value for value in both if value is not None), default=1.0)

    lines = [Text("worst layers", style="bold"), Text("layer   balance   10 s  slowest", style="dim")]
    for layer in sorted(look.layers, key=worse)[:rows]:
        now = recent.get(layer.layer, layer)
        line = Text(f"{layer.layer:>5}  {figure(layer.balancedness):>8}  ")
        line.append(f"{figure(now.balancedness if recent else None):>5}  ")
        if now.worst_rank is not None and now.worst_rank_share is not None:
            line.append(f"r{now.worst_rank:<3} {percent(now.worst_rank_share, 0):>4}")
        lines.append(line)
    return lines


def _ranks(look: Snapshot, rows: int) -> list[Text]:
    """A full bar is all waiting in the last 10 s."""
    from rich.text import Text

    recent = {} if look.recent is None else {rank.rank: rank for rank in look.recent.ranks}

    def cost(rank: RankSnapshot) -> tuple[float, int]:
        both = [rank.excess_share, recent[rank.rank].excess_share if rank.rank in recent else None]
        return -max((value for value in both if value is not None), default=0.0), rank.rank

    lines = [
        Text("ranks that the others wait for", style="bold"),
        Text("rank  x mean   10 s  of waiting   10 s", style="dim"),
    ]
    for rank in sorted(look.ranks, key=cost)[:rows]:
        now = recent.get(rank.rank)
        line = Text(f"{f'r{rank.rank}':>4}  ")
        line.append_text(_load(rank.times_mean, 6))
        line.append("  ").append_text(_load(None if now is None else now.times_mean, 5))
        share = None if now is None else now.excess_share
        line.append(f"  {percent(rank.excess_share, 0):>10}  {percent(share, 0):>5} ")
        line.append(bar((rank.excess_share if now is None else share) or 0.0, 4), "dim")
        lines.append(line)
    return lines


def _experts(experts: Sequence[LiveHotExpert]) -> list[Text]:
    from rich.text import Text

    lines = [
        Text("hot experts", style="bold"),
        Text("layer  expert  x mean   10 s  replicas", style="dim"),
    ]
    for one in experts:
        line = Text(f"{one.layer:>5}  {one.expert:>6}  {figure(one.times_mean, 1):>6}  ")
        lines.append(line.append(f"{figure(one.recent_times_mean, 1):>5}  {one.replicas:>8}"))
    return lines


def _has_expert_panel(look: Snapshot, width: int) -> bool:
    return bool(look.hot_experts) and width >= LAYERS + RANKS + EXPERTS


def _hot_experts(look: Snapshot, width: int) -> list[Text]:
    """The hot experts in one line, if there is no room for a panel of them."""
    from rich.text import Text

    if not look.complete or not look.hot_experts or _has_expert_panel(look, width):
        return []
    line = "hot experts, x mean in the last 10 s: "
    parts: list[str] = []
    for one in look.hot_experts:
        times = one.times_mean if one.recent_times_mean is None else one.recent_times_mean
        part = f"layer {one.layer} expert {one.expert} {times:.1f} ({plural(one.replicas, 'replica')})"
        if len(line) + len(", ".join([*parts, part])) > width:
            break
        parts.append(part)
    return [Text(line + ", ".join(parts))] if parts else []


def _load(times_mean: float | None, width: int) -> Text:
    """A rank's load over the mean."""
    return heat(f"{figure(times_mean, 2):>{width}}", times_mean)


def _beside(panels: Sequence[Sequence[Text]], widths: Sequence[int]) -> Iterable[Text]:
    from rich.text import Text

    for row in range(max(map(len, panels))):
        line = Text()
        for panel, width in zip(panels, widths, strict=True):
            cell = panel[row].copy() if row < len(panel) else Text()
            cell.truncate(width, pad=True)
            line.append_text(cell)
        line.rstrip()
        yield line


def _events(look: Snapshot) -> list[Text]:
    from rich.text import Text

    this = look.rearrangement
    if this is None:
        where = "in these steps" if look.complete else "is known"
        moved = Text(f"no rearrangement {where}", style="dim")
    else:
        moved = Text(f"▲ rearranged at step {this.first_step}, {plural(this.layers, 'layer')}")
        if this.gain is not None:
            moved.append(f": {figure(this.before)} → {figure(this.after)}")
            moved.append(f" ({signed(this.gain)})", "green" if this.gain > 0 else "red")
            moved.append(f" over {this.before_steps:,} and {plural(this.after_steps, 'step')}", "dim")
        elif this.after is not None:
            moved.append(f", {figure(this.after)} after it")
            moved.append(f" over {plural(this.after_steps, 'step')}", "dim")
    dropped, rejected = (sum(getattr(w, name) for w in look.writers) for name in ("dropped", "rejected"))
    counts = Text("steps: ")
    for count, name, style in (
        (look.complete, "complete", ""),
        (look.in_flight, "in flight", ""),
        (look.incomplete, "incomplete", "yellow"),
        (dropped, "dropped", "yellow"),
        (rejected, "rejected", "yellow"),
    ):
        counts.append(f"{count:,} {name}", style if count else "")
        counts.append(" · ")
    counts.right_crop(3)
    return [moved, counts]


def _problems(look: Snapshot) -> list[Text]:
    """Missing, stopped and restarted ranks, lost steps and findings, one line each."""
    from rich.text import Text

    found = []
    refused = [w.rank for w in look.writers if w.last_step is None and w.rejected]
    silent = [rank for rank in look.missing_ranks if rank not in refused]
    if silent:
        found.append(f"nothing from {_named(silent)}")
    if refused:
        found.append(f"nothing but rejected steps from {_named(refused)}")
    lost = [w for w in look.writers if w.lost]
    if lost:
        at = ", ".join(str(w.last_step) if w.last_step is not None else "none" for w in lost[:6])
        found.append(
            f"{_named([w.rank for w in lost])} lost, last step {at}: the engine continues without it"
        )
    stopped = [w for w in look.writers if w.stopped and not w.lost]
    if stopped:
        first = min(stopped, key=lambda w: w.last_step or 0)
        since = (
            f"{first.behind:,} steps ago" if len(stopped) == 1 else f"the first {first.behind:,} steps ago"
        )
        found.append(f"{_named([w.rank for w in stopped])} stopped {since}, at step {first.last_step}")
    early = [w for w in look.writers if w.closed and not w.stopped and not w.lost and w.behind]
    if early:
        first = max(early, key=lambda w: w.behind or 0)
        ahead = plural(first.behind or 0, "step")
        since = f"{ahead} before others" if len(early) == 1 else f"the first {ahead} before others"
        found.append(f"{_named([w.rank for w in early])} ended {since}, at step {first.last_step}")
    lossy = [w.rank for w in look.writers if (w.dropped or w.rejected) and w.rank not in refused]
    if lossy:
        found.append(f"steps dropped or rejected by {_named(lossy)}")
    again = [w.rank for w in look.writers if w.sessions > 1]
    if again:
        found.append(f"restarted: {_named(again)}")
    if look.shape_changed is not None:
        found.append(f"EP size or slots changed at step {look.shape_changed}")
    found += [finding.text for finding in look.findings]
    return [Text(clean(text), style="yellow") for text in found]


def _named(ranks: list[int]) -> str:
    """``rank 3`` or ``ranks 3, 5 and 7``; at most six are named."""
    shown = [str(rank) for rank in ranks[:6]]
    more = [f"{len(ranks) - 6} more"] if len(ranks) > 6 else []
    *names, last = [*shown, *more]
    return f"rank {last}" if not names else f"ranks {', '.join(names)} and {last}"
