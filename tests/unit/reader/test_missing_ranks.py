"""A dump of scope local that lacks a rank: estimates by the ranks that are there, or a refusal that says why.

The truth is a recording of scope global that holds what the ranks that are there recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error

from eplb_analyze import open_run
from eplb_analyze.analysis.compare import compare_runs
from eplb_analyze.analysis.traffic import traffic_report
from eplb_analyze.errors import DumpError
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.replay.settings import Setting
from eplb_analyze.report.document import report_document
from eplb_analyze.transfer.exporters.loads import export_loads
from eplb_analyze.transfer.exporters.placements import policy_placement
from eplb_dump import ExpertLoadWriter

RANKS, LAYERS, EXPERTS, STEPS, MISSING = 4, 2, 8, 240, 3
LABEL = f"estimate from {RANKS - 1} of {RANKS} ranks"


def loads(seed: int) -> Any:
    """Tokens ``[rank, step, layer, expert]``; the experts' shares differ."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0.3, 2.0, (LAYERS, EXPERTS))
    return rng.poisson(30 * share, (RANKS, STEPS, LAYERS, EXPERTS))


def record(root: Path, seed: int, *, scope: str = "local", without: tuple[int, ...] = ()) -> Run:
    """A recording; with scope global, of the sum over the ranks that are there."""
    tokens = loads(seed)
    there = [rank for rank in range(RANKS) if rank not in without]
    parts = {rank: tokens[rank] for rank in there} if scope == "local" else {0: tokens[there].sum(axis=0)}
    placement = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for rank, own in parts.items():
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, scope=scope,
            run_id="r",
        ) as writer:  # fmt: skip
            for step, load in enumerate(own):
                writer.record(step, load, placement)
    return open_run(root)


@pytest.fixture
def lacking(tmp_path: Path) -> Run:
    return record(tmp_path / "lacking", 1, without=(MISSING,))


@pytest.fixture
def truth(tmp_path: Path) -> Run:
    return record(tmp_path / "truth", 1, scope="global", without=(MISSING,))


SETTINGS = [Setting("deepseek", num_redundant_experts=4, ep_size=RANKS, interval=60, window=60, start=60)]


def test_replay_scores_the_loads_of_the_ranks_that_are_there(lacking: Run, truth: Run) -> None:
    found, expected = (replay_run(run, SETTINGS) for run in (lacking, truth))
    assert found.measured_balancedness == pytest.approx(expected.measured_balancedness, rel=1e-12)
    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        assert one.setting == other.setting
        assert one.balancedness == pytest.approx(other.balancedness, rel=1e-12)
    assert found.part.missing_ranks == [MISSING]
    assert found.notes[0].startswith(f"{LABEL}, without rank {MISSING}")
    assert expected.part.missing_ranks == []
    assert not any("estimate from" in note for note in expected.notes)
    assert found.part.whole.count(StepState.RECORDED) == 0
    assert found.part.whole.count(StepState.INCOMPLETE) == STEPS


def test_advice_is_that_of_the_ranks_that_are_there(lacking: Run, truth: Run) -> None:
    found, expected = (advise(run, SETTINGS) for run in (lacking, truth))
    assert found.verdict == expected.verdict
    assert found.measured_balancedness == pytest.approx(expected.measured_balancedness, rel=1e-12)
    assert any(note.startswith(LABEL) for note in found.notes)


def test_traffic_has_the_rows_of_the_ranks_that_are_there(lacking: Run) -> None:
    report = traffic_report(lacking)
    sent = loads(1).sum(axis=(1, 2)).reshape(RANKS, RANKS, -1).sum(axis=2)
    sent[MISSING] = 0
    np.testing.assert_array_equal(report.matrix, sent)
    assert report.missing_ranks == report.missing_sources == [MISSING]
    others = sent[:MISSING][~np.eye(RANKS, dtype=bool)[:MISSING]]
    busiest = report.pairs(1)[0]
    assert busiest.tokens == others.max()
    assert busiest.times_mean == pytest.approx(others.max() / others.mean())
    assert report.notes[0].startswith(LABEL)


