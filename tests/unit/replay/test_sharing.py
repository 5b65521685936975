"""Replays with a named dispatch, against loops over the steps, ranks and experts of a recording."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import SteadyClock
from helpers import cli, one_error

from eplb_analyze import open_run
from eplb_analyze.dispatch import named, sources
from eplb_analyze.dispatch.deal import Dealt
from eplb_analyze.dispatch.lp import least_maximum
from eplb_analyze.dispatch.named import NamedDispatch
from eplb_analyze.errors import UsageError
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay import source_loads
from eplb_analyze.replay.advise import advise
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.replay import Outcome, Replay, replay_run
from eplb_analyze.replay.settings import Choices
from eplb_dump import ExpertLoadWriter

Array = np.ndarray[Any, Any]
LAYERS, EXPERTS, RANKS, NODES, SLOTS, STEPS, CHANGE = 2, 6, 4, 2, 12, 90, 40
#: Uneven replicas: expert 0 has five, 1 has three, the others one. The change mirrors the ranks.
FIRST = np.array([0, 1, 2, 0, 3, 1, 0, 0, 4, 5, 1, 0], np.int32)
PLACED = np.stack([FIRST, np.roll(FIRST, 3)])
TOKENS = 40


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_dump.writer.time", SteadyClock())


def placement(step: int) -> Array:
    return PLACED if step < CHANGE else PLACED[:, ::-1]


def sent(rank: int, step: int) -> Array:
    """Tokens that a rank sends: ``[layers, experts]``; rank 2 is idle in some steps."""
    rng = np.random.default_rng(100 * rank + step)
    share = np.array([5, 3, 1, 1, 1, 1]) * (1 + rank) ** np.arange(EXPERTS) ** 0.3
    return rng.multinomial(TOKENS, share / share.sum(), LAYERS) * (rank != 2 or step % 5 > 0)


def record(root: Path, scope: str = "local", *, tokens: bool = True) -> Path:
    for rank in range(RANKS if scope == "local" else 1):
        with ExpertLoadWriter(
            root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank, run_id="r",
            scope=scope, ranks_per_node=RANKS // NODES,
        ) as writer:  # fmt: skip
            for step in range(STEPS):
                ranks = [rank] if scope == "local" else list(range(RANKS))
                load = np.zeros((LAYERS, SLOTS), np.int64)
                for source in ranks:
                    for layer in range(LAYERS):
                        load[layer] += to_first(sent(source, step)[layer], placement(step)[layer])
                writer.record(step, load, placement(step), num_tokens=TOKENS * len(ranks) if tokens else None)
    return root


def to_first(load: Array, slots: Array) -> Array:
    """All tokens of an expert on its first slot, as no dispatch of the tests has them."""
    out = np.zeros(SLOTS, np.int64)
    for expert, count in enumerate(load.tolist()):
        out[np.flatnonzero(slots == expert)[0]] += count
    return out


def replayed(root: Path, *names: str, **options: Any) -> Replay:
    choices = Choices(policies=["static"], redundant=[SLOTS - EXPERTS], dispatches=names)
    return replay_run(open_run(root), choices, objective=Objective.TOKENS, **options)


def figures(loads: list[list[Array]]) -> tuple[float, float]:
    """Balancedness and idle fraction of tokens ``[steps][layers][ranks]``."""
    ratios = [np.mean([row.mean() / row.max() for row in step if row.max() > 0]) for step in loads]
    means, most = (sum(f(row) for step in loads for row in step) for f in (np.mean, np.max))
    return float(np.mean(ratios)), float(1 - means / most)


def by_table(table: Array, step: int, layer: int) -> Array:
    """Tokens of each rank if every source rank sends to the slots of its table ``[ranks, experts]``."""
    out = np.zeros(SLOTS)
    for rank in range(RANKS):
        for expert, count in enumerate(sent(rank, step)[layer].tolist()):
            out[table[rank, expert]] += count
    return out.reshape(RANKS, -1).sum(axis=1)


def assert_figures(outcome: Outcome, expected: tuple[float, float], tolerance: float = 1e-9) -> None:
    found = outcome.balancedness, outcome.idle_fraction
    assert found == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "at_start", "rearranged"),
    [
        (
            "sglang-static",
            lambda placed: sources.sglang_static_at_start(placed, EXPERTS, RANKS, NODES),
            lambda placed: sources.sglang_static(placed, EXPERTS, RANKS, NODES),
        ),
        ("vllm-ascend", *[lambda placed: sources.ascend(placed, EXPERTS, RANKS)] * 2),
    ],
)
def test_tokens_of_each_rank_are_sent_as_its_table_says(
    tmp_path: Path, name: str, at_start: Any, rearranged: Any
) -> None:
    result = replayed(record(tmp_path), name)
    assert (result.sources_known, result.recorded.dispatch) == (True, name)
    assert not any("assumed to come from" in note for note in result.notes)
    # Also today's placements, which change; the setting keeps the first ones.
    for outcome, change in ((result.outcomes[0], STEPS), (result.today, CHANGE)):
        tables = [
            at_start(PLACED) if step < change else rearranged(np.ascontiguousarray(placement(step)))
            for step in range(STEPS)
        ]
        expected = [[by_table(tables[s][layer], s, layer) for layer in range(LAYERS)] for s in range(STEPS)]
        assert_figures(outcome, figures(expected))


@pytest.mark.parametrize("numbers", [1, 10**9])
def test_figures_do_not_depend_on_threads_or_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    root = record(tmp_path)
    expected = replayed(root, "sglang-static", workers=1).scores.maximum
    monkeypatch.setattr(source_loads, "NUMBERS_AT_ONCE", numbers)
    for workers in (1, 3):
        found = replayed(root, "sglang-static", workers=workers).scores.maximum
        np.testing.assert_array_equal(found, expected)


def test_dispatch_is_that_of_each_setting(tmp_path: Path) -> None:
    """Several dispatches: each has the figures that it has alone, and today's placements are as measured."""
    root = record(tmp_path)
    names = ["measured", "even", "random", "vllm", "sglang-static", "sglang-dynamic", "vllm-ascend", "lp"]
    together = replayed(root, *names)
    assert together.recorded.dispatch == "measured"
    alone = {name: replayed(root, name) for name in names}
    by_name = {o.setting.dispatch: o for o in together.outcomes if o.setting is not None}
    assert list(by_name) == [o.setting.dispatch for o in together.outcomes if o.setting is not None]
    assert set(by_name) == set(names)
    for name in names:
        assert by_name[name].balancedness == alone[name].outcomes[0].balancedness
        assert by_name[name].idle_fraction == alone[name].outcomes[0].idle_fraction
    assert together.today.balancedness == alone["measured"].today.balancedness
    idle = {name: outcome.idle_fraction or 0.0 for name, outcome in by_name.items()}
    assert min(idle, key=lambda name: idle[name]) == "lp"
    assert idle["lp"] < idle["even"] < idle["random"]


