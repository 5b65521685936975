"""Several engine starts under one run id: separated, or refused, never mixed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, session_info
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import DumpError, open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.live.watch import Follower
from eplb_analyze.sessions.discovery import discover
from eplb_analyze.sessions.starts import Found, MixedStarts, Span, run_and_start, separate
from eplb_dump import ExpertLoadWriter, start
from eplb_dump.format.session import SessionInfo
from eplb_dump.format.start import Start

SECOND = 10**9
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}


class Sessions:
    """Sessions that exist only as metadata and the times of their first and last step."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self._spans: dict[Path, Span | None] = {}

    def add(
        self,
        rank: int,
        seconds: tuple[int, int] | None,
        *,
        machine: str = "m",
        parent: str = "1@1",
        id: str | None = None,
        steps: tuple[int, int] = (0, 9),
        **fields: Any,
    ) -> Path:
        number = len(self.found)
        began = (seconds or (number, 0))[0] * SECOND
        about = Start(id, machine, f"{100 + number}@1", parent)
        values = {"start": about, "created_unix_ns": began, **fields}
        info = session_info(session_id=f"s{number}", ep_rank=rank, **values)
        folder = Path(f"session-{number}")
        self.found.append((folder, info))
        times = None if seconds is None else (began, seconds[1] * SECOND)
        self._spans[folder] = None if times is None else Span(steps, times, times, times)
        return folder

    def span(self, folder: Path, info: SessionInfo) -> Span | None:
        return self._spans[folder]

    def separated(self) -> list[set[Path]]:
        result = separate(self.found, self.span)  # type: ignore[arg-type]
        assert not isinstance(result, MixedStarts), result.reason
        assert sorted(f.name for part in result for f, _ in part) == sorted(f.name for f, _ in self.found)
        return [{folder for folder, _ in part} for part in result]  # type: ignore[misc]

    def refused(self) -> str:
        result = separate(self.found, self.span)  # type: ignore[arg-type]
        assert isinstance(result, MixedStarts)
        return result.reason


def test_ranks_of_many_machines_are_one_start() -> None:
    dump = Sessions()
    own = {dump.add(rank, (0, 9), machine=f"m{rank // 2}") for rank in range(8)}
    assert dump.separated() == [own]


def test_replicas_of_a_deployment_are_two_starts() -> None:
    dump = Sessions()
    parts: list[set[Path]] = [set(), set()]
    for rank, replica in [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]:
        parts[replica].add(dump.add(rank, (replica, 60), machine=f"pod {replica}"))
    assert dump.separated() == parts


