"""Flipped bits and truncated files: an error or the truth, never a wrong figure, never a traceback."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
    run_child,
    start_child,
)

from eplb_analyze import DumpError, open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.errors import Finding, NotInDumpError
from eplb_analyze.reader import segments
from eplb_analyze.reader.segments import DamagedSegmentError
from eplb_dump.format import frames
from eplb_dump.format.schema import MANIFEST_FILE
from eplb_dump.format.segment import footer_crc32


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed segment and an open journal, as a killed writer leaves them."""
    root = tmp_path_factory.mktemp("small")
    script = """
        import os, sys, time
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", segment_steps=4, num_logical_experts=6)
        for step in range(6):
            writer.record(step, load_of(step), map_of(step // 3), num_tokens=step, phase="decode")
            writer.flush()
        deadline = time.monotonic() + 20
        while len(list(writer.folder.glob("journal-*"))) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        os._exit(0)
    """
    run_child(script, root)
    assert len(list(root.rglob("*.parquet"))) == 3
    assert len(list(root.rglob("journal-*"))) == 1
    return root


Everything = tuple[list[Finding], dict[str, Any]]


def read_everything(root: Path, *, check: bool = True) -> Everything | None:
    """All that a run says, and the findings; None where the dump is refused as a whole."""
    try:
        run = open_run(root)
        content = {
            "loads": run.loads().rows(),
            "steps": run.steps().rows(),
            "placements": run.placements().rows(),
            "info": run.info,
        }
        if check:
            check_run(run)
    except DumpError:
        return None
    return run.findings, content


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def flip_and_judge(root: Path, flips: int, seed: int) -> tuple[int, int]:
    """Flip random bits, one at a time; how many changed nothing, and how many were reported."""
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
        if found is None or any(f.severity == "error" for f in found[0]):
            reported += 1
        else:
            harmless += 1
            assert found[1] == truth[1], f"{path.name}, bit {bit}: a wrong figure, and no error"
        flip(path, bit)
    return harmless, reported


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_flipped_bits(small: Path, tmp_path: Path, seed: int) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    harmless, reported = flip_and_judge(root, 300, seed)
    assert harmless + reported == 300
    assert reported > 250


def test_every_bit_of_a_dictionarys_page_header(small: Path, tmp_path: Path) -> None:
    """Page headers have no checksum: one can say that there is no text where codes of texts follow."""
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    (path, *_) = sorted(root.rglob("steps-*.parquet"))
    group = pq.ParquetFile(path).metadata.row_group(0)
    status = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "status")
    reported = 0
    for bit in range(8 * status.dictionary_page_offset, 8 * (status.dictionary_page_offset + 16)):
        flip(path, bit)
        found = read_everything(root, check=False)
        flip(path, bit)
        reported += found is None or any(f.severity == "error" for f in found[0])
        assert found is None or found[0] or found[1] == truth[1], bit
    assert reported > 16


@pytest.mark.long
def test_ten_thousand_flipped_bits(small: Path, tmp_path: Path) -> None:
    harmless, reported = flip_and_judge(shutil.copytree(small, tmp_path / "dump"), 10_000, 99)
    print(f"{reported} reported, {harmless} without effect")


def kind(path: Path) -> str:
    return path.name.split("-")[0]


@pytest.mark.parametrize(
    "name", ["journal", "manifest.frames", "session.json", "loads", "steps", "placements"]
)
def test_truncation_at_every_byte(small: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(small, tmp_path / "dump")
    truth = read_everything(root)
    assert truth is not None
    full = {row[:2]: row for row in truth[1]["loads"]}
    (path,) = (p for p in root.rglob("*") if p.is_file() and kind(p) == name)
    data = path.read_bytes()
    survivors = []
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_everything(root, check=False)
        rows = [] if found is None else found[1]["loads"]
        assert all(full[row[:2]] == row for row in rows), length
        survivors.append(len(rows))
        if name == "journal":
            # A prefix of a journal is a journal: what is whole in it counts, the rest is torn.
            assert found is not None
            assert [f for f in found[0] if f.severity == "error"] == []
            steps = [row[0] for row in rows]
            assert steps == sorted(steps)
            assert {0, 1, 2, 3} <= set(steps)
        elif found is not None and len(rows) < len(full):
            # What was lost is said. (A manifest cut between frames lists less, but its files are there.)
            assert any(f.severity == "error" for f in found[0]), length
    if name == "journal":
        assert survivors == sorted(survivors)
        assert set(survivors) == {12, 15}  # steps 0 to 3, then 4; step 5 needs the last byte


def test_every_flipped_bit_before_the_data_of_a_page(tmp_path: Path) -> None:
    """What says how a page is to be read is in no checksum: a page of texts can go missing."""
    folder = record_three(tmp_path, scope="global")
    path = folder / "steps-000000.parquet"
    group = pq.read_metadata(path).row_group(0)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "status")

    def read() -> dict[str, Any]:
        rows = open_run(tmp_path).sessions[0].segments[0].steps()
        return {name: value.tolist() for name, value in vars(rows).items() if name != "phases"}

    truth = read()
    for page in (column.dictionary_page_offset, column.data_page_offset):
        for bit in range(8 * page, 8 * (page + 40)):
            flip(path, bit)
            with contextlib.suppress(DamagedSegmentError):
                assert read() == truth, bit
            flip(path, bit)


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
def test_where_placements_are_lost_no_slot_has_an_expert(tmp_path: Path, how: str) -> None:
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


