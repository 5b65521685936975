"""After a power cut: sealed steps are there, whatever the disk kept of the rest; `recover` loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from helpers import cli, load_of, manifest, map_of, open_writer, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from power_cut import Disk, restore

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.errors import DumpError, NotInDumpError
from eplb_analyze.live.watch import Follower
from eplb_analyze.transfer.copy import copy_run
from eplb_analyze.transfer.recover import recover_dump
from eplb_dump import ExpertLoadWriter
from eplb_dump.format import segment
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE, journal_name
from eplb_dump.format.session import dump_json, load_json

STEPS = 40


def recorded(root: Path) -> list[int]:
    """The complete steps that a reader shows, with the right loads."""
    run = open_run(root)
    try:
        rows = run.loads(layers=[0]).rows(named=True)
    except NotInDumpError:  # no load was recorded yet
        return []
    for row in rows:
        assert row["load"] == load_of(row["step"])[0].tolist(), row["step"]
    return [row["step"] for row in rows]


def errors(root: Path) -> list[str]:
    """What `check` finds, except that these loads are made up."""
    found = check_run(open_run(root)).findings
    return [f.text for f in found if f.severity == "error" and f.code != "conservation"]


# ---- every state that the disk may keep


@pytest.mark.parametrize("idle", [0, 20], ids=["busy", "first segment without a load"])
def test_power_cut_at_any_call_loses_no_sealed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: int
) -> None:
    root, steps, writer = tmp_path / "dump", 20, None

    def sealed() -> int:
        return 0 if writer is None else writer.stats().segments_sealed

    with monkeypatch.context() as patch:
        disk = Disk(root, patch, sealed)
        writer = open_writer(root, scope="global", segment_steps=steps, flush_interval=0.01)
        for step in range(3 * steps):
            if step < idle:
                writer.skip()
            else:
                writer.record(step, load_of(step), map_of(step // 15))
            if step % 5 == 4:
                assert writer.flush(60)
        assert writer.close(60)
    disk.close()
    assert {moment.promised for moment in disk.moments} == {0, 1, 2, 3}
    lost = 0
    for number, moment in enumerate(disk.moments):
        for seed in range(3):
            left = restore(moment.cut(seed), writer.folder, root, tmp_path / f"{number}-{seed}")
            try:
                found = recorded(left)
            except DumpError:  # no session
                assert moment.promised * steps <= idle, moment.call
                continue
            assert set(found) >= set(range(idle, moment.promised * steps)), (moment.call, seed)
            if moment.promised:
                assert "session_rebuilt" not in {f.code for f in open_run(left).findings}, moment.call
            recover_dump(left)
            assert set(recorded(left)) >= set(found), (moment.call, seed)
            lost += len(found) < 3 * steps - idle
            shutil.rmtree(left)
    assert lost  # a disk that keeps everything proves nothing


def test_each_step_of_sealing_is_synced_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch, lambda: 0)
        with open_writer(tmp_path, scope="global") as writer:
            writer.record(0, load_of(0), map_of())
    disk.close()
    tables = ("placements", "loads", "minutes", "steps")
    files = [f"{table}-000000.parquet" for table in tables]
    # By the constructor, for which an engine waits, and again with the shape of the first load.
    unsynced = [("replace", SESSION_FILE), ("replace", SESSION_FILE)]
    session = [("fsync", SESSION_FILE)]
    above = [("fsync", folder) for folder in (".", "..", "../..", "../../..", "../../../..")]
    sealing = [
        *(("fsync", f"{name}.tmp") for name in files),
        ("fsync", MANIFEST_FILE),
        ("fsync", "."),  # which has the manifest from now on
        *(("replace", name) for name in files),
        ("fsync", "."),
        ("unlink", journal_name(0)),
        ("fsync", "."),
        ("fsync", MANIFEST_FILE),  # the final accounting
    ]
    calls = [call for call in disk.calls if call[1].count("..") < 5]
    assert calls == [*unsynced, *session, *above, *sealing]


def test_engine_thread_never_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced_by: set[str] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced_by.add(threading.current_thread().name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = open_writer(tmp_path, scope="global", segment_steps=5)
    for step in range(12):
        writer.record(step, load_of(step), map_of())
    assert writer.flush(60)
    assert writer.close(60)
    assert synced_by == {"eplb-dump-rank0-seal"}


# ---- a journal beside its sealed segment


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int]]:
    """A dump with one sealed segment, its journal, and the byte at which each step of that is committed."""
    root = tmp_path_factory.mktemp("power") / "dump"
    writer = open_writer(root, scope="global", segment_steps=STEPS)
    path, ends = writer.folder / journal_name(0), []
    for step in range(STEPS):
        writer.record(step, load_of(step), map_of(step // 25))
        assert writer.flush(60)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    assert writer.close(60)
    return root, data, ends


def session_folder(root: Path) -> Path:
    (folder,) = root.glob("run=*/model=*/rank=*/session=*")
    return folder


def without_entry(folder: Path) -> None:
    """Drop the segment from the manifest, which then has only its first frame and the final accounting."""
    kept = [frame for frame in manifest(folder) if frame.kind != "sealed"]
    data = (folder / MANIFEST_FILE).read_bytes()
    (folder / MANIFEST_FILE).write_bytes(b"".join(data[frame.start : frame.end] for frame in kept))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.parquet")}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["absent", "whole", "shortened", "empty", "zeros"]),
    cut=st.floats(0, 1),
    table=st.sampled_from(["", "steps", "loads", "placements"]),
    how=st.sampled_from(["missing", "truncated", "flipped"]),
    listed=st.booleans(),
)
def test_reader_and_seal_keep_what_is_there(
    sealed: tuple[Path, bytes, list[int]],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    cut: float,
    table: str,
    how: str,
    listed: bool,
) -> None:
    """``table`` is the damaged one, if any; ``listed``: whether the manifest has the segment."""
    source, data, ends = sealed
    root = shutil.copytree(source, tmp_path_factory.mktemp("case") / "dump")
    folder = session_folder(root)
    length = {"shortened": int(cut * (len(data) - 1)), "empty": 0}.get(kind, len(data))
    if kind != "absent":
        content = bytes(len(data)) if kind == "zeros" else data[:length]
        (folder / journal_name(0)).write_bytes(content)
    in_journal = sum(end <= length for end in ends) if kind in ("whole", "shortened") else 0
    if table:
        path = folder / f"{table}-000000.parquet"
        content = path.read_bytes()
        at = len(content) // 3
        flipped = content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]
        path.unlink() if how == "missing" else path.write_bytes(
            content[:at] if how == "truncated" else flipped
        )
    if not listed:
        without_entry(folder)
    harmless = table in ("", "placements")
    expected = STEPS if listed and harmless else in_journal
    before = digests(folder)

    found = recorded(root)
    assert found == list(range(expected))
    if expected < STEPS and (listed or not in_journal):
        assert errors(root)
    if listed and not table:
        assert not errors(root)
        copy_run(root, root.parent / "copy")
        assert recorded(root.parent / "copy") == found

    report = recover_dump(root)
    assert len(recorded(root)) >= expected
    if listed and not table:
        assert digests(folder) == before
        assert report.removed == ([str(folder / journal_name(0))] if kind != "absent" else [])
        assert report.skipped == report.sealed == []
    if listed:
        rows = [f.header["files"]["steps"]["rows"] for f in manifest(folder) if f.kind == "sealed"]
        assert set(rows) == {STEPS}
    if in_journal == STEPS and table and listed:
        assert not errors(root)  # sealed again from the journal
    shutil.rmtree(root.parent)


@pytest.mark.parametrize("kind", ["shortened", "empty", "zeros"])
def test_watch_reads_the_sealed_segment(
    sealed: tuple[Path, bytes, list[int]], tmp_path: Path, kind: str
) -> None:
    source, data, ends = sealed
    root = shutil.copytree(source, tmp_path / "dump")
    content = {"shortened": data[: ends[10]], "empty": b"", "zeros": bytes(len(data))}[kind]
    expected = Follower(source).look()
    (session_folder(root) / journal_name(0)).write_bytes(content)
    watcher = Follower(root)
    for _ in range(3):
        look = watcher.look()
        assert (look.last_step, look.findings) == (expected.last_step, expected.findings)
        assert look.last_step == STEPS - 1


def test_files_that_were_not_renamed_yet_get_their_names(
    sealed: tuple[Path, bytes, list[int]], tmp_path: Path
) -> None:
    """The cut came between the manifest's entry and the last rename; the journal never reached the disk."""
    root = shutil.copytree(sealed[0], tmp_path / "dump")
    folder = session_folder(root)
    for name in ("loads-000000.parquet", "steps-000000.parquet"):
        (folder / name).rename(folder / f"{name}.tmp")
    (folder / journal_name(0)).write_bytes(b"")
    assert errors(root)
    report = recover_dump(root)
    assert [Path(name).name for name in report.restored] == ["loads-000000.parquet", "steps-000000.parquet"]
    assert recorded(root) == list(range(STEPS))
    assert not errors(root)
    assert not list(folder.glob("*.tmp"))


