"""Work that forked processes share: the same results as of one process, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import cli

from eplb_dump import ExpertLoadWriter

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux forks a process that has imported numpy"
)

#: Three processes on any machine; the test's own process has threads.
SETUP = """
import os, signal, sys, threading, time
from eplb_analyze import forks
forks.num_workers = lambda: 3
forks.allow_forks()
here = os.getpid()
def no_child():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
"""


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", SETUP + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_results_of_several_processes_come_in_the_order_of_the_items() -> None:
    out = run("""
found = list(forks.forked_map(lambda item: (item, os.getpid()), iter(range(20))))
assert [item for item, _ in found] == [item for _, (item, _) in found] == list(range(20))
pids = [pid for _, (_, pid) in found]
assert pids[:3] * 6 + pids[:2] == pids and len({*pids, here}) == 4
assert no_child()
print("end")
""")
    assert out == "end\n"  # once: no other process has printed, or run what comes after


def test_results_larger_than_a_pipe_arrive() -> None:
    run("""
found = list(forks.forked_map(lambda item: bytes([item]) * (3 << 20), range(8)))
assert all(result == bytes([item]) * (3 << 20) for item, result in found)
""")


def test_an_error_reaches_the_caller_and_ends_the_processes() -> None:
    run("""
def work(item):
    if item == 4:
        raise KeyError("four")
    return item
found = []
try:
    for pair in forks.forked_map(work, range(1000)):
        found.append(pair)
except KeyError as error:
    assert error.args == ("four",)
    assert "in work" in str(error.__cause__)  # where it happened
assert found == [(i, i) for i in range(4)]
assert no_child()
""")


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    run("""
try:
    list(forks.forked_map(lambda item: threading.Lock(), range(4)))
except TypeError as error:
    assert "pickle" in str(error)
else:
    sys.exit("no error")
""")


@pytest.mark.parametrize("item", [0, 5, 19])
def test_what_a_killed_process_has_not_done_is_done_here(item: int) -> None:
    run(f"""
def work(item):
    if item == {item} and os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid()
found = list(forks.forked_map(work, range(20)))
assert [result for _, (result, _) in found] == list(range(20))
assert [item for item, (_, pid) in found if pid == here] == list(range({item}, 20, 3))
""")


def test_an_interrupt_in_a_new_process_does_not_make_it_its_parent() -> None:
    out = run("""
def interrupted(threads):
    raise KeyboardInterrupt
forks.limit_workers = interrupted
assert list(forks.forked_map(lambda item: item, range(5))) == [(item, item) for item in range(5)]
assert no_child()
print("end")
""")
    assert out == "end\n"


def test_a_thread_may_have_any_name_and_a_launcher_may_have_ignored_its_children() -> None:
    run("""
with open("/proc/self/comm", "wb") as comm:
    comm.write(b"eplb-auswertun\\xc3")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
forks.allow_forks()
found = list(forks.forked_map(lambda item: os.getpid(), range(5)))
assert here not in dict(found).values()
assert no_child()
""")


def test_closing_ends_the_processes() -> None:
    run("""
found = forks.forked_map(lambda item: item if item < 3 else time.sleep(600), range(20))
assert next(found) == (0, 0)
found.close()
assert no_child()
""")


def test_threads_do_what_processes_cannot_be_forked_for() -> None:
    run("""
forked, fork = [], os.fork
def once():
    if forked:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    forked.append(1)
    return fork()
os.fork = once
files = os.listdir("/proc/self/fd")
assert list(forks.forked_map(lambda item: os.getpid(), range(5), threads=1)) == [(i, here) for i in range(5)]
assert forked and no_child() and os.listdir("/proc/self/fd") == files
""")


def test_processes_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    """They end when they send their next result."""
    code = f"""
def work(item):
    open(f"{tmp_path}/{{os.getpid()}}", "w").close()
    time.sleep(0.01)
    return bytes(1 << 20)
for item, _ in forks.forked_map(work, range(10**6)):
    if item == 6:
        os.kill(here, signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", SETUP + code], check=False, timeout=120)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    end = time.monotonic() + 60
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


@pytest.mark.parametrize(
    "case",
    [
        "forks._allowed = False",
        "forks.num_workers = lambda: 1",
        "thread = threading.Thread(target=event.wait, daemon=True); thread.start()",
        "items = [0]",
    ],
)
def test_nothing_is_forked_where_it_is_unsafe_or_useless(case: str) -> None:
    run(f"""
event, items = threading.Event(), range(5)
{case}
found = list(forks.forked_map(lambda item: os.getpid(), items, threads=1))
assert found == [(item, here) for item in items]
event.set()
""")


# ---- the commands

#: The command line on a machine of three cores.
PROGRAM = """
import sys
from eplb_analyze import forks
forks.num_workers = lambda: 3
made, helper = [], forks._Helper
forks._Helper = lambda *given: made.append(1) or helper(*given)
from eplb_analyze.__main__ import main
try:
    main()
finally:
    assert len(made) >= 3
"""

COMMANDS = (
    ("summary",),
    ("experts", "--window-steps", "24"),
    ("experts", "--layer", "2"),
    ("ranks",),
    ("timeline", "--formula", "active-experts"),
    ("rearrangements",),
    ("report",),
)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of many blocks: of one rank; of two, one of which is gone for a while; and a damaged one."""
    root = tmp_path_factory.mktemp("dumps")
    rng = np.random.default_rng(5)
    for scope, ranks in (("global", [0]), ("local", [0, 1]), ("damaged", [0])):
        placements = [np.stack([rng.permutation(8) for _ in range(4)]) for _ in range(3)]
        for rank in ranks:
            with ExpertLoadWriter(
                root / scope, model="m", num_logical_experts=8, ep_size=2, ep_rank=rank, run_id="r",
                scope="local" if scope == "local" else "global", segment_steps=50, flush_interval=60,
            ) as writer:  # fmt: skip
                for step in range(420):
                    load = rng.poisson(30 if step % 7 else 300, size=(4, 8))
                    load[:, 3] *= 4 if 150 < step < 260 else 1
                    if rank == 0 or not 100 <= step < 120:
                        writer.record(
                            step, load, placements[step // 160], phase="decode" if step % 3 else "prefill"
                        )
                    if step % 50 == 49:
                        assert writer.flush(60)
                assert writer.close(60)
    damaged = sorted((root / "damaged").rglob("loads-*.parquet"))[3]
    data = bytearray(damaged.read_bytes())
    data[300:310] = bytes(10)
    damaged.write_bytes(data)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("name", "command"),
    [(name, command) for name in ("global", "local", "damaged") for command in COMMANDS]
    + [("local", ("traffic",))],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_says_the_same_whether_processes_share_its_work_or_not(
    dumps: dict[str, Path], name: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    pages = tmp_path / "a.html", tmp_path / "b.html"
    outputs = [("-o", str(page)) if command[0] == "report" else ("--json",) for page in pages]
    alone = cli(*command, *outputs[0], dumps[name])
    shared = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *command, *outputs[1], str(dumps[name])],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert shared.returncode == alone.returncode == 0, shared.stderr
    assert shared.stderr.replace("b.html", "a.html") == alone.stderr
    if command[0] == "report":
        assert _without_time(pages[0]) == _without_time(pages[1])
    else:
        assert shared.stdout == alone.stdout
        assert json.loads(alone.stdout)


def _without_time(page: Path) -> list[str]:
    """A report without the line that says when it was made."""
    lines = page.read_text().splitlines()
    found = [re.sub(r'"made":"[^"]*"', "", line) for line in lines]
    assert found != lines
    return found
