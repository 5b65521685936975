"""Figures of steps of which only tokens per EP rank are kept: what they show, and what they cannot tell."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import START_NS, steady_clock
from helpers import cli, open_writer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.incidents import Cause
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.layer_loads import LOADS_NEAR
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.minutes import MINUTE_NS
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


def edges(incident: Any) -> Any:
    own = incident
    return own.layers, own.ranks, own.first_step, own.last_step, own.ended_by, own.peak_imbalance


def test_incident_is_found_without_experts_loads_and_its_cause_is_not_known(
    whole: Path, ranks_only: Path
) -> None:
    (truth,) = summarize(open_run(whole)).incidents
    assert (truth.first_step, truth.last_step, truth.layer) == (HOT.start, HOT.stop - 1, 1)
    assert (truth.cause.kind, truth.cause.expert) == ("expert_hot", 3)
    (found,) = summarize(open_run(ranks_only)).incidents
    assert edges(found) == edges(truth)
    assert found.cause == Cause("loads_retired")
    assert found.cost.ms_per_step is None
    assert found.cost.tokens_per_step == pytest.approx(truth.cost.tokens_per_step, rel=0.02)
    for steps in ([], ["--steps", "300-639"]):
        text = " ".join(cli("summary", *steps, ranks_only).stdout.split())
        assert f"steps {HOT.start}-{HOT.stop - 1}: layer 1, rank 1 at" in text
        assert "not known: experts' loads are no longer kept around its beginning" in text
        assert f"layer 1 --steps {HOT.start}-{HOT.stop - 1}" in text
        assert "The cost of imbalance is not known: it needs experts' loads" in text
        for wrong in ("no incidents", "does not explain", "fewer than", "expert 3", "looked for only"):
            assert wrong not in text
        document = json.loads(cli("summary", "--json", *steps, ranks_only).stdout)
        assert (document["searched"], document["cost_steps"]) == (None, [])
        assert document["verdict"]["verdict"] != "balanced"


@pytest.mark.parametrize("segments", range(1, STEPS // SEGMENT + 1))
@pytest.mark.parametrize("tier", [Tier.RANKS, Tier.MINUTES, Tier.GONE])
def test_incident_has_the_same_edges_wherever_the_tiers_change(
    segments: int, tier: Tier, whole: Path, tmp_path: Path
) -> None:
    """Or it is not known, if its beginning is not kept; and nothing else is reported."""
    (truth,) = summarize(open_run(whole)).incidents
    root = Path(shutil.copytree(whole, tmp_path / "thinned"))
    thin_to(session_folders(root)[0], {tier: range(segments)})
    kept_from = segments * SEGMENT
    if tier is not Tier.RANKS and kept_from == STEPS:
        return
    summary = summarize(open_run(root))
    if tier is not Tier.RANKS:
        assert summary.searched == [(kept_from, STEPS)]
        if kept_from > HOT.start:
            assert summary.incidents == []
            return
    (found,) = summary.incidents
    assert edges(found)[:-1] == edges(truth)[:-1]
    known = tier is not Tier.RANKS or kept_from + LOADS_NEAR <= HOT.start
    assert (found.cause.kind, found.cause.expert) == (("expert_hot", 3) if known else ("loads_retired", None))


def test_incident_does_not_span_steps_that_are_not_kept(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "hole"))
    thin_to(session_folders(root)[0], {Tier.GONE: [0], Tier.MINUTES: [4], Tier.RANKS: [1, 2, 3]})
    summary = summarize(open_run(root))
    assert summary.searched == [(SEGMENT, 4 * SEGMENT), (5 * SEGMENT, STEPS)]
    (found,) = summary.incidents
    assert (found.first_step, found.last_step, found.ended_by) == (HOT.start, 4 * SEGMENT - 1, None)
    assert found.cause.kind == "loads_retired"
    text = " ".join(cli("summary", root).stdout.split())
    assert f"still in progress at step {4 * SEGMENT - 1} (" in text
    searched = STEPS - 2 * SEGMENT
    assert f"incidents are looked for only in {searched} steps of steps {SEGMENT}-{STEPS - 1}" in text


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*Tier]), min_size=STEPS // SEGMENT, max_size=STEPS // SEGMENT))
def test_incidents_are_parts_of_the_truth_whatever_is_kept(whole: Path, tiers: list[Tier]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(whole, Path(folder) / "thinned"))
        for tier in (Tier.RANKS, Tier.MINUTES, Tier.GONE):
            thin_to(session_folders(root)[0], {tier: [n for n, own in enumerate(tiers) if own is tier]})
        run = open_run(root)
        kept = [n for n, own in enumerate(tiers) if own in (Tier.FULL, Tier.RANKS)]
        if not kept:
            return
        summary = summarize(run)
        stretches = [StepRange(0, STEPS)] if summary.searched is None else summary.searched
        assert sum(part.end - part.first for part in stretches) == len(kept) * SEGMENT
        for part in stretches:
            assert {*range(part.first // SEGMENT, part.end // SEGMENT)} <= {*kept}
        for one in summary.incidents:
            assert any(part.first <= one.first_step and one.last_step < part.end for part in stretches)
            assert (one.layers, one.ranks) == ((1,), (1,))
            assert HOT.start - 2 <= one.first_step
            assert one.last_step <= HOT.stop + 1
            around = {(one.first_step + step) // SEGMENT for step in (-LOADS_NEAR, LOADS_NEAR)}
            known = all(tiers[n] is Tier.FULL for n in around)
            assert one.cause.expert == (3 if known else None)


def test_conclusion_comes_before_what_is_left_out(older_ranks: Path) -> None:
    shown = cli("summary", older_ranks).stdout
    assert shown.index("balancedness 0.") < shown.index("Left out of hot experts") < shown.index("1 incident")


def test_tables_and_traces_show_the_incident_without_its_cause(
    whole: Path, ranks_only: Path, tmp_path: Path
) -> None:
    (row,) = json.loads(cli("postmortem", ranks_only, "--json").stdout)["runs"]
    assert (row["incidents"], row["lost_rank_seconds"]) == (1, None)
    text = " ".join(cli("compare", whole, ranks_only).stdout.split())
    assert "incident in A: " in text
    assert "incident in B: " in text
    assert "routing not compared: experts' loads are no longer kept in B" in text
    document = json.loads(cli("export", "trace", "-o", tmp_path / "t.json", "--json", ranks_only).stdout)
    assert document["incidents"] == 1


def test_cost_that_was_measured_in_a_part_is_said_of_this_part(older_ranks: Path) -> None:
    found = summarize(open_run(older_ranks))
    first = STEPS - 2 * SEGMENT
    assert (found.searched, found.cost_steps) == (None, [(first, STEPS)])
    assert found.lost_rank_seconds is None
    assert found.cost.ms_per_step is not None
    text = " ".join(cli("summary", older_ranks).stdout.split())
    assert f"The cost covers only steps {first}-{STEPS - 1}" in text
    for wrong in ("no incidents", "does not explain", "large part of the step time"):
        assert wrong not in text
    kept = cli("summary", "--steps", f"{first}-", older_ranks).stdout
    assert "no incidents in these steps" in kept


# ---- layer


@pytest.mark.parametrize("selected", [{"step": 400}, {"steps": (290, 300)}, {}])
def test_layer_of_tokens_per_rank_has_the_same_ranks(
    whole: Path, ranks_only: Path, selected: dict[str, Any]
) -> None:
    exact, found = (layer_report(open_run(path), 1, **selected) for path in (whole, ranks_only))
    assert (exact.tier, found.tier) == ("full", "ranks")
    for name in ("first_step", "last_step", "steps", "balancedness", "imbalance", "idle_fraction", "ranks"):
        assert getattr(found, name) == getattr(exact, name), name
    assert found.timeline == exact.timeline
    assert (found.slots, found.experts, found.active_experts) == ([], [], None)
    assert "experts are not known any more" in found.notes[0]


def test_layer_prefers_the_steps_that_have_experts_loads(older_ranks: Path) -> None:
    last = STEPS - 2 * SEGMENT
    report = layer_report(open_run(older_ranks), 1, steps=(last - 50, last + 50))
    assert (report.tier, report.first_step, report.last_step) == ("full", last, last + 49)
    assert layer_report(open_run(older_ranks), 1, step=last - 1).tier == "ranks"


def test_layer_of_minutes_has_the_means_of_its_steps(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "minutes"))
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(STEPS // SEGMENT)})
    exact, found = layer_report(open_run(whole), 1), layer_report(open_run(root), 1)
    assert (found.tier, found.steps) == ("minutes", STEPS)
    assert found.ranks == exact.ranks
    for name in ("balancedness", "imbalance", "idle_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-12), name
    assert found.minutes is not None
    assert found.minutes.summed_balancedness is None
    true = {expert.logical: expert for expert in exact.experts}
    hot = found.minutes.hot_experts
    assert hot[0].logical == 3
    assert all(0 < one.share <= true[one.logical].share for one in hot)
    # Each row, of a minute and segment, names its four slots with the most tokens.
    tokens, named = loads()[:, 1], np.zeros(LOGICAL)
    rows = (START_NS + (np.arange(STEPS) + 2) * 400 * 10**6) // MINUTE_NS * STEPS + np.arange(
        STEPS
    ) // SEGMENT
    for row in np.unique(rows):
        of_slots = tokens[rows == row].sum(axis=0)
        for slot in np.argsort(-of_slots)[:4]:
            named[slot % LOGICAL] += of_slots[slot]
    assert {one.logical: one.share for one in hot} == pytest.approx(
        {e: named[e] / tokens.sum() for e in range(LOGICAL) if named[e] > tokens.sum() / LOGICAL}
    )
    # The whole minute of a step.
    one = layer_report(open_run(root), 1, step=400)
    assert one.minutes is not None
    assert one.minutes.minutes == 1
    assert one.first_step <= 400 <= one.last_step
    assert one.steps == one.last_step + 1 - one.first_step
    of_minute = layer_report(open_run(whole), 1, steps=(one.first_step, one.last_step + 1))
    assert one.ranks == of_minute.ranks
    assert one.balancedness == pytest.approx(of_minute.balancedness, rel=1e-12)
    printed = cli("layer", "1", "--step", "400", root)
    assert printed.returncode == 0
    assert "step 400 is kept only in per-minute sums: figures cover its minute" in " ".join(
        printed.stdout.split()
    )
    assert "with at least these tokens" in printed.stdout


# ---- hot experts


def test_hot_experts_without_loads_are_those_of_minutes(whole: Path, ranks_only: Path) -> None:
    exact, found = (summarize(open_run(path)) for path in (whole, ranks_only))
    assert (exact.hot_experts_tier, found.hot_experts_tier) == ("full", "minutes")
    assert found.hot_experts == summarize(open_run(whole), tier="minutes").hot_experts
    true = {(one.layer, one.logical): one.share for one in exact.hot_experts}
    assert [(one.layer, one.logical) for one in found.hot_experts][:1] == [(1, 3)]
    for one in found.hot_experts:
        assert one.times_mean > 1
        assert one.share <= true[one.layer, one.logical] * (1 + 1e-12)
    printed = cli("summary", "--full", ranks_only).stdout
    assert "with at least these tokens" in printed
    assert "Left out of the cost of imbalance" in printed


def test_hot_experts_if_a_rank_was_idle_over_a_segment(tmp_path: Path) -> None:
    """The rank's sums of this segment name no slots, and those of the other rank in the same minute do."""
    load = np.arange(1, 9).reshape(1, 8) * 100
    for rank in range(2):
        with (
            steady_clock(10),
            open_writer(tmp_path, ep_size=2, ep_rank=rank, num_logical_experts=8, segment_steps=50) as writer,
        ):
            for step in range(100):
                if rank == 1 and step >= 50:
                    writer.skip("dummy")
                else:
                    writer.record(step, load, np.arange(8).reshape(1, 8))
            assert writer.flush(60)
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.RANKS: [0, 1]})
    found = summarize(open_run(tmp_path)).hot_experts
    assert [one.logical for one in found] == [7, 6, 5, 4]


