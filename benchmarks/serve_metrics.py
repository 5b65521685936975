"""What the sidecar of `serve-metrics` costs while writers append to the run: processor time and memory.

    python -m benchmarks.serve_metrics [--ranks 64] [--rate 20] [--seconds 120]

Another process writes all ranks of one engine at that rate, with scope local. The sidecar runs as users run
it, and its own metrics (`process_…`) say what it cost. A scrape every 15 s is timed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.watch import running_engine

PORT = 19464


def scrape() -> tuple[dict[str, float], int, float]:
    """The values of series without labels, how many `eplb_` series there are, and how long it took."""
    begun = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    taken = time.perf_counter() - begun
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    values = {name: float(value) for name, value in pairs}
    return values, sum(name.startswith("eplb_") for name in values), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rate", type=float, default=20.0, help="steps a second")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--interval", type=float, default=5.0)
    parser.add_argument(
        "--before", type=float, default=60.0, help="seconds written before the sidecar starts"
    )
    options = parser.parse_args()
    with running_engine(options.ranks, options.rate, options.before) as folder:
        program = Path(sys.executable).with_name("eplb-analyze")
        command = [program, "serve-metrics", folder, "--port", str(PORT), "--interval", str(options.interval)]
        with subprocess.Popen([*map(str, command)]) as sidecar:
            time.sleep(30)  # the first reading finds what was written before
            first, _, _ = scrape()
            begun, taken, memory = time.monotonic(), [], []
            while time.monotonic() < begun + options.seconds:
                time.sleep(15)
                now, count, seconds = scrape()
                taken.append(seconds)
                memory.append(now["process_resident_memory_bytes"])
            seconds = time.monotonic() - begun
            sidecar.terminate()
    cpu = now["process_cpu_seconds_total"] - first["process_cpu_seconds_total"]
    looks = now["eplb_sidecar_look_seconds_count"] - first["eplb_sidecar_look_seconds_count"]
    reading = now["eplb_sidecar_look_seconds_sum"] - first["eplb_sidecar_look_seconds_sum"]
    print(f"{options.ranks} ranks, {options.rate:g} steps/s, {count} series, {looks:.0f} readings")
    print(f"processor: {cpu / seconds:.1%} of a core; first 30 s: {first['process_cpu_seconds_total']:.1f} s")
    print(f"a reading: {reading / looks * 1e3:.0f} ms; a scrape: {statistics.median(taken) * 1e3:.0f} ms")
    print(f"memory: at most {max(memory) / 2**20:.0f} MiB, at the end {memory[-1] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
