"""Policies: which expert goes into which slot, given the loads of a window, and a bound for any placement.

The engines' policies are exact slot by slot (docs/tune/policies.md); a user's own is ``module:function``.
All are pure functions of a :class:`Problem`; the algorithm that the engines share is in
:mod:`eplb_analyze.policies.deepseek`.
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
from eplb_analyze.policies import atom
from eplb_analyze.policies.active_experts import active_experts as place_active_experts
from eplb_analyze.policies.deepseek import EPLB, SGLANG, VLLM, Arithmetic, hierarchical, replicate
from eplb_analyze.policies.flash_lb import flash_lb as place_flash_lb
from eplb_analyze.policies.layer_budgets import layer_budgets as place_layer_budgets
from eplb_analyze.policies.near_sources import near_sources as place_near_sources
from eplb_analyze.policies.slots import keep_slots
from eplb_analyze.policies.swift_balance import swift_balance as place_swift_balance
from eplb_dump.format.schema import EMPTY_SLOT

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """The input of a policy: place the experts of all layers, given the loads of a window.

    Raises UsageError if the numbers are inconsistent.
    """

    #: Tokens of each logical expert in the window: int64 or float64 ``[layers, num_logical_experts]``.
    weight: npt.NDArray[Any]
    num_physical_experts: int
    ep_size: int
    num_nodes: int = 1
    num_groups: int = 1
    #: The placement in force, int32 ``[layers, num_physical_experts]``; None if there is none of this shape.
    current: Int32 | None = None
    #: How many experts each layer has, int64 ``[layers]``; its others have no weight. None: all of them.
    experts: Int64 | None = None
    #: The same tokens by time, the oldest first: ``[windows, layers, num_logical_experts]``. Their sum can be
    #: less than ``weight``. None: not known.
    series: npt.NDArray[Any] | None = None
    #: The steps of each window of ``series``.
    steps_per_window: int = 1
    #: ``weight`` by the rank that sent it: ``[layers, ep_size, num_logical_experts]``. None: not known.
    by_source: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or not self.weight.size:
            raise UsageError(f"loads have the shape {self.weight.shape}, not (layers, logical experts)")
        if not (np.isfinite(self.weight).all() and (self.weight >= 0).all()):
            raise UsageError("loads must be finite and not negative")
        if min(self.ep_size, self.num_nodes, self.num_groups) < 1:
            raise UsageError("EP size, nodes and groups must be at least 1")
        experts = self.weight.shape[1]
        if self.num_physical_experts < experts:
            raise UsageError(f"{self.num_physical_experts} slots cannot hold {experts} logical experts")
        if self.num_physical_experts % self.ep_size:
            raise UsageError(
                f"{self.num_physical_experts} slots cannot be divided evenly among {self.ep_size} EP ranks"
            )
        shape = (len(self.weight), self.num_physical_experts)
        if self.current is not None and self.current.shape != shape:
            raise UsageError(f"the current placement has the shape {self.current.shape}, not {shape}")
        if self.series is not None and (
            self.series.shape[1:] != self.weight.shape or not len(self.series) or self.steps_per_window < 1
        ):
            raise UsageError(
                f"the series of loads has the shape {self.series.shape}, not (windows, "
                f"{', '.join(map(str, self.weight.shape))})"
            )

        layers, experts = self.weight.shape
        if self.by_source is not None and self.by_source.shape != (layers, self.ep_size, experts):
            raise UsageError(
                f"the tokens of each rank have the shape {self.by_source.shape}, not "
                f"{(layers, self.ep_size, experts)}"
            )

    def windows(self) -> npt.NDArray[Any]:
        """``series``; if it is not known, one window with all tokens."""
        return self.weight[None] if self.series is None else self.series

    def placement(self) -> Int32:
        """The placement in force; if there is none, the one that engines start with."""
        if self.current is not None:
            return self.current
        layers, experts = self.weight.shape
        return np.tile(initial(experts, self.num_physical_experts), (layers, 1))


Policy = Callable[[Problem], Int32]


def deepseek(problem: Problem) -> Int32:
    """``rebalance_experts`` of deepseek-ai/EPLB: hierarchical if nodes divide groups, else global.

    Raises UsageError if it is hierarchical, and groups do not divide experts or nodes do not divide ranks.
    """
    return _rebalance(problem, EPLB)


def sglang(problem: Problem) -> Int32:
    """SGLang's ``deepseek`` and ``deepseek_hierarchical``. Raises UsageError as :func:`deepseek` does."""
    return _rebalance(problem, SGLANG)


