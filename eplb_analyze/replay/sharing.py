"""How the settings of a replay share tokens among replicas: their dispatches, and what these need to know."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.dispatch.deal import ByPosition, Dealt
from eplb_analyze.dispatch.named import LP, MEASURED, NamedDispatch, Table, named
from eplb_analyze.dispatch.rule import Tokens
from eplb_analyze.dispatch.sources import ANY
from eplb_analyze.dispatch.spread import Spread
from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.policies.policy import WITH_SOURCES
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.placements import LayerHistory
from eplb_analyze.reader.recorded_setting import Setting
from eplb_analyze.reader.run import Run
from eplb_analyze.replay.pricing import Objective
from eplb_analyze.replay.setting_run import SettingRun
from eplb_analyze.replay.source_loads import SourceLoads
from eplb_analyze.sessions.step_range import StepRange
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import Scope

#: How tokens are dealt to replicas is measured in so many steps.
DISPATCH_STEPS = 256
SENDERS_UNKNOWN = "the recording does not show which rank sent which tokens"
#: Why the optimum of each step has no gain in time.
BOUND = f"the dispatch {LP} bounds tokens, not time"

#: A layer's placements in a block: the step from which each holds, its slots, and the slot that each source
#: rank has chosen for each expert, if the dispatch has it choose.
LayerPlacements = list[tuple[int, Int32, Int32 | None]]


def check_objective(
    run: Run,
    objective: Objective | None,
    dispatches: Sequence[str],
    known_nodes: int | None,
    cross_node_weight: float | None,
) -> None:
    """Raises UsageError if a dispatch has no figure of this objective, or if an option is missing.

    Raises DumpError if the recording lacks what the objective needs.
    """
    if LP in dispatches and objective not in (None, Objective.TOKENS):
        raise UsageError(f"{BOUND}: use --objective tokens, or leave {LP} out of --dispatch")
    if objective is not Objective.TRAFFIC:
        if cross_node_weight is not None:
            raise UsageError("--cross-node-weight is for --objective tokens+traffic")
        return
    if (why := sources_unknown(run)) is not None:
        raise DumpError(f"{run.path}: --objective tokens+traffic: {SENDERS_UNKNOWN} ({why})")
    if cross_node_weight is None:
        raise UsageError(
            "--objective tokens+traffic needs --cross-node-weight: how many tokens of work it costs to get "
            "one token from another node"
        )
    if known_nodes is None:
        raise UsageError("--objective tokens+traffic: the dump does not state the nodes; pass --num-nodes")
    if known_nodes == 1:
        raise UsageError("--objective tokens+traffic: all ranks are on one node, so no token crosses nodes")


def check_policies(run: Run, settings: Sequence[Setting], ep_size: int) -> None:
    """Some policies need the tokens that each rank sent.

    Raises DumpError if the recording lacks them, UsageError if a setting has other ranks.
    """
    for setting in settings:
        if setting.policy not in WITH_SOURCES:
            continue
        if (why := sources_unknown(run)) is not None:
            raise DumpError(f"{run.path}: --policy {setting.policy}: {SENDERS_UNKNOWN} ({why})")
        if setting.ep_size != ep_size:
            raise UsageError(
                f"--policy {setting.policy}: which rank sent which tokens is known only for today's EP size, "
                f"{ep_size}"
            )


class Sharing:
    """The dispatch of each setting, and of today's placements.

    Attributes:
        names: of the settings' dispatches, then of today's; if that is not the one measured, the one measured
            comes before it.
        measured: how tokens are dealt to replicas, as measured in the recorded loads.
        sources_unknown: why the tokens that each rank sent are not known; None: they are.
        batches_known: whether the tokens of all steps scored so far are known.
    """

    def __init__(
        self,
        run: Run,
        shape: Shape,
        histories: Sequence[LayerHistory],
        settings: Sequence[Setting],
        today: str,
        num_nodes: Callable[[int], int],
    ) -> None:
        """
        Args:
            today: the name of the dispatch of today's placements.
            num_nodes: the number of nodes, given the EP size.
        """
        self._run, self._shape, self._histories, self._num_nodes = run, shape, histories, num_nodes
        todays = [today] if today == MEASURED else [MEASURED, today]
        self._settings, self.names = settings, [*(setting.dispatch for setting in settings), *todays]
        self.measured = Dealt(0.0, run.info.token_replication)
        self.sources_unknown = sources_unknown(run)
        self.batches_known = True
        self.dispatches: list[NamedDispatch] = []
        #: By row, the placements in the current block and their tables.
        self._tables: dict[int, list[tuple[Int32, Int32]]] = {}
        #: Until the first rearrangement, by the rule, the ranks and the placement: many settings start alike,
        #: and SGLang's table takes seconds for many ranks.
        self._tables_at_start: dict[tuple[Table | None, int, bytes], Int32] = {}
        #: Of today's placements in the current block, by the rule and the step from which a layer changed.
        self._todays_tables: dict[tuple[Table, int], Int32] = {}

    def measure(self, steps: StepRange, with_placement: Callable[[Block], Int64]) -> None:
        """Measure in the first steps how tokens are dealt; they are independent if these have no replicas."""
        # Not before, as a lock and an id are of one process.
        self._lock = threading.Lock()
        sessions = self._run.sessions
        self._rank_of = {id(s): session.info.ep_rank for session in sessions for s in session.segments}
        found, left = Spread(self._run.info.token_replication), DISPATCH_STEPS
        for block in self._run.blocks(steps):
            some = with_placement(block)[:left]
            left -= len(some)
            for first, loads in block.load_parts(some) if len(some) else ():
                for layer, load in enumerate(loads.transpose(1, 0, 2), first):
                    for period, slots in self._histories[layer].periods(some):
                        if slots is not None:
                            found.add(load[period], slots)
            if not left:
                break
        self._use(found.dispatch())

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which makes its own lock when it measures."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def share(self, rows: Sequence[int]) -> Sharing:
        """Of some of the settings; call it before :meth:`measure`."""
        part = copy.copy(self)
        part._settings = [self._settings[row] for row in rows]
        part.names = [self.names[row] for row in rows] + self.names[len(self._settings) :]
        part._tables, part._todays_tables = {}, {}
        return part

    def take(self, share: Sharing) -> None:
        """Take what a share has measured."""
        self.batches_known = share.batches_known
        self._use(share.measured)

    def _use(self, measured: Dealt) -> None:
        copies = self._run.info.token_replication
        self.measured, self.dispatches = measured, [named(name, measured, copies) for name in self.names]

    def start(self, num_tokens: Int64, setting_runs: Sequence[SettingRun], pool: Executor) -> None:
        """Start a block, in which the settings have been played."""
        self.batches_known &= bool((num_tokens >= 0).all())
        rows = [row for row in range(len(self._settings)) if self.dispatches[row].by_source]
        found = pool.map(lambda row: self._tables_of(row, setting_runs[row]), rows)
        self._tables = dict(zip(rows, found, strict=True))
        self._todays_tables.clear()

    def _tables_of(self, row: int, own: SettingRun) -> list[tuple[Int32, Int32]]:
        """Each placement that a setting has in the current block, with its table."""
        dispatch, ranks = self.dispatches[row], self._settings[row].ep_size
        known = {id(placement): table for placement, table in self._tables.get(row, [])}
        out = []
        for step, placement in own.placed:
            table = known.get(id(placement))
            if table is None:
                if step < 0:
                    table = self._table_at_start(dispatch.at_start, placement, ranks)
                else:
                    table = self._table(dispatch.rearranged, placement, ranks)
            out.append((placement, table))
        return out

    def _table_at_start(self, choose: Table | None, placement: Int32, ranks: int) -> Int32:
        key = choose, ranks, placement.tobytes()
        with self._lock:
            if key not in self._tables_at_start:
                self._tables_at_start[key] = self._table(choose, placement, ranks)
            return self._tables_at_start[key]

    def _table(self, choose: Table | None, placement: Int32, ranks: int) -> Int32:
        if choose is None:
            return np.full((len(placement), ranks, self._experts), ANY, np.int32)
        return choose(placement, self._experts, ranks, self._num_nodes(ranks))

    @property
    def _experts(self) -> int:
        return self._run.info.num_logical_experts

    def placements(self, row: int, own: SettingRun, layer: int) -> LayerPlacements:
        """A layer's placements in the current block under a setting."""
        found: LayerPlacements = []
        tables = (
            [table for _, table in self._tables[row]] if row in self._tables else [None] * len(own.placed)
        )
        for (step, slots), of_step in zip(own.placed, tables, strict=True):
            table = None if of_step is None else of_step[layer]
            # A rearrangement in parts does not change all layers.
            if not (found and _same(found[-1][1], slots[layer]) and _same(found[-1][2], table)):
                found.append((step, slots[layer], table))
        return found

    def todays(self, layer: int, steps: Int64) -> list[LayerPlacements]:
        """A layer's recorded placements in the steps of the current block, for each of today's dispatches."""
        return [self._recorded(row, layer, steps) for row in range(len(self._settings), len(self.dispatches))]

    def _recorded(self, row: int, layer: int, steps: Int64) -> LayerPlacements:
        history, dispatch = self._histories[layer], self.dispatches[row]
        out: LayerPlacements = []
        for period, slots in history.periods(steps):
            if slots is None:
                continue
            first, table = int(steps[period.start]), None
            choose = dispatch.rearranged if history.index_at(first) > 0 else dispatch.at_start
            if choose is not None:
                table = self._todays_table(choose, first)[layer]
            out.append((first, slots, table))
        return out

    def _todays_table(self, choose: Table, step: int) -> Int32:
        """The table of the recorded placements of all layers at a step."""
        key = choose, step
        with self._lock:
            if key not in self._todays_tables:
                placed = [slots for history in self._histories if (slots := history.at(step)) is not None]
                self._todays_tables[key] = self._table(choose, np.stack(placed), self._shape.ep_size)
            return self._todays_tables[key]

    def exact_sources(self, ep_size: int) -> bool:
        """Whether the tokens of each source rank are known, for a setting with so many ranks."""
        return self.sources_unknown is None and ep_size == self._shape.ep_size

    def tokens(self, load: npt.NDArray[Any], num_tokens: Int64) -> Tokens:
        """A layer's tokens.

        Args:
            load: of each logical expert ``[num_logical_experts, steps]``.
            num_tokens: of each step, as recorded; -1: not known.
        """
        writes_sums = self._run.scope is Scope.GLOBAL  # then each token is counted once in num_tokens
        routed = num_tokens * (self._run.info.token_replication if writes_sums else 1)
        ranks = self._shape.ep_size - len(self._run.missing_ranks)
        return Tokens(load, routed, np.where(num_tokens > 0, np.maximum(1, routed // ranks), -1))

    def source_loads(self, block: Block, steps: Int64) -> SourceLoads | None:
        """The tokens of a block that each rank sent; None if not known."""
        if self.sources_unknown is not None:
            return None
        return SourceLoads(block, steps, self._histories, self._experts, self._rank_of)

    def notes(self) -> list[str]:
        """What the dispatches assume that the recording does not show."""
        by_name = dict(zip(self.names, self.dispatches, strict=True))
        by_source = ", ".join(name for name, own in by_name.items() if own.by_source)
        by_position = ", ".join(name for name, own in by_name.items() if isinstance(own.rule, ByPosition))
        notes = []
        if by_source and self.sources_unknown is not None:
            notes.append(
                f"{by_source}: the recording does not show which rank sent a token ({self.sources_unknown}), "
                "so each is assumed to come from any rank with the same probability"
            )
        elif by_source and any(s.ep_size != self._shape.ep_size for s in self._settings):
            notes.append(
                f"{by_source}: with another EP size, each token is assumed to come from any rank with the "
                "same probability"
            )
        if by_position and not self.batches_known:
            notes.append(
                f"{by_position}: the recording does not state the tokens of all steps (num_tokens); without "
                "them, each token is assumed to go to any replica with the same probability"
            )
        elif by_position and self._run.info.token_replication < self._shape.ep_size:
            notes.append(f"{by_position}: the batches of all ranks are assumed to be equally large")
        return notes


def _same(one: Int32 | None, other: Int32 | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def sources_unknown(run: Run) -> str | None:
    """Why the tokens that each rank sent are not known; None: each rank recorded them."""
    copies = run.info.token_replication
    if run.scope is not Scope.LOCAL:
        return f"scope {run.scope.value}"
    if copies > 1:
        return f"{copies} ranks count each token"
    if run.import_caveats("token_source"):
        return "it is imported"
    return "ranks are missing or lost" if run.missing_ranks or run.lost_ranks else None
