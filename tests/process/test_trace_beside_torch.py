"""`export trace` beside a trace that torch.profiler made of the same process: one base time, one timeline."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

from profiled_run import MARGIN_S, STEPS, profiled_run
from trace_reading import read_trace

from eplb_analyze import open_run
from eplb_analyze.transfer.exporters.trace import export_trace


def test_steps_lie_in_the_passes_that_the_profiler_saw(tmp_path: Path) -> None:
    dump, engine = profiled_run(tmp_path)
    export_trace(open_run(dump), tmp_path / "ours.json")
    ours, theirs = read_trace(tmp_path / "ours.json"), json.loads(engine.read_text(), parse_float=Decimal)
    assert ours.base_ns == theirs["baseTimeNanoseconds"]
    passes = {
        event["name"]: (ours.base_ns + int(1000 * event["ts"]), int(1000 * event["dur"]))
        for event in theirs["traceEvents"]
        if event.get("cat") == "user_annotation"
    }
    steps = ours.steps()
    margin = int(MARGIN_S * 1e9)
    assert len(steps) == STEPS
    for step, found in steps.items():
        begin, length = passes[f"pass {step}"]
        # The pass sleeps before and after record: the two clocks may differ by as much.
        assert begin < found.end < begin + length
        if found.args["duration"] == "engine":
            assert begin - margin < found.begin < found.end - margin // 2
            continue
        if step:
            before, its_length = passes[f"pass {step - 1}"]
            assert before < found.begin < before + its_length
