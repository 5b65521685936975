"""`import`: convert another system's recording into a run, and write down what its source leaves unknown."""

from __future__ import annotations

from pathlib import Path

from eplb_analyze.errors import DumpError, UsageError
from eplb_analyze.json_report import Report
from eplb_analyze.transfer.importers.detect import READERS, detect
from eplb_analyze.transfer.importers.plan import make_plan
from eplb_analyze.transfer.importers.source import Options
from eplb_analyze.transfer.importers.write import write
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import MAX_EXPERTS

__all__ = ["ImportReport", "Options", "import_dump"]


@frozen
class ImportReport(Report):
    """What was imported, and what is unknown about it."""

    source: str
    format: str
    #: The system that recorded.
    system: str
    #: The kind of its recordings.
    kind: str
    #: The dump that got the run.
    into: str
    run_id: str
    model: str
    scope: str
    ep_size: int
    num_layers: int
    layer_numbers: list[int] | None
    num_logical_experts: int
    num_physical_experts: int
    token_replication: int
    ranks: int
    #: Steps that some rank has, steps that all ranks have, and steps between them that the source skipped.
    steps: int
    complete: int
    not_sampled: int
    files: int
    #: What was written: rows of all tables, and bytes of all files.
    rows: int
    bytes: int
    unknown: dict[str, str]
    assumed: dict[str, str]
    notes: list[str]


def import_dump(
    source: Path,
    into: Path,
    format: str | None = None,
    options: Options | None = None,
    run_id: str | None = None,
) -> ImportReport:
    """Import a source into a dump, as a new run.

    Args:
        source: a file or folder of another system.
        into: the dump's folder; made if it does not exist.
        format: a name of :data:`.detect.READERS`; default: detected from the content.
        options: what the source does not say.
        run_id: the new run's; default: made from the time of import.

    Raises:
        DumpError: the source cannot be used, or the dump cannot be written.
        UsageError: something that must be known is neither in the source nor in the options.
        UsageError: the run exists.
    """
    options = options or Options()
    if options.ep_size is not None and not 1 <= options.ep_size <= MAX_EXPERTS:
        raise ValueError(f"ep_size must be 1 to {MAX_EXPERTS}, not {options.ep_size}")
    if into.exists() and not into.is_dir():
        raise DumpError(f"{into}: it is a file; pass the folder of a dump")
    if source.is_symlink():
        raise DumpError(f"{source}: a symbolic link, which is not followed")
    if not source.exists():
        raise DumpError(f"{source}: no such file or folder")
    name = format or detect(source, options)
    if name != "topk" and (options.tokens_per_step is not None or options.step_per is not None):
        raise UsageError(
            f"{source}: --tokens-per-step and --step-per are for expert ids per token (--format topk), but "
            f"this is --format {name}"
        )
    reading = READERS[name](source, options)
    plan = make_plan(reading, options)
    written = write(plan, into, run_id)
    return ImportReport(
        source=str(source),
        format=name,
        system=reading.system,
        kind=reading.kind,
        into=str(into),
        run_id=written.run_id,
        model=plan.model,
        scope=reading.scope.value,
        ep_size=plan.ep_size,
        num_layers=reading.num_layers,
        layer_numbers=None if plan.layers is None else list(plan.layers),
        num_logical_experts=plan.num_logical_experts,
        num_physical_experts=plan.num_physical_experts,
        token_replication=plan.token_replication,
        ranks=len(plan.parts),
        steps=written.steps,
        complete=written.complete,
        not_sampled=written.not_sampled,
        files=len(reading.files),
        rows=written.rows,
        bytes=written.bytes,
        unknown=reading.unknown,
        assumed=reading.assumed,
        notes=reading.notes,
    )
