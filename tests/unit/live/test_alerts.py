"""Alerts of `watch`: one for each planted incident, none without, and what a look says about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_analyze.cli.views.watch import lines
from eplb_analyze.live.alerts import BLOCK_STEPS, DepartureFinder
from eplb_analyze.live.watch import Follower, Snapshot
from eplb_dump import ExpertLoadWriter

RANKS, LAYERS, EXPERTS = 4, 5, 16
SECOND_NS = 1_000_000_000


def values(seed: int, steps: int) -> Any:
    """Balancedness of four layers that drifts slowly, with noise."""
    rng = np.random.default_rng(seed)
    drift = 0.03 * np.sin(np.arange(steps) / steps * 2 * np.pi)
    return 0.9 + drift[:, np.newaxis] + rng.normal(0, 0.02, (steps, 4))


def found(signal: Any, chunk: int = 7) -> Any:
    """The departures, if the steps come a few at a time."""
    finder, steps = DepartureFinder(), np.arange(len(signal))
    for low in range(0, len(steps), chunk):
        here = slice(low, low + chunk)
        finder.add(steps[here], steps[here] * SECOND_NS, signal[here])
    return finder.found


@pytest.mark.parametrize("seed", range(20))
def test_drift_and_noise_begin_no_alert(seed: int) -> None:
    assert found(values(seed, 2000)) == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_which_one_step_resembles_the_next_begins_no_alert(seed: int) -> None:
    """Successive steps have a correlation of 0.8, so means of 10 steps vary more than twice as much."""
    rng = np.random.default_rng(seed)
    noise = np.zeros((3000, 30))
    for step in range(1, len(noise)):
        noise[step] = 0.8 * noise[step - 1] + 0.6 * rng.normal(0, 0.04, noise.shape[1])
    assert found(0.8 + noise, 500) == []


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("length", [30, 100, 700])
def test_planted_incident_begins_and_ends_one_alert(length: int, chunk: int) -> None:
    signal = values(1, 1000)
    signal[203 : 203 + length, 2] -= 0.15
    (one,) = found(signal, chunk)
    assert {*one.signals} == {2}
    assert not one.open
    assert abs(one.first_step - 203) <= 2
    assert abs(one.last_step - (203 + length - 1)) <= 2
    assert one.first_ns == one.first_step * SECOND_NS
    inside = signal[203 : 203 + length, 2]
    moving = np.convolve(inside, np.full(BLOCK_STEPS, 1 / BLOCK_STEPS), "valid")
    assert moving.min() <= one.lowest[2] <= inside.mean() + 1e-12


def test_layers_that_depart_together_are_one_alert_and_later_ones_another() -> None:
    signal = values(2, 1000)
    signal[300:400, :3] -= 0.2
    signal[600:, 3] -= 0.2
    first, second = found(signal)
    assert ({*first.signals}, first.open) == ({0, 1, 2}, set())
    assert ({*second.signals}, second.open, second.last_step) == ({3}, {3}, None)


def test_noise_makes_a_departure_less_remarkable() -> None:
    """A fall by 0.1 is less than twice the standard deviation of single steps."""
    rng = np.random.default_rng(3)
    signal = 0.7 + rng.normal(0, 0.08, (1000, 4))
    signal[500:, 0] -= 0.1
    assert found(signal) == []


def test_layer_without_tokens_in_some_steps_is_judged_by_the_others() -> None:
    signal = values(4, 600)
    signal[::3, 1] = np.nan
    signal[:, 2] = np.nan
    signal[300:, 1] -= 0.2
    (one,) = found(signal)
    assert {*one.signals} == {1}
    assert abs(one.first_step - 300) <= 2


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
    """Expert 6 of layer 3, on rank 1, has 6 times the tokens in steps 150 to 249."""
    rng = np.random.default_rng(5)
    mean = np.full((360, LAYERS, EXPERTS), 100.0)
    mean[150:250, 3, 6] = 600
    return record(tmp_path_factory.mktemp("dump"), rng.poisson(mean), None, range(39, 360, 20))


def test_alert_names_layer_rank_and_expert_and_ends(looks: list[Snapshot]) -> None:
    quiet = [look for look in looks if (look.last_step or 0) < 150]
    lasting = [look for look in looks if 180 <= (look.last_step or 0) < 250]
    assert [look.alerts for look in quiet] == [[]] * len(quiet)
    for look in lasting:
        (alert,) = look.alerts
        assert (alert.layers, alert.ranks, alert.last_step, alert.until) == ((3,), (1,), None, None)
        assert abs(alert.first_step - 150) <= 2
        assert alert.peak_imbalance == pytest.approx(900 / (2100 / 4), abs=0.1)
        assert alert.usual_imbalance == pytest.approx(1.05, abs=0.05)
    named = lasting[-1].alerts[0]
    assert (named.expert, named.replicas) == (6, 1)
    assert named.from_times_mean == pytest.approx(1, abs=0.1)
    assert named.to_times_mean == pytest.approx(600 / (2100 / 16), abs=0.2)
    (ended,) = looks[-1].alerts
    assert ended.last_step is not None
    assert abs(ended.last_step - 249) <= 2
    assert ended.expert == 6
    assert ended.until is not None
    assert ended.since <= ended.until


@pytest.mark.parametrize("width", [80, 160])
def test_view_fits_and_shows_the_alert_and_the_hot_expert(looks: list[Snapshot], width: int) -> None:
    lasting = next(look for look in looks if (look.last_step or 0) >= 219)
    shown = text(lasting, width)
    assert max(map(len, shown)) <= width
    joined = " ".join(" ".join(shown).split())
    since = lasting.alerts[0].since[11:19]
    step = lasting.alerts[0].first_step
    assert f"! INCIDENT since {since}, step {step}: layer 3, rank 1 at 1.7x the mean, usually 1.1x;" in joined
    assert "expert 6 rose from 1.0x to 4." in joined
    assert "layer 3 expert 6" in joined if width == 80 else "hot experts" in joined
    joined = " ".join(" ".join(text(looks[-1], width)).split())
    assert f"incident {since}, step {step}, ended " in joined
    assert "INCIDENT" not in joined


def test_hot_experts_are_the_sums_of_the_steps_in_the_window(looks: list[Snapshot]) -> None:
    look = next(look for look in looks if look.last_step == 239)
    (hot,) = look.hot_experts
    assert look.expert_steps == 240
    assert (hot.layer, hot.expert, hot.replicas) == (3, 6, 1)
    tokens = 150 * 100 + 90 * 600
    assert hot.times_mean == pytest.approx(tokens / ((tokens + 15 * 240 * 100) / 16), rel=0.02)


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


def test_block_is_short() -> None:
    """An alert must begin soon, also in an engine with one step per second."""
    assert BLOCK_STEPS <= 10
