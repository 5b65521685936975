"""What `summary` and `timeline` of a month cost if only sums per minute are kept: time, memory, bytes read.

    python -m benchmarks.scale [--days 30] [--local-days 1] [--repeat 3] [--keep FOLDER] [--s3]

Makes two recordings of DeepSeek-V3's shape, 20 steps per second, of which only roll-ups are left, as
retention leaves them: scope global for ``--days``, and 32 ranks of scope local for ``--local-days``. A file
has the rows of 256 segments of 2,048 steps, which were merged twice, 16 at a time. No step is recorded: the
balancedness, imbalance and time of each of the 51.8 million steps are drawn and added up to what
``MinutesBuilder`` would have made of them; tokens per rank and layer are drawn per minute, with the noise of
Poisson loads. ``truth`` adds up the same arrays with numpy, without any code of the reader. ``--s3`` also
reads the run from moto's S3 server on this machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from benchmarks.workload import EP_SIZE, LAYERS, LOGICAL, SLOTS, placement, rates
from eplb_dump.format.files import publish
from eplb_dump.format.journal import PlacementRows, Shape
from eplb_dump.format.manifest import ManifestFile, SealedSegment, Thinned, close_manifest
from eplb_dump.format.minutes import MINUTE_NS, SCALES, TOP_SLOTS, Minutes
from eplb_dump.format.schema import MINUTES_SCHEMA, Scope, Tier
from eplb_dump.format.segment import SegmentFiles, placements_table
from eplb_dump.format.session import SessionInfo, session_path, write_session_file

PER_SECOND, DAY = 20, 86_400
STEP_NS = 10**9 // PER_SECOND
SEGMENT_STEPS, SEGMENTS_PER_FILE = 2048, 256
#: 2026-11-01 00:00 UTC.
EPOCH = 1_793_491_200 * 10**9
REARRANGED_EVERY = 6 * 3600 * PER_SECOND
SHAPE = Shape(EP_SIZE, LAYERS, SLOTS)


@dataclass
class Truth:
    """What the drawn steps add up to, kept while they are drawn."""

    balancedness: list[Any] = field(default_factory=list)
    imbalance: list[Any] = field(default_factory=list)
    host_ms: list[Any] = field(default_factory=list)
    rank_load: Any = 0
    max_load: Any = 0
    layer_balancedness: Any = 0
    minute_balancedness: float = 0.0

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("balancedness", "imbalance", "host_ms"):
            values = np.concatenate(getattr(self, name) or [np.empty(0, np.float32)])
            if len(values):
                p5, p50, p95 = np.percentile(values, [5, 50, 95])
                found[name] = {
                    "mean": float(values.mean(dtype=np.float64)), "p5": float(p5), "p50": float(p50),
                    "p95": float(p95), "min": float(values.min()), "max": float(values.max()),
                    "min_step": int(values.argmin()), "steps": len(values),
                }  # fmt: skip
        if found:
            found["idle_fraction"] = float(1 - self.rank_load.sum() / EP_SIZE / self.max_load.sum())
            steps = found["balancedness"]["steps"]
            found["layers"] = (self.layer_balancedness / steps).tolist()
        return found


def ranges(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of steps of one minute and placement."""
    steps_per_minute = 60 * PER_SECOND
    while first < end:
        stop = min(end, *(first - first % n + n for n in (steps_per_minute, REARRANGED_EVERY)))
        yield first, stop
        first = stop


