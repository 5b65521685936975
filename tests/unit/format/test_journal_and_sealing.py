"""Journals and sealing: equal content, verified pages, and no kill loses a row."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import (
    LAYERS,
    LOGICAL,
    SLOTS,
    Array,
    assert_equal_loads,
    journal_loads,
    load_of,
    manifest,
    map_of,
    open_writer,
    placement_rows,
    read_table,
    sealed_loads,
    session_info,
    step_status,
)
from kills import Killed, kill_before

from eplb_dump.format import frames, journal, segment
from eplb_dump.format.journal import (
    JournalAppender,
    JournalSegment,
    Shape,
    StepRows,
    UnbegunJournal,
    load_shape,
)
from eplb_dump.format.manifest import (
    ExpertSums,
    Manifest,
    ManifestFile,
    SealedSegment,
    StoredSums,
    close_manifest,
    rewrite_manifest,
)
from eplb_dump.format.schema import (
    EMPTY_SLOT,
    MANIFEST_FILE,
    METADATA_KEY,
    SCHEMAS,
    SEALED_TABLES,
    STATUS_LABELS,
    FormatError,
    Status,
    journal_name,
)
from eplb_dump.format.segment import footer_crc32, seal
from eplb_dump.format.session import SessionInfo


@dataclass(frozen=True)
class Batch:
    """Steps that one steps frame commits: recorded ones, one other, and changed placements."""

    first: int
    recorded: int
    dtype: type[np.integer[Any]] = np.uint16
    #: (step, layer, slots)
    placements: tuple[tuple[int, int, Array], ...] = ()

    @property
    def steps(self) -> list[int]:
        return list(range(self.first, self.first + self.recorded))

    def encode(self, ep_size: int = 2) -> list[bytes]:
        parts = [
            journal.placements_frame(
                np.array([step]), np.array([layer], np.int32), slots[None].astype(np.int32), ep_size
            )
            for step, layer, slots in self.placements
        ]
        steps = np.array(self.steps, np.int64)
        if self.recorded:
            load = np.stack([load_of(n) for n in self.steps], axis=1).astype(self.dtype)
            parts += journal.loads_frame(steps, load, ep_size)
        n = self.recorded + 1
        all_steps = np.arange(self.first, self.first + n)
        rows = StepRows(
            step=all_steps,
            time_ns=all_steps + 1_700_000_000_000_000_000,
            monotonic_ns=all_steps * 1000,
            status=np.array([Status.RECORDED] * self.recorded + [Status.DUMMY], np.uint8),
            num_tokens=np.where(all_steps % 2, all_steps * 10, -1),
            phase=np.array([step % 3 - 1 for step in all_steps], np.int8),
            step_ms=np.where(all_steps % 2, np.nan, all_steps / 8).astype(np.float32),
            # Of the second batch alone, so that frames with and without durations meet.
            device_ms=np.full(n, 2.5 if self.first == 4 else np.nan, np.float32),
            phases=("prefill", f"phase-{self.first}"),
        )
        return [*parts, journal.steps_frame(rows)]


BATCHES = (
    Batch(0, 3, placements=tuple((0, layer, map_of(0)[layer]) for layer in range(LAYERS))),
    Batch(4, 2, np.int32, placements=((5, 1, map_of(1)[1]),)),
    Batch(7, 0),
    Batch(8, 4, np.uint16, placements=((8, 0, map_of(2)[0]), (9, 2, np.full(SLOTS, EMPTY_SLOT)))),
)
MOE_LAYERS = (3, 5, 61)
INFO = session_info(moe_layers=MOE_LAYERS)


def write_journal(
    folder: Path, batches: tuple[Batch, ...] = BATCHES, info: SessionInfo = INFO
) -> tuple[Path, list[int]]:
    """Returns the journal and the sizes it had after the session frame and after each batch."""
    folder.mkdir(parents=True, exist_ok=True)
    appender = JournalAppender(folder, info, 0)
    sizes = [appender.size]
    for batch in batches:
        appender.append(b"".join(batch.encode()))
        sizes.append(appender.size)
    appender.close()
    return appender.path, sizes


def truth_loads(batches: tuple[Batch, ...] = BATCHES) -> dict[int, Array]:
    return {step: load_of(step) for batch in batches for step in batch.steps}


def truth_placements(
    batches: tuple[Batch, ...] = BATCHES,
) -> list[tuple[int, int, int, tuple[int, ...]]]:
    return [
        (step, MOE_LAYERS[layer], 2, tuple(slots.tolist()))
        for batch in batches
        for step, layer, slots in batch.placements
    ]


def truth_status(batches: tuple[Batch, ...] = BATCHES) -> list[tuple[int, str]]:
    rows = []
    for batch in batches:
        rows += [(step, "recorded") for step in batch.steps] + [(batch.first + batch.recorded, "dummy")]
    return rows


def truth_durations() -> list[list[float | None]]:
    """``step_ms`` and ``device_ms`` of all steps."""
    steps = [step for step, _ in truth_status()]
    return [[None if s % 2 else s / 8 for s in steps], [2.5 if 4 <= s < 7 else None for s in steps]]


def durations(column: Any) -> list[float | None]:
    return [None if math.isnan(ms) else ms for ms in column.tolist()]


def assert_sealed(folder: Path, batches: tuple[Batch, ...] = BATCHES) -> None:
    """Check that exactly the truth is sealed and that the manifest describes the files."""
    assert sealed_loads(folder).keys() == truth_loads(batches).keys()
    assert_equal_loads(sealed_loads(folder), truth_loads(batches))
    assert placement_rows(folder) == truth_placements(batches)
    assert step_status(folder) == truth_status(batches)
    files = {path.name for path in folder.iterdir()}
    assert {f for f in files if f.endswith((".tmp", ".frames"))} == {MANIFEST_FILE}
    session, *sealed = manifest(folder)
    assert session.kind == "session"
    assert SessionInfo.from_dict(session.header["session"]) == INFO
    assert sealed
    entry = SealedSegment.from_frame(sealed[-1])
    assert entry.to_header() == sealed[-1].header
    assert (entry.seq, entry.first_step, entry.last_step) == (0, 0, truth_status(batches)[-1][0])
    assert {file.name for file in entry.files.values()} == files - {MANIFEST_FILE}
    for table, file in entry.files.items():
        assert file.bytes == (folder / file.name).stat().st_size
        assert file.footer_crc32 == footer_crc32(folder / file.name)
        assert file.rows == len(read_table(folder, table))


# ---- the journal


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_journal_reads_back(tmp_path: Path, dtype: type[np.integer[Any]]) -> None:
    batches = tuple(Batch(b.first, b.recorded, dtype, b.placements) for b in BATCHES)
    path, sizes = write_journal(tmp_path, batches)
    with JournalSegment(path) as found:
        assert found.info == INFO
        assert (found.seq, found.tail) == (0, frames.Tail(sizes[-1], sizes[-1], None))
        assert_equal_loads(journal_loads(found), truth_loads())
        assert np.array_equal(found.read_layers(1, 2), np.stack([x[1:2] for x in truth_loads().values()], 1))
        steps = found.steps.step
        codes = [Status[label.upper()] for _, label in truth_status()]
        assert steps.tolist() == [step for step, _ in truth_status()]
        assert found.steps.status.tolist() == codes
        names = [(*found.steps.phases, None)[code] for code in found.steps.phase]
        firsts = [batch.first for batch in BATCHES for _ in range(batch.recorded + 1)]
        third = [(None, "prefill", f"phase-{first}") for first in firsts]
        assert names == [choice[step % 3] for choice, step in zip(third, steps, strict=True)]
        assert [durations(found.steps.step_ms), durations(found.steps.device_ms)] == truth_durations()
        assert [p.tolist() for p in found.placements.physical_to_logical] == [
            slots.tolist() for batch in BATCHES for _, _, slots in batch.placements
        ]


@pytest.mark.parametrize(
    ("largest", "width"),
    [(0, "|u1"), (255, "|u1"), (256, "<u2"), (65535, "<u2"), (65536, "<i4"), (2**31 - 1, "<i4")],
)
def test_counts_are_stored_in_narrowest_type(tmp_path: Path, largest: int, width: str) -> None:
    load = np.zeros((LAYERS, SLOTS), np.int64)
    load[1, 3] = largest
    with open_writer(tmp_path) as writer:
        writer.record(None, load, None)
        assert writer.flush()
        (path,) = writer.folder.glob("journal-*")
        with path.open("rb") as file:
            found = [f for f in frames.scan(file, path.stat().st_size) if isinstance(f, frames.Frame)]
        (frame,) = (f for f in found if f.kind == "loads")
        assert frame.arrays["load"].dtype.str == width
    assert_equal_loads(sealed_loads(writer.folder), {0: load})


def test_journal_cut_anywhere_keeps_complete_batches(tmp_path: Path) -> None:
    """Placements of a torn batch were never in force for a recorded step."""
    path, sizes = write_journal(tmp_path)
    with path.open("rb") as file:
        ends = [item.end for item in frames.scan(file, sizes[-1])]
    cuts = {*range(0, sizes[-1], 11), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-2])}
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        if cut < sizes[0]:
            with pytest.raises(UnbegunJournal):
                JournalSegment(path)
            continue
        batches = BATCHES[: sum(size <= cut for size in sizes[1:])]
        with JournalSegment(path) as found:
            assert found.steps.step.tolist() == [step for step, _ in truth_status(batches)]
            assert found.load_steps.tolist() == list(truth_loads(batches))
            assert found.placements.step.tolist() == [step for step, *_ in truth_placements(batches)]
            assert found.tail.fault == (None if cut in ends else "torn")
            assert_equal_loads(journal_loads(found), truth_loads(batches))


def test_any_flipped_byte_of_journal_is_detected(tmp_path: Path) -> None:
    path, sizes = write_journal(tmp_path)
    data = path.read_bytes()
    for position in range(sizes[0], len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        batches = BATCHES[: sum(size <= position for size in sizes[1:])]
        with JournalSegment(path) as found:
            assert found.tail.fault == "damaged"
            assert_equal_loads(journal_loads(found), truth_loads(batches))


def test_failed_append_leaves_only_complete_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way is undone, and the next one is readable."""
    appender = JournalAppender(tmp_path, INFO, 0)
    first, second = (b"".join(batch.encode()) for batch in BATCHES[:2])
    real = os.write

    def half(fd: int, parts: Any) -> int:
        return real(fd, parts[0][: len(parts[0]) // 2])

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", half)
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            appender.append(first)
    assert appender.path.stat().st_size == appender.size
    appender.append(second)
    appender.close()
    with JournalSegment(appender.path) as found:
        assert found.tail.fault is None
        assert_equal_loads(journal_loads(found), truth_loads(BATCHES[1:2]))


def _steps(n: int, **arrays: Any) -> bytes:
    rows: dict[str, Any] = {
        "step": np.arange(n),
        "time_ns": np.arange(n),
        "monotonic_ns": np.arange(n),
        "status": np.zeros(n, np.uint8),
        "num_tokens": np.arange(n),
        "phase": np.full(n, -1, np.int8),
    }
    return frames.encode("steps", {"phases": []}, {**rows, **arrays})


def _bits(*ms: float) -> Any:
    return np.array(ms, np.float32).view(np.int32)


def _loads(steps: Any, load: Any, ep_size: Any = 2) -> bytes:
    return frames.encode("loads", {"ep_size": ep_size}, {"step": np.array(steps), "load": load})


_LOAD = load_of(0)[:, None].astype(np.int32)
_SESSION = journal.session_frame(INFO, 0)


_RECORDED = _loads([0], _LOAD) + _steps(1)


def _session(session: Any, **header: Any) -> bytes:
    return frames.encode("session", {"session": session, **header})


def _map(slots: Any, layer: int = 0, ep_size: Any = 2, step: int = 0) -> bytes:
    """A placements frame of one step."""
    arrays = {"step": np.array([step]), "layer": np.array([layer]), "physical_to_logical": slots}
    return frames.encode("placements", {"ep_size": ep_size}, arrays)


CONTRADICTIONS = {
    "of another number": _session(INFO.to_dict(), seq=1),
    "without a number": _session(INFO.to_dict()),
    "session is null": _session(None, seq=0),
    "session is a list": _session(["x"], seq=0),
    "of a foreign format": _session({**INFO.to_dict(), "format": "other"}, seq=0),
    "ep_size is a text": _session({**INFO.to_dict(), "ep_size": "2"}, seq=0),
    "moe_layers is a number": _session({**INFO.to_dict(), "moe_layers": 7}, seq=0),
    "a node without ranks": _session({**INFO.to_dict(), "ranks_per_node": 0}, seq=0),
    "begun beyond all time": _session({**INFO.to_dict(), "created_unix_ns": 10**30}, seq=0),
    "no session": _steps(1),
    "columns of two lengths": _SESSION + _steps(2, status=np.zeros(3, np.uint8)),
    "a negative duration": _SESSION + _RECORDED + _steps(1, step_ms=_bits(-0.5)),
    "an infinite duration": _SESSION + _RECORDED + _steps(1, device_ms=_bits(np.inf)),
    "a duration in other bits": _SESSION + _RECORDED + _steps(1, step_ms=np.zeros(1, np.int64)),
    "a duration too many": _SESSION + _RECORDED + _steps(1, step_ms=_bits(1, 2)),
    "an unknown status": _SESSION + _steps(1, status=np.array([5], np.uint8)),
    "a negative status": _SESSION + _steps(1, status=np.array([-1], np.int8)),
    "a negative step": _SESSION + _steps(1, step=np.array([-1]), status=np.ones(1, np.uint8)),
    "a step beyond all numbers": _SESSION + _steps(1, step=np.array([2**62]), status=np.ones(1, np.uint8)),
    "a negative step with a load": _SESSION + _loads([-1], _LOAD) + _steps(1, step=np.array([-1])),
    "a placement of a negative step": _SESSION + _map(np.zeros((1, SLOTS), np.int32), step=-1) + _RECORDED,
    "an unknown phase": _SESSION + _steps(1, phase=np.array([0], np.int8)),
    "a negative phase": _SESSION + _steps(1, phase=np.array([-2], np.int8)),
    "steps without columns": _SESSION + frames.encode("steps", {"phases": []}, {"step": np.arange(1)}),
    "phases are null": _SESSION + frames.encode("steps", {"phases": None}),
    "recorded without a load": _SESSION + _steps(1),
    "a load of another step": _SESSION + _loads([1], _LOAD) + _steps(1),
    "two loads of a step": _SESSION + _loads([0], _LOAD) + _RECORDED,
    "negative counts": _SESSION + _loads([0], -_LOAD) + _steps(1),
    "a load of two dimensions": _SESSION + _loads([0], _LOAD[:, 0]) + _steps(1),
    "fewer loads than steps": _SESSION + _loads([0, 1], _LOAD) + _steps(1),
    "slots that do not divide": _SESSION + _loads([0], _LOAD, ep_size=3) + _steps(1),
    "no ranks": _SESSION + _loads([0], _LOAD, ep_size=0) + _steps(1),
    "ranks are true": _SESSION + _loads([0], _LOAD, ep_size=True) + _steps(1),
    "more ranks than can be": _SESSION + _map(np.zeros((1, SLOTS), np.int32), ep_size=2**31) + _RECORDED,
    "ranks are a text": _SESSION + _loads([0], _LOAD, ep_size="2") + _steps(1),
    "a load without steps": _SESSION + frames.encode("loads", {"ep_size": 2}, {"load": _LOAD}),
    "two shapes": _SESSION + _loads([0], _LOAD) + _loads([1], np.repeat(_LOAD, 2, 2)) + _steps(2),
    "a placement without slots": _SESSION
    + frames.encode("placements", {"ep_size": 2}, {"step": np.array([0]), "layer": np.array([0])})
    + _RECORDED,
    "two placements of one step": _SESSION + _map(np.zeros((2, SLOTS), np.int32)) + _RECORDED,
    "a placement of one dimension": _SESSION + _map(np.zeros(SLOTS, np.int32)) + _RECORDED,
    "an expert too many": _SESSION + _map(np.full((1, SLOTS), LOGICAL)) + _RECORDED,
    "an expert below -1": _SESSION + _map(np.full((1, SLOTS), -2)) + _RECORDED,
    "a layer too many": _SESSION + _map(np.zeros((1, SLOTS), np.int32), layer=LAYERS) + _RECORDED,
    "a layer without a number": journal.session_frame(session_info(moe_layers=(7,)), 0) + _RECORDED,
    "a negative layer": _SESSION + _map(np.zeros((1, SLOTS), np.int32), layer=-1) + _RECORDED,
}


@pytest.mark.parametrize("content", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_journal_is_rejected(tmp_path: Path, content: bytes) -> None:
    """Complete frames with valid checksums but impossible content."""
    path = tmp_path / journal_name(0)
    path.write_bytes(content)
    with pytest.raises(FormatError):
        JournalSegment(path)
    with pytest.raises(FormatError):
        seal(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("layers", "slots", "experts", "possible"),
    [
        (16, 65536, 65536, True),
        (4096, 256, 256, True),
        (17, 65536, 6, False),
        (4096, 258, 6, False),
        (17, 2, 65536, False),
        (4097, 2, 2, False),
        (1, 65538, 2, False),
    ],
)
def test_layers_times_slots_or_experts_are_bounded(
    layers: int, slots: int, experts: int, possible: bool
) -> None:
    """Readers hold arrays of that size."""
    info = session_info(num_logical_experts=experts)
    if possible:
        assert load_shape((2, layers, slots), info, None) == Shape(2, layers, slots)
    else:
        with pytest.raises(FormatError, match=r"impossible shape|too many"):
            load_shape((2, layers, slots), info, None)


@pytest.mark.parametrize(("slots", "experts"), [(65536, 6), (2, 65536)])
def test_writer_rejects_loads_of_more_layers_than_readers_take(
    tmp_path: Path, slots: int, experts: int
) -> None:
    """It learns how many layers there are from the first load."""
    with open_writer(tmp_path, scope="global", num_logical_experts=experts) as writer:
        writer.record(0, np.zeros((17, slots), np.uint8), None)
        writer.record(1, np.zeros((16, slots), np.uint8), None)
        assert writer.flush(10)
        stats = writer.stats()
    assert (stats.seen, stats.rejected, stats.recorded) == (2, 1, 1)
    assert list(sealed_loads(writer.folder)) == [1]


@pytest.mark.parametrize("narrow", [np.uint8, np.int8, np.int16])
def test_numbers_of_any_integer_type_are_read(tmp_path: Path, narrow: Any) -> None:
    path = tmp_path / journal_name(0)
    named = {name: np.zeros(1, narrow) for name in ("time_ns", "monotonic_ns", "num_tokens", "phase")}
    path.write_bytes(
        _SESSION
        + frames.encode("loads", {"ep_size": 2}, {"step": np.array([7], narrow), "load": _LOAD})
        + frames.encode(
            "steps",
            {"phases": ["a"]},
            {**named, "step": np.array([7], narrow), "status": np.zeros(1, np.uint8)},
        )
    )
    with JournalSegment(path) as found:
        assert found.load_steps.dtype == found.steps.step.dtype == found.steps.monotonic_ns.dtype == np.int64
        # As readers do: no sum or limit of theirs overflows.
        assert found.steps.step.min(initial=2**62) == found.load_steps[0] == 7


def test_frames_of_newer_minor_version_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / journal_name(0)
    path.write_bytes(_SESSION + frames.encode("novelty", {}) + _loads([0], _LOAD) + _steps(1))
    with JournalSegment(path) as found:
        assert_equal_loads(journal_loads(found), {0: load_of(0)})


def test_unknown_durations_take_no_bytes_of_a_journal() -> None:
    """So journals without them are those of before."""
    with_time, without = (BATCHES[1].encode()[-1], BATCHES[2].encode()[-1])
    assert b"device_ms" in with_time
    assert b"device_ms" not in without


def test_journal_holds_more_than_256_phases(tmp_path: Path) -> None:
    """Each frame numbers its own phases; a segment of many frames may have any number of them."""
    with open_writer(tmp_path) as writer:
        for step in range(300):
            writer.record(step, load_of(step), None, phase=f"phase {step}")
            assert step % 50 or writer.flush()
        assert writer.flush()
        (path,) = writer.folder.glob("journal-*")
        with JournalSegment(path) as found:
            assert [found.steps.phases[code] for code in found.steps.phase] == [
                f"phase {step}" for step in range(300)
            ]
    assert read_table(writer.folder, "steps")["phase"].to_pylist() == [f"phase {step}" for step in range(300)]


# ---- sealing


def test_sealed_tables_hold_what_was_written(tmp_path: Path) -> None:
    path, _ = write_journal(tmp_path)
    entry = seal(path)
    assert entry is not None
    assert_sealed(tmp_path)
    for table in SEALED_TABLES:
        schema = SCHEMAS[table]
        found = pq.read_schema(tmp_path / f"{table}-000000.parquet")
        assert found.remove_metadata() == schema
        metadata = json.loads(found.metadata[METADATA_KEY])
        assert SessionInfo.from_dict(metadata["session"]) == INFO
        assert (metadata["table"], metadata["seq"]) == (table, 0)
        assert metadata["shape"] == {"ep_size": 2, "num_moe_layers": LAYERS, "num_physical_experts": SLOTS}
    steps = read_table(tmp_path, "steps")
    rows = steps.drop_columns("time").to_pylist()
    assert steps["time"].cast(pa.int64()).to_pylist() == [
        1_700_000_000_000_000_000 + row["step"] for row in rows
    ]
    assert [row["monotonic_ns"] for row in rows] == [row["step"] * 1000 for row in rows]
    assert [row["num_tokens"] for row in rows] == [r["step"] * 10 if r["step"] % 2 else None for r in rows]
    assert [[row[name] for row in rows] for name in ("step_ms", "device_ms")] == truth_durations()
    first = {step: batch.first for batch in BATCHES for step in range(batch.first, batch.first + 9)}
    assert [row["phase"] for row in rows] == [
        (None, "prefill", f"phase-{first[row['step']]}")[row["step"] % 3] for row in rows
    ]


@pytest.mark.parametrize("layers_a_group", [1, 2, 3, 9])
def test_loads_are_sorted_by_layer_and_step_in_groups_of_whole_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_a_group: int
) -> None:
    truth = truth_loads()
    monkeypatch.setattr(segment, "ROW_GROUP_VALUES", layers_a_group * len(truth) * SLOTS)
    seal(write_journal(tmp_path)[0])
    rows = read_table(tmp_path, "loads").to_pylist()
    assert [(row["layer"], row["step"]) for row in rows] == [(n, step) for n in MOE_LAYERS for step in truth]
    for row in rows:
        load = truth[row["step"]][MOE_LAYERS.index(row["layer"])]
        assert (row["ep_size"], row["load"]) == (2, load.tolist())
        assert row["rank_load"] == load.reshape(2, -1).sum(axis=1).tolist()
    metadata = pq.read_metadata(tmp_path / "loads-000000.parquet")
    layer = SCHEMAS["loads"].get_field_index("layer")
    groups = [metadata.row_group(i).column(layer).statistics for i in range(metadata.num_row_groups)]
    first = range(0, LAYERS, layers_a_group)
    assert [g.min for g in groups] == [MOE_LAYERS[i] for i in first]
    assert [g.max for g in groups] == [MOE_LAYERS[min(i + layers_a_group, LAYERS) - 1] for i in first]


@pytest.mark.parametrize("table", SEALED_TABLES)
def test_flipped_bit_in_any_page_is_detected_by_pyarrow(tmp_path: Path, table: str) -> None:
    """The last byte of a column chunk is in the data of its last page."""
    seal(write_journal(tmp_path)[0])
    path = tmp_path / f"{table}-000000.parquet"
    data = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    for index in range(metadata.num_columns):
        chunk = metadata.row_group(0).column(index)
        start = (
            chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
        )
        flipped = bytearray(data)
        flipped[start + chunk.total_compressed_size - 1] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            pq.ParquetFile(path, page_checksum_verification=True).read()


def test_kill_at_any_step_of_sealing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = 0
    for count in range(100):
        folder = tmp_path / str(count)
        path, _ = write_journal(folder)
        try:
            with monkeypatch.context() as patch:
                kill_before(patch, count)
                seal(path)
            break
        except Killed:
            kills += 1
        if not path.exists():  # killed before its removal was synced
            assert_sealed(folder)
            continue
        with JournalSegment(path) as found:
            assert_equal_loads(journal_loads(found), truth_loads())
        if list(folder.glob("*.parquet")):  # they exist only after the manifest lists them
            assert manifest(folder)[-1].kind == "sealed"
        seal(path)
        assert_sealed(folder)
    assert_sealed(folder)
    assert kills >= 12  # 3 files, the manifest and its folder, 3 renames, the folder, the journal, and more


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_sealing_can_be_repeated_after_kill_in_a_write(tmp_path: Path, cut: int) -> None:
    """Torn segments are written again; a torn manifest must not hide later entries."""
    path, _ = write_journal(tmp_path)
    content = path.read_bytes()
    seal(path)
    whole = (tmp_path / MANIFEST_FILE).read_bytes()
    (tmp_path / MANIFEST_FILE).write_bytes(whole[: len(whole) - cut if cut >= 0 else 40])
    for file in tmp_path.glob("*.parquet"):
        file.with_name(f"{file.name}.tmp").write_bytes(file.read_bytes()[:100])
        file.unlink()
    path.write_bytes(content)
    seal(path)
    assert_sealed(tmp_path)


def test_torn_batch_is_not_sealed(tmp_path: Path) -> None:
    path, sizes = write_journal(tmp_path)
    with path.open("r+b") as file:
        file.truncate(sizes[-1] - 1)
    seal(path)
    assert_sealed(tmp_path, BATCHES[:-1])


def test_damaged_journal_is_neither_sealed_nor_deleted(tmp_path: Path) -> None:
    path, sizes = write_journal(tmp_path)
    data = bytearray(path.read_bytes())
    data[sizes[2] + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"damaged from byte {sizes[2]} on"):
        seal(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == data


@pytest.mark.parametrize("batches", [(), (Batch(0, 0),)])
def test_journal_without_loads_is_sealed(tmp_path: Path, batches: tuple[Batch, ...]) -> None:
    path, _ = write_journal(tmp_path, batches)
    entry = seal(path)
    files = {p.name for p in tmp_path.iterdir()}
    if batches:
        assert entry is not None
        assert set(entry.files) == {"steps", "minutes"}
        assert files == {"steps-000000.parquet", "minutes-000000.parquet", MANIFEST_FILE}
        assert step_status(tmp_path) == [(0, STATUS_LABELS[Status.DUMMY])]
    else:
        assert entry is None
        assert files == set()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"x" * 30, b"PAR1\xff\xff\0\0PAR1"])
def test_footer_of_incomplete_parquet_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(FormatError, match="not a complete Parquet file"):
        footer_crc32(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"ep_size": 1}},
        {"shape": 5},
        {"shape": {"ep_size": 2, "num_moe_layers": 2**62, "num_physical_experts": 8}},
        {"shape": {"ep_size": 2, "num_moe_layers": float("nan"), "num_physical_experts": 8}},
        {"files": {"steps": {"name": "steps-000000.parquet"}}},
        {"files": []},
        {"files": {"steps": {"name": "../steps-000000.parquet", "bytes": 1, "rows": 1, "footer_crc32": 1}}},
        {"seq": 1},
        {"seq": "x"},
        {"first_step": None},
    ],
)
def test_malformed_manifest_entry_is_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    entry = seal(write_journal(tmp_path)[0])
    assert entry is not None
    frame = manifest(tmp_path)[-1]
    assert SealedSegment.from_frame(frame).to_frame() == entry.to_frame()
    with pytest.raises(FormatError):
        SealedSegment.from_frame(replace(frame, header={**frame.header, **change}))


