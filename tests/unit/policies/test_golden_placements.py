"""vllm-ascend's and ROCm ATOM's policies against the answers of their own code (tests/golden/policies)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import ROOT
from policy_problems import SHAPES

from eplb_analyze.policies.policy import Problem, named, place

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(ROOT / "tests/golden/policies/placements.npz") as arrays:
        return dict(arrays)


def answers(
    golden: dict[str, Array], policy: str, shape: int, truth: str = "", weight: str = "weight",
    current: str = "current",
) -> list[bool]:  # fmt: skip
    """Which of the engine's answers the policy gives, too."""
    experts, slots, ranks, nodes, groups = SHAPES[shape]
    if groups % nodes:
        nodes = groups = 1
    same = []
    for i, placed in enumerate(golden.get(f"{shape}_{truth or policy}", ())):
        series = golden[f"{shape}_series"][i] if policy == "flash_lb" else None
        loads = golden[f"{shape}_{weight}"][i] if series is None else series.sum(axis=0)
        in_force = golden[f"{shape}_{current}"][i].astype(np.int32)
        assert loads.shape[1] == experts
        problem = Problem(loads, slots, ranks, nodes, groups, in_force, series=series)
        same.append(bool((place(named(policy), problem) == placed).all()))
    return same


@pytest.mark.parametrize(
    ("policy", "shapes"), [("swift_balance", 14), ("naive", 14), ("biased", 13), ("flash_lb", 12)]
)
def test_placements_are_those_of_the_engine(golden: dict[str, Array], policy: str, shapes: int) -> None:
    same = [answers(golden, policy, shape) for shape in range(len(SHAPES))]
    assert all(map(all, same))
    assert sum(map(bool, same)) == shapes


def test_biased_stays_while_the_hottest_experts_are_the_same(golden: dict[str, Array]) -> None:
    same, stayed = [], 0
    for shape in range(len(SHAPES)):
        same += answers(golden, "biased", shape, "biased_later", "later", "biased")
        if f"{shape}_biased" in golden:
            stayed += int((golden[f"{shape}_biased"] == golden[f"{shape}_biased_later"]).all(axis=2).sum())
    assert all(same)
    assert 0 < stayed < 2 * len(same)
