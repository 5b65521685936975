"""A rank dies and the engine continues, or only its recording ends. Truth is recomputed from the loads."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_analyze import open_run
from eplb_analyze.analysis.check import check_run
from eplb_analyze.analysis.cost_sample import sample_of
from eplb_analyze.analysis.experts import expert_report
from eplb_analyze.analysis.layer import layer_report
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.analysis.ranks import rank_report
from eplb_analyze.analysis.rearrangements import rearrangement_report
from eplb_analyze.analysis.summary import summarize
from eplb_analyze.analysis.timeline import timeline
from eplb_analyze.analysis.traffic import traffic_report
from eplb_analyze.metrics.cost import EXCHANGE_RATES
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.replay.replay import replay_run
from eplb_analyze.sessions.parquet_segment import ParquetSegment
from eplb_analyze.transfer.exporters.loads import export_loads
from eplb_dump import ExpertLoadWriter

LAYERS, EXPERTS, RANKS, WIDTH = 2, 6, 4, 3
SLOTS = RANKS * WIDTH
BEFORE = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * LAYERS)
#: Slots 6 to 8 are on rank 2; SGLang fills those of a dead rank with expert 0.
AFTER = np.array([[0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 1, 2]] * LAYERS)


@dataclass
class Engine:
    """Writes a dump; each rank either serves, or is dead, or serves without recording."""

    root: Path
    steps: int = 60
    #: ``{rank: (first, end)}``: steps in which it is dead; in those its slots get no token.
    dead: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: ``{rank: (first, end)}``: steps that it does not record.
    silent: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: The engine notices a death so many steps late: until then tokens go to the dead rank.
    delay: int = 0
    placements: dict[int, Any] = field(default_factory=lambda: {0: BEFORE})
    options: dict[str, Any] = field(default_factory=dict)
    #: ``{rank: (first, end)}``: steps that its writer drops.
    dropped: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: A dead rank that comes back goes on with its writer, so its gap is inside one session and segment.
    same_writer: bool = False
    #: What was recorded: ``{(step, rank): load}``.
    loads: dict[tuple[int, int], Any] = field(default_factory=dict)

    def run(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        writers: dict[int, ExpertLoadWriter] = {}
        for step in range(self.steps):
            gone = [r for r, (first, end) in self.dead.items() if first <= step < end]
            masked = [r for r, (first, end) in self.dead.items() if first + self.delay <= step < end]
            placement = self.placements[max(s for s in self.placements if s <= step)]
            for rank in range(RANKS):
                load = rng.integers(20, 30, (LAYERS, RANKS, WIDTH))
                load[:, masked] = 0
                load = load.reshape(LAYERS, SLOTS)
                # All layers get the same number of tokens.
                load[:, self.serving(step)[0] * WIDTH] += load.sum(axis=1).max() - load.sum(axis=1)
                first, end = self.silent.get(rank, (0, 0))
                dropped = self.dropped.get(rank, (0, 0))
                if dropped[0] <= step < dropped[1]:
                    writers[rank].skip("dropped")
                    continue
                if rank in gone or first <= step < end:
                    if rank in writers and ((rank in gone and not self.same_writer) or end >= self.steps):
                        writers.pop(rank).close()
                    continue
                if rank not in writers:
                    writers[rank] = ExpertLoadWriter(
                        self.root, model="m", num_logical_experts=EXPERTS, ep_size=RANKS, ep_rank=rank,
                        run_id="r", **self.options,
                    )  # fmt: skip
                writers[rank].record(step, load, placement)
                self.loads[step, rank] = load
        for writer in writers.values():
            writer.close()

    def serving(self, step: int) -> list[int]:
        return [
            r
            for r in range(RANKS)
            if r not in self.dead or not self.dead[r][0] + self.delay <= step < self.dead[r][1]
        ]

    def complete(self, step: int) -> bool:
        return all((step, rank) in self.loads for rank in self.serving(step))

    def tokens(self, step: int) -> Any:
        """Tokens ``[layers, serving ranks]`` of what was recorded."""
        total = sum(load for (s, _), load in self.loads.items() if s == step)
        return total.reshape(LAYERS, RANKS, WIDTH).sum(axis=2)[:, self.serving(step)]

    def balancedness(self, step: int) -> float:
        T = self.tokens(step)
        return float((T.mean(axis=1) / T.max(axis=1)).mean())


def test_figures_after_a_loss_are_over_the_ranks_that_serve(tmp_path: Path) -> None:
    engine = Engine(tmp_path, dead={2: (40, 99)}, placements={0: BEFORE, 40: AFTER})
    engine.run()
    run = open_run(tmp_path)
    [lost] = run.lost_ranks
    assert (lost.rank, lost.steps.first, lost.last_step) == (2, 40, None)
    frame = run.balancedness(by="step")
    assert frame["step"].to_list() == list(range(60))
    np.testing.assert_allclose(frame["value"].to_numpy(), [engine.balancedness(s) for s in range(60)])
    summary = summarize(run)
    parts = [(c.first_step, c.last_step, c.lost_ranks, c.recorded) for c in summary.configurations]
    assert parts == [(0, 39, (), 40), (40, 59, (2,), 20)]
    for part, steps in zip(summary.configurations, (range(40), range(40, 60)), strict=True):
        assert part.balancedness == pytest.approx(np.mean([engine.balancedness(s) for s in steps]))
        mean = sum(engine.tokens(s).mean(axis=1).sum() for s in steps)
        most = sum(engine.tokens(s).max(axis=1).sum() for s in steps)
        assert part.idle_fraction == pytest.approx(1 - mean / most)
    assert summary.loss is not None
    assert summary.loss.tokens == pytest.approx(most - mean)
    assert summary.estimates == []
    by_layer = run.balancedness(by="layer")["value"].to_list()
    ratios = [engine.tokens(s).mean(axis=1) / engine.tokens(s).max(axis=1) for s in range(60)]
    np.testing.assert_allclose(by_layer, np.mean(ratios, axis=0))


def test_the_cost_is_beside_the_mean_of_the_ranks_that_serve(tmp_path: Path) -> None:
    engine = Engine(tmp_path, steps=160, dead={2: (60, 999)}, placements={0: BEFORE, 60: AFTER})
    engine.run()
    work = sample_of(open_run(tmp_path)).work
    np.testing.assert_allclose(work.tokens, [engine.tokens(s).mean(axis=1).sum() for s in range(160)])
    np.testing.assert_allclose(work.active, LAYERS * WIDTH)  # every slot in use has tokens
    slowest = [engine.tokens(s).max(axis=1).sum() for s in range(160)]
    np.testing.assert_allclose(work.slowest[:, EXCHANGE_RATES.index(0.0)], slowest)


def test_every_command_leaves_out_the_lost_rank(tmp_path: Path) -> None:
    engine = Engine(
        tmp_path, dead={2: (40, 99)}, placements={0: BEFORE, 45: AFTER}, options={"segment_steps": 8}
    )
    engine.run(1)
    run = open_run(tmp_path)
    # From 40 to 44 the old placement is in force, without the rank's slots.
    for step, stated in ((39, BEFORE), (42, BEFORE), (50, AFTER)):
        placed = placement_report(run, step).layers[0]
        kept = [s for s in range(SLOTS) if step < 40 or s // WIDTH != 2]
        assert placed.replicas == [int(np.sum(stated[0][kept] == e)) for e in range(EXPERTS)]
    layer = layer_report(run, 1, steps=(46, 60))
    T = [engine.tokens(s)[1] for s in range(46, 60)]
    assert [r.rank for r in layer.ranks] == [0, 1, 3]
    assert [r.load for r in layer.ranks] == np.sum(T, axis=0).tolist()
    assert layer.balancedness == pytest.approx(np.mean([t.mean() / t.max() for t in T]))
    assert layer.lost_ranks == [2]
    by_slot = sum(load for (s, _), load in engine.loads.items() if s >= 46)[1]
    kept = [s for s in range(SLOTS) if s // WIDTH != 2]
    shown = [(s.physical, s.load, s.logical) for s in layer.slots]
    assert shown == [(s, by_slot[s], AFTER[1][s]) for s in kept]
    ranks = rank_report(run)
    assert ranks.first_step == 40
    after = np.sum([engine.tokens(s).sum(axis=0) for s in range(40, 60)], axis=0)
    times = [r.times_mean for r in ranks.ranks]
    assert times.pop(2) is None
    np.testing.assert_allclose(times, after / after.mean())
    experts = expert_report(run)
    assert experts.first_step == 40
    for row in experts.experts.filter(layer=0).to_dicts():
        assert row["replicas"] == int(np.sum(AFTER[0][[0, 1, 2, 3, 4, 5, 9, 10, 11]] == row["logical"]))
    # A loss moves no expert; the rearrangement at 45 is judged by steps of the same ranks.
    changes = rearrangement_report(run).rearrangements
    assert [(c.first_step, c.slots_moved) for c in changes] == [(45, 3 * LAYERS)]
    assert (changes[0].before.first_step, changes[0].before.last_step) == (40, 44)


def test_slots_of_a_lost_rank_are_in_no_count_of_placement(tmp_path: Path) -> None:
    Engine(tmp_path, dead={2: (40, 99)}, placements={0: BEFORE, 40: AFTER}).run()
    report = placement_report(open_run(tmp_path), 50, against=30)
    kept = np.array([s for s in range(SLOTS) if s // WIDTH != 2])
    moved = int((BEFORE[0] != AFTER[0])[kept].sum())
    assert report.changes is not None
    assert [c.slots_changed for c in report.changes] == [moved] * LAYERS
    assert [[r.rank for r in c.ranks] for c in report.changes] == [[3]] * LAYERS
    assert [p.empty_slots for p in report.layers] == [0] * LAYERS
    text = cli("placement", tmp_path, "--all").stdout
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [row[2:4] + row[-1:] for row in rows] == [["3", "9", "0"]] * LAYERS
    single = cli("placement", tmp_path, "--layer", 0).stdout
    assert "r2   lost" in single
    assert "empty" not in single
    # The loss alone, before the engine rearranged, changed no slot.
    later = tmp_path / "later"
    Engine(later, dead={2: (40, 99)}, placements={0: BEFORE, 50: AFTER}).run()
    assert placement_report(open_run(later), 45, against=30).changes == []


def test_traffic_after_a_loss_has_means_over_the_ranks_that_serve(tmp_path: Path) -> None:
    engine = Engine(tmp_path, dead={2: (20, 60)}, options={"ranks_per_node": 2})
    engine.run()
    sent = np.zeros((RANKS, RANKS))
    for (step, rank), load in engine.loads.items():
        if step >= 20:
            sent[rank] += load.reshape(LAYERS, RANKS, WIDTH).sum(axis=(0, 2))
    report = traffic_report(open_run(tmp_path))
    assert report.notes[-1] == "rank 2 was lost in these steps and is left out of means"
    got = {receiver.destination: receiver.times_mean for receiver in report.receivers()}
    assert got == pytest.approx({r: sent[:, r].sum() / (sent.sum() / 3) for r in (0, 1, 3)})
    others = sent.sum() - np.trace(sent)
    assert report.pairs(1)[0].times_mean == pytest.approx(
        (sent - np.diag(np.diag(sent))).max() / (others / 6)
    )
    nodes = {receiver.destination for receiver in traffic_report(open_run(tmp_path), by="node").receivers()}
    assert nodes == {0, 1}


def test_export_of_loads_says_that_it_cannot_show_a_loss(tmp_path: Path) -> None:
    Engine(tmp_path / "dump", dead={2: (20, 60)}).run()
    run = open_run(tmp_path / "dump")
    (note,) = export_loads(run, "csv", tmp_path / "all.csv").notes
    assert note.startswith("rank 2 was lost in some of these steps")
    assert not export_loads(run, "csv", tmp_path / "before.csv", steps=(0, 20)).notes


def test_check_and_summary_say_when_a_rank_was_lost(tmp_path: Path) -> None:
    Engine(tmp_path, dead={2: (40, 99)}, placements={0: BEFORE, 40: AFTER}).run()
    found = {f.code: f for f in check_run(open_run(tmp_path)).findings}
    assert found["rank_lost"].severity == "warning"
    assert found["rank_lost"].text.startswith("rank 2 was lost: from step 40 on (20")
    assert not {"rank_stopped", "incomplete_steps", "incomplete_end", "placement_not_adopted"} & set(found)
    result = cli("summary", "--full", tmp_path)
    assert result.returncode == 0
    assert "RANK LOST: rank 2 from step 40 on" in result.stdout
    assert "3 of 4" in result.stdout
    assert cli("check", tmp_path).returncode == 0


def test_change_of_placement_with_a_loss_has_no_gain(tmp_path: Path) -> None:
    Engine(tmp_path, dead={2: (40, 99)}, placements={0: BEFORE, 40: AFTER}).run()
    [change] = rearrangement_report(open_run(tmp_path)).rearrangements
    assert (change.verdict, change.gain, change.slots_moved) == ("elastic", None, 3 * LAYERS)
    assert change.reason == "different ranks serve: lost ranks before none, after rank 2"


@pytest.mark.parametrize("segment_steps", [16, 2048])
@pytest.mark.parametrize("interval", [1, 2])
def test_loss_inside_one_segment_of_the_rank_is_found(
    tmp_path: Path, segment_steps: int, interval: int
) -> None:
    """The rank's writer lives on, and has rows on both sides of the steps without it."""
    options = {"segment_steps": segment_steps, "interval": interval}
    engine = Engine(
        tmp_path, dead={2: (21, 41)}, silent={1: (10, 16)}, delay=3, options=options, same_writer=True
    )
    engine.run(4)
    engine.loads = {key: load for key, load in engine.loads.items() if key[0] % interval == 0}
    run = open_run(tmp_path)
    [lost] = run.lost_ranks
    assert lost.rank == 2
    sampled = range(0, 60, interval)
    assert [s for s in sampled if s in range(*lost.steps)] == [s for s in sampled if 24 <= s < 41]
    complete = [s for s in sampled if engine.complete(s)]
    assert complete == [s for s in sampled if not 10 <= s < 16 and not 21 <= s < 24]
    frame = run.balancedness(by="step")
    assert frame["step"].to_list() == complete
    np.testing.assert_allclose(frame["value"].to_numpy(), [engine.balancedness(s) for s in complete])


