"""Recording tensors on a CUDA device: bit for bit, whatever the stream, the layout and the device's backlog.

Both ways to ask the device are tested: through the driver, and through torch's public calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, SLOTS, assert_equal_loads, load_of, map_of, open_writer, read_table, sealed_loads

from eplb_dump import device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
STEPS = 60
#: A kernel that keeps the device busy for some ms.
BUSY_CYCLES = 5_000_000


@pytest.fixture(params=[device.Driver, device.Torch], autouse=True)
def asked_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """How the device is asked."""
    here = torch.zeros(1, device="cuda:0").device  # torch makes its context with its first tensor
    made = device.Driver(0) if request.param is device.Driver else device.Torch(here)
    monkeypatch.setattr(device, "_devices", {here: made})
    kind: type = request.param
    return kind


def on_device(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to("cuda:0")


def contiguous(values: Any) -> torch.Tensor:
    return on_device(values)


def part_of_a_wider_one(values: Any) -> torch.Tensor:
    return on_device(np.concatenate([values, -values], axis=1))[:, : values.shape[1]]


def transposed(values: Any) -> torch.Tensor:
    return on_device(values.T).T


def of_a_subclass(values: Any) -> torch.Tensor:
    class Named(torch.Tensor):
        pass

    return on_device(values).as_subclass(Named)


def of_inference_mode(values: Any) -> torch.Tensor:
    with torch.inference_mode():
        return on_device(values).clone()


KINDS = [contiguous, part_of_a_wider_one, transposed, of_a_subclass, of_inference_mode]


def test_driver_is_used_where_there_is_one() -> None:
    device._devices.clear()
    assert isinstance(device.device_of(contiguous(load_of(0))), device.Driver) == bool(torch.version.cuda)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_tensor_may_be_overwritten_on_its_stream(
    tmp_path: Path, make: Callable[[Any], torch.Tensor], dtype: Any
) -> None:
    loads = [make(load_of(step).astype(dtype)) for step in range(STEPS)]
    placement = make(map_of())
    with open_writer(tmp_path) as writer, torch.inference_mode(make is of_inference_mode):
        for step, load in enumerate(loads):
            torch.cuda._sleep(BUSY_CYCLES)
            assert writer.record(step, load, placement) > 0
            load.zero_()
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(STEPS)})


@pytest.mark.parametrize("steps_ahead", [1, 2, 40])
def test_engine_may_be_ahead_of_its_device(tmp_path: Path, steps_ahead: int) -> None:
    """Then the calls release the interpreter lock; the same tensor is handed over in each step."""
    load, placement = torch.zeros(LAYERS, SLOTS, dtype=torch.int32, device="cuda:0"), on_device(map_of())
    values = [on_device(load_of(step)) for step in range(STEPS)]
    with open_writer(tmp_path) as writer:
        for step in range(STEPS):
            if step % steps_ahead == 0:
                torch.cuda.synchronize()
                torch.cuda._sleep(BUSY_CYCLES)
            load.copy_(values[step])
            assert writer.record(step, load, placement) > 0
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(STEPS)})


def test_streams_may_change(tmp_path: Path) -> None:
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    load, placement = torch.zeros(LAYERS, SLOTS, dtype=torch.int32, device="cuda:0"), on_device(map_of())
    with open_writer(tmp_path) as writer:
        for step in range(STEPS):
            with torch.cuda.stream(streams[step % 3]):
                torch.cuda._sleep(BUSY_CYCLES)
                load.copy_(on_device(load_of(step)))
                assert writer.record(step, load, placement) > 0
            torch.cuda.synchronize()
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(STEPS)})


def test_counts_may_add_up(tmp_path: Path) -> None:
    totals, placement = torch.zeros(LAYERS, SLOTS, dtype=torch.int32, device="cuda:0"), on_device(map_of())
    since = 0
    with open_writer(tmp_path) as writer:
        for step in range(STEPS):
            if step % 7 == 0:
                totals.zero_()
                since = 0
            totals += on_device(load_of(step)).int()
            since = writer.record(step, totals, placement, since=since)
            assert since > 0
    assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step) for step in range(STEPS)})


@pytest.mark.parametrize("make", [contiguous, of_inference_mode])
def test_placement_that_changes_in_place_is_seen(tmp_path: Path, make: Callable[[Any], torch.Tensor]) -> None:
    load, placement = contiguous(load_of(0)), make(map_of())
    with open_writer(tmp_path) as writer, torch.inference_mode(make is of_inference_mode):
        for step in range(STEPS):
            if step == STEPS // 2:
                placement.copy_(on_device(map_of()[:, ::-1]))
            assert writer.record(step, load, placement) > 0
    changes = {row["step"] for row in read_table(writer.folder, "placements").to_pylist()}
    assert changes == {0, STEPS // 2}


def test_time_on_the_device_is_that_of_the_pass(tmp_path: Path) -> None:
    load, placement = contiguous(load_of(0)), on_device(map_of())
    with open_writer(tmp_path) as writer:
        for step in range(STEPS):
            writer.begin_step()
            torch.cuda._sleep(BUSY_CYCLES * (1 + step % 2))
            assert writer.record(step, load, placement) > 0
    took = read_table(writer.folder, "steps")["device_ms"].to_pylist()[2:]
    assert all(ms is not None and math.isfinite(ms) and ms > 0 for ms in took)
    assert np.median(took[1::2]) > np.median(took[::2])


def test_prepared_buffers_are_used(tmp_path: Path) -> None:
    load, placement = contiguous(load_of(0)), on_device(map_of())
    with open_writer(tmp_path) as writer:
        writer.prepare(load, placement)
        ring = writer._staging._loads
        assert writer.record(0, load, placement) > 0
        assert writer._staging._loads is ring
    assert_equal_loads(sealed_loads(writer.folder), {0: load_of(0)})
