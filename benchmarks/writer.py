"""The writer as a whole: slowdown of an engine's loop, sustained rate, bytes a step, an hour's steps.

    python -m benchmarks.writer loop|sustained|size|counts|hour

DeepSeek-V3's shape: 58 layers × 288 slots, EP 32, one writer.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import workload
from eplb_dump import ExpertLoadWriter


def open_writer(folder: str | Path, **options: Any) -> ExpertLoadWriter:
    settings = {"ep_size": workload.EP_SIZE, "scope": "global", **options}
    return ExpertLoadWriter(folder, model="m", num_logical_experts=workload.LOGICAL, **settings)


def wait_for_room(writer: ExpertLoadWriter) -> None:
    """An engine does not wait; here the producer does, to find the rate at which nothing is dropped."""
    while (ring := writer._staging._loads) is not None and ring.taken - ring.released > ring.count // 2:
        time.sleep(0.0002)


def folder_bytes(folder: str | Path) -> int:
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


# ---- an engine's loop of 5 ms steps, writer on against off


def python_step(work: int) -> None:
    """An engine's own Python: it holds the interpreter lock all the time, the worst case for it."""
    total = 0
    for i in range(work):
        total += i * i


def torch_step(pair: list[torch.Tensor]) -> None:
    """Kernels: the lock is released while they run."""
    torch.mm(pair[0], pair[0], out=pair[1])


def calibrated(step: Callable[[int], None], seconds: float) -> int:
    work = 1000
    while True:
        start = time.perf_counter()
        step(work)
        took = time.perf_counter() - start
        if took > seconds / 4:
            return int(work * seconds / took)
        work *= 2


#: A round with the writer on is preceded by so many seconds that are not timed: the writer's flush interval,
#: at the end of which its threads have as much to do as they get.
LEAD_SECONDS = 1.0
#: The default of :class:`~eplb_dump.ExpertLoadWriter`.
SEGMENT_STEPS = 2048


