"""Flipped bits and truncated files: an error or the truth, never a wrong figure, never a traceback."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import (
    LAYERS,
    LOGICAL,
    cli,
    load_of,
    manifest,
    map_of,
    open_writer,
)

from eplb_analyze import DumpError, open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.errors import Finding, NotInDumpError
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import RunInfo
from eplb_analyze.sessions import parquet_segment
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.sessions.segments import DamagedSegmentError, read_manifest
from eplb_dump.format import frames
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE, STEPS_SCHEMA
from eplb_dump.format.segment import _open_parquet, footer_crc32


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed segment and an open journal, as a killed writer leaves them."""
    root = tmp_path_factory.mktemp("small") / "dump"
    written = root.with_name("written")
    writer = open_writer(written, scope="global", segment_steps=4, num_logical_experts=6)
    for step in range(6):
        writer.record(
            step, load_of(step), map_of(step // 3), num_tokens=step, phase="decode", step_ms=step / 4 or None
        )
        assert writer.flush(60)
    deadline = time.monotonic() + 60
    while len(list(written.rglob("journal-*"))) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.copytree(written, root)
    writer.close()
    assert len(list(root.rglob("*.parquet"))) == 4
    assert len(list(root.rglob("journal-*"))) == 1
    return root


@dataclass
class Content:
    """What can be read of a run. ``loads``: by step, of all layers and slots."""

    loads: dict[int, list[Any]]
    steps: list[Any]
    placements: list[Any]
    info: RunInfo


def read_run(run: Run) -> Content:
    """Read everything. The arrays under the frames are compared, as a frame takes longer than its data."""

    def read() -> Content:
        loads: dict[int, list[Any]] = {}
        steps = []
        for block in run.blocks():
            columns = block.step, block.state, block.status, block.time_ns, block.num_tokens, block.phase
            steps += [*(column.tolist() for column in columns), block.phases]
            steps += [
                repr(ms.tolist()) for ms in (block.step_ms, block.device_ms)
            ]  # NaN is not equal to itself
            if len(block.recorded):
                load = block.loads(0, run.info.num_layers)
                by_rank = load.reshape(*load.shape[:2], run.info.ep_size, -1).sum(axis=3)
                assert np.array_equal(block.rank_load(), by_rank)
                loads |= zip(block.recorded.tolist(), load.tolist(), strict=True)
        layers = run.history.layers.items()
        placements = [(i, h.steps, h.ep_sizes, [s.tolist() for s in h.slots]) for i, h in layers]
        return Content(loads, steps, placements, run.info)

    return run.retry_without_damaged(read)


def read_everything(root: Path) -> tuple[Run, Content] | None:
    """None if the dump is refused as a whole."""
    try:
        run = open_run(root)
        return run, read_run(run)
    except DumpError:
        return None


def has_errors(run: Run) -> bool:
    return any(finding.severity == "error" for finding in run.findings)


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def reported_by_check(run: Run) -> bool:
    try:
        check_run(run)
    except DumpError:
        return True
    return has_errors(run)


def flip_and_judge(root: Path, flips: int, seed: int) -> tuple[int, int]:
    """Flip random bits, one at a time. Returns how many changed nothing and how many were reported."""
    truth = read_everything(root)
    assert truth is not None
    files = sorted(p for p in root.rglob("*") if p.is_file())
    rng = random.Random(seed)
    harmless = reported = 0
    for _ in range(flips):
        path = rng.choices(files, [p.stat().st_size for p in files])[0]
        bit = rng.randrange(path.stat().st_size * 8)
        flip(path, bit)
        found = read_everything(root)
        if found is None or has_errors(found[0]) or reported_by_check(found[0]):
            reported += 1
        else:
            harmless += 1
            assert found[1] == truth[1], f"{path.name}, bit {bit}: a wrong figure, and no error"
        flip(path, bit)
    return harmless, reported


@pytest.mark.parametrize("seed", range(4))
def test_random_flipped_bit_is_reported_or_changes_nothing(small: Path, tmp_path: Path, seed: int) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    harmless, reported = flip_and_judge(root, 300, seed)
    assert harmless + reported == 300
    assert reported > 250


def test_flipped_bit_in_a_dictionary_page_header_is_no_wrong_figure(small: Path, tmp_path: Path) -> None:
    """Page headers have no checksum: a flipped bit can hide the dictionary that the codes refer to."""
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    (path, *_) = sorted(root.rglob("steps-*.parquet"))
    group = pq.ParquetFile(path).metadata.row_group(0)
    status = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "status")
    reported = 0
    for bit in range(8 * status.dictionary_page_offset, 8 * (status.dictionary_page_offset + 16)):
        flip(path, bit)
        found = read_everything(root)
        flip(path, bit)
        reported += found is None or has_errors(found[0])
        assert found is None or found[0].findings or found[1] == truth[1], bit
    assert reported > 16


