"""What `summary` says of where and when time was lost, next to plain loops; and a story told right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from helpers import cli, load_of, map_of, open_writer

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.metrics.losses import WINDOW_STEPS
from eplb_dump.format.schema import MANIFEST_FILE

LAYERS, RANKS, PER_RANK = 3, 4, 2
SLOTS = RANKS * PER_RANK
Array = Any


def record(folder: Path, loads: Array, changes: dict[int, Array], **options: Any) -> None:
    """``loads``: [steps, layers, slots]; ``changes``: maps by the step from which they hold."""
    with open_writer(
        folder, scope="global", ep_size=RANKS, num_logical_experts=SLOTS, segment_steps=64, **options
    ) as writer:
        placement = None
        for step, load in enumerate(loads):
            placement = changes.get(step, placement)
            phase = "prefill" if step % 5 == 0 else "decode"
            writer.record(step, load, placement, phase=phase)
            if step % 100 == 0:
                writer.flush()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """Noise; layer 1's rank 2 is slow from step 300 to 499, when a rearrangement ends it."""
    folder = tmp_path_factory.mktemp("story")
    rng = np.random.default_rng(0)
    loads = rng.poisson(50, (640, LAYERS, SLOTS))
    loads[300:500, 1, 4:6] += 100
    first = np.tile(np.arange(SLOTS), (LAYERS, 1))
    record(folder, loads, {0: first, 500: first[:, ::-1].copy()})
    return folder, loads


def test_losses_equal_plain_loops(story: tuple[Path, Array]) -> None:
    folder, loads = story
    tokens = loads.reshape(len(loads), LAYERS, RANKS, PER_RANK).sum(axis=3)
    by_rank = np.array(reference.waiting(tokens)[1], float).sum(axis=0)
    lasting = 0.0
    for low, high in ((0, 500), (500, 640)):
        for start in range(low - low % WINDOW_STEPS, high, WINDOW_STEPS):
            window = tokens[max(low, start) : min(high, start + WINDOW_STEPS)].sum(axis=0)
            lasting += float((window.max(axis=1) - window.mean(axis=1)).sum())
    loss = summarize(open_run(folder)).loss
    assert loss is not None
    assert loss.tokens == pytest.approx(by_rank.sum())
    assert {r.rank: pytest.approx(r.excess_tokens) for r in loss.ranks} == dict(enumerate(by_rank))
    assert [r.share for r in loss.ranks] == sorted((by_rank / by_rank.sum()).tolist(), reverse=True)
    assert loss.persistent_share is not None
    # The writer's segments have 64 steps, which is left out of all figures.
    assert loss.persistent_share == pytest.approx(lasting / by_rank.sum(), abs=1e-12)
    assert loss.window_steps == WINDOW_STEPS


@pytest.mark.parametrize(
    ("steps", "beyond"),
    [
        ("0-639", None),
        ("200-510", None),
        ("295-505", None),
        ("350-450", "began before the selected steps 350-450, and ended after them"),
        ("350-600", "began before the selected steps 350-600"),
        ("299-400", "ended after the selected steps 299-400"),
        ("300-300", "ended after the selected step 300"),
    ],
)
def test_incident_of_selected_steps_is_that_of_the_whole_run(
    story: tuple[Path, Array], steps: str, beyond: str | None
) -> None:
    folder, _ = story
    (whole,) = json.loads(cli("summary", "--json", folder).stdout)["incidents"]
    assert (whole["first_step"], whole["last_step"]) == (300, 499)
    (found,) = json.loads(cli("summary", "--json", "--steps", steps, folder).stdout)["incidents"]
    # A cost is measured in a sample, which differs a little.
    assert found | {"cost": None} == whole | {"cost": None}
    text = " ".join(cli("summary", "--steps", steps, folder).stdout.split())
    assert " 1 incident " in text
    assert "still in progress" not in text
    if beyond is None:
        assert "the selected step" not in text
    else:
        assert f" steps {beyond} cause " in text
    in_part = "by the times of the selected steps"
    assert (in_part in text) == (beyond is not None and found["cost"]["ms_per_step"] is not None)


@pytest.mark.parametrize("steps", ["0-299", "500-639"])
def test_steps_beside_an_incident_have_none(story: tuple[Path, Array], steps: str) -> None:
    folder, _ = story
    assert "\nno incidents in these steps\n" in cli("summary", "--steps", steps, folder).stdout
    assert "\n1 incident\n" in cli("summary", folder).stdout


