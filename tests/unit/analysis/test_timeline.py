"""`timeline`: equal to a plain loop over the recorded arrays, and its output."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from helpers import cli
from small_run import MOE_LAYERS, Truth

from eplb_analyze import open_run
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.analysis.timeline_report import NAMES


@pytest.mark.parametrize("bins", [1, 7, 1000])
@pytest.mark.parametrize("layer", [None, 5])
@pytest.mark.parametrize("formula", NAMES)
def test_bins_equal_a_plain_loop(truth: Truth, formula: str, layer: int | None, bins: int) -> None:
    result = timeline(open_run(truth.root), formula, bins, layer)
    count = min(bins, 30)
    assert len(result.bins) == count
    assert [b.first_step for b in result.bins[1:]] == [b.last_step + 1 for b in result.bins[:-1]]
    assert (result.bins[0].first_step, result.bins[-1].last_step) == (0, 29)
    sizes = {b.last_step - b.first_step + 1 for b in result.bins}
    assert max(sizes) - min(sizes) <= 1
    rows = slice(None) if layer is None else slice(1, 2)
    counts = truth.active if formula == "active-experts" else truth.T
    T = {s: t[rows] for s, t in counts.items() if t[rows].any()}
    for b in result.bins:
        here = [T[s] for s in T if b.first_step <= s <= b.last_step]
        assert b.steps == len(here)
        if not here:
            assert (b.mean, b.min, b.max) == (None, None, None)
        elif formula == "idle_fraction":
            assert b.mean == pytest.approx(reference.idle_fraction(here))
            each = [reference.idle_fraction([t]) for t in here]
            assert (b.min, b.max) == pytest.approx((min(each), max(each)))
        else:
            values = [reference.per_step(formula, [t])[0] for t in here]
            assert (b.mean, b.min, b.max) == pytest.approx((np.mean(values), min(values), max(values)))
    known = [b for b in result.bins if b.min is not None]
    assert (result.min, result.max) == (min(b.min for b in known), max(b.max for b in known))


def test_active_experts_of_a_layer_are_those_of_its_timeline(local: Truth) -> None:
    run = open_run(local.root)
    for layer in MOE_LAYERS:
        assert layer_report(run, layer).active_experts == timeline(run, "active-experts", 1, layer).mean
    expected = reference.per_step("active-experts", [local.active[3][:1]])[0]
    assert layer_report(run, MOE_LAYERS[0], step=3).active_experts == expected


def test_one_bin_equals_the_summary(truth: Truth) -> None:
    run = open_run(truth.root)
    figures = summarize(run)
    assert timeline(run, "idle_fraction", 1).bins[0].mean == pytest.approx(figures.idle_fraction)
    assert timeline(run, bins=1).mean == pytest.approx(figures.spreads["balancedness"].mean)
    shapes = [(c.first_step, c.last_step, c.ep_size) for c in figures.configurations]
    assert [(c.first_step, c.last_step, c.ep_size) for c in timeline(run).configurations] == shapes


def test_rearrangements_are_listed_and_a_range_limits_the_bins(local: Truth) -> None:
    run = open_run(local.root)
    assert timeline(run).rearrangements == [r.first_step for r in summarize(run).rearrangements]
    assert timeline(run, layer=3).rearrangements == [10, 14]
    assert timeline(run, layer=5, steps=(0, 14)).rearrangements == [12]
    part = timeline(run, steps=(5, 9), bins=4)
    assert [(b.first_step, b.steps) for b in part.bins] == [(5, 1), (6, 0), (7, 0), (8, 1)]
    frame = part.frame()
    assert frame.columns == ["first_step", "last_step", "steps", "mean", "min", "max"]
    assert frame["mean"].null_count() == 2
    assert frame.filter(frame["steps"] > 0)["mean"].to_list() == [part.bins[0].mean, part.bins[3].mean]


def test_unknown_formula_is_rejected(local: Truth) -> None:
    with pytest.raises(ValueError, match="no formula 'x'; choose one of: balancedness"):
        timeline(open_run(local.root), "x")


def test_plot_has_one_column_per_bin(local: Truth) -> None:
    out = cli("timeline", "--bins", "30", local.root).stdout.splitlines()
    axis = next(line for line in out if "└" in line).split("└")[1]
    assert [i // 2 for i, c in enumerate(axis) if c == "▲"] == [10, 14]
    assert [i // 2 for i, c in enumerate(axis) if c == "╌"][::2] == [6, 7]
    wide = cli("timeline", "--bins", "500", local.root)
    assert "500 bins do not fit" in wide.stderr
