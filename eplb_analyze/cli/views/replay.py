"""Shows the settings that `replay` tried, the best first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eplb_analyze.cli.console import (
    limited,
    print_heading,
    print_hidden,
    print_line,
    print_notes,
    steps_label,
    styled,
    table,
)
from eplb_analyze.text import clean, figure, milliseconds, percent, plural, signed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from eplb_analyze.analysis.milliseconds import Milliseconds
    from eplb_analyze.analysis.traffic import Pair
    from eplb_analyze.replay.pricing import Pause
    from eplb_analyze.replay.replay import Links, Outcome, Replay


#: From this share of tokens on, the legend says that they are dealt in rounds.
MOSTLY = 0.5

#: So many links between ranks, and between nodes, are named.
SHOWN_LINKS = 3
#: From this many columns on, the gain has a column beside the net gain.
WIDE = 100


#: The conditions of settings, by the titles of their columns, and what these mean.
CONDITIONS = {
    "util ≤": ("max_utilization", "rearranges only at this utilization or less"),
    "worst <": ("min_balancedness", "rearranges only if a layer's balancedness is below this"),
    "layers": ("layers_per_step", "layers that change in a step"),
    "delay": ("delay", "steps until the first layers change"),
    "limit": ("max_moves", "expert weights that a rearrangement moves at most"),
}

OBJECTIVES = {
    "tokens": "tokens",
    "active": "active experts",
    "tokens+traffic": "tokens and traffic",
    "ms": "net ms per step",
}


#: How each dispatch shares tokens, in a clause; ``measured`` if it is mostly by chance.
SHARED = {
    "measured": "each token goes to any replica of its expert",
    "random": "each token goes to any replica of its expert",
    "even": "the replicas of an expert get equal shares, also of a single token, which no engine can do",
    "vllm": "a hash of a token's position in its batch chooses the replica",
    "sglang-static": "a rank sends an expert's tokens to one replica: on its GPU, else on its node, else any",
    "sglang-dynamic": "each token goes to any replica of its expert, before the first rearrangement to the "
    "nearest",
    "vllm-ascend": "a rank sends an expert's tokens to one replica: its number modulo the replicas",
    "lp": "tokens are split so that the busiest rank has the fewest: no dispatch is better",
}


def shared(result: Replay) -> str:
    """How tokens are shared by replicas, in a clause, or one for each dispatch."""
    names = result.dispatches
    clauses = dict(SHARED)
    if result.dispatch.in_rounds >= MOSTLY:
        clauses["measured"] = "tokens are dealt to the replicas of an expert in rounds, as recorded"
    if result.tokens_everywhere:
        clauses["sglang-dynamic"] = "the position of a token in its batch chooses the replica"
    if len(names) == 1:
        return clauses[names[0]]
    return "; ".join(f"{name}: {clauses[name]}" for name in names)


def pause_sentence(pause: Pause) -> str:
    """What each rearrangement is taken to cost."""
    ms = milliseconds(pause.ms.value, pause.ms.low, pause.ms.high)
    if pause.basis == "measured":
        return f"pause of a rearrangement: {ms}, the mean of {plural(pause.count, 'rearrangement')}"
    if pause.basis == "given":
        return (
            f"pause of a rearrangement: {milliseconds(pause.ms.value)} for each expert of a layer, as given"
        )
    return f"pause of a rearrangement: assumed to be {milliseconds(pause.ms.value)}, as none was measured"


def render(console: Console, result: Replay, top: int = 20) -> None:
    print_heading(console, result.model, f" · run {result.run_id}")
    shape = result.part.shape
    kind = "incomplete step" if result.part.missing_ranks else "complete step"
    print_line(
        console,
        f"{plural(result.scored, kind)}; {plural(shape.num_physical_experts, 'slot')} on "
        f"{plural(shape.ep_size, 'EP rank')}, {plural(shape.num_moe_layers, 'layer')}",
    )
    steps = steps_label(console, result.first_step, result.last_step)
    text = f"The gains are those of {steps}"
    if result.last_step > result.first_step:
        text = f"The gains are those of all {steps}; `advise` judges a setting by the last 40% of them, "
        text += "which were not used to choose it."
    print_line(console, text)
    print_notes(console, result.notes)
    by = OBJECTIVES[result.objective.value]
    if result.objective == "tokens" and _costs(result):
        by = "net gain by tokens"
    print_line(console, f"sorted by {by}: {result.objective_reason}")
    if result.objective == "ms" or _costs(result):
        print_line(console, pause_sentence(result.pause))
    console.print()
    _today(console, result)
    _settings(console, result, top)
    _bounds(console, result)
    print_links(console, result, result.links(result.rows[0]) if result.rows else None, "the first setting")
    legend = "idle: share of rank time lost by tokens; "
    in_ms = result.objective == "ms"
    if in_ms and console.width >= WIDE:
        legend += "gain: by the cost fitted to the run's step times; net: less pauses, ms per step, 95% CI; "
    elif in_ms:
        legend += (
            "net: the gain by the cost fitted to the run's step times, less pauses, in ms per step, 95% CI; "
        )
    elif not _costs(result):
        legend += "saved: points of today's idle; "
    if result.objective == "tokens+traffic":
        legend += (
            "saves: of the time, if that were the tokens of the busiest rank and "
            f"{result.cross_node_weight:g} times the tokens that a rank gets from other nodes; "
        )
    traffic = _traffic_columns(result)
    if traffic and console.width >= WIDE:
        legend += "on rank: tokens that stay on their rank; "
        if "crosses" in traffic:
            legend += "on node: that go to another rank of the node; crosses: that go to another node; "
    if result.objective in ("active", "ms"):
        legend += "active: the most experts with a token on one rank; "
    legend += "moved: expert weights that ranks fetched"
    if _costs(result) and not in_ms:
        legend += "; net: time saved, assuming that a step consists only of its experts, less pauses "
        legend += "beyond today's (!: these pauses alone cost more than it can save)"
    if any(_is_oracle(outcome) for outcome in result.outcomes):
        legend += (
            "; oracle: not a setting: each step placed by its own loads, without the time to move weights"
        )
    for title, (name, meaning) in CONDITIONS.items():
        if _has(result, name):
            legend += f"; {title}: {meaning}"
    if any(outcome.setting == result.recorded.setting() for outcome in result.outcomes):
        legend += "; =: today's setting, replayed"
    several = len(result.dispatches) > 1
    print_line(console, (legend if several else f"{legend}; {shared(result)}", "dim"))
    if several:
        print_line(console, (f"dispatch: {shared(result)}", "dim"))


def _today(console: Console, result: Replay) -> None:
    """The recorded placements, as measured and replayed."""
    today, measured = result.today, result.measured_idle_fraction
    listing = table(console, "<today's placements", "balancedness", "idle")
    listing.add_row("as recorded", figure(result.measured_balancedness), percent(measured))
    listing.add_row("replayed", figure(today.balancedness), percent(today.idle_fraction))
    console.print(listing)
    if measured is not None and today.idle_fraction is not None:
        apart = signed(100 * (measured - today.idle_fraction), 1)
        text = f"{apart} points of idle come from how replicas shared tokens; no setting below includes them"
        if result.recorded.dispatch != "measured":
            text = f"{apart} points of idle come from how replicas shared tokens, compared with "
            text += result.recorded.dispatch
        print_line(console, text)
    if _costs(result) and result.seconds is not None:
        step = 1e3 * (result.step_seconds or 0.0)
        console.print(f"without pauses, these steps took {result.seconds:,.1f} s, {step:,.1f} ms each")
    console.print()


def _settings(console: Console, result: Replay, top: int) -> None:
    """The settings, the best first, with today's in its place among them."""
    from eplb_analyze.replay.replay import rank

    outcomes, costs = result.outcomes, _costs(result)
    sized = result.today.moved_gb is not None
    today = rank(result.today, result.objective)
    above = sum(rank(outcome, result.objective) <= today for outcome in outcomes)
    rows: list[Outcome] = [*outcomes[:above], result.today, *outcomes[above:]]
    kept = {id(outcome) for outcome in [*outcomes[:top], result.today]}
    settings = [outcome.setting for outcome in outcomes if outcome.setting is not None]
    rhythms = {(setting.interval, setting.start) for setting in settings}
    columns = {
        "<policy": _policy,
        "ranks": lambda result, outcome: str(outcome.ep_size),
        "redundant": lambda result, outcome: _number(result, outcome, "num_redundant_experts"),
        "interval": lambda result, outcome: _number(result, outcome, "interval"),
        "window": lambda result, outcome: _number(result, outcome, "window"),
        "start": lambda result, outcome: _number(result, outcome, "start"),
        **{title: _condition(name) for title, (name, _) in CONDITIONS.items()},
        "<dispatch": _dispatch,
        "balanced": lambda result, outcome: figure(outcome.balancedness),
        "idle": lambda result, outcome: percent(outcome.idle_fraction),
        "saved": _saved,
        "active": lambda result, outcome: figure(outcome.active_experts, 1),
        "on rank": lambda result, outcome: _traffic(outcome, "same_rank"),
        "on node": lambda result, outcome: _traffic(outcome, "same_node"),
        "crosses": lambda result, outcome: _traffic(outcome, "other_node"),
        "saves %": _combined,
        "gain ms": lambda result, outcome: _ms(outcome.gain_ms_per_step).partition(" ")[0],
        "net ms": lambda result, outcome: _ms(outcome.net_ms_per_step),
        "GB moved" if sized else "moved": _moved,
        "pauses s": lambda result, outcome: figure(outcome.cost_seconds, 2),
        "net s": _net,
    }
    # In 80 columns, show only columns that differ.
    if len({setting.ep_size for setting in settings} | {result.today.ep_size}) == 1:
        del columns["ranks"]
    if len(rhythms) == len({interval for interval, _ in rhythms}):
        del columns["start"]
    if len(result.dispatches) == 1:
        del columns["<dispatch"]
    for title, (name, _) in CONDITIONS.items():
        if not _has(result, name):
            del columns[title]
    shown = {
        "ms": ("active", "gain ms", "net ms"),
        "active": ("balanced", "idle", "active"),
        "tokens+traffic": ("idle", "crosses", "saves %"),
        "tokens": ("idle", "pauses s", "net s") if costs else ("balanced", "idle", "saved"),
    }[result.objective.value]
    figures = ("balanced", "idle", "saved", "active", "saves %", "gain ms", "net ms", "pauses s", "net s")
    traffic = _traffic_columns(result)
    for name in (*figures, "on rank", "on node", "crosses"):
        if name not in shown and name not in traffic:
            del columns[name]
    hidden = []
    if console.width < WIDE:
        left_out = ["gain ms", *(name for name in traffic if name not in shown)]
        many = len(columns.keys() - {*left_out[1:]}) > 9 or "<dispatch" in columns
        left_out += ["balanced", "pauses s"] if many else []
        if many and any(title in columns for title in CONDITIONS):
            alike = (("redundant", "num_redundant_experts"), ("interval", "interval"), ("window", "window"))
            values = {title: {getattr(setting, name) for setting in settings} for title, name in alike}
            left_out += [title for title, found in values.items() if len(found - {None}) < 2]
        hidden = [name for name in left_out if columns.pop(name, None)]
    more = limited(top, len(outcomes))
    listing = table(
        console, *columns, title=f"the same loads under other settings, {_first(result)} first{more}"
    )
    listing.padding = (0, 1, 0, 0)
    for outcome in rows:
        if id(outcome) in kept:
            cells = [cell(result, outcome) for cell in columns.values()]
            listing.add_row(*cells, style="bold" if outcome.setting is None else "")
    console.print(listing)
    print_hidden(console, hidden, WIDE)
    console.print()


