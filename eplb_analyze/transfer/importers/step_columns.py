"""What a .npz file says about its steps beside the counts: times, tokens, phases, placements."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.files import Array, npz_shapes, read_npz
from eplb_analyze.transfer.importers.source import Chunk
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Float32, Int32, Int64, impossible_ms
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_NUMBER, MAX_PHASE

PLACEMENT = "physical_to_logical_map"
#: The names of the arrays; any other can be the counts.
NAMES = "step_ms", "num_tokens", "phase", PLACEMENT
#: Figures are by phase, so texts that differ in each step, such as ids, are none.
MAX_PHASES = 256


@frozen
class StepColumns:
    """The columns of a file; None if it does not have one."""

    #: float32 ``[steps]``; NaN: not known.
    step_ms: Float32 | None = None
    #: int64 ``[steps]``; -1: not known.
    num_tokens: Int64 | None = None
    phase: tuple[str | None, ...] | None = None
    #: int32 ``[steps, layers, num_physical_experts]``, or ``[1, …]``: in force in all steps.
    placement: Int32 | None = None

    def changes(self) -> list[int]:
        """The indices of steps with another placement than the step before."""
        if self.placement is None:
            return []
        changed = (self.placement[1:] != self.placement[:-1]).any(axis=(1, 2))
        return [int(i) + 1 for i in np.flatnonzero(changed)]

    def chunk(self, low: int, high: int, load: Array) -> Chunk:
        """Steps ``low`` to ``high - 1``, all of one placement, with their counts."""
        placement = self.placement
        return Chunk(
            np.arange(low, high, dtype=np.int64),
            load,
            None if placement is None else placement[min(low, len(placement) - 1)],
            num_tokens=None if self.num_tokens is None else self.num_tokens[low:high],
            phase=None if self.phase is None else self.phase[low:high],
            step_ms=None if self.step_ms is None else self.step_ms[low:high],
        )


def read(path: Path, shape: tuple[int, ...]) -> StepColumns:
    """The columns beside counts of ``shape [steps, layers, slots]``. Raises DumpError."""
    steps, layers, slots = shape
    shapes = npz_shapes(path)
    names = [name for name in NAMES if name in shapes]
    for name in names:
        possible = [(layers, slots), shape] if name == PLACEMENT else [(steps,)]
        if shapes[name][0] not in possible:
            wanted = " or ".join(map(str, possible))
            raise DumpError(f"{path}: its {name} has the shape {shapes[name][0]}, the counts need {wanted}")
    found = read_npz(path, *names)
    placement = _placement(path, found.get(PLACEMENT))
    return StepColumns(
        _step_ms(path, found.get("step_ms")),
        _num_tokens(path, found.get("num_tokens")),
        _phase(path, found.get("phase")),
        None if placement is None else placement.reshape(-1, layers, slots),
    )


def _step_ms(path: Path, values: Array | None) -> Float32 | None:
    if values is None:
        return None
    # A float16 cannot be compared with MAX_NUMBER.
    ms = values.astype(np.float64) if values.dtype.kind in "iuf" else None
    if ms is None or impossible_ms(ms) or (ms >= MAX_NUMBER).any():
        raise DumpError(f"{path}: its step_ms must be times in ms, 0 or more (NaN if unknown)")
    return ms.astype(np.float32)


def _num_tokens(path: Path, values: Array | None) -> Int64 | None:
    if values is None:
        return None
    if values.dtype.kind not in "iu" or values.min() < -1 or values.max() >= MAX_NUMBER:
        raise DumpError(f"{path}: its num_tokens must be whole numbers, 0 or more (-1 if unknown)")
    return values.astype(np.int64)


def _phase(path: Path, values: Array | None) -> tuple[str | None, ...] | None:
    if values is None:
        return None
    texts: list[str] = values.tolist()
    if values.dtype.kind != "U" or not all(len(t) <= MAX_PHASE and t.isprintable() for t in set(texts)):
        raise DumpError(
            f"{path}: its phase must be texts of at most {MAX_PHASE} characters (empty if unknown)"
        )
    if len(set(texts)) > MAX_PHASES:
        raise DumpError(
            f"{path}: its phase has {len(set(texts)):,} different texts; a phase is a kind of step, such "
            f"as decode, and there can be at most {MAX_PHASES}"
        )
    return tuple(text or None for text in texts)


def _placement(path: Path, values: Array | None) -> Int32 | None:
    if values is None:
        return None
    if values.dtype.kind not in "iu" or values.min() < EMPTY_SLOT or values.max() >= MAX_EXPERTS:
        raise DumpError(f"{path}: its {PLACEMENT} must name the expert in each slot (-1: empty)")
    return values.astype(np.int32)
