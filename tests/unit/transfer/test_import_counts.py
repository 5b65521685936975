"""`import` of counts in no system's own form: long tables, JSON histories, a file per rank, wide counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.reader.run import Run
from eplb_analyze.transfer.exporters.loads import export_loads
from eplb_analyze.transfer.importers import arrays
from eplb_analyze.transfer.importers.files import json_items
from eplb_analyze.transfer.importers.import_dump import ImportReport, import_dump
from eplb_analyze.transfer.importers.source import Options

RNG = np.random.default_rng(7)


def do(source: Path, into: Path, format: str | None = None, **options: Any) -> tuple[ImportReport, Run]:
    report = import_dump(source, into / "dump", format, Options(**{"model": "m", **options}))
    return report, open_run(into / "dump", run=report.run_id)


def refused(error: type[Exception], source: Path, into: Path, *words: str, **options: Any) -> None:
    with pytest.raises(error) as raised:
        import_dump(source, into / "refused", options.pop("format", None), Options(**options))
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)
    assert not list((into / "refused").glob("run=*"))


def loads(run: Run) -> Any:
    """``[steps, layers, slots]``"""
    frame = run.loads()
    return np.array(frame["load"].to_list()).reshape(frame["step"].n_unique(), run.info.num_layers, -1)


def balancedness(load: Any, ranks: int) -> float:
    """The mean over steps and active layers of mean / max over ranks, of loads ``[steps, layers, slots]``."""
    tokens = load.reshape(*load.shape[:2], ranks, -1).sum(axis=3)
    ratios = [
        np.mean([layer.mean() / layer.max() for layer in step if layer.max()])
        for step in tokens
        if step.any()
    ]
    return float(np.mean(ratios))


def long_csv(path: Path, load: Any, header: str = "layer_id,expert_id,count", first: int = 0) -> Path:
    """``load`` [layers, experts]; rows of zero are left out, as SGLang's recorder does."""
    separator = ";" if ";" in header else ","
    rows = [
        separator.join(map(str, (layer + first, expert, load[layer, expert])))
        for layer, expert in np.ndindex(*load.shape)
        if load[layer, expert]
    ]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# ---- long tables


@pytest.mark.parametrize(
    "header", ["layer_id,expert_id,count", "Layer;Expert;Tokens", '"layer_idx","logical_expert","load"']
)
def test_long_csv_is_one_step(tmp_path: Path, header: str) -> None:
    load = RNG.integers(1, 50, (3, 8))
    load[1, 2:5] = 0
    source = long_csv(tmp_path / "counts.csv", load, header, first=4)
    report, run = do(source, tmp_path, ep_size=4, placement="linear")
    assert (report.format, report.layer_numbers) == ("table", [4, 5, 6])
    np.testing.assert_array_equal(loads(run), load[None])
    assert summarize(run).to_json()["balancedness"]["mean"] == pytest.approx(balancedness(load[None], 4))
    # The file leaves out zeros, so it does not say how many experts there are.
    assert "8 experts" in report.assumed["experts"]


def test_long_csv_of_each_rank_is_summed_over_ranks(tmp_path: Path) -> None:
    load = RNG.integers(0, 5, (4, 2, 8))
    load[:, :, 7] = [[1, 0], [0, 0], [0, 2], [0, 0]]
    load[3] = 0  # a rank without a token has a file without a row
    (tmp_path / "csv").mkdir()
    for rank in range(4):
        long_csv(
            tmp_path / f"csv/expert_distribution_rank{rank}_timestamp17443477{rank}.csv", load[rank], first=3
        )
    (tmp_path / "csv/config.json").write_text("{}")
    (tmp_path / "csv/server.log").write_text("ready")
    report, run = do(tmp_path / "csv", tmp_path, ep_size=4, placement="linear")
    assert (report.ranks, report.files, report.scope) == (4, 4, "local")
    np.testing.assert_array_equal(loads(run), load.sum(axis=0)[None])


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_one_file_of_several_ranks_is_refused(tmp_path: Path, suffix: str) -> None:
    """The load is the sum over all ranks; one rank's part would give a wrong figure."""
    load = RNG.integers(1, 50, (2, 8))
    source = tmp_path / f"stats_rank1{suffix}"
    long_csv(source, load) if suffix == ".csv" else np.save(source, load)
    refused(
        UsageError,
        source,
        tmp_path,
        "only the counts of rank 1",
        "one file per rank",
        ep_size=2,
        placement="linear",
    )
    _, run = do(source, tmp_path, ep_size=1, placement="linear")
    np.testing.assert_array_equal(loads(run), load[None])