@pytest.mark.long
def test_ten_thousand_flipped_bits_are_reported_or_change_nothing(small: Path, tmp_path: Path) -> None:
    harmless, reported = flip_and_judge(shutil.copytree(small, tmp_path / "dump"), 10_000, 99)
    print(f"{reported} reported, {harmless} without effect")


@pytest.mark.parametrize("table", ["loads", "steps", "placements"])
def test_parquet_file_truncated_at_any_byte_is_damaged(small: Path, tmp_path: Path, table: str) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    session = truth[0].sessions[0]
    entry = read_manifest(session.folder, session.info).entries[0]
    path = session.folder / entry.files[table].name
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedSegmentError):
            ParquetSegment(session.folder, session.info, entry).verify(table)
        if length % 100 == 0:
            # The run is read without it, and the loss is reported.
            found = read_everything(root)
            assert found is not None
            assert has_errors(found[0]), length
            assert all(truth[1].loads[step] == load for step, load in found[1].loads.items())
            assert list(found[1].loads) == ([0, 1, 2, 3, 4, 5] if table == "placements" else [4, 5])


@pytest.mark.parametrize("name", [MANIFEST_FILE, SESSION_FILE])
def test_metadata_truncated_at_any_byte_is_reported(small: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    (path,) = root.rglob(name)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_everything(root)
        if found is not None:
            loads = found[1].loads
            assert all(truth[1].loads[step] == load for step, load in loads.items()), length
            # A manifest cut between frames lists less, but its files are still there.
            assert loads == truth[1].loads or has_errors(found[0]), length


def test_prefix_of_a_journal_is_a_journal(tmp_path: Path) -> None:
    """Its whole records count; the rest is an unfinished write, which is no error."""
    writer = open_writer(tmp_path / "written", scope="global", num_logical_experts=6)
    for step in range(3):
        writer.record(step, load_of(step), map_of(step // 2), num_tokens=step, phase="decode")
        assert writer.flush(60)
    root = shutil.copytree(tmp_path / "written", tmp_path / "dump")
    writer.close()
    truth = read_everything(root)
    assert truth is not None
    (path,) = root.rglob("journal-*")
    data = path.read_bytes()
    survivors = []
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_everything(root)
        assert found is not None, length
        assert not has_errors(found[0]), length
        assert all(truth[1].loads[step] == load for step, load in found[1].loads.items()), length
        survivors.append(list(found[1].loads))
    # Step 2 needs the last byte.
    assert [steps for steps, _ in itertools.groupby(survivors)] == [[], [0], [0, 1]]


def test_flipped_bit_in_a_page_header_is_no_wrong_step(tmp_path: Path) -> None:
    """Page headers have no checksum: a flipped bit can hide the dictionary of a text column."""
    folder = record_three(tmp_path, scope="global")
    path = folder / "steps-000000.parquet"
    group = pq.read_metadata(path).row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "status")

    def read() -> dict[str, Any]:
        rows = open_run(tmp_path).sessions[0].segments[0].steps()
        return {name: repr(value.tolist()) for name, value in vars(rows).items() if name != "phases"}

    truth = read()
    for page in (column.dictionary_page_offset, column.data_page_offset):
        for bit in range(8 * page, 8 * (page + 40)):
            flip(path, bit)
            with contextlib.suppress(DamagedSegmentError):
                assert read() == truth, bit
            flip(path, bit)


@pytest.mark.parametrize("table", ["steps", "loads", "placements"])
def test_negative_step_in_a_sealed_file_is_damage(tmp_path: Path, table: str) -> None:
    """Every checksum is right, so only the content shows that no writer wrote it."""
    folder = record_three(tmp_path, scope="global")
    path = folder / f"{table}-000001.parquet"
    rows = pq.ParquetFile(path).read()
    step = rows.column("step").to_numpy() - 15
    column = pa.array(step, rows.schema.field("step").type)
    rows = rows.set_column(0, rows.schema.field("step"), column)
    pq.write_table(rows, path, write_page_checksum=True)
    kept = manifest(folder)
    file = kept[2].header["files"][table]
    file.update(bytes=path.stat().st_size, footer_crc32=footer_crc32(path))
    (folder / MANIFEST_FILE).write_bytes(b"".join(frames.encode(f.kind, f.header, f.arrays) for f in kept))
    for command in ("summary", "check", "experts", "ranks", "rearrangements"):
        result = cli(command, tmp_path)
        assert "internal" not in result.stderr, command
    assert cli("check", tmp_path).returncode == 1
    assert f"{path}: it holds an invalid step number" in {
        finding.text.removesuffix("; skipped") for finding in check_run(open_run(tmp_path)).findings
    }


# ---- placements that cannot be read


def record_three(root: Path, rank: int = 0, **options: Any) -> Path:
    """Three sealed segments of 10 steps; the placement changes at steps 12 and 22. The session's folder."""
    with open_writer(root, ep_rank=rank, segment_steps=10, **options) as writer:
        for step in range(30):
            writer.record(step, load_of(step), map_of((step >= 12) + (step >= 22)))
    return writer.folder


def codes(findings: list[Finding]) -> set[str]:
    return {finding.code for finding in findings if finding.severity == "error"}


def without_entry(folder: Path, seq: int) -> None:
    kept = [f for f in manifest(folder) if f.header.get("seq") != seq]
    (folder / MANIFEST_FILE).write_bytes(b"".join(frames.encode(f.kind, f.header, f.arrays) for f in kept))


@pytest.mark.parametrize("how", ["flipped", "deleted", "unlisted"])
def test_lost_placements_are_unknown_until_stated_again(tmp_path: Path, how: str) -> None:
    folder = record_three(tmp_path, scope="global")
    path = folder / "placements-000001.parquet"
    if how == "flipped":
        flip(path, 8 * 20)
    elif how == "deleted":
        path.unlink()
    else:
        without_entry(folder, 1)
    known = [*range(10), *range(22, 30)]
    truth = np.zeros((LAYERS, LOGICAL), np.int64)
    for step in known:
        for layer, slots in enumerate(map_of(2 * (step >= 22))):
            np.add.at(truth[layer], slots, load_of(step)[layer])

    report = expert_report(open_run(tmp_path), window=10)
    assert np.array_equal(report.experts["tokens"].to_numpy().reshape(LAYERS, LOGICAL), truth)
    unknown = [] if how == "unlisted" else range(10, 22)
    assert report.unknown_tokens == sum(int(load_of(step).sum()) for step in (unknown or range(20, 22)))

    run = open_run(tmp_path)
    assert {slot.logical for slot in layer_report(run, 1, step=20).slots} == {None}
    assert [slot.logical for slot in layer_report(run, 1, step=22).slots] == map_of(2)[1].tolist()
    assert [slot.logical for slot in layer_report(run, 1, step=9).slots] == map_of(0)[1].tolist()
    with pytest.raises(NotInDumpError, match="lost"):
        placement_report(run, 20)
    changes = rearrangement_report(run)
    assert changes.rearrangements == []
    assert "lost from step 10 on" in changes.notes[0]
    assert "placements_lost" in codes(run.findings)
    assert "no_placement" not in {finding.code for finding in check_run(run).findings}
    assert "NEVER ACTED" not in cli("summary", tmp_path).stdout


def test_placements_are_read_from_another_rank(tmp_path: Path) -> None:
    folders = [record_three(tmp_path, rank, scope="local") for rank in (0, 1)]
    truth = expert_report(open_run(tmp_path)).to_json()
    for folder in folders:
        flip(folder / "placements-000001.parquet", 8 * 20)
        run = open_run(tmp_path)
        assert expert_report(run).to_json() == truth
        assert codes(check_run(run).findings) == {"damaged_file", "conservation"}
        flip(folder / "placements-000001.parquet", 8 * 20)


@pytest.mark.parametrize(("table", "seen"), [("loads", 30), ("steps", 20)])
def test_damaged_loads_or_steps_keep_the_placements(tmp_path: Path, table: str, seen: int) -> None:
    folders = [record_three(tmp_path, rank, scope="local") for rank in (0, 1)]
    flip(folders[1] / f"{table}-000001.parquet", 8 * 20)
    run = open_run(tmp_path)
    assert codes(check_run(run).findings) == {"damaged_file", "incomplete_steps", "conservation"}
    assert [step for step, *_ in run.placements().rows()] == [0] * LAYERS + [12] * LAYERS + [22] * LAYERS
    # Only the damaged table of a segment is left out.
    assert sum(run.steps()["ranks_recorded"].to_list()) == 50
    flip(folders[0] / f"{table}-000001.parquet", 8 * 20)
    run = open_run(tmp_path)
    check_run(run)
    assert len(run.steps()) == seen


def test_damage_in_a_nested_analysis_restarts_the_outer_one(tmp_path: Path) -> None:
    record_three(tmp_path, scope="global")
    run = open_run(tmp_path)
    segment = run.sessions[0].segments[1]
    calls = []

    def inner() -> None:
        if len(calls) == 1:
            raise DamagedSegmentError(segment, "loads", segment.path, "broken")

    def outer() -> list[int]:
        calls.append(len(run.loads(layers=[0])))
        run.retry_without_damaged(inner)
        return calls

    assert run.retry_without_damaged(outer) == [30, 20]


def replace_loads(folder: Path, seq: int, table: pa.Table, group_rows: int) -> None:
    """Write other loads of a segment, as the writer would, also into the manifest."""
    path = folder / f"loads-{seq:06d}.parquet"
    with _open_parquet(path, table.schema) as writer:
        writer.write_table(table, row_group_size=group_rows)
    data = b""
    for frame in manifest(folder):
        header = frame.header
        if header.get("seq") == seq:
            entry = {"name": path.name, "bytes": path.stat().st_size, "rows": len(table)}
            entry["footer_crc32"] = footer_crc32(path)
            header = {**header, "files": {**header["files"], "loads": entry}}
        data += frames.encode(frame.kind, header, frame.arrays)
    (folder / MANIFEST_FILE).write_bytes(data)


def test_recorded_step_without_loads_is_found_by_check(tmp_path: Path) -> None:
    """No writer produces this: valid checksums, and a step without its loads."""
    folder = record_three(tmp_path, scope="global")
    table = pq.read_table(folder / "loads-000001.parquet").filter(pc.field("step") != 15)
    replace_loads(folder, 1, table, len(table))
    assert "steps_differ" in codes(check_run(open_run(tmp_path)).findings)


@pytest.mark.parametrize("group_layers", [1, 3])
@pytest.mark.parametrize("swapped", ["layers", "steps"])
def test_rows_in_another_order_are_found(tmp_path: Path, swapped: str, group_layers: int) -> None:
    """No writer produces this either. Before figures, the footer shows the order of layers."""
    folder = record_three(tmp_path, scope="global")
    table = pq.read_table(folder / "loads-000001.parquet")
    order = np.arange(len(table)).reshape(LAYERS, -1)
    if swapped == "layers":
        order = order[::-1]
    else:
        order[-1, 1:9] = order[-1, 8:0:-1]
    replace_loads(folder, 1, table.take(order.reshape(-1)), group_layers * 10)
    run = open_run(tmp_path)
    damage = run.sessions[0].segments[1].damage()  # type: ignore[attr-defined]
    assert "not ordered by layer and step" in str(damage["loads"])
    if swapped == "layers":
        assert len(run.loads(layers=[0])) == 20
        assert any("not ordered by layer and step" in finding.text for finding in run.findings)


# ---- limits of the reader, and claims


def test_small_file_that_decodes_to_much_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated value takes hardly any bytes, so the file size does not bound memory. Nothing is read."""
    record_three(tmp_path, scope="global")
    monkeypatch.setattr(parquet_segment, "MAX_DECODED_BYTES", 8 * 10 * len(STEPS_SCHEMA) - 1)
    run = open_run(tmp_path)
    assert run.steps().is_empty()
    assert {f.text.split(": ")[1] for f in run.findings} >= {
        "more than 0 MiB would have to be read at once; skipped"
    }
    monkeypatch.setattr(parquet_segment, "MAX_DECODED_BYTES", 8 * 10 * len(STEPS_SCHEMA))
    assert len(open_run(tmp_path).steps()) == 30
