"""`replay`: the figures of other settings on the recorded loads, compared with today's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, Protocol

import numpy as np

from eplb_analyze.analysis.cost import RunCost, cost_of
from eplb_analyze.analysis.milliseconds import Milliseconds
from eplb_analyze.analysis.traffic import Pair, Shares, busiest_pairs, by_node
from eplb_analyze.dispatch.deal import Dealt
from eplb_analyze.dispatch.named import LP, NAMES
from eplb_analyze.dispatch.named import MEASURED as AS_MEASURED
from eplb_analyze.json_report import RunReport, remembers_run
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.metrics.cost import CostStatus
from eplb_analyze.metrics.formulas import Float64
from eplb_analyze.policies import policy
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import Sums, estimate_notes, last_of_configurations
from eplb_analyze.reader.lost import lost_in, remaining
from eplb_analyze.reader.recorded_setting import CONDITIONS, Recorded, Setting, recorded
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.replay import shared_play
from eplb_analyze.replay.grouping import Grouping, Groupings
from eplb_analyze.replay.pricing import Objective, Pause, effort, gain, lines_of, mean_step_ms, net, pause_of
from eplb_analyze.replay.scores import ALL, TODAY, Scores
from eplb_analyze.replay.selftest import RecordedSettingTest, SelfTest
from eplb_analyze.replay.setting_run import Move, Placed
from eplb_analyze.replay.settings import Choices, grid
from eplb_analyze.replay.sharing import BOUND, check_objective, check_policies
from eplb_analyze.replay.simulator import NotReplayableError, Simulation
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import listed, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Shape

#: If the least number of groups that the placements show does not reproduce them, so many more are tried.
FINER_TRIED = 3
#: So many of the busiest links are listed.
LINKS = 5


@frozen
class ReplayedSteps:
    """The steps of one shape over which settings are replayed."""

    #: Half-open, from the first to the last complete step.
    steps: StepRange
    shape: Shape
    #: Complete steps among them.
    recorded: int
    #: The step that starts are counted from.
    origin: int
    #: Median time from one step to the next, so that pauses do not count; None if no two are consecutive.
    step_seconds: float | None
    #: How complete the steps of the requested range are.
    whole: Completeness
    notes: list[str]
    #: Ranks that all of the steps lack: the figures are estimates, by the loads of the others.
    missing_ranks: list[int] = field(default_factory=list)


class _StepTimes(Sums):
    """The time from the step before to each step, which may follow one of a phase that is left out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.ms: list[Float64] = []

    def merge(self, block: Block, part: Any) -> None:
        self.ms.append(block.since_last_ms[np.isfinite(block.since_last_ms)])


def last_steps(run: Run, steps: tuple[int, int] | None = None) -> ReplayedSteps:
    """The last configuration of a half-open range of steps (default: all). Reads no loads.

    Call it inside ``run.retry_without_damaged``.

    Raises:
        NotInDumpError: the dump has no such step.
        NotReplayableError: the order of the steps is not known.
        DumpError: no step is complete.
    """
    origin = run.info.origin
    unknown = {} if origin is None else origin.unknown
    if "step_order" in unknown:
        raise NotReplayableError(f"{run.path}: this imported run does not state {unknown['step_order']}")
    sums, whole, earlier = last_of_configurations(run, steps, _StepTimes)
    starts_from = run.step_range[0] or 0
    notes = estimate_notes(run, sums.missing, sums.recorded, sums.first_step, sums.last_step)
    if earlier:
        starts_from = sums.first_step
        notes.append(
            "ep_size or the number of slots changed, or a rank was lost: only "
            f"{run.clock.range_label(sums.first_step, sums.last_step)} are "
            f"replayed (to replay earlier steps, use --steps {earlier[-1].first}-{sums.first_step - 1})"
        )
    ms = np.concatenate(sums.ms)
    seconds = float(np.median(ms)) / 1e3 if len(ms) and run.info.timed else None
    codes = ("step_order", "placement", "placement_steps", "earlier_placements", "passes", "split")
    notes += run.import_caveats(*codes)
    if lost_in(sums.shape):
        notes.append(f"rank {listed(lost_in(sums.shape))} is lost: the replay covers only the other ranks")
    return ReplayedSteps(
        sums.steps, remaining(sums.shape), sums.recorded, starts_from, seconds, whole, notes, [*sums.missing]
    )


