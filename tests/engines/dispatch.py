"""Sends tokens to replicas with vLLM's and SGLang's own code; run by test_engine_dispatch.py.

``python dispatch.py vllm|sglang IN.json OUT.json`` where that engine is imported. IN holds a list of
problems: a placement ``[layers][slots]``, its ``experts``, ``ranks`` and ``nodes``, and ``topk_ids``
``[tokens][k]``, which every rank sends. OUT holds what the engine makes of each.

vLLM's mapping is a Triton kernel, which the interpreter of Triton runs without a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


def candidates(problem: dict[str, Any], layer: int) -> list[list[int]]:
    """The slots of each expert, ascending."""
    slots = problem["placement"][layer]
    return [[s for s, held in enumerate(slots) if held == e] for e in range(problem["experts"])]


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def vllm(problems: list[dict[str, Any]]) -> list[Any]:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language as tl
    import vllm.platforms
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
    name = "vllm.model_executor.layers.fused_moe.router.base_router"
    sys.modules.pop(name, None)
    with mock.patch.object(type(vllm.platforms.current_platform), "is_cuda_alike", return_value=True):
        router = importlib.import_module(name)

    def answer(problem: dict[str, Any]) -> Any:
        out = []
        for layer in range(len(problem["placement"])):
            rows = candidates(problem, layer)
            load = torch.zeros(len(problem["placement"][layer]), dtype=torch.int32)
            ids = router.eplb_map_to_physical_and_record(
                torch.tensor(problem["topk_ids"]), load, padded(rows), torch.tensor([len(r) for r in rows]),
                torch.ones(1, dtype=torch.int32), None,
            )  # fmt: skip
            out.append({"ids": ids.tolist(), "load": load.tolist()})
        return out

    return [answer(problem) for problem in problems]


def sglang(problems: list[dict[str, Any]]) -> list[Any]:
    from sglang.srt.eplb import expert_location as location
    from sglang.srt.eplb import expert_location_dispatch as dispatch

    def answer(problem: dict[str, Any]) -> Any:
        layers, ranks = len(problem["placement"]), problem["ranks"]
        slots = len(problem["placement"][0])
        moe = SimpleNamespace(ep_join_mode=None, moe_a2a_backend="deepep")
        parallel = SimpleNamespace(ep_size=ranks, nnodes=problem["nodes"])
        every = padded([row for layer in range(layers) for row in candidates(problem, layer)])
        every = every.reshape(layers, problem["experts"], -1)
        topk_ids = torch.tensor(problem["topk_ids"])
        out: dict[str, Any] = {"static": [], "static_at_start": [], "nearest": [], "by_row": []}
        with (
            mock.patch.object(location, "get_exec", return_value=SimpleNamespace(moe=moe)),
            mock.patch.object(location, "get_parallel", return_value=parallel),
            mock.patch("sglang.srt.elastic_ep.elastic_ep.elastic_expanded_world_enabled", return_value=False),
        ):
            for rank in range(ranks):
                # At the start (`init_by_mapping`), a rank knows of several replicas only the nearest.
                narrowed = location._compute_logical_to_all_physical_map(
                    torch.tensor(problem["placement"]), problem["experts"], ranks, rank
                )
                out["nearest"].append(narrowed.tolist())
                for name, known in (("static", every), ("static_at_start", narrowed)):
                    table = location.compute_logical_to_rank_dispatch_physical_map(known, ranks, slots, rank)
                    static = []
                    for layer in range(layers):
                        info = dispatch.ExpertLocationDispatchInfo(
                            "static", table[layer], known[layer], (known[layer] >= 0).sum(dim=1), slots
                        )
                        static.append(dispatch.topk_ids_logical_to_physical(topk_ids, info).tolist())
                    out[name].append(static)
        for layer in range(layers):
            info = dispatch.ExpertLocationDispatchInfo(
                "dynamic", None, every[layer], (every[layer] >= 0).sum(dim=1), slots, rank_invariant=True
            )
            out["by_row"].append(dispatch.topk_ids_logical_to_physical(topk_ids, info).tolist())
        return out

    return [answer(problem) for problem in problems]


found = {"vllm": vllm, "sglang": sglang}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
Path(sys.argv[3]).write_text(json.dumps(found))