def test_manifest_holds_tokens_of_each_slot(tmp_path: Path) -> None:
    """One row per layer and placement, equal to the sums of ``loads``."""
    entry = seal(write_journal(tmp_path)[0])
    assert entry is not None
    assert entry.sums is not None
    sums = entry.sums.read()
    loads, changes = truth_loads(), truth_placements()
    rows = []
    for layer in range(LAYERS):
        first = min(loads)
        cuts = sorted({first, *(step for step, number, *_ in changes if number == MOE_LAYERS[layer])})
        for low, high in itertools.pairwise([*cuts, max(loads) + 1]):
            of_steps = [load[layer] for step, load in loads.items() if low <= step < high]
            if of_steps:
                begin = min(step for step in loads if step >= low)
                rows.append((layer, begin, np.sum(of_steps, axis=0).tolist()))
    found = zip(sums.layer.tolist(), sums.step.tolist(), sums.load.tolist(), strict=True)
    assert list(found) == rows


@pytest.mark.parametrize(
    "change",
    [
        {"sum_load": np.zeros((1, 1), np.int64)},
        {"sum_step": np.zeros(1, np.int64)},
        {"sum_layer": np.zeros((3, 8), np.int32)},
        {"sum_layer": np.array([5], np.int32), "sum_step": np.zeros(1, np.int64)},
    ],
)
def test_sums_that_contradict_shape_are_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    seal(write_journal(tmp_path)[0])
    frame = manifest(tmp_path)[-1]
    with pytest.raises(FormatError, match="sums"):
        SealedSegment.from_frame(replace(frame, arrays={**frame.arrays, **change}))
    negative = {**frame.arrays, "sum_load": -1 - frame.arrays["sum_load"]}
    with pytest.raises(FormatError, match="sums"):
        SealedSegment.from_frame(replace(frame, arrays=negative))


