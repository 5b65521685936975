"""The columns of `postmortem` about incidents: those of the worst one in the run's summary."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from batches import EVEN, record
from helpers import cli
from rich.console import Console

from eplb_analyze import open_run
from eplb_analyze.analysis.incidents import Cause, EndedBy, Incident, IncidentCost
from eplb_analyze.analysis.summary import summary_of
from eplb_analyze.analysis.summary_sums import bins_of, sums_of
from eplb_analyze.batch.comparison import Postmortem
from eplb_analyze.batch.rows import Row, row_of
from eplb_analyze.cli.views.postmortem import render
from eplb_dump import ExpertLoadWriter


def incident(first: int, last: int, tokens: float, cause: Cause, *ranks: int) -> Incident:
    return Incident(
        layer=12,
        layers=(12,),
        ranks=ranks,
        first_step=first,
        last_step=last,
        since="2026-11-26T03:12:04.250Z",
        until="2026-11-26T03:31:58.000Z",
        peak_imbalance=2.2,
        usual_imbalance=1.1,
        cause=cause,
        ended_by=EndedBy("traffic", last + 1),
        cost=IncidentCost(None, tokens),
    )


#: Many tokens in few steps, which are fewer in all than some tokens in many steps.
SHORT = incident(5, 9, 900.0, Cause("unknown"), 3)
LONG = incident(20, 49, 400.0, Cause("expert_hot", 77, 12, 1.0, 11.0, 1), 14, 2)


def row(root: Path, *incidents: Incident) -> Row:
    record(root, "r", EVEN)
    run = open_run(root)
    sums = sums_of(run, None, bins_of(run))
    return row_of(str(root), run, sums, replace(summary_of(sums, run), incidents=[*incidents]))


def shown(row: Row, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(console, Postmortem([row]), None, 10)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_row_has_the_incident_that_cost_most(tmp_path: Path) -> None:
    found = row(tmp_path, SHORT, LONG)
    assert (found.incidents, found.incident_cause, found.incident_layer) == (2, "expert_hot", 12)
    assert (found.incident_expert, found.incident_rank) == (77, 14)
    assert (found.incident_first_step, found.incident_last_step) == (20, 49)
    assert (found.incident_since, found.incident_until) == (LONG.since, LONG.until)
    assert found.incident_peak_imbalance == 2.2


@pytest.mark.parametrize(("width", "text"), [(80, "2: L12 E77 03:12"), (160, "2: layer 12 expert 77, 03:12")])
def test_table_names_the_worst_incident_and_fits(tmp_path: Path, width: int, text: str) -> None:
    found = shown(row(tmp_path, SHORT, LONG), width)
    assert text in found
    assert "…" not in found
    lines = [
        line for line in found.splitlines() if not line.startswith("next  ")
    ]  # to be pasted: never wrapped
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("width", "text"), [(80, "1: L12 R3 03:12"), (160, "1: layer 12 rank 3, 03:12")])
def test_rank_is_named_if_no_expert_explains_the_incident(tmp_path: Path, width: int, text: str) -> None:
    assert text in shown(row(tmp_path, SHORT), width)


def test_run_without_times_has_the_first_step_in_place_of_a_time(tmp_path: Path) -> None:
    assert "1: L12 R3 step 5" in shown(row(tmp_path, replace(SHORT, since=None, until=None)), 80)


def test_run_without_incidents_says_none(tmp_path: Path) -> None:
    found = row(tmp_path)
    assert (found.incidents, found.incident_layer) == (0, None)
    assert "none" in shown(found, 80)


def test_planted_incident_is_the_one_of_the_summary(tmp_path: Path) -> None:
    """Expert 5 of layer 1 is hot in steps 400 to 599."""
    rng = np.random.default_rng(1)
    mean = np.full((1000, 3, 16), 100.0)
    mean[400:600, 1, 5] = 800
    placement = np.tile(np.arange(16), (3, 1))
    options = {"model": "m", "num_logical_experts": 16, "ep_size": 4, "ep_rank": 0, "scope": "global"}
    with ExpertLoadWriter(tmp_path, run_id="r", **options) as writer:  # type: ignore[arg-type]
        for step, load in enumerate(rng.poisson(mean)):
            writer.record(step, load, placement)
            assert step % 100 or writer.flush(60)
    summary = json.loads(cli("summary", "--json", tmp_path).stdout)
    (planted,) = summary["incidents"]
    (found,) = json.loads(cli("postmortem", "--json", tmp_path).stdout)["runs"]
    assert found["incidents"] == 1
    assert (found["incident_layer"], found["incident_expert"], found["incident_rank"]) == (1, 5, 1)
    for ours, theirs in (
        ("incident_first_step", "first_step"),
        ("incident_last_step", "last_step"),
        ("incident_since", "since"),
        ("incident_until", "until"),
        ("incident_peak_imbalance", "peak_imbalance"),
    ):
        assert found[ours] == planted[theirs], ours
    clock = open_run(tmp_path).clock
    assert (found["first_time"], found["last_time"]) == (clock.iso(0), clock.iso(999))
