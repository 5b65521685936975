"""Engine starts in real processes: ranks find a common run, and an example records a clean dump."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_equal_loads, load_of, sealed_loads, start_child

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run

RANK = """
import sys
from helpers import load_of, map_of, open_writer

print("ready", flush=True)
sys.stdin.readline()
rank = int(sys.argv[2])
with open_writer(sys.argv[1], run_id=None, ep_size=4, ep_rank=rank) as writer:
    for step in range(20):
        writer.record(None, load_of(step, rank), map_of())
print(writer.info.run_id)
"""


def release(children: list[subprocess.Popen[str]]) -> None:
    """Let all children go at the same moment, once each is ready."""
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()


def start_engine(root: Path) -> list[str]:
    """Start four ranks at the same moment; returns their run ids."""
    ranks = [start_child(RANK, root, rank) for rank in range(4)]
    release(ranks)
    found = [rank.communicate(timeout=60) for rank in ranks]
    assert [(rank.returncode, err) for rank, (_, err) in zip(ranks, found, strict=True)] == [(0, "")] * 4
    return [out.strip() for out, _ in found]


def test_ranks_started_together_share_a_run_and_restart_begins_the_next(tmp_path: Path) -> None:
    assert start_engine(tmp_path) == ["000001"] * 4
    assert start_engine(tmp_path) == ["000002"] * 4
    for run, rank in itertools.product(("000001", "000002"), range(4)):
        (folder,) = tmp_path.glob(f"run={run}/model=m/rank=0000{rank}/session=*")
        assert_equal_loads(sealed_loads(folder), {step: load_of(step, rank) for step in range(20)})
    assert len(list(tmp_path.glob("run=*/*/*/*/session.json"))) == 8


#: A launcher whose children are the ranks of one engine start after another, as process 1 of a container may
#: be. Arguments after the folder, one for each start: how many of 8 ranks come up, how they end, and whether
#: the last of them comes up when the others have ended. Prints the run ids of each start.
LAUNCHER = """
import os, signal, sys
from helpers import load_of, map_of, open_writer
RUN_ID = os.environ.get("EXPERT_LOAD_DUMP_RUN_ID")

def rank_main(number, out, go, late):
    if late is not None:
        os.read(late, 1)
    writer = open_writer(sys.argv[1], run_id=RUN_ID, ep_size=8, ep_rank=number)
    for step in range(3):
        writer.record(None, load_of(step, number), map_of())
    writer.flush()
    os.write(out, (writer.info.run_id + "\\n").encode())
    if late is None:
        os.read(go, 1)
    writer.close()

def start(ranks, end, late):
    (told, out), (go, release), (late_go, late_release) = os.pipe(), os.pipe(), os.pipe()
    pids = []
    for number in range(ranks):
        pid = os.fork()
        if not pid:
            try:
                rank_main(number, out, go, late_go if late and number == ranks - 1 else None)
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(out)
    lines = os.fdopen(told)
    runs = [next(lines).strip() for _ in range(ranks - late)]
    if end == "killed":
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    else:
        os.write(release, b"x" * (ranks - late))
    for pid in pids[: ranks - late]:
        os.waitpid(pid, 0)
    if late:
        os.write(late_release, b"x")
        runs.append(next(lines).strip())
        os.waitpid(pids[-1], 0)
    print(*runs, flush=True)
    lines.close()
    for end in go, release, late_go, late_release:
        os.close(end)

print("ready", flush=True)
sys.stdin.readline()
for life in sys.argv[2:]:
    ranks, end, late = life.split()
    start(int(ranks), end, late == "late")