def test_what_another_rank_states_is_not_lost(tmp_path: Path) -> None:
    folders = [record_three(tmp_path, rank, scope="local") for rank in (0, 1)]
    truth = expert_report(open_run(tmp_path)).to_json()
    for folder in folders:
        flip(folder / "placements-000001.parquet", 8 * 20)
        run = open_run(tmp_path)
        assert expert_report(run).to_json() == truth
        assert codes(check_run(run).findings) == {"damaged_file", "conservation"}
        flip(folder / "placements-000001.parquet", 8 * 20)


@pytest.mark.parametrize(("table", "seen"), [("loads", 30), ("steps", 20)])
def test_other_damage_says_nothing_against_placements(tmp_path: Path, table: str, seen: int) -> None:
    folders = [record_three(tmp_path, rank, scope="local") for rank in (0, 1)]
    flip(folders[1] / f"{table}-000001.parquet", 8 * 20)
    run = open_run(tmp_path)
    assert codes(check_run(run).findings) == {"damaged_file", "incomplete_steps", "conservation"}
    assert [step for step, *_ in run.placements().rows()] == [0] * LAYERS + [12] * LAYERS + [22] * LAYERS
    # A segment is left out as far as it must be.
    assert sum(run.steps()["ranks_recorded"].to_list()) == 50
    flip(folders[0] / f"{table}-000001.parquet", 8 * 20)
    run = open_run(tmp_path)
    check_run(run)
    assert len(run.steps()) == seen


def test_of_one_reading_in_another_the_outer_one_begins_anew(tmp_path: Path) -> None:
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


def test_steps_and_loads_must_tell_of_the_same_steps(tmp_path: Path) -> None:
    """As no writer of ours would leave them: right checksums, and a step without its loads."""
    folder = record_three(tmp_path, scope="global")
    path = folder / "loads-000001.parquet"
    table = pq.read_table(path)
    table = table.filter(pc.field("step") != 15)
    pq.write_table(table, path, row_group_size=len(table), write_page_checksum=True)
    data = b""
    for frame in manifest(folder):
        header = frame.header
        if header.get("seq") == 1:
            entry = {"name": path.name, "bytes": path.stat().st_size, "rows": len(table)}
            entry["footer_crc32"] = footer_crc32(path)
            header = {**header, "files": {**header["files"], "loads": entry}}
        data += frames.encode(frame.kind, header)
    (folder / MANIFEST_FILE).write_bytes(data)
    assert "steps_differ" in codes(check_run(open_run(tmp_path)).findings)


# ---- limits of the reader, and claims


def test_many_ranks_and_few_open_files(tmp_path: Path) -> None:
    """A run may have more files, and a step more ranks, than a process may open files."""
    ranks = 24
    for rank in range(ranks):
        with open_writer(
            tmp_path, ep_rank=rank, ep_size=ranks, num_logical_experts=ranks, segment_steps=4, scope="local"
        ) as writer:
            for step in range(8):
                writer.record(step, load_of(step, rank, slots=ranks), map_of(0, slots=ranks))
    script = """
        import resource, sys
        from eplb_analyze import open_run
        from eplb_analyze.analysis.experts import expert_report
        from eplb_analyze.analysis.summary import summarize
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        run = open_run(sys.argv[1])
        print(summarize(run).steps.to_json()["recorded"], expert_report(run).recorded, run.findings)
    """
    assert run_child(script, tmp_path) == "8 8 []\n"


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    """Of killed writers there are as many open journals as ranks."""
    script = """
        import os, sys
        from helpers import load_of, map_of, open_writer
        for rank in range(24):
            writer = open_writer(sys.argv[1], ep_rank=rank, ep_size=24, num_logical_experts=24, scope="local")
            writer.record(0, load_of(0, rank, slots=24), map_of(0, slots=24))
            writer.flush()
        os._exit(0)
    """
    run_child(script, tmp_path)
    script = """
        import errno, resource, sys
        from eplb_analyze import open_run
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 100))
        try:
            print(open_run(sys.argv[1]).findings)
        except OSError as error:
            print(error.errno == errno.EMFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        print(open_run(sys.argv[1]).findings)
    """
    assert run_child(script, tmp_path) == "True\n[]\n"
    script = """
        import resource, sys
        from eplb_analyze.cli import app as cli
        from eplb_analyze.analysis import summary
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        sys.argv[1:] = ["summary", sys.argv[1]]
        cli.main()
    """
    with start_child(script, tmp_path) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 3
    assert err.startswith("eplb-analyze: error: ")
    assert err.endswith("too many open files; allow more with `ulimit -n 4096`\n")


def test_a_small_file_that_stands_for_very_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size says nothing: a value that is repeated takes no bytes. Nothing of it is read."""
    record_three(tmp_path, scope="global")
    monkeypatch.setattr(segments, "MAX_DECODED_BYTES", 8 * 10 * 6 - 1)
    run = open_run(tmp_path)
    assert run.steps().is_empty()
    assert {f.text.split(": ")[1] for f in run.findings} >= {
        "more than 0 GiB would have to be read at once; skipped"
    }
    monkeypatch.setattr(segments, "MAX_DECODED_BYTES", 8 * 10 * 6)
    assert len(open_run(tmp_path).steps()) == 30