# ---- the manifest


def read_manifest(data: bytes, session_id: str | None = None) -> Manifest:
    return Manifest.read(io.BytesIO(data), len(data), session_id)


def test_manifest_reads_valid_prefix(tmp_path: Path) -> None:
    """A torn end is no fault, damage is one, and what comes before it is read either way."""
    seal(write_journal(tmp_path)[0])
    ManifestFile(tmp_path).append(INFO, frames.encode("part", {"first_step": 1, "last_step": 9}))
    close_manifest(tmp_path, INFO, {"seen": 2})
    data = (tmp_path / MANIFEST_FILE).read_bytes()
    whole = read_manifest(data, INFO.session_id)
    assert (list(whole.entries), whole.part, whole.end, whole.fault) == ([0], (1, 9), len(data), None)
    assert whole.closed is not None
    assert whole.closed["stats"] == {"seen": 2}
    start = manifest(tmp_path)[-1].start
    torn = read_manifest(data[:-1])
    assert (list(torn.entries), torn.closed, torn.end, torn.fault) == ([0], None, start, None)
    damaged = read_manifest(data[:-1] + b"x")
    assert (list(damaged.entries), damaged.end) == ([0], start)
    assert damaged.fault == f"damaged from byte {start} on"


def test_manifest_of_another_session_is_neither_read_nor_extended(tmp_path: Path) -> None:
    close_manifest(tmp_path, INFO, {})
    data = (tmp_path / MANIFEST_FILE).read_bytes()
    other = read_manifest(data, "other")
    assert (other.fault, other.closed, other.end) == ("of another session", None, 0)
    with pytest.raises(FormatError, match="damaged from byte 0 on"):
        close_manifest(tmp_path, session_info(session_id="other"), {})
    assert (tmp_path / MANIFEST_FILE).read_bytes() == data


