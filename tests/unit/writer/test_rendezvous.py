"""Which run a rank joins: the rule, races between threads, and a simulation of starts in any order."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import open_writer, session_info
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_dump import rendezvous, start
from eplb_dump.format.session import SessionInfo, load_json
from eplb_dump.format.start import Start
from eplb_dump.rendezvous import Member, claim_run, judge

SECOND = 10**9
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
MASTER = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


def rank_info(rank: int = 0, launch: dict[str, str] | None = None, **of_start: Any) -> SessionInfo:
    values = {"machine": "m", "process": f"{100 + rank}@5", "parent": "50@4/50", **of_start}
    return session_info(run_id="", ep_size=8, ep_rank=rank, launch=launch or {}, start=Start(**values))


def member(rank: int, claimed: float, *, alive: bool | None = True, closed: float | None = None) -> Member:
    closed_ns = None if closed is None else int(closed * SECOND)
    return Member(rank_info(rank), int(claimed * SECOND), Path(), alive, closed_ns)


# ---- whether two processes are of one start


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {}, True),
        ({}, {"process": "101@6"}, True),
        ({}, {"parent": "50@9/50"}, False),
        ({}, {"parent": "50@4/51"}, False),  # two launchers that have ended: their ranks' parent is process 1
        ({"parent": ""}, {"parent": ""}, None),
        ({"parent": ""}, {}, None),
        ({}, {"machine": "n"}, None),
        ({"id": "x"}, {"id": "x", "machine": "n", "parent": "1@1"}, True),
        ({"id": "x"}, {"id": "y"}, False),
        ({"id": "x"}, {}, None),
        ({"launch": {"RAY_JOB_ID": "1"}}, {"launch": {"RAY_JOB_ID": "2"}}, False),
        ({"launch": {"RAY_JOB_ID": "1"}}, {}, False),
        ({"launch": {"RAY_JOB_ID": "1"}}, {"launch": {"RAY_JOB_ID": "1"}, "machine": "n"}, None),
        ({"launch": SLURM}, {"launch": SLURM, "machine": "n"}, True),
        ({"launch": SLURM}, {"launch": SLURM, "parent": "60@4/60"}, True),  # a shell around each rank
        ({"launch": {"SLURM_JOB_ID": "7"}}, {"launch": {"SLURM_JOB_ID": "7"}, "parent": "60@4/60"}, False),
        ({"launch": {"PMIX_NAMESPACE": "p"}}, {"launch": {"PMIX_NAMESPACE": "p"}, "machine": "n"}, True),
        ({"launch": MASTER}, {"launch": MASTER, "machine": "n"}, True),
        ({"launch": MASTER}, {"launch": MASTER, "parent": "60@4/60"}, False),
        (
            {"launch": {**MASTER, "MASTER_ADDR": "127.0.0.1"}},
            {"launch": {**MASTER, "MASTER_ADDR": "127.0.0.1"}, "machine": "n"},
            None,
        ),
    ],
)
def test_same_start_only_if_it_is_known(
    one: dict[str, Any], other: dict[str, Any], same: bool | None
) -> None:
    a, b = rank_info(0, **one).start_identity, rank_info(1, **other).start_identity
    assert a.same_as(b) is same
    assert b.same_as(a) is same


def test_recording_of_before_is_identified_by_host_and_parent() -> None:
    old = session_info(host="h", launch={"parent": "h:12", "RAY_JOB_ID": "1"})
    assert old.start is None
    identity = old.start_identity
    assert identity.same_as(replace(old, ep_rank=1).start_identity) is True
    other = replace(old, launch={"parent": "h:13", "RAY_JOB_ID": "1"})
    assert identity.same_as(other.start_identity) is False
    elsewhere = replace(old, host="g", launch={"parent": "g:12", "RAY_JOB_ID": "1"})
    assert identity.same_as(elsewhere.start_identity) is None


# ---- the rule


@pytest.mark.parametrize(
    ("members", "spawned", "joins"),
    [
        ([member(0, 5)], 1, True),
        ([member(0, 5)], 9, True),  # it still runs
        ([member(0, 5)], 604, True),
        ([member(0, 5)], 606, False),  # an engine that the launcher started later
        ([member(0, 5), member(1, 900)], 1, True),  # a rank that comes up late
        ([member(0, 5, alive=False)], 1, False),  # killed: what follows is a restart, if from a pool
        ([member(0, 5, alive=False), member(1, 5)], 1, True),  # killed, but the others go on
        ([member(0, 5, alive=False, closed=7)], 1, True),
        ([member(0, 5, alive=False)], 9, False),  # killed, then started again
        ([member(0, 5, alive=False), member(1, 5)], 9, False),
        ([member(0, 5, alive=False, closed=7)], 6, True),
        ([member(0, 5, alive=False, closed=7)], 9, False),  # closed, then started again
        ([member(0, 5, alive=False, closed=7), member(1, 8, alive=False, closed=12)], 9, True),
        ([member(3, 5)], 1, False),  # its own rank is taken
    ],
)
def test_rank_joins_a_run_whose_ranks_ran_at_the_same_time(
    members: list[Member], spawned: float, joins: bool
) -> None:
    assert judge(rank_info(3), int(spawned * SECOND), members) is joins


def test_other_machine_is_joined_only_if_its_ranks_came_up_after_this_process_was_started() -> None:
    own = rank_info(3, SLURM)
    far = Member(rank_info(0, SLURM, machine="n"), 5 * SECOND, Path())
    assert judge(own, 4 * SECOND, [far]) is True
    doubt = judge(own, 6 * SECOND, [far])
    assert isinstance(doubt, str)
    assert "other machines" in doubt
    assert judge(own, 6 * SECOND, [replace(far, closed_ns=8 * SECOND)]) is True
    assert judge(own, 6 * SECOND, [replace(far, info=rank_info(0, {}, machine="n"))]) is False
    doubt = judge(rank_info(3), 4 * SECOND, [replace(far, info=rank_info(0, machine="n"))])
    assert isinstance(doubt, str)
    assert "launcher variable" in doubt


def test_common_id_joins_at_any_time() -> None:
    known = Member(rank_info(0, id="x", machine="n"), 5 * SECOND, Path())
    assert judge(rank_info(3, id="x"), 10**6 * SECOND, [known]) is True
    assert judge(rank_info(3, id="y"), 4 * SECOND, [known]) is False
    assert isinstance(judge(rank_info(3), 4 * SECOND, [known]), str)


@pytest.mark.parametrize("change", [{"ep_size": 4}, {"num_logical_experts": 9}, {"scope": "global"}])
def test_run_of_another_shape_is_not_joined(change: dict[str, Any]) -> None:
    other = Member(replace(rank_info(0), **change), 5 * SECOND, Path(), True)
    assert judge(rank_info(3), SECOND, [other]) is False
    assert judge(rank_info(3), SECOND, [replace(other, info=replace(other.info, model="drafter"))]) is True


# ---- claims


def test_racing_ranks_claim_one_run(tmp_path: Path) -> None:
    own = start.own_start(None)
    for number in range(10):
        barrier = threading.Barrier(16)
        claimed: list[str] = []

        def race(rank: int, barrier: threading.Barrier = barrier, claimed: list[str] = claimed) -> None:
            info = session_info(session_id=f"s{rank}", ep_rank=rank, ep_size=16, start=own)
            barrier.wait()
            claimed.append(claim_run(tmp_path, info).run_id)

        threads = [threading.Thread(target=race, args=(rank,)) for rank in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert claimed == [f"{number + 1:06d}"] * 16
    assert not list(tmp_path.glob("*.tmp"))


def test_launcher_variables_keep_starts_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_of(rank: int) -> str:
        with open_writer(tmp_path, run_id=None, ep_size=8, ep_rank=rank) as writer:
            return writer.info.run_id

    assert [run_of(0), run_of(1)] == ["000001"] * 2
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [run_of(1), run_of(2)] == ["000002"] * 2
    monkeypatch.delenv("SLURM_JOB_ID")
    assert run_of(2) == "000001"


def test_engine_after_an_engine_in_one_process_has_its_own_run(tmp_path: Path) -> None:
    with open_writer(tmp_path, run_id=None, ep_size=4) as writer:  # of which only one rank came up
        assert writer.info.run_id == "000001"
    second = [open_writer(tmp_path, run_id=None, ep_size=4, ep_rank=rank) for rank in range(4)]
    assert [writer.info.run_id for writer in second] == ["000002"] * 4
    for writer in second:
        writer.close()


def test_engines_that_cannot_be_told_apart_are_not_mixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = [open_writer(tmp_path, run_id=None, ep_rank=rank) for rank in (0, 0, 1)]
    assert [writer.info.run_id for writer in writers] == ["000001", "000002", "000003"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot tell which of runs 000001 and 000002" in warning
    assert "EXPERT_LOAD_DUMP_RUN_ID" in warning
    for writer in writers:
        writer.close()


def test_start_id_tells_engines_of_one_process_apart(tmp_path: Path) -> None:
    order = [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    found = defaultdict(set)
    for start_id, rank in order:
        with open_writer(tmp_path, run_id=None, ep_rank=rank, start_id=start_id) as writer:
            found[start_id].add(writer.info.run_id)
        stated = json.loads((writer.folder / "session.json").read_text())["start"]
        assert stated["id"] == start_id
    assert found == {"a": {"000001"}, "b": {"000002"}}


def test_claims_that_cannot_be_read_belong_to_no_start(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"{}", b"\xff"), 1):
        place = tmp_path / f"run={number:06d}/model=m/rank=00000"
        place.mkdir(parents=True)
        (place / "claim.json").write_bytes(content)
    (tmp_path / "run=000004").write_text("a file")
    with open_writer(tmp_path, run_id=None, ep_rank=1) as writer:
        assert writer.info.run_id == "000005"


def test_what_a_killed_claim_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "claim-00.tmp/model=m/rank=00000").mkdir(parents=True)
    open_writer(tmp_path, run_id=None).close()
    assert (tmp_path / "claim-00.tmp").exists()
    monkeypatch.setattr(rendezvous, "_DRAFT_SECONDS", -60.0)
    open_writer(tmp_path, run_id=None).close()
    assert not (tmp_path / "claim-00.tmp").exists()


def test_process_is_named_by_number_and_start_time() -> None:
    own = start.own_start(None)
    number, _, ticks = own.process.partition("@")
    assert start.is_alive(own.process)
    assert not start.is_alive(f"{number}@{int(ticks) + 1}")
    assert not start.is_alive("999999999@1")
    assert not start.is_alive("")
    assert start.own_age_ns() > 0


# ---- starts in any order


@dataclass(frozen=True)
class Rank:
    """One rank's life: times in ms by one clock. ``ended`` is after all events if it goes on."""

    start: int
    info: SessionInfo
    spawned: int
    claims: int
    ended: int
    in_order: bool


