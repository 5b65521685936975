"""vLLM's JSON lines: snapshots of expert loads, and the load statistics of vLLM PR 41141 in two revisions.

Both have loads by slot, summed over the ranks, with the placement at that time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.sessions.step_range import NO_END
from eplb_analyze.text import plural
from eplb_analyze.transfer.importers.files import integers, json_lines, listing, one_of
from eplb_analyze.transfer.importers.source import (
    Chunk,
    Counts,
    Options,
    Reading,
    count_experts,
    plain_int,
    sampling,
)
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_LAYERS, Scope

SYSTEM = "vLLM"
STATS, META = "eplb_load_stats", "eplb_load_meta"
SNAPSHOT_KEYS = {"latest_expert_load", "window_expert_load"}


def is_stats(record: dict[str, Any]) -> bool:
    return record.get("record_type") in (STATS, META)


def is_snapshot(record: dict[str, Any]) -> bool:
    return bool(SNAPSHOT_KEYS & set(record)) and "step" in record


def read(path: Path, options: Options) -> Reading:
    """Read a file twice: first for its shape, then to write it. Raises DumpError, UsageError."""
    if path.is_dir():
        path = one_of(listing(path, options.only or "*.jsonl"), "files")
    first = next(json_lines(path), None)
    if first is None:
        raise DumpError(f"{path}: it is empty")
    if is_stats(first[1]):
        return _Stats(path, options).reading()
    if is_snapshot(first[1]):
        return _Snapshots(path, options).reading()
    raise DumpError(f"{first[0]}: neither a load snapshot nor {STATS} of vLLM PR 41141")


class _Lines:
    """The part that both formats share: order and repetition of records, placements, shapes."""

    kind: str

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        self.notes: list[str] = []
        self.unknown: dict[str, str] = {}
        self.assumed: dict[str, str] = {}
        self.model: str | None = None
        self.num_logical_experts: int | None = None
        #: A note on data in the records that is not imported.
        self.beside: str | None = None
        self._lists: Any = None
        self._array: Int32 | None = None

    def record(self, where: str, record: dict[str, Any]) -> tuple[int, Counts, Int32, int | None] | None:
        """``(step, load, placement, ep_size)`` of a line; None if it has no load."""
        raise NotImplementedError

    def array(self, record: dict[str, Any], key: str, where: str) -> Counts:
        array = integers(record.get(key), 2, f"{where}: {key}")
        if array.shape[0] > MAX_LAYERS or array.shape[1] > MAX_EXPERTS:
            raise DumpError(f"{where}: {key} has the shape {array.shape}")
        return array

    def placement(self, record: dict[str, Any], key: str, shape: tuple[int, ...], where: str) -> Int32:
        """A record's placement. Equal lists give the same array, as most records repeat the last one."""
        if record.get(key) != self._lists or self._array is None:
            slots = self.array(record, key, where)
            if slots.min() < EMPTY_SLOT or slots.max() >= MAX_EXPERTS:
                raise DumpError(f"{where}: {key} contains an invalid expert number")
            self._lists, self._array = record.get(key), slots.astype(np.int32)
        if self._array.shape != shape:
            raise DumpError(f"{where}: {key} does not have the shape of the load")
        return self._array

    def experts(self, number: object, slots: Int32, where: str) -> None:
        """Check the number of logical experts, which must be the same in all records."""
        stated = plain_int(number, 1, MAX_EXPERTS)
        if stated is None and self.num_logical_experts is None:
            stated = count_experts(slots)
            if stated is None:
                raise UsageError(f"{where}: its map does not contain every expert; pass --num-experts")
        if stated is not None and self.num_logical_experts not in (None, stated):
            raise DumpError(
                f"{where}: it states {stated} experts, but earlier records state {self.num_logical_experts}"
            )
        self.num_logical_experts = self.num_logical_experts or stated
        assert self.num_logical_experts is not None
        if slots.max() >= self.num_logical_experts:
            raise DumpError(
                f"{where}: its map contains an expert beyond the {self.num_logical_experts} that exist"
            )

    def chunks(self) -> Iterator[Chunk]:
        """The records in chunks with one placement each, each step once and in order. Raises DumpError."""
        seen: dict[int, int] = {}
        held: list[tuple[int, Counts, Int32, int | None]] = []
        repeated = others = count = 0
        last = -1
        cut: list[str] = []
        for where, line in json_lines(self.path, cut):
            found = self.record(where, line)
            if found is None:
                others += not is_stats(line)
                continue
            step, load, slots, ep_size = found
            if self.options.renumber:
                step = count
            count += 1
            digest = zlib.crc32(np.ascontiguousarray(load, np.int64).data.cast("B"))
            if step in seen and seen[step] == digest:
                # Several ranks appended the same sums to one file.
                repeated += 1
                continue
            if step in seen or step < last:
                what = (
                    f"step {step} again, with a different load"
                    if step in seen
                    else f"step {step} after {last}"
                )
                raise UsageError(
                    f"{where}: {what}: the step numbers restart, or two engines wrote into one file; "
                    f"split the file, or pass --renumber to count records in file order"
                )
            seen[step], last = digest, step
            if held and (
                len(held) >= 64 or held[-1][2] is not slots or held[-1][3] != ep_size
                or held[-1][1].shape != load.shape
            ):  # fmt: skip
                yield self._chunk(held)
                held = []
            held.append((step, load, slots, ep_size))
        if held:
            yield self._chunk(held)
        self.notes = cut if self.beside is None else [self.beside, *cut]
        if repeated:
            self.notes.append(
                f"{plural(repeated, 'record')} left out, because they repeat a step with the same load"
            )
        if others:
            self.notes.append(f"{plural(others, 'record')} of other kinds left out")

    @staticmethod
    def _chunk(held: list[tuple[int, Counts, Int32, int | None]]) -> Chunk:
        steps, loads, slots, ep_sizes = zip(*held, strict=True)
        return Chunk(np.array(steps, np.int64), np.stack(loads), slots[0], ep_sizes[0])

    def reading(self) -> Reading:
        steps: list[int] = []
        shape: tuple[int, ...] = ()
        ep_size, moved = None, False
        before: Int32 | None = None
        for chunk in self.chunks():
            if shape and chunk.load.shape[1] != shape[0]:
                raise DumpError(f"{self.path}: its records have different numbers of layers")
            steps += chunk.step.tolist()
            shape, ep_size = chunk.load.shape[1:], chunk.ep_size
            moved |= before is not None and before is not chunk.placement
            before = chunk.placement
        if not steps:
            raise DumpError(f"{self.path}: none of its records has a load")
        if moved:
            self.unknown["placement_steps"] = (
                "at which step a placement changed; it applies from the first record that has it"
            )
        if self.options.renumber:
            self.unknown["step_numbers"] = "the step numbers: records are counted from 0 (--renumber)"
        interval = sampling(np.array(steps, np.int64), self.notes)
        return Reading(
            SYSTEM, self.kind, [self.path], True, Scope.GLOBAL, {0: self.chunks}, shape[0], shape[1],
            ep_size=ep_size, model=self.model, num_logical_experts=self.num_logical_experts, placed=True,
            interval=interval, unknown=self.unknown, assumed=self.assumed, notes=self.notes,
        )  # fmt: skip


