"""Figures from sums per minute, next to those from the steps that were added up, and to plain loops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clocks import START_NS, steady_clock
from helpers import cli, one_error, open_writer
from thinning import info_of, session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis import summary_minutes
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.summary_report import Summary
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.analysis.timeline_report import Timeline
from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.reader import rolled_up
from eplb_analyze.reader.join import StepState
from eplb_analyze.report.document import report_document
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_dump.format.manifest import ManifestFile, SealedFile
from eplb_dump.format.minutes import MINUTE_NS
from eplb_dump.format.schema import MINUTES_SCHEMA, Tier
from eplb_dump.format.segment import footer_crc32

LAYERS, RANKS, PER_RANK, SLOTS, LOGICAL = 3, 4, 2, 8, 6
STEPS, STEP_MS, SEGMENT = 900, 400, 64
SKEWED = range(400, 480)
Array = Any


def time_of(step: Array) -> Array:
    """When steps were recorded, ns: the writer itself takes the clock's first time."""
    return START_NS + (step + 2) * STEP_MS * 10**6


def minute_of(step: Array) -> Array:
    return time_of(step) // MINUTE_NS


def loads() -> Array:
    """Tokens of each step, layer and slot; layer 1's rank 2 is slow for a while, and some steps idle."""
    rng = np.random.default_rng(3)
    found = rng.poisson(rng.lognormal(3, 0.6, (LAYERS, SLOTS)), (STEPS, LAYERS, SLOTS))
    found[SKEWED.start : SKEWED.stop, 1, 4:6] += 3000
    found[50:53] = 0
    found[100, 2] = 0
    return found


def placement(step: int) -> Array:
    row = np.arange(SLOTS) % LOGICAL
    return np.tile(row if step < 310 else row[::-1], (LAYERS, 1))


def record(
    root: Path,
    tokens: Array,
    *,
    began_ns: int = START_NS,
    idle: range = range(0),
    named: bool = True,
    **options: Any,
) -> None:
    """``named``: whether steps have a phase."""
    with (
        steady_clock(STEP_MS, began_ns),
        open_writer(
            root, **{"ep_size": RANKS, "num_logical_experts": LOGICAL, "segment_steps": SEGMENT, **options}
        ) as writer,
    ):
        for step, load in enumerate(tokens):
            phase = None if not named else "prefill" if step % 7 == 0 else "decode"
            if step in idle:
                writer.skip("dummy", step)
                continue
            writer.record(step, load, placement(step), num_tokens=100, phase=phase)
            if step % 100 == 0:
                assert writer.flush(60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One writer of sums over ranks; every step is kept."""
    root = tmp_path_factory.mktemp("global")
    record(root, loads(), scope="global")
    return root


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank writes its own part of the tokens."""
    root = tmp_path_factory.mktemp("local")
    rng = np.random.default_rng(4)
    parts = rng.multinomial(loads(), [1 / RANKS] * RANKS)
    for rank in range(RANKS):
        record(root, parts[..., rank], scope="local", ep_rank=rank)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "dump"))


def summary_of(path: Path, steps: tuple[int, int] | None = None, **options: Any) -> Summary:
    return summarize(open_run(path), steps, **options)


def assert_same_means(minutes: Summary, steps: Summary) -> None:
    """Everything that sums per minute keep in full."""
    for name, exact in steps.spreads.items():
        found = minutes.spreads[name]
        assert found.mean == pytest.approx(exact.mean, rel=1e-12), name
        if name in ("balancedness", "imbalance", "trtllm"):
            for what in ("min", "max"):
                assert getattr(found, what) == pytest.approx(getattr(exact, what), rel=1e-12)
                assert getattr(found, f"{what}_step") == getattr(exact, f"{what}_step")
            assert found.percentile_error is not None
            for what in ("p5", "p50", "p95"):
                assert abs(getattr(found, what) - getattr(exact, what)) <= found.percentile_error + 1e-12
    assert minutes.idle_fraction == pytest.approx(steps.idle_fraction, rel=1e-12)
    for found, exact in zip(minutes.layers, steps.layers, strict=True):
        assert (found.layer, found.worst_rank) == (exact.layer, exact.worst_rank)
        assert found.balancedness == pytest.approx(exact.balancedness, rel=1e-12)
        assert found.imbalance == pytest.approx(exact.imbalance, rel=1e-12)
        assert found.worst_rank_share == pytest.approx(exact.worst_rank_share, rel=1e-12)
    for found, exact in zip(minutes.phases, steps.phases, strict=True):
        assert (found.phase, found.steps) == (exact.phase, exact.steps)
        assert found.balancedness == pytest.approx(exact.balancedness, rel=1e-12)
        assert found.idle_fraction == pytest.approx(exact.idle_fraction, rel=1e-12)
    for found, exact in zip(minutes.configurations, steps.configurations, strict=True):
        assert (found.first_step, found.last_step, found.recorded) == (
            exact.first_step,
            exact.last_step,
            exact.recorded,
        )
        assert found.balancedness == pytest.approx(exact.balancedness, rel=1e-12)
    assert minutes.loss is not None
    assert steps.loss is not None
    assert minutes.loss.tokens == pytest.approx(steps.loss.tokens, rel=1e-12)
    assert minutes.steps.to_json() == steps.steps.to_json()
    assert minutes.rearrangements == steps.rearrangements