@frozen
class Outcome:
    """The figures of one setting. Shares and seconds are by tokens, only ``ms_per_step`` by measured time."""

    #: None: the recorded placements.
    setting: Setting | None
    ep_size: int
    num_physical_experts: int
    balancedness: float | None
    idle_fraction: float | None
    #: No placement with this many slots and ranks has a smaller idle fraction.
    idle_fraction_bound: float | None
    moves: list[Move]
    #: Today's idle fraction minus this one.
    idle_fraction_saved: float | None = None
    #: 1 − Σ max / today's Σ max; None if the EP size differs from today's.
    time_saved: float | None = None
    #: The pauses of its rearrangements, measured or by the given cost of an expert; None if only assumed.
    cost_seconds: float | None = None
    #: Seconds saved, minus the pauses beyond today's.
    net_seconds: float | None = None
    #: Slots with a token of the rank with most of them: means over active layers and steps.
    active_experts: float | None = None
    #: The fitted price of the work saved beside today's placements; None if not measurable.
    gain_ms_per_step: Milliseconds | None = None
    #: The gain less the pauses of rearrangements beyond today's.
    net_ms_per_step: Milliseconds | None = None
    #: The expert weights fetched by all ranks; None if the size of an expert is not known.
    moved_gb: float | None = None
    #: How often a rearrangement was due and did not happen, by the conditions of the setting.
    skipped: int = 0
    #: The most expert weights that a GPU holds in the end, over all layers.
    experts_per_gpu: int = 0
    #: Their size; None if the size of an expert is not known.
    gb_per_gpu: float | None = None
    #: Where tokens go, on average; None if the recording does not show which rank sent them.
    traffic: Shares | None = None
    #: By the objective `tokens+traffic`: the share of today's time that it saves; None by others.
    combined_saved: float | None = None

    @property
    def weights_moved(self) -> int:
        """Expert weights fetched by all ranks."""
        return sum(move.weights for move in self.moves)

    @property
    def weights_moved_busiest_rank(self) -> int:
        """Expert weights fetched by the rank that fetched most in each rearrangement, summed."""
        return sum(move.busiest_rank for move in self.moves)

    def to_json(self) -> dict[str, Any]:
        figures = {name: value for name, value in vars(self).items() if name not in ("setting", "moves")}
        moved = {
            "rearrangements": len(self.moves),
            "weights_moved": self.weights_moved,
            "weights_moved_busiest_rank": self.weights_moved_busiest_rank,
        }
        return _stated(self.setting) | figures | moved


def _stated(setting: Setting | Recorded | None) -> dict[str, Any]:
    names = ("policy", "num_redundant_experts", "interval", "window", "start", "dispatch", *CONDITIONS)
    return {name: getattr(setting, name, None) for name in names}


@frozen
class Links:
    """The links between two ranks, and between two nodes, with most tokens."""

    #: Between two ranks.
    ranks: list[Pair]
    #: Between two nodes; None if the nodes are not known.
    nodes: list[Pair] | None


