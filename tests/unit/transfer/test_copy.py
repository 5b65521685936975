"""`copy`: the same bytes, verified; parts of a run, buckets, interruptions, existing targets."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import assert_golden, cli, load_of, map_of, one_error, open_writer, without_times, write
from s3 import S3

from eplb_analyze import atomic, open_run
from eplb_analyze.errors import DumpError
from eplb_analyze.storage.path import storage_path
from eplb_analyze.transfer import copy, copy_target
from eplb_analyze.transfer.copy import copy_run
from eplb_analyze.transfer.copy_target import UNFINISHED_COPY, Target
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps in segments of 16; placements change at 20."""
    root = tmp_path_factory.mktemp("dump")
    write(root, ranks=3, ep_size=3, step_ms=50)
    return root


def content(root: Path) -> dict[str, bytes]:
    """All files, without temporary ones."""
    files = [f for f in root.rglob("*") if f.is_file() and f.suffix != ".tmp"]
    return {str(f.relative_to(root)): f.read_bytes() for f in files}


def sessions(root: Path, rank: int = 0) -> list[Path]:
    return sorted(root.glob(f"run=*/model=*/rank={rank:05d}/session=*"))


def loads(where: str | Path, first: int, end: int) -> list[Any]:
    run = open_run(where)
    frame = run.loads((first, end))
    assert len(frame)
    return frame.rows()


# ---- whole runs


def test_copy_has_the_same_bytes(dump: Path, tmp_path: Path) -> None:
    before = content(dump)
    result = cli("copy", "--json", dump, tmp_path / "new/place")
    assert (result.returncode, result.stderr) == (0, "")
    assert content(tmp_path / "new/place") == before == content(dump)
    document = json.loads(result.stdout)
    assert (document["sessions"], document["files"], document["files_there"]) == (3, len(before), 0)
    assert document["bytes"] == sum(map(len, before.values()))
    sealed = [pq.read_metadata(path).num_rows for path in dump.rglob("*.parquet")]
    assert document["rows"] == sum(sealed) > 0
    assert not [*dump.rglob("journal-*")]
    assert not [*(tmp_path / "new").rglob("*.tmp")]


def test_same_copy_again_changes_nothing(dump: Path, tmp_path: Path) -> None:
    cli("copy", dump, tmp_path)
    times = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    again = json.loads(cli("copy", "--json", dump, tmp_path).stdout)
    assert again["files_there"] == again["files"] == len(content(dump))
    assert {f: f.stat().st_mtime_ns for f in times if f.is_file()} == {
        f: t for f, t in times.items() if f.is_file()
    }
    assert content(tmp_path) == content(dump)
    onto_itself = json.loads(cli("copy", "--json", dump, dump).stdout)
    assert onto_itself["files_there"] == onto_itself["files"]


def test_copy_to_a_bucket_and_back_has_the_same_bytes(dump: Path, s3: S3, tmp_path: Path) -> None:
    there, other = f"{s3.bucket()}/dumps", f"{s3.bucket()}/x"
    assert cli("copy", dump, s3.address(there)).returncode == 0
    assert s3.get(there) == content(dump)
    assert cli("copy", s3.address(there), s3.address(other)).returncode == 0
    assert s3.get(other) == content(dump)
    assert cli("copy", s3.address(other), tmp_path).returncode == 0
    assert content(tmp_path) == content(dump)
    s3.count()
    again = json.loads(cli("copy", "--json", dump, s3.address(there)).stdout)
    assert again["files_there"] == again["files"]
    assert "PUT" not in s3.count()["requests"]


