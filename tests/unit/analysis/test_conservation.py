"""`check`: loads that contradict each other or `num_tokens`, found in loads made of single tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, write
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.conservation import Conservation
from eplb_analyze.errors import NotInDumpError
from eplb_dump import ExpertLoadWriter

EXPERTS, TOP_K = 8, 3


def routed(rng: np.random.Generator, tokens: int, layers: int = 2) -> Any:
    """Loads ``[layers, experts]`` of tokens that each go to TOP_K experts."""
    ids = np.argsort(rng.random((layers, tokens, EXPERTS)), axis=2)[:, :, :TOP_K].reshape(layers, -1)
    return np.stack([np.bincount(own, minlength=EXPERTS) for own in ids])


def findings(root: Path) -> list[tuple[str, str]]:
    return [(f.code, f.text) for f in check_run(open_run(root)).findings if f.severity == "error"]


def record(root: Path, steps: list[list[tuple[Any, int | None]]], **options: Any) -> None:
    """Write a run; ``steps``: the load and ``num_tokens`` of each rank."""
    layers = steps[0][0][0].shape[0]
    scope = "local" if len(steps[0]) > 1 else "global"
    defaults: dict[str, Any] = {"model": "m", "num_logical_experts": EXPERTS, "ep_size": 2, "run_id": "r"}
    for rank in range(len(steps[0])):
        with ExpertLoadWriter(root, ep_rank=rank, scope=scope, **{**defaults, **options}) as writer:
            for step, of_step in enumerate(steps):
                load, tokens = of_step[rank]
                writer.record(step, load, np.tile(np.arange(EXPERTS), (layers, 1)), num_tokens=tokens)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("padded", "lost"), [(0, 0), (7, 0), (0, 5), (4, 6)])
def test_padding_and_lost_tokens_are_counted(tmp_path: Path, ranks: int, padded: int, lost: int) -> None:
    rng = np.random.default_rng(3)
    odd = rng.permutation(30)[: padded + lost]
    more, fewer = set(odd[:padded].tolist()), set(odd[padded:].tolist())
    steps = []
    for step in range(30):
        tokens = [int(rng.integers(10, 40)) for _ in range(ranks)]
        # Only the last rank's router counts what it should not.
        counted = [*tokens[:-1], tokens[-1] + 9 * (step in more) - 2 * (step in fewer)]
        steps.append([(routed(rng, n), t) for n, t in zip(counted, tokens, strict=True)])
    record(tmp_path, steps)
    found = findings(tmp_path)
    if not more and not fewer:
        assert found == []
        return
    [(code, text)] = found
    assert code == "num_tokens"
    steps_text = f"{len(odd)} steps, starting at step {odd.min()}"
    assert text.startswith(f"load is not num_tokens × {TOP_K} in {steps_text}: ")
    assert (f"too many in {padded}" in text) == bool(padded)
    assert (f"too few in {lost}" in text) == bool(lost)


@settings(max_examples=15)
@given(data=st.data())
def test_tokens_stated_by_the_wrong_rank_are_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What one rank states too many another states too few, so the sums over ranks are right."""
    steps, ranks = 12, 4
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = rng.integers(10, 40, (steps, ranks))
    stated, odd = tokens.copy(), {}
    for step in data.draw(st.lists(st.integers(0, steps - 1), max_size=5, unique=True)):
        more, fewer = data.draw(st.permutations(range(ranks)))[:2]
        shift = data.draw(st.integers(1, 9))
        stated[step, more] += shift
        stated[step, fewer] -= shift
        odd[step] = {more, fewer}
    root = tmp_path_factory.mktemp("run")
    loads = [[routed(rng, n) for n in row] for row in tokens.tolist()]
    runs = [list(zip(row, said, strict=True)) for row, said in zip(loads, stated.tolist(), strict=True)]
    record(root, runs, ep_size=ranks, segment_steps=5)
    found = [f for f in check_run(open_run(root)).findings if f.code == "num_tokens"]
    if not odd:
        assert found == []
        return
    [finding] = found
    assert finding.severity == "warning"
    assert f"their num_tokens × {TOP_K}, although the sums over ranks are: " in finding.text
    told = []
    for rank in range(ranks):
        own = sorted(step for step, both in odd.items() if rank in both)
        if own:
            steps_text = f"{len(own)} steps, starting at step {own[0]}" if len(own) > 1 else f"step {own[0]}"
            told.append(f"rank {rank} in {steps_text}")
    assert finding.text.endswith("are: " + ", ".join(told))


def test_ranks_that_split_their_tokens_otherwise_than_stated_are_no_contradiction(tmp_path: Path) -> None:
    """Each rank states the tokens of its group and routes half of them, more or less."""
    rng = np.random.default_rng(1)
    steps = []
    for step in range(30):
        parts = [10 + step % 3, 14 - step % 3]
        steps.append([(routed(rng, n), 24) for n in parts])
    record(tmp_path, steps)
    assert not [f for f in check_run(open_run(tmp_path)).findings if f.code == "num_tokens"]


