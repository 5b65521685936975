"""A writer with a budget over a week: 604,800 steps of 58 layers × 288 slots, one a second.

Only the clock is simulated; the writer runs as fast as it can. From another thread, the script looks at the
bytes of the session's folder all the time. It fails if they exceed the budget, or if a step is lost.

    python -m benchmarks.week --scope global --max-bytes 2G
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from eplb_dump import ExpertLoadWriter
from eplb_dump.arguments import require_bytes
from eplb_dump.format.retention import TIERS, read_manifest

LAYERS, SLOTS, EXPERTS, EP_SIZE = 58, 288, 256, 32
SECOND = 10**9
#: Loads are drawn once, as drawing takes longer than writing; and moved, so that no two steps are alike.
DRAWN = 256


class Clock:
    """``time.time_ns`` of the simulated week."""

    def __init__(self) -> None:
        self.now = 1_700_000_000 * SECOND

    def __call__(self) -> int:
        return self.now


class Watch:
    """The most bytes that a folder ever had, as another thread saw it."""

    def __init__(self, folder: Path) -> None:
        self.peak = self.looks = 0
        self._folder, self._done = folder, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            try:
                found = self._files()
                if found == self._files():  # what changes during a look could be counted twice
                    self.peak, self.looks = max(self.peak, sum(found.values())), self.looks + 1
            except FileNotFoundError:
                pass

    def _files(self) -> dict[str, int]:
        with os.scandir(self._folder) as files:
            return {file.name: file.stat().st_size for file in files}


def draw_loads(tokens: int, seed: int = 0) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    """Skewed as a trained router's: the tokens of each layer are gamma distributed over its slots."""
    rng = np.random.default_rng(seed)
    shares = rng.gamma(0.8, 1.0, (LAYERS, SLOTS))
    shares /= shares.sum(axis=1, keepdims=True)
    return [rng.poisson(shares * tokens * 8).astype(np.int32) for _ in range(DRAWN)]


def run(folder: Path, scope: str, max_bytes: int, steps: int) -> None:
    clock = Clock()
    time.time_ns = clock
    # One rank's tokens of a decode step, or those of all ranks.
    loads = draw_loads(128 if scope == "local" else 128 * EP_SIZE)
    placements = [np.tile((np.arange(SLOTS) + n) % EXPERTS, (LAYERS, 1)) for n in range(4)]
    writer = ExpertLoadWriter(
        folder,
        model="simulated",
        num_logical_experts=EXPERTS,
        ep_size=EP_SIZE,
        scope=scope,
        run_id="week",
        max_bytes=max_bytes,
    )
    watch = Watch(writer.folder)
    began = time.perf_counter()
    for step in range(steps):
        clock.now += SECOND
        load = loads[(step * 7 + step // DRAWN) % DRAWN]
        writer.record(step, load, placements[step // 3000 % 4], num_tokens=4096, phase="decode")
        if step % 256 == 255 and not writer.flush(600):
            raise SystemExit(f"a flush failed: {writer.stats()}")
    closed = writer.close(600)
    seconds = time.perf_counter() - began
    watch.stop()
    stats = writer.stats()
    entries = sorted(read_manifest(writer.folder, writer.info).entries.values(), key=lambda entry: entry.seq)
    print(f"scope {scope}: {steps:,} steps in {seconds:.0f} s, {steps / seconds:,.0f} steps/s")
    print(f"most bytes {watch.peak:,} of {max_bytes:,} ({watch.peak / max_bytes:.1%}), {watch.looks:,} looks")
    print(f"written {stats.bytes_written:,} bytes of journals, {stats.segments_sealed:,} segments")
    bytes_of, steps_of = Counter[str](), Counter[str]()
    for entry in entries:
        bytes_of[entry.tier] += entry.size
        steps_of[entry.tier] += entry.recorded
    for tier in TIERS:
        hours = steps_of[tier] / 3600
        print(f"  {tier.value:8} {steps_of[tier]:9,} steps ({hours:5.1f} h), {bytes_of[tier]:13,} bytes")
    newest = [entry for entry in entries if entry.thinned is None and entry.seq > 1]
    assert closed, stats
    assert watch.peak <= max_bytes, "the budget was exceeded"
    assert stats.recorded == stats.seen == steps, stats
    assert sum(steps_of.values()) == steps, "a step is in no tier"
    assert newest, "nothing is kept in full"
    assert newest[-1].last_step == steps - 1, "the newest steps are not kept in full"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scope", choices=["local", "global"], default="global")
    parser.add_argument("--max-bytes", default="2G")
    parser.add_argument("--steps", type=int, default=604_800)
    parser.add_argument("--folder", type=Path, help="default: a temporary folder, which is removed")
    arguments = parser.parse_args()
    size = require_bytes("--max-bytes", arguments.max_bytes, 1)
    if arguments.folder is not None:
        run(arguments.folder, arguments.scope, size, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.scope, size, arguments.steps)


if __name__ == "__main__":
    main()
