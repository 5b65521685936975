"""Even splitting and the optimum of each step: compared with brute force, scipy's LP, and one another."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from eplb_analyze.dispatch import lp
from eplb_analyze.dispatch.deal import ByPosition, Dealt, position_shares, random_bits, replica_draws
from eplb_analyze.dispatch.even import Even
from eplb_analyze.dispatch.named import LP, MEASURED, NAMES, named
from eplb_analyze.dispatch.rule import Replicas, Tokens, busiest_of
from eplb_analyze.errors import UsageError
from eplb_analyze.metrics.cost import EXCHANGE_RATES, effort_of

Array = np.ndarray[Any, Any]


def brute_force(load: list[int], slots: list[int], ranks: int) -> Fraction:
    """The largest mean over all sets of ranks of the tokens that cannot leave them."""
    per_rank = len(slots) // ranks
    on = [{s // per_rank for s, held in enumerate(slots) if held == e} for e in range(len(load))]
    best = Fraction(0)
    for size in range(1, ranks + 1):
        for chosen in itertools.combinations(range(ranks), size):
            inside = sum(n for n, where in zip(load, on, strict=True) if where and where <= set(chosen))
            best = max(best, Fraction(inside, size))
    return best


def by_scipy(load: Array, slots: Array, ranks: int) -> float:
    """The linear program itself: split each expert's tokens over its slots so that the most is least."""
    held = np.flatnonzero(slots >= 0)
    cost = np.zeros(len(held) + 1)
    cost[-1] = 1
    per_rank = len(slots) // ranks
    most = np.zeros((ranks, len(held) + 1))
    most[held // per_rank, np.arange(len(held))] = 1
    most[:, -1] = -1
    experts = np.unique(slots[held])
    whole = np.zeros((len(experts), len(held) + 1))
    whole[np.searchsorted(experts, slots[held]), np.arange(len(held))] = 1
    found = linprog(cost, most, np.zeros(ranks), whole, load[experts], method="highs")
    return float(found.fun)


@st.composite
def small(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    ranks, per_rank, experts = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    slots = draw(st.lists(st.integers(-1, experts - 1), min_size=ranks * per_rank, max_size=ranks * per_rank))
    tokens = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    return draw(st.lists(tokens, min_size=1, max_size=4)), slots, ranks


@given(small())
@settings(max_examples=400)
def test_optimum_is_that_of_brute_force(problem: tuple[list[list[int]], list[int], int]) -> None:
    load, slots, ranks = problem
    found = lp.least_maximum(np.array(load).T, np.array(slots), ranks)
    expected = [float(brute_force(tokens, slots, ranks)) for tokens in load]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    near = lp.least_maximum(np.array(load).T, np.array(slots), ranks, lp.TOLERANCE)
    assert (near <= found * (1 + 1e-12)).all()
    assert (near >= found * (1 - lp.TOLERANCE)).all()


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks"), [(64, 16, 8), (128, 32, 16), (32, 32, 16), (12, 36, 16)]
)
def test_optimum_is_that_of_a_solver_of_linear_programs(experts: int, redundant: int, ranks: int) -> None:
    rng = np.random.default_rng(experts)
    for skew in (0.3, 1.0, 2.0):
        share = rng.lognormal(0, skew, experts)
        load = rng.multinomial(40 * experts, share / share.sum(), 6)
        more = rng.choice(experts, redundant, p=share / share.sum())
        slots = rng.permutation(np.concatenate([np.arange(experts), more]))
        expected = [by_scipy(tokens, slots, ranks) for tokens in load]
        np.testing.assert_allclose(lp.least_maximum(load.T, slots, ranks), expected, rtol=1e-8)


def test_optimum_where_balancing_pairs_is_slow() -> None:
    """A chain: each expert is on two neighbors, and all tokens are at one end."""
    ranks = 40
    slots = np.array([e for rank in range(ranks) for e in (max(0, rank - 1), min(rank, ranks - 2))])
    load = np.zeros((3, ranks - 1), np.int64)
    load[0, 0], load[1], load[2, ::2] = 1000, 10, 500
    expected = [500.0, 10 * (ranks - 1) / ranks, by_scipy(load[2], slots, ranks)]
    np.testing.assert_allclose(lp.least_maximum(load.T, slots, ranks), expected, rtol=1e-9)


@given(small(), st.integers(0, 30))
@settings(max_examples=200)
def test_no_dispatch_beats_the_optimum(problem: tuple[list[list[int]], list[int], int], stream: int) -> None:
    load, slots, ranks = np.array(problem[0]), np.array(problem[1], np.int32), problem[2]
    deals = random_bits(np.arange(len(load)), stream, replica_draws(slots))[np.newaxis]
    routed = load.sum(axis=1)
    experts = load.shape[1]
    least = lp.least_maximum(load.T, slots, ranks)
    for name in NAMES:
        if name == LP:
            continue
        dispatch = named(name, Dealt(0.5))
        tokens = Tokens(load.T, routed, routed // ranks)
        for choose in (dispatch.at_start, dispatch.rearranged):
            table = choose and choose(slots[np.newaxis], experts, ranks, 1)[0]
            busiest, inverse, _ = dispatch.rule.busiest_rank(tokens, Replicas(slots, ranks, table), deals)
            assert (busiest >= least * (1 - 1e-12)).all(), name
            expected = np.divide(1, busiest, out=np.zeros(len(load)), where=busiest > 0)
            np.testing.assert_allclose(inverse, expected)


@given(small())
@settings(max_examples=150)
def test_even_splitting_gives_every_replica_the_same(problem: tuple[list[list[int]], list[int], int]) -> None:
    load, slots, ranks = np.array(problem[0]), np.array(problem[1], np.int32), problem[2]
    found = Even().slot_loads(Tokens(load.T), Replicas(slots, ranks)).T
    for slot, expert in enumerate(slots.tolist()):
        copies = (slots == expert).sum()
        np.testing.assert_allclose(found[:, slot], load[:, expert] / copies if expert >= 0 else 0)


def test_uniform_routing_with_every_expert_everywhere_is_balanced_by_even_splitting_alone() -> None:
    ranks, experts, steps = 8, 4, 500
    slots, load = np.tile(np.arange(experts), ranks), np.full((experts, steps), 13)
    tokens, replicas = Tokens(load), Replicas(slots, ranks)
    deals = random_bits(np.arange(steps), 0, replica_draws(slots))[np.newaxis]
    mean = 13 * experts / ranks
    np.testing.assert_allclose(lp.least_maximum(load, slots, ranks), mean)
    np.testing.assert_allclose(Even().busiest_rank(tokens, replicas, deals)[0], mean)
    assert Dealt().busiest_rank(tokens, replicas, deals)[0].mean() > 1.3 * mean  # there are no half tokens


def test_a_slot_with_half_a_token_is_active_half_of_the_time() -> None:
    tokens, replicas = Tokens(np.array([[1], [6]])), Replicas(np.array([0, 1, 0, 1]), 2)
    busiest, _, slowest = Even().busiest_rank(
        tokens, replicas, np.empty((1, 0, 1), np.uint32), [EXCHANGE_RATES[0]]
    )
    assert (busiest[0], slowest[0, 0]) == (3.5, 1.5)


def test_optimum_says_nothing_of_active_experts() -> None:
    tokens, replicas = Tokens(np.array([[1], [6]])), Replicas(np.array([0, 1, 0, 1]), 2)
    deals = np.empty((1, 0, 1), np.uint32)
    busiest, inverse, slowest = lp.LeastMaximum().busiest_rank(tokens, replicas, deals, EXCHANGE_RATES)
    assert busiest[0] == pytest.approx(3.5)
    assert inverse[0] == pytest.approx(1 / 3.5)
    assert np.isnan(slowest).all()


def test_unknown_name_is_refused() -> None:
    assert named(MEASURED, Dealt(0.25)).rule == Dealt(0.25)
    with pytest.raises(UsageError, match="no dispatch 'evne'; known: measured, even, random, vllm"):
        named("evne", Dealt())


# ---- positions


def test_shares_of_positions_are_counted() -> None:
    batch = np.array([1, 2, 7, 120, 4096, 10**6, 0, -1])
    for copies in (2, 3, 5):
        for hashed in (False, True):
            found = position_shares(batch, copies, hashed=hashed)
            np.testing.assert_allclose(found.sum(axis=0), 1)
            for step, size in enumerate(batch[:4].tolist()):
                picks = [(i * 2654435769 % 2**32 if hashed else i) % copies for i in range(size)]
                np.testing.assert_allclose(found[:, step], np.bincount(picks, minlength=copies) / size)
            np.testing.assert_allclose(found[:, 5:], 1 / copies)


def test_whole_batch_is_split_as_its_positions_are() -> None:
    """If every token chooses the expert, nothing is left to chance but the rounding."""
    slots, batch = np.zeros(3, np.int32), np.array([7, 120, 511])
    bits = random_bits(np.arange(3), 0, 2)
    dealt = ByPosition().slot_loads(Tokens(batch[np.newaxis], batch, batch), Replicas(slots, 3), bits).T
    np.testing.assert_allclose(dealt, position_shares(batch, 3).T * batch[:, np.newaxis], atol=1e-9)


def test_unknown_batch_leaves_all_to_chance() -> None:
    load, slots = np.random.default_rng(0).integers(0, 99, (3, 50)), np.array([0, 1, 2, 0, 1, 0])
    bits = random_bits(np.arange(50), 0, replica_draws(slots))
    replicas, unknown = Replicas(slots, 2), np.full(50, -1)
    expected = Dealt().slot_loads(Tokens(load), replicas, bits)
    for tokens in (Tokens(load), Tokens(load, unknown, unknown)):
        found = ByPosition().slot_loads(tokens, replicas, bits)
        assert np.abs(found - expected).max() <= 1  # by the steps of its table


@given(data=st.data())
@settings(max_examples=200)
def test_slowest_rank_equals_plain_loops(data: st.DataObject) -> None:
    least = data.draw(st.sampled_from([0, 1]))  # with 1, all ranks have equally many active slots
    shape = data.draw(st.tuples(st.just(6), st.integers(1, 4)))
    loads = data.draw(arrays(np.int32, shape, elements=st.integers(least, 3)))
    busiest, _, slowest = busiest_of(loads, 3, EXCHANGE_RATES)
    for step, column in enumerate(loads.T.reshape(-1, 3, 2)):
        assert busiest[step] == column.sum(axis=1).max()
        for found, rate in zip(slowest[:, step], EXCHANGE_RATES, strict=True):
            efforts = [effort_of(np.count_nonzero(own), own.sum(), rate) for own in column]
            assert found == pytest.approx(max(efforts))
