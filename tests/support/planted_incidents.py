"""Runs with planted incidents, as arrays: loads by slot, placements, and the truth about each incident."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.layer_departures import BalanceSeries
from eplb_analyze.analysis.layer_loads import LayerWindow
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory

Array = np.ndarray[Any, Any]
CAUSES = (
    "expert_hot",
    "rearrangement",
    "uneven_replicas",
    "rank_lost",
    "eplb_stopped",
    "traffic_shift",
    "few_tokens",
)
#: Causes that concern one layer.
OF_ONE_LAYER = ("expert_hot", "rearrangement", "uneven_replicas")
#: Steps × layers × slots of a run, at most.
CELLS = 12_000_000


@dataclass
class Truth:
    """A planted incident; ``end`` is the first step after it."""

    kind: str
    first: int
    end: int
    layer: int | None = None
    expert: int | None = None
    #: One of these ranks must come first; empty if no rank stands out by plan.
    ranks: tuple[int, ...] = ()
    ended_by: str = "traffic"
    effect: float = 0.0
    deviation: float = 0.0
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether its effect is large enough that it must be found."""
        return self.effect > max(0.05, 2 * self.deviation)

    def is_found_as(self, found: Incident, layers: int) -> bool:
        return not self.wrong(found, layers)

    def wrong(self, found: Incident, layers: int) -> list[str]:
        """What is wrong about a reported incident."""
        faults = []
        if abs(found.first_step - self.first) > 2:
            faults.append("first")
        if abs(found.last_step + 1 - self.end) > 2:
            faults.append("last")
        if found.layer != (self.layer if self.layer is not None or layers > 1 else 0):
            faults.append("layer")
        if self.ranks and (not found.ranks or found.ranks[0] not in self.ranks):
            faults.append("rank")
        if self.expert is not None and found.cause.expert != self.expert:
            faults.append("expert")
        if found.cause.kind != self.kind:
            faults.append("cause")
        return faults


@dataclass
class PlantedRun:
    """A run as arrays: ``load`` int32 ``[steps, layers, slots]``. It is the finder's source of loads, too."""

    load: Array
    ranks: int
    num_logical: int
    history: PlacementHistory
    truths: list[Truth]
    lost_ranks: tuple[Any, ...] = ()
    token_replication: int = 1
    #: Whether experts' loads are not kept, only those of EP ranks.
    by_rank: bool = False

    @property
    def layers(self) -> list[int]:
        return list(range(self.load.shape[1]))

    @property
    def experts(self) -> Array:
        return np.full(self.load.shape[1], self.num_logical, np.int64)

    def read(self, layer: int, first: int, end: int) -> LayerWindow:
        steps = np.arange(max(0, first), min(len(self.load), end))
        load = self.load[steps, layer].astype(np.int64)
        rank_load = load.reshape(len(load), self.ranks, -1).sum(axis=2)
        kept = slice(0 if self.by_rank else None)
        return LayerWindow(steps, rank_load, steps[kept], load[kept], self.ranks)

    def time_of(self, step: int) -> str | None:
        return None

    def price(self, before: Any, during: Any, layers: int) -> None:
        return None

    def ratio(self) -> Array:
        rank = self.load.reshape(*self.load.shape[:2], self.ranks, -1).sum(axis=3)
        most = rank.max(axis=2)
        mean = rank.mean(axis=2)
        return np.where(most > 0, mean / np.maximum(1, most), np.nan).astype(np.float32)

    def series(self) -> BalanceSeries:
        n = len(self.load)
        tokens = self.load.mean(axis=(1, 2), dtype=np.float32)
        return BalanceSeries(np.arange(n), self.ratio(), tokens, np.full(n, -1), np.zeros(n, np.int64), n - 1)