class _Snapshots(_Lines):
    kind = "expert load snapshots"

    def record(self, where: str, record: dict[str, Any]) -> tuple[int, Counts, Int32, int | None]:
        step = plain_int(record.get("step"), 0, NO_END)
        if step is None:
            raise DumpError(f"{where}: it has no step")
        key = "window_expert_load" if self.options.window else "latest_expert_load"
        load = self.array(record, key, where)
        for name, value in (("num_moe_layers", load.shape[0]), ("num_physical_experts", load.shape[1])):
            if record.get(name, value) != value:
                raise DumpError(f"{where}: {name} is {record[name]!r:.40}, but {key} has {value}")
        slots = self.placement(record, "physical_to_logical_map", load.shape, where)
        self.experts(record.get("num_logical_experts"), slots, where)
        model = record.get("model_name")
        self.model = model if isinstance(model, str) and model else self.model
        size = plain_int(record.get("window_size"), 1, NO_END) or "an unknown number of"
        if self.options.window:
            self.assumed["passes"] = (
                f"each step is the sum over a window of {size} forward passes (--window-sums)"
            )
        elif "window_expert_load" in record:
            self.beside = (
                f"sums over {size} forward passes, recorded with each step's load, were left out; "
                "--window-sums imports them instead"
            )
        return step, load, slots, plain_int(record.get("world_size"), 1, MAX_EXPERTS)


class _Stats(_Lines):
    kind = "load statistics (PR 41141)"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        self._meta: dict[str, Any] = {}

    def record(self, where: str, record: dict[str, Any]) -> tuple[int, Counts, Int32, int | None] | None:
        if record.get("record_type") == META:
            if self._meta not in ({}, record):
                raise DumpError(
                    f"{where}: its {META} differs from the earlier one, so the file is from two engine "
                    f"starts; split it"
                )
            self._meta = record
            name = record.get("model")
            self.model = name if isinstance(name, str) and name else None
            return None
        if record.get("record_type") != STATS:
            return None
        step = plain_int(record.get("step"), 0, NO_END)
        if step is None or record.get("version") != 1:
            raise DumpError(f"{where}: it has no step, or its version is not 1")
        load = self.array(record, "expert_load", where)
        slots = self.placement(record, "p2l_map", load.shape, where)
        both = {**self._meta, **record}
        if both.get("num_layers", load.shape[0]) != load.shape[0]:
            raise DumpError(
                f"{where}: num_layers is {both['num_layers']!r:.40}, but expert_load has {load.shape[0]}"
            )
        redundant = plain_int(both.get("num_redundant_experts"), 0, load.shape[1] - 1)
        self.experts(None if redundant is None else load.shape[1] - redundant, slots, where)
        ep_size = plain_int(both.get("num_ranks"), 1, MAX_EXPERTS)
        if "tokens" in record and ep_size is not None:
            tokens = self.array(record, "tokens", where)
            even = load.shape[1] % ep_size == 0
            if not even or not np.array_equal(load.reshape(len(load), ep_size, -1).sum(axis=2), tokens):
                raise DumpError(f"{where}: tokens per rank are not the sums of expert_load")
        return step, load, slots, ep_size
