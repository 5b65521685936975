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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics.bootstrap import SEED, Interval, correlation, standard_error
from eplb_analyze.text import percent, plural
from eplb_dump.format.frozen import frozen

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


#: a / b: how many tokens cost as much as one more active expert. The fit tries each, because it decides
#: which rank is the slowest. Infinite: only active experts count; 0: only tokens count.
EXCHANGE_RATES = (np.inf, *(2.0**power for power in range(10, 1, -1)), 0.0)
#: With fewer steps nothing is fitted.
MIN_STEPS = 100
#: If a larger share of the steps does not follow the model, the times measure something else.
MAX_EXCLUDED = 0.4
#: A step whose time is off by more than this many standard deviations waited for something else.
WAITED = 4.0
#: So many steps decide what to take for a wait at first; then all steps do.
BEGIN_WITH = 20_000
#: Of the curve of time over tokens, at most.
MAX_BENDS = 16
#: Of the curve of time over the run, at most; its bends are equally far apart.
MAX_TURNS = 4
#: A cost that lowers twice the log-likelihood by more does not explain the times. The 95% quantile of χ² is
#: 3.84 for one unknown and 5.99 for two; the exchange rate is a second unknown, but only in part, as rates
#: explain similar things. Chosen by simulation; `benchmarks.cost` checks it on other seeds.
PLAUSIBLE = 5.0
#: If the cost can be nothing but also more than this share of step time, the recording cannot tell.
MAX_UNKNOWN = 0.25


@frozen
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

    def of(self, steps: Int64) -> Float64:
        """The time of each of these steps, which are distinct; NaN if it has none."""
        ms = np.full(len(steps), np.nan)
        _, here, there = np.intersect1d(steps, self.step, assume_unique=True, return_indices=True)
        ms[here] = self.ms[there]
        return ms


class Excess(NamedTuple):
    """What the slowest rank has more than the mean over ranks: the sum over layers, the mean over steps.

    The difference of two is what one placement saves beside another.

    Attributes:
        effort: float64 ``[len(EXCHANGE_RATES)]``, see :func:`effort_of`.
    """

    effort: Float64

    def __sub__(self, other: Excess) -> Excess:
        return Excess(self.effort - other.effort)


