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
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.bootstrap import SEED, Interval, Ratio, resample
from eplb_analyze.text import percent

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
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
#: The 95 % quantile of χ² with one degree of freedom: if twice the log-likelihood is lower by more, a cost
#: does not explain the times.
PLAUSIBLE = 3.84
#: If the cost can be nothing but also more than this share of step time, the recording cannot tell.
MAX_UNKNOWN = 0.25


@dataclass(frozen=True)
class StepTimes:
    """Step times that another program measured.

    Attributes:
        step: int64 ``[n]``, ascending.
        ms: float64 ``[n]``.
        basis: what measured them, such as ``engine``.
        note: how well they were aligned with the steps.
    """

    step: Int64
    ms: Float64
    basis: str
    note: str


class Excess(NamedTuple):
    """What the slowest rank has more than the mean over ranks: the sum over layers, the mean over steps.

    The difference of two is what one placement saves beside another.

    Attributes:
        active, tokens: float64 ``[len(EXCHANGE_RATES)]``.
    """

    active: Float64
    tokens: Float64

    def __sub__(self, other: Excess) -> Excess:
        return Excess(self.active - other.active, self.tokens - other.tokens)

    @property
    def effort(self) -> Float64:
        """Both in one unit, see :func:`_effort`: float64 ``[len(EXCHANGE_RATES)]``."""
        return _effort(self.active, self.tokens)


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

    def excess(self) -> Excess:
        """What the slowest ranks have more than the mean, on average over the steps."""
        return Excess(
            self.slowest_active.mean(axis=0) - self.active.mean(),
            self.slowest_tokens.mean(axis=0) - self.tokens.mean(),
        )


class CostStatus(str, enum.Enum):
    """Whether the cost of imbalance is known."""

    MEASURED = "measured"
    NO_MEASURABLE_COST = "no_measurable_cost"
    NOT_IDENTIFIABLE = "not_identifiable"
    #: From kernel times of another machine, not from this run.
    ESTIMATED = "estimated"


class Driver(str, enum.Enum):
    """What makes the slowest rank slow."""

    ACTIVE_EXPERTS = "active_experts"
    TOKENS = "tokens"
    BOTH = "both"


class Rate(NamedTuple):
    """The time of a unit of work under one exchange rate, ms, with the interval in which it is plausible."""

    exchange: int
    ms: Interval


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
        rates: those that explain the times, the best one first.
    """

    status: CostStatus
    ms_per_step: Interval | None
    r2: float | None
    mean_ms: float | None
    used: Bool
    expected: Float64
    reason: str = ""
    rates: tuple[Rate, ...] = ()

    @property
    def driver(self) -> Driver | None:
        """What makes the slowest rank slow; None if there is no measured cost or the run cannot tell."""
        if self.status is not CostStatus.MEASURED:
            return None
        found = {EXCHANGE_RATES[rate.exchange] for rate in self.rates}
        if {np.inf, 0.0} <= found:
            return None
        return Driver.ACTIVE_EXPERTS if np.inf in found else Driver.TOKENS if 0 in found else Driver.BOTH

    def price(self, excess: Excess) -> Interval | None:
        """ms per step of an imbalance, or of the difference of two; None if unknown."""
        if self.status is CostStatus.NOT_IDENTIFIABLE or not self.rates:
            return None
        return _price(self.rates, excess)


def _price(rates: Sequence[Rate], excess: Excess) -> Interval:
    """Of the best rate; the interval is the union over all."""
    units = excess.effort
    prices = [[units[k] * ms for ms in (rate.value, rate.low, rate.high)] for k, rate in rates]
    bounds = [bound for price in prices for bound in price[1:]]
    return Interval(float(prices[0][0]), float(min(bounds)), float(max(bounds)))


def fit(ms: Float64, work: Work, excluded: Bool | None = None) -> Cost:
    """Fit the model to the steps of one phase.

    Under each exchange rate one time per unit of work is unknown. It is an M-estimate with Tukey's
    biweight, so steps that waited for something else have no influence. The interval is by profile
    likelihood over the exchange rates, with the block bootstrap of the estimates' influence functions: a
    rate that explains the times less well than the best one has a narrower interval, or none.

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
    usual, efforts = _usual(done.tokens), _effort(done.slowest_active, done.slowest_tokens)
    noise = _noise(times, np.column_stack([usual, efforts]))
    flat = _Model.fit(times, usual, noise)
    alike = np.abs(efforts - usual @ np.linalg.lstsq(usual, efforts)[0]).max(axis=0) < 1e-6 * efforts.mean()
    if alike.all():
        return _unknown(ms, "imbalance never varied")
    models = [_Model.fit(times, np.column_stack([usual, effort]), noise) for effort in efforts.T]
    # A time is not negative: where it would be, the flat model is the best that this exchange rate has.
    order = sorted(range(len(models)), key=lambda k: models[k].loss if models[k].last > 0 else np.inf)
    best = models[order[0]] if models[order[0]].last > 0 else flat
    follows = np.abs(best.residuals) < BIWEIGHT * noise
    if follows.mean() < 1 - MAX_EXCLUDED:
        return _unknown(ms, f"{percent(1 - follows.mean())} of the steps waited for something else")
    # How much steps that depend on each other, or noise that is not normal, exaggerate the likelihood.
    exaggeration = min(models, key=lambda model: model.loss).exaggeration(noise)
    left = {k: PLAUSIBLE - 2 * (models[k].loss - best.loss) / exaggeration for k in order if not alike[k]}
    found = [Rate(k, models[k].interval(noise, float(np.sqrt(x)))) for k, x in left.items() if x > 0]
    if not found:
        return _unknown(ms, "no model explains the times")
    interval = _price(found, done.excess())
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
    return Cost(status, interval, r2, mean, used, expected, reason, tuple(found))


