"""Where tokens go under other placements, against a simulation of single tokens that the tests draw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import cli, one_error
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.traffic import Shares, traffic_report
from eplb_analyze.dispatch import sources
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.policies import Problem, named, place
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.replay import Replay, replay_run
from eplb_analyze.replay.scores import TODAY
from eplb_dump import ExpertLoadWriter

Array = np.ndarray[Any, Any]
LAYERS, EXPERTS, RANKS, NODES, SLOTS, STEPS = 2, 8, 4, 2, 12, 120
#: Expert 0 has three replicas, 1 and 2 have two.
PLACED = np.array([0, 1, 2, 3, 0, 4, 1, 5, 0, 6, 2, 7], np.int32)
REDUNDANT = SLOTS - EXPERTS


@dataclass
class Drawn:
    """Single tokens: the step, layer, source rank and expert of each."""

    step: Array
    layer: Array
    source: Array
    expert: Array


def draw(seed: int, tokens: int = 24) -> Drawn:
    """Each rank prefers two experts, and sends so many tokens in a step and layer."""
    rng = np.random.default_rng(seed)
    step, layer, source = (a.ravel() for a in np.indices((STEPS, LAYERS, RANKS, tokens))[:3])
    own = (2 * source + 3 + rng.integers(2, size=len(step))) % EXPERTS
    return Drawn(
        step, layer, source, np.where(rng.random(len(step)) < 0.5, own, rng.integers(EXPERTS, size=len(step)))
    )


def record(root: Path, drawn: Drawn, scope: str = "local", **options: Any) -> Path:
    """The engine sends each token to the first slot of its expert, as no dispatch does."""
    first = np.array([np.flatnonzero(expert == PLACED)[0] for expert in range(EXPERTS)])
    nodes = {"ranks_per_node": RANKS // NODES} | options
    for rank in range(RANKS if scope == "local" else 1):
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, run_id="r",
            scope=scope, **nodes,
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                load = np.zeros((LAYERS, SLOTS), np.int64)
                own = (drawn.step == step) & ((drawn.source == rank) | (scope != "local"))
                np.add.at(load, (drawn.layer[own], first[drawn.expert[own]]), 1)
                writer.record(step, load, np.tile(PLACED, (LAYERS, 1)))
    return root


def simulate(drawn: Drawn, placements: list[tuple[int, Array]], choose: Any) -> Array:
    """Tokens by source and destination rank; ``choose`` names a slot among those of a token's expert."""
    flows = np.zeros((RANKS, RANKS), np.int64)
    for step, layer, source, expert in zip(drawn.step, drawn.layer, drawn.source, drawn.expert, strict=True):
        placed = [slots for first, slots in placements if first <= step][-1][layer]
        slot = choose(placed, source, expert, np.flatnonzero(placed == expert))
        flows[source, slot * RANKS // len(placed)] += 1
    return flows


def shares(flows: Array) -> tuple[float, float, float]:
    """On the rank, on another rank of the node, on another node."""
    node = np.arange(RANKS) * NODES // RANKS
    total, rank = flows.sum(), np.trace(flows)
    inside = flows[node[:, None] == node].sum()
    return float(rank / total), float((inside - rank) / total), float((total - inside) / total)


def assert_close(found: Shares | None, expected: tuple[float, float, float], tolerance: float) -> None:
    assert found is not None
    assert (found.same_rank, found.same_node, found.other_node) == pytest.approx(expected, abs=tolerance)


def replayed(root: Path, *settings: Setting, **options: Any) -> Replay:
    return replay_run(open_run(root), list(settings), keep_placements=True, **options)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Drawn]:
    drawn = draw(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eplb_dump.writer.time", SteadyClock())
        return record(tmp_path_factory.mktemp("local"), drawn), drawn


@pytest.mark.parametrize(
    ("dispatch", "at_start", "rearranged"),
    [
        (
            "sglang-static",
            lambda placed: sources.sglang_static_at_start(placed, EXPERTS, RANKS, NODES),
            lambda placed: sources.sglang_static(placed, EXPERTS, RANKS, NODES),
        ),
        ("vllm-ascend", *[lambda placed: sources.ascend(placed, EXPERTS, RANKS)] * 2),
        ("random", None, None),
    ],
)
@pytest.mark.parametrize("policy", ["static", "deepseek"])
def test_traffic_is_that_of_single_tokens(
    dump: tuple[Path, Drawn], dispatch: str, at_start: Any, rearranged: Any, policy: str
) -> None:
    root, drawn = dump
    timing = (None, None, None) if policy == "static" else (40, 40, 40)
    result = replayed(root, Setting(policy, REDUNDANT, RANKS, *timing, dispatch))
    assert result.placements is not None
    placements = [(max(0, step), slots) for step, slots in result.placements[0]]
    rng = np.random.default_rng(1)
    rules = [at_start, *[rearranged] * (len(placements) - 1)]
    tables = {
        slots.tobytes(): rule and rule(slots) for (_, slots), rule in zip(placements, rules, strict=True)
    }

    def choose(placed: Array, source: int, expert: int, slots: Array) -> int:
        own = next(each for key, each in tables.items() if placed.tobytes() in key)
        if own is None:
            return int(rng.choice(slots))
        layers = next(slots for _, slots in placements if tables[slots.tobytes()] is own)
        return int(own[[row.tobytes() for row in layers].index(placed.tobytes()), source, expert])

    flows = simulate(drawn, placements, choose)
    # Of n tokens, a share has a standard error of at most 0.5 / sqrt(n).
    tolerance = 1e-9 if at_start is not None else 5 * 0.5 / len(drawn.step) ** 0.5
    assert_close(result.outcomes[0].traffic, shares(flows), tolerance)
    assert result.scores.flows is not None
    found = result.scores.flows[result.rows[0]]
    assert found.sum() == pytest.approx(len(drawn.step))
    assert found == pytest.approx(flows, abs=1e-6 if at_start is not None else 5 * (flows.max() / 2) ** 0.5)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=6)