def test_figures_are_those_of_the_steps(whole: Path) -> None:
    exact, found = summary_of(whole), summary_of(whole, tier="minutes")
    assert (exact.tier, found.tier) == ("steps", "minutes")
    assert_same_means(found, exact)
    assert found.rollup is not None
    assert found.rollup.steps_since is found.rollup.minutes_since is found.rollup.gone_until is None
    ms = found.rollup.step_ms
    assert ms is not None
    assert ms.mean == pytest.approx(STEP_MS)
    assert ms.p50 is not None
    assert ms.percentile_error is not None
    assert abs(ms.p50 - STEP_MS) <= ms.percentile_error
    assert (found.cost.ms_per_step, found.incidents, found.pauses) == (None, [], [None])
    assert exact.incidents


@pytest.mark.parametrize("merged", [False, True])
def test_run_of_which_no_step_is_kept_has_the_same_figures(root: Path, *, merged: bool) -> None:
    exact = summary_of(root)
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))}, merged=merged)
    found = summary_of(root)
    assert_same_means(found, exact)
    assert found.rollup is not None
    assert found.searched == []
    assert found.verdict == exact.verdict
    # An expert is named by those of its slots that a minute names: at least so many tokens.
    shares = {(e.layer, e.logical): e.share for e in exact.hot_experts}
    assert found.hot_experts
    for expert in found.hot_experts:
        true = shares.get((expert.layer, expert.logical))
        assert true is None or expert.share <= true * (1 + 1e-9)


def test_one_retired_segment_makes_every_figure_of_its_range_come_from_minutes(root: Path) -> None:
    exact = summary_of(root)
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: [0, 1]})
    found = summary_of(root)
    assert_same_means(found, exact)
    assert found.rollup is not None
    assert found.rollup.steps_since == time_of(2 * SEGMENT - 1)
    # Incidents are looked for where steps are kept.
    assert found.searched == [(2 * SEGMENT, STEPS)]
    assert [(i.first_step, i.cause.kind) for i in found.incidents] == [
        (i.first_step, i.cause.kind) for i in exact.incidents
    ]
    later = summary_of(root, (2 * SEGMENT, STEPS))
    assert later.tier == "steps"
    with pytest.raises(NotInDumpError, match=f"steps 0-{2 * SEGMENT - 1} are no longer kept as steps"):
        summary_of(root, tier="steps")


def test_incidents_are_looked_for_in_the_newest_steps_that_are_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: [0], Tier.RANKS: [1, 2]})
    found = summary_of(root)
    assert found.rollup is not None
    assert found.searched == [(SEGMENT, STEPS)]
    (incident,) = found.incidents
    assert abs(incident.first_step - SKEWED.start) <= 2
    monkeypatch.setattr(summary_minutes, "SEARCHED_STEPS", STEPS - 340)
    bounded = summary_of(root)
    assert bounded.rollup is not None
    assert bounded.searched == [(340, STEPS)]
    assert [(i.first_step, i.layers) for i in bounded.incidents] == [(incident.first_step, incident.layers)]
    asked = summary_of(root, tier="minutes")
    assert asked.rollup is not None
    assert (asked.searched, asked.incidents) == ([], [])


def test_range_of_steps_selects_whole_minutes(root: Path) -> None:
    minute = minute_of(np.arange(STEPS))
    chosen = np.flatnonzero((minute > minute[0]) & (minute <= minute[0] + 2))
    exact = summary_of(root, (int(chosen[0]), int(chosen[-1]) + 1))
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))})
    # The last one ends at the first step of a minute, which is in progress at the end of the minute before.
    for steps in ((chosen[0], chosen[-1] + 1), (chosen[3], chosen[-5]), (chosen[0], chosen[-1] + 2)):
        found = summary_of(root, (int(steps[0]), int(steps[1])))
        assert_same_means(found, exact)
        assert found.rollup is not None
        assert found.rollup.selected
        assert found.rollup.first_minute == (minute[0] + 1) * MINUTE_NS
        assert found.rollup.minutes == 2


