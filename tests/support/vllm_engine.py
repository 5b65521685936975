"""Real vLLM code in processes of the engines' environment, with the plugin on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from helpers import ROOT, arrays, engines_python

RANKS = ROOT / "tests/engines/vllm_ranks.py"


def serve(folder: Path, *options: str, **environment: str) -> tuple[list[dict[str, Any]], Path, str]:
    """Serve with the plugin; each rank's truth, the dump, and what was printed."""
    dump = folder / "dump"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EXPERT_LOAD")}
    done = subprocess.run(
        [engines_python(), RANKS, "--out", folder / "truth", *options],
        env={**clean, "EXPERT_LOAD_DUMP_DIR": str(dump), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = sorted((folder / "truth").glob("rank*.npz"))
    return [arrays(path) for path in ranks], dump, done.stdout + done.stderr
