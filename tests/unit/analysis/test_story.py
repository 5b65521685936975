"""One planted run, told by every command: each document is compared with what was planted.

Eight ranks, two a node of four, nine MoE layers numbered 3 to 11, twelve experts in sixteen slots:

- rank 2 holds two experts of one and a half times the usual load in every layer: the others wait for it;
- layer 10's expert 0 is hot throughout; layer 7's expert 3 is hot from step 300 on;
- at 500 a rearrangement gives that expert three slots, and in layer 9 two experts change their ranks;
- at 700 layer 7's expert 9 becomes hot, too, and what was gained is lost;
- at 900 slots change places within their ranks, in layers 5 and 7: no rank holds anything new;
- after step 999 rank 5's process is killed, and the others go on to step 1199.

Figures come from the arrays that the writers were given, step by step.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from helpers import cli, start_child, without_times

from eplb_dump import ExpertLoadWriter

NUMBERS = tuple(range(3, 12))
RANKS, PER_RANK, EXPERTS, STEPS, CHUNK = 8, 2, 12, 1200, 100
SLOTS, LAYERS = RANKS * PER_RANK, len(NUMBERS)
HOT, REARRANGED, DRIFTED, SHUFFLED, STOPPED = 300, 500, 700, 900, 1000
#: What each rank's own tokens make routed pairs of; rank 6 serves twice the requests.
ROUTED = np.array([600, 600, 600, 600, 600, 600, 1200, 600])
#: Experts 0, 1, 2 and 8 have two copies; ranks get equal loads, but for rank 2's one and a half.
FIRST = [[0, 1], [2, 8], [4, 5], [6, 7], [8, 9], [10, 11], [0, 3], [1, 2]]
HELPED = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [0, 3], [1, 3]]
EXCHANGED = [[0, 1], [2, 8], [4, 5], [9, 7], [8, 6], [10, 11], [0, 3], [1, 2]]
Array = np.ndarray[Any, np.dtype[np.int64]]


def placement(step: int, *, acts: bool = True) -> Array:
    """int64 [layers, slots]."""
    ranks = dict.fromkeys(NUMBERS, FIRST)
    if acts and step >= REARRANGED:
        ranks |= {7: HELPED, 9: EXCHANGED}
    if acts and step >= SHUFFLED:
        ranks |= {layer: [own[::-1] for own in ranks[layer]] for layer in (5, 7)}
    return np.array([np.ravel(ranks[layer]) for layer in NUMBERS])


def weights(step: int) -> np.ndarray[Any, Any]:
    """[layers, experts]: shares of the routed tokens, not normalized."""
    usual = np.array([2, 2, 2, 1, 1.5, 1.5, 1, 1, 2, 1, 1, 1])
    found = np.tile(usual, (LAYERS, 1))
    found[NUMBERS.index(10), 0] = 3.6
    found[NUMBERS.index(7), 3] = 6 if step >= HOT else 1
    found[NUMBERS.index(7), 9] = 7 if step >= DRIFTED else 1
    return found


@functools.cache
def loads(*, acts: bool = True) -> Array:
    """int64 [steps, source ranks, layers, slots]; replicas share evenly but for chance."""
    rng = np.random.default_rng(11 if acts else 12)
    parts = []
    edges = [0, HOT, REARRANGED, DRIFTED, SHUFFLED, STEPS]
    for low, high in itertools.pairwise(edges):
        slots = placement(low, acts=acts)
        copies = np.array([np.bincount(row, minlength=EXPERTS)[row] for row in slots])
        share = np.take_along_axis(weights(low), slots, axis=1) / copies
        share /= share.sum(axis=1, keepdims=True)
        parts.append(rng.multinomial(ROUTED[:, None], share, size=(high - low, RANKS, LAYERS)))
    return np.concatenate(parts)


def open_writer(root: Path | str, rank: int) -> ExpertLoadWriter:
    return ExpertLoadWriter(
        root, model="org/moe", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, run_id="r",
        moe_layers=NUMBERS, ranks_per_node=4, segment_steps=128, queue_steps=2 * CHUNK,
    )  # fmt: skip


def record(writers: dict[int, ExpertLoadWriter], first: int, *, acts: bool = True) -> None:
    """A chunk of steps of these ranks; nothing is dropped, as the queue is longer than it."""
    for step in range(first, first + CHUNK):
        for rank, writer in writers.items():
            writer.record(step, loads(acts=acts)[step, rank], placement(step, acts=acts))
    assert all(writer.flush(timeout=60) for writer in writers.values())


RANK_5 = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_story as story
writers = {5: story.open_writer(sys.argv[1], 5)}
for line in sys.stdin:
    story.record(writers, int(line))
    print("done", flush=True)
    if int(line) + story.CHUNK == story.STOPPED:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ranks keep step as in an engine; rank 5 is a process of its own, so that it can be killed."""
    root = tmp_path_factory.mktemp("story")
    with start_child(RANK_5, root, Path(__file__).parent) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        writers = {rank: open_writer(root, rank) for rank in range(RANKS) if rank != 5}
        for first in range(0, STEPS, CHUNK):
            if first < STOPPED:
                child.stdin.write(f"{first}\n")
                child.stdin.flush()
            record(writers, first)
            if first < STOPPED:
                assert child.stdout.readline() == "done\n"
        for writer in writers.values():
            writer.close()
        assert child.wait(timeout=30) == -9
    return root


