"""Makes ``placements.npz``: what vllm-ascend's and ROCm ATOM's own code answers to random problems.

    pip download --no-deps --no-build-isolation --no-binary :all: vllm-ascend==0.23.0.post1    (unpack it)
    git clone https://github.com/ROCm/ATOM            (commit ffdf3bb5ddf8a15a64d521a2eeb3bc7438f9ac21)
    python tests/golden/policies/make.py vllm_ascend-0.23.0.post1 ATOM/atom/model_ops/eplb.py

It needs torch, numba and scipy (made with 2.13, 0.68.1 and 1.17.1, numpy 2.4.6). What the files import
beside these belongs to the accelerator or to a running engine, and the policies do not use it: stand-ins
satisfy these imports. FlashLB is compiled without ``fastmath``, which rounds as the processor likes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from policy_problems import KINDS, SHAPES, loads, placements

#: Problems of each shape, so many of them with a series of steps, which is large; layers of a problem.
PROBLEMS, SERIES, LAYERS = 8, 2, 2


def _stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    module.__path__ = []
    sys.modules[name] = module


def _without_fastmath() -> None:
    compiler = numba.njit

    def njit(*arguments: Any, **options: Any) -> Any:
        return compiler(*arguments, **{k: v for k, v in options.items() if k not in ("fastmath", "cache")})

    numba.njit = njit


def _no_group() -> Any:
    raise RuntimeError("no engine runs")


class VllmAscend:
    """``source``: the folder that contains ``vllm_ascend``."""

    def __init__(self, source: Path) -> None:
        torch.npu = types.SimpleNamespace(device_count=lambda: 8)
        _stand_in("torch_npu")
        _stand_in("vllm")
        _stand_in("vllm.logger", logger=logging.getLogger("vllm"))
        _stand_in("vllm_ascend.distributed")
        _stand_in("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=_no_group)
        folder = "vllm_ascend.eplb.core.policy"
        for depth in range(1, 5):
            name = ".".join(folder.split(".")[:depth])
            _stand_in(name)
            sys.modules[name].__path__ = [str(source / name.replace(".", "/"))]
        self._swift = importlib.import_module(f"{folder}.policy_swift_balancer").SwiftBalanceEplb
        self._flash = importlib.import_module(f"{folder}.policy_flashlb").FlashLB

    def swift_balance(self, weight: Any, current: Any, ranks: int) -> Any:
        """``weight`` ``[layers, experts]`` are integers, ``current`` ``[layers, slots]`` is a placement."""
        shape = len(current), ranks, -1
        load = _of_slots(weight[None], current)[0]
        table, load = (torch.from_numpy(each.astype(np.int64).reshape(shape)) for each in (current, load))
        placed = self._swift().rebalance_experts(table, load)[2]
        return np.array(placed).reshape(current.shape)

    def flash_lb(self, series: Any, current: Any, ranks: int) -> Any:
        """``series`` ``[steps, layers, experts]`` are integers; a policy that has seen no other steps."""
        load = _of_slots(series, current).reshape(len(series), len(current), ranks, -1)
        placed = self._flash().rebalance_experts(current.reshape(len(current), ranks, -1), load)[2]
        return placed.reshape(current.shape)


def _of_slots(series: Any, current: Any) -> Any:
    """Tokens of slots, all of an expert on its first one: the policies add up an expert's slots."""
    load = np.zeros((len(series), *current.shape), np.int64)
    for layer, slots in enumerate(current):
        experts, first = np.unique(slots, return_index=True)
        load[:, layer, first] = series[:, layer, experts]
    return load


