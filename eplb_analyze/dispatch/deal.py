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
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.dispatch.rule import Bits, Busiest, Counts, Dispatch, Replicas, Tokens, busiest_of
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.frozen import frozen
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

#: Whole numbers below it are exact in float32, which is twice as fast as float64.
EXACT_IN_FLOAT32 = 1 << 24


@frozen
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
        copies = _Copies.of(slots)
        if not len(copies.experts):
            return out
        left, again = load.take(copies.experts, axis=0), np.zeros((len(copies.experts), 1), load.dtype)
        if self.token_replication > 1:
            left, again = np.divmod(left, self.token_replication)
        # If replicas are not equally likely, they do not take turns.
        sure = None if weights is not None else self._sure(tokens, copies, left)
        shares = _shares(copies, weights) if sure is None else sure.shares
        if sure is not None:
            left = sure.left
        drawn = 0
        for copy, at in enumerate(copies.slots):
            more = len(copies.slots[copy + 1]) if copy + 1 < len(copies.slots) else 0
            sent = left[: len(at)].copy()  # the last copy gets what is left
            if more:
                sent[:more] = binomial(left[:more], shares[copy][:more], bits[drawn : drawn + more])
                left[:more] -= sent[:more]
                drawn += more
            if sure is not None:
                sent += sure.counts[copy]
            if self.token_replication > 1:
                sent *= self.token_replication
                sent[more:] += again[more : len(at)]
            out[at] = sent
        return out

    def _sure(self, tokens: Tokens, copies: _Copies, whole: Counts) -> _Sure | None:
        """The tokens that go to a replica for sure; None: all are left to chance.

        ``whole``: all tokens of the experts that have several slots ``[experts, steps]``.
        """
        if not self.in_rounds:
            return None
        each = (whole * (self.in_rounds / copies.num_slots[:, np.newaxis])).astype(whole.dtype)
        counts = [each[: len(at)] for at in copies.slots]
        left = whole - each * copies.num_slots[:, np.newaxis].astype(whole.dtype)
        return _Sure(counts, left, _shares(copies))


@frozen
class ByPosition(Dealt):
    """A token's position in the batch of its rank chooses the replica.

    Nothing but the positions that choose an expert is left to chance: these are drawn without replacement.
    Of n tokens in a batch of T, t of them at positions for a replica, it gets n t / T on average, with the
    variance of n (T - n) / (T - 1) independent tokens. So n / T of the tokens are dealt in rounds. If the
    batch is not known, all tokens are independent and all replicas equal.
    """

    #: vLLM's hash of the position, which favors some replicas of a small batch; else the position itself.
    hashed: bool = True

    def _sure(self, tokens: Tokens, copies: _Copies, whole: Counts) -> _Sure | None:
        if tokens.batch is None or tokens.routed is None:
            return None
        all_chosen = tokens.load.take(copies.experts, axis=0) / np.maximum(tokens.routed, 1)
        chosen = np.where(tokens.routed > 0, all_chosen, 0)
        in_rounds = whole * chosen.clip(0, 1)
        odds = {
            count: position_shares(tokens.batch, count, hashed=self.hashed)
            for count in np.unique(copies.num_slots).tolist()
        }
        counts, wanted, left = [], [], whole.copy()
        for copy, at in enumerate(copies.slots):
            own = np.stack([odds[count][copy] for count in copies.num_slots[: len(at)].tolist()])
            counts.append((in_rounds[: len(at)] * own).astype(whole.dtype))
            wanted.append(whole[: len(at)] * own - counts[-1])  # of those that are left, on average
            left[: len(at)] -= counts[-1]
        rest, shares = np.zeros(whole.shape), []
        for own in reversed(wanted):
            rest[: len(own)] += own
            shares.append(np.divide(own, rest[: len(own)], out=np.zeros(own.shape), where=own > 0))
        return _Sure(counts, left, shares[::-1])


class _Copies(NamedTuple):
    """The experts with several slots, those with most slots first.

    Attributes:
        experts: int64 ``[n]``.
        num_slots: of each.
        slots: for each copy, the slots of the experts that have so many: these are the first ones.
    """

    experts: Int64
    num_slots: Int64
    slots: list[npt.NDArray[np.intp]]

    @classmethod
    def of(cls, slots: Int32) -> _Copies:
        order = np.argsort(slots, kind="stable")
        count = np.bincount(slots - EMPTY_SLOT)  # empty slots first, as in the order
        first = np.cumsum(count) - count
        count[0] = 0
        experts = np.flatnonzero(count > 1)
        experts = experts[np.argsort(-count[experts], kind="stable")]
        count, first = count[experts], first[experts]
        have = [int(np.count_nonzero(count > copy)) for copy in range(count.max(initial=0))]
        return cls(experts + EMPTY_SLOT, count, [order[first[:n] + copy] for copy, n in enumerate(have)])