def test_what_is_gone_is_neither_missing_nor_in_a_figure(root: Path) -> None:
    exact = summary_of(root, (2 * SEGMENT, STEPS))
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.GONE: [0, 1], Tier.MINUTES: [2, 3]})
    found = summary_of(root)
    assert found.spreads["balancedness"].mean == pytest.approx(exact.spreads["balancedness"].mean, rel=1e-12)
    assert found.steps.missing == 0
    assert found.rollup is not None
    assert found.rollup.gone_until == time_of(2 * SEGMENT - 1)
    with pytest.raises(NotInDumpError, match=r"retired: steps 0-\d+ .*nothing is kept"):
        summary_of(root, (0, 100))
    thin_to(folder, {Tier.GONE: range(2, -(-STEPS // SEGMENT))})
    with pytest.raises(NotInDumpError, match="nothing is kept"):
        summary_of(root)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_steps_that_no_rank_saw_are_counted_as_from_steps(tmp_path: Path, scope: str) -> None:
    """Numbers are skipped within a minute and between two; a rejected load is of a step with a number."""
    step = np.arange(STEPS)
    step[130:] += 7
    step[300:] += 150  # a minute's end is among them
    step[700:] += 2
    tokens = loads()
    parts = [tokens] if scope == "global" else [np.ceil(tokens / RANKS).astype(np.int64)] * RANKS
    for rank, part in enumerate(parts):
        with (
            steady_clock(STEP_MS, START_NS + rank * 10**6),
            open_writer(
                tmp_path,
                scope=scope,
                ep_rank=rank,
                ep_size=RANKS,
                num_logical_experts=LOGICAL,
                segment_steps=SEGMENT,
            ) as writer,
        ):
            for i, load in enumerate(part):
                wrong = i % 90 == 45
                writer.record(int(step[i]), load[:, :-1] if wrong else load, placement(0), num_tokens=100)
                if i % 100 == 0:
                    assert writer.flush(60)
    exact, found = summary_of(tmp_path), summary_of(tmp_path, tier="minutes")
    assert exact.steps.count(StepState.REJECTED) == STEPS // 90
    assert exact.steps.missing == 7 + 150 + 2
    assert found.steps.to_json() == exact.steps.to_json()
    assert timeline(open_run(tmp_path), tier="minutes").steps.missing == exact.steps.missing
    assert "no missing steps" not in cli("summary", tmp_path, "--tier", "minutes").stdout
    # What a rank no longer keeps is retired for all, and not missing.
    thin_to(session_folders(tmp_path)[0], {Tier.GONE: [0, 1], Tier.MINUTES: [2, 3]})
    rest = summary_of(tmp_path)
    left = 7 + 150 + 2
    assert rest.steps.missing == left
    assert rest.steps.seen + left == step[-1] + 1 - (rest.steps.first or 0)


def test_phase_has_its_own_figures(root: Path) -> None:
    run = open_run(root)
    exact = summarize(run.of_phase("prefill"))
    found = summarize(run.of_phase("prefill"), tier="minutes")
    assert found.spreads["balancedness"].mean == pytest.approx(exact.spreads["balancedness"].mean, rel=1e-12)
    assert found.steps.count(StepState.RECORDED) == exact.steps.count(StepState.RECORDED)
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))})
    retired = open_run(root)
    found = summarize(retired.of_phase("prefill"))
    assert found.spreads["balancedness"].mean == pytest.approx(exact.spreads["balancedness"].mean, rel=1e-12)
    with pytest.raises(NotInDumpError, match="its phases are decode, prefill"):
        retired.of_phase("idle")


def test_configurations_are_not_added_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    with (
        steady_clock(STEP_MS),
        open_writer(
            tmp_path, ep_size=RANKS, num_logical_experts=LOGICAL, segment_steps=SEGMENT, scope="global"
        ) as writer,
    ):
        for step in range(500):
            slots = SLOTS if not 200 <= step < 330 else SLOTS + RANKS
            if step % 10 == 3:
                writer.skip(reason="dummy")
                continue
            load = rng.poisson(20 + np.arange(slots), (LAYERS, slots))
            writer.record(None, load, np.tile(np.arange(slots) % LOGICAL, (LAYERS, 1)))
            assert step % 100 or writer.flush(60)
    exact, found = summary_of(tmp_path), summary_of(tmp_path, tier="minutes")
    assert_same_means(found, exact)
    assert len(found.configurations) == 3
    assert found.steps.count(StepState.DUMMY) == 50
    assert found.last_configuration_steps == exact.last_configuration_steps
    changed = timeline(open_run(tmp_path), tier="minutes").configurations
    assert changed == timeline(open_run(tmp_path)).configurations


