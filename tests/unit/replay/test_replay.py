"""`replay` against plain loops over settings and steps, and against runs whose best setting is known."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock, steady_clock
from helpers import assert_golden, cli, one_error
from planted import without_ms

from eplb_analyze import open_run
from eplb_analyze.errors import DumpError
from eplb_analyze.metrics import series
from eplb_analyze.policies import policy
from eplb_analyze.policies.oracle import place_each
from eplb_analyze.reader.recorded_setting import Setting, recorded
from eplb_analyze.replay import simulator
from eplb_analyze.replay.replay import Outcome, Replay, last_steps, replay_run
from eplb_analyze.replay.settings import Choices, grid
from eplb_analyze.transfer.importers.import_dump import Options, import_dump
from eplb_dump import ExpertLoadWriter

Array = np.ndarray[Any, np.dtype[np.int64]]
LAYERS, LOGICAL, RANKS, SLOTS, STEPS = 3, 8, 4, 12, 120
#: Steps that one rank did not record, and steps in which all were idle.
INCOMPLETE, IDLE = {31, 64}, {50, 51}
#: The placement changes within a segment, in one layer after another. The first has an empty slot.
FIRST = np.r_[np.arange(LOGICAL), 0, 1, 2, -1]
SECOND = np.r_[np.arange(LOGICAL)[::-1], 7, 7, 6, 0]


def placement(step: int) -> Array:
    return np.stack([SECOND if step >= change else FIRST for change in (40, 42, 43)])


def rank_load(rank: int, step: int) -> Array:
    rng = np.random.default_rng(1000 * rank + step)
    slots = placement(step)
    hot = np.where(slots == (step // 25) % LOGICAL, 9, 1) * (1 + slots % 3)
    # Replicas do not share the tokens of an expert evenly.
    load = rng.poisson(6 * hot * np.where(np.arange(SLOTS) < LOGICAL, 1, 3))
    load[slots < 0] = 0
    load[2] *= step % 10 != 3
    return load


def record(root: Path, **options: Any) -> None:
    for rank in range(RANKS):
        with ExpertLoadWriter(
            root, model="org/moe", num_logical_experts=LOGICAL, ep_size=RANKS, ep_rank=rank, run_id="r",
            segment_steps=16, moe_layers=[2, 4, 6], ranks_per_node=2, **options,
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                if step in IDLE or (rank == 2 and step % 7 == 0):
                    writer.skip("dummy", step=step)
                elif step not in INCOMPLETE or rank != 1:
                    writer.record(step, rank_load(rank, step), placement(step))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("replay")
    with steady_clock():
        record(root)
    return root


def complete_steps() -> list[int]:
    return [step for step in range(STEPS) if step not in INCOMPLETE | IDLE]


@functools.cache
def load(step: int) -> Array:
    """Tokens ``[layers, slots]``, summed over ranks."""
    return sum(rank_load(rank, step) for rank in range(RANKS) if rank != 2 or step % 7)  # type: ignore[return-value]


@functools.cache
def logical(step: int) -> Array:
    out = np.zeros((LAYERS, LOGICAL), np.int64)
    for layer, slot in np.ndindex(LAYERS, SLOTS):
        if placement(step)[layer, slot] >= 0:
            out[layer, placement(step)[layer, slot]] += load(step)[layer, slot]
    return out


#: How often the tokens of a step are dealt for a figure.
DEALS = 60


def tokens(loads: Array, slots: Array, ranks: int, rng: np.random.Generator) -> list[list[list[int]]]:
    """Tokens of each deal, layer and rank, each token on any of its expert's slots."""
    per_slot = np.zeros((DEALS, *slots.shape), np.int64)
    for layer in range(LAYERS):
        for expert in set(slots[layer].tolist()) - {-1}:
            at = np.flatnonzero(slots[layer] == expert)
            share = [1 / len(at)] * len(at)
            per_slot[:, layer, at] = rng.multinomial(loads[layer, expert], share, size=DEALS)
    found: list[list[list[int]]] = per_slot.reshape(DEALS, LAYERS, ranks, -1).sum(axis=3).tolist()
    return found