def test_one_run_or_one_model_is_copied(tmp_path: Path) -> None:
    root = tmp_path / "dump"
    write(root, run_id="old", steps=3)
    write(root, run_id="new", steps=3)
    write(root, run_id="new", steps=3, model="draft")
    newest = cli("copy", root, tmp_path / "a")
    assert "2 runs" in newest.stderr
    assert sorted(p.name for p in (tmp_path / "a").glob("run=*/model=*")) == ["model=draft", "model=org--moe"]
    cli("copy", "--run", "new", "--model", "draft", root, tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").glob("run=*/model=*")] == ["model=draft"]
    cli("copy", "--run", "old", root, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").glob("run=*")) == ["run=new", "run=old"]
    one_error(cli("copy", "--run", "zz", root, tmp_path / "c"), 2, "no run 'zz'")
    one_error(cli("copy", "--model", "zz", root, tmp_path / "c"), 2, "no model 'zz'")
    assert not (tmp_path / "c").exists()


# ---- parts


@pytest.mark.parametrize("to_bucket", [False, True])
def test_step_range_copies_whole_segments_and_earlier_placements(
    to_bucket: bool, dump: Path, s3: S3, tmp_path: Path
) -> None:
    """The earlier placements are needed to know the logical experts of the loads."""
    target = s3.address(f"{s3.bucket()}/part") if to_bucket else str(tmp_path)
    document = json.loads(cli("copy", "--steps", "20-29", "--json", dump, target).stdout)
    assert (document["first_step"], document["last_step"]) == (20, 29)
    assert document["segments_left_out"] == 3 * 2
    assert loads(target, 16, 32) == loads(dump, 16, 32)
    assert open_run(target).step_range == (16, 31)
    assert open_run(target).placements().rows() == open_run(dump).placements().rows()
    for command in ("layer 1 --steps 16-31", "experts --steps 16-31", "placement --step 18"):
        ours, theirs = (cli(*command.split(), "--json", where) for where in (target, dump))
        assert (ours.returncode, theirs.returncode) == (0, 0)
        # The copy has no times of steps that it lacks, such as the one from which a placement is in force.
        assert without_times(json.loads(ours.stdout)) == without_times(json.loads(theirs.stdout))
    checked = json.loads(cli("check", "--json", target).stdout)
    assert checked["ok"]
    assert [f["code"] for f in checked["findings"]] == ["partial_copy"]
    assert "steps 20 to 29" in checked["findings"][0]["text"]


def test_part_of_a_part_is_copied(dump: Path, tmp_path: Path) -> None:
    cli("copy", "--steps", "20-", dump, tmp_path / "a")
    cli("copy", "--steps", "35-", tmp_path / "a", tmp_path / "b")
    assert open_run(tmp_path / "b").step_range == (32, 39)
    assert loads(tmp_path / "b", 32, 40) == loads(dump, 32, 40)
    assert open_run(tmp_path / "b").placements().rows() == open_run(dump).placements().rows()
    assert json.loads(cli("check", "--json", tmp_path / "b").stdout)["ok"]


def test_ranks_are_copied_apart_and_completed_later(dump: Path, tmp_path: Path) -> None:
    document = json.loads(cli("copy", "--ranks", "0-1", "--json", dump, tmp_path).stdout)
    assert (document["ranks"], document["sessions"]) == ([0, 1], 2)
    assert content(tmp_path) == {k: v for k, v in content(dump).items() if "rank=00002" not in k}
    codes = {f["code"] for f in json.loads(cli("check", "--json", tmp_path).stdout)["findings"]}
    assert "missing_ranks" in codes
    assert "damaged_file" not in codes
    # The other rank can be copied later, which completes the run.
    cli("copy", "--ranks", "2", dump, tmp_path)
    assert content(tmp_path) == content(dump)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "3"], "no data of rank 3"),
        (["--ranks", "1-0"], "not a list of ranks"),
        (["--ranks", "a"], "not a list of ranks"),
        (["--steps", "400-"], "run r has no segment with these steps"),
        (["--steps", "4"], "--step 4"),
    ],
)
def test_missing_ranks_and_steps_are_refused(
    arguments: list[str], words: str, dump: Path, tmp_path: Path
) -> None:
    result = cli("copy", *arguments, dump, tmp_path / "new")
    assert result.returncode == 2
    assert words in result.stderr.replace("\n", " ")
    assert not (tmp_path / "new").exists()


# ---- interrupted


def test_failed_upload_is_incomplete_and_continues(dump: Path, s3: S3, tmp_path: Path) -> None:
    there = f"{s3.bucket()}/dumps"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with s3.failing(key="rank=00001", method="PUT", status=503):
        failed = cli("copy", dump, s3.address(there), env={"TMPDIR": str(temporary)})
        one_error(failed, 3, "the server reported an internal error", "rank=00001")
    assert not [*temporary.glob("*.eplb.tmp")]
    result = cli("summary", s3.address(there))
    assert result.returncode == 3
    cli("copy", dump, s3.address(there))
    assert s3.get(there) == content(dump)