@pytest.fixture(scope="module")
def idle_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same workload, other requests, and nobody rearranges anything: steps 0 to 699."""
    root = tmp_path_factory.mktemp("idle")
    writers = {rank: open_writer(root, rank) for rank in range(RANKS)}
    for first in range(0, DRIFTED, CHUNK):
        record(writers, first, acts=False)
    for writer in writers.values():
        writer.close()
    return root


def document(command: str, *dumps: Path, code: int) -> dict[str, Any]:
    result = cli(*command.split(), "--json", *dumps)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# ---- the truth


def tokens(first: int = 0, end: int = STOPPED, *, acts: bool = True) -> Array:
    """int64 [steps, layers, ranks] of complete steps."""
    part = loads(acts=acts)[first:end].sum(axis=1)
    return part.reshape(len(part), LAYERS, RANKS, PER_RANK).sum(axis=3)


def balance(first: int = 0, end: int = STOPPED, *, layer: int | None = None, acts: bool = True) -> float:
    rows = slice(None) if layer is None else [NUMBERS.index(layer)]
    return float(np.mean(reference.per_step("balancedness", tokens(first, end, acts=acts)[:, rows])))


def of_experts(first: int, end: int, layer: int) -> Array:
    """Tokens of each logical expert of a layer."""
    found = np.zeros(EXPERTS, np.int64)
    for step in range(first, end):
        row = NUMBERS.index(layer)
        np.add.at(found, placement(step)[row], loads()[step, :, row].sum(axis=0))
    return found


def waiting(first: int = 0, end: int = STOPPED) -> tuple[Any, Any]:
    """How often each rank was a layer's slowest, and the tokens that it cost: float64 ``[ranks]``."""
    often, cost = (np.array(each, float).sum(axis=0) for each in reference.waiting(tokens(first, end)))
    return often, cost


def evenly(steps: range, slots: Array) -> float:
    """Balancedness of the logical loads of these steps, split evenly over a placement's replicas."""
    spread = np.zeros((len(steps), LAYERS, RANKS))
    for i, step in enumerate(steps):
        for layer in range(LAYERS):
            logical = np.zeros(EXPERTS)
            np.add.at(logical, placement(step)[layer], loads()[step, :, layer].sum(axis=0))
            per_copy = logical / np.bincount(slots[layer], minlength=EXPERTS)
            spread[i, layer] = per_copy[slots[layer]].reshape(RANKS, PER_RANK).sum(axis=1)
    return float(np.mean(reference.per_step("balancedness", spread)))


