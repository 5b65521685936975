"""Checks the plugin inside SGLang where there is neither pytest nor eplb_analyze, as on a GPU machine.

``python sglang_check.py OUT [cpu|cuda]`` in an environment that has SGLang, with ``tests/support`` and the
project on PYTHONPATH. Runs scenarios of sglang_ranks.py with and without the plugin, compares what
test_sglang.py compares, and prints one line for each; what the runs printed is in OUT. Exits with 1 if one
fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from helpers import placement_rows, read_table, sealed_loads, survived_loads
from sglang_runs import MOE_LAYERS, SLOTS, Recorded, SglangRun, assert_as_without, assert_recorded

SCRIPT = Path(__file__).with_name("sglang_ranks.py")
SECONDS = 100


def start(out: Path, ranks: int, scenario: str, device: str, *, plugin: bool = True) -> SglangRun:
    out.mkdir(parents=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("EXPERT_LOAD")}
    if plugin:
        variables["EXPERT_LOAD_DUMP_DIR"] = str(out / "dump")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(out), str(ranks), scenario, device]
    with (out / "printed.txt").open("w") as printed:
        process = subprocess.Popen(
            command, env=variables, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        raise RuntimeError(f"ended with {code}: {(out / 'printed.txt').read_text()[-3000:]}")
    return SglangRun(out, ranks, device)


def recorded(ours: SglangRun, rank: int) -> Recorded:
    (folder,) = ours.rank_folder(rank).glob("session=*")
    rows = read_table(folder, "steps").drop(["time"]).to_pydict()
    by_step = sealed_loads(folder)
    in_force = np.full((len(MOE_LAYERS), SLOTS), -1)
    changes = sorted(placement_rows(folder))
    placements = []
    for step in rows["step"]:
        while changes and changes[0][0] <= step:
            _, layer, _, slots = changes.pop(0)
            in_force[MOE_LAYERS.index(layer)] = slots
        placements.append(in_force.copy())
    told = zip(rows["step"], rows["phase"], rows["num_tokens"], strict=True)
    return Recorded(
        steps=rows["step"],
        status=rows["status"],
        loads=np.array([by_step[step] for step in rows["step"]]),
        placements=np.array(placements),
        described={step: (phase or "", -1 if tokens is None else tokens) for step, phase, tokens in told},
        device_ms=np.array([np.nan if ms is None else ms for ms in rows["device_ms"]]),
    )


def exact(ours: SglangRun) -> str:
    found = [recorded(ours, rank) for rank in range(ours.ranks)]
    assert_recorded(ours, found)
    known = np.concatenate([of.device_ms[~np.isnan(of.device_ms)] for of in found])
    span = f", {known.min():.3f} to {known.max():.3f} ms" if len(known) else ""
    steps, cells = sum(len(of.steps) for of in found), sum(of.loads.size for of in found)
    return f"{ours.ranks} ranks, {steps} steps, {cells} counts equal, device_ms of {len(known)}{span}"


def pair(out: Path, scenario: str, device: str) -> str:
    ours = start(out / "with", 2, scenario, device)
    said = exact(ours)
    theirs = start(out / "without", 2, scenario, device, plugin=False)
    assert_as_without(ours, theirs)
    return f"{said}; SGLang's own record and messages as without the plugin"


def alone(out: Path, scenario: str, device: str) -> str:
    return exact(start(out, 2, scenario, device))


def four(out: Path, scenario: str, device: str) -> str:
    return exact(start(out, 4, scenario, device))


def drafts(out: Path, scenario: str, device: str) -> str:
    ours = start(out, 1, scenario, device)
    assert ours.said(0, "began") == [1, 1, 0, 0, 0] * 3
    return exact(ours)


def per_token(out: Path, scenario: str, device: str) -> str:
    ours = start(out, 1, scenario, device)
    (text,) = [text for text in ours.said(0, "messages") if "expert-load recording is off" in text]
    (folder,) = ours.rank_folder(0).glob("session=*")
    found = survived_loads(folder)
    assert list(found) == [0, 1]
    assert np.array_equal(list(found.values()), ours.truth("loads")[0][:2, MOE_LAYERS])
    assert len(ours.said(0, "switch")) == 4
    return f"2 steps equal, then: {text}"


def killed(out: Path, scenario: str, device: str) -> str:
    ours = start(out, 2, scenario, device)
    for rank in range(2):
        (folder,) = ours.rank_folder(rank).glob("session=*")
        assert list(survived_loads(folder)) == list(range(20))
    return "2 ranks, 20 of 20 flushed steps are there after kill -9"


#: Scenario, how it is checked, and whether it needs a GPU; the most telling first.
CHECKS: list[tuple[str, Callable[[Path, str, str], str], bool]] = [
    ("stat", pair, False),
    ("graphs", pair, True),
    ("unsynchronized", alone, True),
    ("per_pass", pair, False),
    ("graphs_per_pass", pair, True),
    ("simple", four, False),
    ("scattered_dp", alone, False),
    ("dp_attention", alone, False),
    ("drafts", drafts, False),
    ("per_token", per_token, False),
    ("stuck", alone, False),
    ("killed", killed, False),
]


def result(root: Path, device: str, scenario: str, check: Callable[[Path, str, str], str]) -> bool:
    begin = time.monotonic()
    try:
        said, passed = check(root / scenario, scenario, device), True
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said, passed = f"{type(error).__name__}: {error} ({last.line})", False
        (root / scenario / "failed.txt").write_text(traceback.format_exc())
    seconds = time.monotonic() - begin
    print(f"{'PASS' if passed else 'FAIL'} {scenario} ({device}, {seconds:.0f} s): {said}", flush=True)
    return passed


def main() -> None:
    root, device = Path(sys.argv[1]).resolve(), (*sys.argv, "cpu")[2]
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 4))) as pool:
        running = []
        for scenario, check, needs_gpu in CHECKS:
            if needs_gpu and device == "cpu":
                print(f"NOT TESTED {scenario}: needs a GPU", flush=True)
            else:
                running.append(pool.submit(result, root, device, scenario, check))
        sys.exit(not all([done.result() for done in running]))  # noqa: C419 - print all


if __name__ == "__main__":
    main()
