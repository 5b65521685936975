"""Incidents that are one: of layers that one rearrangement made worse, or in which the same traffic shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from eplb_analyze.analysis.incidents import Incident, IncidentCost
from eplb_analyze.analysis.layer_loads import LayerLoads
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.reader.placements import Rearrangement

#: Causes that concern all layers by nature; the layers differ in how much of it shows.
OF_TRAFFIC = ("traffic_shift", "few_tokens", "unknown")
#: Without a cause, layers that depart in about the same steps are taken for one incident.
RETIRED = "loads_retired"
#: Such incidents of different layers are one if they have this share of their steps in common.
IN_COMMON = 0.3


def merged(incidents: list[Incident], loads: LayerLoads) -> list[Incident]:
    """The incidents of a run, each once, in order of steps."""
    found = _of_traffic(_without_repeated(_of_rearrangements(incidents, loads)), loads)
    return sorted(found, key=lambda one: (one.first_step, one.last_step, one.layers))


def common_ranks(ranks: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks that are among the worst of most layers."""
    counts = Counter(rank for own in ranks for rank in own)
    return tuple(rank for rank, count in counts.most_common() if count > len(ranks) / 2)


def _of_rearrangements(incidents: list[Incident], loads: LayerLoads) -> list[Incident]:
    """One incident for the layers that one rearrangement made worse."""
    change_of = _change_of(loads)
    out: list[Incident] = []
    groups: dict[int, list[Incident]] = {}
    for one in incidents:
        change = change_of(one) if one.cause.kind == "rearrangement" and one.layer is not None else None
        if change is None:
            out.append(one)
        else:
            groups.setdefault(change.first_step, []).append(one)
    return out + [_joined(group, loads) for group in groups.values()]


def _without_repeated(incidents: list[Incident]) -> list[Incident]:
    """Without those of a layer that turned out to end where a longer one of the same layer does."""
    longest: dict[tuple[tuple[int, ...], int], Incident] = {}
    for one in sorted(incidents, key=lambda incident: incident.first_step):
        longest.setdefault((one.layers, one.last_step), one)
    return list(longest.values())


def _of_traffic(incidents: list[Incident], loads: LayerLoads) -> list[Incident]:
    """One incident for the layers in which a change of traffic shows at about the same time."""
    out = [one for one in incidents if one.cause.kind not in (*OF_TRAFFIC, RETIRED)]
    groups: list[list[Incident]] = []
    left = [one for one in incidents if one.cause.kind in (*OF_TRAFFIC, RETIRED)]
    for one in sorted(left, key=lambda i: (-len(i.layers), i.first_step - i.last_step)):
        same = next((group for group in groups if _is_one(one, group[0])), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return out + [_joined(group, loads) for group in groups]


def _is_one(one: Incident, other: Incident) -> bool:
    common = min(one.last_step, other.last_step) - max(one.first_step, other.first_step) + 1
    either = max(one.last_step, other.last_step) - min(one.first_step, other.first_step) + 1
    return common >= IN_COMMON * either


def _joined(group: list[Incident], loads: LayerLoads) -> Incident:
    """One incident for several of different layers: the steps and the cause of the first."""
    if len(group) == 1:
        return group[0]
    head = max(group, key=lambda i: (len(i.layers), i.peak_imbalance))
    layers = tuple(sorted({layer for i in group for layer in i.layers}))
    costs = [i.cost.ms_per_step for i in group]
    known = [cost for cost in costs if cost is not None]
    total = None
    if len(known) == len(costs):
        total = Milliseconds(*(sum(getattr(c, name) for c in known) for name in ("estimate", "low", "high")))
    first, last = head.first_step, head.last_step
    if head.cause.kind == "rearrangement":
        first, last = min(i.first_step for i in group), max(i.last_step for i in group)
    return replace(
        head,
        layer=None if len(layers) > 1 else head.layer,
        layers=layers,
        ranks=common_ranks([i.ranks for i in group]),
        first_step=first,
        last_step=last,
        since=loads.time_of(first),
        until=loads.time_of(last),
        cost=IncidentCost(total, sum(i.cost.tokens_per_step for i in group)),
    )


def _change_of(loads: LayerLoads) -> Callable[[Incident], Rearrangement | None]:
    changes = loads.history.rearrangements()

    def find(incident: Incident) -> Rearrangement | None:
        return next((r for r in changes if r.first_step <= incident.first_step <= r.last_step), None)

    return find
