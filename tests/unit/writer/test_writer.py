"""ExpertLoadWriter: recorded steps read back bit for bit; others are counted with their reason."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    EP_SIZE,
    LAYERS,
    LOGICAL,
    SLOTS,
    Array,
    assert_accounted,
    assert_equal_loads,
    assert_rows_agree,
    load_of,
    manifest,
    map_of,
    open_writer,
    placement_rows,
    read_table,
    sealed_loads,
    step_status,
    survived_loads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_dump import ExpertLoadWriter, WriterStats
from eplb_dump import writer as writer_module
from eplb_dump.format import journal, segment
from eplb_dump.format.schema import MANIFEST_FILE, SESSION_FILE, Scope
from eplb_dump.format.session import SessionInfo, load_json

INT_DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
#: Makes an engine's map of the given content, in one of many ways.
Hand = Callable[[Array], Any]
TORCH_DTYPES = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
SMALL = load_of(0) % 100


class Hostile:
    """Raises on every access, even on repr()."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __hash__(self) -> int:
        raise RuntimeError("hash")


def closed(writer: ExpertLoadWriter) -> WriterStats:
    """Close, and check what holds for every writer without file errors."""
    assert writer.close(30)
    stats = writer.stats()
    assert stats.off is None
    assert_accounted(stats)
    assert_rows_agree(writer.folder, stats)
    recorded = [step for step, status in step_status(writer.folder) if status == "recorded"]
    assert list(sealed_loads(writer.folder)) == recorded
    return stats


# ---- the constructor


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": ""}, "model must be the model's name"),
        ({"model": 7}, "model must be the model's name"),
        ({"scope": "rank"}, 'scope must be "local" or "global", not \'rank\''),
        ({"scope": ["local"]}, 'scope must be "local" or "global"'),
        ({"run_id": ""}, "run_id must be 1 to 128 letters"),
        ({"run_id": "../x"}, "run_id must be 1 to 128 letters"),
        ({"run_id": "x" * 129}, "run_id must be 1 to 128 letters"),
        ({"run_id": 7}, "run_id must be 1 to 128 letters"),
        ({"ep_rank": -1}, "ep_rank must be at least 0, not -1"),
        ({"ep_rank": EP_SIZE}, "ep_rank is 2, but must be below ep_size = 2"),
        ({"ep_rank": "0"}, "ep_rank must be an integer, not str"),
        ({"ep_size": 0}, "ep_size must be at least 1, not 0"),
        ({"ep_size": 2.0}, "ep_size must be an integer, not float"),
        ({"num_logical_experts": 0}, "num_logical_experts must be at least 1, not 0"),
        ({"interval": 0}, "interval must be at least 1, not 0"),
        ({"token_replication": 0}, "token_replication must be at least 1, not 0"),
        ({"ranks_per_node": 0}, "ranks_per_node must be at least 1, not 0"),
        ({"moe_layers": []}, "moe_layers must be the model's layer numbers, ascending, each once"),
        ({"moe_layers": [2, 1]}, "moe_layers must be the model's layer numbers, ascending, each once"),
        ({"moe_layers": [1, 1]}, "moe_layers must be the model's layer numbers, ascending, each once"),
        ({"moe_layers": [-1]}, "each of moe_layers must be at least 0, not -1"),
        ({"moe_layers": ["a"]}, "each of moe_layers must be an integer, not str"),
        ({"moe_layers": 5}, "moe_layers must be"),
        ({"moe_layers": range(4097)}, "moe_layers lists 4097 layers"),
        (
            {"moe_layers": range(17), "num_logical_experts": 65536},
            "moe_layers lists 17 layers; with 65536 logical experts each, that is more than the format",
        ),
        ({"engine": 5}, "engine must be a text, not int"),
        ({"engine_version": (1, 2)}, "engine_version must be a text, not tuple"),
        ({"engine_config": [1]}, "engine_config must be a mapping, not list"),
        ({"engine_config": {"a": object()}}, "engine_config must be plain JSON values"),
        ({"engine_config": {"a": float("nan")}}, "engine_config must be plain JSON values"),
        ({"engine_config": {"a": "x" * (1 << 20)}}, "engine_config must be at most 1,048,576 characters"),
        ({"flush_interval": 0}, "flush_interval must be above 0 seconds and at most 1e+09, not 0"),
        ({"flush_interval": "1"}, "flush_interval must be a number of seconds, not str"),
        (
            {"flush_interval": float("inf")},
            "flush_interval must be above 0 seconds and at most 1e+09, not inf",
        ),
        (
            {"flush_interval": float("nan")},
            "flush_interval must be above 0 seconds and at most 1e+09, not nan",
        ),
        (
            {"flush_interval": 1e10},
            "flush_interval must be above 0 seconds and at most 1e+09, not 10000000000.0",
        ),
        ({"segment_seconds": -1}, "segment_seconds must be above 0 seconds and at most 1e+09, not -1"),
        ({"segment_steps": 0}, "segment_steps must be at least 1, not 0"),
        ({"segment_bytes": 0}, "segment_bytes must be at least 1, not 0"),
        ({"queue_steps": 0}, "queue_steps must be at least 1, not 0"),
        ({"queue_bytes": 0}, "queue_bytes must be at least 1, not 0"),
        ({"queue_bytes": 1.5}, "queue_bytes must be an integer, not float"),
    ],
)
def test_wrong_argument_is_named(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        open_writer(tmp_path, **options)
    assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_argument_is_named() -> None:
    with pytest.raises(TypeError, match="expert_load_dump_dir"):
        open_writer(None)  # type: ignore[arg-type]


def test_bad_run_id_in_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LOAD_DUMP_RUN_ID", "a/b")
    with pytest.raises(ValueError, match=r"run_id must be 1 to 128 letters.*'a/b'"):
        open_writer(tmp_path, run_id=None)


@pytest.mark.parametrize("name", ["segment_bytes", "queue_bytes"])
def test_sizes_above_two_gibibytes_are_accepted(tmp_path: Path, name: str) -> None:
    with open_writer(tmp_path, **{name: 4 << 30}) as writer:
        writer.record(None, SMALL, None)
    assert closed(writer).recorded == 1


def test_session_file_holds_writer_arguments(tmp_path: Path) -> None:
    eplb: dict[str, Any] = {"window": 1000, "sizes": (1, 2)}
    config = {"eplb": eplb, "graphs": {10: "ten", 9: "nine"}, "none": None}
    with open_writer(
        tmp_path,
        model="org/m",
        ep_rank=1,
        scope="global",
        moe_layers=range(3, 3 + LAYERS),
        ranks_per_node=2,
        engine="vllm",
        engine_version="0.33",
        engine_config=config,
        token_replication=4,
        interval=2,
        segment_steps=16,
    ) as writer:
        eplb["window"] = 7  # the engine may go on using it
        writer.record(0, SMALL, None)
    assert writer.folder.parent == tmp_path / "run=r" / "model=org--m" / "rank=00001"
    info = SessionInfo.from_dict(load_json((writer.folder / SESSION_FILE).read_bytes()))
    assert info.engine_config == {
        "eplb": {"window": 1000, "sizes": [1, 2]},
        "graphs": {"10": "ten", "9": "nine"},
        "none": None,
    }
    assert (info.run_id, info.model, info.ep_rank, info.scope) == ("r", "org/m", 1, Scope.GLOBAL)
    assert (info.moe_layers, info.ranks_per_node, info.token_replication) == ((3, 4, 5), 2, 4)
    assert (info.engine, info.engine_version, info.interval, info.segment_steps) == ("vllm", "0.33", 2, 16)
    assert (info.num_moe_layers, info.num_physical_experts, info.ep_size) == (LAYERS, SLOTS, EP_SIZE)
    assert read_table(writer.folder, "loads")["layer"].to_pylist() == [3, 4, 5]


# ---- loads


@pytest.mark.parametrize("dtype", [*INT_DTYPES, *TORCH_DTYPES], ids=str)
def test_any_integer_type_reads_back(tmp_path: Path, dtype: Any) -> None:
    is_torch = isinstance(dtype, torch.dtype)
    top = min((torch.iinfo if is_torch else np.iinfo)(dtype).max, 2**31 - 1)
    truth = {}
    with open_writer(tmp_path) as writer:
        for step in range(3):
            load = np.minimum(load_of(step), top)
            load[step, step + 1] = top
            load[step, 0] = 0
            truth[step] = load
            tensor = torch.tensor(load).to(dtype) if is_torch else load.astype(dtype)
            placement = torch.tensor(map_of()).to(dtype) if is_torch else map_of().astype(dtype)
            writer.record(None, tensor, placement)
    stats = closed(writer)
    assert (stats.seen, stats.recorded) == (3, 3)
    assert_equal_loads(sealed_loads(writer.folder), truth)
    assert placement_rows(writer.folder) == [(0, n, EP_SIZE, tuple(map_of()[n])) for n in range(LAYERS)]


WIDE = load_of(3, slots=2 * SLOTS)
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x[:, :SLOTS],
    "every second column": lambda x: x[:, ::2],
    "transposed": lambda x: x[:, :LAYERS].T[:, :SLOTS] if x.shape[0] >= SLOTS else x.T[:SLOTS].T,
    "broadcast": lambda x: x[:1, :SLOTS] + 0 * x[:, :1],
}


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_layout_reads_back(tmp_path: Path, make: Callable[[Any], Any], view: str) -> None:
    tensor = VIEWS[view](make(WIDE))
    placement = VIEWS[view](make(WIDE % LOGICAL))
    with open_writer(tmp_path) as writer:
        writer.record(None, make(SMALL), None)  # a buffer of another layout's tensor is reused
        writer.record(None, tensor, placement)
    assert closed(writer).recorded == 2
    assert_equal_loads(sealed_loads(writer.folder), {0: SMALL, 1: VIEWS[view](WIDE)})
    assert [row[3] for row in placement_rows(writer.folder)] == [
        tuple(slots) for slots in VIEWS[view](WIDE % LOGICAL)
    ]


