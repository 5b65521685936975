"""Loads by slot, summed over bins of time and packed, so that a page can add up any range of bins.

The loads of ranks follow from those of their slots, those of logical experts from the placement in
force. Only where a layer's placement changed within a bin its experts' sums are kept apart. So a page
holds one array and a few rows, and the figures it shows of experts are as exact as those of slots.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.configurations import Sums
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import lost_in
from eplb_analyze.reader.placements import LayerHistory, fold, sums_between
from eplb_analyze.reader.readings import Reading
from eplb_analyze.reader.run import Run
from eplb_dump.format.journal import Int32, Int64, Shape

#: The most bins that a run is divided into.
MAX_BINS = 128
#: Packed arrays take at most so many bytes (a third more in base64), whatever the run: with the rest
#: a report stays below 8 MB.
MAX_BYTES = 4_800_000
#: Counts up to this one are kept as they are, larger rows in units of some tokens.
MAX_COUNT = 2**16 - 1
#: A slot that holds no expert, in a packed placement.
NO_EXPERT = 2**16 - 1


def bins_that_fit(run: Run) -> int:
    """The largest number of bins, up to ``MAX_BINS``, whose packed arrays fit in ``MAX_BYTES``."""
    shapes = {s.shape for session in run.sessions for s in session.segments if s.shape is not None}
    layers = max((shape.num_moe_layers for shape in shapes), default=1)
    slots = max((shape.num_physical_experts for shape in shapes), default=1)
    changes = sum(len(run.history.layer(i).steps) for i in range(layers))

    def size(bins: int) -> int:
        rows = min(changes, bins * layers)
        return 2 * (bins * layers * slots + rows * (slots + run.info.num_logical_experts))

    return next((bins for bins in range(MAX_BINS, 1, -1) if size(bins) <= MAX_BYTES), 1)


class LoadBins(Sums):
    """Of one configuration, by bins of time: loads by slot, and what else a page needs of them.

    Attributes:
        edges: int64 [bins + 1], the first step of each bin and the step after the last.
        slots: int64 [bins, layers, slots], counts as recorded: token replication not divided out.
        recorded_steps: int64 [bins], complete steps.
        clock_ns: int64 [bins], when the first of them was, ns since 1970; -1 where there is none.
        experts: int64 [num_logical_experts] for each (bin, layer) in which the placement changed.
    """

    def __init__(self, run: Run, shape: Shape, edges: Int64) -> None:
        super().__init__(shape)
        count, layers = len(edges) - 1, shape.num_moe_layers
        self.edges = edges
        self.slots: Int64 = np.zeros((count, layers, shape.num_physical_experts), np.int64)
        self.recorded_steps: Int64 = np.zeros(count, np.int64)
        self.clock_ns: Int64 = np.full(count, -1, np.int64)
        self._history = run.history
        self.experts: dict[tuple[int, int], Int64] = {
            (b, layer): np.zeros(run.info.num_logical_experts, np.int64)
            for layer in range(layers)
            for b in self._changed(run.history.layer(layer))
        }

    def _changed(self, history: LayerHistory) -> set[int]:
        """The bins with a change of placement after their first step."""
        steps = np.array([s for s in history.steps if self.edges[0] < s < self.edges[-1]], np.int64)
        return set(self._bin(steps[~np.isin(steps, self.edges)]).tolist())

    def _bin(self, steps: Int64) -> npt.NDArray[np.intp]:
        return np.searchsorted(self.edges, steps, side="right") - 1

    def placement(self, b: int, layer: int) -> Int32 | None:
        """The placement of a layer at the end of a bin; None if it is not known."""
        slots = self._history.layer(layer).at(int(self.edges[b + 1]) - 1)
        return slots if slots is not None and len(slots) == self.shape.num_physical_experts else None

    def _reading(self, block: Block) -> Reading:
        steps = block.recorded
        bins = self._bin(steps)
        first, last = int(bins[0]), int(bins[-1])
        starts = np.flatnonzero(np.diff(bins, prepend=-1)).tolist()
        by_slot = np.zeros((last + 1 - first, *self.slots.shape[1:]), np.int64)
        experts = {key: np.zeros_like(own) for key, own in self.experts.items() if first <= key[0] <= last}

        def use(layer: int, load: npt.NDArray[Any]) -> None:
            for slots, begins, sums in sums_between(load, steps, self._history.layer(layer), starts):
                by_slot[bins[begins] - first, layer] += sums
                for b, tokens in zip(bins[begins].tolist(), sums, strict=True):
                    apart = experts.get((b, layer))
                    if apart is not None and slots is not None and len(slots) == len(tokens):
                        apart += fold(tokens, slots, len(apart))

        return Reading(use, lambda: (by_slot, experts))

    def merge(self, block: Block, part: tuple[Int64, dict[tuple[int, int], Int64]]) -> None:
        """The part: what ``slots`` and ``experts`` have of the bins of the block."""
        by_slot, experts = part
        bins = self._bin(block.recorded)
        self.slots[bins[0] : bins[-1] + 1] += by_slot
        for key, tokens in experts.items():
            self.experts[key] += tokens
        self.recorded_steps += np.bincount(bins, minlength=len(self.recorded_steps))
        present, first = np.unique(bins, return_index=True)
        unseen = self.clock_ns[present] < 0
        clock = block.clock_ns[block.state == StepState.RECORDED]
        self.clock_ns[present[unseen]] = clock[first[unseen]]

    def packed(self, run: Run) -> dict[str, Any]:
        """For the page's script (``assets/loads.js``), which says what each member is."""
        count, layers, _ = self.slots.shape
        placed = [(b, i, self.placement(b, i)) for i in range(layers) for b in range(count)]
        known: list[tuple[int, int, Int32]] = []
        for b, i, slots in placed:
            same = known and known[-1][1] == i and slots is known[-1][2]
            if slots is not None and not same:
                known.append((b, i, slots))
        apart = sorted(self.experts)
        return {
            "edges": self.edges.tolist(),
            "steps": self.recorded_steps.tolist(),
            "times": [None if t < 0 else t // 1_000_000 for t in self.clock_ns.tolist()],
            "ep_size": self.shape.ep_size,
            "slots_per_rank": self.shape.slots_per_rank,
            "lost_ranks": list(lost_in(self.shape)),
            "experts": run.info.num_logical_experts,
            "layers": list(run.info.layers),
            "per_token": run.info.token_replication,
            "slots": pack(self.slots.reshape(count * layers, -1), layers),
            "placements": {
                "bin": [b for b, _, _ in known],
                "layer": [i for _, i, _ in known],
                "slots": _packed_placements([slots for _, _, slots in known], self.shape),
            },
            "apart": {
                "bin": [b for b, _ in apart],
                "layer": [i for _, i in apart],
                "experts": pack(
                    np.array([self.experts[key] for key in apart], np.int64).reshape(
                        len(apart), run.info.num_logical_experts
                    ),
                    1,
                ),
            },
        }


def pack(counts: Int64, stride: int) -> dict[str, Any]:
    """Rows of counts ``[n, width]`` as text: 16 bits each, the low and the high bytes apart, deflated.

    A row with a larger count is kept in units of so many tokens that it fits. What is deflated are
    differences to the row ``stride`` before, which the same layer had a bin earlier.
    """
    largest = counts.max(axis=1, initial=0)
    units = np.maximum(1, -(-largest // MAX_COUNT))
    exact = bool((units == 1).all())
    rounded = counts if exact else (counts + units[:, None] // 2) // units[:, None]
    short = np.minimum(rounded, MAX_COUNT).astype(np.uint16)
    short[stride:] -= short[:-stride].copy()
    return {
        "shape": list(counts.shape),
        "stride": stride,
        "units": None if exact else units.tolist(),
        "data": _deflated(short),
    }


def _packed_placements(placements: list[Int32], shape: Shape) -> dict[str, Any]:
    rows = np.array(placements, np.int64).reshape(len(placements), shape.num_physical_experts)
    rows = np.where(rows < 0, NO_EXPERT, rows)
    return {"shape": list(rows.shape), "stride": 0, "units": None, "data": _deflated(rows.astype(np.uint16))}


def _deflated(values: npt.NDArray[np.uint16]) -> str:
    octets = values.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2)
    return base64.b64encode(zlib.compress(octets.T.tobytes(), 6)).decode("ascii")
