"""Our dispatches against vLLM's and SGLang's own code, token by token, which dispatch.py runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import run_in

from eplb_analyze.dispatch import sources
from eplb_analyze.dispatch.deal import ByPosition, Dealt, hashed_positions, random_bits, replica_draws
from eplb_analyze.dispatch.rule import Replicas, Tokens

#: Layers, experts, slots, ranks, nodes.
SHAPES = [
    (3, 6, 12, 4, 2),
    (2, 8, 16, 4, 1),
    (2, 5, 8, 2, 1),
    (2, 12, 32, 8, 4),
    (3, 3, 24, 8, 2),
    (1, 6, 6, 2, 1),
]
TOKENS, TOP_K = 150, 2

Array = np.ndarray[Any, Any]


def placements(rng: np.random.Generator, layers: int, experts: int, slots: int) -> Array:
    """Uneven replicas: some experts have many, most have one; also several on a rank."""
    share = rng.dirichlet(np.full(experts, 0.4), layers)
    extra = np.stack([rng.choice(experts, slots - experts, p=p) for p in share])
    every = np.concatenate([np.tile(np.arange(experts), (layers, 1)), extra], axis=1)
    return rng.permuted(every, axis=1).astype(np.int32)


def problems() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    out = []
    for number in range(36):
        layers, experts, slots, ranks, nodes = SHAPES[number % len(SHAPES)]
        skew = rng.dirichlet(np.ones(experts))
        ids = np.stack([rng.choice(experts, TOP_K, replace=False, p=skew) for _ in range(TOKENS)])
        placed = placements(rng, layers, experts, slots)
        out.append(
            {"placement": placed.tolist(), "experts": experts, "ranks": ranks, "nodes": nodes,
             "topk_ids": ids.tolist()}
        )  # fmt: skip
    return out


def answers(engine: str, folder: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    asked = problems()
    (folder / "in.json").write_text(json.dumps(asked))
    done = run_in(engine, "dispatch.py", engine, folder / "in.json", folder / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    return zip(asked, json.loads((folder / "out.json").read_text()), strict=True)


def by_position(slots: Array, ids: Array, positions: Array) -> Array:
    """The slot of each token and choice, if a number of each position is taken modulo the replicas."""
    at = [np.flatnonzero(slots == expert) for expert in range(ids.max() + 1)]
    return np.array([[at[e][p % len(at[e])] for e in row] for row, p in zip(ids, positions, strict=True)])


def test_vllm_hashes_the_position_of_a_token(tmp_path: Path) -> None:
    for problem, layers in answers("vllm", tmp_path):
        ids = np.array(problem["topk_ids"])
        for slots, answer in zip(np.array(problem["placement"]), layers, strict=True):
            ours = by_position(slots, ids, hashed_positions(np.arange(len(ids))))
            assert ours.tolist() == answer["ids"]
            assert np.bincount(ours.ravel(), minlength=len(slots)).tolist() == answer["load"]


def test_sglang_without_all_to_all_takes_the_row_of_a_token(tmp_path: Path) -> None:
    for problem, answer in answers("sglang", tmp_path):
        ids = np.array(problem["topk_ids"])
        for slots, found in zip(np.array(problem["placement"]), answer["by_row"], strict=True):
            assert by_position(slots, ids, np.arange(len(ids))).tolist() == found


@pytest.mark.parametrize(
    ("choose", "name"),
    [(sources.sglang_static, "static"), (sources.sglang_static_at_start, "static_at_start")],
)
def test_sglang_static_sends_the_same_tokens_to_the_same_slots(
    tmp_path: Path, choose: Any, name: str
) -> None:
    for problem, answer in answers("sglang", tmp_path):
        placed, ids = np.array(problem["placement"], np.int32), np.array(problem["topk_ids"])
        experts, ranks = problem["experts"], problem["ranks"]
        tables = choose(placed, experts, ranks, problem["nodes"])
        for layer, slots in enumerate(placed):
            theirs = np.array([own[layer] for own in answer[name]])
            ours = tables[layer][:, ids]  # of each rank
            np.testing.assert_array_equal(ours, theirs)
            sent = [np.bincount(ids.ravel(), minlength=experts)[:, np.newaxis] for _ in range(ranks)]
            bits = random_bits(np.arange(1), 0, replica_draws(slots))
            loads = Dealt().slot_loads(
                Tokens(sum(sent), by_source=sent), Replicas(slots, ranks, tables[layer]), bits
            )
            assert loads[:, 0].tolist() == np.bincount(theirs.ravel(), minlength=len(slots)).tolist()


def test_sglang_dynamic_starts_with_the_same_nearest_replicas(tmp_path: Path) -> None:
    for problem, answer in answers("sglang", tmp_path):
        placed, experts = np.array(problem["placement"], np.int32), problem["experts"]
        ours = sources.sglang_nearest(placed, experts, problem["ranks"], problem["nodes"])
        for rank, layers in enumerate(answer["nearest"]):
            for layer, rows in enumerate(layers):
                for expert, row in enumerate(rows):
                    theirs = [slot for slot in row if slot >= 0]
                    near = int(ours[layer, rank, expert])
                    every = np.flatnonzero(placed[layer] == expert).tolist()
                    assert theirs == (every if near == sources.ANY else [near])


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_deals_of_a_batch_vary_as_vllm_positions_do(copies: int) -> None:
    """vLLM's hash, given routers that choose any positions: mean and variance are those of `ByPosition`."""
    rng, batch, chosen, steps = np.random.default_rng(copies), 120, 80, 4000
    replica = hashed_positions(np.arange(batch)) % copies
    theirs = np.stack(
        [np.bincount(replica[rng.permutation(batch)[:chosen]], minlength=copies) for _ in range(steps)]
    )
    slots = np.zeros(copies, np.int32)
    tokens = Tokens(np.full((1, steps), chosen), np.full(steps, batch), np.full(steps, batch))
    ours = (
        ByPosition()
        .slot_loads(tokens, Replicas(slots, copies), random_bits(np.arange(steps), 0, replica_draws(slots)))
        .T
    )
    share = np.bincount(replica) / batch  # for 3 or 5 replicas, the hash is not even
    expected = chosen * share * (1 - share) * (batch - chosen) / (batch - 1)
    for found in (theirs, ours):
        np.testing.assert_allclose(found.mean(axis=0), chosen * share, rtol=0.02)
        np.testing.assert_allclose(found.var(axis=0), expected, rtol=0.15)
    assert ours.max(axis=1).mean() == pytest.approx(theirs.max(axis=1).mean(), rel=0.02)
