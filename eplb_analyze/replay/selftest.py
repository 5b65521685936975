"""The recorded setting replayed: does it do what the engine did? If not, no other setting can be trusted.

A policy that is given another number of expert groups, window or nodes than the engine's places experts in
another way. What that changes would look like a gain of every setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import MIN_STEPS, Interval, Ratio
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.replay.scores import TODAY
from eplb_analyze.replay.settings import Recorded
from eplb_analyze.replay.simulator import Simulation
from eplb_analyze.text import figure, plural
from eplb_dump.format.journal import Int32

#: The share of the time by which a replay of the recorded setting may differ: where windows begin and end
#: makes a difference of this size.
TOLERANCE = 0.01
#: The share of rearrangements whose placements must be the recorded ones if the time differs.
SAME_PLACEMENTS = 0.9

UNKNOWN_GROUPS = (
    "the number of expert groups was not recorded and is taken as 1; engines keep each group of a model on "
    "one node, so supply it with --num-groups if the model has groups"
)


@dataclass(frozen=True)
class SelfTest:
    """The recorded setting replayed, beside the recorded placements, with tokens dealt alike."""

    balancedness: float | None
    recorded_balancedness: float | None
    #: The share of the recorded placements' time that the replay saves; near 0 if it does as the engine did.
    time_saved: Interval
    #: Replayed rearrangements after which every rank holds the recorded experts, of those compared.
    same_placements: int
    compared: int
    #: Replayed rearrangements since the last recorded one, or since the first step.
    missed: int
    #: What the replay lacks, if it does not do what the engine did.
    doubt: str | None

    def to_json(self) -> dict[str, Any]:
        return {"holds": self.doubt is None} | vars(self)


class RecordedSettingTest:
    """Watches the replay of the recorded setting; made before the simulation is played."""

    def __init__(self, simulation: Simulation, row: int, today: Recorded) -> None:
        """``row``: the recorded setting among those of the simulation."""
        self._simulation, self._row, self._today = simulation, row, today
        self._interval = today.interval or 1
        self._same = self._compared = 0
        simulation.setting_runs[row].on_move = self._compare

    def _compare(self, step: int, placed: Int32) -> None:
        """Compare with the placement before the next rearrangement, as layers may move one at a time.

        Only which experts a rank holds counts, not the order of its slots.
        """
        next_step, ranks = step + self._interval, self._today.ep_size
        before, after = self._recorded(step - 1), self._recorded(next_step - 1)
        if before is None or after is None or np.array_equal(before, after):
            return  # the engine did not act
        held = [np.sort(slots.reshape(len(slots), ranks, -1), axis=2) for slots in (after, placed)]
        same = np.array_equal(held[0], held[1])
        if same or next_step <= self._simulation.steps.end:  # else it may have been moving at the end
            self._compared += 1
            self._same += same

    def _recorded(self, step: int) -> Int32 | None:
        """The recorded placement ``[layers, slots]``; None if it is not known, or has another shape."""
        slots = self._simulation.shape.num_physical_experts
        layers = [history.at(step) for history in self._simulation.histories]
        known = [each for each in layers if each is not None and len(each) == slots]
        return np.stack(known) if len(known) == len(layers) else None

    def result(self, num_groups: int | None) -> SelfTest | None:
        """Judge the replay, once it is played; None if there are too few steps.

        Args:
            num_groups: of experts, as given to the policy; None: not known, and taken as one.
        """
        scores, row = self._simulation.scores, self._row
        first, last = self._simulation.first_step, self._simulation.last_step
        changes = [c for c in self._simulation.run.history.rearrangements() if first < c.first_step <= last]
        settled = self._settled(changes)
        today, other = scores.maximum[TODAY, settled], scores.maximum[row, settled]
        some = today > 0
        ratio = Ratio((today - other)[some], today[some])
        if ratio.value is None or len(ratio.numerator) < MIN_STEPS:
            return None
        drawn = bootstrap.resample(ratio, np.random.default_rng(bootstrap.SEED))
        saved = Interval.of(ratio.value, drawn)
        same = self._compared > 0 and self._same >= SAME_PLACEMENTS * self._compared
        alike = saved.low <= TOLERANCE and saved.high >= -TOLERANCE
        groups = None if same else self._groups(changes)
        # Groups that are seen in the placements, and not known, are a difference in any case.
        holds = same or (alike and (groups is None or num_groups is not None))
        figures = scores.balancedness_of(row), scores.balancedness_of(TODAY)
        since = changes[-1].last_step + self._interval if changes else first
        missed = sum(move.step > since for move in self._simulation.setting_runs[row].moves)
        doubt = None if holds else self._doubt(figures, bool(changes), groups, num_groups)
        return SelfTest(*figures, saved, self._same, self._compared, missed, doubt)

    def _settled(self, changes: Sequence[Rearrangement]) -> npt.NDArray[np.bool_]:
        """The columns outside the steps in which the engine was still moving what the replay had moved."""
        steps = self._simulation.scores.step
        settled = np.ones(len(steps), np.bool_)
        last = np.array([change.last_step for change in changes], np.int64)
        for move in self._simulation.setting_runs[self._row].moves:
            at = np.searchsorted(last, move.step)
            if at < len(last) and last[at] < move.step + self._interval:
                settled[(steps >= move.step) & (steps < last[at])] = False
        return settled

    def _groups(self, changes: Sequence[Rearrangement]) -> int | None:
        """The groups of experts that the engine's rearrangements kept on one node each."""
        placed = [self._recorded(change.last_step) for change in changes]
        nodes = self._simulation.num_nodes(self._today.ep_size)
        return groups_on_nodes([p for p in placed if p is not None], self._simulation.experts, nodes)

    def _doubt(
        self,
        figures: tuple[float | None, float | None],
        acted: bool,
        groups: int | None,
        num_groups: int | None,
    ) -> str:
        """``groups``: as the recorded placements show them; ``num_groups``: as given to the policy."""
        replayed, recorded = (figure(each) for each in figures)
        text = (
            "the replay does not reproduce the recording: the recorded setting "
            f"({self._today.policy}, interval {self._today.interval}) gives balancedness {replayed}, the "
            f"recorded placements give {recorded}"
        )
        if not acted:
            return f"{text}; the engine never rearranged"
        text += f", and {self._same} of {plural(self._compared, 'placement')} are the recorded ones"
        if groups is not None and groups != (num_groups or 1):
            return (
                f"{text}. The engine kept each of {groups} groups of experts on one node, the policy was "
                f"given {plural(num_groups or 1, 'group')}: supply the number with --num-groups {groups}"
            )
        if self._simulation.num_nodes(self._today.ep_size) == 1:
            return (
                f"{text}. It was replayed on one node, where --num-groups changes nothing. If the engine "
                "kept expert groups on several nodes, the recording must state `ranks_per_node`; otherwise "
                "supply --window, --start or --policy"
            )
        if num_groups is None:
            return f"{text}. The number of expert groups was not recorded: supply it with --num-groups"
        return f"{text}. Supply what the engine's policy had: --num-groups, --window, --start or --policy"


def groups_on_nodes(placements: Sequence[Int32], num_logical_experts: int, num_nodes: int) -> int | None:
    """The least number of groups of consecutive experts of which each has all its replicas on one node.

    Args:
        placements: ``[layers, slots]`` each; the slots of a node are consecutive, -1 is an empty one.

    Returns:
        A multiple of ``num_nodes``; None if it is each expert by itself, or there is one node.
    """
    if num_nodes < 2 or not placements:
        return None
    slots = np.concatenate(placements)
    node = np.arange(slots.shape[1]) * num_nodes // slots.shape[1]
    on = np.zeros((len(slots), num_logical_experts, num_nodes), np.bool_)
    row, at = np.nonzero(slots >= 0)
    on[row, slots[row, at], node[at]] = True
    for groups in range(num_nodes, num_logical_experts, num_nodes):
        if num_logical_experts % groups == 0:
            nodes = on.reshape(len(slots), groups, -1, num_nodes).any(axis=2).sum(axis=2)
            if (nodes <= 1).all():
                return groups
    return None
