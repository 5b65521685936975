"""`watch` follows real writers in real processes; its figures are those of `summary`."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    LAYERS,
    SLOTS,
    assert_golden,
    cli,
    load_of,
    map_of,
    one_error,
    open_writer,
    start_child,
    write,
)

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.cli.views.watch import lines
from eplb_analyze.live.watch import Follower, Snapshot
from eplb_analyze.reader.join import StepState
from eplb_analyze.transfer.recover import recover_dump
from eplb_dump import ExpertLoadWriter
from eplb_dump.format.schema import MANIFEST_FILE

RANK = """
    import sys
    from helpers import load_of, map_of, open_writer
    root, rank, options = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
    wide = options.pop("wide", {})
    writer = open_writer(root, ep_rank=rank, **options)
    for line in sys.stdin:
        word, first, last, generation = line.split()
        for step in range(int(first), int(last)):
            if word == "record":
                load, slots = load_of(step, rank, **wide), map_of(int(generation), **wide)
                writer.record(step, load, slots)
            elif word == "reject":
                writer.record(step, -load_of(step, rank), None)
            else:
                writer.skip("dummy", step)
        assert writer.close(20) if word == "close" else writer.flush(20)
        print("done", flush=True)
"""


class Rank:
    """A rank of an engine in its own process. It runs one command at a time and flushes after each."""

    def __init__(self, root: Path, rank: int, **options: Any) -> None:
        self.process = start_child(RANK, root, rank, repr(options))

    def command(self, word: str, first: int = 0, last: int = 0, generation: int = 0) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(word, first, last, int(generation), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n", self.process.communicate()[1]

    def record(self, first: int, last: int, generation: int = 0) -> None:
        self.command("record", first, last, generation)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Any]:
    """A function that starts ranks. They are killed after the test."""
    started: list[Rank] = []

    def start(rank: int, **options: Any) -> Rank:
        started.append(Rank(tmp_path, rank, **options))
        return started[-1]

    yield start
    for rank in started:
        rank.kill()


def assert_as_summary(look: Snapshot, root: Path) -> None:
    """Assert that the figures equal those of the reports over the same steps of the files."""
    assert look.first_step is not None
    assert look.last_step is not None
    steps = look.first_step, look.last_step + 1
    run = open_run(root)
    truth = summarize(run, steps)
    assert look.complete == truth.steps.count(StepState.RECORDED)
    spreads = [vars(spread).copy() for spread in (look.balancedness, truth.spreads["balancedness"])]
    assert [spread.pop("percentile_error") for spread in spreads] == [None, None]  # of steps
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-12)
    assert look.idle_fraction == pytest.approx(truth.idle_fraction, rel=1e-12)
    assert [vars(a) for a in look.layers] == [
        pytest.approx({name: getattr(b, name) for name in vars(a)}, rel=1e-12)
        for a, b in zip(look.layers, truth.layers, strict=True)
    ]
    for rank, straggler in zip(look.ranks, rank_report(run, steps).ranks, strict=True):
        figures = straggler.times_mean, straggler.slowest_share, straggler.excess_share
        shown = rank.times_mean, rank.slowest_share, rank.excess_share
        assert [*shown] == [None if f is None else pytest.approx(f, rel=1e-12) for f in figures]


def view(look: Snapshot, quiet_seconds: float = 0.0) -> str:
    """The text on an 80 × 24 terminal, as if data was last appended ``quiet_seconds`` ago."""
    return "\n".join(map(str, lines(replace(look, quiet_seconds=quiet_seconds), 80, 24)))


def sealed(root: Path, rank: int, count: int) -> None:
    """Wait until a rank has sealed ``count`` segments and deleted their journals."""
    for _ in range(200):
        folder = next(root.glob(f"run=*/model=*/rank=*{rank}/session=*"))
        if len([*folder.glob("steps-*.parquet")]) >= count and len([*folder.glob("journal-*")]) <= 1:
            return
        time.sleep(0.05)
    raise AssertionError("it was not sealed")


def bytes_read() -> int:
    """The bytes that this process has read, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


# ---- following