def test_newer_session_of_the_same_steps_counts(tmp_path: Path) -> None:
    tokens = loads()[:SEGMENT]
    for began, factor in enumerate((2, 1)):
        began_ns = START_NS + began * 10 * MINUTE_NS
        record(tmp_path, tokens * factor, scope="global", start_id="one", began_ns=began_ns)
    found, exact = summary_of(tmp_path, tier="minutes"), summary_of(tmp_path)
    assert found.steps.seen == exact.steps.seen == SEGMENT
    assert found.loss is not None
    assert exact.loss is not None
    assert found.loss.tokens == pytest.approx(exact.loss.tokens, rel=1e-12)


def test_steps_that_another_writer_of_sums_still_has_are_not_gone(tmp_path: Path) -> None:
    for rank in range(2):
        record(tmp_path, loads(), scope="global", ep_rank=rank)
    exact = summary_of(tmp_path)
    first, second = session_folders(tmp_path)
    thin_to(first, {Tier.GONE: [0, 1, 2, 3]})
    found = summary_of(tmp_path, tier="minutes")
    assert found.steps.to_json() == exact.steps.to_json()
    assert found.spreads["balancedness"].mean == pytest.approx(exact.spreads["balancedness"].mean, rel=1e-12)
    thin_to(second, {Tier.GONE: [0, 1]})
    rest = summary_of(tmp_path)
    assert (rest.steps.first, rest.steps.missing, rest.steps.retired) == (2 * SEGMENT, 0, 2 * SEGMENT)


def test_sessions_that_share_a_part_of_a_minute_are_refused(tmp_path: Path) -> None:
    for began, steps in enumerate((SEGMENT, SEGMENT - 20)):
        began_ns = START_NS + began * 10 * MINUTE_NS
        record(tmp_path, loads()[:steps], scope="global", start_id="one", began_ns=began_ns)
    with pytest.raises(DumpError, match="do not show which of them count"):
        summary_of(tmp_path, tier="minutes")


def test_damaged_sums_are_left_out_and_reported(root: Path) -> None:
    (folder,) = session_folders(root)
    entries = thin_to(folder, {Tier.MINUTES: range(4)})
    path = folder / entries[1].files["minutes"].name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    run = open_run(root)
    found = summarize(run)
    assert found.steps.seen == STEPS - SEGMENT
    assert [f.code for f in run.findings if path.name in f.text] == ["damaged_file"]


# ---- scope local


def summed_truth(rows: Array) -> tuple[float, float]:
    """Balancedness of loads summed per minute and placement, weighted by steps; and the idle fraction."""
    tokens = loads()[rows].reshape(-1, LAYERS, RANKS, PER_RANK).sum(axis=3)
    minute = minute_of(rows)
    key = minute * 2 + (rows >= 310)
    ratio = weight = mean_sum = max_sum = 0.0
    for group in np.unique(key):
        load = tokens[key == group].sum(axis=0)
        for of_layer in load:
            steps = int((key == group).sum())
            ratio += steps * of_layer.mean() / of_layer.max()
            weight += steps
            mean_sum += of_layer.mean()
            max_sum += of_layer.max()
    return ratio / weight, 1 - mean_sum / max_sum


def test_sums_of_single_ranks_show_persistent_imbalance_only(local: Path) -> None:
    exact, found = summary_of(local), summary_of(local, tier="minutes")
    summed = found.rollup.summed if found.rollup else None
    assert summed is not None
    balance, idle = summed_truth(np.arange(STEPS))
    assert summed.balancedness == pytest.approx(balance, rel=1e-12)
    assert summed.idle_at_least == pytest.approx(idle, rel=1e-12)
    assert exact.idle_fraction is not None
    assert idle < exact.idle_fraction
    assert all(spread.mean is None for spread in found.spreads.values())
    assert (found.idle_fraction, found.loss, found.layers, found.timeline) == (None, None, [], [])
    assert found.steps.to_json() == exact.steps.to_json()
    assert found.verdict.verdict == "imbalanced" if balance < 0.8 else "not_known"


