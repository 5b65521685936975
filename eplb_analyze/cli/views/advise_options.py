"""Shows the setting that `advise` recommends and its alternatives: what each gains, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_line, table
from eplb_analyze.cli.views.replay import CONDITIONS, OBJECTIVES
from eplb_analyze.text import clean, figure, milliseconds, percent, plural, saves_or_costs, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from eplb_analyze.reader.recorded_setting import Setting
    from eplb_analyze.replay.advice import Advice, Judged
    from eplb_analyze.replay.replay import Replay


CONDITION_NAMES = {name for name, _ in CONDITIONS.values()}


def change_text(setting: Setting, replay: Replay) -> str:
    """How a setting differs from today's: ``every 800 steps instead of 200, window 100``."""
    from eplb_analyze.replay.settings import FIXED, conditions_text

    today, parts = replay.recorded, []
    fixed = setting.policy in FIXED
    if setting.policy not in ("static", today.policy):
        parts.append(clean(setting.policy))
    number, before = setting.num_redundant_experts, today.num_redundant_experts
    if fixed and replay.today.moves:
        usual = "" if today.interval is None else f" instead of every {plural(today.interval, 'step')}"
        parts.append(f"never rearrange{usual}")
    elif fixed and setting.policy == "static":
        parts.append("no rearrangements")
    if number != before:
        parts.append(f"{plural(number, 'redundant expert')} instead of {before:,}")
    if setting.interval is not None:
        usual = "" if today.interval in (None, setting.interval) else f" instead of {today.interval:,}"
        parts.append(f"rearrange every {plural(setting.interval, 'step')}{usual}")
        parts += [] if setting.window == today.window else [f"window {setting.window or 0:,}"]
        parts += conditions_text(setting)
    if setting.dispatch != today.dispatch:
        parts.append(f"dispatch {setting.dispatch}")
    return ", ".join(parts)


def saved_text(advice: Advice, judged: Judged) -> str:
    """``saves 0.8 ms (0.6 to 1.0) per step, 12.0%``; ``saves 3.1% (2.2 to 4.0) of the time, by tokens``."""
    net, gain = judged.net_ms_per_step, judged.gain
    if gain is None:
        return "gain not known"
    if net is not None:
        each = f"per step, {percent(abs(gain.value))}"
        return saves_or_costs(
            net.estimate, net.low, net.high, milliseconds, saved=f" {each}", more=f" more {each}"
        )
    assert advice.replay is not None
    by = f"time, by {OBJECTIVES[advice.replay.objective.value]}"

    def share(value: float, low: float, high: float) -> str:
        estimate, *bounds = (signed(100 * each, 1).removeprefix("+") for each in (value, low, high))
        return f"{estimate}% ({' to '.join(bounds)})"

    return saves_or_costs(gain.value, gain.low, gain.high, share, saved=f" of the {by}", more=f" more {by}")


def price_text(advice: Advice) -> str | None:
    """What the best setting costs, beside today's."""
    best, today = advice.best, advice.today
    if best is None or today is None:
        return None
    each = f"{_moves(best)} (today {_moves(today)})"
    memory = f"redundant experts per GPU: {_memory(best)} (today {_memory(today)})"
    return f"price per 1,000 steps: {each}; {memory}"


def _moves(judged: Judged) -> str:
    price = judged.price
    if not price.rearrangements_per_1000_steps:
        return "no pauses, nothing moved"
    pause, size = price.pause_ms_per_1000_steps, price.gb_moved_per_1000_steps
    count = plural(round(price.weights_moved_per_1000_steps), "expert weight")
    paused = f"{price.rearrangements_per_1000_steps:.1f} pauses of unknown length"
    paused = paused if pause is None else f"{milliseconds(pause)} of pauses"
    return f"{paused}, {count if size is None else f'{size:,.1f} GB'} moved"


def _memory(judged: Judged) -> str:
    size = judged.price.redundant_gb_per_gpu
    if size is not None:
        return f"{size:,.1f} GB"
    return (
        f"{judged.price.redundant_experts_per_gpu:g} slots"
        if judged.price.redundant_experts_per_gpu
        else "none"
    )


def alternatives(console: Console, advice: Advice, *, changes: bool) -> None:
    """The alternatives in words, and whether they differ from the advised setting."""
    assert advice.replay is not None
    shown = {f"({number})": judged for number, judged in enumerate(advice.alternatives, 1)}
    if not changes and advice.best is not None:
        shown = {"best other setting:": advice.best, **shown}
    for name, judged in shown.items():
        assert judged.setting is not None
        text = change_text(judged.setting, advice.replay)
        print_line(console, f"{name} {text}: {saved_text(advice, judged)}")
    if advice.comparison is not None:
        print_line(console, advice.comparison)


