"""`near_sources`, against all numberings of the ranks, and an assignment against scipy's."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from eplb_analyze.errors import UsageError
from eplb_analyze.policies import Problem, named, place
from eplb_analyze.policies.near_sources import assign

Array = np.ndarray[Any, Any]


@given(st.integers(1, 20), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60)
def test_assignment_is_the_best_one(size: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(-3, 4, (size, size)).astype(float) if ties else rng.normal(size=(size, size))
    columns = assign(cost)
    assert sorted(columns.tolist()) == list(range(size))
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[np.arange(size), columns].sum() == pytest.approx(best, abs=1e-9)


def stays(slots: Array, sent: Array, nodes: int) -> tuple[float, float]:
    """Expected tokens that stay on their node, and on their rank, token by token of each source."""
    ranks, experts = sent.shape
    on_node = on_rank = 0.0
    for source, expert in itertools.product(range(ranks), range(experts)):
        at = np.flatnonzero(slots == expert) * ranks // len(slots)
        each = sent[source, expert] / len(at)
        on_rank += each * (at == source).sum()
        on_node += each * (at * nodes // ranks == source * nodes // ranks).sum()
    return on_node, on_rank


@given(st.sampled_from([(4, 2), (4, 1), (4, 4), (6, 3), (6, 2)]), st.integers(0, 4), st.integers(0, 2**31))
@settings(max_examples=15)
def test_no_other_numbering_keeps_more_tokens_on_their_node(
    size: tuple[int, int], redundant: int, seed: int
) -> None:
    ranks, nodes = size
    rng = np.random.default_rng(seed)
    sent = rng.integers(0, 30, (1, ranks, 2 * ranks)) * rng.integers(0, 2, (1, ranks, 2 * ranks))
    sent[0, 0, 0] += 1
    problem = Problem(sent.sum(axis=1), (2 + redundant) * ranks, ranks, nodes, by_source=sent)
    placed = place(named("near_sources"), problem)[0]
    balanced = place(named("deepseek"), problem)[0].reshape(ranks, -1)
    # The sets of experts are those of `deepseek`, so the balance is, too.
    found = sorted(sorted(own) for own in placed.reshape(ranks, -1).tolist())
    assert found == sorted(sorted(own) for own in balanced.tolist())
    best = max(
        stays(balanced[list(order)].reshape(-1), sent[0], nodes)
        for order in itertools.permutations(range(ranks))
    )
    on_node, on_rank = stays(placed, sent[0], nodes)
    assert on_node == pytest.approx(best[0])
    assert on_rank >= best[1] - 1e-6 * (1 + sent.sum()) or on_node > best[0]


def test_tokens_of_each_rank_are_required() -> None:
    with pytest.raises(UsageError, match="near_sources needs the tokens that each rank sent"):
        place(named("near_sources"), Problem(np.ones((1, 4)), 4, 2))
    with pytest.raises(UsageError, match="tokens of each rank have the shape"):
        Problem(np.ones((1, 4)), 4, 2, by_source=np.ones((1, 3, 4)))


def test_layers_of_different_size_are_placed_apart() -> None:
    rng = np.random.default_rng(0)
    sent = rng.integers(1, 9, (2, 2, 6))
    sent[1, :, 4:] = 0
    problem = Problem(
        sent.sum(axis=1),
        6,
        2,
        experts=np.array([6, 4]),
        current=np.tile(np.arange(6), (2, 1)),
        by_source=sent,
    )
    placed = place(named("near_sources"), problem)
    assert {*placed[1].tolist()} == {0, 1, 2, 3}


def test_groups_stay_on_one_node() -> None:
    rng = np.random.default_rng(4)
    sent = rng.integers(1, 50, (2, 8, 32))
    problem = Problem(sent.sum(axis=1), 40, 8, num_nodes=4, num_groups=8, by_source=sent)
    placed, grouped = (place(named(name), problem) for name in ("near_sources", "deepseek"))
    for layer in range(2):
        nodes = [sorted(own) for own in placed[layer].reshape(4, -1).tolist()]
        assert sorted(nodes) == sorted(sorted(own) for own in grouped[layer].reshape(4, -1).tolist())
        assert stays(placed[layer], sent[layer], 4) > stays(grouped[layer], sent[layer], 4)
