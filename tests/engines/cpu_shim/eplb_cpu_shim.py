"""For tests only: lets vLLM's CPU build balance experts, so that a real engine calls EplbState.step().

On a CPU, vLLM refuses EPLB, does not count (only a Triton kernel does), ignores expert_map in its kernel of
the experts, and cannot exchange tokens between data-parallel ranks. A general plugin, active with
EPLB_CPU_SHIM=1. With EPLB_CPU_SHIM_STUCK=1, ranks get stuck when they shut down, as they do on GPUs.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any


class Event:
    """For torch.Event, which a machine without an accelerator cannot record."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


class Stream:
    def synchronize(self) -> None: ...


def register() -> None:
    if os.environ.get("EPLB_CPU_SHIM") != "1":
        return
    from vllm.config import parallel

    if not isinstance(parallel.current_platform, Platform):
        parallel.current_platform = Platform(parallel.current_platform)
        _rearrange_without_events()
        _count_in_torch()
        _keep_to_the_expert_map()
        _make_the_state()
        _exchange_tokens()
        if os.environ.get("EPLB_CPU_SHIM_STUCK") == "1":
            _stick_at_the_end()


class Platform:
    """vLLM's CPU platform, that says yes to one question of the configuration's."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _rearrange_without_events() -> None:
    import torch
    import vllm.distributed.eplb.eplb_state as eplb

    original = eplb.EplbState.rearrange

    def rearrange(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, torch.Event = torch.Event, Event
        try:
            return original(self, *args, **kwargs)
        finally:
            torch.Event = before

    eplb.EplbState.rearrange = rearrange
    torch.accelerator.current_stream = lambda *_: Stream()


def _count_in_torch() -> None:
    import torch
    from vllm.model_executor.layers.fused_moe.router import base_router

    def map_and_record(
        topk_ids: Any,
        expert_load_view: Any,
        logical_to_physical_map: Any,
        logical_replica_count: Any,
        record_enabled: Any,
        num_unpadded_tokens: Any = None,
    ) -> Any:
        flat, topk = topk_ids.reshape(-1).long(), topk_ids.shape[-1]
        position = torch.arange(flat.numel())
        replica = (((position // topk) * 2654435769) & 0xFFFFFFFF) % logical_replica_count[flat].clamp(min=1)
        slot = logical_to_physical_map[flat, replica]
        slots = expert_load_view.shape[0]
        real = (slot >= 0) & (slot < slots) & (position < int(num_unpadded_tokens) * topk)
        if bool(record_enabled):
            counted = torch.bincount(slot[real], minlength=slots)
            expert_load_view += counted.to(expert_load_view.dtype)
        return slot.reshape(topk_ids.shape).to(topk_ids.dtype)

    base_router.eplb_map_to_physical_and_record = map_and_record


def _keep_to_the_expert_map() -> None:
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts as Experts

    original = Experts.apply

    def apply(
        self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any,
        activation: Any, global_num_experts: Any, expert_map: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            topk_weights = torch.where(local >= 0, topk_weights, torch.zeros_like(topk_weights))
            topk_ids = local.clamp(min=0).to(topk_ids.dtype)
        return original(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
            expert_map, *args, **kwargs,
        )  # fmt: skip

    Experts.apply = apply


def _make_the_state() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    original = Runner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm.distributed.eplb.eplb_state import EplbState
        from vllm.model_executor.models.interfaces import get_mixture_of_experts_model

        self._moe_model = get_mixture_of_experts_model(self.model)
        if self.parallel_config.enable_eplb:  # as the GPU's runner does
            self.eplb_state = EplbState(self.parallel_config, self.device)
            self.eplb_state.add_model(self._moe_model, self.model_config)

    Runner.load_model = load_model


def _exchange_tokens() -> None:
    import torch
    from torch import distributed
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator as Communicator

    def gather(self: Any, rows: Any, sizes: list[int] | None) -> Any:
        sizes = sizes or [len(rows)] * self.world_size
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=self.cpu_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def all_gatherv(self: Any, given: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
        return (
            [gather(self, one, sizes) for one in given]
            if isinstance(given, list)
            else gather(self, given, sizes)
        )

    def reduce_scatterv(self: Any, given: Any, dim: int = -1, sizes: list[int] | None = None) -> Any:
        total = given.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.cpu_group)
        sizes = sizes or [len(total) // self.world_size] * self.world_size
        return torch.split(total, sizes)[self.rank_in_group].clone()

    Communicator.all_gatherv, Communicator.reduce_scatterv = all_gatherv, reduce_scatterv


def _stick_at_the_end() -> None:
    """As ``PyNcclCommunicator.destroy``, whose abort blocks while CUDA graphs use the communicator."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator as Communicator

    def destroy(self: Any) -> None:
        abort = threading.Thread(target=threading.Event().wait, daemon=True)
        abort.start()
        abort.join(timeout=5.0)

    Communicator.destroy = destroy