@frozen
class Replay(RunReport):
    """``outcomes`` are sorted, the best first; ``rows`` are their rows in ``scores``."""

    part: ReplayedSteps
    recorded: Recorded
    #: What settings are sorted by, and why.
    objective: Objective
    objective_reason: str
    #: What imbalance costs in the run; it prices settings.
    cost: RunCost
    pause: Pause
    #: The groups and nodes that policies were given.
    grouping: Grouping
    #: Steps scored, the same for all settings; complete steps without a known placement are left out.
    first_step: int
    last_step: int
    #: Steps that the settings are judged by.
    scored: int
    #: Complete steps in which the placement of a layer is not known.
    left_out: int
    #: The mean time of a step without pauses and idle gaps; the median time from one step to the next if most
    #: steps are of phases without a price; None if no two are consecutive.
    step_seconds: float | None
    #: The time of these steps and of those between sampled ones, from ``step_seconds``.
    seconds: float | None
    cost_per_expert_ms: float | None
    #: The recorded placements, with tokens shared as in all settings, if these have one dispatch.
    today: Outcome
    #: How tokens are dealt to replicas, as measured in the recorded loads.
    dispatch: Dealt
    #: Whether the recording shows which EP rank sent a token, and how many tokens each step had.
    sources_known: bool
    batches_known: bool
    #: Why the recording does not show which rank sent a token; None if it does.
    sources_unknown: str | None
    #: The nodes of the recorded ranks; None if their number is only assumed.
    known_nodes: int | None
    #: Whether all ranks had all tokens, so that none was sent to another rank.
    tokens_everywhere: bool
    #: The recorded setting replayed; None if it is not known, or there are too few steps.
    self_test: SelfTest | None
    #: As recorded, with tokens where they went.
    measured_balancedness: float | None
    measured_idle_fraction: float | None
    outcomes: list[Outcome]
    scores: Scores
    rows: list[int]
    #: By the objective `tokens+traffic`: how many tokens of work a token from another node counts.
    cross_node_weight: float | None = None
    #: If asked for: the placements of each outcome, by the step from which each holds.
    placements: list[Placed] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def effort(self) -> Float64:
        """What stands for time, by row and column of the scores."""
        return effort(self.scores, self.objective, self.cross_node_weight)

    def links(self, row: int = TODAY) -> Links | None:
        """The busiest links under the placements of a row of the scores; None if not known."""
        flows = self.scores.flows
        if flows is None or self.scores.ep_size[row] != self.part.shape.ep_size or not flows[row].any():
            return None
        nodes = None
        if self.known_nodes is not None:
            node = np.arange(len(flows[row])) * self.known_nodes // len(flows[row])
            nodes = busiest_pairs(by_node(flows[row], node), LINKS)
        return Links(busiest_pairs(flows[row], LINKS), nodes)

    @property
    def dispatches(self) -> list[str]:
        """The names of the dispatches of today's placements and of the settings, each once."""
        return _dispatches(self.recorded, [o.setting for o in self.outcomes if o.setting is not None])

    def to_json(self) -> dict[str, Any]:
        own = self.recorded.setting()
        return self.document(
            {
                "steps": self.part.whole,
                "missing_ranks": self.part.missing_ranks,
                "first_step": self.first_step,
                "last_step": self.last_step,
                "scored": self.scored,
                "left_out": self.left_out,
                "step_seconds": self.step_seconds,
                "seconds": self.seconds,
                "cost_per_expert_ms": self.cost_per_expert_ms,
                "recorded": self.recorded,
                "grouping": self.grouping,
                "objective": self.objective,
                "objective_reason": self.objective_reason,
                "cost": self.cost,
                "pause": self.pause,
                #: What was recorded in these steps.
                "measured": {
                    "balancedness": self.measured_balancedness,
                    "idle_fraction": self.measured_idle_fraction,
                },
                #: How tokens are dealt among replicas.
                "dispatch": {
                    #: For the dispatch `measured`: the share of an expert's tokens that is dealt in rounds.
                    "in_rounds": self.dispatch.in_rounds,
                    #: Whether the recording shows which EP rank sent a token.
                    "sources_known": self.sources_known,
                    #: Whether it states the tokens of each step.
                    "batches_known": self.batches_known,
                },
                "self_test": None if self.self_test is None else self.self_test.to_json(),
                "today": self.today.to_json() | _stated(self.recorded),
                #: Why the recording does not show which rank sent a token; null if it does.
                "sources_unknown": self.sources_unknown,
                "num_nodes": self.known_nodes,
                "cross_node_weight": self.cross_node_weight,
                #: Under today's placements.
                "links": self.links(),
                #: Under the placements of the best setting.
                "best_links": self.links(self.rows[0]) if self.rows else None,
                #: The settings, the best first.
                "settings": [o.to_json() | {"as_recorded": o.setting == own} for o in self.outcomes],
                "notes": self.notes,
            }
        )


class Search(Protocol):
    """What to try in place of all combinations."""

    def first(self, run: Run, today: Recorded, steps: int) -> list[Setting]:
        """The first settings, given today's and the number of steps."""

    def refined(self, played: Replay, steps: int) -> list[Setting]:
        """More settings, given a replay of the first ones."""