@st.composite
def lives(draw: st.DrawFn) -> list[Rank]:
    """Starts at once and one after another, killed and ended, some ranks late and some that never come up."""
    ranks: list[Rank] = []
    numbers = itertools.count()
    for launcher in range(draw(st.integers(1, 3))):
        machines = draw(st.integers(1, 2))
        kind = draw(st.sampled_from(["slurm", "master", "id"] if machines > 1 else ["parent", "id", "slurm"]))
        begin = draw(st.integers(0, 2000))
        pooled = None  # when the processes of the next life were started, if before the last one ended
        for _ in range(draw(st.integers(1, 3))):  # restarts by one launcher
            number, size = next(numbers), draw(st.integers(2, 6))
            launch = {"slurm": {**SLURM, "SLURM_JOB_ID": str(launcher)}, "master": MASTER}.get(kind, {})
            if kind == "master":
                launch = {**MASTER, "MASTER_PORT": str(launcher)}
            up = draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
            killed = draw(st.booleans())
            # The ranks run at the same time: none ends before the last one was started.
            claims = {rank: begin + 100 + draw(st.integers(0, 500_000)) for rank in up}
            end = max(claims.values()) + draw(st.integers(1, 1000))
            for rank in up:
                machine = rank % machines
                info = session_info(
                    run_id="",
                    session_id=f"{number}-{rank}",
                    ep_size=8,
                    ep_rank=rank,
                    created_unix_ns=claims[rank],
                    launch=launch,
                    start=Start(
                        f"start {number}" if kind == "id" else None,
                        f"machine {machine}",
                        process=f"{number}-{rank}",
                        parent=f"{launcher}@1/{launcher}",
                    ),
                )
                spawned = (begin if pooled is None else pooled) + draw(st.integers(0, 90))
                ranks.append(Rank(number, info, spawned, claims[rank], end, not killed))
            pooled = begin if killed and machines == 1 and draw(st.booleans()) else None
            begin = end + 1 + draw(st.integers(0, 1000))
    return ranks


