"""The oracle against plain loops and against bounds of each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze.errors import UsageError
from eplb_analyze.policies.oracle import place_each
from eplb_analyze.policies.policy import POLICIES, lower_bound, named

Array = np.ndarray[Any, np.dtype[np.int64]]


def in_loops(tokens: list[int], slots: int, ranks: int) -> list[list[int]]:
    """The tokens of each rank's copies, of one step."""
    copies = [1] * len(tokens)
    for _ in range(slots - len(tokens)):
        copies[max(range(len(tokens)), key=lambda e: tokens[e] / copies[e])] += 1
    items = [n // c + (i < n % c) for n, c in zip(tokens, copies, strict=True) for i in range(c)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    if slots == ranks:
        return [[item] for item in items]
    for item in sorted(items, reverse=True):
        min((own for own in held if len(own) < slots // ranks), key=sum).append(item)
    return held


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(8, 8, 4), (8, 12, 4), (6, 12, 2), (5, 8, 8), (32, 40, 8), (1, 4, 2)]),
    most=st.sampled_from([1, 3, 40, 100_000]),
    times=st.sampled_from([1, 4]),
)
@settings(max_examples=200)
def test_each_step_is_placed_by_its_own_loads(
    seed: int, shape: tuple[int, int, int], most: int, times: int
) -> None:
    experts, slots, ranks = shape
    load = np.random.default_rng(seed).integers(0, most + 1, (5, experts))
    found = place_each(load * times, slots, ranks, times)
    assert found.shape == (slots, 5)
    for step, of_slots in zip(load, found.T, strict=True):
        own = [sorted(of_rank) for of_rank in of_slots.reshape(ranks, -1).tolist()]
        expected = [sorted(n * times for n in of_rank) for of_rank in in_loops(step.tolist(), slots, ranks)]
        assert sorted(own) == sorted(expected)
        busiest = max(map(sum, own))
        # Whole tokens share less evenly than the bound allows, by less than one for each slot of a rank.
        assert lower_bound(step, slots, ranks) - 1e-9 <= busiest / times
        assert sum(map(sum, own)) == step.sum() * times


def test_blocks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    load = np.random.default_rng(1).integers(0, 50, (25, 16))
    whole = place_each(load, 24, 8)
    monkeypatch.setattr("eplb_analyze.policies.oracle.ROWS", 4)
    assert place_each(load, 24, 8).tolist() == whole.tolist()


def test_oracle_is_no_policy_that_an_engine_or_an_export_can_use() -> None:
    assert "oracle" not in POLICIES
    with pytest.raises(UsageError, match="there is no policy 'oracle'"):
        named("oracle")