def dealt(placed: list[tuple[Array, Array]], ranks: int) -> tuple[float, float]:
    """Balancedness and idle fraction of steps given by logical loads and placement, dealt many times."""
    rng = np.random.default_rng(0)
    return figures([deal for step in placed for deal in tokens(*step, ranks, rng)])


def figures(per_step: list[list[list[int]]]) -> tuple[float, float]:
    """Balancedness and idle fraction of tokens by step, layer and rank."""
    ratios, mean, longest = [], 0.0, 0.0
    for step in per_step:
        active = [sum(row) / len(row) / max(row) for row in step if max(row) > 0]
        if active:
            ratios.append(sum(active) / len(active))
        mean += sum(sum(row) / len(row) for row in step)
        longest += sum(max(row) for row in step)
    return sum(ratios) / len(ratios), 1 - mean / longest


def moves(old: Array, new: Array, ranks: int) -> list[int]:
    """Expert weights that each rank fetches."""
    fetched = [0] * ranks
    for before, after in zip(old, new, strict=True):
        for rank, (was, now) in enumerate(zip(np.split(before, ranks), np.split(after, ranks), strict=True)):
            fetched[rank] += len(set(now.tolist()) - set(was.tolist()) - {-1})
    return fetched


@functools.cache
def replay_in_loops(setting: Setting) -> tuple[list[tuple[int, Array]], tuple[float, float]]:
    """A setting replayed step by step: its placements and figures."""
    slots = LOGICAL + setting.num_redundant_experts
    now = np.tile(np.arange(slots) % LOGICAL, (LAYERS, 1)).astype(np.int32)
    if (slots, setting.ep_size) == (SLOTS, RANKS):
        now = placement(0).astype(np.int32)
    placed = [(0, now)]
    per_step = []
    for step in range(STEPS):
        assert setting.interval is not None
        assert setting.window is not None
        assert setting.start is not None
        since = step - setting.start
        if since >= 0 and since % setting.interval == 0:
            past = [s for s in complete_steps() if step - setting.window <= s < step]
            if past:
                weight = np.sum([logical(s) for s in past], axis=0)
                nodes = setting.ep_size // 2
                problem = policy.Problem(weight, slots, setting.ep_size, nodes, 1, now)
                now = policy.POLICIES[setting.policy](problem)
                placed.append((step, now))
        if step in complete_steps():
            per_step.append((logical(step), now))
    return placed, dealt(per_step, setting.ep_size)


SETTINGS = [
    Setting("deepseek", 4, 4, 10, 10, 10),
    Setting("vllm", 4, 4, 7, 25, 3),  # the window spans several intervals
    Setting("vllm", 0, 4, 30, 5, 31),
    Setting("deepseek", 8, 8, 16, 16, 16),
    Setting("sglang", 4, 2, 200, 10, 50),
    Setting("swift_balance", 4, 4, 10, 10, 10),  # it starts from a placement with an empty slot
    Setting("biased", 4, 4, 10, 20, 10),
    Setting("layer_budgets", 8, 4, 10, 20, 10),
]


def of(result: Replay, setting: Setting) -> Outcome:
    return next(outcome for outcome in result.outcomes if outcome.setting == setting)


@pytest.mark.parametrize("workers", [1, 3])
def test_settings_agree_with_plain_loops(dump: Path, workers: int) -> None:
    result = replay_run(open_run(dump), SETTINGS, workers=workers, keep_placements=True)
    assert (result.scored, result.left_out) == (len(complete_steps()), 0)
    assert result.placements is not None
    for outcome, kept in zip(result.outcomes, result.placements, strict=True):
        assert outcome.setting is not None
        placed, (balancedness, idle) = replay_in_loops(outcome.setting)
        assert [step for step, _ in kept[1:]] == [step for step, _ in placed[1:]]
        for (_, found), (_, true) in zip(kept, placed, strict=True):
            np.testing.assert_array_equal(found, true)
        assert outcome.balancedness == pytest.approx(balancedness, abs=0.005)
        assert outcome.idle_fraction == pytest.approx(idle, abs=0.005)
        fetched = [moves(a, b, outcome.ep_size) for (_, a), (_, b) in itertools.pairwise(placed)]
        assert [move.weights for move in outcome.moves] == [sum(ranks) for ranks in fetched]
        assert [move.busiest_rank for move in outcome.moves] == [max(ranks) for ranks in fetched]
        assert result.today.idle_fraction is not None
        saved = result.today.idle_fraction - outcome.idle_fraction
        assert outcome.idle_fraction_saved == pytest.approx(saved, abs=1e-12)
    # The net gain of another number of ranks is not known, so none counts.
    assert {o.ep_size for o in result.outcomes} > {RANKS}
    idle_fractions = [outcome.idle_fraction or 0.0 for outcome in result.outcomes]
    assert idle_fractions == sorted(idle_fractions)


