"""Shows the verdict of `advise`, the evidence for it, and what it saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eplb_analyze.cli.console import (
    print_heading,
    print_line,
    print_notes,
    steps_label,
    styled,
    table,
)
from eplb_analyze.cli.views.replay import OBJECTIVES, pause_sentence
from eplb_analyze.text import clean, figure, milliseconds, percent, plural, signed

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.reader.recorded_setting import Recorded, Setting
    from eplb_analyze.replay.advise import Advice, Judged
    from eplb_analyze.replay.changes import Change, Changes

STYLES = {
    "enable": "bold yellow",
    "retune": "bold yellow",
    "fix": "bold red",
    "leave": "bold green",
    "not enough data": "bold red",
}
VERDICTS = {
    "enable": "ENABLE EPLB",
    "retune": "CHANGE THE SETTING",
    "fix": "FIX EPLB FIRST",
    "leave": "LEAVE IT AS IT IS",
    "not enough data": "NOT ENOUGH DATA",
}
RESULTS = {"gain": "bold green", "loss": "bold red", "no gain": "", "unknown": "dim"}


def render(console: Console, advice: Advice) -> None:
    print_heading(console, advice.model, f" · run {advice.run_id}")
    reasons = list(advice.reasons)
    if advice.verdict in ("enable", "retune"):
        reasons = [_advised(advice), *reasons]
    first = f": {reasons[0]}" if reasons else ""
    print_line(console, (VERDICTS[advice.verdict], STYLES[advice.verdict]), first)
    for reason in reasons[1:]:
        print_line(console, reason[:1].upper() + reason[1:])
    if advice.changes is not None:
        for line in redundancy(advice.changes, advice.min_gain):
            print_line(console, line)
    _steps(console, advice)
    print_notes(console, advice.notes)
    if advice.changes is not None and advice.changes.rows:
        console.print()
        _changes(console, advice, advice.changes)
    if advice.best is not None and advice.today is not None:
        console.print()
        _evidence(console, advice, advice.best, advice.today)
    if advice.replay is not None:
        known, idle = figure(advice.measured_balancedness), percent(advice.replay.measured_idle_fraction)
        steps = steps_label(console, advice.replay.first_step, advice.replay.last_step)
        print_line(console, f"recorded in {steps}: balancedness {known}, idle {idle} by tokens")


def _steps(console: Console, advice: Advice) -> None:
    """Which steps the settings are judged on, and why not on all of them."""
    if advice.trained is None or advice.judged is None:
        return
    parts = advice.trained, advice.judged
    chosen, judged = (steps_label(console, part.first_step, part.last_step) for part in parts)
    text = f"The gains are those in {judged}; the setting was chosen in {chosen}"
    print_line(console, f"{text}. `replay` shows the gains in all of them.")


def _advised(advice: Advice) -> str:
    """``vllm, 32 redundant experts, every 100 steps, window 500, saves 0.8 ms per step``."""
    setting = None if advice.best is None else advice.best.setting
    assert setting is not None
    policy = "no rearrangements" if setting.policy == "static" else clean(setting.policy)
    text = f"{policy}, {plural(setting.num_redundant_experts, 'redundant expert')}"
    if setting.interval is not None:
        text += f", every {plural(setting.interval, 'step')}, window {setting.window or 0:,}"
    net = advice.net_ms_per_step
    if advice.replay is not None and advice.replay.objective == "ms" and net is not None:
        return f"{text}, saves {milliseconds(net.estimate, net.low, net.high)} per step"
    basis = (
        "active experts" if advice.replay is not None and advice.replay.objective == "active" else "tokens"
    )
    return (
        text
        if advice.gain is None
        else f"{text}, saves {100 * advice.gain.value:.1f}% of the time, by {basis}"
    )


def redundancy(changes: Changes, min_gain: float) -> list[str]:
    """Whether to add redundant experts, in a sentence; nothing if no other number was tried.

    Fewer of them lose nothing only if a loss of ``min_gain`` of the time is excluded.
    """
    base = changes.base.num_redundant_experts
    rows: dict[int, Change] = {}  # one of each number, with or without rearrangements

    def worth(change: Change) -> tuple[bool, bool, bool]:
        """Of fewer the better one, of two as good the simpler; of more what replicas can do if placed."""
        fixed = change.setting.interval is None
        if change.setting.num_redundant_experts > base:
            return not fixed, False, False
        return change.result == "gain", _loses_nothing(change, min_gain), fixed

    for change in changes.rows:
        number = change.setting.num_redundant_experts
        if change.part == "redundant experts" and (number not in rows or worth(change) > worth(rows[number])):
            rows[number] = change
    more = [rows[number] for number in sorted(rows) if number > base]
    fewer = [rows[number] for number in sorted(rows) if number < base]
    lines = []
    if more:
        each = "; ".join(f"{change.setting.num_redundant_experts}: {change.result}" for change in more)
        better = [change for change in more if change.result == "gain"]
        text = "Redundant experts: do not add any" if not better else "Redundant experts: more of them help"
        if all(change.result == "unknown" for change in more):
            text = "Redundant experts: the gain of more is not known"
        lines.append(f"{text} ({each}; now {base})")
    free = [change for change in fewer if _loses_nothing(change, min_gain)]
    if free and not any(change.result == "gain" for change in more):
        least = free[0]
        static = least.setting.policy == "static" and changes.base.policy != "static"
        number, also = least.setting.num_redundant_experts, ""
        if static:
            also = " and no rearrangements"
        elif not changes.base_is_today:
            also = f" (each with {_text(changes.base, redundant=False)})"
        over_today = static or changes.base_is_today
        effect = f"you gain {_gained(least, over_today)}" if least.result == "gain" else "you lose nothing"
        text = f"With {number} redundant experts instead of today's {base}{also}, {effect}"
        lines.append(f"{text}, and each GPU holds {_fewer(least)}")
    return lines


def _loses_nothing(change: Change, min_gain: float) -> bool:
    bounded = change.alone is not None and change.alone.low > -min_gain
    return change.result == "gain" or (change.result == "no gain" and bounded)


def _gained(change: Change, over_today: bool) -> str:
    """``0.39 ms per step (0.31 to 0.46)``; as a share if not in ms, or if not over today: ``1.2% of ...``."""
    net, gain = change.net_ms_per_step, change.alone
    if net is not None and over_today:
        value, _, bounds = milliseconds(net.estimate, net.low, net.high).partition(" (")
        return f"{value} per step ({bounds}"
    return "" if gain is None else f"{100 * gain.value:.1f}% of the time"


def _text(setting: Setting, *, redundant: bool = True) -> str:
    """``vllm, 32 redundant, every 500 steps, window 1,000``; ``no rearrangements, 32 redundant``."""
    parts = ["no rearrangements" if setting.policy == "static" else clean(setting.policy)]
    parts += [f"{setting.num_redundant_experts:,} redundant"] if redundant else []
    if setting.interval is not None:
        parts += [f"every {plural(setting.interval, 'step')}", f"window {setting.window or 0:,}"]
    return ", ".join(parts)


def _changes(console: Console, advice: Advice, changes: Changes) -> None:
    """One change at a time, beside the base setting."""
    base = changes.base
    what = "today's setting" if changes.base_is_today else "the tried setting nearest today's"
    print_line(console, ("gain over today, one change at a time", "bold"), f" from {what}: {_text(base)}")
    unit = {
        "ms": "net ms per step (95% CI)",
        "tokens": "% of time, by tokens",
        "active": "% of active experts",
    }
    listing = table(console, "<change", "<to", unit[changes.basis.value], "<", "<memory per GPU")
    for change in changes.rows:
        result = styled((change.result, RESULTS[change.result]))
        listing.add_row(
            "as above" if change.part == "none" else change.part.removesuffix(" experts"),
            _change_to(base, change),
            _saved(change),
            result,
            _memory(change),
        )
    console.print(listing)
    if any(change.part == "none" for change in changes.rows):
        legend = "the word judges a change alone, over the first row; the first row and static over today"
        print_line(console, (legend, "dim"))
    if changes.basis.value == "ms" and advice.replay is not None:
        print_line(console, (pause_sentence(advice.replay.pause), "dim"))
    elif changes.basis.value == "tokens":
        why = "a step takes longer than its experts, and pauses are not included, so steps gain less"
        print_line(console, (f"by tokens, not by time: {why}", "dim"))


def _change_to(base: Setting, change: Change) -> str:
    setting = change.setting
    if change.part == "redundant experts":
        also = ", static" if setting.policy != base.policy else ""
        return f"{setting.num_redundant_experts:,}{also}"
    if change.part == "window":
        return f"{setting.window or 0:,}"
    if change.part == "interval":
        window = "" if setting.window == base.window else f", window {setting.window or 0:,}"
        return f"{setting.interval or 0:,}{window}"
    return "" if change.part == "none" else clean(setting.policy)


def _saved(change: Change) -> str:
    net, gain = change.net_ms_per_step, change.gain
    if net is not None:
        return milliseconds(net.estimate, net.low, net.high, sign=True).replace(" ms", "")
    if gain is None:
        return "–"
    value, low, high = (signed(100 * bound, 1) for bound in (gain.value, gain.low, gain.high))
    return f"{value} ({low} to {high})"


def _memory(change: Change) -> str:
    """``+2.6 GB``, or ``+58 experts`` if their size is not known."""
    if not change.experts_per_gpu:
        return "same"
    sign = "+" if change.experts_per_gpu > 0 else "−"
    experts = plural(abs(change.experts_per_gpu), "expert")
    return f"{sign}{experts}" if change.gb_per_gpu is None else f"{sign}{abs(change.gb_per_gpu):.1f} GB"


def _fewer(change: Change) -> str:
    """``2.6 GB less``, or ``58 fewer experts`` if their size is not known."""
    if change.gb_per_gpu is not None:
        return f"{abs(change.gb_per_gpu):.1f} GB less"
    return plural(abs(change.experts_per_gpu), "fewer expert")


def _evidence(console: Console, advice: Advice, best: Judged, today: Judged) -> None:
    assert advice.replay is not None
    changes = advice.verdict in ("enable", "retune")
    listing = table(console, "<", "today", "advised" if changes else "best other")
    assert best.setting is not None
    listing.add_row("policy", *(clean(s.policy or "–") for s in (advice.replay.recorded, best.setting)))
    for name, text in (
        ("num_redundant_experts", "redundant experts"),
        ("interval", "interval, steps"),
        ("window", "window, steps"),
    ):
        listing.add_row(text, *(_count(s, name) for s in (advice.replay.recorded, best.setting)))
    listing.add_section()
    listing.add_row("balancedness", figure(today.balancedness), figure(best.balancedness))
    listing.add_row("idle", percent(today.idle_fraction), percent(best.idle_fraction))
    listing.add_row("active experts", figure(today.active_experts, 1), figure(best.active_experts, 1))
    listing.add_row("rearrangements", f"{today.rearrangements:,}", f"{best.rearrangements:,}")
    listing.add_row("weights moved", f"{today.weights_moved:,}", f"{best.weights_moved:,}")
    console.print(listing)
    console.print()
    if advice.replay.objective == "ms":
        _in_ms(console, advice)
    elif advice.gain is not None:
        low, high = (signed(100 * value, 1) for value in (advice.gain.low, advice.gain.high))
        paid = "" if advice.replay.cost_per_expert_ms is None else ", less what moving costs more"
        active = advice.replay.objective == "active"
        what = "the active experts of the ranks with most" if active else "the time, by tokens"
        gain = f"{signed(100 * advice.gain.value, 1)}% of {what} (95%: {low} … {high})"
        print_line(console, "saves ", (gain, "bold"), paid)
        if advice.break_even_ms is not None:
            console.print(
                f"used up if a rank needs {advice.break_even_ms:.3g} ms to fetch one expert of one layer"
            )
    if advice.engine_arguments is not None:
        console.print("to start the engine with this setting:")
        print_line(console, f"  {advice.engine_arguments}", soft_wrap=True)
    basis = (
        f"by the cost fitted to this run's step times: {advice.replay.cost.message}; each token goes to any "
        "replica of its expert"
    )
    if advice.replay.objective != "ms":
        why = advice.replay.cost.message.removeprefix("not measurable in this run: ")
        known = "not measurable" if advice.replay.cost.ms_per_step is None else "by the run's step times"
        basis = (
            f"expected by {OBJECTIVES[advice.replay.objective.value]}, assuming that a step consists only "
            f"of its experts, and that each token goes to any replica of its expert; "
            f"milliseconds {known}: {why}"
        )
    print_line(console, (basis, "dim"))


def _in_ms(console: Console, advice: Advice) -> None:
    assert advice.replay is not None
    net, gain = advice.net_ms_per_step, advice.gain_ms_per_step
    if net is None or gain is None:
        return
    text = milliseconds(net.estimate, net.low, net.high, sign=True)
    share = "" if advice.gain is None else f", {signed(100 * advice.gain.value, 1)}% of the median step"
    print_line(console, "net gain per step ", (text, "bold"), share)
    work = milliseconds(gain.estimate, gain.low, gain.high, sign=True)
    print_line(
        console,
        f"of that, work of the slowest ranks: {work}; the rest is pauses, at the rate of the whole run",
    )
    print_line(console, pause_sentence(advice.replay.pause))
    if advice.break_even_pause_ms is not None:
        pause = milliseconds(advice.break_even_pause_ms)
        print_line(console, f"used up if a rearrangement pauses the engine for {pause}")


def _count(setting: Setting | Recorded, name: str) -> str:
    value = getattr(setting, name)
    return "–" if value is None else f"{value:,}"