def test_optimum_and_even_splitting_are_those_of_the_loads(tmp_path: Path) -> None:
    result = replayed(record(tmp_path), "even", "lp")
    by_name = {o.setting.dispatch: o for o in result.outcomes if o.setting is not None}
    every = [sum(sent(rank, step) for rank in range(RANKS)) for step in range(STEPS)]
    even, most, ratios = [], 0.0, []
    for load in every:
        rows = []
        for layer in range(LAYERS):
            copies = np.bincount(PLACED[layer])
            rows.append((load[layer] / copies)[PLACED[layer]].reshape(RANKS, -1).sum(axis=1))
        even.append(rows)
        least = [
            least_maximum(load[layer][:, np.newaxis], PLACED[layer], RANKS)[0] for layer in range(LAYERS)
        ]
        most += sum(least)
        ratios.append(np.mean([load[layer].sum() / RANKS / least[layer] for layer in range(LAYERS)]))
    assert_figures(by_name["even"], figures(even))
    total = sum(load.sum() for load in every) / RANKS
    assert_figures(by_name["lp"], (float(np.mean(ratios)), float(1 - total / most)), 1e-3)
    assert by_name["lp"].active_experts is None
    assert by_name["lp"].gain_ms_per_step is None
    assert result.objective is Objective.TOKENS


def test_unknown_sources_are_assumed_to_be_even(tmp_path: Path) -> None:
    """With scope global, each token comes from any rank: on average as many as of the table's shares."""
    result = replayed(record(tmp_path, "global"), "sglang-static")
    assert not result.sources_known
    (note,) = [note for note in result.notes if note.startswith("sglang-static: ")]
    assert "does not show which rank sent a token (scope global)" in note
    table = sources.sglang_static_at_start(PLACED, EXPERTS, RANKS, NODES)
    rng, loads = np.random.default_rng(0), []
    for _ in range(20):
        for step in range(STEPS):
            rows = []
            for layer in range(LAYERS):
                out = np.zeros(SLOTS)
                for expert, count in enumerate(sum(sent(r, step)[layer] for r in range(RANKS)).tolist()):  # type: ignore[union-attr]
                    picked = rng.multinomial(count, np.full(RANKS, 1 / RANKS))
                    np.add.at(out, table[layer][:, expert], picked)
                rows.append(out.reshape(RANKS, -1).sum(axis=1))
            loads.append(rows)
    assert_figures(result.outcomes[0], figures(loads), 0.004)


