"""The hot experts that sums per minute name, for steps of which experts' loads are no longer kept.

A row of the sums names the slots of each layer that had the most tokens. So an expert had at least the tokens
of its named slots, and others can have had as many: of one with several replicas, minutes may name none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np

from eplb_analyze.analysis.layer_report import HotExpert
from eplb_analyze.analysis.minute_sums import (
    SLOT_COLUMNS,
    ConfigurationMinutes,
    ExpertTotals,
    minutes_left_out,
)
from eplb_analyze.analysis.summary_report import HOT_EXPERTS
from eplb_analyze.errors import DumpError
from eplb_analyze.json_report import RunReport
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.placements import replicas
from eplb_analyze.reader.rolled_up import add_up, minutes_of_steps, nothing_kept, require_all_phases
from eplb_analyze.reader.run import Run
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.text import iso
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import Tier


@frozen
class MinuteExperts(RunReport):
    """If no experts' loads are kept of the steps: which experts were hot, by the slots that minutes name.

    Bursts, cold experts and the replicas that loads justify are not known then.
    """

    layer: int | None
    #: The counts of steps of these minutes.
    steps: Completeness
    first_step: int
    last_step: int
    #: When the first minute began, ns since 1970; a text in JSON.
    first_minute: int
    last_minute: int
    #: Those that had more than the mean, the largest share first.
    experts: list[HotExpert]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return self.document(
            {
                "layer": self.layer,
                #: The source of the figures: always `minutes`.
                "tier": Tier.MINUTES.value,
                "steps": self.steps,
                "first_step": self.first_step,
                "last_step": self.last_step,
                #: When the first minute began, ISO 8601, UTC; minutes are whole ones.
                "first_minute": iso(self.first_minute),
                #: When the last one began, which is included.
                "last_minute": iso(self.last_minute),
                #: Those that had more than the mean, the largest share first: at least so much, and
                #: others can have had as much.
                "experts": self.experts,
                "notes": self.notes,
            }
        )


def experts_of_minutes(run: Run, layer: int | None, steps: tuple[int, int] | None) -> MinuteExperts:
    """The hot experts of a run, or of one layer, in whole minutes: all, or those with steps in a range.

    Raises NotInDumpError, DumpError, UsageError.
    """
    index = None if layer is None else run.layer_index(layer)
    require_all_phases(run)
    return run.retry_without_damaged(lambda: _report(run, layer, index, steps))


def _report(run: Run, layer: int | None, index: int | None, steps: tuple[int, int] | None) -> MinuteExperts:
    found = _totals(run, steps)
    configurations = [own for own in found.configurations if own.recorded]
    if not configurations:
        raise nothing_kept(run, steps) if found.first < 0 else run.nothing_complete(steps)
    last = configurations[-1]
    if not last.logical.any():
        raise DumpError(
            f"{run.path}: no placement is known in these steps, so loads cannot be assigned to experts"
        )
    counts = found.completeness(steps)
    notes = minutes_left_out(counts, last.first if len(configurations) > 1 else None)
    layers = range(len(last.tokens)) if index is None else [index]
    return MinuteExperts(
        run.info.run_id,
        run.info.model,
        layer,
        counts,
        last.first,
        last.last,
        found.first_minute,
        found.last_minute,
        hottest(run, last, layers),
        notes,
    )


def hot_experts_of_minutes(
    run: Run, steps: tuple[int, int] | None, layers: Sequence[int] | None = None
) -> tuple[list[HotExpert], tuple[int, int] | None]:
    """The hottest experts by the slots that minutes name, and the first and last step of these minutes.

    Call it inside ``run.retry_without_damaged``. There is none if sums per minute cannot tell.

    Args:
        layers: indices of layers; default all.
    """
    try:
        found = _totals(run, steps)
    except DamagedSegmentError:
        raise
    except DumpError:
        return [], None
    last = next((own for own in reversed(found.configurations) if own.recorded), None)
    return ([], None) if last is None else (hottest(run, last, layers)[:HOT_EXPERTS], (last.first, last.last))


def _totals(run: Run, steps: tuple[int, int] | None) -> ExpertTotals:
    """Raises NotInDumpError, DumpError, DamagedSegmentError."""
    run.load_history()
    minutes = None if steps is None else minutes_of_steps(run, steps)
    found = add_up(run, SLOT_COLUMNS, minutes, lambda: ExpertTotals(run))
    found.finish()
    return found


def hottest(run: Run, last: ConfigurationMinutes, layers: Sequence[int] | None = None) -> list[HotExpert]:
    """Those that had more than the mean of their layer, at least; the largest share first."""
    chosen = np.arange(len(last.tokens)) if layers is None else np.array(layers, np.int64)
    tokens = last.tokens[chosen, np.newaxis]
    in_layer = run.history.num_experts(run.info.num_logical_experts, len(last.tokens))[chosen, np.newaxis]
    logical = last.logical[chosen]
    share = np.divide(logical, tokens, out=np.zeros(logical.shape), where=tokens > 0)
    hot = np.flatnonzero(share * in_layer > 1)
    experts = []
    for cell in hot[np.argsort(-share.reshape(-1)[hot], kind="stable")].tolist():
        row, expert = divmod(cell, share.shape[1])
        layer, part = int(chosen[row]), float(share[row, expert])
        slots = run.history.layer(layer).at(last.last)
        if slots is None:
            continue
        copies = int(replicas(slots, share.shape[1])[expert])
        times = part * float(in_layer[row, 0])
        experts.append(HotExpert(run.info.layers[layer], expert, part, times, copies))
    return experts
