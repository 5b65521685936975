"""What an importer's reader returns, what a user can tell it, and how it asks; nothing is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import UsageError
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import MAX_LOAD, Scope

Counts = npt.NDArray[Any]

#: The values of ``--placement`` that are no file.
LINEAR, LAST, UNKNOWN = "linear", "last", "unknown"


class AskError(UsageError):
    """The source does not say something that must be known; the text names the option that does."""


@dataclass(frozen=True)
class Options:
    """What a user says of a source. None: nothing was said."""

    model: str | None = None
    ep_size: int | None = None
    #: ``linear``, ``last``, ``unknown``, or the path of a placement file.
    placement: str | None = None
    num_logical_experts: int | None = None
    token_replication: int | None = None
    #: The model's number of each layer of the source.
    layers: tuple[int, ...] | None = None
    #: The source's rows are in the order of time.
    ordered: bool = False
    #: Import sums over a window instead of single passes, where a source has both.
    window: bool = False
    #: Count records from 0 in their order, whatever step they name.
    renumber: bool = False
    #: Which files of a folder to take, a glob pattern of names.
    only: str | None = None
    #: Which array of a .npz file.
    array: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Some steps of one writer, in one placement and shape.

    ``load`` is as the source has it: ``[n, layers, width]`` of any number type, not checked yet.
    """

    step: Int64
    load: Counts
    #: ``[layers, num_physical_experts]`` in force in all these steps; None: not said.
    placement: Int32 | None = None
    #: Where the source says it for these steps.
    ep_size: int | None = None
    #: int64 ``[n]``, -1: not known.
    num_tokens: Int64 | None = None
    phase: tuple[str | None, ...] | None = None


@dataclass
class Reading:
    """A source, as far as it speaks for itself."""

    #: For instance ``SGLang``, and ``per_pass``.
    system: str
    kind: str
    files: list[Path]
    #: Whether ``load`` is by slot (physical expert) or by logical expert; None: it can be either.
    by_slot: bool | None
    scope: Scope
    #: By EP rank; with scope global only rank 0. Each can be iterated more than once.
    parts: dict[int, Callable[[], Iterator[Chunk]]]
    num_layers: int
    #: Slots or experts: the last axis of ``load``.
    width: int
    ep_size: int | None = None
    model: str | None = None
    num_logical_experts: int | None = None
    #: The model's number of each layer of ``load``, ascending; None: not said.
    layers: tuple[int, ...] | None = None
    #: Where ``layers`` are those with tokens of an axis over all hidden layers: that axis' length.
    hidden_layers: int | None = None
    #: Whether the chunks carry placements.
    placed: bool = False
    #: Every how many steps the source has one.
    interval: int = 1
    #: Which files each rank's part comes from, where parts have files of their own.
    files_of: dict[int, list[Path]] = field(default_factory=dict)
    #: Stable code to sentence: what the source does not say, what was taken for granted.
    unknown: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    #: What was left out, and what else to know.
    notes: list[str] = field(default_factory=list)


def ordered_rows(reading: Reading, options: Options, why: str) -> None:
    """Note that the order of steps is not known, unless the user says so."""
    if options.ordered:
        reading.assumed["step_order"] = "rows are in the order of time, as --ordered says"
    else:
        reading.unknown["step_order"] = f"the order of steps: {why} (--ordered says that it is that of time)"


def whole_counts(values: Counts, where: str) -> Int32:
    """Counts of any number type as int32 of the same shape. Raises ValueError naming ``where``."""
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{where}: token counts of type {values.dtype}")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: a count that is NaN or infinite")
        if (values != np.floor(values)).any():
            raise ValueError(f"{where}: a count that is no whole number, so these are no token counts")
    if values.size and values.min().item() < 0:
        raise ValueError(f"{where}: a negative count")
    if values.size and values.max().item() > MAX_LOAD:
        raise ValueError(f"{where}: a count above {MAX_LOAD:,}, which the format does not hold")
    return values.astype(np.int32)


def plain_int(value: object, low: int, high: int) -> int | None:
    """The value where it is an int (not a bool) from ``low`` to ``high``, else None."""
    return value if type(value) is int and low <= value <= high else None
