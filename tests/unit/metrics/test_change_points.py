"""Edges of a series."""

from __future__ import annotations

import numpy as np

from eplb_analyze.metrics.change_points import split


def test_split_is_the_maximum_of_the_likelihood() -> None:
    values = np.r_[np.zeros(30), np.ones(20)]
    assert split(values, 25, 10) == 30
    assert split(values, 10, 5) == 15  # the best within reach