def test_steps_dropped_after_the_engine_gave_a_rank_up_are_of_the_loss(tmp_path: Path) -> None:
    """Rank 1 drops steps while it serves, and again after the engine masked it, before it dies at 50."""
    engine = Engine(tmp_path, dead={1: (35, 99)}, dropped={1: (30, 50)}, options={"segment_steps": 64})
    engine.run(5)
    run = open_run(tmp_path)
    assert [(one.rank, one.steps.first, one.last_step) for one in run.lost_ranks] == [(1, 35, None)]
    complete = [*range(30), *range(35, 60)]
    assert [s for s in range(60) if engine.complete(s)] == complete
    assert run.balancedness(by="step")["step"].to_list() == complete
    summary = summarize(run)
    assert summary.steps.to_json()["incomplete"] == 5
    mean = np.mean([engine.balancedness(s) for s in complete])
    assert summary.spreads["balancedness"].mean == pytest.approx(mean)


@pytest.mark.parametrize("dummies", [False, True])
def test_rows_of_a_healthy_run_are_not_read_to_find_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dummies: bool
) -> None:
    writers = [
        ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=2, ep_size=2, ep_rank=rank, run_id="r",
            segment_steps=8, interval=3,
        )
        for rank in range(2)
    ]  # fmt: skip
    for step in range(40):
        for rank, writer in enumerate(writers):
            if dummies and rank == step // 3 % 2:
                writer.skip("dummy")
            else:
                writer.record(step, np.array([[500, 500]]), np.array([[0, 1]]))
    for writer in writers:
        writer.close()
    run = open_run(tmp_path)
    monkeypatch.setattr(ParquetSegment, "steps", lambda _: pytest.fail("steps are read"))
    assert run.lost_ranks == []


