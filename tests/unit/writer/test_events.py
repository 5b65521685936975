"""Device times from events, on a simulated device: never a wrong number, whatever the order of the calls."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, SLOTS, load_of, open_writer, read_table, session_info
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_dump import ring, staging
from eplb_dump.encoder import Encoder
from eplb_dump.events import Events
from eplb_dump.format import frames, journal
from eplb_dump.format.schema import Status
from eplb_dump.staging import Entry, Staged, Staging

BUFFERS = 4  # the fewest that a ring has


@dataclass
class Device:
    """Two streams, on which work is done as soon as it is queued, by a clock in ms."""

    clock: float = 0.0
    current: int = 0
    #: Whether a recorded event cannot be read, as one that a CUDA graph captured.
    captured: bool = False
    made: list[Event] = field(default_factory=list)

    copies_by_address: bool = False
    keeps_lock: bool = True

    def copy(self, target: int, source: int, size: int, event: Event) -> int:
        raise NotImplementedError

    def stream(self) -> int:
        return self.current

    def new_event(self) -> Event:
        self.made.append(Event())
        return self.made[-1]

    def record(self, event: Event, stream: int) -> None:
        event.time, event.captured, event.awaited = self.clock, self.captured, False
        event.stream = stream

    def mark(self, event: Event) -> int:
        self.record(event, self.current)
        return self.current

    def wait(self, event: Event) -> None:
        event.awaited = True

    def elapsed_ms(self, start: Event, end: Event) -> float:
        if start.captured or end.captured or start.time is None or end.time is None:
            raise RuntimeError("CUDA driver error 400")
        return end.time - start.time


@dataclass
class Event:
    """What :class:`Device` records."""

    time: float | None = None
    captured: bool = False
    awaited: bool = False
    stream: int = -1


class Engine:
    """Calls the writer's parts as the engine's and the background thread do, one after the other."""

    def __init__(self, device: Device, patch: pytest.MonkeyPatch) -> None:
        def on_device(example: Any, count: int) -> ring.Ring:
            made = ring.Ring(example, count)
            made.events, made._device_calls = Events(count, device), device
            return made

        patch.setattr(staging, "Ring", on_device)
        self.device = device
        self.staging = Staging(None, 6, BUFFERS, 1)
        self.encoder = Encoder(session_info(), lambda text: None)
        self.queue: list[Entry] = []
        self.calls = 0
        self.recorded: dict[int, float] = {}

    def begin(self) -> None:
        self.staging.begin_step(self.calls + 1)

    def call(self, step: int, load: Any, status: Status = Status.RECORDED, *, lost: bool = False) -> bool:
        """``record``, or ``skip`` if ``load`` is None; ``lost``: interrupted before it is queued."""
        self.calls += 1
        staged = None if load is None else self.staging.stage(load, None, 2, self.calls)
        if staged is not None and not isinstance(staged, Staged):
            return False
        if staged is not None and staged.load is not None:
            staged.load.ring.take(staged.load)
        if not lost:
            buffer = None if staged is None else staged.load
            self.queue.append(Entry(step, 0, 0, status, -1, None, None, 2, buffer, None, 0))
        return True

    def drain(self, most: int) -> None:
        """Write the oldest steps: one batch has the buffers of one ring, in a row."""
        batch: list[Entry] = []
        last = None
        for entry in self.queue[:most]:
            if entry.load is not None:
                if last is not None and (entry.load.ring, entry.load.number - 1) != (last.ring, last.number):
                    break
                last = entry.load
            batch.append(entry)
        del self.queue[: len(batch)]
        if batch:
            data = self.encoder.encode(batch, 0).frames[-1]
            (frame, _) = frames.scan(io.BytesIO(data), len(data))
            assert isinstance(frame, frames.Frame)
            rows = journal.step_rows(frame)
            self.recorded |= zip(rows.step.tolist(), rows.device_ms.tolist(), strict=True)


#: What happens next, and for how many ms the device works before it.
HAPPENS = st.tuples(
    st.sampled_from(
        ["record"] * 6
        + ["begin"] * 4
        + ["drain"] * 2
        + ["skip", "lost", "unnumbered", "other stream", "captured", "other shape"]
    ),
    st.integers(0, 7),
)


@given(st.lists(HAPPENS, max_size=60))
@settings(max_examples=200)
def test_time_is_that_of_its_step_or_unknown(happens: list[tuple[str, int]]) -> None:
    """However late the events are read: also if the queue is full, and steps are dropped."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        engine = Engine(device, patch)
        step, slots = 0, SLOTS
        truth: dict[int, float] = {}
        #: Clock and stream where this pass began, in a tuple, and where the step before ended. Each None if
        #: the writer knows of none, or none that counts.
        began: tuple[tuple[float, int] | None] | None = None
        ended: tuple[float, int] | None = None
        ring_slots: int | None = None
        for what, ms in happens:
            device.clock += ms
            here = None if device.captured else (device.clock, device.current)
            if what == "begin":
                engine.begin()
                began = None if ring_slots is None else (here,)
            elif what == "drain":
                engine.drain(ms)
            elif what == "other stream":
                device.current = 1 - device.current
            elif what == "captured":
                device.captured = not device.captured
            elif what == "other shape":
                slots = 3 * SLOTS - slots
            elif what == "unnumbered":  # a pass of which the writer is not told
                step += 1
                ended = None
            else:
                load = None if what == "skip" else np.zeros((LAYERS, slots), np.int64)
                kept = engine.call(step, load, lost=what == "lost")
                if load is not None and ring_slots != slots:  # other buffers, with events of their own
                    began, ended, ring_slots = None, None, slots
                start = ended if began is None else began[0]
                if what == "record" and kept:
                    same_stream = start is not None and here is not None and start[1] == here[1]
                    truth[step] = here[0] - start[0] if same_stream and start and here else math.nan
                # The journal does not have a lost step, so the next one does not follow it.
                ended = here if what == "record" and kept else None
                began = None
                step += 1
        while engine.queue:
            engine.drain(len(engine.queue))
        found = {n: ms for n, ms in engine.recorded.items() if n in truth}
        assert repr(found) == repr(truth)


