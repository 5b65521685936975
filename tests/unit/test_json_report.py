"""Clock times beside the steps of JSON documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, write

from eplb_analyze import open_run
from eplb_analyze.json_report import with_times


def times_of(document: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """A document with times ``t7`` of step 7, and the steps whose times were asked for."""
    asked: list[int] = []

    def time_of(step: int) -> str:
        asked.append(step)
        return f"t{step}"

    return with_times(document, time_of), asked


def test_each_step_has_its_time_right_behind_it() -> None:
    found, asked = times_of(
        {"a": [{"first_step": 5, "n": 1, "last_step": None}], "b": {"step": 3}, "min_step": 5}
    )
    assert found == {
        "a": [{"first_step": 5, "first_time": "t5", "n": 1, "last_step": None, "last_time": None}],
        "b": {"step": 3, "time": "t3"},
        "min_step": 5,
        "min_time": "t5",
    }
    assert list(found["a"][0]) == ["first_step", "first_time", "n", "last_step", "last_time"]
    assert asked == [3, 5]  # once each and in order, as a clock reads a run's segments in order


@pytest.mark.parametrize(
    "document",
    [
        {"steps": 3, "ms_per_step": None, "share_of_step": None, "tokens_per_step": 7},
        {"first_step": 1, "last_step": 2, "since": "03:12", "until": "03:13"},
        {"first_step": 1, "first_time": "known", "step": "a word", "since": None},
        {"rearrangements": [1, 2]},
    ],
)
def test_other_keys_and_objects_that_state_times_stay_as_they_are(document: dict[str, Any]) -> None:
    assert times_of(document)[0] == document


def test_times_in_output_are_those_of_the_run(tmp_path: Path) -> None:
    write(tmp_path, steps=24)
    clock = open_run(tmp_path).clock
    document = json.loads(cli("summary", "--json", tmp_path).stdout)
    (change,) = document["rearrangement_details"]
    assert change["first_time"] == clock.iso(change["first_step"])
    assert document["steps"]["last_time"] == clock.iso(23)
    assert all(part["first_time"] == clock.iso(part["first_step"]) for part in document["timeline"])
    compared = json.loads(cli("compare", "--steps-a", "-11", "--steps-b", "12-", "--json", tmp_path).stdout)
    assert compared["b"]["steps"]["first_time"] == clock.iso(12)


def test_times_of_a_run_imported_without_them_are_null(tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", np.array([[30, 10, 20, 40], [25, 25, 25, 25]]))
    new = tmp_path / "new"
    assert (
        cli("import", tmp_path / "load.npy", new, "--ep-size", "2", "--placement", "linear").returncode == 0
    )
    document = json.loads(cli("summary", "--json", new).stdout)
    assert (document["steps"]["first"], document["steps"]["first_time"]) == (0, None)