def _traffic_columns(result: Replay) -> list[str]:
    """How far tokens go, as far as it is known; not those that stay on the node if there is only one."""
    if result.today.traffic is None:
        return []
    if result.known_nodes is None:
        return ["on rank"]
    return ["on rank"] if result.known_nodes == 1 else ["on rank", "on node", "crosses"]


def _traffic(outcome: Outcome, name: str) -> str:
    return "" if outcome.traffic is None else percent(getattr(outcome.traffic, name))


def _combined(result: Replay, outcome: Outcome) -> str:
    saved = outcome.combined_saved
    return "" if outcome.setting is None or saved is None else signed(100 * saved, 1)


def links_lines(links: Links, name: str) -> list[str]:
    """``busiest links under today's placements: r0 to r3 1.2%, ...; n0 to n1 12%, ...``."""

    def texts(pairs: Sequence[Pair], letter: str) -> str:
        each = (f"{letter}{p.source} to {letter}{p.destination} {percent(p.share)}" for p in pairs)
        return ", ".join(each)

    shown = [texts(links.ranks[:SHOWN_LINKS], "r")] if links.ranks else []
    shown += [texts(links.nodes[:SHOWN_LINKS], "n")] if links.nodes else []
    return [f"busiest links {name}, of all tokens: {'; '.join(shown)}"] if shown else []


