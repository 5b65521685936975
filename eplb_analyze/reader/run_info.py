"""What a run is: its metadata, checked for agreement between its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eplb_analyze.errors import DumpError, Finding
from eplb_analyze.sessions.discovery import Session
from eplb_analyze.storage.path import StoragePath
from eplb_analyze.text import plural
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Shape
from eplb_dump.format.schema import FORMAT_NAME, Scope
from eplb_dump.format.session import Origin


@frozen
class RunInfo:
    """What a run is, by its sessions' metadata and the shapes that were recorded."""

    run_id: str
    model: str
    engine: str | None
    engine_version: str | None
    scope: str
    ep_size: int
    num_layers: int
    num_logical_experts: int
    num_physical_experts: int
    layers: tuple[int, ...]
    ranks_per_node: int | None
    token_replication: int
    interval: int
    created_unix_ns: int
    #: Where an imported run came from, with all files; None if it was recorded.
    origin: Origin | None = None

    @property
    def num_tokens_replication(self) -> int:
        """How often the sum of what the ranks state as ``num_tokens`` counts a token."""
        return 1 if self.scope == Scope.GLOBAL else self.token_replication

    @property
    def timed(self) -> bool:
        """Whether the times of its steps are known; an imported run may have none."""
        return self.origin is None or "times" not in self.origin.unknown


def uneven_nodes(ep_size: int, ranks_per_node: int | None) -> list[str]:
    """A note, if the ranks do not fill nodes of that size. Fewer ranks than one node holds are no fault."""
    if ranks_per_node is None or ranks_per_node >= ep_size or ep_size % ranks_per_node == 0:
        return []
    rest = plural(ep_size % ranks_per_node, "rank")
    return [
        f"{ep_size} EP ranks cannot be divided evenly into nodes of {ranks_per_node}: the last node "
        f"has {rest}"
    ]


def imported(origin: Origin) -> str:
    """Where an imported run came from and what is not known about it, in one line."""
    unknown = ", ".join(code.replace("_", " ") for code in origin.unknown)
    how = f"imported from {origin.system}, {origin.kind}"
    if origin.system == FORMAT_NAME:
        how = f"made by {origin.kind} from {', '.join(file.name for file in origin.files)}"
    return f"{how}; not known: {unknown or 'nothing'}"


def run_info(
    path: StoragePath, sessions: Sequence[Session], findings: list[Finding], run_id: str | None = None
) -> RunInfo:
    """The info of a run, by its sessions, oldest first; ``run_id`` if it has the number of a start.

    Segments with another number of MoE layers are removed from their session and added to ``findings``.

    Raises:
        DumpError: the sessions contradict each other.
    """
    first = sessions[0].info
    _require_agreement(sessions)
    # The newest shape stands for the run; summary lists all shapes.
    shape = _newest_shape(sessions)
    _remove_other_layers(sessions, shape.num_moe_layers, findings)
    named = first.moe_layers
    if named is not None and shape.num_moe_layers not in (0, len(named)):
        raise DumpError(f"{path}: it lists {len(named)} MoE layers, but has loads of {shape.num_moe_layers}")
    return RunInfo(
        run_id=run_id or first.run_id,
        model=first.model,
        engine=first.engine,
        engine_version=first.engine_version,
        scope=first.scope.value,
        ep_size=shape.ep_size,
        num_layers=shape.num_moe_layers,
        num_logical_experts=first.num_logical_experts,
        num_physical_experts=shape.num_physical_experts,
        layers=tuple(first.layer_numbers(shape.num_moe_layers)),
        ranks_per_node=first.ranks_per_node,
        token_replication=first.token_replication,
        interval=first.interval,
        created_unix_ns=min(s.info.created_unix_ns for s in sessions),
        origin=_origin(sessions),
    )


def _require_agreement(sessions: Sequence[Session]) -> None:
    first = sessions[0].info
    fields = ("model", "scope", "num_logical_experts", "moe_layers", "token_replication")
    for session in sessions[1:]:
        odd = [n for n in fields if getattr(session.info, n) != getattr(first, n)]
        if odd:
            raise DumpError(
                f"{session.folder}: its {', '.join(odd)} differ from those of the run's other sessions; "
                f"writers of two kinds share one run_id"
            )


def _newest_shape(sessions: Sequence[Session]) -> Shape:
    every = (s for session in sessions for s in (*session.segments, *session.retired))
    segments = [(s, s.shape) for s in every if s.shape is not None]
    if segments:
        # Of those that end together the one that began last: a new shape begins a segment.
        return max(segments, key=lambda item: (item[0].last_step, item[0].first_step))[1]
    info = sessions[0].info
    return Shape(info.ep_size, info.num_moe_layers or 0, info.num_physical_experts or 0)


def _remove_other_layers(sessions: Sequence[Session], num_moe_layers: int, findings: list[Finding]) -> None:
    """The number of MoE layers of a model does not change, so such segments are foreign."""
    for session in sessions:
        kept = []
        for segment in session.segments:
            if segment.shape and segment.shape.num_moe_layers != num_moe_layers:
                text = f"{segment.path}: segment {segment.seq} has {segment.shape.num_moe_layers} MoE layers"
                text += f", but the run has {num_moe_layers}; skipped"
                findings.append(Finding("error", "layers_differ", text))
            else:
                kept.append(segment)
        session.segments = kept


def _origin(sessions: Sequence[Session]) -> Origin | None:
    origins = [session.info.origin for session in sessions]
    files = dict.fromkeys(f for origin in origins if origin is not None for f in origin.files)
    return None if origins[0] is None else replace(origins[0], files=tuple(files))
