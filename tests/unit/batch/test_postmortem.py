"""`postmortem`: the row of each run, also of long, damaged, growing and sampled runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from batches import EVEN, SKEWED, Batch, lose_metadata, postmortem, record
from clocks import steady_clock
from helpers import assert_golden, cli, one_error
from timed_run import TimedRun, write_timed

from eplb_analyze import open_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.batch.cache import ResultCache
from eplb_analyze.batch.executors import Local, WorkerDied
from eplb_analyze.batch.postmortem import rows_of
from eplb_analyze.batch.targets import find
from eplb_analyze.json_report import versioned, with_times
from eplb_analyze.reader.run import PART_STEPS
from eplb_analyze.text import duration
from eplb_dump import ExpertLoadWriter


def rows_by_id(root: Path) -> list[dict[str, Any]]:
    return sorted(postmortem(root)["runs"], key=lambda row: str(row["run_id"]))


def test_rows_hold_the_figures_of_each_run(batch: Batch) -> None:
    root, truth = batch
    rows = {row["run_id"]: row for row in postmortem(root)["runs"]}
    assert set(rows) == {*truth, "broken"}
    for name in ("bad", "good", "ranks", "long"):
        T, row = truth[name].astype(float), rows[name]
        assert row["status"] == "complete"
        assert row["steps"] == len(T)
        assert row["balancedness"] == pytest.approx((T.mean(axis=2) / T.max(axis=2)).mean())
        idle = 1 - T.mean(axis=2).sum() / T.max(axis=2).sum()
        assert row["idle_fraction"] == pytest.approx(idle)
        cost = np.array(reference.waiting(T)[1], float).sum(axis=0)
        assert row["worst_rank"] == cost.argmax()
        assert row["worst_rank_share"] == pytest.approx(cost.max() / cost.sum())
    torn = rows["torn"]
    assert torn["status"] == "incomplete"
    assert torn["faults"] == ["damaged_file", "incomplete_steps"]
    assert torn["steps"] == 60 - 16
    assert "loads-" in torn["reason"]
    assert rows["broken"]["status"] == "broken"
    assert "session.json" in rows["broken"]["reason"]
    assert rows["bad"]["config"] == {"eplb.window": 9}


def test_rows_agree_with_summary(batch: Batch) -> None:
    root, _ = batch
    for row in postmortem(root / "a", root / "long")["runs"]:
        out = cli("summary", row["dump"], "--run", row["run_id"], "--json")
        summary = json.loads(out.stdout)
        assert row["balancedness"] == summary["balancedness"]["mean"]
        assert row["idle_fraction"] == summary["idle_fraction"]
        assert row["persistent_share"] == summary["loss"]["persistent_share"]


def test_rows_are_sorted_by_lost_time_with_broken_runs_last(timed: dict[str, TimedRun], batch: Batch) -> None:
    rows = postmortem(timed["costly"].root.parent, batch.root / "a")["runs"]
    names = [row["run_id"] for row in rows]
    assert names[:2] == ["sampled", "costly"]
    assert names.index("good") < names.index("free")
    rows = postmortem(batch.root)["runs"]
    assert [row["run_id"] for row in rows if row["status"] == "broken"] == [rows[-1]["run_id"]]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TimedRun]:
    """Runs whose step times show a cost, none, and the cost in every fourth step."""
    root = tmp_path_factory.mktemp("timed")
    return {
        "costly": write_timed(root / "costly", 0.02, run_id="costly"),
        "free": write_timed(root / "free", 0.0, run_id="free"),
        "sampled": write_timed(root / "sampled", 0.01, run_id="sampled", steps=1600, interval=4),
    }


def test_lost_time_is_the_measured_cost_of_all_steps_and_ranks(timed: dict[str, TimedRun]) -> None:
    rows = {row["run_id"]: row for row in postmortem(timed["costly"].root.parent)["runs"]}
    for name in ("costly", "sampled"):
        assert rows[name]["cost_status"] == "measured"
        lost = timed[name].cost.sum() / 1e3 * timed[name].tokens.shape[2]
        assert rows[name]["lost_rank_seconds"] == pytest.approx(lost, rel=0.05)
        assert rows[name]["cost_ms_low"] < rows[name]["cost_ms_per_step"] < rows[name]["cost_ms_high"]
    assert rows["free"]["cost_status"] == "no_measurable_cost"
    assert rows["free"]["lost_rank_seconds"] == 0
    assert rows["free"]["idle_fraction"] > 0.1
    text = " ".join(cli("postmortem", timed["costly"].root.parent).stdout.split())
    assert "of GPU time lost, measured in 2 runs; no measurable cost in 1 run" in text


def test_long_run_is_read_in_parts(batch: Batch) -> None:
    parts = open_run(batch.root / "long").parts()
    assert len(parts) == 2
    assert parts[0][0] == 0
    assert parts[0][1] == parts[1][0]
    assert parts[1][1] == PART_STEPS + 3000


def test_long_run_is_broken_if_a_part_cannot_be_read(batch: Batch) -> None:
    class DiesOverSecondPart(Local):
        def map(self, work: Any, items: Any) -> Iterator[Any]:
            for item in items:
                dies = item.part is not None and item.part[0].first > 0
                yield item, WorkerDied("its worker process died") if dies else work(item)

    targets = find([str(batch.root / "a"), str(batch.root / "long")])
    rows = {row.run_id: row for row, _ in rows_of(targets, DiesOverSecondPart())}
    assert {name: row.status for name, row in rows.items()} == {
        "bad": "complete", "good": "complete", "long": "broken"
    }  # fmt: skip
    assert rows["long"].reason == "its worker process died"


def test_row_of_a_growing_long_run_is_of_one_moment(tmp_path: Path) -> None:
    """After its parts are read and before its row is made, it is rearranged and changes its EP size."""
    slots, dump = np.arange(8) % 4, tmp_path / "dump"
    with ExpertLoadWriter(
        dump, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global"
    ) as writer:

        def go_on(steps: int, ep_size: int, slots: Any) -> None:
            for step in range(steps):
                writer.record(None, np.arange(1, 9)[None], slots[None], ep_size=ep_size)
                assert step % 200 < 199 or writer.flush(60)
            assert writer.flush(60)

        class Slow(Local):
            def map(self, function: Any, items: Any) -> Iterator[Any]:
                for item in items:
                    result = function(item)
                    if item.part is not None and item.part[0].end == PART_STEPS + 500:
                        go_on(3000, 2, slots[::-1])
                        go_on(10, 4, slots)
                    yield item, result

        go_on(PART_STEPS + 500, 2, slots)
        run = open_run(dump)
        before = with_times(summarize(run).to_json(), run.clock.iso)
        cache = ResultCache(tmp_path / "saved")
        [(row, _)] = rows_of(find([str(dump)]), Slow(), cache)
    assert (row.ep_size, row.rearrangements, row.steps) == (2, 0, PART_STEPS + 500)
    summary = json.loads(cache.report_path(row, "json").read_text())
    assert summary == versioned(json.loads(json.dumps(before)))


def test_long_run_that_has_grown_is_opened_again(tmp_path: Path) -> None:
    slots, dump = np.arange(8) % 4, tmp_path / "dump"
    with ExpertLoadWriter(
        dump, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global"
    ) as writer:
        for steps in (PART_STEPS + 3000, 2 * PART_STEPS + 6000):
            while (seen := writer.stats().seen) < steps:
                writer.record(None, np.arange(1, 9)[None], slots[None])
                assert seen % 200 or writer.flush(60)
            assert writer.flush(60)
            [(row, _)] = rows_of(find([str(dump)]))
            assert row.steps == steps


def test_figures_do_not_depend_on_segments(tmp_path: Path) -> None:
    """Segments end at arbitrary steps, which must not show in any figure.

    The windows of persistent loss are 1, 128 and 1 steps.
    """
    for name, size in (("a", 4096), ("b", 1), ("c", 37)):
        record(tmp_path, name, SKEWED, steps=130, first_step=127, segment_steps=size)
    rows = rows_by_id(tmp_path)
    for name in ("persistent_share", "balancedness", "idle_fraction"):
        assert [row[name] for row in rows] == pytest.approx([rows[0][name]] * 3, rel=1e-12)
    assert all(row["step_seconds"] for row in rows)
    lengths = [json.loads(cli("summary", tmp_path, "--run", n, "--json").stdout) for n in "abc"]
    assert [summary["loss"]["window_steps"] for summary in lengths] == [128] * 3


def test_import_without_times_has_no_lost_time(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).integers(1, 99, (2, 8)))
    done = cli(
        "import",
        tmp_path / "loads.npy",
        "--model",
        "m",
        "--ep-size",
        "2",
        "--placement",
        "linear",
        tmp_path / "dump",
    )
    assert done.returncode == 0, done.stderr
    document = postmortem(tmp_path / "dump")["runs"][0]
    assert document["idle_fraction"] > 0
    assert document["lost_rank_seconds"] is document["step_seconds"] is None
    assert document["cost_status"] == "not_identifiable"
    assert "imbalance: unknown in 1 run" in cli("postmortem", tmp_path / "dump").stdout


def test_rearrangement_that_cannot_be_judged_is_not_counted(tmp_path: Path) -> None:
    """One of two rearrangements changes the EP size."""
    slots = [np.array([[0, 1, 2, 3]]), np.array([[1, 2, 3, 0]]), np.array([[3, 2, 1, 0]])]
    with ExpertLoadWriter(
        tmp_path, model="m", run_id="r", num_logical_experts=4, ep_size=2, scope="global"
    ) as writer:
        for step in range(60):
            load = np.random.default_rng(step).multinomial(400, [0.4, 0.3, 0.2, 0.1])[None]
            writer.record(step, load, slots[(step >= 20) + (step >= 40)], ep_size=2 if step < 40 else 4)
    document = postmortem(tmp_path)["runs"][0]
    assert (document["rearrangements"], document["judged"]) == (2, 1)
    row = next(line for line in cli("postmortem", tmp_path).stdout.splitlines() if line.startswith("r "))
    assert f"{document['helped']} of 1" in row


def test_runs_with_the_same_id_are_named_by_their_folders(tmp_path: Path) -> None:
    for name, routing in (("night-1", EVEN), ("night-2", SKEWED)):
        record(tmp_path / "all" / name, "monday", routing)
    record(tmp_path / "all" / "other", "tuesday", EVEN)
    shutil.copytree(tmp_path / "all/night-1", tmp_path / "all/night-3")
    lose_metadata(tmp_path / "all/night-3", None)
    lines = cli("postmortem", tmp_path / "all", env={"COLUMNS": "160"}).stdout.splitlines()
    names = [line.split()[0] for line in lines if line.endswith("complete")]
    assert names[0] == "night-2"
    assert sorted(names) == ["night-1", "night-2", "tuesday"]
    assert any(line.startswith("broken run night-3 of ") for line in lines)


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    record(tmp_path, "r", EVEN, model="evil\x1b[2J[red]", engine="\x1b]0;x\x07")
    out = cli("postmortem", tmp_path, "--group-by", "model", env={"COLUMNS": "140"})
    assert out.returncode == 0
    assert "\x1b" not in out.stdout + out.stderr
    assert "\\x1b[2J[red]" in out.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--html"], "--save"),
        (["--workers", "2"], "processes or ray"),
        (["--ray-address", "ray://x:1"], "--executor ray"),
        (["--executor", "many"], "local, processes, ray"),
    ],
)
def test_option_without_the_one_it_needs_is_rejected(tmp_path: Path, options: list[str], words: str) -> None:
    record(tmp_path, "r", EVEN)
    one_error(cli("postmortem", tmp_path, *options), 2, words)


@pytest.mark.parametrize("output", ["text", "json"])
def test_golden(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, routing in enumerate((SKEWED, EVEN)):
        with steady_clock(50):
            record(tmp_path, f"run-{i}", routing, seed=i, engine="vllm")
    monkeypatch.chdir(tmp_path)
    out = cli(
        "postmortem",
        ".",
        "gone",
        "--group-by",
        "model",
        "--baseline",
        "run-1",
        *["--json"] * (output == "json"),
    )
    assert out.returncode == 1
    assert_golden(f"postmortem.{'txt' if output == 'text' else 'json'}", out.stdout)


#: Every second step is of decode; of the other phases one has no measurable cost, and one no known cost.
PHASES = ("decode", "prefill", *["decode", "prefill"] * 29, "decode", "rare")


def test_lost_time_is_that_of_summary_and_of_the_phases_with_a_measured_cost(tmp_path: Path) -> None:
    run = write_timed(tmp_path, 0.02, phases=PHASES, slow={"prefill": 4000.0}, steps=620)
    summary = json.loads(cli("summary", tmp_path, "--json").stdout)
    cost = summary["cost"]
    assert {name: phase["status"] for name, phase in cost["phases"].items()} == {
        "decode": "measured",
        "prefill": "no_measurable_cost",
        "rare": "not_identifiable",
    }
    [row] = postmortem(tmp_path)["runs"]
    ranks = run.tokens.shape[2]
    lost = run.cost[::2].sum() / 1e3 * ranks
    assert row["lost_rank_seconds"] == summary["lost_rank_seconds"] == pytest.approx(lost, rel=0.1)
    known = 620 - cost["phases"]["rare"]["steps"]
    assert cost["ms_per_step"]["estimate"] * known / 1e3 * ranks == pytest.approx(lost, rel=0.1)
    assert (row["cost_ms_per_step"], row["cost_covers"]) == (cost["ms_per_step"]["estimate"], 0.5)
    assert (cost["measured_phases"], cost["measured_share"]) == (["decode"], 0.5)
    text = " ".join(cli("summary", tmp_path, "--full").stdout.split())
    decode = cost["phases"]["decode"]["ms_per_step"]["estimate"]
    assert f"In decode (50% of the steps), imbalance costs {decode:.1f}" in text
    assert "In prefill (48%), imbalance costs between 0 and " in text
    assert "In rare (2%), the cost is not measured: 10 steps with a usable time, but 100 are needed" in text
    assert f"GPU time lost to imbalance: {duration(summary['lost_rank_seconds'])}" in text
    text = " ".join(cli("postmortem", tmp_path).stdout.split())
    assert (
        f"{duration(row['lost_rank_seconds'])} of GPU time lost, measured in 1 run (50% of the steps)" in text
    )


def test_a_rank_that_is_lost_loses_no_time_to_imbalance(tmp_path: Path) -> None:
    """Three of four ranks serve from step 300 on; the others no longer wait for it."""
    rng = np.random.default_rng(5)
    steps, width, price, cost, rank_steps = 600, 2, 0.02, 0.0, 0
    placement = np.tile(np.arange(8), (2, 1))
    writers = [
        ExpertLoadWriter(tmp_path, model="m", num_logical_experts=8, ep_size=4, ep_rank=rank, run_id="r")
        for rank in range(4)
    ]
    for step in range(steps):
        serving = 4 if step < 300 else 3
        load = np.zeros((2, 4, width), np.int64)
        load[:, :serving] = rng.poisson(rng.uniform(20, 120, (2, serving, 1)), (2, serving, width))
        load[:, 0, 0] += 100 + load.sum(axis=(1, 2)).max() - load.sum(axis=(1, 2))
        tokens = serving * load.sum(axis=2)  # each serving rank records the same
        ms = 5 + price * tokens.max(axis=1).sum() + 0.02 * rng.normal()
        cost += price * (tokens.max(axis=1) - tokens.sum(axis=1) / serving).sum() / steps
        rank_steps += serving
        for writer_ in writers[:serving]:
            writer_.record(step, load.reshape(2, -1), placement, phase="decode", step_ms=ms)
            assert step % 100 or writer_.flush(60)
    for writer_ in writers:
        assert writer_.close(60)
    assert [one.rank for one in open_run(tmp_path).lost_ranks] == [3]
    [row] = postmortem(tmp_path)["runs"]
    assert row["lost_rank_seconds"] == pytest.approx(cost * rank_steps / 1e3, rel=0.02)
