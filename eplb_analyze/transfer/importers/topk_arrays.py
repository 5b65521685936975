"""Expert ids per token as arrays: .npy and .pt files, which are mapped, and .npz files, read as a stream."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.files import Array, npz_shapes, stream_npz
from eplb_analyze.transfer.importers.topk_blocks import (
    IDS,
    Block,
    Numbers,
    TokenFile,
    checked,
    choose,
    columns_beside,
    rows_of_block,
    steps_of,
)

#: Parts of an array, in order.
_Parts = Callable[[], Iterator[Array]]


def is_npz_of_ids(path: Path) -> bool:
    """Whether a .npz file has an array with a name of expert ids, and none of counts."""
    names = {name.lower() for name in npz_shapes(path)}
    return bool(names & set(IDS)) and "load" not in names


def open_array(path: Path, array: Array) -> TokenFile:
    """A single array, which is mapped."""
    layers, top_k = checked(path, array.shape, array.dtype)
    if array.ndim == 4 and not array.flags.c_contiguous:
        raise DumpError(f"{path}: it is in Fortran order; save np.ascontiguousarray(array)")
    tokens = array.reshape(-1, layers, top_k) if array.ndim == 4 else array
    rows = rows_of_block(layers, top_k)

    def parts() -> Iterator[Array]:
        return (np.asarray(tokens[low : low + rows]) for low in range(0, len(tokens), rows))

    return _of_parts(path, array.shape, parts)


def _of_parts(
    path: Path,
    shape: tuple[int, ...],
    parts: _Parts,
    step: _Parts | None = None,
    request: _Parts | None = None,
    left_out: list[str] | None = None,
) -> TokenFile:
    """An array of ids in parts of whole tokens, with the columns beside it in equal parts.

    Of four axes, the first are steps if there is a column of steps, else requests.
    """
    layers = tuple(range(1 if len(shape) == 2 else shape[-2]))
    kind = {2: "[tokens, top-k]", 3: "[tokens, layers, top-k]"}.get(len(shape))
    if kind is None:
        kind = f"[{'requests' if step is None else 'steps'}, tokens, layers, top-k]"
        if step is None and request is None:
            request = lambda: iter([np.arange(shape[0])])  # noqa: E731
        step, request = (None if c is None else _per_token(c, shape) for c in (step, request))

    # A column that the file lacks is None in each part.
    tokens = math.prod(shape) // (len(layers) * shape[-1])
    nothing = functools.partial(itertools.repeat, None, -(-tokens // rows_of_block(len(layers), shape[-1])))

    def blocks() -> Iterator[Block]:
        numbers = Numbers()
        for ids, steps, requests in zip(parts(), (step or nothing)(), (request or nothing)(), strict=True):
            yield Block(
                ids.reshape(len(ids), len(layers), shape[-1]),
                layers,
                None if steps is None else steps_of(path, steps),
                None if requests is None else numbers.of(requests),
            )

    return TokenFile(path, kind, blocks, step is not None, request is not None, left_out=left_out or [])


def _per_token(column: _Parts, shape: tuple[int, ...]) -> _Parts:
    """A column of the first of four axes, repeated for each token in parts like those of the ids."""
    rows, count = rows_of_block(*shape[2:]), shape[0] * shape[1]

    def parts() -> Iterator[Array]:
        whole = np.concatenate(list(column()))
        for low in range(0, count, rows):
            yield whole[np.arange(low, min(low + rows, count)) // shape[1]]

    return parts


def open_npz(path: Path, wanted: str | None) -> TokenFile:
    shapes = npz_shapes(path)
    columns = columns_beside(shapes, "step", "request")
    beside = columns.values()
    possible = [n for n, (s, t) in shapes.items() if n not in beside and t.kind in "iu" and len(s) > 1]
    names = choose(path, possible, wanted, list(shapes), [shape[1:] for shape, _ in shapes.values()])
    if len(names) > 1:
        return _requests(path, names, shapes)
    (ids,) = names
    shape, dtype = shapes[ids]
    rows = rows_of_block(*checked(path, shape, dtype))
    for name in beside:
        if shapes[name][0] != shape[:1]:
            raise DumpError(f"{path}: its {name} has the shape {shapes[name][0]}, the ids need {shape[:1]}")
    step, request = (
        functools.partial(stream_npz, path, columns[role], rows) if role in columns else None
        for role in ("step", "request")
    )
    return _of_parts(
        path, shape, lambda: stream_npz(path, ids, rows, 1 if len(shape) == 2 else 2), step, request,
        [name for name in shapes if name not in beside and name != ids],
    )  # fmt: skip


def _requests(
    path: Path, names: list[str], shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
) -> TokenFile:
    """An array ``[tokens, layers, top-k]`` for each request."""
    for name in names:
        layers, top_k = checked(path, *shapes[name])
    rows = rows_of_block(layers, top_k)

    def blocks() -> Iterator[Block]:
        for number, name in enumerate(names):
            for part in stream_npz(path, name, rows, len(shapes[name][0]) - 1):
                ids = part.reshape(len(part), layers, top_k)
                yield Block(ids, tuple(range(layers)), request=np.full(len(ids), number, np.int64))

    return TokenFile(path, "an array per request", blocks, has_requests=True)
