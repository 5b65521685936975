"""ExpertLoadCounter: counts routed tokens on the device, for engines that do not count them themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from eplb_dump.writer import ExpertLoadWriter


class ExpertLoadCounter:
    """Counts ``topk_ids`` per MoE layer in one buffer on the device, recorded once per forward pass.

    Nothing here waits for the device: :meth:`count` may run inside a captured CUDA graph, under
    ``torch.compile`` and under ``torch.inference_mode``. Use one stream for all calls, or streams
    that wait for each other.

    >>> counter = ExpertLoadCounter(num_moe_layers, num_physical_experts, device="cuda")
    >>> counter.count(layer_index, topk_ids)                    # in each MoE layer, behind its router
    >>> counter.record(writer, physical_to_logical_map)         # at the end of each forward pass

    Args:
        num_moe_layers: rows of the buffer; the writer's ``moe_layers`` has as many entries.
        num_physical_experts: expert slots per layer on all EP ranks, including redundant ones.
        device: the device of ``topk_ids``; default: torch's default device.

    Attributes:
        load: int32 ``[num_moe_layers, num_physical_experts]``, contiguous; tokens routed to each
            physical expert since the last :meth:`record` or :meth:`reset`. It is the live buffer: an
            engine that records with scope ``"global"`` may all-reduce it in place before :meth:`record`.

    Raises:
        ValueError: there are no layers or no experts.
    """

    def __init__(
        self,
        num_moe_layers: int,
        num_physical_experts: int,
        *,
        device: torch.device | str | int | None = None,
    ) -> None:
        if num_moe_layers < 1 or num_physical_experts < 1:
            raise ValueError(
                f"num_moe_layers and num_physical_experts must be at least 1, "
                f"not {num_moe_layers} and {num_physical_experts}"
            )
        # A buffer made under inference_mode could not be written outside it.
        with torch.inference_mode(False):
            self.load = torch.zeros(num_moe_layers, num_physical_experts, dtype=torch.int32, device=device)

    def count(self, layer_index: int, topk_ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add one layer's routing to :attr:`load`. In a CUDA graph, every replay adds.

        Args:
            layer_index: the row of :attr:`load`, the index of the MoE layer from 0.
            topk_ids: physical expert ids of any integer dtype and any shape, usually
                ``[num_tokens, top_k]``, on the device of :attr:`load`. Ids outside of 0 to
                ``num_physical_experts - 1`` are padding and not counted.
            mask: bool, ``topk_ids.shape[:-1]``, usually ``[num_tokens]``: which tokens are real, for
                padded batches. In a CUDA graph it may be computed from a static tensor, as
                ``torch.arange(num_padded, device=device) < num_tokens``.

        Raises:
            IndexError: there is no such layer.
            TypeError: the ids are not integers, or the mask is not bool.
            ValueError: the mask has another shape.
        """
        num_moe_layers, num_physical_experts = self.load.shape
        if not 0 <= layer_index < num_moe_layers:
            raise IndexError(f"layer_index is {layer_index}, but there are {num_moe_layers} MoE layers")
        dtype = topk_ids.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"topk_ids must be of an integer type, not {dtype}")
        ids = topk_ids.long()
        # Neither bincount nor boolean indexing: both wait for the device. Padding adds 0 to an expert.
        slots = ids.clamp(0, num_physical_experts - 1)
        counts = ids == slots
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be of type torch.bool, not {mask.dtype}")
            if mask.shape != ids.shape[:-1]:
                shapes = f"{list(mask.shape)}, but topk_ids {list(ids.shape)}"
                raise ValueError(f"mask must have one entry per token: it is {shapes}")
            counts = counts & mask.unsqueeze(-1)
        self.load[layer_index].scatter_add_(0, slots.flatten(), counts.flatten().int())

    def record(
        self,
        writer: ExpertLoadWriter,
        physical_to_logical_map: torch.Tensor | None = None,
        *,
        step: int | None = None,
        num_tokens: int | None = None,
        phase: str | None = None,
        step_ms: float | None = None,
    ) -> None:
        """Pass :attr:`load` to the writer and reset it. Once per forward pass, outside a CUDA graph.

        Like :meth:`ExpertLoadWriter.record`, whose arguments these are, it neither waits nor raises. The
        buffer is zeroed even if the step was not recorded, so that it does not count into the next.

        Args:
            writer: has the same number of layers as this counter.
            physical_to_logical_map: integer ``[num_moe_layers, num_physical_experts]``, the logical
                expert in each slot (-1: none) in this pass; None: as before, or unknown.
            step: the number of the pass, ascending; None: the writer counts.
            num_tokens: tokens of this rank in the pass, without padding, if known.
            phase: for example ``"prefill"`` or ``"decode"``.
            step_ms: the engine's own time of the pass in ms, if it knows it.
        """
        writer.record(
            step, self.load, physical_to_logical_map, num_tokens=num_tokens, phase=phase, step_ms=step_ms
        )
        # On CUDA the writer's copy is only queued, on the current stream; this is queued behind it.
        self.reset()

    def reset(self) -> None:
        """Discard the counts: after warm-up, capturing a CUDA graph, or a pass that is skipped."""
        self.load.zero_()
