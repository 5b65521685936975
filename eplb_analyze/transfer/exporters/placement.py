"""A placement to be written, and the check that an engine can serve it."""

from __future__ import annotations

import numpy as np

from eplb_analyze.errors import UsageError
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT


@frozen
class Placement:
    """Which logical expert each slot holds, for all layers of a file.

    Attributes:
        layers: the model's number of each layer, ascending.
        physical_to_logical_map: int32 [layers, num_physical_experts]; slot ``p`` is on EP rank
            ``p // (num_physical_experts / ep_size)``; -1: empty.
    """

    layers: tuple[int, ...]
    ep_size: int
    num_logical_experts: int
    physical_to_logical_map: Int32

    @property
    def num_physical_experts(self) -> int:
        return int(self.physical_to_logical_map.shape[1])

    @property
    def num_redundant_experts(self) -> int:
        return self.num_physical_experts - self.num_logical_experts

    def devices(self) -> Int32:
        """The experts of each rank: int32 ``[layers, ep_size, slots]``."""
        return self.physical_to_logical_map.reshape(len(self.layers), self.ep_size, -1)


def require_loadable(placement: Placement) -> None:
    """Check that an engine can serve it: no slot is empty, and every logical expert has one.

    Raises:
        UsageError: names the first layer that fails.
    """
    for layer, slots in zip(placement.layers, placement.physical_to_logical_map, strict=True):
        empty = int((slots == EMPTY_SLOT).sum())
        if empty:
            text = f"layer {layer} has {empty} empty slots, and engines load an expert into every slot"
            raise UsageError(f"{text} (--for json keeps them, as -1)")
        absent = np.setdiff1d(np.arange(placement.num_logical_experts), slots)
        if len(absent):
            raise UsageError(f"layer {layer} has no slot for expert {absent[0]}, so no engine can serve it")
