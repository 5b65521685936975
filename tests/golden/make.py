"""Makes a golden dump of the current format version: run once a version, then never again.

v1.1 was made before ``steps`` had durations, v1.1-durations after, v1.2 with roll-ups.

Everything in it is fixed but the session's time, host, process and chance. One session was closed, one
was left as a kill leaves it: a sealed segment, then an open journal with a torn end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from eplb_dump import FORMAT_VERSION, ExpertLoadWriter


def main(root: Path) -> None:
    rng = np.random.default_rng(1)
    steps, ranks, layers = 12, 2, 2
    tokens = rng.integers(50, 90000, size=steps)
    local = np.stack(
        [
            [
                [rng.multinomial(n, [0.3, 0.1, 0.1, 0.2, 0.2, 0.1]) for _ in range(layers)]
                for _ in range(ranks)
            ]
            for n in tokens
        ]
    )
    placements = np.array(
        [[[0, 1, 2, 3, 0, -1], [3, 2, 1, 0, 3, 1]], [[0, 1, 2, 3, 1, -1], [3, 2, 1, 0, 3, 1]]]
    )
    local[:, :, 0, 5] = 0  # the empty slot gets nothing
    local[:, :, 0, 4] += tokens[:, None] - local[:, :, 0].sum(axis=2)
    local[5, 1] = 0
    # Rank 1 knows the time of every third step only.
    step_ms = [[8 + n / 1024, 9 - n / 2048 if step % 3 == 0 else None] for step, n in enumerate(tokens)]
    for rank in range(ranks):
        writer = ExpertLoadWriter(
            root, model="golden/moe", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="golden",
            moe_layers=[3, 5], ranks_per_node=1, engine="golden", engine_version="1",
            engine_config={"window": 8}, segment_steps=8,
        )  # fmt: skip
        for step in range(steps):
            if step == 5 and rank == 1:
                writer.skip("dummy")
                continue
            writer.record(
                step,
                local[step, rank],
                placements[int(step >= 6)],
                num_tokens=int(tokens[step]),
                phase="decode",
                step_ms=step_ms[step][rank],
            )
        assert writer.flush()
        if rank == 0:
            assert writer.close()
            continue
        # Wait for the first segment to be sealed.
        deadline = time.monotonic() + 20
        while len(list(writer.folder.glob("*.parquet"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        journal = max(writer.folder.glob("journal-*.frames"))
        left = {p.name: p.read_bytes() for p in writer.folder.iterdir()}
        left[journal.name] += left[journal.name][:40]  # the head of a frame that was never finished
        writer.close()
        for path in writer.folder.iterdir():
            path.unlink()
        for name, data in left.items():
            (writer.folder / name).write_bytes(data)
    truth = {"local": local.tolist(), "placements": placements.tolist(), "tokens": tokens.tolist()}
    truth["step_ms"] = step_ms
    (root / "truth.json").write_text(json.dumps(truth))


if __name__ == "__main__":
    main(
        Path(
            sys.argv[1]
            if len(sys.argv) > 1
            else Path(__file__).parent / f"v{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}"
        )
    )