@contextmanager
def clock_of(ranks: Sequence[Rank], now: list[int]) -> Iterator[list[Rank]]:
    """Rendezvous sees the processes and times of the simulation; the list holds the rank that claims."""
    by_session = {rank.info.session_id: rank for rank in ranks}
    claiming: list[Rank] = []

    def changed(path: Path) -> int:
        if path.name != rendezvous.CLAIM_FILE:
            return max(now[0], 0)
        return by_session[SessionInfo.from_dict(load_json(path.read_bytes())).session_id].claims

    def closed(folder: Path, info: SessionInfo) -> int | None:
        rank = by_session[info.session_id]
        return rank.ended if rank.in_order and rank.ended <= now[0] else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "JOIN_WINDOW_SECONDS", 600_000 / 1e9)
        patch.setattr(rendezvous, "_changed_ns", changed)
        patch.setattr(rendezvous, "_closed_ns", closed)
        patch.setattr(rendezvous, "own_age_ns", lambda: claiming[-1].claims - claiming[-1].spawned)
        patch.setattr(rendezvous, "is_alive", lambda process: by_session[process].ended > now[0])
        yield claiming


@settings(max_examples=60)
@given(lives())
def test_starts_in_any_order_are_never_mixed_nor_scattered(ranks: list[Rank]) -> None:
    runs: dict[str, set[int]] = defaultdict(set)
    now = [0]
    with tempfile.TemporaryDirectory() as folder, clock_of(ranks, now) as claiming:
        for rank in sorted(ranks, key=lambda rank: (rank.claims, rank.info.session_id)):
            now[0] = rank.claims
            claiming.append(rank)
            claim = claim_run(Path(folder), rank.info)
            runs[claim.run_id].add(rank.start)
    assert all(len(starts) == 1 for starts in runs.values()), runs
    assert len(runs) == len({rank.start for rank in ranks}), runs
