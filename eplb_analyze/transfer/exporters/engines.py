"""Placements as files that engines load at their start, and as plain JSON.

For each engine there are two functions: one returns the content of the file, ``*_usage`` returns the options
that make the engine load it. vllm-ascend's file has a module of its own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from eplb_analyze.errors import UsageError
from eplb_analyze.policies import policy
from eplb_analyze.transfer.exporters import vllm_ascend
from eplb_analyze.transfer.exporters.placement import Placement, require_loadable

# ---- SGLang: --init-expert-location
#
# compute_initial_expert_location_metadata (SGLang 0.5.23, srt/eplb/expert_location.py) passes the object's
# members as arguments, so any other key stops the engine. It uses row n for hidden layer n and does not check
# the number of rows, so a file of the MoE layers alone places experts in the wrong layers.


def with_all_hidden_layers(placement: Placement, num_hidden_layers: int) -> Placement:
    """The placement with a row for every hidden layer of the model.

    Layers that it lacks get the placement that the engine itself starts with (expert ``i`` in slot ``i``,
    then the first experts again): dense layers have no experts to place, and a MoE layer that was not
    recorded is served as if there were no file.

    Raises:
        UsageError: it has layers beyond that number.
    """
    beyond = [layer for layer in placement.layers if layer >= num_hidden_layers]
    if beyond:
        raise UsageError(
            f"the placement has layers {placement.layers[0]} to {beyond[-1]}, so the model has more than "
            f"{num_hidden_layers} hidden layers (see num_hidden_layers in its config.json)"
        )
    first = policy.initial(placement.num_logical_experts, placement.num_physical_experts)
    rows = np.tile(first, (num_hidden_layers, 1))
    rows[list(placement.layers)] = placement.physical_to_logical_map
    return Placement(tuple(range(num_hidden_layers)), placement.ep_size, placement.num_logical_experts, rows)


def sglang(placement: Placement) -> str:
    """JSON with the one key ``physical_to_logical_map``: one list per hidden layer.

    Raises:
        UsageError: it does not have all hidden layers from 0 on, or no engine can serve it.
    """
    if placement.layers != tuple(range(len(placement.layers))):
        raise UsageError(
            "SGLang uses row n for hidden layer n, and layers are missing from this placement; pass "
            "--num-hidden-layers"
        )
    require_loadable(placement)
    return json.dumps({"physical_to_logical_map": placement.physical_to_logical_map.tolist()}) + "\n"


def sglang_usage(placement: Placement, path: str) -> str:
    sizes = f"--ep-size {placement.ep_size} --ep-num-redundant-experts {placement.num_redundant_experts}"
    return f"{sizes} --init-expert-location {shlex.quote(path)}"


# ---- TensorRT-LLM: the YAML of its MoE load balancer
#
# MoeLoadBalancerConfig (llmapi/llm_args.py) refuses any key but these three, looks up layers by the model's
# own numbers, and requires as many experts in each layer as there are slots, every expert among them.


def trtllm(placement: Placement) -> str:
    """``initial_global_assignments`` by layer, ``num_slots``, and no updates, so the placement stays.

    Raises:
        UsageError: no engine can serve it.
    """
    require_loadable(placement)
    lines = ["initial_global_assignments:"]
    for layer, slots in zip(placement.layers, placement.physical_to_logical_map.tolist(), strict=True):
        lines.append(f"  {layer}: {slots}")  # YAML and Python write a list of numbers alike
    lines += ["layer_updates_per_iter: 0", f"num_slots: {placement.num_physical_experts}"]
    return "\n".join(lines) + "\n"


def trtllm_usage(placement: Placement, path: str) -> str:
    """A line for the YAML file that ``--extra_llm_api_options`` names."""
    return f"moe_config: {{load_balancer: {json.dumps(path)}}}"


# ---- vLLM PR 41141 (offline EPLB): the initial mapping, one line of JSON
#
# Its loader requires the engine's own number of slots and of redundant experts, and counts the MoE layers
# from 0, whatever numbers the model gives them.


def vllm_mapping(placement: Placement) -> str:
    """A record ``eplb_initial_mapping`` of version 1.

    Raises:
        UsageError: no engine can serve it.
    """
    require_loadable(placement)
    record = {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": placement.num_redundant_experts,
        "num_slots": placement.num_physical_experts,
        "initial_global_assignments": {
            str(i): slots for i, slots in enumerate(placement.physical_to_logical_map.tolist())
        },
    }
    return json.dumps(record) + "\n"


def vllm_mapping_usage(placement: Placement, path: str) -> str:
    config = {"num_redundant_experts": placement.num_redundant_experts, "initial_mapping_path": path}
    return f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(config))}"


# ---- plain JSON


def plain_json(placement: Placement, origin: dict[str, Any]) -> str:
    """Everything known about a placement, for a user's own programs; docs/tune/export.md describes the keys.

    One line per layer; an empty slot is -1.

    Args:
        origin: where the placement comes from, as JSON.
    """
    head = {
        "origin": origin,
        "ep_size": placement.ep_size,
        "num_logical_experts": placement.num_logical_experts,
        "num_physical_experts": placement.num_physical_experts,
        "layers": list(placement.layers),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = ",\n".join(f"    {slots}" for slots in placement.physical_to_logical_map.tolist())
    return "\n".join(["{", *lines, '  "physical_to_logical_map": [', rows, "  ]", "}"]) + "\n"


#: The engines, as ``--for`` names them: the file's content, and the options that make the engine load it.
ENGINES: dict[str, tuple[Callable[[Placement], str], Callable[[Placement, str], str]]] = {
    "sglang": (sglang, sglang_usage),
    "trtllm": (trtllm, trtllm_usage),
    "vllm-ascend": (vllm_ascend.text, vllm_ascend.usage),
    "vllm-mapping": (vllm_mapping, vllm_mapping_usage),
}
#: Those whose files use the model's own layer numbers.
BY_LAYER_NUMBER = ("sglang", "trtllm")
