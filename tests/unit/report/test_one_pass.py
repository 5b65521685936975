"""`report` reads a run once, and its parts are those of the commands that read it for themselves."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_dump as planted
from clocks import steady_clock
from helpers import cli, without_times
from thinning import session_folders, thin_to

from eplb_analyze import open_run
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.json_report import as_json
from eplb_analyze.report.bins import MAX_BINS
from eplb_analyze.report.document import report_document
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import Tier


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    with steady_clock(50):
        planted.record(root)
    return root


@pytest.fixture(scope="module")
def without_a_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("estimate")
    with steady_clock(50):
        planted.record(root, absent=(1,))
    return root


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More slots from step 100 on, and placements that change in both halves."""
    root, rng = tmp_path_factory.mktemp("elastic"), np.random.default_rng(3)
    with (
        steady_clock(50),
        ExpertLoadWriter(
            root, model="m", num_logical_experts=6, ep_size=2, run_id="r", scope="global", segment_steps=40
        ) as writer,
    ):
        for step in range(200):
            slots = 6 if step < 100 else 8
            placement = np.tile(np.roll(np.arange(slots) % 6, step // 50), (3, 1))
            writer.record(step, rng.poisson(50, (3, slots)), placement, num_tokens=50 * slots)
    return root


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, one with dummy steps and without some others, so that the writers' own sums do not do."""
    root = tmp_path_factory.mktemp("local")
    placements = [np.tile(np.roll(np.arange(8) % 6, shift), (3, 1)) for shift in (0, 1)]
    with steady_clock(50):
        for rank in range(2):
            rng = np.random.default_rng(rank)
            with ExpertLoadWriter(
                root, model="m", num_logical_experts=6, ep_size=2, ep_rank=rank, run_id="r", segment_steps=40
            ) as writer:
                for step in range(200):
                    if rank and step % 7 == 0:
                        writer.skip("dummy", step=step)
                    elif not rank or step % 31:
                        writer.record(step, rng.poisson(200, (3, 8)), placements[step >= 90])
    return root


def thinned(root: Path, to: Path, segments: int | None) -> Path:
    """A copy with only sums per rank of the first so many segments of each rank, or of all."""
    copy = Path(shutil.copytree(root, to))
    for folder in session_folders(copy):
        count = len([*folder.glob("steps-*.parquet")])
        thin_to(folder, {Tier.RANKS: range(count if segments is None else segments)})
    return copy


@pytest.fixture(scope="module")
def older_by_rank(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinned(dump, tmp_path_factory.mktemp("older") / "dump", 3)


@pytest.fixture(scope="module")
def all_by_rank(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinned(dump, tmp_path_factory.mktemp("all") / "dump", None)


def said(dump: Path, command: str, *options: str) -> Any:
    return without_times(json.loads(cli(command, *options, "--json", dump).stdout))


def assert_as_single_commands(dump: Path, steps: tuple[int, int] | None) -> Any:
    """Compare each part of the report with the command; returns the report's document."""
    document = json.loads(json.dumps(as_json(report_document(open_run(dump), steps).document)))
    chosen = [] if steps is None else ["--steps", f"{steps[0]}-{steps[1] - 1}"]
    summary = said(dump, "summary", *chosen)
    assert document["summary"] == {key: summary[key] for key in document["summary"]}
    parts: dict[str, tuple[str, ...]] = {"rearrangements": ()}
    if document["loads"] is not None:
        parts |= {"timeline": ("--bins", str(MAX_BINS)), "ranks": ()}
        experts = as_json(expert_report(open_run(dump), steps=steps).to_json())
        own = {key: value for key, value in document["experts"].items() if not key.startswith("flag")}
        assert own == {key: experts[key] for key in own}
    for command, options in parts.items():
        figures = said(dump, command, *options, *chosen)
        assert document[command] == {key: figures[key] for key in document[command]}
        assert {*figures} - {*document[command]} <= {"schema_version", "run", "steps", "notes", "retired"}
    return document


RUNS = ["dump", "without_a_rank", "elastic", "local", "older_by_rank"]


@pytest.mark.parametrize("steps", [None, (30, 90), (110, 200)])
@pytest.mark.parametrize("run", RUNS)
def test_each_part_equals_the_single_command(
    run: str, steps: tuple[int, int] | None, request: pytest.FixtureRequest
) -> None:
    document = assert_as_single_commands(request.getfixturevalue(run), steps)
    if (run, steps) != ("older_by_rank", (30, 90)):
        assert document["loads"] is not None


def test_without_experts_loads_it_shows_the_steps(all_by_rank: Path) -> None:
    document = assert_as_single_commands(all_by_rank, None)
    assert document["summary"]["tier"] == "steps"
    assert document["summary"]["steps"]["recorded"] == len(planted.complete_steps())
    assert [document[part] for part in ("timeline", "ranks", "experts", "loads")] == [None] * 4


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("run", ["local", "without_a_rank", "elastic"])
def test_loads_are_read_once(
    run: str, threads: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nothing departs from its usual balance: the loads around such an edge are read once more."""
    dump = request.getfixturevalue(run)
    reads: Counter[tuple[Path, int, int]] = Counter()
    original = ParquetSegment.loads

    def counted(segment: ParquetSegment, *which: Any) -> Iterator[tuple[int, Any]]:
        for layer, values in original(segment, *which):  # of a row group
            reads[Path(str(segment.path)), segment.seq, layer] += 1
            yield layer, values

    monkeypatch.setattr(ParquetSegment, "loads", counted)
    monkeypatch.setattr("eplb_analyze.parallel._max_workers", threads)
    report_document(open_run(dump))
    assert {(folder, seq) for folder, seq, _ in reads} == {
        (folder, int(file.stem.rpartition("-")[2]))
        for folder in session_folders(dump)
        for file in folder.glob("loads-*.parquet")
    }
    assert {*reads.values()} == {1}
