"""The polars frames that a :class:`~eplb_analyze.run.Run` returns, made of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from eplb_analyze import metrics
from eplb_analyze.blocks import Block, StepState
from eplb_dump.format import STATUS_LABELS

if TYPE_CHECKING:
    from eplb_analyze.run import Run, Steps

_STEPS_SCHEMA: dict[str, Any] = {
    "step": pl.Int64,
    "state": pl.String,
    "ranks_recorded": pl.Int32,
    "time": pl.Datetime("ns", "UTC"),
    "num_tokens": pl.Int64,
    "phase": pl.String,
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


def steps(run: Run, chosen: Steps | None) -> pl.DataFrame:
    parts = [_steps(block) for block in run.blocks(chosen)]
    return pl.concat(parts) if parts else pl.DataFrame(schema=_STEPS_SCHEMA)


def _steps(block: Block) -> pl.DataFrame:
    labels = np.array([*STATUS_LABELS, StepState.INCOMPLETE.label], object)
    phases = np.array([*block.phases, None], object)
    return pl.DataFrame(
        {
            "step": block.step,
            "state": labels[block.state].tolist(),
            "ranks_recorded": (block.status == StepState.RECORDED).sum(axis=0).astype(np.int32),
            "time": pl.Series(block.time_ns).cast(pl.Datetime("ns", "UTC")),
            "num_tokens": np.where(block.num_tokens >= 0, block.num_tokens, -1),
            "phase": phases[block.phase].tolist(),
        },
        schema=_STEPS_SCHEMA,
    ).with_columns(pl.col("num_tokens").replace(-1, None))


def loads(run: Run, layers: list[int], chosen: Steps | None, experts: bool) -> pl.DataFrame:
    """``layers``: indices, from 0."""
    value = pl.Float64 if run.info.token_replication > 1 else pl.Int64
    schema: dict[str, Any] = {"step": pl.Int64, "layer": pl.Int32, "ep_size": pl.Int32}
    schema["rank_load"] = pl.List(value)
    if experts:
        schema["load"] = pl.List(value)
    numbers = np.array(run.info.layers, np.int32)[layers]

    def lists(values: npt.NDArray[np.int64]) -> pl.Series:
        rows = values.reshape(-1, values.shape[-1])
        scaled: npt.NDArray[Any] = rows if run.info.token_replication == 1 else run.tokens(rows)
        return pl.Series(scaled).arr.to_list()

    parts = []
    for block in run.blocks(chosen):
        number = block.recorded
        if block.shape is None or not len(number):
            continue
        columns: dict[str, Any] = {
            "step": np.repeat(number, len(layers)),
            "layer": np.tile(numbers, len(number)),
            "ep_size": np.full(len(number) * len(layers), block.shape.ep_size, np.int32),
            "rank_load": lists(block.rank_load()[:, layers]),
        }
        if experts:
            each = [block.loads(layer, layer + 1) for layer in layers]
            columns["load"] = lists(np.concatenate(each, axis=1))
        parts.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(parts) if parts else pl.DataFrame(schema=schema)


def placement(run: Run, step: int | None) -> pl.DataFrame:
    at = 2**62 if step is None else step
    parts = []
    for index, number in enumerate(run.info.layers):
        history = run.history.layer(index)
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


def placements(run: Run) -> pl.DataFrame:
    rows = [
        (step, number, ep_size, slots.tolist())
        for index, number in enumerate(run.info.layers)
        for history in [run.history.layer(index)]
        for step, ep_size, slots in zip(history.steps, history.ep_sizes, history.slots, strict=True)
    ]
    schema: dict[str, Any] = {
        "step": pl.Int64,
        "layer": pl.Int32,
        "ep_size": pl.Int32,
        "physical_to_logical": pl.List(pl.Int32),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").sort("step", "layer")


def balancedness(run: Run, formula: metrics.Formula, by: str, chosen: Steps | None) -> pl.DataFrame:
    if by == "layer":
        return _by_layer(run, formula, chosen)
    numbers, values = [np.empty(0, np.int64)], [np.empty(0)]
    for block in _complete(run, chosen):
        numbers.append(block.recorded)
        values.append(formula.of(run.terms(block)))
    step, value = np.concatenate(numbers), np.concatenate(values)
    if by == "step":
        return pl.DataFrame({"step": step, "value": pl.Series(value, nan_to_null=True)})
    spread = metrics.Spread.of(value, step)
    names = {"mean": "value"}
    row = {names.get(name, name): figure for name, figure in vars(spread).items()}
    return pl.DataFrame([{**row, "steps": int((~np.isnan(value)).sum())}], schema=_SPREAD_SCHEMA)


def _by_layer(run: Run, formula: metrics.Formula, chosen: Steps | None) -> pl.DataFrame:
    total, count = np.zeros(run.info.num_layers), np.zeros(run.info.num_layers)
    for block in _complete(run, chosen):
        for first, load in block.rank_load_parts():
            values = metrics.per_layer(formula, run.tokens(load))
            here = slice(first, first + values.shape[1])
            total[here] += np.nansum(values, axis=0)
            count[here] += (~np.isnan(values)).sum(axis=0)
    mean = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    layers = np.array(run.info.layers, np.int32)
    return pl.DataFrame({"layer": layers, "value": pl.Series(mean, nan_to_null=True)})


def _complete(run: Run, chosen: Steps | None) -> Iterator[Block]:
    """The blocks that have complete steps."""
    return (block for block in run.blocks(chosen) if block.shape is not None and len(block.recorded))
