"""Runs of which some steps were thinned: every figure is that of the steps that are kept.

The truth is the same recording before it was thinned, restricted to these steps.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clocks import steady_clock
from helpers import cli, one_error, open_writer, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from thinning import info_of, session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.findings import summary_findings
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.errors import NotInDumpError
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.tiers import Ranges
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.minutes import MINUTE_NS
from eplb_dump.format.retention import next_thinning, read_manifest, thin
from eplb_dump.format.schema import Tier

STEPS, PER_SEGMENT, RANKS = 320, 16, 2
#: What depends on the whole run, or on how it was thinned.
OF_THE_RUN = {"incidents", "unexamined_departures", "restless_layers", "verdict", "retired"}
#: What needs experts' loads.
OF_EXPERTS = {"hot_experts", "hot_experts_steps", "cost", "lost_rank_seconds", "cost_steps"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, twenty segments each; the placement changes three times.

    No expert is on both ranks: one that always was would count as shared, and what was retired would matter.
    """
    root = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(5)
    placements = [np.array([[0, 1, 0, 2, 3, 2], [0, 2, 2, 1, 3, 3]]), np.array([[0, 1, 1, 2, 3, 3]] * 2)]
    for rank in range(RANKS):
        with (
            steady_clock(1000),
            open_writer(root, num_logical_experts=4, ep_rank=rank, segment_steps=PER_SEGMENT) as writer,
        ):
            for step in range(STEPS):
                load = rng.multinomial(600, [0.4, 0.1, 0.2, 0.1, 0.1, 0.1], size=2)
                place = placements[sum(step >= change for change in (20, 130, 250)) % 2]
                writer.record(
                    step, load, place, num_tokens=600, phase="prefill" if step % 5 == 4 else "decode"
                )
                assert step % 100 < 99 or writer.flush(60)
    return root


def kept(run: Run, *, with_loads: bool) -> list[StepRange]:
    """The runs of consecutive steps that are kept."""
    chosen = run.with_loads() if with_loads else run
    left_out = Ranges(one.steps for one in chosen.left_out())
    return [*left_out.outside(0, STEPS)]


