"""`export trace`: times, durations and figures against what was planted, read by the format's own rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from clocks import START_NS, HostClock, host_clock
from helpers import ROOT, assert_golden, cli, one_error, read_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import write
from thinning import info_of, session_folders, thin_to
from trace_reading import Slice, Trace, read_trace

from eplb_analyze import open_run
from eplb_analyze.analysis.incident_series import incidents_in
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.errors import NotInDumpError, UsageError
from eplb_analyze.transfer.exporters.trace import TraceExport, export_trace
from eplb_analyze.transfer.exporters.trace_events import QUARTER_NS, base_of
from eplb_analyze.transfer.exporters.trace_tracks import BASES, durations
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import Tier

MS = 10**6
RANKS, LAYERS, SLOTS, EXPERTS = 2, 2, 6, 4
MAP = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
OTHER_MAP = np.roll(MAP, 1, axis=1)
NAME, RANK = "expert load: m, run r", "expert load: rank "


def writer(root: Path, rank: int = 0, **options: Any) -> ExpertLoadWriter:
    defaults: dict[str, Any] = {
        "model": "m", "num_logical_experts": EXPERTS, "ep_size": RANKS, "run_id": "r", "moe_layers": (3, 7),
        "segment_steps": 64,
    }  # fmt: skip
    return ExpertLoadWriter(root, ep_rank=rank, **{**defaults, **options})


def load(step: int, rank: int = 0) -> Any:
    return np.random.default_rng([step, rank]).poisson(40, (LAYERS, SLOTS)) * (1 + np.arange(SLOTS) % 4)


def export(root: Path, steps: tuple[int, int] | None = None, **options: Any) -> tuple[Trace, TraceExport]:
    file = root.parent / f"{root.name}.json"
    report = export_trace(open_run(root), file, steps, force=True, **options)
    assert report.bytes == file.stat().st_size
    trace = read_trace(file)
    assert trace.base_ns == report.base_unix_ns
    assert report.events == sum(1 for line in file.read_text().splitlines() if line.startswith('{"ph"'))
    return trace, report


def record_all(root: Path, gaps_ms: list[float], **columns: list[Any]) -> list[int]:
    """Steps of one rank that records for all, each a gap after the one before; returns when."""
    times = []
    with host_clock() as clock, writer(root, scope="global") as opened:
        for step, gap in enumerate(gaps_ms):
            clock.advance(int(gap * MS))
            opened.record(step, load(step), MAP, **{name: values[step] for name, values in columns.items()})
            times.append(clock.ns)
    return times


def spans(steps: dict[int, Slice]) -> list[tuple[int, int]]:
    return [(steps[step].begin, steps[step].end) for step in sorted(steps)]


class TestSteps:
    def test_step_ends_when_it_was_recorded_and_begins_with_the_end_of_the_one_before(
        self, tmp_path: Path
    ) -> None:
        times = record_all(tmp_path / "dump", [1, 8.25, 7.123456, 30, 8])
        trace, report = export(tmp_path / "dump")
        steps = trace.steps()
        assert spans(steps) == list(zip([times[0], *times[:-1]], times, strict=True))
        assert [steps[i].args["duration"] for i in range(5)] == ["unknown", *["host"] * 4]
        assert [steps[i].args.get("ms") for i in range(5)] == [None, 8.25, 7.1235, 30, 8]
        assert [steps[i].name for i in range(5)] == [f"step {i}" for i in range(5)]
        assert report.durations == {"engine": 0, "device": 0, "host": 4, "unknown": 1}
        assert report.notes == []
        clock = open_run(tmp_path / "dump").clock
        assert [s.args["time"] for s in steps.values()] == [clock.iso(step) for step in steps]

    def test_step_is_as_long_as_the_engine_says(self, tmp_path: Path) -> None:
        times = record_all(tmp_path / "dump", [1, 10, 10, 10], step_ms=[4.0, 6.5, None, 9.75])
        trace, report = export(tmp_path / "dump")
        begins = [times[0] - 4 * MS, times[1] - 6500000, times[1], times[3] - 9750000]
        assert spans(trace.steps()) == list(zip(begins, times, strict=True))
        assert [s.args["duration"] for s in trace.steps().values()] == ["engine", "engine", "host", "engine"]
        assert report.durations == {"engine": 3, "device": 0, "host": 1, "unknown": 0}

    def test_step_that_took_longer_than_there_is_room_says_so(self, tmp_path: Path) -> None:
        """Passes that overlap, or steps that were recorded late."""
        times = record_all(tmp_path / "dump", [1, 10, 10, 10], step_ms=[8.0, 8.0, 12.0, 8.0])
        trace, report = export(tmp_path / "dump")
        third = trace.steps()[2]
        assert (third.begin, third.end) == (times[1], times[2])
        assert (third.args["ms"], third.args["drawn_shorter"]) == (12.0, True)
        assert [s.args.get("drawn_shorter") for s in trace.steps().values()] == [None, None, True, None]
        assert (report.shortened, report.notes) == (1, [])

    def test_steps_that_were_recorded_afterwards_are_noted(self, tmp_path: Path) -> None:
        record_all(tmp_path / "dump", [0.1] * 20, step_ms=[12.0] * 20)
        _, report = export(tmp_path / "dump")
        assert report.shortened == 19
        assert "does not line up" in report.notes[0]

    def test_idle_engine_is_no_long_step(self, tmp_path: Path) -> None:
        record_all(tmp_path / "dump", [1, 10, 61_000, 10])
        trace, report = export(tmp_path / "dump")
        assert [s.end - s.begin for s in trace.steps().values()] == [0, 10 * MS, 0, 10 * MS]
        assert report.durations["unknown"] == 2
        end = trace.steps()[1].end
        assert trace.counter("balancedness", end - 1, NAME) > 0
        assert trace.counter("balancedness", end, NAME) == 0

    def test_best_known_duration_counts(self) -> None:
        nan = math.nan
        engine, device = np.array([4.0, nan, nan, nan, nan]), np.array([5.0, 6.0, nan, nan, nan])
        basis, ms = durations(engine, device, np.array([7e6, 8e6, 9e6, 61e9, -1.0]))
        assert [BASES[i] for i in basis] == ["engine", "device", "host", "unknown", "unknown"]
        np.testing.assert_array_equal(ms, [4, 6, 9, nan, nan])

    def test_durations_of_an_older_recording_count(self, tmp_path: Path) -> None:
        """Of a golden recording; against the columns of its rows."""
        import duckdb

        root = ROOT / "tests/golden/v1.1-durations"
        rows = duckdb.sql(
            f"select step, max(step_ms), max(device_ms) from read_parquet('{root}/**/steps-*.parquet') "
            "where status = 'recorded' group by step"
        ).fetchall()
        export_trace(open_run(root), tmp_path / "t.json")
        steps = read_trace(tmp_path / "t.json").steps()
        kinds = set()
        for step, engine, device in rows:
            args = steps[step].args
            want = ("engine", engine) if engine is not None else ("device", device)
            if want[1] is not None:
                kinds.add(want[0])
                assert args["duration"] == want[0]
                assert args["ms"] == pytest.approx(want[1], abs=1e-4)
        assert kinds


class TestFigures:
    def test_counters_and_arguments_are_those_of_plain_loops(self, tmp_path: Path) -> None:
        truth = write(tmp_path / "dump")
        trace, _ = export(tmp_path / "dump")
        name = "expert load: org/moe, run r"
        drawn = trace.steps()
        assert drawn[0].begin == drawn[0].end  # so its figures end at once
        for step, found in drawn.items():
            own = truth.T.get(step)
            if step == 0:
                continue
            if own is None:
                assert "balancedness" not in found.args
                assert trace.counter("balancedness", found.begin, name) == 0
                assert trace.counter("slowest rank", found.begin, name) == -1
                continue
            ((balance, imbalance),) = [
                (
                    reference.per_step("balancedness", own[None])[0],
                    [max(row) / (sum(row) / len(row)) for row in own if max(row) > 0],
                )
            ]
            assert found.args["balancedness"] == pytest.approx(balance, abs=1e-4)
            assert found.args["worst_layer_imbalance"] == pytest.approx(max(imbalance), abs=1e-4)
            _, cost = reference.waiting(own[None])
            waits = [sum(layer[rank] for layer in cost) for rank in range(own.shape[1])]
            slowest = waits.index(max(waits)) if max(waits) else None
            assert found.args["slowest_rank"] == slowest
            assert trace.counter("balancedness", found.begin, name) == pytest.approx(balance, abs=1e-4)
            assert trace.counter("worst layer's max/mean", found.begin, name) == pytest.approx(
                max(imbalance), abs=1e-4
            )
            assert trace.counter("slowest rank", found.begin, name) == (-1 if slowest is None else slowest)
            active = [sum(row) for row in own if max(row) > 0]
            routed = sum(active) / len(active)
            assert trace.counter("tokens routed per layer", found.begin, name) == pytest.approx(
                routed, abs=0.01
            )
            for rank in range(4):
                mine = trace.steps(f"expert load: rank {rank}")[step]
                if mine.args.get("status") is None:
                    assert mine.args["tokens_per_layer"] == pytest.approx(own[:, rank].mean(), abs=0.01)

    def test_states_are_named(self, tmp_path: Path) -> None:
        write(tmp_path / "dump")
        trace, report = export(tmp_path / "dump")
        steps = trace.steps()
        assert (steps[6].name, steps[6].args["state"]) == ("step 6 dummy", "dummy")
        assert (steps[7].name, steps[7].args["state"]) == ("step 7 incomplete", "incomplete")
        assert trace.steps("expert load: rank 1")[4].name == "step 4 dummy"
        assert trace.steps("expert load: rank 2")[7].args["status"] == "dropped"
        assert report.steps.seen == 30

    def test_tokens_and_phases_are_those_of_the_engine(self, tmp_path: Path) -> None:
        phases = ["prefill", "prefill", "decode", None, "decode", "decode"]
        tokens = [512, 300, 8, 9, 9, 10]
        times = record_all(tmp_path / "dump", [5] * 6, phase=phases, num_tokens=tokens)
        trace, _ = export(tmp_path / "dump")
        steps = trace.steps()
        assert [s.args["tokens"] for s in steps.values()] == tokens
        assert steps[0].name == "step 0 prefill"
        assert [trace.counter("tokens", s.begin, NAME) for s in list(steps.values())[1:]] == tokens[1:]
        found = [(s.name, s.begin, s.end, s.args) for s in trace.track("phases")]
        assert found == [
            ("prefill", times[0], times[1], {"first_step": 0, "last_step": 1}),
            ("decode", times[1], times[2], {"first_step": 2, "last_step": 2}),
            ("decode", times[3], times[5], {"first_step": 4, "last_step": 5}),
        ]

    def test_other_phases_leave_gaps(self, tmp_path: Path) -> None:
        phases = ["decode", "decode", "prefill", "decode", "decode", "decode"]
        times = record_all(tmp_path / "dump", [5] * 6, phase=phases)
        file = tmp_path / "t.json"
        export_trace(open_run(tmp_path / "dump").of_phase("decode"), file)
        trace = read_trace(file)
        assert spans(trace.steps()) == [
            (t, times[i]) for i, t in zip([0, 1, 3, 4, 5], [times[0], *times[:1], *times[2:5]], strict=True)
        ]
        assert [(s.begin, s.end) for s in trace.track("phases")] == [
            (times[0], times[1]),
            (times[2], times[5]),
        ]
        assert trace.counter("balancedness", times[1] - 1, NAME) > 0
        assert trace.counter("balancedness", times[1], NAME) == 0

    def test_sampled_recording_keeps_the_last_figure(self, tmp_path: Path) -> None:
        with host_clock() as clock, writer(tmp_path / "dump", scope="global", interval=4) as opened:
            for step in range(12):
                clock.advance(10 * MS)
                opened.record(step, load(step), MAP)
        trace, _ = export(tmp_path / "dump")
        steps = trace.steps()
        for step in range(1, 12):
            figure = trace.counter("balancedness", steps[step].begin, NAME)
            assert figure == (steps[step - step % 4].args["balancedness"])
        assert steps[5].name == "step 5 not sampled"

    def test_run_without_a_complete_step_gives_estimates(self, tmp_path: Path) -> None:
        with host_clock() as clock, writer(tmp_path / "dump", 1, ep_size=3) as opened:
            for step in range(20):
                clock.advance(10 * MS)
                opened.record(step, load(step), MAP)
        trace, report = export(tmp_path / "dump")
        (name,) = trace.counters
        assert name == f"{NAME} (estimate without rank 0, 2)"
        own = load(5).reshape(LAYERS, 3, -1).sum(axis=2)
        want = reference.per_step("balancedness", own[None])[0]
        assert trace.steps()[5].args["balancedness"] == pytest.approx(want, abs=1e-4)
        assert report.notes[0].startswith("estimate from 1 of 3 ranks, without rank 0, 2")


class TestEvents:
    def test_rearrangement_and_its_pause_are_where_they_were(self, tmp_path: Path) -> None:
        changed, pause = 60, 80
        times = []
        rng = np.random.default_rng(0)
        with host_clock() as clock, writer(tmp_path / "dump", scope="global") as opened:
            for step in range(120):
                clock.advance(int((10 + 0.1 * rng.random() + (step == changed) * pause) * MS))
                opened.record(step, load(step), OTHER_MAP if step >= changed else MAP)
                times.append(clock.ns)
        trace, report = export(tmp_path / "dump")
        (change,) = trace.track("rearrangements")
        assert (change.begin, change.end) == (times[changed - 1], times[changed])
        assert change.args["first_step"] == change.args["last_step"] == changed
        assert (change.args["layers"], change.args["layer_numbers"]) == (LAYERS, "3, 7")
        assert change.args["slots_changed"] == int((MAP != OTHER_MAP).sum())
        (found,) = trace.track("pauses")
        assert found.begin == times[changed - 1]
        assert found.end - found.begin == pytest.approx(pause * MS, rel=0.02)
        assert change.args["pause_ms"]["estimate"] == pytest.approx(pause, rel=0.02)
        assert report.rearrangements == 1

    def test_pause_that_is_not_known_has_a_reason(self, tmp_path: Path) -> None:
        with host_clock() as clock, writer(tmp_path / "dump", scope="global") as opened:
            for step in range(6):
                clock.advance(10 * MS)
                opened.record(step, load(step), OTHER_MAP if step >= 3 else MAP)
        trace, _ = export(tmp_path / "dump")
        (change,) = trace.track("rearrangements")
        assert change.args["pause_ms"] is None
        assert "needed" in change.args["pause_reason"]
        assert trace.track("pauses") == []

    def test_incident_says_what_and_where(self, tmp_path: Path) -> None:
        first, end = 200, 300
        times = []
        with host_clock() as clock, writer(tmp_path / "dump", scope="global") as opened:
            for step in range(500):
                clock.advance(10 * MS)
                own = np.random.default_rng(step).poisson(100, (LAYERS, SLOTS))
                if first <= step < end:
                    own[1, 2] += 600
                opened.record(step, own, MAP)
                times.append(clock.ns)
        trace, report = export(tmp_path / "dump")
        (found,) = trace.track("incidents")
        assert found.name == "layer 7, rank 0: expert hot (expert 1)"
        assert (found.args["layer"], found.args["layers"], found.args["ranks"]) == (7, "7", "0")
        assert found.args["cause"]["kind"] == "expert_hot"
        assert found.args["cause"]["expert"] == MAP[1, 2]
        assert found.args["because"].startswith("expert 1 rose from ")
        steps = (found.args["first_step"], found.args["last_step"])
        assert abs(steps[0] - first) <= 2
        assert abs(steps[1] - end + 1) <= 2
        assert (found.begin, found.end) == (times[steps[0] - 1], times[steps[1]])
        assert report.incidents == 1
        run = open_run(tmp_path / "dump")
        assert incidents_in(run).found == summarize(run).incidents
        # Of a part, the slice is within the part, and the arguments are those of the whole incident.
        part, _ = export(tmp_path / "dump", (250, 280))
        (inside,) = part.track("incidents")
        assert (inside.begin, inside.end) == (part.steps()[250].begin, times[279])
        assert (inside.args["first_step"], inside.args["last_step"]) == steps


class TestRetired:
    def test_steps_that_are_not_kept_are_a_slice(self, tmp_path: Path) -> None:
        root = tmp_path / "dump"
        times = []
        with host_clock() as clock, writer(root, scope="global", segment_steps=8) as opened:
            for step in range(64):
                clock.advance(10 * MS)
                opened.record(step, load(step), MAP)
                times.append(clock.ns)
        (session,) = session_folders(root)
        thin_to(session, {Tier.GONE: [0, 1], Tier.MINUTES: [2, 5]})
        trace, _ = export(root)
        found = [(s.name, s.begin, s.end, s.args["kept"]) for s in trace.track("retired")]
        assert found == [
            ("steps 0-23 retired", times[0], times[23], "gone, minutes"),
            ("steps 40-47 retired", times[40], times[47], "minutes"),
        ]
        assert list(trace.steps()) == [*range(24, 40), *range(48, 64)]
        assert trace.counter("balancedness", times[39] - 1, NAME) > 0
        assert trace.counter("balancedness", times[39] + 1, NAME) == 0
        # When the last of them was recorded is still known.
        assert [trace.steps()[step].begin for step in (24, 48)] == [times[23], times[47]]
        part, _ = export(root, (44, 60))
        assert [s.name for s in part.track("retired")] == ["steps 40-47 retired"]


class TestClocks:
    def test_clock_set_back_between_sessions_begins_a_new_process(self, tmp_path: Path) -> None:
        root = tmp_path / "dump"
        ends = []
        for first, wall in ((0, START_NS), (20, START_NS - 3600 * 10**9)):
            with host_clock(wall, (1 + first) * 10**9) as clock, writer(root, scope="global") as opened:
                for step in range(first, first + 20):
                    clock.advance(10 * MS)
                    opened.record(step, load(step), MAP)
                    ends.append(clock.ns)
        trace, report = export(root)
        again = f"{NAME}, after the clock was set back (1)"
        assert [s.end for s in trace.steps(NAME).values()] == ends[:20]
        assert [s.end for s in trace.steps(again).values()] == ends[20:]
        assert list(trace.counters) == [NAME, again]
        assert "set back" in report.notes[0]

    def test_wall_clock_that_is_set_moves_no_slice_and_is_noted(self, tmp_path: Path) -> None:
        with host_clock() as clock, writer(tmp_path / "dump", scope="global") as opened:
            for step in range(40):
                clock.advance(10 * MS)
                if step == 25:
                    clock.ns -= 2 * 10**9
                opened.record(step, load(step), MAP)
        trace, report = export(tmp_path / "dump")
        assert [s.end for s in trace.steps().values()] == [START_NS + (i + 1) * 10 * MS for i in range(40)]
        assert report.notes[0].endswith("own trace can be 2.0 s behind")
        assert "seen at step 25" in report.notes[0]

    def test_thread_that_is_interrupted_between_two_clocks_is_no_set_clock(self, tmp_path: Path) -> None:
        with host_clock() as clock, writer(tmp_path / "dump", scope="global") as opened:
            for step in range(40):
                clock.advance(10 * MS)
                clock.ns += 80 * MS * (step == 25)
                opened.record(step, load(step), MAP)
                clock.ns -= 80 * MS * (step == 25)
        assert export(tmp_path / "dump")[1].notes == []

    def test_ranks_have_their_own_clocks(self, tmp_path: Path) -> None:
        root = tmp_path / "dump"
        ahead = [0, 30 * MS, 100 * 3600 * 10**9]
        for rank in range(3):
            with host_clock(START_NS + ahead[rank]) as clock, writer(root, rank, ep_size=3) as opened:
                for step in range(20):
                    clock.advance(10 * MS)
                    opened.record(step, load(step, rank), MAP, step_ms=2.0 + rank)
        trace, report = export(root)
        # The run's clock is the median of the ranks'.
        truth = [START_NS + 30 * MS + (i + 1) * 10 * MS for i in range(20)]
        assert [s.end for s in trace.steps(NAME).values()] == truth
        assert {s.args["ms"] for s in trace.steps(NAME).values()} == {4.0}
        assert [s.end for s in trace.steps("expert load: rank 0").values()] == [t - 30 * MS for t in truth]
        assert {s.end - s.begin for s in trace.steps("expert load: rank 1").values()} == {3 * MS}
        # A clock that is wrong by days would make the timeline days long.
        assert [s.end for s in trace.steps("expert load: rank 2").values()] == truth
        assert report.notes == [
            "clocks of ranks differ from the run's: rank 0 is 30.0 ms behind, rank 2 is 4.2 d ahead"
        ]

    def test_base_is_that_of_torch_profiler(self, tmp_path: Path) -> None:
        """Kineto counts from a multiple of three mean months, so that a float64 holds nanoseconds."""
        record_all(tmp_path / "dump", [5] * 3)
        trace, _ = export(tmp_path / "dump")
        assert trace.base_ns == START_NS // (7889238 * 10**9) * (7889238 * 10**9)
        assert trace.about["run_id"] == "r"
        assert base_of(QUARTER_NS) == QUARTER_NS
        assert base_of(QUARTER_NS - 1) == 0


class TestRanks:
    def record(self, root: Path, ranks: int, **options: Any) -> Path:
        for rank in range(ranks):
            with host_clock() as clock, writer(root, rank, ep_size=6, **options) as opened:
                for step in range(8):
                    clock.advance(10 * MS)
                    opened.record(step, load(step, rank), MAP)
        return root

    def test_some_ranks_have_tracks(self, tmp_path: Path) -> None:
        root = self.record(tmp_path / "dump", 6)
        assert export(root)[1].ranks == [0, 1, 2, 3, 4, 5]
        _, report = export(root, most_ranks=3)
        assert (report.ranks, report.ranks_left_out) == ([0, 2, 5], 3)
        assert export(root, most_ranks=0)[1].ranks == []
        trace, report = export(root, ranks=[4, 1])
        assert report.ranks == [1, 4]
        assert {s.process for s in trace.slices} == {NAME, "expert load: rank 1", "expert load: rank 4"}

    def test_rank_that_recorded_nothing_is_refused(self, tmp_path: Path) -> None:
        root = self.record(tmp_path / "dump", 2)
        with pytest.raises(NotInDumpError, match=r"rank 5 recorded nothing; recorded ranks: 0, 1"):
            export(root, ranks=[5])

    def test_one_rank_that_records_for_all_has_no_track(self, tmp_path: Path) -> None:
        record_all(tmp_path / "dump", [5] * 4)
        assert export(tmp_path / "dump")[1].ranks == []


class TestCommand:
    def test_names_from_a_recording_are_escaped(self, tmp_path: Path) -> None:
        model, phase = 'org/"m\\<é>\u2028', 'de"co\\de\x07\ud800'
        with host_clock() as clock, writer(tmp_path / "dump", scope="global", model=model) as opened:
            for step in range(4):
                clock.advance(10 * MS)
                opened.record(step, load(step), MAP, phase=phase if step < 3 else "日本")
        trace, _ = export(tmp_path / "dump")
        assert trace.about["model"] == open_run(tmp_path / "dump").info.model
        assert trace.track("phases")[-1].name == "日本"

    def test_compressed_file_is_the_same(self, tmp_path: Path) -> None:
        record_all(tmp_path / "dump", [5] * 30)
        run = open_run(tmp_path / "dump")
        for name in ("a.json", "a.json.gz", "b.json.gz"):
            export_trace(run, tmp_path / name)
        assert read_trace(tmp_path / "a.json.gz") == read_trace(tmp_path / "a.json")
        assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()
        assert (tmp_path / "a.json.gz").stat().st_size < (tmp_path / "a.json").stat().st_size / 4

    def test_steps_are_selected_as_everywhere(self, tmp_path: Path) -> None:
        phases = ["prefill" if step % 3 == 0 else "decode" for step in range(12)]
        times = record_all(tmp_path / "dump", [1000] * 12, phase=phases)

        def steps(*options: str) -> list[int]:
            file = tmp_path / "out.json"
            result = cli("export", "trace", "-o", file, "--force", "--json", *options, tmp_path / "dump")
            assert result.returncode == 0, result.stderr
            found = read_trace(file).steps()
            for step, one in found.items():
                assert one.end == times[step]
                assert one.begin == (times[step - 1] if step else times[0])
            return list(found)

        assert steps("--steps", "3-5") == [3, 4, 5]
        assert steps("--step", "7") == [7]
        assert steps("--phase", "decode") == [1, 2, 4, 5, 7, 8, 10, 11]
        assert steps("--since", "22:13:24", "--until", "22:13:25") == [3, 4, 5]

    def test_run_without_times_is_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "loads.npy", np.arange(80, dtype=np.int64).reshape(10, 2, 4))
        options = ["--format", "array", "--model", "m", "--ep-size", "2", "--placement", "linear"]
        assert cli("import", *options, tmp_path / "loads.npy", tmp_path / "dump").returncode == 0
        result = cli("export", "trace", "-o", tmp_path / "t.json", tmp_path / "dump")
        one_error(result, 2, "the times of its steps are not known")
        assert not (tmp_path / "t.json").exists()

    def test_existing_file_and_files_in_a_dump_are_not_touched(self, tmp_path: Path) -> None:
        record_all(tmp_path / "dump", [5] * 3)
        run = open_run(tmp_path / "dump")
        (tmp_path / "t.json").write_text("mine")
        with pytest.raises(UsageError, match="already exists"):
            export_trace(run, tmp_path / "t.json")
        with pytest.raises(UsageError, match="inside the dump"):
            export_trace(run, tmp_path / "dump/run=r/t.json")
        assert (tmp_path / "t.json").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    @pytest.mark.parametrize("table", ["loads", "steps"])
    def test_damaged_file_leaves_a_whole_trace(self, table: str, tmp_path: Path) -> None:
        """Damage that is found while the trace is written: it is written again, without that file."""
        with host_clock() as clock, writer(tmp_path / "dump", scope="global", segment_steps=8) as opened:
            for step in range(32):
                clock.advance(10 * MS)
                opened.record(step, load(step), MAP)
        (damaged,) = (tmp_path / "dump").rglob(f"{table}-000002.parquet")
        content = bytearray(damaged.read_bytes())
        content[4:-500] = bytes(len(content) - 504)  # all but the footer
        damaged.write_bytes(content)
        result = cli("export", "trace", "-o", tmp_path / "t.json", tmp_path / "dump")
        assert result.returncode == 3, result.stderr
        assert damaged.name in result.stderr
        steps = read_trace(tmp_path / "t.json").steps()
        good = [*range(16), *range(24, 32)]
        assert [step for step, one in steps.items() if "balancedness" in one.args] == good
        assert list(steps) == (good if table == "steps" else [*range(32)])

    def test_incomplete_data_ends_with_3(self, tmp_path: Path) -> None:
        for rank in range(RANKS):
            with host_clock() as clock, writer(tmp_path / "dump", rank) as opened:
                for step in range(30):
                    clock.advance(10 * MS)
                    if step < 20 or rank == 0:
                        opened.record(step, load(step, rank), MAP)
        result = cli("export", "trace", "-o", tmp_path / "t.json", tmp_path / "dump")
        assert result.returncode == cli("summary", tmp_path / "dump").returncode == 3
        assert len(read_trace(tmp_path / "t.json").steps()) == 30

    @pytest.mark.parametrize("form", ["txt", "json"])
    def test_golden_output(self, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("dump"))
        options = ["--json"] if form == "json" else []
        result = cli("export", "trace", "--max-ranks", "2", "-o", "trace.json", *options, "dump")
        assert_golden(f"export-trace.{form}", result.stdout)
        if form == "json":
            assert json.loads(result.stdout)["bytes"] == Path("trace.json").stat().st_size

    def test_ranks_are_named_or_counted_but_not_both(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(Path("dump"))
        result = cli("export", "trace", "--rank", "0", "--max-ranks", "2", "-o", "trace.json", "dump")
        assert result.returncode == 2
        assert "--rank and --max-ranks cannot be combined" in result.stderr
        assert not Path("trace.json").exists()
        named = cli("export", "trace", "--rank", "0", "-o", "trace.json", "dump").stdout
        assert "ranks with steps of their own: 0" in named
        assert "--max-ranks" not in named


STEP = st.fixed_dictionaries(
    {
        "gap_ms": st.sampled_from([0.0, 0.001, 0.7, 5.0, 5.0, 5.0, 900.0, 61_000.0]),
        "wall_ms": st.sampled_from([0.0, 0.0, 0.0, -5_000.0, 100.0]),
        "step_ms": st.none() | st.sampled_from([0.0, 0.5, 4.0, 70.0, 1e6, 1e30]),
        "what": st.sampled_from(
            ["record", "record", "record", "record", "dummy", "dropped", "nothing", "bad"]
        ),
        "phase": st.sampled_from([None, "decode", "decode", "prefill", '\\" \x00']),
        "map": st.booleans(),
    }
)


class TestAnyRun:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_trace_holds_each_step_once_when_it_was(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Whatever ranks, sessions, clocks, steps and retired segments: each step that is kept, once."""
        root = tmp_path_factory.mktemp("any") / "dump"
        ranks = data.draw(st.sampled_from([[0], [0, 1], [1], [0, 1, 2]]))
        times: dict[int, list[int]] = {}
        for rank in ranks:
            first = 0
            lives = data.draw(st.lists(st.sampled_from([0, -7200, 100, 10**8]), min_size=1, max_size=3))
            for life, wall_s in enumerate(lives):
                steps = data.draw(st.lists(STEP, min_size=1, max_size=12))
                options = {"ep_size": max(2, len(ranks)), "segment_steps": 4}
                created = START_NS + wall_s * 10**9
                with (
                    # The machine was not restarted.
                    host_clock(created, (1 + life) * 10**15) as clock,
                    writer(root, rank, **options) as opened,
                ):
                    for step, one in enumerate(steps, first):
                        self.record(opened, clock, step, one)
                        times.setdefault(step, []).append(created + clock.monotonic % 10**15)
                first += len(steps) - data.draw(st.sampled_from([0, 0, 1])) * (len(steps) > 1)
        retired: set[int] = set()
        for folder in session_folders(root):
            sealed = sorted(int(path.stem.split("-")[1]) for path in folder.glob("steps-*.parquet"))
            gone = data.draw(st.sampled_from([0, 0, 1, 2]))
            tier = data.draw(st.sampled_from([Tier.MINUTES, Tier.GONE]))
            for entry in thin_to(folder, {tier: sealed[:gone]}):
                retired |= {*range(entry.first_step, entry.last_step + 1)}
        kept: dict[int, set[int]] = {rank: set() for rank in ranks}
        for folder in session_folders(root):
            for row in read_table(folder, "steps").to_pylist():
                kept[info_of(folder).ep_rank].add(row["step"])
        every = set.union(*kept.values())
        steps = data.draw(st.none() | st.tuples(st.integers(0, 20), st.integers(21, 40)))
        asked = {step for step in every if steps is None or steps[0] <= step < steps[1]}
        # A step that one rank has retired is left out, unless a newer session of the rank has it.
        expected = asked - retired
        if not expected:
            return
        trace, report = export(root, steps)
        drawn = [s for s in trace.slices if s.track == "steps" and not s.process.startswith(RANK)]
        found = sorted(s.args["step"] for s in drawn)
        assert len(set(found)) == len(found)
        assert expected <= {*found} <= asked
        assert report.steps.seen == len(found) == sum(report.durations.values())
        for one in drawn:
            own = times[one.args["step"]]
            if len(own) == 1:  # else it is the median of ranks, or that of the newest session
                assert 0 <= one.end - own[0] <= 10**9
        for rank in report.ranks:
            own = [
                s.args["step"]
                for s in trace.slices
                if s.track == "steps" and s.process.startswith(f"{RANK}{rank}")
            ]
            assert sorted(own) == sorted(kept[rank] & {*found})

    def record(self, opened: ExpertLoadWriter, clock: HostClock, step: int, one: dict[str, Any]) -> None:
        clock.advance(int(one["gap_ms"] * MS))
        clock.ns += int(one["wall_ms"] * MS)
        if one["what"] == "record":
            opened.record(
                step, load(step), OTHER_MAP if one["map"] else MAP, phase=one["phase"], step_ms=one["step_ms"]
            )
        elif one["what"] == "bad":
            opened.record(step, -load(step), MAP)
        elif one["what"] != "nothing":
            opened.skip(one["what"], step)
