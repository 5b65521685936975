"""`timeline`: equal to a plain loop over the recorded arrays, and its output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference
from helpers import assert_golden, cli, one_error
from small_run import Truth, write

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.metrics.formulas import FORMULAS


@pytest.mark.parametrize("bins", [1, 7, 1000])
@pytest.mark.parametrize("layer", [None, 5])
@pytest.mark.parametrize("formula", [*FORMULAS, "idle_fraction"])
def test_bins_equal_a_plain_loop(truth: Truth, formula: str, layer: int | None, bins: int) -> None:
    result = timeline(open_run(truth.root), formula, bins, layer)
    count = min(bins, 30)
    assert len(result.bins) == count
    assert [b.first_step for b in result.bins[1:]] == [b.last_step + 1 for b in result.bins[:-1]]
    assert (result.bins[0].first_step, result.bins[-1].last_step) == (0, 29)
    sizes = {b.last_step - b.first_step + 1 for b in result.bins}
    assert max(sizes) - min(sizes) <= 1
    rows = slice(None) if layer is None else slice(1, 2)
    T = {s: t[rows] for s, t in truth.T.items() if t[rows].any()}
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
    with pytest.raises(ValueError, match="no formula 'x'; there are: balancedness"):
        timeline(open_run(local.root), "x")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("timeline.txt", "timeline --bins 10"),
        ("timeline.json", "timeline --bins 10"),
    ],
)
def test_output_is_golden(local: Truth, name: str, command: str) -> None:
    form = ["--output", "json"] if name.endswith("json") else []
    result = cli(*command.split(), *form, local.root)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert_golden(name, result.stdout)


def test_plot_has_one_column_per_bin(local: Truth) -> None:
    out = cli("timeline", "--bins", "30", local.root).stdout.splitlines()
    axis = next(line for line in out if "└" in line).split("└")[1]
    assert [i // 2 for i, c in enumerate(axis) if c == "▲"] == [10, 14]
    assert [i // 2 for i, c in enumerate(axis) if c == "╌"][::2] == [6, 7]
    wide = cli("timeline", "--bins", "500", local.root)
    assert "500 bins do not fit" in wide.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["timeline", "--layer", "4"], ["no MoE layer 4", "3 to 5"]),
        (["timeline", "--steps", "50:60"], ["no step of the run is in 50:60"]),
        (["timeline", "--model", "zz"], ["no model 'zz'"]),
    ],
)
def test_something_not_in_the_dump_is_a_usage_error(
    local: Truth, arguments: list[str], words: list[str]
) -> None:
    one_error(cli(*arguments, local.root), 2, *words)


def test_range_without_complete_step_is_unusable(local: Truth) -> None:
    one_error(cli("timeline", "--steps", "6:8", local.root), 3, "no step of this range is complete")


@pytest.mark.parametrize(
    "arguments",
    [
        ["timeline", "--formula", "x"],
        ["timeline", "--bins", "0"],
    ],
)
def test_invalid_option_is_a_usage_error(local: Truth, arguments: list[str]) -> None:
    result = cli(*arguments, local.root)
    assert (result.returncode, result.stdout) == (2, "")
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def test_damaged_segment_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    victim = sorted(tmp_path.glob("run=*/model=*/rank=00001/session=*/loads-*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    result = cli("timeline", "-o", "json", tmp_path)
    one_error(result, 3, victim.name)
    steps = json.loads(result.stdout)["steps"]
    # Of 30 steps one is dummy and one incomplete, both in the first segment of eight.
    assert (steps["recorded"], steps["incomplete"]) == (20, 9)
