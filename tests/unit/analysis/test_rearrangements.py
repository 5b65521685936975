"""`rearrangements`: its figures against plain loops, its intervals against the truth, its text and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import PlantedClock
from helpers import cli, one_error, without_times
from planted import record_engine, slowest_work
from reference import per_step

from eplb_analyze import open_run
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.rearrangements import RearrangementFigures, _Fold, rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import Ratio
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import milliseconds, plural
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.journal import Shape

LOGICAL, EP_SIZE, SLOTS = 8, 4, 12

#: Experts 0 and 1 are hot: together on one rank, or with a replica on every other rank.
TOGETHER = [0, 1, 4, 2, 3, 4, 5, 6, 4, 7, 5, 6]
APART = [0, 4, 5, 1, 6, 7, 0, 2, 4, 1, 3, 5]
#: As APART, with the slots of a rank in another order.
SHUFFLED = [5, 0, 4, 7, 1, 6, 4, 0, 2, 3, 1, 5]
HOT = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]


def even(logical: Any, slots: list[int]) -> Any:
    """Logical loads ``[layers, experts]`` split over the replicas of a placement, as evenly as ints can."""
    out = np.zeros((len(logical), len(slots)), np.int64)
    for layer, row in enumerate(logical):
        for expert, tokens in enumerate(row):
            places = [p for p, e in enumerate(slots) if e == expert]
            for i, p in enumerate(places):
                out[layer, p] = tokens // len(places) + (i < tokens % len(places))
    return out


def write(
    root: Path,
    loads: Any,
    placements: Any,
    *,
    ranks: int = EP_SIZE,
    skipped: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    """``loads [steps, layers, slots]``, split over ``ranks`` writers; with 0 one writes global sums."""
    rng = np.random.default_rng(3)
    defaults: dict[str, Any] = {
        "model": "org/moe", "num_logical_experts": LOGICAL, "ep_size": EP_SIZE, "run_id": "r",
        "segment_steps": 64, "ranks_per_node": 2,
    }  # fmt: skip
    parts = [rng.multinomial(load.ravel(), [1 / max(1, ranks)] * max(1, ranks)) for load in loads]
    for rank in range(max(1, ranks)):
        scope = "local" if ranks else "global"
        with ExpertLoadWriter(root, ep_rank=rank, scope=scope, **{**defaults, **options}) as writer:
            for step, load in enumerate(loads):
                if rank == 1 and step in skipped:
                    continue
                part = parts[step][:, rank].reshape(load.shape)
                writer.record(step, part, np.asarray(placements(step)))
                assert step % 100 or writer.flush()  # nothing may be dropped
    return root


def random_loads(rng: np.random.Generator, steps: int, layers: int = 2) -> Any:
    weights = rng.dirichlet(np.full(SLOTS, 2.0), size=(steps, layers))
    return np.stack([[rng.multinomial(600, w) for w in row] for row in weights])


# ---- the figures once more, in plain loops


def ranks_of(load: Any, ep_size: int = EP_SIZE) -> Any:
    return [[sum(row[r * 3 : r * 3 + 3]) for r in range(ep_size)] for row in load]


def spread(load: Any, old: Any, new: Any) -> Any:
    """Rank loads of one step if its logical loads were split evenly over ``new``."""
    out = np.zeros((len(load), EP_SIZE))
    for layer, row in enumerate(load):
        logical = [0.0] * LOGICAL
        for slot, tokens in enumerate(row):
            logical[old[layer][slot]] += tokens
        for slot, expert in enumerate(new[layer]):
            out[layer, slot // 3] += logical[expert] / list(new[layer]).count(expert)
    return out


def mean_of(T: Any) -> float:
    return float(np.mean(per_step("balancedness", np.asarray(T))))


def expected(loads: Any, before: Any, after: Any, old: Any, new: Any) -> dict[str, float]:
    """The figures, from the steps of both sides and the placements ``[layers, slots]``."""
    b, a = mean_of([ranks_of(loads[s]) for s in before]), mean_of([ranks_of(loads[s]) for s in after])
    predicted = mean_of([spread(loads[s], old, new) for s in before])
    evenly = mean_of([spread(loads[s], new, new) for s in after])
    moved = [
        (layer, slot)
        for layer in range(len(old))
        for slot in range(SLOTS)
        if old[layer][slot] != new[layer][slot]
    ]
    fetched = {
        (layer, slot // 3, new[layer][slot])
        for layer, slot in moved
        if new[layer][slot] not in list(old[layer])[slot // 3 * 3 : slot // 3 * 3 + 3]
    }
    far = [(n, r, e) for n, r, e in fetched if e not in list(old[n])[r // 2 * 6 : r // 2 * 6 + 6]]
    return {
        "predicted": predicted, "gain": a - b, "drift": evenly - predicted, "uneven_split": a - evenly,
        "slots_moved": len(moved), "experts_crossed_ranks": len(fetched), "experts_crossed_nodes": len(far),
    }  # fmt: skip


def assert_figures(row: RearrangementFigures, before: Any, after: Any, truth: dict[str, float]) -> None:
    for window, steps in ((row.before, before), (row.after, after)):
        assert (window.first_step, window.last_step, window.steps) == (steps[0], steps[-1], len(steps))
    assert {name: getattr(row, name) for name in truth} == pytest.approx(truth, abs=1e-12)
    assert row.gain_low is not None
    assert row.gain_high is not None
    assert row.predicted is not None
    assert row.gain_low <= truth["gain"] <= row.gain_high
    assert row.after.balancedness == pytest.approx(row.predicted + truth["drift"] + truth["uneven_split"])


@pytest.mark.parametrize("ranks", [EP_SIZE, 0], ids=["local", "global"])
@pytest.mark.parametrize(("window", "times"), [(1000, 1), (30, 1), (30, 1_000_003)])
def test_figures_equal_plain_loops(tmp_path: Path, ranks: int, window: int, times: int) -> None:
    loads = random_loads(np.random.default_rng(0), 190) * times  # or so many that float32 would round them
    maps = [[TOGETHER, TOGETHER], [APART, TOGETHER], [APART, SHUFFLED]]
    write(tmp_path, loads, lambda step: maps[(step >= 50) + (step >= 120)], ranks=ranks)
    report = rearrangement_report(open_run(tmp_path), window=window)
    first, second = report.rearrangements
    for row, start, at, end, i in ((first, 0, 50, 120, 0), (second, 50, 120, 190, 1)):
        before, after = range(max(start, at - window), at), range(at, min(end, at + window))
        assert_figures(row, before, after, expected(loads, before, after, maps[i], maps[i + 1]))
        assert (row.first_step, row.last_step, row.layers) == (at, at, 1)


def test_rearrangement_over_many_steps_is_judged_by_the_steps_around_it(tmp_path: Path) -> None:
    loads = random_loads(np.random.default_rng(1), 120)
    write(
        tmp_path, loads, lambda step: [APART if step >= 50 else TOGETHER, APART if step >= 60 else TOGETHER]
    )
    (row,) = rearrangement_report(open_run(tmp_path)).rearrangements
    before, after = range(50), range(60, 120)
    truth = expected(loads, before, after, [TOGETHER] * 2, [APART] * 2)
    assert_figures(row, before, after, truth)
    assert (row.first_step, row.last_step, row.layers) == (50, 60, 2)


def test_only_complete_steps_count(tmp_path: Path) -> None:
    loads = random_loads(np.random.default_rng(2), 80)
    write(tmp_path, loads, lambda step: [APART if step >= 40 else TOGETHER] * 2, skipped=(5, 41, 79))
    (row,) = rearrangement_report(open_run(tmp_path)).rearrangements
    before = [s for s in range(40) if s != 5]
    after = [s for s in range(40, 79) if s != 41]
    assert_figures(row, before, after, expected(loads, before, after, [TOGETHER] * 2, [APART] * 2))


def test_prediction_equals_the_result_if_loads_are_steady_and_split_evenly(tmp_path: Path) -> None:
    logical = np.tile(np.array([24, 18, 12, 12, 12, 12, 6, 6]), (2, 1))
    loads = [even(logical * (1 + step % 3), APART if step >= 60 else TOGETHER) for step in range(120)]
    write(tmp_path, np.stack(loads), lambda step: [APART if step >= 60 else TOGETHER] * 2)
    (row,) = rearrangement_report(open_run(tmp_path)).rearrangements
    assert row.predicted == pytest.approx(row.after.balancedness, abs=1e-12)
    assert (row.drift, row.uneven_split) == pytest.approx((0, 0), abs=1e-12)
    assert row.verdict == "helped"


def test_elastic_changes_are_listed_without_a_gain(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=LOGICAL, ep_size=4, run_id="r", scope="global"
    ) as writer:
        for step in range(40):
            writer.record(step, rng.integers(1, 9, (2, 12)), np.array([TOGETHER] * 2))
        for step in range(40, 80):
            slots = np.array([[*range(8)] if step < 60 else [*range(4, 8), *range(4)]] * 2)
            writer.record(step, rng.integers(1, 9, (2, 8)), slots, ep_size=2)
    elastic, plain = rearrangement_report(open_run(tmp_path)).rearrangements
    assert (elastic.verdict, elastic.reason) == ("elastic", "EP size 4 → 2, 12 → 8 slots")
    assert (elastic.gain, elastic.predicted, elastic.experts_crossed_ranks) == (None, None, None)
    assert (elastic.before.steps, elastic.after.steps) == (40, 20)
    assert (plain.before.first_step, plain.before.steps, plain.experts_crossed_ranks) == (40, 20, 16)
    assert plain.experts_crossed_nodes is None
    assert plain.predicted == pytest.approx(plain.before.balancedness)


def test_same_slots_on_other_ranks_are_different(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=LOGICAL, ep_size=4, run_id="r", scope="global"
    ) as writer:
        for step in range(40):
            writer.record(
                step, np.ones((2, 12), int), np.array([TOGETHER] * 2), ep_size=4 if step < 20 else 2
            )
    run = open_run(tmp_path)
    [row] = rearrangement_report(run).rearrangements
    changes = placement_report(run, 39, against=0).changes
    assert changes is not None
    assert row.verdict == "elastic"
    assert row.slots_moved == sum(change.slots_changed for change in changes) == 2 * 12


def test_too_few_steps_are_reported(tmp_path: Path) -> None:
    loads = random_loads(np.random.default_rng(5), 30)
    write(tmp_path, loads, lambda step: [APART if step >= 25 else TOGETHER] * 2)
    (row,) = rearrangement_report(open_run(tmp_path)).rearrangements
    assert (row.verdict, row.reason) == ("not measured", "5 complete steps after it, 8 are needed")
    assert (row.gain, row.predicted, row.drift, row.lasted) == (None,) * 4
    assert row.slots_moved > 0


# ---- the planted story


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 500 a rearrangement that helps until the load drifts at 700; at 900 slots swap within ranks."""
    rng = np.random.default_rng(6)
    root = tmp_path_factory.mktemp("story")
    cold = [HOT[i] for i in (6, 7, 2, 3, 4, 5, 0, 1)]

    def placement(step: int) -> list[int]:
        return TOGETHER if step < 500 else APART if step < 900 else SHUFFLED

    loads = []
    for step in range(1200):
        # From 700 on the experts 6 and 7 are hot, of which APART has one copy, both near each other.
        logical = rng.multinomial(2000, cold if step >= 700 else HOT, size=1)
        loads.append(even(logical, placement(step)))
    return write(root, np.stack(loads), lambda step: [placement(step)], ranks=2, ep_size=2, ranks_per_node=1)


