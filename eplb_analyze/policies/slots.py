"""Which slot of its rank an expert gets: the one that it has, so that no weights move within a rank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def keep_slots(placed: Int32, current: Int32, ep_size: int) -> Int32:
    """Reorder the experts of each rank: those that it held keep their slots, the others fill the rest.

    ``placed``, ``current`` and the result are int32 ``[layers, num_physical_experts]``. If an expert has
    several slots, those with lower numbers are kept first.
    """
    new, old = (each.reshape(-1, each.shape[1] // ep_size) for each in (placed, current))
    rank = np.arange(len(new))
    out = np.empty_like(new)
    used = np.zeros(new.shape, np.bool_)
    kept = np.zeros(new.shape, np.bool_)
    for slot in range(new.shape[1]):
        same = (new == old[:, slot, None]) & ~used
        found, where = same.any(axis=1), same.argmax(axis=1)
        used[rank[found], where[found]] = True
        kept[:, slot] = found
    out[kept] = old[kept]
    out[~kept] = new[~used]
    return out.reshape(placed.shape)
