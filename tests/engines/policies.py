"""Answers problems with vLLM's and SGLang's own policies; run by test_engine_policies.py.

``python policies.py IN.json OUT.json`` in an environment that has both. IN holds a list of problems, OUT what
each engine answers to each, and the placements that the engines start with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from sglang.srt.eplb.eplb_algorithms import compute_algorithm, rebalance_experts
from sglang.srt.eplb.expert_location import append_trivial_expert_slots
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy


def vllm(problem: dict[str, Any]) -> Any:
    current = problem["current"]
    return DefaultEplbPolicy.rebalance_experts(
        torch.tensor(problem["weight"]), problem["slots"], problem["groups"], problem["nodes"],
        problem["ranks"], None if current is None else torch.tensor(current),
    ).tolist()  # fmt: skip


def sglang(problem: dict[str, Any]) -> Any:
    return rebalance_experts(
        tokens_per_expert=torch.tensor(problem["weight"])[None],
        num_physical_experts=problem["slots"],
        num_local_physical_experts=problem["slots"] // problem["ranks"],
        num_groups=problem["groups"],
        num_nodes=problem["nodes"],
        algorithm=compute_algorithm("auto", problem["groups"], problem["nodes"]),
    )[0].tolist()


def initial(experts: int, slots: int) -> tuple[Any, Any]:
    ours = append_trivial_expert_slots(torch.arange(experts)[None], slots - experts, experts)[0].tolist()
    return EplbState.build_initial_global_physical_to_logical_map(experts, slots - experts), ours


problems = json.loads(Path(sys.argv[1]).read_text())
out = {
    "vllm": [vllm(problem) for problem in problems],
    "sglang": [sglang(problem) for problem in problems],
    "initial": [initial(len(problem["weight"][0]), problem["slots"]) for problem in problems],
}
Path(sys.argv[2]).write_text(json.dumps(out))
