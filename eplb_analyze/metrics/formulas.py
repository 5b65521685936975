"""The balance formulas of the field, each under its own name, as functions of numpy arrays.

All are of ``T``: float64 ``[steps, layers, ep_ranks]``, the tokens on each EP rank, and give float64
``[steps]``; NaN where a step has no active layer. A layer is active in a step when its maximum is
above 0. They share what they reduce ``T`` to, :class:`Terms`, so that it is computed once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_dump.format.frozen import frozen

Float64 = npt.NDArray[np.float64]


def sum_type(counts: npt.NDArray[Any], number: int) -> type[np.signedinteger[Any]]:
    """The integer type in which as many as ``number`` of these counts add up; the narrow one is faster."""
    narrow = counts.dtype.itemsize <= 4 and int(counts.max(initial=0)) * number < 2**31
    return np.int32 if narrow else np.int64


class SlowestRanks(NamedTuple):
    """One entry for each rank with the most tokens of a step and layer; ties share it equally."""

    #: Indices, intp ``[entries]``.
    step: npt.NDArray[np.intp]
    layer: npt.NDArray[np.intp]
    rank: npt.NDArray[np.intp]
    #: 1 / the number of tied ranks, float64 ``[entries]``.
    share: Float64


class Terms:
    """The reductions of ``T`` that the formulas share; layers can be added a few at a time.

    Attributes:
        mean, maximum: float64 ``[steps, layers]``, over the EP ranks that serve.
        uneven: bool ``[steps, layers]``: the ranks got different numbers of tokens.
        rank_mean, rank_maximum: float64 ``[steps, ep_ranks]``, over layers.
    """

    _PER_STEP = ("mean", "maximum", "uneven", "_at_maximum", "_rank_total", "_rank_highest")

    def __init__(
        self, steps: int, layers: int, ranks: int, per_token: int = 1, serving: int | None = None
    ) -> None:
        """Terms of no tokens yet.

        Args:
            per_token: how often the engine counts each token (token replication).
            serving: how many of the ranks serve; means are over these, and the others have no token.
        """
        self._layers, self._per_token = layers, per_token
        self._serving = ranks if serving is None else serving
        self.mean: Float64 = np.zeros((steps, layers))
        self.maximum: Float64 = np.zeros((steps, layers))
        self.uneven: npt.NDArray[np.bool_] = np.zeros((steps, layers), np.bool_)
        #: The ranks with the most tokens, as bits; packed, because a long run has many steps. None if even.
        self._at_maximum: npt.NDArray[np.uint8] = np.zeros((steps, layers, -(-ranks // 8)), np.uint8)
        self._rank_total: Float64 = np.zeros((steps, ranks))
        self._rank_highest: Float64 = np.zeros((steps, ranks))

    @classmethod
    def of(cls, counts: npt.NDArray[Any], per_token: int = 1, serving: int | None = None) -> Terms:
        """``counts``: ``[steps, layers, ep_ranks]``."""
        steps, layers, ranks = counts.shape
        terms = cls(steps, layers, ranks, per_token, serving)
        terms.add(0, counts)
        return terms

    def add(self, first: int, counts: npt.NDArray[Any]) -> None:
        """Add layers ``first`` and following: ``[steps, these layers, ep_ranks]``."""
        here = slice(first, first + counts.shape[1])
        highest = counts.max(axis=2)
        # Integers add up to the same in any order, and einsum is three times as fast over so few ranks.
        if counts.dtype.kind == "i":
            kind = sum_type(highest, max(counts.shape[1:]))
            total, rank_total = np.einsum("slr->sl", counts, dtype=kind), counts.sum(axis=1, dtype=kind)
        else:
            total, rank_total = counts.sum(axis=2), counts.sum(axis=1)
        self.mean[:, here] = total / float(self._serving * self._per_token)
        self.maximum[:, here] = highest / float(self._per_token)
        self.uneven[:, here] = highest.astype(total.dtype, copy=False) * self._serving > total
        at_maximum = np.packbits(counts == highest[:, :, np.newaxis], axis=2)
        self._at_maximum[:, here] = at_maximum * self.uneven[:, here, np.newaxis]
        self._rank_total += rank_total
        np.maximum(self._rank_highest, counts.max(axis=1), out=self._rank_highest)

    @classmethod
    def concat(cls, parts: Sequence[Terms]) -> Terms:
        """The terms of consecutive parts, at least one, all of one shape."""
        joined = cls(0, parts[0]._layers, 0, parts[0]._per_token)
        for name in cls._PER_STEP:
            setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
        return joined

    def select(self, steps: npt.NDArray[Any]) -> Terms:
        """The terms of some steps: an index or a mask."""
        chosen = Terms(0, self._layers, 0, self._per_token)
        for name in self._PER_STEP:
            setattr(chosen, name, getattr(self, name)[steps])
        return chosen

    @property
    def recorded(self) -> Float64:
        """Tokens over all slots as recorded, float64 ``[steps, layers]``; equal where the tokens are."""
        return self.mean * (self._serving * self._per_token)

    @property
    def rank_mean(self) -> Float64:
        return self._rank_total / (self._layers * self._per_token)

    @property
    def rank_maximum(self) -> Float64:
        return self._rank_highest / self._per_token

    @property
    def excess(self) -> Float64:
        """max − mean: the tokens for which all ranks wait for the slowest, float64 ``[steps, layers]``."""
        return self.maximum - self.mean

    @cached_property
    def slowest(self) -> SlowestRanks:
        """The ranks with the most tokens of each step and layer; none if all ranks got the same."""
        steps, layers = self.mean.shape
        # numpy finds the true among bools five times as fast as nonzero bytes. Few bytes have a bit.
        some = np.flatnonzero(self._at_maximum != 0)
        bit = np.flatnonzero(np.unpackbits(self._at_maximum.reshape(-1)[some]).view(np.bool_))
        cell, byte = np.divmod(some[bit // 8], max(1, self._at_maximum.shape[2]))
        rank = 8 * byte + bit % 8
        tied = np.bincount(cell, minlength=steps * layers)
        return SlowestRanks(*np.divmod(cell, max(1, layers)), rank, 1 / tied[cell])

    def by_slowest(self, weights: Float64 | None = None) -> Float64:
        """Sum weights ``[steps, layers]`` by the slowest rank, or count the steps: ``[layers, ep_ranks]``.

        Ranks that tie for the slowest share a step's weight equally. If all ranks got the same, none does.
        """
        size, slowest = (self.mean.shape[1], self._rank_total.shape[1]), self.slowest
        share = slowest.share if weights is None else slowest.share * weights[slowest.step, slowest.layer]
        cell = slowest.layer * size[1] + slowest.rank
        total: npt.NDArray[Any] = np.bincount(cell, share, size[0] * size[1]).reshape(size)
        return total

    @cached_property
    def active(self) -> npt.NDArray[np.bool_]:
        """bool ``[steps, layers]``."""
        return self.maximum > 0

    @cached_property
    def ratio(self) -> Float64:
        """mean / maximum where active, else NaN: float64 ``[steps, layers]``."""
        return _ratio(self.mean, self.maximum)


@frozen
class Formula:
    """A formula, its source and its direction."""

    name: str
    text: str
    source: str
    better: Literal["higher", "lower"]
    #: None if it depends on the loads.
    perfect: float | None
    of: Callable[[Terms], Float64]
    warning: str = ""

    @property
    def direction(self) -> str:
        """``higher is better, 1 is perfect``."""
        return f"{self.better} is better" + ("" if self.perfect is None else f", {self.perfect:g} is perfect")

    def per_step(self, T: npt.NDArray[Any], serving: int | None = None) -> Float64:
        """The formula of ``T``: float64 ``[steps]``; ``serving``: how many of its ranks serve."""
        return self.of(Terms.of(T, serving=serving))


def _mean_over_active(values: Float64, active: npt.NDArray[np.bool_]) -> Float64:
    """Mean over active layers of values ``[steps, layers]``; NaN for steps without one."""
    total: Float64 = np.where(active, values, 0.0).sum(axis=1)
    return _ratio(total, active.sum(axis=1).astype(np.float64))


def _ratio(numerator: Float64, denominator: Float64) -> Float64:
    out: Float64 = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def balancedness(terms: Terms) -> Float64:
    """Mean over active layers of mean_r T / max_r T, in (0, 1]; vLLM PR 39178."""
    return _mean_over_active(terms.ratio, terms.active)


def balancedness_of_layer(T: Float64, serving: int) -> Float64:
    """:func:`balancedness` of one layer ``[ep_ranks, steps]``; ``serving``: how many ranks serve."""
    return _ratio(T.sum(axis=0) / serving, T.max(axis=0))


def imbalance(terms: Terms) -> Float64:
    """Mean over active layers of max_r T / mean_r T, at least 1; vLLM PR 39178's text."""
    return _mean_over_active(_ratio(terms.maximum, terms.mean), terms.active)


