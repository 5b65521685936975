"""Kills and failing file systems: flushed steps survive, and the engine continues.

Child processes do the recording. The longer targets: `sh scripts/test.sh -m long`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_accounted, load_of, map_of, open_writer, run_child, start_child

from eplb_analyze import DumpError, open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.sessions import discovery
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.transfer.recover import recover_dump
from eplb_dump.format import journal

# ---- SIGKILL

KILLS = """
    # Forks children that record, kills each at a random moment, and prints what each had flushed.
    import mmap, os, random, signal, struct, sys, time
    import numpy as np
    from helpers import load_of, map_of, open_writer

    root, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    for number in range(count):
        shared = mmap.mmap(-1, 16)
        segment_steps = rng.choice([5, 40, 10_000])
        pause = rng.choice([0, 0, 0.0003, 0.002])
        pid = os.fork()
        if pid == 0:
            writer = open_writer(f"{root}/{number}", scope="global", segment_steps=segment_steps,
                                 flush_interval=rng.choice([0.02, 1.0]), queue_steps=4096)
            every = rng.choice([7, 50, 300])
            step = 0
            while True:
                writer.record(step, load_of(step), map_of(step // 30))
                step += 1
                shared[8:16] = struct.pack("<q", step)
                if step % every == 0 and writer.flush():
                    shared[:8] = struct.pack("<q", step)
                if pause:
                    time.sleep(pause)
        # Most children are killed while they record, some before they begin.
        while rng.random() > 0.01 and shared[8:16] == bytes(8):
            time.sleep(0.001)
        time.sleep(rng.random() ** 2 * 0.25)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(number, *struct.unpack("<qq", shared[:]))
"""


def killed_runs(root: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """``(dump, steps flushed, steps recorded)`` of killed children."""
    for line in run_child(KILLS, root, str(count), str(seed), timeout=1200).splitlines():
        number, flushed, seen = map(int, line.split())
        yield root / str(number), flushed, seen


def assert_exact_prefix(root: Path, flushed: int, seen: int) -> int:
    """Check that all steps from 0 on are read without gaps, including every flushed one."""
    try:
        run = open_run(root)
    except DumpError as error:  # killed before its first write
        text = str(error)
        assert any(t in text for t in ("no such folder", "no run in it", "nothing readable")), text
        assert flushed == 0
        return 0
    frame = run.loads()
    states = run.steps()
    errors = [f for f in run.findings if f.severity == "error"]
    assert errors == []
    # A step can be dropped when the queue is full, but it is never silently absent.
    assert states["step"].to_list() == list(range(len(states)))
    assert set(states["state"].to_list()) <= {"recorded", "dropped"}
    assert flushed <= len(states) <= seen + 1
    recorded = states.filter(states["state"] == "recorded")["step"].to_list()
    assert frame["step"].unique(maintain_order=True).to_list() == recorded
    found = np.array(frame["load"].to_list()).reshape(len(recorded), *load_of(0).shape)
    for i, step in enumerate(recorded):
        assert np.array_equal(found[i], load_of(step)), step
        if i in (0, len(recorded) - 1):
            slots = run.placement(step)["logical"].to_numpy().reshape(map_of().shape)
            assert np.array_equal(slots, map_of(step // 30)), step
    return len(states)


def kill_and_judge(tmp_path: Path, count: int, seed: int) -> None:
    survived = 0
    for root, flushed, seen in killed_runs(tmp_path, count, seed):
        survived += assert_exact_prefix(root, flushed, seen)
        shutil.rmtree(root, ignore_errors=True)
    assert survived > count  # the test is about something


@pytest.mark.parametrize("seed", range(4))
def test_hundred_kills_lose_no_flushed_step(tmp_path: Path, seed: int) -> None:
    kill_and_judge(tmp_path, 25, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_thousand_kills_lose_no_flushed_step(tmp_path: Path, seed: int) -> None:
    kill_and_judge(tmp_path, 100, seed)


def test_kill_without_flush_loses_at_most_one_interval(tmp_path: Path) -> None:
    script = """
        import sys, time
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", flush_interval=0.5)
        for step in range(100_000):
            writer.record(step, load_of(step), map_of())
            print(step, time.monotonic(), flush=True)
            time.sleep(0.005)
    """
    with start_child(script, tmp_path) as child:
        time.sleep(2.5)
        now = time.monotonic()
        child.kill()
        assert child.stdout is not None
        recorded = [line.split() for line in child.stdout.read().splitlines() if line.count(" ") == 1]
        child.wait()
    last = open_run(tmp_path).steps()["step"].max()
    assert isinstance(last, int)
    lost = [float(moment) for step, moment in recorded if int(step) > last and "." in moment]
    # One interval, and the time a busy machine may need to run the thread.
    assert all(moment > now - 0.5 - 0.5 for moment in lost)
    assert last > 50


def test_seal_recovers_journals_of_killed_writer(tmp_path: Path) -> None:
    (root, _, _), *_ = sorted(killed_runs(tmp_path, 6, 42), key=lambda r: -r[1])
    before = open_run(root)
    loads, placements = before.loads(), before.placements()
    report = recover_dump(root)
    assert [s.code for s in report.skipped] == []
    assert len(report.sealed) >= 1
    for left in root.rglob("journal-*"):  # the kill came at its first write
        with pytest.raises(journal.UnbegunJournal):
            journal.JournalSegment(left)
    after = open_run(root)
    assert after.loads().equals(loads)
    assert after.placements().equals(placements)
    assert recover_dump(root).sealed == []
    assert "unsealed_journal" not in {f.code for f in check_run(after).findings}


def test_seal_skips_live_writer(tmp_path: Path) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global")
        for step in range(5):
            writer.record(step, load_of(step), map_of())
        assert writer.flush()
        print("ready", flush=True)
        sys.stdin.read()
        for step in range(5, 9):
            writer.record(step, load_of(step), map_of())
        assert writer.close()
    """
    with start_child(script, tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        report = recover_dump(tmp_path)
        assert [s.code for s in report.skipped] == ["in_use"]
        assert report.sealed == []
        _, err = child.communicate("", timeout=30)
    assert (child.returncode, err) == (0, "")
    assert len(open_run(tmp_path).steps()) == 9


# ---- failing file systems, real ones if they can be mounted


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Any]:
    """Mount a small file system at a folder; skip the test if that is not allowed."""
    mounted: list[Path] = []

    def mounter(kind: str, megabytes: int) -> Path:
        where = tmp_path / "mounted"
        where.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
        else:
            image = tmp_path / "image"
            with image.open("wb") as file:
                file.truncate(megabytes << 20)
            mkfs = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"  # the PATH of a user lacks /sbin
            if not Path(mkfs).exists():
                pytest.skip("there is no mkfs.ext4 (Debian, Ubuntu: apt-get install e2fsprogs)")
            made = subprocess.run([mkfs, "-q", str(image)], capture_output=True, check=False)
            if made.returncode:
                pytest.skip("no ext4 can be made here")
            command = ["mount", "-o", "loop", str(image), str(where)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(where)
        return where

    yield mounter
    for where in mounted:
        subprocess.run(["umount", "-l", str(where)], check=False)


def test_full_disk_does_not_stop_engine(mount: Any) -> None:
    root = mount("tmpfs", 2)
    script = """
        import logging, sys
        import numpy as np
        from helpers import assert_accounted, open_writer
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        rng = np.random.default_rng(0)
        placement = np.tile(np.arange(64), (10, 1))
        writer = open_writer(sys.argv[1], scope="global", num_logical_experts=64, segment_steps=50)
        for step in range(3000):
            writer.record(step, rng.integers(0, 60000, (10, 64)), placement)
            if step % 50 == 49:
                writer.flush()
        assert not writer.flush()
        stats = writer.stats()
        assert_accounted(stats)
        assert (stats.paused, stats.off) == ("No space left on device", None), stats
        writer.close()
        stats = writer.stats()
        assert_accounted(stats)
        assert "No space left" in stats.off, stats
        assert stats.seen == 3000 and 0 < stats.recorded < 3000, stats
        print("recorded", stats.recorded)
    """
    out = run_child(script, root)
    for text in "recording is paused", "recording is off":
        assert len([line for line in out.splitlines() if text in line]) == 1, out
    recorded = int(out.split("recorded ")[-1])
    run = open_run(root)
    rng = np.random.default_rng(0)
    truth = [rng.integers(0, 60000, (10, 64)) for _ in range(3000)]
    frame = run.loads()
    steps = frame["step"].unique(maintain_order=True).to_list()
    assert len(steps) == recorded
    found = np.array(frame["load"].to_list()).reshape(len(steps), 10, 64)
    np.testing.assert_array_equal(found, np.stack([truth[step] for step in steps]))
    assert [f for f in run.findings if f.severity == "error"] == []


def test_hanging_file_system_does_not_stop_engine(mount: Any) -> None:
    root = mount("ext4", 16)
    script = """
        import sys, time
        from helpers import assert_accounted, load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", queue_steps=50, flush_interval=0.1)
        writer.record(None, load_of(0), map_of())
        assert writer.flush()
        print("ready", flush=True)
        sys.stdin.readline()
        # The parent thaws only after it has read "hung": a record that waited would wait forever.
        for step in range(1, 400):
            writer.record(None, load_of(step), map_of())
            time.sleep(0.005)
        during = writer.stats()
        assert during.dropped > 0 and during.off is None, during
        print("hung", flush=True)
        sys.stdin.readline()
        assert writer.flush(30)
        for step in range(400, 410):
            writer.record(None, load_of(step), map_of())
        assert writer.close(30)
        stats = writer.stats()
        assert_accounted(stats)
        print(stats.recorded, stats.dropped)
    """
    with start_child(script, root) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        subprocess.run(["fsfreeze", "-f", str(root)], check=True)
        try:
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "hung\n"
        finally:
            subprocess.run(["fsfreeze", "-u", str(root)], check=True)
        out, err = child.communicate("\n", timeout=60)
    assert (child.returncode, "queue is full" in err, "Traceback" in err) == (0, True, False), err
    recorded, dropped = map(int, out.split())
    states = open_run(root).steps()
    assert states["state"].value_counts().rows_by_key("state") == {
        "recorded": [(recorded,)],
        "dropped": [(dropped,)],
    }
    # It recovered: the steps after the hang were written.
    assert states["state"][-10:].to_list() == ["recorded"] * 10


def test_lost_permission_does_not_stop_engine(tmp_path: Path) -> None:
    """As another user, as root may write everywhere."""
    script = """
        import logging, os, sys
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        from helpers import assert_accounted, load_of, map_of, open_writer
        os.setegid(65534); os.seteuid(65534)
        writer = open_writer(sys.argv[1], scope="global", segment_steps=10)
        for step in range(100):
            writer.record(step, load_of(step), map_of())
            if step == 54:
                assert writer.flush()
                os.chmod(writer.folder, 0o500)
        writer.flush()
        stats = writer.stats()
        assert_accounted(stats)
        assert "Permission denied" in stats.off, stats
        writer.close()
        print("recorded", stats.recorded)
    """
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    root = tmp_path / "dump"
    root.mkdir()
    shutil.chown(root, 65534, 65534)
    for parent in [root, *root.parents][:-2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    out = run_child(script, root)
    assert out.count("recording is off") == 1, out
    recorded = int(out.split("recorded ")[-1])
    assert 55 <= recorded < 100
    assert len(open_run(root).loads(layers=[0])) == recorded


# ---- the engine's life


def test_sigterm_with_engine_shutdown_writes_everything(tmp_path: Path) -> None:
    """The writer installs no handler; an engine whose handler exits normally loses nothing."""
    script = """
        import signal, sys, time
        from helpers import load_of, map_of, open_writer
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        writer = open_writer(sys.argv[1], scope="global", flush_interval=60.0)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if sys.argv[2] == "handler":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        for step in range(20):
            writer.record(step, load_of(step), map_of())
        print("ready", flush=True)
        time.sleep(60)
    """
    for kind, code in (("handler", 0), ("default", -signal.SIGTERM)):
        root = tmp_path / kind
        with start_child(script, root, kind) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.terminate()
            _, err = child.communicate(timeout=20)
        assert (child.returncode, err) == (code, "")
        if kind == "handler":
            assert len(open_run(root).steps()) == 20
            run = open_run(root)
            assert {s.closed is None for s in run.sessions} == {False}


def test_engine_exception_between_records_loses_nothing(tmp_path: Path) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", flush_interval=60.0)
        for step in range(20):
            writer.record(step, load_of(step), map_of())
        raise RuntimeError("the engine's own fault")
    """
    with start_child(script, tmp_path) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert err.strip().endswith("RuntimeError: the engine's own fault")
    assert len(open_run(tmp_path).steps()) == 20


def test_wall_clock_jump_keeps_steps_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps keep their order by number; the monotonic column has the true intervals."""
    real = time.time_ns
    with open_writer(tmp_path, scope="global", flush_interval=0.05) as writer:
        for step in range(20):
            if step == 10:
                monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
            writer.record(step, load_of(step), map_of())
    monkeypatch.undo()
    run = open_run(tmp_path)
    assert run.steps()["step"].to_list() == list(range(20))
    document = summarize(run).to_json()
    assert document["steps"]["recorded"] == 20
    assert 0 <= document["duration_seconds"] < 60
    walls = run.steps()["time"].to_list()
    assert walls[10] < walls[9]


@pytest.mark.parametrize("at_once", [False, True])
def test_two_processes_of_one_rank_write_two_sessions(tmp_path: Path, at_once: bool) -> None:
    script = """
        import sys
        from helpers import load_of, map_of, open_writer
        with open_writer(sys.argv[1], scope="global") as writer:
            for step in range(30):
                writer.record(step, load_of(step, rank=int(sys.argv[2])), map_of())
                if step in (0, 28):
                    print(step, flush=True)
                    sys.stdin.readline()
            writer.flush()
    """
    children = []

    def start(number: int) -> None:
        child = start_child(script, tmp_path, str(number))
        assert child.stdout is not None
        assert child.stdout.readline() == "0\n"
        children.append(child)

    def end(child: subprocess.Popen[str]) -> None:
        assert (child.communicate("\n\n", timeout=60), child.returncode) == (("28\n", ""), 0)

    start(0)
    if not at_once:
        end(children[0])
    start(1)
    for child in children[0 if at_once else 1 :]:
        end(child)
    assert len(list(tmp_path.glob("run=*/model=*/rank=*/session=*/session.json"))) == 2
    if at_once:  # two engines, not a restart
        with pytest.raises(DumpError, match="two engines recorded rank 0 at the same time"):
            open_run(tmp_path)
        return
    run = open_run(tmp_path)
    rows = run.loads()["load"].to_list()
    assert rows == [load_of(step, rank=1)[i].tolist() for step in range(30) for i in range(3)]
    # It took the same steps again: another start of the engine, of which the newest is read.
    assert "several_starts" in {f.code for f in check_run(run).findings}


def test_run_is_readable_while_it_is_written(tmp_path: Path) -> None:
    """Every read sees a complete prefix, while steps are being written and segments sealed."""
    script = """
        import sys
        from helpers import load_of, map_of, open_writer
        writer = open_writer(sys.argv[1], scope="global", segment_steps=8, flush_interval=0.01)
        print("ready", flush=True)
        for step in range(400):
            if step % 40 == 0:
                sys.stdin.readline()
            writer.record(step, load_of(step), map_of(step // 100))
            if step % 10 == 9:
                assert writer.flush(120), writer.stats()
            if step % 40 == 39:
                print(step, flush=True)
        # With 50 segments and a sync of each file, this takes long on a busy disk.
        assert writer.close(240), writer.stats()
    """

    def read(least: int) -> None:
        try:
            run = open_run(tmp_path)
        except DumpError as error:
            assert least == 0
            assert "nothing readable" in str(error)
            return
        steps = run.steps()["step"].to_list()
        assert steps == list(range(len(steps)))
        frame = run.loads()
        assert [f for f in run.findings if f.severity == "error"] == []
        assert frame["step"].unique(maintain_order=True).to_list() == steps
        assert frame["load"].to_list() == [row.tolist() for s in steps for row in load_of(s)]
        assert len(steps) >= least

    with start_child(script, tmp_path) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for flushed in range(0, 400, 40):
            child.stdin.write("\n")
            child.stdin.flush()
            read(least=flushed)  # while the next 40 are being written
            assert child.stdout.readline() == f"{flushed + 39}\n"
        while child.poll() is None:
            read(least=400)  # while the last segments are being sealed
        assert (child.communicate(), child.returncode) == (("", ""), 0)
    stats = open_run(tmp_path).sessions[0].closed
    assert stats is not None
    assert len(open_run(tmp_path).steps()) == 400


def test_segments_sealed_while_session_is_opened_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment began and another was sealed between two listings: no gap appears between them."""
    with open_writer(tmp_path, scope="global", segment_steps=8) as writer:

        def write(first: int, end: int) -> None:
            for step in range(first, end):
                assert writer.record(step, load_of(step), map_of()) > 0
            assert writer.flush()

        write(0, 20)
        sizes = discovery._sizes
        read_manifest = discovery.read_manifest

        def then_write(folder: StoragePath) -> dict[str, int] | None:
            found = sizes(folder)
            write(20, 28)  # a journal begins that the listing has not
            return found

        def write_before(*arguments: Any) -> Any:
            write(28, 60)  # it is sealed, and so are others that no listing has
            return read_manifest(*arguments)

        monkeypatch.setattr(discovery, "_sizes", then_write)
        monkeypatch.setattr(discovery, "read_manifest", write_before)
        run = open_run(tmp_path)
        steps = run.steps()["step"].to_list()
        assert steps == list(range(len(steps)))
        assert len(steps) >= 20
        assert [f for f in run.findings if f.severity == "error"] == []
        monkeypatch.undo()
        assert len(open_run(tmp_path).steps()) == 60


def test_missing_last_segment_is_reported(tmp_path: Path) -> None:
    with open_writer(tmp_path, scope="global", segment_steps=8) as writer:
        for step in range(40):
            writer.record(step, load_of(step), map_of())
    for path in writer.folder.glob("*-000004.parquet"):
        path.unlink()
    run = open_run(tmp_path)
    assert len(run.steps()) == 32
    assert "damaged_file" in {f.code for f in check_run(run).findings}


@pytest.mark.parametrize("size", [0, 1, 16, 100])
def test_journal_without_complete_first_frame_is_not_damage(tmp_path: Path, size: int) -> None:
    """Read between the creation of the journal and the end of its first write."""
    with open_writer(tmp_path, scope="global") as writer:
        writer.record(0, load_of(0), map_of())
    session = writer.folder
    frame = journal.session_frame(writer.info, 1)
    (session / "journal-000001.frames").write_bytes(frame[:size])
    run = open_run(tmp_path)
    assert [f.code for f in run.findings if f.severity != "info"] == []
    assert run.steps()["step"].to_list() == [0]
    assert recover_dump(tmp_path).skipped == []


def test_manifest_holds_final_accounting(tmp_path: Path) -> None:
    with open_writer(tmp_path, scope="global") as writer:
        for step in range(10):
            writer.record(step, load_of(step), map_of())
        writer.skip()
        writer.record(None, load_of(0) - 5000, map_of())
    assert_accounted(writer.stats())
    closed = open_run(tmp_path).sessions[0].closed
    assert closed is not None
    stats: Any = closed["stats"]
    assert (stats["seen"], stats["recorded"], stats["dummy"], stats["rejected"]) == (12, 10, 1, 1)