def vllm(problem: Problem) -> Int32:
    """vLLM's ``DefaultEplbPolicy``: the same algorithm, but an expert that stays on its rank keeps its slot.

    Raises UsageError as :func:`deepseek` does.
    """
    placed = _rebalance(problem, VLLM)
    return placed if problem.current is None else keep_slots(placed, problem.current, problem.ep_size)


def swift_balance(problem: Problem) -> Int32:
    """vllm-ascend's default, ``SwiftBalanceEplb``: few moves from the placement in force."""
    return place_swift_balance(problem.weight, _without_empty(problem), problem.ep_size)


def flash_lb(problem: Problem) -> Int32:
    """vllm-ascend's ``FlashLB``: a placement for a series of windows."""
    current = _without_empty(problem)
    return place_flash_lb(problem.windows(), problem.steps_per_window, current, problem.ep_size)


def biased(problem: Problem) -> Int32:
    """ROCm ATOM's ``biased``: the hottest experts on every rank.

    Raises UsageError as :func:`deepseek` does.
    """
    return _atom(problem, biased=True)


def naive(problem: Problem) -> Int32:
    """ROCm ATOM's default, ``naive``. Raises UsageError as :func:`deepseek` does."""
    return _atom(problem, biased=False)


def layer_budgets(problem: Problem) -> Int32:
    """Half of the redundant slots, in the layers where they help most; the others stay empty (-1).

    Raises UsageError as :func:`deepseek` does.
    """
    size = problem.num_physical_experts, problem.ep_size
    return place_layer_budgets(problem.weight, *size, *_nodes_and_groups(problem))


def active_experts(problem: Problem) -> Int32:
    """Balances the number of experts that have a token in a step."""
    return place_active_experts(
        problem.windows(), problem.steps_per_window, problem.num_physical_experts, problem.ep_size,
        problem.current,
    )  # fmt: skip


def static(problem: Problem) -> Int32:
    """No rearrangement: the placement in force, or the one that an engine starts with."""
    return problem.placement()


def round_robin(problem: Problem) -> Int32:
    """No rearrangement: expert ``e`` stays on rank ``e % ep_size``; see :func:`dealt`."""
    layers, experts = problem.weight.shape
    return np.tile(dealt(experts, problem.num_physical_experts, problem.ep_size), (layers, 1))


def near_sources(problem: Problem) -> Int32:
    """``deepseek``, its ranks renumbered so that the fewest tokens cross nodes.

    Raises UsageError as :func:`deepseek` does, and if the tokens of each rank are not known.
    """
    if problem.by_source is None:
        raise UsageError("near_sources needs the tokens that each rank sent, which are not known")
    nodes, groups = _nodes_and_groups(problem)
    if groups == 1 and problem.ep_size % problem.num_nodes == 0:
        nodes = problem.num_nodes  # which `deepseek` ignores
    return place_near_sources(deepseek(problem), problem.by_source, nodes, grouped=groups > 1)


POLICIES: dict[str, Policy] = {
    "deepseek": deepseek,
    "sglang": sglang,
    "vllm": vllm,
    "swift_balance": swift_balance,
    "flash_lb": flash_lb,
    "biased": biased,
    "naive": naive,
    "layer_budgets": layer_budgets,
    "active_experts": active_experts,
    "static": static,
    "round_robin": round_robin,
}


#: Policies that need the tokens of each rank, which few recordings have.
WITH_SOURCES: dict[str, Policy] = {"near_sources": near_sources}

#: Not a policy that sees past loads, so not among them: see :mod:`eplb_analyze.policies.oracle`.
ORACLE = "oracle"


def initial(num_logical_experts: int, num_physical_experts: int) -> Int32:
    """The placement that vLLM and SGLang start with: int32 ``[num_physical_experts]``.

    Every expert once, then the redundant slots: expert 0, 1, …, as often as needed.
    """
    return (np.arange(num_physical_experts) % num_logical_experts).astype(np.int32)


