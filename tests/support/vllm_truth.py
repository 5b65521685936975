"""A recording of vLLM against the truth that ``tests/engines/vllm_ranks.py`` saved on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from engines import described, version_of
from helpers import survived_loads

from eplb_analyze import Run, open_run
from eplb_analyze.analysis.check import check_run


def tokens_are_known() -> bool:
    """Whether ``EplbState.prepare_forward`` says how many tokens a pass has."""
    return tuple(map(int, version_of("vllm").split(".")[:2])) >= (0, 26)


def assert_true(
    ranks: list[dict[str, Any]],
    dump: Path,
    name: str,
    interval: int = 1,
    shown: str | None = None,
    phases: bool = True,
    tokens: bool = True,
) -> Run:
    """Loads, phases and tokens at every step on every rank, placements with their steps, and completeness."""
    tokens = tokens and tokens_are_known()
    run = open_run(dump, model=shown or {"model": "org/main", "draft": "org/draft (draft)"}[name])
    steps = sorted({int(key.split("/")[0]) for truth in ranks for key in truth if "/" in key})
    assert run.steps()["step"].to_list() == steps
    assert run.present_ranks == list(range(len(ranks)))
    for rank, truth in enumerate(ranks):
        found: dict[int, Any] = {}
        for session in run.sessions:
            if session.info.ep_rank == rank:
                found |= survived_loads(session.folder)
        real = {
            step: truth[f"{step}/{name}/load"]
            for step in steps
            if step % interval == 0 and not truth.get(f"{step}/dummy", True)
        }
        assert found.keys() == real.keys()
        for step, load in real.items():
            np.testing.assert_array_equal(found[step], load, err_msg=f"rank {rank}, step {step}")
        assert described(run, rank) == {
            # vLLM does not say how many tokens a drafter takes.
            step: (
                str(truth[f"{step}/phase"]),
                int(truth[f"{step}/tokens"]) if name == "model" and tokens else -1,
            )
            for step in real
            if phases
        }
    for step in steps[::interval]:
        if all(truth.get(f"{step}/dummy", True) for truth in ranks):
            continue  # no load, so no placement either
        slots = [t[f"{step}/{name}/placement"] for t in ranks if f"{step}/{name}/placement" in t]
        assert all(np.array_equal(one, slots[0]) for one in slots)
        found_slots = run.placement(step)["logical"].to_numpy().reshape(slots[0].shape)
        np.testing.assert_array_equal(found_slots, slots[0], err_msg=f"step {step}")
    report = check_run(run)
    assert [f.code for f in report.findings if f.severity == "error"] == []
    return run
