"""`device_ms` next to times by synchronization, and that it takes none. Needs a CUDA device.

    python -m benchmarks.device_times [--device cuda] [--steps 300]

Each step is some matmuls of 1 to 20 ms. The truth is the host's clock with the device synchronized before
and after a step. It has the launches and the wake-up of the host as well, some 10 us. Without any
synchronization, the truth is events of our own, and the host's clock for all steps together.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import workload
from benchmarks.cuda import no_synchronization
from eplb_dump import ExpertLoadWriter

#: The goal: as close to the truth as this.
WITHIN = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.cuda.set_device(args.device)
    print(f"{torch.cuda.get_device_name(args.device)}, torch {torch.__version__}, {args.steps} steps each")
    bench = Bench(args.device, args.steps)
    good = [check() for check in (bench.passes, bench.periods, bench.unsynchronized, bench.unknown)]
    raise SystemExit(0 if all(good) else 1)


class Bench:
    """The work of each step, and the loads that are recorded."""

    def __init__(self, device: str, steps: int) -> None:
        rng = np.random.default_rng(0)
        self.device = device
        self.loads = [torch.from_numpy(load).to(device) for load in workload.loads(8)]
        self.sides = {
            side: torch.randn(side, side, device=device, dtype=torch.bfloat16) for side in (1024, 2048, 4096)
        }
        self.out = {side: torch.empty_like(a) for side, a in self.sides.items()}
        each = {side: self._seconds(side) for side in self.sides}
        wanted = np.exp(rng.uniform(np.log(1e-3), np.log(20e-3), steps))
        self.work = [
            (side, max(1, round(seconds / each[side])))
            for side, seconds in zip(rng.choice(list(each), steps).tolist(), wanted, strict=True)
        ]

    def _seconds(self, side: int) -> float:
        """Of a matmul, without synchronization in between."""
        for repeat in (10, 100):  # the first is the warm-up
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                torch.matmul(self.sides[side], self.sides[side], out=self.out[side])
            torch.cuda.synchronize()
            took = (time.perf_counter() - start) / repeat
        return took

    def run(self, step: int) -> None:
        """The forward pass of a step."""
        side, count = self.work[step]
        for _ in range(count):
            torch.matmul(self.sides[side], self.sides[side], out=self.out[side])

    def record(self, writer: ExpertLoadWriter, step: int) -> None:
        writer.record(step, self.loads[step % 8], None)

    def recorded(self, steps: Callable[[ExpertLoadWriter], None]) -> Any:
        """``device_ms`` of each step: float64 ``[steps]``, NaN if unknown."""
        with tempfile.TemporaryDirectory() as folder:
            writer = ExpertLoadWriter(
                folder, model="m", num_logical_experts=workload.LOGICAL, ep_size=workload.EP_SIZE,
                scope="global", queue_steps=len(self.work) + 8, queue_bytes=1 << 30,
            )  # fmt: skip
            steps(writer)
            torch.cuda.synchronize()
            assert writer.close(60), writer.stats()
            assert writer.stats().dropped == writer.stats().rejected == 0, writer.stats()
            (file,) = Path(folder).rglob("steps-*.parquet")
            return pq.read_table(file, columns=["device_ms"])["device_ms"].to_numpy().astype(np.float64)

    def passes(self) -> bool:
        """With begin_step: the pass alone, although the device waits in front of it."""
        truth = np.empty(len(self.work))

        def steps(writer: ExpertLoadWriter) -> None:
            for step in range(len(self.work)):
                time.sleep(0.002)
                torch.cuda.synchronize()
                start = time.perf_counter()
                writer.begin_step()
                self.run(step)
                self.record(writer, step)
                torch.cuda.synchronize()
                truth[step] = time.perf_counter() - start

        # The first step has no time: its load made the ring.
        return compared("begin_step, against synchronized passes", self.recorded(steps)[1:], 1e3 * truth[1:])

    def periods(self) -> bool:
        """Without begin_step: from the end of the step before, so with the wait in front."""
        ends = np.empty(len(self.work))

        def steps(writer: ExpertLoadWriter) -> None:
            for step in range(len(self.work)):
                time.sleep(0.002)
                self.run(step)
                self.record(writer, step)
                torch.cuda.synchronize()
                ends[step] = time.perf_counter()

        found = self.recorded(steps)
        return compared("no begin_step, against synchronized periods", found[1:], 1e3 * np.diff(ends))

    def unsynchronized(self) -> bool:
        """Nothing waits for the device; the sum of all steps is the time of the whole."""
        whole = 0.0
        own = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.work) + 1)]

        def steps(writer: ExpertLoadWriter) -> None:
            nonlocal whole
            self.record(writer, 0)
            torch.cuda.synchronize()
            start = time.perf_counter()
            own[0].record()
            with no_synchronization():
                for step in range(1, len(self.work)):
                    writer.begin_step()
                    self.run(step)
                    self.record(writer, step)
                    own[step].record()
            torch.cuda.synchronize()
            whole = 1e3 * (time.perf_counter() - start)

        found = self.recorded(steps)[1:]
        each = np.array([own[i].elapsed_time(own[i + 1]) for i in range(len(found))])
        good = compared("begin_step, nothing synchronized, against own events", found, each)
        ratio = found.sum() / whole
        print(f"{'':54s} their sum is {ratio:.4f} x the whole by the host's clock")
        return good and abs(ratio - 1) <= WITHIN

    def unknown(self) -> bool:
        """Another stream, a step without a load in between, other buffers: no time, not a wrong one."""
        other = torch.cuda.Stream()

        def steps(writer: ExpertLoadWriter) -> None:
            for step in range(12):
                stream = other if step in (3, 4) else torch.cuda.current_stream()
                with torch.cuda.stream(stream):
                    self.run(step)
                    if step == 7:
                        writer.skip("dummy", step)
                    else:
                        load = self.loads[0].long() if step == 10 else self.loads[0]
                        writer.record(step, load, None)
                torch.cuda.synchronize()

        known = np.flatnonzero(~np.isnan(self.recorded(steps))).tolist()
        # 3 and 5: the stream changed; 7 and 8: no load; 10 and 11: other buffers.
        good = known == [1, 2, 4, 6, 9]
        print(
            f"{'no begin_step, streams and buffers change':54s} steps with a time: {known}  {verdict(good)}"
        )
        return good


def compared(name: str, found: Any, truth: Any) -> bool:
    ratio = found / truth
    low, middle, high = np.percentile(ratio, [5, 50, 95])  # NaN if one is
    near = float((np.abs(ratio - 1) <= WITHIN).mean())
    good = bool(max(abs(low - 1), abs(high - 1)) <= WITHIN)
    worst = np.abs(ratio - 1).max()
    print(
        f"{name:54s} ratio p5 {low:.4f}  p50 {middle:.4f}  p95 {high:.4f}  worst {worst:.4f} off  "
        f"{100 * near:.1f}% within {100 * WITHIN:g}%  {verdict(good)}"
    )
    return good


def verdict(good: bool) -> str:
    return "ok" if good else "NOT AS IT SHOULD BE"


if __name__ == "__main__":
    main()
