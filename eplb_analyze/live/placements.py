"""The newest placements of a run that is being written, and the effect of the newest rearrangement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_analyze.live.experts import placement, replica_counts
from eplb_analyze.live.snapshot import RearrangementSnapshot
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.reader.lost import LostRank, serving_slots
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory
from eplb_analyze.reader.rhythm import Rhythm
from eplb_analyze.sessions.step_range import NO_END
from eplb_dump.format.journal import Int64, PlacementRows, Shape
from eplb_dump.format.session import SessionInfo

#: How many placements of each layer are kept.
PLACEMENTS = 32


class RecentPlacements:
    """The newest placements of each layer and the effect of the newest rearrangement."""

    def __init__(self, window: int, info: SessionInfo) -> None:
        """``window``: how many steps before and after a rearrangement are compared."""
        self._window, self._info = window, info
        self.layers: dict[int, LayerHistory] = {}
        self._newest: RearrangementSnapshot | None = None

    def add(self, rows: PlacementRows, *, remains: bool = False) -> None:
        """Add one rank's placements. All ranks write the same; one that missed a change writes it later.

        ``remains``: see :meth:`~eplb_analyze.reader.placements.LayerHistory.insert`.
        """
        numbers = zip(rows.step.tolist(), rows.layer.tolist(), rows.ep_size.tolist(), strict=True)
        for (step, layer, ep_size), slots in zip(numbers, rows.physical_to_logical, strict=True):
            history = self.layers.setdefault(layer, LayerHistory())
            history.insert(step, ep_size, slots, remains=remains)
            del history.steps[:-PLACEMENTS], history.ep_sizes[:-PLACEMENTS], history.slots[:-PLACEMENTS]

    def rearrangements(self) -> list[int]:
        return [change.first_step for change in self.history().rearrangements()]

    def history(self, lost: Sequence[LostRank] = ()) -> PlacementHistory:
        """The known placements, without the slots of lost ranks."""
        rhythm = Rhythm.stated(self._info, max(self.layers, default=0) + 1)
        history = PlacementHistory(self.layers, [], [], rhythm)
        return history.without(lost) if lost else history

    def replicas(self, shape: Shape) -> Int64:
        """How many slots of ranks that serve hold each expert: int64 ``[layers, num_logical_experts]``."""
        slots = placement(self.layers, NO_END - 1, shape.num_moe_layers, shape.num_physical_experts)
        return replica_counts(slots[:, serving_slots(shape)], self._info.num_logical_experts)

    def newest(self, steps: Int64, balancedness: Float64) -> RearrangementSnapshot | None:
        """The newest rearrangement, given the known steps, ascending, and their balancedness."""
        changes = self.history().rearrangements()
        if not changes:
            return None
        this, old = changes[-1], self._newest
        if old is not None and old.after_steps >= self._window and this.first_step == old.first_step:
            return old  # the steps before it are no longer known
        earliest = changes[-2].last_step if len(changes) > 1 else 0
        known = ~np.isnan(balancedness)
        steps, balancedness = steps[known], balancedness[known]
        edges = [
            max(earliest, this.first_step - self._window),
            this.first_step,
            this.last_step,
            this.last_step + self._window,
        ]
        low, before_end, after_start, high = np.searchsorted(steps, edges)
        before, after = balancedness[low:before_end], balancedness[after_start:high]
        means = [float(side.mean()) if len(side) else None for side in (before, after)]
        self._newest = RearrangementSnapshot(
            this.first_step,
            this.last_step,
            len(this.layers),
            this.slots_changed,
            means[0],
            len(before),
            means[1],
            len(after),
            means[1] - means[0] if means[0] is not None and means[1] is not None else None,
        )
        return self._newest
