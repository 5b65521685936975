"""An oracle: each step of each layer placed by its own loads. No engine can have this as a setting.

It stands for systems that replicate experts for each batch after routing, such as UltraEP (arXiv 2606.04101)
and LLEP (arXiv 2601.17111): what balance placing by the loads of the step itself would reach, if that took no
time. They choose placements and shares in their own ways; here it is DeepSeek's global algorithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.deepseek import EPLB, Arithmetic, pack, replicate

Array = npt.NDArray[Any]

#: Rows that are placed at once, which bounds memory.
ROWS = 4096


def _order(keys: Array, names: Array) -> npt.NDArray[np.intp]:
    return np.argsort(-keys, axis=-1, kind="stable")


#: Ties do not matter for the balance, so they are not those of an engine.
_ARITHMETIC = Arithmetic(np.float64, np.float64, EPLB.total, _order)


def place_each(load: Array, slots: int, ranks: int, token_replication: int = 1) -> Array:
    """Tokens of each slot, if each step were placed by its own loads: ``[slots, steps]``, as ``load``.

    Each redundant slot goes to the expert with most tokens per copy. The copies of an expert share its tokens
    as evenly as whole tokens can be, and are packed into ranks, the one with most tokens first.

    Args:
        load: whole tokens of each logical expert ``[steps, num_logical_experts]``.
        slots: at least as many as experts; slot ``p`` is on rank ``p // (slots / ranks)``.
        token_replication: how many times the engine counts each token.
    """
    out = np.empty((slots, len(load)), load.dtype)
    for first in range(0, len(load), ROWS):
        rows = load[first : first + ROWS] // token_replication
        expert, copies = replicate(rows, slots, np.float64)
        count = copies.astype(np.int64)
        # Which copy of its expert a slot has: 0 for the first slots, one more for each further one.
        copy = np.zeros(expert.shape, np.int64)
        seen, every = np.ones(count.shape, np.int64), np.arange(len(rows))
        for slot in range(load.shape[1], slots):
            copy[:, slot] = seen[every, expert[:, slot]]
            seen[every, expert[:, slot]] += 1
        own, of = (np.take_along_axis(each, expert, 1) for each in (rows, count))
        tokens = own // of + (copy < own % of)
        packed = pack(tokens, expert, ranks, _ARITHMETIC)
        out[:, first : first + ROWS] = np.take_along_axis(tokens, packed, 1).T * token_replication
    return out
