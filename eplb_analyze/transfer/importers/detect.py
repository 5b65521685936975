"""Detect by its content which system wrote a source; ambiguous sources raise UsageError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.transfer.importers import (
    arrays,
    megatron,
    placement_files,
    sglang,
    table,
    topk,
    topk_arrays,
    topk_parquet,
    torch_files,
    trtllm,
    vllm,
)
from eplb_analyze.transfer.importers.files import (
    MAX_TEXT,
    listing,
    npz_shapes,
    parse_json,
    read_json,
    read_npy,
    regular,
    zip_names,
)
from eplb_analyze.transfer.importers.source import Options, Reading

READERS: dict[str, Callable[[Path, Options], Reading]] = {
    "sglang": sglang.read,
    "trtllm": trtllm.read,
    "vllm": vllm.read,
    "megatron": megatron.read,
    "ascend": arrays.read_ascend,
    "array": arrays.read,
    "table": arrays.read,
    "topk": topk.read,
}


def detect(path: Path, options: Options) -> str:
    """The name of the source's reader. Raises DumpError if none fits, UsageError if several do."""
    if path.is_dir():
        names = [p.name for p in listing(path, None)]
        if trtllm.META in names and any(map(trtllm.RANK_FILE.fullmatch, names)):
            return "trtllm"
        found = {
            _of_file(p)
            for p in listing(path, options.only)
            if p.suffix in (".pt", ".npz", ".npy", ".jsonl", ".csv", ".parquet")
        }
        if not found:
            found = {_of_file(p) for p in listing(path, options.only) if p.suffix == ".json"}
        if len(found) > 1:
            found.discard("array")  # other files beside a recorder's
        if len(found) == 1:
            return found.pop()
        if found:
            raise UsageError(
                f"{path}: files of several formats ({', '.join(sorted(found))}); choose with --only"
            )
        raise DumpError(f"{path}: it contains no file in a supported format")
    return _of_file(path)


def _of_file(path: Path) -> str:
    regular(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if start[:6] == b"\x93NUMPY":
        return _by_dimensions(path, read_npy(path).ndim)
    if start[:4] == b"PK\x03\x04":
        if any(name.endswith("data.pkl") for name in zip_names(path)):
            return _of_torch(path)
        if "dump_version" in npz_shapes(path):
            return "megatron"
        return "topk" if topk_arrays.is_npz_of_ids(path) else "array"
    if start[:4] == b"PAR1" and topk_parquet.is_parquet_of_ids(path):
        return "topk"
    if table.is_table(path):
        return "table"
    if start.lstrip()[:1] == b"{":
        return _of_json(path)
    if start and all(48 <= byte < 58 or byte in b",;. \t\r\n" for byte in start):
        return "array"
    if start.lstrip()[:1] == b"[":
        raise UsageError(
            f"{path}: the list can be counts [layers, experts] or a placement; for counts, pass --format "
            f"array; a placement belongs to --placement, together with a source of loads"
        )
    if path.suffix == ".safetensors":
        return "trtllm"  # which asks for the folder
    if path.suffix in (".yaml", ".yml"):
        raise _placement_error(path)
    raise DumpError(f"{path}: its format is not supported ({', '.join(READERS)})")


def _by_dimensions(path: Path, dimensions: int) -> str:
    if dimensions == 3:
        raise UsageError(
            f"{path}: three dimensions can be [steps, layers, experts], vllm-ascend's [layers, ranks, "
            f"slots], or the expert ids [tokens, layers, top-k]; pass --format array, --format ascend or "
            f"--format topk"
        )
    return "topk" if dimensions == 4 else "array"


def _of_torch(path: Path) -> str:
    document = torch_files.load(path)
    if torch_files.is_tensor(document):
        return _by_dimensions(path, document.ndim)
    if placement_files.is_placement(document):
        raise _placement_error(path)
    if isinstance(document, dict) and {"records", "logical_count"} & set(document):
        return "sglang"
    raise DumpError(f"{path}: the .pt file is neither from SGLang's recorder nor a single tensor")


def _of_json(path: Path) -> str:
    if arrays.is_history(path):
        return "array"
    with path.open("rb") as file:
        line = file.readline(MAX_TEXT + 1)
    try:
        document = parse_json(line, str(path))
    except DumpError:
        document = read_json(path)  # one document, not JSON lines
    if not isinstance(document, dict):
        raise DumpError(f"{path}: the JSON document is not in a supported format")
    if vllm.is_stats(document) or vllm.is_snapshot(document):
        return "vllm"
    if "logical_count" in document:
        return "sglang"
    if placement_files.is_placement(document):
        raise _placement_error(path)
    raise DumpError(f"{path}: the JSON document is not in a supported format")


def _placement_error(path: Path) -> DumpError:
    return DumpError(
        f"{path}: the file is a placement and contains no loads; pass it as --placement, together with a "
        f"source of loads"
    )
