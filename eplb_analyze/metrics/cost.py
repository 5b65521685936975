"""What imbalance costs in milliseconds: step times explained by the work of the slowest rank.

The model of one phase (prefill, decode, ...) is::

    step time = f(tokens) + Σ_layers max_r (a · active_r + b · N_r)

where ``active_r`` is the number of slots of rank r with at least one token and ``N_r`` the rank's tokens.
``a`` is the time to read the weights of an expert, which decides at few tokens; ``b`` is the time of a
token. The cost of imbalance is ``Σ_layers (max_r − mean_r)`` of the same expression: what a perfect balance
of the same loads would save.

Arrays in, arrays out.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.bootstrap import SEED, Interval, Ratio, autocorrelation, resample
from eplb_analyze.text import percent

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

#: a / b: how many tokens cost as much as one more active expert. The fit tries each, because it decides
#: which rank is the slowest. Infinite: only active experts count; 0: only tokens count.
EXCHANGE_RATES = (np.inf, 256.0, 64.0, 16.0, 0.0)
#: With fewer steps nothing is fitted.
MIN_STEPS = 100
#: If a larger share of the steps does not follow the model, the times measure something else.
MAX_EXCLUDED = 0.4
#: Tukey's biweight: 95 % efficient if noise is normal; residuals above this many standard deviations have
#: no influence.
BIWEIGHT = 4.685
#: Half the 95 % quantile of χ² with one degree of freedom: models whose log-likelihoods differ by less
#: explain the times equally well.
PLAUSIBLE = 1.92
#: If the cost can be nothing but also more than this share of step time, the recording cannot tell.
MAX_UNKNOWN = 0.25


class Work(NamedTuple):
    """What steps ask of the ranks, summed over layers; the work of several layers can be added.

    Attributes:
        tokens: float64 ``[n]``, the mean over ranks of N: proportional to the step's tokens.
        active: float64 ``[n]``, the mean over ranks of the active experts.
        slowest_active, slowest_tokens: float64 ``[n, len(EXCHANGE_RATES)]``, active experts and tokens of
            each layer's slowest rank at this exchange rate.
    """

    tokens: Float64
    active: Float64
    slowest_active: Float64
    slowest_tokens: Float64

    @classmethod
    def of(cls, active: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> Work:
        """``active``, ``tokens``: ``[n, layers, ep_ranks]``."""
        steps, _, ranks = active.shape
        slowest = np.empty((2, steps, len(EXCHANGE_RATES)))
        for k, rate in enumerate(EXCHANGE_RATES):
            effort = tokens if rate == 0 else active if np.isinf(rate) else active + tokens / rate
            rank = effort.argmax(axis=2)[:, :, np.newaxis]
            for of_rate, values in zip(slowest, (active, tokens), strict=True):
                of_rate[:, k] = np.take_along_axis(values, rank, axis=2).sum(axis=(1, 2))
        return cls(tokens.sum(axis=(1, 2)) / ranks, active.sum(axis=(1, 2)) / ranks, *slowest)

    @classmethod
    def concat(cls, parts: Sequence[Work]) -> Work:
        """The work of consecutive steps; at least one part."""
        return cls(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def plus(self, layers: Work) -> Work:
        """The work of these layers and of others in the same steps."""
        return Work(*(one + other for one, other in zip(self, layers, strict=True)))

    def select(self, steps: npt.NDArray[Any]) -> Work:
        """The work of some steps: an index or a mask."""
        return Work(*(values[steps] for values in self))


class CostStatus(str, enum.Enum):
    """Whether the cost of imbalance is known."""

    MEASURED = "measured"
    NO_MEASURABLE_COST = "no_measurable_cost"
    NOT_IDENTIFIABLE = "not_identifiable"


@dataclass(frozen=True)
class Cost:
    """What imbalance cost in the steps of one phase.

    Attributes:
        ms_per_step: the cost with its 95 % interval, at least 0; None if nothing was fitted.
        r2: the share of the variance of step time that the model explains, over the steps used.
        mean_ms: the mean step time over the steps used.
        used: bool ``[n]``, the steps that follow the model.
        expected: float64 ``[n]``, the fitted time of each step, ms; NaN if not fitted.
        reason: why the cost is not identifiable.
    """

    status: CostStatus
    ms_per_step: Interval | None
    r2: float | None
    mean_ms: float | None
    used: Bool
    expected: Float64
    reason: str = ""


def fit(ms: Float64, work: Work, excluded: Bool | None = None) -> Cost:
    """Fit the model to the steps of one phase.

    The fit is an M-estimate with Tukey's biweight, so steps that waited for something else have no
    influence. The interval is a block bootstrap of the estimate's influence function, over all models that
    explain the times about as well: with active experts, with tokens, or with both.

    Args:
        ms: float64 ``[n]``, the duration of each step; NaN if unknown.
        work: of the same steps.
        excluded: bool ``[n]``: steps known to contain something else, such as a rearrangement.
    """
    usable = np.isfinite(ms) & (ms > 0)
    if not usable.any():
        return _unknown(ms, "the recording has no step times")
    if excluded is not None:
        usable &= ~excluded
    if usable.sum() < MIN_STEPS:
        return _unknown(ms, f"only {usable.sum()} steps have a usable time; {MIN_STEPS} are needed")
    times, done = ms[usable], work.select(usable)
    noise = _noise(times, done)
    models = _models(times, done, noise)
    best = min(models, key=lambda model: model.loss + model.penalty)
    follows = np.abs(best.residuals) < BIWEIGHT * noise
    if follows.mean() < 1 - MAX_EXCLUDED:
        return _unknown(ms, f"{percent(1 - follows.mean())} of the steps waited for something else")
    rho = autocorrelation(best.residuals[follows])
    tolerance = PLAUSIBLE * (1 + rho) / (1 - rho)
    plausible = [model for model in models if model.loss < best.loss + tolerance]
    # As a and b are not negative, one of them alone bounds from below what both cost.
    single = [model for model in plausible if len(model.excess) == 1] or plausible
    low = min(model.interval(noise).low for model in single)
    high = max(model.interval(noise).high for model in plausible)
    bounds = best.cost, low, high
    interval = Interval(*(max(0.0, bound) for bound in bounds))
    used, expected = np.zeros(len(ms), np.bool_), np.full(len(ms), np.nan)
    used[usable], expected[usable] = follows, times - best.residuals
    mean, variance = float(ms[used].mean()), float(ms[used].var())
    r2 = max(0.0, 1 - float(best.residuals[follows].var()) / variance) if variance > 0 else None
    status, reason = CostStatus.MEASURED, ""
    if not interval.is_significant:
        status = CostStatus.NO_MEASURABLE_COST
        if interval.high > MAX_UNKNOWN * mean:
            status = CostStatus.NOT_IDENTIFIABLE
            reason = "imbalance varied too little beside the noise of step times"
    return Cost(status, interval, r2, mean, used, expected, reason)


def _unknown(ms: Float64, reason: str) -> Cost:
    none = np.zeros(len(ms), np.bool_)
    return Cost(CostStatus.NOT_IDENTIFIABLE, None, None, None, none, np.full(len(ms), np.nan), reason)


class _Model(NamedTuple):
    """One way to explain step times.

    Attributes:
        columns: float64 ``[n, p]``, of which the last ones are the work of the slowest rank.
        excess: float64, the mean over steps of max − mean of each of those last columns.
        coefficients: float64 ``[p]``, ms.
        residuals: float64 ``[n]``, ms.
        loss: the sum of Tukey's ρ, in units of a log-likelihood.
    """

    columns: Float64
    excess: Float64
    coefficients: Float64
    residuals: Float64
    loss: float

    @property
    def rates(self) -> Float64:
        """a, b or both, ms."""
        return self.coefficients[-len(self.excess) :]

    @property
    def cost(self) -> float:
        """ms per step; below 0 if that fits best."""
        return float(self.rates @ self.excess)

    @property
    def penalty(self) -> float:
        """Schwarz's criterion: what another coefficient has to gain."""
        return len(self.excess) * float(np.log(len(self.residuals))) / 2

    def interval(self, noise: float) -> Interval:
        """The cost and its interval if this model is right."""
        drawn = resample(Ratio.mean(self._influence(noise)), np.random.default_rng(SEED))
        return Interval.of(self.cost, self.cost + drawn)

    def _influence(self, noise: float) -> Float64:
        """What each step adds to the error of the cost, times the number of steps: float64 ``[n]``."""
        u = self.residuals / (BIWEIGHT * noise)
        inside = np.abs(u) < 1
        psi = np.where(inside, self.residuals * (1 - u**2) ** 2, 0.0)
        slope = np.where(inside, (1 - u**2) * (1 - 5 * u**2), 0.0)
        n, p = self.columns.shape
        standard, deviation = _standardized(self.columns)
        bread = _inverse(standard.T @ (standard * slope[:, np.newaxis]) / n)
        towards = np.zeros(p)
        towards[-len(self.excess) :] = self.excess / deviation[-len(self.excess) :]
        values: Float64 = standard @ (bread @ towards) * psi * np.sqrt(n / (n - p))
        return values


