"""`ranks`: equal to a plain loop over the recorded arrays, and its output."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from helpers import cli, without_times
from small_run import MOE_LAYERS, Truth, write

from eplb_analyze import open_run
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.timeline import timeline
from eplb_dump import ExpertLoadWriter


def straggling(T: Any) -> tuple[list[float], list[float], int]:
    """How often each rank was the slowest, its cost in tokens, and the active pairs."""
    often, cost = ([float(sum(ranks)) for ranks in zip(*each, strict=True)] for each in reference.waiting(T))
    return often, cost, sum(row.any() for step in T for row in step)


def test_ranks_equal_a_plain_loop(truth: Truth) -> None:
    steps = truth.last()
    T = [truth.T[s] for s in steps]
    often, cost, active = straggling(T)
    report = rank_report(open_run(truth.root))
    assert (report.first_step, report.last_step, report.recorded) == (steps[0], steps[-1], len(steps))
    assert report.active == active
    uneven = ["3 EP ranks cannot be divided evenly into nodes of 2: the last node has 1 rank"]
    elastic = len(steps) < len(truth.T)
    assert (len(report.notes), report.notes[1:]) == ((2, uneven) if elastic else (0, []))
    assert [r.load for r in report.ranks] == sum(T).sum(axis=0).tolist()
    assert [r.slowest for r in report.ranks] == pytest.approx(often)
    np.testing.assert_allclose([r.excess_tokens for r in report.ranks], cost)
    loss = sum(cost)
    assert math.isclose(report.loss_tokens, loss)
    np.testing.assert_allclose([r.excess_share for r in report.ranks], np.divide(cost, loss))
    np.testing.assert_allclose([r.slowest_share for r in report.ranks], np.divide(often, active))
    assert report.idle_fraction == pytest.approx(reference.idle_fraction(T))
    mean = sum(T).mean(axis=1, keepdims=True)
    np.testing.assert_allclose([layer.ranks for layer in report.layers], sum(T) / mean)
    assert [layer.layer for layer in report.layers] == list(MOE_LAYERS)


def test_node_figures_combine_those_of_its_ranks(truth: Truth) -> None:
    report = rank_report(open_run(truth.root))
    assert [n.ranks for n in report.nodes] == ([[0, 1], [2]] if len(report.ranks) == 3 else [[0, 1], [2, 3]])
    for node in report.nodes:
        own = [report.ranks[r] for r in node.ranks]
        assert node.load == sum(r.load for r in own)
        assert node.slowest == pytest.approx(sum(r.slowest for r in own))
        assert node.excess_tokens == pytest.approx(sum(r.excess_tokens for r in own))
        assert node.times_mean == pytest.approx(np.mean([r.times_mean for r in own]))
        for layer in report.layers:
            assert layer.nodes[node.number] == pytest.approx(np.mean([layer.ranks[r] for r in node.ranks]))


def test_ranks_per_node_can_be_given(tmp_path: Path, local: Truth) -> None:
    write(tmp_path, ranks_per_node=None)
    said = without_times(json.loads(cli("ranks", "--json", local.root).stdout))
    assert said["nodes"]
    given = json.loads(cli("ranks", "--ranks-per-node", "2", "--json", tmp_path).stdout)
    assert without_times(given) == said
    # It overrides what the dump says, and the last node may have fewer ranks.
    report = rank_report(open_run(local.root), ranks_per_node=3)
    assert [node.ranks for node in report.nodes] == [[0, 1, 2], [3]]
    assert report.notes == ["4 EP ranks cannot be divided evenly into nodes of 3: the last node has 1 rank"]
    assert rank_report(open_run(local.root), ranks_per_node=8).notes == []
    [one, other] = report.nodes
    assert (one.load, other.load) == (sum(r.load for r in report.ranks[:3]), report.ranks[3].load)
    text = cli("ranks", "--by", "node", "--ranks-per-node", "3", tmp_path).stdout
    assert " causes the most waiting: " in text


def test_range_before_a_change_of_ep_size_has_the_earlier_ranks(tmp_path: Path) -> None:
    truth = write(tmp_path, elastic=True)
    report = rank_report(open_run(tmp_path), (3, 10))
    T = [truth.T[s] for s in (3, 4, 5, 8, 9)]
    assert (report.recorded, report.notes, len(report.ranks)) == (5, [], 4)
    assert [r.load for r in report.ranks] == sum(T).sum(axis=0).tolist()
    assert report.steps.to_json()["incomplete"] == 1


def test_token_replication_is_divided_out(tmp_path: Path, local: Truth) -> None:
    write(tmp_path, token_replication=4)
    once, plain = rank_report(open_run(tmp_path)), rank_report(open_run(local.root))
    assert [r.load * 4 for r in once.ranks] == [r.load for r in plain.ranks]
    assert once.loss_tokens * 4 == pytest.approx(plain.loss_tokens)
    one, other = (timeline(open_run(p), "sglang", 1).mean for p in (tmp_path, local.root))
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("ep_size", [8, 32, 64])
def test_output_of_many_ranks_and_layers_fits_the_width(tmp_path: Path, ep_size: int, columns: int) -> None:
    load = np.random.default_rng(3).poisson(9, (5, 40, ep_size * 2))
    load[:, :, 0] *= 5
    load[:, 7, :] = 0
    slots = np.tile(np.arange(ep_size * 2), (40, 1))
    options: dict[str, Any] = {"num_logical_experts": ep_size * 2, "ep_size": ep_size, "scope": "global"}
    with ExpertLoadWriter(tmp_path, model="m", **options) as writer:
        for one in load:
            writer.record(None, one, slots)
    for command in ("ranks", "timeline", "placement"):
        result = cli(command, tmp_path, env={"COLUMNS": str(columns)})
        assert result.returncode == 0, result.stderr
        assert max(map(len, result.stdout.splitlines())) <= columns
    out = cli("ranks", "--all", tmp_path, env={"COLUMNS": str(columns)}).stdout
    assert "rank 0 causes the most waiting:" in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["6"])
    assert "++" in row or "2." in row or "3." in row
    assert next(line for line in out.splitlines() if line.split()[:1] == ["7"]).split()[1] == "–"


def test_only_uneven_layers_are_shown_and_the_worst_cell_is_named(tmp_path: Path) -> None:
    load = np.full((4, 16), 100)
    load[2, 5], load[3, 1], load[1, 0] = 40, 130, 109
    options: dict[str, Any] = {"num_logical_experts": 16, "ep_size": 16, "scope": "global"}
    with ExpertLoadWriter(tmp_path, model="m", moe_layers=[3, 4, 5, 6], **options) as writer:
        writer.record(None, load, np.tile(np.arange(16), (4, 1)))
    out = cli("ranks", tmp_path).stdout.splitlines()
    assert "farthest from the mean: layer 5, rank 5: 0.42x the mean" in out
    shown = [line.split()[0] for line in out if line.split()[:1] in (["3"], ["4"], ["5"], ["6"])]
    assert shown == ["5", "6"]
    assert any(line.startswith("2 of 4 layers within 10") and "--all shows them" in line for line in out)
    everything = cli("ranks", "--all", tmp_path).stdout
    assert "--all" not in everything
    assert all(f"\n    {layer} " in everything for layer in (3, 4, 5, 6))


def test_each_column_is_numbered_if_ranks_are_left_out(tmp_path: Path) -> None:
    """Without numbers a reader counts on from the last one and finds the wrong rank."""
    slow = [1, 18, 19, 29, 35, 49, 62]
    load = np.full((7, 1, 64), 10)
    load[range(7), 0, slow] = 15
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=64, ep_size=64, scope="global") as writer:
        for one in load:
            writer.record(None, one, np.arange(64)[None])
    out = cli("ranks", "--all", tmp_path).stdout
    names, cells = (next(li for li in out.splitlines() if li.split()[:1] == [w]) for w in ("layer", "0"))
    shown = names.split()[1:]
    assert len(shown) == len(cells.split()) - 1
    assert [name for name, cell in zip(shown, cells.split()[1:], strict=True) if cell == "+1"] == [
        f"r{rank}" for rank in slow
    ]


def test_equal_ranks_cost_nothing_and_a_layer_without_tokens_has_no_figures(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.array([[5, 5], [0, 0]]), np.array([[0, 1]] * 2))
    document = json.loads(cli("ranks", "--json", tmp_path).stdout)
    assert (document["active"], document["loss_tokens"], document["idle_fraction"]) == (1, 0, 0)
    assert [r["slowest"] for r in document["ranks"]] == [0, 0]
    assert [r["excess_share"] for r in document["ranks"]] == [None, None]
    assert [layer["ranks"] for layer in document["layers"]] == [[1, 1], [None, None]]
    assert "no step has a token" in cli("timeline", "--layer", "1", tmp_path).stdout
    assert cli("ranks", tmp_path).returncode == 0
    assert cli("timeline", tmp_path).returncode == 0
