"""vllm-ascend's expert map, and how a placement is repaired that its loader cannot take.

``expert_file_to_tensor`` and ``init_eplb_config`` (vllm_ascend/eplb/core/eplb_utils.py) take MoE layers by
their place in ``layer_list``, want the same number of experts on every device, and keep one slot for each
expert of a device: one that stands twice on a device wastes a slot, and on device 0 it shifts the numbers of
all others' slots.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import ExportError
from eplb_analyze.transfer.exporters.placement import Placement, require_loadable
from eplb_dump.format.journal import Int32

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Repair:
    """What was changed so that no device holds an expert twice."""

    layers: int = 0
    #: Pairs of slots that changed experts with each other: every expert keeps its replicas.
    swaps: int = 0
    #: Slots that got another expert, as theirs had more replicas than there are devices.
    replaced: int = 0


def repaired(placement: Placement, weight: npt.NDArray[Any] | None = None) -> tuple[Placement, Repair]:
    """The placement with no expert twice on a device, changed as little as that takes.

    A spare copy changes places with an expert of another device whose share of the load is nearest to
    its own, so that the devices' loads hardly move. Only where an expert has more replicas than there
    are devices, its spare slots go to the experts with the most load for each replica.

    Args:
        weight: [layers, num_logical_experts], each expert's load; without it all are alike.

    Raises:
        ExportError: a device has more slots than the model has experts, or no engine can serve it.
    """
    require_loadable(placement)
    experts, devices = placement.num_logical_experts, placement.ep_size
    if placement.num_physical_experts > experts * devices:
        raise ExportError(
            f"{placement.num_physical_experts // devices} slots a device are more than the model's {experts} "
            "experts, so one must stand twice on a device, which vllm-ascend cannot load"
        )
    rows = placement.physical_to_logical_map.copy()
    layers = swaps = replaced = 0
    for i, slots in enumerate(rows.reshape(len(rows), devices, -1)):
        load = np.ones(experts) if weight is None else np.asarray(weight[i], np.float64)
        here = _replace_surplus(slots, load)
        there = _swap_apart(slots, load)
        layers, swaps, replaced = layers + bool(here or there), swaps + there, replaced + here
    return replace(placement, physical_to_logical_map=rows), Repair(layers, swaps, replaced)


def _replace_surplus(slots: Int32, load: Float64) -> int:
    """Give slots of experts with more replicas than devices to others; in place, ``[devices, slots]``."""
    copies = np.bincount(slots.reshape(-1), minlength=len(load))
    replaced = 0
    while (copies > len(slots)).any():
        expert = int(np.argmax(copies))
        device = int(np.argmax((slots == expert).sum(axis=1)))
        position = int(np.flatnonzero(slots[device] == expert)[-1])
        other = int(np.argmax(np.where(copies < len(slots), load / copies, -1)))
        slots[device, position] = other
        copies[expert] -= 1
        copies[other] += 1
        replaced += 1
    return replaced


def _swap_apart(slots: Int32, load: Float64) -> int:
    """Swap slots between devices until none holds an expert twice; in place, ``[devices, slots]``.

    Every swap leaves at least one double less: a device that lacks the expert has either a double of its
    own to give, or, all its experts being different, one that the device with the double does not hold.
    """
    experts = len(load)
    share = load / np.bincount(slots.reshape(-1), minlength=experts)
    held = np.stack([np.bincount(own, minlength=experts) for own in slots])
    swaps = 0
    while (held > 1).any():
        device, expert = (int(x) for x in np.argwhere(held > 1)[0])
        position = int(np.flatnonzero(slots[device] == expert)[-1])
        # By how many doubles a swap with each slot of the others leaves fewer.
        gain = (held[device][slots] == 0).astype(int) + np.take_along_axis(held > 1, slots, axis=1)
        gain[held[:, expert] > 0] = 0
        distance = np.where(gain == gain.max(), np.abs(share[slots] - share[expert]), np.inf)
        other, at = (int(x) for x in np.unravel_index(np.argmin(distance), distance.shape))
        given = int(slots[other, at])
        slots[device, position], slots[other, at] = given, expert
        held[device, [expert, given]] += [-1, 1]
        held[other, [expert, given]] += [1, -1]
        swaps += 1
    return swaps


def text(placement: Placement) -> str:
    """JSON: ``moe_layer_count`` and ``layer_list``, laid out as vllm-ascend's own recorder does.

    Raises:
        ExportError: a device holds an expert twice, or no engine can serve it.
    """
    require_loadable(placement)
    devices = placement.devices()
    for layer, slots in zip(placement.layers, devices, strict=True):
        for device, own in enumerate(slots):
            experts, counts = np.unique(own, return_counts=True)
            if (counts > 1).any():
                raise ExportError(
                    f"expert {experts[counts > 1][0]} stands twice on device {device} in layer {layer}, "
                    "which vllm-ascend cannot load; --repair moves spare copies to other devices"
                )
    layer_list = [
        {
            "layer_id": i,
            "device_count": placement.ep_size,
            "device_list": [{"device_id": d, "device_expert": own} for d, own in enumerate(slots)],
        }
        for i, slots in enumerate(devices.tolist())
    ]
    return json.dumps({"moe_layer_count": len(layer_list), "layer_list": layer_list}, indent=4) + "\n"


def usage(placement: Placement, path: str) -> str:
    """What vllm-ascend (Model Runner V1) is started with to load the file."""
    config = json.dumps({"eplb_config": {"expert_map_path": path}})
    return f"--enable-expert-parallel --additional-config {shlex.quote(config)}"
