"""The YAML that TensorRT-LLM's MoE load balancer is configured with.

``MoeLoadBalancerConfig`` (llmapi/llm_args.py) refuses any key but the three here, looks layers up by the
model's own number, and wants as many experts in each as there are slots, every expert among them.
"""

from __future__ import annotations

import json

from eplb_analyze.transfer.exporters.placement import Placement, require_loadable


def text(placement: Placement) -> str:
    """``initial_global_assignments`` by layer, ``num_slots``, and no updates: the placement stays.

    Raises:
        ExportError: no engine can serve it.
    """
    require_loadable(placement)
    lines = ["initial_global_assignments:"]
    for layer, slots in zip(placement.layers, placement.physical_to_logical_map.tolist(), strict=True):
        lines.append(f"  {layer}: {slots}")  # a list of numbers is written in YAML as in Python
    lines += ["layer_updates_per_iter: 0", f"num_slots: {placement.num_physical_experts}"]
    return "\n".join(lines) + "\n"


def usage(placement: Placement, path: str) -> str:
    """What TensorRT-LLM's options (``--extra_llm_api_options``, YAML) say to load the file."""
    return f"moe_config: {{load_balancer: {json.dumps(path)}}}"