def test_planted_rearrangements_get_the_right_verdicts(story: Path) -> None:
    result = cli("rearrangements", "--window-steps", "200", "--json", story)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    first, second = document["rearrangements"]
    assert (first["first_step"], first["verdict"]) == (500, "helped")
    assert without_times(first["before"]) | {"balancedness": None} == {
        "first_step": 300, "last_step": 499, "steps": 200, "balancedness": None,
    }  # fmt: skip
    assert first["gain_low"] > 0
    assert abs(first["drift"]) < 0.01
    assert abs(first["uneven_split"]) < 0.01
    assert first["lasted"]["until"] == "half gone"
    assert abs(first["lasted"]["steps"] - 200) <= 10
    assert (second["first_step"], second["verdict"]) == (900, "no-op")
    assert (second["experts_crossed_ranks"], second["experts_crossed_nodes"]) == (0, 0)
    assert second["gain_low"] < 0 < second["gain_high"]
    assert second["lasted"] is None
    # Over all steps up to the next, what the drift took is in the figure, and named.
    whole = json.loads(cli("rearrangements", "--json", story).stdout)["rearrangements"][0]
    assert whole["after"]["steps"] == 400
    assert whole["drift"] < -0.02
    assert whole["gain"] < first["gain"]
    assert whole["lasted"] == first["lasted"]


