"""Alerts: the incidents that `summary` would report of the newest steps, while the run is written.

What is an incident is decided in one place, :mod:`analysis.incident_finder`; this module gives it the newest
steps again whenever they show a clear change of level. What it cannot know:

- what is usual, beyond the newest :data:`HISTORY` steps, or before there are
  :data:`metrics.contrasts.SLOW_FROM`: until then there is no alert but for a rank that is lost;
- whether a change is abrupt or gradual, before :data:`metrics.change_points.SHORT` steps show it: so long a
  departure has to last, or it has to have ended, until there is an alert. Later steps can still show that
  there was none: its alert is withdrawn;
- what an incident costs in milliseconds;
- which expert is hot, in steps that were read from sealed segments, by rank only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.incident_explainer import WINDOW, nearest
from eplb_analyze.analysis.incident_finder import explained
from eplb_analyze.analysis.incidents import Cause, EndedBy, Incident
from eplb_analyze.analysis.layer_departures import BalanceSeries, Found, comparable, grouped, tokens_of
from eplb_analyze.live.recent_loads import RecentLoads
from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.change_points import SHORT, split
from eplb_analyze.metrics.contrasts import SLOW_FROM
from eplb_analyze.metrics.departures import clear_changes, departures
from eplb_analyze.reader.lost import LostRank
from eplb_analyze.reader.placements import PlacementHistory
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Shape
from eplb_dump.format.session import SessionInfo

#: Balancedness is kept of so many of the newest steps.
HISTORY = 2048
#: So many alerts are kept, those that last first.
ALERTS = 4
#: Two findings at most so many steps apart can be of one departure.
NEAR = 20
#: The mean of so many of the newest steps shows whether a departure has ended, if its edges are not known.
RECENT = 40
#: After so many steps the widest windows show a departure: one that does not show was none.
SETTLED = 160


@frozen
class Alert(Incident):
    """An incident as far as it is known while the run is written.

    ``cost`` has no milliseconds, as these are fitted to a whole run.

    Attributes:
        first_step, last_step: both in the incident; while it lasts, the last one is the newest.
        ended_by: None while it lasts.
    """

    #: True until it has ended.
    lasts: bool


@dataclass
class _Departure:
    """Of one layer, or in the row after the last one of all: in indices since the watch began."""

    first: int
    #: None while it lasts.
    end: int | None
    drop: float


class AlertFinder:
    """Takes steps as they become complete, and knows the alerts of the newest ones."""

    def __init__(self, info: SessionInfo) -> None:
        self._info = info
        self.alerts: list[Alert] = []
        self._new: list[CompleteSteps] = []
        self._series: BalanceSeries | None = None
        self._times: Int64 = np.empty(0, np.int64)
        self._phases: dict[str, int] = {}
        self._shape: Shape | None = None
        #: How many values were dropped from the start of the series, and up to where they were looked at.
        self._dropped = self._seen = 0
        self._departures: list[list[_Departure]] = []
        #: The incidents that departures turned out to be.
        self._known: dict[Found, list[Incident]] = {}
        #: Balancedness before and during alerts that last: the mean over their layers.
        self._levels: dict[Alert, tuple[float, float]] = {}

    def add(self, news: CompleteSteps) -> None:
        """Add steps that became complete; those older than a known one are left out."""
        last = self._new[-1].step[-1] if self._new else self._series.last if self._series else -1
        if news.step[0] > last:
            self._new.append(news)

    def look(self, history: PlacementHistory, lost: list[LostRank]) -> list[Alert]:
        """The newest alerts, in order of steps: all that last, and some that ended."""
        if not self._new:
            return self.alerts
        self._append()
        series, loads = self._series, self._loads
        assert series is not None
        loads.history, loads.lost_ranks = history, lost
        loads.times = series.steps, self._times
        values = comparable(series)
        changed = self._find_departures(values)
        lasting = any(alert.lasts for alert in self.alerts) or any(
            one.end is None for row in self._departures for one in row
        )
        if changed or lasting or lost:
            self._update(values)
        loads.trim()
        self._trim()
        return self.alerts

    def _append(self) -> None:
        """Append the new steps to the series."""
        layers = self._new[0].terms.ratio.shape[1]
        if self._series is None or self._series.ratio.shape[1] != layers:
            self._loads = RecentLoads(self._info, layers)
            self._departures = [[] for _ in range(layers + (layers > 1))]
            none = np.empty(0, np.int64)
            self._series = BalanceSeries(
                none, np.empty((0, layers), np.float32), np.empty(0, np.float32), none, none, -1
            )
            self._times, self._dropped, self._seen = none, 0, 0
        old = self._series
        number = int(old.shape[-1]) if len(old.shape) else 0
        phase, shape = [old.phase], [old.shape]
        for news in self._new:
            number += self._shape is not None and news.shape != self._shape
            self._shape = news.shape
            shape.append(np.full(len(news.step), number))
            codes = [self._phases.setdefault(name, len(self._phases)) for name in news.phases]
            phase.append(np.array([*codes, -1], np.int64)[news.phase])
            self._loads.add(news)
        self._times = np.concatenate([self._times, *(news.time_ns for news in self._new)])
        self._series = BalanceSeries(
            np.concatenate([old.steps, *(news.step for news in self._new)]),
            np.concatenate([old.ratio, *(news.terms.ratio.astype(np.float32) for news in self._new)]),
            np.concatenate([old.tokens, *(tokens_of(news.terms) for news in self._new)]),
            np.concatenate(phase),
            np.concatenate(shape),
            int(self._new[-1].step[-1]),
        )
        self._new = []

    def _find_departures(self, values: npt.NDArray[np.float32]) -> bool:
        """Look again at the layers that changed clearly; returns whether there are any."""
        assert self._series is not None
        shape = self._series.shape
        start = int(np.searchsorted(shape, shape[-1]))  # the steps of this configuration
        own = values[:, start:].astype(np.float64)
        if own.shape[1] < SLOW_FROM:
            return False
        first = self._dropped + start
        changed = np.flatnonzero(clear_changes(own, max(0, self._seen - first)))
        for row in changed:
            before = [one for one in self._departures[row] if one.end is not None and one.end <= first]
            self._departures[row] = before + [
                _Departure(first + one.first, None if one.end == own.shape[1] else first + one.end, one.drop)
                for one in departures(own[row : row + 1]).found[0]
            ]
        self._seen = self._dropped + len(shape)
        return bool(len(changed))

    def _update(self, values: npt.NDArray[np.float32]) -> None:
        assert self._series is not None
        series, n = self._series, len(self._series.steps)
        found = grouped(
            series,
            [
                (row, one.first - self._dropped, n if one.end is None else one.end - self._dropped, one.drop)
                for row, own in enumerate(self._departures)
                for one in own
                if one.first >= self._dropped
            ],
        )
        # Of a shorter one that lasts it is not known whether it is abrupt.
        late = int(series.steps[max(0, n - SHORT)])
        found = [one for one in found if one.end < series.end or one.first <= late]
        known = {one: self._remembered(one) for one in found}
        self._known = {one: incidents for one, incidents in known.items() if incidents is not None}
        incidents = explained(series, values, found, self._loads, self._known).found
        alerts = [self._alert(one) for one in incidents]
        levels = {alert: self._level(alert, values) for alert in alerts if alert.lasts}
        for alert in self.alerts:
            if any(replaces(one, alert) for one in alerts):
                continue
            if not alert.lasts:
                alerts.append(alert)
            elif (now := self._settle(alert, values)) is not None:
                alerts.append(now)
                levels[now] = self._levels[alert]
        newest = sorted(alerts, key=lambda alert: (alert.lasts, alert.first_step))[-ALERTS:]
        self.alerts = sorted(newest, key=lambda alert: (alert.first_step, alert.layers))
        self._levels = {alert: levels[alert] for alert in self.alerts if alert.lasts}

    def _remembered(self, found: Found) -> list[Incident] | None:
        """What a departure is, if it was looked at and its loads cannot say more; else None."""
        assert self._series is not None
        series, own = self._series, self._known.get(found)
        if own is not None and found.end < series.last - RECENT:
            return own
        for other, incidents in self._known.items():
            if {*other.layers} & {*found.layers} and abs(other.first - found.first) <= NEAR and incidents:
                gone = (self._loads.first_step or 0) > other.first - WINDOW
                full = found.end == series.end and other.end - other.first >= WINDOW
                if gone or full:
                    return [self._extended(one, found.end) for one in incidents]
        return None

    def _extended(self, incident: Incident, end: int) -> Incident:
        """The same incident with another end: the first step after it."""
        assert self._series is not None
        series = self._series
        ended = EndedBy("run_end", series.last) if end >= series.end else self._ended_by(incident, end)
        return replace(incident, last_step=end - 1, until=self._loads.time_of(end - 1), ended_by=ended)

    def _ended_by(self, incident: Incident, end: int) -> EndedBy:
        changes = [r.first_step for r in self._loads.history.rearrangements()]
        change = nearest(changes, end, NEAR)
        return EndedBy("traffic", end) if change is None else EndedBy("rearrangement", change)

    def _alert(self, incident: Incident) -> Alert:
        lasts = incident.ended_by is not None and incident.ended_by.kind == "run_end"
        own = {**vars(incident), "ended_by": None if lasts else incident.ended_by}
        if incident.cause.kind == "loads_retired":
            own["cause"] = Cause("unknown")  # experts' loads are kept, but were not read
        return Alert(**own, lasts=lasts)

    def _signal(self, alert: Alert, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        rows = [self._loads.layers.index(layer) for layer in alert.layers]
        mean: npt.NDArray[np.float64] = values[rows].mean(axis=0, dtype=np.float64)
        return mean

    def _level(self, alert: Alert, values: npt.NDArray[np.float32]) -> tuple[float, float]:
        assert self._series is not None
        at = int(np.searchsorted(self._series.steps, alert.first_step))
        signal = self._signal(alert, values)
        before, during = signal[max(0, at - WINDOW) : at], signal[at:]
        usual = float(before.mean()) if len(before) else 1.0
        return usual, float(during.mean()) if len(during) else usual

    def _settle(self, alert: Alert, values: npt.NDArray[np.float32]) -> Alert | None:
        """An alert whose departure no longer shows, as its beginning is long ago, or as there was none."""
        assert self._series is not None
        series, signal = self._series, self._signal(alert, values)
        usual, low = self._levels[alert]
        at = int(np.searchsorted(series.steps, alert.first_step))
        if float(np.median(signal[-RECENT:])) < (usual + low) / 2:
            last = series.last
            return replace(alert, last_step=last, until=self._loads.time_of(last))
        if at >= WINDOW and len(signal) - at <= SETTLED + RECENT:
            return None
        inside = signal[at:]
        end = int(series.steps[min(at + split(inside, len(inside) // 2, len(inside)), len(signal) - 1)])
        ended = self._extended(alert, end)
        assert isinstance(ended, Alert)
        return replace(ended, lasts=False)

    def _trim(self) -> None:
        assert self._series is not None
        series, extra = self._series, len(self._series.steps) - HISTORY
        if extra <= 0:
            return
        kept = slice(extra, None)
        self._series = replace(
            series,
            steps=series.steps[kept],
            ratio=series.ratio[kept],
            tokens=series.tokens[kept],
            phase=series.phase[kept],
            shape=series.shape[kept],
        )
        self._times, self._dropped = self._times[kept], self._dropped + extra
        for row, own in enumerate(self._departures):
            self._departures[row] = [one for one in own if one.first >= self._dropped]


def replaces(new: Alert, old: Alert) -> bool:
    """Whether an alert is what another one turned out to be."""
    if not {*new.layers} & {*old.layers}:
        return False
    common = min(new.last_step, old.last_step) - max(new.first_step, old.first_step) + 1
    near = abs(new.first_step - old.first_step) <= NEAR
    return near or common > (old.last_step - old.first_step + 1) / 2
