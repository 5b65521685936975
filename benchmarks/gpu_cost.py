"""Is the cost of imbalance that is read from a recording the true one? Needs two or more GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.gpu_cost [--steps 1500] [--folder DIR]

Every GPU is an EP rank. In each MoE layer it multiplies the tokens of its experts by their weights in one
grouped matrix product, and then all ranks meet in an all-reduce, so that a step takes as long as its slowest
ranks. Each phase routes a number of tokens with a skew that changes from step to step.

The truth is measured beside it, in two ways, in steps that are not recorded:

- Waits: each recorded step is taken again with events around every product. The cost is the time of the
  slowest rank's product less the mean over ranks, summed over layers.
- Balance: the step is taken with its experts dealt to the ranks so that all have about equal work: all ranks
  take one hand, of each rank in turn. The cost is the time of the step less the mean of these. It is lower
  than the waits: a device that waits saves power and is faster afterwards, and ranks with equal work wait
  for each other's jitter.

All of these begin on an idle device, and their order changes from step to step. The phase with equal loads is
the control: perfect balance saves it nothing, and its waits are jitter alone.
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


def dealt(counts: Any) -> Any:
    """The same tokens of each expert, in slots of ranks that have about equal numbers of tokens and experts.

    The experts are dealt in order of their tokens: 0, 1, 1, 0, 0, 1 ... for two ranks.
    """
    ranks = counts.shape[2] // SLOTS_PER_RANK
    turns = [list(range(ranks)), list(reversed(range(ranks)))]
    owner = np.array([rank for turn in range(SLOTS_PER_RANK) for rank in turns[turn % 2]])
    by_tokens = -np.sort(-counts, axis=2)
    return np.concatenate([by_tokens[:, :, owner == rank] for rank in range(ranks)], axis=2)


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

    def take(self, step: int, layer: int, rank: int) -> None:
        """Queue a product of a rank."""
        rows = self.rows_of[step, layer, rank]
        if rows:
            torch._grouped_mm(
                self._rows[:rows], self._weights[layer % 2], offs=self._offsets[step, layer, rank]
            )


def serve(phase: Phase, rank: int, folder: str, steps: int) -> tuple[Any, Any, Any]:
    """Run and record the steps.

    Returns:
        Times in ms: by events, float64 ``[steps, 3 + ranks]``; of waits and by a clock, ``[steps]``.
    """
    ranks = dist.get_world_size()
    slots = ranks * SLOTS_PER_RANK
    counts = counts_of(phase, steps, slots)
    products = Products(np.concatenate([counts, dealt(counts)], axis=2))
    # What this rank routed itself: the ranks add up to the counts.
    load = torch.from_numpy(counts // ranks + (rank < counts % ranks)).to("cuda", torch.int32)
    placement = torch.arange(slots, device="cuda", dtype=torch.int64).repeat(LAYERS, 1)
    meet = torch.ones(1, device="cuda")
    writer = ExpertLoadWriter(
        folder, model=phase.name, num_logical_experts=slots, ep_size=ranks, ep_rank=rank, run_id="gpu-cost",
        queue_bytes=1 << 30,
    )  # fmt: skip
    # The recorded step; again, with events around the products; again; with each rank's work after dealing.
    work = [rank, rank, rank, *range(ranks, 2 * ranks)]
    events = [[(event(), event()) for _ in work] for _ in range(steps)]
    clock = np.zeros(steps)

    around = [[(event(), event()) for _ in range(LAYERS)] for _ in range(steps)]

    def step(number: int, of: int, start: Any, end: Any, own: Any = None) -> None:
        start.record()
        for layer in range(LAYERS):
            if own:
                own[layer][0].record()
            products.take(number, layer, of)
            if own:
                own[layer][1].record()
            dist.all_reduce(meet)
        end.record()

    for number in range(min(30, steps)):  # compile, allocate, connect
        step(number, rank, event(), event())
    torch.cuda.synchronize()
    dist.barrier()
    for number in range(steps):
        if number and number % PERIOD == 0:  # a synchronous rearrangement
            placement = placement.roll(1, dims=1)
            time.sleep(PAUSE_S)
        start = time.perf_counter()
        writer.begin_step()
        step(number, rank, *events[number][0])
        writer.record(number, load[number], placement, phase=phase.name)
        torch.cuda.current_stream().synchronize()  # as an engine does that needs the new tokens
        clock[number] = (time.perf_counter() - start) * 1e3
        for turn in range(1, len(work)):
            which = 1 + (number + turn) % (len(work) - 1)
            step(number, work[which], *events[number][which], around[number] if which == 1 else None)
            torch.cuda.current_stream().synchronize()
    writer.close(60)
    times, own = elapsed_ms(events), elapsed_ms(around)
    slowest, total = torch.from_numpy(own).cuda(), torch.from_numpy(own).cuda()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return times, (slowest - total / ranks).sum(dim=1).cpu().numpy(), clock


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def elapsed_ms(pairs: Any) -> Any:
    """Times between two events: float64 of the shape of the lists."""
    return np.array([[start.elapsed_time(end) for start, end in row] for row in pairs])


def report(phase: Phase, folder: str, times: Any, waits: Any, clock: Any) -> None:
    """Print the recorded cost beside the true one."""
    from eplb_analyze import open_run
    from eplb_analyze.analysis.cost import cost_of
    from eplb_analyze.analysis.rearrangements import rearrangement_report

    run = open_run(folder, model=phase.name)
    recorded = np.concatenate([block.device_ms for block in run.blocks()])
    whole = times[:, 0]
    truths = {"waits": waits, "balance": times[:, 2] - times[:, 3:].mean(axis=1)}
    print(f"== {phase.name}: {len(whole)} steps of {whole.mean():.3f} ms, again {times[:, 2].mean():.3f} ms")
    for name, own in (("events", whole), ("a synchronized clock", clock)):
        low, median, high = np.nanpercentile(recorded / own, [1, 50, 99])
        print(f"   device_ms / {name}: median {median:.4f}, p1 to p99 {low:.4f} to {high:.4f}")
    cost = cost_of(run)
    print(f"   recorded: {cost.message} (basis {cost.basis}, R² {cost.r2})")
    known = cost.ms_per_step
    for name, values in truths.items():
        # A step that something else delayed tells nothing about imbalance.
        usual = values[np.abs(values - np.median(values)) < 5 * np.median(np.abs(values - np.median(values)))]
        truth, error = float(usual.mean()), 1.96 * float(usual.std()) / len(usual) ** 0.5
        verdict = ""
        if known is not None:
            overlaps = known.low <= truth + error and truth - error <= known.high
            verdict = (
                f"; {known.low:.4f} to {known.high:.4f} {'contains' if overlaps else 'MISSES'} it, "
                f"{known.estimate / truth:.3f} x"
            )
        print(f"   true cost by {name} {truth:.4f} ± {error:.4f} ms, {len(usual)} steps{verdict}")
    pauses = [
        row.pause_ms.estimate for row in rearrangement_report(run).rearrangements if row.pause_ms is not None
    ]
    print(f"   pauses of {PAUSE_S * 1e3:g} ms: {[round(ms, 1) for ms in pauses]}")


if __name__ == "__main__":
    main()
