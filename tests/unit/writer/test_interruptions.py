"""Signal handlers, failing allocations, log handlers that raise: counts stay true, nothing is mixed up."""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import logging
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    Array,
    assert_accounted,
    assert_equal_loads,
    load_of,
    manifest,
    map_of,
    open_writer,
    placement_rows,
    sealed_loads,
    survived_loads,
)

from eplb_dump import ExpertLoadWriter, accounting, background, encoder
from eplb_dump import writer as writer_module
from eplb_dump.accounting import INTERRUPTED
from eplb_dump.format import journal, segment
from eplb_dump.format import manifest as manifest_module
from eplb_dump.format.session import write_session_file
from eplb_dump.latch import Latch

#: The modules that run on the engine's thread while it records.
ENGINE_SIDE = ("eplb_dump/writer.py", "eplb_dump/staging.py", "eplb_dump/ring.py")


class Interruption(BaseException):
    """What a signal handler raises, such as KeyboardInterrupt."""


@functools.cache
def points_of(code: CodeType) -> frozenset[int]:
    """The offsets of a function before which CPython runs signal handlers: after calls and on jumps back."""
    points = set()
    instructions = list(dis.get_instructions(code))
    for instruction, following in itertools.pairwise(instructions):
        if instruction.opname.startswith("CALL"):
            points.add(following.offset)
        elif instruction.opname in ("JUMP_BACKWARD", "JUMP_ABSOLUTE"):
            points.add(instruction.argval)
    return frozenset(points)


class Interrupter:
    """Calls something in the middle of a writer call, where CPython could run a signal handler."""

    def __init__(self, handler: Callable[[], object]) -> None:
        self._handler = handler
        self._left = 0
        self.done = False

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if not code.co_filename.endswith(ENGINE_SIDE):
            return None
        frame.f_trace_opcodes = True
        # Handlers also run when a function begins.
        if not self.done and (event == "call" or (event == "opcode" and frame.f_lasti in points_of(code))):
            self._left -= 1
            if self._left == 0:
                self.done = True
                self._handler()
        return self._trace

    def interrupt(self, at: int, call: Callable[[], object]) -> bool:
        """Call, and interrupt it at its point number ``at``; False if it has fewer."""
        self._left, self.done = at, False
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(before)
        return self.done


def raise_interruption() -> None:
    raise Interruption


def placement_of(step: int) -> Array:
    """Steps 4k to 4k + 3 have the same placement, which differs from those before and after."""
    return map_of(step // 4)


def assert_nothing_mixed_up(writer: ExpertLoadWriter) -> None:
    """On disk are exactly the steps that count as recorded, each with its own load and placement."""
    stats = writer.stats()
    assert_accounted(stats)
    assert stats.off is None
    found = sealed_loads(writer.folder)
    assert len(found) == stats.recorded
    assert_equal_loads(found, {step: load_of(step) for step in found})
    rows = placement_rows(writer.folder)
    for step in found:
        in_force = {layer: slots for at, layer, _, slots in rows if at <= step}  # rows ascend
        assert in_force == {layer: tuple(placement_of(step)[layer]) for layer in range(LAYERS)}


IN_PLACE = torch.tensor(map_of())
#: Makes the arguments of the call that is interrupted at step n.
ARGUMENTS: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "numpy": lambda n: (n, load_of(n), placement_of(n)),
    "torch": lambda n: (n, torch.tensor(load_of(n)), torch.tensor(placement_of(n))),
    "torch in place": lambda n: (n, torch.tensor(load_of(n)), IN_PLACE.copy_(torch.tensor(placement_of(n)))),
    "no load": lambda n: (n, "no tensor", placement_of(n)),
    "no step": lambda n: ("x", load_of(n), placement_of(n)),
    "skip": lambda n: ("dummy", n),
}


def call_of(writer: ExpertLoadWriter, kind: str, n: int) -> Callable[[], None]:
    return functools.partial(writer.skip if kind == "skip" else writer.record, *ARGUMENTS[kind](n))


def record_next(writer: ExpertLoadWriter) -> None:
    """Recorded if no other call is running; else dropped."""
    step = writer._next_step
    writer.record(step, load_of(step), placement_of(step))


