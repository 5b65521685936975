"""One vLLM engine, which generates when the measuring process asks: ``engine.py FD OPTIONS.json``.

FD is one end of a socket pair. After ``{"ready": ...}`` the engine answers each command:

- ``{"seed", "batch", "prompt", "new"}``: generate ``new`` tokens for each of ``batch`` random prompts of
  ``prompt`` tokens, and answer with the tokens, int32 [batch, new];
- ``{"probe": path}``: let each worker write what it measured;
- ``None``: shut down.
"""

from __future__ import annotations

import asyncio
import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

#: Ids of random tokens: no special ones, and all in any vocabulary.
FIRST_ID, LAST_ID = 5, 500


def prompts_of(command: dict[str, int]) -> list[dict[str, list[int]]]:
    ids = np.random.default_rng(command["seed"]).integers(
        FIRST_ID, LAST_ID, (command["batch"], command["prompt"])
    )
    return [{"prompt_token_ids": row} for row in ids.tolist()]


class Blocking:
    """``vllm.LLM``: the engine of offline inference."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**options)

    def generate(self, command: dict[str, int]) -> list[list[int]]:
        answers = self._llm.generate(prompts_of(command), sampling(command), use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def call_workers(self, method: str, argument: str) -> None:
        self._llm.collective_rpc(method, args=(argument,))

    def shut_down(self) -> None:
        """It has no such call: it ends with its process."""


class Serving:
    """``AsyncLLM``: the engine of ``vllm serve``, which data parallelism needs."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._engine = self._loop.run_until_complete(start())
        self._requests = 0

    def generate(self, command: dict[str, int]) -> list[list[int]]:
        from vllm.sampling_params import RequestOutputKind

        parameters = sampling(command, output_kind=RequestOutputKind.FINAL_ONLY)

        async def one(prompt: Any, name: str) -> list[int]:
            tokens: list[int] = []
            async for output in self._engine.generate(prompt, parameters, name):
                tokens = list(output.outputs[0].token_ids)
            return tokens

        async def together() -> list[list[int]]:
            prompts = prompts_of(command)
            first = self._requests
            self._requests += len(prompts)
            return await asyncio.gather(*(one(p, f"request-{first + i}") for i, p in enumerate(prompts)))

        return self._loop.run_until_complete(together())

    def call_workers(self, method: str, argument: str) -> None:
        self._loop.run_until_complete(self._engine.collective_rpc(method, args=(argument,)))

    def shut_down(self) -> None:
        self._engine.shutdown()


def sampling(command: dict[str, int], **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=command["new"], temperature=0, ignore_eos=True, detokenize=False, **more)


def versions() -> dict[str, Any]:
    import torch
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": gpu}


def main() -> None:
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    options = json.loads(Path(sys.argv[2]).read_text())
    front = Serving if options.get("data_parallel_size", 1) > 1 else Blocking
    engine = front(options)
    connection.send({"ready": versions()})
    while (command := connection.recv()) is not None:
        if "probe" in command:
            engine.call_workers("eplb_probe_write", command["probe"])
            connection.send(None)
        else:
            connection.send(np.array(engine.generate(command), np.int32))
    engine.shut_down()


if __name__ == "__main__":
    main()
