"""A run at one moment, while it is being written: the report of `watch`."""

from __future__ import annotations

from typing import Any

from eplb_analyze.errors import Finding
from eplb_analyze.json_report import RunReport
from eplb_analyze.live.alerts import Alert
from eplb_analyze.metrics.formulas import Spread
from eplb_analyze.metrics.losses import Bin
from eplb_dump.format.frozen import frozen


@frozen
class LayerSnapshot:
    """The figures of one layer over the complete steps."""

    layer: int
    balancedness: float | None
    #: The rank that was the slowest most often, and its share of the steps with unequal ranks.
    worst_rank: int | None
    worst_rank_share: float | None


@frozen
class RankSnapshot:
    """The figures of one EP rank over the complete steps."""

    rank: int
    #: The rank's load divided by the mean over ranks.
    times_mean: float | None
    #: The share of (step, layer) pairs in which others waited for this rank, and its share of all waiting.
    slowest_share: float | None
    excess_share: float | None


@frozen
class RecentSnapshot:
    """The figures of the complete steps in the last 10 s before the newest step."""

    first_step: int
    last_step: int
    complete: int
    balancedness: float | None
    idle_fraction: float | None
    layers: list[LayerSnapshot]
    ranks: list[RankSnapshot]


@frozen
class LiveHotExpert:
    """A logical expert with a high load per replica.

    ``times_mean``: its tokens divided by the mean over the layer's experts, over the window and over the last
    10 s, as far as the steps were read from journals.
    """

    layer: int
    expert: int
    times_mean: float
    #: The same in the last seconds.
    recent_times_mean: float | None
    replicas: int


@frozen
class WriterSnapshot:
    """The progress of one writer that the run expects."""

    rank: int
    #: None if no step was accepted yet. It may be retired.
    last_step: int | None
    #: How many steps it is behind the rank with the newest step.
    behind: int | None
    #: It is more than :data:`STOPPED_SECONDS` behind, or another rank got further and was closed.
    stopped: bool
    #: It stopped, and the engine continues without it: the other ranks send it no token.
    lost: bool
    #: The writer was closed.
    closed: bool
    sessions: int
    #: Counts among the steps that were read.
    dropped: int
    rejected: int


@frozen
class RearrangementSnapshot:
    """The newest rearrangement, and balancedness before and after it among the steps that were read."""

    first_step: int
    last_step: int
    layers: int
    #: Slots that hold another expert than before; None if not all placements before it are known.
    slots_changed: int | None
    #: Mean balancedness before it.
    before: float | None
    #: The number of steps in this mean.
    before_steps: int
    #: Mean balancedness after it.
    after: float | None
    #: The number of steps in this mean.
    after_steps: int
    #: Balancedness after less before.
    gain: float | None


@frozen
class Snapshot(RunReport):
    """A run at one moment. Figures cover the complete steps among the newest ``window`` recorded ones."""

    scope: str
    ep_size: int
    num_layers: int | None
    num_physical_experts: int | None
    #: The newest step that a rank wrote.
    newest_step: int | None
    #: Steps per second of the engine.
    steps_per_second: float | None
    #: Seconds since data was last appended.
    quiet_seconds: float | None
    #: True if all writers closed their sessions.
    closed: bool
    window: int
    first_step: int | None
    last_step: int | None
    #: True if the last complete step is recent, compared with the newest one.
    current: bool
    complete: int
    #: Steps that will never be complete, and steps that a rank can still reach.
    incomplete: int
    #: Steps that a rank can still reach.
    in_flight: int
    balancedness: Spread
    latest_balancedness: float | None
    idle_fraction: float | None
    layers: list[LayerSnapshot]
    ranks: list[RankSnapshot]
    #: None if no complete step is that new.
    recent: RecentSnapshot | None
    #: The highest load per replica first.
    hot_experts: list[LiveHotExpert]
    #: The number of steps that `hot_experts` covers.
    expert_steps: int
    #: In order of their first steps.
    alerts: list[Alert]
    #: The writer of each rank.
    writers: list[WriterSnapshot]
    timeline: list[Bin]
    #: The first step of each rearrangement that was seen, and the figures of the newest one.
    rearrangements: list[int]
    #: The newest rearrangement.
    rearrangement: RearrangementSnapshot | None
    #: The first step with the current EP size and slots, if they changed during the watch.
    shape_changed: int | None
    #: How many times a rank started again at an earlier step during the watch.
    restarts: int
    findings: list[Finding]

    @property
    def missing_ranks(self) -> list[int]:
        """Expected ranks without an accepted step."""
        return [writer.rank for writer in self.writers if writer.last_step is None and not writer.lost]

    def to_json(self) -> dict[str, Any]:
        document = super().to_json()
        document["balancedness"]["latest"] = document.pop("latest_balancedness")
        return document
