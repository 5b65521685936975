"""The offline side of eplb-dump: open a run, get polars frames, compute the field's figures.

>>> run = open_run("dumps")                                          # doctest: +SKIP
>>> run.balancedness("balancedness", by="layer")                     # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb_analyze.errors import DumpError
    from eplb_analyze.reader.run import Run, open_run

__all__ = ["DumpError", "Run", "open_run"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `eplb-analyze --help` does not import polars and pyarrow.
    if name in ("Run", "open_run"):
        from eplb_analyze.reader import run

        return getattr(run, name)
    if name == "DumpError":
        from eplb_analyze.errors import DumpError

        return DumpError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
