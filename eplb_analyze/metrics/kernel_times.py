"""How long a rank's experts take, by kernel times that others published: for runs without step times.

The coefficients are fitted to the rows of uniform routing in the tables ``wideep_context_moe_perf`` and
``wideep_generation_moe_perf`` of ``ai-dynamo/aiconfigurator`` at ``095f58a51`` (Apache-2.0). The rows are
times of SGLang 0.5.10 in one MoE layer of DeepSeek-V3 (256 experts, hidden 7168, intermediate 2048, top 8,
fp8) in DeepEP's layouts, on the rank with the most tokens, for EP sizes 2 to 256. docs/metrics.md states the
errors in the other rows; benchmarks/kernel_times.py computes both.

Arrays in, arrays out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

#: The kernels multiply whole tiles: an expert's tokens count in full tiles of so many.
TILE = 128
#: What the tables are of.
LOGICAL_EXPERTS = 256


class Kernel(NamedTuple):
    """The times of one layer's experts on one GPU.

    Reading weights and multiplying overlap, so the longer of the two decides.

    Attributes:
        fixed: ms of every call.
        per_expert: ms to read the weights of an active expert.
        per_token: ms to multiply a token of a tile.
        floor: ms of the shortest call.
        error: in 95% of the rows that were not fitted, the cost of skew is off by at most this share of
            the time of the call.
        max_tokens: the most tokens of a rank in the tables, in tiles.
    """

    fixed: float
    per_expert: float
    per_token: float
    floor: float
    error: float
    max_tokens: int

    def ms(self, active: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> Float64:
        """The time of ranks with so many active experts, and tokens in tiles."""
        work = self.fixed + np.hypot(self.per_expert * active, self.per_token * tokens)
        return np.maximum(self.floor, work)


DECODE, PREFILL = "decode", "prefill"
#: By GPU and phase. The tables call them generation, in the layout with a mask, and context, contiguous.
KERNELS = {
    "h100": {
        DECODE: Kernel(0.02164, 0.01363, 6.829e-05, 0.0, 0.105, 1 << 15),
        PREFILL: Kernel(0.1791, 0.01845, 7.396e-05, 0.3485, 0.140, 1 << 17),
    },
    "h200": {
        DECODE: Kernel(0.02090, 0.007786, 6.691e-05, 0.0, 0.114, 1 << 15),
        PREFILL: Kernel(0.1774, 0.01293, 6.771e-05, 0.3341, 0.155, 1 << 17),
    },
    "b200": {
        DECODE: Kernel(0.01947, 0.005986, 4.357e-05, 0.0, 0.145, 1 << 15),
        PREFILL: Kernel(0.1723, 0.007512, 4.272e-05, 0.2694, 0.106, 1 << 17),
    },
}


class KernelWork(NamedTuple):
    """What a layer asks of each rank: float64 ``[n, layers, ep_ranks]`` each, tokens in tiles."""

    active: Float64
    tokens: Float64

    @classmethod
    def of(cls, load: npt.NDArray[Any], ep_size: int, per_token: int = 1) -> KernelWork:
        """``load``: ``[n, layers, slots]``; ``per_token``: how many times each token is counted."""
        by_rank = load.reshape(*load.shape[:2], ep_size, -1)
        tiles = np.ceil(by_rank / (per_token * TILE)).sum(axis=3) * TILE
        return cls(np.count_nonzero(by_rank, axis=3).astype(np.float64), tiles)

    def times(self, kernel: Kernel) -> tuple[Float64, Float64]:
        """ms of the slowest rank and of a perfect balance of the same loads, summed over layers: ``[n]``."""
        layers = self.active.any(axis=2)
        slowest = kernel.ms(self.active, self.tokens).max(axis=2)
        balanced = kernel.ms(self.active.mean(axis=2), self.tokens.mean(axis=2))
        return (slowest * layers).sum(axis=1), (balanced * layers).sum(axis=1)

    def outside(self, kernel: Kernel) -> npt.NDArray[np.bool_]:
        """Steps with a rank that has more tokens than any in the tables: bool ``[n]``."""
        return np.asarray(self.tokens.max(axis=(1, 2)) > kernel.max_tokens)