def figures(document: dict[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in {*OF_THE_RUN, *without}}


def assert_same_figures(thinned: Run, whole: Run) -> None:
    for steps in kept(thinned, with_loads=False):
        full = thinned.tiers.without_loads
        by_rank = any(full.within(*steps))
        one, other = (summarize(run, steps).to_json() for run in (thinned, whole))
        without = OF_EXPERTS if by_rank else ()
        assert figures(one, *without) == figures(other, *without)
        for report in (rank_report, lambda run, steps: timeline(run, bins=7, steps=steps)):
            assert report(thinned, steps).to_json() == report(whole, steps).to_json()
    for steps in kept(thinned, with_loads=True):
        assert expert_report(thinned, steps=steps, window=5).to_json() == (
            expert_report(whole, steps=steps, window=5).to_json()
        )
        assert (
            layer_report(thinned, 1, steps=steps).to_json() == layer_report(whole, 1, steps=steps).to_json()
        )
        loads = thinned.loads(steps)
        assert loads.equals(whole.loads(steps))
    values = thinned.balancedness()
    steps = np.concatenate([np.empty(0, np.int64), *(np.arange(*r) for r in kept(thinned, with_loads=False))])
    assert values["step"].to_list() == steps.tolist()
    assert values.equals(whole.balancedness().filter(whole.balancedness()["step"].is_in(steps.tolist())))
    checked = check_run(thinned)
    inside = steps[-1] - steps[0] + 1 if len(steps) else 0
    assert (checked.steps.seen, checked.steps.missing) == (len(steps), 0)
    assert checked.steps.retired == inside - len(steps)
    assert [f for f in summary_findings(thinned, checked.steps) if f.severity != "info"] == []
    codes = {finding.code for finding in checked.findings} - {"replica_on_same_rank"}
    in_full = sum(last - first for first, last in kept(thinned, with_loads=True))
    assert codes == ({"retired_steps"} if in_full < STEPS else set())


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(budgets=st.lists(st.lists(st.floats(0.2, 1.0), max_size=3), min_size=RANKS, max_size=RANKS))
@example(budgets=[[], [0.99]])  # only tokens per rank of some steps
def test_thinned_run_has_the_figures_of_the_steps_that_are_kept(
    budgets: list[list[float]], whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``budgets``: one after another, of each rank, as shares of its bytes."""
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("thinned") / "dump"))
    for folder, of_rank in zip(session_folders(root), budgets, strict=True):
        info = info_of(folder)
        size = sum(entry.size for entry in read_manifest(folder, info).entries.values())
        for share in sorted(of_rank, reverse=True):
            for _ in range(200):
                entries = read_manifest(folder, info).entries.values()
                todo = next_thinning(entries, budget=int(share * size))
                if todo is None:
                    break
                thin(folder, info, todo)
    try:
        assert_same_figures(open_run(root), open_run(whole))
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def tiered(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four tiers; rank 1 has thinned one segment more of each."""
    root = Path(shutil.copytree(whole, tmp_path_factory.mktemp("tiered") / "dump"))
    for rank, folder in enumerate(session_folders(root)):
        gone, minutes, ranks = 4 + rank, 8 + rank, 14 + rank
        thin_to(
            folder,
            {Tier.RANKS: range(minutes, ranks), Tier.MINUTES: range(gone, minutes), Tier.GONE: range(gone)},
            merged=True,
        )
    return root


def test_step_counts_by_the_least_that_a_rank_has_of_it(tiered: Path, whole: Path) -> None:
    run = open_run(tiered)
    assert [(one.steps, one.tier, one.reasons) for one in run.tiers.ranges] == [
        ((0, 80), Tier.GONE, ("budget",)),
        ((80, 144), Tier.MINUTES, ("budget",)),
        ((144, 240), Tier.RANKS, ("budget",)),
    ]
    clock = open_run(whole).clock
    for one in run.tiers.ranges:
        assert one.times is not None
        for found, step in zip(one.times, (one.steps.first, one.steps.end - 1), strict=True):
            expected = clock.unix_ns(step)
            assert expected is not None
            assert abs(found - expected) <= 10**9
    assert run.step_range == (144, STEPS - 1)
    assert run.with_loads().step_range == (240, STEPS - 1)
    assert_same_figures(run, open_run(whole))


@pytest.mark.parametrize(
    ("first", "last", "exact"),
    [(0, 79, True), (80, 143, True), (98, 129, True), (98, 119, False), (90, 97, False), (10, 79, False)],
)
def test_times_are_those_of_the_steps_or_said_to_be_about(
    tiered: Path, whole: Path, first: int, last: int, *, exact: bool
) -> None:
    """Those of segments' and minutes' first and last steps are kept, also before a rearrangement (130)."""
    steps = pa.concat_tables([pq.ParquetFile(file).read() for file in whole.rglob("steps-*.parquet")])
    table = steps.group_by("step").aggregate([("time", "min")]).sort_by("step")
    times = table["time_min"].cast(pa.int64()).to_pylist()
    run = open_run(tiered)
    (found,) = map(run.clock.timed, run.left_out((first, last + 1)))
    assert found.times is not None
    assert found.estimated is not exact
    most = 0 if exact else MINUTE_NS
    assert all(abs(a - b) <= most for a, b in zip(found.times, (times[first], times[last]), strict=True))
    (note,) = run.retired_notes((first, last + 1))
    assert f"steps {first}-{last} ({'' if exact else 'about '}22:1" in note


def test_writer_of_sums_retires_no_step_that_another_has(tmp_path: Path) -> None:
    write(tmp_path, steps=64, ranks=2, scope="global", step_ms=1000)
    first, second = session_folders(tmp_path)
    thin_to(first, {Tier.GONE: [0, 1]})
    assert open_run(tmp_path).tiers.ranges == []
    thin_to(second, {Tier.MINUTES: [1]})
    assert [(one.steps, one.tier) for one in open_run(tmp_path).tiers.ranges] == [((16, 32), Tier.MINUTES)]


def test_clock_selects_no_step_that_was_retired(tiered: Path, whole: Path) -> None:
    run = open_run(tiered)
    clock, truth = run.clock, open_run(whole).clock
    for step in (1, 40, 79, 100, 127):
        at = truth.unix_ns(step)
        assert at is not None
        # The time is that of a step that is not kept either, by which commands can say so.
        found = clock.at(at - 10**8)
        assert run.tiers.retired.contains(np.array([found]))[0]
        assert found == step or clock.iso(step) is None
        with pytest.raises(NotInDumpError, match="retired: step"):
            run.require((found, found + 1))
    for step in (145, 200, 319):
        at = truth.unix_ns(step)
        assert at is not None
        assert clock.at(at - 10**8) == truth.at(at - 10**8) == step
    since, until = truth.unix_ns(100), truth.unix_ns(150)
    assert clock.between(since, until).end == truth.between(since, until).end


@pytest.mark.parametrize(
    "selection",
    ["--steps 0-79", "--steps 16-31", "--step 3", "--at 22:13:30", "--since 22:13:30 --until 22:14:00"],
)
@pytest.mark.parametrize("command", ["experts", "ranks", "layer 1", "timeline", "traffic", "replay"])
def test_selecting_retired_steps_says_what_is_left(tiered: Path, command: str, selection: str) -> None:
    one_error(
        cli(*command.split(), *selection.split(), tiered), 2, "retired: step", "nothing is kept (budget)"
    )


def test_selecting_steps_without_loads_names_the_commands_that_work(
    tiered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("traffic", "replay", "export loads --as csv -o x.csv"):
        result = cli(*command.split(), "--steps", "150-200", tiered)
        kept = (
            "only tokens per EP rank are kept (budget); `ranks`, `layer`, `timeline` and `summary` show them"
        )
        one_error(result, 2, f"{kept}, or select steps 240-319")
        assert cli(*command.split(), "--steps", "240-319", tiered).returncode == 0
    for command in ("ranks", "layer 1", "timeline", "summary", "experts"):
        result = cli(*command.split(), "--steps", "150-200", tiered)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
    result = cli("ranks", "--steps", "100-120", tiered)
    one_error(
        result,
        2,
        "only sums per minute are kept (budget); `summary`, `layer`, `experts` and `timeline` show them",
    )
    for command in ("summary", "layer 1", "experts", "timeline"):
        assert cli(*command.split(), "--steps", "100-120", tiered).returncode == 0


def test_ranges_are_cut_at_both_ends() -> None:
    ranges = Ranges([StepRange(2, 5), StepRange(7, 9)])
    inside = [step for step in range(12) if any(first <= step < end for first, end in [(2, 5), (7, 9)])]
    assert np.flatnonzero(ranges.contains(np.arange(12))).tolist() == inside
    for first, end in itertools.combinations(range(12), 2):
        chosen = [step for step in inside if first <= step < end]
        assert [s for part in ranges.within(first, end) for s in range(*part)] == chosen
        others = [s for part in ranges.outside(first, end) for s in range(*part)]
        assert others == [step for step in range(first, end) if step not in inside]
