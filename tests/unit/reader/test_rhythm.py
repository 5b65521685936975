"""Which changes of placement are one rearrangement. The truth is how the changes were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import session_info
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.reader.rhythm import Change, Rhythm
from eplb_analyze.reader.run import open_run
from eplb_dump import ExpertLoadWriter

SYNC = {"eplb_config": {"step_interval": 10, "window_size": 5, "use_async": False}}
ASYNC = {"eplb_config": {"step_interval": 3000, "window_size": 1000, "use_async": True}}


def grouped(config: dict[str, Any], changes: dict[int, list[int]], layers: int, **info: Any) -> list[Any]:
    """First step, last step and layers of each rearrangement; ``changes``: the layers by step."""
    rhythm = Rhythm.stated(session_info(engine_config=config, **info), layers)
    found = rhythm.group([Change(step, layer, 1) for step, own in changes.items() for layer in own])
    return [(g[0].step, g[-1].step, sorted(c.layer for c in g)) for g in found]


def test_synchronous_rearrangements_ten_steps_apart_are_two() -> None:
    changes = {10: [0, 1], 20: [2, 3]}
    assert grouped(SYNC, changes, 4) == [(10, 10, [0, 1]), (20, 20, [2, 3])]


@pytest.mark.parametrize(("config", "apart"), [(ASYNC, 100), ({}, 60)])
def test_twelve_layers_one_after_another_are_one(config: dict[str, Any], apart: int) -> None:
    changes = {750 + apart * layer: [layer] for layer in range(12)}
    assert grouped(config, changes, 12) == [(750, 750 + 11 * apart, list(range(12)))]


def test_asynchronous_rearrangements_of_different_layers_are_apart_by_the_interval() -> None:
    """The second one's first layer is done a little sooner than the first one's."""
    changes = {3010: [0], 3012: [1], 6005: [2], 6009: [3]}
    assert grouped(ASYNC, changes, 4) == [(3010, 3012, [0, 1]), (6005, 6009, [2, 3])]


def test_transfer_that_takes_longer_than_the_interval_is_one_rearrangement() -> None:
    config = {"eplb_config": {"step_interval": 10, "use_async": True}}
    changes = {10 + 2 * layer: [layer] for layer in range(20)} | {60: [0], 62: [1]}
    assert grouped(config, changes, 20) == [(10, 48, list(range(20))), (60, 62, [0, 1])]


def test_chunks_of_layers_in_consecutive_passes_are_one_rearrangement() -> None:
    config = {"eplb_rebalance_num_iterations": 5, "eplb_rebalance_layers_per_chunk": 2}
    # Five layers take three passes; the layers of the chunk in the middle keep their placement.
    changes = {6: [0, 1], 8: [4], 11: [2], 12: [3]}
    assert grouped(config, changes, 5) == [(6, 8, [0, 1, 4]), (11, 12, [2, 3])]


def test_without_chunks_sglang_changes_all_layers_in_one_pass() -> None:
    config = {"eplb_rebalance_num_iterations": 5, "eplb_rebalance_layers_per_chunk": None}
    assert grouped(config, {6: [0], 7: [1]}, 2) == [(6, 6, [0]), (7, 7, [1])]


def test_sampling_delays_the_sight_of_a_change() -> None:
    config = {"eplb_rebalance_num_iterations": 100, "eplb_rebalance_layers_per_chunk": 1}
    changes = {104: [0, 1], 108: [2]}  # changed at 102, 103 and 106; every fourth step is recorded
    assert grouped(config, changes, 3, interval=4) == [(104, 108, [0, 1, 2])]


def test_repeated_layer_begins_the_next_rearrangement() -> None:
    changes = {100: [0], 150: [1], 200: [0], 250: [1]}
    assert grouped({}, changes, 2) == [(100, 150, [0, 1]), (200, 250, [0, 1])]


def test_steps_of_several_layers_show_a_synchronous_engine() -> None:
    changes = {10: [0, 1], 20: [2, 3], 30: [0, 2], 40: [1, 3]}
    assert [g[:2] for g in grouped({}, changes, 4)] == [(10, 10), (20, 20), (30, 30), (40, 40)]


def test_layers_change_in_ascending_order() -> None:
    for config in (ASYNC, {}, {"eplb_rebalance_num_iterations": 8, "eplb_rebalance_layers_per_chunk": 1}):
        changes = {100: [3], 101: [5], 103: [2], 104: [4]}
        assert [g[:2] for g in grouped(config, changes, 8)] == [(100, 101), (103, 104)]


def test_long_gap_separates_rearrangements_of_different_layers() -> None:
    changes = {100: [0], 103: [1], 104: [2], 700: [3], 702: [4], 705: [5]}
    assert grouped({}, changes, 6) == [(100, 104, [0, 1, 2]), (700, 705, [3, 4, 5])]


@given(data=st.data())
def test_grouping_finds_the_rearrangements_that_were_made(data: st.DataObject) -> None:
    """Any engine: each rearrangement begins in its interval and changes some layers, in ascending order."""
    layers = data.draw(st.integers(1, 12))
    kind = data.draw(st.sampled_from(["sync", "async", "chunks"]))
    interval = data.draw(st.integers(100, 4000))
    chunk = data.draw(st.integers(1, layers))
    config: dict[str, Any] = {
        "sync": {"eplb_config": {"step_interval": interval, "use_async": False}},
        "async": {"eplb_config": {"step_interval": interval, "use_async": True}},
        "chunks": {"eplb_rebalance_num_iterations": interval, "eplb_rebalance_layers_per_chunk": chunk},
    }[kind]
    changes: dict[int, list[int]] = {}
    truth = []
    for number in range(1, data.draw(st.integers(1, 5)) + 1):
        own = sorted(data.draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True)))
        start = number * interval
        if kind == "sync":
            steps = [start] * len(own)
        elif kind == "chunks":
            steps = [start + layer // chunk for layer in own]
        else:  # a layer takes up to a fiftieth of the interval, so that all are done in half of it
            waits = st.integers(1, max(1, interval // 50))
            steps = (start + np.cumsum([data.draw(waits) for _ in own])).tolist()
        for step, layer in zip(steps, own, strict=True):
            changes.setdefault(step, []).append(layer)
        truth.append((min(steps), max(steps), sorted(own)))
    assert grouped(config, changes, layers) == truth


@pytest.mark.parametrize(("use_async", "expected"), [(False, [(10, 1), (20, 1)]), (True, [(10, 1), (20, 1)])])
def test_report_of_a_run_follows_what_the_engine_states(
    tmp_path: Path, use_async: bool, expected: list[tuple[int, int]]
) -> None:
    config = {"eplb_config": {"step_interval": 10, "use_async": use_async}}
    placements = [np.tile(np.arange(4), (2, 1)) for _ in range(3)]
    placements[1][0, :2] = placements[2][0, :2] = [1, 0]
    placements[2][1, :2] = [1, 0]
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global", engine_config=config
    ) as writer:
        for step in range(30):
            writer.record(step, np.full((2, 4), 5), placements[step // 10])
    rows = rearrangement_report(open_run(tmp_path)).rearrangements
    assert [(r.first_step, r.layers) for r in rows] == expected
