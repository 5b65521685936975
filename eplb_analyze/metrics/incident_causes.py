"""Why a layer departs from its usual balance: what its balance would have been had one thing not changed.

Each cause is a counterfactual on mean loads before and during an incident: the old placement, the old
popularity of the experts or of one expert, an even split among replicas. A cause explains the incident if
without it at least half of the loss of balance is gone.

Arrays in, arrays out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.change_points import split
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.frozen import frozen

#: A cause explains an incident if without it at most this share of the loss of balance remains.
EXPLAINED = 0.5
#: An expert is hot if its share of the layer's tokens grew by this factor at least.
GREW = 1.3
#: And it has at least so many times the mean of the layer's experts.
HOT = 1.5
#: Tokens per step fell if they are below this share of what they were.
FEWER = 0.6
#: A feature of two groups of steps must differ by so many standard errors.
DISTINCT = 4.0


@frozen
class LayerSample:
    """One layer in some steps of one placement.

    Attributes:
        rank_load: int64 ``[n, ranks]``, the tokens of each EP rank.
        load: int64 ``[m, slots]``, in those of the steps of which experts' loads are kept; None if these are
            too few.
        slots: the logical expert of each slot, -1 if empty; None if not known.
        serving: how many ranks serve.
    """

    rank_load: npt.NDArray[Any]
    load: npt.NDArray[Any] | None
    slots: npt.NDArray[Any] | None
    serving: int
    num_logical: int

    @property
    def ranks(self) -> int:
        return int(self.rank_load.shape[1])

    @cached_property
    def tokens(self) -> Float64:
        """float64 ``[n]``."""
        total: Float64 = self.rank_load.sum(axis=1).astype(np.float64)
        return total

    @cached_property
    def times_mean(self) -> Float64:
        """Each rank's tokens / the mean over the ranks that serve, over all steps: float64 ``[ranks]``."""
        total = self.rank_load.sum(axis=0)
        mean: Float64 = total / max(1.0, float(total.sum()) / self.serving)
        return mean

    @cached_property
    def balance(self) -> float:
        """The mean over active steps of mean over ranks / max over ranks."""
        return balance_of(self.rank_load, self.serving)

    @cached_property
    def shares(self) -> Float64:
        """Of each logical expert, or of each slot if the placement is not known: float64 ``[m, experts]``."""
        assert self.load is not None
        counts = self.load if self.slots is None else folded(self.load, self.slots, self.num_logical)
        share: Float64 = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        return share

    @cached_property
    def share(self) -> Float64:
        """The mean of :attr:`shares` over the steps with tokens."""
        active = self.shares.any(axis=1)
        mean: Float64 = self.shares[active].mean(axis=0) if active.any() else self.shares.mean(axis=0)
        return mean

    def split_of(self, even: bool) -> Float64:
        """Which share of an expert's tokens each rank gets: float64 ``[experts, ranks]``."""
        assert self.slots is not None
        assert self.load is not None
        there = self.slots >= 0
        weights = np.where(there, 1.0, 0.0) if even else self.load.sum(axis=0) * 1.0
        rank = np.arange(len(self.slots)) // (len(self.slots) // self.ranks)
        out = np.zeros((self.num_logical, self.ranks))
        np.add.at(out, (self.slots[there], rank[there]), weights[there])
        total = out.sum(axis=1, keepdims=True)
        split_: Float64 = out / np.maximum(1e-9, total)
        # Of an expert without a token nothing shows how its replicas share.
        return split_ if even or (total > 0).all() else np.where(total > 0, split_, self.split_of(True))


def balance_of(rank_load: npt.NDArray[Any], serving: int) -> float:
    """The mean over active steps of mean over ranks that serve / max over ranks, of ``[n, ranks]``."""
    most = rank_load.max(axis=1)
    active = most > 0
    if not active.any():
        return 1.0
    return float((rank_load.sum(axis=1)[active] / serving / most[active]).mean())


