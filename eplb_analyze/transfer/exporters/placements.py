"""`export placement`: a recorded placement, or a policy's on a window of loads, as a file."""

from __future__ import annotations

import itertools
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eplb_analyze import atomic
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.errors import DumpError, NotInDumpError, UsageError
from eplb_analyze.json_report import Report, RunReport
from eplb_analyze.policies import policy as policies
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.run_info import uneven_nodes
from eplb_analyze.replay.setting_run import window_parts
from eplb_analyze.sessions.segments import DamagedSegmentError
from eplb_analyze.sessions.step_range import StepRange
from eplb_analyze.text import plural
from eplb_analyze.transfer.exporters import engines, vllm_ascend
from eplb_analyze.transfer.exporters.loads import PLACEMENTS, logical_loads
from eplb_analyze.transfer.exporters.placement import Placement
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS


@frozen
class Origin(RunReport):
    """Where a placement comes from: recorded at ``step``, or made by ``policy`` from a window's loads."""

    step: int | None = None
    policy: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    #: How many of these steps are complete.
    recorded: int | None = None
    num_nodes: int | None = None
    num_groups: int | None = None


@frozen
class SourcePlacement:
    """A placement of the run's layers, before it is adapted to a format."""

    placement: Placement
    origin: Origin
    #: [layers, num_logical_experts], the window's loads; None for a recorded placement.
    weight: Int64 | None = None
    steps: Completeness | None = None
    notes: list[str] = field(default_factory=list)


@frozen
class PlacementExport(Report):
    """What was written."""

    target: str
    file: Path
    #: One per layer in the file.
    rows: int
    bytes: int
    origin: Origin
    placement: Placement
    #: Layers that are not in the dump; they get the placement that engines start with.
    filled_layers: list[int]
    repair: vllm_ascend.Repair | None
    #: The options that make an engine load the file; None for plain JSON.
    usage: str | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        origin = self.origin.to_json()
        return self.document(
            {
                "run": origin.pop("run"),
                #: The target engine.
                "for": self.target,
                "file": self.file,
                "rows": self.rows,
                "bytes": self.bytes,
                #: Where the placement comes from.
                "origin": origin,
                "ep_size": self.placement.ep_size,
                "num_layers": len(self.placement.layers),
                "num_logical_experts": self.placement.num_logical_experts,
                "num_physical_experts": self.placement.num_physical_experts,
                "filled_layers": self.filled_layers,
                "repair": self.repair,
                "usage": self.usage,
                "notes": self.notes,
            }
        )


def recorded_placement(run: Run, step: int | None = None) -> SourcePlacement:
    """The placement in force at a step (default: the last).

    Raises:
        NotInDumpError: the dump has no such step, or no placement is known for it.
        UsageError: the placement of some layers is not known, or layers had different shapes then.
    """
    report = placement_report(run, step)
    known = [p.layer for p in report.layers]
    absent = [layer for layer in run.info.layers if layer not in known]
    if absent:
        raise UsageError(
            f"at step {report.step}, no placement is known for {plural(len(absent), 'layer')}, first "
            f"{absent[0]}; choose another --step"
        )
    shapes = {(p.ep_size, p.num_physical_experts) for p in report.layers}
    if len(shapes) > 1:
        raise UsageError(
            f"at step {report.step}, layers have placements with {len(shapes)} different shapes, because "
            f"ep_size or the number of slots was changing; choose another --step"
        )
    rows = np.array([p.ranks for p in report.layers], np.int32).reshape(len(known), -1)
    placement = Placement(tuple(known), report.layers[0].ep_size, run.info.num_logical_experts, rows)
    return SourcePlacement(
        placement,
        Origin(run.info.run_id, run.info.model, step=report.step),
        notes=run.import_caveats(*PLACEMENTS),
    )