def test_hot_experts_of_ranks_that_write_their_own_loads(tmp_path: Path) -> None:
    """Each rank's minutes name the slots with the most of its own tokens, which add up."""
    parts = np.random.default_rng(6).multinomial(loads()[:400], [0.4, 0.3, 0.2, 0.1])
    placement = np.tile(np.arange(SLOTS) % LOGICAL, (LAYERS, 1))
    for rank in range(RANKS):
        with (
            steady_clock(400),
            open_writer(
                tmp_path, ep_size=RANKS, ep_rank=rank, num_logical_experts=LOGICAL, segment_steps=SEGMENT
            ) as writer,
        ):
            for step, load in enumerate(parts[..., rank]):
                writer.record(step, load, placement)
                if step % 100 == 0:
                    assert writer.flush(60)
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.RANKS: range(-(-400 // SEGMENT))})
    found = summarize(open_run(tmp_path))
    assert found.hot_experts_tier == "minutes"
    named = np.zeros((LAYERS, LOGICAL))
    rows = (START_NS + (np.arange(400) + 2) * 400 * 10**6) // MINUTE_NS * STEPS + np.arange(400) // SEGMENT
    for row in np.unique(rows):
        of_ranks = parts[rows == row].sum(axis=0)  # [LAYERS, SLOTS, RANKS]
        for rank in range(RANKS):
            for layer in range(LAYERS):
                for slot in np.argsort(-of_ranks[layer, :, rank], kind="stable")[:4]:
                    named[layer, slot % LOGICAL] += of_ranks[layer, slot, rank]
    share = named / parts.sum(axis=(0, 2, 3))[:, np.newaxis]
    assert {(one.layer, one.logical): one.share for one in found.hot_experts} == pytest.approx(
        {(i, e): share[i, e] for i, e in np.argwhere(share * LOGICAL > 1).tolist()}
    )