# ---- the commands


def test_summary(dump: Path) -> None:
    found = document("summary", dump, code=3)
    assert found["run"]["layer_numbers"] == list(NUMBERS)
    assert without_times(found["steps"]) == {
        "first": 0, "last": 1199, "seen": 1200, "recorded": 1000, "dummy": 0, "not_sampled": 0, "dropped": 0,
        "rejected": 0, "incomplete": 200, "missing": 0, "retired": 0,
    }  # fmt: skip
    assert found["ranks"] == {"expected": 8, "present": 8, "missing": []}
    assert found["idle_fraction"] == pytest.approx(reference.idle_fraction(tokens()))
    assert found["balancedness"]["mean"] == pytest.approx(balance())
    assert found["rearrangements"] == [REARRANGED, SHUFFLED]
    assert [r["layers"] for r in found["rearrangement_details"]] == [2, 2]
    layers = {layer["layer"]: layer for layer in found["layers"]}
    for number in NUMBERS:
        assert layers[number]["balancedness"] == pytest.approx(balance(layer=number))
    assert min(NUMBERS, key=lambda number: layers[number]["balancedness"]) == 7
    assert {layer["worst_rank"] for number, layer in layers.items() if number != 7} == {2}


def test_summary_says_where_time_was_lost(dump: Path) -> None:
    found = document("summary", dump, code=3)
    _, cost = waiting()
    loss = found["loss"]
    assert loss["tokens"] == pytest.approx(cost.sum())
    excess = {rank["rank"]: rank["excess_tokens"] for rank in loss["ranks"]}
    assert excess == pytest.approx(dict(enumerate(cost)))
    assert loss["ranks"][0]["rank"] == 2
    # Layer 7's two bad times, the longer first, to the width of a part of the timeline.
    width = found["timeline"][0]["last_step"] + 1
    planted = ((4, DRIFTED, STOPPED), (6, HOT, REARRANGED))
    for stretch, (rank, first, end) in zip(loss["stretches"][:2], planted, strict=True):
        assert (stretch["layer"], stretch["rank"]) == (7, rank)
        assert abs(stretch["first_step"] - first) < width
        assert abs(stretch["last_step"] - (end - 1)) < width
        own = tokens(first, end)[:, NUMBERS.index(7)]
        assert stretch["excess_tokens"] == pytest.approx((own.max(1) - own.mean(1)).sum(), rel=0.1)
    hot = {(expert["layer"], expert["logical"]): expert for expert in found["hot_experts"]}
    assert list(hot)[:2] == [(10, 0), (7, 3)]
    for layer, expert in hot:
        all_tokens = of_experts(0, STOPPED, layer)
        assert hot[layer, expert]["share"] == pytest.approx(all_tokens[expert] / all_tokens.sum())
    assert [hot[key]["replicas"] for key in ((10, 0), (7, 3))] == [2, 3]


@pytest.mark.parametrize(("first", "end", "hottest"), [(200, 300, 2), (300, 400, 6), (500, 600, 1)])
def test_layer_7(dump: Path, first: int, end: int, hottest: int) -> None:
    """Before its expert is hot, while it is on one rank, and on three."""
    found = document(f"layer 7 --steps {first}-{end - 1}", dump, code=0)
    assert (found["first_step"], found["last_step"], found["steps"]) == (first, end - 1, 100)
    by_rank = tokens(first, end)[:, NUMBERS.index(7)].sum(axis=0)
    assert [rank["load"] for rank in found["ranks"]] == by_rank.tolist()
    assert max(found["ranks"], key=lambda rank: rank["load"])["rank"] == hottest
    assert found["balancedness"] == pytest.approx(balance(first, end, layer=7))
    assert [expert["load"] for expert in found["experts"]] == of_experts(first, end, 7).tolist()
    expert = found["experts"][3]
    assert expert["share"] == pytest.approx(1 / 17 if first < HOT else 6 / 22, rel=0.02)
    assert expert["replicas"] == (3 if first >= REARRANGED else 1)
    assert [rank["rank"] for rank in expert["ranks"]] == ([1, 6, 7] if first >= REARRANGED else [6])


