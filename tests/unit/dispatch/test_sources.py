"""The replicas that source ranks choose: compared with the rules in words, one rank and expert at a time."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze.dispatch import sources
from eplb_analyze.dispatch.deal import Dealt, random_bits, replica_draws
from eplb_analyze.dispatch.rule import Replicas, Tokens

Array = np.ndarray[Any, Any]

#: Ranks, nodes, slots per rank, experts.
SHAPES = [(4, 2, 3, 5), (4, 1, 3, 5), (8, 4, 2, 6), (6, 3, 4, 7), (2, 2, 5, 3), (1, 1, 4, 3)]


@st.composite
def placements(draw: st.DrawFn) -> tuple[Array, int, int, int]:
    """A placement of a few layers, with uneven replicas, empty slots and experts without any."""
    ranks, nodes, per_rank, experts = draw(st.sampled_from(SHAPES))
    layers = draw(st.integers(1, 3))
    slots = st.lists(st.integers(-1, experts - 1), min_size=ranks * per_rank, max_size=ranks * per_rank)
    placed = draw(st.lists(slots, min_size=layers, max_size=layers))
    return np.array(placed, np.int32), experts, ranks, nodes


@given(placements())
@settings(max_examples=150)
def test_nearest_is_on_the_gpu_then_on_the_node(problem: tuple[Array, int, int, int]) -> None:
    placed, experts, ranks, nodes = problem
    found = sources.sglang_nearest(placed, experts, ranks, nodes)
    on_rank = placed.shape[1] // ranks
    for layer, slots in enumerate(placed):
        for expert in range(experts):
            copies = np.flatnonzero(slots == expert).tolist()
            for rank in range(ranks):
                here = [s for s in copies if s // on_rank == rank]
                near = [s for s in copies if s // on_rank // (ranks // nodes) == rank // (ranks // nodes)]
                expected = sources.ANY
                if len(copies) == 1:
                    expected = copies[0]
                elif here:
                    expected = here[0]
                elif 0 < len(near) < len(copies):
                    expected = near[0]
                assert found[layer, rank, expert] == expected


@given(placements())
@settings(max_examples=100)
def test_static_shares_distant_replicas_out_fairly(problem: tuple[Array, int, int, int]) -> None:
    placed, experts, ranks, nodes = problem
    near = sources.sglang_nearest(placed, experts, ranks, nodes)
    found = sources.sglang_static(placed, experts, ranks, nodes)
    np.testing.assert_array_equal(found[near >= 0], near[near >= 0])
    for layer, slots in enumerate(placed):
        for expert in range(experts):
            copies = np.flatnonzero(slots == expert).tolist()
            distant = found[layer, near[layer, :, expert] < 0, expert].tolist()
            if not copies:
                assert distant == [sources.ANY] * ranks
            elif distant:
                times = Counter(distant)
                assert set(times) <= set(copies)
                assert max(times.values()) - min(times[s] for s in copies) <= 1


@given(placements())
@settings(max_examples=100)
def test_static_at_start_draws_only_for_experts_without_a_near_replica(
    problem: tuple[Array, int, int, int],
) -> None:
    """A rank that has no near replica of any expert chooses as it does later; others skip their draws."""
    placed, experts, ranks, nodes = problem
    near = sources.sglang_nearest(placed, experts, ranks, nodes)
    start = sources.sglang_static_at_start(placed, experts, ranks, nodes)
    later = sources.sglang_static(placed, experts, ranks, nodes)
    np.testing.assert_array_equal(start[near >= 0], near[near >= 0])
    np.testing.assert_array_equal(start == sources.ANY, later == sources.ANY)
    for layer, rank, expert in np.argwhere((near < 0) & (start >= 0)).tolist():
        assert placed[layer, start[layer, rank, expert]] == expert
    drawn = ((near < 0) & (start >= 0)).any(axis=1)
    for rank in range(ranks):
        if (near[:, rank] < 0)[drawn].all():
            np.testing.assert_array_equal(start[:, rank], later[:, rank])


@given(placements(), st.sampled_from([1, 2]))
@settings(max_examples=100)
def test_ascend_takes_the_rank_modulo_the_ranks_that_hold_the_expert(
    problem: tuple[Array, int, int, int], tp_size: int
) -> None:
    placed, experts, ranks, _ = problem
    found = sources.ascend(placed, experts, ranks, tp_size=tp_size)
    on_rank = placed.shape[1] // ranks
    for layer, slots in enumerate(placed):
        for expert in range(experts):
            last = {s // on_rank: s for s in np.flatnonzero(slots == expert).tolist()}
            held = [last[rank] for rank in sorted(last)]
            for rank in range(ranks):
                turn = rank if tp_size == 1 else rank % tp_size + rank // tp_size + expert
                expected = held[turn % len(held)] if held else sources.ANY
                assert found[layer, rank, expert] == expected


def test_ascend_tables_are_those_of_its_own_code() -> None:
    """The file holds what ``generate_log2phy_map`` of vllm-ascend 182b75ea answered, which needs an NPU."""
    cases = json.loads((ROOT / "tests/golden/dispatch/vllm_ascend.json").read_text())
    assert len(cases) > 20
    for case in cases:
        placed = np.array([case["placement"]], np.int32)
        found = sources.ascend(placed, case["experts"], case["ranks"], tp_size=case["tp_size"])
        assert found[0].tolist() == case["log2phy"]


@given(placements(), st.integers(0, 99), st.booleans())
@settings(max_examples=150)
def test_no_token_is_lost_and_none_goes_to_another_expert(
    problem: tuple[Array, int, int, int], seed: int, exact: bool
) -> None:
    placed, experts, ranks, nodes = problem
    rng, steps = np.random.default_rng(seed), 3
    by_source = [rng.integers(0, 90, (experts, steps)) for _ in range(ranks)]
    load = sum(by_source)
    sglang = sources.sglang_nearest, sources.sglang_static, sources.sglang_static_at_start
    for choose in (*sglang, sources.ascend):
        table = (
            choose(placed, experts, ranks, nodes)
            if choose is not sources.ascend
            else choose(placed, experts, ranks)
        )
        for layer, slots in enumerate(placed):
            bits = random_bits(np.arange(steps), layer, replica_draws(slots))
            tokens = Tokens(load, by_source=by_source if exact else None)
            dealt = Dealt().slot_loads(tokens, Replicas(slots, ranks, table[layer]), bits).T
            assert (dealt >= 0).all()
            assert not dealt[:, slots < 0].any()
            for expert in range(experts):
                copies = np.flatnonzero(slots == expert)
                if len(copies):
                    np.testing.assert_array_equal(dealt[:, copies].sum(axis=1), load[expert])
                if exact and len(copies):
                    # What ranks have chosen is certain; only the rest can go anywhere.
                    least = np.zeros((steps, len(slots)), np.int64)
                    for own, sent in zip(table[layer], by_source, strict=True):
                        if own[expert] >= 0:
                            least[:, own[expert]] += sent[expert]
                    assert (dealt[:, copies] >= least[:, copies]).all()


def test_unknown_sources_are_as_likely_as_one_another() -> None:
    """Three of four ranks send to slot 0, the fourth to slot 2."""
    steps, slots = 20_000, np.array([0, 1, 0, 1], np.int32)
    table = np.array([[0, 1], [0, 1], [0, 3], [2, -1]], np.int32)
    bits = random_bits(np.arange(steps), 0, replica_draws(slots))
    for tokens in (1, 40, 200):
        load = np.full((2, steps), tokens)
        dealt = Dealt().slot_loads(Tokens(load), Replicas(slots, 4, table), bits).T
        for slot, share in enumerate([3 / 4, 5 / 8, 1 / 4, 3 / 8]):
            spread = (tokens * share * (1 - share)) ** 0.5
            assert dealt[:, slot].mean() == pytest.approx(tokens * share, abs=5 * spread / steps**0.5 + 2e-3)
            assert dealt[:, slot].std() == pytest.approx(spread, rel=0.03)
