"""Requests under vLLM's own scheduler, for vllm_ranks.py: what a model runner is given, pass by pass.

Prompts come in chunks, requests are preempted and compute their tokens again, drafts are rejected, and with
asynchronous scheduling a pass is scheduled before the one before it ran. What each request does is told from
the requests themselves.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np

BLOCK, BLOCKS, REQUESTS, BUDGET, DRAFTS = 4, 40, 8, 48, 3


@dataclasses.dataclass(frozen=True)
class Pass:
    output: Any  # vLLM's SchedulerOutput
    phase: str
    tokens: int
    #: Requests whose last known token is in this pass, so that it samples the next one.
    sampling: frozenset[str]


class Only(SimpleNamespace):
    """A model's or a drafter's configuration: of the rest that the scheduler asks for, it has nothing."""

    def __getattr__(self, name: str) -> Any:
        return (
            (lambda *_: None)
            if name.startswith(("use_", "uses_", "needs_")) and name != "uses_mrope"
            else None
        )


class Requests:
    def __init__(self, seed: list[int], *, v2: bool, ahead: bool, drafts: bool) -> None:
        import torch
        from vllm.config import CacheConfig, SchedulerConfig, VllmConfig
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.random, self.drafts, self.ahead = np.random.default_rng(seed), drafts, ahead
        whole = VllmConfig(
            scheduler_config=SchedulerConfig(
                max_num_seqs=REQUESTS, max_num_batched_tokens=BUDGET, max_model_len=200,
                is_encoder_decoder=False, enable_chunked_prefill=True, async_scheduling=ahead,
            ),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=False),
        )  # fmt: skip
        whole.cache_config.num_gpu_blocks = BLOCKS
        whole.model_config = Only(max_model_len=200, runner_type="generate", skip_tokenizer_init=True)
        if drafts:
            whole.speculative_config = Only(num_speculative_tokens=DRAFTS, max_num_new_slots_for_drafting=0)
        layers = KVCacheGroupSpec(
            ["layer"], FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        )
        self.scheduler = (AsyncScheduler if ahead else Scheduler)(
            whole, KVCacheConfig(BLOCKS, [], [layers]), StructuredOutputManager(whole), BLOCK
        )
        self.scheduler.use_v2_model_runner = v2
        self.waiting: deque[Pass] = deque()
        self.began = 0

    def next(self) -> Pass:
        """The pass that the runner is given now."""
        while len(self.waiting) < 1 + self.ahead:
            self.waiting.append(self._schedule())
        chosen = self.waiting.popleft()
        if chosen.tokens:
            return chosen
        self.ran(chosen)  # every request waits for one that was scheduled before
        return self.next()

    def _schedule(self) -> Pass:
        requests = self.scheduler.requests
        while len(requests) < REQUESTS:
            self._add()
        known = {name: r.num_tokens + r.num_output_placeholders for name, r in requests.items()}
        output = self.scheduler.schedule()
        cached = output.scheduled_cached_reqs
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        assert computed.keys() == output.num_scheduled_tokens.keys()
        # All that a request lacks is the token that was sampled last.
        decodes = {
            computed[name] >= max(known[name] - 1, requests[name].num_prompt_tokens) for name in computed
        }
        phase = "mixed" if len(decodes) > 1 else "decode" if decodes == {True} else "prefill"
        given = output.num_scheduled_tokens
        sampling = frozenset(name for name in given if computed[name] + given[name] >= known[name])
        return Pass(output, phase, sum(given.values()), sampling)

    def _add(self) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        prompt = self.random.integers(5, 100, int(self.random.integers(3, 70))).tolist()
        sampling = SamplingParams(max_tokens=int(self.random.integers(2, 30)), ignore_eos=True)
        sampling.update_from_generation_config({}, 1)
        self.began += 1
        self.scheduler.add_request(Request(f"request {self.began}", prompt, sampling, None))

    def ran(self, done: Pass) -> None:
        """The pass ran: what was sampled, and drafts for the next one."""
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        names = list(done.output.num_scheduled_tokens)
        drafts = done.output.scheduled_spec_decode_tokens
        sampled = [
            [7] * int(self.random.integers(1, len(drafts.get(name, ())) + 2)) if name in done.sampling else []
            for name in names
        ]
        self.scheduler.update_from_output(
            done.output, ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        )
        if self.drafts and not self.ahead:
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[7] * DRAFTS] * len(names)))
