"""What `layer` reports: the load of each rank, slot and expert of one layer, and from what that is known."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from eplb_analyze.json_report import Report, RunReport
from eplb_analyze.metrics.losses import Bin
from eplb_analyze.text import iso
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import Tier


@frozen
class HotExpert:
    """A logical expert and its share of its layer's tokens."""

    layer: int
    logical: int
    share: float
    times_mean: float
    replicas: int


@frozen
class RankLoad:
    rank: int
    load: float


@frozen
class SlotLoad:
    """A physical expert. ``logical`` is -1 in an empty slot, None if unknown or not the same in all steps."""

    physical: int
    rank: int
    logical: int | None
    load: float


@frozen
class ExpertLoad:
    """A logical expert, and what each rank got of it under the placements in force."""

    logical: int
    load: float
    share: float
    #: In the last placement.
    replicas: int
    ranks: list[RankLoad]


@frozen
class LayerMinutes(Report):
    """What sums per minute show of a layer besides its ranks. Times are ns since 1970, and texts in JSON."""

    minutes: int
    first_minute: int
    last_minute: int
    summed_balancedness: float | None
    hot_experts: list[HotExpert]

    def to_json(self) -> dict[str, Any]:
        return self.document(
            {
                #: The number of clock minutes with a complete step.
                "minutes": self.minutes,
                #: When the first minute began that figures are over, ISO 8601, UTC.
                "first_minute": iso(self.first_minute),
                #: When the last one began, which is included.
                "last_minute": iso(self.last_minute),
                #: The balancedness of loads summed per minute, if each rank wrote its own (scope local). It
                #: replaces `balancedness`.
                "summed_balancedness": self.summed_balancedness,
                #: The hottest with more than the mean, by the four slots that each minute names: at least so
                #: much, and others can have had as much.
                "hot_experts": self.hot_experts,
            }
        )


@frozen
class LayerReport(RunReport):
    """The load of each rank, slot and expert of one layer, summed over some steps."""

    layer: int
    first_step: int
    last_step: int
    #: How many steps the loads are summed over.
    steps: int
    #: False for steps that lack ranks: their loads are partial.
    complete: bool
    missing_ranks: list[int]
    #: Ranks that died before; ``ranks`` and ``slots`` are those of the others.
    lost_ranks: list[int]
    balancedness: float | None
    imbalance: float | None
    idle_fraction: float | None
    #: Slots with a token on the rank that has most of them; the mean over steps.
    active_experts: float | None
    ranks: list[RankLoad]
    slots: list[SlotLoad]
    experts: list[ExpertLoad]
    #: Steps in the range at which the layer's placement changed.
    placement_changes: list[int]
    phase: str | None = None
    #: The mean balancedness of equal parts of these steps.
    timeline: list[Bin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: The source of the figures: experts' loads (`full`), tokens per EP rank (`ranks`), of which `slots`,
    #: `experts` and `active_experts` are not known, or sums per minute (`minutes`).
    tier: str = Tier.FULL.value
    #: null, unless the figures are from sums per minute.
    minutes: LayerMinutes | None = None
