"""Shows the verdict of `advise`, the evidence for it, and what it saves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import (
    print_heading,
    print_line,
    print_notes,
    steps_label,
    styled,
    table,
)
from eplb_analyze.cli.views.advise_options import (
    alternatives,
    change_text,
    options_table,
    price_text,
    saved_text,
)
from eplb_analyze.cli.views.replay import CONDITIONS, OBJECTIVES, pause_sentence, print_links, shared
from eplb_analyze.text import (
    clean,
    figure,
    milliseconds,
    milliseconds_bounded,
    percent,
    plural,
    saves_or_costs,
    signed,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from eplb_analyze.reader.recorded_setting import Setting
    from eplb_analyze.replay.advice import Advice
    from eplb_analyze.replay.changes import Change, Changes
    from eplb_analyze.replay.replay import Replay

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
RESULTS = {"gain": "bold green", "loss": "bold red", "unknown": "dim"}


def render(console: Console, advice: Advice) -> None:
    print_heading(console, advice.model, f" · run {advice.run_id}")
    reasons = list(advice.reasons)
    changed = advice.verdict in ("enable", "retune")
    if changed:
        reasons = [_advised(advice), *reasons]
    first = f": {reasons[0]}" if reasons else ""
    verdict = "REARRANGE LESS OFTEN" if advice.less_often else VERDICTS[advice.verdict]
    print_line(console, (verdict, STYLES[advice.verdict]), first)
    for reason in reasons[1:]:
        print_line(console, reason[:1].upper() + reason[1:])
    if advice.least_interval is not None:
        least = f"{100 * advice.min_gain:g}% of the time"
        text = f"with an interval of {plural(advice.least_interval, 'step')} or more, pauses take less than"
        print_line(console, f"{text[:1].upper()}{text[1:]} {least}")
    if changed and (price := price_text(advice)) is not None:
        print_line(console, price)
    if advice.best is not None:
        alternatives(console, advice, changes=changed)
    if advice.changes is not None:
        assert advice.replay is not None
        for line in redundancy(
            advice.changes,
            advised=advice.verdict in ("enable", "retune"),
            min_gain=advice.min_gain,
            layers=advice.replay.part.shape.num_moe_layers,
        ):
            print_line(console, line)
    _steps(console, advice)
    print_notes(console, advice.notes)
    if advice.best is not None and advice.today is not None:
        console.print()
        options_table(console, advice, changes=changed)
        _evidence(console, advice)
    if advice.changes is not None and advice.changes.rows:
        console.print()
        _changes(console, advice, advice.changes)
        console.print()
    if advice.best is not None:
        _basis(console, advice)
    if advice.replay is not None:
        known, idle = figure(advice.measured_balancedness), percent(advice.replay.measured_idle_fraction)
        steps = steps_label(console, advice.replay.first_step, advice.replay.last_step)
        print_line(console, f"recorded in {steps}: balancedness {known}, idle {idle} by tokens")


def _steps(console: Console, advice: Advice) -> None:
    """Which steps the settings are judged on; nothing if no setting was."""
    if advice.best is None or advice.trained is None or advice.judged is None:
        return
    parts = advice.trained, advice.judged
    chosen, judged = (steps_label(console, part.first_step, part.last_step) for part in parts)
    text = f"The setting was chosen in {chosen}; the gains are those of {judged}"
    print_line(console, f"{text}. `replay` shows the gains over all of these steps.")


def _advised(advice: Advice) -> str:
    """``32 redundant experts instead of 0, rearrange every 100 steps: saves 0.8 ms per step, 12% of it``."""
    assert advice.best is not None
    assert advice.best.setting is not None
    assert advice.replay is not None
    text = change_text(advice.best.setting, advice.replay)
    return f"{text}: {saved_text(advice, advice.best)}"


def redundancy(changes: Changes, *, advised: bool, min_gain: float, layers: int) -> list[str]:
    """Whether to add redundant experts, and whether fewer are as good; nothing if no other number was tried.

    If the engine did not rearrange as the base does, settings that do are compared with the base.
    """
    base = changes.base.num_redundant_experts
    rows: dict[int, Change] = {}  # one of each number, with or without rearrangements

    def worth(change: Change) -> tuple[bool, bool, bool]:
        """Of fewer what loses nothing, over today if it can be; of more what replicas can do if placed."""
        fixed = change.setting.policy == "static"
        if change.setting.num_redundant_experts > base:
            return not fixed, False, False
        return _as_good(change, min_gain), not _over_base(changes, change), fixed

    for change in changes.rows:
        number = change.setting.num_redundant_experts
        if change.part == "redundant experts" and (number not in rows or worth(change) > worth(rows[number])):
            rows[number] = change
    more = [rows[number] for number in sorted(rows) if number > base]
    free = [rows[number] for number in sorted(rows) if number < base and _as_good(rows[number], min_gain)]
    better = [change for change in more if change.alone_result == "gain"]
    lines = [_more(changes, more)] if more else []
    if free and not better:
        lines.append(_fewer(changes, free[0], advised, layers))
    return lines


def _over_base(changes: Changes, change: Change) -> bool:
    """Whether ``alone`` compares two settings tried."""
    return changes.from_another and change.setting.policy != "static"


def _rearranged(changes: Changes) -> str:
    return f"each number rearranged every {plural(changes.base.interval or 0, 'step')}"


def _more(changes: Changes, more: Sequence[Change]) -> str:
    """``Redundant experts: do not add any (64: no effect; 96: loss; now 32)``."""
    base = changes.base
    rearranged = [change for change in more if _over_base(changes, change)]
    over_base, more = bool(rearranged), rearranged or more
    each = "; ".join(f"{_change_to(base, change)}: {change.alone_result}" for change in more)
    text = "do not add any"
    if any(change.alone_result == "gain" for change in more):
        text = "more of them help"
    elif all(change.alone_result == "unknown" for change in more):
        text = "the gain of more is not known"
    which = f", {_rearranged(changes)}" if over_base else ""
    beside = "compared with" if over_base else "now"
    return f"Redundant experts{which}: {text} ({each}; {beside} {base.num_redundant_experts})"


def _fewer(changes: Changes, change: Change, advised: bool, layers: int) -> str:
    """What fewer redundant experts save; a gain only if the verdict is to change something."""
    number, base = change.setting.num_redundant_experts, changes.base.num_redundant_experts
    over_base, static = _over_base(changes, change), change.setting.policy == "static"
    also = " and no rearrangements" if static and changes.base.policy != "static" else ""
    memory = f"each GPU holds {_less_memory(change, layers)}"
    if advised and change.result == "gain" and not over_base:
        gain = f"you gain {_gained(change)}"
        return f"With {number} redundant experts instead of today's {base}{also}, {gain}, and {memory}"
    assert change.alone is not None
    longer = "no longer" if change.alone.low >= 0 else f"at most {percent(-change.alone.low)} longer"
    if over_base:
        which = _rearranged(changes)
        which = which[:1].upper() + which[1:]
        text = f"{which}: {plural(number, 'redundant expert')} are as good as {base}; steps take {longer}"
    else:
        text = f"With {number} redundant experts instead of today's {base}{also}, steps take {longer}"
    return f"{text}{'' if changes.basis.value == 'ms' else ', by tokens'}, and {memory}"


def _as_good(change: Change, min_gain: float) -> bool:
    """Whether a loss of the least gain is excluded."""
    return change.alone is not None and change.alone.low > -min_gain


def _gained(change: Change) -> str:
    """``0.39 ms per step (0.31 to 0.46)``; ``1.2% of the time`` if not in ms."""
    net, gain = change.net_ms_per_step, change.gain
    if net is not None:
        value, _, bounds = milliseconds(net.estimate, net.low, net.high).partition(" (")
        return f"{value} per step ({bounds}"
    return "" if gain is None else f"{100 * gain.value:.1f}% of the time"


def _text(setting: Setting, *, redundant: bool = True) -> str:
    """``vllm, 32 redundant, every 500 steps, window 1,000``; ``no rearrangements, 32 redundant``."""
    from eplb_analyze.replay.settings import conditions_text

    parts = ["no rearrangements" if setting.policy == "static" else clean(setting.policy)]
    parts += [f"{setting.num_redundant_experts:,} redundant"] if redundant else []
    if setting.interval is not None:
        parts += [f"every {plural(setting.interval, 'step')}", f"window {setting.window or 0:,}"]
        parts += conditions_text(setting)
    return ", ".join(parts)


def _changes(console: Console, advice: Advice, changes: Changes) -> None:
    """One change at a time, beside the base setting; numbers and words are over what was recorded."""
    assert advice.replay is not None
    title = ("one change at a time, compared with what was recorded", "bold")
    print_line(console, title, f"; {_origin(changes, advice.replay)}: {_text(changes.base)}")
    unit = {
        "ms": "saves ms/step (95% CI)",
        "tokens": "saves % of time, by tokens",
        "active": "saves % of active experts",
        "tokens+traffic": "saves % of time, combined",
    }
    listing = table(console, "<change", "<to", unit[changes.basis.value], "<", "<per GPU")
    for change in changes.rows:
        worked = bool(changes.base_is_today and not advice.replay.today.moves)
        part = ("today's" if changes.base_is_today else "base", "had it run" if worked else "replayed")
        listing.add_row(
            part[0] if change.part == "none" else change.part.removesuffix(" experts"),
            part[1] if change.part == "none" else _change_to(changes.base, change),
            _saved(change),
            styled(_word(change)),
            _memory(change),
        )
    console.print(listing)
    for line in _legend(advice, changes):
        print_line(console, (line, "dim"))


def _origin(changes: Changes, replay: Replay) -> str:
    """What the rows change one part of, and why that is not today's setting."""
    if changes.base_is_today:
        return "from today's setting" + ("" if replay.today.moves else ", had it run")
    interval, steps = replay.recorded.interval, replay.last_step + 1 - replay.first_step
    if interval is not None and interval >= steps:
        why = f"today's interval, {plural(interval, 'step')}, is longer than these steps"
    elif replay.recorded.setting() is None:
        why = "today's setting is not known in full"
    else:
        why = "today's setting was not tried"
    return f"{why}, so each row changes one part of a base near it"