def test_summary_reports_the_planted_losses(story: tuple[Path, Array]) -> None:
    folder, loads = story
    result = summarize(open_run(folder)).to_json()
    worst = result["loss"]["stretches"][0]
    assert (worst["layer"], worst["rank"]) == (1, 2)
    assert 290 <= worst["first_step"] <= 300
    assert 499 <= worst["last_step"] <= 510
    assert worst["share"] > 0.4
    assert result["loss"]["ranks"][0]["rank"] == 2
    assert result["rearrangements"] == [500]
    before, during, after = (
        [part["balancedness"] for part in result["timeline"] if low <= part["first_step"] < high]
        for low, high in ((0, 290), (300, 490), (510, 640))
    )
    assert max(during) < min(before)
    assert max(during) < min(after)
    tokens = loads.reshape(len(loads), LAYERS, RANKS, PER_RANK).sum(axis=3)
    ratio = (tokens.mean(axis=2) / tokens.max(axis=2)).mean(axis=1)
    phases = {phase["phase"]: phase for phase in result["phases"]}
    prefill = np.arange(len(loads)) % 5 == 0
    assert phases["prefill"]["steps"] == 128
    assert phases["prefill"]["balancedness"] == pytest.approx(ratio[prefill].mean())
    assert phases["decode"]["balancedness"] == pytest.approx(ratio[~prefill].mean())
    layers = [layer["balancedness"] for layer in result["layers"]]
    assert result["layer_percentiles"]["p50"] == pytest.approx(np.percentile(layers, 50))


def test_layer_of_the_incident_has_its_own_timeline(story: tuple[Path, Array]) -> None:
    folder, loads = story
    tokens = loads.reshape(len(loads), LAYERS, RANKS, PER_RANK).sum(axis=3)
    ratio = tokens[:, 1].mean(axis=1) / tokens[:, 1].max(axis=1)
    for steps in (None, (200, 510)):
        found = summarize(open_run(folder), steps).layer_timeline
        assert found is not None
        layer, bins = found
        assert layer == 1
        expected = [ratio[one.first_step : one.last_step + 1].mean() for one in bins]
        assert [one.balancedness for one in bins] == pytest.approx(expected, rel=1e-6)
        assert (bins[0].first_step, bins[-1].last_step) == (0, 639) if steps is None else (200, 509)
    text = cli("summary", folder).stdout
    assert "\nbalancedness over time, mean of 3 layers " in text
    assert "\nlayer 1 over time " in text
    assert summarize(open_run(folder), (0, 300)).layer_timeline is None
    assert "\nlayer 1 over time " not in cli("summary", "--steps", "0-299", folder).stdout


def test_random_imbalance_is_not_persistent_but_a_slow_rank_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    placement = {0: np.tile(np.arange(SLOTS), (LAYERS, 1))}
    even = rng.poisson(20, (512, LAYERS, SLOTS))
    record(tmp_path / "even", even, placement, run_id="even")
    slow = np.full((512, LAYERS, SLOTS), 20)
    slow[:, :, :2] = 60
    record(tmp_path / "slow", slow, placement, run_id="slow")
    shares = [summarize(open_run(tmp_path / name)).loss for name in ("even", "slow")]
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[0].persistent_share is not None
    assert shares[0].persistent_share < 0.2
    assert shares[1].persistent_share == 1.0


@pytest.mark.parametrize("steps", [1, 60, 95, 96, 200])
def test_few_steps_do_not_tell_what_better_placement_can_remove(tmp_path: Path, steps: int) -> None:
    """All imbalance is chance, but in one step all of it would remain."""
    even = np.random.default_rng(2).poisson(20, (steps, LAYERS, SLOTS))
    record(tmp_path, even, {0: np.tile(np.arange(SLOTS), (LAYERS, 1))})
    loss = summarize(open_run(tmp_path)).loss
    assert loss is not None
    text = " ".join(cli("summary", "--full", tmp_path).stdout.split())
    if steps < 96:
        assert loss.persistent_share is None
        too_few = f"Too few steps under one placement ({steps}; 96 are needed) to tell how much of the"
        assert text.count(f"{too_few} imbalance better placement can remove") == 2
        assert "at most" not in text
    else:
        assert loss.persistent_share is not None
        assert loss.persistent_share < 0.3
        assert "Too few steps" not in text


def test_layer_shows_its_own_balancedness_over_time(story: tuple[Path, Array]) -> None:
    folder, loads = story
    tokens = loads[:, 1].reshape(len(loads), RANKS, PER_RANK).sum(axis=2)
    ratio = tokens.mean(axis=1) / tokens.max(axis=1)
    parts = json.loads(cli("layer", "1", "--json", folder).stdout)["timeline"]
    assert (parts[0]["first_step"], parts[-1]["last_step"]) == (0, len(loads) - 1)
    for part in parts:
        mean = ratio[part["first_step"] : part["last_step"] + 1].mean()
        assert part["balancedness"] == pytest.approx(mean)
    text = cli("layer", "1", folder).stdout
    assert "balancedness over time" in text
    assert "^rearrangement" in text
    assert "balancedness over time" not in cli("layer", "1", "--step", "7", folder).stdout


