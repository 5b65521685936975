"""What `record` costs the engine's thread, next to a bare copy and to a synchronous one.

    python -m benchmarks.hot_path [--device cuda] [--steps 3000]

The engine is paced at one step every few milliseconds, as the background thread is part of the
cost. With CUDA, "busy" has a kernel of about 2 ms on the stream in front of every call, and all
calls of `record` run with torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import workload
from benchmarks.cuda import no_synchronization
from eplb_dump import ExpertLoadWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pace-ms", type=float, default=2.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.device == "cpu":
            cpu(folder, args.steps, args.pace_ms)
        else:
            cuda(folder, args.device, args.steps, args.pace_ms)


def open_writer(folder: str, **options: Any) -> ExpertLoadWriter:
    return ExpertLoadWriter(
        folder, model="m", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE, scope="global",
        **options,
    )  # fmt: skip


def spin(seconds: float) -> None:
    """Busy Python, as an engine's own: it holds the interpreter lock most of the time."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def measure(call: Callable[[int], object], steps: int, before: Callable[[], None]) -> Any:
    """Microseconds of each call, without the first tenth; NaN if it returned -1: its step was dropped."""
    took = np.full(steps, np.nan)
    for i in range(steps):
        before()
        start = time.perf_counter_ns()
        taken = call(i)
        if not isinstance(taken, int) or taken > 0:
            took[i] = time.perf_counter_ns() - start
    return took[steps // 10 :] / 1e3


def burst(call: Callable[[int], object], calls: int, after: Callable[[], object]) -> Any:
    """Microseconds a call, back to back in bursts of 100 with the processor's caches warm."""
    took = []
    for start in range(0, calls, 100):
        begin = time.perf_counter_ns()
        for i in range(start, start + 100):
            call(i)
        took.append((time.perf_counter_ns() - begin) / 100)
        after()
    return np.array(took[2:]) / 1e3


class Took(NamedTuple):
    """Microseconds of the calls whose step was not dropped; ``ratio``: of the medians, to the bare copy's."""

    p50: float
    p99: float
    ratio: float
    dropped: int


#: By what was called, in the order of calls.
Rows = dict[str, Took]


def line(rows: Rows, name: str, took: Any, base: Any | None = None) -> None:
    """Add a row and print it."""
    kept = took[~np.isnan(took)]
    p50, p99, worst = (float(value) for value in np.percentile(kept, [50, 99, 100]))
    ratio_to_bare = 1.0 if base is None else p50 / float(np.percentile(base, 50))
    rows[name] = Took(p50, p99, ratio_to_bare, len(took) - len(kept))
    ratio = "" if base is None else f"   {ratio_to_bare:5.2f}x bare"
    print(
        f"{name:46s} {len(kept):5d} p50 {p50:8.1f} µs   p99 {p99:8.1f} µs   max {worst:8.0f} µs{ratio}",
        flush=True,
    )


def cpu(folder: str, steps: int, pace_ms: float) -> Rows:
    rows: Rows = {}
    batch = [torch.from_numpy(load) for load in workload.loads(64)]
    placement = torch.from_numpy(workload.placement())
    targets = [torch.empty_like(batch[0]) for _ in range(64)]
    shape = f"{workload.LAYERS} × {workload.SLOTS} int32"
    print(f"CPU tensors, {shape}, a step every {pace_ms:g} ms of busy Python")

    def pace() -> None:
        spin(pace_ms / 1e3)

    bare = burst(lambda i: targets[i % 64].copy_(batch[i % 64]), steps, lambda: None)
    line(rows, "back to back: bare copy_", bare)
    with open_writer(folder) as writer:
        took = burst(lambda i: writer.record(None, batch[i % 64], placement), steps, writer.flush)
        line(rows, "back to back: record, torch tensors", took, bare)
    bare = measure(lambda i: targets[i % 64].copy_(batch[i % 64]), steps, pace)
    line(rows, "bare copy_ into a host buffer", bare)
    for name, tensors, maps in (
        ("record, torch tensors", batch, placement),
        ("record, numpy arrays", [t.numpy() for t in batch], placement.numpy()),
    ):
        with open_writer(folder) as writer:
            took = measure(lambda i, w=writer, t=tensors, m=maps: w.record(None, t[i % 64], m), steps, pace)
            line(rows, name, took, bare)
            writer.flush()
            print(f"{'':46s} {writer.stats().recorded} recorded, {writer.stats().dropped} dropped")
    return rows


def cuda(folder: str, device: str, steps: int, pace_ms: float) -> Rows:
    rows: Rows = {}
    shape = f"{workload.LAYERS} × {workload.SLOTS} int32"
    print(f"{torch.cuda.get_device_name(device)}, {shape}, a step every {pace_ms:g} ms")
    batch = [torch.from_numpy(load).to(device) for load in workload.loads(64)]
    placement = torch.from_numpy(workload.placement()).to(device)
    pinned = [torch.empty_like(batch[0], device="cpu").pin_memory() for _ in range(64)]
    events = [torch.cuda.Event(blocking=True) for _ in range(64)]
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(3):
        torch.matmul(a, a, out=out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        torch.matmul(a, a, out=out)
    torch.cuda.synchronize()
    per_2_ms = max(1, round(2e-3 / ((time.perf_counter() - start) / 50)))

    def idle() -> None:
        spin(pace_ms / 1e3)

    def busy() -> None:
        torch.cuda.synchronize()
        for _ in range(per_2_ms):
            torch.matmul(a, a, out=out)

    def bare_call(i: int) -> None:
        pinned[i % 64].copy_(batch[i % 64], non_blocking=True)
        events[i % 64].record()

    with open_writer(folder) as writer:

        def settle() -> None:
            torch.cuda.synchronize()
            writer.flush()

        bare = burst(bare_call, 3000, torch.cuda.synchronize)
        line(rows, "back to back: bare copy_ + event.record()", bare)
        back_to_back = burst(lambda i: writer.record(None, batch[i % 64], placement), 3000, settle)
        line(rows, "back to back: record", back_to_back, bare)
    for state, before in (("idle", idle), ("busy", busy)):
        bare = measure(bare_call, steps, before)
        line(rows, f"{state}: bare copy_(non_blocking) + event.record()", bare)
        with open_writer(folder) as writer:
            writer.record(None, batch[0], placement)
            torch.cuda.synchronize()

            def record(i: int, w: ExpertLoadWriter = writer) -> int:
                return w.record(None, batch[i % 64], placement)

            def strict(i: int, w: ExpertLoadWriter = writer) -> None:
                with no_synchronization():
                    w.record(None, batch[i % 64], placement)

            line(rows, f"{state}: record", measure(record, steps, before), bare)
            measure(strict, 200, before)

            def begin(i: int, w: ExpertLoadWriter = writer) -> None:
                torch.cuda.set_sync_debug_mode("error")
                w.begin_step()
                torch.cuda.set_sync_debug_mode("default")

            line(rows, f"{state}: begin_step, with two mode switches", measure(begin, 200, before), bare)

            def timed(i: int, w: ExpertLoadWriter = writer) -> int:
                w.begin_step()
                return w.record(None, batch[i % 64], placement)

            line(rows, f"{state}: begin_step and record", measure(timed, steps, before), bare)
            with torch.inference_mode():
                uncounted = placement.clone()

                def record_both(i: int, w: ExpertLoadWriter = writer, m: Any = uncounted) -> int:
                    return w.record(None, batch[i % 64], m)

                took = measure(record_both, steps, before)
            line(rows, f"{state}: record, map an inference tensor", took, bare)
            writer.flush()
            stats = writer.stats()
            counts = f"{stats.recorded} recorded, {stats.dropped} dropped, {stats.rejected} rejected"
            print(f"{'':46s} {counts} (200 of them with sync_debug_mode error)")
        synchronous = measure(lambda i: batch[i % 64].cpu(), min(steps, 500), before)
        line(rows, f"{state}: .cpu(), as SGLang's per-pass recorder", synchronous, bare)
    return rows


if __name__ == "__main__":
    main()