# ---- session.json


@pytest.fixture
def unsealed(tmp_path: Path) -> Path:
    """A dump with one sealed segment and one journal."""
    root = tmp_path / "written"
    writer = open_writer(root, scope="global", segment_steps=10)
    for step in range(14):
        writer.record(step, load_of(step), map_of())
    assert writer.flush(60)
    while writer.stats().segments_sealed < 1:
        threading.Event().wait(0.01)
    copy = shutil.copytree(root, tmp_path / "dump")
    writer.close()
    return copy


@pytest.mark.parametrize("content", [None, b"", b"{", bytes(600)], ids=["missing", "empty", "torn", "zeros"])
@pytest.mark.parametrize("source", [MANIFEST_FILE, "journal-000001.frames", "loads-000000.parquet"])
def test_session_file_is_rebuilt(unsealed: Path, content: bytes | None, source: str) -> None:
    folder = session_folder(unsealed)
    path = folder / SESSION_FILE
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    if source != MANIFEST_FILE:
        (folder / MANIFEST_FILE).unlink()
    if source.endswith(".parquet"):
        (folder / "journal-000001.frames").unlink()
    # Without a manifest, the sealed segment is read as its files say.
    readable = range(10 if source.endswith(".parquet") else 14)
    run = open_run(unsealed)
    (finding,) = [f for f in run.findings if f.code == "session_rebuilt"]
    assert finding.severity == "warning"
    assert source in finding.text
    assert str(path) in finding.text
    assert recorded(unsealed) == list(readable)
    summary = cli("summary", unsealed)
    assert "session.json" in summary.stdout + summary.stderr
    assert str(path) in recover_dump(unsealed).restored
    assert path.read_bytes() == whole
    assert "session_rebuilt" not in {f.code for f in open_run(unsealed).findings}


