"""Session metadata: the content of ``session.json``, repeated in every file of a session."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from dataclasses import field
from pathlib import Path
from typing import Any

from eplb_dump.format.files import fsync_file, fsync_folders, replace_file
from eplb_dump.format.frozen import frozen
from eplb_dump.format.schema import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_LOAD,
    MAX_NUMBER,
    MODEL_PREFIX,
    RUN_PREFIX,
    SESSION_FILE,
    SESSION_PREFIX,
    FormatError,
    NewerFormatError,
    Scope,
    model_slug,
    rank_folder,
)
from eplb_dump.format.start import Start, StartIdentity


def write_session_file(folder: Path, info: SessionInfo, *, durable: bool = True) -> None:
    """Write or replace ``session.json``. Raises OSError.

    Args:
        durable: sync it; not while an engine waits for it.
    """
    replace_file(folder / SESSION_FILE, dump_json(info.to_dict()), durable=durable)


def sync_session_file(folder: Path) -> None:
    """Have ``session.json``, as it is, and the folders of its path survive a power cut. Raises OSError."""
    fsync_file(folder / SESSION_FILE)
    fsync_folders(folder)


@frozen
class SourceFile:
    """A file that was imported."""

    name: str
    bytes: int


@frozen
class Origin:
    """The source of an imported session; ``origin`` in the metadata.

    ``unknown`` and ``assumed`` map stable codes to sentences about what the source does not contain;
    docs/record/import.md lists the codes.
    """

    #: For example ``SGLang`` and, of its recordings, ``per_pass``.
    system: str
    #: The kind of its recordings.
    kind: str
    files: tuple[SourceFile, ...] = ()
    #: The version of eplb-dump that imported it.
    importer_version: str = ""
    unknown: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Any) -> Origin:
        """Raises FormatError."""
        try:
            files = tuple(SourceFile(str(f["name"]), int(f["bytes"])) for f in fields["files"])
            notes = [{str(k): str(v) for k, v in fields[name].items()} for name in ("unknown", "assumed")]
            system, kind, version = (str(fields[name]) for name in ("system", "kind", "importer_version"))
            return cls(system, kind, files, version, *notes)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"its session metadata has a damaged origin ({error})") from None


@frozen
class SessionInfo:
    """Metadata of one session: the content of ``session.json``, repeated in every file.

    A session is one life of one writer. Shapes are those of the first recorded step (None before
    it). If they change later, each segment's own metadata and rows have the new ones.
    """

    run_id: str
    model: str
    session_id: str
    ep_rank: int
    scope: Scope
    num_logical_experts: int
    ep_size: int
    created_unix_ns: int
    created_monotonic_ns: int
    host: str
    pid: int
    num_moe_layers: int | None = None
    num_physical_experts: int | None = None
    #: The model's own number of each MoE layer, ascending; None: they are numbered from 0.
    moe_layers: tuple[int, ...] | None = None
    ranks_per_node: int | None = None
    engine: str | None = None
    engine_version: str | None = None
    engine_config: dict[str, Any] = field(default_factory=dict)
    #: The launcher's variables, which all ranks of one engine start share.
    launch: dict[str, str] = field(default_factory=dict)
    #: The writing process and what else identifies the engine start; None in recordings of before.
    start: Start | None = None
    #: How many times the engine counts each token; readers divide loads by it.
    token_replication: int = 1
    #: One step out of this many is recorded.
    interval: int = 1
    #: A segment ends at multiples of this many recorded steps, so that ranks seal at the same steps.
    segment_steps: int = 2048
    writer_version: str = ""
    #: The source, if the session was imported.
    origin: Origin | None = None
    format_version: tuple[int, int] = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        fields["scope"] = self.scope.value
        fields["format_version"] = f"{self.format_version[0]}.{self.format_version[1]}"
        fields["moe_layers"] = None if self.moe_layers is None else list(self.moe_layers)
        return {"format": FORMAT_NAME, **fields}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SessionInfo:
        """Raises FormatError if it is not session metadata, damaged, or of a newer major version."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT_NAME:
            raise FormatError("it is not the metadata of an eplb-dump session")
        version = parse_version(fields.get("format_version"))
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            values = {k: v for k, v in fields.items() if k in known}
            values["format_version"] = version
            values["scope"] = Scope(values["scope"])
            layers = values.get("moe_layers")
            values["moe_layers"] = None if layers is None else tuple(int(n) for n in layers)
            origin = values.get("origin")
            values["origin"] = None if origin is None else Origin.from_dict(origin)
            start = values.get("start")
            values["start"] = None if start is None else Start.from_dict(start)
            info = cls(**values)
            info._validate()
        except FormatError:
            raise
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise FormatError(f"its session metadata is damaged ({error})") from None
        return info

    def _validate(self) -> None:
        for name in ("run_id", "model", "session_id", "host"):
            if not isinstance(getattr(self, name), str):
                raise FormatError(f"its session metadata has no text under {name!r}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if type(value) is not int or not least <= value <= most:
                raise FormatError(f"its session metadata says {name} = {value!r}")
        layers = self.moe_layers or ()
        if len(layers) > MAX_LAYERS or not all(0 <= number <= MAX_LOAD for number in layers):
            raise FormatError(f"its session metadata lists {len(layers)} layers, or impossible layer numbers")
        for name in ("engine", "engine_version"):
            if not isinstance(getattr(self, name), str | None):
                raise FormatError(f"its session metadata says {name} = {getattr(self, name)!r}")
        for name in ("engine_config", "launch"):
            if not isinstance(getattr(self, name), dict):
                raise FormatError(f"its session metadata has no mapping under {name!r}")

    @property
    def start_identity(self) -> StartIdentity:
        return StartIdentity.of(self.start, self.launch, self.host)

    def layer_numbers(self, num_moe_layers: int) -> list[int]:
        """The model's number of each MoE layer, as in the ``layer`` column."""
        return list(range(num_moe_layers)) if self.moe_layers is None else list(self.moe_layers)


#: The valid range of each number, least and most.
_RANGES = {
    "num_logical_experts": (1, MAX_EXPERTS),
    "ep_size": (1, MAX_EXPERTS),
    "token_replication": (1, MAX_LOAD),
    "interval": (1, MAX_LOAD),
    "segment_steps": (1, MAX_LOAD),
    "ep_rank": (0, MAX_EXPERTS),
    "created_unix_ns": (0, MAX_NUMBER),
    "created_monotonic_ns": (0, MAX_NUMBER),
    "num_moe_layers": (0, MAX_LAYERS),
    "num_physical_experts": (0, MAX_EXPERTS),
    "ranks_per_node": (1, MAX_LOAD),
}


#: The numbers that may be null.
_OPTIONAL = ("num_moe_layers", "num_physical_experts", "ranks_per_node")


def parse_version(text: object) -> tuple[int, int]:
    """``"1.0"`` to ``(1, 0)``. Raises FormatError if the major version is newer or there is none."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    if match is None:
        raise FormatError(f"it has no readable format version ({text!r})")
    major, minor = int(match[1]), int(match[2])
    if major > FORMAT_VERSION[0]:
        raise NewerFormatError(
            f"it is in format {major}.{minor}, newer than this program reads "
            f"({FORMAT_VERSION[0]}.x); upgrade eplb-dump"
        )
    return major, minor


def canonical_json(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def dump_json(document: dict[str, Any]) -> bytes:
    """A JSON object as bytes, with a checksum of itself in its member ``crc32``."""
    crc = zlib.crc32(canonical_json(document).encode())
    return (json.dumps({**document, "crc32": f"{crc:08x}"}, indent=1) + "\n").encode()


def load_json(data: bytes) -> dict[str, Any]:
    """Read what :func:`dump_json` wrote. Raises FormatError if the text or its checksum is wrong."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError("it is not JSON") from None
    if not isinstance(document, dict):
        raise FormatError("it is not a JSON object")
    crc = document.pop("crc32", None)
    # Check the version first: a newer format may use another checksum.
    if document.get("format") == FORMAT_NAME:
        parse_version(document.get("format_version"))
    if crc != f"{zlib.crc32(canonical_json(document).encode()):08x}":
        raise FormatError("its checksum does not match its content")
    return document


def session_path(root: Path, info: SessionInfo) -> Path:
    """``<root>/run=<run_id>/model=<slug>/rank=<5 digits>/session=<id>``."""
    return (
        root
        / f"{RUN_PREFIX}{info.run_id}"
        / f"{MODEL_PREFIX}{model_slug(info.model)}"
        / rank_folder(info.ep_rank)
        / f"{SESSION_PREFIX}{info.session_id}"
    )
