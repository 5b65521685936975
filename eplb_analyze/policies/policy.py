"""Policies: given the loads of a window, which expert goes into which slot; and what none of them can beat.

Those of the engines, each exact (docs/policies.md), and a user's own as ``module:function``. All are pure
functions of a :class:`Problem`; the algorithm that they share is in ``rebalancing``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.errors import UsageError
from eplb_analyze.policies import deepseek as rebalancing

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class PolicyError(UsageError):
    """A policy is not there, cannot do what it is asked, or gave what is no placement."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a policy is asked: place the experts of all layers, given the loads of a window.

    Raises PolicyError where the numbers do not fit together.
    """

    #: Tokens of each logical expert in the window: int64 or float64 ``[layers, num_logical_experts]``.
    weight: npt.NDArray[Any]
    num_physical_experts: int
    ep_size: int
    num_nodes: int = 1
    num_groups: int = 1
    #: The placement in force, int32 ``[layers, num_physical_experts]``; None: none yet, or of another shape.
    current: Int32 | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.size:
            raise PolicyError(f"loads have the shape {self.weight.shape}, not (layers, logical experts)")
        if not (np.isfinite(self.weight).all() and (self.weight >= 0).all()):
            raise PolicyError("loads must be finite and not negative")
        if min(self.ep_size, self.num_nodes, self.num_groups) < 1:
            raise PolicyError("EP size, nodes and groups must be at least 1")
        experts = self.weight.shape[1]
        if self.num_physical_experts < experts:
            raise PolicyError(f"{self.num_physical_experts} slots cannot hold {experts} logical experts")
        if self.num_physical_experts % self.ep_size:
            raise PolicyError(
                f"{self.num_physical_experts} slots cannot be divided evenly among {self.ep_size} EP ranks"
            )
        shape = (len(self.weight), self.num_physical_experts)
        if self.current is not None and self.current.shape != shape:
            raise PolicyError(f"the current placement has the shape {self.current.shape}, not {shape}")


Policy = Callable[[Problem], Int32]


def deepseek(problem: Problem) -> Int32:
    """``rebalance_experts`` of deepseek-ai/EPLB: hierarchical where nodes divide groups, else global.

    Raises PolicyError where it would be hierarchical and groups or nodes do not divide experts or ranks.
    """
    return _rebalance(problem, rebalancing.EPLB)


def sglang(problem: Problem) -> Int32:
    """SGLang's ``deepseek`` and ``deepseek_hierarchical``, a copy of it. Raises PolicyError likewise."""
    return _rebalance(problem, rebalancing.SGLANG)


def vllm(problem: Problem) -> Int32:
    """vLLM's ``DefaultEplbPolicy``: the same steps, and an expert that stays on its rank keeps its slot.

    Raises PolicyError as :func:`deepseek` does.
    """
    placed = _rebalance(problem, rebalancing.VLLM)
    return placed if problem.current is None else _keep_slots(placed, problem.current, problem.ep_size)


def static(problem: Problem) -> Int32:
    """No rearrangement: what is in force, or what an engine starts with."""
    if problem.current is not None:
        return problem.current
    layers, experts = problem.weight.shape
    return np.tile(initial(experts, problem.num_physical_experts), (layers, 1))


POLICIES: dict[str, Policy] = {"deepseek": deepseek, "sglang": sglang, "vllm": vllm, "static": static}


def initial(num_logical_experts: int, num_physical_experts: int) -> Int32:
    """The placement that vLLM and SGLang start with: int32 ``[num_physical_experts]``.

    Every expert once, then the redundant slots from expert 0 on, over and over.
    """
    return (np.arange(num_physical_experts) % num_logical_experts).astype(np.int32)


def _rebalance(problem: Problem, arithmetic: rebalancing.Arithmetic) -> Int32:
    groups, nodes = problem.num_groups, problem.num_nodes
    if groups % nodes:
        groups = nodes = 1
    experts = problem.weight.shape[1]
    if experts % groups:
        raise PolicyError(f"{experts} logical experts cannot be divided evenly among {groups} groups")
    if problem.ep_size % nodes:
        raise PolicyError(f"{problem.ep_size} EP ranks cannot be divided evenly among {nodes} nodes")
    weight = problem.weight.astype(np.float32)
    placed = rebalancing.hierarchical(
        weight, problem.num_physical_experts, groups, nodes, problem.ep_size, arithmetic
    )
    return placed.astype(np.int32)