def test_layer_of_single_ranks_sums_is_labeled(local: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(local, tmp_path / "dump"))
    for folder in session_folders(root):
        thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))})
    report = layer_report(open_run(root), 1)
    assert (report.balancedness, report.imbalance, report.idle_fraction) == (None, None, None)
    tokens = loads()[:, 1].reshape(STEPS, RANKS, PER_RANK).sum(axis=2)
    assert [rank.load for rank in report.ranks] == tokens.sum(axis=0).tolist()
    key = minute_of(np.arange(STEPS)) * 2 + (np.arange(STEPS) >= 310)
    summed = [tokens[key == group].sum(axis=0) for group in np.unique(key)]
    weights = [int((key == group).sum()) for group in np.unique(key)]
    expected = np.average([load.mean() / load.max() for load in summed], weights=weights)
    assert report.minutes is not None
    assert report.minutes.summed_balancedness == pytest.approx(expected, rel=1e-12)
    assert "balancedness of loads summed per minute" in cli("layer", "1", root).stdout
    one_error(cli("layer", "1", "--phase", "decode", root), 2, "remove --phase")


def test_thresholds_do_not_judge_what_single_ranks_sums_do_not_show(local: Path, tmp_path: Path) -> None:
    thinned = Path(shutil.copytree(local, tmp_path / "thinned"))
    for folder in session_folders(thinned):
        thin_to(folder, {Tier.MINUTES: range(3)})
    unknown = "sums per minute of single ranks do not show the balancedness of steps"
    for options in (["--fail-below", "0.1"], ["--baseline", str(local)]):
        result = cli("postmortem", local, thinned, *options)
        assert result.returncode == 1
        said = " ".join(result.stdout.split())
        assert "1 cannot be judged: " in said
        assert f"thinned ({unknown})" in said
    one_error(cli("postmortem", local, thinned, "--baseline", thinned), 2, f"--baseline {thinned}: {unknown}")


