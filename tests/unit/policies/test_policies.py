"""Policies against the described algorithm, tie by tie, and the lower bound against all placements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_problems import KINDS, SHAPES, loads, placements

from eplb_analyze.errors import UsageError
from eplb_analyze.policies import torch_cpu
from eplb_analyze.policies.layer_budgets import allocate
from eplb_analyze.policies.policy import POLICIES, Problem, lower_bound, named, place

torch = pytest.importorskip("torch")

Array = npt.NDArray[Any]
active = POLICIES["active_experts"]

#: The example of deepseek-ai/EPLB's README: 2 layers, 12 experts in 4 groups, 16 slots, 8 ranks, 2 nodes.
README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def torch_order(keys: Array) -> list[int]:
    indices: list[int] = torch.from_numpy(keys).sort(descending=True).indices.tolist()
    return indices


def numpy_order(keys: Array) -> list[int]:
    # In two dimensions, as vLLM sorts.
    order: list[int] = np.argsort(-keys[None], axis=-1)[0].tolist()
    return order


def place_as_described(problem: Problem, implementation: str) -> list[list[int]]:
    """The algorithm as DeepSeek describes it, in loops over layers, experts and slots."""
    share, added = {
        "deepseek": (np.float32, np.float32),
        "sglang": (np.float32, np.float64),
        "vllm": (np.float64, np.float64),
    }[implementation]
    order = numpy_order if implementation == "vllm" else torch_order

    def into_packs(weights: list[Any], packs: int) -> list[list[int]]:
        """Equally many items for each pack; the heaviest item goes to the first lightest pack with room."""
        if len(weights) == packs:
            return [[item] for item in range(packs)]
        content: list[list[int]] = [[] for _ in range(packs)]
        total = [added(0)] * packs
        for item in order(np.array(weights)):
            room = [pack for pack in range(packs) if len(content[pack]) < len(weights) // packs]
            lightest = min(room, key=lambda pack: total[pack])
            content[lightest].append(item)
            total[lightest] = added(total[lightest] + added(weights[item]))
        return content

    groups, nodes = problem.num_groups, problem.num_nodes
    if groups % nodes:
        groups = nodes = 1
    placed = []
    for weight in problem.weight.astype(np.float32):
        members = np.arange(len(weight)).reshape(groups, -1)
        if implementation == "vllm":
            sums = weight.reshape(groups, -1).sum(axis=-1)
        else:
            sums = torch.from_numpy(weight).unflatten(-1, (groups, -1)).sum(-1).numpy()
        slots: list[int] = []
        for of_node in into_packs(list(sums), nodes):
            experts = [int(expert) for group in of_node for expert in members[group]]
            copies = Counter(experts)

            def of_a_copy(expert: int, weight: Array = weight, copies: Counter[int] = copies) -> Any:
                return share(weight[expert]) / share(copies[expert])

            redundant = []
            for _ in range(problem.num_physical_experts // nodes - len(experts)):
                # max takes the first of equals, in the order of the node's experts.
                hottest = max(experts, key=of_a_copy)
                copies[hottest] += 1
                redundant.append(hottest)
            held = experts + redundant
            for of_rank in into_packs([of_a_copy(expert) for expert in held], problem.ep_size // nodes):
                slots += [held[item] for item in of_rank]
        placed.append(slots)
    return placed


def test_example_of_the_deepseek_readme() -> None:
    problem = Problem(np.array(README_WEIGHT), 16, ep_size=8, num_nodes=2, num_groups=4)
    for name in ("deepseek", "sglang", "vllm"):
        assert place(named(name), problem).tolist() == README_PLACED
    assert place_as_described(problem, "deepseek") == README_PLACED


@pytest.mark.parametrize("implementation", ["deepseek", "sglang", "vllm"])
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.integers(0, KINDS - 1),
    shape=st.sampled_from(SHAPES),
    layers=st.integers(1, 3),
)
@settings(max_examples=300)
def test_policies_agree_with_the_described_algorithm(
    implementation: str, seed: int, kind: int, shape: tuple[int, int, int, int, int], layers: int
) -> None:
    experts, slots, ranks, nodes, groups = shape
    weight = loads(np.random.default_rng(seed), kind, layers, experts)
    problem = Problem(weight, slots, ranks, nodes, groups)
    assert place(named(implementation), problem).tolist() == place_as_described(problem, implementation)


@given(seed=st.integers(0, 2**32 - 1), experts=st.integers(1, 6), each=st.integers(1, 5))
@settings(max_examples=100)
def test_expert_that_stays_on_its_rank_keeps_its_slot(seed: int, experts: int, each: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, slots = 3, 3 * each * experts
    weight, current = rng.integers(0, 9, (2, experts)), placements(rng, 2, experts, slots)
    free = place(POLICIES["vllm"], Problem(weight, slots, ranks))
    kept = place(POLICIES["vllm"], Problem(weight, slots, ranks, current=current))
    for layer in range(2):
        by_rank = [each[layer].reshape(ranks, -1).tolist() for each in (free, kept, current)]
        for chosen, now, before in zip(*by_rank, strict=True):
            assert Counter(now) == Counter(chosen)
            stayed = (Counter(chosen) & Counter(before)).total()
            assert sum(a == b for a, b in zip(now, before, strict=True)) >= stayed


def test_static_keeps_the_placement_in_force_or_the_initial_one() -> None:
    weight = np.array([[1, 2, 3], [4, 5, 6]])
    assert place(named("static"), Problem(weight, 8, 2)).tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2
    current = np.array([[2, 1, 0, 0], [1, 1, 2, 0]], np.int32)
    assert (place(named("static"), Problem(weight, 4, 2, current=current)) == current).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 600),
    values=st.sampled_from([1, 2, 5, 60, 2**30]),
)
@settings(max_examples=200)
def test_order_and_sum_are_those_of_torch(seed: int, n: int, values: int) -> None:
    keys = np.random.default_rng(seed).integers(0, values, (3, n)).astype(np.float32)
    order = torch_cpu.descending_order(keys, np.tile(np.arange(n), (3, 1)))
    assert (order == torch.from_numpy(keys).sort(dim=-1, descending=True).indices.numpy()).all()
    if n <= 512:
        thirds = keys / np.float32(3)
        assert (torch_cpu.float32_sum(thirds) == torch.from_numpy(thirds).sum(-1).numpy()).all()


def test_order_of_patterned_loads_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that rise, fall or repeat over the experts; for some of them introsort falls back to heapsort."""
    heapsort, with_equals = torch_cpu._heapsort, 0

    def spy(heap: list[int], keys: list[float]) -> list[int]:
        nonlocal with_equals
        with_equals += len({keys[i] for i in heap}) < len(heap)
        return heapsort(heap, keys)

    monkeypatch.setattr(torch_cpu, "_heapsort", spy)
    for n in (72, 100, 128, 256, 288, 320, 512, 544):
        i = np.arange(n)
        patterns = [i, n - i, np.minimum(i, n - i), np.maximum(i, n - i), np.abs(i - n // 3), i % 16,
                    i * 7919 % n, (i % 32) * (i // 32), i * i % 31, (i % 2) * (n - i),
                    np.r_[i[: n * 8 // 9], i[: n - n * 8 // 9]]]  # fmt: skip
        for pattern in patterns:
            for coarse in (1, 2, 3, 10):
                keys = (pattern // coarse).astype(np.float32)
                assert torch_cpu._introsort(keys.tolist()) == torch_order(keys)
    assert with_equals > 10


# ---- the lower bound


def copies_of(experts: int, slots: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each expert at least one slot."""
    if experts == 1:
        yield (slots,)
        return
    for first in range(1, slots - experts + 2):
        for rest in copies_of(experts - 1, slots - first):
            yield (first, *rest)


def best(weight: list[float], slots: int, ranks: int) -> float:
    """The load of the busiest rank in the best of all placements."""
    found = float("inf")

    def fill(left: list[float], load: list[float], taken: list[int]) -> None:
        nonlocal found
        if not left:
            found = min(found, max(load))
            return
        for rank in range(ranks):
            alike = any(load[r] == load[rank] and taken[r] == taken[rank] for r in range(rank))
            if taken[rank] < slots // ranks and not alike and load[rank] + left[0] < found:
                load[rank] += left[0]
                taken[rank] += 1
                fill(left[1:], load, taken)
                load[rank] -= left[0]
                taken[rank] -= 1

    for copies in copies_of(len(weight), slots):
        loads = [w / c for w, c in zip(weight, copies, strict=True) for _ in range(c)]
        fill(sorted(loads, reverse=True), [0.0] * ranks, [0] * ranks)
    return found


TINY = [(4, 4, 2), (6, 6, 2), (6, 6, 3), (4, 6, 2), (4, 6, 3), (5, 6, 3), (7, 8, 4), (8, 8, 4), (3, 4, 4),
        (2, 4, 2), (3, 8, 4), (1, 4, 2), (6, 8, 2)]  # fmt: skip


def test_no_placement_beats_the_bound() -> None:
    rng = np.random.default_rng(3)
    reached = 0
    for number in range(40 * len(TINY)):
        experts, slots, ranks = TINY[number % len(TINY)]
        kind = int(rng.integers(4))
        weight = loads(rng, kind, 1, experts)[0]
        bound, truth = float(lower_bound(weight, slots, ranks)), best(weight.tolist(), slots, ranks)
        assert bound <= truth * (1 + 1e-12), (weight, slots, ranks)
        assert bound >= max(weight.sum() / ranks, truth / 2) * (1 - 1e-12), (weight, slots, ranks)
        reached += bound > truth * (1 - 1e-12)
    # The mean alone would be reached far less often.
    assert reached > 0.6 * 40 * len(TINY)


@pytest.mark.parametrize(
    ("weight", "slots", "ranks", "bound"),
    [
        ([4, 4, 4, 4], 4, 2, 8),  # the mean
        ([90, 10, 10], 4, 4, 45),
        ([90, 40, 10], 5, 5, 40),  # the third largest of 90, 45, 40, 30 …
        ([9, 1, 1, 0], 4, 2, 9),  # the hottest with the coldest
        ([9, 1, 2, 3], 4, 2, 10),
        ([20, 18, 1, 1, 1, 1, 1, 1], 8, 4, 21),  # one of the two hottest with one of the coldest
        ([11, 9, 5, 4, 3, 0], 6, 3, 11.5),  # the mean of the two hottest with the two coldest
        ([11, 11, 7, 4, 4, 3, 2, 2, 1, 1, 1], 12, 4, 12),  # one of the two hottest is not split
        ([3, 3, 3, 0], 4, 2, 6),  # two of three meet
        ([5, 5, 5, 5, 5, 1, 1, 1], 8, 4, 10),
        ([0, 0, 0, 0], 4, 2, 0),
    ],
)
def test_bound_computed_by_hand(weight: list[int], slots: int, ranks: int, bound: float) -> None:
    assert lower_bound(np.array(weight), slots, ranks) == bound
    assert best([float(w) for w in weight], slots, ranks) >= bound


@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
@settings(max_examples=60)
def test_no_policy_beats_the_bound(seed: int, shape: tuple[int, int, int, int, int]) -> None:
    experts, slots, ranks, nodes, groups = shape
    rng = np.random.default_rng(seed)
    weight = np.stack([loads(rng, int(rng.integers(KINDS)), 3, experts) for _ in range(2)]).astype(np.float64)
    bound = lower_bound(weight, slots, ranks)
    assert bound.shape == (2, 3)
    for window, of_window in zip(weight, bound, strict=True):
        for row, of_row in zip(window, of_window, strict=True):
            assert lower_bound(row, slots, ranks) == of_row
        for policy in POLICIES.values():
            placed = place(policy, Problem(window, slots, ranks, nodes, groups))
            assert (of_window <= busiest(window, placed, ranks) * (1 + 1e-9)).all()


# ---- properties of all policies


def busiest(weight: Array, placed: Array, ranks: int) -> Array:
    """Tokens of each layer's busiest rank, if the copies of an expert share evenly; -1 is an empty slot."""
    load = np.zeros((len(weight), ranks))
    for layer, slots in enumerate(placed.tolist()):
        for slot, expert in enumerate(slots):
            if expert >= 0:
                load[layer, slot * ranks // len(slots)] += weight[layer, expert] / slots.count(expert)
    most: Array = load.max(axis=1)
    return most


@pytest.mark.parametrize("name", list(POLICIES))
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.integers(0, KINDS - 1),
    shape=st.sampled_from(SHAPES),
    windows=st.integers(0, 5),
)
@settings(max_examples=30)
def test_every_expert_has_a_slot_and_the_answer_is_always_the_same(
    name: str, seed: int, kind: int, shape: tuple[int, int, int, int, int], windows: int
) -> None:
    experts, slots, ranks, nodes, groups = shape
    rng = np.random.default_rng(seed)
    series = np.stack([loads(rng, kind, 2, experts) for _ in range(windows)]) if windows else None
    weight = loads(rng, kind, 2, experts) if series is None else series.sum(axis=0)
    current = placements(rng, 2, experts, slots) if seed % 2 else None
    problem = Problem(weight, slots, ranks, nodes, groups, current, series=series)
    placed = place(named(name), problem)  # which raises if it is not valid
    for row in placed.tolist():
        assert set(row) - {-1} == set(range(experts))
        assert name == "layer_budgets" or -1 not in row
    assert (placed == place(named(name), problem)).all()


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("tokens", [0, 1, 1000])
def test_uniform_loads_are_not_placed_worse_than_at_the_start(name: str, tokens: int) -> None:
    for experts, slots, ranks, nodes, groups in SHAPES:
        if slots > experts and name in ("round_robin", "layer_budgets", "biased", "active_experts"):
            continue  # they leave slots empty, or give some experts far more copies than others
        weight = np.full((2, experts), tokens)
        problem = Problem(weight, slots, ranks, nodes, groups, series=weight[None])
        at_start = np.tile(np.arange(slots) % experts, (2, 1))
        found, before = (busiest(weight, each, ranks) for each in (place(named(name), problem), at_start))
        assert (found <= before * (1 + 1e-9)).all()


def test_swift_balance_moves_fewer_weights_than_the_global_algorithm() -> None:
    rng = np.random.default_rng(4)
    fetched = {"deepseek": 0, "swift_balance": 0}
    for experts, slots, ranks, _, _ in SHAPES:
        weight = loads(rng, 2, 3, experts)
        current = placements(rng, 3, experts, slots)
        for name in fetched:
            placed = place(named(name), Problem(weight, slots, ranks, current=current))
            for old, new in zip(current, placed, strict=True):
                pairs = zip(old.reshape(ranks, -1).tolist(), new.reshape(ranks, -1).tolist(), strict=True)
                fetched[name] += sum(len(set(after) - set(before)) for before, after in pairs)
    assert 0 < fetched["swift_balance"] < 0.5 * fetched["deepseek"]


def test_flash_lb_separates_experts_that_are_hot_together() -> None:
    """By their sums the experts are alike; only the series shows which of them are hot in the same window."""
    hot_in = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    series = 10 + 90 * (np.arange(8)[:, None, None] % 4 == hot_in)
    problem = Problem(series.sum(axis=0), 8, 4, series=series)
    most = {
        name: {float(busiest(window, place(named(name), problem), 4)[0]) for window in series}
        for name in ("flash_lb", "deepseek")
    }
    assert most == {"flash_lb": {110.0}, "deepseek": {200.0}}


# ---- budgets of layers


def test_allocation_of_a_budget_is_the_best_of_all() -> None:
    rng = np.random.default_rng(9)
    for _ in range(300):
        layers, choices = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        budget = int(rng.integers(0, layers * choices + 2))
        cost = rng.integers(0, 6, (layers, choices)).astype(float)
        every = [
            (sum(cost[layer, n] for layer, n in enumerate(units)), sum(units))
            for units in product(range(choices), repeat=layers)
            if sum(units) <= budget
        ]
        chosen = allocate(cost, budget)
        assert (sum(cost[layer, n] for layer, n in enumerate(chosen)), chosen.sum()) == min(every)


def test_layer_budgets_give_the_redundant_slots_to_the_layers_that_need_them() -> None:
    even, skewed = [10] * 8, [100, 90, 1, 1, 1, 1, 1, 1]
    placed = place(named("layer_budgets"), Problem(np.array([even, skewed, even, skewed]), 12, 4))
    empty = (placed == -1).sum(axis=1).tolist()
    assert empty == [4, 0, 4, 0]
    assert (placed[0].reshape(4, 3)[:, 2] == -1).all()
    with_all = place(named("deepseek"), Problem(np.array([skewed]), 12, 4))
    assert placed[1].tolist() == with_all[0].tolist()


def test_layer_budgets_beat_the_same_number_of_slots_in_each_layer() -> None:
    rng = np.random.default_rng(11)
    total = np.zeros(2)
    for _ in range(20):
        weight = rng.lognormal(3, rng.uniform(0, 2, (6, 1)), (6, 16))
        shared = place(named("layer_budgets"), Problem(weight, 24, 4))
        alike = place(named("deepseek"), Problem(weight, 20, 4))
        assert (shared >= 0).sum() <= alike.size
        total += busiest(weight, shared, 4).sum(), busiest(weight, alike, 4).sum()
        assert busiest(weight, shared, 4).sum() <= busiest(weight, alike, 4).sum() * (1 + 1e-6)
    assert total[0] < 0.97 * total[1]


# ---- active experts


def expected_active(series: Array, placed: Array, ranks: int) -> Array:
    """The most active experts that a rank expects: each token on any copy with the same probability."""
    most = np.zeros(len(placed))
    for layer, slots in enumerate(placed.tolist()):
        ranks_of = [0.0] * ranks
        for slot, expert in enumerate(slots):
            copies = slots.count(expert)
            chance = np.mean([1 - (1 - 1 / copies) ** int(tokens) for tokens in series[:, layer, expert]])
            ranks_of[slot * ranks // len(slots)] += float(chance)
        most[layer] = max(ranks_of)
    return most


def test_active_experts_are_close_to_the_best_of_all_placements() -> None:
    rng = np.random.default_rng(13)
    ratios = []
    for _ in range(60):
        experts, slots, ranks = TINY[int(rng.integers(4))]
        if slots > experts:
            continue
        series = rng.poisson(rng.lognormal(-1, 1, (1, 1, experts)), (40, 1, experts))
        found = expected_active(series, place(active, Problem(series[0], slots, ranks, series=series)), ranks)
        chance = (series[:, 0] > 0).mean(axis=0)
        ratios.append(float(found[0]) / max(best(chance.tolist(), slots, ranks), 1e-9))
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 1.03
    assert max(ratios) < 1.2


def test_active_experts_balances_another_figure_than_tokens() -> None:
    """One expert has all tokens of its layer in a few steps, the others one token in most steps."""
    rng = np.random.default_rng(17)
    series = (rng.random((50, 1, 8)) < [0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1]).astype(int)
    series[:, 0, 4:] *= 400
    problem = Problem(series.sum(axis=0), 8, 2, series=series)
    by_active, by_tokens = (place(named(name), problem) for name in ("active_experts", "deepseek"))
    assert expected_active(series, by_active, 2) < expected_active(series, by_tokens, 2) + 1e-9
    assert sorted((by_active.reshape(2, 4) < 4).sum(axis=1)) == [2, 2]


def test_redundant_slots_of_active_experts_go_to_cold_ones() -> None:
    series = np.array([[[5, 5, 5, 0]], [[5, 5, 5, 0]]])
    placed = place(active, Problem(series.sum(axis=0), 6, 2, series=series))
    assert Counter(placed[0].tolist()) == {0: 1, 1: 1, 2: 1, 3: 3}


# ---- custom policies and errors

MINE = """
import numpy as np
number = 7
def by_hand(problem):
    problem.weight[:] = 0
    return [[1, 0, 1]]
def torchs(problem):
    import torch
    return torch.tensor([[2, 1, 0]])
def shape(problem):
    return np.zeros((1, 4), int)
def fractions(problem):
    return np.zeros((1, 3))
def ragged(problem):
    return [[1], [1, 2]]
def beyond(problem):
    return [[0, 1, 3]]
def broken(problem):
    raise ValueError("two\\nlines")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "mine_of_test.py").write_text(MINE)
    (tmp_path / "broken_of_test.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine_of_test", raising=False)


@pytest.mark.usefixtures("mine")
def test_custom_policy() -> None:
    weight = np.array([[3, 5]])
    problem = Problem(weight, 3, 1)
    placed = place(named("mine_of_test:by_hand"), problem)
    assert placed.tolist() == [[1, 0, 1]]
    assert placed.dtype == np.int32
    assert weight.tolist() == [[3, 5]]
    assert place(named("mine_of_test:torchs"), Problem(np.array([[1, 1, 1]]), 3, 1)).tolist() == [[2, 1, 0]]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nothing",
            "there is no policy 'nothing'; choose deepseek, sglang, vllm, swift_balance, flash_lb, biased, ",
        ),
        ("mine_of_test:", "there is no policy"),
        (":by_hand", "there is no policy"),
        ("mine_of_test:absent", "the module mine_of_test has no function absent"),
        ("mine_of_test:number", "the module mine_of_test has no function number"),
        ("no_such_of_test:f", "importing no_such_of_test failed: ModuleNotFoundError"),
        ("broken_of_test:f", "importing broken_of_test failed: ZeroDivisionError"),
        ("..up:f", "importing ..up failed"),
    ],
)
def test_unknown_policy_is_rejected(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        named(name)
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("shape", r"policy shape returned int64 \(1, 4\), not integers \(1, 3\)"),
        ("fractions", r"policy fractions returned float64 \(1, 3\), not integers"),
        ("ragged", "policy ragged failed: ValueError"),
        ("beyond", "policy beyond placed experts outside of 0 to 2"),
        ("by_hand", "policy by_hand left expert 2 of layer index 0 without a slot"),
        ("broken", "policy broken failed: ValueError: two lines"),
    ],
)
def test_invalid_answer_is_rejected(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        place(named(f"mine_of_test:{name}"), Problem(np.array([[1, 2, 3]]), 3, 1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": np.ones(3)}, "shape"),
        ({"weight": np.ones((0, 4))}, "shape"),
        ({"weight": np.array([[1, -1, 1, 1]])}, "not negative"),
        ({"weight": np.array([[1, np.nan, 1, 1]])}, "finite"),
        ({"num_physical_experts": 2}, "2 slots cannot hold 4 logical experts"),
        ({"ep_size": 4}, "6 slots cannot be divided evenly among 4 EP ranks"),
        ({"ep_size": 0}, "at least 1"),
        ({"num_nodes": 0}, "at least 1"),
        ({"num_groups": 3}, "4 logical experts cannot be divided evenly among 3 groups"),
        ({"num_groups": 4, "num_nodes": 4}, "2 EP ranks cannot be divided evenly among 4 nodes"),
        ({"current": np.zeros((1, 5), np.int32)}, "current placement"),
        ({"series": np.zeros((3, 1, 5))}, r"the series of loads has the shape \(3, 1, 5\)"),
        ({"series": np.zeros((0, 1, 4))}, "the series of loads"),
    ],
)
@pytest.mark.parametrize("name", ["deepseek", "sglang", "vllm", "biased", "layer_budgets"])
def test_inconsistent_problem_is_rejected(name: str, changes: dict[str, Any], says: str) -> None:
    fits: dict[str, Any] = {"weight": np.ones((1, 4)), "num_physical_experts": 6, "ep_size": 2}
    with pytest.raises(UsageError, match=says):
        place(named(name), Problem(**fits | changes))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("round_robin", "layer_budgets")])
def test_layers_with_fewer_experts_are_placed_as_problems_of_their_own(name: str) -> None:
    rng = np.random.default_rng(12)
    counts = np.array([8, 5, 8, 3])
    weight = rng.integers(1, 100, (4, 8)) * (np.arange(8) < counts[:, None])
    if name == "swift_balance":  # it takes the mean tokens of all layers from the first one
        weight = np.tile(weight[:1], (4, 1)) * (np.arange(8) < counts[:, None])
    placed = place(POLICIES[name], Problem(weight, 12, 4, experts=counts, series=weight[None]))
    for layer, count in enumerate(counts.tolist()):
        own_weight = weight[[layer], :count]
        own = place(POLICIES[name], Problem(own_weight, 12, 4, series=own_weight[None]))
        assert placed[layer].tolist() == own[0].tolist()
        assert set(placed[layer].tolist()) == set(range(count))
