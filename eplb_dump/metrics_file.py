"""The writer's health as a text file for the textfile collector of Prometheus' node_exporter.

It has what :class:`eplb_dump.accounting.WriterStats` counts, and nothing about loads: for a host where no
sidecar can see the dump. The sealing thread writes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from eplb_dump.accounting import WriterStats
from eplb_dump.format.files import replace_file
from eplb_dump.format.schema import model_slug
from eplb_dump.format.session import SessionInfo

#: The file, if the engine names none in the code. ``{rank}`` and ``{model}`` in it are replaced.
METRICS_FILE_VARIABLE = "EXPERT_LOAD_DUMP_METRICS_FILE"
#: How often it is written, in seconds.
REFRESH_SECONDS = 15.0
#: node_exporter reads no others.
SUFFIX = ".prom"
OUTCOMES = ("recorded", "dummy", "not_sampled", "dropped", "rejected")


def path_for(path: Path, info: SessionInfo) -> Path:
    """The file of one writer: no two ranks and models of a host share one.

    ``/x/eplb.prom`` becomes ``/x/eplb-deepseek-v3-rank00003.prom``, unless it has ``{model}`` or ``{rank}``.
    """
    name = path.name.removesuffix(SUFFIX)
    name += "" if "{model}" in name else "-{model}"
    name += "" if "{rank}" in name else "-rank{rank}"
    name = name.replace("{model}", model_slug(info.model)).replace("{rank}", f"{info.ep_rank:05d}")
    return path.with_name(name + SUFFIX)


class MetricsFile:
    """Writes the file whenever it is due.

    Attributes:
        path: None if none is wanted.
    """

    def __init__(self, path: Path | None, info: SessionInfo) -> None:
        path = path or _from_environment()
        self.path = None if path is None else path_for(path, info)
        self._due = time.monotonic()
        #: The bytes written when it was written last, and when they were first that many.
        self._bytes, self._written_at = 0, 0.0

    def seconds_left(self) -> float | None:
        """Until it is due; None if none is wanted."""
        return None if self.path is None else max(0.0, self._due - time.monotonic())

    def refresh(self, info: SessionInfo, stats: Callable[[], WriterStats], *, waiting: int) -> None:
        """Write it if it is due; ``waiting``: steps in the queue. Raises OSError."""
        if self.seconds_left() == 0:
            self._due = time.monotonic() + REFRESH_SECONDS
            if info.run_id:  # it is a label of all series
                self.write(info, stats(), waiting=waiting)
            else:  # it is known once the session is open
                self._due = time.monotonic() + min(1.0, REFRESH_SECONDS)

    def write(self, info: SessionInfo, stats: WriterStats, *, waiting: int = 0, ended: bool = False) -> None:
        """Write it now. Raises OSError."""
        if self.path is None:
            return
        if stats.bytes_written != self._bytes:
            self._bytes, self._written_at = stats.bytes_written, time.time()
        text = render(info, stats, waiting=waiting, written_at=self._written_at, ended=ended)
        replace_file(self.path, text.encode(), durable=False)


def render(info: SessionInfo, stats: WriterStats, *, waiting: int, written_at: float, ended: bool) -> str:
    """The file's text, in Prometheus' text format.

    Args:
        written_at: when the journal last grew, in seconds since 1970; 0 if it never did.
    """
    own = f'model="{_escaped(info.model)}",rank="{info.ep_rank}",run="{info.run_id}"'
    lines: list[str] = []

    def add(name: str, kind: str, text: str, *samples: tuple[str, float]) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{{{own}{labels}}} {value!r}" for labels, value in samples)

    def counter(name: str, text: str, value: int) -> None:
        add(f"eplb_writer_{name}_total", "counter", text, ("", value))

    def gauge(name: str, text: str, value: float) -> None:
        add(f"eplb_writer_{name}", "gauge", text, ("", value))

    outcomes = [(f',outcome="{outcome}"', int(getattr(stats, outcome))) for outcome in OUTCOMES]
    add("eplb_writer_steps_total", "counter", "Steps that the writer saw, by what became of them.", *outcomes)
    counter("journal_bytes", "Bytes appended to journals.", stats.bytes_written)
    counter("sealed_segments", "Journals that were sealed into Parquet.", stats.segments_sealed)
    text = "Journals that could not be sealed; readers read them as they are."
    counter("unsealed_segments", text, stats.segments_left_open)
    gauge("waiting_steps", "Steps in the queue to the background thread.", waiting)
    text = "1 if recording stopped because of a fault, until the engine starts again; else 0."
    gauge("off", text, int(stats.off is not None))
    text = "1 if there is no space; steps are dropped until there is. Else 0."
    gauge("paused", text, int(stats.paused is not None))
    gauge("closed", "1 if the writer has ended, else 0.", int(ended))
    gauge("start_time_seconds", "Time at which the writer began.", info.created_unix_ns / 1e9)
    text = "Time by which the journal last grew, to within 15 s; 0 if it never did."
    gauge("last_write_timestamp_seconds", text, written_at)
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _from_environment() -> Path | None:
    text = os.environ.get(METRICS_FILE_VARIABLE, "")
    return Path(text) if text else None