@remembers_run
def replay_run(
    run: Run,
    choices: Choices | Sequence[Setting] | None = None,
    steps: tuple[int, int] | None = None,
    *,
    num_groups: int | None = None,
    num_nodes: int | None = None,
    objective: Objective | None = None,
    cost_per_expert_ms: float | None = None,
    expert_mb: float | None = None,
    cross_node_weight: float | None = None,
    workers: int | None = None,
    processes: int = 1,
    keep_placements: bool = False,
    search: Search | None = None,
    score_steps: int | None = None,
) -> Replay:
    """Replay settings over the last configuration of a half-open range of steps (default: all).

    Args:
        choices: a grid of settings, or the settings themselves; default: the grid that suits the run.
        num_groups: the model's expert groups: policies keep a group on one node if they can. Default: what
            the engine stated, else what the recorded placements show, else one.
        num_nodes: the nodes of the recorded ranks, with the same default.
        objective: what outcomes are sorted by; default ``ms`` if the cost of imbalance is measured, else
            ``tokens``.
        cost_per_expert_ms: the time that a rank needs to fetch the weights of one expert of one layer.
        expert_mb: the weights of one expert of one layer, in MB of 10^6 bytes; gives the GB moved.
        cross_node_weight: by the objective ``tokens+traffic``, a token that a rank gets from another node
            counts as so many tokens of work more.
        workers: threads; the result does not depend on them. Default: one for each core.
        processes: up to so many share many settings of a long run. A script that asks for several needs
            ``if __name__ == "__main__":``, because each imports it.
        keep_placements: also return all placements, which takes memory.
        search: what to try instead of all combinations, if nothing but a dispatch is chosen.
        score_steps: score about so many of the steps, and compute no bounds; default: all.

    Raises:
        NotInDumpError: the dump has no such step.
        DumpError: no step is complete, or no placement is known.
        UsageError: a setting or policy is impossible, or the nodes do not divide the ranks.
    """
    run = run.with_loads()

    def play() -> Replay:
        estimated = run.estimated(steps)
        part = last_steps(estimated, steps)
        serving = estimated.serving_only()
        today = _named_dispatch(recorded(serving, part.shape), choices)
        groupings = Groupings(serving, today, part.shape, num_groups, num_nodes)
        engine_steps = part.recorded * run.info.interval
        default = isinstance(choices, Choices | None) and (choices or Choices()).are_default
        searching = search if default else None
        settings, notes = (
            _settings(serving, today, choices, engine_steps)
            if searching is None
            else (searching.first(serving, today, engine_steps), [])
        )
        tried, own = len(settings), replace(today, dispatch=AS_MEASURED).setting()
        check_objective(
            serving, objective, _dispatches(today, settings), groupings.known_nodes, cross_node_weight
        )
        check_policies(serving, settings, part.shape.ep_size)
        cost, pause = cost_of(estimated), pause_of(estimated, cost_per_expert_ms)
        if own is not None and own not in settings:  # replayed, too, as a test
            settings = [*settings, own]

        def simulated(grouping: Grouping, settings: list[Setting]) -> tuple[Simulation, SelfTest | None]:
            simulation = Simulation(
                serving, part.steps, part.shape, part.origin,
                [(setting, _policy(setting.policy)) for setting in settings],
                recorded_steps=part.recorded, num_groups=grouping.num_groups, lines=lines_of(cost),
                dispatch=today.dispatch, score_steps=score_steps, known_nodes=groupings.known_nodes,
                num_nodes=functools.partial(grouping.nodes, recorded_ranks=part.shape.ep_size),
            )  # fmt: skip
            if keep_placements:
                for each in simulation.setting_runs[:tried]:
                    each.kept = list(each.placed)
            test = None
            if own is not None and own in settings:
                test = RecordedSettingTest(simulation, settings.index(own), today)
            shared_play.play(simulation, part.recorded, workers, processes)
            return simulation, None if test is None else test.result(grouping, groupings.seen_groups)

        chosen, *finer = groupings.likely
        simulation, tested = simulated(chosen, settings)
        if own is not None and tested is not None and not tested.reproduced:
            for grouping in finer[:FINER_TRIED]:
                again = simulated(grouping, [own])[1]
                if again is not None and again.reproduced:
                    chosen = grouping
                    simulation, tested = simulated(chosen, settings)
                    break
        notes = [*part.notes, *notes, *groupings.notes, *groupings.note(chosen)]
        for ranks in sorted({setting.ep_size for setting in settings} - {part.shape.ep_size}):
            uneven = uneven_nodes(ranks, chosen.ranks_per_node)
            notes += [f"{note}; policies assume one node" for note in uneven]
        if tested is not None and tested.doubt is not None:
            notes.insert(0, tested.doubt)

        def result(simulation: Simulation, tried: int, notes: list[str]) -> Replay:
            return _result(
                simulation, part, today, chosen, tested, tried, objective, cost, pause, cost_per_expert_ms,
                expert_mb, cross_node_weight, groupings.known_nodes, notes,
            )  # fmt: skip

        found = result(simulation, tried, notes)
        if searching is not None and (others := searching.refined(found, engine_steps)):
            simulation, _ = simulated(chosen, [*others])
            found = _joined(found, result(simulation, len(others), [*notes]))
        return found

    return run.retry_without_damaged(play)


