"""What `record` costs the engine's thread, next to a bare copy and to a synchronous one.

    python -m benchmarks.hot_path [--device cuda] [--steps 3000]

The engine is paced at one step every few milliseconds, as the background thread is part of the
cost. With CUDA, "busy" has a kernel of about 2 ms on the stream in front of every call, and all
calls of `record` run with torch.cuda.set_sync_debug_mode("error"). The bare copy is measured beside a
writer, in turns with `record`.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
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


#: Calls that are compared take turns of so many steps: for seconds, a machine can be several times slower.
TURN = 25


def measure(calls: Sequence[Callable[[int], object]], steps: int, before: Callable[[], None]) -> list[Any]:
    """Microseconds of so many steps of each call, in turns, without the first tenth.

    NaN if it returned -1: its step was dropped.
    """
    took = np.full((len(calls), steps), np.nan)
    for first in range(0, steps, TURN):
        for own, call in zip(took, calls, strict=True):
            for i in range(first, min(first + TURN, steps)):
                before()
                start = time.perf_counter_ns()
                taken = call(i)
                if not isinstance(taken, int) or taken > 0:
                    own[i] = time.perf_counter_ns() - start
    return [*(took[:, steps // 10 :] / 1e3)]


def burst(calls: Sequence[Callable[[int], object]], steps: int, after: Callable[[], object]) -> list[Any]:
    """Microseconds a step of each call, back to back with warm caches: bursts of 100, in turns."""
    took: list[list[float]] = [[] for _ in calls]
    for first in range(0, steps, 100):
        for own, call in zip(took, calls, strict=True):
            begin = time.perf_counter_ns()
            for i in range(first, first + 100):
                call(i)
            own.append((time.perf_counter_ns() - begin) / 100)
            after()
    return [np.array(own[2:]) / 1e3 for own in took]


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

    def bare(i: int) -> None:
        targets[i % 64].copy_(batch[i % 64])

    with open_writer(folder) as writer:
        record = functools.partial(_record, writer, batch, placement)
        took = burst([bare, record], steps, writer.flush)
        line(rows, "back to back: bare copy_", took[0])
        line(rows, "back to back: record, torch tensors", took[1], took[0])
    with open_writer(folder) as writer, open_writer(folder) as other:
        record = functools.partial(_record, writer, batch, placement)
        of_numpy = functools.partial(_record, other, [t.numpy() for t in batch], placement.numpy())
        took = measure([bare, record, of_numpy], steps, pace)
        line(rows, "bare copy_ into a host buffer", took[0])
        for name, own, values in (("torch tensors", writer, took[1]), ("numpy arrays", other, took[2])):
            line(rows, f"record, {name}", values, took[0])
            own.flush()
            print(f"{'':46s} {own.stats().recorded} recorded, {own.stats().dropped} dropped")
    return rows


def _record(writer: ExpertLoadWriter, batch: Sequence[Any], placement: Any, i: int) -> int:
    return writer.record(None, batch[i % len(batch)], placement)


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

    def bare(i: int) -> None:
        pinned[i % 64].copy_(batch[i % 64], non_blocking=True)
        events[i % 64].record()

    with open_writer(folder) as writer:

        def settle() -> None:
            torch.cuda.synchronize()
            writer.flush()

        took = burst([bare, functools.partial(_record, writer, batch, placement)], 3000, settle)
        line(rows, "back to back: bare copy_ + event.record()", took[0])
        line(rows, "back to back: record", took[1], took[0])
    with torch.inference_mode():
        uncounted = placement.clone()
    for state, before in (("idle", idle), ("busy", busy)):
        with open_writer(folder) as writer:
            writer.record(None, batch[0], placement)
            torch.cuda.synchronize()
            record = functools.partial(_record, writer, batch, placement)

            def strict(i: int, record: Callable[[int], int] = record) -> None:
                with no_synchronization():
                    record(i)

            def begin(_: int, w: ExpertLoadWriter = writer) -> None:
                torch.cuda.set_sync_debug_mode("error")
                w.begin_step()
                torch.cuda.set_sync_debug_mode("default")

            def timed(i: int, w: ExpertLoadWriter = writer, record: Callable[[int], int] = record) -> int:
                w.begin_step()
                return record(i)

            of_inference = functools.partial(_record, writer, batch, uncounted)
            took = measure([bare, record, timed], steps, before)
            line(rows, f"{state}: bare copy_(non_blocking) + event.record()", took[0])
            line(rows, f"{state}: record", took[1], took[0])
            line(rows, f"{state}: begin_step and record", took[2], took[0])
            (alone,) = measure([of_inference], steps, before)
            line(rows, f"{state}: record, map an inference tensor", alone, took[0])
            measure([strict], 200, before)
            (alone,) = measure([begin], 200, before)
            line(rows, f"{state}: begin_step, with two mode switches", alone, took[0])
            writer.flush()
            stats = writer.stats()
            counts = f"{stats.recorded} recorded, {stats.dropped} dropped, {stats.rejected} rejected"
            print(f"{'':46s} {counts} (200 of them with sync_debug_mode error)")
        (synchronous,) = measure([lambda i: batch[i % 64].cpu()], min(steps, 500), before)
        line(rows, f"{state}: .cpu(), as SGLang's per-pass recorder", synchronous, took[0])
    return rows


if __name__ == "__main__":
    main()