def print_links(console: Console, result: Replay, best: Links | None, name: str) -> None:
    """The busiest links under today's placements and another setting's, or why they are not known."""
    from eplb_analyze.replay.sharing import SENDERS_UNKNOWN

    if result.sources_unknown is not None:
        text = f"traffic is not known: {SENDERS_UNKNOWN} ({result.sources_unknown})"
        print_line(console, (text, "dim"))
        return
    for links, when in ((result.links(), "today"), (best, f"with {name}")):
        for line in [] if links is None else links_lines(links, when):
            print_line(console, line)


def _costs(result: Replay) -> bool:
    """Whether settings have a net gain by tokens."""
    return any(outcome.net_seconds is not None for outcome in result.outcomes)


def _first(result: Replay) -> str:
    """What the settings are sorted by."""
    if result.objective == "ms" or (result.objective == "tokens" and _costs(result)):
        return "largest net gain"
    if result.objective == "tokens+traffic":
        return "largest combined gain"
    return "fewest active experts" if result.objective == "active" else "least idle"


def _is_oracle(outcome: Outcome) -> bool:
    return outcome.setting is not None and outcome.setting.policy == "oracle"


def _moved(result: Replay, outcome: Outcome) -> str:
    if _is_oracle(outcome):
        return "–"
    return f"{outcome.weights_moved:,}" if outcome.moved_gb is None else f"{outcome.moved_gb:,.1f}"