def test_policy_places_by_the_loads_of_the_ranks_that_are_there(lacking: Run, truth: Run) -> None:
    found, expected = (policy_placement(run, "deepseek", redundant=4) for run in (lacking, truth))
    np.testing.assert_array_equal(
        found.placement.physical_to_logical_map, expected.placement.physical_to_logical_map
    )
    assert any(note.startswith(LABEL) for note in found.notes)


@pytest.mark.parametrize("form", ["csv", "parquet", "logical-npy"])
def test_loads_are_not_exported_because_the_file_cannot_name_the_missing_rank(
    lacking: Run, tmp_path: Path, form: str
) -> None:
    with pytest.raises(DumpError, match=f"every step lacks the loads of rank {MISSING}"):
        export_loads(lacking, form, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_report_has_charts_that_are_labeled(lacking: Run, truth: Run) -> None:
    found, expected = (report_document(run).document for run in (lacking, truth))
    assert any(note.startswith(LABEL) for note in found["notes"])
    assert found["timeline"]["mean"] == pytest.approx(expected["timeline"]["mean"], rel=1e-9)
    assert found["loads"]["steps"] == expected["loads"]["steps"]
    assert found["summary"]["balancedness"]["mean"] is None  # which is of complete steps only


def test_runs_that_lack_the_same_rank_are_compared(tmp_path: Path, lacking: Run, truth: Run) -> None:
    found = compare_runs(lacking, record(tmp_path / "b", 2, without=(MISSING,)))
    expected = compare_runs(truth, record(tmp_path / "c", 2, scope="global", without=(MISSING,)))
    assert found.idle_fraction is not None
    assert expected.idle_fraction is not None
    assert found.verdict == expected.verdict
    assert found.idle_fraction.difference == pytest.approx(expected.idle_fraction.difference, rel=1e-9)
    assert found.warnings[0].startswith(LABEL)


@pytest.mark.parametrize("without", [(), (2,)])
def test_estimate_is_not_compared_with_what_has_other_ranks(
    tmp_path: Path, lacking: Run, without: tuple[int, ...]
) -> None:
    found = compare_runs(lacking, record(tmp_path / "b", 2, without=without))
    assert not found.comparable
    assert found.reasons[0].startswith(f"A lacks rank {MISSING} and B lacks ")


def test_one_complete_step_is_enough_to_use_no_others(tmp_path: Path) -> None:
    """The ranks' own recordings: rank 3 has only the first steps."""
    root = tmp_path / "dump"
    tokens, placement = loads(5), np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for rank in range(RANKS):
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(40 if rank == MISSING else STEPS):
                writer.record(step, tokens[rank, step], placement)
    run = open_run(root)
    assert run.estimated() is run
    assert run.estimated((40, STEPS)).missing_ranks == (MISSING,)
    assert replay_run(run, SETTINGS).last_step == 39
    assert replay_run(run, SETTINGS, (40, STEPS)).part.missing_ranks == [MISSING]
    report = traffic_report(run)
    assert (report.recorded, report.missing_ranks) == (40, [])


def test_commands_print_the_label_and_end_with_exit_code_3(tmp_path: Path, lacking: Run) -> None:
    for command in (["traffic"], ["replay", "--policy", "deepseek"], ["advise"]):
        result = cli(*command, str(lacking.path))
        assert result.returncode == 3, command
        assert LABEL in " ".join(result.stdout.split()), command
    result = cli("traffic", "--json", str(lacking.path))
    assert json.loads(result.stdout)["missing_ranks"] == [MISSING]
    out = tmp_path / "loads.csv"
    one_error(
        cli("export", "loads", "--as", "csv", "-o", str(out), str(lacking.path)),
        3,
        f"every step lacks the loads of rank {MISSING}",
        "show estimates",
    )