def manifest_with_sums(folder: Path, segments: int) -> tuple[ManifestFile, SealedSegment]:
    """A manifest that lists segments with sums, and the entry that all of them are like."""
    (folder / "source").mkdir()
    entry = seal(write_journal(folder / "source")[0])
    assert entry is not None
    entry, file = replace(entry, files={}), ManifestFile(folder)
    for seq in range(segments):
        file.append(INFO, replace(entry, seq=seq))
    return file, entry


def sums_of(entry: SealedSegment) -> ExpertSums:
    assert entry.sums is not None
    return entry.sums.read()


def test_sums_of_long_runs_stay_in_the_file(tmp_path: Path) -> None:
    file, entry = manifest_with_sums(tmp_path, 3)
    manifest = file.read(INFO.session_id)
    assert [*manifest.entries] == [0, 1, 2]
    for listed in manifest.entries.values():
        assert isinstance(listed.sums, StoredSums)
        assert listed.sums.nbytes == sums_of(entry).nbytes
        assert listed.to_frame() == replace(entry, seq=listed.seq).to_frame()


def test_sums_in_a_manifest_that_was_replaced_are_not_guessed(tmp_path: Path) -> None:
    file, _ = manifest_with_sums(tmp_path, 2)
    before = file.read(INFO.session_id)
    rewrite_manifest(tmp_path, INFO, replace(before, entries={1: before.entries[1]}))
    for entry in before.entries.values():  # at the first one's place is the second one now
        with pytest.raises(FormatError):
            sums_of(entry)
    close_manifest(tmp_path, INFO, {"text": "x" * 1000})
    rewrite_manifest(tmp_path, INFO, replace(file.read(INFO.session_id), entries={}))
    with pytest.raises(FormatError):
        sums_of(before.entries[0])


