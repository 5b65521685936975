"""A dump is plain Parquet in hive folders: three independent readers agree on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from helpers import LAYERS, SLOTS, load_of, map_of, open_writer

RANKS, STEPS = 4, 20
Sums = npt.NDArray[np.int64]
#: (step, layer) -> values summed over ranks
Cells = dict[tuple[int, int], list[int]]


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank has one dummy step, which counts as zero."""
    root = tmp_path_factory.mktemp("dumps")
    for rank in range(RANKS):
        options = {"model": "org/m", "run_id": None, "ep_size": RANKS, "segment_steps": 8}
        with open_writer(root, ep_rank=rank, **options) as writer:
            for step in range(STEPS):
                if step == rank + 3:
                    writer.skip()
                else:
                    writer.record(None, load_of(step, rank), map_of(step // 7), num_tokens=step + rank)
    return root


def truth() -> dict[str, Cells]:
    loads: Cells = {}
    rank_loads: Cells = {}
    for step in range(STEPS):
        total = sum(load_of(step, rank) for rank in range(RANKS) if step != rank + 3)
        assert isinstance(total, np.ndarray)
        for layer in range(LAYERS):
            loads[step, layer] = total[layer].tolist()
            rank_loads[step, layer] = total[layer].reshape(RANKS, SLOTS // RANKS).sum(axis=1).tolist()
    return {"load": loads, "rank_load": rank_loads}


def table_of_pyarrow(dump: Path, table: str) -> pa.Table:
    files = [str(path) for path in dump.rglob(f"{table}-*.parquet")]
    return ds.dataset(
        files, partitioning=ds.partitioning(flavor="hive"), partition_base_dir=str(dump)
    ).to_table()


def sums_of_pyarrow(dump: Path, column: str) -> Cells:
    rows = table_of_pyarrow(dump, "loads").select(["step", "layer", column]).to_pylist()
    sums: Cells = {}
    for row in rows:
        key = row["step"], row["layer"]
        sums[key] = [a + b for a, b in zip(sums.get(key, [0] * SLOTS), row[column], strict=False)]
    return sums


def frame_of_polars(dump: Path, table: str) -> pl.LazyFrame:
    return pl.scan_parquet(f"{dump}/*/*/*/*/{table}-*.parquet", hive_partitioning=True)


def sums_of_polars(dump: Path, column: str) -> Cells:
    frame = (
        frame_of_polars(dump, "loads")
        .with_columns(slot=pl.int_ranges(pl.col(column).list.len()))
        .explode(column, "slot")
        .group_by("step", "layer", "slot")
        .agg(pl.col(column).cast(pl.Int64).sum())
        .sort("step", "layer", "slot")
        .collect()
    )
    sums: Cells = {}
    for step, layer, _, value in frame.iter_rows():
        sums.setdefault((step, layer), []).append(value)
    return sums


def sql(dump: Path, query: str, table: str) -> list[tuple[Any, ...]]:
    if table != "steps" and int(duckdb.__version__.split(".")[0]) < 2:
        pytest.skip(f"DuckDB {duckdb.__version__} does not read the encoding of integers that {table} has")
    source = f"read_parquet('{dump}/*/*/*/*/{table}-*.parquet', hive_partitioning = true)"
    with duckdb.connect() as connection:
        rows: list[tuple[Any, ...]] = connection.execute(query.format(source=source)).fetchall()
    return rows


def sums_of_duckdb(dump: Path, column: str) -> Cells:
    query = f"""
        select step, layer, slot, sum(value)::bigint from (
            select step, layer, unnest({column}) as value, generate_subscripts({column}, 1) as slot
            from {{source}}
        ) group by all order by all
    """
    sums: Cells = {}
    for step, layer, _, value in sql(dump, query, "loads"):
        sums.setdefault((step, layer), []).append(value)
    return sums


@pytest.mark.parametrize("column", ["load", "rank_load"])
@pytest.mark.parametrize("sums_of", [sums_of_pyarrow, sums_of_polars, sums_of_duckdb])
def test_documented_query_sums_loads_over_ranks(
    dump: Path, sums_of: Callable[[Path, str], Cells], column: str
) -> None:
    found = sums_of(dump, column)
    assert found.keys() == truth()[column].keys()
    assert found == truth()[column]


def test_documented_query_has_ranks_runs_and_models_as_columns(dump: Path) -> None:
    expected = [(rank, "org--m", RANKS, LAYERS * (STEPS - 1)) for rank in range(RANKS)]
    groups = table_of_pyarrow(dump, "loads").group_by(["rank", "model", "ep_size"], use_threads=False)
    rows = groups.aggregate([("step", "count")]).sort_by("rank").to_pylist()
    assert [(r["rank"], r["model"], r["ep_size"], r["step_count"]) for r in rows] == expected
    frame = frame_of_polars(dump, "loads").group_by("rank", "model", "ep_size").len().sort("rank")
    assert frame.collect().rows() == expected
    query = "select rank::int, model, ep_size, count(*) from {source} group by all order by all"
    assert sql(dump, query, "loads") == expected


def test_documented_query_lists_steps_with_status(dump: Path) -> None:
    expected = sorted(
        (step, rank, "dummy" if step == rank + 3 else "recorded", None if step == rank + 3 else step + rank)
        for step in range(STEPS)
        for rank in range(RANKS)
    )
    names = ["step", "rank", "status", "num_tokens"]
    rows = table_of_pyarrow(dump, "steps").select(names).to_pylist()
    assert sorted(tuple(row.values()) for row in rows) == expected
    assert sorted(frame_of_polars(dump, "steps").select(names).collect().rows()) == expected
    query = "select step, rank::int, status, num_tokens from {source} order by step, rank"
    assert sql(dump, query, "steps") == expected


def test_documented_query_finds_placement_in_force(dump: Path) -> None:
    expected = [
        (step, layer, map_of(step // 7)[layer].tolist()) for step in (0, 7, 14) for layer in range(LAYERS)
    ]
    names = ["step", "layer", "physical_to_logical"]
    table = table_of_pyarrow(dump, "placements")
    rows = table.filter(ds.field("rank") == 0).sort_by([("step", "ascending"), ("layer", "ascending")])
    assert [tuple(row.values()) for row in rows.select(names).to_pylist()] == expected
    frame = (
        frame_of_polars(dump, "placements").filter(pl.col("rank") == 0).select(names).sort("step", "layer")
    )
    assert frame.collect().rows() == expected
    query = "select step, layer, physical_to_logical from {source} where rank::int = 0 order by step, layer"
    assert sql(dump, query, "placements") == expected
