"""Step times as vLLM and SGLang write them can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import run_in

from eplb_analyze.transfer.importers.timings import read_series


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_step_times_that_an_engine_writes(tmp_path: Path, engine: str) -> None:
    done = run_in(engine, "timings.py", engine, tmp_path / "log")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = read_series(tmp_path / "log")
    assert one.step is not None
    assert one.step.tolist() == [0, 1, 2, 3, 4]
    assert one.ms.tolist() == pytest.approx([90, 91, 92, 93, 94])
    assert one.tokens.tolist() == [576] * 5
