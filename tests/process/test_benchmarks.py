"""The table of all figures: a program that prints Markdown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_describes_the_machine_and_has_a_row_for_each_figure() -> None:
    command = [sys.executable, "-m", "benchmarks.table", "--quick", "--only", "size", "engine"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    machine, head, rule, *rows = (line for line in out.splitlines() if line)
    assert f"Python {sys.version.split()[0]}" in machine
    assert head.count("|") == rule.count("|") == 6
    assert len(rows) == 5
    for row in rows[:4]:
        what, goal, verdict, measured, beside = (cell.strip() for cell in row.strip("|").split("|"))
        assert what.startswith("bytes per step: ")
        assert (goal, verdict) == ("≤ 1.7x the entropy", "–")  # too few steps for a verdict
        # No lossless code is shorter than the entropy, and ours is shorter than compressed numpy arrays.
        ours = float(measured.removesuffix("x"))
        assert 1 < ours < float(beside.partition("x")[0].removeprefix("npz "))
    assert "scripts/real_vllm_gpu.sh" in rows[4]