def folded(load: npt.NDArray[Any], slots: npt.NDArray[Any], num_logical: int) -> npt.NDArray[Any]:
    """Slots added up by logical expert: ``[n, num_logical]``."""
    there = np.flatnonzero(slots >= 0)
    order = there[np.argsort(slots[there], kind="stable")]
    experts, starts = np.unique(slots[order], return_index=True)
    out = np.zeros((len(load), num_logical), load.dtype)
    if len(order):
        out[:, experts] = np.add.reduceat(load[:, order], starts, axis=1)
    return out


def mean_balance(share: Float64, split_: Float64, serving: int) -> float:
    """The balance of mean loads: of experts' shares, split among ranks by ``[experts, ranks]``."""
    rank = share @ split_
    most = float(rank.max())
    return float(rank.sum()) / serving / most if most > 0 else 1.0


@frozen
class Explanation:
    """Attributes: as of :class:`eplb_analyze.analysis.incidents.Cause`; ``kept``: how much each explains."""

    kind: str
    expert: int | None = None
    from_times_mean: float | None = None
    to_times_mean: float | None = None
    replicas: int | None = None


def explain(before: LayerSample, during: LayerSample, moved: bool, experts: int) -> Explanation:
    """Why the balance of ``during`` is lower than that of ``before``.

    Args:
        moved: whether the layer's placement changed at the first step.
        experts: how many logical experts the layer has.
    """
    if _fewer_tokens_explain(before, during):
        return Explanation("few_tokens")
    if before.load is None or during.load is None:
        return Explanation("loads_retired")
    if before.slots is None or during.slots is None:
        return _by_slots(before, during)
    if before.ranks != during.ranks:
        return Explanation("unknown")
    serving, was, is_ = during.serving, before.share, during.share
    old, new = before.split_of(False), during.split_of(False)
    level_before, level_during = mean_balance(was, old, serving), mean_balance(is_, new, serving)
    drop = level_before - level_during
    if drop <= 0:
        return Explanation("unknown")

    def explains(without: float) -> bool:
        return level_before - without <= EXPLAINED * drop

    even_old, even_new = before.split_of(True), during.split_of(True)
    if not moved:
        # The old loads split as before, against the new loads split as before: the difference is traffic's.
        if explains(mean_balance(is_, old, serving)):
            return _most_uneven(before, during, experts)
    elif explains(mean_balance(is_, even_old, serving)) and not explains(
        mean_balance(was, even_new, serving)
    ):
        return Explanation("rearrangement")
    elif explains(mean_balance(is_, even_new, serving)) and not explains(
        mean_balance(was, even_new, serving)
    ):
        return _most_uneven(before, during, experts)
    return _by_experts(before, during, new, experts, level_before, drop)


def _by_experts(
    before: LayerSample, during: LayerSample, new: Float64, experts: int, level: float, drop: float
) -> Explanation:
    was, is_ = before.share, during.share
    rank = int((is_ @ new - was @ new).argmax())
    grown = np.where(is_ > GREW * was + 1e-12, (is_ - was) * new[:, rank], 0.0)
    # The worst expert by what it adds to the worst rank; one more is tried, in case two rose together.
    for expert in np.argsort(-grown)[:2]:
        if grown[expert] <= 0 or is_[expert] * experts < HOT:
            continue
        without = is_.copy()
        without[expert] = min(was[expert], 0.999)
        rest = 1 - is_[expert]
        if rest > 0:
            without *= np.where(np.arange(len(is_)) == expert, 1.0, (1 - without[expert]) / rest)
        if level - mean_balance(without, new, during.serving) <= EXPLAINED * drop:
            return _expert("expert_hot", int(expert), before, during, experts)
    total = 0.5 * float(np.abs(is_ - was).sum())
    noise = 0.5 * float(np.abs(_errors(before) + _errors(during)).sum())
    return Explanation("traffic_shift" if total > 1.5 * noise else "unknown")


