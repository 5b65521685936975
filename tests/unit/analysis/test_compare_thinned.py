"""`compare` of runs of which not everything is kept: all figures of a side are of the same steps.

The truth is computed from the Parquet files of the recording before it was thinned, without our reader.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clocks import steady_clock
from helpers import cli, open_writer
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.compare import Comparison, compare_runs
from eplb_dump.format.schema import Tier

RANKS, SLOTS, LOGICAL, LAYERS = 4, 8, 6, 2
STEPS, SEGMENT = 768, 64
#: Steps that a placement changed at: one in each tier, and one at which a tier begins.
CHANGES = 70, 200, 320, 400, 600
GONE, MINUTES, BY_RANK = range(2), range(2, 5), range(5, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps get slower and less even all the time."""
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(1)
    with (
        steady_clock(400),
        open_writer(
            root, ep_size=RANKS, num_logical_experts=LOGICAL, segment_steps=SEGMENT, scope="global"
        ) as writer,
    ):
        for step in range(STEPS):
            load = rng.poisson(200, (LAYERS, SLOTS))
            load[:, 3] += step // 2
            generation = np.searchsorted(CHANGES, step, side="right")
            placement = np.tile((np.arange(SLOTS) + generation) % LOGICAL, (LAYERS, 1))
            writer.record(step, load, placement, step_ms=20.0 + step / 50 + rng.normal(0, 0.1))
            assert step % 100 or writer.flush(60)
    return root


@pytest.fixture
def thinned(whole: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(whole, tmp_path / "thinned"))
    tiers = {Tier.GONE: GONE, Tier.MINUTES: MINUTES, Tier.RANKS: BY_RANK}
    thin_to(session_folders(root)[0], tiers)
    return root


def table(root: Path, name: str) -> pa.Table:
    files = sorted(root.rglob(f"{name}-*.parquet"))
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


def truth(root: Path, first: int, end: int) -> tuple[float, float, float]:
    """Mean step time, balancedness and idle fraction of steps."""
    steps, loads = table(root, "steps"), table(root, "loads")
    number = steps["step"].to_numpy()
    # The fit of a side knows pauses: the steps beside a rearrangement.
    beside = np.isin(number, [change + off for change in CHANGES for off in (-1, 0)])
    chosen = (number >= first) & (number < end) & ~beside
    ms = steps["step_ms"].to_numpy()[chosen].astype(np.float64).mean()
    at = loads["step"].to_numpy()
    ranks = np.array(loads["rank_load"].combine_chunks().flatten()).reshape(-1, RANKS)[
        (at >= first) & (at < end)
    ]
    highest = ranks.max(axis=1)
    return (
        float(ms),
        float((ranks.mean(axis=1) / highest).mean()),
        float(1 - ranks.mean(axis=1).sum() / highest.sum()),
    )


def figures(result: Comparison, side: str) -> tuple[Any, ...]:
    (times,) = result.step_times
    assert result.balancedness is not None
    assert result.idle_fraction is not None
    return tuple(getattr(own, side) for own in (times.step_ms, result.balancedness, result.idle_fraction))


@pytest.mark.parametrize("swapped", [False, True])
def test_step_times_are_of_the_steps_that_tokens_are_of(thinned: Path, whole: Path, *, swapped: bool) -> None:
    runs = [open_run(thinned), open_run(whole)]
    result = compare_runs(*(runs[::-1] if swapped else runs))
    kept = BY_RANK.start * SEGMENT
    a, b = figures(result, "ba"[not swapped]), figures(result, "ab"[not swapped])
    assert a == pytest.approx(truth(whole, kept, STEPS), rel=2e-3)
    assert b == pytest.approx(truth(whole, 0, STEPS), rel=2e-3)
    assert result.unexplained == f"experts' loads are no longer kept of all steps of {'AB'[swapped]}"


def test_ranges_of_different_tiers_are_compared_by_what_both_have(thinned: Path, whole: Path) -> None:
    first, middle = (BY_RANK.start * SEGMENT, BY_RANK.stop * SEGMENT)
    steps = (first, middle), (middle, STEPS)
    result = compare_runs(open_run(thinned), open_run(thinned), steps_a=steps[0], steps_b=steps[1])
    for side, own in zip("ab", steps, strict=True):
        assert figures(result, side) == pytest.approx(truth(whole, *own), rel=2e-3)
    text = cli("compare", "--steps-a", f"{first}-{middle - 1}", "--steps-b", f"{middle}-", thinned)
    assert text.returncode == 0
    assert "experts' loads are no longer kept of all steps of A" in " ".join(text.stdout.split())


def test_rearrangements_are_those_between_steps_that_are_compared(thinned: Path, whole: Path) -> None:
    result = compare_runs(open_run(whole), open_run(thinned))
    # The change at 320 is the first step that is kept: the step before it is not compared.
    assert (result.a.rearrangements, result.b.rearrangements) == (len(CHANGES), 2)
    document = json.loads(cli("compare", "--steps-a", "-399", "--steps-b", "400-", "--json", thinned).stdout)
    assert [document[side]["rearrangements"] for side in "ab"] == [0, 1]


def test_step_times_of_different_kinds_are_not_compared(whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    with steady_clock(20), open_writer(tmp_path, ep_size=RANKS, run_id="b", scope="global") as writer:
        for step in range(300):
            writer.record(
                step, rng.poisson(200, (LAYERS, SLOTS)), np.tile(np.arange(SLOTS) % LOGICAL, (2, 1))
            )
            assert step % 100 or writer.flush(60)
    result = compare_runs(open_run(whole), open_run(tmp_path))
    assert result.comparable
    assert result.step_times == []
    assert result.unexplained == "they are not alike: the engine's step times in A, times between steps in B"