def test_dynamic_prefers_the_nearest_replica_only_before_the_first_rearrangement(tmp_path: Path) -> None:
    root = record(tmp_path)
    moving = Setting("deepseek", SLOTS - EXPERTS, RANKS, 30, 30, 30)
    names = ("random", "sglang-dynamic")
    settings = [replace(moving, dispatch=name) for name in names]
    result = replay_run(open_run(root), settings, objective=Objective.TOKENS, num_nodes=NODES)
    first, later = slice(0, 30), slice(30, None)
    rows = dict(zip([o.setting.dispatch for o in result.outcomes if o.setting], result.rows, strict=True))
    found = [[result.scores.maximum[rows[n], part] for n in names] for part in (first, later)]
    assert (found[0][0] != found[0][1]).any()
    np.testing.assert_array_equal(*found[1])


def test_batches_that_are_not_recorded_are_stated(tmp_path: Path) -> None:
    known = replayed(record(tmp_path / "known"), "vllm")
    unknown = replayed(record(tmp_path / "unknown", tokens=False), "vllm", "random")
    assert (known.batches_known, unknown.batches_known) == (True, False)
    assert any(note.startswith("vllm: the batches of all ranks are assumed") for note in known.notes)
    assert any(note.startswith("vllm: the recording does not state the tokens") for note in unknown.notes)


def test_settings_without_replicas_are_tried_once(tmp_path: Path) -> None:
    choices = Choices(policies=["static"], redundant=[2, 6], dispatches=["even", "random"])
    found = replay_run(open_run(record(tmp_path)), choices).outcomes
    assert sorted(o.setting.dispatch for o in found if o.setting) == ["even", "even", "random", "random"]
    choices = Choices(policies=["static"], redundant=[-EXPERTS % RANKS], dispatches=["even", "random"])
    assert len(replay_run(open_run(tmp_path), choices).outcomes) == 2


def test_the_optimum_has_no_gain_in_time(tmp_path: Path) -> None:
    run = open_run(record(tmp_path))
    choices = Choices(policies=["static"], dispatches=["lp"])
    with pytest.raises(UsageError, match="bounds tokens, not time: use --objective tokens"):
        replay_run(run, choices, objective=Objective.MS)
    with pytest.raises(UsageError, match="no engine reaches"):
        advise(run, choices)
    with pytest.raises(UsageError, match="advise takes one dispatch"):
        advise(run, Choices(dispatches=["even", "vllm"]))


def test_advice_is_on_the_dispatch_asked_for(tmp_path: Path) -> None:
    root = record(tmp_path)
    advice = advise(open_run(root), Choices(dispatches=["sglang-static"]), objective=Objective.TOKENS)
    assert advice.replay is not None
    assert advice.replay.recorded.dispatch == "sglang-static"
    assert advice.today is not None
    assert advice.best is not None
    done = cli("advise", "--dispatch", "sglang-static", "--objective", "tokens", root)
    assert "a rank sends an expert's tokens to one replica" in " ".join(done.stdout.split())


def test_command_compares_dispatches(tmp_path: Path) -> None:
    root = record(tmp_path)
    options = "--policy", "static", "--redundant-experts", str(SLOTS - EXPERTS), "--dispatch", "lp, even,vllm"
    found = json.loads(cli("replay", *options, "--json", root).stdout)
    assert {setting["dispatch"] for setting in found["settings"]} == {"lp", "even", "vllm"}
    assert found["today"]["dispatch"] == "measured"
    assert found["dispatch"]["sources_known"] is True
    text = " ".join(cli("replay", *options, root).stdout.split())
    assert "dispatch: measured: each token goes to any replica" in text
    assert "lp: tokens are split so that the busiest rank has the fewest" in text
    assert "--dispatch" not in text
    one_error(cli("replay", "--dispatch", "evne", root), 2, "there is no dispatch 'evne'; known: measured")


def test_settings_that_start_alike_share_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's table of the start takes seconds for many ranks."""
    made = []

    def counted(placement: Array, experts: int, ranks: int, nodes: int) -> Array:
        made.append(ranks)
        return sources.sglang_static_at_start(placement, experts, ranks, nodes)

    def static(token_replication: int) -> NamedDispatch:
        return NamedDispatch(Dealt(0.0, token_replication), counted, sources.sglang_static)

    monkeypatch.setitem(named.DISPATCHES, "sglang-static", static)
    choices = Choices(
        policies=["deepseek", "static"], redundant=[SLOTS - EXPERTS], intervals=[20, 30],
        dispatches=["sglang-static", "even"],
    )  # fmt: skip
    replay_run(open_run(record(tmp_path)), choices, objective=Objective.TOKENS)
    assert made == [RANKS]