def test_arrays_of_each_rank_are_summed_over_ranks(tmp_path: Path) -> None:
    load = RNG.integers(0, 50, (2, 5, 3, 8))
    (tmp_path / "ranks").mkdir()
    for rank in range(2):
        np.save(tmp_path / f"ranks/rank_{rank}.npy", load[rank])
    options: dict[str, Any] = {"ep_size": 2, "placement": "linear", "ordered": True}
    _, run = do(tmp_path / "ranks", tmp_path, "array", **options)
    np.testing.assert_array_equal(loads(run), load.sum(axis=0))
    (tmp_path / "ranks/rank_1.npy").unlink()
    refused(UsageError, tmp_path / "ranks", tmp_path, "only the counts of rank 0", format="array", **options)
    np.save(tmp_path / "ranks/again_rank0.npy", load[0])
    refused(UsageError, tmp_path / "ranks", tmp_path, "rank 0 has several files", format="array", **options)


def test_table_with_a_rank_column_is_summed_over_ranks(tmp_path: Path) -> None:
    load = RNG.integers(1, 9, (2, 3, 2, 4))  # ranks, steps, layers, experts
    rows = [(rank, 10 * step, layer, expert, n) for (rank, step, layer, expert), n in np.ndenumerate(load)]
    order = RNG.permutation(len(rows))
    text = "\n".join(",".join(map(str, rows[i])) for i in order)
    (tmp_path / "a.csv").write_text(f"rank,step,layer,expert,count\n{text}\n")
    report, run = do(tmp_path / "a.csv", tmp_path, ep_size=2, placement="linear")
    np.testing.assert_array_equal(loads(run), load.sum(axis=0))
    assert run.loads()["step"].unique().sort().to_list() == [0, 10, 20]
    assert (report.not_sampled, report.notes) == (18, ["the source has only some of the steps, every 10"])


def test_experts_that_no_row_names_need_an_option(tmp_path: Path) -> None:
    """Of 8 experts, only the first five got tokens."""
    load = np.array([[3, 1, 0, 0, 2, 0, 0, 0]])
    source = long_csv(tmp_path / "a.csv", load)
    refused(UsageError, source, tmp_path, "5 slots", "--num-experts", ep_size=2, placement="linear")
    report, run = do(source, tmp_path, ep_size=2, placement="linear", num_logical_experts=8)
    np.testing.assert_array_equal(loads(run), load[None])
    assert "experts" not in report.assumed
    refused(UsageError, source, tmp_path, "expert 4", ep_size=2, placement="linear", num_logical_experts=4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("layer,expert,count\n0,0,1\n0,0,2\n", "1 rows repeat"),
        ("layer,expert,count\n0,0,-1\n", "negative"),
        ("layer,expert,count\n0,0,1.5\n", "not a whole number"),
        ("layer,expert,count\n0,0,inf\n", "infinite"),
        ("layer,expert,count\n0,0,nan\n", "a row without a value of count"),
        ("layer,expert,count\n0,0,9007199254740994\n", "above 2^53"),
        ("layer,expert,count\n0,,1\n", "a row without a value of expert"),
        ("layer,expert,count\n0,x,1\n", "'x'"),
        ("layer,expert,count\n0,70000,1\n", "70000"),
        ("layer,expert,count\n-1,0,1\n", "-1"),
        ("layer,expert,count\n", "no row"),
        ("layer,count\n0,1\n", "layer_id, expert_id and count"),
        ("layer,layer,expert,count\n0,0,0,1\n", "its columns are"),
        ("layer,expert,count\n0,0\n", "Expected 3 columns"),
        ("a,b,c\n0,0,1\n", "layer_id, expert_id and count"),
    ],
)
def test_invalid_table_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    refused(
        DumpError, tmp_path / "a.csv", tmp_path, "a.csv", word, ep_size=1, placement="linear", format="array"
    )


