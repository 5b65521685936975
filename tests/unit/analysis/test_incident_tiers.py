"""Incidents are the same in whatever steps experts' loads are kept, if tokens per EP rank are."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from planted_incidents import PlantedRun, place
from recorded_incidents import record
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory
from eplb_analyze.transfer.compact import compact_run
from eplb_dump.format.schema import Tier

STEPS, SEGMENT, RANKS, EXPERTS, SLOTS = 1000, 100, 4, 16, 20
SEGMENTS = STEPS // SEGMENT
#: EPLB is asynchronous: it changes one layer every so many steps.
LAYERS, EVERY, APART = 4, 260, 8
#: An expert of layer 1 is hot until EPLB gives it replicas, and in all layers a topic comes and goes.
HOT, TOPIC = 400, range(640, 750)


def planted() -> PlantedRun:
    rng = np.random.default_rng(1)
    base = np.exp(0.5 * rng.standard_normal((LAYERS, EXPERTS)))
    topic = np.exp(0.9 * rng.standard_normal((LAYERS, EXPERTS)))

    def popularity(step: int) -> Any:
        share = base * topic if step in TOPIC else base.copy()
        if step >= HOT:
            share[1, 5] = 0.3 * share[1].sum()
        return share / share.sum(axis=1, keepdims=True)

    histories = [LayerHistory() for _ in range(LAYERS)]
    for layer, history in enumerate(histories):
        history.insert(0, RANKS, place(popularity(0)[layer], RANKS, SLOTS))
        for step in range(EVERY, STEPS, EVERY):
            now = step + APART * layer
            history.insert(now, RANKS, place(popularity(now - 1)[layer], RANKS, SLOTS))
    load = np.empty((STEPS, LAYERS, SLOTS), np.int32)
    for step in range(STEPS):
        share = popularity(step)
        for layer, history in enumerate(histories):
            slots = history.at(step)
            assert slots is not None
            weight = (share[layer] / np.bincount(slots, minlength=EXPERTS))[slots]
            load[step, layer] = rng.poisson(4000 * weight)
    return PlantedRun(load, RANKS, EXPERTS, PlacementHistory(dict(enumerate(histories)), [], []), [])


@pytest.fixture(scope="module", params=["local", "merged"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank recorded what it sent; or likewise, and then the ranks were merged."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "local":
            record(planted(), root, patch, local=True, segment_steps=SEGMENT)
            return root
        patch.setattr("eplb_analyze.transfer.compact.SEGMENT_STEPS", SEGMENT)
        source = tmp_path_factory.mktemp("source")
        record(planted(), source, patch, local=True)
        compact_run(source, root)
    return root


@pytest.fixture(scope="module")
def truth(whole: Path) -> list[Incident]:
    return summarize(open_run(whole)).incidents


def edges(incident: Incident) -> Any:
    own = incident
    return own.layers, own.ranks, own.first_step, own.last_step, own.usual_imbalance, own.peak_imbalance


def test_recording_has_the_planted_incidents(truth: list[Incident]) -> None:
    hot, topic = truth
    ends = 2 * EVERY + APART
    assert (hot.layers, hot.first_step, hot.last_step) == ((1,), HOT, ends - 1)
    assert (hot.cause.kind, hot.cause.expert) == ("expert_hot", 5)
    assert hot.ended_by is not None
    assert (hot.ended_by.kind, hot.ended_by.step) == ("rearrangement", ends)
    assert (topic.first_step, topic.last_step) == (TOPIC.start, TOPIC.stop - 1)
    assert topic.cause.kind == "traffic_shift"


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, SEGMENTS - 1)))
@example({*range(SEGMENTS)})
@example({*range(4)})
@example({*range(5)})
@example({*range(6)})
@example({5, 7})
@example({*range(0, SEGMENTS, 2)})
def test_incidents_are_the_same_wherever_experts_loads_are_kept(
    whole: Path, truth: list[Incident], thinned: set[int]
) -> None:
    """Their cause and what ended them can be unknown, but not another one."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(whole, Path(folder) / "thinned"))
        for session in session_folders(root):
            thin_to(session, {Tier.RANKS: thinned})
        found = summarize(open_run(root)).incidents
    assert [edges(one) for one in found] == [edges(one) for one in truth]
    for one, true in zip(found, truth, strict=True):
        assert one.cause.kind in (true.cause.kind, "loads_retired")
        assert one.cause.expert in (true.cause.expert, None)
        if one.ended_by is not None:
            assert true.ended_by is not None
            assert (one.ended_by.kind, one.ended_by.step) == (true.ended_by.kind, true.ended_by.step)