def test_json_has_the_stable_keys(story: Path) -> None:
    document = json.loads(cli("rearrangements", "--json", story).stdout)
    assert set(document) == {
        "schema_version",
        "run",
        "steps",
        "window",
        "confidence",
        "rearrangements",
        "cost",
        "notes",
        "not_due",
        "overdue",
    }
    assert document["run"] == {"run_id": "r", "model": "org/moe"}
    assert (document["window"], document["confidence"], document["notes"]) == (1000, 0.95, [])
    assert list(without_times(document["rearrangements"][0])) == [
        "first_step", "last_step", "layers", "layer_numbers", "verdict", "reason", "before",
        "predicted", "after", "gain", "gain_low", "gain_high", "drift", "uneven_split", "gain_at_first",
        "lasted", "slots_moved", "experts_crossed_ranks", "experts_crossed_nodes", "moved_gb",
        "pause_ms", "pause_reason", "gain_ms_per_step", "gain_ms_reason", "break_even_steps",
    ]  # fmt: skip


def test_the_same_dump_gives_the_same_intervals(story: Path) -> None:
    assert cli("rearrangements", story).stdout == cli("rearrangements", story).stdout


def test_text_output(story: Path) -> None:
    lines = cli("rearrangements", story).stdout.splitlines()
    assert lines[:2] == [
        "rearrangements · org/moe · run r",
        "2 rearrangements, by balancedness: 1 helped, 1 no-op",
    ]
    assert max(map(len, lines)) <= 80
    table = [line.split() for line in lines if line.startswith(("500", "900"))]
    document = json.loads(cli("rearrangements", "--json", story).stdout)["rearrangements"]
    for cells, row in zip(table[:2], document, strict=True):
        shown = [row["before"]["balancedness"], row["predicted"], row["after"]["balancedness"]]
        assert cells[1:4] == [f"{value:.3f}" for value in shown]
    assert table[0][-1] == "helped"
    assert f"{document[0]['lasted']['steps']:,}" in table[2]


