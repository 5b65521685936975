"""The loads of the newest complete steps: what the incident finder reads while a run is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.incident_explainer import WINDOW
from eplb_analyze.analysis.layer_loads import LayerWindow
from eplb_analyze.live.window import CompleteSteps
from eplb_analyze.metrics.incident_causes import LayerSample
from eplb_analyze.reader.lost import LostRank, serving
from eplb_analyze.reader.placements import PlacementHistory
from eplb_analyze.text import iso
from eplb_dump.format.journal import Int64, Shape, rank_loads
from eplb_dump.format.session import SessionInfo

#: The loads of at least so many of the newest steps are kept: enough to explain a departure that began up to
#: 160 steps ago, the widest window in which an edge shows, and to find the edges of its loads.
KEPT = 2 * WINDOW + 80


class _Part(NamedTuple):
    steps: Int64
    #: ``[n, layers, slots]``, or ``[n, layers, ranks]`` of steps that were read from a sealed segment.
    load: npt.NDArray[Any]
    shape: Shape


class RecentLoads:
    """See :class:`eplb_analyze.analysis.layer_loads.LayerLoads`; it has the newest steps only.

    Attributes:
        times: clock times by step, ns since 1970; whoever adds steps sets it.
    """

    def __init__(self, info: SessionInfo, num_layers: int) -> None:
        self.history = PlacementHistory({}, [], [])
        self.lost_ranks: Sequence[LostRank] = []
        self.num_logical = info.num_logical_experts
        self.layers: Sequence[int] = info.layer_numbers(num_layers)
        self.token_replication = info.token_replication
        self.times: tuple[Int64, Int64] = np.empty(0, np.int64), np.empty(0, np.int64)
        self._parts: list[_Part] = []

    @property
    def experts(self) -> Int64:
        return self.history.num_experts(self.num_logical, len(self.layers))

    @property
    def first_step(self) -> int | None:
        """The first step whose loads are known."""
        return int(self._parts[0].steps[0]) if self._parts else None

    def add(self, news: CompleteSteps) -> None:
        load = news.rank_load if news.load is None else news.load
        self._parts.append(_Part(news.step, load, news.shape))

    def trim(self) -> None:
        """Forget all but the newest steps, and keep these in as few bytes as they need."""
        left, kept = KEPT, []
        for part in reversed(self._parts):
            if left <= 0:
                break
            load = part.load[-left:]
            smallest = np.min_scalar_type(int(load.max(initial=0)))
            kept.append(_Part(part.steps[-left:], load.astype(smallest), part.shape))
            left -= len(part.steps)
        self._parts = kept[::-1]

    def read(self, layer: int, first: int, end: int) -> LayerWindow:
        inside = [
            (part, slice(*np.searchsorted(part.steps, [first, end])))
            for part in self._parts
            if part.steps[0] < end and part.steps[-1] >= first
        ]
        if not inside:
            return LayerWindow.empty()
        middle = (first + end) // 2
        shape = min(inside, key=lambda one: int(np.abs(one[0].steps - middle).min()))[0].shape
        same = [(part, here) for part, here in inside if part.shape == shape]
        steps = [part.steps[here] for part, here in same]
        loads = [part.load[here, layer].astype(np.int64) for part, here in same]
        by_rank = [rank_loads(load, shape.ep_size) for load in loads]
        full = [i for i, load in enumerate(loads) if load.shape[1] == shape.num_physical_experts]
        none = np.empty(0, np.int64)
        return LayerWindow(
            np.concatenate(steps),
            np.concatenate(by_rank),
            np.concatenate([none, *(steps[i] for i in full)]),
            np.concatenate([none.reshape(0, shape.num_physical_experts), *(loads[i] for i in full)]),
            serving(shape),
        )

    def time_of(self, step: int) -> str | None:
        steps, times = self.times
        at = int(np.searchsorted(steps, step))
        return iso(int(times[at])) if at < len(steps) else None

    def price(self, before: LayerSample, during: LayerSample, layers: int) -> None:
        """What it costs is known at the end of the run: it needs all step times."""