HANDLERS: dict[str, Callable[[ExpertLoadWriter], object]] = {
    "raises": lambda _: raise_interruption(),
    "records": record_next,
    "skips": lambda writer: writer.skip(),
    "flushes": lambda writer: writer.flush(60),
    "counts": lambda writer: assert_accounted(writer.stats()),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", ARGUMENTS)
def test_handler_may_interrupt_a_call_anywhere(tmp_path: Path, call: str, handler: str) -> None:
    writer = open_writer(tmp_path, queue_steps=8)
    interrupter = Interrupter(functools.partial(HANDLERS[handler], writer))
    calls, more = 0, True
    while more:
        step, seen = 4 * calls, writer.stats().seen
        try:
            more = interrupter.interrupt(calls + 1, call_of(writer, call, step))
        except Interruption:
            assert handler == "raises"
        assert_accounted(writer.stats())
        # "As before" must not fall back to a placement from before the one that was handed over last.
        rely = calls % 4 == 0 and call not in ("no step", "skip") and writer.stats().seen > seen
        writer.record(step + 2, load_of(step + 2), None if rely else placement_of(step))
        assert writer.flush(60)
        calls += 1
    assert calls > 5
    assert writer.close(60)
    assert_nothing_mixed_up(writer)
    stats = writer.stats()
    if handler == "raises":
        assert stats.drop_reasons.get(INTERRUPTED, 0) > 3
        assert stats.seen > 1.9 * calls  # all but those that were interrupted before they were seen
    else:
        nested = calls - 1 if handler in ("records", "skips") else 0
        assert stats.seen == 2 * calls + nested
    assert stats.recorded > 0.5 * calls


def test_writer_may_be_closed_in_the_middle_of_a_call(tmp_path: Path) -> None:
    """The interrupted step is on disk or counts as dropped."""
    at, more = 1, True
    while more:
        writer = open_writer(tmp_path / str(at))
        writer.record(0, load_of(0), placement_of(0))
        interrupter = Interrupter(functools.partial(writer.close, 60))
        more = interrupter.interrupt(at, call_of(writer, "numpy", 1))
        assert writer.close(60)
        assert_nothing_mixed_up(writer)
        assert writer.stats().seen == 2
        at += 1
    assert at > 20


def test_handler_may_set_the_latch_that_it_interrupted_the_wait_for() -> None:
    latch = Latch()
    before = signal.signal(signal.SIGUSR1, lambda *_: latch.set() if latch.wait(0) is False else None)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.start()
    try:
        assert latch.wait(60)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_latch_lets_all_through() -> None:
    latch, passed = Latch(), []
    assert not latch.wait(0)
    threads = [threading.Thread(target=lambda: passed.append(latch.wait(60))) for _ in range(5)]
    for thread in threads:
        thread.start()
    latch.set()
    latch.set()
    for thread in threads:
        thread.join(60)
    assert passed == [True] * 5


# ---- memory


@pytest.mark.parametrize("call", ["numpy", "no load", "no step", "skip"])  # torch crashes if it has no memory
@pytest.mark.parametrize("width", [1, 2, 5, 50])
def test_any_allocation_may_fail(tmp_path: Path, gate: threading.Event, call: str, width: int) -> None:
    """One, or several in a row: the call never raises, and the counts stay true."""
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no failing allocators")
    writer = open_writer(tmp_path, queue_steps=4096)
    writer.record(0, load_of(0), placement_of(0))
    raised = []
    for n in range(1, 120):
        seen, attempt = writer.stats().seen, call_of(writer, call, 2 * n)
        testcapi.set_nomemory(n, n + width)
        try:
            attempt()
        except BaseException as error:  # also the call itself may fail, before the writer's code runs
            raised.append((n, type(error)))
        finally:
            testcapi.remove_mem_hooks()
        stats = writer.stats()
        assert_accounted(stats)
        assert stats.seen <= seen + 1
        writer.record(2 * n + 1, load_of(2 * n + 1), placement_of(2 * n))
    gate.set()
    assert writer.close(60)
    assert_nothing_mixed_up(writer)
    assert raised == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (background.Background, "_drain"),
        (background.Background, "_next_batch"),
        (background.Background, "_write"),
        (background.Background, "_note_shape"),
        (background.Background, "_end_segment_if_due"),
        (background.Background, "_log_notices"),
        (encoder.Encoder, "encode"),
        (encoder.Encoder, "_take_placements"),
        (accounting.Written, "plus"),
        (journal.JournalAppender, "append"),
        (journal, "session_frame"),
        (segment, "seal"),
        (manifest_module, "close_manifest"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("at", [1, 3])
def test_memory_error_in_the_background_leaves_counts_true(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    at: int,
) -> None:
    real, calls = getattr(owner, name), 0

    def fail_once(*arguments: Any) -> Any:
        nonlocal calls
        if threading.current_thread().name.startswith("eplb-dump"):
            calls += 1
            if calls == at:
                raise MemoryError
        return real(*arguments)

    writer = open_writer(tmp_path, segment_steps=16)
    monkeypatch.setattr(owner, name, fail_once)
    for step in range(100):
        writer.record(step, load_of(step), placement_of(step))
        if step % 10 == 0:
            writer.flush(60)
    closed = writer.close(60)
    stats = writer.stats()
    assert_accounted(stats)
    assert stats.seen == 100
    assert len(survived_loads(writer.folder)) == stats.recorded
    failed = calls >= at
    assert closed is not failed
    assert failed == (len([r for r in caplog.records if "MemoryError" in r.getMessage()]) == 1)
    assert (stats.off is not None) == (failed and name not in ("seal", "close_manifest"))


# ---- logging


class Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the log collector is gone")


@pytest.fixture
def broken_log() -> Iterator[None]:
    logger, handler = logging.getLogger("eplb_dump"), Broken()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.mark.usefixtures("broken_log")
def test_log_handler_that_raises_harms_nothing(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, flush_interval=0.02)
    truth = {}
    for step in range(0, 200, 2):
        writer.record(step, load_of(step), placement_of(step))
        writer.record(step + 1, -1 - load_of(step), None)
        truth[step] = load_of(step)
        assert step % 20 or writer.flush(60)
    assert writer.close(60)
    assert_equal_loads(sealed_loads(writer.folder), truth)
    assert (writer.stats().recorded, writer.stats().rejected) == (100, 100)


@pytest.mark.usefixtures("broken_log")
def test_log_handler_that_raises_does_not_reach_the_constructor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = open_writer(tmp_path / "file")
    writer.record(0, load_of(0), None)
    assert not writer.close()
    assert "File exists" in str(writer.stats().off) or "Not a directory" in str(writer.stats().off)
    assert writer.stats().dropped == 1


# ---- the file system does not respond


@pytest.mark.parametrize("responds", [True, False])
def test_constructor_does_not_wait_for_a_file_system_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, responds: bool
) -> None:
    """One warning; recording begins when it responds, with what is queued."""
    answer = threading.Event()

    def hang(*arguments: Any, **options: Any) -> None:
        answer.wait(60)
        if not responds:
            raise OSError(5, "Input/output error")
        write_session_file(*arguments, **options)

    monkeypatch.setattr(background, "write_session_file", hang)
    monkeypatch.setattr(writer_module, "OPEN_SECONDS", 0.05)
    writer = open_writer(tmp_path, queue_steps=4)
    assert ["does not respond" in record.getMessage() for record in caplog.records] == [True]
    for step in range(6):
        writer.record(step, load_of(step), placement_of(step))
    assert not writer.flush(0.05)
    assert (writer.stats().recorded, writer.stats().dropped, writer.stats().off) == (4, 2, None)
    answer.set()
    assert writer.flush(60) is responds
    assert writer.close(60) is responds
    assert_accounted(writer.stats())
    if responds:
        assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(4)})
    else:
        assert "Input/output error" in str(writer.stats().off)
        assert (writer.stats().recorded, writer.stats().dropped) == (0, 6)


