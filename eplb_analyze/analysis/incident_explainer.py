"""Why some layers depart from their usual balance: the loads around the edges are read, and say the cause.

The tokens of EP ranks show the exact steps, so these are the same if experts' loads are no longer kept. A
lost rank and a load balancer that stopped are known without an abrupt drop.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.incident_merge import common_ranks
from eplb_analyze.analysis.incidents import Cause, CauseKind, EndedBy, EndKind, Incident, IncidentCost
from eplb_analyze.analysis.layer_departures import (
    ALL_LAYERS,
    LOOKED_AT,
    BalanceSeries,
    Found,
)
from eplb_analyze.analysis.layer_loads import LayerLoads, LayerWindow
from eplb_analyze.metrics.change_points import MIN_STEPS
from eplb_analyze.metrics.incident_causes import (
    EXPLAINED,
    FEWER,
    Explanation,
    LayerSample,
    explain,
    mean_balance,
    refined,
    worst_ranks,
)
from eplb_analyze.reader.lost import LostRank
from eplb_analyze.sessions.step_range import NO_END

#: An edge at most so many steps from a change of the layer's placement is at this change.
AT_CHANGE = 3
#: Loads of so many steps on each side of an edge are read.
WINDOW = 200
#: The loads of a departure of at most so many steps are read at once: its edges often lie in one row group.
READ_WHOLE = 1000
#: The load balancer stopped if no rearrangement came for so many of the usual intervals.
STOPPED = 2.2
#: What is reported lowers balancedness by at least this much.
LEAST_DROP = 0.04
#: Without a cause, a departure of less than twice the minimum length must be at least as large as this.
UNEXPLAINED_DROP = 0.1


class _Sides(NamedTuple):
    """Steps before and during a departure of a layer.

    Attributes:
        why: why they differ.
        guard: so many steps next to the edges are in neither.
        end: the first step after the departure.
    """

    before: LayerSample
    during: LayerSample
    why: Explanation
    guard: int
    end: int


class Explainer:
    """Makes incidents of the departures of one run."""

    def __init__(self, series: BalanceSeries, loads: LayerLoads, values: npt.NDArray[np.float32]) -> None:
        self._series, self._loads, self._values = series, loads, values
        self._reach = 20 + 2 * series.steps_per_value

    def of(self, found: Found) -> list[Incident]:
        """The incidents that a departure is: one, unless several layers have causes of their own."""
        if not found.everywhere:
            own = [self._of_layer(layer, found, (layer,)) for layer in found.layers]
            return [incident for incident in own if incident is not None]
        drops = [(-self._drop(layer, found), layer) for layer in found.layers]
        looked_at = [layer for _, layer in sorted(drops)[:LOOKED_AT]]
        each = [self._of_layer(layer, found, found.layers) for layer in looked_at]
        known = [incident for incident in each if incident is not None]
        if not known:
            return []
        kind = Counter(incident.cause.kind for incident in known).most_common(1)[0][0]
        # Each expert that is hot in a layer of its own is a change of all layers' traffic.
        of_all: CauseKind = "traffic_shift" if kind == "expert_hot" else kind
        # The cause of a layer may be not known; so steps and figures do not depend on it.
        worst = max(known, key=lambda incident: incident.peak_imbalance)
        first = sorted(incident.first_step for incident in known)[len(known) // 2]
        end = sorted(known, key=lambda incident: incident.last_step)[len(known) // 2]
        return [
            replace(
                worst,
                layer=None if len(found.layers) > 1 else worst.layer,
                layers=tuple(self._loads.layers[layer] for layer in found.layers),
                ranks=common_ranks([incident.ranks for incident in known]),
                first_step=first,
                last_step=end.last_step,
                since=self._loads.time_of(first),
                until=end.until,
                cause=Cause(of_all),
                ended_by=end.ended_by,
            )
        ]

    def _drop(self, layer: int, found: Found) -> float:
        low, high = np.searchsorted(self._series.steps, [found.first, found.end])
        before = self._values[layer, max(0, low - WINDOW) : low]
        return (
            float(before.mean() - self._values[layer, low:high].mean()) if len(before) and high > low else 0.0
        )

    # ---- one layer

    def _of_layer(self, layer: int, found: Found, layers: tuple[int, ...]) -> Incident | None:
        loads, series = self._loads, self._series
        history = loads.history.layer(layer)
        changes = [step for step in history.steps if step > int(series.steps[0])]
        first = found.first
        span = WINDOW + self._reach
        read_to = (found.end if found.end - first <= READ_WHOLE else first) + span
        kept = series.unbroken(first)
        head = loads.read(layer, *kept.clip(first - span, read_to))
        # If tokens fell, they show better than balance when that was over: drift can hide the return.
        until = self._few_tokens_until(first)
        sides = None if until is None else self._sides(layer, head, changes, first, until)
        if sides is None or sides.why.kind != "few_tokens":
            sides = self._sides(layer, head, changes, first, found.end)
        if sides is None:
            return None
        before, during, why, guard, end = sides
        rank = _stopped_rank(before, during)
        if rank is not None:
            why = Explanation("rank_lost")
        by_tokens = why.kind == "few_tokens"
        first, _ = self._edge(head, by_tokens, first, guard, (None, end), changes)
        tail = head
        if end + WINDOW > read_to:
            tail = loads.read(layer, *kept.clip(end - span, end + span))
        ended, end = self._end(layer, tail, why, before, during, changes, (first, end), guard)
        if end - first < MIN_STEPS <= found.end - found.first:
            first, end = found.first, found.end
            if ended is not None and ended.kind != "run_end":
                ended = replace(ended, step=end)
        if end - first < MIN_STEPS:
            return None
        if why.kind == "unknown" and end - first < 2 * MIN_STEPS and found.drop < UNEXPLAINED_DROP:
            return None
        if before.balance - during.balance < LEAST_DROP and len(layers) == 1:
            return None
        ranks = (rank,) if rank is not None else worst_ranks(before, during)
        return self._incident(layer, layers, ranks, (first, end), why, ended, before, during)

    def _sides(
        self, layer: int, head: LayerWindow, changes: list[int], first: int, end: int
    ) -> _Sides | None:
        """The steps before and during a departure, and why they differ; None if there are too few."""
        guard = max(1, min(5, (end - first) // 5)) + self._series.steps_per_value - 1
        change = nearest(changes, first, guard + 5)
        since, apart = (first, guard) if change is None else (change, 0)
        stop = min(end - guard, first + WINDOW + self._reach)
        told = head.has_loads_near(since)
        before = self._sample(layer, head, first - WINDOW, min(first, since) - apart, last=True, told=told)
        during = self._sample(layer, head, max(first, since) + apart, stop, last=False, told=told)
        if before is None or during is None:
            return None
        why = explain(before, during, change is not None, int(self._loads.experts[layer]))
        return _Sides(before, during, why, guard, end)

    def _few_tokens_until(self, first: int) -> int | None:
        """The first step after those with few tokens, if tokens fell at about ``first``; else None."""
        series = self._series
        kept = series.unbroken(first)
        at = int(np.searchsorted(series.steps, first))
        stop = int(np.searchsorted(series.steps, kept.end))
        before = series.tokens[max(0, at - 40) : max(0, at - 5)]
        after = series.tokens[at + 1 : at + MIN_STEPS]
        if not len(before) or not len(after):
            return None
        was, is_ = float(np.median(before)), float(np.median(after))
        if not 0 < is_ < FEWER * was:
            return None
        later = series.tokens[at + MIN_STEPS : stop] > np.sqrt(was * is_)
        if len(later) < MIN_STEPS:
            return kept.end
        # Of most of the steps, so that a single prefill among decode steps is no end.
        most = np.convolve(later, np.ones(MIN_STEPS), "valid") > MIN_STEPS / 2
        if not most.any():
            return kept.end
        start = int(most.argmax())
        return series.step_at(at + MIN_STEPS + start + int(later[start:].argmax()))

    def _sample(
        self, layer: int, window: LayerWindow, first: int, end: int, *, last: bool, told: bool
    ) -> LayerSample | None:
        """The steps of a range that are in one placement period: the last or the first in it.

        ``told``: whether experts' loads are kept where they tell a cause.
        """
        low, high = (int(i) for i in np.searchsorted(window.steps, [first, end]))
        if high - low < 4:
            return None
        history = self._loads.history.layer(layer)
        periods = list(history.periods(window.steps[low:high]))
        if not periods:
            return None
        usable = [p for p in periods if p[0].stop - p[0].start >= 4] or periods
        where, slots = usable[-1] if last else usable[0]
        own = slice(low + where.start, low + where.stop)
        load = window.load[np.isin(window.load_steps, window.steps[own])]
        if slots is not None and len(slots) != load.shape[1]:
            slots = None
        return LayerSample(
            window.rank_load[own],
            load if told and len(load) else None,
            slots,
            window.serving,
            self._loads.num_logical,
        )

    def _edge(
        self,
        window: LayerWindow,
        by_tokens: bool,
        at: int,
        guard: int,
        limits: tuple[int | None, int | None],
        changes: list[int],
    ) -> tuple[int, int | None]:
        """The exact step of an edge near ``at``, and the change of the placement that it is at, if any.

        By the ranks' shares of the tokens, which are known whatever else is kept.

        Args:
            by_tokens: by how many tokens a step has, instead.
            changes: the steps at which the layer's placement changed.
        """
        steps = window.steps
        total = window.rank_load.sum(axis=1, keepdims=True).astype(np.float64)
        features = total if by_tokens else window.rank_load / np.maximum(1, total)
        low = 0 if limits[0] is None else int(np.searchsorted(steps, limits[0]))
        high = len(steps) if limits[1] is None else int(np.searchsorted(steps, limits[1]))
        middle = int(np.searchsorted(steps, at))
        left = features[max(low, middle - WINDOW) : max(low, middle - guard)]
        right = features[middle + guard : min(high, middle + WINDOW)]
        start = max(low, middle - max(self._reach, 60))
        stop = min(high, middle + max(self._reach, 60))
        here = refined(left, features[start:stop], right, middle - start, self._reach)
        exact = here is not None and start + here < len(steps)
        if here is not None and exact:
            at = int(steps[start + here])
        change = nearest(changes, at, AT_CHANGE if exact else guard + 5)
        return at if change is None else change, change

    def _end(
        self,
        layer: int,
        window: LayerWindow,
        why: Explanation,
        before: LayerSample,
        during: LayerSample,
        changes: list[int],
        span: tuple[int, int],
        guard: int,
    ) -> tuple[EndedBy | None, int]:
        """What ended it, and the first step after it."""
        first, end = span
        series = self._series
        if end >= series.end:
            goes_on = series.last_of_run > series.last
            return None if goes_on else EndedBy("run_end", series.last), series.end
        if series.holes.contains(np.array([end])).any():
            return None, end
        later = [change for change in changes if change > first]
        at, change = self._edge(window, why.kind == "few_tokens", end, guard, (first, None), later)
        end = at if at > first else end
        if why.kind == "rank_lost":
            return EndedBy("rank_back", end), end
        if change is None:
            return EndedBy("traffic", end), end
        told = window.has_loads_near(change)
        after = self._sample(layer, window, change, change + WINDOW, last=False, told=told)
        until = self._sample(layer, window, max(first + guard, change - WINDOW), change, last=True, told=told)
        if after is None or until is None or after.slots is None or until.slots is None:
            return EndedBy("traffic", end), end
        if after.load is None or until.load is None:
            return None, end  # whether the new placement balances the same loads needs those of experts
        stays = mean_balance(after.share, until.split_of(False), after.serving)
        now = mean_balance(after.share, after.split_of(False), after.serving)
        if now - stays < EXPLAINED * (before.balance - during.balance):
            return EndedBy("traffic", end), end
        replicas = None if why.expert is None else int((after.slots == why.expert).sum())
        return EndedBy("rearrangement", change, replicas), end

    # ---- all layers

    def of_lost(self, lost: LostRank) -> list[Incident]:
        """The steps without a rank that died."""
        series, loads = self._series, self._loads
        last = min(series.last_of_run, lost.steps.end - 1)
        low, high = np.searchsorted(series.steps, [lost.steps.first, last + 1])
        if high <= low:
            return []
        before, during = series.ratio[max(0, low - WINDOW) : low], series.ratio[low:high]
        usual = float(np.nanmean(before)) if np.isfinite(before).any() else float(np.nanmean(during))
        back = lost.steps.end < NO_END and last + 1 <= series.last_of_run
        one = Incident(
            layer=None if len(loads.layers) > 1 else loads.layers[0],
            layers=tuple(loads.layers),
            ranks=(lost.rank,),
            first_step=lost.steps.first,
            last_step=last,
            since=loads.time_of(lost.steps.first),
            until=loads.time_of(last),
            peak_imbalance=1 / _lowest(np.nanmean(during, axis=1)),
            usual_imbalance=1 / usual,
            cause=Cause("rank_lost"),
            ended_by=EndedBy("rank_back" if back else "run_end", last + back),
            cost=IncidentCost(None, 0.0),
        )
        return [one]

    def stopped(self, abrupt: Sequence[Found]) -> list[Incident]:
        """Steps in which the load balancer acted no more, while balance went down.

        ``abrupt``: departures of all layers; one that explains most of such steps has another cause.
        """
        series, loads = self._series, self._loads
        acted = [r.first_step for r in loads.history.rearrangements() if r.first_step > series.first_of_run]
        if len(acted) < 3 or len(np.unique(series.shape)) > 1:
            return []
        usual = float(np.median(np.diff(acted)))
        found = []
        end = series.last_of_run + 1
        for step, following in zip(acted[2:], [*acted[3:], end], strict=True):
            first = step + round(usual)
            if following - step <= STOPPED * usual or first >= series.end:
                continue
            if any(
                min(d.end, following) - max(d.first, first) > 0.5 * (d.end - d.first) and self._at_once(d)
                for d in abrupt
            ):
                continue
            low, high = (int(i) for i in np.searchsorted(series.steps, [first, following]))
            start = int(np.searchsorted(series.steps, acted[0]))
            middle = int(np.searchsorted(series.steps, step))
            before, during = self._values[:, start:middle], self._values[:, low:high]
            if before.shape[1] < MIN_STEPS or during.shape[1] < MIN_STEPS:
                continue
            drop = (before.mean(axis=1) - during.mean(axis=1))[: series.ratio.shape[1]]
            layers = tuple(int(i) for i in np.flatnonzero(drop > LEAST_DROP + 0.01))
            if len(layers) < max(1, ALL_LAYERS * len(drop)) or drop.mean() < LEAST_DROP:
                continue
            worst = int(drop.argmax())
            ended = following < end
            one = self._of_span(worst, layers, (first, following), Explanation("eplb_stopped"))
            if one is not None:
                kind: EndKind = "rearrangement" if ended else "run_end"
                found.append(replace(one, ended_by=EndedBy(kind, following if ended else end - 1)))
        return found

    def _at_once(self, found: Found) -> bool:
        """Whether most of a departure's drop comes within some steps, not over the whole of it."""
        low, high = np.searchsorted(self._series.steps, [found.first, found.end])
        own = self._values[list(found.layers)].mean(axis=0)
        near = own[max(0, low - 13) : low - 3], own[low + 3 : min(high, low + 13)]
        whole = own[max(0, low - WINDOW) : low], own[low:high]
        falls = [float(b.mean() - d.mean()) if len(b) and len(d) else 0.0 for b, d in (near, whole)]
        return falls[0] >= 0.5 * falls[1]

    def _of_span(
        self, layer: int, layers: tuple[int, ...], span: tuple[int, int], why: Explanation
    ) -> Incident | None:
        """An incident with known edges; the loads are compared before and at its end."""
        first, end = span
        end = min(end, self._series.end)  # an incident that goes on is judged by the steps that are known
        head = self._loads.read(layer, first - WINDOW, first)
        tail = self._loads.read(layer, max(first, end - WINDOW), end)
        told = head.has_loads_near(first) and tail.has_loads_near(end)
        before = self._sample(layer, head, first - WINDOW, first, last=True, told=told)
        during = self._sample(layer, tail, max(first, end - WINDOW), end, last=True, told=told)
        if before is None or during is None:
            return None
        return self._incident(layer, layers, worst_ranks(before, during), span, why, None, before, during)

    def _incident(
        self,
        layer: int,
        layers: tuple[int, ...],
        ranks: tuple[int, ...],
        span: tuple[int, int],
        why: Explanation,
        ended: EndedBy | None,
        before: LayerSample,
        during: LayerSample,
    ) -> Incident:
        series, loads = self._series, self._loads
        first, last = span[0], span[1] - 1
        low, high = (int(i) for i in np.searchsorted(series.steps, span))
        inside = series.ratio[min(low, high - 1) : max(high, low + 1), layer]
        tokens = (_excess(during) - _excess(before)) / loads.token_replication * len(layers)
        cause = Cause(
            cast(CauseKind, why.kind),
            why.expert,
            None if why.expert is None else loads.layers[layer],
            why.from_times_mean,
            why.to_times_mean,
            why.replicas,
        )
        return Incident(
            layer=loads.layers[layer] if len(layers) == 1 else None,
            layers=tuple(loads.layers[i] for i in layers),
            ranks=ranks,
            first_step=first,
            last_step=last,
            since=loads.time_of(first),
            until=loads.time_of(last),
            peak_imbalance=1 / _lowest(inside),
            usual_imbalance=1 / before.balance,
            cause=cause,
            ended_by=ended,
            cost=IncidentCost(loads.price(before, during, len(layers)), tokens),
        )


def _stopped_rank(before: LayerSample, during: LayerSample) -> int | None:
    """A rank that had tokens and has none any more."""
    if before.ranks != during.ranks or before.serving < 2:
        return None
    gone = np.flatnonzero((during.times_mean == 0) & (before.times_mean > 0.2))
    return int(gone[0]) if len(gone) == 1 else None


def _excess(sample: LayerSample) -> float:
    """Mean over steps of max over ranks - mean over ranks, in recorded counts."""
    return float((sample.rank_load.max(axis=1) - sample.tokens / sample.serving).mean())


def _lowest(values: npt.NDArray[np.floating[Any]]) -> float:
    """The lowest mean of 10 consecutive values, or of all if they are fewer."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not len(known):
        return 1.0
    width = min(10, len(known))
    total = np.concatenate([[0.0], np.cumsum(known)])
    return max(1e-6, float(((total[width:] - total[:-width]) / width).min()))


def nearest(changes: list[int], step: int, most: int) -> int | None:
    """The change nearest to a step, at most so many steps away."""
    at = bisect.bisect_left(changes, step)
    near = [change for change in changes[max(0, at - 1) : at + 1] if abs(change - step) <= most]
    return min(near, key=lambda change: abs(change - step)) if near else None