@pytest.mark.parametrize("segment_steps", [8, 2048])
def test_rank_that_only_stops_recording_is_not_lost(tmp_path: Path, segment_steps: int) -> None:
    engine = Engine(tmp_path, silent={1: (20, 60)}, options={"segment_steps": segment_steps})
    engine.run()
    run = open_run(tmp_path)
    assert run.lost_ranks == []
    summary = summarize(run)
    assert summary.steps.to_json()["recorded"] == 20
    assert summary.spreads["balancedness"].mean == pytest.approx(
        np.mean([engine.balancedness(s) for s in range(20)])
    )
    [estimate] = summary.estimates
    assert (estimate.missing_ranks, estimate.first_step, estimate.last_step) == ((1,), 20, 59)
    assert estimate.steps == 40
    T = [engine.tokens(s) for s in range(20, 60)]
    values = [(t.mean(axis=1) / t.max(axis=1)).mean() for t in T]
    assert estimate.balancedness.mean == pytest.approx(np.mean(values))
    assert estimate.balancedness.min_step == 20 + int(np.argmin(values))
    assert estimate.imbalance.mean == pytest.approx(
        np.mean([(t.max(axis=1) / t.mean(axis=1)).mean() for t in T])
    )
    idle = 1 - sum(t.mean(axis=1).sum() for t in T) / sum(t.max(axis=1).sum() for t in T)
    assert estimate.idle_fraction == pytest.approx(idle)
    result = cli("summary", tmp_path)
    assert result.returncode == 3
    assert "estimate from 3 of 4 ranks, steps 20-59, without rank 1:" in result.stdout