def test_layer_in_a_step_that_lacks_a_rank(dump: Path) -> None:
    found = document("layer 7 --step 1100", dump, code=0)
    assert (found["complete"], found["missing_ranks"]) == (False, [5])
    there = [rank for rank in range(RANKS) if rank != 5]
    assert [slot["load"] for slot in found["slots"]] == loads()[1100, there, 4].sum(axis=0).tolist()


def test_experts(dump: Path) -> None:
    found = document("experts --hot", dump, code=3)
    assert (found["window"], found["windows"], found["recorded"]) == (100, 10, 1000)
    counts = found["counts"]
    assert (counts["always"], counts["bursts"], counts["never"]) == (1, 2, LAYERS * EXPERTS - 3)
    hot = {(expert["layer"], expert["logical"]): expert for expert in found["experts"]}
    names = ("verdict", "first_hot_step", "last_hot_step", "persistence", "replicas")
    assert {key: tuple(expert[name] for name in names) for key, expert in hot.items()} == {
        (7, 3): ("bursts", HOT, STOPPED - 1, 0.7, 3),
        (7, 9): ("bursts", DRIFTED, STOPPED - 1, 0.3, 1),
        (10, 0): ("always", 0, STOPPED - 1, 1.0, 2),
    }
    for (layer, logical), expert in hot.items():
        all_tokens = of_experts(0, STOPPED, layer)
        assert expert["tokens"] == all_tokens[logical]
        since = of_experts(SHUFFLED if layer == 7 else 0, STOPPED, layer)  # the layer's last rearrangement
        assert expert["due_replicas"] == pytest.approx(since[logical] / since.sum() * SLOTS)
        assert expert["under_replicated"] == ((layer, logical) in ((10, 0), (7, 9)))
        peaks = [of_experts(first, first + 100, layer) for first in range(0, STOPPED, 100)]
        assert expert["peak_times_mean"] == pytest.approx(max(p[logical] / p.mean() for p in peaks))
    # Since the drift expert 9 is worth four slots and has one.
    late = document("experts --hot --layer 7 --steps 700-", dump, code=3)["experts"]
    assert {e["logical"]: (e["verdict"], e["under_replicated"]) for e in late} == {
        9: ("always", True),
        3: ("always", False),
    }


def test_ranks(dump: Path) -> None:
    found = document("ranks", dump, code=3)
    often, cost = waiting()
    assert (found["recorded"], found["active"]) == (STOPPED, STOPPED * LAYERS)
    assert found["idle_fraction"] == pytest.approx(reference.idle_fraction(tokens()))
    for rank in found["ranks"]:
        assert rank["load"] == tokens()[:, :, rank["rank"]].sum()
        assert rank["slowest"] == pytest.approx(often[rank["rank"]])
        assert rank["excess_tokens"] == pytest.approx(cost[rank["rank"]])
        assert rank["excess_share"] == pytest.approx(cost[rank["rank"]] / cost.sum())
    for name in ("load", "slowest", "excess_tokens"):
        assert max(found["ranks"], key=lambda rank: rank[name])["rank"] == 2, name
    assert found["ranks"][2]["slowest_share"] > 0.8
    assert max(found["nodes"], key=lambda node: node["excess_tokens"])["node"] == 0
    heat = {layer["layer"]: layer["ranks"] for layer in found["layers"]}
    assert max(range(RANKS), key=lambda rank: heat[7][rank]) == 4
    assert all(max(range(RANKS), key=lambda rank: heat[n][rank]) == 2 for n in NUMBERS if n != 7)


