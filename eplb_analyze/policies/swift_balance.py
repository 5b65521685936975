"""SwiftBalance, vllm-ascend's default: the placement in force, changed by few moves between any two ranks.

The experts with most tokens get the redundant slots; then the rank with most tokens swaps experts
with others. A rank sends another one at most one expert. What decides ties and rounding is reproduced too:
tokens of ranks are float32, and the experts of a rank are compared in the order of a Python set.

Source: ``SwiftBalanceEplb`` of vllm-ascend 0.23.0.post1,
``vllm_ascend/eplb/core/policy/policy_swift_balancer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.policies.slots import keep_slots

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

#: A layer whose busiest rank has less than so many times the mean stays as it is.
BALANCED = 1.01
#: A swap has to relieve the busiest rank by this share of the mean rank's tokens.
LEAST_RELIEF = 0.01
MAX_SWAPS = 100


def swift_balance(weight: Array, current: Int32, ranks: int) -> Int32:
    """Place the experts of all layers.

    As in the engine, the mean rank's tokens are those of the first layer, for all layers. A layer stays as
    it is if it is balanced, if the result is worse, or if a rank has more slots than there are experts.

    Args:
        weight: tokens ``[layers, num_logical_experts]``.
        current: the placement in force ``[layers, num_physical_experts]``.

    Returns:
        int32 ``[layers, num_physical_experts]``.
    """
    tokens = weight.astype(np.float64)
    mean = float(tokens[0].sum() / ranks)
    placed = current.copy()
    for layer, (own, slots) in enumerate(zip(tokens, current, strict=True)):
        before = _imbalance(own, slots, ranks)
        if before < BALANCED:
            continue
        state = _Layer.of(own, slots.reshape(ranks, -1))
        if state is None:
            continue
        busiest = state.swap(mean * LEAST_RELIEF)
        if mean > 0 and busiest / mean < before:
            placed[layer] = np.concatenate([np.fromiter(held, np.int32) for held in state.held])
    return keep_slots(placed, current, ranks)


def _imbalance(tokens: Float64, slots: Int32, ranks: int) -> float:
    """The busiest rank's tokens over the mean, 1 without tokens; added up slot by slot."""
    share = (tokens / np.maximum(1, np.bincount(slots, minlength=len(tokens))))[slots]
    mean = float(np.cumsum(share)[-1]) / ranks
    busiest = float(np.cumsum(share.reshape(ranks, -1), axis=1)[:, -1].max())
    return busiest / mean if mean >= 1e-9 else 1.0