def rows(first: int, end: int, rank: int | None, truth: Truth) -> Minutes:
    """The rows of some steps; ``rank``: whose contribution they are, None for the sum of all."""
    rng = np.random.default_rng([first, -1 if rank is None else rank] if rank is not None else [first])
    per_rank = rates().reshape(LAYERS, EP_SIZE, -1).sum(axis=2)
    share = 1.0 if rank is None else 1 / EP_SIZE
    parts: list[dict[str, Any]] = []
    for low, high in ranges(first, end):
        n, generation = high - low, low // REARRANGED_EVERY
        drift = 1 + 0.15 * np.sin(2 * np.pi * (low / PER_SECOND / DAY + np.arange(EP_SIZE) / EP_SIZE))
        expected = np.roll(per_rank, generation, axis=1) * drift * n * share
        load = np.maximum(0, expected + rng.standard_normal(expected.shape) * np.sqrt(expected)).astype(
            np.int64
        )
        slots = np.roll(rates(), generation * (SLOTS // EP_SIZE), axis=1) * n * share
        slots = rng.normal(slots, np.sqrt(slots)).astype(np.int64)
        top = np.argsort(-slots, axis=1)[:, :TOP_SLOTS]
        row: dict[str, Any] = {
            "minute": (EPOCH + low * STEP_NS) // MINUTE_NS * MINUTE_NS,
            "phase": 0, "ep_size": EP_SIZE, "first_step": low, "last_step": high - 1,
            "first_time_ns": EPOCH + low * STEP_NS, "last_time_ns": EPOCH + (high - 1) * STEP_NS,
            "recorded": n, "dummy": 0, "not_sampled": 0, "dropped": 0, "rejected": 0,
            "num_tokens": n * 4000, "num_tokens_steps": n,
            "step_ms_sum": 0.0, "step_ms_steps": 0, "device_ms_sum": 0.0, "device_ms_steps": 0,
            "active_steps": np.full(LAYERS, n, np.int32),
            "rank_load": load.reshape(-1),
            "slot": top.astype(np.int32).reshape(-1),
            "slot_load": np.take_along_axis(slots, top, axis=1).reshape(-1),
        }  # fmt: skip
        host = (45 + 5 * rng.random(n, np.float32)) * (1 + 5 * (rng.random(n, np.float32) < 0.01))
        row |= {"host_ms_sum": float(host.sum(dtype=np.float64)), "host_ms_steps": n}
        row["host_ms_histogram"] = SCALES["host_ms"].histogram(host.astype(np.float64))
        if rank is None:
            truth.host_ms.append(host)
            row |= _formulas(rng, low, n, load, truth)
        parts.append(row)
    columns = {
        name: np.array([row[name] for row in parts], _dtype(name))
        for name in MINUTES_SCHEMA.names
        if name in parts[0]
    }
    return Minutes(columns, ("decode",), rank is None)


def _formulas(rng: np.random.Generator, low: int, n: int, load: Any, truth: Truth) -> dict[str, Any]:
    center = 0.86 + 0.06 * np.sin(2 * np.pi * low / PER_SECOND / DAY)
    balance = np.clip(rng.normal(center, 0.02, n), 0.05, 1).astype(np.float32)
    imbalance = (1 / balance + 0.02 * rng.random(n, np.float32)).astype(np.float32)
    per_layer = rng.normal(center, 0.03, LAYERS).clip(0.1, 1) * n
    highest = (load.max(axis=1) * (1.03 + 0.02 * rng.random(LAYERS))).astype(np.int64)
    odds = (load - load.min(axis=1, keepdims=True) + 1.0) ** 2
    slowest = rng.multinomial(n, odds / odds.sum(axis=1, keepdims=True)).astype(np.float64)
    truth.balancedness.append(balance)
    truth.imbalance.append(imbalance)
    truth.rank_load = truth.rank_load + load
    truth.max_load = truth.max_load + highest
    truth.layer_balancedness = truth.layer_balancedness + per_layer
    found: dict[str, Any] = {
        "max_load": highest, "layer_balancedness": per_layer, "layer_imbalance": n * n / per_layer,
        "slowest": slowest.reshape(-1), "active": n,
        "vllm": float(balance.sum(dtype=np.float64)), "vllm_legacy": 0.97 * n,
        "sglang": float(balance.sum(dtype=np.float64)),
    }  # fmt: skip
    for name, values in (("balancedness", balance), ("imbalance", imbalance)):
        wide = values.astype(np.float64)
        found |= {
            name: float(wide.sum()), f"{name}_min": float(wide.min()), f"{name}_max": float(wide.max()),
            f"{name}_min_step": low + int(wide.argmin()), f"{name}_max_step": low + int(wide.argmax()),
            f"{name}_histogram": SCALES[name].histogram(wide),
        }  # fmt: skip
    return found


def _dtype(name: str) -> Any:
    kind = MINUTES_SCHEMA.field(name).type
    if name.endswith("histogram") or name in ("slot", "active_steps"):
        return np.int32
    if str(kind).startswith("list"):
        return np.int64 if name in ("rank_load", "slot_load", "max_load") else np.float64
    return np.float64 if str(kind) == "double" else np.int64


def make(root: Path, days: float, ranks: int | None) -> Truth:
    """Write a recording of roll-ups; ``ranks``: None for one writer of sums."""
    truth, steps = Truth(), int(days * DAY * PER_SECOND)
    for rank in [None] if ranks is None else range(ranks):
        info = SessionInfo(
            run_id="month" if ranks is None else "day", model="deepseek-v3", session_id=f"s{rank or 0}",
            ep_rank=rank or 0, scope=Scope.GLOBAL if rank is None else Scope.LOCAL,
            num_logical_experts=LOGICAL, ep_size=EP_SIZE, created_unix_ns=EPOCH, created_monotonic_ns=0,
            host="host", pid=1, num_moe_layers=LAYERS, num_physical_experts=SLOTS,
            segment_steps=SEGMENT_STEPS, engine="vllm", engine_version="0.33.0",
        )  # fmt: skip
        folder = session_path(root, info)
        folder.mkdir(parents=True)
        write_session_file(folder, info)
        size = SEGMENT_STEPS * SEGMENTS_PER_FILE
        for first in range(0, steps, size):
            _write(folder, info, first, min(first + size, steps), rank, truth)
        close_manifest(folder, info, {"seen": steps, "recorded": steps})
    return truth


def _write(folder: Path, info: SessionInfo, first: int, end: int, rank: int | None, truth: Truth) -> None:
    seq, last_seq = first // SEGMENT_STEPS, (end - 1) // SEGMENT_STEPS
    minutes = rows(first, end, rank, truth)
    tables = SegmentFiles(folder, info, SHAPE, seq, last_seq)
    tables.write("minutes", lambda metadata: [minutes.to_table(metadata)], len(minutes))
    changes = [s for s in range(0, end, REARRANGED_EVERY) if first <= s < end]
    if changes:
        shift = SLOTS // EP_SIZE
        slots = [row for s in changes for row in np.roll(placement(), s // REARRANGED_EVERY * shift, axis=1)]
        stated = PlacementRows(
            np.repeat(np.array(changes, np.int64), LAYERS),
            np.tile(np.arange(LAYERS, dtype=np.int32), len(changes)),
            np.full(len(slots), EP_SIZE, np.int32),
            [row.astype(np.int32) for row in slots],
        )
        layers = list(range(LAYERS))
        tables.write("placements", lambda metadata: [placements_table(stated, layers, metadata)], len(slots))
    n = end - first
    entry = SealedSegment(
        seq, first, end - 1, SHAPE, tables.files,
        times=(EPOCH + first * STEP_NS, EPOCH + (end - 1) * STEP_NS),
        thinned=Thinned(Tier.MINUTES, last_seq, n, n, "budget"),
    )  # fmt: skip
    publish(*(folder / file.name for file in tables.files.values()))
    ManifestFile(folder).append(info, entry)


# ---- measuring


def run(command: list[str], dump: str) -> tuple[float, float, int, dict[str, Any]]:
    """Seconds, CPU seconds, peak memory in bytes, and the document of a command."""
    program = str(Path(sys.executable).with_name("eplb-analyze"))
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([program, *command, "--json", dump], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        if status:
            raise SystemExit(f"{command} failed")
        out.seek(0)
        document = json.load(out)
    cpu = usage.ru_utime + usage.ru_stime
    return seconds, cpu, usage.ru_maxrss * 1024, document


def read_bytes(command: list[str], dump: str) -> int:
    """The bytes that a command reads from files besides its own program, by Linux's count of a process."""
    code = (
        "import atexit, re, sys\n"
        "from eplb_analyze.cli.app import main\n"
        "def told():\n"
        "    found = re.search(r'rchar: (\\d+)', open('/proc/self/io').read())\n"
        "    print(found[1], file=sys.stderr)\n"
        "atexit.register(told)\n"
        "main()\n"
    )

    def rchar(arguments: list[str]) -> int:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        return int(done.stderr.split()[-1])

    return rchar([*command, dump]) - rchar(["--help"])


def forget(dump: Path) -> None:
    """Drop the cached pages of a recording's files, all of which are on the disk."""
    for path in dump.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, dump: Path, ranks: int | None, repeat: int) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in dump.rglob("*") if file.is_file())
    print(f"{name}: {size / 1e6:,.0f} MB")
    document: dict[str, Any] = {}
    commands = [["summary"], ["timeline"]]
    if ranks is None:
        commands.append(["timeline", "--formula", "idle_fraction"])
    for command in commands:
        forget(dump)
        cold = run(command, str(dump))[0]
        found = [run(command, str(dump)) for _ in range(repeat)]
        document = document or found[0][3]
        peak = max(memory for _, _, memory, _ in found) / 1e6
        print(
            f"  {' '.join(command):36} cold {cold:5.2f} s, warm {min(s for s, *_ in found):5.2f} s, "
            f"CPU {min(c for _, c, *_ in found):5.2f} s, {peak:4.0f} MB, "
            f"reads {read_bytes(command, str(dump)) / 1e6:,.0f} MB",
            flush=True,
        )
    return document


def compare(document: dict[str, Any], truth: dict[str, Any]) -> None:
    """Print how the figures differ from those of the drawn steps."""
    for name in ("balancedness", "imbalance"):
        found, drawn = document[name], truth[name]
        for key in ("mean", "min", "max", "p5", "p50", "p95"):
            print(f"  {name} {key}: {found[key]:.6f}, drawn {drawn[key]:.6f}")
        print(f"  {name}: percentiles are stated to be within {found['percentile_error']:.4f}")
    print(f"  idle fraction: {document['idle_fraction']:.8f}, drawn {truth['idle_fraction']:.8f}")
    off = max(abs(a["balancedness"] - b) for a, b in zip(document["layers"], truth["layers"], strict=True))
    print(f"  balancedness of layers: at most {off:.2e} apart")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--days", type=float, default=30)
    parser.add_argument("--local-days", type=float, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="Make the recordings in this folder, unless it has them.")
    parser.add_argument("--s3", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    try:
        for name, days, ranks in (("month", arguments.days, None), ("day", arguments.local_days, EP_SIZE)):
            dump, known = folder / name, folder / f"{name}.json"
            if days and not known.exists():
                known.parent.mkdir(parents=True, exist_ok=True)
                # In another process: what this one once held would count as its children's memory.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as maker:
                    known.write_text(json.dumps(maker.submit(figures_of, dump, days, ranks).result()))
            if not days:
                continue
            document = measure(f"{name}, {days:g} days", dump, ranks, arguments.repeat)
            if ranks is None:
                compare(document, json.loads(known.read_text()))
            if arguments.s3:
                from_bucket(dump, arguments.repeat)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)


def figures_of(dump: Path, days: float, ranks: int | None) -> dict[str, Any]:
    """Make a recording, and return what was drawn for it."""
    return make(dump, days, ranks).figures()


def from_bucket(dump: Path, repeat: int) -> None:
    from s3 import S3

    os.environ.update(S3.ENVIRONMENT)
    with S3.started() as s3:
        address = s3.address(s3.put(dump))
        for command in (["summary"], ["timeline"]):
            counts, found = {}, []
            for _ in range(repeat):
                s3.count()
                found.append(run(command, address))
                counts = s3.count()
            requests = sum(counts["requests"].values())
            print(
                f"  S3: {' '.join(command):32} {min(s for s, *_ in found):5.2f} s, "
                f"CPU {min(c for _, c, *_ in found):5.2f} s, {max(m for *_, m, _ in found) / 1e6:4.0f} MB, "
                f"{requests:,} requests, {counts['bytes'] / 1e6:,.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
