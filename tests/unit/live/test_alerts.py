"""Alerts of `watch`: the incidents that `summary` finds in the same steps, and what a look shows of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_replay import replay
from planted_incidents import PlantedRun, make_run

from eplb_analyze.analysis.incident_finder import find_incidents
from eplb_analyze.analysis.incidents import Incident
from eplb_analyze.cli.views.watch import lines
from eplb_analyze.live.alerts import HISTORY
from eplb_analyze.live.snapshot import Snapshot
from eplb_analyze.live.watch import Follower
from eplb_analyze.metrics.contrasts import SLOW_FROM
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory
from eplb_dump import ExpertLoadWriter

RANKS, LAYERS, EXPERTS = 4, 5, 16
#: Steps until there is an alert: 40 that tell a step from a slope, and those between two looks.
DELAY, STEPS_PER_LOOK = 40, 20


def about(incident: Incident) -> tuple[object, ...]:
    return incident.layers, incident.first_step, incident.last_step, incident.cause.kind


def hot(steps: int, first: int, end: int, times: float = 5.0, seed: int = 0) -> PlantedRun:
    """Expert 6 of layer 3, on rank 1, has so many times the tokens of others in some steps."""
    rng = np.random.default_rng(seed)
    mean = np.full((steps, LAYERS, EXPERTS), 100.0)
    mean[first:end, 3, 6] *= times
    placement = np.arange(EXPERTS, dtype=np.int32)
    history = LayerHistory()
    history.insert(0, RANKS, placement)
    layers = dict.fromkeys(range(LAYERS), history)
    load = rng.poisson(mean).astype(np.int32)
    return PlantedRun(load, RANKS, EXPERTS, PlacementHistory(layers, [], []), [])


@pytest.mark.parametrize("cause", ["expert_hot", "rearrangement", "uneven_replicas", "few_tokens", None])
@pytest.mark.parametrize("seed", [1, 2])
def test_one_look_gives_the_incidents_of_summary(cause: str | None, seed: int) -> None:
    """In runs that are not longer than what is kept, and whose incidents are among the newest four."""
    run = make_run(3000 + seed, () if cause is None else (cause,), steps=900, cells=300_000)
    ((_, alerts),) = replay(run, 900)
    expected = [
        one for one in find_incidents(run.series(), run).found if one.last_step - one.first_step >= 40
    ]
    assert {about(one) for one in expected[-4:]} <= {about(one) for one in alerts}
    assert len(alerts) <= len(find_incidents(run.series(), run).found)


@pytest.mark.parametrize("steps_per_look", [1, 7, STEPS_PER_LOOK])
def test_planted_incident_is_one_alert_that_begins_soon_and_ends_soon(steps_per_look: int) -> None:
    run, first, end = hot(1100, 700, 900), 700, 900
    began = ended = None
    for steps, alerts in replay(run, steps_per_look):
        if not alerts:
            assert began is None
            continue
        (alert,) = alerts
        assert (alert.layers, alert.ranks, alert.first_step) == ((3,), (1,), first)
        assert (alert.cause.kind, alert.cause.expert) == ("expert_hot", 6)
        began = steps if began is None else began
        if alert.lasts:
            assert ended is None
            assert (alert.last_step, alert.ended_by) == (steps - 1, None)
        elif ended is None:
            ended = steps
    assert began is not None
    assert first + DELAY <= began <= first + DELAY + steps_per_look
    assert ended is not None
    assert ended <= end + DELAY + steps_per_look
    assert not alert.lasts
    assert (alert.last_step, alert.ended_by and alert.ended_by.kind) == (end - 1, "traffic")
    assert [about(one) for one in find_incidents(run.series(), run).found] == [about(alert)]


def test_short_incident_is_an_alert_once_it_has_ended() -> None:
    run = hot(1000, 700, 718, times=8)
    seen = [alerts for _, alerts in replay(run, 5)]
    assert all(not alert.lasts for alerts in seen for alert in alerts)
    assert [about(one) for one in seen[-1]] == [((3,), 700, 717, "expert_hot")]


def test_incident_that_is_longer_than_what_is_kept_stays_one_alert_and_ends() -> None:
    first, end = 700, 900 + 2 * HISTORY
    run = hot(end + 400, first, end)
    seen = dict(replay(run, 50))
    for steps, alerts in seen.items():
        if first + DELAY + 50 <= steps < end:
            assert [(one.first_step, one.lasts, one.cause.expert) for one in alerts] == [(first, True, 6)]
    (alert,) = seen[len(run.load)] if len(run.load) in seen else [*seen.values()][-1]
    assert not alert.lasts
    assert alert.first_step == first
    assert abs(alert.last_step - (end - 1)) <= 5


@pytest.mark.parametrize("seed", range(2000, 2008))
def test_clean_run_raises_no_alert(seed: int) -> None:
    """None of 94 such runs with other seeds did. An alert is right if ``summary`` has an incident, too."""
    run = make_run(seed, steps=800, cells=250_000)
    raised = [alerts for _, alerts in replay(run, STEPS_PER_LOOK) if alerts]
    assert raised == [] or find_incidents(run.series(), run).found != []


def test_planted_runs_raise_the_alerts_that_summary_reports() -> None:
    """Each incident that summary finds and that lasted for so long was an alert while the run was written."""
    found = agreed = 0
    for seed in range(4000, 4006):
        run = make_run(seed, ("expert_hot", "few_tokens"), steps=1500, cells=400_000)
        ever = [alert for _, alerts in replay(run, STEPS_PER_LOOK) for alert in alerts]
        for one in find_incidents(run.series(), run).found:
            found += 1
            agreed += any(
                {*alert.layers} & {*one.layers} and abs(alert.first_step - one.first_step) <= STEPS_PER_LOOK
                for alert in ever
            )
    assert found >= 4
    assert agreed >= found - 1


def test_there_is_no_alert_before_the_usual_variation_is_known() -> None:
    """A few hundred steps of a restless engine look like departures."""
    run = hot(800, 200, 400)
    seen = dict(replay(run, STEPS_PER_LOOK))
    assert all(not alerts for steps, alerts in seen.items() if steps < SLOW_FROM)
    assert [about(one) for one in seen[800]] == [((3,), 200, 399, "expert_hot")]


def test_sums_of_ranks_show_the_incident_but_not_its_cause() -> None:
    run = hot(1100, 700, 900)
    *_, (_, alerts) = replay(run, STEPS_PER_LOOK, by_rank=True)
    (alert,) = alerts
    assert (alert.layers, alert.ranks, alert.cause.kind, alert.cause.expert) == ((3,), (1,), "unknown", None)
    assert (alert.first_step, alert.last_step) == (700, 899)


@pytest.mark.parametrize("named", [True, False])
def test_phases_are_not_compared_with_each_other(named: bool) -> None:
    """A long prefill with few tokens is no departure from the balance of decode, if the phases are named."""
    run = hot(900, 0, 0)
    rng = np.random.default_rng(1)
    prefill = np.zeros(900, np.bool_)
    for first in (100, 250, 420, 600, 800):
        prefill[first : first + 60] = True
    run.load[prefill] = rng.poisson(25, run.load[prefill].shape)
    phases = ["prefill" if own else "decode" for own in prefill] if named else None
    seen = [alert for _, alerts in replay(run, STEPS_PER_LOOK, phases=phases) for alert in alerts]
    assert bool(seen) is not named


def record(root: Path, loads: Any, follower: Follower | None, looks: range) -> list[Snapshot]:
    """Ranks write equal parts of the loads ``[steps, layers, experts]``; looks are after some steps."""
    placement = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    options: dict[str, Any] = {"model": "m", "num_logical_experts": EXPERTS, "ep_size": RANKS, "run_id": "r"}
    writers = [ExpertLoadWriter(root, ep_rank=rank, **options) for rank in range(RANKS)]
    seen = []
    for step, load in enumerate(loads):
        for rank, writer in enumerate(writers):
            writer.record(step, load // RANKS + (rank < load % RANKS), placement)
        if step in looks:
            assert all(writer.flush(60) for writer in writers)
            follower = follower or Follower(root, window=400)
            seen.append(follower.look())
    for writer in writers:
        writer.close()
    return seen


def text(look: Snapshot, width: int) -> list[str]:
    return [str(line) for line in lines(replace(look, quiet_seconds=0.0), width)]


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    """Expert 6 of layer 3, on rank 1, has 6 times the tokens in steps 650 to 749."""
    rng = np.random.default_rng(5)
    mean = np.full((860, LAYERS, EXPERTS), 100.0)
    mean[650:750, 3, 6] = 600
    return record(tmp_path_factory.mktemp("dump"), rng.poisson(mean), None, range(39, 860, 20))


def test_alert_names_layer_rank_and_expert_and_ends(looks: list[Snapshot]) -> None:
    quiet = [look for look in looks if (look.last_step or 0) < 650]
    lasting = [look for look in looks if 650 + DELAY <= (look.last_step or 0) < 750]
    assert [look.alerts for look in quiet] == [[]] * len(quiet)
    for look in lasting:
        (alert,) = look.alerts
        assert (alert.layers, alert.ranks, alert.first_step, alert.lasts) == ((3,), (1,), 650, True)
        assert alert.last_step == look.last_step
        assert alert.peak_imbalance == pytest.approx(900 / (2100 / 4), abs=0.1)
        assert alert.usual_imbalance == pytest.approx(1.05, abs=0.05)
        cause = alert.cause
        assert (cause.kind, cause.layer, cause.expert, cause.replicas) == ("expert_hot", 3, 6, 1)
        assert cause.from_times_mean == pytest.approx(1, abs=0.1)
        assert cause.to_times_mean == pytest.approx(600 / (2100 / 16), abs=0.2)
    (ended,) = looks[-1].alerts
    assert (ended.first_step, ended.last_step, ended.lasts, ended.cause.expert) == (650, 749, False, 6)
    assert ended.since is not None
    assert ended.until is not None
    assert ended.since <= ended.until
    document = looks[-1].to_json()["alerts"][0]
    assert document["cause"]["kind"] == "expert_hot"
    assert document["lasts"] is False


@pytest.mark.parametrize("width", [80, 160])
def test_view_fits_and_shows_the_alert_and_the_hot_expert(looks: list[Snapshot], width: int) -> None:
    lasting = next(look for look in looks if (look.last_step or 0) >= 719)
    shown = text(lasting, width)
    assert max(map(len, shown)) <= width
    joined = " ".join(" ".join(shown).split())
    (alert,) = lasting.alerts
    since = (alert.since or "")[11:19]
    size = f"{alert.peak_imbalance:.1f}x the mean, usually {alert.usual_imbalance:.1f}x"
    assert f"! INCIDENT since {since}, step 650: layer 3, rank 1 at {size}; expert 6" in joined
    assert "expert 6 rose from 1.0x to 4." in joined
    assert "x the mean load and had 1 replica" in joined
    assert "layer 3 expert 6" in joined if width == 80 else "hot experts" in joined
    joined = " ".join(" ".join(text(looks[-1], width)).split())
    until = (looks[-1].alerts[0].until or "")[11:19]
    assert f"incident {since}-{until}, steps 650-749: layer 3, rank 1" in joined
    assert "INCIDENT" not in joined


def test_hot_experts_are_the_sums_of_the_steps_in_the_window(looks: list[Snapshot]) -> None:
    look = next(look for look in looks if look.last_step == 739)
    (hot,) = look.hot_experts
    assert look.expert_steps == 400
    assert (hot.layer, hot.expert, hot.replicas) == (3, 6, 1)
    tokens = 310 * 100 + 90 * 600
    assert hot.times_mean == pytest.approx(tokens / ((tokens + 15 * 400 * 100) / 16), rel=0.02)


def test_recent_figures_are_those_of_the_last_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no second to look back, only the newest step is recent."""
    monkeypatch.setattr("eplb_analyze.live.window.CLOCK_SECONDS", 0.0)
    loads = np.full((30, LAYERS, EXPERTS), 100)
    loads[-1, :, 0] = 500
    look = record(tmp_path, loads, None, range(29, 30))[-1]
    assert look.recent is not None
    assert (look.recent.first_step, look.recent.last_step, look.recent.complete) == (29, 29, 1)
    assert look.recent.balancedness == pytest.approx(2000 / 4 / 800)
    assert look.balancedness.mean == pytest.approx((29 + 2000 / 4 / 800) / 30)
    assert look.recent.ranks[0].times_mean == pytest.approx(800 / 500)
    assert (look.hot_experts[0].expert, look.hot_experts[0].recent_times_mean) == (
        0,
        pytest.approx(5 * 16 / 20),
    )
