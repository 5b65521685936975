"""What SGLang's own loader makes of files for ``--init-expert-location``; run by test_sglang_placement.py.

``python sglang_locates.py OUT FILE …`` in an environment that has SGLang prints JSON: for each file its
``physical_to_logical_map`` and ``logical_to_all_physical_map``, or the type of the error. The model is
that of sglang_ranks.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from sglang_ranks import MODEL, REDUNDANT


def located(out: Path, file: str) -> Any:
    from sglang.srt.eplb.expert_location import compute_initial_expert_location_metadata
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, process_model_config, publish
    from sglang.srt.server_args import ServerArgs

    server = ServerArgs(
        model_path=str(out / "model"),
        device="cpu",
        tp_size=2,
        ep_size=2,
        ep_num_redundant_experts=REDUNDANT,
        init_expert_location=file,
    )
    publish(server, role="scheduler", ranks=SpawnRanks(world_rank=0))
    initialize_moe_config()
    found = compute_initial_expert_location_metadata(process_model_config(), moe_ep_rank=0)
    return {
        "physical_to_logical_map": found.physical_to_logical_map.tolist(),
        "logical_to_all_physical_map": found.logical_to_all_physical_map.tolist(),
    }


def main() -> None:
    out = Path(sys.argv[1])
    (out / "model").mkdir(parents=True, exist_ok=True)
    (out / "model/config.json").write_text(json.dumps(MODEL))
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/met", rank=0, world_size=1)
    results: dict[str, Any] = {}
    for file in sys.argv[2:]:
        try:
            results[file] = located(out, file)
        except Exception as error:
            results[file] = type(error).__name__
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