class _Sure(NamedTuple):
    """The tokens of experts with several slots that do not depend on chance.

    Attributes:
        counts: of each copy, integers ``[experts that have it, steps]``.
        left: the other tokens ``[experts, steps]``, of a new array.
        shares: of each copy, of those that the copies before it have left; see :func:`binomial`.
    """

    counts: list[Counts]
    left: Counts
    shares: list[Float64]


def _shares(copies: _Copies, weights: Int64 | None = None) -> list[Float64]:
    """The share of an expert's tokens that each copy draws, of those that the copies before it have left.

    Args:
        weights: how likely a token goes to a slot, compared with the others of its expert; default: equally.
    """
    if weights is None:
        return [1 / (copies.num_slots[: len(at), np.newaxis] - copy) for copy, at in enumerate(copies.slots)]
    rest, shares = np.zeros(len(copies.experts)), []
    for at in reversed(copies.slots):
        rest[: len(at)] += weights[at]
        shares.append((weights[at] / np.maximum(1, rest[: len(at)]))[:, np.newaxis])
    return shares[::-1]


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


def binomial(tokens: Counts, share: Float64, bits: Bits) -> Counts:
    """How many of ``tokens`` go where each goes with the probability ``share``: a binomial quantile.

    Args:
        tokens: integers ``[n, steps]``.
        share: float64 ``[n, steps]``, or ``[n, 1]`` if the same in all steps.
        bits: random ``[n, steps]``.
    """
    most = int(tokens.max(initial=0))
    tables, which = _tables(share)
    if most <= FEW_TOKENS:
        return _exact(tables, which, tokens, bits)
    number = "f4" if most < EXACT_IN_FLOAT32 else "f8"
    every, likely = tokens.astype(number), share.astype(number)
    drawn = np.sqrt(every)
    drawn *= np.sqrt(likely * (1 - likely))
    drawn *= _normal(number).take(bits >> np.uint32(32 - _NORMAL_BITS))
    drawn += every * likely
    np.rint(drawn, out=drawn)
    np.maximum(drawn, 0, out=drawn)
    np.minimum(drawn, every, out=drawn)
    out: Counts = drawn.astype(tokens.dtype)
    few = np.flatnonzero(tokens <= FEW_TOKENS)
    if len(few):
        own = which.take(few // tokens.shape[1] if which.shape[1] == 1 else few)
        out.reshape(-1)[few] = _exact(tables, own, tokens.take(few), bits.take(few))
    return out


def _exact(tables: npt.NDArray[np.uint8], which: Int64, tokens: Counts, bits: Bits) -> Counts:
    """The quantiles of few tokens, each from one of the tables."""
    at = which * (FEW_TOKENS + 1) + tokens
    at <<= _TABLE_BITS
    at += bits >> np.uint32(32 - _TABLE_BITS)
    return tables.take(at).astype(tokens.dtype)


def _tables(share: Float64) -> tuple[npt.NDArray[np.uint8], Int64]:
    """Tables of quantiles ``[tables, tokens, levels]``, and which of them a share needs."""
    if share.shape[1] == 1:
        shares, which = _different(tuple(share[:, 0].tolist()))
        return _quantiles_of(shares), which
    return _all_quantiles(), np.rint(share * _SHARES).astype(np.int64)


@functools.lru_cache(maxsize=256)
def _different(shares: tuple[float, ...]) -> tuple[tuple[float, ...], Int64]:
    """The shares, each once, and which of them each is ``[n, 1]``."""
    found, which = np.unique(shares, return_inverse=True)
    return tuple(found.tolist()), which.reshape(-1, 1)


@functools.cache
def _all_quantiles() -> npt.NDArray[np.uint8]:
    """:func:`_quantiles` of all shares: ``[_SHARES + 1, tokens, levels]``, 17 MB."""
    return np.stack([_quantiles(share / _SHARES) for share in range(_SHARES + 1)])


@functools.lru_cache(maxsize=32)
def _quantiles_of(shares: tuple[float, ...]) -> npt.NDArray[np.uint8]:
    return np.stack([_quantiles(share) for share in shares])


@functools.lru_cache(maxsize=1024)
def _quantiles(share: float) -> npt.NDArray[np.uint8]:
    """Quantiles of the binomial distributions of 0 to ``FEW_TOKENS`` tokens: ``[tokens, levels]``."""
    levels = _middles(_TABLE_BITS)
    out = np.zeros((FEW_TOKENS + 1, len(levels)), np.uint8)
    probability = np.array([1.0])
    for tokens in range(1, FEW_TOKENS + 1):
        other = np.append(probability, 0.0) * (1 - share)
        other[1:] += probability * share
        probability = other
        out[tokens] = np.searchsorted(np.cumsum(probability), levels).clip(0, tokens)
    return out


@functools.cache
def _normal(number: str) -> npt.NDArray[Any]:
    """Quantiles of the standard normal distribution, as a dtype."""
    levels = _middles(_NORMAL_BITS).tolist()
    return np.array([NormalDist().inv_cdf(level) for level in levels], number)


def _middles(bits: int) -> Float64:
    middles: Float64 = (np.arange(1 << bits) + 0.5) / (1 << bits)
    return middles
