"""What `export` writes: a placement, recorded or a policy's on a window of loads, or the loads themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from eplb_analyze import atomic
from eplb_analyze.analysis.placement import placement_report
from eplb_analyze.errors import DumpError, ExportError
from eplb_analyze.policies import policy as policies
from eplb_analyze.reader.blocks import Block
from eplb_analyze.reader.completeness import Completeness
from eplb_analyze.reader.configurations import Sums, last_configuration
from eplb_analyze.reader.placements import logical_sums
from eplb_analyze.reader.run import Run
from eplb_analyze.reader.step_range import StepRange
from eplb_analyze.text import plural
from eplb_analyze.transfer.exporters import loads, plain, sglang, trtllm, vllm_ascend, vllm_mapping
from eplb_analyze.transfer.exporters.placement import Placement
from eplb_dump.format.journal import Int32, Int64, Shape
from eplb_dump.format.schema import MAX_EXPERTS, MAX_LAYERS

#: What a placement can be written for: how, and what an engine must be started with to load it.
ENGINES: dict[str, tuple[Callable[[Placement], str], Callable[[Placement, str], str]]] = {
    "sglang": (sglang.text, sglang.usage),
    "trtllm": (trtllm.text, trtllm.usage),
    "vllm-ascend": (vllm_ascend.text, vllm_ascend.usage),
    "vllm-mapping": (vllm_mapping.text, vllm_mapping.usage),
}
#: Formats that call layers by the model's own numbers.
BY_LAYER_NUMBER = ("sglang", "trtllm")
#: What the source of an imported run may not say of placements.
PLACEMENTS = ("placement", "placement_steps", "earlier_placements")


@dataclass(frozen=True)
class Origin:
    """Where a placement comes from: recorded at ``step``, or a policy's answer to the loads of a window."""

    run_id: str
    model: str
    step: int | None = None
    policy: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    #: Complete steps of these.
    recorded: int | None = None
    num_nodes: int | None = None
    num_groups: int | None = None