def test_run_in_which_a_rank_never_recorded_has_only_estimates(tmp_path: Path) -> None:
    engine = Engine(tmp_path, silent={3: (0, 60)})
    engine.run()
    run = open_run(tmp_path)
    assert (run.lost_ranks, run.expected_ranks) == ([], [0, 1, 2, 3])
    summary = summarize(run)
    assert summary.spreads["balancedness"].mean is None
    [estimate] = summary.estimates
    assert (estimate.missing_ranks, estimate.steps) == ((3,), 60)
    assert estimate.balancedness.mean == pytest.approx(np.mean([engine.balancedness(s) for s in range(60)]))
    result = cli("summary", tmp_path)
    assert (result.returncode, "estimate from 3 of 4 ranks, steps 0-59" in result.stdout) == (3, True)
    assert {"missing_ranks", "no_complete_step"} <= {f.code for f in check_run(run).findings}


@pytest.mark.parametrize(
    ("silent", "steps"),
    [
        ({3: (0, 60)}, None),
        ({1: (20, 60)}, (20, 60)),
        # Rank 0 stops, too: the larger group of steps that lack the same ranks counts.
        ({3: (0, 60), 0: (50, 60)}, None),
        ({3: (0, 60), 0: (10, 60)}, (4, 60)),
    ],
)
def test_every_command_estimates_steps_that_lack_ranks_by_the_others(
    tmp_path: Path, silent: dict[int, tuple[int, int]], steps: tuple[int, int] | None
) -> None:
    engine = Engine(tmp_path, silent=silent, placements={0: BEFORE, 30: AFTER}, options={"segment_steps": 16})
    engine.run(6)
    run = open_run(tmp_path)
    groups: dict[tuple[int, ...], list[int]] = {}
    for step in range(*(steps or (0, 60))):
        lack = tuple(rank for rank in range(RANKS) if (step, rank) not in engine.loads)
        groups.setdefault(lack, []).append(step)
    missing, own = max(groups.items(), key=lambda group: len(group[1]))
    assert missing
    T = [engine.tokens(s) for s in own]
    mean, most = (
        sum(f(t) for t in T) for f in (lambda t: t.mean(axis=1).sum(), lambda t: t.max(axis=1).sum())
    )

    ranks = rank_report(run, steps)
    span = (own[0], own[-1], len(own), [*missing])
    assert (ranks.first_step, ranks.last_step, ranks.recorded, ranks.missing_ranks) == span
    assert ranks.idle_fraction == pytest.approx(1 - mean / most)
    assert [r.load for r in ranks.ranks] == np.sum(T, axis=(0, 1)).tolist()
    assert ranks.steps.to_json()["recorded"] == 0
    over_time = timeline(run, bins=100, steps=steps)
    assert over_time.missing_ranks == [*missing]
    values = {b.first_step: b.mean for b in over_time.bins if b.steps}
    assert values == pytest.approx({s: engine.balancedness(s) for s in own})
    layer = layer_report(run, 1, steps=steps)
    assert (layer.complete, layer.missing_ranks, layer.steps) == (False, [*missing], len(own))
    assert [r.load for r in layer.ranks] == np.sum(T, axis=0)[1].tolist()
    logical = np.zeros(EXPERTS, int)
    for (step, _), load in engine.loads.items():
        if step in own:
            np.add.at(logical, (BEFORE if step < 30 else AFTER)[1], load[1])
    assert [e.load for e in layer.experts] == logical.tolist()
    experts = expert_report(run, 1, steps)
    assert experts.missing_ranks == [*missing]
    assert experts.experts["tokens"].to_list() == logical.tolist()

    label = f"estimate from {RANKS - len(missing)} of {RANKS} ranks, without rank "
    label += f"{', '.join(map(str, missing))}: no step is complete"
    span = f"in {len(own)} steps, {own[0]}-{own[-1]}"
    chosen = [] if steps is None else ["--steps", f"{steps[0]}-{steps[1] - 1}"]
    for command in (["ranks"], ["timeline"], ["experts"], ["layer", 1], ["traffic"]):
        shown = cli(*command, tmp_path, *chosen)
        assert shown.returncode == 3
        assert label in " ".join(shown.stdout.split())
        assert span in " ".join(shown.stdout.split())
        assert "complete steps" not in shown.stdout.replace("incomplete steps", "")
        document = json.loads(cli(*command, tmp_path, *chosen, "--json").stdout)
        assert document["missing_ranks"] == [*missing]