def policy_placement(
    run: Run,
    policy: str,
    steps: tuple[int, int] | None = None,
    *,
    window: int | None = None,
    redundant: int | None = None,
    ep_size: int | None = None,
    num_nodes: int | None = None,
    num_groups: int = 1,
) -> SourcePlacement:
    """The placement that a policy makes from the loads of a window, as `replay` does at the step after it.

    Args:
        policy: a name of :data:`eplb_analyze.policies.policy.POLICIES`, or a ``module:function``.
        steps: half-open range of steps; default all.
        window: use only the last so many steps of the range.
        redundant: redundant experts; default as recorded.
        ep_size: default as recorded.
        num_nodes: default from the writer's ``ranks_per_node``, else 1.
        num_groups: groups of experts that a hierarchical policy keeps on a node.

    Raises:
        UsageError: there is no such policy, it does not support this, or its placement is invalid.
        NotInDumpError: the dump has no such step.
        DumpError: no step of these is complete, or no placement is known there.
    """
    place = policies.named(policy)
    run = run.with_loads()
    weights, whole, notes = run.retry_without_damaged(
        lambda: logical_loads(run, steps, window, estimate=True)
    )
    info, shape = run.info, weights.shape
    if not weights.logical.any():
        raise DumpError(
            f"{run.path}: no token was routed in these steps, so a policy has no loads to work with"
        )
    slots = info.num_logical_experts + redundant if redundant is not None else shape.num_physical_experts
    ranks = ep_size if ep_size is not None else shape.ep_size
    if slots > MAX_EXPERTS:
        raise UsageError(f"{slots:,} slots are too many; a placement holds at most {MAX_EXPERTS:,}")
    if num_nodes is not None and ranks % num_nodes:
        raise UsageError(f"--num-nodes: {ranks} EP ranks cannot be divided evenly among {num_nodes} nodes")
    nodes = num_nodes if num_nodes is not None else _nodes(info.ranks_per_node, ranks, notes)
    # Nodes that the recording has do not matter for a model without groups, which is the default.
    if (num_nodes is not None or num_groups > 1) and (note := policies.ungrouped(nodes, num_groups)):
        notes.append(note)
    series, each = run.retry_without_damaged(lambda: _series(run, policy, steps, window, shape))
    problem = policies.Problem(
        weight=weights.logical,
        num_physical_experts=slots,
        ep_size=ranks,
        num_nodes=nodes,
        num_groups=num_groups,
        current=_current(run, weights.last_step, ranks, slots),
        experts=run.history.num_experts(info.num_logical_experts, info.num_layers),
        series=series,
        steps_per_window=each,
    )
    rows = np.asarray(policies.place(place, problem), np.int32)
    if (rows < 0).any():
        raise UsageError(f"--policy {policy} leaves slots empty, which no engine can load")
    origin = Origin(
        info.run_id,
        info.model,
        policy=policy,
        first_step=weights.first_step,
        last_step=weights.last_step,
        recorded=weights.recorded,
        num_nodes=nodes,
        num_groups=num_groups,
    )
    placement = Placement(info.layers, ranks, info.num_logical_experts, rows)
    order = () if steps is None and window is None else ("step_order",)
    notes += run.import_caveats(*order, *PLACEMENTS)
    return SourcePlacement(placement, origin, weights.logical, whole, notes)


def _series(
    run: Run, policy: str, steps: tuple[int, int] | None, window: int | None, shape: Shape
) -> tuple[Int64 | None, int]:
    """The window's loads in parts, as in `replay`, and the steps of each; None if the policy uses the sum."""
    first, last = run.step_range
    low, high = StepRange.of(steps)
    high = min(high, (last or 0) + 1)
    found = []
    edges = [high - before for before in window_parts(policy, window or high - max(low, first or 0))]
    for begin, end in itertools.pairwise(edges):
        try:
            part, _, _ = logical_loads(run, (max(0, begin), end), estimate=True)
        except DamagedSegmentError:
            raise
        except (DumpError, NotInDumpError):  # no complete step
            continue
        if part.shape == shape:
            found.append(part)
    if not found:
        return None, 1
    recorded = sum(part.recorded for part in found)
    return np.stack([part.logical for part in found]), max(1, round(recorded / len(found)))


