"""Fifty generated runs of mixed kinds: every figure equals one that uses none of the project's code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli
from recomputation import Recomputation

from eplb_dump import ExpertLoadWriter

#: What each kind of run has; every kind is made with five seeds.
KINDS: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"scope": "global"},
    "ties": {"high": 2},
    "few tokens": {"high": 1, "density": 0.1},
    "hybrid layers": {"idle_layers": True, "moe_layers": [2, 5, 6]},
    "missing ranks": {"lost": 0.15},
    "rearrangements": {"moves": 4, "empty": True},
    "restarts": {"sessions": 3, "moves": 2},
    "elastic": {"elastic": True, "moves": 2},
    "compacted": {"lost": 0.01, "moves": 2, "compact": True, "token_replication": 2},
}


def placement(rng: Any, experts: int, slots: int, empty: bool) -> Any:
    row = np.arange(slots) % experts
    if empty and slots > experts:
        row[-1] = -1
    return rng.permutation(row)


def generate(root: Path, seed: int, **kind: Any) -> Path:
    """Write a run and return its folder."""
    rng = np.random.default_rng(seed)
    ranks, per_rank = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    numbers = kind.get("moe_layers")
    layers = 3 if numbers else int(rng.integers(1, 4))
    experts = int(rng.integers(3, ranks * per_rank + 1))
    scope = kind.get("scope", "local")
    replication = kind.get("token_replication", 1)
    steps, high = int(rng.integers(30, 60)), kind.get("high", 60)
    moves = set(rng.choice(np.arange(1, steps), kind.get("moves", 1), replace=False).tolist())
    grown = steps // 2 if kind.get("elastic") else steps
    starts = sorted(
        {0, *rng.choice(np.arange(10, steps), kind.get("sessions", 1) - 1, replace=False).tolist()}
    )
    maps = None
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else steps
        # A restart goes back a few steps, and the steps that come again count as the later session has them.
        first = max(0, start - int(rng.integers(0, 4))) if number else 0
        writers: dict[int, ExpertLoadWriter] = {}
        for step in range(first, end):
            size = ranks if step < grown else ranks + 1
            slots = size * per_rank
            if maps is None or step in moves or maps.shape[1] != slots:
                maps = np.array(
                    [placement(rng, experts, slots, kind.get("empty", False)) for _ in range(layers)]
                )
            skew = rng.gamma(0.7, 1, (layers, slots))
            for rank in range(size) if scope == "local" else range(1):
                if rank not in writers:
                    writers[rank] = ExpertLoadWriter(
                        root, model="org/moe", num_logical_experts=experts, ep_size=size, ep_rank=rank,
                        run_id="r", scope=scope, moe_layers=numbers, ranks_per_node=[None, 1, 2][seed % 3],
                        segment_steps=16, token_replication=replication, engine="vllm",
                        engine_config={"eplb_config": {"use_async": False, "step_interval": 10}},
                    )  # fmt: skip
                load = rng.poisson(skew * high / 4) * (rng.random((layers, slots)) < kind.get("density", 0.9))
                load[maps == -1] = 0
                if kind.get("idle_layers"):
                    load[rng.random(layers) < 0.4] = 0
                chance = rng.random()
                if chance < kind.get("lost", 0.0):
                    writers[rank].skip("dropped", step)
                elif chance > 0.93 and step >= start:  # or a step would have loads of two lives
                    writers[rank].skip("dummy", step)
                else:
                    writers[rank].record(step, load * replication, maps, ep_size=size)
        for writer in writers.values():
            writer.close()
    if not kind.get("compact"):
        return root / "run=r"
    assert cli("compact", "--run-id", "r", root, root / "new").returncode == 0
    return root / "new/run=r"


def shown(command: str, run: Path, *options: str) -> Any:
    result = cli(*command.split(), *options, "--json", run)
    assert result.returncode in (0, 3), result.stderr
    return json.loads(result.stdout)


def close(found: Any, expected: Any) -> bool:
    if expected is None or found is None:
        return expected is None and found is None
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)


def assert_equal(found: dict[str, Any], expected: dict[str, Any], where: str = "") -> None:
    for name, value in expected.items():
        assert close(found[name], value), f"{where} {name}: {found[name]}, recomputed {value}"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_figures_equal_a_recomputation_without_the_project(tmp_path: Path, kind: str, seed: int) -> None:
    run = generate(tmp_path, 100 * seed + list(KINDS).index(kind), **KINDS[kind])
    truth = Recomputation(run)

    summary = shown("summary", run)
    assert_equal(summary["steps"], truth.steps(), "steps")
    for name in ("balancedness", "imbalance"):
        assert_equal(summary[name], truth.spread(name), name)
        values = truth.per_step(name)
        for edge in ("min", "max"):
            assert close(values[summary[name][f"{edge}_step"]], summary[name][edge])
    for name, value in summary["metrics"].items():
        assert close(value, np.mean(list(truth.per_step(name).values()))), name
    assert close(summary["idle_fraction"], truth.idle_fraction(truth.recorded))
    last = truth.last_configuration()
    slowest, cost, uneven = truth.waiting(last)
    for i, layer in enumerate(summary["layers"]):
        own = list(truth.per_step("balancedness", i).values())
        assert close(layer["balancedness"], np.mean(own) if own else None)
        if uneven[i]:
            share = slowest[i] / uneven[i]
            assert close(layer["worst_rank_share"], share.max())
            assert close(share[layer["worst_rank"]], share.max())
    assert close(summary["loss"]["tokens"], cost.sum())
    for row in summary["loss"]["ranks"]:
        assert close(row["excess_tokens"], cost[:, row["rank"]].sum())
    experts = {(row["layer"], row["logical"]): row for row in truth.expert_figures(5)}
    for row in summary["hot_experts"]:
        expected = experts[row["layer"], row["logical"]]
        assert_equal(
            row, {name: expected[name] for name in ("share", "times_mean", "replicas")}, "hot experts"
        )
    top = sorted((row["share"] for row in experts.values()), reverse=True)[: len(summary["hot_experts"])]
    assert close([row["share"] for row in summary["hot_experts"]], top)

    ranks, expected = shown("ranks", run), truth.ranks()
    groups = {name: expected.pop(name) for name in ("ranks", "nodes")}
    assert_equal(ranks, expected, "ranks")
    for name, rows in groups.items():
        assert len(ranks[name]) == len(rows)
        for row in ranks[name]:
            assert_equal(row, rows[row[name.removesuffix("s")]], name)

    for number in truth.layers:
        layer, expected = shown(f"layer {number}", run), truth.layer(number)
        for name, key in (("ranks", "rank"), ("slots", "physical"), ("experts", "logical")):
            rows = sorted(layer[name], key=lambda row: row[key])
            assert close([row["load"] for row in rows], expected[name]), (number, name)
        for name in ("balancedness", "imbalance"):
            assert close(layer[name], expected[name]), (number, name)

    rows = {(row["layer"], row["logical"]): row for row in shown("experts --window-steps 5", run)["experts"]}
    assert experts.keys() <= rows.keys()
    for key, figures in experts.items():
        assert_equal(rows[key], figures, f"expert {key}")

    moves = truth.rearrangements()
    assert summary["rearrangements"] == [row["first_step"] for row in moves]
    found = shown("rearrangements", run)["rearrangements"]
    assert [row["first_step"] for row in found] == [row["first_step"] for row in moves]
    for row, expected in zip(found, moves, strict=True):
        if expected.pop("elastic"):
            assert row["verdict"] == "elastic"
            continue
        for side in ("before", "after"):
            assert_equal(row[side], expected.pop(side), f"rearrangement {row['first_step']} {side}")
        assert_equal(row, expected, f"rearrangement {row['first_step']}")
