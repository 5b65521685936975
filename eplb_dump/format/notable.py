"""Which segments are worth keeping in full for longer: around a start, a rearrangement, a loss of balance."""

from __future__ import annotations

from collections import deque

import numpy as np

from eplb_dump.format.journal import PlacementRows, Shape
from eplb_dump.format.minutes import Minutes

#: A layer lost balance if it is below this share of its median over the minutes before.
DROP = 0.8
#: The median is over at most so many minutes, and not known from fewer than the least.
MINUTES, LEAST_MINUTES = 32, 4
#: A minute with fewer steps is not judged: chance would decide.
LEAST_STEPS = 8


def reasons_of_placements(seq: int, placements: PlacementRows) -> tuple[str, ...]:
    """Why a segment is notable, as far as its loads do not tell."""
    reasons = ["start"] if seq == 0 else []
    # The first placement of a session is none that changed.
    if len(np.unique(placements.step)) > (1 if seq == 0 else 0):
        reasons.append("rearrangement")
    return tuple(reasons)


class Notable:
    """Judges the segments of one session in order."""

    def __init__(self) -> None:
        self._shape: Shape | None = None
        #: Balancedness of each layer, of the loads summed over a minute: float64 [L] each.
        self._before: deque[np.ndarray[tuple[int], np.dtype[np.float64]]] = deque(maxlen=MINUTES)

    def judge(
        self, seq: int, shape: Shape | None, placements: PlacementRows, minutes: Minutes
    ) -> tuple[str, ...]:
        """Why the segment is notable; empty if it is not."""
        lost = shape is not None and self._lost_balance(shape, minutes)
        return (*reasons_of_placements(seq, placements), *(["imbalance"] if lost else []))

    def _lost_balance(self, shape: Shape, minutes: Minutes) -> bool:
        if shape != self._shape:
            self._shape = shape
            self._before.clear()
        found = False
        load = minutes["rank_load"].reshape(len(minutes), shape.num_moe_layers, shape.ep_size)
        for row, steps in zip(load, minutes["active_steps"], strict=True):
            judged = steps >= LEAST_STEPS
            highest = row.max(axis=1)
            balance = np.where(judged, row.mean(axis=1) / np.maximum(highest, 1), np.nan)
            if len(self._before) >= LEAST_MINUTES:
                before = np.stack(self._before)
                known = judged & np.isfinite(before).all(axis=0)
                found |= bool((balance[known] < DROP * np.median(before[:, known], axis=0)).any())
            if judged.any():
                self._before.append(balance)
        return found