def dealt(num_logical_experts: int, num_physical_experts: int, ep_size: int) -> Int32:
    """The experts of :func:`initial`, dealt to the ranks in turn: int32 ``[num_physical_experts]``.

    Without redundant experts it is vLLM's ``--expert-placement-strategy round_robin``. Raises UsageError if
    the slots cannot be divided evenly among the ranks.
    """
    if num_physical_experts % ep_size:
        raise UsageError(
            f"{num_physical_experts} slots cannot be divided evenly among {ep_size} EP ranks, "
            "which round_robin needs"
        )
    slots = initial(num_logical_experts, num_physical_experts)
    return np.ascontiguousarray(slots.reshape(-1, ep_size).T).reshape(-1)


#: Placements that do not depend on loads, by name: what they say, and their slots (experts, slots, ranks).
INITIAL: dict[str, tuple[str, Callable[[int, int, int], Int32]]] = {
    "linear": ("expert e is in slot e", lambda experts, slots, ranks: initial(experts, slots)),
    "round_robin": ("expert e is on rank e % EP size", dealt),
}


def ungrouped(num_nodes: int, num_groups: int) -> str | None:
    """What to tell a user whose nodes do not divide the groups: the engines' policies then ignore both."""
    if num_groups % num_nodes == 0:
        return None
    return (
        f"{num_groups} groups of experts cannot be divided evenly among {num_nodes} nodes; as in the "
        f"engines, the policy then ignores groups and nodes"
    )


def _rebalance(problem: Problem, arithmetic: Arithmetic) -> Int32:
    nodes, groups = _nodes_and_groups(problem)
    weight = problem.weight.astype(np.float32)
    placed = hierarchical(weight, problem.num_physical_experts, groups, nodes, problem.ep_size, arithmetic)
    return placed.astype(np.int32)


def _nodes_and_groups(problem: Problem) -> tuple[int, int]:
    """Those that the policy uses. Raises UsageError if groups do not divide experts or nodes the ranks."""
    groups, nodes = problem.num_groups, problem.num_nodes
    if ungrouped(nodes, groups) is not None:
        groups = nodes = 1
    experts = problem.weight.shape[1]
    if experts % groups:
        raise UsageError(f"{experts} logical experts cannot be divided evenly among {groups} groups")
    if problem.ep_size % nodes:
        raise UsageError(f"{problem.ep_size} EP ranks cannot be divided evenly among {nodes} nodes")
    return nodes, groups


def _atom(problem: Problem, *, biased: bool) -> Int32:
    size = problem.num_physical_experts, problem.ep_size
    nodes, groups = _nodes_and_groups(problem)
    placed = atom.place(problem.weight, *size, nodes, groups, problem.current, biased=biased)
    return placed.astype(np.int32)


def _without_empty(problem: Problem) -> Int32:
    """The placement in force; an empty slot counts as another copy of an expert that its rank has."""
    current = problem.placement()
    if (current >= 0).all():
        return current
    layers, experts = problem.weight.shape
    at_start = np.tile(initial(experts, problem.num_physical_experts), (layers, 1))
    ranks = current.reshape(layers, problem.ep_size, -1)
    some = np.broadcast_to(ranks.max(axis=2, keepdims=True), ranks.shape).reshape(current.shape)
    return np.where(current >= 0, current, np.where(some >= 0, some, at_start))


def named(name: str) -> Policy:
    """One of :data:`POLICIES` or :data:`WITH_SOURCES`, or a user's ``module:function``.

    Imports that module, from ``sys.path`` or the current folder. Raises UsageError.
    """
    known = POLICIES | WITH_SOURCES
    if name in known:
        return known[name]
    module, _, function = name.partition(":")
    if not (module and function):
        raise UsageError(
            f"there is no policy {name!r}; choose {', '.join(known)}, or your own as module:function"
        )
    if (here := os.getcwd()) not in sys.path:
        # At the end, so that a file in this folder does not hide an installed module.
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as fault:
        raise UsageError(f"policy {name!r}: importing {module} failed: {_one_line(fault)}") from fault
    if not callable(found):
        raise UsageError(f"policy {name!r}: the module {module} has no function {function}")
    policy: Policy = found
    return policy


