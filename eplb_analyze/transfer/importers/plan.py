"""Combine a reading and the user's options into a plan of the run; UsageError names what is missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.policies.policy import INITIAL
from eplb_analyze.text import listed
from eplb_analyze.transfer.importers.placement_files import PlacementFile, read_placement
from eplb_analyze.transfer.importers.source import (
    LAST,
    MAX_COUNT,
    UNKNOWN,
    UNKNOWN_ROW,
    Chunk,
    Counts,
    Options,
    Reading,
    count_experts,
    whole_counts,
)
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Loads
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, Scope

UNKNOWN_MODEL = "unknown"
EXAMPLE = (
    "pass --placement linear if expert e is in slot e, --placement round_robin if it is on rank e % EP "
    "size, or an engine's placement file"
)


@frozen
class Plan:
    """What to write. Everything is known, or stated as unknown."""

    reading: Reading
    model: str
    ep_size: int
    num_logical_experts: int
    num_physical_experts: int
    token_replication: int
    layers: tuple[int, ...] | None
    #: The chunks of each rank, with checked loads: int32 or int64 ``[n, layers, num_physical_experts]``.
    parts: dict[int, Callable[[], Iterator[Chunk]]]


def make_plan(reading: Reading, options: Options) -> Plan:
    """Raises UsageError if something necessary is not known, DumpError if source and options contradict."""
    where = reading.files[0] if len(reading.files) == 1 else reading.files[0].parent
    layers = _layers(reading, options, where)
    # Most sources need both, so one error asks for both.
    wants_placement = reading.by_slot is not True and options.placement is None
    ep_size = _ep_size(reading, options, where, wants_placement)
    if wants_placement:
        raise UsageError(f"{where}: {_why_placement(reading)}")
    placement = _placement(reading, options, ep_size, where)
    experts = _experts(reading, options, placement, where)
    if reading.scope is Scope.LOCAL:
        _all_ranks(reading, ep_size, where)
        _replicated(reading, options, where)
    width = reading.width if placement is None else placement.shape[1]
    if width % ep_size or width > MAX_EXPERTS:
        raise UsageError(
            f"{where}: {width} slots cannot be divided evenly among {ep_size} ranks; see --ep-size, "
            f"--placement, --num-experts"
        )
    replication = _token_replication(reading, options, where)
    if replication is None:
        reading.unknown["token_replication"] = (
            "whether tokens are counted several times; assumed: once (--token-replication)"
        )
    if not reading.timed:
        reading.unknown["times"] = "the clock times of the steps"
    if options.model is None and reading.model is None:
        reading.unknown["model"] = "the model's name (--model)"
    model = options.model or reading.model or UNKNOWN_MODEL
    try:
        model.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: {model[:40]!r} is not a valid model name (--model)") from None
    divide = reading.by_slot is False and placement is not None
    if divide and placement is not None:
        _note_division(reading, placement)

    def part(chunks: Callable[[], Iterator[Chunk]]) -> Callable[[], Iterator[Chunk]]:
        return lambda: (_convert(c, placement, divide, ep_size, experts, layers, where) for c in chunks())

    return Plan(
        reading,
        model,
        ep_size,
        experts,
        width,
        replication or 1,
        layers,
        {rank: part(chunks) for rank, chunks in reading.parts.items()},
    )


def _token_replication(reading: Reading, options: Options, where: Path) -> int | None:
    stated, given = reading.token_replication, options.token_replication
    if stated is not None and given not in (None, stated):
        raise UsageError(
            f"{where}: the source states a token replication of {stated}; remove --token-replication"
        )
    return stated or given


def _layers(reading: Reading, options: Options, where: Path) -> tuple[int, ...] | None:
    if options.layers is None:
        if reading.layers is None:
            reading.unknown["layer_numbers"] = (
                "the model's layer numbers; layers are counted from 0 (--layers)"
            )
        return reading.layers
    if reading.layers is not None and reading.layers != options.layers:
        raise UsageError(f"{where}: the source states its layer numbers; remove --layers")
    if len(options.layers) != reading.num_layers:
        raise UsageError(
            f"{where}: --layers lists {len(options.layers)} layers, but the source has {reading.num_layers}"
        )
    return options.layers


def _ep_size(reading: Reading, options: Options, where: Path, wants_placement: bool) -> int:
    if reading.ep_size is not None:
        if options.ep_size not in (None, reading.ep_size):
            raise UsageError(
                f"{where}: the source has {reading.ep_size} EP ranks, not {options.ep_size} (--ep-size)"
            )
        return reading.ep_size
    if options.ep_size is not None:
        return options.ep_size
    if reading.scope is Scope.LOCAL:
        ranks = sorted(reading.parts)
        seen = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = f"{where}: it does not state the number of EP ranks (it has files of {seen})"
        text += "; pass --ep-size"
    else:
        text = f"{where}: it does not state the number of EP ranks; pass --ep-size"
        text += " (1 if you need only experts, not ranks)" if reading.by_slot is False else ""
    raise UsageError(text + (f"; also, {_why_placement(reading)}" if wants_placement else ""))


def _why_placement(reading: Reading) -> str:
    if reading.by_slot is None:
        return (
            f"it does not state whether its {reading.width} counts are per expert or per slot, or where "
            f"the experts were: {EXAMPLE}; if you do not know, pass --placement unknown and --num-experts N"
        )
    return f"it has counts per expert and does not state the rank of each expert: {EXAMPLE}"


def _placement(reading: Reading, options: Options, ep_size: int, where: Path) -> Int32 | None:
    """int32 ``[layers, num_physical_experts]`` for all steps; None: the chunks have it, or it is unknown."""
    choice = options.placement
    if choice == LAST:
        if reading.kind not in ("per_pass", "per_token"):
            raise UsageError(f"{where}: --placement last is for SGLang's modes per_pass and per_token")
        return None
    if reading.placed and choice == UNKNOWN:
        raise UsageError(f"{where}: the source has its own placements; remove --placement")
    if choice is None or choice == UNKNOWN:
        if reading.by_slot is False:
            raise UsageError(
                f"{where}: it has counts per expert, so the load of ranks is unknown without a placement: "
                f"{EXAMPLE}"
            )
        if not reading.placed:
            reading.unknown["placement"] = "which expert is in which slot (--placement)"
        return None
    if choice in INITIAL:
        description, row_of = INITIAL[choice]
        reading.assumed["placement"] = f"{description} in all steps, as given by --placement {choice}"
        experts = options.num_logical_experts or reading.num_logical_experts or reading.width
        row = row_of(min(experts, reading.width), reading.width, ep_size)
        return np.tile(row, (reading.num_layers, 1))
    if not Path(choice).exists():
        names = ", ".join([*INITIAL, LAST, UNKNOWN])
        raise UsageError(
            f"--placement {choice}: there is no such file; pass {names}, or a placement file that an "
            f"engine loads at startup"
        )
    file = read_placement(Path(choice), options.model or reading.model)
    slots = _rows(file, reading, options, Path(choice))
    if reading.by_slot is not False and slots.shape[1] != reading.width:
        raise DumpError(
            f"{choice}: it has {slots.shape[1]} slots per layer, but the loads have {reading.width}"
        )
    reading.assumed["placement"] = f"the placement in {Path(choice).name} is assumed for all steps"
    if len(slots) > len(file.slots):
        reading.assumed["placement"] += f"; its single row applies to all {len(slots)} layers"
    return slots


def _rows(file: PlacementFile, reading: Reading, options: Options, path: Path) -> Int32:
    """The file's rows for the layers that the source has."""
    numbers = reading.layers or options.layers
    if file.numbers is not None and numbers is not None:
        missing = sorted(set(numbers) - set(file.numbers))
        if missing:
            raise DumpError(f"{path}: it has no layer {missing[0]}, but the source has loads for it")
        return file.slots[[file.numbers.index(n) for n in numbers]]
    one = file.of_any_layer and len(file.slots) == 1
    if reading.hidden_layers is not None and reading.layers is not None and not one:
        if len(file.slots) != reading.hidden_layers:
            raise DumpError(
                f"{path}: it has {len(file.slots)} layers, but the loads have {reading.hidden_layers} "
                f"hidden layers, dense ones among them, so each row would apply to the wrong layer"
            )
        return file.slots[list(reading.layers)]
    if one:
        return np.repeat(file.slots, reading.num_layers, axis=0)
    if len(file.slots) != reading.num_layers:
        raise DumpError(f"{path}: it has {len(file.slots)} layers, but the loads have {reading.num_layers}")
    return file.slots


