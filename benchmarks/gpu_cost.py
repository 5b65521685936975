"""Is the cost of imbalance that is read from a recording the true one? Needs two or more GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.gpu_cost [--steps 1500] [--folder DIR]

Every GPU is an EP rank. In each MoE layer it multiplies the tokens of its experts by their weights in one
grouped matrix product, and then all ranks meet in an all-reduce, so that a step takes as long as its slowest
ranks. Each phase routes a number of tokens with a skew that changes from step to step.

The truth is measured beside it: the device time that each rank spent in each layer's product, whose
Σ_layers (max_r − mean_r) perfect balance would save. The recording knows nothing of it.
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


def serve(phase: Phase, rank: int, folder: str, steps: int) -> tuple[Any, Any, Any, Any]:
    """Run and record the steps. Device times of all ranks: products float64 ``[steps, layers, ranks]``;
    of rank 0: whole steps by events, by a synchronized clock, and the pauses, ms."""
    ranks = dist.get_world_size()
    slots = ranks * SLOTS_PER_RANK
    counts = counts_of(phase, steps, slots)
    weights = [
        torch.randn(SLOTS_PER_RANK, WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    ]
    own = counts.reshape(steps, LAYERS, ranks, SLOTS_PER_RANK)[:, :, rank]
    rows = torch.randn(int(own.sum(axis=2).max()), WIDTH, device="cuda", dtype=torch.bfloat16)
    offsets = torch.from_numpy(own.cumsum(axis=2).astype(np.int32)).cuda()
    totals = own.sum(axis=2)
    # What this rank routed itself: the ranks add up to the counts.
    load = torch.from_numpy(counts // ranks + (rank < counts % ranks)).to("cuda", torch.int32)
    placement = torch.arange(slots, device="cuda", dtype=torch.int64).repeat(LAYERS, 1)
    meet = torch.ones(1, device="cuda")
    writer = ExpertLoadWriter(
        folder, model=phase.name, num_logical_experts=slots, ep_size=ranks, ep_rank=rank, run_id="gpu-cost",
        queue_bytes=1 << 30,
    )  # fmt: skip
    stamps = [[event() for _ in range(2 * LAYERS + 2)] for _ in range(steps)]
    clock = np.zeros(steps)

    def step(number: int) -> None:
        events = iter(stamps[number])
        next(events).record()
        for layer in range(LAYERS):
            next(events).record()
            if totals[number, layer]:
                torch._grouped_mm(
                    rows[: totals[number, layer]], weights[layer % 2], offs=offsets[number, layer]
                )
            next(events).record()
            dist.all_reduce(meet)
        next(events).record()

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
    torch.cuda.synchronize()
    writer.close(60)
    products = torch.tensor(
        [[e[1 + 2 * i].elapsed_time(e[2 + 2 * i]) for i in range(LAYERS)] for e in stamps], device="cuda"
    )
    gathered = [torch.empty_like(products) for _ in range(ranks)]
    dist.all_gather(gathered, products)
    whole = np.array([e[0].elapsed_time(e[-1]) for e in stamps])
    return torch.stack(gathered, dim=2).double().cpu().numpy(), whole, clock, counts


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def report(phase: Phase, folder: str, products: Any, whole: Any, clock: Any, counts: Any) -> None:
    """Print the recorded cost beside the true one."""
    from eplb_analyze import open_run
    from eplb_analyze.analysis.cost import cost_of
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    run = open_run(folder, model=phase.name)
    recorded = np.concatenate([block.device_ms for block in run.blocks()])
    truth = float((products.max(axis=2) - products.mean(axis=2)).sum(axis=1).mean())
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
