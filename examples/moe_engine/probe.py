"""The proof that a rearrangement changed nothing: the same texts through the model, before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .errors import EngineError
from .experts import Experts
from .model import Batch, MoeTransformer
from .text import TOPICS, Bytes, random_text

ROWS, LENGTH = 8, 48
TOLERANCE = 1e-3  # of a logit; summing in another order changes them by about 1e-5
# A token whose second and third best expert are closer than this may get either, by rounding alone.
SMALLEST_MARGIN = 1e-4


class Probe:
    """Some text, and what a model with all its experts in one process makes of it."""

    def __init__(
        self,
        model: MoeTransformer,
        experts: Experts,
        corpora: dict[str, Bytes],
        seed: list[int],
        device: torch.device,
    ) -> None:
        rng = np.random.default_rng(seed)
        rows = [random_text(corpora[TOPICS[row % len(TOPICS)]], LENGTH, rng) for row in range(ROWS)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        margins: list[Tensor] = []
        hooks = [
            router.gate.register_forward_hook(_keep_margins(margins, router.top_k))
            for router in model.routers()
        ]
        self._model, self._batch = model, _batch(tokens)
        self._expected = self._logits(experts)
        for hook in hooks:
            hook.remove()
        clear = torch.stack(margins).amin(0).view(ROWS, LENGTH).amin(1) > SMALLEST_MARGIN
        if not clear.any():
            raise EngineError(
                "every probe text has a token on the verge between two experts: try another --seed"
            )
        self._batch, self._expected = _batch(tokens[clear]), self._expected[clear]

    def check(self, experts: Experts) -> float:
        """The largest difference of a logit from the expected; EngineError if it is more than rounding."""
        difference = float((self._logits(experts) - self._expected).abs().max())
        if not difference <= TOLERANCE:  # so that NaN fails too
            raise EngineError(f"the served model's logits differ from the reference by {difference:.2g}")
        return difference

    def _logits(self, experts: Experts) -> Tensor:
        return self._model.logits(self._model(self._batch, experts))


def _batch(tokens: Tensor) -> Batch:
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Batch(tokens, positions, torch.arange(tokens.numel(), device=tokens.device))


def _keep_margins(margins: list[Tensor], top_k: int) -> Callable[[torch.nn.Module, object, Tensor], None]:
    """A hook that notes how far each token's last chosen expert is ahead of the next."""

    def hook(_module: torch.nn.Module, _inputs: object, logits: Tensor) -> None:
        best = logits.topk(top_k + 1, dim=-1).values
        margins.append(best[:, top_k - 1] - best[:, top_k])

    return hook