def test_complete_steps_are_never_mixed_with_estimates(tmp_path: Path) -> None:
    engine = Engine(tmp_path, silent={1: (5, 60)})
    engine.run(7)
    run = open_run(tmp_path)
    reports = rank_report(run), expert_report(run)
    for report in reports:
        assert (report.last_step, report.recorded, report.missing_ranks) == (4, 5, [])
    assert layer_report(run, 0).steps == 5
    assert timeline(run).missing_ranks == []
    assert timeline(run).mean == pytest.approx(np.mean([engine.balancedness(s) for s in range(5)]))


def test_rank_lost_before_the_recording_began(tmp_path: Path) -> None:
    engine = Engine(tmp_path, dead={0: (0, 99)}, placements={0: AFTER})
    engine.run()
    run = open_run(tmp_path)
    assert run.expected_ranks == [1, 2, 3]
    assert summarize(run).spreads["balancedness"].mean == pytest.approx(
        np.mean([engine.balancedness(s) for s in range(60)])
    )


def test_ranks_of_a_killed_engine_are_not_lost(tmp_path: Path) -> None:
    engine = Engine(tmp_path, silent={0: (57, 60), 1: (58, 60), 2: (55, 60)})
    engine.run()
    run = open_run(tmp_path)
    assert run.lost_ranks == []
    assert summarize(run).steps.to_json()["incomplete"] == 5