@dataclass
class _Layer:
    """One layer while experts are moved."""

    #: Tokens of one copy of each expert, ``[experts]``.
    share: Float32
    #: Tokens of each rank, ``[ranks]``.
    load: Float32
    #: The experts of each rank.
    held: list[set[int]]
    #: Those of them that it fetches.
    fetched: list[set[int]]
    #: Whether a rank sends an expert to another one: ``[from, to]``.
    sends: npt.NDArray[np.bool_] = field(repr=False)

    @classmethod
    def of(cls, tokens: Float64, current: Int32) -> _Layer | None:
        """The layer with new experts in its redundant slots; None if a rank has too few experts.

        Args:
            tokens: ``[experts]``.
            current: ``[ranks, slots of a rank]``.
        """
        ranks = len(current)
        home, free = _redundant_slots(current, len(tokens))
        expert, share = _copies(tokens, sum(map(len, free)), ranks)
        placed = current.astype(np.int64)
        for rank, positions in enumerate(free):
            placed[rank, positions] = -1
        held = [set(row[row >= 0].tolist()) for row in placed]
        load = _rank_loads(placed, share)
        fetched: list[set[int]] = [set() for _ in range(ranks)]
        sends = np.zeros((ranks, ranks), np.bool_)

        def fetch(rank: int, position: int, chosen: int) -> None:
            placed[rank, position] = chosen
            held[rank].add(chosen)
            fetched[rank].add(chosen)
            sends[home[chosen], rank] = True

        for chosen in expert:
            open_ranks = [
                rank
                for rank in range(ranks)
                if free[rank] and chosen not in held[rank] and not sends[home[chosen], rank]
            ]
            if open_ranks:
                rank = min(open_ranks, key=load.__getitem__)
                fetch(rank, free[rank].pop(), chosen)
                load[rank] += share[chosen]
        if any(free):
            copies = np.bincount(placed[placed >= 0], minlength=len(tokens))
            share = (tokens / copies).astype(np.float32)
            for rank in range(ranks):
                for position in free[rank]:
                    order = np.argsort(share, kind="stable")[::-1].tolist()
                    hottest = next((e for e in order if e not in held[rank]), None)
                    if hottest is None:
                        return None
                    fetch(rank, position, hottest)
                    share[hottest] = np.float64(share[hottest]) * (copies[hottest] / (copies[hottest] + 1))
                    copies[hottest] += 1
            load = _rank_loads(placed, share)
        return cls(share, load, [set(row) for row in placed.tolist()], fetched, sends)

    def swap(self, least_relief: float) -> float:
        """Swap experts of the busiest rank until that does not help; its tokens before the last swap."""
        busiest = 0.0
        for _ in range(MAX_SWAPS):
            *others, hot = np.argsort(self.load, kind="stable").tolist()
            busiest = float(self.load[hot])
            for rank in others:
                if self.sends[rank, hot] or self.sends[hot, rank]:
                    continue
                found = self._best_swap(hot, rank)
                if found is not None and found[2] >= least_relief:
                    self._exchange(hot, rank, *found[:2])
                    break
            else:
                break
        return busiest

    def _best_swap(self, hot: int, rank: int) -> tuple[int, int, float] | None:
        """The expert of ``hot``, the one of ``rank``, and by how much the swap relieves the busier one."""
        ours = [e for e in self.held[hot] if e not in self.held[rank] and e not in self.fetched[hot]]
        theirs = [e for e in self.held[rank] if e not in self.held[hot] and e not in self.fetched[rank]]
        if not (ours and theirs):
            return None
        gives, takes = self.share[ours][:, None], self.share[theirs][None]
        # The engine adds Python floats for one rank, float32 for the other, and compares the two as float32.
        hot_load = float(self.load[hot])
        exact = hot_load - gives.astype(np.float64) + takes
        rounded = self.load[rank] - takes + gives
        single = rounded > exact.astype(np.float32)
        after = np.where(single, rounded.astype(np.float64), exact).reshape(-1)
        coarse = after.astype(np.float32)
        best, best_single, found = hot_load, False, None
        for pair in np.flatnonzero(coarse == min(coarse.min(), self.load[hot])).tolist():
            is_single = bool(single.reshape(-1)[pair])
            fits = coarse[pair] < np.float32(best) if is_single or best_single else after[pair] < best
            if found is None and coarse[pair] < self.load[hot]:
                fits = True
            if fits:
                best, best_single, found = float(after[pair]), is_single, pair
        if found is None:
            return None
        relief = float(self.load[hot] - np.float32(best)) if best_single else hot_load - best
        return ours[found // len(theirs)], theirs[found % len(theirs)], relief

    def _exchange(self, hot: int, rank: int, gives: int, takes: int) -> None:
        for own, lost, got in ((hot, gives, takes), (rank, takes, gives)):
            self.held[own].remove(lost)
            self.held[own].add(got)
            self.load[own] += self.share[got] - self.share[lost]
            self.fetched[own].add(got)
        self.sends[hot, rank] = self.sends[rank, hot] = True


def _redundant_slots(current: Int32, experts: int) -> tuple[list[int], list[list[int]]]:
    """The rank of each expert's first copy, and each rank's slots of other copies, slot by slot."""
    home = [-1] * experts
    free: list[list[int]] = [[] for _ in range(len(current))]
    for position, column in enumerate(current.T.tolist()):
        for rank, expert in enumerate(column):
            if home[expert] < 0:
                home[expert] = rank
            else:
                free[rank].append(position)
    return home, free


def _copies(tokens: Float64, redundant: int, ranks: int) -> tuple[list[int], Float32]:
    """The experts of redundant slots, the one with most tokens per copy first, and tokens per copy.

    As in the engine, a further copy of an expert with c copies changes its tokens by (c + 1) / (c + 2), so
    that copies count for more than they get.
    """
    share, copies = tokens.copy(), np.ones(len(tokens), np.int64)
    for _ in range(redundant):
        open_experts = np.flatnonzero(copies < ranks)
        if not len(open_experts):
            break
        # Of ties, the last one.
        chosen = open_experts[len(open_experts) - 1 - share[open_experts][::-1].argmax()]
        share[chosen] = share[chosen] * (copies[chosen] + 1) / (copies[chosen] + 2)
        copies[chosen] += 1
    rounded = share.astype(np.float32)
    expert = np.repeat(np.arange(len(tokens)), copies - 1)
    return expert[np.argsort(-rounded[expert], kind="stable")].tolist(), rounded


def _rank_loads(placed: Int64, share: Float32) -> Float32:
    """Tokens of each rank, float32, added up slot by slot."""
    load = np.zeros(len(placed), np.float32)
    for column in placed.T:
        filled = column >= 0
        load[filled] += share[column[filled]]
    return load
