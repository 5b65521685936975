"""Departures of a series from its usual level."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_analyze.metrics.departures import COARSE_FROM, RESTLESS, Departure, clear_changes, departures


def series(n: int, seed: int = 0, noise: float = 0.01) -> np.ndarray:
    return 0.9 + noise * np.random.default_rng(seed).standard_normal((1, n))


@pytest.mark.parametrize(("first", "size", "n"), [(60, 10, 300), (500, 40, 3000), (2000, 3000, 10_000)])
def test_departure_is_found_with_its_edges(first: int, size: int, n: int) -> None:
    values = series(n)
    values[0, first : first + size] -= 0.1
    ((found,),) = departures(values).found
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
    assert departures(np.concatenate([slow, better, sawtooth])).found == [[], [], []]


def test_noise_that_is_correlated_is_no_departure() -> None:
    rng = np.random.default_rng(4)
    values = np.zeros((20, 3000))
    for step in range(1, 3000):
        values[:, step] = 0.9 * values[:, step - 1] + 0.01 * rng.standard_normal(20)
    assert sum(len(found) for found in departures(0.8 + values).found) <= 1


def test_departure_inside_of_a_longer_one_is_found_if_it_goes_further_down() -> None:
    values = series(3000)
    values[0, 500:2000] -= 0.06
    values[0, 1200:1300] -= 0.2
    (found,) = departures(values).found
    assert len(found) == 2
    assert {(round(d.first, -1), round(d.end, -1)) for d in found} == {(500, 2000), (1200, 1300)}


def test_departure_that_goes_on_ends_with_the_series() -> None:
    values = series(1000)
    values[0, 700:] -= 0.1
    ((found,),) = departures(values).found
    assert isinstance(found, Departure)
    assert abs(found.first - 700) <= 1
    assert found.end == 1000


@pytest.mark.parametrize("n", [1200, 4000])
@pytest.mark.parametrize("rise", ["gradual", "in parts", "before another drop"])
def test_departure_whose_level_comes_back_without_an_abrupt_rise_does_not_go_on(rise: str, n: int) -> None:
    """It ends about when half of the drop is made good."""
    values = series(n)
    back = np.clip((np.arange(n) - 500) / 200, 0, 1)
    if rise == "in parts":
        back = np.ceil(back * 4) / 4
    values[0, 400:] -= 0.1 * (1 - back[400:])
    if rise == "before another drop":
        values[0, 1000:1100] -= 0.1
    first, *others = departures(values).found[0]
    assert abs(first.first - 400) <= 1
    assert abs(first.end - 600) <= 40
    assert [(abs(one.first - 1000) <= 1, abs(one.end - 1100) <= 1) for one in others] == (
        [(True, True)] if rise == "before another drop" else []
    )


def test_short_series_has_none() -> None:
    assert departures(series(20)).found == [[]]


def test_departure_of_the_shortest_kind_is_found_anywhere_in_a_long_series() -> None:
    rng = np.random.default_rng(5)
    for first in rng.integers(100, 20_000 - 110, 20):
        values = series(20_000, seed=int(first), noise=0.005)
        values[0, first : first + 10] -= 0.1
        ((found,),) = departures(values).found
        assert abs(found.first - first) <= 1
        assert abs(found.end - first - 10) <= 1


class TestRestless:
    """A series whose level changes at random every 250 values."""

    N = 20_000

    def levels(self, count: int = 3) -> np.ndarray:
        rng = np.random.default_rng(6)
        levels = np.repeat(0.7 + 0.1 * rng.uniform(-1, 1, (count, self.N // 250)), 250, axis=1)
        return levels + 0.01 * rng.standard_normal(levels.shape)

    def test_changes_that_are_usual_are_no_departures(self) -> None:
        assert self.N // 250 > RESTLESS
        found = departures(np.concatenate([self.levels(), series(self.N)]))
        assert found.restless.tolist() == [True, True, True, False]
        assert found.found == [[], [], [], []]

    def test_departure_to_far_below_is_found(self) -> None:
        values = self.levels()
        values[1, 4600:4650] = 0.2
        found = departures(values)
        assert [len(own) for own in found.found] == [0, 1, 0]
        ((first, end, _),) = found.found[1]
        assert (first, end) == (4600, 4650)

    def test_many_short_departures_of_a_series_with_a_usual_level_are_all_found(self) -> None:
        values = series(self.N)
        firsts = range(500, self.N, 800)
        for first in firsts:
            values[0, first : first + 50] -= 0.1
        found = departures(values)
        assert not found.restless.any()
        assert len(found.found[0]) == len(firsts)

    def test_rows_are_looked_at_each_for_itself(self) -> None:
        values = np.concatenate([self.levels(20), series(self.N)])
        values[17, 4600:4650] = 0.2
        values[20, 4600:4650] -= 0.4
        each = [departures(row[np.newaxis]) for row in values]
        found = departures(values)
        assert found.found == [own for one in each for own in one.found]
        assert found.restless.tolist() == [own for one in each for own in one.restless]


def test_series_shorter_than_what_is_looked_at_in_means_is_found_alike() -> None:
    for n in (COARSE_FROM - 1, COARSE_FROM):
        values = series(n)
        values[0, 700:760] -= 0.1
        ((found,),) = departures(values).found
        assert (found.first, found.end) == (700, 760)


def test_only_windows_that_end_behind_an_index_show_a_clear_change() -> None:
    rng = np.random.default_rng(1)
    values = 0.9 + rng.normal(0, 0.01, (3, 1000))
    values[1, 500:] -= 0.1
    assert clear_changes(values, 0).tolist() == [False, True, False]
    assert clear_changes(values[:, :502], 0).tolist() == [False] * 3
    assert clear_changes(values[:, :520], 502).tolist() == [False, True, False]
    # Windows that end behind 900 begin behind 580.
    assert clear_changes(values, 640).tolist() == [False, True, False]
    assert clear_changes(values, 900).tolist() == [False] * 3


@pytest.mark.parametrize("seed", range(10))
def test_series_without_a_clear_change_has_no_departure(seed: int) -> None:
    values = 0.8 + np.random.default_rng(seed).normal(0, 0.05, (4, 900))
    values[0, 300:330] -= 0.1
    values[1, 300:400] -= 0.05
    clear = clear_changes(values, 0)
    for row, own in enumerate(departures(values).found):
        assert clear[row] or not own
    assert clear[0]
