"""Tokens dealt to replicas: compared with every way in which they can be dealt, and with numpy's draws."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze.dispatch.deal import Dealt, binomial, random_bits, replica_draws
from eplb_analyze.dispatch.rule import Replicas, Tokens, rank_loads
from eplb_analyze.dispatch.spread import Spread

Array = np.ndarray[Any, Any]
STEPS = 40_000


def expected_busiest(tokens: list[int], slots: list[int], ranks: int) -> tuple[float, float]:
    """Mean and standard deviation of the busiest rank's tokens over all ways in which tokens are dealt."""
    per_rank = len(slots) // ranks
    where = [[s // per_rank for s, held in enumerate(slots) if held == e] for e in range(len(tokens))]
    each = [where[expert] for expert, count in enumerate(tokens) for _ in range(count)]
    found = [max(Counter(ways).values(), default=0) for ways in itertools.product(*each)]
    return float(np.mean(found)), float(np.std(found))


@pytest.mark.parametrize(
    ("tokens", "slots", "ranks"),
    [
        ([1], [0, 0], 2),  # one token is on one rank: 1, not a half
        ([2], [0, 0], 2),
        ([3, 1], [0, 0, 0, 1], 4),
        ([3, 2, 1], [0, 1, 0, 2, 0, 1], 3),
        ([4, 3, 0], [0, 1, 1, 0, 2, 0], 2),
        ([5, 2], [0, 0, 1, 1, 0, 1, 0, 1], 4),
        ([2, 4, 1], [0, 1, -1, 2, 1, 1], 3),
    ],
)
def test_mean_of_the_busiest_rank_is_that_of_all_ways_to_deal(
    tokens: list[int], slots: list[int], ranks: int
) -> None:
    mean, deviation = expected_busiest(tokens, slots, ranks)
    load, placement = np.tile(tokens, (STEPS, 1)), np.array(slots)
    deals = random_bits(np.arange(STEPS), 0, replica_draws(placement))[np.newaxis]
    busiest, inverse, _ = Dealt().busiest_rank(Tokens(load.T), Replicas(placement, ranks), deals)
    assert busiest.mean() == pytest.approx(mean, abs=5 * deviation / STEPS**0.5 + 2e-3 * mean)
    np.testing.assert_allclose(inverse, 1 / busiest)


@pytest.mark.parametrize("replicas", [2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 400])
def test_replicas_share_tokens_as_independent_draws_do(tokens: int, replicas: int) -> None:
    slots = np.zeros(replicas, np.int32)
    bits = random_bits(np.arange(STEPS), 3, replica_draws(slots))
    dealt = Dealt().slot_loads(Tokens(np.full((1, STEPS), tokens)), Replicas(slots, 1), bits).T
    drawn = np.random.default_rng(0).multinomial(tokens, [1 / replicas] * replicas, STEPS)
    variance = tokens / replicas * (1 - 1 / replicas)
    np.testing.assert_allclose(dealt.mean(axis=0), tokens / replicas, atol=6 * (variance / STEPS) ** 0.5)
    np.testing.assert_allclose(dealt.var(axis=0), variance, rtol=0.05)
    expected, own = (each.max(axis=1) for each in (drawn, dealt))
    assert own.mean() == pytest.approx(expected.mean(), abs=6 * expected.std() / STEPS**0.5 + 2e-3)


problems = st.integers(1, 5).flatmap(
    lambda experts: st.tuples(
        st.lists(st.integers(-1, experts - 1), min_size=1, max_size=12),
        st.lists(st.lists(st.integers(0, 300), min_size=experts, max_size=experts), min_size=1, max_size=5),
    )
)


@given(
    problem=problems,
    in_rounds=st.floats(0, 1),
    token_replication=st.integers(1, 3),
    stream=st.integers(0, 99),
)
@settings(max_examples=300)
def test_no_token_is_lost_or_split(
    problem: tuple[list[int], list[list[int]]], in_rounds: float, token_replication: int, stream: int
) -> None:
    placement, load = np.array(problem[0], np.int32), np.array(problem[1], np.int32)
    bits = random_bits(np.arange(len(load)), stream, replica_draws(placement))
    dealt = Dealt(in_rounds, token_replication).slot_loads(Tokens(load.T), Replicas(placement, 1), bits).T
    assert dealt.dtype == load.dtype
    assert (dealt >= 0).all()
    assert not dealt[:, placement < 0].any()
    for expert in range(load.shape[1]):
        own = dealt[:, placement == expert]
        if own.shape[1]:
            np.testing.assert_array_equal(own.sum(axis=1), load[:, expert])
            # A token that is counted several times is on one slot; what is left over is on the last.
            assert not (own[:, :-1] % token_replication).any()
        if own.shape[1]:
            rounds = load[:, expert] // token_replication * in_rounds // own.shape[1] * token_replication
            assert (own.min(axis=1) >= rounds - token_replication).all()


@given(first=st.integers(0, 2**40), cut=st.integers(0, 50), stream=st.integers(0, 1000))
def test_draws_depend_on_the_step_and_not_on_how_steps_are_read(first: int, cut: int, stream: int) -> None:
    steps = np.arange(first, first + 50)
    parts = [random_bits(part, stream, 4) for part in (steps[:cut], steps[cut:])]
    np.testing.assert_array_equal(random_bits(steps, stream, 6)[:4], np.concatenate(parts, axis=1))


def test_streams_and_draws_are_independent() -> None:
    bits = [random_bits(np.arange(STEPS), stream, 2) / 2**32 for stream in (0, 1, 17)]
    correlation = np.corrcoef(np.concatenate(bits))
    assert np.abs(correlation - np.eye(6)).max() < 6 / STEPS**0.5


def test_rank_loads_are_sums_of_consecutive_slots() -> None:
    load = np.random.default_rng(0).integers(0, 9, (12, 7)).astype(np.int32)
    expected = np.stack([load[first : first + 3].sum(axis=0) for first in range(0, 12, 3)])
    np.testing.assert_array_equal(rank_loads(load, 4), expected)
    assert rank_loads(load, 4).dtype == np.int32
    expected = np.stack([(load[first : first + 3] > 4).sum(axis=0) for first in range(0, 12, 3)])
    np.testing.assert_array_equal(rank_loads(load > 4, 4), expected)


def test_quantiles_of_one_token() -> None:
    share = binomial(
        np.ones((1, 1 << 16), np.int64),
        np.array([[1 / 4]]),
        np.arange(1 << 16, dtype=np.uint32)[np.newaxis] << np.uint32(16),
    )
    assert share.mean() == pytest.approx(1 / 4, abs=1e-3)


@given(tokens=st.integers(0, 2**40), replicas=st.integers(2, 9), stream=st.integers(0, 99))
@settings(max_examples=100)
def test_any_number_of_tokens_is_dealt_fairly(tokens: int, replicas: int, stream: int) -> None:
    """Also more than float32 holds exactly, beside an expert with few, whose draws come from tables."""
    steps, slots = 500, np.repeat([0, 1], replicas).astype(np.int32)
    load = np.tile(np.array([[tokens], [min(tokens, 40)]]), steps)
    dealt = Dealt().slot_loads(Tokens(load), Replicas(slots, 1), random_bits(np.arange(steps), stream, 20))
    assert (dealt >= 0).all()
    for expert, own in enumerate(np.split(dealt, 2)):
        np.testing.assert_array_equal(own.sum(axis=0), load[expert])
        deviation = (load[expert, 0] * (1 / replicas) * (1 - 1 / replicas) / steps) ** 0.5
        np.testing.assert_allclose(own.mean(axis=1), load[expert, 0] / replicas, atol=6 * deviation + 0.01)


# ---- what a recording says of the dispatch

SLOTS = np.array([0, 1, 2, 3, 0, 1, 0, -1])


def recorded(kind: str, steps: int = 2000, mean: int = 40) -> Array:
    rng, load = np.random.default_rng(1), np.zeros((steps, len(SLOTS)), np.int64)
    for expert in range(4):
        at = np.flatnonzero(expert == SLOTS)
        for step, tokens in enumerate(rng.poisson(mean, steps)):
            if kind == "random":
                load[step, at] = rng.multinomial(tokens, [1 / len(at)] * len(at))
            elif kind == "rounds":
                load[step, at] = tokens // len(at)
                load[step, at[: tokens % len(at)]] += 1
            else:
                load[step, at[0]] = tokens
    return load


@pytest.mark.parametrize("token_replication", [1, 4])
def test_recorded_replicas_show_how_tokens_are_dealt(token_replication: int) -> None:
    found = {}
    for kind in ("random", "rounds", "first"):
        spread = Spread(token_replication)
        spread.add(recorded(kind) * token_replication, SLOTS)
        assert spread.ratio is not None
        found[kind] = spread.ratio, spread.dispatch().in_rounds
    assert found["random"][0] == pytest.approx(1, abs=6 * (2 / (2000 * 3)) ** 0.5)
    assert found["random"][1] < 0.1
    assert found["rounds"][0] < 0.02
    assert found["rounds"][1] > 0.9
    assert found["first"][0] > 20
    assert found["first"][1] == 0


def test_dispatch_in_rounds_splits_evenly() -> None:
    load = recorded("rounds").astype(np.int64)
    logical = np.stack([load[:, expert == SLOTS].sum(axis=1) for expert in range(4)], axis=1)
    bits = random_bits(np.arange(len(load)), 0, replica_draws(SLOTS))
    dealt = Dealt(1.0).slot_loads(Tokens(logical.T), Replicas(SLOTS, 1), bits).T
    assert np.abs(dealt - load).max() <= 2


def test_recording_without_replicas_says_nothing_of_the_dispatch() -> None:
    spread = Spread()
    spread.add(np.ones((10, 4), np.int64), np.arange(4))
    assert (spread.ratio, spread.dispatch()) == (None, Dealt())


def test_few_recorded_tokens_do_not_make_the_dispatch_look_even() -> None:
    """Two replicas and two tokens, one each by chance, are no proof."""
    spread = Spread()
    spread.add(np.array([[1, 1]]), np.array([0, 0]))
    assert spread.ratio == 0
    assert spread.dispatch().in_rounds == 0
