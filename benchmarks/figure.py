"""A figure of a benchmark beside its goal and its peer, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: The packages whose version decides a figure.
PACKAGES = ("numpy", "pyarrow", "polars", "torch", "duckdb", "vllm")


@dataclass(frozen=True)
class Figure:
    """One row of the table. ``met`` is None if there is no goal, or if nothing was measured."""

    what: str
    goal: str
    measured: str
    #: What a peer or a physical limit reached in the same run.
    beside: str
    met: bool | None


def table(figures: Iterable[Figure]) -> str:
    """A Markdown table."""
    words = {True: "met", False: "**missed**", None: "–"}
    rows = ["| what | goal | result | measured | compared with |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {f.what} | {f.goal} | {words[f.met]} | {f.measured} | {f.beside} |" for f in figures]
    return "\n".join(rows)


def machine() -> str:
    """The processor, memory, kernel, GPUs and packages, in a sentence each."""
    cpus = sorted(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return " ".join(
        [
            f"{len(cpus)} of {os.cpu_count()} processors ({_processor()}), {memory:.0f} GiB of memory.",
            f"{platform.system()} {platform.release()}, Python {platform.python_version()},",
            ", ".join(f"{name} {number}" for name in PACKAGES if (number := _version(name))) + ".",
            f"GPUs: {_gpus() or 'none'}.",
            f"Load before: {load:.1f}.",
        ]
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ", ".join(out.split("\n")[:-1])
