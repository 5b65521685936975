"""Opens files of expert ids per token: one file of any format, or a file for each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers import torch_files
from eplb_analyze.transfer.importers.files import read_npy, regular
from eplb_analyze.transfer.importers.topk_arrays import open_array, open_npz
from eplb_analyze.transfer.importers.topk_blocks import Block, TokenFile
from eplb_analyze.transfer.importers.topk_parquet import open_parquet

SUFFIXES = (".npy", ".npz", ".pt", ".parquet")
#: A file with the ids of one layer, as in ``layer_02.parquet``.
LAYER_FILE = re.compile(r"layer[_-]?(\d{1,6})(?!\d)", re.IGNORECASE)


def open_file(path: Path, wanted: str | None) -> TokenFile:
    """A file; ``wanted`` names the array or column with the ids. Raises DumpError, UsageError."""
    regular(path)
    with path.open("rb") as file:
        start = file.read(6)
    if start[:4] == b"PAR1":
        return open_parquet(path, wanted)
    if start == b"\x93NUMPY":
        return open_array(path, read_npy(path))
    if start[:4] != b"PK\x03\x04":
        raise DumpError(f"{path}: expert ids per token are read from {', '.join(SUFFIXES)} files")
    if path.suffix == ".pt":
        return open_array(path, torch_files.Arrays(path).of(torch_files.load(path), (2, 3, 4), "the tensor"))
    return open_npz(path, wanted)


def open_layers(paths: list[Path], wanted: str | None) -> TokenFile:
    """Files that each have the ids of one layer, for the same tokens. Raises DumpError, UsageError."""
    files = {int(match[1]): open_file(p, wanted) for p in paths if (match := LAYER_FILE.search(p.name))}
    folder, first = paths[0].parent, next(iter(files.values()))
    for file in files.values():
        if (file.kind, file.has_steps, file.has_requests) != (
            first.kind, first.has_steps, first.has_requests,
        ) or file.numbered:  # fmt: skip
            raise DumpError(f"{file.path}: its arrays or columns differ from those of {first.path.name}")
    if len(files) < len(paths):
        raise DumpError(f"{folder}: several files have the same layer in their names")

    def blocks() -> Iterator[Block]:
        for layer, file in sorted(files.items()):
            for block in file.blocks():
                if len(block.layers) != 1:
                    raise DumpError(f"{file.path}: its name states one layer, but it has {len(block.layers)}")
                yield Block(block.ids, (layer,), block.step, block.request)

    return TokenFile(
        folder, "a file per layer", blocks, first.has_steps, first.has_requests, True, first.left_out,
        tuple(paths),
    )  # fmt: skip
