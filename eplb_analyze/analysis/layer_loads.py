"""What the incident finder needs of a run: loads of one layer around a step, times and prices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.incident_causes import LayerSample
from eplb_analyze.reader.lost import LostRank
from eplb_analyze.reader.placements import PlacementHistory
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64

#: A cause is told by experts' loads only if they are kept of so many steps on either side of an edge.
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

    def read(self, layer: int, first: int, end: int) -> LayerWindow:
        """The complete steps of a half-open range, of one configuration: that of its middle."""

    def time_of(self, step: int) -> str | None:
        """ISO 8601, UTC; None if the run has no times."""

    def price(self, before: LayerSample, during: LayerSample, layers: int) -> Any:
        """What the difference of imbalance of a layer like this costs, times ``layers``: ms, or None."""


@frozen
class LayerWindow:
    """Consecutive recorded steps of one layer.

    Attributes:
        rank_load: int64 ``[n, ranks]``, the tokens of each EP rank.
        load_steps: int64 ``[m]``, those of the steps of which experts' loads are kept.
        load: int64 ``[m, slots]``.
        serving: how many ranks serve.
    """

    steps: Int64
    rank_load: Int64
    load_steps: Int64
    load: npt.NDArray[Any]
    serving: int

    @classmethod
    def empty(cls) -> LayerWindow:
        none = np.empty(0, np.int64)
        return cls(none, np.empty((0, 1), np.int64), none, np.empty((0, 1), np.int64), 1)

    def has_loads_near(self, step: int) -> bool:
        """Whether experts' loads are kept of the steps around one."""
        own, kept = (
            np.diff(np.searchsorted(steps, [step - LOADS_NEAR, step + LOADS_NEAR]))
            for steps in (self.steps, self.load_steps)
        )
        return bool(own == kept)