def _named_dispatch(today: Recorded, choices: Choices | Sequence[Setting] | None) -> Recorded:
    """Today's setting with the dispatch asked for, if it is one; settings differ in nothing else then.

    If several are compared, today's placements share tokens as measured.
    """
    names = choices.dispatches if isinstance(choices, Choices) else None
    return replace(today, dispatch=names[0]) if names is not None and len(set(names)) == 1 else today


def _settings(
    run: Run, today: Recorded, choices: Choices | Sequence[Setting] | None, steps: int
) -> tuple[list[Setting], list[str]]:
    if choices is None or isinstance(choices, Choices):
        return grid(run, today, choices or Choices(), steps)
    return list(choices), []


def _result(
    simulation: Simulation,
    part: ReplayedSteps,
    today: Recorded,
    grouping: Grouping,
    tested: SelfTest | None,
    tried: int,
    objective: Objective | None,
    cost: RunCost,
    pause: Pause,
    cost_ms: float | None,
    expert_mb: float | None,
    cross_node_weight: float | None,
    known_nodes: int | None,
    notes: list[str],
) -> Replay:
    run, scores = simulation.run, simulation.scores
    seconds, each = None, part.step_seconds
    if each is not None:
        mean_ms = mean_step_ms(cost, scores)
        each = each if mean_ms is None else mean_ms / 1e3
        seconds = each * simulation.scored * run.info.interval
    as_today = _today(simulation)
    if pause.basis == "measured" and as_today.moves:
        pause = replace(pause, weights=as_today.weights_moved_busiest_rank / len(as_today.moves))
    outcomes = [_outcome(simulation, row) for row in range(tried)]
    # Beside other numbers of ranks, whose net gain is not known, settings are sorted by what all have.
    priced = pause
    if cost_ms is None and any(o.ep_size != part.shape.ep_size for o in outcomes):
        priced = replace(pause, basis="assumed")
    paid = priced.seconds(as_today.moves)
    as_today = replace(
        as_today, cost_seconds=paid, net_seconds=None if paid is None or seconds is None else 0.0
    )
    outcomes = [_against(outcome, as_today, seconds, priced) for outcome in outcomes]
    if expert_mb is not None:
        as_today, *outcomes = [
            replace(
                o,
                moved_gb=o.weights_moved * expert_mb / 1e3,
                gb_per_gpu=o.experts_per_gpu * expert_mb / 1e3,
            )
            for o in (as_today, *outcomes)
        ]
    steps = simulation.scored * run.info.interval
    outcomes = [
        _in_ms(o, as_today, saved, pause, steps)
        for o, saved in zip(outcomes, _gains(simulation, today, tried, cost), strict=True)
    ]
    if objective is Objective.TRAFFIC:
        total = effort(scores, objective, cross_node_weight).sum(axis=1)
        outcomes = [
            replace(outcome, combined_saved=1 - float(total[row] / total[TODAY]) if total[TODAY] else None)
            if outcome.ep_size == part.shape.ep_size
            else outcome
            for row, outcome in enumerate(outcomes)
        ]
    objective, why = _objective(objective, cost, _dispatches(today, simulation.settings[:tried]))
    sort_key = functools.partial(rank, objective=objective)
    order = sorted(range(len(outcomes)), key=lambda row: (*sort_key(outcomes[row]), row))
    notes += simulation.sharing.notes()
    if simulation.left_out:
        notes.append(
            f"{plural(simulation.left_out, 'complete step')} left out: the placement of a layer is not "
            f"known in them"
        )
    if simulation.unplaced:
        notes.append(f"{plural(simulation.unplaced, 'token')} in slots without an expert are left out")
    if any(outcome.ep_size != part.shape.ep_size for outcome in outcomes):
        notes.append("fewer ranks are easier to balance: compare only settings with the same EP size")
    if cost_ms is not None and seconds is None:
        notes.append("no two consecutive steps were recorded, so step times and the net gain are unknown")
    return Replay(
        run_id=run.info.run_id,
        model=run.info.model,
        part=part,
        recorded=today,
        objective=objective,
        objective_reason=why,
        cost=cost,
        pause=pause,
        grouping=grouping,
        first_step=simulation.first_step,
        last_step=simulation.last_step,
        scored=simulation.scored,
        left_out=simulation.left_out,
        step_seconds=each,
        seconds=seconds,
        cost_per_expert_ms=cost_ms,
        today=as_today,
        dispatch=simulation.sharing.measured,
        sources_known=simulation.sharing.sources_unknown is None,
        batches_known=simulation.sharing.batches_known,
        sources_unknown=simulation.sharing.sources_unknown,
        known_nodes=known_nodes,
        cross_node_weight=cross_node_weight,
        tokens_everywhere=run.info.token_replication > 1,
        self_test=tested,
        measured_balancedness=simulation.recorded.balancedness,
        measured_idle_fraction=simulation.recorded.idle_fraction,
        outcomes=[outcomes[row] for row in order],
        scores=scores,
        rows=order,
        placements=[kept for row in order if (kept := simulation.setting_runs[row].kept) is not None] or None,
        notes=notes,
    )


