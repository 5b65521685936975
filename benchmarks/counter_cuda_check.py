"""Is `ExpertLoadCounter` exact on CUDA, and what does `count` cost next to a bare `scatter_add_`?

    python -m benchmarks.counter_cuda_check

Needs torch with CUDA, numpy and pyarrow. The checks are compared with numpy's bincount of ids that are kept
on the host; tests/unit/writer/test_counter.py runs them too. Counting and recording run with
torch.cuda.set_sync_debug_mode("error").
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.cuda import no_synchronization
from eplb_dump import ExpertLoadCounter, ExpertLoadWriter

LAYERS, EXPERTS, TOKENS, TOP_K = 3, 64, 128, 8
DTYPES = (torch.int32, torch.int64, torch.int16, torch.uint8)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
        print(f"PASS {check.__name__}")
    timings()


# ---- checks


def eager_steps_are_exact(folder: Path) -> None:
    """Several dtypes, masks, padding ids, an empty batch; in turns under inference_mode."""
    generator = np.random.default_rng(1)
    counter, writer = ExpertLoadCounter(LAYERS, EXPERTS, device="cuda"), open_writer(folder)
    truth = []
    for step in range(12):
        tokens = 0 if step == 5 else TOKENS + step
        dtype = DTYPES[step % len(DTYPES)]
        ids = random_ids(generator, tokens, lowest=0 if dtype == torch.uint8 else -2)
        mask = generator.random((LAYERS, tokens)) < 0.7
        on_device = torch.from_numpy(ids).to("cuda", dtype)
        mask_on_device = torch.from_numpy(mask).cuda()
        with torch.inference_mode(step % 2 == 0), no_synchronization():
            for layer in range(LAYERS):
                counter.count(layer, on_device[layer], mask_on_device[layer])
            counter.record(writer, num_tokens=tokens)
        truth.append(load_of(ids, mask))
    assert_recorded(writer, truth)


def replays_of_a_captured_graph_are_exact(folder: Path) -> None:
    """Ids and the number of real tokens are static inputs of the graph; the last step is two replays."""
    generator = np.random.default_rng(2)
    counter, writer = ExpertLoadCounter(LAYERS, EXPERTS, device="cuda"), open_writer(folder)
    static_ids = torch.zeros(LAYERS, TOKENS, TOP_K, dtype=torch.int32, device="cuda")
    num_tokens = torch.zeros((), dtype=torch.int32, device="cuda")

    def forward() -> None:
        mask = torch.arange(TOKENS, device="cuda") < num_tokens
        for layer in range(LAYERS):
            counter.count(layer, static_ids[layer], mask)

    replay = captured(forward)
    counter.reset()
    truth = []
    for step in range(4):
        load = np.zeros((LAYERS, EXPERTS), np.int64)
        for _ in range(1 + (step == 3)):
            ids, real = random_ids(generator, TOKENS), int(generator.integers(TOKENS + 1))
            static_ids.copy_(torch.from_numpy(ids))
            num_tokens.fill_(real)
            with no_synchronization():
                replay()
            load += load_of(ids, np.broadcast_to(np.arange(TOKENS) < real, (LAYERS, TOKENS)))
        with no_synchronization():
            counter.record(writer)
        truth.append(load)
    assert_recorded(writer, truth)


def a_busy_stream_is_not_waited_for(folder: Path) -> None:
    """All steps are handed over while the first still waits on the device, and none mixes with another."""
    generator = np.random.default_rng(3)
    counter, writer = ExpertLoadCounter(LAYERS, EXPERTS, device="cuda"), open_writer(folder)
    ids = [random_ids(generator, TOKENS) for _ in range(8)]
    on_device = [torch.from_numpy(step).cuda() for step in ids]
    counter.count(0, on_device[0][0])  # every kernel is loaded by then: that may wait
    counter.record(writer)
    torch.cuda.synchronize()
    with no_synchronization():
        torch.cuda._sleep(1_000_000_000)  # cycles, more than half a second
        for step in on_device:
            for layer in range(LAYERS):
                counter.count(layer, step[layer])
            counter.record(writer)
        assert not torch.cuda.current_stream().query(), "the device was waited for"
    first = load_of(ids[0])
    first[1:] = 0
    assert_recorded(writer, [first, *map(load_of, ids)])


CHECKS = (eager_steps_are_exact, replays_of_a_captured_graph_are_exact, a_busy_stream_is_not_waited_for)


def open_writer(folder: Path) -> ExpertLoadWriter:
    return ExpertLoadWriter(folder, model="m", num_logical_experts=EXPERTS, ep_size=4, scope="global")


def random_ids(generator: np.random.Generator, tokens: int, lowest: int = -2) -> np.ndarray:
    """[LAYERS, tokens, TOP_K], some of them padding below 0 and above the experts."""
    return generator.integers(lowest, EXPERTS + 2, (LAYERS, tokens, TOP_K))


def load_of(ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """[LAYERS, EXPERTS] of ids [LAYERS, tokens, TOP_K] and mask [LAYERS, tokens]."""
    real = (ids >= 0) & (ids < EXPERTS) & (True if mask is None else mask[..., None])
    return np.stack([np.bincount(i[r], minlength=EXPERTS) for i, r in zip(ids, real, strict=True)])


def assert_recorded(writer: ExpertLoadWriter, truth: list[np.ndarray]) -> None:
    assert writer.close(30), writer.stats()
    assert writer.stats().recorded == len(truth), writer.stats()
    rows = [
        row
        for path in sorted(writer.folder.glob("loads-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    found = {(row["step"], row["layer"]): row["load"] for row in rows}
    assert len(found) == len(rows) == len(truth) * LAYERS
    for step, load in enumerate(truth):
        for layer in range(LAYERS):
            assert found[step, layer] == load[layer].tolist(), f"step {step}, layer {layer}"


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """The work as a CUDA graph, warmed up on another stream as torch asks for; call it to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


# ---- timings


def timings(tokens: int = 4096, experts: int = 256, calls: int = 200, rounds: int = 7) -> None:
    """Microseconds a call: the least of some interleaved rounds, launched one by one and as a CUDA graph."""
    counter = ExpertLoadCounter(1, experts, device="cuda")
    row = torch.zeros(experts, dtype=torch.int32, device="cuda")
    ids = torch.randint(experts, (tokens, TOP_K), device="cuda")
    ids32, flat = ids.int(), ids.flatten()
    ones = torch.ones_like(flat, dtype=torch.int32)
    mask = torch.arange(tokens, device="cuda") < tokens - 100
    works: dict[str, Callable[[], Any]] = {
        "scatter_add_": lambda: row.scatter_add_(0, flat, ones),
        "count, int64 ids": lambda: counter.count(0, ids),
        "count, int32 ids": lambda: counter.count(0, ids32),
        "count, int32 ids, mask": lambda: counter.count(0, ids32, mask),
    }

    def repeated(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                work()

        return run

    def microseconds(run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / calls

    eager = {name: repeated(work) for name, work in works.items()}
    for how, runs in ("eager", eager), ("CUDA graph", {name: captured(run) for name, run in eager.items()}):
        least = {name: min(microseconds(run) for _ in range(2)) for name, run in runs.items()}  # warm-up
        for _ in range(rounds):
            least = {name: min(least[name], microseconds(run)) for name, run in runs.items()}
        print(f"{how}, ids [{tokens}, {TOP_K}] on {experts} experts, µs a call:")
        for name, value in least.items():
            print(f"  {name:24}{value:8.2f}{value / least['scatter_add_']:8.2f}x")


if __name__ == "__main__":
    main()
