"""What a patched vLLM makes of ``expert_load_dump_dir`` in its configuration; prints it as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm.config import ParallelConfig
from vllm.config.parallel import EPLBConfig


def parallel(**eplb: Any) -> ParallelConfig:
    config = ParallelConfig(
        data_parallel_size=2, enable_expert_parallel=True, distributed_executor_backend="mp"
    )
    config.eplb_config = EPLBConfig(**eplb)
    return config


def error_of(make: Any) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder = {"expert_load_dump_dir": "/dumps"}
    hashes = [parallel(**eplb).compute_hash() for eplb in ({}, folder, {"step_interval": 7})]
    config = parallel(**folder)
    config.compute_hash()
    found = {
        "hashes": hashes,
        "folder after the hash": config.eplb_config.expert_load_dump_dir,
        "without EPLB": error_of(lambda: ParallelConfig(eplb_config=EPLBConfig(**folder))),
    }
    sys.modules["eplb_dump"] = None  # type: ignore[assignment]
    found["without the package"] = error_of(lambda: EPLBConfig(**folder))
    found["without the package and the field"] = error_of(EPLBConfig)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