@pytest.mark.parametrize("launch", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_replicas_on_several_machines_cannot_be_separated_without_a_launcher(launch: dict[str, str]) -> None:
    dump = Sessions()
    for replica, rank in itertools.product("ab", range(4)):
        dump.add(rank, (0, 60), machine=f"{replica}{rank // 2}", launch=launch)
    assert "ranks 0, 1, 2, 3 at the same time" in dump.refused()


@pytest.mark.parametrize(
    "launches",
    [
        [SLURM, {**SLURM, "SLURM_STEP_ID": "1"}],
        [{"MASTER_ADDR": f"node-{n}", "MASTER_PORT": "29500"} for n in range(2)],
        [{"PMIX_NAMESPACE": "a"}, {"PMIX_NAMESPACE": "b"}],
    ],
)
def test_launcher_variables_separate_replicas_on_several_machines(launches: list[dict[str, str]]) -> None:
    dump = Sessions()
    parts = [
        {dump.add(rank, (n, 60), machine=f"{n}{rank // 2}", launch=launch) for rank in range(4)}
        for n, launch in enumerate(launches)
    ]
    assert dump.separated() == parts


def test_engines_of_one_launcher_at_the_same_time_cannot_be_separated() -> None:
    dump = Sessions()
    for rank in (0, 1, 1, 0):
        dump.add(rank, (0, 60))
    assert "ranks 0, 1 at the same time" in dump.refused()


@pytest.mark.parametrize("elsewhere", [{}, {"machine": "n"}])
def test_rank_that_restarts_while_the_others_go_on_stays_in_its_start(elsewhere: dict[str, str]) -> None:
    dump = Sessions()
    own = {dump.add(0, (0, 60)), dump.add(1, (0, 20)), dump.add(1, (30, 60), **elsewhere)}
    assert dump.separated() == [own]


@pytest.mark.parametrize("elsewhere", [{"machine": "n"}, {"parent": "9@9"}, {"launch": {"RAY_JOB_ID": "2"}}])
def test_engine_that_is_started_again_by_another_launcher_is_another_start(elsewhere: dict[str, Any]) -> None:
    dump = Sessions()
    first = {dump.add(rank, (0, 20)) for rank in range(3)}
    second = {dump.add(rank, (30 + rank, 60), **elsewhere) for rank in range(3)}
    assert dump.separated() == [first, second]


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("launch", [{}, SLURM])
def test_engine_that_its_own_launcher_starts_again_is_another_start(
    machines: int, launch: dict[str, str]
) -> None:
    dump = Sessions()
    parts = [
        {
            dump.add(rank, (30 * life + rank, 30 * life + 20), machine=f"m{rank % machines}", launch=launch)
            for rank in range(4)
        }
        for life in range(3)
    ]
    assert dump.separated() == parts


def test_writer_that_a_process_opens_again_stays_in_its_start() -> None:
    dump = Sessions()
    process = Start(None, "m", "7@1", "1@1")
    own = {dump.add(rank, (30 * life, 30 * life + 20), start=process) for life, rank in [(0, 0), (1, 0)]}
    assert dump.separated() == [own]


def test_rank_that_continues_its_steps_after_a_pause_of_all_stays_in_its_start() -> None:
    dump = Sessions()
    own = {dump.add(0, (0, 20)), dump.add(1, (0, 20)), dump.add(1, (30, 60), steps=(10, 19))}
    assert dump.separated() == [own]


def test_rank_that_comes_up_after_another_ended_stays_in_its_start() -> None:
    dump = Sessions()
    first = {dump.add(0, (0, 5)), dump.add(1, (10, 60))}
    second = {dump.add(1, (70, 80))}
    assert dump.separated() == [first, second]


def test_start_id_alone_says_what_one_start_is() -> None:
    dump = Sessions()
    own = {dump.add(0, (30 * life, 30 * life + 20), id="a") for life in range(2)}
    assert dump.separated() == [own]


def test_replicas_that_ended_within_a_moment_are_not_taken_for_restarts() -> None:
    dump = Sessions()
    parts: list[set[Path]] = [set(), set()]
    for moment, (rank, replica) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0)]):
        parts[replica].add(dump.add(rank, (moment, moment), machine=f"pod {replica}"))
    assert dump.separated() == parts


def test_engine_on_several_machines_that_is_started_again_is_another_start() -> None:
    dump = Sessions()
    parts = [
        {
            dump.add(rank, (30 * life + rank, 30 * life + 20), machine=f"{life}{rank // 2}")
            for rank in range(4)
        }
        for life in range(2)
    ]
    assert dump.separated() == parts


def test_different_ids_are_different_starts_even_if_no_rank_is_in_both() -> None:
    dump = Sessions()
    parts = [{dump.add(n, (n, 9), id=name), dump.add(n + 2, (n, 9), id=name)} for n, name in enumerate("ab")]
    assert dump.separated() == parts


def test_sessions_without_a_step_follow_their_creation() -> None:
    dump = Sessions()
    first = {dump.add(rank, (0, 20)) for rank in range(2)}
    dump.add(0, None, created_unix_ns=30 * SECOND)  # restarted, and has not taken a step yet
    assert dump.separated() == [first | {dump.found[-1][0]}]


def test_recordings_of_before_are_separated_by_host_and_parent() -> None:
    dump = Sessions()
    for rank, host in itertools.product(range(2), "ab"):
        dump.add(rank, (0, 60), start=None, host=host, launch={"parent": f"{host}:12"})
    assert [sorted(f.name for f in part) for part in dump.separated()] == [
        ["session-0", "session-2"],
        ["session-1", "session-3"],
    ]


