"""The incident finder on planted incidents, on clean runs, and on a recording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, open_writer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted_incidents import CAUSES, OF_ONE_LAYER, PlantedRun, make_run
from recorded_incidents import incidents_of, record

from eplb_analyze import open_run
from eplb_analyze.analysis import incident_series
from eplb_analyze.analysis.incident_finder import Incidents, find_incidents
from eplb_analyze.analysis.incident_series import BalanceValues, steps_per_value
from eplb_analyze.analysis.incidents import EndedBy, Incident
from eplb_analyze.analysis.layer_departures import MOST_VALUES, BalanceSeries, Found
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import LayerHistory, PlacementHistory
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.step_range import StepRange

#: Small runs: steps × layers × slots.
CELLS = 500_000


def facts(incident: Incident) -> Any:
    """All that a recording and the sums of its loads have in common: not the times."""
    own = incident
    return (own.layer, own.layers, own.ranks, own.first_step, own.last_step, own.cause, own.ended_by)


@pytest.mark.parametrize("cause", CAUSES)
def test_most_planted_incidents_are_found_with_edges_layer_rank_expert_and_cause(cause: str) -> None:
    right = counted = 0
    for seed in range(1000, 1005):
        run = make_run(seed, (cause,), steps=1000, cells=CELLS)
        found = find_incidents(run.series(), run).found
        for truth in run.truths:
            counted += truth.counts
            right += truth.counts and any(truth.is_found_as(one, len(run.layers)) for one in found)
    assert counted >= 2
    # Nearly all are; the margin is for numpy versions that draw other loads from a seed.
    assert right >= counted - 1


@pytest.mark.parametrize("cause", CAUSES)
def test_tokens_per_rank_show_the_same_incidents_and_never_a_wrong_cause(cause: str) -> None:
    same = every = 0
    for seed in range(1000, 1005):
        run = make_run(seed, (cause,), steps=1000, cells=CELLS)
        full, by_rank = (find_incidents(run.series(), one).found for one in (run, replace(run, by_rank=True)))
        assert all(one.cause.kind in (cause, "loads_retired") for one in by_rank)
        assert all(one.cause.expert is None for one in by_rank)
        truth = [(one.first_step, one.last_step, one.layers, one.ranks) for one in full]
        found = [(one.first_step, one.last_step, one.layers, one.ranks) for one in by_rank]
        every += len({*truth, *found})
        same += len({*truth} & {*found})
    assert every >= 4
    assert same >= every - 1  # what is merged depends on the cause


def test_incident_ends_one_step_after_its_last() -> None:
    for seed in range(40):
        run = make_run(seed, (CAUSES[seed % len(CAUSES)],), steps=600, cells=CELLS // 2)
        for one in find_incidents(run.series(), run).found:
            assert one.ended_by is not None
            assert one.ended_by.step == one.last_step + (one.ended_by.kind != "run_end")


def hot_in(*steps: range, seed: int = 0) -> PlantedRun:
    """1,000 steps of four layers; an expert of each of the first ones is hot in these steps."""
    rates = np.full((1000, 4, 16), 400.0)
    for layer, own in enumerate(steps):
        rates[own.start : own.stop, layer, 3 * layer] *= 6
    layers = {}
    for layer in range(4):
        layers[layer] = LayerHistory()
        layers[layer].insert(0, 4, np.arange(16, dtype=np.int32))
    load = np.random.default_rng(seed).poisson(rates).astype(np.int32)
    return PlantedRun(load, 4, 16, PlacementHistory(layers, [], []), [])


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("size", [5, 8, 9, 10, 12])
def test_what_is_shorter_than_ten_steps_is_no_incident(size: int, *, by_rank: bool) -> None:
    run = replace(hot_in(range(500, 500 + size)), by_rank=by_rank)
    found = find_incidents(run.series(), run).found
    expected = [(500, 500 + size - 1)] if size >= 10 else []
    assert [(one.first_step, one.last_step) for one in found] == expected


def test_layers_that_depart_at_other_times_are_told_apart_without_a_cause() -> None:
    """They begin within twelve steps of each other."""
    run = hot_in(range(400, 450), range(405, 700))
    known, by_rank = (find_incidents(run.series(), one).found for one in (run, replace(run, by_rank=True)))
    assert [(one.layers, one.first_step, one.last_step) for one in known] == [
        ((0,), 400, 449),
        ((1,), 405, 699),
    ]
    assert [(one.layers, one.first_step, one.last_step) for one in by_rank] == [
        ((0,), 400, 449),
        ((1,), 405, 699),
    ]


def test_layers_that_depart_in_the_same_steps_are_one_incident_without_a_cause() -> None:
    run = hot_in(range(400, 600), range(430, 610))
    known, by_rank = (find_incidents(run.series(), one).found for one in (run, replace(run, by_rank=True)))
    assert [one.layers for one in known] == [(0,), (1,)]
    (one,) = by_rank
    assert (one.layers, one.cause.kind) == ((0, 1), "loads_retired")


def test_clean_runs_report_nothing() -> None:
    runs = [make_run(seed, steps=1000, cells=CELLS) for seed in range(2000, 2010)]
    assert sum(bool(find_incidents(run.series(), run).found) for run in runs) <= 1


def test_two_incidents_of_one_run_are_both_found() -> None:
    run = make_run(7, ("rearrangement", "few_tokens"), steps=2000, cells=CELLS)
    kinds = {one.cause.kind for one in find_incidents(run.series(), run).found}
    assert {truth.kind for truth in run.truths if truth.counts} <= kinds


def test_incident_of_one_layer_has_its_layer_and_its_tokens_as_cost() -> None:
    for cause in OF_ONE_LAYER:
        run = make_run(1001, (cause,), steps=1000, cells=CELLS)
        found = [one for one in find_incidents(run.series(), run).found if one.cause.kind == cause]
        assert all(one.cost.tokens_per_step > 0 and one.cost.ms_per_step is None for one in found)
        assert all(one.peak_imbalance > one.usual_imbalance for one in found)


def test_layers_without_a_usual_balance_are_counted() -> None:
    """Layers 0 and 2 get another level every 100 steps, as with traffic that changes all the time."""
    run, n = make_run(2000, steps=300, cells=CELLS), 6000
    rng = np.random.default_rng(5)
    ratio = (0.8 + 0.01 * rng.standard_normal((n, 4))).astype(np.float32)
    for layer in (0, 2):
        ratio[:, layer] += np.repeat(rng.uniform(-0.1, 0.1, n // 100), 100)
    series = BalanceSeries(
        np.arange(n), ratio, np.ones(n, np.float32), np.full(n, -1), np.zeros(n, np.int64), n - 1
    )
    incidents = find_incidents(series, run)
    assert (incidents.found, incidents.unexamined, incidents.restless) == ([], [], 2)


def test_few_tokens_end_when_tokens_come_back_also_if_balance_does_not() -> None:
    """Meanwhile one rank's experts grew hotter, so that the balance after is as much like that during."""
    rng = np.random.default_rng(0)
    steps = np.arange(1000)
    rates = np.full((1000, 2, 16), 400.0)
    rates[:, :, :4] *= 1 + 0.4 * np.clip((steps - 200) / 100, 0, 1)[:, None, None]
    rates[200:300] /= 60
    layers = {}
    for layer in range(2):
        layers[layer] = LayerHistory()
        layers[layer].insert(0, 4, np.arange(16, dtype=np.int32))
    history = PlacementHistory(layers, [], [])
    run = PlantedRun(rng.poisson(rates).astype(np.int32), 4, 16, history, [])
    (incident,) = find_incidents(run.series(), run).found
    assert incident.cause.kind == "few_tokens"
    assert (incident.first_step, incident.last_step) == (200, 299)
    assert incident.ended_by == EndedBy("traffic", 300)


