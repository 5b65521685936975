"""How long the commands take on long runs, and how much memory, beside a bare decode of the same files.

    python -m benchmarks.analyze [--steps 5000 20000] [--local-steps 1000] [--repeat 3] [--instructions]

Makes dumps of DeepSeek-V3's shape with a rearrangement every 2,000 steps: one of scope global for each of
``--steps``, one of scope local with 32 ranks. Each figure is a whole program, start-up included, the best
of ``--repeat``, with the memory of the largest of its processes; all run one after another, each peer in the
same run. Ratios are to pyarrow's decode of the ``load`` column, without checksums.

``--instructions`` counts the instructions of each process with valgrind instead, 50 times as slow: a count is
the same on a busy machine, to about 1%. It does not show waiting, nor what misses the processor's caches.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import workload
from eplb_dump import ExpertLoadWriter

DECODE = """
import glob, sys
import pyarrow.parquet as pq
for path in glob.glob(sys.argv[1] + "/**/loads-*.parquet", recursive=True):
    file = pq.ParquetFile(path, memory_map=False)
    for group in range(file.metadata.num_row_groups):
        file.read_row_group(group, columns=["load"], use_threads=False)
"""
NUMPY = """
import glob, sys
import numpy as np
import pyarrow.parquet as pq
total, count = 0.0, 0
for path in glob.glob(sys.argv[1] + "/**/loads-*.parquet", recursive=True):
    file = pq.ParquetFile(path, memory_map=False)
    for group in range(file.metadata.num_row_groups):
        column = file.read_row_group(group, columns=["load"], use_threads=False)["load"].combine_chunks()
        ranks = column.values.to_numpy().reshape(len(column), 32, -1).sum(axis=2)
        total += float((ranks.mean(axis=1) / ranks.max(axis=1)).sum())
        count += len(ranks)
print(total / count)
"""
DUCKDB = """
import sys
import duckdb
duckdb.sql("SET threads TO 2")
print(duckdb.sql(f'''
    SELECT avg(list_sum(rank_load) / len(rank_load) / list_max(rank_load))
    FROM read_parquet('{sys.argv[1]}/**/loads-*.parquet')
''').fetchall())
"""
COMMANDS = (
    ("summary",),
    ("experts",),
    ("ranks",),
    ("timeline",),
    ("rearrangements",),
    ("layer", "12", "--step", "400"),
)


def make(folder: Path, steps: int) -> None:
    """A run of scope global."""
    rng = np.random.default_rng(0)
    placement = workload.placement().astype(np.int32)
    with ExpertLoadWriter(
        folder, model="deepseek-v3", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE,
        scope="global", run_id="r",
    ) as writer:  # fmt: skip
        for start in range(0, steps, 250):
            loads = workload.loads(min(250, steps - start), seed=start)
            for step, load in enumerate(loads, start):
                if step and step % 2000 == 0:
                    placement = np.stack([rng.permutation(row) for row in placement])
                writer.record(step, load, placement)
            assert writer.flush(60)
        assert writer.close(120)


def make_local(folder: Path, steps: int) -> None:
    """The hard case: a file a rank, each with a 32nd of the tokens."""
    placement = workload.placement().astype(np.int32)
    for rank in range(workload.EP_SIZE):
        with ExpertLoadWriter(
            folder, model="deepseek-v3", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE,
            ep_rank=rank, scope="local", run_id="r",
        ) as writer:  # fmt: skip
            for start in range(0, steps, 250):
                loads = workload.loads(min(250, steps - start), seed=start + rank, tokens=118 / 32)
                for step, load in enumerate(loads, start):
                    writer.record(step, load, placement)
                assert writer.flush(60)
            assert writer.close(120)


def apart(maker: Callable[[Path, int], None], folder: Path, steps: int) -> None:
    """Make a dump in another process: what this one once held would count as its children's memory."""
    process = multiprocessing.get_context("spawn").Process(target=maker, args=(folder, steps))
    process.start()
    process.join()
    assert process.exitcode == 0


def measure(arguments: Sequence[str], repeat: int) -> tuple[float, float]:
    """Best wall-clock seconds and largest peak memory in MiB of a process."""
    seconds, peak = [], 0.0
    for _ in range(repeat):
        start = time.perf_counter()
        child = os.posix_spawn(
            arguments[0], arguments, {**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )  # fmt: skip
        _, status, usage = os.wait4(child, 0)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, usage.ru_maxrss / 1024)
        assert status == 0, arguments
    return min(seconds), peak


def instructions(arguments: Sequence[str]) -> int:
    """How many instructions a process executes, on one processor, where a command starts no others."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env=environment)  # compiles modules
    valgrind = ["valgrind", "--tool=callgrind", "--trace-children=yes", f"--callgrind-out-file={os.devnull}"]
    done = subprocess.run(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), *valgrind, *arguments],
        check=True, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    found = re.findall(r"Collected : (\d+)", done.stderr)
    assert len(found) == 1, done.stderr
    return int(found[0])


def program() -> str:
    """The command line program that is installed beside this interpreter."""
    return shutil.which("eplb-analyze", path=str(Path(sys.executable).parent)) or "eplb-analyze"


def processes(folder: Path) -> dict[str, list[str]]:
    """The command line of each peer, the bare decode first, and of each command."""
    found = {"decode": DECODE, "numpy: balancedness": NUMPY}
    if importlib.util.find_spec("duckdb"):
        found["DuckDB: of rank_load"] = DUCKDB
    rows = {name: [sys.executable, "-c", code, str(folder)] for name, code in found.items()}
    report = "report", "--force", "-o", f"{folder}.html"
    commands = {**{" ".join(command): command for command in COMMANDS}, "report": report}
    return rows | {name: [program(), *command, str(folder)] for name, command in commands.items()}


def compare(folder: Path, repeat: int) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of each command and peer."""
    found: dict[str, tuple[float, float]] = {}
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    print(f"  {size / 1e6:,.0f} MB")
    for name, arguments in processes(folder).items():
        seconds, peak = found[name] = measure(arguments, repeat)
        bare = found["decode"][0]
        print(f"  {name:26s} {seconds:6.2f} s  {seconds / bare:5.2f}x   {peak:5.0f} MiB", flush=True)
    return found


def count(folder: Path) -> None:
    """Print the instructions of each command and peer."""
    bare = 0
    for name, arguments in processes(folder).items():
        number = instructions(arguments)
        bare = bare or number
        print(f"  {name:26s} {number / 1e9:7.2f} G  {number / bare:5.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[5000, 20000])
    parser.add_argument("--local-steps", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--instructions", action="store_true")
    args = parser.parse_args()

    def look(folder: Path) -> None:
        if args.instructions:
            count(folder)
        else:
            compare(folder, args.repeat)

    if args.instructions:
        print(f"eplb-analyze --help: {instructions([program(), '--help']) / 1e9:.2f} G instructions")
    else:
        seconds, peak = measure([program(), "--help"], args.repeat)
        print(f"eplb-analyze --help: {seconds:.2f} s, {peak:.0f} MiB")
    for steps in args.steps:
        with tempfile.TemporaryDirectory() as folder:
            apart(make, Path(folder) / "dump", steps)
            print(f"scope global, {steps:,} steps of {workload.LAYERS} × {workload.SLOTS}")
            look(Path(folder) / "dump")
    if args.local_steps:
        with tempfile.TemporaryDirectory() as folder:
            apart(make_local, Path(folder) / "dump", args.local_steps)
            print(f"scope local, 32 ranks, {args.local_steps:,} steps")
            look(Path(folder) / "dump")


if __name__ == "__main__":
    main()
