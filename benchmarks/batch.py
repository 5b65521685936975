"""How `postmortem` scales with workers, and what each executor costs before it does any work.

    python -m benchmarks.batch [--runs 12] [--steps 2000] [--long 40000] [--writers 1] [--repeat 2]
        [--workers 1,2] [--executors local,processes,ray] [--nodes 2]

Records a run of DeepSeek-V3's shape, scope global, and copies it; then one long run, which is read in parts,
by ``--writers`` processes at once. 0 runs or 0 steps leave out either.
Each figure is a whole process, the best of ``--repeat`` in sequence. Ratios are to one worker process (the
first of ``--workers``). An empty batch shows the cost of an executor. Beside the ratios: what as many
processes reach on this machine that share nothing and read the same runs, startup excluded.
Processors that are two threads of one core, or share the bandwidth of memory, reach less than their number.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import workload
from benchmarks.analyze import apart, make
from benchmarks.figure import Figure

#: The loads of a long run repeat after so many steps, because to draw them takes longer than to record them.
DRAWN = 2000

MEASURED = """
import resource, sys
from eplb_analyze.__main__ import main
sys.argv = ["eplb-analyze", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code in (0, 3), end.code
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""

#: Reads a run again and again, on one thread, once a line comes in.
READING = """
import sys
from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.parallel import limit_workers
limit_workers(1)
def read(times):
    for _ in range(times):
        summarize(open_run(sys.argv[1]))
read(1)
print("ready", flush=True)
sys.stdin.readline()
read(int(sys.argv[2]))
"""


def measure(
    arguments: list[str], repeat: int, prefix: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> tuple[float, int]:
    """The best time in seconds, and the MiB of the program itself."""
    seconds, own = [], 0
    for _ in range(repeat):
        start = time.perf_counter()
        out = subprocess.run(
            [*prefix, sys.executable, "-c", MEASURED, *arguments],
            env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        own = max(own, int(out.stderr.split()[-1]))
    return min(seconds), own


def reading(run: Path, processes: int, times: int = 20) -> float:
    """The seconds in which each of so many processes reads a run so many times."""
    command = [sys.executable, "-c", READING, str(run), str(times)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as the program sets it
    started = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for each in started:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for each in started:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    failed = sum(each.wait() != 0 for each in started)
    assert not failed
    return time.perf_counter() - start


def limits(run: Path, counts: list[int], repeat: int) -> dict[int, float]:
    """How much more the machine does with processes that share nothing, by their number.

    They do what workers do. To decode with Arrow is no limit: 16 processes did 1.7 times as much as one on a
    machine where 16 workers did 10 times as much.
    """
    print("reading a run in processes that share nothing, startup excluded: the machine's limit")
    one = min(reading(run, 1) for _ in range(repeat))
    found = {}
    for count in counts:
        seconds = one if count == 1 else min(reading(run, count) for _ in range(repeat))
        found[count] = count * one / seconds
        print(f"  processes  {count:2d} {seconds:7.2f} s {found[count]:5.2f}x", flush=True)
    return found


def compare(
    title: str,
    folder: Path,
    repeat: int,
    counts: list[int],
    executors: Sequence[str] = ("local", "processes"),
) -> dict[int, float]:
    """The seconds of each number of worker processes."""
    found = {}
    print(title)
    base = None
    rows = [("local", 1)] * ("local" in executors)
    for name in ("processes", "ray"):
        if name in executors and (name != "ray" or importlib.util.find_spec("ray")):
            rows += [(name, count) for count in counts]
    for name, workers in rows:
        arguments = ["postmortem", str(folder), "--executor", name]
        arguments += [] if name == "local" else ["--workers", str(workers)]
        seconds, own = measure(arguments, repeat)
        base = seconds if (name, workers) == ("processes", counts[0]) else base
        ratio = f"{base / seconds:5.2f}x" if base else "       "
        threads = " (threads share the work)" if name == "local" else ""
        print(f"  {name:10s} {workers:2d} {seconds:7.2f} s {ratio}  {own:5d} MiB{threads}", flush=True)
        if name == "processes":
            found[workers] = seconds
    return found


def figures(quick: bool) -> Iterator[Figure]:
    """One worker against one for each processor, or 16 of them."""
    most = min(16, len(os.sched_getaffinity(0)))
    runs, long = (4, 8_000) if quick else (10 * most, 50_000 * most)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copies(root / "many", runs, 2000)
        limit = limits(root / "many/0", [most], 2)[most]
        make_long(root / "long", long, most)
        for what, share, name in (
            (f"{runs} runs of 2,000 steps", 12 / 16, "many"),
            (f"one run of {long:,} steps", 8 / 16, "long"),
        ):
            found = compare(what, root / name, 2, [1, most])
            yield Figure(
                f"`postmortem --executor processes` of {what}, {most} workers against one",
                f"≥ {share * most:g}x",
                f"{found[1] / found[most]:.2f}x, {found[most]:.1f} s",
                f"{most} processes that share nothing reach {limit:.1f}x",
                found[1] / found[most] >= share * most,
            )


def by_nodes(folder: Path, repeat: int, nodes: int) -> None:
    """Ray clusters of one node and of several, each with one processor and a network of its own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))
    import ray_nodes

    if why := ray_nodes.why_not():
        print(f"no Ray cluster of {nodes} nodes: {why}")
        return
    print(f"{folder.name}: Ray clusters of nodes with one processor and a network of their own")
    base = None
    for count in (1, nodes):
        with ray_nodes.cluster(count) as address:
            arguments = ["postmortem", str(folder), "--executor", "ray", "--ray-address", address]
            seconds, own = measure(arguments, repeat, ray_nodes.on_node(1), ray_nodes.ENVIRONMENT)
        base = base or seconds
        print(f"  ray, nodes {count:2d} {seconds:7.2f} s {base / seconds:5.2f}x  {own:5d} MiB", flush=True)


def copies(folder: Path, runs: int, steps: int) -> None:
    """A run, so many times."""
    apart(make, folder / "0", steps)
    for number in range(1, runs):
        shutil.copytree(folder / "0", folder / str(number))


def make_long(folder: Path, steps: int, writers: int = 1) -> None:
    """One run of scope global, with another placement every 2,000 steps.

    So many processes record it at the same time, with the clocks of one after the other: the engine seems
    to have been restarted.
    """
    context = multiprocessing.get_context("spawn")
    edges = [steps * i // writers for i in range(writers + 1)]
    recording = [
        context.Process(target=_record, args=(folder, number, *own), daemon=True)
        for number, own in enumerate(itertools.pairwise(edges))
    ]
    for process in recording:
        process.start()
    for process in recording:
        process.join()
    assert all(process.exitcode == 0 for process in recording)


def _record(folder: Path, number: int, first: int, end: int) -> None:
    clocks, later = {name: getattr(time, name) for name in ("time_ns", "monotonic_ns")}, number * 10**13
    for name, clock in clocks.items():
        setattr(time, name, lambda clock=clock: clock() + later)
    from eplb_dump import ExpertLoadWriter

    loads = workload.loads(DRAWN, seed=1)
    with ExpertLoadWriter(
        folder, model="deepseek-v3", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE,
        scope="global", run_id="r",
    ) as writer:  # fmt: skip
        for step in range(first, end):
            if step == first or step % 2000 == 0:
                rng = np.random.default_rng(step // 2000)
                placement = np.stack([rng.permutation(row) for row in workload.placement().astype(np.int32)])
            writer.record(step, loads[step * 17 % DRAWN], placement)
            assert step % 256 < 255 or writer.flush(60)
        assert writer.close(120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--long", type=int, default=40000)
    parser.add_argument("--writers", type=int, default=1, help="processes that record the long run")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--executors", default="local,processes,ray")
    parser.add_argument("--nodes", type=int, default=0, help="also on Ray clusters of one node and of these")
    parser.add_argument("--workers", default="1,2", help="numbers of workers; ratios are to the first")
    args = parser.parse_args()
    counts = [int(count) for count in args.workers.split(",")]
    executors = args.executors.split(",")
    # No usage reports of Ray.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "none").mkdir()
        compare("nothing to read: the cost of an executor", root / "none", args.repeat, counts, executors)
        copies(root / "many", max(1, args.runs), args.steps)
        if args.long:
            start = time.perf_counter()
            make_long(root / "long", args.long, args.writers)
            print(f"the long run was recorded in {time.perf_counter() - start:.0f} s", flush=True)
        limits(root / "many/0", counts, args.repeat)
        for name, measured, title in (
            ("many", args.runs, f"{args.runs} runs of {args.steps:,} steps"),
            ("long", args.long, f"one run of {args.long:,} steps"),
        ):
            if measured:
                compare(title, root / name, args.repeat, counts, executors)
                if args.nodes:
                    by_nodes(root / name, args.repeat, args.nodes)


if __name__ == "__main__":
    main()