def test_models_of_one_start_stay_together() -> None:
    dump = Sessions()
    parts: list[set[Path]] = [set(), set()]
    for model, replica in itertools.product(("m", "drafter"), range(2)):
        parts[replica] |= {
            dump.add(r, (replica, 60), model=model, machine=str(replica)) for r in range(1 + (model == "m"))
        }
    assert dump.separated() == parts


@settings(max_examples=200)
@given(
    st.sampled_from(["machine", "slurm", "id", "nothing"]),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_starts_at_once_are_separated_exactly_or_refused(
    known_by: str, starts: int, ranks: int, machines: int, random: Any
) -> None:
    dump, truth = Sessions(), [set[Path]() for _ in range(starts)]
    order = list(itertools.product(range(starts), range(ranks)))
    random.shuffle(order)
    for number, rank in order:
        about = {
            "machine": {"machine": f"{number}-{rank % machines}"},
            "slurm": {"machine": f"{rank % machines}", "launch": {**SLURM, "SLURM_STEP_ID": str(number)}},
            "id": {"machine": f"{rank % machines}", "id": str(number)},
            "nothing": {"machine": f"{rank % machines}"},
        }[known_by]
        truth[number].add(dump.add(rank, (number, 60), **about))
    apart = (
        known_by in ("slurm", "id") or starts == 1 or (known_by == "machine" and min(ranks, machines) == 1)
    )
    if apart:
        assert dump.separated() == truth
    else:
        assert "at the same time" in dump.refused()


# ---- real recordings


def record_replicas(
    root: Path, machines: Sequence[str], monkeypatch: pytest.MonkeyPatch, run_id: str | None = "deploy-1"
) -> list[float]:
    """Replicas of two ranks that record at the same time; returns the balancedness of each."""
    rng = np.random.default_rng(3)
    placement = np.tile(np.arange(8), (2, 1))
    means = []
    with ExitStack() as stack:
        replicas = []
        for number, machine in enumerate(machines):
            own = replace(start.own_start(None), machine=machine)
            monkeypatch.setattr(start, "own_start", lambda start_id, own=own: replace(own, id=start_id))
            replicas.append(
                [
                    stack.enter_context(
                        ExpertLoadWriter(
                            root / str(number) if run_id is None else root,
                            model="m", num_logical_experts=8, ep_size=2, ep_rank=rank, run_id=run_id or "r",
                        )
                    )
                    for rank in range(2)
                ]
            )  # fmt: skip
            monkeypatch.undo()
        values: list[list[float]] = [[] for _ in replicas]
        for _ in range(30):
            for number, writers in enumerate(replicas):
                loads = rng.multinomial(500, rng.dirichlet(np.full(8, 1.0 + 9 * number)), (2, 2))
                for writer, load in zip(writers, loads, strict=True):
                    writer.record(None, load, placement)
                by_rank = loads.sum(0).reshape(2, 2, 4).sum(2)
                values[number].append(float((by_rank.mean(1) / by_rank.max(1)).mean()))
        means = [float(np.mean(own)) for own in values]
    return means


def test_each_replica_under_one_run_id_has_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = record_replicas(tmp_path, ["a", "b"], monkeypatch)
    assert list(discover(tmp_path).runs) == ["deploy-1@1", "deploy-1@2"]
    for number, mean in enumerate(truth, 1):
        for path in (tmp_path, tmp_path / "run=deploy-1"):
            run = open_run(path, f"deploy-1@{number}")
            assert run.info.run_id == f"deploy-1@{number}"
            assert summarize(run).to_json()["balancedness"]["mean"] == pytest.approx(mean)
            report = check_run(run)
            assert report.ok
            assert [f.code for f in report.findings] == ["several_starts"]
    for asked in (None, "deploy-1"):
        run = open_run(tmp_path, asked)
        assert run.info.run_id == "deploy-1@2"
        assert any("--run" in note for note in run.notes)
    done = cli("summary", tmp_path, "--run", "deploy-1")
    assert done.returncode == 0
    assert "2 engine starts share the run id deploy-1" in done.stderr
    look = Follower(tmp_path, "deploy-1@1").look()
    assert look.balancedness.mean == pytest.approx(truth[0])


def test_a_start_is_copied_compacted_and_sealed_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mean, _) = record_replicas(tmp_path / "dump", ["a", "b"], monkeypatch)
    done = cli("copy", tmp_path / "dump", "--run", "deploy-1@1", tmp_path / "copy")
    assert done.returncode == 0
    run = open_run(tmp_path / "copy")
    assert (run.info.run_id, len(run.sessions)) == ("deploy-1", 2)
    assert summarize(run).to_json()["balancedness"]["mean"] == pytest.approx(mean)
    done = cli("compact", tmp_path / "dump", "--run", "deploy-1@1", tmp_path / "compact")
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "compact")
    assert run.info.run_id == "deploy-1.1-compact"
    assert summarize(run).to_json()["balancedness"]["mean"] == pytest.approx(mean)
    assert cli("recover", tmp_path / "dump", "--run", "deploy-1").returncode == 0
    found = json.loads(cli("postmortem", tmp_path / "dump", "--json").stdout)
    assert sorted(row["run_id"] for row in found["runs"]) == ["deploy-1@1", "deploy-1@2"]


