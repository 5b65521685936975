"""Which elements of two series belong together: their correlation at every shift of one against the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

#: Two series that belong together correlate at least as much.
MIN_CORRELATION = 0.3
#: A shift is better than another if their correlations differ by so many standard errors.
CLEARLY = 5.0
#: A logarithm that varies less (2%) shows nothing.
MIN_DEVIATION = 0.02
#: Of fewer elements nothing is concluded.
MIN_OVERLAP = 20


class Shift(NamedTuple):
    """How one series has to be shifted to fit another.

    Attributes:
        by: element i of the first belongs to element i + by of the second.
        correlation: at this shift; NaN if a series does not vary.
        is_clear: whether it fits clearly better than every other shift.
    """

    by: int
    correlation: float
    is_clear: bool


def correlations(a: Float64, b: Float64) -> tuple[Int64, Float64, Int64]:
    """Pearson's correlation of ``a[i]`` and ``b[i + shift]`` at every shift.

    Args:
        a, b: float64 ``[n]``, ``[m]``, NaN where unknown.

    Returns:
        The shifts, int64 ``[n + m - 1]``, ascending; the correlations, float64, NaN if it is undefined; and
        over how many pairs, int64.
    """
    size = 1 << (len(a) + len(b) - 1).bit_length()
    first, second = (_moments(values, size) for values in (a, b))

    def sums(x: int, y: int) -> Float64:
        found = np.fft.irfft(np.conj(first[x]) * second[y], size)
        return np.concatenate([found[size - len(a) + 1 :], found[: len(b)]])

    pairs = np.rint(sums(0, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = sums(1, 1) - sums(1, 0) * sums(0, 1) / pairs
        variance = (sums(2, 0) - sums(1, 0) ** 2 / pairs) * (sums(0, 2) - sums(0, 1) ** 2 / pairs)
        # The transform is exact to about 1e-12 of the whole sum.
        found = np.where(variance > 1e-9 * pairs**2, covariance / np.sqrt(variance), np.nan)
    return np.arange(1 - len(a), len(b)), np.clip(found, -1, 1), pairs.astype(np.int64)


def best_shift(a: Float64, b: Float64, expected: int, within: int | None = None) -> Shift | None:
    """The shift at which two series fit best; None if they have too little in common at every shift.

    Args:
        a, b: as for :func:`correlations`. Shifts at which less than half as many elements meet as at another
            are not looked at.
        expected: the shift to prefer unless another one is clearly better.
        within: how far from that another one may be.
    """
    shifts, found, pairs = correlations(a, b)
    enough = pairs >= max(MIN_OVERLAP, pairs.max() / 2)
    if within is not None:
        enough &= np.abs(shifts - expected) <= within
    if not enough.any():
        return None
    score = np.where(enough & np.isfinite(found), standard_errors(found, pairs), -np.inf)
    best = int(score.argmax())
    if not np.isfinite(score[best]):
        return Shift(expected, np.nan, False)
    at = expected - int(shifts[0])
    if 0 <= at < len(shifts) and score[at] > score[best] - CLEARLY:
        best = at
    clear = bool(score[best] > np.delete(score, best).max(initial=-np.inf) + CLEARLY)
    return Shift(int(shifts[best]), float(found[best]), clear)


def correlation(a: Float64, b: Float64) -> float:
    """Pearson's, over the elements known in both; NaN if one of them does not vary."""
    known = np.isfinite(a) & np.isfinite(b)
    one, other = a[known], b[known]
    if len(one) < MIN_OVERLAP or one.std() < 1e-9 or other.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def standard_errors(found: npt.ArrayLike, pairs: npt.ArrayLike) -> Float64:
    """Fisher's transform of correlations: differences of two are in standard errors."""
    spread = np.sqrt(np.maximum(np.asarray(pairs) - 3, 1) / 2)
    values: Float64 = np.arctanh(np.clip(found, -1 + 1e-12, 1 - 1e-12)) * spread
    return values


def evidence(values: Float64) -> Float64:
    """Logarithms without outliers, around 0: float64 ``[n]``, all NaN if they do not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.where(values > 0, values, np.nan))
    known = np.isfinite(logs)
    if known.sum() < MIN_OVERLAP:
        return np.full(len(values), np.nan)
    centered = np.clip(logs, *np.quantile(logs[known], [0.01, 0.99]))
    deviation = float(centered[known].std())
    if deviation < MIN_DEVIATION:
        return np.full(len(values), np.nan)
    scaled: Float64 = (centered - centered[known].mean()) / deviation
    return scaled


def _moments(values: Float64, size: int) -> list[npt.NDArray[np.complex128]]:
    """The transforms of: whether an element is known, its value, its square."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    return [np.fft.rfft(x, size) for x in (known.astype(np.float64), filled, filled**2)]
