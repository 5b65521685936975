"""Replay recorded loads under other settings, block by block; placements depend on past loads only.

The loads of a block are folded to logical experts once for all settings. When a setting rearranges, its
policy sees the sums over the steps of a window before, and nothing else. Every step is scored with the tokens
of an expert shared by its replicas as the setting's dispatch does (:mod:`eplb_analyze.replay.sharing`).
:mod:`eplb_analyze.replay.replay` turns scores into figures.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_analyze.analysis.cost import phases_of
from eplb_analyze.dispatch.deal import drawn, random_bits, replica_draws
from eplb_analyze.dispatch.named import LP
from eplb_analyze.dispatch.named import MEASURED as AS_MEASURED
from eplb_analyze.dispatch.rule import Busiest, Replicas, busiest_of, rank_loads
from eplb_analyze.errors import DumpError
from eplb_analyze.metrics.cost import EXCHANGE_RATES
from eplb_analyze.metrics.formulas import Float64, Terms, sglang
from eplb_analyze.parallel import num_cores, split_range
from eplb_analyze.policies import policy as policies
from eplb_analyze.policies.oracle import place_each
from eplb_analyze.policies.policy import Policy
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import LayerHistory, fold
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.locality import Locality, Piece
from eplb_analyze.replay.scores import (
    ACTIVE,
    ACTIVE_EXPERTS,
    BALANCEDNESS,
    FIGURES,
    MAXIMUM,
    MEAN,
    ON_NODE,
    ON_RANK,
    TODAY,
    Line,
    Scores,
)
from eplb_analyze.replay.setting_run import PrefixSums, SettingRun, Utilization, uses_sources
from eplb_analyze.replay.sharing import Sharing
from eplb_analyze.replay.source_loads import SourceLoads, by_rank
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.journal import Int32, Int64, Shape

#: The bound is computed from sums over steps: about this many for each run, counting each layer's.
BOUND_SUMS = 1 << 17
#: A short run's tokens are dealt several times, so that about this many layers of steps are dealt.
DEALS = 1 << 15
MAX_REPEATS = 16

#: Number of slots and of EP ranks.
Size = tuple[int, int]


class NotReplayableError(DumpError):
    """The dump lacks what a replay needs to know."""


class Simulation:
    """All settings replayed over a range of steps of one shape.

    Attributes, after :meth:`play`:
        scores: of all settings.
        settings: in the order given.
        setting_runs: one for each setting; the same one for those that differ only in the dispatch.
        bounds: lower bound of the tokens of the busiest ranks, summed over layers and steps, by size.
        recorded: the figures of the loads as recorded.
        scored, left_out: complete steps scored, or that those scored stand for, and those without a known
            placement.
        first_step, last_step: of these steps.
        sharing: how tokens are shared by replicas.
        unplaced: tokens on slots that hold no expert, which only ``recorded`` counts.
    """

    def __init__(
        self,
        run: Run,
        steps: StepRange,
        shape: Shape,
        origin: int,
        settings: Sequence[tuple[Setting, Policy]],
        *,
        recorded_steps: int,
        num_nodes: Callable[[int], int],
        num_groups: int = 1,
        lines: Sequence[Line] = (),
        dispatch: str = AS_MEASURED,
        score_steps: int | None = None,
        known_nodes: int | None = None,
    ) -> None:
        """
        Args:
            origin: the step that the starts of settings are counted from.
            recorded_steps: about how many steps are complete.
            num_nodes: the number of nodes, given the EP size.
            num_groups: of experts, as the model has them.
            lines: the efforts that are scored, too.
            dispatch: the name of that of today's placements.
            score_steps: in a longer run, about so many of the steps are scored, drawn by chance, and no bound
                is computed; None: all are.
            known_nodes: of the recorded ranks; None if their number is only assumed.

        Raises:
            NotReplayableError: the placement of a layer is not known in any step.
        """
        self.run, self.steps, self.shape, self.num_nodes = run, steps, shape, num_nodes
        self.layers, self.experts = run.info.num_layers, run.info.num_logical_experts
        self.histories = [run.history.layer(i) for i in range(self.layers)]
        self._known_from = self._first_known()
        #: How many experts each layer has.
        self.in_layer = run.history.num_experts(self.experts, self.layers)
        self.settings = [setting for setting, _ in settings]
        #: Placements do not depend on the dispatch.
        played: dict[Setting, SettingRun] = {}
        for setting, policy in settings:
            if (placed := replace(setting, dispatch=AS_MEASURED)) not in played:
                initial, nodes = self._initial_placement(setting), num_nodes(setting.ep_size)
                played[placed] = SettingRun(placed, policy, initial, origin, nodes, num_groups, self.in_layer)
        self.setting_runs = [played[replace(s, dispatch=AS_MEASURED)] for s in self.settings]
        self.sharing = Sharing(run, shape, self.histories, self.settings, dispatch, num_nodes)
        todays = len(self.sharing.names) - len(settings)
        #: The row of the recorded placements with the dispatch measured.
        self.today_as_measured = TODAY + 1 - todays
        self.scores = Scores([*(s.ep_size for s, _ in settings), *[shape.ep_size] * todays], lines)
        self._known_nodes = known_nodes
        self.recorded = RecordedFigures()
        #: One of so many steps is scored.
        self._every = max(1, recorded_steps // score_steps) if score_steps else 1
        #: Active experts are a figure of all settings.
        self._exchanges = sorted({0, *(exchange for _, exchange in lines)})
        sizes = {(own.slots, own.setting.ep_size) for own in self.setting_runs}
        if shape.num_physical_experts >= self.experts:  # else experts have no slot, and there is no bound
            sizes.add((shape.num_physical_experts, shape.ep_size))
        if score_steps:
            sizes.clear()
        self.bounds: dict[Size, float] = dict.fromkeys(sorted(sizes), 0.0)
        self.bound_steps = max(1, recorded_steps * self.layers // BOUND_SUMS)
        if any(setting.policy == policies.ORACLE for setting in self.settings):
            self.bound_steps = 1  # it places each step
        self.repeats = max(1, min(MAX_REPEATS, DEALS // max(1, recorded_steps * self.layers)))
        self.first_step = self.last_step = -1
        self.scored = self.left_out = self.unplaced = 0
        #: Of all settings, also those that another process plays.
        self._all_runs = self.setting_runs
        #: Whether today's placements and the bounds are scored, too.
        self._with_rest = True

    def _first_known(self) -> int:
        """The first step from which the placements of all layers are known."""
        first, end = self.steps
        known = max([first, *(h.steps[0] if h.steps else end for h in self.histories)])
        if known >= end:
            raise NotReplayableError(
                f"{self.run.path}: the placement of a layer is not known in these steps, so its loads "
                f"cannot be assigned to experts; record with physical_to_logical_map"
            )
        return known

    def _initial_placement(self, setting: Setting) -> Int32:
        """The recorded placement; for other slots or ranks, the one that engines start with."""
        slots = self.experts + setting.num_redundant_experts
        if setting.policy == "round_robin":
            return np.tile(policies.dealt(self.experts, slots, setting.ep_size), (self.layers, 1))
        if (slots, setting.ep_size) == (self.shape.num_physical_experts, self.shape.ep_size):
            found = [history.at(self._known_from) for history in self.histories]
            # An expert without a slot recorded no tokens, but may get some under this setting.
            counts = self.in_layer.tolist()
            whole = [
                f
                for f, count in zip(found, counts, strict=True)
                if f is not None and len(np.unique(f[f >= 0])) == count
            ]
            if len(whole) == self.layers and all(len(f) == slots for f in whole):
                return np.stack(whole)
        return np.stack([policies.initial(count, slots) for count in self.in_layer.tolist()])

    def share(self, rows: Sequence[int], *, rest: bool) -> Simulation:
        """Some settings, to be played apart from the others.

        Args:
            rows: the settings.
            rest: also score today's placements and compute the bounds.
        """
        part = copy.copy(self)
        part.settings = [self.settings[row] for row in rows]
        part.setting_runs = [self.setting_runs[row] for row in rows]
        part.sharing = self.sharing.share(rows)
        ep_size = self.scores.ep_size.tolist()
        part.scores = Scores(
            [*(ep_size[row] for row in rows), *ep_size[len(self.settings) :]], self.scores.lines
        )
        part.recorded, part.bounds, part._with_rest = RecordedFigures(), dict(self.bounds), rest
        part._all_runs = self.setting_runs if rest else []
        return part

    def join(
        self, rows: Sequence[int], first: Simulation, others: Sequence[tuple[Sequence[int], Played]]
    ) -> None:
        """Take what shares have played.

        Args:
            rows: those of the first one, which has the rest, too.
            others: the rows of each other one, and what it played.
        """
        rest = range(len(self.settings), len(self.scores.ep_size))
        self.scores = Scores(self.scores.ep_size.tolist(), self.scores.lines)
        self.scores.take([([*rows, *rest], first.scores), *((own, played.scores) for own, played in others)])
        for own_rows, played in others:
            for row, own in zip(own_rows, played.setting_runs, strict=True):
                self.setting_runs[row] = own
        self.recorded, self.bounds = first.recorded, first.bounds
        self.sharing.take(first.sharing)
        self.first_step, self.last_step = first.first_step, first.last_step
        self.scored, self.left_out, self.unplaced = first.scored, first.left_out, first.unplaced

    def play(self, workers: int | None = None) -> None:
        """Call it once, inside ``run.retry_without_damaged``.

        The result does not depend on the number of threads.
        """
        self.sharing.measure(self.steps, self._with_placement)
        past = PrefixSums(self.layers, self.experts, self.steps.first)
        runs = list(dict.fromkeys(self.setting_runs))
        near = [own for own in runs if uses_sources(own.setting.policy)]
        near = [own for own in near if self.sharing.exact_sources(own.setting.ep_size)]
        sent = PrefixSums(self.layers, self.shape.ep_size * self.experts, self.steps.first) if near else None
        longest = max((own.window for own in runs), default=0)
        last = self.steps.first - 1
        with ThreadPoolExecutor(workers or num_cores()) as pool:
            for block in self.run.blocks(self.steps):
                steps = self._with_placement(block)
                self.left_out += len(block.recorded) - len(steps)
                if not len(steps):
                    continue
                after, last = last, int(steps[-1])
                loads = _LogicalLoads(block, steps, self.histories, self.experts)
                self.unplaced += sum(pool.map(loads.read, split_range(0, self.layers)))
                edges = (edge for own in runs for edge in own.window_edges(after, steps))
                past.add(steps, loads.logical.__getitem__, edges, pool)
                if sent is not None and (sources := self.sharing.source_loads(block, steps)) is not None:
                    edges = (edge for own in near for edge in own.window_edges(after, steps))
                    sent.add(steps, functools.partial(by_rank, sources), edges, pool)
                playing = [
                    pool.submit(
                        own.play,
                        past,
                        after,
                        steps,
                        self._utilization(loads, own),
                        sent if own in near else None,
                    )
                    for own in runs
                ]
                for played in playing:
                    played.result()
                self.sharing.start(loads.num_tokens, self.setting_runs, pool)
                for sums in (past, sent):
                    if sums is not None:
                        sums.forget(last - longest)
                self.recorded.add(loads.measured, loads.tokens / self.shape.ep_size)
                chosen = loads.within(np.flatnonzero(drawn(steps, self._every)))
                if len(chosen.steps):
                    changes = {step for own in self._all_runs for step in own.may_change(after, steps)}
                    self._score(chosen, sorted(changes), block.phase_names(chosen.steps), pool)
                self.first_step = self.first_step if self.scored else int(steps[0])
                self.last_step = last
                self.scored += len(steps)

    def _utilization(self, loads: _LogicalLoads, own: SettingRun) -> Utilization:
        """How to measure a setting's utilization in steps of a block, with tokens dealt once, as measured."""
        ranks = own.setting.ep_size

        def measure(part: slice, placement: Int32) -> Float64:
            per_layer = []
            for layer, slots in enumerate(placement):
                bits = random_bits(loads.steps[part], layer, replica_draws(slots))
                load = np.ascontiguousarray(loads.logical[layer][part].T)
                tokens = self.sharing.tokens(load, loads.num_tokens[part])
                dealt = self.sharing.measured.slot_loads(tokens, Replicas(slots, ranks), bits)
                per_layer.append(rank_loads(dealt, ranks).T)
            utilization = sglang(Terms.of(np.stack(per_layer, axis=1)))
            utilization[np.isnan(utilization)] = 1  # as SGLang, of steps without tokens
            return utilization

        return measure

    def _with_placement(self, block: Block) -> Int64:
        """The block's complete steps in which the placement of every layer is known."""
        steps = block.recorded
        known = np.ones(len(steps), np.bool_)
        for history in self.histories:
            for period, slots in history.periods(steps):
                if slots is None or len(slots) != self.shape.num_physical_experts:
                    known[period] = False
        return steps[known]

    def _score(
        self, loads: _LogicalLoads, changes: list[int], phases: list[str | None], pool: Executor
    ) -> None:
        rows, steps = len(self.scores.ep_size), len(loads.steps)
        terms = np.zeros((MEAN + 1 + len(self._exchanges), rows, steps))
        active = np.zeros((rows, steps))
        # Added up in the order of layers, so that rounding does not depend on which thread is first.
        sources = self.sharing.source_loads(loads.block, loads.steps)
        layers = range(self.layers)
        stays = np.zeros((2, rows, steps))
        for own in pool.map(lambda layer: self._score_layer(loads, sources, changes, layer), layers):
            terms += own.terms
            active += own.terms[MAXIMUM] > 0
            stays += own.stays
            if own.flows is not None:
                self.scores.flows = own.flows if self.scores.flows is None else self.scores.flows + own.flows
            for size, bound in own.bounds.items():
                self.bounds[size] += bound
        sums, efforts = np.zeros((self.scores.figures, rows, steps)), terms[MEAN + 1 :]
        sums[: MEAN + 1] = terms[: MEAN + 1]
        sums[ACTIVE] = active > 0
        sums[ACTIVE_EXPERTS] = efforts[0] / np.maximum(active, 1)
        sums[BALANCEDNESS] /= np.maximum(active, 1)
        sums[ON_RANK], sums[ON_NODE] = stays
        slots = self.layers * self.shape.num_physical_experts * self.run.info.token_replication
        of_phase = dict(phases_of(phases, loads.tokens.sum(axis=0) / slots))
        for at, (phase, exchange) in enumerate(self.scores.lines, FIGURES):
            own_steps = of_phase.get(phase, np.zeros(steps, np.bool_))
            sums[at] = efforts[self._exchanges.index(exchange)] * own_steps
            sums[at + len(self.scores.lines)] = own_steps
        self.scores.add(loads.steps, sums)

    def _score_layer(
        self, loads: _LogicalLoads, sources: SourceLoads | None, changes: list[int], layer: int
    ) -> _LayerScores:
        steps, load = loads.steps, loads.logical[layer]
        every = [self.sharing.placements(row, own, layer) for row, own in enumerate(self.setting_runs)]
        if self._with_rest:
            every += self.sharing.todays(layer, steps)
        tokens = self.sharing.tokens(np.ascontiguousarray(load.T), loads.num_tokens)
        by_source = None if sources is None else sources.take(layer, load.dtype)
        terms = np.zeros((MEAN + 1 + len(self._exchanges), len(self.scores.ep_size), len(steps)))
        maximum, mean = terms[MAXIMUM], terms[MEAN]
        rates = [EXCHANGE_RATES[exchange] for exchange in self._exchanges]
        inverse = np.zeros(maximum.shape)
        pieces: list[Piece] = []
        # The same bits for all settings, so that as little as possible of a difference is chance.
        draws = max(replica_draws(slots) for placements in every for _, slots, _ in placements)
        streams = range(layer, self.repeats * self.layers, self.layers)
        deals = np.stack([random_bits(steps, stream, draws) for stream in streams])
        #: By dispatch, steps and placement, as settings often find the same one.
        known: dict[Hashable, Busiest] = {}
        edges = {*range(0, len(steps), self.bound_steps), *np.searchsorted(steps, changes).tolist()}
        for row, placements in enumerate(every):
            if row < len(self.settings) and self.settings[row].policy == policies.ORACLE:
                maximum[row], inverse[row], terms[MEAN + 1 :, row] = self._oracle(load, layer, row, rates)
                continue
            cuts = [0, *np.searchsorted(steps, [step for step, _, _ in placements[1:]]).tolist(), len(steps)]
            rule, ranks = self.sharing.dispatches[row].rule, int(self.scores.ep_size[row])
            exact = self.sharing.exact_sources(ranks)
            by_table = exact and self.sharing.dispatches[row].by_source
            own = replace(tokens, by_source=by_source) if by_table else tokens
            for (_, slots, chosen), low, high in zip(placements, cuts[:-1], cuts[1:], strict=True):
                if high > low:
                    part = slice(low, high)
                    if chosen is None:  # then the order of slots on a rank does not matter
                        slots = np.sort(slots.reshape(ranks, -1), axis=1).reshape(-1)  # noqa: PLW2901
                    choice = None if chosen is None else chosen.tobytes()
                    key = self.sharing.names[row], ranks, low, high, slots.tobytes(), choice
                    if key not in known:
                        replicas = Replicas(slots, ranks, chosen)
                        known[key] = rule.busiest_rank(own.within(part), replicas, deals[:, :, part], rates)
                    maximum[row, part], inverse[row, part], terms[MEAN + 1 :, row, part] = known[key]
                    if exact and self.sharing.names[row] != LP:
                        pieces.append((row, part, slots, chosen))
            if row >= len(self.settings):
                edges.update(cuts)
        mean[:] = load.sum(axis=1, dtype=np.int64) / self.scores.ep_size[:, None]
        terms[BALANCEDNESS] = mean * inverse
        stays, flows = np.full((2, *maximum.shape), np.nan), None
        if by_source is not None:
            locality = Locality(by_source, self._known_nodes)
            flows = locality.flows(pieces, len(maximum))
            for piece in pieces:
                stays[:, piece[0], piece[1]] = locality.stays(piece)
        if not self.bounds or not self._with_rest:
            return _LayerScores(terms, stays, flows, {})
        # No placement changes within a sum, so the bound of its busiest rank is one of its steps together.
        sums = np.add.reduceat(load, sorted(edges - {len(steps)}), axis=0, dtype=np.float64)
        bounds = {size: float(policies.lower_bound(sums, *size).sum()) for size in self.bounds}
        return _LayerScores(terms, stays, flows, bounds)

    def _oracle(self, load: npt.NDArray[Any], layer: int, row: int, rates: list[float]) -> Busiest:
        """The busiest rank of a layer if each step were placed by its own loads."""
        ranks, copies = self.settings[row].ep_size, self.run.info.token_replication
        placed = place_each(load[:, : self.in_layer[layer]], self.setting_runs[row].slots, ranks, copies)
        return busiest_of(placed, ranks, rates, copies)


