"""Expert parallelism: the experts' weights lie on all ranks, and tokens travel to them and back.

What communicates must be called by all ranks in the same order. Which slot should hold which expert is
decided in balancer.py.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import EngineError
from .experts import combine, run_experts, unsort


@dataclass(frozen=True)
class Placement:
    """A physical_to_logical_map and what routing needs of it."""

    physical_to_logical_map: Tensor  # [moe_layers, num_physical_experts]
    replicas: Tensor  # [moe_layers, num_logical_experts, most copies]: an expert's slots, repeated to fill up
    replica_count: Tensor  # [moe_layers, num_logical_experts]

    @classmethod
    def of(cls, physical_to_logical_map: Tensor, num_logical_experts: int, device: torch.device) -> Placement:
        slots = [
            [(layer == expert).nonzero().flatten().tolist() for expert in range(num_logical_experts)]
            for layer in physical_to_logical_map
        ]
        counts = torch.tensor([[len(copies) for copies in layer] for layer in slots])
        if not counts.all():
            raise EngineError("the new placement leaves an expert without a slot")
        most = int(counts.max())
        filled = [[[copies[i % len(copies)] for i in range(most)] for copies in layer] for layer in slots]
        return cls(physical_to_logical_map.to(device), torch.tensor(filled, device=device), counts.to(device))

    def to_physical(self, moe_layer: int, expert_ids: Tensor, turn: int) -> Tensor:
        """A slot for each chosen expert, [n, top_k]: copies take turns, token by token and step by step."""
        token = torch.arange(len(expert_ids), device=expert_ids.device).unsqueeze(1)
        replica = (token + turn) % self.replica_count[moe_layer][expert_ids]
        return self.replicas[moe_layer][expert_ids, replica]


@dataclass(frozen=True)
class Moved:
    """What a rearrangement did, over all ranks."""

    layers: int  # layers in which a slot changed
    slots: int  # slots that hold another expert now
    transfers: int  # of these: weights that came from another rank


class ExpertParallel:
    """This rank's slots of every MoE layer, and the way to the other ranks' (an `experts.Experts`).

    `load` is what an engine hands to a recorder: int32 [moe_layers, num_physical_experts], the tokens that
    this rank routed to each slot, wherever the slot is. It is added to until `load.zero_()`.
    """

    def __init__(
        self,
        expert_weights: Tensor,
        physical_to_logical_map: Tensor,
        ep_rank: int,
        ep_size: int,
        device: torch.device,
    ) -> None:
        """Keep this rank's of all expert_weights [moe_layers, num_logical_experts, 2, hidden, expert]."""
        self.ep_rank, self.ep_size, self.device = ep_rank, ep_size, device
        self.slots_per_rank = physical_to_logical_map.shape[1] // ep_size
        self.num_logical_experts = expert_weights.shape[1]
        self.turn = ep_rank  # ranks start with different copies
        self.load = torch.zeros(physical_to_logical_map.shape, dtype=torch.int32, device=device)
        self._checksums = [[checksum(expert) for expert in layer] for layer in expert_weights]
        self._set_placement(physical_to_logical_map)
        self.weights = [
            layer[torch.tensor(self._experts_of(moe_layer, ep_rank))].to(device)
            for moe_layer, layer in enumerate(expert_weights)
        ]

    def __call__(self, moe_layer: int, tokens: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        slots = self.placement.to_physical(moe_layer, expert_ids, self.turn).flatten()
        self.load[moe_layer].scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))

        # out: sorted by slot they are sorted by rank too
        order = slots.argsort(stable=True)
        sent = slots.bincount(minlength=self.load.shape[1]).cpu().view(self.ep_size, self.slots_per_rank)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        sent_rows, received_rows = sent.sum(1).tolist(), received.sum(1).tolist()
        inbox = self._exchange(tokens[order // expert_ids.shape[1]], received_rows, sent_rows)

        # here: they lie by sender and then by slot, the experts want them by slot
        slot_of_row = torch.arange(received.numel()).remainder(self.slots_per_rank)
        by_slot = slot_of_row.repeat_interleave(received.flatten()).argsort(stable=True).to(self.device)
        outputs = run_experts(self.weights[moe_layer], inbox[by_slot], received.sum(0).tolist())

        # and back
        returned = self._exchange(unsort(outputs, by_slot), sent_rows, received_rows)
        return combine(unsort(returned, order), expert_weights)

    def take_part(self, hidden_size: int, top_k: int) -> None:
        """A forward pass without a token of this rank's: the others' tokens may need this rank's experts."""
        tokens = torch.zeros(0, hidden_size, device=self.device)
        nothing = torch.zeros(0, top_k, device=self.device)
        for moe_layer in range(len(self.weights)):
            self(moe_layer, tokens, nothing.long(), nothing)

    def logical_load(self) -> Tensor:
        """`load` by logical expert, int64 [moe_layers, num_logical_experts]."""
        load = torch.zeros(len(self.load), self.num_logical_experts, dtype=torch.int64, device=self.device)
        return load.scatter_add_(1, self.placement.physical_to_logical_map, self.load.long())

    def rearrange(self, new_map: Tensor) -> Moved:
        """Bring every slot the weights of its new expert, from this rank or another that holds them."""
        old_map = self.placement.physical_to_logical_map.cpu()
        transfers = 0
        for moe_layer in range(len(self.weights)):
            transfers += self._move_layer(moe_layer, new_map)
        self._set_placement(new_map)
        changed = new_map != old_map
        return Moved(int(changed.any(1).sum()), int(changed.sum()), transfers)

    def verify_weights(self) -> None:
        """Check every slot's weights against the checksum of the expert that it should hold, bit for bit."""
        for moe_layer, slots in enumerate(self.weights):
            for slot, (weights, expert) in enumerate(
                zip(slots, self._experts_of(moe_layer, self.ep_rank), strict=True),
                self.ep_rank * self.slots_per_rank,
            ):
                if checksum(weights) != self._checksums[moe_layer][expert]:
                    raise EngineError(
                        f"MoE layer {moe_layer}: slot {slot} does not hold the weights of expert {expert}"
                    )

    def _set_placement(self, physical_to_logical_map: Tensor) -> None:
        self.placement = Placement.of(physical_to_logical_map, self.num_logical_experts, self.device)

    def _experts_of(self, moe_layer: int, rank: int) -> list[int]:
        """The logical experts in a rank's slots."""
        experts: list[list[int]] = (
            self.placement.physical_to_logical_map[moe_layer].view(self.ep_size, -1).tolist()
        )
        return experts[rank]

    def _exchange(self, rows: Tensor, received_rows: list[int], sent_rows: list[int]) -> Tensor:
        """Send runs of rows to each rank in turn. By way of the CPU: gloo moves no CUDA tensors."""
        inbox = torch.empty(sum(received_rows), rows.shape[1])
        dist.all_to_all_single(inbox, rows.cpu(), received_rows, sent_rows)
        return inbox.to(self.device)

    def _move_layer(self, moe_layer: int, new_map: Tensor) -> int:
        held = [self._experts_of(moe_layer, rank) for rank in range(self.ep_size)]
        mine = held[self.ep_rank]
        old = self.weights[moe_layer]
        new = torch.empty_like(old)
        pending: list[dist.Work | None] = []
        leaving: list[Tensor] = []  # keeps the staged copies until they are sent
        arriving: list[tuple[int, Tensor]] = []
        transfers = 0
        for slot, expert in enumerate(new_map[moe_layer].tolist()):
            target, place = divmod(slot, self.slots_per_rank)
            if expert in held[target]:
                if target == self.ep_rank:
                    new[place] = old[mine.index(expert)]
                continue
            transfers += 1
            holders = [rank for rank in range(self.ep_size) if expert in held[rank]]
            source = holders[slot % len(holders)]  # spread over the holders, alike on every rank
            if source == self.ep_rank:
                leaving.append(old[mine.index(expert)].cpu())
                pending.append(dist.isend(leaving[-1], target, tag=slot))
            elif target == self.ep_rank:
                arriving.append((place, torch.empty(old.shape[1:])))
                pending.append(dist.irecv(arriving[-1][1], source, tag=slot))
        for work in pending:
            assert work is not None
            work.wait()
        for place, weights in arriving:
            new[place] = weights.to(self.device)
        self.weights[moe_layer] = new
        return transfers


def checksum(weights: Tensor) -> int:
    """Of the weights' bytes."""
    return zlib.crc32(weights.contiguous().cpu().numpy().tobytes())
