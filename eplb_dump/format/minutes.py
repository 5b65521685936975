"""Roll-ups: sums per minute of a segment, for views of a long time that need no single step.

A row of the table ``minutes`` is for one clock minute (UTC, by the ``time`` of steps), one phase and one
placement. All sums add up, so the same minute can have a row in each of several segments. With scope
``local`` a row has the rank's own contribution, and nothing that only the sum over ranks can show: maxima and
formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from eplb_dump.format.columns import list_column, list_values, number_column, text_column, values_of
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int64, Loads, PlacementRows, Shape, StepRows, phase_codes, sums_from
from eplb_dump.format.schema import (
    MAX_NUMBER,
    MINUTES_SCHEMA,
    FormatError,
    Status,
)

Array = npt.NDArray[Any]
MINUTE_NS = 60 * 10**9
#: The slots with the most tokens of each layer that a row names.
TOP_SLOTS = 4
#: The bins of a histogram.
BINS = 200
#: The formulas whose sums over steps a row has; those with a histogram, a minimum and a maximum.
FORMULAS = "balancedness", "imbalance", "vllm", "vllm_legacy", "sglang"
SPREAD_FORMULAS = "balancedness", "imbalance"
CLOCKS = "host_ms", "step_ms", "device_ms"
_SUMMED_OVER_RANKS = frozenset(field.name for field in MINUTES_SCHEMA if field.nullable) - {"phase"}
_KEYS = "minute", "phase", "ep_size"
#: Layers are added a few at a time, with about this many sums of ranks: with fewer and longer calls, the
#: engine's thread hands over the interpreter lock less often.
_VALUES_AT_ONCE = 1 << 19
_LISTS = {field.name: field.type.value_type for field in MINUTES_SCHEMA if pa.types.is_list(field.type)}


@frozen
class Scale:
    """The bins of a histogram: bin i holds values from ``edges[i]`` to below ``edges[i + 1]``.

    Values outside are in the first or the last bin.
    """

    edges: npt.NDArray[np.float64]

    def histogram(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        """Counts of the finite values: int32 ``[BINS]``."""
        found = np.searchsorted(self.edges, values[np.isfinite(values)], side="right") - 1
        return np.bincount(found.clip(0, BINS - 1), minlength=BINS).astype(np.int32)


def _geometric(start: float, ratio: float) -> Scale:
    return Scale(start * np.power(ratio, np.arange(BINS + 1, dtype=np.float64)))


#: Balancedness in steps of 0.005. Imbalance from 1 on, each bin 3% wide; durations from 0.05 ms on, 5% wide.
SCALES = {
    "balancedness": Scale(np.linspace(0.0, 1.0, BINS + 1)),
    "imbalance": _geometric(1.0, 1.03),
    "host_ms": _geometric(0.05, 1.05),
}


@frozen
class Minutes:
    """Rows of the table ``minutes`` as arrays, by the names of its columns; lists are ``[rows, width]``.

    Times are int64 ns since 1970, ``phase`` is an index into ``phases`` (-1: unknown). If ``summed`` is not
    set, columns that need the sum over ranks are missing. Values that are null are NaN, or -1 for a step.
    """

    columns: dict[str, Array]
    phases: tuple[str, ...]
    summed: bool

    def __len__(self) -> int:
        return len(self.columns["minute"])

    def __getitem__(self, column: str) -> Array:
        return self.columns[column]

    def select(self, rows: Array) -> Minutes:
        """The rows of an index or a mask."""
        return Minutes({name: v[rows] for name, v in self.columns.items()}, self.phases, self.summed)

    @classmethod
    def concat(cls, parts: Sequence[Minutes]) -> Minutes:
        """The rows of parts of one shape and scope, at least one part."""
        phases = tuple(dict.fromkeys(name for part in parts for name in part.phases))
        index = {name: i for i, name in enumerate(phases)}
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns}
        columns["phase"] = np.concatenate(
            [np.array([*map(index.get, part.phases), -1], np.int64)[part["phase"]] for part in parts]
        )
        return cls(columns, phases, parts[0].summed)

    def to_table(self, metadata: dict[bytes, bytes] | None = None) -> pa.Table:
        schema = MINUTES_SCHEMA.with_metadata(metadata)
        return pa.Table.from_arrays([self._arrow(field) for field in schema], schema=schema)

    def _arrow(self, field: pa.Field) -> pa.Array:
        if field.name not in self.columns:
            return pa.nulls(len(self), field.type)
        values = self.columns[field.name]
        if field.name == "phase":
            return text_column(values, self.phases)
        if field.name in _LISTS:
            return list_column(values, field.type)
        unknown = None
        if field.nullable:
            unknown = np.isnan(values) if values.dtype.kind == "f" else values < 0
        return number_column(values, field.type, unknown)

    @classmethod
    def from_table(cls, table: pa.Table, shape: Shape | None) -> Minutes:
        """Rows of a segment of this shape. Raises FormatError if they cannot be.

        ``table`` may lack lists; the result lacks them, too.
        """
        names = [name for name in table.column_names if name in MINUTES_SCHEMA.names]
        # Numbers are copied: an array that is kept would keep all that was decoded with it.
        column = {
            name: table.column(name).chunk(0)
            if name in _LISTS and table.column(name).num_chunks == 1
            else table.column(name).combine_chunks()
            for name in names
        }
        summed = len(table) == 0 or column["active"].null_count < len(table)
        columns: dict[str, Array] = {}
        phases: tuple[str, ...] = ()
        for name, array in column.items():
            if name in _SUMMED_OVER_RANKS and not summed:
                continue
            if name == "phase":
                columns[name], phases = phase_codes(array.to_pylist())
            elif name in _LISTS:
                columns[name] = list_values(array, width_of(name, shape), least=-1)
            elif pa.types.is_floating(array.type):
                columns[name] = values_of(array, np.nan)
            else:
                columns[name] = _numbers(array)
        return cls(columns, phases, summed)

    def merged(self, changes: Int64) -> Minutes:
        """Rows of one minute, phase, number of EP ranks and placement added up.

        ``changes``: the steps at which a placement changed, and the cuts of :func:`keys_of`, ascending.
        """
        if len(self) < 2:
            return self
        epoch = np.searchsorted(changes, self["first_step"], side="right")
        order = np.lexsort((self["first_step"], self["phase"], self["ep_size"], epoch, self["minute"]))
        rows, epoch = self.select(order), epoch[order]
        new = np.ones(len(rows), np.bool_)
        keys = [rows["minute"], rows["phase"], rows["ep_size"], epoch]
        new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
        first = np.flatnonzero(new)
        columns = {
            name: _reduce(name, values, first)
            for name, values in rows.columns.items()
            if name not in ("slot", "slot_load") and not name.endswith(("_min_step", "_max_step"))
        }
        ends = [*first[1:], len(rows)]
        groups = [slice(low, high) for low, high in zip(first, ends, strict=True)]
        columns |= _merged_slots(rows, groups)
        for name in SPREAD_FORMULAS if self.summed else ():
            for what, pick in (("min", np.argmin), ("max", np.argmax)):
                extreme, step = rows[f"{name}_{what}"], rows[f"{name}_{what}_step"]
                worst = np.inf if what == "min" else -np.inf
                known = np.where(np.isnan(extreme), worst, extreme)
                columns[f"{name}_{what}_step"] = np.array([step[g][pick(known[g])] for g in groups])
        return Minutes(columns, self.phases, self.summed)


def width_of(column: str, shape: Shape | None) -> int:
    """How many values a list of this column has."""
    if column.endswith("histogram"):
        return BINS
    if shape is None:
        return 0
    widths = {
        "rank_load": shape.ep_size,
        "slowest": shape.ep_size,
        "slot": top_slots(shape),
        "slot_load": top_slots(shape),
    }
    return shape.num_moe_layers * widths.get(column, 1)


def top_slots(shape: Shape) -> int:
    return min(TOP_SLOTS, shape.num_physical_experts)


NO_CUTS: Int64 = np.empty(0, np.int64)


def keys_of(steps: StepRows, placement_steps: Int64, cuts: Int64 = NO_CUTS) -> Int64:
    """What a row is for, by step: minute, number of the stretch of steps, phase: ``[3, len(steps)]``.

    Args:
        placement_steps: the steps of the rows of ``placements``; a stretch ends before each.
        cuts: other steps before which one ends, so that a rank's rows match those of another rank that begins
            or ends there.
    """
    changes = np.union1d(placement_steps, cuts)
    minute = steps.time_ns // MINUTE_NS
    stretch = np.searchsorted(changes, steps.step, side="right")
    return np.stack([minute, stretch, steps.phase.astype(np.int64)])


class MinutesBuilder:
    """Makes the rows of a segment while its loads are read, layer by layer."""

    def __init__(
        self,
        steps: StepRows,
        placements: PlacementRows,
        load_steps: Int64,
        shape: Shape | None,
        *,
        summed: bool,
        token_replication: int = 1,
        cuts: Int64 = NO_CUTS,
    ) -> None:
        """``summed``: the loads are sums over all ranks. ``cuts``: as for :func:`keys_of`."""
        self._steps, self._shape, self._summed = steps, shape, summed
        self._token_replication = token_replication
        keys = keys_of(steps, placements.step, cuts)
        self._keys, group = np.unique(keys, axis=1, return_inverse=True)
        self._group = group.reshape(-1)
        recorded = np.flatnonzero(steps.status == Status.RECORDED)
        if len(recorded) != len(load_steps) or (steps.step[recorded] != load_steps).any():
            raise FormatError("its loads are not those of its recorded steps")
        self._of_load = self._group[recorded]
        self._order = np.argsort(self._of_load, kind="stable")
        self._in_order = bool((np.diff(self._of_load) >= 0).all())
        self._present, self._starts = np.unique(self._of_load[self._order], return_index=True)
        groups = self._keys.shape[1]
        layers, ranks = (0, 0) if shape is None else (shape.num_moe_layers, shape.ep_size)
        top = 0 if shape is None else top_slots(shape)
        self._columns: dict[str, Array] = {
            "active_steps": np.zeros((groups, layers), np.int32),
            "rank_load": np.zeros((groups, layers, ranks), np.int64),
            "slot": np.full((groups, layers, top), -1, np.int32),
            "slot_load": np.zeros((groups, layers, top), np.int64),
        }
        n = len(load_steps)
        if summed:
            self._columns |= {
                "max_load": np.zeros((groups, layers), np.int64),
                "layer_balancedness": np.zeros((groups, layers)),
                "layer_imbalance": np.zeros((groups, layers)),
                "slowest": np.zeros((groups, layers, ranks)),
            }
            #: Of the layers so far: active ones, and the sums of their ratio, inverse, mean, max and sglang.
            self._per_step = np.zeros((6, n))
            self._rank_total, self._rank_highest = (np.zeros((n, ranks), np.int64) for _ in range(2))

    def add(self, first: int, load: Loads, ranks: Int64) -> None:
        """Add layers ``first`` and those after it.

        Args:
            load: their ``[layers, len(load_steps), num_physical_experts]``.
            ranks: what :func:`~eplb_dump.format.journal.rank_loads` makes of it.
        """
        if not load.size:
            return
        at_once = max(1, _VALUES_AT_ONCE // ranks[0].size)
        for low in range(0, len(load), at_once):
            self._add(first + low, load[low : low + at_once], ranks[low : low + at_once])

    def _add(self, first: int, load: Loads, ranks: Int64) -> None:
        shape = self._shape
        assert shape is not None
        columns, at = self._columns, (self._present, slice(first, first + len(load)))
        highest = ranks.max(axis=2)
        active = highest > 0
        columns["active_steps"][at] = self._sums(active.astype(np.int32))
        columns["rank_load"][at] = sums_from(self._ordered(ranks), self._starts)
        slots = sums_from(self._ordered(load), self._starts)
        top = columns["slot"].shape[2]
        best = np.argsort(-slots, axis=2, kind="stable")[..., :top]
        tokens = np.take_along_axis(slots, best, axis=2)
        columns["slot"][at] = np.where(tokens > 0, best, -1)
        columns["slot_load"][at] = tokens
        if not self._summed:
            return
        total = ranks.sum(axis=2)
        # One row more than layers: the sums so far, so that the order of summation is that of the layers.
        values = np.zeros((len(self._per_step), 1 + len(load), load.shape[1]))
        values[:, 0] = self._per_step
        of_layers = values[:, 1:]
        ratio, inverse, mean = of_layers[1:4]
        np.divide(total, float(shape.ep_size), out=mean)
        np.divide(mean, highest, out=ratio, where=active)
        np.divide(highest, mean, out=inverse, where=active)
        columns["max_load"][at] = self._sums(highest)
        columns["layer_balancedness"][at] = self._sums(ratio)
        columns["layer_imbalance"][at] = self._sums(inverse)
        at_maximum = ranks == highest[..., np.newaxis]
        at_maximum &= (highest * shape.ep_size > total)[..., np.newaxis]
        tied = at_maximum.sum(axis=2, keepdims=True)
        share = at_maximum / np.maximum(tied, 1)
        columns["slowest"][at] = sums_from(self._ordered(share), self._starts, np.float64)
        times = float(self._token_replication)
        of_layers[0], of_layers[4] = active, highest
        np.divide(mean / times + 1e-5, highest / times + 1e-5, out=of_layers[5])
        self._per_step = values.sum(axis=1)
        self._rank_total += ranks.sum(axis=0)
        np.maximum(self._rank_highest, ranks.max(axis=0), out=self._rank_highest)

    def _sums(self, values: Array) -> Array:
        """Values ``[layers, len(load_steps)]`` summed by group of steps: ``[groups with any, layers]``."""
        sums: Array = np.add.reduceat(self._ordered(values), self._starts, axis=1)
        return sums.T

    def _ordered(self, values: Array) -> Array:
        return values if self._in_order else values[:, self._order]

    def finish(self) -> Minutes:
        steps, groups = self._steps, self._keys.shape[1]
        columns: dict[str, Array] = {
            "minute": self._keys[0] * MINUTE_NS,
            "phase": self._keys[2],
            "ep_size": np.full(groups, 0 if self._shape is None else self._shape.ep_size, np.int64),
        }
        for name, values in (("step", steps.step), ("time_ns", steps.time_ns)):
            columns[f"first_{name}"] = self._extreme(np.minimum, values, MAX_NUMBER)
            columns[f"last_{name}"] = self._extreme(np.maximum, values, 0)
        for status in Status:
            columns[status.label] = self._counts(steps.status == status)
        known = steps.num_tokens >= 0
        columns["num_tokens"] = self._totals(np.where(known, steps.num_tokens, 0))
        columns["num_tokens_steps"] = self._counts(known)
        host_ms = np.full(len(steps.step), np.nan)
        follows = np.diff(steps.step) == 1
        host_ms[1:][follows] = np.diff(steps.monotonic_ns)[follows] / 1e6
        for name, values in zip(CLOCKS, (host_ms, steps.step_ms, steps.device_ms), strict=True):
            measured = np.isfinite(values)
            columns[f"{name}_sum"] = self._totals(np.where(measured, values, 0).astype(np.float64))
            columns[f"{name}_steps"] = self._counts(measured)
        columns["host_ms_histogram"] = self._histograms("host_ms", host_ms, self._group)
        columns |= {name: values.reshape(groups, -1) for name, values in self._columns.items()}
        if self._summed:
            columns |= self._formulas()
        # A view of the layer's columns in the order of the schema.
        ordered = {name: columns[name] for name in MINUTES_SCHEMA.names if name in columns}
        return Minutes(ordered, steps.phases, self._summed)

    def _formulas(self) -> dict[str, Array]:
        """The formulas' sums, extremes and histograms over the recorded steps."""
        layers = 0 if self._shape is None else self._shape.num_moe_layers
        active, ratio, inverse, mean, highest, sglang = self._per_step
        counted, groups = active > 0, self._keys.shape[1]
        denominators = {
            "balancedness": (ratio, active),
            "imbalance": (inverse, active),
            "vllm": (mean, highest),
            "vllm_legacy": (
                self._rank_total.sum(axis=1).astype(np.float64) / max(layers, 1),
                self._rank_highest.sum(axis=1).astype(np.float64),
            ),
            "sglang": (sglang, np.full(len(sglang), float(layers))),
        }
        columns: dict[str, Array] = {"active": np.bincount(self._of_load[counted], minlength=groups)}
        for name, (numerator, denominator) in denominators.items():
            value = np.full(len(counted), np.nan)
            np.divide(numerator, denominator, out=value, where=counted)
            columns[name] = np.bincount(self._of_load[counted], value[counted], minlength=groups) + np.where(
                columns["active"] > 0, 0.0, np.nan
            )
            if name in SPREAD_FORMULAS:
                columns |= self._spread(name, value, counted)
        return columns

    def _spread(self, name: str, value: npt.NDArray[np.float64], counted: Array) -> dict[str, Array]:
        groups = self._keys.shape[1]
        recorded = self._steps.step[self._steps.status == Status.RECORDED]
        columns: dict[str, Array] = {}
        for what, sign in (("min", 1.0), ("max", -1.0)):
            # Of equal values, the first step's.
            order = np.lexsort((recorded[counted], sign * value[counted], self._of_load[counted]))
            present, first = np.unique(self._of_load[counted][order], return_index=True)
            extreme, step = np.full(groups, np.nan), np.full(groups, -1, np.int64)
            extreme[present] = value[counted][order][first]
            step[present] = recorded[counted][order][first]
            columns |= {f"{name}_{what}": extreme, f"{name}_{what}_step": step}
        columns[f"{name}_histogram"] = self._histograms(name, value, self._of_load)
        return columns

    def _counts(self, mask: Array) -> Int64:
        return np.bincount(self._group[mask], minlength=self._keys.shape[1])

    def _totals(self, values: Array) -> Array:
        out = np.zeros(self._keys.shape[1], values.dtype)
        np.add.at(out, self._group, values)
        return out

    def _extreme(self, ufunc: np.ufunc, values: Int64, start: int) -> Int64:
        out = np.full(self._keys.shape[1], start, np.int64)
        ufunc.at(out, self._group, values)
        return out

    def _histograms(self, name: str, values: npt.NDArray[np.float64], group: Array) -> npt.NDArray[np.int32]:
        scale = SCALES[name]
        return np.array(
            [scale.histogram(values[group == g]) for g in range(self._keys.shape[1])], np.int32
        ).reshape(-1, BINS)


