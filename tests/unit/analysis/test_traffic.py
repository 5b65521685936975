"""`traffic`: the matrix is what each rank's writer was given, summed here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli, one_error, without_times, write

from eplb_analyze import open_run
from eplb_analyze.analysis.traffic import traffic_report
from eplb_dump import ExpertLoadWriter

LAYERS, RANKS, SLOTS, STEPS = 3, 4, 8, 60
INCOMPLETE = {33}
Array = np.ndarray[Any, np.dtype[np.int64]]


def part(rank: int, step: int) -> Array:
    rng = np.random.default_rng(1000 * rank + step)
    load = rng.poisson(20 + 10 * rank, (LAYERS, SLOTS))
    load[:, 2 * rank] += 50  # its own first slot
    return load


def idle(rank: int, step: int) -> bool:
    return rank == 2 and step % 7 == 0


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traffic")
    for rank in range(RANKS):
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=SLOTS, ep_size=RANKS, ep_rank=rank, run_id="r",
            moe_layers=[3, 4, 7], ranks_per_node=2, segment_steps=25,
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                if step in INCOMPLETE and rank == 1:
                    continue
                if idle(rank, step):
                    writer.skip("dummy", step=step)
                else:
                    writer.record(step, part(rank, step), np.tile(np.arange(SLOTS), (LAYERS, 1)))
    return root


def reference(steps: range = range(STEPS), layers: tuple[int, ...] = (0, 1, 2)) -> Array:
    matrix = np.zeros((RANKS, RANKS), np.int64)
    for step in steps:
        for source in range(RANKS):
            if step not in INCOMPLETE and not idle(source, step):
                for slot in range(SLOTS):
                    matrix[source, slot // 2] += part(source, step)[list(layers), slot].sum()
    return matrix


def test_matrix_equals_the_reference(dump: Path) -> None:
    report = traffic_report(open_run(dump))
    expected = reference()
    assert np.array_equal(report.matrix, expected)
    assert (report.recorded, report.first_step, report.last_step) == (59, 0, 59)
    total = expected.sum()
    nodes = expected.reshape(2, 2, 2, 2).sum(axis=(1, 3))
    assert report.shares.same_rank == pytest.approx(np.trace(expected) / total)
    assert report.shares.same_node == pytest.approx((np.trace(nodes) - np.trace(expected)) / total)
    assert report.shares.other_node == pytest.approx(1 - np.trace(nodes) / total)
    sent, got = expected.sum(axis=1) / total, expected.sum(axis=0) / total
    assert report.by_chance.same_rank == pytest.approx(sum(sent * got))
    assert report.by_chance.other_node == pytest.approx(
        sent[:2].sum() * got[2:].sum() + sent[2:].sum() * got[:2].sum()
    )
    for i, layer in enumerate(report.layers):
        own = reference(layers=(i,))
        assert (layer.layer, layer.tokens) == ((3, 4, 7)[i], own.sum())
        assert layer.shares.same_rank == pytest.approx(np.trace(own) / own.sum())


def test_layer_and_range_limit_the_matrix(dump: Path) -> None:
    report = traffic_report(open_run(dump), 4, (10, 40))
    assert np.array_equal(report.matrix, reference(range(10, 40), (1,)))
    assert [t.layer for t in report.layers] == [4]
    assert report.recorded == 29


def test_tokens_are_summed_by_node(dump: Path) -> None:
    expected = reference()
    report = traffic_report(open_run(dump), by="node")
    assert np.array_equal(report.matrix, expected.reshape(2, 2, 2, 2).sum(axis=(1, 3)))
    assert report.shares == traffic_report(open_run(dump)).shares
    # A last node with fewer ranks.
    other = traffic_report(open_run(dump), by="node", ranks_per_node=3)
    assert other.notes == ["4 EP ranks cannot be divided evenly into nodes of 3: the last node has 1 rank"]
    uneven = other.matrix
    assert uneven.tolist() == [
        [expected[:3, :3].sum(), expected[:3, 3].sum()],
        [expected[3, :3].sum(), expected[3, 3]],
    ]


def test_pairs_and_receivers_are_ranked(dump: Path) -> None:
    expected = reference()
    report = traffic_report(open_run(dump))
    pairs = report.pairs(100)
    between = {(s, d): expected[s, d] for s in range(RANKS) for d in range(RANKS) if s != d}
    assert {(p.source, p.destination): p.tokens for p in pairs} == between
    assert [p.tokens for p in pairs] == sorted(between.values(), reverse=True)
    assert pairs[0].times_mean == pytest.approx(pairs[0].tokens / np.mean(list(between.values())))
    receivers = report.receivers()
    assert [r.tokens for r in receivers] == sorted(expected.sum(axis=0), reverse=True)
    first = receivers[0]
    assert first.busiest_source == expected[:, first.destination].argmax()
    assert first.from_others == pytest.approx(
        1 - expected[first.destination, first.destination] / first.tokens
    )


def test_nothing_is_summed_across_a_change_of_ep_size(tmp_path: Path) -> None:
    for rank in range(4):
        with ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=8, ep_size=4, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(20):
                if step < 10 or rank < 2:
                    size = 4 if step < 10 else 2
                    load = np.full((1, 8), 10 * (rank + 1))
                    writer.record(step, load, np.arange(8).reshape(1, 8), ep_size=size)
    report = traffic_report(open_run(tmp_path))
    assert report.matrix.tolist() == [[400, 400], [800, 800]]
    assert (report.ep_size, report.first_step, report.recorded) == (2, 10, 10)
    assert "steps 0 to 9 are left out" in report.notes[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"scope": "global"}, "with scope global"), ({"token_replication": 2}, "counted by 2 ranks")],
)
def test_dump_without_sources_is_an_error(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    write(tmp_path, ranks=1 if "scope" in options else 2, **options)
    one_error(cli("traffic", tmp_path), 3, "does not show which rank sent which tokens", word)


def test_invalid_input_is_an_error(dump: Path, tmp_path: Path) -> None:
    one_error(cli("traffic", "--layer", "5", dump), 2, "no MoE layer 5")
    one_error(cli("traffic", "--steps", "99-", dump), 2, "the run has no steps in 99-")
    write(tmp_path)
    one_error(cli("traffic", "--by", "node", tmp_path), 2, "number of ranks per node", "--ranks-per-node")
    assert cli("traffic", "--by", "node", "--ranks-per-node", "0", dump).returncode == 2


GOLDEN = """\
org/moe · run r
40 complete steps, 0-39 (03:12:04-03:12:04); 96,000 tokens × experts
                           of the tokens   by chance
