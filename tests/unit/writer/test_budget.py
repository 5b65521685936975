"""A writer stays within its budget at every moment, and loses no step that it does not account for."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    Array,
    assert_accounted,
    assert_equal_loads,
    open_writer,
    sealed_loads,
    survived_loads,
)
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from eplb_dump import ExpertLoadWriter, background, budget
from eplb_dump.budget import (
    MAX_AGE_VARIABLE,
    MAX_BYTES_VARIABLE,
    MIN_FREE_VARIABLE,
    Retention,
)
from eplb_dump.format import retention, segment
from eplb_dump.format.manifest import Manifest
from eplb_dump.format.schema import Tier

LAYERS, SLOTS, LOGICAL, EP_SIZE = 4, 128, 96, 8
KIB = 1 << 10
SMALL_BUDGET = 2048 * KIB
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets of 2 MiB, so that a test needs few steps; and quick looks at age and free space."""
    monkeypatch.setattr(budget, "LEAST_BUDGET", 256 * KIB)
    monkeypatch.setattr(budget, "LEAST_SEGMENT", 64 * KIB)
    # Or what no longer counts in a manifest could take half of such a budget.
    monkeypatch.setattr(retention, "_WORTH_REWRITING", 8 * KIB)
    monkeypatch.setattr(background, "_RETENTION_SECONDS", 0.01)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)


def big_writer(root: Path, **options: Any) -> ExpertLoadWriter:
    return open_writer(root, **{"num_logical_experts": LOGICAL, "ep_size": EP_SIZE, **options})


def load_of(step: int, most: int = 200) -> Array:
    return np.random.default_rng(step).integers(0, most, (LAYERS, SLOTS))


def map_of(generation: int = 0) -> Array:
    return (np.arange(SLOTS) + np.arange(LAYERS)[:, None] + generation) % LOGICAL