def test_today_has_the_recorded_placements_and_measured_figures(dump: Path) -> None:
    result = replay_run(open_run(dump), SETTINGS[:1])
    today = dealt([(logical(step), placement(step)) for step in complete_steps()], RANKS)
    assert (result.today.balancedness, result.today.idle_fraction) == pytest.approx(today, abs=0.005)
    measured = figures(
        [load(step).reshape(LAYERS, RANKS, -1).sum(axis=2).tolist() for step in complete_steps()]
    )
    assert (result.measured_balancedness, result.measured_idle_fraction) == pytest.approx(measured, rel=1e-12)
    assert abs(today[1] - measured[1]) > 0.01
    assert [move.step for move in result.today.moves] == [40]
    assert result.today.weights_moved == sum(moves(placement(0), placement(45), RANKS))
    known = recorded(open_run(dump), result.part.shape)
    assert (known.policy, known.interval, known.start, known.num_redundant_experts) == (None, None, 40, 4)


def test_result_does_not_depend_on_threads_or_blocks(dump: Path, tmp_path: Path) -> None:
    record(tmp_path, segment_bytes=30_000)
    results = [replay_run(open_run(root), workers=n).to_json() for root in (dump, tmp_path) for n in (1, 4)]
    for result in results:
        del result["step_seconds"], result["seconds"]
    assert results[0] == results[1]
    assert results[2] == results[3]
    # With other block sizes, only the sums behind the bound differ.
    settings = (without_ms(results[i]["settings"]) for i in (0, 2))
    for one, other in zip(*settings, strict=True):
        for name in one.keys() - {"idle_fraction_bound"}:
            same = one[name] == other[name]
            assert same or one[name] == pytest.approx(other[name], rel=1e-12), name


def test_settings_have_the_figures_that_they_have_alone(dump: Path) -> None:
    """Also those that find the same placements as another one, perhaps in another order on a rank."""
    policies, redundant = ["deepseek", "vllm", "static"], [0, 4]
    together = replay_run(open_run(dump), Choices(policies=policies, redundant=redundant, intervals=[5, 10]))
    settings = [outcome.setting for outcome in together.outcomes if outcome.setting is not None]
    assert {setting.policy for setting in settings} == set(policies)
    for outcome in together.outcomes:
        assert outcome.setting is not None
        (alone,) = replay_run(open_run(dump), [outcome.setting]).outcomes
        bound = alone.idle_fraction_bound
        assert alone == replace(outcome, idle_fraction_bound=bound), outcome.setting