def _word(change: Change) -> tuple[str, str]:
    """The result and its color; an assumed one is not as sure as it looks."""
    if change.by_assumed_pause and change.result not in ("no effect", "unclear", "unknown"):
        return f"assumed {change.result.split()[-1]}", "yellow"
    return change.result, RESULTS.get(change.result, "")


def _legend(advice: Advice, changes: Changes) -> list[str]:
    """What the words in the table mean, and what the figures assume."""
    assert advice.replay is not None
    ms, pause = changes.basis.value == "ms", advice.replay.pause
    words = {_word(change)[0] for change in changes.rows}
    lines = []
    first = {word.split()[0] for word in words}
    least = f"{100 * advice.min_gain:g}% of the {'step' if ms else 'time'} (--min-gain)"
    if "small" in first:
        lines.append(f"small: less than {least}")
    if "likely" in first:
        lines.append("likely: not certain, because one of so many rows can look like this by chance")
    if "no" in first:
        lines.append(f"no effect: a gain or loss of more than {least} is excluded")
    if "unclear" in first:
        lines.append(f"unclear: a gain or loss of more than {least} is possible")
    if "assumed" in first:
        each = milliseconds(pause.ms.value)
        lines.append(f"assumed: decided by the pauses, which are assumed to take {each} each")
    if any(" at " in _saved(change) for change in changes.rows):
        lines.append(
            "at most, at least: other models explain the step times about equally well, and the most extreme "
            "of them gives this value"
        )
    conditions = [change.setting for change in changes.rows if change.part == "condition"]
    lines += [
        f"{title}: {meaning}"
        for title, (name, meaning) in CONDITIONS.items()
        if any(getattr(setting, name) and not setting.layers_per_step for setting in conditions)
    ]
    if any(change.experts_per_gpu for change in changes.rows):
        layers = plural(advice.replay.part.shape.num_moe_layers, "layer")
        lines.append(f"per GPU: expert weights that each GPU holds, over all {layers}")
    if advice.verdict == "leave" and "gain" in words:
        lines.append(
            "the verdict is on the setting that was chosen in the first part; confirm the gain of any other "
            "row on a second recording"
        )
    if ms:
        lines += [] if advice.net_ms_per_step is not None else [pause_sentence(pause)]
    elif changes.basis.value == "tokens":
        why = "a step takes longer than its experts, and pauses are not included, so steps gain less"
        lines.append(f"by tokens, not by time: {why}")
    return lines


