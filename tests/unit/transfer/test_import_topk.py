"""`import` of expert ids per token: counted against np.bincount, and files that are wrong."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import cli, one_error
from hypothesis import given, settings

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.reader.run import Run
from eplb_analyze.transfer.importers import topk, topk_blocks
from eplb_analyze.transfer.importers.import_dump import ImportReport, import_dump
from eplb_analyze.transfer.importers.source import Options

Array = np.ndarray[Any, Any]
#: What every source lacks. With one rank, any number of experts can be placed.
PLACED: dict[str, Any] = {"ep_size": 1, "placement": "linear"}


def chosen(tokens: int, layers: int, top_k: int, experts: int, seed: int = 0) -> Array:
    """``[tokens, layers, top-k]``: distinct experts, skewed, with the last expert in it."""
    rng = np.random.default_rng(seed)
    weight = rng.random((tokens, layers, experts)) ** np.linspace(0.3, 3, experts)
    ids = np.argsort(-weight, axis=2)[:, :, :top_k].astype(np.int16)
    ids[0, :, 0], ids[0, :, 1:] = experts - 1, np.arange(top_k - 1)
    return ids


def counts_of(ids: Array, step: Array, experts: int) -> tuple[list[int], Array, Array]:
    """Steps, counts ``[steps, layers, experts]`` and tokens without padding, with plain loops."""
    steps = sorted(set(step.tolist()))
    layers = ids.shape[1]
    counts = np.zeros((len(steps), layers, experts), np.int64)
    tokens = np.zeros(len(steps), np.int64)
    for row, number in enumerate(steps):
        own = ids[step == number]
        for layer in range(layers):
            named = own[:, layer].ravel()
            counts[row, layer] = np.bincount(named[named >= 0], minlength=experts)
        tokens[row] = max((own[:, layer] >= 0).any(axis=1).sum() for layer in range(layers))
    return steps, counts, tokens


def imported(source: Path, format: str | None = None, **options: Any) -> tuple[ImportReport, Run]:
    into = Path(tempfile.mkdtemp(dir=source.parent))
    report = import_dump(source, into, format, Options(**PLACED | options))
    run = open_run(into, run=report.run_id)
    # With padding in some layers only, these have fewer tokens than others, which `check` reports.
    codes = {finding.code for finding in check_run(run).findings if finding.severity == "error"}
    assert codes <= {"conservation"}, check_run(run).findings
    return report, run


def found(run: Run) -> tuple[list[int], Array, Array]:
    """As :func:`counts_of`, of a run in which expert e is in slot e."""
    frame, steps = run.loads(), run.steps().filter(pl.col("state") == "recorded")
    numbers = frame["step"].unique().sort().to_list()
    load = np.array(frame["load"].to_list()).reshape(len(numbers), run.info.num_layers, -1)
    return numbers, load, steps["num_tokens"].to_numpy()


def assert_counts(run: Run, ids: Array, step: Array, experts: int) -> None:
    assert_equal(found(run), counts_of(ids, step, experts))


def assert_equal(ours: Any, theirs: Any) -> None:
    for found, true in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found, true)


def refused(
    error: type[Exception], source: Path, *words: str, format: str | None = "topk", **more: Any
) -> None:
    into = source.parent / "refused"
    with pytest.raises(error) as raised:
        import_dump(source, into, format, Options(**PLACED | more))
    for word in (*words, source.name):
        assert word in str(raised.value), raised.value
    assert "\n" not in str(raised.value)
    assert not list(into.glob("run=*")), "a refused import leaves nothing behind"


# ---- files


def as_npy(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    assert not columns
    np.save(path / "ids.npy", ids)
    return path / "ids.npy"


def as_npz(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    np.savez(path / "ids.npz", topk_ids=ids, **columns)
    return path / "ids.npz"


def as_compressed(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    np.savez_compressed(path / "ids.npz", topk_ids=ids, **columns)
    return path / "ids.npz"


def as_pt(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    assert not columns
    torch.save(torch.tensor(ids), path / "ids.pt")
    return path / "ids.pt"


def as_rows(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    """A row per token, in several row groups."""
    table = {"topk_ids": ids.tolist(), **{name: values.tolist() for name, values in columns.items()}}
    pq.write_table(pa.table(table), path / "ids.parquet", row_group_size=7)
    return path / "ids.parquet"


def as_fixed_rows(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    """Lists of fixed size."""
    flat = pa.array(ids.ravel().astype(np.int16))
    nested = pa.FixedSizeListArray.from_arrays(flat, ids.shape[2])
    nested = pa.FixedSizeListArray.from_arrays(nested, ids.shape[1])
    table = pa.table({"expert_ids": nested, **columns})
    pq.write_table(table, path / "ids.parquet")
    return path / "ids.parquet"


def as_rows_by_layer(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    """A row per token and layer."""
    tokens, layers, top_k = ids.shape
    table = {
        "layer": np.tile(np.arange(layers), tokens).tolist(),
        "indices": ids.reshape(-1, top_k).tolist(),
        **{name: np.repeat(values, layers).tolist() for name, values in columns.items()},
    }
    pq.write_table(pa.table(table), path / "ids.parquet", row_group_size=11)
    return path / "ids.parquet"


def as_layer_files(path: Path, ids: Array, columns: dict[str, Array]) -> Path:
    """A file per layer, as in FLAME-MoE's traces."""
    (path / "layers").mkdir()
    for layer in range(ids.shape[1]):
        table = {"indices": ids[:, layer].tolist(), **{n: values.tolist() for n, values in columns.items()}}
        pq.write_table(pa.table(table), path / f"layers/layer_{layer:02}.parquet")
    return path / "layers"


