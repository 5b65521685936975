"""How `postmortem` scales with workers, and what each executor costs before it does any work.

    python -m benchmarks.batch [--runs 12] [--steps 2000] [--long 40000] [--repeat 2] [--workers 1,2]

Records a run of DeepSeek-V3's shape, scope global, and copies it; then one long run, which is read in parts.
Each figure is a whole process, the best of ``--repeat`` in sequence. Ratios are to one worker process (the
first of ``--workers``). An empty batch shows the cost of an executor; memory is that of the largest worker.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.analyze import apart, make

MEASURED = """
import resource, sys
from eplb_analyze.__main__ import main
sys.argv = ["eplb-analyze", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert end.code in (0, 3), end.code
kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(*(resource.getrusage(kind).ru_maxrss // 1024 for kind in kinds), file=sys.stderr)
"""


def measure(arguments: list[str], repeat: int) -> tuple[float, int, int]:
    """The best time in seconds, and the MiB of the program and of its largest worker."""
    seconds, own, worker = [], 0, 0
    for _ in range(repeat):
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", MEASURED, *arguments],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        one, other = map(int, out.stderr.split()[-2:])
        own, worker = max(own, one), max(worker, other)
    return min(seconds), own, worker


def compare(title: str, folder: Path, repeat: int, counts: list[int]) -> None:
    print(title)
    base = None
    rows = [("local", 1), *(("processes", count) for count in counts)]
    if importlib.util.find_spec("ray"):
        rows += [("ray", count) for count in counts]
    for name, workers in rows:
        arguments = ["postmortem", str(folder), "--executor", name]
        arguments += [] if name == "local" else ["--workers", str(workers)]
        seconds, own, worker = measure(arguments, repeat)
        base = seconds if (name, workers) == ("processes", counts[0]) else base
        ratio = f"{base / seconds:5.2f}x" if base else "       "
        threads = " (threads share the work)" if name == "local" else ""
        memory = f"{own:5d} MiB, a worker {worker:5d} MiB" if name == "processes" else f"{own:5d} MiB"
        print(f"  {name:10s} {workers} {seconds:7.2f} s {ratio}  {memory}{threads}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--long", type=int, default=40000)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--workers", default="1,2", help="numbers of workers; ratios are to the first")
    args = parser.parse_args()
    counts = [int(count) for count in args.workers.split(",")]
    # No usage reports of Ray.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "none").mkdir()
        compare("nothing to read: the cost of an executor", root / "none", args.repeat, counts)
        apart(make, root / "many/0", args.steps)
        for number in range(1, args.runs):
            shutil.copytree(root / "many/0", root / f"many/{number}")
        compare(f"{args.runs} runs of {args.steps:,} steps", root / "many", args.repeat, counts)
        apart(make, root / "long", args.long)
        compare(f"one run of {args.long:,} steps", root / "long", args.repeat, counts)


if __name__ == "__main__":
    main()
