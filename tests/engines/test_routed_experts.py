"""What vLLM returns as routed experts, saved as docs/record/import.md shows, is imported."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from engines import run_in
from helpers import ROOT

from eplb_analyze import open_run
from eplb_analyze.transfer.importers.import_dump import import_dump
from eplb_analyze.transfer.importers.source import Options

EXPERTS, DENSE = 16, 1


def test_routed_experts_of_vllm_are_imported(tmp_path: Path) -> None:
    text = (ROOT / "docs/record/import.md").read_text()
    (snippet,) = re.findall(r"^```python\n([^`]*def save_routing[^`]*)^```", text, re.MULTILINE)
    (tmp_path / "snippet.py").write_text(snippet)
    done = run_in("vllm", "vllm_routed.py", tmp_path, tmp_path / "snippet.py")
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(tmp_path / "truth.npz") as found:
        truth = [found[name] for name in found.files]
    options = Options(ep_size=4, placement="linear", num_logical_experts=EXPERTS, step_per="request")
    report = import_dump(tmp_path / "routed.npz", tmp_path / "dump", None, options)
    assert (report.format, report.layer_numbers, report.steps) == ("topk", [1, 2, 3], len(truth))
    run = open_run(tmp_path / "dump")
    loads = np.array(run.loads()["load"].to_list()).reshape(len(truth), -1, EXPERTS)
    for step, ids in enumerate(truth):
        for layer in range(ids.shape[1]):
            expected = np.bincount(ids[:, layer].ravel(), minlength=EXPERTS)
            np.testing.assert_array_equal(loads[step, layer], expected)
    assert run.steps()["num_tokens"].to_list() == [len(ids) for ids in truth]
