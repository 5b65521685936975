"""Whole tokens of an expert, dealt to its replicas.

vLLM hashes a token's position in the batch and SGLang draws a number or takes the position, each modulo the
number of replicas. Which positions choose an expert is up to the router, so each token goes to any replica
with the same probability, whatever the others do: the counts are multinomial. Splitting n tokens into n / c
for each of c replicas instead would make replicas look good at few tokens: there is no half token.

A share of the tokens may be dealt in rounds, one to each replica: as a recording shows
(:mod:`eplb_analyze.dispatch.spread`), or because positions are not drawn with replacement
(:class:`ByPosition`). The draws are a hash of step, layer and replica, so the result depends on nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from eplb_analyze.dispatch.rule import Bits, Busiest, Counts, Dispatch, Replicas, Tokens, busiest_of
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT

#: Up to so many tokens, draws are exact to a level of the table; above, rounded normal draws are.
FEW_TOKENS = 63
#: Levels of probability in the tables, as powers of 2.
_TABLE_BITS = 10
_NORMAL_BITS = 14
#: Shares that differ from step to step are exact to one of so many.
_SHARES = 256
#: From this batch on, positions take all replicas equally often, to less than 1%.
LARGE_BATCH = 4096

#: How likely each token is to go somewhere: one, or float64 ``[experts, steps]``.
Share = Fraction | Float64


@dataclass(frozen=True)
class Dealt(Dispatch):
    """Each token goes to any replica of its expert, or to the one that its source rank has chosen."""

    #: The share of an expert's tokens that is dealt in full rounds, 0 to 1; the others go anywhere.
    in_rounds: float = 0.0
    #: How many times the engine counts each token.
    token_replication: int = 1

    def slot_loads(self, tokens: Tokens, replicas: Replicas, bits: Bits) -> Counts:
        """Tokens of each slot.

        If a source rank has chosen a replica and the tokens of each source are not known, each token comes
        from any rank with the same probability.

        Args:
            bits: :func:`random_bits` ``[n, steps]``; n at least :func:`replica_draws`.

        Returns:
            Integers ``[slots, steps]``, of the type of the loads. An expert's slots add up to its tokens.
        """
        chosen = replicas.chosen
        if chosen is None:
            return self._deal(tokens, replicas.slots, bits)
        if tokens.by_source is None:
            return self._deal(tokens, replicas.slots, bits, _weights(replicas.slots, chosen))
        sent = np.zeros((len(replicas.slots), tokens.load.shape[1]), tokens.load.dtype)
        left = np.zeros_like(tokens.load)
        for load, own in zip(tokens.by_source, chosen, strict=True):
            experts = np.flatnonzero(own >= 0)
            sent[own[experts]] += load[experts]  # a slot holds one expert, so none is twice in here
            free = np.flatnonzero(own < 0)
            left[free] += load[free]
        return sent + self._deal(Tokens(left), replicas.slots, bits) if left.any() else sent

    def busiest_rank(
        self, tokens: Tokens, replicas: Replicas, deals: Bits, rates: Sequence[float] = ()
    ) -> Busiest:
        if not replica_draws(replicas.slots):  # nothing to deal
            deals = deals[:1]
        n, steps = len(deals), tokens.load.shape[1]
        bits = deals.transpose(1, 0, 2).reshape(deals.shape[1], n * steps)
        dealt = self.slot_loads(tokens if n == 1 else _repeated(tokens, n), replicas, bits)
        busiest, inverse, slowest = busiest_of(dealt, replicas.ranks, rates, self.token_replication)
        means = np.stack([busiest, inverse, *slowest]).reshape(-1, n, steps).mean(axis=1)
        return means[0], means[1], means[2:]

    def _deal(self, tokens: Tokens, slots: Int32, bits: Bits, weights: Int64 | None = None) -> Counts:
        load = tokens.load
        out = load.take(slots, axis=0)
        out[slots == EMPTY_SLOT] = 0
        drawn = 0
        for experts, columns, by_chance in _alike(slots, weights):
            count = len(columns)
            whole, again = load.take(experts, axis=0), np.zeros(1, load.dtype)
            if self.token_replication > 1:
                whole, again = np.divmod(whole, self.token_replication)
            if weights is None:
                rounds, left, shares = self._rounds(tokens, experts, whole, by_chance)
            else:  # the replicas do not take turns
                rounds, left, shares = None, whole, by_chance
            for replica, (at, share) in enumerate(zip(columns, shares, strict=True)):
                last = replica == count - 1
                if last:
                    chosen = left
                else:
                    chosen = binomial(left, share, bits[drawn : drawn + len(at)])
                    drawn += len(at)
                left = left - chosen
                mine = chosen if rounds is None else rounds[replica] + chosen
                if self.token_replication > 1:
                    mine = mine * self.token_replication + (again if last else 0)
                out[at] = mine
        return out

    def _rounds(
        self, tokens: Tokens, experts: Int64, whole: Counts, shares: Sequence[Share]
    ) -> tuple[Sequence[Counts] | None, Counts, Sequence[Share]]:
        """The tokens of these experts that each replica gets for sure, what is left, and its share of that.

        ``whole``: all of their tokens ``[experts, steps]``; ``shares``: if nothing but chance decides.
        """
        if not self.in_rounds:
            return None, whole, shares
        count = len(shares)
        each = (whole * (self.in_rounds / count)).astype(whole.dtype)
        return [each] * count, whole - count * each, shares


@dataclass(frozen=True)
class ByPosition(Dealt):
    """A token's position in the batch of its rank chooses the replica.

    Nothing but the positions that choose an expert is left to chance: these are drawn without replacement.
    Of n tokens in a batch of T, t of them at positions for a replica, it gets n t / T on average, with the
    variance of n (T - n) / (T - 1) independent tokens. So n / T of the tokens are dealt in rounds. If the
    batch is not known, all tokens are independent and all replicas equal.
    """

    #: vLLM's hash of the position, which favors some replicas of a small batch; else the position itself.
    hashed: bool = True

    def _rounds(
        self, tokens: Tokens, experts: Int64, whole: Counts, shares: Sequence[Share]
    ) -> tuple[Sequence[Counts] | None, Counts, Sequence[Share]]:
        if tokens.batch is None or tokens.routed is None:
            return None, whole, shares
        all_chosen = tokens.load.take(experts, axis=0) / np.maximum(tokens.routed, 1)
        chosen = np.where(tokens.routed > 0, all_chosen, 0)
        odds = position_shares(tokens.batch, len(shares), hashed=self.hashed)
        in_rounds = whole * chosen.clip(0, 1)
        rounds, wanted = [], []
        for own in odds:
            rounds.append((in_rounds * own).astype(whole.dtype))
            wanted.append(whole * own - rounds[-1])  # of those that are left, on average
        rest = np.cumsum(wanted[::-1], axis=0)[::-1]
        left: Counts = whole - np.sum(rounds, axis=0)
        return (
            rounds,
            left,
            [
                np.divide(own, all_left, out=np.zeros(whole.shape), where=all_left > 0)
                for own, all_left in zip(wanted, rest, strict=True)
            ],
        )


def position_shares(batch: Int64, copies: int, *, hashed: bool = True) -> Float64:
    """The share of a batch's positions that take each of ``copies`` replicas: float64 ``[copies, steps]``.

    The same for all replicas if the batch is not known (0 or less), or so large that it does not matter.
    """
    taken = _positions_taken(copies, hashed)
    known = (batch > 0) & (batch < len(taken))
    at = np.where(known, batch, 0)
    share: Float64 = np.where(
        known[:, np.newaxis], taken[at] / np.maximum(at, 1)[:, np.newaxis], 1 / copies
    ).T
    return share


@functools.cache
def _positions_taken(copies: int, hashed: bool) -> Int64:
    """How many of the first 0, 1, 2, … positions take each replica: int64 ``[LARGE_BATCH + 1, copies]``."""
    positions = np.arange(LARGE_BATCH)
    replica = (hashed_positions(positions) if hashed else positions) % copies
    taken = np.zeros((LARGE_BATCH + 1, copies), np.int64)
    taken[1:] = np.cumsum(replica[:, np.newaxis] == np.arange(copies), axis=0)
    return taken


def hashed_positions(positions: Int64) -> Int64:
    """What vLLM takes modulo the number of replicas, given tokens' positions in the batch, from 0.

    vLLM 0.33.0, ``eplb_map_to_physical_and_record`` in ``fused_moe/router/base_router.py``.
    """
    hashed: Int64 = positions * 2654435769 & 0xFFFFFFFF
    return hashed


def _repeated(tokens: Tokens, times: int) -> Tokens:
    """The same steps several times, one after another."""
    return Tokens(
        np.tile(tokens.load, (1, times)),
        None if tokens.routed is None else np.tile(tokens.routed, times),
        None if tokens.batch is None else np.tile(tokens.batch, times),
        None if tokens.by_source is None else [np.tile(load, (1, times)) for load in tokens.by_source],
    )


def _alike(
    slots: Int32, weights: Int64 | None
) -> Iterator[tuple[Int64, npt.NDArray[np.intp], Sequence[Share]]]:
    """The experts with several slots, those with the same number and weights of them together.

    Yields:
        The experts; their slots ``[copies, experts]``; and the share of an expert's tokens that each copy
        draws, of those that the copies before it have left.
    """
    order = np.argsort(slots, kind="stable")
    copies = np.bincount(slots - EMPTY_SLOT)  # empty slots first, as in the order
    first = np.cumsum(copies) - copies
    copies[0] = 0
    for count in range(2, copies.max(initial=0) + 1):
        experts = np.flatnonzero(copies == count)
        if not len(experts):
            continue
        columns = order[first[experts] + np.arange(count)[:, np.newaxis]]
        experts = experts + EMPTY_SLOT
        if weights is None:
            yield experts, columns, [Fraction(1, count - replica) for replica in range(count)]
            continue
        patterns, which = np.unique(weights[columns], axis=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T.tolist()):
            same = which.reshape(-1) == number
            left = [sum(pattern[replica:]) for replica in range(count)]
            shares = [Fraction(w, max(1, rest)) for w, rest in zip(pattern, left, strict=True)]
            yield experts[same], columns[:, same], shares


def _weights(slots: Int32, chosen: Int32) -> Int64:
    """How likely a token of any source goes to a slot, compared with the other slots of its expert."""
    fixed = np.bincount(chosen[chosen >= 0], minlength=len(slots)).astype(np.int64)
    placed = slots != EMPTY_SLOT
    experts = chosen.shape[1]
    copies = np.bincount(slots[placed], minlength=experts)
    out = np.zeros(len(slots), np.int64)
    held = slots[placed]
    out[placed] = fixed[placed] * copies[held] + (chosen < 0).sum(axis=0)[held]
    return out


def replica_draws(slots: Int32) -> int:
    """How many draws deal the tokens of a placement."""
    return len(slots) - int(np.count_nonzero(np.bincount(slots - EMPTY_SLOT)))


def random_bits(steps: Int64, stream: int, count: int) -> Bits:
    """32 random bits for each draw and step: ``[count, steps]``. Streams, such as layers, are independent.

    The finalizer of MurmurHash3, twice, so that they depend on the step and not on how steps are read.
    """
    draw = np.arange(count, dtype=np.uint32) + np.uint32(stream * 0x9E3779B1 & 0xFFFFFFFF)
    step = (steps & 0xFFFFFFFF).astype(np.uint32)
    return _mix(_mix(step * np.uint32(0x85EBCA77)) ^ _mix(draw)[:, np.newaxis])


def drawn(steps: Int64, every: int) -> npt.NDArray[np.bool_]:
    """About one of ``every`` steps, drawn by a hash of the step: bool ``[steps]``."""
    hashed = _mix((steps & 0xFFFFFFFF).astype(np.uint32) * np.uint32(0x85EBCA77))
    chosen: npt.NDArray[np.bool_] = hashed % np.uint32(every) == 0
    return chosen


def _mix(bits: Bits) -> Bits:
    bits = bits ^ (bits >> np.uint32(16))
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return bits


def binomial(tokens: Counts, share: Share, bits: Bits) -> Counts:
    """How many of ``tokens`` go where each goes with the probability ``share``: a binomial quantile."""
    if isinstance(share, Fraction) and share.numerator == 0:
        return np.zeros_like(tokens)
    few = tokens <= FEW_TOKENS
    if few.all():
        return _exact(tokens, share, bits)
    if isinstance(share, Fraction):
        over, under = share.as_integer_ratio()
        mean, drawn = tokens * over / under, np.sqrt(tokens * float(over * (under - over)))
        drawn /= under
    else:
        mean, drawn = tokens * share, np.sqrt(tokens * share * (1 - share))
    drawn *= _normal().take(bits >> np.uint32(32 - _NORMAL_BITS))
    drawn += mean
    np.rint(drawn, out=drawn)
    np.maximum(drawn, 0, out=drawn)
    np.minimum(drawn, tokens, out=drawn)
    out: Counts = drawn.astype(tokens.dtype)
    if few.any():
        own = share if isinstance(share, Fraction) else share[few]
        out[few] = _exact(tokens[few], own, bits[few])
    return out


def _exact(tokens: Counts, share: Share, bits: Bits) -> Counts:
    level = bits >> np.uint32(32 - _TABLE_BITS)
    if isinstance(share, Fraction):
        found = _quantiles(share)[tokens, level]
    else:
        found = _all_quantiles()[np.rint(share * _SHARES).astype(np.int64), tokens, level]
    out: Counts = found.astype(tokens.dtype)
    return out


@functools.cache
def _all_quantiles() -> npt.NDArray[np.uint8]:
    """:func:`_quantiles` of all shares: ``[_SHARES + 1, tokens, levels]``, 17 MB."""
    return np.stack([_quantiles(Fraction(share, _SHARES)) for share in range(_SHARES + 1)])


@functools.lru_cache(maxsize=1024)
def _quantiles(share: Fraction) -> npt.NDArray[np.uint8]:
    """Quantiles of the binomial distributions of 0 to ``FEW_TOKENS`` tokens: ``[tokens, levels]``."""
    levels = _middles(_TABLE_BITS)
    over, under = share.as_integer_ratio()
    out = np.zeros((FEW_TOKENS + 1, len(levels)), np.uint8)
    probability = np.array([1.0])
    for tokens in range(1, FEW_TOKENS + 1):
        other = np.append(probability, 0.0) * (1 - over / under)
        other[1:] += probability * over / under
        probability = other
        out[tokens] = np.searchsorted(np.cumsum(probability), levels).clip(0, tokens)
    return out


@functools.cache
def _normal() -> Float64:
    """Quantiles of the standard normal distribution."""
    return np.array([NormalDist().inv_cdf(level) for level in _middles(_NORMAL_BITS).tolist()])


def _middles(bits: int) -> Float64:
    middles: Float64 = (np.arange(1 << bits) + 0.5) / (1 << bits)
    return middles