def record(writer: ExpertLoadWriter, steps: range, most: int = 200) -> None:
    for step in steps:
        writer.record(step, load_of(step, most), map_of())
        assert step % 50 or writer.flush(60)
    assert writer.flush(60)
    session = writer._background
    until(lambda: session._journals_settled == session._journals_ended)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def files_of(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as files:
        return {file.name: file.stat().st_size for file in files}


def size_of(folder: Path) -> int:
    return sum(files_of(folder).values())


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The bytes of a folder, looked at all the time from another thread."""
    sizes: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            # What changes during a look could be counted twice, or not at all.
            with suppress(FileNotFoundError):
                found = files_of(folder)
                if found == files_of(folder):
                    sizes.append(sum(found.values()))
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        done.set()
        thread.join()


def manifest_of(writer: ExpertLoadWriter) -> Manifest:
    return retention.read_manifest(writer.folder, writer.info)


def assert_every_step_is_somewhere(writer: ExpertLoadWriter, truth: dict[int, Array]) -> None:
    """In full, exactly; or in a segment that says how many steps it had, and that is not the newest."""
    entries = sorted(manifest_of(writer).entries.values(), key=lambda entry: entry.seq)
    assert entries[-1].thinned is None
    full = [entry for entry in entries if entry.thinned is None]
    found = survived_loads(writer.folder)
    assert sum(entry.recorded for entry in entries) == writer.stats().recorded == len(truth)
    in_full = {s: load for s, load in truth.items() if any(e.first_step <= s <= e.last_step for e in full)}
    assert_equal_loads(found, in_full)
    assert writer.stats().oldest_full_step == min(in_full)
    listed = {file.name for entry in entries for file in entry.files.values()}
    assert {path.name for path in writer.folder.glob("*.parquet*")} == listed


# ---- settings


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2G", 2 * 10**9),
        ("500M", 500 * 10**6),
        ("64MiB", 64 << 20),
        ("1.5 GB", 1_500_000_000),
        ("2gi", 2 << 30),
        ("70000000", 70_000_000),
        (70_000_000, 70_000_000),
        (np.int64(70_000_000), 70_000_000),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert Retention.of(text, None, text) == Retention(size, None, size)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7d", 604_800),
        ("12h", 43_200),
        ("90m", 5_400),
        ("1.5s", 1.5),
        ("2W", 1_209_600),
        ("60", 60),
        (60, 60),
    ],
)
def test_ages(text: Any, seconds: float) -> None:
    assert Retention.of(None, text, None) == Retention(None, seconds, None)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_bytes": "lots"}, ValueError, "max_bytes must be a number of bytes, such as 500M, 64MiB or 2G"),
        ({"max_bytes": "-2G"}, ValueError, "max_bytes must be a number of bytes"),
        ({"max_bytes": 2.5}, TypeError, "max_bytes must be an integer, not float"),
        ({"max_bytes": "9999P"}, ValueError, "max_bytes must be at most"),
        ({"max_age": "soon"}, ValueError, "max_age must be a time such as 7d, 12h, 90m or 30s, not 'soon'"),
        ({"max_age": 0}, ValueError, "max_age must be above 0 seconds"),
        ({"max_age": True}, TypeError, "max_age must be a number of seconds, not bool"),
        ({"min_free_bytes": -1}, ValueError, "min_free_bytes must be at least 0, not -1"),
        ({"min_free_bytes": "1X"}, ValueError, "min_free_bytes must be a number of bytes"),
    ],
)
def test_invalid_settings_are_one_line(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        open_writer(tmp_path, **options)
    assert str(raised.value).startswith(text)
    assert "\n" not in str(raised.value)


def test_budget_too_small_for_segments_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="max_bytes must be at least 16 MiB, not 1000000 bytes"):
        open_writer(tmp_path, max_bytes="1M")


def test_environment_is_used_where_an_argument_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_BYTES_VARIABLE, "2G")
    monkeypatch.setenv(MAX_AGE_VARIABLE, "7d")
    monkeypatch.setenv(MIN_FREE_VARIABLE, "")
    with open_writer(tmp_path, max_age="1h") as writer:
        assert writer._background._retention == Retention(2 * 10**9, 3600, None)


@pytest.mark.parametrize("variable", [MAX_BYTES_VARIABLE, MAX_AGE_VARIABLE, MIN_FREE_VARIABLE])
def test_invalid_variable_keeps_no_engine_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    """Nothing is recorded, as the budget that was meant is not known."""
    monkeypatch.setenv(variable, "plenty")
    writer = open_writer(tmp_path)
    for step in range(3):
        assert writer.record(step, load_of(step), map_of()) == -1
    assert not writer.flush()
    assert not writer.close()
    assert_accounted(writer.stats())
    assert writer.stats().dropped == 3
    assert str(writer.stats().off).startswith(f"{variable} must be a")
    assert [r.getMessage().count(f"{variable} must be a") for r in caplog.records] == [1]
    assert not list(tmp_path.iterdir())


# ---- the bound


@settings(
    max_examples=4,
    phases=[Phase.explicit, Phase.generate],  # without shrinking: an example takes seconds
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    max_bytes=st.integers(SMALL_BUDGET // 4, SMALL_BUDGET // 2),
    ep_size=st.sampled_from([EP_SIZE, 4 * SLOTS]),
    most=st.sampled_from([200, 60_000, 2**31 - 1]),
    scope=st.sampled_from(["local", "global"]),
    segment_steps=st.sampled_from([20, 100_000]),
    every=st.sampled_from([1, 17, 200]),
    flush_every=st.sampled_from([3, 40]),
    seed=st.integers(0, 1000),
)
# A new placement in each step, of which each is kept.
@example(SMALL_BUDGET // 4, 4 * SLOTS, 2**31 - 1, "global", 20, 1, 3, 0)
def test_bound_holds_at_every_moment_and_every_step_is_accounted_for(
    max_bytes: int,
    ep_size: int,
    most: int,
    scope: str,
    segment_steps: int,
    every: int,
    flush_every: int,
    seed: int,
) -> None:
    """``every``: after so many steps the placement changes."""
    truth: dict[int, Array] = {}
    steps = 200
    loads = [np.random.default_rng(n).integers(0, most, (LAYERS, 4 * SLOTS)) for n in range(50)]
    maps = [np.tile(map_of(n), 4) for n in range(LOGICAL)]
    with tempfile.TemporaryDirectory() as root:
        writer = big_writer(
            Path(root),
            ep_size=ep_size,
            scope=scope,
            segment_steps=segment_steps,
            max_bytes=max_bytes,
            queue_steps=64,
        )
        with watched(writer.folder) as sizes:
            for step in range(seed, seed + steps):
                load = loads[step % len(loads)]
                if writer.record(step, load, maps[step // every % len(maps)]) > 0:
                    truth[step] = load
                assert step % flush_every or writer.flush(60)
            assert writer.close(60)
        assert max(sizes) <= max_bytes
        stats = writer.stats()
        assert_accounted(stats)
        assert (stats.seen, stats.rejected, stats.off) == (steps, 0, None)
        assert stats.bytes_on_disk <= max_bytes
        assert_every_step_is_somewhere(writer, truth)


def test_long_run_keeps_the_newest_in_full_and_thins_the_oldest_most(tmp_path: Path) -> None:
    writer = big_writer(tmp_path, max_bytes=SMALL_BUDGET, scope="global")
    with watched(writer.folder) as sizes:
        record(writer, range(4000))
    assert max(sizes) <= SMALL_BUDGET
    stats = writer.stats()
    entries = sorted(manifest_of(writer).entries.values(), key=lambda entry: entry.seq)
    # The start, and what follows it, stay longer.
    tiers = [list(retention.TIERS).index(entry.tier) for entry in entries if entry.seq > 1]
    assert tiers == sorted(tiers, reverse=True)
    assert set(tiers) >= {0, 1, 2}
    assert stats.segments_thinned == sum(e.last_seq - e.seq + 1 for e in entries if e.thinned)
    assert {e.thinned.reason for e in entries if e.thinned} == {"budget"}
    # Not far below the budget either: what is kept is worth it.
    assert size_of(writer.folder) > SMALL_BUDGET / 2
    assert writer.close(60)
    assert_every_step_is_somewhere(writer, {step: load_of(step) for step in range(4000)})


@pytest.fixture
def sealing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is sealed before it is set."""
    go, real = threading.Event(), segment.seal

    def seal(*arguments: Any) -> Any:
        go.wait()
        return real(*arguments)

    monkeypatch.setattr(segment, "seal", seal)
    yield go
    go.set()


def fill(writer: ExpertLoadWriter) -> dict[int, Array]:
    """Record steps until one is dropped; those that were taken."""
    truth: dict[int, Array] = {}
    for step in itertools.count():
        if writer.stats().dropped:
            break
        if writer.record(step, load_of(step, 60_000), map_of()) > 0:
            truth[step] = load_of(step, 60_000)
        time.sleep(0.0005)
    return truth


def test_steps_are_dropped_if_sealing_cannot_keep_up(tmp_path: Path, sealing: threading.Event) -> None:
    """The drainer waits, and so the queue is full; nothing grows beyond the budget."""
    writer = big_writer(tmp_path, max_bytes=SMALL_BUDGET, queue_steps=16)
    with watched(writer.folder) as sizes:
        truth = fill(writer)
        assert writer.stats().drop_reasons == {"the queue is full": 1}
        assert writer.stats().paused is None
        sealing.set()
        assert writer.flush(60)
        last = writer.stats().seen
        for step in range(last, last + 20):
            if writer.record(step, load_of(step, 60_000), map_of()) > 0:
                truth[step] = load_of(step, 60_000)
        assert writer.close(60)
    assert max(sizes) <= SMALL_BUDGET
    assert_accounted(writer.stats())
    assert_every_step_is_somewhere(writer, truth)


def test_close_waits_for_room_without_taking_the_interpreter_lock(
    tmp_path: Path, sealing: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sealer, which makes the room, needs it."""
    looks, has_room = 0, budget.Space.has_room

    def counted(self: budget.Space, size: int) -> bool:
        nonlocal looks
        looks += 1
        return has_room(self, size)

    writer = big_writer(tmp_path, max_bytes=SMALL_BUDGET, queue_steps=16)
    truth = fill(writer)
    began = time.monotonic()
    monkeypatch.setattr(budget.Space, "has_room", counted)
    assert not writer.close(0.5)
    waited, seconds = looks, time.monotonic() - began
    sealing.set()
    assert writer.close(60)
    # Each look takes 20 ms or more; one can be under way at the beginning.
    assert waited <= 2 + seconds / 0.02
    assert_accounted(writer.stats())
    assert_every_step_is_somewhere(writer, truth)


def test_budget_without_room_for_a_step_pauses_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = big_writer(tmp_path, max_bytes=256 * KIB)
    writer.record(0, load_of(0), map_of())
    assert not writer.flush(60)
    assert writer.stats().paused == "max_bytes leaves no room for another step"
    assert not writer.close(60)
    assert "max_bytes leaves no room" in str(writer.stats().off)
    assert writer.stats().dropped == 1
    assert "recording is paused" in caplog.records[0].getMessage()
    assert size_of(writer.folder) < 256 * KIB


# ---- the volume


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much the volume has for this session, besides what it takes; other processes take the rest."""
    free = [1 << 40]
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free[0]))

    def leave(size: int) -> None:
        free[0] = size

    return leave