def test_minute_in_which_a_rank_is_missing_is_incomplete(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    parts = rng.multinomial(loads(), [1 / RANKS] * RANKS)
    minute = minute_of(np.arange(STEPS))
    stop = int(np.flatnonzero(minute == minute[0] + 2)[-1]) + 1
    for rank in range(RANKS):
        record(tmp_path, parts[: stop if rank == 3 else STEPS, ..., rank], scope="local", ep_rank=rank)
    found = summary_of(tmp_path, tier="minutes")
    assert found.steps.count(StepState.INCOMPLETE) == STEPS - stop
    assert found.steps.reasons == {(3, "absent"): STEPS - stop}
    summed = found.rollup.summed if found.rollup else None
    assert summed is not None
    assert summed.balancedness == pytest.approx(summed_truth(np.arange(stop))[0], rel=1e-12)


@pytest.mark.parametrize("at_once", [1, 20_000])
def test_ranks_add_up_whatever_is_decoded_at_once(
    local: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, and some files as a whole: a rank can be ahead of others by hours of minutes, or by one."""
    expected = summary_of(local, tier="minutes")
    monkeypatch.setattr(rolled_up, "JOINED_BYTES", at_once)
    monkeypatch.setattr(rolled_up, "JOINED_ROWS", 2)
    monkeypatch.setattr(rolled_up, "AHEAD_NS", MINUTE_NS)
    found = summary_of(local, tier="minutes")
    assert found.steps.to_json() == expected.steps.to_json()
    assert found.rollup is not None
    assert expected.rollup is not None
    assert found.rollup.minutes == expected.rollup.minutes
    assert found.rollup.summed is not None
    assert found.rollup.summed.balancedness == pytest.approx(summed_truth(np.arange(STEPS))[0], rel=1e-12)


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.RANKS, Tier.MINUTES])
@pytest.mark.parametrize("stop", [9 * SEGMENT, 9 * SEGMENT + 20])
def test_part_of_a_minute_that_every_rank_has_counts(tmp_path: Path, stop: int, tier: Tier) -> None:
    """Rank 3 ends at a step. Of segments without steps, the others' rows end where their segments do."""
    rng = np.random.default_rng(4)
    parts = rng.multinomial(loads(), [1 / RANKS] * RANKS)
    for rank in range(RANKS):
        record(tmp_path, parts[: stop if rank == 3 else STEPS, ..., rank], scope="local", ep_rank=rank)
    minute = minute_of(np.arange(STEPS))
    assert minute[stop - 1] == minute[stop]
    assert minute[9 * SEGMENT - 1] == minute[9 * SEGMENT]
    for folder in session_folders(tmp_path) if tier is not Tier.FULL else ():
        thin_to(folder, {tier: [seq for seq in (8, 9) if (folder / f"minutes-{seq:06}.parquet").exists()]})
    found = summary_of(tmp_path, tier="minutes")
    known = 9 * SEGMENT if tier is Tier.MINUTES else stop
    assert found.steps.count(StepState.RECORDED) == known
    assert found.steps.count(StepState.INCOMPLETE) == STEPS - known
    assert found.steps.incomplete_inside == 0
    summed = found.rollup.summed if found.rollup else None
    assert summed is not None
    assert summed.balancedness == pytest.approx(summed_truth(np.arange(known))[0], rel=1e-12)


def test_ranks_that_end_just_after_a_minute_begins_are_no_fault(tmp_path: Path) -> None:
    """The last segment is kept in full, and its last minute has few steps, of which a rank lacks half."""
    begins = int(np.flatnonzero(np.diff(minute_of(np.arange(STEPS))))[-1]) + 1
    assert begins % SEGMENT not in (0, SEGMENT - 1)
    parts = np.random.default_rng(4).multinomial(loads(), [1 / RANKS] * RANKS)
    for rank in range(RANKS):
        record(tmp_path, parts[: begins + (3 if rank == 3 else 6), ..., rank], scope="local", ep_rank=rank)
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.MINUTES: [0]})
    for selection in ([], ["--steps", f"{SEGMENT}-"]):
        result = cli("summary", *selection, tmp_path)
        assert result.returncode == 0, result.stderr
        assert "the last 3 steps lack ranks: rank 3 has none after" in " ".join(result.stderr.split())


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("idle", [range(290, 345), range(130, 700)])
def test_idle_ranks_have_no_tokens_while_the_placement_changes(
    tmp_path: Path, idle: range, *, named: bool
) -> None:
    """With data parallelism, ranks without requests take dummy steps, which do not show a new placement.

    If the engine names no phase, sums per minute do not separate dummy steps from those before them.
    """
    parts = np.random.default_rng(4).multinomial(loads(), [1 / RANKS] * RANKS)
    parts[idle.start : idle.stop, ..., 0] = loads()[idle.start : idle.stop]
    for rank in range(RANKS):
        own = idle if rank else range(0)
        record(tmp_path, parts[..., rank], scope="local", ep_rank=rank, idle=own, named=named)
    found = summary_of(tmp_path, tier="minutes")
    assert found.steps.to_json() == summary_of(tmp_path).steps.to_json()
    assert found.steps.count(StepState.RECORDED) == STEPS
    summed = found.rollup.summed if found.rollup else None
    assert summed is not None
    assert summed.balancedness == pytest.approx(summed_truth(np.arange(STEPS))[0], rel=1e-12)


def test_minute_of_which_a_rank_keeps_nothing_is_retired(local: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(local, tmp_path / "dump"))
    thin_to(session_folders(root)[3], {Tier.GONE: [0, 1]})
    found = summary_of(root)
    gone = 2 * SEGMENT  # in the middle of a minute, of which all ranks have the rest
    assert minute_of(gone - 1) == minute_of(gone)
    assert found.steps.count(StepState.INCOMPLETE) == 0
    assert found.steps.first == gone
    summed = found.rollup.summed if found.rollup else None
    assert summed is not None
    assert summed.balancedness == pytest.approx(summed_truth(np.arange(gone, STEPS))[0], rel=1e-12)