@pytest.mark.parametrize("layer", [None, 7])
def test_timeline(dump: Path, layer: int | None) -> None:
    of_layer = "" if layer is None else f" --layer {layer}"
    found = document(f"timeline --bins 12{of_layer}", dump, code=3)
    assert found["rearrangements"] == [REARRANGED, SHUFFLED]
    means = [part["mean"] for part in found["bins"]]
    assert [part["first_step"] for part in found["bins"]] == list(range(0, 1200, 100))
    assert [part["steps"] for part in found["bins"]] == [100] * 10 + [0] * 2
    assert means[10:] == [None, None]
    assert means[:10] == pytest.approx([balance(s, s + 100, layer=layer) for s in range(0, 1000, 100)])
    quiet, hot, helped, drifted = means[:3], means[3:5], means[5:7], means[7:10]
    # What layer 7 loses is a ninth of it in the mean over layers.
    least = 0.25 if layer else 0.25 / LAYERS
    assert min(quiet) - max(hot) > least
    assert min(helped) - max(hot) > least
    assert min(helped) - max(drifted) > least
    assert max(drifted) - min(drifted) < least / 5


def test_placement(dump: Path) -> None:
    found = document("placement --step 500 --against 499", dump, code=0)
    for layer, number in zip(found["layers"], NUMBERS, strict=True):
        slots = placement(REARRANGED)[NUMBERS.index(number)]
        assert (layer["layer"], layer["since"]) == (number, REARRANGED if number in (7, 9) else 0)
        assert np.ravel(layer["ranks"]).tolist() == slots.tolist()
        assert layer["replicas"] == np.bincount(slots, minlength=EXPERTS).tolist()
    helped, exchanged = found["changes"]
    assert (helped["layer"], helped["slots_changed"], helped["experts_crossed_ranks"]) == (7, 2, 2)
    # Node 1 had expert 3 on rank 6, node 0 had not.
    assert helped["experts_crossed_nodes"] == 1
    assert helped["ranks"] == [
        {"rank": 1, "experts_in": [3], "experts_out": [8]},
        {"rank": 7, "experts_in": [3], "experts_out": [2]},
    ]
    assert (exchanged["layer"], exchanged["slots_changed"]) == (9, 2)
    assert exchanged["ranks"] == [
        {"rank": 3, "experts_in": [9], "experts_out": [6]},
        {"rank": 4, "experts_in": [6], "experts_out": [9]},
    ]
    shuffled = document("placement --step 900 --against 899", dump, code=0)
    assert shuffled["changes"] == [
        {
            "layer": layer, "slots_changed": SLOTS, "experts_crossed_ranks": 0, "experts_crossed_nodes": 0,
            "ranks": [],
        }
        for layer in (5, 7)
    ]  # fmt: skip
    assert document("placement --step 899 --against 500", dump, code=0)["changes"] == []


def test_rearrangements(dump: Path) -> None:
    found = document("rearrangements --window-steps 200", dump, code=3)
    first, second = found["rearrangements"]
    assert (first["first_step"], first["last_step"], first["layers"]) == (REARRANGED, REARRANGED, 2)
    assert (first["verdict"], first["reason"]) == ("helped", None)
    before, after = balance(300, 500), balance(500, 700)
    assert (first["before"]["balancedness"], first["after"]["balancedness"]) == pytest.approx((before, after))
    assert first["gain"] == pytest.approx(after - before)
    assert 0 < first["gain_low"] < first["gain"] < first["gain_high"]
    assert first["predicted"] == pytest.approx(evenly(range(300, 500), placement(500)))
    assert first["drift"] == pytest.approx(evenly(range(500, 700), placement(500)) - first["predicted"])
    assert abs(first["drift"]) < 0.003
    assert first["lasted"]["until"] == "half gone"
    assert abs(first["lasted"]["steps"] - 200) <= 10
    assert (first["slots_moved"], first["experts_crossed_ranks"]) == (4, 4)
    assert second["first_step"] == SHUFFLED
    assert (second["verdict"], second["experts_crossed_ranks"], second["lasted"]) == ("no-op", 0, None)
    assert second["gain"] == pytest.approx(balance(900, 1000) - balance(700, 900))
    assert second["gain_low"] < 0 < second["gain_high"]
    assert second["predicted"] == pytest.approx(evenly(range(700, 900), placement(900)))


