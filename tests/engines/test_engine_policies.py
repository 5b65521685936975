"""Our policies against those of vLLM and SGLang, which policies.py runs in the engines' environment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from engines import run_in
from policy_problems import KINDS, SHAPES, loads, placements

from eplb_analyze.policies import policy as policies
from eplb_analyze.policies.policy import POLICIES, Problem, named, place


def test_placements_are_those_of_the_engines(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    problems = []
    for number in range(420):
        experts, slots, ranks, nodes, groups = SHAPES[number % len(SHAPES)]
        weight = loads(rng, int(rng.integers(KINDS)), 2, experts)
        current = None
        if number % 3 == 1:
            current = placements(rng, 2, experts, slots)
        elif number % 3 == 2:
            # Close to the result, so that many experts stay on their rank.
            current = POLICIES["vllm"](Problem(weight * rng.integers(1, 3, weight.shape), slots, ranks))
        problems.append(Problem(weight, slots, ranks, nodes, groups, current))
    asked = [
        {"weight": p.weight.tolist(), "slots": p.num_physical_experts, "ranks": p.ep_size,
         "nodes": p.num_nodes, "groups": p.num_groups,
         "current": None if p.current is None else p.current.tolist()}
        for p in problems
    ]  # fmt: skip
    (tmp_path / "in.json").write_text(json.dumps(asked))
    done = run_in("sglang", "policies.py", tmp_path / "in.json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    truth = json.loads((tmp_path / "out.json").read_text())
    for name in ("vllm", "sglang"):
        for problem, answer in zip(problems, truth[name], strict=True):
            assert place(named(name), problem).tolist() == answer
    for problem, answers in zip(problems, truth["initial"], strict=True):
        ours = policies.initial(problem.weight.shape[1], problem.num_physical_experts).tolist()
        assert answers == [ours, ours]
