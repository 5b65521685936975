"""SGLang's expert distribution recorder: files of the modes stat, stat_approx, per_pass and per_token.

Source: sglang/srt/eplb/expert_distribution.py of SGLang 0.5.23.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.text import listed, plural
from eplb_analyze.transfer.importers import torch_files
from eplb_analyze.transfer.importers.files import Array, depth_of, integers, listing, one_of, read_json
from eplb_analyze.transfer.importers.source import (
    LAST,
    Chunk,
    Options,
    Reading,
    count_experts,
    ordered_rows,
    plain_int,
    whole_counts,
)
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_LAYERS, Scope

SYSTEM = "SGLang"
MAP = "last_physical_to_logical_map"
#: ForwardMode's numbers in SGLang.
PHASES = {1: "prefill", 2: "decode", 3: "mixed", 4: "idle", 5: "verify", 6: "draft", 8: "prefill"}


def read(path: Path, options: Options) -> Reading:
    """A file, or a folder of the files of one recording. Raises DumpError, UsageError."""
    paths = listing(path, options.only or "*.pt") if path.is_dir() else [path]
    if paths[0].suffix == ".json":
        return _stat(one_of(paths, "files"), read_json(paths[0]), options)
    documents = [(p, torch_files.load(p)) for p in paths]
    for p, document in documents:
        if not isinstance(document, dict) or not {"records", "logical_count"} & set(document):
            raise DumpError(
                f"{p}: it is not from SGLang's recorder: it has neither 'records' nor 'logical_count'"
            )
    if all("records" in document for _, document in documents):
        return _per_pass(documents, options)
    return _stat(one_of(paths, "files"), documents[0][1], options)


def _with_tokens(total: Array, where: str, notes: list[str]) -> Array:
    """Indices of the hidden layers with tokens; the others are dense or in another pipeline stage."""
    layers = np.flatnonzero(total)
    if not len(layers):
        raise DumpError(f"{where}: no layer has a token")
    if len(layers) < len(total):
        left = np.flatnonzero(total == 0).tolist()
        notes.append(
            f"{plural(len(left), 'layer')} without tokens left out (they are probably dense): "
            f"{listed(left)}; the others keep their numbers"
        )
    return layers


# ---- stat, stat_approx: sums over ranks, by logical expert


def _stat(path: Path, document: dict[str, Any], options: Options) -> Reading:
    value = document.get("logical_count")
    if torch_files.is_tensor(value):
        counts = torch_files.Arrays(path).of(value, (2, 3), "logical_count")
    else:
        counts = integers(value, 3 if depth_of(value) == 3 else 2, f"{path}: logical_count")
    rows = counts if counts.ndim == 3 else counts[None]
    if rows.shape[1] > MAX_LAYERS or rows.shape[2] > MAX_EXPERTS:
        raise DumpError(f"{path}: logical_count claims {rows.shape[1]} layers of {rows.shape[2]} experts")
    notes: list[str] = []
    layers = _with_tokens((rows != 0).any(axis=(0, 2)), str(path), notes)
    step = np.arange(len(rows), dtype=np.int64)
    empty = np.flatnonzero(~(rows != 0).any(axis=(1, 2)))
    if len(empty) and not options.ordered:
        # Unused rows of a ring buffer are not passes.
        notes.append(
            f"{plural(len(empty), 'row')} without tokens left out: they are unused rows of the ring "
            f"buffer, or idle passes"
        )
        step = np.setdiff1d(step, empty)

    def chunks() -> Iterator[Chunk]:
        for low in range(0, len(step), 256):
            chosen = step[low : low + 256]
            yield Chunk(chosen, rows[chosen][:, layers])

    recorder = "rank" in document
    reading = Reading(
        SYSTEM, "stat" if recorder else "logical_count", [path], False, Scope.GLOBAL, {0: chunks},
        len(layers), rows.shape[2], num_logical_experts=rows.shape[2],
        layers=tuple(layers.tolist()), hidden_layers=rows.shape[1], notes=notes,
    )  # fmt: skip
    if not recorder or counts.ndim == 2:
        reading.unknown["passes"] = "how many forward passes each row sums up"
    if len(rows) > 1:
        ordered_rows(reading, options, "rows of a ring buffer are not in time order")
    reading.unknown["step_numbers"] = "the step numbers: rows are counted from 0"
    return reading


# ---- per_pass, per_token: one file per rank, by slot


class _RankFile:
    """The records of one rank: ``step`` [n] and, for each step, the counts to add up."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        records = document["records"]
        if not isinstance(records, list) or not records:
            raise DumpError(f"{path}: it has no records")
        arrays = torch_files.Arrays(path)
        slots = arrays.of(document.get(MAP), (2,), MAP)
        if slots.dtype.kind not in "iu" or slots.min() < EMPTY_SLOT or slots.max() >= MAX_EXPERTS:
            raise DumpError(f"{path}: its {MAP} contains invalid expert numbers")
        self.slots: Int32 = slots.astype(np.int32)
        self.counts: dict[int, list[Array]] = {}
        self.tokens: dict[int, int] = {}
        self.phase: dict[int, str | None] = {}
        self.per_token = False
        seen: set[tuple[int, object]] = set()
        ranks = set()
        for number, record in enumerate(records):
            where = f"record {number}"
            if not isinstance(record, dict):
                raise DumpError(f"{path}: {where} is not a record")
            step = plain_int(record.get("forward_pass_id"), 0, NO_END)
            rank = plain_int(record.get("rank"), 0, MAX_EXPERTS)
            if step is None or rank is None:
                raise DumpError(f"{path}: {where} has no forward_pass_id or no rank")
            # With two-batch overlap, a pass has several records, each with some of its tokens.
            gatherer = record.get("gatherer_key")
            if not (gatherer is None or isinstance(gatherer, str)):
                raise DumpError(f"{path}: {where}: its gatherer_key is not a text")
            key = (step, gatherer)
            if key in seen:
                raise DumpError(f"{path}: {where} repeats forward pass {step} of gatherer {gatherer!r:.40}")
            seen.add(key)
            ranks.add(rank)
            array = arrays.of(record.get("global_physical_count"), (2,), f"{where}: global_physical_count")
            if array.shape != self.slots.shape:
                raise DumpError(f"{path}: {where} has counts whose shape differs from the map's")
            self.counts.setdefault(step, []).append(array)
            if isinstance(record.get("input_ids"), list):  # mode per_token
                self.per_token = True
                self.tokens[step] = self.tokens.get(step, 0) + len(record["input_ids"])
                self.phase[step] = PHASES.get(plain_int(record.get("forward_mode"), 0, 99) or 0)
        if len(ranks) > 1:
            raise DumpError(f"{path}: it has records from several ranks: {sorted(ranks)}")
        self.rank = ranks.pop()
        self.step = np.array(sorted(self.counts), np.int64)

    def chunks(self, layers: Array, placement_from: int) -> Iterator[Chunk]:
        placed = int(np.searchsorted(self.step, placement_from))
        edges = sorted({0, *range(0, len(self.step), 64), placed, len(self.step)})
        for low, high in itertools.pairwise(edges):
            steps = self.step[low:high]
            load = np.stack([self._load(int(step), layers) for step in steps])
            yield Chunk(
                steps, load, self.slots[layers] if low >= placed else None,
                num_tokens=np.array([self.tokens.get(int(s), -1) for s in steps], np.int64),
                phase=tuple(self.phase.get(int(s)) for s in steps),
            )  # fmt: skip

    def _load(self, step: int, layers: Array) -> Int64:
        """Counts of one pass ``[layers, slots]``. Each part is checked, as errors could cancel in the sum."""
        try:
            parts = [whole_counts(a[layers], f"{self.path}: forward pass {step}") for a in self.counts[step]]
        except ValueError as error:
            raise DumpError(str(error)) from None
        total: Int64 = np.sum(parts, axis=0, dtype=np.int64)
        return total