def test_rank_whose_clock_is_shifted_is_missing_from_its_minutes(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    parts = rng.multinomial(loads()[:300], [1 / RANKS] * RANKS)
    for rank in range(RANKS):
        began_ns = START_NS + (rank == 3) * 20 * 10**9
        # In one segment, whose rows end only where a minute does.
        record(
            tmp_path, parts[..., rank], scope="local", ep_rank=rank, began_ns=began_ns, segment_steps=STEPS
        )
    found = summary_of(tmp_path, tier="minutes")
    assert {reason for rank, reason in found.steps.reasons if rank == 3} <= {
        "absent from part of the minute",
        "absent",
        "shifted by its clock",
    }
    assert found.steps.reasons[3, "shifted by its clock"] >= 100
    assert found.steps.count(StepState.RECORDED) == 0
    assert found.verdict.verdict == "incomplete_data"


def test_duration_is_that_of_the_steps_whatever_the_clocks_of_hosts(tmp_path: Path) -> None:
    """The clock of rank 3 is 5 s ahead: the time from its last step to the first of others is no duration."""
    parts = np.random.default_rng(4).multinomial(loads()[:600], [1 / RANKS] * RANKS)
    for rank in range(RANKS):
        began = START_NS + (rank == 3) * 5 * 10**9
        record(tmp_path, parts[..., rank], scope="local", ep_rank=rank, began_ns=began)
    found, exact = (summary_of(tmp_path, tier=tier) for tier in ("minutes", "steps"))
    assert found.duration_seconds == exact.duration_seconds == pytest.approx(599 * STEP_MS / 1000)


@pytest.mark.parametrize("ahead", [[0, 0, 0, 450], [0, 450, 450, 450], [0, 0, 450, 450]])
def test_times_select_the_minutes_of_the_runs_clock(tmp_path: Path, ahead: list[int]) -> None:
    """In some ranks a minute begins a step or two earlier; that is not another minute of the range."""
    parts = np.random.default_rng(4).multinomial(loads()[:600], [1 / RANKS] * RANKS)
    for rank, ms in enumerate(ahead):
        began = START_NS + ms * 10**6
        record(tmp_path, parts[..., rank], scope="local", ep_rank=rank, began_ns=began)
    for folder in session_folders(tmp_path):
        thin_to(folder, {Tier.MINUTES: range(1, 9)})
    clock = open_run(tmp_path).clock
    begin = START_NS // MINUTE_NS * MINUTE_NS + 2 * MINUTE_NS
    for minutes in (1, 2):
        found = summary_of(tmp_path, clock.between(begin, begin + minutes * MINUTE_NS)).rollup
        assert found is not None
        assert (found.first_minute, found.minutes) == (begin, minutes)


def test_what_single_ranks_sums_lack_is_refused_by_name(local: Path) -> None:
    run = open_run(local)
    with pytest.raises(UsageError, match="remove --phase"):
        summarize(run.of_phase("decode"), tier="minutes")
    with pytest.raises(UsageError, match="do not have vllm, only balancedness"):
        timeline(run, "vllm", tier="minutes")


# ---- timeline


def by_minute(found: Timeline, exact: Timeline) -> None:
    assert found.tier == "minutes"
    assert found.mean == pytest.approx(exact.mean, rel=1e-12)
    assert found.steps.to_json() == exact.steps.to_json()


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("formula", ["balancedness", "imbalance", "trtllm", "vllm", "idle_fraction"])
def test_timeline_of_minutes_has_the_means_of_the_steps(whole: Path, formula: str, layer: int | None) -> None:
    run = open_run(whole)
    found = timeline(run, formula, layer=layer, tier="minutes")
    by_minute(found, timeline(run, formula, layer=layer))
    assert found.bin_minutes == 1
    for part in found.bins:
        exact = timeline(run, formula, 1, layer, (part.first_step, part.last_step + 1))
        assert (part.steps, part.mean) == (exact.bins[0].steps, pytest.approx(exact.mean, rel=1e-9))
        if part.min is not None:
            assert (part.min, part.max) == (pytest.approx(exact.min), pytest.approx(exact.max))
    has_extremes = layer is None and formula in ("balancedness", "imbalance", "trtllm")
    assert (found.min is not None) == has_extremes


def test_timeline_refuses_formulas_that_are_not_in_the_sums(whole: Path) -> None:
    run = open_run(whole)
    with pytest.raises(UsageError, match="do not have active-experts, only"):
        timeline(run, "active-experts", tier="minutes")
    with pytest.raises(UsageError, match="do not have sglang of one layer"):
        timeline(run, "sglang", layer=0, tier="minutes")


def test_timeline_of_single_ranks_is_not_called_balancedness(local: Path) -> None:
    found = timeline(open_run(local), tier="minutes")
    assert found.formula == "summed_balancedness"
    assert found.mean == pytest.approx(np.mean([summed_truth(np.arange(STEPS))[0]]), rel=1e-12)


# ---- what is printed


def test_output_says_what_figures_are_from(root: Path) -> None:
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.GONE: [0, 1], Tier.MINUTES: [2, 3]})
    text = " ".join(cli("summary", root).stdout.split())
    assert (
        "figures come from per-minute sums (22:14 to 22:19); steps before 22:14:11 are gone; single steps "
        "are kept from 22:15:02 on" in text
    )
    assert "data complete where kept: " in text
    assert f"; {2 * SEGMENT} steps are gone" in text
    assert "±0.00" in text
    assert "The cost of imbalance is not known: it needs single steps" in text
    assert "incidents are looked for only in steps 256-899" in text
    document = json.loads(cli("summary", root, "--json").stdout)
    assert document["tier"] == "minutes"
    assert document["rollup"]["gone_until"] == "2023-11-14T22:14:11.600Z"
    assert document["balancedness"]["percentile_error"] > 0
    plotted = cli("timeline", root).stdout
    assert "figures come from per-minute sums" in plotted
    assert "of 1 minute" in plotted
    one_error(cli("summary", root, "--tier", "steps"), 2, "use --tier minutes")


