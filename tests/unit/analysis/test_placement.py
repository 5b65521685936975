"""`placement`: equal to a plain loop over the recorded maps, and its output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import cli, one_error
from small_run import EXPERTS, MOE_LAYERS, Truth, write

from eplb_analyze import open_run
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_dump import ExpertLoadWriter


@pytest.mark.parametrize("step", [0, 9, 10, 12, 13, 14, 29])
def test_placement_is_the_one_in_force_at_the_step(truth: Truth, step: int) -> None:
    report = placement_report(open_run(truth.root), step)
    for row, placed in zip(truth.maps[step].tolist(), report.layers, strict=True):
        per_rank = len(row) // placed.ep_size
        assert placed.ranks == [row[i : i + per_rank] for i in range(0, len(row), per_rank)]
        copies = [row.count(e) for e in range(EXPERTS)]
        assert placed.replicas == copies
        assert (placed.replicas_min, placed.replicas_max) == (min(copies), max(copies))
        assert placed.replicated == sum(c > 1 for c in copies)
        assert placed.empty_slots == row.count(-1)
        assert placed.twice_on_a_rank == sum(own.count(e) > 1 for own in placed.ranks for e in range(EXPERTS))
        index = MOE_LAYERS.index(placed.layer)
        since = step
        while since - 1 in truth.maps and np.array_equal(truth.maps[since - 1][index], row):
            since -= 1
        assert placed.since == (since if since > 7 else 0)


@pytest.mark.parametrize(("before", "after"), [(0, 29), (29, 0), (9, 10), (11, 13), (2, 8), (13, 25)])
def test_changes_equal_a_plain_loop(truth: Truth, before: int, after: int) -> None:
    report = placement_report(open_run(truth.root), after, before)
    assert report.changes is not None
    changed = {c.layer: c for c in report.changes}
    for index, layer in enumerate(MOE_LAYERS):
        old, new = truth.maps[before][index].tolist(), truth.maps[after][index].tolist()
        if old == new:
            assert layer not in changed
            continue
        change = changed[layer]
        # Three slots per rank; a rank that does not exist holds nothing.
        held, holds = ([set(row[3 * r : 3 * r + 3]) - {-1} for r in range(4)] for row in (old, new))
        came = [(r, e) for r in range(4) for e in holds[r] - held[r]]
        from_afar = [e for r, e in came if not any(e in held[o] for o in range(4) if o // 2 == r // 2)]
        assert (change.experts_crossed_ranks, change.experts_crossed_nodes) == (len(came), len(from_afar))
        same = len(old) == len(new)
        assert change.slots_changed == (
            sum(a != b for a, b in zip(old, new, strict=same)) if same else len(new)
        )
        for r in range(4):
            [found] = [c for c in change.ranks if c.rank == r] or [None]
            assert (found.experts_in if found else []) == sorted(holds[r] - held[r])
            assert (found.experts_out if found else []) == sorted(held[r] - holds[r])
    sizes = [len(truth.maps[s][0]) for s in (before, after)]
    assert any("compared by their numbers" in note for note in report.notes) == (sizes[0] != sizes[1])


def test_no_node_figures_if_the_dump_has_no_ranks_per_node(tmp_path: Path) -> None:
    write(tmp_path, ranks_per_node=None)
    run = open_run(tmp_path)
    changes = placement_report(run, 20, 0).changes
    assert changes is not None
    assert [c.experts_crossed_nodes for c in changes] == [None, None]
    assert (rank_report(run).nodes, rank_report(run).layers[0].nodes) == ([], [])
    assert "to nodes" not in cli("placement", "--against", "0", tmp_path).stdout
    one_error(cli("ranks", "--by", "node", tmp_path), 2, "--ranks-per-node")


def test_unknown_placement_is_an_error(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.ones((1, 2), int), None)
    one_error(cli("placement", tmp_path), 2, "no placement is known at step 0")


def test_layers_alike_are_one_sentence_and_the_others_rows(tmp_path: Path) -> None:
    """Layer 5 of eight has three replicas of an expert; the others have two of two experts."""
    usual, other = [0, 1, 2, 0, 1, 3], [0, 1, 2, 0, 3, 0]
    placed = np.array([other if layer == 5 else usual for layer in range(8)])
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=4, ep_size=2, scope="global") as writer:
        for step in range(3):
            writer.record(step, np.ones((8, 6), int), placed)
    lines = cli("placement", tmp_path).stdout.splitlines()
    assert any(line.startswith("7 of 8 layers: since step 0") for line in lines)
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == ["5"]
    assert "--all shows a row for each of 8 layers" in lines
    lines = cli("placement", "--all", tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == [str(n) for n in range(8)]
    assert not any("--all" in line for line in lines)