def _unknown(ms: Float64, reason: str) -> Cost:
    none = np.zeros(len(ms), np.bool_)
    return Cost(CostStatus.NOT_IDENTIFIABLE, None, None, None, none, np.full(len(ms), np.nan), reason)


def _effort(active: Float64, tokens: Float64) -> Float64:
    """Work under each exchange rate, the last axis: in active experts, or in tokens where only they count."""
    rates = np.array(EXCHANGE_RATES)
    return np.where(rates == 0, tokens, active + tokens / np.where(rates == 0, 1, rates))


class _Model(NamedTuple):
    """One way to explain step times.

    Attributes:
        columns: float64 ``[n, p]``.
        coefficients: float64 ``[p]``, ms.
        residuals: float64 ``[n]``, ms.
        loss: the sum of Tukey's ρ, in units of a log-likelihood.
    """

    columns: Float64
    coefficients: Float64
    residuals: Float64
    loss: float

    @classmethod
    def fit(cls, times: Float64, columns: Float64, noise: float) -> _Model:
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
        return cls(columns, coefficients / deviation, residuals, loss)

    @property
    def last(self) -> float:
        """The coefficient of the last column, ms per unit; below 0 if that fits best."""
        return float(self.coefficients[-1])

    def interval(self, noise: float, deviations: float) -> Interval:
        """The last coefficient, at least 0, and so many standard deviations to both sides."""
        drawn = self.last + resample(Ratio.mean(self._influence(noise)[0]), np.random.default_rng(SEED))
        tail = NormalDist().cdf(-deviations)
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Interval(*(max(0.0, float(ms)) for ms in (self.last, low, high)))

    def exaggeration(self, noise: float) -> float:
        """The variance of the last coefficient beside what the likelihood says."""
        influence, curvature = self._influence(noise)
        drawn = resample(Ratio.mean(influence), np.random.default_rng(SEED))
        return max(float(drawn.var()) * curvature, 1e-12)

    def _influence(self, noise: float) -> tuple[Float64, float]:
        """What each step adds to the error of the last coefficient, times the number of steps ``[n]``;
        and the curvature of the loss along it."""
        u = self.residuals / (BIWEIGHT * noise)
        inside = np.abs(u) < 1
        psi = np.where(inside, self.residuals * (1 - u**2) ** 2, 0.0)
        slope = np.where(inside, (1 - u**2) * (1 - 5 * u**2), 0.0)
        n, p = self.columns.shape
        standard, deviation = _standardized(self.columns)
        towards = _inverse(standard.T @ (standard * slope[:, np.newaxis]) / n)[-1]
        values: Float64 = standard @ towards * psi * np.sqrt(n / (n - p)) / deviation[-1]
        return values, float(n * deviation[-1] ** 2 / max(towards[-1], 1e-12) / noise**2)


def _usual(tokens: Float64) -> Float64:
    """Columns for the time that a number of tokens takes anyhow: constant, linear, bent at two points.

    Time is flat while memory is the limit and grows later. Without the bends, the tokens of the slowest
    rank would explain that curve.
    """
    bends = np.unique(np.quantile(tokens, [1 / 3, 2 / 3]))
    return np.column_stack([np.ones(len(tokens)), tokens, *(np.maximum(tokens - bend, 0) for bend in bends)])


def _noise(times: Float64, columns: Float64) -> float:
    """The standard deviation of what no model explains, by the median of absolute residuals."""
    columns, _ = _standardized(columns)
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
