"""Record the expert loads of a Hugging Face transformers MoE model, without touching the model.

    python examples/transformers_moe.py DUMP_DIR

The model is a tiny Qwen3-MoE with random weights, so that nothing is downloaded; `record_expert_load`
works as it is for other models of transformers 5 whose decoder layers have `mlp.experts`. transformers
runs on one device here, so the expert parallelism is a what-if: which of EP_SIZE ranks would have had
how much to do, had the experts been spread over them in order.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from eplb_dump import ExpertLoadCounter, ExpertLoadWriter

EP_SIZE = 4


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        mlp_only_layers=[0],  # a dense one, as DeepSeek has: the MoE layers are 1 to 4
        num_experts=16,
        num_experts_per_tok=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def moe_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The experts of each MoE layer, by the model's own layer numbers."""
    layers = enumerate(model.get_decoder().layers)
    return {number: layer.mlp.experts for number, layer in layers if hasattr(layer.mlp, "experts")}


def record_expert_load(model: PreTrainedModel, writer: ExpertLoadWriter) -> None:
    """From now on, every forward pass of the model is a step of the writer's dump."""
    layers, num_experts = moe_layers(model), model.config.num_experts
    counter = ExpertLoadCounter(len(layers), num_experts, device=model.device)
    identity = torch.arange(num_experts).repeat(len(layers), 1)  # one slot an expert, in order
    mask: torch.Tensor | None = None  # of this pass: which tokens are no padding, [batch × length]
    step: dict[str, Any] = {}  # of this pass: what goes with its load

    def begin(_: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        nonlocal mask, step
        input_ids = inputs["input_ids"]
        cache, attention_mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # It covers the cached tokens too, and only the last ones are routed in this pass.
        mask = attention_mask[:, -input_ids.shape[1] :].flatten().bool()
        step = {
            "num_tokens": int(mask.sum()),  # waits for a GPU: an engine's scheduler knows it without
            "phase": "decode" if cache is not None and cache.get_seq_length() else "prefill",
        }

    def count(layer_index: int, topk_ids: torch.Tensor) -> None:
        counter.count(layer_index, topk_ids, mask)

    def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counter.record(writer, identity, **step)

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for index, experts in enumerate(layers.values()):
        # transformers calls experts(hidden_states, top_k_index, top_k_weights), of [batch × length] tokens.
        experts.register_forward_pre_hook(lambda _, args, index=index: count(index, args[1]))
    model.register_forward_hook(end)


def generate(model: PreTrainedModel, batches: int = 8, new_tokens: int = 16) -> None:
    """Continue random prompts of different lengths, which are padded on the left."""
    for _ in range(batches):
        lengths = torch.randint(4, 33, (6, 1))
        attention_mask = (torch.arange(32) >= 32 - lengths).long()
        prompts = torch.randint(1, model.config.vocab_size, (6, 32)) * attention_mask
        model.generate(prompts, attention_mask=attention_mask, max_new_tokens=new_tokens, do_sample=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump_dir", type=Path, metavar="DUMP_DIR")
    dump_dir = parser.parse_args().dump_dir
    torch.set_num_threads(1)  # more of them only wait for each other in so tiny a model
    torch.manual_seed(0)
    model = tiny_qwen3_moe()
    writer = ExpertLoadWriter(
        dump_dir,
        model="tiny-qwen3-moe",
        num_logical_experts=model.config.num_experts,
        ep_size=EP_SIZE,
        scope="global",  # this one process sees the tokens of all ranks
        moe_layers=list(moe_layers(model)),
        engine="transformers",
        engine_version=transformers.__version__,
    )
    record_expert_load(model, writer)
    generate(model)
    writer.close()
    print(f"recorded {writer.stats().recorded} forward passes; now try: eplb-analyze summary {dump_dir}")


if __name__ == "__main__":
    main()
