"""The file that SGLang's ``--init-expert-location`` loads.

``compute_initial_expert_location_metadata`` (SGLang 0.5.23, srt/eplb/expert_location.py) takes the object's
members as arguments, so that one key more ends the engine, and takes row ``n`` for hidden layer ``n`` without
looking at their number, so that a file of the MoE layers alone places experts in the wrong layers.
"""

from __future__ import annotations

import json
import shlex

import numpy as np

from eplb_analyze.errors import ExportError
from eplb_analyze.policies import policy
from eplb_analyze.transfer.exporters.placement import Placement, require_loadable


def with_all_hidden_layers(placement: Placement, num_hidden_layers: int) -> Placement:
    """The placement with a row for every hidden layer of the model.

    Layers that it does not have get the placement that the engine starts with itself (expert ``i`` in
    slot ``i``, then the first experts once more): dense layers have no experts to place, and a MoE layer
    that was not recorded is served as if there were no file.

    Raises:
        ExportError: it has layers beyond that number.
    """
    beyond = [layer for layer in placement.layers if layer >= num_hidden_layers]
    if beyond:
        raise ExportError(
            f"the placement is of layers {placement.layers[0]} to {beyond[-1]}, so the model has more than "
            f"{num_hidden_layers} hidden layers (see num_hidden_layers in its config.json)"
        )
    first = policy.initial(placement.num_logical_experts, placement.num_physical_experts)
    rows = np.tile(first, (num_hidden_layers, 1))
    rows[list(placement.layers)] = placement.physical_to_logical_map
    return Placement(tuple(range(num_hidden_layers)), placement.ep_size, placement.num_logical_experts, rows)


def text(placement: Placement) -> str:
    """JSON with the one key ``physical_to_logical_map``: a list a hidden layer.

    Raises:
        ExportError: it is not of all hidden layers, from 0 on, or no engine can serve it.
    """
    if placement.layers != tuple(range(len(placement.layers))):
        raise ExportError(
            "SGLang takes row n for hidden layer n, and layers are missing from this placement; "
            "give --num-hidden-layers"
        )
    require_loadable(placement)
    return json.dumps({"physical_to_logical_map": placement.physical_to_logical_map.tolist()}) + "\n"


def usage(placement: Placement, path: str) -> str:
    """What SGLang is started with to load the file."""
    sizes = f"--ep-size {placement.ep_size} --ep-num-redundant-experts {placement.num_redundant_experts}"
    return f"{sizes} --init-expert-location {shlex.quote(path)}"
