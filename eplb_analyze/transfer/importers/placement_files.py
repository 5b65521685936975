"""Placement files, which engines load at their start.

SGLang's ``physical_to_logical_map`` (.json, .pt), TensorRT-LLM's YAML, vLLM's initial mappings and offline
maps, vllm-ascend's expert map, and a plain ``[layers, slots]`` (.npy, .json).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.transfer.importers import torch_files
from eplb_analyze.transfer.importers.files import (
    MAX_TEXT,
    integers,
    json_lines,
    read_json,
    read_npy,
    regular,
)
from eplb_analyze.transfer.importers.source import plain_int
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32
from eplb_dump.format.schema import EMPTY_SLOT, MAX_EXPERTS, MAX_LAYERS

MAP = "physical_to_logical_map"
#: The deepest nesting in YAML; a TensorRT-LLM configuration has 2 levels.
MAX_DEPTH = 32


@frozen
class PlacementFile:
    """``slots``: int32 ``[layers, num_physical_experts]``; ``numbers``: of the layers, if known."""

    slots: Int32
    numbers: tuple[int, ...] | None = None
    #: The file does not name its layers, so that its only row can hold for all layers of a model.
    of_any_layer: bool = False


def read_placement(path: Path, model: str | None) -> PlacementFile:
    """Read a placement file; ``model`` selects one of several. Raises DumpError, UsageError."""
    if path.suffix in (".yaml", ".yml"):
        return _trtllm(path)
    if path.suffix == ".npy":
        return _unnumbered(path, read_npy(path))
    if path.suffix == ".pt":
        document = torch_files.load(path)
        if not isinstance(document, dict) or set(document) != {MAP}:
            raise DumpError(f"{path}: SGLang's placement files hold {MAP} and nothing else")
        return _unnumbered(path, torch_files.Arrays(path).of(document[MAP], (1, 2), MAP))
    if path.suffix == ".jsonl":
        _, document = next(json_lines(path), ("", None))
    else:
        document = read_json(path)
    return _json(path, document, model)


def is_placement(document: object) -> bool:
    """Whether a JSON document or the content of a .pt file is a placement, not loads."""
    keys = set(document) if isinstance(document, dict) else set()
    return bool(keys & {MAP, "model_maps", "initial_global_assignments", "layer_list"}) and not (
        keys & {"records", "logical_count", "latest_expert_load", "window_expert_load"}
    )


def _json(path: Path, document: Any, model: str | None) -> PlacementFile:
    if isinstance(document, list):
        return _unnumbered(path, document)
    if not isinstance(document, dict):
        raise DumpError(f"{path}: it is not a supported placement file")
    if "initial_global_assignments" in document:  # vLLM PR 41141; layers are counted from 0
        rows = _by_number(path, document["initial_global_assignments"])
        if list(rows) != list(range(len(rows))):
            raise DumpError(f"{path}: its layers are not numbered from 0")
        return _checked(path, list(rows.values()))
    if "layer_list" in document:
        return _checked(path, _ascend(path, document["layer_list"]))
    if isinstance(document.get("model_maps"), dict):
        maps = document["model_maps"]
        if model not in maps and len(maps) != 1:
            raise UsageError(
                f"{path}: it has placements of several models; choose with --model: {', '.join(maps)}"
            )
        chosen = maps[model] if model in maps else next(iter(maps.values()))
        return _json(path, chosen, model)
    if isinstance(document.get("layers"), list) and MAP in document:  # from `export --for json`
        found = _checked(path, document[MAP])
        numbers = tuple(plain_int(n, 0, MAX_LAYERS) for n in document["layers"])
        if len(numbers) != len(found.slots) or None in numbers:
            raise DumpError(f"{path}: its layers do not match its {MAP}")
        return PlacementFile(found.slots, tuple(n for n in numbers if n is not None))
    more = set(document) - {MAP, "version", "format"}
    if MAP not in document or more:
        also = f", and does not know {', '.join(sorted(map(str, more)))[:80]!r}" if more else ""
        raise DumpError(f"{path}: a placement file has {MAP!r}{also}")
    return _unnumbered(path, document[MAP])


def _ascend(path: Path, layers: Any) -> list[list[int]]:
    try:
        by_layer = {
            layer["layer_id"]: {d["device_id"]: d["device_expert"] for d in layer["device_list"]}
            for layer in layers
        }
        if list(by_layer) != list(range(len(layers))):
            raise ValueError
        rows = []
        for devices in by_layer.values():
            if list(devices) != list(range(len(devices))) or len({len(e) for e in devices.values()}) != 1:
                raise ValueError
            rows.append([expert for experts in devices.values() for expert in experts])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DumpError(
            f"{path}: its layer_list lacks layers, devices or experts, or is out of order"
        ) from None
    return rows


def _by_number(path: Path, assignments: Any) -> dict[int, Any]:
    """``{layer number: slots}``, ascending; the keys can be ints or strings."""
    if not isinstance(assignments, dict) or not 0 < len(assignments) <= MAX_LAYERS:
        raise DumpError(f"{path}: its initial_global_assignments are not layers")
    rows = {}
    for key, value in assignments.items():
        text = str(key)
        if not (text.isascii() and text.isdigit() and len(text) < 8):
            raise DumpError(f"{path}: {text[:20]!r} is not a layer number")
        rows[int(text)] = value
    return dict(sorted(rows.items()))


def _trtllm(path: Path) -> PlacementFile:
    try:
        import yaml
    except ImportError:
        raise DumpError(
            f"{path}: reading YAML needs PyYAML: pip install 'eplb-dump[analyze,import]'"
        ) from None
    if regular(path) > MAX_TEXT:
        raise DumpError(f"{path}: it is larger than {MAX_TEXT >> 20} MiB")
    # Both loaders build plain values only; the first is in C and not always there. Without merge keys (<<),
    # which copy, an alias is only another name of a value, so a small file cannot grow.
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    loader = type("PlainLoader", (base,), {"flatten_mapping": lambda self, node: None})
    text, depth = path.read_bytes(), 0
    try:
        for event in yaml.parse(text, loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # building it would crash the process
                raise DumpError(f"{path}: nested too deeply")
        document = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DumpError(f"{path}: it is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise DumpError(f"{path}: it is not a configuration of TensorRT-LLM's load balancer")
    assignments, updates = document.get("initial_global_assignments"), document.get("layer_updates_per_iter")
    if not assignments:
        raise DumpError(
            f"{path}: it has no initial_global_assignments, so it does not state which expert is in which "
            f"slot; --placement unknown imports loads by slot"
        )
    if updates != 0:
        raise DumpError(
            f"{path}: layer_updates_per_iter is {_shown(updates)}, so the balancer moves experts while "
            f"serving, and the file does not state later placements; --placement unknown imports loads by "
            f"slot"
        )
    rows = _by_number(path, assignments)
    found = _checked(path, list(rows.values()))
    slots = document.get("num_slots")
    if plain_int(slots, 1, MAX_EXPERTS) != found.slots.shape[1]:
        raise DumpError(f"{path}: num_slots is {_shown(slots)}, but a layer has {found.slots.shape[1]}")
    return PlacementFile(found.slots, tuple(rows))


def _shown(value: object) -> str:
    """An untrusted value for a message: nested lists can be of any length."""
    return repr(value)[:40] if value is None or isinstance(value, int | float | str) else "no number"


def _unnumbered(path: Path, rows: Any) -> PlacementFile:
    """Rows without layer numbers, or one row ``[slots]`` for all layers."""
    if isinstance(rows, list):
        rows = [rows] if all(type(n) is int for n in rows[: MAX_EXPERTS + 1]) else rows
    elif rows.ndim == 1:
        rows = rows[None]
    return replace(_checked(path, rows), of_any_layer=True)


def _checked(path: Path, rows: Any) -> PlacementFile:
    if isinstance(rows, list):
        # Only nested lists let YAML aliases make a large array out of a few bytes.
        widths = {len(row) if isinstance(row, list) else -1 for row in rows}
        numbers = all(type(n) is int for row in rows if isinstance(row, list) for n in row[: MAX_EXPERTS + 1])
        if len(widths) != 1 or min(widths) < 1 or max(widths) > MAX_EXPERTS or not numbers:
            raise DumpError(f"{path}: its layers are not lists of experts with equal lengths")
        rows = integers(rows, 2, str(path))
    if (
        rows.ndim != 2
        or rows.dtype.kind not in "iu"
        or rows.shape[0] > MAX_LAYERS
        or rows.shape[1] > MAX_EXPERTS
    ):
        raise DumpError(f"{path}: it has the shape {rows.shape}, not [layers, slots]")
    if rows.min() < EMPTY_SLOT or rows.max() >= MAX_EXPERTS:
        raise DumpError(f"{path}: it contains invalid expert numbers")
    return PlacementFile(rows.astype(np.int32))