def _policy(result: Replay, outcome: Outcome) -> str:
    if outcome.setting is None:
        return "today"
    return clean(outcome.setting.policy) + (" =" if outcome.setting == result.recorded.setting() else "")


def _number(result: Replay, outcome: Outcome, name: str) -> str:
    value = getattr(outcome.setting or result.recorded, name)
    return "–" if value is None else f"{value:,}"


def _has(result: Replay, name: str) -> bool:
    """Whether a setting has a condition."""
    return any(getattr(outcome.setting, name, None) for outcome in result.outcomes)


def _condition(name: str) -> Callable[[Replay, Outcome], str]:
    return lambda result, outcome: f"{value:,}" if (value := getattr(outcome.setting, name, None)) else "–"


def _dispatch(result: Replay, outcome: Outcome) -> str:
    if _is_oracle(outcome):
        return "–"
    setting = outcome.setting
    if setting is not None and not setting.num_redundant_experts and setting.dispatch == "measured":
        return "any"  # no expert has replicas
    return result.recorded.dispatch if setting is None else setting.dispatch


def _ms(value: Milliseconds | None) -> str:
    if value is None:
        return ""
    if not value.low < value.high:
        return signed(value.estimate, 2)
    return milliseconds(value.estimate, value.low, value.high, sign=True).replace(" ms", "")


def _saved(result: Replay, outcome: Outcome) -> str:
    saved = outcome.idle_fraction_saved
    return "" if outcome.setting is None else signed(None if saved is None else 100 * saved, 1)


def _net(result: Replay, outcome: Outcome) -> Any:
    net = outcome.net_seconds
    if outcome.setting is None:
        return ""
    loses = _loses(result, outcome)
    return styled((signed(net, 2) + (" !" if loses else "  "), "bold red" if loses else ""))


def _loses(result: Replay, outcome: Outcome) -> bool:
    """Whether pauses beyond today's cost more than it saves if a step consists only of its experts.

    A net loss by tokens alone is not certain: if time depends less on tokens, worse balance costs less.
    """
    today, own = result.today.cost_seconds, outcome.cost_seconds
    saved, seconds = outcome.time_saved, result.seconds
    if today is None or own is None or saved is None or seconds is None:
        return False
    return own - today > max(0.0, saved * seconds)


def _bounds(console: Console, result: Replay) -> None:
    """The lower bound of idle time, for each number of slots and ranks."""
    bounds = {
        (outcome.num_physical_experts, outcome.ep_size): outcome.idle_fraction_bound
        for outcome in [result.today, *result.outcomes]
    }
    several = len({ranks for _, ranks in bounds}) > 1
    parts = [
        f"{percent(bound)} ({slots:,} slots{f' on {ranks} ranks' if several else ''})"
        for (slots, ranks), bound in sorted(bounds.items())
        if bound is not None
    ]
    if parts:
        console.print(f"lower bound of idle time for any placement: {', '.join(parts)}")