def test_segments_are_small_on_a_small_volume(tmp_path: Path, volume: Callable[[int], None]) -> None:
    """Also if all is kept: so that sealing needs little space."""
    volume(SMALL_BUDGET)
    with big_writer(tmp_path) as writer:
        record(writer, range(300))
        assert writer.stats().bytes_on_disk == size_of(writer.folder)
    entries = manifest_of(writer).entries.values()
    steps_in_a_journal = 64 * KIB // (LAYERS * SLOTS)
    assert len(entries) >= 300 // steps_in_a_journal
    assert writer.stats().segments_thinned == 0
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(300)})


def test_volume_of_unknown_size_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    with big_writer(tmp_path, max_age="1h") as writer:
        record(writer, range(300))
    assert writer.stats().segments_sealed == 1


def test_thins_before_the_volume_is_full_and_recovers(tmp_path: Path, volume: Callable[[int], None]) -> None:
    writer = big_writer(tmp_path, min_free_bytes=1 << 20)
    volume(4 << 20)
    record(writer, range(400))
    assert writer.stats().segments_thinned == 0
    before = writer.stats().bytes_on_disk
    volume((1 << 20) - before // 4)  # another process needs space; a quarter has to go
    until(lambda: writer.stats().bytes_on_disk <= before * 3 // 4)
    reasons = {e.thinned.reason for e in manifest_of(writer).entries.values() if e.thinned}
    assert reasons == {"space"}
    volume(4 << 20)
    thinned = writer.stats().segments_thinned
    record(writer, range(400, 500))
    assert writer.stats().paused is None
    assert writer.stats().segments_thinned == thinned
    assert writer.close(60)
    assert_every_step_is_somewhere(writer, {step: load_of(step) for step in range(500)})


def test_pauses_if_thinning_does_not_free_enough(tmp_path: Path, volume: Callable[[int], None]) -> None:
    """The newest segment in full stays; recording continues when other files are gone."""
    writer = big_writer(tmp_path, min_free_bytes=1 << 20)
    volume(4 << 20)
    record(writer, range(400))
    volume(0)
    for step in range(400, 600):
        writer.record(step, load_of(step), map_of())
        if writer.stats().paused:
            break
        writer.flush(60)
    until(lambda: writer.stats().paused is not None)
    assert writer.stats().paused == "No space left on device"
    full = [entry for entry in manifest_of(writer).entries.values() if entry.thinned is None]
    assert len(full) == 1
    volume(4 << 20)
    until(lambda: writer.stats().paused is None)
    assert writer.flush(60)
    record(writer, range(600, 700))
    assert writer.close(60)
    assert_accounted(writer.stats())
    assert set(range(600, 700)) <= survived_loads(writer.folder).keys()


def test_thinning_needs_no_new_file_on_a_full_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, volume: Callable[[int], None]
) -> None:
    """The sums of tokens per rank are not written, then; the sums per minute are there already."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    writer = big_writer(tmp_path, min_free_bytes=0)
    volume(4 << 20)
    record(writer, range(600))
    monkeypatch.setattr(retention.SegmentFiles, "write", full)
    volume(0)
    until(lambda: writer.stats().segments_thinned > 0)
    tiers = {entry.tier for entry in manifest_of(writer).entries.values()}
    assert Tier.RANKS not in tiers
    monkeypatch.undo()
    assert writer.close(60)


# ---- age


def test_old_steps_go_also_if_no_new_ones_come(tmp_path: Path) -> None:
    writer = big_writer(tmp_path, max_age=0.5, segment_steps=20)
    record(writer, range(100))
    until(lambda: writer.stats().segments_thinned == 4)  # the open journal is younger than its segment
    assert {e.tier for e in manifest_of(writer).entries.values()} == {Tier.GONE}
    assert {e.thinned.reason for e in manifest_of(writer).entries.values() if e.thinned} == {"age"}
    assert writer.stats().oldest_full_step is None
    assert writer.close(60)
    assert sum(e.recorded for e in manifest_of(writer).entries.values()) == 100


# ---- faults


def test_segment_that_cannot_be_read_stays_and_the_others_are_thinned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = big_writer(tmp_path, max_bytes=SMALL_BUDGET)
    record(writer, range(400))
    assert writer.stats().segments_thinned == 0
    damaged = sorted(writer.folder.glob("loads-*.parquet"))[2]  # not a neighbor of the start
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-100] + bytes(100))
    broken = damaged.read_bytes()
    with watched(writer.folder) as sizes:
        record(writer, range(400, 3000))
        assert writer.close(60)
    assert max(sizes) <= SMALL_BUDGET
    assert damaged.read_bytes() == broken
    assert writer.stats().segments_thinned > 10
    assert [r.getMessage().count("a segment could not be thinned") for r in caplog.records] == [1]


def test_close_does_not_wait_for_retention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after the thinning that is in progress, though more are due."""
    going, go, calls, real = threading.Event(), threading.Event(), [], retention.thin

    def slow(*arguments: Any, **others: Any) -> Any:
        calls.append(arguments[2])
        going.set()
        assert go.wait(60)
        return real(*arguments, **others)

    monkeypatch.setattr(retention, "thin", slow)
    writer = big_writer(tmp_path, segment_steps=20, max_age=0.001)
    for step in range(200):
        writer.record(step, load_of(step), map_of())
    assert going.wait(60)
    assert not writer.close(0.05)
    go.set()
    assert writer.close(60)
    assert len(calls) == 1
    assert sum(e.recorded for e in manifest_of(writer).entries.values()) == 200


def test_folder_that_is_deleted_ends_the_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = big_writer(tmp_path / "dumps", max_bytes=SMALL_BUDGET, max_age="1d")
    record(writer, range(400))
    shutil.rmtree(tmp_path / "dumps")
    until(lambda: writer.record(None, load_of(0), map_of()) < 0)
    assert "FileNotFoundError" in str(writer.stats().off)
    assert not writer.close(60)
    assert_accounted(writer.stats())
    assert len(caplog.records) == 1
