"""Events in the Trace Event Format, as Perfetto, chrome://tracing and torch.profiler read and write it.

Perfetto sorts events by time, so they may be written in any order. It drops a slice that overlaps another one
of the same track without being inside it: a caller keeps the slices of a track apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

#: torch.profiler (Kineto) states times relative to a multiple of this, a quarter of a mean year, so that a
#: float64 of microseconds holds nanoseconds. With the same base, files line up without any shift.
QUARTER_NS = 7_889_238 * 10**9
#: Above the numbers of an operating system's processes, so that a trace that is opened together with an
#: engine's has processes of its own.
FIRST_PID = 1 << 23
#: Numbers for the tracks of a process, and for those of one place in it.
TRACKS, PLACE = 1 << 12, 1 << 8

#: Perfetto shows characters that are escaped, and need not be, as they are in the file.
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode


def base_of(unix_ns: int) -> int:
    """The base time that torch.profiler would use at a time; both are ns since 1970."""
    return unix_ns // QUARTER_NS * QUARTER_NS


class TraceFile:
    """Writes events to a file, one a line; the file is JSON once it is closed.

    Attributes:
        events: how many were written.
    """

    def __init__(self, out: IO[bytes], base_ns: int, about: Mapping[str, Any]) -> None:
        """``about``: what is not an event, for people and other programs."""
        self._out, self._base = out, base_ns
        self._lines: list[str] = []
        self._processes = 0
        self.events = 0
        head = {"displayTimeUnit": "ms", "baseTimeNanoseconds": base_ns, "otherData": about}
        self._write(f'{_encode(head)[:-1]},"traceEvents":[\n')

    def process(self, name: str) -> Process:
        """A new process, which is shown below those before it."""
        self._processes += 1
        return Process(self, FIRST_PID + TRACKS * (self._processes - 1), name, self._processes)

    def add(self, line: str) -> None:
        """Add an event, JSON without a line break."""
        self._lines.append(line)

    def time(self, unix_ns: int) -> str:
        """A time as the format has it: microseconds since the base."""
        # Perfetto drops what is before its beginning.
        micro, nano = divmod(max(0, unix_ns - self._base), 1000)
        return f"{micro}.{nano:03d}"

    def flush(self) -> None:
        if self._lines:
            self._write((",\n" if self.events else "") + ",\n".join(self._lines))
            self.events += len(self._lines)
            self._lines.clear()

    def close(self) -> None:
        self.flush()
        self._write("\n]}\n")

    def _write(self, text: str) -> None:
        # What UTF-8 cannot hold becomes an escape of JSON.
        self._out.write(text.encode("utf-8", "backslashreplace"))


class Process:
    """A group of tracks; times are ns since 1970."""

    def __init__(self, file: TraceFile, pid: int, name: str, place: int) -> None:
        self._file, self.pid = file, pid
        self._tracks: dict[int, int] = {}
        self._head("process_name", pid, {"name": name})
        self._head("process_sort_index", pid, {"sort_index": place})

    def _head(self, what: str, tid: int, args: dict[str, Any]) -> None:
        self._file.add(f'{{"ph":"M","pid":{self.pid},"tid":{tid},"name":"{what}","args":{_encode(args)}}}')

    def track(self, name: str, place: int) -> int:
        """The number of a new track for slices. Those of a process are shown in order of their places."""
        self._tracks[place] = self._tracks.get(place, 0) + 1
        tid = self.pid + PLACE * (1 + place) + self._tracks[place]
        self._head("thread_name", tid, {"name": name})
        self._head("thread_sort_index", tid, {"sort_index": place})
        return tid

    def slice(self, track: int, name: str, begin: int, end: int, args: Mapping[str, Any]) -> None:
        """A slice, or an instant if it ends where it begins: its duration is not known."""
        time = self._file.time
        micro, nano = divmod(end - begin, 1000)
        kind = f'"ph":"X","dur":{micro}.{nano:03d}' if end > begin else '"ph":"i","s":"t"'
        self._file.add(
            f'{{{kind},"pid":{self.pid},"tid":{track},"ts":{time(begin)},"name":{_encode(name)},'
            f'"cat":"eplb","args":{_encode(args)}}}'
        )

    def counters(self, begin: int, values: Mapping[str, float]) -> None:
        """Figures that are valid from a time on. Perfetto shows a track for each, ``step NAME``."""
        self._file.add(
            f'{{"ph":"C","pid":{self.pid},"tid":{self.pid},"ts":{self._file.time(begin)},"name":"step",'
            f'"args":{_encode(values)}}}'
        )
