"""The bench of policies, from end to end, and its rows recomputed in plain loops."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.policy_bench import COLUMNS, NO_EPLB, Grid, Row, bench, synthetic
from benchmarks.routing import FAMILIES, PREFILL_EVERY, Shape, generate

RANKS, INTERVAL = 4, 12
SHAPE = Shape(steps=100, layers=2, experts=16, top_k=2, tokens=500)


def placed(weight: list[int], slots: int) -> list[int]:
    """DeepSeek's global algorithm: the expert of each slot."""
    copies = Counter(range(len(weight)))
    items = list(range(len(weight)))
    for _ in range(slots - len(weight)):
        items.append(max(copies, key=lambda expert: (weight[expert] / copies[expert], -expert)))
        copies[items[-1]] += 1
    share = {expert: weight[expert] / copies[expert] for expert in copies}
    assert len(set(share.values())) == len(share), "the order of ties is not the algorithm's"
    ranks: list[list[int]] = [[] for _ in range(RANKS)]
    for item in sorted(items, key=lambda expert: -share[expert]):
        free = [rank for rank in ranks if len(rank) < slots // RANKS]
        min(free, key=lambda rank: sum(share[expert] for expert in rank)).append(item)
    return [expert for rank in ranks for expert in rank]


def expected(load: npt.NDArray[np.int32], redundant: int, *, rearrange: bool) -> tuple[float, float]:
    """Balancedness in the last 40% of the steps with even splitting, and weights moved per 1,000 of them."""
    steps, layers, experts = load.shape
    first = int(0.6 * steps)
    total = moved = 0.0
    for layer in range(layers):
        slots = [*range(experts), *range(redundant)]
        for step in range(steps):
            if rearrange and step and step % INTERVAL == 0:
                old = slots
                slots = placed(load[step - INTERVAL : step, layer].sum(axis=0).tolist(), len(slots))
                if step >= first:
                    per_rank = len(slots) // RANKS
                    held = [
                        {*each[r * per_rank : (r + 1) * per_rank]}
                        for each in (old, slots)
                        for r in range(RANKS)
                    ]
                    moved += sum(len(held[RANKS + rank] - held[rank]) for rank in range(RANKS))
            if step >= first:
                copies = Counter(slots)
                tokens = np.array([load[step, layer, expert] / copies[expert] for expert in slots])
                ranks = tokens.reshape(RANKS, -1).sum(axis=1)
                total += ranks.mean() / ranks.max()
    return total / layers / (steps - first), 1000 * moved / (steps - first)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("bench")
    run = synthetic("bursty", 3, SHAPE, RANKS, folder / "run")
    grid = Grid(("deepseek", "static", "oracle"), ("even", "vllm", "lp"), (0, 1), (INTERVAL,))
    return bench("bursty", run, grid).rows


def test_rows_equal_a_computation_in_plain_loops(rows: list[Row]) -> None:
    load = generate("bursty", 3, SHAPE).load
    for redundant in (0, RANKS):
        for policy in ("static", "deepseek"):
            dispatch = "even" if redundant else "any"
            (row,) = (r for r in rows if (r.policy, r.redundant, r.dispatch) == (policy, redundant, dispatch))
            balancedness, moved = expected(load, redundant, rearrange=policy == "deepseek")
            assert row.balancedness == pytest.approx(balancedness, abs=1e-12)
            assert row.moved == pytest.approx(moved)
            assert row.rearrangements == (4 if policy == "deepseek" else 0)  # at steps 60, 72, 84 and 96


def test_gains_are_those_over_no_eplb_and_no_dispatch_beats_its_bound(rows: list[Row]) -> None:
    baseline, *others = rows
    assert (baseline.policy, baseline.redundant, baseline.gain) == (NO_EPLB, 0, 0)
    # Every policy with and without replicas: then `any`, and each dispatch; the oracle has none.
    assert len(others) == 2 * (1 + 3) + 2
    for row in others:
        assert row.gain == pytest.approx(row.balancedness - baseline.balancedness)
        assert row.gain_low <= row.gain <= row.gain_high
        if row.policy != "oracle":
            assert row.lp is not None
            assert row.balancedness <= row.lp + 1e-9


def test_families_are_what_they_are_called() -> None:
    shape = Shape(steps=80, layers=2, experts=8, top_k=2, tokens=200)
    for family in FAMILIES:
        routing = generate(family, 1, shape)
        assert (routing.load.sum(axis=2) == 2 * routing.num_tokens[:, None]).all()
        assert (routing.load <= routing.num_tokens[:, None, None]).all(), "a token chooses an expert once"
        assert (routing.load == generate(family, 1, shape).load).all()
        assert [phase == "prefill" for phase in routing.phase] == [
            family == "prefill/decode" and step % PREFILL_EVERY == 0 for step in range(shape.steps)
        ]


def test_command_writes_the_table_all_rows_and_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table of benchmarks.policy_bench -->\nold\n<!-- end of the table -->\nafter\n"
    )
    options = ["--families", "uniform", "--steps", "40", "--tokens", "32", "--policy", "vllm", "static"]
    options += ["--dispatch", "even", "vllm", "--slots-per-rank", "0", "1", "--intervals", "8"]
    command = [sys.executable, "-W", "error", "-m", "benchmarks.policy_bench", *options]
    outputs = ["--out", str(tmp_path / "out"), "--page", str(page)]
    printed = subprocess.run(
        [*command, *outputs], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert printed == (tmp_path / "out/bench.md").read_text()
    head, rule, baseline, best = printed.splitlines()
    assert tuple(cell.strip() for cell in head.strip("|").split("|")) == COLUMNS
    assert rule.count("|") == baseline.count("|") == best.count("|")
    assert baseline.startswith(f"| uniform | {NO_EPLB} | ")
    assert best.startswith("|  | vllm | ")
    assert page.read_text().splitlines() == [
        "before", "<!-- table of benchmarks.policy_bench -->", "", *printed.splitlines(), "",
        "<!-- end of the table -->", "after",
    ]  # fmt: skip
    with (tmp_path / "out/bench.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 1 + 2 * (1 + 2)
    html = (tmp_path / "out/bench.html").read_text()
    assert "<details>" in html
    assert "http" not in html


def test_workload_that_is_not_there_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.policy_bench", "--families", "--workload", "x=no/such.npz"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "policy_bench: no/such.npz: no such file or folder\n"


def test_file_that_needs_more_options_is_to_be_imported_first(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.tile(np.arange(4, dtype=np.uint8), (64, 2, 1)))
    command = [sys.executable, "-m", "benchmarks.policy_bench", "--families", "--workload", f"x={path}"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "--format topk" in found.stderr
    assert found.stderr.endswith("; or `eplb-analyze import` it with more options, and name the new folder\n")


def test_documented_table_has_the_current_columns() -> None:
    lines = (ROOT / "docs/bench.md").read_text().splitlines()
    head = lines[lines.index("<!-- table of benchmarks.policy_bench -->") + 2]
    assert tuple(cell.strip() for cell in head.strip("|").split("|")) == COLUMNS