def test_scores_of_a_long_run_are_downsampled(dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replay_run(open_run(dump), SETTINGS)
    monkeypatch.setattr(series, "MAX_SUMS", 10)
    short = replay_run(open_run(dump), SETTINGS)
    assert len(short.scores.step) <= 20 < len(whole.scores.step)
    for one, other in zip(whole.outcomes, short.outcomes, strict=True):
        assert one.balancedness == pytest.approx(other.balancedness, rel=1e-12)
        assert one.idle_fraction == pytest.approx(other.idle_fraction, rel=1e-12)
    assert (short.scores.active.sum(axis=1) == len(complete_steps())).all()


@pytest.mark.parametrize("sums", [1 << 17, 20])
def test_no_placement_is_better_than_the_bound(
    dump: Path, monkeypatch: pytest.MonkeyPatch, sums: int
) -> None:
    monkeypatch.setattr(simulator, "BOUND_SUMS", sums)
    result = replay_run(open_run(dump), Choices(redundant=[0, 4], intervals=[1, 5], windows=[1, 10]))
    for outcome in result.outcomes:
        assert outcome.idle_fraction is not None
        assert outcome.idle_fraction_bound is not None
        assert 0 <= outcome.idle_fraction_bound <= outcome.idle_fraction
    if sums > 20:  # the bound of single steps is the tightest
        loads = [logical(step) for step in complete_steps()]
        least = sum(policy.lower_bound(each, LOGICAL, RANKS).sum() for each in loads)
        bound = 1 - sum(each.sum() for each in loads) / RANKS / least
        zero = [o.idle_fraction_bound for o in result.outcomes if o.num_physical_experts == LOGICAL]
        assert zero == pytest.approx([bound] * len(zero))
        assert bound > 0.05


# ---- placements depend on the past only


def record_identity(
    root: Path, load: Callable[[int], Array], *, steps: int, ep_size: int, **options: Any
) -> Path:
    """Record a run whose slots are its experts."""
    experts = load(0).shape[1]
    identity = np.tile(np.arange(experts), (len(load(0)), 1))
    with ExpertLoadWriter(
        root, model="m", num_logical_experts=experts, ep_size=ep_size, scope="global", run_id="r", **options
    ) as writer:
        for step in range(steps):
            writer.record(step, load(step), identity)
    return root


@pytest.mark.parametrize("change", [39, 40, 41])
def test_later_loads_do_not_change_earlier_placements(tmp_path: Path, change: int) -> None:
    """A spike in one step changes no placement up to that step."""

    def calm(step: int) -> Array:
        return np.random.default_rng(step).poisson(50, (2, 8))

    def spiked(step: int) -> Array:
        load = calm(step)
        load[:, 5] += 100_000 * (step == change)
        return load

    chosen = []
    for name, load in (("calm", calm), ("spiked", spiked)):
        root = record_identity(tmp_path / name, load, steps=80, ep_size=4, segment_steps=32)
        settings = [Setting("deepseek", 4, 4, 10, window, 10) for window in (5, 10, 100)]
        result = replay_run(open_run(root), settings, keep_placements=True)
        chosen.append(dict(zip([o.setting for o in result.outcomes], result.placements or [], strict=True)))
    for setting, kept in chosen[0].items():
        other = dict(chosen[1][setting])
        for step, slots in kept:
            if step <= change:
                np.testing.assert_array_equal(slots, other[step], err_msg=f"{setting} at {step}")
        seen = 40 if change < 40 else 50
        # Once the spike is in the window, its expert gets all redundant slots.
        if setting is not None and seen - (setting.window or 0) <= change:
            assert np.count_nonzero(other[seen][0] == 5) == 5


def test_custom_policy_sees_only_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rolling.py").write_text(
        "import numpy as np\n"
        "def roll(problem):\n"
        "    with open('seen.txt', 'a') as file:\n"
        "        print(int(problem.weight[0, 0]), problem.ep_size, file=file)\n"
        "    return np.roll(problem.current, 1, axis=1)\n"
    )
    record_identity(tmp_path / "dump", lambda step: np.full((1, 4), 3**step), steps=12, ep_size=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "rolling", raising=False)
    arguments = [
        "--policy",
        "rolling:roll",
        "--redundant-experts",
        "0",
        "--interval-steps",
        "4",
        "--window-steps",
        "2",
    ]
    done = cli("replay", *arguments, "--json", "dump")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen.txt").read_text().split("\n")[:2] == [f"{3**2 + 3**3} 2", f"{3**6 + 3**7} 2"]
    assert [s["policy"] for s in json.loads(done.stdout)["settings"]] == ["rolling:roll"]


# ---- rankings and costs