def _nodes(ranks_per_node: int | None, ranks: int, notes: list[str]) -> int:
    """The number of nodes; one, with a note, if the ranks do not fill nodes of the recorded size."""
    if uneven := uneven_nodes(ranks, ranks_per_node):
        notes.append(f"{uneven[0]}; the policy assumes one node (--num-nodes)")
        return 1
    return max(1, ranks // ranks_per_node) if ranks_per_node else 1


def _current(run: Run, step: int, ranks: int, slots: int) -> Int32 | None:
    """The placement in force at a step, if it is known for all layers and has this shape."""
    rows = []
    for index in range(run.info.num_layers):
        history = run.history.layer(index)
        i = history.index_at(step)
        if i < 0 or (history.ep_sizes[i], len(history.slots[i])) != (ranks, slots):
            return None
        rows.append(history.slots[i])
    return np.stack(rows).astype(np.int32)


def export_placement(
    run: Run,
    target: str,
    file: Path,
    source: SourcePlacement,
    *,
    num_hidden_layers: int | None = None,
    first_layer: int | None = None,
    repair: bool = False,
    force: bool = False,
) -> PlacementExport:
    """Write a placement for an engine, or as plain JSON.

    Args:
        target: a key of :data:`.engines.ENGINES`, or ``json``.
        num_hidden_layers: the model's, for SGLang, if the dump does not have it.
        first_layer: the model's number of the first recorded layer, if the dump has no layer numbers.
        repair: change a placement that vllm-ascend cannot load.
        force: replace an existing file.

    Raises:
        UsageError: the format cannot hold this placement, an option is missing, or the file cannot
            be written.
    """
    atomic.require_free(file, force=force, dump=run.path)
    if target == "sglang" and file.suffix != ".json":
        raise UsageError(f"{file}: SGLang reads such a file only if its name ends in .json")
    notes = [
        *source.notes,
        *(run.import_caveats("layer_numbers") if target in engines.BY_LAYER_NUMBER else ()),
    ]
    placement = _numbered(run, source.placement, first_layer, target, notes)
    fixed = None
    if target == "vllm-ascend" and repair:
        placement, fixed = vllm_ascend.repaired(placement, source.weight)
    filled: list[int] = []
    if target == "sglang":
        hidden = _num_hidden_layers(run, placement, num_hidden_layers)
        whole = engines.with_all_hidden_layers(placement, hidden)
        filled = [layer for layer in whole.layers if layer not in placement.layers]
        placement = whole
    usage = None
    if target in engines.ENGINES:
        text_of, usage_of = engines.ENGINES[target]
        text, usage = text_of(placement), usage_of(placement, str(file))
    else:
        text = engines.plain_json(placement, asdict(source.origin))
    data = text.encode()
    with atomic.new_file(file, force=force) as out:
        out.write(data)
    rows = len(placement.layers)
    return PlacementExport(
        target, file, rows, len(data), source.origin, placement, filled, fixed, usage, notes
    )


def _names_layers(run: Run) -> bool:
    return run.sessions[0].info.moe_layers is not None


def _has_all_rows(run: Run) -> bool:
    """Whether the dump has all hidden layers: SGLang's plugin records all if it does not name them."""
    return run.info.engine == "sglang" and not _names_layers(run)


def _numbered(
    run: Run, placement: Placement, first_layer: int | None, target: str, notes: list[str]
) -> Placement:
    """The placement with the model's own layer numbers, as far as they are known."""
    if first_layer is not None:
        if _names_layers(run):
            raise UsageError(
                f"the dump names its layers ({placement.layers[0]} to {placement.layers[-1]}); "
                "--first-layer is for dumps that do not"
            )
        return replace(placement, layers=tuple(range(first_layer, first_layer + len(placement.layers))))
    if target in engines.BY_LAYER_NUMBER and not _names_layers(run) and not _has_all_rows(run):
        notes.append(
            "the dump does not name its layers, so the first is assumed to be the model's layer 0; if "
            "dense layers come before it, pass --first-layer"
        )
    return placement


def _num_hidden_layers(run: Run, placement: Placement, given: int | None) -> int:
    if given is not None:
        if given > MAX_LAYERS:
            raise UsageError(f"--num-hidden-layers: no model has more than {MAX_LAYERS:,}")
        return given
    if _has_all_rows(run):
        return len(placement.layers)
    raise UsageError(
        "SGLang needs a row for every hidden layer, and the dump does not state their number; pass "
        "--num-hidden-layers (num_hidden_layers in the model's config.json)"
    )