def test_table_that_claims_far_more_counts_than_rows_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{layer},{layer * 16},1\n" for layer in range(4000))
    (tmp_path / "a.csv").write_text("layer,expert,count\n" + rows)
    refused(DumpError, tmp_path / "a.csv", tmp_path, "4,000 rows span", ep_size=1, placement="linear")


def test_slots_that_are_not_on_the_ranks_in_order_are_refused(tmp_path: Path) -> None:
    table = pa.table({"layer": [0] * 4, "physical": range(4), "rank": [0, 1, 0, 1], "load": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    refused(
        DumpError,
        tmp_path / "a.parquet",
        tmp_path,
        "are not on 2 ranks in ascending order",
        num_logical_experts=4,
    )


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    table = pa.table({"layer": [0] * 4, "expert": range(4), "load": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    (tmp_path / "a.parquet").write_bytes(data[:-9])
    refused(DumpError, tmp_path / "a.parquet", tmp_path, "a.parquet", ep_size=1, placement="linear")


@given(
    load=hnp.arrays(
        np.int64, st.tuples(*[st.integers(1, 3)] * 3, st.sampled_from([2, 4])), elements=st.integers(0, 2**40)
    ),
    seed=st.integers(0, 1000),
    parquet=st.booleans(),
)
@settings(max_examples=40)
def test_table_in_any_order_has_the_sums(
    load: Any, seed: int, parquet: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``load`` [ranks, steps, layers, experts]; rows of zero are left out but for the last expert."""
    folder = tmp_path_factory.mktemp("table")
    ranks, experts = load.shape[0], load.shape[3]
    keep = np.argwhere((load > 0) | (np.arange(experts) == experts - 1))
    keep = np.random.default_rng(seed).permutation(keep)
    columns = dict(zip(("rank", "step", "layer", "expert"), keep.T, strict=True))
    table = pa.table({**columns, "count": load[tuple(keep.T)]})
    file = folder / ("a.parquet" if parquet else "a.csv")
    pq.write_table(table, file) if parquet else pacsv.write_csv(table, file)
    options = {"num_logical_experts": experts * ranks, "token_replication": 1}
    report, run = do(file, folder, ep_size=ranks, placement="linear", **options)
    np.testing.assert_array_equal(loads(run)[:, :, :experts], load.sum(axis=0))
    files = [p for p in (folder / "dump").rglob("*") if p.is_file()]
    assert report.bytes == sum(p.stat().st_size for p in files)
    assert report.rows == sum(pq.read_metadata(p).num_rows for p in files if p.suffix == ".parquet")


def test_loads_divided_by_token_replication_need_the_option_in_csv(tmp_path: Path) -> None:
    source = tmp_path / "half.csv"
    rows = "".join(f"0,0,{slot},{slot // 2},{slot},{(2 * slot + 1) / 2}\n" for slot in range(4))
    source.write_text("step,layer,physical,rank,logical,load\n" + rows)
    refused(DumpError, source, tmp_path, "--token-replication")
    _, run = do(source, tmp_path, token_replication=2)
    assert run.loads()["load"].to_list() == [[0.5, 1.5, 2.5, 3.5]]


def test_named_placement_may_repeat_that_of_the_source(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.integers(1, 9, (2, 8)))
    _, run = do(tmp_path / "a.npy", tmp_path, ep_size=2, placement="linear")
    export_loads(run, "csv", tmp_path / "loads.csv")
    _, again = do(tmp_path / "loads.csv", tmp_path, ep_size=2, placement="linear")
    np.testing.assert_array_equal(loads(again), loads(run))
    refused(UsageError, tmp_path / "loads.csv", tmp_path, "its own placements", placement="round_robin")
    refused(UsageError, tmp_path / "loads.csv", tmp_path, "2 EP ranks, not 4", ep_size=4)


# ---- JSON


def history(path: Path, load: Any, key: str | None = arrays.LOGICAL, **layout: Any) -> Path:
    records = [one.tolist() if key is None else {key: one.tolist()} for one in load]
    path.write_text(json.dumps({arrays.HISTORY: records}, **layout))
    return path


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("key", [arrays.LOGICAL, None])
def test_json_history_is_a_step_per_record(tmp_path: Path, key: str | None, layout: dict[str, Any]) -> None:
    load = RNG.poisson(RNG.gamma(1, 20, (1, 3, 16)), (30, 3, 16))
    source = history(tmp_path / "expert-load.json", load, key, **layout)
    report, run = do(source, tmp_path, ep_size=4, placement="linear")
    np.testing.assert_array_equal(loads(run), load)
    assert summarize(run).to_json()["balancedness"]["mean"] == pytest.approx(balancedness(load, 4))
    assert "step_order" in report.assumed
    assert "step_order" not in report.unknown


def test_json_history_can_be_larger_than_memory_allows_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eplb_analyze.transfer.importers import files

    load = RNG.integers(0, 2**40, (300, 2, 8))
    source = history(tmp_path / "a.json", load)
    monkeypatch.setattr(files, "_JSON_BYTES", 97)
    monkeypatch.setattr(files, "MAX_TEXT", 1000)
    assert source.stat().st_size > 20 * files.MAX_TEXT
    _, run = do(source, tmp_path, ep_size=2, placement="linear")
    np.testing.assert_array_equal(loads(run), load)


def test_json_history_by_slot_needs_a_placement(tmp_path: Path) -> None:
    load = RNG.integers(0, 9, (5, 2, 8))
    source = history(tmp_path / "a.json", load, arrays.PHYSICAL)
    placement = [0, 1, 2, 3, 4, 5, 0, 1]
    (tmp_path / "p.json").write_text(json.dumps(placement))
    _, run = do(source, tmp_path, ep_size=2, placement=str(tmp_path / "p.json"))
    np.testing.assert_array_equal(loads(run), load)
    assert run.placement(0)["logical"].to_list() == placement * 2
    assert run.info.num_logical_experts == 6


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"load_history": []}', "is empty"),
        ('{"load_history": [{"load": [[1]]}]}', "load_history[0]: it has no logical_expert_load"),
        ('{"load_history": [[[1, 2]], [[1]]]}', "load_history[1]: it has"),
        ('{"load_history": [[[1, 2]], [[1', "load_history[1]: it is not JSON"),
        ('{"load_history": [[[1, 2], [3]]]}', "different lengths"),
        ('{"load_history": [[[1.5, 2]]]}', "whole numbers"),
        ('{"load_history": {"a": 1}}', "does not begin with the list"),
        ('{"load_history": [' + "[" * 5000, "not JSON"),
    ],
)
def test_invalid_json_history_is_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "a.json").write_text(text)
    refused(DumpError, tmp_path / "a.json", tmp_path, "a.json", word, ep_size=1, placement="linear")


def test_json_list_needs_a_format(tmp_path: Path) -> None:
    """A list can be counts or a placement."""
    load = RNG.integers(0, 9, (4, 2, 8))
    (tmp_path / "a.json").write_text(json.dumps(load.tolist()))
    refused(UsageError, tmp_path / "a.json", tmp_path, "--format array", "--placement", ep_size=1)
    _, run = do(tmp_path / "a.json", tmp_path, "array", ep_size=2, placement="linear", ordered=True)
    np.testing.assert_array_equal(loads(run), load)


@given(
    items=st.lists(
        st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)).map(lambda x: [x])
    ),
    size=st.integers(1, 40),
)
@settings(max_examples=60)
def test_json_items_are_those_of_the_whole_document(
    items: list[Any], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from eplb_analyze.transfer.importers import files

    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps({"k": items, "other": 1}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_JSON_BYTES", max(size, 20))
        assert [item for _, item in json_items(path, "k")] == items


# ---- placements


@pytest.mark.parametrize("form", ["list.json", "one_row.json", "sglang.json", "flat.npy", "one_row.npy"])
def test_one_row_holds_for_all_layers(tmp_path: Path, form: str) -> None:
    load = RNG.integers(1, 50, (2, 3, 4))
    row = [3, 1, 0, 2, 1, 3]
    file = tmp_path / form
    if form.endswith(".npy"):
        np.save(file, np.array(row if form == "flat.npy" else [row]))
    else:
        content = {"list.json": row, "one_row.json": [row], "sglang.json": {"physical_to_logical_map": row}}
        file.write_text(json.dumps(content[form]))
    np.save(tmp_path / "load.npy", load)
    report, run = do(tmp_path / "load.npy", tmp_path, "array", ep_size=2, placement=str(file), ordered=True)
    assert run.placement(0)["logical"].to_list() == row * 3
    assert "single row applies to all 3 layers" in report.assumed["placement"]
    found = loads(run)
    for expert in range(4):
        assert (found[:, :, np.array(row) == expert].sum(axis=2) == load[:, :, expert]).all()


def test_two_rows_do_not_hold_for_three_layers(tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", RNG.integers(1, 50, (3, 4)))
    (tmp_path / "p.json").write_text("[[0, 1, 2, 3], [0, 1, 2, 3]]")
    refused(
        DumpError,
        tmp_path / "load.npy",
        tmp_path,
        "2 layers",
        "have 3",
        ep_size=2,
        placement=str(tmp_path / "p.json"),
    )


@given(ranks=st.sampled_from([1, 2, 4, 8]), per_rank=st.integers(1, 6), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_round_robin_has_each_expert_on_its_rank(
    ranks: int, per_rank: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    experts = ranks * per_rank
    load = np.random.default_rng(seed).integers(1, 50, (2, 3, experts))
    np.save(folder / "a.npy", load)
    _, run = do(folder / "a.npy", folder, "array", ep_size=ranks, placement="round_robin", ordered=True)
    on_rank = run.placement(0).filter(pl.col("layer") == 0)
    assert all(expert % ranks == rank for rank, expert in on_rank.select("rank", "logical").iter_rows())
    tokens = np.array(run.loads()["rank_load"].to_list()).reshape(2, 3, ranks)
    for rank in range(ranks):
        np.testing.assert_array_equal(tokens[:, :, rank], load[:, :, rank::ranks].sum(axis=2))


# ---- counts above 2^31


def test_wide_counts_are_sealed_as_int64(tmp_path: Path) -> None:
    load = np.array([[[2**31 - 1, 1], [5, 0]], [[2**31, 2**53], [3, 4]]])
    np.save(tmp_path / "a.npy", load)
    _, run = do(tmp_path / "a.npy", tmp_path, "array", ep_size=1, placement="linear", ordered=True)
    np.testing.assert_array_equal(loads(run), load)
    (file,) = (tmp_path / "dump").rglob("loads-*.parquet")
    table = pq.read_table(file)
    assert table.schema.field("load").type.value_type == pa.int64()
    assert table["load"].to_pylist() == load.transpose(1, 0, 2).reshape(-1, 2).tolist()
    assert not {f.code for f in check_run(run).findings} & {
        "damaged_file",
        "sums_differ",
        "rank_load_mismatch",
    }


def test_counts_that_add_up_to_too_much_are_refused(tmp_path: Path) -> None:
    """Sums over a run are int64."""
    np.save(tmp_path / "a.npy", np.full((40, 2, 64), 2**53))
    refused(
        DumpError, tmp_path / "a.npy", tmp_path, "add up to more than", format="array", ep_size=1,
        placement="linear",
    )  # fmt: skip