class Work(NamedTuple):
    """What steps ask of the ranks, summed over layers; the work of several layers can be added.

    Attributes:
        tokens: float64 ``[n]``, the mean over ranks of N: proportional to the step's tokens.
        active: float64 ``[n]``, the mean over ranks of the active experts.
        slowest: float64 ``[n, len(EXCHANGE_RATES)]``, the effort of each layer's slowest rank.
    """

    tokens: Float64
    active: Float64
    slowest: Float64

    @classmethod
    def of(cls, active: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> Work:
        """``active``, ``tokens``: ``[n, layers, ep_ranks]``."""
        steps, layers, ranks = active.shape
        # Exact, as counts are below 2^24 and exchange rates powers of 2; half as many bytes. Ranks first, so
        # that the maximum is over whole arrays.
        experts, counts = (
            np.ascontiguousarray(values.reshape(-1, ranks).T, np.float32) for values in (active, tokens)
        )
        slowest = [
            effort_of(experts, counts, rate).max(axis=0).reshape(steps, layers).sum(axis=1, dtype=np.float64)
            for rate in EXCHANGE_RATES
        ]
        return cls(
            tokens.sum(axis=(1, 2)) / ranks, active.sum(axis=(1, 2)) / ranks, np.stack(slowest, axis=1)
        )

    @classmethod
    def of_all_active(cls, active: float, mean: Float64, maximum: Float64) -> Work:
        """If the ranks have equally many active experts in every step: their number, summed over layers.

        ``mean``, ``maximum``: the tokens of the ranks, ``[n, layers]``.
        """
        experts, most = np.full(len(mean), float(active)), maximum.sum(axis=1)
        slowest = [effort_of(experts, most, rate).astype(np.float64) for rate in EXCHANGE_RATES]
        return cls(mean.sum(axis=1), experts, np.stack(slowest, axis=1))

    @classmethod
    def empty(cls) -> Work:
        return cls(np.empty(0), np.empty(0), np.empty((0, len(EXCHANGE_RATES))))

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
        mean = [effort_of(self.active, self.tokens, rate).mean() for rate in EXCHANGE_RATES]
        return Excess(self.slowest.mean(axis=0) - mean)


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
    """The time of a unit of effort, ms; ``exchange``: an index into :data:`EXCHANGE_RATES`."""

    exchange: int
    ms: Interval


@frozen
class Cost:
    """What imbalance cost in the steps of one phase.

    Attributes:
        ms_per_step: the cost with its 95% interval, at least 0; None if nothing was fitted.
        r2: the share of the variance of step time that the model explains, over the steps used.
        mean_ms: the mean step time over the steps used.
        used: bool ``[n]``, the steps that follow the model.
        expected: float64 ``[n]``, the fitted time of each step, ms; NaN if not fitted.
        reason: why the cost is not identifiable.
        rates: those that explain the times, the best one first.
        driver: what makes the slowest rank slow; None if no cost is measured or the times do not show it.
    """

    status: CostStatus
    ms_per_step: Interval | None
    r2: float | None
    mean_ms: float | None
    used: Bool
    expected: Float64
    reason: str = ""
    rates: tuple[Rate, ...] = ()
    driver: Driver | None = None

    def price(self, excess: Excess) -> Interval | None:
        """ms per step of an imbalance, or of the difference of two; None if unknown."""
        if self.status is CostStatus.NOT_IDENTIFIABLE or not self.rates:
            return None
        return _price(self.rates, excess)


def _price(rates: Sequence[Rate], excess: Excess) -> Interval:
    """Of the best rate; the interval is the union over all."""
    prices = [[float(excess.effort[k] * bound) for bound in (ms.value, ms.low, ms.high)] for k, ms in rates]
    bounds = [bound for price in prices for bound in price[1:]]
    return Interval(prices[0][0], min(bounds), max(bounds))


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
        return _unknown(
            ms, f"{plural(int(usable.sum()), 'step')} with a usable time, but {MIN_STEPS} are needed"
        )
    times, done = ms[usable], work.select(usable)
    usual = _usual(done.tokens)
    residuals, follows = _without_waits(times, np.column_stack([usual, done.slowest]))
    if follows.mean() < 1 - MAX_EXCLUDED:
        return _unknown(ms, f"{percent(1 - follows.mean())} of the steps waited for something else")
    white = _whitening(residuals, follows)
    models = _models(white(times), white(_standardized(usual)), white(done.slowest))
    if not models:
        return _unknown(ms, "imbalance never varied")
    # A time is not negative: where it would be, the best is that this effort explains nothing.
    # Of rates that explain the times equally well, the one with most weight on tokens comes first: if active
    # experts never varied, nothing is known of their price, and it must not decide.
    models.sort(key=lambda model: (-round(model.gain, 6) if model.rate > 0 else 0.0, -model.exchange))
    most = models[0].gain if models[0].rate > 0 else 0.0
    found = [
        Rate(model.exchange, rates)
        for model in models
        if (rates := model.interval(PLAUSIBLE - most + model.gain)) is not None
    ]
    if not found:  # all are below 0 by more than their errors: the bounds of rates estimated as 0
        found = [
            Rate(model.exchange, Interval(0.0, 0.0, np.sqrt(PLAUSIBLE) * model.deviation)) for model in models
        ]
    plausible, found = found, _possible(found, times[follows], done.slowest[follows])
    columns = _standardized(np.column_stack([usual, done.slowest[:, found[0].exchange]]))
    residuals = times - columns @ _weighted(columns, times, follows)
    interval = _price(found, done.excess())
    used, expected = np.zeros(len(ms), np.bool_), np.full(len(ms), np.nan)
    used[usable], expected[usable] = follows, times - residuals
    mean, variance = float(ms[used].mean()), float(ms[used].var())
    r2 = max(0.0, 1 - float(residuals[follows].var()) / variance) if variance > 0 else None
    status, reason = CostStatus.MEASURED, ""
    if not interval.is_significant:
        status = CostStatus.NO_MEASURABLE_COST
        if interval.high > MAX_UNKNOWN * mean:
            status = CostStatus.NOT_IDENTIFIABLE
            reason = "imbalance varied too little compared with the noise of step times"
    driver = _driver(plausible, done) if status is CostStatus.MEASURED else None
    return Cost(status, interval, r2, mean, used, expected, reason, tuple(found), driver)


def _possible(rates: list[Rate], ms: Float64, slowest: Float64) -> list[Rate]:
    """Without what the work of the slowest ranks cannot take: more than the whole of their steps.

    An effort that hardly varied, as of active experts that are all active, has a price with wide bounds.
    What other settings are worth must not be more than the step for that.

    Args:
        slowest: float64 ``[n, exchanges]``, of the steps with these times.
    """
    most = (ms.mean() / np.maximum(slowest.mean(axis=0), np.finfo(float).tiny)).tolist()
    found = [
        Rate(k, Interval(min(price.value, most[k]), price.low, min(price.high, most[k])))
        for k, price in rates
        if price.low <= most[k]
    ]
    return found or rates


def _driver(rates: Sequence[Rate], work: Work) -> Driver | None:
    """By the share of tokens in the effort, under all rates that explain the times."""
    active, tokens = float(work.active.mean()), float(work.tokens.mean())
    shares = [tokens / (active * EXCHANGE_RATES[rate.exchange] + tokens) for rate in rates]
    if max(shares) < 0.25:
        return Driver.ACTIVE_EXPERTS
    if min(shares) > 0.75:
        return Driver.TOKENS
    return Driver.BOTH if max(shares) - min(shares) < 0.5 else None


def _unknown(ms: Float64, reason: str) -> Cost:
    none = np.zeros(len(ms), np.bool_)
    return Cost(CostStatus.NOT_IDENTIFIABLE, None, None, None, none, np.full(len(ms), np.nan), reason)


def effort_of(active: Floats, tokens: Floats, rate: float) -> Floats:
    """Work in active experts; if only tokens count, in tokens. float32 or float64."""
    return tokens if rate == 0 else active + tokens * (1 / rate)


class _Model(NamedTuple):
    """What effort at one exchange rate explains.

    Attributes:
        exchange: an index into :data:`EXCHANGE_RATES`.
        rate: the time of a unit of work, ms; below 0 if that fits best.
        deviation: its standard error.
        gain: twice what it adds to the log-likelihood.
    """

    exchange: int
    rate: float
    deviation: float
    gain: float

    def interval(self, room: float) -> Interval | None:
        """The rates that take at most ``room`` from twice the log-likelihood; None if none is positive."""
        if room <= 0:
            return None
        aside = float(np.sqrt(room)) * self.deviation
        rates = (max(0.0, rate) for rate in (self.rate, self.rate - aside, self.rate + aside))
        return Interval(*rates) if self.rate + aside > 0 else None


def _models(times: Float64, usual: Float64, efforts: Float64) -> list[_Model]:
    """Least squares of times on the usual columns and one effort, for each that varies."""
    basis, size, _ = np.linalg.svd(usual, full_matrices=False)
    basis = basis[:, size > 1e-9 * size[0]]
    left = times - basis @ (basis.T @ times)
    varying = efforts - basis @ (basis.T @ efforts)
    n, free = len(times), len(times) - basis.shape[1] - 1
    rounding = (1e-6 * float(np.abs(times).mean())) ** 2  # times without any noise, as of a simulator
    square = (varying**2).sum(axis=0)
    models = []
    for k in np.flatnonzero(square > 1e-12 * (efforts**2).sum(axis=0)):
        column = varying[:, k]
        rate = float(column @ left / square[k])
        residuals = left - rate * column
        # Less weight to a residual of a step that draws the line to itself (MacKinnon and White 1985, HC3).
        leverage = (basis**2).sum(axis=1) + column**2 / square[k]
        deviation = standard_error(column * residuals / (1 - np.minimum(leverage, 0.99)) * (n / square[k]))
        variance = max(float(residuals @ residuals) / free, rounding)
        deviation = max(deviation, float(np.sqrt(rounding / square[k])))
        models.append((_Model(int(k), rate, deviation, rate**2 * square[k] / variance), variance / square[k]))
    if not models:
        return []
    # By how much steps that depend on each other, or noise of changing strength, exaggerate the likelihood.
    best, variance = max(models, key=lambda model: model[0].gain)
    exaggeration = best.deviation**2 / variance
    return [model._replace(gain=model.gain / exaggeration) for model, _ in models]


def _without_waits(times: Float64, columns: Float64) -> tuple[Float64, Bool]:
    """The residuals of the columns' best fit, and the steps that follow it."""
    columns = _standardized(columns)
    some = _some(len(times))
    residuals = times - columns @ _least_deviations(columns[some], times[some])
    for _ in range(3):
        scale = max(float(np.median(np.abs(residuals))) / 0.6745, 1e-6 * float(np.median(times)))
        follows = np.abs(residuals) < WAITED * scale
        residuals = times - columns @ _weighted(columns, times, follows)
    return residuals, follows


def _whitening(residuals: Float64, follows: Bool) -> Callable[[Float64], Float64]:
    """A function that takes autocorrelated noise out of values, float64 ``[n, ...]``, and drops waits.

    Slow noise, as of growing contexts, looks like an effect of imbalance, which is slow, too. If it is an
    AR(1) series, the noise of such differences is white (Prais and Winsten 1954).
    """
    after = np.append(False, follows[:-1])
    pairs = np.flatnonzero(after & follows)
    rho = correlation(residuals[pairs - 1], residuals[pairs])

    def whitened(values: Float64) -> Float64:
        rows = values.reshape(len(values), -1)
        differences = rows - rho * np.roll(rows, 1, axis=0)
        alone = np.sqrt(1 - rho**2) * rows
        white: Float64 = np.where(after[:, np.newaxis], differences, alone)[follows]
        return white[:, 0] if values.ndim == 1 else white

    return whitened


def _usual(tokens: Float64) -> Float64:
    """Columns for the time that a step takes anyhow: by its number of tokens, and by when it was.

    Both are lines, bent at some points. Time is flat while memory is the limit and grows later, or by steps
    if batches are padded. It also drifts slowly over a run (a warming device, longer contexts), and so does
    imbalance. Without the bends, the work of the slowest rank would explain these curves.
    """
    n = len(tokens)
    knots = min(MAX_BENDS, n // 40)
    bends = np.unique(np.quantile(tokens, np.linspace(0, 1, knots + 2)[1:-1]))
    at = np.linspace(-1, 1, n)
    turns = np.linspace(-1, 1, min(MAX_TURNS, n // 100) + 2)[:-1]
    return np.column_stack(
        [
            np.ones(n),
            tokens,
            *(np.maximum(tokens - bend, 0) for bend in bends),
            *(np.maximum(at - turn, 0) for turn in turns),
        ]
    )


def _standardized(columns: Float64) -> Float64:
    """Columns with mean 0 and deviation 1 after the constant first one."""
    centered: Float64 = columns - columns.mean(axis=0)
    centered[:, 0] = columns[:, 0]
    deviation = centered.std(axis=0)
    deviation[deviation <= 1e-9 * np.abs(columns).max(axis=0)] = 1.0
    standard: Float64 = centered / deviation
    return standard


def _weighted(columns: Float64, values: Float64, weights: npt.NDArray[Any]) -> Float64:
    """Weighted least squares; collinear columns share what they explain."""
    gram = columns.T @ (columns * weights[:, np.newaxis])
    gram.flat[:: len(gram) + 1] += 1e-10 * gram.trace()
    solution: Float64 = np.linalg.solve(gram, columns.T @ (weights * values))
    return solution


def _some(n: int) -> npt.NDArray[np.int64] | slice:
    """Steps to begin a fit with: a long run does not need all of them. Drawn, as steps may have a rhythm."""
    if n <= BEGIN_WITH:
        return slice(None)
    return np.sort(np.random.default_rng(SEED).choice(n, BEGIN_WITH, replace=False))


def _least_deviations(columns: Float64, values: Float64) -> Float64:
    """Median regression by reweighted least squares: steps that waited long have little influence."""
    coefficients = np.zeros(columns.shape[1])
    coefficients[0] = np.median(values)
    floor = 1e-3 * max(float(np.median(np.abs(values - coefficients[0]))), 1e-9)
    for _ in range(30):
        weights = 1 / np.maximum(np.abs(values - columns @ coefficients), floor)
        coefficients = _weighted(columns, values, weights)
    return coefficients