def test_every_look_agrees_with_the_files_while_a_run_is_written_and_sealed(
    tmp_path: Path, ranks: Any
) -> None:
    """There are many segments, and the ranks write in turn."""
    engine = [ranks(rank, segment_steps=16) for rank in range(2)]
    follower: Follower | None = None
    for first in range(0, 120, 12):
        for rank in engine:
            rank.record(first, first + 12, generation=first // 60)
        follower = follower or Follower(tmp_path, window=50)
        look = follower.look()
        assert (look.newest_step, look.last_step) == (first + 11, first + 11)
        assert look.complete == min(50, first + 12)
        assert (look.incomplete, look.in_flight, look.findings) == (0, 0, [])
        assert_as_summary(look, tmp_path)
    assert look.rearrangements == [60]
    assert not look.closed
    for rank in engine:
        rank.command("close")
    ended = follower.look()
    assert ended.closed
    assert ended.timeline == look.timeline
    assert_as_summary(ended, tmp_path)


def test_rearrangement_has_the_figures_of_the_rearrangements_report(tmp_path: Path, ranks: Any) -> None:
    """The steps before it are no longer in the window, but their balancedness is still known."""
    rank = ranks(0, ep_size=2, scope="global", segment_steps=32)
    rank.record(0, 30)
    follower = Follower(tmp_path, window=40)
    for first in range(30, 90, 10):
        rank.record(first, first + 10, generation=1)
        follower.look()
    look = follower.look()
    truth = rearrangement_report(open_run(tmp_path), window=40).rearrangements
    assert len(truth) == 1
    this = look.rearrangement
    assert this is not None
    assert (this.first_step, this.last_step, this.layers) == (30, 30, LAYERS)
    assert this.slots_changed == truth[0].slots_moved
    assert (this.before_steps, this.after_steps) == (truth[0].before.steps, truth[0].after.steps) == (30, 40)
    assert this.before == pytest.approx(truth[0].before.balancedness, rel=1e-12)
    assert this.after == pytest.approx(truth[0].after.balancedness, rel=1e-12)
    assert this.gain == pytest.approx(truth[0].gain, rel=1e-9)
    rank.record(90, 200, generation=1)  # its steps leave the window, its figures stay
    assert follower.look().rearrangement == this


def test_steps_of_a_late_rank_become_complete(tmp_path: Path, ranks: Any) -> None:
    first, second = ranks(0), ranks(1)
    first.record(0, 30)
    second.record(0, 10)
    follower = Follower(tmp_path)
    look = follower.look()
    assert (look.complete, look.in_flight, look.newest_step) == (10, 20, 29)
    assert [w.behind for w in look.writers] == [0, 20]
    second.record(10, 30)
    look = follower.look()
    assert (look.complete, look.in_flight) == (30, 0)
    assert_as_summary(look, tmp_path)


def test_step_is_complete_if_a_rank_idled(tmp_path: Path, ranks: Any) -> None:
    first, second = ranks(0), ranks(1)
    for rank, words in ((first, ("record", "dummy")), (second, ("dummy", "dummy"))):
        rank.record(0, 10)
        rank.command(words[0], 10, 20)
        rank.command(words[1], 20, 30)
    look = Follower(tmp_path).look()
    assert (look.complete, look.last_step, look.newest_step) == (20, 19, 29)
    assert (look.incomplete, look.in_flight) == (0, 0)
    assert_as_summary(look, tmp_path)


def test_rejected_steps_are_counted_and_incomplete(tmp_path: Path, ranks: Any) -> None:
    first, second = ranks(0), ranks(1)
    first.record(0, 20)
    second.record(0, 10)
    second.command("reject", 10, 13)
    second.record(13, 20)
    look = Follower(tmp_path).look()
    assert (look.complete, look.incomplete) == (17, 3)
    assert [(w.rejected, w.dropped) for w in look.writers] == [(0, 0), (3, 0)]
    assert_as_summary(look, tmp_path)


def test_global_run_needs_only_one_writer(tmp_path: Path, ranks: Any) -> None:
    rank = ranks(0, ep_size=4, scope="global", token_replication=2, interval=2)
    rank.record(0, 30)
    look = Follower(tmp_path).look()
    assert (look.complete, look.last_step, len(look.ranks), len(look.writers)) == (15, 28, 4, 1)
    assert_as_summary(look, tmp_path)


# ---- restarts, kills, changes


@pytest.mark.parametrize("segment_steps", [2048, 2])
def test_killed_rank_counts_as_stopped(tmp_path: Path, ranks: Any, segment_steps: int) -> None:
    """It depends on the time since its last step, not on the size of the window."""
    engine = [ranks(rank, segment_steps=segment_steps) for rank in range(2)]
    for rank in engine:
        rank.record(0, 20)
    follower = Follower(tmp_path)
    assert follower.look().complete == 20
    engine[1].kill()
    for first in range(20, 28):  # two steps per second by the clock of rank 0
        time.sleep(0.5)
        engine[0].record(first, first + 1)
    if segment_steps == 2:
        sealed(tmp_path, 0, 13)
    for look in (follower.look(), Follower(tmp_path).look()):
        assert (look.complete, look.last_step, look.current) == (20, 19, False)
        assert (look.incomplete, look.in_flight) == (8, 0)
        assert [(w.stopped, w.closed) for w in look.writers] == [(False, False), (True, False)]
        text = view(look)
        assert "● live, 1 of 2 ranks" in text
        assert "last complete step 19, 8 steps ago: 0." in text
        assert " now " not in text
        assert "rank 1 stopped 8 steps ago, at step 19" in text
    for window in (1, 2, 5):
        look = Follower(tmp_path, window=window).look()
        assert (look.complete, look.incomplete, look.in_flight) == (0, window, 0)
        assert [w.stopped for w in look.writers] == [False, True]


@pytest.mark.parametrize("looks", [1, 3])
def test_rank_that_the_engine_continues_without_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Rank 1 of 3 dies at step 20 and is back at 40; rank 2 stops recording at 30, and serves on."""
    monkeypatch.setattr("eplb_analyze.live.watch.STOPPED_SECONDS", 0.0)
    loads = np.random.default_rng(1).integers(60, 90, (50, 3, 2, 6))
    loads[20:40, :, :, 2:4] = 0
    placement = np.tile(np.arange(6), (2, 1))
    options: dict[str, Any] = {"model": "m", "num_logical_experts": 6, "ep_size": 3, "run_id": "r"}
    writers = {rank: ExpertLoadWriter(tmp_path, ep_rank=rank, **options) for rank in range(3)}

    def record(first: int, end: int, *ranks: int) -> None:
        for step in range(first, end):
            for rank in ranks:
                if rank not in writers:
                    writers[rank] = ExpertLoadWriter(tmp_path, ep_rank=rank, **options)
                writers[rank].record(step, loads[step, rank], placement)
        assert all(writer.flush(60) for writer in writers.values())

    def balancedness(steps: range, ranks: list[int]) -> float:
        T = loads[steps, :][:, ranks].sum(axis=1).reshape(len(steps), 2, 3, 2).sum(axis=3)[:, :, ranks]
        return float((T.mean(axis=2) / T.max(axis=2)).mean())

    follower = None
    record(0, 20, 0, 1, 2)
    chunk = 10 if looks == 1 else 5
    for first in range(20, 30, chunk):
        if looks > 1:
            follower = follower or Follower(tmp_path)
            follower.look()
        record(first, first + chunk, 0, 2)
    look = (follower or Follower(tmp_path)).look()
    assert [w.lost for w in look.writers] == [False, True, False]
    assert (look.first_step, look.complete, look.incomplete, look.in_flight) == (20, 10, 0, 0)
    assert look.balancedness.mean == pytest.approx(balancedness(range(20, 30), [0, 2]))
    assert [r.rank for r in look.ranks] == [0, 2]
    assert np.mean([r.times_mean or 0 for r in look.ranks]) == pytest.approx(1)
    assert look.shape_changed is None
    text = view(look)
    assert "rank 1 lost, last step 19: the engine continues without it" in text
    assert "stopped" not in text
    assert "● live, 2 of 3 ranks" in text

    writers.pop(1).close()
    follower = follower or Follower(tmp_path)
    follower.look()
    record(30, 40, 0)
    look = follower.look()
    assert [(w.stopped, w.lost) for w in look.writers][1:] == [(True, True), (True, False)]
    assert "rank 2 stopped" in view(look)
    record(30, 40, 2)
    record(40, 50, 0, 1, 2)
    look = follower.look()
    assert [w.lost for w in look.writers] == [False] * 3
    assert (look.first_step, look.complete, look.shape_changed) == (40, 10, None)
    assert look.balancedness.mean == pytest.approx(balancedness(range(40, 50), [0, 1, 2]))
    for writer in writers.values():
        writer.close()


def test_run_that_ends_without_its_lost_rank_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eplb_analyze.live.watch.STOPPED_SECONDS", 0.0)
    load = np.array([[500, 0]])
    for rank, steps in enumerate((20, 0)):
        with ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=2, ep_size=2, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(steps):
                writer.record(step, load, np.array([[0, 1]]))
    look = Follower(tmp_path).look()
    assert (look.closed, look.missing_ranks, look.complete) == (True, [], 20)
    assert cli("watch", "--once", tmp_path).returncode == 0


def test_rank_one_step_behind_after_an_idle_time_has_not_stopped(tmp_path: Path, ranks: Any) -> None:
    engine = [ranks(rank) for rank in range(2)]
    for rank in engine:
        rank.record(0, 20)
    time.sleep(3.5)
    engine[0].record(20, 22)
    for window in (1, 100):
        look = Follower(tmp_path, window=window).look()
        assert ([w.stopped for w in look.writers], look.incomplete) == ([False, False], 0)
    assert look.current
    assert "● live, 2 of 2 ranks" in view(look)


def test_slow_look_does_not_make_a_rank_seem_behind(
    tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks keep writing while they are read one after the other."""
    engine = [ranks(rank) for rank in range(2)]
    for rank in engine:
        rank.record(0, 20)
    read = Follower._read
    left = [*range(20, 28)]

    def slowly(follower: Follower, session: Any) -> bool:
        came = read(follower, session)
        while left:  # after the first
            time.sleep(0.5)
            step = left.pop(0)
            for rank in engine:
                rank.record(step, step + 1)
        return came

    monkeypatch.setattr(Follower, "_read", slowly)
    look = Follower(tmp_path).look()
    assert ([w.stopped for w in look.writers], look.incomplete) == ([False, False], 0)
    assert (look.complete, look.last_step) == (28, 27)


def test_rank_killed_before_the_others_closed_counts_as_stopped(tmp_path: Path, ranks: Any) -> None:
    """It counts no matter how soon the others closed, as in `check`. Closed ranks may differ by a step."""
    engine = [ranks(rank, ep_size=4) for rank in range(4)]
    for rank in engine:
        rank.record(0, 20)
    engine[2].kill()
    for rank, last in ((0, 25), (1, 24), (3, 25)):
        engine[rank].record(20, last)
    follower = Follower(tmp_path)
    look = follower.look()
    assert ([w.stopped for w in look.writers], look.in_flight) == ([False] * 4, 5)
    assert "● live, 4 of 4 ranks" in view(look)
    for rank in (0, 1, 3):
        engine[rank].command("close")
    for look in (follower.look(), Follower(tmp_path, window=2).look()):
        assert [w.stopped for w in look.writers] == [False, False, True, False]
        assert [w.closed for w in look.writers] == [True, True, False, True]
        assert (look.in_flight, look.closed) == (0, False)
        for quiet in (0.0, 14.0):
            text = view(look, quiet)
            assert "■ 3 of 4 ranks ended" in text
            assert "rank 2 stopped 5 steps ago, at step 19" in text
    assert "rank_stopped" in [f.code for f in check_run(open_run(tmp_path)).findings]


def test_engine_that_restarts_at_step_0_clears_the_window(tmp_path: Path, ranks: Any) -> None:
    """All ranks are killed and start again at step 0 with the same run id: the new steps are shown."""
    engine = [ranks(rank, segment_steps=16) for rank in range(2)]
    for rank in engine:
        rank.record(0, 40)
    follower = Follower(tmp_path, window=30)
    assert follower.look().last_step == 39
    for rank in engine:
        rank.kill()
    first = ranks(0, segment_steps=16)
    first.record(0, 12, generation=1)
    look = follower.look()
    assert (look.complete, look.restarts) == (0, 1)
    second = ranks(1, segment_steps=16)
    second.record(0, 12, generation=1)
    look = follower.look()
    assert (look.complete, look.first_step, look.last_step, look.restarts) == (12, 0, 11, 2)
    assert [w.sessions for w in look.writers] == [2, 2]
    assert look.rearrangements == []
    assert_as_summary(look, tmp_path)
    for rank in (first, second):
        rank.record(12, 60, generation=1)
    look = follower.look()
    assert (look.complete, look.first_step, look.last_step) == (30, 30, 59)
    assert_as_summary(look, tmp_path)


def test_rank_that_restarts_at_the_next_step_keeps_the_window(tmp_path: Path, ranks: Any) -> None:
    """The same holds for a watch that starts after the restart."""
    engine = [ranks(rank, segment_steps=16) for rank in range(2)]
    for rank in engine:
        rank.record(0, 40)
    follower = Follower(tmp_path, window=30)
    follower.look()
    engine[1].kill()
    engine[0].record(40, 50)
    ranks(1, segment_steps=16).record(40, 50)
    for look in (follower.look(), Follower(tmp_path, window=30).look()):
        assert (look.complete, look.first_step, look.last_step, look.restarts) == (30, 20, 49, 0)
        assert_as_summary(look, tmp_path)


def test_recovering_a_killed_run_does_not_change_the_figures(tmp_path: Path, ranks: Any) -> None:
    engine = [ranks(rank) for rank in range(2)]
    for rank in engine:
        rank.record(0, 40)
    follower = Follower(tmp_path)
    look = follower.look()
    for rank in engine:
        rank.kill()
    assert len(recover_dump(tmp_path).sealed) == 2
    again = follower.look()
    assert (again.complete, again.timeline, again.findings) == (40, look.timeline, [])
    assert_as_summary(again, tmp_path)


def test_change_of_ep_size_clears_the_window(tmp_path: Path) -> None:
    """EP size 2 becomes 4. Late steps with the old size do not enter the new window."""
    slots = map_of()
    writers = {rank: open_writer(tmp_path, ep_rank=rank) for rank in range(2)}
    for step in range(20):
        for rank in range(2):
            if (rank, step) < (1, 15):
                writers[rank].record(step, load_of(step, rank), slots)
    assert all(w.flush(20) for w in writers.values())
    follower = Follower(tmp_path)
    assert follower.look().complete == 15
    for step in range(15, 20):
        writers[1].record(step, load_of(step, 1), slots)
    writers |= {rank: open_writer(tmp_path, ep_rank=rank, ep_size=4) for rank in (2, 3)}
    for step in range(20, 33):
        for rank, writer in writers.items():
            writer.record(step, load_of(step, rank), slots, ep_size=4)
    assert all(w.flush(20) for w in writers.values())
    look = follower.look()
    assert (look.complete, look.first_step, look.ep_size, look.shape_changed) == (13, 20, 4, 20)
    assert (look.incomplete, look.in_flight, len(look.writers)) == (0, 0, 4)
    assert_as_summary(look, tmp_path)
    assert all(w.close(20) for w in writers.values())


def test_ranks_that_left_before_the_window_are_ignored(tmp_path: Path) -> None:
    """EP size 4 became 2 more than a window ago, and the watch starts only now."""
    slots = map_of()
    writers = [open_writer(tmp_path, ep_rank=rank, ep_size=4, segment_steps=32) for rank in range(4)]
    for step in range(200):
        ep_size = 4 if step < 60 else 2
        for rank in range(ep_size):
            writers[rank].record(step, load_of(step, rank), slots, ep_size=ep_size)
    assert all(w.close(20) for w in writers)
    look = Follower(tmp_path, window=100).look()
    assert (look.ep_size, look.complete, look.first_step) == (2, 100, 100)
    assert (look.incomplete, look.in_flight, len(look.writers)) == (0, 0, 2)
    assert [w.rank for w in look.writers if w.stopped] == []


@pytest.mark.parametrize("what", ["dummy", "dropped"])
def test_idle_engine_keeps_its_figures(tmp_path: Path, what: str) -> None:
    writers = [open_writer(tmp_path, ep_rank=rank, segment_steps=32) for rank in range(2)]
    for step in range(400):
        for rank, writer in enumerate(writers):
            if step < 80:
                writer.record(step, load_of(step, rank), map_of())
            else:
                writer.skip(what, step)
    assert all(w.close(20) for w in writers)
    look = Follower(tmp_path, window=50).look()
    assert (look.complete, look.first_step, look.last_step) == (50, 30, 79)


def test_pipe_in_place_of_the_manifest_is_an_error(tmp_path: Path) -> None:
    with open_writer(tmp_path, ep_size=1) as writer:
        writer.record(0, load_of(0), map_of(), ep_size=1)
    manifest = next(tmp_path.rglob(MANIFEST_FILE))
    manifest.unlink()
    os.mkfifo(manifest)
    out = cli("watch", "--once", tmp_path)
    assert out.returncode == 3
    assert "not a regular file" in " ".join(out.stderr.split())


def test_follower_moves_on_to_a_newer_run(tmp_path: Path) -> None:
    follower: Follower | None = None
    for name, steps in (("b", 5), ("a", 7)):
        with open_writer(tmp_path, scope="global", run_id=name) as writer:
            for step in range(steps):
                writer.record(step, load_of(step), map_of())
            assert writer.flush(20)
            follower = follower or Follower(tmp_path)
            look = follower.look()
            assert (look.run_id, look.complete) == (name, steps)
    assert (Follower(tmp_path, run="b").look().run_id) == "b"
    assert (Follower(tmp_path / "run=b").look().run_id) == "b"


@pytest.mark.parametrize("seed", range(8))
def test_random_order_of_writes_and_looks_agrees_with_the_files(tmp_path: Path, seed: int) -> None:
    """Random ranks write random numbers of steps, with short segments, idle steps and looks in between."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 5))
    options: dict[str, Any] = {"ep_size": size, "segment_steps": int(rng.integers(3, 20))}
    slots = SLOTS if SLOTS % size == 0 else 6
    writers = [open_writer(tmp_path, ep_rank=rank, **options) for rank in range(size)]
    at = [0] * size
    follower: Follower | None = None
    for _ in range(40):
        rank = int(rng.integers(size))
        for _ in range(int(rng.integers(1, 12))):
            if rng.random() < 0.1:
                writers[rank].skip("dummy", at[rank])
            else:
                load = load_of(at[rank], rank, slots=slots)
                writers[rank].record(at[rank], load, map_of(at[rank] // 30, slots=slots))
            at[rank] += 1
        assert writers[rank].flush(20)
        if rng.random() < 0.4:
            follower = follower or Follower(tmp_path, window=25)
            look = follower.look()
            if look.complete:
                assert_as_summary(look, tmp_path)
    for rank, writer in enumerate(writers):
        for step in range(at[rank], max(at)):
            writer.record(step, load_of(step, rank, slots=slots), map_of(step // 30, slots=slots))
        assert writer.close(20)
    watched, fresh = (follower or Follower(tmp_path, window=25)).look(), Follower(tmp_path, window=25).look()
    for look in (watched, fresh):
        assert (look.findings, look.incomplete, look.in_flight, look.closed) == ([], 0, 0, True)
        assert_as_summary(look, tmp_path)
    assert watched.timeline == fresh.timeline
    assert watched.ranks == fresh.ranks


def test_sealing_during_a_look_loses_nothing(tmp_path: Path) -> None:
    """Journals are created, sealed and deleted during looks; nothing is lost or reported as damaged."""
    writers = [open_writer(tmp_path, ep_rank=rank, segment_steps=3, flush_interval=0.02) for rank in range(2)]
    ended = threading.Event()

    def engine() -> None:
        step = 0
        while not ended.is_set():
            for rank, writer in enumerate(writers):
                writer.record(step, load_of(step, rank), map_of(step // 50))
            step += 1
            time.sleep(0.02)  # slow enough for sealing to keep up

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        while not [*tmp_path.rglob("steps-*.parquet")]:
            time.sleep(0.05)
        since_then = Follower(tmp_path, window=30)
        for _ in range(40):
            for look in (Follower(tmp_path, window=30).look(), since_then.look()):
                assert (look.findings, look.incomplete) == ([], 0)
                assert look.complete + look.in_flight <= 30
    finally:
        ended.set()
        thread.join()
        assert all(writer.close(20) for writer in writers)
    for look in (Follower(tmp_path, window=30).look(), since_then.look()):
        assert (look.complete, look.closed) == (30, True)
        assert_as_summary(look, tmp_path)


# ---- only what is new is read


def test_only_appended_bytes_are_read(tmp_path: Path, ranks: Any) -> None:
    """Every byte of a journal is read once, also when it is sealed; without new data, nothing is read."""
    wide = {"layers": 16, "slots": 256}
    rank = ranks(0, scope="global", num_logical_experts=6, segment_steps=64, wide=wide)
    rank.record(0, 8)
    follower = Follower(tmp_path, window=100)
    follower.look()
    folder = next(tmp_path.glob("run=*/model=*/rank=*/session=*"))
    a_step = 16 * 256 * 2  # the journal has 16-bit counts
    begun = bytes_read()
    for first in range(8, 264, 8):
        rank.record(first, first + 8)
        before = bytes_read()
        look = follower.look()
        assert look.last_step == first + 7
        assert bytes_read() - before >= 8 * a_step
    sealed(tmp_path, 0, 4)
    assert follower.look().findings == []
    # The manifest's entries with their sums are read, too, but no Parquet file.
    listed = (folder / "manifest.frames").stat().st_size
    spare = 5 * a_step
    assert bytes_read() - begun < 256 * a_step + listed + spare
    assert sum(f.stat().st_size for f in folder.glob("loads-*")) > spare
    before = bytes_read()
    follower.look()
    assert bytes_read() - before < 1_000


def test_first_look_at_a_long_journal_reads_only_its_end(tmp_path: Path, ranks: Any) -> None:
    wide = {"layers": 16, "slots": 256}
    rank = ranks(0, scope="global", segment_steps=10_000, wide=wide)
    for first in range(0, 600, 20):
        rank.record(first, first + 20, generation=first >= 200)
    journal = next(tmp_path.rglob("journal-*"))
    Follower(tmp_path, window=2).look()  # imports modules
    before = bytes_read()
    look = Follower(tmp_path, window=50).look()
    assert bytes_read() - before < journal.stat().st_size / 5
    assert (look.complete, look.first_step, look.last_step) == (50, 550, 599)
    # The change is known, but not the steps around it.
    assert look.rearrangements == [200]
    assert look.rearrangement is not None
    assert (look.rearrangement.before_steps, look.rearrangement.after_steps) == (0, 0)
    assert "▲ rearranged at step 200, 16 layers\n" in view(look)
    assert_as_summary(look, tmp_path)


def test_segments_created_and_sealed_between_two_looks_are_read(tmp_path: Path, ranks: Any) -> None:
    rank = ranks(0, scope="global", segment_steps=16)
    rank.record(0, 20)
    follower = Follower(tmp_path, window=500)
    assert follower.look().complete == 20
    for first in range(20, 100, 16):
        rank.record(first, first + 16)
    sealed(tmp_path, 0, 6)
    look = follower.look()
    assert (look.complete, look.last_step) == (100, 99)
    assert_as_summary(look, tmp_path)


def test_journal_sealed_during_a_look_counts_once(tmp_path: Path, ranks: Any) -> None:
    """It is deleted before it is read, and the manifest was read before it listed the segment."""
    rank = ranks(0, scope="global", segment_steps=64)
    rank.record(0, 40)
    follower = Follower(tmp_path)
    assert follower.look().complete == 40
    (session,) = follower._sessions
    read_manifest = session._read_manifest

    def then_seal() -> None:
        read_manifest()
        rank.record(40, 70)
        sealed(tmp_path, 0, 1)

    session._read_manifest = then_seal  # type: ignore[method-assign]
    assert follower.look().complete == 70
    session._read_manifest = read_manifest  # type: ignore[method-assign]
    look = follower.look()
    assert (look.complete, look.last_step, look.findings) == (70, 69, [])
    assert_as_summary(look, tmp_path)


def test_journal_deleted_by_another_machine_is_read_from_its_segment(tmp_path: Path, ranks: Any) -> None:
    """On a network file system a deleted file cannot be read further; the segment has the rest."""
    rank = ranks(0, scope="global", segment_steps=64)
    rank.record(0, 40)
    follower = Follower(tmp_path)
    assert follower.look().complete == 40
    (journal,) = follower._sessions[0]._journals.values()
    assert journal._file is not None
    rank.record(40, 70)
    sealed(tmp_path, 0, 1)
    with open(os.devnull, "wb") as unreadable:
        os.dup2(unreadable.fileno(), journal._file.fileno())
    look = follower.look()
    assert (look.complete, look.last_step, look.findings) == (70, 69, [])
    assert_as_summary(look, tmp_path)


def test_closed_run_shows_its_last_steps(tmp_path: Path) -> None:
    write(tmp_path, steps=200)
    look = Follower(tmp_path, window=40).look()
    assert (look.complete, look.first_step, look.last_step, look.closed) == (40, 160, 199, True)
    assert look.rearrangements == [20]  # its placements are in a much older segment
    assert_as_summary(look, tmp_path)


# ---- damage


def test_damage_is_reported_and_earlier_steps_are_shown(tmp_path: Path, ranks: Any) -> None:
    engine = [ranks(rank) for rank in range(2)]
    for rank in engine:
        rank.record(0, 10)
        rank.record(10, 20)
    follower = Follower(tmp_path)
    follower.look()
    engine[0].record(20, 30)
    journal = next(tmp_path.glob("run=*/model=*/rank=00000/session=*/journal-*"))
    data = bytearray(journal.read_bytes())
    data[-200] ^= 1
    journal.write_bytes(data)
    for _ in range(3):
        look = follower.look()
        assert [f.code for f in look.findings] == ["damaged_file"]
        assert str(journal) in look.findings[0].text
        assert look.complete == 20
    result = cli("watch", "--once", tmp_path)
    assert result.returncode == 3
    assert "damaged from byte" in result.stderr


# ---- the command


def steady(text: str) -> str:
    """Mask what differs between runs."""
    text = re.sub(r"[\d,.]+ steps/s", "<n> steps/s", text)
    return re.sub(r'"(steps_per_second|quiet_seconds)": [\d.]+', r'"\1": 0.0', text)


@pytest.mark.parametrize("name", ["watch.txt", "watch.json"])
def test_output_matches_the_golden_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, step_ms=50)
    form = ["--json"] if name.endswith("json") else []
    result = cli("watch", "--once", *form, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_golden(name, steady(result.stdout))


def test_missing_rank_is_reported_with_exit_code_3(tmp_path: Path) -> None:
    write(tmp_path, ranks=1)
    result = cli("watch", "--once", tmp_path)
    assert result.returncode == 3
    assert "nothing from rank 1" in result.stdout
    assert "no complete step" in result.stdout


def test_wrong_usage_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    result = cli("watch", "--once", "--refresh-seconds", "0", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--refresh-seconds" in result.stderr
    one_error(cli("watch", tmp_path), 2, "needs a terminal", "add --once")
    one_error(cli("watch", "--json", tmp_path), 2, "--json requires --once")
    one_error(cli("watch", "--once", tmp_path / "not-there"), 3, "no such folder")
    (tmp_path / "empty").mkdir()
    one_error(cli("watch", "--once", tmp_path / "empty"), 3, "no run in it")
    one_error(cli("watch", "--once", "--run", "x", tmp_path), 2, "no run 'x'")


class Terminal:
    """The real program on its own 80 × 24 terminal."""

    def __init__(self, *arguments: str | Path) -> None:
        program = Path(sys.executable).with_name("eplb-analyze")
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [str(program), *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, words: str) -> None:
        """Read until the output contains ``words``."""
        deadline = time.monotonic() + 60
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if not self.read():
                raise AssertionError(self.seen)

    def read(self) -> bool:
        """Read what is available. Returns False at the end of the output."""
        if select.select([self._master], [], [], 0.2)[0]:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # the program closed the terminal
                return False
            self.seen += data.decode(errors="replace")
        return True

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        while self.read():
            pass
        os.close(self._master)
        return self.process.wait(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_live_view_updates_and_restores_the_terminal(tmp_path: Path, ranks: Any, number: int) -> None:
    """It waits for a run and follows it. Ctrl-C restores screen and cursor and prints the last snapshot."""
    terminal = Terminal("watch", "--refresh-seconds", "0.2", tmp_path)
    terminal.until("waiting for it")
    engine = [ranks(rank) for rank in range(2)]
    for rank in engine:
        rank.record(0, 10)
    terminal.until("over 10 complete steps")
    for rank in engine:
        rank.record(10, 25)
    terminal.until("over 25 complete steps")
    assert terminal.end(number) == 0
    assert terminal.seen.count("\x1b[?1049h") == terminal.seen.count("\x1b[?1049l") == 1
    assert terminal.seen.rindex("\x1b[?25h") > terminal.seen.rindex("\x1b[?25l")
    _, left = terminal.seen.split("\x1b[?1049l")
    assert "over 25 complete steps, 0-24" in left
    assert "Traceback" not in terminal.seen


def test_live_view_waits_for_a_folder(tmp_path: Path) -> None:
    """The writer creates it later. A file is an error at once."""
    terminal = Terminal("watch", "--refresh-seconds", "0.2", tmp_path / "later")
    terminal.until("waiting for it")
    assert "no such folder" in " ".join(terminal.seen.split())
    write(tmp_path / "later")
    terminal.until("over 40 complete steps")
    assert terminal.end(signal.SIGINT) == 0
    (tmp_path / "file").touch()
    terminal = Terminal("watch", tmp_path / "file")
    terminal.until("file;")  # one word, as the message is wrapped
    assert terminal.process.wait(30) == 3


def test_json_document_has_all_figures(tmp_path: Path) -> None:
    write(tmp_path, steps=100)
    document = json.loads(cli("watch", "--once", "--json", "--window-steps", "50", tmp_path).stdout)
    assert document["run"] == {"run_id": "r", "model": "org/moe"}
    assert (document["complete"], document["first_step"], document["last_step"]) == (50, 50, 99)
    assert {b["first_step"] for b in document["timeline"]} == set(range(50, 100))
    assert [w["last_step"] for w in document["writers"]] == [99, 99]


def test_rank_closed_before_the_others_is_reported(tmp_path: Path) -> None:
    for rank in range(4):
        with open_writer(tmp_path, ep_rank=rank, ep_size=4) as writer:
            for step in range(10 if rank == 2 else 60):
                writer.record(step, load_of(step, rank), map_of())
    look = Follower(str(tmp_path)).look()
    assert [w.stopped for w in look.writers] == [False] * 4
    assert "rank 2 ended 50 steps before others, at step 9" in "\n".join(map(str, lines(look, 80)))


def test_run_with_only_rejected_steps_is_reported(tmp_path: Path) -> None:
    for rank in range(2):
        with open_writer(tmp_path, ep_rank=rank) as writer:
            for step in range(20):
                writer.record(step, -load_of(step) - 1, map_of())
    look = Follower(tmp_path).look()
    assert [w.rejected for w in look.writers] == [20, 20]
    text = "\n".join(map(str, lines(look, 80)))
    assert "nothing but rejected steps from ranks 0 and 1" in text
    assert "nothing from" not in text
    assert "40 rejected" in text