def test_range_limits_the_rearrangements(story: Path) -> None:
    document = json.loads(cli("rearrangements", "--steps", "450-599", "--json", story).stdout)
    (row,) = document["rearrangements"]
    assert (row["before"]["first_step"], row["after"]["last_step"]) == (450, 599)
    assert row["lasted"] == {"steps": 100, "until": "end"}
    assert "no rearrangement" in cli("rearrangements", "--steps", "-399", story).stdout


def test_run_without_placements(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        for _ in range(20):
            writer.record(None, np.ones((1, 4), int), None)
    result = cli("rearrangements", tmp_path)
    assert result.returncode == 0
    assert "no placement was recorded" in result.stdout


def test_invalid_input_is_an_error(story: Path, tmp_path: Path) -> None:
    one_error(cli("rearrangements", tmp_path), 3, "no run in it")
    one_error(cli("rearrangements", "--run", "zz", story), 2, "no run 'zz'")
    one_error(cli("rearrangements", "--steps", "5000-", story), 2, "the run has no steps in 5000-")
    assert cli("rearrangements", "--window-steps", "0", story).returncode == 2


# ---- intervals


def series(rng: np.random.Generator, count: int, steps: int, phi: float) -> Any:
    """AR(1) of variance 1: ``[count, steps]``."""
    noise = rng.normal(size=(steps + 100, count)) * np.sqrt(1 - phi**2)
    for i in range(1, len(noise)):
        noise[i] += phi * noise[i - 1]
    return noise[100:].T


@pytest.mark.parametrize(("steps", "phi"), [(60, 0.0), (60, 0.5), (200, 0.8), (1000, 0.5)])
def test_intervals_cover_the_truth_at_their_rate(steps: int, phi: float) -> None:
    rng, truth, count = np.random.default_rng(8), 0.3, 200
    before, after = series(rng, count, steps, phi), series(rng, count, steps, phi) + truth
    intervals = [
        bootstrap.difference(Ratio.mean(b), Ratio.mean(a)) for b, a in zip(before, after, strict=True)
    ]
    covered = np.mean([i is not None and i.low <= truth <= i.high for i in intervals])
    assert 0.88 <= covered <= 1.0
    # Not by being wide: the spread of the true mean's estimate, with room for its own error.
    wide = np.mean([i.high - i.low for i in intervals if i is not None])
    estimates = after.mean(axis=1) - before.mean(axis=1)
    assert wide < 1.5 * 2 * 1.96 * estimates.std()


def test_interval_of_a_ratio_is_of_its_sums() -> None:
    rng = np.random.default_rng(9)
    a = Ratio(rng.random(100), 1 + rng.random(100))
    b = Ratio(a.numerator + 1, a.denominator)
    found = bootstrap.difference(a, b)
    assert found is not None
    assert found.value == pytest.approx(100 / a.denominator.sum())
    assert found.low < found.value < found.high
    assert bootstrap.difference(Ratio.mean(np.ones(7)), Ratio.mean(np.ones(100))) is None


# ---- milliseconds


@pytest.mark.parametrize("lag", [0, 7])
def test_planted_pause_of_900_ms_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """Synchronous, and of an engine that moves its three layers seven steps apart."""
    record_engine(tmp_path, monkeypatch, steps=250, pause_ms=900, lag=lag)
    rows = rearrangement_report(open_run(tmp_path)).rearrangements
    assert len(rows) == 2
    for row in rows:
        assert row.pause_ms is not None
        assert row.pause_ms.estimate == pytest.approx(900, rel=0.05)
        assert row.pause_ms.low < 900 < row.pause_ms.high


def test_summary_has_the_pauses_of_rearrangements_and_other_long_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From segments of 32 steps, each of which is read by itself. Idle gaps are 25 times a step."""
    record_engine(tmp_path, monkeypatch, steps=400, pause_ms=90, base_ms=2, idle=0.02, segment_steps=32)
    run = open_run(tmp_path)
    rows, found = rearrangement_report(run).rearrangements, summarize(run)
    assert len(rows) == 3
    assert found.pauses == [row.pause_ms for row in rows]
    total = found.pause_total
    assert total is not None
    assert (total.measured, total.ms_total.estimate) == (3, pytest.approx(270, rel=0.1))
    assert total.ms_total.low < total.ms_total.estimate < total.ms_total.high
    assert found.duration_seconds is not None
    assert total.share_of_run == pytest.approx(total.ms_total.estimate / 1e3 / found.duration_seconds)
    gaps = found.long_gaps
    assert gaps is not None
    assert gaps.count >= len(gaps.longest) == 3
    assert gaps.median_ms == pytest.approx(2, abs=0.3)
    assert gaps.ms_total == pytest.approx(52 * gaps.count, rel=0.02)
    assert gaps.longest[0].ms == pytest.approx(52, abs=1)
    changes = [row.first_step for row in rows]
    assert not {gap.step for gap in gaps.longest} & {s + n for s in changes for n in (-1, 0, 1)}


@pytest.mark.parametrize(
    ("clock_ms", "in_step", "in_clock"),
    [(0.5, True, False), (9.0, False, True), (9.0, True, True)],
    ids=["recorded afterwards", "between steps", "within a step"],
)
def test_pause_by_the_engines_times_if_the_clock_is_not_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock_ms: float, in_step: bool, in_clock: bool
) -> None:
    clock, rng = PlantedClock(), np.random.default_rng(4)
    monkeypatch.setattr("eplb_dump.writer.time", clock)
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=LOGICAL, ep_size=4, run_id="r", scope="global"
    ) as writer:
        for step in range(120):
            pause = 900.0 * (step == 60)
            clock.ns += int(1e6 * (clock_ms + pause * in_clock))
            ms = 8 + float(rng.normal(0, 0.1)) + pause * in_step
            placement = np.array([APART if step >= 60 else TOGETHER] * 2)
            writer.record(step, rng.integers(1, 9, (2, 12)), placement, step_ms=ms)
    (row,) = rearrangement_report(open_run(tmp_path)).rearrangements
    assert row.pause_ms is not None
    assert row.pause_ms.estimate == pytest.approx(900, rel=0.05)


def test_imported_step_times_measure_the_pause(tmp_path: Path) -> None:
    """The import has no clock, only the engine's times."""
    rng, steps = np.random.default_rng(5), 120
    ms = 8 + rng.normal(0, 0.1, steps)
    ms[60] += 900
    np.savez(
        tmp_path / "run.npz",
        load=rng.integers(1, 9, (steps, 2, 12)),
        physical_to_logical_map=np.array([[APART if step >= 60 else TOGETHER] * 2 for step in range(steps)]),
        step_ms=ms,
    )
    options = ("--ep-size", 4, "--ordered", "--model", "m")
    assert cli("import", tmp_path / "run.npz", *options, tmp_path / "dump").returncode == 0
    (row,) = rearrangement_report(open_run(tmp_path / "dump")).rearrangements
    assert row.pause_ms is not None
    assert row.pause_ms.estimate == pytest.approx(900, rel=0.05)
    assert row.pause_ms.low < 900 < row.pause_ms.high


@pytest.mark.parametrize(
    ("per_token_ms", "per_expert_ms"), [(0.02, 0.0), (0.0, 0.5)], ids=["tokens", "active experts"]
)
def test_gain_is_the_planted_cost_of_the_same_tokens_under_both_placements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_token_ms: float, per_expert_ms: float
) -> None:
    truth = record_engine(
        tmp_path, monkeypatch, steps=500, interval=200, pause_ms=90, tokens=60 if per_expert_ms else 400,
        per_token_ms=per_token_ms, per_expert_ms=per_expert_ms,
    )  # fmt: skip
    first, _ = rearrangement_report(open_run(tmp_path)).rearrangements
    rates = per_token_ms, per_expert_ms
    after = truth.logical[200:400]
    expected = np.mean(
        [
            slowest_work(logical, truth.placements[0], *rates, 4)
            - slowest_work(logical, truth.placements[300], *rates, 4)
            for logical in after
        ]
    )
    gain, pause = first.gain_ms_per_step, first.pause_ms
    assert gain is not None
    assert pause is not None
    assert gain.low <= expected <= gain.high
    assert gain.estimate == pytest.approx(expected, rel=0.2, abs=0.02)
    if gain.low > 0:
        assert first.break_even_steps == math.ceil(pause.estimate / gain.estimate)
    assert (per_token_ms > 0) <= (gain.low > 0)
    said = " ".join(cli("rearrangements", "--expert-mb", "100", tmp_path).stdout.split())
    assert f"paused {milliseconds(pause.estimate)}" in said
    if first.break_even_steps is not None:
        assert f"pays for itself after {plural(first.break_even_steps, 'step')}" in said
    assert first.experts_crossed_ranks is not None
    assert f"{first.experts_crossed_ranks * 100 / 1000:,.1f} GB" in said
    assert first.layer_numbers == [0, 1, 2]
    assert "in layers 0, 1, 2" in said


