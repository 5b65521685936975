"""Incidents: consecutive steps in which a layer or a rank departs from its usual balance."""

from __future__ import annotations

from typing import Literal

from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_dump.format.frozen import frozen

CauseKind = Literal[
    "expert_hot",
    "rearrangement",
    "uneven_replicas",
    "rank_lost",
    "eplb_stopped",
    "traffic_shift",
    "few_tokens",
    "loads_retired",
    "unknown",
]
EndKind = Literal["rearrangement", "traffic", "rank_back", "run_end"]


@frozen
class Cause:
    """Why a layer departs from its usual balance.

    Attributes:
        expert: the logical expert, if one explains the incident.
        layer: the number of the expert's layer in the model.
        from_times_mean, to_times_mean: the expert's tokens, divided by the mean over the layer's experts,
            before and during the incident, over about 200 steps on either side of its beginning.
        replicas: of the expert, during the incident.
    """

    #: What caused the incident. `few_tokens`: too few tokens to balance; `loads_retired`: not known, because
    #: experts' loads are no longer kept; `unknown`: no cause was found.
    kind: CauseKind
    expert: int | None = None
    layer: int | None = None
    from_times_mean: float | None = None
    to_times_mean: float | None = None
    replicas: int | None = None


@frozen
class EndedBy:
    """What ended an incident, and the first step after it; with ``run_end`` the run's last step.

    Attributes:
        replicas: of the cause's expert from that step on, if a rearrangement ended the incident.
    """

    #: What ended the incident. `traffic`: tokens went elsewhere, without a rearrangement.
    kind: EndKind
    step: int
    replicas: int | None = None


@frozen
class IncidentCost:
    """What an incident cost beyond the layer's usual imbalance.

    Attributes:
        ms_per_step: by the fitted cost model; None if this run has no measured cost.
        tokens_per_step: increase of max over ranks - mean over ranks, summed over the incident's layers.
    """

    ms_per_step: Milliseconds | None
    tokens_per_step: float


@frozen
class Incident:
    """Consecutive steps in which one layer, or several at once, depart from their usual balance.

    Attributes:
        layer: its number in the model; None if several layers depart together.
        layers: the numbers of all layers that depart, ascending.
        ranks: the EP ranks with more tokens than usual, the worst first; empty if they change from step to
            step.
        first_step, last_step: both in the incident.
        since, until: the clock times of these steps, ISO 8601 in UTC; None if the run has no times.
        peak_imbalance: the worst layer's max over ranks / mean over ranks, at its highest over the incident,
            averaged over up to 10 steps.
        usual_imbalance: the same layer's usual figure, outside of the incident.
        ended_by: None if not known.
    """

    layer: int | None
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    first_step: int
    last_step: int
    since: str | None
    until: str | None
    peak_imbalance: float
    usual_imbalance: float
    #: Why it happened.
    cause: Cause
    ended_by: EndedBy | None
    cost: IncidentCost


def excess_tokens(incident: Incident) -> float:
    """How many tokens more than usual the ranks waited for, over the whole incident: how bad it was."""
    return incident.cost.tokens_per_step * (incident.last_step - incident.first_step + 1)
