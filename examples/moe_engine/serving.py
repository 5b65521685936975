"""One rank's requests: how they arrive, are batched, and become forward passes. No communication here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .experts import Experts
from .model import Batch, KVCache, MoeTransformer
from .text import Bytes, random_text

MAX_BATCH = 16
BURST_PROBABILITY, BURST_SIZE = 0.07, 6  # requests come in bursts; in between a rank can run dry
PROMPT_BYTES = (24, 96)
ANSWER_BYTES = (12, 40)
TEMPERATURE = 0.8


@dataclass
class Request:
    topic: str
    prompt: Bytes
    answer_bytes: int  # how many are wanted
    answer: list[int] = field(default_factory=list)
    row: int = -1  # in the KV cache

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


class Traffic:
    """The requests that reach one rank."""

    def __init__(self, corpora: dict[str, Bytes], seed: int, ep_rank: int) -> None:
        self.corpora = corpora
        self.rng = np.random.default_rng([seed, ep_rank])

    def arrivals(self, topic: str) -> list[Request]:
        """Those that arrive within one step."""
        if self.rng.random() >= BURST_PROBABILITY:
            return []
        return [self._request(topic) for _ in range(1 + self.rng.poisson(BURST_SIZE))]

    def _request(self, topic: str) -> Request:
        prompt = random_text(self.corpora[topic], int(self.rng.integers(*PROMPT_BYTES)), self.rng)
        return Request(topic, prompt, int(self.rng.integers(*ANSWER_BYTES)))


@dataclass(frozen=True)
class StepDone:
    phase: str  # "prefill" or "decode"
    num_tokens: int  # that went through the model
    answered: list[Request]


class Server:
    """Continuous batching: new requests are prefilled as soon as there is room, else all running decode."""

    def __init__(self, model: MoeTransformer, seed: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.cache = KVCache(model.config, MAX_BATCH, device)
        self.free_rows = list(range(MAX_BATCH))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.sampler = torch.Generator().manual_seed(seed)  # on the CPU, so that a GPU draws the same

    def step(self, experts: Experts) -> StepDone | None:
        """One forward pass; None if there is no request to work on."""
        if self.waiting and self.free_rows:
            return self._prefill(experts)
        if self.running:
            return self._decode(experts)
        return None

    def _prefill(self, experts: Experts) -> StepDone:
        admitted = []
        while self.waiting and self.free_rows:
            request = self.waiting.popleft()
            request.row = self.free_rows.pop()
            admitted.append(request)
        lengths = torch.tensor([request.length for request in admitted])
        longest = int(lengths.max())
        tokens = torch.zeros(len(admitted), longest, dtype=torch.long)
        for row, request in enumerate(admitted):
            tokens[row, : request.length] = torch.from_numpy(request.prompt.astype(np.int64))
        positions = torch.arange(longest).expand(len(admitted), longest)
        self.running += admitted
        return self._forward(
            experts, "prefill", admitted, tokens=tokens, positions=positions, lengths=lengths
        )

    def _decode(self, experts: Experts) -> StepDone:
        tokens = torch.tensor([request.answer[-1:] for request in self.running])
        positions = torch.tensor([[request.length - 1] for request in self.running])
        ones = torch.ones(len(self.running), dtype=torch.long)
        return self._forward(
            experts, "decode", self.running, tokens=tokens, positions=positions, lengths=ones
        )

    def _forward(
        self,
        experts: Experts,
        phase: str,
        requests: list[Request],
        *,
        tokens: Tensor,  # [requests, length]
        positions: Tensor,  # [requests, length]
        lengths: Tensor,  # [requests]: how many of a row's tokens are no padding
    ) -> StepDone:
        real = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        batch = Batch(
            tokens.to(self.device),
            positions.to(self.device),
            real.flatten().nonzero().flatten().to(self.device),
            self.cache,
            torch.tensor([request.row for request in requests], device=self.device),
            int(positions.max()) + 1,
        )
        hidden = self.model(batch, experts)
        last = hidden.flatten(0, 1)[
            (torch.arange(len(requests)) * tokens.shape[1] + lengths - 1).to(self.device)
        ]
        chances = (self.model.logits(last).cpu() / TEMPERATURE).softmax(-1)
        sampled = chances.multinomial(1, generator=self.sampler).flatten().tolist()
        for request, byte in zip(requests, sampled, strict=True):
            request.answer.append(byte)
        return StepDone(phase, int(lengths.sum()), self._retire())

    def _retire(self) -> list[Request]:
        answered = [request for request in self.running if len(request.answer) >= request.answer_bytes]
        self.running = [request for request in self.running if len(request.answer) < request.answer_bytes]
        self.free_rows += [request.row for request in answered]
        return answered