def _errors(sample: LayerSample) -> Float64:
    error: Float64 = sample.shares.std(axis=0) / np.sqrt(max(1, len(sample.shares)))
    return error


def _by_slots(before: LayerSample, during: LayerSample) -> Explanation:
    was, is_ = before.share, during.share
    total = 0.5 * float(np.abs(is_ - was).sum()) if was.shape == is_.shape else 0.0
    return Explanation("traffic_shift" if total > 0.1 else "unknown")


def _expert(kind: str, expert: int, before: LayerSample, during: LayerSample, experts: int) -> Explanation:
    assert during.slots is not None
    return Explanation(
        kind,
        expert,
        float(before.share[expert] * experts),
        float(during.share[expert] * experts),
        int((during.slots == expert).sum()),
    )


def _most_uneven(before: LayerSample, during: LayerSample, experts: int) -> Explanation:
    """The expert whose replicas' split adds most to the worst rank."""
    gain = during.share[:, np.newaxis] * (during.split_of(False) - before.split_of(False))
    rank = int(gain.sum(axis=0).argmax())
    return _expert("uneven_replicas", int(gain[:, rank].argmax()), before, during, experts)


def _fewer_tokens_explain(before: LayerSample, during: LayerSample) -> bool:
    """Whether the loads before, thinned to as few tokens as later, are as unbalanced."""
    many, few = float(before.tokens.mean()), float(during.tokens.mean())
    if not 0 < few < FEWER * many or before.ranks != during.ranks:
        return False
    rng = np.random.default_rng(0)
    some = before.rank_load[:: max(1, len(before.rank_load) // 100)]
    thinned = balance_of(rng.binomial(some, few / many), before.serving)
    return before.balance - thinned >= EXPLAINED * (before.balance - during.balance)


def worst_ranks(before: LayerSample, during: LayerSample) -> tuple[int, ...]:
    """The ranks whose load rose and that hold the others up, the worst first; at most 4."""
    if before.ranks != during.ranks:
        return ()
    was, is_ = before.times_mean, during.times_mean
    rise = is_ - was
    mean = during.rank_load.sum(axis=1, keepdims=True) / during.serving
    error = (during.rank_load / np.maximum(1, mean)).std(axis=0) / np.sqrt(max(1, len(mean)))
    most = float(rise.max())
    if most <= DISTINCT * float(error[rise.argmax()]) * 0.75:
        return ()
    chosen = np.flatnonzero((rise >= 0.5 * most) & (is_ >= 1 + 0.5 * (is_.max() - 1)))
    return tuple(int(rank) for rank in chosen[np.argsort(-is_[chosen])][:4])


def refined(left: Float64, middle: Float64, right: Float64, near: int, reach: int) -> int | None:
    """The index of the first step that is as those on the right, at most ``reach`` from ``near``.

    The features that differ most between the two sides are projected on their differences, each weighted by
    its variance (a diagonal discriminant), and the projection is split by maximum likelihood.

    Args:
        left, right: features of steps that lie clearly on one side: float64 ``[n, features]``.
        middle: of consecutive steps, in which ``near`` is the edge found so far.

    Returns:
        None if no feature differs clearly.
    """
    if len(left) < 4 or len(right) < 4:
        return None
    difference = right.mean(axis=0) - left.mean(axis=0)
    floor = 1e-9 + 0.05 * middle.mean(axis=0) / np.sqrt(max(1, len(middle)))
    variance = (left.var(axis=0) * len(left) + right.var(axis=0) * len(right)) / (len(left) + len(right))
    deviation = np.sqrt(variance) + floor
    distance = np.abs(difference) / deviation
    clear = distance * np.sqrt(1 / (1 / len(left) + 1 / len(right))) > DISTINCT + 1
    if not clear.any():
        return None
    chosen = np.argsort(-np.where(clear, distance, 0))[: min(8, int(clear.sum()))]
    signal = middle[:, chosen] @ (difference[chosen] / deviation[chosen] ** 2)
    return split(signal, near, reach)