def test_times_select_retired_minutes(root: Path) -> None:
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))})
    text = " ".join(cli("summary", root, "--since", "22:15:20", "--until", "22:16").stdout.split())
    assert "(2 whole minutes, 22:15 to 22:16); single steps are not kept" in text
    plotted = " ".join(cli("timeline", root, "--steps", "300-400").stdout.split())
    assert "figures cover whole minutes: steps " in plotted
    assert ", where 300-400 were asked for" in plotted


def test_single_ranks_sums_are_labeled(local: Path) -> None:
    text = " ".join(cli("summary", local, "--tier", "minutes").stdout.split())
    assert "balancedness of loads summed per minute 0." in text
    assert "persistent imbalance: the idle fraction is at least" in text
    assert "less balanced" not in text + cli("timeline", local, "--tier", "minutes").stdout
    assert "5th percentile" not in text


def test_report_and_postmortem_show_the_same_figures(root: Path, tmp_path: Path) -> None:
    exact = summary_of(root)
    (folder,) = session_folders(root)
    thin_to(folder, {Tier.MINUTES: range(-(-STEPS // SEGMENT))})
    found = summary_of(root)
    (row,) = json.loads(cli("postmortem", root, "--json").stdout)["runs"]
    assert (row["tier"], row["incidents"], row["steps"]) == ("minutes", None, STEPS)
    assert row["balancedness"] == pytest.approx(exact.spreads["balancedness"].mean, rel=1e-12)
    assert row["balancedness_p5"] == found.spreads["balancedness"].p5
    text = cli("postmortem", root).stdout
    assert "figures of 1 run come from per-minute sums, as not all steps are kept" in text
    document = report_document(open_run(root)).document
    assert document["loads"] is document["timeline"] is None
    assert document["summary"]["tier"] == "minutes"
    assert "figures come from per-minute sums" in document["notes"][0].lower()
    assert document["searched"].startswith("incidents are not known")
    assert cli("report", root, "-o", tmp_path / "report.html").returncode == 0


@pytest.mark.parametrize("column", ["rank_load", "balancedness_histogram"])
def test_sums_with_lists_of_a_wrong_length_are_refused_before_they_are_read(root: Path, column: str) -> None:
    (folder,) = session_folders(root)
    (entry,) = thin_to(folder, {Tier.MINUTES: [0]})
    path = folder / entry.files["minutes"].name
    table = pq.read_table(path)
    longer = pa.array(
        [value * 1000 for value in table.column(column).to_pylist()], MINUTES_SCHEMA.field(column).type
    )
    changed = table.set_column(table.column_names.index(column), MINUTES_SCHEMA.field(column), longer)
    pq.write_table(changed, path, write_page_checksum=True)
    file = SealedFile(path.name, path.stat().st_size, entry.files["minutes"].rows, footer_crc32(path))
    ManifestFile(folder).append(info_of(folder), replace(entry, files={**entry.files, "minutes": file}))
    (segment,) = open_run(root).sessions[0].retired
    with pytest.raises(DamagedSegmentError, match="the lengths of its lists do not match the manifest"):
        next(segment.minutes([column]))


def test_too_few_steps_are_those_of_a_minute_and_phase(tmp_path: Path) -> None:
    """A placement has 45 steps of each phase in a minute, and many more in all."""
    with (
        steady_clock(60_000 // 90),
        open_writer(tmp_path, scope="global", ep_size=RANKS, num_logical_experts=LOGICAL) as writer,
    ):
        for step, load in enumerate(loads()[:400]):
            writer.record(step, load, placement(0), phase="decode" if step % 2 else "prefill")
            if step % 100 == 0:
                assert writer.flush(60)
    text = " ".join(cli("summary", tmp_path, "--tier", "minutes").stdout.split())
    assert "Too few steps of one phase and placement in a minute (at most 45; 96 are needed) to tell" in text
    assert "Too few" not in cli("summary", tmp_path, "--tier", "steps").stdout
