"""Figures of steps of which only tokens per EP rank are kept: nothing is said of what was not looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import steady_clock
from helpers import cli, open_writer
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_dump.format.schema import Tier

LAYERS, RANKS, SLOTS, LOGICAL = 2, 4, 8, 6
STEPS, SEGMENT = 1024, 128
#: One expert gets far too many tokens in these steps.
HOT = range(300, 640)


def loads() -> Any:
    rng = np.random.default_rng(5)
    found = rng.poisson(200, (STEPS, LAYERS, SLOTS))
    found[HOT.start : HOT.stop, 1, 3] += 900
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    placement = np.tile(np.arange(SLOTS) % LOGICAL, (LAYERS, 1))
    with (
        steady_clock(400),
        open_writer(
            root, ep_size=RANKS, num_logical_experts=LOGICAL, segment_steps=SEGMENT, scope="global"
        ) as writer,
    ):
        for step, load in enumerate(loads()):
            writer.record(step, load, placement, step_ms=25.0 + load.sum() / 1e4)
            if step % 100 == 0:
                assert writer.flush(60)
    return root


@pytest.fixture
def ranks_only(whole: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(whole, tmp_path / "ranks"))
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.RANKS: range(STEPS // SEGMENT)})
    return root


@pytest.fixture
def older_ranks(whole: Path, tmp_path: Path) -> Path:
    """The newest two segments are kept in full."""
    root = Path(shutil.copytree(whole, tmp_path / "older"))
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.RANKS: range(STEPS // SEGMENT - 2)})
    return root


def test_incidents_are_not_known_without_experts_loads(whole: Path, ranks_only: Path) -> None:
    assert len(summarize(open_run(whole)).incidents) == 1
    for steps in ([], ["--steps", "300-639"]):
        text = " ".join(cli("summary", *steps, ranks_only).stdout.split())
        assert "incidents are not known: finding them needs experts' loads, which are no longer kept" in text
        assert "The cost of imbalance is not known: it needs experts' loads" in text
        for wrong in ("no incidents", "smaller departure", "does not explain", "fewer than"):
            assert wrong not in text
        document = json.loads(cli("summary", "--json", *steps, ranks_only).stdout)
        assert (document["incidents"], document["searched"]) == (None, [])
        assert document["verdict"]["verdict"] != "balanced"


def test_tables_and_traces_do_not_say_that_there_is_none(
    whole: Path, ranks_only: Path, tmp_path: Path
) -> None:
    (row,) = json.loads(cli("postmortem", ranks_only, "--json").stdout)["runs"]
    assert (row["incidents"], row["lost_rank_seconds"]) == (None, None)
    text = " ".join(cli("compare", whole, ranks_only).stdout.split())
    assert "incident in A: " in text
    assert "incidents in B are not known: its experts' loads are not kept" in text
    assert "routing not compared: experts' loads are no longer kept in B" in text
    text = " ".join(cli("export", "trace", "-o", tmp_path / "trace.json", ranks_only).stdout.split())
    assert "incidents not known" in text
    assert "incidents are looked for by experts' loads, which no step has" in text
    document = json.loads(cli("export", "trace", "-o", tmp_path / "t.json", "--json", ranks_only).stdout)
    assert document["incidents"] is None


def test_what_was_measured_in_a_part_is_said_of_this_part(older_ranks: Path) -> None:
    found = summarize(open_run(older_ranks))
    first = STEPS - 2 * SEGMENT
    assert found.searched == [(first, STEPS)]
    assert (found.incidents, found.unexamined_departures, found.lost_rank_seconds) == ([], 0, None)
    assert found.cost.ms_per_step is not None
    text = " ".join(cli("summary", older_ranks).stdout.split())
    assert f"incidents are looked for only in steps {first}-{STEPS - 1}" in text
    assert f"The cost covers only steps {first}-{STEPS - 1}" in text
    for wrong in ("no incidents", "smaller departure", "does not explain", "large part of the step time"):
        assert wrong not in text
    document = json.loads(cli("summary", "--json", older_ranks).stdout)
    assert (document["incidents"], document["searched"]) == ([], [[first, STEPS - 1]])
    kept = cli("summary", "--steps", f"{first}-", older_ranks).stdout
    assert "no incidents in these steps" in kept
