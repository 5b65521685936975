"""The formulas against plain loops, over random loads; and the numbers that design and docs quote."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eplb_analyze.metrics import formulas
from eplb_analyze.metrics.formulas import FORMULAS, Spread, Terms

loads = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6),
    elements=st.one_of(st.just(0.0), st.integers(0, 10**6).map(float)),
)


@pytest.mark.parametrize("name", FORMULAS)
@given(T=loads)
@settings(max_examples=200)
def test_formula_equals_plain_loops(name: str, T: np.ndarray) -> None:
    expected = reference.per_step(name, T)
    np.testing.assert_allclose(FORMULAS[name].per_step(T), expected, rtol=1e-12, atol=1e-12)


@given(T=loads)
@settings(max_examples=50)
def test_balancedness_of_a_layer_is_that_of_a_model_with_one_layer(T: np.ndarray) -> None:
    for layer in range(T.shape[1]):
        expected = FORMULAS["balancedness"].per_step(T[:, layer : layer + 1])
        found = formulas.balancedness_of_layer(T[:, layer].T.astype(float), T.shape[2])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", FORMULAS)
@given(T=loads)
@settings(max_examples=50)
def test_per_layer_equals_the_formula_of_a_one_layer_model(name: str, T: np.ndarray) -> None:
    found = formulas.per_layer(FORMULAS[name], T)
    for layer in range(T.shape[1]):
        expected = reference.per_step(name, T[:, layer : layer + 1])
        np.testing.assert_allclose(found[:, layer], expected, rtol=1e-12, atol=1e-12)


@given(T=loads)
@settings(max_examples=100)
def test_formulas_stay_within_their_bounds(T: np.ndarray) -> None:
    balance, imbalance = (
        formulas.FORMULAS["balancedness"].per_step(T),
        formulas.FORMULAS["imbalance"].per_step(T),
    )
    known = ~np.isnan(balance)
    assert (balance[known] <= 1 + 1e-12).all()
    assert (balance[known] > 0).all()
    assert (imbalance[known] >= 1 - 1e-12).all()
    assert (np.isnan(imbalance) == ~known).all()


few_tokens = hnp.arrays(
    np.int64,
    st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(1, 20)),
    elements=st.one_of(st.integers(0, 2), st.integers(0, 2**40)),
)


@given(T=few_tokens, per_token=st.integers(1, 3), data=st.data())
@settings(max_examples=300)
def test_ranks_that_tie_share_the_step(T: np.ndarray, per_token: int, data: st.DataObject) -> None:
    often, cost = (np.array(each, float) for each in reference.waiting(T))
    cut = data.draw(st.integers(0, T.shape[1]))
    terms = Terms(len(T), T.shape[1], T.shape[2], per_token)
    for first, part in ((0, T[:, :cut]), (cut, T[:, cut:])):
        if part.shape[1]:
            terms.add(first, part)
    np.testing.assert_allclose(terms.by_slowest(), often, atol=1e-12)
    # Each excess is a difference of two roundings.
    rounding = 2 * len(T) * np.spacing(float(T.max(initial=0)))
    np.testing.assert_allclose(terms.by_slowest(terms.excess), cost / per_token, rtol=1e-9, atol=rounding)
    order = np.array(data.draw(st.permutations(range(len(T)))), np.intp)
    joined = Terms.concat([terms.select(order[:1]), terms.select(order[1:])])
    np.testing.assert_allclose(joined.by_slowest(), often, atol=1e-12)


def test_every_rank_of_a_uniform_batch_is_the_slowest_about_equally_often() -> None:
    # A token on average for each rank: in most steps several ranks have the most.
    rng = np.random.default_rng(8)
    T = rng.multinomial(32, np.full(32, 1 / 32), (4000, 1))
    share = Terms.of(T).by_slowest()[0] / len(T)
    # A share of a step is at most 1, so its variance is at most its mean.
    assert np.abs(share - 1 / 32).max() < 5 * np.sqrt(1 / 32 / 4000)


def test_ranks_with_equal_tokens_are_never_the_slowest() -> None:
    assert not Terms.of(np.full((3, 2, 5), 7)).by_slowest().any()
    assert Terms.of(np.array([[[4, 9, 9, 9]]])).by_slowest().tolist() == [[0, *[1 / 3] * 3]]


def test_vllm_legacy_is_wrong_if_all_layers_have_the_same_skew() -> None:
    T = np.array([[[100.0, 200.0], [100.0, 200.0]]])
    assert formulas.FORMULAS["balancedness"].per_step(T)[0] == 0.75
    assert formulas.FORMULAS["vllm-legacy"].per_step(T)[0] == 1.0
    assert formulas.FORMULAS["vllm"].per_step(T)[0] == 0.75
    assert formulas.FORMULAS["trtllm"].per_step(T)[0] == pytest.approx(1 / 3)


def test_spread_leaves_out_steps_without_an_active_layer() -> None:
    spread = Spread.of(np.array([0.5, np.nan, 0.25, 1.0]), np.array([10, 11, 12, 13]))
    assert (spread.min, spread.min_step) == (0.25, 12)
    assert (spread.max, spread.max_step) == (1.0, 13)
    assert spread.mean == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert spread.p50 == 0.5


def test_spread_of_no_steps_is_none() -> None:
    assert set(vars(Spread.of(np.array([np.nan]), np.array([1]))).values()) == {None}


def test_large_counts_of_narrow_integers_do_not_overflow() -> None:
    counts = np.full((2, 1, 3), 2**31 - 1, np.int32)
    terms = Terms.of(counts)
    assert (terms.mean == 2**31 - 1).all()
    assert (terms.recorded == 3 * (2**31 - 1)).all()