def test_all_sessions_of_a_rank_are_marked_before_the_first_is_copied(tmp_path: Path, s3: S3) -> None:
    """Otherwise the first of two sessions alone would look like a complete, shorter run."""
    root = tmp_path / "dump"
    for start in (0, 10):
        write_global(root, start)
    source = s3.address(s3.put(root))
    second = sessions(root)[1].name
    with s3.failing(key=f"{second}/loads", status=503):
        one_error(cli("copy", source, tmp_path / "copy"), 3, "the server reported an internal error")
    result = cli("summary", "--json", tmp_path / "copy")
    assert result.returncode == 3
    assert second in result.stderr


def write_global(root: Path, start: int, steps: int = 10) -> None:
    with open_writer(root, scope="global") as writer:
        for step in range(start, start + steps):
            writer.record(step, load_of(step), map_of())


def test_journal_of_an_earlier_attempt_is_removed_once_it_is_sealed(tmp_path: Path) -> None:
    """The old journal in the copy would hide the sealed segment."""
    root, to = tmp_path / "dump", tmp_path / "copy"
    with open_writer(root, scope="global", segment_steps=8) as writer:
        for step in range(4):
            writer.record(step, load_of(step), map_of())
        assert writer.flush(10)
        (source,) = sessions(root)
        assert [p.name for p in source.glob("journal*")] == ["journal-000000.frames"]
        cli("copy", root, to)
        (copied,) = sessions(to)
        (copied / SESSION_FILE).unlink()  # as if the copy had been killed
        (copied / UNFINISHED_COPY).mkdir()
        for step in range(4, 12):
            writer.record(step, load_of(step), map_of())
    assert not [*source.glob("journal*")]
    assert cli("copy", root, to).returncode == 0
    assert content(to) == content(root)
    assert loads(to, 0, 12) == loads(root, 0, 12)


# ---- existing targets


def test_different_file_in_the_target_is_kept(dump: Path, tmp_path: Path) -> None:
    cli("copy", dump, tmp_path)
    victim = sessions(tmp_path, 1)[0] / "loads-000001.parquet"
    victim.write_bytes(victim.read_bytes()[:-1] + b"X")
    before = content(tmp_path)
    one_error(cli("copy", dump, tmp_path), 2, str(victim), "was not changed")
    assert content(tmp_path) == before


def test_folder_with_foreign_files_is_refused(dump: Path, tmp_path: Path) -> None:
    folder = tmp_path / sessions(dump, 1)[0].relative_to(dump)
    folder.mkdir(parents=True)
    (folder / "loads-000000.parquet").write_bytes(b"mine")
    one_error(cli("copy", dump, tmp_path), 2, str(folder), "`copy` did not write")
    assert (folder / "loads-000000.parquet").read_bytes() == b"mine"


def test_part_onto_the_whole_run_is_refused(dump: Path, tmp_path: Path) -> None:
    cli("copy", dump, tmp_path)
    said = ("it contains more than the selected steps", "choose another destination")
    one_error(cli("copy", "--steps", "20-", dump, tmp_path), 2, *said)
    assert content(tmp_path) == content(dump)
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize(
    "to", ["TMP/run=r", "TMP/run=r/inner", "s3://b/dumps/run=x/model=y", "s3://b/run=x/y"]
)
def test_target_inside_a_run_is_refused(to: str, dump: Path, tmp_path: Path) -> None:
    one_error(cli("copy", dump, to.replace("TMP", str(tmp_path))), 2, "pass the folder of the dump")