def _keep_slots(placed: Int32, current: Int32, ep_size: int) -> Int32:
    """Reorder the experts of each rank: those it held stay in their slots, the others fill the rest in order.

    Both int32 ``[layers, num_physical_experts]``, so the result. Slots are served in ascending order.
    """
    new, old = (each.reshape(-1, each.shape[1] // ep_size) for each in (placed, current))
    rank = np.arange(len(new))
    out = np.empty_like(new)
    used = np.zeros(new.shape, np.bool_)
    kept = np.zeros(new.shape, np.bool_)
    for slot in range(new.shape[1]):
        same = (new == old[:, slot, None]) & ~used
        found, where = same.any(axis=1), same.argmax(axis=1)
        used[rank[found], where[found]] = True
        kept[:, slot] = found
    out[kept] = old[kept]
    out[~kept] = new[~used]
    return out.reshape(placed.shape)


def named(name: str) -> Policy:
    """One of :data:`POLICIES`, or a user's ``module:function`` from ``sys.path`` or the current folder.

    Runs that module. Raises PolicyError.
    """
    if name in POLICIES:
        return POLICIES[name]
    module, _, function = name.partition(":")
    if not (module and function):
        known = ", ".join(POLICIES)
        raise PolicyError(f"no policy is called {name!r}: there are {known}, and your own as module:function")
    if (here := os.getcwd()) not in sys.path:
        # At the end: a file in this folder hides no installed module.
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as fault:
        raise PolicyError(f"policy {name!r}: importing {module} failed: {_said(fault)}") from fault
    if not callable(found):
        raise PolicyError(f"policy {name!r}: the module {module} has no function {function}")
    policy: Policy = found
    return policy


def place(policy: Policy, problem: Problem) -> Int32:
    """What the policy answers, checked: int32 ``[layers, num_physical_experts]``, each expert there.

    The policy works on copies. Raises PolicyError where it fails or the answer is no placement.
    """
    current = None if problem.current is None else problem.current.copy()
    name = getattr(policy, "__name__", type(policy).__name__)
    try:
        answer = np.asarray(policy(replace(problem, weight=problem.weight.copy(), current=current)))
    except PolicyError:
        raise
    except Exception as fault:
        raise PolicyError(f"policy {name} failed: {_said(fault)}") from fault
    layers, experts = problem.weight.shape
    shape = (layers, problem.num_physical_experts)
    if answer.shape != shape or answer.dtype.kind not in "iu":
        raise PolicyError(f"policy {name} gave {answer.dtype} {answer.shape}, not integers {shape}")
    if answer.min() < 0 or answer.max() >= experts:
        raise PolicyError(f"policy {name} placed experts that are not in 0 to {experts - 1}")
    there = np.zeros((layers, experts), np.bool_)
    there[np.arange(layers)[:, None], answer] = True
    if not there.all():
        layer, expert = np.argwhere(~there)[0]
        raise PolicyError(f"policy {name} left expert {expert} of layer index {layer} without a slot")
    return answer.astype(np.int32)


def _said(fault: Exception) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())


def lower_bound(weight: npt.NDArray[Any], num_physical_experts: int, ep_size: int) -> Float64:
    """What the busiest rank gets at least, whatever the placement: ``[..., experts]`` to ``[...]``.

    Tokens of an expert are taken as split evenly over its copies. The largest of four bounds, with R ranks
    of S slots, X slots more than experts, and c_e copies of expert e:

    - the mean of the ranks;
    - the (X + 1)-th largest of all w_e / k, k = 1, 2, …: where all slots are below M, every w_e / k ≥ M
      takes a copy beyond the first, and there are X;
    - for all j: the j hottest experts have at most j + X copies, so they lie on some q ≤ j + X ranks, whose
      mean is by the lemma at least that of the j hottest and the q S − j − X coldest experts;
    - for all k: of the k R + 1 + X hottest experts k R + 1 have one copy, so k + 1 of those meet on a rank,
      which has by the lemma at least the coldest k + 1 of them and the S − k − 1 − X coldest of all.

    Lemma: q ranks that hold all copies of j experts hold shares f_e of the others with Σ f_e c_e = q S −
    Σ_j c_e. As f_e c_e ≤ f_e + c_e − 1, Σ f_e ≥ q S − j − X: at least the so many coldest others.
    """
    hot = -np.sort(-weight.reshape(-1, weight.shape[-1]).astype(np.float64), axis=-1)
    ranks, slots, spare = ep_size, num_physical_experts // ep_size, num_physical_experts - hot.shape[1]
    bounds = [hot.sum(axis=-1) / ranks]

    candidates = hot[:, : spare + 1]
    _, copies = rebalancing.replicate(candidates, candidates.shape[1] + spare, np.float64)
    bounds.append((candidates / copies).max(axis=-1))

    none = np.zeros((len(hot), 1))
    hottest = np.concatenate([none, np.cumsum(hot, axis=-1)], axis=-1)
    coldest = np.concatenate([none, np.cumsum(hot[:, ::-1], axis=-1)], axis=-1)
    # From j + X = R on q can be R, which is the mean.
    for j in range(1, ranks - spare):
        q = np.arange(-(-j // slots), j + spare + 1)
        others = coldest[:, np.maximum(q * slots - j - spare, 0)]
        bounds.append(((hottest[:, j, None] + others) / q).min(axis=-1))

    for k in range(slots):
        last = k * ranks + 1 + spare
        if last <= hot.shape[1]:
            met = hottest[:, last] - hottest[:, last - k - 1]
            bounds.append(met + coldest[:, max(slots - k - 1 - spare, 0)])
    bound: Float64 = np.max(bounds, axis=0).reshape(weight.shape[:-1])
    return bound