def test_few_tokens_are_no_evidence_of_a_loss(tmp_path: Path) -> None:
    for rank in range(2):
        with ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=4, ep_size=2, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range(30 if rank == 0 else 20):
                writer.record(step, np.array([[1, 0, int(step < 20), 0]]), np.array([[0, 1, 2, 3]]))
    assert open_run(tmp_path).lost_ranks == []


def test_loss_in_a_shape_that_changes_concerns_the_ranks_it_has(tmp_path: Path) -> None:
    """Ranks 2 and 3 leave in order at step 20; rank 1 of the remaining two dies at step 40."""
    rng = np.random.default_rng(3)
    loads: dict[tuple[int, int], Any] = {}
    for rank in range(4):
        with ExpertLoadWriter(
            tmp_path, model="m", num_logical_experts=4, ep_size=4, ep_rank=rank, run_id="r"
        ) as writer:
            for step in range({0: 60, 1: 40}.get(rank, 20)):
                size = 4 if step < 20 else 2
                load = rng.integers(50, 90, (1, 8))
                load[:, 4:] *= step < 40
                loads[step, rank] = load
                placement = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])
                writer.record(step, load, placement, ep_size=size)
    run = open_run(tmp_path)
    assert [(one.rank, one.steps.first) for one in run.lost_ranks] == [(1, 40)]
    shapes = [(c.ep_size, c.lost_ranks, c.recorded) for c in summarize(run).configurations]
    assert shapes == [(4, (), 20), (2, (), 20), (2, (1,), 20)]
    value = run.balancedness(by="step")["value"].to_numpy()
    assert (value[40:] == 1).all()
    T = sum(loads[30, r] for r in range(2)).reshape(2, -1).sum(axis=1)
    assert value[30] == pytest.approx(T.mean() / T.max())


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_losses_and_returns_give_the_recomputed_figures(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    steps = 40
    root = tmp_path_factory.mktemp("lost")
    ranks = data.draw(st.lists(st.integers(0, RANKS - 1), max_size=2, unique=True))
    dead = {}
    for rank in ranks:
        first = data.draw(st.integers(1, steps - 12))
        back = data.draw(st.one_of(st.none(), st.integers(first + 8, steps - 2)))
        dead[rank] = (first, steps + 9 if back is None else back)
    silent = {}
    others = [rank for rank in range(RANKS) if rank not in dead]
    if data.draw(st.booleans()):
        silent[data.draw(st.sampled_from(others))] = (data.draw(st.integers(1, steps - 1)), steps)
    engine = Engine(
        root, steps, dead, silent, data.draw(st.integers(0, 3)),
        options={"segment_steps": data.draw(st.sampled_from([5, 16, 2048]))},
        same_writer=data.draw(st.booleans()),
    )  # fmt: skip
    engine.run(data.draw(st.integers(0, 99)))
    run = open_run(root)
    found = {(one.rank, one.steps.first, one.last_step) for one in run.lost_ranks}
    delay = engine.delay
    truth = {(r, a + delay, b - 1 if b < steps else None) for r, (a, b) in dead.items()}
    assert found == truth
    complete = [step for step in range(steps) if engine.complete(step)]
    frame = run.balancedness(by="step")
    assert frame["step"].to_list() == complete
    np.testing.assert_allclose(frame["value"].to_numpy(), [engine.balancedness(s) for s in complete])
    for step, index in itertools.product((0, steps // 2, steps - 1), range(LAYERS)):
        slots = run.history.layer(index).at(step)
        serving = np.isin(np.arange(SLOTS) // WIDTH, engine.serving(step))
        assert slots is not None
        assert slots.tolist() == np.where(serving, BEFORE[index], -1).tolist()
    if complete:
        mean = summarize(run).spreads["balancedness"].mean
        assert mean == pytest.approx(np.mean([engine.balancedness(s) for s in complete]))


def test_run_that_lost_a_rank_is_compacted_up_to_the_loss_only(tmp_path: Path) -> None:
    Engine(tmp_path / "d", dead={2: (40, 99)}).run()
    result = cli("compact", tmp_path / "d", tmp_path / "c")
    assert result.returncode != 0
    assert "rank 2 was lost at step 40" in result.stderr
    assert "--steps -39" in result.stderr


def test_replay_after_a_loss_is_of_the_ranks_that_serve(tmp_path: Path) -> None:
    engine = Engine(tmp_path, dead={1: (20, 99)}, placements={0: AFTER})
    engine.run(2)
    kept = [slot for slot in range(SLOTS) if slot // WIDTH != 1]
    played = replay_run(open_run(tmp_path), [Setting("static", 3, 3, None, None, None)])
    assert (played.first_step, played.scored) == (20, 40)
    measured = [engine.balancedness(s) for s in range(20, 60)]
    assert played.measured_balancedness == pytest.approx(np.mean(measured))
    [outcome] = played.outcomes
    assert (outcome.ep_size, outcome.num_physical_experts) == (3, len(kept))
    assert any("rank 1 is lost" in note for note in played.notes)