def vllm(terms: Terms) -> Float64:
    """Σ_l mean_r T / Σ_l max_r T; vLLM's log line since PR 51813."""
    return _ratio(terms.mean.sum(axis=1), terms.maximum.sum(axis=1))


def vllm_legacy(terms: Terms) -> Float64:
    """Σ_r mean_l T / Σ_r max_l T; vLLM before PR 51813, wrong, kept to read old logs."""
    return _ratio(terms.rank_mean.sum(axis=1), terms.rank_maximum.sum(axis=1))


def sglang(terms: Terms) -> Float64:
    """Mean over all layers of (mean_r T + 1e-5) / (max_r T + 1e-5); SGLang's expert_distribution.py."""
    value: Float64 = ((terms.mean + 1e-5) / (terms.maximum + 1e-5)).mean(axis=1)
    value[~terms.active.any(axis=1)] = np.nan
    return value


def trtllm(terms: Terms) -> Float64:
    """Mean over active layers of max_r T / mean_r T − 1; TensorRT-LLM's report_load_statistics.py."""
    return imbalance(terms) - 1.0


def most_active(terms: Terms) -> Float64:
    """Mean over active layers of max_r A, if ``terms`` are of A; decides the time of small batches."""
    return _mean_over_active(terms.maximum, terms.active)


