"""Reads a trace as the Trace Event Format defines it, with exact times, and checks what Perfetto requires.

Nothing here is from ``eplb_analyze``.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

#: Linux numbers processes up to here.
LARGEST_PID = 1 << 22
INT32 = (1 << 31) - 1


@dataclass(frozen=True)
class Slice:
    """An event with a beginning and an end, ns since 1970; an instant has none of its own."""

    process: str
    track: str
    name: str
    begin: int
    end: int
    args: dict[str, Any]


@dataclass
class Trace:
    base_ns: int
    about: dict[str, Any]
    slices: list[Slice] = field(default_factory=list)
    #: By process: times, ns since 1970, and the figures from then on.
    counters: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)

    def track(self, name: str, process: str = "expert load: ") -> list[Slice]:
        """The slices of a track, in order of time, of the first process with this beginning of its name."""
        names = [s.process for s in self.slices if s.process.startswith(process)]
        return sorted(
            (s for s in self.slices if s.track == name and s.process in names[:1]),
            key=lambda s: (s.begin, s.end),
        )

    def steps(self, process: str = "expert load: ") -> dict[int, Slice]:
        found = {s.args["step"]: s for s in self.track("steps", process)}
        assert len(found) == len(self.track("steps", process))
        return found

    def counter(self, name: str, time: int, process: str) -> float:
        """Its value at a time."""
        return [values[name] for at, values in self.counters[process] if at <= time and name in values][-1]


def read_trace(path: Path) -> Trace:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    document = json.loads(
        text, parse_float=Decimal, parse_constant=_reject, object_pairs_hook=_without_duplicates
    )
    assert list(document) == ["displayTimeUnit", "baseTimeNanoseconds", "otherData", "traceEvents"]
    assert document["displayTimeUnit"] == "ms"
    trace = Trace(document["baseTimeNanoseconds"], document["otherData"])
    processes, tracks = {}, {}
    numbers: dict[int, set[int]] = defaultdict(set)
    for event in document["traceEvents"]:
        pid, tid = event["pid"], event["tid"]
        assert LARGEST_PID < pid <= INT32
        assert pid <= tid <= INT32
        numbers[tid].add(pid)
        if event["ph"] == "M":
            if event["name"] == "process_name":
                assert pid not in processes
                processes[pid] = event["args"]["name"]
            elif event["name"] == "thread_name":
                assert tid not in tracks
                tracks[tid] = event["args"]["name"]
            else:
                assert event["name"] in ("process_sort_index", "thread_sort_index")
    assert all(len(pids) == 1 for pids in numbers.values()), "a track belongs to two processes"
    assert len(set(processes.values())) == len(processes)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "M":
            continue
        process, begin = processes[event["pid"]], trace.base_ns + _ns(event["ts"])
        if event["ph"] == "C":
            values = event["args"]
            assert values
            assert all(type(v) in (int, Decimal) for v in values.values())
            at = trace.counters.setdefault(process, [])
            assert not at or at[-1][0] <= begin
            at.append((begin, {name: float(v) for name, v in values.items()}))
            continue
        assert event["ph"] == "X" or (event["ph"], event["s"]) == ("i", "t")
        end = begin + (_ns(event["dur"]) if event["ph"] == "X" else 0)
        assert event["ph"] == "i" or end > begin
        trace.slices.append(
            Slice(process, tracks[event["tid"]], event["name"], begin, end, _floats(event["args"]))
        )
        spans[event["tid"]].append((begin, end))
    for own in spans.values():
        for before, after in itertools.pairwise(sorted(own)):
            assert before[1] <= after[0], "Perfetto drops slices that overlap"
    return trace


def _ns(micro: Decimal) -> int:
    ns = micro * 1000
    assert ns == int(ns) >= 0
    return int(ns)


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value


def _reject(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)
