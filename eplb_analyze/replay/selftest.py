"""The recorded setting replayed: does it do what the engine did? If not, no other setting can be trusted.

A policy that is given another number of expert groups, window or nodes than the engine's places experts in
another way. What that changes would look like a gain of every setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_analyze.metrics import bootstrap
from eplb_analyze.metrics.bootstrap import Interval
from eplb_analyze.reader.placements import Rearrangement
from eplb_analyze.reader.recorded_setting import Recorded
from eplb_analyze.replay.grouping import Grouping
from eplb_analyze.replay.simulator import Simulation
from eplb_analyze.text import figure, plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32

#: The share of the time by which a replay of the recorded setting may differ: where windows begin and end
#: makes a difference of this size.
TOLERANCE = 0.01
#: The share of rearrangements whose placements must be the recorded ones if the time differs.
SAME_PLACEMENTS = 0.9


@frozen
class SelfTest:
    """The recorded setting replayed, beside the recorded placements, with tokens dealt alike."""

    balancedness: float | None
    #: The recorded balancedness of the compared steps.
    recorded_balancedness: float | None
    #: The share of the recorded placements' time that the replay saves; near 0 if it does as the engine did.
    time_saved: Interval
    #: Replayed rearrangements after which every rank holds the recorded experts, of those compared.
    same_placements: int
    #: Replayed rearrangements that were compared.
    compared: int
    #: Replayed rearrangements since the last recorded one, or since the first step.
    missed: int
    #: What the replay lacks, if it does not do what the engine did.
    doubt: str | None = None

    @property
    def reproduced(self) -> bool:
        """Whether the engine's placements are the replay's."""
        return self.compared > 0 and self.same_placements >= SAME_PLACEMENTS * self.compared

    def to_json(self) -> dict[str, Any]:
        return {"holds": self.doubt is None} | vars(self)


class RecordedSettingTest:
    """Watches the replay of the recorded setting; made before the simulation is played."""

    def __init__(self, simulation: Simulation, row: int, today: Recorded) -> None:
        """``row``: the recorded setting, with the dispatch measured, among those of the simulation."""
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

    def result(self, grouping: Grouping, seen_groups: int | None) -> SelfTest | None:
        """Judge the replay, once it is played; None if there are too few steps.

        Args:
            grouping: as given to the policy.
            seen_groups: groups that the recorded placements keep on one node each.
        """
        scores, row = self._simulation.scores, self._row
        first, last = self._simulation.first_step, self._simulation.last_step
        changes = [c for c in self._simulation.run.history.rearrangements() if first < c.first_step <= last]
        settled = self._settled(changes)
        as_measured = self._simulation.today_as_measured
        today, other = scores.maximum[as_measured, settled], scores.maximum[row, settled]
        saved = bootstrap.share_saved(today, other)
        if saved is None:
            return None
        alike = saved.low <= TOLERANCE and saved.high >= -TOLERANCE
        figures = scores.balancedness_of(row), scores.balancedness_of(as_measured)
        since = changes[-1].last_step + self._interval if changes else first
        missed = sum(move.step > since for move in self._simulation.setting_runs[row].moves)
        test = SelfTest(*figures, saved, self._same, self._compared, missed)
        if test.reproduced or alike:
            return test
        return replace(test, doubt=self._doubt(figures, bool(changes), grouping, seen_groups))

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

    def _doubt(
        self,
        figures: tuple[float | None, float | None],
        acted: bool,
        grouping: Grouping,
        seen_groups: int | None,
    ) -> str:
        replayed, recorded = (figure(each) for each in figures)
        text = (
            "the replay does not reproduce the recording: the recorded setting "
            f"({self._today.policy}, interval {self._today.interval}) gives balancedness {replayed}, the "
            f"recorded placements give {recorded}"
        )
        if not acted:
            return f"{text}; the engine never rearranged"
        text += f", and {self._same} of {plural(self._compared, 'placement')} are the recorded ones"
        if seen_groups is not None and seen_groups != grouping.num_groups:
            return (
                f"{text}. The engine kept each of {seen_groups} groups of experts on one node, the policy "
                f"was given {plural(grouping.num_groups, 'group')}: pass --num-groups {seen_groups}"
            )
        if grouping.num_nodes == 1:
            return (
                f"{text}. It was replayed on one node, where --num-groups has no effect. If the engine "
                f"kept expert groups on several nodes, pass --num-nodes; otherwise pass --window-steps, "
                f"--start or --policy"
            )
        return (
            f"{text}. Pass the values that the engine's policy used: --num-groups, --num-nodes, "
            f"--window-steps, --start or --policy"
        )