"""


def launch(root: Path, launchers: list[list[str]]) -> list[list[set[str]]]:
    """Run launchers at once; returns the run ids of each of their starts."""
    return launch_children([start_child(LAUNCHER, root, *lives) for lives in launchers])


def launch_children(children: list[subprocess.Popen[str]]) -> list[list[set[str]]]:
    release(children)
    found = [child.communicate(timeout=120) for child in children]
    # Whether the ranks of another container still run is not visible; only in that case a rank may warn.
    messages = [line for _, err in found for line in err.splitlines()]
    assert all("neither a common parent process nor a launcher variable" in line for line in messages), (
        messages
    )
    assert not any(child.returncode for child in children)
    return [[set(line.split()) for line in out.splitlines()] for out, _ in found]


@pytest.mark.parametrize(
    "launchers",
    [
        pytest.param([["8 closed prompt"]] * 3, id="at once"),
        pytest.param([["5 killed prompt", "8 closed prompt"]], id="killed half way, then again"),
        pytest.param([["5 closed prompt", "8 closed prompt"]], id="ended half way, then again"),
        pytest.param([["8 closed late"]] * 2, id="the last rank is late"),
        pytest.param([["3 killed prompt", "8 killed prompt", "8 closed late"]] * 2, id="all together"),
    ],
)
def test_starts_are_neither_mixed_nor_scattered(tmp_path: Path, launchers: list[list[str]]) -> None:
    found = [runs for starts in launch(tmp_path, launchers) for runs in starts]
    assert [len(runs) for runs in found] == [1] * len(found), found
    assert len(set.union(*found)) == sum(map(len, launchers)), found


#: Runs the launcher as process 1 of a PID namespace of its own, as in a container.
CONTAINER = """
import os, sys
os.execvp("unshare", ["unshare", "--pid", "--fork", sys.argv[1], sys.executable, "-c", *sys.argv[2:]])
"""


@pytest.mark.parametrize("options", ["--mount-proc", "--kill-child"])
def test_containers_and_their_restarts_are_neither_mixed_nor_scattered(tmp_path: Path, options: str) -> None:
    tried = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    if shutil.which("unshare") is None or subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("no PID namespace can be made here")
    found: list[set[str]] = []
    for lives in (["5 killed prompt"], ["5 closed prompt"], ["8 closed late"]):
        words = [options, textwrap.dedent(LAUNCHER), tmp_path, *lives]
        found += [runs for starts in launch_children([start_child(CONTAINER, *words)]) for runs in starts]
    words = [options, textwrap.dedent(LAUNCHER), tmp_path, "8 closed prompt"]
    together = launch_children([start_child(CONTAINER, *words) for _ in range(2)])
    found += [runs for starts in together for runs in starts]
    assert [len(runs) for runs in found] == [1] * 5, found
    assert len(set.union(*found)) == 5, found


def test_starts_at_once_under_one_run_id_are_separated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERT_LOAD_DUMP_RUN_ID", "deploy-1")
    launch(tmp_path, [["8 closed prompt"]] * 2)
    runs = [open_run(tmp_path, f"deploy-1@{number}") for number in (1, 2)]
    for run in runs:
        assert sorted(session.info.ep_rank for session in run.sessions) == list(range(8))
        assert len({session.info.start_identity for session in run.sessions}) == 1
        codes = {finding.code for finding in check_run(run).findings}
        assert {"several_starts", "mixed_starts"} & codes == {"several_starts"}
    assert len({run.sessions[0].info.start_identity for run in runs}) == 2


def test_example_runs_as_program_with_clean_dump(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    program = [sys.executable, "-W", "error", ROOT / "examples/transformers_moe.py", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"eplb-analyze summary {tmp_path}" in done.stdout

    analyze = Path(sys.executable).with_name("eplb-analyze")
    checked = subprocess.run([analyze, "check", tmp_path], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "complete and intact" in checked.stdout

    run = open_run(tmp_path)
    steps = run.steps()
    assert set(steps["state"]) == {"recorded"}
    assert steps["phase"].to_list() == (["prefill"] + ["decode"] * 15) * 8
    assert set(steps.filter(steps["phase"] == "decode")["num_tokens"]) == {6}
    loads = run.loads()
    assert set(loads["layer"]) == {1, 2, 3, 4}
    # Every token goes to 4 experts (top_k) in every layer and step.
    expected = np.repeat(steps["num_tokens"].to_numpy() * 4, 4)
    assert loads["load"].list.sum().to_list() == expected.tolist()