def _models(times: Float64, work: Work, noise: float) -> list[_Model]:
    """The models to choose from. Those with both kinds of work count only if neither saves time."""
    last = len(EXCHANGE_RATES) - 1
    active = [(work.slowest_active[:, k], work.active) for k in range(last + 1)]
    tokens = [(work.slowest_tokens[:, k], work.tokens) for k in range(last + 1)]
    both = (_model(times, work, noise, [active[k], tokens[k]]) for k in range(1, last))
    return [
        _model(times, work, noise, [active[0]]),
        _model(times, work, noise, [tokens[last]]),
        *(model for model in both if (model.rates > 0).all()),
    ]


def _model(times: Float64, work: Work, noise: float, slowest: list[tuple[Float64, Float64]]) -> _Model:
    """``slowest``: (maximum, mean over ranks) of each kind of work."""
    columns = np.column_stack([_usual(work.tokens), *(maximum for maximum, _ in slowest)])
    excess = np.array([float((maximum - mean).mean()) for maximum, mean in slowest])
    standard, deviation = _standardized(columns)
    residuals = times - standard @ _least_deviations(standard, times)
    coefficients = np.zeros(columns.shape[1])
    for _ in range(30):
        weights = np.maximum(0, 1 - (residuals / (BIWEIGHT * noise)) ** 2) ** 2
        coefficients = _weighted(standard, times, weights)
        before, residuals = residuals, times - standard @ coefficients
        if np.abs(residuals - before).max() < 1e-6 * noise:
            break
    u2 = np.minimum((residuals / (BIWEIGHT * noise)) ** 2, 1)
    loss = float((1 - (1 - u2) ** 3).sum()) * BIWEIGHT**2 / 6
    return _Model(columns, excess, coefficients / deviation, residuals, loss)


