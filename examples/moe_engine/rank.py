"""One EP rank: serves its requests in lockstep with the others, rearranges the experts, records each step."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .balancer import balancedness, initial_placement, rebalance
from .config import EngineConfig
from .errors import EngineError
from .expert_parallel import ExpertParallel
from .probe import Probe
from .recording import Recording, Step
from .serving import Request, Server, Traffic
from .text import Bytes
from .training import Checkpoint

EXIT_FAILED, EXIT_LOST_PEER = 1, 3


def run_rank(
    ep_rank: int, config: EngineConfig, checkpoint: Path, corpora: dict[str, Bytes], store: Path
) -> None:
    """The whole life of a rank's process; it exits with EXIT_FAILED or EXIT_LOST_PEER where it fails."""
    torch.set_num_threads(1)  # the ranks share the cores
    if (
        sys.platform == "linux"
    ):  # ranks of one host find each other even where the host's name does not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=ep_rank, world_size=config.ep_size, timeout=timedelta(seconds=60)
        )
        with torch.inference_mode():
            Rank(ep_rank, config, Checkpoint.load(checkpoint), corpora).run()
        dist.destroy_process_group()
    except EngineError as error:
        print(f"rank {ep_rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_FAILED)
    except RuntimeError as error:
        if any(words in str(error) for words in ("Connection closed", "Connection reset", "Broken pipe")):
            sys.exit(EXIT_LOST_PEER)  # the parent knows better who failed and why
        traceback.print_exc()
        sys.exit(EXIT_FAILED)


class Rank:
    """A full copy of the dense parts, this rank's experts, and its requests."""

    def __init__(
        self, ep_rank: int, config: EngineConfig, checkpoint: Checkpoint, corpora: dict[str, Bytes]
    ) -> None:
        self.ep_rank, self.config = ep_rank, config
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", ep_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        model, all_experts = checkpoint.build(self.device)
        # Both sides of every check from here on: one process with all experts, and all ranks with theirs.
        self.probe = Probe(model, all_experts, corpora, [config.seed, ep_rank, 1], self.device)
        placement = initial_placement(
            len(config.model.moe_layers), config.model.num_logical_experts, config.num_physical_experts
        )
        self.experts = ExpertParallel(
            checkpoint.expert_weights, placement, ep_rank, config.ep_size, self.device
        )
        self.server = Server(model, config.seed * 1000 + ep_rank, self.device)
        self.traffic = Traffic(corpora, config.seed, ep_rank)
        self.window: deque[Tensor] = deque(maxlen=config.window)
        self.answered: list[Request] = []
        self.tokens = self.dummy_steps = 0

    def run(self) -> None:
        config = self.config
        recording = Recording(config, self.ep_rank)
        try:
            difference = self._verify()
            self._say(
                f"serving {config.steps} steps on {config.ep_size} ranks of {self.experts.slots_per_rank} "
                f"expert slots a layer; outputs as of one process ({_equal(difference)})"
            )
            start = time.monotonic()
            for step in range(config.steps):
                if step == config.kill_at and self.ep_rank == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if config.rearrange_every and step and step % config.rearrange_every == 0:
                    self._rearrange(step)
                self._step(step, recording)
            self._summarize(time.monotonic() - start)
        finally:
            closed = recording.close()
        if closed:
            self._say(closed)

    def _step(self, step: int, recording: Recording) -> None:
        topic = self.config.topic(step)
        self.server.waiting.extend(self.traffic.arrivals(topic))
        self.experts.load.zero_()
        self.experts.turn = self.ep_rank + step
        done = self.server.step(self.experts)
        if done is None:
            self.experts.take_part(self.config.model.hidden_size, self.config.model.top_k)
            self.dummy_steps += 1
        else:
            self.answered += done.answered
            self.tokens += done.num_tokens
        self.window.append(self.experts.logical_load())
        recording.add(
            Step(
                step,
                self.experts.load,
                self.experts.placement.physical_to_logical_map,
                done.num_tokens if done else 0,
                done.phase if done else None,
                topic,
            )
        )

    def _rearrange(self, step: int) -> None:
        """The engine's own EPLB: sum the window over ranks, place, move weights, check the outputs."""
        load = torch.stack(list(self.window)).sum(0).cpu()
        dist.all_reduce(load)
        if not load.any():
            return
        old_map = self.experts.placement.physical_to_logical_map.cpu()
        new_map = rebalance(load, old_map, self.config.ep_size)
        moved = self.experts.rearrange(new_map)
        difference = self._verify()
        before, after = (
            balancedness(load, placement, self.config.ep_size) for placement in (old_map, new_map)
        )
        self._say(
            f"step {step}: rearranged {moved.layers} layers, moved {moved.slots} slots, {moved.transfers} of "
            f"them between ranks; balancedness of the last {len(self.window)} steps "
            f"{before:.2f} -> {after:.2f}; outputs unchanged ({_equal(difference)})"
        )

    def _verify(self) -> float:
        """Check that each slot holds its expert and the outputs are right; how far they are off."""
        self.experts.verify_weights()
        difference = torch.tensor(self.probe.check(self.experts))
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        return float(difference)

    def _summarize(self, seconds: float) -> None:
        totals = torch.tensor([len(self.answered), self.tokens, self.dummy_steps])
        dist.all_reduce(totals)
        requests, tokens, dummy_steps = totals.tolist()
        config = self.config
        self._say(
            f"served {requests} requests, {tokens} tokens in {seconds:.1f} s, "
            f"{1000 * seconds / config.steps:.0f} ms a step; "
            f"{dummy_steps} dummy steps among the ranks' {config.steps * config.ep_size}"
        )
        for request in (*self.answered[:1], *self.answered[-1:]):
            prompt = bytes(request.prompt).decode(errors="replace")
            answer = bytes(request.answer).decode(errors="replace")
            self._say(f"  {request.topic}: {prompt[-32:]!r} -> {answer!r}")

    def _say(self, text: str) -> None:
        if self.ep_rank == 0:
            print(text, flush=True)


def _equal(difference: float) -> str:
    return f"logits equal to within {difference:.1g}" if difference else "logits equal"
