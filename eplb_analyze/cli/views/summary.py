"""Shows the answer of `summary`: the verdict, what imbalance cost, the incidents; then tables on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eplb_analyze.cli.charts import print_sparkline
from eplb_analyze.cli.console import full_command, print_fields, print_heading, print_line
from eplb_analyze.cli.views import summary_tables
from eplb_analyze.report import answer
from eplb_analyze.text import listed, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.summary_report import Summary
    from eplb_analyze.reader.clock import RunClock

SHOWN_INCIDENTS, SHOWN_REARRANGEMENTS = 5, 3
STYLES = {
    "balanced": "bold green",
    "mostly_balanced": "bold",
    "imbalanced": "bold red",
    "eplb_never_acted": "bold red",
    "incomplete_data": "bold red",
    "not_known": "bold yellow",
}
#: What begins where a mark stands, in words short enough for the line under the sparkline.
MARKS = {
    "expert_hot": "hot expert",
    "rearrangement": "bad rearrangement",
    "uneven_replicas": "uneven replicas",
    "rank_lost": "rank lost",
    "eplb_stopped": "EPLB stopped",
    "traffic_shift": "traffic shift",
    "few_tokens": "few tokens",
    "loads_retired": "incident",
    "unknown": "incident",
}


def render(
    console: Console,
    result: Summary,
    clock: RunClock,
    top: int = 5,
    *,
    full: bool = False,
    part: bool = False,
    left_out: Sequence[str] = (),
) -> None:
    """``part``: whether the figures are of a part of the run's steps; ``left_out``: what is not in them."""
    found = answer.answer_of(result, clock, lambda command: full_command(console, command))
    _head(console, result, clock)
    console.print()
    print_line(
        console, (found.title, STYLES[result.verdict.verdict]), f"  {found.figures}" if found.figures else ""
    )
    for text in found.warnings:
        print_line(console, (text.removeprefix(f"{found.title}: "), "bold red"))
    for text in found.sentences:
        print_line(console, text)
    for text in found.estimates:
        print_line(console, (text, "yellow"))
    print_fields(console, found.evidence, indent=2)
    for text in left_out:
        print_line(console, (text, "yellow"))
    if not found.figures:
        return
    _incidents(console, found.incidents, top, answer.searched(result, clock), part=part)
    if result.unexamined_departures:
        more = plural(result.unexamined_departures, "smaller departure")
        print_line(console, f"and {more} from the usual balance, not examined", indent=2)
    if result.restless_layers:
        print_line(
            console,
            f"{result.restless_layers} of {plural(result.run.num_layers, 'layer')} have no usual balance: it"
            " changes abruptly all the time. Only much larger drops count as incidents there.",
            indent=2,
        )
    _timeline(console, result)
    _rearrangements(console, result, clock)
    if full:
        console.print()
        summary_tables.render(console, result, top)
    else:
        print_line(
            console, ("more: --full (tables of layers, ranks, experts, phases and all formulas)", "dim")
        )


def _head(console: Console, result: Summary, clock: RunClock) -> None:
    info = result.run
    print_heading(console, *answer.heading(info))
    if info.origin is not None:
        from eplb_analyze.reader.run_info import imported

        print_line(console, (imported(info.origin), "yellow"))
    print_line(console, answer.when(result, clock))
    if info.num_layers:
        print_line(console, answer.shape(info))
    complete, text = answer.data(result, clock.label)
    print_line(console, text if complete else (text, "yellow"))
    source = answer.source(result, clock)
    if source is not None:
        print_line(console, (source, "yellow"))
    doubt = answer.contradiction(result, lambda command: full_command(console, command))
    if doubt is not None:
        print_line(console, (doubt, "yellow"))


def _incidents(
    console: Console, incidents: list[answer.Told], top: int, searched: str | None, *, part: bool
) -> None:
    console.print()
    if searched is not None:
        print_line(console, searched)
    if incidents:
        print_line(console, (plural(len(incidents), "incident"), "bold"))
    elif searched is None:
        print_line(console, (f"no incidents{' in these steps' if part else ''}", "bold"))
    else:
        return
    shown = incidents[: max(top, SHOWN_INCIDENTS)]
    for told in shown:
        print_line(console, (told.head, "bold"), indent=2)
        print_fields(console, told.parts, indent=4)
    if len(incidents) > len(shown):
        rest = len(incidents) - len(shown)
        print_line(
            console, f"and {plural(rest, 'smaller incident')}: --top {len(incidents)} shows all", indent=2
        )


def _timeline(console: Console, result: Summary) -> None:
    """A sparkline of balancedness, red during incidents; below it marks of what began, and the clock.

    The mean over layers hides an incident of few layers, so its layer has one more.
    """
    marks = [(incident.first_step, MARKS[incident.cause.kind]) for incident in result.incidents]
    ended = {incident.first_step for incident in result.incidents if incident.cause.kind == "rearrangement"}
    marks += [
        (change.first_step, "rearrangement")
        for change in result.rearrangements
        if change.first_step not in ended
    ]
    ordered, layers = summary_tables.ordered(result), result.run.num_layers
    over = "over time" if ordered else "by step, in no known order"
    print_sparkline(
        console,
        f"balancedness {over}" + (f", mean of {layers} layers" if layers > 1 else ""),
        result.timeline,
        red=[(incident.first_step, incident.last_step) for incident in result.incidents],
        marks=marks,
        times=ordered,
    )
    if result.layer_timeline is not None:
        layer, bins = result.layer_timeline
        own = [incident for incident in result.incidents if layer in incident.layers]
        print_sparkline(
            console,
            f"layer {layer} {over}",
            bins,
            red=[(incident.first_step, incident.last_step) for incident in own],
            times=False,  # those of the line above
        )


def _rearrangements(console: Console, result: Summary, clock: RunClock) -> None:
    changes = result.rearrangements
    if changes:
        steps = [change.first_step for change in changes]
        count = plural(len(changes), "rearrangement")
        if len(steps) <= SHOWN_REARRANGEMENTS:
            print_line(console, f"{count}: {listed([clock.label(step) for step in steps])}")
        else:
            print_line(console, f"{count} in {clock.range_label(steps[0], steps[-1])}")
    elif result.acted is None:
        why = "no placement was recorded or readable"
        if result.run.origin is not None:
            why = "the source does not say when placements changed"
        if clock.retired:
            why = "no placement changed in the steps that are kept, and those before were retired"
        print_line(console, f"{why}, so no rearrangement is known")
    elif result.acted:
        print_line(console, "no rearrangement in these steps")
    elif result.not_due is not None:
        print_line(console, result.not_due)
