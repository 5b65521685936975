"""A placement as plain JSON, for programs of one's own; docs/export.md describes its keys."""

from __future__ import annotations

import json
from typing import Any

from eplb_analyze.transfer.exporters.placement import Placement


def text(placement: Placement, origin: dict[str, Any]) -> str:
    """All there is to know of it; a line a layer, empty slots as -1.

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