class Played(NamedTuple):
    """Settings that were played: their scores, and their runs."""

    scores: Scores
    setting_runs: list[SettingRun]


class _LayerScores(NamedTuple):
    """What a layer adds to the scores of a block.

    Attributes:
        terms: the first sums of :class:`Scores` without ``ACTIVE``, then the efforts.
        stays: tokens that stay on their rank, and on their node ``[2, rows, steps]``; NaN if not known.
        flows: see :attr:`Scores.flows`.
        bounds: see :attr:`Simulation.bounds`.
    """

    terms: Float64
    stays: Float64
    flows: Float64 | None
    bounds: dict[Size, float]


class RecordedFigures:
    """Balancedness and idle fraction of loads as recorded, added up over steps."""

    def __init__(self) -> None:
        self._active = self._balancedness = self._maximum = self._mean = 0.0

    def add(self, maximum: npt.NDArray[Any], mean: Float64) -> None:
        """Add steps: tokens of the busiest and of the mean rank of each layer ``[layers, steps]``."""
        layers = (maximum > 0).sum(axis=0)
        ratios = np.divide(mean, maximum, out=np.zeros(mean.shape), where=maximum > 0).sum(axis=0)
        self._active += int(np.count_nonzero(layers))
        self._balancedness += float((ratios / np.maximum(layers, 1)).sum())
        self._maximum += float(maximum.sum())
        self._mean += float(mean.sum())

    @property
    def balancedness(self) -> float | None:
        return self._balancedness / self._active if self._active else None

    @property
    def idle_fraction(self) -> float | None:
        return max(0.0, 1 - self._mean / self._maximum) if self._maximum else None


