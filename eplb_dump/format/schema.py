"""The dump format, version 1: folder and file names, table schemas and limits.

No I/O happens here. docs/format.md describes every field.
"""

from __future__ import annotations

import enum
import re
import zlib

import pyarrow as pa

FORMAT_NAME = "eplb-dump"
#: (major, minor). A reader rejects a newer major version; a newer minor version only adds.
FORMAT_VERSION = (1, 2)

SESSION_FILE = "session.json"
MANIFEST_FILE = "manifest.frames"
METADATA_KEY = b"eplb_dump"
EMPTY_SLOT = -1
#: Larger values are rejected before memory is allocated for them.
MAX_EXPERTS, MAX_LAYERS = 1 << 16, 1 << 12
#: Layers times slots, and layers times logical experts: readers hold some arrays with a number for each.
MAX_CELLS = 1 << 20
#: Characters of a step's phase.
MAX_PHASE = 64
#: The largest count of one forward pass, stored as int32; a larger one is an error of the engine.
MAX_LOAD = 2**31 - 1
#: No step, count, size or time in the format is larger, so that sums and differences fit into int64.
MAX_NUMBER = 2**62

RUN_PREFIX, MODEL_PREFIX, RANK_PREFIX, SESSION_PREFIX = "run=", "model=", "rank=", "session="
#: The prefixes of a dump's folder names, from the top down.
LEVEL_PREFIXES = RUN_PREFIX, MODEL_PREFIX, RANK_PREFIX, SESSION_PREFIX
RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
JOURNAL_PATTERN = re.compile(r"journal-(\d{6,})\.frames")
#: A file of one segment, or of several that were thinned together: their first and last number.
SEGMENT_PATTERN = re.compile(r"(steps|loads|placements|ranks|minutes)-(\d{6,})(?:-(\d{6,}))?\.parquet")


def holds(layers: int, width: int) -> bool:
    """Whether the format holds loads of so many layers, with ``width`` slots or logical experts in each."""
    return layers <= MAX_LAYERS and width <= MAX_EXPERTS and layers * width <= MAX_CELLS


class FormatError(ValueError):
    """Bytes that do not follow the format; the text says what is wrong and where."""


class NewerFormatError(FormatError):
    """Something in a newer major version of the format, which this program must not interpret."""


class Status(enum.IntEnum):
    """What happened to a step. Journals hold the numbers, Parquet files the names."""

    RECORDED = 0
    DUMMY = 1
    NOT_SAMPLED = 2
    DROPPED = 3
    REJECTED = 4

    @property
    def label(self) -> str:
        return self.name.lower()


STATUS_LABELS = tuple(status.label for status in Status)


class Tier(str, enum.Enum):
    """How much is kept of a sealed segment, from all to nothing."""

    #: Every table.
    FULL = "full"
    #: Tokens per EP rank instead of per expert: ``ranks`` instead of ``loads``.
    RANKS = "ranks"
    #: Sums per minute.
    MINUTES = "minutes"
    #: Only the placements that later steps need.
    GONE = "gone"


class Scope(str, enum.Enum):
    """Whether the load of a rank is its own contribution, or already the sum over ranks."""

    LOCAL = "local"
    GLOBAL = "global"


def _list_of(value_type: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value_type, nullable=False))