def test_oracle_is_scored_by_the_loads_of_each_step_and_never_beats_the_bound(dump: Path) -> None:
    settings = [
        Setting("oracle", extra, ranks, None, None, None) for extra, ranks in ((0, 4), (4, 4), (8, 8))
    ]
    result = replay_run(open_run(dump), settings)
    for setting in settings:
        outcome = of(result, setting)
        slots, busiest, mean = LOGICAL + setting.num_redundant_experts, 0, 0.0
        for step in complete_steps():
            placed = place_each(logical(step), slots, setting.ep_size)
            busiest += int(placed.T.reshape(LAYERS, setting.ep_size, -1).sum(axis=2).max(axis=1).sum())
            mean += logical(step).sum() / setting.ep_size
        assert outcome.idle_fraction == pytest.approx(1 - mean / busiest, abs=1e-9)
        assert outcome.idle_fraction_bound is not None
        assert outcome.idle_fraction_bound <= outcome.idle_fraction + 1e-9
        assert outcome.moves == []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[policy.Problem]:
    """What a policy of one's own that never moves an expert is given."""
    problems: list[policy.Problem] = []

    def watching(problem: policy.Problem) -> Any:
        problems.append(problem)
        return policy.POLICIES["static"](problem)

    monkeypatch.setattr(policy, "named", lambda name: watching)
    return problems


def test_policy_sees_its_window_in_parts(dump: Path, seen: list[policy.Problem]) -> None:
    replay_run(open_run(dump), [Setting("mine:windows", 0, 4, 30, 20, 30)], workers=1)
    windows = [range(10, 30), range(40, 60), range(70, 90)]
    assert len(seen) == len(windows)
    for problem, steps in zip(seen, windows, strict=True):
        assert problem.steps_per_window == 1
        expected = [logical(step).tolist() for step in steps if step in complete_steps()]
        assert problem.windows().tolist() == expected


def test_long_window_is_seen_in_64_parts(tmp_path: Path, seen: list[policy.Problem]) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=2, ep_size=1, ep_rank=0, segment_steps=16
    ) as writer:
        for step in range(300):
            writer.record(step, np.array([[step, 1]]), np.array([[0, 1]]))
    replay_run(open_run(tmp_path), [Setting("mine:windows", 0, 1, 200, 200, 250)], workers=1)
    (problem,) = seen
    assert problem.weight.tolist() == [[sum(range(50, 250)), 200]]
    # 64 parts of 3 steps; the first 8 of the 200 steps are in none of them.
    assert problem.steps_per_window == 3
    assert problem.windows().tolist() == [[[3 * s + 3, 3]] for s in range(58, 250, 3)]


