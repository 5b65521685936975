"""`prune`: what it keeps, thins and removes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aged_runs import DAY, aged_session, begin_journal, set_back
from helpers import ROOT, cli, one_error, session_info
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import FOLDER_CALLS, Killed, kill_before
from s3 import S3
from thinning import info_of

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.errors import UsageError
from eplb_analyze.reader.join import StepState
from eplb_analyze.storage.path import storage_path
from eplb_analyze.transfer.prune import prune_dump
from eplb_analyze.transfer.retention.plan import Policy, plan_for_age, plan_for_bytes
from eplb_analyze.transfer.retention.report import PruneReport
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import Piece, SurveyedRun, SurveyedSession, survey
from eplb_dump.format import files, retention
from eplb_dump.format.journal import Shape
from eplb_dump.format.manifest import Manifest, SealedFile, SealedSegment
from eplb_dump.format.minutes import Minutes
from eplb_dump.format.schema import MANIFEST_FILE, SEGMENT_PATTERN, SESSION_FILE, Scope, Tier
from eplb_dump.format.session import SessionInfo, load_json

HOUR, MINUTE = DAY // 24, 60 * 10**9
ORDER = ["full", "ranks", "minutes", "gone"]
#: The tables of each tier, as docs/format.md lists them.
TABLES = {
    "full": {"steps", "loads", "placements", "minutes"},
    "ranks": {"steps", "ranks", "placements", "minutes"},
    "minutes": {"placements", "minutes"},
    "gone": {"placements"},
}


def manifest_of(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    with path.open("rb") as file:
        manifest = Manifest.read(file, path.stat().st_size)
    assert manifest.fault is None
    return manifest


def sessions_of(dump: Path) -> list[Path]:
    return sorted(dump.glob("run=*/model=*/rank=*/session=*"))


def tiers_of(folder: Path) -> dict[int, str]:
    """The tier of each segment, by its number."""
    found = {}
    for entry in manifest_of(folder).entries.values():
        for seq in range(entry.seq, entry.last_seq + 1):
            found[seq] = entry.tier.value
    return found


def assert_whole(folder: Path) -> None:
    """Every listed file is there, has its tier's tables and says what was recorded; no other file is."""
    manifest = manifest_of(folder)
    listed = set()
    for entry in manifest.entries.values():
        assert set(entry.files) <= TABLES[entry.tier.value]
        assert set(entry.files) >= TABLES[entry.tier.value] - {"placements"}
        for table, file in entry.files.items():
            listed.add(file.name)
            data = pq.ParquetFile(folder / file.name, page_checksum_verification=True).read()
            assert len(data) == file.rows
            if table == "minutes":
                assert Minutes.from_table(data, entry.shape)["recorded"].sum() == entry.recorded
    inside = {
        path.name for path in folder.iterdir() if SEGMENT_PATTERN.fullmatch(path.name.removesuffix(".tmp"))
    }
    assert inside == listed


def content_of(dump: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dump)): p.read_bytes() for p in sorted(dump.rglob("*")) if p.is_file()}


def days(number: float) -> int:
    return int(number * DAY)


# ---- ages


def ladder(dump: Path, now: int, **options: Any) -> Path:
    """A session with segments that are 1, 3, 5, ... 19 days old."""
    return aged_session(dump, "r", [now - days(age) for age in range(19, 0, -2)], **options)


@pytest.mark.parametrize("scope", [Scope.GLOBAL, Scope.LOCAL])
def test_each_age_has_its_tier(scope: Scope, tmp_path: Path) -> None:
    folder = ladder(tmp_path, time.time_ns(), scope=scope)
    policy = Policy(keep_full=days(4), keep_ranks=days(10), keep_minutes=days(16))
    report = prune_dump(tmp_path, policy)
    assert tiers_of(folder) == dict(enumerate(["gone"] * 2 + ["minutes"] * 3 + ["ranks"] * 3 + ["full"] * 2))
    assert_whole(folder)
    assert {(move.tier, move.to, move.segments, move.reason) for move in report.runs[0].moves} == {
        ("full", "gone", 2, "age"),
        ("full", "minutes", 3, "age"),
        ("full", "ranks", 3, "age"),
    }
    assert {e.thinned.reason for e in manifest_of(folder).entries.values() if e.thinned} == {"prune"}
    before = content_of(tmp_path)
    again = prune_dump(tmp_path, policy)
    assert (again.runs, again.unchanged) == ([], 1)
    assert content_of(tmp_path) == before


def test_limit_of_a_coarser_tier_limits_the_finer_ones(tmp_path: Path) -> None:
    folder = ladder(tmp_path, time.time_ns())
    prune_dump(tmp_path, Policy(keep_minutes=days(6)))
    assert set(tiers_of(folder).values()) == {"gone", "full"}
    prune_dump(tmp_path, Policy(keep_ranks=days(2), max_age=days(4)))
    assert list(tiers_of(folder).values()) == ["gone"] * 8 + ["minutes", "full"]
    with pytest.raises(UsageError, match="--keep-full is longer than --keep-minutes"):
        Policy(keep_full=days(8), keep_minutes=days(7))
    with pytest.raises(UsageError, match="--keep-full is longer than --max-age"):
        Policy(keep_full=days(365), max_age=days(90))
    with pytest.raises(UsageError, match="say what to keep"):
        Policy()


