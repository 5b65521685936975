"""Shows the slots of each rank, and what changed between two steps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from eplb_analyze.cli.console import print_heading, print_line, print_notes, step_label, table, times_known
from eplb_analyze.text import listed, plural

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_analyze.analysis.placement import LayerChange, LayerPlacement, PlacementReport

#: More changes of placement are in `rearrangements`, with their times.
MOST_TIMES = 4


def render(
    console: Console, report: PlacementReport, *, single: bool, experts: bool, every: bool = False
) -> None:
    """``every``: show the layers whose figures are those of most layers, too."""
    where = f"layer {report.layers[0].layer}, " if single else ""
    since = "" if report.against is None else f" against {step_label(console, report.against)}"
    rest = f" · {where}{step_label(console, report.step)}{since} · {report.model} · run {report.run_id}"
    print_heading(console, "placement", rest)
    print_notes(console, report.notes)
    changes = {change.layer: change for change in report.changes or []}
    if report.changes is not None:
        _changed(console, report.changes)
    console.print()
    if single:
        _ranks(console, report.layers[0], changes.get(report.layers[0].layer), report.lost_ranks)
    elif report.changes is None:
        _layers(console, report.layers, report.lost_ranks, every)
    elif report.changes:
        _changes(console, report.changes)
    if experts:
        console.print()
        _experts(console, report.layers[0]) if single else _replicas(console, report.layers)


def _changed(console: Console, changes: list[LayerChange]) -> None:
    if not changes:
        console.print("nothing changed")
        return
    to_nodes = [c.experts_crossed_nodes for c in changes if c.experts_crossed_nodes is not None]
    crossed = f"{plural(sum(c.experts_crossed_ranks for c in changes), 'expert weight')} to another rank"
    across = f", {sum(to_nodes):,} of them to another node" if len(to_nodes) == len(changes) else ""
    slots = plural(sum(c.slots_changed for c in changes), "slot")
    console.print(f"{slots} changed in {plural(len(changes), 'layer')}; {crossed}{across}")


def _layers(console: Console, layers: list[LayerPlacement], lost: list[int], every: bool) -> None:
    """What most layers have in common in a sentence, and a row for each that differs (``every``: for all)."""
    rows = {p.layer: _figures(p, lost) for p in layers}
    usual, count = Counter(rows.values()).most_common(1)[0]
    if count > 1:
        since, ranks, slots, replicas, replicated, doubled, empty = usual
        also = f", {plural(doubled, 'expert')} twice on a rank" if doubled else ""
        also += f", {plural(empty, 'empty slot')}" if empty else ""
        who = f"all {count} layers" if count == len(layers) else f"{count} of {len(layers)} layers"
        print_line(
            console,
            (who, "bold"),
            f": since {step_label(console, since)}, {plural(slots, 'slot')} on {plural(ranks, 'rank')}, "
            f"{replicas} replicas of each expert, several of {plural(replicated, 'expert')}{also}",
        )
    shown = layers if every or count == 1 else [p for p in layers if rows[p.layer] != usual]
    if shown:
        console.print()
        columns = ("layer", "since step", "ranks", "slots", "replicas", "replicated", "doubled", "empty")
        listing = table(console, *columns, title=None if shown is layers else "layers that differ")
        for p in shown:
            listing.add_row(str(p.layer), *map(str, rows[p.layer]))
        console.print(listing)
        console.print("replicated: with several replicas; doubled: twice on a rank; empty: slots")
        if times_known(console):
            steps = sorted({p.since for p in shown}, reverse=True)
            print_line(console, f"since {listed([step_label(console, step) for step in steps], MOST_TIMES)}")
    if shown is not layers:
        print_line(console, (f"--all shows a row for each of {len(layers)} layers", "dim"))


def _figures(p: LayerPlacement, lost: list[int]) -> tuple[int, int, int, str, int, int, int]:
    """The cells of a layer's row, without its number."""
    replicas = f"{p.replicas_min}" + (f"-{p.replicas_max}" if p.replicas_max > p.replicas_min else "")
    serving = sum(rank not in lost for rank in range(p.ep_size))
    slots = p.num_physical_experts // p.ep_size * serving
    return p.since, serving, slots, replicas, p.replicated, p.twice_on_a_rank, p.empty_slots


def _changes(console: Console, changes: list[LayerChange]) -> None:
    known = all(c.experts_crossed_nodes is not None for c in changes)
    columns = ["layer", "slots changed", "weights to ranks", *(["to nodes"] if known else [])]
    listing = table(console, *columns, "ranks changed", "most to")
    for c in changes:
        most = max(c.ranks, key=lambda r: (len(r.experts_in), -r.rank), default=None)
        place = f"r{most.rank} ({len(most.experts_in)})" if most and most.experts_in else "–"
        cells = [
            c.layer,
            c.slots_changed,
            c.experts_crossed_ranks,
            *([c.experts_crossed_nodes] if known else []),
        ]
        listing.add_row(*map(str, cells), str(len(c.ranks)), place)
    console.print(listing)


def _ranks(console: Console, p: LayerPlacement, change: LayerChange | None, lost: list[int]) -> None:
    """One row per rank: the experts in its slots, and those that moved in and out."""
    digits = len(str(len(p.replicas) - 1))
    changed = {r.rank: r for r in change.ranks} if change else {}
    columns = ["rank", "<experts in its slots", *(["<in", "<out"] if changed else [])]
    listing = table(console, *columns)
    for rank, slots in enumerate(p.ranks):
        cells = " ".join(f"{'·' if e < 0 else e:>{digits}}" for e in slots) if rank not in lost else "lost"
        moved = changed.get(rank)
        came, went = (moved.experts_in, moved.experts_out) if moved else ([], [])
        listing.add_row(f"r{rank}", cells, *([_numbers(came), _numbers(went)] if changed else []))
    console.print(listing)
    gone = [rank for rank in changed if rank >= p.ep_size]
    if gone:
        console.print(f"no longer there: {', '.join(f'r{rank}' for rank in gone)}")
    span = f"{p.replicas_min} to {p.replicas_max}" if p.replicas_max > p.replicas_min else f"{p.replicas_min}"
    facts = [f"in force since {step_label(console, p.since)}", f"replicas {span}"]
    facts.append(f"{plural(p.replicated, 'expert')} with more than one")
    if p.twice_on_a_rank:
        facts.append(f"{p.twice_on_a_rank} twice on a rank")
    if p.empty_slots:
        facts.append(f"{plural(p.empty_slots, 'empty slot')} (·)")
    console.print("; ".join(facts))


def _numbers(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def _experts(console: Console, p: LayerPlacement) -> None:
    listing = table(console, "expert", "replicas", "<on ranks", title="replicas of each expert")
    for expert, copies in enumerate(p.replicas):
        listing.add_row(str(expert), str(copies), ", ".join(f"r{rank}" for rank in p.ranks_of(expert)))
    console.print(listing)


def _replicas(console: Console, layers: list[LayerPlacement]) -> None:
    """One row per layer and number of replicas."""
    listing = table(console, "layer", "replicas", "<experts", title="experts by their number of replicas")
    for p in layers:
        for copies in sorted(set(p.replicas), reverse=True):
            experts = [e for e, n in enumerate(p.replicas) if n == copies]
            rest = copies == 1 and len(experts) > 8
            listing.add_row(
                str(p.layer), str(copies), f"{len(experts)} experts" if rest else _numbers(experts)
            )
    console.print(listing)