SMALL_TENSOR = torch.tensor(SMALL)
KINDS: dict[str, Any] = {
    "parameter": torch.nn.Parameter(SMALL_TENSOR.clone(), requires_grad=False),
    "buffer": torch.nn.Buffer(SMALL_TENSOR.clone()) if hasattr(torch.nn, "Buffer") else SMALL_TENSOR,
    "subclass": type("OwnTensor", (torch.Tensor,), {})(SMALL_TENSOR),
    "shared memory": SMALL_TENSOR.clone().share_memory_(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_tensor_reads_back(tmp_path: Path, kind: str) -> None:
    tensor = KINDS[kind]
    with open_writer(tmp_path) as writer:
        writer.record(None, tensor, None)
        writer.record(None, tensor.detach(), None)
    assert closed(writer).recorded == 2
    assert_equal_loads(sealed_loads(writer.folder), dict.fromkeys((0, 1), np.array(tensor.tolist())))


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("first_inside", [False, True])
def test_tensors_of_inference_mode_are_recorded(
    tmp_path: Path, made_inside: bool, first_inside: bool
) -> None:
    """In every combination of the mode of the tensors and the mode of the buffers."""
    truth = {step: load_of(step) for step in range(6)}
    with open_writer(tmp_path) as writer:
        for step, load in truth.items():
            with torch.inference_mode(made_inside):
                tensor, placement = torch.tensor(load), torch.tensor(map_of(step))
            with torch.inference_mode(first_inside == (step % 2 == 0)):
                writer.record(step, tensor, placement)
    assert closed(writer).recorded == 6
    assert_equal_loads(sealed_loads(writer.folder), truth)
    assert len(placement_rows(writer.folder)) == 6 * LAYERS


def test_numpy_and_torch_can_alternate(tmp_path: Path) -> None:
    truth = {step: load_of(step) for step in range(8)}
    with open_writer(tmp_path) as writer:
        for step, load in truth.items():
            make: Callable[[Any], Any] = np.array if step % 3 else torch.tensor
            writer.record(step, make(load), make(map_of(step // 4)))
    assert closed(writer).recorded == 8
    assert_equal_loads(sealed_loads(writer.folder), truth)
    assert {row[0] for row in placement_rows(writer.folder)} == {0, 4}


def test_tensor_can_be_overwritten_after_record_returns(tmp_path: Path) -> None:
    """Also when buffers run out: recorded loads are exact, dropped ones are counted."""
    tensor = torch.empty((LAYERS, SLOTS), dtype=torch.int64)
    with open_writer(tmp_path, queue_steps=8) as writer:
        for step in range(2000):
            tensor.copy_(torch.from_numpy(load_of(step)))
            writer.record(None, tensor, None)
            tensor.fill_(-1)
    stats = closed(writer)
    found = sealed_loads(writer.folder)
    assert (stats.seen, stats.rejected, len(found)) == (2000, 0, stats.recorded)
    assert stats.recorded >= 8
    assert_equal_loads(found, {step: load_of(step) for step in found})


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@settings(max_examples=60)
@given(
    operations=st.lists(
        st.tuples(
            st.booleans(), st.sampled_from(["record", "bad map", "wrong since", "bad shape", "skip", "flush"])
        ),
        min_size=1,
        max_size=30,
    ),
    interval=st.integers(1, 3),
)
def test_running_totals_are_recorded_as_each_pass_counted(
    make: Callable[[Any], Any], operations: list[tuple[bool, str]], interval: int
) -> None:
    """Or not at all: an engine zeroes its counts now and then, and passes on whatever record returned."""
    total, since, expected = np.zeros((LAYERS, SLOTS), np.int32), 0, {}
    known = True  # whether the counts before this pass are those that `since` stands for
    with tempfile.TemporaryDirectory() as folder, open_writer(Path(folder), interval=interval) as writer:
        for step, (zero, what) in enumerate(operations):
            if zero:
                total, since, known = np.zeros_like(total), 0, True
            counted = load_of(step) % 1000
            total = total + counted
            if what == "skip":
                writer.skip("not_sampled", step)
                since, known = since or -1, False
                continue
            load = make(total[:, :-1]) if what == "bad shape" else make(total)
            placement = make(map_of() + 1000) if what == "bad map" else make(map_of())
            wrong = what == "wrong since" and since > 0
            since = writer.record(step, load, placement, since=since + wrong)
            taken = what != "bad shape" and step % interval == 0
            assert (since > 0) == taken
            if taken and known and not wrong and what != "bad map":
                expected[step] = counted
            known = taken
            if what == "flush":
                assert writer.flush(30)
        stats = closed(writer)
        assert_equal_loads(sealed_loads(writer.folder), expected)
    assert stats.recorded == len(expected)


@pytest.mark.parametrize("interval", [1, 3])
def test_totals_that_are_never_zeroed_are_never_taken_for_one_pass(
    tmp_path: Path, gate: threading.Event, interval: int
) -> None:
    """The loop of the docs, whose queue is full for a while."""
    totals, since = np.zeros((LAYERS, SLOTS), np.int64), 0
    with open_writer(tmp_path, queue_steps=4, interval=interval) as writer:
        for step in range(60):
            totals += load_of(step)
            since = writer.record(step, totals, map_of(), since=since)
            if step == 30:
                gate.set()
            assert step <= 30 or writer.flush(30)
    stats = closed(writer)
    assert stats.dropped > 0
    found = sealed_loads(writer.folder)
    assert_equal_loads(found, {step: load_of(step) for step in found})
    assert len(found) >= (30 if interval == 1 else 1)


def test_prepared_buffers_are_those_that_record_uses(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.prepare(Hostile())
        writer.prepare(load_of(0), map_of())
        loads = writer._staging._loads
        writer.record(0, load_of(0), map_of())
        assert writer._staging._loads is loads
    assert closed(writer).recorded == 1


def test_tokens_phase_and_times_read_back(tmp_path: Path) -> None:
    before = time.time_ns(), time.monotonic_ns()
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None, 17, "prefill")
        writer.record(None, SMALL, None, num_tokens=0, phase="decode")
        writer.record(None, SMALL, None)
        writer.record(None, SMALL, None, 2**40, "prefill")
    closed(writer)
    after = time.time_ns(), time.monotonic_ns()
    steps = read_table(writer.folder, "steps")
    assert steps["num_tokens"].to_pylist() == [17, 0, None, 2**40]
    assert steps["phase"].to_pylist() == ["prefill", "decode", None, "prefill"]
    assert steps["step_ms"].to_pylist() == steps["device_ms"].to_pylist() == [None] * 4
    for column, low, high in zip(("time", "monotonic_ns"), before, after, strict=True):
        values = steps[column].cast("int64").to_pylist()
        assert [low, *values, high] == sorted([low, *values, high])


# ---- placements

#: Generation of the placement at each step; only layer 1 moves at step 3, only 0 and 2 at step 7.
CHANGES = {0: (0, 0, 0), 3: (0, 1, 0), 7: (2, 1, 2), 8: (2, 0, 2)}
CHANGED_ROWS = [(0, 0), (0, 1), (0, 2), (3, 1), (7, 0), (7, 2), (8, 1)]


def placement_at(step: int) -> Array:
    generations = CHANGES[max(n for n in CHANGES if n <= step)]
    return np.stack([map_of(generation)[layer] for layer, generation in enumerate(generations)])


def new_numpy() -> Hand:
    return np.copy


def numpy_in_place() -> Hand:
    buffer = map_of()

    def hand(content: Array) -> Any:
        buffer[...] = content
        return buffer

    return hand


def new_torch() -> Hand:
    hand: Hand = torch.tensor
    return hand


def torch_in_place(view: Callable[[Any], Any] = lambda x: x) -> Hand:
    buffer = torch.zeros((LAYERS, SLOTS), dtype=torch.int32)

    def hand(content: Array) -> Any:
        if not np.array_equal(buffer.numpy(), content):
            buffer.copy_(torch.tensor(content))
        return view(buffer)

    return hand


def torch_in_place_by_row() -> Hand:
    buffer = torch.tensor(map_of())

    def hand(content: Array) -> Any:
        for layer, slots in enumerate(content):
            if not np.array_equal(buffer[layer].numpy(), slots):
                buffer[layer] = torch.tensor(slots)
        return buffer

    return hand


def torch_view() -> Hand:
    return torch_in_place(lambda x: x[:])


def torch_data() -> Hand:
    """``.data`` is a new tensor each time, with a version counter of its own."""
    buffer = torch.zeros((LAYERS, SLOTS), dtype=torch.int32)

    def hand(content: Array) -> Any:
        buffer.data.copy_(torch.tensor(content))
        return buffer.data

    return hand


def torch_of_numpy_in_place() -> Hand:
    """torch does not notice when numpy changes the memory that they share."""
    hand = numpy_in_place()
    return lambda content: torch.from_numpy(hand(content))


def torch_inference() -> Hand:
    def hand(content: Array) -> Any:
        with torch.inference_mode():
            return torch.tensor(content)

    return hand


def torch_inference_in_place() -> Hand:
    with torch.inference_mode():
        buffer = torch.zeros((LAYERS, SLOTS), dtype=torch.int64)

    def hand(content: Array) -> Any:
        with torch.inference_mode():
            return buffer.copy_(torch.tensor(content))

    return hand


def none_where_unchanged() -> Hand:
    last: list[Array] = []

    def hand(content: Array) -> Any:
        if last and np.array_equal(last[-1], content):
            return None
        last.append(content)
        return content

    return hand


HANDS = [
    new_numpy,
    numpy_in_place,
    new_torch,
    torch_in_place,
    torch_in_place_by_row,
    torch_view,
    torch_data,
    torch_of_numpy_in_place,
    torch_inference,
    torch_inference_in_place,
    none_where_unchanged,
]


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.__name__)
@pytest.mark.parametrize("inference", [False, True])
def test_only_changed_layers_have_placement_rows(
    tmp_path: Path, hand: Callable[[], Hand], inference: bool
) -> None:
    """For every way of passing the map, and whenever the background thread runs."""
    give = hand()
    with open_writer(tmp_path) as writer, torch.inference_mode(inference):
        for step in range(10):
            writer.record(None, load_of(step), give(placement_at(step)))
            assert step % 4 or writer.flush()
    assert closed(writer).recorded == 10
    assert placement_rows(writer.folder) == [
        (step, layer, EP_SIZE, tuple(placement_at(step)[layer])) for step, layer in CHANGED_ROWS
    ]


def test_unchanged_placement_tensor_is_not_copied_again(tmp_path: Path, gate: threading.Event) -> None:
    """On a GPU that would be a useless copy in every step."""
    tensor = torch.tensor(map_of())
    with open_writer(tmp_path) as writer:
        for step in range(20):
            if step == 10:
                tensor[0, 0] = 5
            writer.record(None, SMALL, tensor if step % 2 else tensor[:])
        assert [i for i, entry in enumerate(writer._accounting.entries) if entry.placement is not None] == [
            0,
            10,
        ]
        gate.set()
    assert closed(writer).recorded == 20


def test_empty_slots_and_missing_placement_are_recorded(tmp_path: Path) -> None:
    placement = map_of()
    placement[1, 2:] = -1
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None)
        writer.record(None, SMALL, placement)
        writer.record(None, SMALL, None)
    assert closed(writer).recorded == 3
    assert placement_rows(writer.folder) == [(1, n, EP_SIZE, tuple(placement[n])) for n in range(LAYERS)]


def test_placement_of_rejected_load_is_kept(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        placement = torch.tensor(map_of())
        writer.record(None, -1 - SMALL, placement)
        writer.record(None, SMALL, placement)
    stats = closed(writer)
    assert (stats.recorded, stats.reject_reasons) == (1, {"negative counts": 1})
    assert [row[:2] for row in placement_rows(writer.folder)] == [(0, n) for n in range(LAYERS)]


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("fault", ["expert", "below", "shape"])
def test_loads_are_rejected_while_placement_is_invalid(
    tmp_path: Path, make: Callable[[Any], Any], fault: str
) -> None:
    wrong = map_of()[:, :-1] if fault == "shape" else map_of()
    wrong[0, 0] = {"expert": LOGICAL, "below": -2, "shape": 0}[fault]
    right, wrong_tensor = make(map_of()), make(wrong)
    with open_writer(tmp_path) as writer:
        for placement in (right, wrong_tensor, wrong_tensor, None, right, None):
            writer.record(None, SMALL, placement)
    stats = closed(writer)
    assert (stats.recorded, stats.rejected) == (3, 3)
    # Rejected: steps that came with it, and steps that relied on it (also through an unchanged tensor).
    assert all("physical_to_logical_map" in reason for reason in stats.reject_reasons)
    assert stats.reject_reasons["the last physical_to_logical_map was not valid"] == 2
    assert list(sealed_loads(writer.folder)) == [0, 4, 5]
    assert [row[0] for row in placement_rows(writer.folder)] == [0, 0, 0]


def test_rearrangement_of_one_layer_per_step_drops_nothing(tmp_path: Path) -> None:
    """One layer per step, as asynchronous engines do."""
    layers, steps = 60, 120
    placement = torch.tensor(map_of(0, layers))
    with open_writer(tmp_path) as writer:
        writer.record(None, load_of(0, layers=layers), placement)
        for step in range(1, steps):
            layer = step % layers
            placement[layer] = torch.tensor(map_of(1 + step // layers, layers)[layer])
            writer.record(None, load_of(step, layers=layers), placement)
            assert step % 32 or writer.flush(60)  # engines are slower, so the background thread keeps up
    assert closed(writer).recorded == steps
    changes = [row[:2] for row in placement_rows(writer.folder)[layers:]]
    assert changes == [(step, step % layers) for step in range(1, steps)]


# ---- which steps


def test_interval_records_every_nth_step(tmp_path: Path) -> None:
    with open_writer(tmp_path, interval=3, segment_steps=2) as writer:
        for step in range(10):
            writer.record(None, load_of(step), map_of(step))
    stats = closed(writer)
    assert (stats.seen, stats.recorded, stats.not_sampled) == (10, 4, 6)
    assert_equal_loads(sealed_loads(writer.folder), {n: load_of(n) for n in (0, 3, 6, 9)})
    # A later step may rely on a map that came between two sampled steps.
    assert sorted({row[0] for row in placement_rows(writer.folder)}) == list(range(10))
    assert step_status(writer.folder) == [(n, "not_sampled" if n % 3 else "recorded") for n in range(10)]
    assert len(list(writer.folder.glob("steps-*"))) == 2  # 2 recorded steps each: 0 to 5, 6 to 11


def test_skipped_steps_keep_their_reason(tmp_path: Path) -> None:
    reasons = ["dummy", "not_sampled", "dropped", "dummy", "holiday"]
    with open_writer(tmp_path) as writer:
        for reason in reasons:
            writer.skip(reason)
        writer.skip(step=9)
        writer.record(None, SMALL, None)
    stats = closed(writer)
    assert (stats.dummy, stats.not_sampled, stats.recorded) == (3, 1, 1)
    assert stats.drop_reasons == {"by the engine": 1}
    assert stats.reject_reasons == {"skip was called with the unknown reason 'holiday'": 1}
    assert stats.unlisted == 0
    status = [*reasons[:4], "rejected"]
    assert step_status(writer.folder) == [*enumerate(status), (9, "dummy"), (10, "recorded")]


def test_step_that_goes_back_is_rejected(tmp_path: Path) -> None:
    steps: list[Any] = [3, np.int32(5), 5, 4, None, 100, 0, -7, None]
    with open_writer(tmp_path) as writer:
        for step in steps:
            writer.record(step, SMALL, None)
    stats = closed(writer)
    assert list(sealed_loads(writer.folder)) == [3, 5, 6, 100, 101]
    assert (stats.seen, stats.recorded, stats.rejected, stats.unlisted) == (9, 5, 4, 1)
    assert Counter(stats.reject_reasons.values()) == Counter({1: 2, 2: 1})
    assert [n for n, status in step_status(writer.folder) if status == "rejected"] == [5, 4, 0]


# ---- what cannot be recorded


BAD_LOADS: dict[str, Any] = {
    "slots that do not divide": load_of(0, slots=SLOTS - 1),
    "one dimension": load_of(0)[0],
    "three dimensions": load_of(0)[None],
    "no dimension": np.array(5),
    "no slots": load_of(0)[:, :0],
    "no layers": load_of(0)[:0],
    "float": load_of(0).astype(np.float32),
    "NaN": np.full((LAYERS, SLOTS), np.nan),
    "bool": load_of(0) > 5,
    "complex": load_of(0).astype(complex),
    "object": load_of(0).astype(object),
    "text": load_of(0).astype(str),
    "time": load_of(0).astype("m8[ns]"),
    "foreign byte order": load_of(0).astype(">i4"),
    "negative": load_of(0) - 1,
    "negative int8": np.full((LAYERS, SLOTS), -1, np.int8),
    "too large": load_of(0) + 2**31 - 1,
    "too large uint64": np.full((LAYERS, SLOTS), 2**64 - 1, np.uint64),
    "torch float": torch.tensor(load_of(0)).float(),
    "torch NaN": torch.full((LAYERS, SLOTS), torch.nan),
    "torch bool": torch.tensor(load_of(0)) > 5,
    "torch negative": torch.tensor(load_of(0)) - 1,
    "torch one dimension": torch.tensor(load_of(0))[0],
    "torch meta": torch.empty((LAYERS, SLOTS), dtype=torch.int64, device="meta"),
    "torch sparse": torch.tensor(load_of(0)).to_sparse(),
    "torch bits": torch.empty((LAYERS, SLOTS), dtype=torch.bits8),
    "a text": "load",
    "a list": load_of(0).tolist(),
    "a number": 7,
    "None": None,
    "a type": np.ndarray,
    "an object": object(),
    "a hostile object": Hostile(),
}


@pytest.mark.parametrize("kind", BAD_LOADS)
@pytest.mark.parametrize("make", [None, np.array, torch.tensor], ids=["first", "after numpy", "after torch"])
def test_bad_load_is_rejected_and_counted(
    tmp_path: Path, kind: str, make: Callable[[Any], Any] | None
) -> None:
    good = make or np.array
    with open_writer(tmp_path) as writer:
        if make is not None:
            writer.record(None, make(load_of(0)), make(map_of()))
        writer.record(None, BAD_LOADS[kind], good(map_of()))
        writer.record(None, good(load_of(9)), good(map_of()))
    stats = closed(writer)
    n = make is not None
    assert (stats.seen, stats.recorded, stats.rejected, stats.unlisted) == (n + 2, n + 1, 1, 0)
    assert step_status(writer.folder)[n:] == [(n, "rejected"), (n + 1, "recorded")]
    assert_equal_loads(sealed_loads(writer.folder), {0: load_of(0), 2: load_of(9)} if n else {1: load_of(9)})


BAD_MAPS = {
    kind: value
    for kind, value in BAD_LOADS.items()
    if kind not in {"None", "negative", "torch negative", "negative int8"}
} | {"below -1": map_of() - 2, "torch below -1": torch.tensor(map_of() - 2)}


@pytest.mark.parametrize("kind", BAD_MAPS)
@pytest.mark.parametrize("make", [None, np.array, torch.tensor], ids=["first", "after numpy", "after torch"])
def test_bad_placement_is_rejected_and_counted(
    tmp_path: Path, kind: str, make: Callable[[Any], Any] | None
) -> None:
    good = make or np.array
    with open_writer(tmp_path) as writer:
        if make is not None:
            writer.record(None, make(load_of(0)), make(map_of()))
        writer.record(None, good(load_of(5)), BAD_MAPS[kind])
        writer.record(None, good(load_of(9)), good(map_of()))
    stats = closed(writer)
    n = make is not None
    assert (stats.seen, stats.recorded, stats.rejected, stats.unlisted) == (n + 2, n + 1, 1, 0)
    assert_equal_loads(sealed_loads(writer.folder), {0: load_of(0), 2: load_of(9)} if n else {1: load_of(9)})
    expected = [(0 if n else 1, layer, EP_SIZE, tuple(map_of()[layer])) for layer in range(LAYERS)]
    assert placement_rows(writer.folder) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": "1"},
        {"step": 1.0},
        {"step": True},
        {"step": -1},
        {"step": 2**63},
        {"step": 2**70},
        {"step": np.uint64(2**63)},
        {"step": torch.tensor(1)},
        {"step": Hostile()},
        {"ep_size": "2"},
        {"ep_size": 0},
        {"ep_size": -4},
        {"ep_size": 3},
        {"ep_size": 4.0},
        {"ep_size": 2**70},
        {"ep_size": Hostile()},
    ],
    ids=lambda arguments: next(f"{k}={type(v).__name__}" for k, v in arguments.items()),
)
def test_bad_step_or_ep_size_is_rejected_and_forgotten(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with open_writer(tmp_path) as writer:
        writer.record(1, load_of(1), map_of())
        writer.record(arguments.get("step"), SMALL, None, ep_size=arguments.get("ep_size"))
        writer.flush()
        writer.record(None, load_of(7), None)
    stats = closed(writer)
    assert (stats.seen, stats.recorded, stats.rejected) == (3, 2, 1)
    last = 2 if "step" in arguments else 3
    assert_equal_loads(sealed_loads(writer.folder), {1: load_of(1), last: load_of(7)})
    assert set(read_table(writer.folder, "loads")["ep_size"].to_pylist()) == {EP_SIZE}


TEXT = "x"


class HostileFloat(np.float64):
    """A number that raises when it is looked at."""

    def __float__(self) -> float:
        raise RuntimeError("do not look")

    __ge__ = __lt__ = __float__


def test_step_ms_reads_back(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for value in (8.25, None, 3, np.float32(0.5), np.float64(0), np.int16(7), np.float16(2)):
            writer.record(None, SMALL, None, step_ms=value)
        writer.skip()
    assert closed(writer).recorded == 7
    assert read_table(writer.folder, "steps")["step_ms"].to_pylist() == [8.25, None, 3, 0.5, 0, 7, 2, None]


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, -0.1, np.float32("nan"), np.float16("inf"), np.longdouble("1e4000"), 2**62,
        10**400, 1e300, True, TEXT, torch.ones(1), Hostile(), HostileFloat(1),
    ],
    ids=type,
)  # fmt: skip
def test_step_ms_that_is_no_time_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None, step_ms=value)
    assert closed(writer).recorded == 1
    assert read_table(writer.folder, "steps")["step_ms"].to_pylist() == [None]
    assert "step_ms is not a time in ms; recording the step without it" in caplog.text


@pytest.mark.parametrize("value", [TEXT, -1, 1.5, 2**62, True, object(), Hostile()], ids=type)
def test_bad_num_tokens_or_phase_is_left_out(tmp_path: Path, value: Any) -> None:
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None, num_tokens=value, phase="x" * 65 if value is TEXT else value)
    assert closed(writer).recorded == 1
    assert read_table(writer.folder, "steps").select(["num_tokens", "phase"]).to_pylist() == [
        {"num_tokens": None, "phase": None}
    ]


def test_phase_that_is_not_unicode_does_not_stop_sealing(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None, phase="\ud800")
    assert closed(writer).recorded == 1


@pytest.mark.parametrize("reason", ["", "x" * 999, ["dummy"], {}, object(), Hostile()], ids=type)
def test_skip_with_bad_reason_or_step_is_rejected(tmp_path: Path, reason: Any) -> None:
    with open_writer(tmp_path) as writer:
        writer.skip(reason)
        writer.skip(step=reason)
        writer.record(None, SMALL, None)
    stats = closed(writer)
    assert (stats.seen, stats.recorded, stats.rejected) == (3, 1, 2)


def test_each_warning_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also if it occurs just before ``close``."""
    with open_writer(tmp_path) as writer:
        for _ in range(5):
            writer.record(None, -1 - SMALL, None)
        assert writer.flush()
        for _ in range(5):
            writer.record(None, -1 - SMALL, None)
        writer.record(None, SMALL, map_of() + LOGICAL)
    assert closed(writer).rejected == 11
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in texts if "negative counts" in text] == texts[:1]
    assert [text for text in texts if "expert that does not exist" in text] == texts[1:]
    assert len(texts) == 2


# ---- accounting

LOADS = st.sampled_from(["good", "wider", "deeper", *BAD_LOADS])
#: "same": of the shape of the load, as engines pass it.
MAPS = st.sampled_from(["none", "good", "changed", "same", *BAD_MAPS])
STEPS = st.sampled_from([None, -2, -1, 0, 1, 2, 5, "x", 1.5, 2**70])
SIZES = st.sampled_from([None, 2, 4, 3, "x"])
#: Most operations are valid, so that the invalid ones occur between valid ones.
RIGHT = st.tuples(
    st.just("record"), st.none(), st.just("good"), st.sampled_from(["none", "same", "changed"]), st.none()
)
OTHER_SHAPE = st.tuples(
    st.just("record"),
    st.none(),
    st.sampled_from(["wider", "deeper"]),
    st.just("same"),
    st.sampled_from([None, 4]),
)
SKIP = st.tuples(st.just("skip"), st.sampled_from(["dummy", "not_sampled", "dropped"]))
WRONG = st.one_of(
    st.tuples(st.just("record"), STEPS, LOADS, MAPS, SIZES),
    st.tuples(st.just("skip"), st.sampled_from(["?", None, ["dummy"]])),
)
OPERATIONS = st.one_of(RIGHT, RIGHT, RIGHT, OTHER_SHAPE, SKIP, WRONG, st.just(("flush",)))


def run_operations(writer: ExpertLoadWriter, operations: list[Any]) -> dict[int, Array]:
    """Returns the loads of all steps that may have been recorded."""
    handed: dict[int, Array] = {}
    step = 0
    for operation in operations:
        if operation[0] == "record":
            _, change, load, placement, ep_size = operation
            if isinstance(change, int) and change < 2**60:
                change += step  # sometimes repeated or going back
            shape = {"wider": {"slots": 2 * SLOTS}, "deeper": {"layers": LAYERS + 1}}.get(load, {})
            load_tensor = BAD_LOADS.get(load, load_of(step, **shape))
            maps = {"none": None, "good": map_of(), "changed": map_of(step)}
            maps["same"] = map_of(step, **shape)
            number = change if isinstance(change, int) else step
            writer.record(change, load_tensor, BAD_MAPS.get(placement, maps.get(placement)), ep_size=ep_size)
            # An invalid or earlier step number is rejected. The first depth recorded is the model's.
            if writer._next_step > step and load in ("good", "wider", "deeper"):
                handed[number] = load_tensor
        elif operation[0] == "skip":
            writer.skip(operation[1])
        else:
            writer.flush()
        step = writer._next_step
    return handed


@settings(max_examples=100)
@given(st.lists(OPERATIONS, min_size=5, max_size=30), st.sampled_from([1, 1, 2]), st.sampled_from([3, 2048]))
def test_all_seen_steps_are_accounted_for(operations: list[Any], interval: int, segment_steps: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        with open_writer(root, interval=interval, segment_steps=segment_steps) as writer:
            handed = run_operations(writer, operations)
        stats = closed(writer)
        assert stats.seen == sum(operation[0] != "flush" for operation in operations)
        sealed = sealed_loads(writer.folder)
        assert len(sealed) == stats.recorded
        for step, load in sealed.items():
            assert np.array_equal(load, handed[step])
        (*_, last) = manifest(writer.folder)
        assert last.kind == "closed"
        told = {name: last.header["stats"][name] for name in ("seen", "recorded", "dropped", "rejected")}
        assert told == {name: getattr(stats, name) for name in told}


def test_accounting_is_exact_between_calls(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the background thread rejects steps that were accepted."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with open_writer(tmp_path) as writer:
            for _ in range(500):
                writer.record(None, -1 - SMALL, None)
            gate.set()
            while (stats := writer.stats()).rejected < 500:
                assert_accounted(stats)
    finally:
        sys.setswitchinterval(interval)
    assert closed(writer).rejected == 500


_audited: list[str] | None = None
_audited_thread = threading.get_ident()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _audited is not None and threading.get_ident() == _audited_thread:
        _audited.append(event)


sys.addaudithook(_audit)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_record_and_skip_do_no_io(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    """Also when segments end, steps are dropped or rejected, and shapes change."""
    global _audited  # noqa: PLW0603 - an audit hook stays for the life of the process
    tensors = [make(load_of(step, slots=8 + 4 * (step > 30))) for step in range(60)]
    maps = [make(map_of(step // 10, slots=8 + 4 * (step > 30))) for step in range(60)]
    events: list[str] = []
    with open_writer(tmp_path, segment_steps=5, queue_steps=16, flush_interval=0.001) as writer:
        _audited = events
        try:
            for tensor, placement in zip(tensors, maps, strict=True):
                writer.record(None, tensor, placement)
                writer.record(0, tensor, placement)
                writer.record(None, "x", placement)
                writer.skip()
                writer.skip("?")
        finally:
            _audited = None
    assert closed(writer).seen == 300
    assert [event for event in events if event.startswith(("open", "os.", "socket", "subprocess"))] == []


def test_threads_can_record_concurrently(tmp_path: Path) -> None:
    with open_writer(tmp_path, queue_steps=2048) as writer:

        def record() -> None:
            for _ in range(200):
                writer.record(None, SMALL, None)

        threads = [threading.Thread(target=record) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stats = closed(writer)
    assert (stats.seen, stats.recorded) == (800, 800)
    assert list(sealed_loads(writer.folder)) == list(range(800))


# ---- the queue


@pytest.mark.parametrize(
    ("options", "room"),
    [({"queue_steps": 6}, 6), ({"queue_bytes": 10 * LAYERS * SLOTS * 8}, 10), ({"queue_bytes": 1}, 4)],
)
def test_full_queue_drops_newest_steps(
    tmp_path: Path, gate: threading.Event, options: dict[str, int], room: int
) -> None:
    """The engine never waits; the drops are counted and listed."""
    with open_writer(tmp_path, **options) as writer:
        began = time.monotonic()
        for step in range(20):
            writer.record(None, load_of(step), map_of())
        assert time.monotonic() - began < 30  # the gate stays closed for a minute
        assert not writer.flush(timeout=0.01)
        assert writer.stats().dropped == 20 - room
        gate.set()
        assert writer.flush()
        writer.record(None, load_of(20), map_of())
    stats = closed(writer)
    assert (stats.seen, stats.recorded) == (21, room + 1)
    assert stats.drop_reasons == {"the queue is full": 20 - room}
    assert_equal_loads(sealed_loads(writer.folder), {n: load_of(n) for n in (*range(room), 20)})
    expected = ["recorded"] * room + ["dropped"] * (20 - room) + ["recorded"]
    assert step_status(writer.folder) == list(enumerate(expected))


@pytest.mark.parametrize("kind", ["a text", "float", "torch sparse", "torch meta", "one dimension"])
def test_rejected_step_frees_its_buffers(tmp_path: Path, gate: threading.Event, kind: str) -> None:
    good = torch.tensor(map_of())
    with open_writer(tmp_path, queue_steps=4) as writer:
        writer.record(None, SMALL, good)
        for _ in range(100):
            writer.record(None, SMALL, BAD_MAPS[kind])
            writer.record(None, BAD_LOADS[kind], good)
        for _ in range(3):
            writer.record(None, SMALL, good)
        gate.set()
    stats = closed(writer)
    assert (stats.seen, stats.recorded, stats.rejected) == (204, 4, 200)


def test_queue_of_steps_without_loads_is_bounded(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_MAX_WAITING", 8)
    with open_writer(tmp_path) as writer:
        for step in range(12):
            writer.skip("dummy" if step % 2 else "not_sampled")
        writer.skip("dropped")
        writer.skip("holiday")
        writer.record(None, SMALL, None)
        gate.set()
    stats = closed(writer)
    assert (stats.seen, stats.dummy, stats.not_sampled, stats.unlisted) == (15, 4, 4, 7)
    assert (stats.dropped, stats.rejected) == (6, 1)
    assert step_status(writer.folder) == [(n, "dummy" if n % 2 else "not_sampled") for n in range(8)]


def test_step_is_written_within_flush_interval(tmp_path: Path) -> None:
    with open_writer(tmp_path, flush_interval=0.2) as writer:
        writer.record(None, load_of(0), None)
        began = time.monotonic()
        while not survived_loads(writer.folder) and time.monotonic() < began + 10:
            time.sleep(0.01)
        assert time.monotonic() < began + 5  # a busy machine may need longer than the interval
        assert_equal_loads(survived_loads(writer.folder), {0: load_of(0)})


def test_flushed_steps_are_readable_while_writer_is_open(tmp_path: Path) -> None:
    truth: dict[int, Array] = {}
    with open_writer(tmp_path, segment_steps=5, flush_interval=60) as writer:
        for step in range(12):
            writer.record(None, load_of(step), map_of())
            truth[step] = load_of(step)
            assert writer.flush()
            assert_equal_loads(survived_loads(writer.folder), truth)
    closed(writer)
    assert_equal_loads(sealed_loads(writer.folder), truth)


# ---- the end


def test_steps_after_close_are_dropped_and_counted(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    writer.record(None, SMALL, None)
    assert writer.close()
    assert writer.close()
    for _ in range(3):
        writer.record(None, SMALL, None)
    writer.skip()
    writer.skip("dropped")
    stats = writer.stats()
    assert_accounted(stats)
    assert (stats.seen, stats.recorded, stats.dropped, stats.unlisted) == (6, 1, 5, 5)
    assert stats.drop_reasons["the writer is closed"] == 4
    assert step_status(writer.folder) == [(0, "recorded")]


def test_context_manager_closes_after_exception(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), open_writer(tmp_path) as writer:
        writer.record(None, SMALL, None)
        raise KeyError
    assert_equal_loads(sealed_loads(writer.folder), {0: SMALL})
    assert [frame.kind for frame in manifest(writer.folder)] == ["session", "sealed", "closed"]


def test_close_without_steps_succeeds(tmp_path: Path) -> None:
    assert closed(open_writer(tmp_path)).seen == 0


def test_close_and_flush_respect_timeout(tmp_path: Path, gate: threading.Event) -> None:
    writer = open_writer(tmp_path)
    writer.record(None, SMALL, None)
    began = time.monotonic()
    assert not writer.flush(0.05)
    assert not writer.close(0.1)
    assert 0.14 < time.monotonic() - began < 30  # the gate stays closed for a minute
    gate.set()
    writer._background._ended.wait(60)
    assert_equal_loads(sealed_loads(writer.folder), {0: SMALL})


def test_journal_that_cannot_be_sealed_stays_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no room")

    with open_writer(tmp_path, segment_steps=2) as writer:
        monkeypatch.setattr(segment, "seal", fail)
        for step in range(3):
            writer.record(None, load_of(step), None)
    assert_accounted(writer.stats())
    assert writer.stats().recorded == 3
    assert_equal_loads(survived_loads(writer.folder), {n: load_of(n) for n in range(3)})
    texts = " ".join(record.getMessage() for record in caplog.records)
    assert texts.count("a journal could not be sealed") == 1  # once, however many
    assert "no room" in texts
    assert not (writer.folder / MANIFEST_FILE).exists()  # not closed: a journal is left to be sealed


# ---- segments


def segments(folder: Path, table: str = "steps") -> list[list[int]]:
    """The steps of each sealed segment."""
    files = sorted(folder.glob(f"{table}-*.parquet"))
    return [sorted(set(pq.ParquetFile(file).read(["step"])["step"].to_pylist())) for file in files]


def test_segments_end_at_common_steps(tmp_path: Path) -> None:
    """At multiples of segment_steps, whichever step a writer began at, so that ranks seal alike."""
    with open_writer(tmp_path, segment_steps=4) as writer:
        for step in [*range(2, 10), 11, 12, 25, 26]:
            writer.record(step, load_of(step), map_of())
    closed(writer)
    assert segments(writer.folder) == [[2, 3], [4, 5, 6, 7], [8, 9, 11], [12], [25, 26]]
    assert segments(writer.folder, "loads") == segments(writer.folder)
    assert segments(writer.folder, "placements") == [[2]]
    sealed = [frame.header for frame in manifest(writer.folder) if frame.kind == "sealed"]
    assert [(e["seq"], e["first_step"], e["last_step"]) for e in sealed] == [
        (n, steps[0], steps[-1]) for n, steps in enumerate(segments(writer.folder))
    ]
    assert writer.stats().segments_sealed == 5


def test_segments_end_by_size(tmp_path: Path) -> None:
    with open_writer(tmp_path, segment_bytes=2000) as writer:
        for step in range(30):
            writer.record(None, load_of(step), None)
            assert writer.flush()
    closed(writer)
    parts = segments(writer.folder)
    assert [step for part in parts for step in part] == list(range(30))
    assert len(parts) > 5
    assert max(map(len, parts)) < 10


def test_segments_end_by_time(tmp_path: Path) -> None:
    with open_writer(tmp_path, segment_seconds=0.05, flush_interval=0.02) as writer:
        for step in range(2):
            writer.record(None, load_of(step), None)
            deadline = time.monotonic() + 60
            while writer.stats().segments_sealed <= step and time.monotonic() < deadline:
                time.sleep(0.005)
            assert segments(writer.folder) == [[n] for n in range(step + 1)]
    closed(writer)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_elastic_ep_begins_new_segments_and_loses_nothing(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    """ep_size grows at step 3, slots at 6, both shrink at 9; the placement is stated again each time."""
    shapes = {0: (2, 8), 3: (4, 8), 6: (4, 12), 9: (2, 8)}
    truth, wanted = {}, []
    with open_writer(tmp_path, num_logical_experts=LOGICAL) as writer:
        for step in range(12):
            ep_size, slots = shapes[step // 3 * 3]
            truth[step] = load_of(step, slots=slots)
            new = ep_size if step in shapes else None
            writer.record(step, make(truth[step]), make(map_of(slots=slots)), ep_size=new)
            if step in shapes:
                wanted += [(step, n, ep_size, tuple(map_of(slots=slots)[n])) for n in range(LAYERS)]
    assert closed(writer).recorded == 12
    assert segments(writer.folder) == [[n, n + 1, n + 2] for n in shapes]
    assert_equal_loads(sealed_loads(writer.folder), truth)
    assert placement_rows(writer.folder) == wanted
    for row in read_table(writer.folder, "loads").to_pylist():
        ep_size, slots = shapes[row["step"] // 3 * 3]
        by_rank = truth[row["step"]][row["layer"]].reshape(ep_size, slots // ep_size).sum(axis=1)
        assert (row["ep_size"], row["rank_load"]) == (ep_size, by_rank.tolist())


@pytest.mark.parametrize("generation", [None, 0, 1], ids=["no map", "the same map", "another map"])
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_change_of_ep_size_restates_whole_placement(
    tmp_path: Path, make: Callable[[Any], Any], generation: int | None
) -> None:
    """The slots are on other ranks now, also if only one layer or none changed."""
    before = make(map_of())
    after = map_of()
    after[1] = map_of(generation or 0)[1]
    handed = {None: None, 0: before, 1: make(after)}[generation]
    with open_writer(tmp_path) as writer:
        writer.record(None, SMALL, before)
        writer.record(None, SMALL, handed, ep_size=4)
        writer.record(None, SMALL, handed)
    assert closed(writer).recorded == 3
    assert placement_rows(writer.folder) == [
        *((0, n, 2, tuple(map_of()[n])) for n in range(LAYERS)),
        *((1, n, 4, tuple(after[n])) for n in range(LAYERS)),
    ]


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_old_placement_is_rejected_after_change_of_slots(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    old, new = make(map_of()), make(map_of(slots=12))
    with open_writer(tmp_path) as writer:
        writer.record(0, SMALL, old)
        writer.record(1, load_of(1, slots=12), old)
        writer.record(2, load_of(2, slots=12), new)
    stats = closed(writer)
    assert (stats.recorded, stats.rejected) == (2, 1)
    assert list(sealed_loads(writer.folder)) == [0, 2]
    assert [(row[0], len(row[3])) for row in placement_rows(writer.folder)] == [(0, 8)] * 3 + [(2, 12)] * 3


def test_placement_of_old_slots_is_not_restated(tmp_path: Path) -> None:
    """Without a map of the new number of slots the placement is unknown, not the old one."""
    with open_writer(tmp_path) as writer:
        writer.record(0, SMALL, map_of())
        writer.record(1, load_of(1, slots=12), None, ep_size=4)
        writer.record(2, load_of(2, slots=12), map_of(slots=12))
    assert closed(writer).recorded == 3
    found = [(row[0], row[2], len(row[3])) for row in placement_rows(writer.folder)]
    assert found == [(0, 2, 8)] * 3 + [(2, 4, 12)] * 3


# ---- runs


def test_writers_of_one_rank_never_overwrite_each_other(tmp_path: Path) -> None:
    writers = [open_writer(tmp_path) for _ in range(3)]
    for step in range(4):
        for n, writer in enumerate(writers):
            writer.record(step, load_of(step, rank=n), map_of())
    for n, writer in enumerate(writers):
        closed(writer)
        assert_equal_loads(sealed_loads(writer.folder), {step: load_of(step, rank=n) for step in range(4)})
    assert len({writer.folder for writer in writers}) == 3
    assert {writer.folder.parent for writer in writers} == {tmp_path / "run=r" / "model=m" / "rank=00000"}


@pytest.mark.parametrize(
    ("second", "joins"),
    [
        ({}, True),
        ({"model": "drafter", "ep_rank": 0, "num_logical_experts": 4}, True),
        ({"ep_rank": 0}, False),
        ({"ep_size": 8}, False),
        ({"num_logical_experts": 7}, False),
        ({"scope": "global"}, False),
    ],
)
def test_writer_joins_only_matching_run(tmp_path: Path, second: dict[str, Any], joins: bool) -> None:
    with (
        open_writer(tmp_path, run_id=None) as one,
        open_writer(tmp_path, **{"run_id": None, "ep_rank": 1, **second}) as other,
    ):
        assert one.info.run_id == "000001"
        assert other.info.run_id == ("000001" if joins else "000002")


def test_given_run_id_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LOAD_DUMP_RUN_ID", "night-7")
    for rank, run_id, expected in ((0, None, "night-7"), (1, None, "night-7"), (0, "day.8", "day.8")):
        with open_writer(tmp_path, run_id=run_id, ep_rank=rank) as writer:
            writer.record(None, SMALL, None)
        assert closed(writer).recorded == 1
        assert writer.folder.relative_to(tmp_path).parts[0] == f"run={expected}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run=day.8", "run=night-7"]


@pytest.mark.parametrize("given", ["7", "0000007", "20251124093000", "1²", "0"])
def test_run_id_of_digits_does_not_affect_next_run_number(tmp_path: Path, given: str) -> None:
    (tmp_path / f"run={given}").mkdir()
    (tmp_path / "run=9.old").mkdir()
    with open_writer(tmp_path, run_id=None) as writer:
        writer.record(None, SMALL, None)
    assert closed(writer).recorded == 1
    assert writer.folder.is_dir()


# ---- nowhere to write


@pytest.mark.parametrize("run_id", [None, "r"])
@pytest.mark.parametrize("under", [False, True])
def test_unwritable_folder_drops_and_counts_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, run_id: str | None, under: bool
) -> None:
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "dumps" if under else tmp_path / "file"
    with open_writer(root, run_id=run_id) as writer:
        for _ in range(5):
            writer.record(None, SMALL, map_of())
        writer.record(0, SMALL, map_of())
        writer.skip()
        assert not writer.flush()
    stats = writer.stats()
    assert_accounted(stats)
    assert (stats.seen, stats.dropped, stats.rejected, stats.unlisted) == (7, 6, 1, 7)
    assert stats.off is not None
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert str(root) in warning.getMessage()
    assert (tmp_path / "file").read_text() == "in the way"


def test_journal_write_error_turns_recording_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_writer(tmp_path) as writer:
        for step in range(3):
            writer.record(None, load_of(step), None)
        assert writer.flush()

        def fail(self: journal.JournalAppender, *parts: bytes) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(journal.JournalAppender, "append", fail)
        for step in range(3, 6):
            writer.record(None, load_of(step), None)
        writer.skip()
        assert not writer.flush()
        writer.record(None, SMALL, None)
    stats = writer.stats()
    assert_accounted(stats)
    assert (stats.seen, stats.recorded) == (8, 3)
    assert "Input/output error" in str(stats.off)
    assert [r.getMessage().count("Input/output") for r in caplog.records] == [1]
    assert_equal_loads(survived_loads(writer.folder), {step: load_of(step) for step in range(3)})
    rows = step_status(writer.folder)
    assert rows == [(step, "recorded") for step in range(3)]
    assert stats.seen - stats.unlisted == len(rows)


@pytest.mark.parametrize("nested", [False, True])
def test_closed_writer_has_no_thread(tmp_path: Path, nested: bool) -> None:
    """Also when a signal handler closes it that interrupted ``close``."""
    writer = open_writer(tmp_path)
    writer.record(None, SMALL, None)
    background = writer._background
    if nested:
        signal.signal(signal.SIGALRM, lambda *_: writer.close(60))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        assert writer.close(60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not background._drainer.is_alive()
    assert not background._sealer.is_alive()


@pytest.mark.parametrize("segment_steps", [2048, 64])
@pytest.mark.parametrize(("layers", "at"), [(LAYERS + 1, 40), (5000, 40), (5000, 0)])
def test_rejected_step_does_not_affect_others(
    tmp_path: Path, layers: int, at: int, segment_steps: int
) -> None:
    """Its map may be wrong, too: a map with other layers would make the file unreadable."""
    wrong = np.zeros((layers, SLOTS), int)
    with open_writer(tmp_path, segment_steps=segment_steps) as writer:
        for step in range(100):
            if step == at:
                writer.record(step, wrong, wrong)
            else:
                writer.record(step, load_of(step), map_of())
        assert writer.flush(20)
    assert (writer.stats().recorded, writer.stats().rejected) == (99, 1)
    good = [step for step in range(100) if step != at]
    assert_equal_loads(survived_loads(writer.folder), {step: load_of(step) for step in good})
    assert {row[3] for row in placement_rows(writer.folder)} == {tuple(row) for row in map_of().tolist()}


def test_placement_before_first_load_is_valid_from_its_step(tmp_path: Path) -> None:
    """The placement came with a step that is not sampled."""
    with open_writer(tmp_path, interval=5) as writer:
        for step in range(1, 20):
            writer.record(step, load_of(step), map_of() if step == 2 else None)
    assert sorted({row[:1] for row in placement_rows(writer.folder)}) == [(2,)]
    assert len(placement_rows(writer.folder)) == LAYERS
    assert_equal_loads(survived_loads(writer.folder), {step: load_of(step) for step in (5, 10, 15)})