def test_without_replicas_expected_traffic_is_exact(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    drawn = draw(seed, tokens=5)
    root = record(tmp_path_factory.mktemp("run"), drawn)
    result = replayed(root, Setting("deepseek", 0, RANKS, 30, 60, 30))
    assert result.placements is not None
    placements = [(max(0, step), slots) for step, slots in result.placements[0]]
    flows = simulate(drawn, placements, lambda placed, source, expert, slots: slots[0])
    assert_close(result.outcomes[0].traffic, shares(flows), 1e-9)
    links = result.links(result.rows[0])
    assert links is not None
    apart = {(s, d): flows[s, d] for s in range(RANKS) for d in range(RANKS) if s != d}
    assert [pair.tokens for pair in links.ranks] == sorted(apart.values(), reverse=True)[:5]
    assert all(apart[pair.source, pair.destination] == pair.tokens for pair in links.ranks)
    node = np.arange(RANKS) * NODES // RANKS
    between = {
        (a, b): flows[node == a][:, node == b].sum() for a in range(NODES) for b in range(NODES) if a != b
    }
    assert links.nodes is not None
    assert {(pair.source, pair.destination): pair.tokens for pair in links.nodes} == between
    # The recorded placements, as `traffic` has them if tokens go to any replica.
    assert result.today.traffic is not None
    assert result.scores.flows is not None
    recorded = traffic_report(open_run(root)).matrix
    assert result.scores.flows[TODAY].sum(axis=1) == pytest.approx(recorded.sum(axis=1))


def test_traffic_is_that_of_the_judged_steps_in_advice(dump: tuple[Path, Drawn]) -> None:
    root, drawn = dump
    advice = advise(open_run(root), objective=Objective.TOKENS)
    assert advice.best is not None
    assert advice.today is not None
    assert advice.judged is not None
    late = drawn.step >= advice.judged.first_step
    judged = Drawn(*(each[late] for each in (drawn.step, drawn.layer, drawn.source, drawn.expert)))
    rng = np.random.default_rng(2)
    placements = [(0, np.tile(PLACED, (LAYERS, 1)))]
    flows = simulate(judged, placements, lambda placed, source, expert, slots: rng.choice(slots))
    assert_close(advice.today.traffic, shares(flows), 5 * 0.5 / late.sum() ** 0.5)
    assert all(judged.traffic is not None for judged in advice.options)


def test_combined_objective_counts_tokens_from_other_nodes(dump: tuple[Path, Drawn]) -> None:
    """Time is the tokens of the busiest rank, and those that the mean rank gets from other nodes."""
    root, drawn = dump
    setting = Setting("deepseek", 0, RANKS, 40, 40, 40)
    result = replayed(root, setting, objective=Objective.TRAFFIC, cross_node_weight=3.0)
    assert result.placements is not None
    today = saved = 0.0
    node = np.arange(RANKS) * NODES // RANKS
    for step in range(STEPS):
        placed = [slots for first, slots in result.placements[0] if first <= step][-1]
        for layer in range(LAYERS):
            own = (drawn.step == step) & (drawn.layer == layer)
            source, expert = drawn.source[own], drawn.expert[own]
            to = np.array([np.flatnonzero(placed[layer] == e)[0] for e in expert]) * RANKS // EXPERTS
            crossing = (node[source] != node[to]).sum()
            saved += np.bincount(to, minlength=RANKS).max() + 3.0 * crossing / RANKS
    today = float(result.effort[TODAY].sum())
    assert result.outcomes[0].combined_saved == pytest.approx(1 - saved / today)
    free = replayed(root, setting, objective=Objective.TRAFFIC, cross_node_weight=0.0)
    assert free.outcomes[0].combined_saved == pytest.approx(free.outcomes[0].time_saved)


def test_settings_are_sorted_by_the_combined_objective(dump: tuple[Path, Drawn]) -> None:
    options = ("--objective", "tokens+traffic", "--cross-node-weight", "2")
    found = json.loads(cli("replay", *options, "--json", dump[0]).stdout)
    gains = [setting["combined_saved"] for setting in found["settings"]]
    assert gains == sorted(gains, reverse=True)
    assert found["cross_node_weight"] == 2
    text = " ".join(cli("replay", *options, dump[0]).stdout.split())
    assert "sorted by tokens and traffic" in text
    assert "2 times the tokens that a rank gets from other nodes" in text
    assert "busiest links today, of all tokens: r" in text
    text = " ".join(cli("advise", *options, dump[0]).stdout.split())
    assert "by tokens and traffic" in text
    assert "cross nodes" in text


def test_what_traffic_needs_is_named_and_nothing_is_guessed(tmp_path: Path, dump: tuple[Path, Drawn]) -> None:
    root, drawn = dump
    whole = record(tmp_path / "global", drawn, scope="global")
    result = replay_run(open_run(whole))
    assert result.sources_unknown == "scope global"
    assert result.today.traffic is None
    assert result.links() is None
    assert all(outcome.traffic is None for outcome in result.outcomes)
    text = " ".join(cli("replay", whole).stdout.split())
    assert (
        "traffic is not known: the recording does not show which rank sent which tokens (scope global)"
        in text
    )
    objective = {"objective": Objective.TRAFFIC, "cross_node_weight": 1.0}
    with pytest.raises(DumpError, match=r"does not show which rank sent which tokens \(scope global\)"):
        replay_run(open_run(whole), **objective)  # type: ignore[arg-type]
    nowhere = record(tmp_path / "nowhere", drawn, ranks_per_node=None)
    unknown = replay_run(open_run(nowhere))
    assert unknown.today.traffic is not None
    assert unknown.today.traffic.same_rank is not None
    assert (unknown.today.traffic.same_node, unknown.today.traffic.other_node) == (None, None)
    links = unknown.links()
    assert links is not None
    assert links.nodes is None
    with pytest.raises(UsageError, match="does not state the nodes; pass --num-nodes"):
        replay_run(open_run(nowhere), **objective)  # type: ignore[arg-type]
    given_nodes = replay_run(open_run(nowhere), num_nodes=NODES, **objective)  # type: ignore[arg-type]
    assert given_nodes.today.traffic == replay_run(open_run(root)).today.traffic
    with pytest.raises(UsageError, match="all ranks are on one node"):
        replay_run(open_run(nowhere), num_nodes=1, **objective)  # type: ignore[arg-type]
    one_error(cli("replay", "--objective", "tokens+traffic", root), 2, "needs --cross-node-weight")
    one_error(cli("advise", "--cross-node-weight", "2", root), 2, "is for --objective tokens+traffic")
    one_error(
        cli("advise", "--objective", "tokens+traffic", "--cross-node-weight", "2", whole), 3, "scope global"
    )


def test_policy_near_sources_sees_the_tokens_of_each_rank(dump: tuple[Path, Drawn]) -> None:
    root, drawn = dump
    near, balanced = (Setting(name, 0, RANKS, 30, 50, 30) for name in ("near_sources", "deepseek"))
    result = replayed(root, near, balanced)
    assert result.placements is not None
    by_setting = dict(zip([o.setting for o in result.outcomes], result.placements, strict=True))
    current = by_setting[near][0][1]
    for step, placed in by_setting[near][1:]:
        sent = np.zeros((LAYERS, RANKS, EXPERTS), np.int64)
        own = (drawn.step >= step - 50) & (drawn.step < step)
        np.add.at(sent, (drawn.layer[own], drawn.source[own], drawn.expert[own]), 1)
        problem = Problem(sent.sum(axis=1), EXPERTS, RANKS, NODES, current=current, by_source=sent)
        np.testing.assert_array_equal(placed, place(named("near_sources"), problem))
        current = placed
    outcomes = {outcome.setting: outcome for outcome in result.outcomes}
    # The same sets of experts, so the same balance, but nearer to their tokens.
    assert outcomes[near].idle_fraction == pytest.approx(outcomes[balanced].idle_fraction)
    crosses = [outcomes[each].traffic for each in (near, balanced)]
    assert crosses[0] is not None
    assert crosses[1] is not None
    assert (crosses[0].other_node or 0) < (crosses[1].other_node or 0) - 0.05


def test_policy_near_sources_is_tried_for_the_combined_objective(dump: tuple[Path, Drawn]) -> None:
    run = open_run(dump[0])
    advice = advise(run, objective=Objective.TRAFFIC, cross_node_weight=2.0)
    plain = advise(run, objective=Objective.TOKENS)
    found = [
        {outcome.setting.policy for outcome in each.replay.outcomes if outcome.setting is not None}
        for each in (advice, plain)
        if each.replay is not None
    ]
    assert found[0] - found[1] == {"near_sources"}
    assert advice.verdict == "enable"
    assert advice.best is not None
    assert advice.best.setting is not None
    assert advice.best.setting.policy == "near_sources"


def test_policy_near_sources_is_refused_without_the_senders(tmp_path: Path, dump: tuple[Path, Drawn]) -> None:
    whole = record(tmp_path, dump[1], scope="global")
    missing = "--policy near_sources: the recording does not show which rank sent which tokens (scope global)"
    for command in ("replay", "advise"):
        one_error(cli(command, "--policy", "near_sources,static", whole), 3, str(whole), missing)
    resized = cli("replay", "--policy", "near_sources", "--ep-size", "2", dump[0])
    one_error(resized, 2, "--policy near_sources", f"known only for today's EP size, {RANKS}")