class Atom:
    """``source``: ``atom/model_ops/eplb.py``."""

    def __init__(self, source: Path) -> None:
        _stand_in("aiter")
        _stand_in("aiter.dist")
        _stand_in("aiter.dist.parallel_state", get_tp_group=_no_group)
        specification = importlib.util.spec_from_file_location("atom_eplb", source)
        self._module = importlib.util.module_from_spec(specification)
        sys.modules["atom_eplb"] = self._module
        specification.loader.exec_module(self._module)

    def place(
        self, name: str, weight: Any, current: Any, slots: int, ranks: int, nodes: int, groups: int
    ) -> Any:
        return self._module.rebalance_experts(
            torch.from_numpy(weight), num_physical=slots, num_groups=groups, num_nodes=nodes, num_gpus=ranks,
            enable_hierarchical=groups > 1 and nodes > 1,
            policy=self._module.resolve_placement_policy(name),
            old_p2l=None if current is None else torch.from_numpy(current),
        )[0].numpy()  # fmt: skip


def without_ties(rng: np.random.Generator, series: Any) -> Any:
    """Some tokens more, so that no two experts have the same mean plus deviation.

    FlashLB sorts these with numpy, whose order of ties depends on the processor.
    """
    while True:
        windows, each = min(len(series), 64), max(1, len(series) // 64)
        sums = (series[-windows * each :] + 1).reshape(windows, each, *series.shape[1:]).sum(axis=1)
        deviation = sums.std(axis=0, ddof=1) if windows > 1 else 0.0
        risk = np.round(sums.mean(axis=0) + 0.6744897501960817 * deviation, 6)
        tied = np.array([[np.sum(layer == value) > 1 for value in layer] for layer in risk])
        if not tied.any():
            return series
        series[-1] += np.where(tied, rng.integers(0, 2 * tied.shape[1], tied.shape), 0)


def main(vllm_ascend: Path, atom: Path, out: Path) -> None:
    _without_fastmath()
    ascend, rocm = VllmAscend(vllm_ascend), Atom(atom)
    rng = np.random.default_rng(18)
    found: dict[str, list[Any]] = {}
    for number in range(PROBLEMS * len(SHAPES)):
        at = number % len(SHAPES)
        experts, slots, ranks, nodes, groups = SHAPES[at]
        if groups % nodes:
            nodes = groups = 1  # ATOM refuses them
        weight = loads(rng, int(rng.integers(KINDS)), LAYERS, experts).astype(np.int64)
        if number % 5 == 0:
            weight[rng.random(weight.shape) < 0.7] = 0
        current = placements(rng, LAYERS, experts, slots)
        if number % 3 == 1:  # the placement that engines start with
            current = np.tile(np.arange(slots) % experts, (LAYERS, 1)).astype(np.int32)
        of_shape = {"weight": weight, "current": current}
        of_shape["swift_balance"] = ascend.swift_balance(weight, current, ranks)
        of_shape["naive"] = rocm.place("naive", weight, current, slots, ranks, nodes, groups)
        if (slots - experts) // ranks < experts:  # else it fails
            placed = rocm.place("biased", weight, current, slots, ranks, nodes, groups)
            # Later loads: in some layers the hottest experts are the same.
            of_shape["later"] = weight * 2 + rng.integers(0, 2, weight.shape)
            of_shape["biased"] = placed
            of_shape["biased_later"] = rocm.place(
                "biased", of_shape["later"], placed, slots, ranks, nodes, groups
            )
        if number < SERIES * len(SHAPES) and 3 * -(-experts // 4) < experts:  # else it reads beyond arrays
            steps = (66, 7, 1, 20)[at % 4]
            base = np.minimum(weight, 10**4)
            of_shape["series"] = without_ties(rng, rng.poisson(base, (steps, *base.shape)))
            of_shape["flash_lb"] = ascend.flash_lb(of_shape["series"], current, ranks)
        for name, array in of_shape.items():
            found.setdefault(f"{at}_{name}", []).append(array)
    small = {name: np.stack(arrays) for name, arrays in found.items()}
    for name, array in small.items():
        small[name] = array.astype(np.int64 if array.max() >= 2**31 else np.int32)
    np.savez_compressed(out, **small)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).with_name("placements.npz"))
