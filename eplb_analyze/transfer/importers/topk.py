"""The expert ids of each token (top-k): counted per step, layer and expert.

Files of ids, such as vLLM's ``routed_experts``, state which experts a token chose, but seldom which tokens
were in one forward pass. A file is read twice: for its extent, then to count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.text import listed, plural
from eplb_analyze.transfer.importers import topk_files
from eplb_analyze.transfer.importers.files import Array, by_rank, listing, rank_of, require_all_ranks
from eplb_analyze.transfer.importers.source import Chunk, Options, Reading, ordered_rows, sampling
from eplb_analyze.transfer.importers.table import zeros_on_disk
from eplb_analyze.transfer.importers.topk_blocks import Block, TokenFile
from eplb_dump.format.journal import Int64
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_LAYERS, MAX_LOAD, Scope

#: The values of ``--step-per``.
REQUEST, POSITION = "request", "position"
#: The most counts that are made at once.
MAX_COUNTS = 1 << 22
#: The most counts for each id, if there are more than MAX_COUNTS.
MAX_COUNTS_PER_ID = 1 << 12
PADDING = EMPTY_SLOT


def read(path: Path, options: Options) -> Reading:
    """One file, a file per layer, or a file per rank. Raises DumpError, UsageError."""
    files = _files(path, options)
    for file in files.values():
        _require_grouping(file, options)
    extents = {rank: _extent(file, options) for rank, file in files.items()}
    first_file, first = next(iter(files.values())), next(iter(extents.values()))
    for rank, extent in extents.items():
        if extent.layers != first.layers:
            raise DumpError(f"{files[rank].path}: its layers differ from those of {first_file.path.name}")
    width = options.num_logical_experts or 1 + max(extent.largest for extent in extents.values())
    notes: list[str] = []
    keep = _with_routing(list(extents.values()), path, notes)
    numbers = tuple(first.layers[i] for i in keep)
    local = None not in files
    counts = {rank: _Counts(file, extents[rank], options, width, keep) for rank, file in files.items()}
    reading = Reading(
        "topk", first_file.kind, [p for file in files.values() for p in file.files], False,
        Scope.LOCAL if local else Scope.GLOBAL,
        {rank or 0: each.chunks for rank, each in counts.items()},
        len(keep), width, num_logical_experts=width, notes=notes,
    )  # fmt: skip
    if local:
        reading.files_of = {rank: [file.path] for rank, file in files.items() if rank is not None}
    else:
        reading.token_replication = 1
    if first_file.numbered:
        reading.layers = numbers
    elif len(keep) < len(first.layers):
        reading.layers, reading.hidden_layers = numbers, len(first.layers)
    if first_file.left_out:
        notes.append(f"arrays or columns left out: {', '.join(first_file.left_out)[:200]}")
    if options.num_logical_experts is None:
        reading.assumed["experts"] = (
            f"the model has {width} experts: the largest id sets the number, because the source does not "
            f"state it (--num-experts)"
        )
    _describe_steps(reading, first_file, first, options)
    return reading


def _files(path: Path, options: Options) -> dict[int | None, TokenFile]:
    """The file of each rank, or the one file under None. Raises DumpError, UsageError."""
    if path.is_dir():
        paths = [p for p in listing(path, options.only) if p.suffix in topk_files.SUFFIXES]
        if not paths:
            raise DumpError(f"{path}: no file in it ends in {', '.join(topk_files.SUFFIXES)}")
        if all(topk_files.LAYER_FILE.search(p.name) and rank_of(p) is None for p in paths):
            return {None: topk_files.open_layers(paths, options.array)}
        if len(paths) > 1:
            return {r: topk_files.open_file(p, options.array) for r, p in by_rank(paths).items()}
        path = paths[0]
    require_all_ranks(path, options.ep_size)
    return {None: topk_files.open_file(path, options.array)}


# ---- which tokens are in a step


def _require_grouping(file: TokenFile, options: Options) -> None:
    """Raise UsageError unless it is known which tokens are in one step."""
    by_number, by_request = options.tokens_per_step is not None, options.step_per is not None
    if file.has_steps:
        if by_number or by_request:
            raise UsageError(
                f"{file.path}: it states the step of each token; remove --tokens-per-step and --step-per"
            )
    elif by_number and by_request:
        raise UsageError(f"{file.path}: pass either --tokens-per-step or --step-per")
    elif by_request and not file.has_requests:
        raise UsageError(
            f"{file.path}: it does not state the request of each token (an array or column named request), "
            f"which --step-per needs; pass --tokens-per-step N"
        )
    elif not by_number and not by_request:
        more = f", --step-per {REQUEST} or --step-per {POSITION}" if file.has_requests else ""
        raise UsageError(
            f"{file.path}: it does not state which tokens were in one step (an array or column named step); "
            f"pass --tokens-per-step N{more}"
        )


def _describe_steps(reading: Reading, file: TokenFile, extent: _Extent, options: Options) -> None:
    if file.has_steps:
        reading.interval = sampling(extent.steps, reading.notes)
        return
    reading.unknown["step_numbers"] = "the step numbers: steps are counted from 0"
    if options.step_per == POSITION:
        reading.assumed["steps"] = (
            "the n-th tokens of all requests form step n, as if all had started together, as given by "
            "--step-per position"
        )
        return
    reading.assumed["steps"] = (
        "the tokens of a request form a step, as given by --step-per request"
        if options.step_per == REQUEST
        else f"{plural(options.tokens_per_step or 0, 'token')} in a row form a step, as given by "
        f"--tokens-per-step"
    )
    if options.tokens_per_step is not None and extent.tokens % options.tokens_per_step:
        reading.notes.append(
            f"the last step has {plural(extent.tokens % options.tokens_per_step, 'token')}, which were left "
            f"over"
        )
    ordered_rows(reading, options, "the source does not state whether its tokens are in time order")


class _Grouping:
    """The step of each token, block by block, in one pass over a file."""

    def __init__(self, options: Options) -> None:
        self._per_step, self._per = options.tokens_per_step, options.step_per
        #: Tokens seen so far of these layers, and of each request in them.
        self.seen: dict[tuple[int, ...], int] = {}
        self._of_request: dict[tuple[int, ...], Int64] = {}

    def of(self, block: Block) -> Int64:
        n = len(block.ids)
        start = self.seen.get(block.layers, 0)
        self.seen[block.layers] = start + n
        if block.step is not None:
            return block.step
        if self._per_step is not None:
            return np.arange(start, start + n, dtype=np.int64) // self._per_step
        assert block.request is not None
        return block.request if self._per == REQUEST else self._positions(block.layers, block.request)

    def _positions(self, layers: tuple[int, ...], request: Int64) -> Int64:
        """How many tokens of the same request come before each."""
        order = np.argsort(request, kind="stable")
        sorted_ = request[order]
        begins = np.flatnonzero(np.diff(sorted_, prepend=-1))
        counts = np.diff(np.append(begins, len(sorted_)))
        before = self._of_request.get(layers, np.zeros(0, np.int64))
        before = np.pad(before, (0, max(0, int(sorted_[-1]) + 1 - len(before))))
        position = np.empty(len(request), np.int64)
        position[order] = np.arange(len(request)) - np.repeat(begins, counts) + before[sorted_]
        before[sorted_[begins]] += counts
        self._of_request[layers] = before
        return position


# ---- the first pass: what there is


@dataclass
class _Extent:
    """What the ids of a file span."""

    layers: tuple[int, ...]
    steps: Int64
    largest: int
    ids: int
    #: By layer: the largest id, and how many tokens have their first expert twice.
    highest: Int64
    repeated: Int64
    #: Of a layer.
    tokens: int
    #: Whether steps ascend and every block has all layers, so that one step after another can be counted.
    in_order: bool


def _extent(file: TokenFile, options: Options) -> _Extent:
    grouping = _Grouping(options)
    highest: dict[int, int] = {}
    repeated: dict[int, int] = {}
    steps: list[Int64] = []
    top_k = total = 0
    in_order, last = True, -1
    for block in file.blocks():
        start = grouping.seen.get(block.layers, 0)
        _require_ids(file, block, start, options.num_logical_experts)
        if top_k not in (0, block.ids.shape[2]):
            raise DumpError(f"{file.path}: {block.ids.shape[2]} experts per token, and before {top_k}")
        top_k = block.ids.shape[2]
        total += block.ids.size
        step = grouping.of(block)
        in_order &= bool(step[0] >= last and (np.diff(step) >= 0).all())
        last = int(step[-1])
        steps.append(np.unique(step))
        most_of, twice_in = block.ids.max(axis=0).max(axis=1).tolist(), _first_again(block.ids).tolist()
        for layer, most, twice in zip(block.layers, most_of, twice_in, strict=True):
            highest[layer] = max(most, highest.get(layer, PADDING))
            repeated[layer] = twice + repeated.get(layer, 0)
    if not steps:
        raise DumpError(f"{file.path}: it has no token")
    layers = tuple(sorted(highest))
    if len(layers) > MAX_LAYERS:
        raise DumpError(f"{file.path}: it has {len(layers):,} layers, more than any model")
    counts = set(grouping.seen.values())
    if len(counts) > 1 and not file.has_steps:
        fewest = min(grouping.seen, key=grouping.seen.__getitem__)
        raise DumpError(
            f"{file.path}: layer {fewest[0]} has {min(counts):,} tokens, but another layer has "
            f"{max(counts):,}, so a token cannot be matched over layers"
        )
    return _Extent(
        layers, np.unique(np.concatenate(steps)), max(highest.values()), total,
        np.array([highest[n] for n in layers]), np.array([repeated[n] for n in layers]), max(counts),
        in_order and list(grouping.seen) == [layers],
    )  # fmt: skip


def _first_again(ids: Array) -> Int64:
    """By layer, how many tokens have their first expert twice, of ids ``[tokens, layers, top-k]``."""
    first = ids[:, :, 0]
    again = np.zeros(first.shape, bool)
    for k in range(1, ids.shape[2]):  # numpy is slow along a short last axis
        again |= ids[:, :, k] == first
    again &= first != PADDING
    counts: Int64 = again.sum(axis=0)
    return counts


def _require_ids(file: TokenFile, block: Block, start: int, experts: int | None) -> None:
    limit = experts or MAX_EXPERTS
    if block.ids.min() >= PADDING and block.ids.max() < limit:
        return
    token, layer, place = np.argwhere((block.ids < PADDING) | (block.ids >= limit))[0].tolist()
    odd = block.ids[token, layer, place].item()
    where = f"{file.path}: token {start + token}, layer {block.layers[layer]}: expert id {odd}"
    if odd < PADDING:
        raise DumpError(f"{where}; ids are 0 or more, or -1 for padding")
    if experts is not None:
        raise DumpError(f"{where}, but there are {experts} experts (--num-experts)")
    raise DumpError(f"{where} is more than any model has; if these are not expert ids, choose with --array")


def _with_routing(extents: list[_Extent], path: Path, notes: list[str]) -> list[int]:
    """The indices of layers whose tokens chose experts. An engine writes zeros for a dense layer."""
    layers = extents[0].layers
    highest = np.max([extent.highest for extent in extents], axis=0)
    repeated = np.sum([extent.repeated for extent in extents], axis=0)
    empty = (highest == PADDING) | ((highest == 0) & (repeated > 0))
    if empty.all():
        raise DumpError(f"{path}: all expert ids are 0 or padding, so the engine did not write its routing")
    keep = np.flatnonzero(~empty).tolist()
    if empty.any():
        left = [layers[i] for i in np.flatnonzero(empty)]
        notes.append(
            f"{plural(len(left), 'layer')} left out, because all ids are 0 or padding (probably dense): "
            f"{listed(left)}; the others keep their numbers"
        )
    twice = [layers[i] for i in keep if repeated[i]]
    if twice:
        notes.append(
            f"in layer {listed(twice)}, tokens have an expert twice, which no router does; if these ids are "
            f"padding, write -1 instead"
        )
    zero = [layers[i] for i in keep if highest[i] == 0]
    if zero and len(zero) < len(keep):
        notes.append(f"in layer {listed(zero)}, all tokens chose expert 0; it may be a dense layer")
    return keep


# ---- the second pass: counts


class _Counts:
    """Counts a file's tokens by step, layer and expert."""

    def __init__(
        self, file: TokenFile, extent: _Extent, options: Options, width: int, keep: list[int]
    ) -> None:
        self._file, self._extent, self._options, self._width = file, extent, options, width
        self._keep = keep
        cells = len(extent.steps) * len(extent.layers) * width
        if cells > max(MAX_COUNTS, MAX_COUNTS_PER_ID * extent.ids):
            raise DumpError(
                f"{file.path}: its {extent.ids:,} expert ids mean {cells:,} counts ({len(extent.steps):,} "
                f"steps, {width:,} experts); if the largest id is wrong, pass --num-experts"
            )
        self._whole = None if extent.in_order else self._count_all()

    def chunks(self) -> Iterator[Chunk]:
        """Steps in ascending order."""
        parts = self._parts() if self._whole is None else self._slices(*self._whole)
        for step, load, tokens in parts:
            # A token can be padding in some layers only.
            yield Chunk(step, load[:, self._keep], num_tokens=tokens.max(axis=1).astype(np.int64))

    def _parts(self) -> Iterator[tuple[Int64, Int64, Int64]]:
        """One step after another: the last step of a block can go on in the next block."""
        held: tuple[Int64, Int64, Int64] | None = None
        for _, step, load, tokens in self._blocks():
            if held is not None:
                if held[0][0] == step[0]:
                    load[0] += held[1][0]
                    tokens[0] += held[2][0]
                else:
                    yield held
            if len(step) > 1:
                yield step[:-1], load[:-1], tokens[:-1]
            held = step[-1:], load[-1:], tokens[-1:]
        if held is not None:
            yield held

    def _count_all(self) -> tuple[Int64, Int64]:
        """All steps at once, in a temporary file."""
        extent = self._extent
        shape = len(extent.steps), len(extent.layers), self._width
        counts = zeros_on_disk(
            self._file.path, shape, np.int32 if extent.ids <= MAX_LOAD else np.int64, "count it"
        )
        all_tokens = zeros_on_disk(self._file.path, shape[:2], counts.dtype, "count it")
        for layers, step, load, tokens in self._blocks():
            at = np.ix_(np.searchsorted(extent.steps, step), np.searchsorted(extent.layers, layers))
            counts[at] += load
            all_tokens[at] += tokens
        return counts, all_tokens

    def _slices(self, counts: Int64, tokens: Int64) -> Iterator[tuple[Int64, Int64, Int64]]:
        for low in range(0, len(tokens), 64):
            part = slice(low, low + 64)
            yield self._extent.steps[part], counts[part], tokens[part]

    def _blocks(self) -> Iterator[tuple[tuple[int, ...], Int64, Int64, Int64]]:
        """Layers, ascending steps, counts ``[steps, layers, experts]`` and tokens ``[steps, layers]``."""
        grouping = _Grouping(self._options)
        for block in self._file.blocks():
            step, ids = grouping.of(block), block.ids
            if (np.diff(step) < 0).any():
                order = np.argsort(step, kind="stable")
                step, ids = step[order], ids[order]
            found, starts = np.unique(step, return_index=True)
            starts = np.append(starts, len(step))
            most = max(1, MAX_COUNTS // (len(block.layers) * (self._width + 1)))
            for low in range(0, len(found), most):
                high = min(low + most, len(found))
                part = slice(starts[low], starts[high])
                row = np.searchsorted(found[low:high], step[part])
                yield block.layers, found[low:high], *self._count(ids[part], row, high - low)

    def _count(self, ids: Array, row: Int64, rows: int) -> tuple[Int64, Int64]:
        """Counts and tokens of ``rows`` steps, from ids ``[tokens, layers, top-k]`` and each token's row."""
        layers, wide = ids.shape[1], self._width + 1
        of_layer = row[:, None] * layers + np.arange(layers)
        # Padding counts as one more expert, the first.
        cell = ids.astype(np.int64)
        cell += (of_layer * wide + 1)[:, :, None]
        counts = np.bincount(cell.ravel(), minlength=rows * layers * wide)
        routed = ids[:, :, 0] != PADDING
        for k in range(1, ids.shape[2]):
            routed |= ids[:, :, k] != PADDING
        tokens = np.bincount(of_layer[routed], minlength=rows * layers)
        return counts.reshape(rows, layers, wide)[:, :, 1:], tokens.reshape(rows, layers)