def moving_hot_spot(step: int) -> Array:
    """Half of the tokens go to eight of 64 experts, which change every 50 steps; four layers."""
    share = np.full(64, 0.5 / 56)
    share[(step // 50 * 8 + np.arange(8)) % 64] = 0.5 / 8
    return np.random.default_rng(step).multinomial(20_000, share, size=4)


def test_planted_best_setting_is_ranked_first(tmp_path: Path) -> None:
    root = record_identity(tmp_path, moving_hot_spot, steps=600, ep_size=16)
    choices = Choices(redundant=[0, 16, 32], intervals=[10, 100, 200], policies=["deepseek", "static"])
    result = replay_run(open_run(root), choices)
    best = result.outcomes[0].setting
    assert best is not None
    assert (best.policy, best.num_redundant_experts, best.interval) == ("deepseek", 32, 10)
    # Fewer redundant experts lose more time, a longer interval loses far more.
    rest = {
        (o.num_physical_experts - 64, o.setting.interval): o.idle_fraction or 0
        for o in result.outcomes[1:]
        if o.setting is not None
    }
    least = result.outcomes[0].idle_fraction or 1
    assert min(idle for (redundant, _), idle in rest.items() if redundant < 32) > least + 0.02
    assert min(idle for (_, interval), idle in rest.items() if interval != 10) > least + 0.1
    # A hot expert has 1/16 of the tokens; the busiest of 16 ranks has four.
    assert result.today.idle_fraction == pytest.approx(1 - (1 / 16) / (4 / 16), abs=0.02)


def test_moving_weights_costs_time(tmp_path: Path) -> None:
    root = record_identity(tmp_path, moving_hot_spot, steps=300, ep_size=16)
    choices = Choices(redundant=[16], intervals=[10, 50], windows=[10], policies=["deepseek"])
    free = replay_run(open_run(root), choices, cost_per_expert_ms=0.0)
    assert free.seconds is not None
    assert free.part.step_seconds == pytest.approx(free.seconds / 300)
    for outcome in free.outcomes:
        assert outcome.time_saved is not None
        assert outcome.net_seconds == pytest.approx(outcome.time_saved * free.seconds)
    often, seldom = free.outcomes
    assert often.setting is not None
    assert often.setting.interval == 10
    # A cost at which moving more often no longer pays.
    more = often.weights_moved_busiest_rank - seldom.weights_moved_busiest_rank
    dear = 2e3 * ((often.net_seconds or 0) - (seldom.net_seconds or 0)) / more
    priced = replay_run(open_run(root), choices, cost_per_expert_ms=dear)
    assert [o.setting and o.setting.interval for o in priced.outcomes] == [50, 10]
    for outcome in priced.outcomes:
        cost = outcome.weights_moved_busiest_rank * dear / 1e3
        assert outcome.cost_seconds == pytest.approx(cost)
        assert outcome.net_seconds == pytest.approx((outcome.time_saved or 0) * free.seconds - cost)
    text = cli(
        "replay", "--interval-steps", "10", "--redundant-experts", "16", "--cost-per-expert-ms", "1e6", root
    ).stdout
    assert "−" in text
    assert " !" in text


# ---- which steps are replayed


def test_elastic_run_is_replayed_from_its_last_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=8, ep_size=2, scope="global") as writer:
        for step in range(90):
            size, slots = (2, 8) if step < 30 else (4, 12)
            writer.record(
                step, rng.poisson(20, (2, slots)), np.tile(np.arange(slots) % 8, (2, 1)), ep_size=size
            )
    run = open_run(tmp_path)
    result = replay_run(run, [Setting("deepseek", 4, 4, 20, 20, 20)])
    assert (result.first_step, result.last_step, result.scored) == (30, 89, 60)
    assert run.clock.range_label(30, 89).startswith("steps 30-89 (")
    only = f"only {run.clock.range_label(30, 89)} are replayed (to replay earlier steps, use --steps 0-29)"
    assert only in result.notes[0]
    # Starts count from the change.
    assert [move.step for move in result.outcomes[0].moves] == [50, 70]
    before = replay_run(open_run(tmp_path), steps=(0, 30))
    assert (before.part.shape.ep_size, before.last_step, before.notes) == (2, 29, [])


def test_step_range_does_not_shift_rearrangements(dump: Path) -> None:
    result = replay_run(open_run(dump), [Setting("deepseek", 4, 4, 20, 20, 10)], (25, 100))
    assert (result.first_step, result.last_step) == (25, 99)
    assert [move.step for move in result.outcomes[0].moves] == [30, 50, 70, 90]


def test_steps_without_a_known_placement_are_left_out(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        for step in range(30):
            writer.record(step, np.ones((2, 4), int), np.arange(8).reshape(2, 4) % 4 if step >= 10 else None)
    result = replay_run(open_run(tmp_path))
    assert (result.first_step, result.scored, result.left_out) == (10, 20, 10)
    assert "10 complete steps left out" in result.notes[0]
    assert result.outcomes[0].balancedness == 1.0


def test_run_without_placements_is_rejected(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.ones((1, 2), int), None)
    one_error(cli("replay", tmp_path), 3, str(tmp_path), "placement of a layer is not known")


def test_run_without_step_order_is_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "counts.npz", counts=np.ones((20, 2, 4), np.int32))
    given = ["--ep-size", "2", "--placement", "linear", "--model", "m"]
    source = tmp_path / "counts.npz"
    assert cli("import", source, *given, tmp_path / "a").returncode == 0
    one_error(cli("replay", tmp_path / "a"), 3, "order of steps")
    assert cli("import", source, "--ordered", *given, tmp_path / "b").returncode == 0
    result = json.loads(cli("replay", "--json", tmp_path / "b").stdout)
    assert (result["scored"], result["seconds"]) == (20, None)
    assert any("--ordered" in note for note in result["notes"])


def test_sampled_steps_stand_for_those_between(tmp_path: Path) -> None:
    with ExpertLoadWriter(
        tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global", interval=3
    ) as writer:
        for step in range(90):
            writer.record(step, np.random.default_rng(step).poisson(9, (1, 4)), np.arange(4)[None])
    result = replay_run(open_run(tmp_path), [Setting("deepseek", 0, 2, 30, 30, 30)], keep_placements=True)
    assert result.scored == 30
    assert [step for step, _ in (result.placements or [[]])[0]] == [-1, 30, 60]
    assert result.seconds == pytest.approx(90 * (result.part.step_seconds or 0))


def test_recorded_placement_may_lack_experts(tmp_path: Path) -> None:
    """With fewer slots than experts, today has no bound; settings with enough slots do."""
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=8, ep_size=2, scope="global") as writer:
        for step in range(20):
            writer.record(step, np.array([[4, 1, 1, 2]]), np.array([[0, 3, 5, 6]]))
    result = replay_run(open_run(tmp_path), Choices(redundant=[0], intervals=[5]))
    assert result.today.idle_fraction == pytest.approx(1 - 4 / 5)
    assert result.today.idle_fraction_bound is None
    assert [o.idle_fraction_bound for o in result.outcomes] == [0.0] * len(result.outcomes)