def _change_to(base: Setting, change: Change) -> str:
    setting = change.setting
    if change.part == "redundant experts":
        also = ", static" if setting.policy != base.policy else ""
        return f"{setting.num_redundant_experts:,}{also}"
    if change.part == "window":
        return f"{setting.window or 0:,}"
    if change.part == "condition":
        if setting.layers_per_step is not None:
            return f"{plural(setting.layers_per_step, 'layer')}/step"
        found = {title: getattr(setting, name) for title, (name, _) in CONDITIONS.items()}
        return ", ".join(f"{title} {value:,}" for title, value in found.items() if value)
    if change.part == "dispatch":
        return setting.dispatch
    if change.part == "interval":
        window = "" if setting.window == base.window else f", window {setting.window or 0:,}"
        return f"{setting.interval or 0:,}{window}"
    return clean(setting.policy)


def _saved(change: Change) -> str:
    net, gain = change.net_ms_per_step, change.gain
    if net is not None:
        return milliseconds_bounded(net.estimate, net.low, net.high).replace(" ms", "")
    if gain is None:
        return "–"
    value, low, high = (signed(100 * bound, 1) for bound in (gain.value, gain.low, gain.high))
    return f"{value} ({low} to {high})"


def _memory(change: Change) -> str:
    """``+2.6 GB``, or ``+58 experts`` (over all layers) if their size is not known."""
    if not change.experts_per_gpu:
        return "same"
    sign = "+" if change.experts_per_gpu > 0 else "−"
    experts = plural(abs(change.experts_per_gpu), "expert")
    return f"{sign}{experts}" if change.gb_per_gpu is None else f"{sign}{abs(change.gb_per_gpu):.1f} GB"


