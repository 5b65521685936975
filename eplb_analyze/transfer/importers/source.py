"""What a reader returns, the user's options, and the error that asks for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Float32, Int32, Int64, Loads
from eplb_dump.format.schema import EMPTY_SLOT, MAX_LOAD, Scope

Counts = npt.NDArray[Any]

#: The largest count of a source: figures are computed in float64, which holds it exactly.
MAX_COUNT = 2**53

#: The values of ``--placement`` beside names of :data:`~eplb_analyze.policies.policy.INITIAL` and files.
LAST, UNKNOWN = "last", "unknown"
#: All slots of a layer in a chunk whose placement of that layer is not known.
UNKNOWN_ROW = EMPTY_SLOT - 1


@frozen
class Options:
    """What a user says about a source. None: not given."""

    model: str | None = None
    ep_size: int | None = None
    #: A name of :data:`~eplb_analyze.policies.policy.INITIAL`, ``last``, ``unknown``, or a file's path.
    placement: str | None = None
    num_logical_experts: int | None = None
    token_replication: int | None = None
    #: The model's number of each layer of the source.
    layers: tuple[int, ...] | None = None
    #: The source's rows are in chronological order.
    ordered: bool = False
    #: Import sums over a window instead of single passes, if the source has both.
    window: bool = False
    #: Number the records from 0 in their order, and ignore their own step numbers.
    renumber: bool = False
    #: Glob pattern of the file names to read in a folder.
    only: str | None = None
    #: The name of the array in a .npz file, or of the column in a Parquet file of expert ids.
    array: str | None = None
    #: How many tokens in a row of a file of expert ids form a step.
    tokens_per_step: int | None = None
    #: What else forms a step: ``request``, or ``position``, the n-th tokens of all requests.
    step_per: str | None = None


@frozen
class Chunk:
    """Some steps of one rank, all with one placement and shape.

    ``load`` is unchecked: ``[n, layers, width]`` of any number type.
    """

    step: Int64
    load: Counts
    #: int32 ``[layers, num_physical_experts]``, in force in all these steps, UNKNOWN_ROW in layers whose
    #: placement is not known; None: not in the source.
    placement: Int32 | None = None
    #: If the source has it for these steps.
    ep_size: int | None = None
    #: int64 ``[n]``; -1: not known.
    num_tokens: Int64 | None = None
    phase: tuple[str | None, ...] | None = None
    #: float32 ``[n]``, the engine's own time of each pass in ms; NaN: not known.
    step_ms: Float32 | None = None
    #: int64 ``[n]``, ns since 1970, if the source has it.
    time_ns: Int64 | None = None


@dataclass
class Reading:
    """All that a source itself says."""

    #: For example ``SGLang`` and ``per_pass``.
    system: str
    kind: str
    files: list[Path]
    #: Whether ``load`` is by slot (physical expert) or by logical expert; None: not known.
    by_slot: bool | None
    scope: Scope
    #: The chunks of each EP rank, of rank 0 alone with scope global. Can be called more than once.
    parts: dict[int, Callable[[], Iterator[Chunk]]]
    num_layers: int
    #: Number of slots or experts: the last axis of ``load``.
    width: int
    ep_size: int | None = None
    model: str | None = None
    num_logical_experts: int | None = None
    #: The model's number of each layer of ``load``, ascending; None: not in the source.
    layers: tuple[int, ...] | None = None
    #: Number of hidden layers, if the source has a row for each and ``layers`` are those with tokens.
    hidden_layers: int | None = None
    #: Whether the chunks have placements.
    placed: bool = False
    #: Whether the chunks have times.
    timed: bool = False
    #: How many times each token was counted, if the source says so.
    token_replication: int | None = None
    #: Distance between the steps that the source has.
    interval: int = 1
    #: The files of each rank, if ranks have their own.
    files_of: dict[int, list[Path]] = field(default_factory=dict)
    #: Stable code to sentence: what the source does not say, and what was assumed.
    unknown: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    #: What was left out, and other notes for the user.
    notes: list[str] = field(default_factory=list)


def ordered_rows(reading: Reading, options: Options, why: str) -> None:
    """Note that the order of steps is unknown, unless the user says that it is chronological."""
    if options.ordered:
        reading.assumed["step_order"] = "rows are in time order, as given by --ordered"
    else:
        reading.unknown["step_order"] = (
            f"the order of steps: {why} (if rows are in time order, pass --ordered)"
        )


def sampling(steps: Int64, notes: list[str]) -> int:
    """The interval at which steps were sampled; 1 if none. Adds a note if not all steps are there."""
    gaps = np.diff(steps)
    # Some records may be missing. If gaps are not multiples of the smallest, there was no interval.
    least = int(gaps.min()) if len(gaps) else 1
    interval = least if least <= MAX_LOAD and not (gaps % least).any() else 1
    if len(gaps) and gaps.max() > 1:
        every = f"every {interval}" if (gaps == interval).all() else f"{gaps.min()} to {gaps.max()} apart"
        notes.append(f"the source has only some of the steps, {every}")
    return interval


def whole_counts(values: Counts, where: str) -> Loads:
    """Counts of any number type as int32 of the same shape, or as int64 if one is above MAX_LOAD.

    Raises ValueError naming ``where``.
    """
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{where}: token counts of type {values.dtype}")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: a count is NaN or infinite")
        if (values != np.floor(values)).any():
            raise ValueError(f"{where}: a count is not a whole number, so these are not token counts")
    if values.size and values.min().item() < 0:
        raise ValueError(f"{where}: a negative count")
    largest = values.max().item() if values.size else 0
    if largest > MAX_COUNT:
        raise ValueError(f"{where}: a count above 2^53")
    if largest <= MAX_LOAD:
        return values.astype(np.int32)
    return values.astype(np.int64)


def plain_int(value: object, low: int, high: int) -> int | None:
    """The value if it is an int (not a bool) from ``low`` to ``high``, else None."""
    return value if type(value) is int and low <= value <= high else None


def count_experts(slots: Int32) -> int | None:
    """The number of logical experts in a placement, if it has each of them; else None."""
    experts = np.unique(slots[slots != EMPTY_SLOT])
    return len(experts) if len(experts) and np.array_equal(experts, np.arange(len(experts))) else None
