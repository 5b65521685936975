"""Find the incidents of a run: departures of layers from their usual balance, their edges, causes and cost.

Data flows one way. :mod:`analysis.layer_departures` looks for departures in the balancedness of each layer.
Then only the loads around the edges of the largest are read, to name ranks, experts, the cause and the exact
steps (:mod:`analysis.incident_explainer`). What belongs together is merged (:mod:`analysis.incident_merge`).
"""

from __future__ import annotations

from dataclasses import field, replace

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.incident_explainer import Explainer
from eplb_analyze.analysis.incident_merge import merged
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.layer_departures import (
    ALL_LAYERS,
    BalanceSeries,
    Found,
    comparable,
    grouped,
    largest,
    layer_departures,
)
from eplb_analyze.analysis.layer_loads import LayerLoads
from eplb_analyze.metrics.change_points import MIN_STEPS
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.frozen import frozen


@frozen
class Incidents:
    """The incidents of a run, in order of steps.

    Attributes:
        unexamined: smaller departures, which are not among them.
        restless: how many layers change their balance so often that only much larger drops are departures.
        searched: the stretches of steps in which incidents were looked for; None: all steps, empty: nowhere,
            and then incidents are not known.
    """

    found: list[Incident]
    unexamined: list[Found] = field(default_factory=list)
    restless: int = 0
    searched: list[StepRange] | None = None

    def within(self, steps: StepRange) -> Incidents:
        """Those that have a step in a range; they keep their first and last step."""
        found = [i for i in self.found if i.first_step < steps.end and i.last_step >= steps.first]
        left = [one for one in self.unexamined if one.first < steps.end and one.end > steps.first]
        return replace(self, found=found, unexamined=left)

    def where_kept(self, run: Run, steps: StepRange) -> Incidents:
        """Of a range of a run's steps, some of which may not be kept."""
        retired = run.tiers.retired
        if not retired.overlaps(*steps):
            return self
        parts = [part for part in retired.outside(*steps) if part.end - part.first >= 3 * MIN_STEPS]
        return replace(self, restless=self.restless if parts else 0, searched=parts)


def find_incidents(series: BalanceSeries, loads: LayerLoads) -> Incidents:
    """The incidents of a run."""
    if len(series.steps) < 3 * MIN_STEPS:
        return Incidents([])
    values = comparable(series)
    departures = layer_departures(series, values)
    incidents = explained(series, values, grouped(series, departures.found), loads, {})
    return replace(incidents, restless=departures.restless)


def explained(
    series: BalanceSeries,
    values: npt.NDArray[np.float32],
    departures: list[Found],
    loads: LayerLoads,
    known: dict[Found, list[Incident]],
) -> Incidents:
    """The incidents among some departures: those that are large enough, with their causes and exact edges.

    Args:
        values: what :func:`comparable` makes of the series.
        known: the incidents of departures whose loads were read before; new ones are added.
    """
    found, unexamined = largest(departures)
    explainer = Explainer(series, loads, values)
    incidents = [incident for one in loads.lost_ranks for incident in explainer.of_lost(one)]
    incidents += explainer.stopped(
        [one for one in found if len(one.layers) >= ALL_LAYERS * series.ratio.shape[1]]
    )
    for one in found:
        same = [other for other in incidents if _same(one, other)]
        if any(other.cause.kind == "rank_lost" for other in same):
            continue
        if one not in known:
            known[one] = explainer.of(one)
        incidents += [own for own in known[one] if not same or _has_own_cause(own)]
    return Incidents(merged(incidents, loads), unexamined)


def _same(found: Found, known: Incident) -> bool:
    """Whether a departure is a part of what is known to be an incident of all layers."""
    inside = min(found.end, known.last_step + 1) - max(found.first, known.first_step)
    return known.cause.kind in ("rank_lost", "eplb_stopped") and inside > 0.7 * (found.end - found.first)


def _has_own_cause(incident: Incident) -> bool:
    """Whether it is more than the drift of the experts' loads while the load balancer does not act."""
    cause = incident.cause
    grew = (cause.to_times_mean or 0) >= 2 * (cause.from_times_mean or 0)
    return cause.kind in ("rearrangement", "uneven_replicas") or (cause.kind == "expert_hot" and grew)
