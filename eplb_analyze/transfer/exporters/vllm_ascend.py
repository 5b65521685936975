"""vllm-ascend's expert map, and the repair of a placement that its loader cannot use.

``expert_file_to_tensor`` and ``init_eplb_config`` (vllm_ascend/eplb/core/eplb_utils.py) identify MoE layers
by their position in ``layer_list``, require the same number of experts on every device, and keep one slot for
each expert of a device. An expert with two replicas on a device wastes a slot, and on device 0 it shifts the
slot numbers of all others.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import UsageError
from eplb_analyze.transfer.exporters.placement import Placement, require_loadable
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32

Float64 = npt.NDArray[np.float64]


@frozen
class Repair:
    """What was changed so that no device has two replicas of an expert."""

    layers: int = 0
    #: Pairs of slots that exchanged their experts; every expert keeps its number of replicas.
    swaps: int = 0
    #: Slots that got another expert because theirs had more replicas than there are devices.
    replaced: int = 0


def repaired(placement: Placement, weight: npt.NDArray[Any] | None = None) -> tuple[Placement, Repair]:
    """The placement with at most one replica of an expert per device, changed as little as possible.

    A surplus replica is swapped with an expert of another device whose load per replica is closest to its
    own, so that the devices' loads hardly change. Only if an expert has more replicas than there are
    devices do its surplus slots go to the experts with the most load per replica.

    Args:
        weight: [layers, num_logical_experts], each expert's load; default: all equal.

    Raises:
        UsageError: a device has more slots than the model has experts, or no engine can serve the placement.
    """
    require_loadable(placement)
    experts, devices = placement.num_logical_experts, placement.ep_size
    if placement.num_physical_experts > experts * devices:
        raise UsageError(
            f"{placement.num_physical_experts // devices} slots per device exceed the model's {experts} "
            f"experts, so a device would hold an expert twice, which vllm-ascend cannot load"
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
    """Give surplus slots of experts with more replicas than devices to others; returns how many.

    ``slots`` [devices, slots] is changed in place.
    """
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
    """Swap slots between devices until none has two replicas of an expert; returns the number of swaps.

    ``slots`` [devices, slots] is changed in place. It ends because every swap removes at least one duplicate:
    a device without the expert either has a duplicate of its own to give, or, if all its experts differ, one
    that the other device does not have.
    """
    experts = len(load)
    share = load / np.bincount(slots.reshape(-1), minlength=experts)
    held = np.stack([np.bincount(own, minlength=experts) for own in slots])
    swaps = 0
    while (held > 1).any():
        device, expert = (int(x) for x in np.argwhere(held > 1)[0])
        position = int(np.flatnonzero(slots[device] == expert)[-1])
        # How many duplicates a swap with each slot of the other devices removes.
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
    """JSON: ``moe_layer_count`` and ``layer_list``, in the layout of vllm-ascend's own recorder.

    Raises:
        UsageError: a device has two replicas of an expert, or no engine can serve the placement.
    """
    require_loadable(placement)
    devices = placement.devices()
    for layer, slots in zip(placement.layers, devices, strict=True):
        for device, own in enumerate(slots):
            experts, counts = np.unique(own, return_counts=True)
            if (counts > 1).any():
                raise UsageError(
                    f"device {device} holds expert {experts[counts > 1][0]} twice in layer {layer}, which "
                    f"vllm-ascend cannot load; pass --repair to move spare copies to other devices"
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
    """The options that make vllm-ascend (Model Runner V1) load the file."""
    config = json.dumps({"eplb_config": {"expert_map_path": path}})
    return f"--enable-expert-parallel --additional-config {shlex.quote(config)}"
