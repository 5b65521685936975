"""The settings that `replay` reads from a dump: the engines' own code rearranges at the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from engines import run_in, serve

from eplb_analyze import open_run
from eplb_analyze.reader.recorded_setting import first_rearrangement
from eplb_analyze.replay.replay import replay_run


@pytest.mark.parametrize(
    ("options", "redundant"),
    [
        (["--interval", "12", "--window", "5"], 4),
        (["--interval", "9", "--window", "9", "--redundant", "8", "--world", "4", "--seed", "3"], 8),
        (["--interval", "10", "--window", "4", "--parallel", "tp", "--no-log"], 4),
    ],
)
def test_recorded_setting_gives_the_placements_of_vllm(
    tmp_path: Path, options: list[str], redundant: int
) -> None:
    """The real EplbState of vLLM rearranges; its setting is read from the dump and replayed."""
    _, root, _ = serve(tmp_path, "--steps", "46", *options)
    run = open_run(root, model="org/main")
    result = replay_run(run, keep_placements=True)
    own = result.recorded.setting()
    assert own is not None
    assert (own.policy, own.num_redundant_experts) == ("vllm", redundant)
    assert (own.interval, own.window) == (int(options[1]), int(options[3]))
    index = next(i for i, outcome in enumerate(result.outcomes) if outcome.setting == own)
    assert result.placements is not None
    kept = result.placements[index]
    assert [step for step, _ in kept[1:]] == [change.first_step for change in run.history.rearrangements()]
    assert len(kept) > 3
    for step, slots in kept[1:]:
        recorded_slots = np.stack([run.history.layer(i).at(step) for i in range(run.info.num_layers)])  # type: ignore[arg-type]
        np.testing.assert_array_equal(slots, recorded_slots, err_msg=f"step {step}")
    outcome = result.outcomes[index]
    assert outcome.idle_fraction == pytest.approx(result.today.idle_fraction, rel=1e-12)
    assert outcome.moves == result.today.moves
    document = result.to_json()
    assert [s["as_recorded"] for s in document["settings"]].count(True) == 1


def test_first_rearrangement_is_that_of_sglang() -> None:
    """The real EPLBManager of SGLang reports after which passes it rebalances."""
    done = run_in("sglang", "sglang_rebalances.py")
    assert done.returncode == 0, done.stderr[-2000:]
    at = json.loads(done.stdout.strip().splitlines()[-1])
    assert at == list(range(first_rearrangement("sglang", 7), 40, 7))
