"""A full disk pauses recording, which continues by itself; all steps are accounted for."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    assert_accounted,
    assert_equal_loads,
    assert_rows_agree,
    load_of,
    manifest,
    map_of,
    open_writer,
    placement_rows,
    sealed_loads,
    step_status,
    survived_loads,
)

from eplb_dump import ExpertLoadWriter, background, rendezvous
from eplb_dump.format import journal, segment

NO_SPACE = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
RUNS_FOR_EVER = 60


class Disk:
    """A disk that is full from time to time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fault: int | None = None
        self.refused = threading.Event()
        self._patch = patch

    def break_call(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self.fault is not None:
                self.refused.set()
                raise OSError(self.fault, os.strerror(self.fault))
            return real(*arguments, **options)

        self._patch.setattr(owner, name, call)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    made = Disk(monkeypatch)
    yield made
    made.fault = None


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUNS_FOR_EVER
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split(":")[0] for record in caplog.records]


PAUSED = "expert-load recording is paused; the engine continues"
CONTINUES = "expert-load recording continues"


@pytest.mark.parametrize("number", NO_SPACE)
def test_recording_continues_when_there_is_space(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """What is queued when the disk fills up is recorded later; steps that find no room have rows."""
    disk.break_call(journal.JournalAppender, "append")
    writer = open_writer(tmp_path, queue_steps=8, segment_steps=16)
    for step in range(10):
        writer.record(step, load_of(step), map_of(step // 5))
        assert step % 4 or writer.flush(60)
    assert writer.flush(60)
    disk.fault = number
    writer.record(10, load_of(10), map_of(2))
    assert not writer.flush(60)
    assert (writer.stats().paused, writer.stats().off) == (NO_SPACE[number], None)
    for step in range(11, 40):
        writer.record(step, load_of(step), map_of(step // 5))
    paused = writer.stats()
    assert_accounted(paused)
    assert (paused.seen, paused.recorded) == (40, 19)
    assert paused.drop_reasons == {NO_SPACE[number]: 21}
    disk.fault = None
    until(lambda: writer.stats().paused is None)
    assert writer.flush(60)
    for step in range(40, 50):
        writer.record(step, load_of(step), map_of(step // 5))
        assert step % 4 or writer.flush(60)
    assert writer.close(60)
    stats = writer.stats()
    assert_accounted(stats)
    assert_rows_agree(writer.folder, stats)
    kept = [*range(19), *range(40, 50)]
    assert (stats.seen, stats.recorded, stats.unlisted, stats.off) == (50, len(kept), 0, None)
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in kept})
    dropped = [step for step, status in step_status(writer.folder) if status == "dropped"]
    assert dropped == list(range(19, 40))
    # Also the placement whose frame did not fit at first; after the gap, the one that is in force then.
    changes = {step: slots for step, layer, _, slots in placement_rows(writer.folder) if layer == 0}
    assert {step: list(slots) for step, slots in changes.items() if step in (10, 15, 40)} == {
        step: map_of(step // 5)[0].tolist() for step in (10, 15, 40)
    }
    assert messages(caplog) == [PAUSED, CONTINUES]
    assert caplog.records[-1].getMessage().endswith(": 21 steps were dropped")


def test_disk_that_fills_up_again_and_again_does_not_fill_the_log(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.break_call(journal.JournalAppender, "append")
    writer = open_writer(tmp_path)
    for step in range(5):
        disk.fault = errno.ENOSPC
        writer.record(step, load_of(step), map_of())
        assert not writer.flush(60)
        disk.fault = None
        assert writer.flush(60)
    assert writer.close(60)
    assert messages(caplog) == [PAUSED, CONTINUES]
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(5)})


@pytest.mark.parametrize(
    ("owner", "name", "run_id"),
    [
        (background, "write_session_file", "r"),
        (Path, "mkdir", "r"),
        (Path, "mkdir", None),
        (rendezvous, "dump_json", None),
        (journal.JournalAppender, "__init__", "r"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_engine_starts_on_a_full_disk(
    tmp_path: Path,
    disk: Disk,
    caplog: pytest.LogCaptureFixture,
    owner: Any,
    name: str,
    run_id: str | None,
) -> None:
    disk.break_call(owner, name)
    disk.fault = errno.ENOSPC
    writer = open_writer(tmp_path / "dumps", run_id=run_id)
    for step in range(5):
        writer.record(step, load_of(step), map_of())
    assert not writer.flush(60)
    disk.fault = None
    until(lambda: writer.stats().paused is None)
    assert writer.flush(60)
    assert writer.close(60)
    assert writer.stats().recorded == 5
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(5)})
    assert messages(caplog) == [PAUSED, CONTINUES]


def test_first_load_on_a_full_disk_leaves_a_session_file_with_its_shape(tmp_path: Path, disk: Disk) -> None:
    """The shape of the first load completes session.json; another call than the journal's finds no space."""
    disk.break_call(background, "write_session_file")
    writer = open_writer(tmp_path)
    disk.fault = errno.ENOSPC
    writer.record(0, load_of(0), map_of())
    assert writer.flush(60)
    assert disk.refused.wait(60)
    disk.fault = None
    assert writer.close(60)
    assert f'"num_moe_layers": {len(load_of(0))}' in (writer.folder / "session.json").read_text()


def test_journal_that_finds_no_space_is_sealed_later_and_in_order(tmp_path: Path, disk: Disk) -> None:
    disk.break_call(segment, "write_segment")
    writer = open_writer(tmp_path, segment_steps=4)
    disk.fault = errno.ENOSPC
    for step in range(12):
        writer.record(step, load_of(step), map_of())
        assert writer.flush(60)
    assert disk.refused.wait(60)
    assert len(list(writer.folder.glob("journal-*"))) == 3
    disk.fault = None
    until(lambda: writer.stats().segments_sealed == 2)
    assert writer.stats().segments_left_open == 0
    assert writer.close(60)
    assert [e.header["seq"] for e in entries(writer)] == [0, 1, 2]
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(12)})


def entries(writer: ExpertLoadWriter) -> list[Any]:
    return [frame for frame in manifest(writer.folder) if frame.kind == "sealed"]


def test_close_on_a_full_disk_ends(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    """What is in the journal stays; what waited for space is lost and counted."""
    disk.break_call(journal.JournalAppender, "append")
    writer = open_writer(tmp_path)
    writer.record(0, load_of(0), map_of())
    assert writer.flush(60)
    disk.fault = errno.ENOSPC
    writer.record(1, load_of(1), map_of())
    until(lambda: writer.stats().paused is not None)
    assert not writer.close(60)
    stats = writer.stats()
    assert_accounted(stats)
    assert (stats.recorded, stats.drop_reasons) == (1, {"recording stopped": 1})
    assert "No space left on device" in str(stats.off)
    assert stats.paused is None
    assert messages(caplog) == [PAUSED, "expert-load recording is off; the engine continues"]
    assert_equal_loads(survived_loads(writer.folder), {0: load_of(0)})


def test_flush_that_ends_a_pause_covers_the_steps_that_came_meanwhile(tmp_path: Path, disk: Disk) -> None:
    """Not only the batch that had found no space."""
    disk.break_call(journal.JournalAppender, "append")
    writer = open_writer(tmp_path)
    for step in range(0, 100, 2):
        disk.fault = errno.ENOSPC
        writer.record(step, load_of(step), map_of())
        assert not writer.flush(60)
        assert writer.record(step + 1, load_of(step + 1), map_of()) > 0
        disk.fault = None
        assert writer.flush(60)
        assert list(survived_loads(writer.folder)) == list(range(step + 2))
    assert writer.close(60)


def test_other_faults_while_paused_end_the_recording(tmp_path: Path, disk: Disk) -> None:
    disk.break_call(journal.JournalAppender, "append")
    writer = open_writer(tmp_path)
    disk.fault = errno.ENOSPC
    writer.record(0, load_of(0), map_of())
    until(lambda: writer.stats().paused is not None)
    disk.fault = errno.EIO
    until(lambda: writer.stats().off is not None)
    assert "Input/output error" in str(writer.stats().off)
    assert not writer.flush(60)
    assert not writer.close(60)
    assert_accounted(writer.stats())