def _joined(first: Replay, second: Replay) -> Replay:
    """A replay with the settings of another one of the same steps, too."""
    count, outcomes = len(second.outcomes), [*second.outcomes, *first.outcomes]
    rows = [*second.rows, *(row + count for row in first.rows)]
    sort_key = functools.partial(rank, objective=first.objective)
    order = sorted(range(len(outcomes)), key=lambda i: (*sort_key(outcomes[i]), rows[i]))
    return replace(
        first,
        outcomes=[outcomes[i] for i in order],
        rows=[rows[i] for i in order],
        scores=first.scores.with_settings(second.scores, count),
        notes=[*dict.fromkeys([*first.notes, *second.notes])],
    )


def _policy(name: str) -> policy.Policy:
    """The policy of a setting; the oracle places each step in the simulation, and moves nothing."""
    return policy.static if name == policy.ORACLE else policy.named(name)


def _dispatches(today: Recorded, settings: Sequence[Setting]) -> list[str]:
    """The names of the dispatches of today's placements and of settings, each once."""
    return sorted({today.dispatch, *(setting.dispatch for setting in settings)}, key=NAMES.index)


def _gains(simulation: Simulation, today: Recorded, tried: int, cost: RunCost) -> list[Interval | str]:
    """ms per step that each setting tried saves, or why it is not known."""
    return [
        BOUND if LP in (today.dispatch, setting.dispatch) else gain(cost, simulation.scores, row)
        for row, setting in enumerate(simulation.settings[:tried])
    ]


def _objective(asked: Objective | None, cost: RunCost, dispatches: Sequence[str]) -> tuple[Objective, str]:
    """What settings are sorted by, and why."""
    if asked is not None:
        return asked, "as asked for"
    if LP in dispatches:
        return Objective.TOKENS, BOUND
    measured = cost.status is CostStatus.MEASURED
    return Objective.MS if measured else Objective.TOKENS, cost.message


def _outcome(simulation: Simulation, row: int) -> Outcome:
    own = simulation.setting_runs[row]
    held = _experts_per_gpu(own.placed[-1][1], own.setting.ep_size)
    # One that is late may hold only after the last step, where it has no price.
    moves = [move for move in own.moves if move.step <= simulation.last_step]
    return Outcome(
        setting=simulation.settings[row], moves=moves, skipped=own.skipped, experts_per_gpu=held,
        **_figures(simulation, row, own.slots),
    )  # fmt: skip


def _experts_per_gpu(placement: Int32, ep_size: int) -> int:
    return int((placement.reshape(len(placement), ep_size, -1) >= 0).sum(axis=(0, 2)).max())