def test_what_a_process_has_appended_is_verified_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read hundreds of megabytes for each segment would cost more than to seal it."""
    starts = []
    real = frames.scan

    def scan(file: BinaryIO, size: int, start: int = 0) -> Iterator[Any]:
        starts.append((start, size))
        return real(file, size, start)

    monkeypatch.setattr(frames, "scan", scan)
    file, ends = ManifestFile(tmp_path), [0]
    for number in range(4):
        file.append(INFO, frames.encode("part", {"first_step": number, "last_step": 9}))
        ends.append((tmp_path / MANIFEST_FILE).stat().st_size)
    assert starts == [(0, 0), *itertools.pairwise(ends[:4])]
    assert file.read(INFO.session_id).part == (3, 9)
    starts.clear()
    ManifestFile(tmp_path).append(INFO, frames.encode("closed", {}))
    assert file.read(INFO.session_id).closed is not None
    assert starts == [(0, ends[-1]), (0, (tmp_path / MANIFEST_FILE).stat().st_size)]


@pytest.mark.parametrize("change", ["damaged", "shorter", "replaced"])
def test_manifest_that_another_process_changed_is_read_again(tmp_path: Path, change: str) -> None:
    file = ManifestFile(tmp_path)
    for number in range(3):
        file.append(INFO, frames.encode("part", {"first_step": number, "last_step": 9}))
    path = tmp_path / MANIFEST_FILE
    data = path.read_bytes()
    if change == "shorter":
        with path.open("r+b") as opened:
            opened.truncate(len(data) - 1)
        file.append(INFO, frames.encode("closed", {}))  # behind the last whole frame
        assert file.read(INFO.session_id).part == (1, 9)
        return
    wrong = data[:-40] + b"x" + data[-39:]
    if change == "replaced":
        path.unlink()
    path.write_bytes(wrong)
    # Later than any clock tick that the last append was in.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    with pytest.raises(FormatError, match="is damaged from byte"):
        file.append(INFO, frames.encode("closed", {}))
    assert path.read_bytes() == wrong


def test_manifest_with_malformed_entry_is_not_extended(tmp_path: Path) -> None:
    """Readers stop at the malformed entry, so a later one would be lost with its journal deleted."""
    ManifestFile(tmp_path).append(INFO, frames.encode("sealed", {"seq": "x"}))
    with pytest.raises(FormatError, match="damaged from byte"):
        close_manifest(tmp_path, INFO, {})
