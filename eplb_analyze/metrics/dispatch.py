"""Whole tokens of an expert, dealt to its replicas as an engine's dispatch deals them.

vLLM hashes a token's position in the batch and SGLang draws a number or takes the position, each modulo the
number of replicas. Which positions choose an expert is up to the router, so each token goes to any replica
with the same probability, whatever the others do: the counts are multinomial. Splitting n tokens into n / c
for each of c replicas instead would make replicas look good at few tokens: there is no half token.

A share of the tokens may be dealt in rounds, one to each replica; a recording shows it (:class:`Spread`).
The draws are a hash of step, layer and replica, so the result depends on nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.cost import effort_of
from eplb_analyze.metrics.formulas import Float64
from eplb_dump.format.journal import Int32, Int64
from eplb_dump.format.schema import EMPTY_SLOT

Bits = npt.NDArray[np.uint32]
Counts = npt.NDArray[Any]

#: Up to so many tokens, draws are exact to a level of the table; above, rounded normal draws are.
FEW_TOKENS = 63
#: Levels of probability in the tables, as powers of 2.
_TABLE_BITS = 10
_NORMAL_BITS = 14


@dataclass(frozen=True)
class Dispatch:
    """How tokens are dealt to the replicas of their expert."""

    #: The share of an expert's tokens that is dealt in full rounds, 0 to 1; the others go anywhere.
    in_rounds: float = 0.0
    #: How many times the engine counts each token.
    token_replication: int = 1

    def slot_loads(self, load: Counts, slots: Int32, bits: Bits) -> Counts:
        """Tokens of each slot.

        Args:
            load: whole tokens of each logical expert, integers ``[steps, num_logical_experts]``.
            slots: the logical expert of each slot ``[slots]``; -1: none.
            bits: :func:`random_bits` ``[steps, n]``; n at least :func:`replica_draws`.

        Returns:
            Integers ``[steps, slots]``, of the type of ``load``. An expert's slots add up to its tokens.
        """
        out = load.take(slots, axis=1)
        out[:, slots == EMPTY_SLOT] = 0
        order = np.argsort(slots, kind="stable")
        expert, first, copies = np.unique(slots[order], return_index=True, return_counts=True)
        held = expert != EMPTY_SLOT
        drawn = 0
        for count in np.unique(copies[held & (copies > 1)]).tolist():
            of_count = held & (copies == count)
            columns = order[first[of_count] + np.arange(count)[:, np.newaxis]]
            tokens, again = np.divmod(load.take(expert[of_count], axis=1), self.token_replication)
            rounds = (tokens * (self.in_rounds / count)).astype(load.dtype)
            left = tokens - count * rounds
            for replica, at in enumerate(columns):
                remaining = count - replica
                if remaining > 1:
                    chosen = binomial(left, remaining, bits[:, drawn : drawn + len(at)])
                    drawn += len(at)
                else:
                    chosen = left
                left = left - chosen
                out[:, at] = (rounds + chosen) * self.token_replication + (again if remaining == 1 else 0)
        return out

    def busiest_rank(
        self, load: Counts, slots: Int32, ranks: int, deals: Bits, rates: Sequence[float] = ()
    ) -> tuple[Float64, Float64, Float64]:
        """The tokens of the busiest rank and their inverse (0 if there are none), each the mean over deals.

        Args:
            load, slots: as for :meth:`slot_loads`.
            deals: bits for each deal ``[deals, steps, n]``.
            rates: of :data:`~eplb_analyze.metrics.cost.EXCHANGE_RATES`.

        Returns:
            float64 ``[steps]`` each, and the effort of the slowest rank at each rate ``[len(rates), steps]``.
        """
        if not replica_draws(slots):  # nothing to deal
            deals = deals[:1]
        bits = deals.reshape(len(deals) * len(load), -1 if deals.size else 0)
        dealt = self.slot_loads(np.tile(load, (len(deals), 1)) if len(deals) > 1 else load, slots, bits)
        tokens = rank_loads(dealt, ranks)
        busiest = tokens.max(axis=1).astype(np.float64)
        inverse = np.divide(1, busiest, out=np.zeros(busiest.shape), where=busiest > 0)
        slowest = []
        if len(rates):
            active = rank_loads((dealt > 0).astype(np.int16), ranks).astype(np.float32)
            counts = (tokens / self.token_replication).astype(np.float32)
            slowest = [effort_of(active, counts, rate).max(axis=1).astype(np.float64) for rate in rates]
        means = np.stack([busiest, inverse, *slowest]).reshape(-1, len(deals), len(load)).mean(axis=1)
        return means[0], means[1], means[2:]


def rank_loads(load: Counts, ranks: int) -> Counts:
    """Sum loads ``[steps, slots]`` by rank, four times as fast as along the last axis."""
    slots = load.reshape(len(load), ranks, -1)
    total = slots[:, :, 0].copy()
    for slot in range(1, slots.shape[2]):
        total += slots[:, :, slot]
    return total


def replica_draws(slots: Int32) -> int:
    """How many draws deal the tokens of a placement."""
    return len(slots) - len(np.unique(slots))


def random_bits(steps: Int64, stream: int, count: int) -> Bits:
    """32 random bits for each step and draw: ``[steps, count]``. Streams, such as layers, are independent.

    The finalizer of MurmurHash3, twice, so that they depend on the step and not on how steps are read.
    """
    draw = np.arange(count, dtype=np.uint32) + np.uint32(stream * 0x9E3779B1 & 0xFFFFFFFF)
    step = (steps & 0xFFFFFFFF).astype(np.uint32)
    return _mix(_mix(step * np.uint32(0x85EBCA77))[:, np.newaxis] ^ _mix(draw)[np.newaxis])


def _mix(bits: Bits) -> Bits:
    bits = bits ^ (bits >> np.uint32(16))
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> np.uint32(13)
    bits *= np.uint32(0xC2B2AE35)
    bits ^= bits >> np.uint32(16)
    return bits


def binomial(tokens: Counts, replicas: int, bits: Bits) -> Counts:
    """How many of ``tokens`` go to one of ``replicas``: a quantile of the binomial distribution."""
    few = tokens <= FEW_TOKENS
    if few.all():
        return _exact(tokens, replicas, bits)
    mean, deviation = tokens / replicas, np.sqrt(tokens * float(replicas - 1)) / replicas
    drawn = np.rint(mean + deviation * _normal()[bits >> np.uint32(32 - _NORMAL_BITS)])
    out: Counts = np.clip(drawn, 0, tokens).astype(tokens.dtype)
    if few.any():
        out[few] = _exact(tokens[few], replicas, bits[few])
    return out


def _exact(tokens: Counts, replicas: int, bits: Bits) -> Counts:
    found: Counts = _quantiles(replicas)[tokens, bits >> np.uint32(32 - _TABLE_BITS)].astype(tokens.dtype)
    return found


@functools.cache
def _quantiles(replicas: int) -> npt.NDArray[np.uint8]:
    """Quantiles of the binomial distributions of 0 to ``FEW_TOKENS`` tokens: ``[tokens, levels]``."""
    levels = _middles(_TABLE_BITS)
    out = np.zeros((FEW_TOKENS + 1, len(levels)), np.uint8)
    probability = np.array([1.0])
    for tokens in range(1, FEW_TOKENS + 1):
        other = np.append(probability, 0.0) * (1 - 1 / replicas)
        other[1:] += probability / replicas
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


class Spread:
    """How unevenly recorded replicas share their expert's tokens, to be added up over steps and layers."""

    def __init__(self, token_replication: int = 1) -> None:
        self._token_replication = token_replication
        #: Squared deviations from an even split; those expected if each token goes to any replica.
        self.observed = self.expected = 0.0
        #: Independent deviations.
        self.degrees = 0

    def add(self, load: Counts, slots: Int32) -> None:
        """Add tokens of each slot ``[steps, slots]`` under the placement ``slots``, -1 where no expert is."""
        experts, copies = np.unique(slots[slots != EMPTY_SLOT], return_counts=True)
        for expert in experts[copies > 1]:
            own = load[:, slots == expert] / self._token_replication
            mean = own.mean(axis=1, keepdims=True)
            self.observed += float(np.square(own - mean).sum())
            # Of n tokens each of c replicas gets a number with the variance n (1 / c) (1 - 1 / c).
            self.expected += float(mean.sum()) * (own.shape[1] - 1)
            self.degrees += int(np.count_nonzero(mean)) * (own.shape[1] - 1)

    @property
    def ratio(self) -> float | None:
        """1 for independent tokens, near 0 for tokens dealt in rounds, above 1 if they stick together."""
        return self.observed / self.expected if self.expected else None

    def dispatch(self) -> Dispatch:
        """The dispatch that explains it, less three standard errors of the ratio of independent tokens."""
        share = 0.0 if self.ratio is None else max(0.0, 1 - self.ratio - 3 * (2 / self.degrees) ** 0.5)
        return Dispatch(share, self._token_replication)