def test_tokens_on_empty_slots_count_only_as_measured(tmp_path: Path) -> None:
    slots = np.array([[0, 1, -1, 2, 3, 0]] * 2)
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        for step in range(8):
            writer.record(step, np.array([[0, 0, 5, 0, 0, 0], [3, 1, 0, 1, 1, 2]]), slots)
    found = replay_run(open_run(tmp_path), Choices(policies=["static"]))
    # Layer 0: 2.5 / 5. Layer 1: 4 / 4 as recorded. Dealt, k of the 5 tokens of expert 0 are on the first
    # rank, beside one of expert 1, and 5 - k on the second, beside two.
    assert found.measured_balancedness == pytest.approx((0.5 + 1) / 2)
    ways = [math.comb(5, k) / 2**5 * 4 / max(1 + k, 7 - k) for k in range(6)]
    assert found.today.balancedness == pytest.approx(sum(ways), abs=0.06)  # of 8 steps, dealt 16 times


def test_jump_of_step_numbers_costs_no_work(tmp_path: Path) -> None:
    far = 2**60
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        for step in [*range(12), *range(far, far + 12)]:
            writer.record(step, np.array([[9, 1, 1 + step % 3, 1]]), np.array([[0, 1, 2, 3]]))
    run = open_run(tmp_path)
    found = replay_run(run, [Setting("deepseek", 0, 2, 4, 6, 4)], keep_placements=True)
    # Only rearrangements with a step in their window, before and after the jump.
    assert [move.step for move in found.outcomes[0].moves] == [4, 8, 12, 16, far + 4, far + 8]


def test_even_split_of_an_import_is_noted(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((8, 1, 4), np.int64))
    (tmp_path / "map.json").write_text("[[0, 1, 2, 3, 0, 1]]")
    options = Options(ep_size=2, placement=str(tmp_path / "map.json"), ordered=True)
    import_dump(tmp_path / "x.npy", tmp_path / "dump", "array", options)
    notes = replay_run(open_run(tmp_path / "dump"), Choices(policies=["static"])).notes
    assert any("split evenly over its slots" in note for note in notes)


def test_damaged_segment_is_left_out(tmp_path: Path) -> None:
    record(tmp_path)
    victim = sorted(tmp_path.glob("run=*/model=*/rank=00001/session=*/loads-*.parquet"))[2]
    victim.write_bytes(victim.read_bytes()[:-100])
    result = cli("replay", "--json", tmp_path)
    one_error(result, 3, victim.name)
    # The segment has steps 32 to 47.
    assert json.loads(result.stdout)["scored"] == len([s for s in complete_steps() if not 32 <= s < 48])