def _usual(tokens: Float64) -> Float64:
    """Columns for the time that a number of tokens takes anyhow: constant, linear, bent at two points.

    Time is flat while memory is the limit and grows later. Without the bends, the tokens of the slowest
    rank would explain that curve.
    """
    bends = np.unique(np.quantile(tokens, [1 / 3, 2 / 3]))
    return np.column_stack([np.ones(len(tokens)), tokens, *(np.maximum(tokens - bend, 0) for bend in bends)])


def _noise(times: Float64, work: Work) -> float:
    """The standard deviation of what no model explains, by the median of absolute residuals."""
    everything = np.column_stack([_usual(work.tokens), work.slowest_active, work.slowest_tokens])
    columns, _ = _standardized(everything)
    residuals = times - columns @ _least_deviations(columns, times)
    return max(float(np.median(np.abs(residuals))) / 0.6745, 1e-6 * float(np.median(times)))


def _standardized(columns: Float64) -> tuple[Float64, Float64]:
    """Columns with mean 0 and deviation 1 after the constant first one, and the deviations they had."""
    centered = columns - columns.mean(axis=0)
    centered[:, 0] = columns[:, 0]
    deviation = centered.std(axis=0)
    deviation[deviation <= 1e-9 * np.abs(columns).max(axis=0)] = 1.0
    return centered / deviation, deviation


def _weighted(columns: Float64, values: Float64, weights: Float64) -> Float64:
    """Weighted least squares."""
    gram = columns.T @ (columns * weights[:, np.newaxis])
    solution: Float64 = _inverse(gram) @ (columns.T @ (weights * values))
    return solution


def _inverse(gram: Float64) -> Float64:
    """Of a symmetric matrix; collinear columns share what they explain."""
    inverse: Any = np.linalg.pinv(gram, rcond=1e-10, hermitian=True)
    return np.asarray(inverse, np.float64)


def _least_deviations(columns: Float64, values: Float64) -> Float64:
    """Median regression by reweighted least squares: steps that waited long have little influence."""
    coefficients = np.zeros(columns.shape[1])
    coefficients[0] = np.median(values)
    floor = 1e-3 * max(float(np.median(np.abs(values - coefficients[0]))), 1e-9)
    for _ in range(30):
        weights = 1 / np.maximum(np.abs(values - columns @ coefficients), floor)
        coefficients = _weighted(columns, values, weights)
    return coefficients
