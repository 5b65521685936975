"""Expert ids per token, whatever their format: a file's tokens in blocks, and the checks of all formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.transfer.importers import table
from eplb_analyze.transfer.importers.files import Array
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import MAX_LAYERS

#: The names of arrays and columns, in lower case.
IDS = (
    "topk_ids", "routed_experts", "expert_ids", "topk_indices", "topk_idx", "selected_experts", "indices",
)  # fmt: skip
BESIDE = {
    "step": table.NAMES["step"],
    "request": ("request", "request_id", "rid", "req_id", "prompt_id", "sample_id", "sequence_id"),
    "layer": table.NAMES["layer"],
}
#: About how many ids are in a block.
BLOCK_IDS = 1 << 21
#: The most experts per token: no model has as many, but the last axis of other arrays is often longer.
MAX_TOP_K = 128


@frozen
class Block:
    """Consecutive tokens of a file, with their expert ids in some layers."""

    #: Integers ``[tokens, layers, top-k]``; -1: padding.
    ids: Array
    #: The number of each layer of ``ids``.
    layers: tuple[int, ...]
    #: int64 ``[tokens]``; None: not in the file.
    step: Int64 | None = None
    #: int64 ``[tokens]``, numbered from 0 in the order of the file; None: not in the file.
    request: Int64 | None = None


@frozen
class TokenFile:
    """One file of expert ids, or one for each layer, which can be read more than once."""

    path: Path
    #: For example ``[tokens, layers, top-k]``.
    kind: str
    blocks: Callable[[], Iterator[Block]]
    has_steps: bool = False
    has_requests: bool = False
    #: Whether layers have the numbers of the model, not their index.
    numbered: bool = False
    #: Arrays or columns that are not read.
    left_out: list[str] = field(default_factory=list)
    #: The files of the layers, if each has its own.
    of_layers: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        return list(self.of_layers) or [self.path]


def checked(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
    """Layers and experts per token of an array of ids. Raises DumpError."""
    if dtype.kind not in "iu":
        raise DumpError(f"{path}: its expert ids have the type {dtype}; save them as integers (np.int16)")
    if len(shape) not in (2, 3, 4) or 0 in shape:
        raise DumpError(
            f"{path}: expert ids of the shape {shape}; they must be [tokens, layers, top-k], [tokens, top-k] "
            f"for one layer, or [steps, tokens, layers, top-k]"
        )
    layers, top_k = (1 if len(shape) == 2 else shape[-2]), shape[-1]
    if layers > MAX_LAYERS or top_k > MAX_TOP_K:
        raise DumpError(
            f"{path}: the shape {shape} means {layers:,} layers with {top_k:,} experts per token, more than "
            f"any model; the last axes must be layers and top-k (counts of experts: --format array)"
        )
    return layers, top_k


def rows_of_block(layers: int, top_k: int) -> int:
    """How many tokens are in a block."""
    return max(1, BLOCK_IDS // (layers * top_k))


def columns_beside(names: Iterable[str], *roles: str) -> dict[str, str]:
    """The names of the arrays or columns with a role, by role."""
    by_lower = {name.lower(): name for name in names}
    found = {role: [by_lower[known] for known in BESIDE[role] if known in by_lower] for role in roles}
    return {role: named[0] for role, named in found.items() if named}


def choose(
    path: Path, fitting: list[str], wanted: str | None, every: list[str], trailing: list[tuple[int, ...]]
) -> list[str]:
    """The name of the array or column with the ids, or the names of one array per request."""
    if wanted is not None:
        if wanted not in every:
            raise UsageError(f"{path}: it has no {wanted!r} (--array); it has: {', '.join(every[:10])}")
        return [wanted]
    known = [name for name in fitting if name.lower() in IDS] or fitting
    if len(known) == 1:
        return known
    if not known:
        raise DumpError(f"{path}: it has no expert ids (integers); it has: {', '.join(every[:10]) or 'none'}")
    # np.savez(file, *arrays) names the arrays arr_0, arr_1, ...
    alike = len(set(trailing)) == 1 and len(trailing[0]) <= 2
    if alike and known == every and all(re.fullmatch(r"arr_\d+", name) for name in known):
        return known
    raise UsageError(f"{path}: several could be the expert ids; choose with --array: {', '.join(known[:10])}")


class Numbers:
    """Numbers requests from 0 in the order in which they first appear."""

    def __init__(self) -> None:
        self._of: dict[Any, int] = {}

    def of(self, values: Array) -> Int64:
        unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        named = unique.tolist()
        for i in np.argsort(first).tolist():
            self._of.setdefault(named[i], len(self._of))
        return np.array([self._of[name] for name in named], np.int64)[inverse]


def steps_of(path: Path, values: Array) -> Int64:
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= NO_END:
        raise DumpError(f"{path}: its steps must be whole numbers, 0 or more")
    return values.astype(np.int64)
