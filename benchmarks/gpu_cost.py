"""Is the cost of imbalance that is read from a recording the true one? Needs two or more GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.gpu_cost [--steps 1500] [--folder DIR]

Every GPU is an EP rank. In each MoE layer it multiplies the tokens of its experts by their weights in one
grouped matrix product, and then all ranks meet in an all-reduce, so that a step takes as long as its slowest
ranks. Each phase routes a number of tokens with a skew that changes from step to step.

The truth is measured afterwards, without the recording: every GPU takes the products of all ranks alone, and
the truth is Σ_layers (max_r − mean_r) of their times, which perfect balance would save. (Times of one GPU, as
two GPUs differ a little with equal loads, too; the mean over GPUs; the median of some tries; times the slope
of the products while serving over those alone, as a GPU without pauses is slower.)
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eplb_dump import ExpertLoadWriter

LAYERS, SLOTS_PER_RANK, WIDTH, TOP_K = 4, 32, 4096, 4
#: Steps between two new placements, which take PAUSE_S in the phases with pauses.
PERIOD, PAUSE_S = 300, 0.9
#: How often each product is timed alone.
TRIES = 3


class Phase(NamedTuple):
    """Steps of one kind: how many tokens are routed, and the strongest skew between ranks."""

    name: str
    tokens: int
    skew: float


PHASES = Phase("decode", 48, 1.0), Phase("prefill", 6144, 1.0), Phase("balanced", 6144, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="of each phase")
    parser.add_argument("--folder", help="keep the recordings here")
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = [args.folder or temporary]
        dist.broadcast_object_list(folder, src=0)
        truth = {phase.name: serve(phase, rank, folder[0], args.steps) for phase in PHASES}
        dist.barrier()
        if rank == 0:
            for phase in PHASES:
                report(phase, folder[0], *truth[phase.name])
        dist.barrier()
    dist.destroy_process_group()


def counts_of(phase: Phase, steps: int, slots: int) -> Any:
    """Tokens of each slot, the same on every rank: int64 ``[steps, layers, slots]``.

    The shares of the ranks and of the experts in them wander, so imbalance comes and goes.
    """
    rng = np.random.default_rng(len(phase.name))
    ranks = slots // SLOTS_PER_RANK
    out = np.empty((steps, LAYERS, slots), np.int64)
    tilt, focus = np.zeros((LAYERS, ranks)), np.zeros((LAYERS, 1))
    for step in range(steps):
        tilt = 0.95 * tilt + 0.3 * rng.normal(size=tilt.shape)
        focus = 0.95 * focus + 0.3 * rng.normal(size=focus.shape)
        experts = rng.normal(size=(LAYERS, slots)) * np.abs(focus) * phase.skew
        logits = phase.skew * np.repeat(tilt, SLOTS_PER_RANK, axis=1) + experts
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        if not phase.skew:  # exactly the same number for every slot
            out[step] = phase.tokens * TOP_K // slots
            continue
        tokens = rng.integers(phase.tokens // 2, phase.tokens + 1) * TOP_K
        for layer in range(LAYERS):
            out[step, layer] = rng.multinomial(tokens, share[layer] / share[layer].sum())
    return out


class Products:
    """The matrix products of all ranks, which every GPU can take."""

    def __init__(self, counts: Any) -> None:
        """``counts``: int64 ``[steps, layers, slots]``."""
        self.by_rank = counts.reshape(*counts.shape[:2], -1, SLOTS_PER_RANK)
        self.rows_of = self.by_rank.sum(axis=3)
        self._offsets = torch.from_numpy(self.by_rank.cumsum(axis=3).astype(np.int32)).cuda()
        self._weights = [self._random(SLOTS_PER_RANK, WIDTH, WIDTH) for _ in range(2)]
        self._rows = self._random(int(self.rows_of.max()), WIDTH)

    @staticmethod
    def _random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def take(self, step: int, layer: int, rank: int) -> tuple[Any, Any]:
        """Queue a product; the events around it."""
        rows, around = self.rows_of[step, layer, rank], (event(), event())
        around[0].record()
        if rows:
            torch._grouped_mm(
                self._rows[:rows], self._weights[layer % 2], offs=self._offsets[step, layer, rank]
            )
        around[1].record()
        return around

    def times(self) -> Any:
        """Device time of each product alone, the median of some tries, ms: ``[steps, layers, ranks]``."""
        tries = np.empty((TRIES, *self.rows_of.shape))
        for times in tries:
            around = [self.take(*at) for at in np.ndindex(*self.rows_of.shape)]
            torch.cuda.synchronize()
            times.flat = [start.elapsed_time(end) for start, end in around]
        return np.median(tries, axis=0)


def serve(phase: Phase, rank: int, folder: str, steps: int) -> tuple[float, Any, Any]:
    """Run and record the steps. The true cost; each step's time by events, by a synchronized clock; ms."""
    ranks = dist.get_world_size()
    slots = ranks * SLOTS_PER_RANK
    counts = counts_of(phase, steps, slots)
    products = Products(counts)
    # What this rank routed itself: the ranks add up to the counts.
    load = torch.from_numpy(counts // ranks + (rank < counts % ranks)).to("cuda", torch.int32)
    placement = torch.arange(slots, device="cuda", dtype=torch.int64).repeat(LAYERS, 1)
    meet = torch.ones(1, device="cuda")
    writer = ExpertLoadWriter(
        folder, model=phase.name, num_logical_experts=slots, ep_size=ranks, ep_rank=rank, run_id="gpu-cost",
        queue_bytes=1 << 30,
    )  # fmt: skip
    stamps = [(event(), event()) for _ in range(steps)]
    around = np.empty((steps, LAYERS, 2), object)
    clock = np.zeros(steps)

    def step(number: int) -> None:
        stamps[number][0].record()
        for layer in range(LAYERS):
            around[number, layer] = products.take(number, layer, rank)
            dist.all_reduce(meet)
        stamps[number][1].record()

    for number in range(min(30, steps)):  # compile, allocate, connect
        step(number)
    torch.cuda.synchronize()
    dist.barrier()
    for number in range(steps):
        if number and number % PERIOD == 0:  # a synchronous rearrangement
            placement = placement.roll(1, dims=1)
            time.sleep(PAUSE_S)
        start = time.perf_counter()
        writer.begin_step()
        step(number)
        writer.record(number, load[number], placement, phase=phase.name)
        torch.cuda.current_stream().synchronize()  # as an engine does that needs the new tokens
        clock[number] = (time.perf_counter() - start) * 1e3
    writer.close(60)
    serving = [start.elapsed_time(end) for start, end in around.reshape(-1, 2)]
    times = products.times()
    alone = times[:, :, rank].ravel()
    if phase.skew:
        slope, constant = np.polyfit(alone, serving, 1)
        print(
            f"{phase.name}, rank {rank}: serving takes {slope:.3f} x the time alone + {constant * 1e3:.1f} µs"
        )
        times *= slope
    truth = torch.tensor((times.max(axis=2) - times.mean(axis=2)).sum(axis=1).mean(), device="cuda")
    dist.all_reduce(truth)
    return float(truth) / ranks, np.array([start.elapsed_time(end) for start, end in stamps]), clock


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def report(phase: Phase, folder: str, truth: float, whole: Any, clock: Any) -> None:
    """Print the recorded cost beside the true one."""
    from eplb_analyze import open_run
    from eplb_analyze.analysis.cost import cost_of
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    run = open_run(folder, model=phase.name)
    recorded = np.concatenate([block.device_ms for block in run.blocks()])
    print(f"== {phase.name}: {len(whole)} steps of {whole.mean():.3f} ms")
    for name, times in (("events", whole), ("a synchronized clock", clock)):
        low, median, high = np.nanpercentile(recorded / times, [1, 50, 99])
        print(f"   device_ms / {name}: median {median:.4f}, p1 to p99 {low:.4f} to {high:.4f}")
    cost = cost_of(run)
    print(f"   true cost {truth:.4f} ms; recorded: {cost.message} (basis {cost.basis}, R² {cost.r2})")
    known = cost.ms_per_step
    if known is not None:
        verdict = "contains" if known.low <= truth <= known.high else "MISSES"
        print(
            f"   {known.low:.4f} to {known.high:.4f} {verdict} it; {known.estimate / truth:.3f} x the truth"
        )
    pauses = [
        row.pause_ms.estimate for row in rearrangement_report(run).rearrangements if row.pause_ms is not None
    ]
    print(f"   pauses of {PAUSE_S * 1e3:g} ms: {[round(ms, 1) for ms in pauses]}")


if __name__ == "__main__":
    main()