def _experts(reading: Reading, options: Options, placement: Int32 | None, where: Path) -> int:
    stated = reading.num_logical_experts
    if stated is None and placement is not None and options.num_logical_experts is None:
        stated = count_experts(placement)
        if stated is None:
            raise UsageError(f"{where}: the placement does not contain every expert; pass --num-experts")
    if stated is None:
        stated = options.num_logical_experts
    if stated is None:
        raise UsageError(
            f"{where}: it has counts for {reading.width} slots and does not state the number of experts; "
            f"pass --num-experts or --placement"
        )
    if options.num_logical_experts not in (None, stated):
        raise UsageError(
            f"{where}: the source has {stated} experts, not {options.num_logical_experts} (--num-experts)"
        )
    if placement is not None and placement.max() >= stated:
        raise DumpError(f"{where}: the placement names expert {placement.max()}, but there are {stated}")
    return stated


def _all_ranks(reading: Reading, ep_size: int, where: Path) -> None:
    missing = [rank for rank in range(ep_size) if rank not in reading.parts]
    beyond = [rank for rank in reading.parts if rank >= ep_size]
    if beyond:
        raise UsageError(
            f"{where}: it has a file for rank {beyond[0]}, so there are more than {ep_size} ranks (--ep-size)"
        )
    if missing:
        raise DumpError(
            f"{where}: rank {listed(missing)} (of {ep_size} ranks) has no file; each rank counted only "
            f"its own tokens, so no step would be complete"
        )