def test_session_file_of_another_folder_or_version_is_not_rebuilt(unsealed: Path) -> None:
    path = session_folder(unsealed) / SESSION_FILE
    own = load_json(path.read_bytes())
    for change in ({"format_version": "2.0"}, {"session_id": "another"}):
        path.write_bytes(dump_json({**own, **change}))
        with pytest.raises(DumpError, match=r"newer than this program reads|belongs to another folder"):
            open_run(unsealed)


def test_copy_writes_a_rebuilt_session_file(unsealed: Path, tmp_path: Path) -> None:
    (session_folder(unsealed) / SESSION_FILE).write_bytes(b"")
    report = copy_run(unsealed, tmp_path / "copy")
    assert report.damaged == []
    assert recorded(tmp_path / "copy") == list(range(14))
    assert "session_rebuilt" not in {f.code for f in open_run(tmp_path / "copy").findings}


# ---- closed, or killed


def not_closed(root: Path) -> bool:
    return "not_closed" in {f.code for f in check_run(open_run(root)).findings}


def test_writer_that_was_closed_unsealed_is_not_called_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    root = tmp_path / "dump"
    with monkeypatch.context() as patch:
        patch.setattr(segment, "seal", full)
        writer = open_writer(root, scope="global", segment_steps=10)
        for step in range(20):  # the last segment ends with the last step
            writer.record(step, load_of(step), map_of())
        assert writer.flush(60)
        killed = shutil.copytree(root, tmp_path / "killed")
        writer.close(60)
    texts = {f.code: f.text for f in check_run(open_run(root)).findings}
    assert "of closed writers not sealed" in texts["unsealed_journal"]
    assert not not_closed(root)
    assert not_closed(killed)
    assert Follower(root).look().closed
    assert not Follower(killed).look().closed
    for dump in (root, killed):
        recover_dump(dump)
        assert recorded(dump) == list(range(20))
    assert not not_closed(root)
    assert not_closed(killed)
    (closed,) = [frame for frame in manifest(session_folder(root)) if frame.kind == "closed"]
    assert closed.header["stats"]["recorded"] == 20


def test_manifest_that_is_gone_is_rebuilt_from_the_sealed_files(tmp_path: Path) -> None:
    """A segment that lacks its loads, and one with a file of another session, stay out."""
    root = tmp_path / "dump"
    write(root, steps=64)
    before = open_run(root).balancedness(by="step")
    first, second = sorted(path.parent for path in root.rglob(MANIFEST_FILE))
    for folder in (first, second):
        (folder / MANIFEST_FILE).unlink()
    run = open_run(root)
    assert run.balancedness(by="step").equals(before)
    codes = [f.code for f in run.findings]
    assert codes.count("manifest_rebuilt") == 2
    assert "unlisted_file" not in codes
    assert cli("summary", root).returncode == 0

    (first / "loads-000001.parquet").unlink()
    shutil.copy(second / "loads-000002.parquet", first / "loads-000002.parquet")
    kept = [step for step in range(64) if step // 16 not in (1, 2)]
    run = open_run(root)
    assert run.balancedness(by="step").equals(before.filter(pl.col("step").is_in(kept)))
    assert "unlisted_file" in {f.code for f in run.findings}

    restored = json.loads(cli("recover", root, "--json").stdout)["restored"]
    assert {*restored} == {str(folder / MANIFEST_FILE) for folder in (first, second)}
    run = open_run(root)
    assert "manifest_rebuilt" not in {f.code for f in run.findings}
    assert run.balancedness(by="step").equals(before.filter(pl.col("step").is_in(kept)))
    assert json.loads(cli("recover", root, "--json").stdout)["restored"] == []


def test_manifest_is_not_rebuilt_while_its_writer_lives(tmp_path: Path) -> None:
    load, placement = np.ones((1, 2), int), np.array([[0, 1]])
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=2, ep_size=1, run_id="r", segment_steps=4
    ) as writer:
        for step in range(6):
            writer.record(step, load, placement)
        assert writer.flush(60)
        manifests: list[Path] = []
        while not manifests or len([*tmp_path.rglob("journal-*")]) > 1:
            manifests = [*tmp_path.rglob(MANIFEST_FILE)]
            time.sleep(0.01)
        manifests[0].unlink()
        assert json.loads(cli("recover", tmp_path, "--json").stdout)["restored"] == []
        assert not manifests[0].exists()