class _LogicalLoads:
    """The loads of a block's steps by logical expert.

    Attributes:
        logical: for each layer ``[steps, num_logical_experts]``.
        measured, tokens: int64 ``[layers, steps]``, of the busiest rank as recorded, and of all ranks.
        num_tokens: int64 ``[steps]``, as recorded; -1: not known.
    """

    def __init__(self, block: Block, steps: Int64, histories: Sequence[LayerHistory], experts: int) -> None:
        self.steps = steps
        self.logical: list[npt.NDArray[Any]] = [np.empty(0)] * len(histories)
        self.measured, self.tokens = (np.zeros((len(histories), len(steps)), np.int64) for _ in range(2))
        self.num_tokens: Int64 = block.num_tokens[np.searchsorted(block.step, steps)]
        self.block, self._histories, self._experts = block, histories, experts

    def within(self, rows: npt.NDArray[np.intp]) -> _LogicalLoads:
        """The loads of some of the steps, once they are read."""
        if len(rows) == len(self.steps):
            return self
        out = copy.copy(self)
        out.steps, out.num_tokens = self.steps[rows], self.num_tokens[rows]
        out.measured, out.tokens = self.measured[:, rows], self.tokens[:, rows]
        out.logical = [load[rows] for load in self.logical]
        return out

    def read(self, layers: tuple[int, int]) -> int:
        """Read and fold a range of layers; return the tokens on slots that hold no expert.

        Raises DamagedSegmentError.
        """
        assert self.block.shape is not None
        ranks, unplaced = self.block.shape.ep_size, 0
        for first, loads in self.block.load_parts(self.steps, *layers):
            for layer, load in enumerate(loads.transpose(1, 0, 2), first):
                self.tokens[layer] = load.sum(axis=1)
                # No sum of these is larger. int32 halves the memory of a block, 120 MB for a large model.
                narrow = load.astype(np.int32) if self.tokens[layer].max() < 2**31 else load
                self.measured[layer] = rank_loads(narrow.T, ranks).max(axis=0)
                out = np.empty((len(load), self._experts), narrow.dtype)
                for period, slots in self._histories[layer].periods(self.steps):
                    assert slots is not None
                    out[period] = fold(narrow[period], slots, self._experts)
                unplaced += int(self.tokens[layer].sum() - out.sum(dtype=np.int64))
                self.logical[layer] = out
        return unplaced
