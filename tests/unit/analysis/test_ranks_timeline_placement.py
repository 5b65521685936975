"""`ranks`, `timeline` and `placement`: equal to plain loops over the known arrays, and as they look."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from helpers import assert_golden, cli, one_error

from eplb_analyze import open_run
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.metrics.formulas import FORMULAS
from eplb_dump import ExpertLoadWriter

EXPERTS, MOE_LAYERS = 6, (3, 5)


@dataclass
class Truth:
    """What was written: of each complete step the tokens [layers, ranks], and the placements."""

    root: Path
    T: dict[int, Any] = field(default_factory=dict)
    #: step -> physical_to_logical [layers, slots], of every step that a rank recorded.
    maps: dict[int, Any] = field(default_factory=dict)

    def last(self) -> list[int]:
        """The steps of the last shape."""
        steps = sorted(self.T)
        ranks = self.T[steps[-1]].shape[1]
        return [s for s in steps if self.T[s].shape[1] == ranks]


def placements(slots: int, generation: int) -> Any:
    """Each expert once, an empty slot, replicas; another generation is another order."""
    row = np.r_[np.arange(EXPERTS), -1, np.arange(slots - EXPERTS - 1) % 4]
    at = np.arange(slots)
    return np.stack([row[(at * 5 + generation * 5) % slots], row[(at * 7 + generation * 3 + 1) % slots]])


def loads(step: int, writers: int, slots: int) -> Any:
    """Scattered counts [writers, layers, slots], the same on every machine."""
    rank, layer, slot = np.indices((writers, 2, slots))
    return (slot * slot * 7 + slot * step * 5 + rank * 11 + layer * 17 + step * step * 3) % 23


def write(
    root: Path, *, scope: str = "local", elastic: bool = False, steps: int = 30, **options: Any
) -> Truth:
    """Four ranks, two a node; rank 1 idles, all idle, one drops a step, layer 5 idles, all are equal."""
    truth = Truth(root)
    defaults: dict[str, Any] = {
        "model": "org/moe", "num_logical_experts": EXPERTS, "ep_size": 4, "run_id": "r", "segment_steps": 8,
        "moe_layers": MOE_LAYERS, "ranks_per_node": 2, "scope": scope,
    }  # fmt: skip
    writers = [
        ExpertLoadWriter(root, ep_rank=rank, **{**defaults, **options})
        for rank in range(4 if scope == "local" else 1)
    ]
    for step in range(steps):
        shape = (3, 9) if elastic and step >= 20 else (4, 12)
        ep_size, slots = shape
        placement = placements(slots, (step >= 10) + 2 * (step >= 14))
        placement[1] = placements(slots, 0)[1] if step < 12 else placement[1]
        own = loads(step, len(writers), slots)
        own[:, :, placement[0] < 0] = 0
        if step == 9:
            own[:] = 3
        if step == 11:
            own[:, 1] = 0
        idle = {4: [1], 6: range(4)}.get(step, [])
        for rank, writer in enumerate(writers):
            if rank in idle:
                writer.skip("dummy")
                own[rank] = 0
            elif step == 7 and rank == len(writers) // 2:
                writer.skip("dropped")
            elif rank < ep_size:
                writer.record(step, own[rank], placement, ep_size=ep_size)
            else:
                own[rank] = 0
        if step not in (6, 7):
            truth.T[step] = own.sum(axis=0).reshape(2, ep_size, -1).sum(axis=2)
        if step != 6:
            truth.maps[step] = placement
    for writer in writers:
        writer.close()
    return truth


KINDS: dict[str, dict[str, Any]] = {"local": {}, "global": {"scope": "global"}, "elastic": {"elastic": True}}


@pytest.fixture(scope="module", params=KINDS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return write(tmp_path_factory.mktemp("local"))


# ---- ranks


def straggling(T: Any) -> tuple[Counter[int], Counter[int], int]:
    """How often each rank was the slowest, what that cost times the number of ranks, active pairs."""
    often, cost, active = Counter[int](), Counter[int](), 0
    for step in T:
        for row in step.tolist():
            active += max(row) > 0
            if max(row) > min(row):
                often[row.index(max(row))] += 1
                cost[row.index(max(row))] += max(row) * len(row) - sum(row)
    return often, cost, active


def test_ranks_are_those_of_a_plain_loop(truth: Truth) -> None:
    steps = truth.last()
    T = [truth.T[s] for s in steps]
    often, cost, active = straggling(T)
    size = T[0].shape[1]
    report = rank_report(open_run(truth.root))
    assert (report.first_step, report.last_step, report.recorded) == (steps[0], steps[-1], len(steps))
    assert report.active == active
    assert len(report.notes) == (len(steps) < len(truth.T))
    assert [r.load for r in report.ranks] == sum(T).sum(axis=0).tolist()
    assert [r.slowest for r in report.ranks] == [often[r] for r in range(size)]
    np.testing.assert_allclose([r.excess_tokens for r in report.ranks], [cost[r] / size for r in range(size)])
    loss = sum(cost.values()) / size
    assert math.isclose(report.loss_tokens, loss)
    np.testing.assert_allclose(
        [r.excess_share for r in report.ranks], [cost[r] / size / loss for r in range(size)]
    )
    np.testing.assert_allclose(
        [r.slowest_share for r in report.ranks], [often[r] / active for r in range(size)]
    )
    assert report.idle_fraction == pytest.approx(reference.idle_fraction(T))
    mean = sum(T).mean(axis=1, keepdims=True)
    np.testing.assert_allclose([layer.ranks for layer in report.layers], sum(T) / mean)
    assert [layer.layer for layer in report.layers] == list(MOE_LAYERS)


def test_nodes_put_their_ranks_together(truth: Truth) -> None:
    report = rank_report(open_run(truth.root))
    assert [n.ranks for n in report.nodes] == ([[0, 1], [2]] if len(report.ranks) == 3 else [[0, 1], [2, 3]])
    for node in report.nodes:
        own = [report.ranks[r] for r in node.ranks]
        assert node.load == sum(r.load for r in own)
        assert node.slowest == sum(r.slowest for r in own)
        assert node.excess_tokens == pytest.approx(sum(r.excess_tokens for r in own))
        assert node.times_mean == pytest.approx(np.mean([r.times_mean for r in own]))
        for layer in report.layers:
            assert layer.nodes[node.number] == pytest.approx(np.mean([layer.ranks[r] for r in node.ranks]))


def test_nodes_of_a_dump_that_does_not_say_them(tmp_path: Path, local: Truth) -> None:
    write(tmp_path, ranks_per_node=None)
    said = json.loads(cli("ranks", "-o", "json", local.root).stdout)
    assert said["nodes"]
    assert json.loads(cli("ranks", "--ranks-per-node", "2", "-o", "json", tmp_path).stdout) == said
    # It wins over what the dump says, and a last node may have fewer ranks.
    report = rank_report(open_run(local.root), ranks_per_node=3)
    assert [node.ranks for node in report.nodes] == [[0, 1, 2], [3]]
    [one, other] = report.nodes
    assert (one.load, other.load) == (sum(r.load for r in report.ranks[:3]), report.ranks[3].load)
    text = cli("ranks", "--by", "node", "--ranks-per-node", "3", tmp_path).stdout
    assert "waiting most for node " in text


def test_a_range_of_steps_before_the_change_has_its_own_ranks(tmp_path: Path) -> None:
    truth = write(tmp_path, elastic=True)
    report = rank_report(open_run(tmp_path), (3, 10))
    T = [truth.T[s] for s in (3, 4, 5, 8, 9)]
    assert (report.recorded, report.notes, len(report.ranks)) == (5, [], 4)
    assert [r.load for r in report.ranks] == sum(T).sum(axis=0).tolist()
    assert report.steps.to_json()["incomplete"] == 1


def test_token_replication_is_divided_out_of_ranks_and_timeline(tmp_path: Path, local: Truth) -> None:
    write(tmp_path, token_replication=4)
    once, plain = rank_report(open_run(tmp_path)), rank_report(open_run(local.root))
    assert [r.load * 4 for r in once.ranks] == [r.load for r in plain.ranks]
    assert once.loss_tokens * 4 == pytest.approx(plain.loss_tokens)
    one, other = (timeline(open_run(p), "sglang", 1).mean for p in (tmp_path, local.root))
    assert one == pytest.approx(other, abs=1e-5)


# ---- timeline


@pytest.mark.parametrize("bins", [1, 7, 1000])
@pytest.mark.parametrize("layer", [None, 5])
@pytest.mark.parametrize("formula", [*FORMULAS, "idle_fraction"])
def test_bins_are_those_of_a_plain_loop(truth: Truth, formula: str, layer: int | None, bins: int) -> None:
    result = timeline(open_run(truth.root), formula, bins, layer)
    count = min(bins, 30)
    assert len(result.bins) == count
    assert [b.first_step for b in result.bins[1:]] == [b.last_step + 1 for b in result.bins[:-1]]
    assert (result.bins[0].first_step, result.bins[-1].last_step) == (0, 29)
    sizes = {b.last_step - b.first_step + 1 for b in result.bins}
    assert max(sizes) - min(sizes) <= 1
    rows = slice(None) if layer is None else slice(1, 2)
    T = {s: t[rows] for s, t in truth.T.items() if t[rows].any()}
    for b in result.bins:
        here = [T[s] for s in T if b.first_step <= s <= b.last_step]
        assert b.steps == len(here)
        if not here:
            assert (b.mean, b.min, b.max) == (None, None, None)
        elif formula == "idle_fraction":
            assert b.mean == pytest.approx(reference.idle_fraction(here))
            each = [reference.idle_fraction([t]) for t in here]
            assert (b.min, b.max) == pytest.approx((min(each), max(each)))
        else:
            values = [reference.per_step(formula, [t])[0] for t in here]
            assert (b.mean, b.min, b.max) == pytest.approx((np.mean(values), min(values), max(values)))
    known = [b for b in result.bins if b.min is not None]
    assert (result.min, result.max) == (min(b.min for b in known), max(b.max for b in known))


def test_one_bin_is_the_summary(truth: Truth) -> None:
    run = open_run(truth.root)
    figures = summarize(run)
    assert timeline(run, "idle_fraction", 1).bins[0].mean == pytest.approx(figures.idle_fraction)
    assert timeline(run, bins=1).mean == pytest.approx(figures.spreads["balancedness"].mean)
    shapes = [(c.first_step, c.last_step, c.ep_size) for c in figures.configurations]
    assert [(c.first_step, c.last_step, c.ep_size) for c in timeline(run).configurations] == shapes


def test_rearrangements_are_marked_and_a_range_is_kept(local: Truth) -> None:
    run = open_run(local.root)
    assert timeline(run).rearrangements == [r.first_step for r in summarize(run).rearrangements]
    assert timeline(run, layer=3).rearrangements == [10, 14]
    assert timeline(run, layer=5, steps=(0, 14)).rearrangements == [12]
    part = timeline(run, steps=(5, 9), bins=4)
    assert [(b.first_step, b.steps) for b in part.bins] == [(5, 1), (6, 0), (7, 0), (8, 1)]
    frame = part.frame()
    assert frame.columns == ["first_step", "last_step", "steps", "mean", "min", "max"]
    assert frame["mean"].null_count() == 2
    assert frame.filter(frame["steps"] > 0)["mean"].to_list() == [part.bins[0].mean, part.bins[3].mean]


def test_an_unknown_formula_is_refused(local: Truth) -> None:
    with pytest.raises(ValueError, match="no formula 'x'; there are: balancedness"):
        timeline(open_run(local.root), "x")


# ---- placement


@pytest.mark.parametrize("step", [0, 9, 10, 12, 13, 14, 29])
def test_the_placement_is_the_one_in_force(truth: Truth, step: int) -> None:
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
def test_changes_are_those_of_a_plain_loop(truth: Truth, before: int, after: int) -> None:
    report = placement_report(open_run(truth.root), after, before)
    assert report.changes is not None
    changed = {c.layer: c for c in report.changes}
    for index, layer in enumerate(MOE_LAYERS):
        old, new = truth.maps[before][index].tolist(), truth.maps[after][index].tolist()
        if old == new:
            assert layer not in changed
            continue
        change = changed[layer]
        # Three slots a rank; a rank that is not there holds nothing.
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


def test_nodes_that_are_not_known(tmp_path: Path) -> None:
    write(tmp_path, ranks_per_node=None)
    run = open_run(tmp_path)
    changes = placement_report(run, 20, 0).changes
    assert changes is not None
    assert [c.experts_crossed_nodes for c in changes] == [None, None]
    assert (rank_report(run).nodes, rank_report(run).layers[0].nodes) == ([], [])
    assert "to nodes" not in cli("placement", "--against", "0", tmp_path).stdout
    one_error(cli("ranks", "--by", "node", tmp_path), 2, "--ranks-per-node")


# ---- as they look


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ranks.txt", "ranks"),
        ("ranks.json", "ranks"),
        ("ranks-by-node.txt", "ranks --by node"),
        ("timeline.txt", "timeline --bins 10"),
        ("timeline.json", "timeline --bins 10"),
        ("placement.txt", "placement --experts"),
        ("placement-against.txt", "placement --against 11"),
        ("placement-layer.txt", "placement --layer 3 --step 12 --against 9 --experts"),
        ("placement-layer.json", "placement --layer 3 --step 12 --against 9"),
    ],
)
def test_golden_output(local: Truth, name: str, command: str) -> None:
    form = ["--output", "json"] if name.endswith("json") else []
    result = cli(*command.split(), *form, local.root)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert_golden(name, result.stdout)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("ep_size", [8, 32, 64])
def test_many_ranks_and_layers_fit(tmp_path: Path, ep_size: int, columns: int) -> None:
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
    out = cli("ranks", tmp_path, env={"COLUMNS": str(columns)}).stdout
    assert "waiting most for rank 0:" in out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["6"])
    assert "++" in row or "2." in row or "3." in row
    assert next(line for line in out.splitlines() if line.split()[:1] == ["7"]).split()[1] == "–"


def test_where_ranks_are_left_out_each_column_has_its_number(tmp_path: Path) -> None:
    """Else a reader counts on from the last number, and finds another rank."""
    slow = [1, 18, 19, 29, 35, 49, 62]
    load = np.full((7, 1, 64), 10)
    load[range(7), 0, slow] = 15
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=64, ep_size=64, scope="global") as writer:
        for one in load:
            writer.record(None, one, np.arange(64)[None])
    out = cli("ranks", tmp_path).stdout
    names, cells = (next(li for li in out.splitlines() if li.split()[:1] == [w]) for w in ("layer", "0"))
    shown = names.split()[1:]
    assert len(shown) == len(cells.split()) - 1
    assert [name for name, cell in zip(shown, cells.split()[1:], strict=True) if cell == "+1"] == [
        f"r{rank}" for rank in slow
    ]


def test_the_plot_has_a_column_a_bin(local: Truth) -> None:
    out = cli("timeline", "--bins", "30", local.root).stdout.splitlines()
    axis = next(line for line in out if "└" in line).split("└")[1]
    assert [i // 2 for i, c in enumerate(axis) if c == "▲"] == [10, 14]
    assert [i // 2 for i, c in enumerate(axis) if c == "╌"][::2] == [6, 7]
    wide = cli("timeline", "--bins", "500", local.root)
    assert "500 bins do not fit" in wide.stderr


def test_a_layer_without_tokens_and_equal_ranks(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.array([[5, 5], [0, 0]]), np.array([[0, 1]] * 2))
    document = json.loads(cli("ranks", "-o", "json", tmp_path).stdout)
    assert (document["active"], document["loss_tokens"], document["idle_fraction"]) == (1, 0, 0)
    assert [r["slowest"] for r in document["ranks"]] == [0, 0]
    assert [r["excess_share"] for r in document["ranks"]] == [None, None]
    assert [layer["ranks"] for layer in document["layers"]] == [[1, 1], [None, None]]
    assert "no step has a token" in cli("timeline", "--layer", "1", tmp_path).stdout
    assert cli("ranks", tmp_path).returncode == 0
    assert cli("timeline", tmp_path).returncode == 0


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["timeline", "--layer", "4"], ["no MoE layer 4", "3 to 5"]),
        (["placement", "--layer", "4"], ["no MoE layer 4"]),
        (["placement", "--step", "30"], ["no step 30", "steps 0 to 29"]),
        (["placement", "--against", "99"], ["no step 99", "steps 0 to 29"]),
        (["ranks", "--steps", "50:60"], ["no step of the run is in 50:60"]),
        (["timeline", "--steps", "50:60"], ["no step of the run is in 50:60"]),
        (["ranks", "--run", "zz"], ["no run 'zz'"]),
        (["timeline", "--model", "zz"], ["no model 'zz'"]),
    ],
)
def test_what_the_dump_does_not_have(local: Truth, arguments: list[str], words: list[str]) -> None:
    one_error(cli(*arguments, local.root), 2, *words)


@pytest.mark.parametrize("command", ["ranks", "timeline"])
def test_no_complete_step(local: Truth, command: str) -> None:
    one_error(cli(command, "--steps", "6:8", local.root), 3, "no step of this range is complete")


@pytest.mark.parametrize(
    "arguments",
    [
        ["timeline", "--formula", "x"],
        ["timeline", "--bins", "0"],
        ["ranks", "--by", "x"],
        ["ranks", "--ranks-per-node", "0"],
        ["ranks", "--steps", "9"],
    ],
)
def test_wrong_usage(local: Truth, arguments: list[str]) -> None:
    result = cli(*arguments, local.root)
    assert (result.returncode, result.stdout) == (2, "")
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1


def test_no_placement_is_known(tmp_path: Path) -> None:
    with ExpertLoadWriter(tmp_path, model="m", num_logical_experts=2, ep_size=2, scope="global") as writer:
        writer.record(None, np.ones((1, 2), int), None)
    one_error(cli("placement", tmp_path), 2, "no placement is known at step 0")


@pytest.mark.parametrize("command", ["ranks", "timeline"])
def test_a_damaged_segment_is_left_out_of_the_figures(tmp_path: Path, command: str) -> None:
    write(tmp_path)
    victim = sorted(tmp_path.glob("run=*/model=*/rank=00001/session=*/loads-*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    result = cli(command, "-o", "json", tmp_path)
    one_error(result, 3, victim.name)
    steps = json.loads(result.stdout)["steps"]
    # Of 30 steps one is dummy and one incomplete, both in the first segment of eight.
    assert (steps["recorded"], steps["incomplete"]) == (20, 9)