def place(policy: Policy, problem: Problem) -> Int32:
    """The policy's placement, checked: int32 ``[layers, num_physical_experts]`` that holds each expert.

    An empty slot is -1. The policy works on copies. Layers with different numbers of experts are placed
    apart, each as a problem that has no others. Raises UsageError if it fails or its answer is not a
    placement.
    """
    if problem.experts is not None:
        placed = np.empty((len(problem.weight), problem.num_physical_experts), np.int32)
        for count in np.unique(problem.experts).tolist():
            same = problem.experts == count
            current = None if problem.current is None else problem.current[same]
            weight = problem.weight[same, :count]
            series = None if problem.series is None else problem.series[:, same, :count]
            sent = None if problem.by_source is None else problem.by_source[same, :, :count]
            own = replace(
                problem, weight=weight, current=current, series=series, by_source=sent, experts=None
            )
            placed[same] = place(policy, own)
        return placed
    current, series, sent = (
        None if each is None else each.copy() for each in (problem.current, problem.series, problem.by_source)
    )
    name = getattr(policy, "__name__", type(policy).__name__)
    try:
        own = replace(problem, weight=problem.weight.copy(), current=current, series=series, by_source=sent)
        answer = np.asarray(policy(own))
    except UsageError:
        raise
    except Exception as fault:
        raise UsageError(f"policy {name} failed: {_one_line(fault)}") from fault
    layers, experts = problem.weight.shape
    shape = (layers, problem.num_physical_experts)
    if answer.shape != shape or answer.dtype.kind not in "iu":
        raise UsageError(f"policy {name} returned {answer.dtype} {answer.shape}, not integers {shape}")
    if answer.min() < EMPTY_SLOT or answer.max() >= experts:
        raise UsageError(f"policy {name} placed experts outside of 0 to {experts - 1}")
    # Empty slots are held by one more expert, which does not count.
    placed = np.zeros((layers, experts + 1), np.bool_)
    placed[np.arange(layers)[:, None], answer] = True
    placed = placed[:, :experts]
    if not placed.all():
        layer, expert = np.argwhere(~placed)[0]
        raise UsageError(f"policy {name} left expert {expert} of layer index {layer} without a slot")
    return answer.astype(np.int32)


def _one_line(fault: Exception) -> str:
    return " ".join(f"{type(fault).__name__}: {fault}".split())


def lower_bound(weight: npt.NDArray[Any], num_physical_experts: int, ep_size: int) -> Float64:
    """A lower bound of the busiest rank's tokens in any placement: ``[..., experts]`` to ``[...]``.

    The tokens of an expert are split evenly over its copies. It is the largest of four bounds, with R ranks
    of S slots, X more slots than experts, and c_e copies of expert e:

    - the mean of the ranks;
    - the (X + 1)-th largest of all w_e / k, k = 1, 2, …: if all slots are below M, every w_e / k ≥ M needs
      a copy beyond the first, and there are X;
    - for all j: the j hottest experts have at most j + X copies, so they are on some q ≤ j + X ranks, whose
      mean is, by the lemma, at least that of the j hottest and the q S − j − X coldest experts;
    - for all k: of the k R + 1 + X hottest experts, k R + 1 have one copy, so k + 1 of those share a rank,
      which has, by the lemma, at least the coldest k + 1 of them and the S − k − 1 − X coldest of all.

    Lemma: q ranks that hold all copies of j experts hold shares f_e of the others with Σ f_e c_e = q S −
    Σ_j c_e. As f_e c_e ≤ f_e + c_e − 1, Σ f_e ≥ q S − j − X: at least that many of the coldest others.
    """
    hot = -np.sort(-weight.reshape(-1, weight.shape[-1]).astype(np.float64), axis=-1)
    ranks, slots, spare = ep_size, num_physical_experts // ep_size, num_physical_experts - hot.shape[1]
    bounds = [hot.sum(axis=-1) / ranks]

    candidates = hot[:, : spare + 1]
    _, copies = replicate(candidates, candidates.shape[1] + spare, np.float64)
    bounds.append((candidates / copies).max(axis=-1))

    none = np.zeros((len(hot), 1))
    hottest = np.concatenate([none, np.cumsum(hot, axis=-1)], axis=-1)
    coldest = np.concatenate([none, np.cumsum(hot[:, ::-1], axis=-1)], axis=-1)
    # If j + X ≥ R, q can be R, which gives the mean.
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