def options_table(console: Console, advice: Advice, *, changes: bool) -> None:
    """Today's setting, the best one and its alternatives side by side."""
    assert advice.replay is not None
    assert advice.today is not None
    replay, shown = advice.replay, [advice.today, *advice.options]
    numbers = [f"({number})" for number in range(1, len(advice.alternatives) + 1)]
    listing = table(console, "<", "today", "advised" if changes else "best other", *numbers)

    def row(name: str, cell: Callable[[Judged], str]) -> None:
        listing.add_row(name, *(cell(judged) for judged in shown))

    def of_setting(name: str) -> Callable[[Judged], str]:
        def cell(judged: Judged) -> str:
            setting = judged.setting
            value = getattr(replay.recorded if setting is None else setting, name, None)
            if value is None or (name in CONDITION_NAMES and not value):
                return "–"
            return (
                "–"
                if not value and value != 0
                else clean(f"{value:,}" if not isinstance(value, str) else value)
            )

        return cell

    row("policy", of_setting("policy"))
    row("redundant experts", of_setting("num_redundant_experts"))
    row("interval, steps", of_setting("interval"))
    row("window, steps", of_setting("window"))
    settings = [judged.setting for judged in shown if judged.setting is not None]
    for title, (name, _) in CONDITIONS.items():
        if any(getattr(setting, name) for setting in settings):
            row(title, of_setting(name))
    if any(setting.dispatch != replay.recorded.dispatch for setting in settings):
        row("dispatch", of_setting("dispatch"))
    listing.add_section()
    if advice.best is not None and advice.best.net_ms_per_step is not None:
        row("saves, ms/step", lambda judged: _bounds(judged)[0])
        row("95% interval", lambda judged: _bounds(judged)[1])
    else:
        row("saves, % of time", lambda judged: _bounds(judged)[0])
        row("95% interval", lambda judged: _bounds(judged)[1])
    listing.add_section()
    if any(judged.price.pause_ms_per_1000_steps is not None for judged in shown):
        row("pauses, ms*", lambda judged: figure(judged.price.pause_ms_per_1000_steps, 0))
    else:
        row("rearrangements*", lambda judged: figure(judged.price.rearrangements_per_1000_steps, 1))
    if advice.today.price.gb_moved_per_1000_steps is None:
        row("weights moved*", lambda judged: f"{judged.price.weights_moved_per_1000_steps:,.0f}")
        row("redundant/GPU", lambda judged: f"{judged.price.redundant_experts_per_gpu:g}")
    else:
        row("GB moved*", lambda judged: figure(judged.price.gb_moved_per_1000_steps, 1))
        row("redundant, GB/GPU", lambda judged: figure(judged.price.redundant_gb_per_gpu, 1))
    listing.add_section()
    row("balancedness", lambda judged: figure(judged.balancedness))
    row("idle", lambda judged: percent(judged.idle_fraction))
    row("active experts", lambda judged: figure(judged.active_experts, 1))
    if advice.today.traffic is not None:
        row("stay on rank", lambda judged: _share(judged, "same_rank"))
        if (replay.known_nodes or 1) > 1:
            row("go within node", lambda judged: _share(judged, "same_node"))
            row("cross nodes", lambda judged: _share(judged, "other_node"))
    console.print(listing)
    less = any(_bounds(judged)[0].startswith("−") for judged in shown)
    more = "; saves −: costs more than today" if less else ""
    print_line(console, (f"*: per 1,000 steps, at the rate of the whole run{more}", "dim"))


def _share(judged: Judged, name: str) -> str:
    return "–" if judged.traffic is None else percent(getattr(judged.traffic, name))


def _bounds(judged: Judged) -> tuple[str, str]:
    """A gain and its interval; nothing for today."""
    net, gain = judged.net_ms_per_step, judged.gain
    if net is not None:
        value, _, bounds = milliseconds(net.estimate, net.low, net.high, sign=True).partition(" ms")
        return value, bounds.strip(" ()").replace("+", "")
    if gain is None:
        return "", ""
    value, low, high = (signed(100 * bound, 1) for bound in (gain.value, gain.low, gain.high))
    return value, f"{low} to {high}".replace("+", "")