COMMANDS = [
    ["summary"], ["layer", "0"], ["ranks"], ["timeline"], ["experts"], ["placement"], ["traffic"],
    ["rearrangements"], ["replay"], ["advise"], ["report", "-o", "report.html"], ["watch", "--once"],
    ["compact", "out"], ["export", "loads", "-o", "loads.csv", "--as", "csv"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_command_prints_figures_of_engines_that_cannot_be_separated(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_replicas(tmp_path / "dump", ["a", "a"], monkeypatch)
    monkeypatch.chdir(tmp_path)
    name, *rest = command
    words = [name, *rest[:1], "dump", *rest[1:]] if name == "export" else [name, "dump", *rest]
    if name == "layer":
        words = ["layer", "0", "dump"]
    done = cli(*words)
    one_error(
        done, 3, "run deploy-1: two engines recorded ranks 0, 1 at the same time", "use a separate run id"
    )
    assert done.stdout == ""


def test_check_fails_on_engines_that_cannot_be_separated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_replicas(tmp_path, ["a", "a"], monkeypatch)
    done = cli("check", tmp_path)
    assert done.returncode == 1
    assert "mixed_starts" in done.stdout
    assert "overlapping_sessions" not in done.stdout  # the same fact
    with pytest.raises(DumpError, match="two engines recorded"):
        open_run(tmp_path)
    row = json.loads(cli("postmortem", tmp_path, "--json").stdout)["runs"][0]
    assert row["status"] == "broken"
    assert "two engines recorded" in row["reason"]
    # One rank of one engine can still be looked at.
    session = next(tmp_path.glob("run=*/model=*/rank=00000/session=*"))
    assert len(open_run(session).sessions) == 1


def test_watch_notices_a_second_engine_under_the_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def writer(machine: str) -> ExpertLoadWriter:
        own = replace(start.own_start(None), machine=machine)
        monkeypatch.setattr(start, "own_start", lambda start_id: own)
        return ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=1, run_id="r")

    def record(writer: ExpertLoadWriter, steps: int) -> None:
        for _ in range(steps):
            writer.record(None, np.array([[1, 2]]), np.array([[0, 1]]))
        assert writer.flush(60)

    with writer("a") as first:
        record(first, 5)
        followers = [Follower(tmp_path, "r"), Follower(tmp_path)]
        assert [follower.look().complete for follower in followers] == [5, 5]
        with writer("b") as second:
            record(second, 3)
            record(first, 5)
            assert [follower.look().complete for follower in followers] == [3, 3]
            assert Follower(tmp_path, "r@1").look().complete == 10
            with writer("b") as third:  # beside the second, from one launcher
                record(third, 2)
                record(second, 2)
                followers[0].look()
                record(second, 2)
                with pytest.raises(DumpError, match="two engines recorded rank 0"):
                    followers[0].look()


def test_run_ids_have_no_start_number() -> None:
    assert run_and_start("r.1-x") == ("r.1-x", "")
    assert run_and_start("r@2") == ("r", "2")
