"""Where an incident was and why it happened, in words."""

from __future__ import annotations

from collections.abc import Callable

from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.text import listed, plural


def steps_text(first: int, last: int) -> str:
    """``step 7``, or ``steps 7-9`` with both ends included."""
    return f"step {first}" if first == last else f"steps {first}-{last}"


def where(incident: Incident) -> str:
    """``layer 12, rank 14``."""
    parts = []
    if incident.layer is not None:
        parts.append(f"layer {incident.layer}")
    elif incident.layers:
        count = len(incident.layers)
        layers = listed(incident.layers, 3)
        parts.append(f"layers {layers}" if count < 4 else f"{count} layers ({layers})")
    if incident.ranks:
        parts.append(f"rank{'s' * (len(incident.ranks) > 1)} {listed(incident.ranks, 4)}")
    return ", ".join(parts) or "all layers"


def cause_sentence(incident: Incident, label: Callable[[int], str]) -> str:
    """Why it happened; ``label``: what a step is called, ``step 1000 (03:12:04)``."""
    cause = incident.cause
    expert = "" if cause.expert is None else f"expert {cause.expert}"
    if expert and incident.layer is None and cause.layer is not None:
        expert += f" of layer {cause.layer}"
    change = ""
    if cause.from_times_mean is not None and cause.to_times_mean is not None:
        change = f"rose from {_times(cause.from_times_mean)} to {_times(cause.to_times_mean)} the mean load"
    replicas = "" if cause.replicas is None else f"had {plural(cause.replicas, 'replica')}"
    match cause.kind:
        case "expert_hot":
            return f"{expert or 'an expert'} {' and '.join(filter(None, (change or 'became hot', replicas)))}"
        case "rearrangement":
            who = (
                f"; {expert} {replicas} afterwards"
                if expert and replicas
                else f"; {expert} lost most"
                if expert
                else ""
            )
            return f"the rearrangement at {label(incident.first_step)} made the balance worse{who}"
        case "uneven_replicas":
            return f"the replicas of {expert or 'an expert'} share its tokens unevenly" + (
                f" (it {replicas})" if replicas else ""
            )
        case "rank_lost":
            who = f"rank {listed(incident.ranks)}" if incident.ranks else "a rank"
            return f"{who} was lost, and the engine went on without it"
        case "eplb_stopped":
            return "EPLB stopped rearranging while the load drifted"
        case "traffic_shift":
            layers = "this layer" if len(incident.layers) == 1 else "these layers"
            return f"the traffic changed: the shares of several experts of {layers} shifted at the same time"
        case "few_tokens":
            return "too few tokens per step to balance over the ranks"
        case "loads_retired":
            return "not known: experts' loads are no longer kept around its beginning"
        case _:
            return "no cause found"


def _times(value: float) -> str:
    return f"{value:.1f}x" if value < 10 else f"{value:.0f}x"