def loop(rounds: int, steps: int) -> dict[tuple[str, str], tuple[float, float, float]]:
    """How much longer a round takes, percent: lower quartile, median and upper quartile, by what was on."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    torch.set_num_threads(1)
    batch = [torch.from_numpy(load) for load in workload.loads(64)]
    placement = torch.from_numpy(workload.placement())
    # As many as the writer's queue holds of half a second, after which its thread empties it.
    copies = [torch.from_numpy(buffer) for buffer in np.zeros((100, *batch[0].shape), np.int32)]
    work = calibrated(python_step, 5e-3)

    def matmul(side: int) -> None:
        torch_step([torch.ones(side, side), torch.empty(side, side)])

    # Time grows with the third power of the side.
    matmul(512)
    start = time.perf_counter()
    for _ in range(5):
        matmul(512)
    side = int(512 * (5e-3 / ((time.perf_counter() - start) / 5)) ** (1 / 3))
    pair = [torch.ones(side, side), torch.empty(side, side)]

    def timed(step: Callable[[], None], after: Callable[[int], object] | None = None) -> float:
        start = time.perf_counter()
        for i in range(steps):
            step()
            if after is not None:
                after(i)
        return time.perf_counter() - start

    def recorded(step: Callable[[], None], writer: ExpertLoadWriter) -> float:
        """A round with the writer on. Its background work is done before the next round, which has it off."""
        begun = time.perf_counter()
        while time.perf_counter() - begun < LEAD_SECONDS:  # until its threads have as much to do as they get
            step()
            writer.record(None, batch[0], placement)
        took = timed(step, lambda i: writer.record(None, batch[i % 64], placement))
        assert writer.flush(60)
        while (stats := writer.stats()).segments_sealed < stats.recorded // sealing:
            time.sleep(0.01)
        return took

    # A round seals one segment of the default length. To seal shorter ones would take longer for each step.
    sealing = min(steps, SEGMENT_STEPS)
    print(f"a loop of 5 ms steps, {rounds} rounds of {steps} off, copy, on, off; quartiles in brackets")
    for name, step in (
        ("pure Python", lambda: python_step(work)),
        ("torch matmul", lambda: torch_step(pair)),
    ):
        ratios = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder, open_writer(folder, segment_steps=sealing) as writer:
            recorded(step, writer)
            for _ in range(rounds):
                before = timed(step)
                copied = timed(step, lambda i: copies[i % len(copies)].copy_(batch[i % 64]))
                on, after = recorded(step, writer), timed(step)
                off = (before + after) / 2  # the machine's own drift cancels out
                ratios["writer on"].append(on / off)
                ratios["a copy into a host buffer alone"].append(copied / off)
                ratios["off again"].append(after / before)
            stats = writer.stats()
        for state, values in ratios.items():
            low, middle, high = (100 * (value - 1) for value in statistics.quantiles(values, n=4))
            found[name, state] = low, middle, high
            print(f"{name:13s} {state:32s} {middle:+6.2f}% [{low:+.2f} … {high:+.2f}]", flush=True)
        print(f"{name:13s} {stats.segments_sealed} segments sealed, {stats.dropped} steps dropped")
    return found


# ---- as fast as it will go


def sustained(seconds: float) -> tuple[float, float, float, int]:
    """Rate at which nothing is dropped: a producer that records as fast as the queue empties.

    Returns steps/s into the journal, sealed and as plain bytes; steps dropped.
    """
    batch = [torch.from_numpy(load) for load in workload.loads(2048)]
    placement = torch.from_numpy(workload.placement())
    with tempfile.TemporaryDirectory() as folder:
        with open_writer(folder) as writer:
            start = time.perf_counter()
            step = 0
            while time.perf_counter() - start < seconds:
                for _ in range(64):
                    writer.record(None, batch[step % 2048], placement)
                    step += 1
                wait_for_room(writer)
            assert writer.flush(60)
            recorded = time.perf_counter() - start
            stats = writer.stats()
            assert writer.close(600)
            sealed = time.perf_counter() - start
        size = folder_bytes(folder)
        raw = workload.LAYERS * workload.SLOTS * 4
        # The physical limit: the same bytes written raw by one thread.
        path = Path(folder) / "raw"
        begin = time.perf_counter()
        with path.open("wb") as file:
            for i in range(min(step, 20_000)):
                file.write(batch[i % 2048].numpy().data)
        plain = min(step, 20_000) / (time.perf_counter() - begin)
    print(
        f"sustained: {step / recorded:,.0f} steps/s into the journal, {step / sealed:,.0f} steps/s sealed, "
        f"{stats.dropped} dropped of {step:,}; {size / step:,.0f} bytes a step"
    )
    print(f"writing the raw tensors ({raw:,} bytes) to a plain file: {plain:,.0f} steps/s")
    return step / recorded, step / sealed, plain, stats.dropped


# ---- bytes a step


def size(steps: int) -> dict[str, dict[str, float]]:
    """Bytes a step as a multiple of the loads' entropy, by kind of load and by who stores them."""
    found: dict[str, dict[str, float]] = {}
    print("bytes a step (× the entropy of the loads, their rates being known)")
    for name, sigma, tokens in (
        ("Poisson, lognormal rates σ = 0.5, mean 118", 0.5, 118.0),
        ("Poisson, equal rates, mean 118", 0.0, 118.0),
        ("Poisson, lognormal rates σ = 1, mean 118", 1.0, 118.0),
        ("one of 32 ranks, scope local: σ = 0.5, mean 3.7", 0.5, 3.7),
    ):
        loads = workload.loads(steps, sigma=sigma, tokens=tokens)
        entropy = workload.entropy_bytes(sigma=sigma, tokens=tokens)
        with tempfile.TemporaryDirectory() as folder:
            with open_writer(folder) as writer:
                for i, load in enumerate(loads):
                    writer.record(None, load, workload.placement())
                    if i % 128 == 127:
                        assert writer.flush(60)
            ours = folder_bytes(folder) / steps
        buffer = io.BytesIO()
        np.savez_compressed(buffer, loads=loads)
        npz = buffer.tell() / steps
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(loads), buffer)
        saved = buffer.tell() / steps
        lines = sum(len(json.dumps(load.tolist())) + 1 for load in loads[:20]) / 20
        print(f"{name}: entropy {entropy:,.0f}")
        for peer, value in (("eplb_dump", ours), ("npz", npz), ("torch.save", saved), ("JSON lines", lines)):
            print(f"    {peer:12s} {value:9,.0f}   {value / entropy:5.2f}x", flush=True)
            found.setdefault(name, {})[peer] = value / entropy
    return found


