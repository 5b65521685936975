"""`prune --merge-ranks`: the sums over ranks take the place of a run, and a dry run foresees it."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aged_runs import DAY, aged_session, begin_journal, set_back
from helpers import cli, one_error
from kills import FOLDER_CALLS, Killed, kill_before
from test_prune import assert_whole, content_of, days, manifest_of, sessions_of, tiers_of
from thinning import info_of

from eplb_analyze.transfer.compact import compact_run
from eplb_analyze.transfer.prune import prune_dump
from eplb_analyze.transfer.retention.foresee import foresee_merged
from eplb_analyze.transfer.retention.plan import Policy
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import survey
from eplb_dump.format.schema import Scope, Tier
from eplb_dump.rendezvous import CLAIM_FILE

HOUR = DAY // 24


def sums_of(dump: Path) -> dict[tuple[int, int], list[int]]:
    """Tokens per EP rank of each step and layer, summed over what the ranks recorded."""
    total: dict[tuple[int, int], list[int]] = {}
    for folder in sessions_of(dump):
        for path in [*folder.glob("loads-*.parquet"), *folder.glob("ranks-*.parquet")]:
            for row in pq.read_table(path, columns=["step", "layer", "rank_load"]).to_pylist():
                key = row["step"], row["layer"]
                total[key] = [a + b for a, b in zip(total.get(key, [0] * 8), row["rank_load"], strict=True)]
    return total


def ranks_of_a_run(dump: Path, now: int, run_id: str = "r", **options: Any) -> None:
    for rank in range(8):
        last = [now - days(age) for age in (4, 3, 1)]
        aged_session(dump, run_id, last, rank=rank, scope=Scope.LOCAL, rearranged=[1], **options)


@pytest.mark.usefixtures("swaps")
def test_ranks_are_merged_before_their_run_is_thinned(tmp_path: Path) -> None:
    now = time.time_ns()
    ranks_of_a_run(tmp_path, now)
    aged_session(tmp_path, "sums", [now - days(9), now - days(1)])
    aged_session(tmp_path, "one-rank", [now - days(9), now - days(1)], scope=Scope.LOCAL)
    before = content_of(tmp_path)
    policy = Policy(keep_full=days(0.5))
    dry = prune_dump(tmp_path, policy, merge=True, dry_run=True)
    assert content_of(tmp_path) == before
    report = prune_dump(tmp_path, policy, merge=True)
    for said in (dry, report):
        found = {run.run_id: (run.merged, run.action) for run in said.runs}
        assert found == {"r": (True, "thinned"), "sums": (False, "thinned"), "one-rank": (False, "thinned")}
        (refused,) = [run.not_merged for run in said.runs if run.run_id == "one-rank"]
        assert refused is not None
        assert "no step is complete" in refused
    for other in ("sums", "one-rank"):
        shutil.rmtree(tmp_path / f"run={other}")
    (folder,) = sessions_of(tmp_path)
    assert set(tiers_of(folder).values()) == {"ranks"}
    assert_whole(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run=r"]
    assert prune_dump(tmp_path, policy, merge=True).runs == []


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("policy", [Policy(keep_full=days(0.5)), Policy(max_bytes=1)])
def test_run_that_can_be_merged_in_some_minutes_is_left_alone_until_then(
    policy: Policy, tmp_path: Path
) -> None:
    """What is thinned unmerged can never be merged. A rank that began may be about to write."""
    now = time.time_ns()
    ranks_of_a_run(tmp_path, now)
    claim = sessions_of(tmp_path)[0].parent / CLAIM_FILE
    claim.write_text("{}")
    before = content_of(tmp_path)
    for dry_run in (True, False):
        (run,) = prune_dump(tmp_path, policy, merge=True, dry_run=dry_run).runs
        assert (run.action, run.merged, run.bytes_after) == ("kept", False, run.bytes_before)
        why = "a rank began in it less than ten minutes ago; it is merged later"
        assert [part.reason for part in run.kept] == [why] * 8
        assert content_of(tmp_path) == before
    set_back(claim.parent, now - days(1))
    (run,) = prune_dump(tmp_path, policy, merge=True).runs
    assert run.merged


@pytest.mark.usefixtures("swaps")
def test_merged_run_has_the_sums_of_its_ranks(tmp_path: Path) -> None:
    now = time.time_ns()
    ranks_of_a_run(tmp_path, now)
    truth = sums_of(tmp_path)
    prune_dump(tmp_path, Policy(keep_full=days(2)), merge=True)
    assert sums_of(tmp_path) == truth
    assert "1 rank in 1 session, all checksums correct" in cli("check", tmp_path).stdout


@pytest.mark.usefixtures("swaps")
def test_crashed_ranks_are_merged_with_their_journals(tmp_path: Path) -> None:
    now = time.time_ns()
    ranks_of_a_run(tmp_path, now - days(2), closed=False)
    for folder in sessions_of(tmp_path):
        begin_journal(folder, info_of(folder), 3, now - days(2)).close()
        set_back(folder, now - days(2))
    prune_dump(tmp_path, Policy(keep_full=days(4)), merge=True)
    (folder,) = sessions_of(tmp_path)
    assert max(e.last_step for e in manifest_of(folder).entries.values()) == 63


def test_file_system_that_cannot_swap_names_keeps_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze.transfer.retention import merge

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EINVAL, "its file system cannot swap two names")

    monkeypatch.setattr(merge, "exchange", refuse)
    ranks_of_a_run(tmp_path, time.time_ns())
    truth = sums_of(tmp_path)
    report = prune_dump(tmp_path, Policy(keep_full=days(2)), merge=True)
    assert report.runs[0].not_merged == "its file system cannot swap two names"
    assert len(sessions_of(tmp_path)) == 8
    assert sums_of(tmp_path) == truth
    assert [path.name for path in tmp_path.iterdir()] == ["run=r"]


def test_run_that_cannot_be_merged_is_named_and_thinned(tmp_path: Path) -> None:
    now = time.time_ns()
    ranks_of_a_run(tmp_path, now)
    (tmp_path / "run=r" / "notes.txt").write_text("mine")
    report = prune_dump(tmp_path, Policy(keep_full=days(2)), merge=True)
    assert (report.runs[0].merged, report.runs[0].action) == (False, "thinned")
    assert "notes.txt is not a file of a dump" in (report.runs[0].not_merged or "")
    assert len(sessions_of(tmp_path)) == 8
    one_error(cli("prune", "--max-age", "1d", "--merge-ranks", "s3://b/x"), 2, "needs a local folder")


@pytest.mark.usefixtures("swaps")
def test_run_whose_damage_only_the_merge_finds_keeps_its_ranks(tmp_path: Path) -> None:
    """A dry run reads the loads of three segments; here the damage is in another."""
    now = time.time_ns()
    for rank in range(8):
        last = [now - days(age) for age in range(12, 2, -1)]
        aged_session(tmp_path, "r", last, rank=rank, scope=Scope.LOCAL)
    path = sessions_of(tmp_path)[5] / "loads-000000.parquet"
    group = pq.read_metadata(path).row_group(0)
    (loads,) = [c for i in range(5) if (c := group.column(i)).path_in_schema.startswith("load.")]
    data = bytearray(path.read_bytes())
    data[loads.data_page_offset + loads.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    policy = Policy(keep_full=days(5))
    assert prune_dump(tmp_path, policy, merge=True, dry_run=True).runs[0].merged
    (run,) = prune_dump(tmp_path, policy, merge=True).runs
    assert (run.merged, run.action) == (False, "thinned")
    assert "loads-000000.parquet" in (run.not_merged or "")
    assert len(sessions_of(tmp_path)) == 8


@pytest.mark.usefixtures("swaps")
def test_dry_run_foresees_segments_and_estimates_their_sizes(tmp_path: Path) -> None:
    """The engine does forty times as much at some times as at others."""
    now = time.time_ns()
    levels = [0.1, 0.5, 4, 4, 4, 0.2, 1, 2, 4, 0.1, 0.3, 3]
    for rank in range(8):
        last = [now - days(20) + hour * HOUR for hour in range(len(levels))]
        aged_session(
            tmp_path, "r", last, rank=rank, scope=Scope.LOCAL, rearranged=[4, 7], levels=levels, steps=128
        )
    (run,) = survey(tmp_path)
    foreseen = foresee_merged(tmp_path, run)
    (said,) = prune_dump(tmp_path, Policy(keep_full=days(2)), merge=True, dry_run=True).runs
    compact_run(tmp_path, tmp_path / "to", "r", run_id="r")
    (merged,) = survey(tmp_path / "to")
    # Two merges of one run differ in ids, and so in the lengths of checksums.
    assert said.merged_bytes == pytest.approx(foreseen.size, abs=500)
    assert foreseen.size == pytest.approx(merged.size, rel=0.05)
    assert foreseen.size < run.size / 3
    (one,), (other,) = foreseen.sessions, merged.sessions
    assert len(one.pieces) == len(other.pieces) >= len(levels)
    exact = 0
    for mine, true in zip(one.pieces, other.pieces, strict=True):
        for name in ("seq", "first_step", "last_step", "shape", "times", "notable"):
            assert getattr(mine.entry, name) == getattr(true.entry, name), name
        assert (mine.first_ns, mine.last_ns, mine.notable) == (true.first_ns, true.last_ns, true.notable)
        assert {t: f.rows for t, f in mine.entry.files.items()} == {
            t: f.rows for t, f in true.entry.files.items()
        }
        exact += abs(mine.size - true.size) < 50
        for tier in (Tier.FULL, Tier.RANKS, Tier.MINUTES, Tier.GONE):
            assert size_at(mine, tier) == pytest.approx(size_at(true, tier), rel=0.3, abs=600)
    assert exact >= 3


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("limit", ["age", "bytes"])
def test_killed_while_it_merges_it_leaves_the_ranks_or_the_sums(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze.transfer.retention import merge

    now = time.time_ns()
    start = tmp_path / "start"
    for run_id in ("r", "s"):
        ranks_of_a_run(start, now, run_id)
    truth = sums_of(start)
    policy = Policy(keep_full=days(2))
    if limit == "bytes":  # enough if both are merged, and not if one is
        dry = prune_dump(start, policy, merge=True, dry_run=True)
        policy = Policy(max_bytes=sum(run.merged_bytes or 0 for run in dry.runs) + 5_000)
    exchange, kills = merge.exchange, 0
    for count in (*range(0, 120, 13), None, "before", "after"):
        dump = Path(shutil.copytree(start, tmp_path / "killed"))

        def exchange_and_die(*paths: Path, when: Any = count) -> None:
            if when == "before":
                raise Killed
            exchange(*paths)
            if when == "after":
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(merge, "exchange", exchange_and_die)
            if isinstance(count, int):
                kill_before(patch, count, FOLDER_CALLS)
            try:
                prune_dump(dump, policy, merge=True)
            except Killed:
                kills += 1
        for run_id in ("r", "s"):
            assert sum(f.parents[2].name == f"run={run_id}" for f in sessions_of(dump)) in (1, 8)
            assert cli("summary", "--run", run_id, dump).returncode == 0
        assert sums_of(dump) == truth
        report = prune_dump(dump, policy, merge=True)
        assert len(sessions_of(dump)) == 2
        assert sums_of(dump) == truth
        assert sorted(path.name for path in dump.iterdir()) == ["run=r", "run=s"]
        if limit == "bytes":
            assert report.over == 0
            assert {tier for folder in sessions_of(dump) for tier in tiers_of(folder).values()} == {"full"}
        shutil.rmtree(dump)
    assert kills > 9


def test_dry_run_without_space_for_samples_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eplb_analyze.transfer.retention import foresee

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(foresee, "write_segment", refuse)
    ranks_of_a_run(tmp_path, time.time_ns())
    (run,) = prune_dump(tmp_path, Policy(keep_full=days(2)), merge=True, dry_run=True).runs
    assert (run.merged, run.action) == (False, "thinned")
    assert "the dry run cannot merge some of it in" in (run.not_merged or "")
    assert "No space left" in (run.not_merged or "")


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("closed", [True, False])
def test_last_segments_before_a_crash_stay_notable(closed: bool, tmp_path: Path) -> None:
    now = time.time_ns()
    for rank in range(8):
        last = [now - days(age) for age in (9, 8, 7, 6, 5)]
        aged_session(tmp_path, "r", last, rank=rank, scope=Scope.LOCAL, closed=closed)
    (run,) = survey(tmp_path)
    foreseen = foresee_merged(tmp_path, run)
    prune_dump(tmp_path, Policy(keep_full=days(8.5), max_bytes=10**9), merge=True)
    (merged,) = survey(tmp_path)
    for one in (foreseen, merged):
        (session,) = one.sessions
        (start, *_, before, last_piece) = session.pieces
        assert start.notable
        assert (before.notable, last_piece.notable) == (not closed, not closed)