def test_run_older_than_all_limits_disappears_with_all_its_files(tmp_path: Path) -> None:
    now = time.time_ns()
    old = aged_session(tmp_path, "old", [now - days(9)])
    aged_session(tmp_path, "old", [now - days(8)], rank=1)
    claim = old.parent / "claim.json"
    claim.write_bytes(b"{}")
    os.utime(claim, ns=(now - days(9), now - days(9)))
    aged_session(tmp_path, "new", [now - days(1)])
    (tmp_path / "notes.txt").write_text("mine")
    report = prune_dump(tmp_path, Policy(max_age=days(5)), dry_run=True)
    assert [(run.run_id, run.action, run.reason) for run in report.runs] == [("old", "removed", "age")]
    assert (tmp_path / "run=old").is_dir()
    assert prune_dump(tmp_path, Policy(max_age=days(5))) == replace(report, dry_run=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "pruned.jsonl", "run=new"]
    (line,) = (tmp_path / "pruned.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert (logged["run"], logged["models"], logged["reason"]) == ("old", ["m"], "age")
    assert logged["bytes"] == report.runs[0].bytes_before
    assert (logged["first_step"], logged["last_step"]) == (0, 15)


def test_ranks_of_the_same_steps_go_together(tmp_path: Path) -> None:
    """A budget that is met in the middle of a window thins it for all ranks, or for none."""
    now = time.time_ns()
    last = [now - days(3) + k * HOUR for k in range(8)]
    for rank in range(4):
        aged_session(tmp_path, "r", [t + rank for t in last], rank=rank, scope=Scope.LOCAL)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    for share in (0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3):
        prune_dump(tmp_path, Policy(max_bytes=int(share * size)))
        states = [tiers_of(folder) for folder in sessions_of(tmp_path)]
        assert all(state == states[0] for state in states)
    assert len(set(states[0].values())) > 1


def test_starts_that_share_a_run_id_are_thinned_by_their_own_times(tmp_path: Path) -> None:
    now = time.time_ns()
    old = aged_session(tmp_path, "r", [now - days(9), now - days(8)], session_id="a")
    new = aged_session(tmp_path, "r", [now - days(2), now - days(1)], session_id="b")
    prune_dump(tmp_path, Policy(keep_full=days(5)))
    assert set(tiers_of(old).values()) == {"ranks"}
    assert set(tiers_of(new).values()) == {"full"}


# ---- what stays


def untouched(folder: Path, policy: Policy, reason: str) -> PruneReport:
    """The folder's files stay as they are, and the report says why."""
    before = content_of(folder)
    dump = folder.parents[3]
    dry = prune_dump(dump, policy, dry_run=True)
    report = prune_dump(dump, policy)
    assert content_of(folder) == before
    assert dry == replace(report, dry_run=True)
    kept = {part.path: part.reason for run in report.runs for part in run.kept}
    assert reason in kept[str(folder)], kept
    return report


STRICT = Policy(max_bytes=1, max_age=days(1))


def test_live_writer_is_left_alone(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = aged_session(tmp_path, "r", [now - days(9), now - days(8)], closed=False)
    info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
    journal = begin_journal(folder, info, 2, now - days(7))
    set_back(folder, now - days(7))
    untouched(folder, STRICT, "its writer is alive")
    journal.close()  # the process died
    path = folder / "journal-000002.frames"
    before = path.read_bytes()
    report = prune_dump(tmp_path, Policy(max_bytes=1))
    assert path.read_bytes() == before
    assert list(tiers_of(folder).values()) == ["gone", "full"]
    part, newest = report.runs[0].kept
    assert (part.bytes, part.reason) == (len(before), "its journal is not sealed; `recover` seals it")
    assert newest.reason == "the newest steps of the dump are never thinned for --max-bytes"
    assert report.over == report.bytes_after - 1
    assert prune_dump(tmp_path, Policy(max_age=days(10))).runs == []
    prune_dump(tmp_path, Policy(max_age=days(6)))
    assert not (tmp_path / "run=r").exists()


def test_what_live_ranks_recorded_with_dead_ones_is_left_alone(tmp_path: Path) -> None:
    now = time.time_ns()
    last = [now - days(9), now - days(8)]
    dead = aged_session(tmp_path, "r", last, rank=0, scope=Scope.LOCAL)
    live = aged_session(tmp_path, "r", last, rank=1, scope=Scope.LOCAL, closed=False)
    info = SessionInfo.from_dict(load_json((live / SESSION_FILE).read_bytes()))
    journal = begin_journal(live, info, 2, now)
    before = content_of(tmp_path)
    prune_dump(tmp_path, STRICT)
    assert content_of(tmp_path) == before
    journal.close()
    assert set(tiers_of(dead).values()) == {"full"}


@settings(max_examples=25)
@given(st.data())
def test_all_ranks_keep_the_steps_of_a_protected_session(data: st.DataObject) -> None:
    """Whatever its writer has left so far: sealed segments, journals, no manifest, no ``session.json``."""
    now = time.time_ns()
    with tempfile.TemporaryDirectory() as top:
        dump = Path(top)
        count = data.draw(st.integers(1, 4))
        last = [now - days(9) + seq * HOUR for seq in range(count)]
        began = data.draw(st.integers(0, count - 1))
        protected = data.draw(st.integers(0, 2))
        state = data.draw(st.sampled_from(["journal", "no manifest", "no session", "copy"]))
        sealed = data.draw(st.integers(0 if state == "journal" else 1, count - began))
        folders = []
        for rank in range(3):
            mine = last if rank != protected else last[began : began + sealed]
            folder = aged_session(
                dump, "r", mine, rank=rank, scope=Scope.LOCAL, closed=rank != protected, step_ns=MINUTE
            )
            if rank != protected:
                folders.append(folder)
                continue
            info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
            info = replace(info, created_unix_ns=last[began] - 16 * MINUTE)
            (folder / SESSION_FILE).write_text(json.dumps(info.to_dict()))
            begin_journal(folder, info, sealed, now).close()  # just now
            if state == "no manifest":
                (folder / MANIFEST_FILE).unlink()
            elif state == "no session":
                for path in [*folder.iterdir()]:
                    if path.suffix == ".parquet" or path.name in (SESSION_FILE, MANIFEST_FILE):
                        path.unlink()
            elif state == "copy":
                (folder / "copy.tmp").mkdir()
        policy = Policy(
            max_bytes=data.draw(st.sampled_from([None, 1, 50_000])),
            keep_full=days(data.draw(st.integers(1, 4))),
            max_age=days(5),
        )
        prune_dump(dump, policy)
        for folder in folders:
            found = tiers_of(folder)
            assert [found[seq] for seq in range(began, count)] == ["full"] * (count - began)
            assert all(found[seq] == "gone" for seq in range(began - 1)) or state == "no session"


@pytest.mark.parametrize("state", ["between two journals", "not sealed yet", "no step yet", "just claimed"])
def test_writer_without_a_journal_may_be_alive(state: str, tmp_path: Path) -> None:
    now = time.time_ns()
    if state == "between two journals":
        folder = aged_session(tmp_path, "r", [now - days(3), now - 20 * HOUR], closed=False)
        reason = "its engine may be idle"
    elif state == "just claimed":
        folder = aged_session(tmp_path, "r", [now - days(3)])
        (folder.parents[1] / "rank=00001").mkdir()
        (folder.parents[1] / "rank=00001" / "claim.json").write_bytes(b"{}")
        assert prune_dump(tmp_path, Policy(max_age=days(1))).runs[0].action == "thinned"
        assert set(tiers_of(folder).values()) == {"gone"}
        return
    else:
        folder = aged_session(tmp_path, "r", [], closed=False)
        info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
        reason = "its engine may be idle"
        if state == "not sealed yet":
            begin_journal(folder, info, 0, now).close()
            reason = "in the last ten minutes"
        elif state == "no step yet":
            (folder / SESSION_FILE).unlink()
            (folder / f"{SESSION_FILE}.tmp").write_bytes(b"")
            reason = "its writer may have just started"
    untouched(folder, Policy(max_bytes=1, max_age=1), reason)


def test_killed_session_is_thinned_after_a_day(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = aged_session(tmp_path, "r", [now - days(3), now - days(1.1)], closed=False)
    prune_dump(tmp_path, Policy(keep_full=days(1)))
    assert set(tiers_of(folder).values()) == {"ranks"}
    prune_dump(tmp_path, Policy(keep_full=days(1), keep_ranks=days(1)))  # although its files are new
    assert set(tiers_of(folder).values()) == {"minutes"}


def test_without_locks_a_journal_is_in_use_for_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze import atomic
    from eplb_analyze.transfer.retention import carry_out, survey

    for module in (atomic, carry_out, survey):
        monkeypatch.setattr(module, "lock", lambda fd: None)
    now = time.time_ns()
    folder = aged_session(tmp_path, "r", [now - days(9), now - days(8)], closed=False)
    info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
    journal = begin_journal(folder, info, 2, now - days(7))
    path = folder / "journal-000002.frames"
    os.utime(path, ns=(now, now - 9 * MINUTE))
    untouched(folder, STRICT, "in the last ten minutes")
    os.utime(path, ns=(now, now - 11 * MINUTE))
    prune_dump(tmp_path, Policy(keep_full=days(1)))
    assert set(tiers_of(folder).values()) == {"ranks"}
    assert path.exists()
    journal.close()


def test_foreign_file_and_its_run_stay(tmp_path: Path) -> None:
    now = time.time_ns()
    folder = aged_session(tmp_path, "r", [now - days(9)])
    (folder / "notes.txt").write_text("mine")
    (folder.parent / "link").symlink_to(tmp_path)
    for _ in range(2):
        report = prune_dump(tmp_path, STRICT)
        assert list(tiers_of(folder).values()) == ["gone"]
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder.parent / "link").is_symlink()
        assert "not a file of a dump" in report.runs[0].kept[-1].reason


def test_links_are_not_followed(tmp_path: Path) -> None:
    now = time.time_ns()
    outside = aged_session(tmp_path / "outside", "r", [now - days(9)])
    dump = tmp_path / "dump"
    dump.mkdir()
    (dump / "run=r").symlink_to(tmp_path / "outside" / "run=r")
    inside = aged_session(dump, "s", [now - days(9)])
    (dump / "run=s" / "model=m" / "rank=00001").symlink_to(outside.parent)
    loads = inside / "loads-000000.parquet"
    loads.rename(tmp_path / "loads")
    loads.symlink_to(tmp_path / "loads")
    before = content_of(tmp_path / "outside")
    prune_dump(dump, STRICT)
    assert content_of(tmp_path / "outside") == before
    assert (tmp_path / "loads").exists()
    assert list(tiers_of(inside).values()) == ["full"]


def test_damaged_segment_stays_and_the_others_are_thinned(tmp_path: Path) -> None:
    folder = ladder(tmp_path, time.time_ns())
    loads = folder / "loads-000001.parquet"
    data = bytearray(loads.read_bytes())
    columns = pq.read_metadata(loads).row_group(0)
    (sums,) = [c for i in range(5) if (c := columns.column(i)).path_in_schema.startswith("rank_load")]
    data[sums.data_page_offset + sums.total_compressed_size - 1] ^= 1
    loads.write_bytes(data)
    (folder / "loads-000003.parquet").unlink()
    report = prune_dump(tmp_path, Policy(keep_full=days(6)))
    assert (
        list(tiers_of(folder).values()) == ["ranks", "full", "ranks", "full"] + ["ranks"] * 3 + ["full"] * 3
    )
    assert loads.read_bytes() == data
    assert report.failed == 1
    assert any("segment 1 of it is damaged" in part.reason for part in report.runs[0].kept)
    assert any("loads-000003" in part.reason for part in report.runs[0].kept)
    prune_dump(tmp_path, Policy(keep_minutes=days(0.5)))
    assert not (tmp_path / "run=r").exists()


@pytest.mark.parametrize("damage", ["manifest", "no manifest", "session", "newer"])
def test_what_cannot_be_read_stays_until_its_age(damage: str, tmp_path: Path) -> None:
    now = time.time_ns()
    folder = aged_session(tmp_path, "r", [now - days(9), now - days(8)])
    path = folder / (SESSION_FILE if damage in ("session", "newer") else MANIFEST_FILE)
    data = path.read_bytes()
    if damage == "no manifest":
        path.unlink()
    elif damage == "newer":
        path.write_bytes(data.replace(b'"1.2"', b'"9.0"'))
    else:
        path.write_bytes(data[:20] + b"?" + data[21:])
        if damage == "session":
            (folder / MANIFEST_FILE).unlink()
            for parquet in folder.glob("*.parquet"):
                parquet.write_bytes(b"")
    set_back(folder, now - days(8))
    before = content_of(folder)
    report = prune_dump(tmp_path, Policy(max_bytes=1, keep_full=days(1)))
    assert content_of(folder) == before
    assert report.runs[0].kept[0].path == str(folder)
    prune_dump(tmp_path, Policy(max_age=days(7)))
    assert not (tmp_path / "run=r").exists()


def test_unfinished_copy_is_left_alone(tmp_path: Path) -> None:
    folder = aged_session(tmp_path, "r", [time.time_ns() - days(9)])
    (folder / "copy.tmp").mkdir()
    untouched(folder, STRICT, "a copy into it is not finished")


def test_second_prune_of_a_dump_is_refused(tmp_path: Path) -> None:
    from eplb_analyze.transfer.retention.carry_out import at_work

    aged_session(tmp_path, "r", [time.time_ns() - days(9)])
    with at_work(tmp_path), pytest.raises(UsageError, match="another `prune` is running there"):
        prune_dump(tmp_path, STRICT)
    assert (tmp_path / "run=r").is_dir()
    prune_dump(tmp_path, STRICT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.jsonl"]


def test_session_that_another_process_writes_into_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that was idle for days seals a segment in the moment in which its session is thinned."""
    folder = aged_session(tmp_path, "r", [time.time_ns() - days(9)], closed=False)
    keep, appended = retention._keep, b"EPLF"

    def keep_and_append(*args: Any) -> SealedSegment:
        entry = keep(*args)
        with (folder / MANIFEST_FILE).open("ab") as file:
            file.write(appended)
        return entry

    monkeypatch.setattr(retention, "_keep", keep_and_append)
    report = prune_dump(tmp_path, Policy(keep_full=days(1)))
    assert (report.runs[0].action, report.failed) == ("failed", 1)
    assert "another process writes into this session" in (report.runs[0].reason or "")
    assert (folder / MANIFEST_FILE).read_bytes().endswith(appended)
    assert list(tiers_of(folder).values()) == ["full"]


def test_removal_that_was_killed_is_completed_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze import atomic

    monkeypatch.setattr(atomic, "lock", lambda fd: None)
    aged_session(tmp_path, "r", [time.time_ns() - days(9)])
    aged_session(tmp_path, "s", [time.time_ns()])
    for name in (".run=r.eplb.tmp/a", ".run=new.eplb.tmp/b/run=new"):  # one removed, one that is being made
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run=r").rename(tmp_path / ".run=r.eplb.tmp/a/x")
    (tmp_path / ".run=r.eplb.tmp/a/x/model=m").rename(tmp_path / ".run=r.eplb.tmp/a/model=m")
    (tmp_path / ".run=r.eplb.tmp/a/x").rmdir()
    prune_dump(tmp_path, Policy(max_age=days(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run=new.eplb.tmp", "run=s"]


def test_what_changes_between_the_plan_and_the_work_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze.transfer.retention import carry_out

    now = time.time_ns()
    thinned = aged_session(tmp_path, "a", [now - days(4)], closed=False)
    removed = aged_session(tmp_path, "b", [now - days(9)], closed=False)

    def log(*args: Any) -> None:  # the last moment before anything is changed
        for folder in (thinned, removed):
            info = SessionInfo.from_dict(load_json((folder / SESSION_FILE).read_bytes()))
            journals.append(begin_journal(folder, info, 1, now))

    journals: list[Any] = []
    monkeypatch.setattr(carry_out, "log_removed", log)
    report = prune_dump(tmp_path, Policy(keep_full=days(2), max_age=days(8)))
    assert [(run.run_id, run.action) for run in report.runs] == [("b", "failed"), ("a", "failed")]
    assert report.failed == 2
    for folder, journal in zip((thinned, removed), journals, strict=True):
        assert list(tiers_of(folder).values()) == ["full"]
        journal.close()


# ---- bytes


def test_budget_spares_what_is_notable(tmp_path: Path) -> None:
    now = time.time_ns()
    last = [now - days(9) + k * HOUR for k in range(40)]
    folder = aged_session(tmp_path, "r", last, rearranged=[20], steps=64)
    size = sum(path.stat().st_size for path in folder.iterdir())
    prune_dump(tmp_path, Policy(max_bytes=int(0.75 * size)))
    tiers = tiers_of(folder)
    assert {tiers[seq] for seq in (19, 20, 21)} == {"full"}
    assert {tiers[18], tiers[22]} == {"ranks"} or {tiers[18], tiers[22]} == {"minutes"}


def test_crash_keeps_the_newest_segments_longer(tmp_path: Path) -> None:
    now = time.time_ns()
    for run, closed, age in (("crashed", False, 20), ("ended", True, 10)):
        last = [now - days(age) + k * MINUTE for k in range(20)]
        aged_session(tmp_path, run, last, closed=closed, steps=64)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    prune_dump(tmp_path, Policy(max_bytes=int(0.5 * size)))
    crashed, ended = (tiers_of(next(tmp_path.glob(f"run={r}/*/*/*"))) for r in ("crashed", "ended"))
    assert list(crashed.values())[-2:] == ["full", "full"]
    assert "full" not in list(crashed.values())[2:-2]
    assert list(ended.values())[-1] == "full"


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.1, 0.05, 0.0])
def test_dump_is_within_its_bytes_and_a_dry_run_says_so(share: float, tmp_path: Path) -> None:
    now = time.time_ns()
    for run in range(12):
        aged_session(tmp_path, f"r{run}", [now - days(20 - run) + k * HOUR for k in range(4)], steps=64)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    policy = Policy(max_bytes=int(share * size))
    before = content_of(tmp_path)
    dry = prune_dump(tmp_path, policy, dry_run=True)
    assert content_of(tmp_path) == before
    report = prune_dump(tmp_path, policy)
    assert [(r.run_id, r.action, r.moves, r.kept) for r in dry.runs] == [
        (r.run_id, r.action, r.moves, r.kept) for r in report.runs
    ]
    left = sum(path.stat().st_size for path in tmp_path.glob("run=*/**/*") if path.is_file())
    assert left == report.bytes_after <= dry.bytes_after
    if share:
        assert dry.bytes_after <= policy.max_bytes
    else:  # the newest segment stays
        assert [tiers_of(folder)[3] for folder in sessions_of(tmp_path)] == ["full"]
        assert report.over == left
    for folder in sessions_of(tmp_path):
        assert_whole(folder)
    assert [run.action for run in prune_dump(tmp_path, policy).runs] == ([] if share else ["kept"])


@pytest.mark.parametrize("tier", ["full", "ranks", "minutes"])
def test_newest_steps_of_the_dump_stay_whatever_the_bytes_are(tier: str, tmp_path: Path) -> None:
    now = time.time_ns()
    aged_session(tmp_path, "old", [now - days(9)])
    last = [now - days(4), now - days(3)]
    ranks = [aged_session(tmp_path, "new", last, rank=rank, scope=Scope.LOCAL) for rank in range(3)]
    draft = aged_session(tmp_path, "new", [now - days(5), now - days(4)], model="draft")
    limits = {"full": {}, "ranks": {"keep_full": 1}, "minutes": {"keep_ranks": 1}}[tier]
    prune_dump(tmp_path, Policy(**limits, max_age=days(20)))
    report = prune_dump(tmp_path, Policy(max_bytes=1))
    merged = tier == "minutes"  # sums per minute of neighbors are one file
    assert [run.action for run in report.runs] == ["removed", "kept" if merged else "thinned"]
    for folder in (*ranks, draft):
        assert tiers_of(folder) == {0: tier if merged else "gone", 1: tier}
        assert_whole(folder)
    assert {part.reason for part in report.runs[1].kept} == {
        "the newest steps of the dump are never thinned for --max-bytes"
    }
    assert report.over > 0
    prune_dump(tmp_path, Policy(max_bytes=1, max_age=days(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.jsonl"]


# ---- older formats


@pytest.mark.parametrize("version", ["v1.0", "v1.1", "v1.1-durations", "v1.2"])
def test_older_format_gets_sums_per_minute_before_its_loads_go(version: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests/golden" / version / "run=golden", tmp_path / "run=golden")
    truth = json.loads((ROOT / "tests/golden" / version / "truth.json").read_text())["local"]
    for folder in sessions_of(tmp_path):
        set_back(folder, time.time_ns() - days(3))
    cli("recover", tmp_path)
    pieces = [p for run in survey(tmp_path) for s in run.sessions for p in s.pieces]
    expected_rows = {
        (p.session.folder, p.entry.seq): p.rows_of_minutes for p in pieces if "minutes" not in p.entry.files
    }
    expected_bytes = {(p.session.folder, p.entry.seq): size_at(p, Tier.RANKS) for p in pieces}
    prune_dump(tmp_path, Policy(keep_full=1))
    for rank, folder in enumerate(sessions_of(tmp_path)):
        entries = manifest_of(folder).entries.values()
        thinned = [entry for entry in entries if entry.tier is Tier.RANKS]
        if not thinned:  # the golden session that was killed may still be alive
            assert rank == 1
            continue
        assert_whole(folder)
        steps = [truth[step][rank] for step in range(12)]
        for entry in thinned:
            assert entry.size <= expected_bytes[folder, entry.seq]
            rows = entry.files["minutes"].rows
            assert rows == expected_rows.pop((folder, entry.seq), rows)
            assert entry.times is not None
            rolled = Minutes.from_table(pq.read_table(folder / entry.files["minutes"].name), entry.shape)
            mine = steps[entry.first_step : entry.last_step + 1]
            load = [
                [sum(s[layer][half * 3 : half * 3 + 3]) for half in (0, 1)] for s in mine for layer in (0, 1)
            ]
            expected = [
                sum(load[i][half] for i in range(layer, len(load), 2)) for layer in (0, 1) for half in (0, 1)
            ]
            assert rolled["rank_load"].sum(axis=0).tolist() == expected
    assert version == "v1.2" or len(expected_rows) < len(pieces) - 1  # some were compared


# ---- ranks that end at different steps


def uneven_ranks(dump: Path, now: int, ranks: int = 8) -> list[Path]:
    """Ranks with 80 steps, but rank 1 has only the first 60: it ends within a segment of the others."""
    begin, step_ns = (now - days(3)) // MINUTE * MINUTE, 10**7
    return [
        aged_session(
            dump,
            "uneven",
            [begin + (seq + 1) * steps * step_ns for seq in range(5)],
            rank=rank,
            scope=Scope.LOCAL,
            steps=steps,
            step_ns=step_ns,
        )
        for rank in range(ranks)
        for steps in [12 if rank == 1 else 16]
    ]


@pytest.mark.parametrize("without_minutes", [False, True])
@pytest.mark.parametrize("tier", ["ranks", "minutes"])
def test_sums_per_minute_end_where_a_rank_ends(tier: str, tmp_path: Path, *, without_minutes: bool) -> None:
    folders = uneven_ranks(tmp_path, time.time_ns())
    if without_minutes:  # as before version 1.2
        for folder in folders:
            manifest = manifest_of(folder)
            names = retention.forget_minutes(folder, info_of(folder), manifest, [*manifest.entries])
            files.remove(*(folder / name for name in names))
    truth = summarize(open_run(tmp_path))
    assert truth.steps.count(StepState.INCOMPLETE) == 20
    planned = {
        (piece.session.folder, piece.entry.seq): size_at(piece, Tier(tier))
        for session in survey(tmp_path)[0].sessions
        for piece in session.pieces
    }
    policy = Policy(keep_full=days(1), keep_ranks=days(1 if tier == "minutes" else 9))
    report = prune_dump(tmp_path, policy)
    assert report.failed == 0
    for folder in folders:
        assert_whole(folder)
        for entry in manifest_of(folder).entries.values():
            if entry.seq == entry.last_seq:
                assert entry.size <= planned[folder, entry.seq]
    rows = [
        (first, last)
        for folder in folders
        for path in folder.glob("minutes-*.parquet")
        for first, last in zip(
            *pq.read_table(path).select(["first_step", "last_step"]).to_pydict().values(), strict=True
        )
    ]
    assert all(last < 60 or first >= 60 for first, last in rows)
    found = summarize(open_run(tmp_path), tier="minutes")
    assert found.steps.count(StepState.RECORDED) == 60
    assert found.steps.reasons == {(1, "absent"): 20}
    prune_dump(tmp_path, Policy(keep_full=days(1), keep_ranks=days(1)))
    assert summarize(open_run(tmp_path)).steps.to_json() == found.steps.to_json()


def test_damaged_loads_do_not_cost_the_sums_per_minute(tmp_path: Path) -> None:
    folder, _ = uneven_ranks(tmp_path, time.time_ns(), ranks=2)
    loads = folder / "loads-000003.parquet"  # its segment has step 60
    damaged = bytearray(loads.read_bytes())
    damaged[40:80] = bytes(40)
    loads.write_bytes(damaged)
    minutes = (folder / "minutes-000003.parquet").read_bytes()
    prune_dump(tmp_path, Policy(keep_full=days(1), keep_ranks=days(9)))
    assert (folder / "minutes-000003.parquet").read_bytes() == minutes
    assert manifest_of(folder).entries[3].files.keys() >= {"minutes"}


# ---- kills


def names_of(dump: Path) -> set[str]:
    """Files and folders; sizes of the files that are not logs of the moment."""
    return {
        f"{p.relative_to(dump)} {p.stat().st_size if p.is_file() else ''}" for p in dump.glob("run=*/**/*")
    }


def test_killed_while_sums_are_replaced_it_continues_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    uneven_ranks(start, time.time_ns(), ranks=2)
    policy = Policy(keep_full=days(1), keep_ranks=days(9))
    done = Path(shutil.copytree(start, tmp_path / "done"))
    prune_dump(done, policy)
    end = content_of(done)
    kills = 0
    for count in range(400):
        dump = Path(shutil.copytree(start, tmp_path / "killed"))
        with monkeypatch.context() as patch:
            kill_before(patch, count, FOLDER_CALLS)
            try:
                prune_dump(dump, policy)
            except Killed:
                kills += 1
            else:
                break
        for session in sessions_of(dump):
            for entry in manifest_of(session).entries.values():
                assert entry.files.keys() & {"loads", "minutes"}
                assert all(
                    (session / file.name).stat().st_size == file.bytes for file in entry.files.values()
                )
        prune_dump(dump, policy)
        assert content_of(dump) == end, count
        shutil.rmtree(dump)
    assert kills > 10


def test_killed_at_any_step_it_continues_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    start = tmp_path / "start"
    folder = aged_session(start, "r", [now - days(age) for age in (9, 8, 6, 4, 2)], rearranged=[1, 3])
    aged_session(start, "old", [now - days(20)])
    policy = Policy(keep_full=days(3), keep_ranks=days(5), keep_minutes=days(7))
    done = Path(shutil.copytree(start, tmp_path / "done"))
    prune_dump(done, policy)
    assert list(tiers_of(done / folder.relative_to(start)).values()) == ["gone"] * 2 + [
        "minutes",
        "ranks",
        "full",
    ]
    end = names_of(done)
    kills = 0
    for count in range(400):
        dump = Path(shutil.copytree(start, tmp_path / "killed"))
        with monkeypatch.context() as patch:
            kill_before(patch, count, FOLDER_CALLS)
            try:
                prune_dump(dump, policy)
            except Killed:
                kills += 1
            else:
                break
        for session in sessions_of(dump):  # whole, or left for the rest of a removal
            manifest = manifest_of(session)
            assert manifest.closed is not None
            for entry in manifest.entries.values():
                for file in entry.files.values():
                    assert (session / file.name).stat().st_size == file.bytes
        prune_dump(dump, policy)
        assert names_of(dump) == end, count
        assert sorted(path.name for path in dump.iterdir()) == ["pruned.jsonl", "run=r"]
        assert len((dump / "pruned.jsonl").read_text().splitlines()) == 1
        assert prune_dump(dump, policy).runs == []
        shutil.rmtree(dump)
    assert kills > 20


# ---- the plan


@settings(max_examples=60)
@given(st.data())
def test_plan_follows_ages_and_bytes(data: st.DataObject) -> None:
    """Of any dump: nothing is thinned that need not be, and within a tier the oldest go first."""
    now = 1000 * DAY
    runs = []
    for number in range(data.draw(st.integers(1, 6))):
        entries = []
        for seq in range(data.draw(st.integers(1, 8))):
            age = data.draw(st.integers(1, 100))
            entries.append(
                planned_entry(seq, now - age * DAY - 10 * number - seq, data.draw(st.integers(1, 100)))
            )
        runs.append(planned_run(f"r{number}", entries))
    total = sum(run.size for run in runs)
    most = data.draw(st.integers(0, total))
    limit = data.draw(st.integers(1, 110))
    aged = [plan_for_age(run, Policy(keep_minutes=limit * DAY), now) for run in runs]
    plans = plan_for_bytes(aged, most, lambda plan: plan)
    left = 0
    by_age: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for plan in plans:
        if plan.removed is not None:
            continue
        for unit in plan.units:
            for piece, tier in unit.tiers.items():
                left += size_at(piece, tier)
                assert tier is Tier.GONE or now - piece.last_ns <= limit * DAY
                by_age[plan.reasons.get(piece, "none")].append((piece.last_ns, tier.value))
    kept = [last_ns for some in by_age.values() for last_ns, t in some if t != "gone"]
    newest = max((piece.last_ns for run in runs for s in run.sessions for piece in s.pieces), default=0)
    assert left <= most or not kept or kept == [newest]
    assert not any(plan.removed == "bytes" for plan in plans if plan.run.last_ns == newest)
    others = sorted(by_age["none"] + by_age["bytes"])
    ranks = [ORDER.index(tier) for _, tier in others]
    assert ranks == sorted(ranks, reverse=True)  # the older, the coarser
    if left < most - 100 - max(run.size for run in runs):  # the last thinning was needed
        assert not by_age["bytes"]
        assert not any(plan.removed == "bytes" for plan in plans)


def planned_entry(seq: int, last_ns: int, size: int) -> SealedSegment:
    """A segment whose tables take 5, 0, 3, 1 and 0 parts of its size."""
    files = {
        "loads": SealedFile(f"loads-{seq:06}.parquet", 5 * size, 1, 0),
        "minutes": SealedFile(f"minutes-{seq:06}.parquet", size, 1, 0),
        "steps": SealedFile(f"steps-{seq:06}.parquet", 3 * size, 1, 0),
    }
    return SealedSegment(seq, seq, seq, Shape(2, 1, 2), files, times=(last_ns, last_ns))


def planned_run(run_id: str, entries: list[SealedSegment]) -> SurveyedRun:
    folder = Path(f"run={run_id}")
    session = SurveyedSession(folder, session_info(run_id=run_id, segment_steps=1), {})
    session.manifest = Manifest(closed={})
    for entry in entries:
        assert entry.times is not None
        piece = Piece(session, entry, entry.times[1], entry.times[0])
        piece.sizes[Tier.RANKS] = entry.size - 4 * entry.files["minutes"].bytes
        session.pieces.append(piece)
        for file in entry.files.values():
            session.files[file.name] = os.stat_result((0o100644, 0, 0, 1, 0, 0, file.bytes, 0, 0, 0))
    return SurveyedRun(run_id, folder, [session])


# ---- buckets and the command line


def test_bucket_is_pruned_like_a_folder(tmp_path: Path, s3: S3) -> None:
    now = time.time_ns()
    dump = tmp_path / "dump"
    folder = ladder(dump, now)
    aged_session(dump, "old", [now - days(40)])
    uneven = uneven_ranks(dump, now - days(8), ranks=2)
    policy = Policy(keep_full=days(4), keep_ranks=days(10), keep_minutes=days(16), max_age=days(30))
    bucket = s3.put(dump)
    report = prune_dump(storage_path(s3.address(bucket)), policy)
    local = prune_dump(dump, policy)
    assert [(run.run_id, run.action, run.bytes_after) for run in report.runs] == [
        (run.run_id, run.action, run.bytes_after) for run in local.runs
    ]
    there = s3.get(bucket)
    here = content_of(dump)
    assert there.keys() == here.keys()
    thinned = tuple(str(one.relative_to(dump)) for one in (folder, *uneven))
    for name in here:
        if name.startswith(thinned):
            assert there[name] == here[name], name
    assert prune_dump(storage_path(s3.address(bucket)), policy).runs == []


def test_bucket_that_fails_in_between_is_continued(tmp_path: Path, s3: S3) -> None:
    now = time.time_ns()
    ladder(tmp_path / "dump", now)
    policy = Policy(keep_full=days(4), keep_ranks=days(10), keep_minutes=days(16))
    bucket = s3.put(tmp_path / "dump")
    address = s3.address(bucket)
    mark = f"{bucket}/.prune.eplb.tmp"
    with s3.files().open_output_stream(mark) as stream:  # of one that was killed
        stream.write(b"prune")
    with pytest.raises(UsageError, match="another `prune` is running there, or was interrupted"):
        prune_dump(storage_path(address), policy)
    s3.files().delete_file(mark)
    prune_dump(storage_path(address), policy)
    assert ".prune.eplb.tmp" not in s3.get(bucket)


def test_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    aged_session(tmp_path, "r", [time.time_ns() - days(2)])
    one_error(cli("prune", tmp_path), 2, "say what to keep", "--max-bytes")
    one_error(cli("prune", "--max-bytes", "many", tmp_path), 2, "is not a size", "500G")
    one_error(cli("prune", "--max-age", "7", tmp_path), 2, "is not an age", "7d")
    one_error(cli("prune", "--max-age", "7d", tmp_path / "none"), 3, "no such folder")
    one_error(cli("prune", "--max-age", "7d", "--run", "x", tmp_path), 2, "it has no run 'x'", "r")
    one_error(cli("prune", "--max-age", "7d", tmp_path / "run=r"), 2, "pass the folder that contains run=")
    result = cli("prune", "--max-age", "1d", "--run", "r", "--dry-run", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("dry run: nothing is changed")
    assert "\n1 run: 1 to remove, 0 unchanged; " in result.stdout
    assert "\nwould remove run r: " in result.stdout
    assert "removed" not in result.stdout


def test_dry_run_speaks_of_what_would_be_done(tmp_path: Path) -> None:
    folder = ladder(tmp_path, time.time_ns())
    options = ("prune", "--keep-full", "6d", tmp_path)
    said = [" ".join(cli(*options, *more).stdout.split()) for more in (["--dry-run"], [])]
    planned, done = said
    assert planned.startswith(
        "dry run: nothing is changed; sizes after it are upper bounds would keep at most"
    )
    assert "1 run: 1 to thin, 0 unchanged" in planned
    assert "would thin run r: " in planned
    assert "→ at most" in planned
    assert "1 run: 1 thinned, 0 unchanged" in done
    assert not {"would", "at most", "dry"} & {*done.split()}
    assert set(tiers_of(folder).values()) == {"ranks", "full"}


def test_folder_without_any_run_fails_the_job(tmp_path: Path, s3: S3) -> None:
    """Its volume is not mounted, or elsewhere; an empty dump whose runs were removed is in order."""
    dump = tmp_path / "parent" / "dump"
    aged_session(dump, "r", [time.time_ns() - days(9)])
    (tmp_path / "empty").mkdir()
    for options in ([], ["--dry-run"], ["--json"], ["--run", "r"]):
        command = ["prune", "--max-age", "7d", *options]
        one_error(cli(*command, tmp_path / "parent"), 3, "no run in it", f"are dumps: {dump}")
        one_error(cli(*command, tmp_path / "empty"), 3, "no run in it")
    assert list((tmp_path / "empty").iterdir()) == []
    one_error(cli("prune", "--max-age", "7d", s3.address(f"{s3.put(dump)}/wrong")), 3, "no run in it")
    for runs in ("1 run", "0 runs"):
        result = cli("prune", "--max-age", "7d", dump)
        assert (result.returncode, result.stderr) == (0, "")
        assert runs in result.stdout
    one_error(cli("summary", dump), 3, "no run in it", "`prune` removed the runs that pruned.jsonl lists")


def test_dump_that_stays_too_large_fails_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eplb_analyze.cli.commands import prune

    monkeypatch.setattr(prune, "LEAST_BYTES", 1)
    now = time.time_ns()
    aged_session(tmp_path, "r", [now - days(2), now - 20 * HOUR], closed=False)
    result = cli("prune", "--max-bytes", "10k", tmp_path)
    assert result.returncode == 1
    assert "over the limit" in result.stdout
    assert "its engine may be idle" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("500G", 500 * 10**9), ("64Mi", 64 << 20), ("1.5t", 1500 * 10**9), ("16777216", 16 << 20)],
)
def test_sizes(text: str, bytes_: int) -> None:
    from eplb_analyze.cli.commands.prune import parse_bytes

    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h", 3600), ("12 H", 43_200), ("4w", 2_419_200), ("1y", 31_536_000)]
)
def test_ages(text: str, seconds: int) -> None:
    from eplb_analyze.cli.commands.prune import parse_age

    assert parse_age(text) == seconds * 10**9


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        *(("--max-bytes", text, ("is less than 16Mi", "500G")) for text in ("300k", "300", "0", "1.5M")),
        *(("--max-age", text, ("could be minutes or months", "7d")) for text in ("7m", "1M", "90 m")),
        *(("--keep-full", text, ("the least age is 1h", "12h")) for text in ("90s", "0d", "90min")),
        *(("--keep-ranks", text, ("is not an age", "12h")) for text in ("7", "7mo", "d", "1.5d")),
    ],
)
def test_limit_that_looks_like_a_typing_error_changes_nothing(
    option: str, text: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    aged_session(tmp_path, "r", [time.time_ns() - days(9)])
    before = content_of(tmp_path)
    one_error(cli("prune", option, text, tmp_path), 2, option, repr(text), *words)
    assert content_of(tmp_path) == before


def test_folder_of_a_writer_that_begins_is_left_alone(tmp_path: Path) -> None:
    empty = tmp_path / "run=r" / "model=m" / "rank=00000"
    empty.mkdir(parents=True)
    assert prune_dump(tmp_path, STRICT).unchanged == 1
    assert empty.is_dir()
    for folder in (empty, *empty.parents[:2]):
        os.utime(folder, ns=(1, time.time_ns() - days(2)))
    prune_dump(tmp_path, STRICT)
    assert not (tmp_path / "run=r").exists()