def place(load: Array, ranks: int, slots: int) -> Array:
    """A good placement: replicas go to the hottest experts, then the longest first to the idlest rank."""
    experts = len(load)
    count = np.ones(experts, np.int64)
    for _ in range(slots - experts):
        count[(load / count).argmax()] += 1
    copies = np.repeat(np.arange(experts), count)
    each = (load / count)[copies]
    total, room = np.zeros(ranks), np.full(ranks, slots // ranks)
    where: list[list[int]] = [[] for _ in range(ranks)]
    for i in np.argsort(-each, kind="stable"):
        free = np.where(room > 0, total, np.inf)
        rank = int(free.argmin())
        where[rank].append(int(copies[i]))
        total[rank] += each[i]
        room[rank] -= 1
    return np.concatenate([np.array(own, np.int32) for own in where])


def crowded(load: Array, slots: Array, ranks: int) -> tuple[Array, int]:
    """A placement that puts the hottest experts together, and on which rank."""
    count = np.bincount(slots, minlength=len(load))
    order = np.argsort(-(load / np.maximum(1, count))[slots], kind="stable")
    width = len(slots) // ranks
    most = order[:width]
    target = ranks // 2
    own = np.arange(target * width, (target + 1) * width)
    new = slots.copy()
    for spot, hot in zip(own, most, strict=True):
        if hot in own:
            continue
        new[spot], new[hot] = new[hot], new[spot]
    return new, target


@dataclass
class Shape:
    steps: int
    layers: int
    ranks: int
    experts: int
    slots: int


def shape_of(rng: Any, steps: int | None = None, cells: int = CELLS) -> Shape:
    steps = int(np.exp(rng.uniform(np.log(300), np.log(20_000)))) if steps is None else steps
    ranks = int(rng.choice([4, 8, 16, 32, 64]))
    experts = ranks * int(rng.choice([2, 4, 8] if ranks < 64 else [2, 4]))
    slots = experts + ranks * int(rng.choice([1, 2]))
    layers = int(np.clip(cells // (steps * slots), 1, rng.choice([2, 4, 8, 16])))
    return Shape(steps, layers, ranks, experts, slots)


def make_run(
    seed: int, causes: tuple[str, ...] = (), steps: int | None = None, cells: int = CELLS
) -> PlantedRun:
    """A run with one incident of each of these causes, none of which overlap; a clean run without any.

    The background: popularity of experts drifts, a load balancer acts now and then, the number of tokens
    follows the time of day and varies from step to step, and routing of one step is correlated.
    """
    rng = np.random.default_rng(seed)
    shape = shape_of(rng, steps, cells)
    if "rank_lost" in causes or "uneven_replicas" in causes:
        shape.layers = max(2, shape.layers)
    n, layers, experts = shape.steps, shape.layers, shape.experts
    base = 0.5 * rng.standard_normal((layers, experts))
    drift = rng.uniform(0.0, 0.25) * rng.standard_normal((layers, experts))
    phase = rng.uniform(0, 2 * np.pi, (layers, experts))
    turn = 2 * np.pi * rng.uniform(0.2, 1.5) / max(n, 3000)
    tokens = shape.slots * float(np.exp(rng.uniform(np.log(30), np.log(600))))
    day = rng.uniform(0, 0.5)
    jitter = rng.uniform(0, 0.15)
    swing = rng.uniform(0, 0.15)
    interval = int(rng.uniform(0.08, 0.5) * n)
    truths = _spans(rng, shape, causes, interval)
    stopped = next((t for t in truths if t.kind == "eplb_stopped"), None)
    if stopped is not None:
        interval = stopped.detail["interval"]
        drift = 1.0 * rng.standard_normal((layers, experts))
        turn = 2 * np.pi * 0.25 / (stopped.end - stopped.first)

    def popularity(step: int) -> Array:
        logits = base + drift * np.sin(turn * step + phase)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    acts = _acts(rng, n, interval, truths)
    maps, history = _placements(shape, popularity, acts, truths, rng)
    usual = _Usual(shape, maps, popularity, np.random.default_rng([seed, 1]))
    load = np.empty((n, layers, shape.slots), np.int32)
    hour = 1 + day * np.sin(2 * np.pi * np.arange(n) / max(n, 3000) + rng.uniform(0, 6))
    walk = np.zeros(n)
    noise = rng.standard_normal(n)
    for i in range(1, n):
        walk[i] = 0.9 * walk[i - 1] + 0.44 * noise[i]
    amount = tokens * hour * np.exp(swing * walk)
    usual_amount = amount.copy()
    for truth in truths:
        if truth.kind == "few_tokens":
            amount[truth.first : truth.end] *= truth.detail["share"]
    # Popularity changes every so many steps: by little, as it must not jump.
    fine = 100 if stopped is None else max(2, (stopped.end - stopped.first) // 100)
    fine = min(fine, max(5, n // 200))
    edges = sorted({0, n, *range(0, n, fine), *(s for t in truths for s in (t.first, t.end)), *acts})
    edges = [e for e in edges if 0 <= e <= n]
    for low, high in itertools.pairwise(edges):
        share = popularity((low + high) // 2)
        for truth in truths:
            if truth.first <= low < truth.end:
                usual.add(truth, low, share, usual_amount[low:high], jitter)
        for truth in truths:
            if truth.first <= low < truth.detail.get("until", truth.end):
                share = _changed(share, truth)
        steps_here = high - low
        for layer in range(layers):
            slots = maps[layer].at(low)
            assert slots is not None
            weight = (share[layer] / np.bincount(slots, minlength=experts))[slots]
            for truth in truths:
                if truth.first <= low < truth.end:
                    weight = _uneven(weight, slots, layer, truth, shape)
            rates = amount[low:high, None] * weight
            if jitter > 0.02:
                factor = np.exp(jitter * rng.standard_normal((steps_here, experts)))
                rates = rates * factor[:, slots]
            load[low:high, layer] = rng.poisson(rates)
    run = PlantedRun(load, shape.ranks, experts, history, truths)
    _measure(run, usual)
    return run


def _spans(rng: Any, shape: Shape, causes: tuple[str, ...], interval: int) -> list[Truth]:
    """Where each incident is: at least 60 steps after the start and after the one before."""
    n, found = shape.steps, []
    room = n // max(1, len(causes))
    for number, cause in enumerate(causes):
        low = number * room + min(60, room // 3)
        longest = min(5000, int(0.4 * room))
        size = int(np.exp(rng.uniform(np.log(10), np.log(max(11, longest)))))
        first = int(rng.integers(low, max(low + 1, (number + 1) * room - size - 25)))
        truth = Truth(cause, first, min(n, first + size))
        if cause in OF_ONE_LAYER:
            truth.layer = int(rng.integers(shape.layers))
        if cause == "expert_hot":
            truth.expert = int(rng.integers(shape.experts))
            truth.detail["times"] = float(rng.uniform(3, 14))
            if number == len(causes) - 1 and rng.random() < 0.3:
                truth.ended_by, truth.detail["until"] = "rearrangement", n
        if cause == "rearrangement":
            truth.ended_by = "rearrangement"
        if cause == "uneven_replicas":
            truth.detail["tilt"] = float(rng.uniform(0.7, 1.0))
        if cause == "traffic_shift":
            truth.detail["topic"] = rng.uniform(0.6, 1.2) * rng.standard_normal((shape.layers, shape.experts))
        if cause == "few_tokens":
            truth.detail["share"] = float(rng.uniform(0.02, 0.15))
        if cause == "rank_lost":
            truth.ranks = (int(rng.integers(shape.ranks)),)
            truth.ended_by = "rank_back"
        if cause == "eplb_stopped":
            # The balancer acts at least four times, then not for at least four intervals.
            step = max(10, min(room // 10, 500))
            truth.detail["interval"] = step
            times = int(rng.integers(4, max(5, room // step - 5)))
            truth.first = number * room + (times + 1) * step
            truth.end = min((number + 1) * room, truth.first + step * int(rng.integers(4, 12)))
            truth.ended_by = "rearrangement" if truth.end < n else "run_end"
        found.append(truth)
    return found


def _acts(rng: Any, n: int, interval: int, truths: list[Truth]) -> list[int]:
    """When the balancer acts: not during an incident, unless it ends it."""
    stopped = next((t for t in truths if t.kind == "eplb_stopped"), None)
    if stopped is not None:
        before = list(range(stopped.first % interval or interval, stopped.first, interval))
        return [
            *before,
            *([stopped.end] if stopped.end < n else []),
            *range(stopped.end + interval, n, interval),
        ]
    acts = [] if rng.random() < 0.3 else list(range(interval, n, max(20, interval)))
    acts = [a for a in acts if not any(t.first - 30 <= a <= t.end + 30 for t in truths)]
    return sorted({*acts, *(t.end for t in truths if t.detail.get("until") and t.end < n)})


def _placements(
    shape: Shape, popularity: Any, acts: list[int], truths: list[Truth], rng: Any
) -> tuple[list[LayerHistory], PlacementHistory]:
    maps = [LayerHistory() for _ in range(shape.layers)]
    for step in (0, *acts):
        share = popularity(max(0, step - 5))
        for truth in truths:
            if truth.detail.get("until") and truth.first < step:
                share = _changed(share, truth)
        for layer, history in enumerate(maps):
            history.insert(step, shape.ranks, place(share[layer], shape.ranks, shape.slots))
    for truth in truths:
        if truth.kind == "rearrangement" and truth.layer is not None:
            history = maps[truth.layer]
            good = history.at(truth.first)
            assert good is not None
            bad, rank = crowded(popularity(truth.first)[truth.layer], good, shape.ranks)
            truth.ranks = (rank,)
            history.insert(truth.first, shape.ranks, bad)
            if truth.end < shape.steps:
                history.insert(truth.end, shape.ranks, good)
        if truth.layer is None or truth.kind not in ("expert_hot", "uneven_replicas"):
            continue
        slots = maps[truth.layer].at(truth.first)
        assert slots is not None
        if truth.kind == "uneven_replicas":
            share = popularity(truth.first)[truth.layer]
            count = np.bincount(slots, minlength=shape.experts)
            truth.expert = int(np.where(count > 1, share, -1).argmax())
            first = int(np.flatnonzero(slots == truth.expert)[rng.integers(count[truth.expert])])
            truth.detail["slot"] = first
            truth.ranks = (first // (shape.slots // shape.ranks),)
        else:
            held = np.flatnonzero(slots == truth.expert) // (shape.slots // shape.ranks)
            truth.ranks = tuple(int(r) for r in held)
    return maps, PlacementHistory(dict(enumerate(maps)), [], [])


def _changed(share: Array, truth: Truth) -> Array:
    """The popularity ``[layers, experts]`` during an incident."""
    share = share.copy()
    if truth.kind == "expert_hot":
        own = share[truth.layer]
        own[truth.expert] = min(0.8, truth.detail["times"] / len(own))
        others = np.arange(len(own)) != truth.expert
        own[others] *= (1 - own[truth.expert]) / own[others].sum()
    elif truth.kind == "traffic_shift":
        share *= np.exp(truth.detail["topic"])
        share /= share.sum(axis=1, keepdims=True)
    return share


def _uneven(weight: Array, slots: Array, layer: int, truth: Truth, shape: Shape) -> Array:
    """The weights of the slots during an incident that changes how tokens get to slots."""
    if truth.kind == "uneven_replicas" and layer == truth.layer:
        weight = weight.copy()
        mine = np.flatnonzero(slots == truth.expert)
        total, tilt = weight[mine].sum(), truth.detail["tilt"]
        weight[mine] = total * (1 - tilt) / max(1, len(mine) - 1)
        weight[truth.detail["slot"]] = total * tilt
    elif truth.kind == "rank_lost":
        weight = weight.copy()
        width = shape.slots // shape.ranks
        rank = truth.ranks[0]
        gone = slice(rank * width, (rank + 1) * width)
        other = (rank + 1) % shape.ranks
        weight[other * width : (other + 1) * width] += weight[gone].sum() / width
        weight[gone] = 0
    return weight


class _Usual:
    """The balance that the steps of each incident would have without it."""

    def __init__(self, shape: Shape, maps: list[LayerHistory], popularity: Any, rng: Any) -> None:
        self._shape, self._maps, self._popularity, self._rng = shape, maps, popularity, rng
        self._ratios: dict[int, list[Array]] = {}
        self._placed = functools.cache(self._place)

    def add(self, truth: Truth, low: int, share: Array, amount: Array, jitter: float) -> None:
        """Add steps from ``low`` on, of these tokens, popularity and jitter."""
        shape, ratios = self._shape, []
        for layer in range(shape.layers) if truth.layer is None else [truth.layer]:
            slots = self._slots(truth, layer, low)
            rates = amount[:, None] * (share[layer] / np.bincount(slots, minlength=shape.experts))[slots]
            if jitter > 0.02:
                rates = (
                    rates * np.exp(jitter * self._rng.standard_normal((len(rates), shape.experts)))[:, slots]
                )
            rank = self._rng.poisson(rates).reshape(len(rates), shape.ranks, -1).sum(axis=2)
            ratios.append(rank.mean(axis=1) / np.maximum(1, rank.max(axis=1)))
        self._ratios.setdefault(id(truth), []).append(np.mean(ratios, axis=0))

    def _slots(self, truth: Truth, layer: int, step: int) -> Array:
        if truth.kind == "eplb_stopped":  # of the last rearrangement that should have been
            interval = truth.detail["interval"]
            return self._placed(layer, step - (step - truth.first) % interval)
        slots = self._maps[layer].at(truth.first - 1)
        assert slots is not None
        return slots

    def _place(self, layer: int, step: int) -> Array:
        return place(self._popularity(step - 5)[layer], self._shape.ranks, self._shape.slots)

    def balance(self, truth: Truth) -> float:
        return float(np.concatenate(self._ratios[id(truth)]).mean())


def _measure(run: PlantedRun, usual: _Usual) -> None:
    """The effect of each incident on its layer's balancedness, and the noise of single steps."""
    ratio = run.ratio()
    for truth in run.truths:
        own = ratio[:, truth.layer] if truth.layer is not None else np.nanmean(ratio, axis=1)
        truth.effect = usual.balance(truth) - float(np.nanmean(own[truth.first : truth.end]))
        layer = ratio[:, truth.layer] if truth.layer is not None else ratio[:, 0]
        truth.deviation = float(
            np.nanstd(np.diff(layer[max(0, truth.first - 200) : truth.first])) / np.sqrt(2)
        )