def test_step_in_which_a_rank_does_not_state_its_tokens_is_not_judged(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    steps = [
        [(routed(rng, 20), 20), (routed(rng, 10 + step), None if step % 2 else 10 + step)]
        for step in range(20)
    ]
    record(tmp_path, steps)
    assert findings(tmp_path) == []
    tokens = open_run(tmp_path).steps()["num_tokens"].to_list()
    assert tokens == [None if step % 2 else 30 + step for step in range(20)]


def test_tokens_that_are_no_multiple_at_all_are_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    record(tmp_path, [[(routed(rng, 64), 20 + step)] for step in range(20)])
    [(code, text)] = findings(tmp_path)
    assert code == "num_tokens"
    assert text.startswith(
        f"load is not a fixed multiple of num_tokens: {64 * 3 / 39:.2f} to {64 * 3 / 20:.2f}"
    )


def test_load_without_stated_tokens_contradicts(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    steps = [[(routed(rng, 5), 5)] for _ in range(9)]
    steps[4] = [(routed(rng, 2), 0)]
    steps[6] = [(routed(rng, 0), 0)]
    record(tmp_path, steps)
    assert findings(tmp_path) == [
        ("num_tokens", f"load is not num_tokens × {TOP_K} in step 4: too many in 1 (is padding counted?)")
    ]


@pytest.mark.parametrize("named", [True, False])
def test_silent_layer_is_found_if_the_writer_names_it(tmp_path: Path, named: bool) -> None:
    rng = np.random.default_rng(7)
    loads = [routed(rng, 9, layers=4) for _ in range(12)]
    for load in loads:
        load[[1, 3]] = 0
    record(tmp_path, [[(load, 9)] for load in loads], moe_layers=[3, 6, 8, 10] if named else None)
    found = findings(tmp_path)
    assert [code for code, _ in found] == ["conservation"] * named
    if named:
        assert found[0][1].startswith("layers 6, 10 never got a token")
        with pytest.raises(NotInDumpError, match="recorded layers: 3, 6, 8, 10"):
            open_run(tmp_path).layer_index(7)


def test_layer_that_is_silent_for_a_whole_segment_is_no_dense_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    loads = [routed(rng, 9) for _ in range(32)]
    for load in loads[16:]:
        load[1] = 0
    record(tmp_path, [[(load, None)] for load in loads], segment_steps=16)
    [(code, text)] = findings(tmp_path)
    assert (code, "16 steps, starting at step 16" in text) == ("conservation", True)


def test_tokens_of_several_global_writers_count_once(tmp_path: Path) -> None:
    write(tmp_path, ranks=2, scope="global")
    assert findings(tmp_path) == []
    assert set(open_run(tmp_path).steps()["num_tokens"].to_list()) == {600}


@given(data=st.data())
def test_any_run_of_one_constant_is_right_and_any_other_is_not(data: st.DataObject) -> None:
    """Top-k times token replication is one number, whatever it is; most steps follow it."""
    each = data.draw(st.integers(1, 64))
    tokens = data.draw(st.lists(st.integers(0, 500), min_size=5, max_size=40))
    wrong = data.draw(
        st.dictionaries(st.integers(0, len(tokens) - 1), st.integers(1, 50), max_size=len(tokens) // 6)
    )
    steps, stated = np.arange(len(tokens)), np.array(tokens)
    total = stated * each
    for step, more in wrong.items():
        total[step] += more
    conservation = Conservation()
    cut = data.draw(st.integers(1, len(tokens)))
    for part in (slice(0, cut), slice(cut, None)):
        conservation.add(steps[part], np.stack([total[part]] * 3, axis=1), stated[part])
    found = list(conservation.token_findings())
    if not wrong:
        assert found == []
    elif (stated > 0).sum() > 3 * len(wrong):
        [finding] = found
        assert f"load is not num_tokens × {each} in " in finding.text
        first = min(wrong)
        expected = f"{len(wrong)} steps, starting at step {first}" if len(wrong) > 1 else f"step {first}"
        assert expected in finding.text


def test_summary_hints_at_contradicting_loads_and_names_check(tmp_path: Path) -> None:
    """By the sums that it reads anyway: of each layer, and of what the writers state; as a merge of parts."""
    rng = np.random.default_rng(5)
    good = [[(routed(rng, 20), 20)] for _ in range(12)]
    unequal = [*good[:4], [(routed(rng, 20) + np.outer([0, 1], np.arange(EXPERTS) == 0), None)], *good[5:]]
    fewer = [*good[:4], [(routed(rng, 19), 20)], *good[5:]]
    for name, steps, fact in (
        ("good", good, None),
        ("unequal", unequal, "loads contradict each other: layers got different numbers of tokens in step 4"),
        ("fewer", fewer, "loads contradict num_tokens: load is not num_tokens × 3 in step 4"),
    ):
        record(tmp_path / name, steps)
        out = " ".join(cli("summary", tmp_path / name, env={"COLUMNS": "400"}).stdout.split())
        assert ("loads contradict" in out) == (fact is not None)
        if fact is not None:
            assert f"{fact}; `eplb-analyze check {tmp_path / name}` explains it" in out
        found = json.loads(cli("summary", "--json", tmp_path / name).stdout)["contradictions"]
        assert [f["code"] for f in found] == [code for code, _ in findings(tmp_path / name)]


def test_merged_parts_find_what_the_whole_finds(tmp_path: Path) -> None:
    """A layer without tokens in one part only, and steps whose layers differ in another."""
    record(tmp_path, [[(routed(np.random.default_rng(1), 5), 5)]])
    run = open_run(tmp_path)
    totals = np.array([[15, 15], [15, 0], [15, 0], [15, 15], [15, 12]])
    whole, merged = Conservation(), Conservation()
    whole.add(np.arange(5), totals, np.full(5, 5))
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        one = Conservation()
        one.add(np.arange(5)[part], totals[part] / 1.0, np.full(5, 5)[part])
        merged.merge(one)
    assert [*merged.findings_of_sums(run)] == [*whole.findings_of_sums(run)]
    assert "in 3 steps, starting at step 1" in next(whole.findings_of_sums(run)).text