ALONE = [as_npy, as_pt]
WITH_COLUMNS = [as_npz, as_compressed, as_rows, as_fixed_rows, as_rows_by_layer, as_layer_files]
WRITERS = ALONE + WITH_COLUMNS


# ---- counts


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and batches so small that every file has many, and steps continue from one to the next."""
    monkeypatch.setattr(topk_blocks, "BLOCK_IDS", 40)
    monkeypatch.setattr(topk, "MAX_COUNTS", 100)


@st.composite
def traces(draw: st.DrawFn) -> tuple[Array, int]:
    """Ids with padding of tokens, of layers of a token and of single places; and the number of experts."""
    tokens, layers = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    experts = draw(st.integers(2, 12))
    top_k = draw(st.integers(1, min(3, experts - 1)))
    ids = chosen(tokens, layers, top_k, experts, draw(st.integers(0, 2**32 - 1)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.1, 0.6]))
    # The first token stays, so that the largest id and all layers are there.
    ids[1:][rng.random(tokens - 1) < share] = -1
    ids[1:][rng.random((tokens - 1, layers)) < share / 4] = -1
    ids[1:][rng.random((tokens - 1, layers, top_k)) < share / 4] = -1
    return ids.astype(draw(st.sampled_from([np.int8, np.int16, np.int32, np.int64, ">i4"]))), experts


@settings(max_examples=25)
@given(trace=traces(), data=st.data())
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.usefixtures("small_blocks")
def test_counts_are_those_of_bincount(
    write: Callable[..., Path], trace: tuple[Array, int], data: st.DataObject
) -> None:
    ids, experts = trace
    if write is as_pt:
        ids = ids.astype(np.int32)
    tokens = len(ids)
    grouping = data.draw(st.sampled_from(["tokens", "step", "request", "position"]))
    options: dict[str, Any] = {}
    columns: dict[str, Array] = {}
    if grouping == "tokens" or write in ALONE:
        options["tokens_per_step"] = data.draw(st.integers(1, tokens + 2))
        step = np.arange(tokens) // options["tokens_per_step"]
    elif grouping == "step":
        step = np.array(data.draw(st.lists(st.integers(0, 9), min_size=tokens, max_size=tokens)))
        step = np.sort(step) if data.draw(st.booleans()) else step
        columns["step"] = step
    else:
        options["step_per"] = grouping
        named = data.draw(st.lists(st.sampled_from("abcd"), min_size=tokens, max_size=tokens))
        columns["request"] = np.array(named)
        seen: list[str] = []
        step = np.zeros(tokens, np.int64)
        for i, name in enumerate(named):
            step[i] = named[:i].count(name)
            seen += [name] if name not in seen else []
            if grouping == "request":
                step[i] = seen.index(name)
    if data.draw(st.booleans()):
        options["num_logical_experts"] = experts = experts + data.draw(st.integers(0, 3))
    with tempfile.TemporaryDirectory() as folder:
        reading = topk.read(write(Path(folder), ids, columns), Options(**options))
        assert ("experts" in reading.assumed) == ("num_logical_experts" not in options)
        assert reading.num_logical_experts == experts
        chunks = list(reading.parts[0]())
    parts = [(chunk.step, chunk.load, chunk.num_tokens) for chunk in chunks]
    assert_equal((np.concatenate(part) for part in zip(*parts, strict=True)), counts_of(ids, step, experts))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.usefixtures("small_blocks")
def test_each_file_becomes_a_run(tmp_path: Path, write: Callable[..., Path]) -> None:
    ids = chosen(50, 3, 2, 8).astype(np.int32)
    ids[20:23] = -1
    _, run = imported(write(tmp_path, ids, {}), "topk", tokens_per_step=8)
    assert_counts(run, ids, np.arange(50) // 8, 8)
    if write in WITH_COLUMNS:
        (tmp_path / "steps").mkdir()
        step = np.arange(50)[::-1] // 8
        report, run = imported(write(tmp_path / "steps", ids, {"step": step}))
        assert report.format == "topk"
        assert_counts(run, ids, step, 8)


@pytest.mark.parametrize("write", [as_npy, as_npz])
def test_four_axes_are_steps_or_requests(tmp_path: Path, write: Callable[..., Path]) -> None:
    ids = chosen(60, 3, 2, 8).reshape(5, 12, 3, 2)
    ids[1, 4:] = ids[3, 9:] = -1
    flat = ids.reshape(60, 3, 2)
    source = write(tmp_path, ids, {})
    refused(UsageError, source, "--tokens-per-step", "--step-per request", format=None)
    report, run = imported(source, step_per="request")
    assert report.kind == "[requests, tokens, layers, top-k]"
    assert_counts(run, flat, np.repeat(np.arange(5), 12), 8)
    assert_counts(imported(source, step_per="position")[1], flat, np.tile(np.arange(12), 5), 8)
    if write is as_npz:
        source = write(tmp_path, ids, {"step": np.array([4, 6, 8, 10, 2])})
        report, run = imported(source)
        assert report.kind == "[steps, tokens, layers, top-k]"
        assert_counts(run, flat, np.repeat([4, 6, 8, 10, 2], 12), 8)
        # As in any recording with every second step.
        assert report.not_sampled == 4


def test_two_axes_are_one_layer(tmp_path: Path) -> None:
    ids = chosen(40, 1, 2, 6)
    np.savez(tmp_path / "ids.npz", topk_ids=ids[:, 0], step=np.arange(40) // 10)
    report, run = imported(tmp_path / "ids.npz")
    assert (report.format, report.kind, report.num_layers) == ("topk", "[tokens, top-k]", 1)
    assert_counts(run, ids, np.arange(40) // 10, 6)


def test_routed_experts_of_vllm_are_requests(tmp_path: Path) -> None:
    """As ``RequestOutput.outputs[0].routed_experts``: uint8, zeros in dense layers, one array a request."""
    ids = chosen(50, 4, 2, 8).astype(np.uint8)
    ids[:, 1] = 0
    lengths = [20, 7, 23]
    request = np.repeat(np.arange(3), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    arrays = np.split(ids, np.cumsum(lengths)[:-1])
    np.savez(tmp_path / "one.npz", routed_experts=ids, request=request)
    np.savez(tmp_path / "several.npz", *arrays)
    rows = pa.table({"request_id": ["x", "y", "z"], "routed_experts": [a.tolist() for a in arrays]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    for name in ("one.npz", "several.npz", "rows.parquet"):
        format = "topk" if name == "several.npz" else None
        for per, step in (("request", request), ("position", position)):
            report, run = imported(tmp_path / name, format, step_per=per)
            assert report.layer_numbers == [0, 2, 3]
            assert any("layer left out" in note and "dense" in note for note in report.notes)
            assert "steps" in report.assumed
            assert ("step_order" in report.unknown) == (per == "request")
            assert_counts(run, ids[:, [0, 2, 3]], step, 8)
        assert_counts(imported(tmp_path / name, format, tokens_per_step=9)[1], ids[:, [0, 2, 3]],
                      np.arange(50) // 9, 8)  # fmt: skip
    refused(UsageError, tmp_path / "several.npz", "--array", format=None)


def test_layer_files_keep_the_models_layer_numbers(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 6)
    for number, layer in ((2, 0), (11, 1)):
        table = pa.table({"scores": [[0.5, 0.5]] * 30, "indices": ids[:, layer].tolist()})
        pq.write_table(table, tmp_path / f"layer_{number:02}.parquet")
    report, run = imported(tmp_path, tokens_per_step=8)
    assert (report.format, report.kind, report.files) == ("topk", "a file per layer", 2)
    assert report.layer_numbers == [2, 11]
    assert "arrays or columns left out: scores" in report.notes
    assert any("last step has 6 tokens" in note for note in report.notes)
    assert_counts(run, ids, np.arange(30) // 8, 6)
    pq.write_table(pa.table({"indices": ids[:20, 0].tolist()}), tmp_path / "layer_12.parquet")
    refused(DumpError, tmp_path, "layer 12 has 20 tokens", tokens_per_step=8)


def test_a_file_per_rank_is_summed_over_ranks(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    parts = [chosen(40, 3, 2, 8, seed=rank) for rank in range(2)]
    for rank, ids in enumerate(parts):
        np.savez(tmp_path / f"ranks/ids_rank{rank}.npz", topk_ids=ids, step=np.arange(40) // 10)
    report, run = imported(tmp_path / "ranks", ep_size=2)
    assert (report.scope, report.ranks, report.complete) == ("local", 2, 4)
    assert_counts(run, np.concatenate(parts), np.tile(np.arange(40) // 10, 2), 8)
    refused(UsageError, tmp_path / "ranks/ids_rank0.npz", "rank 0", ep_size=2)
    np.savez(tmp_path / "ranks/ids_rank1.npz", topk_ids=parts[1][:, :2], step=np.arange(40) // 10)
    with pytest.raises(DumpError, match="layers differ"):
        import_dump(tmp_path / "ranks", tmp_path / "d", None, Options(ep_size=2, placement="linear"))


def test_a_placement_of_all_hidden_layers_fits_a_source_with_dense_layers(tmp_path: Path) -> None:
    ids = chosen(30, 3, 2, 4)
    ids[:, 0] = 0
    np.savez(tmp_path / "ids.npz", topk_ids=ids, step=np.arange(30) // 10)
    placement = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
    np.save(tmp_path / "placement.npy", placement)
    _, run = imported(tmp_path / "ids.npz", placement=str(tmp_path / "placement.npy"), ep_size=2)
    _, counts, _ = counts_of(ids, np.arange(30) // 10, 4)
    expected = np.take_along_axis(counts[:, 1:], placement[None, 1:], axis=2)
    np.testing.assert_array_equal(found(run)[1], expected)
    np.save(tmp_path / "placement.npy", placement[1:])
    with pytest.raises(DumpError, match="3 hidden layers, dense ones among them"):
        imported(tmp_path / "ids.npz", placement=str(tmp_path / "placement.npy"), ep_size=2)


def test_notes_name_ids_that_no_router_writes(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 4)
    ids[20:] = 0  # padding with zeros
    np.save(tmp_path / "ids.npy", ids)
    report, _ = imported(tmp_path / "ids.npy", "topk", tokens_per_step=10)
    assert any("layer 0 to 1" in note or "layer 0, 1" in note for note in report.notes), report.notes
    assert any("an expert twice" in note for note in report.notes)
    one = chosen(30, 3, 1, 4)
    one[:, 1] = 0
    np.save(tmp_path / "one.npy", one)
    report, _ = imported(tmp_path / "one.npy", "topk", tokens_per_step=10)
    assert any("layer 1, all tokens chose expert 0" in note for note in report.notes), report.notes
    assert report.num_layers == 3


def test_requests_can_be_categories(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 4)
    named = pa.array(["b", "a", "c"] * 10).dictionary_encode()
    write_rows(tmp_path / "ids.parquet", topk_ids=ids.tolist(), request_id=named)
    _, run = imported(tmp_path / "ids.parquet", step_per="request")
    assert_counts(run, ids, np.arange(30) % 3, 4)


def test_counts_beside_ids_are_still_counts(tmp_path: Path) -> None:
    load = np.arange(1, 9).reshape(2, 4)
    np.savez(tmp_path / "load.npz", load=load, expert_ids=np.tile(np.arange(4), (2, 1)))
    report, run = imported(tmp_path / "load.npz")
    assert report.format == "array"
    np.testing.assert_array_equal(found(run)[1][0], load)


# ---- what is asked for


def test_steps_are_not_guessed(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 4)
    np.save(tmp_path / "ids.npy", ids)
    refused(UsageError, tmp_path / "ids.npy", "--tokens-per-step N")
    refused(UsageError, tmp_path / "ids.npy", "named request", step_per="request")
    refused(UsageError, tmp_path / "ids.npy", "--format topk", format=None)
    source = as_npz(tmp_path, ids, {"request": np.arange(30) // 10})
    refused(UsageError, source, "--tokens-per-step N, --step-per request or --step-per position")
    refused(UsageError, source, "either", tokens_per_step=3, step_per="request")
    source = as_npz(tmp_path, ids, {"step": np.arange(30) // 10})
    refused(UsageError, source, "remove --tokens-per-step", tokens_per_step=3)
    np.save(tmp_path / "load.npy", np.ones((2, 4), np.int64))
    refused(UsageError, tmp_path / "load.npy", "--format topk", format=None, tokens_per_step=3)


def test_command_takes_the_options_and_has_exit_codes(tmp_path: Path) -> None:
    source = as_npz(tmp_path, chosen(30, 2, 2, 4), {"request": np.arange(30) // 10})
    base = ["import", source, tmp_path / "d", "--ep-size", "2", "--placement", "linear", "--ordered"]
    one_error(cli(*base), 2, "ids.npz", "--tokens-per-step")
    result = cli(*base, "--tokens-per-step", "10", "--num-experts", "4", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["format"], report["steps"]) == ("topk", 3)
    assert "experts" not in report["assumed"]
    assert json.loads(cli(*base, "--step-per", "position", "--json").stdout)["steps"] == 10
    for wrong in (["--step-per", "x"], ["--tokens-per-step", "0"]):
        result = cli(*base, *wrong)
        assert (result.returncode, result.stdout) == (2, "")
        assert wrong[0] in result.stderr
    one_error(cli(*base, "--tokens-per-step", "10", "--num-experts", "3"), 3, "ids.npz", "--num-experts")


# ---- wrong files


def test_wrong_ids_are_refused_with_their_place(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 4)
    for value, words in ((-2, ("-1 for padding",)), (7, ("--num-experts", "there are 4"))):
        bad = ids.copy()
        bad[17, 1, 0] = value
        np.save(tmp_path / "ids.npy", bad)
        refused(DumpError, tmp_path / "ids.npy", f"token 17, layer 1: expert id {value}", *words,
                tokens_per_step=10, num_logical_experts=4)  # fmt: skip
    np.save(tmp_path / "ids.npy", ids.astype(np.int64) + 2**40)
    refused(DumpError, tmp_path / "ids.npy", "more than any model", "--array", tokens_per_step=10)
    np.save(tmp_path / "ids.npy", ids.astype(np.uint64) + np.uint64(2**63))
    refused(DumpError, tmp_path / "ids.npy", "more than any model", tokens_per_step=10)
    np.save(tmp_path / "ids.npy", np.zeros_like(ids))
    refused(DumpError, tmp_path / "ids.npy", "did not write its routing", tokens_per_step=10)


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.ones((9, 2, 2)), "integers"),
        (np.ones((9, 2, 2), bool), "integers"),
        (np.array([["a", "b"]]), "integers"),
        (np.ones(9, np.int64), "[tokens, layers, top-k]"),
        (np.ones((1, 1, 1, 1, 2), np.int64), "[tokens, layers, top-k]"),
        (np.ones((9, 2, 200), np.int64), "--format array"),
        (np.ones((2, 5000, 2), np.int8), "more than any model"),
        (np.empty((0, 2, 2), np.int64), "ids"),
        (np.array([[None, 3]], object), "pickled objects"),
    ],
)
def test_arrays_that_are_no_ids_are_refused(tmp_path: Path, array: Array, word: str) -> None:
    np.save(tmp_path / "ids.npy", array)
    refused(DumpError, tmp_path / "ids.npy", "" if word == "ids" else word, tokens_per_step=3)
    np.savez(tmp_path / "ids.npz", topk_ids=array)
    refused(DumpError, tmp_path / "ids.npz", "ids", tokens_per_step=3)
    refused(DumpError, tmp_path / "ids.npz", word, tokens_per_step=3, array="topk_ids")


def test_columns_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    ids = chosen(30, 2, 2, 4)
    for step, word in (
        (np.arange(29), "need (30,)"),
        (np.arange(30)[:, None], "need (30,)"),
        (np.arange(30) - 1, "whole numbers"),
        (np.arange(30) / 2, "whole numbers"),
        (np.full(30, 2**62), "whole numbers"),
    ):
        refused(DumpError, as_npz(tmp_path, ids, {"step": step}), word)
    source = as_npz(tmp_path, ids, {"more": ids})
    refused(UsageError, tmp_path / "ids.npz", "no 'x'", array="x", tokens_per_step=3)
    imported(source, tokens_per_step=3)
    np.savez(source, one=ids, other=ids)
    refused(UsageError, source, "choose with --array: one, other", tokens_per_step=3)
    assert_counts(imported(source, "topk", array="other", tokens_per_step=3)[1], ids, np.arange(30) // 3, 4)


def write_rows(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_wrong_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    ids = chosen(6, 2, 2, 4).tolist()
    step = list(range(6))
    for columns, word in (
        ({"topk_ids": [*ids[:5], ids[5][:1]], "step": step}, "1 layers, but the first has 2"),
        ({"topk_ids": [*ids[:5], [[1], [2]]], "step": step}, "1 expert ids, but the first has 2"),
        ({"topk_ids": [*ids[:5], None], "step": step}, "null"),
        ({"topk_ids": [*ids[:5], [None, [1, 2]]], "step": step}, "null"),
        ({"topk_ids": [*ids[:5], [[1, None], [1, 2]]], "step": step}, "null"),
        ({"topk_ids": ids, "step": [*step[:5], None]}, "without a value of step"),
        ({"topk_ids": ids, "step": [*step[:5], -1]}, "whole numbers"),
        ({"topk_ids": ids, "step": ["a"] * 6}, "whole numbers"),
        ({"topk_ids": ids, "layer": step}, "lists of integers"),
        ({"topk_ids": [one[0] for one in ids], "step": step, "layer": [*step[:5], -1]}, "its layers"),
        ({"topk_ids": [[[[[1, 2]]]]] * 6, "step": step}, "lists of integers"),
        ({"topk_ids": [[0.5, 1.5]] * 6, "step": step}, "no expert ids"),
        ({"step": step}, "no expert ids"),
    ):
        refused(DumpError, write_rows(path, **columns), word)
    write_rows(path, topk_ids=pa.array([], pa.list_(pa.int32())), step=pa.array([], pa.int64()))
    refused(DumpError, path, "no row")
    write_rows(path, a=ids, b=ids)
    refused(UsageError, path, "choose with --array: a, b", tokens_per_step=2)
    imported(path, "topk", array="b", tokens_per_step=2)


def test_files_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("topk_ids.npy", "w") as file,
    ):
        header = {"descr": "|i1", "fortran_order": False, "shape": (1 << 20, 64, 2)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(1 << 7):
            file.write(b"\xff" * (1 << 20))
    refused(DumpError, path, "suspicious", tokens_per_step=64)
    rows = pa.array(np.zeros(1 << 24, np.int8))
    table = pa.table({"topk_ids": pa.FixedSizeListArray.from_arrays(rows, 2)})
    pq.write_table(table, tmp_path / "ids.parquet", compression="zstd")
    refused(DumpError, tmp_path / "ids.parquet", "suspicious", tokens_per_step=64)
    # Few ids, but many counts of experts.
    ids = np.zeros((9000, 1, 1), np.int64)
    ids[0] = 60_000
    np.save(tmp_path / "ids.npy", ids)
    refused(DumpError, tmp_path / "ids.npy", "--num-experts", tokens_per_step=1)


def test_fortran_order_is_read_from_npy_only(tmp_path: Path) -> None:
    ids = chosen(40, 3, 2, 6)
    np.save(tmp_path / "ids.npy", np.asfortranarray(ids))
    assert_counts(imported(tmp_path / "ids.npy", "topk", tokens_per_step=9)[1], ids, np.arange(40) // 9, 6)
    np.savez(tmp_path / "ids.npz", topk_ids=np.asfortranarray(ids))
    refused(DumpError, tmp_path / "ids.npz", "np.ascontiguousarray", tokens_per_step=9)
    np.save(tmp_path / "four.npy", np.asfortranarray(ids.reshape(4, 10, 3, 2)))
    refused(DumpError, tmp_path / "four.npy", "np.ascontiguousarray", step_per="request")


@pytest.mark.parametrize("write", [as_npy, as_npz, as_compressed, as_pt, as_rows])
def test_truncated_or_flipped_file_is_one_error(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path, chosen(60, 3, 2, 8), {})
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    variants = [
        whole[:cut] for cut in sorted({0, 3, 7, len(whole) - 2, *rng.integers(0, len(whole), 12).tolist()})
    ]
    for position in rng.integers(0, len(whole), 40).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        variants.append(bytes(flipped))
    errors = 0
    for number, variant in enumerate(variants):
        path.write_bytes(variant)
        try:
            import_dump(path, tmp_path / f"d{number}", "topk", Options(**PLACED, tokens_per_step=7))
        except (DumpError, UsageError) as error:
            assert "ids" in str(error)
            assert "\n" not in str(error)
            errors += 1
    assert errors >= 10


def test_damage_of_a_column_beside_the_ids_is_found(tmp_path: Path) -> None:
    source = as_npz(tmp_path, chosen(60, 2, 2, 4), {"step": np.arange(60) // 6})
    with zipfile.ZipFile(source) as archive:
        at = archive.getinfo("step.npy").header_offset
    damaged = bytearray(source.read_bytes())
    # The last step, whose lowest byte is in the last of 60 numbers.
    end = damaged.index(b"PK", at + 1)
    damaged[end - 8] ^= 1
    source.write_bytes(damaged)
    refused(DumpError, source, "CRC")


# ---- memory


@pytest.mark.parametrize("write", [as_npz, as_compressed, as_fixed_rows])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    monkeypatch.setattr(topk_blocks, "BLOCK_IDS", 1 << 14)
    ids = chosen(2000, 8, 4, 32)
    peaks = []
    pool = pa.default_memory_pool()
    for times in (1, 16):
        (tmp_path / str(times)).mkdir()
        source = write(tmp_path / str(times), np.tile(ids, (times, 1, 1)), {})
        counted = pa.proxy_memory_pool(pool)
        pa.set_memory_pool(counted)
        tracemalloc.start()
        try:
            reading = topk.read(source, Options(tokens_per_step=500))
            assert sum(chunk.load.sum() for chunk in reading.parts[0]()) == ids.size * times
            peaks.append(tracemalloc.get_traced_memory()[1] + counted.max_memory())
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(pool)
        assert source.stat().st_size > 20_000 * times
    assert peaks[1] < peaks[0] + ids.nbytes, peaks