def test_balance_that_falls_while_the_load_balancer_does_not_act_is_no_abrupt_change_of_traffic() -> None:
    runs = [make_run(seed, ("eplb_stopped",)) for seed in (400145, 400173, 400187)]
    found = [
        any(
            run.truths[0].is_found_as(one, len(run.layers)) for one in find_incidents(run.series(), run).found
        )
        for run in runs
    ]
    assert sum(found) >= 2  # the margin as above


class TestPlantedRecordings:
    """Written by the writer, read by the command: its incidents are those that the sums of the loads show.

    This holds for every seed. How many of them are right, `python -m benchmarks.incidents` measures.
    """

    @pytest.mark.parametrize("cause", CAUSES)
    def test_summary_reports_what_the_sums_show_with_the_planted_clock_times(
        self, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(CAUSES.index(cause), (cause,), steps=600, cells=CELLS // 4)
        times = record(run, tmp_path, monkeypatch)
        result = cli("summary", "--json", tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        reported = incidents_of(json.loads(result.stdout), times)
        assert [facts(one) for one in reported] == [
            facts(one) for one in find_incidents(run.series(), run).found
        ]

    def test_rank_that_stops_recording_is_lost_in_exactly_those_steps(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = next(
            run
            for seed in range(100)
            if (run := make_run(seed, ("rank_lost",), steps=400, cells=40_000)).ranks == 4
            and run.load.sum(axis=(1, 2)).min() >= 4 * 200
        )
        (truth,) = run.truths
        times = record(run, tmp_path, monkeypatch, local=True)
        reported = incidents_of(json.loads(cli("summary", "--json", tmp_path).stdout), times)
        (lost,) = [one for one in reported if one.cause.kind == "rank_lost"]
        assert (lost.layers, lost.ranks) == (tuple(run.layers), truth.ranks)
        assert (lost.first_step, lost.last_step) == (truth.first, truth.end - 1)
        assert lost.ended_by == EndedBy("rank_back", truth.end)


class TestRecording:
    LAYERS, EXPERTS, RANKS = 4, 32, 4

    def record(self, root: Path, steps: int, hot: range, **options: Any) -> None:
        rng = np.random.default_rng(3)
        writer = open_writer(
            root, num_logical_experts=self.EXPERTS, ep_size=self.RANKS, scope="global", **options
        )
        placement = np.tile(np.arange(self.EXPERTS), (self.LAYERS, 1))
        for step in range(steps):
            rates = np.full((self.LAYERS, self.EXPERTS), 200.0)
            if step in hot:
                rates[2, 13] *= 8
            writer.record(step, rng.poisson(rates), placement)
            if step % 100 == 99:
                writer.flush(timeout=60)
        writer.close()

    def test_hot_expert_is_named_with_exact_steps_and_times(self, tmp_path: Path) -> None:
        self.record(tmp_path, 600, range(250, 310))
        summary = summarize(open_run(tmp_path))
        (incident,) = summary.incidents
        assert (incident.layer, incident.first_step, incident.last_step) == (2, 250, 309)
        assert incident.ranks == (13 // (self.EXPERTS // self.RANKS),)
        assert incident.cause.kind == "expert_hot"
        assert (incident.cause.expert, incident.cause.layer, incident.cause.replicas) == (13, 2, 1)
        assert incident.cause.from_times_mean == pytest.approx(1, rel=0.1)
        assert incident.cause.to_times_mean == pytest.approx(8 / (39 / 32), rel=0.1)
        assert incident.ended_by is not None
        assert (incident.ended_by.kind, incident.ended_by.step) == ("traffic", 310)
        assert incident.since is not None
        assert incident.until is not None
        assert incident.since <= incident.until
        document = summary.to_json()["incidents"][0]
        assert document["cause"]["kind"] == "expert_hot"
        assert document["ended_by"] == {"kind": "traffic", "step": 310, "replicas": None}

    def test_incident_that_goes_on_ends_with_the_run(self, tmp_path: Path) -> None:
        self.record(tmp_path, 400, range(300, 400))
        (incident,) = summarize(open_run(tmp_path)).incidents
        assert (incident.first_step, incident.last_step) == (300, 399)
        assert incident.ended_by is not None
        assert (incident.ended_by.kind, incident.ended_by.step) == ("run_end", 399)

    @pytest.mark.parametrize("back", [450, None])
    def test_rank_whose_writer_stops_is_lost_until_it_is_back(self, tmp_path: Path, back: int | None) -> None:
        """The engine continues and sends the tokens of rank 2 to rank 3, with replicas of its experts."""
        lost, steps, stop = 2, 600, 300
        rng = np.random.default_rng(4)
        options: dict[str, Any] = {"num_logical_experts": 12, "ep_size": self.RANKS}
        placement = np.tile([*range(12), *range(8, 12)], (self.LAYERS, 1))
        writers = [open_writer(tmp_path, ep_rank=rank, **options) for rank in range(self.RANKS)]
        for step in range(steps):
            gone = step >= stop and (back is None or step < back)
            if step == stop:
                assert writers[lost].close(60)
            if step == back:
                writers[lost] = open_writer(tmp_path, ep_rank=lost, **options)
            rates = np.full((self.LAYERS, 16), 100.0)
            rates[:, 8:] = 50
            if gone:
                rates[:, 8:12], rates[:, 12:] = 0, 100
            for rank, writer in enumerate(writers):
                if rank != lost or not gone:
                    assert writer.record(step, rng.poisson(rates), placement) > 0
                    assert step % 100 or writer.flush(60)
        for writer in writers:
            assert writer.close(60)
        run = open_run(tmp_path)
        assert [one.rank for one in run.lost_ranks] == [lost]
        (incident,) = summarize(run).incidents
        assert incident.cause.kind == "rank_lost"
        assert (incident.ranks, incident.layers, incident.layer) == ((lost,), tuple(range(self.LAYERS)), None)
        last = steps - 1 if back is None else back - 1
        assert (incident.first_step, incident.last_step) == (stop, last)
        assert incident.since is not None
        assert incident.until is not None
        assert incident.since <= incident.until
        assert incident.ended_by is not None
        ended = ("run_end", last) if back is None else ("rank_back", back)
        assert (incident.ended_by.kind, incident.ended_by.step) == ended
        assert (incident.cause.expert, incident.cost.ms_per_step) == (None, None)

    def test_balanced_run_has_none(self, tmp_path: Path) -> None:
        self.record(tmp_path, 400, range(0))
        assert summarize(open_run(tmp_path)).incidents == []


class TestSelections:
    """A hot expert in steps 400-599 of 1000, and another one in steps 800-849."""

    STEPS = 1000

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory: pytest.TempPathFactory) -> Run:
        root, rng = tmp_path_factory.mktemp("selections"), np.random.default_rng(5)
        writer = open_writer(root, num_logical_experts=16, ep_size=4, scope="global", segment_steps=128)
        for step in range(cls.STEPS):
            rates = np.full((3, 16), 200.0)
            if 400 <= step < 600:
                rates[1, 5] *= 6
            if 800 <= step < 850:
                rates[2, 9] *= 8
            writer.record(step, rng.poisson(rates), np.tile(np.arange(16), (3, 1)))
            assert step % 100 != 99 or writer.flush(60)
        assert writer.close(60)
        found = open_run(root)
        edges = [(one.first_step, one.last_step) for one in summarize(found).incidents]
        assert edges == [(400, 599), (800, 849)]
        return found

    @settings(max_examples=20)
    @given(first=st.integers(0, 999), last=st.integers(0, 999))
    @example(first=300, last=699)
    @example(first=400, last=599)
    @example(first=450, last=500)
    @example(first=650, last=750)
    def test_incidents_of_a_range_are_those_of_the_run_that_overlap_it(
        self, run: Run, first: int, last: int
    ) -> None:
        first, last = sorted((first, last))
        expected = [
            facts(one)
            for one in summarize(run).incidents
            if one.first_step <= last and one.last_step >= first
        ]
        assert [facts(one) for one in summarize(run, (first, last + 1)).incidents] == expected

    def test_range_is_searched_with_a_margin_on_either_side(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An incident that begins and ends in it is the same; of one that goes on the end is not known."""
        hot, later = summarize(run).incidents
        monkeypatch.setattr(incident_series, "MARGIN", 250)
        for first, last, expected in ((500, 520, [hot]), (640, 820, [later]), (700, 720, [])):
            assert [facts(one) for one in summarize(run, (first, last)).incidents] == [
                facts(one) for one in expected
            ]
        monkeypatch.setattr(incident_series, "MARGIN", 120)
        (begun,) = summarize(run, (395, 405)).incidents
        assert begun.ended_by is None
        assert (begun.layer, begun.first_step, begun.last_step) == (hot.layer, hot.first_step, 405 + 120 - 1)
        assert (begun.cause.kind, begun.cause.expert) == (hot.cause.kind, hot.cause.expert)
        # What began before the margin does not show.
        assert summarize(run, (550, 560)).incidents == []

    def test_range_reads_no_more_than_its_margins(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []
        blocks = Run._blocks

        def counted(run: Run, steps: tuple[int, int] | None) -> Iterator[Block]:
            for block in blocks(run, steps):
                read.extend(block.step.tolist())
                yield block

        monkeypatch.setattr(Run, "_blocks", counted)
        monkeypatch.setattr(incident_series, "MARGIN", 30)
        summarize(run, (900, 910))
        assert sorted(read) == [*range(870, 940)]

    def test_smaller_departures_are_counted_where_they_are(self) -> None:
        left = [Found((0,), 10, 20, 0.1, False), Found((1,), 50, 70, 0.1, False)]
        incidents = Incidents([], left, 2)
        assert incidents.within(StepRange(0, 50)) == Incidents([], left[:1], 2)
        assert incidents.within(StepRange(20, 51)) == Incidents([], left[1:], 2)
        assert incidents.within(StepRange()) == incidents


@pytest.mark.parametrize("cause", ["expert_hot", "rearrangement", "few_tokens"])
def test_part_of_a_long_run_shows_the_incidents_of_the_whole(cause: str) -> None:
    same = 0
    for seed in range(3000, 3004):
        run = make_run(seed, (cause,), steps=9000, cells=CELLS)
        series, (truth, *_) = run.series(), run.truths
        low, high = (
            max(0, truth.first - incident_series.MARGIN),
            min(9000, truth.end + incident_series.MARGIN),
        )
        part = replace(
            series,
            **{
                name: getattr(series, name)[low:high]
                for name in ("steps", "ratio", "tokens", "phase", "shape")
            },
            last=high - 1,
            whole=StepRange(0, 9000),
        )
        chosen = StepRange(truth.first, truth.end)
        found, whole = (find_incidents(one, run).within(chosen).found for one in (part, series))
        same += [facts(one) for one in found] == [facts(one) for one in whole]
    assert same >= 3  # the noise, by which an edge is significant, is that of the part


def test_values_of_a_long_run_are_of_several_steps() -> None:
    assert [steps_per_value(steps) for steps in (0, MOST_VALUES, 3 * MOST_VALUES + 1)] == [1, 1, 4]
    assert BalanceValues().series() is None
