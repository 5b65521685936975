"""What `record` costs the engine's thread, next to a bare copy and to a synchronous one.

    python -m benchmarks.hot_path [--device cuda] [--steps 3000]

The engine is paced at one step every few milliseconds, as the background thread is part of the
cost. With CUDA, "busy" has a kernel of about 2 ms on the stream in front of every call, and all
calls of `record` run with torch.cuda.set_sync_debug_mode("error"). All is measured in rounds;
no writer is open while the bare copy is measured.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def open_writer(folder: str) -> ExpertLoadWriter:
    return ExpertLoadWriter(
        folder, model="m", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE, scope="global",
        segment_steps=SEGMENT_STEPS,
    )  # fmt: skip


def spin(seconds: float) -> None:
    """Busy Python, as an engine's own: it holds the interpreter lock most of the time."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


#: What is compared is measured in so many rounds: for some seconds, a machine can be several times slower.
ROUNDS = 3
#: A segment is sealed in each round, too.
SEGMENT_STEPS = 512


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


def rounds(measures: Callable[[], Iterator[tuple[str, Any]]]) -> dict[str, Any]:
    """What each round measures, by its names."""
    took: dict[str, list[Any]] = {}
    for _ in range(ROUNDS):
        for name, values in measures():
            took.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in took.items()}


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
    ratio += f"   {len(took) - len(kept)} dropped" if len(took) > len(kept) else ""
    print(
        f"{name:46s} {len(kept):5d} p50 {p50:8.1f} µs   p99 {p99:8.1f} µs   max {worst:8.0f} µs{ratio}",
        flush=True,
    )


def lines(rows: Rows, prefix: str, took: Mapping[str, Any]) -> None:
    """A row for each; the first is the bare copy."""
    first, *others = took
    line(rows, prefix + first, took[first])
    for name in others:
        line(rows, prefix + name, took[name], took[first])


def cpu(folder: str, steps: int, pace_ms: float) -> Rows:
    rows: Rows = {}
    batch = [torch.from_numpy(load) for load in workload.loads(64)]
    arrays = [tensor.numpy() for tensor in batch]
    placement = torch.from_numpy(workload.placement())
    targets = [torch.empty_like(batch[0]) for _ in range(64)]
    shape = f"{workload.LAYERS} × {workload.SLOTS} int32"
    print(f"CPU tensors, {shape}, a step every {pace_ms:g} ms of busy Python")

    def pace() -> None:
        spin(pace_ms / 1e3)

    def bare(i: int) -> None:
        targets[i % 64].copy_(batch[i % 64])

    def back_to_back() -> Iterator[tuple[str, Any]]:
        yield "bare copy_", burst(bare, steps // ROUNDS, lambda: None)
        with open_writer(folder) as writer:
            record = functools.partial(_record, writer, batch, placement)
            yield "record, torch tensors", burst(record, steps // ROUNDS, writer.flush)

    def paced() -> Iterator[tuple[str, Any]]:
        yield "bare copy_ into a host buffer", measure(bare, steps // ROUNDS, pace)
        for name, tensors, maps in (
            ("record, torch tensors", batch, placement),
            ("record, numpy arrays", arrays, placement.numpy()),
            ("record, numpy arrays, no map", arrays, None),
        ):
            with open_writer(folder) as writer:
                record = functools.partial(_record, writer, tensors, maps)
                yield name, measure(record, steps // ROUNDS, pace)

    lines(rows, "back to back: ", rounds(back_to_back))
    lines(rows, "", rounds(paced))
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

    def back_to_back() -> Iterator[tuple[str, Any]]:
        yield "bare copy_ + event.record()", burst(bare, 3000 // ROUNDS, torch.cuda.synchronize)
        with open_writer(folder) as writer:

            def settle() -> None:
                torch.cuda.synchronize()
                writer.flush()

            record = functools.partial(_record, writer, batch, placement)
            yield "record", burst(record, 3000 // ROUNDS, settle)

    def paced(before: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        part = steps // ROUNDS
        yield "bare copy_(non_blocking) + event.record()", measure(bare, part, before)
        with open_writer(folder) as writer:
            writer.record(None, batch[0], placement)
            torch.cuda.synchronize()
            record = functools.partial(_record, writer, batch, placement)

            def strict(i: int) -> None:
                with no_synchronization():
                    record(i)

            def begin(_: int) -> None:
                torch.cuda.set_sync_debug_mode("error")
                writer.begin_step()
                torch.cuda.set_sync_debug_mode("default")

            def timed(i: int) -> int:
                writer.begin_step()
                return record(i)

            yield "record", measure(record, part, before)
            measure(strict, 200 // ROUNDS, before)
            yield "begin_step, with two mode switches", measure(begin, 200 // ROUNDS, before)
            yield "begin_step and record", measure(timed, part, before)
            with torch.inference_mode():
                uncounted = placement.clone()
            of_inference = functools.partial(_record, writer, batch, uncounted)
            yield "record, map an inference tensor", measure(of_inference, part, before)
        synchronous = measure(lambda i: batch[i % 64].cpu(), min(steps, 500) // ROUNDS, before)
        yield ".cpu(), as SGLang's per-pass recorder", synchronous

    lines(rows, "back to back: ", rounds(back_to_back))
    for state, before in (("idle", idle), ("busy", busy)):
        lines(rows, f"{state}: ", rounds(functools.partial(paced, before)))
    return rows


if __name__ == "__main__":
    main()
