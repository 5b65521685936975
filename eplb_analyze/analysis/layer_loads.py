"""What the incident finder needs of a run: loads of one layer around a step, times and prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from eplb_analyze.metrics.incident_causes import LayerSample
from eplb_analyze.reader.lost import LostRank
from eplb_analyze.reader.placements import PlacementHistory
from eplb_dump.format.journal import Int64

#: Experts' loads must be kept of so many steps on either side of an edge; else those of EP ranks are used.
LOADS_NEAR = 40


class LayerLoads(Protocol):
    """The loads of a run, of one layer at a time."""

    history: PlacementHistory
    lost_ranks: Sequence[LostRank]
    num_logical: int
    #: Layer numbers in the model.
    layers: Sequence[int]
    token_replication: int

    @property
    def experts(self) -> Int64:
        """How many logical experts each layer has."""

    def read(self, layer: int, first: int, end: int, edge: int) -> LayerWindow:
        """The complete steps of a half-open range, of one configuration: that of its middle.

        If experts' loads are not kept in the steps around ``edge``, those of EP ranks.
        """

    def time_of(self, step: int) -> str | None:
        """ISO 8601, UTC; None if the run has no times."""

    def price(self, before: LayerSample, during: LayerSample, layers: int) -> Any:
        """What the difference of imbalance of a layer like this costs, times ``layers``: ms, or None."""


@dataclass(frozen=True)
class LayerWindow:
    """Consecutive recorded steps of one layer.

    Attributes:
        load: int64 ``[n, slots]``; or ``[n, ranks]`` if it is ``by_rank``.
        by_rank: whether experts' loads are not kept, so that only those of EP ranks are known.
        mixed: whether experts' loads are kept of some of the steps asked for, and not of others.
    """

    steps: Int64
    load: npt.NDArray[Any]
    ranks: int
    serving: int
    by_rank: bool = False
    mixed: bool = False
