"""What each refresh of `watch` reads and costs while writers append to the run.

    python -m benchmarks.watch [--ranks 32] [--rate 20] [--looks 30]

Another process writes all ranks of one engine at that rate, with scope local. This process refreshes every
second. The kernel counts the bytes that it reads (`rchar` in /proc/self/io).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.synchronize
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import workload
from eplb_analyze.live.watch import Follower
from eplb_dump import ExpertLoadWriter


def write(folder: Path, ranks: int, rate: float, ended: multiprocessing.synchronize.Event) -> None:
    """All ranks of an engine, in lockstep, until ``ended`` is set."""
    # As many slots as the other benchmarks have, rounded up so that every rank has equally many.
    slots = np.arange(-(-workload.SLOTS // ranks) * ranks) % workload.SLOTS
    placement = workload.placement()[:, slots]
    loads = [workload.loads(32, seed=rank, tokens=118 / ranks)[..., slots] for rank in range(ranks)]
    writers = [
        ExpertLoadWriter(
            folder, model="deepseek-v3", num_logical_experts=workload.LOGICAL, ep_size=ranks,
            ep_rank=rank, scope="local", run_id="r",
        )
        for rank in range(ranks)
    ]  # fmt: skip
    begun, step = time.monotonic(), 0
    while not ended.is_set():
        for writer, load in zip(writers, loads, strict=True):
            writer.record(step, load[step % 32], placement)
        step += 1
        time.sleep(max(0.0, begun + step / rate - time.monotonic()))
    dropped = sum(writer.stats().dropped for writer in writers)
    print(f"written: {step:,} steps in {time.monotonic() - begun:.0f} s, {dropped} dropped")
    for writer in writers:
        writer.close()


@contextlib.contextmanager
def running_engine(ranks: int, rate: float, before: float) -> Iterator[Path]:
    """The folder that a process writes all ranks of an engine into, so many seconds after it began."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, ended = Path(name), context.Event()
        engine = context.Process(target=write, args=(folder, ranks, rate, ended))
        engine.start()
        try:
            while engine.is_alive() and not any(folder.rglob("*.frames")):
                time.sleep(0.1)
            time.sleep(before)
            yield folder
        finally:
            ended.set()
            engine.join()


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def grown(folder: Path) -> int:
    """Bytes of journals and manifests now. They only grow while no segment is sealed."""
    return sum(path.stat().st_size for path in folder.rglob("*.frames"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=workload.EP_SIZE)
    parser.add_argument("--rate", type=float, default=20.0, help="steps a second")
    parser.add_argument("--looks", type=int, default=30)
    parser.add_argument("--before", type=float, default=10.0, help="seconds written before the first look")
    options = parser.parse_args()
    with running_engine(options.ranks, options.rate, options.before) as folder:
        rows = []
        follower: Follower | None = None
        for _ in range(options.looks + 1):
            due = time.monotonic() + 1.0
            size, begun, cpu, read = grown(folder), time.perf_counter(), time.process_time(), read_bytes()
            follower = follower or Follower(folder)
            look = follower.look()
            rows.append((read_bytes() - read, time.process_time() - cpu, time.perf_counter() - begun, size))
            time.sleep(max(0.0, due - time.monotonic()))
    first, *later = rows
    print(f"first look: {first[0] / 1e6:.1f} MB of {first[3] / 1e6:.1f} MB, {first[1]:.2f} s of CPU")
    appended = (later[-1][3] - first[3]) / len(later)
    for what, column, unit, scale in (
        ("read", 0, "MB", 1e6),
        ("CPU", 1, "ms", 1e-3),
        ("wall", 2, "ms", 1e-3),
    ):
        values = sorted(row[column] / scale for row in later)
        print(f"{what} a look: median {statistics.median(values):.1f} {unit}, most {values[-1]:.1f} {unit}")
    print(f"appended a look: {appended / 1e6:.1f} MB; {look.complete} complete steps in the window")


if __name__ == "__main__":
    main()