def test_no_rank_is_slower_than_others_at_one_token_per_rank(tmp_path: Path) -> None:
    """Decoding a few tokens with uniform routing: several ranks share the maximum of most steps."""
    rng, ranks = np.random.default_rng(8), 16
    chosen = np.argsort(rng.random((1500, LAYERS, 4, 2 * ranks)), axis=3)[..., :4].reshape(1500, LAYERS, -1)
    loads = (chosen[..., None] == np.arange(2 * ranks)).sum(axis=2)
    with open_writer(tmp_path, num_logical_experts=2 * ranks, ep_size=ranks, scope="global") as writer:
        for step, load in enumerate(loads):
            writer.record(step, load, np.tile(np.arange(2 * ranks), (LAYERS, 1)))
            if step % 100 == 0:
                writer.flush()
    tokens = loads.reshape(1500, LAYERS, ranks, 2).sum(axis=3)
    often, cost = (np.array(each, float) for each in reference.waiting(tokens))
    found = summarize(open_run(tmp_path))
    assert found.loss is not None
    assert {r.rank: r.excess_tokens for r in found.loss.ranks} == pytest.approx(
        dict(enumerate(cost.sum(axis=0)))
    )
    for layer, expected in zip(found.layers, often, strict=True):
        assert (layer.worst_rank, layer.worst_rank_share) == (
            expected.argmax(), pytest.approx(expected.max() / expected.sum()),
        )  # fmt: skip
        assert layer.worst_rank_share < 1.3 / ranks


def test_sums_are_used_if_a_rank_missed_a_change(tmp_path: Path) -> None:
    """Hot experts from the manifest's sums equal those from the loads, also beside a late statement."""
    rng = np.random.default_rng(2)
    first = np.tile(np.arange(SLOTS), (LAYERS, 1))
    second = first[:, ::-1].copy()
    loads = rng.poisson(9, (RANKS, 40, LAYERS, SLOTS))
    for rank in range(RANKS):
        with open_writer(
            tmp_path, ep_size=RANKS, ep_rank=rank, num_logical_experts=SLOTS, scope="local"
        ) as writer:
            for step in range(40):
                if rank == 1 and 20 <= step < 30:
                    writer.skip("dummy")  # it states the new placement ten steps late
                    loads[rank, step] = 0
                else:
                    writer.record(None, loads[rank, step], first if step < 20 else second)
    logical = np.zeros((LAYERS, SLOTS))
    for step in range(40):
        for layer in range(LAYERS):
            np.add.at(
                logical[layer], (first if step < 20 else second)[layer], loads[:, step, layer].sum(axis=0)
            )
    share = logical / logical.sum(axis=1, keepdims=True)
    with_sums = summarize(open_run(tmp_path)).hot_experts
    run = open_run(tmp_path)
    assert all(s.sums is not None for session in run.sessions for s in session.segments)
    for session in run.sessions:
        for segment in session.segments:
            segment._entry = replace(segment.entry, sums=None)
    assert summarize(run).hot_experts == with_sums
    for expert in with_sums:
        assert expert.share == pytest.approx(share[expert.layer, expert.logical])
    assert with_sums[0].share == pytest.approx(share.max())


def test_steps_without_a_phase_are_counted(tmp_path: Path) -> None:
    with open_writer(tmp_path, scope="global") as writer:
        for step in range(30):
            writer.record(step, load_of(step), map_of(), phase="decode" if step < 20 else None)
    told = cli("summary", "--full", tmp_path).stdout
    assert "and 10 steps without a recorded phase" in told
    assert "without a recorded phase" not in cli("summary", "--full", "--steps", "0-19", tmp_path).stdout


def test_figures_of_the_last_configuration_are_marked(tmp_path: Path) -> None:
    """Loads of two shapes are not added, so ranks, losses and experts are of the steps since the change."""
    with open_writer(tmp_path, scope="global") as writer:
        for step in range(60):
            writer.record(step, load_of(step), map_of(), ep_size=2 if step < 40 else 4)
    told = " ".join(cli("summary", "--full", tmp_path).stdout.split())
    assert "ranks, losses and experts below cover steps 40-59" in told
    assert "how much of the imbalance better placement can remove in steps 40-59" in told
    told = " ".join(cli("advise", tmp_path).stdout.split())
    assert "recorded in steps 40-59 (" in told


def test_data_is_not_complete_if_a_manifest_does_not_list_all_files(tmp_path: Path) -> None:
    with open_writer(tmp_path, scope="global", segment_steps=10) as writer:
        for step in range(40):
            writer.record(step, load_of(step), map_of())
        assert writer.close(60)
    (manifest,) = tmp_path.rglob(MANIFEST_FILE)
    damaged = bytearray(manifest.read_bytes())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    manifest.write_bytes(damaged)
    found = json.loads(cli("summary", "--json", tmp_path).stdout)
    lost = [
        path for path in tmp_path.rglob("*.parquet") if int(path.stem[-6:]) * 10 >= found["steps"]["seen"]
    ]
    assert 0 < found["unlisted_files"] == len(lost)
    assert found["verdict"]["verdict"] == "incomplete_data"
    assert "data complete" not in (said := cli("summary", tmp_path)).stdout
    assert said.returncode == 3
    assert f"{len(lost)} files that no manifest lists are left out" in " ".join(said.stdout.split())