def counts(steps: int) -> None:
    """Bytes of a count by its mean, which is what docs/operate/cluster.md computes sizes with."""
    print("mean   bytes of a count   bytes of a rank's tokens   EP ranks, scope   bytes a step")
    ep_sizes = (4, 8, 16, 32)
    rows = [
        (mean, workload.EP_SIZE, "global")
        for mean in (0.1, 1.0, 3.7, 14.75, 29.5, 59.0, 118.0, 500.0, 2000.0)
    ]
    rows += [(118.0 / n, n, "local") for n in ep_sizes] + [(118.0, n, "global") for n in ep_sizes]
    for mean, ep_size, scope in rows:
        with tempfile.TemporaryDirectory() as folder:
            with open_writer(folder, ep_size=ep_size, scope=scope) as writer:
                for i, load in enumerate(workload.loads(steps, tokens=mean)):
                    writer.record(None, load, workload.placement())
                    if i % 128 == 127:
                        assert writer.flush(60)
            (path,) = Path(folder).rglob("loads-*.parquet")
            bytes_: Counter[str] = Counter()
            metadata = pq.read_metadata(path)
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    bytes_[column.path_in_schema.partition(".")[0]] += column.total_compressed_size
            of_count = bytes_["load"] / (steps * workload.LAYERS * workload.SLOTS)
            of_rank = bytes_["rank_load"] / (steps * workload.LAYERS * ep_size)
            print(
                f"{mean:6.1f} {of_count:10.2f} {of_rank:20.2f} {ep_size:23d} {scope:8s} "
                f"{folder_bytes(folder) / steps:16,.0f}"
            )


# ---- an hour's worth


def hour(steps: int) -> None:
    """72,000 steps (an hour at 20 a second) as fast as it goes, with a memory figure."""
    batch = workload.loads(512)
    placement = torch.from_numpy(workload.placement())
    tensors = [torch.from_numpy(load) for load in batch]
    with tempfile.TemporaryDirectory() as folder:
        with open_writer(folder) as writer:
            base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks = []
            start = time.perf_counter()
            for step in range(steps):
                # 512 different loads, shifted by layers, so that no two are alike.
                writer.record(None, tensors[step * 7 % 512], placement)
                wait_for_room(writer)
                if (step + 1) % (steps // 4) == 0:
                    peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)
            assert writer.close(300)
            took = time.perf_counter() - start
            stats = writer.stats()
        files = [p for p in Path(folder).rglob("*") if p.is_file()]
        from eplb_analyze import open_run
        from eplb_analyze.analysis.check import check_run
        from eplb_analyze.reader.join import StepState

        begin = time.perf_counter()
        report = check_run(open_run(folder))
        checked = time.perf_counter() - begin
        # Poisson loads do not conserve tokens over layers.
        codes = sorted({f.code for f in report.findings} - {"conservation"})
        print(
            f"{steps:,} steps in {took:.1f} s ({steps / took:,.0f} a second), {stats.dropped} dropped, "
            f"{len(files)} files, {folder_bytes(folder) / 1e9:.2f} GB"
        )
        print("memory above the start, after each quarter:", ", ".join(f"{p:.0f}" for p in peaks), "MiB")
        recorded = report.steps.count(StepState.RECORDED)
        print(f"check: {checked:.1f} s, {recorded:,} recorded, findings: {codes or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["loop", "sustained", "size", "counts", "hour"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    if args.what == "loop":
        loop(args.rounds, args.steps or SEGMENT_STEPS)
    elif args.what == "sustained":
        sustained(args.seconds)
    elif args.what == "size":
        size(args.steps or 1024)
    elif args.what == "counts":
        counts(args.steps or 2048)
    else:
        hour(args.steps or 72_000)


if __name__ == "__main__":
    main()