#: Of ``A``, the number of slots on each EP rank with at least one token, in place of ``T``.
ACTIVE_EXPERTS = Formula(
    "active-experts",
    "mean over active layers of max_r A, A[s, l, r] = slots of rank r with at least one token",
    "METRO, arXiv 2512.09277",
    "lower",
    None,
    most_active,
)
#: The formulas by name. Each is a function of ``T``, the tokens by step, layer and EP rank.
FORMULAS: dict[str, Formula] = {
    formula.name: formula
    for formula in (
        Formula(
            "balancedness",
            "mean over active layers of mean_r T / max_r T",
            "vLLM PR 39178",
            "higher",
            1.0,
            balancedness,
        ),
        Formula(
            "imbalance",
            "mean over active layers of max_r T / mean_r T",
            "vLLM PR 39178, its text",
            "lower",
            1.0,
            imbalance,
        ),
        Formula(
            "vllm",
            "Σ_l mean_r T / Σ_l max_r T",
            "vLLM's log line since PR 51813 (seen in 0.33.0)",
            "higher",
            1.0,
            vllm,
        ),
        Formula(
            "vllm-legacy",
            "Σ_r mean_l T / Σ_r max_l T",
            "vLLM's log line before PR 51813",
            "higher",
            1.0,
            vllm_legacy,
            "wrong: [[100, 200], [100, 200]] gives 1.0, but balancedness is 0.75; kept to read old logs",
        ),
        Formula(
            "sglang",
            "mean over all layers of (mean_r T + 1e-5) / (max_r T + 1e-5)",
            "SGLang's expert_distribution.py",
            "higher",
            1.0,
            sglang,
        ),
        Formula(
            "trtllm",
            "mean over active layers of max_r T / mean_r T − 1",
            "TensorRT-LLM's report_load_statistics.py",
            "lower",
            0.0,
            trtllm,
        ),
    )
}


def idle_terms(T: Float64, serving: int | None = None) -> tuple[float, float]:
    """Σ_{s,l} mean_r T and Σ_{s,l} max_r T: terms to add over blocks.

    The idle fraction is 1 minus their ratio: by how much less the mean rank has to do than the slowest.
    ``serving``: how many of the ranks serve; default all.
    """
    terms = Terms.of(T, serving=serving)
    return float(terms.mean.sum()), float(terms.maximum.sum())


def idle_fraction(mean_tokens: float, max_tokens: float) -> float | None:
    """1 − Σ mean / Σ max; None if no layer was active."""
    return 1 - mean_tokens / max_tokens if max_tokens > 0 else None


def most_often(times: npt.NDArray[Any]) -> tuple[int, float] | tuple[None, None]:
    """The rank that was the slowest most often, and its share; ``times [ranks]`` says how often each was."""
    total = times.sum()
    return (int(times.argmax()), float(times.max() / total)) if total > 0 else (None, None)


def mean_known(parts: Sequence[Float64]) -> float | None:
    """The mean over steps, without those that have no active layer (NaN); None if all are such."""
    values = np.concatenate([np.empty(0), *parts])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def per_layer(formula: Formula, T: Float64, serving: int | None = None) -> Float64:
    """A formula for each layer by itself, as if the model had only that one: ``[steps, layers]``."""
    steps, layers, ranks = T.shape
    terms = Terms.of(T.reshape(steps * layers, 1, ranks), serving=serving)
    return formula.of(terms).reshape(steps, layers)


@frozen
class Spread:
    """A figure over the steps of a run: its mean, low percentiles and extreme, with its step."""

    mean: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    min: float | None
    min_step: int | None
    max: float | None
    max_step: int | None
    #: The most that a percentile can be wrong, if it is from sums per minute; null: percentiles are exact.
    percentile_error: float | None = None

    @classmethod
    def of(cls, values: Float64, steps: npt.NDArray[np.int64]) -> Spread:
        """Over the steps with an active layer; all None if there is none."""
        known = ~np.isnan(values)
        values, steps = values[known], steps[known]
        if not len(values):
            return cls(None, None, None, None, None, None, None, None)
        p5, p50, p95 = (float(v) for v in np.percentile(values, [5, 50, 95]))
        low, high = int(values.argmin()), int(values.argmax())
        return cls(
            float(values.mean()),
            p5,
            p50,
            p95,
            float(values[low]),
            int(steps[low]),
            float(values[high]),
            int(steps[high]),
        )