def record_steps(engine: Engine, steps: int, *, begin: bool) -> None:
    """Steps of 3 ms of work, with 10 ms in front of each in which the device waits for requests."""
    for step in range(steps):
        engine.device.clock += 10
        if begin:
            engine.begin()
        engine.device.clock += 3
        assert engine.call(step, np.zeros((LAYERS, SLOTS), np.int64))
        engine.drain(1)


@pytest.mark.parametrize(("begin", "ms"), [(True, 3.0), (False, 13.0)])
def test_pass_is_timed_without_the_wait_in_front_if_the_engine_says_that_it_begins(
    monkeypatch: pytest.MonkeyPatch, begin: bool, ms: float
) -> None:
    engine = Engine(Device(), monkeypatch)
    record_steps(engine, 50, begin=begin)  # many more than there are events
    assert math.isnan(engine.recorded.pop(0))
    assert set(engine.recorded.values()) == {ms}


def test_all_copies_are_awaited_on_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Device(), monkeypatch)
    for step, stream in enumerate([0, 1, 1, 0]):
        engine.device.current = stream
        engine.call(step, np.zeros((LAYERS, SLOTS), np.int64))
    last = {stream: [e for e in engine.device.made if e.stream == stream][-1] for stream in (0, 1)}
    engine.drain(4)
    assert list(engine.recorded) == [0, 1, 2, 3]
    assert all(event.awaited for event in last.values())


def test_begin_step_on_the_cpu_does_nothing(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(4):
            writer.begin_step()
            writer.record(step, torch.from_numpy(load_of(step)), None)
    writer.begin_step()
    assert (writer.stats().seen, writer.stats().recorded) == (4, 4)
    assert read_table(writer.folder, "steps")["device_ms"].to_pylist() == [None] * 4


class BrokenEvents:
    """Events of a device that fails."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_begin_step_never_raises(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.record(0, load_of(0), None)
        assert writer.flush(60)
        loads = writer._staging._loads
        assert loads is not None
        loads.events, working = BrokenEvents(), loads.events  # type: ignore[assignment]
        writer.begin_step()
        loads.events = working
        writer.record(1, load_of(1), None)
    assert writer.stats().recorded == 2