@dataclass(frozen=True)
class Found:
    """A placement of the run's layers, before it is made ready for a format."""

    placement: Placement
    origin: Origin
    #: [layers, num_logical_experts], the window's loads; None where the placement was recorded.
    weight: Int64 | None = None
    steps: Completeness | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PlacementExport:
    """What was written; docs/cli.md describes the JSON."""

    target: str
    file: Path
    bytes: int
    origin: Origin
    placement: Placement
    #: Layers that are not in the dump, with the placement that engines start with.
    filled_layers: list[int]
    repair: vllm_ascend.Repair | None
    #: What an engine must be started with to load the file; None for plain JSON.
    usage: str | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        origin = asdict(self.origin)
        return {
            "run": {"run_id": origin.pop("run_id"), "model": origin.pop("model")},
            "for": self.target,
            "file": str(self.file),
            "bytes": self.bytes,
            "origin": origin,
            "ep_size": self.placement.ep_size,
            "num_layers": len(self.placement.layers),
            "num_logical_experts": self.placement.num_logical_experts,
            "num_physical_experts": self.placement.num_physical_experts,
            "filled_layers": self.filled_layers,
            "repair": asdict(self.repair) if self.repair else None,
            "usage": self.usage,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class LoadExport:
    """What was written; docs/cli.md describes the JSON."""

    run_id: str
    model: str
    format: str
    file: Path
    bytes: int
    steps: Completeness
    #: The complete steps that the file is of.
    first_step: int
    last_step: int
    recorded: int
    layers: list[int]
    #: Rows of the long form, or None.
    rows: int | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        document = {name: value for name, value in vars(self).items() if name not in ("run_id", "model")}
        run = {"run_id": self.run_id, "model": self.model}
        return {"run": run, **document, "file": str(self.file), "steps": self.steps.to_json()}


# ---- placements


def recorded_placement(run: Run, step: int | None = None) -> Found:
    """The placement in force at a step (default: the last).

    Raises:
        NotInDumpError: the dump has no such step, or no placement is known for it.
        ExportError: some layers' placement is not known, or layers had different shapes then.
    """
    report = placement_report(run, step)
    known = [p.layer for p in report.layers]
    absent = [layer for layer in run.info.layers if layer not in known]
    if absent:
        raise ExportError(
            f"at step {report.step} no placement is known for {plural(len(absent), 'layer')}, the first "
            f"{absent[0]}; choose another --step"
        )
    shapes = {(p.ep_size, p.num_physical_experts) for p in report.layers}
    if len(shapes) > 1:
        raise ExportError(
            f"at step {report.step} layers have placements of {len(shapes)} shapes, as ep_size or the number "
            "of slots was being changed; choose another --step"
        )
    rows = np.array([p.ranks for p in report.layers], np.int32).reshape(len(known), -1)
    placement = Placement(tuple(known), report.layers[0].ep_size, run.info.num_logical_experts, rows)
    return Found(
        placement, Origin(run.info.run_id, run.info.model, step=report.step), notes=run.cautions(*PLACEMENTS)
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
) -> Found:
    """What a policy makes of the loads of a window, as `replay` does at the step after the range.

    Args:
        policy: a name of :data:`eplb_analyze.policies.policy.POLICIES`, or a ``module:function``.
        steps: half-open range of steps; default all.
        window: only the last so many steps of the range.
        redundant: redundant experts; default as recorded.
        ep_size: default as recorded.
        num_nodes: default as the writer's ``ranks_per_node`` says, else 1.
        num_groups: groups of experts that a hierarchical policy keeps on a node.

    Raises:
        PolicyError: there is no such policy, it cannot do this, or its placement is none.
        NotInDumpError: the dump has no such step.
        DumpError: no step of these is complete, or no placement says whose loads they are.
    """
    place = policies.named(policy)
    weights, whole, notes = run.reading(lambda: _weights(run, steps, window))
    info, shape = run.info, weights.shape
    if not weights.logical.any():
        raise DumpError(f"{run.path}: no token was routed in these steps, so a policy has nothing to go by")
    slots = info.num_logical_experts + redundant if redundant is not None else shape.num_physical_experts
    ranks = ep_size if ep_size is not None else shape.ep_size
    if slots > MAX_EXPERTS:
        raise ExportError(f"{slots:,} slots are more than a placement holds, which is {MAX_EXPERTS:,}")
    nodes = num_nodes if num_nodes is not None else _nodes(info.ranks_per_node, ranks)
    problem = policies.Problem(
        weight=weights.logical,
        num_physical_experts=slots,
        ep_size=ranks,
        num_nodes=nodes,
        num_groups=num_groups,
        current=_current(run, weights.last_step, ranks, slots),
    )
    rows = np.asarray(policies.place(place, problem), np.int32)
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
    notes += run.cautions(*order, *PLACEMENTS)
    return Found(placement, origin, weights.logical, whole, notes)


def _nodes(ranks_per_node: int | None, ranks: int) -> int:
    return ranks // ranks_per_node if ranks_per_node and ranks % ranks_per_node == 0 else 1


def _current(run: Run, step: int, ranks: int, slots: int) -> Int32 | None:
    """The placement in force at a step, where all layers' is known and of this shape."""
    rows = []
    for index in range(run.info.num_layers):
        history = run.history.layer(index)
        i = history.index_at(step)
        if i < 0 or (history.ep_sizes[i], len(history.slots[i])) != (ranks, slots):
            return None
        rows.append(history.slots[i])
    return np.stack(rows).astype(np.int32)


class _Logical(Sums):
    """Loads of one configuration by logical expert: int64 ``[layers, num_logical_experts]``."""

    def __init__(self, run: Run, shape: Shape) -> None:
        super().__init__(shape)
        self._run = run
        self.logical = np.zeros((shape.num_moe_layers, run.info.num_logical_experts), np.int64)
        #: Tokens on all slots.
        self.physical = 0

    def _add(self, block: Block) -> None:
        self.logical += logical_sums(block, self._run.history, self.logical.shape[1])
        self.physical += sum(int(load.sum()) for _, load in block.rank_load_parts())


def _weights(
    run: Run, steps: tuple[int, int] | None, window: int | None = None
) -> tuple[_Logical, Completeness, list[str]]:
    """The loads of the last configuration in the last ``window`` steps of a range. Call it in ``reading``."""
    if steps is not None:
        run.require(steps)
    first, last = run.step_range
    low, high = StepRange.of(steps)
    if window is not None and last is not None:
        high = min(high, last + 1)
        low = max(low, high - window)
    # A placement that is known once stays known; loads of all layers are to be of the same steps.
    histories = [run.history.layer(i) for i in range(run.info.num_layers)]
    known = max((history.steps[0] if history.steps else high for history in histories), default=high)
    if known >= high:
        raise DumpError(f"{run.path}: a layer's placement is not known in these steps")
    sums, whole, notes = last_configuration(run, (max(low, known), high), lambda shape: _Logical(run, shape))
    if known > max(low, first or 0):
        notes.append(f"steps before {known} are left out: a layer's placement is not known there")
    nameless = 1 - sums.logical.sum() / max(1, sums.physical)
    if nameless > 0:
        notes.append(f"{100 * nameless:.2g} % of the tokens fell on slots of no expert and are left out")
    return sums, whole, notes


def export_placement(
    run: Run,
    target: str,
    file: Path,
    found: Found,
    *,
    num_hidden_layers: int | None = None,
    first_layer: int | None = None,
    repair: bool = False,
    force: bool = False,
) -> PlacementExport:
    """Write a placement for an engine, or as plain JSON.

    Args:
        target: a key of :data:`ENGINES`, or ``json``.
        num_hidden_layers: of the model, for SGLang, where the dump does not say.
        first_layer: the model's number of the first recorded layer, where the dump does not name them.
        repair: for vllm-ascend, change what it cannot load.
        force: replace a file that is there.

    Raises:
        ExportError: the format cannot hold this placement, an option is missing, or the file cannot
            be written.
    """
    atomic.require_free(file, force=force, dump=run.path)
    if target == "sglang" and file.suffix != ".json":
        raise ExportError(f"{file}: SGLang reads such a file only where its name ends in .json")
    notes = [*found.notes, *(run.cautions("layer_numbers") if target in BY_LAYER_NUMBER else ())]
    placement = _numbered(run, found.placement, first_layer, target, notes)
    fixed = None
    if target == "vllm-ascend" and repair:
        placement, fixed = vllm_ascend.repaired(placement, found.weight)
    filled: list[int] = []
    if target == "sglang":
        whole = sglang.with_all_hidden_layers(
            placement, _num_hidden_layers(run, placement, num_hidden_layers)
        )
        filled = [layer for layer in whole.layers if layer not in placement.layers]
        placement = whole
    usage = None
    if target in ENGINES:
        write, how = ENGINES[target]
        text, usage = write(placement), how(placement, str(file))
    else:
        text = plain.text(placement, asdict(found.origin))
    data = text.encode()
    with atomic.new_file(file, force=force) as out:
        out.write(data)
    return PlacementExport(target, file, len(data), found.origin, placement, filled, fixed, usage, notes)


def _names_layers(run: Run) -> bool:
    return run.sessions[0].info.moe_layers is not None


def _has_all_rows(run: Run) -> bool:
    """Whether the dump's layers are all hidden layers: SGLang's plugin records those where it names none."""
    return run.info.engine == "sglang" and not _names_layers(run)


def _numbered(
    run: Run, placement: Placement, first_layer: int | None, target: str, notes: list[str]
) -> Placement:
    """The placement with the model's layer numbers."""
    if first_layer is not None:
        if _names_layers(run):
            raise ExportError(
                f"the dump names its layers ({placement.layers[0]} to {placement.layers[-1]}); "
                "--first-layer is for dumps that do not"
            )
        numbers = tuple(range(first_layer, first_layer + len(placement.layers)))
        return Placement(
            numbers, placement.ep_size, placement.num_logical_experts, placement.physical_to_logical_map
        )
    if target in BY_LAYER_NUMBER and not _names_layers(run) and not _has_all_rows(run):
        notes.append(
            "the dump does not name its layers, so the first is taken for the model's layer 0; "
            "where it has dense layers before, say which with --first-layer"
        )
    return placement


def _num_hidden_layers(run: Run, placement: Placement, said: int | None) -> int:
    if said is not None:
        if said > MAX_LAYERS:
            raise ExportError(f"--num-hidden-layers: no model has more than {MAX_LAYERS:,}")
        return said
    if _has_all_rows(run):
        return len(placement.layers)
    raise ExportError(
        "SGLang needs a row for every hidden layer, and the dump does not say how many the model has; "
        "give --num-hidden-layers (num_hidden_layers in the model's config.json)"
    )


# ---- loads


def export_loads(
    run: Run,
    format: str,
    file: Path,
    steps: tuple[int, int] | None = None,
    layers: list[int] | None = None,
    *,
    force: bool = False,
) -> LoadExport:
    """Write the loads of the complete steps.

    Args:
        format: ``csv`` or ``parquet``: a row a step, layer and slot (see :mod:`.loads`);
            ``logical-npy``: [layers, num_logical_experts], summed over the steps of the last
            configuration, as deepseek-ai/EPLB takes it (int64, or float64 with token replication).
        steps: half-open range of steps; default all.
        layers: the model's layer numbers; default all.
        force: replace a file that is there.

    Raises:
        ExportError: the file cannot be written.
        NotInDumpError, DumpError: the dump has no such step or layer, or no complete step.
    """
    atomic.require_free(file, force=force, dump=run.path)
    numbers = list(run.info.layers) if layers is None else sorted(set(layers))
    chosen = [run.layer_index(number) for number in numbers]
    if steps is not None:
        run.require(steps)
    write = _write_logical if format == "logical-npy" else _write_long

    def export() -> LoadExport:
        with atomic.new_file(file, force=force) as out:
            written = write(run, format, out, steps, chosen)
            size = out.tell()
        return LoadExport(
            run_id=run.info.run_id,
            model=run.info.model,
            format=format,
            file=file,
            bytes=size,
            layers=numbers,
            **vars(written),
        )

    return run.reading(export)


@dataclass
class _Written:
    """Of which steps a file is, counted while it is written."""

    steps: Completeness = field(default_factory=Completeness)
    first_step: int = -1
    last_step: int = -1
    recorded: int = 0
    rows: int | None = None
    notes: list[str] = field(default_factory=list)

    def add(self, block: Block) -> None:
        self.steps.add(block)
        if block.shape is not None and len(block.recorded):
            self.first_step = self.first_step if self.recorded else int(block.recorded[0])
            self.last_step = int(block.recorded[-1])
            self.recorded += len(block.recorded)


def _write_long(
    run: Run, format: str, out: IO[bytes], steps: tuple[int, int] | None, layers: list[int]
) -> _Written:
    written = _Written()

    def counted() -> Iterator[Block]:
        for block, _ in run.over_blocks(lambda _: None, steps):
            written.add(block)
            yield block

    write = loads.write_csv if format == "csv" else loads.write_parquet
    written.rows = write(loads.batches(run, counted(), layers), out, loads.schema(run))
    if not written.recorded:
        raise DumpError(f"{run.path}: no step of these is complete (see `check`)")
    written.notes += run.cautions("step_order", *PLACEMENTS)
    return written


def _write_logical(
    run: Run, format: str, out: IO[bytes], steps: tuple[int, int] | None, layers: list[int]
) -> _Written:
    sums, whole, notes = _weights(run, steps)
    logical = sums.logical[layers]
    replication = run.info.token_replication
    np.save(out, logical if replication == 1 else run.tokens(logical), allow_pickle=False)
    notes += run.cautions(*(() if steps is None else ("step_order",)), *PLACEMENTS)
    return _Written(whole, sums.first_step, sums.last_step, sums.recorded, None, notes)
