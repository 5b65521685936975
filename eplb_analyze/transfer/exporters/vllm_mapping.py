"""The initial mapping of vLLM PR 41141 (offline EPLB): one line of JSON.

Its loader wants the engine's own number of slots and of redundant experts, and numbers the MoE layers
from 0, whatever the model calls them.
"""

from __future__ import annotations

import json
import shlex

from eplb_analyze.transfer.exporters.placement import Placement, require_loadable


def text(placement: Placement) -> str:
    """A record ``eplb_initial_mapping`` of version 1.

    Raises:
        ExportError: no engine can serve it.
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


def usage(placement: Placement, path: str) -> str:
    """What vLLM with that PR is started with to load the file."""
    config = {"num_redundant_experts": placement.num_redundant_experts, "initial_mapping_path": path}
    return f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(config))}"
