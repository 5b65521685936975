"""How long `replay` takes for a long run, by the number of settings, compared with decoding the files only.

    python -m benchmarks.replay [--steps 20000] [--settings 1 4 16 60] [--dispatch measured] [--workers 1 2]
                                [--repeat 3] [--options='--max-utilization 0.9 --layers-per-step 1']

Records a dump of DeepSeek-V3's shape, scope global, with a rearrangement every 2,000 steps. Each figure is a
whole program with its start-up, the best of ``--repeat``, by default with one worker and with one per core.
The decode is pyarrow's, of the ``load`` column, without checksums. Settings rearrange every 250 to 3,000
steps. CPU time is also that of a busy machine. ``--options`` are more of `replay`, such as conditions.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import workload
from benchmarks.analyze import DECODE, apart, make, measure
from eplb_analyze.parallel import num_cores

#: For 256 experts on 32 ranks.
INTERVALS = (3000, 2000, 1500, 1000, 750, 500, 350, 250, 2500, 1750, 1250, 850, 650, 450, 300)
REDUNDANT = (32, 64, 96, 128)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--settings", type=int, nargs="*", default=[1, 4, 16, 60])
    parser.add_argument("--dispatch", nargs="*", default=["measured"])
    parser.add_argument("--options", type=shlex.split, default=[], help="more options of `replay`")
    parser.add_argument("--workers", type=int, nargs="*", default=[*dict.fromkeys((1, num_cores()))])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    program = shutil.which("eplb-analyze", path=str(Path(sys.executable).parent)) or "eplb-analyze"
    with tempfile.TemporaryDirectory() as folder:
        apart(make, Path(folder), args.steps)
        print(f"{args.steps:,} steps of {workload.LAYERS} × {workload.SLOTS}, {num_cores()} cores")
        bare, peak = measure([sys.executable, "-c", DECODE, folder], args.repeat)
        print(f"  {'pyarrow: decode load':32s} {bare:6.2f} s   {peak:5.0f} MiB")
        for count in args.settings:
            redundant = REDUNDANT[: -(-count // len(INTERVALS))]
            intervals = INTERVALS[: -(-count // len(redundant))]
            command = [program, "replay", "--policy", "vllm", "--window-steps", "1000"]
            command += ["--redundant-experts", ",".join(map(str, redundant))]
            command += ["--interval-steps", ",".join(map(str, intervals)), *args.options]
            for dispatch, workers in itertools.product(args.dispatch, args.workers):
                options = ["--dispatch", dispatch, "--workers", str(workers)]
                before = processor_seconds()
                seconds, peak = measure([*command, *options, folder], args.repeat)
                busy = (processor_seconds() - before) / args.repeat
                settings = len(redundant) * len(intervals)
                name = f"{settings} settings, {dispatch}, {workers} workers"
                # Of several processes, only the first one is waited for by this one.
                used = f"{busy:6.2f} s of CPU   {peak:5.0f} MiB" if workers == 1 else ""
                print(
                    f"  {name:40s} {seconds:6.2f} s, {used:28s} {seconds / settings:5.2f} s each",
                    flush=True,
                )


def processor_seconds() -> float:
    """CPU time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
