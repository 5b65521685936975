"""Tests of numbers as text."""

import pytest

from eplb_analyze.text import milliseconds, milliseconds_bounded, saves_or_costs


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.3512, 0.311, 0.389), "0.35 ms (0.31 to 0.39)"),
        ((903.4, 880.2, 925.1), "903 ms (880 to 925)"),
        ((2.93, 2.51, 3.3), "2.9 ms (2.5 to 3.3)"),
        ((5.021, 5.012, 5.034), "5.02 ms (5.01 to 5.03)"),
        ((-0.123, -0.201, 0.04), "−0.12 ms (−0.20 to 0.04)"),
        ((10.0, 9.9999, 10.0001), "10 ms (10 to 10)"),
        ((0.0, 0.0, 0.0123), "0.000 ms (0.000 to 0.012)"),
        ((0.0, 0.0, 0.0), "0.0 ms (0.0 to 0.0)"),
        ((8.2412,), "8.24 ms"),
        ((0.04671,), "0.047 ms"),
        ((1234.5,), "1234 ms"),
        ((None,), "–"),
    ],
)
def test_milliseconds_have_as_many_digits_as_matter(values: tuple[float | None, ...], text: str) -> None:
    assert milliseconds(*values) == text


def test_milliseconds_of_a_difference_have_their_sign() -> None:
    assert milliseconds(0.12, 0.05, 0.2, sign=True) == "+0.12 ms (+0.05 to +0.20)"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((-0.12, -0.2, 0.04), "−0.12 ms (−0.20 to +0.04)"),
        ((-0.71, -0.713, 0.49), "−0.71 ms, at most +0.49"),
        ((-0.6, -1.8, -0.59), "−0.6 ms, at least −1.8"),
        ((0.0, -0.11, 0.001), "0.00 ms, at least −0.11"),
        # As far from both bounds: an interval, with the digits that show it.
        ((-8.1, -8.14, -8.04), "−8.10 ms (−8.14 to −8.04)"),
        # 0 is excluded, and looks so.
        ((-2.0, -11.0, -0.2), "−2.0 ms (−11.0 to −0.2)"),
        ((-1.0, -21.8, -0.1), "−1 ms (−22 to 0)"),
        ((0.0, 0.0, 0.0), "0.0 ms (0.0 to 0.0)"),
    ],
)
def test_interval_does_not_begin_at_its_estimate(values: tuple[float, float, float], text: str) -> None:
    assert milliseconds_bounded(*values) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.81, 0.62, 1.0), "saves 0.8 ms (0.6 to 1.0) per step"),
        ((-0.06, -0.11, -0.02), "costs 0.06 ms (0.02 to 0.11) more per step"),
        ((3.1, -0.9, 7.4), "saves 3.1 ms per step, but may cost up to 0.9 ms more"),
        ((-0.2, -0.2, 1.3), "costs 0.2 ms more per step, but may save up to 1.3 ms"),
        # A bound that prints as 0 is none to warn of.
        ((3.1, -0.01, 7.4), "saves 3.1 ms (0.0 to 7.4) per step"),
        ((0.0, 0.0, 0.0), "saves 0.0 ms (0.0 to 0.0) per step"),
    ],
)
def test_loss_is_a_word_and_not_a_sign(values: tuple[float, float, float], text: str) -> None:
    assert saves_or_costs(*values, milliseconds, saved=" per step", more=" more per step") == text
