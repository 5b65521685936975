"""SGLang's own loader reads what `export placement --for sglang` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from engines import run_in
from helpers import cli

from eplb_dump import ExpertLoadWriter

LOGICAL, SLOTS, HIDDEN = 6, 8, 5
#: Of the model in sglang_ranks.py; the others are dense.
MOE_LAYERS = [2, 3, 4]
INITIAL = [0, 1, 2, 3, 4, 5, 0, 1]
REVERSED = [5, 4, 3, 2, 1, 0, 5, 4]


def test_sglang_loads_an_exported_placement(tmp_path: Path) -> None:
    recorded = [REVERSED, INITIAL, INITIAL]
    with ExpertLoadWriter(
        tmp_path / "dump", model="org/moe", num_logical_experts=LOGICAL, ep_size=2, run_id="r",
        scope="global", moe_layers=MOE_LAYERS,
    ) as writer:  # fmt: skip
        for step in range(3):
            writer.record(step, np.ones((3, SLOTS), np.int64), np.array(recorded))
    file, more, fewer = (tmp_path / name for name in ("file.json", "more.json", "fewer.json"))
    command = ["export", "placement", "--for", "sglang", "--num-hidden-layers", str(HIDDEN), "-o", file]
    result = cli(*command, "--json", tmp_path / "dump")
    assert result.returncode == 0, result.stderr
    assert "--ep-num-redundant-experts 2" in json.loads(result.stdout)["usage"]
    rows = json.loads(file.read_text())["physical_to_logical_map"]
    more.write_text(json.dumps({"physical_to_logical_map": rows, "comment": "no"}))
    fewer.write_text(json.dumps({"physical_to_logical_map": rows[2:]}))
    done = run_in("sglang", "sglang_locates.py", tmp_path, file, more, fewer)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert found[str(file)]["physical_to_logical_map"] == [INITIAL, INITIAL, *recorded]
    slots_of = found[str(file)]["logical_to_all_physical_map"][2]
    assert [[p for p in slots if p >= 0] for slots in slots_of] == [
        [s for s in range(SLOTS) if REVERSED[s] == expert] for expert in range(LOGICAL)
    ]
    # The exporter relies on both: another key stops the engine, and missing rows shift the layers.
    assert found[str(more)] == "TypeError"
    assert found[str(fewer)]["physical_to_logical_map"][0] == REVERSED