────────────────────────────────────────────────────
stay on their rank                 50.1%       50.0%
go to a rank of the node           49.9%       50.0%
cross nodes                         0.0%        0.0%
tokens that leave their rank: from 49.8% in layer 1 to 50.0% in layer 0

% of a rank's tokens (row) that go to each rank (column)
       r0    r1
 r0  70.1  29.9
 r1  69.9  30.1
all  70.0  30.0

busiest receivers
rank   tokens   x mean   from others   most from
────────────────────────────────────────────────
  r0   67,221     1.40         49.9%          r0
  r1   28,779     0.60         49.9%          r1

busiest pairs of two ranks
from   to   tokens   of all   x mean pair
─────────────────────────────────────────
r1     r0   33,569   34.97%          1.40
r0     r1   14,348   14.95%          0.60
"""


def test_text_output(tmp_path: Path) -> None:
    write(tmp_path)
    result = cli("traffic", "--ranks-per-node", "2", tmp_path)
    told = re.sub(r"\d\d:\d\d:\d\d", "03:12:04", result.stdout)
    assert (result.returncode, result.stderr, told) == (0, "", GOLDEN)


@pytest.mark.parametrize("ranks", [16, 64])
def test_output_of_many_ranks_fits_the_width(tmp_path: Path, ranks: int) -> None:
    for rank in range(ranks):
        with ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=ranks, ep_size=ranks, ep_rank=rank, run_id="r"
        ) as writer:
            load = np.full((1, ranks), 100)
            load[0, rank] = 1_000_000
            writer.record(0, load, np.arange(ranks).reshape(1, ranks))
    for columns in (80, 120):
        result = cli("traffic", tmp_path, env={"COLUMNS": str(columns)})
        assert result.returncode == 0
        assert max(map(len, result.stdout.splitlines())) <= columns
        assert ("the matrix of 64 ranks is in --json" in result.stdout) == (ranks == 64)
        assert (f"\nr{ranks - 1} " in result.stdout) == (ranks < 64)


def test_json_output(tmp_path: Path) -> None:
    write(tmp_path)
    result = cli("traffic", "--json", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    document = without_times(json.loads(result.stdout))
    for pair in document["pairs"]:
        assert set(pair) == {"source", "destination", "tokens", "share", "times_mean"}
    for receiver in document["receivers"]:
        names = {"destination", "tokens", "times_mean", "from_others", "busiest_source"}
        assert set(receiver) == names
    assert [(p.pop("source"), p.pop("tokens")) for p in document.pop("pairs")] == [(1, 33569), (0, 14348)]
    assert [r["tokens"] for r in document.pop("receivers")] == [67221, 28779]
    assert document.pop("schema_version") == 1
    assert document == {
        "run": {"run_id": "r", "model": "org/moe"},
        "layer": None,
        "by": "rank",
        "ep_size": 2,
        "ranks_per_node": None,
        "steps": {
            "first": 0, "last": 39, "seen": 40, "recorded": 40, "dummy": 0, "not_sampled": 0, "dropped": 0,
            "rejected": 0, "incomplete": 0, "missing": 0, "retired": 0,
        },
        "first_step": 0,
        "last_step": 39,
        "recorded": 40,
        "missing_ranks": [],
        "tokens": 96000,
        "shares": {"same_rank": pytest.approx(48083 / 96000), "same_node": None, "other_node": None},
        "shares_by_chance": {"same_rank": pytest.approx(0.5), "same_node": None, "other_node": None},
        "matrix": [[33652, 14348], [33569, 14431]],
        "layers": [
            {"layer": layer, "tokens": 48000, "same_rank": pytest.approx(share, abs=1e-6),
             "same_node": None, "other_node": None}
            for layer, share in ((0, 0.499896), (1, 0.501833))
        ],
        "notes": [],
    }  # fmt: skip