def _less_memory(change: Change, layers: int) -> str:
    """``2.6 GB less``, or ``58 fewer experts (1 per layer)`` if their size is not known."""
    if change.gb_per_gpu is not None:
        return f"{abs(change.gb_per_gpu):.1f} GB less"
    experts = abs(change.experts_per_gpu)
    return f"{plural(experts, 'fewer expert')} ({experts // layers} per layer)"


def _evidence(console: Console, advice: Advice) -> None:
    """What the gain consists of, what uses it up, and how to start the engine."""
    assert advice.replay is not None
    if advice.replay.objective == "ms":
        _in_ms(console, advice)
    elif advice.break_even_ms is not None:
        least = f"{advice.break_even_ms:.3g} ms"
        print_line(
            console,
            f"the gain is used up if a rank needs {least} to fetch the weights of one expert of one layer",
        )
    print_links(console, advice.replay, None if advice.best is None else advice.best.links, _shown(advice))
    if advice.engine_arguments is not None:
        console.print("to start the engine with this setting:")
        print_line(console, f"  {advice.engine_arguments}", soft_wrap=True)


def _shown(advice: Advice) -> str:
    """The setting that is shown first, in words."""
    return "the advised setting" if advice.verdict in ("enable", "retune") else "the best other setting"


def _basis(console: Console, advice: Advice) -> None:
    """What the gains assume."""
    assert advice.replay is not None
    basis = (
        f"gains follow from the cost fitted to this run's step times: {advice.replay.cost.message}; "
        f"{shared(advice.replay)}"
    )
    if advice.replay.objective != "ms":
        why = advice.replay.cost.message.removeprefix("not measurable in this run: ")
        known = "not measurable" if advice.replay.cost.ms_per_step is None else "by the run's step times"
        basis = (
            f"expected by {OBJECTIVES[advice.replay.objective.value]}, assuming that a step consists only "
            f"of its experts, and that {shared(advice.replay)}; "
            f"milliseconds {known}: {why}"
        )
    print_line(console, (basis, "dim"))


def _in_ms(console: Console, advice: Advice) -> None:
    assert advice.replay is not None
    net, gain = advice.net_ms_per_step, advice.gain_ms_per_step
    if net is None or gain is None:
        return
    work = saves_or_costs(
        gain.estimate, gain.low, gain.high, milliseconds, saved=" per step", more=" more per step"
    )
    pauses = net.estimate - gain.estimate
    paused = f"{milliseconds(abs(pauses))} per step {'less' if pauses > 0 else 'more'} than today"
    if math.isclose(net.estimate, gain.estimate):
        paused = "as long as today"
    pauses_text = f"it pauses the engine {paused}, at the rate of the whole run"
    print_line(console, f"without pauses, {_shown(advice)} {work}; {pauses_text}")
    print_line(console, pause_sentence(advice.replay.pause))
    if advice.break_even_pause_ms is not None:
        pause = milliseconds(advice.break_even_pause_ms)
        print_line(console, f"the gain is used up if a rearrangement pauses the engine for {pause}")
