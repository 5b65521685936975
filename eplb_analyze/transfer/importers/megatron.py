"""Megatron's expert load recorder: one .npz file per rank, ``mcore_ep_load_dump_v1``.

Each rank counts its own tokens by slot; the load is the sum over the EP group. A layer's rows after its
``forward_counts`` are uninitialized memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.text import plural
from eplb_analyze.transfer.importers.files import Array, listing, npz_shapes, read_npz
from eplb_analyze.transfer.importers.source import Chunk, Options, Reading
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS, Scope

SYSTEM = "Megatron"
VERSION = "mcore_ep_load_dump_v1"
_SCALARS = ("ep_rank", "ep_size", "global_rank", "num_global_physical_experts")


def is_megatron(path: Path) -> bool:
    return "dump_version" in npz_shapes(path)


class _RankFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        shapes = npz_shapes(path)
        small = ("dump_version", "layer_numbers", "forward_counts", "ep_group_ranks", *_SCALARS)
        big = [name for name in small if name in shapes and np.prod(shapes[name][0]) > MAX_EXPERTS]
        if big:
            raise DumpError(f"{path}: {big[0]} has the shape {shapes[big[0]][0]}")
        arrays = read_npz(path, *small, "loads")
        if str(arrays["dump_version"]) != VERSION:
            raise DumpError(f"{path}: dump_version is {str(arrays['dump_version'])[:40]!r}, not {VERSION!r}")
        numbers = [arrays[name] for name in small[1:]]
        if any(a.dtype.kind not in "iu" for a in [*numbers, arrays["loads"]]):
            raise DumpError(f"{path}: its numbers are not all whole numbers")
        if any(arrays[name].ndim for name in _SCALARS):
            raise DumpError(f"{path}: its sizes are not single numbers")
        self.rank, self.ep_size, _, self.slots = (int(arrays[name]) for name in _SCALARS)
        self.layers = tuple(arrays["layer_numbers"].ravel().tolist())
        self.group = tuple(arrays["ep_group_ranks"].ravel().tolist())
        self.loads: Array = arrays["loads"]
        counts = arrays["forward_counts"]
        if self.loads.ndim != 3 or self.loads.shape[2] != self.slots or len(self.layers) > MAX_LAYERS:
            raise DumpError(f"{path}: loads has the shape {self.loads.shape}")
        if counts.shape != (len(self.layers),) or len(self.loads) != len(self.layers) or not self.layers:
            raise DumpError(f"{path}: loads, layer_numbers and forward_counts have different lengths")
        if counts.min() < 0 or counts.max() > self.loads.shape[1]:
            raise DumpError(f"{path}: forward_counts go beyond the {self.loads.shape[1]} rows of loads")
        if not 0 <= self.rank < self.ep_size:
            raise DumpError(f"{path}: it claims to be from EP rank {self.rank} of {self.ep_size}")
        self.whole, self.begun = int(counts.min()), int(counts.max())

    def chunks(self) -> Iterator[Chunk]:
        for low in range(0, self.whole, 256):
            high = min(low + 256, self.whole)
            yield Chunk(np.arange(low, high, dtype=np.int64), self.loads[:, low:high].transpose(1, 0, 2))


def read(path: Path, options: Options) -> Reading:
    """A folder with one capture of one EP group, or one file. Raises DumpError, UsageError."""
    paths = listing(path, options.only or "*.npz") if path.is_dir() else [path]
    if path.is_dir() and options.only is None:
        paths = [p for p in paths if is_megatron(p)]
        if not paths:
            raise DumpError(f"{path}: it contains no {VERSION} file")
    files: dict[int, _RankFile] = {}
    for one in paths:
        file = _RankFile(one)
        if file.rank in files:
            raise UsageError(
                f"{path}: EP rank {file.rank} has several files ({files[file.rank].path.name}, "
                f"{one.name}), from different captures or EP groups; choose with --only 'PATTERN'"
            )
        files[file.rank] = file
    first = next(iter(files.values()))
    for file in files.values():
        for what in ("group", "ep_size", "layers", "slots"):
            if getattr(file, what) != getattr(first, what):
                raise UsageError(
                    f"{file.path}: its {what} differs from that of {first.path.name}, so the files are "
                    f"from two EP groups; choose with --only 'PATTERN'"
                )
    notes = [
        f"rank {rank}: {plural(file.begun - file.whole, 'forward pass')} left out, because some layers "
        f"lack them"
        for rank, file in sorted(files.items())
        if file.begun > file.whole
    ]
    if not any(file.whole for file in files.values()):
        raise DumpError(f"{path}: it contains no complete forward pass")
    numbers = tuple(sorted(first.layers))
    if numbers != first.layers or len(set(numbers)) != len(numbers) or numbers[0] < 0:
        raise DumpError(f"{first.path}: layer_numbers are not in ascending order")
    return Reading(
        SYSTEM, "expert loads", [file.path for file in files.values()], True, Scope.LOCAL,
        {rank: file.chunks for rank, file in sorted(files.items())}, len(first.layers), first.slots,
        ep_size=first.ep_size, layers=first.layers,
        files_of={rank: [file.path] for rank, file in files.items()},
        assumed={"steps": "the n-th forward pass of every layer and rank is step n, counted from 0"},
        notes=notes,
    )  # fmt: skip
