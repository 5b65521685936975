"""Series are shifted against each other, by known amounts."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.metrics.alignment import best_shift, correlations, evidence


def test_correlations_are_those_of_the_overlapping_parts() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=40), rng.normal(size=25)
    a[[3, 17]], b[5] = np.nan, np.nan
    shifts, found, pairs = correlations(a, b)
    assert shifts.tolist() == list(range(-39, 25))
    for shift, r, count in zip(shifts.tolist(), found, pairs.tolist(), strict=True):
        both = [(a[i], b[i + shift]) for i in range(40) if 0 <= i + shift < 25]
        known = np.array([pair for pair in both if not np.isnan(pair).any()]).reshape(-1, 2)
        assert count == len(known)
        if count > 2:
            assert r == pytest.approx(np.corrcoef(known.T)[0, 1], abs=1e-9)


@pytest.mark.parametrize("shift", [-400, -1, 0, 1, 250])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_planted_shift_is_found(shift: int, noise: float) -> None:
    rng = np.random.default_rng(2)
    whole = np.convolve(rng.normal(size=3009), 0.7 ** np.arange(10), mode="valid")
    a, b = whole[500:2500], whole[500 - shift : 2500 - shift]
    found = best_shift(evidence(np.exp(a + noise * rng.normal(size=2000))), evidence(np.exp(b)), 0)
    assert found is not None
    assert (found.by, found.is_clear) == (shift, True)


def test_a_part_fits_a_whole_of_which_little_is_known() -> None:
    whole = np.random.default_rng(6).normal(size=20_000)
    known = np.where(np.arange(20_000) // 100 % 5 == 0, whole, np.nan)
    assert best_shift(whole[7000:9000], known, 0) == (7000, pytest.approx(1.0), True)


def test_a_shift_of_a_periodic_series_is_not_clear() -> None:
    wave = np.sin(np.arange(600) * 2 * np.pi / 20)
    found = best_shift(wave[3:], wave, 7)
    assert found is not None
    assert not found.is_clear
    # Without an offset it is as good as any.
    assert best_shift(wave, wave, 0).by == 0  # type: ignore[union-attr]


def test_noise_does_not_move_an_expected_shift() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        found = best_shift(rng.normal(size=400), rng.normal(size=400), 5)
        assert found is not None
        assert found.by == 5
        assert not found.is_clear


def test_a_series_that_does_not_vary_shows_nothing() -> None:
    constant = evidence(np.full(100, 128.0))
    assert np.isnan(constant).all()
    assert best_shift(constant, np.random.default_rng(4).normal(size=100), 0) is None
    assert best_shift(np.ones(100), np.random.default_rng(4).normal(size=100), 3) == (
        3,
        pytest.approx(np.nan, nan_ok=True),
        False,
    )
    assert np.isnan(evidence(np.arange(5.0))).all(), "too few"
