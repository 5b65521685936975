"""Saves what vLLM returns as routed experts: ``python vllm_routed.py FOLDER SNIPPET``.

Real are the capturer, to which layers hand their top-k ids, and the outputs of requests; the layers' calls
and the configuration are made up. SNIPPET is Python that defines ``save_routing``. FOLDER gets ``routed.npz``
and the truth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe import routed_experts_capturer
from vllm.outputs import CompletionOutput, RequestOutput

LAYERS, DENSE, EXPERTS, TOP_K = 4, 1, 16, 2
#: Tokens of each request, and how many of them came from the prefix cache.
REQUESTS = [(9, 0), (14, 4), (6, 0)]


def main() -> None:
    folder, snippet = Path(sys.argv[1]), Path(sys.argv[2])
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: LAYERS,
            get_num_experts=lambda: EXPERTS,
            get_num_experts_per_tok=lambda: TOP_K,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(model_type="tiny"),
        ),
        parallel_config=SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1),
    )
    config.model_config.hf_config.hf_text_config = config.model_config.hf_text_config
    context = SimpleNamespace(dp_metadata=None, batch_descriptor=None)
    rng = np.random.default_rng(5)
    outputs, truth = [], []
    with (
        mock.patch.object(routed_experts_capturer.current_platform, "device_type", "cpu"),
        mock.patch.object(routed_experts_capturer, "get_forward_context", return_value=context),
    ):
        capturer = routed_experts_capturer.RoutedExpertsCapturer(32, config)
        for number, (tokens, cached) in enumerate(REQUESTS):
            ids = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
            for layer in range(DENSE, LAYERS):
                capturer.capture(layer, torch.from_numpy(ids[:, layer]))
            routed = capturer.snapshot_routing_data(tokens).numpy()
            completion = CompletionOutput(0, "", [1], None, None, routed_experts=routed)
            outputs.append(
                RequestOutput(
                    str(number), None, list(range(tokens)), None, [completion], True, num_cached_tokens=cached
                )
            )
            truth.append(ids[cached:, DENSE:])
    code: dict[str, object] = {}
    exec(snippet.read_text(), code)
    code["save_routing"](folder / "routed.npz", outputs)  # type: ignore[operator]
    np.savez(folder / "truth.npz", *truth)


if __name__ == "__main__":
    main()