#: One row for each step that the writer saw.
STEPS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("ns", tz="UTC"), nullable=False),
        pa.field("monotonic_ns", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int64()),
        pa.field("phase", pa.string()),
        pa.field("step_ms", pa.float32()),
        pa.field("device_ms", pa.float32()),
    ]
)
#: The columns of ``steps`` with durations in ms, since version 1.1; older files do not have them.
DURATIONS = "step_ms", "device_ms"
#: One row for each recorded step and MoE layer, ordered by layer, then by step.
LOADS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("ep_size", pa.int32(), nullable=False),
        pa.field("rank_load", _list_of(pa.int64()), nullable=False),
        pa.field("load", _list_of(pa.int32()), nullable=False),
    ]
)
#: One row for each layer whose placement changed, with the first step that it is in force.
PLACEMENTS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("ep_size", pa.int32(), nullable=False),
        pa.field("physical_to_logical", _list_of(pa.int32()), nullable=False),
    ]
)
#: ``loads`` without the experts, since version 1.2.
RANKS_SCHEMA = LOADS_SCHEMA.remove(LOADS_SCHEMA.get_field_index("load"))
#: One row for each minute, phase and placement, with sums over its steps, since version 1.2. Lists have a
#: value for each layer, or several: ``rank_load`` and ``slowest`` one for each EP rank, ``slot`` and
#: ``slot_load`` one for each of the slots with most tokens. docs/format.md describes the columns.
MINUTES_SCHEMA = pa.schema(
    [
        pa.field("minute", pa.timestamp("ns", tz="UTC"), nullable=False),
        pa.field("phase", pa.string()),
        pa.field("ep_size", pa.int32(), nullable=False),
        *(
            pa.field(name, pa.int64(), nullable=False)
            for name in ("first_step", "last_step", "first_time_ns", "last_time_ns")
        ),
        *(pa.field(label, pa.int64(), nullable=False) for label in STATUS_LABELS),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("num_tokens_steps", pa.int64(), nullable=False),
        *(
            pa.field(f"{clock}_{what}", kind, nullable=False)
            for clock in ("host_ms", "step_ms", "device_ms")
            for what, kind in (("sum", pa.float64()), ("steps", pa.int64()))
        ),
        pa.field("host_ms_histogram", _list_of(pa.int32()), nullable=False),
        pa.field("active_steps", _list_of(pa.int32()), nullable=False),
        pa.field("rank_load", _list_of(pa.int64()), nullable=False),
        pa.field("slot", _list_of(pa.int32()), nullable=False),
        pa.field("slot_load", _list_of(pa.int64()), nullable=False),
        # Of the sums over ranks: null with scope local.
        pa.field("max_load", _list_of(pa.int64())),
        pa.field("layer_balancedness", _list_of(pa.float64())),
        pa.field("layer_imbalance", _list_of(pa.float64())),
        pa.field("slowest", _list_of(pa.float64())),
        pa.field("active", pa.int64()),
        *(
            pa.field(name, pa.float64())
            for name in ("balancedness", "imbalance", "vllm", "vllm_legacy", "sglang")
        ),
        *(
            pa.field(f"{formula}_{what}", kind)
            for formula in ("balancedness", "imbalance")
            for what, kind in (
                ("min", pa.float64()),
                ("min_step", pa.int64()),
                ("max", pa.float64()),
                ("max_step", pa.int64()),
                ("histogram", _list_of(pa.int32())),
            )
        ),
    ]
)
SCHEMAS = {
    "steps": STEPS_SCHEMA,
    "loads": LOADS_SCHEMA,
    "placements": PLACEMENTS_SCHEMA,
    "ranks": RANKS_SCHEMA,
    "minutes": MINUTES_SCHEMA,
}
#: The tables that a segment is sealed with; ``placements`` only if one changed, ``loads`` if there are any.
SEALED_TABLES = "steps", "loads", "placements", "minutes"
#: LOADS_SCHEMA of a segment with a count above MAX_LOAD: a sum over passes or ranks, since version 1.1.
WIDE_LOADS_SCHEMA = LOADS_SCHEMA.set(
    LOADS_SCHEMA.get_field_index("load"), pa.field("load", _list_of(pa.int64()), nullable=False)
)
#: Every schema that a table of a file can have, without columns of a newer minor version.
KNOWN_SCHEMAS = {
    "steps": [STEPS_SCHEMA, pa.schema([field for field in STEPS_SCHEMA if field.name not in DURATIONS])],
    "loads": [LOADS_SCHEMA, WIDE_LOADS_SCHEMA],
    "placements": [PLACEMENTS_SCHEMA],
    "ranks": [RANKS_SCHEMA],
    "minutes": [MINUTES_SCHEMA],
}


def journal_name(seq: int) -> str:
    return f"journal-{seq:06d}.frames"


def segment_name(table: str, seq: int, last_seq: int | None = None) -> str:
    """The file of a table of a segment, or of the segments from ``seq`` to ``last_seq``."""
    last = "" if last_seq in (None, seq) else f"-{last_seq:06d}"
    return f"{table}-{seq:06d}{last}.parquet"


def rank_folder(rank: int) -> str:
    return f"{RANK_PREFIX}{rank:05d}"


def model_slug(model: str) -> str:
    """A folder name for a model: ``deepseek-ai/DeepSeek-R1`` becomes ``deepseek-ai--DeepSeek-R1``.

    If other characters were replaced, a checksum of the name keeps two models apart.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", model.replace("/", "--"))[:100].lstrip(".") or "model"
    lossless = slug == model.replace("/", "--")
    return slug if lossless else f"{slug}-{zlib.crc32(model.encode()):08x}"
