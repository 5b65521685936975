"""The in-engine writer of eplb-dump: per-step expert loads and placements, appended to Parquet.

Only the names below are public; the format that the writer and the reader share is in
:mod:`eplb_dump.format`. They are imported on first use: an engine imports this package in every
process for its plugins, even if they are not enabled.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eplb_dump.format import __version__

if TYPE_CHECKING:
    from eplb_dump.counter import ExpertLoadCounter
    from eplb_dump.format.schema import FORMAT_VERSION
    from eplb_dump.writer import ExpertLoadWriter, WriterStats

__all__ = ["FORMAT_VERSION", "ExpertLoadCounter", "ExpertLoadWriter", "WriterStats", "__version__"]

_HOMES = {
    "ExpertLoadCounter": "eplb_dump.counter",
    "ExpertLoadWriter": "eplb_dump.writer",
    "FORMAT_VERSION": "eplb_dump.format.schema",
    "WriterStats": "eplb_dump.writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