def _per_pass(documents: list[tuple[Path, dict[str, Any]]], options: Options) -> Reading:
    files: dict[int, _RankFile] = {}
    for path, document in documents:
        file = _RankFile(path, document)
        if file.rank in files:
            raise UsageError(
                f"{path.parent}: rank {file.rank} has several files ({files[file.rank].path.name}, "
                f"{path.name}), from different recordings; choose with --only 'PATTERN'"
            )
        files[file.rank] = file
    first = next(iter(files.values()))
    for file in files.values():
        if file.slots.shape != first.slots.shape:
            raise DumpError(f"{file.path}: its shape differs from that of {first.path.name}")
        if not np.array_equal(file.slots, first.slots):
            raise DumpError(
                f"{file.path}: its last placement differs from that of {first.path.name}: the files are "
                f"from two recordings, or were dumped at different times"
            )
    if first.slots.shape[0] > MAX_LAYERS or first.slots.shape[1] > MAX_EXPERTS:
        raise DumpError(f"{first.path}: it claims {first.slots.shape} layers and slots")
    notes: list[str] = []
    arrays = [a for file in files.values() for parts in file.counts.values() for a in parts]
    layers = _with_tokens(sum((a != 0).any(axis=1) for a in arrays), str(first.path.parent), notes)
    last = max(int(file.step[-1]) for file in files.values())
    throughout = options.placement == LAST
    since = 0 if throughout else last

    def part(file: _RankFile) -> Callable[[], Iterator[Chunk]]:
        return lambda: file.chunks(layers, since)

    reading = Reading(
        SYSTEM, "per_token" if first.per_token else "per_pass", [file.path for file in files.values()],
        True, Scope.LOCAL, {rank: part(file) for rank, file in sorted(files.items())},
        len(layers), first.slots.shape[1],
        layers=tuple(layers.tolist()), hidden_layers=len(first.slots), placed=True,
        files_of={rank: [file.path] for rank, file in files.items()}, notes=notes,
    )  # fmt: skip
    reading.num_logical_experts = _experts_of(first.slots[layers], first.path)
    if throughout:
        reading.assumed["placement"] = (
            "the last placement was in force in all steps, as given by --placement last"
        )
    elif len({int(s) for file in files.values() for s in file.step}) > 1:
        reading.assumed["placement"] = "the last placement was in force in the last step"
        reading.unknown["earlier_placements"] = (
            "which expert was in which slot before the last step: the file has only the last placement "
            "(if it never changed, pass --placement last)"
        )
    if len(files) > 1 and _only_received(files, layers):
        reading.unknown["token_source"] = (
            "which rank the tokens came from: each rank counted the tokens that it received, so `traffic` "
            "cannot use the run"
        )
    return reading


def _experts_of(slots: Int32, path: Path) -> int:
    experts = count_experts(slots)
    if experts is None:
        raise DumpError(f"{path}: its {MAP} lacks experts, or contains invalid expert numbers")
    return experts


def _only_received(files: dict[int, _RankFile], layers: Array) -> bool:
    """Whether each rank has tokens only on its own range of slots, apart from all others'."""
    spans = []
    for file in files.values():
        used = np.zeros(file.slots.shape[1], bool)
        for parts in file.counts.values():
            for array in parts:
                used |= (array[layers] != 0).any(axis=0)
        slots = np.flatnonzero(used)
        if len(slots):
            spans.append((int(slots[0]), int(slots[-1])))
    spans.sort()
    return len(spans) > 1 and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
