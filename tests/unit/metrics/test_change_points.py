"""Departures of a series from its usual level."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.metrics.change_points import Departure, departures, split


def series(n: int, seed: int = 0, noise: float = 0.01) -> np.ndarray:
    return 0.9 + noise * np.random.default_rng(seed).standard_normal((1, n))


@pytest.mark.parametrize(("first", "size", "n"), [(60, 10, 300), (500, 40, 3000), (2000, 3000, 10_000)])
def test_departure_is_found_with_its_edges(first: int, size: int, n: int) -> None:
    values = series(n)
    values[0, first : first + size] -= 0.1
    ((found,),) = departures(values)
    assert abs(found.first - first) <= 1
    assert abs(found.end - first - size) <= 1
    assert found.drop == pytest.approx(0.1, abs=0.02)


def test_gradual_changes_and_rises_are_no_departure() -> None:
    n = 4000
    at = np.arange(n)
    slow = series(n) + 0.05 * np.sin(2 * np.pi * at / 2500)
    better = series(n)
    better[0, 2000:] += 0.05
    sawtooth = series(n) - 0.1 * (at % 1000) / 1000  # drift that a rearrangement makes good, again and again
    assert departures(np.concatenate([slow, better, sawtooth])) == [[], [], []]


def test_noise_that_is_correlated_is_no_departure() -> None:
    rng = np.random.default_rng(4)
    values = np.zeros((20, 3000))
    for step in range(1, 3000):
        values[:, step] = 0.9 * values[:, step - 1] + 0.01 * rng.standard_normal(20)
    assert sum(len(found) for found in departures(0.8 + values)) <= 1


def test_departure_inside_of_a_longer_one_is_found_if_it_goes_further_down() -> None:
    values = series(3000)
    values[0, 500:2000] -= 0.06
    values[0, 1200:1300] -= 0.2
    (found,) = departures(values)
    assert len(found) == 2
    assert {(round(d.first, -1), round(d.end, -1)) for d in found} == {(500, 2000), (1200, 1300)}


def test_departure_that_goes_on_ends_with_the_series() -> None:
    values = series(1000)
    values[0, 700:] -= 0.1
    ((found,),) = departures(values)
    assert isinstance(found, Departure)
    assert abs(found.first - 700) <= 1
    assert found.end == 1000


def test_short_series_has_none() -> None:
    assert departures(series(20)) == [[]]


def test_split_is_the_maximum_of_the_likelihood() -> None:
    values = np.r_[np.zeros(30), np.ones(20)]
    assert split(values, 25, 10) == 30
    assert split(values, 10, 5) == 15  # the best within reach
