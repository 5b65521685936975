"""Rearrangements are the same before and after thinning, and in `watch`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import cli, open_writer
from hypothesis import given, settings
from hypothesis import strategies as st
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.live.watch import Follower
from eplb_analyze.reader.placements import Rearrangement
from eplb_dump.format.schema import Tier

STEPS, PER_SEGMENT, INTERVAL, SLOTS = 80, 5, 20, 6
CONFIGS: dict[str, dict[str, Any]] = {
    "sync": {"eplb_config": {"step_interval": INTERVAL, "use_async": False}},
    "async": {"eplb_config": {"step_interval": INTERVAL, "use_async": True}},
    "chunks": {"eplb_rebalance_num_iterations": INTERVAL, "eplb_rebalance_layers_per_chunk": 2},
    "unstated": {},
}
Changes = dict[int, list[int]]


@st.composite
def engine_changes(draw: st.DrawFn, kind: str, layers: int) -> Changes:
    """The layers that change by step: in each interval, some of the layers, in ascending order."""
    changes: Changes = {}
    for number in range(1, STEPS // INTERVAL):
        own = sorted(draw(st.lists(st.integers(0, layers - 1), unique=True)))
        step = number * INTERVAL + draw(st.integers(0, 3))
        for place, layer in enumerate(own):
            after = {"sync": 0, "chunks": layer // 2}.get(kind, 2 * place)
            changes.setdefault(step + after, []).append(layer)
    return changes


def record(root: Path, kind: str, layers: int, changes: Changes, until: int = STEPS, first: int = 0) -> None:
    """One session; its placement at the first step is the one in force."""
    placement: npt.NDArray[np.int64] = np.tile(np.arange(SLOTS, dtype=np.int64) % 4, (layers, 1))
    load = np.ones((layers, SLOTS), np.int64)
    writer = open_writer(
        root, num_logical_experts=4, scope="global", segment_steps=PER_SEGMENT, engine_config=CONFIGS[kind]
    )
    with writer:
        for step in range(until):
            for layer in changes.get(step, []):
                placement = placement.copy()
                placement[layer] = np.roll(placement[layer], 1)
            if step >= first:
                writer.record(step, load, placement)
        assert writer.close(60)


def rearrangements(root: Path) -> list[Rearrangement]:
    return open_run(root).history.rearrangements()


def assert_watch_agrees(root: Path, window: int, known: list[Rearrangement]) -> None:
    look = Follower(root, window=window).look()
    assert look.findings == []
    steps = [one.first_step for one in known]
    assert look.rearrangements == steps[len(steps) - len(look.rearrangements) :]
    newest = look.rearrangement
    assert (newest is None) == (not known)
    if newest is not None:
        found = newest.first_step, newest.last_step, newest.layers, newest.slots_changed
        this = known[-1]
        assert found == (this.first_step, this.last_step, len(this.layers), this.slots_changed)


@settings(max_examples=25)
@given(data=st.data())
def test_thinning_any_prefix_leaves_the_rearrangements_that_remain_in_view(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(CONFIGS)))
    layers = data.draw(st.integers(1, 5))
    changes = data.draw(engine_changes(kind, layers))
    segments = STEPS // PER_SEGMENT
    # Up to where nothing, sums per minute, tokens per rank are kept.
    gone, minutes, ranks = sorted(data.draw(st.tuples(*[st.integers(0, segments - 1)] * 3)))
    merged = data.draw(st.booleans())
    window = data.draw(st.sampled_from([1, 6, 20, 1000]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record(root, kind, layers, changes)
        whole = rearrangements(root)
        assert_watch_agrees(root, window, whole)
        tiers = {
            Tier.GONE: range(gone),
            Tier.MINUTES: range(gone, minutes),
            Tier.RANKS: range(minutes, ranks),
        }
        thin_to(session_folders(root)[0], tiers, merged=merged)
        thinned = rearrangements(root)
        first_kept = gone * PER_SEGMENT
        in_view = [one for one in whole if one.last_step >= first_kept]
        for before, after in zip(in_view, thinned, strict=True):
            if before.first_step < first_kept:  # it began in steps that are gone
                assert after == replace(before, slots_changed=None)
            else:
                assert after == before
        assert_watch_agrees(root, window, thinned)


def test_rearrangement_that_began_in_steps_that_are_gone_is_one(tmp_path: Path) -> None:
    """With what came before it, it used to be one; without, two."""
    changes = {24: [0], 26: [1], 28: [2], 48: [0], 60: [1], 62: [2]}
    record(tmp_path, "unstated", 3, changes)
    (session,) = session_folders(tmp_path)
    assert [(r.first_step, r.last_step) for r in rearrangements(tmp_path)] == [(24, 28), (48, 62)]
    thin_to(session, {Tier.GONE: range(10)}, merged=True)  # up to step 49
    (one,) = rearrangements(tmp_path)
    assert (one.first_step, one.last_step, one.layers, one.slots_changed) == (48, 62, (0, 1, 2), None)
    (row,) = json.loads(cli("rearrangements", "--json", tmp_path).stdout)["rearrangements"]
    assert (row["first_step"], row["last_step"], row["layer_numbers"]) == (48, 62, [0, 1, 2])
    assert (row["verdict"], row["slots_moved"], row["experts_crossed_ranks"]) == ("not measured", None, None)
    assert row["reason"] == "the steps before it are no longer kept"
    assert "eplb_rearrangements_total 1.0" in cli("serve-metrics", "--once", tmp_path).stdout
    for command in (["rearrangements"], ["summary"], ["watch", "--once"]):
        shown = cli(*command, tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert "48" in shown.stdout


@pytest.mark.parametrize("tier", [Tier.RANKS, Tier.MINUTES])
def test_rearrangements_of_a_thinned_session_stay_after_a_restart(tier: Tier, tmp_path: Path) -> None:
    changes = {20: [0, 1], 40: [0, 1], 70: [0, 1]}
    record(tmp_path, "sync", 2, changes, until=60)
    first = session_folders(tmp_path)[0]
    record(tmp_path, "sync", 2, changes, first=60)
    whole = rearrangements(tmp_path)
    assert [one.first_step for one in whole] == [20, 40, 70]
    thin_to(first, {tier: range(60 // PER_SEGMENT)})
    assert rearrangements(tmp_path) == whole


@pytest.mark.parametrize("kept", [True, False])
def test_watch_says_of_a_run_without_steps_what_is_known(kept: bool, tmp_path: Path) -> None:
    record(tmp_path, "sync", 2, {20: [0, 1]} if kept else {})
    (session,) = session_folders(tmp_path)
    thin_to(session, {Tier.MINUTES: range(STEPS // PER_SEGMENT)})
    shown = cli("watch", "--once", tmp_path).stdout
    assert "no rearrangement in these steps" not in shown
    assert ("no rearrangement is known" in shown) != kept
    assert ("rearranged at step 20, 2 layers" in shown) == kept