def test_symbolic_link_in_the_target_is_refused(dump: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    link = tmp_path / "to/run=r"
    link.symlink_to(tmp_path / "elsewhere")
    one_error(cli("copy", dump, tmp_path / "to"), 2, str(link), "symbolic link")
    assert not [*(tmp_path / "elsewhere").iterdir()]
    (tmp_path / "inside").symlink_to(dump / "run=r")
    one_error(cli("copy", dump, tmp_path / "inside/x"), 2, "is inside run=r")


def test_damaged_file_is_added_after_its_repair(dump: Path, tmp_path: Path) -> None:
    root, to = shutil.copytree(dump, tmp_path / "dump"), tmp_path / "copy"
    victim = sessions(root, 1)[0] / "loads-000001.parquet"
    data = victim.read_bytes()
    victim.write_bytes(data[:-30])
    assert cli("copy", root, to).returncode == 3
    assert cli("check", to).returncode == 1
    victim.write_bytes(data)
    assert cli("copy", root, to).returncode == 0
    assert content(to) == content(dump)


def test_good_copy_of_a_file_stays_when_its_source_is_damaged(dump: Path, tmp_path: Path) -> None:
    """A copy continues, and its file is better than the source's now."""
    root, to = shutil.copytree(dump, tmp_path / "dump"), tmp_path / "copy"
    cli("copy", root, to)
    folder = sessions(to, 1)[0]
    (folder / SESSION_FILE).unlink()
    (folder / UNFINISHED_COPY).mkdir()
    victim = sessions(root, 1)[0] / "loads-000001.parquet"
    victim.write_bytes(victim.read_bytes()[:-30])
    one_error(cli("copy", root, to), 3, str(victim))
    assert content(to) == content(dump)


@pytest.mark.parametrize("to_bucket", [False, True])
def test_part_is_extended_if_all_of_it_stays(to_bucket: bool, dump: Path, s3: S3, tmp_path: Path) -> None:
    path = f"{s3.bucket()}/part"
    target = s3.address(path) if to_bucket else str(tmp_path)
    cli("copy", "--steps", "20-29", "--ranks", "0-1", dump, target)
    before = s3.get(path) if to_bucket else content(tmp_path)
    said = ("it contains a copy of steps 20-29 only", "choose another destination")
    one_error(cli("copy", "--steps", "0-9", dump, target), 2, *said)
    # Rank 2 was not begun either, and nothing is left behind.
    assert (s3.get(path) if to_bucket else content(tmp_path)) == before
    assert not [*tmp_path.rglob("*.tmp")]
    assert not sessions(tmp_path, 2)
    assert cli("copy", "--steps", "0-29", dump, target).returncode == 0
    assert open_run(target).step_range == (0, 31)
    assert loads(target, 0, 32) == loads(dump, 0, 32)
    assert json.loads(cli("check", "--json", target).stdout)["ok"]
    assert cli("copy", dump, target).returncode == 0
    assert (s3.get(path) if to_bucket else content(tmp_path)) == content(dump)


def test_copy_grows_with_a_live_run(tmp_path: Path) -> None:
    root, to = tmp_path / "dump", tmp_path / "copy"
    with open_writer(root, scope="global", segment_steps=8) as writer:
        for first, end in ((0, 3), (3, 6), (6, 21)):
            for step in range(first, end):
                writer.record(step, load_of(step), map_of())
            assert writer.flush(10)
            result = cli("copy", root, to)
            assert result.returncode == 0, result.stderr
            assert loads(to, 0, 30) == loads(root, 0, 30)
            assert len(loads(to, 0, 30)) == 3 * end
    assert cli("copy", root, to).returncode == 0
    assert content(to) == content(root)


def test_journal_without_a_step_is_left_out(tmp_path: Path) -> None:
    """Its writer was killed at the first write, so there is no manifest either."""
    write_global(tmp_path / "dump", 0, steps=3)
    (source,) = sessions(tmp_path / "dump")
    for file in source.iterdir():
        if file.name != SESSION_FILE:
            file.unlink()
    (source / "journal-000000.frames").write_bytes(b"")
    assert cli("copy", tmp_path / "dump", tmp_path / "copy").returncode == 0
    assert [p.name for p in sessions(tmp_path / "copy")[0].iterdir()] == [SESSION_FILE]


@pytest.mark.parametrize("moment", ["_journals", "sound_manifest", "put"])
def test_segment_sealed_during_the_copy_leaves_no_gap(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer seals two segments after the copy has listed, read or copied something."""
    root, to = tmp_path / "dump", tmp_path / "copy"
    with open_writer(root, scope="global", segment_steps=8) as writer:

        def record(steps: range) -> None:
            for step in steps:
                writer.record(step, load_of(step), map_of(step // 8))
            assert writer.flush(10)

        record(range(12))
        (source,) = sessions(root)

        def seal_two_segments() -> None:
            record(range(12, 30))
            deadline = time.monotonic() + 60
            while [p.name for p in source.glob("journal-*")] != ["journal-000003.frames"]:
                assert time.monotonic() < deadline
                time.sleep(0.005)

        owner: Any = {"_journals": copy._SessionCopy, "sound_manifest": copy, "put": Target}[moment]
        held, step_of_copy = Target.held, getattr(owner, moment)
        pending = [seal_two_segments]

        def followed_by_sealing(*arguments: Any) -> Any:
            result = step_of_copy(*arguments)
            if pending:
                pending.pop()()
            return result

        @contextmanager
        def holding(self: Target) -> Iterator[None]:
            with held(self):
                monkeypatch.setattr(owner, moment, followed_by_sealing)
                yield

        monkeypatch.setattr(Target, "held", holding)
        report = copy_run(storage_path(root), to)
        monkeypatch.undo()
        assert not pending
    assert report.damaged == []
    truth = loads(root, 0, 30)
    found = loads(to, 0, 30)
    assert found == truth[: len(found)]
    assert len(found) >= 3 * 12
    checked = json.loads(cli("check", "--json", to).stdout)
    assert {f["code"] for f in checked["findings"]} <= {"not_closed", "unsealed_journal", "conservation"}
    assert cli("copy", root, to).returncode == 0
    assert content(to) == content(root)


# ---- concurrent changes


def test_without_locks_files_of_another_copy_are_kept(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy completes while the first, of damaged files, is running."""
    damaged = shutil.copytree(dump, tmp_path / "damaged")
    for victim in damaged.rglob("loads-000001.parquet"):
        victim.unlink()
    to = tmp_path / "to"
    monkeypatch.setattr(atomic, "lock", lambda _: None)
    clean = Target.remove_superseded
    inner: list[Any] = []

    def overtaken(self: Any, *arguments: Any) -> None:
        if not inner:
            inner.append(None)  # the inner copy calls this function, too
            inner[0] = copy_run(storage_path(dump), to)
        clean(self, *arguments)

    monkeypatch.setattr(Target, "remove_superseded", overtaken)
    report = copy_run(storage_path(damaged), to)
    assert len(report.damaged) == 3
    assert inner[0].damaged == []
    assert content(to) == content(dump)
    assert not [*to.rglob("*.tmp")]


def test_file_removed_during_the_copy_is_reported(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(_: int, __: int) -> None:
        for file in tmp_path.rglob("loads-000001.parquet"):
            file.unlink()

    with pytest.raises(DumpError, match="it was removed during the copy"):
        copy_run(storage_path(dump), tmp_path, progress=last)


# ---- damage, unwritable targets


@pytest.mark.parametrize("offset", [1, 7])
@pytest.mark.parametrize("times", [1, 100])
def test_byte_changed_in_transit_is_detected(
    offset: int, times: int, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checksum covers the first bytes of a Parquet file and its page headers."""
    left = [times]
    digest = copy_target._digest

    def flipping(read: Any, write: Any = None, **options: Any) -> tuple[int, str]:
        if write is None or "loads-000001" not in str(getattr(read, "name", "")) or left[0] <= 0:
            return digest(read, write, **options)
        left[0] -= 1
        data = bytearray(read.read())
        data[offset] ^= 1
        return digest(io.BytesIO(data), write, **options)

    monkeypatch.setattr(copy_target, "_digest", flipping)
    report = copy_run(storage_path(dump), tmp_path)
    if times == 1:
        assert report.damaged == []
        assert content(tmp_path) == content(dump)
    else:
        assert len(report.damaged) == 3
        assert all("loads-000001" in text for text in report.damaged)
        assert not [*tmp_path.rglob("loads-000001*")]


def test_session_in_the_wrong_model_folder_is_left_out(tmp_path: Path) -> None:
    """Its copy would overwrite the session in the right folder."""
    root, to = tmp_path / "dump", tmp_path / "copy"
    write(root, ranks=1, ep_size=1)
    (model,) = root.glob("run=*/model=*")
    shutil.copytree(model, model.with_name("model=other"))
    before = content(model)
    for file in (model.parent / "model=other").rglob("loads-*"):
        file.unlink()
    result = cli("copy", root, to)
    one_error(result, 3, "model=other", "it states model 'org/moe'")
    assert content(to / model.relative_to(root)) == before
    assert [p.name for p in to.glob("run=*/model=*")] == [model.name]


@pytest.mark.parametrize(
    "name", ["loads-000001.parquet", "steps-000000.parquet", "placements-000001.parquet"]
)
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_damaged_file_is_left_out_and_reported(name: str, fault: str, dump: Path, tmp_path: Path) -> None:
    root, to = shutil.copytree(dump, tmp_path / "dump"), tmp_path / "copy"
    victim = sessions(root, 1)[0] / name
    data = bytearray(victim.read_bytes())
    data[20] ^= 1
    victim.write_bytes(data if fault == "flipped" else data[:-30])
    if fault == "gone":
        victim.unlink()
    result = cli("copy", "--json", root, to)
    one_error(result, 3, str(victim))
    assert UNFINISHED_COPY not in result.stderr
    assert len(json.loads(result.stdout)["damaged"]) == 1
    expected = content(root)
    expected.pop(str(victim.relative_to(root)), None)
    assert content(to) == expected
    assert cli("check", to).returncode == 1


@contextmanager
def small_files_only() -> Iterator[None]:
    """A write beyond 16 MiB of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "name", ["loads-000001.parquet", "journal-000000.frames", MANIFEST_FILE, SESSION_FILE]
)
def test_sparse_file_is_not_fetched(name: str, tmp_path: Path) -> None:
    """It claims 1 TiB, which would fill the disk, where a reader expects some kB."""
    root, to = tmp_path / "dump", tmp_path / "copy"
    with open_writer(root, scope="global", segment_steps=16) as writer:
        for step in range(40):
            writer.record(step, load_of(step), map_of())
    with open_writer(tmp_path / "live", scope="global", run_id="unsealed") as writer:
        writer.record(0, load_of(0), map_of())
        assert writer.flush(10)
        # The writer may rename a temporary file meanwhile.
        ignored = shutil.ignore_patterns("*.tmp")
        shutil.copytree(tmp_path / "live", root, ignore=ignored, dirs_exist_ok=True)
    victim = min(root.rglob(name))
    with victim.open("ab") as file:
        file.truncate(1 << 40)
    with small_files_only():
        result = cli("copy", "--run", "unsealed" if "journal" in name else "r", root, to)
    one_error(result, 3, name)
    assert not [*to.rglob(name)]


def test_session_with_a_damaged_manifest_is_left_out_and_a_session_file_rebuilt(
    dump: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(dump, tmp_path / "dump")
    manifest = sessions(root, 1)[0] / MANIFEST_FILE
    data = bytearray(manifest.read_bytes())
    data[-20] ^= 1
    manifest.write_bytes(data)
    one_error(cli("copy", root, tmp_path / "a"), 3, str(manifest), "damaged from byte")
    # The other sessions are copied, and nothing of this one.
    rank = "rank=00001"
    assert content(tmp_path / "a") == {k: v for k, v in content(dump).items() if rank not in k}
    assert not [*(tmp_path / "a").rglob(f"{rank}*")]
    shutil.copy(sessions(dump, 1)[0] / MANIFEST_FILE, manifest)
    (manifest.parent / SESSION_FILE).write_text("{}")
    assert cli("copy", root, tmp_path / "b").returncode == 0
    assert content(tmp_path / "b") == content(dump)


def test_symbolic_link_in_the_source_is_not_followed(dump: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dump, tmp_path / "dump")
    victim = sessions(root, 1)[0] / "loads-000001.parquet"
    outside = victim.rename(tmp_path / "outside")
    victim.symlink_to(outside)
    one_error(cli("copy", root, tmp_path / "copy"), 3, str(victim), "symbolic link")
    assert not [*(tmp_path / "copy").rglob("loads-000001.parquet")][2:]


def test_unwritable_target_is_one_error(dump: Path, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one_error(cli("copy", dump, tmp_path / "file/x"), 3, "file", "Not a directory")
    one_error(cli("copy", dump, s3.address("no-such-bucket-of-ours/x")), 3, "no such bucket")


# ---- output


@pytest.mark.parametrize("form", ["text", "json"])
def test_golden_output(form: str, dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dump, "dump")
    result = cli("copy", "--steps", "20-29", "--ranks", "0-1", *["--json"] * (form == "json"), "dump", "copy")
    assert (result.returncode, result.stderr) == (0, "")
    text = re.sub(r'"bytes": \d+', '"bytes": 0', re.sub(r"[\d,]+ bytes", "0 bytes", result.stdout))
    assert_golden(f"copy.{'txt' if form == 'text' else 'json'}", text)