def test_free_imbalance_has_no_gain_in_ms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_engine(tmp_path, monkeypatch, steps=350, interval=150, pause_ms=90)
    row = rearrangement_report(open_run(tmp_path)).rearrangements[0]
    assert row.verdict == "helped"
    assert row.gain_ms_per_step is not None
    assert row.gain_ms_per_step.low <= 0 <= row.gain_ms_per_step.high
    assert row.break_even_steps is None
    output = " ".join(cli("rearrangements", tmp_path).stdout.split())
    assert "what it cost and gains in time" in output
    assert "no measurable gain in ms per step: does not pay for its pause" in output


def test_pause_and_gain_that_are_not_measurable_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_engine(tmp_path, monkeypatch, steps=60, interval=50, pause_ms=90)
    document = json.loads(cli("rearrangements", tmp_path, "--json").stdout)["rearrangements"][0]
    assert document["pause_ms"]["estimate"] == pytest.approx(90, rel=0.05)
    assert document["gain_ms_per_step"] is None
    assert document["break_even_steps"] is None
    assert "fewer than 100 steps" in document["gain_ms_reason"]
    assert "gain in ms not measurable: fewer" in " ".join(cli("rearrangements", tmp_path).stdout.split())


@pytest.mark.parametrize("most", [7, 103, 750])
def test_loads_are_spread_over_any_numbers_of_replicas(most: int) -> None:
    """Of many primes, the least common multiple is too large for a float32, and then for any float."""
    primes = [n for n in range(2, most + 1) if all(n % d for d in range(2, n))]
    new = np.repeat(np.arange(len(primes), dtype=np.int32), primes)
    new = np.append(new, np.full(-len(new) % 4, len(primes), np.int32))
    rng = np.random.default_rng(most)
    old, load = rng.permutation(new), rng.integers(0, 1000, (9, len(new)))
    fold = _Fold(StepRange(0, 9), Shape(4, 1, len(new)), [old], [new])
    found = fold.balancedness(0, load.astype(np.int32), len(primes) + 1)
    logical = np.stack([np.bincount(old, row, len(primes) + 1) for row in load])
    copies = np.bincount(new, minlength=len(primes) + 1)
    ranks = (logical / np.maximum(copies, 1))[:, new].reshape(9, 4, -1).sum(axis=2)
    assert found == pytest.approx(ranks.mean(axis=1) / ranks.max(axis=1), rel=1e-9)
