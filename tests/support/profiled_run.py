"""A recording by a torch program that torch.profiler watches, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

STEPS = 12
#: Before and after `record` is called, within the pass as the profiler sees it.
MARGIN_S = 0.02

SCRIPT = """
    import sys, time
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from eplb_dump import ExpertLoadWriter

    dump, trace, steps, margin = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    placement = torch.arange(8).repeat(3, 1)
    weights = torch.randn(64, 64)
    options = {"model": "m", "num_logical_experts": 8, "ep_size": 2, "run_id": "r"}
    with (
        ExpertLoadWriter(dump, ep_rank=0, **options) as writer,
        ExpertLoadWriter(dump, ep_rank=1, **options) as other,
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        for step in range(steps):
            with record_function(f"pass {step}"):
                began = time.monotonic()
                torch.mm(weights, weights)
                time.sleep(margin)
                step_ms = (time.monotonic() - began) * 1e3 if step % 2 else None
                load = torch.randint(1, 100, (3, 8), dtype=torch.int32)
                for one in (writer, other):
                    one.record(step, load, placement, num_tokens=64, phase="decode", step_ms=step_ms)
                time.sleep(margin)
    profiler.export_chrome_trace(trace)
"""


class ProfiledRun(NamedTuple):
    dump: Path
    #: What the profiler wrote.
    trace: Path


def profiled_run(folder: Path) -> ProfiledRun:
    """Two ranks. Each pass is an annotation ``pass N``, in which both record. Odd steps state ``step_ms``."""
    run = ProfiledRun(folder / "dump", folder / "engine.pt.trace.json")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, run), str(STEPS), str(MARGIN_S)]
    # The profiler prints lines of its own.
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run