def test_default_grid(dump: Path) -> None:
    run = open_run(dump)
    part = run.retry_without_damaged(lambda: last_steps(run))
    today = recorded(run, part.shape)
    settings, notes = grid(run, today, Choices(), 6400)
    assert notes == []
    assert {s.num_redundant_experts for s in settings} == {0, 4, 8, 12}
    # Two more on each rank, but only as today otherwise.
    assert [s for s in settings if s.num_redundant_experts == 12] == [
        Setting("deepseek", 12, 4, 400, 400, 400)
    ]
    assert {(s.interval, s.window) for s in settings if s.policy == "deepseek"} == {
        (100, 100), (100, 400), (400, 400), (400, 1600), (1600, 1600), (1600, 6400)
    }  # fmt: skip
    assert all(s.start == s.interval for s in settings)
    _, notes = grid(run, today, Choices(redundant=[4, 5]), 6400)
    assert notes == [
        "left out: --redundant-experts 5: 13 slots cannot be divided evenly among 4 EP ranks; use 4 or 8"
    ]
    # Of another EP size, today's number is rounded up.
    settings, notes = grid(run, today, Choices(ep_sizes=[3]), 6400)
    assert notes == []
    assert {s.num_redundant_experts for s in settings} == {1, 4, 7, 10}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--interval-steps", "ten"], ["--interval-steps", "whole numbers"]),
        (["--interval-steps", "0"], ["whole numbers from 1 to"]),
        (["--window-steps", "5,,6"], ["--window-steps"]),
        (["--redundant-experts", "-1"], ["--redundant-experts"]),
        (["--cost-per-expert-ms", "-1"], ["--cost-per-expert-ms"]),
        (["--steps", "9"], ["--steps"]),
    ],
)
def test_malformed_option_is_rejected(dump: Path, arguments: list[str], words: list[str]) -> None:
    result = cli("replay", *arguments, dump)
    assert (result.returncode, result.stdout) == (2, "")
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "magic"], ["magic", "deepseek"]),
        (["--policy", "json:nothing"], ["json:nothing"]),
        (["--redundant-experts", "3"], ["11 slots", "4 EP ranks; use 0 or 4"]),
        (["--ep-size", "3", "--redundant-experts", "0"], ["8 slots", "3 EP ranks; use 1"]),
        (["--redundant-experts", "100000000"], ["--redundant-experts is too large", "65,536 slots"]),
        (["--ep-size", "100000000"], ["--ep-size is too large", "65,536 slots"]),
        (["--num-groups", "6", "--policy", "deepseek"], ["groups"]),
        (["--steps", "500-599"], ["the run has no steps in 500-599"]),
        (["--run", "zz"], ["no run 'zz'"]),
    ],
)
def test_impossible_request_is_rejected(dump: Path, arguments: list[str], words: list[str]) -> None:
    one_error(cli("replay", *arguments, dump), 2, *words)


def test_single_step_is_named(dump: Path) -> None:
    text = " ".join(cli("replay", "--steps", "3-3", dump).stdout.split())
    assert "The gains are those of step 3 (" in text


def test_range_without_a_complete_step_is_rejected(dump: Path) -> None:
    with pytest.raises(DumpError, match="no step of this range is complete"):
        replay_run(open_run(dump), steps=(50, 52))


# ---- output


def rounded(text: str) -> float:
    """The last digits of a matrix product depend on the processor."""
    return round(float(text), 9)


GRID = ["--interval-steps", "10,40", "--window-steps", "10", "--redundant-experts", "0,4"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("replay.txt", GRID),
        ("replay.json", [*GRID[:4], "--redundant-experts", "4", "--policy", "vllm", "--json"]),
        ("replay-sizes.txt", [*GRID, "--ep-size", "2,4", "--start", "5,10", "--top", "6"]),
    ],
)
def test_golden(dump: Path, name: str, arguments: list[str]) -> None:
    result = cli("replay", *arguments, dump)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    if name.endswith(".json"):  # by the clock
        document = json.loads(output, parse_float=rounded)
        assert document.pop("step_seconds") > 0
        assert document.pop("seconds") > 0
        output = json.dumps(without_ms(document), indent=2) + "\n"
    assert_golden(name, output, tolerance=1e-8 if name.endswith("json") else 0.0)


def test_table_with_costs_fits_80_columns(dump: Path) -> None:
    for more in ([], ["--start", "5,10"], ["--ep-size", "2,4"]):
        text = cli("replay", *GRID, "--cost-per-expert-ms", "0.01", *more, dump).stdout
        assert "net s" in text
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