# ---- the end


def test_dropped_writer_ends_like_a_closed_one(tmp_path: Path) -> None:
    writer = open_writer(tmp_path, flush_interval=60)
    for step in range(10):
        writer.record(step, load_of(step), placement_of(step))
    folder, session, is_gone = writer.folder, writer._background, weakref.ref(writer)
    del writer
    gc.collect()
    assert is_gone() is None
    for thread in (session._drainer, session._sealer):
        thread.join(60)
        assert not thread.is_alive()
    assert_equal_loads(sealed_loads(folder), {step: load_of(step) for step in range(10)})
    assert manifest(folder)[-1].kind == "closed"


def test_close_says_that_a_journal_could_not_be_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment, "seal", fail)
    writer = open_writer(tmp_path)
    writer.record(0, load_of(0), None)
    assert not writer.close(60)
    assert (writer.stats().segments_sealed, writer.stats().segments_left_open) == (0, 1)
    assert_equal_loads(survived_loads(writer.folder), {0: load_of(0)})


def test_journal_that_cannot_be_closed_is_reported_and_sealing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """close(2) fails on network file systems and over quotas."""
    real = journal.JournalAppender.close

    def close(self: journal.JournalAppender) -> None:
        real(self)
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(journal.JournalAppender, "close", close)
    writer = open_writer(tmp_path, segment_steps=2)
    for step in range(10):
        writer.record(step, load_of(step), None)
    assert writer.close(60)
    assert ["Disk quota exceeded" in record.getMessage() for record in caplog.records] == [True]
    assert writer.stats().segments_sealed == 5
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(10)})