def _replicated(reading: Reading, options: Options, where: Path) -> None:
    """Raise UsageError if all ranks counted the same: their sum would count each token several times."""
    if options.token_replication is not None or len(reading.parts) < 2:
        return
    firsts = [next(chunks(), None) for chunks in reading.parts.values()]
    if any(chunk is None for chunk in firsts):
        return
    loads = [chunk.load for chunk in firsts if chunk is not None]
    same = all(a.shape == b.shape and np.array_equal(a, b) for a, b in itertools.pairwise(loads))
    if same and loads[0].any():
        raise UsageError(
            f"{where}: all {len(loads)} ranks have equal counts. If each rank counts all tokens (no "
            f"attention data parallelism), pass --token-replication {len(loads)}; otherwise pass "
            f"--token-replication 1"
        )


def _note_division(reading: Reading, placement: Int32) -> None:
    held = placement[placement != EMPTY_SLOT]
    if len(held) > reading.width * len(placement):
        reading.assumed["split"] = (
            "an expert's tokens are split evenly over its slots, in whole tokens, because the source has "
            "only their sum"
        )


def _convert(
    chunk: Chunk,
    placement: Int32 | None,
    divide: bool,
    ep_size: int,
    experts: int,
    layers: tuple[int, ...] | None,
    where: Path,
) -> Chunk:
    try:
        load = whole_counts(chunk.load, str(where))
    except ValueError as error:
        raise DumpError(f"{error}{_place(chunk, layers)}") from None
    slots = chunk.placement if placement is None else placement
    if chunk.placement is not None and placement is not None:
        # The source's own placement; one that a user names can only repeat it.
        slots = chunk.placement
        known = slots[:, 0] != UNKNOWN_ROW
        if slots.shape != placement.shape or not np.array_equal(slots[known], placement[known]):
            raise UsageError(
                f"{where}: the source has its own placements, and that of step {chunk.step[0]} differs "
                f"from --placement; remove --placement"
            )
    if divide:
        assert placement is not None
        load = split(load, placement, where)
    if slots is not None and slots.max() >= experts:
        raise DumpError(f"{where}: step {chunk.step[0]}: its placement names an expert beyond {experts}")
    size = ep_size if chunk.ep_size is None else chunk.ep_size
    if load.shape[2] % size:
        raise DumpError(
            f"{where}: step {chunk.step[0]}: {load.shape[2]} slots cannot be divided evenly among {size} "
            f"ranks"
        )
    return replace(chunk, load=load, placement=slots, ep_size=size)


def _place(chunk: Chunk, layers: tuple[int, ...] | None) -> str:
    """The position of the first value that is not a count, for a message."""
    values = chunk.load
    if values.dtype.kind not in "iuf":
        return ""
    with np.errstate(invalid="ignore"):
        odd = np.argwhere(~((values >= 0) & (values <= MAX_COUNT) & (values == np.floor(values))))
    if not len(odd):
        return ""
    row, layer, column = odd[0].tolist()
    return f" (step {chunk.step[row]}, layer {layer if layers is None else layers[layer]}, column {column})"


def split(load: Loads, placement: Int32, where: Path) -> Loads:
    """Split counts by expert evenly over the expert's slots; the first slots get the remainder.

    Args:
        load: int32 or int64 ``[n, layers, experts]``.
        placement: int32 ``[layers, num_physical_experts]``.

    Returns:
        The same type, ``[n, layers, num_physical_experts]``.

    Raises:
        DumpError: an expert with tokens has no slot.
    """
    n, layers, experts = load.shape
    out: Loads = np.zeros((n, layers, placement.shape[1]), load.dtype)
    for layer, slots in enumerate(placement):
        copies = np.bincount(slots[slots != EMPTY_SLOT], minlength=experts)
        unplaced = np.flatnonzero((copies == 0) & load[:, layer].any(axis=0))
        if len(unplaced):
            raise DumpError(f"{where}: expert {unplaced[0]} has tokens, but no slot in the placement")
        nth: Counts = np.zeros(experts, np.int64)
        for slot, expert in enumerate(slots.tolist()):
            if expert != EMPTY_SLOT:
                share, rest = np.divmod(load[:, layer, expert], copies[expert])
                out[:, layer, slot] = share + (nth[expert] < rest)
                nth[expert] += 1
    return out
