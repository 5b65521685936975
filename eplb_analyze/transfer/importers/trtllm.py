"""TensorRT-LLM's expert statistics: a folder of ``meta_info.json`` and ``rank*.safetensors``.

A tensor ``"{iteration}_{layer}"`` holds the counts of one rank. With the load balancer on, ``num_experts`` is
the number of slots; only the balancer's YAML says which expert each slot holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError
from eplb_analyze.text import plural
from eplb_analyze.transfer.importers.files import listing, read_json, regular
from eplb_analyze.transfer.importers.source import Chunk, Options, Reading, plain_int
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS, Scope

SYSTEM = "TensorRT-LLM"
META = "meta_info.json"
RANK_FILE = re.compile(r"rank(\d{1,6})\.safetensors")
#: Types of counts in a tensor.
INTEGERS = ("I64", "I32", "I16", "U8")
_KEY = re.compile(r"(\d{1,18})_(\d{1,6})")


class _RankFile:
    """One rank's counts, by iteration and layer."""

    def __init__(self, path: Path, width: int) -> None:
        regular(path)
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            how = "pip install 'eplb-dump[analyze,import]'"
            raise DumpError(f"{path}: reading .safetensors files needs safetensors: {how}") from None
        try:
            # Checks the header and the tensors' sizes against the file's, and maps the file.
            tensors: Any = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise DumpError(f"{path}: it is not a safetensors file, or it is cut off ({error})") from None
        self.layers: dict[int, set[int]] = {}
        self._tensors = tensors
        for name in tensors.keys():  # noqa: SIM118 - it is not a mapping
            tensor, match = tensors.get_slice(name), _KEY.fullmatch(name)
            if match is None or tensor.get_shape() != [width] or tensor.get_dtype() not in INTEGERS:
                raise DumpError(f"{path}: tensor {name!r} is not iteration_layer with {width} counts")
            self.layers.setdefault(int(match[1]), set()).add(int(match[2]))

    def chunks(self, steps: np.ndarray, layers: tuple[int, ...]) -> Iterator[Chunk]:
        for low in range(0, len(steps), 64):
            chosen = steps[low : low + 64]
            rows = [[self._tensors.get_tensor(f"{step}_{layer}") for layer in layers] for step in chosen]
            yield Chunk(chosen, np.array(rows))


def read(path: Path, options: Options) -> Reading:
    """Raises DumpError, UsageError."""
    if not path.is_dir():
        raise DumpError(f"{path}: pass the folder that contains {META} and rank*.safetensors")
    meta = read_json(path / META)
    width = plain_int(meta.get("num_experts"), 1, MAX_EXPERTS) if isinstance(meta, dict) else None
    if width is None:
        raise DumpError(f"{path / META}: it does not state num_experts")
    found = {int(m[1]): p for p in listing(path, options.only) if (m := RANK_FILE.fullmatch(p.name))}
    if not found:
        raise DumpError(f"{path}: no rank*.safetensors in it")
    files = {rank: _RankFile(p, width) for rank, p in sorted(found.items())}
    layers = tuple(sorted({n for file in files.values() for of in file.layers.values() for n in of}))
    if not layers or len(layers) > MAX_LAYERS:
        raise DumpError(f"{path}: it has counts of {len(layers)} layers")
    notes = []
    parts: dict[int, Callable[[], Iterator[Chunk]]] = {}
    for rank, file in files.items():
        whole = sorted(step for step, own in file.layers.items() if len(own) == len(layers))
        if len(whole) < len(file.layers):
            less = len(file.layers) - len(whole)
            notes.append(
                f"rank {rank}: {plural(less, 'iteration')} left out, because counts of a layer are missing"
            )
        steps = np.array(whole, np.int64)
        parts[rank] = lambda file=file, steps=steps: file.chunks(steps, layers)  # type: ignore[misc]
    return Reading(
        SYSTEM, "expert statistics", [path / META, *found.values()], None, Scope.LOCAL, parts,
        len(layers), width, layers=layers, files_of={r: [path / META, p] for r, p in found.items()},
        notes=notes,
    )  # fmt: skip