def _reduce(name: str, values: Array, first: Array) -> Array:
    """Rows of sorted groups that begin at ``first``, as one row each."""
    if name in _KEYS:
        return values[first]
    if name.startswith("first_") or name.endswith("_min"):
        return np.fmin.reduceat(values, first)
    if name.startswith("last_") or name.endswith("_max"):
        return np.fmax.reduceat(values, first)
    if name in FORMULAS:  # NaN if no step was active
        sums = np.add.reduceat(np.nan_to_num(values), first)
        return np.where(np.logical_and.reduceat(np.isnan(values), first), np.nan, sums)
    return np.add.reduceat(values, first, axis=0)


def _merged_slots(rows: Minutes, groups: Iterable[slice]) -> dict[str, Array]:
    """The slots with the most tokens of each group of rows, by the sums of those that its rows name."""
    layers = rows["active_steps"].shape[1]
    slot = rows["slot"].reshape(len(rows), layers, -1)
    tokens = rows["slot_load"].reshape(slot.shape)
    top = slot.shape[2]
    slots, loads = [], []
    width = int(slot.max(initial=-1)) + 1
    for group in groups:
        if group.stop - group.start == 1 or not width:
            slots.append(slot[group.start])
            loads.append(tokens[group.start])
            continue
        layer = np.broadcast_to(np.arange(layers)[:, np.newaxis], slot[group].shape)
        named = slot[group] >= 0
        total = np.zeros((layers, width), np.int64)
        np.add.at(total, (layer[named], slot[group][named]), tokens[group][named])
        best = np.argsort(-total, axis=1, kind="stable")[:, :top]
        best = np.pad(best, ((0, 0), (0, top - best.shape[1])))
        most = np.take_along_axis(total, best, axis=1)
        most[:, width:] = 0
        slots.append(np.where(most > 0, best, -1).astype(np.int32))
        loads.append(most)
    return {
        "slot": np.array(slots, np.int32).reshape(len(slots), -1),
        "slot_load": np.array(loads, np.int64).reshape(len(loads), -1),
    }


def _numbers(array: pa.Array) -> Int64:
    """Integers that are at least -1, which null is, and in the format's range. Raises FormatError."""
    values = values_of(array).astype(np.int64, copy=False)
    if not -1 <= values.min(initial=0) <= values.max(initial=0) < MAX_NUMBER:
        raise FormatError("it holds a number that is out of range")
    return values