def test_rearrangements_over_longer_windows_than_the_load_is_steady(dump: Path) -> None:
    """They reach over the changes of the load at 300 and 700: drift says so, and the gain at first."""
    first, second = document("rearrangements", dump, code=3)["rearrangements"]
    assert (first["before"]["steps"], first["after"]["steps"]) == (500, 400)
    assert first["gain"] == pytest.approx(balance(500, 900) - balance(0, 500))
    assert first["verdict"] == "helped at first"
    assert first["gain_at_first"] == pytest.approx(balance(500, 550) - balance(0, 500))
    assert first["gain_at_first"] > 0.01
    assert first["lasted"]["until"] == "half gone"
    assert abs(first["lasted"]["steps"] - 200) <= 10
    for row in (first, second):
        assert row["drift"] < -0.01
        assert abs(row["uneven_split"]) < 0.002
    assert second["verdict"] == "no-op"


def test_traffic(dump: Path) -> None:
    found = document("traffic", dump, code=3)
    by_rank = loads()[:STOPPED].reshape(STOPPED, RANKS, LAYERS, RANKS, PER_RANK)
    matrix = by_rank.sum(axis=(0, 2, 4))
    assert found["matrix"] == matrix.tolist()
    assert found["tokens"] == STOPPED * LAYERS * ROUTED.sum()
    assert found["receivers"][0]["destination"] == 2
    assert {receiver["busiest_source"] for receiver in found["receivers"]} == {6}
    assert found["shares"]["same_rank"] == pytest.approx(np.trace(matrix) / matrix.sum())
    inside = matrix[:4, :4].sum() + matrix[4:, 4:].sum()
    assert found["shares"]["other_node"] == pytest.approx(1 - inside / matrix.sum())
    # Nothing was planted to keep tokens near: they go where chance sends them.
    assert found["shares"]["same_rank"] == pytest.approx(found["shares_by_chance"]["same_rank"], abs=0.001)
    layer = document("traffic --layer 7 --steps 300-499", dump, code=0)
    assert layer["matrix"] == by_rank[300:500, :, NUMBERS.index(7)].sum(axis=(0, 3)).tolist()
    assert layer["receivers"][0]["destination"] == 6


def test_compare(dump: Path, idle_dump: Path) -> None:
    """Better than the run that nobody rearranged, in the 200 steps for which it helped, and only then."""
    found = document("compare --steps 500-699", idle_dump, dump, code=0)
    assert (found["comparable"], found["warnings"], found["verdict"]) == (True, [], "better")
    sides = found["balancedness"]
    assert sides["a"] == pytest.approx(balance(500, 700, acts=False))
    assert sides["b"] == pytest.approx(balance(500, 700))
    assert sides["low"] > 0
    assert found["idle_fraction"]["verdict"] == "better"
    idle = [reference.idle_fraction(tokens(500, 700, acts=acts)) for acts in (False, True)]
    assert found["idle_fraction"]["difference"] == pytest.approx(idle[1] - idle[0])
    best = max(found["layers"], key=lambda layer: layer["balancedness"]["difference"])
    assert (best["layer"], best["balancedness"]["verdict"]) == (7, "better")
    before = document("compare --steps 300-499", idle_dump, dump, code=0)
    assert before["verdict"] == "no significant difference"


def test_check(dump: Path, idle_dump: Path) -> None:
    found = document("check", dump, code=1)
    findings = {finding["code"]: finding for finding in found["findings"]}
    errors = [code for code, finding in findings.items() if finding["severity"] == "error"]
    assert errors == ["rank_stopped"]
    text = findings["rank_stopped"]["text"]
    assert text == f"the last 200 steps lack ranks: rank 5 has none after {STOPPED - 1}"
    assert "rank 5" in findings["not_closed"]["text"]
    assert document("check", idle_dump, code=0)["findings"] == []