def _figures(simulation: Simulation, row: int, slots: int) -> dict[str, Any]:
    scores = simulation.scores
    ep_size = int(scores.ep_size[row])
    bound = simulation.bounds.get((slots, ep_size))
    return {
        "ep_size": ep_size,
        "num_physical_experts": slots,
        "balancedness": scores.balancedness_of(row),
        "idle_fraction": scores.idle_fraction_of(row),
        "active_experts": scores.active_experts_of(row),
        "traffic": traffic_of(scores, row),
        "idle_fraction_bound": max(0.0, 1 - float(scores.mean[row].sum()) / bound) if bound else None,
    }


def traffic_of(scores: Scores, row: int, columns: slice = ALL) -> Shares | None:
    """How far the tokens of a row go; None if not known."""
    stays = scores.stays(row, columns)
    if stays is None:
        return None
    on_rank, on_node = stays
    return (
        Shares(on_rank, None, None)
        if math.isnan(on_node)
        else Shares(on_rank, max(0.0, on_node - on_rank), max(0.0, 1 - on_node))
    )


def _today(simulation: Simulation) -> Outcome:
    """The recorded placements, with the moves of the rearrangements within the scored steps."""
    run, slots = simulation.run, simulation.shape.num_physical_experts
    moves = []
    for change in run.history.rearrangements():
        if not simulation.first_step < change.last_step <= simulation.last_step:
            continue
        histories = [run.history.layer(i) for i in change.layers]
        pairs = [(history.at(change.first_step - 1), history.at(change.last_step)) for history in histories]
        known = [(a, b) for a, b in pairs if a is not None and b is not None and len(a) == len(b) == slots]
        if known:
            old, new = (np.stack(each) for each in zip(*known, strict=True))
            moves.append(Move.of(change.first_step, old, new, simulation.shape.ep_size, simulation.experts))
    held = simulation.layers * slots // simulation.shape.ep_size
    return Outcome(setting=None, moves=moves, experts_per_gpu=held, **_figures(simulation, TODAY, slots))


def _against(outcome: Outcome, today: Outcome, seconds: float | None, pause: Pause) -> Outcome:
    """The outcome with what it saves compared with today."""
    if outcome.idle_fraction is None or today.idle_fraction is None:
        return outcome
    time_saved = net = None
    cost = pause.seconds(outcome.moves)
    if outcome.ep_size == today.ep_size:
        # Σ max is Σ mean / (1 − idle), and Σ mean depends only on the EP size.
        time_saved = 1 - (1 - today.idle_fraction) / (1 - outcome.idle_fraction)
    if cost is not None and time_saved is not None and seconds is not None and today.cost_seconds is not None:
        net = time_saved * seconds - (cost - today.cost_seconds)
    saved = today.idle_fraction - outcome.idle_fraction
    return replace(
        outcome, idle_fraction_saved=saved, time_saved=time_saved, cost_seconds=cost, net_seconds=net
    )


def _in_ms(outcome: Outcome, today: Outcome, saved: Interval | str, pause: Pause, steps: int) -> Outcome:
    """The outcome with its worth in time, if that is known."""
    if isinstance(saved, str):
        return outcome
    left = net(saved, pause, outcome.moves, today.moves, steps)
    return replace(outcome, gain_ms_per_step=Milliseconds.of(saved), net_ms_per_step=Milliseconds.of(left))


def rank(outcome: Outcome, objective: Objective) -> tuple[float, float, int, int]:
    """The sort key: the objective; then the idle fraction, fewer slots and fewer weights moved.

    Today's placements have a net gain of 0, if gains are known.
    """
    first = np.inf
    if objective is Objective.MS:
        known = outcome.net_ms_per_step
        first = 0.0 if outcome.setting is None else -known.estimate if known is not None else np.inf
    elif objective is Objective.ACTIVE:
        first = np.inf if outcome.active_experts is None else round(outcome.active_experts, 9)
    elif objective is Objective.TRAFFIC:
        saved = 0.0 if outcome.setting is None else outcome.combined_saved
        first = np.inf if saved is None or math.isnan(saved) else -round(saved, 9)
    elif outcome.net_seconds is not None:
        first = -outcome.net_seconds
    idle = outcome.idle_fraction if outcome.idle_fraction is not None else np.inf
    # Differences by rounding do not count.
    return (first, round(idle, 9), outcome.num_physical_experts, outcome.weights_moved)
