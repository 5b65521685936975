"""Makes the polars frames that :class:`~eplb_analyze.reader.run.Run` returns from its blocks.

``layers`` are indices from 0, ``numbers`` the model's numbers of all recorded layers, and
``token_replication`` is divided out of counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from eplb_analyze.metrics import formulas
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.join import StepState
from eplb_analyze.reader.lost import serving
from eplb_analyze.reader.placements import PlacementHistory
from eplb_analyze.sessions.step_range import NO_END
from eplb_dump.format.schema import STATUS_LABELS

_STEPS_SCHEMA: dict[str, Any] = {
    "step": pl.Int64,
    "state": pl.String,
    "ranks_recorded": pl.Int32,
    "time": pl.Datetime("ns", "UTC"),
    "num_tokens": pl.Int64,
    "phase": pl.String,
    "step_ms": pl.Float64,
    "device_ms": pl.Float64,
}
_SPREAD_SCHEMA: dict[str, Any] = {
    "value": pl.Float64,
    "p5": pl.Float64,
    "p50": pl.Float64,
    "p95": pl.Float64,
    "min": pl.Float64,
    "min_step": pl.Int64,
    "max": pl.Float64,
    "max_step": pl.Int64,
    "steps": pl.Int64,
}


def steps(blocks: Iterable[Block], token_replication: int) -> pl.DataFrame:
    parts = [_steps(block, token_replication) for block in blocks]
    return pl.concat(parts) if parts else pl.DataFrame(schema=_STEPS_SCHEMA)


def _steps(block: Block, token_replication: int) -> pl.DataFrame:
    labels = np.array([*STATUS_LABELS, StepState.INCOMPLETE.label], object)
    phases = np.array([*block.phases, None], object)
    return pl.DataFrame(
        {
            "step": block.step,
            "state": labels[block.state].tolist(),
            "ranks_recorded": (block.status == StepState.RECORDED).sum(axis=0).astype(np.int32),
            "time": pl.Series(block.time_ns).cast(pl.Datetime("ns", "UTC")),
            "num_tokens": block.num_tokens // token_replication,  # -1 stays
            "phase": phases[block.phase].tolist(),
            "step_ms": pl.Series(block.step_ms, nan_to_null=True),
            "device_ms": pl.Series(block.device_ms, nan_to_null=True),
        },
        schema=_STEPS_SCHEMA,
    ).with_columns(pl.col("num_tokens").replace(-1, None))


def loads(
    blocks: Iterable[Block],
    layers: Sequence[int],
    numbers: Sequence[int],
    token_replication: int,
    *,
    experts: bool,
) -> pl.DataFrame:
    value = pl.Float64 if token_replication > 1 else pl.Int64
    schema: dict[str, Any] = {"step": pl.Int64, "layer": pl.Int32, "ep_size": pl.Int32}
    schema["rank_load"] = pl.List(value)
    if experts:
        schema["load"] = pl.List(value)
    chosen = np.array(numbers, np.int32)[layers]

    def lists(values: npt.NDArray[np.int64]) -> pl.Series:
        rows = values.reshape(-1, values.shape[-1])
        scaled: npt.NDArray[Any] = rows if token_replication == 1 else rows / float(token_replication)
        return pl.Series(scaled).arr.to_list()

    parts = []
    for block in _complete(blocks):
        assert block.shape is not None
        number = block.recorded
        columns: dict[str, Any] = {
            "step": np.repeat(number, len(layers)),
            "layer": np.tile(chosen, len(number)),
            "ep_size": np.full(len(number) * len(layers), block.shape.ep_size, np.int32),
            "rank_load": lists(block.rank_load()[:, layers]),
        }
        if experts:
            each = [block.loads(layer, layer + 1) for layer in layers]
            columns["load"] = lists(np.concatenate(each, axis=1))
        parts.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema)


def placement(history_of_run: PlacementHistory, numbers: Sequence[int], step: int | None) -> pl.DataFrame:
    at = NO_END if step is None else step
    parts = []
    for index, number in enumerate(numbers):
        history = history_of_run.layer(index)
        i = history.index_at(at)
        if i >= 0:
            slots = history.slots[i]
            per_rank = len(slots) // history.ep_sizes[i]
            parts.append(
                pl.DataFrame(
                    {
                        "layer": np.full(len(slots), number, np.int32),
                        "physical": np.arange(len(slots), dtype=np.int32),
                        "rank": np.arange(len(slots), dtype=np.int32) // np.int32(per_rank),
                        "logical": slots.astype(np.int32),
                    }
                )
            )
    schema = dict.fromkeys(("layer", "physical", "rank", "logical"), pl.Int32)
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema)


def placements(history_of_run: PlacementHistory, numbers: Sequence[int]) -> pl.DataFrame:
    rows = [
        (step, number, ep_size, slots.tolist())
        for index, number in enumerate(numbers)
        for history in [history_of_run.layer(index)]
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True)
    ]
    schema: dict[str, Any] = {
        "step": pl.Int64,
        "layer": pl.Int32,
        "ep_size": pl.Int32,
        "physical_to_logical": pl.List(pl.Int32),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").sort("step", "layer")


def balancedness(
    blocks: Iterable[Block],
    numbers: Sequence[int],
    token_replication: int,
    formula: formulas.Formula,
    by: str,
) -> pl.DataFrame:
    if by == "layer":
        return _by_layer(blocks, numbers, token_replication, formula)
    known, values = [np.empty(0, np.int64)], [np.empty(0)]
    for block in _complete(blocks):
        known.append(block.recorded)
        values.append(formula.of(block.terms(token_replication)))
    step, value = np.concatenate(known), np.concatenate(values)
    if by == "step":
        return pl.DataFrame({"step": step, "value": pl.Series(value, nan_to_null=True)})
    spread = formulas.Spread.of(value, step)
    names = {"mean": "value"}
    row = {names.get(name, name): figure for name, figure in vars(spread).items()}
    return pl.DataFrame([{**row, "steps": int((~np.isnan(value)).sum())}], schema=_SPREAD_SCHEMA)


def _by_layer(
    blocks: Iterable[Block], numbers: Sequence[int], token_replication: int, formula: formulas.Formula
) -> pl.DataFrame:
    total, count = np.zeros(len(numbers)), np.zeros(len(numbers))
    for block in _complete(blocks):
        for first, load in block.rank_load_parts():
            assert block.shape is not None
            values = formulas.per_layer(formula, load / float(token_replication), serving(block.shape))
            here = slice(first, first + values.shape[1])
            total[here] += np.nansum(values, axis=0)
            count[here] += (~np.isnan(values)).sum(axis=0)
    mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    layers = np.array(numbers, np.int32)
    return pl.DataFrame({"layer": layers, "value": pl.Series(mean, nan_to_null=True)})


def _complete(blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks that have complete steps."""
    return (block for block in blocks if block.shape is not None and len(block.recorded))
