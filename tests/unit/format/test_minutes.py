"""The roll-ups of a segment, against plain loops over its steps."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import per_step

from eplb_dump.format.journal import Int64, PlacementRows, Shape, StepRows, rank_loads
from eplb_dump.format.minutes import BINS, FORMULAS, MINUTE_NS, SCALES, Minutes, MinutesBuilder
from eplb_dump.format.schema import MINUTES_SCHEMA, FormatError, Status

L, R, SLOTS = 3, 2, 4
SHAPE = Shape(R, L, SLOTS)
EPOCH = 1_700_000_000 * 10**9 // MINUTE_NS * MINUTE_NS
PHASES = ("decode", "prefill")


def placements_at(steps: list[int]) -> PlacementRows:
    n = len(steps)
    zeros = np.zeros(n, np.int32)
    return PlacementRows(np.array(steps, np.int64), zeros, zeros + R, [np.arange(SLOTS, dtype=np.int32)] * n)


def built(rows: StepRows, load: Int64, changes: list[int], *, summed: bool, at_once: int = L) -> Minutes:
    """``load [recorded steps, L, SLOTS]``, added so many layers at a time."""
    recorded = rows.step[rows.status == Status.RECORDED]
    builder = MinutesBuilder(rows, placements_at(changes), recorded, SHAPE, summed=summed)
    for first in range(0, L, at_once):
        own = load[:, first : first + at_once].astype(np.int32).transpose(1, 0, 2)
        builder.add(first, own, rank_loads(own, R))
    return builder.finish()


@st.composite
def segments(draw: st.DrawFn) -> tuple[StepRows, Int64, list[int]]:
    n = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gaps = rng.integers(1, 40, n).cumsum()
    rows = StepRows(
        step=np.arange(n) + 5,
        time_ns=EPOCH + gaps * 10**9,
        monotonic_ns=gaps * 10**9,
        status=rng.choice([0, 0, 0, 1, 2, 3, 4], n).astype(np.uint8),
        num_tokens=rng.integers(-1, 5, n),
        phase=rng.integers(-1, 2, n).astype(np.int32),
        step_ms=rng.choice([np.nan, 2.5, 7.25], n).astype(np.float32),
        device_ms=np.full(n, np.nan, np.float32),
        phases=PHASES,
    )
    load = rng.integers(0, draw(st.sampled_from([1, 2, 9])), (n, L, SLOTS))
    recorded = rows.status == Status.RECORDED
    changes = sorted(draw(st.sets(st.integers(5, 17), max_size=2)))
    return rows, load[recorded], changes


def truth(rows: StepRows, load: Int64, changes: list[int]) -> dict[tuple[int, int, int], dict[str, Any]]:
    """The sums of each minute, placement and phase."""
    groups: dict[tuple[int, int, int], dict[str, Any]] = defaultdict(
        lambda: {
            "steps": [],
            "status": [0] * len(Status),
            "loads": [],
            "host": [],
            "step_ms": 0.0,
            "tokens": 0,
        }
    )
    recorded = 0
    for i, step in enumerate(rows.step.tolist()):
        epoch = sum(step >= change for change in changes)
        group = groups[int(rows.time_ns[i]) // MINUTE_NS * MINUTE_NS, epoch, int(rows.phase[i])]
        group["steps"].append(step)
        group["status"][rows.status[i]] += 1
        group["tokens"] += max(0, int(rows.num_tokens[i]))
        group["step_ms"] += 0.0 if math.isnan(rows.step_ms[i]) else float(rows.step_ms[i])
        if i:
            group["host"].append((rows.monotonic_ns[i] - rows.monotonic_ns[i - 1]) / 1e6)
        if rows.status[i] == Status.RECORDED:
            group["loads"].append((step, load[recorded]))
            recorded += 1
    return groups


@pytest.mark.parametrize("summed", [True, False])
@given(segments(), st.integers(1, L))
def test_rows_are_the_sums_of_their_steps(
    summed: bool, segment: tuple[StepRows, Int64, list[int]], at_once: int
) -> None:
    minutes = Minutes.from_table(built(*segment, summed=summed, at_once=at_once).to_table(), SHAPE)
    expected = truth(*segment)
    assert len(minutes) == len(expected)
    assert minutes.summed == summed
    epochs = np.searchsorted(segment[2], minutes["first_step"], side="right").tolist()
    for i, epoch in enumerate(epochs):
        code = int(minutes["phase"][i])
        phase = -1 if code < 0 else PHASES.index(minutes.phases[code])
        group = expected[int(minutes["minute"][i]), epoch, phase]
        row = {name: values[i] for name, values in minutes.columns.items()}
        assert [row["first_step"], row["last_step"]] == [min(group["steps"]), max(group["steps"])]
        assert [row[status.label] for status in Status] == group["status"]
        assert row["num_tokens"] == group["tokens"]
        assert (row["host_ms_steps"], row["host_ms_sum"]) == (len(group["host"]), sum(group["host"]))
        assert row["step_ms_sum"] == group["step_ms"]
        assert row["host_ms_histogram"].sum() == len(group["host"])
        loads = np.array([load for _, load in group["loads"]]).reshape(-1, L, R, SLOTS // R)
        by_rank = loads.sum(axis=3)
        assert (row["rank_load"].reshape(L, R) == by_rank.sum(axis=0)).all()
        assert (row["active_steps"] == (by_rank.max(axis=2, initial=0) > 0).sum(axis=0)).all()
        slots = loads.sum(axis=0).reshape(L, SLOTS)
        for layer in range(L):
            named = row["slot"].reshape(L, -1)[layer]
            tokens = row["slot_load"].reshape(L, -1)[layer]
            found = {int(s): int(n) for s, n in zip(named, tokens, strict=True) if s >= 0}
            assert found == {s: n for s, n in enumerate(slots[layer].tolist()) if n}
            assert tokens.tolist() == sorted(tokens.tolist(), reverse=True)
        if summed:
            assert (row["max_load"] == by_rank.max(axis=2, initial=0).sum(axis=0)).all()
            assert_formulas(row, [step for step, _ in group["loads"]], by_rank)


def assert_formulas(row: dict[str, Any], steps: list[int], by_rank: Int64) -> None:
    """The formulas of one row; ``by_rank [steps, L, R]``."""
    for name in FORMULAS:
        values = per_step(name.replace("_", "-"), by_rank.tolist()) if len(by_rank) else []
        known = [(value, step) for value, step in zip(values, steps, strict=True) if not math.isnan(value)]
        assert row["active"] == len(known)
        if not known:
            assert math.isnan(row[name])
            continue
        assert row[name] == pytest.approx(sum(value for value, _ in known))
        if name in ("balancedness", "imbalance"):
            for what, best in (("min", min), ("max", max)):
                extreme = best(value for value, _ in known)
                assert row[f"{name}_{what}"] == pytest.approx(extreme)
                near = [step for value, step in known if value == pytest.approx(extreme)]
                assert row[f"{name}_{what}_step"] in near
            assert row[f"{name}_histogram"].sum() == len(known)
    for layer in range(L):
        own = by_rank[:, [layer]]
        for name, column in (("balancedness", "layer_balancedness"), ("imbalance", "layer_imbalance")):
            values = per_step(name, own.tolist()) if len(own) else []
            assert row[column][layer] == pytest.approx(sum(v for v in values if not math.isnan(v)))
        ties = [
            [(load == load.max()) / (load == load.max()).sum() if load.min() < load.max() else load * 0.0]
            for load in own[:, 0].astype(float)
        ]
        shares = np.sum(ties, axis=(0, 1)) if ties else np.zeros(R)
        assert row["slowest"].reshape(L, R)[layer] == pytest.approx(shares)


@pytest.mark.parametrize("summed", [True, False])
@given(segments(), st.integers(1, 11))
def test_parts_of_a_segment_merge_to_the_same_sums(
    summed: bool, segment: tuple[StepRows, Int64, list[int]], cut: int
) -> None:
    rows, load, changes = segment
    first = np.arange(len(rows.step)) < cut
    recorded = first[rows.status == Status.RECORDED]
    parts = [
        built(rows.select(np.flatnonzero(here)), load[loads], changes, summed=summed)
        for here, loads in ((first, recorded), (~first, ~recorded))
        if here.any()
    ]
    merged = Minutes.concat(parts).merged(np.array(changes, np.int64))
    whole = built(rows, load, changes, summed=summed)
    by_key = [np.lexsort((m["phase"], m["first_step"], m["minute"])) for m in (merged, whole)]
    assert len(merged) == len(whole)
    for name, values in whole.columns.items():
        if name.startswith("host_ms"):
            continue  # the time between the parts is in neither of them
        if name in ("slot", "phase") or name.endswith("_step"):
            continue  # of equal values, either may come first
        np.testing.assert_allclose(merged[name][by_key[0]], values[by_key[1]], err_msg=name)


def test_values_are_counted_in_the_bin_that_holds_them() -> None:
    for scale in SCALES.values():
        middle = (scale.edges[:-1] + scale.edges[1:]) / 2
        assert (scale.histogram(middle) == 1).all()
        assert scale.histogram(np.array([np.nan, np.inf])).sum() == 0
        outside = scale.histogram(np.array([-1.0, 1e9]))
        assert (outside[0], outside[BINS - 1], outside.sum()) == (1, 1, 2)


@pytest.mark.parametrize("column", ["rank_load", "slot", "first_step", "balancedness_histogram"])
def test_table_that_cannot_be_of_the_shape_is_rejected(column: str) -> None:
    n = 3
    rows = StepRows(
        np.arange(n), np.full(n, EPOCH), np.arange(n), np.zeros(n, np.uint8), np.arange(n),
        np.full(n, -1, np.int32), *[np.full(n, np.nan, np.float32)] * 2,
    )  # fmt: skip
    table = built(rows, np.ones((n, L, SLOTS), np.int64), [], summed=True).to_table()
    values = table.column(column).to_pylist()
    wrong = [[*value, 1] if isinstance(value, list) else -7 for value in values]
    at = table.column_names.index(column)
    field = MINUTES_SCHEMA.field(column)
    changed = table.set_column(at, field, pa.array(wrong, field.type))
    with pytest.raises(FormatError):
        Minutes.from_table(changed, SHAPE)
