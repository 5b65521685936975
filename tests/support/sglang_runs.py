"""What a run of ``tests/engines/sglang_ranks.py`` left behind, and what its recording must say.

This needs numpy, pyarrow and torch only: ``sglang_check.py`` uses it where there is no ``eplb_analyze``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from helpers import arrays

LAYERS, DENSE, LOGICAL, SLOTS = 5, 2, 6, 8
MOE_LAYERS = [2, 3, 4]
#: What a pass takes at least on a GPU: see PASS_CYCLES in sglang_ranks.py.
PASS_MS = 0.5
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recorded:
    """What a dump says of one rank, however it was read; ``[steps, ...]`` in the order of ``steps``."""

    steps: list[int]
    #: Of each step: ``recorded`` ...
    status: list[str]
    #: [steps, MoE layers, slots]
    loads: Array
    #: [steps, MoE layers, slots]: logical experts.
    placements: Array
    #: Phase ("" if unknown) and tokens (-1) by step.
    described: dict[int, tuple[str, int]]
    #: [steps]: milliseconds on the device, NaN if unknown.
    device_ms: Array


@dataclass(frozen=True)
class SglangRun:
    """The truth of a run, what SGLang said and what its own recorder wrote."""

    out: Path
    ranks: int
    device: str = "cpu"

    def truth(self, name: str) -> Array:
        """[ranks, steps, ...]: ``loads`` and ``maps`` [..., layers, slots], ``phases`` and ``tokens``."""
        return np.stack([arrays(self.out / f"truth-{rank}.npz")[name] for rank in range(self.ranks)])

    def said(self, rank: int, what: str) -> list[Any]:
        told = json.loads((self.out / f"said-{rank}.json").read_text())[what]
        # What SGLang says of an environment without a GPU.
        return [
            t for t in told if not str(t).startswith(("Ignore import", "Cannot detect", "The current plat"))
        ]

    def rank_folder(self, rank: int) -> Path:
        (found,) = (self.out / "dump").glob(f"run=*/model=*/rank={rank:05d}")
        return found

    def own(self) -> list[Any]:
        """What SGLang's own recorder wrote and returned."""
        import torch

        def as_lists(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: as_lists(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [as_lists(part) for part in value]
            return value.tolist() if isinstance(value, torch.Tensor) else value

        written = sorted(self.out.glob("own-*/*.pt"))
        found = [as_lists(torch.load(path, map_location="cpu")) for path in written]
        returned = sorted(self.out.glob("own-*.npz"))
        return found + [arrays(path)["logical_count"].tolist() for path in returned]


def assert_recorded(ours: SglangRun, recorded: Sequence[Recorded]) -> None:
    """Every rank's part, step by step: its load, the placement in force, phase, tokens and time."""
    true_loads, true_maps = ours.truth("loads"), ours.truth("maps")
    assert true_loads[:, :, MOE_LAYERS].any(axis=(0, 3)).all()
    assert (true_maps == true_maps[0]).all()
    assert len(recorded) == ours.ranks
    for rank, found in enumerate(recorded):
        assert found.steps == list(range(true_loads.shape[1])), rank
        assert set(found.status) == {"recorded"}, rank
        assert np.array_equal(found.loads, true_loads[rank][:, MOE_LAYERS]), rank
        assert np.array_equal(found.placements, true_maps[rank][:, MOE_LAYERS]), rank
        assert found.described == stated(ours, rank), rank
        assert_device_times(ours, found)


def stated(ours: SglangRun, rank: int, *, interval: int = 1, tokens: bool = True) -> dict[int, Any]:
    """Phase and tokens by step, as the rank stated them."""
    phases, counts = ours.truth("phases")[rank], ours.truth("tokens")[rank]
    return {n: (phases[n], counts[n] if tokens else -1) for n in range(0, len(phases), interval)}


def assert_device_times(ours: SglangRun, found: Recorded) -> None:
    """On a GPU, every pass that began when there was a writer was measured; on the CPU, none."""
    if ours.device == "cpu":
        assert np.isnan(found.device_ms).all()
    else:
        known = found.device_ms[1:]
        assert len(known) > 0
        assert (known >= PASS_MS).all(), known
        assert (known < 60_000).all(), known


def assert_as_without(ours: SglangRun, theirs: SglangRun) -> None:
    """SGLang wrote, returned and said the same with the plugin and without it."""
    assert ours.own() == theirs.own() != []
    for rank in range(ours.ranks):
        for what in ("messages", "switch", "stored"):
            assert ours.said(rank, what) == theirs.said(rank, what), what
        # Of the first 12 passes, SGLang was asked to record six, and dumped before the last of those.
        assert ours.said(rank, "stored")[:15] == [0] * 5 + [1, 2, 3, 4, 5, 6, 1] + [1] * 3
    assert not (theirs.out / "dump").exists()
